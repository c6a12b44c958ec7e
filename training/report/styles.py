"""Colours and markers of figures: a method has the same ones everywhere.

The colours are those of Okabe and Ito, which people with a colour vision deficiency can tell apart.
Markers differ too, so that a figure also works in grey.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image


class Style(NamedTuple):
    """A colour, a marker and a line."""

    color: str
    marker: str
    linestyle: str = "-"

    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot` and `Axes.errorbar`. Further variants of a method have hollow
        markers."""
        face = self.color if self.linestyle == "-" else "white"
        return {**self._asdict(), "markersize": 5.5, "markerfacecolor": face, "linewidth": 1.5}


METHODS = {
    "no Phi": Style("#666666", "o"),
    "untrained Phi": Style("#E69F00", "s"),
    "U-Hop": Style("#0072B2", "^"),
    "U-Hop+": Style("#009E73", "D"),
    "denoising": Style("#D55E00", "v"),
    "ViT of transformers": Style("#56B4E9", "P"),
}
BASELINE = "#CC79A7"
BASELINES = {
    "best baseline": Style(BASELINE, "x"),
    "polynomial": Style(BASELINE, "+"),
    "cosine": Style(BASELINE, "1"),
    "L2": Style(BASELINE, "2"),
    "Manhattan": Style(BASELINE, "x"),
    "mean pooling": Style(BASELINE, "<"),
    "max pooling": Style(BASELINE, ">"),
    "mean, logistic regression": Style(BASELINE, "+"),
    "statistics, random forest": Style(BASELINE, "*"),
    "set kernel, SVM": Style(BASELINE, "x"),
}
# Colours of what is no method: measured values, references, and the one model that a figure of a
# single run shows.
OBSERVED, REFERENCE, THIS_RUN = "#000000", "#BBBBBB", "#882255"

# A variant is the first of these methods whose word its name contains. Any other variant is a way
# of U-Hop.
WORDS = {
    "ViT of transformers": ("transformers' ViT",),
    "no Phi": ("no Phi", "without Phi", "without separation and Phi"),
    "untrained Phi": ("untrained Phi", "Phi without separation"),
    "U-Hop+": ("U-Hop+",),
    "denoising": ("denoising", "noise-aware"),
}
# Bag models of this simplex map that have no Phi. With Phi, its name follows.
SIMPLEX_MAPS = ("dense", "1.5-entmax", "sparse", "dense, five seeds averaged")
DATASETS = {
    "digits": "scikit-learn's digits",
    "mnist": "MNIST",
    "mnist10k": "MNIST",
    "cifar10": "CIFAR-10",
    "tiny-imagenet": "Tiny ImageNet",
}
STROKES = ("-", "--", ":", "-.")

plt.rcParams.update(
    {
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E4E4E4",
        "axes.axisbelow": True,
        "figure.titlesize": 12.5,
        "legend.frameon": False,
    }
)


def method_of(variant: str) -> str:
    """The method of a variant of a comparison: a name of `METHODS` or `BASELINES`."""
    if variant in BASELINES:
        return variant
    if variant in SIMPLEX_MAPS:
        return "no Phi"
    return next((method for method, words in WORDS.items() if any(word in variant for word in words)), "U-Hop")


def label_of(variant: str) -> str:
    """A variant's name, with its method in front if the name lacks it."""
    method = method_of(variant)
    if method == "ViT of transformers":
        return method
    return variant if method in variant else f"{method}: {variant}"


def styles_of(variants: Iterable[str]) -> dict[str, Style]:
    """The style of each variant: that of its method. Further variants of a method have other
    strokes and hollow markers."""
    seen: dict[str, int] = {}
    styles = {}
    for variant in variants:
        method = method_of(variant)
        style = METHODS.get(method) or BASELINES[method]
        styles[variant] = style._replace(linestyle=STROKES[seen.get(method, 0) % len(STROKES)])
        seen[method] = seen.get(method, 0) + 1
    return styles


def most_telling(variants: Iterable[str], most: int = 6) -> list[str]:
    """At most six variants for a panel: the first of each method, then others, all in the order
    given."""
    variants = list(variants)
    firsts = {method_of(variant): variant for variant in reversed(variants)}
    chosen = [variant for variant in variants if firsts[method_of(variant)] == variant]
    chosen += [variant for variant in variants if variant not in chosen]
    return [variant for variant in variants if variant in chosen[:most]]


def dataset_name(dataset: str) -> str:
    """What titles call a data set."""
    name = dataset.rpartition("/")[2]
    return DATASETS.get(name, name)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG and close the figure. One of lines alone gets at most 256 colours, which makes
    its file small."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    image = Image.open(drawn).convert("RGB")
    if not any(axis.images for axis in figure.get_axes()):
        image = image.quantize(256, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    plt.close(figure)


def legend_beside(figure: Figure, axis: Axes, title: str | None = None) -> None:
    """One legend for all panels, to the right of them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title=title, alignment="left")
