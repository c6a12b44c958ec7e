"""Tests of UHopMIL models: values against the published layer, exact masks, outputs, losses, saving
and loading, errors."""

import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForSequenceClassification, Dinov2Config, ResNetConfig, SwinConfig, Trainer, TrainingArguments

from modeling_uhop import DataCollatorForBags, HopfieldPooling, UHopMILConfig, UHopMILForBagClassification, UHopMILModel, separation_loss
from tests import reference
from tests.conftest import CHECKPOINTING, assert_close
from tests.support.models import BAGS


POOLINGS = {
    "dense": {},
    "entmax": {"alpha": 1.5},
    "sparse": {"alpha": 2.0},
    "learnable": {"alpha": 1.4, "learnable_alpha": True},
    "no phi": {"use_feature_map": False},
    "queries": {"num_queries": 3, "head_dim": 5, "alpha": 1.5},
    "steps": {"update_steps": 3, "beta": 0.7},
    "projected values": {"value_source": "projected_memory"},
    "mean": {"pooling": "mean"},
    "max": {"pooling": "max"},
}


def _model(**fields) -> UHopMILForBagClassification:
    return UHopMILForBagClassification(UHopMILConfig(**{**BAGS, **fields})).eval()


def _bags(sizes=(4, 1, 7), width=6, padded_to=None, dtype=torch.float32):
    """Random bags, and a mask with the items of each bag first."""
    longest = padded_to or max(sizes)
    mask = torch.arange(longest) < torch.tensor(sizes).unsqueeze(1)
    return torch.randn(len(sizes), longest, width, dtype=dtype), mask.long()


@pytest.fixture(params=POOLINGS.values(), ids=POOLINGS.keys())
def variant(request):
    return request.param


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("beta", [None, 1.3])
def test_without_phi_the_model_equals_the_published_layer(alpha, steps, beta):
    config = UHopMILConfig(**{**BAGS, "num_queries": 2, "use_feature_map": False}, alpha=alpha, update_steps=steps, beta=beta)
    layer = HopfieldPooling(config).double()
    layer.reset_parameters()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    items = torch.randn(2, 5, 16, dtype=torch.float64)
    sizes = (5, 3)
    mask = torch.arange(5) < torch.tensor(sizes).unsqueeze(1)
    pooled, _ = layer(items, mask)
    attention = layer.attention
    norms = [
        (norm.weight.tolist(), norm.bias.tolist()) for norm in (layer.layernorm_query, layer.layernorm_memory, layer.layernorm_content)
    ]
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    projections = [(linear.weight.detach().numpy(), linear.bias.detach().numpy()) for linear in linears]
    for index, size in enumerate(sizes):
        expected = reference.hopfield_pooling(
            layer.queries[0].detach().numpy(),
            items[index, :size].numpy(),
            norms,
            projections,
            heads=2,
            beta=8**-0.5 if beta is None else beta,
            alpha=alpha,
            steps=steps,
            eps=config.layer_norm_eps,
        )
        assert_close(pooled[index], expected)


def test_an_orthogonal_phi_equals_no_phi():
    with_phi, without = _model(feature_dim=20), _model(use_feature_map=False)
    state = with_phi.state_dict()
    phi = state.pop("mil.pooling.attention.feature_map.weight")
    for name in ("q_proj", "k_proj"):
        key = f"mil.pooling.attention.{name}.weight"
        state[key] = state[key] @ phi
    without.load_state_dict(state)
    instances, mask = _bags()
    assert_close(with_phi(instances, mask).logits, without(instances, mask).logits)


def test_values_in_padding_have_no_influence_bitwise(variant):
    model = _model(**variant)
    instances, mask = _bags()
    noisy = torch.where(mask.bool().unsqueeze(-1), instances, torch.nan)
    first, second = model(instances, mask, labels=torch.tensor([0, 1, 1])), model(noisy, mask, labels=torch.tensor([0, 1, 1]))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.instance_weights, second.instance_weights)
    gradients = [torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True) for out in (first, second)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_more_padding_has_no_influence_except_rounding(variant):
    model = _model(**variant)
    instances, mask = _bags()
    longer, longer_mask = torch.cat([instances, torch.randn(3, 9, 6)], 1), torch.cat([mask, torch.zeros(3, 9, dtype=torch.long)], 1)
    short, long = model(instances, mask), model(longer, longer_mask)
    assert_close(long.logits, short.logits)
    assert_close(long.instance_weights[:, :7], short.instance_weights)
    assert (long.instance_weights[:, 7:] == 0).all()
    alone = model(instances[:1, :4])
    assert_close(alone.logits, short.logits[:1])


