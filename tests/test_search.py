"""Tests of retrieval from a few candidates against retrieval with all weights, and of cached
features."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from modeling_uhop import UHopMemoryConfig, UHopMemoryModel, hopfield_attention, simplex_map
from modeling_uhop import search as search_module
from modeling_uhop.feature_cache import _INDEXES
from modeling_uhop.search import brute_force, faiss_index, largest, sparse_association
from tests.conftest import assert_close


faiss: Any = search_module.faiss
needs_faiss = pytest.mark.skipif(faiss is None, reason="faiss is not installed")


def _memory(count=300, dtype=torch.float64, **fields):
    memory = UHopMemoryModel(UHopMemoryConfig(**{"pattern_dim": 12, "feature_init": "normal", "alpha": 1.5, "beta": 3.0, **fields}))
    memory = memory.to(dtype).eval()
    memory.store(torch.randn(count, 12, dtype=dtype))
    return memory


@pytest.mark.parametrize("top_k", [1, 5, 64, 1000])
@pytest.mark.parametrize("alpha", [1.0, 1.05, 1.5, 2.0])
@pytest.mark.parametrize("similarity", ["kernel", "dot"])
def test_search_equals_retrieval(top_k, alpha, similarity):
    memory = _memory(alpha=alpha, similarity=similarity)
    queries = torch.cat([memory.memories[:20] + 0.5 * torch.randn(20, 12, dtype=torch.float64), torch.zeros(1, 12, dtype=torch.float64)])
    with torch.no_grad():
        exact = memory(queries, update_steps=2)
    found = memory.search(queries, update_steps=2, top_k=top_k)
    assert_close(found.retrieved, exact.retrieved, scale=3)
    weights = torch.zeros_like(exact.association).scatter_add_(1, found.indices, found.weights)
    assert_close(weights, exact.association)


def test_queries_are_searched_in_parts(monkeypatch):
    memory = _memory()
    queries = torch.randn(23, 12, dtype=torch.float64)
    whole = memory.search(queries, top_k=3)
    monkeypatch.setattr(search_module, "_SCORES", 700)
    parts = memory.search(queries, top_k=3)
    assert_close(parts.retrieved, whole.retrieved)


def test_few_candidates_are_requested_if_few_memories_have_weight():
    memory = _memory(beta=30.0)
    asked = []
    plain = brute_force(memory.stored_features().detach())

    def candidates(queries, count):
        asked.append((len(queries), count))
        return plain(queries, count)

    queries = memory.memories[:10]
    found = memory.search(queries, top_k=8, candidates=candidates)
    assert asked[0] == (10, 8)
    assert all(count <= 32 for _, count in asked)
    assert found.weights.shape[1] < 32


@needs_faiss
def test_a_faiss_index_gives_the_same_results():
    memory = _memory(dtype=torch.float32)
    features = memory.stored_features().detach().numpy()
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features)
    queries = torch.randn(9, 12)
    assert_close(memory.search(queries, candidates=faiss_index(index)).retrieved, memory.search(queries).retrieved, scale=3)


def test_memories_that_an_index_does_not_find_have_no_weight():
    memory = _memory(dtype=torch.float32)
    features = memory.stored_features().detach().numpy()

    class Blind:
        def search(self, queries, count):
            scores, indices = np.full((len(queries), count), -3.4e38, np.float32), np.full((len(queries), count), -1)
            scores[:, 0], indices[:, 0] = 1.0, 2
            return scores, indices

        def reconstruct(self, place):
            return features[place]

        def reconstruct_n(self, start, count, out):
            return features[start : start + count]

    found = memory.search(torch.randn(3, 12), candidates=faiss_index(Blind()))
    assert_close(found.retrieved, memory.memories[[2, 2, 2]])


@pytest.mark.parametrize(("memories", "count"), [(1, 1), (7, 3), (64, 64), (1000, 1), (1003, 5), (4099, 64)])
def test_the_largest_scores_equal_topk(memories, count):
    for scores in (torch.randn(6, memories), torch.randint(4, (6, memories)).float(), torch.arange(memories).float().expand(6, -1)):
        values, indices = largest(scores, count)
        assert torch.equal(values, scores.topk(count).values)
        assert torch.equal(scores.gather(1, indices), values)
        assert all(len(row.unique()) == count for row in indices)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.search(torch.zeros(1, 12), top_k=0), "top_k=0"),
        (lambda m: m.search(torch.zeros(1, 12), update_steps=0), "update_steps must be at least 1"),
        (lambda m: m.search(torch.zeros(1, 11)), "must have shape"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(_memory(dtype=torch.float32))


def test_search_needs_memories_and_an_inner_product():
    with pytest.raises(ValueError, match="0 memories"):
        sparse_association(torch.zeros(1, 3), 0, brute_force(torch.zeros(0, 3)), beta=1.0, alpha=1.5)
    with pytest.raises(ValueError, match="'kernel' or 'dot', got 'l2'"):
        _memory(similarity="l2").search(torch.zeros(1, 12))


def test_features_of_memories_are_cached_until_something_changes():
    memory = _memory()
    with torch.no_grad():
        first = memory.stored_features()
        kept = memory._cached_features()
        memory(torch.zeros(1, 12, dtype=torch.float64))
        assert memory._cached_features() is kept

        memory.feature_map.weight.neg_()
        assert_close(memory.stored_features(), -first)
        memory.memories[0] = 0.0
        assert torch.equal(memory.stored_features()[0], torch.zeros(12, dtype=torch.float64))
        memory.append(torch.ones(12, dtype=torch.float64))
        assert len(memory.stored_features()) == 301
        kept = memory.stored_features()
        rounded = memory.half().double()
        assert not torch.equal(rounded.stored_features(), kept)
        memory.load_state_dict({**memory.state_dict(), "feature_map.weight": torch.zeros(12, 12, dtype=torch.float64)})
        assert not memory.stored_features().any()


@pytest.mark.parametrize("change", ["fused optimizer", "data", "hook", "what was returned"])
def test_cached_features_are_updated_after_changes_without_a_version(change):
    # A small beta, so that every memory has weight.
    memory = _memory(dtype=torch.float32, normalize_features=False, beta=0.05)
    queries = torch.randn(5, 12)
    with torch.no_grad():
        memory(queries)
    if change == "fused optimizer":
        memory(queries).retrieved.square().sum().backward()
        torch.optim.AdamW(memory.parameters(), lr=0.1, fused=True).step()
    elif change == "data":
        memory.feature_map.weight.data *= 2.0
    elif change == "hook":
        memory.feature_map.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    else:
        with torch.no_grad():
            memory.stored_features().zero_()
    with torch.no_grad():
        expected = hopfield_attention(
            *(x[None, None] for x in (memory.feature_map(queries), memory.feature_map(memory.memories), memory.memories)),
            alpha=1.5,
            scaling=0.05,
        )[0, 0]
        assert_close(memory(queries).retrieved, expected, scale=3)
        assert_close(memory.search(queries).retrieved, expected, scale=3)


def test_memories_that_require_a_gradient_get_it_through_their_features():
    memory = _memory().requires_grad_(False)
    queries = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        memory(queries)
    memory.memories.requires_grad_()
    (actual,) = torch.autograd.grad(memory(queries).retrieved.square().sum(), memory.memories)
    features = memory.feature_map(memory.memories)
    retrieved = simplex_map(3.0 * memory.feature_map(queries) @ features.mT, 1.5) @ memory.memories
    (expected,) = torch.autograd.grad(retrieved.square().sum(), memory.memories)
    assert_close(actual, expected, scale=10)


def test_a_memory_made_under_inference_mode_can_be_used_outside():
    with torch.inference_mode():
        memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=12))
    patterns = torch.randn(5, 12)
    memory.store(patterns)
    with torch.no_grad():
        weights = simplex_map(memory.config.beta * memory.feature_map(patterns) @ memory.feature_map(patterns).mT, memory.config.alpha)
        assert_close(memory(patterns).retrieved, weights @ patterns, scale=3)
    assert_close(memory.search(patterns).retrieved, weights @ patterns, scale=3)


def test_a_gradient_passes_through_features_that_are_not_cached():
    memory = _memory()
    with torch.no_grad():
        memory.stored_features()
    memory(torch.randn(2, 12, dtype=torch.float64)).retrieved.sum().backward()
    assert memory.feature_map.weight.grad.abs().sum() > 0
    memory.separate(steps=2)
    with torch.no_grad():
        assert_close(memory.stored_features(), memory.feature_map(memory.memories))


def test_copies_and_other_modes_do_not_use_cached_features():
    memory = _memory(dtype=torch.float32)
    queries = torch.randn(3, 12)
    memory.separate(steps=5)
    with torch.no_grad():
        memory(queries)
        twin = copy.deepcopy(memory)
        twin.separate(steps=5, lr=0.1)
        assert_close(twin.stored_features(), twin.feature_map(twin.memories))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            memory.append(torch.ones(12))
            memory(queries)
        assert memory(queries).retrieved.dtype == torch.float32
    memory.requires_grad_(False)
    memory.store(torch.randn(5, 12))
    with torch.inference_mode():
        memory(queries)
    queries.requires_grad_()
    memory(queries).retrieved.sum().backward()
    assert queries.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_a_query_for_which_an_index_finds_nothing_has_no_weight(alpha):
    class Empty:
        def search(self, queries, count):
            return np.full((len(queries), count), -3.4e38, np.float32), np.full((len(queries), count), -1)

    weights, _ = sparse_association(torch.randn(3, 4), 100, faiss_index(Empty()), beta=0.5, alpha=alpha, top_k=4)
    assert (weights == 0).all()


def _faiss(memory, kind="IndexFlatIP"):
    index = getattr(faiss, kind)(12)
    index.add(memory.stored_features().float().detach().numpy())
    return index


def _other_memories(memory):
    index = _faiss(memory)
    memory.store(torch.randn(300, 12))
    return index


def _moved_phi(memory):
    index = _faiss(memory)
    with torch.no_grad():
        memory.feature_map.weight[0] *= -5.0
    return index


def _forgotten_and_stored(memory):
    index = _faiss(memory)
    memory.delete(299)
    memory.append(torch.randn(12))
    return index


def _edited(memory):
    index = _faiss(memory)
    memory.memories[5] = torch.randn(12)
    return index


def _shards(memory):
    index = faiss.IndexShards(12, True, True)
    index.add_shard(faiss.IndexFlatIP(12))
    index.add(memory.stored_features().detach().numpy())
    return index


class _WithoutVectors:
    """An index without access to its vectors."""

    def __init__(self, memory):
        self.search = _faiss(memory).search


@needs_faiss
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: _faiss(m, "IndexFlatL2"), "must rank by inner products, but IndexFlatL2 has metric_type=1"),
        (lambda m: faiss.IndexFlatIP(12), "IndexFlatIP holds 0 and the memory 300"),
        (lambda m: faiss.IndexFlatIP(5), "of width 12, got IndexFlatIP of width 5"),
        (lambda m: faiss.index_factory(12, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT), "must be trained before a search"),
        (lambda m: (_faiss(m), m.append(torch.randn(2, 12)))[0], "holds 300 and the memory 302"),
        (lambda m: (_faiss(m), m.delete([3, 4]))[0], "holds 300 and the memory 298"),
        (_other_memories, "IndexFlatIP holds for memory 0 is another vector"),
        (_moved_phi, "IndexFlatIP holds for memory 0 is another vector"),
        (_forgotten_and_stored, "IndexFlatIP holds for memory 299 is another vector"),
        (_edited, "IndexFlatIP holds for memory 5 is another vector"),
        (_shards, r"give back .* but IndexShards does not \(reconstruct not implemented for this type of index\)"),
        (_WithoutVectors, "give back .* but _WithoutVectors does not"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(make, message):
    memory = _memory(dtype=torch.float32)
    candidates = faiss_index(make(memory))
    with pytest.raises(ValueError, match=message):
        memory.search(torch.randn(4, 12), candidates=candidates)


_FACTORIES = [
    *("Flat", "HNSW32", "HNSW32_SQ8", "IVF4,Flat", "IVF4,SQ8", "PQ4x4", "IVF4,PQ4x4fs", "SQ8", "SQfp16", "SQ8,RFlat"),
    *("PCA12,Flat", "RR12,IVF4,Flat", "PCA8,IVF4,SQ8", "IDMap,Flat", "IDMap2,HNSW32"),
]


def _made(factory, vectors, ids=None):
    index = faiss.index_factory(12, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    if "IDMap" in factory:
        index.add_with_ids(vectors, np.arange(len(vectors)) if ids is None else ids)
    else:
        index.add(vectors)
    return index


@needs_faiss
@pytest.mark.parametrize("factory", _FACTORIES)
def test_the_vectors_of_an_index_are_compared_with_the_features(factory):
    memory = _memory(count=1200, dtype=torch.float32, normalize_features=False, alpha=2.0, beta=5.0)
    features = memory.stored_features().detach().numpy()
    queries = memory.memories[:4] + 0.1 * torch.randn(4, 12)
    right = _made(factory, features)
    found = memory.search(queries, candidates=right, top_k=1200)
    exact = (5.0 * memory.feature_map(queries) @ memory.feature_map(memory.memories).mT).detach().gather(1, found.indices)
    # The weights of the exact scores of the memories that were found.
    assert_close(found.weights, simplex_map(exact, 2.0) * (found.weights > 0), scale=30)
    for change in ("order", "one", "scale"):
        other = features.copy()
        if change == "order":
            other = other[::-1].copy()
        elif change == "one":
            other[1100] = -other[1100]
        else:
            other *= 1.5
        wrong = 1100 if change == "one" else "[0-9]+"
        with pytest.raises(ValueError, match=f"holds for memory {wrong} is another vector"):
            memory.search(queries, candidates=_made(factory, other))


@needs_faiss
@pytest.mark.parametrize("factory", ["IDMap,Flat", "IDMap2,Flat"])
def test_ids_of_an_index_equal_those_of_memories(factory):
    memory = _memory(dtype=torch.float32)
    features, queries = memory.stored_features().detach().numpy(), torch.randn(4, 12)
    ids = np.random.default_rng(0).permutation(300)
    found = memory.search(queries, candidates=_made(factory, features[ids], ids))
    assert_close(found.retrieved, memory.search(queries).retrieved, scale=3)
    for strange in (ids, np.arange(300) + 5, np.zeros(300, dtype=np.int64)):
        with pytest.raises(ValueError, match="is another vector"):
            memory.search(queries, candidates=_made(factory, features, strange))


@needs_faiss
def test_vectors_are_compared_once_for_an_index_and_a_state_of_the_memory(monkeypatch):
    memory = _memory(dtype=torch.float32)
    index, queries, compared = _faiss(memory), torch.randn(4, 12), []
    first_difference = search_module.first_difference

    def counted(*given):
        compared.append(given)
        return first_difference(*given)

    monkeypatch.setattr(search_module, "first_difference", counted)
    for _ in range(3):
        memory.search(queries, 2, candidates=index)
        memory.search(queries, candidates=faiss_index(index))
    assert len(compared) == 1
    memory.append(torch.randn(12))
    index.add(memory.stored_features().detach().numpy()[-1:])
    memory.search(queries, candidates=index)
    assert len(compared) == 2
    # An index that the memory builds itself contains the features.
    memory.index("PQ4x4")
    memory.search(queries)
    assert len(compared) == 2


@pytest.mark.parametrize("given", [None, 5, lambda queries, count: None])
def test_an_object_that_is_not_an_index_is_refused(given):
    with pytest.raises(TypeError, match=f"faiss_index needs an index of the faiss library.* got {type(given).__name__}"):
        faiss_index(given)


def test_candidates_that_are_not_a_function_are_refused():
    with pytest.raises(TypeError, match=r"candidates must be a function .* or an index of faiss, got int"):
        _memory(dtype=torch.float32).search(torch.randn(4, 12), candidates=5)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda q, k: (torch.zeros(len(q), k), torch.full((len(q), k), 300)), ValueError, r"indices in \[0, 300\), got 300 to 300"),
        (lambda q, k: (torch.zeros(len(q), k), torch.full((len(q), k), -1)), ValueError, "got -1 to -1"),
        (lambda q, k: (torch.zeros(len(q), 1), torch.zeros(len(q), 1, dtype=torch.long)), ValueError, r"scores of shape \(4, 1\)"),
        (lambda q, k: (torch.full((len(q), k), torch.nan), torch.arange(k).expand(len(q), -1)), ValueError, "scores that are numbers"),
        (lambda q, k: (torch.zeros(len(q), k), torch.zeros(len(q), k, dtype=torch.long)), ValueError, "at most once for a query"),
        (lambda q, k: (torch.zeros(len(q), k), torch.zeros(len(q), k)), TypeError, "indices of dtype torch.int64, got torch.float32"),
        (lambda q, k: (np.zeros((len(q), k)), np.zeros((len(q), k))), TypeError, "scores of ndarray"),
        (lambda q, k: None, TypeError, "two tensors, scores and indices, got NoneType"),
        (lambda q, k: torch.zeros(len(q), k), TypeError, "two tensors, scores and indices, got Tensor"),
    ],
)
def test_candidates_that_no_search_can_find_are_refused(answer, error, message):
    with pytest.raises(error, match=message):
        _memory(dtype=torch.float32).search(torch.randn(4, 12), candidates=answer)


@needs_faiss
@pytest.mark.parametrize("factory", ["Flat", "HNSW32", "IVF4,Flat", "SQ8"])
@pytest.mark.parametrize("similarity", ["kernel", "dot"])
def test_an_index_of_the_memory_is_updated_with_it(factory, similarity):
    memory = _memory(dtype=torch.float32, similarity=similarity, alpha=2.0, beta=10.0)
    memory.index(factory, "nprobe=4" if factory.startswith("IVF") else "")

    def check():
        queries = memory.memories[:9] + 0.05 * torch.randn(9, 12)
        with torch.no_grad():
            expected = memory(queries).retrieved
        assert_close(memory.search(queries).retrieved, expected, scale=10)

    check()
    built = _INDEXES[memory].candidates
    check()
    assert _INDEXES[memory].candidates is built
    memory.append(torch.randn(5, 12))
    check()
    memory.delete([0, 7])
    check()
    memory.store(torch.randn(200, 12))
    check()
    memory.memories[:50] = torch.randn(50, 12)
    check()
    if similarity == "kernel":
        memory.separate(steps=20, lr=0.1)
        check()
    memory.index("flat")
    assert memory not in _INDEXES
    check()


@needs_faiss
def test_an_index_is_not_copied_or_saved(tmp_path):
    memory = _memory(dtype=torch.float32)
    memory.index("HNSW32")
    queries = torch.randn(3, 12)
    expected = memory.search(queries).retrieved
    memory.save_pretrained(tmp_path)
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), UHopMemoryModel.from_pretrained(tmp_path)):
        assert twin not in _INDEXES
        assert_close(twin.search(queries).retrieved, expected, scale=10)
    assert_close(memory.to(torch.float64).search(queries).retrieved, expected, dtype=torch.float32, scale=10)


@needs_faiss
def test_weights_use_exact_scores_instead_of_those_of_an_index():
    memory = _memory(dtype=torch.float32, alpha=2.0, beta=5.0, similarity="dot")
    memory.index("PQ4x4")
    queries = memory.memories[:20]
    found = memory.search(queries, top_k=300)
    with torch.no_grad():
        exact = memory(queries)
    assert_close(torch.zeros_like(exact.association).scatter_add_(1, found.indices, found.weights), exact.association, scale=10)


@needs_faiss
def test_an_index_that_cannot_be_built_is_refused(monkeypatch):
    memory = _memory(dtype=torch.float32)
    for factory, parameters in (("HNSV32", ""), ("HNSW32", "depth=3")):
        with pytest.raises(ValueError, match=f"faiss refuses an index of '{factory}'"):
            memory.index(factory, parameters)
    memory.index("IVF500,Flat")
    with pytest.raises(ValueError, match=r"for 300 memories: '[^/]*training points"):
        memory.search(torch.randn(1, 12))
    with pytest.raises(ValueError, match="'kernel' or 'dot', got 'l2'"):
        _memory(similarity="l2").index("Flat")
    monkeypatch.setattr(search_module, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install modeling-uhop\[faiss\]"):
        memory.index("Flat")


@needs_faiss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factory", ["flat", "Flat"])
def test_search_works_in_half_precision_and_without_queries(dtype, factory):
    memory = _memory(dtype=dtype, similarity="dot", alpha=2.0)
    # Scores of 1e6 exceed the range of fp16.
    memory.store(300.0 * torch.nn.functional.normalize(torch.randn(300, 12), dim=-1))
    memory.index(factory)
    assert_close(memory.search(memory.memories[:9]).retrieved, memory.memories[:9])
    none = memory.search(torch.zeros(0, 12))
    assert none.retrieved.shape == (0, 12)
    assert none.weights.shape[0] == 0


@pytest.mark.parametrize("size", [1e19, 1e30, 1e-30])
@pytest.mark.parametrize("similarity", ["kernel", "dot"])
def test_search_works_for_patterns_of_any_norm(size, similarity):
    memory = _memory(dtype=torch.float32, similarity=similarity, alpha=2.0, beta=500.0)
    memory.store(size * torch.nn.functional.normalize(torch.randn(300, 12), dim=-1))
    queries = memory.memories[:9]
    with torch.no_grad():
        expected = memory(queries).retrieved
    assert_close(memory.search(queries).retrieved / size, expected / size)
    if size > 1.0 or similarity == "kernel":
        assert_close(expected / size, queries / size)


def test_scores_beyond_double_precision_are_refused():
    memory = _memory(similarity="dot")
    memory.store(1e200 * memory.memories)
    with pytest.raises(ValueError, match="scores must be finite, but those of these patterns overflow"):
        memory.search(memory.memories[:2])
