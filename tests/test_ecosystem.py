"""Tests of the models with other tools: ONNX, PEFT, accelerate, datasets, TensorBoard and
pipelines."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, ViTImageProcessor, pipeline
from transformers.integrations import TensorBoardCallback
from transformers.integrations.peft import MIN_PEFT_VERSION

from modeling_uhop import (
    DataCollatorForBags,
    SeparationCallback,
    STanHopConfig,
    STanHopForPrediction,
    UHopMemoryConfig,
    UHopMemoryModel,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTConfig,
    UHopViTForImageClassification,
    maximize_separation,
    separation_loss,
)
from tests.conftest import CHECKPOINTING, assert_close
from tests.support.models import BAGS, COMPACT, IMAGES


FAMILIES = ("vit", "mil", "stanhop")
# PEFT uses an old name of activation checkpointing, which transformers 5.23 has renamed.
OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
# torch.onnx copies a tree spec of torch, which gives a warning.
TREE_SPEC = "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
# The decorators of transformers that collect hidden states change a list while a model runs.
SIDE_EFFECTS = "ignore:While (compiling|exporting), we found certain side effects:UserWarning"


def make_model(family: str, **fields) -> PreTrainedModel:
    """A tiny model of a family: equal at each call, without dropout, and by default with alpha =
    1."""
    torch.manual_seed(11)
    tiny: dict[str, Any]
    if family == "vit":
        return UHopViTForImageClassification(UHopViTConfig(**{**IMAGES, "num_labels": 3, **fields})).eval()
    if family in ("mil", "mil_images"):
        tiny = BAGS | ({"instance_type": "image", "num_channels": 1} if family == "mil_images" else {})
        return UHopMILForBagClassification(UHopMILConfig(**{**tiny, **fields})).eval()
    if family == "stanhop":
        tiny = {"num_input_channels": 3, "context_length": 16, "prediction_length": 8, "patch_length": 4, "num_prototypes": 2}
        tiny |= {"d_model": 16, "ffn_dim": 24, "num_attention_heads": 2, "attention_dropout": 0.0, "ff_dropout": 0.0}
        tiny |= {"alpha": 1.0, "learnable_alpha": False}
        return STanHopForPrediction(STanHopConfig(**{**tiny, **fields})).eval()
    model = UHopMemoryModel(UHopMemoryConfig(**{"pattern_dim": 16, "beta": 4.0, **fields})).eval()
    model.store(torch.randn(5, 16))
    return model


def make_inputs(family: str, batch_size: int = 2, instances: int = 5, seed: int = 5) -> dict[str, torch.Tensor]:
    """Inputs without labels for a model of `make_model`; bags have 0 to `instances` instances, and
    their padding is NaN."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(batch_size, 3, 8, 8, generator=generator)}
    if family in ("mil", "mil_images"):
        sizes = torch.linspace(instances, 0, batch_size).round()
        mask = torch.arange(instances) < sizes[:, None]
        bags = torch.randn(batch_size, instances, *((1, 4, 4) if family == "mil_images" else (6,)), generator=generator)
        bags[~mask] = torch.nan
        return {"instances": bags, "attention_mask": mask.long()}
    if family == "stanhop":
        return {"past_values": torch.randn(batch_size, 16, 3, generator=generator)}
    return {"queries": torch.randn(batch_size, 16, generator=generator)}


def make_labels(family: str, batch_size: int = 2) -> dict[str, torch.Tensor]:
    if family == "stanhop":
        return {"future_values": torch.randn(batch_size, 8, 3, generator=torch.Generator().manual_seed(6))}
    return {"labels": torch.arange(batch_size) % 2}


