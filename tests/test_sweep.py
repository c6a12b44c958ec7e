"""Tests of sweeps: which runs start, which are not repeated, and the collected results of several
seeds."""

import json
import statistics
from functools import partial
from types import SimpleNamespace

import pytest
import yaml
from scipy.stats import ttest_1samp
from transformers import TrainingArguments

from modeling_uhop import SeparationCallback
from modeling_uhop.training import sweep as sweep_module
from modeling_uhop.training import train_command
from modeling_uhop.training.checkpoints import SEAL
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.intervals import paired_over_folds
from modeling_uhop.training.recipe import ROOT, load_recipe
from modeling_uhop.training.recipes import find_recipe
from modeling_uhop.training.report.tables import bags_table, paired_table, variants_table
from modeling_uhop.training.results import read_result
from modeling_uhop.training.sweep import execute, gather, lock_folder, read_sweep, runs_of
from tests.support.recipes import no_figures, no_reload, tiny_content


SCRIPT = """
import json, pathlib, sys
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
sets = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
folder, seed = pathlib.Path(value("--output_dir")), int(value("--seed"))
if "fail=true" in sets and seed == 1:
    sys.exit("no luck")
folder.mkdir(parents=True, exist_ok=True)
(folder / "calls").open("a").write("r" if "--resume" in arguments else "x")
error = {0: 0.5, 1: 0.25, 2: 0.375}[seed] - (0.1 * seed if "better=true" in sets else 0.0)
metrics = {"test_mse": error, "train_seconds": 1.0, "baselines": {"repeat": {"test_mse": 2.0}} if "baselines=true" in sets else {}}
recipe = {"name": "fake", "task": "series", "data": {"dataset": value("--data") if "--data" in arguments else "fake"}}
log = [{"epoch": 1.0, "eval_loss": 1.0 + seed}, {"epoch": 1.0, "loss": 3.0}, {"epoch": 2.0, "eval_loss": 0.5 + seed}]
content = {"schema": 1, "kind": "run", "name": "fake", "seed": seed, "metrics": metrics, "log_history": log}
content |= {"num_parameters": 1234, "recipe": recipe}
content |= {"versions": {}, "commit": "abd" if seed == 2 else "abc", "machine": "one core"}
(folder / "results.json").write_text(json.dumps(content))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a training script that finishes at once."""
    for folder in ("training", "configs", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "training" / "train.py").write_text(SCRIPT)
    (tmp_path / "configs" / "fake.yaml").write_text("task: series\ndata: {dataset: somewhere/ETTh1}\n")
    monkeypatch.setattr(sweep_module, "find_recipe", partial(find_recipe, folder=tmp_path / "configs"))
    monkeypatch.setattr(sweep_module, "__file__", str(tmp_path / "training" / "sweep.py"))
    return tmp_path


def write(project, **changes):
    content = {
        "recipes": ["fake"],
        "seeds": [0, 1, 2],
        "variants": {"plain": [], "better one": ["better=true"]},
        "once": ["baselines=true"],
        "metrics": ["test_mse"],
        "pairs": [["better one", "plain"]],
        "published": {"fake": {"theirs": {"test_mse": 0.9}}},
        **changes,
    }
    (project / "sweep.yaml").write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return project / "sweep.yaml"


def test_results_are_collected_with_spread_and_paired_intervals(project):
    sweep = read_sweep(write(project))
    runs = runs_of(sweep, "fake", project / "runs", None)
    execute(runs, jobs=2, cores=2)
    kind, gathered = gather(sweep, runs)
    assert kind == "seeds"
    plain = gathered["variants"]["plain"]["metrics"]["test_mse"]
    assert plain == {"mean": statistics.mean([0.5, 0.25, 0.375]), "std": statistics.stdev([0.5, 0.25, 0.375]), "values": [0.5, 0.25, 0.375]}
    (pair,) = gathered["paired"]
    assert pair["difference"] == pytest.approx(-0.1)
    low, high = ttest_1samp([0.0, -0.1, -0.2], 0.0).confidence_interval(0.95)
    assert pair["half_width"] == pytest.approx((high - low) / 2)
    assert gathered["baselines"] == {"repeat": {"test_mse": 2.0}}
    assert gathered["commit"] == "abc, abd"
    assert variants_table([gathered]).splitlines() == [
        "|  | parameters | test mse |",
        "| --- | --- | --- |",
        "| plain | 1,234 | 0.3750 ± 0.1250 |",
        "| better one | 1,234 | 0.2750 ± 0.1953 |",
        "| repeat |  | 2.0000 |",
        "| published: theirs |  | 0.9 |",
    ]
    # A baseline has no value of a metric that only variants have.
    gathered["baselines"] = {"repeat": {"test_mae": 2.0}}
    assert "| repeat |  |  |" in variants_table([gathered])
    assert paired_table([gathered]).splitlines()[2:] == [f"| better one vs. plain | -0.1000 ± {(high - low) / 2:.4f} |"]


