"""One process of test_distributed: run tiny recipes, and a command that is for one process."""

import sys
from pathlib import Path

import pytest
import torch

from modeling_uhop.training import cli, engine
from modeling_uhop.training.recipe import ROOT, load_recipe
from tests.support.recipes import no_figures, no_reload
from tests.support.workers import run_worker


def main() -> None:
    torch.set_num_threads(1)
    folder, tasks = Path(sys.argv[1]), sys.argv[2:]
    patch = pytest.MonkeyPatch()
    no_figures(patch)
    no_reload(patch)
    for task in tasks:
        engine.run(load_recipe(folder / f"{task}.yaml"), folder / task)
    try:
        cli.main(["train", str(ROOT / "configs" / "geometry" / "basins.yaml"), "--output_dir", str(folder / "earlier")])
    except SystemExit as refused:
        print(refused.code, flush=True)


if __name__ == "__main__":
    run_worker(main)
