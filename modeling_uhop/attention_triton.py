"""Hopfield attention on a GPU for alpha > 1, as three Triton kernels that do not keep the scores.

One kernel computes the output, two compute the gradients. Each pass over the keys computes the
scores of a block of queries again. The forward pass consists of

1. one pass for the largest of every so many scores, whose threshold is a first guess; 2. a few
passes from this guess to the threshold of all scores; 3. one pass for the output and the escort
mean of the values.

With the escort mean, the backward pass needs one pass over the keys for the gradient of the
queries, and one pass over the queries for the gradients of keys and values. This is the idea of
AdaSplash (arXiv 2502.12082). The largest inner product of a row is subtracted before scaling,
because a threshold of large scores is too coarse for small weights.
"""

from __future__ import annotations

import os

import torch
from torch.autograd.function import once_differentiable

from .precision import autocast_dtype, cast_by_autocast, is_traced
from .simplex import check_alpha_range


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# The widest heads that the kernels support, by dtype, because wider ones do not fit the registers.
MAX_WIDTH = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
# The smallest alpha that is supported, because powers for a smaller one lose precision in fp32.
MIN_ALPHA = 1.01
# Largest number of Newton steps, as in `entmax_solve`; most rows need three.
_NEWTON_STEPS = 12


def _kernel(function):
    return function if triton is None else triton.jit(function)


def accepts(query, key, value, *, alpha=1.0, attention_mask=None, **others) -> bool:
    """Return whether `triton_hopfield_attention` computes this call of `hopfield_attention`."""
    return not others.keys() - {"scaling"} and _refusal(query, key, value, alpha, attention_mask) is None


