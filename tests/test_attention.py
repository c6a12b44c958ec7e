"""Tests of the chunked attention kernel against the plain kernel, and of the attention
implementation "hopfield" of transformers."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_uhop import (
    HopfieldAttention,
    STanHopConfig,
    STanHopForPrediction,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTConfig,
    UHopViTForImageClassification,
    attention_cpu,
    attention_softmax,
    plain_hopfield_attention,
)
from modeling_uhop.attention_cpu import chunked_hopfield_attention
from modeling_uhop.attention_interface import hopfield_attention_forward, triton_attention_forward
from tests.conftest import assert_close
from tests.support.models import SERIES


@pytest.fixture(params=[7, 40, 10**6], ids=["rows", "heads", "one piece"])
def piece(request, monkeypatch):
    monkeypatch.setattr(attention_cpu, "_PIECE", request.param)


def _inputs(dtype=torch.float64, queries=5, keys=9):
    shapes = ((2, 3, queries, 4), (2, 3, keys, 4), (2, 3, keys, 6))
    return [(2.0 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]


def _masks(dtype=torch.float64):
    present = torch.rand(2, 1, 5, 9) < 0.6
    present[0, 0, 2] = False
    bias = torch.randn(2, 3, 5, 9).to(dtype)
    added = bias.masked_fill(torch.rand(2, 3, 5, 9) < 0.3, -torch.inf)
    lowest = torch.zeros(2, 1, 1, 9, dtype=dtype).masked_fill(torch.rand(2, 1, 1, 9) < 0.5, torch.finfo(dtype).min)
    return {"none": None, "boolean": present, "padding": present[:, :, :1], "added": added, "lowest": lowest}


@pytest.mark.parametrize("mask", ["none", "boolean", "padding", "added", "lowest"])
@pytest.mark.parametrize("alpha", [1.0001, 1.3, 1.5, 2.0, "heads"])
def test_outputs_and_gradients_are_those_of_the_plain_kernel(alpha, mask, piece):
    inputs = _inputs()
    attention_mask = _masks()[mask]
    if alpha == "heads":
        alpha = torch.tensor([1.0, 1.4, 2.0], dtype=torch.float64).view(3, 1, 1).requires_grad_()
        inputs.append(alpha)
    results = []
    for kernel in (chunked_hopfield_attention, plain_hopfield_attention):
        output = kernel(*inputs[:3], alpha=alpha, scaling=0.6, attention_mask=attention_mask)
        grad = torch.linspace(-1.0, 2.0, output.numel(), dtype=torch.float64).view_as(output)
        results.append([output, *torch.autograd.grad(output, inputs, grad)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, scale=10)


@pytest.mark.parametrize("mask", ["none", "boolean", "padding", "added"])
@pytest.mark.parametrize("heads_of_keys", [1, 2])
@pytest.mark.parametrize("alpha", [1.5, "heads"])
def test_grouped_queries_have_the_outputs_and_gradients_of_copied_keys(alpha, heads_of_keys, mask, piece):
    query = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, heads_of_keys, 9, width, dtype=torch.float64, requires_grad=True) for width in (4, 6))
    inputs = [query, key, value]
    given = _masks()[mask]
    attention_mask = given[:, :1].repeat(1, 4, 1, 1) if mask == "added" else given
    if alpha == "heads":
        alpha = torch.tensor([1.2, 1.4, 1.6, 1.9], dtype=torch.float64).view(4, 1, 1).requires_grad_()
        inputs.append(alpha)
    copied = [x.repeat_interleave(4 // heads_of_keys, 1) for x in (key, value)]
    results = []
    for kernel, others in ((chunked_hopfield_attention, (key, value)), (plain_hopfield_attention, copied)):
        output = kernel(query, *others, alpha=alpha, scaling=0.6, attention_mask=attention_mask)
        grad = torch.linspace(-1.0, 2.0, output.numel(), dtype=torch.float64).view_as(output)
        results.append([output, *torch.autograd.grad(output, inputs, grad)])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, scale=10)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_equals_float64_within_the_tolerances(alpha, dtype):
    query, key, value = _inputs(dtype, queries=33, keys=70)
    output = chunked_hopfield_attention(query, key, value, alpha=alpha, scaling=0.5)
    assert output.dtype == dtype
    expected = plain_hopfield_attention(query.double(), key.double(), value.double(), alpha=alpha, scaling=0.5)
    assert_close(output, expected, scale=10)
    output.float().square().sum().backward()
    assert query.grad.dtype == dtype
    assert query.grad.isfinite().all()


def test_a_query_without_any_key_gets_zeros_and_gives_no_gradient(piece):
    query, key, value = _inputs()
    present = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    present[1, 0, 3] = False
    output = chunked_hopfield_attention(query, key, value, alpha=1.5, scaling=1.0, attention_mask=present)
    assert torch.equal(output[1, :, 3], torch.zeros(3, 6, dtype=torch.float64))
    output.sum().backward()
    assert torch.equal(query.grad[1, :, 3], torch.zeros(3, 4, dtype=torch.float64))
    assert query.grad[0].abs().sum() > 0
    assert key.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
def test_large_scores_in_fp32_are_within_their_rounding(scale):
    query, key, value = (x.detach().float() for x in _inputs(queries=4, keys=501))
    query *= scale
    expected = plain_hopfield_attention(query.double(), key.double(), value.double(), alpha=1.5, scaling=1.0)
    rounding = 4.0 * scale * 1e-6  # of the scores themselves
    difference = chunked_hopfield_attention(query, key, value, alpha=1.5, scaling=1.0) - expected
    assert difference.abs().max() < 2e-5 + rounding


@pytest.mark.parametrize("alpha", [1.3, 1.5])
def test_the_gradient_of_dropout_uses_the_mask_of_the_forward_pass(alpha, piece):
    def attend(query, key, value):
        torch.manual_seed(3)
        return chunked_hopfield_attention(query, key, value, alpha=alpha, scaling=0.6, dropout=0.4)

    inputs = [x[:1, :2, :3].detach().requires_grad_() for x in _inputs()]
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.equal(attend(*inputs), attend(*inputs))


def test_dropout_drops_weights_and_keeps_their_mean():
    query, key, _ = (x.detach() for x in _inputs())
    value = torch.eye(9, dtype=torch.float64).expand(2, 3, 9, 9)
    weights = chunked_hopfield_attention(query, key, value, alpha=1.5, scaling=0.6)
    draws = torch.stack([chunked_hopfield_attention(query, key, value, alpha=1.5, scaling=0.6, dropout=0.4) for _ in range(2000)])
    dropped = (draws == 0) & (weights > 0)
    assert dropped.sum() / (weights > 0).expand_as(draws).sum() == pytest.approx(0.4, abs=0.01)
    assert torch.equal(draws[:, weights == 0], torch.zeros_like(draws[:, weights == 0]))
    assert (draws.mean(0) - weights).abs().max() < 0.1


def test_a_second_derivative_is_refused():
    query, key, value = _inputs()
    output = chunked_hopfield_attention(query, key, value, alpha=1.5, scaling=1.0)
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_tensor_of_the_size_of_the_scores_is_saved():
    query = torch.randn(1, 1, 300, 4, requires_grad=True)
    kept: list[int] = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        chunked_hopfield_attention(query, query, query, alpha=1.5, scaling=1.0)
    assert max(kept) == query.numel() < 300 * 300


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_the_registered_kernel_equals_the_plain_kernel(alpha):
    assert ALL_ATTENTION_FUNCTIONS["hopfield"] is hopfield_attention_forward
    assert "hopfield" in ALL_MASK_ATTENTION_FUNCTIONS
    module = torch.nn.Module().eval()
    query, key, value = _inputs()
    mask = _masks()["boolean"][1:].expand(2, 1, 5, 9)
    mask = mask | (torch.arange(9) == 0)
    output, weights = hopfield_attention_forward(module, query, key, value, mask, scaling=0.6, alpha=alpha)
    assert weights is None
    assert_close(
        output.transpose(1, 2), plain_hopfield_attention(query, key, value, alpha=alpha, scaling=0.6, attention_mask=mask), scale=3
    )
    asked, weights = hopfield_attention_forward(module, query, key, value, mask, scaling=0.6, alpha=alpha, output_attentions=True)
    assert weights.shape == (2, 3, 5, 9)
    assert_close(asked, output, scale=3)


def test_a_learnable_bias_gets_its_gradient():
    query, key, value = _inputs()
    bias = torch.randn(2, 3, 5, 9, dtype=torch.float64, requires_grad=True)
    output, _ = hopfield_attention_forward(torch.nn.Module(), query, key, value, bias, scaling=0.6, alpha=1.5)
    output.square().sum().backward()
    assert bias.grad.abs().sum() > 0


def test_alpha_1_uses_scaled_dot_product_attention():
    query, key, value = (x.detach() for x in _inputs(torch.float32))
    output, _ = hopfield_attention_forward(torch.nn.Module().eval(), query, key, value, None, scaling=0.6)
    assert torch.equal(output.transpose(1, 2), scaled_dot_product_attention(query, key, value, scale=0.6))


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8, "patch_size": 2}


@pytest.mark.parametrize("fields", [{"alpha": 1.5}, {"alpha": 1.4, "learnable_alpha": True}], ids=["fixed", "learnable"])
@pytest.mark.parametrize("encoder_type", ["transformer", "class_query"])
def test_a_model_with_alpha_above_1_uses_the_kernel_by_default(fields, encoder_type):
    model = UHopViTForImageClassification(UHopViTConfig(**SMALL, **fields, encoder_type=encoder_type, initializer_range=0.3)).eval()
    assert model.config._attn_implementation == "hopfield"
    images = torch.randn(3, 3, 8, 8)
    fast = model(images)
    asked = model(images, output_attentions=True)
    model.set_attn_implementation("eager")
    plain = model(images, output_attentions=True)
    assert_close(fast.logits, plain.logits, scale=3)
    for actual, expected in zip(asked.attentions, plain.attentions, strict=True):
        assert_close(actual, expected)
    with pytest.raises(ValueError, match=r"use 'eager' or one of \('hopfield', 'hopfield_triton'"):
        model.set_attn_implementation("sdpa")


def test_a_forecaster_uses_the_kernel():
    model = STanHopForPrediction(STanHopConfig(**SERIES)).eval()
    assert model.config._attn_implementation == "hopfield"
    past = torch.randn(2, 24, 3)
    fast = model(past_values=past)
    model.set_attn_implementation("eager")
    assert_close(fast.prediction_outputs, model(past_values=past).prediction_outputs, scale=3)
    assert STanHopForPrediction(STanHopConfig(**SERIES, alpha=1.0, learnable_alpha=False)).config._attn_implementation == "hopfield"


@pytest.mark.trains
def test_the_kernel_compiles_without_a_graph_break():
    model = UHopViTForImageClassification(UHopViTConfig(**SMALL, alpha=1.5)).eval()
    images = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(images).logits, model(images).logits, scale=3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kernel", [hopfield_attention_forward, triton_attention_forward])
def test_a_traced_kernel_keeps_no_values_of_its_example(kernel):
    if kernel is triton_attention_forward:
        pytest.importorskip("triton", reason="Triton exists only for Linux")
    """It has the plain kernel, and no values of what it was traced with."""
    module = torch.nn.Module().eval()
    first, second = (tuple(torch.randn(3, 1, 2, 5, 8)) for _ in range(2))
    traced = torch.jit.trace(lambda *qkv: kernel(module, *qkv, None, alpha=1.5)[0], first)
    assert_close(traced(*second).transpose(1, 2), plain_hopfield_attention(*second, alpha=1.5), scale=3)


def test_nan_stays_nan_under_a_mask():
    query, key, value = (x.detach() for x in _inputs())
    query[0, 0, 0, 0] = torch.nan
    output = chunked_hopfield_attention(query, key, value, alpha=1.5, scaling=1.0, attention_mask=torch.ones(1, 1, 5, 9, dtype=torch.bool))
    assert output[0, 0, 0].isnan().all()
    assert output.isnan().sum() == 6


@pytest.mark.parametrize("empty", ["batch", "heads", "queries", "keys"])
def test_empty_inputs_give_empty_outputs(empty):
    sizes = {"batch": 2, "heads": 3, "queries": 5, "keys": 9, empty: 0}
    shapes = [(sizes["batch"], sizes["heads"], sizes[name], 4) for name in ("queries", "keys", "keys")]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    output = chunked_hopfield_attention(*inputs, alpha=1.5, scaling=1.0)
    assert torch.equal(output, torch.zeros(shapes[0]))
    output.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


def test_all_weights_may_be_dropped():
    query, key, value = _inputs()
    output = chunked_hopfield_attention(query, key, value, alpha=1.5, dropout=1.0)
    assert torch.equal(output, torch.zeros_like(output))


def test_the_default_scaling_and_a_mask_that_adds_axes():
    query, key, value = (x.detach()[:1] for x in _inputs())
    mask = torch.rand(4, 1, 5, 9) < 0.7
    output = chunked_hopfield_attention(query, key, value, alpha=1.3, attention_mask=mask)
    assert_close(output, plain_hopfield_attention(query, key, value, alpha=1.3, attention_mask=mask), scale=3)


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 2.0},
        {"sinks": torch.zeros(3)},
        {"attention_mask": torch.zeros(5, 9, requires_grad=True)},
        {"unknown": 1},
        {"alpha": 1.0},
    ],
    ids=["soft cap", "sinks", "learned mask", "unknown", "softmax"],
)
def test_a_kernel_refuses_what_it_does_not_compute(changes):
    call = dict(zip(("query", "key", "value"), _inputs(), strict=True))
    assert attention_cpu.accepts(**call, alpha=torch.tensor(1.0), scaling=0.5, dropout=0.1, attention_mask=_masks()["boolean"])
    assert not attention_cpu.accepts(**call, **{"alpha": 1.5, **changes})
    with pytest.raises((ValueError, TypeError), match=r"needs alpha > 1|unexpected keyword argument"):
        chunked_hopfield_attention(**call, **{"alpha": 1.5, **changes})
    equal = dict(zip(call, (x[..., :4] for x in call.values()), strict=True))
    assert attention_softmax.accepts(**equal, scaling=0.5, dropout=0.1, attention_mask=_masks()["boolean"])
    assert not attention_softmax.accepts(**equal, **changes)


@pytest.mark.parametrize("alpha", [0.5, 3.0, torch.tensor(3.0)])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie in \[1, 2\]"):
        chunked_hopfield_attention(*_inputs(), alpha=alpha)


def test_autocast_equals_that_of_the_plain_kernel():
    inputs = _inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = chunked_hopfield_attention(*inputs, alpha=1.5)
        plain = plain_hopfield_attention(*inputs, alpha=1.5)
    assert output.dtype == plain.dtype == torch.bfloat16
    assert_close(output, plain.double(), scale=10)
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in inputs)


def test_sums_over_many_chunks_keep_their_precision(monkeypatch):
    query = torch.randn(1, 1, 2048, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 1, 32, 8, dtype=torch.float64)
    gradients = []
    for size, dtype in ((10**6, torch.float64), (32 * 16, torch.bfloat16)):
        monkeypatch.setattr(attention_cpu, "_PIECE", size)
        inputs = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (query, key, value)]
        chunked_hopfield_attention(*inputs, alpha=1.5).sum().backward()
        gradients.append(inputs[1].grad.double())
    assert (gradients[1] - gradients[0]).norm() < 0.01 * gradients[0].norm()


def test_the_plain_kernel_is_used_if_weights_are_always_returned():
    config = UHopViTConfig(**SMALL, alpha=1.5, output_attentions=True)
    model = UHopViTForImageClassification(config).eval()
    assert model.config._attn_implementation == "eager"
    assert len(model(torch.randn(1, 3, 8, 8)).attentions) == 1


def test_every_part_of_a_forecaster_uses_its_kernel():
    model = STanHopForPrediction(STanHopConfig(**SERIES))
    layers = [module for module in model.modules() if isinstance(module, HopfieldAttention)]
    for kernel in ("eager", "hopfield"):
        model.set_attn_implementation(kernel)
        assert {layer.config._attn_implementation for layer in layers} == {kernel}
    folded = model.fold_feature_maps()
    assert {module.config.use_feature_map for module in folded.modules() if hasattr(module, "config")} == {False}
    assert {module.config.use_feature_map for module in model.modules() if hasattr(module, "config")} == {True}


def test_bag_models_need_a_kernel_that_returns_weights():
    with pytest.raises(ValueError, match=r"attn_implementation must be 'eager', .* got 'hopfield'"):
        UHopMILForBagClassification(UHopMILConfig(alpha=1.5, attn_implementation="hopfield"))


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
@pytest.mark.parametrize("keys", [9, 600])
def test_large_scores_and_their_gradients(alpha, keys):
    """The differences of scores are exact in float32, but the offsets of their queries are much
    larger."""
    query, key = torch.tensor([[[[2.0**23, 1.0], [-(2.0**23), 1.0], [1.0, 1.0]]]]), torch.ones(1, 1, keys, 2)
    key[..., 1] = torch.arange(keys) % 3
    value = torch.randn(1, 1, keys, 4)
    direction = torch.randn(1, 1, 3, 4)

    def results(dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        attend = chunked_hopfield_attention if dtype == torch.float32 else plain_hopfield_attention
        output = attend(*inputs, alpha=alpha, scaling=1.0)
        gradients = torch.autograd.grad((output * direction.to(dtype)).sum(), inputs)
        return output, gradients[0][..., 1], gradients[2]

    for actual, expected in zip(results(torch.float32), results(torch.float64), strict=True):
        assert_close(actual, expected, scale=20)  # sums over all keys


def test_values_may_have_more_examples_and_another_dtype():
    query, key, value = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 6, 5), torch.randn(2, 1, 6, 7)
    assert_close(chunked_hopfield_attention(query, key, value, alpha=1.5), plain_hopfield_attention(query, key, value, alpha=1.5))
    for dtype in (torch.float64, torch.bfloat16):
        output = chunked_hopfield_attention(query, key, value.to(dtype), alpha=1.5)
        assert output.dtype == dtype
        expected = chunked_hopfield_attention(query, key, value.to(dtype).float(), alpha=1.5)
        assert_close(output, expected, dtype=torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("name", ["hopfield", "hopfield_triton"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_model_stays_causal(name, padded):
    """Models of transformers select the kernel by name and leave causality to it."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    logits = []
    for kind in ("eager", name):
        model.set_attn_implementation(kind)
        logits.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert_close(logits[1], logits[0], scale=3)


