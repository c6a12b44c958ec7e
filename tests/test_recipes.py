"""Tests of recipes, of images, and of their training: runs, errors and saved files."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value
from huggingface_hub import ModelCard
from PIL import Image as PILImage
from transformers import EvalPrediction, ViTForImageClassification

from modeling_uhop import SeparationCallback, UHopViTConfig, UHopViTForImageClassification
from modeling_uhop.training import cli, info, train_command
from modeling_uhop.training.baselines.small_resnet import SmallResNetForImageClassification, resnet_of_size
from modeling_uhop.training.data.bags import BagData
from modeling_uhop.training.data.images import ImageData, load_images, make_image_processor, make_transform, with_pixels
from modeling_uhop.training.data.labels import as_classes
from modeling_uhop.training.engine import run
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.metrics import classification_metrics
from modeling_uhop.training.recipe import Evaluation, load_recipe
from modeling_uhop.training.results import commit, write_results
from modeling_uhop.training.run_folder import RunFolder
from modeling_uhop.training.tasks.bags import BagsRecipe
from modeling_uhop.training.tasks.images import Images
from tests.support.forks import run_command
from tests.support.recipes import loaded, no_reload, reload_in_forks, without_times


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("vit_*.yaml"))
SHARED = ROOT.parent / "shared" / "data"
TINY = [
    "training.num_train_epochs=2",
    "training.logging_steps=5",
    "training.disable_tqdm=true",
    "data.max_train_samples=200",
    "model.hidden_size=16",
    "model.num_hidden_layers=1",
    "separation.steps=3",
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    datasets.disable_progress_bars()
    reload_in_forks(monkeypatch)


def _recipe(*overrides: str, path: Path = ROOT / "configs" / "vit_digits.yaml"):
    return load_recipe(path, list(overrides))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_its_model_and_callback(path):
    recipe = load_recipe(path)
    config = UHopViTConfig(**recipe.model)
    assert config.use_feature_map
    callback = SeparationCallback(**(recipe.separation or {}))
    assert callback.schedule == (recipe.separation or {}).get("schedule")
    header = path.read_text().partition("\n\n")[0]
    assert all(word in header for word in ("# Command:", "# Cost:", "# Source:"))


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "vit_digits"], ids=lambda path: path.stem)
def test_every_recipe_reads_the_real_data(path):
    folder = SHARED / load_recipe(path).data.dataset.rpartition("/")[2]
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is not on this machine")
    recipe = load_recipe(path, [f"data.dataset={folder}", "data.max_train_samples=400"])
    images = load_images(recipe.data)
    assert len(images["train"]) == 400
    batch = with_pixels(images["train"], make_image_processor(recipe.data, recipe.model["image_size"]))[:8]
    pixel_values = torch.stack(batch["pixel_values"])
    assert pixel_values.shape == (8, 3, recipe.model["image_size"], recipe.model["image_size"])
    assert pixel_values.std() < 2
    labels = images["train"].features["label"].names
    assert len(labels) == {"cifar10": 10, "cifar100": 100, "tiny-imagenet": 200}[folder.name]


@pytest.mark.parametrize("command", sorted({*cli.COMMANDS} - {*cli.PLAIN}))
def test_a_command_says_what_to_install_if_the_train_extra_is_missing(command, monkeypatch):
    for name in info.TRAIN_PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as refused:
        cli.main([command, "anything"])
    assert re.match(r"RecipeError: datasets, .*, PIL, .* needs? them: pip install 'modeling-uhop\[train\]'$", str(refused.value.code))


def test_yaml_reads_scientific_numbers(tmp_path):
    (tmp_path / "r.yaml").write_text("task: images\ndata: {dataset: digits}\ntraining: {learning_rate: 1e-3, weight_decay: 2E+1}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["separation.lr=5e-2"])
    assert recipe.training == {"learning_rate": 1e-3, "weight_decay": 20.0}
    assert recipe.separation == {"lr": 0.05}
    assert recipe.name == "r"
    (tmp_path / "r.yaml").write_text("task: images\ndata: {dataset: digits}\nmodel:\ntraining:\n")
    assert load_recipe(tmp_path / "r.yaml").model == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {dataset: digits}\nmodle: {}", "unknown key 'modle' in recipe; the nearest valid one is 'model'"),
        ("data: {dataset: digits, image_colum: x}", "unknown key 'image_colum' in data; .* 'image_column'"),
        ("data: {dataset: digits}\nmodel: {alhpa: 1.5}", "unknown key 'alhpa' in model; .* 'alpha'"),
        ("data: {dataset: digits}\nseparation: {shedule: step}", "unknown key 'shedule' in separation; .* 'schedule'"),
        ("data: {dataset: digits}\ntraining: {num_train_epochs: abc}", "training.num_train_epochs must be a number, got 'abc'"),
        ("data: {dataset: digits}\ntraining: {save_total_limit: true}", "training.save_total_limit must be a number, got True"),
        ("data: {dataset: digits}\ntraining: {learning_rat: 1}", "unknown key 'learning_rat' in training; .* 'learning_rate'"),
        ("data: {dataset: digits}\ntraining: {seed: 1}", "training.seed cannot be set in a recipe; use the top-level `seed`"),
        ("data: {dataset: digits}\nmodel: 3", "model must be a mapping, got 3"),
        ("model: {}", "needs data.dataset"),
        ("- 1", "must be a YAML mapping"),
        ("data: [", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content if content.startswith(("- 1", "data: [")) else f"task: images\n{content}")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1", "must be a YAML mapping"),
        (b"task: [", "is not valid YAML"),
        (b"\xff\xd8", "is not valid YAML"),
        (b"recipes: [vit_digits]\nvariants: {a: []}", "is a sweep, not a recipe; run it by `modeling-uhop sweep"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        train_command.main([str(path)])


@pytest.mark.parametrize(
    ("task", "old", "new"),
    [
        ("bags", "judge", "evaluation"),
        ("series", "judge", "evaluation"),
        ("bags", "evaluate_on", "evaluation"),
        ("series", "evaluate_on", "evaluation"),
        ("series", "anchor_lengths", "baseline_lengths"),
    ],
)
def test_an_earlier_name_of_a_field_is_refused_with_its_new_name(tmp_path, task, old, new):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"task: {task}\ndata: {{dataset: digits}}\n{old}: test\n")
    with pytest.raises(RecipeError, match=f"'{old}' in recipe is now called '{new}'"):
        load_recipe(path)


@pytest.mark.parametrize("earlier", ["evaluate_on", "judge"])
def test_a_run_with_an_earlier_name_of_a_field_can_be_resumed(tmp_path, earlier):
    recipe = BagsRecipe("bags", BagData("digits"), evaluation=Evaluation("validation"))
    fields = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in ("task", "evaluation")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**fields, earlier: "validation"}))
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-3 is incomplete"):
        assert RunFolder(tmp_path, recipe, "resume").begins
    with pytest.raises(RecipeError, match=r"was started with evaluation=\{'split': 'validation'\}"):
        RunFolder(tmp_path, dataclasses.replace(recipe, evaluation=Evaluation("test")), "resume")


def test_a_missing_recipe_and_a_bad_override_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="must look like"):
        _recipe("training.learning_rate")
    with pytest.raises(RecipeError, match="unknown key 'rate'"):
        _recipe("training.rate=1")


def test_digits_are_split_by_label_and_stay_the_same_for_every_seed():
    recipe = _recipe()
    images, again = load_images(recipe.data), load_images(recipe.data)
    assert {name: len(split) for name, split in images.items()} == {"train": 1293, "validation": 144, "test": 360}
    pixels = {name: {np.asarray(image).tobytes() for image in split["image"]} for name, split in images.items()}
    assert not pixels["train"] & pixels["test"]
    assert not pixels["validation"] & pixels["test"]
    for name in images:
        assert images[name]["label"][:] == again[name]["label"][:]
        counts = np.bincount(images[name]["label"][:], minlength=10) / len(images[name])
        assert (abs(counts - 0.1) < 0.02).all()


def test_images_keep_their_values():
    recipe = _recipe()
    images = load_images(recipe.data)
    batch = with_pixels(images["test"], make_image_processor(recipe.data, 8))[:5]
    for pixel_values, image in zip(batch["pixel_values"], images["test"][:5]["image"], strict=True):
        expected = torch.from_numpy(np.asarray(image).copy()).double() / 255 * 2 - 1
        torch.testing.assert_close(pixel_values.double(), expected.expand(3, 8, 8), atol=1e-6, rtol=0)


def test_augmentation_crops_and_mirrors():
    data = ImageData("digits", random_crop_padding=1, random_flip=True)
    image = PILImage.fromarray(np.arange(1, 65, dtype=np.uint8).reshape(8, 8))
    transform = make_transform(make_image_processor(data, 8), data)
    padded = np.pad(np.asarray(image), 1)
    crops = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    expected = {view.tobytes() for crop in crops for view in (crop, crop[:, ::-1])}
    batch = {"image": [Image().encode_example(image)], "label": [0], "row": ["row 0 of train"]}
    seen = set()
    for _ in range(300):
        pixel_values = transform(batch)["pixel_values"][0]
        seen.add(((pixel_values[0] + 1) / 2 * 255).round().to(torch.uint8).numpy().tobytes())
    assert seen == expected


def _write_parquet(folder: Path, *, labels=(0, 1), label_type=None, splits=("train", "test")) -> None:
    images = [PILImage.new("RGB", (8 + i % 3, 8), ("red", "blue", "green")[i % len(labels)]) for i in range(20 * len(labels))]
    features = Features({"image": Image(), "label": label_type or ClassLabel(names=["a", "b"])})
    for split in splits:
        Dataset.from_dict({"image": images, "label": list(labels) * 20}, features=features).to_parquet(folder / f"{split}.parquet")


def test_a_local_folder_is_read(tmp_path):
    _write_parquet(tmp_path)
    images = load_images(ImageData(str(tmp_path)))
    assert images["train"].features["label"].names == ["a", "b"]
    assert {name: len(split) for name, split in images.items()} == {"train": 36, "validation": 4, "test": 40}
    _write_parquet(tmp_path, label_type=Value("int64"))
    assert load_images(ImageData(str(tmp_path)))["train"].features["label"].names == ["0", "1"]


def test_labels_have_the_same_meaning_in_every_split(tmp_path):
    _write_parquet(tmp_path, labels=(5, 9, 7), label_type=Value("int64"), splits=("train",))
    _write_parquet(tmp_path, labels=(9, 7), label_type=Value("int64"), splits=("test",))
    images = load_images(ImageData(str(tmp_path)))
    assert images["train"].features["label"].names == ["5", "7", "9"]
    assert set(images["test"]["label"]) == {1, 2}
    _write_parquet(tmp_path, labels=(9, 3), label_type=Value("int64"), splits=("test",))
    with pytest.raises(RecipeError, match=r"among those of the training split, \[5, 7, 9\], got 3"):
        load_images(ImageData(str(tmp_path)))
    _write_parquet(tmp_path, label_type=ClassLabel(names=["a", "b"]), splits=("train",))
    _write_parquet(tmp_path, label_type=ClassLabel(names=["b", "a"]), splits=("test",))
    with pytest.raises(RecipeError, match="disagree on the classes"):
        load_images(ImageData(str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_column": "img"}, r"has no column 'img'; it has \['image', 'label'\]"),
        ({"label_column": "fine_label"}, "has no column 'fine_label'"),
        ({"test_split": "valid"}, r"has no split 'valid'; it has \['test', 'train'\]"),
    ],
)
def test_a_data_set_without_the_named_part_is_refused(tmp_path, fields, message):
    _write_parquet(tmp_path)
    with pytest.raises(RecipeError, match=message):
        load_images(ImageData(str(tmp_path), **fields))


def test_a_label_outside_its_range_is_refused(tmp_path):
    _write_parquet(tmp_path, labels=(0, -1))
    with pytest.raises(RecipeError, match=r"labels must lie in \[0, 2\), got -1"):
        load_images(ImageData(str(tmp_path)))


def test_a_missing_folder_is_refused():
    with pytest.raises(RecipeError, match=r"there is no file or folder \./nowhere"):
        load_images(ImageData("./nowhere"))


def test_pixels_that_are_not_finite_are_refused():
    data = ImageData("digits", image_std=[0.0, 1.0, 1.0])
    transform = make_transform(make_image_processor(data, 8))
    with pytest.raises(ValueError, match="not finite"), np.errstate(divide="ignore", invalid="ignore"):
        transform({"image": [Image().encode_example(PILImage.new("RGB", (8, 8), "red"))], "label": [0], "row": ["row 0"]})


def test_an_unreadable_image_is_named_or_skipped(tmp_path):
    _write_parquet(tmp_path)
    for split, damaged in (("train", [3, 30]), ("test", [7])):
        table = Dataset.from_parquet(str(tmp_path / f"{split}.parquet")).cast_column("image", Image(decode=False)).to_list()
        for row in damaged:
            table[row]["image"] = {"bytes": table[row]["image"]["bytes"][:40], "path": f"picture_{row}.png"}
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
        Dataset.from_list(table, features=features).to_parquet(tmp_path / f"{split}.parquet")
    images = load_images(ImageData(str(tmp_path)))
    processor = make_image_processor(ImageData(""), 8)
    named = r"the image in row (3|30) of train \(picture_(3|30).png\) cannot be read: .*; set data.skip_unreadable=true to skip such images"
    with pytest.raises(RecipeError, match=named):
        list(with_pixels(images["train"], processor))
    with pytest.warns(UserWarning, match=r"of t(rain|est) \(picture_\d+.png\) cannot be read: .*, and is skipped") as warned:
        images = load_images(ImageData(str(tmp_path), skip_unreadable=True))
    assert len(warned) == 3
    assert {name: len(split) for name, split in images.items()} == {"train": 34, "validation": 4, "test": 39}
    assert not {"row 3 of train", "row 30 of train", "row 7 of test"} & {row for split in images.values() for row in split["row"]}
    assert len(list(with_pixels(images["train"], processor))) == 34


def test_accuracy():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    metrics = classification_metrics(EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 0, 0])))
    assert metrics == {"accuracy": 0.75}


def test_an_output_folder_is_never_mixed_or_deleted_by_mistake(tmp_path):
    folder, recipe = tmp_path / "run", _recipe()
    first, second = RunFolder(folder, recipe), RunFolder(folder, recipe)
    first.open()
    with pytest.raises(RecipeError, match="run is not empty"):
        second.open()
    shutil.rmtree(folder)
    with pytest.raises(RecipeError, match="nothing to resume"):
        RunFolder(folder, recipe, "resume")
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(RecipeError, match="is not empty; pass --overwrite"):
        RunFolder(folder, recipe)
    for mode in ("overwrite", "resume"):
        with pytest.raises(RecipeError, match="holds no earlier run"):
            RunFolder(folder, recipe, mode)
    RunFolder(tmp_path / "other", recipe).open()
    shutil.copy(tmp_path / "other" / "recipe.yaml", folder)
    RunFolder(folder, recipe, "resume").open()
    overwritten = RunFolder(folder, recipe, "overwrite")
    assert (folder / "thesis.txt").read_text() == "precious"
    overwritten.open()
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    "override",
    [
        "model.encoder_type=cnn",
        "model.hidden_act=reluu",
        "model.alpha=3",
        "data.dataset=./img",
        "separation.schedule=now",
        "training.optim=no",
    ],
)
def test_an_earlier_run_survives_a_wrong_overwrite(tmp_path, override):
    RunFolder(tmp_path, _recipe()).write_recipe()
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(SystemExit) as refused:
        cli.main(["train", "vit_digits", "--output_dir", str(tmp_path), "--overwrite", "--set", override])
    assert "\n" not in refused.value.code
    assert override.split("=")[1] in refused.value.code
    assert (tmp_path / "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize("override", ["model.alpha=2", "data.validation_fraction=0.3", "separation.steps=5", "seed=5"])
def test_a_run_is_not_resumed_with_another_recipe(tmp_path, override):
    RunFolder(tmp_path, _recipe()).write_recipe()
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(RecipeError, match=f"cannot be resumed with {override.split('.')[0].split('=')[0]}="):
        run(_recipe(override), tmp_path, "resume")


@pytest.mark.trains
def test_a_run_saves_all_its_outputs_and_reloads(tmp_path, capfd):
    folder = tmp_path / "run"
    recipe = _recipe(*TINY)
    recipe.seed = 3
    metrics = run(recipe, folder)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json", "preprocessor_config.json", "modeling_uhop_vit.py"}
    assert names >= {"README.md", "results.json", "training.png", "recipe.yaml"}
    assert not {"probe.npz", "probe.pt"} & names
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == metrics
    assert results["seed"] == 3
    assert results["recipe"]["model"]["hidden_size"] == 16
    assert set(results["versions"]) >= {"torch", "transformers", "modeling-uhop"}
    assert metrics["separation_loss"] < metrics["separation_loss_before"]
    by_epoch = [entry["eval_train_accuracy"] for entry in results["log_history"] if "eval_train_accuracy" in entry]
    assert len(by_epoch) == 2
    assert metrics["max_train_accuracy"] == max(by_epoch)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == results["recipe"]
    card = ModelCard.load(folder / "README.md")
    (evaluation,) = card.data.eval_results
    assert evaluation.metric_value == metrics["test_accuracy"]
    assert evaluation.dataset_name == "digits"
    assert card.data.to_dict()["library_name"] == "transformers"
    output = capfd.readouterr().out
    assert "answers agree" in output
    assert "test_accuracy" in output


@pytest.mark.trains
def test_recording_features_does_not_change_training(tmp_path, monkeypatch):
    """A run with a separation step that changes nothing equals a run without one, dropout
    included."""
    no_reload(monkeypatch)
    still = run(_recipe(*TINY, "model.hidden_dropout_prob=0.3", "separation.lr=0"), tmp_path / "still")
    without = run(_recipe(*TINY[:-1], "model.hidden_dropout_prob=0.3", "separation=null"), tmp_path / "without")
    assert still["test_loss"] == without["test_loss"]


@pytest.mark.trains
def test_half_precision_wrappers_are_removed_before_the_reload_check(tmp_path):
    run(_recipe(*TINY, "training.bf16=true", "training.use_cpu=true"), tmp_path / "run")


@pytest.mark.trains
def test_a_command_reproduces_its_results(tmp_path, monkeypatch):
    no_reload(monkeypatch)
    augmented = ["data.random_crop_padding=1", "data.random_flip=true", "model.hidden_dropout_prob=0.1"]
    results, weights = [], []
    for name in ("first", "second"):
        run(_recipe(*TINY, *augmented), tmp_path / name)
        results.append(without_times(json.loads((tmp_path / name / "results.json").read_text())))
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert results[0] == results[1]
    assert weights[0] == weights[1]
    other = run(_recipe(*TINY, *augmented, "seed=1"), tmp_path / "other")
    assert other["test_loss"] != results[0]["metrics"]["test_loss"]


@pytest.mark.trains
def test_a_folder_of_images_of_different_sizes(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    _write_parquet(data)
    metrics = run(_recipe(*TINY, f"data.dataset={data}"), tmp_path / "run")
    assert metrics["test_accuracy"] > 0.4
    for name in ("results.json", "README.md"):
        assert str(data) not in (tmp_path / "run" / name).read_text()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["recipe"]["data"]["dataset"] == "data"


@pytest.mark.trains
def test_a_run_without_separation(tmp_path):
    folder = tmp_path / "run"
    metrics = run(_recipe(*TINY[:-1], "separation=null", "model.use_feature_map=false"), folder)
    assert "separation_loss" not in metrics
    assert (folder / "training.png").stat().st_size > 1000
    assert "no feature map" in (folder / "README.md").read_text()


@pytest.mark.trains
def test_the_epoch_of_the_best_validation_accuracy_is_kept(tmp_path):
    # A learning rate at which accuracy increases and decreases.
    best = [
        "training.load_best_model_at_end=true",
        "training.metric_for_best_model=eval_validation_accuracy",
        "training.save_strategy=epoch",
    ]
    schedule = [
        "training.num_train_epochs=8",
        "training.lr_scheduler_type=constant",
        "training.warmup_steps=0",
        "training.learning_rate=0.02",
    ]
    metrics = run(_recipe(*TINY, *best, *schedule), tmp_path / "run")
    log_history = json.loads((tmp_path / "run" / "results.json").read_text())["log_history"]
    by_step = {entry["step"]: entry["eval_validation_accuracy"] for entry in log_history if "eval_validation_accuracy" in entry}
    assert len(set(by_step.values())) > 1
    assert metrics["best_step"] == max(by_step, key=lambda step: (by_step[step], -step))
    assert metrics["validation_accuracy"] == by_step[metrics["best_step"]]


@pytest.mark.parametrize(("most", "expected"), [(None, 144), (50, 50)])
def test_as_many_training_as_validation_images_are_evaluated(most, expected):
    task = loaded(_recipe(f"data.max_eval_samples={'null' if most is None else most}"))
    assert [len(task.evaluated_part(split)) for split in ("validation", "train")] == [expected, expected]
    assert task.evaluated_part("train")[3] == task.images["train"][3]
    assert {name: len(split) for name, split in task.examples().evaluated.items()} == {"validation": expected, "train": expected}


@pytest.mark.trains
def test_the_baseline_is_the_vit_of_transformers_at_equal_size(tmp_path):
    plain = [*TINY[:-1], "model.alpha=1.0", "model.use_feature_map=false", "separation=null"]
    tasks = [loaded(_recipe(*plain, f"architecture={name}")) for name in ("uhop_vit", "vit")]
    ours, theirs = (task.model(task.examples()) for task in tasks)
    assert type(theirs) is ViTForImageClassification
    assert theirs.num_parameters() == ours.num_parameters()
    assert theirs.config.id2label == {index: str(index) for index in range(10)}
    run(_recipe(*plain, "architecture=vit"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "vit"
    assert not (tmp_path / "run" / "README.md").exists()
    for name in ("vit", "resnet"):
        with pytest.raises(RecipeError, match=f"architecture must be 'uhop_vit', or 'vit' or 'resnet' without a sep.*, got '{name}' with"):
            Images(_recipe(*TINY, f"architecture={name}")).load()
    with pytest.raises(RecipeError, match="got 'cnn'"):
        Images(_recipe(*plain, "architecture=cnn")).load()


def test_a_small_resnet_is_that_of_its_paper():
    """Parameters are 9 c_in c_out of each convolution, with two for each channel of its batch norm; Table 6 of the paper has 0.27,
    0.46 and 0.85 million."""
    for number, blocks in ((270_000, 3), (460_000, 5), (850_000, 9)):
        config = resnet_of_size(number, id2label=dict(enumerate("abcdefghij")))
        assert config.depths == [blocks] * 3
        stages = [(2 * blocks - 1) * (9 * width * width + 2 * width) for width in (16, 32, 64)]
        entries = [9 * one * other + 2 * other for one, other in ((3, 16), (16, 16), (16, 32), (32, 64))]
        shortcuts = [one * other + 2 * other for one, other in ((16, 32), (32, 64))]
        model = SmallResNetForImageClassification(config).eval()
        assert model.num_parameters() == sum((*stages, *entries, *shortcuts)) + 650
        assert abs(model.num_parameters() - number) < 0.03 * number
    with torch.no_grad():
        stages = model(torch.randn(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert [tuple(each.shape[1:]) for each in stages] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.trains
def test_the_baseline_without_attention_is_a_resnet_of_equal_size(tmp_path):
    plain = [*TINY[:-1], "model.hidden_size=128", "separation=null"]
    task = loaded(_recipe(*plain, "architecture=resnet"))
    theirs = task.model(task.examples())
    assert abs(theirs.num_parameters() / UHopViTForImageClassification(task.config).num_parameters() - 1) < 0.25
    metrics = run(_recipe(*plain, "architecture=resnet"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "small_resnet"
    assert task.score(tmp_path / "run")["test_accuracy"] == metrics["test_accuracy"]


@pytest.mark.process
def test_the_script_refuses_in_one_line_and_resumes(tmp_path):
    """The first run is in fresh processes, as for users; the other commands run in forks."""
    folder = tmp_path / "run"
    overrides = [word for override in (*TINY, "training.save_strategy=epoch") for word in ("--set", override)]
    command = ["training/train.py", "configs/vit_digits.yaml", "--output_dir", str(folder), *overrides]
    bad = run_command(*command, "--set", "model.alpha=3")
    assert bad.returncode == 1
    assert bad.stderr.strip().splitlines()[-1] == "ValueError: alpha must lie in [1, 2], got 3"
    first = subprocess.run([sys.executable, *command, "--overwrite"], cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    whole = json.loads((folder / "results.json").read_text())["metrics"]
    again = run_command(*command)
    assert again.returncode == 1
    assert "is not empty" in again.stderr
    (folder / "checkpoint-8").rename(tmp_path / "last")
    (folder / "stages" / "training.json").unlink()
    cli.main(["train", *command[1:], "--resume"])
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert {k: v for k, v in metrics.items() if k != "train_seconds"} == {k: v for k, v in whole.items() if k != "train_seconds"}


@pytest.mark.trains
def test_a_finished_training_survives_a_later_failure(tmp_path, monkeypatch):
    # Without checkpoints, only the finished training is saved.
    recipe, whole, folder = _recipe(*TINY, "training.save_strategy='no'"), tmp_path / "whole", tmp_path / "broken"
    drawn = []
    no_reload(monkeypatch)
    monkeypatch.setattr("modeling_uhop.training.tasks.images.training_figure", lambda *arguments: drawn.append(arguments[1:]))
    run(recipe, whole)
    (expected,) = drawn
    for broken in ("write_results", "training_figure", "write_card", "check_reload"):
        with monkeypatch.context() as patch:
            patch.setattr(f"modeling_uhop.training.{'tasks.images' if broken == 'training_figure' else 'engine'}.{broken}", raising)
            if broken != "write_results":
                patch.setattr(transformers.Trainer, "train", lambda *_, **__: pytest.fail("a finished training was run again"))
            with pytest.raises(ValueError, match="no luck"):
                run(recipe, folder, "fresh" if broken == "write_results" else "resume")
        assert (folder / "results.json").exists() == (broken != "write_results")
    run(recipe, folder, "resume")
    first, second = (without_times(json.loads((each / "results.json").read_text())) for each in (whole, folder))
    assert first == second
    assert "train_seconds" in json.loads((folder / "results.json").read_text())["metrics"]
    log, history, grams = drawn[-1]
    assert without_times(log) == without_times(expected[0])
    assert history == expected[1]
    assert list(grams) == ["before", "after"]
    for moment, layers in grams.items():
        np.testing.assert_allclose(layers, expected[2][moment])
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="no checkpoint to resume from"):
        run(_recipe(*TINY, "training.save_strategy='no'", "training.num_train_epochs=3"), folder, "resume")


def raising(*arguments, **options):
    raise ValueError("no luck")


@pytest.mark.trains
def test_a_run_without_a_logged_separation_loss_finishes(tmp_path):
    metrics = run(_recipe(*TINY[:1], *TINY[2:], "training.logging_steps=500", "separation.schedule=step"), tmp_path / "run")
    assert "separation_loss" not in metrics


def test_without_git_there_is_no_commit(monkeypatch):
    assert commit()
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() is None


def test_results_name_the_commit(tmp_path):
    write_results(tmp_path / "r.json", _recipe(), {"accuracy": 1.0}, extra=[1])
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results) == {"schema", "kind", "name", "metrics", "seed", "recipe", "versions", "commit", "machine", "code", "extra"}


NAN = float("nan")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 10, 9], [2, 10, 9]),
        ([1.0, 0.0], [1, 0]),
        (np.array([1.0, 0.0], np.float32), [1, 0]),
        (["1", "a"], ["1", "a"]),
        ([True, np.False_], [True, False]),
        ([np.array(3), np.int8(4)], [3, 4]),
    ],
)
def test_labels_are_converted_to_plain_classes(labels, expected):
    classes = as_classes(labels, "row {}".format)
    assert classes == expected
    assert [type(label) for label in classes] == [type(label) for label in expected]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, None], "row 1 has no label"),
        ([1.0, NAN], "row 1 has no label"),
        (["a", " "], "row 1 has no label"),
        ([1, [1]], r"row 1 has a list of labels, \[1\]; give one class, not in a list"),
        ([1, np.array([1, 0])], "row 1 has a list of labels"),
        ([1, ()], "row 1 has a list of labels"),
        ([1, 0.5], "row 1 has the label 0.5; a class must be a whole number, text, or true or false"),
        ([1, float("inf")], "row 1 has the label inf; a class"),
        ([1, {"a": 1}], "row 1 has the label .*; a class"),
        ([0, "1"], "row 1 has the label '1', but row 0 has 0; labels must be of one kind"),
        ([0, True], "row 1 has the label True, but row 0 has 0"),
    ],
)
def test_labels_that_are_not_classes_are_refused_by_row(labels, message):
    with pytest.raises(RecipeError, match=message):
        as_classes(labels, "row {}".format)


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        ([1.0, 0.0, 10.0], Value("float64"), ["0", "1", "10"]),
        ([True, False], Value("bool"), ["False", "True"]),
        (["dog", "cat"], Value("string"), ["cat", "dog"]),
    ],
)
def test_labels_of_images_are_classes(tmp_path, labels, kind, names):
    _write_parquet(tmp_path, labels=labels, label_type=kind)
    images = load_images(ImageData(str(tmp_path)))
    assert images["train"].features["label"].names == names
    given = [str(int(label) if isinstance(label, float) else label) for label in labels * 20]
    for split in images.values():
        for row in split:
            assert names[row["label"]] == given[int(row["row"].split()[1])]


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([1, 0, None], Value("int64"), r"row 2 of t\w+ in .* has no label"),
        ([1, 0, None], ClassLabel(names=["a", "b"]), r"row 2 of t\w+ in .* has no label"),
        ([1.0, 0.0, NAN], Value("float64"), r"row 2 of t\w+ in .* has no label"),
        ([1.0, 0.5], Value("float64"), r"row 1 of t\w+ in .* has the label 0.5"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_without_a_class_are_refused_by_row(tmp_path, labels, kind, message, split):
    _write_parquet(tmp_path, labels=labels, label_type=kind, splits=(split,))
    whole = {"train": "test", "test": "train"}[split]
    good = [label for label in labels if label not in (None, 0.5) and label == label]
    _write_parquet(tmp_path, labels=good, label_type=kind, splits=(whole,))
    with pytest.raises(RecipeError, match=message.replace(r"t\w+", split)):
        load_images(ImageData(str(tmp_path)))


def test_lists_of_labels_are_refused_by_row(tmp_path):
    _write_parquet(tmp_path, labels=[[1], [0]], label_type=datasets.List(Value("int64")))
    with pytest.raises(RecipeError, match=r"row 0 of train in .* has a list of labels, \[1\]"):
        load_images(ImageData(str(tmp_path)))


def test_a_missing_image_is_named_or_skipped(tmp_path):
    _write_parquet(tmp_path)
    table = Dataset.from_parquet(str(tmp_path / "test.parquet")).cast_column("image", Image(decode=False)).to_list()
    table[7]["image"] = None
    Dataset.from_list(table, features=Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})).to_parquet(
        tmp_path / "test.parquet"
    )
    images = load_images(ImageData(str(tmp_path)))
    with pytest.raises(RecipeError, match="the image in row 7 of test is missing"):
        list(with_pixels(images["test"], make_image_processor(ImageData(""), 8)))
    with pytest.warns(UserWarning, match="the image in row 7 of test is missing, and is skipped"):
        images = load_images(ImageData(str(tmp_path), skip_unreadable=True))
    assert len(images["test"]) == 39


def test_a_run_on_a_folder_of_image_files_finishes(tmp_path, monkeypatch):
    """An image folder of 16-bit PNG files with one subfolder per class."""
    random = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, brightness in (("dark", 8000), ("light", 50000)):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for index in range(count):
                values = (brightness + random.integers(0, 8000, (8, 8))).astype(np.uint16)
                PILImage.fromarray(values).save(tmp_path / "data" / split / label / f"{index}.png")
    reloaded = no_reload(monkeypatch)
    overrides = [*TINY, f"data.dataset={tmp_path / 'data'}", "data.validation_fraction=0.2", "training.num_train_epochs=4"]
    words = [word for override in overrides for word in ("--set", override)]
    recipe = str(ROOT / "configs" / "vit_digits.yaml")
    cli.main(["train", recipe, "--output_dir", str(tmp_path / "out"), *words])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["recipe"]["data"]["dataset"] == "data"
    ((folder, task, inputs, logits),) = reloaded
    assert (folder, task) == (tmp_path / "out", "image-classification")
    # Because the test split is sorted by class, its images are first dark, then light, and neither
    # black nor white.
    assert [40 < image.mean() < 60 for image in inputs] == [True] * 6 + [False] * 6
    assert [200 < image.mean() < 225 for image in inputs] == [False] * 6 + [True] * 6
    model = UHopViTForImageClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == ["dark", "light"]
    pixel_values = torch.from_numpy(np.stack(inputs)).movedim(-1, 1) / 127.5 - 1
    with torch.no_grad():
        np.testing.assert_allclose(model(pixel_values).logits, logits, atol=1e-4)
    accuracy = (logits.argmax(-1) == np.repeat([0, 1], 6)).mean()
    assert results["metrics"]["test_accuracy"] == pytest.approx(accuracy)
    (evaluation,) = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert evaluation.metric_value == pytest.approx(accuracy)
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
