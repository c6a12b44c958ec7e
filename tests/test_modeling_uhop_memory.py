"""Tests of UHopMemoryModel: storing, separation, retrieval, reports, saving and loading, errors."""

import dataclasses
import math
import warnings
from collections.abc import Callable

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.datasets import load_digits
from transformers import AutoModel

from modeling_uhop import (
    FeatureMap,
    Separation,
    UHopMemoryConfig,
    UHopMemoryModel,
    add_noise,
    association,
    denoising_loss,
    energy,
    mask_patterns,
    maximize_separation,
    retrieve,
    separation_loss,
    similarity_scores,
)
from modeling_uhop.feature_map import unit_norm
from tests import reference
from tests.conftest import assert_close


SIMILARITIES = ["kernel", "dot", "cosine", "l2", "manhattan", "polynomial"]


def _memory(patterns: torch.Tensor | None = None, dtype: torch.dtype = torch.float32, **fields) -> UHopMemoryModel:
    patterns = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)) if patterns is None else patterns
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=patterns.shape[-1], **fields)).to(dtype)
    memory.store(patterns)
    return memory


def _digits(count: int) -> torch.Tensor:
    return torch.tensor(load_digits().data[:count] / 16.0, dtype=torch.float32)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("steps", [1, 3])
def test_retrieval_equals_the_loops(similarity, alpha, steps):
    memory = _memory(dtype=torch.float64, similarity=similarity, alpha=alpha, beta=2.0, degree=3, update_steps=steps)
    queries = torch.randn(4, 6, dtype=torch.float64)
    phi = memory.feature_map

    def score(x, m):
        if similarity == "kernel":
            return (unit_norm(phi.weight @ x) * unit_norm(phi.weight @ m)).sum().item()
        return {
            "dot": (x * m).sum(),
            "cosine": (x * m).sum() / x.norm() / m.norm(),
            "l2": -(x - m).norm(),
            "manhattan": -(x - m).abs().sum(),
            "polynomial": 3 * (x * m).sum().clamp(min=1e-300).log(),
        }[similarity].item()

    for query, retrieved in zip(queries, memory(queries).retrieved, strict=True):
        for _ in range(steps):
            weights = reference.entmax([2.0 * score(query, m) for m in memory.memories], alpha)
            query = sum(w * m for w, m in zip(weights, memory.memories, strict=True))
        assert_close(retrieved, query)


def test_polynomial_weights_are_normalised_powers():
    memory = _memory(similarity="polynomial", alpha=1.0, beta=1.0, dtype=torch.float64)
    queries = torch.randn(4, 6, dtype=torch.float64)
    powers = (queries @ memory.memories.mT).clamp(min=0) ** 10
    assert_close(memory(queries).association, powers / powers.sum(-1, keepdim=True))


def test_output_agrees_with_the_functions():
    memory = _memory(alpha=1.5, beta=3.0, normalize_features=False)
    queries = torch.randn(4, 6)
    output = memory(queries, update_steps=2)
    settings = {"beta": 3.0, "alpha": 1.5, "feature_map": memory.feature_map}
    assert_close(output.retrieved, retrieve(queries, memory.memories, steps=2, **settings))
    assert_close(output.energy, energy(output.retrieved, memory.memories, **settings))
    first = memory(queries, update_steps=1).retrieved
    assert_close(output.association @ memory.memories, output.retrieved)
    assert_close(memory(first, update_steps=1).association, output.association)
    assert output.steps.tolist() == [2, 2, 2, 2]
    assert _memory(similarity="l2")(queries).energy is None
    without = memory(queries, update_steps=2, output_energies=False)
    assert without.energy is None
    assert torch.equal(without.retrieved, output.retrieved)


def test_a_tolerance_stops_each_query_by_itself():
    memory = _memory(alpha=2.0, beta=4.0)
    queries = torch.cat([memory.memories[:1] * 3, torch.randn(5, 6)])
    together = memory(queries, update_steps=50, tolerance=1e-5)
    assert len(set(together.steps.tolist())) > 1
    for i in range(6):
        alone = memory(queries[i], update_steps=50, tolerance=1e-5)
        assert alone.steps[0] == together.steps[i]
        assert_close(alone.retrieved[0], together.retrieved[i])
    assert (together.steps < 50).all()
    assert_close(memory(together.retrieved, update_steps=1).retrieved, together.retrieved, scale=10)


