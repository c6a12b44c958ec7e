"""Tests of saved folders without the package: they load, can be saved again, and load again."""

import json
from pathlib import Path

import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, ViTImageProcessorPil

import modeling_uhop
from modeling_uhop import (
    STanHopConfig,
    STanHopForPrediction,
    UHopMemoryConfig,
    UHopMemoryModel,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTConfig,
    UHopViTForImageClassification,
    UHopViTModel,
)
from tests.support.forks import run_forked
from tests.support.models import COMPACT, IMAGES, SERIES


FIELDS = {**IMAGES, "patch_size": 2, "num_labels": 3}

SCRIPT = """
import sys
sys.modules["modeling_uhop"] = None
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

folder, again, auto = sys.argv[1:]
images = load_file(folder + "/probe.safetensors")["images"]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
outputs = {"alpha": torch.tensor(float(config.alpha))}
outputs["hidden"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(images).last_hidden_state
if auto == "classifier":
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    outputs["logits"] = model(images).logits
    model.save_pretrained(again)
    reloaded = AutoModelForImageClassification.from_pretrained(again, trust_remote_code=True)
    outputs["again"] = reloaded(images).logits
    answers = pipeline("image-classification", model=folder, trust_remote_code=True)(Image.new("RGB", (20, 30), "red"))
    assert {answer["label"] for answer in answers} == set(config.id2label.values()), answers
save_file({name: tensor.detach().contiguous() for name, tensor in outputs.items()}, folder + "/outputs.safetensors")
"""


@pytest.mark.process
@pytest.mark.parametrize("fields", [{}, {"alpha": 1.4, "learnable_alpha": True}, COMPACT], ids=["dense", "learnable", "compact"])
def test_a_classifier_loads_without_the_package(tmp_path, fields):
    model = UHopViTForImageClassification(UHopViTConfig(**FIELDS, **fields)).eval()
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    images = torch.randn(2, 3, 8, 8)
    save_file({"images": images}, folder / "probe.safetensors")
    finished = run_forked(SCRIPT, str(folder), str(again), "classifier", cwd="/")
    assert finished.returncode == 0, finished.stderr
    outputs = load_file(folder / "outputs.safetensors")
    assert torch.equal(outputs["logits"], model(images).logits)
    assert torch.equal(outputs["again"], model(images).logits)
    assert torch.equal(outputs["hidden"], model.vit(images).last_hidden_state)
    assert outputs["alpha"] == pytest.approx(model.config.alpha)
    first, second = ({path.name for path in f.iterdir() if path.suffix in (".py", ".json")} for f in (folder, again))
    assert second == first - {"preprocessor_config.json", "processor_config.json"}


@pytest.mark.process
def test_a_base_model_loads_without_the_package(tmp_path):
    model = UHopViTModel(UHopViTConfig(**FIELDS)).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    save_file({"images": images}, tmp_path / "probe.safetensors")
    finished = run_forked(SCRIPT, str(tmp_path), "", "base", cwd="/")
    assert finished.returncode == 0, finished.stderr
    assert torch.equal(load_file(tmp_path / "outputs.safetensors")["hidden"], model(images).last_hidden_state)


@pytest.mark.process
def test_a_memory_loads_with_its_patterns_without_the_package(tmp_path):
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=5, alpha=1.5))
    memory.store(torch.randn(6, 5))
    memory.save_pretrained(tmp_path)
    queries = torch.randn(3, 5)
    save_file({"queries": queries}, tmp_path / "probe.safetensors")
    script = """
import sys
sys.modules["modeling_uhop"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModel

folder = sys.argv[1]
memory = AutoModel.from_pretrained(folder, trust_remote_code=True)
memory.append(memory.memories[:1] + 1.0)
memory.save_pretrained(folder + "/again")
again = AutoModel.from_pretrained(folder + "/again", trust_remote_code=True)
assert len(again) == 7
again.delete(6)
print(again.report())
save_file({"retrieved": again(load_file(folder + "/probe.safetensors")["queries"]).retrieved}, folder + "/outputs.safetensors")
"""
    finished = run_forked(script, str(tmp_path), cwd="/")
    assert finished.returncode == 0, finished.stderr
    assert "6 memories at beta=30, alpha=1.5" in finished.stdout
    assert torch.equal(load_file(tmp_path / "outputs.safetensors")["retrieved"], memory(queries).retrieved)


