"""Divide bags into the folds of a cross-validation, and summarise its outcomes."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from .data.bags import Bags
from .errors import RecipeError


def fold_seed(seed: int, *parts: int) -> int:
    """A seed for a part of a cross-validation, independent of the seeds of other parts."""
    return int(np.random.SeedSequence([seed, *parts]).generate_state(1)[0] >> 1)


def splits(bags: Bags, folds: int, seed: int, repeat: int, evaluated: str = "test") -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices (training bags, evaluated bags) of each fold of one cross-validation.

    Folds are stratified by label, and a group of bags is never divided.

    Args:
        folds: The number of folds.
        seed, repeat: They determine the division.
        evaluated: "test" for the bags of the fold. "validation" for a fifth of its training bags,
            which are then not trained on.

    Raises:
        RecipeError: If there is only one class, or a class has too few bags for the folds.
    """
    counts = np.bincount(bags.labels, minlength=len(bags.names))
    if len(counts) < 2:
        raise RecipeError(f"there is nothing to classify: every bag is of class {bags.names[0]!r}")
    if counts.min() < folds:
        scarce = int(counts.argmin())
        raise RecipeError(
            f"class {bags.names[scarce]!r} has {counts[scarce]} bags, too few for one in each of {folds} folds; use fewer `folds`"
        )
    parts = list(divided(bags, np.arange(len(bags.labels)), folds, fold_seed(seed, repeat)))
    if evaluated == "validation":
        parts = [next(divided(bags, train, 5, fold_seed(seed, repeat, fold))) for fold, (train, _) in enumerate(parts)]
    for fold, part in enumerate(parts):
        for name, indices in zip(("training", evaluated), part, strict=True):
            missing = set(range(len(bags.names))) - set(bags.labels[indices].tolist())
            if missing:
                raise RecipeError(f"fold {fold} has no {name} bag of class {bags.names[min(missing)]!r}; use another number of `folds`")
    return parts


def divided(bags: Bags, among: np.ndarray, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide some of the bags into folds; yields pairs of indices into all bags."""
    labels = bags.labels[among]
    if bags.groups is None:
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    else:
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, bags.groups[among])
    with warnings.catch_warnings():
        # Because the caller raises an error for a class that is too small for the folds, we ignore
        # the warning of scikit-learn.
        warnings.simplefilter("ignore", UserWarning)
        for train, evaluated in parts:
            yield among[train], among[evaluated]


def summarize(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Summary of each metric: its mean over folds for each repeat, their mean, and standard
    deviations over repeats and folds."""
    summary: dict[str, Any] = {}
    repeats = sorted({outcome["repeat"] for outcome in outcomes})
    for name in [key for key, value in outcomes[0].items() if isinstance(value, float)]:
        by_repeat = [float(np.mean([o[name] for o in outcomes if o["repeat"] == repeat])) for repeat in repeats]
        over_repeats = float(np.std(by_repeat, ddof=1)) if len(by_repeat) > 1 else 0.0
        over_folds = float(np.std([outcome[name] for outcome in outcomes], ddof=1))
        summary[name] = {"mean": float(np.mean(by_repeat)), "std_repeats": over_repeats, "std_folds": over_folds, "by_repeat": by_repeat}
    return summary
