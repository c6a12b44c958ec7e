"""What the separation step exchanges between processes: gradients, memories and shards.

FSDP2 (`fully_shard`) keeps a part of each parameter in each process, as a `DTensor`; so does
DeepSpeed's ZeRO-3, as a parameter without values (see `zero`). A separation step gathers the whole
parameters, computes as an unsharded model does, and gives each process its part of the averaged
gradient. The engine's own state stays that of a model between two training steps.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .precision import is_finite
from .zero import gathered, has_master, is_partitioned


def process_count() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if _is_running() else 1


def averaged(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all processes."""
    if process_count() == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / process_count()


def mean_over_processes(losses: torch.Tensor) -> float:
    """Return the mean loss over layers and processes."""
    return float(averaged(losses).mean())


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Join the rows (n, d) of all processes, in the order of their ranks; n may differ.

    The gradient is that of a loss which every process computes from all rows, where the gradients
    of parameters are averaged over processes.
    """
    if process_count() == 1:
        return rows
    gathered: torch.Tensor = _GatherRows.apply(rows)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(process_count())]
        torch.distributed.all_gather(counts, count)
        sizes = [int(each) for each in counts]
        rank = torch.distributed.get_rank()
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        # Because a collective needs equal shapes, we pad.
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # Because the mean over processes divides by their number, we multiply by it.
        return grad[ctx.own] * process_count()


def check_sharding(model: nn.Module) -> None:
    """Raise a `NotImplementedError` if something other than FSDP2 or ZeRO shards the parameters of a model."""
    shards = [parameter for parameter in model.parameters() if is_sharded(parameter)]
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        engine = "FSDP1 (FullyShardedDataParallel)"
    elif any(is_partitioned(each) and each.requires_grad and not has_master(each) for each in model.parameters()):
        engine = "deepspeed.zero.Init without deepspeed.initialize"
    elif shards and not (_fsdp_modules(model) and all(_is_fsdp_only(parameter) for parameter in shards)):
        engine = "tensor parallelism"
    else:
        return
    raise NotImplementedError(
        f"the separation step needs whole parameters or those of FSDP2 or DeepSpeed's ZeRO, but {engine} shards them; "
        "use plain data parallelism (DDP), FSDP2 (fully_shard, or fsdp_version: 2 of accelerate) or an engine of DeepSpeed"
    )


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor is a `DTensor`, of which each process holds a part."""
    # Because an import of DTensor takes long, we look for an attribute that only it has.
    return hasattr(tensor, "placements")


def whole(tensor: Any) -> torch.Tensor:
    """Return the whole value of a tensor, without its graph; every process must call it."""
    if is_partitioned(tensor):
        return gathered([tensor])[0]
    value = tensor.detach()
    if is_sharded(value):
        # Because FSDP2 may keep its shards on the CPU, we gather on the device that computes.
        value = value.to(tensor.device_mesh.device_type).full_tensor()
    return cast(torch.Tensor, value)


def part_like(value: torch.Tensor, tensor: Any) -> torch.Tensor:
    """Shard a value, which is equal in all processes, as a tensor of the same shape is sharded."""
    if not is_sharded(tensor) or value.shape != tensor.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Because every process holds the whole value, none needs to be sent (`src_data_rank`).
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)


def averaged_like(gradient: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Average a whole gradient over all processes, and shard it as its parameter is sharded."""
    if not is_sharded(parameter):
        return averaged(gradient)
    from torch.distributed.tensor import DTensor, Partial

    mesh = parameter.device_mesh
    summand = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return summand.redistribute(placements=parameter.placements).to(parameter.device)


def are_finite(tensors: Sequence[Any]) -> bool:
    """Return whether every value of some tensors is finite, those of other processes included."""
    finite = all(is_finite(tensor.to_local() if is_sharded(tensor) else tensor) for tensor in tensors)
    # Because all processes must go on or stop together, they tell each other.
    return bool(averaged(torch.tensor(float(finite))) == 1.0) if any(map(is_sharded, tensors)) else finite


def reshard(model: nn.Module) -> bool:
    """Let a model hold its sharded parameters, where FSDP2 left them gathered after a forward.

    Returns:
        Whether FSDP2 shards the model.
    """
    modules = _fsdp_modules(model)
    for module in modules:
        module.reshard()
    return bool(modules)


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Replace the parameters that FSDP2 or ZeRO-3 shards by whole tensors, and switch the engine's hooks off.

    Inside, the model computes as an unsharded one. Every process must enter. A model without an
    engine stays unchanged.

    Yields:
        The whole tensor that replaces each sharded parameter, by the parameter's `id`; a leaf of
            the graph.
    """
    reshard(model)
    modules, replaced = list(model.modules()), _whole_leaves(model)
    changed: list[tuple[Any, str, Any]] = []
    hooks: list[tuple[Any, str, OrderedDict]] = []
    try:
        for module in modules if replaced else ():
            for name, parameter in module._parameters.items():
                if id(parameter) in replaced:
                    changed.append((module._parameters, name, parameter))
        for holder, name, parameter in changed:
            holder[name] = replaced[id(parameter)]
        for module in modules:
            for name in ("_forward_pre_hooks", "_forward_hooks"):
                given = getattr(module, name)
                others = OrderedDict((key, hook) for key, hook in given.items() if not _is_of_engine(hook))
                if len(others) < len(given):
                    hooks.append((module, name, given))
                    setattr(module, name, others)
        yield replaced
    finally:
        for holder, name, parameter in changed:
            holder[name] = parameter
        for module, name, given in hooks:
            setattr(module, name, given)


def _whole_leaves(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return the whole tensor of each sharded parameter, by its `id`."""
    partitioned = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
    wholes = list(zip(partitioned, gathered(partitioned) if partitioned else (), strict=True))
    wholes += [(parameter, whole(parameter)) for parameter in model.parameters() if is_sharded(parameter)]
    return {id(parameter): value.requires_grad_(parameter.requires_grad) for parameter, value in wholes}


def _is_running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that `fully_shard` was applied to."""
    if not _is_running():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_fsdp_only(parameter: Any) -> bool:
    """Return whether a parameter is sharded along one axis of its mesh and replicated along others.

    With tensor parallelism, FSDP2's axis comes before that of the tensors.
    """
    *first, last = parameter.placements
    return last.is_shard() and all(placement.is_replicate() for placement in first)


def _is_of_engine(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith(("torch.distributed.fsdp", "deepspeed"))
