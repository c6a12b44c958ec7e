"""Tests of UHopViT models: values against the ViT of transformers, outputs, kernels, dtypes, saving
and loading, errors."""

from typing import Any

import onnxruntime
import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from modeling_uhop import UHopViTConfig, UHopViTForImageClassification, UHopViTModel
from tests import reference
from tests.conftest import CHECKPOINTING, assert_close
from tests.support.models import COMPACT


SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 5,
    # With the usual standard deviation of 0.02, attention would be uniform and hide errors; so we
    # use a larger one.
    "initializer_range": 0.2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "entmax": {"alpha": 1.5},
    "learnable": {"alpha": 1.4, "learnable_alpha": True},
    "no phi": {"use_feature_map": False},
    "wide phi": {"feature_dim": 31, "feature_init": "normal"},
    "projected values": {"value_source": "projected_memory"},
    "steps": {"update_steps": 3, "beta": 0.7},
    "class query": {"encoder_type": "class_query", "hidden_act": "relu", "num_hidden_layers": 1},
    "conv": {"patch_embedding": "conv"},
    "pooled": {"pooling": "hopfield"},
    "local": {"learnable_beta": True, "mask_diagonal": True},
    "compact": {**COMPACT, "alpha": 1.5},
}


def _model(**fields) -> UHopViTForImageClassification:
    return UHopViTForImageClassification(UHopViTConfig(**{**SMALL, **fields})).eval()


def _prefix(model) -> int:
    """Number of tokens before the patches."""
    return 0 if model.config.pooling == "hopfield" else 1


def _arrays(module):
    return module.weight.detach().numpy(), module.bias.detach().numpy()


def _images(batch=3, size=12):
    return torch.randn(batch, 3, size, size)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request):
    return request.param


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_without_phi_at_alpha_1_the_model_equals_the_vit_of_transformers(kernel):
    ours = _model(use_feature_map=False, attn_implementation=kernel)
    theirs = ViTForImageClassification(ViTConfig(**SMALL)).eval()
    theirs.load_state_dict(ours.state_dict())
    images, labels = _images(), torch.tensor([0, 4, 2])
    actual, expected = ours(images, labels=labels), theirs(images, labels=labels)
    assert_close(actual.logits, expected.logits)
    assert_close(actual.loss, expected.loss)
    actual.loss.backward()
    expected.loss.backward()
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, theirs.get_parameter(name).grad, scale=3)


def test_an_orthogonal_phi_folded_by_hand_equals_the_vit_of_transformers():
    ours = _model(feature_init="orthogonal", feature_dim=30)
    theirs = ViTForImageClassification(ViTConfig(**SMALL)).eval()
    state = ours.state_dict()
    for i in range(2):
        phi = state.pop(f"vit.layers.{i}.attention.feature_map.weight")
        for name in ("q_proj", "k_proj"):
            key = f"vit.layers.{i}.attention.{name}.weight"
            state[key] = state[key] @ phi
    theirs.load_state_dict(state)
    images = _images()
    assert_close(ours(images).logits, theirs(images).logits)


def test_eager_and_sdpa_agree_at_alpha_1():
    eager, sdpa = _model(attn_implementation="eager"), _model(attn_implementation="sdpa")
    sdpa.load_state_dict(eager.state_dict())
    images, mask = _images(), torch.rand(3, 10) < 0.7
    mask[:, 0] = True
    for attention_mask in (None, mask.long()):
        expected = eager(images, attention_mask=attention_mask).logits
        assert_close(sdpa(images, attention_mask=attention_mask).logits, expected)


def test_the_kernel_follows_alpha():
    assert _model().config._attn_implementation == "hopfield"
    assert _model(alpha=1.5).config._attn_implementation == "hopfield"
    assert _model(alpha=1.5, learnable_alpha=True).config._attn_implementation == "hopfield"
    with pytest.raises(ValueError, match=r"'sdpa' does not compute alpha-entmax.* alpha=1.5"):
        _model(alpha=1.5, attn_implementation="sdpa")
    model = _model(alpha=1.5)
    with pytest.raises(ValueError, match=r"use 'eager' or one of \('hopfield', 'hopfield_triton'"):
        model.set_attn_implementation("sdpa")


