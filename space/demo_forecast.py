"""Forecasts of a series by a small STanHop model, the stored windows that it retrieves, and a baseline."""

import html
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from demo_digits import DemoError
from demo_drawing import GRID, INK, MUTED, WEIGHT, WITH, WITHOUT, bar, blank_figure, percent, plot_source
from demo_models import Report, train
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from modeling_uhop import SeparationCallback, STanHopConfig, STanHopForPrediction


CONTEXT, HORIZON = 96, 24
# Windows of the first rows are stored, those of the next rows are trained on, and those of the last rows are forecast.
STORED_SHARE, TRAINED_SHARE = 0.5, 0.8
LEAST_ROWS, MOST_ROWS, MOST_SERIES = 400, 5000, 6
MOST_STORED, MOST_EVALUATED = 400, 120
STEPS = 40
RETRIEVED = 3


@dataclass(frozen=True, eq=False)
class Table:
    """Series in their own units.

    Attributes:
        names: Names of the series, such as "temperature (°C)".
        values: (T, C); NaN where a value is missing.
        step: What one row is called: "hour", or "step" where the file does not say.
        season: Rows after which the series repeat themselves, at most `CONTEXT`.
        source: Where the series come from, and what was left out.
    """

    names: list[str]
    values: np.ndarray
    step: str
    season: int
    source: str


@lru_cache(maxsize=1)
def made_series(rows: int = 1500) -> Table:
    """Three hourly series with a daily and a weekly cycle, a slow drift and autoregressive noise. They are made from a seed."""
    random = np.random.default_rng(3)
    hours = np.arange(rows)
    noise = np.zeros((rows, 3))
    for row in range(1, rows):
        noise[row] = 0.85 * noise[row - 1] + 0.28 * random.standard_normal(3)
    day, week = 2.0 * np.pi * hours / 24.0, 2.0 * np.pi * hours / 168.0
    temperature = 12.0 + 5.0 * np.sin(day - 2.3) + 2.5 * np.sin(2.0 * np.pi * hours / 610.0) + 1.8 * noise[:, 0]
    load = 420.0 + 60.0 * np.sin(day - 1.9) + 25.0 * np.sin(2.0 * day - 0.4) + 35.0 * np.sin(week) - 3.0 * (temperature - 12.0)
    level = 1.9 + 0.25 * np.sin(2.0 * np.pi * hours / 24.0 + 1.0) + 0.12 * noise[:, 2] + 0.002 * random.standard_normal(rows).cumsum()
    values = np.column_stack([temperature, load + 9.0 * noise[:, 1], level])
    return Table(["temperature (°C)", "electricity load (MW)", "water level (m)"], values, "hour", 24, "hourly series made from a seed")


def read_table(path: str | Path) -> Table:
    """The series of a CSV file, a row for each time step. Columns of other kinds and constant columns are left out.

    Raises:
        DemoError: If the file is no CSV, has no series, too few rows, or an infinite value.
    """
    name = Path(path).name
    try:
        frame = pandas.read_csv(path)
    except (OSError, ValueError, pandas.errors.ParserError) as error:
        raise DemoError(
            f"“{name}” cannot be read as a CSV file. The first line must hold the names, and each other line a time step."
        ) from error
    numbers = frame.select_dtypes("number").iloc[-MOST_ROWS:]
    unnamed = [column for column in numbers.columns if str(column).startswith("Unnamed:")]
    varies = [column for column in numbers.columns.drop(unnamed) if numbers[column].nunique() > 1][:MOST_SERIES]
    if not varies:
        raise DemoError(f"“{name}” has no column of numbers that vary. Its columns are {', '.join(map(str, frame.columns[:8]))}.")
    if len(numbers) < LEAST_ROWS:
        raise DemoError(f"“{name}” has {len(numbers)} rows. A forecast needs at least {LEAST_ROWS}.")
    values = numbers[varies].to_numpy(dtype=float)
    if np.isinf(values).any():
        raise DemoError(
            f"“{name}” has an infinite value in column {varies[int(np.isinf(values).any(0).argmax())]}. Correct it, or leave it empty."
        )
    for series, column in enumerate(varies):
        for first, last in zip((0, *_ends(len(values))), (*_ends(len(values)), len(values)), strict=True):
            if np.isnan(values[first:last, series]).all():
                raise DemoError(
                    f"Column {column} of “{name}” has no value in rows {first + 1} to {last}. Fill it, or leave the column out."
                )
    left_out = len(frame.columns) - len(varies)
    source = f"{name}, the last {len(values)} of {len(frame)} rows" if len(frame) > len(values) else f"{name}, {len(values)} rows"
    return Table(
        [str(column) for column in varies],
        values,
        "step",
        _season(values[:, 0]),
        source + (f", {left_out} columns left out" if left_out else ""),
    )


