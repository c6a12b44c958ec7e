"""Names of data sets: a built-in one, a Hub id, or a local folder or file."""

from pathlib import Path

from ..errors import RecipeError


def local_dataset(name: str, data_dir: Path) -> str:
    """The local path of a recipe's data set.

    This is the folder, CSV file or parquet file in `data_dir` that has the name of the data set.
    Built-in data sets ("digits" and "synthetic") keep their name.

    Raises:
        RecipeError: If there is no such folder or file.
    """
    if name in ("digits", "synthetic"):
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
