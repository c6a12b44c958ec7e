"""The demo's models of digits, read from a folder or the Hub, and how it trains a model for a visitor."""

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from demo_digits import DemoError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from modeling_uhop import UHopMILConfig, UHopMILFeatureExtractor, UHopMILForBagClassification, UHopViTConfig, UHopViTForImageClassification


Report = Callable[[float, str], None]
T = TypeVar("T")

TARGET = 9
# Models that come with the demo; make_models.py makes them.
SHIPPED = Path(__file__).resolve().parent / "models"
TRAINING = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@dataclass
class Classifier:
    """An image classifier that returns its association weights.

    Attributes:
        model, processor: As they are saved in a folder.
        source: What it is, in words.
    """

    model: UHopViTForImageClassification
    processor: Any
    source: str


@dataclass
class BagClassifier:
    """A classifier of bags of 8 x 8 images, with the extractor that was fitted on its training bags."""

    model: UHopMILForBagClassification
    extractor: UHopMILFeatureExtractor
    source: str


class Once(Generic[T]):
    """A value that is made when it is first asked for, once for all visitors."""

    def __init__(self, make: Callable[[Report], T]):
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self, report: Report) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make(report))
        return self._made[0]


class ProgressReport(TrainerCallback):
    """Tells a visitor who waits how far training is."""

    def __init__(self, report: Report, text: str):
        self.report = report
        self.text = text

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step / max(1, state.max_steps), self.text)


def train(model: Any, examples: list[dict[str, Any]], report: Report, text: str, callbacks: list[TrainerCallback], **options: Any) -> None:
    """Train `model` in place with the stock Trainer; `options` are the Trainer's, and `arguments` those of TrainingArguments."""
    arguments = {**TRAINING, **options.pop("arguments")}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(folder, **arguments),
            train_dataset=examples,
            callbacks=[*callbacks, ProgressReport(report, text)],
            **options,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval().cpu()


def digit_image(ink: np.ndarray) -> Image.Image:
    """Ink in [0, 1] as an image, bright on black as the models see digits."""
    return Image.fromarray((ink * 255).astype(np.uint8)).convert("RGB")


def load_classifier(source: str) -> Classifier:
    """The classifier in a folder or on the Hub.

    Raises:
        DemoError: If there is none, or it is of another kind.
    """
    config = _config(source)
    if config.model_type != UHopViTConfig.model_type:
        raise DemoError(f"{source} holds a model of type {config.model_type!r}; this tab needs {UHopViTConfig.model_type!r}.")
    try:
        model = AutoModelForImageClassification.from_pretrained(source, attn_implementation="eager")
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DemoError(f"{source} cannot be read: {_first_line(error)}") from error
    return Classifier(model.eval(), processor, described(source))


def draw_bag(pool: np.ndarray, labels: np.ndarray, positive: bool, random: np.random.Generator) -> list[int]:
    """Six to twelve indices of `pool`, without a 9, or with one or two where `positive`."""
    targets = int(random.integers(1, 3)) if positive else 0
    others = int(random.integers(6, 13)) - targets
    is_target = labels[pool] == TARGET
    drawn = np.concatenate([random.choice(pool[is_target], targets, replace=False), random.choice(pool[~is_target], others, replace=False)])
    return random.permutation(drawn).tolist()


def load_bag_classifier(source: str) -> BagClassifier:
    """The bag classifier in a folder or on the Hub.

    Raises:
        DemoError: If there is none, it is of another kind, or its instances are not 8 x 8 images as vectors.
    """
    config = _config(source)
    if config.model_type != UHopMILConfig.model_type:
        raise DemoError(f"{source} holds a model of type {config.model_type!r}; this tab needs {UHopMILConfig.model_type!r}.")
    if config.instance_type != "vector" or config.num_labels != 2:
        raise DemoError(f"{source} must classify bags of vectors into two classes, but has {config.instance_type!r}, {config.num_labels}.")
    try:
        model = UHopMILForBagClassification.from_pretrained(source)
        extractor = UHopMILFeatureExtractor.from_pretrained(source)
        extractor.transform([np.zeros((1, 64))])
    except (OSError, ValueError) as error:
        raise DemoError(f"{source} cannot be used: {_first_line(error)}") from error
    return BagClassifier(model.eval(), extractor, described(source))


def described(source: str) -> str:
    """A model's folder or Hub id as the page names it."""
    is_shipped = Path(source).resolve().is_relative_to(SHIPPED)
    return f"space/models/{Path(source).name}, which comes with the demo" if is_shipped else str(source)


def _config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise DemoError(f"{source} is no folder with a model and no model on the Hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
