"""The notebooks run at a reduced size and say what their texts say; examples/minimal.py equals the package."""

import importlib.util
import re
import runpy
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from transformers.utils import logging

from modeling_uhop import FeatureMap, Separation, denoising_loss, energy, maximize_separation, retrieve, separation_loss, simplex_map
from tests.conftest import assert_close
from tests.hub_server import Hub, environment, serving
from tests.support.forks import run_forked
from tests.support.notebooks import cells_of, run_cells, source_of


ROOT = Path(__file__).parent.parent
MINIMAL = ROOT / "examples" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", MINIMAL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def case():
    """A map of the package, its W, queries and memories, in float64."""
    feature_map = FeatureMap(16, 12, feature_init="normal", normalize=True).double()
    memories, queries = torch.rand(9, 16, dtype=torch.float64), torch.rand(7, 16, dtype=torch.float64)
    return feature_map, feature_map.weight.detach().clone().requires_grad_(), queries, memories


def assert_equal_with_gradients(theirs, ours, *parameters):
    """Two values, and their gradients by the parameters of each."""
    assert_close(theirs, ours)
    direction = torch.randn_like(ours)
    mine = torch.autograd.grad(theirs, parameters[0], direction)
    for first, second in zip(mine, torch.autograd.grad(ours, parameters[1], direction), strict=True):
        assert second.abs().max() > 1e-6
        assert_close(first, second)


def test_minimal_has_at_most_60_lines_and_no_import_of_the_package():
    text = MINIMAL.read_text()
    assert len(text.splitlines()) <= 60
    assert "modeling_uhop" not in text


@pytest.mark.parametrize("alpha", [1, 2])
def test_minimal_maps_scores_as_the_package_does(minimal, alpha):
    scores = (3.0 * torch.randn(50, 20, dtype=torch.float64)).requires_grad_()
    assert_equal_with_gradients(minimal.simplex_map(scores, alpha), simplex_map(scores, float(alpha)), [scores], [scores])
    assert ((minimal.simplex_map(scores, alpha) == 0).any()).item() == (alpha == 2)


@pytest.mark.parametrize("alpha", [1, 2])
def test_minimal_retrieves_as_the_package_does(minimal, case, alpha):
    feature_map, weight, queries, memories = case
    assert_equal_with_gradients(minimal.phi(queries, weight), feature_map(queries), [weight], [feature_map.weight])
    ours = retrieve(queries, memories, beta=5.0, alpha=float(alpha), feature_map=feature_map)
    assert_equal_with_gradients(minimal.retrieve(queries, memories, weight, 5.0, alpha), ours, [weight], [feature_map.weight])


@pytest.mark.parametrize("alpha", [1, 2])
def test_minimal_has_the_energy_of_the_package(minimal, case, alpha):
    feature_map, weight, queries, memories = case
    ours = energy(queries, memories, beta=5.0, alpha=float(alpha), feature_map=feature_map)
    assert_equal_with_gradients(minimal.energy(queries, memories, weight, 5.0, alpha), ours, [weight], [feature_map.weight])


@pytest.mark.parametrize("temperature", [0.25, 0.1])
def test_minimal_has_the_losses_of_the_package(minimal, case, temperature):
    feature_map, weight, _, memories = case
    copies = memories * (torch.rand(memories.shape) < 0.5)
    ours = separation_loss(feature_map(memories), temperature=temperature)
    theirs = minimal.separation_loss(minimal.phi(memories, weight), temperature)
    assert_equal_with_gradients(theirs, ours, [weight], [feature_map.weight])
    ours = denoising_loss(feature_map(copies), feature_map(memories), temperature=temperature)
    theirs = minimal.denoising_loss(minimal.phi(copies, weight), minimal.phi(memories, weight), temperature)
    assert_equal_with_gradients(theirs, ours, [weight], [feature_map.weight])