def test_a_masked_patch_has_no_influence(variant):
    model = _model(**variant, attn_implementation="eager")
    images, first = _images(), _prefix(model)
    mask = torch.ones(3, first + 9, dtype=torch.long)
    mask[:, first + 3] = 0  # the fourth patch: the top row of the 3 x 3 grid has three, so it starts at row 4
    changed = images.clone()
    changed[:, :, 4:8, 0:4] = 9.0
    assert torch.equal(model(images, attention_mask=mask).logits, model(changed, attention_mask=mask).logits)
    assert not torch.allclose(model(images).logits, model(changed).logits)


def test_hidden_states_and_attentions(variant):
    model = _model(**variant, attn_implementation="eager")
    outputs = model.vit(_images(), output_hidden_states=True, output_attentions=True)
    layers = model.config.num_hidden_layers
    tokens = _prefix(model) + 9
    shape = (1, 9) if model.config.encoder_type == "class_query" else (tokens, tokens)
    shapes = [shape] * layers + ([(1, 9)] if model.config.pooling == "hopfield" else [])
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, tokens, 24)] * (layers + 1)
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 3, *each) for each in shapes]
    for weights in outputs.attentions:
        assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
    assert_close(model.vit.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)


def test_sparse_attention_is_sparse():
    dense, sparse = _model(attn_implementation="eager"), _model(alpha=2.0)
    sparse.load_state_dict(dense.state_dict())
    images = _images()
    assert (dense(images, output_attentions=True).attentions[0] > 0).all()
    assert (sparse(images, output_attentions=True).attentions[0] == 0).double().mean() > 0.2
    assert not torch.allclose(dense(images).logits, sparse(images).logits)


def test_the_class_query_encoder_is_the_papers():
    model = _model(**VARIANTS["class query"], attn_implementation="eager")
    images = _images()
    tokens = model.vit.embeddings(images)
    retrieved, _ = model.vit.layers[0].attention(tokens[:, :1], tokens[:, 1:])
    expected = model.classifier(model.vit.layernorm(torch.relu(retrieved[:, 0])))
    assert_close(model(images).logits, expected)
    patches = model.vit(images, output_hidden_states=True).hidden_states[-1][:, 1:]
    assert torch.equal(patches, tokens[:, 1:])


