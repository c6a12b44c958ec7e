"""Figures of single runs and of retrieval experiments. Colours and markers are those of
`styles`."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from ..intervals import over_seeds
from .styles import BASELINES, METHODS, OBSERVED, REFERENCE, THIS_RUN, dataset_name, legend_beside, save


def training_figure(
    path: Path,
    log_history: list[dict[str, Any]],
    separation_history: list[dict[str, float]],
    grams: dict[str, list[np.ndarray]],
) -> None:
    """Curves of task loss, separation loss and accuracy over a row of patch-feature Gram matrices.

    Args:
        path: PNG file to write.
        log_history: `trainer.state.log_history`.
        separation_history: `SeparationCallback.history`, empty without a separation step.
        grams: For each moment ("before", "after" Stage I), one cosine matrix (patches, patches) a
            layer.
    """
    figure = plt.figure(figsize=(11.5, 3.6 + (3.1 * len(grams) if grams else 0)), layout="constrained")
    parts = figure.subfigures(2 if grams else 1, 1, squeeze=False, height_ratios=(1.15, len(grams))[: 2 if grams else 1])[:, 0]
    separation, task, accuracy = parts[0].subplots(1, 3)
    for split, color, marker in (("train", OBSERVED, "o"), ("validation", THIS_RUN, "s")):
        name = f"{'training' if split == 'train' else split} images"
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 3, "linewidth": 1.3, "label": name}
        task.plot(*_series(log_history, f"eval_{split}_loss"), **style)
        accuracy.plot(*_series(log_history, f"eval_{split}_accuracy"), **style)
    task.set(title="Stage II: task loss", xlabel="training step", ylabel="cross-entropy (nats)", ylim=(0, None))
    accuracy.set(title="Stage II: accuracy", xlabel="training step", ylabel="share of images", ylim=(0, 1.02))
    accuracy.legend(loc="lower right")
    separation.set(title="Stage I: separation loss")
    if separation_history:
        losses = [entry["separation_loss"] for entry in separation_history]
        within_one_round = len({entry["step"] for entry in separation_history}) == 1
        steps = [entry["inner_step" if within_one_round else "step"] for entry in separation_history]
        separation.plot(steps, losses, color=THIS_RUN, linewidth=1.3)
        separation.set(xlabel="step of Stage I" if within_one_round else "training step", ylabel="loss (lower: further apart)")
    else:
        separation.text(0.5, 0.5, "no separation step", ha="center", transform=separation.transAxes)
    if grams:
        _gram_matrices(parts[1], grams)
    save(figure, path)


def _off_diagonal(gram: np.ndarray) -> float:
    return float(gram[~np.eye(len(gram), dtype=bool)].mean())


def _gram_matrices(figure: SubFigure, grams: dict[str, list[np.ndarray]]) -> None:
    """A row for each moment and a column for each layer; a single layer's moments stand side by
    side."""
    num_layers = len(next(iter(grams.values())))
    rows, columns = (len(grams), num_layers) if num_layers > 1 else (1, len(grams))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    titled = [(moment, layer, gram) for moment, matrices in grams.items() for layer, gram in enumerate(matrices, start=1)]
    for axis, (moment, layer, gram) in zip(axes.flat, titled, strict=True):
        picture = axis.imshow(gram, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.grid(False)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set(title=f"{moment} Stage I, layer {layer}: mean {_off_diagonal(gram):.2f}")
        axis.label_outer()
    for axis in axes[-1]:
        axis.set(xlabel="patch")
    for axis in axes[:, 0]:
        axis.set(ylabel="patch")
    figure.colorbar(picture, ax=axes, label="cosine of patch features")
    means = [np.mean([_off_diagonal(gram) for gram in matrices]) for matrices in grams.values()]
    figure.suptitle(
        "Cosines between the features of different patches, mean over layers: "
        + ", ".join(f"{mean:.2f} {moment} Stage I" for moment, mean in zip(grams, means, strict=True))
    )


def _series(log_history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


AXES = {
    "memory_size": ("number of memories M", "log"),
    "noise_level": ("noise (times the norm of a pattern)", "linear"),
    "beta": ("inverse temperature beta", "log"),
    "separation_steps": ("steps of Stage I", "symlog"),
    "separation_loss": ("separation loss", "linear"),
}
SIMPLEX = {1.0: "softmax (alpha 1)", 1.5: "1.5-entmax (alpha 1.5)", 2.0: "sparsemax (alpha 2)"}
# An error below this one is drawn at it.
LEAST_ERROR = 1e-6


def retrieval_figure(path: Path, experiment: str, rows: list[dict[str, Any]], dataset: str) -> None:
    """Retrieval error along the experiment's axis: a row of panels for each set of conditions, a
    column for each alpha.

    A panel has the five methods and, as a reference, the best of the baselines, which have softmax
    alone. Lines are means with 95 % confidence intervals over repeats; "separation_loss" is a
    scatter of single runs.

    Args:
        path: PNG file to write.
        experiment: Key of `AXES`.
        rows: Measurements {panel, model, alpha, value, repeat, error}.
        dataset: What the title names.
    """
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    alphas = sorted({row["alpha"] for row in rows})
    methods = [method for method in METHODS if any(row["model"] == method for row in rows)]
    size = (3.0 * len(alphas) + 2.2, 2.5 * len(panels) + 1.1)
    figure, axes = plt.subplots(
        len(panels), len(alphas), figsize=size, layout="constrained", squeeze=False, sharey="row", sharex=experiment != "separation_loss"
    )
    label, scale = AXES[experiment]
    for row_index, (panel, row_of_axes) in enumerate(zip(panels, axes, strict=True)):
        here = [row for row in rows if row["panel"] == panel]
        reference = _best_baseline(here)
        for alpha, axis in zip(alphas, row_of_axes, strict=True):
            axis.set(xscale=scale, yscale="log")
            for method in methods:
                mine = [row for row in here if row["model"] == method and row["alpha"] == alpha]
                if not mine:
                    continue
                if experiment == "separation_loss":
                    _scatter(axis, method, mine)
                else:
                    _mean_line(axis, mine, **METHODS[method].line(), label=method)
            if reference and experiment != "separation_loss":
                style = BASELINES["best baseline"].line()
                _mean_line(axis, reference, **{**style, "linestyle": "--"}, label="best baseline")
            if row_index == 0:
                axis.set_title(SIMPLEX.get(alpha, f"alpha {alpha:g}"), pad=18 if experiment == "separation_loss" else None)
        row_of_axes[0].set(ylabel=f"{panel.replace(': ', ':' + chr(10))}\nsum of squared\npixel errors")
    for axis in axes[-1]:
        axis.set(xlabel=label)
    legend_beside(figure, axes[0, 0])
    spread = "a point is one run" if experiment == "separation_loss" else "means with 95 % confidence intervals"
    axis_name = label.partition(" (")[0]
    figure.suptitle(f"Retrieval on {dataset_name(dataset)}: error by {axis_name}\n(lower is better; {spread})")
    save(figure, path)


def _best_baseline(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At each value the rows of the baseline whose mean error is lowest."""
    best = []
    baselines = [row for row in rows if row["model"] in BASELINES]
    for value in sorted({row["value"] for row in baselines}):
        groups = [[row for row in baselines if (row["value"], row["model"]) == (value, name)] for name in BASELINES]
        best += min((group for group in groups if group), key=lambda group: np.mean([row["error"] for row in group]))
    return best