def answers(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a model output, in its order."""
    return [value for value in outputs.to_tuple() if isinstance(value, torch.Tensor)]


def answer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The main output tensor of a model: logits, forecasts or retrieved patterns."""
    with torch.no_grad():
        outputs = model(**inputs)
    return next(outputs[name] for name in ("logits", "prediction_outputs", "retrieved") if name in outputs)


def assert_same(given: Any, expected: Any) -> None:
    """Assert that outputs are equal within the table of tolerances, integers included."""
    for one, other in zip(answers(given), answers(expected), strict=True):
        assert_close(one, other, dtype=torch.float32)


LOADED: list[tuple[str, dict[str, Any]]] = [*((family, {}) for family in (*FAMILIES, "memory")), ("vit", COMPACT)]
DYNAMIC = torch.export.Dim.DYNAMIC
DYNAMIC_SHAPES = {
    "vit": {"pixel_values": {0: DYNAMIC}},
    "mil": {"instances": {0: DYNAMIC, 1: DYNAMIC}, "attention_mask": {0: DYNAMIC, 1: DYNAMIC}},
    "stanhop": {"past_values": {0: DYNAMIC}},
    "memory": {"queries": {0: DYNAMIC}},
}
DYNAMIC_SHAPES["mil_images"] = DYNAMIC_SHAPES["mil"]
OUTPUT_NAMES = {"vit": ["logits"], "mil": ["logits", "instance_weights"], "stanhop": ["prediction_outputs", "loc", "scale"]}
OUTPUT_NAMES["mil_images"] = OUTPUT_NAMES["mil"]
OUTPUT_NAMES["memory"] = ["retrieved", "association", "energy", "steps"]
# Because the Newton steps for alpha > 1 make large graphs, and a forecaster has many of them, it is
# exported only with alpha = 1. The vision transformer with alpha = 1 is exported in the test of
# folding below.
EXPORTED: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in ("mil", "mil_images", "stanhop", "memory")]
EXPORTED += [
    ("vit", COMPACT),
    ("vit", {"num_hidden_layers": 1, "alpha": 1.5}),
    ("mil", {"alpha": 2.0}),
    ("mil", {"alpha": 1.6, "learnable_alpha": True}),
]
TRACED: list[tuple[str, dict[str, Any]]] = [
    ("vit", {}),
    ("vit", {**COMPACT, "alpha": 1.5}),
    ("mil", {}),
    ("mil", {"pooling": "max"}),
    ("mil", {"alpha": 1.3}),
]
TRACED += [("vit", {"num_hidden_layers": 1, "alpha": 2.0, "encoder_type": "class_query"}), ("stanhop", {"alpha": 1.5})]
TRACED += [("memory", {"alpha": 1.5, "update_steps": 3}), ("memory", {"alpha": 2.0, "similarity": "l2"})]


def _name(case: Any) -> str:
    return case if isinstance(case, str) else "-".join(f"{name}={value}" for name, value in case.items()) or "softmax"