def test_gradients_reach_every_parameter(variant):
    model = _model(**variant).train()
    model(_images(), labels=torch.tensor([1, 2, 3])).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().max() == 0]
    assert still == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(variant, reentrant):
    plain, checkpointed = _model(**variant).train(), _model(**variant).train()
    checkpointed.load_state_dict(plain.state_dict())
    getattr(checkpointed, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    images, labels = _images(), torch.tensor([1, 2, 3])
    for model in (plain, checkpointed):
        model(images, labels=labels).loss.backward()
    for name, parameter in plain.named_parameters():
        # Reentrant checkpointing gives the embeddings no gradient unless inputs require one, which
        # the Trainer arranges.
        if not (reentrant and "embeddings" in name):
            assert_close(checkpointed.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("image_size", [(12, 12), (8, 12)])
@pytest.mark.parametrize("name", ["dense", "conv", "compact"])
def test_position_interpolation(image_size, name):
    model = _model(**VARIANTS[name], image_size=list(image_size))
    first = _prefix(model)
    same = torch.randn(2, 3, *image_size)
    assert torch.equal(model(same, interpolate_pos_encoding=True).logits, model(same).logits)
    positions = model.vit.embeddings.position_embeddings
    grid = positions[:, first:].unflatten(1, (image_size[0] // 4, image_size[1] // 4)).permute(0, 3, 1, 2)
    larger = torch.nn.functional.interpolate(grid, size=(5, 6), mode="bicubic").flatten(2).mT
    assert_close(model.vit.embeddings.interpolate_pos_encoding(20, 24)[:, first:], larger)
    images = torch.randn(2, 3, 23, 25)
    assert torch.equal(*(model(each, interpolate_pos_encoding=True).logits for each in (images, images[:, :, :20, :24])))


@pytest.mark.parametrize("name", ["dense", "conv", "pooled", "compact"])
def test_bool_masked_pos_replaces_patches(name):
    model = UHopViTModel(UHopViTConfig(**SMALL, **VARIANTS[name]), use_mask_token=True).eval()
    images, masked = _images(), torch.zeros(3, 9, dtype=torch.bool)
    masked[:, 0] = True
    changed = images.clone()
    changed[:, :, :4, :4] = 5.0
    assert torch.equal(model(images, bool_masked_pos=masked).last_hidden_state, model(changed, bool_masked_pos=masked).last_hidden_state)
    with pytest.raises(ValueError, match="use_mask_token=True"):
        UHopViTModel(UHopViTConfig(**SMALL))(images, bool_masked_pos=masked)
    with pytest.raises(ValueError, match=r"bool_masked_pos must have shape \(3, 9\), got \(1, 9\)"):
        model(images, bool_masked_pos=masked[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_and_autocast(variant, dtype):
    model = _model(**variant)
    images = _images()
    expected = model(images).logits
    with torch.autocast("cpu", dtype=dtype):
        autocast = model(images).logits
    half = UHopViTForImageClassification._from_config(model.config, dtype=dtype)
    half.load_state_dict(model.state_dict())
    logits = half.eval()(images).logits
    assert logits.dtype == dtype
    for actual in (autocast, logits):
        assert_close(actual, expected, dtype=dtype, scale=10)


@pytest.mark.trains
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alpha": 1.5},
        {"alpha": 1.4, "learnable_alpha": True},
        {"alpha": 1.5, "attn_implementation": "hopfield_triton"},
        VARIANTS["compact"],
    ],
    ids=["dense", "entmax", "learnable", "triton", "compact"],
)
def test_it_compiles_as_one_graph(fields):
    if "attn_implementation" in fields:
        pytest.importorskip("triton", reason="Triton exists only for Linux")
    model = _model(num_hidden_layers=1, **fields)
    images = _images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images).logits, model(images).logits)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.3, -1.0, 2.0])),
        ("regression", 4, torch.randn(3, 4, generator=torch.Generator().manual_seed(0))),
        ("single_label_classification", 4, torch.tensor([0, 3, 1])),
        ("multi_label_classification", 4, torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])),
    ],
)
def test_problem_types(problem_type, num_labels, labels):
    functional = torch.nn.functional
    losses = {
        "regression": functional.mse_loss,
        "single_label_classification": functional.cross_entropy,
        "multi_label_classification": functional.binary_cross_entropy_with_logits,
    }
    model = _model(problem_type=problem_type, num_labels=num_labels)
    outputs = model(_images(), labels=labels)
    assert_close(outputs.loss, losses[problem_type](outputs.logits.squeeze(-1), labels))
    assert_close(model(_images(), labels=labels, return_dict=False)[0] * 0, 0.0)


def test_save_and_load(variant, tmp_path):
    model = _model(**variant)
    images = _images()
    expected = model(images).logits
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "config.json", "modeling_uhop_vit.py"}
    for loader in (UHopViTForImageClassification, AutoModelForImageClassification):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is UHopViTForImageClassification
        assert torch.equal(loaded(images).logits, expected)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is UHopViTModel
    assert torch.equal(base(images).last_hidden_state, model.vit(images).last_hidden_state)


def test_loading_initialises_parameters_that_a_checkpoint_lacks(tmp_path):
    _model(use_feature_map=False).save_pretrained(tmp_path)
    fields = {"use_feature_map": True, "feature_init": "identity", "alpha": 1.3, "learnable_alpha": True}
    fields |= {"beta": 0.7, "learnable_beta": True, "attention_init": "mimetic"}
    loaded = UHopViTForImageClassification.from_pretrained(tmp_path, **fields)
    for layer in loaded.vit.layers:
        assert torch.equal(layer.attention.feature_map.weight, torch.eye(24))
        assert_close(layer.attention.alpha.flatten(), torch.full((3,), 1.3))
        assert_close(layer.attention.beta.flatten(), torch.full((3,), 0.7))


