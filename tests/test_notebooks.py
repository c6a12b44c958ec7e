"""The notebooks run at a reduced size and say what their texts say; examples/minimal.py equals the package."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from conftest import assert_close

from modeling_uhop import FeatureMap, denoising_loss, energy, maximize_separation, retrieve, separation_loss, simplex_map


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
    maximize_separation(feature_map, memories, method="denoising", corruption=lambda patterns: copies, **settings)
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
