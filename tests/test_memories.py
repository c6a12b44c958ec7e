"""Observed memories equal those of a second forward pass written out for each family."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from modeling_uhop import (
    STanHopConfig,
    STanHopForPrediction,
    STanHopModel,
    UHopMemoryConfig,
    UHopMemoryModel,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTConfig,
    UHopViTForImageClassification,
    denoising_loss,
    separation_loss,
)
from modeling_uhop.memories import MemorySet, observe, present_memories
from tests.conftest import CHECKPOINTING, assert_close
from tests.support.models import COMPACT


def _vit_sets(model, batch, include_class_token=False):
    """Each layer's tokens after its first layer norm, computed layer by layer."""
    vit = model.vit
    given = batch.get("attention_mask")
    hidden_states = vit._embed(batch["pixel_values"], None, None, given)
    mask = vit._attention_mask(hidden_states, given)
    is_class_query = model.config.encoder_type == "class_query"
    first = 0 if vit.pooling is not None else 1 if is_class_query or not include_class_token else 0
    present = None if given is None else given[:, first:].bool()
    for index, layer in enumerate(vit.layers):
        if index > 0:
            hidden_states = vit.layers[index - 1](hidden_states, mask)
        tokens = hidden_states if is_class_query else layer.layernorm_before(hidden_states)
        yield MemorySet(layer.attention.feature_map, tokens[:, first:], present)
    if vit.pooling is not None:
        final = vit.layernorm(vit.layers[-1](hidden_states, mask))
        yield MemorySet(vit.pooling.attention.feature_map, vit.pooling.layernorm_memory(final), present)


def _mil_sets(model, batch):
    """The embedded instances after the layer norm of memories."""
    hidden_states, mask = model.mil._embed(batch["instances"], batch.get("attention_mask"))
    pooling = model.mil.pooling
    yield MemorySet(pooling.attention.feature_map, pooling.layernorm_memory(hidden_states[-1]), mask)


def _block_sets(block, hidden_states):
    """What the three layers of a block retrieve from, and the output of the block."""
    over_time = hidden_states.flatten(0, 1)
    yield MemorySet(block.time.attention.feature_map, over_time)
    series = block.time(over_time, over_time).unflatten(0, hidden_states.shape[:2]).transpose(1, 2).flatten(0, 1)
    yield MemorySet(block.pooling.feature_map, series)
    pooled = block.pooling(block.prototypes.expand(len(series), -1, -1), series)[0]
    yield MemorySet(block.series.attention.feature_map, pooled)


def _stanhop_sets(model, batch):
    """What the blocks of the encoder and of the decoder retrieve from, scale by scale."""
    encoder = model if isinstance(model, STanHopModel) else model.model
    scales = encoder(batch["past_values"], batch.get("past_observed_mask")).scales
    for index, block in enumerate(encoder.blocks):
        yield from _block_sets(block, encoder.mergers[index - 1](scales[index]) if index > 0 else scales[0])
    if model is encoder:
        return
    hidden_states = model.decoder.position_embeddings
    for index, (layer, encoded) in enumerate(zip(model.decoder.layers, scales, strict=True)):
        if index > 0:
            hidden_states = hidden_states.expand(len(encoded), -1, -1, -1)
            hidden_states, _ = model.decoder.layers[index - 1](hidden_states, scales[index - 1])
        yield from _block_sets(layer.block, hidden_states)
        yield MemorySet(layer.cross.attention.feature_map, encoded.flatten(0, 1))


def _vit(**fields):
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_attention_heads": 2}
    return UHopViTForImageClassification(UHopViTConfig(**sizes, intermediate_size=24, num_hidden_layers=3, **fields))


def _images(masked=False, count=5):
    batch = {"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.tensor([0, 1, 1])}
    if masked:
        batch["attention_mask"] = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])[:, -count:]
    return batch


def _bags(masked=True):
    batch = {"instances": torch.randn(3, 5, 6), "labels": torch.tensor([0, 1, 1])}
    if masked:
        batch["attention_mask"] = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return batch


def _windows(observed=True):
    batch = {"past_values": torch.randn(2, 24, 3).cumsum(1), "future_values": torch.randn(2, 10, 3)}
    if not observed:
        batch["past_observed_mask"] = torch.rand(2, 24, 3) > 0.2
    return batch


