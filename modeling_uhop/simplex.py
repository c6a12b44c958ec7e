"""Simplex maps: from similarity scores to association weights.

A modern Hopfield network turns the scores `z` of a query against the stored patterns into a distribution over them,

    p*(z) = argmax_{p in simplex} <p, z> - Omega_alpha(p),      Omega_alpha(p) = 1 / (alpha (alpha - 1)) sum_i (p_i^alpha - p_i),

the gradient of the convex conjugate Psi*_alpha(z) of the Tsallis regulariser Omega_alpha (U-Hop, arXiv 2404.03827, equations 2.3 and D.1).
`alpha = 1` is softmax (Omega_1 is the negative Shannon entropy), `alpha = 2` sparsemax, and everything between them is alpha-entmax.

With `eps = alpha - 1` the solution is a q-exponential around one threshold `c` per row,

    log p_i = log1p(eps (z_i - c)) / eps   where 1 + eps (z_i - c) > 0,   p_i = 0 elsewhere,   sum_i p_i = 1,

which tends to softmax as eps -> 0, so one formula, one solver and one gradient serve the whole range.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch

from .validation import as_floats, is_readable, is_traced


# Below this a score is so far from the largest that its weight is zero for every alpha; finite, so 0 * it is not NaN.
_LOWEST = -1e30
# Newton steps until the threshold is exact to rounding, on the hardest inputs found (near-uniform rows of 16,384 at alpha = 2).
_NEWTON_STEPS = 12
# Steps before the first look at whether it is.
_UNCHECKED_STEPS = 3
# Where scores times the length of a row exceed this, they are taken relative to the largest: a threshold of their size would round by more
# than a thousandth of weights of one over that length.
_LARGE = 2.0**15
# Rows of so many scores begin with the maxima of so many groups of them.
_LONG = 512
_GROUPS = 32


def simplex_map(scores: torch.Tensor, alpha: float | torch.Tensor = 1.0, dim: int = -1, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Distribution `p*(scores)` along `dim`: softmax, alpha-entmax or sparsemax (U-Hop equation 2.3, `Sep_alpha`).

    Args:
        scores: Scores of any shape. `-inf` marks an absent item. Half-precision scores are mapped in fp32, and integers are floats.
        alpha: Tsallis exponent in [1, 2]: 1 softmax, 1.5 entmax, 2 sparsemax. A tensor must broadcast against `scores` with size 1
            along `dim`; it receives its exact gradient (also at 1), which is what a learnable alpha needs.
        dim: The axis that becomes a distribution.
        mask: Boolean, broadcastable to `scores`, True where an item is present. An absent item gets weight 0 and has no influence.

    Returns:
        Weights of the shape and dtype of `scores`. Each row sums to 1; a row without any present item is all zeros, and its
        gradient is zero.

    Raises:
        ValueError: If `alpha` is outside [1, 2] (or, as a tensor, not a single value along `dim`).
        TypeError: For scores that are no tensor.

    >>> from modeling_uhop import simplex_map

    >>> scores = torch.tensor([2.0, 1.5, -1.0])
    >>> [round(weight, 3) for weight in simplex_map(scores, alpha=1.0).tolist()]
    [0.604, 0.366, 0.03]
    >>> simplex_map(scores, alpha=2.0).tolist()
    [0.75, 0.25, 0.0]
    """
    (scores,) = as_floats(scores=scores)
    _check_alpha(alpha, scores, dim)
    if scores.numel() == 0:
        return scores
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    absent = scores.amax(dim, keepdim=True) == -math.inf
    wide = at_least_fp32(scores).masked_fill(absent, 0.0)
    if isinstance(alpha, torch.Tensor) or alpha != 1.0:
        weights = _entmax(wide, alpha, dim)
    else:
        weights = torch.softmax(wide, dim)
    return weights.masked_fill(absent, 0.0).to(scores.dtype)