@given(seed=st.integers(0, 1000), alpha=st.sampled_from([1.0, 1.5, 2.0]))
def test_permuted_instances_have_permuted_weights(seed, alpha):
    torch.manual_seed(seed)
    model = _model(alpha=alpha)
    instances, mask = _bags((6, 3), padded_to=6)
    order = torch.randperm(6)
    first, second = model(instances, mask), model(instances[:, order], mask[:, order])
    assert_close(second.logits, first.logits)
    assert_close(second.instance_weights, first.instance_weights[:, order])


def test_an_empty_bag_has_finite_outputs_and_gradients(variant):
    model = _model(**variant).train()
    instances, mask = _bags((0, 3, 0), padded_to=4)
    instances.requires_grad_()
    outputs = model(instances, mask, labels=torch.tensor([1, 0, 0]))
    assert outputs.logits.isfinite().all()
    assert_close(outputs.logits[0], outputs.logits[2])
    assert (outputs.instance_weights[[0, 2]] == 0).all()
    outputs.loss.backward()
    assert (instances.grad[[0, 2]] == 0).all()
    assert (instances.grad[1, :3] != 0).any()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    nothing = model(torch.zeros(2, 0, 6))
    assert_close(nothing.logits, outputs.logits[[0, 2]])


def test_a_bag_of_one_instance_trains():
    model = _model(alpha=1.5).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    instances, labels = torch.randn(8, 1, 6), torch.tensor([0, 1] * 4)
    losses = []
    for _ in range(60):
        outputs = model(instances, labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[-1] < 0.1 < losses[0]
    assert_close(outputs.instance_weights, torch.ones(8, 1))


def test_outputs(variant):
    model = _model(**variant, num_embedding_layers=2)
    instances, mask = _bags()
    outputs = model(instances, mask, output_hidden_states=True, output_attentions=True)
    weights = outputs.instance_weights
    assert_close(weights.sum(-1), torch.ones(3))
    assert [state.shape for state in outputs.hidden_states] == [(3, 7, 16)] * 2
    if "pooling" not in variant:
        heads = outputs.attentions[0]
        assert heads.shape == (3, 2, variant.get("num_queries", 1), 7)
        assert_close(heads.mean((1, 2)), weights)
    else:
        assert outputs.attentions == ()
    base = model.mil(instances, mask)
    assert_close(model.classifier(torch.relu(base.pooler_output)), outputs.logits)
    assert_close(base.last_hidden_state, outputs.hidden_states[-1] * mask.unsqueeze(-1))
    assert isinstance(model(instances, mask, return_dict=False), tuple)


def test_mean_and_max_pooling():
    instances, mask = _bags((2, 3), padded_to=3)
    for pooling in ("mean", "max"):
        model = _model(pooling=pooling)
        outputs = model.mil(instances, mask)
        for index, size in enumerate((2, 3)):
            states = outputs.last_hidden_state[index, :size]
            assert_close(outputs.pooler_output[index], states.mean(0) if pooling == "mean" else states.amax(0))
    # After relu, many features are 0 in every instance; these count for the first instance.
    winners = states.argmax(0)
    assert_close(outputs.instance_weights[1], torch.bincount(winners, minlength=3) / 16)


def test_bag_dropout_drops_instances_and_keeps_at_least_one():
    model = _model(bag_dropout_prob=0.9).train()
    instances, mask = _bags((5, 1, 0), padded_to=6)
    kept = torch.zeros(3, 6)
    for _ in range(50):
        used = model(instances, mask).instance_weights > 0
        assert (used.sum(-1) >= torch.tensor([1, 1, 0])).all()
        assert not used[~mask.bool()].any()
        kept += used
    assert (kept[0, :5] > 0).all()
    assert (kept[0, :5] < 50).all()
    assert kept[1, 0] == 50
    assert torch.equal(model.eval()(instances, mask).logits, _same(model)(instances, mask).logits)


def _same(model: UHopMILForBagClassification) -> UHopMILForBagClassification:
    twin = _model()
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_labels": 2}, torch.tensor([0, 1, 1])),
        ({"num_labels": 5}, torch.tensor([0, 4, 2])),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])),
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0])),
    ],
)
def test_losses(fields, labels):
    model = _model(**fields)
    instances, mask = _bags()
    outputs = model(instances, mask, labels=labels)
    if fields.get("problem_type"):
        expected = torch.nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)
    elif fields["num_labels"] == 1:
        expected = (outputs.logits[:, 0] - labels).square().mean()
    else:
        expected = torch.nn.functional.cross_entropy(outputs.logits, labels)
    assert_close(outputs.loss, expected)


