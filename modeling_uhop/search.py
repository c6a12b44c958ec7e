"""Retrieval from many memories: alpha > 1 gives most of them no weight, so that a few candidates are enough, and known to be."""

import math
from collections.abc import Callable

import torch

from .simplex import at_least_fp32, simplex_map


# Scores formed at once: 64 MB of fp32.
_SCORES = 2**24

# Scores and indices (Q, k) of the k memories whose features are most like those of each query, the best first.
Candidates = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def brute_force(features: torch.Tensor) -> Candidates:
    """Candidates among memories with features (M, D), by all inner products."""

    def candidates(queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return largest(queries @ features.mT, count)

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


def faiss_index(index) -> Candidates:
    """Candidates by an inner-product index of the faiss library that holds the features of the memories, in their order.

    Retrieval is exact if the index is (`IndexFlatIP`). One that overlooks memories retrieves from those that it finds.
    """

    def candidates(queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores, indices = index.search(queries.float().cpu().contiguous().numpy(), count)
        found = torch.from_numpy(indices).to(queries.device)
        # What an index does not find has the index -1.
        return torch.from_numpy(scores).to(queries).masked_fill_(found < 0, -torch.inf), found.clamp_(min=0)

    return candidates


@torch.no_grad()
def sparse_association(
    queries: torch.Tensor, memory_count: int, candidates: Candidates, *, beta: float, alpha: float, top_k: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Association weights of the memories that have any, `p = Sep_alpha(beta <Phi(Xi), Phi(x)>)` (U-Hop, arXiv 2404.03827, equation 2.4).

    Weights of the k best candidates are those of all memories exactly if the last of them gets none: the threshold is above its score,
    and above every lower one. Queries for which it does get some are asked again with four times as many.

    Args:
        queries: Features (Q, D) of the queries.
        memory_count: Number of memories M.
        candidates: `brute_force`, or an index whose answers are exact.
        beta, alpha: As in `retrieve`. At alpha = 1 every memory has some weight, and all are candidates.
        top_k: Candidates to begin with, at least 1.

    Returns:
        Weights and indices (Q, K), with as many columns as the query that needed most; a weight of 0 fills up the others.

    Raises:
        ValueError: If there is no memory, or `top_k` is below 1.
    """
    if memory_count < 1 or top_k < 1:
        raise ValueError(f"there must be at least one memory and one candidate, got {memory_count} memories and top_k={top_k}")
    count = memory_count if alpha == 1.0 else min(top_k, memory_count)
    weights = queries.new_zeros(len(queries), count)
    indices = torch.zeros(len(queries), count, dtype=torch.long, device=queries.device)
    open_queries = torch.arange(len(queries), device=queries.device)
    while len(open_queries) > 0:
        weights, indices = (torch.nn.functional.pad(x, (0, count - x.shape[1])) for x in (weights, indices))
        unsettled = []
        for part in open_queries.split(max(1, _SCORES // memory_count)):
            scores, found = candidates(queries[part], count)
            weights[part] = simplex_map(beta * at_least_fp32(scores), alpha).to(weights.dtype)
            indices[part] = found
            unsettled.append(part[weights[part, -1] > 0])
        open_queries = torch.cat(unsettled) if count < memory_count else open_queries[:0]
        count = min(4 * count, memory_count)
    used = max(1, int((weights > 0).sum(-1).max())) if len(weights) > 0 else 1
    return weights[:, :used], indices[:, :used]


def mixture(memories: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`sum_k weights_k memories[indices_k]`, (Q, d)."""
    return torch.nn.functional.embedding_bag(indices, memories, per_sample_weights=weights.to(memories.dtype), mode="sum")