@pytest.mark.trains
@pytest.mark.parametrize(("family", "fields"), EXPORTED, ids=_name)
@pytest.mark.filterwarnings(TREE_SPEC)
def test_onnxruntime_gives_the_outputs_of_the_model_for_batches_and_bags_of_every_size(tmp_path, family, fields):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make_model(family, **fields)
    torch.onnx.export(
        model,
        kwargs=make_inputs(family),
        f=str(tmp_path / "model.onnx"),
        dynamo=True,
        dynamic_shapes=DYNAMIC_SHAPES[family],
        output_names=OUTPUT_NAMES[family],
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == OUTPUT_NAMES[family]
    for batch_size, instances in ((2, 5), (1, 3), (5, 9), (2, 600)):
        inputs = make_inputs(family, batch_size, instances)
        with torch.no_grad():
            expected = model(**inputs)
        given = session.run(OUTPUT_NAMES[family], {name: tensor.numpy() for name, tensor in inputs.items()})
        for name, array in zip(OUTPUT_NAMES[family], given, strict=True):
            torch.testing.assert_close(torch.from_numpy(array), expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.trains
@pytest.mark.parametrize(("family", "fields"), TRACED, ids=_name)
def test_an_exported_program_gives_the_outputs_of_the_model(family, fields):
    model = make_model(family, **fields)
    program = torch.export.export(model, (), make_inputs(family), dynamic_shapes=DYNAMIC_SHAPES[family]).module()
    for batch_size, instances in ((2, 5), (1, 3), (5, 9), (2, 600)):
        inputs = make_inputs(family, batch_size, instances)
        assert_same(program(**inputs), model(**inputs))


@pytest.mark.trains
@pytest.mark.parametrize("family", [*FAMILIES, "memory"])
@pytest.mark.filterwarnings(SIDE_EFFECTS)
def test_a_strictly_exported_program_gives_the_outputs_of_the_model(family):
    model = make_model(family)
    program = torch.export.export(model, (), make_inputs(family), dynamic_shapes=DYNAMIC_SHAPES[family], strict=True).module()
    for batch_size, instances in ((2, 5), (1, 3), (5, 9)):
        inputs = make_inputs(family, batch_size, instances)
        assert_same(program(**inputs), model(**inputs))


@pytest.mark.trains
@pytest.mark.filterwarnings(TREE_SPEC)
def test_a_folded_model_becomes_a_smaller_file_with_the_same_outputs(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    model, options = make_model("vit"), {"dynamo": True, "dynamic_shapes": DYNAMIC_SHAPES["vit"], "external_data": False, "verbose": False}
    sessions, numbers, products = [], [], []
    for name, exported in (("whole", model), ("folded", model.fold_feature_maps())):
        path = str(tmp_path / f"{name}.onnx")
        torch.onnx.export(exported, kwargs=make_inputs("vit"), f=path, output_names=OUTPUT_NAMES["vit"], **options)
        graph = onnx.load(path).graph
        numbers.append(sum(int(np.prod(tensor.dims)) for tensor in graph.initializer))
        products.append(sum(node.op_type in ("MatMul", "Gemm") for node in graph.node))
        sessions.append(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
    # Both layers have lost W (16 x 16) and the products with it.
    assert numbers[0] - numbers[1] == 2 * 16 * 16
    assert products[0] > products[1]
    for session in sessions:
        for batch_size in (2, 1, 5):
            inputs = make_inputs("vit", batch_size)
            (logits,) = session.run(OUTPUT_NAMES["vit"], {name: tensor.numpy() for name, tensor in inputs.items()})
            torch.testing.assert_close(torch.from_numpy(logits), answer(model, inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.trains
def test_a_compiled_forecaster_is_one_graph_with_the_same_outputs():
    model, inputs = make_model("stanhop", alpha=1.5), make_inputs("stanhop")
    assert_same(torch.compile(model, fullgraph=True, backend="eager")(**inputs), model(**inputs))


@pytest.mark.trains
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_compiled_memory_is_one_graph_and_stops_each_query_separately(alpha):
    model = make_model("memory", alpha=alpha, beta=0.3)
    queries = torch.cat([model.memories[:2], torch.randn(4, 16)])
    settings = {"update_steps": 6, "tolerance": 0.01}
    with torch.no_grad():
        expected = model(queries, **settings)
        given = torch.compile(model, fullgraph=True, backend="eager")(queries, **settings)
    assert len(expected.steps.unique()) > 1
    assert expected.steps.max() < 6
    assert_same(given, expected)


@pytest.mark.trains
def test_a_program_traced_from_long_bags_takes_short_ones():
    model = make_model("mil", alpha=1.5)
    program = torch.export.export(model, (), make_inputs("mil", 2, 600), dynamic_shapes=DYNAMIC_SHAPES["mil"]).module()
    for inputs in (make_inputs("mil", 2, 600), make_inputs("mil", 3, 4), make_inputs("mil", 3, 1000)):
        assert_close(answer(program, inputs), answer(model, inputs))


ADAPTERS = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "target_parameters": ["feature_map.weight"]}
HEADS = {"vit": "classifier", "mil": "classifier", "stanhop": "head"}


class Examples(torch.utils.data.Dataset):
    """A data set of examples of a family."""

    def __init__(self, family: str, size: int = 12):
        self.columns = make_inputs(family, size) | make_labels(family, size)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def make_trainer(folder: Path, model: nn.Module, dataset: Any, *callbacks: Any, collator: Any = None, **arguments) -> Trainer:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "save_strategy": "no"}
    brief = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.05, "logging_steps": 1}
    arguments = {**quiet, **brief, **arguments}
    return Trainer(
        model, TrainingArguments(str(folder), **arguments), data_collator=collator, train_dataset=dataset, callbacks=list(callbacks)
    )


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.trains
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings(OLD_NAME)
def test_lora_trains_only_adapters_and_is_saved_loaded_merged_and_folded(tmp_path, family):
    peft = pytest.importorskip("peft")
    fields = {"alpha": 1.5}
    inputs = make_inputs(family)
    model = peft.get_peft_model(make_model(family, **fields), peft.LoraConfig(**ADAPTERS, modules_to_save=[HEADS[family]]))
    before = copy_of(model)
    assert_close(answer(model.eval(), inputs), answer(make_model(family, **fields), inputs))
    make_trainer(tmp_path, model, Examples(family)).train()

    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or f"{HEADS[family]}.modules_to_save" in name for name in moved)
    for module in ("feature_map", "q_proj", "k_proj", "v_proj", HEADS[family]):
        assert any(f"{module}." in name for name in moved)
    expected = answer(model.eval(), inputs)
    assert not torch.allclose(expected, answer(make_model(family, **fields), inputs), atol=1e-3)

    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make_model(family, **fields), str(tmp_path / "adapter")).eval()
    assert_close(answer(loaded, inputs), expected)
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        loaded.fold_feature_maps()

    merged = loaded.merge_and_unload()
    assert type(merged) is type(make_model(family))
    assert_close(answer(merged, inputs), expected, scale=10)
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in merged.state_dict().items())
    assert_close(answer(again, inputs), answer(merged, inputs))
    assert_close(answer(again.fold_feature_maps(), inputs), expected, scale=10)