@pytest.mark.parametrize("fields", [{}, {"alpha": 1.5}], ids=["dense", "entmax"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(fields, dtype):
    model = _model(**fields)
    instances, mask = _bags()
    expected = model(instances, mask).logits
    actual = model.to(dtype)(instances, mask)
    assert actual.logits.dtype == dtype
    assert_close(actual.logits, expected, dtype=min(dtype, torch.float32, key=lambda d: -torch.finfo(d).eps), scale=4)


def test_memory_sets_are_what_the_layer_retrieves_from():
    model = _model()
    instances, mask = _bags()
    (memory_set,) = model.memory_sets(instances, attention_mask=mask, labels=None)
    states = model.mil(instances, mask).last_hidden_state
    assert_close(memory_set.memories, model.mil.pooling.layernorm_memory(states))
    assert torch.equal(memory_set.mask, mask.bool())
    assert memory_set.feature_map is model.mil.pooling.attention.feature_map
    loss = separation_loss(memory_set.feature_map(memory_set.memories), mask=memory_set.mask)
    alone = [separation_loss(memory_set.feature_map(memory_set.memories[i : i + 1, :size])) for i, size in ((0, 4), (2, 7))]
    assert_close(loss, sum(alone) / 2)


IMAGES = {
    "cnn": {"instance_type": "image"},
    "resnet": {
        "instance_type": "backbone",
        "backbone_config": ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", out_features=["stage2"]),
    },
    "swin": {
        "instance_type": "backbone",
        "backbone_config": SwinConfig(image_size=16, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, out_features=["stage2"]),
    },
}


@pytest.mark.parametrize("fields", IMAGES.values(), ids=IMAGES.keys())
def test_bags_of_images(fields, tmp_path):
    model = _model(**fields)
    images, mask = torch.randn(3, 5, 3, 16, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    outputs = model(images, mask, labels=torch.tensor([0, 1, 1]))
    outputs.loss.backward()
    assert all(
        parameter.grad.isfinite().all()
        for name, parameter in model.named_parameters()
        if "mask_token" not in name and parameter.grad is not None
    )
    assert_close(model(images[:1, :3]).logits, outputs.logits[:1])
    # Padding must not be an image in training either, because batch norms would include it.
    model.train()
    torch.manual_seed(0)
    first = model(images, mask).logits
    torch.manual_seed(0)
    second = model(torch.where(mask.bool()[..., None, None, None], images, 100.0), mask).logits
    assert torch.equal(first, second)
    model.eval().save_pretrained(tmp_path)
    reloaded = UHopMILForBagClassification.from_pretrained(tmp_path)
    assert torch.equal(reloaded(images, mask).logits, model(images, mask).logits)
    assert model(torch.zeros(2, 0, 3, 16, 16)).logits.isfinite().all()


def test_saving_and_loading(variant, tmp_path):
    model = _model(**variant)
    model.save_pretrained(tmp_path)
    instances, mask = _bags()
    for loaded in (UHopMILForBagClassification.from_pretrained(tmp_path), AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        assert type(loaded) is UHopMILForBagClassification
        assert torch.equal(loaded(instances, mask).logits, model(instances, mask).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is UHopMILModel
    assert torch.equal(base(instances, mask).pooler_output, model.mil(instances, mask).pooler_output)


@pytest.mark.parametrize("fields", [{}, {"num_labels": 3, "problem_type": "multi_label_classification"}], ids=["single", "multi"])
def test_gradient_accumulation_changes_nothing(fields, tmp_path):
    weights = []
    labels = torch.rand(8, 3).round() if fields else torch.randint(2, (8,))
    if not fields:
        labels[0] = -100  # which is ignored, in its part of the batch and in the whole batch
    bags = [{"instances": torch.randn(3, 6), "label": label.tolist()} for label in labels]
    for batch_size in (8, 2):
        torch.manual_seed(0)
        model = _model(**fields)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            **{CHECKPOINTING: batch_size == 2},
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, DataCollatorForBags(), bags).train()
        weights.append(model.classifier.weight)
    assert_close(weights[1], weights[0])


def test_a_configuration_without_return_dict():
    model = _model(return_dict=False)
    instances, mask = _bags()
    assert torch.equal(model(instances, mask)[0], _same(model)(instances, mask).logits)


def test_it_compiles_in_one_graph():
    model = _model(alpha=1.5)
    instances, mask = _bags()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(instances, mask).logits, model(instances, mask).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "instances is required"),
        ({"instances": torch.zeros(2, 3, 5)}, r"shape \(B, N, 6\), got \(2, 3, 5\)"),
        ({"instances": torch.zeros(3, 6)}, r"shape \(B, N, 6\), got \(3, 6\)"),
        ({"instances": torch.zeros(2, 3, 6), "attention_mask": torch.ones(2, 4)}, r"attention_mask must have shape \(2, 3\), got \(2, 4\)"),
        (
            {"instances": torch.zeros(2, 3, 6), "attention_mask": torch.tensor([[0.0, 0.0, -torch.inf]] * 2)},
            "must be 1 for instances and 0 for padding",
        ),
        ({"instances": torch.full((2, 3, 6), torch.nan)}, "instance 0 of bag 0 of the batch is not"),
        ({"instances": torch.zeros(2, 3, 6), "labels": torch.tensor([0, 2])}, r"labels must lie in \[0, 2\), got 2"),
    ],
)
def test_bad_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        _model()(**arguments)


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist], ids=["array", "list"])
@pytest.mark.parametrize("name", ["instances", "attention_mask"])
def test_inputs_that_are_not_tensors_are_refused(name, convert):
    inputs = dict(zip(("instances", "attention_mask"), _bags(), strict=True))
    inputs[name] = convert(inputs[name])
    model = _model()
    for call in (model, model.mil, lambda **given: next(model.memory_sets(**given))):
        with pytest.raises(TypeError, match=rf"{name} must be a torch.Tensor, got (numpy.ndarray|builtins.list); torch.as_tensor"):
            call(**inputs)


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, lambda bags: bags.to(torch.complex64), torch.nested.as_nested_tensor])
def test_tensors_that_are_not_dense_and_real_are_refused(convert):
    with pytest.raises(TypeError, match=r"instances must be a dense torch.Tensor of real numbers, got torch\.\w+ with layout"):
        _model()(convert(_bags()[0]))


