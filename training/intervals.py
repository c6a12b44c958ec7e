"""Means with 95 % confidence intervals: over seeds, and over the folds of cross-validations."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t


class Interval(NamedTuple):
    """A mean, and half of its 95 % confidence interval; `None` for a single value, which has
    none."""

    mean: float
    half_width: float | None


def half_width(std: float, count: int, overlap: float = 0.0) -> float | None:
    r"""Half of the 95 % confidence interval of a mean of `count` values.

    $$t_{0.975,\, n - 1} \sqrt{\left(\tfrac{1}{n} + \rho\right) s^2}$$

    Args:
        std: Standard deviation s of the values, with n - 1 in the denominator.
        count: Number n of values.
        overlap: The correction rho. It is 0 for independent values (Student, "The probable error
            of a mean", 1908). For folds, which share training data, it is the number of evaluated
            divided by the number of training examples (Nadeau and Bengio, "Inference for the
            generalization error", 2003).

    Returns:
        `None` for a single value.
    """
    return None if count < 2 else float(student_t.ppf(0.975, count - 1) * std * np.sqrt(1.0 / count + overlap))


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean of independent values, one for each seed, with Student's interval.

    Raises:
        ValueError: If there are no values.
    """
    return _interval(values, 0.0)


def over_folds(values: Sequence[float], test_sizes: Sequence[int] | int, train_sizes: Sequence[int] | int) -> Interval:
    """The mean of the scores of all folds of repeated cross-validations, with the interval of
    Nadeau and Bengio.

    Args:
        values: A score for each fold, of all repeats.
        test_sizes, train_sizes: How many examples each fold evaluates and trains on: a number for
            each fold, or one for all. Only their ratio counts: 1 and k - 1 for k equal folds.

    Raises:
        ValueError: If there are no values.
    """
    return _interval(values, float(np.mean(np.divide(test_sizes, train_sizes))))


def paired_over_seeds(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean difference of two variants with equal seeds, with Student's interval.

    Args:
        first, second: A value of each variant for each seed, in the same order.

    Raises:
        ValueError: If the numbers of values differ, or are 0.
    """
    return over_seeds(_differences(first, second))


def paired_over_folds(
    first: Sequence[float], second: Sequence[float], test_sizes: Sequence[int] | int, train_sizes: Sequence[int] | int
) -> Interval:
    """The mean difference of two variants on the same folds, with the interval of Nadeau and
    Bengio.

    Args:
        first, second: A score of each variant for each fold, in the same order.
        test_sizes, train_sizes: As in `over_folds`.

    Raises:
        ValueError: If the numbers of scores differ, or are 0.
    """
    return over_folds(_differences(first, second), test_sizes, train_sizes)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and values, as results files have them; the standard deviation of
    one value is 0."""
    std = float(statistics.stdev(values)) if len(values) > 1 else 0.0
    return {"mean": float(statistics.mean(values)), "std": std, "values": list(values)}


def _interval(values: Sequence[float], overlap: float) -> Interval:
    if len(values) == 0:
        raise ValueError("a confidence interval needs at least one value")
    described = spread(values)
    return Interval(described["mean"], half_width(described["std"], len(values), overlap))


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(first, second, strict=True)]
