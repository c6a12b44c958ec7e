"""Where the attention layers of a model compute their queries and keys."""

import inspect
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..attention_models import attention_source


logger = logging.get_logger(__name__)

# Names of the query and the key projection in an attention module of transformers.
SEPARATE = (
    ("query", "key"),
    ("q_proj", "k_proj"),
    ("q_lin", "k_lin"),
    ("q", "k"),
    ("query_proj", "key_proj"),
    ("linear_q", "linear_k"),
)
# One projection for queries, keys and values. Because its name does not tell how its outputs are
# ordered, the classes of transformers are listed: "blocks" has all queries, all keys and all values,
# of one width each; "grouped" the same, with fewer keys and values; "heads" has the query, the key
# and the value of each head after one another.
FUSED = ("qkv", "qkv_proj", "Wqkv", "c_attn", "query_key_value")
# fmt: off
LAYOUTS = {
    "blocks": [
        "BlipAttention", "Blip2Attention", "CohereCompassVisionAttention", "DecisionTransformerGPT2Attention",
        "DeepseekOcr2SamVisionAttention", "Dots3NoteVisionAttention", "Ernie4_5_VLMoeVisionAttention",
        "Florence2VisionWindowAttention", "Glm4vVisionAttention", "Glm4vMoeVisionAttention", "Glm5NextVisionAttention",
        "GlmImageVisionAttention", "GlmOcrVisionAttention", "GotOcr2VisionAttention", "GPT2Attention", "HieraMaskUnitAttention",
        "ImageGPTAttention", "InstructBlipAttention", "InstructBlipVideoAttention", "MgpstrAttention", "ModernBertAttention",
        "MptAttention", "PPFormulaNetVisionAttention", "PPOCRV5MobileRecAttention", "PPOCRV5ServerRecAttention",
        "PPOCRV6SmallRecAttention", "Qwen2_5_VLVisionAttention", "Qwen3_5VisionAttention", "Qwen3_5MoeVisionAttention",
        "Qwen3OmniMoeVisionAttention", "Qwen3VLVisionAttention", "Qwen3VLMoeVisionAttention", "Qwen4ExpVisionAttention",
        "Sam2MultiScaleAttention", "SamHQVisionAttention", "SamVisionAttention", "SegGptAttention", "SLANeXtVisionAttention",
        "TimesformerSelfAttention", "UnlimitedOcrSamVisionAttention", "VisionAttention", "VitDetAttention",
    ],
    "grouped": ["Phi3Attention", "Phi4MultimodalAttention"],
    "heads": ["BloomAttention", "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "PersimmonAttention"],
}
# fmt: on
# Cross-attention of GPT-2: a projection of queries, and one of keys and values.
KEYS_AND_VALUES = ("q_attn", "c_attn")


@dataclass
class Projections:
    """The query and key projections of one attention module.

    Attributes:
        name: Name of the attention module.
        attention: The attention module.
        query, key: Names of its attributes; the same name if one projection serves both.
        width: Width of what both read.
        layout: Order of the outputs of the key projection, one of `LAYOUTS`, or "keys" for all keys
            and all values; `None` if all of them are keys.
    """

    name: str
    attention: Any
    query: str
    key: str
    width: int
    layout: str | None = None

    @property
    def query_name(self) -> str:
        """The full name of the query projection."""
        return f"{self.name}.{self.query}".removeprefix(".")

    @property
    def key_name(self) -> str:
        """The full name of the key projection."""
        return f"{self.name}.{self.key}".removeprefix(".")

    @property
    def number(self) -> int | None:
        """The first number in the name, that of a layer."""
        found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", self.name)
        return None if found is None else int(found[1])

    def value_rows(self) -> torch.Tensor | None:
        """Which outputs of the key projection are values, boolean (out,); `None` if none are.

        Raises:
            ValueError: If they cannot be divided as the layout says.
        """
        if self.layout is None:
            return None
        outputs = out_features(getattr(self.attention, self.key))
        heads, shared = self._heads("num_heads", "num_attention_heads"), self._heads("num_key_value_heads")
        parts, whole = {"keys": (1, 2), "blocks": (1, 3), "grouped": (shared, heads + 2 * shared), "heads": (1, 3 * heads)}[self.layout]
        if whole == 0 or outputs * parts % whole:
            raise ValueError(f"{self.name} ({type(self.attention).__name__}) has {outputs} outputs, which do not fit its {heads} heads")
        rows, count = torch.zeros(outputs, dtype=torch.bool), outputs * parts // whole
        if self.layout == "heads":
            rows.view(heads, 3, count)[:, 2] = True
        else:
            rows[outputs - count :] = True
        return rows

    def _heads(self, *names: str) -> int:
        """A number of heads, which classes of transformers keep under different names; 0 if unknown."""
        owners = (self.attention, getattr(self.attention, "config", None))
        return next((count for owner in owners for name in names if isinstance(count := getattr(owner, name, None), int)), 0)


def in_features(projection: Any) -> int | None:
    """Return the width that a projection reads, also for a quantized one; `None` if it is not linear."""
    base = projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
    if isinstance(base, Conv1D):
        return base.weight.shape[0]
    width = getattr(base, "in_features", None)
    return width if isinstance(width, int) and isinstance(getattr(base, "out_features", None), int) else None


def out_features(projection: Any) -> int:
    """Return the width that a projection writes."""
    base: Any = projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
    return base.nf if isinstance(base, Conv1D) else base.out_features


def find_projections(model: nn.Module, config: Any) -> list[Projections]:
    """Return the query and key projections that a configuration selects.

    Raises:
        ValueError: If there are none; if the model is one of this package; if an attention module
            has unknown projections, a fused projection whose rows are in an unknown order, weights
            that it reads without calling the projection, or a query and a key projection that read
            different widths. A pooling head causes only a
            warning. A module that `layers` or `target_modules` leaves out is not checked.
    """
    if any(hasattr(part, "memory_sets") for part in model.modules()):
        raise ValueError(f"{type(model).__name__} has feature maps of its own: set use_feature_map and alpha in its configuration")
    pairs = (*map(tuple, config.projections or ()), *SEPARATE)
    inside = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    found: list[Projections] = []
    unknown: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) or name.startswith(tuple(inside)):
            continue
        kind: Any = type(module)
        one = _projections_of(name, module, pairs)
        if one is not None:
            found.append(one)
        elif isinstance(module, nn.MultiheadAttention) or attention_source(kind) is not None:
            parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
            if "Pool" in kind.__name__ + parent:
                logger.warning(f"{name} ({kind.__name__}) pools without Phi: its query and key projections are not known")
            elif _selected(Projections(name, module, "", "", 0), config):
                unknown.append(f"{name} ({kind.__name__})")
    whole = type(model).__name__
    chosen = [each for each in found if _selected(each, config)]
    if unknown:
        raise ValueError(
            f"{whole} has attention whose query and key projections are not known: {', '.join(unknown[:3])}"
            f"{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}; "
            'name them, for example projections=[["to_q", "to_k"]], or select others with target_modules'
        )
    if not chosen:
        selection = "" if config.layers is None and config.target_modules is None else " among the selected layers"
        raise ValueError(f"{whole} has no attention with query and key projections{selection}")
    for each in chosen:
        _check(each)
    return chosen


