"""Tests of training with bags: data, cross-validation, metrics, baselines, comparisons, the
script."""

import json
import math
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml
from datasets import ClassLabel, Dataset
from huggingface_hub import ModelCard
from scipy import stats
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC
from transformers import Trainer

from modeling_uhop import SeparationCallback, UHopMILConfig, UHopMILFeatureExtractor, UHopMILForBagClassification
from modeling_uhop.training import cli
from modeling_uhop.training.baselines.bags import BASELINES, set_kernel_svm
from modeling_uhop.training.data.bags import BagData, Bags, digit_bags, load_bags
from modeling_uhop.training.engine import run
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.folds import fold_seed, splits, summarize
from modeling_uhop.training.intervals import paired_over_folds
from modeling_uhop.training.metrics import bag_metrics
from modeling_uhop.training.recipe import Evaluation, load_recipe
from modeling_uhop.training.report.figures import bag_figure
from modeling_uhop.training.run_folder import RunFolder
from modeling_uhop.training.tasks.bags import BagClassification, BagsRecipe, instance_auc, predict
from tests.support.forks import run_command
from tests.support.recipes import no_reload, reload_in_forks, without_times


ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
RECIPES = sorted((ROOT / "configs").glob("mil_*.yaml"))
FAST = {"num_train_epochs": 2, "per_device_train_batch_size": 8}


def _bags(count: int = 24, width: int = 3, seed: int = 0) -> Bags:
    """Bags of which every second has an instance far from the others."""
    random = np.random.default_rng(seed)
    instances = [random.normal(size=(int(random.integers(1, 6)), width)) for _ in range(count)]
    for index in range(0, count, 2):
        instances[index][0] += 6.0
    return Bags(instances, (np.arange(count) % 2 == 0).astype(np.int64), ["no", "yes"])


def _recipe(**fields) -> BagsRecipe:
    defaults = {"model": {"hidden_size": 16}, "training": FAST, "folds": 3, "repeats": 1}
    return BagsRecipe(**{"name": "test", "data": BagData("digits"), **defaults, **fields})


def _task(bags: Bags, **fields) -> BagClassification:
    """The task of a recipe, with these bags."""
    task = BagClassification(_recipe(**fields))
    task.bags = bags
    return task


def _cross_validated(task: BagClassification, folder: Path) -> list[dict]:
    """The outcome of every fold."""
    place = RunFolder(folder, task.recipe)
    jobs = [(repeat, fold, *part) for repeat in range(task.recipe.repeats) for fold, part in enumerate(task.splits(repeat))]
    return [task.fold_outcome(place, "fold", *job) for job in jobs]


def _trained(bags: Bags, scratch: Path, count: int | None = None, **fields):
    """A model that was trained on the first bags, and its feature extractor."""
    return _task(bags, **fields).fit(np.arange(len(bags.labels) if count is None else count), 0, scratch)


def _write(path: Path, bags: Bags, **changes) -> Path:
    pd.DataFrame({"instances": [bag.tolist() for bag in bags.instances], "label": bags.labels, **changes}).to_parquet(path)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    recipe = load_recipe(path)
    assert type(recipe) is BagsRecipe
    # The data of most recipes are not on every machine.
    recipe.data.dataset = "digits"
    recipe.model.pop("instance_dim", None)
    BagClassification(recipe).load()
    assert recipe.name == path.stem
    header = path.read_text().partition("\ntask:")[0]
    assert all(word in header for word in ("# Command:", "# Cost:", "# Source:"))


@pytest.mark.parametrize(
    ("name", "count", "positive", "width"),
    [
        ("tiger", 200, 100, 230),
        ("fox", 200, 100, 230),
        ("elephant", 200, 100, 230),
        ("ucsb_breast_cancer", 58, 26, 708),
        ("musk1", 92, 47, 166),
        ("musk2", 102, 39, 166),
    ],
)
def test_the_real_bags_load(name, count, positive, width):
    path = SHARED / "mil" / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    bags = load_bags(BagData(str(path)))
    assert (len(bags.instances), int(bags.labels.sum())) == (count, positive)
    assert {bag.shape[1] for bag in bags.instances} == {width}


