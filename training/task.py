"""What the engine asks of a task: its data, its model, its metrics and its figures."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, Trainer, TrainerCallback

from modeling_uhop import SeparationCallback

from .errors import RecipeError
from .recipe import Recipe
from .run_folder import RunFolder


@dataclass
class Examples:
    """What one training is given.

    Attributes:
        train: The training examples.
        evaluated: The examples, or several sets of examples by name, to evaluate during training;
            `None` for no evaluation.
        unlabelled: A function of `separation.dataset` and `separation.split` that loads what Stage
            I draws from; at least one of them is not `None`.
        processor: The processor that is saved with the model, or `None`.
        collator: The data collator, or `None` for that of the Trainer.
        metrics: `compute_metrics` of the Trainer, or `None`.
        views: The augmented views of `separation.views`, a function of their fields; `None` for a
            task without views.
    """

    train: Any
    evaluated: Any
    unlabelled: Callable[[str | None, str | None], Any]
    processor: Any = None
    collator: Any = None
    metrics: Callable[..., dict[str, float]] | None = None
    views: Callable[..., Callable[[Any], Any]] | None = None


class Task(ABC):
    """A kind of recipe, such as "images". The engine calls the methods in the order given here.

    Attributes:
        recipe_class: The dataclass of its recipes.
        pipeline: The pipeline that a saved model is for; a key of `reload.LOADERS`. `None` for a
            model that takes arrays, all of one shape, as its main input.
        defaults: `TrainingArguments` that recipes need not state.
        monitored: The validation loss, as the Trainer logs it without "eval_".
        may_change: Sections of the recipe that a resumed run may change.
    """

    recipe_class: ClassVar[type[Recipe]]
    pipeline: ClassVar[str | None] = None
    defaults: ClassVar[dict[str, Any]] = {}
    monitored: ClassVar[str] = "loss"
    may_change: ClassVar[tuple[str, ...]] = ("training",)

    def __init__(self, recipe: Any):
        self.recipe = recipe

    @abstractmethod
    def load(self) -> None:
        """Check the recipe, and load and check its data.

        Raises:
            RecipeError: If the recipe or its data cannot be used.
        """

    @abstractmethod
    def examples(self) -> Examples:
        """What the training is given."""

    @abstractmethod
    def model(self, examples: Examples) -> PreTrainedModel:
        """A new model. The engine has set the seed."""

    def callbacks(self, model: PreTrainedModel, separation: SeparationCallback | None) -> list[TrainerCallback]:
        """Callbacks of the task itself, which are called after the separation step."""
        return []

    def recorded(self) -> dict[str, Any]:
        """What these callbacks recorded, for JSON; the engine saves it with the finished
        training."""
        return {}

    @abstractmethod
    def describe(self, model: PreTrainedModel) -> str:
        """One line about a run before its training."""

    @abstractmethod
    def evaluate(self, trainer: Trainer, model: PreTrainedModel, folder: RunFolder) -> dict[str, Any]:
        """The metrics of `recipe.evaluation.split`, and those of validation data.

        Every process calls it; the engine uses the metrics of the main process.

        Args:
            trainer: The Trainer after the training.
            model: The trained model without wrappers, in evaluation mode, on the Trainer's device.
            folder: The folder for the stages of a long evaluation.
        """

    def details(self) -> dict[str, Any]:
        """Other results than metrics, for the results file."""
        return {}

    @abstractmethod
    def figures(self, folder: RunFolder, model: PreTrainedModel, trained: dict[str, Any]) -> None:
        """Draw the figures of a run into its folder."""

    @abstractmethod
    def summary(self, metrics: dict[str, Any]) -> str:
        """The metrics as lines of text."""

    @abstractmethod
    def score(self, folder: Path) -> dict[str, float]:
        """The metrics of a saved model on the loaded data; see `evaluation.evaluate`.

        Raises:
            RecipeError: If the data do not fit the model.
        """

    @abstractmethod
    def probes(self, model: PreTrainedModel) -> tuple[list[np.ndarray] | dict[str, np.ndarray], np.ndarray]:
        """Some inputs, and the outputs of the model for them, to compare with a reloaded model; see
        `check_reload`."""


def check_same_classes(id2label: dict[int, str], names: list[str]) -> None:
    """Raise a `RecipeError` if data have other classes than a model."""
    expected = [id2label[index] for index in range(len(id2label))]
    if names != expected:
        raise RecipeError(f"the model has the classes {expected}, but the data have {names}")
