"""Hopfield attention as a function, and under the names by which transformers finds it.

`hopfield_attention` takes the first kernel that accepts the call. `plain_hopfield_attention`
is the reference with which all kernels agree.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_cpu import accepts as chunked_accepts
from .attention_cpu import chunked_hopfield_attention
from .attention_softmax import accepts as softmax_accepts
from .attention_softmax import softmax_attention
from .checks import check_tensor, check_tensors
from .precision import at_least_fp32
from .simplex import check_alpha_range, is_softmax, learned_alpha, simplex_map


try:
    from entmax import entmax_bisect
except ImportError:
    entmax_bisect = None

# Settings of a call that change nothing; `None` changes nothing either.
_WITHOUT_EFFECT = {"alpha": 1.0, "dropout": 0.0}
# Whether a kernel computes a call, and the kernel.
Kernel = tuple[Callable[..., bool], Callable[..., torch.Tensor]]
_KERNELS: tuple[Kernel, ...] = ((softmax_accepts, softmax_attention), (chunked_accepts, chunked_hopfield_attention))


def hopfield_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Compute one update step of a U-Hop layer (arXiv 2404.03827, equation 3.1).

    $$
    \mathrm{Sep}_\alpha(\beta \, q k^T) \, v
    $$

    At alpha = 1 it is `torch.nn.functional.scaled_dot_product_attention`, except that a query
    without any key gets zeros. At alpha > 1 on a CPU, scores are computed in pieces, and neither
    scores nor weights are kept. `plain_hopfield_attention` computes the remaining calls, such as
    those at alpha > 1 on an accelerator or in a traced graph, and those with a soft cap, sinks or a
    mask that needs a gradient.

    The result is differentiable once in query, key, value and alpha.

    Args:
        query: Queries (B, H, Q, d_k).
        key: Keys (B, H_k, N, d_k), where H is a multiple of H_k. If H_k < H, neighbouring heads of
            queries share one head of keys and values (grouped-query attention), without a copy.
        value: Values (B, H_k, N, d_v).
        alpha: Tsallis exponent in [1, 2]. A tensor must broadcast to (B, H, Q, 1); for example,
            (H, 1, 1) is one exponent per head.
        scaling: The inverse temperature beta; `None` for 1 / sqrt(d_k).
        attention_mask: Broadcastable to (B, H, Q, N). A boolean mask is True where a key is
            present. A floating mask is added to the scores; -inf or its lowest finite value marks
            an absent key.
        dropout: Probability in [0, 1] that a weight is set to zero.
        softcap: Bound c of the scores s before the mask, $c \tanh(s / c)$, as in Gemma 2.
        sinks: Scores, (H,) or (B, H, Q, 1), of one additional memory without content, which takes
            its share of the weight, as in gpt-oss.

    Returns:
        The output (B, H, Q, d_v), in the dtype of `value`.

    Raises:
        TypeError: If the query, key, value or mask is not a tensor.
        ValueError: If alpha is outside [1, 2], dropout is outside [0, 1], the mask is an integer
            mask, the number of query heads is not a multiple of the number of key heads, or the
            number of sinks differs from the number of heads.

    Examples:
        >>> from modeling_uhop import hopfield_attention
        >>> query, key, value = torch.randn(3, 1, 2, 5, 8)
        >>> softmax = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        >>> torch.allclose(hopfield_attention(query, key, value, alpha=1.0), softmax, atol=1e-5)
        True
    """
    settings = {"alpha": alpha, "scaling": scaling, "attention_mask": attention_mask, "dropout": dropout}
    return _attend(_KERNELS, query, key, value, **settings, softcap=softcap, sinks=sinks)