@pytest.mark.trains
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_transformers_adds_is_separated_saved_and_loaded(tmp_path, family):
    peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
    inputs, fields = make_inputs(family), {"alpha": 1.5}
    model = make_model(family, **fields)
    model.add_adapter(peft.LoraConfig(**ADAPTERS))
    before = copy_of(model)
    callback = SeparationCallback(steps=10, parameters="feature_maps", batch_size=12)
    make_trainer(tmp_path, model, Examples(family), callback, learning_rate=0.0).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("feature_map.lora_" in name for name in moved)
    assert callback.history[-1]["separation_loss"] < callback.history[0]["separation_loss"]

    expected = answer(model.eval(), inputs)
    assert not torch.allclose(expected, answer(make_model(family, **fields), inputs), atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = make_model(family, **fields)
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert_close(answer(loaded.eval(), inputs), expected)


@pytest.mark.filterwarnings(OLD_NAME)
def test_a_memory_recalls_through_an_adapter_of_its_feature_map():
    peft = pytest.importorskip("peft")
    inputs, plain = make_inputs("memory"), make_model("memory")
    memory = peft.get_peft_model(make_model("memory"), peft.LoraConfig(r=2, target_parameters=["feature_map.weight"]))
    assert_close(answer(memory, inputs), answer(plain, inputs))
    for step in range(1, 3):
        with torch.no_grad():
            for name, parameter in memory.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1 * step)
        expected = copy.deepcopy(memory).merge_and_unload()
        assert not torch.allclose(answer(memory, inputs), answer(plain, inputs), atol=1e-2)
        assert_close(answer(memory, inputs), answer(expected, inputs), scale=10)
    with pytest.raises(ValueError, match="frozen"):
        memory.separate(steps=2)


