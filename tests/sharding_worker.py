"""One process of test_sharding: compare a model that FSDP2 shards with a whole model.

The whole model sees the batches of all processes. It computes as in a single process, because we
hide the process group from it.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import TrainerState
from transformers.distributed import DistributedConfig

from modeling_uhop import (
    DataCollatorForBags,
    Separation,
    SeparationCallback,
    StageOne,
    STanHopConfig,
    STanHopForPrediction,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTForImageClassification,
)
from modeling_uhop.distributed import are_finite, averaged, whole
from tests.support.training import Images, image_model, image_trainer
from tests.support.workers import run_worker


class Setting:
    """A model, its examples, and the function that makes a batch of them."""

    def __init__(self, model: nn.Module, examples: list[dict[str, Any]], collate: Callable | None = None):
        self.model, self.examples = model, examples
        self.collate = collate or (lambda chosen: {name: torch.stack([each[name] for each in chosen]) for name in chosen[0]})

    def batches(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batch of this process, and that of all."""
        rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return [self.collate(examples[rank::count]), self.collate(examples)]


def images(**fields) -> Setting:
    # Because the true gradient of a key bias is 0, and Adam would turn its rounding errors into
    # steps, the model has none.
    model = image_model(hidden_dropout_prob=0.0, qkv_bias=False, **fields)
    return Setting(model, [Images(augment=False)[index] for index in range(8)])


def bags(**fields) -> Setting:
    # Each process has another number of instances, and another padding.
    examples = [{"instances": torch.randn(size, 5), "label": size % 2} for size in (3, 1, 5, 2, 4, 6, 1, 2)]
    config = UHopMILConfig(instance_dim=5, hidden_size=8, num_attention_heads=2, **fields)
    return Setting(UHopMILForBagClassification(config), examples, DataCollatorForBags())


def series(**fields) -> Setting:
    sizes: dict[str, Any] = {"num_input_channels": 3, "context_length": 24, "prediction_length": 10, "patch_length": 4, "d_model": 16}
    config = STanHopConfig(**sizes, ffn_dim=16, num_hidden_layers=1, num_prototypes=3, num_attention_heads=2, **fields)
    return Setting(
        STanHopForPrediction(config), [{"past_values": torch.randn(24, 3), "future_values": torch.randn(10, 3)} for _ in range(4)]
    )


def layers(model: Any, **options) -> None:
    """Shard as users do."""
    for layer in model.vit.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def gathered_layers(model: Any) -> None:
    layers(model, reshard_after_forward=False)


