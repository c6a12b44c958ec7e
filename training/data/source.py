"""Decide what the name of a data set means: a built-in data set, a local file or folder, or a Hub
id."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import DatasetDict, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..errors import RecipeError


BUILT_IN = ("digits", "synthetic")
# A name that ends like this is a path, never a Hub id.
FILE_SUFFIX = (
    r"\.(?:csv|tsv|txt|parquet|json|jsonl|arrow|xlsx?|npy|npz|pth?|h5|hdf5|zip|tar|t?gz|png|jpe?g|gif|bmp|tiff?|webp|svs|mat|pkl|ya?ml)$"
)
# Seconds to wait for the Hub before a data set counts as unreachable.
PATIENCE = 10.0


@dataclass(frozen=True)
class Source:
    """Where a data set is.

    Attributes:
        name: The name as the user gave it.
        kind: "built-in", "file", "folder" or "hub".
        path: The file or the folder; the empty path for the other kinds.
    """

    name: str
    kind: Literal["built-in", "file", "folder", "hub"]
    path: Path = Path()


def find_source(name: str, accepted: str, built_in: str | None = None) -> Source:
    """Decide what the name of a data set means, without the network.

    Args:
        name: The name; a leading ~ means the home folder.
        accepted: What the task accepts, for the message.
        built_in: Name of the built-in data set of the task, if it has one.

    Raises:
        RecipeError: If there is no such file or folder, and the name is not NAME or OWNER/NAME.
    """
    if built_in is not None and name == built_in:
        return Source(name, "built-in")
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return Source(name, "folder" if path.is_dir() else "file", path)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", name) and not re.search(FILE_SUFFIX, name, re.IGNORECASE):
        return Source(name, "hub")
    raise RecipeError(f"{_nowhere(name)}; give {accepted}, or the id of a data set on the Hub, as --data")


def _nowhere(name: str) -> str:
    """The beginning of the message for a name that is no file or folder, with the nearest name there is."""
    path = Path(name).expanduser()
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, 1)
    return f"there is no file or folder {name}" + (f"; did you mean {path.parent / near[0]}?" if near else "")


def load_from_hub(source: Source, accepted: str, **options: Any) -> DatasetDict:
    """Load a data set of the Hub by `datasets.load_dataset`, or its copy in the cache if the Hub
    cannot be reached.

    One short request asks the Hub first, because `load_dataset` repeats a failed request for half a
    minute.

    Args:
        accepted: What the task accepts besides a Hub id, for the message.
        options: Arguments of `load_dataset`.

    Raises:
        RecipeError: If the Hub has no such data set, or cannot be reached and the cache has no
            copy, or the data set has several subsets and none is chosen.
    """
    name, before = source.name, datasets.config.HF_HUB_OFFLINE
    nowhere = _nowhere(name)
    remedy = f"give {accepted}, or the id of a data set on the Hub, as --data"
    unreachable = None
    try:
        HfApi().dataset_info(name, timeout=PATIENCE)
    except RepositoryNotFoundError:
        raise RecipeError(f"{nowhere}, and the Hub has no such data set (a private one needs `hf auth login`); {remedy}") from None
    except Exception as error:
        # Because the HTTP library of huggingface_hub raises errors of its own classes, we catch all.
        unreachable = error
    try:
        datasets.config.HF_HUB_OFFLINE = before or unreachable is not None
        return load_dataset(name, **options)
    except (ConnectionError, FileNotFoundError) as error:
        if unreachable is None:
            raise RecipeError(f"the data set {name} of the Hub cannot be loaded: {_first_line(error)}") from error
        cause = _first_line(unreachable).partition(". ")[0]
        raise RecipeError(f"{nowhere}, and the Hub cannot be reached to look for it ({cause}); {remedy}") from None
    except ValueError as error:
        hint = "; set data.subset to one of these" if "config" in str(error).casefold() else ""
        raise RecipeError(f"the data set {name} of the Hub cannot be loaded: {' '.join(str(error).split())}{hint}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def local_dataset(name: str, data_dir: Path) -> str:
    """The local path of a recipe's data set.

    This is the folder, CSV file or parquet file in `data_dir` that has the name of the data set.
    Built-in data sets ("digits" and "synthetic") keep their name.

    Raises:
        RecipeError: If there is no such folder or file.
    """
    if name in BUILT_IN:
        return name
    stem = name.rpartition("/")[2]
    for candidate in (stem, f"{stem}.csv", f"{stem}.parquet"):
        if (data_dir / candidate).exists():
            return str(data_dir / candidate)
    raise RecipeError(f"{data_dir} has no folder or file {stem}, {stem}.csv or {stem}.parquet")


def same_data(first: str, second: str) -> bool:
    """Return whether two texts name the same data set: the same name, or the same local path."""
    paths = [Path(text).expanduser() for text in (first, second)]
    return first == second or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))
