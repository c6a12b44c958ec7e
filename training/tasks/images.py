"""Image classification: a Hopfield vision transformer, or a ViT or a ResNet as a baseline."""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)
from transformers.trainer_callback import PrinterCallback

from modeling_uhop import ImageViews, SeparationCallback, UHopViTConfig, UHopViTForImageClassification
from modeling_uhop.feature_map import unit_norm
from modeling_uhop.images import as_rgb

from ..baselines.small_resnet import SmallResNetConfig, SmallResNetForImageClassification, resnet_of_size
from ..data.images import ImageData, load_images, make_image_processor, unlabelled_images, with_pixels
from ..errors import RecipeError
from ..metrics import classification_metrics
from ..recipe import Recipe
from ..report.figures import training_figure
from ..task import Examples, Task, check_same_classes
from ..trainers import DEFAULTS


NUM_PROBES = 64


@dataclass
class ImagesRecipe(Recipe):
    """A vision experiment.

    Attributes:
        architecture: "uhop_vit", or one of two baselines. "vit": the ViT of transformers at the
            same size, without alpha and without Phi. "resnet": the ResNet for small images whose
            number of parameters is closest to that of the Hopfield model.
    """

    config_class: ClassVar[type] = UHopViTConfig
    data_class: ClassVar[type] = ImageData

    task: str = "images"
    architecture: str = "uhop_vit"