def _ends(rows: int) -> tuple[int, int]:
    """Where the stored rows and the training rows end."""
    return int(STORED_SHARE * rows), int(TRAINED_SHARE * rows)


def _season(values: np.ndarray) -> int:
    """The lag in [2, CONTEXT] with the largest autocorrelation after the first dip below zero; 24 where there is none."""
    filled = pandas.Series(values).interpolate(limit_direction="both").to_numpy()
    differences = filled - filled.mean()
    lags = np.arange(1, CONTEXT + 1)
    correlation = np.array([differences[:-lag] @ differences[lag:] / (len(differences) - lag) for lag in lags])
    below = np.flatnonzero(correlation < 0)
    if len(below) == 0 or correlation[below[0] :].max() <= 0:
        return 24
    return int(lags[below[0] + correlation[below[0] :].argmax()])


@dataclass(frozen=True, eq=False)
class Forecaster:
    """A model that was trained on a table.

    Attributes:
        table: The series.
        model: With its stored windows.
        scaled: (T, C), the values that the model sees, scaled by the mean and standard deviation (C,) of the rows it learned from.
        stored: First row of each stored window.
    """

    table: Table
    model: STanHopForPrediction
    scaled: torch.Tensor
    mean: np.ndarray
    std: np.ndarray
    stored: np.ndarray

    @property
    def starts(self) -> range:
        """Rows at which a forecast of unseen values can begin."""
        return range(_ends(len(self.scaled))[1], len(self.scaled) - HORIZON + 1)

    def pasts(self, starts: Any) -> torch.Tensor:
        """The windows (B, CONTEXT, C) before these rows."""
        return torch.stack([self.scaled[start - CONTEXT : start] for start in starts])

    def in_units(self, scaled: torch.Tensor) -> np.ndarray:
        return scaled.double().numpy() * self.std + self.mean


def train_forecaster(table: Table, report: Report, steps: int = STEPS) -> Forecaster:
    """A small STanHop model: windows are stored, Phi is separated, and the model is trained on later windows, in a few seconds."""
    report(0.0, "Separation step on a small forecaster")
    half, end = _ends(len(table.values))
    learned = table.values[:end]
    mean, std = np.nanmean(learned, 0), np.nanstd(learned, 0)
    std = np.where(std > 0, std, 1.0)
    scaled = torch.from_numpy(((table.values - mean) / std).astype(np.float32))
    torch.manual_seed(0)
    config = STanHopConfig(
        num_input_channels=len(table.names),
        context_length=CONTEXT,
        prediction_length=HORIZON,
        patch_length=12,
        d_model=16,
        ffn_dim=32,
        num_prototypes=4,
        use_linear_skip=True,
        memory_type="tune",
        memory_alpha=1.5,
    )
    model = STanHopForPrediction(config)
    stride = max(1, (half - CONTEXT - HORIZON) // MOST_STORED + 1)
    stored = np.arange(0, half - CONTEXT - HORIZON + 1, stride)
    windows = scaled.unfold(0, CONTEXT + HORIZON, 1).transpose(1, 2)
    model.store(windows[stored, :CONTEXT], windows[stored, CONTEXT:])
    # The futures of training windows are not in stored windows, because a window that retrieves itself would see its own future.
    examples = [
        {"past_values": window[:CONTEXT], "future_values": window[CONTEXT:]}
        for window in windows[half - CONTEXT : end - CONTEXT - HORIZON + 1]
    ]
    separation = SeparationCallback(schedule="train_begin", steps=5, parameters="feature_maps", batch_size=16)
    arguments = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 6e-3, "label_names": ["future_values"]}
    train(model, examples, report, "Training a small forecaster on this series, once", [separation], arguments=arguments)
    return Forecaster(table, model, scaled, mean, std, stored)


