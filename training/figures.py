"""Pictures of a run."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402


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
    num_layers = max((len(matrices) for matrices in grams.values()), default=0)
    rows = 1 + len(grams)
    figure = plt.figure(figsize=(12, 3.2 * rows), layout="constrained")
    grid = figure.subfigures(rows, 1)
    top = grid[0] if rows > 1 else grid
    task, separation, accuracy = top.subplots(1, 3)

    task.plot(*_series(log_history, "loss"), label="train")
    task.plot(*_series(log_history, "eval_loss"), label="validation")
    task.set(title="Task loss", xlabel="step", yscale="log")
    task.legend()
    accuracy.plot(*_series(log_history, "eval_accuracy"), color="C1")
    accuracy.set(title="Validation accuracy", xlabel="step", ylim=(0, 1))
    separation.set(title="Separation loss (Stage I)", xlabel="Stage I step measured")
    if separation_history:
        separation.plot([entry["separation_loss"] for entry in separation_history], color="C2")
    else:
        separation.text(0.5, 0.5, "no separation step", ha="center", transform=separation.transAxes)

    for row, (moment, matrices) in zip(np.atleast_1d(grid)[1:], grams.items(), strict=True):
        axes = row.subplots(1, num_layers, squeeze=False)[0]
        for layer, (axis, gram) in enumerate(zip(axes, matrices, strict=True)):
            picture = axis.imshow(gram, vmin=-1, vmax=1, cmap="RdBu_r")
            off_diagonal = gram[~np.eye(len(gram), dtype=bool)]
            axis.set(title=f"{moment} Stage I, layer {layer + 1}: mean cosine {off_diagonal.mean():.2f}", xlabel="patch", ylabel="patch")
        row.colorbar(picture, ax=list(axes))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _series(log_history: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]
