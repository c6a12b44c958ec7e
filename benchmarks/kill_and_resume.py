"""Kill runs of a recipe at random moments, resume them, and compare the outcome with an undisturbed run.

python benchmarks/kill_and_resume.py configs/mil_digits.yaml --set folds=3 --set training.num_train_epochs=12
python benchmarks/kill_and_resume.py configs/stanhop_synthetic.yaml --kills 20

Each run is killed (SIGKILL) and resumed until it ends. Weights must be equal bit for bit, and metrics
must be equal, except times.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging


ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", help="a recipe that takes a minute or less")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    parser.add_argument("--kills", type=int, default=20, help="smallest number of kills (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (0)")
    args = parser.parse_args()
    command = [sys.executable, str(ROOT / "training" / "train.py"), args.recipe]
    command += [word for override in args.set for word in ("--set", override)]
    moments, kills, runs, unequal = random.Random(args.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as scratch:
        whole, folder = Path(scratch) / "whole", Path(scratch) / "killed"
        started = time.perf_counter()
        if run(command, whole, None) != 0:
            sys.exit(f"the undisturbed run failed; see the lines above, or run {' '.join(command)}")
        longest = time.perf_counter() - started
        with logging.tqdm(total=args.kills, desc="kills") as progress:
            while kills < args.kills:
                runs += 1
                while (status := run(command, folder, moments.uniform(0.0, longest))) is None:
                    kills += 1
                    progress.update()
                if status != 0:
                    sys.exit(f"a resumed run ended with status {status}, after {kills} kills")
                unequal += [f"run {runs}: {name}" for name in differences(whole, folder)]
                shutil.rmtree(folder)
    print(f"{runs} runs were killed {kills} times and resumed; {'all are equal' if not unequal else 'UNEQUAL: ' + ', '.join(unequal)}")
    sys.exit(1 if unequal else 0)


def run(command: list[str], folder: Path, seconds: float | None) -> int | None:
    """Begin a run, or resume it if it has begun; its exit status, or `None` if it was killed after some
    seconds."""
    resume = ["--resume"] if (folder / "recipe.yaml").is_file() else ["--overwrite"] if folder.is_dir() and any(folder.iterdir()) else []
    process = subprocess.Popen(
        [*command, "--output_dir", str(folder), *resume], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def differences(first: Path, second: Path) -> list[str]:
    """Names of the weights and metrics in which two finished runs differ, times excepted."""
    weights = [load_file(folder / "model.safetensors") for folder in (first, second)]
    metrics: list[dict[str, Any]] = [json.loads((folder / "results.json").read_text())["metrics"] for folder in (first, second)]
    unequal = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    return unequal + [name for name, value in metrics[0].items() if "seconds" not in name and metrics[1].get(name) != value]


if __name__ == "__main__":
    main()
