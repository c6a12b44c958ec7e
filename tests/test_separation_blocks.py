"""Tests of separation losses computed in blocks against losses computed from all similarities at
once."""

import pytest
import torch
from torch.nn.functional import normalize

from modeling_uhop import separation_blocks, separation_loss
from modeling_uhop.separation_loss import SEPARATION_KINDS, subsample
from tests.conftest import assert_close


@pytest.fixture(params=[3, 4, 512])
def block(request, monkeypatch):
    monkeypatch.setattr(separation_blocks, "_BLOCK", request.param)


def _loss_and_gradient(features, **options):
    features = features.detach().requires_grad_()
    loss = separation_loss(features, **options)
    return loss.detach(), torch.autograd.grad(loss, features)[0]


@pytest.mark.parametrize("temperature", [0.01, 0.25, 3.0])
@pytest.mark.parametrize("kind", SEPARATION_KINDS)
@pytest.mark.parametrize("shape", [(2, 5), (11, 3), (4, 7, 3), (2, 3, 5, 4)])
def test_loss_and_gradient(kind, temperature, shape, block):
    features = torch.randn(shape, dtype=torch.float64)
    every = torch.ones(*shape[:-1], shape[-2], dtype=torch.bool)
    blocked = _loss_and_gradient(features, kind=kind, temperature=temperature)
    plain = _loss_and_gradient(features, kind=kind, temperature=temperature, mask=every)
    for actual, expected in zip(blocked, plain, strict=True):
        assert_close(actual, expected, scale=10)


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
def test_masks_of_memories(kind, block):
    features = torch.randn(5, 9, 4, dtype=torch.float64)
    members = torch.rand(5, 9) < 0.6
    members[1], members[2] = False, torch.arange(9) == 3
    pairs = members.unsqueeze(-1) & members.unsqueeze(-2)
    features[0, ~members[0]] = torch.nan
    blocked = _loss_and_gradient(features, kind=kind, mask=members)
    plain = _loss_and_gradient(features.nan_to_num(0.0), kind=kind, mask=pairs)
    for actual, expected in zip(blocked, plain, strict=True):
        assert_close(actual, expected, scale=10)


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
def test_gradient_is_that_of_the_loss(kind, block):
    features = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: separation_loss(x, kind=kind, temperature=0.4), [features])


def test_a_second_derivative_is_refused():
    features = torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(separation_loss(features).square(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_tensor_of_the_size_of_the_pairs_is_saved():
    features = torch.randn(600, 3, requires_grad=True)
    kept: list[int] = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        separation_loss(features)
    assert max(kept) == features.numel()


def test_sampled_memories_estimate_the_mean_before_the_logarithm():
    features = normalize(torch.randn(200, 4, dtype=torch.float64), dim=-1)
    exact = separation_loss(features).exp()
    estimates = torch.stack([separation_loss(subsample(features, None, 20)[0]).exp() for _ in range(2000)])
    error = estimates.std() / len(estimates) ** 0.5
    assert (estimates.mean() - exact).abs() < 4 * error
    assert error < 0.02 * exact


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
def test_nan_is_not_hidden(kind):
    features = torch.randn(4, 3)
    features[1, 2] = torch.nan
    assert separation_loss(features, kind=kind).isnan()


@pytest.mark.parametrize("kind", SEPARATION_KINDS)
def test_without_a_gradient_the_loss_is_the_same_and_cheaper(kind, monkeypatch):
    features = torch.randn(3, 40, 6, requires_grad=True)
    calls = []
    monkeypatch.setattr(separation_blocks, "_add_to_gradient", lambda *arguments: calls.append(arguments))
    with torch.no_grad():
        loss = separation_loss(features, kind=kind)
    detached = separation_loss(features.detach(), kind=kind)
    assert not calls
    monkeypatch.undo()
    assert torch.equal(loss, separation_loss(features, kind=kind))
    assert torch.equal(loss, detached)
