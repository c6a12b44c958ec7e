"""Feature extractor of UHopMIL: standardize and pad bags."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, FeatureExtractionMixin

from .bag_arrays import as_arrays, blocks, channels_first, check_finite, describe_one_bag, is_one_bag, padded, without_leading_axis


try:
    from sklearn.decomposition import PCA
except ImportError:
    PCA = None


class UHopMILFeatureExtractor(FeatureExtractionMixin):
    r"""Convert bags of any length into the padded tensors that a UHopMIL model takes.

    The extractor is saved beside the model as `preprocessor_config.json`. Call `fit` on training
    bags only. `fit` measures mean and standard deviation of each feature (for images: of each
    channel), and principal components if requested. With mean $m$ and standard deviation $s$, a
    standardized feature is

    $$
    z = \mathrm{clip}\left((x - m) / s, -c, c\right)
    $$

    A feature that is constant in the training bags becomes 0.

    A bag is a set of vectors (instances, features) or of images (instances, channels, height,
    width). It may be an array, a tensor, nested lists or a DataFrame, of any real dtype. Values are
    read in float32, or in float64 if they have more digits; means and deviations are float64. Two
    other layouts are recognized: images (instances, height, width, channels), and vectors that were
    saved as (1, instances, features), if `fit` has received vectors.

    Args:
        standardize (`bool`, defaults to `True`): Whether features are scaled to mean 0 and standard
            deviation 1.
        clip (`float`, *optional*, defaults to 5): Limit $c$: standardized values are clipped to
            [-clip, clip]. `None` means no clipping.
        num_components (`int`, *optional*): Number of principal components that replace the
            features, at least 1. They are divided by the standard deviation of the first component,
            so that they stay of order 1. `None` keeps the features. Only for vectors; `fit` then
            needs scikit-learn.
        mean (`list`, *optional*): Mean of each feature; measured by `fit`, as are all arguments
            below.
        scale (`list`, *optional*): Standard deviation of each feature.
        components (`list`, *optional*): The principal components.
        component_mean (`list`, *optional*): Mean that is subtracted before the projection on the
            components.
        feature_names (`list`, *optional*): Column names, if the training bags were DataFrames.
        image_size (`list`, *optional*): Height and width of an image; an empty list for vectors.
        kwargs (Any): Further arguments of `FeatureExtractionMixin`.

    Raises:
        ValueError: If `clip` is not positive, or `num_components` is below 1.

    Examples:
        >>> import numpy as np
        >>> from modeling_uhop import UHopMILFeatureExtractor

        >>> bags = [np.random.randn(3, 5), np.random.randn(7, 5)]
        >>> extractor = UHopMILFeatureExtractor().fit(bags)
        >>> {name: tuple(tensor.shape) for name, tensor in extractor(bags, return_tensors="pt").items()}
        {'instances': (2, 7, 5), 'attention_mask': (2, 7)}
    """

    model_input_names = ["instances", "attention_mask"]
    _auto_class = "AutoFeatureExtractor"

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
        """Number of features (or channels) that a bag must have; `None` before `fit`."""
        return None if self.mean is None else len(self.mean)

    @property
    def instance_dim(self) -> int | None:
        """Width of the vectors for the model (its `instance_dim`); `None` before `fit`."""
        return self.num_features if self.components is None else len(self.components)

    @property
    def takes_vectors(self) -> bool:
        """Whether `fit` has received vectors and not images."""
        return self.image_size == []

    def fit(self, bags: Sequence[Any]) -> "UHopMILFeatureExtractor":
        """Measure the training bags.

        Vectors saved as (1, instances, features) are recognized if all bags were saved so and their
        numbers of instances differ; otherwise they could be images.

        Args:
            bags: The training bags.

        Returns:
            The extractor itself.

        Raises:
            ValueError: If bags differ in their features, an entry is not finite, or there is no
                instance at all. The message names the bag.
            ImportError: If `num_components` is set and scikit-learn is not installed.
        """
        bags = bags if hasattr(bags, "columns") or getattr(bags, "ndim", 1) != 1 else without_leading_axis(list(bags))
        if is_one_bag(bags):
            raise ValueError(
                "fit needs a list of bags (instances, features) or (instances, channels, height, width), got " + describe_one_bag(bags)
            )
        bags = list(bags)
        columns = next((bag.columns for bag in bags if hasattr(bag, "columns")), None)
        names = None if columns is None else [str(name) for name in columns]
        arrays = as_arrays(bags, feature_names=names, arrange=channels_first)
        count, shape = sum(map(len, arrays)), arrays[0].shape[1:]
        if count == 0:
            raise ValueError("fit needs at least one instance, got only empty bags")
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
        """Check that `num_components` fits the training bags."""
        if self.num_components is None:
            return
        if PCA is None:
            raise ImportError("fit with num_components needs scikit-learn; install it with pip install scikit-learn")
        if len(shape) != 1:
            raise ValueError("num_components needs vectors, got images; set num_components=None")
        if self.num_components > min(count, *shape):
            raise ValueError(
                f"num_components must be at most {min(count, *shape)} for {count} instances of {shape[0]} features, "
                f"got {self.num_components}"
            )

    def _fit_components(self, arrays: list[np.ndarray]) -> None:
        """Measure the principal components of the standardized instances."""
        pca = PCA(self.num_components, svd_solver="full")
        with np.errstate(over="ignore", invalid="ignore"):
            pca.fit(np.concatenate([self._standardized(array) for array in arrays]))
        if not np.isfinite(pca.explained_variance_).all():
            raise _overflow(arrays)
        self.component_mean = pca.mean_
        self.components = pca.components_ / np.sqrt(max(pca.explained_variance_[0], np.finfo(float).tiny))

    def _standardized(self, rows: np.ndarray) -> np.ndarray:
        """Standardize instances, in float64."""
        assert self.mean is not None
        assert self.scale is not None
        # Because a constant feature must become 0, its scale 0 is replaced by infinity. The mean
        # and the scale of a channel are those of all its pixels.
        mean, scale = (values.reshape(-1, *(1,) * (rows.ndim - 2)) for values in (self.mean, np.where(self.scale > 0, self.scale, np.inf)))
        with np.errstate(over="ignore", invalid="ignore"):
            standardized = np.subtract(rows, mean, dtype=np.float64)
            standardized /= scale
        if self.clip is not None and self.standardize:
            standardized.clip(-self.clip, self.clip, out=standardized)
        return standardized

    def _write(self, index: int, array: np.ndarray, out: np.ndarray) -> None:
        """Transform a bag into the float32 array `out`, one block at a time."""
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in blocks(array):
                block = self._standardized(array[rows])
                out[rows] = block if self.components is None else (block - self.component_mean) @ self.components.T
        check_finite(index, out, " in float32 after the transformation")

    def arrays(self, bags: Sequence[Any]) -> list[np.ndarray]:
        """Check bags and return them as float arrays that are not yet transformed.

        Raises:
            ValueError: As `transform`.
        """
        if self.mean is None:
            raise ValueError("the extractor is not fitted: call fit on the training bags first")
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
                raise ValueError(f"bag {index} has {given}, but the extractor was fitted on {fitted}; its shape is {array.shape}")
        return arrays

    def _arranged(self, array: np.ndarray) -> np.ndarray:
        """Reorder the axes of a bag that was saved in another known layout."""
        if self.takes_vectors and array.ndim == 3 and len(array) == 1 and array.shape[2] == self.num_features:
            return array[0]
        last = array.ndim == 4 and not self.takes_vectors and array.shape[1] != self.num_features == array.shape[3]
        return np.moveaxis(array, 3, 1) if last else array

    def transform(self, bags: Sequence[Any]) -> list[np.ndarray]:
        """Standardize and project each bag, without padding.

        Args:
            bags: A list of bags.

        Returns:
            One float32 array per bag, each of its own length.

        Raises:
            ValueError: If the extractor is not fitted, if a bag has other features, or if an entry
                is not finite, before or after the transformation. The message names the bag.
        """
        arrays = self.arrays(bags)
        transformed = [np.empty((len(array), *self._instance_shape(array)), dtype=np.float32) for array in arrays]
        for index, (array, out) in enumerate(zip(arrays, transformed, strict=True)):
            self._write(index, array, out)
        return transformed

    def _instance_shape(self, array: np.ndarray) -> tuple[int, ...]:
        """Shape of a transformed instance."""
        return array.shape[1:] if self.components is None else (len(self.components),)

    def padded(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Transform and pad checked bags; return `instances` and `attention_mask`."""
        return padded(arrays, self._instance_shape(arrays[0]), self._write)

    def __call__(self, bags: Any, return_tensors: str | None = None, padding: bool = True) -> BatchFeature:
        """Transform bags and pad them to the length of the longest.

        Args:
            bags: A list of bags: arrays, tensors or lists (instances, features), images (instances,
                channels, height, width), or DataFrames with one row per instance. A single bag is
                treated as a list with one bag. A bag may be empty.
            return_tensors: "pt" for torch, "np" or `None` for NumPy.
            padding: `False` to return lists of arrays without padding.

        Returns:
            `instances` (B, N, ...), and `attention_mask` (B, N) with 1 where there is an instance.

        Raises:
            ValueError: As `transform`.
        """
        bags = [bags] if is_one_bag(bags, vectors=self.takes_vectors) else bags
        if not padding:
            transformed = self.transform(bags)
            return BatchFeature({"instances": transformed, "attention_mask": [np.ones(len(bag), dtype=np.int64) for bag in transformed]})
        return BatchFeature(self.padded(self.arrays(bags)), tensor_type=return_tensors)


