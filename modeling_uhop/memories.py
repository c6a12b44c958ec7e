"""The memories from which the Hopfield layers of a model retrieve, observed in a forward pass."""

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .feature_map import FeatureMap


logger = logging.get_logger(__name__)


class MemorySet(NamedTuple):
    """Memories from which one layer retrieves, with the layer's feature map.

    Attributes:
        feature_map: Phi of the layer; `None` for a layer without one.
        memories: Stored patterns (B, M, d).
        mask: Boolean (B, M), True where a memory is present; `None` if all are.
    """

    feature_map: FeatureMap | None
    memories: torch.Tensor
    mask: torch.Tensor | None = None

    def features(self) -> torch.Tensor:
        """Map the memories to feature space (B, M, D); without Phi they stay unchanged."""
        return self.memories if self.feature_map is None else self.feature_map(self.memories)

    @property
    def shared(self) -> bool:
        """Whether the memories are the same for every example."""
        return False


class SharedMemorySet(MemorySet):
    """Memories that do not depend on the example, such as learned ones."""

    @property
    def shared(self) -> bool:
        """Whether the memories are the same for every example."""
        return True


def present_memories(attention_mask: torch.Tensor | None, memories: torch.Tensor) -> torch.Tensor | None:
    """Return which memories any query may retrieve, as a mask (B, M).

    Args:
        attention_mask: As in `HopfieldAttention.forward`: boolean or added to the scores, and
            broadcastable to (B, H, Q, M). A mask (B, M), as flash attention takes it, is accepted
            too. `None` if all memories are present.
        memories: The memories (B, M, d).
    """
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point():
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min
    if attention_mask.dim() > 2:
        attention_mask = attention_mask.flatten(1, -2).any(1)
    return attention_mask.bool().expand(memories.shape[:2])


def has_memories(model: Any) -> bool:
    """Return whether a model has memories to separate: its own, or those of layers that can be observed."""
    return hasattr(model, "memory_sets") or (
        isinstance(model, nn.Module) and any(hasattr(module, "memory_set") for module in model.modules())
    )


def memory_sets_of(
    model: Any, batch: Mapping[str, Any], *, include_class_token: bool = False, special_token_ids: Collection[int] = ()
) -> list[MemorySet]:
    """Return what each Hopfield layer of a model retrieves from.

    A model that has `memory_sets` answers itself. In another one, such as a model of transformers
    with an adapter of `UHopAdapterConfig`, the layers are observed, and a mask says which memories
    count. It is applied where its length is that of the memories:

    - `attention_mask` (B, M) of the batch, or `decoder_attention_mask` for the self-attention of a
        decoder. A mask of audio samples or frames (B, T) is shortened to the M frames of the
        encoder as the model tells, for padding on the right. If the model does not tell, a warning
        says that padded frames count;
    - unless `include_class_token`: `special_tokens_mask` (B, M) of the batch, True at a special
        token, and `special_token_ids`;
    - unless `include_class_token`: of `pixel_values`, the tokens that come before the patches.

    Args:
        model: The model.
        batch: Inputs of the model. `special_tokens_mask` is not passed on.
        include_class_token: Whether special tokens are memories.
        special_token_ids: Ids of `input_ids`, and of `decoder_input_ids`, that are special tokens.

    Raises:
        ValueError: If no layer can be observed.
    """
    if hasattr(model, "memory_sets"):
        return list(model.memory_sets(**batch, **({"include_class_token": True} if include_class_token else {})))
    inputs = {name: value for name, value in batch.items() if name != "special_tokens_mask"}
    observed = observe(model, lambda: model(**inputs))
    if not observed:
        raise ValueError(f"{type(model).__name__} has no Hopfield layer whose memories can be observed")
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return [
        each._replace(
            mask=_count_of(
                each.memories,
                batch,
                "decoder_" if is_pair and _reads_the_decoder(name) else "",
                special=None if include_class_token else special_token_ids,
                patch=getattr(_configuration_of(model, name), "patch_size", None),
                model=model,
            )
        )
        for name, each in observed
    ]


def _reads_the_decoder(name: str) -> bool:
    """Return whether a layer of an encoder-decoder retrieves from what the decoder reads."""
    return re.search(r"(^|\.)decoder\.", name) is not None and re.search("cross|enc_?dec|encoder_?att", name, re.IGNORECASE) is None


