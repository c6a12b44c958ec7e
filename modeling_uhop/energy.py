"""Stage II: the kernelized Hopfield energy, and retrieval as its descent. Pure functions over patterns held as rows."""

from collections.abc import Callable

import torch

from .feature_map import unit_norm
from .simplex import at_least_fp32, simplex_conjugate, simplex_map


SIMILARITIES = ("kernel", "dot", "cosine", "l2", "manhattan", "polynomial")


def similarity_scores(
    queries: torch.Tensor,
    memories: torch.Tensor,
    *,
    feature_map: Callable[[torch.Tensor], torch.Tensor] | None = None,
    similarity: str = "kernel",
    degree: int = 10,
) -> torch.Tensor:
    """Scores (..., Q, M) of queries (..., Q, d) against memories (..., M, d), larger where they are more alike.

    - "kernel": `<Phi(x), Phi(xi)>` (U-Hop equation 2.1), the inner product where `feature_map` is `None`. The others compare raw patterns:
    - "dot": `<x, xi>` (Ramsauer et al. 2020).
    - "cosine": `<x, xi>` of patterns scaled to unit norm.
    - "l2", "manhattan": MINUS the distance (Millidge et al. 2022).
    - "polynomial": `degree * log max(<x, xi>, 0)`, so that softmax at beta = 1 gives weights in proportion to the power
      `max(<x, xi>, 0) ** degree` of a dense associative memory (Krotov & Hopfield 2016).

    Raises:
        ValueError: If `similarity` is unknown, or does not use the feature map that is given.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")
    if feature_map is not None:
        if similarity != "kernel":
            raise ValueError(f"similarity {similarity!r} compares raw patterns and must come without a feature map")
        queries, memories = feature_map(queries), feature_map(memories)
    if similarity in ("l2", "manhattan"):
        # Not through inner products, which cancel where patterns are far from the origin.
        exact = "donot_use_mm_for_euclid_dist"
        wide = at_least_fp32(queries), at_least_fp32(memories)
        distances = torch.cdist(*wide, p=2.0 if similarity == "l2" else 1.0, compute_mode=exact)
        return -distances.to(queries.dtype)
    if similarity == "cosine":
        queries, memories = unit_norm(queries), unit_norm(memories)
    scores = queries @ memories.mT
    return degree * scores.clamp(min=0.0).log() if similarity == "polynomial" else scores


def energy(
    queries: torch.Tensor,
    memories: torch.Tensor,
    *,
    beta: float | torch.Tensor,
    alpha: float | torch.Tensor = 1.0,
    feature_map: Callable[[torch.Tensor], torch.Tensor] | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kernelized Hopfield energy `E(x) = 1/2 K(x, x) - Psi*_alpha(beta, K(Xi, x))` (U-Hop, arXiv 2404.03827, equation 2.2).

    `Psi*_alpha(beta, z)` is the conjugate of the Tsallis regulariser, scaled so that its gradient in z is `simplex_map(beta z, alpha)`:
    log-sum-exp of inverse temperature beta at alpha = 1. With a linear feature map the energy never rises along `retrieve`.

    Args:
        queries: States x, (..., Q, d).
        memories: Stored patterns Xi as rows, (..., M, d).
        beta: Inverse temperature, positive; a tensor of one for each query has shape (..., Q, 1).
        alpha: Tsallis exponent in [1, 2].
        feature_map: Phi; `None` for the identity, the un-kernelised models.
        mask: Boolean, broadcastable to (..., Q, M), True where a memory is present.

    Returns:
        Energies (..., Q), in fp32 or better.

    Raises:
        ValueError: If beta is not positive or alpha is outside [1, 2].

    >>> from modeling_uhop import energy, retrieve

    >>> memories = torch.randn(10, 4)
    >>> queries = torch.randn(3, 4)
    >>> before = energy(queries, memories, beta=2.0, alpha=1.5)
    >>> after = energy(retrieve(queries, memories, beta=2.0, alpha=1.5), memories, beta=2.0, alpha=1.5)
    >>> bool((after <= before + 1e-6).all())
    True
    """
    _check_beta(beta)
    features = queries if feature_map is None else feature_map(queries)
    stored = memories if feature_map is None else feature_map(memories)
    features, stored = at_least_fp32(features), at_least_fp32(stored)
    with torch.autocast(features.device.type, enabled=False):
        scores = features @ stored.mT
    conjugate = simplex_conjugate(beta * scores, alpha, mask=mask)
    if isinstance(beta, torch.Tensor) and beta.dim() > 0:
        beta = beta.squeeze(-1)
    return 0.5 * features.square().sum(-1) - conjugate / beta


