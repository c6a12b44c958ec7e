"""95 % confidence intervals of means."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student_t


def half_width(std: float, count: int) -> float | None:
    """Half of the 95 % confidence interval of a mean over `count` values with this standard
    deviation; `None` for one value."""
    return None if count < 2 else float(student_t.ppf(0.975, count - 1) * std / count**0.5)


def half_width_of(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean of these values; 0 for one value, which has
    no interval to draw."""
    return (half_width(float(np.std(values, ddof=1)), len(values)) or 0.0) if len(values) > 1 else 0.0


def half_width_over_folds(values: Sequence[float], folds: int) -> float | None:
    """The same for scores of all folds of repeated cross-validations.

    It is corrected for the training data that folds share (Nadeau and Bengio, 2003), as are the
    paired differences of the results.
    """
    count = len(values)
    if count < 2:
        return None
    return float(student_t.ppf(0.975, count - 1) * np.sqrt((1.0 / count + 1.0 / (folds - 1)) * np.var(values, ddof=1)))
