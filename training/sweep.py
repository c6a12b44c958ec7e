"""Run recipes for several seeds and variants, and gather the results of each recipe in one file, with pictures of its first run beside it.

Finished runs of the same command and recipe are kept, and one that was stopped goes on where it ended.

python training/sweep.py configs/sweeps/vit_digits.yaml
python training/sweep.py configs/sweeps/stanhop.yaml --data_dir path/to/folder --jobs 2
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Before the others: it says what to install where they are absent.
from recipe import ROOT, RecipeError, check_keys, errors_in_one_line, local_dataset, read_yaml, refuse_several_processes


# isort: split

from filelock import FileLock, Timeout
from scipy.stats import t as student_t
from stages import can_resume
from tables import variants_table
from transformers.utils import logging


REQUIRED = ("script", "recipes", "seeds", "variants")
OPTIONAL: dict[str, Any] = {
    "overrides": [],
    "once": [],
    "metrics": ["test_accuracy", "validation_accuracy"],
    "pairs": [],
    "figures": [],
    "curves": [],
    "suffix": "",
    "published": {},
}


class Run(NamedTuple):
    """One training run of a sweep: its command without the place where it writes, and that place."""

    recipe: str
    variant: str
    seed: int
    command: list[str]
    folder: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="YAML file in configs/sweeps/: script, recipes, seeds, and a list of overrides for each variant")
    parser.add_argument("--recipes", nargs="+", help="only these of its recipes")
    parser.add_argument("--data_dir", help="folder with each recipe's data set as a folder or file of its name, instead of the Hub")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; each gets its share of the cores")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="cores that all runs together may use (default: all)")
    parser.add_argument("--runs", default="runs/sweeps", help="folder of the single runs")
    parser.add_argument("--results", default="benchmarks/results", help="folder of the gathered results")
    args = parser.parse_args()
    with errors_in_one_line():
        refuse_several_processes("start it with `python`, and set --jobs for several runs at once")
        if not 1 <= args.jobs <= args.cores:
            raise RecipeError(f"--jobs must be at least 1 and at most the cores, {args.cores}, got {args.jobs}")
        sweep = read_sweep(Path(args.sweep))
        chosen = args.recipes or sweep["recipes"]
        for recipe in chosen:
            if recipe not in sweep["recipes"]:
                raise RecipeError(f"recipes must be among {sweep['recipes']}, got {recipe!r}")
        runs = [run for recipe in chosen for run in runs_of(sweep, recipe, Path(args.runs) / Path(args.sweep).stem, args.data_dir)]
        with lock_folder(Path(args.runs) / Path(args.sweep).stem):
            execute(runs, args.jobs, args.cores)
        for recipe in chosen:
            own = [run for run in runs if run.recipe == recipe]
            gathered = gather(sweep, recipe, own)
            target = Path(args.results) / f"{recipe}{sweep['suffix']}.json"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(gathered, indent=1) + "\n")
            for figure in sweep["figures"]:
                shutil.copyfile(own[0].folder / f"{figure}.png", target.with_name(f"{target.stem}_{figure}.png"))
            print(variants_table([gathered]), f"\n{target}")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a second sweep out of a folder; a `RecipeError` if this is the second."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise RecipeError(f"another sweep is running in {folder}") from error


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep with every key it may have.

    Raises:
        RecipeError: For a key that no sweep has, or a pair of a variant that there is not, or variants that would share a folder.
    """
    sweep = read_yaml(path)
    check_keys("sweep", sweep, [*REQUIRED, *OPTIONAL])
    sweep = {**OPTIONAL, **sweep}
    for name in REQUIRED:
        if not sweep.get(name):
            raise RecipeError(f"a sweep needs {name}")
    if len({_folder_name(variant) for variant in sweep["variants"]}) < len(sweep["variants"]):
        raise RecipeError(f"variants must differ in more than spaces, got {list(sweep['variants'])}")
    for pair in sweep["pairs"]:
        for variant in pair:
            if variant not in sweep["variants"]:
                raise RecipeError(f"pairs must be of variants, {list(sweep['variants'])}, got {variant!r}")
    return sweep


