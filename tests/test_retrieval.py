"""Retrieval experiments: recipes, measurements, results files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging

from modeling_uhop import FeatureMap, UHopMemoryConfig, UHopMemoryModel, association, mask_patterns, maximize_separation, retrieve
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.report.figures import pictures_figure
from modeling_uhop.training.report.tables import BASELINES, choice_ranks, choice_table, retrieval_table
from modeling_uhop.training.results import as_recorded, read_result
from modeling_uhop.training.tasks.retrieval import (
    EXPERIMENTS,
    MODELS,
    Panel,
    RetrievalRecipe,
    build,
    draw,
    error_of,
    load,
    load_patterns,
    pictures,
    run,
    run_command,
    summarize,
)


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs" / "retrieval").glob("**/*.yaml"))
DIGITS = ROOT / "configs" / "retrieval" / "memory_size_digits.yaml"


@pytest.fixture(autouse=True)
def _verbosity():
    """Because a run silences transformers, the tests that follow get its verbosity back."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def patterns() -> np.ndarray:
    return load_patterns(load(DIGITS).data)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_read(path):
    recipe = load(path)
    assert path.stem.startswith(recipe.experiment)
    assert (recipe.split == "validation") == (path.parent.name == "choice")
    assert all(word in path.read_text() for word in ("# Command:", "# Cost:", "# Source:"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("experiment: speed", "experiment must be among .*'speed'"),
        ("experiment: memory_size\nmodels: [U-Hope]", "models must be among .*'U-Hope'"),
        ("experiment: memory_size\ncorruption: dust", "corruption must be among .*'dust'"),
        ("experiment: memory_size\nsplit: test", "split must be among .*'test'"),
        ("experiment: memory_size\nvalue: [1]", "unknown key 'value' in recipe; the nearest valid one is 'values'"),
        ("experiment: memory_size\npanels: {a: {betta: 1}}", "unknown key 'betta' in panel 'a'"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, content, message):
    defaults = {"data": "{dataset: digits}", "values": "[10]", "models": "[no Phi]"}
    missing = "".join(f"\n{key}: {value}" for key, value in defaults.items() if f"{key}:" not in content)
    (tmp_path / "r.yaml").write_text(content + missing)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / "r.yaml")


def test_patterns_are_the_training_images(patterns):
    assert patterns.shape == (1293, 64)
    drawn = draw(patterns, 20, seed=3)
    assert torch.equal(drawn, draw(patterns, 20, seed=3))
    assert drawn.max() <= 1.0
    known = {row.tobytes() for row in patterns}
    assert all(np.uint8(row * 255 + 0.5).tobytes() in known for row in drawn.numpy())
    with pytest.raises(RecipeError, match="too few for 2000 memories"):
        draw(patterns, 2000, seed=0)


def test_models_are_what_their_names_say(patterns):
    memories = draw(patterns, 30, 0)
    queries = mask_patterns(memories)
    unit, raw = Panel(normalize=True, beta=10.0), Panel(normalize=False, beta=2.0)
    recipe = load(DIGITS)
    normal = torch.nn.functional.normalize
    scores = 10 * normal(queries, dim=-1) @ normal(memories, dim=-1).mT
    expected = (scores.softmax(-1) @ memories - memories).square().sum(-1).mean().item()
    assert error_of(build("no Phi", unit, memories, recipe, 0), queries, unit) == pytest.approx(expected, rel=1e-5)
    for alpha in (1.0, 1.5, 2.0):
        recalled = retrieve(queries, memories, beta=2.0, alpha=alpha)
        expected = (recalled - memories).square().sum(-1).mean().item()
        model = build("no Phi", raw, memories, recipe, 0)
        model.config.alpha = alpha
        assert error_of(model, queries, raw) == pytest.approx(expected, rel=1e-5)
    for name, similarity in (("L2", "l2"), ("Manhattan", "manhattan")):
        recalled = retrieve(queries, memories, beta=2.0, similarity=similarity)
        expected = (recalled - memories).square().sum(-1).mean().item()
        assert error_of(build(name, raw, memories, recipe, 0), queries, raw) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "similarity"), [("L2", "l2"), ("Manhattan", "manhattan"), ("polynomial", "polynomial")])
def test_a_unit_norm_panel_is_one_for_every_similarity(patterns, name, similarity):
    memories = draw(patterns, 30, 0)
    queries, unit = mask_patterns(memories), Panel(normalize=True, beta=10.0)
    normal = torch.nn.functional.normalize
    beta = 1.0 if name == "polynomial" else 10.0
    weights = association(normal(queries, dim=-1), normal(memories, dim=-1), beta=beta, similarity=similarity)
    expected = (weights @ memories - memories).square().sum(-1).mean().item()
    assert error_of(build(name, unit, memories, load(DIGITS), 0), queries, unit) == pytest.approx(expected, rel=1e-5)
    assert error_of(build(name, unit, 3 * memories, load(DIGITS), 0), queries, unit) == pytest.approx(
        (weights @ (3 * memories) - 3 * memories).square().sum(-1).mean().item(), rel=1e-4
    )


