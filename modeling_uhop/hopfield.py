"""Hopfield layers: attention seen as one retrieval step from a memory of tokens."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_interface import KERNELS, eager_attention_forward, hopfield_kernel
from .feature_map import FeatureMap
from .modeling_hopfield import HopfieldPreTrainedModel
from .validation import check_tensor, check_tensors, is_plain


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
        self.reset_parameters()

    @property
    def alpha(self) -> float | torch.Tensor:
        """The fixed exponent, or the learned ones (H, 1, 1), which a sigmoid keeps inside (1, 2)."""
        if self.alpha_logit is None:
            return self.config.alpha
        return 1.0 + self.alpha_logit.float().sigmoid().view(-1, 1, 1)

    @property
    def scaling(self) -> float:
        """The inverse temperature beta: the configuration's, or 1 / sqrt(head width)."""
        return self.head_dim**-0.5 if self.config.beta is None else self.config.beta

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

        Args:
            attention_mask: (B, 1, Q, N) or what broadcasts to it, as in `hopfield_attention`; of memories alone, (B, 1, 1, N).

        Returns:
            The output (B, Q, hidden_size), and the association weights (B, H, Q, N) where the kernel in use forms them.

        Raises:
            TypeError: For inputs that are no tensors.
            ValueError: For a mask without four axes, and for an attention that does not compute the alpha of the configuration.
        """
        check_tensors(states=states)
        for name, given in (("memories", memories), ("contents", contents), ("attention_mask", attention_mask)):
            check_tensor(given, name)
        kernel = hopfield_kernel(self.config, self.config._attn_implementation or "eager")
        if attention_mask is not None and attention_mask.dim() != 4 and kernel in ("eager", *KERNELS):
            raise ValueError(
                f"attention_mask must have shape (B, 1, Q, N), got {tuple(attention_mask.shape)}; of memories alone, (B, N), pass "
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
            query = attend(self, query, key, key, attention_mask, scaling=self.scaling, **kwargs)[0].transpose(1, 2)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
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
        return tokens.view(*tokens.shape[:-1], self.num_attention_heads, self.head_dim).transpose(1, 2)


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


class FoldableModel(HopfieldPreTrainedModel):
    """A model whose layers are `HopfieldAttention`."""

    read_at_each_call = (*HopfieldPreTrainedModel.read_at_each_call, "attention_probs_dropout_prob")

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
        for module in folded.modules():
            if isinstance(module, HopfieldPreTrainedModel):
                module.remember_configuration()
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
        check_tensors(states=states)
        queries = self.layernorm_query(self.queries).expand(states.shape[0], -1, -1)
        contents = self.layernorm_content(states)
        present = None if mask is None else mask.bool()[:, None, None, :]
        return self.attention(queries, self.memories(states), present, contents, **kwargs)
