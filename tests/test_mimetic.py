"""Tests of the mimetic initialization against the paper's equations, and where it applies."""

import numpy as np
import pytest
import torch

from modeling_uhop import HopfieldAttention, UHopViTConfig, UHopViTForImageClassification
from modeling_uhop.mimetic import mimetic_, mimetic_factors
from tests import reference
from tests.conftest import assert_close
from tests.support.models import IMAGES


WIDTHS = {"hidden_size": 24, "num_attention_heads": 3}


def _random(width: int) -> np.ndarray:
    """Z of the paper, with entries of variance 1 / width."""
    return torch.randn(width, width).double().numpy() / width**0.5


@pytest.mark.parametrize("rank", [3, 12])
@pytest.mark.parametrize(("identity", "noise"), [(0.7, 0.7), (-0.4, 0.4), (1.0, 0.0)])
def test_factors_are_the_closest_ones_to_the_matrix_of_the_paper(rank, identity, noise):
    torch.manual_seed(3)
    left, right = mimetic_factors(12, rank, identity=identity, noise=noise)
    torch.manual_seed(3)
    expected = reference.mimetic_product(_random(12), rank, identity, noise)
    if noise > 0 or rank == 12:
        assert_close(left @ right.mT, expected)
    # U and V have orthonormal columns, and S is divided equally between both factors.
    squares = left.mT @ left
    assert_close(squares, right.mT @ right)
    assert_close(squares, squares.diagonal().diag_embed())


@pytest.mark.parametrize("feature_dim", [None, 31, 10])
def test_projections_are_those_of_the_paper(feature_dim):
    layer = HopfieldAttention(UHopViTConfig(**WIDTHS, feature_dim=feature_dim))
    biases = {name: parameter.clone() for name, parameter in layer.named_parameters() if "bias" in name}
    torch.manual_seed(3)
    mimetic_(layer)
    torch.manual_seed(3)
    width = feature_dim or 24
    for head in range(3):
        rows = slice(8 * head, 8 * head + 8)
        # A linear layer multiplies rows by the transpose of its weight.
        product = layer.q_proj.weight[rows].mT @ layer.k_proj.weight[rows]
        assert_close(product, reference.mimetic_product(_random(width), 8, 0.7, 0.7))
    product = reference.mimetic_product(_random(24), 24, -0.4, 0.4)
    tokens = torch.randn(5, 24)
    assert_close(tokens @ layer.v_proj.weight.mT @ layer.o_proj.weight.mT, tokens.double().numpy() @ product, scale=3)
    assert all(torch.equal(layer.get_parameter(name), bias) for name, bias in biases.items())


def test_a_model_begins_with_it_in_every_layer_of_its_encoder():
    fields = {**IMAGES, "hidden_size": 64, "pooling": "hopfield", "initializer_range": 0.02}
    normal, mimetic = (UHopViTForImageClassification(UHopViTConfig(**fields, attention_init=each)) for each in ("normal", "mimetic"))
    for layer in mimetic.vit.layers:
        attention = layer.attention
        values = attention.o_proj.weight @ attention.v_proj.weight
        assert abs(values.diagonal().mean() + 0.4) < 0.05
        assert abs((values + 0.4 * torch.eye(64)).std() - 0.4 / 8) < 0.005
        queries = attention.q_proj.weight @ attention.feature_map.weight
        keys = attention.k_proj.weight @ attention.feature_map.weight
        for rows in (slice(0, 32), slice(32, 64)):
            # Half of the singular values of 0.7 (Z + I), the large ones, carry most of its trace.
            assert 0.35 < (queries[rows] * keys[rows]).sum(0).mean() < 0.8
        assert (attention.q_proj.bias == 0).all()
    first, second = (layer.attention.v_proj.weight for layer in mimetic.vit.layers)
    assert not torch.equal(first, second)
    for one, other in ((normal, mimetic), (mimetic, normal)):
        assert abs(one.vit.pooling.attention.v_proj.weight.std() / other.vit.pooling.attention.v_proj.weight.std() - 1) < 0.1
    assert normal.vit.layers[0].attention.v_proj.weight.std() < 0.03


def test_a_loaded_model_keeps_its_weights_and_draws_only_new_layers(tmp_path):
    model = UHopViTForImageClassification(UHopViTConfig(**IMAGES))
    model.save_pretrained(tmp_path)
    loaded = UHopViTForImageClassification.from_pretrained(tmp_path, attention_init="mimetic", num_hidden_layers=3)
    for layer, kept in zip(loaded.vit.layers, model.vit.layers, strict=False):
        assert torch.equal(layer.attention.q_proj.weight, kept.attention.q_proj.weight)
        assert torch.equal(layer.attention.o_proj.weight, kept.attention.o_proj.weight)
    added = loaded.vit.layers[2].attention
    assert abs((added.o_proj.weight @ added.v_proj.weight).diagonal().mean() + 0.4) < 0.1


def test_half_precision_models_begin_with_it_too():
    model = UHopViTForImageClassification._from_config(UHopViTConfig(**IMAGES, attention_init="mimetic"), dtype=torch.bfloat16)
    attention = model.vit.layers[0].attention
    assert attention.q_proj.weight.dtype == torch.bfloat16
    assert abs((attention.o_proj.weight @ attention.v_proj.weight).float().diagonal().mean() + 0.4) < 0.1
