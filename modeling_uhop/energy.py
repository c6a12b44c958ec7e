"""Energy and retrieval of kernelized Hopfield models (Stage II) as pure functions.

Patterns are the rows of a tensor. Integer patterns are converted to floats.
"""

from collections.abc import Callable

import torch

from .attention_interface import hopfield_attention
from .checks import as_floats
from .feature_map import magnitude, unit_norm
from .precision import at_least_fp32, is_finite, is_readable
from .simplex import simplex_conjugate, simplex_map


# Products and sums of scores below this bound do not overflow fp32.
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
    r"""Compute the similarity scores between queries and memories; a larger score is more similar.

    The kernel of U-Hop (arXiv 2404.03827, equation 2.1) is the inner product of features:

    $$
    K(x, \xi) = \langle \Phi(x), \Phi(\xi) \rangle
    $$

    The choices of `similarity` are listed below. All except "kernel" compare raw patterns.

    - "kernel": $\langle \Phi(x), \Phi(\xi) \rangle$; the inner product if `feature_map` is `None`.
    - "dot": $\langle x, \xi \rangle$ (Ramsauer et al. 2020).
    - "cosine": $\langle x, \xi \rangle$ of patterns scaled to unit norm.
    - "l2" and "manhattan": minus the distance (Millidge et al. 2022).
    - "polynomial": $n \log \max(\langle x, \xi \rangle, 0)$ with n = `degree`. Softmax at beta = 1
        then gives weights proportional to $\max(\langle x, \xi \rangle, 0)^n$, as in a dense
        associative memory (Krotov & Hopfield 2016).

    Args:
        queries: Queries x, (..., Q, d).
        memories: Memories xi as rows, (..., M, d).
        feature_map: Phi; only for "kernel". `None` is the identity.
        similarity: One of the names above.
        degree: Exponent n of "polynomial".

    Returns:
        Scores (..., Q, M) in the dtype of `queries`. On a CPU, scores that overflow this dtype are
            returned in fp32 or fp64.

    Raises:
        ValueError: If `similarity` is unknown, if a feature map is given to a similarity that does
            not use it, or (on a CPU) if the scores of finite patterns overflow even fp64.
        TypeError: If an input is not a tensor.
    """
    queries, memories = as_floats(queries=queries, memories=memories)
    features = _features(feature_map, similarity)
    queries = features(queries)
    scores = _scores(queries, features(memories), similarity, degree)
    in_dtype = scores.to(queries.dtype)
    return scores if is_readable(in_dtype) and not torch.equal(in_dtype.isfinite(), scores.isfinite()) else in_dtype


