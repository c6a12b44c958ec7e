"""Hopfield layers: attention seen as one retrieval step from a memory of tokens."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import chunked_hopfield_attention
from .feature_map import FeatureMap
from .simplex import cast_by_autocast, simplex_map
from .validation import is_plain, is_readable


def hopfield_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`Sep_alpha(scaling query key^T) value`, the retrieval step behind a U-Hop layer (arXiv 2404.03827, equation 3.1).

    At alpha = 1 it is `torch.nn.functional.scaled_dot_product_attention`, save that a query without any key gets zeros.

    Args:
        query: (B, H, Q, d_k).
        key: (B, H, N, d_k).
        value: (B, H, N, d_v).
        alpha: Tsallis exponent in [1, 2]; a tensor must broadcast to (B, H, Q, 1), for example (H, 1, 1) for one a head.
        scaling: The inverse temperature beta; `None` for 1 / sqrt(d_k).
        attention_mask: Broadcastable to (B, H, Q, N): boolean, True where a key may be attended to, or floating, added to the scores,
            where -inf or the lowest finite value marks an absent key.

    Returns:
        (B, H, Q, d_v), of the dtype of `value`.

    Raises:
        ValueError: For an alpha outside [1, 2].

    >>> from modeling_uhop import hopfield_attention

    >>> query, key, value = torch.randn(3, 1, 2, 5, 8)
    >>> softmax = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    >>> torch.allclose(hopfield_attention(query, key, value, alpha=1.0), softmax, atol=1e-5)
    True
    """
    return hopfield_weights(query, key, alpha=alpha, scaling=scaling, attention_mask=attention_mask).to(value.dtype) @ value


def hopfield_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 1.0,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Association weights (B, H, Q, N) of `hopfield_attention`."""
    # Scaled first, so that half-precision scores do not overflow.
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(-1, -2)
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return simplex_map(scores, alpha, mask=attention_mask)
    present = attention_mask > torch.finfo(attention_mask.dtype).min
    return simplex_map(scores + attention_mask, alpha, mask=present)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    alpha: float | torch.Tensor = 1.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hopfield_attention` in the form of transformers' attention functions: output (B, Q, H, d_v) and weights (B, H, Q, N)."""
    weights = hopfield_weights(query, key, alpha=alpha, scaling=scaling, attention_mask=attention_mask)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), weights


def hopfield_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    alpha: float | torch.Tensor = 1.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention that transformers knows as "hopfield": what `eager_attention_forward` computes, by the fastest kernel there is.

    At alpha = 1 `scaled_dot_product_attention`; above, on a CPU, `chunked_hopfield_attention`: neither forms weights. Elsewhere (on an
    accelerator, in a traced graph, for a mask that asks for a gradient), and where `output_attentions` asks for weights, the plain one.
    """
    softmax = not isinstance(alpha, torch.Tensor) and alpha == 1.0
    learned_mask = attention_mask is not None and attention_mask.requires_grad
    if kwargs.get("output_attentions") or learned_mask or not (softmax or is_readable(query)):
        return eager_attention_forward(module, query, key, value, attention_mask, alpha=alpha, **kwargs)
    if softmax:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **{**kwargs, "is_causal": False})
    dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
    settings: dict[str, Any] = {"alpha": alpha, "scaling": kwargs.get("scaling"), "attention_mask": attention_mask, "dropout": dropout}
    return chunked_hopfield_attention(query, key, value, **settings).transpose(1, 2), None


def triton_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    alpha: float | torch.Tensor = 1.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention that transformers knows as "hopfield_triton": `triton_hopfield_attention`, and "hopfield" for what it does not do.

    That is softmax, an alpha near it or learnable, dropout, fp64, broadcasting, wide heads, values of another width, tensors without
    values, traced graphs, and masks other than of keys alone, (B, 1, 1, N) or expanded from it.
    """
    from .triton_attention import MAX_WIDTH, MIN_ALPHA, triton_hopfield_attention  # an extra, and slow to import

    query, key, value = cast_by_autocast(query, key, value)
    of_keys = attention_mask is None or (
        attention_mask.dtype == torch.bool
        and attention_mask.dim() == 4
        and attention_mask.shape[0] in (1, len(key))
        and attention_mask.shape[1] == 1
        and (attention_mask.shape[2] == 1 or attention_mask.stride(2) == 0)
    )
    dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
    alike = query.shape[:2] == key.shape[:2] and key.shape == value.shape and query.dtype == key.dtype == value.dtype
    fits = alike and query.shape[-1] <= MAX_WIDTH.get(query.dtype, 0)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or query.is_meta
    other = dropout > 0.0 or kwargs.get("output_attentions") or traced
    if isinstance(alpha, torch.Tensor) or alpha < MIN_ALPHA or other or not fits or not of_keys:
        return hopfield_attention_forward(module, query, key, value, attention_mask, alpha=alpha, **kwargs)
    key_mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(len(key), key.shape[2])
    output = triton_hopfield_attention(query, key, value, alpha=alpha, scaling=kwargs.get("scaling"), key_mask=key_mask)
    return output.transpose(1, 2), None


