"""Tests of what every task has from the engine: outputs, resumed runs, folders, options, commands."""

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.metrics import f1_score, roc_auc_score
from transformers import Trainer

from modeling_uhop import STanHopForPrediction, UHopMILFeatureExtractor, UHopMILForBagClassification, UHopViTForImageClassification
from modeling_uhop.training import cli, engine, train_command
from modeling_uhop.training.data.series import synthetic_series
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.evaluation import evaluate
from modeling_uhop.training.recipe import load_recipe
from modeling_uhop.training.results import as_recorded
from modeling_uhop.training.run_folder import RunFolder
from modeling_uhop.training.tasks.bags import BagClassification
from modeling_uhop.training.train_command import training_options
from tests.support.recipes import (
    DRAWING,
    FIGURES,
    MODULES,
    NO_DROPOUT,
    TASKS,
    loaded,
    no_figures,
    no_reload,
    results_of,
    tiny,
    tiny_content,
    without_times,
)


pytestmark = pytest.mark.trains
MODELS: dict[str, Any] = {"images": UHopViTForImageClassification, "bags": UHopMILForBagClassification, "series": STanHopForPrediction}
CODE = {"images": "modeling_uhop_vit.py", "bags": "modeling_uhop_mil.py", "series": "modeling_stanhop.py"}
# The metrics of each task besides those of every training.
METRICS = {
    "images": {"test_accuracy", "test_loss", "validation_accuracy", "validation_loss", "max_train_accuracy"},
    "bags": {"auc", "accuracy", "f1", "cross_validation_seconds"},
    "series": {"test_mse", "test_mae", "validation_mse", "validation_mae", "validation_loss", "baselines", "best_step"},
}
OF_TRAINING = {"last_step", "train_seconds", "separation_loss_before", "separation_loss"}
DETAILS = {"images": set(), "bags": {"outcomes", "baselines"}, "series": {"series"}}
RESULTS = {"schema", "kind", "name", "metrics", "seed", "recipe", "versions", "commit", "machine", "code", "num_parameters", "log_history"}
# Steps that the cross-validation of bags takes after the training: two folds of two epochs of two batches.
FOLD_STEPS = {"images": 0, "bags": 8, "series": 0}
# Training ends before its last step.
EVERY_SECOND = [f"training.{kind}_{setting}" for kind in ("eval", "save") for setting in ("strategy=steps", "steps=2")]
EARLY = ("patience=2", "training.max_steps=40", *EVERY_SECOND)
RATES = {"images": 0.5, "bags": 0.5, "series": 3.0}

each_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture(scope="module", params=TASKS)
def finished(request, tmp_path_factory):
    """A run by the command: its task, its folder, what it printed, and what its reload check was given."""
    root = tmp_path_factory.mktemp(request.param)
    (root / "tiny.yaml").write_text(yaml.safe_dump(tiny_content(request.param)))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        (checked,) = _train(patch, root / "tiny.yaml", "--output_dir", root / "run")
    return request.param, root / "run", printed.getvalue(), checked


@pytest.fixture
def quick(monkeypatch):
    """No reload checks in new processes, and no figures."""
    no_figures(monkeypatch)
    return no_reload(monkeypatch)


def _train(patch, *arguments) -> list[tuple]:
    skipped = no_reload(patch)
    cli.main(["train", *map(str, arguments)])
    return skipped


class Steps:
    """Counts the supervised steps of all Trainers; `fault` is called before step `at`."""

    def __init__(self, patch, at=None, fault=None):
        self.count, step = 0, Trainer.training_step

        def counted(trainer, *arguments, **options):
            self.count += 1
            if self.count == at:
                fault()
            return step(trainer, *arguments, **options)

        patch.setattr(Trainer, "training_step", counted)


