"""Tests that what version 0.1 saved still loads: configurations, state dicts, folders, checkpoints.

`golden/make.py` says what the files are.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import assert_close
from golden.make import FAMILIES, FOLDER, RUNS, bags, fill, inputs_of, outputs_of, shapes_of, trainer_of_run
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor

import modeling_uhop


CONFIGS, KEYS, OUTPUTS = (json.loads((FOLDER / f"{file}.json").read_text()) for file in ("configs", "keys", "outputs"))
SAVED_BESIDE_FIELDS = {"auto_map", "custom_pipelines", "model_type"}
MODELS = [(label, name) for label, classes in KEYS.items() for name in classes]
FOLDERS = [(family, auto) for family, (_, classes, _) in FAMILIES.items() for auto in classes]


def _config(label: str, folder: Path) -> Any:
    """Load the golden configuration of a variant as a saved `config.json`."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[label]))
    return AutoConfig.from_pretrained(folder)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, list[int]]:
    """The keys and shapes of a tree that `shapes_of` made."""
    flat: dict[str, list[int]] = {}
    for name, branch in tree.items():
        flat.update(_flat(branch, f"{prefix}{name}.") if isinstance(branch, dict) else {prefix + name: branch})
    return flat


def _assert_holds(actual: Any, golden: Any, where: str = "config") -> None:
    """Assert that `actual` has every golden field with its value; it may have further fields."""
    if isinstance(golden, dict) and isinstance(actual, dict):
        missing = sorted(set(golden) - set(actual))
        assert not missing, f"{where} has lost {missing}"
        for name, value in golden.items():
            if name != "transformers_version":
                _assert_holds(actual[name], value, f"{where}.{name}")
    else:
        assert actual == golden, f"{where} was {golden!r} and is {actual!r}"


def _by_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


@pytest.mark.parametrize("label", CONFIGS)
def test_a_saved_configuration_loads_and_is_saved_with_the_same_values(label, tmp_path):
    config = _config(label, tmp_path)
    # Because a configuration keeps fields that it does not know, they would be saved again too.
    declared = {field.name for field in dataclasses.fields(config)} | SAVED_BESIDE_FIELDS
    assert not sorted(set(CONFIGS[label]) - declared)
    getattr(modeling_uhop, config.architectures[0])(config).save_pretrained(tmp_path / "again")
    _assert_holds(json.loads((tmp_path / "again" / "config.json").read_text()), CONFIGS[label])


@pytest.mark.parametrize(("label", "name"), MODELS)
def test_a_model_of_a_saved_configuration_has_the_saved_keys_and_shapes(label, name, tmp_path):
    model = getattr(modeling_uhop, name)(_config(label, tmp_path))
    assert _flat(shapes_of(model)) == _flat(KEYS[label][name])


@pytest.mark.parametrize(("label", "name"), MODELS)
def test_a_model_of_a_saved_configuration_computes_the_saved_outputs(label, name, tmp_path):
    model = fill(getattr(modeling_uhop, name)(_config(label, tmp_path)))
    outputs = outputs_of(model, inputs_of(model.config))
    assert outputs.keys() == OUTPUTS[label][name].keys()
    for each, golden in OUTPUTS[label][name].items():
        assert_close(outputs[each].flatten()[: len(golden)], golden)


@pytest.mark.parametrize(("family", "auto"), FOLDERS)
def test_a_saved_folder_loads_with_equal_outputs(family, auto):
    example = load_file(FOLDER / family / "example.safetensors")
    model, report = getattr(transformers, auto).from_pretrained(FOLDER / family, output_loading_info=True)
    assert type(model).__name__ == FAMILIES[family][1][auto]
    if type(model).__name__ == model.config.architectures[0]:
        assert not any(report.values()), report
    outputs = outputs_of(model.eval(), _by_prefix(example, "input"))
    golden = _by_prefix(example, auto)
    assert outputs.keys() == golden.keys()
    for name, expected in golden.items():
        assert_close(outputs[name], expected)


def test_a_saved_feature_extractor_loads_with_equal_outputs():
    extractor = AutoFeatureExtractor.from_pretrained(FOLDER / "mil")
    golden = _by_prefix(load_file(FOLDER / "mil" / "example.safetensors"), "input")
    padded = extractor(bags(), return_tensors="pt")
    assert padded.keys() == golden.keys()
    for name, expected in golden.items():
        assert_close(padded[name], expected, dtype=torch.float32)


@pytest.mark.parametrize("source", ["optimizer.pt", "separation.pt"])
@pytest.mark.parametrize("run", RUNS)
def test_a_saved_checkpoint_resumes_to_the_weights_of_the_uninterrupted_run(run, source, tmp_path):
    checkpoint = FOLDER / run / "checkpoint-2"
    options = {"resume_from": checkpoint} if source == "separation.pt" else {}
    trainer, callback = trainer_of_run(tmp_path, **RUNS[run], **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    state, golden = trainer.model.state_dict(), load_file(FOLDER / run / "final.safetensors")
    assert state.keys() == golden.keys()
    for name, expected in golden.items():
        assert_close(state[name], expected)
    history = json.loads((FOLDER / run / "history.json").read_text())
    assert [(each["step"], each["inner_step"]) for each in callback.history] == [(each["step"], each["inner_step"]) for each in history]
    losses = torch.tensor([[each["separation_loss"] for each in rounds] for rounds in (callback.history, history)])
    assert_close(*losses)
