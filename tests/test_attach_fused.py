"""The listed order of the outputs of projections that compute queries, keys and values at once."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from modeling_uhop import UHopAdapterConfig
from modeling_uhop.attach.projections import FUSED, find_projections


WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**WIDTHS, "intermediate_size": 40, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE: dict[str, Any] = {**WIDTHS, "intermediate_size": 40, "image_size": 16, "patch_size": 4}
SAM: dict[str, Any] = {**WIDTHS, "image_size": 32, "patch_size": 4}
GPT: dict[str, Any] = {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
PATCHES: dict[str, Any] = {
    **{"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2},
    **{"temporal_patch_size": 2, "in_channels": 3, "intermediate_size": 40, "out_hidden_size": 32, "mlp_ratio": 1},
}
HIERA: dict[str, Any] = {
    **{"embed_dim": 16, "image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [4, 4], "patch_padding": [1, 1]},
    **{"depths": [1, 1], "num_heads": [2, 4], "query_stride": [2, 2], "masked_unit_size": [2, 2], "masked_unit_attention": [True, False]},
    **{"num_query_pool": 1, "embed_dim_multiplier": 2.0},
}
SEGGPT: dict[str, Any] = {**WIDTHS, "image_size": [16, 8], "patch_size": 4, "merge_index": 0, "intermediate_hidden_state_indices": [1]}


def _ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 60, (1, 9))}


def _image(size: int = 16) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, size, size)}


def _large() -> dict[str, torch.Tensor]:
    return _image(32)


def _patches() -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.randn(16, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4]])}


def _pairs() -> dict[str, torch.Tensor]:
    return {name: torch.randn(1, 3, 8, 8) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _decisions() -> dict[str, torch.Tensor]:
    names = {"states": 3, "actions": 2, "rewards": 1, "returns_to_go": 1}
    return {name: torch.randn(1, 5, size) for name, size in names.items()} | {"timesteps": torch.arange(5).unsqueeze(0)}


# Folder of transformers, model class, fields of its configuration, inputs.
CASES: list[tuple[str, str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]]] = [
    ("blip", "BlipVisionModel", IMAGE, _image),
    ("blip_2", "Blip2VisionModel", IMAGE, _image),
    ("instructblip", "InstructBlipVisionModel", IMAGE, _image),
    ("instructblipvideo", "InstructBlipVideoVisionModel", IMAGE, _image),
    ("mgp_str", "MgpstrModel", {**WIDTHS, "image_size": [16, 16], "patch_size": 4}, _image),
    ("timesformer", "TimesformerModel", {**IMAGE, "num_frames": 2}, lambda: {"pixel_values": torch.randn(1, 2, 3, 16, 16)}),
    ("hiera", "HieraModel", HIERA, _large),
    ("sam", "SamVisionModel", {**SAM, "output_channels": 8, "global_attn_indexes": [1], "window_size": 2}, _large),
    ("sam_hq", "SamHQVisionModel", {**SAM, "output_channels": 8, "global_attn_indexes": [1], "window_size": 2}, _large),
    ("vitdet", "VitDetModel", {**SAM, "pretrain_image_size": 32, "window_block_indices": [0], "window_size": 2}, _large),
    ("seggpt", "SegGptModel", {**SEGGPT, "pretrain_image_size": 16}, _pairs),
    ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", PATCHES, _patches),
    ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", PATCHES, _patches),
    ("qwen3_vl", "Qwen3VLVisionModel", PATCHES, _patches),
    ("qwen3_vl_moe", "Qwen3VLMoeVisionModel", PATCHES, _patches),
    ("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", PATCHES, _patches),
    ("qwen3_5", "Qwen3_5VisionModel", PATCHES, _patches),
    ("glm4v", "Glm4vVisionModel", PATCHES, _patches),
    ("glm_ocr", "GlmOcrVisionModel", PATCHES, _patches),
    ("gpt2", "GPT2Model", GPT, _ids),
    ("imagegpt", "ImageGPTModel", {**GPT, "n_positions": 20}, _ids),
    ("decision_transformer", "DecisionTransformerModel", {**GPT, "hidden_size": 32, "state_dim": 3, "act_dim": 2}, _decisions),
    ("modernbert", "ModernBertModel", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, _ids),
    ("mpt", "MptModel", {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 60}, _ids),
    ("phi3", "Phi3Model", {**TEXT, "num_key_value_heads": 2}, _ids),
    ("gpt_neox", "GPTNeoXModel", TEXT, _ids),
    ("gpt_neox_japanese", "GPTNeoXJapaneseModel", TEXT, _ids),
    ("persimmon", "PersimmonModel", TEXT, _ids),
]


@torch.no_grad()
@pytest.mark.parametrize(("folder", "name", "fields", "make"), CASES, ids=[case[1] for case in CASES])
def test_an_attention_layer_without_values_answers_the_same_to_every_token(folder, name, fields, make):
    """If all values are 0, the output is the bias of the last projection, whatever queries and keys are."""
    kind = getattr(importlib.import_module(f"transformers.models.{folder}.modeling_{folder}"), name)
    model = kind(kind.config_class(**fields)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    found = [each for each in find_projections(model, UHopAdapterConfig(target_modules=list(FUSED))) if each.layout]
    assert found != []
    spread: dict[str, float] = {}
    for each in found:

        def record(module: Any, args: Any, output: Any, name: str = each.name) -> None:
            states = output[0] if isinstance(output, tuple) else output
            spread[name] = states.flatten(0, -2).std(0).max().item()

        each.attention.register_forward_hook(record)
    model(**make())
    assert min(spread.values()) > 1e-2
    for each in found:
        projection, rows = getattr(each.attention, each.key), each.value_rows()
        weight = projection.weight.T if isinstance(projection, Conv1D) else projection.weight
        weight[rows] = 0.0
        if projection.bias is not None:
            projection.bias[rows] = 0.0
    model(**make())
    assert max(spread.values()) < 1e-5
