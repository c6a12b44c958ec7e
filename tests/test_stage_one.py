"""Tests of Separation and StageOne: their values, their steps, and Stage I on a data set of its own."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modeling_uhop import (
    BagViews,
    FeatureMap,
    Separation,
    SeparationCallback,
    StageOne,
    UHopMemoryConfig,
    UHopMemoryModel,
    UHopMILConfig,
    UHopMILFeatureExtractor,
    UHopMILForBagClassification,
    denoising_loss,
    mask_patterns,
    maximize_separation,
    separation_loss,
)
from modeling_uhop.separation import PRESETS
from modeling_uhop.training.data.bags import BagData, digit_bags
from modeling_uhop.training.data.images import ImageData
from modeling_uhop.training.data.series import SeriesData, load_series, unlabelled_windows
from modeling_uhop.training.engine import run
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.recipe import apply_override
from modeling_uhop.training.stage_one import separation_callback, with_defaults
from modeling_uhop.training.tasks.bags import BagClassification
from tests.conftest import assert_close
from tests.support.recipes import no_figures, no_reload, results_of, tiny
from tests.support.training import Images, image_model, map_weights, train


def test_presets_are_the_papers_methods():
    assert Separation.uhop() == Separation(
        kind="average", normalize_rows=True, parameters="feature_maps", optimizer="adam", lr=1e-3, temperature=0.25
    )
    plus = Separation.uhop_plus(lr=0.5)
    assert (plus.kind, plus.project, plus.temperature, plus.final_temperature, plus.lr) == ("per_memory", True, 0.25, 0.01, 0.5)
    second = Separation.algorithm_2()
    assert (second.kind, second.steps, second.parameters, second.optimizer) == ("squared", 1, "feature_maps", "sgd")
    assert (Separation.denoising().kind, Separation.denoising().temperature) == ("denoising", 0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        second.lr = 3.0


def test_unknown_fields_are_named():
    with pytest.raises(TypeError, match=r"\['method'\] must be among the fields of Separation.*presets \['uhop', 'uhop_plus'"):
        maximize_separation(FeatureMap(3), torch.randn(4, 3), method="uhop+")
    with pytest.raises(TypeError, match=r"\['step'\] must be among"):
        SeparationCallback(step=3)


@pytest.mark.parametrize("parameters", ["feature_maps", "upstream"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_loop_of_ones_own_equals_the_callback(tmp_path, preset, parameters):
    dataset = Images(size=8, augment=False)
    batch = {"pixel_values": dataset.images}
    separation = PRESETS[preset](steps=4, batch_size=8, parameters=parameters, lr=0.05, corruption=lambda images: 0.5 * images)
    callback = SeparationCallback(separation=separation)
    trained = image_model()
    train(tmp_path, callback, model=trained, dataset=dataset, learning_rate=0.0)
    model = image_model().eval()
    stage = StageOne(model, separation)
    # The callback draws the examples in another order, which changes only the rounding of a mean.
    losses = [stage.step(batch).mean().item() for _ in range(4)]
    stage.finish_round()
    assert [entry["separation_loss"] for entry in callback.history] == pytest.approx(losses, abs=2e-5)
    for ours, theirs in zip(map_weights(model), map_weights(trained), strict=True):
        assert_close(ours, theirs, scale=20)


def test_run_repeats_its_batches_and_measures_the_end():
    torch.manual_seed(0)
    model = image_model().eval()
    batches = [{"pixel_values": Images(size=12, augment=False).images[start : start + 6]} for start in (0, 6)]
    stage = StageOne(model, Separation.uhop(), steps=5, lr=0.01)
    history = stage.run(batches)
    assert len(history) == 6
    assert stage.steps_done == 5
    # The sixth batch is the second again, with the final maps, whose rows have unit norm.
    expected = [separation_loss(each.features()) for each in model.memory_sets(**batches[1])]
    assert history[-1] == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)
    assert_close(torch.stack([weight.norm(dim=-1) for weight in map_weights(model)]), torch.ones(2, 16))
    with pytest.raises(ValueError, match="batches ended after 0 of 5 steps"):
        stage.run([])
    with pytest.raises(ValueError, match="batches ended after 2 of 5 steps"):
        stage.run(iter(batches))
    # Without a further batch, the last loss is that of the last batch.
    once = StageOne(image_model().eval(), Separation.uhop(), steps=2)
    history = once.run(iter(batches))
    expected = [separation_loss(each.features()) for each in once.model.memory_sets(**batches[1])]
    assert history[-1] == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)


def test_the_state_of_a_stage_resumes_exactly():
    batches = [{"pixel_values": images} for images in Images(size=24, augment=False).images.split(8)]
    settings: dict[str, Any] = {"parameters": "upstream", "optimizer": "adam", "lr": 1e-2, "final_temperature": 0.05, "steps": 6}
    whole = StageOne(image_model().eval(), **settings)
    for batch in batches * 2:
        whole.step(batch)
    first = StageOne(image_model().eval(), **settings)
    for batch in batches:
        first.step(batch)
    second_model = image_model().eval()
    second = StageOne(second_model, **settings)
    with pytest.raises(ValueError, match="the state belongs to other weights than the loaded ones"):
        second.load_state_dict(first.state_dict())
    second_model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for batch in batches:
        second.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, second.parameters, strict=True))
    with pytest.raises(ValueError, match="was written with optimizer='adam' and cannot be resumed with optimizer='sgd'"):
        StageOne(second_model, **{**settings, "optimizer": "sgd"}).load_state_dict(second.state_dict())


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"temperature": 0.1}, {"kind": "squared"}, {"project": True}])
def test_a_state_belongs_to_its_separation(change):
    state = StageOne(image_model(), Separation.uhop()).state_dict()
    with pytest.raises(ValueError, match=rf"was written with {next(iter(change))}=.* and cannot be resumed with"):
        StageOne(image_model(), Separation.uhop(**change)).load_state_dict(state)


def test_the_temperature_stays_at_its_end():
    falling = Separation.uhop_plus()
    assert falling.temperature_of(5, 3) == falling.temperature_of(2, 3) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        StageOne(FeatureMap(3), falling, total_steps=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", "0.1"),
        ("lr", None),
        ("lr", float("inf")),
        ("temperature", None),
        ("temperature", "0.25"),
        ("final_temperature", 0.5),
        ("noise", None),
        ("steps", True),
        ("steps", None),
        ("project", "no"),
        ("pool_memories", 1),
        ("corruption", "mask_patterns"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must be .*, got {value!r}$"):
        Separation(**{field: value})


def test_numbers_of_numpy_are_numbers():
    assert Separation(steps=np.int64(5), lr=np.float64(0.5)) == Separation(steps=5, lr=0.5)


@pytest.mark.parametrize("wrong", ["uhop", Separation.uhop, {"kind": "average"}, 20])
def test_what_is_not_a_separation_is_refused(wrong):
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=3))
    memory.store(torch.randn(4, 3))
    for call in (
        lambda: maximize_separation(FeatureMap(3), torch.randn(4, 3), wrong),
        lambda: StageOne(FeatureMap(3), wrong),
        lambda: SeparationCallback(separation=wrong),
        lambda: memory.separate(wrong),
    ):
        with pytest.raises(TypeError, match=r"separation must be a Separation, such as Separation.uhop\(\), got"):
            call()
    with pytest.raises(ValueError, match="a Separation is passed as separation="):
        SeparationCallback(Separation.uhop())


def test_batches_of_the_wrong_kind_are_refused():
    batch = {"pixel_values": Images(size=4, augment=False).images}
    stage = StageOne(image_model(), steps=1)
    for wrong in (batch, batch["pixel_values"]):
        with pytest.raises(TypeError, match=r"a batch must be a dictionary .*`run` takes a list of batches"):
            stage.run(wrong)
    with pytest.raises(ValueError, match=r"a batch must have pixel_values, the main input of the model, got \['image'\]"):
        StageOne(image_model(), Separation.denoising()).step({"image": batch["pixel_values"]})
    with pytest.raises(TypeError, match="a batch of a FeatureMap must be memories, or memories and a mask, got list"):
        StageOne(FeatureMap(3)).step([torch.randn(4, 3)])
    with pytest.raises(ValueError, match="there is nothing to separate"):
        maximize_separation(FeatureMap(3), torch.randn(1, 3))
    mask = torch.tensor([True, True, False, True])
    memories = torch.randn(4, 3)
    pair, listed = (StageOne(FeatureMap(3, feature_init="identity")).step(given) for given in ((memories, mask), [memories, mask]))
    assert torch.equal(pair, listed)


def test_a_memory_separates_itself_and_does_nothing_without_steps():
    memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=8))
    memory.store(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"UHopMemoryModel separates its own patterns: call separate\(separation\)"):
        StageOne(memory, Separation.denoising())
    assert memory.feature_map is not None
    kept = memory.feature_map.weight.detach().clone()
    memory.separate(Separation.uhop_plus(), steps=0)
    assert torch.equal(memory.feature_map.weight, kept)


def test_layers_below_a_frozen_map_can_be_separated():
    model = image_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("patch_embeddings" in name)
    stage = StageOne(model, lr=0.1)
    before = model.vit.embeddings.patch_embeddings.projection.weight.detach().clone()
    stage.step({"pixel_values": Images(size=4, augment=False).images})
    assert not torch.equal(model.vit.embeddings.patch_embeddings.projection.weight, before)
    with pytest.raises(ValueError, match="there is nothing to train"):
        StageOne(model.requires_grad_(False))


def test_corrupted_copies_are_made_of_the_main_input():
    model = UHopMILForBagClassification(UHopMILConfig(instance_dim=5, hidden_size=8, num_attention_heads=2)).eval()
    batch = {"instances": torch.randn(2, 4, 5), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    stage = StageOne(model, Separation.denoising(corruption=mask_patterns), lr=0.0)
    clean, copy = stage.views(batch)
    assert clean is batch
    assert set(copy) == set(batch)
    assert ((copy["instances"] == 0) | (copy["instances"] == batch["instances"])).all()
    assert (copy["instances"] == 0).any()
    ((memories,), (corrupted,)) = (model.memory_sets(**each) for each in (batch, copy))
    expected = denoising_loss(corrupted.features(), memories.features(), mask=memories.mask)
    assert_close(stage.step(batch, copy), expected.unsqueeze(0))
    assert StageOne(model).views(batch) == (batch, None)


def test_a_gradient_that_is_not_finite_is_refused_before_it_changes_a_weight():
    phi = FeatureMap(3)
    kept = phi.weight.detach().clone()
    with pytest.raises(ValueError, match="the gradient of the separation loss must be finite"):
        StageOne(phi).step(torch.full((4, 3), torch.nan))
    assert torch.equal(phi.weight, kept)


def test_masked_memories_of_one_map_have_no_influence():
    memories, mask = torch.randn(5, 3), torch.tensor([True, True, False, True, True])
    maps = [FeatureMap(3, feature_init="identity") for _ in range(2)]
    maximize_separation(maps[0], memories, Separation.denoising(corruption=lambda x: 0.5 * x), mask=mask, steps=3, lr=0.1)
    maximize_separation(maps[1], memories[mask], Separation.denoising(corruption=lambda x: 0.5 * x), steps=3, lr=0.1)
    assert_close(maps[0].weight, maps[1].weight)


class Unlabelled(torch.utils.data.Dataset):
    """Images without labels, and a column that the model does not take."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "file": f"{index}.png"}


