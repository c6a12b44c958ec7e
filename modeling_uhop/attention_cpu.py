"""Hopfield attention on a CPU for alpha > 1, computed in pieces that stay in the cache.

No tensor of the size of the scores is kept. For the backward pass, only query, key, value and one
threshold per row are kept. The scores are computed again, and the weights follow from the threshold
in one pass.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .entmax import entmax_eps_gradient, entmax_from_threshold, entmax_scale, entmax_score_gradient, entmax_solve
from .precision import at_least_fp32, cast_by_autocast, is_readable
from .simplex import check_alpha_range, is_softmax


def _piece() -> int:
    """Return the number of scores in a piece.

    It is 1.25 MB of fp32. If the second-level cache is known to be smaller, it is 2.5 MB, which
    gives fewer pieces.
    """
    try:
        cache = os.sysconf("SC_LEVEL2_CACHE_SIZE")
    except (AttributeError, ValueError, OSError):
        # Because only Linux reports the size of the cache, it is unknown elsewhere.
        cache = 0
    scores = 327680
    return 2 * scores if 0 < cache < 4 * scores else scores


_PIECE = _piece()


class Piece(NamedTuple):
    """A part of the scores: some heads of some examples, and some of their queries.

    A piece has whole heads if they fit, and always whole rows.

    Attributes:
        heads: Range of heads, counted over all examples.
        rows: Range of queries.
    """

    heads: slice
    rows: slice


def accepts(query, key, value, *, alpha=1.0, attention_mask=None, **others) -> bool:
    """Return whether `chunked_hopfield_attention` computes this call of `hopfield_attention`."""
    learned_mask = attention_mask is not None and attention_mask.requires_grad
    unknown = others.keys() - {"scaling", "dropout"}
    return not (is_softmax(alpha) or learned_mask or unknown) and query.dim() == key.dim() == value.dim() == 4 and is_readable(query)


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
    """Compute `hopfield_attention` for alpha in (1, 2] in pieces.

    It is differentiable once in query, key, value and alpha. Arguments, return value and errors are
    those of `hopfield_attention`. It also raises a `ValueError` for a call that it does not accept.
    """
    check_alpha_range(alpha)
    if not accepts(query, key, value, alpha=alpha, attention_mask=attention_mask):
        raise ValueError(
            "chunked_hopfield_attention needs alpha > 1, tensors of four axes whose values Python can read, and a mask without gradient; "
            "hopfield_attention computes every call"
        )
    query, key, value = cast_by_autocast(query, key, value)
    eps, dtype = alpha - 1.0, value.dtype
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    common_dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = (at_least_fp32(x.to(common_dtype)) for x in (query, key, value))
    mask_shape = () if attention_mask is None else attention_mask.shape
    # Because neighbouring heads of queries may share a head of keys and values, we make these
    # queries rows of that head.
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
    """Autograd function of attention in pieces.

    The first axis holds the key heads of all examples. Only the mask keeps its axes
    (B, H_k, H / H_k, Q, N).
    """

    @staticmethod
    def forward(ctx, query, key, value, eps, scaling, mask, dropout):
        scale = entmax_scale(eps)
        output = (query.new_zeros if _is_empty(query, key) else query.new_empty)(*query.shape[:2], value.shape[-1])
        thresholds, shifts = query.new_zeros(*query.shape[:2], 1), None
        seed = int(torch.randint(2**62, ())) if dropout > 0.0 else 0
        dropout_factors = _dropout_factors(seed, dropout)
        buffers = _buffers(query, key, 1)
        for piece, (q, out, threshold), (k, v) in _pieces((query, output, thresholds), (key, value)):
            (scores,) = buffers(q, k)
            scores.baddbmm_(q, k.mT, beta=0.0, alpha=scaling * scale)
            absent = _apply_mask(scores, mask, piece, scale)
            weights, found, shift = entmax_solve(scores, _eps_of_piece(eps, piece))
            threshold.copy_(found)
            if shift is not None:
                shifts = torch.zeros_like(thresholds) if shifts is None else shifts
                shifts[piece] = shift
            if absent is not None:
                weights.masked_fill_(absent, 0.0)
            if dropout_factors is not None:
                weights *= dropout_factors(weights)
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
        dropout_factors = _dropout_factors(ctx.seed, ctx.dropout)
        buffers = _buffers(query, key, 2)
        rows = (query, grad, thresholds, grad_query)
        for piece, (q, g, threshold, grad_q), (k, v, grad_k, grad_v) in _pieces(rows, (key, value, grad_key, grad_value)):
            scores, other = buffers(q, k)
            scores.baddbmm_(q, k.mT, beta=0.0, alpha=scaling * scale)
            absent = _apply_mask(scores, mask, piece, scale)
            if shifts is not None:
                scores.sub_(shifts[piece])
            weights, escort = entmax_from_threshold(scores, threshold, _eps_of_piece(eps, piece), out=other)
            if absent is not None:
                weights.masked_fill_(absent, 0.0)
            factor = None if dropout_factors is None else dropout_factors(weights)
            used = weights if factor is None else weights * factor
            # Because the buffers are not zeroed, the first rows of a head overwrite, and the others
            # add.
            beta = 0.0 if piece.rows.start == 0 else 1.0
            grad_v.baddbmm_(used.mT, g, beta=beta)
            # Because the weights are no longer needed, we may reuse their buffer.
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
    """Yield views of tensors (heads, queries, ...) and (heads, keys, ...), one for each piece.

    A piece has about `_PIECE` scores.
    """
    query, key = along_queries[0], along_keys[0]
    if _is_empty(query, key):
        return
    (heads, queries), keys = query.shape[:2], key.shape[1]
    heads_per_piece, rows = _balanced_size(heads, _PIECE // (keys * queries)), _balanced_size(queries, _PIECE // keys)
    by_head = (
        zip(*(x.split(heads_per_piece) for x in along_queries), strict=True),
        zip(*(x.split(heads_per_piece) for x in along_keys), strict=True),
    )
    for head, of_heads, memories in zip(range(0, heads, heads_per_piece), *by_head, strict=True):
        by_row = zip(*(x.split(rows, 1) for x in of_heads), strict=True) if rows < queries else [of_heads]
        for row, of_rows in zip(range(0, queries, rows), by_row, strict=True):
            yield Piece(slice(head, head + heads_per_piece), slice(row, row + rows)), of_rows, memories


def _balanced_size(count: int, most: int) -> int:
    """Return the size of equal parts of `count`, as few as possible.

    A part has at most `most` items, and at least 1.
    """
    return -(-count // -(-count // max(1, most)))


def _is_empty(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[0] * query.shape[1] * key.shape[1] == 0


def _eps_of_piece(eps: float | torch.Tensor, piece: Piece) -> float | torch.Tensor:
    return eps[piece] if isinstance(eps, torch.Tensor) else eps


def _buffers(query: torch.Tensor, key: torch.Tensor, count: int) -> Callable[[torch.Tensor, torch.Tensor], Iterator[torch.Tensor]]:
    """Return a function that gives `count` buffers of the shape of a piece's scores.

    All pieces share the memory of these buffers.
    """
    work = query.new_empty(count, min(max(_PIECE, key.shape[1]), query.shape[0] * query.shape[1] * key.shape[1]))

    def buffers(q: torch.Tensor, k: torch.Tensor) -> Iterator[torch.Tensor]:
        shape = (*q.shape[:2], k.shape[1])
        return (part[: math.prod(shape)].view(shape) for part in work)

    return buffers


def _apply_mask(scores: torch.Tensor, mask: torch.Tensor | None, piece: Piece, scale: float) -> torch.Tensor | None:
    """Set the scores of absent keys to -inf, in place, and return which rows have no key.

    Because the solver needs a finite score, the scores of these rows are set to 0.
    """
    if mask is None:
        return None
    part = _mask_of_piece(mask, piece)
    if part.dtype == torch.bool:
        scores.masked_fill_(~part, -torch.inf)
    else:
        scores.add_(part, alpha=scale).masked_fill_(part <= torch.finfo(part.dtype).min, -torch.inf)
    absent = scores.amax(-1, keepdim=True) == -torch.inf
    scores.masked_fill_(absent, 0.0)
    return absent


def _mask_of_piece(mask: torch.Tensor, piece: Piece) -> torch.Tensor:
    """Return the part (heads, rows, keys) of a mask (B, H_k, G, Q, N) for a piece.

    The G heads of Q queries are the rows of one head of keys.
    """
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
    """Return a function that draws the dropout factors of one piece after another.

    The same seed gives the same factors. The result is `None` without dropout.
    """
    if dropout == 0.0:
        return None
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    return lambda weights: torch.empty_like(weights).bernoulli_(1.0 - dropout, generator=generator).mul_(scale)
