"""Tests of simplex_map and simplex_conjugate against loops, entmax, softmax and autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from modeling_uhop import simplex_conjugate, simplex_map
from tests import reference
from tests.conftest import TOLERANCE, assert_close


ALPHAS = [1.0, 1.05, 1.25, 1.5, 1.75, 1.95, 2.0]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_map_and_conjugate_equal_the_loops(alpha, size):
    scores = 3.0 * torch.randn(5, size, dtype=torch.float64)
    weights = np.stack([reference.entmax(row.tolist(), alpha) for row in scores])
    conjugates = np.array([reference.conjugate(row.tolist(), alpha) for row in scores])
    assert_close(simplex_map(scores, alpha), weights)
    assert_close(simplex_conjugate(scores, alpha), conjugates)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_map_equals_the_entmax_library_in_every_dtype(alpha, dtype):
    entmax = pytest.importorskip("entmax")
    scores = (2.0 * torch.randn(4, 3, 65)).to(dtype)
    wide = scores.double()
    libraries = {1.0: torch.softmax, 1.5: entmax.entmax15, 2.0: entmax.sparsemax}
    if alpha in libraries:
        expected = libraries[alpha](wide, dim=-1)
    else:
        expected = entmax.entmax_bisect(wide, alpha, dim=-1, n_iter=80)
    weights = simplex_map(scores, alpha)
    assert weights.dtype == dtype
    assert_close(weights, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_fp32_weights_are_within_rounding_of_float64(alpha):
    scores = torch.randn(200, 129) * 4
    difference = simplex_map(scores, alpha).double() - simplex_map(scores.double(), alpha)
    assert difference.abs().max() < 5e-7


@pytest.mark.parametrize("alpha", [1.05, 1.5, 1.9, 2.0])
@pytest.mark.parametrize(
    "scores",
    [
        torch.linspace(0, -2, 4096),
        1e-3 * torch.rand(4096, generator=torch.Generator().manual_seed(1)),
        torch.cat([torch.zeros(1), torch.full((4095,), -1.9)]),
        0.1 * torch.randn(16384, generator=torch.Generator().manual_seed(1)),
        torch.randn(64, generator=torch.Generator().manual_seed(1)) * 1e4,
        torch.zeros(33),
        1e4 + torch.randn(64, generator=torch.Generator().manual_seed(1)),
    ],
    ids=["linear", "near-uniform", "edge", "narrow", "huge", "ties", "offset"],
)
def test_the_threshold_is_exact_for_ties_and_extreme_scores(alpha, scores):
    entmax = pytest.importorskip("entmax")
    scores = scores.double()
    expected = entmax.entmax_bisect(scores - scores.max(), alpha, n_iter=100)
    assert_close(simplex_map(scores, alpha), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.3])
def test_any_axis_can_become_the_distribution(dim, alpha):
    scores = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = simplex_map(scores.movedim(dim, -1), alpha).movedim(-1, dim)
    assert_close(simplex_map(scores, alpha, dim=dim), expected)
    assert_close(simplex_conjugate(scores, alpha, dim=dim), simplex_conjugate(scores.movedim(dim, -1), alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_of_scores_pass_gradcheck_twice(alpha):
    scores = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: simplex_map(z, alpha), (scores,))
    assert torch.autograd.gradgradcheck(lambda z: simplex_map(z, alpha), (scores,))
    assert torch.autograd.gradcheck(lambda z: simplex_conjugate(z, alpha), (scores,))


def test_a_tensor_alpha_has_its_exact_gradient():
    scores = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([[1.02], [1.3], [1.5], [1.9]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(simplex_map, (scores, alpha))
    assert torch.autograd.gradcheck(simplex_conjugate, (scores, alpha))


@pytest.mark.parametrize("at", [1.0, 1.0 + 1e-6, 2.0])
def test_the_gradient_of_alpha_holds_at_the_ends_of_its_range(at):
    scores = torch.randn(3, 8, dtype=torch.float64)
    alpha = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (conjugate,) = torch.autograd.grad(simplex_conjugate(scores, alpha).sum(), alpha)
    step = 1e-5 if at < 1.5 else -1e-5
    close = [simplex_conjugate(scores, torch.tensor(at + k * step, dtype=torch.float64)).sum() for k in range(3)]
    torch.testing.assert_close(conjugate, (-3 * close[0] + 4 * close[1] - close[2]) / (2 * step), atol=1e-6, rtol=1e-5)
    single = torch.tensor(at, requires_grad=True)
    (coarse,) = torch.autograd.grad(simplex_conjugate(scores.float(), single).sum(), single)
    assert_close(coarse, conjugate, scale=10)


@pytest.mark.parametrize("at", [1.0, 1.0 + 1e-6, 2.0])
def test_the_weights_gradient_of_alpha_holds_at_the_ends_of_its_range(at):
    scores = torch.randn(3, 8, dtype=torch.float64)
    target = torch.randn(3, 8, dtype=torch.float64)
    alpha = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (simplex_map(scores, alpha) * target).sum().backward()
    step = 1e-5 if at < 1.5 else -1e-5
    near = [(simplex_map(scores, torch.tensor(at + k * step, dtype=torch.float64)) * target).sum() for k in range(3)]
    difference = (-3 * near[0] + 4 * near[1] - near[2]) / (2 * step)
    assert alpha.grad is not None
    torch.testing.assert_close(alpha.grad, difference, atol=1e-6, rtol=1e-5)


def test_a_tensor_alpha_equals_the_same_float():
    scores = torch.randn(4, 9, dtype=torch.float64)
    for alpha in ALPHAS:
        assert_close(simplex_map(scores, torch.tensor(alpha, dtype=torch.float64)), simplex_map(scores, alpha))


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_the_conjugate_has_the_map_as_its_gradient(alpha):
    scores = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(simplex_conjugate(scores, alpha).sum(), scores)
    assert_close(gradient, simplex_map(scores, alpha))


def test_the_conjugate_equals_the_papers_closed_forms():
    scores = torch.randn(5, 7, dtype=torch.float64)
    weights = simplex_map(scores, 2.0)
    sparse = 0.5 * scores.square().sum(-1) - 0.5 * (weights - scores).square().sum(-1) + 0.5
    assert_close(simplex_conjugate(scores, 2.0), sparse)
    assert_close(simplex_conjugate(scores, 1.0), scores.logsumexp(-1))


@given(
    scores=arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 20)), elements=st.floats(-50, 50)),
    alpha=st.floats(1.0, 2.0),
    shift=st.floats(-10, 10),
)
def test_weights_are_a_distribution_in_the_order_of_the_scores(scores, alpha, shift):
    scores = torch.from_numpy(scores)
    weights = simplex_map(scores, alpha)
    assert (weights >= 0).all()
    assert_close(weights.sum(-1), torch.ones(len(scores)))
    ordered = weights.gather(-1, scores.argsort(-1))
    assert (ordered.diff(dim=-1) >= -TOLERANCE[torch.float64]).all()
    assert_close(simplex_map(scores + shift, alpha), weights, scale=100)


@given(alpha=st.floats(1.0, 2.0), size=st.integers(2, 12), seed=st.integers(0, 1000))
def test_an_absent_item_has_no_influence(alpha, size, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=generator, dtype=torch.float64)
    mask = torch.rand(size, generator=generator) < 0.6
    mask[0] = True
    poisoned = torch.where(mask, scores, torch.nan).requires_grad_()
    weights = simplex_map(poisoned, alpha, mask=mask)
    assert (weights[~mask] == 0).all()
    assert_close(weights[mask], simplex_map(scores[mask], alpha))
    assert torch.equal(weights, simplex_map(torch.where(mask, scores, 1e6), alpha, mask=mask))
    (weights * torch.arange(size)).sum().backward()
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[~mask] == 0).all()
    assert_close(simplex_conjugate(poisoned, alpha, mask=mask), simplex_conjugate(scores[mask], alpha))


@pytest.mark.parametrize("alpha", [1.0, 1.4, 1.5, 2.0])
def test_a_row_without_items_is_zero_with_zero_gradient(alpha):
    scores = torch.randn(3, 5, requires_grad=True)
    mask = torch.tensor([[True], [False], [True]]).expand(3, 5)
    weights = simplex_map(scores, alpha, mask=mask)
    conjugate = simplex_conjugate(scores, alpha, mask=mask)
    assert (weights[1] == 0).all()
    assert conjugate[1] == 0
    (weights.square().sum() + conjugate.sum()).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert (scores.grad[1] == 0).all()
    assert simplex_map(torch.randn(2, 0), alpha).shape == (2, 0)
    assert torch.equal(simplex_conjugate(torch.randn(2, 0), alpha), torch.zeros(2))
    all_absent = torch.full((2, 4), -torch.inf)
    assert torch.equal(simplex_map(all_absent, alpha), torch.zeros(2, 4))


@pytest.mark.parametrize("alpha", [0.5, 2.5, float("nan"), torch.tensor(0.9), torch.tensor([1.5, 3.0]).view(2, 1)])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[1, 2\]"):
        simplex_map(torch.randn(2, 3), alpha)


def test_alpha_must_be_one_value_a_row():
    with pytest.raises(ValueError, match="size 1 along dim -1"):
        simplex_map(torch.randn(2, 3), torch.full((2, 3), 1.5))


@pytest.mark.trains
@pytest.mark.parametrize("alpha", [1.0, 1.5, 1.3])
def test_it_compiles_without_a_graph_break(alpha):
    compiled = torch.compile(lambda z: simplex_map(z, alpha), fullgraph=True, backend="aot_eager")
    scores = torch.randn(4, 9, requires_grad=True)
    assert_close(compiled(scores), simplex_map(scores, alpha))
    (expected,) = torch.autograd.grad(simplex_map(scores, alpha).square().sum(), scores)
    (gradient,) = torch.autograd.grad(compiled(scores).square().sum(), scores)
    assert_close(gradient, expected)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("items", [5, 9, 17, 64, 600])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_is_nan_and_the_others_are_not(alpha, items, bad):
    scores = torch.randn(4, items)
    expected = simplex_map(scores, alpha)
    scores[1, -1] = bad
    weights = simplex_map(scores, alpha)
    assert weights[1].isnan().all()
    others = torch.tensor([0, 2, 3])
    assert_close(weights[others], expected[others])


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("items", [4, 64, 512, 1024])
@pytest.mark.parametrize("size", [1e4, 1e7, 1e14, 1e30])
def test_large_scores_are_mapped_by_their_differences(alpha, items, size):
    """Equal scores have equal weights, and scores that are too far below the largest have none."""
    scores = torch.full((3, items), -size)
    scores[1, 2] = size
    scores[2, 1:3] = 0.0
    weights = simplex_map(scores, alpha)
    assert_close(weights[0], torch.full((items,), 1.0 / items))
    assert weights[1, 2] == 1.0
    assert_close(weights[2, 1:3], [0.5, 0.5])
    assert_close(weights.sum(-1), [1.0, 1.0, 1.0], scale=2)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_large_scores_beside_nan(alpha):
    scores = torch.full((2, 600), 1e15)
    scores[0] = torch.nan
    weights = simplex_map(scores, alpha)
    assert weights[0].isnan().all()
    assert_close(weights[1], torch.full((600,), 1.0 / 600))


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0, torch.tensor(1.4)])
def test_an_empty_batch_stays_empty(alpha):
    assert simplex_map(torch.randn(0, 5), alpha).shape == (0, 5)
    assert simplex_map(torch.randn(2, 0), alpha).shape == (2, 0)
    assert simplex_conjugate(torch.randn(0, 5), alpha).shape == (0,)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("items", [65, 512, 4096])
def test_sums_are_right_to_the_rounding_of_float64(alpha, items):
    scores = torch.randn(100, items, dtype=torch.float64) * torch.logspace(-3, 1, 100).unsqueeze(-1)
    assert (simplex_map(scores, alpha).sum(-1) - 1.0).abs().max() < 1e-13


@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.7, 2.0])
@pytest.mark.parametrize("items", [5, 197, 1024])
def test_float32_weights_are_within_2e_7_of_a_float64_solution(alpha, items):
    scores = torch.randn(300, items) * torch.logspace(-2, 1, 300).unsqueeze(-1)
    error = (simplex_map(scores, alpha).double() - simplex_map(scores.double(), alpha)).abs().max()
    assert error < 2e-7