@pytest.mark.process
def test_a_forecaster_loads_with_its_windows_without_the_package(tmp_path):
    units = {"channel_names": ["a", "b", "c"], "mean": [1.0, 2.0, 3.0], "std": [3.0, 2.0, 1.0]}
    model = STanHopForPrediction(STanHopConfig(**SERIES, **units, memory_type="plug", use_linear_skip=True, num_hidden_layers=2)).eval()
    model.store(torch.randn(5, 24, 3), torch.randn(5, 6, 3))
    model.save_pretrained(tmp_path / "model")
    past = torch.randn(2, 24, 3)
    save_file({"past": past}, tmp_path / "probe.safetensors")
    script = """
import sys
sys.modules["modeling_uhop"] = None
import pandas
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForTimeSeriesPrediction

folder = sys.argv[1]
past = load_file(folder + "/probe.safetensors")["past"]
outputs = {}
for name, then in (("model", "again"), ("again", "last")):
    model = AutoModelForTimeSeriesPrediction.from_pretrained(folder + "/" + name, trust_remote_code=True)
    assert AutoConfig.from_pretrained(folder + "/" + name, trust_remote_code=True).num_memories == 5
    outputs[name] = model(past_values=past).prediction_outputs.detach().contiguous()
    outputs[name + " recalled"] = model.recall(past).contiguous()
    table = pandas.DataFrame(past[0].numpy(), columns=["a", "b", "c"], index=pandas.date_range("2024-01-01", periods=24, freq="h"))
    outputs[name + " table"] = torch.from_numpy(model.forecast(table).to_numpy().copy())
    model.save_pretrained(folder + "/" + then)
save_file(outputs, folder + "/outputs.safetensors")
"""
    finished = run_forked(script, str(tmp_path), cwd="/")
    assert finished.returncode == 0, finished.stderr
    outputs = load_file(tmp_path / "outputs.safetensors")
    for name in ("model", "again"):
        assert torch.equal(outputs[name], model(past_values=past).prediction_outputs)
        assert torch.equal(outputs[f"{name} recalled"], model.recall(past))
        table = pandas.DataFrame(past[0].numpy(), columns=["a", "b", "c"], index=pandas.date_range("2024-01-01", periods=24, freq="h"))
        assert torch.equal(outputs[f"{name} table"], torch.tensor(model.forecast(table).to_numpy()))


def test_the_folder_names_every_auto_class_and_has_no_pickle(tmp_path):
    UHopViTForImageClassification(UHopViTConfig(**FIELDS)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.auto_map == {
        "AutoConfig": "configuration_uhop_vit.UHopViTConfig",
        "AutoModel": "modeling_uhop_vit.UHopViTModel",
        "AutoModelForImageClassification": "modeling_uhop_vit.UHopViTForImageClassification",
    }
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}


@pytest.mark.process
def test_a_folder_with_another_models_code_is_not_imported_without_trust(tmp_path):
    UHopViTModel(UHopViTConfig(**FIELDS)).save_pretrained(tmp_path)
    script = """
import sys
sys.modules["modeling_uhop"] = None
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)
"""
    finished = run_forked(script, str(tmp_path), cwd="/")
    assert finished.returncode != 0
    assert "trust_remote_code=True" in finished.stderr


def test_public_names_are_exported():
    assert modeling_uhop.__all__ == sorted(modeling_uhop.__all__)
    for name in modeling_uhop.__all__:
        assert getattr(modeling_uhop, name) is not None
    assert (Path(modeling_uhop.__file__).parent / "py.typed").is_file()


def test_the_folder_of_a_subclass_names_no_class_whose_file_it_lacks(tmp_path):
    class Own(UHopViTForImageClassification):
        pass

    Own.register_for_auto_class("AutoModelForImageClassification")
    for model_class in (UHopViTForImageClassification, Own):
        # The second time, with the configuration of a model that named its classes.
        config = UHopViTConfig(**FIELDS) if model_class is UHopViTForImageClassification else AutoConfig.from_pretrained(tmp_path / "own")
        model_class(config).save_pretrained(tmp_path / "own")
    assert AutoConfig.from_pretrained(tmp_path / "own").auto_map == {
        "AutoConfig": "configuration_uhop_vit.UHopViTConfig",
        "AutoModelForImageClassification": f"{Path(__file__).stem}.Own",
    }


def test_the_folder_of_a_subclass_names_no_pipeline_whose_file_it_lacks(tmp_path):
    class Own(UHopMILForBagClassification):
        pass

    model = UHopMILForBagClassification(UHopMILConfig())
    model.save_pretrained(tmp_path / "ours")
    Own(model.config).save_pretrained(tmp_path / "own")
    ours, own = (json.loads((tmp_path / folder / "config.json").read_text()).get("custom_pipelines") for folder in ("ours", "own"))
    assert ours
    assert not own
