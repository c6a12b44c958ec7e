"""Figures of results files that compare variants or implementations. Colours and markers are those
of `styles`."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from ..intervals import over_seeds
from .styles import (
    BASELINE,
    BASELINES,
    METHODS,
    OBSERVED,
    THIS_RUN,
    dataset_name,
    label_of,
    legend_beside,
    method_of,
    most_telling,
    save,
    styles_of,
)


METRICS = {
    "max_train_accuracy": "highest accuracy on training images",
    "validation_accuracy": "accuracy on validation images",
    "test_accuracy": "accuracy on test images",
    "auc": "area under the ROC curve",
    "accuracy": "accuracy",
    "test_mse": "mean squared error",
    "test_mae": "mean absolute error",
    "test_bits_per_byte": "bits per byte",
}


def _group_of(variant: str) -> str:
    """What stands before a colon in the name of a variant: "1,000 images" of "1,000 images: no
    Phi"."""
    return variant.rpartition(": ")[0]


def curves_figure(path: Path, gathered: dict[str, Any]) -> None:
    """Losses and accuracies by epoch: means over seeds, with bands from the lowest to the highest.

    A panel has at most six lines: the first variant of each method, then others. The figure of
    differences has every variant. Variants "1,000 images: NAME" and "2,000 images: NAME" stand in
    rows of panels.

    Args:
        path: PNG file to write.
        gathered: Results of `sweep.gather` whose sweep has `curves`.
    """
    keys, variants = gathered["sweep"]["curves"], gathered["variants"]
    groups = list(dict.fromkeys(_group_of(variant) for variant in variants))
    across = len(keys) if len(groups) > 1 else min(2, len(keys))
    down = len(groups) * math.ceil(len(keys) / across)
    longest = max(len(label_of(variant.removeprefix(f"{_group_of(variant)}: "))) for variant in variants)
    size = (3.2 * across + 0.085 * longest + 0.8, 2.7 * down + 0.7)
    figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
    shown = 0
    for index, (group, key) in enumerate((group, key) for group in groups for key in keys):
        axis = axes.flat[index]
        names = {variant.removeprefix(f"{group}: "): variant for variant in variants if _group_of(variant) == group}
        lines = most_telling(names)
        shown += len(lines) if key == keys[0] else 0
        for name, style in styles_of(lines).items():
            epochs, values = variants[names[name]]["curves"][key]["epoch"], np.array(variants[names[name]]["curves"][key]["values"])
            axis.plot(epochs, values.mean(0), **style.line(), label=label_of(name))
            axis.fill_between(epochs, values.min(0), values.max(0), color=style.color, alpha=0.12, linewidth=0)
        split, _, kind = key.removeprefix("eval_").partition("_")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set(title=f"{group + ': ' if group else ''}{'training' if split == 'train' else split}", xlabel="epoch")
        axis.set(ylabel="cross-entropy (nats)" if kind == "loss" else kind)
    for axis in axes.flat[len(groups) * len(keys) :]:
        axis.set_axis_off()
    legend_beside(figure, axes[0, 0])
    left_out = len(variants) - shown
    beside = f"\n{shown} of {len(variants)} variants; the figure of differences has all" if left_out else ""
    seeds = len(np.array(next(iter(variants.values()))["curves"][keys[0]]["values"]))
    figure.suptitle(f"{_title(gathered)}\nLines are means over {seeds} seeds; bands reach from the lowest to the highest{beside}")
    save(figure, path)


def _title(gathered: dict[str, Any]) -> str:
    """What a comparison of image models was run on."""
    data = gathered["recipe"]["data"]
    grouped = any(_group_of(variant) for variant in gathered["variants"])
    overrides = [override.partition("=") for override in gathered["sweep"]["overrides"]]
    count = next((int(value) for key, _, value in overrides if key == "data.max_train_samples"), data.get("max_train_samples"))
    return dataset_name(data["dataset"]) + (f", {count:,} training images" if count and not grouped else "")


