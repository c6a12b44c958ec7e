"""Tests of sweeps: which runs start, which are not repeated, and the collected results of several
seeds."""

import json
import statistics

import pytest
import yaml
from scipy.stats import ttest_1samp
from transformers import TrainingArguments

from modeling_uhop import SeparationCallback
from modeling_uhop.training import sweep as sweep_module
from modeling_uhop.training.checkpoints import SEAL
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.recipe import ROOT, load_recipe, read_yaml
from modeling_uhop.training.report.tables import paired_table, variants_table
from modeling_uhop.training.sweep import execute, gather, lock_folder, read_sweep, runs_of
from modeling_uhop.training.tasks.images import ImagesRecipe
from modeling_uhop.training.tasks.series import SeriesRecipe


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
recipe = {"name": "fake", "data": {"dataset": value("--dataset") if "--dataset" in arguments else "fake"}}
log = [{"epoch": 1.0, "eval_loss": 1.0 + seed}, {"epoch": 1.0, "loss": 3.0}, {"epoch": 2.0, "eval_loss": 0.5 + seed}]
content = {"metrics": metrics, "log_history": log, "num_parameters": 1234, "recipe": recipe}
content |= {"versions": {}, "commit": "abd" if seed == 2 else "abc", "machine": "one core"}
(folder / "results.json").write_text(json.dumps(content))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a training script that finishes at once."""
    for folder in ("training", "configs", "data"):
        (tmp_path / folder).mkdir()
    (tmp_path / "training" / "fake.py").write_text(SCRIPT)
    (tmp_path / "configs" / "fake.yaml").write_text("data: {dataset: somewhere/ETTh1}\n")
    monkeypatch.setattr(sweep_module, "ROOT", tmp_path)
    return tmp_path


def write(project, **changes):
    content = {
        "script": "fake",
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
    gathered = gather(sweep, "fake", runs)
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
    assert paired_table([gathered]).splitlines()[2:] == [f"| better one vs. plain | -0.1000 ± {(high - low) / 2:.4f} |"]


def test_one_seed_has_no_spread(project):
    sweep = read_sweep(write(project, seeds=[0]))
    runs = runs_of(sweep, "fake", project / "runs", None)
    execute(runs, jobs=1, cores=2)
    gathered = gather(sweep, "fake", runs)
    assert variants_table([gathered]).splitlines()[2:4] == ["| plain | 1,234 | 0.5000 |", "| better one | 1,234 | 0.5000 |"]


def test_curves_are_collected_by_epoch_and_seed(project):
    sweep = read_sweep(write(project, curves=["eval_loss"]))
    runs = runs_of(sweep, "fake", project / "runs", None)
    execute(runs, jobs=1, cores=2)
    expected = {"eval_loss": {"epoch": [1.0, 2.0], "values": [[1.0, 0.5], [2.0, 1.5], [3.0, 2.5]]}}
    assert [variant["curves"] for variant in gather(sweep, "fake", runs)["variants"].values()] == [expected, expected]


def test_two_sweeps_of_a_recipe_do_not_share_a_results_file(project, monkeypatch):
    path = write(project, suffix="_again", once=[])
    monkeypatch.setattr("sys.argv", ["sweep", str(path), "--runs", str(project / "runs"), "--results", str(project / "results")])
    sweep_module.main()
    assert [file.name for file in (project / "results").iterdir()] == ["fake_again.json"]


def test_a_second_simultaneous_sweep_in_a_folder_is_refused(project, monkeypatch):
    path = write(project, once=[])
    monkeypatch.setattr("sys.argv", ["sweep", str(path), "--runs", str(project / "runs"), "--results", str(project / "results")])
    with lock_folder(project / "runs" / path.stem), pytest.raises(SystemExit, match=r"another sweep is running in .*runs"):
        sweep_module.main()
    assert not (project / "results").exists()
    sweep_module.main()
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
    (project / "configs" / "fake.yaml").write_text("data: {dataset: somewhere/ETTh2}\n")
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
    (project / "configs" / "fake.yaml").write_text("data: {dataset: somewhere/ETTh2}\n")
    execute(runs, jobs=1, cores=2)
    assert calls() == "xxrx"


@pytest.mark.parametrize(("jobs", "cores"), [(1, 4), (2, 5), (4, 4)])
def test_runs_share_the_cores(project, jobs, cores):
    script = project / "training" / "fake.py"
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed' in sweep; the nearest valid one is 'seeds'"),
        ({"seeds": None}, "a sweep needs seeds"),
        ({"variants": {"a b": [], "a_b": []}, "pairs": None}, "differ in more than spaces"),
        ({"pairs": [["plain", "best"]]}, "got 'best'"),
    ],
)
def test_wrong_sweeps_are_refused(project, changes, message):
    with pytest.raises(RecipeError, match=message):
        read_sweep(write(project, **changes))


SWEEPS = [path for path in sorted((ROOT / "configs" / "sweeps").glob("*.yaml")) if "script" in read_yaml(path)]
CLASSES = {"train_vit": ImagesRecipe, "train_stanhop": SeriesRecipe}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_variant_of_every_sweep_is_a_recipe(path):
    sweep = read_sweep(path)
    for name in sweep["recipes"]:
        seen = []
        for overrides in sweep["variants"].values():
            recipe = load_recipe(ROOT / "configs" / f"{name}.yaml", [*sweep["overrides"], *overrides], CLASSES[sweep["script"]])
            config = recipe.config_class(**recipe.model)
            assert recipe.separation is None or config.use_feature_map or recipe.separation["parameters"] == "upstream"
            SeparationCallback(**(recipe.separation or {}))
            TrainingArguments("out", **{"eval_strategy": "epoch", **recipe.training})
            assert recipe not in seen, "two variants are the same"
            seen.append(recipe)
    # The recipe of the first variant is recorded in the results file and has a card.
    assert sweep["suffix"] or not next(iter(sweep["variants"].values()))
    header = path.read_text()
    assert all(word in header for word in ("# Command:", "# Cost:"))
