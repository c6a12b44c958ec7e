"""Hopfield attention on a CPU for alpha > 1: a piece of the scores at a time, so that they stay in the cache.

Nothing of the size of the scores is kept: what the backward pass needs of a row, besides query, key and value, is its largest score and
its threshold, from which the weights follow in one pass. Scores are computed again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .simplex import (
    at_least_fp32,
    check_alpha_range,
    entmax_base,
    entmax_eps_gradient,
    entmax_score_gradient,
    entmax_threshold,
    entmax_weights,
)


# Scores in a piece: 512 KB of fp32, which with what the solver needs fits the second-level cache of today's cores.
_PIECE = 131072

Piece = tuple[slice, slice, slice]


def chunked_hopfield_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float | torch.Tensor,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`hopfield_attention` for alpha in (1, 2], in pieces, with dropout of the weights.

    Differentiable once, in query, key, value and alpha; not in the mask.

    Args:
        dropout: Probability in [0, 1] that a weight is left out.
        The others, and the return value, are those of `hopfield_attention`.

    Raises:
        ValueError: If alpha is outside [1, 2].
    """
    check_alpha_range(alpha)
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    mask_shape = () if attention_mask is None else attention_mask.shape
    scores_shape = torch.broadcast_shapes((*query.shape[:3], 1), (*key.shape[:2], 1, key.shape[2]), mask_shape)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(scores_shape)
    if isinstance(alpha, torch.Tensor):
        eps: float | torch.Tensor = (alpha.to(at_least_fp32(query).dtype) - 1.0).expand(*scores_shape[:3], 1)
    else:
        eps = alpha - 1.0
    query, key, value = (x.expand(*scores_shape[:2], *x.shape[2:]) for x in (query, key, value))
    with torch.autocast(device, enabled=False):
        output: torch.Tensor = _ChunkedAttention.apply(query, key, value, eps, attention_mask, dropout)
    return output


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, eps, mask, dropout):
        output = value.new_zeros(*query.shape[:3], value.shape[-1])
        largest = at_least_fp32(query).new_zeros(*query.shape[:3], 1)
        threshold = torch.zeros_like(largest)
        seed = int(torch.randint(2**62, ())) if dropout > 0.0 else 0
        kept = _dropout_factors(seed, dropout)
        for piece in _pieces(query, key):
            scores = _scores(query, key, mask, piece)
            largest[piece] = scores.amax(-1, keepdim=True)
            base, absent = _base(scores, largest[piece], eps, mask)
            threshold[piece] = entmax_threshold(base, _of(eps, piece))
            weights, _ = entmax_weights(base, threshold[piece], _of(eps, piece))
            weights = _without(absent, weights)
            if kept is not None:
                weights = weights * kept(weights)
            output[piece] = weights.to(value.dtype) @ value[piece[:2]]
        ctx.save_for_backward(query, key, value, largest, threshold, *(x for x in (eps, mask) if isinstance(x, torch.Tensor)))
        ctx.eps, ctx.masked, ctx.seed, ctx.dropout = None if isinstance(eps, torch.Tensor) else eps, mask is not None, seed, dropout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, largest, threshold, *rest = ctx.saved_tensors
        mask = rest.pop() if ctx.masked else None
        eps: Any = rest.pop() if ctx.eps is None else ctx.eps
        # Sums over many pieces, in fp32 or better.
        grad_query, grad_key, grad_value = (torch.zeros_like(at_least_fp32(x)) for x in (query, key, value))
        grad_eps = torch.zeros_like(largest) if ctx.needs_input_grad[3] else None
        kept = _dropout_factors(ctx.seed, ctx.dropout)
        for piece in _pieces(query, key):
            memories = piece[:2]
            base, absent = _base(_scores(query, key, mask, piece), largest[piece], eps, mask)
            weights, escort = entmax_weights(base, threshold[piece], _of(eps, piece))
            weights = used = _without(absent, weights)
            grad_weights = at_least_fp32(grad[piece] @ value[memories].mT)
            if kept is not None:
                factor = kept(weights)
                used, grad_weights = weights * factor, grad_weights * factor
            grad_scores = _without(absent, entmax_score_gradient(escort, grad_weights)).to(query.dtype)
            grad_query[piece] = (grad_scores @ key[memories]).to(grad_query.dtype)
            grad_key[memories] += grad_scores.mT @ query[piece]
            grad_value[memories] += used.to(value.dtype).mT @ grad[piece]
            if grad_eps is not None:
                terms = entmax_eps_gradient(weights, escort, grad_weights, eps[piece])
                grad_eps[piece] = terms.sum(-1, keepdim=True)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_eps, None, None


def _pieces(query: torch.Tensor, key: torch.Tensor) -> Iterator[Piece]:
    """Slices of batch, heads and queries whose scores are about `_PIECE` in number: whole rows, and whole heads where they fit."""
    batch_size, heads, queries = query.shape[:3]
    keys = key.shape[2]
    if keys == 0:
        return
    rows = max(1, min(queries, _PIECE // keys))
    per_head = max(1, min(heads, _PIECE // max(1, keys * queries)))
    per_batch = max(1, min(batch_size, _PIECE // max(1, keys * queries * heads)))
    for batch in range(0, batch_size, per_batch):
        for head in range(0, heads, per_head):
            for row in range(0, queries, rows):
                yield slice(batch, batch + per_batch), slice(head, head + per_head), slice(row, row + rows)


def _of(eps: float | torch.Tensor, piece: Piece) -> float | torch.Tensor:
    return eps[piece] if isinstance(eps, torch.Tensor) else eps


def _scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, piece: Piece) -> torch.Tensor:
    """Scores of a piece, -inf for absent keys."""
    scores = at_least_fp32(query[piece] @ key[piece[:2]].mT)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask[piece], -torch.inf)
    return (scores + mask[piece]).masked_fill_(mask[piece] <= torch.finfo(mask.dtype).min, -torch.inf)


def _base(
    scores: torch.Tensor, largest: torch.Tensor, eps: float | torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`entmax_base` of scores, and which rows have no key; these get equal scores, so that nothing is divided by 0."""
    absent = None
    if mask is not None:
        absent = largest == -torch.inf
        scores, largest = scores.masked_fill_(absent, 0.0), largest.masked_fill(absent, 0.0)
    return entmax_base(scores, largest, eps), absent


def _without(absent: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    return rows if absent is None else rows.masked_fill_(absent, 0.0)


def _dropout_factors(seed: int, dropout: float) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Factors of dropout for one piece after another, the same again for the same seed; `None` without dropout."""
    if dropout == 0.0:
        return None
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    return lambda weights: torch.empty_like(weights).bernoulli_(1.0 - dropout, generator=generator).mul_(scale)
