"""Exact retrieval from many memories through a few candidates.

At alpha > 1 most memories get no weight. Therefore a few candidates are enough, and a check shows
that they are.
"""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
import torch

from .energy import in_range, inner_products
from .precision import at_least_fp32, is_finite, is_readable
from .simplex import simplex_map


try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

# Number of scores formed at once: 64 MB of fp32.
_SCORES = 2**24

# A function of (queries, k) that returns scores and indices (Q, k) of the k most similar memories
# in feature space, best first. The score is -inf where no memory was found.
Candidates = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

# Number of vector entries that are read from an index at once.
_ENTRIES_AT_ONCE = 2**22
# Allowed distance between a stored vector and its feature beyond the index's own rounding, relative
# to the norm of the feature.
_TOLERANCE = 1e-4
# For each verified index, the features that it holds and their version.
_VERIFIED: WeakKeyDictionary[Any, tuple[ReferenceType[torch.Tensor], int]] = WeakKeyDictionary()


def brute_force(features: torch.Tensor) -> Candidates:
    """Find candidates among memories with features (M, D) by all inner products."""
    wide = at_least_fp32(features)

    def candidates(queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        queries = at_least_fp32(queries)
        scores, indices = largest(queries @ wide.transpose(-1, -2), count)
        if is_readable(scores) and not is_finite(scores):
            return largest(inner_products(queries.double(), wide.double()), count)
        return scores, indices

    return candidates


def largest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest scores of each row (Q, M), best first, and their indices.

    This is `torch.topk`, faster if few of many scores are wanted. A row is cut into groups. The
    `count` groups with the largest maxima contain the `count` largest scores, because each of these
    scores is in a group whose maximum is at least as large, and there are at most `count` such
    groups.
    """
    size = math.isqrt(scores.shape[1] // max(1, count))
    groups = scores.shape[1] // max(1, size)
    if size < 4 or groups <= count:
        return scores.topk(count, dim=-1)
    best = scores[:, : size * groups].unflatten(1, (size, groups)).amax(1).topk(count, dim=-1, sorted=False).indices
    members = torch.arange(0, size * groups, groups, device=scores.device)
    rest = torch.arange(size * groups, scores.shape[1], device=scores.device)
    indices = torch.cat([(best.unsqueeze(-1) + members).flatten(1), rest.expand(len(scores), -1)], dim=1)
    values, places = scores.gather(1, indices).topk(count, dim=-1)
    return values, indices.gather(1, places)


class FaissIndex:
    """Candidates from an index of the faiss library; see `faiss_index`."""

    def __init__(self, index: Any):
        self.index = index

    def check(self, memory_count: int, feature_dim: int) -> None:
        """Check that the index holds this many features of this width, ranked by inner products.

        Raises:
            ValueError: If it does not.
        """
        name = type(self.index).__name__
        if faiss is not None and getattr(self.index, "metric_type", faiss.METRIC_INNER_PRODUCT) != faiss.METRIC_INNER_PRODUCT:
            raise ValueError(
                f"a faiss index must rank by inner products, but {name} has metric_type={self.index.metric_type}; "
                "make it with faiss.METRIC_INNER_PRODUCT, such as IndexFlatIP"
            )
        width = getattr(self.index, "d", feature_dim)
        if width != feature_dim:
            raise ValueError(f"a faiss index must hold the features of the memories, of width {feature_dim}, got {name} of width {width}")
        if not getattr(self.index, "is_trained", True):
            raise ValueError(f"a faiss index must be trained before a search: call train(features) and add(features) of this {name}")
        held = getattr(self.index, "ntotal", memory_count)
        if held != memory_count:
            raise ValueError(
                f"a faiss index must hold the features of all memories, but {name} holds {held} and the memory {memory_count}; "
                "add memory.stored_features() to a new one after memories have changed, or let the memory keep its own: memory.index(...)"
            )

    def check_features(self, features: torch.Tensor) -> None:
        """Check that the index holds these features (M, D); see `faiss_index`.

        Raises:
            ValueError: If it holds other vectors or does not give its vectors back.
        """
        if is_in_step(self.index, features):
            return
        name = type(self.index).__name__
        try:
            wrong = first_difference(self.index, features.detach().float().cpu().contiguous().numpy())
        except (NotImplementedError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"a faiss index must give back the vectors that it holds, to be compared with the features, but {name} does "
                f"not ({_faiss_message(error)}); let the memory keep its own index, which it always updates: memory.index(...)"
            ) from error
        if wrong is not None:
            raise ValueError(
                f"a faiss index must hold the features of the memories in their order, but what {name} holds for memory {wrong} is another "
                "vector; memories or Phi have changed since it was made, or its ids are others: add memory.stored_features() to a new one, "
                "or let the memory keep its own: memory.index(...)"
            )
        mark_in_step(self.index, features)

    def __call__(self, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores, indices = self.index.search(queries.float().cpu().contiguous().numpy(), count)
        found = torch.from_numpy(indices).to(queries.device)
        # Because faiss returns index -1 where it found nothing, we set the score to -inf there.
        return torch.from_numpy(scores).to(queries.device).masked_fill_(found < 0, -torch.inf), found.clamp_(min=0)


def faiss_index(index: Any) -> Candidates:
    """Make candidates from an inner-product index of the faiss library.

    The index must hold `memory.stored_features()`, in their order. Retrieval is exact if the index
    is exact (`IndexFlatIP`). An index that misses memories retrieves from those that it finds.

    Before every search, the metric, the width and the number of vectors of the index are checked.
    Before the first search, and again when memories or Phi have changed, every stored vector is
    compared with the feature of its memory: it must be as close to the feature as the index's own
    code of the feature is. A later change of the index that keeps the number of its vectors is not
    detected. An index that does not give its vectors back (`IndexShards`) cannot be used. A failed
    check raises a `ValueError`. `UHopMemoryModel.index` keeps an index that always passes.

    Args:
        index: An index of faiss.

    Raises:
        TypeError: If `index` is not an index of faiss.
    """
    if not callable(getattr(index, "search", None)):
        raise TypeError(f"faiss_index needs an index of the faiss library, such as faiss.IndexFlatIP, got {type(index).__name__}")
    return FaissIndex(index)


def as_candidates(given: Any) -> Candidates:
    """Convert an index of faiss to candidates; return a candidate function unchanged.

    Raises:
        TypeError: If the input is neither.
    """
    if callable(given):
        return given
    if not callable(getattr(given, "search", None)):
        raise TypeError(
            f"candidates must be a function (queries, count) -> (scores, indices) or an index of faiss, got {type(given).__name__}"
        )
    return faiss_index(given)


def mark_in_step(index: Any, features: torch.Tensor) -> None:
    """Record that an index of faiss holds these features in their current version.

    Tensors of inference mode have no version, and are not recorded.
    """
    if not features.is_inference():
        _VERIFIED[index] = ref(features), features._version


def is_in_step(index: Any, features: torch.Tensor) -> bool:
    """Return whether an index is recorded to hold these features in their current version."""
    held = _VERIFIED.get(index)
    return held is not None and not features.is_inference() and held[0]() is features and held[1] == features._version


def first_difference(index: Any, features: np.ndarray) -> int | None:
    """Return the first of the features (M, D) for which an index of faiss holds another vector.

    Differences within the index's own rounding are ignored. The result is `None` if there is no
    other difference.

    Raises:
        NotImplementedError: If the index does not give its vectors back.
        AttributeError: If the index does not give its vectors back.
        RuntimeError: If the index does not give its vectors back.
    """
    if faiss is not None and isinstance(index, faiss.Index):
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexIDMap):
            ids = faiss.vector_to_array(index.id_map)
            not_once = np.flatnonzero(np.bincount(ids[(ids >= 0) & (ids < len(features))], minlength=len(features)) != 1)
            if len(not_once) > 0:
                return int(not_once[0])
            place = first_difference(index.index, features[ids])
            return None if place is None else int(ids[place])
        if isinstance(index, faiss.IndexPreTransform):
            chain: Any = index.chain
            for step in range(chain.size()):
                features = faiss.downcast_VectorTransform(chain.at(step)).apply(features)
            return first_difference(index.index, features)
        if isinstance(index, faiss.IndexRefine):
            return first_difference(index.refine_index, features)
        if isinstance(index, faiss.IndexHNSW):
            return first_difference(index.storage, features)
    if faiss is None or not isinstance(index, faiss.IndexIVF):
        # Because `reconstruct_n` ends the process if the index has no `reconstruct`, we call
        # `reconstruct` first.
        index.reconstruct(0)
    size = max(1, _ENTRIES_AT_ONCE // max(1, features.shape[1]))
    for start in range(0, len(features), size):
        chunk = features[start : start + size]
        # Because an inverted list leaves the output of a missing vector unchanged, we fill it with
        # NaN first.
        held = index.reconstruct_n(start, len(chunk), np.full_like(chunk, np.nan))
        norms, far = np.linalg.norm(chunk.astype(np.float64), axis=1), _distances(chunk, held)
        if not (far <= _TOLERANCE * norms).all():
            near = _distances(chunk, _as_stored(index, chunk))
            wrong = np.flatnonzero(~(far <= (1.0 + 1e-3) * near + _TOLERANCE * norms))
            if len(wrong) > 0:
                return start + int(wrong[0])
    return None


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    distances: np.ndarray = np.linalg.norm(first.astype(np.float64) - second, axis=1)
    return distances


def _as_stored(index: Any, vectors: np.ndarray) -> np.ndarray:
    """Return what an index would store: the vectors themselves unless it compresses."""
    with contextlib.suppress(AttributeError, RuntimeError):
        vectors = index.sa_decode(index.sa_encode(vectors))
    return vectors


def _faiss_message(error: BaseException) -> str:
    """Return a message of faiss without the C++ function and source file at its start."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)


def trained_index(factory: str, parameters: str, features: torch.Tensor) -> Any:
    """Make an inner-product index of faiss with these features (M, D), by `faiss.index_factory`.

    Without any feature the index is not trained.

    Args:
        factory: The factory string, such as "HNSW32".
        parameters: Search parameters in the form of `faiss.ParameterSpace`, or an empty string.
        features: Features (M, D) of the memories.

    Raises:
        ValueError: If faiss refuses the factory string, the parameters or too few training features
            (with faiss's message), or if the index does not rank by inner products.
        ImportError: If faiss is not installed.
    """
    if faiss is None:
        raise ImportError(f"an index of {factory!r} needs faiss, which is not installed: pip install modeling-uhop[faiss]")
    vectors = features.detach().float().cpu().contiguous().numpy()
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if len(vectors) > 0:
            if not index.is_trained:
                index.train(vectors)
            index.add(vectors)
        if parameters:
            space: Any = faiss.ParameterSpace()
            space.set_index_parameters(index, parameters)
    except (RuntimeError, TypeError) as error:
        given = f"{factory!r}" + (f" with {parameters!r}" if parameters else "")
        raise ValueError(f"faiss refuses an index of {given} for {len(vectors)} memories: {_faiss_message(error)}") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"an index must rank by inner products, which {factory!r} does not; choose another factory string")
    mark_in_step(index, features)
    return index


