"""Suggest a recipe for a data set that has none: what a look at the data can decide, and the values of
the recipes for small data otherwise."""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from datasets import DatasetDict

from .data.bags import BagData, load_bags
from .data.image_files import find_splits, names_of_splits
from .data.images import ImageData, load_images, median_size
from .data.series import SeriesData, load_series, split_rows
from .data.series_files import read_series
from .errors import RecipeError


# Seconds in a season, for time steps of up to so many seconds.
DAY = 86400.0
SEASONS = ((DAY / 2, DAY), (DAY * 2, DAY * 7), (DAY * 25, DAY * 364), (DAY * 300, DAY * 365))


def suggested_recipe(task: str, dataset: str) -> dict[str, Any]:
    """Suggest a recipe for a data set.

    It trains in minutes on one CPU core if the data are small. `build_recipe` reads it.

    Args:
        task: "images", "bags" or "series".
        dataset: As `data.dataset` of a recipe of the task.

    Raises:
        RecipeError: If the task is unknown, or the data set cannot be read or is too small.
    """
    suggestions = {"images": _images, "bags": _bags, "series": _series}
    if task not in suggestions:
        raise RecipeError(f"a recipe can be suggested for the tasks {', '.join(suggestions)}, got {task!r}")
    name = re.sub(r"[^\w.-]+", "_", re.sub(r"\.(?:parquet|csv(?:\.gz)?|tsv|txt|jsonl?|arrow)$", "", Path(dataset).resolve().name))
    with warnings.catch_warnings():
        # Because the run reads the data again, it gives the warnings.
        warnings.simplefilter("ignore", UserWarning)
        return {"task": task, "name": name.strip("_") or task, **suggestions[task](dataset)}


