"""What the models of all families share: how they are saved and loaded, and that their configuration says what they compute."""

import copy
import dataclasses
import functools
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel

from .attention_interface import hopfield_kernel
from .loading import AutoClassesMixin, SafetensorsOnlyMixin
from .validation import is_traced


# Fields that matter only when weights are drawn.
_STARTS = {"initializer_range", "init_std", "position_init_std", "feature_init"}


class HopfieldPreTrainedModel(AutoClassesMixin, SafetensorsOnlyMixin, PreTrainedModel):
    """A `PreTrainedModel` whose configuration says at every time what it computes, so that a saved model is the model that ran.

    A field of the configuration that is edited after the model was built either takes effect at the next call, in every part of the model
    (those in `read_at_each_call`: alpha, beta and their like), or is refused there and by `save_pretrained`.
    """

    read_at_each_call: tuple[str, ...] = ("alpha", "beta", "update_steps")

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        # Fields that `from_pretrained` overrides were set one by one, past the configuration's own check.
        config.validate_hopfield()
        super().__init__(config, *args, **kwargs)
        self.remember_configuration()

    def remember_configuration(self) -> None:
        """Take the configuration as it is for that of the weights."""
        self._built_for = self.config
        self._built_with = copy.deepcopy(self._fields())

    def check_configuration(self) -> None:
        """Accept edits of the configuration that calls read, once they are in range.

        Raises:
            ValueError: For a field that is read only when the model is built, or a value out of its range, naming the field; and for
                another configuration than the model was built with, which its layers would not see.
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
            if value == before or name in self.read_at_each_call or name in _STARTS:
                continue
            if isinstance(value, dict) and isinstance(before, dict):
                before, value = ({key: each.get(key) for key in value if value[key] != before.get(key)} for each in (before, value))
            raise ValueError(
                f"{name} was {before!r} when this {type(self).__name__} was built, and its configuration now says {value!r}; "
                "build a model from a configuration of its own, or pass the field to from_pretrained"
            )
        config.validate_hopfield()
        if hasattr(config, "learnable_alpha"):
            hopfield_kernel(config, config._attn_implementation)
        self.remember_configuration()

    def save_pretrained(self, *args, **kwargs) -> None:
        """See `PreTrainedModel.save_pretrained`.

        Raises:
            ValueError: As `check_configuration`: what would be saved is not what ran.
        """
        self.check_configuration()
        for name, part in self.named_modules():
            own = getattr(part, "config", None)
            if isinstance(own, type(self.config)) and own is not self.config:
                raise ValueError(f"{name} has a configuration of its own, which would not be saved; its model's is model.config")
        super().save_pretrained(*args, **kwargs)

    def _fields(self) -> dict[str, Any]:
        """The values of the configuration's own fields."""
        kind: Any = type(self.config)
        fields = {name: getattr(self.config, name) for name in (*_own_fields(kind), *self._sizes())}
        # A backbone's own alpha is read at each call.
        return {name: _without_alpha(value) if isinstance(value, PreTrainedConfig) else value for name, value in fields.items()}

    def _sizes(self) -> dict[str, int]:
        """What the model itself says of fields that others than the user set: how many labels and memories it has."""
        return {} if getattr(self, "num_labels", None) is None else {"num_labels": cast(int, self.num_labels)}


def _without_alpha(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if not name.startswith("hopfield_")}


@functools.cache
def _own_fields(kind: Any) -> tuple[str, ...]:
    """Names of a configuration's fields, without those of every `PreTrainedConfig`."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return tuple(field.name for field in dataclasses.fields(kind) if field.name not in inherited)


__all__ = ["HopfieldPreTrainedModel"]
