"""Find the splits of an image data set: in class folders, in Parquet or CSV files, or on the Hub."""

import os
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..errors import RecipeError
from .source import find_source, load_from_hub
from .tables import read_table


if TYPE_CHECKING:
    from .images import ImageData

ACCEPTED = "a folder of class folders of images, or a Parquet or CSV file"
SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
# Names of splits, longer ones first, because the file names begin with them.
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
SPLITS = ("training", "train", "testing", "test", "evaluation", "eval", *VALIDATION_SPLITS)
# Names of a column of paths, if there is no column `data.image_column`.
PATH_COLUMNS = ("file_name", "filename", "file", "filepath", "file_path", "path", "image_path", "img_path", "img")
# A function that reads a split.
Reader = Callable[[], Dataset]


def find_splits(data: "ImageData", labelled: bool = True) -> dict[str, Reader]:
    """Find the splits of a data set; each is read when its function is called.

    Args:
        labelled: Whether images need a class; if not, a folder of images without class folders is
            one split, and so is each of its folders.

    Raises:
        RecipeError: If there is no such data set, or it has none of the accepted layouts.
    """
    source = find_source(data.dataset, ACCEPTED)
    if source.kind == "hub":
        return _of_loaded(load_from_hub(source, ACCEPTED, **({} if data.subset is None else {"name": data.subset})))
    if source.kind == "folder":
        return _in_folder(source.path, data, labelled)
    suffix = source.path.suffix.lower()
    if suffix in (".parquet", ".csv", ".tsv", ".txt"):
        return _in_tables([source.path], source.path.parent, data)
    if suffix in SUFFIXES:
        raise RecipeError(f"{data.dataset} is one image; --data takes {ACCEPTED}, or the id of a data set on the Hub")
    raise RecipeError(f"{data.dataset} is a file that images are not read from; --data takes {ACCEPTED}")


def names_of_splits(data: "ImageData", found: list[str]) -> dict[str, str]:
    """The names of the splits that serve as "train", "test" and "validation".

    The test and the validation split are left out if they must be held out of the training split.
    A split that stands in for a missing split "test" gives a warning.

    Args:
        data: The data section of the recipe.
        found: The names of the splits of the data set.

    Raises:
        RecipeError: If a split that the recipe names does not exist.
    """
    if data.train_split not in found:
        raise RecipeError(f"{data.dataset} has no split {data.train_split!r}; it has {found}; set data.train_split to one of these")
    names, free = {"train": data.train_split}, [name for name in found if name != data.train_split]
    if data.validation_split is not None:
        if data.validation_split not in free:
            raise RecipeError(f"data.validation_split must be another split than the training split, {free}, got {data.validation_split!r}")
        names["validation"] = data.validation_split
        free.remove(data.validation_split)
    usual = [name for name in VALIDATION_SPLITS if name in free and "validation" not in names]
    if data.test_split in free:
        names["test"] = data.test_split
    elif data.test_split == "test" and (usual or data.test_fraction > 0):
        names.update(zip(["test"], usual[:1], strict=False))
        instead = f"its split {usual[0]!r} is" if usual else f"data.test_fraction={data.test_fraction:g} of its training images are"
        choice = f"data.test_split={usual[0]}, or =null to hold out images," if usual else "data.test_split=null"
        warnings.warn(f"{data.dataset} has no split 'test', but {found}; {instead} used for the test; {choice} chooses this", stacklevel=3)
    elif data.test_split not in ("test", None):
        raise RecipeError(
            f"{data.dataset} has no split {data.test_split!r}; it has {found}; set data.test_split to one that is not the training split, "
            "or to null, which holds out data.test_fraction of the training images"
        )
    left = [name for name in usual if name != names.get("test")]
    return {**names, "validation": left[0]} if left else names


def _of_loaded(loaded: DatasetDict) -> dict[str, Reader]:
    return {str(name): partial(lambda split: split, split) for name, split in loaded.items()}


def _in_folder(folder: Path, data: "ImageData", labelled: bool) -> dict[str, Reader]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = load_from_disk(str(folder))
        return _of_loaded(saved if isinstance(saved, DatasetDict) else DatasetDict({data.train_split: saved}))
    if parquet := sorted(folder.rglob("*.parquet")):
        return _in_tables(parquet, folder, data)
    if not labelled and (images := _images(folder)):
        parts = {data.train_split: images} | {part.name: inside for part in _folders(folder) if (inside := _images(part))}
        return {name: partial(_of_paths, paths) for name, paths in parts.items()}
    tables = [*sorted(folder.glob("*.csv")), *sorted(folder.glob("*/metadata.csv"))]
    if tables := [path for path in tables if _lists_images(path, data)]:
        return _in_tables(tables, folder, data)
    if splits := _of_class_folders(folder, data):
        return splits
    if any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()) and not any(folder.glob("metadata.*")):
        raise RecipeError(f"{folder} has images without class folders; put the images of each class in a folder of its own")
    try:
        return _of_loaded(load_dataset(str(folder)))
    except (DatasetsError, OSError, ValueError) as error:
        found = sorted(path.name for path in folder.iterdir())[:5]
        raise RecipeError(f"{folder} has no images in class folders and no Parquet or CSV files; it begins with {found}") from error


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, without hidden ones and those that archives of macOS add."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))


