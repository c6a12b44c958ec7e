"""A table of series in the user's units: from its last rows to a window, and from a forecast to a table."""

import warnings
from typing import Any, NamedTuple

import torch


class FrameWindow(NamedTuple):
    """The last rows of a table as a window, and what its forecast needs to be a table again.

    Attributes:
        past: (1, L, C), the last L rows in float64, minus `mean` and divided by `std`.
        stamps: The H time stamps that follow, a pandas `DatetimeIndex`.
        names: Names of the C series.
        mean: (C,), the mean of each series.
        std: (C,), the standard deviation of each series.
        cycle_index: (1,), the position of the first row in the cycle of the model; `None` without a
            cycle.
    """

    past: torch.Tensor
    stamps: Any
    names: list[Any]
    mean: torch.Tensor
    std: torch.Tensor
    cycle_index: torch.Tensor | None

    @classmethod
    def of(cls, frame: Any, config: Any) -> "FrameWindow":
        """Read the last `context_length` rows of a DataFrame.

        The arguments and errors are those of `STanHopForPrediction.forecast`.
        """
        pandas = require_pandas()
        if not isinstance(frame, pandas.DataFrame):
            raise TypeError(f"forecast takes a pandas DataFrame, got {type(frame).__module__}.{type(frame).__name__}")
        frame = _stamped(frame, pandas)
        names = _names(frame, config)
        if len(frame) < config.context_length:
            raise ValueError(f"forecast needs at least context_length={config.context_length} rows, got {len(frame)}")
        rows = frame[names].iloc[-config.context_length :]
        stamps = _following(frame.index, config, pandas)
        for name in names:
            if not pandas.api.types.is_numeric_dtype(rows[name]):
                raise ValueError(f"columns must be numbers, but column {name!r} has dtype {rows[name].dtype}")
        mean = torch.tensor(config.mean or [0.0] * len(names), dtype=torch.float64)
        std = torch.tensor(config.std or [1.0] * len(names), dtype=torch.float64)
        values = torch.from_numpy(rows.to_numpy(dtype="float64", na_value=float("nan")).copy())
        cycle_index = None
        if config.cycle_length is not None:
            if config.frequency is None:
                raise ValueError(
                    "a model with a cycle needs config.frequency, by which the position of a row in the cycle is found, got None"
                )
            cycle_index = torch.from_numpy(step_numbers(rows.index[:1], config.frequency) % config.cycle_length)
        return cls(((values - mean) / std).unsqueeze(0), stamps, names, mean, std, cycle_index)

    def in_units(self, forecast: torch.Tensor) -> Any:
        """Convert a forecast (H, C) to a DataFrame in the user's units."""
        values = forecast.cpu().double() * self.std + self.mean
        return require_pandas().DataFrame(values.numpy(), index=self.stamps, columns=self.names)