def association(
    queries: torch.Tensor,
    memories: torch.Tensor,
    *,
    beta: float | torch.Tensor,
    alpha: float | torch.Tensor = 1.0,
    feature_map: Callable[[torch.Tensor], torch.Tensor] | None = None,
    similarity: str = "kernel",
    degree: int = 10,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weights (..., Q, M) of each memory in a retrieval, `p = Sep_alpha(beta K(Xi, x))` (equation 2.4). Arguments as in `retrieve`.

    Raises:
        ValueError: As `retrieve`.
    """
    _check_beta(beta)
    if memories.shape[-2] == 0:
        raise ValueError("there is nothing to retrieve from: memories must hold at least one pattern, got 0")
    scores = similarity_scores(queries, memories, feature_map=feature_map, similarity=similarity, degree=degree)
    # In fp32: half-precision scores, scaled, may overflow.
    return simplex_map(beta * at_least_fp32(scores), alpha, mask=mask).to(scores.dtype)


def retrieve(
    queries: torch.Tensor,
    memories: torch.Tensor,
    *,
    beta: float | torch.Tensor,
    alpha: float | torch.Tensor = 1.0,
    feature_map: Callable[[torch.Tensor], torch.Tensor] | None = None,
    steps: int = 1,
    similarity: str = "kernel",
    degree: int = 10,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Retrieval dynamics `T(x) = sum_mu p_mu xi_mu`, applied `steps` times (U-Hop, arXiv 2404.03827, equation 2.4).

    The result mixes the raw patterns, not their features. alpha = 1 without Phi is the modern Hopfield network (Ramsauer et al. 2020),
    alpha = 2 the sparse one (Hu et al. 2023), in between the generalised sparse one (Wu et al. 2024).

    Args:
        queries: States x, (..., Q, d).
        memories: Stored patterns as rows, (..., M, d), M at least 1.
        beta: Inverse temperature, positive; a tensor of one for each query has shape (..., Q, 1).
        alpha: Tsallis exponent in [1, 2].
        feature_map: Phi; `None` for the identity.
        steps: Number of updates, at least 1.
        similarity, degree: What a query is compared by; see `similarity_scores`.
        mask: Boolean, broadcastable to (..., Q, M), True where a memory is present; a query without any retrieves zeros.

    Returns:
        Retrieved patterns (..., Q, d), of the dtype of `queries`.

    Raises:
        ValueError: If an argument is outside its range, or there are no memories.

    >>> from modeling_uhop import retrieve

    >>> memories = torch.eye(4)
    >>> retrieve(torch.tensor([[0.9, 0.2, 0.0, 0.0]]), memories, beta=8.0, alpha=2.0).tolist()
    [[1.0, 0.0, 0.0, 0.0]]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for _ in range(steps):
        weights = association(
            queries, memories, beta=beta, alpha=alpha, feature_map=feature_map, similarity=similarity, degree=degree, mask=mask
        )
        queries = weights @ memories
    return queries


def _check_beta(beta: float | torch.Tensor) -> None:
    if isinstance(beta, torch.Tensor):
        readable = beta.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not bool((beta > 0).all()):
            raise ValueError(f"beta must be positive, got a tensor with smallest value {beta.min().item()}")
    elif not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
