"""Read, split and scale multivariate series for forecasting, and take windows as views of one
array."""

import math
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pandas
import torch
from torch.utils.data import Dataset

from modeling_uhop.series_frame import frequency_of, step_numbers

from ..errors import RecipeError
from .series_files import read_series


# From the mean of the training rows, in standard deviations. Sums of squares of larger values
# overflow in float32.
FARTHEST = 1e15


@dataclass
class SeriesData:
    """The data section of a forecasting recipe: where a multivariate series comes from and how it
    is split.

    Attributes:
        dataset: "synthetic" (generated from a seed), a CSV or parquet file, a folder of such files
            or a pattern such as "folder/*.csv", or a Hub id. A table has one row per time step and
            one column per series, or (see `id_column`) one row per series and time step. Files
            with the same columns whose times do not overlap, such as one for each year, are
            consecutive rows. Other files, such as one for each place, are joined on their time
            stamps.
        data_files: Names or patterns of the files to read, if a folder or the data set on the Hub
            has several, for instance "ETTh1.csv" or ["2023.csv", "2024.csv"].
        date_column: Column of time stamps. If there is no column "date", the only column of dates
            is used. This column and an index of time stamps are checked and then removed. Every
            other column is a series.
        date_format: Format of the text of the time stamps, for instance "%d/%m/%Y %H:%M"; `None` to
            recognise it.
        id_column: Column that names the series of each row, in a table with one row per series and
            time step. `None` means "unique_id", "item_id" or "series_id", if it has repeated names.
        value_column: Column of values of such a table; `None` means every other column.
        drop_columns: Names of columns that are not read.
        subset: Name of the subset (configuration) of a data set on the Hub that has several.
        split: Numbers of training, validation and test rows, or three fractions of all rows with
            the sum 1.
        validation_stride: During training, only every `validation_stride`-th validation window is
            evaluated. Test errors use every test window.
    """

    dataset: str
    data_files: str | list[str] | None = None
    date_column: str = "date"
    date_format: str | None = None
    id_column: str | None = None
    value_column: str | None = None
    drop_columns: list[str] = field(default_factory=list)
    subset: str | None = None
    split: list[float] = field(default_factory=lambda: [0.7, 0.1, 0.2])
    validation_stride: int = 1


class Windows(Dataset):
    """All windows of `context_length` steps and the `prediction_length` steps after them, at stride
    1.

    Windows are views of `values`, not copies.

    Args:
        values: (T, C).
        first, last: The rows [first, last) are predicted. The past of a window may begin before
            `first`.
        context_length, prediction_length: The lengths L of the past and H of the future.
        positions: (T,), the position of each row in a cycle, of which windows have that of their
            first row as `cycle_index`; `None` for windows without it.
    """

    def __init__(
        self,
        values: torch.Tensor,
        first: int,
        last: int,
        context_length: int,
        prediction_length: int,
        positions: torch.Tensor | None = None,
    ):
        self.values, self.first, self.positions = values, first, positions
        self.context_length, self.prediction_length = context_length, prediction_length
        self.count = last - first - prediction_length + 1
        if first < context_length:
            raise RecipeError(f"only {first} rows precede row {first}, fewer than context_length={context_length}; use a shorter context")
        if self.count < 1:
            raise RecipeError(
                f"{last - first} rows have no window of prediction_length={prediction_length}; use more rows or a shorter horizon"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"window {index} does not exist; the index must lie in [0, {self.count})")
        now = self.first + index
        start = now - self.context_length
        position = {} if self.positions is None else {"cycle_index": self.positions[start]}
        return {"past_values": self.values[start:now], "future_values": self.values[now : now + self.prediction_length], **position}


