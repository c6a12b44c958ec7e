"""One process of test_hub, which uses the test server through the real client: `python
hub_worker.py JOB FOLDER`."""

import importlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch


def tiny_models() -> dict[str, tuple[Any, dict[str, torch.Tensor], str]]:
    """For each family: a model, its inputs, and the name of the output that is compared."""
    import modeling_uhop as uhop

    torch.manual_seed(0)
    vit: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    series: dict[str, Any] = {"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 24, "patch_length": 6}
    memory = uhop.UHopMemoryModel(uhop.UHopMemoryConfig(pattern_dim=5, alpha=1.5))
    memory.store(torch.randn(6, 5))
    bags = uhop.UHopMILForBagClassification(uhop.UHopMILConfig(instance_dim=4, hidden_size=16, num_attention_heads=2))
    return {
        "memory": (memory, {"queries": torch.randn(3, 5)}, "retrieved"),
        "vit": (
            uhop.UHopViTForImageClassification(uhop.UHopViTConfig(**vit, id2label={0: "a", 1: "b", 2: "c"}, initializer_range=0.2)),
            {"pixel_values": torch.randn(2, 3, 8, 8)},
            "logits",
        ),
        "mil": (bags, {"instances": torch.randn(2, 5, 4), "attention_mask": torch.ones(2, 5, dtype=torch.long)}, "logits"),
        "stanhop": (
            uhop.STanHopForPrediction(uhop.STanHopConfig(num_input_channels=3, **series)),
            {"past_values": torch.randn(2, 24, 3)},
            "prediction_outputs",
        ),
    }


def push_families(folder: Path) -> None:
    """Push every family with its processor, whole and in shards, and save its outputs to a file."""
    import numpy as np
    from transformers import ViTImageProcessorPil

    import modeling_uhop as uhop

    answers = {}
    for name, (model, inputs, output) in tiny_models().items():
        with torch.no_grad():
            answers[name] = (inputs, output, getattr(model.eval()(**inputs), output))
        model.push_to_hub(f"you/{name}")
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        model.push_to_hub(f"you/{name}-shards", max_shard_size=size // 2)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]).push_to_hub("you/vit")
    extractor = uhop.UHopMILFeatureExtractor().fit([np.arange(20.0).reshape(5, 4) ** 2])
    extractor.push_to_hub("you/mil")
    torch.save(answers, folder / "answers.pt")


def load_families(folder: Path) -> None:
    """Load the pushed models without the package, save, load and push them again, and check that
    all outputs are equal."""
    sys.modules["modeling_uhop"] = None  # type: ignore[assignment]
    import transformers

    classes = {
        "memory": transformers.AutoModel,
        "vit": transformers.AutoModelForImageClassification,
        "mil": transformers.AutoModelForSequenceClassification,
        "stanhop": transformers.AutoModelForTimeSeriesPrediction,
    }

    answers = torch.load(folder / "answers.pt", weights_only=True)

    def check(family: str, source: Any) -> Any:
        inputs, output, expected = answers[family]
        model = classes[family].from_pretrained(source, trust_remote_code=True)
        # Because weights are memory-mapped from their file, and kernels sum unaligned weights in
        # another order, outputs may differ by rounding.
        torch.testing.assert_close(getattr(model(**inputs), output), expected, rtol=5e-6, atol=5e-6, msg=lambda text: f"{source}: {text}")
        return model

    for family in answers:
        check(family, f"you/{family}-shards")
        check(family, f"you/{family}").save_pretrained(folder / family)
        check(family, folder / family).push_to_hub(f"you/{family}-again")
        check(family, f"you/{family}-again")
    processor = transformers.AutoImageProcessor.from_pretrained("you/vit")
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    extractor = transformers.AutoFeatureExtractor.from_pretrained("you/mil", trust_remote_code=True)
    assert extractor.instance_dim == 4
    assert len(extractor.mean) == 4


def train_and_push(folder: Path) -> None:
    """Train with the separation step and a Trainer that pushes during training."""
    from transformers import Trainer, TrainingArguments

    import modeling_uhop as uhop

    model, inputs, _ = tiny_models()["vit"]
    examples = [{"pixel_values": torch.randn(3, 8, 8), "labels": index % 3} for index in range(8)]
    arguments = TrainingArguments(
        str(folder / "trained"),
        max_steps=2,
        per_device_train_batch_size=4,
        push_to_hub=True,
        hub_model_id="you/trained",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = uhop.SeparationCallback(steps=2, batch_size=4)
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[callback])
    trainer.train()
    trainer.push_to_hub()
    expected = model.eval()(**inputs).logits
    loaded = uhop.UHopViTForImageClassification.from_pretrained("you/trained")
    assert torch.equal(loaded(**inputs).logits, expected)


def adapter_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 43).view(4, 10)}


