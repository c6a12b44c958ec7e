"""Files and entries that hold the state of the separation step in a checkpoint of the `Trainer`."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


STATE_FILE = "separation.pt"


def state_file_name(state: TrainerState) -> str:
    """Return the name of the state file of a callback, numbered by its position in the Trainer."""
    before = getattr(state, "_separation_callbacks", 0)
    state._separation_callbacks = before + 1  # type: ignore[attr-defined]
    return f"separation_{before}.pt" if before > 0 else STATE_FILE


def checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint at the current step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def write_state(path: Path, content: dict[str, Any]) -> None:
    """Write a state file, completely or not at all."""
    partial = path.with_suffix(".tmp")
    torch.save(content, partial)
    os.replace(partial, path)


def attach_to_optimizer(optimizer: Any, name: str, saved_state: Callable[[], dict[str, Any] | None]) -> tuple[RemovableHandle | None, Any]:
    """Save a state with the Trainer's optimizer; return the hook, and the state loaded with it.

    Callbacks are not told which folder training resumes from. PyTorch keeps entries of an optimizer
    state that belong to no parameter, so the Trainer saves and loads this entry with the others.

    Args:
        optimizer: The optimizer of the Trainer, possibly wrapped by accelerate.
        name: Name of the entry.
        saved_state: A function that returns the state to save, or `None` to save none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        return None, None

    def with_state(_: Any, saved: dict[str, Any]) -> dict[str, Any]:
        added = saved_state()
        return saved if added is None else {**saved, "state": {**saved["state"], name: added}}

    return inner.register_state_dict_post_hook(with_state), cast(dict[Any, Any], inner.state).pop(name, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and restore the mode of each module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Give Stage I its own random state, so that Stage II draws the same numbers without it."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    count = torch.get_device_module(device).device_count() if device.type in ("cuda", "xpu") else 0
    with torch.random.fork_rng(range(count), device_type=device.type if count else "cuda"):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
