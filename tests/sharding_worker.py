"""One process of test_distributed: compare the loss and gradients of a model sharded by FSDP2 with
those of a whole model."""

import copy
import json
import sys
from pathlib import Path
from typing import cast

import torch
from recipe import leave_process_group
from test_callbacks import Images, _model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    model = _model(alpha=1.5, hidden_dropout_prob=0.0)
    whole = copy.deepcopy(model)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    examples = [Images(augment=False)[index] for index in range(8)]
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    mine = {name: column[rank::count] for name, column in batch.items()}
    loss = model(**mine).loss
    loss.backward()
    expected = whole(**mine).loss.item()
    whole(**batch).loss.backward()
    named = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    gradients = [
        (cast(DTensor, p.grad).full_tensor() - named[name]).abs().max().item() for name, p in model.named_parameters() if name in named
    ]
    result = {"loss": abs(loss.item() - expected), "gradient": max(gradients), "count": len(gradients)}
    Path(sys.argv[1], f"rank_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
    leave_process_group()
