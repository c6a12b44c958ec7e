"""Conformal prediction intervals of a forecaster: their coverage and width on windows of a split.

The errors on validation windows calibrate the intervals. Split conformal intervals weight all errors
equally. Hopfield intervals weight them by the association of the encoded windows, at the inverse
temperature that is best on validation windows at each level.
"""

from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate

from modeling_uhop.conformal import ConformalIntervals

from .data.series import Series


# In per cent.
LEVELS = (80, 95)
INTERVAL_KINDS = ("split", "hopfield")
BETAS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
# Half of the calibration windows must be enough for the highest level, which needs 19.
FEWEST_WINDOWS = 40


class Forecasts(NamedTuple):
    """Forecasts of N windows.

    Attributes:
        errors: (N, H, C), future minus forecast; NaN where the future was not observed.
        codes: (C, N, D), the encoder's states of each series, as a mean over patches.
    """

    errors: torch.Tensor
    codes: torch.Tensor

    def part(self, first: int, last: int) -> "Forecasts":
        """The windows [first, last)."""
        return Forecasts(self.errors[first:last], self.codes[:, first:last])


def interval_metrics(model: Any, series: Series, split: str, stride: int) -> dict[str, float]:
    """Coverage, mean width and mean interval score of both kinds of intervals, by names such as
    "split_coverage_80", "hopfield_width_95" and "hopfield_score_80"; and "hopfield_beta_80" and
    "hopfield_beta_95".

    Values are scaled. The interval score is the width plus the distance of a value outside of the
    interval, multiplied by 2 / (1 - level); lower is better (Gneiting and Raftery, 2007).

    Args:
        model: The forecaster.
        series: The series.
        split: The split of the windows, all of which are evaluated.
        stride: Every `stride`-th validation window calibrates the intervals.
    """
    past, new = forecasts(model, series, "validation", stride), forecasts(model, series, split, 1)
    metrics = {}
    for level in LEVELS:
        beta = best_beta(past, level / 100, -(-model.config.prediction_length // stride))
        metrics[f"hopfield_beta_{level}"] = beta
        for kind, chosen in zip(INTERVAL_KINDS, (None, beta), strict=True):
            found = measured(new.errors, half_widths(past, new, level / 100, chosen), level / 100)
            metrics |= {f"{kind}_{name}_{level}": value for name, value in found.items()}
    return metrics


def best_beta(past: Forecasts, level: float, gap: int) -> float:
    """The inverse temperature with the lowest interval score on the later half of the calibration
    windows, if the earlier half calibrates.

    Args:
        past: The calibration windows in the order of time.
        level: The level of the intervals.
        gap: Number of windows between the halves that are left out, because their futures overlap
            with both.
    """
    half = len(past.errors) // 2
    earlier, later = past.part(0, max(half - gap, 1)), past.part(half, len(past.errors))

    return min(BETAS, key=lambda beta: measured(later.errors, half_widths(earlier, later, level, beta), level)["score"])


def half_widths(past: Forecasts, new: Forecasts, level: float, beta: float | None) -> torch.Tensor:
    """Half of the width of the intervals, (N, H, C); with equal weights if beta is `None`, (1, H, C).

    Codes are standardised by those of the past windows."""
    if beta is None:
        return ConformalIntervals(past.errors).half_widths(level)
    mean, std = past.codes.mean(1, keepdim=True), past.codes.std(1, keepdim=True, unbiased=False).clamp(min=1e-6)
    own, others = ((each.codes - mean) / std for each in (past, new))
    return ConformalIntervals(past.errors, own, beta=beta).half_widths(level, others)


def measured(errors: torch.Tensor, half: torch.Tensor, level: float) -> dict[str, float]:
    """Coverage, mean width and mean interval score of intervals on observed values."""
    known = ~errors.isnan()
    outside = (errors.abs() - half).clamp(min=0.0)
    score = 2.0 * half + 2.0 / (1.0 - level) * outside
    values = {"coverage": outside == 0.0, "width": (2.0 * half).expand_as(errors), "score": score}
    return {name: each[known].double().mean().item() for name, each in values.items()}


@torch.no_grad()
def forecasts(model: Any, series: Series, split: str, stride: int) -> Forecasts:
    """Errors and codes of every `stride`-th window of a split."""
    config = model.config
    windows = series.windows(split, config.context_length, config.prediction_length, config.cycle_length)
    errors, codes = [], []
    chosen = range(0, len(windows), stride)
    for start in range(0, len(chosen), 256):
        batch = default_collate([windows[index] for index in chosen[start : start + 256]])
        future = batch.pop("future_values")
        outputs = model(**batch, output_hidden_states=True)
        errors.append(future - outputs.prediction_outputs)
        codes.append(outputs.hidden_states[-1].mean(2).transpose(0, 1))
    return Forecasts(torch.cat(errors), torch.cat(codes, 1))