def test_loading_does_not_initialise_parameters_that_a_checkpoint_has(tmp_path):
    model = _model(**{**VARIANTS["compact"], "alpha": 1.4, "learnable_alpha": True})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.3)
    model.save_pretrained(tmp_path)
    loaded = UHopViTForImageClassification.from_pretrained(tmp_path)
    assert all((parameter == 0.3).all() for parameter in loaded.parameters())


@pytest.mark.parametrize("fields", [{"beta": -2.0}, {"update_steps": 0}, {"alpha": 3.0}, {"alpha": 1.0, "learnable_alpha": True}])
def test_a_bad_field_is_refused_on_load_too(tmp_path, fields):
    _model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must"):
        UHopViTForImageClassification.from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("fields", [{"pooling": "hopfield"}, {"mask_diagonal": True}])
def test_kernels_that_cannot_mask_scores_are_refused(kernel, fields):
    (name, value) = next(iter(fields.items()))
    with pytest.raises(ValueError, match=rf"{name}={value!r} needs a mask of scores, .* use 'sdpa', 'eager' or one of \('hopfield', "):
        _model(**fields, attn_implementation=kernel)


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "hopfield", "hopfield_triton"])
@pytest.mark.parametrize("name", ["pooled", "local", "compact"])
def test_kernels_agree_on_a_compact_model(kernel, name):
    if kernel == "hopfield_triton":
        pytest.importorskip("triton", reason="Triton exists only for Linux")
    fields = {**VARIANTS[name], **({"alpha": 1.0} if kernel == "sdpa" else {})}
    plain, model = _model(**fields, attn_implementation="eager"), _model(**fields, attn_implementation=kernel)
    model.load_state_dict(plain.state_dict())
    images, mask = _images(), torch.rand(3, _prefix(model) + 9) < 0.7
    mask[:, :2] = True
    for attention_mask in (None, mask, mask[:, None, None].expand(-1, 1, mask.shape[1], -1)):
        assert_close(model(images, attention_mask=attention_mask).logits, plain(images, attention_mask=attention_mask).logits, scale=4)


@pytest.mark.parametrize("kernel", ["flex_attention", "flash_attention_2"])
def test_kernels_that_cannot_mask_a_single_query_are_refused(kernel):
    with pytest.raises(ValueError, match=r"class_query.* use 'sdpa', 'hopfield' or 'eager'"):
        _model(encoder_type="class_query", attn_implementation=kernel)


def test_num_labels_can_change_on_load(tmp_path):
    model = _model()
    model.save_pretrained(tmp_path)
    loaded = UHopViTForImageClassification.from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert loaded(_images()).logits.shape == (3, 9)
    assert torch.equal(loaded.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)


def test_it_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        model = UHopViTForImageClassification(UHopViTConfig(**{**SMALL, **VARIANTS["compact"], "learnable_alpha": True}))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("patch_size", "widths"), [(2, [24]), (4, [12, 24])])
def test_conv_patches_equal_a_loop_and_plain_layers(patch_size, widths):
    model = UHopViTModel(UHopViTConfig(**{**SMALL, "patch_size": patch_size}, patch_embedding="conv")).double().eval()
    patches = model.embeddings.patch_embeddings
    kernels = list(patches.parameters())
    assert [len(kernel) for kernel in kernels] == widths
    images = _images(2).double().requires_grad_()
    actual = patches(images)
    for image, tokens in zip(images, actual, strict=True):
        assert_close(tokens, reference.compact_tokens(image.detach().numpy(), [kernel.detach().numpy() for kernel in kernels]))
    plain = images
    for kernel in kernels:
        functional = torch.nn.functional
        plain = functional.max_pool2d(functional.conv2d(plain, kernel, padding=1).relu(), 3, stride=2, padding=1)
    weights = torch.randn_like(actual)
    gradients = [torch.autograd.grad((each * weights).sum(), [images, *kernels]) for each in (actual, plain.flatten(2).mT)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def test_conv_patches_begin_with_the_scale_of_he():
    model = UHopViTModel(UHopViTConfig(hidden_size=192, num_attention_heads=3, num_hidden_layers=1, image_size=32, patch_embedding="conv"))
    for kernel in model.embeddings.patch_embeddings.parameters():
        assert abs(kernel.std().item() / (2.0 / kernel[0].numel()) ** 0.5 - 1.0) < 0.1


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 2])
def test_hopfield_pooling_equals_a_loop(alpha, steps):
    fields = {"pooling": "hopfield", "use_feature_map": False, "beta": 0.9, "alpha": alpha, "update_steps": steps, "layer_norm_eps": 1e-6}
    model = _model(**fields).double()
    with torch.no_grad():
        for parameter in model.vit.pooling.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images, pooling = _images().double(), model.vit.pooling
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:], mask[1, 0] = 0, 0
    outputs = model.vit(images, attention_mask=mask)
    norms = [_arrays(norm) for norm in (pooling.layernorm_query, pooling.layernorm_memory, pooling.layernorm_content)]
    attention = pooling.attention
    projections = [_arrays(each) for each in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)]
    for tokens, present, pooled in zip(outputs.last_hidden_state.detach(), mask.bool(), outputs.pooler_output, strict=True):
        queries = pooling.queries[0].detach().numpy()
        expected = reference.hopfield_pooling(queries, tokens[present].numpy(), norms, projections, 3, 0.9, alpha, steps, 1e-6)
        assert_close(pooled, expected[0])
    assert_close(model(images, attention_mask=mask).logits, model.classifier(outputs.pooler_output))