class Images(Task):
    """Train on images with labels. Validation images are held out from the training split."""

    recipe_class = ImagesRecipe
    pipeline = "image-classification"
    # Because `with_transform` needs the raw columns, the Trainer must not remove them.
    defaults = {"remove_unused_columns": False, "eval_strategy": "epoch"}
    monitored = "validation_loss"

    def load(self) -> None:
        recipe: ImagesRecipe = self.recipe
        self.splits = ["validation", *(["test"] if recipe.evaluation.split == "test" else [])]
        self.images = load_images(recipe.data, test="test" in self.splits)
        names = self.images["train"].features["label"].names
        labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        self.config = UHopViTConfig(**recipe.model, **labels)
        self.processor = make_image_processor(recipe.data, self.config.image_size, self.images["train"])
        baselines = ("vit", "resnet")
        if recipe.architecture not in ("uhop_vit", *baselines) or (recipe.architecture in baselines and recipe.separation is not None):
            raise RecipeError(
                "architecture must be 'uhop_vit', or 'vit' or 'resnet' without a separation step, "
                f"got {recipe.architecture!r} with separation {recipe.separation}"
            )

    def examples(self) -> Examples:
        data = self.recipe.data
        return Examples(
            train=with_pixels(self.images["train"], self.processor, data),
            evaluated={split: with_pixels(self.evaluated_part(split), self.processor) for split in ("validation", "train")},
            unlabelled=lambda *where: with_pixels(unlabelled_images(data, *where), self.processor, augment=data),
            views=partial(ImageViews, mean=data.image_mean, std=data.image_std),
            processor=self.processor,
            metrics=classification_metrics,
        )

    def evaluated_part(self, split: str) -> Dataset:
        """The part of a split that is evaluated after each epoch.

        It has the same number of images for training and validation, and at most
        `max_eval_samples`.
        """
        sizes = [len(self.images["validation"]), len(self.images["train"]), self.recipe.data.max_eval_samples]
        return self.images[split].select(range(min(size for size in sizes if size is not None)))

    def model(self, examples: Examples) -> PreTrainedModel:
        model = UHopViTForImageClassification(self.config)
        if self.recipe.architecture == "uhop_vit":
            return model
        if self.recipe.architecture == "resnet":
            labels = {name: getattr(self.config, name) for name in ("num_channels", "id2label", "label2id")}
            return SmallResNetForImageClassification(resnet_of_size(model.num_parameters(), **labels))
        return ViTForImageClassification(cast(ViTConfig, model.to_vit().config))

    def callbacks(self, model: PreTrainedModel, separation: SeparationCallback | None) -> list[TrainerCallback]:
        self.recorder = None
        if separation is not None:
            probe = self.images["validation"].select(range(min(NUM_PROBES, len(self.images["validation"]))))
            pixel_values = torch.stack(with_pixels(probe, self.processor)[:]["pixel_values"])
            event = "on_train_begin" if separation.schedule == "train_begin" else "on_train_end"
            self.recorder = GramRecorder(model, event, pixel_values)
        return [] if self.recorder is None else [self.recorder]

    def recorded(self) -> dict[str, Any]:
        return {"grams": {} if self.recorder is None else self.recorder.grams}

    def describe(self, model: PreTrainedModel) -> str:
        recipe = self.recipe
        sizes = ", ".join(f"{len(split):,} {name}" for name, split in self.images.items())
        stage_one = "no separation step" if recipe.separation is None else f"separation {recipe.separation}"
        return f"{recipe.name}: {model.num_parameters():,} parameters; images: {sizes}; {stage_one}; seed {recipe.seed}"

    def evaluate(self, trainer, model, folder) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for split in self.splits:
            found = trainer.evaluate(with_pixels(self.images[split], self.processor), metric_key_prefix=split)
            metrics = {f"{split}_{name}": found[f"{split}_{name}"] for name in ("accuracy", "loss")} | metrics
        accuracies = [entry["eval_train_accuracy"] for entry in trainer.state.log_history if "eval_train_accuracy" in entry]
        return metrics | ({"max_train_accuracy": max(accuracies)} if accuracies else {})

    def figures(self, folder, model, trained) -> None:
        grams = {moment: [np.array(gram) for gram in layers] for moment, layers in trained["grams"].items()}
        training_figure(folder.path / "training.png", trained["state"]["log_history"], trained["history"], grams)

    def summary(self, metrics: dict[str, Any]) -> str:
        values = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in metrics.items()}
        return "\n".join(f"  {name:<24} {value}" for name, value in values.items())

    def score(self, folder: Path) -> dict[str, float]:
        model = AutoModelForImageClassification.from_pretrained(folder)
        check_same_classes(model.config.id2label, self.images["train"].features["label"].names)
        self.processor = ViTImageProcessorPil.from_pretrained(folder)
        with tempfile.TemporaryDirectory() as scratch:
            no_training = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
            arguments = TrainingArguments(scratch, **{**DEFAULTS, **self.defaults, **self.recipe.training, **no_training})
            trainer = Trainer(model, arguments, processing_class=self.processor, compute_metrics=classification_metrics)
            trainer.remove_callback(PrinterCallback)
            split = self.splits[-1]
            found = trainer.evaluate(with_pixels(self.images[split], self.processor), metric_key_prefix=split)
        return {f"{split}_{name}": found[f"{split}_{name}"] for name in ("accuracy", "loss")}

    @torch.no_grad()
    def probes(self, model: PreTrainedModel) -> tuple[list[np.ndarray], np.ndarray]:
        split = self.images[self.splits[-1]]
        shown = [as_rgb(image) for image in split[: min(NUM_PROBES, len(split))]["image"]]
        pixel_values = self.processor(shown, return_tensors="pt")["pixel_values"]
        return [np.asarray(image) for image in shown], model.cpu().float()(pixel_values).logits.numpy()


class GramRecorder(TrainerCallback):
    """Records the feature Gram matrices of some images when it is created, and at one event of the
    Trainer, such as "on_train_end"."""

    def __init__(self, model: PreTrainedModel, event: str, pixel_values: torch.Tensor):
        self.pixel_values = pixel_values
        self.grams = {"before": feature_grams(model, pixel_values), "after": []}
        setattr(self, event, self._record)

    def _record(self, args, state, control, model=None, **kwargs):
        self.grams["after"] = feature_grams(model, self.pixel_values)


@torch.no_grad()
def feature_grams(model: Any, pixel_values: torch.Tensor) -> list[list[list[float]]]:
    """For each layer, the cosine similarities (patches, patches) of patch features, averaged over
    images and rounded to four digits, which is enough for a figure."""
    training = model.training
    # Because dropout would change the random state of the training that follows, we switch it off.
    features = [unit_norm(each.features().float()) for each in model.eval().memory_sets(pixel_values.to(model.device))]
    model.train(training)
    return [(feature @ feature.mT).mean(0).cpu().numpy().round(4).tolist() for feature in features]


# Because a saved baseline is loaded by its auto class, transformers must know it.
AutoConfig.register(SmallResNetConfig.model_type, SmallResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallResNetConfig, SmallResNetForImageClassification, exist_ok=True)

TASK = Images