def test_store_append_delete():
    patterns = torch.randn(5, 3)
    memory = _memory(patterns[:3])
    memory.append(patterns[3])
    memory.append(patterns[4:])
    assert torch.equal(memory.memories, patterns)
    memory.delete([])
    memory.delete([0, -1])
    assert torch.equal(memory.memories, patterns[1:4])
    memory.delete(1)
    assert torch.equal(memory.memories, patterns[[1, 3]])
    assert len(memory) == memory.config.num_memories == 2
    with pytest.raises(IndexError, match="memory index 2 is out of range: 2 memories are stored"):
        memory.delete(2)
    patterns[1] = 0
    assert memory.memories.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_report_has_the_precision_of_its_memory(dtype):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        patterns = torch.randn(6, 5, generator=generator, dtype=torch.float64)
        margin = _memory(patterns, dtype=dtype, alpha=1.5).report().margin
        assert margin.dtype == dtype
        smallest = margin.min().item()
        if smallest > 0.01:
            # Slightly above and below the threshold of the least separated memory, by a little more
            # than rounding.
            width = 1e-9 if dtype == torch.float64 else 1e-3
            for factor, certified in ((1 + width, True), (1 - width, False)):
                torch.manual_seed(0)
                memory = _memory(patterns, dtype=dtype, alpha=1.5)
                memory.config.beta = factor * 2.0 / memory.report().margin.min().item()
                report = memory.report()
                assert bool(report.exact.all()) is certified
                assert torch.equal(report.exact, report.metastable_size == 1)


def test_indices_to_delete_are_integers():
    memory = _memory(torch.randn(3, 2))
    for wrong in (1.7, [0.0, 2.0], [True, False, True]):
        with pytest.raises(TypeError, match="indices must be integers"):
            memory.delete(wrong)
    assert len(memory) == 3


