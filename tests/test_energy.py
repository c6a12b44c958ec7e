"""Tests of energy and retrieval against the equations of the papers, autograd of the energy, and
the theory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_uhop import (
    FeatureMap,
    add_noise,
    association,
    denoising_loss,
    energy,
    mask_patterns,
    maximize_separation,
    retrieve,
    separation_loss,
    similarity_scores,
    simplex_map,
)
from modeling_uhop.simplex import simplex_conjugate
from tests import reference
from tests.conftest import assert_close


ALPHAS = [1.0, 1.25, 1.5, 2.0]


def _problem(seed=0, memories=7, width=5, feature_dim=6, queries=4):
    generator = torch.Generator().manual_seed(seed)
    phi = FeatureMap(width, feature_dim, feature_init="normal").double()
    with torch.no_grad():
        phi.weight.copy_(torch.randn(feature_dim, width, generator=generator, dtype=torch.float64) / width**0.5)
    stored = torch.randn(memories, width, generator=generator, dtype=torch.float64)
    return torch.randn(queries, width, generator=generator, dtype=torch.float64), stored, phi


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("beta", [0.3, 4.0])
@pytest.mark.parametrize("kernelized", [True, False])
def test_energy_and_retrieval_equal_the_loops(alpha, beta, kernelized):
    queries, memories, phi = _problem()
    phi = phi if kernelized else None
    matrix = phi.weight.detach().numpy() if phi is not None else None
    energies = [reference.energy(x, memories.numpy(), beta, alpha, matrix) for x in queries.numpy()]
    assert_close(energy(queries, memories, beta=beta, alpha=alpha, feature_map=phi), energies)
    for steps in (1, 3):
        expected = [reference.retrieve(x, memories.numpy(), beta, alpha, matrix, steps) for x in queries.numpy()]
        retrieved = retrieve(queries, memories, beta=beta, alpha=alpha, feature_map=phi, steps=steps)
        assert_close(retrieved, np.stack(expected))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_update_rule_is_a_gradient_step_on_the_energy(alpha):
    queries, memories, phi = _problem()
    queries.requires_grad_()
    (gradient,) = torch.autograd.grad(energy(queries, memories, beta=2.0, alpha=alpha, feature_map=phi).sum(), queries)
    update = retrieve(queries, memories, beta=2.0, alpha=alpha, feature_map=phi)
    kernel = phi.weight.mT @ phi.weight
    assert_close(gradient, (queries - update) @ kernel)


@given(seed=st.integers(0, 10_000), alpha=st.floats(1.0, 2.0), beta=st.floats(0.1, 20.0))
def test_energy_never_increases_during_retrieval(seed, alpha, beta):
    queries, memories, phi = _problem(seed)
    energies = [energy(queries, memories, beta=beta, alpha=alpha, feature_map=phi)]
    for _ in range(6):
        queries = retrieve(queries, memories, beta=beta, alpha=alpha, feature_map=phi)
        energies.append(energy(queries, memories, beta=beta, alpha=alpha, feature_map=phi))
    assert (torch.stack(energies).diff(dim=0) <= 1e-9).all()


@given(seed=st.integers(0, 10_000), alpha=st.floats(1.05, 2.0))
def test_a_memory_is_a_fixed_point_exactly_where_the_proof_says(seed, alpha):
    _, memories, phi = _problem(seed, memories=4, width=6)
    features = phi(memories)
    gram = features @ features.mT
    margin = (gram.diagonal() - gram.masked_fill(torch.eye(4).bool(), -torch.inf).amax(-1)).detach()
    for beta in (0.5, 2.0, 10.0):
        weights = association(memories, memories, beta=beta, alpha=alpha, feature_map=phi)
        exact = (weights == torch.eye(4)).all(-1)
        threshold = beta * margin * (alpha - 1.0)
        clear = (threshold - 1.0).abs() > 1e-6
        assert torch.equal(exact[clear], (threshold >= 1.0)[clear])


def test_each_query_can_have_its_own_beta():
    queries, memories, phi = _problem()
    betas = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    settings = {"alpha": 1.5, "feature_map": phi}
    for function in (energy, retrieve):
        alone = torch.stack([function(q[None], memories, beta=b.item(), **settings)[0] for q, b in zip(queries, betas, strict=True)])
        assert_close(function(queries, memories, beta=betas[:, None], **settings), alone)
        with pytest.raises(ValueError, match="beta must be positive"):
            function(queries, memories, beta=-betas[:, None], **settings)


@pytest.mark.parametrize(
    ("similarity", "score"),
    [
        ("kernel", lambda x, m: (x * m).sum()),
        ("dot", lambda x, m: (x * m).sum()),
        ("cosine", lambda x, m: (x * m).sum() / (x.norm() * m.norm())),
        ("l2", lambda x, m: -(x - m).norm()),
        ("manhattan", lambda x, m: -(x - m).abs().sum()),
    ],
)
def test_similarities(similarity, score):
    queries, memories, phi = _problem()
    expected = torch.stack([torch.stack([score(x, m) for m in memories]) for x in queries])
    assert_close(similarity_scores(queries, memories, similarity=similarity), expected)
    half = similarity_scores(queries.bfloat16(), memories.bfloat16(), similarity=similarity)
    assert half.dtype == torch.bfloat16
    assert_close(half, expected, scale=5)
    if similarity == "kernel":
        assert_close(similarity_scores(queries, memories, feature_map=phi), phi(queries) @ phi(memories).mT)
    else:
        with pytest.raises(ValueError, match="without a feature map"):
            similarity_scores(queries, memories, similarity=similarity, feature_map=phi)


@pytest.mark.parametrize("similarity", ["l2", "manhattan", "cosine"])
def test_distances_retrieve_the_nearest_memory_not_the_farthest(similarity):
    memories = torch.randn(6, 5)
    retrieved = retrieve(memories + 0.01, memories, beta=200.0, similarity=similarity)
    assert_close(retrieved, memories, scale=1e3)


def test_batches_and_masks():
    queries, memories = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 6, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool().unsqueeze(1)
    poisoned = memories.clone()
    retrieved = retrieve(queries, poisoned, beta=2.0, alpha=1.5, mask=mask)
    energies = energy(queries, poisoned, beta=2.0, alpha=1.5, mask=mask)
    for i in (0, 1):
        kept = memories[i][mask[i, 0]]
        assert_close(retrieved[i], retrieve(queries[i], kept, beta=2.0, alpha=1.5))
        assert_close(energies[i], energy(queries[i], kept, beta=2.0, alpha=1.5))
    assert (retrieved[2] == 0).all()
    assert association(queries, memories, beta=2.0, mask=mask)[2].sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    queries, memories = torch.randn(4, 16).to(dtype), torch.randn(5, 16).to(dtype)
    expected = retrieve(queries.double(), memories.double(), beta=0.5, alpha=1.5)
    assert_close(retrieve(queries, memories, beta=0.5, alpha=1.5), expected, scale=3)
    energies = energy(queries, memories, beta=0.5)
    assert energies.dtype == torch.float32
    assert_close(energies, energy(queries.double(), memories.double(), beta=0.5), scale=10)


@pytest.mark.parametrize(
    "arguments",
    [{"beta": 0.0}, {"beta": -1.0}, {"alpha": 0.0}, {"steps": 0}, {"similarity": "dot-product"}, {"memories": torch.empty(0, 3)}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        retrieve(**{"queries": torch.randn(2, 3), "memories": torch.randn(4, 3), "beta": 1.0, **arguments})


def test_energy_refuses_a_beta_that_is_not_positive():
    with pytest.raises(ValueError, match="beta must be positive"):
        energy(torch.randn(2, 3), torch.randn(4, 3), beta=0.0)


@pytest.mark.parametrize("similarity", ["kernel", "cosine"])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize("beta", [3.0, torch.tensor([[1.0], [5.0], [0.2]])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_without_weights_equals_the_plain_form(similarity, alpha, beta, dtype):
    """If a gradient is required, the plain form is used."""
    queries, memories = torch.randn(2, 3, 6).to(dtype), torch.randn(700, 6).to(dtype)
    beta = beta.to(dtype) if isinstance(beta, torch.Tensor) else beta
    settings = {"beta": beta, "alpha": alpha, "similarity": similarity, "steps": 2}
    plain = retrieve(queries.clone().requires_grad_(), memories, **settings)
    assert plain.requires_grad
    actual = retrieve(queries, memories, **settings)
    assert actual.dtype == dtype
    assert actual.shape == queries.shape
    assert_close(actual, plain, scale=10)


def test_torch_func_transforms_equal_the_loops():
    queries, memories = torch.randn(5, 3, 4), torch.randn(9, 4)
    for work in (lambda x: retrieve(x, memories, beta=2.0), lambda x: energy(x, memories, beta=2.0)):
        assert_close(torch.vmap(work)(queries), torch.stack([work(each) for each in queries]))
    # grad E = W^T W (x - T(x)), with W = I.
    gradient = torch.func.grad(lambda x: energy(x, memories, beta=2.0).sum())(queries[0])
    assert_close(gradient, queries[0] - retrieve(queries[0], memories, beta=2.0))


def _separated(patterns):
    phi = FeatureMap(5, feature_init="identity")
    maximize_separation(phi, patterns, steps=3, kind="denoising", corruption=lambda x: 0.5 * x)
    return phi.weight.detach()


# The function that each applies to patterns (6, 5).
_FUNCTIONS = {
    "similarity_scores": lambda x: similarity_scores(x, 0.1 * torch.ones(2, 5)),
    "energy": lambda x: energy(x, x, beta=0.1, alpha=1.5),
    "association": lambda x: association(x, x, beta=0.1, alpha=1.5),
    "retrieve": lambda x: retrieve(x, x, beta=0.1, alpha=1.5),
    "retrieve, masked": lambda x: retrieve(x, x, beta=0.1, mask=torch.arange(6) < 4),
    "retrieve from fp64": lambda x: retrieve(x, torch.eye(5).double(), beta=0.1).float(),
    "simplex_map": lambda x: simplex_map(x, 1.2),
    "softmax": lambda x: simplex_map(x, mask=torch.arange(5) < 4),
    "simplex_conjugate": lambda x: simplex_conjugate(x, 1.5),
    "separation_loss": separation_loss,
    "denoising_loss": lambda x: denoising_loss(x, x),
    "maximize_separation": _separated,
    "mask_patterns": lambda x: mask_patterns(x, generator=torch.Generator().manual_seed(0)),
    "add_noise": lambda x: add_noise(x, generator=torch.Generator().manual_seed(0)),
    "FeatureMap": FeatureMap(5, feature_init="identity", normalize=True),
}


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_integers_are_floats_and_arrays_are_refused(name):
    patterns = torch.randint(-4, 5, (6, 5), generator=torch.Generator().manual_seed(0))
    expected = _FUNCTIONS[name](patterns.double() if "fp64" in name else patterns.float())
    for integers in (patterns, patterns.to(torch.int8)):
        assert_close(_FUNCTIONS[name](integers), expected.detach(), dtype=torch.float32)
    for wrong in (patterns.numpy(), patterns.tolist()):
        with pytest.raises(TypeError, match=r"must be a torch.Tensor, got (numpy.ndarray|builtins.list); torch.as_tensor converts"):
            _FUNCTIONS[name](wrong)
