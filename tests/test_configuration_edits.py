"""Tests of configuration fields that are edited after the model was built: they take effect and are
saved, or are refused."""

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, ViTConfig

from modeling_uhop import (
    STanHopForPrediction,
    UHopMemoryModel,
    UHopMILForBagClassification,
    UHopViTForImageClassification,
)
from tests.conftest import assert_close


SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2}
FAMILIES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "memory": (UHopMemoryModel, {"pattern_dim": 6, "similarity": "polynomial", "beta": 2.0}, {"queries": (3, 6)}),
    "kernel": (UHopMemoryModel, {"pattern_dim": 6, "beta": 2.0}, {"queries": (3, 6)}),
    "vit": (
        UHopViTForImageClassification,
        {**SIZES, "num_hidden_layers": 2, "intermediate_size": 8, "image_size": 8, "patch_size": 4, "initializer_range": 0.3},
        {"pixel_values": (2, 3, 8, 8)},
    ),
    "mil": (UHopMILForBagClassification, {**SIZES, "instance_dim": 5}, {"instances": (2, 4, 5)}),
    "stanhop": (
        STanHopForPrediction,
        {"num_input_channels": 2, "context_length": 12, "prediction_length": 6, "patch_length": 3, "d_model": 16, "num_attention_heads": 2}
        | {"ffn_dim": 8, "learnable_alpha": False, "memory_type": "plug", "num_hidden_layers": 2},
        {"past_values": (2, 12, 2)},
    ),
}
# Another value for each field that has no general rule for one.
OTHERS: dict[str, Any] = {
    "alpha": 1.4,
    "memory_alpha": 1.5,
    "beta": 3.5,
    "learnable_alpha": True,
    "feature_init": "identity",
    "similarity": "dot",
    "value_source": {"memory": "projected_memory", "projected_memory": "memory"},
    "encoder_type": "class_query",
    "patch_embedding": "conv",
    "attention_init": "mimetic",
    "hidden_act": "tanh",
    "pooler_act": "relu",
    "activation_function": "relu",
    "pooling": {"hopfield": "mean", "cls": "hopfield"},
    "instance_type": "image",
    "backbone_config": ViTConfig(),
    "scaling": "mean",
    "memory_type": None,
    "loss": "mae",
    "feature_dim": 9,
    "head_dim": 4,
    "num_memories": 2,
    "channel_names": ["a", "b"],
    "mean": [1.0, 2.0],
    "std": [0.5, 2.0],
    "frequency": "h",
    "cycle_length": 6,
}


def _fields(kind: Any) -> list[str]:
    inherited = set(PreTrainedConfig.__dataclass_fields__)
    return [name for name in kind.config_class.__dataclass_fields__ if name not in inherited]


def _other(name: str, value: Any) -> Any:
    if name in OTHERS:
        other = OTHERS[name]
        return other[value] if isinstance(other, dict) else other
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.5 * value + 0.07


def _built(family: str, **fields) -> Any:
    kind, given, _ = FAMILIES[family]
    return kind(kind.config_class(**{**given, **fields})).eval()


def _filled(model: Any) -> Any:
    if isinstance(model, UHopMemoryModel):
        model.store(torch.rand(5, 6))
    elif isinstance(model, STanHopForPrediction):
        model.store(torch.randn(3, 12, 2), torch.randn(3, 6, 2))
    return model