def raising(*arguments, **options):
    raise ValueError("no luck")


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_run_saves_all_its_outputs(finished):
    task, folder, printed, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json", CODE[task], "results.json", "recipe.yaml", "README.md", *FIGURES[task]}
    assert ("preprocessor_config.json" in names) == (task != "series")
    assert not {"probe.npz", "scratch"} & names
    results = results_of(folder)
    assert set(results) == RESULTS | DETAILS[task]
    assert (results["kind"], results["name"], results["seed"]) == ("run", "tiny", 0)
    assert set(results["metrics"]) == METRICS[task] | OF_TRAINING
    assert results["metrics"]["last_step"] == 6
    assert results["metrics"]["separation_loss"] != results["metrics"]["separation_loss_before"]
    assert results["recipe"]["task"] == task
    assert as_recorded(tiny(task)) == results["recipe"]
    assert load_recipe(folder / "recipe.yaml") == tiny(task)
    assert results["num_parameters"] == MODELS[task].from_pretrained(folder).num_parameters()
    card = (folder / "README.md").read_text()
    assert all(figure in card and (folder / figure).stat().st_size > 5_000 for figure in FIGURES[task])
    assert ModelCard(card).data.to_dict()["library_name"] == "transformers"
    assert printed.startswith("tiny: ")
    assert f"Results ({folder / 'results.json'})" in printed


def test_a_saved_model_gives_the_answers_of_the_run(finished):
    task, folder, _, (checked, pipeline, inputs, answers) = finished
    assert (checked, pipeline) == (folder, loaded(tiny(task)).pipeline)
    np.testing.assert_allclose(_answers(task, folder, inputs), answers, atol=1e-5)


@torch.no_grad()
def _answers(task: str, folder: Path, inputs: Any) -> np.ndarray:
    """The first output of the saved model for inputs of `check_reload`."""
    model = MODELS[task].from_pretrained(folder).eval()
    processor = loaded(tiny(task))
    given: Any
    if task == "bags":
        given = UHopMILFeatureExtractor.from_pretrained(folder)(inputs, return_tensors="pt")
    elif task == "images":
        given = processor.processor(inputs, return_tensors="pt")
    else:
        given = {name: torch.from_numpy(values) for name, values in inputs.items()}
    outputs = model(**given)
    return (outputs.prediction_outputs if task == "series" else outputs.logits).float().numpy()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path, quick, monkeypatch):
    task, folder, *_ = finished
    for seed in (0, 1):
        engine.run(tiny(task, f"seed={seed}"), tmp_path / str(seed))
    first, second = (without_times(results_of(each)) for each in (folder, tmp_path / "0"))
    assert {**first, "commit": None} == {**second, "commit": None}
    assert _weights(tmp_path / "0") == _weights(folder) != _weights(tmp_path / "1")


@each_task
def test_a_stopped_training_resumes_and_each_later_step_is_repeated_alone(task, tmp_path, quick, monkeypatch):
    recipe, whole, folder = tiny(task, "training.save_strategy=epoch"), tmp_path / "whole", tmp_path / "broken"
    expected = engine.run(recipe, whole)
    with monkeypatch.context() as patch:
        Steps(patch, at=5, fault=raising)
        with pytest.raises(ValueError, match="no luck"):
            engine.run(recipe, folder)
    found = []
    later = {"write_results": engine, DRAWING[task][0]: MODULES[task], "write_card": engine, "check_reload": engine}
    for name, module in later.items():
        with monkeypatch.context() as patch:
            steps = Steps(patch)
            patch.setattr(*((f"{module}.{name}",) if isinstance(module, str) else (module, name)), raising)
            with pytest.raises(ValueError, match="no luck"):
                engine.run(recipe, folder, "resume")
        # The run was stopped in its fifth step, after a checkpoint at the third.
        assert steps.count == (3 + FOLD_STEPS[task] if name == "write_results" else 0), name
        assert (folder / "README.md").exists() == (name == "check_reload")
        if name != "write_results":
            found.append(without_times(results_of(folder)))
    with pytest.raises(RecipeError, match="--resume to continue it"):
        engine.run(recipe, folder)
    resumed = engine.run(recipe, folder, "resume")
    assert "train_seconds" not in resumed
    assert without_times(resumed) == without_times(expected)
    assert found == [without_times(results_of(folder))] * 3
    assert _weights(folder) == _weights(whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    first, second = ((each / "stages" / "training.json").read_text() for each in (whole, folder))
    assert json.loads(first)["outcome"]["history"] == json.loads(second)["outcome"]["history"]


@each_task
def test_a_folder_is_never_mixed_or_deleted_by_mistake(task, tmp_path):
    folder, recipe = tmp_path / "run", tiny(task)
    with pytest.raises(RecipeError, match="nothing to resume"):
        engine.run(recipe, folder, "resume")
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    for mode, message in (("fresh", "is not empty; pass --overwrite"), ("overwrite", "no earlier run"), ("resume", "no earlier run")):
        with pytest.raises(RecipeError, match=message):
            engine.run(recipe, folder, mode)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("thesis.txt", "precious")]


