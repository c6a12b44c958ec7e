"""Checks of inputs that several models share, and the loss on checked labels."""

import copy
import functools
import math
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .precision import is_readable, largest


logger = logging.get_logger(__name__)


def check_tensor(value, name: str) -> None:
    """Raise a `TypeError` if an input is not a dense tensor of real numbers; `None` is accepted."""
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        found = type(value)
        raise TypeError(
            f"{name} must be a torch.Tensor, got {found.__module__}.{found.__qualname__}; torch.as_tensor converts arrays and lists"
        )
    if value.is_complex() or value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense torch.Tensor of real numbers, got {value.dtype} with layout {layout}")


def check_tensors(**inputs) -> None:
    """Raise a `TypeError` for the first of these required inputs that is `None` or not a tensor."""
    for name, value in inputs.items():
        if value is None:
            raise TypeError(f"{name} must be a torch.Tensor, got None")
        check_tensor(value, name)


def required_input(name: str, value, **others) -> torch.Tensor:
    """Return the main input of a model.

    Raises:
        ValueError: If it is `None`.
        TypeError: If it or one of the other inputs, which may be `None`, is not a tensor.
    """
    if value is None:
        raise ValueError(f"{name} is required, got None")
    for each, given in {name: value, **others}.items():
        check_tensor(given, each)
    return value


