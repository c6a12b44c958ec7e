"""Switch the attention of a model between its own and Hopfield attention."""

from typing import Any

from torch import nn

from ..attention_interface import KERNELS
from ..attention_models import use_hopfield_attention


class AttentionSwitch:
    """The attention that a model came with, and the way to another alpha and back.

    Args:
        model: A model of transformers.
    """

    def __init__(self, model: nn.Module):
        configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
        self._configs: list[Any] = list(configs.values())
        names = ("_attn_implementation", "hopfield_alpha", "hopfield_learnable_alpha")
        self._before = [{name: getattr(config, name) for name in names if hasattr(config, name)} for config in self._configs]
        self._had = {name for name, part in model.named_modules() if "hopfield_config" in vars(part)}
        self._alpha: float | None = None

    def set(self, model: nn.Module, alpha: float | None) -> None:
        """Give the model Hopfield attention with an alpha, or the attention that it came with for `None`.

        Raises:
            ValueError: As `use_hopfield_attention`; if the model learns an alpha of its own.
            TypeError: If `model` is not a model of transformers.
        """
        if alpha == self._alpha:
            return
        if alpha is not None:
            if any(before.get("hopfield_learnable_alpha") for before in self._before):
                raise ValueError("the model learns its own alpha; give the adapter alpha=None")
            given = self._before[0].get("_attn_implementation") if self._before else None
            use_hopfield_attention(model, alpha, kernel=given if given in KERNELS else "hopfield")
        else:
            for config, before in zip(self._configs, self._before, strict=True):
                for name in ("hopfield_alpha", "hopfield_learnable_alpha"):
                    if name in before:
                        setattr(config, name, before[name])
                    elif hasattr(config, name):
                        delattr(config, name)
                if "_attn_implementation" in before:
                    config._attn_implementation = before["_attn_implementation"]
            for name, part in model.named_modules():
                if "hopfield_config" in vars(part) and name not in self._had:
                    del part.hopfield_config
        self._alpha = alpha