def _images(folder: Path) -> list[str]:
    """The paths of all images below a folder, in order."""
    found = [
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("._")
    ]
    return sorted(found)


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir() if path.is_file())


def _of_class_folders(folder: Path, data: "ImageData") -> dict[str, Reader]:
    """The splits of FOLDER/SPLIT/CLASS/IMAGE, or the one split of FOLDER/CLASS/IMAGE."""
    inner = _folders(folder)
    # A folder that has no image, only folders, may be a split.
    splits = {each.name: each for each in inner if not _has_images(each) and any(_images(deeper) for deeper in _folders(each))}
    named = {name for name in splits if name.casefold() in SPLITS or name in (data.train_split, data.test_split)}
    if named:
        return {name: partial(_read_classes, splits[name]) for name in splits if name in named or len(_folders(splits[name])) > 1}
    classes = [each for each in inner if _images(each)]
    if not classes:
        return {}
    if all(each.name.casefold() in SPLITS for each in classes):
        raise RecipeError(f"{classes[0]} has images without class folders; put the images of each class in a folder of its own")
    if len(classes) == 1:
        inside = f"{classes[0]} has folders of its own: give that as --data" if _folders(classes[0]) else "give one folder for each class"
        raise RecipeError(f"{folder} has images in one class folder, {classes[0].name!r}, and there is nothing to classify; {inside}")
    return {data.train_split: partial(_read_classes, folder)}


def _read_classes(folder: Path) -> Dataset:
    """The images of FOLDER/CLASS/IMAGE with the names of the class folders.

    Because the class folders of two splits may differ, the labels are text here."""
    classes = {each.name: images for each in _folders(folder) if (images := _images(each))}
    return _of_paths([path for images in classes.values() for path in images], [name for name, images in classes.items() for _ in images])


def _of_paths(paths: list[str], classes: list[str] | None = None) -> Dataset:
    columns = {"image": paths} if classes is None else {"image": paths, "label": classes}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("string")} if classes else {"image": Image()}))


def _lists_images(path: Path, data: "ImageData") -> bool:
    """Whether a CSV file has a column of paths and a column of classes."""
    columns = list(read_table(path).columns)
    return data.label_column in columns and not {data.image_column, *PATH_COLUMNS}.isdisjoint(columns)


def _in_tables(files: list[Path], folder: Path, data: "ImageData") -> dict[str, Reader]:
    """The splits of Parquet or CSV files; a file belongs to the split that its name begins with.

    Files without the name of a split are one split together, unless a column `split` of a CSV file
    divides it."""
    wanted = {name for name in (data.train_split, data.test_split, data.validation_split) if name}
    known = sorted({*wanted, *SPLITS}, key=len, reverse=True)
    splits: dict[str, list[Path]] = {}
    for path in files:
        numbered = re.fullmatch(r"[\d-]+(?:of-?\d+)?|metadata", path.stem) and path.parent != folder
        name = path.parent.name if numbered else path.stem
        splits.setdefault(next((each for each in known if name.startswith(each)), name), []).append(path)
    if splits.keys().isdisjoint(known):
        together = _read_tables(files, data)
        if "split" not in together.column_names:
            return {data.train_split: lambda: together}
        places = together["split"][:]
        return {str(name): partial(together.select, [row for row, each in enumerate(places) if each == name]) for name in set(places)}
    return {name: partial(_read_tables, paths, data) for name, paths in splits.items()}


def _read_tables(paths: list[Path], data: "ImageData") -> Dataset:
    """Read the files of one split.

    Because `datasets` gives all splits that it loads together the features and the class names of
    the first one, each split is loaded alone."""
    if paths[0].suffix.lower() == ".parquet":
        return _with_full_paths(load_dataset("parquet", data_files=[str(path) for path in paths], split="train"), paths[0], data)
    texts = (data.image_column, *PATH_COLUMNS)
    parts = [Dataset.from_pandas(read_table(path, texts=texts, blanks_only=True), preserve_index=False) for path in paths]
    return concatenate_datasets([_with_full_paths(part, path, data) for part, path in zip(parts, paths, strict=True)])


def image_column(table: Dataset, data: "ImageData") -> str | None:
    """The column of images: `data.image_column`; or, if that is "image" and does not exist, the only
    column of images, or else a column that is named as paths are."""
    if data.image_column in table.column_names or data.image_column != "image":
        return data.image_column if data.image_column in table.column_names else None
    typed = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    return typed[0] if len(typed) == 1 else next((name for name in PATH_COLUMNS if name in table.column_names), None)


def _with_full_paths(table: Dataset, file: Path, data: "ImageData") -> Dataset:
    """The table with paths of images that do not depend on the working directory.

    Raises:
        RecipeError: If a path names no file; but not if unreadable images are skipped.
    """
    column = image_column(table, data)
    if column is None or getattr(table.features[column], "dtype", None) not in ("string", "large_string"):
        return table
    places = [cell if cell is None or "://" in cell else str(file.parent / Path(cell).expanduser()) for cell in table[column]]
    missing = next((row for row, place in enumerate(places) if place and "://" not in place and not os.path.isfile(place)), None)
    if missing is not None and not data.skip_unreadable:
        raise RecipeError(
            f"row {missing} of {file} names the image {table[column][missing]}, and there is no file {places[missing]}; "
            "paths start at the folder of the table; data.skip_unreadable=true skips images that are missing"
        )
    return table.remove_columns(column).add_column(column, places, feature=Value("string"))