def require_pandas() -> Any:
    """Import pandas, which only tables need."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas, which is not installed: pip install pandas") from error
    return pandas


def frequency_of(stamps: Any) -> str | None:
    """The frequency of time stamps that increase, such as "h", "15min" or "MS"; `None` if they have
    none.

    If stamps are missing, it is the most common distance, of which all distances must be multiples.

    Args:
        stamps: A pandas `DatetimeIndex`.
    """
    pandas = require_pandas()
    if len(stamps) < 3:
        return None
    offset = pandas.DatetimeIndex(stamps, freq="infer").freq
    if offset is not None:
        return offset.freqstr
    steps = stamps[1:] - stamps[:-1]
    step = steps.value_counts().index[0]
    if (steps % step != pandas.Timedelta(0)).any():
        return None
    return frequency_of(pandas.DatetimeIndex([stamps[0] + number * step for number in range(3)]))


def step_numbers(stamps: Any, frequency: str) -> Any:
    """The number of each time stamp, in steps of a frequency since 1970.

    With a cycle of W steps, the `cycle_index` of a window is the number of its first step modulo W.
    Because it does not depend on the table, the same time has the same position in training and in
    each forecast. Stamps with a time zone are counted in UTC.

    Args:
        stamps: A pandas `DatetimeIndex`.
        frequency: The frequency of pandas, such as "h"; one that periods of pandas have.

    Returns:
        An integer array.
    """
    pandas = require_pandas()
    with warnings.catch_warnings():
        # Periods of business days give a warning that pandas will remove them.
        warnings.simplefilter("ignore", FutureWarning)
        periods = pandas.date_range("2000-01-01", periods=1, freq=frequency).to_period()
        naive = stamps if stamps.tz is None else stamps.tz_convert(None)
        return naive.to_period(periods.freqstr).asi8 // periods.freq.n


def _stamped(frame: Any, pandas: Any) -> Any:
    """The table with its time stamps as the index."""
    if isinstance(frame.index, pandas.PeriodIndex):
        frame = frame.set_axis(frame.index.to_timestamp())
    elif not isinstance(frame.index, pandas.DatetimeIndex):
        dates = [name for name in frame.columns if name == "date" or pandas.api.types.is_datetime64_any_dtype(frame[name])]
        if len(dates) != 1:
            raise ValueError(
                "forecast needs time stamps: a DatetimeIndex, a column 'date' or one column of dates; "
                f"got a {type(frame.index).__name__} and the columns {list(frame.columns)}"
            )
        frame = frame.set_index(dates[0])
        try:
            frame.index = pandas.DatetimeIndex(frame.index)
        except (TypeError, ValueError) as error:
            raise ValueError(f"column {dates[0]!r} has entries that are not dates: {str(error).splitlines()[0]}") from error
    if frame.index.hasnans or not frame.index.is_monotonic_increasing or not frame.index.is_unique:
        raise ValueError("time stamps must be present and increase; sort the rows by time, with one row for each time")
    return frame


def _names(frame: Any, config: Any) -> list[Any]:
    """The columns of the series, in the order of the model."""
    given = list(frame.columns)
    if config.channel_names is None:
        if len(given) != config.num_input_channels:
            raise ValueError(
                f"the model has num_input_channels={config.num_input_channels} series without names (channel_names is None), and the table "
                f"has the {len(given)} columns {given}"
            )
        return given
    missing = [name for name in config.channel_names if name not in given]
    if missing:
        raise ValueError(f"the columns {missing} are missing; the model takes the columns {config.channel_names}, got {given}")
    if repeated := [name for name in config.channel_names if given.count(name) > 1]:
        raise ValueError(f"the table has several columns with the names {repeated}; keep one of each")
    return list(config.channel_names)


def _following(stamps: Any, config: Any, pandas: Any) -> Any:
    """The `prediction_length` time stamps after the last one; the last `context_length` must be one
    step apart."""
    last = stamps[-config.context_length :]
    frequency = config.frequency or frequency_of(last if len(last) > 2 else stamps)
    if frequency is None:
        raise ValueError(f"time stamps must have a frequency that pandas can infer, such as one row each hour, got {list(stamps[:4])}, ...")
    given, to_offset = frequency_of(last), pandas.tseries.frequencies.to_offset
    if given is not None and to_offset(given) != to_offset(frequency):
        raise ValueError(f"rows must be one step of {frequency!r} apart, as those that the model was trained on, got steps of {given!r}")
    expected = pandas.date_range(end=last[-1], periods=len(last), freq=frequency)
    if (missing := expected.difference(last)).size > 0:
        raise ValueError(
            f"the last {len(last)} rows must be one step of {frequency!r} apart, but {missing[0]} is missing; add the row, with NaN for "
            f"values that are not known (frame.asfreq({frequency!r}) does so)"
        )
    return pandas.date_range(last[-1], periods=config.prediction_length + 1, freq=frequency, name=stamps.name)[1:]
