"""Data sets as people have them: each layout is read to the right values, and each refusal says what is accepted."""

import time
import warnings
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from modeling_uhop.training.data.images import ImageData, load_images, make_image_processor, unlabelled_images
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
        with pytest.raises(
            RecipeError, match=r"there is no file or folder .*; give a .*, or the id of a data set on the Hub, as --dataset"
        ):
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
        (["all/cat/1.png", "all/dog/1.png"], r"'all', .*all has folders of its own: give that as --dataset"),
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
    with pytest.raises(RecipeError, match=r"photo.png is one image; --dataset takes a folder of class folders"):
        load_images(ImageData(str(tmp_path / "photo.png")))
    with pytest.raises(RecipeError, match=r"archive.zip is a file that images are not read from; --dataset takes a folder"):
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
