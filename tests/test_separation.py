"""Tests of separation_loss against loops, with masks and gradients, and of maximize_separation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_uhop import FeatureMap, Separation, maximize_separation, separation_loss
from modeling_uhop.separation_loss import SEPARATION_KINDS
from tests import reference
from tests.conftest import assert_close


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
@pytest.mark.parametrize("t", [0.5, 2.0, 20.0])
@pytest.mark.parametrize(("memories", "width"), [(2, 1), (5, 3), (13, 8)])
def test_loss_equals_the_loops(kind, t, memories, width):
    features = torch.randn(memories, width, dtype=torch.float64)
    expected = reference.separation_loss(features.numpy(), kind, t)
    assert_close(separation_loss(features, kind=kind, temperature=1 / (2 * t)), expected)


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sets_are_averaged_in_fp32_or_better(kind, dtype):
    features = torch.randn(2, 3, 6, 5).to(dtype)
    loss = separation_loss(features, kind=kind)
    single = [reference.separation_loss(one.double().numpy(), kind, 2.0) for one in features.flatten(0, 1)]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss, sum(single) / 6)


def test_autocast_does_not_lower_its_precision():
    features = torch.randn(6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(separation_loss(features), separation_loss(features))
        inside = separation_loss(features)
    assert torch.equal(inside, separation_loss(features))


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
def test_gradients_pass_gradcheck(kind):
    features = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    assert torch.autograd.gradcheck(lambda f: separation_loss(f, kind=kind), (features,))
    assert torch.autograd.gradcheck(lambda f: separation_loss(f, kind=kind, mask=mask), (features,))


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
def test_an_absent_memory_has_no_influence_even_if_it_is_nan(kind):
    features = torch.randn(3, 6, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    poisoned = features.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    loss = separation_loss(poisoned, kind=kind, mask=mask)
    expected = [separation_loss(features[i][mask[i]], kind=kind) for i in (0, 2)]
    assert_close(loss, torch.stack(expected).mean())
    loss.backward()
    assert poisoned.grad is not None
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[~mask] == 0).all()
    assert (poisoned.grad[1] == 0).all()


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
def test_a_pair_mask_chooses_pairs(kind):
    features = torch.randn(5, 4, dtype=torch.float64)
    members = torch.tensor([True, True, False, True, False])
    pairs = members.unsqueeze(0) & members.unsqueeze(1)
    assert_close(separation_loss(features, kind=kind, mask=pairs), separation_loss(features[members], kind=kind))
    first_pair = torch.zeros(5, 5, dtype=torch.bool)
    first_pair[0, 3] = True
    cosine = torch.cosine_similarity(features[0], features[3], dim=0)
    expected = {"squared": (cosine**2 - 1) / 0.25, "per_memory": cosine / 0.25}.get(kind, (cosine - 1) / 0.25)
    assert_close(separation_loss(features, kind=kind, mask=first_pair), expected)


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
@pytest.mark.parametrize("memories", [0, 1])
def test_a_set_without_a_pair_contributes_nothing(kind, memories):
    features = torch.randn(2, memories, 3, requires_grad=True)
    loss = separation_loss(features, kind=kind)
    assert loss.item() == 0
    loss.backward()
    assert features.grad is not None
    assert (features.grad == 0).all()
    absent = torch.randn(2, 4, 3, requires_grad=True)
    loss = separation_loss(absent, kind=kind, mask=torch.zeros(2, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert absent.grad is not None
    assert (absent.grad == 0).all()


@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_the_loss_depends_only_on_directions(seed, scale):
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scales = torch.linspace(0.5, 2, 6, dtype=torch.float64).unsqueeze(-1) * scale
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    for kind in SEPARATION_KINDS:
        loss = separation_loss(features, kind=kind)
        assert_close(separation_loss(features * scales @ rotation, kind=kind), loss)
        assert_close(separation_loss(features.flip(0), kind=kind), loss)


def test_known_minima():
    axes = torch.eye(4, dtype=torch.float64)
    assert_close(separation_loss(axes, kind="squared", temperature=0.25), -4.0)
    simplex = torch.eye(4, dtype=torch.float64) - 0.25
    assert_close(separation_loss(simplex, kind="nearest", temperature=1.0), -1 / 3 - 1.0)
    assert separation_loss(simplex) < separation_loss(axes)


@pytest.mark.parametrize(
    "arguments", [{"kind": "max"}, {"temperature": 0.0}, {"temperature": -1.0}, {"mask": torch.ones(3).bool().view(1, 1, 3)}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        separation_loss(torch.randn(3, 2), **arguments)


@pytest.mark.parametrize("kind", ["average", "squared"])
def test_a_sampled_loss_is_unbiased_before_the_logarithm(kind):
    features = torch.randn(60, 5, dtype=torch.float64)
    exact = separation_loss(features, kind=kind).exp()
    drawn = torch.stack([separation_loss(features, kind=kind, sample=12).exp() for _ in range(2000)])
    error = drawn.std() / len(drawn) ** 0.5
    assert 0.0 < error < 0.01 * exact
    assert (drawn.mean() - exact).abs() < 4.0 * error


@pytest.mark.parametrize("kind", ["average", "squared", "per_memory"])
def test_a_sampled_loss_uses_that_many_memories_and_estimates_the_loss(kind):
    features = torch.randn(3, 500, 8, dtype=torch.float64, requires_grad=True)
    loss = separation_loss(features, kind=kind, sample=200)
    assert loss.item() == pytest.approx(separation_loss(features, kind=kind).item(), abs=0.1)
    (gradient,) = torch.autograd.grad(loss, features)
    assert (gradient.abs().sum(-1) > 0).sum(-1).tolist() == [200, 200, 200]
    assert_close(separation_loss(features, kind=kind, sample=500), separation_loss(features, kind=kind).item())


@pytest.mark.parametrize(
    "arguments", [{"sample": 1}, {"sample": 4, "kind": "nearest"}, {"sample": 4, "mask": torch.ones(9, dtype=torch.bool)}]
)
def test_a_sample_without_a_pair_for_the_nearest_or_with_a_mask_is_refused(arguments):
    with pytest.raises(ValueError, match="sample must be at least 2"):
        separation_loss(torch.randn(9, 3), **arguments)


@pytest.mark.parametrize("preset", [Separation.uhop, Separation.uhop_plus])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_maximize_separation_lowers_the_loss_and_changes_only_the_map(preset, optimizer):
    memories = torch.randn(12, 8) + 2.0
    phi = FeatureMap(8, 8)
    separation = preset(optimizer=optimizer, steps=30, lr=0.05)
    kind = separation.kind
    before = separation_loss(phi(memories), kind=kind, temperature=0.05)
    fall = {} if preset is Separation.uhop else {"final_temperature": 0.05}
    history = maximize_separation(phi, memories, separation, **fall)
    assert len(history) == 31
    assert separation_loss(phi(memories), kind=kind, temperature=0.05) < before - 0.1
    assert_close(phi.weight.norm(dim=-1), torch.ones(8))
    assert phi.weight.grad is None


def test_the_first_sgd_step_is_the_gradient():
    memories = torch.randn(5, 4, dtype=torch.float64)
    phi = FeatureMap(4, feature_init="normal").double()
    (gradient,) = torch.autograd.grad(separation_loss(phi(memories)), phi.weight)
    expected = phi.weight - 0.3 * gradient
    history = maximize_separation(phi, memories, steps=1, lr=0.3, optimizer="sgd")
    assert_close(phi.weight, expected / expected.norm(dim=-1, keepdim=True))
    assert history[-1] == pytest.approx(separation_loss(phi(memories)).item(), abs=1e-12)


def test_the_temperature_falls_geometrically():
    falling = Separation(temperature=0.4, final_temperature=0.1)
    assert [falling.temperature_of(step, 3) for step in range(3)] == pytest.approx([0.4, 0.2, 0.1])
    assert falling.temperature_of(0, 1) == 0.4
    assert Separation(temperature=0.4).temperature_of(2, 3) == 0.4


def test_a_refused_separation_changes_nothing():
    phi = FeatureMap(3)
    kept = phi.weight.clone()
    for arguments in ({"final_temperature": -1.0}, {"final_temperature": 0.0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=r"temperature must be (a )?positive"):
            maximize_separation(phi, torch.randn(4, 3), Separation.uhop_plus(), steps=3, **arguments)
    assert torch.equal(phi.weight, kept)
    with pytest.raises(ValueError, match="frozen"):
        maximize_separation(phi.requires_grad_(False), torch.randn(4, 3))


@pytest.mark.parametrize("arguments", [{"kind": "u-hop"}, {"optimizer": "lbfgs"}, {"steps": -1}, {"lr": -0.1}, {"lr": math.nan}])
def test_maximize_separation_refuses_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        maximize_separation(FeatureMap(3), torch.randn(4, 3), **arguments)


@pytest.mark.parametrize("mask", [torch.tensor([[False]]), torch.tensor([[[False]]])], ids=["memories", "pairs"])
def test_a_single_absent_memory_has_no_influence_even_as_nan(mask):
    features = torch.full((1, 1, 3), torch.nan, requires_grad=True)
    loss = separation_loss(features, mask=mask)
    loss.backward()
    assert loss == 0
    assert torch.equal(features.grad, torch.zeros(1, 1, 3))


@pytest.mark.parametrize("preset", [Separation.uhop, Separation.uhop_plus, Separation.denoising])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_updated_in_fp32(preset, dtype):
    phi, memories = FeatureMap(8, feature_init="orthogonal").to(dtype), torch.randn(6, 8).to(dtype)
    wide = FeatureMap(8).float()
    wide.load_state_dict(phi.state_dict())
    histories = []
    for feature_map, patterns in ((phi, memories), (wide, memories.float())):
        torch.manual_seed(0)
        histories.append(maximize_separation(feature_map, patterns, preset(), steps=20, lr=1e-2))
    assert histories[0] == histories[1]
    assert phi.weight.dtype == dtype
    assert torch.equal(phi.weight, wide.weight.to(dtype))


def test_inference_mode_is_refused():
    phi, memories = FeatureMap(8), torch.randn(6, 8)
    with torch.no_grad():
        maximize_separation(phi, memories, steps=1)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) forbids"):
        maximize_separation(phi, memories, steps=1)
