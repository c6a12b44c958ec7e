"""Data sets as people have them: each layout is read to the right values, and each refusal says what is accepted."""

import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from modeling_uhop.training.data.bags import BagData, load_bags, load_instances
from modeling_uhop.training.data.images import ImageData, load_images, make_image_processor, unlabelled_images
from modeling_uhop.training.data.series import SeriesData, load_series
from modeling_uhop.training.data.series_files import read_series
from modeling_uhop.training.data.source import find_source, load_from_hub
from modeling_uhop.training.errors import RecipeError


COLOURS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


def _pictures(folder: Path, count: int = 10, classes=COLOURS, size=(8, 6)) -> list[Path]:
    """Write `count` images for each class folder; the red channel of image number i is i, except for cats."""
    paths = []
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            colour = (255, number, 0) if name == "cat" else (0, number, 255)
            paths.append(folder / name / f"{number:02d}.png")
            PILImage.new("RGB", size, colour).save(paths[-1])
    return paths


def _right(splits: DatasetDict) -> dict[str, int]:
    """Check that every image has the class of its colour, and that no image is in two splits; the sizes of the splits."""
    names = splits["train"].features["label"].names
    assert names == ["cat", "dog"]
    for split in splits.values():
        for row in split:
            assert row["image"].convert("RGB").getpixel((0, 0))[0] == (255 if names[row["label"]] == "cat" else 0)
    rows = [row for split in splits.values() for row in split["row"]]
    assert len(rows) == len(set(rows))
    return {name: len(split) for name, split in splits.items()}


@pytest.mark.parametrize(
    "name", ["./nowhere", "../no/where", "~/nowhere", "a/b/c", "C:\\data", "missing.csv", "photo.PNG", "a b", "/nowhere"]
)
def test_a_path_that_does_not_exist_never_reaches_the_network(name, monkeypatch):
    monkeypatch.setattr("modeling_uhop.training.data.source.HfApi", None)
    for load in (lambda: load_images(ImageData(name)), lambda: find_source(name, "a CSV file")):
        with pytest.raises(RecipeError, match=r"there is no file or folder .*; give a .*, or the id of a data set on the Hub, as --data"):
            load()


def test_a_mistyped_path_names_the_nearest(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(RecipeError, match=r"did you mean .*pictures\?"):
        find_source(str(tmp_path / "picture"), "a folder")


def test_the_kinds_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "bags.csv").touch()
    names = ["digits", "owner/name", "bags.csv", str(tmp_path), "someone/other", "mnist", "owner/data-v1.0"]
    assert [find_source(name, "", "digits").kind for name in names] == ["built-in", "folder", "file", "folder", "hub", "hub", "hub"]
    assert find_source("digits", "").kind == "hub"


def test_a_hub_that_cannot_be_reached_is_reported_at_once(monkeypatch):
    calls = []

    class Api:
        def dataset_info(self, name, timeout):
            calls.append(name)
            raise TimeoutError("no route to host")

    monkeypatch.setattr("modeling_uhop.training.data.source.HfApi", Api)
    started = time.monotonic()
    with pytest.raises(
        RecipeError, match=r"no file or folder someone/none, and the Hub cannot be reached .*\(no route to host\); give a table"
    ):
        load_from_hub(find_source("someone/none", ""), "a table")
    assert time.monotonic() - started < 2
    assert calls == ["someone/none"]


