"""Multivariate series for forecasting: reading, splits, scaling, and windows that are views of one array."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path

# Before the others: it says what to install where they are absent.
from recipe import RecipeError, SeriesDataRecipe


# isort: split

import numpy as np
import pandas
import torch
from datasets import load_dataset
from time_stamps import take_time_stamps
from torch.utils.data import Dataset


# From the mean of the training rows, in standard deviations. Sums of squares of larger values overflow in float32.
FARTHEST = 1e15


class Windows(Dataset):
    """Every window of `context_length` steps and the `prediction_length` steps behind it, at stride 1, without a copy of any.

    Args:
        values: (T, C).
        first, last: Rows [first, last) that are predicted; the past of a window may begin before `first`.
        context_length, prediction_length: L and H.
    """

    def __init__(self, values: torch.Tensor, first: int, last: int, context_length: int, prediction_length: int):
        self.values, self.first = values, first
        self.context_length, self.prediction_length = context_length, prediction_length
        self.count = last - first - prediction_length + 1
        if first < context_length:
            raise RecipeError(f"the rows before row {first} are fewer than context_length={context_length}")
        if self.count < 1:
            raise RecipeError(f"{last - first} rows hold no window of prediction_length={prediction_length}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"there are {self.count} windows, and no window {index}")
        now = self.first + index
        return {
            "past_values": self.values[now - self.context_length : now],
            "future_values": self.values[now : now + self.prediction_length],
        }


@dataclass
class Series:
    """A scaled series with its splits.

    Attributes:
        values: (T, C), z-scored by the training rows.
        names: Names of the C series.
        mean, std: Of the training rows, (C,): what the values were scaled by. The std of a series that is constant there is 1.
        rows: First and last row (exclusive) of each split, "train", "validation" and "test".
    """

    values: torch.Tensor
    names: list[str]
    mean: np.ndarray
    std: np.ndarray
    rows: dict[str, tuple[int, int]]

    def windows(self, split: str, context_length: int, prediction_length: int) -> Windows:
        """Windows whose future lies in a split; in training the past does too."""
        first, last = self.rows[split]
        return Windows(self.values, first + context_length if first == 0 else first, last, context_length, prediction_length)


def load_series(data: SeriesDataRecipe) -> Series:
    """Read and scale a series.

    Raises:
        RecipeError: If the data set is missing, its time stamps cannot be read or do not increase (see `take_time_stamps`), a column is
            not numbers, infinite somewhere, missing from all training rows, too small there to have a standard deviation, or beyond
            `FARTHEST` somewhere, or the splits do not fit or hold no value.
    """
    frame = synthetic_series() if data.dataset == "synthetic" else _read(data)
    frame = take_time_stamps(frame, data.date_column, data.dataset)
    for name in frame.columns:
        if not pandas.api.types.is_numeric_dtype(frame[name]):
            row = int((frame[name].notna() & pandas.to_numeric(frame[name], errors="coerce").isna()).to_numpy().argmax())
            raise RecipeError(
                f"column {name!r} of {data.dataset} is not numbers; it has {str(frame[name].iloc[row])!r} in row {row}; "
                "if it has time stamps, set data.date_column; if it has numbers, write them with a decimal point; or leave it out"
            )
    values = frame.to_numpy(dtype=np.float64)
    rows = split_rows(len(values), data.split)
    train = values[slice(*rows["train"])]
    for index, name in enumerate(frame.columns):
        if np.isinf(values[:, index]).any():
            raise RecipeError(f"column {name!r} of {data.dataset} is infinite in row {int(np.isinf(values[:, index]).argmax())}")
        if np.isnan(train[:, index]).all():
            raise RecipeError(f"column {name!r} of {data.dataset} has no value in the {len(train)} training rows to be scaled by")
    for split, (first, last) in rows.items():
        if np.isnan(values[first:last]).all():
            raise RecipeError(f"no series of {data.dataset} has a value in the {split} rows, {first} to {last - 1}")
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
                f"(mean {mean[index]:g}, standard deviation {std[index]:g}); mend the value, or leave the column out"
            )
        for split, (first, last) in rows.items():
            if _varies(values[first:last, index]) and not _varies(scaled[first:last, index]):
                warnings.warn(
                    f"{where} varies in the {split} rows, {first} to {last - 1}, by less than float32 has beside its standard deviation "
                    f"of the training rows, {std[index]:g}, so that it is constant there",
                    stacklevel=2,
                )
    return Series(torch.from_numpy(scaled), [str(name) for name in frame.columns], mean, std, rows)


def _scaled(values: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values z-scored by the training rows, in float32, and the mean and standard deviation; infinite or nan where that overflows."""
    constant = np.nanmax(train, 0) == np.nanmin(train, 0)
    # Multiplied by powers of two, which round nothing, training rows lie in [-1, 1], whose squares do not overflow.
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
    """Rows of training, validation and test, one behind the other: numbers of rows, or fractions that are 1 together."""
    if len(split) != 3 or min(split) <= 0:
        raise RecipeError(f"split must be three positive numbers, got {split}")
    fractions = max(split) < 1
    if not (math.isclose(sum(split), 1.0, abs_tol=1e-6) if fractions else all(size == int(size) for size in split)):
        raise RecipeError(f"split must be three numbers of rows, or three fractions that are 1 together, got {split}")
    if fractions:
        test, train = int(count * split[2]), int(count * split[0])
        sizes = [train, count - train - test, test]
    else:
        sizes = [int(size) for size in split]
    ends = np.cumsum(sizes).tolist()
    if ends[-1] > count:
        raise RecipeError(f"split {split} needs {ends[-1]} rows, and there are {count}")
    return dict(zip(("train", "validation", "test"), zip([0, *ends[:-1]], ends, strict=True), strict=True))


def _read(data: SeriesDataRecipe) -> pandas.DataFrame:
    path = Path(data.dataset).expanduser()
    if path.suffix == ".csv" and path.is_file():
        return _indexed(pandas.read_csv(path))
    if path.suffix == ".parquet" and path.is_file():
        return pandas.read_parquet(path)
    if data.dataset.startswith((".", "/", "~")) or path.suffix in (".csv", ".parquet"):
        raise RecipeError(f"there is no file {data.dataset}")
    if "/" not in data.dataset:
        raise RecipeError(f"{data.dataset} is to be given as a CSV or parquet file, or as the id of a data set on the Hub: --dataset FILE")
    splits = load_dataset(data.dataset, data_files=data.data_files)
    if len(splits) > 1:
        raise RecipeError(f"{data.dataset} has the splits {', '.join(splits)}, which are one series only together; set data.data_files")
    (rows,) = splits.values()
    return _indexed(rows.to_pandas())


def _indexed(frame: pandas.DataFrame) -> pandas.DataFrame:
    """A table whose first column is an index that pandas wrote without a name, with that index."""
    for column in ("Unnamed: 0", "__index_level_0__"):
        if column in frame.columns:
            return frame.set_index(column).rename_axis(None)
    return frame


def synthetic_series(num_steps: int = 2400, num_series: int = 4, seed: int = 0) -> pandas.DataFrame:
    """Hourly series with a daily and a weekly cycle of their own phases, a common slow drift, and autoregressive noise."""
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
