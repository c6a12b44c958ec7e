"""Make the golden files of this folder, from which the tests of compatibility load.

This script was run with the code of version 0.1 (`python tests/golden/make.py`, on one CPU thread).
It is kept to show how the files were made. Running it with later code would replace what version
0.1 wrote, and the tests would then compare the later code with itself.

- `configs.json`: the `config.json` of each variant of each family.
- `keys.json`: the keys and shapes of the state dict of each variant, for its base and head models,
  as a tree: the key `a.b` with shape (2, 3) is `{"a": {"b": [2, 3]}}`.
- `outputs.json`: a few outputs of these models, with the weights of `fill` and the inputs of
  `inputs_of`.
- `memory`, `vit`, `mil`, `stanhop`: a folder that `save_pretrained` wrote, without its copy of the
  code. `example.safetensors` holds inputs, and outputs by auto class.
- `step`, `train_begin`: step 2 of a Trainer run with `SeparationCallback`, and what the
  uninterrupted run reached at step 4: its weights and its separation losses.

Weights and inputs come from a formula and not from a generator, so they are the same on every
machine and with every version of PyTorch.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedModel, Trainer, TrainingArguments

import modeling_uhop as package
from modeling_uhop import SeparationCallback, UHopMILFeatureExtractor, UHopViTConfig, UHopViTForImageClassification


FOLDER = Path(__file__).parent
BACKBONE = {
    "model_type": "resnet",
    "num_channels": 2,
    "embedding_size": 4,
    "hidden_sizes": [4, 6],
    "depths": [1, 1],
    "layer_type": "basic",
    "out_features": ["stage2"],
}
# For each family: its model classes by auto class, and the fields of a small model.
FAMILIES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "memory": ("UHopMemoryConfig", {"AutoModel": "UHopMemoryModel"}, {"pattern_dim": 6, "alpha": 1.5, "beta": 3.0}),
    "vit": (
        "UHopViTConfig",
        {"AutoModel": "UHopViTModel", "AutoModelForImageClassification": "UHopViTForImageClassification"},
        {
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 2,
            "num_labels": 3,
        },
    ),
    "mil": (
        "UHopMILConfig",
        {"AutoModel": "UHopMILModel", "AutoModelForSequenceClassification": "UHopMILForBagClassification"},
        {"instance_dim": 4, "hidden_size": 8, "num_attention_heads": 2, "num_channels": 2, "num_labels": 3},
    ),
    "stanhop": (
        "STanHopConfig",
        {"AutoModel": "STanHopModel", "AutoModelForTimeSeriesPrediction": "STanHopForPrediction"},
        {
            "num_input_channels": 2,
            "context_length": 16,
            "prediction_length": 6,
            "patch_length": 4,
            "num_prototypes": 3,
            "d_model": 8,
            "num_attention_heads": 2,
            "ffn_dim": 12,
            "learnable_alpha": False,
        },
    ),
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "memory": {
        "kernel": {},
        "no phi": {"similarity": "dot"},
        "stored patterns": {"num_memories": 5},
        "wide phi": {"num_memories": 5, "feature_dim": 9, "normalize_features": False, "update_steps": 2},
        "polynomial": {"num_memories": 5, "similarity": "polynomial", "degree": 3, "alpha": 1.0},
    },
    "vit": {
        "transformer": {},
        "class query": {"encoder_type": "class_query", "hidden_act": "relu"},
        "learnable alpha": {"alpha": 1.4, "learnable_alpha": True},
        "distillation token": {"use_distillation_token": True, "alpha": 2.0},
        "no phi": {"use_feature_map": False},
        "folded": {"value_source": "projected_memory", "folded": True},
        "wide phi": {"feature_dim": 11, "alpha": 1.5, "update_steps": 2, "beta": 0.7, "qkv_bias": False},
        "projected values": {"value_source": "projected_memory"},
        "small pooler": {"pooler_output_size": 5, "image_size": [8, 12], "patch_size": [4, 3]},
    },
    "mil": {
        "hopfield": {},
        "learnable alpha": {"alpha": 1.4, "learnable_alpha": True},
        "no phi": {"use_feature_map": False},
        "folded": {"value_source": "projected_memory", "folded": True},
        "queries": {"num_queries": 3, "head_dim": 5, "feature_dim": 7, "alpha": 1.5, "num_embedding_layers": 2},
        "mean": {"pooling": "mean"},
        "max": {"pooling": "max"},
        "image": {"instance_type": "image"},
        "backbone": {"instance_type": "backbone", "backbone_config": BACKBONE},
    },
    "stanhop": {
        "plain": {},
        "linear skip": {"use_linear_skip": True, "scaling": "mean"},
        "memory plug": {"memory_type": "plug", "num_memories": 4},
        "memory tune": {"memory_type": "tune", "num_memories": 4, "memory_alpha": 1.5},
        "learnable alpha": {"learnable_alpha": True},
        "two layers": {"num_hidden_layers": 2, "value_source": "memory", "alpha": 1.0},
        "no phi": {"use_feature_map": False},
        "folded": {"folded": True},
    },
}
# The variant of each family whose folder is kept; it combines the parts that have parameters.
SAVED: dict[str, dict[str, Any]] = {
    "memory": {"num_memories": 5, "feature_dim": 7},
    "vit": {"alpha": 1.4, "learnable_alpha": True, "use_distillation_token": True, "feature_dim": 7, "num_hidden_layers": 2},
    "mil": {"alpha": 1.4, "learnable_alpha": True, "num_queries": 2, "feature_dim": 7, "instance_dim": 3},
    "stanhop": {"learnable_alpha": True, "use_linear_skip": True, "memory_type": "tune", "num_memories": 4},
}
RUNS: dict[str, dict[str, Any]] = {
    "step": {"schedule": "step", "optimizer": "adam", "lr": 0.002},
    "train_begin": {"schedule": "train_begin", "steps": 3, "lr": 0.02},
}


def numbers(*shape: int, offset: float = 0.0) -> torch.Tensor:
    """Numbers in [-1, 1] without a visible pattern: sin(0.7 k^2 + offset)."""
    count = torch.Size(shape).numel()
    return (0.7 * torch.arange(count, dtype=torch.float64).square() + offset).sin().float().reshape(shape)


@torch.no_grad()
def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give a model weights that depend on the names and shapes of its state dict only.

    Scales of norms and running variances lie around 1, all other numbers around 0.
    """
    for index, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if tensor.is_floating_point():
            is_scale = tensor.dim() == 1 and name.endswith(("weight", "running_var"))
            tensor.copy_(float(is_scale) + 0.4 * numbers(*tensor.shape, offset=float(index)))
    return model.eval()