def hopfield_mask(*args, **kwargs) -> torch.Tensor | None:
    """The mask that transformers makes for these attentions: a causal one too is written out, as they know no causality of their own."""
    mask: torch.Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return mask


for name, function in (("hopfield", hopfield_attention_forward), ("hopfield_triton", triton_attention_forward)):
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, hopfield_mask)


def hopfield_kernel(config, requested: str | None) -> str | None:
    """The attention to use where `requested` was asked for: for alpha > 1, if none was, "hopfield", or "eager" where weights are wanted.

    Raises:
        ValueError: For one that does not compute alpha-entmax while the model has alpha > 1.
    """
    if config.alpha == 1.0 and not config.learnable_alpha:
        return requested
    if requested not in (None, "eager", "hopfield", "hopfield_triton"):
        raise ValueError(
            f"attn_implementation={requested!r} does not compute alpha-entmax, and this model has "
            f"alpha={config.alpha}, learnable_alpha={config.learnable_alpha}; use 'hopfield', "
            "'hopfield_triton' or 'eager' (a configuration that a model was made from remembers its attention)"
        )
    if requested is None:
        return "eager" if config.output_attentions else "hopfield"
    return requested


class MemorySet(NamedTuple):
    """What one layer retrieves from: its feature map, its memories (B, M, d), and which of them are present (B, M)."""

    feature_map: FeatureMap | None
    memories: torch.Tensor
    mask: torch.Tensor | None = None

    def features(self) -> torch.Tensor:
        """The memories in feature space (B, M, D); as they are in a layer without a feature map."""
        return self.memories if self.feature_map is None else self.feature_map(self.memories)


class HopfieldAttention(nn.Module):
    """Multi-head U-Hop layer `Sep_alpha[beta (W_Q Phi(X)) (W_K Phi(Xi))^T] V` (U-Hop, arXiv 2404.03827, equation 3.1).

    Phi acts on queries and keys, never on values. V is `W_V Xi` (`config.value_source = "memory"`, as in the authors' code) or
    `W_V W_K Xi` ("projected_memory", as in equation 3.1). Before the last step, `update_steps - 1` steps retrieve in key space,
    `q <- Sep_alpha(beta q k^T) k`.

    Reads from the configuration: hidden_size, num_attention_heads, head_dim (where it has one), attention_probs_dropout_prob, qkv_bias,
    alpha, learnable_alpha, beta, use_feature_map, feature_dim, feature_init, update_steps, value_source, and which kernel computes the
    attention.
    """

    def __init__(self, config):
        super().__init__()
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None and config.hidden_size % config.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {config.hidden_size} and {config.num_attention_heads}"
            )
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads if head_dim is None else head_dim
        self.scaling = self.head_dim**-0.5 if config.beta is None else config.beta
        self.attention_dropout = config.attention_probs_dropout_prob
        self.update_steps = config.update_steps
        self.value_source = config.value_source
        self.is_causal = False

        feature_dim = config.feature_dim or config.hidden_size
        self.feature_map = FeatureMap(config.hidden_size, feature_dim, start=config.feature_init) if config.use_feature_map else None
        in_dim = feature_dim if config.use_feature_map else config.hidden_size
        inner_dim = self.num_attention_heads * self.head_dim
        value_dim = inner_dim if config.value_source == "projected_memory" else config.hidden_size
        self.q_proj = nn.Linear(in_dim, inner_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(in_dim, inner_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(value_dim, inner_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner_dim, config.hidden_size, bias=True)
        self.alpha_logit = nn.Parameter(torch.empty(self.num_attention_heads)) if config.learnable_alpha else None
        self.reset_parameters()

    @property
    def alpha(self) -> float | torch.Tensor:
        """The fixed exponent, or the learned ones (H, 1, 1), which a sigmoid keeps inside (1, 2)."""
        if self.alpha_logit is None:
            return self.config.alpha
        return 1.0 + self.alpha_logit.float().sigmoid().view(-1, 1, 1)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start a learnable alpha anew, at `config.alpha`."""
        if self.alpha_logit is not None:
            init.constant_(self.alpha_logit, math.log((self.config.alpha - 1.0) / (2.0 - self.config.alpha)))

    def forward(
        self,
        states: torch.Tensor,
        memories: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        contents: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Retrieve for each state pattern (B, Q, hidden_size) from `memories` (B, N, hidden_size), the states themselves by default.

        `contents` (B, N, hidden_size) are what values are made of where that is not the memories.

        Returns:
            The output (B, Q, hidden_size), and the association weights (B, H, Q, N) where the kernel in use forms them.
        """
        state_features = states if self.feature_map is None else self.feature_map(states)
        if memories is None:
            memories, memory_features = states, state_features
        else:
            memory_features = memories if self.feature_map is None else self.feature_map(memories)
        query = self._split_heads(self.q_proj(state_features))
        key = self._split_heads(self.k_proj(memory_features))
        contents = memories if contents is None else contents
        value = self._split_heads(self.v_proj(self.k_proj(contents) if self.value_source == "projected_memory" else contents))

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if self.alpha_logit is not None or self.config.alpha != 1.0:
            kwargs["alpha"] = self.alpha
        for _ in range(self.update_steps - 1):
            query = attend(self, query, key, key, attention_mask, scaling=self.scaling, **kwargs)[0].transpose(1, 2)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    @torch.no_grad()
    def fold_feature_map(self) -> None:
        """Take Phi into W_Q and W_K, and W_K into W_V where values come through it: fewer products, and the same function.

        Raises:
            ValueError: If one of them is no plain matrix, but in an adapter, hooked, offloaded or quantized.
        """
        if self.feature_map is None:
            return
        plain = {"feature_map": FeatureMap, "q_proj": nn.Linear, "k_proj": nn.Linear, "v_proj": nn.Linear}
        for name, kind in plain.items():
            module = getattr(self, name)
            if not is_plain(module, kind):
                found = type(module)
                what = (
                    "one that is hooked, patched or offloaded, or has quantized weights"
                    if found is kind
                    else f"{found.__module__}.{found.__name__}"
                )
                raise ValueError(
                    f"{name} must be a plain {kind.__name__} to be folded, got {what}; "
                    "of a model with adapters fold what merge_and_unload() returns"
                )
        if self.value_source == "projected_memory":
            self.v_proj = _composed(self.v_proj, self.k_proj.weight, self.k_proj.bias)
            self.value_source = "memory"
        self.q_proj = _composed(self.q_proj, self.feature_map.weight)
        self.k_proj = _composed(self.k_proj, self.feature_map.weight)
        self.feature_map = None

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.num_attention_heads, self.head_dim)).transpose(1, 2)


