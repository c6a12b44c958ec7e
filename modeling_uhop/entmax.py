r"""Alpha-entmax: the solver, its autograd function, and its gradients.

With $\epsilon = \alpha - 1$, the solution is a q-exponential around one threshold $c$ per row:

$$
\log p_i = \frac{\log(1 + \epsilon (z_i - c))}{\epsilon}
\quad \text{where } 1 + \epsilon (z_i - c) > 0,
\qquad p_i = 0 \text{ elsewhere},
\qquad \sum_i p_i = 1
$$

This expression tends to softmax as $\epsilon \to 0$. Therefore one formula, one solver and one
gradient serve the whole range of alpha.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .precision import is_readable, is_traced


# A score this low, relative to the largest, has weight zero for every alpha. The value is finite
# because 0 * -inf would be NaN.
_LOWEST_SCORE = -1e30
# This many Newton steps make the threshold exact to rounding on the hardest inputs that we found:
# near-uniform rows of 16,384 scores at alpha = 2.
_NEWTON_STEPS = 12
# Number of Newton steps before the first convergence check.
_UNCHECKED_STEPS = 3
# If the largest score times the row length exceeds this, we subtract the row maximum first, because
# a threshold of that size would be rounded by more than a thousandth of a weight of 1 / row length.
_SHIFT_LIMIT = 2.0**15
# Because a pass over a long row is expensive, rows of at least `_LONG_ROW` scores start from the
# threshold of the maxima of `_GROUPS` groups of scores.
_LONG_ROW = 512
_GROUPS = 32


def entmax(scores: torch.Tensor, alpha: float | torch.Tensor, dim: int) -> torch.Tensor:
    """Map finite scores in fp32 or better to weights whose sum along `dim` is 1.

    A tensor alpha has as many axes as the scores, and size 1 along `dim`.
    """
    eps = (alpha.to(scores.dtype) if isinstance(alpha, torch.Tensor) else alpha) - 1.0
    if torch.jit.is_tracing():
        # Because ONNX's TorchScript exporter loses the in-place changes of a custom autograd
        # function, we call the solver directly.
        return entmax_solve(scores * entmax_scale(eps), eps, dim).weights
    weights: torch.Tensor = _Entmax.apply(scores, eps, dim)
    return weights


class _Entmax(torch.autograd.Function):
    """Alpha-entmax for eps = alpha - 1 in [0, 1], with exact gradients for scores and eps."""

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
    """Return the factor by which scores must be multiplied before `entmax_solve`."""
    return 1.0 if isinstance(eps, torch.Tensor) or not has_root(eps) else eps


def has_root(eps: float | torch.Tensor) -> bool:
    """Return whether weights need no logarithm, because they are a power of a difference.

    This holds for 1.5-entmax (eps = 0.5) and sparsemax (eps = 1).
    """
    return not isinstance(eps, torch.Tensor) and eps in (0.5, 1.0)


class Solution(NamedTuple):
    """Result of `entmax_solve`: weights of rows of scores, and the values that restore them later.

    Attributes:
        weights: Weights whose sum along each row is 1 up to rounding.
        threshold: The threshold of each row. A score, less the shift of its row, has weight if it
            is above the threshold.
        shift: The largest score of each row if any scores are so large that the threshold would
            lose precision, or if values cannot be read; otherwise `None`.
    """

    weights: torch.Tensor
    threshold: torch.Tensor
    shift: torch.Tensor | None


def entmax_solve(scores: torch.Tensor, eps: float | torch.Tensor, dim: int = -1) -> Solution:
    """Solve for the weights by Newton's method on the (1 / eps)-norm of the truncated scores.

    This norm is convex and decreases as the threshold rises. Therefore steps that start on the
    left, where the largest weight is 1, rise to the root without overshooting it. At eps = 0 one
    step is exact.

    Args:
        scores: Scores times `entmax_scale(eps)`. They are overwritten.
        eps: alpha - 1, in [0, 1].
        dim: The axis along which the weights sum to 1.
    """
    # Because a traced graph serves rows of every length, we do not branch on the length there.
    is_long = has_root(eps) and dim == -1 and not is_traced() and scores.shape[-1] >= _LONG_ROW
    leaders = _group_maxima(scores) if is_long else scores
    largest = leaders.amax(dim, keepdim=True)
    # Because reading values is impossible in a traced graph and stalls an accelerator, we always
    # shift the scores there.
    magnitude, shift, readable = largest.abs(), None, is_readable(scores)
    if not readable or not magnitude.amax().item() * scores.shape[dim] <= _SHIFT_LIMIT:
        shift, largest = largest, _zeros(largest)
        magnitude = _zeros(largest)
        scores.sub_(shift)
        if is_long:
            leaders.sub_(shift)
    threshold_offset = _zeros(largest)
    precision = torch.finfo(scores.dtype).eps
    if not has_root(eps):
        scores.sub_(largest)
        for step in range(_NEWTON_STEPS):
            weights, slopes = _q_exponential(scores - threshold_offset, eps)
            total = weights.sum(dim, keepdim=True)
            excess = total.log()
            threshold_offset += total * excess * expm1_ratio(-eps * excess) / slopes.sum(dim, keepdim=True)
            if readable and step >= _UNCHECKED_STEPS and not excess.abs().amax().item() > 16.0 * precision:
                break
        return Solution(_newton_correction(*_q_exponential(scores.sub_(threshold_offset), eps), dim), largest.add_(threshold_offset), shift)

    # With n items at alpha = 1.5, the norm after a step differs from 1 by at most n / 2 times the
    # square of that step.
    tolerance = (64.0 * precision / scores.shape[dim]) ** 0.5 if eps == 0.5 else 4.0 * precision
    unchecked = _UNCHECKED_STEPS - 1 if is_long else _UNCHECKED_STEPS
    # Because the iteration cannot return once it is beyond the threshold, each step is slightly
    # shorter than a full Newton step, so that rounding does not make it too long.
    damping = 1.0 - 64.0 * precision
    # The starting point, where the largest weight is 1, or slightly more because of rounding.
    origin = largest.sub_(magnitude.add_(0.5 / precision), alpha=2.0 * precision)
    if is_long:
        origin = _warm_start(leaders, origin, eps)
    truncate_ = _truncation(scores)
    truncate_(scores, origin, alpha=-1)
    for step in range(_NEWTON_STEPS):
        decrement = _newton_decrement(scores, eps, dim).clamp_(max=0.0)
        threshold_offset.sub_(decrement, alpha=damping)
        truncate_(scores, decrement, alpha=damping)
        if readable and step >= unchecked:
            lowest = decrement.amin().item()
            if lowest != lowest:
                # Because truncation drops NaN, we write it back.
                scores.masked_fill_(threshold_offset.isnan(), torch.nan)
            if not lowest < -tolerance:
                break
    return Solution(
        scores.mul_(scores) if eps == 0.5 else _newton_correction(scores, scores.sign(), dim), origin.add_(threshold_offset), shift
    )


def _zeros(numbers: torch.Tensor) -> torch.Tensor:
    """Return zeros of the shape of `numbers`.

    ONNX's TorchScript exporter would turn `torch.zeros_like` into a constant of fixed shape.
    """
    return numbers.clamp(0.0, 0.0)


def _group_maxima(scores: torch.Tensor) -> torch.Tensor:
    """Compute the maxima of `_GROUPS` interleaved groups of scores, (..., _GROUPS)."""
    size, rest = divmod(scores.shape[-1], _GROUPS)
    maxima = scores[..., : size * _GROUPS].unflatten(-1, (size, _GROUPS)).amax(-2)
    if rest > 0:
        maxima[..., :rest] = torch.maximum(maxima[..., :rest], scores[..., -rest:])
    return maxima


def _warm_start(leaders: torch.Tensor, origin: torch.Tensor, eps: float | torch.Tensor) -> torch.Tensor:
    """Take Newton steps from the origin towards the threshold of a subset of the scores.

    This threshold is a lower bound for the threshold of all scores.
    """
    root = leaders.sub_(origin)
    for _ in range(_UNCHECKED_STEPS):
        decrement = _newton_decrement(root.relu_(), eps, -1)
        root.add_(decrement)
        origin.sub_(decrement)
    # Because rounding may have raised the result, we subtract a bound of the rounding error.
    return origin.sub_(origin.abs().add_(1.0), alpha=4.0 * torch.finfo(origin.dtype).eps)


def _newton_decrement(root: torch.Tensor, eps: float | torch.Tensor, dim: int) -> torch.Tensor:
    """Compute minus the Newton step of the threshold, from the truncated scores `root`."""
    total = root.sum(dim, keepdim=True)
    if eps == 0.5:
        norm = torch.linalg.vector_norm(root, dim=dim, keepdim=True)
        return torch.addcmul(norm, norm, norm, value=-1.0).div_(total)
    return (1.0 - total).div_(root.sign().sum(dim, keepdim=True))


def _newton_correction(weights: torch.Tensor, escort: torch.Tensor, dim: int) -> torch.Tensor:
    """Correct weights in place, so that their sum is 1 up to rounding.

    This is a last Newton step near the root. It removes the error that the rounding of the
    threshold added to the sum.
    """
    remainder = (weights.sum(dim, keepdim=True) - 1.0) / escort.sum(dim, keepdim=True)
    return weights.addcmul_(escort, remainder, value=-1.0).relu_()


def entmax_from_threshold(
    scores: torch.Tensor, threshold: torch.Tensor, eps: float | torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Compute the weights of `entmax_solve` again from shifted scores and a known threshold.

    Args:
        scores: Scores times `entmax_scale(eps)`, less their shift. They are overwritten.
        threshold: The threshold that `entmax_solve` returned.
        eps: alpha - 1, in [0, 1].
        out: Buffer for the weights at alpha = 1.5.

    Returns:
        The weights and their escort $p^{2 - \alpha}$, which is 0 where the weight is 0.
    """
    if not has_root(eps):
        return _q_exponential(scores.sub_(threshold), eps)
    root = _truncation(scores)(scores, threshold, alpha=-1)
    lost = threshold.isnan()
    if is_readable(lost) and bool(lost.any()):
        root.masked_fill_(lost, torch.nan)
    return (torch.mul(root, root, out=out), root) if eps == 0.5 else (root, root.sign())