def test_a_bad_instance_is_named():
    instances, mask = _bags((2, 3), padded_to=3)
    instances[1, 2, 4] = torch.inf
    with pytest.raises(ValueError, match=r"instances must be finite in torch.float32, but instance 2 of bag 1 of the batch is not"):
        _model()(instances, mask)


@pytest.mark.parametrize("asked", ["output_attentions", "output_hidden_states"])
def test_additional_outputs_do_not_change_the_backbone(asked):
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage2"],
        initializer_range=0.3,
    )
    model = _model(instance_type="backbone", backbone_config=backbone)
    images = torch.randn(2, 3, 3, 28, 28)
    expected = model(images).logits
    assert_close(model(images, **{asked: True}).logits, expected)
    assert_close(model(images).logits, expected)


def test_the_configuration_can_request_additional_outputs():
    outputs = _model(output_attentions=True, output_hidden_states=True, num_embedding_layers=2)(*_bags())
    assert [states.shape for states in outputs.hidden_states] == [(3, 7, 16)] * 2
    assert [weights.shape for weights in outputs.attentions] == [(3, 2, 1, 7)]
    assert _model(pooling="mean")(*_bags(), output_attentions=True).attentions == ()


@pytest.mark.parametrize("fields", [{}, {"output_attentions": True, "output_hidden_states": True}], ids=["logits", "everything"])
def test_metrics_are_computed_from_logits(tmp_path, fields):
    """Batches are padded to 4, 2 and 7 instances."""
    bags = [torch.randn(size, 6) for size in (3, 4, 1, 2, 7)]
    seen = []

    def keep(prediction):
        seen.append(prediction.predictions)
        return {}

    model = _model(**fields)
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to="none", disable_tqdm=True, dataloader_pin_memory=False),
        DataCollatorForBags(),
        eval_dataset=[{"instances": bag, "labels": len(bag) % 2} for bag in bags],
        compute_metrics=keep,
    )
    trainer.evaluate()
    alone = [model(bag[None], output_hidden_states=True) for bag in bags]
    for logits in (seen[0], trainer.predict(trainer.eval_dataset).predictions):
        assert_close(torch.from_numpy(logits), torch.cat([outputs.logits for outputs in alone]))
    logits, weights, *rest = trainer.predict(trainer.eval_dataset, ignore_keys=["attentions"]).predictions
    for index, (bag, outputs) in enumerate(zip(bags, alone, strict=True)):
        assert_close(torch.from_numpy(weights[index, : len(bag)]), outputs.instance_weights[0])
        if fields:
            assert_close(torch.from_numpy(rest[0][0][index, : len(bag)]), outputs.hidden_states[0][0])


