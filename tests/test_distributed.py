"""Tests of several processes: two gloo processes are bitwise equal, and equal to one process with
the same batches."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from conftest import assert_close

from modeling_uhop import UHopViTModel
from modeling_uhop.training.data.series import SeriesData
from modeling_uhop.training.tasks import series as train_stanhop
from modeling_uhop.training.tasks.series import SeriesRecipe


TESTS = Path(__file__).parent
TRAINING = TESTS.parent / "training"


def _run(processes: int, *worker: str) -> str:
    return _started("torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *worker)


def _started(module: str, *arguments: str) -> str:
    paths = (TESTS, TRAINING, TESTS.parent, os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    finished = subprocess.run([sys.executable, "-m", module, *arguments], env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    if finished.returncode != 0:
        pytest.fail(finished.stderr)
    return finished.stdout


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
        _launch(broken, 2, {**options, "killed": 1})
    assert [path.name for path in broken.iterdir()] == ["checkpoint-4"]
    resumed = _launch(broken, 2, {**options, "resume": str(broken / "checkpoint-4")})
    for mine, known in zip(resumed, expected, strict=True):
        assert [name for name, weight in known["weights"].items() if not torch.equal(weight, mine["weights"][name])] == []


def test_a_batch_that_the_processes_do_not_divide_is_refused(tmp_path):
    options = {"separation": {"batch_size": 7}, "batch_size": 4}
    with pytest.raises(pytest.fail.Exception, match="batch_size must be a multiple of the 2 processes, got 7"):
        _launch(tmp_path, 2, options)


def test_a_forecasting_recipe_in_two_processes_equals_one_process(tmp_path):
    content: dict[str, Any] = {
        "name": "small",
        # With 56 validation windows, each process has the same number.
        "data": {"dataset": "synthetic", "split": [200, 61, 60]},
        "model": {"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16, "ff_dropout": 0.0, "attention_dropout": 0.0},
        # Because one process and two would see different batches with shuffling, we switch it off.
        "training": {
            "max_steps": 6,
            "train_sampling_strategy": "sequential",
            "optim": "sgd",
            "learning_rate": 0.05,
            "eval_steps": 3,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "save_steps": 3,
            "per_device_eval_batch_size": 28,
        },
        "baseline_lengths": [],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**content, "training": {**content["training"], "per_device_train_batch_size": 4}}))
    # The command of the documentation, with this recipe.
    launcher, *words = re.search(r"^torchrun .*$", train_stanhop.__doc__, re.MULTILINE)[0].split()
    assert words[4].startswith("configs/")
    assert words[5:7] == ["--dataset", "WTH.csv"]
    assert distribution("torch").entry_points[launcher].value == "torch.distributed.run:main"
    words[4:7] = [str(tmp_path / "small.yaml"), "--output_dir", str(tmp_path / "two")]
    printed = _started("torch.distributed.run", *words)
    assert printed.count("small: ") == printed.count("answers agree") == 1
    recipe = SeriesRecipe(**{**content, "data": SeriesData(**content["data"])})
    recipe.training.update(per_device_train_batch_size=8, use_cpu=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_uhop.training.tasks.series.check_reload", lambda *args: None)
        one = train_stanhop.run(recipe, tmp_path / "one")
    two = json.loads((tmp_path / "two" / "results.json").read_text())["metrics"]
    for name in ("test_mse", "test_mae", "validation_mse", "validation_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_a_script_for_one_process_does_not_change_an_earlier_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("precious")
    recipe = str(TESTS.parent / "configs" / "mil_digits.yaml")
    with pytest.raises(pytest.fail.Exception) as failed:
        _run(2, str(TRAINING / "modeling_uhop.training.tasks.bags.py"), recipe, "--output_dir", str(tmp_path), "--overwrite")
    assert "this script runs in one process, but was started in 2; start it with `python`" in str(failed.value)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("recipe.yaml", "precious")]


@pytest.mark.parametrize(
    ("script", "arguments", "remedy"),
    [
        ("train_mil", ["configs/mil_digits.yaml"], "not with `accelerate launch`"),
        ("compare_mil", ["configs/sweeps/mil.yaml"], "not with `accelerate launch`"),
        ("run_retrieval", ["configs/retrieval/memory_size_digits.yaml"], "not with `accelerate launch`"),
        ("run_geometry", ["configs/geometry/basins.yaml"], "not with `accelerate launch`"),
        ("push", ["runs/none", "me/model"], "not with `accelerate launch`"),
        ("sweep", ["configs/sweeps/vit_digits.yaml"], "set --jobs"),
    ],
)
def test_scripts_for_one_process_refuse_several_processes(script, arguments, remedy, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr("modeling_uhop.training.tasks.bags.prepare_for_many_runs", lambda: None)
    monkeypatch.setattr("modeling_uhop.training.compare_mil.prepare_for_many_runs", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, str(TESTS.parent / arguments[0]), *arguments[1:]])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=rf"RecipeError: this script runs in one process, but was started in 2; .*{remedy}"):
        module.main()
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
