"""Loading of weights."""

from safetensors import SafetensorError


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
