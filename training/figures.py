"""Pictures of a run."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from scipy.stats import t as student_t


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import SubFigure


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
        grams: For each moment ("before", "after" Stage I), one cosine matrix (patches, patches) a layer.
    """
    figure = plt.figure(figsize=(12, 3.2 + (3.4 * len(grams) if grams else 0)), layout="constrained")
    parts = figure.subfigures(2 if grams else 1, 1, squeeze=False, height_ratios=(1, len(grams))[: 2 if grams else 1])[:, 0]
    task, separation, accuracy = parts[0].subplots(1, 3)
    task.plot(*_series(log_history, "loss"), color="grey", label="while training")
    for color, split in (("C0", "train"), ("C1", "validation")):
        task.plot(*_series(log_history, f"eval_{split}_loss"), marker=".", color=color, label=split)
        accuracy.plot(*_series(log_history, f"eval_{split}_accuracy"), marker=".", color=color, label=split)
    task.set(title="Task loss", xlabel="step", ylim=(0, None))
    task.legend()
    accuracy.set(title="Accuracy", xlabel="step", ylim=(0, 1))
    separation.set(title="Separation loss (Stage I)")
    if separation_history:
        losses = [entry["separation_loss"] for entry in separation_history]
        within_one_round = len({entry["step"] for entry in separation_history}) == 1
        steps = [entry["inner_step" if within_one_round else "step"] for entry in separation_history]
        separation.plot(steps, losses, marker=".", color="C2")
        separation.set(xlabel="step of Stage I" if within_one_round else "step")
    else:
        separation.text(0.5, 0.5, "no separation step", ha="center", transform=separation.transAxes)
    if grams:
        _gram_matrices(parts[1], grams)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _gram_matrices(figure: SubFigure, grams: dict[str, list[np.ndarray]]) -> None:
    """A row for each moment and a column for each layer; a single layer's moments stand side by side."""
    num_layers = len(next(iter(grams.values())))
    rows, columns = (len(grams), num_layers) if num_layers > 1 else (1, len(grams))
    axes = figure.subplots(rows, columns, squeeze=False)
    titled = [(moment, layer, gram) for moment, matrices in grams.items() for layer, gram in enumerate(matrices, start=1)]
    for axis, (moment, layer, gram) in zip(axes.flat, titled, strict=True):
        picture = axis.imshow(gram, vmin=-1, vmax=1, cmap="RdBu_r")
        off_diagonal = gram[~np.eye(len(gram), dtype=bool)]
        axis.set(title=f"{moment} Stage I, layer {layer}: mean {off_diagonal.mean():.2f}", xlabel="patch", ylabel="patch")
    figure.colorbar(picture, ax=axes, label="cosine of patch features")


