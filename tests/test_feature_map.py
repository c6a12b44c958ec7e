"""Tests of FeatureMap: initialisation, values and errors."""

import pytest
import torch

from modeling_uhop import FeatureMap
from modeling_uhop.feature_map import unit_norm
from tests.conftest import assert_close


@pytest.mark.parametrize(("pattern_dim", "feature_dim"), [(7, 7), (7, 11), (7, 3)])
def test_every_initialisation_of_the_feature_map(pattern_dim, feature_dim):
    identity = FeatureMap(pattern_dim, feature_dim, feature_init="identity")
    assert torch.equal(identity.weight, torch.eye(feature_dim, pattern_dim))
    weight = FeatureMap(pattern_dim, feature_dim, feature_init="orthogonal").weight
    gram = weight.mT @ weight if feature_dim >= pattern_dim else weight @ weight.mT
    assert_close(gram, torch.eye(min(pattern_dim, feature_dim)))
    normal = FeatureMap(400, 500, feature_init="normal").weight
    assert abs(normal.std().item() * 400**0.5 - 1.0) < 0.02


def test_an_orthogonal_initialisation_keeps_inner_products():
    phi = FeatureMap(9, 12)
    u, v = torch.randn(2, 5, 9)
    assert_close((phi(u) * phi(v)).sum(-1), (u * v).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_features_equal_the_formula(dtype):
    phi = FeatureMap(6, 4, feature_init="normal").to(dtype)
    patterns = torch.randn(2, 3, 6).to(dtype)
    expected = patterns.double() @ phi.weight.double().mT
    assert_close(phi(patterns), expected)
    phi.normalize = True
    assert_close(phi(patterns), expected / expected.norm(dim=-1, keepdim=True))


def test_normalize_rows_keeps_a_zero_row():
    phi = FeatureMap(3, 4, feature_init="identity")
    with torch.no_grad():
        phi.weight[0] *= 5
    phi.normalize_rows()
    assert_close(phi.weight.norm(dim=-1), torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_unit_norm_of_a_zero_vector_has_a_finite_gradient():
    vectors = torch.zeros(2, 3, requires_grad=True)
    unit_norm(vectors).sum().backward()
    assert vectors.grad is not None
    assert torch.equal(vectors.grad, torch.ones(2, 3))


@pytest.mark.parametrize("arguments", [{"feature_dim": 0}, {"pattern_dim": 0}, {"feature_init": "zeros"}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="must be"):
        FeatureMap(**{"pattern_dim": 3, **arguments})


def test_a_half_precision_map_can_be_initialised_as_orthogonal():
    phi = FeatureMap(8).to(torch.bfloat16)
    phi.reset_parameters()
    assert_close(phi.weight @ phi.weight.mT, torch.eye(8), scale=2)
