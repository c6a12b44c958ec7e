"""Tests of the Triton kernels against the plain kernel in float64 and in a model, and of their
compilation for several GPUs.

They run in the interpreter of Triton or, with TRITON_INTERPRET=0 in the environment, on a GPU. The
compilation needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_uhop import UHopViTConfig, UHopViTForImageClassification, plain_hopfield_attention
from modeling_uhop.attention_interface import triton_attention_forward
from modeling_uhop.attention_triton import MAX_WIDTH, _TritonAttention, triton_hopfield_attention
from tests.conftest import assert_close


INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="TRITON_INTERPRET is not 1, and there is no GPU")
pytest.importorskip("triton", reason="Triton exists only for Linux")

BLOCKS = {"block_queries": 16, "block_keys": 32}


@pytest.fixture(autouse=True)
def _device():
    with torch.device(DEVICE):
        yield


def _inputs(queries: int = 19, keys: int = 45, width: int = 20) -> list[torch.Tensor]:
    return [torch.randn(2, 2, count, width, requires_grad=True) for count in (queries, keys, keys)]


def _vit():
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return UHopViTForImageClassification(UHopViTConfig(**sizes, intermediate_size=16, alpha=1.5))


def _assert_exact(inputs, *, scale, alpha=1.5, scaling=None, mask=None, dtype=torch.float32, blocks=BLOCKS):
    """Assert that outputs and gradients of the kernels equal those of the plain kernel in
    float64."""
    rounded = [x.to(dtype) for x in inputs]
    wide = None if mask is None else mask[:, None, None]
    output = triton_hopfield_attention(*rounded, alpha=alpha, scaling=scaling, attention_mask=wide, **blocks)
    expected = plain_hopfield_attention(*(x.double() for x in rounded), alpha=alpha, scaling=scaling, attention_mask=wide)
    direction = torch.randn(output.shape, dtype=torch.float64)
    assert_close(output, expected, dtype=dtype, scale=scale)
    gradients = [torch.autograd.grad((x.double() * direction).sum(), inputs, retain_graph=True) for x in (output, expected)]
    for actual, exact in zip(*gradients, strict=True):
        assert_close(actual, exact, dtype=dtype, scale=scale)


@pytest.mark.parametrize("masked", [False, True], ids=["every key", "some keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
@pytest.mark.parametrize("alpha", [1.01, 1.5, 1.7, 2.0])
def test_outputs_and_gradients_are_those_of_the_plain_kernel(alpha, dtype, masked):
    mask = torch.rand(2, 45) < 0.6 if masked else None
    _assert_exact(_inputs(), scale=8, alpha=alpha, scaling=0.7, mask=mask, dtype=dtype)


@pytest.mark.parametrize(("queries", "keys", "width"), [(1, 1, 8), (16, 32, 16), (33, 7, 64), (5, 97, 33)])
@pytest.mark.parametrize("blocks", [(16, 16), (32, 64)])
def test_odd_sizes(queries, keys, width, blocks):
    _assert_exact(_inputs(queries, keys, width), scale=4, blocks={"block_queries": blocks[0], "block_keys": blocks[1]})


@pytest.mark.parametrize("alpha", [1.5, 1.7])
def test_rows_without_a_key_retrieve_zeros_and_have_no_gradient(alpha):
    inputs = _inputs()
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[1] = False
    output = triton_hopfield_attention(*inputs, alpha=alpha, attention_mask=mask[:, None, None], **BLOCKS)
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert output[0].abs().sum() > 0
    assert (output[1] == 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("alpha", [1.5, 1.7, 2.0])
def test_nan_is_propagated(alpha):
    """A NaN in a query gives NaN in its row; a NaN in a key gives NaN in every row that attends to
    it."""
    query, key, value = (x.detach().requires_grad_() for x in _inputs())
    with torch.no_grad():
        query[0, 0, 3, 1] = torch.nan
        key[1, 1, 40, 2] = torch.nan
    output = triton_hopfield_attention(query, key, value, alpha=alpha, **BLOCKS)
    gradients = torch.autograd.grad(output.sum(), [query, key])
    spoiled = torch.zeros(2, 2, 19, dtype=torch.bool)
    spoiled[0, 0, 3] = spoiled[1, 1] = True
    assert (output.isnan().all(-1) == spoiled).all()
    assert (output.isnan().any(-1) == spoiled).all()
    assert (gradients[0].isnan().any(-1) == spoiled).all()
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[1, 40] = False
    hidden = triton_hopfield_attention(query, key, value, alpha=alpha, attention_mask=mask[:, None, None], **BLOCKS)
    assert hidden[1].isfinite().all()


@pytest.mark.parametrize(("alpha", "keys", "size"), [(2.0, 197, 1e4), (2.0, 197, 1e6), (1.5, 1000, 1e6)])
def test_gradients_of_large_level_scores_are_exact(alpha, keys, size):
    query, key = (torch.full((1, 1, count, 16), (size / 16.0) ** 0.5, requires_grad=True) for count in (16, keys))
    inputs = [query, key, torch.randn(1, 1, keys, 16, requires_grad=True)]
    output = triton_hopfield_attention(*inputs, alpha=alpha, scaling=1.0, **BLOCKS)
    assert_close(output, inputs[2].mean(2, keepdim=True).expand(-1, -1, 16, -1))
    gradients = torch.autograd.grad(output.sum(), inputs)
    assert_close(gradients[2] * keys, torch.full((1, 1, keys, 16), 16.0), scale=16)


@pytest.mark.parametrize("scaling", [-0.7, 0.0, 3])
def test_any_scaling(scaling):
    _assert_exact(_inputs(), scale=20, scaling=scaling, mask=torch.rand(2, 45) < 0.6)


@pytest.mark.parametrize("asking", [(), (0,), (1,), (2,), (0, 2)])
def test_gradients_go_where_they_are_asked_for(asking):
    inputs = [x.detach() for x in _inputs()]
    whole = triton_hopfield_attention(*(x.requires_grad_() for x in inputs), alpha=1.5, **BLOCKS)
    expected = torch.autograd.grad(whole.sum(), inputs)
    inputs = [x.detach() for x in inputs]
    for place in asking:
        inputs[place].requires_grad_()
    output = triton_hopfield_attention(*inputs, alpha=1.5, **BLOCKS)
    assert_close(output, whole)
    assert output.requires_grad == bool(asking)
    if asking:
        output.sum().backward()
    for place, (x, gradient) in enumerate(zip(inputs, expected, strict=True)):
        assert x.grad is None if place not in asking else torch.equal(x.grad, gradient)


def test_rows_with_ties_and_extreme_scores_are_exact():
    """Large scores, ties, and one score far above many equal ones."""
    key = torch.zeros(1, 1, 64, 16)
    key[..., 0] = torch.cat([torch.ones(1), torch.full((63,), -0.01)])
    query = torch.zeros(1, 1, 4, 16)
    query[..., 0] = torch.tensor([0.0, 1.0, 1.9, 300.0])
    value = torch.randn(1, 1, 64, 16)
    for alpha in (1.5, 2.0):
        output = triton_hopfield_attention(query, key, value, alpha=alpha, scaling=1.0, **BLOCKS)
        assert_close(output, plain_hopfield_attention(query.double(), key.double(), value.double(), alpha=alpha, scaling=1.0), scale=2)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_long_rows_of_nearly_level_scores_are_exact(alpha):
    """Newton's method, started at the largest score, needs more steps for these rows than for any
    others."""
    inputs = [torch.randn(1, 1, count, 16, requires_grad=True) for count in (16, 2000, 2000)]
    _assert_exact(inputs, scale=2, alpha=alpha, scaling=0.01, blocks={"block_queries": 16, "block_keys": 64})


@pytest.mark.process
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "eps", "masked"),
    [(90, "bfloat16", 64, 0.5, "unmasked"), (80, "float16", 256, 0.7, "masked"), (80, "float32", 128, 0.7, "masked")],
)
def test_kernels_fit_the_gpus_they_are_compiled_for(capability, dtype, width, eps, masked, tmp_path):
    """Compile to machine code without such a GPU: registers suffice for a thread, and shared memory
    for a program."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    worker = [str(x) for x in (Path(__file__).parent / "triton_worker.py", capability, dtype, width, eps, masked)]
    finished = subprocess.run([sys.executable, *worker], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    kernels = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel["spilled"] <= 64, kernel
        assert kernel["shared"] <= 99 * 1024, kernel


def test_a_model_selects_the_kernel_by_name():
    model = _vit().eval()
    images = torch.randn(2, 1, 8, 8)
    expected = model(images).logits
    model.set_attn_implementation("hopfield_triton")
    assert model.config._attn_implementation == "hopfield_triton"
    assert_close(model(images).logits, expected, scale=3)


def test_a_model_trains_with_autocast(monkeypatch):
    """Weights are fp32 and attention is in half precision, as with a Trainer with `fp16=True`."""
    taken, launch = [], _TritonAttention.apply

    def kernel(query, *args):
        taken.append(query.dtype)
        return launch(query, *args)

    monkeypatch.setattr(_TritonAttention, "apply", kernel)
    model = _vit()
    images, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    found = {}
    for name in ("hopfield", "hopfield_triton"):
        model.set_attn_implementation(name)
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = model(images, labels=labels).loss
        found[name] = (loss, *torch.autograd.grad(loss, list(model.parameters())))
    assert taken == [torch.float16]
    for actual, expected in zip(found["hopfield_triton"], found["hopfield"], strict=True):
        assert actual.dtype == torch.float32
        assert_close(actual, expected.double(), dtype=torch.float16, scale=3)


def test_autocast_leaves_float64_to_the_plain_kernel():
    inputs = [x.detach().double() for x in _inputs()]
    with torch.autocast(DEVICE, dtype=torch.float16):
        output, _ = triton_attention_forward(torch.nn.Module().eval(), *inputs, None, alpha=1.5, scaling=0.5)
    assert_close(output.transpose(1, 2), plain_hopfield_attention(*inputs, alpha=1.5, scaling=0.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 1.0},
        {"alpha": torch.tensor(1.5)},
        {"alpha": 1.0001},
        {"attention_mask": torch.randn(2, 1, 19, 45)},
        {"attention_mask": torch.rand(2, 1, 19, 45) < 0.5},
        {"attention_mask": (torch.rand(2, 1, 1, 45) < 0.5).expand(2, 1, 19, 45)},
    ],
    ids=["softmax", "learnable", "near softmax", "additive", "pairs", "keys"],
)
def test_unsupported_calls_use_another_kernel(changes):
    inputs = [x.detach() for x in _inputs()]
    settings = {"alpha": 1.5, "attention_mask": None, **changes}
    mask, alpha = (x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (settings["attention_mask"], settings["alpha"]))
    output, _ = triton_attention_forward(torch.nn.Module().eval(), *inputs, mask, alpha=alpha, scaling=0.5)
    assert_close(output.transpose(1, 2), plain_hopfield_attention(*inputs, alpha=alpha, scaling=0.5, attention_mask=mask), scale=3)