def _configuration_of(model: nn.Module, name: str) -> Any:
    """Return the configuration of the innermost module around a layer that has one with a patch size."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if hasattr(config, "patch_size"):
            return config
    return None


def _count_of(
    memories: torch.Tensor, batch: Mapping[str, Any], side: str, special: Collection[int] | None, patch: Any, model: nn.Module
) -> torch.Tensor | None:
    """Return which memories (B, M, d) count, as a mask (B, M); `None` if all do.

    Args:
        memories: The memories.
        batch: Inputs of the model.
        side: "decoder_" for what a decoder reads, or "".
        special: Ids of special tokens, which do not count; `None` if special tokens count.
        patch: Patch size of the model, if it has one.
        model: The model.
    """
    size = memories.shape[:2]
    masks: list[torch.Tensor] = []
    # Because the mask of a text may by chance be as long as an image, it is not applied to image tokens.
    is_image = patch is not None and "pixel_values" in batch
    if not is_image and (padding := _padding_of(batch, side, size, model)) is not None:
        masks.append(padding)
    if special is not None:
        if not side and (tokens := _of_size(batch.get("special_tokens_mask"), size)) is not None:
            masks.append(~tokens.bool())
        if special and (ids := _of_size(batch.get(f"{side}input_ids"), size)) is not None:
            masks.append(~torch.isin(ids, torch.tensor(list(special), device=ids.device)))
        if (leading := _leading_tokens(batch.get("pixel_values"), size, patch)) > 0:
            masks.append((torch.arange(size[1], device=memories.device) >= leading).expand(size))
    if not masks:
        return None
    return torch.stack([mask.to(memories.device) for mask in masks]).all(0)


def _padding_of(batch: Mapping[str, Any], side: str, size: torch.Size, model: nn.Module) -> torch.Tensor | None:
    """Return which memories are not padding, as a mask (B, M); `None` if the batch does not say."""
    mask = batch.get(f"{side}attention_mask")
    if (given := _of_size(mask, size)) is not None:
        return given.bool()
    is_of_audio = not side and ("input_values" in batch or "input_features" in batch)
    if not is_of_audio or not isinstance(mask, torch.Tensor) or mask.dim() != 2 or len(mask) != size[0]:
        return None
    length, lengths = torch.tensor(mask.shape[1]), mask.sum(1).cpu()
    for shortened in _shortenings(model):
        if int(shortened(length)) == size[1]:
            counts = torch.tensor([int(shortened(each)) for each in lengths], device=mask.device)
            return torch.arange(size[1], device=mask.device) < counts[:, None]
    if (lengths < length).any():
        whole = getattr(model, "get_base_model", lambda: model)()
        logger.warning_once(
            f"padded frames count as memories: {type(whole).__name__} does not tell which of its {size[1]} memories an attention_mask "
            f"of {int(length)} values leaves out; use batches of one example, without padding"
        )
    return None


def _shortenings(model: nn.Module) -> Iterator[Callable[[torch.Tensor], Any]]:
    """Yield the functions from a number of samples to a number of frames that the parts of a speech model have."""
    parts: list[Any] = [part for part in model.modules() if hasattr(type(part), "_get_feat_extract_output_lengths")]
    for part in parts:
        shorten = part._get_feat_extract_output_lengths
        # Because what `config.add_adapter` adds comes after the attention layers, it is left out.
        before = {"add_adapter": False} if "add_adapter" in inspect.signature(shorten).parameters else {}
        yield partial(shorten, **before)


def _of_size(values: Any, size: torch.Size) -> torch.Tensor | None:
    """Return values if they are a tensor of this size."""
    return values if isinstance(values, torch.Tensor) and values.shape == size else None


def _leading_tokens(pixels: Any, size: torch.Size, patch: Any) -> int:
    """Return how many tokens come before the patches of an image; 0 if the memories are not its tokens."""
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 4 or patch is None or len(pixels) != size[0]:
        return 0
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return max(0, size[1] - (pixels.shape[-2] // height) * (pixels.shape[-1] // width))


class _AllObserved(Exception):
    """Ends a forward pass in which every layer has been observed."""


def observe(model: nn.Module, forward: Callable[[], Any]) -> list[tuple[str, MemorySet]]:
    """Run a forward pass and return what each Hopfield layer is given to retrieve from.

    A Hopfield layer is a module with a method `memory_set`, which takes the arguments of the
    layer's `forward`. The pass ends before the last of these layers computes anything, because
    nothing after it is needed. It is not compiled, and it does not checkpoint gradients: a tensor
    observed inside a checkpointed layer would have no gradient.

    Args:
        model: The model whose layers are observed.
        forward: A function that calls the model.

    Returns:
        A name of a layer, and its memories with their graph, for each call of a layer.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "memory_set")}
    found: list[tuple[str, MemorySet]] = []
    missing, thread = set(layers), get_ident()
    with ExitStack() as stack:
        for name, layer in layers.items():

            def record(layer: Any, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
                if get_ident() != thread:
                    return
                found.append((name, layer.memory_set(*args, **kwargs)))
                missing.discard(name)
                if not missing:
                    raise _AllObserved

            stack.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
        stack.enter_context(_without_checkpoints(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        with suppress(_AllObserved):
            forward()
    return found


@contextmanager
def _without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off."""
    checkpointed: list[Any] = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