def test_patterns_that_overflow_the_dtype_are_refused():
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=3))
    with pytest.raises(ValueError, match=r"must be finite in torch\.float32, got 6"):
        memory.store(torch.full((2, 3), 1e39, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"must be finite in torch\.float16"):
        memory.half().store(torch.full((2, 3), 70000.0))


def test_two_memories_can_share_a_configuration(tmp_path):
    config = UHopMemoryConfig(pattern_dim=3)
    first, second = UHopMemoryModel(config), UHopMemoryModel(config)
    first.store(torch.randn(10, 3))
    second.store(torch.randn(4, 3))
    first.save_pretrained(tmp_path)
    assert torch.equal(UHopMemoryModel.from_pretrained(tmp_path).memories, first.memories)
    assert config.num_memories == 0


def test_a_memory_that_recalls_another_is_not_retrieved_alone():
    report = _memory(torch.tensor([[1.0, 0.0], [10.0, 1.0]]), similarity="dot").report()
    assert report.metastable_size.tolist() == [1, 1]
    assert report.alone.tolist() == [False, True]
    assert "retrieved alone       1 of 2" in str(report)


def test_nearly_dependent_memories_are_separated_by_gradients():
    independent = _digits(20)
    memory = _memory(torch.cat([independent, independent.mean(0, keepdim=True)]))
    history = memory.separate(Separation.uhop_plus(steps=30, lr=1e-2))
    assert len(history) == 31
    assert memory.feature_map.weight.abs().max() <= 1.0
    assert len(_memory(independent).separate(Separation.uhop_plus())) == 2
    assert len(_memory(independent).separate(Separation.uhop_plus(), steps=5, batch_size=10)) == 6


def test_distances_are_exact_far_from_the_origin():
    patterns = torch.rand(20, 50) + 1000.0
    assert_close(_memory(patterns, similarity="l2", beta=50.0)(patterns).association, torch.eye(20), scale=100)


def test_one_memory_is_always_retrieved():
    memory = _memory(torch.randn(1, 4))
    assert_close(memory(torch.randn(3, 4)).retrieved, memory.memories.expand(3, 4))
    report = memory.report()
    assert report.exact.all()
    assert report.confusions == []


@pytest.mark.parametrize(
    "separation",
    [None, Separation.uhop(), Separation.uhop_plus(temperature=0.1, final_temperature=None)],
    ids=["denoising", "uhop", "uhop+"],
)
def test_separation_lowers_its_loss_and_confusion(separation):
    patterns = _digits(100)
    memory = _memory(patterns)
    before = memory.report()
    # Because the scale of the U-Hop+ loss depends on the temperature, it stays constant.
    history = memory.separate(separation, steps=60, lr=1e-2)
    assert len(history) == 61
    assert history[-1] < history[0]
    after = memory.report()
    assert after.separation > before.separation
    assert len(after.confusions) < len(before.confusions)


def test_denoising_separation_improves_recall_of_corrupted_digits():
    patterns = _digits(100)
    torch.manual_seed(0)
    plain, separated = (_memory(patterns, similarity=name, alpha=1.0, beta=10.0) for name in ("cosine", "kernel"))
    separated.separate(steps=100, lr=3e-3)
    for corruption in (mask_patterns, add_noise):
        queries = corruption(patterns)
        errors = [((m(queries).retrieved - patterns) ** 2).sum(-1).mean().item() for m in (plain, separated)]
        assert errors[1] < 0.7 * errors[0]


def test_uhop_plus_reaches_the_optimum_for_independent_memories():
    memory = _memory(torch.randn(12, 30) + 2.0, feature_dim=3, normalize_features=True)
    history = memory.separate(Separation.uhop_plus())
    assert -history[-1] == pytest.approx(1 - 1 / math.sqrt(5), rel=1e-4)
    assert memory.report().separation == pytest.approx(1 - 1 / math.sqrt(5), rel=1e-4)


def test_minibatches_of_memories():
    patterns = torch.randn(300, 8) + 1.0
    memory = _memory(patterns)
    for separation in (None, Separation.uhop(), Separation.uhop_plus(temperature=0.1, final_temperature=None)):
        memory.feature_map.reset_parameters()
        history = memory.separate(separation, steps=40, lr=1e-2, batch_size=64)
        assert np.mean(history[-5:]) < np.mean(history[:5])


def test_denoising_loss_is_the_log_weight_of_the_right_memory():
    features, corrupted = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    weights = torch.stack(
        [torch.tensor(reference.entmax([10 * torch.cosine_similarity(q, f, dim=0).item() for f in features], 1.0)) for q in corrupted]
    )
    assert_close(denoising_loss(corrupted, features, temperature=0.1), -weights.diagonal().log().mean())
    assert torch.autograd.gradcheck(denoising_loss, (corrupted.requires_grad_(), features.requires_grad_()))


def test_without_steps_the_loss_is_that_at_the_first_temperature():
    phi, memories = FeatureMap(6, normalize=True), torch.randn(5, 6)
    expected = separation_loss(phi(memories), kind="per_memory", temperature=0.25)
    (loss,) = maximize_separation(phi, memories, Separation.uhop_plus(), steps=0)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_denoising_loss_of_sets_of_different_sizes():
    features, corrupted = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    absent = ~mask.unsqueeze(-1)
    features, corrupted = (each.masked_fill(absent, math.nan).requires_grad_() for each in (features, corrupted))
    loss = denoising_loss(corrupted, features, mask=mask)
    expected = (5 * denoising_loss(corrupted[0], features[0]) + 2 * denoising_loss(corrupted[1, :2], features[1, :2])) / 7
    assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, (corrupted, features))
    for gradient, known in zip(gradients, torch.autograd.grad(expected, (corrupted, features)), strict=True):
        assert_close(gradient, known.masked_fill(absent, 0.0))
    assert denoising_loss(corrupted[2], features[2], mask=mask[2]) == 0
    assert denoising_loss(features[0, :0], features[0]) == 0
    assert_close(denoising_loss(corrupted[0, :3], features[0], mask=mask[0]), denoising_loss(corrupted[0, :3], features[0]))


