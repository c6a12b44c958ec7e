"""Figures of the geometry experiments whose results files hold all that is drawn."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .styles import METHODS, REFERENCE, dataset_name, legend_beside


def loss_curve_figure(results: dict[str, Any], recipe: dict[str, Any]) -> Figure:
    """Separation loss of U-Hop+ along its steps, a line for each number of memories."""
    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for stroke, (name, entry) in zip(("-", "--", ":", "-."), results.items(), strict=False):
        axis.plot(entry["history"], color=METHODS["U-Hop+"].color, linestyle=stroke, linewidth=2)
        last = len(entry["history"]) - 1
        axis.annotate(name.replace("=", " = "), (last, entry["history"][-1]), (0, 7), textcoords="offset points", ha="right")
    axis.set(xlabel="step of U-Hop+", ylabel="separation loss (lower: further apart)")
    axis.set(title=f"U-Hop+ lowers the separation loss of random memories\n(d = {recipe['pattern_dim']}, D = {recipe['feature_dim']})")
    return figure


def bound_figure(results: dict[str, Any], recipe: dict[str, Any]) -> Figure:
    """The separation that the codes reach, between the bounds of Proposition 3.1."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    counts = [int(name.partition("=")[2]) for name in results]
    lower, reached, upper = ([entry[key] for entry in results.values()] for key in ("lower", "reached", "upper"))
    axis.fill_between(counts, lower, upper, color=REFERENCE, alpha=0.4, linewidth=0)
    style = METHODS["U-Hop+"]
    for values, options, label in (
        (upper, {"color": METHODS["no Phi"].color, "linestyle": "--"}, "upper bound"),
        (reached, style.line(), "reached"),
        (lower, {"color": METHODS["no Phi"].color, "linestyle": "--"}, "lower bound"),
    ):
        axis.plot(counts, values, **options)
        axis.annotate(label, (counts[-1], values[-1]), (6, 0), textcoords="offset points", va="center", color=options["color"])
    axis.set(
        xscale="log", yscale="log", xlabel="number of memories M", ylabel="separation: smallest 1 - cosine", xlim=(None, 2 * counts[-1])
    )
    ticks = [4, 8, 16, 32, 64, 128]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set(title=f"Optimal codes in {recipe['feature_dim']} dimensions lie between the bounds of Proposition 3.1")
    return figure


def metastable_figure(results: dict[str, Any], recipe: dict[str, Any]) -> Figure:
    """Shares of queries by the number of memories that they retrieve."""
    sizes = [label for label in next(iter(results.values())) if label != "different memories"]
    figure, axis = plt.subplots(figsize=(10.5, 0.55 * len(results) + 1.7), layout="constrained")
    shades = plt.get_cmap("cividis")(np.linspace(0.0, 1.0, len(sizes)))
    names = [name.replace("alpha=", "alpha ").replace("without Phi", "no Phi") for name in results]
    left = np.zeros(len(results))
    for label, shade in zip(sizes, shades, strict=True):
        width = np.array([entry[label]["mean"] for entry in results.values()])
        axis.barh(names, width, left=left, label=label, color=shade, edgecolor="white", linewidth=0.5)
        left += width
    for place, entry in enumerate(results.values()):
        axis.text(1.01, place, f"{entry['different memories']['mean']:.0f}", va="center", transform=axis.get_yaxis_transform())
    axis.text(
        1.01,
        -0.75,
        f"different memories\nthat are reached (of {recipe['memories'][0]})",
        va="bottom",
        fontsize=9,
        transform=axis.get_yaxis_transform(),
    )
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="share of queries", xlim=(0, 1))
    legend_beside(figure, axis, "memories retrieved\nby one query")
    return _titled(figure, "How many memories does one query retrieve? One (dark) is the goal", recipe)


def _titled(figure: Figure, title: str, recipe: dict[str, Any]) -> Figure:
    dataset = "Gaussian patterns" if recipe["data"] is None else dataset_name(recipe["data"]["dataset"])
    figure.suptitle(f"{title}\n({dataset}, beta {recipe['beta']:g})")
    return figure


FIGURES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Figure]] = {
    "loss_curve": loss_curve_figure,
    "bound": bound_figure,
    "metastable": metastable_figure,
}