@pytest.mark.parametrize(
    "override",
    ["model.alpha=3", "model.use_feature_map=3", "data.dataset=./nowhere", "separation.schedule=now", "training.optim=no"],
)
@each_task
def test_an_earlier_run_survives_a_wrong_recipe(task, override, tmp_path):
    RunFolder(tmp_path, tiny(task)).write_recipe()
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(Exception, match=rf"(?s){override.partition('=')[2]}"):
        engine.run(tiny(task, override), tmp_path, "overwrite")
    assert (tmp_path / "model.safetensors").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "recipe.yaml"}


@pytest.mark.parametrize("override", ["model.alpha=2", "separation.steps=5", "seed=5", "patience=7", "evaluation.split=validation"])
@each_task
def test_a_run_is_not_resumed_with_another_recipe(task, override, tmp_path):
    RunFolder(tmp_path, tiny(task)).write_recipe()
    section = override.partition("=")[0].partition(".")[0]
    with pytest.raises(RecipeError, match=rf"was started with {section}=.* and cannot be resumed with {section}="):
        engine.run(tiny(task, override), tmp_path, "resume")


@each_task
def test_a_finished_run_is_trained_longer_if_its_task_allows_it(task, tmp_path, quick):
    saved = "training.save_strategy=epoch"
    engine.run(tiny(task, saved), tmp_path / "run")
    longer = tiny(task, saved, "training.num_train_epochs=3")
    if task == "bags":
        # Its folds would be of two recipes.
        with pytest.raises(RecipeError, match="cannot be resumed with training="):
            engine.run(longer, tmp_path / "run", "resume")
        return
    assert engine.run(longer, tmp_path / "run", "resume")["last_step"] == 9
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == longer
    assert results_of(tmp_path / "run")["recipe"]["training"]["num_train_epochs"] == 3


@pytest.mark.parametrize("task", ["images", "series"])
def test_a_finished_run_keeps_its_recipe_if_no_step_is_left(task, tmp_path, quick):
    saved = "training.save_strategy=epoch"
    engine.run(tiny(task, saved), tmp_path / "run")
    before = results_of(tmp_path / "run")
    with pytest.raises(RecipeError, match="is finished at step 6, so that its recipe cannot change"):
        engine.run(tiny(task, saved, "training.learning_rate=0.5"), tmp_path / "run", "resume")
    assert results_of(tmp_path / "run") == before
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == tiny(task, saved)