def test_digit_bags_are_as_described():
    bags = digit_bags()
    assert len(bags.instances) == 300
    assert bags.labels.tolist() == [int(marks.any()) for marks in bags.instance_labels] == [1, 0] * 150
    assert {int(marks.sum()) for marks in bags.instance_labels} == {0, 1, 2}
    assert {len(bag) for bag in bags.instances} == set(range(6, 15))
    images = [{tuple(row) for row in bag} for bag in bags.instances]
    for one in range(0, 60):
        for other in range(one):
            assert bags.groups[one] == bags.groups[other] or not images[one] & images[other]
    again = digit_bags()
    assert all(np.array_equal(a, b) for a, b in zip(bags.instances, again.instances, strict=True))


def test_bags_are_read_from_a_file(tmp_path):
    bags = _bags()
    loaded = load_bags(BagData(str(_write(tmp_path / "bags.parquet", bags))))
    assert all(np.array_equal(a, b) for a, b in zip(loaded.instances, bags.instances, strict=True))
    assert loaded.labels.tolist() == bags.labels.tolist()
    _write(tmp_path / "named.parquet", bags, label=np.where(bags.labels, "sick", "healthy"))
    named = load_bags(BagData(str(tmp_path / "named.parquet")))
    assert named.names == ["healthy", "sick"]
    assert named.labels.tolist() == bags.labels.tolist()


def test_errors_name_bad_files(tmp_path):
    bags = _bags()
    path = _write(tmp_path / "bags.parquet", bags)
    with pytest.raises(RecipeError, match=r"has no column 'x'; it has \['instances', 'label'\]"):
        load_bags(BagData(str(path), label_column="x"))
    with pytest.raises(RecipeError, match="there is no file or folder"):
        load_bags(BagData(str(tmp_path / "none.parquet")))
    unequal = [bag.tolist() for bag in bags.instances]
    unequal[3].append([1.0])
    pd.DataFrame({"instances": unequal, "label": bags.labels}).to_parquet(path)
    with pytest.raises(ValueError, match="bag 3 must consist of numbers, with one shape for every instance"):
        load_bags(BagData(str(path)))
    for change, message in (
        (lambda bag: bag[:, :2], r"bag 3 has instances of shape \(2,\), but bag 0 has \(3,\)"),
        (lambda bag: bag * np.nan, "bag 3 has entries that are not finite, first in its instance 0"),
    ):
        changed = [change(bag) if index == 3 else bag for index, bag in enumerate(bags.instances)]
        _write(path, Bags(changed, bags.labels, bags.names))
        with pytest.raises(ValueError, match=message):
            load_bags(BagData(str(path)))
    _write(path, bags, label=[np.nan, *bags.labels[1:].astype(float)])
    with pytest.raises(RecipeError, match=r"bag 0 of .* has no label"):
        load_bags(BagData(str(path)))
    emptied = [bag[:0] if index == 3 else bag for index, bag in enumerate(bags.instances)]
    _write(path, Bags(emptied, bags.labels, bags.names))
    assert load_bags(BagData(str(path))).instances[3].shape == (0, 3)
    _write(path, bags, label=[None, *bags.labels[1:].tolist()])
    with pytest.raises(RecipeError, match=r"bag 0 of .* has no label"):
        load_bags(BagData(str(path)))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_folds_cover_all_bags_once(split):
    bags = _bags(30)
    parts = splits(bags, 5, 0, 0, split)
    for train, scored in parts:
        assert not set(train) & set(scored)
        assert abs(bags.labels[scored].mean() - 0.5) < 0.2
    everything = np.sort(np.concatenate([scored for _, scored in parts]))
    if split == "test":
        assert everything.tolist() == list(range(30))
    else:
        outer = splits(bags, 5, 0, 0)
        assert all(set(train) | set(scored) == set(outer_train) for (train, scored), (outer_train, _) in zip(parts, outer, strict=True))
    for seed, repeat in ((0, 1), (1, 0)):
        assert [scored.tolist() for _, scored in splits(bags, 5, seed, repeat, split)] != [scored.tolist() for _, scored in parts]
    own = _task(bags, folds=5, evaluation=Evaluation(split)).splits(0)
    assert [[part.tolist() for part in fold] for fold in own] == [[part.tolist() for part in fold] for fold in parts]


def test_groups_are_not_divided():
    bags = digit_bags()
    for split in ("test", "validation"):
        for train, scored in splits(bags, 10, 0, 0, split):
            assert not set(bags.groups[train]) & set(bags.groups[scored])