def test_hopfield_pooling_contains_the_sequence_pooling_of_compact_transformers():
    fields = {"pooling": "hopfield", "use_feature_map": False, "num_attention_heads": 1, "beta": 1.0, "layer_norm_eps": 1e-12}
    model = _model(**fields).double()
    pooling, identity = model.vit.pooling, torch.eye(24, dtype=torch.float64)
    pooling.layernorm_query = torch.nn.Identity()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(pooling.attention, name).weight.copy_(identity)
    outputs = model.vit(_images().double())
    tokens = torch.nn.functional.layer_norm(outputs.last_hidden_state, (24,), eps=1e-12)
    weights = (tokens @ pooling.queries[0].mT).softmax(1)
    assert_close(outputs.pooler_output, (weights * tokens).sum(1))


def test_the_pooler_receives_the_pooled_vector():
    encoder = UHopViTModel(UHopViTConfig(**SMALL, pooling="hopfield")).eval()
    images, pooler = _images(), encoder.pooler
    actual = encoder(images)
    encoder.pooler = None
    pooled = encoder(images).pooler_output
    assert_close(actual.pooler_output, torch.tanh(pooler.dense(pooled)))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("kernel", ["eager", "hopfield"])
def test_local_attention_equals_a_loop(alpha, kernel):
    fields = {**VARIANTS["local"], "use_feature_map": False, "alpha": alpha, "attn_implementation": kernel}
    model = _model(**fields).double()
    layer, tokens = model.vit.layers[0].attention, torch.randn(2, 10, 24, dtype=torch.float64)
    with torch.no_grad():
        layer.log_beta.copy_(torch.tensor([-1.0, 0.2, 0.9]))
    mask = model.vit._attention_mask(tokens, None)
    linears = [_arrays(module) for module in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)]
    betas = layer.beta.flatten().tolist()
    actual = layer(tokens, attention_mask=mask)[0]
    for example, output in zip(tokens, actual, strict=True):
        assert_close(output, reference.locality_attention(example.numpy(), linears, betas, alpha))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_the_gradient_of_a_learned_beta_is_that_of_a_finite_difference(alpha):
    model = _model(**VARIANTS["local"], alpha=alpha, update_steps=2).double()
    images, labels = _images().double(), torch.tensor([1, 2, 3])
    logit = model.vit.layers[1].attention.log_beta
    (gradient,) = torch.autograd.grad(model(images, labels=labels).loss, logit)
    losses = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            logit[1] += step
            losses.append(model(images, labels=labels).loss)
            logit[1] -= step
    assert_close(gradient[1], (losses[0] - losses[1]) / 2e-5)