def test_a_data_set_that_the_hub_does_not_have(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    class Api:
        def dataset_info(self, name, timeout):
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("modeling_uhop.training.data.source.HfApi", Api)
    with pytest.raises(RecipeError, match=r"the Hub has no such data set .*; give a folder of class folders"):
        load_images(ImageData("someone/none"))


def test_split_folders_of_class_folders(tmp_path):
    _pictures(tmp_path / "train")
    _pictures(tmp_path / "test", 3)
    assert _right(load_images(ImageData(str(tmp_path)))) == {"train": 18, "validation": 2, "test": 3 * 2}
    assert _right(load_images(ImageData(str(tmp_path)), test=False)) == {"train": 18, "validation": 2}
    _pictures(tmp_path / "val", 2)
    assert _right(load_images(ImageData(str(tmp_path)))) == {"train": 20, "validation": 4, "test": 6}


def test_class_folders_without_splits(tmp_path):
    _pictures(tmp_path)
    data = ImageData(str(tmp_path))
    with pytest.warns(
        UserWarning, match=r"has no split 'test', but \['train'\]; data.test_fraction=0.2 .*; data.test_split=null chooses this"
    ):
        images = load_images(data)
    assert _right(images) == {"train": 14, "validation": 2, "test": 4}
    assert images["test"]["label"].count(0) == 2
    chosen = ImageData(str(tmp_path), test_split=None)
    assert load_images(chosen)["test"]["row"] == images["test"]["row"]
    # A run on the validation images trains on the same images, and reads no image of the test.
    assert load_images(chosen, test=False)["train"]["row"] == images["train"]["row"]
    assert _right(load_images(ImageData(str(tmp_path), test_split=None, test_fraction=0), test=False)) == {"train": 18, "validation": 2}
    with pytest.raises(RecipeError, match=r"data.test_fraction=0 leaves no test images .*evaluation.split=validation"):
        load_images(ImageData(str(tmp_path), test_fraction=0))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_pair_of_training_and_validation_folders(tmp_path, name):
    _pictures(tmp_path / "train")
    _pictures(tmp_path / name, 3)
    data = ImageData(str(tmp_path))
    with pytest.warns(
        UserWarning, match=rf"has no split 'test', .*its split '{name}' is used for the test; data.test_split={name}, or =null"
    ):
        assert _right(load_images(data)) == {"train": 18, "validation": 2, "test": 6}
    assert _right(load_images(ImageData(str(tmp_path), test_split=name))) == {"train": 18, "validation": 2, "test": 6}
    assert _right(load_images(ImageData(str(tmp_path), test_split=None))) == {"train": 16, "validation": 6, "test": 4}
    given = ImageData(str(tmp_path), validation_split=name, test_split=None, test_fraction=0.5)
    assert _right(load_images(given)) == {"train": 10, "validation": 6, "test": 10}


def test_splits_of_other_names(tmp_path):
    _pictures(tmp_path / "training")
    _pictures(tmp_path / "testing", 2)
    with pytest.raises(RecipeError, match=r"has no split 'train'; it has \['testing', 'training'\]; set data.train_split"):
        load_images(ImageData(str(tmp_path)))
    data = ImageData(str(tmp_path), train_split="training", test_split="testing")
    assert _right(load_images(data)) == {"train": 18, "validation": 2, "test": 4}
    with pytest.raises(RecipeError, match=r"has no split 'held'; .*set data.test_split .*or to null, which holds out data.test_fraction"):
        load_images(ImageData(str(tmp_path), train_split="training", test_split="held"))
    with pytest.raises(RecipeError, match=r"data.validation_split must be .*\['testing'\], got 'training'"):
        load_images(ImageData(str(tmp_path), train_split="training", validation_split="training"))


def test_class_folders_that_are_named_like_splits_stay_classes(tmp_path):
    _pictures(tmp_path, classes=["train", "bus"])
    assert load_images(ImageData(str(tmp_path), test_split=None))["train"].features["label"].names == ["bus", "train"]


def test_nested_class_folders_and_other_files(tmp_path):
    for path in _pictures(tmp_path / "train"):
        (path.parent / "more").mkdir(exist_ok=True)
        path.rename(path.parent / "more" / path.name.replace("png", "PNG"))
    _pictures(tmp_path / "test", 2)
    for clutter in ("train/Thumbs.db", "train/cat/notes.txt", "test/.DS_Store", "train/cat/._00.png"):
        (tmp_path / clutter).touch()
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    assert _right(load_images(ImageData(str(tmp_path)))) == {"train": 18, "validation": 2, "test": 4}


def test_a_class_that_only_the_test_folder_has_is_refused(tmp_path):
    _pictures(tmp_path / "train")
    _pictures(tmp_path / "test", 2, ["cat", "eel"])
    with pytest.raises(RecipeError, match=r"among those of the training split, \['cat', 'dog'\], got 'eel' in row 2 of test"):
        load_images(ImageData(str(tmp_path)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.png", "2.png"], "has images without class folders; put the images of each class in a folder of its own"),
        (["train/1.png", "test/1.png"], "test has images without class folders"),
        (["cat/1.png"], "images in one class folder, 'cat', and there is nothing to classify; give one folder for each class"),
        (["all/cat/1.png", "all/dog/1.png"], r"'all', .*all has folders of its own: give that as --data"),
        (["notes.md"], r"no images in class folders and no Parquet or CSV files; it begins with \['notes.md'\]"),
        ([], r"no images in class folders and no Parquet or CSV files; it begins with \[\]"),
        (["cat/1.png", "dog/1.png", "dog/2.png"], "class 'cat' of .* has one image, too few to divide by data.test_fraction=0.2"),
    ],
)
def test_folders_that_are_no_image_data_set(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (2, 2)).save(tmp_path / name) if name.endswith("png") else (tmp_path / name).touch()
    with pytest.raises(RecipeError, match=message):
        load_images(ImageData(str(tmp_path), test_split=None))


def test_too_few_images_to_hold_out_names_the_setting(tmp_path):
    _pictures(tmp_path, 3)
    with pytest.raises(RecipeError, match=r"data.test_fraction=0.1 cannot divide 6 images of 2 classes so that each part has every class"):
        load_images(ImageData(str(tmp_path), test_split=None, test_fraction=0.1))


def test_one_image_or_another_file_is_refused(tmp_path):
    PILImage.new("RGB", (2, 2)).save(tmp_path / "photo.png")
    (tmp_path / "archive.zip").touch()
    with pytest.raises(RecipeError, match=r"photo.png is one image; --data takes a folder of class folders"):
        load_images(ImageData(str(tmp_path / "photo.png")))
    with pytest.raises(RecipeError, match=r"archive.zip is a file that images are not read from; --data takes a folder"):
        load_images(ImageData(str(tmp_path / "archive.zip")))


def _table(folder: Path, count: int = 10) -> dict[str, list]:
    paths = _pictures(folder / "images", count)
    return {"path": [str(path.relative_to(folder)) for path in paths], "label": [path.parent.name for path in paths]}


@pytest.mark.parametrize("column", ["image", "file_name", "path"])
@pytest.mark.parametrize("separator", [",", ";"])
def test_a_csv_file_of_paths_and_labels(tmp_path, column, separator, monkeypatch):
    table = _table(tmp_path)
    rows = "\n".join(f"{path}{separator}{label}" for path, label in zip(table["path"], table["label"], strict=True))
    (tmp_path / "labels.csv").write_text(f"{column}{separator}label\n{rows}\n")
    monkeypatch.chdir("/")
    for name in (tmp_path / "labels.csv", tmp_path):
        assert _right(load_images(ImageData(str(name), test_split=None))) == {"train": 14, "validation": 2, "test": 4}


def test_csv_files_for_each_split_and_a_column_of_splits(tmp_path):
    table = _table(tmp_path)
    lines = [f"{path},{label}" for path, label in zip(table["path"], table["label"], strict=True)]
    for name, part in (("train.csv", lines[:8] + lines[10:18]), ("test.csv", lines[8:10] + lines[18:])):
        (tmp_path / name).write_text("\n".join(["path,label", *part]))
    assert _right(load_images(ImageData(str(tmp_path), validation_fraction=0.25))) == {"train": 12, "validation": 4, "test": 4}
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).unlink()
    split = ["test" if index % 5 == 0 else "train" for index in range(20)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *(f"{a},{b}" for a, b in zip(lines, split, strict=True))]))
    assert _right(load_images(ImageData(str(tmp_path / "all.csv")))) == {"train": 14, "validation": 2, "test": 4}