def test_a_class_too_small_for_the_folds_is_refused():
    with pytest.raises(RecipeError, match="class 'no' has 4 bags, too few for one in each of 5 folds"):
        splits(_bags(9), 5, 0, 0)


def test_metrics_equal_scikit_learn():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(20, 2)), random.integers(0, 2, 20)
    metrics = bag_metrics(logits, labels)
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())
    assert metrics["f1"] == pytest.approx(f1_score(labels, logits.argmax(-1)))
    logits, labels = random.normal(size=(30, 3)), np.arange(30) % 3
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert bag_metrics(logits, labels, ["auc"])["auc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert bag_metrics(logits, labels)["f1"] == pytest.approx(f1_score(labels, logits.argmax(-1), average="macro"))
    two_of_three = np.eye(3)[[0, 1, 0, 0]]
    assert bag_metrics(two_of_three, np.array([0, 1, 1, 0]), ["f1"])["f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    with pytest.raises(ValueError, match=r"metrics must be among .* got 'recall'"):
        bag_metrics(logits, labels, ["recall"])


def test_instance_auc():
    truth = [np.array([0, 1, 0]), np.array([0, 0]), np.array([1, 1, 0, 0])]
    weights = [np.array([0.1, 0.8, 0.1]), np.array([0.5, 0.5]), np.array([0.4, 0.1, 0.3, 0.2])]
    assert instance_auc(weights, truth) == pytest.approx((1.0 + 0.5) / 2)


def test_cross_validation_is_reproducible_and_does_not_use_evaluated_labels(tmp_path):
    bags, fields = _bags(), {"ensemble": 2, "training": {**FAST, "num_train_epochs": 20}}
    task = _task(bags, **fields)
    outcomes = _cross_validated(task, tmp_path)
    assert outcomes == _cross_validated(task, tmp_path)
    assert sorted(index for outcome in outcomes for index in outcome["bags"]) == list(range(24))
    assert summarize(outcomes)["auc"]["mean"] > 0.9
    # Because the labels of evaluated bags are not used, logits do not change if these labels are
    # swapped, and the AUC becomes 1 - AUC.
    train, scored = task.splits(0)[0]
    turned = Bags(bags.instances, bags.labels.copy(), bags.names)
    turned.labels[scored] = 1 - turned.labels[scored]
    outcome = _task(turned, **fields).fold_outcome(RunFolder(tmp_path, task.recipe), "fold", 0, 0, train, scored)
    assert outcome["logits"] == outcomes[0]["logits"]
    assert outcome["auc"] == pytest.approx(1 - outcomes[0]["auc"])
    # Nothing of the trainings is kept.
    assert list(tmp_path.iterdir()) == []


def test_an_ensemble_averages_logits(tmp_path):
    task = _task(_bags(), ensemble=2)
    train, scored = task.splits(0)[0]
    members = []
    for member in range(2):
        model, extractor = task.fit(train, fold_seed(0, 0, 0, member), tmp_path / "scratch")
        members.append(predict(model, extractor, [task.bags.instances[i] for i in scored])[0])
    assert not np.allclose(*members)
    outcome = _cross_validated(task, tmp_path)[0]
    np.testing.assert_allclose(outcome["logits"], sum(members) / 2, atol=1e-4)


def test_evaluated_bags_do_not_affect_each_other_or_the_model(tmp_path, monkeypatch):
    bags = _bags()
    train, scored = splits(bags, 3, 0, 0)[0]
    changed = Bags([bag.copy() for bag in bags.instances], bags.labels, bags.names)
    changed.instances[scored[0]] *= 100.0
    kept, folder = [], RunFolder(tmp_path, _recipe())

    def remember(chosen, labels, unseen):
        kept.append((chosen, unseen))
        return np.zeros(len(unseen))

    monkeypatch.setitem(BASELINES, "remember", remember)
    first, second = (_task(given).fold_outcome(folder, "fold", 0, 0, train, scored)["logits"] for given in (bags, changed))
    assert first[1:] == second[1:]
    assert first[0] != second[0]
    for given in (bags, changed):
        outcome = _task(given).baseline_outcome(folder, "remember", 0, 0, train, scored)
        assert (outcome["bags"], outcome["trained_on"], outcome["auc"]) == (scored.tolist(), 16, 0.5)
    np.testing.assert_array_equal(np.concatenate(kept[0][0]), np.concatenate(kept[1][0]))
    np.testing.assert_array_equal(np.concatenate(kept[0][1][1:]), np.concatenate(kept[1][1][1:]))
    assert not np.allclose(kept[0][1][0], kept[1][1][0])


def test_predictions_do_not_depend_on_the_batch_size(tmp_path):
    bags = _bags()
    model, extractor = _trained(bags, tmp_path, 10)
    logits, weights = predict(model, extractor, bags.instances)
    assert [len(row) for row in weights] == [len(bag) for bag in bags.instances]
    assert [row.sum() for row in weights] == pytest.approx([1.0] * 24, rel=1e-5)
    again, others = predict(model, extractor, bags.instances, batch_size=5)
    np.testing.assert_allclose(again, logits, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(others), np.concatenate(weights), atol=1e-6)


def test_folds_without_a_class_are_refused():
    random = np.random.default_rng(0)
    instances = [random.normal(size=(2, 3)) for _ in range(23)]
    labels = np.array([0] * 20 + [1] * 3)
    with pytest.raises(RecipeError, match=r"fold . has no validation bag of class 'yes'"):
        splits(Bags(instances, labels, ["no", "yes"]), 3, 0, 0, "validation")
    with pytest.raises(RecipeError, match="every bag is of class 'no'"):
        splits(Bags(instances, labels * 0, ["no"]), 3, 0, 0)
    grouped = Bags(instances, labels, ["no", "yes"], groups=np.where(labels == 1, 99, np.arange(23)))
    with pytest.raises(RecipeError, match=r"has no .* bag of class 'yes'"):
        splits(grouped, 3, 0, 0)


def test_another_number_of_classes_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"model.num_labels is 3, but the bags have 2 classes"):
        _trained(_bags(), tmp_path, model={"num_labels": 3})
    with pytest.raises(RecipeError, match=r"model.num_labels is 3, but the bags have 2 classes"):
        _task(_bags(), model={"num_labels": 3}).load()


def test_three_classes(tmp_path):
    random = np.random.default_rng(0)
    labels = np.arange(30) % 3
    instances = [random.normal(size=(3, 3)) + 4.0 * np.eye(3)[label] for label in labels]
    task = _task(Bags(instances, labels, ["a", "b", "c"]), training={**FAST, "num_train_epochs": 20})
    outcomes = _cross_validated(task, tmp_path)
    assert summarize(outcomes)["auc"]["mean"] > 0.9


@pytest.mark.parametrize("options", [{"train_sampling_strategy": "group_by_length"}, {"dataloader_num_workers": 1}])
def test_options_of_the_trainer(options, tmp_path):
    bags = _bags()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # because a worker process is a fork
        model, extractor = _trained(bags, tmp_path, training={**FAST, **options})
    assert np.isfinite(predict(model, extractor, bags.instances)[0]).all()


@pytest.mark.parametrize("pool_memories", [True, False])
def test_separation_before_training(pool_memories, tmp_path):
    separation = {"steps": 20, "parameters": "feature_maps", "lr": 0.5, "batch_size": 8, "pool_memories": pool_memories}
    kept: list[SeparationCallback] = []

    class Kept(SeparationCallback):
        def __init__(self, **options):
            super().__init__(**options)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_uhop.training.stage_one.SeparationCallback", Kept)
        _trained(_bags(), tmp_path, separation=separation)
    losses = [entry["separation_loss"] for entry in kept[0].history]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_summary_of_folds():
    outcomes = [{"repeat": r, "fold": f, "auc": value} for r, f, value in ((0, 0, 0.5), (0, 1, 0.7), (1, 0, 0.9), (1, 1, 0.9))]
    summary = summarize(outcomes)["auc"]
    assert summary["by_repeat"] == pytest.approx([0.6, 0.9])
    assert summary["mean"] == pytest.approx(0.75)
    assert summary["std_repeats"] == pytest.approx(np.std([0.6, 0.9], ddof=1))
    assert summary["std_folds"] == pytest.approx(np.std([0.5, 0.7, 0.9, 0.9], ddof=1))


def test_paired_difference():
    first, second = [0.9, 0.8, 0.7, 0.95], [0.85, 0.8, 0.6, 0.9]
    outcome = paired_over_folds(first, second, [1] * 4, [3] * 4)
    difference = np.subtract(first, second)
    assert outcome.mean == pytest.approx(0.05)
    expected = stats.t.ppf(0.975, 3) * math.sqrt((1 / 4 + 1 / 3) * difference.var(ddof=1))
    assert outcome.half_width == pytest.approx(expected)


def test_the_set_kernel():
    """Compare the decision function with that of an SVM whose kernel is computed by loops over
    pairs."""
    bags = _bags(16)

    train, unseen = bags.instances[:10], bags.instances[10:]
    gamma = 1.0 / (3 * np.concatenate(train).var())

    def similarity(a, b):
        return rbf_kernel(a, b, gamma=gamma).mean()

    def normalised(a, b):
        return similarity(a, b) / math.sqrt(similarity(a, a) * similarity(b, b))

    kernel = np.array([[normalised(a, b) for b in train] for a in train])
    machine = GridSearchCV(SVC(kernel="precomputed"), {"C": [1.0, 10.0, 100.0]}, scoring="roc_auc", cv=3).fit(kernel, bags.labels[:10])
    expected = machine.decision_function(np.array([[normalised(a, b) for b in train] for a in unseen]))
    np.testing.assert_allclose(set_kernel_svm(train, bags.labels[:10], unseen), expected, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_learn_the_task(name):
    bags = _bags(60)
    scores = BASELINES[name](bags.instances[:40], bags.labels[:40], bags.instances[40:])
    assert roc_auc_score(bags.labels[40:], scores) > 0.9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ["recall"]}, "metrics must be among .* got 'recall'"),
        ({"metrics": []}, "at least one"),
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"ensemble": 0}, "ensemble must be at least 1, got 0"),
        ({"baselines": ["nope"]}, "baselines must be among .* got 'nope'"),
    ],
)
def test_bad_recipes_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        BagClassification(_recipe(**fields)).load()


