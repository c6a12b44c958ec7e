"""What a store of patterns keeps between calls: their features, and a faiss index of the features.

A store is a module with patterns and a feature map. Its cache and its index are not saved, and a
copy of the store has neither.
"""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .checks import is_plain
from .feature_map import FeatureMap
from .precision import is_traced
from .search import Candidates, FaissIndex, is_in_step, trained_index


class FeatureCache(NamedTuple):
    """Features of the patterns of a store, with what they were computed from.

    Storing, loading, and moving to another dtype or device either replaces the tensor of patterns
    or changes its version.
    """

    patterns: torch.Tensor
    version: int
    weight: torch.Tensor
    normalize: bool
    features: torch.Tensor

    def holds(self, feature_map: FeatureMap, patterns: torch.Tensor) -> bool:
        """Return whether the features are those that this map gives to these patterns now."""
        weight = feature_map.weight
        if self.patterns is not patterns or self.version != patterns._version:
            return False
        # Because fused optimizers and collective operations do not increase the version counter of
        # the weight, we compare its values.
        return (self.weight.dtype, self.normalize) == (weight.dtype, feature_map.normalize) and torch.equal(self.weight, weight)


class StoreIndex(NamedTuple):
    """The faiss index that was selected for a store, and its candidates once it is built."""

    factory: str
    parameters: str
    candidates: FaissIndex | None = None


# Because a copy of a store must not share its cache or index, we keep both outside the stores.
_FEATURES: WeakKeyDictionary[nn.Module, FeatureCache] = WeakKeyDictionary()
_INDEXES: WeakKeyDictionary[nn.Module, StoreIndex] = WeakKeyDictionary()


def can_be_cached(feature_map: FeatureMap, patterns: torch.Tensor) -> bool:
    """Return whether a later call can use features that are computed now."""
    if is_traced() or not is_plain(feature_map, FeatureMap) or torch.is_inference_mode_enabled() or patterns.is_inference():
        return False
    weight = feature_map.weight
    needs_gradient = torch.is_grad_enabled() and (weight.requires_grad or patterns.requires_grad)
    return not needs_gradient and not torch.is_autocast_enabled(weight.device.type)


def cached_features(
    store: nn.Module, feature_map: FeatureMap, patterns: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the features (M, D) of the patterns of a store; callers must not write to them.

    `compute` maps patterns to features. It is called only if something has changed.
    """
    if not can_be_cached(feature_map, patterns):
        return compute(patterns)
    cache = _FEATURES.get(store)
    if cache is None or not cache.holds(feature_map, patterns):
        weight = feature_map.weight.detach().clone()
        cache = _FEATURES[store] = FeatureCache(patterns, patterns._version, weight, feature_map.normalize, compute(patterns))
    return cache.features


def select_index(store: nn.Module, factory: str, parameters: str, feature_dim: int) -> None:
    """Select an index for a store by faiss's strings, or "flat" for none; see `trained_index`."""
    _INDEXES.pop(store, None)
    if factory != "flat":
        trained_index(factory, parameters, torch.zeros(0, feature_dim))
        _INDEXES[store] = StoreIndex(factory, parameters)


def index_candidates(store: nn.Module, features: torch.Tensor) -> Candidates | None:
    """Return the selected index of a store, built again if it does not hold these features (M, D).

    The result is `None` if no index is selected.
    """
    held = _INDEXES.get(store)
    if held is None:
        return None
    if held.candidates is None or not is_in_step(held.candidates.index, features):
        index = FaissIndex(trained_index(held.factory, held.parameters, features))
        held = _INDEXES[store] = held._replace(candidates=index)
    return held.candidates