@pytest.mark.parametrize(
    ("key_shape", "value_shape", "mask_shape"),
    [
        ((2, 2, 7, 8), (2, 2, 7, 5), None),
        ((1, 2, 7, 8), (1, 2, 7, 8), (2, 1, 1, 7)),
        ((2, 1, 7, 8), (2, 1, 7, 8), None),
        ((2, 2, 7, 8), (2, 2, 7, 8), (1, 1, 1, 7)),
        ((2, 2, 7, 8), (2, 2, 7, 8), (2, 1, 1, 1)),
        ((2, 2, 7, 8), (2, 2, 7, 8), (1, 1)),
        ((2, 2, 7, 8), (2, 2, 7, 8), (2, 1, 1)),
        ((2, 2, 7, 160), (2, 2, 7, 160), None),
    ],
)
def test_broadcasting_and_other_widths(key_shape, value_shape, mask_shape):
    query, key, value = torch.randn(2, 2, 4, key_shape[-1]), torch.randn(key_shape), torch.randn(value_shape)
    mask = None if mask_shape is None else torch.rand(mask_shape) < 0.7
    output, _ = triton_attention_forward(torch.nn.Module().eval(), query, key, value, mask, alpha=1.5, scaling=0.5)
    assert_close(output.transpose(1, 2), plain_hopfield_attention(query, key, value, alpha=1.5, scaling=0.5, attention_mask=mask), scale=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.0}, "one number from 1.01 to 2"),
        ({"alpha": torch.tensor(1.5)}, "one number from 1.01 to 2"),
        ({"alpha": 2.5}, "must lie in"),
        ({"key": torch.zeros(2, 2, 45, 19)}, "must have shape"),
        ({"query": torch.zeros(2, 2, 19, 20, dtype=torch.float64)}, "of one dtype"),
        (dict.fromkeys(("query", "key", "value"), torch.zeros(2, 3, 4)), "must have shape"),
        ({"attention_mask": torch.ones(2, 1, 1, 44, dtype=torch.bool)}, "attention_mask must be boolean"),
        ({"attention_mask": torch.ones(2, 1, 1, 45)}, "attention_mask must be boolean"),
        ({"block_keys": 24}, "powers of two"),
        ({"block_queries": 8}, "powers of two"),
        (dict.fromkeys(("query", "key", "value"), torch.zeros(1, 1, 2, MAX_WIDTH[torch.float32] + 1)), "up to 128 wide"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    query, key, value = _inputs()
    arguments = {"query": query, "key": key, "value": value, "alpha": 1.5, **changes}
    with pytest.raises(ValueError, match=message):
        triton_hopfield_attention(**arguments)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter raises these errors")
def test_without_an_interpreter_or_for_bf16_a_cpu_is_refused(monkeypatch):
    halves = [x.bfloat16() for x in _inputs()]
    with pytest.raises(ValueError, match="cannot multiply bf16"):
        triton_hopfield_attention(*halves, alpha=1.5)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="need a CUDA device"):
        triton_hopfield_attention(*_inputs(), alpha=1.5)