def _images(dataset: str) -> dict[str, Any]:
    data, splits = _readable_images(dataset)
    images, validated = splits["train"], len(splits["validation"])
    count = len(images)
    height, width = median_size(images)
    size, patch = _image_and_patch_size(height, width)
    small = count < 1000
    # Because accuracy on few validation images is mostly noise, it chooses no checkpoint then.
    best = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "eval_validation_accuracy"}
    best = best if validated >= 500 else {"save_strategy": "epoch"}
    batch = 16 if count < 400 else 32 if small else 64
    epochs = _between(60_000 // count, 3, 60)
    return {
        "data": data,
        "model": {
            "image_size": size,
            "patch_size": patch,
            "hidden_size": 64 if small else 128 if count < 100_000 else 256,
            "num_hidden_layers": 2 if small else 3,
            "num_attention_heads": 4,
            "intermediate_size": 128 if small else 256 if count < 100_000 else 512,
            "hidden_dropout_prob": 0.1,
        },
        "separation": {
            "schedule": "train_begin",
            "steps": _between(3 * count // batch, 20, 200),
            "parameters": "upstream",
            "kind": "average",
            "lr": 0.03,
        },
        "training": {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch,
            "per_device_eval_batch_size": 256,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, epochs * count // batch // 10),
            "logging_steps": max(1, count // batch),
            **best,
        },
    }


def _readable_images(dataset: str) -> tuple[dict[str, Any], DatasetDict]:
    """The data section for images, with fractions that hold out an image of every class, and its
    training and validation images."""
    data: dict[str, Any] = {"dataset": dataset}
    if dataset != "digits":
        given = ImageData(dataset)
        found = sorted(find_splits(given))
        train = next((name for name in ("train", "training", "Train") if name in found), found[0] if len(found) == 1 else "train")
        test = next((name for name in ("testing", "Test") if name in found and "test" not in found), "test")
        data |= {"train_split": train, "test_split": test}
        data["test_split"] = names_of_splits(ImageData(**data), found).get("test")
        data = {name: value for name, value in data.items() if name == "dataset" or value != getattr(given, name)}
    refused = None
    for tested, validation in ((0.2, 0.1), (0.2, 0.2), (0.3, 0.3), (0.4, 0.5)):
        chosen: dict[str, Any] = {**data, **({} if validation == 0.1 else {"test_fraction": tested, "validation_fraction": validation})}
        try:
            splits = load_images(ImageData(**chosen), test=False)
        except RecipeError as error:
            if "_fraction" not in str(error):
                raise
            refused = refused or error
            continue
        if len(splits["validation"]) > 1000:
            chosen["max_eval_samples"] = 1000
        return chosen, splits
    raise refused or RecipeError(f"{dataset} has too few images")


def _image_and_patch_size(height: int, width: int) -> tuple[int | list[int], int]:
    """The size of the model's images, at most 224, and a patch that divides them into about 64
    parts.

    Long images keep their shape, so that a patch is not distorted."""
    scale = min(1.0, 224 / max(height, width))
    sides = [max(4, round(side * scale)) for side in (height, width)]
    is_long = max(sides) >= 1.5 * min(sides)
    sides = sides if is_long else [round(math.sqrt(sides[0] * sides[1]))] * 2
    patch = _between(round(math.sqrt(sides[0] * sides[1]) / 8), 2 if min(sides) >= 8 else 1, min(sides))
    sides = [patch * max(1, round(side / patch)) for side in sides]
    return (sides if is_long else sides[0]), patch


def _bags(dataset: str) -> dict[str, Any]:
    bags = load_bags(BagData(dataset))
    counts = np.bincount(bags.labels)
    # A fold needs a bag of every class, and a group is never divided.
    units = [len(set(_groups(bags)[bags.labels == label])) for label in range(len(counts))]
    if len(counts) < 2 or min(units) < 2:
        scarce = bags.names[int(np.argmin(units))]
        raise RecipeError(
            f"{dataset} has the classes {bags.names} with {counts.tolist()} bags; cross-validation needs two classes, "
            f"and {'groups' if bags.groups is not None else 'bags'} of class {scarce!r} for at least two folds"
        )
    filled = next(bag for bag in bags.instances if len(bag) > 0)
    pictures, largest = filled.ndim == 4, max(len(bag) for bag in bags.instances)
    data: dict[str, Any] = {"dataset": dataset, "standardize": True}
    if not pictures and filled.shape[1] > 128 and sum(map(len, bags.instances)) >= 500:
        data["num_components"] = 64
    if largest > 1000:
        data["max_instances"] = 1000
    batch = 8 if len(counts) * 20 > len(bags.labels) or pictures else 16
    return {
        "data": data,
        "model": {**({"instance_type": "image"} if pictures else {}), "hidden_size": 64, "num_attention_heads": 4},
        "separation": {
            "schedule": "train_begin",
            "steps": 30,
            "parameters": "feature_maps",
            "kind": "average",
            "lr": 0.01,
            "batch_size": batch,
        },
        "training": {
            "num_train_epochs": _between(4000 // len(bags.labels), 10, 40),
            "per_device_train_batch_size": batch,
            "learning_rate": 1e-3,
        },
        "folds": min(10 if len(bags.labels) < 1000 else 5, *units),
        "repeats": 1,
    }


def _groups(bags: Any) -> np.ndarray:
    return np.arange(len(bags.labels)) if bags.groups is None else bags.groups


def _series(dataset: str) -> dict[str, Any]:
    data = SeriesData(dataset)
    series = load_series(data)
    rows, channels = series.values.shape
    season = 24 if dataset == "synthetic" else _season(read_series(data).index, rows)
    train, evaluated = series.rows["train"][1], min(last - first for first, last in list(split_rows(rows, data.split).values())[1:])
    horizon = min(96, max(season, 12), evaluated // 2, train // 4)
    if horizon < 1:
        raise RecipeError(
            f"{dataset} has {rows} rows, too few to forecast: {train} for training, {evaluated} for validation; give 40 or more"
        )
    context = min(336, max(4 * horizon, 2 * season), train // 2)
    windows = train - context - horizon + 1
    batch = 32 if channels <= 20 else 8
    each = max(1, math.ceil(windows / batch))
    steps = _between(6 * each, 100, 600)
    every = max(1, steps // 8)
    wide = rows > 5000
    return {
        "data": {"dataset": dataset, "validation_stride": max(1, evaluated // 300)},
        "model": {
            "context_length": context,
            "prediction_length": horizon,
            "patch_length": _between(horizon // 2, 1, 12),
            "d_model": 64 if wide else 32,
            "ffn_dim": 128 if wide else 64,
            "use_linear_skip": True,
            "loss": "mae",
        },
        "separation": {
            "schedule": "train_begin",
            "steps": 50,
            "parameters": "feature_maps",
            "kind": "average",
            "batch_size": min(16, batch),
        },
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 10,
            "eval_strategy": "steps",
            "eval_steps": every,
            "save_strategy": "steps",
            "save_steps": every,
            "logging_steps": every,
        },
        "season": season,
        "baseline_lengths": sorted({max(1, context // 2), context}),
    }


def _season(index: pandas.Index, rows: int) -> int:
    """Steps in a season: a day for steps of hours or less, a week for days, a year for weeks and
    months; 1 if the time step is unknown or a season has more than a tenth of the rows.

    If a day is too long, an hour is tried.
    """
    if isinstance(index, pandas.RangeIndex) or len(index) < 3:
        return 1
    steps = pandas.Series(index).diff().iloc[1:]
    if steps.dtype.kind == "m":
        seconds = steps.dt.total_seconds()
    elif 1e8 < abs(float(index[0])) < 1e14:
        # Unix time in seconds, or in milliseconds.
        seconds = steps / (1 if abs(float(index[0])) < 1e11 else 1000)
    else:
        return 1
    # The mean counts that working days come five times a week; gaps should not change the step.
    step = seconds.mean() if seconds.mean() < 1.5 * seconds.median() else seconds.median()
    season = next((length for longest, length in SEASONS if step <= longest), step)
    lengths = [round(season / step), *([round(3600 / step)] if step < 1800 else [])]
    return next((length for length in lengths if 1 < length <= rows // 10), 1)


def _between(value: int, least: int, most: int) -> int:
    return max(least, min(value, most))
