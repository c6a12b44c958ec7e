"""Short runs of the Trainer with a tiny image classifier."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_uhop import FeatureMap, UHopViTConfig, UHopViTForImageClassification
from tests.support.models import IMAGES


class Images(torch.utils.data.Dataset):
    """Random images; each access uses the global random state, as augmentation does."""

    def __init__(self, size: int = 48, augment: bool = True):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(size, 3, 8, 8, generator=generator)
        self.labels = torch.randint(3, (size,), generator=generator)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = random.random() + np.random.random() + torch.randn(3, 8, 8) if self.augment else torch.zeros(3, 8, 8)
        return {"pixel_values": self.images[index] + 0.1 * noise.float(), "labels": self.labels[index]}


def image_model(**fields) -> UHopViTForImageClassification:
    torch.manual_seed(7)
    return UHopViTForImageClassification(UHopViTConfig(**{**IMAGES, "num_labels": 3, "hidden_dropout_prob": 0.1, **fields}))


def image_trainer(folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, dataset=None, **arguments) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model or image_model(),
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=dataset or Images(),
        callbacks=list(callbacks),
    )


def train(folder: Path, *callbacks: TrainerCallback, resume: str | bool | None = None, **arguments) -> dict[str, torch.Tensor]:
    trainer = image_trainer(folder, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def map_weights(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight.detach().float().clone() for module in model.modules() if isinstance(module, FeatureMap)]
