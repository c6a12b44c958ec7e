"""Run recipes with several seeds and variants, and collect the results of each recipe in one file.

The figures of the first run are copied next to that file. A finished run is not repeated if its
command and its recipe are the same. A run that was stopped is resumed.

modeling-uhop sweep configs/sweeps/vit_digits.yaml
modeling-uhop sweep configs/sweeps/stanhop.yaml --data_dir path/to/folder --jobs 2
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from transformers.utils import logging

from .baselines.bags import BASELINES
from .data.source import local_dataset
from .errors import RecipeError
from .folds import summarize
from .intervals import Interval, paired_over_folds, paired_over_seeds, spread
from .processes import refuse_several_processes
from .recipe_file import check_keys, read_yaml
from .recipes import find_recipe
from .report.tables import results_table
from .results import read_result, write_result
from .run_folder import can_resume
from .stale import same_code


REQUIRED = ("recipes", "seeds", "variants")
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
    """One training run of a sweep: its command (without the output folder) and its output
    folder."""

    recipe: str
    variant: str
    seed: int
    command: list[str]
    folder: Path


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="modeling-uhop sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "sweep", help="YAML file, or a name such as sweeps/vit_digits: recipes, seeds, and a list of overrides for each variant"
    )
    parser.add_argument("--recipes", nargs="+", help="run only these recipes of the sweep")
    parser.add_argument(
        "--data_dir", help="folder that has each recipe's data set as a folder or file of its name, to use instead of the Hub"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of simultaneous runs; the cores are shared equally")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="number of cores for all runs together (default: all)")
    parser.add_argument("--runs", default="runs/sweeps", help="folder for the single runs")
    parser.add_argument("--results", default="benchmarks/results", help="folder for the collected results")
    args = parser.parse_args(arguments)
    refuse_several_processes("start it without a launcher, and set --jobs for several runs at once")
    if not 1 <= args.jobs <= args.cores:
        raise RecipeError(f"--jobs must be between 1 and the number of cores ({args.cores}), got {args.jobs}")
    path = find_recipe(args.sweep)
    sweep = read_sweep(path)
    chosen = args.recipes or sweep["recipes"]
    for recipe in chosen:
        if recipe not in sweep["recipes"]:
            raise RecipeError(f"recipes must be among {sweep['recipes']}, got {recipe!r}")
    runs = [run for recipe in chosen for run in runs_of(sweep, recipe, Path(args.runs) / path.stem, args.data_dir)]
    with lock_folder(Path(args.runs) / path.stem):
        execute(runs, args.jobs, args.cores)
    for recipe in chosen:
        own = [run for run in runs if run.recipe == recipe]
        kind, gathered = gather(sweep, own)
        target = Path(args.results) / f"{Path(recipe).stem}{sweep['suffix']}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_result(target, kind, gathered)
        for figure in sweep["figures"]:
            shutil.copyfile(own[0].folder / f"{figure}.png", target.with_name(f"{target.stem}_{figure}.png"))
        print(results_table([read_result(target)]), f"\n{target}")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder for one sweep; a `RecipeError` if another sweep has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise RecipeError(f"another sweep is running in {folder}; wait for it, or choose another --runs") from error


def read_sweep(path: Path) -> dict[str, Any]:
    """Read a sweep; optional keys that it does not set get their defaults.

    Raises:
        RecipeError: For an unknown or missing key, a pair with an unknown variant, or variants that
            would share a folder.
    """
    sweep = read_yaml(path)
    check_keys("sweep", sweep, [*REQUIRED, *OPTIONAL])
    sweep = {**OPTIONAL, **sweep}
    for name in REQUIRED:
        if not sweep.get(name):
            raise RecipeError(f"a sweep needs {name}, but {path} has none")
    if len({_folder_name(variant) for variant in sweep["variants"]}) < len(sweep["variants"]):
        raise RecipeError(f"variants must differ in more than spaces, got {list(sweep['variants'])}")
    for pair in sweep["pairs"]:
        for variant in pair:
            if variant not in sweep["variants"] and variant not in BASELINES:
                raise RecipeError(f"pairs must consist of variants, {list(sweep['variants'])}, or baselines of bags, got {variant!r}")
    return sweep


def runs_of(sweep: dict[str, Any], recipe: str, folder: Path, data_dir: str | None) -> list[Run]:
    """Every run of a recipe, with the overrides of the sweep and of its variant.

    The overrides in `once` are applied to the first run only.
    """
    path = find_recipe(recipe)
    dataset = None if data_dir is None else local_dataset(read_yaml(path)["data"]["dataset"], Path(data_dir))
    runs: list[Run] = []
    for variant, overrides in sweep["variants"].items():
        for seed in sweep["seeds"]:
            command = [sys.executable, str(Path(__file__).with_name("train.py")), str(path), "--seed", str(seed)]
            command += [] if dataset is None else ["--data", dataset]
            for override in [*sweep["overrides"], *overrides, *(sweep["once"] if not runs else [])]:
                command += ["--set", override]
            runs.append(Run(recipe, variant, seed, command, folder / path.stem / _folder_name(variant) / f"seed_{seed}"))
    return runs


def _folder_name(variant: str) -> str:
    return variant.replace(" ", "_")


def execute(runs: list[Run], jobs: int, cores: int) -> None:
    """Run every run that is not finished, each in its own process, with a log file next to its
    folder.

    Raises:
        RecipeError: After the last run, if any run failed; the message names the log files.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // jobs))}

    def run_one(run: Run) -> Path | None:
        log, begun, done = (run.folder.with_suffix(suffix) for suffix in (".log", ".begun", ".done"))
        request = f"{shlex.join(run.command[1:])}\n{Path(run.command[2]).read_text()}"
        if done.is_file() and done.read_text() == request:
            return None
        done.unlink(missing_ok=True)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        existing = ["--overwrite"] if run.folder.exists() else []
        if begun.is_file() and begun.read_text() == request and can_resume(run.folder):
            existing = ["--resume"]
        begun.write_text(request)
        with log.open("w") as stream:
            command = [*run.command, "--output_dir", str(run.folder), *existing]
            finished = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        if finished.returncode != 0:
            return log
        done.write_text(request)
        return None

    with ThreadPoolExecutor(jobs) as pool:
        failed = [str(log) for log in logging.tqdm(pool.map(run_one, runs), total=len(runs), desc="runs") if log is not None]
    if failed:
        raise RecipeError(f"{len(failed)} of {len(runs)} runs failed; see {', '.join(failed)}")