def test_numbers_and_missing_words_as_names(tmp_path):
    """Names of files such as 0012 stay text, and NA is a class."""
    for number in range(20):
        PILImage.new("RGB", (2, 2)).save(tmp_path / f"{number:04d}", "PNG")
    rows = [f"{number:04d},{('NA', 'None')[number % 2]}" for number in range(20)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]))
    images = load_images(ImageData(str(tmp_path / "labels.csv"), test_split=None))
    assert images["train"].features["label"].names == ["NA", "None"]
    assert images["train"][0]["image"].size == (2, 2)


def test_a_missing_file_of_a_csv_file_is_named(tmp_path):
    table = _table(tmp_path)
    (tmp_path / table["path"][3]).unlink()
    lines = [f"{path},{label}" for path, label in zip(table["path"], table["label"], strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines]))
    with pytest.raises(
        RecipeError, match=r"row 3 of .*labels.csv names the image images/cat/03.png, and there is no file .*start at the folder"
    ):
        load_images(ImageData(str(tmp_path / "labels.csv"), test_split=None))
    with pytest.warns(UserWarning, match=r"row 3 of train .*, and is skipped"):
        assert sum(_right(load_images(ImageData(str(tmp_path / "labels.csv"), test_split=None, skip_unreadable=True))).values()) == 19


@pytest.mark.parametrize("kind", ["bytes", "image", "path"])
def test_parquet_files_of_bytes_or_paths(tmp_path, kind):
    table = _table(tmp_path)
    content = {
        "bytes": [(tmp_path / path).read_bytes() for path in table["path"]],
        "image": [{"bytes": (tmp_path / path).read_bytes(), "path": None} for path in table["path"]],
        "path": table["path"],
    }[kind]
    typed = {"bytes": Value("binary"), "image": Image(), "path": Value("string")}[kind]
    rows = Dataset.from_dict({"image": content, "label": table["label"]}, features=Features({"image": typed, "label": Value("string")}))
    rows.to_parquet(tmp_path / "anything.parquet")
    for name in (tmp_path / "anything.parquet", tmp_path):
        assert _right(load_images(ImageData(str(name), test_split=None))) == {"train": 14, "validation": 2, "test": 4}


def test_columns_of_one_type_are_found(tmp_path):
    _pictures(tmp_path / "images")
    paths = sorted((tmp_path / "images").rglob("*.png"))
    rows = Dataset.from_dict({"img": [str(path) for path in paths], "label": [path.parent.name for path in paths]})
    DatasetDict(train=rows.cast_column("img", Image()).class_encode_column("label").rename_column("label", "animal")).save_to_disk(
        tmp_path / "saved"
    )
    assert _right(load_images(ImageData(str(tmp_path / "saved"), test_split=None))) == {"train": 14, "validation": 2, "test": 4}


def test_unlabelled_images_need_no_class_folders(tmp_path):
    _pictures(tmp_path / "labelled")
    for number in range(3):
        (tmp_path / "more" / "extra").mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / "more" / "extra" / f"{number}.png")
    data = ImageData(str(tmp_path / "labelled"), test_split=None)
    assert len(unlabelled_images(data)) == 14
    for split in (None, "extra"):
        found = unlabelled_images(data, str(tmp_path / "more"), split)
        assert [image.getpixel((0, 0))[0] for image in found["image"]] == [0, 1, 2]
    with pytest.raises(RecipeError, match=r"has no split 'test'; it has \['extra', 'train'\]"):
        unlabelled_images(data, str(tmp_path / "more"), "test")


@pytest.mark.parametrize(
    ("size", "image_size", "warned"), [((48, 40), 8, True), ((48, 40), 16, False), ((600, 500), 224, False), ((8, 8), 32, False)]
)
def test_images_that_a_model_shrinks_much_give_a_warning(tmp_path, size, image_size, warned):
    _pictures(tmp_path, size=size)
    data = ImageData(str(tmp_path), test_split=None, test_fraction=0)
    images = load_images(data, test=False)["train"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_image_processor(data, image_size, images)
    expected = f"are about {size[1]} x {size[0]} pixels, and are reduced to {image_size} x {image_size}; set a larger model.image_size"
    assert [expected in str(warning.message) for warning in caught] == [True] * warned


# Two features are enough; the third bag has one instance and awkward numbers.
BAGS = [np.array([[0.5, -1.0], [2.0, 3.25]]), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([[-1e-5, 1e20]])]
LABELS = ["sick", "healthy", "sick"]


def _same_bags(data: BagData, groups=None) -> None:
    bags = load_bags(data)
    assert [bag.tolist() for bag in bags.instances] == [bag.astype(bags.instances[0].dtype).tolist() for bag in BAGS]
    assert [bags.names[label] for label in bags.labels] == LABELS
    assert (None if bags.groups is None else bags.groups.tolist()) == groups


@pytest.mark.parametrize(
    "cell",
    [
        lambda bag: str(bag.tolist()),
        str,
        repr,
        lambda bag: str(list(bag)),
        lambda bag: str([list(row) for row in bag]),
        lambda bag: str(np.array([*bag, None], dtype=object)[:-1]),
        lambda bag: repr(torch.from_numpy(bag)),
        lambda bag: repr(bag.astype(np.float32)),
    ],
    ids=["lists", "str of array", "repr of array", "list of arrays", "lists of np.float64", "array of arrays", "tensor", "dtype"],
)
@pytest.mark.parametrize("separator", [",", ";"])
def test_one_row_per_bag_in_csv(tmp_path, cell, separator):
    table = pd.DataFrame({"instances": [cell(bag) for bag in BAGS], "label": LABELS})
    table.to_csv(tmp_path / "bags.csv", sep=separator)
    _same_bags(BagData(str(tmp_path / "bags.csv")))
    _same_bags(BagData(str(tmp_path)))
    table.to_parquet(tmp_path / "text.parquet")
    _same_bags(BagData(str(tmp_path / "text.parquet")))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            str(np.zeros((50, 50))),
            r"row 1 of .*bags.csv was shortened by NumPy to '\[\[0. 0. .*; save lists: array.tolist\(\), or use Parquet",
        ),
        ("hello", r"row 1 of .*bags.csv has the text 'hello' for instances; write lists such as"),
        ("[[1, 2], [3]]", r"bags.csv: bag 1 must consist of numbers, with one shape"),
        ("[[nan 2.]]", r"bags.csv: bag 1 has entries that are not finite"),
        ("", r"bags.csv: bag 1 must be a set of instances, got None"),
    ],
)
def test_texts_that_are_no_bag_are_refused_by_row(tmp_path, cell, message):
    pd.DataFrame({"instances": ["[[1, 2]]", cell], "label": [0, 1]}).to_csv(tmp_path / "bags.csv")
    with pytest.raises(RecipeError, match=message):
        load_bags(BagData(str(tmp_path / "bags.csv")))


