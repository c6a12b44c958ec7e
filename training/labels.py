"""Class labels of a data set's rows, of images and bags alike: of one kind, or refused by row."""

from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
from recipe import RecipeError


def as_classes(labels: Iterable[Any], place: Callable[[int], str]) -> list[Any]:
    """Labels as plain values that compare: whole numbers, truth values or text, all of one kind.

    A whole float, as pandas has where a label is missing elsewhere, is the whole number.

    Args:
        place: How a message names a row by its index, such as "bag 3 of FILE".

    Raises:
        RecipeError: For a label that is missing (`None`, nan or blank), is no class (0.5, a date), or of another kind than the first one's,
            and for a list of labels, even of one; naming the row.
    """
    classes = [_as_class(label, index, place) for index, label in enumerate(labels)]
    for index, label in enumerate(classes):
        if type(label) is not type(classes[0]):
            raise RecipeError(f"{place(index)} has the label {label!r}, and {place(0)} has {classes[0]!r}; labels must be of one kind")
    return classes


def _as_class(label: Any, index: int, place: Callable[[int], str]) -> Any:
    if isinstance(label, (list, tuple, np.ndarray)) and np.ndim(label) > 0:
        raise RecipeError(f"{place(index)} has a list of labels, {list(label)}; a recipe takes one class, not in a list")
    if isinstance(label, np.ndarray):
        label = label.item()
    if label is None or label != label or (isinstance(label, str) and not label.strip()):
        raise RecipeError(f"{place(index)} has no label; leave such rows out")
    if isinstance(label, (bool, np.bool_)):
        return bool(label)
    if isinstance(label, Integral):
        return int(label)
    if isinstance(label, Real) and float(label).is_integer():
        return int(float(label))
    if isinstance(label, str):
        return label
    raise RecipeError(f"{place(index)} has the label {label!r}; a class is a whole number, text, or true or false")