@pytest.mark.process
def test_the_command_leaves_a_model_that_reloads(tmp_path, monkeypatch, capsys):
    content = {"task": "bags", "data": {"dataset": "digits"}, "training": FAST, "folds": 2, "repeats": 1, "model": {"alpha": 1.5}}
    (tmp_path / "mil.yaml").write_text(yaml.safe_dump(content))
    reload_in_forks(monkeypatch)
    command = [str(tmp_path / "mil.yaml"), "--output_dir", str(tmp_path / "out")]
    cli.main(["train", *command])
    assert "answers agree" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    of_training = {"last_step", "train_seconds"}
    assert {"auc", "accuracy", "f1", "instance_auc", "cross_validation_seconds"} | of_training == set(results["metrics"])
    assert len(results["outcomes"]) == 2
    assert (tmp_path / "out" / "bag.png").stat().st_size > 5000
    again = run_command("training/train.py", *command)
    assert again.returncode != 0
    assert "is not empty; pass --overwrite" in again.stderr
    assert "Traceback" not in again.stderr


def _images(bags: Bags) -> list:
    """The bags of `_bags`, with instances as images of one channel and one row."""
    return [bag.reshape(len(bag), 1, 1, -1).tolist() for bag in bags.instances]


def _as_file(tmp_path: Path, kind: str) -> Path:
    """Save the bags of `_bags` in a file or folder of a given kind."""
    bags = _bags()
    frame = pd.DataFrame({"instances": [bag.tolist() for bag in bags.instances], "label": np.where(bags.labels, "yes", "no")})
    if kind == "folder":
        (tmp_path / "data").mkdir()
        frame.to_json(tmp_path / "data" / "train.jsonl", orient="records", lines=True)
        return tmp_path / "data"
    path = tmp_path / f"bags.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=kind == "jsonl")
    return path


