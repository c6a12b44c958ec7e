"""Tests of UHopMILConfig: saving and loading, errors, and that every field has an effect."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig, ResNetConfig

from modeling_uhop import UHopMILConfig, UHopMILModel


SMALL = {"instance_dim": 6, "hidden_size": 16, "num_attention_heads": 2, "alpha": 1.5, "initializer_range": 1.0}
BACKBONE = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", out_features=["stage2"])

CHANGES = {
    "instance_dim": 7,
    "instance_type": "image",
    "hidden_size": 20,
    "num_embedding_layers": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.6,
    "attention_probs_dropout_prob": 0.5,
    "bag_dropout_prob": 0.6,
    "pooling": "max",
    "num_queries": 3,
    "num_attention_heads": 4,
    "head_dim": 5,
    "qkv_bias": False,
    "layer_norm_eps": 1.0,
    "initializer_range": 0.1,
    "alpha": 1.2,
    "learnable_alpha": True,
    "learnable_beta": True,
    "beta": 4.0,
    "use_feature_map": False,
    "feature_dim": 11,
    "feature_init": "normal",
    "update_steps": 2,
    "value_source": "projected_memory",
}


def _observed(config: UHopMILConfig) -> tuple[int, torch.Tensor]:
    """Parameter count and pooled output of a seeded model in training mode, so that dropout has an
    effect too."""
    torch.manual_seed(0)
    model = UHopMILModel(config).train()
    shape = (config.instance_dim,) if config.instance_type == "vector" else (config.num_channels, 8, 8)
    instances = torch.randn(3, 5, *shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    return model.num_parameters(), model(instances).pooler_output


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_model(field):
    parameters, output = _observed(UHopMILConfig(**SMALL))
    changed_parameters, changed_output = _observed(UHopMILConfig(**{**SMALL, field: CHANGES[field]}))
    same_shape = output.shape == changed_output.shape
    assert parameters != changed_parameters or not same_shape or not torch.allclose(output, changed_output, atol=1e-6)


def test_every_field_is_in_the_table_above():
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    of_images = {"num_channels", "backbone_config"}
    assert {field.name for field in dataclasses.fields(UHopMILConfig)} - inherited == set(CHANGES) | of_images


def test_fields_of_images_change_the_model():
    parameters = {
        _observed(UHopMILConfig(**SMALL, instance_type="image"))[0],
        _observed(UHopMILConfig(**SMALL, instance_type="image", num_channels=1))[0],
        _observed(UHopMILConfig(**SMALL, instance_type="backbone", backbone_config=BACKBONE))[0],
    }
    assert len(parameters) == 3


def test_round_trip(tmp_path):
    images = {"instance_type": "backbone", "backbone_config": BACKBONE}
    for fields in ({**CHANGES, "use_feature_map": True, "feature_dim": 20}, {**SMALL, **images, "id2label": {0: "a", 1: "b", 2: "c"}}):
        config = UHopMILConfig(**fields)
        config.save_pretrained(tmp_path)
        for loaded in (UHopMILConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
            assert type(loaded) is UHopMILConfig
            assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert type(loaded.backbone_config) is ResNetConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 0.9}, r"alpha must lie in \[1, 2\], got 0.9"),
        ({"alpha": 1.0, "learnable_alpha": True}, "strictly between 1 and 2, got alpha=1.0"),
        ({"beta": 0.0}, "beta must be positive and finite, or None .* got 0.0"),
        ({"instance_dim": 0}, "instance_dim must be at least 1, got 0"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, .* got 0"),
        ({"hidden_act": "reluu"}, "hidden_act must be one of .*'relu'.* got 'reluu'"),
        ({"bag_dropout_prob": 1.0}, r"bag_dropout_prob must lie in \[0, 1\), got 1.0"),
        ({"hidden_dropout_prob": -0.1}, r"hidden_dropout_prob must lie in \[0, 1\), got -0.1"),
        ({"instance_type": "backbone"}, "must be given if, and only if, instance_type is 'backbone'"),
        ({"instance_type": "backbone", "backbone_config": {"depths": [1]}}, "must have a model_type that transformers knows, got None"),
        ({"backbone_config": BACKBONE}, "only if, instance_type is 'backbone'; got instance_type='vector'"),
        ({"value_source": "projected_memory", "feature_dim": 24}, "must equal hidden_size 16, got 24"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        UHopMILConfig(**{**SMALL, **fields})


@pytest.mark.parametrize(("field", "value"), [("pooling", "sum"), ("instance_type", "text"), ("feature_init", "zeros"), ("alpha", "1.5")])
def test_unknown_choices_and_types_are_refused(field, value):
    with pytest.raises(Exception, match=rf"(?s){field}.*{value}"):
        UHopMILConfig(**{**SMALL, field: value})


def test_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_attention_heads, got 16 and 3"):
        UHopMILModel(UHopMILConfig(**{**SMALL, "num_attention_heads": 3}))
    UHopMILModel(UHopMILConfig(**{**SMALL, "num_attention_heads": 3, "head_dim": 5}))
