"""The memories from which the Hopfield layers of a model retrieve, observed in a forward pass."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import nn

from .feature_map import FeatureMap


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