@pytest.mark.trains
@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl", "folder", "images", "digits"])
def test_every_kind_of_bags_runs_to_the_end(tmp_path, kind, monkeypatch):
    """Run the command; other tests check that a model reloads in a new process."""
    reloaded = no_reload(monkeypatch)
    drawn: list[tuple] = []
    monkeypatch.setattr("modeling_uhop.training.tasks.bags.bag_figure", recorded(bag_figure, drawn))
    content = {"task": "bags", "data": {"dataset": kind}, "training": FAST, "folds": 2, "repeats": 1, "model": {"hidden_size": 16}}
    bags = _bags()
    if kind == "images":
        pd.DataFrame({"instances": _images(bags), "label": np.where(bags.labels, "yes", "no")}).to_parquet(tmp_path / "images.parquet")
        content["data"]["dataset"] = str(tmp_path / "images.parquet")
        content["model"]["instance_type"] = "image"
    elif kind == "digits":
        bags = digit_bags()
    else:
        content["data"]["dataset"] = str(_as_file(tmp_path, kind))
    (tmp_path / "mil.yaml").write_text(yaml.safe_dump(content))
    folder = tmp_path / "out"
    cli.main(["train", str(tmp_path / "mil.yaml"), "--output_dir", str(folder)])

    results = json.loads((folder / "results.json").read_text())
    assert sorted(index for outcome in results["outcomes"] for index in outcome["bags"]) == list(range(len(bags.instances)))
    for outcome in results["outcomes"]:
        scored = bags.labels[outcome["bags"]]
        assert outcome["auc"] == pytest.approx(roc_auc_score(scored, np.subtract(*np.transpose(outcome["logits"])[::-1])), abs=1e-3)
    (evaluation, *_) = ModelCard.load(folder / "README.md").data.eval_results
    assert evaluation.metric_value == pytest.approx(results["metrics"]["auc"]["mean"], abs=1e-4)
    assert "bag.png" in (folder / "README.md").read_text()

    model = UHopMILForBagClassification.from_pretrained(folder)
    extractor = UHopMILFeatureExtractor.from_pretrained(folder)
    ((saved, task, inputs, answers),) = reloaded
    assert (saved, task, len(inputs)) == (folder, "multiple-instance-classification", min(64, len(bags.instances)))
    for given, bag in zip(inputs, bags.instances, strict=False):
        np.testing.assert_allclose(given.reshape(len(bag), -1), bag, atol=1e-9)
    logits, weights = predict(model, extractor, inputs)
    np.testing.assert_allclose(answers, logits, atol=1e-5)
    ((_, pictures, shown, title),) = drawn
    assert title == f"mil: bag 0, of class {'with a 9' if kind == 'digits' else 'yes'}"
    np.testing.assert_allclose(shown, weights[0], atol=1e-5)
    if kind in ("images", "digits"):
        np.testing.assert_allclose(pictures.reshape(len(pictures), -1), bags.instances[0], atol=1e-9)
    else:
        assert pictures is None


