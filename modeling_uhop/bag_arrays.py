"""Convert bags from what users have (arrays, tensors, lists, DataFrames) into NumPy arrays.

The feature extractor, the collator, the pipeline and the recipes all read bags through this module.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


# Because float64 copies of a whole bag would need several times its memory, we process a bag in
# blocks of about this many entries.
_BLOCK = 2**18


def is_one_bag(bags: Any, *, vectors: bool = False) -> bool:
    """Whether the input is a single bag and not a list of bags.

    A single bag is a DataFrame, an array with 2 axes (or 4, for images, unless `vectors`), or lists
    with the same depth of nesting.
    """
    return hasattr(bags, "columns") or _depth(bags) in ((2,) if vectors else (2, 4))


def _depth(entry: Any) -> int:
    """Number of axes of an array, or depth of nested lists."""
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
    """Convert bags into float arrays whose instances all have one shape.

    Arrays are float32, or float64 if the values need it. They are not copied where that can be
    avoided.

    Args:
        bags: The bags; see `UHopMILFeatureExtractor` for the accepted kinds.
        num_features: Number of features that every bag must have; `None` accepts any number.
        feature_names: Column names that every DataFrame must have, in this order.
        empty_shape: Shape of an instance, for the case that all bags are empty.
        arrange: Function applied to each array before its shape is checked.

    Returns:
        One array per bag.

    Raises:
        ValueError: If there is no bag, or if a bag differs from the others or from what is
            required, or is not finite. The message names the bag.
    """
    arrays = []
    first, shape = 0, None
    for index, bag in enumerate(bags):
        array = _as_array(index, bag, feature_names)
        array = array if arrange is None else arrange(array)
        if len(array) > 0:
            if array.ndim not in (2, 4):
                saved = (
                    f"; if vectors were saved as (1, instances, features), pass bag[{index}][0]"
                    if array.ndim == 3 and len(array) == 1
                    else ""
                )
                raise ValueError(
                    f"bag {index} must have shape (instances, features), or (instances, channels, height, width), got {array.shape}{saved}"
                )
            if shape is None:
                first, shape = index, array.shape[1:]
            if array.shape[1:] != shape:
                raise ValueError(f"bag {index} has instances of shape {array.shape[1:]}, but bag {first} has {shape}")
            if num_features not in (None, array.shape[1]):
                raise ValueError(
                    f"bag {index} has {array.shape[1]} features, but the extractor was fitted on {num_features}; its shape is {array.shape}"
                )
            check_finite(index, array)
        arrays.append(array)
    if not arrays:
        raise ValueError("at least one bag is needed, got none")
    filled = shape or empty_shape or (0,)
    return [array if len(array) > 0 else np.zeros((0, *filled)) for array in arrays]


def _as_array(index: int, bag: Any, feature_names: list[str] | None) -> np.ndarray:
    """Convert one bag into an array, with its number in every error."""
    columns = getattr(bag, "columns", None)
    if columns is not None and feature_names is not None and [str(name) for name in columns] != feature_names:
        raise ValueError(f"bag {index} must have the columns {feature_names}, in this order, got {list(columns)}")
    try:
        array = _numbers(bag)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"bag {index} must consist of numbers, with one shape for every instance: {error}") from error
    if array.ndim == 0:
        raise ValueError(f"bag {index} must be a set of instances, got {bag!r}")
    return array


def _numbers(bag: Any) -> np.ndarray:
    """Convert real numbers to float32, or to float64 if float32 cannot hold their dtype."""
    if isinstance(bag, (list, tuple)) and any(isinstance(row, torch.Tensor) for row in bag):
        bag = torch.stack([torch.as_tensor(row) for row in bag])
    if isinstance(bag, torch.Tensor):
        if bag.is_meta:
            raise ValueError("got a tensor on the meta device, which has no values")
        bag = bag.detach().cpu().to_dense()
        # Because NumPy has no bfloat16 and no 8-bit floats, we convert through float32.
        array = (bag.float() if bag.is_floating_point() and bag.dtype != torch.float64 else bag).numpy()
    elif isinstance(bag, np.ma.MaskedArray):
        array = np.ma.filled(bag.astype(np.float64), np.nan)
    else:
        array = np.asarray(bag.toarray() if hasattr(bag, "toarray") else bag)
    if array.dtype.kind in "OUS":
        # Because DataFrames with missing values and arrays of rows have an object dtype, we convert
        # them to float64.
        array = np.asarray(bag.astype(np.float64) if hasattr(bag, "iloc") and array.ndim == 2 else array.tolist(), dtype=np.float64)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"got dtype {array.dtype}, which is not a real number type")
    return array.astype(np.result_type(array.dtype, np.float32) if array.dtype != np.longdouble else np.float64, copy=False)


def channels_first(array: np.ndarray) -> np.ndarray:
    """Move the channels of images (instances, height, width, channels) to the front.

    An array is read as such images if it has 4 axes, its last axis has length 1, 3 or 4, and the
    two axes before it are longer. Its second axis must not be a possible number of channels.
    """
    if array.ndim != 4 or array.shape[3] not in (1, 3, 4) or array.shape[1] in (1, 3, 4) or min(array.shape[1:3]) <= array.shape[3]:
        return array
    return np.moveaxis(array, 3, 1)


def blocks(array: np.ndarray) -> list[slice]:
    """Slices of the rows of a bag with about `_BLOCK` entries each."""
    size = max(1, _BLOCK // max(1, math.prod(array.shape[1:])))
    return [slice(start, start + size) for start in range(0, len(array), size)]


def check_finite(index: int, array: np.ndarray, when: str = "") -> None:
    """Raise a `ValueError` that names the first instance of a bag with an infinite or NaN entry."""
    for rows in blocks(array):
        bad = np.flatnonzero(~np.isfinite(array[rows]).reshape(len(array[rows]), -1).all(1))
        if len(bad) > 0:
            raise ValueError(f"bag {index} has entries that are not finite{when}, first in its instance {rows.start + bad[0]}")


def without_leading_axis(bags: list[Any]) -> list[Any]:
    """Remove the first axis if all bags were saved as (1, instances, features).

    Bags of different lengths cannot be the images (channels, height, width) of one bag, because
    those have one size.
    """
    saved = all(getattr(bag, "ndim", 0) == 3 and bag.shape[0] == 1 for bag in bags)
    return [bag[0] for bag in bags] if saved and len({bag.shape[1] for bag in bags}) > 1 else bags


def describe_one_bag(bags: Any) -> str:
    """Say for an error what was given instead of a list of bags, and what to pass."""
    if hasattr(bags, "columns"):
        return "one DataFrame, which is a single bag: pass [bag]"
    first = np.shape(bags[0])
    if len(first) == 3 and first[0] == 1:
        return (
            f"entries of one shape {first}: for vectors saved as (1, instances, features) pass [bag[0] for bag in bags], "
            "for a single bag of images with one channel pass [bag]"
        )
    kind = "vectors" if len(first) == 1 else "images"
    return f"{kind} of shape {first}, which make a single bag: pass [bag]"


def padded(arrays: list[np.ndarray], shape: tuple[int, ...], write: Callable[[int, np.ndarray, np.ndarray], None]) -> dict[str, np.ndarray]:
    """Build `instances` (B, N, *shape) and `attention_mask` (B, N).

    `write` writes each array into its place.
    """
    lengths = np.array([len(array) for array in arrays])
    instances = np.zeros((len(arrays), lengths.max(), *shape), dtype=np.float32)
    for index, array in enumerate(arrays):
        write(index, array, instances[index, : len(array)])
    return {"instances": instances, "attention_mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)}


def copy_bag(index: int, array: np.ndarray, out: np.ndarray) -> None:
    """Copy a bag into the float32 array `out`."""
    with np.errstate(over="ignore"):
        out[:] = array
    check_finite(index, out, " in float32")