def _long(order=range(6)) -> pd.DataFrame:
    """The rows of all instances; bags are not sorted by name."""
    frame = pd.DataFrame(np.concatenate(BAGS), columns=["f1", "f2"])
    rows = [index for index, bag in enumerate(BAGS) for _ in bag]
    frame.insert(0, "bag_id", [("z", "b", "a")[index] for index in rows])
    frame["label"] = [LABELS[index] for index in rows]
    return frame.iloc[list(order)].reset_index(drop=True)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("order", [range(6), [0, 2, 5, 1, 3, 4]], ids=["together", "mixed"])
def test_one_row_per_instance(tmp_path, suffix, order):
    path = tmp_path / f"bags.{suffix}"
    write = pd.DataFrame.to_csv if suffix == "csv" else pd.DataFrame.to_parquet
    frame = _long(order)
    write(frame, path, index=False)
    _same_bags(BagData(str(path)))
    write(
        frame.rename(columns={"bag_id": "molecule"}).assign(note="x", case_id=frame["bag_id"].map({"z": 7, "b": 3, "a": 7})),
        path,
        index=False,
    )
    _same_bags(BagData(str(path), bag_column="molecule", feature_columns=["f*"]), groups=[1, 0, 1])
    write(
        frame.assign(instances=[str([a, b]) if suffix == "csv" else [a, b] for a, b in zip(frame["f1"], frame["f2"], strict=True)]),
        path,
        index=False,
    )
    _same_bags(BagData(str(path)))
    if suffix == "parquet":
        _same_bags(BagData(str(tmp_path)))
        listed = frame.assign(vector=list(frame[["f1", "f2"]].to_numpy())).drop(columns=["f1", "f2"])
        write(listed, path)
        _same_bags(BagData(str(path)))


def test_row_numbers_of_instances_are_no_feature(tmp_path):
    _long().assign(instance_id=range(6)).to_csv(tmp_path / "bags.csv", index=False)
    with pytest.warns(
        UserWarning, match="column 'instance_id' of .* has row numbers or names, and is no feature; set data.feature_columns"
    ):
        _same_bags(BagData(str(tmp_path / "bags.csv")))


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (
            lambda f: f.assign(label=[0, 1, 1, 1, 1, 0]),
            {},
            "bag 'z' of .* has label 0 in row 0 and 1 in row 1; all instances of a bag have one label",
        ),
        (lambda f: f.assign(label=f["label"].where(f.index != 1)), {}, "bag 'z' of .* has label 'sick' in row 0 and None in row 1"),
        (lambda f: f.assign(bag_id=f["bag_id"].where(f.index != 4)), {}, "row 4 of .* has no bag in column 'bag_id'"),
        (lambda f: f.assign(f2="x"), {}, "column 'f2' of .* is not numbers, but 'x'; set data.feature_columns, for instance"),
        (lambda f: f.assign(instance_label=0), {}, "column 'instance_label' of .* looks like labels; set data.feature_columns"),
        (lambda f: f, {"feature_columns": ["g*"]}, r"data.feature_columns has 'g\*', but .* has the columns \['f1', 'f2'\]"),
        (lambda f: f, {"bag_column": "bags"}, r"has no column 'bags'; it has .*; set data.bag_column"),
        (lambda f: f, {"label_column": "y"}, r"has no column 'y'; it has .*; set data.label_column"),
        (lambda f: f.rename(columns={"bag_id": "x"}), {}, "has no column 'instances'; .*data.bag_column if a row is an instance"),
        (lambda f: f.assign(f1=f["f1"].where(f.index != 2)), {}, r"bag 1 \(b\) has entries that are not finite, first in its instance 0"),
        (lambda f: f[["bag_id", "label"]], {}, "has no columns of features besides .*set data.feature_folder, data.feature_columns or"),
    ],
)
def test_long_tables_that_are_refused(tmp_path, change, fields, message):
    change(_long()).to_parquet(tmp_path / "bags.parquet")
    with pytest.raises(RecipeError, match=message):
        load_bags(BagData(str(tmp_path / "bags.parquet"), **fields))