def recorded(function, calls):
    """The same function, which also records the arguments of its calls."""

    def wrapped(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return wrapped


def test_unsupported_files_are_refused(tmp_path):
    (tmp_path / "bags.npz").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"bags are not read from a file \.npz; give a file \.parquet, \.json, .*got .*bags.npz"):
        load_bags(BagData(str(tmp_path / "bags.npz")))


def test_the_figure_of_a_bag_shows_its_weights_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    weights = np.array([0.1, 0.6, 0.3])
    images = np.stack([np.full((2, 4, 4), value) for value in (0.0, 1.0, 2.0)])
    bag_figure(tmp_path / "vectors.png", None, weights, "vectors")
    (bars,) = plt.gcf().axes
    bag_figure(tmp_path / "images.png", images, weights, "images")
    *pictures, bars_of_images = plt.gcf().axes
    bag_figure(tmp_path / "many.png", None, np.arange(20) / 190, "many", most=5)
    (few,) = plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")
    for axis in (bars, bars_of_images):
        assert [patch.get_height() for patch in axis.containers[0]] == [0.6, 0.3, 0.1]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "0"]
        assert axis.get_xlabel() == "index of the instance in its bag"
    assert [picture.images[0].get_array().mean() for picture in pictures] == [1.0, 2.0, 0.0]
    assert few.get_xlabel() == "index of the instance in its bag; the 5 of 20 with most weight"


@pytest.mark.parametrize(
    ("empty", "labels", "expected"),
    [([1], [0, 1, 1], 2), ([0, 1, 2], [0, 1, 1, 0], 3)],
)
def test_an_empty_first_bag_is_not_shown(tmp_path, monkeypatch, empty, labels, expected):
    drawn: list[tuple] = []
    monkeypatch.setattr("modeling_uhop.training.tasks.bags.bag_figure", lambda *arguments: drawn.append(arguments))
    instances = [np.zeros((0, 3)) if index in empty else np.full((2, 3), index) for index in range(len(labels))]
    task = _task(Bags(instances, np.array(labels), ["no", "yes"]))
    model, task.processor = _trained(_bags(), tmp_path)
    task.figures(RunFolder(tmp_path, task.recipe), model, {})
    ((_, _, weights, title),) = drawn
    assert title == f"test: bag {expected}, of class {['no', 'yes'][labels[expected]]}"
    assert len(weights) == 2


