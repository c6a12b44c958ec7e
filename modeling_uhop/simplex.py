r"""Simplex maps turn similarity scores into association weights: softmax, entmax and sparsemax.

A modern Hopfield network maps the scores $z$ of a query against the stored patterns to a
probability distribution $p$ over these patterns:

$$
p^*(z) = \arg\max_{p \in \mathrm{simplex}} \langle p, z \rangle - \Omega_\alpha(p),
\qquad
\Omega_\alpha(p) = \frac{1}{\alpha (\alpha - 1)} \sum_i (p_i^\alpha - p_i)
$$

This map is the gradient of $\Psi^*_\alpha(z)$, the convex conjugate of the Tsallis regulariser
$\Omega_\alpha$ (U-Hop, arXiv 2404.03827, equations 2.3 and D.1). `alpha = 1` is softmax, because
$\Omega_1$ is the negative Shannon entropy. `alpha = 2` is sparsemax. Values between 1 and 2 are
alpha-entmax.

The file `entmax.py` has the solver.
"""

import math
from numbers import Real

import torch

from .checks import as_floats
from .entmax import entmax, expm1_ratio, safe_log
from .precision import at_least_fp32, is_readable


def simplex_map(scores: torch.Tensor, alpha: float | torch.Tensor = 1.0, dim: int = -1, mask: torch.Tensor | None = None) -> torch.Tensor:
    r"""Map scores to a probability distribution along `dim`: softmax, alpha-entmax or sparsemax.

    This is the map $\mathrm{Sep}_\alpha$ of U-Hop (arXiv 2404.03827, equation 2.3):

    $$
    p^*(z) = \arg\max_{p \in \mathrm{simplex}} \langle p, z \rangle - \Omega_\alpha(p)
    $$

    Args:
        scores: Scores $z$ of any shape. A score of `-inf` marks an absent item. Half-precision
            scores are mapped in fp32. Integer scores are converted to floats.
        alpha: Tsallis exponent in [1, 2]: 1 is softmax, 1.5 is 1.5-entmax, 2 is sparsemax. A tensor
            must broadcast against `scores` and have size 1 along `dim`. It receives its exact
            gradient, also at 1, so that alpha can be learned.
        dim: The axis along which the weights sum to 1.
        mask: Boolean, broadcastable to `scores`, True where an item is present. An absent item gets
            weight 0 and has no influence.

    Returns:
        Weights with the shape and dtype of `scores`. Each row sums to 1. A row without any present
            item is all zeros, and its gradient is zero.

    Raises:
        ValueError: If `alpha` is outside [1, 2], or is a tensor whose size along `dim` is not 1.
        TypeError: If `scores` is not a tensor.

    Examples:
        >>> from modeling_uhop import simplex_map
        >>> scores = torch.tensor([2.0, 1.5, -1.0])
        >>> [round(weight, 3) for weight in simplex_map(scores, alpha=1.0).tolist()]
        [0.604, 0.366, 0.03]
        >>> simplex_map(scores, alpha=2.0).tolist()
        [0.75, 0.25, 0.0]
    """
    scores, alpha = _checked(scores, alpha, dim, mask)
    if scores.numel() == 0:
        return scores
    absent = scores.amax(dim, keepdim=True) == -math.inf
    wide = at_least_fp32(scores).masked_fill(absent, 0.0)
    weights = torch.softmax(wide, dim) if is_softmax(alpha) else entmax(wide, alpha, dim)
    return weights.masked_fill(absent, 0.0).to(scores.dtype)


