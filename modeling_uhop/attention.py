"""Hopfield attention on a CPU for alpha > 1: a piece of the scores at a time, so that they stay in the cache.

Nothing of the size of the scores is kept: what the backward pass needs of a row, besides query, key and value, is its largest score and
its threshold, from which the weights follow in one pass. Scores are computed again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .simplex import at_least_fp32, entmax_eps_gradient, entmax_score_gradient, entmax_threshold, entmax_weights, has_root


# Scores in a piece: 512 KB of fp32, which with what the solver needs fits the second-level cache of today's cores.
_PIECE = 131072

Piece = tuple[slice, slice, slice]


def chunked_hopfield_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float | torch.Tensor,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """`hopfield_attention` for alpha in (1, 2], in pieces, with dropout of the weights.

    Differentiable once, in query, key, value and alpha; not in the mask.

    Args and return value are those of `hopfield_attention`.
    """
    scores_shape = (*torch.broadcast_shapes(query.shape[:2], key.shape[:2]), query.shape[2], key.shape[2])
    if attention_mask is not None:
        attention_mask = attention_mask.expand(scores_shape)
    if isinstance(alpha, torch.Tensor):
        eps: float | torch.Tensor = (alpha.to(at_least_fp32(query).dtype) - 1.0).expand(*scores_shape[:3], 1)
    else:
        eps = alpha - 1.0
    query = query * scaling
    leading = scores_shape[:2]
    return _ChunkedAttention.apply(*(x.expand(*leading, *x.shape[2:]) for x in (query, key, value)), eps, attention_mask, dropout)


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, eps, mask, dropout):
        output = value.new_empty(*query.shape[:3], value.shape[-1])
        largest = at_least_fp32(query).new_empty(*query.shape[:3], 1)
        threshold = torch.empty_like(largest)
        seed = int(torch.randint(2**62, ())) if dropout > 0.0 else 0
        kept = _dropout_factors(seed, dropout)
        for piece in _pieces(query, key):
            base, largest[piece] = _base(query, key, mask, eps, piece)
            threshold[piece] = entmax_threshold(base, _of(eps, piece))
            weights, _ = entmax_weights(base, threshold[piece], _of(eps, piece))
            weights = _finite(weights, mask) if kept is None else _finite(weights, mask) * kept(weights)
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
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        grad_eps = torch.empty_like(largest) if ctx.needs_input_grad[3] else None
        kept = _dropout_factors(ctx.seed, ctx.dropout)
        for piece in _pieces(query, key):
            memories = piece[:2]
            base, _ = _base(query, key, mask, eps, piece)
            weights, escort = entmax_weights(base, threshold[piece], _of(eps, piece))
            weights, used = _finite(weights, mask), weights
            grad_weights = at_least_fp32(grad[piece] @ value[memories].mT)
            if kept is not None:
                factor = kept(weights)
                used, grad_weights = weights * factor, grad_weights * factor
            grad_scores = _finite(entmax_score_gradient(escort, grad_weights), mask).to(query.dtype)
            grad_query[piece] = grad_scores @ key[memories]
            grad_key[memories] += grad_scores.mT @ query[piece]
            grad_value[memories] += used.to(value.dtype).mT @ grad[piece]
            if grad_eps is not None:
                terms = entmax_eps_gradient(weights, escort, grad_weights, eps[piece])
                grad_eps[piece] = _finite(terms.sum(-1, keepdim=True), mask)
        return grad_query, grad_key, grad_value, grad_eps, None, None


def _pieces(query: torch.Tensor, key: torch.Tensor) -> Iterator[Piece]:
    """Slices of batch, heads and queries whose scores are about `_PIECE` in number: whole rows, and whole heads where they fit."""
    batch_size, heads, queries = query.shape[:3]
    keys = key.shape[2]
    rows = max(1, min(queries, _PIECE // max(1, keys)))
    per_head = max(1, min(heads, _PIECE // max(1, keys * queries)))
    per_batch = max(1, min(batch_size, _PIECE // max(1, keys * queries * heads)))
    for batch in range(0, batch_size, per_batch):
        for head in range(0, heads, per_head):
            for row in range(0, queries, rows):
                yield slice(batch, batch + per_batch), slice(head, head + per_head), slice(row, row + rows)


def _of(eps: float | torch.Tensor, piece: Piece) -> float | torch.Tensor:
    return eps[piece] if isinstance(eps, torch.Tensor) else eps


def _base(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, eps, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """`entmax_base` of a piece's scores, and the largest of each row, which is 0 in a row without any key."""
    scores = at_least_fp32(query[piece] @ key[piece[:2]].mT)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask[piece], -torch.inf)
    elif mask is not None:
        absent = mask[piece] <= torch.finfo(mask.dtype).min
        scores = (scores + mask[piece]).masked_fill_(absent, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    if mask is not None:
        largest = largest.masked_fill_(largest == -torch.inf, 0.0)
    scores = scores.sub_(largest)
    return (scores.mul_(eps).add_(1.0) if has_root(eps) else scores), largest


def _finite(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros in rows without any key, whose weights are divided by their sum, 0."""
    return rows if mask is None else rows.nan_to_num_(0.0)


def _dropout_factors(seed: int, dropout: float):
    """Factors of dropout for one piece after another, the same again for the same seed; `None` without dropout."""
    if dropout == 0.0:
        return None
    generator = torch.Generator().manual_seed(seed)
    return lambda weights: torch.empty_like(weights).bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)
