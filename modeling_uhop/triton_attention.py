"""Hopfield attention on a GPU for alpha > 1: two Triton kernels for the gradients and one for the output, none of which keeps scores.

Scores of a block of queries are computed again in every pass over the keys: one pass for the largest of every so many, whose threshold is
a first guess, a few from there to the threshold of all, and one for the output, which also makes the escort mean of the values. With it
the backward pass needs one pass over the keys for queries, and one over the queries for keys and values (the idea of AdaSplash,
arXiv 2502.12082). Inner products are taken relative to the largest of a row before they are scaled, as thresholds of large scores
would be too coarse for small weights.
"""

from __future__ import annotations

import os

import torch
from torch.autograd.function import once_differentiable

from .simplex import cast_by_autocast, check_alpha_range


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Widest heads that the kernels take, of each dtype: what fits the registers.
MAX_WIDTH = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
# Powers of a nearer alpha lose their digits in fp32.
MIN_ALPHA = 1.01
# Newton steps at most, as in `entmax_solve`; most rows need three.
_NEWTON_STEPS = 12


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
    block_queries: int | None = None,
    block_keys: int | None = None,
) -> torch.Tensor:
    """`hopfield_attention` for one alpha in [1.01, 2] on a CUDA device, differentiable once in query, key and value.

    Made for NVIDIA's GPUs since Ampere. Every alpha is compiled for on its own, which takes seconds.

    Args:
        query, key, value: (B, H, Q, d), (B, H, N, d) and (B, H, N, d), of one dtype: fp32 (d up to 128), bf16 or fp16 (up to 256).
            Sums are in fp32. Products of fp32 are made from three of TF32 each on NVIDIA's GPUs. Under autocast they are cast to its dtype.
        alpha: Tsallis exponent in [1.01, 2]. A learnable one needs `hopfield_attention`.
        scaling: Inverse temperature beta; `None` for `1 / sqrt(d)`.
        key_mask: Boolean (B, N), True where a key is present. A query without any key retrieves zeros.
        block_queries, block_keys: Powers of two, at least 16: how many of each a program holds at once; `None` for what fits.

    Returns:
        (B, H, Q, d), in the dtype of the query.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If alpha is a tensor or outside [1.01, 2], shapes or dtypes do not fit, blocks are of another size, or there is no
            CUDA device; with TRITON_INTERPRET=1 in the environment, Triton's interpreter takes a CPU's tensors, but for bf16, which it
            multiplies wrongly.
    """
    if triton is None:
        raise ImportError("triton_hopfield_attention needs Triton: pip install 'modeling_uhop[gpu]'")
    check_alpha_range(alpha)
    if isinstance(alpha, torch.Tensor) or alpha < MIN_ALPHA:
        raise ValueError(f"alpha must be one number from {MIN_ALPHA} to 2 for the Triton kernels, got {alpha}")
    query, key, value = cast_by_autocast(query, key, value)
    same_shape = query.dim() == 4 and query.shape[:2] == key.shape[:2] and query.shape[3:] == key.shape[3:]
    if not same_shape or key.shape != value.shape:
        raise ValueError(f"query, key and value do not fit: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in MAX_WIDTH:
        raise ValueError(f"query, key and value must be of one dtype, fp32, bf16 or fp16, got {query.dtype}, {key.dtype}, {value.dtype}")
    if query.shape[-1] > MAX_WIDTH[query.dtype]:
        raise ValueError(f"heads of {query.dtype} may be up to {MAX_WIDTH[query.dtype]} wide for the Triton kernels, got {query.shape[-1]}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if query.device.type != "cuda" and not interpreted:
        raise ValueError(f"the Triton kernels need a CUDA device, got tensors on {query.device}")
    if query.dtype == torch.bfloat16 and interpreted:
        raise ValueError("Triton's interpreter cannot multiply bf16; use fp32 or fp16, or leave TRITON_INTERPRET unset")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (key.shape[0], key.shape[2])):
        wanted = f"must be boolean, of shape {(key.shape[0], key.shape[2])}"
        raise ValueError(f"key_mask {wanted}, got {key_mask.dtype} of shape {tuple(key_mask.shape)}")
    launch = launch_of(query.dtype, query.shape[-1])
    launch.update({name: size for name, size in (("BLOCK_Q", block_queries), ("BLOCK_N", block_keys)) if size is not None})
    for size in (launch["BLOCK_Q"], launch["BLOCK_N"]):
        if size < 16 or size & (size - 1):
            raise ValueError(f"blocks must have powers of two of queries and keys, at least 16, got {size}")
    if query.numel() == 0 or key.numel() == 0:
        return query @ key.mT @ value  # nothing, or zeros
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # The kernels look for the largest product, and scale it afterwards.
    if scaling <= 0.0:
        query, scaling = (-query, -scaling) if scaling < 0.0 else (query * 0.0, 1.0)
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    output: torch.Tensor = _TritonAttention.apply(query, key, value, key_mask, alpha - 1.0, scaling, launch, kept)
    return output


def launch_of(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Block sizes and warps with which the kernels fit the registers and the 99 KB of shared memory of NVIDIA's GPUs since Ampere."""
    block_width = max(16, 1 << (width - 1).bit_length())
    if dtype == torch.float32:
        rows, columns, warps = (32, 32, 8) if block_width <= 64 else (16, 16, 8)
    elif block_width <= 64:
        rows, columns, warps = 64, 64, 4
    else:
        rows, columns, warps = (64, 32, 8) if block_width == 128 else (32, 32, 8)
    return {"BLOCK_Q": rows, "BLOCK_N": columns, "BLOCK_D": block_width, "WIDTH": width, "num_warps": warps}


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_mask, eps, scaling, launch, kept):
        query, key, value = (x.contiguous() for x in (query, key, value))
        mask = query if key_mask is None else key_mask.to(torch.int8).contiguous()
        batch_size, heads, queries, _ = query.shape
        keys = key.shape[2]
        output = torch.empty_like(query)
        escort_mean, top, threshold = output, output, output
        if kept:
            escort_mean = torch.empty(query.shape, dtype=torch.float32, device=query.device)
            top, threshold = torch.empty(2, batch_size * heads, queries, dtype=torch.float32, device=query.device)
        sizes = (heads, queries, keys, eps * scaling)
        constants = {
            "HAS_MASK": key_mask is not None,
            "ALL_PRESENT": key_mask is None and keys % launch["BLOCK_N"] == 0,
            "EPS": eps,
            "PRECISION": "ieee" if torch.version.hip else "tf32x3",
            "enable_fp_fusion": True,
            **launch,
        }
        grid = (batch_size * heads * triton.cdiv(queries, launch["BLOCK_Q"]),)
        with torch.cuda.device_of(query):
            made = (output, escort_mean, top, threshold)
            _forward_kernel[grid](query, key, value, mask, *made, *sizes, KEPT=kept, STEPS=_NEWTON_STEPS, **constants)
        ctx.save_for_backward(query, key, value, mask, escort_mean, top, threshold)
        ctx.sizes, ctx.constants, ctx.scaling = sizes, constants, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, mask, escort_mean, top, threshold = ctx.saved_tensors
        grad = grad.contiguous()
        batch_size, heads, queries, _ = query.shape
        along = torch.empty_like(threshold)
        grad_query, grad_key, grad_value = (torch.empty_like(x) for x in (query, key, value))
        given, settings = (query, key, value, mask, grad), (*ctx.sizes, ctx.scaling)
        programs = batch_size * heads
        with torch.cuda.device_of(query):
            grid = (programs * triton.cdiv(queries, ctx.constants["BLOCK_Q"]),)
            _grad_query_kernel[grid](*given, escort_mean, top, threshold, along, grad_query, *settings, **ctx.constants)
            if any(ctx.needs_input_grad[1:3]):
                grid = (programs * triton.cdiv(key.shape[2], ctx.constants["BLOCK_N"]),)
                _grad_memory_kernel[grid](*given, top, threshold, along, grad_key, grad_value, *settings, **ctx.constants)
        return grad_query, grad_key, grad_value, None, None, None, None, None


@_kernel
def _place(count, BLOCK: tl.constexpr):
    """Which head a program is of, and which positions of its `count` it holds, those of a head by neighbouring programs."""
    blocks = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    return program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)