def test_minimal_separates_as_the_package_does(minimal, case):
    feature_map, weight, _, memories = case
    copies = memories * (torch.rand(memories.shape) < 0.5)
    settings = {"steps": 5, "lr": 0.5, "optimizer": "sgd", "temperature": 0.2}
    maximize_separation(feature_map, memories, Separation.denoising(), corruption=lambda patterns: copies, **settings)
    theirs = minimal.separate(
        weight, lambda w: minimal.denoising_loss(minimal.phi(copies, w), minimal.phi(memories, w), 0.2), steps=5, rate=0.5
    )
    assert (theirs - weight).abs().max() > 1e-3
    assert_close(theirs, feature_map.weight)


def test_minimal_prints_its_table(capsys):
    runpy.run_path(str(MINIMAL), run_name="__main__")
    header, *rows = capsys.readouterr().out.splitlines()
    assert "error, softmax" in header
    table = {row[:20].strip(): [float(word) for word in row[20:].replace("->", " ").split()] for row in rows}
    assert list(table) == ["no Phi", "untrained Phi", "U-Hop", "denoising"]
    soft, sparse, loss, before, after = zip(*table.values(), strict=True)
    assert soft[3] < 0.6 * soft[0]  # what separation does
    assert sparse[0] < 0.6 * soft[0]  # what the sparse map does
    assert sparse[3] < sparse[0]  # both together
    assert max(loss[2:]) < min(loss[:2]) - 1.0
    assert all(low < high for low, high in zip(after, before, strict=True))


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# What replaces the values of each notebook's Settings cell here.
REDUCED: dict[str, dict[str, Any]] = {
    "memory": {"num_memories": 30, "denoising_steps": 40, "uhop_steps": 10, "num_seeds": 2},
    "vision": {"num_pretrain": 96, "num_finetune": 64, "pretrain_steps": 6, "finetune_steps": 4, "separation_steps": 2, "seeds": [0, 1]},
    "bags": {"num_train_bags": 40, "num_test_bags": 20, "num_epochs": 2, "separation_steps": 2},
    "attach": {"num_sentences": 64, "num_long_sentences": 32, "bert_steps": 4, "finetune_steps": 3, "separation_steps": 2, "seeds": [0, 1]}
    | {"num_images": 64, "num_turned_images": 64, "vit_steps": 4},
    "forecasts": {"num_hours": 800, "context_length": 48, "train_steps": 3, "separation_steps": 2},
}


