"""Results files: each has a schema and the keys of its kind, and is read by its kind alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import migrate_results
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.recipe import Recipe
from modeling_uhop.training.results import KINDS, PROVENANCE, as_text, provenance, read_result, write_result, write_results


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PATHS = sorted(RESULTS.rglob("*.json"))
OF_RUNS = {"versions": {"torch": "1"}, "commit": "abc, def", "machine": "theirs"}
CONTENT: dict[str, dict[str, Any]] = {
    kind: {key: {} for key in keys} | ({"name": "r", "seed": 1} if kind == "run" else {}) for kind, keys in KINDS.items()
}


@dataclass
class Source:
    dataset: str


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_every_results_file_has_the_keys_of_its_kind(path):
    result = read_result(path)
    assert list(result)[:2] == ["schema", "kind"]
    assert {*KINDS[result["kind"]], *PROVENANCE} <= result.keys()
    family = path.stem.partition("_")[0]
    by_name = {"vit": "seeds", "stanhop": "seeds", "attach": "seeds", "mil": "folds"}
    assert result["kind"] == ("run" if path.stem == "vit_cifar10_one_epoch" else by_name.get(family, family))
    assert path.read_text() == as_text(result) + "\n"


@pytest.mark.parametrize(
    "path", [path for path in PATHS if "speed" not in path.stem], ids=lambda path: path.relative_to(RESULTS).as_posix()
)
def test_every_recorded_recipe_has_todays_form(path):
    result = read_result(path)
    recipe = result["recipe"]
    family = path.stem.partition("_")[0]
    assert recipe["task"] == {"vit": "images", "mil": "bags", "stanhop": "series"}.get(family, family)
    assert not {"evaluate_on", "judge", "anchor_lengths"} & recipe.keys()
    if result["kind"] == "folds":
        assert recipe["evaluation"] == {"split": "validation" if path.parent.name == "choice" else "test"}
    if family == "attach":
        assert result["variants"].keys() == recipe["variants"].keys() == result["sweep"]["rates"].keys()
    elif result["kind"] == "seeds":
        assert recipe["evaluation"] == {"split": "validation" if "evaluation.split=validation" in result["sweep"]["overrides"] else "test"}
        assert result["sweep"]["task"] == recipe["task"]
        assert "script" not in result["sweep"]
        assert result["variants"].keys() == result["sweep"]["variants"].keys()
        for variant in result["variants"].values():
            assert all(len(metric["values"]) == len(result["sweep"]["seeds"]) for metric in variant["metrics"].values())
    assert "evaluate_on=" not in path.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_read_as_it_was_written(kind, tmp_path):
    path = tmp_path / "new" / "folder" / "r.json"
    write_result(path, kind, CONTENT[kind])
    assert read_result(path, kind) == read_result(path) == {"schema": 1, "kind": kind, **CONTENT[kind], **provenance()}
    write_result(path, kind, {**CONTENT[kind], **OF_RUNS, "more": [1.5, None]})
    assert read_result(path, "other", kind) == {"schema": 1, "kind": kind, **CONTENT[kind], **OF_RUNS, "more": [1.5, None]}
    assert [each.name for each in path.parent.iterdir()] == ["r.json"]


def test_another_kind_schema_or_set_of_keys_is_refused(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(RecipeError, match=r"there is no results file .*r\.json"):
        read_result(path, "seeds")
    good = {"schema": 1, "kind": "geometry", "results": {}, "recipe": {}, **OF_RUNS}
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "must have schema 1, got None"),
        (json.dumps({**good, "schema": 2}), "must have schema 1, got 2"),
        (json.dumps(CONTENT["folds"] | OF_RUNS), "must have schema 1, got None; `benchmarks/migrate_results.py`"),
        (json.dumps({**good, "kind": "tables"}), "must be seeds or folds, got 'tables'"),
        (json.dumps({**good, "kind": ["seeds"]}), r"must be seeds or folds, got \['seeds'\]"),
        (json.dumps(good), "must be seeds or folds, got 'geometry'"),
        (json.dumps({**good, "kind": "folds"}), "of kind 'folds', must have parameters, paired, published, variants"),
    ):
        path.write_text(content)
        with pytest.raises(RecipeError, match=message) as refused:
            read_result(path, "seeds", "folds")
        assert "\n" not in str(refused.value)
    path.write_text(json.dumps({**good, "kind": "tables"}))
    with pytest.raises(RecipeError, match="must be run or seeds or"):
        read_result(path)


def test_content_that_could_not_be_read_is_not_written(tmp_path):
    for kind, content, message in (
        ("table", {}, "must be run or seeds or .*, got 'table'"),
        ("run", {"name": "r"}, "must have metrics, seed, recipe"),
    ):
        with pytest.raises(RecipeError, match=message):
            write_result(tmp_path / "r.json", kind, content)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_an_earlier_version_is_read_in_todays_form(tmp_path):
    path = tmp_path / "results.json"
    recipe = {"name": "r", "data": {"dataset": "d", "instances_column": "instances"}, "evaluate_on": "validation"}
    earlier = {"metrics": {"auc": 0.5}, "seed": 3, "recipe": recipe, "versions": {"torch": "1"}, "commit": None}
    path.write_text(json.dumps(earlier))
    result = read_result(path, "run")
    assert (result["schema"], result["kind"], result["name"], result["machine"]) == (1, "run", "r", None)
    assert result["recipe"] == {"name": "r", "data": recipe["data"], "task": "bags", "evaluation": {"split": "validation"}}
    assert result["metrics"] == earlier["metrics"]
    with pytest.raises(RecipeError, match="must have schema 1, got None"):
        read_result(path, "run", "seeds")


def test_the_results_of_a_run_have_its_recipe(tmp_path):
    recipe = Recipe("r", Source(dataset=str(tmp_path)), task="images", seed=7)
    write_results(tmp_path / "r.json", recipe, {"accuracy": 1.0}, log_history=[])
    result = read_result(tmp_path / "r.json", "run")
    assert (result["name"], result["seed"], result["metrics"], result["log_history"]) == ("r", 7, {"accuracy": 1.0}, [])
    assert result["recipe"]["data"] == {"dataset": tmp_path.name}
    assert result["recipe"]["evaluation"] == {"split": "test"}


SWEEP = {
    "script": "train_stanhop",
    "overrides": ["evaluate_on=validation"],
    "once": ["anchor_lengths=[336]"],
    "variants": {"a": ["judge=test"]},
}
SERIES = {"name": "r", "data": {"dataset": "d", "date_column": "date"}, "anchor_lengths": [1]}
EARLIER: dict[str, dict[str, Any]] = {
    "run": {**CONTENT["run"], "recipe": {"name": "r", "data": {"dataset": "d"}}},
    "seeds": {**CONTENT["seeds"], "sweep": SWEEP, "recipe": SERIES},
    "folds": {
        **CONTENT["folds"],
        "recipe": {"data": {"dataset": "d", "instances_column": "i"}, "evaluate_on": "test"},
        "variants": {"b": ["evaluate_on=test"]},
    },
    "retrieval": {**CONTENT["retrieval"], "recipe": {"experiment": "beta"}},
    "geometry": {**CONTENT["geometry"], "recipe": {"experiment": "bound"}},
    "speed": CONTENT["speed"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_from_before_the_schema_are_migrated_once(kind, tmp_path, monkeypatch, capsys):
    path = tmp_path / "choice" / "r.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**EARLIER[kind], "versions": {"torch": "1"}, "commit": "abc"}))
    monkeypatch.setattr("sys.argv", ["migrate_results.py", str(tmp_path)])
    migrate_results.main()
    assert capsys.readouterr().out == f"{path} {kind}\n"
    result, text = read_result(path, kind), path.read_text()
    assert (result["versions"], result["commit"], result["machine"]) == ({"torch": "1"}, "abc", None)
    if kind == "seeds":
        assert result["recipe"] == {
            "name": "r",
            "data": SERIES["data"],
            "baseline_lengths": [1],
            "task": "series",
            "evaluation": {"split": "test"},
        }
        assert result["sweep"] == {
            "task": "series",
            "curves": [],
            "suffix": "",
            "overrides": ["evaluation.split=validation"],
            "once": ["baseline_lengths=[336]"],
            "variants": {"a": ["evaluation.split=test"]},
        }
    elif kind == "folds":
        assert result["recipe"]["evaluation"] == {"split": "test"}
        assert result["variants"] == {"b": ["evaluation.split=test"]}
    elif kind != "speed":
        assert result["recipe"]["task"] == {"run": "images"}.get(kind, kind)
    migrate_results.main()
    assert capsys.readouterr().out == ""
    assert path.read_text() == text


def test_a_file_of_no_kind_is_not_migrated(tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text('{"rows": []}')
    monkeypatch.setattr("sys.argv", ["migrate_results.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"got \['rows'\]"):
        migrate_results.main()
    assert (tmp_path / "r.json").read_text() == '{"rows": []}'


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)))
def test_text_is_json_of_the_same_values(value):
    assert json.loads(as_text(value)) == value


def test_a_row_is_a_line():
    text = as_text({"rows": [{"a": 1, "b": [2]}, {"a": 3}], "by_size": {64: 1.5}, "empty": [], "nested": [[1, 2], [3, 4]]})
    assert text.splitlines() == [
        "{",
        ' "rows": [',
        "  {",
        '   "a": 1,',
        '   "b": [2]',
        "  },",
        '  {"a": 3}',
        " ],",
        ' "by_size": {"64": 1.5},',
        ' "empty": [],',
        ' "nested": [',
        "  [1, 2],",
        "  [3, 4]",
        " ]",
        "}",
    ]