def samples_figure(path: Path, gathered: list[dict[str, Any]]) -> None:
    """Accuracies by the number of training images, a line for each variant, with 95 % confidence
    intervals over seeds.

    Args:
        path: PNG file to write.
        gathered: Results of `sweep.gather` of one recipe, of variants "NAME" at its
            `max_train_samples`, or "COUNT images: NAME".
    """
    points: list[tuple[str, Any, dict[str, Any]]] = [
        (name.rpartition(": ")[2], int(name.partition(" images")[0].replace(",", "")) if ": " in name else default, variant["metrics"])
        for result in gathered
        for default in [None if result["sweep"]["suffix"] else result["recipe"]["data"]["max_train_samples"]]
        for name, variant in result["variants"].items()
        if default is not None or ": " in name
    ]
    counts: dict[str, set[int]] = {}
    for name, count, _ in points:
        counts.setdefault(name, set()).add(count)
    sizes = sorted(set().union(*counts.values()))
    lines = most_telling(name for name, seen in counts.items() if len(seen) > 1)
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.2), layout="constrained")
    for axis, metric in zip(axes, ("max_train_accuracy", "test_accuracy"), strict=True):
        for place, (name, style) in enumerate(styles_of(lines).items()):
            # Side by side, because intervals of several variants at one size would cover each
            # other.
            shift = 1.03 ** (place - (len(lines) - 1) / 2)
            own = sorted(((count, metrics[metric]) for label, count, metrics in points if label == name), key=lambda point: point[0])
            widths = [over_seeds(m["values"]).half_width or 0.0 for _, m in own]
            axis.errorbar(
                [shift * count for count, _ in own],
                [m["mean"] for _, m in own],
                widths,
                **style.line(),
                capsize=3,
                label=label_of(name),
            )
        axis.set(title=METRICS[metric].capitalize(), xlabel="training images", ylabel="accuracy", xscale="log")
        axis.set_xticks(sizes, [f"{count:,}" for count in sizes])
        axis.minorticks_off()
    legend_beside(figure, axes[0])
    figure.suptitle("Accuracy by the number of training images: means over seeds, with 95 % confidence intervals")
    save(figure, path)


def differences_figure(path: Path, gathered: dict[str, Any], metrics: Sequence[str] = ("max_train_accuracy", "test_accuracy")) -> None:
    """Paired differences of every pair of a sweep, a panel for each metric.

    Args:
        path: PNG file to write.
        gathered: Results of `sweep.gather` whose sweep has `pairs`.
        metrics: The panels.
    """
    panels = [
        (METRICS[metric].capitalize(), "difference of accuracy", [p for p in gathered["paired"] if p["metric"] == metric])
        for metric in metrics
    ]
    _differences(path, panels, _title(gathered), columns=len(metrics))


def paired_figure(path: Path, gathered: list[dict[str, Any]]) -> None:
    """Paired differences with their intervals, a panel for each data set.

    Args:
        path: PNG file to write.
        gathered: Results of `compare_mil.compare`.
    """
    metric = METRICS.get(gathered[0]["recipe"]["metrics"][0], gathered[0]["recipe"]["metrics"][0])
    panels = [(Path(result["recipe"]["data"]["dataset"]).stem, "difference of AUC", result["paired"]) for result in gathered]
    _differences(path, panels, f"{metric.capitalize().replace('roc', 'ROC')} on bags", columns=4)


def _differences(path: Path, panels: list[tuple[str, str, list[dict[str, Any]]]], title: str, columns: int) -> None:
    """Points with 95 % confidence intervals; filled where the difference exceeds its interval.
    Panels share their axes."""
    names = list(dict.fromkeys(_pair_name(pair) for _, _, pairs in panels for pair in pairs))
    rows = math.ceil(len(panels) / columns)
    size = (4.6 + (3.6 if columns < 4 else 2.5) * columns, 1.4 + rows * (0.6 + 0.28 * len(names)))
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False)
    exceeding = total = 0
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for index, (axis, (name, xlabel, pairs)) in enumerate(zip(axes.flat, panels, strict=False)):
        axis.axvline(0.0, color=OBSERVED, linewidth=1)
        for pair in pairs:
            method = method_of(pair["first"].rpartition(": ")[2])
            color, marker, _ = METHODS.get(method) or BASELINES[method]
            width = pair["half_width"] or 0.0
            exceeds = abs(pair["difference"]) > width > 0.0
            exceeding, total = exceeding + exceeds, total + 1
            style = {"color": color, "marker": marker, "markersize": 6, "markerfacecolor": color if exceeds else "white"}
            axis.errorbar(pair["difference"], names.index(_pair_name(pair)), xerr=width, capsize=3, linestyle="", **style)
        axis.set(title=name, xlabel=xlabel if index + columns >= len(panels) else "")
        axis.tick_params(labelbottom=index + columns >= len(panels))
        axis.set_yticks(range(len(names)), names)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle(
        f"{title}: paired differences with 95 % confidence intervals\n"
        f"Right of 0: the first is higher. Filled: the difference exceeds its interval ({exceeding} of {total})"
    )
    save(figure, path)