def _save(path: Path, bag: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, bag)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(bag), path)
    elif path.suffix == ".csv":
        pd.DataFrame(bag).to_csv(path, index=False)
    else:
        h5py = pytest.importorskip("h5py", reason="h5py is optional")
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = bag, np.zeros((len(bag), 2))


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".h5"])
def test_feature_files_with_a_csv_of_labels(tmp_path, suffix):
    """The layout of slide pipelines: slide_id has no suffix or that of the slide, and case_id is the patient."""
    names = ["TCGA-A1.6E2B", "0012", "s_3"]
    for name, bag in zip(names, BAGS, strict=True):
        _save(tmp_path / "features" / f"{suffix[1:]}_files" / f"{name}{suffix}", bag)
    table = pd.DataFrame({"case_id": ["p2", "p1", "p2"], "slide_id": names, "label": LABELS})
    table.to_csv(tmp_path / "features" / "labels.csv", index=False)
    for name in ("features", "features/labels.csv"):
        _same_bags(BagData(str(tmp_path / name)), groups=[1, 0, 1])
    (tmp_path / "elsewhere").mkdir()
    table.assign(slide_id=[f"{name}.svs" for name in names]).drop(columns="case_id").to_csv(
        tmp_path / "elsewhere" / "labels.csv", index=False
    )
    _same_bags(BagData(str(tmp_path / "elsewhere" / "labels.csv"), feature_folder=str(tmp_path / "features")))
    with pytest.raises(RecipeError, match=r"has no columns of features .* no feature file TCGA-A1.6E2B.svs .*; set data.feature_folder"):
        load_bags(BagData(str(tmp_path / "elsewhere" / "labels.csv")))
    table.assign(slide_id=["other", *names[1:]]).to_csv(tmp_path / "features" / "labels.csv", index=False)
    with pytest.raises(
        RecipeError, match=r"1 of 3 bags of .* have no feature file below .*, first other; add the files or remove the rows"
    ):
        load_bags(BagData(str(tmp_path / "features")))


def test_feature_files_given_by_path(tmp_path):
    paths = ["a/x.csv", "b/x.npy", "x.pt"]
    for path, bag in zip(paths, BAGS, strict=True):
        _save(tmp_path / path, bag)
    pd.DataFrame({"path": paths, "label": LABELS}).to_csv(tmp_path / "labels.csv", index=False)
    _same_bags(BagData(str(tmp_path / "labels.csv")))


def test_a_slide_with_several_feature_files(tmp_path):
    for name, bag in zip("abc", BAGS, strict=True):
        for place in ("pt_files", "other"):
            _save(tmp_path / place / f"{name}.pt", bag)
        _save(tmp_path / "npy_files" / f"{name}.npy", bag)
    table = pd.DataFrame({"slide_id": list("abc"), "label": LABELS})
    table.to_csv(tmp_path / "labels.csv", index=False)
    _same_bags(BagData(str(tmp_path)))
    for name in "abc":
        (tmp_path / "npy_files" / f"{name}.npy").unlink()
    with pytest.raises(RecipeError, match=r"a of .* has the feature files .*a.pt and .*a.pt; set data.feature_folder to one folder"):
        load_bags(BagData(str(tmp_path)))
    _same_bags(BagData(str(tmp_path), feature_folder=str(tmp_path / "pt_files")))
    with pytest.raises(RecipeError, match=r"data.feature_folder=nowhere is not a folder"):
        load_bags(BagData(str(tmp_path), feature_folder="nowhere"))


