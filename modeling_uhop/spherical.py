"""Optimal spherical codes: the points of a sphere whose closest pair is as far apart as it can be (the Tammes problem).

They are what U-Hop+ (arXiv 2410.23126) drives features towards: as the temperature tends to 0, the minimiser of its separation loss solves
`max min_{mu != nu} (1 - <Phi_mu, Phi_nu>)`.
"""

import torch
from transformers.utils import logging

from .feature_map import FeatureMap
from .validation import is_finite


_KEPT = 24
_COARSE_STEPS, _FINE_STEPS = 500, 1500


def spherical_code(num_points: int, dim: int, *, restarts: int | None = None, generator: torch.Generator | None = None) -> torch.Tensor:
    """Points (num_points, dim) on the unit sphere, float64, with the largest smallest angle that is found.

    Up to 2 dim points the optimum is known (Rankin 1955) and returned: a regular simplex for at most dim + 1 points, else part of a
    cross-polytope. Beyond, projected gradient descent on `tau log sum_{mu != nu} exp(<z_mu, z_nu> / tau)`, all restarts in one tensor: a
    coarse phase from two starting temperatures, 0.3 (smooth, finds symmetric codes) and 0.03 (rough, reaches many basins), then a fine one
    down to 2e-5 for the best few.

    Args:
        num_points: M, at least 1.
        dim: D, at least 1.
        restarts: Random starts, at least 2; `None` for as many as a minute or so on one core allows, 512 for few points and 4 for 1000.
        generator: Random state of the starts; `None` for a fixed one.

    Raises:
        ValueError: If an argument is out of range.

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
        raise ValueError(f"on a line at most 2 directions differ, got num_points={num_points}")
    # A step on one start costs num_points squared.
    affordable = 4_000_000 / num_points**2
    restarts = restarts or int(min(512, max(0.5 * affordable, min(64, affordable), 4)))
    generator = generator or torch.Generator().manual_seed(0)
    points = torch.randn(restarts, num_points, dim, dtype=torch.float64, generator=generator)
    points /= points.norm(dim=-1, keepdim=True)
    rough = torch.arange(restarts) % 2 == 1
    starts = torch.where(rough, 0.03, 0.3).to(torch.float64).view(-1, 1, 1)
    bar = logging.tqdm(total=_COARSE_STEPS + _FINE_STEPS, desc="spherical code", leave=False, delay=3)
    points = _descend(points, starts, 0.01, 0.05, 0.01, _COARSE_STEPS, bar)
    best = closest_similarity(points).argsort()[: int(min(_KEPT, max(0.375 * affordable, 2)))]
    points = _descend(points[best], torch.full((1, 1, 1), 0.01, dtype=torch.float64), 2e-5, 0.01, 1e-5, _FINE_STEPS, bar)
    bar.close()
    return points[closest_similarity(points).argmin()]


def closest_similarity(points: torch.Tensor) -> torch.Tensor:
    """The largest `<z_mu, z_nu>` over two different points of each set (..., M, D)."""
    similarity = points @ points.mT
    return similarity.masked_fill(torch.eye(points.shape[-2], dtype=torch.bool, device=points.device), -torch.inf).amax((-1, -2))


def _simplex(num_points: int, dim: int) -> torch.Tensor:
    """Corners of a regular simplex: `num_points` unit vectors of equal inner product -1 / (num_points - 1)."""
    corners = torch.eye(num_points, dtype=torch.float64) - 1.0 / num_points
    code = torch.zeros(num_points, dim, dtype=torch.float64)
    if num_points == 1:
        code[0, 0] = 1.0
        return code
    # The corners span num_points - 1 dimensions: their coordinates along an orthonormal basis of that span.
    basis = torch.linalg.svd(corners).Vh[: num_points - 1]
    code[:, : num_points - 1] = corners @ basis.mT
    return code / code.norm(dim=-1, keepdim=True)


def _descend(
    points: torch.Tensor, first_temperature: torch.Tensor, last_temperature: float, first_lr: float, last_lr: float, steps: int, bar
) -> torch.Tensor:
    """Adam along the sphere's tangents, temperature and rate falling geometrically; points are projected back after each step."""
    same = torch.eye(points.shape[-2], dtype=torch.bool)
    mean, variance = torch.zeros_like(points), torch.zeros_like(points)
    for step in range(steps):
        along = step / (steps - 1)
        temperature = first_temperature * (last_temperature / first_temperature) ** along
        lr = first_lr * (last_lr / first_lr) ** along
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
    """Whether memories (M, d) are linearly independent beyond the rounding of their own dtype, or of fp32 where that is coarser."""
    if len(memories) > memories.shape[1]:
        return False
    tolerance = max(memories.shape) * min(torch.finfo(memories.dtype).eps, torch.finfo(torch.float32).eps)
    return bool(torch.linalg.matrix_rank(memories.double(), rtol=tolerance) == len(memories))


@torch.no_grad()
def separate_optimally(feature_map: FeatureMap, memories: torch.Tensor) -> None:
    """Set W so that the features of linearly independent memories (M, d) are an optimal spherical code: `W xi_mu = z_mu`.

    Among the maps that do so, the one of least norm. Raises a `ValueError` for memories that are linearly dependent, or so small that W
    leaves the range of its dtype.
    """
    if not feature_map.weight.requires_grad:
        raise ValueError("the feature map must be able to move, but it is frozen (requires_grad=False)")
    patterns = memories.double()
    if not are_independent(memories):
        raise ValueError("a linear feature map reaches every arrangement of memories only if they are linearly independent")
    code = spherical_code(len(patterns), feature_map.weight.shape[0]).to(patterns.device)
    weight = (torch.linalg.pinv(patterns) @ code).mT.to(feature_map.weight.dtype)
    if not is_finite(weight):
        raise ValueError(f"the map of an optimal code leaves the range of {weight.dtype} for patterns so small; scale them up")
    feature_map.weight.copy_(weight)