def test_empty_keys_give_zeros():
    query, key, value = torch.randn(1, 1, 3, 8, requires_grad=True), torch.zeros(1, 1, 0, 8), torch.zeros(1, 1, 0, 8)
    output = triton_hopfield_attention(query, key, value, alpha=1.5)
    output.sum().backward()
    assert (output == 0).all()
    assert (query.grad == 0).all()
    nobody = triton_hopfield_attention(torch.zeros(1, 1, 0, 8), query, query, alpha=1.5)
    assert nobody.shape == (1, 1, 0, 8)
    nobody.sum().backward()
    assert (query.grad == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_output_shapes_are_available_on_the_meta_device(alpha):
    inputs = torch.zeros(3, 1, 2, 5, 8, device="meta")
    output, _ = triton_attention_forward(torch.nn.Module().eval(), *inputs, None, alpha=alpha)
    assert output.shape == (1, 5, 2, 8)


def test_masks_with_more_examples_than_the_inputs_are_broadcast():
    query, key, value = torch.randn(3, 1, 2, 7, 8)
    mask = torch.rand(2, 1, 1, 7) < 0.7
    output, _ = triton_attention_forward(torch.nn.Module().eval(), query, key, value, mask, alpha=1.5)
    assert_close(output.transpose(1, 2), plain_hopfield_attention(query, key, value, alpha=1.5, attention_mask=mask), scale=3)


def test_autocast_casts_its_inputs():
    inputs = [x.detach() for x in _inputs()]
    expected = plain_hopfield_attention(*(x.half().double() for x in inputs), alpha=1.5)
    with torch.autocast(DEVICE, dtype=torch.float16):
        direct = triton_hopfield_attention(*inputs, alpha=1.5, **BLOCKS)
        mixed, _ = triton_attention_forward(torch.nn.Module().eval(), inputs[0].half(), *inputs[1:], None, alpha=1.5)
    assert direct.dtype == mixed.dtype == torch.float16
    assert_close(direct, expected, scale=3)
    assert_close(mixed.transpose(1, 2), expected, scale=3)


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_saved_without_a_gradient(asked, monkeypatch):
    kept = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, KEPT, **settings: kept.append(KEPT)

    monkeypatch.setattr("modeling_uhop.attention_triton._forward_kernel", Kernel())
    with torch.set_grad_enabled(asked):
        triton_hopfield_attention(*_inputs(), alpha=1.5)
    assert kept == [asked]
