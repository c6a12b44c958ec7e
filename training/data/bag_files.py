"""Read bags from tables (one row per bag, or one per instance), feature files and folders of images."""

import ast
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas
import torch
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image as PILImage

from modeling_uhop.images import as_rgb

from ..errors import RecipeError
from .image_files import SUFFIXES
from .source import find_source, load_from_hub
from .tables import read_table


if TYPE_CHECKING:
    from .bags import BagData

# The loader of `datasets` for each file suffix.
LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
TEXT_TABLES = (".csv", ".tsv", ".txt")
# Suffixes of a file with the instances of one bag; of two files of one bag, the earlier is read.
FEATURES = (".npy", ".pt", ".pth", ".h5", ".hdf5")
ACCEPTED = (
    f"a file {', '.join([*LOADERS, '.csv'])}, a folder of feature files ({', '.join(FEATURES)}) with a CSV file of labels, "
    "or a folder of class folders with one folder of images, or one feature file, for each bag"
)
BAG_COLUMNS = ("bag_id", "bag", "slide_id", "slide", "file_name", "filename", "file", "path")
GROUP_COLUMNS = ("case_id", "patient_id", "patient")
SLIDES = r"(?i)\.(?:svs|tiff?|ndpi|mrxs|scn|czi|bif|npy|pth?|h5|hdf5)$"


@dataclass
class FoundBags:
    """Bags as they were found, before their values are checked.

    Attributes:
        bags: The instances of each bag: nested lists, or an array.
        labels: The label of each bag; `None` if none was asked for.
        names: The name of each bag in its table or folder; `None` if bags have only numbers.
        groups: The group of each bag, for instance its patient; `None` if there are no groups.
        classes: The names of the classes, if the column of labels has them.
    """

    bags: Sequence[Any]
    labels: Sequence[Any] | None = None
    names: list[str] | None = None
    groups: list[Any] | None = None
    classes: ClassLabel | None = None


def find_bags(data: "BagData", labelled: bool = True) -> FoundBags:
    """Find the bags of a data set in any of the accepted layouts; see `BagData`.

    Raises:
        RecipeError: If there is no such data set, it has none of the layouts, or a column or a file
            is missing.
    """
    source = find_source(data.dataset, ACCEPTED)
    if source.kind == "hub":
        loaded = load_from_hub(source, ACCEPTED, **({} if data.subset is None else {"name": data.subset}))
        return _of_table(_split(loaded, data), Path(), data, labelled)
    if source.kind == "folder":
        return _in_folder(source.path, data, labelled)
    suffix = source.path.suffix.lower()
    if suffix in TEXT_TABLES:
        return _of_table(_read_csv(source.path, data), source.path.parent, data, labelled)
    if suffix not in LOADERS:
        raise RecipeError(f"bags are not read from a file {suffix or 'without a suffix'}; give {ACCEPTED}, got {data.dataset}")
    table = load_dataset(LOADERS[suffix], data_files=str(source.path), split="train")
    return _of_table(table, source.path.parent, data, labelled)


def _split(loaded: DatasetDict, data: "BagData") -> Dataset:
    if data.split not in loaded:
        raise RecipeError(f"{data.dataset} has no split {data.split!r}; it has {sorted(loaded)}; set data.split to one of these")
    return loaded[data.split]


def _read_csv(path: Path, data: "BagData") -> Dataset:
    texts = [name for name in (data.bag_column, *BAG_COLUMNS, *GROUP_COLUMNS, data.group_column, data.instances_column) if name]
    return Dataset.from_pandas(read_table(path, texts=texts, blanks_only=True), preserve_index=False)


