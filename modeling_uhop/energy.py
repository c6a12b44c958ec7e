"""Stage II: the kernelized Hopfield energy, and retrieval as its descent. Pure functions over patterns held as rows, integers as floats."""

from collections.abc import Callable

import torch

from .attention_interface import hopfield_attention
from .feature_map import magnitude, unit_norm
from .simplex import at_least_fp32, simplex_conjugate, simplex_map
from .validation import as_floats, is_finite, is_readable


# Products and sums of scores below this do not overflow fp32.
_SAFE_SCORE = 1e30
SIMILARITIES = ("kernel", "dot", "cosine", "l2", "manhattan", "polynomial")


def similarity_scores(
    queries: torch.Tensor,
    memories: torch.Tensor,
    *,
    feature_map: Callable[[torch.Tensor], torch.Tensor] | None = None,
    similarity: str = "kernel",
    degree: int = 10,
) -> torch.Tensor:
    """Scores (..., Q, M) of queries (..., Q, d) against memories (..., M, d), larger where they are more similar.

    - "kernel": `<Phi(x), Phi(xi)>` (U-Hop equation 2.1), the inner product where `feature_map` is `None`. The others compare raw patterns:
    - "dot": `<x, xi>` (Ramsauer et al. 2020).
    - "cosine": `<x, xi>` of patterns scaled to unit norm.
    - "l2", "manhattan": MINUS the distance (Millidge et al. 2022).
    - "polynomial": `degree * log max(<x, xi>, 0)`, so that softmax at beta = 1 gives weights in proportion to the power
      `max(<x, xi>, 0) ** degree` of a dense associative memory (Krotov & Hopfield 2016).

    Returns:
        In the dtype of `queries`; on a CPU in fp32 or fp64 where scores overflow that.

    Raises:
        ValueError: If `similarity` is unknown, or does not use the feature map that is given, and (on a CPU) for scores of finite
            patterns that overflow even fp64.
        TypeError: For what is no tensor.
    """
    queries, memories = as_floats(queries=queries, memories=memories)
    features = _features(feature_map, similarity)
    queries = features(queries)
    scores = _scores(queries, features(memories), similarity, degree)
    narrow = scores.to(queries.dtype)
    return scores if is_readable(narrow) and not torch.equal(narrow.isfinite(), scores.isfinite()) else narrow


