"""Hopfield attention in the models of transformers."""

import functools
import inspect
import math
import re
from numbers import Real
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

    alpha is `model.config.hopfield_alpha` (sub-configurations get a copy), and an edit of it takes effect at the next call.
    `save_pretrained` writes it, and `from_pretrained(folder, attn_implementation="hopfield")` gives the same model again, in a process
    that has imported `modeling_uhop`. As everywhere in transformers, a folder does not say which attention to use: without that argument
    softmax runs, with a warning.

    Args:
        model: A `PreTrainedModel`, or a module with some inside, such as a model of PEFT. Changed in place; so are other models that share
            its configuration. Of a part, such as one tower of two, alpha is kept in the part's configuration, which must be one that the
            whole model's configuration holds: copies, as in the stacks of T5, are not saved. Parts may differ, if the whole has no alpha.
        alpha: Tsallis exponent in [1, 2]: 1 softmax, 1.5 entmax, 2 sparsemax. `None` for what the configuration has, or 1.5.
        learnable: Whether every head of every layer learns its own exponent in (1, 2), beginning at `alpha`, as the parameter
            `hopfield_alpha_logit`, which is saved and loaded with the weights. Make the optimizer after this call. Weight decay pulls an
            exponent towards 1.5.
        kernel: "hopfield", "hopfield_triton", or "hopfield_entmax" (the solver of the entmax library, where that is installed).

    Returns:
        The same model.

    Raises:
        TypeError: For what is no model of transformers.
        ValueError: For an alpha or a kernel outside its range; for a learnable alpha of a model of PEFT, whose adapter files have no place
            for it; for a part of a model that has one alpha for all; and for a model with attention that does not go through
            transformers' attention interface, which would stay at softmax. The message names the modules. Then nothing has changed.

    >>> from transformers import BertConfig, BertModel
    >>> from modeling_uhop import use_hopfield_attention

    >>> bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
    >>> bert = use_hopfield_attention(bert, alpha=1.5)
    >>> bert.config.hopfield_alpha
    1.5
    """
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not models:
        raise TypeError(f"use_hopfield_attention needs a model of transformers, got {type(model).__name__}")
    if any(hasattr(part, "memory_sets") for part in models):
        raise ValueError(f"{type(model).__name__} has Hopfield attention already: set alpha in its configuration")
    owner: Any = models[0].config
    begins = alpha is not None or not hasattr(owner, "hopfield_alpha")
    if begins:
        alpha = 1.5 if alpha is None else alpha
    else:
        alpha, learnable = owner.hopfield_alpha, learnable or owner.hopfield_learnable_alpha
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 1.0 <= float(alpha) <= 2.0:
        raise ValueError(f"alpha must be a number in [1, 2], got {alpha!r}")
    alpha = float(alpha)
    if learnable and not 1.0 < alpha < 2.0:
        raise ValueError(f"a learnable alpha must begin strictly between 1 and 2, got {alpha}")
    if learnable and any(hasattr(part, "peft_config") for part in model.modules()):
        raise ValueError(
            "an adapter of PEFT is saved without the exponents of a learnable alpha; give a fixed alpha, or merge the adapter first"
        )
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {tuple(KERNELS)}, got {kernel!r}")
    layers = _attention_layers(model)
    inside = {id(part.config) for part in models}
    for layer in layers:
        if learnable:
            _num_heads(layer)  # refused before anything has changed
        if id(getattr(layer, "hopfield_config", owner)) not in inside:
            raise ValueError(
                f"{type(model).__name__} is a part of a model that has one hopfield_alpha for all of its parts; give the whole model, or "
                "the parts of a new one"
            )
    owner.hopfield_alpha, owner.hopfield_learnable_alpha = alpha, learnable
    for part in (*models, *layers):
        part.config._attn_implementation = kernel
    for layer in layers:
        if begins and hasattr(layer, "hopfield_alpha_logit"):
            del layer.hopfield_alpha_logit
        _belong(layer, owner)
    return model


def _belong(layer: Any, owner: Any) -> None:
    """Let an attention layer read alpha from this configuration, that of its outermost model, and have the parameter it asks for.

    The layer's own configuration gets a copy, for a part that is loaded alone from the folder of the whole.
    """
    layer.hopfield_config = owner
    layer.config.hopfield_alpha, layer.config.hopfield_learnable_alpha = owner.hopfield_alpha, owner.hopfield_learnable_alpha
    if owner.hopfield_learnable_alpha and not hasattr(layer, "hopfield_alpha_logit"):
        alpha = owner.hopfield_alpha
        device = next((parameter.device for parameter in layer.parameters()), None)
        logits = torch.full((_num_heads(layer),), math.log((alpha - 1.0) / (2.0 - alpha)), dtype=torch.float32, device=device)
        layer.register_parameter("hopfield_alpha_logit", nn.Parameter(logits))


def _on_registration(parent: nn.Module, name: str, module: Any) -> None:
    """As transformers builds a model from a saved configuration with an alpha, what `use_hopfield_attention` had done to its layers."""
    owner: Any = vars(parent).get("config")
    if module is None or not isinstance(parent, PreTrainedModel) or not hasattr(owner, "hopfield_alpha"):
        return
    layers = list(filter(_calls_the_interface, module.modules()))
    softmax = [layer.config._attn_implementation for layer in layers if layer.config._attn_implementation not in KERNELS]
    if softmax and not hasattr(layers[0], "hopfield_config") and (owner.hopfield_alpha != 1.0 or owner.hopfield_learnable_alpha):
        logger.warning(
            f"hopfield_alpha={owner.hopfield_alpha} in the configuration of {type(parent).__name__} has no effect on the attention "
            f"{softmax[0]!r}; pass attn_implementation='hopfield', or call use_hopfield_attention(model)"
        )
    for layer in layers:
        _belong(layer, owner)


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
        elif isinstance(module, nn.MultiheadAttention) or _attention_of(kind) == "own":
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
    return is_layer and _attention_of(kind) == "interface"


# What computes attention by itself: in any class, and in one that is named for it.
_KERNEL_CALLS = re.compile(r"scaled_dot_product_attention\(|multi_head_attention_forward\(")
_SOFTMAX_CALLS = re.compile(r"softmax\(", re.IGNORECASE)


@functools.cache
def _attention_of(kind: type[nn.Module]) -> str | None:
    """Where a class of modules computes attention, by its source: through the "interface", on its "own", or not at all."""
    named = re.search("attention|attn", kind.__name__, re.IGNORECASE)
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            return None
        if "forward" not in vars(base):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            return None
        if ".get_interface(" in source:
            return "interface"
        if _KERNEL_CALLS.search(source) or (named and _SOFTMAX_CALLS.search(source)):
            return "own"
        if "super().forward(" not in source:
            return None
    return None


def _num_heads(layer: nn.Module) -> int:
    """Heads of queries of an attention layer, under the names that models of transformers have for it."""
    for owner in (layer, layer.config):
        for name in ("num_heads", "num_attention_heads", "n_heads", "nhead"):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    raise ValueError(f"{type(layer).__name__} does not say how many heads it has, which a learnable alpha needs")