@dataclass
class Series:
    """A scaled series with its splits.

    Attributes:
        values: (T, C), standardised with the mean and standard deviation of the training rows.
        names: Names of the C series.
        mean, std: Mean and standard deviation (C,) of the training rows. If a series is constant
            there, its `std` is 1.
        rows: First row (included) and last row (excluded) of the splits "train", "validation" and
            "test".
        frequency: Distance of two rows, such as "h", as pandas names it; `None` if the time stamps
            are not dates or have no frequency.
        steps: (T,), the number of each row in steps of `frequency` (see `step_numbers`), or the number
            of the row if there is no frequency.
    """

    values: torch.Tensor
    names: list[str]
    mean: np.ndarray
    std: np.ndarray
    rows: dict[str, tuple[int, int]]
    frequency: str | None
    steps: torch.Tensor

    def windows(self, split: str, context_length: int, prediction_length: int, cycle_length: int | None = None) -> Windows:
        """The windows whose future lies in a split; for the training split, their past also lies in
        it.

        With a `cycle_length`, each window has its `cycle_index`.
        """
        first, last = self.rows[split]
        positions = None if cycle_length is None else self.steps % cycle_length
        return Windows(self.values, first + context_length if first == 0 else first, last, context_length, prediction_length, positions)


def load_series(data: SeriesData) -> Series:
    """Read, check, split and scale the series of a recipe.

    Raises:
        RecipeError: If the data set is missing, or its time stamps cannot be read or do not
            increase (see `read_series`). If the splits need more rows than there are, or a
            split has no value. If a column is not numbers, has an infinite value, has no value in
            the training rows, has training values too small for a standard deviation, or has a
            value farther than `FARTHEST` standard deviations from the training rows.
    """
    frame = synthetic_series().set_index("date") if data.dataset == "synthetic" else read_series(data)
    values = frame.to_numpy(dtype=np.float64)
    rows = split_rows(len(values), data.split)
    train = values[slice(*rows["train"])]
    for index, name in enumerate(frame.columns):
        if np.isinf(values[:, index]).any():
            raise RecipeError(
                f"column {name!r} of {data.dataset} is infinite in row {int(np.isinf(values[:, index]).argmax())}; correct the value"
            )
        if np.isnan(train[:, index]).all():
            raise RecipeError(
                f"column {name!r} of {data.dataset} has no value in the {len(train)} training rows, which scale it; remove it"
            )
    for split, (first, last) in rows.items():
        if np.isnan(values[first:last]).all():
            raise RecipeError(
                f"no series of {data.dataset} has a value in the {split} rows, {first} to {last - 1}; choose another data.split"
            )
    scaled, mean, std = _scaled(values, train)
    for index, name in enumerate(frame.columns):
        where = f"column {str(name)!r} of {data.dataset}"
        if std[index] < np.finfo(np.float64).tiny:
            raise RecipeError(f"{where} has values in the training rows that are too small for a standard deviation; use a larger unit")
        far = ~(np.abs(scaled[:, index]) <= FARTHEST) & ~np.isnan(values[:, index])
        if far.any():
            row = int(far.argmax())
            raise RecipeError(
                f"{where} has {values[row, index]:g} in row {row}, more than {FARTHEST:g} standard deviations from the training rows "
                f"(mean {mean[index]:g}, standard deviation {std[index]:g}); correct the value, or remove the column"
            )
        for split, (first, last) in rows.items():
            if _varies(values[first:last, index]) and not _varies(scaled[first:last, index]):
                warnings.warn(
                    f"{where} becomes constant in the {split} rows, {first} to {last - 1}: its variation there is too small for float32 "
                    f"after division by the standard deviation of the training rows, {std[index]:g}",
                    stacklevel=2,
                )
    frequency = frequency_of(frame.index) if isinstance(frame.index, pandas.DatetimeIndex) else None
    steps = np.arange(len(frame)) if frequency is None else step_numbers(frame.index, frequency)
    names = [str(name) for name in frame.columns]
    return Series(torch.from_numpy(scaled), names, mean, std, rows, frequency, torch.from_numpy(steps))


