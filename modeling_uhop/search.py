"""Retrieval from many memories: alpha > 1 gives most of them no weight, so that a few candidates are enough, and known to be."""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import numpy as np
import torch

from .energy import in_range, inner_products
from .simplex import at_least_fp32, simplex_map
from .validation import is_finite, is_readable


try:
    import faiss
except ImportError:
    faiss = None  # type: ignore[assignment]

# Scores formed at once: 64 MB of fp32.
_SCORES = 2**24

# Scores and indices (Q, k) of the k memories whose features are most like those of each query, the best first; -inf where none was found.
Candidates = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

# Entries of vectors that an index gives back at once.
_HELD = 2**22
# How far a vector that an index holds may be from a feature beyond what the index rounds off, as a part of the feature's norm.
_TOLERANCE = 1e-4
# The features, and their version, that an index was found to hold.
_IN_STEP: WeakKeyDictionary[Any, tuple[ReferenceType[torch.Tensor], int]] = WeakKeyDictionary()


def brute_force(features: torch.Tensor) -> Candidates:
    """Candidates among memories with features (M, D), by all inner products."""
    wide = at_least_fp32(features)

    def candidates(queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        queries = at_least_fp32(queries)
        scores, indices = largest(queries @ wide.transpose(-1, -2), count)
        if is_readable(scores) and not is_finite(scores):
            return largest(inner_products(queries.double(), wide.double()), count)
        return scores, indices

    return candidates


def largest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row (Q, M), the best first, and their indices: `torch.topk`, in a pass and a little for few of many.

    A row is cut into groups. The `count` groups with the largest maxima hold the `count` largest scores: each of these is in a group whose
    maximum is no less, and of such groups there are at most `count`.
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
    """Candidates by an index of the faiss library; see `faiss_index`."""

    def __init__(self, index: Any):
        self.index = index

    def check(self, memory_count: int, feature_dim: int) -> None:
        """A `ValueError` where the index does not hold this many features of this width by their inner products."""
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
        """A `ValueError` where the index holds others than these features (M, D), or does not tell; see `faiss_index`."""
        if _known_in_step(self.index, features):
            return
        name = type(self.index).__name__
        try:
            wrong = first_difference(self.index, features.detach().float().cpu().contiguous().numpy())
        except (NotImplementedError, AttributeError, RuntimeError) as error:
            raise ValueError(
                f"a faiss index must give back the vectors that it holds, to be compared with the features, but {name} does "
                f"not ({_said(error)}); let the memory keep its own index, which is always in step with it: memory.index(...)"
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
        # What an index does not find has the index -1.
        return torch.from_numpy(scores).to(queries.device).masked_fill_(found < 0, -torch.inf), found.clamp_(min=0)


def faiss_index(index: Any) -> Candidates:
    """Candidates by an inner-product index of the faiss library that holds `memory.stored_features()`, in their order.

    Retrieval is exact if the index is (`IndexFlatIP`). One that overlooks memories retrieves from those that it finds. Before every search
    the index is asked for its metric, its width and how many vectors it holds. Before the first one, and again when memories or Phi have
    changed, every vector that it holds is compared with the feature of its memory: it must be as near to this as the index's own code of
    the feature is. A change of the index alone that keeps the number of its vectors is not seen. An index that does not give its vectors
    back (`IndexShards`) is refused. What does not fit is a `ValueError`; `UHopMemoryModel.index` keeps an index that always fits.

    Raises:
        TypeError: For what is no index of faiss.
    """
    if not callable(getattr(index, "search", None)):
        raise TypeError(f"faiss_index needs an index of the faiss library, such as faiss.IndexFlatIP, got {type(index).__name__}")
    return FaissIndex(index)


def as_candidates(given: Any) -> Candidates:
    """Candidates as they are, or those of an index of faiss; a `TypeError` for what is neither."""
    if callable(given):
        return given
    if not callable(getattr(given, "search", None)):
        raise TypeError(
            f"candidates must be a function (queries, count) -> (scores, indices) or an index of faiss, got {type(given).__name__}"
        )
    return faiss_index(given)


def mark_in_step(index: Any, features: torch.Tensor) -> None:
    """Note that an index of faiss holds these features as they are now; tensors of inference mode have no version to tell that by."""
    if not features.is_inference():
        _IN_STEP[index] = ref(features), features._version


def _known_in_step(index: Any, features: torch.Tensor) -> bool:
    held = _IN_STEP.get(index)
    return held is not None and not features.is_inference() and held[0]() is features and held[1] == features._version


def first_difference(index: Any, features: np.ndarray) -> int | None:
    """The first of the features (M, D) that an index of faiss holds another vector for, beyond what the index rounds off.

    Raises:
        NotImplementedError, AttributeError, RuntimeError: If the index does not give its vectors back.
    """
    if faiss is not None and isinstance(index, faiss.Index):
        index = faiss.downcast_index(index)
        if isinstance(index, faiss.IndexIDMap):
            ids = faiss.vector_to_array(index.id_map)
            strange = np.flatnonzero(np.bincount(ids[(ids >= 0) & (ids < len(features))], minlength=len(features)) != 1)
            if len(strange) > 0:
                return int(strange[0])
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
        # What has no `reconstruct` ends the process in `reconstruct_n`.
        index.reconstruct(0)
    size = max(1, _HELD // max(1, features.shape[1]))
    for start in range(0, len(features), size):
        some = features[start : start + size]
        # An inverted list leaves a vector that it does not hold as it was.
        held = index.reconstruct_n(start, len(some), np.full_like(some, np.nan))
        norms, far = np.linalg.norm(some.astype(np.float64), axis=1), _distances(some, held)
        if not (far <= _TOLERANCE * norms).all():
            near = _distances(some, _coded(index, some))
            wrong = np.flatnonzero(~(far <= (1.0 + 1e-3) * near + _TOLERANCE * norms))
            if len(wrong) > 0:
                return start + int(wrong[0])
    return None


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    distances: np.ndarray = np.linalg.norm(first.astype(np.float64) - second, axis=1)
    return distances


def _coded(index: Any, vectors: np.ndarray) -> np.ndarray:
    """What an index would hold of vectors: themselves, unless it compresses."""
    with contextlib.suppress(AttributeError, RuntimeError):
        vectors = index.sa_decode(index.sa_encode(vectors))
    return vectors


def _said(error: BaseException) -> str:
    """A message of faiss without the C++ function and the source file that it begins with."""
    return re.sub(r"^Error in .* at \S+:\d+: (Error: )?", "", str(error), flags=re.DOTALL)


def trained_index(factory: str, parameters: str, features: torch.Tensor) -> Any:
    """An inner-product index of faiss with these features (M, D), made by `faiss.index_factory`; without any it is not trained.

    Raises:
        ValueError: For a factory string or parameters that faiss refuses, or too few features to train it, with faiss's message.
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
        raise ValueError(f"faiss refuses an index of {given} for {len(vectors)} memories: {_said(error)}") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"an index must rank by inner products, which {factory!r} does not")
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
    """Association weights of the memories that have any, `p = Sep_alpha(beta <Phi(Xi), Phi(x)>)` (U-Hop, arXiv 2404.03827, equation 2.4).

    Weights of the k best candidates are those of all memories exactly if the last of them gets none: the threshold is above its score,
    and above every lower one. Queries for which it does get some are asked again with four times as many.

    Args:
        queries: Features (Q, D) of the queries.
        memory_count: Number of memories M.
        candidates: `brute_force`, or an index whose answers are exact; one of faiss as it is, or through `faiss_index`.
        beta, alpha: As in `retrieve`. At alpha = 1 every memory has some weight, and all are candidates.
        top_k: Candidates to begin with, at least 1.
        features: Features (M, D) of the memories, where the scores of candidates may not be their inner products: these are computed of
            what is found. An index of faiss is compared with them.

    Returns:
        Weights and indices (Q, K), with as many columns as the query that needed most; a weight of 0 fills up the others.

    Raises:
        ValueError: If there is no memory, `top_k` is below 1, candidates have a wrong shape, indices that no memory has or that occur
            twice, or scores that are not numbers, or scores overflow fp64.
        TypeError: For candidates that are no function and no index of faiss, or give something else than two tensors.
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
    """A `ValueError` for candidates that no search can have found."""
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
    # What was not found has any index; each such place gets a number of its own.
    nothing = -1 - torch.arange(shape[1], device=found.device)
    named = torch.where(scores == -torch.inf, nothing, found).sort(dim=-1).values
    if bool((named[:, 1:] == named[:, :-1]).any()):
        raise ValueError("candidates must name each memory at most once for a query, got some twice")


def _exact_scores(queries: torch.Tensor, features: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Inner products (Q, k) of queries (Q, D) and the features (M, D) of what was found for each."""
    if 4 * found.shape[1] >= len(features):
        return inner_products(queries, features).gather(1, found)
    size = max(1, _SCORES // (found.shape[1] * features.shape[1]))
    parts = zip(queries.split(size), found.split(size), strict=True)
    return torch.cat([in_range(lambda x, xi: torch.einsum("qd,qkd->qk", x, xi), "scores", x, features[some]) for x, some in parts])


def _scaled(scores: torch.Tensor, beta: float) -> torch.Tensor:
    """`beta * scores`, of which some may be -inf, in fp64 where others overflow."""
    scaled = beta * scores
    lost = is_readable(scaled) and not torch.equal(scaled.isfinite(), scores.isfinite())
    return beta * scores.double() if lost else scaled


def mixture(memories: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`sum_k weights_k memories[indices_k]`, (Q, d)."""
    return torch.nn.functional.embedding_bag(indices, memories, per_sample_weights=weights.to(memories.dtype), mode="sum")