def _truncation(scores: torch.Tensor) -> Callable[..., torch.Tensor]:
    r"""Return an in-place function of (x, y, alpha) that replaces x by $[x + \alpha y]_+$.

    On CPUs this is a single pass; only CPUs have that operation. It drops NaN.
    """
    return torch.ops.aten._add_relu_ if is_readable(scores) else lambda x, y, alpha: x.add_(y, alpha=alpha).relu_()


def entmax_score_gradient(escort: torch.Tensor, grad: torch.Tensor, dim: int = -1, out: torch.Tensor | None = None) -> torch.Tensor:
    r"""Compute the gradient for the scores from the gradient g for the weights.

    It is $(\mathrm{diag}(u) - u u^T / \sum u)\, g$ with the escort u.
    """
    product = torch.mul(escort, grad, out=out)
    return product.addcmul_(escort, product.sum(dim, keepdim=True) / escort.sum(dim, keepdim=True), value=-1.0)


def entmax_eps_gradient(weights: torch.Tensor, escort: torch.Tensor, grad: torch.Tensor, eps: torch.Tensor, dim: int = -1) -> torch.Tensor:
    r"""Compute the terms along `dim` of the gradient for eps (Correia et al. 2019, equation 10).

    The two poles of this equation at alpha = 1 are cancelled analytically. `first` is
    $(p^{-\epsilon} - 1) / \epsilon$, and `second` is
    $(p^{-\epsilon} - 1 + \epsilon \log p) / \epsilon^2$; both are finite at eps = 0.
    """
    log_weights = safe_log(weights)
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
    r"""Compute $p = (1 + \epsilon z)_+^{1 / \epsilon}$ and its slope $p^{1 - \epsilon}$.

    At eps = 0, p is exp(z). Both are 0 where $1 + \epsilon z \le 0$.
    """
    eps = torch.as_tensor(eps, dtype=scores.dtype, device=scores.device)
    scores = scores.clamp(min=_LOWEST_SCORE)
    # Because exponentials of -inf are slow, we keep the argument of the logarithm above 0 where the
    # weight is 0, and multiply the weight by 0 afterwards.
    root = (1.0 + eps * scores).relu_()
    present = root.sign()
    clamped = (eps * scores).clamp_(min=torch.finfo(scores.dtype).eps - 1.0)
    log_weights = torch.log1p(clamped).div_(torch.where(eps > 0, eps, 1.0))
    # Because the limit at eps = 0 is exp(z), we add the scores themselves there.
    log_weights = log_weights.addcmul_(scores, (eps == 0).to(scores.dtype))
    weights = log_weights.exp_().mul_(present)
    return weights, weights / root.clamp_(min=torch.finfo(scores.dtype).tiny)


def safe_log(weights: torch.Tensor) -> torch.Tensor:
    """Compute logarithms, and 0 for a weight of 0."""
    return torch.where(weights > 0, weights, 1.0).log()


def expm1_ratio(x: torch.Tensor) -> torch.Tensor:
    """Compute $(e^x - 1) / x$, which is 1 at 0; it is differentiable there too."""
    small = x.abs() < 0.5
    large = torch.where(small, 1.0, x)
    return torch.where(small, 1.0 + x * _expm1_remainder(x), (large.exp() - 1.0) / large)


def _expm1_remainder(x: torch.Tensor) -> torch.Tensor:
    """Compute $(e^x - 1 - x) / x^2$, which is 1/2 at 0.

    Near 0 the series is used, because the subtraction would cancel.
    """
    small = x.abs() < 0.5
    one = _zeros(x) + 1.0
    near, series = torch.where(small, x, 0.0), one
    for k in range(14, 2, -1):
        series = torch.addcmul(one, near, series, value=1.0 / k)
    large = torch.where(small, 1.0, x)
    return torch.where(small, series / 2.0, (large.exp() - 1.0 - large) / large.square())
