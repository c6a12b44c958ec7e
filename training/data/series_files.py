"""Read the table of a multivariate series: one file or several, wide or long, local or on the Hub."""

import re
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pandas

from ..errors import RecipeError
from .source import find_source, load_from_hub
from .tables import TABLES, is_table, read_table
from .time_stamps import find_date_column, read_time_stamps, take_time_stamps


if TYPE_CHECKING:
    from .series import SeriesData

ACCEPTED = f"a CSV or parquet file ({', '.join(TABLES)}), a folder of such files, or a pattern such as 'folder/*.csv'"
# Names of the column of series in long tables that other forecasting libraries write.
ID_COLUMNS = ("unique_id", "item_id", "series_id")
MISSING = r"\W*|(?i:n/?a|null|none|nan|missing)"


def read_series(data: "SeriesData") -> pandas.DataFrame:
    """Read the series of a data set, one column each, without their time stamps.

    Raises:
        RecipeError: If there is no such data set, a column is missing or is not numbers, or the
            time stamps cannot be read or do not increase.
    """
    local = _files(data)
    if local is None:
        options = {"data_files": data.data_files, **({} if data.subset is None else {"name": data.subset})}
        splits = load_from_hub(find_source(data.dataset, ACCEPTED), ACCEPTED, **options)
        if len(splits) > 1:
            raise RecipeError(f"{data.dataset} has the splits {', '.join(splits)}, but one series is needed; set data.data_files")
        (rows,) = splits.values()
        return _of_table(rows.to_pandas(), data.dataset, data)
    if len(local) == 1:
        return _of_table(read_table(local[0]), str(local[0]) if Path(data.dataset).is_dir() else data.dataset, data)
    return _together({path: _of_table(read_table(path), str(path), data) for path in local}, data.dataset)


def _files(data: "SeriesData") -> list[Path] | None:
    """The local files of a data set; `None` if it is on the Hub."""
    pattern = Path(data.dataset).expanduser()
    if re.search(r"[*?\[]", pattern.name) and not pattern.exists():
        folder, patterns = pattern.parent, [pattern.name]
    else:
        source = find_source(data.dataset, ACCEPTED)
        if source.kind == "hub":
            return None
        if source.kind == "file":
            if not is_table(source.path):
                raise RecipeError(f"series are not read from {data.dataset}; give {ACCEPTED}")
            return [source.path]
        folder, patterns = source.path, [data.data_files] if isinstance(data.data_files, str) else data.data_files or ["*"]
    found: set[Path] = set()
    for each in patterns:
        matching = {path for path in folder.glob(each) if path.is_file() and is_table(path) and path.name[0] != "."}
        if not matching:
            raise RecipeError(f"{folder} has no file {each} that ends in {', '.join(TABLES)}; check data.dataset and data.data_files")
        found |= matching
    return sorted(found)


def _of_table(frame: pandas.DataFrame, name: str, data: "SeriesData") -> pandas.DataFrame:
    """The series of one table, with its time stamps as the index if it has some."""
    for column in ("Unnamed: 0", "__index_level_0__"):
        if column in frame.columns:
            # pandas saves an index without a name as such a column.
            frame = frame.set_index(column).rename_axis(None)
            break
    for setting in ("id_column", "value_column"):
        if getattr(data, setting) not in (None, *frame.columns):
            raise RecipeError(f"{name} has no column {getattr(data, setting)!r}; it has {list(frame.columns)}; set data.{setting}")
    if unknown := [column for column in data.drop_columns if column not in frame.columns]:
        raise RecipeError(f"data.drop_columns has {unknown}, but {name} has the columns {list(frame.columns)}")
    frame = frame.drop(columns=data.drop_columns)
    series = data.id_column or next((column for column in ID_COLUMNS if column in frame.columns and frame[column].duplicated().any()), None)
    if series is not None:
        frame = _wide(frame, series, name, data)
    elif data.value_column is not None:
        raise RecipeError(
            f"data.value_column={data.value_column} needs data.id_column, the column that names the series of each row of {name}"
        )
    frame = take_time_stamps(frame, data.date_column, name, data.date_format)
    _refuse_text(frame, name)
    return frame