def inputs_of(config: Any) -> dict[str, torch.Tensor]:
    """Inputs of a small model with this configuration."""
    if config.model_type == "uhop_memory":
        return {"queries": numbers(3, config.pattern_dim, offset=0.5)}
    if config.model_type == "uhop_vit":
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        return {"pixel_values": numbers(2, config.num_channels, height, width)}
    if config.model_type == "uhop_mil":
        size = (config.instance_dim,) if config.instance_type == "vector" else (config.num_channels, 12, 12)
        return {"instances": numbers(2, 4, *size), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    past = 3.0 + numbers(2, config.context_length, config.num_input_channels).cumsum(1)
    past[0, :3, 1] = torch.nan
    return {"past_values": past}


@torch.no_grad()
def outputs_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of a model that all its versions give, by name."""
    if model.config.model_type == "uhop_memory" and model.config.num_memories == 0:
        return {}
    names = ("retrieved", "association", "energy", "logits", "prediction_outputs", "last_hidden_state", "instance_weights")
    outputs = model(**inputs)
    return {name: outputs[name].contiguous() for name in names if name in outputs and outputs[name] is not None}


def build(family: str, name: str, fields: dict[str, Any]) -> Any:
    """A model of class `name` with the small fields of its family and these fields."""
    config_name, _, small = FAMILIES[family]
    fields = {**small, **fields}
    folded = fields.pop("folded", False)
    model = getattr(package, name)(getattr(package, config_name)(**fields)).eval()
    return model.fold_feature_maps() if folded else model


def shapes_of(model: torch.nn.Module) -> dict[str, Any]:
    """Keys and shapes of a state dict, sorted by key, as a tree."""
    tree: dict[str, Any] = {}
    for key, tensor in sorted(model.state_dict().items()):
        *path, last = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = list(tensor.shape)
    return tree


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model without the copy of its code."""
    model.save_pretrained(folder)
    for file in folder.glob("*.py"):
        file.unlink()


def make_variants() -> None:
    """Write `configs.json`, `keys.json` and `outputs.json`."""
    configs: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    for family, variants in VARIANTS.items():
        for variant, fields in variants.items():
            label = f"{family}: {variant}"
            keys[label], outputs[label] = {}, {}
            for name in FAMILIES[family][1].values():
                model = build(family, name, fields)
                with tempfile.TemporaryDirectory() as folder:
                    save(model, Path(folder))
                    configs[label] = json.loads((Path(folder) / "config.json").read_text())
                    model = type(model)(AutoConfig.from_pretrained(folder))
                keys[label][name] = shapes_of(model)
                found = outputs_of(fill(model), inputs_of(model.config))
                outputs[label][name] = {each: tensor.flatten()[:12].tolist() for each, tensor in found.items()}
    for file, content in (("configs", configs), ("keys", keys), ("outputs", outputs)):
        lines = ",\n".join(f"{json.dumps(label)}: {json.dumps(value, separators=(',', ':'))}" for label, value in content.items())
        (FOLDER / f"{file}.json").write_text(f"{{\n{lines}\n}}\n")


def make_folders() -> None:
    """Write a saved folder of each family, with inputs and outputs."""
    for family, (_, classes, _) in FAMILIES.items():
        folder = FOLDER / family
        shutil.rmtree(folder, ignore_errors=True)
        model: Any = fill(build(family, list(classes.values())[-1], SAVED[family]))
        if family == "stanhop":
            past = 2.0 + numbers(4, 16, 2, offset=1.0).cumsum(1)
            model.store(past, past[:, -6:] + numbers(4, 6, 2, offset=2.0))
        inputs = inputs_of(model.config)
        if family == "mil":
            extractor = UHopMILFeatureExtractor(num_components=3).fit(bags())
            extractor.save_pretrained(folder)
            inputs = dict(extractor(bags(), return_tensors="pt"))
        save(model, folder)
        example = {f"input.{each}": tensor for each, tensor in inputs.items()}
        for auto, name in classes.items():
            loaded = getattr(package, name).from_pretrained(folder).eval()
            example.update({f"{auto}.{each}": tensor for each, tensor in outputs_of(loaded, inputs).items()})
        save_file(example, folder / "example.safetensors")


def bags() -> list[Any]:
    """The bags that the saved feature extractor was fitted on."""
    return [(3.0 * numbers(count, 5, offset=count)).numpy() for count in (4, 1, 6)]


class Images(torch.utils.data.Dataset):
    """Images of the Trainer runs."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": numbers(1, 8, 8, offset=float(index)), "labels": index % 3}


def trainer_of_run(folder: Path, **options: Any) -> tuple[Trainer, SeparationCallback]:
    """Trainer and callback of a run of four steps, which saves at step 2.

    Because gradients of key biases are rounding errors, which Adam scales up, there are no biases.
    """
    config = UHopViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
        alpha=1.5,
        qkv_bias=False,
    )
    callback = SeparationCallback(batch_size=4, **options)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=0.002,
        warmup_steps=1,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    model = fill(UHopViTForImageClassification(config))
    return Trainer(model=model, args=arguments, train_dataset=Images(), callbacks=[callback]), callback


def make_runs() -> None:
    """Write the checkpoint at step 2 of each run, and what the run reached at step 4."""
    kept = ("config.json", "model.safetensors", "optimizer.pt", "separation.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for run, options in RUNS.items():
        target = FOLDER / run
        shutil.rmtree(target, ignore_errors=True)
        (target / "checkpoint-2").mkdir(parents=True)
        with tempfile.TemporaryDirectory() as folder:
            trainer, callback = trainer_of_run(Path(folder), **options)
            trainer.train()
            for file in kept:
                shutil.copy(Path(folder) / "checkpoint-2" / file, target / "checkpoint-2" / file)
        save_file({name: tensor.contiguous() for name, tensor in trainer.model.state_dict().items()}, target / "final.safetensors")
        (target / "history.json").write_text(json.dumps(callback.history, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_variants()
    make_folders()
    make_runs()
