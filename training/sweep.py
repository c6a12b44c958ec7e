"""Run a recipe for several seeds and variants, and gather the results in one file, with the picture of the first run beside it.

Finished runs are kept, so a sweep can be resumed.

python training/sweep.py configs/sweeps/vit_digits.yaml
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging


ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="YAML file in configs/sweeps/: recipe, seeds, and a list of overrides for each variant")
    parser.add_argument("--dataset", help="Hub id or local folder to use instead of the recipe's")
    parser.add_argument("--runs", default="runs/sweeps", help="folder of the single runs")
    parser.add_argument("--results", default="benchmarks/results", help="folder of the gathered results")
    args = parser.parse_args()
    name = Path(args.sweep).stem
    sweep = yaml.safe_load(Path(args.sweep).read_text())
    jobs = [(variant, seed) for variant in sweep["variants"] for seed in sweep["seeds"]]
    for variant, seed in logging.tqdm(jobs, desc=name):
        run(sweep, variant, seed, run_folder(args.runs, name, variant, seed), args.dataset)
    gathered = gather(sweep, lambda variant, seed: run_folder(args.runs, name, variant, seed))
    target = Path(args.results) / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(gathered, indent=2) + "\n")
    shutil.copyfile(run_folder(args.runs, name, *jobs[0]) / "training.png", target.with_suffix(".png"))
    print(table(gathered["variants"]), f"\n{target}")


def run_folder(runs: str, name: str, variant: str, seed: int) -> Path:
    return Path(runs) / name / variant.replace(" ", "_") / f"seed_{seed}"


def run(sweep: dict[str, Any], variant: str, seed: int, folder: Path, dataset: str | None) -> None:
    """One run in a process of its own, unless its results are there already; its log lies beside its folder."""
    if (folder / "results.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "training" / "train_vit.py"), sweep["recipe"], "--output_dir", str(folder), "--seed", str(seed)]
    command += ["--overwrite"] if folder.exists() else []
    command += ["--dataset", dataset] if dataset else []
    for override in sweep["variants"][variant]:
        command += ["--set", override]
    log = folder.with_suffix(".log")
    with log.open("w") as stream:
        finished = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
    if finished.returncode != 0:
        sys.exit(f"{variant}, seed {seed} failed; see {log}")


def gather(sweep: dict[str, Any], folder_of: Callable[[str, int], Path]) -> dict[str, Any]:
    """Every metric of every variant: its values by seed, their mean and standard deviation."""
    variants: dict[str, Any] = {}
    for variant in sweep["variants"]:
        runs = [json.loads((folder_of(variant, seed) / "results.json").read_text()) for seed in sweep["seeds"]]
        metrics = {key: [run["metrics"][key] for run in runs] for key in runs[0]["metrics"]}
        variants[variant] = {
            "num_parameters": runs[0]["num_parameters"],
            "metrics": {
                key: {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values} for key, values in metrics.items()
            },
        }
    shared = {key: runs[0][key] for key in ("versions", "commit")}
    return {"sweep": sweep, "variants": variants, **shared}


def table(variants: dict[str, Any]) -> str:
    lines = ["| variant | parameters | test accuracy | validation accuracy | seconds |", "| --- | --- | --- | --- | --- |"]
    for variant, result in variants.items():
        cells = [
            f"{result['metrics'][key]['mean']:.4f} ± {result['metrics'][key]['std']:.4f}"
            for key in ("test_accuracy", "validation_accuracy")
        ]
        seconds = f"{result['metrics']['train_seconds']['mean']:.0f}"
        lines.append(f"| {variant} | {result['num_parameters']:,} | {cells[0]} | {cells[1]} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
