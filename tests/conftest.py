"""Settings that all tests share: a table of tolerances, seeds and threads."""

import gc
import os
import sys
from typing import Any


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")
# Because pytest-xdist starts one worker per core, each worker and each process that it starts use one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel


torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("default")

# Largest accepted difference, absolute and relative to the larger value, for each dtype. For
# float32 it allows for a sum of about a hundred rounded terms. For half precision it allows for the
# rounding of inputs and outputs, because all computation between is in fp32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


# transformers 5.23 and later warns about the old name.
CHECKPOINTING = "activation_checkpointing" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient_checkpointing"


def assert_close(actual: torch.Tensor, expected: Any, *, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    """Assert that values are equal within the tolerance for `dtype` (by default that of `actual`),
    multiplied by `scale`."""
    tolerance = TOLERANCE[dtype or actual.dtype] * scale
    torch.testing.assert_close(
        actual.detach().double(), torch.as_tensor(expected, dtype=torch.float64).detach(), atol=tolerance, rtol=tolerance
    )


_frozen_modules = 0


@pytest.fixture(autouse=True)
def _imports_are_no_garbage() -> None:
    """Leave what imports have made out of later collections.

    The Trainer collects garbage at each start, which takes 0.4 seconds with everything that the imports made.
    """
    global _frozen_modules
    if len(sys.modules) > _frozen_modules + 20:
        _frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `browser` what uses the demo in a browser, and as `unit` what neither trains for seconds nor
    starts a process or a browser."""
    for item in items:
        if {"browser", "address"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("browser")
        if not any(item.get_closest_marker(name) for name in ("trains", "process", "browser")):
            item.add_marker("unit")


def pytest_sessionfinish() -> None:
    gc.unfreeze()
