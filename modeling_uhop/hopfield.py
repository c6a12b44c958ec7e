"""Hopfield layers: attention as one update step that retrieves from a memory of tokens; and an MLP."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_interface import KERNELS, eager_attention_forward, hopfield_kernel
from .checks import check_tensor, check_tensors
from .feature_map import FeatureMap
from .folding import fold_layer
from .memories import MemorySet, present_memories
from .precision import at_least_fp32
from .simplex import alpha_logit, learned_alpha


class HopfieldAttention(nn.Module):
    r"""Multi-head attention that retrieves in feature space.

    This is the U-Hop layer (arXiv 2404.03827, equation 3.1):

    $$
    \mathrm{Sep}_\alpha [\beta (W_Q \Phi(X)) (W_K \Phi(\Xi))^T] \, V
    $$

    Phi acts on queries and keys, never on values. V is $W_V \Xi$ with
    `config.value_source = "memory"`, as in the authors' code, or $W_V W_K \Xi$ with
    "projected_memory", as in equation 3.1. Before the last step, `update_steps - 1` steps retrieve
    in key space: $q \leftarrow \mathrm{Sep}_\alpha(\beta q k^T) k$.

    The layer reads these fields of `config`: hidden_size, num_attention_heads, head_dim
    (if it has one), attention_probs_dropout_prob, qkv_bias, alpha, learnable_alpha, beta,
    learnable_beta, use_feature_map, feature_dim, feature_init, update_steps, value_source, and the attention
    implementation.

    Raises:
        ValueError: If hidden_size is not a multiple of num_attention_heads and there is no
            head_dim.
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
        self.value_source = config.value_source
        self.is_causal = False

        feature_dim = config.feature_dim or config.hidden_size
        self.feature_map = FeatureMap(config.hidden_size, feature_dim, feature_init=config.feature_init) if config.use_feature_map else None
        in_dim = feature_dim if config.use_feature_map else config.hidden_size
        inner_dim = self.num_attention_heads * self.head_dim
        value_dim = inner_dim if config.value_source == "projected_memory" else config.hidden_size
        self.q_proj = nn.Linear(in_dim, inner_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(in_dim, inner_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(value_dim, inner_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner_dim, config.hidden_size, bias=True)
        self.alpha_logit = nn.Parameter(torch.empty(self.num_attention_heads)) if config.learnable_alpha else None
        self.log_beta = nn.Parameter(torch.empty(self.num_attention_heads)) if config.learnable_beta else None
        self.reset_parameters()

    @property
    def alpha(self) -> float | torch.Tensor:
        """The fixed exponent, or the learned exponents (H, 1, 1) in (1, 2)."""
        if self.alpha_logit is None:
            return self.config.alpha
        return learned_alpha(self.alpha_logit)

    @property
    def beta(self) -> float | torch.Tensor:
        """The inverse temperature: the fixed number, or the learned ones (H, 1, 1) in fp32 or better."""
        if self.log_beta is None:
            return self._initial_beta
        return at_least_fp32(self.log_beta).exp().view(-1, 1, 1)

    @property
    def scaling(self) -> float:
        """What the attention function multiplies scores with: a fixed beta. Queries carry a learned one."""
        return self._initial_beta if self.log_beta is None else 1.0

    @property
    def _initial_beta(self) -> float:
        return self.head_dim**-0.5 if self.config.beta is None else self.config.beta

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set a learnable alpha to `config.alpha`, and a learnable beta to `config.beta` or its default."""
        if self.alpha_logit is not None:
            init.constant_(self.alpha_logit, alpha_logit(self.config.alpha))
        if self.log_beta is not None:
            init.constant_(self.log_beta, math.log(self._initial_beta))

    def forward(
        self,
        states: torch.Tensor,
        memories: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        contents: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Retrieve from `memories` for each state pattern.

        Further keyword arguments go to the attention function.

        Args:
            states: State patterns (B, Q, hidden_size).
            memories: Stored patterns (B, N, hidden_size); `None` for the states themselves.
            attention_mask: Mask (B, 1, Q, N), or broadcastable to it, as in `hopfield_attention`. A
                mask of memories only has shape (B, 1, 1, N).
            contents: Patterns (B, N, hidden_size) from which values are computed; `None` for the
                memories.

        Returns:
            The output (B, Q, hidden_size), and the association weights (B, H, Q, N), or `None` if
                the attention function does not form them.

        Raises:
            TypeError: If an input is not a tensor.
            ValueError: If the mask does not have four axes, or if the attention implementation does
                not compute the alpha of the configuration.
        """
        check_tensors(states=states)
        for name, given in (("memories", memories), ("contents", contents), ("attention_mask", attention_mask)):
            check_tensor(given, name)
        kernel = hopfield_kernel(self.config, self.config._attn_implementation or "eager")
        if attention_mask is not None and attention_mask.dim() != 4 and kernel in ("eager", *KERNELS):
            raise ValueError(
                f"attention_mask must have shape (B, 1, Q, N), got {tuple(attention_mask.shape)}; for a mask of memories (B, N), pass "
                "mask[:, None, None]"
            )
        state_features = states if self.feature_map is None else self.feature_map(states)
        if memories is None:
            memories, memory_features = states, state_features
        else:
            memory_features = memories if self.feature_map is None else self.feature_map(memories)
        query = self._split_heads(self.q_proj(state_features))
        key = self._split_heads(self.k_proj(memory_features))
        contents = memories if contents is None else contents
        value = self._split_heads(self.v_proj(self.k_proj(contents) if self.value_source == "projected_memory" else contents))

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager_attention_forward)
        if self.alpha_logit is not None or self.config.alpha != 1.0:
            kwargs["alpha"] = self.alpha
        for _ in range(self.config.update_steps - 1):
            query = attend(self, self._scaled(query), key, key, attention_mask, scaling=self.scaling, **kwargs)[0].transpose(1, 2)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, weights = attend(self, self._scaled(query), key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def memory_set(
        self, states: torch.Tensor, memories: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, *args, **kwargs
    ) -> MemorySet:
        """Return what `forward` retrieves from, given the arguments of `forward`."""
        memories = states if memories is None else memories
        return MemorySet(self.feature_map, memories, present_memories(attention_mask, memories))

    def fold_feature_map(self) -> None:
        """Fold Phi into W_Q and W_K; see `fold_layer`."""
        fold_layer(self)

    def _scaled(self, query: torch.Tensor) -> torch.Tensor:
        """Multiply queries (B, H, Q, width) by a learned beta; every kernel takes such queries."""
        return query if self.log_beta is None else query * torch.as_tensor(self.beta).to(query.dtype)

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.view(*tokens.shape[:-1], self.num_attention_heads, self.head_dim).transpose(1, 2)


class HopfieldPooling(nn.Module):
    r"""Pool a set of items: learned state patterns Q retrieve from the set X.

    This is HopfieldPooling (Ramsauer et al., arXiv 2008.02217) with a feature map:

    $$
    \mathrm{Sep}_\alpha [\beta (W_Q \Phi(\mathrm{LN}(Q))) (W_K \Phi(\mathrm{LN}(X)))^T] \,
    W_V \mathrm{LN}(X)
    $$

    Each of the three inputs has its own layer norm. Heads, beta and further update steps are as
    in `HopfieldAttention`. Without Phi and at alpha = 1 it is the published layer. A set without
    any item gives the bias of the output projection.

    With one query, one head, identities as projections and no Phi, it is the sequence pooling of
    compact transformers (arXiv 2104.05704), whose score of a token x is $\langle Q, x \rangle$.

    The layer reads the fields of `config` that `HopfieldAttention` reads, layer_norm_eps,
    initializer_range, and num_queries (1 if it has none).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.empty(1, getattr(config, "num_queries", 1), config.hidden_size))
        self.layernorm_query = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_memory = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_content = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = HopfieldAttention(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new values for the state patterns."""
        init.normal_(self.queries, mean=0.0, std=self.config.initializer_range)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pool the items of each set.

        Further keyword arguments go to the attention function.

        Args:
            states: Items (B, N, hidden_size).
            mask: Boolean or 0 / 1 mask (B, N), true where an item is present; `None` if all are.

        Returns:
            The pooled items (B, num_queries, hidden_size), and the association weights, or `None`
                as in `HopfieldAttention.forward`.

        Raises:
            TypeError: If the items are not a tensor.
        """
        check_tensors(states=states)
        queries = self.layernorm_query(self.queries).expand(states.shape[0], -1, -1)
        contents = self.layernorm_content(states)
        present = None if mask is None else mask.bool()[:, None, None, :]
        return self.attention(queries, self.layernorm_memory(states), present, contents, **kwargs)


class MLP(nn.Module):
    """Two linear layers with an activation between them, which follow a retrieval."""

    def __init__(self, width: int, hidden_width: int, activation: str):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.activation_fn = ACT2FN[activation]
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))