def _attend(kernels: tuple[Kernel, ...], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings) -> torch.Tensor:
    """Compute `hopfield_attention` by the first kernel that accepts the call, or by the plain one.

    Settings without effect are left out. Therefore a kernel can refuse every setting that it does
    not know.
    """
    check_alpha_range(settings["alpha"])
    _check_inputs(query, key, value, **settings)
    settings = {name: x for name, x in settings.items() if isinstance(x, torch.Tensor) or x != _WITHOUT_EFFECT.get(name)}
    return select_kernel(query, key, value, kernels=kernels, **settings)(query, key, value, **settings)


def select_kernel(query, key, value, *, kernels: tuple[Kernel, ...] = _KERNELS, **settings) -> Callable[..., torch.Tensor]:
    """Return the first kernel that accepts a call of `hopfield_attention`, or else the plain one.

    Settings are those arguments that have an effect: alpha = 1 and dropout = 0 are left out.
    """
    return next((attend for accepts, attend in kernels if accepts(query, key, value, **settings)), plain_hopfield_attention)


def plain_hopfield_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `hopfield_attention` with all weights formed at once.

    It is the reference for the other kernels. Unlike `hopfield_attention`, it is always
    differentiable in the mask too. Arguments, return value and errors are those of
    `hopfield_attention`.
    """
    _check_inputs(query, key, value, attention_mask=attention_mask, dropout=dropout, sinks=sinks)
    weights = hopfield_weights(query, key, alpha=alpha, scaling=scaling, attention_mask=attention_mask, softcap=softcap, sinks=sinks)
    return _grouped_matmul(nn.functional.dropout(weights, dropout).to(value.dtype), value)


def hopfield_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    simplex: Callable[..., torch.Tensor] = simplex_map,
) -> torch.Tensor:
    """Compute the association weights (B, H, Q, N) of `hopfield_attention`.

    Arguments are those of `hopfield_attention`. `simplex` maps scores to weights as `simplex_map`.
    """
    dtype = query.dtype
    if dtype == torch.float16:
        # Because scores may overflow fp16, we compute them in fp32.
        query, key = query.float(), key.float()
    scores = _grouped_matmul(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    present = attention_mask
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        present = attention_mask > torch.finfo(attention_mask.dtype).min
        scores = scores + attention_mask
    if sinks is None:
        return simplex(scores, alpha, mask=present).to(dtype)
    sink = (sinks.view(-1, 1, 1) if sinks.dim() == 1 else sinks).to(scores.dtype).expand(*scores.shape[:-1], 1)
    if present is not None:
        present = nn.functional.pad(present.expand(*present.shape[:-1], scores.shape[-1]), (0, 1), value=True)
    return simplex(torch.cat((scores, sink), -1), alpha, mask=present)[..., :-1].to(dtype)


def _grouped_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Compute `left @ right` for (B, H, Q, n) and (B, H_k, n, m), H a multiple of H_k."""
    if left.dim() < 4 or left.shape[1] in (1, right.shape[1]):
        return left @ right
    # Because a broadcast product would copy a shared head for each head of queries, we make the
    # queries that share it rows of one product.
    groups = left.shape[1] // right.shape[1]
    rows = left.unflatten(1, (right.shape[1], groups)).flatten(2, 3) @ right
    return rows.unflatten(2, (groups, left.shape[2])).flatten(1, 2)


def _check_inputs(query, key, value, *, attention_mask=None, dropout=0.0, sinks=None, **others) -> None:
    """Check the arguments of `hopfield_attention` except alpha."""
    check_tensors(query=query, key=key, value=value)
    check_tensor(attention_mask, "attention_mask")
    if attention_mask is not None and attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ValueError(
            f"attention_mask must be boolean (True where a key is present) or floating (added to the scores), got {attention_mask.dtype}"
        )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must lie in [0, 1], got {dropout}")
    if query.dim() < 4:
        return
    heads, shared = query.shape[1], key.shape[1]
    if heads not in (1, shared) and (shared == 0 or heads % shared != 0):
        raise ValueError(f"heads of queries must be a multiple of the heads of keys, got {heads} and {shared}")
    if sinks is not None and sinks.dim() == 1 and len(sinks) != heads:
        raise ValueError(f"sinks must have one score for each of the {heads} heads, got {len(sinks)}")


