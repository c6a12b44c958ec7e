"""One process of test_attach_processes: a BERT with an adapter, under DDP and sharded by FSDP2."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from modeling_uhop import Separation, SeparationCallback, StageOne, UHopAdapterConfig
from tests.sharding_worker import ADAM, GLOBAL, MAPS, Setting, compare
from tests.support.workers import run_worker


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 60}
SEPARATIONS: dict[str, dict[str, Any]] = {
    "before training": {"steps": 3, "lr": 0.5, **MAPS},
    "before each step": {"schedule": "step", **MAPS, **ADAM},
}


def bert() -> Any:
    torch.manual_seed(0)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZES, **dropout, initializer_range=0.2)).eval()


def attached(**fields: Any) -> Any:
    """A BERT with an adapter and a trained classifier."""
    return get_peft_model(bert(), UHopAdapterConfig(alpha=1.5, modules_to_save=["classifier"], **fields)).eval()


def texts(count: int = 16) -> list[dict[str, torch.Tensor]]:
    """Examples of different lengths, padded to nine tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 10, (count, 1), generator=generator)
    ids, masks = torch.randint(3, 60, (count, 9), generator=generator), (torch.arange(9) < lengths).long()
    return [
        {"input_ids": row, "attention_mask": mask, "labels": torch.tensor(index % 2)}
        for index, (row, mask) in enumerate(zip(ids * masks, masks, strict=True))
    ]


def train(folder: Path, separation: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Train with the Trainer, save the adapter, and return what is trained, and the separation losses."""
    callback = SeparationCallback(**separation, batch_size=8)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=2,
        # Because one process and two would see different batches with shuffling, we switch it off.
        train_sampling_strategy="sequential",
        # Because Adam would turn rounding errors of small gradients into steps, we use SGD.
        optim="sgd",
        learning_rate=0.1,
        # Because the loss of a classifier is a mean over examples, and the Trainer would multiply it by
        # the number of processes, as it does for a sum over tokens, we switch that off.
        average_tokens_across_devices=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(attached(), arguments, train_dataset=texts(), callbacks=[callback])
    trainer.train()
    trainer.save_model()
    trained = {name: parameter.detach() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    return {"trained": trained, "history": callback.history, "logits": logits(trainer.model)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    batch = {name: torch.stack([each[name] for each in texts()]) for name in ("input_ids", "attention_mask")}
    return model.eval()(**batch).logits


def setting(**fields: Any) -> Setting:
    return Setting(attached(**fields), texts(8))


def shard(model: Any) -> None:
    for layer in model.get_base_model().bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "maps": ({}, {**MAPS, "normalize_rows": True}),
    "maps, adam": ({}, {**MAPS, **ADAM}),
    "low rank": ({"rank": 3}, MAPS),
    "upstream, global": ({}, GLOBAL),
}


def save_and_load(folder: Path) -> dict[str, Any]:
    """Separate and save a sharded model, load the adapter into a whole one, and attach to a sharded one."""
    model = attached()
    shard(model)
    rank, all_texts = torch.distributed.get_rank(), texts(8)
    batch = {name: torch.stack([each[name] for each in all_texts[rank::2]]) for name in all_texts[0]}
    before = logits(model)
    StageOne(model, Separation(**MAPS, lr=0.5)).step(batch)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(folder, state_dict=whole, is_main_process=rank == 0)
    torch.distributed.barrier()
    after, loaded = logits(model), logits(PeftModel.from_pretrained(bert(), folder))
    sharded = bert()
    fully_shard(sharded)
    try:
        get_peft_model(sharded, UHopAdapterConfig())
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    # Without gradients, an adapter may also be attached to a sharded model.
    inference = get_peft_model(sharded, UHopAdapterConfig(alpha=1.5, inference_mode=True))
    expected = get_peft_model(bert(), UHopAdapterConfig(alpha=1.5))
    return {
        "moved": (after - before).abs().max().item(),
        "loaded": (after - loaded).abs().max().item(),
        "inference": (logits(inference) - logits(expected)).abs().max().item(),
        "refusal": refusal,
    }


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), torch.distributed.get_rank()
    trained = {name: train(folder / name, separation, 4) for name, separation in SEPARATIONS.items()}
    torch.save(trained, folder / f"trained_{rank}.pt")
    result: dict[str, Any] = {name: compare(setting, fields, shard, separation) for name, (fields, separation) in CASES.items()}
    result["saved"] = save_and_load(folder / "sharded")
    (folder / f"rank_{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    run_worker(main)