def unlabelled_windows(
    data: SeriesData,
    series: Series,
    lengths: tuple[int, int],
    dataset: str | None = None,
    split: str | None = None,
    cycle_length: int | None = None,
) -> Windows:
    """Load windows for the separation step: of another series with as many columns, or of a split.

    Args:
        data: The data section of the recipe, whose settings hold for the other data set too.
        series: The series of the recipe.
        lengths: Context length and prediction length.
        dataset: As `data.dataset`; `None` means that of the recipe.
        split: "train" (if `None`), "validation" or "test".
        cycle_length: As in `Series.windows`.

    Raises:
        RecipeError: If the number of columns differs, or the split is unknown; also as
            `load_series`.
    """
    other = series if dataset is None else load_series(replace(data, dataset=dataset))
    if len(other.names) != len(series.names):
        raise RecipeError(f"separation.dataset must have {len(series.names)} series, as data.dataset has, got {len(other.names)}")
    if split is not None and split not in other.rows:
        raise RecipeError(f"separation.split must be one of {[*other.rows]}, got {split!r}")
    return other.windows(split or "train", *lengths, cycle_length)


def _scaled(values: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardise values with the mean and standard deviation of the training rows.

    Returns the scaled values in float32, the mean and the standard deviation. Values that overflow
    are infinite or NaN."""
    constant = np.nanmax(train, 0) == np.nanmin(train, 0)
    # Because the squares of large values overflow, we first scale the training rows to [-1, 1] by
    # powers of two, which is exact.
    exponent = np.where(constant, 0, np.frexp(np.nanmax(np.abs(train), 0))[1])
    train = np.ldexp(train, -exponent)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.where(constant, np.nanmax(train, 0), np.nanmean(train, 0))
        std = np.where(constant, 1.0, np.nanstd(train, 0))
        scaled = ((np.ldexp(values, -exponent) - mean) / std).astype(np.float32)
    return scaled, np.ldexp(mean, exponent), np.ldexp(std, exponent)


def _varies(values: np.ndarray) -> bool:
    known = values[~np.isnan(values)]
    return len(known) > 0 and bool(known.max() > known.min())


def split_rows(count: int, split: list[float]) -> dict[str, tuple[int, int]]:
    """The rows of the training, validation and test splits, in this order.

    Args:
        count: Number of rows of the series.
        split: Three numbers of rows, or three fractions with the sum 1.
    """
    if len(split) != 3 or min(split) <= 0:
        raise RecipeError(f"data.split must be three positive numbers, got {split}")
    fractions = max(split) < 1
    if not (math.isclose(sum(split), 1.0, abs_tol=1e-6) if fractions else all(size == int(size) for size in split)):
        raise RecipeError(f"data.split must be three numbers of rows, or three fractions with the sum 1, got {split}")
    if fractions:
        test, train = int(count * split[2]), int(count * split[0])
        sizes = [train, count - train - test, test]
    else:
        sizes = [int(size) for size in split]
    ends = np.cumsum(sizes).tolist()
    if ends[-1] > count:
        raise RecipeError(f"data.split={split} needs {ends[-1]} rows, but there are {count}; use smaller numbers, or fractions")
    return dict(zip(("train", "validation", "test"), zip([0, *ends[:-1]], ends, strict=True), strict=True))


def synthetic_series(num_steps: int = 2400, num_series: int = 4, seed: int = 0) -> pandas.DataFrame:
    """Generate hourly series with a daily and a weekly cycle, a slow drift and autoregressive
    noise.

    Each series has its own phases; all share the drift.
    """
    random = np.random.default_rng(seed)
    hours = np.arange(num_steps)
    noise = np.zeros((num_steps, num_series))
    for step in range(1, num_steps):
        noise[step] = 0.8 * noise[step - 1] + 0.3 * random.standard_normal(num_series)
    drift = 0.03 * random.standard_normal(num_steps).cumsum()
    phases = random.uniform(0.0, 2.0 * np.pi, (2, num_series))
    daily = np.sin(2.0 * np.pi * hours[:, None] / 24.0 + phases[0])
    weekly = 0.5 * np.sin(2.0 * np.pi * hours[:, None] / 168.0 + phases[1])
    frame = pandas.DataFrame(daily + weekly + drift[:, None] + noise, columns=[f"series_{index}" for index in range(num_series)])
    frame.insert(0, "date", pandas.date_range("2024-01-01", periods=num_steps, freq="h"))
    return frame
