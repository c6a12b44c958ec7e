"""Tests of margins, bounds and certificates against loops and against retrieval."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import gamma

from modeling_uhop import association, retrieve, spherical_code
from modeling_uhop.capacity import (
    is_exactly_retrieved,
    is_well_separated,
    margins,
    metastable_sizes,
    retrieval_error_bound,
    separation_bounds,
    smallest_distance,
)
from modeling_uhop.spherical import closest_similarity
from tests.conftest import assert_close


def test_margins_equal_the_loops():
    kernel = torch.tensor([[1.0, 0.2, -0.5], [0.2, 2.0, 0.7], [-0.5, 0.7, 0.5]])
    margin, rival = margins(kernel)
    assert_close(margin, [0.8, 1.3, -0.2])
    assert rival.tolist() == [1, 2, 1]
    alone, nobody = margins(torch.ones(1, 1))
    assert alone.item() == math.inf
    assert nobody.item() == -1


@given(
    seed=st.integers(0, 10_000), beta=st.floats(0.5, 50.0), alpha=st.sampled_from([1.0, 1.5, 2.0]), radius=st.floats(0.0, 2.0) | st.none()
)
def test_the_error_bound_is_never_exceeded(seed, beta, alpha, radius):
    generator = torch.Generator().manual_seed(seed)
    memories = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    bound = retrieval_error_bound(memories, memories, beta, radius)
    radius = 0.5 * smallest_distance(memories) if radius is None else radius
    direction = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    offset = radius * torch.rand(6, 1, generator=generator, dtype=torch.float64) * direction / direction.norm(dim=-1, keepdim=True)
    error = (retrieve(memories + offset, memories, beta=beta, alpha=alpha) - memories).norm(dim=-1)
    assert (error <= bound + 1e-9).all()


@given(seed=st.integers(0, 10_000), beta=st.floats(5.0, 20.0))
def test_the_kernelized_error_bound_holds_and_is_the_formula(seed, beta):
    generator = torch.Generator().manual_seed(seed)
    memories = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    # A map with nearly orthonormal features, so that their margins are larger than their radius.
    weight = torch.linalg.pinv(memories).mT + 0.02 * torch.randn(6, 10, generator=generator, dtype=torch.float64)
    features = memories @ weight.mT
    bound = retrieval_error_bound(memories, features, beta)
    radius = 0.5 * smallest_distance(features)
    offset = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    offset *= radius * torch.rand(6, 1, generator=generator, dtype=torch.float64) / (offset @ weight.mT).norm(dim=-1, keepdim=True)
    recalled = retrieve(memories + offset, memories, beta=beta, feature_map=lambda u: u @ weight.mT)
    error = (recalled - memories).norm(dim=-1)
    assert (error <= bound + 1e-9).all()
    margin, _ = margins(features @ features.mT)
    exponent = margin - 2 * features.norm(dim=-1).max() * radius
    assert_close(bound, 2 * memories.norm(dim=-1).max() * 5 * torch.exp(-beta * exponent), scale=1e3)


def test_the_error_bound_is_equation_1_3():
    memories = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    radius = min(math.sqrt(5), math.sqrt(2), 3.0) / 2
    expected = [2 * 2.0 * 2 * math.exp(-0.7 * (delta - 2 * 2.0 * radius)) for delta in (4.0, 1.0, 1.0)]
    assert_close(retrieval_error_bound(memories, memories, 0.7), expected)
    assert_close(retrieval_error_bound(memories[:1], memories[:1], 0.7), [0.0])


@given(seed=st.integers(0, 10_000), beta=st.floats(0.5, 20.0), alpha=st.floats(1.05, 2.0))
def test_the_certificate_is_exact_in_both_directions(seed, beta, alpha):
    memories = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kernel = memories @ memories.mT
    certified = is_exactly_retrieved(kernel, beta, alpha)
    weights = association(memories, memories, beta=beta, alpha=alpha)
    exact = (weights == torch.eye(5)).all(-1)
    clear = (beta * margins(kernel)[0] * (alpha - 1) - 1).abs() > 1e-6
    assert torch.equal(certified[clear], exact[clear])


def test_softmax_retrieves_no_memory_exactly():
    assert not is_exactly_retrieved(10 * torch.eye(3), 5.0, 1.0).any()
    assert is_exactly_retrieved(torch.ones(1, 1), 5.0, 1.0).all()


@pytest.mark.parametrize(("num_memories", "dim"), [(5, 2), (12, 3), (50, 3), (24, 4), (240, 8)])
def test_separation_bounds_equal_the_formula(num_memories, dim):
    lower = 0.5 * (np.sqrt(np.pi) / num_memories * gamma((dim + 1) / 2) / gamma(dim / 2 + 1)) ** (2 / (dim - 1))
    upper = 2 * (2 * np.sqrt(np.pi) / num_memories * gamma((dim + 1) / 2) / gamma(dim / 2)) ** (1 / (dim - 1))
    assert separation_bounds(num_memories, dim) == pytest.approx((lower, upper))


@pytest.mark.parametrize(("num_memories", "dim"), [(12, 3), (24, 4), (16, 5)])
def test_optimal_codes_lie_between_the_bounds(num_memories, dim):
    lower, upper = separation_bounds(num_memories, dim)
    assert lower <= 1 - closest_similarity(spherical_code(num_memories, dim)) <= upper


def test_well_separation():
    features = torch.eye(4, dtype=torch.float64)
    needed = math.log(2 * 3 / (math.sqrt(2) / 2))
    assert is_well_separated(features, needed * 1.001)
    assert not is_well_separated(features, needed * 0.999)
    assert is_well_separated(features[:1], 0.1)


def test_metastable_sizes():
    weights = torch.tensor([[0.985, 0.01, 0.005], [0.5, 0.5, 0.0], [0.4, 0.3, 0.3]])
    assert metastable_sizes(weights, 1.0).tolist() == [1, 2, 3]
    assert metastable_sizes(weights, 1.5).tolist() == [3, 2, 3]


@pytest.mark.parametrize("arguments", [(1, 3), (3, 1)])
def test_separation_bounds_refuse_what_they_do_not_cover(arguments):
    with pytest.raises(ValueError, match="at least 2"):
        separation_bounds(*arguments)