@pytest.mark.parametrize("parameters", ["feature_maps", "upstream"])
@pytest.mark.parametrize("how", ["adapter", "whole"])
@pytest.mark.filterwarnings(OLD_NAME)
def test_separation_updates_the_parameters_of_feature_maps_that_peft_trains(tmp_path, how, parameters):
    peft = pytest.importorskip("peft")
    config = {"r": 2, "target_modules": ["q_proj"]}
    config |= {"target_parameters": ["feature_map.weight"]} if how == "adapter" else {"modules_to_save": ["feature_map"]}
    model = peft.get_peft_model(make_model("vit"), peft.LoraConfig(**config))
    before = copy_of(model)
    callback = SeparationCallback(schedule="train_begin", steps=20, lr=0.02, batch_size=8, parameters=parameters)
    trainer = make_trainer(tmp_path, model, Examples("vit"), callback, learning_rate=0.0)
    trainer.train()

    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    kind = "lora_" if how == "adapter" else "modules_to_save.default"
    of_maps = {name for name in before if f"feature_map.{kind}" in name}
    projections = {name for name in before if "layers.0.attention.q_proj.lora_" in name}
    assert of_maps
    assert moved == (of_maps if parameters == "feature_maps" else of_maps | projections)
    assert callback.history[-1]["separation_loss"] < callback.history[0]["separation_loss"] - 0.01
    inputs = {name: column[:8] for name, column in Examples("vit").columns.items()}
    expected = answer(model.eval(), {"pixel_values": inputs["pixel_values"]})
    merged = model.merge_and_unload()
    assert_close(answer(merged, {"pixel_values": inputs["pixel_values"]}), expected, scale=10)


