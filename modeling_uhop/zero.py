"""Reads and writes the parameters that an engine of DeepSpeed manages with ZeRO.

ZeRO keeps a master of each trainable parameter in fp32, of which each process holds a part. A step
of the engine overwrites the parameter with its master. With ZeRO-3, each process holds only a part
of the parameter itself, too.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def is_partitioned(parameter: Any) -> bool:
    """Return whether each process holds a part of a parameter (ZeRO-3)."""
    # Because an import of DeepSpeed takes long, we look for attributes that only it sets.
    return hasattr(parameter, "ds_id")


def has_master(parameter: Any) -> bool:
    """Return whether an engine trains a parameter, and so keeps a master of it."""
    return parameter.requires_grad and hasattr(parameter, "_z3_optimizer" if is_partitioned(parameter) else "_hp_mapping")


def gathered(parameters: Sequence[Any]) -> list[torch.Tensor]:
    """Return the whole values of partitioned parameters; every process must call it."""
    with _deepspeed("runtime.zero").GatheredParameters(parameters):
        return [parameter.detach() for parameter in parameters]


def master(parameter: nn.Parameter) -> torch.Tensor:
    """Return a whole copy of the master of a parameter, in fp32; every process must call it."""
    return _deepspeed("utils").safe_get_full_fp32_param(parameter).float()


@torch.no_grad()
def write(pairs: Sequence[tuple[Any, torch.Tensor]]) -> None:
    """Set parameters and their masters to whole values, which are equal in all processes.

    Every process must call it with the same parameters.
    """
    if not pairs:
        return
    # Because the process of rank 0 sends a partitioned parameter to the others, only it sets one.
    is_first = torch.distributed.get_rank() == 0
    with _deepspeed("runtime.zero").GatheredParameters([parameter for parameter, _ in pairs], modifier_rank=0):
        for parameter, value in pairs:
            if is_first or not is_partitioned(parameter):
                parameter.copy_(value)
    for parameter, value in pairs:
        _deepspeed("utils").safe_set_full_fp32_param(parameter, value)


def _deepspeed(name: str) -> Any:
    # Because transformers refuses a file of the Hub that imports a library which is not installed,
    # no import statement names it.
    return importlib.import_module(f"deepspeed.{name}")