def as_floats(**inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Convert integer tensors to floats; return floating tensors unchanged.

    The dtype is that of the floating inputs, or the default dtype if there are none.

    Raises:
        TypeError: If an input is not a tensor.
    """
    check_tensors(**inputs)
    if all(tensor.is_floating_point() for tensor in inputs.values()):
        return tuple(inputs.values())
    floats = [tensor.dtype for tensor in inputs.values() if tensor.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, floats or [torch.get_default_dtype()])
    return tuple(tensor if tensor.is_floating_point() else tensor.to(dtype) for tensor in inputs.values())


def as_mask(mask: torch.Tensor, name: str, one: str, zero: str) -> torch.Tensor:
    """Convert a mask of 0 and 1 to booleans.

    Args:
        mask: The mask; booleans are returned unchanged.
        name: Name of the mask, for the error message.
        one: What 1 means, for the error message.
        zero: What 0 means, for the error message.

    Raises:
        ValueError: If (on a CPU) the mask has other values.
    """
    if mask.dtype != torch.bool and is_readable(mask):
        other = mask[(mask != 0) & (mask != 1)]
        if len(other) > 0:
            raise ValueError(f"{name} must be 1 for {one} and 0 for {zero}, and has other values, such as {other[0].item()}")
    return mask.bool()


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module computes exactly what its class defines, with its own weights.

    A subclass, an adapter, or a hooked, patched, offloaded or quantized module is not plain. A
    quantized module has weights of another tensor class.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or getattr(module.forward, "__func__", None) is not kind.forward
    plain = all(type(weight) is nn.Parameter and not weight.is_meta for weight in module.parameters())
    return type(module) is kind and not hooked and plain


def check_no_overflow(states: torch.Tensor, example: str, limit: float = math.inf) -> None:
    """Check (on a CPU) that every value of a batch is below `limit` in magnitude.

    Args:
        states: States (B, ...).
        example: What one example is called, such as "bag", for the error message.
        limit: The limit; by default, values must be finite.

    Raises:
        ValueError: If a value is not; the message names the first such example.
    """
    if not largest(states) < limit:
        index = (~(states.detach().abs() < limit)).flatten(1).any(1).nonzero()[0].item()
        raise ValueError(
            f"{example} {index} of the batch overflows in {states.dtype}: its values are too large for this model (standardise them), "
            "or weights of the model are not finite"
        )


# Because inputs above `LARGE` may lead to states above `MAX_STATE`, whose squares overflow (a layer
# norm in fp32 would then divide by infinity), we check such states.
LARGE, MAX_STATE = 1e9, 1e18


_ACCEPTED_LABELS = {
    "single_label_classification": "class indices of shape (B,) or (B, 1)",
    "multi_label_classification": "values in [0, 1] of shape (B, num_labels)",
    "regression": "numbers of shape (B, num_labels)",
}


def decided_labels(labels: torch.Tensor, batch_size: int, config: Any) -> tuple[torch.Tensor, Any]:
    """Decide what labels mean to a model, and convert them for the loss.

    `config.problem_type` decides. If it is `None`, `num_labels` and the shape of the labels decide:
    a model with one label is a regression; with more labels, labels (B,) or (B, 1) are class
    indices, and labels (B, num_labels) mean that an example has several labels. Class indices may
    be whole floats; the loss ignores -100.

    Args:
        labels: The labels of a batch.
        batch_size: Number B of examples.
        config: The configuration of the model.

    Returns:
        Labels as the losses of transformers expect them: long (B,) for class indices, otherwise
            (B, num_labels). Also the configuration, or a copy of it with the decided problem type.

    Raises:
        TypeError: If the labels are not a dense tensor of real numbers.
        ValueError: If the labels have another shape, or (on a CPU) if the label of an example is
            not in the accepted range.
    """
    check_tensor(labels, "labels")
    num_labels, problem = config.num_labels or 0, config.problem_type
    is_single_label_shape = labels.shape in ((batch_size,), (batch_size, 1))
    if problem is None:
        several = "single_label_classification" if is_single_label_shape else "multi_label_classification"
        problem = "regression" if num_labels == 1 else several
    classes = problem == "single_label_classification"
    has_valid_shape = is_single_label_shape if classes or num_labels == 1 else labels.shape == (batch_size, num_labels)
    if num_labels < 1 or not has_valid_shape:
        accepted = [problem] if config.problem_type or num_labels == 1 else list(_ACCEPTED_LABELS)[:2]
        raise ValueError(
            f"labels must be {' or '.join(_ACCEPTED_LABELS[name] for name in accepted)}, got {labels.dtype} of shape {tuple(labels.shape)} "
            f"with B={batch_size}, num_labels={num_labels} and problem_type={config.problem_type!r}"
        )
    labels = labels.reshape(batch_size) if classes else labels.reshape(batch_size, num_labels)
    if not labels.is_floating_point():
        labels = labels.long()
    if classes:
        whole = labels == labels.trunc()
        _check_examples(labels, whole, "be class indices, which are whole numbers (set num_labels=1 for a regression)")
        _check_examples(labels, ((labels >= 0) & (labels < num_labels)) | (labels == -100), f"lie in [0, {num_labels})")
        # Because fractions are not detected if values cannot be read, we turn them into an index
        # that the loss refuses.
        labels = labels.masked_fill(~whole, -1).long()
    elif problem == "multi_label_classification":
        rule = "lie in [0, 1] where an example has several (set config.problem_type='regression' for other numbers)"
        _check_examples(labels, (labels >= 0) & (labels <= 1), rule)
    else:
        _check_examples(labels, labels.abs() < 1e18, "be finite and smaller than 1e18, or their squares overflow")
    if config.problem_type is None:
        config = copy.copy(config)
        config.problem_type = problem
        if not classes and not torch.compiler.is_compiling():
            logger.warning_once(
                f"config.problem_type is None, and these labels are read as {problem!r}: set config.problem_type={problem!r}, "
                "or pipelines will not know which function to apply to the saved model's logits."
            )
    return labels, config


def _check_examples(labels: torch.Tensor, is_valid: torch.Tensor, rule: str) -> None:
    """Raise a `ValueError` with the rule and the first label that is not valid."""
    if is_readable(labels) and not is_valid.all():
        place = (~is_valid).nonzero()[0].tolist()
        raise ValueError(f"labels must {rule}, got {labels[tuple(place)].item()} for example {place[0]} of the batch")


def label_loss(
    model: Any, labels: torch.Tensor, logits: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, **kwargs
) -> torch.Tensor:
    """Compute the loss of a classifier for any kind of labels, in fp32 or better.

    It is the `loss_function` of transformers for the problem type of the labels.

    Args:
        model: The model.
        labels: As in `decided_labels`.
        logits: Logits (B, num_labels).
        num_items_in_batch: Number of labels over which the loss is averaged, if B is only a part of
            them.

    Returns:
        A scalar; 0 if every label is ignored.
    """
    labels, config = decided_labels(labels, logits.shape[0], model.config)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if config.problem_type == "single_label_classification":
        count = labels.ne(-100).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return model.loss_function(labels, logits, config, num_items_in_batch=count.clamp(min=1), **kwargs)
    loss = model.loss_function(labels.to(logits.dtype), logits, config, **kwargs)
    # Because transformers averages these losses over this batch, which may be one of several that a
    # step accumulates, we scale the mean to the number of items in all of them.
    return loss if num_items_in_batch is None else loss * labels.numel() / num_items_in_batch