@pytest.mark.filterwarnings(OLD_NAME)
def test_separation_names_the_setting_that_an_adapter_needs(tmp_path):
    peft = pytest.importorskip("peft")
    frozen = peft.get_peft_model(make_model("vit"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"target_parameters=\['feature_map.weight'\]"):
        make_trainer(tmp_path, frozen, Examples("vit"), SeparationCallback()).train()
    adapted = peft.get_peft_model(make_model("vit"), peft.LoraConfig(**ADAPTERS))
    for option in ("project", "normalize_rows"):
        with pytest.raises(ValueError, match=r"modules_to_save=\['feature_map'\]"):
            make_trainer(tmp_path, adapted, Examples("vit"), SeparationCallback(**{option: True})).train()


@pytest.mark.trains
@pytest.mark.filterwarnings(OLD_NAME)
def test_training_of_adapters_with_separation_resumes_exactly(tmp_path):
    peft = pytest.importorskip("peft")

    def train(stop: int | None, **options) -> dict[str, torch.Tensor]:
        model = peft.get_peft_model(make_model("vit"), peft.LoraConfig(**ADAPTERS))
        callback = SeparationCallback(schedule="step", lr=0.5, batch_size=8, optimizer="adam", **options)
        arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(tmp_path / "out", model, Examples("vit"), callback, **arguments)
        trainer.train(resume_from_checkpoint=None if stop is None else str(tmp_path / "out" / f"checkpoint-{stop}"))
        return copy_of(model)

    whole = train(None)
    resumed = train(3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    with pytest.raises(ValueError, match="belongs to other weights"):
        train(3, resume_from=tmp_path / "out" / "checkpoint-6")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("family", "fields"), LOADED, ids=_name)
def test_loaded_in_another_precision_a_model_keeps_its_outputs_within_the_table(tmp_path, family, fields, dtype):
    model, inputs = make_model(family, alpha=1.5, **fields), make_inputs(family)
    model.save_pretrained(tmp_path / "wide")
    for place in ({}, {"device_map": "auto"}):
        loaded = type(model).from_pretrained(tmp_path / "wide", dtype=dtype, **place)
        given = answer(loaded, inputs)
        assert loaded.dtype == getattr(torch, dtype)
        assert given.dtype == (torch.float32 if family == "stanhop" else loaded.dtype)
        assert torch.equal(given, answer(copy.deepcopy(model).to(getattr(torch, dtype)), inputs))
        # Forecasts are sums over scales, with values up to 2.5.
        assert_close(given.to(loaded.dtype), answer(model, inputs), scale=2 if family == "stanhop" else 1)
    loaded.save_pretrained(tmp_path / "narrow")
    assert_close(answer(type(model).from_pretrained(tmp_path / "narrow"), inputs), given)


@pytest.mark.parametrize(("family", "fields"), LOADED, ids=_name)
# Because Accelerate also assigns devices to parameters of the model itself, and then warns that no
# module has their name, we ignore this warning.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules:UserWarning")
def test_a_device_map_may_leave_weights_on_the_disk(tmp_path, family, fields):
    model, inputs = make_model(family, alpha=1.5, **fields), make_inputs(family)
    model.save_pretrained(tmp_path / "saved")
    memory = sum(tensor.nbytes for tensor in model.state_dict().values()) // 2
    first, *others = [name for name, _ in model.named_children()] + (["memories"] if family == "memory" else [])
    by_hand = {"device_map": {first: "disk"} | dict.fromkeys(others, "cpu")}
    for place in (by_hand, {"device_map": "auto", "max_memory": {"cpu": memory}}):
        loaded = type(model).from_pretrained(tmp_path / "saved", offload_folder=str(tmp_path / "offloaded"), **place)
        assert "disk" in loaded.hf_device_map.values()
        assert any(parameter.is_meta for parameter in loaded.parameters())
        assert_close(answer(loaded, inputs), answer(model, inputs))


@pytest.mark.parametrize("schedule", ["train_begin", "epoch", "step"])
def test_tensorboard_after_the_callback_has_the_separation_loss_and_the_loss(tmp_path, monkeypatch, schedule):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = SeparationCallback(schedule=schedule, steps=2, lr=0.5, batch_size=8)
    trainer = make_trainer(tmp_path, make_model("vit"), Examples("vit"), callback, TensorBoardCallback())
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    recorded = {tag: [(event.step, event.value) for event in events.Scalars(f"train/{tag}")] for tag in ("loss", "separation_loss")}
    logged = {tag: [(x["step"], x[tag]) for x in trainer.state.log_history if tag in x] for tag in recorded}
    assert [step for step, _ in recorded["loss"]] == [1, 2, 3]
    assert recorded["loss"] == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged["loss"]]
    values = [value for _, value in logged["separation_loss"]]
    assert [value for _, value in recorded["separation_loss"]] == pytest.approx(values, rel=1e-6)
    assert [step for step, _ in recorded["separation_loss"]] == ([1, 2, 3] if schedule == "step" else [1])


def test_tensorboard_of_the_trainer_has_the_loss(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, make_model("vit"), Examples("vit"), SeparationCallback(steps=2, batch_size=8), report_to="tensorboard")
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged, rel=1e-6)


# Because Adam would magnify the rounding errors of gradients that are 0, we use SGD, without
# shuffling.
PLAIN_STEPS = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}


def stream_of(folder: Path, rows: dict[str, list], features: Features) -> tuple[Any, Any]:
    """A folder of two parquet files, as a stream and as an indexed data set."""
    half = len(rows["label"]) // 2
    for part, chosen in enumerate((slice(0, half), slice(half, None))):
        part_rows = {name: column[chosen] for name, column in rows.items()}
        Dataset.from_dict(part_rows, features=features).to_parquet(folder / "data" / f"train-0000{part}-of-00002.parquet")
    arguments = {"split": "train", "cache_dir": str(folder / "cache")}
    return load_dataset(str(folder / "data"), streaming=True, **arguments), load_dataset(str(folder / "data"), **arguments)


