"""Base class of all model families: initialization, kernels, folding, saving and loading."""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .attention_interface import hopfield_kernel
from .feature_map import FeatureMap
from .folding import fold_model
from .hopfield import HopfieldAttention, HopfieldPooling
from .memories import MemorySet, SharedMemorySet, observe
from .precision import is_traced


# Fields that are used only to initialise weights.
_INITIALIZATION_FIELDS = {"initializer_range", "init_std", "position_init_std", "feature_init", "attention_init"}


class HopfieldPreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` whose configuration always says what the model computes.

    Therefore a saved model is the model that ran. If a field of the configuration is edited after
    the model was built, one of two things happens. Fields in `read_at_each_call`
    (such as alpha and beta) take effect at the next call, in every part of the model. An edit of
    another field raises a `ValueError` at the next call and in `save_pretrained`.
    """

    read_at_each_call: tuple[str, ...] = ("alpha", "beta", "update_steps", "attention_probs_dropout_prob")
    # The entries of a saved folder for the auto classes. A class whose folder carries its code also
    # sets `_auto_class`, as `register_for_auto_class` would.
    _auto_classes: dict[str, str]
    # Beginnings of the names of layers whose memories are the same for every example of a batch.
    _shared_memories: tuple[str, ...] = ()

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        # Because `from_pretrained` sets overridden fields one by one, without the configuration's
        # own check, we check them here.
        config.validate_hopfield()
        super().__init__(config, *args, **kwargs)
        self.remember_configuration()

    def remember_configuration(self) -> None:
        """Record the current configuration as the one that the weights were built for."""
        self._built_for = self.config
        self._built_with = copy.deepcopy(self._fields())

    def check_configuration(self) -> None:
        """Accept edits of fields that are read at each call, if the values are in range.

        Raises:
            ValueError: If a field that is read only when the model is built was edited, or if a
                value is out of range (the message names the field). Also if the configuration
                object was replaced, because the layers keep the old one.
        """
        if is_traced():
            return
        config: Any = self.config
        if config is not self._built_for:
            raise ValueError(
                f"the configuration of a {type(self).__name__} cannot be replaced once it is built, as its layers keep their own; "
                "edit the fields of model.config, or pass them to from_pretrained"
            )
        fields = self._fields()
        built = {**self._built_with, **self._sizes()}
        if fields == built:
            return
        for name, value in fields.items():
            before = built[name]
            if value == before or name in self.read_at_each_call or name in _INITIALIZATION_FIELDS:
                continue
            if isinstance(value, dict) and isinstance(before, dict):
                before, value = ({key: each.get(key) for key in value if value[key] != before.get(key)} for each in (before, value))
            raise ValueError(
                f"{name} was {before!r} when this {type(self).__name__} was built, and its configuration now says {value!r}; "
                "build a model from a configuration of its own, or pass the field to from_pretrained"
            )
        config.validate_hopfield()
        if _has_layers(config):
            hopfield_kernel(config, config._attn_implementation)
        self.remember_configuration()

    @property
    def num_class_tokens(self) -> int:
        """Number of memories of a set that stand before the parts of the example, such as CLS."""
        return 0

    def memory_sets(self, *inputs, include_class_token: bool = False, **batch) -> Iterator[MemorySet]:
        """Return the memories that Stage I separates, in the order in which layers retrieve from them.

        They are observed in a forward pass, which ends where the last layer begins to retrieve.
        Layers whose memories do not depend on the example (the first decoder block of STanHop-Net)
        give one set, and all others one set for each example.

        Args:
            inputs (Any): Inputs of `forward`, the main input first.
            include_class_token: Whether the CLS token (and the distillation token) of an image is a
                memory too.
            batch (Any): Further inputs of `forward`. What the mask of a batch marks as absent is
                not a memory.

        Returns:
            One `MemorySet` for each Hopfield layer, with its memories as its feature map receives
                them, (B, M, d), and their graph.

        Raises:
            ValueError: If the model has no Hopfield layer (a bag model needs pooling="hopfield");
                also as `forward`.
        """
        observed = observe(self, lambda: self(*inputs, **batch))
        if not observed:
            raise ValueError(f"{type(self).__name__} has no memories to separate, because it has no Hopfield layer")
        batch_size = len(inputs[0] if inputs else batch[self.main_input_name])
        first = 0 if include_class_token else self.num_class_tokens
        sets = []
        for name, (feature_map, memories, mask) in observed:
            kind, count = MemorySet, len(memories)
            if name.startswith(self._shared_memories):
                kind, count = SharedMemorySet, count // batch_size
            sets.append(kind(feature_map, memories[:count, first:], None if mask is None else mask[:count, first:]))
        return iter(sets)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (FeatureMap, HopfieldAttention, HopfieldPooling)):
            module.reset_parameters()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Choose the attention kernel of the Hopfield layers; see `hopfield_kernel`."""
        if _has_layers(self.config):
            requested_attention = hopfield_kernel(self.config, requested_attention)
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def fold_feature_maps(self):
        """Return a copy for inference with its feature maps folded into its projections.

        The copy computes the same outputs with fewer products. It is a model without Phi
        (`config.use_feature_map` is `False`), and saves and loads as one. The original does not
        change.

        Raises:
            ValueError: If Phi or a projection is hooked, offloaded, quantized, or inside an
                adapter; `merge_and_unload()` merges adapters. Also if the model has no projections.
        """
        if not _has_layers(self.config):
            raise ValueError(f"a {type(self).__name__} has no projections that its feature map could be folded into")
        return fold_model(self)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save the model; see `PreTrainedModel.save_pretrained`.

        The saved folder names its classes for the auto classes. It holds only the files of its
        model's own class. Therefore the folder of a subclass from elsewhere names none of them.

        Raises:
            ValueError: As in `check_configuration`, if the saved configuration would differ from
                the model that ran.
        """
        self.check_configuration()
        for name, part in self.named_modules():
            own = getattr(part, "config", None)
            if isinstance(own, type(self.config)) and own is not self.config:
                raise ValueError(f"{name} has a configuration of its own, which would not be saved; edit model.config instead")
        # Because transformers would write only the entry of the saved class, we set all entries.
        named = getattr(self.config, "auto_map", None) or {}
        elsewhere = {name: entry for name, entry in named.items() if entry not in self._auto_classes.values()}
        self.config.auto_map = dict(self._auto_classes) if self._is_named() else elsewhere
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = True, **kwargs):
        """Load a model; see `PreTrainedModel.from_pretrained`.

        Only safetensors files are loaded. Other formats are pickles, which may run code when they
        are read.

        Raises:
            OSError: If a folder or repository has no safetensors file, lacks a file that its index
                names, or has a damaged file.
            ValueError: If `use_safetensors` is `False`.
        """
        if use_safetensors is False:
            raise ValueError(f"{cls.__name__} loads only safetensors files, got use_safetensors=False; leave it out")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"a weights file of {pretrained_model_name_or_path} is damaged ({error}); "
                "save it again, or download it with force_download=True"
            ) from error

    def _is_named(self) -> bool:
        # Because PyTorch derives a class for a sharded module, we skip classes of torch.
        own = next(kind for kind in type(self).__mro__ if not kind.__module__.startswith("torch."))
        return f"{own.__module__.rpartition('.')[2]}.{own.__name__}" in self._auto_classes.values()

    def _fields(self) -> dict[str, Any]:
        """Return the values of the configuration's own fields."""
        kind: Any = type(self.config)
        fields = {name: getattr(self.config, name) for name in (*_own_fields(kind), *self._sizes())}
        # Because a backbone reads its own alpha at each call, we leave alpha out.
        return {name: _without_alpha(value) if isinstance(value, PreTrainedConfig) else value for name, value in fields.items()}

    def _sizes(self) -> dict[str, int]:
        """Return fields that code other than the user's sets, such as the number of labels."""
        return {} if getattr(self, "num_labels", None) is None else {"num_labels": cast(int, self.num_labels)}


def _has_layers(config: Any) -> bool:
    """Return whether a model of this configuration has Hopfield layers; a memory has none."""
    return hasattr(config, "use_feature_map")


def _without_alpha(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if not name.startswith("hopfield_")}


@functools.cache
def _own_fields(kind: Any) -> tuple[str, ...]:
    """Return the names of a configuration's fields, without those of every `PreTrainedConfig`."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return tuple(field.name for field in dataclasses.fields(kind) if field.name not in inherited)


__all__ = ["HopfieldPreTrainedModel"]