def _mean_line(axis: Axes, rows: list[dict[str, Any]], **style: Any) -> None:
    values = sorted({row["value"] for row in rows})
    errors = [[row["error"] for row in rows if row["value"] == value] for value in values]
    means = np.array([np.mean(error) for error in errors])
    widths = np.array([over_seeds(error).half_width or 0.0 for error in errors])
    shown = np.maximum(means, LEAST_ERROR)
    bars = np.stack([shown - np.maximum(means - widths, LEAST_ERROR / 2).clip(max=shown), widths])
    axis.errorbar(values, shown, bars, capsize=2, elinewidth=0.8, **style)


def _scatter(axis: Axes, method: str, rows: list[dict[str, Any]]) -> None:
    style = METHODS[method]
    losses, errors = [row["value"] for row in rows], np.maximum([row["error"] for row in rows], LEAST_ERROR)
    axis.scatter(losses, errors, s=12, color=style.color, marker=style.marker, alpha=0.6, linewidths=0, label=method)
    # Rank correlations stand above the panel, one beside the other, so that they cover no point.
    place = 0.5 * len(axis.texts)
    text = f"rank corr. {spearmanr(losses, errors).statistic:.2f}"
    axis.text(place, 1.02, text, color=style.color, fontsize=9, transform=axis.transAxes)