def printed(path):
    """All that the committed cells of a notebook printed."""
    outputs = [output for cell in cells_of(path) for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def numbers_after(text, start):
    """The numbers in the first line that begins with `start`, behind it."""
    line = next(line for line in text.splitlines() if line.strip().startswith(start))
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*", line.strip()[len(start) :])]


def test_there_are_five_notebooks():
    assert [path.stem for path in NOTEBOOKS] == sorted(REDUCED)


@pytest.mark.trains
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_at_a_reduced_size(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    own_level = logging.get_logger("modeling_uhop").level
    try:
        with matplotlib.rc_context():
            run_cells(path, REDUCED[path.stem])
        assert plt.get_fignums()
    finally:
        plt.close("all")
        logging.set_verbosity(verbosity)
        logging.get_logger("modeling_uhop").setLevel(own_level)
        if has_bars:
            logging.enable_progress_bar()
    assert "nan" not in capsys.readouterr().out


@pytest.mark.process
def test_the_attach_notebook_pushes_its_adapter_to_the_hub(tmp_path):
    hub, (path,) = Hub(), [path for path in NOTEBOOKS if path.stem == "attach"]
    code = f"from pathlib import Path; from tests.support.notebooks import run_cells; run_cells(Path({str(path)!r}), {REDUCED['attach']!r})"
    with serving(hub) as port:
        done = run_forked(code, MPLBACKEND="Agg", TMPDIR=str(tmp_path), **environment(port, str(tmp_path / "hub_home")))
    assert done.returncode == 0, done.stderr
    assert "you/bert-uhop: .gitattributes, README.md, adapter_config.json, adapter_model.safetensors" in done.stdout
    assert "equal logits after loading: True" in done.stdout
    assert hub.repositories["you/bert-uhop"].head.lfs == {"adapter_model.safetensors"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_was_run_once_from_top_to_bottom(path):
    cells = cells_of(path)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert source_of(cells[0]).startswith("# ")
    assert source_of(code[0]).startswith("# Settings\n")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert path.stat().st_size < 500_000


def test_the_memory_notebook_shows_what_its_text_says():
    text = printed(next(path for path in NOTEBOOKS if path.stem == "memory"))
    errors = {name: numbers_after(text, name)[::2] for name in ("untrained Phi", "U-Hop  ", "U-Hop+", "denoising   ")}
    table = text[text.index("error, M =") :]
    plain, denoising = numbers_after(table, "no Phi")[::2], numbers_after(table, "denoising")[::2]
    assert denoising[0] < 0.5 * plain[0]
    assert plain[2] < 0.5 * plain[0]
    assert min(denoising) == denoising[1]
    assert denoising[0] < errors["U-Hop  "][0] < plain[0] < errors["U-Hop+"][0]


def test_the_vision_notebook_shows_what_its_text_says():
    text = printed(next(path for path in NOTEBOOKS if path.stem == "vision"))
    assert numbers_after(text, "stock ViT, digits 0 to 4: test accuracy")[0] > 0.8
    before, after = numbers_after(text, "separation loss, mean of layers and seeds:")
    assert after < before
    for name in ("untrained Phi", "U-Hop"):
        assert numbers_after(text, name)[0] > 0.5


def test_the_bags_notebook_shows_what_its_text_says():
    text = printed(next(path for path in NOTEBOOKS if path.stem == "bags"))
    for name in ("no Phi", "untrained Phi", "U-Hop "):
        _, bag_auc, weight_auc = numbers_after(text, name)
        assert bag_auc > numbers_after(text, "mean pooling")[1]
        assert weight_auc > 0.85
    before, after = numbers_after(text, "separation loss of U-Hop:")[:2]
    assert after < before


def test_the_forecasts_notebook_shows_what_its_text_says():
    text = printed(next(path for path in NOTEBOOKS if path.stem == "forecasts"))
    last = numbers_after(text, "repeat last  ")[-1]
    for name in ("linear", "memory of windows", "STanHop, no Phi", "STanHop, untrained Phi", "STanHop, U-Hop"):
        assert numbers_after(text, name)[-1] < last
    before, after = numbers_after(text, "separation loss:")[:2]
    assert after < before


def test_the_attach_notebook_shows_what_its_text_says():
    text = printed(next(path for path in NOTEBOOKS if path.stem == "attach"))
    assert text.count("largest difference of the logits at the start: 0.0\n") == 2
    assert "you/bert-uhop: .gitattributes, README.md, adapter_config.json, adapter_model.safetensors\n" in text
    assert "equal logits after loading: True\n" in text
    assert "adapter switched off, the stock BERT: True\n" in text
    means = {name: numbers_after(text, f"{name} Stage I") for name in ("without", "with")}
    assert abs(means["with"][0] - means["without"][0]) < max(means["with"][1], means["without"][1])
    (stock,) = numbers_after(text, "long sentences, test accuracy:")
    assert min(mean for mean, *_ in means.values()) > stock + 0.05
    for line in ("separation loss, mean over layers and seeds:", "separation loss, mean over layers:"):
        before, after = numbers_after(text, line)
        assert after < before - 1
    separated, tuned = numbers_after(text, "turned digits, test accuracy:")
    (start,) = numbers_after(text, "at alpha = 1.5: test accuracy")
    assert separated < start < tuned
    upright, _ = numbers_after(text, "stock ViT: test accuracy")
    assert numbers_after(text, "adapter switched off: test accuracy") == [upright]
    merged = re.findall(r"largest difference of the logits (\d)e-0(\d)", text)
    assert len(merged) == 2
    assert all(int(power) >= 5 for _, power in merged)
