"""Baseline forecasters: repetition, linear maps, and a Hopfield memory without training."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear, normalize
from torch.utils.data import default_collate

from modeling_uhop import simplex_map

from ..data.series import Series


# A function from windows (B, L, C), and their `cycle_index` (B,) if it has a cycle, to forecasts
# (B, H, C).
Forecaster = Callable[..., torch.Tensor]


class Fitted(NamedTuple):
    """A forecaster and the windows that it takes.

    Attributes:
        forecaster: The function.
        context_length: Length L of its windows.
        cycle_length: Length of its cycle; `None` for a forecaster without a cycle.
    """

    forecaster: Forecaster
    context_length: int
    cycle_length: int | None = None

    @torch.no_grad()
    def forecasts(self, series: Series, split: str, prediction_length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Forecasts and futures (B, H, C) of every window of a split, in batches of at most 256
        windows."""
        windows = series.windows(split, self.context_length, prediction_length, self.cycle_length)
        for start in range(0, len(windows), 256):
            batch = default_collate([windows[index] for index in range(start, min(start + 256, len(windows)))])
            future = batch.pop("future_values")
            yield self.forecaster(batch.pop("past_values"), **batch), future

    def errors(self, series: Series, split: str, prediction_length: int) -> dict[str, float]:
        """See `mean_errors`."""
        return mean_errors(self.forecasts(series, split, prediction_length))


def errors_of(forecaster: Forecaster, series: Series, split: str, context_length: int, prediction_length: int) -> dict[str, float]:
    """The errors of a forecaster without a cycle over every window of a split; see `mean_errors`."""
    return Fitted(forecaster, context_length).errors(series, split, prediction_length)


def mean_errors(forecasts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Mean squared error and mean absolute error of batches of forecasts and futures, on scaled
    values.

    Missing future values are ignored.
    """
    totals = np.zeros(3)
    for forecast, future in forecasts:
        errors = (forecast - future)[~future.isnan()].double()
        totals += [errors.square().sum().item(), errors.abs().sum().item(), errors.numel()]
    return {"mse": float(totals[0] / totals[2]), "mae": float(totals[1] / totals[2])}


def forward_filled(values: torch.Tensor) -> torch.Tensor:
    """Replace each missing value of (..., T, C) with the last known value before it.

    Without an earlier value, it is replaced with 0, which is the mean of the training rows.
    """
    steps = torch.arange(values.shape[-2]).unsqueeze(-1)
    last = torch.where(values.isnan(), -1, steps).cummax(-2).values
    return torch.where(last < 0, 0.0, values.gather(-2, last.clamp(min=0)))


def repeat_last(prediction_length: int) -> Forecaster:
    """A baseline that repeats the last value."""
    return lambda past: forward_filled(past)[:, -1:].expand(-1, prediction_length, -1)


def repeat_season(prediction_length: int, season: int) -> Forecaster:
    """A baseline that repeats the last `season` steps."""
    return lambda past: forward_filled(past)[:, -season:].repeat(1, -(-prediction_length // season), 1)[:, :prediction_length]


class LinearMap:
    """A linear map from the past to the future that all series share; `weight` is (H, L) and `bias`
    (H,).

    This is the function class of DLinear. With `last_value`, the map is applied to differences from
    the last value: the function class of NLinear."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, last_value: bool):
        self.weight, self.bias, self.last_value = weight, bias, last_value

    def __call__(self, past: torch.Tensor) -> torch.Tensor:
        past = forward_filled(past)
        offset = past[:, -1:] if self.last_value else torch.zeros_like(past[:, -1:])
        return linear((past - offset).mT, self.weight, self.bias).mT + offset


def linear_map(series: Series, context_length: int, prediction_length: int, *, last_value: bool) -> LinearMap:
    """Fit a linear map by ridge regression on all training windows; the penalty has the lowest
    validation MSE."""
    first, last = series.rows["train"]
    size = context_length + 1
    gram, target = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, prediction_length, dtype=torch.float64)
    span = context_length + prediction_length
    count = 0
    known = forward_filled(series.values[first:last]).double()
    for channel in range(series.values.shape[1]):
        for rows in known[:, channel].unfold(0, span, 1).split(2048):
            past, future = rows[:, :context_length], rows[:, context_length:]
            if last_value:
                past, future = past - rows[:, context_length - 1 : context_length], future - rows[:, context_length - 1 : context_length]
            past = torch.cat([past, torch.ones(len(past), 1, dtype=torch.float64)], 1)
            gram += past.T @ past
            target += past.T @ future
            count += len(rows)

    def solution(penalty: float) -> LinearMap:
        ridge = penalty * count * torch.eye(size, dtype=torch.float64)
        ridge[-1, -1] = 0.0
        weights = torch.linalg.solve(gram + ridge, target).float()
        return LinearMap(weights[:-1].T, weights[-1], last_value=last_value)

    candidates = [solution(penalty) for penalty in (1e-4, 1e-3, 1e-2, 1e-1)]
    return min(candidates, key=lambda candidate: errors_of(candidate, series, "validation", context_length, prediction_length)["mse"])


def mean_cycle(series: Series, cycle_length: int) -> torch.Tensor:
    """The mean (cycle_length, C) of the training rows at each position in the cycle; 0 at a position
    without a value."""
    first, last = series.rows["train"]
    positions, values = series.steps[first:last] % cycle_length, series.values[first:last].double()
    sums, counts = (
        torch.zeros(cycle_length, values.shape[1], dtype=torch.float64).index_add_(0, positions, each)
        for each in (values.nan_to_num(0.0), (~values.isnan()).double())
    )
    return (sums / counts.clamp(min=1)).float()