@pytest.mark.parametrize("size", [50.0, 300.0, 2.0e4, 3.0e5])
@pytest.mark.parametrize(("alpha", "keys"), [(1.5, 600), (2.0, 197), (2.0, 1000), (1.5, 50_000), (2.0, 50_000)])
def test_gradients_of_large_level_scores(alpha, keys, size):
    """Rounding of a threshold of this size would be larger than the weights."""
    query, key = torch.full((1, 1, 2, 64), (size / 8.0) ** 0.5), torch.full((1, 1, keys, 64), (size / 8.0) ** 0.5)
    inputs = [x.requires_grad_() for x in (query, key, torch.randn(1, 1, keys, 8))]
    gradients = torch.autograd.grad(chunked_hopfield_attention(*inputs, alpha=alpha).sum(), inputs)
    # Scores that are not equal are rounded by more than this.
    assert_close(gradients[2] * keys, torch.full((1, 1, keys, 8), 2.0), scale=200)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_autocast_does_not_change_float64():
    inputs = [torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = chunked_hopfield_attention(*inputs, alpha=1.5)
    assert_close(output, plain_hopfield_attention(*inputs, alpha=1.5))


@pytest.mark.parametrize("keys", [9, 17, 600])
def test_a_query_with_nan_gives_nan_output_and_gradients(keys):
    query, key, value = (torch.randn(1, 1, count, 8, requires_grad=True) for count in (3, keys, keys))
    with torch.no_grad():
        query[0, 0, 1] = torch.nan
    output = chunked_hopfield_attention(query, key, value, alpha=1.5)
    assert output.isnan().all(-1).tolist() == [[[False, True, False]]]
    for gradient in torch.autograd.grad(output.sum(), (query, key, value)):
        assert gradient.isnan().any()


@pytest.mark.parametrize(("cache", "scores"), [(2**21, 327680), (2**19, 655360), (0, 327680), (None, 327680)])
def test_chunks_have_the_size_for_the_cache(monkeypatch, cache, scores):
    def sysconf(name):
        if cache is None:
            raise ValueError(f"unrecognized configuration name {name}")
        return cache

    monkeypatch.setattr("os.sysconf", sysconf)
    assert attention_cpu._piece() == scores