def adapters_figure(path: Path, gathered: dict[str, dict[str, Any]]) -> None:
    """Scores of the variants of each comparison of adapters: means with 95 % confidence intervals over seeds.

    Args:
        path: PNG file to write.
        gathered: Results of `tasks.attach`, by the titles of their panels, with as many variants each.
    """
    size = (3.2 + 3.4 * len(gathered), 4.6)
    figure, axes = plt.subplots(1, len(gathered), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, (title, content) in zip(axes[0], gathered.items(), strict=True):
        (metric,) = content["sweep"]["metrics"]
        names = [re.sub(r"\d+ steps", "fewer steps", variant) for variant in content["variants"]]
        for row, (name, variant) in enumerate(zip(names, content["variants"].values(), strict=True)):
            mean, width = over_seeds(variant["metrics"][metric]["values"])
            color = THIS_RUN if "Phi" in name else OBSERVED if name == "1.5-entmax" else BASELINE
            axis.errorbar(mean, row, xerr=width, marker="o", capsize=3, linestyle="", color=color)
        better = "higher" if "accuracy" in metric else "lower"
        axis.set(title=title, xlabel=f"{METRICS[metric].removesuffix(' on test images')} ({better} is better)")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    seeds = len(next(iter(gathered.values()))["sweep"]["seeds"])
    figure.suptitle(f"A trained model moved to few examples of other data: means over {seeds} seeds, 95 % confidence intervals")
    save(figure, path)


def _pair_name(pair: dict[str, Any]) -> str:
    """ "dense: U-Hop vs. untrained Phi" of the two variants; a beginning that both share is said
    once."""
    first, second = pair["first"], pair["second"]
    for mark in (": ", ", "):
        shared = first.partition(mark)[0]
        if mark in first and second.startswith(f"{shared}{mark}"):
            return f"{shared}: {first.removeprefix(shared + mark)} vs. {second.removeprefix(shared + mark)}"
    return f"{first} vs. {second}"


IMPLEMENTATIONS = {
    "1.5-entmax, ours": (THIS_RUN, "o", "-"),
    "sparsemax, ours": (THIS_RUN, "s", "--"),
    "ours, in blocks": (THIS_RUN, "o", "-"),
    "softmax, scaled_dot_product_attention": (BASELINE, "x", "-"),
    "1.5-entmax, entmax library": (BASELINE, "+", "--"),
    "torch.pdist": (BASELINE, "x", "-"),
}


def growth_figure(path: Path, growth: dict[str, Any]) -> None:
    """CPU time of attention by its tokens and of the separation loss by its memories.

    Args:
        path: PNG file to write.
        growth: For "attention" and "separation", milliseconds by size, for each implementation.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    titles = {"attention": ("Attention", "tokens N"), "separation": ("Separation loss", "memories M")}
    for axis, (part, (title, label)) in zip(axes, titles.items(), strict=True):
        for name, curve in growth[part].items():
            color, marker, stroke = IMPLEMENTATIONS[name]
            sizes = [int(size) for size in curve]
            axis.loglog(sizes, list(curve.values()), color=color, marker=marker, linestyle=stroke, label=name)
        axis.set_xticks(sizes, list(curve))
        axis.minorticks_off()
        axis.set(title=f"{title}, with gradients", xlabel=label, ylabel="CPU time (milliseconds)")
        axis.legend(loc="upper left")
    figure.suptitle("CPU time on one thread, median over rounds (lower is better)")
    save(figure, path)