def _refuse_text(frame: pandas.DataFrame, name: str) -> None:
    """Raise a `RecipeError` that names the first column that is not numbers, and what to do."""
    for column in frame.columns:
        if pandas.api.types.is_numeric_dtype(frame[column]):
            continue
        bad = frame[column].notna() & pandas.to_numeric(frame[column], errors="coerce").isna()
        row = int(bad.to_numpy().argmax())
        cell = str(frame[column].iloc[row])
        if re.fullmatch(r"[-+]?[\d.]*,\d+", cell):
            hint = "write numbers with a decimal point and without separators of thousands"
        elif re.fullmatch(MISSING, cell) and bad.sum() < len(frame):
            hint = "leave cells without a value empty"
        else:
            hint = (
                f"set data.date_column={column} if it has time stamps (and data.date_format if they are unusual), "
                f"data.id_column={column} if it names the series of each row, or data.drop_columns=[{column}] to leave it out"
            )
        raise RecipeError(f"column {column!r} of {name} is not numbers; it has {cell[:40]!r} in row {row}; {hint}")


def _wide(frame: pandas.DataFrame, series: str, name: str, data: "SeriesData") -> pandas.DataFrame:
    """A column for each series of a table with one row for each series and time, in the order of the
    first rows."""
    date = find_date_column(frame, data.date_column, name)
    if date is None:
        raise RecipeError(f"{name} has no column of time stamps, which tables with data.id_column need; set data.date_column")
    values = [data.value_column] if data.value_column is not None else [column for column in frame.columns if column not in (series, date)]
    _refuse_text(frame[values], name)
    if frame[series].isna().any():
        raise RecipeError(f"row {int(frame[series].isna().to_numpy().argmax())} of {name} has no series in column {series!r}; add it")
    if (missing := frame[date].isna().to_numpy()).any():
        raise RecipeError(f"row {int(missing.argmax())} of {name} has no time stamp in column {date!r}; add it, or remove the row")
    stamps = read_time_stamps(frame[date].reset_index(drop=True), f"column {date!r} of {name}", data.date_format)
    keyed = frame[[series, *values]].reset_index(drop=True).assign(**{date: stamps})
    again = keyed.duplicated([series, date]).to_numpy()
    if again.any():
        row = int(again.argmax())
        time, one = frame[date].iloc[row], frame[series].iloc[row]
        raise RecipeError(f"row {row} of {name} repeats the time {time} of series {one!r}; keep one row for each time")
    wide = keyed.pivot(index=date, columns=series, values=values)
    order = [(value, each) for each in keyed[series].unique() for value in values]
    wide = wide[order].set_axis([str(each) if len(values) == 1 else f"{each}_{value}" for value, each in order], axis=1)
    return wide.rename_axis(None)


def _together(tables: dict[Path, pandas.DataFrame], name: str) -> pandas.DataFrame:
    """The series of several files.

    Files with the same columns whose times do not overlap are consecutive rows. Other files are
    joined on their time stamps; where a file lacks a time, its series have no value.
    """
    for path, frame in tables.items():
        if isinstance(frame.index, pandas.RangeIndex):
            raise RecipeError(f"{path} has no time stamps, so it cannot be joined with the other files of {name}; set data.date_column")
    if len({frame.index.dtype.kind for frame in tables.values()}) > 1:
        kinds = {path.name: str(frame.index.dtype) for path, frame in tables.items()}
        raise RecipeError(f"the files of {name} have time stamps of different kinds, {kinds}; write them in one way")
    ordered = sorted(tables.values(), key=lambda frame: frame.index[0])
    same = all(set(frame.columns) == set(ordered[0].columns) for frame in ordered)
    if same and all(before.index[-1] < after.index[0] for before, after in pairwise(ordered)):
        together = pandas.concat(ordered)
    else:
        columns = [column for frame in tables.values() for column in frame.columns]
        if len(set(columns)) < len(columns):
            for path, frame in tables.items():
                stem = path.name.partition(".")[0]
                frame.columns = [stem if len(frame.columns) == 1 else f"{stem}_{column}" for column in frame.columns]
        together = pandas.concat(tables.values(), axis=1, join="outer").sort_index()
        absent = sum(len(together) - len(frame) for frame in tables.values())
        if absent > 0:
            warnings.warn(
                f"the files of {name} do not have the same time stamps: of {len(together)} times, files lack {absent} in all, "
                "where their series have no value",
                stacklevel=4,
            )
    return take_time_stamps(together, "date", name)