class CycleMap:
    """A linear map of what remains of the past without a cycle (cycle_length, C), which is added to
    the forecast.

    This is the function class of CycleNet with a linear backbone (arXiv 2409.18479)."""

    def __init__(self, cycle: torch.Tensor, remainder: LinearMap):
        self.cycle, self.remainder = cycle, remainder

    def __call__(self, past: torch.Tensor, cycle_index: torch.Tensor) -> torch.Tensor:
        horizon, length = self.remainder.weight.shape
        cycle = self.cycle[(cycle_index.unsqueeze(1) + torch.arange(length + horizon)) % len(self.cycle)]
        return self.remainder(past - cycle[:, :length]) + cycle[:, length:]


def cycle_map(series: Series, context_length: int, prediction_length: int, cycle_length: int, *, last_value: bool) -> CycleMap:
    """The mean cycle of the training rows, and the linear map (see `linear_map`) of what remains."""
    cycle = mean_cycle(series, cycle_length)
    remainder = replace(series, values=series.values - cycle[series.steps % cycle_length])
    return CycleMap(cycle, linear_map(remainder, context_length, prediction_length, last_value=last_value))


class WindowMemory:
    """A baseline without training: a Hopfield memory that retrieves similar past windows and
    forecasts their futures.

    Every `stride`-th training window of each series is stored, after its mean is subtracted and it
    is divided by its scale. A query retrieves from the windows of its own series by cosine
    similarity, and the retrieved future is scaled back. Because the scale of a constant window
    would be 0, 0.1 is added to every variance."""

    def __init__(
        self, series: Series, context_length: int, prediction_length: int, *, beta: float = 12.0, alpha: float = 1.0, stride: int = 2
    ):
        first, last = series.rows["train"]
        windows = forward_filled(series.values[first:last]).unfold(0, context_length + prediction_length, stride)
        self.beta, self.alpha = beta, alpha
        past, future = windows[..., :context_length], windows[..., context_length:]
        loc, scale = _loc_and_scale(past)
        self.pasts = ((past - loc) / scale).transpose(0, 1)
        self.keys = normalize(self.pasts, dim=-1)
        self.futures = ((future - loc) / scale).transpose(0, 1)

    def __call__(self, past: torch.Tensor) -> torch.Tensor:
        weights, loc, scale = self.weights(past)
        return (weights @ self.futures * scale + loc).permute(1, 2, 0)

    def weights(self, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Association weights (C, B, M) of windows (B, L, C), and the means and scales (C, B, 1) of
        the windows."""
        series = forward_filled(past).permute(2, 0, 1)
        loc, scale = _loc_and_scale(series)
        similarity = normalize((series - loc) / scale, dim=-1) @ self.keys.mT
        return simplex_map(self.beta * similarity, self.alpha), loc, scale

    def closest(self, past: torch.Tensor, count: int = 3) -> torch.Tensor:
        """The stored windows (count, L + H, C) with the largest weights, at the mean and scale of
        one window (L, C)."""
        weights, loc, scale = self.weights(past.unsqueeze(0))
        best = weights[:, 0].topk(count).indices
        series = torch.arange(len(best)).unsqueeze(1)
        windows = torch.cat([self.pasts[series, best], self.futures[series, best]], -1)
        return (windows * scale + loc).permute(1, 2, 0)


def _loc_and_scale(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values.mean(-1, keepdim=True), (values.var(-1, keepdim=True, unbiased=False) + 0.1).sqrt()


def fit_baselines(
    series: Series, prediction_length: int, season: int, context_lengths: list[int], cycle_length: int | None = None
) -> dict[str, Fitted]:
    """Every baseline by name; an empty mapping if `context_lengths` is empty.

    With a `cycle_length`, there are also linear maps after the mean cycle is subtracted. The beta of
    the memory is the one with the lowest MSE on validation windows.
    """
    if not context_lengths:
        return {}
    longest, shortest = max(context_lengths), min(context_lengths)
    fitted = {
        "repeat last": Fitted(repeat_last(prediction_length), longest),
        f"repeat last {season}": Fitted(repeat_season(prediction_length, season), max(longest, season)),
    }
    for length in context_lengths:
        for name, last_value in (("linear", False), ("normalised linear", True)):
            fitted[f"{name}, {length}"] = Fitted(linear_map(series, length, prediction_length, last_value=last_value), length)
            if cycle_length is not None:
                after_cycle = cycle_map(series, length, prediction_length, cycle_length, last_value=last_value)
                fitted[f"{name} after a cycle of {cycle_length}, {length}"] = Fitted(after_cycle, length, cycle_length)
    memory = WindowMemory(series, shortest, prediction_length)

    def validation_mse(beta: float) -> float:
        memory.beta = beta
        return errors_of(memory, series, "validation", shortest, prediction_length)["mse"]

    memory.beta = min((8.0, 12.0, 16.0, 24.0), key=validation_mse)
    return {**fitted, f"memory of windows, {shortest}": Fitted(memory, shortest)}


def baselines(
    series: Series, prediction_length: int, season: int, context_lengths: list[int], split: str = "test"
) -> dict[str, dict[str, float]]:
    """Errors of every baseline on a split; see `fit_baselines`."""
    fitted = fit_baselines(series, prediction_length, season, context_lengths)
    return {name: with_split(split, each.errors(series, split, prediction_length)) for name, each in fitted.items()}


def with_split(split: str, errors: dict[str, float]) -> dict[str, float]:
    """Errors by names such as "test_mse"."""
    return {f"{split}_{name}": error for name, error in errors.items()}