def push_adapter(folder: Path) -> None:
    """Push a BERT, an adapter of it, one that a Trainer pushes, and a merged model; save their logits to a file."""
    from huggingface_hub import HfApi
    from peft import get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    import modeling_uhop as uhop

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertForSequenceClassification(BertConfig(**sizes, vocab_size=50, initializer_range=0.3)).push_to_hub("you/bert")

    def attached() -> Any:
        base = BertForSequenceClassification.from_pretrained("you/bert")
        return get_peft_model(base, uhop.UHopAdapterConfig(alpha=1.5, modules_to_save=["classifier"]))

    model = attached()
    uhop.StageOne(model, parameters="feature_maps", lr=0.5, steps=3).run([adapter_inputs()])
    model.push_to_hub("you/adapter")
    model.save_pretrained(folder / "adapter")
    HfApi().create_repo("you/adapter-folder")
    HfApi().upload_folder(repo_id="you/adapter-folder", folder_path=folder / "adapter")
    examples = [{"input_ids": row, "labels": index % 2} for index, row in enumerate(adapter_inputs()["input_ids"])]
    arguments = TrainingArguments(
        str(folder / "trained-adapter"),
        max_steps=2,
        learning_rate=0.05,
        push_to_hub=True,
        hub_model_id="you/trained-adapter",
        hub_strategy="checkpoint",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = uhop.SeparationCallback(steps=2, parameters="feature_maps")
    trainer = Trainer(attached(), arguments, train_dataset=examples, callbacks=[callback])
    trainer.train()
    trainer.push_to_hub()
    with torch.no_grad():
        models = {"adapter": model, "adapter-folder": model, "trained-adapter": trainer.model}
        answers = {name: each.eval()(**adapter_inputs()).logits for name, each in models.items()}
        merged = model.merge_and_unload()
        answers["merged"] = merged(**adapter_inputs()).logits
    merged.push_to_hub("you/merged")
    torch.save(answers, folder / "answers.pt")


def load_adapter(folder: Path) -> None:
    """Load the pushed adapters by their ids, and the merged model, and check that all logits are equal."""
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import BertForSequenceClassification

    import modeling_uhop  # noqa: F401, without it PEFT does not know the adapter

    answers = torch.load(folder / "answers.pt", weights_only=True)
    for name in ("adapter", "adapter-folder", "trained-adapter"):
        base = BertForSequenceClassification.from_pretrained("you/bert")
        by_id, alone = PeftModel.from_pretrained(base, f"you/{name}"), AutoPeftModelForSequenceClassification.from_pretrained(f"you/{name}")
        for model in (by_id, alone):
            with torch.no_grad():
                assert torch.equal(model.eval()(**adapter_inputs()).logits, answers[name]), name
    merged = BertForSequenceClassification.from_pretrained("you/merged", attn_implementation="hopfield")
    assert merged.config.hopfield_alpha == 1.5
    with torch.no_grad():
        assert torch.equal(merged(**adapter_inputs()).logits, answers["merged"])


def interrupted_upload(folder: Path) -> None:
    """Push while uploads fail; print the error of the client, if there is one."""
    from huggingface_hub import HfApi

    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 2000)
    # The client waits up to eight seconds before it tries again.
    time.sleep = lambda seconds: None
    try:
        HfApi().upload_folder(repo_id="you/interrupted", folder_path=folder, allow_patterns="*.safetensors")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(1)


def conflicting_commits(folder: Path) -> None:
    """Make two simultaneous commits with the same parent."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    api.create_repo("you/conflict")
    parent = api.model_info("you/conflict").sha
    barrier, outcomes = threading.Barrier(2), {}

    def commit(name: str) -> None:
        operation = CommitOperationAdd(f"{name}.txt", name.encode())
        barrier.wait()
        try:
            api.create_commit("you/conflict", [operation], commit_message=name, parent_commit=parent)
            outcomes[name] = "committed"
        except HfHubHTTPError as error:
            outcomes[name] = str(error)

    threads = [threading.Thread(target=commit, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(outcomes))


def load_private(folder: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained("you/secret", trust_remote_code=True)
    print(len(model))


def make_private(folder: Path) -> None:
    model, _, _ = tiny_models()["memory"]
    model.push_to_hub("you/secret", private=True)


def registered_twice(folder: Path) -> None:
    import modeling_uhop

    importlib.reload(modeling_uhop)
    from transformers import AutoConfig, AutoModel

    assert AutoConfig.for_model("uhop_vit").model_type == "uhop_vit"
    assert type(AutoModel.from_config(modeling_uhop.UHopMemoryConfig(pattern_dim=3))).__name__ == "UHopMemoryModel"


def run_guide(folder: Path) -> None:
    """Run the example of the Hub guide that pushes and loads a model, without a change."""
    exec(compile((folder / "example.py").read_text(), "hub.md", "exec"), {})


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]))
