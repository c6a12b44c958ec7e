"""Check the class labels of a data set of images or bags: all labels must be of one kind."""

from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np

from ..errors import RecipeError


def as_classes(labels: Iterable[Any], place: Callable[[int], str]) -> list[Any]:
    """Convert labels to plain Python values: whole numbers, booleans or text, all of one kind.

    A float without a fraction is read as a whole number, because pandas converts whole numbers to
    floats if a label is missing.

    Args:
        place: A function from the index of a row to its name in messages, such as "bag 3 of FILE".

    Raises:
        RecipeError: For a label that is missing (`None`, NaN or blank), is not a class (0.5, a
            date), is a list, or is of another kind than the first label. The message names the row.
    """
    classes = [_as_class(label, index, place) for index, label in enumerate(labels)]
    for index, label in enumerate(classes):
        if type(label) is not type(classes[0]):
            raise RecipeError(f"{place(index)} has the label {label!r}, but {place(0)} has {classes[0]!r}; labels must be of one kind")
    return classes


def _as_class(label: Any, index: int, place: Callable[[int], str]) -> Any:
    if isinstance(label, (list, tuple, np.ndarray)) and np.ndim(label) > 0:
        raise RecipeError(f"{place(index)} has a list of labels, {list(label)}; give one class, not in a list")
    if isinstance(label, np.ndarray):
        label = label.item()
    if label is None or label != label or (isinstance(label, str) and not label.strip()):
        raise RecipeError(f"{place(index)} has no label; remove rows without a label")
    if isinstance(label, (bool, np.bool_)):
        return bool(label)
    if isinstance(label, Integral):
        return int(label)
    if isinstance(label, Real) and float(label).is_integer():
        return int(float(label))
    if isinstance(label, str):
        return label
    raise RecipeError(f"{place(index)} has the label {label!r}; a class must be a whole number, text, or true or false")
