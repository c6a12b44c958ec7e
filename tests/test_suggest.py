"""Recipes that are suggested for a data set: they fit the data, build, and state what was decided."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image as PILImage

from modeling_uhop.training.data.bags import BagData, load_bags
from modeling_uhop.training.data.images import ImageData, load_images
from modeling_uhop.training.data.series import load_series
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.recipe import build_recipe
from modeling_uhop.training.suggest import suggested_recipe


def _pictures(folder: Path, count: int, size=(8, 6)) -> str:
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            PILImage.new("RGB", size, colour).save(folder / name / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize(
    ("size", "image_size", "patch_size"),
    [
        ((8, 8), 8, 2),
        ((28, 28), 28, 4),
        ((32, 32), 32, 4),
        ((48, 40), 42, 6),
        ((64, 64), 64, 8),
        ((500, 400), 200, 25),
        ((128, 32), [32, 128], 8),
        ((5, 5), 5, 1),
    ],
)
def test_the_image_size_is_that_of_the_images(tmp_path, size, image_size, patch_size):
    content = suggested_recipe("images", _pictures(tmp_path / "my photos", 10, size))
    assert content["name"] == "my_photos"
    assert content["data"] == {"dataset": str(tmp_path / "my photos"), "test_split": None}
    assert (content["model"]["image_size"], content["model"]["patch_size"]) == (image_size, patch_size)
    sides = image_size if isinstance(image_size, list) else [image_size, image_size]
    assert 16 <= np.prod([side // patch_size for side in sides]) <= 256
    assert all(side % patch_size == 0 for side in sides)
    assert load_images(build_recipe(content).data)["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "test"), {}),
        (("train", "val"), {"test_split": "val"}),
        (("train", "val", "test"), {}),
        (("training", "testing"), {"train_split": "training", "test_split": "testing"}),
    ],
)
def test_the_splits_that_were_found_are_stated(tmp_path, folders, expected):
    for folder in folders:
        _pictures(tmp_path / folder, 10)
    data = suggested_recipe("images", str(tmp_path))["data"]
    assert data == {"dataset": str(tmp_path), **expected}
    assert set(load_images(ImageData(**data))) == {"train", "validation", "test"}


def test_few_images_are_held_out_in_every_class(tmp_path):
    data = suggested_recipe("images", _pictures(tmp_path / "few", 4))["data"]
    assert {name: len(split) for name, split in load_images(ImageData(**data)).items()} == {"train": 4, "validation": 2, "test": 2}
    with pytest.raises(RecipeError, match=r"class 'cat' of .* has one image"):
        suggested_recipe("images", _pictures(tmp_path / "one", 1))


def test_more_images_give_fewer_epochs(tmp_path):
    few, many = suggested_recipe("images", _pictures(tmp_path, 20)), suggested_recipe("images", "digits")
    assert few["training"]["num_train_epochs"] == 60
    assert few["model"]["hidden_size"] == 64
    assert many["training"]["num_train_epochs"] == 60_000 // 1293
    assert many["model"]["hidden_size"] == 128
    # 144 validation images choose no checkpoint.
    assert "load_best_model_at_end" not in many["training"]


def _bags(path: Path, counts: tuple[int, ...], width: int = 5, **columns) -> str:
    random = np.random.default_rng(0)
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    bags = [random.normal(size=(6, width)).tolist() for _ in labels]
    pd.DataFrame({"instances": bags, "label": labels, **columns}).to_parquet(path)
    return str(path)


@pytest.mark.parametrize(
    ("counts", "width", "folds", "components"),
    [((30, 25), 5, 10, None), ((60, 4), 5, 4, None), ((60, 40), 200, 10, 64), ((5, 5, 3), 5, 3, None)],
)
def test_folds_and_components_fit_the_bags(tmp_path, counts, width, folds, components):
    content = suggested_recipe("bags", _bags(tmp_path / "bags.parquet", counts, width))
    recipe = build_recipe(content)
    assert (recipe.name, recipe.folds, recipe.repeats) == ("bags", folds, 1)
    assert (recipe.data.num_components, recipe.data.standardize) == (components, True)


def test_a_group_is_in_one_fold_only(tmp_path):
    patients = [f"p{index // 5}" for index in range(20)]
    path = _bags(tmp_path / "bags.parquet", (10, 10), patient_id=patients)
    assert load_bags(BagData(path)).groups is not None
    assert suggested_recipe("bags", path)["folds"] == 2
    path = _bags(tmp_path / "bags.parquet", (10, 10), patient_id=["p"] * 10 + patients[10:])
    with pytest.raises(RecipeError, match=r"classes \['0', '1'\] with \[10, 10\] bags; .* groups of class '0' for at least two folds"):
        suggested_recipe("bags", path)


def test_one_class_of_bags_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"cross-validation needs two classes"):
        suggested_recipe("bags", _bags(tmp_path / "bags.parquet", (10,)))


def test_bags_of_images_are_embedded_as_images(tmp_path):
    for name in ("cat", "dog"):
        for bag in range(4):
            _pictures(tmp_path / name / str(bag), 2)
    for path in tmp_path.glob("*/*/*/*.png"):
        path.rename(path.parent.parent / f"{path.parent.name}{path.name}")
    for folder in tmp_path.glob("*/*/*/"):
        folder.rmdir()
    content = suggested_recipe("bags", str(tmp_path))
    assert content["model"]["instance_type"] == "image"
    assert "num_components" not in content["data"]


# Weekends are gaps in a series of working days.
@pytest.mark.filterwarnings("ignore:.*has gaps in its time stamps")
@pytest.mark.parametrize(
    ("frequency", "rows", "season"),
    [
        ("h", 600, 24),
        ("15min", 2000, 96),
        ("min", 2000, 60),
        ("D", 400, 7),
        ("B", 400, 5),
        ("W", 600, 52),
        ("MS", 130, 12),
        ("QS", 60, 4),
        ("YS", 60, 1),
        ("h", 60, 1),
    ],
)
def test_the_season_follows_from_the_time_step(tmp_path, frequency, rows, season):
    frame = pd.DataFrame(
        {"when": pd.date_range("2000-01-03", periods=rows, freq=frequency), "a": np.sin(np.arange(rows)), "b": np.arange(rows) % 7.0}
    )
    frame.to_parquet(tmp_path / "series.parquet")
    recipe = build_recipe(suggested_recipe("series", str(tmp_path / "series.parquet")))
    assert recipe.season == season
    series, horizon = load_series(recipe.data), recipe.model["prediction_length"]
    for length in (recipe.model["context_length"], *recipe.baseline_lengths):
        for split in ("train", "validation", "test"):
            assert len(series.windows(split, length, horizon)) > 0
    assert recipe.model["patch_length"] <= horizon
    assert recipe.training["save_steps"] % recipe.training["eval_steps"] == 0


@pytest.mark.parametrize(("unit", "season"), [(1, 24), (1000, 24)])
def test_unix_time_has_a_season(tmp_path, unit, season):
    seconds = (1_704_067_200 + 3600 * np.arange(300)) * unit
    pd.DataFrame({"date": seconds, "a": np.sin(np.arange(300))}).to_csv(tmp_path / "a.csv", index=False)
    assert suggested_recipe("series", str(tmp_path / "a.csv"))["season"] == season


def test_too_few_rows_are_refused(tmp_path):
    pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(RecipeError, match="has 10 rows, too few to forecast: 7 for training, 1 for validation; give 40 or more"):
        suggested_recipe("series", str(tmp_path / "a.csv"))


def test_an_unknown_task_is_refused():
    with pytest.raises(RecipeError, match="for the tasks images, bags, series, got 'texts'"):
        suggested_recipe("texts", "digits")
