"""Tests of UHopViTConfig: saving and loading, errors, and that every field has an effect."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from modeling_uhop import UHopViTConfig, UHopViTForImageClassification, UHopViTModel
from tests.support.models import IMAGES


SMALL = {**IMAGES, "alpha": 1.5}

CHANGES = {
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.5,
    "attention_probs_dropout_prob": 0.5,
    "initializer_range": 0.1,
    "layer_norm_eps": 1.0,
    "image_size": 12,
    "patch_size": 2,
    "num_channels": 1,
    "qkv_bias": False,
    "pooler_output_size": 5,
    "pooler_act": "relu",
    "alpha": 1.2,
    "learnable_alpha": True,
    "learnable_beta": True,
    "beta": 4.0,
    "use_feature_map": False,
    "feature_dim": 11,
    "feature_init": "normal",
    "update_steps": 2,
    "value_source": "projected_memory",
    "encoder_type": "class_query",
    "use_distillation_token": True,
    "patch_embedding": "conv",
    "pooling": "hopfield",
    "mask_diagonal": True,
    "attention_init": "mimetic",
}


def _observed(config: UHopViTConfig) -> tuple[int, torch.Tensor]:
    """Parameter count and pooled output of a seeded model in training mode, so that dropout has an
    effect too."""
    torch.manual_seed(0)
    model = UHopViTModel(config).train()
    size = config.image_size
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(2, config.num_channels, size, size, generator=generator)
    torch.manual_seed(2)
    return model.num_parameters(), model(pixel_values).pooler_output


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_model(field):
    parameters, output = _observed(UHopViTConfig(**SMALL))
    changed_parameters, changed_output = _observed(UHopViTConfig(**{**SMALL, field: CHANGES[field]}))
    same_shape = output.shape == changed_output.shape
    assert parameters != changed_parameters or not same_shape or not torch.allclose(output, changed_output, atol=1e-6)


def test_every_field_is_in_the_table_above():
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert {field.name for field in dataclasses.fields(UHopViTConfig)} - inherited == set(CHANGES)


def test_num_labels_sizes_the_classifier():
    model = UHopViTForImageClassification(UHopViTConfig(**SMALL, num_labels=7))
    assert model(torch.randn(2, 3, 8, 8)).logits.shape == (2, 7)
    bare = UHopViTForImageClassification(UHopViTConfig(**SMALL, num_labels=0))
    assert bare(torch.randn(2, 3, 8, 8)).logits.shape == (2, 16)


# Fields of which not all can be changed together, as they are changed together in two tests.
TRANSFORMER = {"encoder_type": "transformer", "use_distillation_token": False, "value_source": "memory"}
CLASS_QUERY = {"use_distillation_token": False, "pooling": "cls", "mask_diagonal": False, "attention_init": "normal"}


@pytest.mark.parametrize("together", [TRANSFORMER, CLASS_QUERY], ids=["transformer", "class query"])
def test_round_trip(tmp_path, together):
    changes = {**CHANGES, "use_feature_map": True, "feature_dim": 20, **together}
    config = UHopViTConfig(**{**SMALL, **changes, "id2label": {0: "cat", 1: "dog"}})
    config.save_pretrained(tmp_path)
    for loaded in (UHopViTConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is UHopViTConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert {field: getattr(loaded, field) for field in CHANGES} == changes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.9}, r"alpha must lie in \[1, 2\], got 0.9"),
        ({"alpha": 2.1}, r"alpha must lie in \[1, 2\], got 2.1"),
        ({"alpha": float("nan")}, r"alpha must lie in \[1, 2\], got nan"),
        ({"alpha": 1.0, "learnable_alpha": True}, "strictly between 1 and 2, got alpha=1.0"),
        ({"beta": 0.0}, "beta must be positive and finite, or None .* got 0.0"),
        ({"beta": -2}, "beta must be positive"),
        ({"feature_dim": 0}, "feature_dim must be at least 1, .* got 0"),
        ({"update_steps": 0}, "update_steps must be at least 1, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"hidden_dropout_prob": 1.0}, r"hidden_dropout_prob must lie in \[0, 1\), got 1.0"),
        ({"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob must lie in \[0, 1\), got -0.1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"beta": float("inf")}, "beta must be positive and finite"),
        ({"hidden_act": "reluu"}, "hidden_act must be one of .*'relu'.* got 'reluu'"),
        ({"patch_size": 0}, "1 <= patch_size <= image_size; got image_size=8 and patch_size=0"),
        ({"patch_size": 16}, "<= image_size; got image_size=8 and patch_size=16"),
        ({"image_size": [8, 8, 8]}, r"a pair \(height, width\).* got image_size=\[8, 8, 8\] and patch_size=4"),
        ({"value_source": "projected_memory", "feature_dim": 24}, "must equal hidden_size 16, got 24"),
        ({"patch_embedding": "conv", "patch_size": 1}, "patch_size must be a power of two, such as 2, 4 or 8, got 1"),
        ({"patch_embedding": "conv", "patch_size": 6}, "must be a power of two, .* got 6"),
        ({"patch_embedding": "conv", "patch_size": [4, 2]}, r"must be a power of two, .* got \[4, 2\]"),
        ({"encoder_type": "class_query", "pooling": "hopfield"}, "pooling='hopfield' needs encoder_type='transformer', got 'class_query'"),
        ({"encoder_type": "class_query", "mask_diagonal": True}, "mask_diagonal=True needs encoder_type='transformer', got 'class_query'"),
        ({"use_distillation_token": True, "pooling": "hopfield"}, "use_distillation_token=True needs pooling='cls', got 'hopfield'"),
        ({"attention_init": "mimetic", "feature_dim": 7}, "a feature_dim of at least the head width 8, got .* feature_dim=7"),
        ({"attention_init": "mimetic", "value_source": "projected_memory"}, "needs value_source='memory' .* got .*'projected_memory'"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        UHopViTConfig(**{**SMALL, **fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("feature_init", "zeros"),
        ("encoder_type", "cnn"),
        ("value_source", "keys"),
        ("alpha", "1.5"),
        ("update_steps", 1.5),
        ("patch_embedding", "patches"),
        ("pooling", "mean"),
        ("attention_init", "xavier"),
        ("mask_diagonal", "yes"),
    ],
)
def test_unknown_choices_and_types_are_refused(field, value):
    with pytest.raises(Exception, match=rf"(?s){field}.*{value}"):
        UHopViTConfig(**{**SMALL, field: value})