def replicas(model: Any) -> None:
    """Shard along one axis of a mesh, and replicate along the other (HSDP)."""
    layers(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")))


def group(model: Any) -> None:
    """Shard each feature map, the layers as one group, and the columns of the remaining matrices."""
    for layer in model.vit.layers:
        fully_shard(layer.attention.feature_map)
    fully_shard(list(model.vit.layers))
    fully_shard(model, shard_placement_fn=lambda parameter: Shard(1) if parameter.dim() == 2 else None)


def without_maps(model: Any) -> None:
    fully_shard(model, ignored_params={layer.attention.feature_map.weight for layer in model.vit.layers})


def whole_copies(model: Any) -> None:
    """No engine: gradients are averaged as in DDP."""


MAPS = {"parameters": "feature_maps"}
ADAM = {"optimizer": "adam", "lr": 1e-2}
GLOBAL = {"pool_memories": "global"}
CASES: dict[str, tuple[Callable, dict[str, Any], Callable, dict[str, Any]]] = {
    "maps": (images, {}, layers, {**MAPS, "normalize_rows": True}),
    "maps, adam, root": (images, {"alpha": 1.5}, fully_shard, {**MAPS, **ADAM, "project": True}),
    "upstream": (images, {"alpha": 1.5}, gathered_layers, {"project": True}),
    "upstream, adam, root": (images, {}, fully_shard, ADAM),
    "denoising, adam": (images, {"alpha": 1.5}, layers, {**ADAM, "kind": "denoising"}),
    "denoising, maps, root": (images, {}, fully_shard, {**MAPS, "kind": "denoising", "normalize_rows": True}),
    "replicas": (images, {}, replicas, {}),
    "group": (images, {}, group, {"project": True}),
    "ignored parameters, adam": (images, {}, without_maps, ADAM),
    "global": (images, {}, layers, {**GLOBAL, "kind": "per_memory"}),
    "global denoising": (images, {}, fully_shard, {**GLOBAL, "kind": "denoising"}),
    "global, ddp": (images, {}, whole_copies, {**GLOBAL, "include_class_token": True}),
    "global bags": (bags, {}, fully_shard, GLOBAL),
    "global bags, maps, ddp": (bags, {}, whole_copies, {**GLOBAL, **MAPS, "kind": "nearest"}),
    "global series, ddp": (series, {}, whole_copies, GLOBAL),
}


def compare(build: Callable, fields: dict[str, Any], shard: Callable, separation: dict[str, Any]) -> dict[str, float]:
    """Take two steps of each stage with both models, and return how far apart they are."""
    torch.manual_seed(0)
    setting = build(**fields)
    expected, before, model = setting.model.eval(), copy.deepcopy(setting.model), copy.deepcopy(setting.model)
    shard(model)
    mine, all_examples = setting.batches(setting.examples)
    corrupted = [None, None]
    if separation.get("kind") == "denoising":
        noisy = [{**each, "pixel_values": each["pixel_values"] + 0.3 * torch.randn(3, 8, 8)} for each in setting.examples]
        corrupted = setting.batches(noisy)
    with torch.no_grad():
        # Because FSDP2 leaves the root gathered after this pass, the step must shard it again.
        model(**mine)
    stages = [StageOne(each, Separation(**{"lr": 0.05, **separation})) for each in (model, expected)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, expected)]
    largest = 0.0
    for _ in range(2):
        model(**mine).loss.backward()
        expected(**all_examples).loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                parameter.grad = averaged(parameter.grad)
        kept = {name: local(parameter.grad).clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        loss = averaged(stages[0].step(mine, corrupted[0]))
        with mock.patch.object(torch.distributed, "is_initialized", return_value=False):
            whole_loss = stages[1].step(all_examples, corrupted[1])
        largest = max(largest, (loss - whole_loss).abs().max().item())
        left = {name: local(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}
        torch.testing.assert_close(left, kept, rtol=0, atol=0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for stage in stages:
        stage.finish_round()
    saved, resumed = stages[0].state_dict(), StageOne(model, stages[0].separation)
    resumed.load_state_dict(saved)
    torch.testing.assert_close(resumed.optimizer.state_dict(), saved["optimizer"], rtol=0, atol=0)
    return {"loss": largest, "parameters": difference(model, expected), "moved": difference(expected, before)}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def difference(model: nn.Module, expected: nn.Module) -> float:
    named = dict(expected.named_parameters())
    return max((whole(parameter) - named[name]).abs().max().item() for name, parameter in model.named_parameters())


def gradients_of_a_forward_pass() -> dict[str, float]:
    """Compare the loss and gradients of training, without Stage I."""
    setting = images(alpha=1.5)
    expected, model = setting.model, copy.deepcopy(setting.model)
    layers(model)
    mine, all_examples = setting.batches(setting.examples)
    loss = model(**mine).loss
    loss.backward()
    whole_loss = expected(**mine).loss.item()
    expected(**all_examples).loss.backward()
    named = {name: parameter.grad for name, parameter in expected.named_parameters() if parameter.grad is not None}
    gradients = [(whole(p.grad) - named[name]).abs().max().item() for name, p in model.named_parameters() if name in named]
    return {"loss": abs(loss.item() - whole_loss), "gradient": max(gradients), "count": len(gradients)}


def train(folder: Path, separation: dict[str, Any]) -> dict[str, Any]:
    """Train with the Trainer and a model that transformers shards, and load the state of Stage I."""
    plan = DistributedConfig(fsdp_size=2, fsdp_plan={"vit.layers.*": "free_full_weight"})
    model: Any = UHopViTForImageClassification.from_pretrained(folder / "model", distributed_config=plan)
    callback = SeparationCallback(**separation)
    trainer = image_trainer(folder, callback, model=model, dataset=Images(augment=False), **TRAINING, per_device_train_batch_size=4)
    trainer.train()
    (checkpoint,) = folder.glob("checkpoint-*")
    state, resumed = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")), SeparationCallback(**separation)
    objects = {"model": model, "train_dataloader": trainer.get_train_dataloader(), "optimizer": trainer.optimizer}
    resumed.on_train_begin(trainer.args, state, trainer.control, **objects)
    torch.testing.assert_close(resumed.stage.optimizer.state_dict(), callback.stage.optimizer.state_dict(), rtol=0, atol=0)
    assert resumed.stage.steps_done == state.global_step
    return {"weights": {name: whole(p) for name, p in model.named_parameters()}, "history": callback.history}


# Because one process and two would see different batches with shuffling, we switch it off.
TRAINING: dict[str, Any] = {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1}
TRAINING |= {"num_train_epochs": 1, "save_strategy": "epoch", "save_only_model": True}


def refusals() -> dict[str, str]:
    """What StageOne says to engines that it does not support."""
    parallel: Any = image_model()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(parallel.vit.layers[0].attention.q_proj, mesh, ColwiseParallel())
    both: Any = image_model()
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(both.vit.layers[0].attention.q_proj, two["tensor"], ColwiseParallel())
    fully_shard(both, mesh=two["data"])
    old = FullyShardedDataParallel(image_model(), device_id=torch.device("cpu"), use_orig_params=True)
    said = {}
    for name, model in {"tensor parallelism": parallel, "FSDP2 and tensor parallelism": both, "FSDP1": old}.items():
        try:
            StageOne(model)
        except NotImplementedError as error:
            said[name] = str(error)
    return said


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), torch.distributed.get_rank()
    trained = train(folder, json.loads(sys.argv[2]))
    torch.save(trained, folder / f"trained_{rank}.pt")
    result: dict[str, Any] = {
        "forward": gradients_of_a_forward_pass(),
        "refusals": refusals(),
        **{name: compare(*case) for name, case in CASES.items()},
    }
    values = (1.0, float("inf") if rank == 1 else 1.0)
    shards = [DTensor.from_local(torch.tensor([value]), init_device_mesh("cpu", (2,)), [Shard(0)]) for value in values]
    result["finite"] = [are_finite(shards[:1]), are_finite(shards)]
    (folder / f"rank_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run_worker(main)