def _refusal(query, key, value, alpha, mask) -> str | None:
    """Return why the kernels do not compute a call, or `None` if they do."""
    if is_traced() or query.is_meta:
        return "the Triton kernels need values, which traced graphs and meta tensors do not have"
    if isinstance(alpha, torch.Tensor) or alpha < MIN_ALPHA:
        return f"alpha must be one number from {MIN_ALPHA} to 2 for the Triton kernels, got {alpha}"
    same_shape = query.dim() == key.dim() == 4 and query.shape[::3] == key.shape[::3] and key.shape == value.shape
    if not same_shape or not (query.shape[1] == key.shape[1] or query.shape[1] > key.shape[1] > 0 == query.shape[1] % key.shape[1]):
        return (
            "query must have shape (B, H, Q, d), key and value must have shape (B, H_k, N, d), where H is a multiple of H_k, "
            f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    dtype, *others = map(autocast_dtype, (query, key, value))
    if others != [dtype, dtype] or dtype not in MAX_WIDTH:
        return f"query, key and value must be of one dtype, fp32, bf16 or fp16, got {dtype}, {others[0]}, {others[1]}"
    if query.shape[-1] > MAX_WIDTH[dtype]:
        return f"heads of {dtype} may be up to {MAX_WIDTH[dtype]} wide for the Triton kernels, got {query.shape[-1]}"
    if mask is None:
        return None
    sizes = (len(key), 1, query.shape[2], key.shape[2])
    fits = mask.dim() == 4 and all(size in (1, whole) for size, whole in zip(mask.shape, sizes, strict=True))
    if mask.dtype != torch.bool or not fits or (mask.shape[2] > 1 and mask.stride(2) > 0):
        wanted = f"of shape {(sizes[0], 1, 1, sizes[3])} or expanded from it"
        return f"attention_mask must be boolean, {wanted}, for the Triton kernels, got {mask.dtype} of shape {tuple(mask.shape)}"
    return None


def triton_hopfield_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
    block_queries: int | None = None,
    block_keys: int | None = None,
) -> torch.Tensor:
    r"""Compute `hopfield_attention` on a CUDA device by Triton kernels, for one alpha in [1.01, 2].

    $$
    \mathrm{Sep}_\alpha(\beta \, q k^T) \, v
    $$

    This is U-Hop (arXiv 2404.03827), equation 3.1. It is differentiable once in query, key and
    value. The kernels are made for NVIDIA GPUs since Ampere. They are compiled for each alpha,
    which takes seconds.

    Args:
        query: Queries (B, H, Q, d), in fp32 (d up to 128), bf16 or fp16 (d up to 256). Sums are in
            fp32. On NVIDIA GPUs, products of fp32 are made from three products of TF32. Under
            autocast the inputs are cast to its dtype.
        key: Keys (B, H_k, N, d), in the dtype of the query. H is a multiple of H_k, as in
            `hopfield_attention`.
        value: Values (B, H_k, N, d), in the dtype of the query.
        alpha: Tsallis exponent in [1.01, 2]. For a learnable one, use `hopfield_attention`.
        scaling: Inverse temperature beta; `None` for 1 / sqrt(d).
        attention_mask: Boolean (B, 1, 1, N), or expanded from this shape, True where a key is
            present. A query without any key retrieves zeros.
        block_queries: Number of queries that a program holds at once, a power of two, at least 16;
            `None` for a number that fits.
        block_keys: The same for keys.

    Returns:
        The output (B, H, Q, d), in the dtype of the query.

    Raises:
        ImportError: If Triton is not installed.
        ValueError: If alpha is a tensor or outside [1.01, 2], if shapes, dtypes or block sizes are
            not supported, or if there is no CUDA device. With TRITON_INTERPRET=1 in the
            environment, Triton's interpreter accepts CPU tensors, except bf16, which it multiplies
            incorrectly.
    """
    if triton is None:
        raise ImportError("triton_hopfield_attention needs Triton: pip install 'modeling_uhop[gpu]'")
    check_alpha_range(alpha)
    if reason := _refusal(query, key, value, alpha, attention_mask):
        raise ValueError(reason)
    query, key, value = cast_by_autocast(query, key, value)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if query.device.type != "cuda" and not interpreted:
        raise ValueError(f"the Triton kernels need a CUDA device, got tensors on {query.device}")
    if query.dtype == torch.bfloat16 and interpreted:
        raise ValueError("Triton's interpreter cannot multiply bf16; use fp32 or fp16, or leave TRITON_INTERPRET unset")
    launch = launch_of(query.dtype, query.shape[-1])
    launch.update({name: size for name, size in (("BLOCK_Q", block_queries), ("BLOCK_N", block_keys)) if size is not None})
    for size in (launch["BLOCK_Q"], launch["BLOCK_N"]):
        if size < 16 or size & (size - 1):
            raise ValueError(f"blocks must have powers of two of queries and keys, at least 16, got {size}")
    shape = query.shape
    if query.shape[1] > key.shape[1]:
        query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    if query.numel() == 0 or key.numel() == 0:
        # Because there is no query or no key, the result is empty or zero.
        return (query @ key.mT @ value).reshape(shape)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Because the kernels subtract the largest product before scaling, the scaling must be positive.
    if scaling <= 0.0:
        query, scaling = (-query, -scaling) if scaling < 0.0 else (query * 0.0, 1.0)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    key_mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(len(key), key.shape[2])
    output: torch.Tensor = _TritonAttention.apply(query, key, value, key_mask, alpha - 1.0, scaling, launch, needs_gradient)
    return output.reshape(shape)


