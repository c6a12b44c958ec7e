"""Further losses of the separation step: of memories alone, of two views of each, and of classes."""

import torch

from .checks import as_floats, check_tensor
from .feature_map import unit_norm
from .precision import at_least_fp32


# SIGReg: number of directions, and the points at which characteristic functions are compared.
DIRECTIONS, LARGEST, POINTS = 256, 5.0, 17


def koleo_loss(features: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    r"""Measure how close each memory is to its nearest neighbour (KoLeo).

    With features of unit norm,

    $$
    -\mathrm{mean}_\mu \; \tfrac12 \log \big( \min_{\nu \ne \mu} |\Phi_\mu - \Phi_\nu|^2 + 10^{-8} \big)
    $$

    It is an estimate of minus the differential entropy (Sablayrolles et al., arXiv 1806.03198,
    equation 4).

    Args:
        features: Features (..., M, D) of any norm. Leading axes hold independent sets.
        mask: Boolean (..., M), True where a memory is present; `None` if all are.

    Returns:
        The mean over the memories that have a neighbour, a scalar in fp32 or better; 0 without any.

    Raises:
        TypeError: If an input is not a tensor.
    """
    features, mask = _prepared(features, mask)
    normed = unit_norm(features)
    with torch.no_grad():
        similarity = normed @ normed.mT
        absent = ~mask.unsqueeze(-2) | torch.eye(features.shape[-2], dtype=torch.bool, device=features.device)
        nearest = similarity.masked_fill(absent, -torch.inf).argmax(-1) if features.shape[-2] else mask.long()
    neighbours = normed.gather(-2, nearest.unsqueeze(-1).expand_as(normed))
    losses = -0.5 * ((normed - neighbours).square().sum(-1) + 1e-8).log()
    return _mean(losses, mask & (mask.sum(-1, keepdim=True) > 1))


def vicreg_loss(
    features: torch.Tensor,
    copies: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> torch.Tensor:
    r"""Measure the distance of two views, the spread of each feature, and the correlation of features (VICReg).

    $$
    \lambda \, \mathrm{mean}_\mu |Z_\mu - Z'_\mu|^2
    + \mu \, [v(Z) + v(Z')] + \nu \, [c(Z) + c(Z')]
    $$

    with $v(Z) = \mathrm{mean}_j \max(0, 1 - \sqrt{\mathrm{Var}(z_j) + 10^{-4}})$ and
    $c(Z) = \frac1D \sum_{i \ne j} \mathrm{Cov}(Z)_{ij}^2$ (Bardes et al., arXiv 2105.04906, equations
    1 to 6). Features are not scaled to unit norm.

    Args:
        features, copies: Features (..., M, D) of two views of the memories, in the same order.
        mask: Boolean (..., M), True where a memory is present in both views; `None` if all are.
        invariance, variance, covariance: The weights lambda, mu and nu.

    Returns:
        The mean over the sets with two memories at least, a scalar in fp32 or better; 0 without
            any.

    Raises:
        TypeError: If an input is not a tensor.
    """
    features, mask = _prepared(features, mask)
    copies, _ = _prepared(copies, mask)
    counts = mask.sum(-1)
    losses = invariance * (features - copies).square().sum((-1, -2)) / counts.clamp(min=1)
    size = features.shape[-1]
    for view in (features, copies):
        centred = (view - view.sum(-2, keepdim=True) / counts.clamp(min=1)[..., None, None]) * mask.unsqueeze(-1)
        with torch.autocast(view.device.type, enabled=False):
            matrix = centred.mT @ centred / (counts - 1).clamp(min=1)[..., None, None]
        variances = matrix.diagonal(dim1=-2, dim2=-1)
        losses = losses + variance * (1.0 - (variances + 1e-4).sqrt()).relu().mean(-1)
        losses = losses + covariance * (matrix.square().sum((-1, -2)) - variances.square().sum(-1)) / size
    return _mean(losses, counts > 1)


def sigreg_loss(
    features: torch.Tensor, copies: torch.Tensor | None = None, *, mask: torch.Tensor | None = None, weight: float = 0.05, seed: int = 0
) -> torch.Tensor:
    r"""Measure how far features are from a standard normal distribution, and two views from each other (LeJEPA).

    $$
    (1 - \lambda) \, \mathrm{mean} \, (Z - \bar Z)^2 + \lambda \, \mathrm{mean}_a \; M \int
    \big| \tfrac1M \sum_\mu e^{i t \langle a, Z_\mu \rangle} - e^{-t^2/2} \big|^2 e^{-t^2/2} \, dt
    $$

    The first term is the squared distance of each view from the mean of both. The second one,
    SIGReg, is averaged over views and 256 random directions a of unit norm. The integral over
    [-5, 5] is a trapezoidal sum of 17 points (Balestriero and LeCun, arXiv 2511.08544, algorithm 1).
    Features are not scaled to unit norm.

    Args:
        features, copies: Features (..., M, D) of two views of the memories, in the same order;
            without copies there is no first term.
        mask: Boolean (..., M), True where a memory is present in both views; `None` if all are.
        weight: The weight lambda in [0, 1].
        seed: Seed of the directions. The global random state is not used.

    Returns:
        The mean over the sets with a memory, a scalar in fp32 or better; 0 without any.

    Raises:
        TypeError: If an input is not a tensor.
    """
    features, mask = _prepared(features, mask)
    views = [features] if copies is None else [features, _prepared(copies, mask)[0]]
    size, counts = features.shape[-1], mask.sum(-1)
    directions = torch.randn(size, DIRECTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(features)
    points = torch.linspace(-LARGEST, LARGEST, POINTS, device=features.device, dtype=features.dtype)
    normal = torch.exp(-points.square() / 2)
    losses = features.new_zeros(mask.shape[:-1])
    for view in views:
        with torch.autocast(view.device.type, enabled=False):
            angles = (view @ directions).unsqueeze(-1) * points
        present = mask[..., None, None].to(view.dtype) / counts.clamp(min=1)[..., None, None, None]
        real, imaginary = ((part * present).sum(-3) for part in (angles.cos(), angles.sin()))
        gaps = ((real - normal).square() + imaginary.square()) * normal
        losses = losses + weight * counts * torch.trapezoid(gaps, points, dim=-1).mean(-1) / len(views)
    if copies is not None:
        distances = (views[0] - views[1]).square().sum((-1, -2)) / (4 * size * counts.clamp(min=1))
        losses = losses + (1.0 - weight) * distances
    return _mean(losses, counts > 0)


def supervised_loss(
    features: torch.Tensor,
    labels: torch.Tensor,
    copies: torch.Tensor | None = None,
    *,
    temperature: float = 0.1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Measure how badly the memories of a class recognise each other (supervised contrastive loss).

    With features of unit norm, $K_{\mu\nu} = \langle \Phi_\mu, \Phi_\nu \rangle$ and the other
    memories $P_\mu$ of the class of $\mu$,

    $$
    \mathrm{mean}_\mu \; -\frac{1}{|P_\mu|} \sum_{\nu \in P_\mu}
    \log \frac{\exp(K_{\mu\nu} / \tau)}{\sum_{\kappa \ne \mu} \exp(K_{\mu\kappa} / \tau)}
    $$

    (Khosla et al., arXiv 2004.11362, equation 2). The copies are further memories of the set.

    Args:
        features: Features (..., M, D) of any norm. Leading axes hold independent sets.
        labels: Classes (..., M), integers. A memory of class -100 counts as absent.
        copies: Features (..., M, D) of a second view, or `None`.
        temperature: The temperature tau, positive.
        mask: Boolean (..., M), True where a memory is present; `None` if all are.

    Returns:
        The mean over the memories that have another one of their class, a scalar in fp32 or better;
            0 without any.

    Raises:
        ValueError: If the temperature is not positive.
        TypeError: If an input is not a tensor.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    features, mask = _prepared(features, mask)
    labels = labels.expand(mask.shape)
    mask = mask & (labels != -100)
    if copies is not None:
        features = torch.cat([features, _prepared(copies, mask)[0]], -2)
        labels, mask = torch.cat([labels, labels], -1), torch.cat([mask, mask], -1)
    normed = unit_norm(features)
    with torch.autocast(features.device.type, enabled=False):
        scores = normed @ normed.mT / temperature
    others = mask.unsqueeze(-2) & mask.unsqueeze(-1) & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    alike = others & (labels.unsqueeze(-2) == labels.unsqueeze(-1))
    log_weights = scores.masked_fill(~others, torch.finfo(scores.dtype).min).log_softmax(-1)
    counts = alike.sum(-1)
    losses = -(log_weights * alike).sum(-1) / counts.clamp(min=1)
    return _mean(losses, counts > 0)


def _prepared(features: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Features in fp32 or better, 0 where absent, and a mask for every one of them."""
    (features,) = as_floats(features=features)
    check_tensor(mask, "mask")
    features = at_least_fp32(features)
    if mask is None:
        return features, torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device)
    mask = mask.expand(features.shape[:-1])
    return features.masked_fill(~mask.unsqueeze(-1), 0.0), mask


def _mean(losses: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The mean of the losses that count; 0 without any."""
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