def test_one_seed_has_no_spread(project):
    sweep = read_sweep(write(project, seeds=[0]))
    runs = runs_of(sweep, "fake", project / "runs", None)
    execute(runs, jobs=1, cores=2)
    kind, gathered = gather(sweep, runs)
    assert kind == "seeds"
    assert variants_table([gathered]).splitlines()[2:4] == ["| plain | 1,234 | 0.5000 |", "| better one | 1,234 | 0.5000 |"]


def test_curves_are_collected_by_epoch_and_seed(project):
    sweep = read_sweep(write(project, curves=["eval_loss"]))
    runs = runs_of(sweep, "fake", project / "runs", None)
    execute(runs, jobs=1, cores=2)
    expected = {"eval_loss": {"epoch": [1.0, 2.0], "values": [[1.0, 0.5], [2.0, 1.5], [3.0, 2.5]]}}
    assert [variant["curves"] for variant in gather(sweep, runs)[1]["variants"].values()] == [expected, expected]


def test_two_sweeps_of_a_recipe_do_not_share_a_results_file(project):
    path = write(project, suffix="_again", once=[])
    arguments = [str(path), "--runs", str(project / "runs"), "--results", str(project / "results")]
    sweep_module.main(arguments)
    assert [file.name for file in (project / "results").iterdir()] == ["fake_again.json"]
    written = read_result(project / "results" / "fake_again.json", "seeds")
    assert written["sweep"]["suffix"] == "_again"
    assert (written["commit"], written["machine"]) == ("abc, abd", "one core")


def test_a_second_simultaneous_sweep_in_a_folder_is_refused(project):
    path = write(project, once=[])
    arguments = [str(path), "--runs", str(project / "runs"), "--results", str(project / "results")]
    with lock_folder(project / "runs" / path.stem), pytest.raises(RecipeError, match=r"another sweep is running in .*runs"):
        sweep_module.main(arguments)
    assert not (project / "results").exists()
    sweep_module.main(arguments)
    assert (project / "results" / "fake.json").is_file()


