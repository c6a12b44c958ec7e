"""Model cards: every released recipe has one, and it says what its results say."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from scipy import stats
from transformers.pipelines import PIPELINE_REGISTRY

from modeling_uhop.model_card import family_of, model_card
from modeling_uhop.training.report import cards
from modeling_uhop.training.report.cards import (
    CARDS,
    RESULTS,
    TEMPLATE,
    has_card,
    headline,
    released,
    released_cards,
    same_training,
    variant_as_released,
    write_card,
)
from modeling_uhop.training.results import read_result, with_schema, write_result


PATHS = sorted(path for path in CARDS.glob("*.md") if path != TEMPLATE)
METRICS: dict[str, dict[str, Any]] = {
    "vit": {"test_accuracy": 0.93, "train_seconds": 12.4},
    "mil": {"auc": {"mean": 0.9, "std_repeats": 0.01}, "accuracy": {"mean": 0.8, "std_repeats": 0.02}, "cross_validation_seconds": 3.0},
    "stanhop": {"test_mse": 0.41, "test_mae": 0.42, "train_seconds": 200.0, "baselines": {}},
}
DATA = {
    "vit": {"dataset": "owner/pictures", "image_column": "image", "test_split": "held_out"},
    "mil": {"dataset": "digits", "instances_column": "instances"},
    "stanhop": {"dataset": "ETTh1.csv", "date_column": "date"},
}
TASKS = {"vit": "images", "mil": "bags", "stanhop": "series"}


def _results(family: str, **recipe):
    """A run of an earlier version, whose file has no schema and whose recipe names no task."""
    content = {
        "name": f"my_{family}",
        "data": DATA[family],
        "model": {"alpha": 1.5},
        "separation": None,
        "training": {},
        "metrics": ["auc"],
    }
    return {
        "recipe": {**content, **recipe},
        "metrics": METRICS[family],
        "seed": 3,
        "num_parameters": 12345,
        "versions": {"torch": "2.13.0"},
        "commit": "abc123",
        "machine": "a good processor, 2 cores, no GPU",
    }


def _write(folder, results, schema):
    """Write the results of a run as this version does, or as an earlier one did."""
    if schema:
        write_result(folder / "results.json", "run", {**with_schema("run", results), "name": results["recipe"]["name"]})
    else:
        (folder / "results.json").write_text(json.dumps(results))


def test_the_cards_say_what_the_results_files_say():
    """If this fails, `make tables` writes them again."""
    expected = released_cards()
    assert sorted(expected) == PATHS
    for path, text in expected.items():
        assert path.read_text() == text, path.name


def test_every_family_and_every_compared_recipe_has_a_card():
    names = {path.stem for path in PATHS}
    compared = {path.stem for path in RESULTS.glob("*.json") if has_card(read_result(path))}
    assert compared == names
    assert {"mil_tiger", "vit_digits", "stanhop_etth1_96", "retrieval_memory_size_digits"} <= compared
    assert not {"vit_cifar10_small_ways", "vit_cifar10_one_epoch", "speed", "retrieval_beta_digits", "geometry_bound"} & compared
    assert {name.split("_")[0] for name in names} == {"vit", "mil", "stanhop", "retrieval"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_card_has_valid_front_matter_results_and_links(path):
    text = path.read_text()
    assert isinstance(yaml.safe_load(text.split("---\n")[1]), dict)
    data = ModelCard.load(path).data
    assert data.to_dict()["library_name"] == "transformers"
    assert data.license == "apache-2.0"
    assert data.pipeline_tag in (None, "time-series-forecasting", *PIPELINE_REGISTRY.get_supported_tasks())
    assert data.eval_results
    assert all(math.isfinite(result.metric_value) and result.dataset_name for result in data.eval_results)
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
    for title in (
        "How to load",
        "Intended use and limits",
        "Training data",
        "Separation step",
        "Results",
        "Environmental cost",
        "Citation",
    ):
        assert f"\n## {title}" in text
    assert not re.search(r"\bnan\b|\bUndefined\b|\| *None *\|", text)
    table = text.split("\n## Results\n")[1].split("\n## ")[0]
    assert len(re.findall(r" ± ", table)) >= 2


def _first_screen(path):
    return path.read_text().split("\n---\n", 1)[1].split("\n## How to load\n")[0]


def _numbers(text):
    """The metric, its interval and those of the baseline; `None` without an interval."""
    found = re.findall(r": (\d+\.\d{4})(?: ± (\d+\.\d{4}))?", text)
    return [(float(mean), float(width) if width else None) for mean, width in found]


def _interval(values):
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return pytest.approx((np.mean(values), (high - low) / 2), abs=5.1e-5)


@pytest.mark.parametrize(("name", "ours"), [("vit_digits", "separation"), ("stanhop_etth1_96", "U-Hop")])
def test_the_first_screen_has_the_metric_beside_the_baseline(name, ours):
    screen = _first_screen(CARDS / f"{name}.md")
    results = read_result(RESULTS / f"{name}.json", "seeds")
    metric = "test_accuracy" if name == "vit_digits" else "test_mse"
    values = {variant: entry["metrics"][metric]["values"] for variant, entry in results["variants"].items()}
    first, second = _numbers(screen)
    assert first == _interval(values[ours])
    if name == "vit_digits":
        # The variants of digits are no Phi, "Phi without separation" and "separation".
        assert second == _interval(max((values[name] for name in values if name != ours), key=np.mean))
    else:
        assert second == (pytest.approx(min(errors["test_mse"] for errors in results["baselines"].values()), abs=5.1e-5), None)
    code = screen.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 6
    assert max(map(len, screen.splitlines())) <= 105


def test_the_first_screen_of_bags_has_intervals_that_allow_for_shared_bags():
    results = read_result(RESULTS / "mil_musk2.json", "folds")
    scores = {job: np.ravel(results["results"][job]["auc_by_fold"]) for job in ("dense", "set kernel, SVM")}
    expected = [(by_fold.mean(), stats.t.ppf(0.975, 49) * ((1 / 50 + 1 / 9) * by_fold.var(ddof=1)) ** 0.5) for by_fold in scores.values()]
    shown = _numbers(_first_screen(CARDS / "mil_musk2.md"))
    assert [pytest.approx(pair, abs=5.1e-5) for pair in expected] == shown


def test_a_memory_is_compared_at_the_alpha_of_the_package():
    errors = {"no Phi": 9.0, "denoising": 1.0, "U-Hop": 1.5, "U-Hop+": 2.0}
    of_maps = {
        name: {alpha: {cards.MEMORIES: {"mean": error / float(alpha), "std": 0.2}} for alpha in ("1", "1.5", "2")}
        for name, error in errors.items()
    }
    of_baselines = {name: {"1": {cards.MEMORIES: {"mean": error, "std": 0.3}}} for name, error in {"L2": 4.0, "Manhattan": 3.0}.items()}
    recipe = {"task": "retrieval", "experiment": "memory_size", "repeats": 3, "steps": 100, "data": {"dataset": "digits"}}
    summary = {cards.PANEL: {**of_maps, **of_baselines}}
    gathered = {"kind": "retrieval", "summary": summary, "recipe": recipe, "versions": {"torch": "2.13.0"}, "commit": "abc"}
    mean = errors[cards.NAMES[cards.METHOD]] / float(cards.ALPHA)
    quantile = stats.t.ppf(0.975, 2) / 3**0.5
    assert _numbers(headline(gathered)) == [pytest.approx((mean, 0.2 * quantile), abs=1e-4), pytest.approx((3.0, 0.3 * quantile), abs=1e-4)]
    assert "Best baseline, Manhattan" in headline(gathered)
    of_maps["no Phi"][cards.ALPHA][cards.MEMORIES]["mean"] = 2.9
    assert f"Best baseline, no Phi at alpha {cards.ALPHA}: 2.9000 ±" in headline(gathered)
    of_maps["no Phi"][cards.ALPHA][cards.MEMORIES]["mean"] = 9.0
    table = cards.comparison(gathered).splitlines()
    assert table[0] == "| sum of squared pixel errors | alpha 1 | alpha 1.5 | alpha 2 |"
    assert table[-1] == "| Manhattan | 3.0000 ± 0.3000 |  |  |"
    text = str(model_card(released(gathered, "memory"), TEMPLATE, headline=headline(gathered), comparison="\n".join(table)))
    assert f"alpha={cards.ALPHA}, beta={cards.BETA}" in text
    assert "memory.separate(steps=100)" in text


@pytest.mark.parametrize("schema", [True, False], ids=["schema 1", "no schema"])
def test_a_run_without_comparison_says_so(tmp_path, schema):
    for family, number in (("vit", "0.9300"), ("mil", "0.9000"), ("stanhop", "0.4100")):
        _write(tmp_path, _results(family), schema)
        write_card(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert f": {number}**, from one run, without a confidence interval.\nThis run was not compared with a baseline." in text
    run = _results("stanhop")
    run["metrics"] = {**run["metrics"], "baselines": {"linear, 168": {"test_mse": 0.4}, "repeat last": {"test_mse": 1.3}}}
    _write(tmp_path, run, schema)
    write_card(tmp_path)
    assert "Best baseline, linear, 168: 0.4000 (not random" in (tmp_path / "README.md").read_text()


def test_a_cards_numbers_are_means_over_the_seeds_of_its_results():
    results = read_result(RESULTS / "stanhop_wth_96.json", "seeds")["variants"]["U-Hop"]["metrics"]
    evaluations = {e.metric_type: e.metric_value for e in ModelCard.load(CARDS / "stanhop_wth_96.md").data.eval_results}
    for name in ("mse", "mae"):
        values = results[f"test_{name}"]["values"]
        assert evaluations[name] == pytest.approx(sum(values) / len(values), abs=5e-5)


@pytest.mark.parametrize("name", ["mine", "speed", "vit_cifar10_one_epoch", "retrieval_memory_size_mnist", "mil_digits"])
@pytest.mark.parametrize("family", METRICS)
def test_a_run_gets_a_card_of_its_own_whatever_its_name(family, name, tmp_path):
    _write(tmp_path, _results(family, name=name), schema=True)
    (tmp_path / "forecast.png").touch()
    write_card(tmp_path, model_id="somebody/something")
    text = (tmp_path / "README.md").read_text()
    data: Any = ModelCard(text).data
    assert "somebody/something" in text
    assert "path/to/this/folder" not in text
    assert "![Forecasts beside the windows that a memory retrieves](forecast.png)" in text
    assert "Its variants and baselines" not in text
    assert "12,345" in text
    assert "a good processor, 2 cores, no GPU" in text
    values = [value["mean"] if isinstance(value, dict) else value for value in METRICS[family].values() if value != {}]
    shown = [result.metric_value for result in data.eval_results]
    assert shown == values[: len(shown)]
    assert data.eval_results[0].dataset_split == ("held_out" if family == "vit" else "test")
    assert data.datasets == (["owner/pictures"] if family == "vit" else None)


@pytest.mark.parametrize("schema", [True, False], ids=["schema 1", "no schema"])
def test_only_a_run_of_the_recipe_as_released_is_compared(tmp_path, schema):
    gathered = read_result(RESULTS / "mil_digits.json", "folds")
    run = {**_results("mil"), "recipe": {**gathered["recipe"], "seed": 7}}
    other: dict[str, Any] = {"model": {"alpha": 2.0, "use_feature_map": False}}
    for changes, compared in (({}, True), (other, False)):
        run["recipe"] = {**run["recipe"], **changes}
        _write(tmp_path, run, schema)
        write_card(tmp_path)
        assert ("Its variants and baselines" in (tmp_path / "README.md").read_text()) is compared


def test_defaults_that_are_spelled_out_make_no_other_recipe():
    recipe = _results("vit", model={}, task="images")["recipe"]
    assert same_training(recipe, {**recipe, "model": {"alpha": 1.0}, "seed": 5, "data": {**recipe["data"], "dataset": "elsewhere"}})
    assert same_training(recipe, {**recipe, "architecture": "uhop_vit", "data": {**recipe["data"], "max_eval_samples": None}})
    others: tuple[dict[str, Any], ...] = (
        {"model": {"alpha": 1.1}},
        {"architecture": "vit"},
        {"data": {"dataset": "a", "random_flip": True}},
        {"training": {"max_steps": 3}},
        {"separation": {}},
        {"name": "other"},
    )
    for changes in others:
        assert not same_training(recipe, {**recipe, **changes})
    separated = {**recipe, "separation": {"lr": 0.1}}
    assert same_training(separated, {**recipe, "separation": {"lr": 0.1, "schedule": "train_begin", "kind": "average"}})
    assert not same_training(separated, {**recipe, "separation": {"lr": 0.1, "kind": "squared"}})
    variants = {"sparse": ["model.alpha=2.0"], "dense": ["model.alpha=1.0"]}
    assert variant_as_released(recipe, variants) == "dense"
    with pytest.raises(ValueError, match="no variant of my_vit is the recipe itself"):
        variant_as_released(recipe, {"sparse": ["model.alpha=2.0"]})


def test_a_card_without_its_metric_is_refused():
    results = {**_results("vit"), "metrics": {"validation_accuracy": 0.5}}
    with pytest.raises(KeyError, match="test_accuracy"):
        model_card(results, TEMPLATE)


@pytest.mark.parametrize("family", TASKS)
def test_the_family_is_that_of_the_task_or_of_the_data(family):
    recorded = _results(family)["recipe"]
    assert family_of(recorded, TEMPLATE.parent).name == TASKS[family]
    assert family_of({**recorded, "task": "retrieval"}, TEMPLATE.parent).name == "retrieval"
    assert family_of({"experiment": "beta"}, TEMPLATE.parent).name == "retrieval"


def test_separation_is_described_as_it_was():
    assert "\n## Separation step\n\nNone." in str(model_card(_results("vit"), TEMPLATE))
    results = _results("vit", separation={"schedule": "step", "lr": 0.1})
    results["metrics"] = {**results["metrics"], "separation_loss_before": -1.0, "separation_loss": -2.5}
    text = str(model_card(results, TEMPLATE))
    assert "| schedule | step |" in text
    assert "Separation loss before and after: -1.000 and -2.500." in text
    assert "no feature map" in str(model_card(_results("vit", model={"use_feature_map": False}), TEMPLATE))