def pictures_figure(path: Path, rows: dict[str, np.ndarray], title: str) -> None:
    """Rows of images with their titles, for example queries and what is retrieved from them.

    Args:
        path: PNG file to write.
        rows: Images (count, values) by the title of their row; square, values in [0, 1], of one channel or with three channels last.
        title: Title of the figure.
    """
    count, values = next(iter(rows.values())).shape
    channels = 1 if math.isqrt(values) ** 2 == values else 3
    side = math.isqrt(values // channels)
    figure, axes = plt.subplots(len(rows), count, figsize=(2.2 + 0.9 * count, 0.95 * len(rows) + 0.5), layout="constrained", squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.reshape(side, side, channels).clip(0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    save(figure, path)


def bag_figure(path: Path, pictures: np.ndarray | None, weights: np.ndarray, title: str, most: int = 16) -> None:
    """A bar for the weight of each instance of a bag, largest first, and its picture where
    instances are images.

    Args:
        path: PNG file to write.
        pictures: The instances as images (N, channels, height, width); `None` where they are
            vectors.
        weights: (N,).
        title: Of the picture.
        most: How many instances to show.
    """
    order = np.argsort(-weights, kind="stable")[:most]
    rows = 1 if pictures is None else 2
    figure = plt.figure(figsize=(max(6.0, 1.0 + 0.7 * len(order)), 3.4 if pictures is None else 3.8), layout="constrained")
    grid = figure.add_gridspec(rows, len(order), height_ratios=(1, 2)[-rows:])
    if pictures is not None:
        for column, index in enumerate(order):
            axis = figure.add_subplot(grid[0, column])
            axis.imshow(pictures[index].mean(0), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
    bars = figure.add_subplot(grid[-1, :])
    bars.bar(range(len(order)), weights[order], color=THIS_RUN)
    bars.axhline(1.0 / len(weights), color=OBSERVED, linestyle="--", linewidth=1, label=f"equal weights, 1/{len(weights)}")
    bars.legend(loc="upper right")
    counted = "" if len(order) == len(weights) else f"; the {len(order)} of {len(weights)} with most weight"
    shown = f"index of the instance in its bag{counted}"
    bars.set(xlim=(-0.5, len(order) - 0.5), ylabel="association weight", xlabel=shown, ylim=(0, None))
    bars.set_xticks(range(len(order)), [str(index) for index in order])
    bars.grid(axis="x", visible=False)
    figure.suptitle(title)
    save(figure, path)


def forecast_figure(
    path: Path,
    past: np.ndarray,
    future: np.ndarray,
    forecast: np.ndarray,
    memories: np.ndarray,
    names: list[str],
    dataset: str,
    most: int = 6,
) -> None:
    """A forecast beside the observed values and the stored windows most like the past, a panel for
    each series.

    The last series comes first, because files of this kind (ETT, WTH) have their target there. The
    past is cut to two horizons.

    Args:
        path: PNG file to write.
        past: (L, C).
        future, forecast: (H, C).
        memories: (k, steps, C), windows that end with the horizon.
        names: Of the series.
        dataset: Name of the data set.
        most: How many series to show.
    """
    order = [len(names) - 1, *range(len(names) - 1)][:most]
    rows, horizon = math.ceil(len(order) / 2), len(future)
    figure, axes = plt.subplots(rows, 2, figsize=(11.5, 2.3 * rows + 0.8), layout="constrained", sharex=True, squeeze=False)
    observed = np.concatenate([past, future])[-3 * horizon :]
    for axis in axes.flat[len(order) :]:
        axis.set_axis_off()
    for axis, index in zip(axes.flat, order, strict=False):
        for rank, memory in enumerate(memories[:, -3 * horizon :]):
            steps = np.arange(horizon - len(memory), horizon)
            axis.plot(steps, memory[:, index], color=REFERENCE, linewidth=1, label="retrieved windows" if rank == 0 else None)
        axis.plot(np.arange(horizon - len(observed), horizon), observed[:, index], color=OBSERVED, linewidth=1.1, label="observed")
        axis.plot(np.arange(horizon), forecast[:, index], color=THIS_RUN, linewidth=2, label="forecast")
        axis.axvline(0, color=OBSERVED, linestyle=":", linewidth=1)
        axis.set(title=f"{names[index]}{', the last column (the target)' if index == len(names) - 1 else ''}")
        axis.set(xlim=(horizon - len(observed), horizon - 1))
    for axis in axes[:, 0]:
        axis.set(ylabel="scaled value")
    for axis in [*axes.flat][max(0, len(order) - 2) : len(order)]:
        axis.set(xlabel="step (the forecast begins at 0)")
        axis.tick_params(labelbottom=True)
    legend_beside(figure, axes[0, 0])
    figure.suptitle(f"{dataset}: forecast of {horizon} steps. Values are scaled to mean 0 and standard deviation 1 on the training rows")
    save(figure, path)


def retrieval_weights_figure(path: Path, over_time: np.ndarray, over_series: np.ndarray, names: list[str]) -> None:
    """Association weights: which patches the patches of a series retrieve, and which series those
    of a position retrieve.

    Args:
        path: PNG file to write.
        over_time: (P, P), weights averaged over heads and series.
        over_series: (C, C), weights through the prototypes, averaged over heads and positions.
        names: Of the series.
    """
    # Because long names take the place of the panels, the figure grows with them.
    longest = max(map(len, names))
    figure, axes = plt.subplots(1, 2, figsize=(10.0 + 0.12 * longest, 4.4 + 0.13 * longest), layout="constrained")
    for axis, weights, title in zip(axes, (over_time, over_series), ("Over time", "Over series"), strict=True):
        picture = axis.imshow(weights, cmap="viridis", vmin=0.0)
        figure.colorbar(picture, ax=axis, label="association weight")
        axis.set(title=f"{title}: equal weights are {1 / weights.shape[1]:.3f}")
        axis.grid(False)
    axes[0].set(xlabel="retrieved patch", ylabel="retrieving patch")
    axes[1].set(xlabel="retrieved series", ylabel="retrieving series")
    axes[1].set_xticks(range(len(names)), names, rotation=90)
    axes[1].set_yticks(range(len(names)), names)
    figure.suptitle("Where the first layer retrieves from (each row adds up to 1)")
    save(figure, path)
