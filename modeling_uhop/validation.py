"""Checks that several models share."""

import torch
from torch import nn


def check_hopfield(config) -> None:
    """Ranges and combinations of a configuration's Hopfield fields that types alone do not express; a `ValueError` names the field."""
    if not 1.0 <= config.alpha <= 2.0:
        raise ValueError(f"alpha must lie in [1, 2], got {config.alpha}")
    if config.learnable_alpha and not 1.0 < config.alpha < 2.0:
        raise ValueError(f"a learnable alpha must begin strictly between 1 and 2, got alpha={config.alpha}")
    if config.beta is not None and not 0 < config.beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, or None for 1 / sqrt(head width), got {config.beta}")
    if config.feature_dim is not None and config.feature_dim < 1:
        raise ValueError(f"feature_dim must be at least 1, or None for hidden_size, got {config.feature_dim}")
    features = config.feature_dim if config.use_feature_map and config.feature_dim is not None else config.hidden_size
    if config.value_source == "projected_memory" and features != config.hidden_size:
        raise ValueError(
            "value_source 'projected_memory' applies W_K to features and to raw memories, so feature_dim must equal "
            f"hidden_size {config.hidden_size}, got {features}"
        )


def check_at_least_one(config, *names: str) -> None:
    """A `ValueError` for the first of these fields that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_dropouts(config, *names: str) -> None:
    """A `ValueError` for the first of these fields that is no probability below 1."""
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")


def is_traced() -> bool:
    """Whether a graph is being made of what runs, by `torch.compile`, `torch.export` or `torch.jit.trace`: it cannot branch on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether Python may look at values: on an accelerator this would stall every step, and a traced graph cannot branch on them."""
    return tensor.device.type == "cpu" and not is_traced()


def check_tensor(value, name: str) -> None:
    """A `TypeError` for an input of a model that is no tensor, such as a NumPy array or a list; `None` passes."""
    if value is not None and not isinstance(value, torch.Tensor):
        found = type(value)
        raise TypeError(
            f"{name} must be a torch.Tensor, got {found.__module__}.{found.__qualname__}; torch.as_tensor converts arrays and lists"
        )


def check_tensors(**inputs) -> None:
    """A `TypeError` for the first of these required inputs that is `None` or no tensor."""
    for name, value in inputs.items():
        if value is None:
            raise TypeError(f"{name} must be a torch.Tensor, got None")
        check_tensor(value, name)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module does what its class does, with weights of its own: no subclass or adapter, and not hooked, patched, offloaded or
    quantized, which leaves a tensor of another class for a weight."""
    hooked = module._forward_hooks or module._forward_pre_hooks or getattr(module.forward, "__func__", None) is not kind.forward
    plain = all(type(weight) is nn.Parameter and not weight.is_meta for weight in module.parameters())
    return type(module) is kind and not hooked and plain


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite. If their sum is, they all are; if it is not, it may only have overflowed, and each is looked at."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def check_class_indices(labels: torch.Tensor, num_labels: int) -> None:
    """A `ValueError` for a class index outside [0, num_labels), save -100, which the loss ignores; labels of other kinds pass."""
    class_indices = num_labels > 1 and labels.dtype in (torch.long, torch.int) and labels.dim() == 1
    if not class_indices or not is_readable(labels):
        return
    outside = labels[((labels < 0) | (labels >= num_labels)) & (labels != -100)]
    if outside.numel() > 0:
        raise ValueError(f"labels must lie in [0, {num_labels}), got {outside[0].item()}")
