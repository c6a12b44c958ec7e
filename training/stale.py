"""List the results files whose code has changed since they were made.

python -m modeling_uhop.training.stale

A results file records a hash of each file of the package that its command had loaded, without
comments and docstrings. Files that only draw, write or push results are left out.
"""

import argparse
import ast
import hashlib
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .recipe import ROOT
from .results import read_result


RESULTS = ROOT / "benchmarks" / "results"
PACKAGE = __name__.partition(".")[0]
# Modules that do not change a number.
WITHOUT_EFFECT = tuple(
    f"{PACKAGE}.training.{name}" for name in ("report", "cli", "errors", "info", "push", "recipes", "reload", "results", "stale", "train")
)


def code() -> dict[str, str]:
    """The hash of each file of the package that this process has loaded, by the name of its module."""
    names = sorted(name for name in sys.modules if name.startswith(f"{PACKAGE}."))
    hashes = {name: digest(name) for name in names if not name.startswith(WITHOUT_EFFECT)}
    return {name: found for name, found in hashes.items() if found is not None}


def same_code(codes: list[dict[str, str]]) -> dict[str, str]:
    """The hashes of several runs together; a file that was not the same in all of them has none that fits."""
    names = sorted({name for each in codes for name in each})
    return {name: "/".join(sorted({each[name] for each in codes if name in each})) for name in names}


@cache
def digest(module: str) -> str | None:
    """The hash of a module's code without comments and docstrings; `None` if there is no such file."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py") or not Path(spec.origin).is_file():
        return None
    tree = ast.parse(Path(spec.origin).read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def changed(result: dict[str, Any]) -> list[str] | None:
    """The modules that differ from those that made a result; `None` if it does not say which these were."""
    recorded = result.get("code")
    return None if recorded is None else [name for name, known in recorded.items() if digest(name) != known]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="folder of results files")
    unknown, stale = [], 0
    for path in sorted(parser.parse_args().folder.rglob("*.json")):
        modules = changed(read_result(path))
        if modules is None:
            unknown.append(path.name)
        elif modules:
            stale += 1
            print(f"{path.name}: {', '.join(name.removeprefix(f'{PACKAGE}.') for name in modules)}")
    print(f"{stale} results files are stale; {len(unknown)} do not say by which code they were made")
    for name in unknown:
        print(f"  {name}")


if __name__ == "__main__":
    main()
