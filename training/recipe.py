"""Read and check recipes: one YAML file for each experiment.

A recipe names its task and states only what differs from the defaults of the task's dataclass.
"""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from transformers import TrainingArguments

from modeling_uhop import Separation, SeparationCallback

from .errors import RecipeError
from .tasks import TASKS, recipe_class_of


# The folder of configs/, model_cards/ and, in a checkout, benchmarks/.
ROOT = Path(__file__).resolve().parent.parent

# Keys of the section `separation`, without the arguments that are no text or number.
_ARGUMENTS = {*inspect.signature(Separation).parameters, *inspect.signature(SeparationCallback).parameters, "preset", "split"}
SEPARATION_KEYS = sorted(_ARGUMENTS - {"corruption", "separation", "data_collator", "fields"})

# Earlier names of recipe fields, and their names now.
RENAMED = {"judge": "evaluation", "evaluate_on": "evaluation", "anchor_lengths": "baseline_lengths"}
# Short names that people try, and the fields that they mean.
MEANT = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size", "steps": "max_steps"}


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


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-3 as a number (YAML 1.1 reads it as text)."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file.

    Raises:
        RecipeError: If there is no such file, or it is not a YAML mapping.
    """
    if not path.is_file():
        raise RecipeError(f"there is no recipe {path}")
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a YAML mapping of recipe fields")
    return content


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


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply an override such as `training.learning_rate=1e-4` to the mapping of a recipe, in
    place.

    `separation.preset` removes the fields of `Separation` that were set before it, except those of
    its sampling: otherwise they would change the preset."""
    keys, separator, value = override.partition("=")
    if not separator:
        raise RecipeError(f"an override must look like training.learning_rate=1e-4, got {override!r}")
    *parents, last = keys.split(".")
    for key in parents:
        if content.get(key) is None:
            content[key] = {}
        if not isinstance(content[key], dict):
            raise RecipeError(f"{key} is {content[key]!r} and has no field {last!r}, in the override {override!r}")
        content = content[key]
    if keys == "separation.preset":
        kept = {"steps", "batch_size", "include_class_token", "pool_memories"}
        for name in set(content) & {*inspect.signature(Separation).parameters} - kept:
            del content[name]
    content[last] = yaml.load(value, Loader=_Loader)


def build_recipe(content: dict[str, Any]) -> Any:
    """Build a recipe from a mapping, after a check of every key in every section."""
    if content.get("task") not in TASKS:
        raise RecipeError(f"a recipe needs task: {' | '.join(TASKS)}, got {content.get('task')!r}")
    recipe_class = recipe_class_of(content["task"])
    with_known_keys("recipe", content, recipe_class)
    data = content.get("data")
    if not isinstance(data, dict) or "dataset" not in data:
        raise RecipeError("a recipe needs data.dataset: the name of a built-in data set, a Hub id, or a local folder or file")
    sections = {name: content.get(name) or {} for name in ("model", "separation", "training", "evaluation")}
    with_known_keys("data", data, recipe_class.data_class)
    with_known_keys("model", sections["model"], recipe_class.config_class)
    check_keys("separation", sections["separation"], SEPARATION_KEYS)
    with_known_keys("training", sections["training"], TrainingArguments)
    with_known_keys("evaluation", sections["evaluation"], Evaluation)
    for owned in ("output_dir", "seed"):
        if owned in sections["training"]:
            raise RecipeError(f"training.{owned} cannot be set in a recipe; use the top-level `seed` and the option --output_dir")
    built = {"data": recipe_class.data_class(**data), "evaluation": Evaluation(**sections["evaluation"])}
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


def with_known_keys(section: str, given: dict[str, Any], cls: type) -> dict[str, Any]:
    """Return a mapping unchanged if each of its keys is a field of the dataclass; otherwise raise a
    `RecipeError`."""
    check_keys(section, given, [each.name for each in dataclasses.fields(cls)])
    return given


def check_keys(section: str, given: dict[str, Any], valid: list[str]) -> None:
    """Raise a `RecipeError` for a key that is not valid; the message names the nearest valid
    key."""
    if not isinstance(given, dict):
        raise RecipeError(f"{section} must be a mapping, got {given!r}")
    for key in given:
        if key not in valid:
            if RENAMED.get(key) in valid:
                raise RecipeError(f"{key!r} in {section} is now called {RENAMED[key]!r}; rename it")
            close = [MEANT[key]] if MEANT.get(key) in valid else difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)
            raise RecipeError(f"unknown key {key!r} in {section}; the nearest valid one is {close[0]!r}")
