"""What a saved folder says of its classes, and loading of weights."""

from typing import Any

from safetensors import SafetensorError


class AutoClassesMixin:
    """For a `PreTrainedModel` whose saved folder names what the auto classes load from the package's files in it: `_auto_classes`.

    A folder has the files of its model's own class alone, so that of a subclass from elsewhere names none of them.
    """

    config: Any
    _auto_classes: dict[str, str]

    def save_pretrained(self, *args, **kwargs) -> None:
        """See `PreTrainedModel.save_pretrained`, which alone would write the entry of the saved class only."""
        named = getattr(self.config, "auto_map", None) or {}
        elsewhere = {name: entry for name, entry in named.items() if entry not in self._auto_classes.values()}
        self.config.auto_map = dict(self._auto_classes) if self._is_named() else elsewhere
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _is_named(self) -> bool:
        # A sharded module is of a class that PyTorch derived.
        own = next(kind for kind in type(self).__mro__ if not kind.__module__.startswith("torch."))
        return f"{own.__module__.rpartition('.')[2]}.{own.__name__}" in self._auto_classes.values()


class SafetensorsOnlyMixin:
    """For a `PreTrainedModel` that loads weights from safetensors files alone: a pickle may run code when it is read."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = True, **kwargs):
        """See `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: If a folder or repository has no safetensors file, lacks one that its index names, or has one that is damaged.
            ValueError: If `use_safetensors` is `False`.
        """
        if use_safetensors is False:
            raise ValueError(f"{cls.__name__} loads safetensors files alone, got use_safetensors=False")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            raise OSError(
                f"a weights file of {pretrained_model_name_or_path} is damaged ({error}); "
                "save it again, or download it with force_download=True"
            ) from error
