"""Read and check recipes: one YAML file for each experiment.

A recipe names its task and states only what differs from the defaults of the task's dataclass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .errors import RecipeError
from .recipe_file import apply_override, check_content, read_yaml
from .tasks import recipe_class_of


# The folder of configs/, model_cards/ and, in a checkout, benchmarks/.
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Evaluation:
    """What a run reports.

    Attributes:
        split: "test", or "validation" for runs that choose between recipes. With "validation", the
            test data are never read.

    Raises:
        RecipeError: For another split.
    """

    split: str = "test"

    def __post_init__(self):
        if self.split not in ("test", "validation"):
            raise RecipeError(f"evaluation.split must be 'test' or 'validation', got {self.split!r}")


@dataclass
class Recipe:
    """The part of a recipe that all tasks share.

    Attributes:
        name: Name of the experiment; the file name if the recipe gives none.
        data: Where the data come from; fields of the task's `data_class`.
        task: One of `TASKS`.
        model: Fields of the task's `config_class`.
        separation: Arguments of `SeparationCallback` and fields of `Separation`; `None` for a run
            without the separation step (Stage I). `preset` begins with a preset of `Separation`.
            `dataset` and `split` name the data set that Stage I draws from, which needs no labels;
            without them it is that of the training.
        training: Fields of `TrainingArguments`.
        seed: Training seed.
        patience: Training ends after this number of evaluations without a lower validation loss,
            and the best checkpoint is restored. There is one evaluation per `training.eval_steps`
            steps or per epoch. `None` for a training of full length.
        evaluation: What the run reports.
    """

    config_class: ClassVar[Any]
    data_class: ClassVar[Any]

    name: str
    data: Any
    task: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    separation: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    patience: int | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read a recipe and apply overrides such as `training.learning_rate=1e-4`.

    Raises:
        RecipeError: For an unknown task or key (the message names the nearest valid key), a missing
            key, or a file that is not a YAML mapping.
    """
    content = read_yaml(Path(path))
    content.setdefault("name", Path(path).stem)
    for override in overrides:
        apply_override(content, override)
    return build_recipe(content)


def build_recipe(content: dict[str, Any]) -> Any:
    """Build a recipe from a mapping, after a check of every key in every section."""
    check_content(content)
    recipe_class = recipe_class_of(content["task"])
    sections = {name: content.get(name) or {} for name in ("model", "separation", "training", "evaluation")}
    built = {"data": recipe_class.data_class(**content["data"]), "evaluation": Evaluation(**sections["evaluation"])}
    separation = None if content.get("separation") is None else sections["separation"]
    return recipe_class(**{**content, **sections, "separation": separation, **built})


def upgraded(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version recorded, with all fields, in the form of today's."""
    content = {key: value for key, value in recorded.items() if key not in ("judge", "evaluate_on")}
    if "anchor_lengths" in content:
        content["baseline_lengths"] = content.pop("anchor_lengths")
    columns = {"instances_column": "bags", "date_column": "series"}
    content.setdefault("task", next((task for column, task in columns.items() if column in recorded["data"]), "images"))
    content.setdefault("evaluation", {"split": recorded.get("evaluate_on", recorded.get("judge", "test"))})
    return content