def _series(log_history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def curves_figure(path: Path, gathered: dict[str, Any]) -> None:
    """Loss and accuracy by epoch, a line for each variant: the mean over seeds, and a band from the lowest to the highest.

    Args:
        path: PNG file to write.
        gathered: Results of `sweep.gather` whose sweep has `curves`.
    """
    keys = gathered["sweep"]["curves"]
    figure, axes = plt.subplots(1, len(keys), figsize=(4.4 * len(keys), 4.2), layout="constrained", squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=True):
        # Past the last colour the colours come again, in other strokes.
        axis.set_prop_cycle(cycler(linestyle=["-", "--"]) * plt.rcParams["axes.prop_cycle"])
        for name, variant in gathered["variants"].items():
            epochs, values = variant["curves"][key]["epoch"], np.array(variant["curves"][key]["values"])
            (line,) = axis.plot(epochs, values.mean(0), marker=".", label=name)
            axis.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
        axis.set(title=key.removeprefix("eval_").replace("_", " "), xlabel="epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def samples_figure(path: Path, gathered: list[dict[str, Any]]) -> None:
    """Accuracies by the number of training images, a line for each variant, with 95 % intervals over seeds.

    Args:
        path: PNG file to write.
        gathered: Results of `sweep.gather` of one recipe, of variants "NAME" at its `max_train_samples`, or "COUNT images: NAME".
    """
    points: list[tuple[str, Any, dict[str, Any]]] = [
        (name.rpartition(": ")[2], int(name.partition(" images")[0].replace(",", "")) if ": " in name else default, variant["metrics"])
        for result in gathered
        for default in [None if result.get("sweep", {}).get("suffix") else result["recipe"]["data"]["max_train_samples"]]
        for name, variant in result["variants"].items()
        if default is not None or ": " in name
    ]
    counts: dict[str, set[int]] = {}
    for name, count, _ in points:
        counts.setdefault(name, set()).add(count)
    sizes = sorted(set().union(*counts.values()))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, metric in zip(axes, ("max_train_accuracy", "test_accuracy"), strict=True):
        for name in [name for name, seen in counts.items() if len(seen) > 1]:
            own = sorted(((count, metrics[metric]) for label, count, metrics in points if label == name), key=lambda point: point[0])
            half_widths = [student_t.ppf(0.975, len(m["values"]) - 1) * m["std"] / len(m["values"]) ** 0.5 for _, m in own]
            axis.errorbar([count for count, _ in own], [m["mean"] for _, m in own], half_widths, marker=".", capsize=3, label=name)
        axis.set(title=metric.replace("_", " "), xlabel="training images", xscale="log")
        axis.set_xticks(sizes, [f"{count:,}" for count in sizes])
        axis.minorticks_off()
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)


AXES = {
    "memory_size": ("number of memories M", "log"),
    "noise_level": ("noise, times the pattern's norm", "linear"),
    "beta": ("inverse temperature beta", "log"),
    "separation_steps": ("steps of Stage I", "symlog"),
    "separation_loss": ("separation loss", "linear"),
}


def retrieval_figure(path: Path, experiment: str, rows: list[dict[str, Any]], dataset: str) -> None:
    """Retrieval error along the experiment's axis, a panel for each set of conditions: means with 95 % intervals, or points.

    Args:
        path: PNG file to write.
        experiment: Key of `AXES`.
        rows: Measurements {panel, model, value, repeat, error}.
        dataset: What the title names.
    """
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    columns = min(len(panels), 2)
    rows_of_panels = math.ceil(len(panels) / columns)
    size = (1.5 + 5.5 * columns, 4.6 * rows_of_panels)
    figure, axes = plt.subplots(rows_of_panels, columns, figsize=size, layout="constrained", squeeze=False)
    label, scale = AXES[experiment]
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for axis, panel in zip(axes.flat, panels, strict=False):
        for model, color in zip(models, colors, strict=False):
            mine = [row for row in rows if row["panel"] == panel and row["model"] == model]
            if experiment == "separation_loss":
                axis.scatter([row["value"] for row in mine], [row["error"] for row in mine], s=8, color=color, label=model)
                continue
            values = sorted({row["value"] for row in mine})
            errors = [np.array([row["error"] for row in mine if row["value"] == value]) for value in values]
            means = [error.mean() for error in errors]
            half_widths = [
                student_t.ppf(0.975, len(error) - 1) * error.std(ddof=1) / len(error) ** 0.5 if len(error) > 1 else 0.0 for error in errors
            ]
            style = "--" if "Phi" not in model and "U-Hop" not in model and model != "denoising" else "-"
            axis.errorbar(values, means, half_widths, marker=".", capsize=2, color=color, linestyle=style, label=model)
        axis.set(title=panel, xlabel=label, ylabel="sum of squared pixel errors", xscale=scale, yscale="log")
        # Below a millionth nothing can be seen in a picture.
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, min(1e-6, 0.1 * high)), high)
    axes[0, -1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize="small")
    figure.suptitle(f"Retrieval on {Path(dataset).name}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bag_figure(path: Path, pictures: np.ndarray | None, weights: np.ndarray, title: str, most: int = 16) -> None:
    """A bar for the weight of each instance of a bag, largest first, and its picture where instances are images.

    Args:
        path: PNG file to write.
        pictures: The instances as images (N, channels, height, width); `None` where they are vectors.
        weights: (N,).
        title: Of the picture.
        most: How many instances to show.
    """
    order = np.argsort(-weights, kind="stable")[:most]
    rows = 1 if pictures is None else 2
    figure = plt.figure(figsize=(max(5.0, 1.0 + 0.7 * len(order)), 3.0 if pictures is None else 3.4), layout="constrained")
    grid = figure.add_gridspec(rows, len(order), height_ratios=(1, 2)[-rows:])
    if pictures is not None:
        for column, index in enumerate(order):
            axis = figure.add_subplot(grid[0, column])
            axis.imshow(pictures[index].mean(0), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
    bars = figure.add_subplot(grid[-1, :])
    bars.bar(range(len(order)), weights[order], color="C0")
    shown = "instance" if len(order) == len(weights) else f"instance, the {len(order)} of {len(weights)} with most weight"
    bars.set(xlim=(-0.5, len(order) - 0.5), ylabel="weight", xlabel=shown, ylim=(0, None))
    bars.set_xticks(range(len(order)), [str(index) for index in order])
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def paired_figure(path: Path, gathered: list[dict[str, Any]]) -> None:
    """Paired differences with their intervals, a panel for each data set.

    Args:
        path: PNG file to write.
        gathered: Results of `compare_mil.compare`.
    """
    rows = math.ceil(len(gathered) / 4)
    figure, axes = plt.subplots(rows, 4, figsize=(15, 3.4 * rows), layout="constrained", sharey=True, squeeze=False)
    for axis in axes.flat[len(gathered) :]:
        axis.set_axis_off()
    for axis, result in zip(axes.flat, gathered, strict=False):
        pairs = result["paired"]
        places = range(len(pairs))
        axis.errorbar([pair["difference"] for pair in pairs], places, xerr=[pair["half_width"] for pair in pairs], fmt="o", capsize=3)
        axis.axvline(0.0, color="grey", linewidth=1)
        axis.set(title=Path(result["recipe"]["data"]["dataset"]).stem, xlabel=f"difference in {result['recipe']['metrics'][0]}")
        axis.set_yticks(places, [f"{pair['first']} - {pair['second']}" for pair in pairs])
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def forecast_figure(
    path: Path,
    past: np.ndarray,
    future: np.ndarray,
    forecast: np.ndarray,
    memories: np.ndarray,
    names: list[str],
    most: int = 6,
) -> None:
    """A forecast against the truth and the stored windows that a memory finds most like the past, a panel for each of the first series.

    Args:
        path: PNG file to write.
        past: (L, C).
        future, forecast: (H, C).
        memories: (k, steps, C), windows that end with the horizon.
        names: Of the series.
        most: How many series to show.
    """
    count = min(most, past.shape[1])
    rows = math.ceil(count / 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 2.2 * rows), layout="constrained", sharex=True, squeeze=False)
    before, after = np.arange(-len(past), 0), np.arange(len(future))
    for index, axis in enumerate(axes.flat):
        if index >= count:
            axis.set_axis_off()
            continue
        for rank, memory in enumerate(memories):
            steps = np.arange(len(future) - len(memory), len(future))
            axis.plot(steps, memory[:, index], color="C1", alpha=0.35, linewidth=1, label="retrieved windows" if rank == 0 else None)
        axis.plot(before, past[:, index], color="grey", linewidth=1, label="past")
        axis.plot(after, future[:, index], color="black", linewidth=1, label="truth")
        axis.plot(after, forecast[:, index], color="C0", label="forecast")
        axis.set(title=names[index])
    axes[0, 0].legend(fontsize="small")
    axes[-1, 0].set(xlabel="step")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def retrieval_weights_figure(path: Path, over_time: np.ndarray, over_series: np.ndarray, names: list[str]) -> None:
    """Which patches a series' patches retrieve from, and which series the series of a position do, through the prototypes.

    Args:
        path: PNG file to write.
        over_time: (P, P), weights averaged over heads and series.
        over_series: (C, C), weights averaged over heads and positions.
        names: Of the series.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for axis, weights, title in zip(axes, (over_time, over_series), ("over time", "over series"), strict=True):
        figure.colorbar(axis.imshow(weights, cmap="viridis", vmin=0.0), ax=axis)
        axis.set(title=title)
    axes[0].set(xlabel="patch retrieved from", ylabel="patch")
    axes[1].set_xticks(range(len(names)), names, rotation=90)
    axes[1].set_yticks(range(len(names)), names)
    figure.savefig(path, dpi=100)
    plt.close(figure)