@_kernel
def _block(pointer, head, positions, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (positions, BLOCK_D) of one head, 0 beyond its end and width."""
    columns = tl.arange(0, BLOCK_D)
    inside = (positions[:, None] < count) & (columns[None, :] < WIDTH)
    return tl.load(pointer + head.to(tl.int64) * count * WIDTH + (positions[:, None] * WIDTH + columns[None, :]), mask=inside, other=0.0)


@_kernel
def _put(pointer, values, head, positions, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (positions[:, None] < count) & (columns[None, :] < WIDTH)
    places = pointer + head.to(tl.int64) * count * WIDTH + (positions[:, None] * WIDTH + columns[None, :])
    tl.store(places, values.to(pointer.dtype.element_ty), mask=inside)


@_kernel
def _products(
    q, k, mask, head, heads, positions, keys,
    HAS_MASK: tl.constexpr, ALL_PRESENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products of a block, -inf for keys that are not there."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if not ALL_PRESENT:
        present = _present(mask, head, heads, positions, keys, HAS_MASK)
        products = tl.where(present[None, :], products, float("-inf"))
    return products


@_kernel
def _present(mask, head, heads, positions, keys, HAS_MASK: tl.constexpr):
    present = positions < keys
    if HAS_MASK:
        present = present & (tl.load(mask + (head // heads) * keys + positions, mask=present, other=0) != 0)
    return present


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
def _rise(weight_sum, escort_sum, absent, EPS: tl.constexpr):
    """What Newton's method on the (1 / eps)-norm adds to thresholds whose weights and escorts have these sums; see `entmax_solve`."""
    below = tl.exp2(tl.log2(tl.where(absent, 1.0, weight_sum)) * (1.0 - EPS))
    return tl.where(absent, 0.0, (weight_sum - below) / tl.where(absent, 1.0, escort_sum))


@_kernel
def _forward_kernel(
    query, key, value, mask, output, escort_mean, top_of, threshold, heads, queries, keys, scale,
    KEPT: tl.constexpr, STEPS: tl.constexpr, HAS_MASK: tl.constexpr, ALL_PRESENT: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, rows = _place(queries, BLOCK_Q)
    offsets = tl.arange(0, BLOCK_N)
    q = _block(query, head, rows, queries, WIDTH, BLOCK_D)

    leaders = tl.full((BLOCK_Q, BLOCK_N), float("-inf"), tl.float32)
    for start in range(0, keys, BLOCK_N):
        k = _block(key, head, start + offsets, keys, WIDTH, BLOCK_D)
        products = _products(q, k, mask, head, heads, start + offsets, keys, HAS_MASK, ALL_PRESENT, PRECISION)
        leaders = tl.maximum(leaders, products, propagate_nan=tl.PropagateNan.ALL)
    # A row with a NaN is lost, which maxima are silent about; it is left out, like one without keys, and given NaN at the end.
    unknown = leaders != leaders
    lost = tl.max(unknown.to(tl.int32), 1) > 0
    top = tl.max(tl.where(unknown, float("-inf"), leaders), 1)
    absent = (top == float("-inf")) | lost
    top = tl.where(absent, 0.0, top)

    # From where the largest weight is 1 to the threshold of the leaders alone, which is left of that of all.
    tau = tl.full((BLOCK_Q,), -1.0, tl.float32)
    for _ in range(4):
        weights, escort = _powers((leaders - top[:, None]) * scale - tau[:, None], EPS)
        tau += _rise(tl.sum(weights, 1), tl.sum(escort, 1), absent, EPS)

    step, excess = tl.full((), 0, tl.int32), tl.full((), 1.0, tl.float32)
    # A step squares what is left, and the last pass takes one of its own.
    while (step < STEPS) & (excess > 1e-3):
        weight_tile, escort_tile = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32), tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        for start in range(0, keys, BLOCK_N):
            k = _block(key, head, start + offsets, keys, WIDTH, BLOCK_D)
            products = _products(q, k, mask, head, heads, start + offsets, keys, HAS_MASK, ALL_PRESENT, PRECISION)
            weights, escort = _powers((products - top[:, None]) * scale - tau[:, None], EPS)
            weight_tile += weights
            escort_tile += escort
        weight_sum, escort_sum = tl.sum(weight_tile, 1), tl.sum(escort_tile, 1)
        tau += _rise(weight_sum, escort_sum, absent, EPS)
        excess = tl.max(tl.where(absent, 0.0, tl.abs(weight_sum - 1.0)), 0)
        step += 1

    mixed, escorted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    weight_sum, escort_sum = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, keys, BLOCK_N):
        k = _block(key, head, start + offsets, keys, WIDTH, BLOCK_D)
        v = _block(value, head, start + offsets, keys, WIDTH, BLOCK_D)
        products = _products(q, k, mask, head, heads, start + offsets, keys, HAS_MASK, ALL_PRESENT, PRECISION)
        weights, escort = _powers((products - top[:, None]) * scale - tau[:, None], EPS)
        weight_sum += tl.sum(weights, 1)
        escort_sum += tl.sum(escort, 1)
        mixed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        escorted += tl.dot(escort.to(v.dtype), v, input_precision=PRECISION)
    escorted = tl.where(lost[:, None], float("nan"), escorted / tl.where(absent, 1.0, escort_sum)[:, None])
    excess_weight = tl.where(absent, 0.0, weight_sum - 1.0)
    _put(output, mixed - excess_weight[:, None] * escorted, head, rows, queries, WIDTH, BLOCK_D)
    if KEPT:
        _put(escort_mean, escorted, head, rows, queries, WIDTH, BLOCK_D)
        places, inside = head * queries + rows, rows < queries
        tl.store(top_of + places, top, mask=inside)
        tl.store(threshold + places, tau + EPS * excess_weight / tl.where(absent, 1.0, escort_sum), mask=inside)