def test_feature_files_that_cannot_be_read(tmp_path, monkeypatch):
    pd.DataFrame({"slide_id": ["a"], "label": [1]}).to_csv(tmp_path / "labels.csv")
    torch.save({"coords": torch.ones(2, 2), "features": torch.ones(2, 3)}, tmp_path / "a.pt")
    assert load_bags(BagData(str(tmp_path))).instances[0].tolist() == [[1.0] * 3] * 2
    torch.save({"coords": torch.ones(2, 2), "x": torch.ones(2, 3)}, tmp_path / "a.pt")
    with pytest.raises(RecipeError, match=r"a.pt must have an entry 'features' or only one entry, got \['coords', 'x'\]"):
        load_bags(BagData(str(tmp_path)))
    (tmp_path / "a.pt").write_bytes(b"no tensor")
    with pytest.raises(RecipeError, match=r"the features in .*a.pt cannot be read"):
        load_bags(BagData(str(tmp_path)))
    (tmp_path / "a.pt").rename(tmp_path / "a.h5")
    monkeypatch.setattr("modeling_uhop.training.data.bag_files.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"a.h5 needs h5py: pip install h5py"):
        load_bags(BagData(str(tmp_path)))


def test_class_folders_of_feature_files(tmp_path):
    for name, label, bag in zip(("z", "b", "c"), LABELS, BAGS, strict=True):
        _save(tmp_path / label / f"{name}.npy", bag)
    bags = load_bags(BagData(str(tmp_path)))
    assert [bag.tolist() for bag in bags.instances] == [BAGS[1].tolist(), BAGS[2].tolist(), BAGS[0].tolist()]
    assert (bags.names, bags.labels.tolist()) == (["healthy", "sick"], [0, 1, 1])
    assert [len(bag) for bag in load_instances(BagData(str(tmp_path)))] == [3, 1, 2]


def test_class_folders_of_folders_of_images(tmp_path):
    for place in ("", "train"):
        for bag, count in (("cat/one", 2), ("dog/two", 3), ("dog/three", 1)):
            _pictures(tmp_path / place, count, [bag])
        bags = load_bags(BagData(str(tmp_path)))
        assert [bag.shape for bag in bags.instances] == [(2, 3, 6, 8), (1, 3, 6, 8), (3, 3, 6, 8)]
        assert (bags.names, bags.labels.tolist(), bags.groups) == (["cat", "dog"], [0, 1, 1], None)
        np.testing.assert_allclose(bags.pictures(2)[:, :, 0, 0] * 255, [[0, number, 255] for number in range(3)], rtol=1e-6)
        if not place:
            for name in ("cat", "dog"):
                (tmp_path / "train").mkdir(exist_ok=True)
                (tmp_path / name).rename(tmp_path / "train" / name)


def test_folders_that_hold_no_bags(tmp_path):
    _pictures(tmp_path / "images")
    with pytest.raises(RecipeError, match=r"cat has images, but a bag is a folder of images: images/CLASS/BAG/IMAGE; or use task: images"):
        load_bags(BagData(str(tmp_path / "images")))
    _pictures(tmp_path / "sizes", 1, ["cat/one"])
    _pictures(tmp_path / "sizes", 1, ["dog/two"], size=(5, 5))
    with pytest.raises(RecipeError, match=r"bag 1 \(dog/two\) has instances of shape \(3, 5, 5\), but bag 0 \(cat/one\) has \(3, 6, 8\)"):
        load_bags(BagData(str(tmp_path / "sizes")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"empty holds no bags; give a file .parquet, .*; it begins with \[\]"):
        load_bags(BagData(str(tmp_path / "empty")))
    with pytest.raises(RecipeError, match=r"there is no file or folder .*bags.parquet; give a file .parquet"):
        load_bags(BagData(str(tmp_path / "bags.parquet")))
    (tmp_path / "a.csv").write_text("bag_id,label\n")
    (tmp_path / "b.csv").write_text("bag_id,label\n")
    with pytest.raises(RecipeError, match=r"has 2 tables, \['a.csv', 'b.csv'\]; give one of them as --data"):
        load_bags(BagData(str(tmp_path)))


def test_unlabelled_bags_need_no_column_of_labels(tmp_path):
    _long().drop(columns="label").to_csv(tmp_path / "bags.csv", index=False)
    assert [bag.tolist() for bag in load_instances(BagData(str(tmp_path / "bags.csv")))] == [bag.tolist() for bag in BAGS]
    for name, bag in zip("abc", BAGS, strict=True):
        _save(tmp_path / "files" / f"{name}.npy", bag)
    assert [bag.tolist() for bag in load_instances(BagData(str(tmp_path / "files")))] == [bag.tolist() for bag in BAGS]


ROWS = 60
HOURS = pd.date_range("2024-01-20", periods=ROWS, freq="h")


def _wide() -> pd.DataFrame:
    steps = np.arange(ROWS)
    return pd.DataFrame({"load": np.sin(steps) * 1000 + 0.5, "price": steps % 7 - 2.5})


def _same_series(data: SeriesData, names=("load", "price"), expected: pd.DataFrame | None = None) -> None:
    """Check the names and the values of a series before it was scaled."""
    series = load_series(data)
    assert series.names == list(names)
    expected = _wide() if expected is None else expected
    np.testing.assert_allclose(series.values.double().numpy() * series.std + series.mean, expected.to_numpy(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "stamps"),
    [
        ("Date", HOURS.strftime("%d.%m.%Y %H:%M")),
        ("when", HOURS.strftime("%Y-%m-%dT%H:%M:%SZ")),
        ("ds", HOURS.strftime("%m/%d/%Y %H:%M")),
        ("time", HOURS.strftime("%d %b %Y %H:%M")),
        ("t", HOURS),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv", "parquet"])
def test_a_column_of_dates_is_found(tmp_path, name, stamps, suffix):
    path = tmp_path / f"a.{suffix}"
    frame = _wide().assign(**{name: stamps})[["load", name, "price"]]
    if suffix == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    _same_series(SeriesData(str(path)))
    if not isinstance(stamps, pd.DatetimeIndex):
        frame.iloc[::-1].to_parquet(tmp_path / "backwards.parquet", index=False)
        with pytest.raises(RecipeError, match=rf"row 1 of .*backwards.parquet does not come after .*column '{name}'"):
            load_series(SeriesData(str(tmp_path / "backwards.parquet")))


def test_date_formats(tmp_path):
    path, days = tmp_path / "a.csv", pd.date_range("2024-01-01", periods=12, freq="MS")
    frame = pd.DataFrame({"day": days.strftime("%m/%d/%Y"), "a": np.arange(12.0)})
    for form in ("%d/%m/%Y", "%m/%d/%Y"):
        pd.DataFrame({"day": ["01/02/2024", "02/03/2024", "03/04/2024", "04/05/2024", "05/06/2024"], "a": np.arange(5.0)}).to_csv(
            path, index=False
        )
        with pytest.raises(
            RecipeError, match=r"'01/02/2024' may begin with the day or with the month; set data.date_format, such as '%d/%m/%Y'"
        ):
            load_series(SeriesData(str(path)))
        _same_series(SeriesData(str(path), date_format=form, split=[3, 1, 1]), ["a"], pd.DataFrame({"a": np.arange(5.0)}))
    frame["day"] = days.strftime("%d.%m.%y")
    frame.to_csv(path, index=False)
    with pytest.raises(
        RecipeError, match=r"'01.01.24' is not a date with a year of four digits, .*; set data.date_format, such as '%d/%m/%y'"
    ):
        load_series(SeriesData(str(path)))
    _same_series(SeriesData(str(path), date_format="%d.%m.%y"), ["a"], frame[["a"]])
    with pytest.raises(RecipeError, match=r"row 0 of column 'day' of .*'01.01.24' does not have the format data.date_format='%Y'"):
        load_series(SeriesData(str(path), date_format="%Y"))
    frame.assign(day=days.strftime("%y%m%d").astype(int)).to_parquet(path.with_suffix(".parquet"))
    _same_series(SeriesData(str(path.with_suffix(".parquet")), date_column="day", date_format="%y%m%d"), ["a"], frame[["a"]])


def test_dates_with_points_begin_with_the_day(tmp_path):
    """Months, which would increase too if they were read as days."""
    frame = pd.DataFrame({"Monat": pd.date_range("2018-01-01", periods=30, freq="MS").strftime("%d.%m.%Y"), "a": np.arange(30.0)})
    frame.to_csv(tmp_path / "a.csv", sep=";", decimal=",", index=False)
    _same_series(SeriesData(str(tmp_path / "a.csv")), ["a"], frame[["a"]])
    assert read_series(SeriesData(str(tmp_path / "a.csv"))).index[1] == pd.Timestamp("2018-02-01")


def test_a_date_and_a_time_of_day_in_two_columns(tmp_path):
    for clock in ("%H:%M:%S", "%H.%M.%S"):
        frame = _wide().assign(Date=HOURS.strftime("%d/%m/%Y"), Time=HOURS.strftime(clock))[["Date", "Time", "load", "price"]]
        frame.to_csv(tmp_path / "a.csv", index=False, sep=";", decimal=",")
        _same_series(SeriesData(str(tmp_path / "a.csv")))


def test_several_columns_of_dates(tmp_path):
    _wide().assign(a=HOURS, b=HOURS).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(
        RecipeError, match=r"has several columns of dates, \['a', 'b'\]; set data.date_column to one, and data.drop_columns"
    ):
        load_series(SeriesData(str(tmp_path / "a.csv")))
    _same_series(SeriesData(str(tmp_path / "a.csv"), date_column="b", drop_columns=["a"]))


@pytest.mark.parametrize("decimal", [".", ","])
def test_semicolons_and_decimal_commas(tmp_path, decimal):
    frame = _wide().assign(date=HOURS.strftime("%d.%m.%Y %H:%M"))
    frame.loc[3, "load"] = np.nan
    frame.to_csv(tmp_path / "a.csv", sep=";", decimal=decimal, index=False)
    _same_series(SeriesData(str(tmp_path / "a.csv")), expected=frame[["load", "price"]])
    grouped = frame.assign(load=[f"{value:,.1f}".translate(str.maketrans(",.", ".,")) for value in _wide()["load"]])
    grouped.to_csv(tmp_path / "a.csv", sep=";", decimal=",", index=False)
    _same_series(SeriesData(str(tmp_path / "a.csv")), expected=_wide().round(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(load=f["load"].map(str).str.replace(".", ",")), "'0,5' in row 0; write numbers with a decimal point"),
        (lambda f: f.assign(load=["?", *f["load"][1:]]), r"has '\?' in row 0; leave cells without a value empty"),
        (lambda f: f.assign(load=["missing", *f["load"][1:]]), "has 'missing' in row 0; leave cells without a value empty"),
        (lambda f: f.assign(place="Bern"), r"'place' .* has 'Bern' in row 0; .*data.id_column=place .*, or data.drop_columns=\[place\]"),
    ],
)
def test_text_columns_are_refused_with_the_setting(tmp_path, change, message):
    change(_wide().assign(date=HOURS)).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(RecipeError, match=message):
        load_series(SeriesData(str(tmp_path / "a.csv")))


def test_columns_are_dropped_by_name(tmp_path):
    _wide().assign(date=HOURS, place="Bern", holiday=1).to_csv(tmp_path / "a.csv", index=False)
    _same_series(SeriesData(str(tmp_path / "a.csv"), drop_columns=["place", "holiday"]))
    with pytest.raises(
        RecipeError, match=r"data.drop_columns has \['x'\], but .*a.csv has the columns \['load', 'price', 'date', 'place', 'holiday'\]"
    ):
        load_series(SeriesData(str(tmp_path / "a.csv"), drop_columns=["x", "place"]))


def _melted(id_name="id", value="value", date="date") -> pd.DataFrame:
    frame = _wide().assign(**{date: HOURS}).melt(date, var_name=id_name, value_name=value)
    return frame


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("names", [("unique_id", "y", "ds"), ("item_id", "target", "timestamp"), ("sensor", "reading", "when")])
def test_one_row_per_series_and_time(tmp_path, names, shuffled):
    frame = _melted(*names)
    if shuffled:
        frame = pd.concat([frame[:1], frame[1:].sample(frac=1, random_state=0)])
    frame.to_csv(tmp_path / "long.csv", index=False)
    given = {"id_column": "sensor"} if names[0] == "sensor" else {}
    order = ["load", "price"]
    _same_series(SeriesData(str(tmp_path / "long.csv"), **given), order)
    frame.assign(extra=frame[names[1]] * 2).to_parquet(tmp_path / "long.parquet")
    _same_series(SeriesData(str(tmp_path / "long.parquet"), value_column=names[1], **given), order)
    both = pd.concat([_wide(), _wide() * 2], axis=1).iloc[:, [0, 2, 1, 3]]
    every = [f"load_{names[1]}", "load_extra", f"price_{names[1]}", "price_extra"]
    _same_series(SeriesData(str(tmp_path / "long.parquet"), **given), every, both)


def test_series_of_a_long_table_may_lack_times(tmp_path):
    _melted().drop(index=[5, ROWS + 7]).to_csv(tmp_path / "long.csv", index=False)
    expected = _wide()
    expected.loc[5, "load"] = expected.loc[7, "price"] = np.nan
    _same_series(SeriesData(str(tmp_path / "long.csv"), id_column="id"), expected=expected)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda f: f, {"id_column": "x"}, r"has no column 'x'; it has \['date', 'id', 'value'\]; set data.id_column"),
        (lambda f: f, {"id_column": "id", "value_column": "y"}, "has no column 'y'; it has .*; set data.value_column"),
        (lambda f: f, {"value_column": "value"}, "data.value_column=value needs data.id_column"),
        (lambda f: f, {}, r"row 60 of .* does not come after .*\(if rows of several series have the same time, set data.id_column\)"),
        (
            lambda f: pd.concat([f, f[3:4]]),
            {"id_column": "id"},
            "row 120 of .* repeats the time 2024-01-20 03:00:00 of series 'load'; keep one row",
        ),
        (lambda f: f.drop(columns="date"), {"id_column": "id"}, "has no column of time stamps, which tables with data.id_column need"),
        (lambda f: f.assign(id=f["id"].where(f.index != 4)), {"id_column": "id"}, "row 4 of .* has no series in column 'id'"),
        (lambda f: f.assign(date=f["date"].where(f.index != 4)), {"id_column": "id"}, "row 4 of .* has no time stamp in column 'date'"),
        (lambda f: f.assign(place="Bern"), {"id_column": "id"}, r"'place' .* is not numbers; .*data.drop_columns=\[place\]"),
    ],
)
def test_long_series_that_are_refused(tmp_path, change, fields, message):
    change(_melted()).to_parquet(tmp_path / "long.parquet", index=False)
    with pytest.raises(RecipeError, match=message):
        load_series(SeriesData(str(tmp_path / "long.parquet"), **fields))


