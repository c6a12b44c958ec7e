"""Convert vision transformers of transformers to U-Hop models, and back."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Architectures whose blocks compute the same function with the same parameter names. Not supported:
# BEiT (score biases), DINOv2 (layer scaling), Swin (shifted windows).
ARCHITECTURES = ("vit", "deit", "vit_msn")
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "pooler_output_size",
)
SETTINGS = (
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "pooler_act",
    "id2label",
    "label2id",
    "problem_type",
)


def from_vit(cls, source, *, alpha: float = 1.0, **fields):
    """Convert a ViT into a Hopfield model; see `UHopViTPreTrainedModel.from_vit`."""
    is_path = isinstance(source, (str, os.PathLike))
    if not is_path and not isinstance(source, PreTrainedModel):
        raise TypeError(f"source must be a model, a folder or a Hub id, got {type(source).__name__}")
    source_config = AutoConfig.from_pretrained(source) if is_path else source.config
    if source_config.model_type not in ARCHITECTURES:
        raise ValueError(f"from_vit converts the architectures {ARCHITECTURES}, got {source_config.model_type!r}")
    determined = {
        **_shared(source_config, SIZES),
        "feature_dim": None,
        "feature_init": "identity",
        "value_source": "memory",
        "encoder_type": "transformer",
        "patch_embedding": "linear",
        "pooling": "cls",
        "attention_init": "normal",
        "use_distillation_token": source_config.model_type == "deit",
    }
    for name in fields:
        if name in determined:
            raise ValueError(f"{name} is determined by the weights of the source and must not be given, got {fields[name]!r}")
    labels = {"id2label", "label2id"}
    relabelled = bool(labels & fields.keys()) or fields.get("num_labels", source_config.num_labels) != source_config.num_labels
    settings = [name for name in SETTINGS if not (relabelled and name in labels)]
    converted = cls(cls.config_class(**{**_shared(source_config, settings), **determined, "alpha": alpha, **fields}))
    if is_path:
        auto_class = AutoModelForImageClassification if hasattr(converted, "classifier") else AutoModel
        source = auto_class.from_pretrained(source, use_safetensors=True)
    _copy_weights(source, converted.to(source.device, source.dtype))
    return converted.train(source.training)


@torch.no_grad()
def _copy_weights(source: PreTrainedModel, converted: PreTrainedModel) -> None:
    """Copy the weights of a ViT into a converted model; raise a `ValueError` if they do not fit."""
    name = type(source).__name__
    if hasattr(source, "distillation_classifier"):
        raise ValueError(
            f"{name} averages two classifiers, which no model of this package supports; "
            "convert its `deit` part with UHopViTModel.from_vit, or copy its cls_classifier into a DeiTForImageClassification "
            "and convert that"
        )
    missing, unexpected = converted.base_model.load_state_dict(source.base_model.state_dict(), strict=False)
    unexpected_keys = [key for key in unexpected if not key.startswith("pooler.") and key != "embeddings.mask_token"]
    new_keys = [key for key in missing if not key.endswith(("feature_map.weight", "alpha_logit", "log_beta"))]
    if unexpected_keys or any(not key.startswith("pooler.") for key in new_keys):
        raise ValueError(f"the weights of {name} do not fit: unexpected {unexpected_keys}, missing {new_keys}")
    old, new = getattr(source, "classifier", None), getattr(converted, "classifier", None)
    if isinstance(new, torch.nn.Linear):
        if isinstance(old, torch.nn.Linear) and old.weight.shape == new.weight.shape:
            new.load_state_dict(old.state_dict())
        else:
            new_keys.append("classifier")
    if new_keys:
        logger.warning(f"{new_keys} of {type(converted).__name__} are newly initialized, not taken from {name}; train them before use")


@torch.no_grad()
def to_vit(model: Any) -> PreTrainedModel:
    """Convert a Hopfield model into a ViT; see `UHopViTPreTrainedModel.to_vit`."""
    config = model.config
    if config.alpha != 1.0 or config.learnable_alpha:
        raise ValueError(f"to_vit needs a fixed alpha=1, got alpha={config.alpha} and learnable_alpha={config.learnable_alpha}")
    if config.update_steps != 1 or config.encoder_type != "transformer":
        raise ValueError(
            f"to_vit needs encoder_type='transformer' and update_steps=1, "
            f"got {config.encoder_type!r} and update_steps={config.update_steps}"
        )
    if config.patch_embedding != "linear" or config.pooling != "cls" or config.mask_diagonal:
        raise ValueError(
            "to_vit needs patch_embedding='linear', pooling='cls' and mask_diagonal=False, "
            f"got {config.patch_embedding!r}, {config.pooling!r} and {config.mask_diagonal}"
        )
    if config.value_source != "memory" and not config.use_feature_map:
        raise ValueError(f"to_vit without a feature map needs value_source='memory', got {config.value_source!r}")
    folded = model.fold_feature_maps()
    for layer in folded.base_model.layers:
        attention = layer.attention
        relative = attention.beta * attention.head_dim**0.5
        attention.log_beta = None
        for parameter in attention.q_proj.parameters():
            parameter.view(attention.num_attention_heads, attention.head_dim, -1).mul_(relative)
    # Because transformers reads `architectures` where a type has several classes, it must be a list.
    fields = {**_shared(config, (*SIZES, *SETTINGS)), "architectures": []}
    vit_config = AutoConfig.for_model("deit" if config.use_distillation_token else "vit", **fields)
    if hasattr(folded, "classifier"):
        vit = AutoModelForImageClassification.from_config(vit_config)
        vit.classifier.load_state_dict(folded.classifier.state_dict())
    else:
        parts = {"add_pooling_layer": folded.pooler is not None, "use_mask_token": folded.embeddings.mask_token is not None}
        vit = AutoModel.from_config(vit_config, **parts)
    vit.base_model.load_state_dict(folded.base_model.state_dict())
    return vit.to(model.device, model.dtype).train(model.training)


def _shared(config: PreTrainedConfig, names) -> dict:
    """The fields of a configuration with these names that are not `None`."""
    return {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