def _composed(outer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """The linear layer `outer(weight x + bias)`, composed in fp64."""
    like = {"device": weight.device, "dtype": weight.dtype}
    composed = nn.utils.skip_init(nn.Linear, weight.shape[1], outer.out_features, outer.bias is not None, **like)
    composed.train(outer.training).requires_grad_(outer.weight.requires_grad)
    wide = outer.weight.double()
    composed.weight.copy_(wide @ weight.double())
    if outer.bias is not None:
        composed.bias.copy_(outer.bias if bias is None else wide @ bias.double() + outer.bias.double())
    return composed


class FoldableMixin(nn.Module):
    """For models whose layers are `HopfieldAttention`."""

    config: Any

    def fold_feature_maps(self):
        """A copy of the model for inference, whose feature maps are taken into its projections: fewer products, and the same outputs.

        It is a model without Phi (`config.use_feature_map` is `False`), and saves and loads as one; this one stays as it is.

        Raises:
            ValueError: For a model with adapters of Phi or projections, which `merge_and_unload()` merges, or with hooked,
                offloaded or quantized ones.
        """
        folded = copy.deepcopy(self)
        for module in folded.modules():
            if isinstance(module, HopfieldAttention):
                module.fold_feature_map()
        for module in folded.modules():
            config = getattr(module, "config", None)
            if config is not None and getattr(config, "use_feature_map", False):
                config.use_feature_map, config.value_source, config.feature_dim = False, "memory", None
        return folded


class HopfieldPooling(nn.Module):
    """Learned state patterns Q retrieve from a set X: HopfieldPooling (Ramsauer et al., arXiv 2008.02217), with a feature map.

    `Sep_alpha[beta (W_Q Phi(LN(Q))) (W_K Phi(LN(X)))^T] W_V LN(X)`, each of the three with a layer norm of its own; heads, beta and further
    retrieval steps as in `HopfieldAttention`. Without Phi and at alpha = 1 it is the published layer. A set without any item gives
    the bias of the output projection.

    Reads from the configuration what `HopfieldAttention` does, num_queries, layer_norm_eps and initializer_range.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(1, config.num_queries, config.hidden_size))
        self.layernorm_query = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_memory = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_content = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = HopfieldAttention(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the state patterns anew."""
        init.normal_(self.queries, mean=0.0, std=self.config.initializer_range)

    def memories(self, states: torch.Tensor) -> torch.Tensor:
        """Items as the feature map sees them."""
        return self.layernorm_memory(states)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pool items (B, N, hidden_size), those that the mask (B, N) has, or all, to (B, num_queries, hidden_size); and the weights."""
        queries = self.layernorm_query(self.queries).expand(states.shape[0], -1, -1)
        contents = self.layernorm_content(states)
        present = None if mask is None else mask.bool()[:, None, None, :]
        return self.attention(queries, self.memories(states), present, contents, **kwargs)