def _stanhop(cls=STanHopForPrediction, **fields):
    sizes: dict[str, Any] = {"num_input_channels": 3, "context_length": 24, "prediction_length": 10, "patch_length": 4, "d_model": 16}
    return cls(STanHopConfig(**sizes, ffn_dim=16, num_hidden_layers=2, num_prototypes=3, num_attention_heads=2, **fields))


def _mil(**fields):
    return UHopMILForBagClassification(UHopMILConfig(instance_dim=6, hidden_size=16, num_attention_heads=2, **fields))


CASES = {
    "vit": (_vit, _images, _vit_sets),
    "vit alpha 1.5": (lambda: _vit(alpha=1.5), _images, _vit_sets),
    "vit learnable alpha": (lambda: _vit(alpha=1.5, learnable_alpha=True), lambda: _images(masked=True), _vit_sets),
    "vit masked": (_vit, lambda: _images(masked=True), _vit_sets),
    "vit masked alpha 2": (lambda: _vit(alpha=2.0), lambda: _images(masked=True), _vit_sets),
    "vit no phi": (lambda: _vit(use_feature_map=False), _images, _vit_sets),
    "vit pooled": (lambda: _vit(pooling="hopfield"), _images, _vit_sets),
    "vit compact": (lambda: _vit(**COMPACT), _images, _vit_sets),
    "vit compact masked": (lambda: _vit(**COMPACT), lambda: _images(masked=True, count=4), _vit_sets),
    "vit class query": (lambda: _vit(encoder_type="class_query"), lambda: _images(masked=True), _vit_sets),
    "mil": (_mil, _bags, _mil_sets),
    "mil without a mask": (lambda: _mil(alpha=1.5), lambda: _bags(masked=False), _mil_sets),
    "stanhop": (_stanhop, _windows, _stanhop_sets),
    "stanhop alpha 2, values missing": (
        lambda: _stanhop(alpha=2.0, learnable_alpha=False),
        lambda: _windows(observed=False),
        _stanhop_sets,
    ),
    "stanhop encoder": (lambda: _stanhop(STanHopModel), lambda: {"past_values": torch.randn(2, 24, 3)}, _stanhop_sets),
}


def _case(name):
    torch.manual_seed(0)
    build, batch, reference = CASES[name]
    return build().eval(), batch(), reference


def _loss(sets):
    return torch.stack([separation_loss(each.features(), mask=each.mask) for each in sets]).sum()