def _in_folder(folder: Path, data: "BagData", labelled: bool) -> FoundBags:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        saved = load_from_disk(str(folder))
        return _of_table(_split(saved, data) if isinstance(saved, DatasetDict) else saved, folder, data, labelled)
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TEXT_TABLES)
    tables = [path for path in tables if path.stem.startswith(data.split)] or tables
    if len(tables) > 1:
        raise RecipeError(f"{folder} has {len(tables)} tables, {[path.name for path in tables]}; give one of them as --data")
    if tables:
        return _of_table(_read_csv(tables[0], data), folder, data, labelled)
    if found := _in_class_folders(folder / data.split if (folder / data.split).is_dir() else folder):
        return found
    if not labelled and (files := [path for paths in _feature_files(folder).values() for path in paths[:1]]):
        return FoundBags([_read_features(path) for path in files], names=[path.name for path in files])
    try:
        return _of_table(_split(load_dataset(str(folder)), data), folder, data, labelled)
    except (DatasetsError, OSError) as error:
        inside = sorted(path.name for path in folder.iterdir())[:5]
        raise RecipeError(f"{folder} holds no bags; give {ACCEPTED}; it begins with {inside}") from error


def _of_table(table: Dataset, folder: Path, data: "BagData", labelled: bool) -> FoundBags:
    """The bags of a table: one row for each bag, one row for each instance, or one file for each row."""
    wanted = [name for name in (data.bag_column, data.group_column, data.label_column if labelled else None) if name is not None]
    for column in wanted:
        if column not in table.column_names:
            setting = "label" if column == data.label_column else "bag" if column == data.bag_column else "group"
            raise RecipeError(f"{data.dataset} has no column {column!r}; it has {table.column_names}; set data.{setting}_column")
    bag = data.bag_column or next((name for name in BAG_COLUMNS if name in table.column_names), None)
    group = data.group_column or next((name for name in GROUP_COLUMNS if name in table.column_names and name != bag), None)
    ids = None if bag is None else table[bag][:]
    repeated = ids is not None and len(set(ids)) < len(ids)
    if data.instances_column in table.column_names and not repeated:
        bags, names = _parsed(table[data.instances_column], data), None
    elif ids is not None and not repeated and (files := _files_of(ids, folder, data)):
        bags, names = [_read_features(path) for path in files], [str(name) for name in ids]
    elif bag is not None:
        return _of_instances(table, bag, group, data, labelled)
    else:
        raise RecipeError(
            f"{data.dataset} has no column {data.instances_column!r}; it has {table.column_names}; set data.instances_column if a row is a "
            "bag, or data.bag_column if a row is an instance or names a feature file"
        )
    labels, classes = (table[data.label_column], table.features[data.label_column]) if labelled else (None, None)
    return FoundBags(bags, labels, names, None if group is None else table[group][:], classes if isinstance(classes, ClassLabel) else None)


def _of_instances(table: Dataset, bag: str, group: str | None, data: "BagData", labelled: bool) -> FoundBags:
    """The bags of a table with one row per instance, in the order of their first rows."""
    frame = table.to_pandas()
    if frame[bag].isna().any():
        raise RecipeError(f"row {int(frame[bag].isna().to_numpy().argmax())} of {data.dataset} has no bag in column {bag!r}; add it")
    codes, names = pandas.factorize(frame[bag])
    firsts = np.unique(codes, return_index=True)[1]
    for column in [data.label_column] * labelled + [group] * (group is not None):
        values = pandas.factorize(frame[column], use_na_sentinel=False)[0]
        differing = np.flatnonzero(values != values[firsts][codes])
        if len(differing) > 0:
            row, first = int(differing[0]), int(firsts[codes[differing[0]]])
            one, other = table[first][column], table[row][column]
            raise RecipeError(
                f"bag {names[codes[row]]!r} of {data.dataset} has {column} {one!r} in row {first} and {other!r} in row {row}; "
                f"all instances of a bag have one {column}"
            )
    columns = _feature_columns(frame, {bag, group, data.label_column}, bag, data)
    if len(columns) == 1 and not pandas.api.types.is_numeric_dtype(frame[columns[0]]):
        instances = _parsed(frame[columns[0]].tolist(), data)
        rows: list[Any] = [[instances[row] for row in np.flatnonzero(codes == index)] for index in range(len(names))]
    else:
        values = frame[columns].to_numpy(dtype=np.float64)
        rows = np.split(values[np.argsort(codes, kind="stable")], np.cumsum(np.bincount(codes))[:-1])
    labels, feature = (frame[data.label_column][firsts].tolist(), table.features[data.label_column]) if labelled else (None, None)
    groups = None if group is None else frame[group][firsts].tolist()
    return FoundBags(rows, labels, [str(name) for name in names], groups, feature if isinstance(feature, ClassLabel) else None)