def test_pooling_accepts_integer_masks_or_no_mask():
    layer = HopfieldPooling(UHopMILConfig(**BAGS)).eval()
    states, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.equal(layer(states, mask)[0], layer(states, mask.bool())[0])
    assert torch.equal(layer(states)[0], layer(states, torch.ones(2, 5, dtype=torch.bool))[0])


SIZES = ((2, 4), (3, 7), (1, 600))
TRACED = {"dense": {}, "entmax": {"alpha": 1.5}, "sparse": {"alpha": 2.0}, "queries": {"num_queries": 3}, "max": {"pooling": "max"}}


def _inputs(model, size):
    shape = (6,) if model.config.instance_type == "vector" else (3, 8, 8)
    mask = torch.ones(size, dtype=torch.long)
    mask[0, size[1] // 2 :] = 0
    return torch.randn(*size, *shape), mask


@pytest.mark.parametrize("first", [*SIZES, None], ids=["short", "middle", "long", "empty"])
@pytest.mark.parametrize("fields", [*TRACED.values(), *IMAGES.values()], ids=[*TRACED, *IMAGES])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_accepts_bags_of_every_size(fields, first):
    """This holds for models traced with long bags or with empty ones."""
    if first is None and fields is IMAGES["swin"]:
        pytest.skip("transformers' Swin takes no batch without an image")
    model = _model(**fields, return_dict=False)
    images = model.config.instance_type != "vector"
    instances, mask = _inputs(model, first or (2, 4))
    with torch.no_grad():
        traced = torch.jit.trace(
            model, (instances[:, :9] if images else instances, (mask[:, :9] if images else mask) * (first is not None))
        )
        for size in SIZES[:2] if images else SIZES:
            inputs = _inputs(model, size)
            for given, expected in zip(traced(*inputs), model(*inputs), strict=True):
                assert_close(given, expected)


@pytest.mark.parametrize("fields", [*TRACED.values(), *IMAGES.values()], ids=[*TRACED, *IMAGES])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_the_torchscript_exporter_keeps_the_outputs(fields, tmp_path):
    model, path, both = _model(**fields, return_dict=False), str(tmp_path / "model.onnx"), {0: "B", 1: "N"}
    names = {"input_names": ["instances", "mask"], "output_names": ["logits", "weights"]}
    axes = {"instances": both, "mask": both, "logits": {0: "B"}, "weights": both}
    torch.onnx.export(model, _inputs(model, (2, 4)), path, dynamo=False, opset_version=18, dynamic_axes=axes, **names)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        inputs = _inputs(model, size)
        given = session.run(None, {name: tensor.numpy() for name, tensor in zip(names["input_names"], inputs, strict=True)})
        for array, expected in zip(given, model(*inputs), strict=True):
            assert_close(torch.from_numpy(array), expected, scale=10)


PRECISIONS = [(torch.float32, False), *((dtype, autocast) for dtype in (torch.bfloat16, torch.float16) for autocast in (False, True))]
# Powers of two, so that bags of all scales are exact multiples of each other; the largest float16
# is 65504.
LARGE = {torch.float32: (33, 56, 63, 70, 100, 127), torch.bfloat16: (33, 56, 63, 70, 100, 127), torch.float16: (9, 12, 15)}


@pytest.mark.parametrize(("dtype", "autocast"), PRECISIONS)
@pytest.mark.parametrize("name", ["dense", "entmax", "mean", "cnn", "resnet"])
def test_bags_of_large_values_keep_their_classes_or_are_named(name, dtype, autocast):
    """The layer norms of the pooling remove the scale of a bag of large values, and nothing
    else."""
    model = _model(**{**POOLINGS, **IMAGES}[name]).to(torch.float32 if autocast else dtype)
    bags = torch.rand(3, 4, *((6,) if name in POOLINGS else (3, 8, 8))) * 2 - 1
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    kept, refused = [], []
    for exponent in LARGE[dtype]:
        instances = torch.cat([bags[:1], bags[1:] * 2.0**exponent]).to(model.dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            try:
                outputs = model(instances, mask, labels=torch.tensor([0, 1, 1]))
            except ValueError as error:
                refused.append(str(error))
                continue
        outputs.loss.backward()
        assert outputs.loss.isfinite()
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
        kept.append(outputs.logits.detach())
    assert len(kept) >= 2
    assert all("bag 1 of the batch overflows" in message for message in refused)
    for logits in kept[1:] if name != "mean" else []:
        assert_close(logits, kept[0], dtype=dtype, scale=4)


def test_weights_that_are_not_finite_are_named_too():
    model = _model()
    model.classifier.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"bag 0 of the batch overflows .* or weights of the model are not finite"):
        model(*_bags())
