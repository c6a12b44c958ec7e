"""Confidence intervals: values of scipy's t test, and loops over the papers' equations."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from modeling_uhop.training.intervals import Interval, half_width, over_folds, over_seeds, paired_over_folds, paired_over_seeds, spread


def _drawn(count, seed=0):
    generator = random.Random(seed)
    return [generator.gauss(0.8, 0.1) for _ in range(count)]


def _nadeau_bengio(values, test_sizes, train_sizes):
    """Equation by loops: t times the root of (1 / n + test / train) times the variance."""
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    ratio = sum(test / train for test, train in zip(test_sizes, train_sizes, strict=True)) / count
    return mean, stats.t.ppf(0.975, count - 1) * math.sqrt((1.0 / count + ratio) * variance)


@pytest.mark.parametrize("count", [2, 3, 5, 50])
def test_intervals_over_seeds_are_those_of_students_t(count):
    first, second = _drawn(count), _drawn(count, seed=1)
    low, high = stats.t.interval(0.95, count - 1, np.mean(first), stats.sem(first))
    assert over_seeds(first) == pytest.approx((np.mean(first), (high - low) / 2), rel=1e-12)
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert paired_over_seeds(first, second) == pytest.approx(((low + high) / 2, (high - low) / 2), rel=1e-9)
    assert half_width(float(np.std(first, ddof=1)), count) == pytest.approx(over_seeds(first).half_width, rel=1e-12)


@pytest.mark.parametrize(("folds", "repeats"), [(2, 1), (3, 2), (10, 5)])
def test_intervals_over_folds_allow_for_shared_training_data(folds, repeats):
    count = folds * repeats
    first, second = _drawn(count), _drawn(count, seed=1)
    equal = _nadeau_bengio(first, [1] * count, [folds - 1] * count)
    assert over_folds(first, 1, folds - 1) == pytest.approx(equal, rel=1e-12)
    tests = [9 + fold % 2 for fold in range(count)]
    trains = [93 - test for test in tests]
    differences = [one - other for one, other in zip(first, second, strict=True)]
    assert paired_over_folds(first, second, tests, trains) == pytest.approx(_nadeau_bengio(differences, tests, trains), rel=1e-12)
    assert over_folds(first, 0, 1) == over_seeds(first)


def test_one_value_has_no_interval_and_equal_values_one_of_width_zero():
    assert over_seeds([0.5]) == over_folds([0.5], 1, 9) == Interval(0.5, None)
    assert paired_over_seeds([0.75], [0.5]) == Interval(0.25, None)
    assert over_seeds([0.5, 0.5, 0.5]) == over_folds([0.5] * 3, 1, 2) == Interval(0.5, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: over_seeds([]),
        lambda: over_folds([], 1, 9),
        lambda: paired_over_seeds([1.0, 2.0], [1.0]),
        lambda: paired_over_folds([1.0], [1.0, 2.0], 1, 9),
    ],
)
def test_values_that_cannot_be_compared_are_refused(wrong):
    with pytest.raises(ValueError, match=r"at least one value|shorter|longer"):
        wrong()


def test_the_spread_of_one_value_is_zero():
    assert spread([2.0]) == {"mean": 2.0, "std": 0.0, "values": [2.0]}
    values = _drawn(7)
    assert spread(values) == {
        "mean": pytest.approx(np.mean(values), rel=1e-15),
        "std": pytest.approx(np.std(values, ddof=1), rel=1e-14),
        "values": values,
    }
