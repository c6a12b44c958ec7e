"""Bring results files from before the schema into schema 1, in place. Files with a schema stay as they are.

python benchmarks/migrate_results.py
python benchmarks/migrate_results.py path/to/folder
"""

import argparse
import json
from pathlib import Path
from typing import Any

from modeling_uhop.training.recipe import ROOT
from modeling_uhop.training.results import KINDS, with_schema, write_result


# Files from before the schema name no kind. The first kind whose keys they have is theirs.
KINDS_BY_KEYS = sorted(KINDS, key=lambda kind: -len(KINDS[kind]))
TASKS = {"train_vit": "images", "train_mil": "bags", "train_stanhop": "series"}
# Overrides by their earlier names, and their names now.
OVERRIDES = {"evaluate_on": "evaluation.split", "judge": "evaluation.split", "anchor_lengths": "baseline_lengths"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "benchmarks" / "results", help="folder of results files")
    for path in sorted(parser.parse_args().folder.rglob("*.json")):
        content = json.loads(path.read_text())
        if "schema" not in content:
            migrated = from_before_the_schema(content)
            write_result(path, migrated["kind"], migrated)
            print(path, migrated["kind"])


def from_before_the_schema(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a results file without `schema`, in the form of schema 1."""
    kinds = [kind for kind in KINDS_BY_KEYS if content.keys() >= set(KINDS[kind])]
    if not kinds:
        raise SystemExit(f"a results file has the keys of one of the kinds {list(KINDS)}, got {list(content)}")
    kind = kinds[0]
    result = with_schema(kind, content)
    if kind == "seeds":
        sweep = {"task": TASKS[content["sweep"]["script"]], "curves": [], "suffix": "", **content["sweep"]}
        del sweep["script"]
        for name in ("overrides", "once"):
            sweep[name] = [renamed(override) for override in sweep[name]]
        sweep["variants"] = {variant: [renamed(each) for each in overrides] for variant, overrides in sweep["variants"].items()}
        result["sweep"] = sweep
    elif kind == "folds":
        result["variants"] = {variant: [renamed(each) for each in overrides] for variant, overrides in content["variants"].items()}
    return result


def renamed(override: str) -> str:
    """An override of an earlier version, with the name that its field has now."""
    key, separator, value = override.partition("=")
    return f"{OVERRIDES.get(key, key)}{separator}{value}"


if __name__ == "__main__":
    main()
