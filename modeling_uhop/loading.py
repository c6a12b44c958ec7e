"""Loading of weights."""


class SafetensorsOnlyMixin:
    """For a `PreTrainedModel` that loads weights from safetensors files alone: a pickle may run code when it is read."""

    @classmethod
    def from_pretrained(cls, *args, use_safetensors: bool | None = True, **kwargs):
        """See `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: If a folder or repository has no safetensors file.
            ValueError: If `use_safetensors` is `False`.
        """
        if use_safetensors is False:
            raise ValueError(f"{cls.__name__} loads safetensors files alone, got use_safetensors=False")
        return super().from_pretrained(*args, use_safetensors=True, **kwargs)  # type: ignore[misc]
