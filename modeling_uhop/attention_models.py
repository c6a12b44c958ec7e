"""Hopfield attention in the models of transformers."""

import functools
import inspect
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .attention_interface import KERNELS


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def use_hopfield_attention(model: Model, alpha: float | None = None, *, learnable: bool = False, kernel: str = "hopfield") -> Model:
    """Hopfield attention in every attention layer of a transformers model: softmax becomes the simplex map `Sep_alpha` (equation 3.1).

    The weights stay as they are. At alpha = 1 the outputs do too; the further alpha is from 1, the more weights are exactly 0, and the
    more the model has to be fine-tuned. Masks, caches, grouped queries, biases of the scores, soft caps and sinks are kept.

    alpha is stored as `config.hopfield_alpha`, in sub-configurations too, and read from there at every call. `save_pretrained` writes it.
    `from_pretrained(folder, attn_implementation="hopfield")` gives the same model again, in a process that has imported `modeling_uhop`.

    Args:
        model: A `PreTrainedModel`, or a module with some inside, such as a model of PEFT. Changed in place.
        alpha: Tsallis exponent in [1, 2]: 1 softmax, 1.5 entmax, 2 sparsemax. `None` for what the configuration has, or 1.5.
        learnable: Whether every head of every layer learns its own exponent in (1, 2), beginning at `alpha`, as the parameter
            `hopfield_alpha_logit`, which is saved and loaded with the weights. Make the optimizer after this call.
        kernel: "hopfield", "hopfield_triton", or "hopfield_entmax" (the solver of the entmax library, where that is installed).

    Returns:
        The same model.

    Raises:
        TypeError: For what is no model of transformers.
        ValueError: For an alpha or a kernel outside its range, and for a model with attention that does not go through transformers'
            attention interface, which would stay at softmax; the message names the modules.

    >>> from transformers import BertConfig, BertModel
    >>> from modeling_uhop import use_hopfield_attention

    >>> bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
    >>> bert = use_hopfield_attention(bert, alpha=1.5)
    >>> bert.config.hopfield_alpha
    1.5
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not models:
        raise TypeError(f"use_hopfield_attention needs a model of transformers, got {type(model).__name__}")
    if any(hasattr(part, "memory_sets") for part in models):
        raise ValueError(f"{type(model).__name__} has Hopfield attention already: set alpha in its configuration")
    begins = alpha is not None or not hasattr(models[0].config, "hopfield_alpha")
    if begins:
        alpha = 1.5 if alpha is None else alpha
    else:
        alpha, learnable = models[0].config.hopfield_alpha, learnable or models[0].config.hopfield_learnable_alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 1.0 <= alpha <= 2.0:
        raise ValueError(f"alpha must be a number in [1, 2], got {alpha!r}")
    if learnable and not 1.0 < alpha < 2.0:
        raise ValueError(f"a learnable alpha must begin strictly between 1 and 2, got {alpha}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {tuple(KERNELS)}, got {kernel!r}")
    layers = _attention_layers(model)
    models[0].set_attn_implementation(kernel)
    others = [type(layer).__name__ for layer in layers if layer.config._attn_implementation != kernel]
    if others:
        raise ValueError(f"{', '.join(sorted(set(others)))} of {type(model).__name__} cannot take the attention {kernel!r}")
    for config in _configurations([part.config for part in (*models, *layers)]):
        config.hopfield_alpha, config.hopfield_learnable_alpha = float(alpha), learnable
        _record(config)
    for layer in layers:
        if begins and hasattr(layer, "hopfield_alpha_logit"):
            del layer.hopfield_alpha_logit
        _declare_alpha(layer)
    return model


def _record(config: Any) -> None:
    """Write the attention in use into a configuration that has an alpha, where `from_pretrained` reads it."""
    if hasattr(config, "hopfield_alpha") and config._attn_implementation in KERNELS:
        config.attn_implementation = config._attn_implementation


def _declare_alpha(layer: Any) -> None:
    """Give an attention layer the parameter `hopfield_alpha_logit` (H,), if its configuration has a learnable alpha."""
    if not getattr(layer.config, "hopfield_learnable_alpha", False) or hasattr(layer, "hopfield_alpha_logit"):
        return
    alpha = layer.config.hopfield_alpha
    device = next((parameter.device for parameter in layer.parameters()), None)
    logits = torch.full((_num_heads(layer),), math.log((alpha - 1.0) / (2.0 - alpha)), dtype=torch.float32, device=device)
    layer.register_parameter("hopfield_alpha_logit", nn.Parameter(logits))


def _on_registration(parent: nn.Module, name: str, module: Any) -> None:
    """As transformers builds a model from a saved configuration: what `use_hopfield_attention` had done to it, so that weights are loaded
    into learned exponents, and the next `save_pretrained` writes the attention again."""
    for owner in (parent, module):
        config = vars(owner).get("config") if owner is not None else None
        if hasattr(config, "hopfield_alpha"):
            _record(config)
            if owner is module and _calls_the_interface(module):
                _declare_alpha(module)


register_module_module_registration_hook(_on_registration)


def _attention_layers(model: nn.Module) -> list[Any]:
    """The modules that call the attention interface.

    Raises:
        ValueError: If there are none, or other modules compute attention by themselves. Of these, pooling heads are only warned of: they
            read out what a model without them has computed.
    """
    layers: list[Any] = []
    own: list[str] = []
    pooling: list[str] = []
    for name, module in model.named_modules():
        kind: Any = type(module)
        if _calls_the_interface(module):
            layers.append(module)
            continue
        named = "attention" in kind.__name__.lower()
        if isinstance(module, nn.MultiheadAttention) or (named and re.search(r"softmax\(|scaled_dot_product_", _forward_source(kind))):
            parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
            (pooling if "Pool" in kind.__name__ + parent else own).append(f"{name} ({kind.__name__})")
    if own:
        raise ValueError(
            f"{type(model).__name__} has attention that does not go through transformers' attention interface, "
            f"and would stay at softmax: {', '.join(own[:3])}{f' and {len(own) - 3} more' if len(own) > 3 else ''}"
        )
    if not layers:
        raise ValueError(f"{type(model).__name__} has no attention that goes through transformers' attention interface")
    if pooling:
        logger.warning(f"the pooling of {type(model).__name__} stays at softmax: {', '.join(pooling)}")
    return layers


def _calls_the_interface(module: Any) -> bool:
    """Whether this is a module that asks its configuration for the attention to use."""
    is_layer = isinstance(getattr(module, "config", None), PreTrainedConfig) and not isinstance(module, PreTrainedModel)
    kind: Any = type(module)
    return is_layer and ".get_interface(" in _forward_source(kind)


@functools.cache
def _forward_source(kind: type[nn.Module]) -> str:
    """The source of the class whose `forward` a module has; nothing for classes of PyTorch, and where there is no source."""
    defining = next(base for base in kind.__mro__ if "forward" in vars(base))
    if defining.__module__.partition(".")[0] == "torch":
        return ""
    try:
        return inspect.getsource(defining)
    except (OSError, TypeError):
        return ""


def _configurations(configs: Iterable[PreTrainedConfig]) -> Iterator[PreTrainedConfig]:
    """Each of these once, and their sub-configurations."""
    seen: set[int] = set()
    waiting = list(configs)
    while waiting:
        config = waiting.pop()
        if id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]


def _num_heads(layer: nn.Module) -> int:
    """Heads of queries of an attention layer, under the names that models of transformers have for it."""
    for owner in (layer, layer.config):
        for name in ("num_heads", "num_attention_heads", "n_heads", "nhead"):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    raise ValueError(f"{type(layer).__name__} does not say how many heads it has, which a learnable alpha needs")
