"""Feature extractor of UHopMIL: ragged bags in, standardised and padded tensors out."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin

from .bag_arrays import as_arrays, blocks, channels_first, check_finite, is_one_bag


try:
    from sklearn.decomposition import PCA
except ImportError:
    PCA = None


# The columns that transformers' collators take labels from.
_LABELS = ("label", "labels", "label_ids")


class UHopMILFeatureExtractor(FeatureExtractionMixin):
    r"""
    Turns bags into what a UHopMIL model takes, and is saved beside it as `preprocessor_config.json`.

    Call `fit` on training bags, and on no others: it measures mean and standard deviation of each feature (of each channel, where
    instances are images), and principal components where they are asked for. A feature that is constant in training becomes 0.

    A bag is a set of vectors (instances, features) or of images (instances, channels, height, width): an array, a tensor, nested lists or
    a DataFrame, of any real dtype. Values are read in float32, or in float64 where they have more digits; means and deviations are
    float64. Two other layouts are recognised: images (instances, height, width, channels), and vectors that were saved as
    (1, instances, features), once `fit` has seen vectors.

    Args:
        standardize (`bool`, defaults to `True`): Whether features are shifted and scaled to mean 0 and standard deviation 1.
        clip (`float`, *optional*, defaults to 5): Standardised values are clipped to [-clip, clip]; `None` for no clipping.
        num_components (`int`, *optional*): Number of principal components that replace the features, divided by the first one's standard
            deviation so that they stay of order 1; `None` to keep the features. For vectors only; needs scikit-learn to fit.
        mean, scale, components, component_mean, feature_names, image_size: What `fit` measured.

    Raises:
        ValueError: For a clip that is not positive, or fewer than one component.

    >>> import numpy as np
    >>> from modeling_uhop import UHopMILFeatureExtractor

    >>> bags = [np.random.randn(3, 5), np.random.randn(7, 5)]
    >>> extractor = UHopMILFeatureExtractor().fit(bags)
    >>> {name: tuple(tensor.shape) for name, tensor in extractor(bags, return_tensors="pt").items()}
    {'instances': (2, 7, 5), 'attention_mask': (2, 7)}
    """

    model_input_names = ["instances", "attention_mask"]

    def __init__(
        self,
        standardize: bool = True,
        clip: float | None = 5.0,
        num_components: int | None = None,
        mean: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        components: Sequence[Sequence[float]] | None = None,
        component_mean: Sequence[float] | None = None,
        feature_names: Sequence[str] | None = None,
        image_size: Sequence[int] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None, got {clip}")
        if num_components is not None and num_components < 1:
            raise ValueError(f"num_components must be at least 1, or None, got {num_components}")
        self.standardize = standardize
        self.clip = clip
        self.num_components = num_components
        self.mean = _array(mean)
        self.scale = _array(scale)
        self.components = _array(components)
        self.component_mean = _array(component_mean)
        self.feature_names = None if feature_names is None else list(feature_names)
        self.image_size = None if image_size is None else list(image_size)

    @property
    def num_features(self) -> int | None:
        """Features, or channels, that a bag must have; `None` before `fit`."""
        return None if self.mean is None else len(self.mean)

    @property
    def instance_dim(self) -> int | None:
        """Width of the vectors that the model gets: its configuration's `instance_dim`; `None` before `fit`."""
        return self.num_features if self.components is None else len(self.components)

    @property
    def takes_vectors(self) -> bool:
        """Whether `fit` has seen vectors, and not images."""
        return self.image_size == []

    def fit(self, bags: Sequence[Any]) -> "UHopMILFeatureExtractor":
        """Measure the training bags; the extractor itself.

        Bags of vectors that were all saved as (1, instances, features) are read as such if their numbers of instances differ. Otherwise
        they could be images.

        Raises:
            ValueError: For bags that differ in their features, entries that are not finite, or no instance at all; naming the bag.
        """
        bags = bags if hasattr(bags, "columns") or getattr(bags, "ndim", 1) != 1 else _without_leading_axis(list(bags))
        if is_one_bag(bags):
            raise ValueError(
                "fit takes a list of bags, arrays (instances, features) or (instances, channels, height, width); got " + _one_bag(bags)
            )
        bags = list(bags)
        columns = next((bag.columns for bag in bags if hasattr(bag, "columns")), None)
        names = None if columns is None else [str(name) for name in columns]
        arrays = as_arrays(bags, feature_names=names, arrange=channels_first)
        count, shape = sum(map(len, arrays)), arrays[0].shape[1:]
        if count == 0:
            raise ValueError("there is no instance to fit on")
        self._check_components(count, shape)
        fitted = copy.copy(self)
        fitted.mean, fitted.scale = _mean_and_scale(arrays) if self.standardize else (np.zeros(shape[0]), np.ones(shape[0]))
        fitted.components = fitted.component_mean = None
        fitted.feature_names, fitted.image_size = names, list(shape[1:])
        if self.num_components is not None:
            fitted._fit_components(arrays)
        vars(self).update(vars(fitted))
        return self

    def _check_components(self, count: int, shape: tuple[int, ...]) -> None:
        if self.num_components is None:
            return
        if PCA is None:
            raise ImportError("num_components needs scikit-learn to fit")
        if len(shape) != 1:
            raise ValueError("num_components is for vectors, and these instances are images")
        if self.num_components > min(count, *shape):
            raise ValueError(
                f"num_components must be at most the {min(count, *shape)} that {count} instances of {shape[0]} features have, "
                f"got {self.num_components}"
            )

    def _fit_components(self, arrays: list[np.ndarray]) -> None:
        pca = PCA(self.num_components, svd_solver="full")
        with np.errstate(over="ignore", invalid="ignore"):
            pca.fit(np.concatenate([self._standardized(array) for array in arrays]))
        if not np.isfinite(pca.explained_variance_).all():
            raise _overflow(arrays)
        self.component_mean = pca.mean_
        self.components = pca.components_ / np.sqrt(max(pca.explained_variance_[0], np.finfo(float).tiny))

    def _standardized(self, rows: np.ndarray) -> np.ndarray:
        assert self.mean is not None
        assert self.scale is not None
        # A channel's mean and scale are those of all of its pixels; a constant feature divided by infinity becomes 0.
        mean, scale = (values.reshape(-1, *(1,) * (rows.ndim - 2)) for values in (self.mean, np.where(self.scale > 0, self.scale, np.inf)))
        with np.errstate(over="ignore", invalid="ignore"):
            standardized = np.subtract(rows, mean, dtype=np.float64)
            standardized /= scale
        if self.clip is not None and self.standardize:
            standardized.clip(-self.clip, self.clip, out=standardized)
        return standardized

    def _write(self, index: int, array: np.ndarray, out: np.ndarray) -> None:
        """Transform a bag into float32 `out`, a block at a time."""
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in blocks(array):
                block = self._standardized(array[rows])
                out[rows] = block if self.components is None else (block - self.component_mean) @ self.components.T
        check_finite(index, out, " in float32 when they are transformed")

    def arrays(self, bags: Sequence[Any]) -> list[np.ndarray]:
        """Bags as float32 or float64 arrays that are not yet transformed; raises what `transform` does."""
        if self.mean is None:
            raise ValueError("the extractor knows no mean and scale yet: call fit on the training bags")
        arrays = as_arrays(
            bags,
            num_features=len(self.mean),
            feature_names=self.feature_names,
            empty_shape=(len(self.mean), *(self.image_size or ())),
            arrange=self._arranged,
        )
        size = self.image_size
        for index, array in enumerate(arrays):
            if size is not None and array.ndim != 2 + len(size):
                given, fitted = ("images", "vectors") if self.takes_vectors else ("vectors", "images")
                raise ValueError(f"bag {index} has {given}, and the extractor was fitted on {fitted}; its shape is {array.shape}")
        return arrays

    def _arranged(self, array: np.ndarray) -> np.ndarray:
        if self.takes_vectors and array.ndim == 3 and len(array) == 1 and array.shape[2] == self.num_features:
            return array[0]
        last = array.ndim == 4 and not self.takes_vectors and array.shape[1] != self.num_features == array.shape[3]
        return np.moveaxis(array, 3, 1) if last else array

    def transform(self, bags: Sequence[Any]) -> list[np.ndarray]:
        """Each bag standardised and projected, float32, of its own length.

        Raises:
            ValueError: If the extractor was not fitted, or for a bag with other features, or with entries that are not finite, now or after
                the transformation; naming the bag.
        """
        arrays = self.arrays(bags)
        transformed = [np.empty((len(array), *self._instance_shape(array)), dtype=np.float32) for array in arrays]
        for index, (array, out) in enumerate(zip(arrays, transformed, strict=True)):
            self._write(index, array, out)
        return transformed

    def _instance_shape(self, array: np.ndarray) -> tuple[int, ...]:
        return array.shape[1:] if self.components is None else (len(self.components),)

    def padded(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """What `__call__` makes of bags that `arrays` has checked: `instances` and `attention_mask`."""
        return _padded(arrays, self._instance_shape(arrays[0]), self._write)

    def __call__(self, bags: Any, return_tensors: str | None = None, padding: bool = True) -> BatchFeature:
        """Transform bags and pad them to the longest.

        Args:
            bags: A list of bags: arrays, tensors or lists (instances, features), images (instances, channels, height, width), or DataFrames
                with a row for each instance. A single bag is taken for a list of one. A bag may be empty.
            return_tensors: "pt" for torch, "np" or `None` for NumPy.
            padding: `False` for lists of unpadded arrays.

        Returns:
            `instances` (B, N, ...) and `attention_mask` (B, N), 1 where there is an instance.
        """
        bags = [bags] if is_one_bag(bags, vectors=self.takes_vectors) else bags
        if not padding:
            transformed = self.transform(bags)
            return BatchFeature({"instances": transformed, "attention_mask": [np.ones(len(bag), dtype=np.int64) for bag in transformed]})
        return BatchFeature(self.padded(self.arrays(bags)), tensor_type=return_tensors)


def _overflow(arrays: list[np.ndarray]) -> ValueError:
    largest = max(range(len(arrays)), key=lambda index: np.abs(arrays[index]).max(initial=0.0))
    return ValueError(f"bag {largest} has entries whose squares overflow in float64, so that they have no standard deviation")


def _mean_and_scale(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over all bags, in float64; the deviation of a constant feature is exactly 0."""
    parts = [(array, rows) for array in arrays for rows in blocks(array)]
    axes = (0, *range(2, arrays[0].ndim))
    first = parts[0][0][:1].mean(axes, keepdims=True, dtype=np.float64)
    count = sum(array.size for array in arrays) // first.size
    with np.errstate(over="ignore", invalid="ignore"):
        # Sums of differences from a value of the feature are exact for features far from zero too.
        mean = first + sum((array[rows] - first).sum(axes, keepdims=True) for array, rows in parts) / count
        variance = sum(np.square(array[rows] - mean).sum(axes) for array, rows in parts) / count
    if not np.isfinite(variance).all():
        raise _overflow(arrays)
    # Rounding leaves a little spread in a constant feature.
    highest = np.max([array[rows].max(axes) for array, rows in parts], axis=0)
    lowest = np.min([array[rows].min(axes) for array, rows in parts], axis=0)
    return mean.reshape(-1), np.where(highest > lowest, np.sqrt(variance), 0.0)


def _without_leading_axis(bags: list[Any]) -> list[Any]:
    """Vectors that were all saved as (1, instances, features) without that axis. No images (channels, height, width) of a bag differ in
    their size."""
    saved = all(getattr(bag, "ndim", 0) == 3 and bag.shape[0] == 1 for bag in bags)
    return [bag[0] for bag in bags] if saved and len({bag.shape[1] for bag in bags}) > 1 else bags


def _one_bag(bags: Any) -> str:
    """What was given instead of bags, and what to pass."""
    if hasattr(bags, "columns"):
        return "one DataFrame, which is a single bag: pass [bag]"
    first = np.shape(bags[0])
    if len(first) == 3 and first[0] == 1:
        return (
            f"entries of one shape {first}: of vectors saved as (1, instances, features) pass [bag[0] for bag in bags], "
            "and of one bag of images with one channel pass [bag]"
        )
    kind = "vectors" if len(first) == 1 else "images"
    return f"{kind} of shape {first}, which make a single bag: pass [bag]"


def _as_labels(labels: list[Any]) -> torch.Tensor:
    """One label of each bag, (B,), as integers if all are, else as floats; or several of each, floats (B, num_labels)."""
    stacked: list[torch.Tensor] = []
    for index, label in enumerate(labels):
        try:
            # An array of objects may hold numbers.
            array = label if isinstance(label, torch.Tensor) else np.asarray(label)
            array = np.asarray(array.tolist()) if array.dtype == object else array
            tensor = array.detach().cpu().to_dense() if isinstance(array, torch.Tensor) else torch.tensor(array)
        except (TypeError, ValueError):
            tensor = None
        if tensor is not None and tensor.shape == (1,):
            tensor = tensor[0]
        if tensor is None or tensor.is_complex() or tensor.dim() > 1 or (stacked and tensor.shape != stacked[0].shape):
            hint = "; config.label2id has the class index of a name" if isinstance(label, str) else ""
            raise ValueError(f"bag {index} of the batch has a label that is no number, or not shaped like the first one's: {label!r}{hint}")
        tensor = tensor.float() if tensor.is_floating_point() or tensor.dim() > 0 else tensor.long()
        if not tensor.isfinite().all():
            raise ValueError(f"bag {index} of the batch has a label that is missing or not finite in float32: {label!r}")
        stacked.append(tensor)
    floats = any(tensor.is_floating_point() for tensor in stacked)
    return torch.stack([tensor.float() if floats else tensor for tensor in stacked])


def _array(values: Any) -> np.ndarray | None:
    return None if values is None else np.asarray(values, dtype=np.float64)


def _padded(
    arrays: list[np.ndarray], shape: tuple[int, ...], write: Callable[[int, np.ndarray, np.ndarray], None]
) -> dict[str, np.ndarray]:
    """`instances` (B, N, *shape), into which `write` puts each array at its index, and `attention_mask` (B, N)."""
    lengths = np.array([len(array) for array in arrays])
    instances = np.zeros((len(arrays), lengths.max(), *shape), dtype=np.float32)
    for index, array in enumerate(arrays):
        write(index, array, instances[index, : len(array)])
    return {"instances": instances, "attention_mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)}


def _copy(index: int, array: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        out[:] = array
    check_finite(index, out, " in float32")


@dataclass
class DataCollatorForBags:
    """Makes a batch of a model's inputs from examples `{"instances": bag, "label": class}`; other columns are left out.

    Whole floats stay floats, as a batch does not tell classes from numbers of a regression. The models take them for classes. The Trainer's
    `label_smoothing_factor`, which computes the loss without the model, needs integers.

    Args:
        feature_extractor: A fitted `UHopMILFeatureExtractor`, or `None` for bags that went through its `transform`, which are padded only.
        max_instances: Bags with more instances are reduced to this many; `None` for no limit.
        selection: Which ones: "random" (drawn anew each time, from torch's random state), "first", or "spread" (evenly over the bag).

    The Trainer batches bags of similar length with `TrainingArguments(train_sampling_strategy="group_by_length")`, given a feature
    extractor as its `processing_class` or a column `length`. It evaluates through the same collator: "random" makes that random too.

    Raises:
        ValueError: If `max_instances` is below 1, `selection` is unknown, or some examples have a label and others not.
    """

    feature_extractor: UHopMILFeatureExtractor | None = None
    max_instances: int | None = None
    selection: str = "random"

    def __post_init__(self):
        if self.max_instances is not None and self.max_instances < 1:
            raise ValueError(f"max_instances must be at least 1, or None, got {self.max_instances}")
        if self.selection not in ("random", "first", "spread"):
            raise ValueError(f"selection must be one of ('random', 'first', 'spread'), got {self.selection!r}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        bags, extractor = [example["instances"] for example in examples], self.feature_extractor
        arrays = [self._reduced(array) for array in (as_arrays(bags) if extractor is None else extractor.arrays(bags))]
        padded = _padded(arrays, arrays[0].shape[1:], _copy) if extractor is None else extractor.padded(arrays)
        batch = {name: torch.from_numpy(array) for name, array in padded.items()}
        labels = [next((example[name] for name in _LABELS if example.get(name) is not None), None) for example in examples]
        unlabelled = [index for index, label in enumerate(labels) if label is None]
        if 0 < len(unlabelled) < len(labels):
            raise ValueError(f"bag {unlabelled[0]} of the batch has no label, and others have")
        if not unlabelled:
            batch["labels"] = _as_labels(labels)
        return batch

    def _reduced(self, bag: np.ndarray) -> np.ndarray:
        count, limit = len(bag), self.max_instances
        if limit is None or count <= limit:
            return bag
        if self.selection == "random":
            return bag[torch.randperm(count)[:limit].sort().values.numpy()]
        return bag[:limit] if self.selection == "first" else bag[np.linspace(0, count - 1, limit).round().astype(int)]


__all__ = ["DataCollatorForBags", "UHopMILFeatureExtractor"]
