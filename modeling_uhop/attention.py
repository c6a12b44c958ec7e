"""Hopfield attention on a CPU for alpha > 1: a piece of the scores at a time, so that they stay in the cache.

Nothing of the size of the scores is kept: what the backward pass needs of a row, besides query, key and value, is its threshold, from
which the weights follow in one pass. Scores are computed again.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .simplex import (
    at_least_fp32,
    cast_by_autocast,
    check_alpha_range,
    entmax_eps_gradient,
    entmax_from_threshold,
    entmax_scale,
    entmax_score_gradient,
    entmax_solve,
)


def _piece() -> int:
    """Scores in a piece: 1.25 MB of fp32, or, where the second-level cache is known to be smaller, fewer and larger pieces of 2.5 MB."""
    try:
        cache = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):  # Linux alone tells
        cache = 0
    scores = 327680
    return 2 * scores if 0 < cache < 4 * scores else scores


_PIECE = _piece()


class Piece(NamedTuple):
    """Some heads of some examples, counted together, and some of their queries: whole heads where they fit, and whole rows always."""

    heads: slice
    rows: slice


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
    """`hopfield_attention` for alpha in (1, 2], in pieces; differentiable once, in query, key, value and alpha, not in the mask.

    Arguments, return value and errors are those of `hopfield_attention`.
    """
    check_alpha_range(alpha)
    query, key, value = cast_by_autocast(query, key, value)
    eps, dtype = alpha - 1.0, value.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    common = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = (at_least_fp32(x.to(common)) for x in (query, key, value))
    mask_shape = () if attention_mask is None else attention_mask.shape
    # Queries that share a head of keys and values are rows of that head.
    groups = query.shape[1] // key.shape[1] if query.shape[1] > key.shape[1] == value.shape[1] > 0 else 1
    batch_size, heads, queries, keys = torch.broadcast_shapes(
        (*query.shape[:3], 1),
        (key.shape[0], groups * key.shape[1], 1, key.shape[2]),
        (value.shape[0], groups * value.shape[1], 1, 1),
        mask_shape,
    )
    own_heads = heads // groups
    if isinstance(eps, torch.Tensor):
        eps = eps.to(query.dtype).expand(batch_size, heads, queries, 1).reshape(batch_size * own_heads, groups * queries, 1)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(batch_size, heads, queries, keys).unflatten(1, (own_heads, groups))
    query = query.expand(batch_size, heads, *query.shape[2:]).reshape(batch_size * own_heads, groups * queries, query.shape[3])
    key, value = (x.expand(batch_size, own_heads, *x.shape[2:]).flatten(0, 1) for x in (key, value))
    with torch.autocast(query.device.type, enabled=False):
        output: torch.Tensor = _ChunkedAttention.apply(query, key, value, eps, scaling, attention_mask, dropout)
    return output.view(batch_size, heads, queries, value.shape[-1]).to(dtype)


class _ChunkedAttention(torch.autograd.Function):
    """Heads of keys of all examples along the first axis; the mask (B, H_k, H / H_k, Q, N) alone keeps its axes."""

    @staticmethod
    def forward(ctx, query, key, value, eps, scaling, mask, dropout):
        scale = entmax_scale(eps)
        output = (query.new_zeros if _is_empty(query, key) else query.new_empty)(*query.shape[:2], value.shape[-1])
        thresholds, shifts = query.new_zeros(*query.shape[:2], 1), None
        seed = int(torch.randint(2**62, ())) if dropout > 0.0 else 0
        kept = _dropout_factors(seed, dropout)
        buffers = _buffers(query, key, 1)
        for piece, (q, out, threshold), (k, v) in _pieces((query, output, thresholds), (key, value)):
            (scores,) = buffers(q, k)
            scores.baddbmm_(q, k.mT, beta=0.0, alpha=scaling * scale)
            absent = _mask(scores, mask, piece, scale)
            weights, found, shift = entmax_solve(scores, _of(eps, piece))
            threshold.copy_(found)
            if shift is not None:
                shifts = torch.zeros_like(thresholds) if shifts is None else shifts
                shifts[piece] = shift
            if absent is not None:
                weights.masked_fill_(absent, 0.0)
            if kept is not None:
                weights *= kept(weights)
            torch.bmm(weights, v, out=out)
        ctx.save_for_backward(query, key, value, thresholds, *(x for x in (shifts, eps, mask) if isinstance(x, torch.Tensor)))
        ctx.shifted, ctx.eps, ctx.masked = shifts is not None, None if isinstance(eps, torch.Tensor) else eps, mask is not None
        ctx.scaling, ctx.seed, ctx.dropout = scaling, seed, dropout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = list(ctx.saved_tensors)
        (query, key, value, thresholds), rest = saved[:4], saved[4:]
        mask = rest.pop() if ctx.masked else None
        eps = rest.pop() if ctx.eps is None else ctx.eps
        shifts = rest.pop() if ctx.shifted else None
        scaling, scale = ctx.scaling, entmax_scale(eps)
        grad = grad.contiguous()
        start = torch.zeros_like if _is_empty(query, key) else torch.empty_like
        grad_query, grad_key, grad_value = (start(x) for x in (query, key, value))
        grad_eps = torch.zeros_like(thresholds) if ctx.needs_input_grad[3] else None
        kept = _dropout_factors(ctx.seed, ctx.dropout)
        buffers = _buffers(query, key, 2)
        rows = (query, grad, thresholds, grad_query)
        for piece, (q, g, threshold, grad_q), (k, v, grad_k, grad_v) in _pieces(rows, (key, value, grad_key, grad_value)):
            scores, other = buffers(q, k)
            scores.baddbmm_(q, k.mT, beta=0.0, alpha=scaling * scale)
            absent = _mask(scores, mask, piece, scale)
            if shifts is not None:
                scores.sub_(shifts[piece])
            weights, escort = entmax_from_threshold(scores, threshold, _of(eps, piece), out=other)
            if absent is not None:
                weights.masked_fill_(absent, 0.0)
            factor = None if kept is None else kept(weights)
            used = weights if factor is None else weights * factor
            # The first rows of a head overwrite what was there, the others are added.
            beta = 0.0 if piece.rows.start == 0 else 1.0
            grad_v.baddbmm_(used.mT, g, beta=beta)
            # If the weights were here, they are done with.
            grad_weights = torch.bmm(g, v.mT, out=other)
            if absent is not None:
                grad_weights.masked_fill_(absent, 0.0)
            if factor is not None:
                grad_weights.mul_(factor)
            if grad_eps is not None:
                terms = entmax_eps_gradient(weights, escort, grad_weights, eps[piece])
                grad_eps[piece] = terms.sum(-1, keepdim=True)
            grad_scores = entmax_score_gradient(escort, grad_weights, out=grad_weights)
            grad_q.baddbmm_(grad_scores, k, beta=0.0, alpha=scaling)
            grad_k.baddbmm_(grad_scores.mT, q, beta=beta, alpha=scaling)
        return grad_query, grad_key, grad_value, grad_eps, None, None, None


def _pieces(
    along_queries: Sequence[torch.Tensor], along_keys: Sequence[torch.Tensor]
) -> Iterator[tuple[Piece, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]:
    """Views of tensors (heads, queries, ...) and (heads, keys, ...) whose scores are about `_PIECE` in number."""
    query, key = along_queries[0], along_keys[0]
    if _is_empty(query, key):
        return
    (heads, queries), keys = query.shape[:2], key.shape[1]
    together, rows = _even(heads, _PIECE // (keys * queries)), _even(queries, _PIECE // keys)
    by_head = zip(*(x.split(together) for x in along_queries), strict=True), zip(*(x.split(together) for x in along_keys), strict=True)
    for head, of_heads, memories in zip(range(0, heads, together), *by_head, strict=True):
        by_row = zip(*(x.split(rows, 1) for x in of_heads), strict=True) if rows < queries else [of_heads]
        for row, of_rows in zip(range(0, queries, rows), by_row, strict=True):
            yield Piece(slice(head, head + together), slice(row, row + rows)), of_rows, memories


def _even(count: int, most: int) -> int:
    """The size of parts of which as few as can be make up `count`, with at most `most` each, and at least 1."""
    return -(-count // -(-count // max(1, most)))


def _is_empty(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[0] * query.shape[1] * key.shape[1] == 0


def _of(eps: float | torch.Tensor, piece: Piece) -> float | torch.Tensor:
    return eps[piece] if isinstance(eps, torch.Tensor) else eps


def _buffers(query: torch.Tensor, key: torch.Tensor, count: int) -> Callable[[torch.Tensor, torch.Tensor], Iterator[torch.Tensor]]:
    """A function that returns `count` buffers of the shape of a piece's scores; all pieces share the memory."""
    work = query.new_empty(count, min(max(_PIECE, key.shape[1]), query.shape[0] * query.shape[1] * key.shape[1]))

    def buffers(q: torch.Tensor, k: torch.Tensor) -> Iterator[torch.Tensor]:
        shape = (*q.shape[:2], k.shape[1])
        return (part[: math.prod(shape)].view(shape) for part in work)

    return buffers