def test_corruptions():
    patterns = torch.rand(50, 200) + 0.5
    masked = mask_patterns(patterns, 0.3)
    assert set((masked / patterns).unique().tolist()) <= {0.0, 1.0}
    assert abs((masked == 0).float().mean() - 0.3) < 0.02
    noisy = add_noise(patterns, 0.7)
    assert_close((noisy - patterns).norm(dim=-1), 0.7 * patterns.norm(dim=-1), scale=100)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert torch.equal(*(mask_patterns(patterns, generator=g) for g in generators))
    for wrong in (lambda: mask_patterns(patterns, 1.5), lambda: add_noise(patterns, -1.0)):
        with pytest.raises(ValueError, match="must"):
            wrong()


def test_report():
    memory = _memory(_digits(30), alpha=1.5, beta=3.0)
    report = memory.report()
    frame = report.to_dataframe()
    assert frame["margin"].tolist() == pytest.approx(report.margin.tolist())
    assert len(frame) == 30
    output = memory(memory.memories)
    assert_close(report.weight, output.association.diagonal())
    assert torch.equal(report.exact, report.metastable_size == 1)
    for mine, other, weight in report.confusions:
        assert output.association[mine, other].item() == pytest.approx(weight)
    assert len(report.confusions) == int((output.association.fill_diagonal_(0) > 0.01).sum())
    assert "30 memories at beta=3, alpha=1.5" in str(report)
    axis = report.plot()
    assert axis.get_ylabel() == "margin"
    assert len(axis.patches) == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_saves_and_loads_with_its_memories(tmp_path, dtype):
    memory = _memory(dtype=dtype, alpha=1.3, feature_dim=9)
    queries = torch.randn(3, 6)
    expected = memory(queries).retrieved
    memory.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for loaded in (UHopMemoryModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is UHopMemoryModel
        assert loaded.memories.dtype == dtype
        assert torch.equal(loaded.memories, memory.memories)
        assert torch.equal(loaded(queries).retrieved, expected)


def test_a_bad_field_is_refused_on_load_too(tmp_path):
    _memory().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="beta must be positive and finite, got -1"):
        UHopMemoryModel.from_pretrained(tmp_path, beta=-1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["kernel", "dot"])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_a_report_checks_theory_by_retrieving(dtype, similarity, alpha):
    verified = 0
    for seed in range(10):
        torch.manual_seed(seed)
        memory = _memory(torch.randn(2 + 4 * seed, 32), similarity=similarity, alpha=alpha, dtype=dtype)
        for memory.config.beta in (0.1, 1.0, 5.0, 50.0):
            report = memory.report()
            assert report.certificate_failures == []
            assert report.within_bound is None if alpha > 1.0 else report.within_bound.all()
            verified += int(report.exact.sum())
    assert (verified > 0) == (alpha > 1.0)
    assert "all errors within bound (1.3)" in str(report) or alpha > 1.0
    assert "all certificates verified by retrieving" in str(report) or alpha == 1.0


def test_tens_of_thousands_of_memories_are_separated_in_batches():
    memory = _memory(torch.randn(20_000, 16), feature_dim=8, normalize_features=True)
    history = memory.separate(Separation.uhop_plus(steps=3))
    assert len(history) == 4
    assert all(math.isfinite(loss) for loss in history)
    memory.separate(steps=3)


def test_a_report_of_queries():
    memory = _memory(torch.eye(4) * 3.0, similarity="dot", alpha=2.0, beta=1.0)
    report = memory.report(torch.tensor([[3.0, 0, 0, 0], [1.0, 1.0, 0, 0], [1.0, 1.0, 1.0, 1.0]]))
    assert report.query_metastable_size.tolist() == [1, 2, 4]
    assert "1 (1), 2 (1), 4 (1)" in str(report)
    assert len(report.to_dataframe()) == 4
    assert "smallest margins first" in str(report)


def test_an_optimal_code_in_half_precision():
    memory = _memory(torch.rand(12, 30) - 0.5, feature_dim=3, dtype=torch.bfloat16)
    assert len(memory.separate(Separation.uhop_plus())) == 2
    assert memory.report().separation == pytest.approx(1 - 1 / math.sqrt(5), abs=0.03)