@torch.no_grad()
def forecasts(forecaster: Forecaster, starts: Any) -> np.ndarray:
    """What the model expects after each of these rows, (B, HORIZON, C) in units."""
    return forecaster.in_units(forecaster.model(past_values=forecaster.pasts(starts)).prediction_outputs)


def repeated(forecaster: Forecaster, starts: Any, season: int) -> np.ndarray:
    """The baseline: the last season, repeated, (B, HORIZON, C) in units. The last value before a missing one replaces it.

    Raises:
        DemoError: For a season that the window does not hold.
    """
    if not 1 <= season <= CONTEXT:
        raise DemoError(f"A season must have 1 to {CONTEXT} steps, not {season}.")
    filled = pandas.DataFrame(forecaster.table.values).ffill().fillna(pandas.Series(forecaster.mean)).to_numpy()
    rows = np.arange(HORIZON) % season
    return np.stack([filled[start - season : start][rows] for start in starts])


def errors(forecaster: Forecaster, series: int, season: int) -> dict[str, float]:
    """Mean absolute error in units over windows of the last rows, of the model and of repetition; and how many windows these are."""
    starts = forecaster.starts[:: max(1, -(-len(forecaster.starts) // MOST_EVALUATED))]
    truth = np.stack([forecaster.table.values[start : start + HORIZON, series] for start in starts])
    answers = {"model": forecasts(forecaster, starts), "repeated": repeated(forecaster, starts, season)}
    return {"windows": len(starts), **{name: float(np.nanmean(np.abs(answer[..., series] - truth))) for name, answer in answers.items()}}


@dataclass(frozen=True, eq=False)
class Retrieved:
    """A stored window that a past retrieves.

    Attributes:
        weight: Its association weight.
        ago: How many rows before the forecast's start it ended.
        values: (CONTEXT + HORIZON,), the window and what followed, at the location and scale of the past, in units.
    """

    weight: float
    ago: int
    values: np.ndarray


@torch.no_grad()
def retrieved(forecaster: Forecaster, start: int, series: int, count: int = RETRIEVED) -> tuple[list[Retrieved], int]:
    """The stored windows with the largest weights, largest first; and how many have any."""
    model = forecaster.model.model
    window = model.scaled(forecaster.pasts([start]), None)
    weights = model.memory.weights(window.values)[series, 0]
    windows = torch.cat([model.memory.pasts[series], model.memory.futures[series]], -1)
    windows = windows * window.scale[0, 0, series] + window.loc[0, 0, series]
    found = [
        Retrieved(
            float(weights[best]),
            start - int(forecaster.stored[best]) - CONTEXT,
            windows[best].double().numpy() * forecaster.std[series] + forecaster.mean[series],
        )
        for best in weights.topk(min(count, len(weights))).indices.tolist()
        if weights[best] > 0
    ]
    return found, int((weights > 0).sum())


def unit_of(name: str) -> str:
    """The unit in the brackets at the end of a series' name; empty where there is none."""
    match = re.search(r"[(\[]([^)\]]*)[)\]]\s*$", name)
    return match[1] if match else ""


def start_of(forecaster: Forecaster, place: float) -> int:
    """The row at `place` in [0, 1] of those at which a forecast can begin."""
    starts = forecaster.starts
    return starts[round(min(max(place, 0.0), 1.0) * (len(starts) - 1))]


def view(forecaster: Forecaster, series: int, place: float, season: int) -> str:
    """The errors, the forecast, and the retrieved windows."""
    name, start = forecaster.table.names[series], start_of(forecaster, place)
    measured = errors(forecaster, series, season)
    unit = unit_of(name) or "in the units of the series"
    largest = max(measured["model"], measured["repeated"]) or 1.0
    lines = []
    for key, label, color in (("model", "STanHop", WITH), ("repeated", f"repeat the last {season}", WITHOUT)):
        written = f"{measured[key]:.3g}{' ' + unit_of(name) if unit_of(name) else ''}"
        lines.append(
            f'<div class="hop-row" data-error="{key}" data-value="{measured[key]:.6g}"><b>{html.escape(label)}</b>'
            f"{bar(measured[key] / largest, color, written)}</div>"
        )
    found, some = retrieved(forecaster, start, series)
    pasts = ", ".join(f"{percent(one.weight)} for the window {one.ago} {forecaster.table.step}s earlier" for one in found)
    step = forecaster.table.step
    return (
        f'<div class="hop-forecast" data-start="{start}" data-series="{html.escape(name)}"><h3>{html.escape(name)}</h3>'
        f"{_pictures(forecast_figure, f'Forecast of {name}', forecaster, series, start, season)}"
        f"<h4>Mean absolute error, {html.escape(unit)}, over {measured['windows']} windows that the model did not learn from</h4>"
        f'<div class="hop-errors">{"".join(lines)}</div>'
        f"<h4>The stored windows with the largest weights, and what followed them</h4>"
        f"{_pictures(retrieved_figure, f'Retrieved windows: {pasts}', forecaster, series, start, found)}"
        f'<p class="hop-small">{some} of {len(forecaster.stored)} stored windows have weight. Each is drawn at the level '
        f"and scale of the past. "
        f"The forecast begins at {step} {start} of {len(forecaster.scaled)}. Series: {html.escape(forecaster.table.source)}.</p></div>"
    )


def _pictures(draw: Any, alt: str, *arguments: Any) -> str:
    """A drawing for wide pages, and one for phones."""
    wide, narrow = (plot_source(draw(is_wide, *arguments)) for is_wide in (True, False))
    source = f'<source media="(max-width: 700px)" srcset="{narrow}">'
    return f'<picture>{source}<img class="hop-plot" src="{wide}" alt="{html.escape(alt)}"></picture>'


def forecast_figure(is_wide: bool, forecaster: Forecaster, series: int, start: int, season: int) -> Figure:
    """The past, what followed, the forecast, and the repeated season."""
    figure = blank_figure(*((7.4, 2.9) if is_wide else (3.4, 2.9)))
    axis = figure.subplots()
    values = forecaster.table.values[:, series]
    before, after = np.arange(-CONTEXT, 0), np.arange(HORIZON)
    axis.axvspan(-0.5, HORIZON - 0.5, color="#eef0fb", zorder=0)
    axis.plot(before, values[start - CONTEXT : start], color=INK, linewidth=1.3)
    axis.plot(after, values[start : start + HORIZON], color=INK, linewidth=1.3, linestyle=":", label="what followed")
    axis.plot(
        after, repeated(forecaster, [start], season)[0, :, series], color=WITHOUT, linewidth=1.3, linestyle="--", label="repeat the season"
    )
    axis.plot(after, forecasts(forecaster, [start])[0, :, series], color=WITH, linewidth=2.0, label="STanHop")
    _dress(axis, forecaster, series)
    axis.set_xlabel(f"{forecaster.table.step}s after the start of the forecast", color=INK, fontsize=9)
    axis.set_xlim(-CONTEXT, HORIZON - 0.5)
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside upper right",
        ncols=3,
        fontsize=8.5 if is_wide else 7,
        frameon=False,
        handlelength=1.6,
        columnspacing=1.0,
    )
    return figure


def retrieved_figure(is_wide: bool, forecaster: Forecaster, series: int, start: int, found: list[Retrieved]) -> Figure:
    """Each retrieved window over the past that retrieved it."""
    count = max(1, len(found))
    figure = blank_figure(*((7.4, 2.1) if is_wide else (3.4, 0.5 + 1.5 * count)))
    shape = (1, RETRIEVED) if is_wide else (count, 1)
    axes = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).ravel()
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    times = np.arange(-CONTEXT, HORIZON)
    for axis, one in zip(axes, found, strict=False):
        axis.axvspan(-0.5, HORIZON - 0.5, color="#eef0fb", zorder=0)
        axis.plot(times[:CONTEXT], forecaster.table.values[start - CONTEXT : start, series], color=INK, linewidth=0.9)
        axis.plot(times, one.values, color=WEIGHT, linewidth=1.4)
        axis.set_title(f"weight {percent(one.weight)}, {one.ago} {forecaster.table.step}s earlier", fontsize=8.5, color=INK)
        axis.set_xlim(-CONTEXT, HORIZON - 0.5)
        _dress(axis, forecaster, series)
        axis.label_outer()
    figure.supxlabel(f"{forecaster.table.step}s after the start of the forecast", color=INK, fontsize=9)
    return figure


def _dress(axis: Axes, forecaster: Forecaster, series: int) -> None:
    axis.set_ylabel(forecaster.table.names[series], color=INK, fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.4, 4.8, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(colors=MUTED, labelsize=8.5)
    axis.grid(color=GRID, linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
