"""Results files: what a command measured, and the recipe, versions, commit and machine that gave it.

Every results file is a JSON mapping with `schema` (`SCHEMA`), `kind`, the keys of its kind
(`KINDS`), and the provenance: `versions`, `commit`, `machine` and `code`. The machine is null in the
oldest files, which did not record it. `code` has the hash of each file of the package that was used
(see `stale.py`); older files have none. The kinds are:

- "run": one training run. `name`, `metrics` by name, `seed` and `recipe`. Further keys depend on
  the task, for example `log_history`.
- "seeds": variants of a recipe, each trained with several seeds. `sweep` (the settings of the
  sweep), `recipe`, `variants`, `paired` (differences of variants at equal seeds), `baselines` and
  `published` (metrics by name). A variant has `num_parameters`, `metrics` (each with `mean`, `std`
  and `values` by seed), and `curves` if the sweep asks for them.
- "folds": variants of a bag recipe and baselines, cross-validated on equal folds. `results` (for
  each, metrics with `mean`, `std_repeats`, `std_folds` and `by_repeat`, and the first metric of
  every fold), `parameters` by variant, `paired`, `published`, `recipe`, and `variants` (the
  overrides of each).
- "retrieval": a retrieval experiment. `summary` (means and standard deviations by panel, model,
  alpha and value), `recipe`, and `rows` (one for each measurement).
- "geometry": an experiment with feature maps. `results`, which depend on the experiment, and
  `recipe`.
- "speed": measured ratios. `cases` (one for each ratio, with its bound), and `growth`
  (milliseconds by size) if all parts were measured.
"""

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

from .errors import RecipeError
from .recipe import upgraded


SCHEMA = 1
# The keys that every file of a kind has.
KINDS: dict[str, tuple[str, ...]] = {
    "run": ("name", "metrics", "seed", "recipe"),
    "seeds": ("sweep", "recipe", "variants", "paired", "baselines", "published"),
    "folds": ("results", "parameters", "paired", "published", "recipe", "variants"),
    "retrieval": ("summary", "recipe", "rows"),
    "geometry": ("results", "recipe"),
    "speed": ("cases",),
}
PROVENANCE = ("versions", "commit", "machine")


def write_result(path: Path, kind: str, content: dict[str, Any]) -> None:
    """Write a results file atomically; the folder is created if it does not exist.

    Args:
        path: JSON file to write.
        kind: Key of `KINDS`.
        content: The keys of the kind. The provenance of this process is added, unless the content
            has `versions`, `commit` and `machine` of the runs that it gathers.

    Raises:
        RecipeError: For an unknown kind, or content without a key of its kind.
    """
    own = {} if "versions" in content else provenance()
    result = {"schema": SCHEMA, "kind": kind, **content, **own}
    check_result(path, result, tuple(KINDS))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_text(result) + "\n")


def read_result(path: Path, *kinds: str) -> dict[str, Any]:
    """Read a results file.

    The `results.json` of a run may be of a version before the schema. It is brought into today's
    form.

    Args:
        path: JSON file to read.
        kinds: The kinds to accept; every kind if there are none.

    Raises:
        RecipeError: If there is no such file, it is not valid JSON, it has another schema or kind,
            or it lacks a key of its kind.
    """
    if not path.is_file():
        raise RecipeError(f"there is no results file {path}")
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RecipeError(f"{path} is not valid JSON: {error}") from error
    if kinds == ("run",) and isinstance(result, dict) and result.keys() >= set(KINDS["run"]) - {"name"} and "schema" not in result:
        result = with_schema("run", {"name": result["recipe"]["name"], **result})
    check_result(path, result, kinds or tuple(KINDS))
    return result


def check_result(path: Path, result: Any, kinds: tuple[str, ...]) -> None:
    """Raise a `RecipeError` if the content of a results file has another schema, another kind, or
    not all keys of its kind."""
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA:
        raise RecipeError(f"{path} must have schema {SCHEMA}, got {schema!r}; `benchmarks/migrate_results.py` converts earlier files")
    if result.get("kind") not in kinds:
        raise RecipeError(f"the kind of {path} must be {' or '.join(kinds)}, got {result.get('kind')!r}")
    missing = [key for key in (*KINDS[result["kind"]], *PROVENANCE) if key not in result]
    if missing:
        raise RecipeError(f"{path}, of kind {result['kind']!r}, must have {', '.join(missing)}")


def with_schema(kind: str, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file from before the schema, with schema, kind and machine.

    A recipe of images, bags or series gets today's form, and one of retrieval or geometry its
    `task`."""
    result = {"schema": SCHEMA, "kind": kind, **content, "machine": content.get("machine")}
    if kind in ("retrieval", "geometry"):
        result["recipe"] = {**content["recipe"], "task": kind}
    elif "recipe" in KINDS[kind]:
        result["recipe"] = upgraded(content["recipe"])
    return result


def as_text(value: Any, margin: str = "") -> str:
    """JSON with one line for each mapping or list that holds no other one, so that a row of a table
    is a line."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(entry, dict | list) for entry in entries):
        return json.dumps(value)
    names = [f"{json.dumps(str(key))}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    lines = [f"{margin} {name}{as_text(entry, margin + ' ')}" for name, entry in zip(names, entries, strict=True)]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([first, ",\n".join(lines), f"{margin}{last}"])


def write_results(path: Path, recipe: Any, metrics: dict[str, Any], **details: Any) -> None:
    """Write the results file of a run: its metrics, seed and recipe, and further details."""
    write_result(path, "run", {"name": recipe.name, "metrics": metrics, "seed": recipe.seed, "recipe": as_recorded(recipe), **details})


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: if the process is killed, the file holds all of the text or its old
    content."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


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
    from .stale import code

    return {"versions": versions, "commit": commit(), "machine": machine(), "code": code()}


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