def _projections_of(name: str, module: nn.Module, pairs: tuple) -> Projections | None:
    """Return the projections of one module; `None` if it has no known ones."""
    children = dict(module.named_children())
    for query, key in pairs:
        if query in children and key in children:
            width = in_features(children[query])
            if width is not None and in_features(children[key]) is not None:
                return Projections(name, module, query, key, width)
    kinds = {kind.__name__ for kind in type(module).__mro__}
    layout = next((layout for layout, listed in LAYOUTS.items() if kinds & set(listed)), "unknown")
    if children.keys() >= set(KEYS_AND_VALUES):
        width = in_features(children["q_attn"])
        return None if width is None else Projections(name, module, *KEYS_AND_VALUES, width, "keys" if layout == "blocks" else "unknown")
    for fused in FUSED:
        width = in_features(children[fused]) if fused in children else None
        if width is not None:
            return Projections(name, module, fused, fused, width, layout)
    return None


def _selected(projections: Projections, config: Any) -> bool:
    """Return whether a configuration selects an attention module."""
    if config.layers is not None and projections.number not in config.layers:
        return False
    targets = config.target_modules
    if targets is None:
        return True
    names = {projections.query_name, projections.key_name}
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in names)
    return any(name == target or name.endswith(f".{target}") for name in names for target in targets)


def _check(projections: Projections) -> None:
    """Raise a `ValueError` for projections that cannot share one Phi."""
    what = f"{projections.name} ({type(projections.attention).__name__})"
    if projections.layout == "unknown":
        raise ValueError(
            f"{what} computes keys and values by one projection, {projections.key}, and the order of its outputs is not known; "
            "select other layers with target_modules"
        )
    if _reads_weights(type(projections.attention)):
        raise ValueError(
            f"{what} reads the weights of its projections and does not call them, so Phi would have no effect; "
            "select other layers with target_modules"
        )
    width = in_features(getattr(projections.attention, projections.key))
    if width != projections.width:
        raise ValueError(
            f"{what} reads queries of width {projections.width} and keys of width {width}, which one Phi cannot map; "
            "select other layers with target_modules"
        )


def _reads_weights(kind: type[nn.Module]) -> bool:
    """Return whether a class of attention gives the weights of its projections to a function of torch, as WavLM does."""
    for base in kind.__mro__:
        if "forward" in vars(base):
            with suppress(OSError, TypeError):
                return "multi_head_attention_forward(" in inspect.getsource(base)
    return False
