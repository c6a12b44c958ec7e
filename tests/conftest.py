"""Shared by all tests: one tolerance table, seeds, threads."""

import os
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel


# One worker of pytest-xdist a core: more threads would only fight over them.
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")

# Largest accepted difference, absolute and relative to the larger value, by the dtype of what is tested. Float32 leaves room for a sum of
# about a hundred rounded terms; the half precisions for their own rounding of inputs and output, as everything between is fp32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


# Since 5.23 transformers warns of the old name.
CHECKPOINTING = "activation_checkpointing" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient_checkpointing"


def assert_close(actual: torch.Tensor, expected: Any, *, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    """Values equal within the table's tolerance for `dtype` (that of `actual`), widened by `scale` for values of that size."""
    tolerance = TOLERANCE[dtype or actual.dtype] * scale
    torch.testing.assert_close(
        actual.detach().double(), torch.as_tensor(expected, dtype=torch.float64).detach(), atol=tolerance, rtol=tolerance
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