def _feature_columns(frame: pandas.DataFrame, others: set[str | None], bag: str, data: "BagData") -> list[str]:
    """The columns of features in a table with one row per instance."""
    free = [name for name in frame.columns if name not in others]
    if data.feature_columns is not None:
        for pattern in data.feature_columns:
            if not any(fnmatchcase(name, pattern) for name in free):
                raise RecipeError(f"data.feature_columns has {pattern!r}, but {data.dataset} has the columns {free}")
        return [name for name in free if any(fnmatchcase(name, pattern) for pattern in data.feature_columns)]
    lists = [name for name in free if len(frame) > 0 and isinstance(frame[name].iloc[0], (list, tuple, np.ndarray))]
    if data.instances_column in free or len(lists) == 1:
        return [data.instances_column] if data.instances_column in free else lists
    remedy = 'set data.feature_columns, for instance ["f*"] for all columns that begin with f'
    features = []
    for name in free:
        if re.search(r"label|^target$|^class$", name.casefold()):
            raise RecipeError(f"column {name!r} of {data.dataset} looks like labels; {remedy}")
        if re.fullmatch(r"unnamed: \d+|index|__index_level_0__|(?:.*_)?id", name.casefold()):
            warnings.warn(f"column {name!r} of {data.dataset} has row numbers or names, and is no feature; {remedy}", stacklevel=5)
        elif not pandas.api.types.is_numeric_dtype(frame[name]):
            raise RecipeError(f"column {name!r} of {data.dataset} is not numbers, but {str(frame[name].iloc[0])[:40]!r}; {remedy}")
        else:
            features.append(name)
    if not features:
        folder = data.feature_folder or "the folder of the table"
        raise RecipeError(
            f"{data.dataset} has no columns of features besides {[*frame.columns]}, and {folder} has no feature file "
            f"{frame[bag].iloc[0]} ({', '.join(FEATURES)}); set data.feature_folder, data.feature_columns or data.instances_column"
        )
    return features


def _parsed(cells: Iterable[Any], data: "BagData") -> list[Any]:
    """The values of a column, with text such as a CSV file has converted into lists."""
    return [_from_text(cell, index, data) if isinstance(cell, str) else cell for index, cell in enumerate(cells)]