def _features(feature_map: Callable[[torch.Tensor], torch.Tensor] | None, similarity: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that maps patterns to the space in which the similarity compares them."""
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {SIMILARITIES}, got {similarity!r}")
    if feature_map is not None and similarity != "kernel":
        raise ValueError(
            f"similarity {similarity!r} compares raw patterns and must come without a feature map; use similarity='kernel' with one"
        )
    return feature_map or (lambda patterns: patterns)


def _scores(queries: torch.Tensor, memories: torch.Tensor, similarity: str, degree: int) -> torch.Tensor:
    """Compute `similarity_scores` of features, in fp32 or better."""
    if similarity in ("l2", "manhattan"):
        # Because inner products cancel if patterns are far from the origin, we do not compute the
        # distances from them.
        exact = "donot_use_mm_for_euclid_dist"
        p = 2.0 if similarity == "l2" else 1.0
        return -in_range(lambda x, xi: torch.cdist(x, xi, p=p, compute_mode=exact), "distances", queries, memories)
    if similarity == "polynomial":
        # Because powers of very small or very large patterns leave the range of floats, we use
        # logarithms.
        queries, memories = at_least_fp32(queries), at_least_fp32(memories)
        sizes = magnitude(queries), magnitude(memories)
        products = (queries / sizes[0]) @ (memories / sizes[1]).transpose(-1, -2)
        return degree * (products.clamp(min=0.0).log() + sizes[0].log() + sizes[1].log().transpose(-1, -2))
    if similarity == "cosine":
        queries, memories = unit_norm(at_least_fp32(queries)), unit_norm(at_least_fp32(memories))
    return inner_products(queries, memories)


def inner_products(queries: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
    """Compute the inner products (..., Q, M) of queries (..., Q, D) and memories (..., M, D).

    Overflow is handled as in `in_range`.
    """
    return in_range(lambda x, xi: x @ xi.transpose(-1, -2), "scores", queries, memories)


def in_range(compute: Callable[..., torch.Tensor], what: str, *patterns: torch.Tensor) -> torch.Tensor:
    """Compute `compute(*patterns)` in fp32 or better, and again in fp64 if a value has overflowed.

    The second computation is possible only if Python can read the values; see `is_readable`.

    Args:
        compute: The function of the patterns.
        what: Plural name of the result, for the error message.
        patterns: The arguments of `compute`.

    Raises:
        ValueError: If the result of finite patterns overflows fp64 too.
    """
    result = compute(*map(at_least_fp32, patterns))
    if not is_readable(result) or is_finite(result):
        return result
    if result.dtype != torch.float64:
        result = compute(*(each.double() for each in patterns))
    if all(map(is_finite, patterns)) and not is_finite(result):
        raise ValueError(f"{what} must be finite, but those of these patterns overflow {result.dtype}; scale the patterns down")
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
    r"""Compute the kernelized Hopfield energy of each query.

    This is equation 2.2 of U-Hop (arXiv 2404.03827):

    $$
    E(x) = \frac{1}{2} K(x, x) - \Psi^*_\alpha(\beta, K(\Xi, x)),
    \qquad
    K(u, v) = \langle \Phi(u), \Phi(v) \rangle
    $$

    $\Psi^*_\alpha(\beta, z)$ is the convex conjugate of the Tsallis regulariser, scaled so that its
    gradient in z is `simplex_map(beta * z, alpha)`. At alpha = 1 it is log-sum-exp at inverse
    temperature beta. With a linear feature map, the energy never rises along `retrieve`.

    Args:
        queries: States x, (..., Q, d).
        memories: Stored patterns Xi as rows, (..., M, d).
        beta: Inverse temperature, positive. A tensor with one value per query has shape
            (..., Q, 1).
        alpha: Tsallis exponent in [1, 2].
        feature_map: Phi. `None` is the identity, which gives the models without a kernel.
        mask: Boolean, broadcastable to (..., Q, M), True where a memory is present.

    Returns:
        Energies (..., Q), in fp32 or better. On a CPU, energies that overflow fp32 are returned in
            fp64.

    Raises:
        ValueError: If beta is not positive, if alpha is outside [1, 2], or (on a CPU) if the
            energies of finite patterns overflow even fp64.
        TypeError: If an input is not a tensor.

    Examples:
        >>> from modeling_uhop import energy, retrieve
        >>> memories = torch.randn(10, 4)
        >>> queries = torch.randn(3, 4)
        >>> before = energy(queries, memories, beta=2.0, alpha=1.5)
        >>> retrieved = retrieve(queries, memories, beta=2.0, alpha=1.5)
        >>> after = energy(retrieved, memories, beta=2.0, alpha=1.5)
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
    r"""Compute the association weight of each memory for each query (U-Hop, equation 2.4).

    $$
    p = \mathrm{Sep}_\alpha(\beta K(\Xi, x))
    $$

    Args:
        queries: States x, (..., Q, d).
        memories: Stored patterns Xi as rows, (..., M, d), M at least 1.
        beta: As in `retrieve`.
        alpha: As in `retrieve`.
        feature_map: As in `retrieve`.
        similarity: As in `similarity_scores`.
        degree: As in `similarity_scores`.
        mask: As in `retrieve`.

    Returns:
        Weights (..., Q, M), in the dtype of the features or patterns that are compared.

    Raises:
        ValueError: As in `retrieve`.
        TypeError: If an input is not a tensor.
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
    """Compute `association` of features, in fp32 or better.

    Half precision is not enough: scores may overflow, and many rounded weights may not sum to 1.
    """
    _check_beta(beta)
    if memories.shape[-2] == 0:
        raise ValueError("memories must hold at least one pattern to retrieve from, got 0")
    scores = _scores(queries, memories, similarity, degree)
    # Because the logarithm of a zero power is -inf, we do not check "polynomial" scores for
    # overflow.
    scaled = beta * scores if similarity == "polynomial" else in_range(lambda z: beta * z, "scores", scores)
    return simplex_map(scaled, alpha, mask=mask)


def mixed(weights: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
    r"""Compute the weighted sum $\sum_\mu p_\mu \xi_\mu$ of memories, (..., Q, d), in their dtype.

    The weights have shape (..., Q, M), the memories (..., M, d). The sum is computed in the dtype
    of the weights.
    """
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
    r"""Retrieve patterns by the update rule of a kernelized Hopfield model, applied `steps` times.

    One update step (U-Hop, arXiv 2404.03827, equation 2.4) is

    $$
    T(x) = \sum_\mu p_\mu \xi_\mu, \qquad p = \mathrm{Sep}_\alpha(\beta K(\Xi, x))
    $$

    The result is a mixture of the raw patterns, not of their features. Without Phi, alpha = 1 is
    the modern Hopfield network (Ramsauer et al. 2020), alpha = 2 is the sparse one
    (Hu et al. 2023), and values between them are the generalised sparse one (Wu et al. 2024).

    Args:
        queries: States x, (..., Q, d).
        memories: Stored patterns Xi as rows, (..., M, d), M at least 1.
        beta: Inverse temperature, positive. A tensor with one value per query has shape
            (..., Q, 1).
        alpha: Tsallis exponent in [1, 2].
        feature_map: Phi. `None` is the identity.
        steps: Number of update steps, at least 1.
        similarity: The similarity between queries and memories; see `similarity_scores`.
        degree: Exponent of the "polynomial" similarity.
        mask: Boolean, broadcastable to (..., Q, M), True where a memory is present. A query without
            any memory retrieves zeros.

    Returns:
        Retrieved patterns (..., Q, d), in the dtype of `queries`.

    Raises:
        ValueError: If an argument is outside its range, if there are no memories, or (on a CPU) if
            scores overflow even fp64.
        TypeError: If an input is not a tensor.

    Examples:
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
        retrieved = _retrieve_by_attention(states, stored, memories, beta, alpha, similarity, mask)
        if retrieved is None:
            retrieved = mixed(association_of(states, stored, beta, alpha, similarity, degree, mask), memories)
        queries = retrieved.to(queries.dtype)
    return queries


def _retrieve_by_attention(
    queries: torch.Tensor,
    stored: torch.Tensor,
    memories: torch.Tensor,
    beta: float | torch.Tensor,
    alpha: float | torch.Tensor,
    similarity: str,
    mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Take one step of `retrieve` by `hopfield_attention`, which does not keep the weights.

    Returns `None` if attention cannot compute this step. It supports neither similarities other
    than inner products, nor several memory sets, masks, a tensor alpha, unreadable values, nor
    scores that may overflow. It is also not used if a gradient is needed, because its gradient
    cannot be differentiated again.
    """
    _check_beta(beta)
    given = [x for x in (queries, stored, memories, beta, alpha) if isinstance(x, torch.Tensor)]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    whole_set = stored.dim() == memories.dim() == 2 and mask is None
    simple = similarity in ("kernel", "dot", "cosine") and not isinstance(alpha, torch.Tensor)
    if needs_grad or not whole_set or not simple or not all(map(is_readable, given)) or min(*queries.shape, *stored.shape) == 0:
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