@pytest.mark.trains
def test_finished_stages_survive_a_failed_stage(tmp_path, monkeypatch):
    baseline = "mean, logistic regression"
    recipe = _recipe(data=BagData(str(_as_file(tmp_path, "parquet"))), folds=2, baselines=[baseline])
    whole, folder = tmp_path / "whole", tmp_path / "broken"
    no_reload(monkeypatch)
    expected = run(recipe, whole)
    trained: list[int] = []
    train = Trainer.train

    def counted(trainer, **options):
        trained.append(len(trainer.train_dataset))
        return train(trainer, **options)

    monkeypatch.setattr(Trainer, "train", counted)
    compute = BagClassification.fold_outcome

    def second_fails(self, folder, name, repeat, fold, *part):
        if fold == 0:
            return compute(self, folder, name, repeat, fold, *part)
        raise ValueError("no luck")

    def failing(*arguments):
        raise ValueError("no luck")

    # Before each failure, this is trained: first the model of all bags and fold 1; then fold 2;
    # then nothing.
    for broken, patched, sizes in (
        ("bags.BagClassification.fold_outcome", second_fails, [24, 12]),
        ("bags.BagClassification.baseline_outcome", failing, [12]),
        ("bags.bag_figure", failing, []),
    ):
        trained.clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"modeling_uhop.training.tasks.{broken}", patched)
            with pytest.raises(ValueError, match="no luck"):
                run(recipe, folder, "resume" if folder.exists() else "fresh")
        assert trained == sizes, broken
        assert (folder / "results.json").exists() == (broken == "bags.bag_figure")
    trained.clear()
    monkeypatch.setitem(BASELINES, baseline, failing)
    resumed = run(recipe, folder, "resume")
    assert not trained
    assert without_times(resumed) == without_times(expected)
    first, second = (json.loads((each / "results.json").read_text()) for each in (whole, folder))
    assert [first[name] for name in ("outcomes", "baselines")] == [second[name] for name in ("outcomes", "baselines")]
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "fields",
    [{"folds": 4}, {"seed": 1}, {"training": {"num_train_epochs": 3}}, {"model": {"hidden_size": 32}}],
    ids=lambda fields: str(fields),
)
def test_folds_of_another_recipe_are_not_mixed(tmp_path, fields):
    RunFolder(tmp_path, _recipe()).write_recipe()
    (name,) = fields
    with pytest.raises(RecipeError, match=f"was started with {name}=.* and cannot be resumed with {name}="):
        run(_recipe(**fields), tmp_path, "resume")


def test_half_precision_wrappers_are_removed_before_outputs_are_saved(tmp_path):
    bags = _bags()
    model, extractor = _trained(bags, tmp_path, training={**FAST, "bf16": True, "use_cpu": True})
    copy = UHopMILForBagClassification(model.config).eval()
    copy.load_state_dict(model.state_dict())
    np.testing.assert_allclose(predict(model, extractor, bags.instances)[0], predict(copy, extractor, bags.instances)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (lambda marks: marks.astype(float), ["0", "1"]),
        (lambda marks: marks.astype(bool), ["False", "True"]),
        (lambda marks: marks * 8 + 2, ["2", "10"]),
    ],
    ids=["whole floats", "bools", "numbers"],
)
def test_labels_of_bags_are_classes(tmp_path, labels, names):
    bags = _bags()
    loaded = load_bags(BagData(str(_write(tmp_path / "bags.parquet", bags, label=labels(bags.labels)))))
    assert (loaded.names, loaded.labels.tolist()) == (names, bags.labels.tolist())


def test_lists_of_labels_are_refused_by_bag(tmp_path):
    bags = _bags()
    path = _write(tmp_path / "bags.parquet", bags, label=[[int(mark)] for mark in bags.labels])
    with pytest.raises(RecipeError, match=r"bag 0 of .* has a list of labels, \[1\]"):
        load_bags(BagData(str(path)))


