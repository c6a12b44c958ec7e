"""What a saved folder says of its classes, and loading of weights."""

from safetensors import SafetensorError


def name_auto_classes(model, auto_map: dict[str, str]) -> bool:
    """Write into a model's configuration which classes of the package's files the auto classes load.

    A folder has the files of its model's own class alone: that of a subclass from elsewhere names none of these, and `False` is returned.
    """
    # A sharded module is of a class that PyTorch derived.
    own = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch."))
    is_ours = f"{own.__module__.rpartition('.')[2]}.{own.__name__}" in auto_map.values()
    known = getattr(model.config, "auto_map", None) or {}
    model.config.auto_map = auto_map if is_ours else {name: entry for name, entry in known.items() if entry not in auto_map.values()}
    return is_ours


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