def test_one_file_for_each_period(tmp_path):
    """The names of the files do not determine their order; their times do."""
    frame = _wide().assign(date=HOURS)
    frame[:25].to_csv(tmp_path / "z.csv", index=False)
    frame[25:].iloc[:, ::-1].to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "all.parquet", index=False)
    (tmp_path / "notes.md").write_text("no table")
    _same_series(SeriesData(str(tmp_path / "*.csv")))
    _same_series(SeriesData(str(tmp_path), data_files=["a.csv", "z.csv"]))
    _same_series(SeriesData(str(tmp_path), data_files="all.parquet"))
    with pytest.raises(RecipeError, match=r"has no file 2025.csv that ends in"):
        load_series(SeriesData(str(tmp_path), data_files=["a.csv", "2025.csv"]))
    (tmp_path / "all.parquet").unlink()
    _same_series(SeriesData(str(tmp_path)))


def test_one_file_for_each_series(tmp_path):
    for name in ("load", "price"):
        _wide()[[name]].rename(columns={name: "value"}).assign(date=HOURS).to_csv(tmp_path / f"{name}.csv", index=False)
    _same_series(SeriesData(str(tmp_path)))
    _wide()[["price"]][10:].rename(columns={"price": "value"}).assign(date=HOURS[10:]).to_csv(tmp_path / "price.csv", index=False)
    expected = _wide()
    expected.loc[:9, "price"] = np.nan
    with pytest.warns(UserWarning, match=r"do not have the same time stamps: of 60 times, files lack 10 in all"):
        _same_series(SeriesData(str(tmp_path)), expected=expected)