def gather(sweep: dict[str, Any], runs: list[Run]) -> tuple[str, dict[str, Any]]:
    """Collect the results of the runs of one recipe: the kind of results file, and its content.

    The kind is "folds" for cross-validated recipes, otherwise "seeds".
    """
    results = [read_result(run.folder / "results.json", "run") for run in runs]
    first = results[0]
    by_variant = {name: [each for run, each in zip(runs, results, strict=True) if run.variant == name] for name in sweep["variants"]}
    shared = {
        "recipe": first["recipe"],
        "published": sweep["published"].get(runs[0].recipe, {}),
        **{key: first[key] for key in ("versions", "machine")},
        "code": same_code([result.get("code", {}) for result in results]),
        "commit": ", ".join(sorted({result["commit"] for result in results if result["commit"]})) or None,
    }
    if "outcomes" in first:
        return "folds", {**gather_folds(sweep, by_variant), **shared}
    return "seeds", {"sweep": sweep, **gather_seeds(sweep, by_variant), **shared}


def gather_seeds(sweep: dict[str, Any], by_variant: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """For every variant and metric the values by seed, their mean and their standard deviation;
    paired differences between variants; the baselines of the first run."""
    variants: dict[str, Any] = {}
    for variant, own in by_variant.items():
        numbers = [key for key, value in own[0]["metrics"].items() if isinstance(value, float) and all(key in r["metrics"] for r in own)]
        variants[variant] = {
            "num_parameters": own[0]["num_parameters"],
            "metrics": {key: spread([result["metrics"][key] for result in own]) for key in numbers},
            **({"curves": {key: curve(own, key) for key in sweep["curves"]}} if sweep["curves"] else {}),
        }

    def values(variant: str, metric: str) -> list[float]:
        return variants[variant]["metrics"][metric]["values"]

    paired = [
        {"first": first, "second": second, "metric": metric, **difference(paired_over_seeds(values(first, metric), values(second, metric)))}
        for first, second in sweep["pairs"]
        for metric in sweep["metrics"]
    ]
    (first_run, *_), *_ = by_variant.values()
    return {"variants": variants, "paired": paired, "baselines": first_run["metrics"].get("baselines", {})}


def gather_folds(sweep: dict[str, Any], by_variant: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """For every variant and baseline the metrics over folds and repeats, and paired differences on
    the same folds.

    Raises:
        RecipeError: If a variant changes the folds.
    """
    (plain, *_), *_ = by_variant.values()
    metric, repeats = plain["recipe"]["metrics"][0], plain["recipe"]["repeats"]
    outcomes = {variant: result["outcomes"] for variant, (result, *_) in by_variant.items()} | plain["baselines"]
    for job, own in outcomes.items():
        if [outcome["bags"] for outcome in own] != [outcome["bags"] for outcome in next(iter(outcomes.values()))]:
            raise RecipeError(f"variant {job!r} must not change folds, repeats, seed, evaluation or data set: use the sweep's `overrides`")
    seconds = {variant: result["metrics"]["cross_validation_seconds"] for variant, (result, *_) in by_variant.items()}
    sizes = [[len(outcome["bags"]) for outcome in plain["outcomes"]], [outcome["trained_on"] for outcome in plain["outcomes"]]]

    def scores(job: str) -> list[float]:
        return [outcome[metric] for outcome in outcomes[job]]

    results = {
        job: {
            **summarize(own),
            f"{metric}_by_fold": [[outcome[metric] for outcome in own if outcome["repeat"] == repeat] for repeat in range(repeats)],
            **({"seconds": seconds[job]} if job in seconds else {}),
        }
        for job, own in outcomes.items()
    }
    paired = [
        {"first": first, "second": second, **difference(paired_over_folds(scores(first), scores(second), *sizes))}
        for first, second in sweep["pairs"]
    ]
    parameters = {variant: result["num_parameters"] for variant, (result, *_) in by_variant.items()}
    return {"results": results, "parameters": parameters, "paired": paired, "variants": sweep["variants"]}


def curve(results: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """A training curve: the epochs at which the Trainer logged a key, and a list of its values for
    each run."""
    logged = [[entry for entry in result["log_history"] if key in entry] for result in results]
    return {"epoch": [entry["epoch"] for entry in logged[0]], "values": [[round(entry[key], 5) for entry in entries] for entries in logged]}


def difference(interval: Interval) -> dict[str, Any]:
    """The mean difference of a pair, as results files have it."""
    return {"difference": interval.mean, "half_width": interval.half_width}
