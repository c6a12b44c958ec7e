"""One process of test_faults: train a recipe of each task, be killed at different moments, resume,
and record the outcome.

Each run is a fork of this process, so that packages are imported only once.
"""

import gc
import json
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from transformers import Trainer, modeling_utils

from modeling_uhop.training import checkpoints, engine
from modeling_uhop.training.errors import errors_in_one_line
from tests.support.recipes import TASKS, no_figures, no_reload, tiny


# Nine steps, with a checkpoint after every second.
OVERRIDES = [
    "training.num_train_epochs=3",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "training.eval_strategy='no'",
    "separation.schedule=step",
    "separation.steps=1",
    "patience=null",
]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(count: int, function: Callable, fault: Callable) -> Callable:
    """The same function, except that `fault` is called before its `count`-th call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            fault(*args)
        return function(*args, **kwargs)

    return wrapped


def half_written(tensors: dict[str, torch.Tensor], path: str, *_: Any) -> None:
    """Write only a part of a model file, then kill the process."""
    content = safetensors.torch.save(tensors)
    Path(path).write_bytes(content[: len(content) // 2])
    kill()


def in_a_step() -> None:
    Trainer.training_step = at_call(6, Trainer.training_step, lambda *_: kill())  # type: ignore[method-assign]


def in_the_model_file() -> None:
    modeling_utils.safe_save_file = at_call(2, modeling_utils.safe_save_file, half_written)


def before_the_optimizer_is_written() -> None:
    method = "_save_optimizer_and_scheduler"
    setattr(Trainer, method, at_call(2, getattr(Trainer, method), lambda *_: kill()))


def before_the_seal() -> None:
    checkpoints.seal = at_call(3, checkpoints.seal, lambda *_: kill())


def after_the_last_step() -> None:
    engine.write_results = at_call(1, engine.write_results, lambda *_: kill())


def in_the_second_fold() -> None:
    """Kill the process after the nine steps of the training and the six of the first fold."""
    Trainer.training_step = at_call(16, Trainer.training_step, lambda *_: kill())  # type: ignore[method-assign]


def on_a_full_disk() -> None:
    """Limit the size of files to that of the model, so that the second checkpoint cannot be
    written."""

    def fill(*_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    Trainer._save_checkpoint = at_call(2, Trainer._save_checkpoint, fill)  # type: ignore[method-assign]


def in_a_process_that_reads() -> None:
    """Kill a worker of the DataLoader after the first checkpoint."""
    fetch = _MapDatasetFetcher.fetch

    def fetched_but_in_workers(fetcher: Any, indices: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            kill()
        return fetch(fetcher, indices)

    checkpoints.seal = at_call(1, checkpoints.seal, lambda *_: setattr(_MapDatasetFetcher, "fetch", fetched_but_in_workers))


MOMENTS = (
    in_a_step,
    in_the_model_file,
    before_the_optimizer_is_written,
    before_the_seal,
    after_the_last_step,
    on_a_full_disk,
    in_a_process_that_reads,
)
CASES = [(task, moment) for task in TASKS for moment in MOMENTS] + [("bags", in_the_second_fold)]


def forked(work: Callable[[], Any], log: Path) -> int:
    """Run a function in a fork with its output in a file; return the exit status (negative for a
    signal)."""
    child = os.fork()
    if child == 0:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            try:
                with errors_in_one_line():
                    work()
            except SystemExit as stop:
                print(stop.code, file=sys.stderr, flush=True)
                os._exit(1)
            except BaseException:
                traceback.print_exc()
                os._exit(2)
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    root = Path(sys.argv[1])
    patch = pytest.MonkeyPatch()
    no_reload(patch)
    no_figures(patch)
    recipes = {task: tiny(task, *OVERRIDES) for task in TASKS}
    # The Trainer collects garbage at each start.
    gc.freeze()
    statuses: dict[str, list[Any]] = {}
    for task, recipe in recipes.items():
        folder = root / f"{task}_whole"
        statuses[folder.name] = [forked(partial(engine.run, recipe, folder), root / f"{folder.name}.log")]
    for task, moment in CASES:
        recipe, folder = recipes[task], root / f"{task}_{moment.__name__}"
        recipe.training["dataloader_num_workers"] = int(moment is in_a_process_that_reads)

        def interrupted(moment: Callable[[], None] = moment, recipe: Any = recipe, folder: Path = folder) -> None:
            moment()
            engine.run(recipe, folder)

        def resumed(recipe: Any = recipe, folder: Path = folder) -> None:
            warnings.simplefilter("always")
            engine.run(recipe, folder, "resume")

        first = forked(interrupted, root / f"{folder.name}.log")
        left = sorted(path.parent.name for path in folder.glob(f"*/{checkpoints.SEAL}"))
        statuses[folder.name] = [first, left, forked(resumed, root / f"{folder.name}_resumed.log")]
    (root / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
