"""Results files: what a command measured, and the recipe, versions, commit and machine that gave it."""

import dataclasses
import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: if the process is killed, the file holds all of the text or its old
    content."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def write_results(path: Path, recipe: Any, metrics: dict[str, Any], **details: Any) -> None:
    """Write a results file: metrics, and the recipe, seed, versions and commit that gave them."""
    results = {
        "name": recipe.name,
        "metrics": metrics,
        "seed": recipe.seed,
        "recipe": as_recorded(recipe),
        **provenance(),
        **details,
    }
    write_atomically(path, json.dumps(results, indent=2) + "\n")


def as_recorded(recipe: Any) -> dict[str, Any]:
    """A recipe as a mapping for a results file.

    Because a local path has no meaning on another machine, a local data set is recorded by its
    name."""
    content = dataclasses.asdict(recipe)
    for section in (content.get("data"), content.get("separation")):
        if section is not None and section.get("dataset") is not None and Path(section["dataset"]).exists():
            section["dataset"] = Path(section["dataset"]).resolve().name
    return content


def provenance() -> dict[str, Any]:
    """Versions of the packages, the commit and the machine, for a results file."""
    packages = ("modeling-uhop", "torch", "transformers", "accelerate", "datasets")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"versions": versions, "commit": commit(), "machine": machine()}


def machine() -> str:
    """A description of this machine: processor, cores, vector instructions and accelerator."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) if Path("/proc/cpuinfo").is_file() else []
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    name, instructions = names[0] if names else platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {instructions}{accelerator}"


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` if it has changes; `None` outside a checkout or
    without git."""

    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None
