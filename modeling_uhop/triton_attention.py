"""Hopfield attention on a GPU for alpha > 1: two Triton kernels for the gradients and one for the output, none of which keeps scores.

Scores of a block of queries are computed again in every pass over the keys: one pass for the largest, some for the threshold, and one for
the output, which also makes the escort mean of the values. With it the backward pass needs one pass over the keys for queries, and
one over the queries for keys and values (the idea of AdaSplash, arXiv 2502.12082).
"""

from __future__ import annotations

import os

import torch
from torch.autograd.function import once_differentiable

from .simplex import check_alpha_range


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Newton steps after which the threshold is exact to fp32 rounding on all but contrived rows; see `entmax_solve`, which looks.
_NEWTON_STEPS = 7


def _kernel(function):
    return function if triton is None else triton.jit(function)


def triton_hopfield_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float,
    scaling: float | None = None,
    key_mask: torch.Tensor | None = None,
    block_queries: int = 64,
    block_keys: int = 64,
) -> torch.Tensor:
    """`hopfield_attention` for one alpha in (1, 2] on a CUDA device, differentiable once in query, key and value.

    Args:
        query, key, value: (B, H, Q, d), (B, H, N, d) and (B, H, N, d), of one dtype: fp32, bf16 or fp16. Sums are in fp32.
        alpha: Tsallis exponent in (1, 2]. A learnable one needs `hopfield_attention`.
        scaling: Inverse temperature beta; `None` for `1 / sqrt(d)`.
        key_mask: Boolean (B, N), True where a key is present. A query without any key retrieves zeros.
        block_queries, block_keys: Powers of two, at least 16: how many of each a program holds at once.

    Returns:
        (B, H, Q, d), in the dtype of the query.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If alpha is a tensor or outside (1, 2], shapes or dtypes do not agree, or there is no CUDA device; with
            TRITON_INTERPRET=1 in the environment, Triton's interpreter takes a CPU's tensors, but for bf16, which it multiplies wrongly.
    """
    if triton is None:
        raise ImportError("triton_hopfield_attention needs Triton: pip install 'modeling_uhop[gpu]'")
    if isinstance(alpha, torch.Tensor) or alpha == 1.0:
        raise ValueError(f"alpha must be one number above 1 for the Triton kernels, got {alpha}")
    check_alpha_range(alpha)
    if key.shape != value.shape or query.shape[:2] != key.shape[:2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query, key and value do not fit: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"query, key and value must be of one dtype, fp32, bf16 or fp16, got {query.dtype}, {key.dtype}, {value.dtype}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if query.device.type != "cuda" and not interpreted:
        raise ValueError(f"the Triton kernels need a CUDA device, got tensors on {query.device}")
    if query.dtype == torch.bfloat16 and interpreted:
        raise ValueError("Triton's interpreter cannot multiply bf16; use fp32 or fp16, or leave TRITON_INTERPRET unset")
    if key_mask is not None and key_mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(f"key_mask must have shape {(key.shape[0], key.shape[2])}, got {tuple(key_mask.shape)}")
    if query.numel() == 0 or key.numel() == 0:
        return query * 0.0
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: torch.Tensor = _TritonAttention.apply(query, key, value, key_mask, alpha - 1.0, scaling, block_queries, block_keys)
    return output


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, eps, scaling, block_queries, block_keys):
        query, key, value = (x.contiguous() for x in (query, key, value))
        mask = query if key_mask is None else key_mask.to(torch.int8).contiguous()
        batch_size, heads, queries, width = query.shape
        keys = key.shape[2]
        output = torch.empty_like(query)
        escort_mean = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        # Of each row: the largest score, the threshold, and the sum of weights before they are scaled to 1.
        rows = torch.empty(3, batch_size * heads, queries, dtype=torch.float32, device=query.device)
        sizes = (heads, queries, keys, width, eps * scaling)
        constants = {
            "HAS_MASK": key_mask is not None,
            "EPS": eps,
            "BLOCK_Q": block_queries,
            "BLOCK_N": block_keys,
            "BLOCK_D": max(16, triton.next_power_of_2(width)),
        }
        grid = (triton.cdiv(queries, block_queries), batch_size * heads)
        _forward_kernel[grid](query, key, value, mask, output, escort_mean, *rows, *sizes, STEPS=_NEWTON_STEPS, **constants)
        ctx.save_for_backward(query, key, value, mask, escort_mean, rows)
        ctx.sizes, ctx.constants, ctx.scaling = sizes, constants, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, mask, escort_mean, rows = ctx.saved_tensors
        grad = grad.contiguous()
        batch_size, heads, queries, _ = query.shape
        along = (grad.float() * escort_mean).sum(-1).contiguous()
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        given = (query, key, value, mask, grad, along, *rows)
        programs = batch_size * heads
        grid = (triton.cdiv(queries, ctx.constants["BLOCK_Q"]), programs)
        _grad_query_kernel[grid](*given, grad_query, *ctx.sizes, ctx.scaling, **ctx.constants)
        grid = (triton.cdiv(key.shape[2], ctx.constants["BLOCK_N"]), programs)
        _grad_memory_kernel[grid](*given, grad_key, grad_value, *ctx.sizes, ctx.scaling, **ctx.constants)
        return grad_query, grad_key, grad_value, None, None, None, None, None


