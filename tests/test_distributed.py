"""Tests of several processes: two gloo processes are bitwise equal, and equal to one process with
the same batches."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from modeling_uhop import UHopViTModel
from modeling_uhop.training import cli, engine, train_command
from tests.conftest import assert_close
from tests.support.forks import run_processes
from tests.support.recipes import NO_DROPOUT, no_figures, no_reload, results_of, tiny, tiny_content, without_times


pytestmark = pytest.mark.process
TESTS = Path(__file__).parent


def run_worker(processes: int, *worker: str, **variables: str) -> str:
    """Run a worker in several processes and return what they print; the test fails with their errors."""
    finished = run_processes(processes, *worker, **variables)
    if any(each.returncode for each in finished):
        pytest.fail("\n".join(f"rank {rank}, exitcode: {each.returncode}\n{each.stderr}" for rank, each in enumerate(finished)))
    return "".join(each.stdout for each in finished)


def _torchrun(*arguments: str) -> str:
    """The same by the launcher itself, in fresh processes."""
    paths = (TESTS.parent, os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    finished = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    if finished.returncode != 0:
        pytest.fail(finished.stderr)
    return finished.stdout


def _worker(folder: Path, options: dict) -> tuple[str, ...]:
    return str(TESTS / "distributed_worker.py"), str(folder), json.dumps(options)


def _launch(folder: Path, processes: int, options: dict) -> list[dict]:
    run_worker(processes, *_worker(folder, options))
    return [torch.load(folder / f"rank_{rank}_of_{processes}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize(
    "separation",
    [
        {"schedule": "train_begin", "steps": 3, "parameters": "upstream"},
        {"schedule": "step", "parameters": "feature_maps", "optimizer": "adam", "lr": 0.01},
    ],
    ids=["upstream", "step"],
)
def test_two_processes_are_bitwise_equal_and_equal_one_process(tmp_path, separation):
    separation = {**separation, "batch_size": 8}
    first, second = _launch(tmp_path, 2, {"separation": separation, "batch_size": 4})
    (alone,) = _launch(tmp_path, 1, {"separation": separation, "batch_size": 8})
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        assert_close(weight, alone["weights"][name], scale=20)
    for mine, one in zip(first["history"], alone["history"], strict=True):
        assert mine == pytest.approx(one, abs=1e-4)
    for process in (first, second, alone):
        assert process["evaluated"]["eval_count"] == 29
        assert process["evaluated"]["eval_accuracy"] == alone["evaluated"]["eval_accuracy"]
        assert process["evaluated"]["eval_cross_entropy"] == pytest.approx(alone["evaluated"]["eval_cross_entropy"], abs=1e-4)
    assert first["logged"][0]["separation_loss"] == pytest.approx(alone["logged"][0]["separation_loss"], abs=1e-4)


def test_a_killed_process_ends_the_others_and_the_run_resumes(tmp_path):
    options = {"separation": {"schedule": "step", "batch_size": 8}, "batch_size": 4}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    expected = _launch(whole, 2, options)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank *: 1.*Signal 9 \(SIGKILL\)"):
        _torchrun("--standalone", "--nproc_per_node", "2", *_worker(broken, {**options, "killed": 1}))
    assert [path.name for path in broken.iterdir()] == ["checkpoint-4"]
    resumed = _launch(broken, 2, {**options, "resume": str(broken / "checkpoint-4")})
    for mine, known in zip(resumed, expected, strict=True):
        assert [name for name, weight in known["weights"].items() if not torch.equal(weight, mine["weights"][name])] == []


def test_a_batch_that_the_processes_do_not_divide_is_refused(tmp_path):
    options = {"separation": {"batch_size": 7}, "batch_size": 4}
    with pytest.raises(pytest.fail.Exception, match="batch_size must be a multiple of the 2 processes, got 7"):
        _launch(tmp_path, 2, options)


# Because one process and two would see different batches with shuffling, we switch it off.
PLAIN = ["training.train_sampling_strategy=sequential", "training.optim=sgd", "training.learning_rate=0.05"]
# Two folds of bags would not have whole batches, and the processes would not have equal ones in an evaluation.
WHOLE = {
    "images": ("training.per_device_eval_batch_size=6",),
    "bags": ("folds=3",),
    "series": (
        "training.max_steps=6",
        *(f"training.{kind}_{setting}" for kind in ("eval", "save") for setting in ("strategy=steps", "steps=3")),
        "training.per_device_eval_batch_size=28",
    ),
}


def _recipe(task: str, processes: int) -> list[str]:
    """Overrides of a tiny recipe whose batches are the same in one process and in two."""
    size = {"images": 16, "bags": 8, "series": 8}[task] // processes
    return [*PLAIN, *NO_DROPOUT[task], *WHOLE[task], f"training.per_device_train_batch_size={size}"]


def _flat(content: Any, name: str = "") -> dict[str, float]:
    """The numbers of nested mappings and lists, by their place."""
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return {place: number for key, value in pairs for place, number in _flat(value, f"{name}/{key}").items()}
    return {name: content}


def _assert_equal_one_process(task: str, two: Path, one: Path, patch) -> None:
    """Compare a run of two processes with the same run in this process."""
    no_figures(patch)
    no_reload(patch)
    engine.run(tiny(task, *_recipe(task, 1)), one)
    first, second = results_of(one), results_of(two)
    assert first["metrics"].keys() == second["metrics"].keys()
    assert _flat(without_times(second["metrics"])) == pytest.approx(_flat(without_times(first["metrics"])), rel=1e-4)
    for mine, known in zip(second.get("outcomes", []), first.get("outcomes", []), strict=True):
        assert mine["bags"] == known["bags"]
        np.testing.assert_allclose(mine["logits"], known["logits"], atol=3e-4)
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, weight in weights.items():
        assert_close(others[name], weight.double(), scale=20)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_the_documented_command_in_two_processes_equals_one_process(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_content("images", *_recipe("images", 2))))
    # The command of the documentation, with this recipe.
    launcher, *words = re.search(r"^torchrun .*$", train_command.__doc__, re.MULTILINE)[0].split()
    assert words[4].startswith("configs/")
    assert distribution("torch").entry_points[launcher].value == "torch.distributed.run:main"
    words[4:5] = [str(tmp_path / "tiny.yaml"), "--output_dir", str(tmp_path / "two")]
    printed = _torchrun(*words)
    assert printed.count("tiny: ") == printed.count("answers agree") == 1
    _assert_equal_one_process("images", tmp_path / "two", tmp_path / "one", monkeypatch)


def test_other_tasks_in_two_processes_equal_one_process(tmp_path, monkeypatch):
    """Bags, whose folds the processes train together, and series; a command for one process changes no earlier run."""
    for task in ("bags", "series"):
        (tmp_path / f"{task}.yaml").write_text(yaml.safe_dump(tiny_content(task, *_recipe(task, 2))))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "recipe.yaml").write_text("precious")
    printed = run_worker(2, str(TESTS / "recipes_worker.py"), str(tmp_path), "bags", "series")
    assert printed.count("tiny: ") == 2
    for task in ("bags", "series"):
        _assert_equal_one_process(task, tmp_path / task, tmp_path / f"{task}_in_one", monkeypatch)
    assert printed.count("RecipeError: this command runs in one process, but was started in 2; start it with `python`") == 2
    assert [(path.name, path.read_text()) for path in (tmp_path / "earlier").iterdir()] == [("recipe.yaml", "precious")]


@pytest.mark.parametrize(
    ("command", "remedy"),
    [
        ("train configs/retrieval/memory_size_digits.yaml", "not with `accelerate launch`"),
        ("train configs/geometry/basins.yaml", "not with `accelerate launch`"),
        ("push runs/none me/model", "not with `accelerate launch`"),
        ("evaluate runs/none", "not with `accelerate launch`"),
        ("sweep configs/sweeps/vit_digits.yaml", "set --jobs"),
        ("sweep configs/sweeps/mil.yaml", "set --jobs"),
    ],
)
def test_commands_for_one_process_refuse_several_processes(command, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [str(TESTS.parent / word) if word.startswith("configs/") else word for word in command.split()]
    with pytest.raises(SystemExit, match=rf"RecipeError: this command runs in one process, but was started in 2; .*{remedy}"):
        cli.main(words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted((TESTS.parent / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    # For any other type, `accelerate launch` starts a single process.
    assert config.distributed_type in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)
    known = {action.dest for action in launch_command_parser()._actions}
    for group in ("fsdp_config", "deepspeed_config"):
        given = getattr(config, group, None) or {}
        assert [key for key in given if key not in known] == []
    layers = (getattr(config, "fsdp_config", None) or {}).get("fsdp_transformer_layer_cls_to_wrap")
    assert layers is None or set(layers.split(",")) <= set(UHopViTModel._no_split_modules)
    header = path.read_text()
    assert "accelerate launch --config_file" in header
    assert re.search(r"\b(Run|Not run)\b", header)