def test_u_hop_is_separated_as_the_panel_says(patterns):
    memories = draw(patterns, 30, 0)
    panel = Panel(optimizer="sgd", lr=0.5)
    torch.manual_seed(5)
    untrained = build("untrained Phi", panel, memories, load(DIGITS), 7)
    torch.manual_seed(5)
    separated = build("U-Hop", panel, memories, load(DIGITS), 7)
    phi = FeatureMap(64, normalize=True)
    phi.load_state_dict(untrained.feature_map.state_dict())
    maximize_separation(phi, memories, steps=7, lr=0.5, optimizer="sgd")
    assert torch.equal(separated.feature_map.weight, phi.weight)


VALUES = {"memory_size": [5, 10], "noise_level": [0.0, 2.0], "beta": [1.0, 50.0], "separation_steps": [0, 5], "separation_loss": [3]}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_measures_every_model_at_every_alpha(patterns, experiment):
    values = VALUES[experiment]
    recipe = RetrievalRecipe(experiment, load(DIGITS).data, values, list(MODELS), memories=10, steps=5, repeats=2)
    if experiment == "separation_loss":
        recipe.models = ["U-Hop", "denoising"]
    rows = list(run(recipe, patterns))
    count = 3 if experiment == "separation_loss" else 2
    pairs = [(name, alpha) for name in recipe.models for alpha in ([1.0] if name in BASELINES else [1.0, 1.5, 2.0])]
    assert len(rows) == 2 * count * len(pairs)
    assert rows == list(run(recipe, patterns))
    (summary,) = summarize(recipe, rows).values()
    for name, alpha in pairs:
        mine = [row for row in rows if (row["model"], row["alpha"]) == (name, alpha)]
        entry = summary[name][f"{alpha:g}"]
        if experiment == "separation_loss":
            assert entry["runs"] == 6
        else:
            first = [row["error"] for row in mine if row["value"] == values[0]]
            assert entry[f"{values[0]:g}"]["mean"] == pytest.approx(np.mean(first))
        assert all(np.isfinite(row["error"]) for row in mine)
    if experiment == "beta":
        for model in ("no Phi", "polynomial", "U-Hop", "denoising"):
            assert summary[model]["1"]["50"]["mean"] < summary[model]["1"]["1"]["mean"]
    if experiment == "noise_level":
        assert all(summary[name][f"{alpha:g}"]["2"]["mean"] > summary[name][f"{alpha:g}"]["0"]["mean"] for name, alpha in pairs)


@pytest.mark.parametrize("experiment", ["memory_size", "beta", "noise_level", "separation_steps"])
def test_panels_that_share_a_separation_measure_what_each_of_them_measures_alone(patterns, experiment):
    panels = {"raw": Panel(normalize=False, beta=1.0, optimizer="sgd"), "beta 3": Panel(beta=3.0), "beta 10": Panel(beta=10.0)}
    models = ["no Phi", "U-Hop", "U-Hop+", "denoising", "polynomial"]
    recipe = RetrievalRecipe(experiment, load(DIGITS).data, VALUES[experiment], models, panels=panels, memories=10, steps=5, repeats=2)
    together = list(run(recipe, patterns))
    for title, panel in panels.items():
        alone = list(run(dataclasses.replace(recipe, panels={title: panel}), patterns))
        assert alone == [row for row in together if row["panel"] == title]


def test_validation_images_are_stored_by_no_other_recipe():
    data = load(DIGITS).data
    train, validation = ({row.tobytes() for row in load_patterns(data, split)} for split in ("train", "validation"))
    assert len(validation) == 144
    assert not train & validation


def test_the_command_writes_a_results_file_and_a_figure(tmp_path, capsys):
    recipe = tmp_path / "memory_size_tiny.yaml"
    head = "task: retrieval\nexperiment: memory_size\ndata: {dataset: digits}\n"
    recipe.write_text(f"{head}values: [5, 10]\nmodels: [no Phi, U-Hop]\nsteps: 3\nrepeats: 2\n")
    target = tmp_path / "results" / "retrieval_memory_size_tiny.json"
    options = ["--output_dir", str(target.parent)]
    run_command(recipe, options)
    results = read_result(target, "retrieval")
    assert set(results) == {"schema", "kind", "summary", "recipe", "rows", "versions", "commit", "machine", "code"}
    assert results["recipe"] == as_recorded(load(recipe))
    assert [(row["model"], row["alpha"]) for row in results["rows"][::4]] == [
        (name, alpha) for name in ("no Phi", "U-Hop") for alpha in (1.0, 1.5, 2.0)
    ]
    assert str(target) in capsys.readouterr().out
    assert target.with_suffix(".png").stat().st_size > 10_000
    run_command(recipe, [*options, "--update", "U-Hop"])
    assert read_result(target, "retrieval")["rows"] == results["rows"]
    kept = recipe.read_text()
    for content, more, message in (
        (kept.replace("repeats: ", "repeats: 1"), ["--update", "U-Hop"], "was made with repeats="),
        (kept, ["--update", "L2"], "models must be among those of the recipe"),
        (kept.replace("task: retrieval", "task: images"), [], "RecipeError: task must be among .*, got 'images'"),
        (f"{head}models: [U-Hop]\nvalues: [5000]", [], "RecipeError: there are 1293 images"),
        (f"{head}models: [U-Hop]\nsteps: 3", [], "TypeError: "),
        (kept.replace("memory_size", "beta"), ["--pictures"], "RecipeError: --pictures needs"),
    ):
        recipe.write_text(content)
        with pytest.raises(SystemExit, match=message) as refused:
            run_command(recipe, [*options, *more])
        assert "\n" not in str(refused.value)
    with pytest.raises(SystemExit, match=r"RecipeError: there is no recipe nowhere\.yaml"):
        run_command(Path("nowhere.yaml"), options)
    recipe.write_text(kept)
    with pytest.raises(SystemExit, match="RecipeError: there is no results file"):
        run_command(recipe, ["--output_dir", str(tmp_path / "empty"), "--update", "U-Hop"])
    assert read_result(target, "retrieval")["rows"] == results["rows"]


