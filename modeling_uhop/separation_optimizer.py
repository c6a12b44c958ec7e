"""The optimizer of the separation step, which leaves gradients of others alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .distributed import is_sharded, part_like, whole
from .precision import at_least_fp32
from .zero import has_master, master, write


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


class SeparationOptimizer:
    """Optimizer of Stage I, which leaves the parameters' own `.grad` unchanged.

    Half-precision parameters are updated through fp32 copies, because small steps would be lost in
    rounding, and Adam's epsilon is 0 in fp16.

    Args:
        name: "sgd" (used in the papers) or "adam".
        parameters: The parameters to update.
        lr: Learning rate, at least 0.

    Raises:
        ValueError: If the name is unknown or the rate is negative.
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], lr: float):
        if name not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {tuple(OPTIMIZERS)}, got {name!r}")
        if not lr >= 0:
            raise ValueError(f"the separation learning rate must be at least 0, got {lr}")
        self.parameters = list(parameters)
        self.mastered = [has_master(parameter) for parameter in self.parameters]
        self.wide = [_wide(parameter) for parameter in self.parameters]
        # Because one multi-tensor kernel cannot update sharded and whole parameters together, each is
        # then updated by itself.
        foreach = False if len({is_sharded(wide) for wide in self.wide}) > 1 else None
        self.inner = OPTIMIZERS[name](self.wide, lr=lr, foreach=foreach)

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take one step with a gradient for each parameter, or `None` to leave it unchanged."""
        own_gradients = [wide.grad for wide in self.wide]
        for parameter, wide, gradient, mastered in zip(self.parameters, self.wide, gradients, self.mastered, strict=True):
            if mastered:
                if gradient is not None:
                    wide.copy_(master(parameter))
            elif wide is not parameter:
                # Because other code may have changed the parameter, we refresh its fp32 copy.
                wide.copy_(torch.where(wide.to(parameter.dtype) == parameter, wide, parameter.float()))
            wide.grad = None if gradient is None else at_least_fp32(gradient)
        self.inner.step()
        masters = []
        for place, (parameter, wide) in enumerate(zip(self.parameters, self.wide, strict=True)):
            wide.grad = own_gradients[place]
            if self.mastered[place]:
                masters += [(parameter, wide)] if gradients[place] is not None else []
            elif wide is not parameter:
                parameter.copy_(wide)
        write(masters)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume, including the fp32 copies, as whole tensors."""
        # Because DeepSpeed saves its masters itself, only copies of other parameters are saved here.
        own = [place for place, mastered in enumerate(self.mastered) if not mastered]
        copies = {place: _saved(self.wide[place]) for place in own if self.wide[place] is not self.parameters[place]}
        saved = self.inner.state_dict()
        moments = {place: {name: _saved(value) for name, value in part.items()} for place, part in saved["state"].items()}
        return {**saved, "state": moments, "wide": copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        moments = {
            place: {name: part_like(value, self.wide[place]) for name, value in part.items()} for place, part in state["state"].items()
        }
        self.inner.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
        for place, wide in state.get("wide", {}).items():
            self.wide[place].copy_(part_like(wide, self.wide[place]))


def _saved(value: Any) -> Any:
    """Return a value of an optimizer's state, or the whole of a sharded one, on the CPU."""
    return whole(value).cpu() if is_sharded(value) else value


def _wide(parameter: nn.Parameter) -> torch.Tensor:
    """Return the tensor that the optimizer updates: the parameter, its master, or an fp32 copy."""
    if has_master(parameter):
        return master(parameter)
    return parameter.detach().float() if is_half(parameter) else parameter


def is_half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