def test_files_of_different_columns_are_joined_on_their_times(tmp_path):
    _wide()[["load"]].assign(date=HOURS).to_csv(tmp_path / "1.csv", index=False)
    _wide()[["price"]].assign(when=HOURS.strftime("%d/%m/%Y %H:%M")).to_csv(tmp_path / "2.csv", index=False)
    _same_series(SeriesData(str(tmp_path)))
    for number in (1, 2):
        _wide().assign(date=HOURS).to_csv(tmp_path / f"{number}.csv", index=False)
    names = ["1_load", "1_price", "2_load", "2_price"]
    _same_series(SeriesData(str(tmp_path)), names, pd.concat([_wide(), _wide()], axis=1))


def test_files_that_cannot_be_joined(tmp_path):
    _wide().assign(date=HOURS).to_csv(tmp_path / "1.csv", index=False)
    _wide().to_csv(tmp_path / "2.csv", index=False)
    with pytest.raises(RecipeError, match=r"2.csv has no time stamps, so it cannot be joined with the other files"):
        load_series(SeriesData(str(tmp_path)))
    _wide().assign(date=range(ROWS)).to_csv(tmp_path / "2.csv", index=False)
    with pytest.raises(RecipeError, match=r"time stamps of different kinds, .*'1.csv': 'datetime64.*'2.csv': 'int64'"):
        load_series(SeriesData(str(tmp_path)))


def test_files_that_are_no_series(tmp_path):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(RecipeError, match=r"series are not read from .*a.xlsx; give a CSV or parquet file"):
        load_series(SeriesData(str(tmp_path / "a.xlsx")))
    with pytest.raises(RecipeError, match=r"has no file \* that ends in .csv, .*; check data.dataset and data.data_files"):
        load_series(SeriesData(str(tmp_path)))
    with pytest.raises(RecipeError, match=r"has no file b\*.csv that ends in"):
        load_series(SeriesData(str(tmp_path / "b*.csv")))
    for content, message in (
        (b"date,a\n2024-01-01,\xe4\n", "is not UTF-8 text .* at byte 18.*; save it as CSV in UTF-8"),
        (b"", "cannot be read as CSV: No columns"),
        (b"date,a\n", "has no rows below the names of its columns"),
        (b"a,b\n1,2\n1,2,3\n", "cannot be read as CSV: .*line 3"),
        (b"0.5,0.25\n1,2\n", r"the first row of .* must name the columns, but it has the numbers \['0.5', '0.25'\]"),
    ):
        (tmp_path / "a.csv").write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            load_series(SeriesData(str(tmp_path / "a.csv")))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RecipeError, match=r"a.parquet cannot be read as Parquet"):
        load_series(SeriesData(str(tmp_path / "a.parquet")))
