"""Precision of tensors, and whether Python may read their values."""

import torch


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert half precision to fp32; return every other tensor unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype of autocast if it is enabled and the input is not float64, or that of the input."""
    device = tensor.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled and tensor.dtype != torch.float64 else tensor.dtype


def cast_by_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast inputs to the autocast dtype if autocast is enabled; float64 inputs stay unchanged."""
    return tuple(tensor.to(autocast_dtype(tensor)) for tensor in tensors)


def is_traced() -> bool:
    """Return whether `torch.compile`, `torch.export` or `torch.jit.trace` is recording a graph.

    A graph cannot branch on values.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_readable(tensor: torch.Tensor) -> bool:
    """Return whether Python may read the values of a tensor.

    It may on a CPU. On an accelerator, reading would stall every step. A traced graph, or a
    function that torch.func transforms, cannot branch on values.
    """
    return tensor.device.type == "cpu" and not is_traced() and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether every value of a tensor is finite.

    If the sum is finite, all values are. If it is not, it may only have overflowed, and each value
    is checked.
    """
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def largest(tensor: torch.Tensor) -> float:
    """Return the largest absolute value of a tensor; nan if any value is nan.

    It is 0 for an empty tensor, and if the values cannot be read.
    """
    if not is_readable(tensor) or tensor.numel() == 0:
        return 0.0
    low, high = tensor.detach().aminmax()
    return max(-low.item(), high.item())
