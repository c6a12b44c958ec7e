"""scikit-learn's digits: the data of the demo and of its models."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.datasets import load_digits


class DemoError(Exception):
    """What a visitor asks for cannot be done; the message says why, in their words."""


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits.

    Attributes:
        images: (1797, 8, 8), ink from 0 to 1.
        labels: (1797,), the digit that is written.
        train, test: Indices of the images that models learn from, and of those that they have never seen.
    """

    images: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray


@lru_cache(maxsize=1)
def load() -> Digits:
    """The digits, divided as `configs/vit_digits.yaml` divides them: what a model of that recipe is shown here is new to it."""
    digits = load_digits()
    features = Features({"index": Value("int64"), "label": ClassLabel(num_classes=10)})
    rows = Dataset.from_dict({"index": list(range(len(digits.target))), "label": digits.target}, features=features)
    parts = rows.train_test_split(0.2, stratify_by_column="label", seed=0)
    train, test = (np.asarray(parts[name]["index"]) for name in ("train", "test"))
    return Digits(digits.images / 16.0, digits.target, train, test)


def examples(per_digit: int = 1, first: int = 0) -> list[int]:
    """Indices of test images, `per_digit` of each digit in order."""
    digits = load()
    return [
        int(index) for digit in range(10) for index in digits.test[digits.labels[digits.test] == digit][first : first + per_digit].tolist()
    ]