def test_a_checkpoint_at_the_end_of_an_epoch_is_written_after_the_evaluation(tmp_path, quick, monkeypatch):
    """An evaluation draws random numbers, which a run that resumes from before it would not draw."""
    recipe = tiny("images", "training.save_strategy=steps", "training.save_steps=3", "model.hidden_dropout_prob=0.3")
    engine.run(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        Steps(patch, at=5, fault=raising)
        with pytest.raises(ValueError, match="no luck"):
            engine.run(recipe, tmp_path / "stopped")
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-3"]
    engine.run(recipe, tmp_path / "stopped", "resume")
    assert _weights(tmp_path / "stopped") == _weights(tmp_path / "whole")


def test_a_forecaster_is_evaluated_only_on_its_own_series(tmp_path, quick):
    engine.run(tiny("series"), tmp_path / "run")
    frame = synthetic_series()
    first, second, *others = [name for name in frame.columns if name != "date"]
    frame[["date", second, first, *others]].to_csv(tmp_path / "swapped.csv", index=False)
    with pytest.raises(RecipeError, match=r"was trained on the series .*, but the data have"):
        evaluate(tmp_path / "run", str(tmp_path / "swapped.csv"))


def _without_test_data(task: str, patch) -> None:
    """Make the test data of a tiny recipe unreadable."""
    if task == "images":
        from modeling_uhop.training.data.images import load_images

        def without_test(data, test=True):
            assert not test, "the test images were asked for"
            images = load_images(data, test=False)
            images.pop("test", None)
            return images

        patch.setattr(f"{MODULES[task]}.load_images", without_test)
    elif task == "bags":
        # What is a test bag depends on the fold.
        test_bags = [test for _, test in loaded(tiny(task)).splits(0)]
        compute = BagClassification.fold_outcome

        def without_bags(self, folder, name, repeat, fold, *part):
            whole = self.bags
            hidden = set(test_bags[fold].tolist())
            instances = [bag * np.nan if index in hidden else bag for index, bag in enumerate(whole.instances)]
            labels = np.array([1 - label if index in hidden else label for index, label in enumerate(whole.labels)])
            self.bags = replace(whole, instances=instances, labels=labels)
            outcome = compute(self, folder, name, repeat, fold, *part)
            self.bags = whole
            assert not hidden & set(outcome["bags"])
            return outcome

        patch.setattr(BagClassification, "fold_outcome", without_bags)
    else:
        from modeling_uhop.training.data.series import load_series

        def without_rows(data):
            series = load_series(data)
            series.values[slice(*series.rows.pop("test"))] = torch.nan
            return series

        patch.setattr(f"{MODULES[task]}.load_series", without_rows)


@each_task
def test_a_validation_run_never_reads_the_test_data(task, tmp_path, quick, monkeypatch):
    recipe = tiny(task, "evaluation.split=validation")
    expected = engine.run(recipe, tmp_path / "read")
    with monkeypatch.context() as patch:
        _without_test_data(task, patch)
        metrics = engine.run(recipe, tmp_path / "run")
    assert without_times(metrics) == without_times(expected)
    assert set(metrics) == {name for name in METRICS[task] | OF_TRAINING if not name.startswith("test_")}
    assert "test_" not in json.dumps(metrics)
    assert not (tmp_path / "run" / "README.md").exists()
    assert all((tmp_path / "run" / figure).is_file() for figure in FIGURES[task])


@each_task
def test_training_ends_early_with_the_best_checkpoint_also_if_it_was_stopped(task, tmp_path, quick, monkeypatch):
    recipe = tiny(task, *EARLY, f"training.learning_rate={RATES[task]}")
    expected = engine.run(recipe, tmp_path / "whole")
    monitored = "eval_validation_loss" if task == "images" else "eval_loss"
    losses = [entry[monitored] for entry in results_of(tmp_path / "whole")["log_history"] if monitored in entry]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2 < 20
    assert (expected["best_step"], expected["last_step"]) == (2 * (best + 1), 2 * len(losses))
    with safe_open(tmp_path / "whole" / f"checkpoint-{expected['best_step']}" / "model.safetensors", "pt") as kept:
        saved = load_file(tmp_path / "whole" / "model.safetensors")
        assert all(torch.equal(kept.get_tensor(name), weight) for name, weight in saved.items())
    # The run is stopped while its patience is counted: one evaluation after the best one.
    with monkeypatch.context() as patch:
        Steps(patch, at=expected["best_step"] + 4, fault=raising)
        with pytest.raises(ValueError, match="no luck"):
            engine.run(recipe, tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(engine.task_class_of(task), "evaluate", raising)
        steps = Steps(patch)
        with pytest.raises(ValueError, match="no luck"):
            engine.run(recipe, tmp_path / "broken", "resume")
    assert steps.count == 2
    resumed = engine.run(recipe, tmp_path / "broken", "resume")
    assert without_times(resumed) == without_times(expected)
    assert _weights(tmp_path / "broken") == _weights(tmp_path / "whole")


@each_task
def test_half_precision_wrappers_are_removed_before_the_reload_check(task, tmp_path, quick, monkeypatch):
    engine.run(tiny(task, "training.bf16=true"), tmp_path / "run")
    ((folder, _, inputs, answers),) = quick
    np.testing.assert_allclose(_answers(task, folder, inputs), answers, atol=1e-5)


@each_task
def test_a_step_out_of_memory_is_repeated_with_fewer_examples_and_without_another_separation(task, tmp_path, quick, monkeypatch):
    def full():
        raise RuntimeError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        Steps(patch, at=1, fault=full)
        metrics = engine.run(tiny(task, *NO_DROPOUT[task], "training.auto_find_batch_size=true"), tmp_path / "run")
    # accelerate takes nine tenths of the examples.
    size = int(0.9 * tiny(task).training["per_device_train_batch_size"])
    expected = engine.run(tiny(task, *NO_DROPOUT[task], f"training.per_device_train_batch_size={size}"), tmp_path / "fewer")
    first, second = (json.loads((tmp_path / name / "stages" / "training.json").read_text())["outcome"] for name in ("fewer", "run"))
    assert len(first["history"]) == 2
    assert first["history"] == second["history"]
    assert first["state"]["train_batch_size"] == second["state"]["train_batch_size"] == size
    assert _weights(tmp_path / "run") == _weights(tmp_path / "fewer")
    if task != "bags":
        assert without_times(metrics) == without_times(expected)


@each_task
def test_losses_are_logged_for_tensorboard(task, tmp_path, quick, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    engine.run(tiny(task, "training.report_to=tensorboard"), tmp_path / "run")
    # An evaluation after the training has a file of its own.
    (folder,) = {file.parent for file in (tmp_path / "run").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = [entry["loss"] for entry in results_of(tmp_path / "run")["log_history"] if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)


@each_task
def test_an_interrupted_command_says_how_to_continue(task, tmp_path, quick, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_content(task, "training.save_strategy=epoch")))
    for step, hint in ((2, "nothing in .*run can be resumed"), (5, "continue with --resume")):
        with monkeypatch.context() as patch:
            Steps(patch, at=step, fault=interrupt)
            with pytest.raises(SystemExit) as stopped:
                _train(patch, tmp_path / "tiny.yaml", "--output_dir", tmp_path / "run", "--overwrite")
        assert stopped.value.code == 130
        assert re.search(f"interrupted; {hint}", capsys.readouterr().err)
    _train(monkeypatch, tmp_path / "tiny.yaml", "--output_dir", tmp_path / "run", "--resume")
    assert results_of(tmp_path / "run")["metrics"]["last_step"] == 6


@pytest.fixture
def recipes(monkeypatch):
    """The recipes that a command would run, and their folders and modes."""
    given: list[tuple] = []
    monkeypatch.setattr(engine, "run", lambda *arguments: given.append(arguments))
    return given


@each_task
def test_options_of_the_command_change_the_recipe(task, tmp_path, recipes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = tiny_content(task)
    del content["name"]
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    cli.main(["train", "mine.yaml"])
    options = ["--learning_rate", "1e-4", "--bf16", "--max-steps=7", "--seed", "3", "--set", "model.alpha=2.0"]
    cli.main(["train", "mine.yaml", *options, "--data", "elsewhere", "--output_dir", "out", "--resume"])
    cli.main(["train", "mine.yaml", "--lr_scheduler_kwargs", "{min_lr: 0.1}", "--overwrite"])
    (plain, folder, mode), (changed, *where), (third, *again) = recipes
    assert (plain.name, plain.seed, folder, mode) == ("mine", 0, Path("runs/mine"), "fresh")
    assert changed.training == {**plain.training, "learning_rate": 1e-4, "bf16": True, "max_steps": 7}
    assert (changed.seed, changed.model["alpha"], changed.data.dataset) == (3, 2.0, "elsewhere")
    assert where == [Path("out"), "resume"]
    assert third.training["lr_scheduler_kwargs"] == {"min_lr": 0.1}
    assert again == [Path("runs/mine"), "overwrite"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "name.foo=1"], "name is 'tiny' and has no field 'foo', in the override 'name.foo=1'"),
        (["--set", "training.lr=1"], "unknown key 'lr' in training; the nearest valid one is 'learning_rate'"),
        (["--lr", "1"], "unknown key 'lr' in the options; the nearest valid one is 'learning_rate'"),
        (["--epochs", "1"], "unknown key 'epochs' in the options; .* 'num_train_epochs'"),
        (["--learning_rat", "1"], "unknown key 'learning_rat' in the options; .* 'learning_rate'"),
        (["--seeed", "1"], "unknown key 'seeed' in the options; .* 'seed'"),
        (["--learning_rate"], "--learning_rate needs a value, such as --learning_rate=1"),
        (["--set", "training.learning_rate"], "must look like"),
        (["--set", "task=null"], r"a recipe needs task: .*images.*, got None"),
        (["--set", "task=sounds"], r"a recipe needs task: .*, got 'sounds'"),
        (["--set", "evaluation.split=train"], "evaluation.split must be 'test' or 'validation', got 'train'"),
        (["--set", "evaluation.slit=test"], "unknown key 'slit' in evaluation; the nearest valid one is 'split'"),
        (["--set", "evaluate_on=test"], "'evaluate_on' in recipe is now called 'evaluation'"),
        (["--set", "training.output_dir=x"], "training.output_dir cannot be set in a recipe; use .* --output_dir"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@each_task
def test_wrong_options_are_refused_in_one_line(task, options, message, tmp_path, recipes):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_content(task)))
    with pytest.raises(SystemExit) as refused:
        cli.main(["train", str(tmp_path / "tiny.yaml"), *options])
    assert re.match(rf"RecipeError: .*{message}", str(refused.value.code))
    assert "\n" not in str(refused.value.code)
    assert not recipes


def test_a_recipe_without_a_task_is_refused_with_the_choices(tmp_path):
    content = tiny_content("images")
    del content["task"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match="a recipe needs task: ") as refused:
        load_recipe(tmp_path / "r.yaml")
    assert all(task in str(refused.value) for task in TASKS)


def test_a_command_without_a_recipe_is_refused(recipes):
    for arguments in ([], ["--task", "images"], ["--data", "digits"]):
        with pytest.raises(SystemExit, match="RecipeError: give a recipe, or --task and --data"):
            cli.main(["train", *arguments])
    assert not recipes


def test_a_second_recipe_is_refused(recipes, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["train", "vit_digits", "mil_digits"])
    assert refused.value.code == 2
    assert "unrecognized arguments: mil_digits" in capsys.readouterr().err
    assert not recipes


@pytest.mark.parametrize(
    ("given", "own", "overrides"),
    [
        (["--bf16"], [], ["bf16=true"]),
        (["--bf16", "r.yaml", "--max-steps", "3"], ["r.yaml"], ["bf16=true", "max_steps=3"]),
        (["--warmup_steps=0.1", "--bf16", "false", "r.yaml"], ["r.yaml"], ["warmup_steps=0.1", "bf16=false"]),
        (["r.yaml", "--learning_rate", "-1"], ["r.yaml"], ["learning_rate=-1"]),
        (["r.yaml", "--seed", "3", "--resume"], ["r.yaml", "--seed", "3", "--resume"], []),
        (["--set", "seed=1", "--use_cpu", "--set=name=a"], ["--set", "seed=1", "--set=name=a"], ["use_cpu=true"]),
        ([], [], []),
    ],
)
def test_options_of_the_trainer_become_overrides(given, own, overrides):
    assert training_options(given, train_command.parser()) == (own, [f"training.{each}" for each in overrides])


def _evaluated(capsys, *arguments) -> dict:
    cli.main(["evaluate", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


def test_a_finished_run_is_evaluated_again(finished, capsys):
    task, folder, _, (_, _, _, answers) = finished
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    found, metrics = _evaluated(capsys, folder), results_of(folder)["metrics"]
    if task == "bags":
        # All bags are evaluated, as in the reload check.
        bags = loaded(tiny(task)).bags
        margins = answers[:, 1] - answers[:, 0]
        expected = {"accuracy": ((margins > 0) == bags.labels).mean(), "auc": roc_auc_score(bags.labels, margins)}
        assert found == pytest.approx({**expected, "f1": f1_score(bags.labels, margins > 0)})
        half = {"instances": [bag.tolist() for bag in bags.instances[:12]], "label": [bags.names[label] for label in bags.labels[:12]]}
        Dataset.from_dict(half).to_parquet(folder.parent / "half.parquet")
        found = _evaluated(capsys, folder, "--data", folder.parent / "half.parquet", "--set", "metrics=[auc]")
        assert found == pytest.approx({"auc": roc_auc_score(bags.labels[:12], margins[:12])})
    else:
        expected = {name: metrics[name] for name in ("test_accuracy", "test_loss", "test_mse", "test_mae") if name in metrics}
        assert found == pytest.approx(expected, rel=1e-5)
        validated = _evaluated(capsys, folder, "--set", "evaluation.split=validation")
        names = ("validation_accuracy", "validation_loss") if task == "images" else ("validation_mse", "validation_mae")
        assert validated == pytest.approx({name: metrics[name] for name in names}, rel=1e-5)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def _other_data(task: str, folder: Path) -> Path:
    """Data that do not fit the model of a tiny recipe."""
    folder.mkdir()
    if task == "images":
        images = {"image": [PILImage.new("L", (8, 8), shade) for shade in range(40)], "label": [0, 1] * 20}
        for split in ("train", "test"):
            features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
            Dataset.from_dict(images, features=features).to_parquet(folder / f"{split}.parquet")
        return folder
    if task == "bags":
        Dataset.from_dict({"instances": [[[0.0] * 3]] * 4, "label": ["a", "b"] * 2}).to_parquet(folder / "bags.parquet")
        return folder / "bags.parquet"
    synthetic_series(400, 2).to_csv(folder / "two.csv", index=False)
    return folder / "two.csv"


def test_data_that_do_not_fit_a_finished_run_are_refused(finished, tmp_path):
    task, folder, *_ = finished
    message = {
        "images": r"the model has the classes \['dark', 'light'\], but the data have \['a', 'b'\]",
        "bags": r"the model has the classes \['no', 'yes'\], but the data have \['a', 'b'\]",
        "series": r"the model was trained on the series \['series_0', .*\], but the data have \['series_0', 'series_1'\]",
    }[task]
    with pytest.raises(SystemExit, match=f"RecipeError: {message}"):
        cli.main(["evaluate", str(folder), "--data", str(_other_data(task, tmp_path / "other"))])
    with pytest.raises(SystemExit, match=r"RecipeError: .* holds no finished run"):
        cli.main(["evaluate", str(tmp_path)])