def test_large_scores_in_fp16():
    patterns = 20.0 * torch.randn(8, 16)
    weights = _memory(patterns, similarity="dot", dtype=torch.float16, beta=50.0)(patterns).association
    assert_close(weights, torch.eye(8))


def test_a_report_names_contradictions_of_the_theory():
    report = _memory(torch.eye(4), alpha=1.0, beta=100.0).report()
    wrong = dataclasses.replace(report, error=torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert "errors of memories [1] exceed bound (1.3)" in str(wrong)
    report = _memory(torch.eye(4), alpha=2.0, beta=100.0).report()
    wrong = dataclasses.replace(report, metastable_size=torch.tensor([1, 1, 1, 2]))
    assert "certificates of memories [3] failed" in str(wrong)
    assert "no bound and no certificate applies" in str(_memory(torch.eye(4), alpha=2.0, beta=0.1).report())


def test_a_report_says_which_bounds_are_vacuous():
    patterns = torch.cat([torch.eye(4), torch.eye(4)[:1] + 0.02])
    report = _memory(patterns, similarity="dot", alpha=1.0, beta=20.0).report()
    limit = 2.0 * patterns.norm(dim=-1).max()
    assert torch.equal(report.vacuous, report.error_bound >= limit)
    assert report.vacuous.tolist() == [True, False, False, False, True]
    rows = {int(line.split()[0]): line.split()[-1] for line in str(report).splitlines()[-5:]}
    assert [rows[index] == "vacuous" for index in range(5)] == report.vacuous.tolist()
    assert float(rows[1]) == pytest.approx(report.error_bound[1].item(), rel=1e-3)
    sparse = _memory(patterns, similarity="dot", alpha=1.5, beta=20.0).report()
    assert sparse.vacuous.all()
    assert "bound (1.3)" not in str(sparse).splitlines()[-6]


def test_equal_memories_are_reported():
    patterns = torch.randn(4, 3)
    patterns[3] = patterns[1]
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=3))
    with pytest.warns(UserWarning, match=r"1 memories equal an earlier one; pairs \(first, later\): \[\(1, 3\)\]"):
        memory.store(patterns)
    assert memory.report().duplicates == [(1, 3)]


def test_zero_vectors_and_integers_have_defined_results():
    memory = _memory(torch.tensor([[0, 0], [3, 4]]))
    assert memory.memories.dtype == torch.float32
    output = memory(torch.zeros(1, 2))
    assert_close(output.association, [[0.5, 0.5]])
    assert_close(memory(torch.tensor([6, 8])).association.sum(), 1.0)


@given(patterns=arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-100, 100, width=32)))
def test_any_finite_patterns_can_be_stored_and_retrieved(patterns):
    patterns = torch.from_numpy(patterns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = _memory(patterns, beta=5.0)
    output = memory(patterns, update_steps=2)
    assert output.retrieved.isfinite().all()
    assert_close(output.association.sum(-1), torch.ones(len(patterns)))


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 5)),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    count=st.integers(1, 4),
    data=st.data(),
)
def test_patterns_that_are_not_finite_are_refused(shape, bad, count, data):
    patterns = torch.randn(shape)
    places = data.draw(st.lists(st.integers(0, patterns.numel() - 1), min_size=1, max_size=count, unique=True))
    patterns.view(-1)[places] = bad
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=shape[1]))
    message = rf"must be finite in torch.float32, got {len(places)} entries that are not"
    for refused in (memory.store, memory.append):
        with pytest.raises(ValueError, match="patterns " + message):
            refused(patterns)
    memory.store(torch.ones(1, shape[1]))
    with pytest.raises(ValueError, match="queries " + message):
        memory(patterns)
    assert len(memory) == 1


