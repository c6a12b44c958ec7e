"""Checkpoints of transformers' vision transformers as U-Hop models, and back."""

import os
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Blocks of the same arithmetic under the same names. Others bias their scores (BEiT), scale their layers (DINOv2), shift windows (Swin).
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
    """See `UHopViTPreTrainedModel.from_vit`."""
    is_path = isinstance(source, (str, os.PathLike))
    if not is_path and not isinstance(source, PreTrainedModel):
        raise TypeError(f"a vision transformer must be given as a model, a folder or a Hub id, got {type(source).__name__}")
    given = AutoConfig.from_pretrained(source) if is_path else source.config
    if given.model_type not in ARCHITECTURES:
        raise ValueError(f"a vision transformer must be one of {ARCHITECTURES} to be converted, got {given.model_type!r}")
    decided = {
        **_shared(given, SIZES),
        "feature_dim": None,
        "feature_init": "identity",
        "value_source": "memory",
        "encoder_type": "transformer",
        "use_distillation_token": given.model_type == "deit",
    }
    for name in fields:
        if name in decided:
            raise ValueError(f"{name} is decided by the weights, and cannot be chosen, got {fields[name]!r}")
    relabelled = not fields.keys().isdisjoint(("id2label", "label2id")) or fields.get("num_labels", given.num_labels) != given.num_labels
    settings = [name for name in SETTINGS if not (relabelled and name in ("id2label", "label2id"))]
    converted = cls(cls.config_class(**{**_shared(given, settings), **decided, "alpha": alpha, **fields}))
    if is_path:
        auto_class = AutoModelForImageClassification if hasattr(converted, "classifier") else AutoModel
        source = auto_class.from_pretrained(source, use_safetensors=True)
    _copy_weights(source, converted.to(source.device, source.dtype))
    return converted.train(source.training)


@torch.no_grad()
def _copy_weights(source: PreTrainedModel, converted: PreTrainedModel) -> None:
    name = type(source).__name__
    if hasattr(source, "distillation_classifier"):
        raise ValueError(
            f"the logits of {name} are the mean of two classifiers, which no model here has; "
            "convert its `deit` part with UHopViTModel.from_vit, or give a DeiTForImageClassification its cls_classifier and convert that"
        )
    missing, unexpected = converted.base_model.load_state_dict(source.base_model.state_dict(), strict=False)
    lost = [key for key in unexpected if not key.startswith("pooler.") and key != "embeddings.mask_token"]
    fresh = [key for key in missing if not key.endswith(("feature_map.weight", "alpha_logit"))]
    if lost or any(not key.startswith("pooler.") for key in fresh):
        raise ValueError(f"{name} does not fit: {lost} have no place here, and it has no {fresh}")
    old, new = getattr(source, "classifier", None), getattr(converted, "classifier", None)
    if isinstance(new, torch.nn.Linear):
        if isinstance(old, torch.nn.Linear) and old.weight.shape == new.weight.shape:
            new.load_state_dict(old.state_dict())
        else:
            fresh.append("classifier")
    if fresh:
        logger.warning(f"{fresh} of {type(converted).__name__} are not taken from {name} but new; train them before use")


@torch.no_grad()
def to_vit(model: Any) -> PreTrainedModel:
    """See `UHopViTPreTrainedModel.to_vit`."""
    config = model.config
    if config.alpha != 1.0 or config.learnable_alpha:
        raise ValueError(f"a ViT has alpha = 1, this model alpha={config.alpha}, learnable_alpha={config.learnable_alpha}")
    if config.update_steps != 1 or config.encoder_type != "transformer":
        raise ValueError(f"a ViT has blocks of one step, this model {config.encoder_type!r} layers of update_steps={config.update_steps}")
    if config.value_source != "memory" and not config.use_feature_map:
        raise ValueError(f"a ViT has values W_V Xi, this model value_source={config.value_source!r}")
    folded = model.fold_feature_maps()
    for layer in folded.base_model.layers:
        attention = layer.attention
        relative = attention.scaling * attention.head_dim**0.5
        for parameter in attention.q_proj.parameters():
            parameter.mul_(relative)
    classes: Any = (ViTConfig, ViTModel, ViTForImageClassification)
    if config.use_distillation_token:
        classes = (DeiTConfig, DeiTModel, DeiTForImageClassification)
    config_class, base_class, head_class = classes
    theirs = config_class(**_shared(config, (*SIZES, *SETTINGS)))
    if hasattr(folded, "classifier"):
        vit = head_class(theirs)
        vit.classifier.load_state_dict(folded.classifier.state_dict())
    else:
        masks = folded.embeddings.mask_token is not None
        vit = base_class(theirs, add_pooling_layer=folded.pooler is not None, use_mask_token=masks)
    vit.base_model.load_state_dict(folded.base_model.state_dict())
    return vit.to(model.device, model.dtype).train(model.training)


def _shared(config: PreTrainedConfig, names) -> dict:
    return {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