def test_finished_runs_of_the_same_command_and_recipe_are_not_repeated(project):
    def calls():
        return [len((run.folder / "calls").read_text()) for run in runs]

    sweep = read_sweep(write(project))
    runs = runs_of(sweep, "fake", project / "runs", None)
    execute(runs, jobs=1, cores=2)
    execute(runs, jobs=1, cores=2)
    assert calls() == [1] * 6
    sweep = read_sweep(write(project, variants={"plain": ["new=1"], "better one": ["better=true"]}))
    runs = runs_of(sweep, "fake", project / "runs", None)
    execute(runs, jobs=1, cores=2)
    assert calls() == [2, 2, 2, 1, 1, 1]
    (project / "configs" / "fake.yaml").write_text("task: series\ndata: {dataset: somewhere/ETTh2}\n")
    execute(runs, jobs=1, cores=2)
    assert calls() == [3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize("left", [f"checkpoint-4/{SEAL}", "stages/training.json"])
def test_a_stopped_run_resumes_from_its_last_checkpoint(project, left):
    def calls():
        return (runs[1].folder / "calls").read_text()

    runs = runs_of(read_sweep(write(project, variants={"plain": []}, pairs=None)), "fake", project / "runs", None)
    execute(runs, jobs=1, cores=2)
    runs[1].folder.with_suffix(".done").unlink()
    execute(runs, jobs=1, cores=2)
    assert calls() == "xx"
    (runs[1].folder / left).parent.mkdir()
    (runs[1].folder / left).touch()
    runs[1].folder.with_suffix(".done").unlink()
    execute(runs, jobs=1, cores=2)
    assert calls() == "xxr"
    # A run of another recipe starts from the beginning.
    (project / "configs" / "fake.yaml").write_text("task: series\ndata: {dataset: somewhere/ETTh2}\n")
    execute(runs, jobs=1, cores=2)
    assert calls() == "xxrx"


@pytest.mark.parametrize(("jobs", "cores"), [(1, 4), (2, 5), (4, 4)])
def test_runs_share_the_cores(project, jobs, cores):
    script = project / "training" / "train.py"
    script.write_text(f"import os\n{SCRIPT}\n(folder / 'threads').write_text(os.environ['OMP_NUM_THREADS'])\n")
    runs = runs_of(read_sweep(write(project)), "fake", project / "runs", None)
    execute(runs, jobs=jobs, cores=cores)
    assert {(run.folder / "threads").read_text() for run in runs} == {str(cores // jobs)}


def test_a_failed_run_is_named_and_the_others_are_run(project):
    sweep = read_sweep(write(project, variants={"plain": ["fail=true"]}, pairs=None))
    runs = runs_of(sweep, "fake", project / "runs", None)
    with pytest.raises(RecipeError, match=r"1 of 3 runs failed; see .*seed_1.log"):
        execute(runs, jobs=1, cores=2)
    assert (runs[2].folder / "results.json").is_file()
    assert "no luck" in runs[1].folder.with_suffix(".log").read_text()


def test_results_of_an_earlier_or_failed_run_are_not_used_as_new(project):
    sweep = read_sweep(write(project, variants={"plain": []}, pairs=None))
    execute(runs_of(sweep, "fake", project / "runs", None), jobs=1, cores=2)
    sweep = read_sweep(write(project, variants={"plain": ["fail=true"]}, pairs=None))
    for _ in range(2):
        with pytest.raises(RecipeError, match="1 of 3 runs failed"):
            execute(runs_of(sweep, "fake", project / "runs", None), jobs=1, cores=2)


def test_a_local_data_set_is_found_by_its_name(project):
    sweep = read_sweep(write(project))
    with pytest.raises(RecipeError, match="no folder or file ETTh1"):
        runs_of(sweep, "fake", project / "runs", str(project / "data"))
    (project / "data" / "ETTh1.csv").write_text("")
    runs = runs_of(sweep, "fake", project / "runs", str(project / "data"))
    execute(runs[:1], jobs=1, cores=2)
    assert json.loads((runs[0].folder / "results.json").read_text())["recipe"]["data"]["dataset"] == str(project / "data" / "ETTh1.csv")


def test_a_sweep_takes_a_recipe_of_ones_own(project):
    mine = project / "mine.yaml"
    mine.write_text((project / "configs" / "fake.yaml").read_text())
    (run,) = runs_of(read_sweep(write(project, recipes=[str(mine)], seeds=[0], variants={"plain": []}, pairs=[])), str(mine), project, None)
    assert run.command[2] == str(mine)
    assert run.folder == project / "mine" / "plain" / "seed_0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed' in sweep; the nearest valid one is 'seeds'"),
        ({"seeds": None}, "a sweep needs seeds"),
        ({"variants": {"a b": [], "a_b": []}, "pairs": None}, "differ in more than spaces"),
        ({"pairs": [["plain", "best"]]}, "got 'best'"),
        ({"script": "train_vit"}, "unknown key 'script' in sweep"),
    ],
)
def test_wrong_sweeps_are_refused(project, changes, message):
    with pytest.raises(RecipeError, match=message):
        read_sweep(write(project, **changes))


@pytest.fixture
def bags(tmp_path, monkeypatch):
    """A project with a recipe of bags, whose runs are calls in this process; the list gets the arguments of each."""
    calls: list[list[str]] = []

    def called(command, **options):
        calls.append(command[2:])
        train_command.main(command[2:])
        return SimpleNamespace(returncode=0)

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(yaml.safe_dump(tiny_content("bags")))
    monkeypatch.setattr(sweep_module, "find_recipe", partial(find_recipe, folder=tmp_path / "configs"))
    monkeypatch.setattr(sweep_module, "subprocess", SimpleNamespace(run=called, STDOUT=None))
    no_reload(monkeypatch)
    no_figures(monkeypatch)
    return calls