@torch.no_grad()
def sparse_association(
    queries: torch.Tensor,
    memory_count: int,
    candidates: Candidates,
    *,
    beta: float,
    alpha: float,
    top_k: int = 64,
    features: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Compute the association weights of those memories that have any weight.

    $$
    p = \mathrm{Sep}_\alpha(\beta \langle \Phi(\Xi), \Phi(x) \rangle)
    $$

    This is U-Hop (arXiv 2404.03827), equation 2.4. The weights of the k best candidates equal those
    of all memories if the last candidate gets no weight, because the threshold is then above its
    score and every lower score. Queries whose last candidate gets weight are searched again with
    four times as many candidates.

    Args:
        queries: Features (Q, D) of the queries.
        memory_count: Number M of memories.
        candidates: `brute_force(features)`, or an index with exact answers. An index of faiss can
            be passed directly or through `faiss_index`.
        beta: Inverse temperature, as in `retrieve`.
        alpha: Tsallis exponent, as in `retrieve`. At alpha = 1 every memory has weight, and all are
            candidates.
        top_k: Number of candidates at first, at least 1.
        features: Features (M, D) of the memories. They are needed if the scores of the candidates
            may differ from the inner products: the scores are then computed again for the memories
            that were found. An index of faiss is compared with them.

    Returns:
        Weights and indices (Q, K). K is the largest number of memories that any query needed; other
            queries have weights of 0 at the end.

    Raises:
        ValueError: If there is no memory, if `top_k` is below 1, or if scores overflow fp64. Also
            if the candidates have a wrong shape, an index that is out of range or occurs twice, or
            a NaN score.
        TypeError: If the candidates are neither a function nor an index of faiss, or do not return
            two tensors.
    """
    if memory_count < 1 or top_k < 1:
        raise ValueError(f"there must be at least one memory and one candidate, got {memory_count} memories and top_k={top_k}")
    candidates = as_candidates(candidates)
    if isinstance(candidates, FaissIndex):
        candidates.check(memory_count, queries.shape[-1])
        if features is not None:
            candidates.check_features(features)
    count = memory_count if alpha == 1.0 else min(top_k, memory_count)
    weights = queries.new_zeros(len(queries), count)
    indices = torch.zeros(len(queries), count, dtype=torch.long, device=queries.device)
    open_queries = torch.arange(len(queries), device=queries.device)
    while len(open_queries) > 0:
        weights, indices = (torch.nn.functional.pad(x, (0, count - x.shape[1])) for x in (weights, indices))
        unsettled = []
        for part in open_queries.split(max(1, _SCORES // memory_count)):
            answer: Any = candidates(queries[part], count)
            if not isinstance(answer, (tuple, list)) or len(answer) != 2:
                raise TypeError(f"candidates must give two tensors, scores and indices, got {type(answer).__name__}")
            scores, found = answer
            _check_candidates(scores, found, (len(part), count), memory_count)
            if features is not None:
                exact = _exact_scores(queries[part], features, found)
                scores, order = exact.masked_fill(scores == -torch.inf, -torch.inf).sort(dim=-1, descending=True)
                found = found.gather(1, order)
            weights[part] = simplex_map(_scaled(at_least_fp32(scores), beta), alpha).to(weights.dtype)
            indices[part] = found
            unsettled.append(part[weights[part, -1] > 0])
        open_queries = torch.cat(unsettled) if count < memory_count else open_queries[:0]
        count = min(4 * count, memory_count)
    used = max(1, int((weights > 0).sum(-1).max())) if len(weights) > 0 else 1
    return weights[:, :used], indices[:, :used]


def _check_candidates(scores: torch.Tensor, found: torch.Tensor, shape: tuple[int, int], memory_count: int) -> None:
    """Check the scores and indices that candidates returned.

    Raises:
        ValueError: If no search can have found them.
        TypeError: If they are not tensors or the indices are not integers.
    """
    for name, tensor in (("scores", scores), ("indices", found)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"candidates must give scores and indices as tensors, got {name} of {type(tensor).__name__}")
        if tensor.shape != shape:
            raise ValueError(f"candidates must give scores and indices of shape {shape}, got {name} of shape {tuple(tensor.shape)}")
    if found.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"candidates must give indices of dtype torch.int64, got {found.dtype}")
    if bool(((found < 0) | (found >= memory_count)).any()):
        raise ValueError(f"candidates must have indices in [0, {memory_count}), got {found.min().item()} to {found.max().item()}")
    if bool(scores.isnan().any()):
        raise ValueError(f"candidates must have scores that are numbers, got {int(scores.isnan().sum())} NaN")
    # Because a place where nothing was found may have any index, we give each such place its own
    # negative number.
    missing = -1 - torch.arange(shape[1], device=found.device)
    memory_of = torch.where(scores == -torch.inf, missing, found).sort(dim=-1).values
    if bool((memory_of[:, 1:] == memory_of[:, :-1]).any()):
        raise ValueError("candidates must name each memory at most once for a query, got some twice")


def _exact_scores(queries: torch.Tensor, features: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Compute inner products (Q, k) of queries (Q, D) and found features of (M, D)."""
    if 4 * found.shape[1] >= len(features):
        return inner_products(queries, features).gather(1, found)
    size = max(1, _SCORES // (found.shape[1] * features.shape[1]))
    parts = zip(queries.split(size), found.split(size), strict=True)
    return torch.cat([in_range(lambda x, xi: torch.einsum("qd,qkd->qk", x, xi), "scores", x, features[chunk]) for x, chunk in parts])


def _scaled(scores: torch.Tensor, beta: float) -> torch.Tensor:
    """Compute `beta * scores`, where some may be -inf; in fp64 if others overflow."""
    scaled = beta * scores
    lost = is_readable(scaled) and not torch.equal(scaled.isfinite(), scores.isfinite())
    return beta * scores.double() if lost else scaled


def mixture(memories: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    r"""Compute $\sum_k w_k \xi_{i_k}$ (Q, d) from weights w (Q, K) and memory indices i (Q, K)."""
    return torch.nn.functional.embedding_bag(indices, memories, per_sample_weights=weights.to(memories.dtype), mode="sum")