def simplex_conjugate(
    scores: torch.Tensor, alpha: float | torch.Tensor = 1.0, dim: int = -1, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Convex conjugate `Psi*_alpha(scores) = max_p <p, scores> - Omega_alpha(p)` along `dim` (U-Hop equation 2.3 at beta = 1).

    Its gradient is `simplex_map(scores, alpha, dim, mask)`. `alpha = 1` is log-sum-exp; `alpha = 2` is
    `1/2 |z|^2 - 1/2 |p - z|^2 + 1/2`. At another inverse temperature, `Psi*_alpha(beta, z) = Psi*_alpha(beta z) / beta`.

    Args and errors are those of `simplex_map`.

    Returns:
        `scores` reduced along `dim`, in fp32 or better. A row without any present item gives 0.

    >>> from modeling_uhop import simplex_conjugate

    >>> scores = torch.tensor([2.0, 1.5, -1.0])
    >>> torch.isclose(simplex_conjugate(scores, alpha=1.0), scores.logsumexp(-1)).item()
    True
    """
    (scores,) = as_floats(scores=scores)
    _check_alpha(alpha, scores, dim)
    if scores.numel() == 0:
        return at_least_fp32(scores).sum(dim)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    scores = at_least_fp32(scores)
    absent = scores.amax(dim, keepdim=True) == -math.inf
    if not isinstance(alpha, torch.Tensor) and alpha == 1.0:
        return torch.logsumexp(scores.masked_fill(absent, 0.0), dim).masked_fill(absent.squeeze(dim), 0.0)
    weights = simplex_map(scores, alpha, dim)
    scores = scores.masked_fill(scores == -math.inf, 0.0)
    return (weights * scores + tsallis_entropy_terms(weights, alpha)).sum(dim)


def tsallis_entropy_terms(weights: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """Terms `(p_i - p_i^alpha) / (alpha (alpha - 1))` whose sum is the Tsallis entropy `-Omega_alpha(p)`; at alpha = 1, `-p_i log p_i`."""
    log_weights = _safe_log(weights)
    eps = torch.as_tensor(alpha, dtype=weights.dtype, device=weights.device) - 1.0
    return -weights * log_weights * _expm1_ratio(eps * log_weights) / (1.0 + eps)


def _check_alpha(alpha: float | torch.Tensor, scores: torch.Tensor, dim: int) -> None:
    if isinstance(alpha, torch.Tensor) and _aligned(alpha, scores).shape[dim] != 1:
        raise ValueError(f"alpha must have size 1 along dim {dim}, got shape {tuple(alpha.shape)} for scores {tuple(scores.shape)}")
    check_alpha_range(alpha)


def check_alpha_range(alpha: float | torch.Tensor) -> None:
    """A `ValueError` for an alpha outside [1, 2]; a tensor's values are looked at only where that costs little."""
    if not isinstance(alpha, torch.Tensor):
        if not isinstance(alpha, Real) or not 1.0 <= alpha <= 2.0:
            raise ValueError(f"alpha must lie in [1, 2], got {alpha!r}")
    elif is_readable(alpha) and not bool(((alpha >= 1.0) & (alpha <= 2.0)).all()):
        raise ValueError(f"alpha must lie in [1, 2], got values from {alpha.min().item()} to {alpha.max().item()}")


def _aligned(alpha: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`alpha` with leading axes of size 1, so that its axes line up with those of `scores`."""
    return alpha.reshape((1,) * (scores.dim() - alpha.dim()) + alpha.shape)


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or in fp32 if it is half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def cast_by_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Factors of a product as autocast has them, where it is on: in its dtype, but for those of fp64."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _entmax(scores: torch.Tensor, alpha: float | torch.Tensor, dim: int) -> torch.Tensor:
    if isinstance(alpha, torch.Tensor):
        alpha = _aligned(alpha, scores).to(scores.dtype)
    if torch.jit.is_tracing():
        # ONNX's TorchScript exporter loses what a function of our own changes in place.
        return entmax_solve(scores * entmax_scale(alpha - 1.0), alpha - 1.0, dim).weights
    weights: torch.Tensor = _Entmax.apply(scores, alpha - 1.0, dim)
    return weights


class _Entmax(torch.autograd.Function):
    """alpha-entmax for eps = alpha - 1 in [0, 1], with exact gradients for the scores and for eps."""

    @staticmethod
    def forward(ctx, scores, eps, dim):
        weights = entmax_solve(scores * entmax_scale(eps), eps, dim).weights
        ctx.save_for_backward(weights, *([eps] if isinstance(eps, torch.Tensor) else []))
        ctx.eps, ctx.dim = None if isinstance(eps, torch.Tensor) else eps, dim
        return weights

    @staticmethod
    def backward(ctx, grad):
        weights, *saved_eps = ctx.saved_tensors
        eps = saved_eps[0] if saved_eps else ctx.eps
        escort = torch.where(weights > 0, weights, 1.0).pow(1.0 - eps) * (weights > 0)
        grad_eps = entmax_eps_gradient(weights, escort, grad, eps, ctx.dim).sum_to_size(eps.shape) if ctx.needs_input_grad[1] else None
        return entmax_score_gradient(escort, grad, ctx.dim), grad_eps, None


def entmax_scale(eps: float | torch.Tensor) -> float:
    """What scores are multiplied with for `entmax_solve`."""
    return 1.0 if isinstance(eps, torch.Tensor) or not has_root(eps) else eps


def has_root(eps: float | torch.Tensor) -> bool:
    """Whether weights are a power of a difference, which needs no logarithm: those of 1.5-entmax and sparsemax."""
    return not isinstance(eps, torch.Tensor) and eps in (0.5, 1.0)


class Solution(NamedTuple):
    """Weights of rows of scores, with their sum at 1 but for rounding, and what `entmax_recall` makes them from again.

    Attributes:
        threshold: What is above it, of scores less their shift, has weight.
        shift: The largest score of each row, where some are so large that a threshold beside them would be lost in rounding.
    """

    weights: torch.Tensor
    threshold: torch.Tensor
    shift: torch.Tensor | None


def entmax_solve(scores: torch.Tensor, eps: float | torch.Tensor, dim: int = -1) -> Solution:
    """Weights by Newton's method on the (1 / eps)-norm of the truncated scores.

    It is convex and falls in the threshold, so that from the left (where the largest weight is 1) the steps climb to the root without
    overshooting. At eps = 0 one step is exact.

    Args:
        scores: Scores, times `entmax_scale(eps)`. Overwritten.
    """
    # A traced graph serves rows of every length.
    long = has_root(eps) and dim == -1 and not is_traced() and scores.shape[-1] >= _LONG
    leaders = _group_maxima(scores) if long else scores
    largest = leaders.amax(dim, keepdim=True)
    # Values are not looked at while tracing, or where that would stall an accelerator.
    magnitude, shift, readable = largest.abs(), None, is_readable(scores)
    if not readable or not magnitude.amax().item() * scores.shape[dim] <= _LARGE:
        shift, largest = largest, _zeros(largest)
        magnitude = _zeros(largest)
        scores.sub_(shift)
        if long:
            leaders.sub_(shift)
    risen = _zeros(largest)
    precision = torch.finfo(scores.dtype).eps
    if not has_root(eps):
        scores.sub_(largest)
        for step in range(_NEWTON_STEPS):
            weights, slopes = _q_exponential(scores - risen, eps)
            total = weights.sum(dim, keepdim=True)
            excess = total.log()
            risen += total * excess * _expm1_ratio(-eps * excess) / slopes.sum(dim, keepdim=True)
            if readable and step >= _UNCHECKED_STEPS and not excess.abs().amax().item() > 16.0 * precision:
                break
        return Solution(_newton_correction(*_q_exponential(scores.sub_(risen), eps), dim), largest.add_(risen), shift)

    # Of n items, the next norm at alpha = 1.5 is off 1 by n / 2 times the square of a fall at most.
    enough = (64.0 * precision / scores.shape[dim]) ** 0.5 if eps == 0.5 else 4.0 * precision
    unchecked = _UNCHECKED_STEPS - 1 if long else _UNCHECKED_STEPS
    # A little less than a whole step, lest rounding make it too long: from beyond the threshold there is no way back.
    caution = 1.0 - 64.0 * precision
    origin = largest.sub_(magnitude.add_(0.5 / precision), alpha=2.0 * precision)  # where the largest weight is 1, or more by rounding
    if long:
        origin = _towards_threshold(leaders, origin, eps)
    truncate_ = _truncation(scores)
    truncate_(scores, origin, alpha=-1)
    for step in range(_NEWTON_STEPS):
        fall = _fall(scores, eps, dim).clamp_(max=0.0)
        risen.sub_(fall, alpha=caution)
        truncate_(scores, fall, alpha=caution)
        if readable and step >= unchecked:
            lowest = fall.amin().item()
            if lowest != lowest:
                scores.masked_fill_(risen.isnan(), torch.nan)  # which truncation drops
            if not lowest < -enough:
                break
    return Solution(scores.mul_(scores) if eps == 0.5 else _newton_correction(scores, scores.sign(), dim), origin.add_(risen), shift)


def _zeros(numbers: torch.Tensor) -> torch.Tensor:
    """Zeros of this shape, which ONNX's TorchScript exporter would take for a constant one if it were asked for zeros."""
    return numbers.clamp(0.0, 0.0)


def _group_maxima(scores: torch.Tensor) -> torch.Tensor:
    """The largest of every `_GROUPS`-th score, (..., _GROUPS)."""
    size, rest = divmod(scores.shape[-1], _GROUPS)
    maxima = scores[..., : size * _GROUPS].unflatten(-1, (size, _GROUPS)).amax(-2)
    if rest > 0:
        maxima[..., :rest] = torch.maximum(maxima[..., :rest], scores[..., -rest:])
    return maxima


def _towards_threshold(leaders: torch.Tensor, origin: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    """Steps from the origin towards the threshold of some of the scores, which is left of that of all."""
    root = leaders.sub_(origin)
    for _ in range(_UNCHECKED_STEPS):
        fall = _fall(root.relu_(), eps, -1)
        root.add_(fall)
        origin.sub_(fall)
    return origin.sub_(origin.abs().add_(1.0), alpha=4.0 * torch.finfo(origin.dtype).eps)  # less what rounding may have added


def _fall(root: torch.Tensor, eps: float | torch.Tensor, dim: int) -> torch.Tensor:
    """Newton's step for the sum of weights of `root`, the scores above a threshold: minus what the threshold rises by."""
    total = root.sum(dim, keepdim=True)
    if eps == 0.5:
        norm = torch.linalg.vector_norm(root, dim=dim, keepdim=True)
        return torch.addcmul(norm, norm, norm, value=-1.0).div_(total)
    return (1.0 - total).div_(root.sign().sum(dim, keepdim=True))


def _newton_correction(weights: torch.Tensor, escort: torch.Tensor, dim: int) -> torch.Tensor:
    """Weights, in place, less what rounding the threshold added to their sum: a last step of Newton's method, from near the root."""
    remainder = (weights.sum(dim, keepdim=True) - 1.0) / escort.sum(dim, keepdim=True)
    return weights.addcmul_(escort, remainder, value=-1.0).relu_()


def entmax_recall(
    scores: torch.Tensor, threshold: torch.Tensor, eps: float | torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights that `entmax_solve` made of these scores, less their shift, and their escort `p^(2 - alpha)`, 0 off the support.

    Scores are overwritten; weights at alpha = 1.5 take the place of `out`, if it is given.
    """
    if not has_root(eps):
        return _q_exponential(scores.sub_(threshold), eps)
    root = _truncation(scores)(scores, threshold, alpha=-1)
    lost = threshold.isnan()
    if is_readable(lost) and bool(lost.any()):
        root.masked_fill_(lost, torch.nan)
    return (torch.mul(root, root, out=out), root) if eps == 0.5 else (root, root.sign())


def _truncation(scores: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A function of (x, y, alpha) that puts `[x + alpha y]_+` in the place of x: in one pass on CPUs, which alone have it, but drop NaN."""
    return torch.ops.aten._add_relu_ if is_readable(scores) else lambda x, y, alpha: x.add_(y, alpha=alpha).relu_()


def entmax_score_gradient(escort: torch.Tensor, grad: torch.Tensor, dim: int = -1, out: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient for the scores: `(diag(u) - u u^T / sum u) grad` with the escort u."""
    product = torch.mul(escort, grad, out=out)
    return product.addcmul_(escort, product.sum(dim, keepdim=True) / escort.sum(dim, keepdim=True), value=-1.0)


def entmax_eps_gradient(weights: torch.Tensor, escort: torch.Tensor, grad: torch.Tensor, eps: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Terms along `dim` of the gradient for eps: Correia et al. (2019), equation 10, its two poles at alpha = 1 cancelled by hand.

    `first` and `second` are `(p^-eps - 1) / eps` and `(p^-eps - 1 + eps log p) / eps^2`, both finite at eps = 0.
    """
    log_weights = _safe_log(weights)
    power = -eps * log_weights
    remainder = _expm1_remainder(power)
    first = -log_weights * (1.0 + power * remainder)
    second = log_weights.square() * remainder
    entropy = -(weights * log_weights).sum(dim, keepdim=True)
    mean_first = (weights * first).sum(dim, keepdim=True)
    mean_second = (weights * second).sum(dim, keepdim=True)
    slope = weights * (mean_second - second - log_weights * mean_first - first * entropy) / escort.sum(dim, keepdim=True)
    return grad * slope


def _q_exponential(scores: torch.Tensor, eps: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`p = (1 + eps z)_+^(1 / eps)`, exp(z) at eps = 0, and its slope `p^(1 - eps)`, both 0 off the support."""
    eps = torch.as_tensor(eps, dtype=scores.dtype, device=scores.device)
    scores = scores.clamp(min=_LOWEST)
    # Off the support the root is held above 0, as exponentials of -inf are slow, and the weight is set to 0 behind it.
    root = (1.0 + eps * scores).relu_()
    present = root.sign()
    held = (eps * scores).clamp_(min=torch.finfo(scores.dtype).eps - 1.0)
    log_weights = torch.log1p(held).div_(torch.where(eps > 0, eps, 1.0))
    # Where eps = 0 this adds the scores themselves: the limit is exp(z).
    log_weights = log_weights.addcmul_(scores, (eps == 0).to(scores.dtype))
    weights = log_weights.exp_().mul_(present)
    return weights, weights / root.clamp_(min=torch.finfo(scores.dtype).tiny)


def _safe_log(weights: torch.Tensor) -> torch.Tensor:
    return torch.where(weights > 0, weights, 1.0).log()


def _expm1_ratio(x: torch.Tensor) -> torch.Tensor:
    """`(exp(x) - 1) / x`, 1 at 0; differentiable there too."""
    small = x.abs() < 0.5
    large = torch.where(small, 1.0, x)
    return torch.where(small, 1.0 + x * _expm1_remainder(x), (large.exp() - 1.0) / large)


def _expm1_remainder(x: torch.Tensor) -> torch.Tensor:
    """`(exp(x) - 1 - x) / x^2`, 1/2 at 0; by its series where the subtraction would cancel."""
    small = x.abs() < 0.5
    one = _zeros(x) + 1.0
    near, series = torch.where(small, x, 0.0), one
    for k in range(14, 2, -1):
        series = torch.addcmul(one, near, series, value=1.0 / k)
    large = torch.where(small, 1.0, x)
    return torch.where(small, series / 2.0, (large.exp() - 1.0 - large) / large.square())