@pytest.mark.trains
def test_a_stream_of_images_trains_a_vision_transformer_as_the_same_images_in_a_list_do(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 12, 3), dtype=np.uint8)
    rows = {"image": [PILImage.fromarray(image) for image in pixels], "label": [index % 3 for index in range(10)]}
    processor = ViTImageProcessor(size={"height": 8, "width": 8})

    def prepared(batch: dict[str, list]) -> dict[str, Any]:
        return {**processor(batch["image"]), "labels": batch["label"]}

    weights, losses = [], []
    for dataset in stream_of(tmp_path, rows, Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})):
        images = dataset.map(prepared, batched=True, remove_columns=["image", "label"]).with_format("torch")
        # Because a stream gives its first images and a list gives random ones, the batch has all
        # images in both cases.
        callback = SeparationCallback(schedule="step", parameters="feature_maps", kind="squared", lr=0.5, batch_size=10)
        trainer = make_trainer(tmp_path, make_model("vit", alpha=1.5), images, callback, max_steps=5, **PLAIN_STEPS)
        trainer.train()
        weights.append(copy_of(trainer.model))
        losses.append([entry["separation_loss"] for entry in callback.history])
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, weight in weights[0].items():
        assert_close(weight, weights[1][name], scale=4)
    before = copy_of(make_model("vit", alpha=1.5))
    trained = [name for name in before if "feature_map" in name or "classifier" in name]
    assert all((weights[0][name] - before[name]).abs().max() > 1e-3 for name in trained)