def test_a_learned_beta_begins_as_configured():
    images = _images()
    for fields in ({}, {"beta": 2.5}):
        fixed, learned = _model(**fields), _model(**fields, learnable_beta=True)
        assert learned.load_state_dict(fixed.state_dict(), strict=False).missing_keys == [
            f"vit.layers.{index}.attention.log_beta" for index in range(2)
        ]
        assert_close(learned(images).logits, fixed(images).logits)


def test_without_a_diagonal_a_single_token_retrieves_nothing():
    model = _model(mask_diagonal=True)
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[0, 1:] = 0
    outputs = model.vit(_images(), attention_mask=mask, output_attentions=True)
    for weights in outputs.attentions:
        assert (weights.diagonal(dim1=-2, dim2=-1) == 0).all()
        assert (weights[0, :, 0] == 0).all()
        assert_close(weights[1:].sum(-1), torch.ones(2, 3, 10))
    assert outputs.last_hidden_state.isfinite().all()


def test_initial_weights_have_the_configured_standard_deviation():
    model = UHopViTModel(UHopViTConfig(hidden_size=192, num_attention_heads=3, num_hidden_layers=1, image_size=32, initializer_range=0.1))
    assert abs(model.layers[0].mlp.fc1.weight.std().item() - 0.1) < 0.002
    assert (model.layers[0].mlp.fc1.bias == 0).all()
    assert abs(model.embeddings.cls_token.std().item() - 0.1) < 0.02
    phi = model.layers[0].attention.feature_map.weight
    assert_close(phi @ phi.mT, torch.eye(192))


@pytest.mark.parametrize("name", ["dense", "class query", "compact"])
def test_a_masked_patch_is_not_a_memory(name):
    model = _model(**VARIANTS[name])
    first = _prefix(model)
    images, mask = _images(), torch.ones(3, first + 9, dtype=torch.long)
    mask[:, first + 3] = 0
    changed = images.clone()
    changed[:, :, 4:8, 0:4] = 9.0
    for one, other in zip(model.memory_sets(images, attention_mask=mask), model.memory_sets(changed, attention_mask=mask), strict=True):
        assert torch.equal(one.mask, mask[:, first:].bool())
        assert torch.equal(one.memories[one.mask], other.memories[other.mask])


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (None, "pixel_values is required"),
        (torch.zeros(1, 3, 16, 12), r"must be \(12, 12\) \(height, width\), got \(16, 12\)"),
        (torch.zeros(1, 1, 12, 12), r"must have shape \(batch_size, 3, height, width\), got \(1, 1, 12, 12\)"),
        (torch.zeros(3, 12, 12), "must have shape"),
        (torch.full((1, 3, 12, 12), torch.nan), "must be finite, got 432 values that are not"),
        (torch.full((1, 3, 12, 12), -torch.inf), "must be finite"),
    ],
)
def test_bad_images_are_refused(pixel_values, message):
    with pytest.raises(ValueError, match=message):
        _model()(pixel_values)


@pytest.mark.parametrize(("name", "count"), [("attention_mask", 10), ("bool_masked_pos", 9)])
def test_masks_of_other_values_than_0_and_1_are_refused(name, count):
    model, images = UHopViTModel(UHopViTConfig(**SMALL), use_mask_token=True).eval(), _images()
    with torch.no_grad():
        model.embeddings.mask_token.fill_(1.0)
    mask = torch.arange(count).expand(3, -1) % 3 > 0
    expected = model(images, **{name: mask}).last_hidden_state
    assert not torch.equal(expected, model(images).last_hidden_state)
    assert torch.equal(model(images, **{name: mask.float()}).last_hidden_state, expected)
    for value in (0.5, 2.0, -1.0, torch.nan):
        with pytest.raises(ValueError, match=f"{name} must be 1 for .* and 0 for others, and has other values, such as {value}"):
            model(images, **{name: torch.full((3, count), value)})


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist], ids=["array", "list"])
@pytest.mark.parametrize("name", ["pixel_values", "attention_mask", "bool_masked_pos"])
def test_inputs_that_are_not_tensors_are_refused(name, convert):
    model = UHopViTModel(UHopViTConfig(**SMALL), use_mask_token=True)
    inputs = {"pixel_values": _images(), "attention_mask": torch.ones(3, 10), "bool_masked_pos": torch.zeros(3, 9)}
    inputs[name] = convert(inputs[name])
    for call in (model, lambda **given: next(model.memory_sets(**given))):
        with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got (numpy.ndarray|builtins.list); torch.as_tensor"):
            call(**inputs)


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, lambda images: images.to(torch.complex64)])
def test_tensors_that_are_not_dense_and_real_are_refused(convert):
    with pytest.raises(TypeError, match=r"pixel_values must be a dense torch.Tensor of real numbers, got torch\.\w+ with layout"):
        _model()(convert(_images()))


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_outside_its_range_is_refused(label):
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 5\), got {label}"):
        _model()(_images(2), labels=torch.tensor([0, label]))