def launch_of(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Return block sizes and number of warps for the kernels.

    With them the kernels fit the registers and the 99 KB of shared memory of NVIDIA GPUs since
    Ampere.
    """
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
    def forward(ctx, query, key, value, key_mask, eps, scaling, launch, needs_gradient):
        query, key, value = (x.contiguous() for x in (query, key, value))
        mask = query if key_mask is None else key_mask.to(torch.int8).contiguous()
        batch_size, heads, queries, _ = query.shape
        keys = key.shape[2]
        output = torch.empty_like(query)
        escort_mean, top, threshold = output, output, output
        if needs_gradient:
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
            _forward_kernel[grid](query, key, value, mask, *made, *sizes, KEPT=needs_gradient, STEPS=_NEWTON_STEPS, **constants)
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
def _program_positions(count, BLOCK: tl.constexpr):
    """Return the head of a program, and the positions of this head that the program holds.

    Neighbouring programs hold the positions of one head.
    """
    blocks = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    return program // blocks, (program % blocks) * BLOCK + tl.arange(0, BLOCK)


@_kernel
def _load_block(pointer, head, positions, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows (positions, BLOCK_D) of one head; entries beyond its end and width are 0."""
    columns = tl.arange(0, BLOCK_D)
    inside = (positions[:, None] < count) & (columns[None, :] < WIDTH)
    return tl.load(pointer + head.to(tl.int64) * count * WIDTH + (positions[:, None] * WIDTH + columns[None, :]), mask=inside, other=0.0)


@_kernel
def _store_block(pointer, values, head, positions, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    inside = (positions[:, None] < count) & (columns[None, :] < WIDTH)
    places = pointer + head.to(tl.int64) * count * WIDTH + (positions[:, None] * WIDTH + columns[None, :])
    tl.store(places, values.to(pointer.dtype.element_ty), mask=inside)


@_kernel
def _products(
    q, k, mask, head, heads, positions, keys,
    HAS_MASK: tl.constexpr, ALL_PRESENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the inner products of a block; they are -inf for absent keys."""
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
    """Compute weights and their escort from t = max(root, 0).

    A weight is `t^(1 / eps)`, its escort is `t^(1 / eps - 1)`.
    """
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
def _newton_step(weight_sum, escort_sum, absent, EPS: tl.constexpr):
    """Compute the Newton step of thresholds from the sums of their weights and escorts.

    The step is that of the (1 / eps)-norm; see `entmax_solve`.
    """
    below = tl.exp2(tl.log2(tl.where(absent, 1.0, weight_sum)) * (1.0 - EPS))
    return tl.where(absent, 0.0, (weight_sum - below) / tl.where(absent, 1.0, escort_sum))


@_kernel
def _forward_kernel(
    query, key, value, mask, output, escort_mean, top_of, threshold, heads, queries, keys, scale,
    KEPT: tl.constexpr, STEPS: tl.constexpr, HAS_MASK: tl.constexpr, ALL_PRESENT: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, rows = _program_positions(queries, BLOCK_Q)
    offsets = tl.arange(0, BLOCK_N)
    q = _load_block(query, head, rows, queries, WIDTH, BLOCK_D)

    leaders = tl.full((BLOCK_Q, BLOCK_N), float("-inf"), tl.float32)
    for start in range(0, keys, BLOCK_N):
        k = _load_block(key, head, start + offsets, keys, WIDTH, BLOCK_D)
        products = _products(q, k, mask, head, heads, start + offsets, keys, HAS_MASK, ALL_PRESENT, PRECISION)
        leaders = tl.maximum(leaders, products, propagate_nan=tl.PropagateNan.ALL)
    # Because the largest value of a row ignores NaN, we treat a row with a NaN like a row without
    # keys, and set its output to NaN at the end.
    unknown = leaders != leaders
    lost = tl.max(unknown.to(tl.int32), 1) > 0
    top = tl.max(tl.where(unknown, float("-inf"), leaders), 1)
    absent = (top == float("-inf")) | lost
    top = tl.where(absent, 0.0, top)

    # Newton steps from the point where the largest weight is 1 to the threshold of the leaders
    # only, which is a lower bound for the threshold of all scores.
    tau = tl.full((BLOCK_Q,), -1.0, tl.float32)
    for _ in range(4):
        weights, escort = _powers((leaders - top[:, None]) * scale - tau[:, None], EPS)
        tau += _newton_step(tl.sum(weights, 1), tl.sum(escort, 1), absent, EPS)

    step, excess = tl.full((), 0, tl.int32), tl.full((), 1.0, tl.float32)
    # Because a Newton step squares the error and the last pass takes one more step, 1e-3 is enough.
    while (step < STEPS) & (excess > 1e-3):
        weight_tile, escort_tile = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32), tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        for start in range(0, keys, BLOCK_N):
            k = _load_block(key, head, start + offsets, keys, WIDTH, BLOCK_D)
            products = _products(q, k, mask, head, heads, start + offsets, keys, HAS_MASK, ALL_PRESENT, PRECISION)
            weights, escort = _powers((products - top[:, None]) * scale - tau[:, None], EPS)
            weight_tile += weights
            escort_tile += escort
        weight_sum, escort_sum = tl.sum(weight_tile, 1), tl.sum(escort_tile, 1)
        tau += _newton_step(weight_sum, escort_sum, absent, EPS)
        excess = tl.max(tl.where(absent, 0.0, tl.abs(weight_sum - 1.0)), 0)
        step += 1

    mixed, escorted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32), tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    weight_sum, escort_sum = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, keys, BLOCK_N):
        k = _load_block(key, head, start + offsets, keys, WIDTH, BLOCK_D)
        v = _load_block(value, head, start + offsets, keys, WIDTH, BLOCK_D)
        products = _products(q, k, mask, head, heads, start + offsets, keys, HAS_MASK, ALL_PRESENT, PRECISION)
        weights, escort = _powers((products - top[:, None]) * scale - tau[:, None], EPS)
        weight_sum += tl.sum(weights, 1)
        escort_sum += tl.sum(escort, 1)
        mixed += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        escorted += tl.dot(escort.to(v.dtype), v, input_precision=PRECISION)
    escorted = tl.where(lost[:, None], float("nan"), escorted / tl.where(absent, 1.0, escort_sum)[:, None])
    excess_weight = tl.where(absent, 0.0, weight_sum - 1.0)
    _store_block(output, mixed - excess_weight[:, None] * escorted, head, rows, queries, WIDTH, BLOCK_D)
    if KEPT:
        _store_block(escort_mean, escorted, head, rows, queries, WIDTH, BLOCK_D)
        places, inside = head * queries + rows, rows < queries
        tl.store(top_of + places, top, mask=inside)
        tl.store(threshold + places, tau + EPS * excess_weight / tl.where(absent, 1.0, escort_sum), mask=inside)


@_kernel
def _grad_query_kernel(
    query, key, value, mask, grad, escort_mean, top_of, threshold, along, grad_query, heads, queries, keys, scale, scaling,
    HAS_MASK: tl.constexpr, ALL_PRESENT: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, rows = _program_positions(queries, BLOCK_Q)
    inside, places = rows < queries, head * queries + rows
    q, g = _load_block(query, head, rows, queries, WIDTH, BLOCK_D), _load_block(grad, head, rows, queries, WIDTH, BLOCK_D)
    mean = tl.sum(g.to(tl.float32) * _load_block(escort_mean, head, rows, queries, WIDTH, BLOCK_D), 1)
    tl.store(along + places, mean, mask=inside)
    top = tl.load(top_of + places, mask=inside, other=0.0)
    tau = tl.load(threshold + places, mask=inside, other=0.0)
    result = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(0, keys, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        k, v = _load_block(key, head, positions, keys, WIDTH, BLOCK_D), _load_block(value, head, positions, keys, WIDTH, BLOCK_D)
        products = _products(q, k, mask, head, heads, positions, keys, HAS_MASK, ALL_PRESENT, PRECISION)
        _, escort = _powers((products - top[:, None]) * scale - tau[:, None], EPS)
        grad_scores = escort * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - mean[:, None])
        result += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    _store_block(grad_query, result * scaling, head, rows, queries, WIDTH, BLOCK_D)


@_kernel
def _grad_memory_kernel(
    query, key, value, mask, grad, top_of, threshold, along, grad_key, grad_value, heads, queries, keys, scale, scaling,
    HAS_MASK: tl.constexpr, ALL_PRESENT: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, positions = _program_positions(keys, BLOCK_N)
    k, v = _load_block(key, head, positions, keys, WIDTH, BLOCK_D), _load_block(value, head, positions, keys, WIDTH, BLOCK_D)
    for_keys, for_values = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, queries, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        inside, places = rows < queries, head * queries + rows
        q, g = _load_block(query, head, rows, queries, WIDTH, BLOCK_D), _load_block(grad, head, rows, queries, WIDTH, BLOCK_D)
        # Rows beyond the end have products of 0 and, at this threshold, weights of 0.
        top = tl.load(top_of + places, mask=inside, other=0.0)
        tau = tl.load(threshold + places, mask=inside, other=0.0)
        means = tl.load(along + places, mask=inside, other=0.0)
        # Because the weights would otherwise have to be transposed, keys come first here.
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights, escort = _powers((products - top[None, :]) * scale - tau[None, :], EPS)
        grad_scores = escort * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - means[None, :])
        for_values += tl.dot(weights.to(g.dtype), g, input_precision=PRECISION)
        for_keys += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)
    if HAS_MASK:
        present = _present(mask, head, heads, positions, keys, HAS_MASK)
        for_keys = tl.where(present[:, None], for_keys, 0.0)
        for_values = tl.where(present[:, None], for_values, 0.0)
    _store_block(grad_key, for_keys * scaling, head, positions, keys, WIDTH, BLOCK_D)
    _store_block(grad_value, for_values, head, positions, keys, WIDTH, BLOCK_D)