@pytest.mark.trains
def test_bags_are_compared_on_the_same_folds(tmp_path, bags):
    baseline = "mean, logistic regression"
    content = {
        "recipes": ["tiny"],
        "seeds": [0],
        "overrides": ["repeats=2", "training.num_train_epochs=1"],
        "variants": {"dense": ["model.use_feature_map=false", "separation=null"], "untrained Phi": ["separation=null"]},
        "once": [f'baselines=["{baseline}"]'],
        "pairs": [["untrained Phi", "dense"], ["dense", baseline]],
        "published": {"tiny": {"somebody": "0.9"}},
    }
    path, target = tmp_path / "mil.yaml", tmp_path / "results" / "tiny.json"
    arguments = [str(path), "--runs", str(tmp_path / "runs"), "--results", str(target.parent)]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    sweep_module.main(arguments)
    first = read_result(target, "folds")
    assert first["parameters"]["untrained Phi"] > first["parameters"]["dense"]
    assert list(first["results"]) == ["dense", "untrained Phi", baseline]
    runs = {
        name: read_result(tmp_path / "runs" / "mil" / "tiny" / name / "seed_0" / "results.json", "run")
        for name in ("dense", "untrained_Phi")
    }
    outcomes = [runs["dense"]["outcomes"], runs["untrained_Phi"]["outcomes"], runs["dense"]["baselines"][baseline]]
    for result, own in zip(first["results"].values(), outcomes, strict=True):
        assert len(result["auc"]["by_repeat"]) == 2
        by_fold = [[outcome["auc"] for outcome in own if outcome["repeat"] == repeat] for repeat in range(2)]
        assert result["auc_by_fold"] == by_fold
        assert result["auc"]["mean"] == pytest.approx(statistics.mean(value for fold in by_fold for value in fold))
    assert first["results"]["dense"]["seconds"] == runs["dense"]["metrics"]["cross_validation_seconds"]
    assert "seconds" not in first["results"][baseline]
    scores = [[outcome["auc"] for outcome in own] for own in outcomes]
    sizes = [len(outcome["bags"]) for outcome in outcomes[0]], [outcome["trained_on"] for outcome in outcomes[0]]
    for pair, (one, other) in zip(first["paired"], ((1, 0), (0, 2)), strict=True):
        expected = paired_over_folds(scores[one], scores[other], *sizes)
        assert (pair["difference"], pair["half_width"]) == pytest.approx(tuple(expected))
    assert "| published: somebody | 0.9 |" in bags_table([first])
    # Finished runs are not repeated.
    count = len(bags)
    sweep_module.main(arguments)
    assert len(bags) == count == 2
    assert read_result(target)["results"] == first["results"]
    content["variants"]["dense"].append("model.hidden_size=4")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    sweep_module.main(arguments)
    assert len(bags) == 3
    assert read_result(target)["parameters"]["dense"] < first["parameters"]["dense"]
    content["variants"]["untrained Phi"].append("folds=3")
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(RecipeError, match="variant 'untrained Phi' must not change folds"):
        sweep_module.main(arguments)
    content["once"] = ["baselines=[nope]"]
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(RecipeError, match=r"baselines must be among .* got 'nope'"):
        sweep_module.main(arguments)


SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.trains
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_variant_of_every_sweep_is_a_recipe(path):
    sweep = read_sweep(path)
    for name in sweep["recipes"]:
        seen = []
        for overrides in sweep["variants"].values():
            recipe = load_recipe(ROOT / "configs" / f"{name}.yaml", [*sweep["overrides"], *overrides])
            config = recipe.config_class(**recipe.model)
            assert recipe.separation is None or config.use_feature_map or recipe.separation["parameters"] == "upstream"
            SeparationCallback(**(recipe.separation or {}))
            TrainingArguments("out", **{"eval_strategy": "epoch", **recipe.training})
            # A variant of a choice for several recipes of bags may be what one of them has.
            assert recipe not in seen or path.stem == "mil_choice", "two variants are the same"
            seen.append(recipe)
        load_recipe(ROOT / "configs" / f"{name}.yaml", [*sweep["overrides"], *sweep["once"]])
    # The recipe of the first variant is recorded in the results file and has a card; that of bags
    # may change the model.
    assert sweep["suffix"] or not next(iter(sweep["variants"].values())) or recipe.task == "bags"
    header = path.read_text()
    assert all(word in header for word in ("# Command:", "# Cost:"))