def simplex_conjugate(
    scores: torch.Tensor, alpha: float | torch.Tensor = 1.0, dim: int = -1, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Compute the convex conjugate of the Tsallis regulariser, a generalised log-sum-exp.

    This is U-Hop (arXiv 2404.03827), equation 2.3, at inverse temperature beta = 1:

    $$
    \Psi^*_\alpha(z) = \max_{p \in \mathrm{simplex}} \langle p, z \rangle - \Omega_\alpha(p)
    $$

    Its gradient is `simplex_map(scores, alpha, dim, mask)`. At `alpha = 1` it is log-sum-exp. At
    `alpha = 2` it is $\frac{1}{2} |z|^2 - \frac{1}{2} |p - z|^2 + \frac{1}{2}$. At another inverse
    temperature, $\Psi^*_\alpha(\beta, z) = \Psi^*_\alpha(\beta z) / \beta$.

    Args:
        scores: As in `simplex_map`.
        alpha: As in `simplex_map`.
        dim: The axis that is reduced.
        mask: As in `simplex_map`.

    Returns:
        The conjugate, with the shape of `scores` without `dim`, in fp32 or better. A row without
            any present item gives 0.

    Raises:
        ValueError: If `alpha` is outside [1, 2], or is a tensor whose size along `dim` is not 1.
        TypeError: If `scores` is not a tensor.

    Examples:
        >>> from modeling_uhop import simplex_conjugate
        >>> scores = torch.tensor([2.0, 1.5, -1.0])
        >>> torch.isclose(simplex_conjugate(scores, alpha=1.0), scores.logsumexp(-1)).item()
        True
    """
    scores, alpha = _checked(scores, alpha, dim, mask)
    scores = at_least_fp32(scores)
    if scores.numel() == 0:
        return scores.sum(dim)
    absent = scores.amax(dim, keepdim=True) == -math.inf
    if is_softmax(alpha):
        return torch.logsumexp(scores.masked_fill(absent, 0.0), dim).masked_fill(absent.squeeze(dim), 0.0)
    weights = simplex_map(scores, alpha, dim)
    scores = scores.masked_fill(scores == -math.inf, 0.0)
    return (weights * scores + tsallis_entropy_terms(weights, alpha)).sum(dim)


def tsallis_entropy_terms(weights: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    r"""Compute the terms of the Tsallis entropy $-\Omega_\alpha(p)$, one for each weight.

    Each term is $(p_i - p_i^\alpha) / (\alpha (\alpha - 1))$. At alpha = 1 it is $-p_i \log p_i$.
    """
    log_weights = safe_log(weights)
    eps = torch.as_tensor(alpha, dtype=weights.dtype, device=weights.device) - 1.0
    return -weights * log_weights * expm1_ratio(eps * log_weights) / (1.0 + eps)


def _checked(
    scores: torch.Tensor, alpha: float | torch.Tensor, dim: int, mask: torch.Tensor | None
) -> tuple[torch.Tensor, float | torch.Tensor]:
    """Return scores with -inf for absent items, and a tensor alpha with as many axes as the scores."""
    (scores,) = as_floats(scores=scores)
    if isinstance(alpha, torch.Tensor):
        given, alpha = alpha.shape, alpha.reshape((1,) * (scores.dim() - alpha.dim()) + alpha.shape)
        if alpha.shape[dim] != 1:
            raise ValueError(f"alpha must have size 1 along dim {dim}, got shape {tuple(given)} for scores {tuple(scores.shape)}")
    check_alpha_range(alpha)
    return scores if mask is None else scores.masked_fill(~mask, -math.inf), alpha


def is_softmax(alpha: float | torch.Tensor) -> bool:
    """Return whether alpha is the number 1; a tensor may be learned, and its values change."""
    return not isinstance(alpha, torch.Tensor) and alpha == 1.0


def learned_alpha(logit: torch.Tensor) -> torch.Tensor:
    """Return the exponents (H, 1, 1) in (1, 2), in fp32, of learnable logits (H,)."""
    return 1.0 + logit.float().sigmoid().view(-1, 1, 1)


def alpha_logit(alpha: float) -> float:
    """Return the logit for which `learned_alpha` is alpha, in (1, 2)."""
    return math.log((alpha - 1.0) / (2.0 - alpha))


def check_alpha_range(alpha: float | torch.Tensor) -> None:
    """Raise a `ValueError` if alpha is outside [1, 2].

    The values of a tensor are checked only if Python can read them cheaply; see `is_readable`.
    """
    if not isinstance(alpha, torch.Tensor):
        if not isinstance(alpha, Real) or not 1.0 <= alpha <= 2.0:
            raise ValueError(f"alpha must lie in [1, 2], got {alpha!r}")
    elif is_readable(alpha) and not bool(((alpha >= 1.0) & (alpha <= 2.0)).all()):
        raise ValueError(f"alpha must lie in [1, 2], got values from {alpha.min().item()} to {alpha.max().item()}")