def _assert_equal_sets(model, batch, reference, **options):
    """Compare the sets, and the summed separation loss and its gradients."""
    found, expected = list(model.memory_sets(**batch, **options)), list(reference(model, batch, **options))
    assert [each.feature_map for each in found] == [each.feature_map for each in expected]
    assert len(found) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.memories, theirs.memories)
        everything = torch.ones(theirs.memories.shape[:2], dtype=torch.bool)
        assert torch.equal(*(everything if each.mask is None else each.mask for each in (ours, theirs)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = [_loss(sets) for sets in (found, expected)]
    assert_close(losses[0], losses[1])
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True) for loss in losses]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)
    assert any(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize("name", CASES)
def test_observed_memories_equal_the_second_pass(name):
    _assert_equal_sets(*_case(name))


@pytest.mark.parametrize("name", ["vit", "vit masked"])
def test_class_tokens_are_memories_if_asked_for(name):
    _assert_equal_sets(*_case(name), include_class_token=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vit", "mil", "stanhop"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    model, batch, reference = _case(name)
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    # Layers checkpoint only in training mode; without dropout this mode computes the same.
    model.config.attention_probs_dropout_prob = 0.0
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    found = list(model.memory_sets(**batch))
    assert all(module.gradient_checkpointing for module in layers)
    assert len(layers) > 0
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    getattr(model, f"{CHECKPOINTING}_disable")()
    model.eval()
    expected = list(reference(model, batch))
    losses = [_loss(sets) for sets in (found, expected)]
    for ours, theirs in zip(*(torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in losses), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["vit masked alpha 2", "mil", "stanhop"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_observed_uncompiled(name, in_place):
    model, batch, reference = _case(name)

    def fail(*args):
        raise AssertionError("the observed pass was compiled")

    if in_place:
        model.compile(backend=fail)
    compiled: Any = model if in_place else torch.compile(model, backend=fail)
    for ours, theirs in zip(compiled.memory_sets(**batch), reference(model, batch), strict=True):
        assert_close(ours.memories, theirs.memories)


@pytest.mark.parametrize("name", ["vit masked", "mil", "stanhop"])
def test_the_two_views_of_denoising_agree(name):
    model, batch, reference = _case(name)
    noisy = {**batch, model.main_input_name: batch[model.main_input_name] + 0.3}
    losses = []
    for sets in (lambda view: model.memory_sets(**view), lambda view: reference(model, view)):
        pairs = zip(sets(batch), sets(noisy), strict=True)
        losses.append(torch.stack([denoising_loss(copy.features(), each.features(), mask=each.mask) for each, copy in pairs]).sum())
    assert_close(*losses)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapted_model_is_observed():
    peft = pytest.importorskip("peft")
    model, batch, reference = _case("vit")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], target_parameters=["feature_map.weight"], r=2))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = list(adapted.memory_sets(**batch))
    for ours, theirs in zip(found, reference(model, batch), strict=True):
        assert_close(ours.features(), theirs.features())


def test_the_pass_ends_where_the_last_layer_retrieves():
    model, batch, _ = _case("stanhop")
    calls = []
    for name, module in model.named_modules():
        if type(module).__name__ == "HopfieldAttention":
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    sets = list(model.memory_sets(**batch))
    assert len(calls) == len(sets) - 1
    assert "decoder.layers.2.cross.attention" not in calls
    calls.clear()
    model(**batch)
    assert len(calls) == len(sets)


def test_threads_observe_their_own_pass():
    model, batch, reference = _case("vit")
    expected = list(reference(model, batch))
    logits = model(**batch).logits

    def call(index: int) -> bool:
        if index % 2:
            return torch.allclose(model(**batch).logits, logits, atol=1e-5)
        found = list(model.memory_sets(**batch))
        return len(found) == len(expected) and all(
            torch.allclose(ours.memories, theirs.memories, atol=1e-5) for ours, theirs in zip(found, expected, strict=True)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


def test_an_error_in_the_pass_is_raised_and_leaves_no_hook():
    model, batch, _ = _case("vit")
    with pytest.raises(ValueError, match="pixel_values must be finite"):
        model.memory_sets(pixel_values=batch["pixel_values"] * float("nan"))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    "model",
    [_mil(pooling="mean"), UHopMILForBagClassification(UHopMILConfig(instance_dim=6, hidden_size=8, pooling="max", num_attention_heads=2))],
)
def test_a_model_without_a_hopfield_layer_is_refused(model):
    with pytest.raises(ValueError, match="has no memories to separate, because it has no Hopfield layer"):
        model.memory_sets(**_bags())


def test_the_memory_model_gives_its_stored_patterns():
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=5))
    memory.store(torch.randn(7, 5))
    (only,) = memory.memory_sets()
    assert only.feature_map is memory.feature_map
    assert torch.equal(only.memories, memory.memories.unsqueeze(0))
    assert only.mask is None


def test_masks_of_all_kinds_say_which_memories_are_present():
    memories = torch.randn(2, 4, 3)

    def _present(mask: torch.Tensor) -> Any:
        return present_memories(mask, memories)

    present = torch.tensor([[True, True, False, True], [True, False, False, False]])
    added = torch.zeros(2, 1, 1, 4).masked_fill(~present[:, None, None], torch.finfo(torch.float32).min)
    for mask in (present, present.long(), present[:, None, None], added, added.masked_fill(added < 0, -torch.inf)):
        assert _present(mask).equal(present)
    # A memory is present if any head of any query may retrieve it.
    causal = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    assert _present(causal).all()
    assert _present(causal[:, :, :2]).tolist() == [[True, True, False, False]] * 2
    assert present_memories(None, memories) is None


def test_a_stock_model_has_no_layer_to_observe():
    bert = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    assert observe(bert, lambda: bert(torch.tensor([[1, 2]]))) == []
