"""Tests of folding feature maps into projections: equal outputs with fewer parameters."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from transformers import ResNetConfig

from modeling_uhop import (
    FeatureMap,
    STanHopConfig,
    STanHopForPrediction,
    UHopMemoryConfig,
    UHopMemoryModel,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTConfig,
    UHopViTForImageClassification,
)
from tests.conftest import assert_close
from tests.support.models import COMPACT, IMAGES, SERIES


LAYER = {"feature_init": "normal", "num_attention_heads": 2}
VIT = {**IMAGES, "patch_size": 2, "initializer_range": 0.3, **LAYER}
STANHOP = {**SERIES, **LAYER}


def _vit(**fields):
    return UHopViTForImageClassification(UHopViTConfig(**VIT, **fields)), {"pixel_values": torch.randn(3, 3, 8, 8)}


def _mil(**fields):
    model = UHopMILForBagClassification(UHopMILConfig(instance_dim=5, hidden_size=16, num_queries=2, **LAYER, **fields))
    return model, {"instances": torch.randn(3, 4, 5), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])}


def _stanhop(**fields):
    return STanHopForPrediction(STanHopConfig(**STANHOP, **fields)), {"past_values": torch.randn(2, 24, 3)}


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (_vit, {}),
        (_vit, {"alpha": 1.5, "feature_dim": 24}),
        (_vit, {"value_source": "projected_memory", "qkv_bias": False, "update_steps": 2}),
        (_vit, {"encoder_type": "class_query"}),
        (_vit, COMPACT),
        (_vit, {**COMPACT, "alpha": 1.5, "value_source": "projected_memory", "attention_init": "normal"}),
        (_mil, {"alpha": 1.5}),
        (_mil, {"value_source": "projected_memory"}),
        (_stanhop, {}),
        (_stanhop, {"value_source": "memory", "qkv_bias": False}),
    ],
)
def test_a_folded_model_has_the_same_outputs_and_is_saved_as_a_model_without_phi(build, fields, tmp_path):
    model, inputs = build(**fields)
    model.eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter)
    expected = model(**inputs)[0]
    folded = model.fold_feature_maps()
    assert (folded(**inputs)[0] - expected).abs().max() < 5e-6
    assert torch.equal(model(**inputs)[0], expected)
    assert not any(isinstance(module, FeatureMap) for module in folded.modules())
    assert folded.num_parameters() < model.num_parameters()
    assert model.config.use_feature_map
    folded.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert torch.equal(again(**inputs)[0], folded(**inputs)[0])
    assert not again.config.use_feature_map


def test_a_model_without_phi_folds_to_a_copy():
    model, inputs = _vit(use_feature_map=False, value_source="projected_memory")
    model.eval()
    folded = model.fold_feature_maps()
    assert folded is not model
    assert folded.config.value_source == "projected_memory"
    assert torch.equal(folded(**inputs).logits, model(**inputs).logits)


def test_models_of_image_bags_can_be_folded_with_any_backbone():
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"])
    config = UHopMILConfig(instance_type="backbone", backbone_config=backbone, hidden_size=16, **LAYER)
    model = UHopMILForBagClassification(config).eval()
    folded = model.fold_feature_maps()
    images = torch.randn(2, 3, 3, 32, 32)
    assert not folded.config.use_feature_map
    assert_close(folded(images).logits, model(images).logits, scale=10)


@pytest.mark.parametrize("module", ["q_proj", "feature_map"])
@pytest.mark.parametrize("how", ["hooked", "hooked before", "patched", "offloaded"])
def test_a_hook_or_a_patched_method_is_not_dropped_silently(module, how):
    model, _ = _vit()
    changed = next(part for name, part in model.named_modules() if name.endswith(module))
    if how == "hooked":
        changed.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    elif how == "hooked before":
        changed.register_forward_pre_hook(lambda module, inputs: (2.0 * inputs[0],))
    elif how == "offloaded":
        changed.to("meta")
    else:
        changed.forward = lambda states: 2.0 * type(changed).forward(changed, states)
    with pytest.raises(ValueError, match=f"{module} must be a plain .*hooked, patched or offloaded"):
        model.fold_feature_maps()


def test_a_model_whose_hooks_were_removed_can_be_folded():
    model, inputs = _vit()
    model.eval()
    expected = model(**inputs).logits
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    remove_hook_from_submodules(model)
    assert_close(model.fold_feature_maps()(**inputs).logits, expected, scale=10)


def test_folding_keeps_the_dtype():
    model, inputs = _vit()
    folded = model.eval().to(torch.bfloat16).fold_feature_maps()
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    inputs = {name: value.to(torch.bfloat16) for name, value in inputs.items()}
    assert_close(folded(**inputs).logits, model(**inputs).logits, scale=10)


def test_folding_uses_no_random_numbers_and_keeps_parameters_frozen():
    model, _ = _vit()
    model.eval().requires_grad_(False)
    state = torch.get_rng_state()
    folded = model.fold_feature_maps()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not any(module.training for module in folded.modules())


class Quantized(torch.Tensor):
    """A weight with its own tensor class in an unchanged layer, as torchao makes them."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("module", ["q_proj", "feature_map"])
def test_quantized_weights_are_refused(module):
    model, _ = _vit()
    changed = next(part for name, part in model.named_modules() if name.endswith(module))
    changed.weight = torch.nn.Parameter(changed.weight.detach().as_subclass(Quantized), requires_grad=False)
    assert type(changed.weight) is Quantized
    with pytest.raises(ValueError, match=f"{module} must be a plain .* or has quantized weights"):
        model.fold_feature_maps()


def test_a_memory_has_nothing_to_fold_into():
    with pytest.raises(ValueError, match="a UHopMemoryModel has no projections"):
        UHopMemoryModel(UHopMemoryConfig(pattern_dim=4)).fold_feature_maps()