@given(
    patterns=arrays(
        st.sampled_from([np.int8, np.int32, np.int64, np.uint8]), st.tuples(st.integers(1, 5), st.just(4)), elements=st.integers(0, 100)
    ),
    similarity=st.sampled_from(SIMILARITIES),
)
def test_integer_patterns_are_accepted(patterns, similarity):
    integers = torch.from_numpy(patterns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = _memory(integers, similarity=similarity, degree=2, normalize_features=True)
    assert torch.equal(memory.memories, integers.float())
    assert torch.equal(memory(integers).association, memory(integers.float()).association)
    # Zero vectors have no direction, but retrieval with them is defined.
    assert memory(torch.zeros(1, 4)).retrieved.isfinite().all()


@given(count=st.integers(1, 6), repeated=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_duplicates_are_named(count, repeated):
    patterns = torch.randn(count, 3)
    repeated = [index % count for index in repeated]
    expected = [(index, count + place) for place, index in enumerate(repeated)]
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=3))
    with pytest.warns(
        UserWarning,
        match=rf"{len(expected)} memories equal an earlier one; pairs \(first, later\): \[\({expected[0][0]}, {expected[0][1]}\)",
    ):
        memory.store(torch.cat([patterns, patterns[repeated]]))
    assert sorted(memory.report().duplicates) == sorted(expected)


@given(width=st.integers(1, 6), given_width=st.integers(1, 6), rows=st.integers(0, 3))
def test_a_wrong_width_is_refused(width, given_width, rows):
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=width))
    if width == given_width:
        memory.store(torch.randn(rows, given_width))
        assert len(memory) == rows
    else:
        with pytest.raises(ValueError, match=rf"patterns must have shape \(N, {width}\) or \({width},\), got \({rows}, {given_width}\)"):
            memory.store(torch.randn(rows, given_width))


def test_an_empty_memory_refuses_calls():
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=3))
    assert len(memory) == 0
    with pytest.raises(ValueError, match="at least one pattern to retrieve from, got 0"):
        memory(torch.randn(2, 3))
    with pytest.raises(ValueError, match="at least two memories, got 0"):
        memory.separate()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (torch.tensor([[1.0, torch.nan, 0.0]]), "must be finite in .* got 1 entries"),
        (torch.tensor([[1.0, torch.inf, -torch.inf]]), "must be finite in .* got 2 entries"),
        (torch.randn(2, 4), r"must have shape \(N, 3\) or \(3,\), got \(2, 4\)"),
        (torch.randn(2, 2, 3), "must have shape"),
        (torch.randn(3), r"must have shape \(M, 3\)"),
    ],
)
def test_bad_patterns_are_refused_and_stored_patterns_are_kept(patterns, message):
    memory = _memory(torch.randn(4, 3))
    kept = memory.memories.clone()
    with pytest.raises(ValueError, match=message):
        memory.store(patterns)
    assert torch.equal(memory.memories, kept)
    if patterns.dim() != 1:
        with pytest.raises(ValueError, match="must"):
            memory(patterns)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: _memory(similarity="dot").separate(),
        lambda: _memory().separate(kind="magic"),
        lambda: _memory().separate(lr=-1.0),
        lambda: _memory()(torch.randn(2, 6), update_steps=0),
        lambda: _memory(similarity="l2").report(),
        lambda: maximize_separation(_memory().feature_map, torch.randn(4, 6), batch_size=1),
        lambda: maximize_separation(_memory().feature_map, torch.randn(4, 6), kind="denoising", mask=torch.ones(4, 4) > 0),
        lambda: denoising_loss(torch.randn(2, 2), torch.randn(2, 2), temperature=0.0),
    ],
)
def test_bad_calls_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must|needs|has no"):
        wrong()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.5}, "alpha must lie"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"pattern_dim": 0}, "pattern_dim must be at least 1"),
        ({"num_memories": -1}, "num_memories must be at least 0"),
        ({"degree": 0}, "degree must be at least 1"),
        ({"update_steps": 0}, "update_steps must be at least 1"),
        ({"feature_dim": 0}, "feature_dim must be at least 1"),
    ],
)
def test_a_bad_configuration_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UHopMemoryConfig(**fields)