@_kernel
def _block(pointer, head, positions, count, width, BLOCK_D: tl.constexpr):
    """Rows (positions, BLOCK_D) of one head, 0 beyond its end and width."""
    columns = tl.arange(0, BLOCK_D)
    inside = (positions[:, None] < count) & (columns[None, :] < width)
    places = (head * count + positions[:, None]).to(tl.int64) * width + columns[None, :]
    return tl.load(pointer + places, mask=inside, other=0.0)


@_kernel
def _put(pointer, values, head, positions, count, width, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (positions[:, None] < count) & (columns[None, :] < width)
    places = (head * count + positions[:, None]).to(tl.int64) * width + columns[None, :]
    tl.store(pointer + places, values.to(pointer.dtype.element_ty), mask=inside)


@_kernel
def _scores(q, k, mask, head, heads, positions, keys, scale, HAS_MASK: tl.constexpr):
    """eps times the scores of a block, -inf for keys that are not there."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    present = positions < keys
    if HAS_MASK:
        present = present & (tl.load(mask + (head // heads) * keys + positions, mask=present, other=0) != 0)
    return tl.where(present[None, :], scores, float("-inf"))


@_kernel
def _powers(root, EPS: tl.constexpr):
    """`t^(1 / eps)`, which is a weight, and `t^(1 / eps - 1)`, its escort, of t = max(root, 0)."""
    root = tl.maximum(root, 0.0)
    if EPS == 0.5:
        weights, escort = root * root, root
    elif EPS == 1.0:
        weights, escort = root, tl.where(root > 0.0, 1.0, 0.0)
    else:
        held = tl.log2(tl.where(root > 0.0, root, 1.0))
        weights = tl.where(root > 0.0, tl.exp2(held * (1.0 / EPS)), 0.0)
        escort = tl.where(root > 0.0, tl.exp2(held * (1.0 / EPS - 1.0)), 0.0)
    return weights, escort


@_kernel
def _forward_kernel(
    query, key, value, mask, output, escort_mean, largest, threshold, total, heads, queries, keys, width, scale,
    STEPS: tl.constexpr, HAS_MASK: tl.constexpr, EPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, rows = tl.program_id(1), tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offsets = tl.arange(0, BLOCK_N)
    q = _block(query, head, rows, queries, width, BLOCK_D)

    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    for start in range(0, keys, BLOCK_N):
        k = _block(key, head, start + offsets, keys, width, BLOCK_D)
        top = tl.maximum(top, tl.max(_scores(q, k, mask, head, heads, start + offsets, keys, scale, HAS_MASK), 1))
    absent = top == float("-inf")
    top = tl.where(absent, 0.0, top)

    # Newton's method on the (1 / eps)-norm, from where the largest weight is 1; see entmax_solve.
    tau = tl.full((BLOCK_Q,), -1.0, tl.float32)
    for _ in range(STEPS):
        weight_sum, escort_sum = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
        for start in range(0, keys, BLOCK_N):
            k = _block(key, head, start + offsets, keys, width, BLOCK_D)
            scores = _scores(q, k, mask, head, heads, start + offsets, keys, scale, HAS_MASK)
            weights, escort = _powers((scores - top[:, None]) - tau[:, None], EPS)
            weight_sum += tl.sum(weights, 1)
            escort_sum += tl.sum(escort, 1)
        below = tl.exp2(tl.log2(tl.where(absent, 1.0, weight_sum)) * (1.0 - EPS))
        tau += tl.where(absent, 0.0, (weight_sum - below) / tl.where(absent, 1.0, escort_sum))

    mixed, escorted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    weight_sum, escort_sum = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, keys, BLOCK_N):
        k = _block(key, head, start + offsets, keys, width, BLOCK_D)
        v = _block(value, head, start + offsets, keys, width, BLOCK_D)
        scores = _scores(q, k, mask, head, heads, start + offsets, keys, scale, HAS_MASK)
        weights, escort = _powers((scores - top[:, None]) - tau[:, None], EPS)
        weight_sum += tl.sum(weights, 1)
        escort_sum += tl.sum(escort, 1)
        mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        escorted += tl.dot(escort.to(v.dtype), v, input_precision="ieee")
    weight_sum, escort_sum = tl.where(absent, 1.0, weight_sum), tl.where(absent, 1.0, escort_sum)
    _put(output, mixed / weight_sum[:, None], head, rows, queries, width, BLOCK_D)
    _put(escort_mean, escorted / escort_sum[:, None], head, rows, queries, width, BLOCK_D)
    places, inside = head * queries + rows, rows < queries
    # A row without keys has no root above this threshold.
    tl.store(largest + places, top, mask=inside)
    tl.store(threshold + places, tau, mask=inside)
    tl.store(total + places, weight_sum, mask=inside)


@_kernel
def _gradients(
    q, k, v, g, mask, along, largest, threshold, total, head, heads, rows, positions, queries, keys, scale,
    HAS_MASK: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Weights of a block, and the gradient for its scores, both (rows, positions)."""
    inside, places = rows < queries, head * queries + rows
    top = tl.load(largest + places, mask=inside, other=0.0)
    tau = tl.load(threshold + places, mask=inside, other=0.0)
    weight_sum = tl.load(total + places, mask=inside, other=1.0)
    mean = tl.load(along + places, mask=inside, other=0.0)
    scores = _scores(q, k, mask, head, heads, positions, keys, scale, HAS_MASK)
    weights, escort = _powers((scores - top[:, None]) - tau[:, None], EPS)
    grad_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
    return weights / weight_sum[:, None], tl.where(inside[:, None], escort * (grad_weights - mean[:, None]), 0.0)


@_kernel
def _grad_query_kernel(
    query, key, value, mask, grad, along, largest, threshold, total, grad_query, heads, queries, keys, width, scale, scaling,
    HAS_MASK: tl.constexpr, EPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, rows = tl.program_id(1), tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q, g = _block(query, head, rows, queries, width, BLOCK_D), _block(grad, head, rows, queries, width, BLOCK_D)
    result = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        k, v = _block(key, head, positions, keys, width, BLOCK_D), _block(value, head, positions, keys, width, BLOCK_D)
        _, grad_scores = _gradients(
            q, k, v, g, mask, along, largest, threshold, total, head, heads, rows, positions, queries, keys, scale, HAS_MASK, EPS
        )
        result += tl.dot(grad_scores.to(k.dtype), k, input_precision="ieee")
    _put(grad_query, result * scaling, head, rows, queries, width, BLOCK_D)


@_kernel
def _grad_memory_kernel(
    query, key, value, mask, grad, along, largest, threshold, total, grad_key, grad_value, heads, queries, keys, width, scale, scaling,
    HAS_MASK: tl.constexpr, EPS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head, positions = tl.program_id(1), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, v = _block(key, head, positions, keys, width, BLOCK_D), _block(value, head, positions, keys, width, BLOCK_D)
    for_keys, for_values = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, queries, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q, g = _block(query, head, rows, queries, width, BLOCK_D), _block(grad, head, rows, queries, width, BLOCK_D)
        weights, grad_scores = _gradients(
            q, k, v, g, mask, along, largest, threshold, total, head, heads, rows, positions, queries, keys, scale, HAS_MASK, EPS
        )
        for_values += tl.dot(tl.trans(weights).to(g.dtype), g, input_precision="ieee")
        for_keys += tl.dot(tl.trans(grad_scores).to(q.dtype), q, input_precision="ieee")
    _put(grad_key, for_keys * scaling, head, positions, keys, width, BLOCK_D)
    _put(grad_value, for_values, head, positions, keys, width, BLOCK_D)
