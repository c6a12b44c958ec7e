"""Three transfers: a model of transformers trained here on much data, and few examples of other data.

Each is small enough for a CPU, and needs no download beside its data sets.
"""

import ast
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from transformers import (
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PatchTSTConfig,
    PatchTSTForPrediction,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from .data.images import ImageData, load_images, make_image_processor, with_pixels
from .data.series import SeriesData, load_series


TEN = {label: str(label) for label in range(10)}


@dataclass
class Examples:
    """The few examples of a run, and those that it is scored on."""

    train: Dataset
    validation: Dataset
    test: Dataset


class Transfer(ABC):
    """A model trained on a source, and the target that it is moved to.

    Args:
        source, target: Names of the two data sets.
        count: Number of training examples of the target.

    Attributes:
        head: Name of the module that every variant trains, beside its adapter.
        score: What `measure` returns for a model, as a column of a table.
        larger_is_better: Whether a larger score is better.
        label_names: `TrainingArguments.label_names`.
        lora: Names of the query and key projections.
        corruption: What makes the copies of a separation step with copies; `None` for noise.
    """

    head: ClassVar[str]
    score: ClassVar[str]
    larger_is_better: ClassVar[bool] = False
    label_names: ClassVar[list[str]] = ["labels"]
    lora: ClassVar[list[str]] = ["q_proj", "k_proj"]
    corruption: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __init__(self, source: str, target: str, count: int):
        self.source, self.target, self.count = source, target, count

    @abstractmethod
    def source_examples(self) -> Dataset:
        """What the model is trained on first."""

    @abstractmethod
    def source_model(self) -> PreTrainedModel:
        """A new model for the source."""

    def target_model(self, model: PreTrainedModel) -> PreTrainedModel:
        """The trained model with a head for the target."""
        return model

    @abstractmethod
    def examples(self, seed: int) -> Examples:
        """The examples of the target; the seed draws those for the training."""

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """`compute_metrics` of the Trainer; `None` if the loss is the score."""
        return None

    def measure(self, logged: dict[str, float]) -> float:
        """The score, from what the Trainer's `evaluate` returns."""
        return logged["eval_loss"]


class Rows(Dataset):
    """Examples that are rows of tensors; images are mirrored at random if `flip`."""

    def __init__(self, columns: dict[str, torch.Tensor], flip: bool = False):
        self.columns, self.flip = columns, flip

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {name: column[index] for name, column in self.columns.items()}
        if self.flip and torch.rand(()) < 0.5:
            row["pixel_values"] = row["pixel_values"].flip(-1)
        return row


class Images(Transfer):
    """A ViT for the classes of one data set, moved to `CLASSES` classes of another with `count` images each."""

    head, score, larger_is_better = "classifier", "test_accuracy", True
    CLASSES, SIDE, POOL = 20, 32, 50

    def source_examples(self) -> Dataset:
        split = load_images(ImageData(self.source, image_column=_image_column(self.source)), test=False)["train"]
        return Rows(self._tensors(split), flip=True)

    def source_model(self) -> PreTrainedModel:
        sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
        return ViTForImageClassification(ViTConfig(**sizes, image_size=self.SIDE, patch_size=4, id2label=TEN))

    def target_model(self, model: PreTrainedModel) -> PreTrainedModel:
        model.config.num_labels = self.CLASSES
        model.classifier = torch.nn.Linear(model.config.hidden_size, self.CLASSES)
        return model

    @cached_property
    def _splits(self) -> dict[str, dict[str, torch.Tensor]]:
        """The target's images of its first classes: "train" and, to choose settings by, "validation"."""
        data = ImageData(self.target, image_column=_image_column(self.target), validation_split="valid", test_split=None, test_fraction=0.0)
        splits = load_images(data, test=False)
        chosen = {}
        for name, split in splits.items():
            chosen[name] = self._tensors(split.select(np.flatnonzero(np.array(split["label"]) < self.CLASSES)))
        return chosen

    def examples(self, seed: int) -> Examples:
        columns = self._splits["train"]
        train, test = [], []
        random = np.random.default_rng(seed)
        for label in range(self.CLASSES):
            rows = torch.nonzero(columns["labels"] == label).flatten()
            train.append(rows[random.choice(self.POOL, self.count, replace=False)])
            test.append(rows[self.POOL :])
        few, rest = ({name: column[torch.cat(rows)] for name, column in columns.items()} for rows in (train, test))
        return Examples(Rows(few, flip=True), Rows(self._splits["validation"]), Rows(rest))

    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return lambda outputs: {"accuracy": float((np.argmax(outputs.predictions, -1) == outputs.label_ids).mean())}

    def measure(self, logged: dict[str, float]) -> float:
        return logged["eval_accuracy"]

    def _tensors(self, split: Any) -> dict[str, torch.Tensor]:
        items = with_pixels(split, make_image_processor(ImageData(""), self.SIDE))
        rows = [items[first : first + 500] for first in logging.tqdm(range(0, len(items), 500), desc="reading images")]
        pixels = torch.stack([image for row in rows for image in row["pixel_values"]])
        return {"pixel_values": pixels, "labels": torch.tensor([label for row in rows for label in row["labels"]])}


class Text(Transfer):
    """A language model of bytes: trained on the docstrings of one package, moved to `count` windows of another's."""

    head, score = "lm_head", "test_bits_per_byte"
    LENGTH, HELD_OUT = 128, 1000

    @staticmethod
    def corruption(ids: torch.Tensor) -> torch.Tensor:
        """Replace 15 % of the bytes by random ones."""
        return torch.where(torch.rand(ids.shape, device=ids.device) < 0.15, torch.randint_like(ids, 256), ids)

    def source_examples(self) -> Dataset:
        return self._windows(_docstrings(self.source))

    def source_model(self) -> PreTrainedModel:
        sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
        tokens: dict[str, Any] = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": self.LENGTH}
        return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, tie_word_embeddings=False, use_cache=False))

    @cached_property
    def _text(self) -> dict[str, np.ndarray]:
        """Modules of the target in a random order: the first for validation, then for the test, the rest for training."""
        modules = _docstrings(self.target)
        order = np.random.default_rng(0).permutation(len(modules))
        windows = self._windows([modules[index] for index in order]).columns["input_ids"].numpy()
        held = self.HELD_OUT
        return {"validation": windows[:held], "test": windows[held : 2 * held], "train": windows[2 * held :]}

    def examples(self, seed: int) -> Examples:
        chosen = np.random.default_rng(seed).choice(len(self._text["train"]), self.count, replace=False)
        parts = (self._text["train"][chosen], self._text["validation"], self._text["test"])
        return Examples(*(Rows({"input_ids": rows, "labels": rows}) for rows in map(torch.from_numpy, parts)))

    def measure(self, logged: dict[str, float]) -> float:
        return logged["eval_loss"] / float(np.log(2))

    def _windows(self, texts: list[str]) -> Rows:
        data = np.frombuffer("\n\n".join(texts).encode(), np.uint8).astype(np.int64)
        rows = torch.from_numpy(data[: len(data) // self.LENGTH * self.LENGTH]).reshape(-1, self.LENGTH)
        return Rows({"input_ids": rows, "labels": rows})


class Series(Transfer):
    """A PatchTST for one multivariate series, moved to another of as many channels with `count` windows."""

    head, score = "head", "test_mse"
    label_names = ["future_values"]
    CONTEXT, HORIZON = 336, 96

    def source_examples(self) -> Dataset:
        return self._series(self.source).windows("train", self.CONTEXT, self.HORIZON)

    def source_model(self) -> PreTrainedModel:
        lengths: dict[str, Any] = {"context_length": self.CONTEXT, "prediction_length": self.HORIZON}
        patches: dict[str, Any] = {"patch_length": 16, "patch_stride": 16}
        sizes: dict[str, Any] = {"d_model": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 128, "num_input_channels": 7}
        return PatchTSTForPrediction(PatchTSTConfig(**lengths, **patches, **sizes, scaling="std"))

    @cached_property
    def _windows(self) -> dict[str, Dataset]:
        series = self._series(self.target)
        return {split: series.windows(split, self.CONTEXT, self.HORIZON) for split in ("train", "validation", "test")}

    def examples(self, seed: int) -> Examples:
        windows: Any = self._windows
        chosen = np.random.default_rng(seed).choice(len(windows["train"]), self.count, replace=False)
        every = 4  # neighbouring windows are nearly the same
        validation = Subset(windows["validation"], range(0, len(windows["validation"]), every))
        return Examples(Subset(windows["train"], chosen.tolist()), validation, windows["test"])

    @staticmethod
    def _series(path: str) -> Any:
        return load_series(SeriesData(path, split=[8640, 2880, 2880]))


TRANSFERS: dict[str, type[Transfer]] = {"images": Images, "text": Text, "series": Series}


def _image_column(dataset: str) -> str:
    return "img" if "cifar" in dataset else "image"


def _docstrings(package: str) -> list[str]:
    """The docstrings of each module of an installed distribution, one text for a module."""
    found = []
    sources = [Path(str(file.locate())) for file in sorted(files(package) or []) if file.suffix == ".py"]
    for path in logging.tqdm([source for source in sources if source.is_file()], desc=f"docstrings of {package}"):
        text = "\n\n".join(_docstrings_of(ast.parse(path.read_bytes())))
        if text:
            found.append(text)
    return found


def _docstrings_of(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