def test_a_table_has_a_row_for_each_model_and_a_column_for_each_alpha(patterns):
    recipe = RetrievalRecipe("noise_level", load(DIGITS).data, [0.5, 1.0], ["no Phi", "Manhattan"], memories=10, repeats=2)
    rows = list(run(recipe, patterns))
    table = retrieval_table([{"recipe": dataclasses.asdict(recipe), "summary": summarize(recipe, rows)}])
    header, _, plain, manhattan = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    assert header == ["digits", *(f"noise {value}, alpha {alpha}" for value in ("0.5", "1") for alpha in ("1", "1.5", "2"))]
    assert [cell != "" for cell in manhattan] == [True, True, False, False, True, False, False]
    errors = [row["error"] for row in rows if (row["model"], row["alpha"], row["value"]) == ("no Phi", 1.5, 1.0)]
    assert float(plain[5].partition(" ")[0]) == pytest.approx(np.mean(errors), rel=1e-2)


def test_the_memorys_defaults_are_the_best_on_validation_images():
    paths = sorted((ROOT / "benchmarks" / "results" / "choice").glob("retrieval_*.json"))
    results = [read_result(path, "retrieval") for path in paths]
    assert {result["recipe"]["split"] for result in results} == {"validation"}
    ranks = choice_ranks(results)
    assert {len(places) for places in ranks.values()} == {12}
    config = UHopMemoryConfig()
    method = UHopMemoryModel(config).default_separation.kind
    assert next(iter(ranks)) == (method, config.alpha, config.beta)
    assert choice_table(results).splitlines()[2].startswith(f"| {method} | {config.alpha:g} | {config.beta:g} | ")


def test_ranks_are_taken_within_each_condition():
    panels = {"low": {"beta": 3.0}, "high": {"beta": 30.0}}
    summary = {
        "low": {"no Phi": {"1": {"10": {"mean": 4.0}, "20": {"mean": 1.0}}}},
        "high": {"no Phi": {"1": {"10": {"mean": 2.0}, "20": {"mean": 2.0}}, "1.5": {"10": {"mean": 3.0}, "20": {"mean": 3.0}}}},
    }
    ranks = choice_ranks([{"recipe": {"values": [10, 20], "panels": panels}, "summary": summary}])
    assert ranks == {("no Phi", 1.0, 30.0): [1, 2], ("no Phi", 1.0, 3.0): [3, 1], ("no Phi", 1.5, 30.0): [2, 3]}
    assert next(iter(ranks)) == ("no Phi", 1.0, 30.0)


@pytest.mark.trains
def test_pictures_show_what_the_experiment_measures(patterns, tmp_path):
    recipe = RetrievalRecipe("memory_size", load(DIGITS).data, [20, 40], ["no Phi", "denoising"], steps=20, repeats=1)
    config = UHopMemoryConfig()
    recipe.panels = {"default": Panel(beta=config.beta)}
    rows = pictures(recipe, patterns, count=40)
    assert list(rows) == ["query", "no Phi, alpha 1", f"no Phi, alpha {config.alpha:g}", f"denoising, alpha {config.alpha:g}", "stored"]
    measured = {(row["model"], row["alpha"]): row["error"] for row in run(recipe, patterns) if row["value"] == 40}
    for name, alpha in (("no Phi", 1.0), ("no Phi", config.alpha)):
        error = np.square(rows[f"{name}, alpha {alpha:g}"] - rows["stored"]).sum(-1).mean()
        assert error == pytest.approx(measured[name, alpha], rel=1e-4)
    assert torch.equal(torch.from_numpy(rows["stored"]), draw(patterns, 40, 0))
    pictures_figure(tmp_path / "pictures.png", rows, "digits")
    assert (tmp_path / "pictures.png").stat().st_size > 5_000