@_kernel
def _grad_query_kernel(
    query, key, value, mask, grad, escort_mean, top_of, threshold, along, grad_query, heads, queries, keys, scale, scaling,
    HAS_MASK: tl.constexpr, ALL_PRESENT: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, rows = _place(queries, BLOCK_Q)
    inside, places = rows < queries, head * queries + rows
    q, g = _block(query, head, rows, queries, WIDTH, BLOCK_D), _block(grad, head, rows, queries, WIDTH, BLOCK_D)
    mean = tl.sum(g.to(tl.float32) * _block(escort_mean, head, rows, queries, WIDTH, BLOCK_D), 1)
    tl.store(along + places, mean, mask=inside)
    top = tl.load(top_of + places, mask=inside, other=0.0)
    tau = tl.load(threshold + places, mask=inside, other=0.0)
    result = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        k, v = _block(key, head, positions, keys, WIDTH, BLOCK_D), _block(value, head, positions, keys, WIDTH, BLOCK_D)
        products = _products(q, k, mask, head, heads, positions, keys, HAS_MASK, ALL_PRESENT, PRECISION)
        _, escort = _powers((products - top[:, None]) * scale - tau[:, None], EPS)
        grad_scores = escort * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        result += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    _put(grad_query, result * scaling, head, rows, queries, WIDTH, BLOCK_D)


@_kernel
def _grad_memory_kernel(
    query, key, value, mask, grad, top_of, threshold, along, grad_key, grad_value, heads, queries, keys, scale, scaling,
    HAS_MASK: tl.constexpr, ALL_PRESENT: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, positions = _place(keys, BLOCK_N)
    k, v = _block(key, head, positions, keys, WIDTH, BLOCK_D), _block(value, head, positions, keys, WIDTH, BLOCK_D)
    for_keys, for_values = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, queries, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        inside, places = rows < queries, head * queries + rows
        q, g = _block(query, head, rows, queries, WIDTH, BLOCK_D), _block(grad, head, rows, queries, WIDTH, BLOCK_D)
        # Rows beyond the end have products of 0, and weights of 0 at this threshold.
        top = tl.load(top_of + places, mask=inside, other=0.0)
        tau = tl.load(threshold + places, mask=inside, other=0.0)
        means = tl.load(along + places, mask=inside, other=0.0)
        # Keys come first here, so that weights need not be transposed for the products.
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights, escort = _powers((products - top[None, :]) * scale - tau[None, :], EPS)
        grad_scores = escort * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - means[None, :])
        for_values += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        for_keys += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)
    if HAS_MASK:
        present = _present(mask, head, heads, positions, keys, HAS_MASK)
        for_keys = tl.where(present[:, None], for_keys, 0.0)
        for_values = tl.where(present[:, None], for_values, 0.0)
    _put(grad_key, for_keys * scaling, head, positions, keys, WIDTH, BLOCK_D)
    _put(grad_value, for_values, head, positions, keys, WIDTH, BLOCK_D)
