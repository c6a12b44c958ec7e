"""A tiny recipe of each task, and helpers for runs of recipes."""

import copy
import json
from pathlib import Path
from typing import Any

from modeling_uhop.training import engine
from modeling_uhop.training.recipe import Recipe, apply_override, build_recipe
from modeling_uhop.training.tasks import task_class_of


TASKS = ("images", "bags", "series")
# The modules of the tasks, for patches.
MODULES = {name: f"modeling_uhop.training.tasks.{name}" for name in TASKS}
# The figures of each task: their files, and a function that draws one of them.
FIGURES = {"images": ("training.png",), "bags": ("bag.png",), "series": ("forecast.png", "weights.png")}
DRAWING = {"images": "training_figure", "bags": "bag_figure", "series": "forecast_figure"}

_SEPARATION = {"steps": 2, "batch_size": 8}
_TRAINING = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 2, "num_train_epochs": 2}
_CONTENTS: dict[str, dict[str, Any]] = {
    "images": {
        "data": {"dataset": "digits", "max_train_samples": 96, "max_eval_samples": 32},
        "model": {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "training": {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 256},
    },
    "bags": {
        "data": {"dataset": "digits"},
        "model": {"hidden_size": 8, "num_attention_heads": 2, "alpha": 1.5},
        "training": {"per_device_train_batch_size": 100},
        "folds": 2,
        "repeats": 1,
    },
    "series": {
        "data": {"dataset": "synthetic", "split": [200, 61, 60]},
        "model": {"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16},
        "training": {"per_device_train_batch_size": 57, "num_train_epochs": 2},
        "baseline_lengths": [24],
    },
}


def tiny_content(task: str, *overrides: str) -> dict[str, Any]:
    """The mapping of a recipe that three supervised steps an epoch train for two epochs, after two
    steps of Stage I."""
    content: dict[str, Any] = copy.deepcopy(_CONTENTS[task])
    content |= {"name": "tiny", "task": task, "separation": dict(_SEPARATION), "training": {**_TRAINING, **content["training"]}}
    for override in overrides:
        apply_override(content, override)
    return content


def tiny(task: str, *overrides: str) -> Recipe:
    """The recipe of `tiny_content`."""
    return build_recipe(tiny_content(task, *overrides))


def loaded(recipe: Recipe) -> Any:
    """The task of a recipe, with its data."""
    task = task_class_of(recipe.task)(recipe)
    task.load()
    return task


def results_of(folder: Path) -> dict[str, Any]:
    """The results file of a run."""
    return json.loads((folder / "results.json").read_text())


def without_times(content: Any) -> Any:
    """Results without times."""
    if isinstance(content, dict):
        return {
            key: without_times(value) for key, value in content.items() if not key.endswith(("_runtime", "_second", "seconds", "_time"))
        }
    return [without_times(value) for value in content] if isinstance(content, list) else content


def no_reload(monkeypatch: Any) -> list[tuple]:
    """Skip the check in a new process; the list gets the arguments of each skipped check."""
    skipped: list[tuple] = []
    monkeypatch.setattr(engine, "check_reload", lambda *arguments: skipped.append(arguments))
    return skipped
