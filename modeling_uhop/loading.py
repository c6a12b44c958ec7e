"""Loading of weights, and the entries of a saved folder for the auto classes."""

from typing import Any

from safetensors import SafetensorError


class AutoClassesMixin:
    """Mixin for a `PreTrainedModel` whose saved folder names its classes for the auto classes.

    The entries are `_auto_classes`. A folder holds only the files of its model's own class.
    Therefore the folder of a subclass from elsewhere names none of them.
    """

    config: Any
    _auto_classes: dict[str, str]

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save the model; see `PreTrainedModel.save_pretrained`.

        That method alone would write only the entry of the saved class.
        """
        named = getattr(self.config, "auto_map", None) or {}
        elsewhere = {name: entry for name, entry in named.items() if entry not in self._auto_classes.values()}
        self.config.auto_map = dict(self._auto_classes) if self._is_named() else elsewhere
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _is_named(self) -> bool:
        # Because PyTorch derives a class for a sharded module, we skip classes of torch.
        own = next(kind for kind in type(self).__mro__ if not kind.__module__.startswith("torch."))
        return f"{own.__module__.rpartition('.')[2]}.{own.__name__}" in self._auto_classes.values()


class SafetensorsOnlyMixin:
    """Mixin for a `PreTrainedModel` that loads weights only from safetensors files.

    Other formats are pickles, which may run code when they are read.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = True, **kwargs):
        """Load a model; see `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: If a folder or repository has no safetensors file, lacks a file that its index
                names, or has a damaged file.
            ValueError: If `use_safetensors` is `False`.
        """
        if use_safetensors is False:
            raise ValueError(f"{cls.__name__} loads only safetensors files, got use_safetensors=False; leave it out")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            raise OSError(
                f"a weights file of {pretrained_model_name_or_path} is damaged ({error}); "
                "save it again, or download it with force_download=True"
            ) from error
