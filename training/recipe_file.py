"""Read recipe files, change them, and check their keys, without importing what they describe."""

import ast
import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError
from .fields import fields_of, find_class, parameters_of, parsed, source_of, value_of
from .tasks import TASKS


# Earlier names of recipe fields, and their names now.
RENAMED = {"judge": "evaluation", "evaluate_on": "evaluation", "anchor_lengths": "baseline_lengths"}
# Short names that people try, and the fields that they mean.
MEANT = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch_size": "per_device_train_batch_size", "steps": "max_steps"}


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
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a YAML mapping of recipe fields")
    return content


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
        for name in set(content) & {*fields_of(source_of("modeling_uhop"), "Separation")} - kept:
            del content[name]
    content[last] = yaml.load(value, Loader=_Loader)


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


def with_known_keys(section: str, given: dict[str, Any], cls: type) -> dict[str, Any]:
    """Return a mapping unchanged if each of its keys is a field of the dataclass; otherwise raise a
    `RecipeError`."""
    check_keys(section, given, [each.name for each in dataclasses.fields(cls)])
    return given


def check_content(content: dict[str, Any]) -> None:
    """Check the task and all keys of a recipe.

    Raises:
        RecipeError: For an unknown task or key; the message names the choices or the nearest key.
    """
    if content.get("task") not in TASKS:
        raise RecipeError(f"a recipe needs task: {' | '.join(TASKS)}, got {content.get('task')!r}")
    path = _here("tasks") / f"{content['task']}.py"
    name = next(node.name for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef) and "Recipe" in map(ast.unparse, node.bases))
    _, recipe = find_class(path, name)
    check_keys("recipe", content, [*fields_of(path, name)])
    data = content.get("data")
    if not isinstance(data, dict) or "dataset" not in data:
        raise RecipeError("a recipe needs data.dataset: the name of a built-in data set, a Hub id, or a local folder or file")
    arguments = fields_of(source_of("transformers"), "TrainingArguments")
    valid = {
        "data": fields_of(path, value_of(recipe, "data_class")),
        "model": fields_of(path, value_of(recipe, "config_class")),
        "separation": separation_keys(),
        "training": arguments,
        "evaluation": fields_of(_here("recipe.py"), "Evaluation"),
    }
    for section, keys in valid.items():
        check_keys(section, content.get(section) or {}, [*keys])
    for argument, value in (content.get("training") or {}).items():
        kinds = set(arguments[argument].split(" | "))
        if kinds <= {"int", "float", "None"} and not (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
            raise RecipeError(f"training.{argument} must be a number, got {value!r}")
    for owned in ("output_dir", "seed"):
        if owned in (content.get("training") or {}):
            raise RecipeError(f"training.{owned} cannot be set in a recipe; use the top-level `seed` and the option --output_dir")


def separation_keys() -> list[str]:
    """The keys of the section `separation`, without the arguments that are no text or number."""
    names = {
        *fields_of(source_of("modeling_uhop"), "Separation"),
        *parameters_of(source_of("modeling_uhop"), "SeparationCallback"),
        "preset",
        "split",
    }
    return sorted(names - {"corruption", "separation", "data_collator"})


def _here(name: str) -> Path:
    return Path(__file__).resolve().with_name(name)