# Keywords that models pass and that we ignore, because they have no effect on attention or repeat
# what the mask says.
_IGNORED_KEYWORDS = {
    "cache_position",
    "deterministic",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    simplex: Callable[..., torch.Tensor] = simplex_map,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `plain_hopfield_attention` as an attention function of transformers.

    The output has shape (B, Q, H, d_v), the weights (B, H, Q, N). Keywords are those of
    `hopfield_attention_forward`; `simplex` is the map from scores to weights.
    """
    settings = _settings(module, query, key, attention_mask, **kwargs)
    dropout = settings.pop("dropout")
    weights = nn.functional.dropout(hopfield_weights(query, key, simplex=simplex, **settings), dropout)
    return _grouped_matmul(weights.to(value.dtype), value).transpose(1, 2).contiguous(), weights


def hopfield_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernels: tuple[Kernel, ...] = _KERNELS,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute `hopfield_attention` as an attention function of transformers, named "hopfield".

    If `output_attentions` is set, `eager_attention_forward` computes the output and the weights.
    Otherwise the weights are `None`. The exponent alpha is taken from the call, or else from the
    module or its configuration; see `exponent_of`. The following arguments of a model are applied:
    a mask, `position_bias` (added to the scores), `softcap`, sinks (`s_aux`), `is_causal` if there
    is no mask, and dropout in training. The first of `kernels` that accepts the call computes it.

    Raises:
        TypeError: If a keyword is unknown; the message names it and the module that passes it.
        ValueError: If the call is for packed sequences or a paged cache, or passes a sliding window
            without a mask.
    """
    if output_attentions:
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    settings = _settings(module, query, key, attention_mask, **kwargs)
    return _attend(kernels, query, key, value, **settings).transpose(1, 2), None


def triton_attention_forward(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute Hopfield attention by the Triton kernels, named "hopfield_triton" in transformers.

    Arguments, return value and errors are those of `hopfield_attention_forward`. If the kernels do
    not support the call, it falls back to "hopfield". They do not support:

    - softmax, an alpha close to 1, and a learnable alpha;
    - dropout, a soft cap, and sinks;
    - fp64, wide heads, values of another width than the keys, and broadcasting;
    - meta tensors and traced graphs;
    - masks other than masks of keys, (B, 1, 1, N) or expanded from this shape.
    """
    # Because Triton is an optional dependency and slow to import, we import it here.
    from .attention_triton import accepts, triton_hopfield_attention

    kernels = ((accepts, triton_hopfield_attention), *_KERNELS)
    return hopfield_attention_forward(*args, kernels=kernels, **kwargs)


def entmax_attention_forward(*args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute Hopfield attention by the solver of the entmax library.

    Arguments, return value and errors are those of `eager_attention_forward`. Its name in
    transformers is "hopfield_entmax", registered only if the entmax library is installed.
    """
    return eager_attention_forward(*args, simplex=_library_simplex_map, **kwargs)


def _library_simplex_map(scores: torch.Tensor, alpha: float | torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `simplex_map` by bisection in the entmax library.

    At alpha = 1, which the library does not support, it is softmax.
    """
    if is_softmax(alpha):
        return simplex_map(scores, alpha, mask=mask)
    wide = at_least_fp32(scores)
    if mask is None:
        return entmax_bisect(wide, alpha=alpha, dim=-1).to(scores.dtype)
    # Because the library's bisection turns -inf into NaN, we use a large finite score.
    weights = entmax_bisect(wide.masked_fill(~mask, -1e9), alpha=alpha, dim=-1)
    return weights.masked_fill(~mask, 0.0).to(scores.dtype)


def exponent_of(module: Any) -> float | torch.Tensor:
    """Return alpha of an attention layer of a transformers model.

    It is `hopfield_alpha` of the configuration that the layer belongs to, or 1 without one. With
    `hopfield_learnable_alpha` it is computed from the layer's parameter `hopfield_alpha_logit`
    (H,), and has shape (H, 1, 1).

    Raises:
        ValueError: If alpha should be learned and the layer has no such parameter.
    """
    config = getattr(module, "hopfield_config", None) or getattr(module, "config", None)
    if not getattr(config, "hopfield_learnable_alpha", False):
        return getattr(config, "hopfield_alpha", 1.0)
    if getattr(module, "hopfield_alpha_logit", None) is None:
        raise ValueError(
            f"hopfield_learnable_alpha is set, but {type(module).__name__} has no learned alpha; import modeling_uhop before the model is "
            "loaded, or call use_hopfield_attention(model)"
        )
    return learned_alpha(module.hopfield_alpha_logit)


def _settings(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    alpha: float | torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **others,
) -> dict[str, Any]:
    """Convert what a model passes to arguments of `hopfield_attention`.

    See `hopfield_attention_forward`.
    """
    name = type(module).__name__
    for keyword, given in others.items():
        if given is None or keyword in _IGNORED_KEYWORDS:
            continue
        if keyword in ("cu_seq_lens_q", "cu_seq_lens_k", "cache"):
            raise ValueError(f"{name} passes {keyword!r}, for packed sequences or a paged cache, which Hopfield attention does not support")
        raise TypeError(
            f"{name} passes the keyword {keyword!r}, which Hopfield attention does not know; a keyword is never dropped silently"
        )
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and sliding_window is not None and keys > sliding_window:
        raise ValueError(
            f"{name} passes sliding_window={sliding_window} without a mask; Hopfield attention needs a mask that contains the window"
        )
    if attention_mask is None and is_causal and queries > 1:
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    return {
        "alpha": exponent_of(module) if alpha is None else alpha,
        "scaling": scaling,
        "attention_mask": _add_bias_to_mask(attention_mask, position_bias),
        "dropout": dropout if module.training else 0.0,
        "softcap": softcap,
        "sinks": s_aux if sinks is None else sinks,
    }


def _add_bias_to_mask(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """Add a bias of the scores to a mask."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return torch.where(mask > torch.finfo(mask.dtype).min, mask + bias, -torch.inf)


def hopfield_mask(*args, **kwargs) -> torch.Tensor | None:
    """Make the mask for Hopfield attention in transformers.

    A causal mask is always written out, because these attention functions do not apply causality
    themselves.
    """
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


# Names of the kernels in transformers, for `attn_implementation` and `set_attn_implementation`.
KERNELS: dict[str, Callable] = {"hopfield": hopfield_attention_forward, "hopfield_triton": triton_attention_forward}
if entmax_bisect is not None:
    KERNELS["hopfield_entmax"] = entmax_attention_forward
for registered, function in KERNELS.items():
    ALL_ATTENTION_FUNCTIONS.register(registered, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(registered, hopfield_mask)


def hopfield_kernel(config, requested: str | None) -> str:
    """Return the attention implementation of one of our models for a requested one.

    If none was requested, it is "hopfield", or "eager" if the configuration always asks for
    weights.

    Raises:
        ValueError: If the requested attention does not compute alpha-entmax and the model has alpha
            > 1.
    """
    if requested is None:
        return "eager" if config.output_attentions else "hopfield"
    if (config.alpha != 1.0 or config.learnable_alpha) and requested not in ("eager", *KERNELS):
        raise ValueError(
            f"attn_implementation={requested!r} does not compute alpha-entmax, and this model has "
            f"alpha={config.alpha}, learnable_alpha={config.learnable_alpha}; use 'eager' or one of {tuple(KERNELS)} "
            "(note that a configuration keeps the attention of a model that was made from it)"
        )
    return requested
