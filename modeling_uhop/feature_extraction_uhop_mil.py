"""Feature extractor of UHopMIL: ragged bags in, standardised and padded tensors out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, FeatureExtractionMixin


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

    def fit(self, bags: Sequence[Any]) -> "UHopMILFeatureExtractor":
        """Measure the training bags; the extractor itself.

        Raises:
            ValueError: For bags that differ in their features, entries that are not finite, or no instance at all; naming the bag.
        """
        if is_one_bag(bags):
            raise ValueError(
                "fit takes a list of bags, arrays (instances, features) or (instances, channels, height, width); "
                "got a single bag, or bags of what is no array"
            )
        columns = getattr(bags[0], "columns", None) if len(bags) > 0 else None
        names = None if columns is None else [str(name) for name in columns]
        arrays = [array for array in as_arrays(bags, feature_names=names) if len(array) > 0]
        if not arrays:
            raise ValueError("there is no instance to fit on")
        rows = np.concatenate(arrays)
        if self.num_components is not None:
            self._check_components(rows)
        self.components = self.component_mean = None
        self.feature_names, self.image_size = names, list(rows.shape[2:])
        axes = (0,) if rows.ndim == 2 else (0, 2, 3)
        self.mean, self.scale = rows.mean(axes), rows.std(axes)
        # Rounding leaves a little spread in a constant column.
        self.scale[rows.max(axes) == rows.min(axes)] = 0.0
        if not self.standardize:
            self.mean, self.scale = np.zeros_like(self.mean), np.ones_like(self.scale)
        if self.num_components is not None:
            self._fit_components(rows)
        return self

    def _check_components(self, rows: np.ndarray) -> None:
        if PCA is None:
            raise ImportError("num_components needs scikit-learn to fit")
        if rows.ndim != 2:
            raise ValueError("num_components is for vectors, and these instances are images")
        if self.num_components > min(rows.shape):
            raise ValueError(
                f"num_components must be at most the {min(rows.shape)} that {rows.shape[0]} instances of {rows.shape[1]} features have, "
                f"got {self.num_components}"
            )

    def _fit_components(self, rows: np.ndarray) -> None:
        pca = PCA(self.num_components, svd_solver="full").fit(self._standardized(rows))
        self.component_mean = pca.mean_
        self.components = pca.components_ / np.sqrt(max(pca.explained_variance_[0], np.finfo(float).tiny))

    def _standardized(self, rows: np.ndarray) -> np.ndarray:
        assert self.mean is not None
        assert self.scale is not None
        # A channel's mean and scale are those of all of its pixels.
        mean, scale = (values.reshape(-1, *(1,) * (rows.ndim - 2)) for values in (self.mean, self.scale))
        standardized = np.divide(rows - mean, scale, out=np.zeros_like(rows), where=np.broadcast_to(scale > 0, rows.shape))
        return standardized if self.clip is None or not self.standardize else standardized.clip(-self.clip, self.clip)

    def transform(self, bags: Sequence[Any]) -> list[np.ndarray]:
        """Each bag standardised and projected, float32, of its own length.

        Raises:
            ValueError: If the extractor was not fitted, or for a bag with other features or entries that are not finite; naming the bag.
        """
        if self.mean is None:
            raise ValueError("the extractor knows no mean and scale yet: call fit on the training bags")
        empty = (len(self.mean), *(self.image_size or ()))
        arrays = as_arrays(bags, num_features=len(self.mean), feature_names=self.feature_names, empty_shape=empty)
        transformed = [self._standardized(array) for array in arrays]
        if self.components is not None:
            transformed = [(array - self.component_mean) @ self.components.T for array in transformed]
        return [array.astype(np.float32) for array in transformed]

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
        arrays = self.transform([bags] if is_one_bag(bags) else bags)
        masks = [np.ones(len(array), dtype=np.int64) for array in arrays]
        if not padding:
            return BatchFeature({"instances": arrays, "attention_mask": masks})
        data = {"instances": _padded(arrays), "attention_mask": _padded(masks)}
        return BatchFeature(data, tensor_type=return_tensors)


def is_one_bag(bags: Any) -> bool:
    """Whether this is a bag, and not several: a DataFrame, an array with 2 axes (4 for images), or lists nested so deep."""
    return hasattr(bags, "columns") or _depth(bags) in (2, 4)


def _depth(entry: Any) -> int:
    if hasattr(entry, "ndim"):
        return entry.ndim
    return 1 + _depth(entry[0]) if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) > 0 else 0


def as_arrays(
    bags: Sequence[Any],
    *,
    num_features: int | None = None,
    feature_names: list[str] | None = None,
    empty_shape: tuple[int, ...] | None = None,
) -> list[np.ndarray]:
    """Bags as float64 arrays whose instances have one shape; an empty one takes on `empty_shape`, by default that of the others.

    Raises:
        ValueError: For bags that differ from each other or from what is asked for, or are not finite; naming the bag.
    """
    if len(bags) == 0:
        raise ValueError("there are no bags")
    arrays = []
    first, shape = 0, None
    for index in range(len(bags)):
        array = _as_array(index, bags[index], feature_names)
        if len(array) > 0:
            if array.ndim not in (2, 4):
                raise ValueError(
                    f"bag {index} must have shape (instances, features), or (instances, channels, height, width), got {array.shape}"
                )
            if shape is None:
                first, shape = index, array.shape[1:]
            if array.shape[1:] != shape:
                raise ValueError(f"bag {index} has instances of shape {array.shape[1:]}, and bag {first} of {shape}")
            if num_features not in (None, array.shape[1]):
                raise ValueError(f"bag {index} has {array.shape[1]} features, and the extractor was fitted on {num_features}")
            bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
            if len(bad) > 0:
                raise ValueError(f"bag {index} has entries that are not finite, first in its instance {bad[0]}")
        arrays.append(array)
    filled = shape or empty_shape or (0,)
    return [array if len(array) > 0 else np.zeros((0, *filled)) for array in arrays]


def _as_array(index: int, bag: Any, feature_names: list[str] | None) -> np.ndarray:
    columns = getattr(bag, "columns", None)
    if columns is not None and feature_names is not None and [str(name) for name in columns] != feature_names:
        raise ValueError(f"bag {index} must have the columns {feature_names}, in this order, got {list(columns)}")
    try:
        array = bag.detach().cpu().double().numpy() if isinstance(bag, torch.Tensor) else np.asarray(bag, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"bag {index} is not numbers of one shape for every instance: {error}") from error
    if array.ndim == 0:
        raise ValueError(f"bag {index} must be a set of instances, got {bag!r}")
    return array


def _as_labels(labels: list[Any]) -> torch.Tensor:
    """One label of each bag, (B,), as integers if all are, else as floats; or several of each, floats (B, num_labels)."""
    stacked: list[torch.Tensor] = []
    for index, label in enumerate(labels):
        try:
            tensor = label.detach().cpu() if isinstance(label, torch.Tensor) else torch.tensor(np.asarray(label))
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


def _padded(arrays: list[np.ndarray]) -> np.ndarray:
    longest = max(map(len, arrays))
    padded = np.zeros((len(arrays), longest, *arrays[0].shape[1:]), dtype=arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded


@dataclass
class DataCollatorForBags:
    """Makes a batch of a model's inputs from examples `{"instances": bag, "label": class}`; other columns are left out.

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
        bags = [self._reduced(example["instances"]) for example in examples]
        if self.feature_extractor is None:
            arrays = [array.astype(np.float32) for array in as_arrays(bags)]
            masks = [np.ones(len(array), dtype=np.int64) for array in arrays]
            batch = {"instances": torch.from_numpy(_padded(arrays)), "attention_mask": torch.from_numpy(_padded(masks))}
        else:
            batch = dict(self.feature_extractor(bags, return_tensors="pt"))
        labels = [next((example[name] for name in _LABELS if example.get(name) is not None), None) for example in examples]
        unlabelled = [index for index, label in enumerate(labels) if label is None]
        if 0 < len(unlabelled) < len(labels):
            raise ValueError(f"bag {unlabelled[0]} of the batch has no label, and others have")
        if not unlabelled:
            batch["labels"] = _as_labels(labels)
        return batch

    def _reduced(self, bag: Any) -> Any:
        count, limit = len(bag), self.max_instances
        if limit is None or count <= limit:
            return bag
        if self.selection == "random":
            chosen = torch.randperm(count)[:limit].sort().values.numpy()
        else:
            chosen = np.arange(limit) if self.selection == "first" else np.linspace(0, count - 1, limit).round().astype(int)
        return bag.iloc[chosen] if hasattr(bag, "iloc") else np.asarray(bag)[chosen]


__all__ = ["DataCollatorForBags", "UHopMILFeatureExtractor"]