def test_classes_of_bags_keep_their_names(tmp_path):
    bags = _bags()
    content = {"instances": [bag.tolist() for bag in bags.instances], "label": bags.labels.tolist()}
    for labels, message in ((content["label"], None), ([-1, *content["label"][1:]], "bag 0 of .* has the label -1, which means no label")):
        table = Dataset.from_dict({**content, "label": labels})
        table.cast_column("label", ClassLabel(names=["healthy", "sick"])).to_parquet(tmp_path / "bags.parquet")
        if message is None:
            assert load_bags(BagData(str(tmp_path / "bags.parquet"))).names == ["healthy", "sick"]
        else:
            with pytest.raises(RecipeError, match=message):
                load_bags(BagData(str(tmp_path / "bags.parquet")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bag: None, "bag 3 must be a set of instances, got None"),
        (lambda bag: [[1.0, None, 2.0]], "bag 3 has entries that are not finite"),
        (lambda bag: [[1.0, 2.0, 3.0], [1.0]], "bag 3 must consist of numbers, with one shape"),
        (lambda bag: [[1.0, 2.0]], r"bag 3 has instances of shape \(2,\)"),
    ],
    ids=["None", "None inside", "ragged", "narrow"],
)
def test_invalid_bags_are_refused_by_number(tmp_path, change, message):
    bags = _bags()
    instances = [change(bag) if index == 3 else bag.tolist() for index, bag in enumerate(bags.instances)]
    pd.DataFrame({"instances": instances, "label": bags.labels}).to_parquet(tmp_path / "bags.parquet")
    with pytest.raises(RecipeError, match=rf"bags.parquet: {message}"):
        load_bags(BagData(str(tmp_path / "bags.parquet")))


def test_bags_with_a_leading_axis_are_read_as_vectors(tmp_path):
    bags = _bags()
    wrapped = [[bag.tolist()] for bag in bags.instances]
    path = tmp_path / "bags.parquet"
    pd.DataFrame({"instances": wrapped, "label": bags.labels}).to_parquet(path)
    loaded = load_bags(BagData(str(path)))
    assert all(np.array_equal(one, other) for one, other in zip(loaded.instances, bags.instances, strict=True))
    emptied = [[] if index == 3 else bag for index, bag in enumerate(wrapped)]
    pd.DataFrame({"instances": emptied, "label": bags.labels}).to_parquet(path)
    assert [bag.shape for bag in load_bags(BagData(str(path))).instances[2:4]] == [bags.instances[2].shape, (0, 3)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 5, 3), (1, 5, 3)], r"bag 0 and all others have shape \(1, 5, 3\), which may mean 5 vectors or one image"),
        ([(1, 5, 3), (1, 4, 2)], r"bag 1 has instances of shape \(2,\), but bag 0 has \(3,\)"),
        ([(2, 5, 3), (1, 5, 3)], r"bag 0 must have shape .*, got \(2, 5, 3\)"),
    ],
)
def test_bags_with_an_ambiguous_leading_axis_are_refused(tmp_path, shapes, message):
    content = {"instances": [np.ones(shape).tolist() for shape in shapes], "label": [0, 1]}
    pd.DataFrame(content).to_parquet(tmp_path / "bags.parquet")
    with pytest.raises(RecipeError, match=rf"bags.parquet: {message}"):
        load_bags(BagData(str(tmp_path / "bags.parquet")))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_bags_are_channels_first(tmp_path, channels):
    random = np.random.default_rng(0)
    pictures = [random.random((count, channels, 10, 12), dtype=np.float32) for count in (2, 3)]
    model = UHopMILForBagClassification(UHopMILConfig(instance_dim=3, hidden_size=8, num_attention_heads=2))
    for name, given in (("first", pictures), ("last", [np.moveaxis(bag, 1, 3) for bag in pictures])):
        path = tmp_path / f"{name}.parquet"
        pd.DataFrame({"instances": [bag.tolist() for bag in given], "label": [0, 1]}).to_parquet(path)
        bags = load_bags(BagData(str(path)))
        for index, bag in enumerate(pictures):
            np.testing.assert_array_equal(bags.pictures(index), bag)
        assert f"2 to 3 instances, {channels} channels of 10 x 12 pixels;" in _task(bags).describe(model)


def test_bags_that_are_all_empty_are_refused(tmp_path):
    pd.DataFrame({"instances": [[], []], "label": [0, 1]}).to_parquet(tmp_path / "bags.parquet")
    with pytest.raises(RecipeError, match=r"every bag of .* is empty"):
        load_bags(BagData(str(tmp_path / "bags.parquet")))