def _overflow(arrays: list[np.ndarray]) -> ValueError:
    """Error for bags whose standard deviation overflows; names the bag of the largest entry."""
    largest = max(range(len(arrays)), key=lambda index: np.abs(arrays[index]).max(initial=0.0))
    return ValueError(
        f"bag {largest} has entries whose squares overflow in float64, so their standard deviation cannot be computed; scale them"
    )


def _mean_and_scale(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each feature over all bags, in float64.

    The standard deviation of a constant feature is exactly 0.
    """
    parts = [(array, rows) for array in arrays for rows in blocks(array)]
    axes = (0, *range(2, arrays[0].ndim))
    first = parts[0][0][:1].mean(axes, keepdims=True, dtype=np.float64)
    count = sum(array.size for array in arrays) // first.size
    with np.errstate(over="ignore", invalid="ignore"):
        # Because sums of values far from zero lose digits, we sum differences from one value of the
        # feature.
        mean = first + sum((array[rows] - first).sum(axes, keepdims=True) for array, rows in parts) / count
        variance = sum(np.square(array[rows] - mean).sum(axes) for array, rows in parts) / count
    if not np.isfinite(variance).all():
        raise _overflow(arrays)
    # Because rounding leaves a small deviation in a constant feature, we compare its minimum and
    # maximum.
    highest = np.max([array[rows].max(axes) for array, rows in parts], axis=0)
    lowest = np.min([array[rows].min(axes) for array, rows in parts], axis=0)
    return mean.reshape(-1), np.where(highest > lowest, np.sqrt(variance), 0.0)


def _array(values: Any) -> np.ndarray | None:
    """Convert a list to a float64 array; `None` stays `None`."""
    return None if values is None else np.asarray(values, dtype=np.float64)


__all__ = ["UHopMILFeatureExtractor"]
