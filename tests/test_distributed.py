"""Two gloo processes: bitwise equal to each other, and equal to one process on the same batches."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import TOLERANCE, assert_close

from modeling_uhop import UHopViTModel


TESTS = Path(__file__).parent


def _run(processes: int, *worker: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent / "training")))}
    finished = subprocess.run([sys.executable, *launcher, *worker], env=environment, capture_output=True, text=True)
    if finished.returncode != 0:
        pytest.fail(finished.stderr[-3000:])


def _launch(folder: Path, processes: int, options: dict) -> list[dict]:
    _run(processes, str(TESTS / "distributed_worker.py"), str(folder), json.dumps(options))
    return [torch.load(folder / f"rank_{rank}_of_{processes}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize(
    "separation",
    [
        {"schedule": "train_begin", "steps": 3, "parameters": "upstream"},
        {"schedule": "step", "parameters": "feature_maps", "optimizer": "adam", "lr": 0.01},
    ],
    ids=["upstream", "step"],
)
def test_two_processes_equal_each_other_and_one(tmp_path, separation):
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


def test_a_rank_that_dies_ends_the_others_and_the_run_resumes(tmp_path):
    options = {"separation": {"schedule": "step", "batch_size": 8}, "batch_size": 4}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    expected = _launch(whole, 2, options)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank *: 1.*Signal 9 \(SIGKILL\)"):
        _launch(broken, 2, {**options, "killed": 1})
    assert [path.name for path in broken.iterdir()] == ["checkpoint-4"]
    resumed = _launch(broken, 2, {**options, "resume": str(broken / "checkpoint-4")})
    for mine, known in zip(resumed, expected, strict=True):
        assert [name for name, weight in known["weights"].items() if not torch.equal(weight, mine["weights"][name])] == []


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    options = {"separation": {"batch_size": 7}, "batch_size": 4}
    with pytest.raises(pytest.fail.Exception, match="batch_size must be a multiple of the 2 processes, got 7"):
        _launch(tmp_path, 2, options)


def test_a_model_sharded_by_fsdp2_is_the_whole_one(tmp_path):
    _run(2, str(TESTS / "sharding_worker.py"), str(tmp_path))
    for rank in range(2):
        result = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert result["loss"] < TOLERANCE[torch.float32]
        assert result["gradient"] < TOLERANCE[torch.float32]
        assert result["count"] > 20


@pytest.mark.parametrize("path", sorted((TESTS.parent / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_ones_that_accelerate_knows(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    known = {action.dest for action in launch_command_parser()._actions}
    for group in ("fsdp_config", "deepspeed_config"):
        given = getattr(config, group, None) or {}
        assert [key for key in given if key not in known] == []
    layers = (getattr(config, "fsdp_config", None) or {}).get("fsdp_transformer_layer_cls_to_wrap")
    assert layers is None or set(layers.split(",")) <= set(UHopViTModel._no_split_modules)
    header = path.read_text()
    assert "accelerate launch --config_file" in header
    assert re.search(r"\b(Run|Not run)\b", header)
