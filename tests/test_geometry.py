"""Tests of the geometry experiments: recipes, and values that can be computed in another way."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from modeling_uhop import FeatureMap, separation_loss
from modeling_uhop.feature_map import unit_norm
from modeling_uhop.training.data.images import ImageData
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.results import as_recorded, read_result
from modeling_uhop.training.tasks.geometry import EXPERIMENTS, GeometryRecipe, are_neighbours, load, on_arc, run_command, separated_maps


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs" / "geometry").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    assert path.stem.startswith(load(path).experiment)
    assert all(word in path.read_text() for word in ("# Command:", "# Cost:", "# Source:"))


@pytest.mark.parametrize(
    ("content", "message"), [("experiment: maps", "experiment must be among"), ("experimnt: bound", "nearest valid one is 'experiment'")]
)
def test_a_wrong_recipe_is_refused(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="needs data"):
        EXPERIMENTS["circle"](GeometryRecipe("circle"))


def test_more_steps_of_uhop_plus_separate_more():
    memories = on_arc(4, 60)
    maps = separated_maps(memories, GeometryRecipe("landscape", separation_steps=[0, 20, 100], lr=0.05, temperature=0.5))
    losses = [separation_loss(phi(memories), kind="per_memory", temperature=0.5).item() for phi in maps.values()]
    assert losses[0] > losses[1] > losses[2]
    assert torch.equal(maps[0].weight, torch.eye(2, dtype=torch.float64))


def test_maps_without_normalisation_keep_the_scale_of_the_patterns():
    memories = torch.randn(6, 5)
    for phi in separated_maps(memories, GeometryRecipe("metastable", normalize=False, feature_dim=4)).values():
        assert phi(memories).square().sum().item() == pytest.approx(memories.square().sum().item(), rel=1e-5)


def test_landscape_and_basins():
    recipe = GeometryRecipe("landscape", memories=[2], separation_steps=[0, 2], beta=50.0)
    results, _ = EXPERIMENTS["landscape"](recipe)
    distances = results["M=2"]["N=0"]["distance_of_memory_to_its_attractor"]
    assert max(distances) < 0.1
    assert results["M=2"]["N=2"]["separation"] > results["M=2"]["N=0"]["separation"] == pytest.approx(0.5)
    assert results["M=2"]["share_of_random_crowds_that_improve"] > 0.5
    results, _ = EXPERIMENTS["basins"](GeometryRecipe("basins", memories=[2], separation_steps=[0], beta=1e4, alphas=[2.0]))
    assert results["alpha=2"]["N=0"]["share_that_reaches_a_memory"] > 0.99


def test_loss_curve_and_bound():
    results, _ = EXPERIMENTS["loss_curve"](GeometryRecipe("loss_curve", memories=[20], pattern_dim=8, feature_dim=8, separation_steps=[30]))
    assert results["M=20"]["last"] < results["M=20"]["first"]
    results, _ = EXPERIMENTS["bound"](GeometryRecipe("bound", memories=[6, 12], feature_dim=3))
    assert results["M=12"]["reached"] == pytest.approx(1 - 1 / math.sqrt(5))
    assert all(entry["lower"] <= entry["reached"] <= entry["upper"] for entry in results.values())


def test_circle_and_metastable_states_on_digits():
    data = ImageData("digits")
    classes = {0: "zero", 1: "one", 7: "seven"}
    results, _ = EXPERIMENTS["circle"](
        GeometryRecipe("circle", data, classes=classes, similar=[["one", "seven"]], separation_steps=[0, 1], seeds=2)
    )
    assert results["best_possible"] == pytest.approx(1.5)
    assert results["separation"]["optimum"]["values"] == pytest.approx([1.5, 1.5], rel=1e-3)
    assert all(value < 1.4 for value in results["separation"]["N = 0"]["values"])
    # On a circle with three points, any two are neighbours.
    assert results["similar_pairs_that_are_neighbours"] == {"share": 1.0, "by_chance": 1.0}
    recipe = GeometryRecipe("metastable", data, memories=[20], feature_dim=64, normalize=False, separation_steps=[20], queries=30, seeds=2)
    results, _ = EXPERIMENTS["metastable"](recipe)
    assert set(results) == {"alpha=1, without Phi", "alpha=1, U-Hop+"}
    for shares in results.values():
        assert 1 <= shares.pop("different memories")["mean"] <= 20
        assert sum(share["mean"] for share in shares.values()) == pytest.approx(1.0)


def test_the_command_writes_a_results_file_and_a_figure(tmp_path, capsys):
    recipe = tmp_path / "bound.yaml"
    recipe.write_text("task: geometry\nexperiment: bound\nmemories: [4, 6]\nfeature_dim: 3\n")
    run_command(recipe, ["--output_dir", str(tmp_path / "results")])
    result = read_result(tmp_path / "results" / "geometry_bound.json", "geometry")
    assert set(result) == {"schema", "kind", "results", "recipe", "versions", "commit", "machine", "code"}
    assert result["recipe"] == as_recorded(load(recipe))
    assert str(tmp_path / "results" / "geometry_bound.json") in capsys.readouterr().out
    assert (tmp_path / "results" / "geometry_bound.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("task: geometry\nexperiment: bound", ["--dataset", "digits"], "RecipeError: --dataset needs a recipe with data"),
        ("task: retrieval\nexperiment: bound", [], "RecipeError: task must be 'geometry', got 'retrieval'"),
    ],
)
def test_the_command_refuses_what_it_cannot_run_in_one_line(tmp_path, content, options, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(SystemExit, match=message) as refused:
        run_command(tmp_path / "r.yaml", [*options, "--output_dir", str(tmp_path / "results")])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "results").exists()


def test_points_on_an_arc():
    points = on_arc(5, 80)
    angles = torch.atan2(points[:, 1], points[:, 0]).rad2deg()
    assert torch.allclose(unit_norm(points), points)
    assert torch.allclose(angles, torch.tensor([5.0, 25.0, 45.0, 65.0, 85.0], dtype=torch.float64))


def test_neighbours_on_a_circle():
    angles = torch.tensor([0.1, 1.0, 2.0, -0.1, 3.0])
    names, pairs = ["a", "b", "c", "d", "e"], [["a", "b"], ["a", "d"], ["e", "d"], ["a", "c"], ["b", "e"]]
    phi = FeatureMap(2)
    assert are_neighbours(phi, torch.stack([angles.cos(), angles.sin()], -1), names, pairs) == [True, True, True, False, False]