def _mask(scores: torch.Tensor, mask: torch.Tensor | None, piece: Piece, scale: float) -> torch.Tensor | None:
    """Puts -inf for absent keys; returns which rows have no key, after giving these scores of 0, as the solver needs some."""
    if mask is None:
        return None
    part = _mask_of(mask, piece)
    if part.dtype == torch.bool:
        scores.masked_fill_(~part, -torch.inf)
    else:
        scores.add_(part, alpha=scale).masked_fill_(part <= torch.finfo(part.dtype).min, -torch.inf)
    absent = scores.amax(-1, keepdim=True) == -torch.inf
    scores.masked_fill_(absent, 0.0)
    return absent


def _mask_of(mask: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The part (heads, rows, keys) of a mask (B, H_k, G, Q, N), whose G heads of Q queries are the rows of a head of keys."""
    heads, groups, queries = mask.shape[1:4]
    first, last = piece.heads.start, min(piece.heads.stop, mask.shape[0] * heads)
    example = first // heads
    first, last = first - example * heads, last - example * heads
    part = mask[example, first:last] if last <= heads else mask[example : example - (-last // heads)].flatten(0, 1)[first:last]
    if groups == 1:
        return part[:, 0, piece.rows]
    row = torch.arange(piece.rows.start, min(piece.rows.stop, groups * queries))
    return part[:, row // queries, row % queries]


def _dropout_factors(seed: int, dropout: float) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Factors of dropout for one piece after another, the same again for the same seed; `None` without dropout."""
    if dropout == 0.0:
        return None
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    return lambda weights: torch.empty_like(weights).bernoulli_(1.0 - dropout, generator=generator).mul_(scale)
