r"""Optimal spherical codes: points on a sphere whose closest pair is as far apart as possible.

This is the Tammes problem. U-Hop+ (arXiv 2410.23126) moves features towards such a code: as the
temperature tends to 0, the minimiser of its separation loss solves

$$
\max \min_{\mu \ne \nu} (1 - \langle \Phi_\mu, \Phi_\nu \rangle)
$$
"""

import torch
from transformers.utils import logging

from .feature_map import FeatureMap
from .precision import is_finite


_FINE_RESTARTS = 24
_COARSE_STEPS, _FINE_STEPS = 500, 1500


def spherical_code(num_points: int, dim: int, *, restarts: int | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
    r"""Find points on the unit sphere with the largest possible smallest angle.

    Up to 2 dim points the optimum is known (Rankin 1955) and is returned: a regular simplex for at
    most dim + 1 points, otherwise a part of a cross-polytope. For more points, projected gradient
    descent minimises

    $$
    \tau \log \sum_{\mu \ne \nu} \exp(\langle z_\mu, z_\nu \rangle / \tau)
    $$

    for all random restarts in one tensor. A coarse phase has two initial temperatures: 0.3 (smooth,
    finds symmetric codes) and 0.03 (rough, reaches many basins). Then a fine phase for the best few
    ends at temperature 2e-5.

    Args:
        num_points: Number M of points, at least 1.
        dim: Dimension D, at least 1.
        restarts: Number of random restarts, at least 2. `None` for the number that takes about a
            minute on one core: 512 for few points, 4 for 1000.
        generator: Random state of the restarts; `None` for a fixed one.

    Returns:
        Points (num_points, dim), float64.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from modeling_uhop import spherical_code
        >>> code = spherical_code(4, 3)
        >>> round((code @ code.T)[0, 1].item(), 3)
        -0.333
    """
    if num_points < 1 or dim < 1:
        raise ValueError(f"num_points and dim must be at least 1, got {num_points} and {dim}")
    if restarts is not None and restarts < 2:
        raise ValueError(f"restarts must be at least 2, got {restarts}")
    if num_points <= dim + 1:
        return _simplex(num_points, dim)
    if num_points <= 2 * dim:
        return torch.cat([torch.eye(dim, dtype=torch.float64), -torch.eye(dim, dtype=torch.float64)])[:num_points]
    if dim == 1:
        raise ValueError(f"num_points must be at most 2 for dim=1, because a line has 2 directions, got num_points={num_points}")
    # Because a step of one restart costs num_points squared, more points get fewer restarts.
    affordable = 4_000_000 / num_points**2
    restarts = restarts or int(min(512, max(0.5 * affordable, min(64, affordable), 4)))
    generator = generator or torch.Generator().manual_seed(0)
    points = torch.randn(restarts, num_points, dim, dtype=torch.float64, generator=generator)
    points /= points.norm(dim=-1, keepdim=True)
    rough = torch.arange(restarts) % 2 == 1
    starts = torch.where(rough, 0.03, 0.3).to(torch.float64).view(-1, 1, 1)
    bar = logging.tqdm(total=_COARSE_STEPS + _FINE_STEPS, desc="spherical code", leave=False, delay=3)
    points = _descend(points, starts, 0.01, 0.05, 0.01, _COARSE_STEPS, bar)
    best = closest_similarity(points).argsort()[: int(min(_FINE_RESTARTS, max(0.375 * affordable, 2)))]
    points = _descend(points[best], torch.full((1, 1, 1), 0.01, dtype=torch.float64), 2e-5, 0.01, 1e-5, _FINE_STEPS, bar)
    bar.close()
    return points[closest_similarity(points).argmin()]


def closest_similarity(points: torch.Tensor) -> torch.Tensor:
    """Compute the largest inner product of two different points of each set (..., M, D)."""
    similarity = points @ points.mT
    return similarity.masked_fill(torch.eye(points.shape[-2], dtype=torch.bool, device=points.device), -torch.inf).amax((-1, -2))


def _simplex(num_points: int, dim: int) -> torch.Tensor:
    """Return the corners of a regular simplex: `num_points` unit vectors with equal inner products.

    The inner product is -1 / (num_points - 1).
    """
    corners = torch.eye(num_points, dtype=torch.float64) - 1.0 / num_points
    code = torch.zeros(num_points, dim, dtype=torch.float64)
    if num_points == 1:
        code[0, 0] = 1.0
        return code
    # Because the corners span num_points - 1 dimensions, we use their coordinates in an orthonormal
    # basis of that span.
    basis = torch.linalg.svd(corners).Vh[: num_points - 1]
    code[:, : num_points - 1] = corners @ basis.mT
    return code / code.norm(dim=-1, keepdim=True)


def _descend(
    points: torch.Tensor, first_temperature: torch.Tensor, last_temperature: float, first_lr: float, last_lr: float, steps: int, bar
) -> torch.Tensor:
    """Run Adam along the tangents of the sphere; points are projected back after each step.

    Temperature and learning rate fall geometrically.
    """
    same = torch.eye(points.shape[-2], dtype=torch.bool)
    mean, variance = torch.zeros_like(points), torch.zeros_like(points)
    for step in range(steps):
        progress = step / (steps - 1)
        temperature = first_temperature * (last_temperature / first_temperature) ** progress
        lr = first_lr * (last_lr / first_lr) ** progress
        exponents = (points @ points.mT).masked_fill_(same, -torch.inf) / temperature
        weights = (exponents - exponents.amax((-1, -2), keepdim=True)).exp_()
        gradient = weights @ points / weights.sum((-1, -2), keepdim=True)
        gradient -= (gradient * points).sum(-1, keepdim=True) * points
        mean.lerp_(gradient, 0.1)
        variance.lerp_(gradient.square(), 0.001)
        unbiased = variance / (1.0 - 0.999 ** (step + 1))
        points = points - lr * mean / (1.0 - 0.9 ** (step + 1)) / (unbiased.sqrt() + 1e-12)
        points = points / points.norm(dim=-1, keepdim=True)
        bar.update()
    return points


def are_independent(memories: torch.Tensor) -> bool:
    """Return whether memories (M, d) are linearly independent, up to rounding.

    The tolerance is the rounding of their dtype, or that of fp32 for half precision.
    """
    if len(memories) > memories.shape[1]:
        return False
    tolerance = max(memories.shape) * min(torch.finfo(memories.dtype).eps, torch.finfo(torch.float32).eps)
    return bool(torch.linalg.matrix_rank(memories.double(), rtol=tolerance) == len(memories))


@torch.no_grad()
def separate_optimally(feature_map: FeatureMap, memories: torch.Tensor) -> None:
    r"""Set W so that the features of linearly independent memories are an optimal spherical code.

    W is the matrix of least norm with $W \xi_\mu = z_\mu$, where z is the code.

    Args:
        feature_map: The map to set, in place.
        memories: Patterns (M, d).

    Raises:
        ValueError: If the map is frozen, if the memories are linearly dependent, or if they are so
            small that W leaves the range of its dtype.
    """
    if not feature_map.weight.requires_grad:
        raise ValueError("the feature map is frozen (requires_grad=False); call feature_map.requires_grad_() first")
    patterns = memories.double()
    if not are_independent(memories):
        raise ValueError(
            "the memories must be linearly independent: only then can a linear feature map move them to an optimal spherical code"
        )
    code = spherical_code(len(patterns), feature_map.weight.shape[0]).to(patterns.device)
    weight = (torch.linalg.pinv(patterns) @ code).mT.to(feature_map.weight.dtype)
    if not is_finite(weight):
        raise ValueError(f"W leaves the range of {weight.dtype}, because the memories are too small; scale them up")
    feature_map.weight.copy_(weight)
