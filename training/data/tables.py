"""Read tables as people save them: CSV files with any separator, and decimal commas."""

import gzip
import re
from collections.abc import Iterable
from pathlib import Path

import pandas

from ..errors import RecipeError


# Suffixes of the tables that `read_table` reads.
TABLES = (".csv", ".tsv", ".txt", ".csv.gz", ".parquet")
SEPARATORS = (",", ";", "\t", "|")
NUMBER = r"-?\d+(?:\.\d+)*(?:[eE][-+]?\d+)?"
DECIMAL_COMMA = r"[-+]?(?:\d+|\d{1,3}(?:\.\d{3})+)(?:,\d+)?(?:[eE][-+]?\d+)?"


def is_table(path: Path) -> bool:
    """Whether the name of a file ends like a table."""
    return path.name.lower().endswith(TABLES)


def read_table(path: Path, *, texts: Iterable[str] = (), blanks_only: bool = False) -> pandas.DataFrame:
    """Read a Parquet file, or a CSV file with the separator that its first line has most often.

    In a CSV file with another separator than the comma, columns of numbers with a decimal comma
    become numbers.

    Args:
        texts: Columns of a CSV file that stay text, such as names of files ("0012").
        blanks_only: Whether only empty cells and NaN are missing. Otherwise words such as NA and
            None are missing too, which may be names of classes.

    Raises:
        RecipeError: If the file is not a table, is not UTF-8, has no rows, or its first row does
            not name the columns.
    """
    if path.suffix.lower() == ".parquet":
        try:
            return pandas.read_parquet(path)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    options = {"keep_default_na": False, "na_values": ["", "nan", "NaN"]} if blanks_only else {}
    try:
        separator = _separator(path)
        frame = pandas.read_csv(path, sep=separator, dtype=dict.fromkeys(texts, str), low_memory=False, **options)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV in UTF-8") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as CSV: {' '.join(str(error).split())}") from error
    if frame.empty:
        raise RecipeError(f"{path} has no rows below the names of its columns; add some")
    names = [str(name) for name in frame.columns]
    if all(re.fullmatch(NUMBER, name) for name in names) and names != [str(number) for number in range(len(names))]:
        raise RecipeError(f"the first row of {path} must name the columns, but it has the numbers {names[:3]}; add a row of names")
    return frame if separator == "," else _with_decimal_points(frame, set(texts))


def _separator(path: Path) -> str:
    """The separator that the first line of a CSV file has most often, outside quotes."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix.lower() == ".gz" else path.open(encoding="utf-8") as lines:
        first = re.sub(r'"[^"]*"', "", next((line for line in lines if line.strip()), ""))
    return max(SEPARATORS, key=first.count)


def _with_decimal_points(frame: pandas.DataFrame, texts: set[str]) -> pandas.DataFrame:
    """Convert the columns of text that are numbers with a decimal comma."""
    for name in frame.columns:
        column = frame[name].dropna()
        if name in texts or pandas.api.types.is_numeric_dtype(column) or len(column) == 0:
            continue
        text = column.astype(str).str.strip()
        if text.str.contains(",").any() and text.str.fullmatch(DECIMAL_COMMA).all():
            numbers = text.str.replace(".", "", regex=False).str.replace(",", ".", regex=False)
            frame[name] = pandas.to_numeric(numbers).reindex(frame.index)
    return frame
