"""Tests of the conversion of vision transformers to U-Hop models with equal outputs, and back."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from modeling_uhop import SeparationCallback, UHopViTConfig, UHopViTForImageClassification, UHopViTModel
from tests.conftest import assert_close


SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 5,
    "initializer_range": 0.2,
}
CLASSIFIERS = {
    "vit": (ViTForImageClassification, ViTConfig),
    "vit_msn": (ViTMSNForImageClassification, ViTMSNConfig),
    "deit": (DeiTForImageClassification, DeiTConfig),
}


def _classifier(kind: str, **fields):
    model_class, config_class = CLASSIFIERS[kind]
    model = model_class(config_class(**{**SMALL, **fields})).eval()
    # Because some initial parameters are 0, which would hide a parameter that is not copied, we
    # make all of them random.
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _images(count=3, size=12):
    return torch.randn(count, 3, size, size)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_keeps_its_logits_loss_and_gradients(kind):
    theirs = _classifier(kind, id2label={0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}, layer_norm_eps=1e-6, hidden_act="relu")
    ours = UHopViTForImageClassification.from_vit(theirs)
    images, labels = _images(), torch.tensor([0, 4, 2])
    actual, expected = ours(images, labels=labels), theirs(images, labels=labels)
    assert (actual.logits - expected.logits).abs().max() < 1e-5
    actual.loss.backward()
    expected.loss.backward()
    for name, parameter in theirs.base_model.named_parameters():
        assert_close(ours.vit.get_parameter(name).grad, parameter.grad, scale=3)
    for layer in ours.vit.layers:
        assert torch.equal(layer.attention.feature_map.weight, torch.eye(24))
    assert ours.config.id2label == theirs.config.id2label
    assert not ours.training


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("legacy", [True, False], ids=["saved keys", "keys of the modules"])
def test_a_checkpoint_on_disk_is_converted(kind, legacy, tmp_path):
    theirs = _classifier(kind)
    theirs.save_pretrained(tmp_path, save_original_format=legacy)
    keys = load_file(tmp_path / "model.safetensors")
    assert any("attention.attention.query" in key for key in keys) is legacy
    images = _images()
    ours = UHopViTForImageClassification.from_vit(tmp_path)
    assert (ours(images).logits - theirs(images).logits).abs().max() < 1e-5
    encoder = UHopViTModel.from_vit(str(tmp_path)).eval()
    assert_close(encoder(images).last_hidden_state, theirs.base_model(images).last_hidden_state)


def test_an_encoder_keeps_its_pooler():
    theirs = ViTModel(ViTConfig(**SMALL)).eval()
    images = _images()
    assert_close(UHopViTModel.from_vit(theirs)(images).pooler_output, theirs(images).pooler_output)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_images_of_another_size_give_equal_outputs(kind):
    theirs = _classifier(kind)
    ours, images = UHopViTForImageClassification.from_vit(theirs), _images(size=20)
    expected = theirs(images, interpolate_pos_encoding=True).logits
    assert_close(ours(images, interpolate_pos_encoding=True).logits, expected)


def test_alpha_changes_the_function_and_not_the_weights():
    theirs = _classifier("vit")
    dense, sparse = (UHopViTForImageClassification.from_vit(theirs, alpha=alpha) for alpha in (1.0, 1.5))
    images = _images()
    assert not torch.allclose(dense(images).logits, sparse(images).logits, atol=1e-3)
    assert all(torch.equal(one, other) for one, other in zip(dense.parameters(), sparse.parameters(), strict=True))
    learnable = UHopViTForImageClassification.from_vit(theirs, alpha=1.5, learnable_alpha=True, beta=0.7, update_steps=2)
    assert (learnable.config.beta, learnable.config.update_steps) == (0.7, 2)
    assert_close(learnable.vit.layers[0].attention.alpha, torch.full((3, 1, 1), 1.5))


def test_a_learned_beta_begins_with_the_outputs_of_the_source_and_a_masked_diagonal_does_not():
    theirs, images = _classifier("vit"), _images()
    expected = theirs(images).logits
    assert_close(UHopViTForImageClassification.from_vit(theirs, learnable_beta=True)(images).logits, expected)
    local = UHopViTForImageClassification.from_vit(theirs, learnable_beta=True, mask_diagonal=True)
    assert not torch.allclose(local(images).logits, expected, atol=1e-3)


def test_settings_that_the_weights_do_not_determine_can_be_chosen():
    theirs, images = _classifier("vit"), _images()
    chosen = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.125, "initializer_range": 0.5}
    ours = UHopViTForImageClassification.from_vit(theirs, **chosen)
    assert {name: getattr(ours.config, name) for name in chosen} == chosen
    assert_close(ours(images).logits, theirs(images).logits)


def test_half_precision_is_kept():
    theirs = _classifier("vit").to(torch.bfloat16)
    ours, images = UHopViTForImageClassification.from_vit(theirs), _images().bfloat16()
    assert ours.dtype == torch.bfloat16
    assert_close(ours(images).logits, theirs(images).logits.double(), dtype=torch.bfloat16, scale=4)


def test_another_number_of_labels_or_a_missing_head_gives_a_new_classifier(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    theirs = _classifier("vit")
    ours = UHopViTForImageClassification.from_vit(theirs, num_labels=7)
    assert "['classifier'] of UHopViTForImageClassification are newly initialized, not taken from ViTForImageClassification" in caplog.text
    assert ours(_images()).logits.shape == (3, 7)
    caplog.clear()
    encoder = ViTModel(ViTConfig(**SMALL), add_pooling_layer=False)
    UHopViTForImageClassification.from_vit(encoder)
    assert "'classifier'" in caplog.text
    caplog.clear()
    UHopViTModel.from_vit(encoder)
    assert "'pooler.dense.weight'" in caplog.text
    caplog.clear()
    UHopViTForImageClassification.from_vit(theirs)
    assert caplog.text == ""


def test_a_classifier_does_not_keep_the_mask_token():
    theirs = ViTForMaskedImageModeling(ViTConfig(**SMALL)).eval()
    images = _images()
    encoder = UHopViTModel.from_vit(theirs)
    assert_close(encoder(images).last_hidden_state, theirs.vit(images).last_hidden_state)


@pytest.mark.parametrize("kind", ["vit", "deit"])
@pytest.mark.parametrize("start", ["identity", "normal"])
def test_a_conversion_and_its_inverse_keep_the_model(kind, start, tmp_path):
    theirs = _classifier(kind)
    ours = UHopViTForImageClassification.from_vit(theirs)
    if start == "normal":
        for layer in ours.vit.layers:
            torch.nn.init.normal_(layer.attention.feature_map.weight, std=24**-0.5)
    back = ours.to_vit()
    assert type(back) is type(theirs)
    images = _images()
    assert_close(back(images).logits, ours(images).logits)
    back.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, back(images).logits)
    if start == "identity":
        for name, parameter in theirs.named_parameters():
            assert torch.equal(back.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    "fields",
    [
        {"beta": 0.9},
        {"value_source": "projected_memory"},
        {"feature_dim": 31},
        {"qkv_bias": False},
        {"learnable_beta": True},
        {"attention_init": "mimetic"},
    ],
)
def test_any_model_of_softmax_blocks_becomes_a_vit(fields):
    ours = UHopViTForImageClassification(UHopViTConfig(**{**SMALL, **fields})).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith(("log_beta", "_proj.bias")):
            torch.nn.init.normal_(parameter)
    images = _images()
    assert_close(ours.to_vit()(images).logits, ours(images).logits)
    encoder = UHopViTModel(UHopViTConfig(**{**SMALL, **fields}), use_mask_token=True).eval()
    masked = torch.tensor([[True] + [False] * 8] * 3)
    expected = encoder(images, bool_masked_pos=masked)
    actual = encoder.to_vit()(images, bool_masked_pos=masked)
    assert_close(actual.pooler_output, expected.pooler_output)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, "needs a fixed alpha=1, got alpha=1.5"),
        ({"alpha": 1.5, "learnable_alpha": True}, "learnable_alpha=True"),
        ({"update_steps": 2}, "update_steps=2"),
        ({"encoder_type": "class_query"}, "got 'class_query'"),
        ({"patch_embedding": "conv"}, "needs patch_embedding='linear', pooling='cls' and mask_diagonal=False, got 'conv', 'cls' and False"),
        ({"pooling": "hopfield"}, "got 'linear', 'hopfield' and False"),
        ({"mask_diagonal": True}, "got 'linear', 'cls' and True"),
        ({"value_source": "projected_memory", "use_feature_map": False}, "value_source='memory', got 'projected_memory'"),
    ],
)
def test_a_model_that_is_not_a_vit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UHopViTForImageClassification(UHopViTConfig(**{**SMALL, **fields})).to_vit()


def test_an_unsupported_vit_is_refused(tmp_path):
    beit = BeitForImageClassification(BeitConfig(**SMALL))
    with pytest.raises(ValueError, match=r"converts the architectures \('vit', 'deit', 'vit_msn'\), got 'beit'"):
        UHopViTForImageClassification.from_vit(beit)
    with pytest.raises(ValueError, match="averages two classifiers"):
        UHopViTForImageClassification.from_vit(DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL)))
    determined: list[dict] = [{"feature_dim": 30}, {"hidden_size": 30}, {"value_source": "projected_memory"}, {"feature_init": "normal"}]
    determined += [{"patch_embedding": "conv"}, {"pooling": "hopfield"}, {"attention_init": "mimetic"}]
    for fields in determined:
        with pytest.raises(ValueError, match=f"{next(iter(fields))} is determined by the weights"):
            UHopViTForImageClassification.from_vit(_classifier("vit"), **fields)
    with pytest.raises(ValueError, match="alpha must lie in"):
        UHopViTForImageClassification.from_vit(_classifier("vit"), alpha=3.0)
    with pytest.raises(OSError):
        UHopViTForImageClassification.from_vit(tmp_path / "nothing")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_a_converted_model_trains_with_the_separation_step(tmp_path):
    ours = UHopViTForImageClassification.from_vit(_classifier("deit"), alpha=1.5)
    before = ours.vit.layers[0].attention.feature_map.weight.detach().clone()
    examples = [{"pixel_values": torch.randn(3, 12, 12), "labels": index % 5} for index in range(8)]
    callback = SeparationCallback("train_begin", steps=5, parameters="feature_maps", lr=1.0, batch_size=8)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.0, report_to="none", save_strategy="no", disable_tqdm=True)
    Trainer(ours, arguments, train_dataset=examples, callbacks=[callback]).train()
    assert callback.history[-1]["separation_loss"] < callback.history[0]["separation_loss"]
    assert not torch.equal(ours.vit.layers[0].attention.feature_map.weight, before)


def test_a_distillation_token_is_a_memory_only_on_request():
    ours = UHopViTForImageClassification.from_vit(_classifier("deit")).eval()
    images = _images()
    patches, tokens = (next(iter(ours.memory_sets(images, include_class_token=asked))).memories for asked in (False, True))
    assert patches.shape[1] == 9
    assert_close(patches, tokens[:, 2:])
    with pytest.raises(ValueError, match="use_distillation_token=True needs encoder_type='transformer'"):
        UHopViTConfig(**SMALL, use_distillation_token=True, encoder_type="class_query")


def test_labels_keep_their_names_where_their_number_is_kept():
    theirs = _classifier("vit", id2label={0: "a", 1: "b", 2: "c", 3: "d", 4: "e"})
    assert UHopViTForImageClassification.from_vit(theirs, num_labels=5).config.id2label == theirs.config.id2label
    assert UHopViTForImageClassification.from_vit(theirs, num_labels=2).config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_a_configuration_alone_is_refused():
    with pytest.raises(TypeError, match="a model, a folder or a Hub id, got ViTConfig"):
        UHopViTForImageClassification.from_vit(ViTConfig(**SMALL))