def _answer(model: Any, family: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


CASES = [(family, name) for family, (kind, _, _) in FAMILIES.items() for name in _fields(kind)]


@pytest.mark.parametrize(("family", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_an_edited_field_takes_effect_everywhere_or_is_refused(family, name, tmp_path):
    model = _filled(_built(family))
    inputs = {key: torch.rand(shape) for key, shape in FAMILIES[family][2].items()}
    before = _answer(model, family, inputs)
    original = getattr(model.config, name)
    setattr(model.config, name, _other(name, original))
    if name in model.read_at_each_call or name in ("initializer_range", "init_std", "position_init_std", "feature_init", "attention_init"):
        answer = _answer(model, family, inputs)
        if name in ("alpha", "beta", "update_steps", "degree", "memory_alpha", "memory_beta") and not (
            family == "kernel" and name == "degree"
        ):
            assert not torch.equal(answer, before)
        stored = {} if original is None or "num_memories" not in _fields(type(model)) else {"num_memories": model.config.num_memories}
        wanted = _built(family, **{name: getattr(model.config, name)}, **stored)
        wanted.load_state_dict(model.state_dict())
        assert_close(answer, _answer(wanted, family, inputs))
        model.save_pretrained(tmp_path)
        assert torch.equal(_answer(type(model).from_pretrained(tmp_path).eval(), family, inputs), answer)
        return
    with pytest.raises(ValueError, match=rf"{name} was .* when this .* was built"):
        _answer(model, family, inputs)
    with pytest.raises(ValueError, match=rf"{name} was .* when this .* was built"):
        model.save_pretrained(tmp_path)
    setattr(model.config, name, original)
    assert torch.equal(_answer(model, family, inputs), before)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    ("name", "value", "message"), [("alpha", 3.0, r"alpha must lie in \[1, 2\], got 3.0"), ("beta", -1.0, "beta must be positive")]
)
def test_an_edit_out_of_range_is_refused_at_the_next_call(family, name, value, message, tmp_path):
    model = _filled(_built(family))
    inputs = {key: torch.rand(shape) for key, shape in FAMILIES[family][2].items()}
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        _answer(model, family, inputs)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["vit", "mil"])
def test_another_number_of_labels_than_that_of_the_classifier_is_refused(family, tmp_path):
    model = _built(family)
    inputs = {key: torch.rand(shape) for key, shape in FAMILIES[family][2].items()}
    model.config.id2label = {0: "cat", 1: "dog"}
    _answer(model, family, inputs)
    model.config.num_labels = 3
    for work in (lambda: _answer(model, family, inputs), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"num_labels was 2 when this .* was built"):
            work()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_replaced_configuration_is_refused(family, tmp_path):
    model = _filled(_built(family))
    inputs = {key: torch.rand(shape) for key, shape in FAMILIES[family][2].items()}
    twin = copy.deepcopy(model)
    model.config = copy.deepcopy(model.config)
    for work in (lambda: _answer(model, family, inputs), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="cannot be replaced once it is built"):
            work()
    assert _answer(twin, family, inputs).isfinite().all()


def test_a_layer_with_a_configuration_of_its_own_is_refused_when_it_would_be_saved(tmp_path):
    model = _built("vit")
    model.vit.layers[1].attention.config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=r"vit\.layers\.1\.attention has a configuration of its own"):
        model.save_pretrained(tmp_path)


def test_an_edit_that_the_attention_kernel_cannot_compute_is_refused():
    model = _built("vit", attn_implementation="sdpa")
    model.config.alpha = 1.5
    with pytest.raises(ValueError, match="'sdpa' does not compute alpha-entmax"):
        model(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize("family", ["vit", "mil", "stanhop"])
def test_edits_of_a_folded_model_and_of_a_copy(family, tmp_path):
    model = _filled(_built(family))
    inputs = {key: torch.rand(shape) for key, shape in FAMILIES[family][2].items()}
    model.config.alpha = 1.7
    answer = _answer(model, family, inputs)
    for other in (model.fold_feature_maps(), copy.deepcopy(model)):
        assert_close(_answer(other, family, inputs), answer, scale=10)
        other.save_pretrained(tmp_path / type(other).__name__)
        loaded = type(model).from_pretrained(tmp_path / type(other).__name__).eval()
        assert_close(_answer(loaded, family, inputs), answer, scale=10)


def test_edited_dropout_takes_effect():
    model = _built("vit").train()
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(model(images).logits, model(images).logits)
    model.config.attention_probs_dropout_prob = 0.5
    assert not torch.equal(model(images).logits, model(images).logits)
