"""Hopfield attention in any model of transformers."""

import functools
import inspect
import re
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .attention_interface import KERNELS
from .simplex import alpha_logit


logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def use_hopfield_attention(model: Model, alpha: float | None = None, *, learnable: bool = False, kernel: str = "hopfield") -> Model:
    r"""Switch every attention layer of a transformers model to Hopfield attention.

    Softmax becomes the simplex map $\mathrm{Sep}_\alpha$ (U-Hop, arXiv 2404.03827, equation 3.1):

    $$
    \mathrm{softmax}(\beta \, q k^T) \, v \;\to\; \mathrm{Sep}_\alpha(\beta \, q k^T) \, v
    $$

    The model's weights do not change. At alpha = 1 the outputs do not change either. The further
    alpha is from 1, the more association weights are exactly 0, and the more fine-tuning the model
    needs. Masks, caches, grouped queries, score biases, soft caps and sinks are kept.

    The exponent is stored as `model.config.hopfield_alpha`, with a copy in each sub-configuration.
    An edit of it takes effect at the next call. `save_pretrained` writes it, and
    `from_pretrained(folder, attn_implementation="hopfield")` loads the same model in a process that
    has imported `modeling_uhop`. A folder of transformers never says which attention to use:
    without that argument, softmax runs, with a warning.

    Args:
        model: A `PreTrainedModel`, or a module that contains one, such as a model of PEFT. It is
            changed in place, and so are other models that share its configuration. For a part of a
            model, such as one tower of two, alpha is stored in the configuration of the part, which
            must be one that the configuration of the whole model holds; copies, as in the stacks of
            T5, are not saved. Parts may have different alphas if the whole model has none.
        alpha: Tsallis exponent in [1, 2]: 1 is softmax, 1.5 is 1.5-entmax, 2 is sparsemax. `None`
            for the value in the configuration, or 1.5 if it has none.
        learnable: Whether every head of every layer learns its own exponent in (1, 2), starting at
            `alpha`. The parameter is `hopfield_alpha_logit`, which is saved and loaded with the
            weights. Create the optimizer after this call. Weight decay pulls an exponent towards
            1.5.
        kernel: "hopfield", "hopfield_triton", or "hopfield_entmax" (the solver of the entmax
            library, if that is installed).

    Returns:
        The same model.

    Raises:
        TypeError: If `model` is not a model of transformers.
        ValueError: If alpha or the kernel is out of range; if a learnable alpha is requested for a
            model of PEFT, whose adapter files cannot hold it; if the model is a part of a model
            that has one alpha for all parts; or if a module computes attention without
            transformers' attention interface, and would keep softmax (the message names the
            modules). In all these cases nothing has changed.

    Examples:
        >>> from transformers import BertConfig, BertModel
        >>> from modeling_uhop import use_hopfield_attention
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> bert = BertModel(BertConfig(**sizes, intermediate_size=32))
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
    is_new = alpha is not None or not hasattr(owner, "hopfield_alpha")
    if is_new:
        alpha = 1.5 if alpha is None else alpha
    else:
        alpha, learnable = owner.hopfield_alpha, learnable or owner.hopfield_learnable_alpha
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 1.0 <= float(alpha) <= 2.0:
        raise ValueError(f"alpha must be a number in [1, 2], got {alpha!r}")
    alpha = float(alpha)
    if learnable and not 1.0 < alpha < 2.0:
        raise ValueError(f"a learnable alpha must begin strictly between 1 and 2, got {alpha}")
    if learnable and any(hasattr(part, "peft_config") for part in model.modules()):
        raise ValueError("a learnable alpha cannot be saved with an adapter of PEFT; use a fixed alpha, or merge the adapter first")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {tuple(KERNELS)}, got {kernel!r}")
    layers = _attention_layers(model)
    config_ids = {id(part.config) for part in models}
    for layer in layers:
        if learnable:
            # Because nothing may have changed when an error is raised, we check the heads here.
            _num_heads(layer)
        if id(getattr(layer, "hopfield_config", owner)) not in config_ids:
            raise ValueError(
                f"{type(model).__name__} is a part of a model that has one hopfield_alpha for all of its parts; pass the whole model, or "
                "the parts of a newly loaded one"
            )
    owner.hopfield_alpha, owner.hopfield_learnable_alpha = alpha, learnable
    for part in (*models, *layers):
        part.config._attn_implementation = kernel
    for layer in layers:
        if is_new and hasattr(layer, "hopfield_alpha_logit"):
            del layer.hopfield_alpha_logit
        _bind_alpha(layer, owner)
    return model


def _bind_alpha(layer: Any, owner: Any) -> None:
    """Let an attention layer read alpha from the configuration of its outermost model.

    The layer gets the parameter of a learnable alpha, if the configuration asks for it. The layer's
    own configuration gets a copy of alpha, for a part that is loaded alone from the folder of the
    whole.
    """
    layer.hopfield_config = owner
    layer.config.hopfield_alpha, layer.config.hopfield_learnable_alpha = owner.hopfield_alpha, owner.hopfield_learnable_alpha
    if owner.hopfield_learnable_alpha and not hasattr(layer, "hopfield_alpha_logit"):
        device = next((parameter.device for parameter in layer.parameters()), None)
        logits = torch.full((_num_heads(layer),), alpha_logit(owner.hopfield_alpha), dtype=torch.float32, device=device)
        layer.register_parameter("hopfield_alpha_logit", nn.Parameter(logits))


def _on_registration(parent: nn.Module, name: str, module: Any) -> None:
    """Restore Hopfield attention while transformers builds a model.

    Its configuration holds an alpha if `use_hopfield_attention` was called before it was saved.
    This is a hook that PyTorch calls whenever a module is registered in another.
    """
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
        _bind_alpha(layer, owner)


register_module_module_registration_hook(_on_registration)


def _attention_layers(model: nn.Module) -> list[Any]:
    """Return the modules that call the attention interface of transformers.

    Raises:
        ValueError: If there are none, or if other modules compute attention themselves. A pooling
            head that does so causes only a warning, because it reads what a model without it has
            computed.
    """
    layers: list[Any] = []
    own: list[str] = []
    pooling: list[str] = []
    for name, module in model.named_modules():
        kind: Any = type(module)
        if _calls_the_interface(module):
            layers.append(module)
        elif isinstance(module, nn.MultiheadAttention) or attention_source(kind) == "own":
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
    """Return whether a module asks its configuration which attention to use."""
    is_layer = isinstance(getattr(module, "config", None), PreTrainedConfig) and not isinstance(module, PreTrainedModel)
    kind: Any = type(module)
    return is_layer and attention_source(kind) == "interface"


# Because attention outside the interface is found by its source, these are the calls that reveal
# it: the first in any class, the second only in a class whose name contains "attention".
_KERNEL_CALLS = re.compile(r"scaled_dot_product_attention\(|multi_head_attention_forward\(")
_SOFTMAX_CALLS = re.compile(r"softmax\(", re.IGNORECASE)


@functools.cache
def attention_source(kind: type[nn.Module]) -> str | None:
    """Return where a class of modules computes attention, according to its source code.

    The result is "interface" (transformers' attention interface), "own" (its own code), or `None`
    for a class without attention.
    """
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
    """Return the number of query heads of an attention layer.

    Models of transformers use different names for it.
    """
    for owner in (layer, layer.config):
        for name in ("num_heads", "num_attention_heads", "n_heads", "nhead"):
            if isinstance(getattr(owner, name, None), int):
                return getattr(owner, name)
    raise ValueError(f"{type(layer).__name__} does not say how many heads it has, which a learnable alpha needs; use a fixed alpha")
