"""Tests of hopfield_attention and HopfieldAttention against loops, scaled_dot_product_attention and
entmax."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from modeling_uhop import (
    HopfieldAttention,
    HopfieldPooling,
    UHopMILConfig,
    UHopViTConfig,
    hopfield_attention,
    plain_hopfield_attention,
)
from modeling_uhop.attention_interface import eager_attention_forward
from tests import reference
from tests.conftest import assert_close


def _qkv(dtype=torch.float64, queries=5, keys=9):
    return (
        torch.randn(2, 3, queries, 4).to(dtype),
        torch.randn(2, 3, keys, 4).to(dtype),
        torch.randn(2, 3, keys, 6).to(dtype),
    )


def _layer(**fields) -> HopfieldAttention:
    defaults = {"hidden_size": 12, "num_attention_heads": 3, "attn_implementation": "eager", "feature_init": "normal"}
    return HopfieldAttention(UHopViTConfig(**{**defaults, **fields}))


@pytest.fixture(params=[hopfield_attention, plain_hopfield_attention], ids=["public", "plain"])
def attend(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_alpha_1_equals_scaled_dot_product_attention(dtype, scaling, attend):
    query, key, value = _qkv(dtype)
    mask = torch.rand(2, 1, 5, 9) < 0.7
    mask[..., 0] = True
    bias = torch.randn(2, 3, 5, 9).to(dtype)
    for attention_mask in (None, mask, bias):
        wide = attention_mask.double() if attention_mask is bias else attention_mask
        expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), wide, scale=scaling)
        actual = attend(query, key, value, scaling=scaling, attention_mask=attention_mask)
        assert actual.dtype == dtype
        assert_close(actual, expected, scale=3)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_alpha_above_1_equals_the_entmax_library(alpha, attend):
    entmax = pytest.importorskip("entmax")
    query, key, value = _qkv()
    scores = 0.8 * query @ key.mT
    weights = {1.5: entmax.entmax15, 2.0: entmax.sparsemax}[alpha](scores, dim=-1)
    assert_close(attend(query, key, value, alpha=alpha, scaling=0.8), weights @ value)


def test_half_precision_scores_do_not_overflow(attend):
    query = torch.full((1, 1, 3, 64), 60.0, dtype=torch.float16)
    value = torch.randn(1, 1, 3, 5, dtype=torch.float16)
    assert_close(attend(query, query, value), scaled_dot_product_attention(query, query, value))


def test_each_head_can_have_its_own_alpha(attend):
    query, key, value = _qkv()
    alphas = torch.tensor([1.0, 1.4, 2.0], dtype=torch.float64)
    together = attend(query, key, value, alpha=alphas.view(3, 1, 1))
    for head, alpha in enumerate(alphas.tolist()):
        part = slice(head, head + 1)
        assert_close(together[:, part], attend(query[:, part], key[:, part], value[:, part], alpha=alpha))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("additive", [True, False])
def test_masked_keys_have_no_influence_and_an_empty_row_is_zero(alpha, additive, attend):
    query, key, value = _qkv(torch.float32)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., 4:] = False
    mask[1] = False
    attention_mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask
    output = attend(query, key, value, alpha=alpha, attention_mask=attention_mask)
    key[0, :, 4:], value[0, :, 4:] = 7.0, -3.0
    assert torch.equal(output, attend(query, key, value, alpha=alpha, attention_mask=attention_mask))
    alone = attend(query[:1], key[:1, :, :4], value[:1, :, :4], alpha=alpha)
    assert_close(output[:1], alone)
    assert (output[1] == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5])
def test_gradients(alpha, attend):
    tensors = [tensor[:1, :1, :4].requires_grad_() for tensor in _qkv()]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, alpha=alpha), tensors)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
@pytest.mark.parametrize(
    ("heads_of_keys", "fields"),
    [(1, {}), (2, {"bias": True}), (2, {"softcap": 0.7}), (4, {"sinks": True}), (2, {"bias": True, "sinks": True})],
)
def test_grouped_queries_biases_caps_and_sinks_equal_a_loop(heads_of_keys, fields, alpha, attend):
    query = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    key, value = torch.randn(2, heads_of_keys, 6, 5, dtype=torch.float64), torch.randn(2, heads_of_keys, 6, 7, dtype=torch.float64)
    bias = torch.randn(2, 4, 3, 6, dtype=torch.float64).masked_fill(torch.rand(2, 4, 3, 6) < 0.3, -torch.inf)
    bias[1, 2, 0] = -torch.inf
    sinks = torch.tensor([0.3, -0.2, 1.0, 0.1], dtype=torch.float64)
    given = {"attention_mask": bias if fields.get("bias") else None, "sinks": sinks if fields.get("sinks") else None}
    actual = attend(query, key, value, alpha=alpha, scaling=0.6, softcap=fields.get("softcap"), **given)
    for example, head, position in np.ndindex(2, 4, 3):
        own = head // (4 // heads_of_keys)
        expected = reference.attention(
            query[example, head, position].numpy(),
            key[example, own].numpy(),
            value[example, own].numpy(),
            alpha,
            0.6,
            bias[example, head, position].tolist() if fields.get("bias") else None,
            fields.get("softcap"),
            sinks[head].item() if fields.get("sinks") else None,
        )
        assert_close(actual[example, head, position], expected, scale=10)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("sinks", [None, torch.zeros(2)])
def test_scores_beyond_the_range_of_half_precision(alpha, sinks, attend):
    query = torch.randn(1, 2, 3, 8).half() * 1e4
    key, value = torch.randn(1, 2, 5, 8).half() * 1e4, torch.randn(1, 2, 5, 4).half()
    expected = attend(query.double(), key.double(), value.double(), alpha=alpha, scaling=1.0, sinks=sinks)
    assert_close(attend(query, key, value, alpha=alpha, scaling=1.0, sinks=sinks), expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"key": np.zeros((1, 2, 5, 4))}, TypeError, "key must be a torch.Tensor, got numpy.ndarray"),
        ({"attention_mask": np.ones((1, 1, 1, 5), bool)}, TypeError, "attention_mask must be a torch.Tensor, got numpy.ndarray"),
        ({"attention_mask": torch.ones(1, 1, 1, 5, dtype=torch.long)}, ValueError, "must be boolean .* or floating .*, got torch.int64"),
        ({"alpha": "1.5"}, ValueError, r"alpha must lie in \[1, 2\], got '1.5'"),
        ({"dropout": 2.0}, ValueError, r"dropout must lie in \[0, 1\], got 2.0"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks must have one score for each of the 2 heads, got 3"),
    ],
)
def test_wrong_inputs_are_refused(given, error, message, attend):
    inputs = {"query": torch.randn(1, 2, 3, 4), "key": torch.randn(1, 2, 5, 4), "value": torch.randn(1, 2, 5, 4), "alpha": 1.5}
    with pytest.raises(error, match=message):
        attend(**{**inputs, **given})


def test_a_standalone_layer_refuses_ambiguous_inputs():
    layer, states = _layer(alpha=1.5), torch.randn(2, 5, 12)
    present = torch.rand(2, 5) < 0.6
    present[:, 0] = True
    with pytest.raises(
        ValueError, match=r"shape \(B, 1, Q, N\), got \(2, 5\); for a mask of memories \(B, N\), pass mask\[:, None, None\]"
    ):
        layer(states, attention_mask=present)
    _, weights = layer(states, attention_mask=present[:, None, None])
    assert (weights[~present[:, None, None].expand_as(weights)] == 0).all()
    for wrong in (layer, HopfieldPooling(UHopMILConfig(attn_implementation="eager"))):
        with pytest.raises(TypeError, match=r"states must be a torch.Tensor, got numpy.ndarray"):
            wrong(states.numpy())
    with pytest.raises(ValueError, match="'sdpa' does not compute alpha-entmax"):
        _layer(alpha=1.5, attn_implementation="sdpa")(states)


def test_numbers_of_heads_that_are_not_multiples_are_refused(attend):
    query, key = torch.randn(1, 3, 5, 4), torch.randn(1, 2, 6, 4)
    for alpha in (1.0, 1.5):
        with pytest.raises(ValueError, match="multiple of the heads of keys, got 3 and 2"):
            attend(query, key, key, alpha=alpha)


def test_eager_attention_forward_returns_output_and_weights():
    query, key, value = _qkv()
    module = torch.nn.Module()
    output, weights = eager_attention_forward(module, query, key, value, None, alpha=1.5)
    assert_close(output.transpose(1, 2), hopfield_attention(query, key, value, alpha=1.5))
    assert_close(weights @ value, output.transpose(1, 2))
    _, dropped = eager_attention_forward(module.train(), query, key, value, None, dropout=0.5)
    kept = dropped != 0
    assert 0.3 < kept.double().mean() < 0.7
    _, full = eager_attention_forward(module.eval(), query, key, value, None, dropout=0.5)
    assert_close(dropped[kept], 2 * full[kept])


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("value_source", ["memory", "projected_memory"])
@pytest.mark.parametrize("beta", [None, 3.0])
def test_the_layer_equals_the_papers_equation(alpha, value_source, beta):
    layer = _layer(alpha=alpha, value_source=value_source, beta=beta, qkv_bias=False).double()
    states = torch.randn(1, 2, 12, dtype=torch.float64)
    memories = torch.randn(1, 5, 12, dtype=torch.float64)
    wq, wk, wv, phi = (m.weight.detach().numpy() for m in (layer.q_proj, layer.k_proj, layer.v_proj, layer.feature_map))
    heads = []
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        # Because W_V of a head acts on the keys of all heads, the loop uses the whole W_K for the
        # values.
        if value_source == "memory":
            out = reference.hopfield_layer(states[0].numpy(), memories[0].numpy(), phi, wq[rows], wk[rows], wv[rows], beta or 0.5, alpha)
        else:
            out = reference.hopfield_layer(
                states[0].numpy(), memories[0].numpy(), phi, wq[rows], wk[rows], wv[rows] @ wk, beta or 0.5, alpha
            )
        heads.append(out)
    expected = layer.o_proj(torch.from_numpy(np.concatenate(heads, axis=-1)))
    output, weights = layer(states, memories)
    assert_close(output[0], expected)
    assert_close(weights.sum(-1), torch.ones(1, 3, 2))


def test_states_are_their_own_memories_by_default():
    layer = _layer(feature_dim=7)
    states = torch.randn(2, 6, 12)
    assert torch.equal(layer(states)[0], layer(states, states)[0])


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_update_steps_retrieve_in_key_space(alpha):
    layer = _layer(alpha=alpha, update_steps=3, beta=1.5)
    states = torch.randn(2, 6, 12)
    features = layer.feature_map(states)
    query, key = (p(features).unflatten(-1, (3, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    value = layer.v_proj(states).unflatten(-1, (3, 4)).transpose(1, 2)
    for _ in range(2):
        query = hopfield_attention(query, key, key, alpha=alpha, scaling=1.5)
    expected = layer.o_proj(hopfield_attention(query, key, value, alpha=alpha, scaling=1.5).transpose(1, 2).flatten(2))
    assert_close(layer(states)[0], expected)


def test_phi_could_be_folded_into_the_projections():
    layer, plain = _layer(feature_dim=20), _layer(use_feature_map=False)
    for name in ("q_proj", "k_proj"):
        getattr(plain, name).weight.data = getattr(layer, name).weight @ layer.feature_map.weight
        getattr(plain, name).bias.data = getattr(layer, name).bias
    plain.v_proj, plain.o_proj = layer.v_proj, layer.o_proj
    states = torch.randn(2, 6, 12)
    assert_close(plain(states)[0], layer(states)[0])


def test_learnable_alpha_has_the_configured_initial_value():
    layer = _layer(alpha=1.3, learnable_alpha=True)
    layer.reset_parameters()
    assert_close(layer.alpha.flatten(), torch.full((3,), 1.3))
    states = torch.randn(2, 6, 12)
    fixed = _layer(alpha=1.3)
    fixed.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "alpha_logit"})
    assert_close(layer(states)[0], fixed(states)[0])


def test_width_must_divide_into_heads():
    with pytest.raises(ValueError, match="multiple of num_attention_heads, got 12 and 5"):
        _layer(num_attention_heads=5)


def test_standalone_layers_are_initialised_as_configured():
    config = UHopMILConfig(hidden_size=12, num_attention_heads=3, alpha=1.5, learnable_alpha=True, num_queries=200)
    first, second = (torch.manual_seed(0) and HopfieldPooling(config) for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert_close(first.attention.alpha, torch.full((3, 1, 1), 1.5))
    assert 0.018 < first.queries.std() < 0.022