def runs_of(sweep: dict[str, Any], recipe: str, folder: Path, data_dir: str | None) -> list[Run]:
    """Every run of a recipe, with the overrides of the sweep and of its variant; the first also with those to be applied `once`."""
    path = ROOT / "configs" / f"{recipe}.yaml"
    dataset = None if data_dir is None else local_dataset(read_yaml(path)["data"]["dataset"], Path(data_dir))
    runs: list[Run] = []
    for variant, overrides in sweep["variants"].items():
        for seed in sweep["seeds"]:
            command = [sys.executable, str(ROOT / "training" / f"{sweep['script']}.py"), str(path), "--seed", str(seed)]
            command += [] if dataset is None else ["--dataset", dataset]
            for override in [*sweep["overrides"], *overrides, *(sweep["once"] if not runs else [])]:
                command += ["--set", override]
            runs.append(Run(recipe, variant, seed, command, folder / recipe / _folder_name(variant) / f"seed_{seed}"))
    return runs


def _folder_name(variant: str) -> str:
    return variant.replace(" ", "_")


def execute(runs: list[Run], jobs: int, cores: int) -> None:
    """Run what is not finished, each in a process of its own, with its log beside its folder.

    Raises:
        RecipeError: After the last run, if some failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs))}

    def run_one(run: Run) -> Path | None:
        log, begun, done = (run.folder.with_suffix(suffix) for suffix in (".log", ".begun", ".done"))
        asked = f"{shlex.join(run.command[1:])}\n{Path(run.command[2]).read_text()}"
        if done.is_file() and done.read_text() == asked:
            return None
        done.unlink(missing_ok=True)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        existing = ["--overwrite"] if run.folder.exists() else []
        if begun.is_file() and begun.read_text() == asked and can_resume(run.folder):
            existing = ["--resume"]
        begun.write_text(asked)
        with log.open("w") as stream:
            command = [*run.command, "--output_dir", str(run.folder), *existing]
            finished = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        if finished.returncode != 0:
            return log
        done.write_text(asked)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failed = [str(log) for log in logging.tqdm(pool.map(run_one, runs), total=len(runs), desc="runs") if log is not None]
    if failed:
        raise RecipeError(f"{len(failed)} of {len(runs)} runs failed; see {', '.join(failed)}")


def gather(sweep: dict[str, Any], recipe: str, runs: list[Run]) -> dict[str, Any]:
    """Every number among the metrics of every variant: its values by seed, their mean and standard deviation; and paired differences."""
    results = [json.loads((run.folder / "results.json").read_text()) for run in runs]
    variants: dict[str, Any] = {}
    for variant in sweep["variants"]:
        own = [result for run, result in zip(runs, results, strict=True) if run.variant == variant]
        numbers = [key for key, value in own[0]["metrics"].items() if isinstance(value, float) and all(key in r["metrics"] for r in own)]
        variants[variant] = {
            "num_parameters": own[0]["num_parameters"],
            "metrics": {key: spread([result["metrics"][key] for result in own]) for key in numbers},
            **({"curves": {key: curve(own, key) for key in sweep["curves"]}} if sweep["curves"] else {}),
        }
    return {
        "sweep": sweep,
        "recipe": results[0]["recipe"],
        "variants": variants,
        "paired": [paired(variants, first, second, metric) for first, second in sweep["pairs"] for metric in sweep["metrics"]],
        "baselines": results[0]["metrics"].get("baselines", {}),
        "published": sweep["published"].get(recipe, {}),
        **{key: results[0][key] for key in ("versions", "machine")},
        "commit": ", ".join(sorted({result["commit"] for result in results if result["commit"]})) or None,
    }


def curve(results: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """What the Trainer logged under a key: the epochs, and a list of values for each run."""
    logged = [[entry for entry in result["log_history"] if key in entry] for result in results]
    return {"epoch": [entry["epoch"] for entry in logged[0]], "values": [[round(entry[key], 5) for entry in entries] for entries in logged]}


def spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0, "values": values}


def paired(variants: dict[str, Any], first: str, second: str, metric: str) -> dict[str, Any]:
    """Mean difference at equal seeds, and half the width of its 95 % interval (Student's t); `None` from one seed."""
    values = [variants[variant]["metrics"][metric]["values"] for variant in (first, second)]
    difference = spread([one - other for one, other in zip(*values, strict=True)])
    count = len(difference["values"])
    half_width = float(student_t.ppf(0.975, count - 1)) * difference["std"] / count**0.5 if count > 1 else None
    return {"first": first, "second": second, "metric": metric, "difference": difference["mean"], "half_width": half_width}


if __name__ == "__main__":
    main()