def test_a_configuration_without_return_dict():
    model, images = _model(return_dict=False), _images()
    twin = _model()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(images)[0], twin(images).logits)


def test_a_mask_of_another_number_of_tokens_is_refused():
    model = _model()
    for call in (
        lambda mask: model(_images(2), attention_mask=mask),
        lambda mask: list(model.memory_sets(_images(2), attention_mask=mask)),
    ):
        with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 10\).* got \(2, 9\)"):
            call(torch.ones(2, 9))


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_accumulated_batches_are_one_batch(tmp_path, problem):
    labels = {
        "single_label_classification": torch.arange(8) % 5,
        "multi_label_classification": torch.rand(8, 5).round(),
        "regression": torch.randn(8, 5),
    }[problem]
    examples = [{"pixel_values": image, "labels": label} for image, label in zip(_images(8), labels, strict=True)]
    norms = []
    for size, count in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(_model(problem_type=problem), arguments, train_dataset=examples)
        trainer.train()
        norms.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert_close(torch.tensor(norms[1]), torch.tensor(norms[0]), scale=100)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_takes_batches_of_every_size(variant):
    model = _model(**variant, return_dict=False)
    with torch.no_grad():
        traced = torch.jit.trace(model, _images(2))
        for count in (1, 5):
            images = _images(count)
            assert_close(traced(images)[0], model(images)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attn_implementation": "eager"},
        {"alpha": 1.5},
        {"alpha": 2.0, "attn_implementation": "eager"},
        VARIANTS["class query"],
        {**VARIANTS["compact"], "alpha": 1.0},
    ],
    ids=["sdpa", "eager", "entmax", "sparse", "class query", "compact"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_the_torchscript_exporter_keeps_the_outputs(fields, tmp_path):
    model, path = _model(**{"num_hidden_layers": 1, **fields}, return_dict=False), str(tmp_path / "model.onnx")
    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_axes": {"images": {0: "B"}, "logits": {0: "B"}}}
    torch.onnx.export(model, (_images(2),), path, dynamo=False, opset_version=18, **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (2, 1, 5):
        images = _images(count)
        assert_close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), model(images)[0], scale=10)


PRECISIONS = [(torch.float32, False), *((dtype, autocast) for dtype in (torch.bfloat16, torch.float16) for autocast in (False, True))]


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize("name", ["dense", "entmax", "class query", "compact"])
def test_images_of_large_values_keep_their_classes_or_are_named(name, dtype, autocast):
    """Position embeddings are negligible for large pixels; powers of two make images of all scales
    exact multiples."""
    model = _model(**VARIANTS[name]).to(torch.float32 if autocast else dtype)
    images, kept, refused = torch.rand(2, 3, 12, 12) * 2 - 1, [], []
    for exponent in (6, 9, 12, 15) if dtype == torch.float16 else (33, 50, 63, 70, 100, 127):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            try:
                outputs = model(torch.cat([images[:1], images[1:] * 2.0**exponent]).to(model.dtype), labels=torch.tensor([0, 1]))
            except ValueError as error:
                refused.append(str(error))
                continue
        outputs.loss.backward()
        assert outputs.loss.isfinite()
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
        kept.append(outputs.logits.detach())
    assert len(kept) >= 2
    assert all("image 1 of the batch overflows" in message for message in refused)
    for logits in kept[1:] if dtype != torch.float16 else []:
        assert_close(logits, kept[0], dtype=dtype, scale=10)
