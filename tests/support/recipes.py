"""A tiny recipe of each task with data of its own, and helpers for runs of recipes."""

import atexit
import copy
import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from modeling_uhop.training import engine, reload
from modeling_uhop.training.recipe import Recipe, build_recipe
from modeling_uhop.training.recipe_file import apply_override
from modeling_uhop.training.tasks import task_class_of
from tests.support.forks import run_command


TASKS = ("images", "bags", "series")
# The modules of the tasks, for patches.
MODULES = {name: f"modeling_uhop.training.tasks.{name}" for name in TASKS}
# Overrides for a model without dropout.
NO_DROPOUT = {
    "images": ("model.hidden_dropout_prob=0.0",),
    "bags": ("model.hidden_dropout_prob=0.0",),
    "series": ("model.attention_dropout=0.0", "model.ff_dropout=0.0"),
}
# The figures of each task: their files, and the functions that draw them.
FIGURES = {"images": ("training.png",), "bags": ("bag.png",), "series": ("forecast.png", "weights.png")}
DRAWING = {"images": ("training_figure",), "bags": ("bag_figure",), "series": ("forecast_figure", "retrieval_weights_figure")}

_SEPARATION = {"steps": 2, "batch_size": 8}
_TRAINING = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 2, "num_train_epochs": 2}
_CONTENTS: dict[str, dict[str, Any]] = {
    "images": {
        "data": {"validation_fraction": 0.2, "max_eval_samples": 10},
        "model": {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "training": {"per_device_train_batch_size": 16},
    },
    "bags": {
        "data": {},
        "model": {"hidden_size": 8, "num_attention_heads": 2, "alpha": 1.5},
        "training": {"per_device_train_batch_size": 8},
        "folds": 2,
        "repeats": 1,
    },
    "series": {
        "data": {"dataset": "synthetic", "split": [200, 61, 60]},
        "model": {"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16},
        "training": {"per_device_train_batch_size": 57},
        "baseline_lengths": [24],
    },
}


_FOLDER = tempfile.TemporaryDirectory(prefix="tiny_data_")
atexit.register(_FOLDER.cleanup)


def tiny_bags(count: int = 24, width: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Bags of two to five instances; every second has an instance far from the others."""
    random = np.random.default_rng(seed)
    bags = [random.normal(size=(int(random.integers(2, 6)), width)) for _ in range(count)]
    for bag in bags[::2]:
        bag[0] += 6.0
    return bags


@cache
def tiny_data(task: str) -> str:
    """The data set of a tiny recipe: a folder of images in two classes, a file of bags in two classes,
    or the name of the synthetic series."""
    folder = Path(_FOLDER.name)
    if task == "images":
        random = np.random.default_rng(0)
        for split, count in (("train", 60), ("test", 24)):
            shades = [60 + 80 * (index % 2) + random.integers(0, 60, (8, 8)) for index in range(count)]
            content = {"image": [PILImage.fromarray(shade.astype(np.uint8)) for shade in shades], "label": [0, 1] * (count // 2)}
            features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
            Dataset.from_dict(content, features=features).to_parquet(folder / "images" / f"{split}.parquet")
        return str(folder / "images")
    if task == "bags":
        bags = tiny_bags()
        content = {"instances": [bag.tolist() for bag in bags], "label": ["yes", "no"] * (len(bags) // 2)}
        Dataset.from_dict(content).to_parquet(folder / "bags.parquet")
        return str(folder / "bags.parquet")
    return "synthetic"


def tiny_content(task: str, *overrides: str) -> dict[str, Any]:
    """The mapping of a recipe that three supervised steps an epoch train for two epochs, after two
    steps of Stage I."""
    content: dict[str, Any] = copy.deepcopy(_CONTENTS[task])
    content["data"]["dataset"] = tiny_data(task)
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


def reload_in_forks(monkeypatch: Any) -> None:
    """Check that models reload in forks that have not imported the package, which start faster than new processes."""

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        finished = run_command(*command[1:])
        print(finished.stdout)
        print(finished.stderr, file=sys.stderr)
        return finished

    monkeypatch.setattr(reload, "subprocess", SimpleNamespace(run=run))


def no_figures(monkeypatch: Any) -> None:
    """Write empty files instead of figures, which take longer than the rest of a tiny run."""
    for task, names in DRAWING.items():
        for name in names:
            monkeypatch.setattr(f"{MODULES[task]}.{name}", lambda path, *_: path.touch())