class Streamed(torch.utils.data.IterableDataset):
    """The same images as a stream."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __iter__(self):
        return iter([{"pixel_values": image} for image in self.images])


@pytest.mark.parametrize("schedule", ["train_begin", "epoch", "step"])
@pytest.mark.parametrize("streamed", [False, True])
def test_stage_one_can_draw_from_another_data_set(tmp_path, schedule, streamed):
    images = Images(size=8, augment=False).images + 3.0
    source: Any = Streamed(images) if streamed else Unlabelled(images)
    callback = SeparationCallback(schedule, 1, dataset=source, batch_size=8, lr=0.05)
    model = image_model(hidden_dropout_prob=0.0)
    expected = StageOne(image_model(hidden_dropout_prob=0.0).eval(), batch_size=8).step({"pixel_values": images}).mean()
    train(tmp_path, callback, model=model, dataset=Images(augment=False))
    assert callback.history[0]["separation_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_a_collator_of_its_own_makes_the_batches(tmp_path):
    def collate(examples):
        return {"pixel_values": torch.stack([example["pixel_values"] for example in examples]) * 0.5}

    images = Images(size=8, augment=False).images
    callback = SeparationCallback(steps=1, dataset=Unlabelled(images), data_collator=collate, batch_size=8)
    expected = StageOne(image_model().eval(), batch_size=8).step({"pixel_values": images * 0.5}).mean()
    train(tmp_path, callback)
    assert callback.history[0]["separation_loss"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("wrong", ["cifar10", {"pixel_values": []}, torch.zeros(3, 1, 8, 8)])
def test_what_is_not_a_data_set_is_refused(tmp_path, wrong):
    with pytest.raises(TypeError, match="dataset must be a data set of examples, map-style or a stream, got"):
        train(tmp_path, SeparationCallback(dataset=wrong))


def test_a_generator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the separation data set is a stream that can be read only once"):
        train(tmp_path, SeparationCallback(dataset=(example for example in [{"pixel_values": torch.zeros(1, 8, 8)}])))


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the separation data set is empty"):
        train(tmp_path, SeparationCallback(dataset=Unlabelled(torch.zeros(0, 1, 8, 8))))


def test_a_recipe_names_a_preset_and_a_data_set():
    asked = []

    def load(*where):
        asked.append(where)
        return [1, 2]

    section = {"preset": "uhop_plus", "steps": 7, "schedule": "epoch", "dataset": "stl10", "split": "unlabelled"}
    callback = separation_callback(section, load)
    assert callback is not None
    assert asked == [("stl10", "unlabelled")]
    assert (callback.separation, callback.schedule, callback.dataset) == (Separation.uhop_plus(steps=7), "epoch", [1, 2])
    assert separation_callback(None, lambda *_: None) is None
    plain = separation_callback({"lr": 0.5}, lambda *_: pytest.fail("no data set was asked for"))
    assert plain is not None
    assert (plain.separation, plain.dataset) == (Separation(lr=0.5), None)
    with pytest.raises(RecipeError, match=r"separation.preset must be one of \['uhop', .* got 'u-hop'"):
        separation_callback({"preset": "u-hop"}, lambda *_: None)


def test_a_recipe_names_views_and_their_fields():
    section = {"preset": "two_views", "views": {"dropout": 0.3}, "steps": 4}
    callback: Any = separation_callback(section, lambda *_: None, BagViews)
    assert callback.separation == Separation.two_views(BagViews(dropout=0.3), steps=4)
    callback = separation_callback({"kind": "koleo", "views": True}, lambda *_: None, BagViews)
    assert (callback.separation.kind, callback.separation.views) == ("koleo", BagViews())
    for views, message in ((None, "this task has no views"), (BagViews, "must be true, or a mapping")):
        with pytest.raises(RecipeError, match=message):
            separation_callback({"kind": "koleo", "views": "flip"}, lambda *_: None, views)
    with pytest.raises(RecipeError, match=r"separation\.views: .*drop_out"):
        separation_callback({"kind": "koleo", "views": {"drop_out": 0.1}}, lambda *_: None, BagViews)


@pytest.mark.parametrize("task", ["images", "bags", "series"])
def test_every_task_has_views(task, tmp_path, monkeypatch):
    no_figures(monkeypatch)
    no_reload(monkeypatch)
    views = ("separation.preset=two_views", "separation.views=true", "separation.steps=2", "separation.batch_size=8")
    run(tiny(task, *views, "training.max_steps=1"), tmp_path / "run")
    (entry,) = [each for each in results_of(tmp_path / "run")["log_history"] if "separation_loss" in each and "loss" not in each]
    assert math.isfinite(entry["separation_loss"])
    assert with_defaults({"lr": 0.5}) == with_defaults({"lr": 0.5, "kind": "average", "schedule": "train_begin", "batch_size": None})


def test_unlabelled_images_leave_out_the_validation_images(tmp_path):
    from modeling_uhop.training.data.images import load_images, unlabelled_images

    data = ImageData("digits", max_train_samples=100)
    images, splits = unlabelled_images(data), load_images(data)
    assert images.column_names == ["image", "row"]
    assert len(images) == len(load_images(ImageData("digits"))["train"]) > 1200
    assert not set(images["row"]) & {*splits["validation"]["row"], *splits["test"]["row"]}
    assert set(splits["train"]["row"]) < set(images["row"])
    # Another data set needs no labels.
    splits["test"].remove_columns(["label", "row"]).to_parquet(tmp_path / "unlabelled.parquet")
    other = unlabelled_images(data, str(tmp_path), "unlabelled")
    assert len(other) == len(splits["test"])
    with pytest.raises(RecipeError, match=r"no file or folder .*missing"):
        unlabelled_images(data, str(tmp_path / "missing"), "unlabelled")


def test_unlabelled_bags_and_windows(tmp_path):
    from datasets import Dataset

    from modeling_uhop.training.data.bags import load_instances

    bags = [bag.tolist() for bag in digit_bags().instances[:5]]
    Dataset.from_dict({"instances": bags}).to_parquet(tmp_path / "bags.parquet")
    loaded = load_instances(BagData(str(tmp_path / "bags.parquet")))
    assert all(np.allclose(ours, theirs) for ours, theirs in zip(loaded, bags, strict=True))
    recipe = SeriesData("synthetic", split=[200, 61, 60])
    series = load_series(recipe)
    assert len(unlabelled_windows(recipe, series, (24, 6))) == len(series.windows("train", 24, 6))
    assert unlabelled_windows(recipe, series, (24, 6), split="validation")[0]["past_values"].shape == (24, len(series.names))
    with pytest.raises(RecipeError, match=r"separation.split must be one of \['train', 'validation', 'test'\], got 'all'"):
        unlabelled_windows(recipe, series, (24, 6), split="all")
    (tmp_path / "two.csv").write_text("date,a,b\n" + "\n".join(f"2020-01-{day:02d},{day},{day * day % 7}" for day in range(1, 31)))
    with pytest.raises(RecipeError, match=r"separation.dataset must have \d+ series, as data.dataset has, got 2"):
        unlabelled_windows(dataclasses.replace(recipe, split=[0.6, 0.2, 0.2]), series, (4, 2), str(tmp_path / "two.csv"))


def test_a_preset_on_the_command_line_replaces_the_fields_of_the_file():
    content: dict[str, Any] = {"separation": {"schedule": "step", "kind": "squared", "lr": 0.5, "parameters": "upstream", "steps": 3}}
    apply_override(content, "separation.preset=uhop_plus")
    apply_override(content, "separation.lr=0.2")
    assert content["separation"] == {"schedule": "step", "steps": 3, "preset": "uhop_plus", "lr": 0.2}
    assert (
        with_defaults({"preset": "uhop"}) == with_defaults({"preset": "uhop", "lr": 1e-3}) != with_defaults({"preset": "uhop", "lr": 0.1})
    )
    assert with_defaults({"schedule": "step"}) == with_defaults({"schedule": "step", "steps": 1})


def test_bags_of_other_folds_are_left_out(monkeypatch, tmp_path):
    drawn: list[Any] = []
    replaced = "modeling_uhop.training.trainers.separation_callback"
    monkeypatch.setattr(replaced, lambda section, load, views: drawn.append(load(None, "train")))
    task = BagClassification(tiny("bags", "training.max_steps=1"))
    task.bags = digit_bags()
    task.fit(np.arange(0, 40, 2), 0, tmp_path)
    (bags,) = drawn
    extractor = UHopMILFeatureExtractor().fit(task.bags.instances[:40:2])
    expected = extractor.transform(task.bags.instances[:40:2])
    assert len(bags) == 20
    assert all(np.array_equal(bag["instances"], known) for bag, known in zip(bags, expected, strict=True))
    task.recipe.data.dataset = "digits"
    examples = task.examples_of(np.arange(20), 0)
    with pytest.raises(RecipeError, match=r"digits has no split 'foo'"):
        examples.unlabelled(None, "foo")


def test_unknown_splits_of_images_are_refused():
    from modeling_uhop.training.data.images import unlabelled_images

    with pytest.raises(RecipeError, match=r"digits has no split 'foo'; it has \['test', 'train'\]"):
        unlabelled_images(ImageData("digits"), split="foo")


@pytest.mark.parametrize(
    ("task", "columns"),
    [("images", {"pixel_values"}), ("bags", {"instances", "attention_mask"}), ("series", {"past_values", "future_values"})],
)
def test_every_task_separates_on_unlabelled_data(tmp_path, task, columns, monkeypatch):
    """A run whose Stage I has a data set of its own separates on it."""
    drawn = []
    step = StageOne.step

    def recorded(self, batch, *views):
        drawn.append(set(batch))
        return step(self, batch, *views)

    monkeypatch.setattr(StageOne, "step", recorded)
    no_reload(monkeypatch)
    no_figures(monkeypatch)
    recipe = tiny(task, "separation.split=train", "training.max_steps=1", "training.eval_strategy='no'", "patience=null")
    run(recipe, tmp_path / "run")
    # The two folds of bags have a separation step each.
    assert drawn == [columns] * (6 if task == "bags" else 2)
    assert results_of(tmp_path / "run")["recipe"]["separation"] == {"steps": 2, "batch_size": 8, "split": "train"}


def test_a_model_without_memories_is_refused():
    with pytest.raises(ValueError, match=r"needs a model with feature maps .* Linear has none"):
        StageOne(nn.Linear(2, 2))
