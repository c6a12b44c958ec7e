"""Read and check the time stamps of a series, in a column or in the index.

Ambiguous stamps are refused instead of guessed, and stamps must increase.
"""

import re
import warnings

import numpy as np
import pandas

from ..errors import RecipeError


# A column of numbers with such a name is a time, not a series. Separators and upper case are
# removed before the match.
TIME = r"(?:unix|epoch|open|close|utc|local)?(?:date|time|datetime|timestamp|ds|epoch|unix)(?:s|ms|us|ns|utc)?"
# Names of columns in which pandas saves row numbers.
COUNTER = r"unnamed: \d+(?:\.\d+)?|index|level_0|__index_level_0__"
# An offset from UTC. Because 30-03-2024 ends in a year, an offset of hours alone or without a colon
# must follow a time.
OFFSET = r"(?i)\d(?:\s?(?:Z|UTC|GMT)|\s?[+-]\d{2}:\d{2})$|(?::\d{2}(?:\.\d+)?(?:\s?[AP]M)?|T\d{2,6}(?:\.\d+)?)\s?[+-]\d{2}(?:\d{2})?$"
# A week as pandas writes it, by its first and its last day.
INTERVAL = r"^(\d{4}-\d{2}-\d{2}[^/]*)/\d{4}-\d{2}-\d{2}[^/]*$"
DIGITS = {6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
# How a date of numbers begins: 2024-01, 13/01/2024 or 13/01/24.
LIKE_A_DATE = r"^\d{4}[-/.]\d{1,2}(?!\d)|^\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}(?!\d)"
YEAR_FIRST, YEAR_LAST, MONTH_NAME = r"^\d{4}[-/.]?\d", r"^(\d{1,2})[-/.](\d{1,2})[-/.]\d{4}(?!\d)", r"[A-Za-z]{3}"


def take_time_stamps(frame: pandas.DataFrame, date_column: str, name: str, date_format: str | None = None) -> pandas.DataFrame:
    """Check the time stamps in the index and in `date_column`.

    Returns the table without these, and with the stamps as its index; if there are none, with row
    numbers as its index.

    Dates, periods, durations and numbers such as Unix seconds or milliseconds are accepted. Only
    their order and their distances are used. Text is read by these rules:

    - An interval such as a week, 2024-01-01/2024-01-07, is read as its beginning.
    - The year has four digits and comes first (2024-01-13) or last (13/01/2024), or the month is a
      word. All rows have the same form.
    - If the year comes last, the whole column determines whether the day or the month comes first:
      one of the numbers exceeds 12 in some row, or only one reading increases. If both readings are
      possible, 01.02.2024 begins with the day, and a column like 01/02/2024 is refused.
    - All stamps have a time zone or an offset, or none has. With offsets, instants are compared, so
      offsets may change.
    - `date_format` replaces these rules for text.
    - Dates in one column and times of day such as 18:00 in one other column are read together.
    - Without offsets, stamps are compared as they are. The hour that daylight saving time skips is
      a gap, and the hour that it repeats is refused.

    Args:
        frame: A table with one row per time step.
        date_column: Name of the column of time stamps. A missing column is accepted only if its
            name is "date" or that of the index; see `find_date_column`.
        name: Name of the file, for messages.
        date_format: Format of the text of stamps, such as "%d/%m/%Y %H:%M"; `None` to recognise it.

    Raises:
        RecipeError: For a stamp that is missing, cannot be read, or is not after the previous one;
            the message names file, column and row. For a MultiIndex, a missing `date_column`,
            another column of numbers whose name says that it is a time, and row numbers that do not
            increase.
    """
    if isinstance(frame.index, pandas.MultiIndex):
        raise RecipeError(
            f"{name} has an index of {frame.index.nlevels} levels, {list(frame.index.names)}; keep only the level of time stamps"
        )
    numbered = isinstance(frame.index, pandas.RangeIndex) and frame.index.step > 0
    column = find_date_column(frame, date_column, name, indexed=not numbered)
    in_index = not numbered and not (column is not None and pandas.api.types.is_integer_dtype(frame.index.dtype))
    stamps = None
    if in_index:
        stamps = _check(frame.index.to_series().reset_index(drop=True), f"the index of {name}", name, date_format)
    if column is not None:
        given, frame = frame[column].reset_index(drop=True), frame.drop(columns=column)
        clock = [other for other in frame.columns if _are_times_of_day(frame[other])] if _is_text(given) else []
        if len(clock) == 1 and not given.astype(str).str.contains(":").any():
            given = given.astype(str) + " " + frame[clock[0]].reset_index(drop=True).astype(str).str.replace(".", ":", regex=False)
            frame = frame.drop(columns=clock)
        stamps = _check(given, f"column {column!r} of {name}", name, date_format)
    elif date_column not in ("date", frame.index.name):
        raise RecipeError(f"{name} has no column {date_column!r}; it has {list(frame.columns)}")
    return _without_time(frame, name, stamped=stamps is not None).set_axis(pandas.RangeIndex(len(frame)) if stamps is None else stamps)


def find_date_column(frame: pandas.DataFrame, date_column: str, name: str, indexed: bool = False) -> str | None:
    """The column of time stamps: `date_column` or, if that is "date" and does not exist, the only
    column of dates.

    Args:
        indexed: Whether the index has time stamps; another column is then not looked for.

    Raises:
        RecipeError: If there are several columns of dates.
    """
    if date_column in frame.columns:
        return date_column
    if date_column != "date" or indexed:
        return None
    found = [column for column in frame.columns if _are_dates(frame[column])]
    # Because 18.01.05 may be a date or a time of day, such a column counts only if it is alone.
    found = [column for column in found if not _are_times_of_day(frame[column])] or found
    named = [column for column in found if re.fullmatch(TIME, re.sub(r"[\W_]", "", str(column)).casefold())]
    found = named if len(named) == 1 else found
    if len(found) > 1:
        raise RecipeError(f"{name} has several columns of dates, {found}; set data.date_column to one, and data.drop_columns to the others")
    return found[0] if found else None


def _is_text(values: pandas.Series) -> bool:
    return pandas.api.types.is_string_dtype(values.dtype) or values.dtype == object


def _are_dates(values: pandas.Series) -> bool:
    """Whether a column has dates; of text, only its first entries are read."""
    if not _is_text(values):
        return pandas.api.types.is_datetime64_any_dtype(values.dtype) or isinstance(values.dtype, pandas.PeriodDtype)
    text = values.dropna().iloc[:5].astype(str).str.strip()
    if text.str.contains(MONTH_NAME).all() and text.str.contains(r"\d").all():
        return len(text) > 0 and bool(pandas.to_datetime(text, format="mixed", errors="coerce", utc=True).notna().all())
    return len(text) > 0 and bool(text.str.contains(LIKE_A_DATE).all())


def _are_times_of_day(values: pandas.Series) -> bool:
    return _is_text(values) and bool(values.astype(str).str.fullmatch(r"\s*[0-2]?\d[:.][0-5]\d(?:[:.][0-5]\d(?:\.\d+)?)?\s*").all())


def _without_time(frame: pandas.DataFrame, name: str, stamped: bool) -> pandas.DataFrame:
    """The columns that are series.

    Columns of row numbers are removed with a warning. A column of numbers whose name says that it
    is a time raises a `RecipeError`."""
    for column in frame.columns:
        if not pandas.api.types.is_numeric_dtype(frame[column]):
            continue
        if re.fullmatch(TIME, re.sub(r"[\W_]", "", str(column)).casefold()):
            remedy = "remove it" if stamped else f"set data.date_column={column}"
            raise RecipeError(f"column {column!r} of {name} looks like time stamps; {remedy}, or rename the column if it is a series")
        if re.fullmatch(COUNTER, str(column).casefold()) and frame[column].is_unique and (frame[column] % 1 == 0).fillna(False).all():
            if not frame[column].is_monotonic_increasing:
                raise RecipeError(
                    f"column {column!r} of {name} looks like row numbers that do not increase; sort the rows and remove it, "
                    "or rename the column if it is a series"
                )
            warnings.warn(f"column {column!r} of {name} has row numbers and is not used; rename it if it is a series", stacklevel=4)
            frame = frame.drop(columns=column)
    return frame


def _check(values: pandas.Series, where: str, name: str, date_format: str | None) -> pandas.Series:
    """Read stamps; raise a `RecipeError` for one that is missing or not after the previous one, and
    warn of gaps.

    Windows include rows on both sides of a gap as if there were none.
    """
    missing = values.isna() | (values.astype(str).str.strip() == "")
    if missing.any():
        raise RecipeError(f"row {int(missing.to_numpy().argmax())} of {name} has no time stamp in {where}; add it, or remove the row")
    stamps = read_time_stamps(values, where, date_format)
    steps = _steps(stamps)
    backwards = np.flatnonzero(steps <= 0)
    if len(backwards) > 0:
        row = int(backwards[0]) + 1
        raise RecipeError(
            f"time stamps must increase, and row {row} of {name} does not come after the row before it: "
            f"{where} has {values[row - 1]} and then {values[row]}{_hint(stamps, steps)}"
        )
    gaps = np.flatnonzero(steps > 1.5 * np.median(steps)) + 1 if len(steps) > 0 else steps
    if len(gaps) > 0:
        places = f"{len(gaps)}, the first before row {gaps[0]}"
        warnings.warn(f"{name} has gaps in its time stamps ({places}); windows ignore the gaps", stacklevel=5)
    return stamps


def _hint(stamps: pandas.Series, steps: np.ndarray) -> str:
    """The end of the message for stamps that do not increase: the likely cause and what to do."""
    backwards = steps[steps <= 0]
    naive = stamps.dtype.kind == "M" and getattr(stamps.dtype, "tz", None) is None
    if naive and backwards.min() == 0 and (stamps == stamps.dt.normalize()).all():
        return "; if the time of day is in another column, write both in one column; otherwise keep one row for each time"
    # Because daylight saving time repeats an hour only once a year, we do not suggest it if many
    # steps go back: the file is then reversed or shuffled.
    if naive and backwards.min() >= -3600 and len(backwards) < 0.1 * len(steps):
        return "; if daylight saving time repeats an hour here, write the stamps in UTC or with their offsets"
    long = " (if rows of several series have the same time, set data.id_column)" if stamps.duplicated().any() else ""
    return f"; sort the rows by time, with one row for each time{long}"


def _steps(stamps: pandas.Series) -> np.ndarray:
    """Distances from each stamp to the next, in seconds or in the unit of the numbers."""
    steps = stamps.diff().iloc[1:]
    return (steps.dt.total_seconds() if steps.dtype.kind == "m" else steps.astype(float)).to_numpy()


def read_time_stamps(values: pandas.Series, where: str, date_format: str | None = None) -> pandas.Series:
    """Convert stamps to dates, durations or numbers by the rules of `take_time_stamps`.

    Raises:
        RecipeError: For a stamp that cannot be read; the message names `where`.
    """
    dtype = values.dtype
    if isinstance(dtype, pandas.PeriodDtype):
        return values.dt.start_time
    if pandas.api.types.is_bool_dtype(dtype):
        raise RecipeError(f"{where} has true and false, which are not time stamps; set data.date_column to another column")
    if date_format is not None and (_is_text(values) or pandas.api.types.is_integer_dtype(dtype)):
        return _read_by_format(values.astype(str).str.strip(), where, date_format)
    if pandas.api.types.is_numeric_dtype(dtype):
        return _read_numbers(values, where)
    if pandas.api.types.is_datetime64_any_dtype(dtype) or pandas.api.types.is_timedelta64_dtype(dtype):
        return values
    text = values.astype(str).str.strip()
    numbers = pandas.to_numeric(text, errors="coerce")
    return _read_text(text, where) if numbers.isna().any() else _read_numbers(numbers, where)


def _read_by_format(text: pandas.Series, where: str, date_format: str) -> pandas.Series:
    try:
        stamps = pandas.to_datetime(text, format=date_format, errors="coerce", utc=True if "%z" in date_format else None)
    except ValueError as error:
        raise RecipeError(f"data.date_format={date_format!r} is not a format of dates such as '%d/%m/%Y %H:%M': {error}") from error
    _refuse_first(stamps.isna().to_numpy(), text, where, f"does not have the format data.date_format={date_format!r}")
    return stamps


def _read_numbers(values: pandas.Series, where: str) -> pandas.Series:
    infinite = np.isinf(values.astype(float).to_numpy())
    if infinite.any():
        raise RecipeError(f"row {int(infinite.argmax())} has an infinite time stamp in {where}")
    if values.between(190001, 21001231235959).all() and (values % 1 == 0).all():
        text = values.astype(np.int64).astype(str)
        form = DIGITS.get(len(text.iloc[0])) if text.str.match("19|20|2100").all() else None
        dates = pandas.to_datetime(text, format=form, errors="coerce") if form and text.str.len().nunique() == 1 else None
        if dates is not None and dates.notna().all():
            return dates
    # Because differences of unsigned integers would wrap around, we convert these to signed
    # integers.
    return values.astype(np.int64) if values.dtype.kind == "u" else values


def _read_text(text: pandas.Series, where: str) -> pandas.Series:
    begin = text.str.extract(INTERVAL)[0]
    text = text if begin.isna().any() else begin.str.strip()
    forms = np.select([text.str.match(YEAR_FIRST), text.str.match(YEAR_LAST), text.str.contains(MONTH_NAME)], [1, 2, 3], 0)
    _refuse_first(
        forms == 0,
        text,
        where,
        "is not a date with a year of four digits, such as 2024-01-31 12:00:00+01:00; set data.date_format, such as '%d/%m/%y'",
    )
    _refuse_first(forms != forms[0], text, where, f"is not written like {text[0]!r} in row 0")
    with_offset = text.str.contains(OFFSET).to_numpy()
    _refuse_first(
        with_offset != with_offset[0],
        text,
        where,
        f"and {text[0]!r} in row 0 differ: one has an offset from UTC, the other has none; write it in all rows or in none",
    )
    day_first = forms[0] == 2 and _is_day_first(text, where)
    stamps = _parsed(text, day_first, bool(with_offset[0]), where)
    _refuse_first(
        stamps.isna().to_numpy(),
        text,
        where,
        "cannot be read as a date; write a date like 2024-01-31 12:00 and a time zone like +01:00",
    )
    return stamps


def _is_day_first(text: pandas.Series, where: str) -> bool:
    """Whether dates with the year last begin with the day; the whole column determines it."""
    first, second = (text.str.extract(YEAR_LAST).astype(int)[index].to_numpy() for index in (0, 1))
    first_is_day, second_is_day = (first > 12).any(), (second > 12).any()
    if first_is_day and second_is_day:
        later = second > 12 if (first > 12).argmax() < (second > 12).argmax() else first > 12
        _refuse_first(later, text, where, "has the day where other rows have the month")
    if first_is_day or second_is_day:
        return bool(first_is_day)
    offsets = bool(text.str.contains(OFFSET).iloc[0])
    readings = [_parsed(text, day_first, offsets, where) for day_first in (False, True)]
    increasing = [bool((_steps(reading) > 0).all()) for reading in readings]
    if increasing[0] == increasing[1] and not readings[0].equals(readings[1]):
        if text.str.contains(r"^\d+\.").all():
            # Because no language writes dates with points and the month first, this is decided.
            return True
        _refuse_first(
            first != second, text, where, "may begin with the day or with the month; set data.date_format, such as '%d/%m/%Y' or '%m/%d/%Y'"
        )
    return increasing[1]


def _parsed(text: pandas.Series, day_first: bool, with_offset: bool, where: str) -> pandas.Series:
    """The dates of a column of text; NaT for text that is not a date."""
    with warnings.catch_warnings():
        # Because a common format is many times faster than one for each row, we try it first.
        warnings.simplefilter("ignore", UserWarning)
        try:
            for form in (None, "mixed"):
                dates = pandas.to_datetime(text, format=form, dayfirst=day_first, utc=with_offset, errors="coerce")
                if dates.notna().all():
                    break
        except ValueError as error:
            # Offsets that do not come last, such as "GMT+0100 (CET)", end up here.
            raise RecipeError(f"{where} has several time zones ({text[0]!r} in row 0); write them as 2024-01-31 12:00+01:00") from error
    return dates


def _refuse_first(bad: np.ndarray, text: pandas.Series, where: str, problem: str) -> None:
    """Raise a `RecipeError` that names the first bad row, if there is one."""
    if bad.any():
        row = int(np.asarray(bad).argmax())
        raise RecipeError(f"row {row} of {where}: {text[row]!r} {problem}")
