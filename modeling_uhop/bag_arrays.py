"""Bags as a user has them, as NumPy arrays: read in one way by the extractor, the collator, the pipeline and the recipes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


# Entries of a bag that are handled at a time, because copies of a whole bag in float64 would take several times its memory.
_BLOCK = 2**18


def is_one_bag(bags: Any, *, vectors: bool = False) -> bool:
    """Whether this is one bag: a DataFrame, an array with 2 axes (or 4, of images, unless `vectors`), or lists nested so deep."""
    return hasattr(bags, "columns") or _depth(bags) in ((2,) if vectors else (2, 4))


def _depth(entry: Any) -> int:
    if isinstance(entry, np.ndarray) and entry.dtype == object and entry.size > 0:
        return entry.ndim + _depth(entry.flat[0])
    if hasattr(entry, "ndim"):
        return entry.ndim
    return 1 + _depth(entry[0]) if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) > 0 else 0


def as_arrays(
    bags: Sequence[Any],
    *,
    num_features: int | None = None,
    feature_names: list[str] | None = None,
    empty_shape: tuple[int, ...] | None = None,
    arrange: Callable[[np.ndarray], np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Bags as arrays whose instances have one shape, in float32, or in float64 where the values need it; without a copy where that can be.

    Args:
        num_features, feature_names: What every bag must have.
        empty_shape: The shape of the instances of an empty bag, if all are empty.
        arrange: Applied to each array before its shape is checked.

    Raises:
        ValueError: For bags that differ from each other or from what is asked for, or are not finite; naming the bag.
    """
    arrays = []
    first, shape = 0, None
    for index, bag in enumerate(bags):
        array = _as_array(index, bag, feature_names)
        array = array if arrange is None else arrange(array)
        if len(array) > 0:
            if array.ndim not in (2, 4):
                saved = (
                    f"; of vectors saved as (1, instances, features) pass bag[{index}][0]" if array.ndim == 3 and len(array) == 1 else ""
                )
                raise ValueError(
                    f"bag {index} must have shape (instances, features), or (instances, channels, height, width), got {array.shape}{saved}"
                )
            if shape is None:
                first, shape = index, array.shape[1:]
            if array.shape[1:] != shape:
                raise ValueError(f"bag {index} has instances of shape {array.shape[1:]}, and bag {first} of {shape}")
            if num_features not in (None, array.shape[1]):
                raise ValueError(
                    f"bag {index} has {array.shape[1]} features, and the extractor was fitted on {num_features}; its shape is {array.shape}"
                )
            check_finite(index, array)
        arrays.append(array)
    if not arrays:
        raise ValueError("there are no bags")
    filled = shape or empty_shape or (0,)
    return [array if len(array) > 0 else np.zeros((0, *filled)) for array in arrays]


def _as_array(index: int, bag: Any, feature_names: list[str] | None) -> np.ndarray:
    columns = getattr(bag, "columns", None)
    if columns is not None and feature_names is not None and [str(name) for name in columns] != feature_names:
        raise ValueError(f"bag {index} must have the columns {feature_names}, in this order, got {list(columns)}")
    try:
        array = _numbers(bag)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"bag {index} is not numbers of one shape for every instance: {error}") from error
    if array.ndim == 0:
        raise ValueError(f"bag {index} must be a set of instances, got {bag!r}")
    return array


def _numbers(bag: Any) -> np.ndarray:
    """Real numbers of any kind of array as float32, or as float64 where float32 does not have all of their dtype's values."""
    if isinstance(bag, (list, tuple)) and any(isinstance(row, torch.Tensor) for row in bag):
        bag = torch.stack([torch.as_tensor(row) for row in bag])
    if isinstance(bag, torch.Tensor):
        if bag.is_meta:
            raise ValueError("a tensor on the meta device has no values")
        bag = bag.detach().cpu().to_dense()
        # NumPy has no bfloat16 and no 8-bit floats.
        array = (bag.float() if bag.is_floating_point() and bag.dtype != torch.float64 else bag).numpy()
    elif isinstance(bag, np.ma.MaskedArray):
        array = np.ma.filled(bag.astype(np.float64), np.nan)
    else:
        array = np.asarray(bag.toarray() if hasattr(bag, "toarray") else bag)
    if array.dtype.kind in "OUS":
        # A DataFrame with missing values, or an array of rows.
        array = np.asarray(bag.astype(np.float64) if hasattr(bag, "iloc") and array.ndim == 2 else array.tolist(), dtype=np.float64)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"got {array.dtype}")
    return array.astype(np.result_type(array.dtype, np.float32) if array.dtype != np.longdouble else np.float64, copy=False)


def channels_first(array: np.ndarray) -> np.ndarray:
    """Pictures (instances, height, width, channels) with their channels first: a last axis of 1, 3 or 4 after two larger ones, of which
    the first could be no channels."""
    if array.ndim != 4 or array.shape[3] not in (1, 3, 4) or array.shape[1] in (1, 3, 4) or min(array.shape[1:3]) <= array.shape[3]:
        return array
    return np.moveaxis(array, 3, 1)


def blocks(array: np.ndarray) -> list[slice]:
    """Slices of a bag's rows, of about `_BLOCK` entries each."""
    size = max(1, _BLOCK // max(1, math.prod(array.shape[1:])))
    return [slice(start, start + size) for start in range(0, len(array), size)]


def check_finite(index: int, array: np.ndarray, when: str = "") -> None:
    """A `ValueError` that names the first instance of a bag with an entry that is not finite."""
    for rows in blocks(array):
        bad = np.flatnonzero(~np.isfinite(array[rows]).reshape(len(array[rows]), -1).all(1))
        if len(bad) > 0:
            raise ValueError(f"bag {index} has entries that are not finite{when}, first in its instance {rows.start + bad[0]}")


__all__ = ["as_arrays", "blocks", "channels_first", "check_finite", "is_one_bag"]