def _features(feature_map: Callable[[torch.Tensor], torch.Tensor] | None, similarity: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What takes patterns to where a similarity compares them."""
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")
    if feature_map is not None and similarity != "kernel":
        raise ValueError(f"similarity {similarity!r} compares raw patterns and must come without a feature map")
    return feature_map or (lambda patterns: patterns)


def _scores(queries: torch.Tensor, memories: torch.Tensor, similarity: str, degree: int) -> torch.Tensor:
    """`similarity_scores` of features, in fp32 or better."""
    if similarity in ("l2", "manhattan"):
        # Not through inner products, which cancel where patterns are far from the origin.
        exact = "donot_use_mm_for_euclid_dist"
        p = 2.0 if similarity == "l2" else 1.0
        return -in_range(lambda x, xi: torch.cdist(x, xi, p=p, compute_mode=exact), "distances", queries, memories)
    if similarity == "polynomial":
        # Taken in logarithms, powers of small and of large patterns alike are finite.
        queries, memories = at_least_fp32(queries), at_least_fp32(memories)
        sizes = magnitude(queries), magnitude(memories)
        products = (queries / sizes[0]) @ (memories / sizes[1]).transpose(-1, -2)
        return degree * (products.clamp(min=0.0).log() + sizes[0].log() + sizes[1].log().transpose(-1, -2))
    if similarity == "cosine":
        queries, memories = unit_norm(at_least_fp32(queries)), unit_norm(at_least_fp32(memories))
    return inner_products(queries, memories)


def inner_products(queries: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
    """`<x, xi>` (..., Q, M) of queries (..., Q, D) and memories (..., M, D); see `in_range`."""
    return in_range(lambda x, xi: x @ xi.transpose(-1, -2), "scores", queries, memories)


def in_range(compute: Callable[..., torch.Tensor], what: str, *patterns: torch.Tensor) -> torch.Tensor:
    """`compute(*patterns)` in fp32 or better, and again in fp64 where values can be read and one has overflowed.

    Raises:
        ValueError: If the result of finite patterns overflows fp64 too.
    """
    result = compute(*map(at_least_fp32, patterns))
    if not is_readable(result) or is_finite(result):
        return result
    if result.dtype != torch.float64:
        result = compute(*(each.double() for each in patterns))
    if all(map(is_finite, patterns)) and not is_finite(result):
        raise ValueError(f"{what} must be finite, but these patterns are so large that theirs overflow {result.dtype}; scale them down")
    return result


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
        Energies (..., Q), in fp32 or better; on a CPU in fp64 where they overflow fp32.

    Raises:
        ValueError: If beta is not positive or alpha is outside [1, 2], and (on a CPU) for energies of finite patterns that overflow even
            fp64.
        TypeError: For what is no tensor.

    >>> from modeling_uhop import energy, retrieve

    >>> memories = torch.randn(10, 4)
    >>> queries = torch.randn(3, 4)
    >>> before = energy(queries, memories, beta=2.0, alpha=1.5)
    >>> after = energy(retrieve(queries, memories, beta=2.0, alpha=1.5), memories, beta=2.0, alpha=1.5)
    >>> bool((after <= before + 1e-6).all())
    True
    """
    queries, memories = as_floats(queries=queries, memories=memories)
    _check_beta(beta)
    features = queries if feature_map is None else feature_map(queries)
    stored = memories if feature_map is None else feature_map(memories)

    def energies(features: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        conjugate = simplex_conjugate(beta * (features @ stored.transpose(-1, -2)), alpha, mask=mask)
        each = beta.squeeze(-1) if isinstance(beta, torch.Tensor) and beta.dim() > 0 else beta
        return 0.5 * features.square().sum(-1) - conjugate / each

    with torch.autocast(features.device.type, enabled=False):
        return in_range(energies, "energies", features, stored)


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
    """Weights (..., Q, M) of each memory in a retrieval, `p = Sep_alpha(beta K(Xi, x))` (equation 2.4), of the dtype of what is compared.

    Arguments and errors as in `retrieve`.
    """
    queries, memories = as_floats(queries=queries, memories=memories)
    features = _features(feature_map, similarity)
    queries, memories = features(queries), features(memories)
    return association_of(queries, memories, beta, alpha, similarity, degree, mask).to(queries.dtype)


def association_of(
    queries: torch.Tensor,
    memories: torch.Tensor,
    beta: float | torch.Tensor,
    alpha: float | torch.Tensor,
    similarity: str = "kernel",
    degree: int = 10,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`association` of features, in fp32 or better: half-precision scores may overflow, and many weights round to less than their sum."""
    _check_beta(beta)
    if memories.shape[-2] == 0:
        raise ValueError("there is nothing to retrieve from: memories must hold at least one pattern, got 0")
    scores = _scores(queries, memories, similarity, degree)
    # Powers of nothing have the score -inf.
    scaled = beta * scores if similarity == "polynomial" else in_range(lambda z: beta * z, "scores", scores)
    return simplex_map(scaled, alpha, mask=mask)


def mixed(weights: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
    """`sum_mu p_mu xi_mu` (..., Q, d) of weights (..., Q, M) and memories (..., M, d), in their dtype; added up in that of the weights."""
    return (weights @ memories.to(weights.dtype)).to(memories.dtype)


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
        ValueError: If an argument is outside its range, or there are no memories, and (on a CPU) where scores overflow even fp64.
        TypeError: For what is no tensor.

    >>> from modeling_uhop import retrieve

    >>> memories = torch.eye(4)
    >>> retrieve(torch.tensor([[0.9, 0.2, 0.0, 0.0]]), memories, beta=8.0, alpha=2.0).tolist()
    [[1.0, 0.0, 0.0, 0.0]]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    queries, memories = as_floats(queries=queries, memories=memories)
    features = _features(feature_map, similarity)
    stored = features(memories)
    for _ in range(steps):
        states = features(queries)
        retrieved = _attended(states, stored, memories, beta, alpha, similarity, mask)
        if retrieved is None:
            retrieved = mixed(association_of(states, stored, beta, alpha, similarity, degree, mask), memories)
        queries = retrieved.to(queries.dtype)
    return queries


def _attended(
    queries: torch.Tensor,
    stored: torch.Tensor,
    memories: torch.Tensor,
    beta: float | torch.Tensor,
    alpha: float | torch.Tensor,
    similarity: str,
    mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """A step of `retrieve` from one set of memories by `hopfield_attention`, which keeps no weights; `None` where that does not fit.

    It does not for other similarities than inner products, several sets, masks, values that are not read, scores that may overflow, and
    where a gradient is asked for, as its own could not be differentiated again.
    """
    _check_beta(beta)
    given = [x for x in (queries, stored, memories, beta, alpha) if isinstance(x, torch.Tensor)]
    asked = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    simple = similarity in ("kernel", "dot", "cosine") and stored.dim() == memories.dim() == 2 and mask is None
    if (
        asked
        or not simple
        or isinstance(alpha, torch.Tensor)
        or not all(map(is_readable, given))
        or min(*queries.shape, *stored.shape) == 0
    ):
        return None
    queries, stored = at_least_fp32(queries), at_least_fp32(stored)
    if similarity == "cosine":
        queries, stored = unit_norm(queries), unit_norm(stored)
    queries = queries * beta
    if not queries.abs().max().item() * stored.abs().max().item() * stored.shape[-1] < _SAFE_SCORE:
        return None
    rows, keys, values = queries.reshape(1, 1, -1, queries.shape[-1]), stored[None, None], at_least_fp32(memories)[None, None]
    output = hopfield_attention(rows, keys, values, alpha=alpha, scaling=1.0)
    return output.view(*queries.shape[:-1], -1).to(memories.dtype)


def _check_beta(beta: float | torch.Tensor) -> None:
    if isinstance(beta, torch.Tensor):
        if is_readable(beta) and not bool((beta > 0).all()):
            raise ValueError(f"beta must be positive, got a tensor with smallest value {beta.min().item()}")
    elif not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
