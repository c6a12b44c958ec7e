"""Tests of both stages in models that DeepSpeed's ZeRO manages over two gloo processes, against
whole models."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_uhop import SeparationCallback, StageOne, UHopViTForImageClassification
from modeling_uhop.trainer.state import STATE_FILE
from tests.conftest import TOLERANCE, assert_close
from tests.sharding_worker import Setting, bags, images
from tests.support.training import Images, image_model, image_trainer
from tests.test_distributed import TESTS, run_worker


# `make test` installs DeepSpeed into a folder of its own, because the Trainer imports it wherever it
# is installed, which takes seconds.
FOLDER = Path(sys.prefix) / "deepspeed"
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(
        find_spec("deepspeed") is None and not FOLDER.is_dir(), reason="DeepSpeed is not installed: pip install modeling_uhop[deepspeed]"
    ),
]


def partly_frozen() -> Setting:
    setting = images()
    model: Any = setting.model
    model.vit.layers[0].mlp.requires_grad_(False)
    return setting


MAPS = {"parameters": "feature_maps"}
ADAM = {"optimizer": "adam", "lr": 1e-2}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "maps": (images, {**MAPS, "normalize_rows": True}),
    "maps, adam": (images, {**MAPS, **ADAM, "project": True}),
    "upstream, frozen layer": (partly_frozen, {"project": True}),
    "upstream, adam": (images, ADAM),
    "global bags, denoising": (bags, {"pool_memories": "global", "kind": "denoising"}),
}
ZERO = (1, 2, 3)
TRAINING: dict[str, Any] = {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 1}
SEPARATION: dict[str, Any] = {"schedule": "step", "optimizer": "adam", "lr": 0.01, "batch_size": 8, "project": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder in which the two processes have written what they found."""
    folder = tmp_path_factory.mktemp("deepspeed")
    # Because the true gradient of a key bias is 0, and Adam would turn its rounding errors into
    # steps, the model has none.
    image_model(hidden_dropout_prob=0.0, qkv_bias=False).save_pretrained(folder / "model")
    variables = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(FOLDER)}
    run_worker(2, str(TESTS / "deepspeed_worker.py"), str(folder), **variables)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The weights and losses of the Trainer in one process without an engine."""
    callback, model = SeparationCallback(**SEPARATION), UHopViTForImageClassification.from_pretrained(folder / "model")
    image_trainer(tmp_path_factory.mktemp("one"), callback, model=model, dataset=Images(augment=False), **TRAINING).train()
    return dict(model.named_parameters()), callback.history


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zero", ZERO)
def test_both_stages_in_two_processes_equal_one_whole_model(found, zero, case):
    for result in found:
        for name in ("loss", "parameters", "masters"):
            assert result[f"{zero}, {case}"][name] < TOLERANCE[torch.float32]
        assert result[f"{zero}, {case}"]["moved"] > 1e-3


@pytest.mark.parametrize("zero", ZERO)
def test_in_half_precision_the_master_moves_as_the_fp32_copy_of_a_model_without_an_engine(found, zero):
    for result in found:
        assert result[f"{zero}, bf16"]["parameters"] == result[f"{zero}, bf16"]["masters"] == 0.0
        assert result[f"{zero}, bf16"]["after training"] == 0.0
        assert result[f"{zero}, bf16"]["moved"] > 1e-3


@pytest.mark.parametrize("zero", ZERO)
def test_the_trainer_in_two_processes_equals_one_process_and_a_resumed_run(folder, one_process, zero):
    first, second = (torch.load(folder / f"trained_{zero}_{rank}.pt", weights_only=True) for rank in range(2))
    weights, history = one_process
    for name, weight in weights.items():
        trained = first["trained"]["weights"][name]
        assert_close(weight, trained, scale=20)
        for other in (second["trained"], first["resumed"], second["resumed"]):
            assert torch.equal(trained, other["weights"][name]), name
    assert len(history) > 1
    assert first["resumed"]["history"] == first["trained"]["history"]
    for mine, one in zip(first["trained"]["history"], history, strict=True):
        assert mine == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("zero", ZERO)
def test_one_process_loads_the_state_that_an_engine_saved(folder, zero):
    checkpoint = folder / f"trained_{zero}" / "checkpoint-6"
    saved = torch.load(checkpoint / STATE_FILE, weights_only=True)
    model = UHopViTForImageClassification.from_pretrained(checkpoint)
    stage = StageOne(model, **{name: value for name, value in saved["settings"].items() if name != "schedule"})
    stage.load_state_dict(saved)
    assert stage.steps_done == saved["steps_done"] == 6
    for place, parameter in enumerate(stage.parameters):
        if place in saved["optimizer"]["state"]:
            assert stage.optimizer.inner.state[parameter]["exp_avg"].equal(saved["optimizer"]["state"][place]["exp_avg"])


def test_zero_3_without_an_engine_is_refused(found):
    for result in found:
        assert "but deepspeed.zero.Init without deepspeed.initialize shards them" in result["refusal"]