@pytest.mark.trains
def test_a_stream_of_ragged_bags_trains_a_bag_classifier_as_the_same_bags_in_a_list_do(tmp_path):
    generator = np.random.default_rng(1)
    rows = {"instances": [generator.normal(size=(size, 6)).tolist() for size in (1, 5, 3, 4, 2, 7)], "label": [0, 1, 1, 0, 1, 0]}
    weights = []
    for bags in stream_of(tmp_path, rows, Features({"instances": List(List(Value("float32"))), "label": Value("int64")})):
        callback = SeparationCallback(schedule="step", parameters="feature_maps", kind="squared", lr=0.5, batch_size=6)
        arguments = {"max_steps": 5, "per_device_train_batch_size": 2, **PLAIN_STEPS}
        trainer = make_trainer(tmp_path, make_model("mil"), bags, callback, collator=DataCollatorForBags(), **arguments)
        trainer.train()
        weights.append(copy_of(trainer.model))
    for name, weight in weights[0].items():
        assert_close(weight, weights[1][name], scale=4)
    before = copy_of(make_model("mil"))
    trained = [name for name in before if "feature_map" in name or "classifier" in name]
    assert all((weights[0][name] - before[name]).abs().max() > 1e-3 for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_accelerate_loop_with_separation_equals_the_trainer_with_the_callback(tmp_path, family):
    examples = Examples(family, size=8)
    callback = SeparationCallback(schedule="step", parameters="feature_maps", lr=0.3, batch_size=8)
    trainer = make_trainer(tmp_path, make_model(family), examples, callback, **PLAIN_STEPS)
    trainer.train()

    accelerator = Accelerator(cpu=True)
    model = make_model(family).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(examples, batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    maps = [module for name, module in model.named_modules() if name.endswith("feature_map")]
    of_maps = [phi.weight for phi in maps]
    everything = {name: column for name, column in examples.columns.items() if "labels" not in name}
    for batch in (*loader, *loader)[:3]:
        with torch.no_grad():
            memories = list(accelerator.unwrap_model(model).memory_sets(**everything))
        loss = torch.stack([separation_loss(phi(tokens), mask=mask) for phi, tokens, mask in memories]).sum()
        for weight, gradient in zip(of_maps, torch.autograd.grad(loss, of_maps, allow_unused=True), strict=True):
            if gradient is not None:
                weight.data.sub_(0.3 * gradient)
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in copy_of(trainer.model).items():
        assert_close(model.get_parameter(name), weight, scale=20)


def test_maximize_separation_of_memory_sets_equals_a_round_of_the_callback(tmp_path):
    examples = Examples("vit", size=8)
    algorithm_1 = {"parameters": "feature_maps", "optimizer": "adam", "normalize_rows": True}
    callback = SeparationCallback(steps=10, lr=0.01, batch_size=8, **algorithm_1)
    trainer = make_trainer(tmp_path, make_model("vit", num_hidden_layers=1), examples, callback, learning_rate=0.0)
    trainer.train()

    model = Accelerator(cpu=True).prepare(make_model("vit", num_hidden_layers=1))
    for phi, memories, mask in model.memory_sets(pixel_values=examples.columns["pixel_values"]):
        history = maximize_separation(phi, memories.detach(), mask=mask, steps=10, lr=0.01)
    assert history[0] - history[-1] > 0.1
    for name, weight in copy_of(trainer.model).items():
        assert_close(model.get_parameter(name), weight, scale=20)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_of_the_trainer_are_the_outputs_of_the_model_in_order(tmp_path, family):
    examples, model = Examples(family, size=7), make_model(family, alpha=1.5)
    labels = ["future_values"] if family == "stanhop" else ["labels"]
    trainer = make_trainer(tmp_path, model, examples, per_device_eval_batch_size=3, label_names=labels)
    predictions, label_ids, metrics = trainer.predict(examples, ignore_keys=[])
    loss, *expected = answers(model(**examples.columns))
    given = predictions if isinstance(predictions, tuple) else (predictions,)
    for array, tensor in zip(given, expected, strict=True):
        assert_close(torch.from_numpy(array), tensor)
    assert np.array_equal(label_ids, examples.columns[labels[0]].numpy())
    assert metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_predictions_for_ragged_bags_equal_those_for_each_bag(tmp_path):
    generator, sizes = np.random.default_rng(0), (1, 5, 3, 0, 9, 2, 4)
    bags = [{"instances": torch.tensor(generator.normal(size=(size, 6)), dtype=torch.float32), "label": size % 2} for size in sizes]
    model = make_model("mil", alpha=1.5)
    trainer = make_trainer(tmp_path, model, bags, collator=DataCollatorForBags(), per_device_eval_batch_size=3)
    (logits, weights), label_ids, _ = trainer.predict(bags, ignore_keys=[])
    assert label_ids.tolist() == [size % 2 for size in sizes]
    for bag, logit, weight, size in zip(bags, logits, weights, sizes, strict=True):
        with torch.no_grad():
            alone = model(bag["instances"][None])
        assert_close(torch.from_numpy(logit), alone.logits[0])
        assert_close(torch.from_numpy(weight[:size]), alone.instance_weights[0])


def test_the_image_pipeline_answers_in_batches_as_the_model_does_one_by_one():
    model, processor = make_model("vit", alpha=1.5), ViTImageProcessor(size={"height": 8, "width": 8})
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 9, 3), dtype=np.uint8)
    images = [PILImage.fromarray(image) for image in pixels]
    classify = pipeline("image-classification", model=model, image_processor=processor, batch_size=2)
    for image, given in zip(images, classify(images, top_k=3), strict=True):
        scores = answer(model, dict(processor(image, return_tensors="pt")))[0].softmax(-1)
        expected = sorted(((score, f"LABEL_{index}") for index, score in enumerate(scores.tolist())), reverse=True)
        assert [part["label"] for part in given] == [label for _, label in expected]
        assert [part["score"] for part in given] == pytest.approx([score for score, _ in expected], abs=5e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["mil", "stanhop"])
def test_activation_checkpointing_changes_no_gradient(family, reentrant):
    plain = make_model(family, alpha=1.5).train()
    checkpointed = copy.deepcopy(plain)
    getattr(checkpointed, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    entered = []
    for module in checkpointed.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.register_forward_pre_hook(lambda *_: entered.append(torch.is_grad_enabled()))
    for model in (plain, checkpointed):
        model(**make_inputs(family), **make_labels(family)).loss.backward()
    assert entered
    for name, parameter in plain.named_parameters():
        assert_close(checkpointed.get_parameter(name).grad, parameter.grad)