def _from_text(text: str, index: int, data: "BagData") -> Any:
    """Numbers from JSON, or from the text that Python, NumPy or pandas print for lists and arrays."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    if "..." in text:
        raise RecipeError(
            f"row {index} of {data.dataset} was shortened by NumPy to {text[:40]!r}; save lists: array.tolist(), or use Parquet"
        )
    plain = re.sub(r"\b(?:np\.)?(?:array|tensor|float\d+|int\d+)\(|\bdtype=[\w.]+|\)", " ", text).replace(",", " ")
    plain = re.sub(r"\b(?:nan|NaN|None)\b", " None ", re.sub(r"\binf\b", "1e999", plain))
    plain = re.sub(r"(?<=[\]\w.])\s+(?=[\[\w.+-])", ",", plain.strip())
    try:
        return ast.literal_eval(re.sub(r",?\s*\]", "]", plain))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise RecipeError(
            f"row {index} of {data.dataset} has the text {text[:40]!r} for instances; write lists such as [[0.1, 0.2], [0.3, 0.4]]"
        ) from None


def _feature_files(folder: Path) -> dict[str, list[Path]]:
    """The feature files below a folder by their names without suffix."""
    found: dict[str, list[Path]] = {}
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(FEATURES) and not name.startswith("."):
                found.setdefault(re.sub(SLIDES, "", name), []).append(Path(place, name))
    return {name: sorted(paths, key=lambda path: FEATURES.index(path.suffix.lower())) for name, paths in found.items()}


def _files_of(ids: list[Any], table_folder: Path, data: "BagData") -> list[Path]:
    """The feature file of each row of a table; an empty list if no row has one."""
    folder = table_folder if data.feature_folder is None else Path(data.feature_folder).expanduser()
    if data.feature_folder is not None and not folder.is_dir():
        raise RecipeError(f"data.feature_folder={data.feature_folder} is not a folder; give the folder of the feature files")
    by_name = _feature_files(folder) if folder.is_dir() and folder != Path() else {}
    files: list[Path] = []
    missing: list[Path] = []
    for name in map(str, ids):
        exact = folder / name
        if exact.is_file() and exact.suffix.lower() in (*FEATURES, ".csv"):
            files.append(exact)
            continue
        paths = by_name.get(re.sub(SLIDES, "", Path(name).name), [])
        alike = [path for path in paths if path.suffix == paths[0].suffix]
        if len(alike) > 1:
            raise RecipeError(
                f"{name} of {data.dataset} has the feature files {alike[0]} and {alike[1]}; set data.feature_folder to one folder"
            )
        (files if paths else missing).append(paths[0] if paths else Path(name))
    if files and missing:
        raise RecipeError(
            f"{len(missing)} of {len(ids)} bags of {data.dataset} have no feature file below {folder} ({', '.join(FEATURES)}), "
            f"first {missing[0]}; add the files or remove the rows"
        )
    return files


def _read_features(path: Path) -> Any:
    """The instances in a feature file: an array, or the entry `features` of a file with several."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if suffix == ".csv":
            return read_table(path).to_numpy(dtype=np.float64)
        if suffix in (".pt", ".pth"):
            return _entry(torch.load(path, map_location="cpu", weights_only=True), path)
        if not find_spec("h5py"):
            raise RecipeError(f"{path} needs h5py: pip install h5py")
        with import_module("h5py").File(path) as file:
            return np.asarray(_entry({name: file[name] for name in file}, path))
    except RecipeError:
        raise
    except Exception as error:
        # Because each library raises its own errors for a damaged file, we catch all.
        raise RecipeError(f"the features in {path} cannot be read: {' '.join(str(error).split())}") from error


def _entry(content: Any, path: Path) -> Any:
    if not isinstance(content, dict):
        return content
    if "features" not in content and len(content) != 1:
        raise RecipeError(f"{path} must have an entry 'features' or only one entry, got {sorted(map(str, content))}")
    return content["features"] if "features" in content else next(iter(content.values()))


def _in_class_folders(folder: Path) -> FoundBags | None:
    """The bags of FOLDER/CLASS/BAG, where BAG is a folder of images or a feature file."""
    bags: list[Path] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))):
        entries = sorted(path for path in place.iterdir() if not path.name.startswith("."))
        inner = [path for path in entries if path.is_dir()]
        if not inner and any(path.suffix.lower() in SUFFIXES for path in entries):
            raise RecipeError(f"{place} has images, but a bag is a folder of images: {folder.name}/CLASS/BAG/IMAGE; or use task: images")
        if any(_pictures(path) for path in inner):
            bags += inner
        elif not inner:
            bags += [path for path in entries if path.suffix.lower() in FEATURES]
    if not bags:
        return None
    return FoundBags(
        bags=[_read_features(path) if path.is_file() else _read_pictures(path) for path in bags],
        labels=[path.parent.name for path in bags],
        names=[f"{path.parent.name}/{path.name}" for path in bags],
    )


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def _read_pictures(folder: Path) -> np.ndarray:
    """The images of a folder as (images, 3, height, width), with values in [0, 1]."""
    pictures = []
    for path in _pictures(folder):
        try:
            with PILImage.open(path) as image:
                pictures.append(np.asarray(as_rgb(image), dtype=np.float32).transpose(2, 0, 1) / 255)
        except (OSError, SyntaxError, ValueError) as error:
            raise RecipeError(f"the image {path} cannot be read: {error}; remove it") from error
        if pictures[-1].shape != pictures[0].shape:
            sizes = " and ".join(f"{picture.shape[1]} x {picture.shape[2]}" for picture in (pictures[0], pictures[-1]))
            raise RecipeError(f"images of all bags must have one size; {folder} has {sizes} pixels ({path.name}); resize them")
    return np.stack(pictures) if pictures else np.zeros((0, 3, 0, 0), np.float32)
