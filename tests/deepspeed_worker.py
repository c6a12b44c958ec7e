"""One process of test_deepspeed: compare a model that DeepSpeed's ZeRO manages with a whole model.

The whole model sees the batches of all processes. It computes as in a single process, because we
hide the process group from it.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import deepspeed.ops
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from modeling_uhop import Separation, SeparationCallback, StageOne, UHopViTForImageClassification
from modeling_uhop.distributed import averaged, whole
from modeling_uhop.zero import has_master, master
from tests.sharding_worker import Setting, images
from tests.support.training import Images, image_model, image_trainer
from tests.support.workers import run_worker
from tests.test_deepspeed import CASES, SEPARATION, TRAINING, ZERO


def configuration(zero: int, **fields) -> dict[str, Any]:
    return {"zero_optimization": {"stage": zero, **fields}, "zero_allow_untested_optimizer": True}


def managed(model: nn.Module, zero: int, **fields) -> Any:
    """An engine that trains a copy of a model by SGD."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.05)
    # Because ZeRO-3 keeps small parameters whole, we set its threshold to 0.
    config = {**configuration(zero, stage3_param_persistence_threshold=0), "train_micro_batch_size_per_gpu": 4, **fields}
    return deepspeed.initialize(model=model, optimizer=optimizer, config={**config, "gradient_clipping": 0.0})[0]


def whole_step(stage: StageOne, batch: Any, corrupted: Any = None) -> torch.Tensor:
    with mock.patch.object(torch.distributed, "is_initialized", return_value=False):
        return stage.step(batch, corrupted)


def differences(model: nn.Module, expected: nn.Module) -> dict[str, float]:
    """How far apart the parameters of two models are, and their masters."""
    named = dict(expected.named_parameters())
    pairs = [(parameter, named[name]) for name, parameter in model.named_parameters()]
    return {
        "parameters": max((whole(mine) - other).abs().max().item() for mine, other in pairs),
        "masters": max((master(mine) - other).abs().max().item() for mine, other in pairs if has_master(mine)),
    }


def compare(zero: int, setting: Setting, separation: dict[str, Any]) -> dict[str, float]:
    """Take three steps of each stage with both models, and return how far apart they are."""
    expected, before = setting.model.eval(), copy.deepcopy(setting.model)
    engine = managed(expected, zero)
    mine, all_examples = setting.batches(setting.examples)
    stages = [StageOne(each, Separation(**{"lr": 0.05, **separation})) for each in (engine.module, expected)]
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    found = []
    for _ in range(3):
        copies: list[Any] = [None, None]
        if separation.get("kind") == "denoising":
            torch.manual_seed(1)
            noisy = [{**each, "instances": each["instances"] + 0.3 * torch.randn_like(each["instances"])} for each in setting.examples]
            copies = setting.batches(noisy)
        loss, whole_loss = averaged(stages[0].step(mine, copies[0])), whole_step(stages[1], all_examples, copies[1])
        assert all(parameter.grad is None for parameter in engine.module.parameters())
        found.append({"loss": (loss - whole_loss).abs().max().item(), **differences(engine.module, expected)})
        engine.backward(engine(**mine).loss)
        engine.step()
        expected(**all_examples).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(differences(engine.module, expected))
    for stage in stages:
        stage.finish_round()
    found.append(differences(engine.module, expected))
    saved = stages[0].state_dict()
    expected.load_state_dict({name: whole(parameter) for name, parameter in engine.module.named_parameters()})
    for resumed in (StageOne(engine.module, stages[0].separation), StageOne(expected, stages[0].separation)):
        resumed.load_state_dict(saved)
        torch.testing.assert_close(resumed.optimizer.state_dict(), saved["optimizer"], rtol=0, atol=0)
    largest = {name: max(each.get(name, 0.0) for each in found) for name in ("loss", "parameters", "masters")}
    return {**largest, "moved": differences(engine.module, before)["parameters"]}


def compare_in_half_precision(zero: int) -> dict[str, float]:
    """Take steps with an engine in bf16, and with a bf16 model in each process, as in DDP."""
    setting = images()
    expected = setting.model.eval().bfloat16()
    engine = managed(expected, zero, bf16={"enabled": True})
    mine, _ = setting.batches(setting.examples)
    stages = [StageOne(each, lr=0.01, optimizer="adam") for each in (engine.module, expected)]
    for stage in stages:
        for _ in range(3):
            stage.step(mine)
    found = differences(engine.module, expected)
    wides = zip(stages[0].parameters, stages[1].optimizer.wide, strict=True)
    masters = max((master(mine) - wide).abs().max().item() for mine, wide in wides)
    engine.backward(engine(**{**mine, "pixel_values": mine["pixel_values"].bfloat16()}).loss)
    engine.step()
    pairs = [(whole(parameter), master(parameter).bfloat16()) for parameter in engine.module.parameters() if has_master(parameter)]
    return {
        "parameters": found["parameters"],
        "masters": masters,
        "after training": max((mine - other).abs().max().item() for mine, other in pairs),
        "moved": differences(engine.module, expected)["parameters"],
    }


def train(folder: Path, zero: int) -> dict[str, Any]:
    """Train with the stock Trainer, and again from the checkpoint in the middle."""
    found: dict[str, Any] = {}
    for name in ("trained", "resumed"):
        AcceleratorState._reset_state(reset_partial_state=True)
        # Because accelerate starts a single process where there is no GPU, we name the backend.
        PartialState(backend="gloo")
        model = UHopViTForImageClassification.from_pretrained(folder / "model")
        callback = SeparationCallback(**SEPARATION)
        automatic = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
        config = {**configuration(zero, stage3_gather_16bit_weights_on_model_save=True), **automatic}
        own: dict[str, Any] = {
            "accelerator_config": {"use_configured_state": True},
            "per_device_train_batch_size": 4,
            "use_cpu": False,
            "deepspeed": config,
            "save_strategy": "steps",
            "save_steps": 3,
        }
        trainer: Any = image_trainer(folder / f"trained_{zero}", callback, model=model, dataset=Images(augment=False), **TRAINING, **own)
        trainer.train(resume_from_checkpoint=str(folder / f"trained_{zero}" / "checkpoint-3") if name == "resumed" else None)
        weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
        found[name] = {"weights": weights, "history": callback.history, "logged": trainer.state.log_history}
    return found


def refusal() -> str:
    """What StageOne says to a model that is partitioned before its engine exists."""
    model = image_model()
    deepspeed.zero.Init(module=model)
    try:
        StageOne(model)
    except NotImplementedError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    # Because DeepSpeed would compile an operator for several minutes, we switch it off.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    folder, rank = Path(sys.argv[1]), torch.distributed.get_rank()
    result: dict[str, Any] = {"refusal": refusal()}
    for zero in ZERO:
        torch.save(train(folder, zero), folder / f"trained_{zero}_{rank}.pt")
        for name, (build, separation) in CASES.items():
            torch.manual_seed(0)
            result[f"{zero}, {name}"] = compare(zero, build(), separation)
        result[f"{zero}, bf16"] = compare_in_half_precision(zero)
    (folder / f"rank_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run_worker(main)
