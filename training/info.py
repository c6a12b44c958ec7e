"""Print versions, devices and attention kernels, as text for a bug report."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .errors import RecipeError


# Packages of the extra `train` by the name of their import, as the commands need them.
TRAIN_PACKAGES = ("datasets", "evaluate", "filelock", "matplotlib", "pandas", "PIL", "scipy", "sklearn", "yaml")
PACKAGES = ("modeling-uhop", "torch", "transformers", "accelerate", "safetensors", "numpy")
OPTIONAL = ("datasets", "entmax", "faiss-cpu", "faiss-gpu", "triton", "peft", "deepspeed", "gradio")


def check_installed() -> None:
    """Check that the packages of the extra `train` can be imported.

    Raises:
        RecipeError: If one cannot be; the message names the missing packages and the extra.
    """
    if missing := [name for name in TRAIN_PACKAGES if not find_spec(name)]:
        raise RecipeError(f"{', '.join(missing)} cannot be imported, but this command needs them: pip install 'modeling-uhop[train]'")


def report() -> str:
    """One line for each version, device and attention kernel: a name, a colon and a value."""
    facts = {"platform": platform.platform(), "python": platform.python_version()}
    facts |= {name: _version(name) for name in (*PACKAGES, *OPTIONAL)}
    facts |= {"machine": _machine()} | _devices() | _kernels()
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> str:
    from .results import machine

    return machine()


def _devices() -> dict[str, str]:
    """The accelerators that PyTorch finds, and CUDA's version."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "accelerator": "none" if accelerator is None else f"{accelerator.type} ({', '.join(names) or 'no name'})",
        "CUDA of PyTorch": torch.version.cuda or "none",
    }


def _kernels() -> dict[str, str]:
    """The kernel that computes a call of each attention, on the devices of this machine."""
    import torch

    from modeling_uhop import attention_triton
    from modeling_uhop.attention_interface import KERNELS, select_kernel

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    facts = {}
    for device in ["cpu"] if accelerator is None else ["cpu", accelerator.type]:
        call = torch.zeros(3, 1, 1, 2, 8, device=device)
        facts[f"attention at alpha = 1 on {device}"] = select_kernel(*call).__name__
        facts[f"attention at alpha = 1.5 on {device}"] = select_kernel(*call, alpha=1.5).__name__
    if attention_triton.triton is None:
        triton = "cannot run, because Triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        triton = "runs in Triton's interpreter (TRITON_INTERPRET=1)"
    else:
        triton = "runs on cuda" if torch.cuda.is_available() else "cannot run, because there is no CUDA device"
    entmax = "runs" if "hopfield_entmax" in KERNELS else "cannot run, because entmax is not installed"
    return {**facts, "hopfield_triton": triton, "hopfield_entmax": entmax}


def main(arguments: list[str]) -> None:
    """Print the report."""
    argparse.ArgumentParser(prog="modeling-uhop info", description=__doc__).parse_args(arguments)
    print(report())
