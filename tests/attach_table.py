"""The table of models in docs/guides/attach.md: `python -m tests.attach_table` writes it.

tests/test_attach_models.py makes each row again and compares it.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from modeling_uhop import UHopAdapterConfig
from modeling_uhop.attach.projections import find_projections
from tests.test_attention_models import ALL, BOTH_SIDES, IMAGE, TEXT, Case, _images, _model, _tokens, _translation


PAGE = Path(__file__).parent.parent / "docs" / "guides" / "attach.md"
MARKS = ("<!-- models -->\n", "<!-- end -->")
HEAD = "| model class | query and key projections | maps Φ | alpha = 1.5 |\n| --- | --- | --- | --- |\n"
MORE: list[Case] = [
    ("MPNetModel", TEXT, _tokens),
    ("PersimmonForCausalLM", TEXT, _tokens),
    ("Phi3ForCausalLM", {**TEXT, "num_key_value_heads": 2}, _tokens),
    ("BloomForCausalLM", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _tokens),
    ("MarianMTModel", {"vocab_size": 60, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 0, **BOTH_SIDES}, _translation),
    ("BlipVisionModel", IMAGE, _images),
    ("ConvNextModel", {"hidden_sizes": [4, 4], "depths": [1, 1], "num_stages": 2}, _images),
    (
        "DeepseekV3Model",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        }
        | {"first_k_dense_replace": 2},
        _tokens,
    ),
    (
        "TimesFmModelForPrediction",
        {"patch_length": 8, "context_length": 32, "horizon_length": 8, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40}
        | {"head_dim": 8, "num_attention_heads": 4},
        lambda: {"past_values": torch.randn(2, 32)},
    ),
    (
        "PatchTSMixerForPrediction",
        {"context_length": 32, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2, "d_model": 8, "prediction_length": 8},
        lambda: {"past_values": torch.randn(2, 32, 2)},
    ),
]
CASES = ALL + MORE


def model_of(case: Case) -> Any:
    """The tiny model of a case, with all weights frozen, because PyTorch computes with other kernels then."""
    torch.manual_seed(0)
    return _model(*case[:2]).requires_grad_(False)


def attached(case: Case, **fields: Any) -> Any:
    """The model of a case with an adapter, in evaluation mode."""
    return get_peft_model(model_of(case), UHopAdapterConfig(**fields)).eval()


def row(case: Case) -> str:
    """The row of the table for a case: what is adapted, or why it is refused."""
    try:
        model = model_of(case)
        found = find_projections(model, UHopAdapterConfig())
        names = list(dict.fromkeys(f"`{each.query}`, `{each.key}`" if each.query != each.key else f"`{each.query}`" for each in found))
        maps = sum("FeatureMap" in type(module).__name__ for module in attached(case).modules())
    except ValueError as error:
        return f"| `{case[0]}` | refused: {_reason(error)} | | |"
    try:
        attached(case, alpha=1.5)
        alpha = "yes"
    except ValueError as error:
        alpha = f"refused: {_reason(error)}"
    return f"| `{case[0]}` | {'; '.join(names)} | {maps} | {alpha} |"


def _reason(error: ValueError) -> str:
    """The reason in an error, with the first layer that it names."""
    text = str(error).partition(" has ")[2]
    return re.sub(r"(\(\w+\)).*", r"\1", text)


def table() -> str:
    """The table."""
    return HEAD + "".join(f"{row(case)}\n" for case in CASES)


if __name__ == "__main__":
    page = PAGE.read_text()
    before, _, rest = page.partition(MARKS[0])
    after = rest[rest.index(MARKS[1]) :]
    PAGE.write_text(before + MARKS[0] + table() + after)
    sys.stdout.write(f"{PAGE} has {len(CASES)} models\n")
