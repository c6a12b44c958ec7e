"""A model with an adapter in two gloo processes, under DDP and sharded by FSDP2, equals one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.attach_worker import CASES, SEPARATIONS, bert, logits, train
from tests.conftest import TOLERANCE, assert_close
from tests.test_distributed import TESTS, run_worker


pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder in which the two processes have written what they found."""
    folder = tmp_path_factory.mktemp("attach")
    run_worker(2, str(TESTS / "attach_worker.py"), str(folder))
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", SEPARATIONS)
def test_two_processes_are_bitwise_equal_and_equal_one_process(folder, tmp_path, name):
    first, second = (torch.load(folder / f"trained_{rank}.pt", weights_only=True)[name] for rank in range(2))
    alone = train(tmp_path, SEPARATIONS[name], 8)
    # A Phi for each of two layers, and the weight and the bias of the classifier.
    assert len(alone["trained"]) == 4
    for parameter, value in alone["trained"].items():
        assert torch.equal(first["trained"][parameter], second["trained"][parameter]), parameter
        assert_close(first["trained"][parameter], value, scale=20)
    for mine, one in zip(first["history"], alone["history"], strict=True):
        assert mine == pytest.approx(one, abs=1e-4)
    loaded = PeftModel.from_pretrained(bert(), folder / name)
    assert torch.equal(logits(loaded), first["logits"])


@pytest.mark.parametrize("case", CASES)
def test_both_stages_of_a_sharded_model_equal_one_whole_model(found, case):
    for result in found:
        assert result[case]["loss"] < TOLERANCE[torch.float32]
        assert result[case]["parameters"] < TOLERANCE[torch.float32]
        assert result[case]["moved"] > 1e-3


def test_the_adapter_of_a_sharded_model_is_saved_and_loaded(found):
    for result in found:
        assert result["saved"]["moved"] > 1e-3
        assert result["saved"]["loaded"] == 0.0


def test_an_adapter_that_is_trained_is_attached_before_the_model_is_sharded(found):
    for result in found:
        assert result["saved"]["inference"] == 0.0
        assert "FSDP2 shards FSDPBertForSequenceClassification already" in result["saved"]["refusal"]
        assert "attach the adapter before the model is sharded" in result["saved"]["refusal"]