@pytest.mark.parametrize(
    "change",
    [
        {"feature_dim": 9},
        {"similarity": "dot"},
        {"feature_init": "identity"},
        {"normalize_features": False},
        {"alpha": 1.0},
        {"beta": 2.0},
        {"update_steps": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_what_is_retrieved(change):
    queries = torch.randn(3, 6)
    torch.manual_seed(4)
    plain = _memory()(queries).retrieved
    torch.manual_seed(4)
    assert not torch.allclose(_memory(**change)(queries).retrieved, plain, atol=1e-5)


def test_the_configuration_may_ask_for_a_tuple():
    memory = _memory(return_dict=False)
    assert memory.report(memory.memories[:2]).query_metastable_size.shape == (2,)
    queries = torch.randn(2, 6)
    retrieved, *_ = memory(queries)
    assert torch.equal(retrieved, memory(queries, return_dict=True).retrieved)


@pytest.mark.parametrize("size", [1e19, 1e30, 3e37, 1e-19, 1e-30])
@pytest.mark.parametrize("similarity", ["kernel", "cosine"])
def test_directions_do_not_depend_on_norms(size, similarity):
    memory = _memory(similarity=similarity, beta=3.0)
    queries = torch.randn(4, 6)
    expected = memory(queries, update_steps=2)
    margin = None if similarity == "cosine" else memory.report().margin
    memory.store(size * memory.memories)
    actual = memory(size * queries, update_steps=2)
    assert_close(actual.association, expected.association)
    assert_close(actual.retrieved / size, expected.retrieved, scale=3)
    if margin is not None:
        report = memory.report()
        assert_close(report.margin, margin)
        assert report.error.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("similarity", ["dot", "l2", "manhattan", "polynomial"])
def test_scores_that_overflow_their_dtype_are_those_of_double_precision(dtype, similarity):
    size = 2e4 if dtype == torch.float16 else 1e25
    patterns = (size * torch.nn.functional.normalize(torch.randn(7, 6), dim=-1)).to(dtype)
    memory = _memory(patterns, dtype=dtype, similarity=similarity, beta=1e-6)
    wide = _memory(patterns.double(), dtype=torch.float64, similarity=similarity, beta=1e-6)
    queries = (patterns * 0.9).flip(0)
    actual, expected = memory(queries), wide(queries.double())
    assert actual.association.dtype == dtype
    assert_close(actual.association, expected.association)
    assert_close(actual.retrieved.double() / size, expected.retrieved / size, dtype=dtype)
    if similarity == "dot":
        assert_close(actual.energy.double() / size**2, expected.energy / size**2, dtype=torch.float32)
        assert_close(memory.report().margin.double() / size**2, wide.report().margin / size**2, dtype=torch.float32, scale=3)


def test_small_patterns_work_with_polynomial_weights():
    patterns = torch.randn(7, 6)
    expected = _memory(patterns, similarity="polynomial", beta=1.0, degree=3)(patterns).association
    assert_close(_memory(1e-30 * patterns, similarity="polynomial", beta=1.0, degree=3)(1e-30 * patterns).association, expected, scale=30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_noise_is_proportional_to_the_norm_of_patterns(dtype):
    for size in (1e4, 1e-6) if dtype == torch.float16 else (1e20, 1e37, 1e-30):
        patterns = (size * torch.nn.functional.normalize(torch.randn(5, 200), dim=-1)).to(dtype)
        noise = (add_noise(patterns, 0.5).double() - patterns.double()) / size
        assert_close(noise.norm(dim=-1), torch.full((5,), 0.5), dtype=dtype, scale=100)
    with pytest.raises(ValueError, match=r"patterns with noise must be finite in"):
        add_noise(torch.full((50, 3), torch.finfo(dtype).max, dtype=dtype), 10.0)


def test_values_beyond_the_dtype_are_named():
    memory = _memory(1e5 * torch.randn(7, 6), similarity="dot").half()
    with pytest.raises(ValueError, match=r"memories must be finite in torch.float16, got \d+ entries that are not"):
        memory(torch.randn(2, 6))
    plain = _memory(3e38 * torch.ones(2, 6).tril(), normalize_features=False)
    torch.nn.init.ones_(plain.feature_map.weight)
    with pytest.raises(
        ValueError, match=r"features of memories must be finite in torch.float32, but the feature map returned infinite or NaN values"
    ):
        plain(torch.ones(1, 6))
    tiny = _memory(1e-40 * torch.randn(7, 6), normalize_features=False)
    with pytest.raises(ValueError, match=r"the gradient of the separation loss must be finite"):
        tiny.separate(steps=2)
    with pytest.raises(ValueError, match=r"leaves the range of torch.float32"):
        _memory(1e-42 * torch.randn(5, 6)).separate(Separation.uhop_plus())


@pytest.mark.parametrize("wrong", [np.zeros((2, 6), np.float32), [[0.0] * 6], None])
def test_inputs_that_are_not_tensors_are_named(wrong):
    memory = _memory()
    for name, call in (("patterns", memory.store), ("patterns", memory.append), ("queries", memory), ("queries", memory.search)):
        with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got (numpy.ndarray|builtins.list|None)"):
            call(wrong)
    tensor = torch.ones(2, 6)
    functions: tuple[Callable[[], object], ...] = (
        lambda: retrieve(wrong, tensor, beta=1.0),
        lambda: energy(tensor, wrong, beta=1.0),
        lambda: association(wrong, tensor, beta=1.0),
        lambda: similarity_scores(tensor, wrong),
        lambda: separation_loss(wrong),
        lambda: denoising_loss(tensor, wrong),
        lambda: maximize_separation(FeatureMap(6), wrong),
        lambda: add_noise(wrong),
        lambda: mask_patterns(wrong),
    )
    for function in functions:
        with pytest.raises(TypeError, match=r"must be a torch.Tensor, got"):
            function()
    if wrong is not None:
        with pytest.raises(TypeError, match=r"mask must be a torch.Tensor"):
            separation_loss(tensor, mask=wrong)


class Wrapper(torch.nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.inner = memory


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("held", "given"), [(0, 5), (3, 5), (5, 5), (5, 0)])
def test_a_state_dict_of_another_number_of_memories_loads(tmp_path, options, nested, held, given):
    first, second = _memory(torch.randn(given, 6)), _memory(torch.randn(held, 6))
    queries = torch.randn(2, 6)
    if held > 0:
        second(queries)
    target = Wrapper(second) if nested else second
    target.load_state_dict((Wrapper(first) if nested else first).state_dict(), **options)
    assert torch.equal(second.memories, first.memories)
    assert second.config.num_memories == len(second) == given
    if given > 0:
        assert torch.equal(second(queries).retrieved, first(queries).retrieved)
        second.save_pretrained(tmp_path)
        assert torch.equal(UHopMemoryModel.from_pretrained(tmp_path).memories, first.memories)


def test_a_state_dict_of_another_width_is_refused():
    memory = _memory()
    kept = memory.memories.clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for memories: .*\[5, 4\].*\[7, 6\]"):
        memory.load_state_dict(_memory(torch.randn(5, 4)).state_dict())
    assert torch.equal(memory.memories, kept)
    assert memory.config.num_memories == 7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("used", [False, True])
def test_a_traced_memory_computes_its_features(used):
    memory = _memory(return_dict=False, alpha=1.5).requires_grad_(False)
    if used:
        memory(torch.randn(2, 6))
    traced = torch.jit.trace(memory, torch.randn(2, 6))
    for module in (traced, memory):
        module.feature_map.weight.copy_(torch.arange(36.0).sin().view(6, 6))
    queries = torch.randn(5, 6)
    # Retrieved patterns, weights and energies.
    for actual, expected in list(zip(traced(queries), memory(queries), strict=True))[:3]:
        assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("similarity", "alpha"), [("kernel", 1.0), ("kernel", 1.5), ("cosine", 1.3), ("polynomial", 1.0), ("l2", 1.0)])
def test_a_memory_exports_to_onnx_through_torchscript(tmp_path, similarity, alpha):
    memory = _memory(return_dict=False, similarity=similarity, alpha=alpha, beta=2.0, update_steps=1).requires_grad_(False)
    path = str(tmp_path / "memory.onnx")
    settings = {"input_names": ["queries"], "dynamic_axes": {"queries": {0: "queries"}}}
    torch.onnx.export(memory, (torch.randn(3, 6),), path, dynamo=False, opset_version=18, **settings)
    queries = torch.randn(5, 6)
    outputs = onnxruntime.InferenceSession(path).run(None, {"queries": queries.numpy()})
    assert_close(torch.from_numpy(outputs[0]), memory(queries)[0], scale=3)
    assert_close(torch.from_numpy(outputs[1]), memory(queries)[1], scale=3)
