import base64
import io
import re
import runpy
import shutil
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import demo_bags
import demo_classifier
import demo_digits
import demo_drawing
import demo_forecast
import demo_landscape
import demo_links
import demo_memory
import demo_models
import make_models
import numpy as np
import pandas
import pytest
import torch
import yaml
from demo_digits import DemoError
from demo_memory import MemorySettings
from huggingface_hub import ModelCard
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient
from take_screenshots import READY, SIZES, TRAINING_MS, chromium, open_tab, running_demo

from modeling_uhop import (
    Separation,
    UHopMemoryConfig,
    UHopMemoryModel,
    UHopMILConfig,
    UHopMILFeatureExtractor,
    UHopMILForBagClassification,
    UHopViTConfig,
    UHopViTForImageClassification,
    energy,
    retrieve,
)
from modeling_uhop.training.data.images import ImageData, load_images
from modeling_uhop.training.recipe import load_recipe
from modeling_uhop.training.results import as_recorded, provenance
from tests.conftest import assert_close
from tests.support.models import COMPACT


app = pytest.importorskip("app", reason="the demo needs gradio")

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "space"
# With values of its own, so that tests do not depend on the package's defaults.
SMALL = MemorySettings(count=30, alpha=1.0, beta=30.0, update_steps=3, method="U-Hop", separation_steps=100)


def test_the_front_matter_is_what_a_space_needs():
    _, front, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    pinned = re.search(r"^gradio==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert card["sdk"] == "gradio"
    assert card["sdk_version"] == pinned.group(1)
    assert (SPACE / card["app_file"]).is_file()
    assert card["license"] == "apache-2.0"
    assert len(card["short_description"]) <= 60
    assert {card["colorFrom"], card["colorTo"]} <= {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert card["title"]
    assert card["emoji"]
    assert card["tags"]
    assert (SPACE / "requirements.txt").read_text().split() == ["modeling-uhop[demo]"]


def test_screenshots_are_small():
    pictures = list((SPACE / "screenshots").glob("*.png"))
    assert {f"{size}_{name.lower()}.png" for size in SIZES for name in READY} == {picture.name for picture in pictures}
    assert max(picture.stat().st_size for picture in pictures) < 300_000


def test_what_is_shown_is_the_test_split_of_the_recipe():
    digits, images = demo_digits.load(), load_images(ImageData("digits"))
    recipe = [np.asarray(image) for image in images["test"]["image"]]
    shown = [np.uint8(digits.images[index] * 255) for index in digits.test]
    assert [image.tobytes() for image in recipe] == [image.tobytes() for image in shown]
    assert not set(digits.train.tolist()) & set(digits.test.tolist())
    assert digits.labels[demo_digits.examples()].tolist() == list(range(10))
    assert set(demo_digits.examples()) <= set(digits.test.tolist())


# The models that come with the demo.


def _card(name: str) -> ModelCard:
    return ModelCard.load(demo_models.SHIPPED / name / "README.md")


def _stated(name: str) -> dict[str, float]:
    return {result.metric_type: result.metric_value for result in vars(_card(name).data)["eval_results"]}


def test_shipped_models_are_small_and_safe():
    files = [path for path in demo_models.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_000_000
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    for name, recipe in (("digits", make_models.CLASSIFIER), ("bags", make_models.BAGS)):
        assert f"python space/make_models.py {name}" in _card(name).content
        assert recipe in _card(name).content
        assert (ROOT / recipe).is_file()


@pytest.mark.parametrize(
    ("name", "recipe", "metrics", "text"),
    [
        ("digits", make_models.CLASSIFIER, {"test_accuracy": 0.9711}, "classifies 0.9711 of the 9 held-out images"),
        ("bags", make_models.BAGS, {"auc": 0.9, "accuracy": 0.8125, "f1": 0.8}, "On 9 held-out images, its accuracy is 0.8125."),
    ],
)
def test_the_card_of_a_shipped_model_can_be_written_again(tmp_path, name, recipe, metrics, text):
    loaded = as_recorded(load_recipe(ROOT / recipe))
    results = {"recipe": loaded, "metrics": metrics, "seed": 0, "num_parameters": 1234, **provenance()}
    card = make_models.write_card(tmp_path, results, name, recipe, "9 held-out images")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert text in card.text
    stated = vars(card.data)
    assert [result.metric_value for result in stated["eval_results"]] == list(metrics.values())
    assert "custom_code" not in stated["tags"]
    # Headings, commands and code are those of the card that is shipped.
    shipped = _card(name).text
    for begins in ("#", "python ", "from ", "folder = ", "model, ", "The command runs"):
        assert [line for line in card.text.splitlines() if line.startswith(begins)] == [
            line for line in shipped.splitlines() if line.startswith(begins)
        ]


def test_the_card_of_the_classifier_states_its_accuracy(classifier):
    digits = demo_digits.load()
    images = [demo_models.digit_image(digits.images[index]) for index in digits.test]
    with torch.no_grad():
        logits = classifier.model(**classifier.processor(images, return_tensors="pt")).logits
    accuracy = float((logits.argmax(-1).numpy() == digits.labels[digits.test]).mean())
    assert _stated("digits") == {"accuracy": round(accuracy, 4)}
    assert f"classifies {accuracy:.4f} of the {len(images)} test images" in _card("digits").content
    assert accuracy > 0.95


def test_the_card_of_the_bag_classifier_states_its_accuracy(bag_classifier):
    bags = [make_models.pixels_of(bag) for bag in make_models.held_out_bags()]
    logits, _ = make_models.predict(bag_classifier.model, bag_classifier.extractor, bags)
    accuracy = float((logits.argmax(-1) == make_models.held_out_labels()).mean())
    assert _stated("bags")["accuracy"] == pytest.approx(accuracy, abs=1e-4)
    assert accuracy > 0.9


def test_the_first_classification_takes_less_than_five_seconds():
    started = time.perf_counter()
    known = demo_models.load_classifier(str(demo_models.SHIPPED / "digits"))
    image = demo_models.digit_image(demo_digits.load().images[demo_digits.examples()[4]])
    answer = demo_classifier.classify(known, image)
    demo_classifier.answer_view(known, image, answer)
    assert time.perf_counter() - started < 5
    assert answer.names[int(answer.scores.argmax())] == "4"
    assert known.source == "space/models/digits, which comes with the demo"


# The memory explorer.


def test_the_demo_begins_with_the_defaults_of_the_package():
    start, config = MemorySettings(), UHopMemoryConfig()
    separation = UHopMemoryModel(config).default_separation
    assert demo_memory.METHODS[start.method]().kind == separation.kind == "denoising"
    assert start.separation_steps == separation.steps
    assert (start.alpha, start.beta, start.update_steps) == (config.alpha, config.beta, config.update_steps)


@pytest.mark.parametrize("method", demo_memory.METHODS)
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("corruption", demo_memory.CORRUPTIONS)
def test_the_energy_never_rises(method, alpha, corruption):
    settings = replace(SMALL, method=method, alpha=alpha, corruption=corruption, update_steps=6, separation_steps=30)
    _, sides = demo_memory.explore(settings)
    assert set(sides) == ({"without"} if method == "none" else {"without", "with"})
    for result in sides.values():
        assert (result.energies.diff(dim=0) <= 1e-5).all()
        assert_close(result.association.sum(-1), torch.ones(30))


@pytest.mark.parametrize("side", ["without", "with"])
def test_confusions_are_those_of_a_loop(side):
    settings = replace(SMALL, count=40, separation_steps=50)
    indices, sides = demo_memory.explore(settings)
    patterns = demo_memory.patterns_of(indices)
    memory = demo_memory.memory_of(patterns, settings, None if side == "without" else Separation.uhop)
    weight = memory.feature_map.weight.double()
    damaged = demo_memory.corrupted(patterns, settings.corruption, settings.amount, settings.seed).double()
    stored = [pattern / (weight @ pattern).norm() for pattern in patterns.double()]
    confused = 0
    for number, query in enumerate(damaged):
        state = query / (weight @ query).norm()
        for _ in range(settings.update_steps):
            scores = [settings.beta * float((weight @ one) @ (weight @ state)) for one in stored]
            powers = [np.exp(score - max(scores)) for score in scores]
            state = sum(power / sum(powers) * one for power, one in zip(powers, stored, strict=True))
        likeness = [float(one @ state / one.norm()) for one in stored]
        confused += int(np.argmax(likeness) != number)
    assert 0 < confused < 40
    assert int(sides[side].confused.sum()) == confused


def test_separation_helps_where_the_demo_begins():
    _, sides = demo_memory.explore(MemorySettings())
    assert sides["with"].error < 0.95 * sides["without"].error
    assert int(sides["with"].confused.sum()) <= int(sides["without"].confused.sum())


def test_the_error_is_that_of_the_mixed_images():
    indices, sides = demo_memory.explore(SMALL)
    patterns = demo_memory.patterns_of(indices)
    result = sides["without"]
    total = sum(float(((weights[:, None] * patterns).sum(0) - patterns[i]).square().sum()) for i, weights in enumerate(result.association))
    assert result.error == pytest.approx(total / len(patterns), rel=1e-5)


def test_without_steps_both_sides_agree():
    for method in ("U-Hop+", "denoising"):
        _, sides = demo_memory.explore(replace(SMALL, method=method, separation_steps=0))
        assert_close(sides["with"].states, sides["without"].states)


def test_every_setting_changes_what_is_retrieved():
    _, before = demo_memory.explore(SMALL)
    changes = {"corruption": "add noise", "amount": 0.6, "alpha": 1.7, "beta": 12.0, "method": "U-Hop+", "separation_steps": 20, "seed": 3}
    for name, value in changes.items():
        _, after = demo_memory.explore(replace(SMALL, **{name: value}))
        assert not torch.allclose(before["with"].states, after["with"].states, atol=1e-3), name
    assert len(demo_memory.explore(replace(SMALL, count=31))[0]) == 31
    assert len(demo_memory.explore(replace(SMALL, update_steps=5))[1]["with"].states) == 6


def test_the_lower_part_is_hidden_row_by_row():
    hidden = demo_memory.corrupted(torch.ones(2, 64), "hide the lower part", 0.25, 0).reshape(2, 8, 8)
    assert hidden[:, :6].eq(1).all()
    assert hidden[:, 6:].eq(0).all()


def test_an_empty_memory_is_said_in_words():
    with pytest.raises(DemoError, match="Nothing is stored"):
        demo_memory.headline(replace(SMALL, count=0), 0)


def test_a_single_digit_is_never_confused():
    _, sides = demo_memory.explore(replace(SMALL, count=1))
    assert not sides["without"].confused.any()
    assert not sides["with"].confused.any()


def test_the_next_confused_digit_is_one_that_separation_rescues():
    _, sides = demo_memory.explore(SMALL)
    rescued = (sides["without"].confused & ~sides["with"].confused).nonzero().flatten().tolist()
    assert demo_memory.next_confused(SMALL, rescued[0]) == rescued[1]
    assert demo_memory.next_confused(SMALL, rescued[-1]) == rescued[0]
    assert demo_memory.next_confused(replace(SMALL, amount=0.0, alpha=2.0, beta=100.0), 0) is None


def test_the_weights_that_are_shown_and_the_rest_are_all():
    weights = np.array([0.05, 0.4, 0.0, 0.3, 0.1, 0.06, 0.05, 0.04])
    page = demo_memory.weights_view(weights, np.zeros((8, 8, 8)), np.arange(8), digit=1, most=3)
    assert re.findall(r'hop-number">([^<]*)<', page) == ["40 %", "30 %", "10 %"]
    assert "7 of 8 memories have weight; those not shown 20 %" in page
    assert page.count(demo_drawing.RIGHT) == 1


# The landscape.

POINTS = torch.tensor([[0.9, 0.3], [0.4, 0.8], [-0.7, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 1.6])
def test_the_landscape_is_the_energy_at_the_places_of_its_pixels(alpha):
    resolution, reach = 16, demo_landscape.REACH
    heights = demo_landscape.landscape(POINTS, alpha, 12.0, resolution)
    for row in (0, 5, 15):
        for column in (0, 9, 15):
            place = torch.tensor([[(column + 0.5) / resolution, (row + 0.5) / resolution]], dtype=torch.float64) * 2 * reach - reach
            assert_close(torch.tensor(heights[row, column]), energy(place, POINTS, beta=12.0, alpha=alpha)[0])


def test_the_picture_is_darkest_where_the_memory_is():
    memory = torch.tensor([[0.8, -0.5]], dtype=torch.float64)
    picture = np.asarray(demo_landscape.energy_picture(demo_landscape.landscape(memory, 1.0, 10.0), pixels=320).convert("L"), dtype=float)
    blurred = sum(np.roll(np.roll(picture, i, 0), j, 1) for i in range(-4, 5) for j in range(-4, 5))
    row, column = np.unravel_index(blurred.argmin(), blurred.shape)
    x, y = (column + 0.5) / 320 * 2 - 1, 1 - (row + 0.5) / 320 * 2
    assert x * demo_landscape.REACH == pytest.approx(0.8, abs=0.12)
    assert y * demo_landscape.REACH == pytest.approx(-0.5, abs=0.12)


def test_the_plane_of_features_is_that_of_a_kernelized_memory():
    phi = demo_landscape.separated_map(POINTS, 5)
    features = demo_landscape.features(phi, POINTS)
    assert_close(features.norm(dim=-1), POINTS.norm(dim=-1))
    assert not torch.allclose(features, POINTS, atol=0.05)
    scaled = POINTS * (POINTS.norm(dim=-1, keepdim=True) / phi(POINTS).norm(dim=-1, keepdim=True))
    states = torch.tensor([[0.2, 0.9], [-0.4, -0.3]], dtype=torch.float64)
    kernelized = energy(states, scaled, beta=9.0, alpha=1.5, feature_map=phi)
    assert_close(energy(phi(states), features, beta=9.0, alpha=1.5), kernelized)
    retrieved = retrieve(states, scaled, beta=9.0, alpha=1.5, feature_map=phi)
    assert_close(retrieve(phi(states), features, beta=9.0, alpha=1.5), phi(retrieved))


def test_without_separation_steps_features_are_the_patterns():
    assert_close(demo_landscape.features(demo_landscape.separated_map(POINTS, 0), POINTS), POINTS)


def test_a_basin_is_where_retrieval_ends():
    basin = demo_landscape.basins(POINTS, 2.0, 20.0, resolution=9)
    places = demo_landscape.plane(9).reshape(9, 9, 2)
    for row, column in ((0, 0), (8, 8), (4, 1), (7, 3)):
        end = places[row, column][None]
        for _ in range(demo_landscape.STEPS):
            end = retrieve(end, POINTS, beta=20.0, alpha=2.0)
        distances = (end - POINTS).norm(dim=-1)
        assert basin[row, column] == (int(distances.argmin()) if distances.min() < demo_landscape.NEAR else -1)
    assert set(np.unique(basin)) >= {0, 1, 2}
    picture = np.asarray(demo_landscape.basin_picture(basin))
    assert (picture[0, 0] == picture[-1, -1]).all() == (basin[-1, 0] == basin[0, -1])


def test_energy_falls_along_the_paths():
    ways = demo_landscape.path(demo_landscape.plane(5), POINTS, alpha=1.3, beta=8.0)
    heights = energy(ways, POINTS, beta=8.0, alpha=1.3)
    assert (heights.diff(dim=0) <= 1e-9).all()


def test_a_scene_begins_crowded_and_is_told_apart():
    scene = demo_landscape.scene(demo_landscape.starting_points(), 1.0, 35.0, 6, "basins")
    patterns, features = scene["sides"]
    assert patterns["points"] == scene["points"]
    assert patterns["query"][0] == scene["query"]
    assert patterns["ending"] == "x reaches memory 4"
    assert features["ending"] == "x reaches memory 5"


def test_what_is_dragged_stays_in_the_picture():
    state = demo_landscape.moved([[9.0, -0.25], [0.1, 0.2]], [0.0, -7.0], 4)
    reach = demo_landscape.REACH
    assert state == {"points": [[reach, -0.25], [0.1, 0.2]], "query": [0.0, -reach], "stamp": 4}
    with pytest.raises(DemoError, match="not at a place"):
        demo_landscape.moved([[float("nan"), 0.0]], [0.0, 0.0], 1)
    with pytest.raises(DemoError, match="1 to 8 memories, not 9"):
        demo_landscape.moved([[0.0, 0.0]] * 9, [0.0, 0.0], 1)


def test_memories_come_and_go_within_bounds():
    state = demo_landscape.starting_points()
    while len(state["points"]) < demo_landscape.MOST_POINTS:
        state = demo_landscape.with_another(state)
    assert len({tuple(point) for point in state["points"]}) == demo_landscape.MOST_POINTS
    with pytest.raises(DemoError, match="There is room for 8"):
        demo_landscape.with_another(state)
    while len(state["points"]) > 1:
        state = demo_landscape.without_last(state)
    demo_landscape.scene(state, 1.0, 10.0, 5, "energy")
    with pytest.raises(DemoError, match="one must stay"):
        demo_landscape.without_last(state)


# The classifier.


@pytest.fixture(scope="module")
def classifier():
    return demo_models.load_classifier(str(demo_models.SHIPPED / "digits"))


@pytest.mark.parametrize("fields", [{}, {"encoder_type": "class_query"}, COMPACT], ids=["shipped", "class query", "compact"])
def test_heads_share_out_all_of_their_weight(classifier, fields):
    if fields:
        config = UHopViTConfig(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **fields)
        model = UHopViTForImageClassification._from_config(config, attn_implementation="eager").eval()
        classifier = demo_models.Classifier(model, classifier.processor, "")
    image = demo_models.digit_image(demo_digits.load().images[5])
    answer = demo_classifier.classify(classifier, image)
    for weights, kept in zip(answer.maps, answer.kept, strict=True):
        assert weights.shape[1:] == (4, 4)
        np.testing.assert_allclose(weights.sum((1, 2)) + kept, 1.0, atol=1e-5)
    assert answer.scores.sum() == pytest.approx(1.0, abs=1e-5)
    pixel_values = classifier.processor([image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = classifier.model(pixel_values).logits[0].softmax(-1)
    np.testing.assert_allclose(answer.scores, expected.numpy(), atol=1e-5)


def test_alpha_is_stated():
    assert demo_classifier.alpha_text([np.array([1.0, 1.0])]).startswith(f"{demo_drawing.ALPHA} = 1, softmax")
    assert demo_classifier.alpha_text([np.array([1.5])]).startswith(f"{demo_drawing.ALPHA} = 1.5, many patches")
    assert "between 1.20 and 1.80" in demo_classifier.alpha_text([np.array([1.2, 1.4]), np.array([1.8])])


def test_a_heat_map_is_tinted_where_the_weight_is():
    tinted = np.asarray(demo_classifier.heat_map(Image.new("RGB", (8, 8), "white"), np.array([[0.0, 0.5], [0.25, 0.0]]), 0.5), dtype=float)
    half = len(tinted) // 2
    assert (tinted[:half, :half] == 255).all()
    assert (tinted[half:, half:] == 255).all()
    color = 0.2 * 255 + 0.8 * np.array([int(demo_drawing.WEIGHT[i : i + 2], 16) for i in (1, 3, 5)])
    np.testing.assert_allclose(tinted[:half, half:], np.broadcast_to(color, (half, half, 3)), atol=1)
    assert (tinted[half:, :half, 2] > tinted[:half, half:, 2]).all()


@pytest.mark.parametrize("ground", ["white", "black"])
def test_a_photo_of_a_digit_becomes_what_models_know(ground, classifier):
    ink = demo_digits.load().images[demo_digits.examples()[3]]
    large = np.kron(ink, np.ones((20, 20)))
    photo = Image.new("L", (400, 300), ground)
    photo.paste(Image.fromarray(np.uint8(255 * (large if ground == "black" else 1.0 - large))), (90, 60))
    assert demo_classifier.reads_digits(classifier)
    small = np.asarray(demo_classifier.as_digit(photo.convert("RGB")).convert("L"), dtype=float)
    assert np.corrcoef(small.ravel(), ink.ravel())[0, 1] > 0.9


def test_uploads_that_cannot_be_read_are_said_in_words(tmp_path):
    (tmp_path / "cat.png").write_text("no image")
    with pytest.raises(DemoError, match=r"“cat\.png” cannot be read as an image"):
        demo_classifier.read_image(tmp_path / "cat.png")
    with pytest.raises(DemoError, match="Nothing stands out"):
        demo_classifier.as_digit(Image.new("RGB", (50, 50), "white"))
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(demo_classifier.read_image(tmp_path / "clear.png")).min() == 255


def test_a_saved_classifier_answers_alike(classifier, tmp_path):
    classifier.model.save_pretrained(tmp_path)
    classifier.processor.save_pretrained(tmp_path)
    loaded = demo_models.load_classifier(str(tmp_path))
    image = demo_models.digit_image(demo_digits.load().images[1])
    first, again = demo_classifier.classify(classifier, image), demo_classifier.classify(loaded, image)
    np.testing.assert_allclose(first.scores, again.scores, atol=1e-6)
    np.testing.assert_allclose(first.maps[2], again.maps[2], atol=1e-6)
    with pytest.raises(DemoError, match="this tab needs 'uhop_mil'"):
        demo_models.load_bag_classifier(str(tmp_path))


def test_a_model_of_another_kind_is_refused(tmp_path):
    with pytest.raises(DemoError, match="no folder with a model"):
        demo_models.load_classifier("./nowhere")
    UHopMemoryConfig(pattern_dim=4).save_pretrained(tmp_path)
    with pytest.raises(DemoError, match="'uhop_memory'; this tab needs 'uhop_vit'"):
        demo_models.load_classifier(str(tmp_path))


def test_a_wrong_model_ends_the_start_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", "./nowhere"])
    with pytest.raises(SystemExit, match=r"^error: \./nowhere is no folder with a model"):
        app.main()


# Bags.


@pytest.fixture(scope="module")
def bag_classifier():
    return demo_models.load_bag_classifier(str(demo_models.SHIPPED / "bags"))


def test_weights_of_a_bag_sum_to_one_and_find_the_nines(bag_classifier):
    digits, right, found = demo_digits.load(), 0, 0
    for seed in range(60):
        bag = demo_bags.new_bag(seed % 2 == 0, seed)
        probability, weights = demo_bags.weigh(bag_classifier, bag)
        assert len(weights) == len(bag)
        assert weights.sum() == pytest.approx(1.0, abs=1e-5)
        right += (probability > 0.5) == (9 in digits.labels[bag])
        found += digits.labels[bag[int(weights.argmax())]] == 9
    assert right >= 54
    assert found >= 24


def test_a_bag_is_positive_because_of_a_nine():
    digits = demo_digits.load()
    for seed in range(20):
        assert (9 in digits.labels[demo_bags.new_bag(True, seed)]) is True
        assert (9 in digits.labels[demo_bags.new_bag(False, seed)]) is False
        assert set(demo_bags.new_bag(True, seed)) <= set(digits.test.tolist())


def test_images_are_added_and_removed(bag_classifier):
    digits = demo_digits.load()
    bag = demo_bags.with_digit([], 4, 0)
    bag = demo_bags.with_digit(bag, 4, 0)
    assert digits.labels[bag].tolist() == [4, 4]
    assert bag[0] != bag[1]
    assert demo_bags.without_image(bag, 0) == bag[1:]
    assert demo_bags.without_image(bag, 7) == bag
    with pytest.raises(DemoError, match="The bag is empty"):
        demo_bags.weigh(bag_classifier, [])
    with pytest.raises(DemoError, match="at most 24 images"):
        demo_bags.with_digit(list(range(24)), 4, 0)


def test_a_saved_bag_classifier_answers_alike(bag_classifier, tmp_path):
    bag_classifier.model.save_pretrained(tmp_path / "digits")
    bag_classifier.extractor.save_pretrained(tmp_path / "digits")
    loaded = demo_models.load_bag_classifier(str(tmp_path / "digits"))
    bag = demo_bags.new_bag(True, 1)
    first, again = demo_bags.weigh(bag_classifier, bag), demo_bags.weigh(loaded, bag)
    assert first[0] == pytest.approx(again[0], abs=1e-6)
    np.testing.assert_allclose(first[1], again[1], atol=1e-6)
    UHopMILForBagClassification(UHopMILConfig(instance_dim=5)).save_pretrained(tmp_path / "other")
    UHopMILFeatureExtractor().fit([np.random.default_rng(0).normal(size=(9, 5))]).save_pretrained(tmp_path / "other")
    with pytest.raises(DemoError, match="cannot be used"):
        demo_models.load_bag_classifier(str(tmp_path / "other"))


def test_a_model_is_made_once_for_all_who_ask():
    made, answers = [], []

    def make(report):
        made.append(report)
        return object()

    once = demo_models.Once(make)
    askers = [threading.Thread(target=lambda: answers.append(once(print))) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(made) == 1
    assert len(set(map(id, answers))) == 1


# Forecasts.


@pytest.fixture(scope="module")
def forecaster():
    reports = []
    made = demo_forecast.train_forecaster(demo_forecast.made_series(), lambda share, text: reports.append(share))
    assert reports[0] == 0.0
    assert reports[-1] == 1.0
    assert reports == sorted(reports)
    return made


@pytest.mark.trains
@pytest.mark.parametrize("series", range(3))
def test_the_forecaster_is_better_than_repetition_on_windows_it_has_not_seen(forecaster, series):
    measured = demo_forecast.errors(forecaster, series, 24)
    assert measured["model"] < 0.95 * measured["repeated"]
    starts = [start for start in forecaster.starts if (start - forecaster.starts[0]) % 3 == 0]
    assert measured["windows"] == len(starts)
    values, forecast, last = forecaster.table.values[:, series], [], []
    for start in starts:
        past = torch.from_numpy((forecaster.table.values[start - 96 : start] - forecaster.mean) / forecaster.std).float()
        answer = forecaster.model.generate(past.unsqueeze(0)).sequences[0, 0, :, series].double().numpy()
        truth = values[start : start + 24]
        forecast.append(np.abs(answer * forecaster.std[series] + forecaster.mean[series] - truth).mean())
        last.append(np.abs(values[start - 24 : start] - truth).mean())
    assert measured["model"] == pytest.approx(np.mean(forecast), rel=1e-4)
    assert measured["repeated"] == pytest.approx(np.mean(last))


def test_no_window_that_is_forecast_was_stored_or_trained_on(forecaster):
    rows, last = len(forecaster.scaled), int(forecaster.stored[-1]) + 96 + 24
    assert last <= rows // 2
    assert forecaster.starts[0] == int(0.8 * rows)
    assert forecaster.starts[-1] + 24 == rows
    np.testing.assert_allclose(forecaster.mean, forecaster.table.values[: int(0.8 * rows)].mean(0))


def test_retrieved_windows_are_those_with_the_largest_weights(forecaster):
    start, series = 1300, 1
    found, some = demo_forecast.retrieved(forecaster, start, series)
    scaled = forecaster.scaled[:, series].double().numpy()
    past = scaled[start - 96 : start]
    stored = [scaled[first : first + 96] for first in forecaster.stored]
    likeness = [np.corrcoef(past, one)[0, 1] for one in stored]
    order = np.argsort(likeness)[::-1][:3]
    assert [one.ago for one in found] == [start - int(forecaster.stored[best]) - 96 for best in order]
    assert 3 <= some < len(stored)
    assert found[0].weight >= found[1].weight >= found[2].weight > 0
    best = int(forecaster.stored[order[0]])
    moved = (scaled[best : best + 120] - stored[order[0]].mean()) / stored[order[0]].std() * past.std() + past.mean()
    np.testing.assert_allclose(found[0].values, moved * forecaster.std[series] + forecaster.mean[series], rtol=1e-3)


def test_a_forecast_is_shown_in_units(forecaster):
    page = demo_forecast.view(forecaster, 0, 0.5, 24)
    assert "Mean absolute error, °C" in page
    assert re.search(r'hop-number">[\d.]+ °C<', page)
    axis = demo_forecast.forecast_figure(True, forecaster, 0, 1300, 24).axes[0]
    assert axis.get_ylabel() == "temperature (°C)"
    assert axis.get_xlabel() == "hours after the start of the forecast"
    assert demo_forecast.unit_of("load [MW]") == "MW"
    assert demo_forecast.unit_of("load") == ""
    with pytest.raises(DemoError, match="A season must have 1 to 96 steps, not 97"):
        demo_forecast.repeated(forecaster, [1300], 97)


def test_a_csv_is_read_and_forecast(tmp_path):
    steps = np.arange(450)
    frame = pandas.DataFrame({"time": [f"day {step}" for step in steps], "sales (kg)": 5 + np.sin(2 * np.pi * steps / 30), "constant": 1.0})
    frame.loc[10:12, "sales (kg)"] = np.nan
    frame.to_csv(tmp_path / "shop.csv", index=False)
    table = demo_forecast.read_table(tmp_path / "shop.csv")
    assert table.names == ["sales (kg)"]
    assert table.season == 30
    assert table.source == "shop.csv, 450 rows, 2 columns left out"
    known = demo_forecast.train_forecaster(table, lambda share, text: None, steps=2)
    assert 'data-series="sales (kg)"' in demo_forecast.view(known, 0, 1.0, table.season)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as a CSV file"),
        ("name\nAnn\nBob\n", "has no column of numbers that vary. Its columns are name"),
        ("a\n1\n2\n", "has 2 rows. A forecast needs at least 400"),
        ("a\n" + "1\n2\n" * 250 + "inf\n", "has an infinite value in column a"),
        ("a,b\n" + "1,2\n2,3\n" * 100 + "1,\n2,\n" * 250, "Column b .* has no value in rows 351 to 560"),
    ],
)
def test_a_csv_that_cannot_be_forecast_is_said_in_words(content, message, tmp_path):
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(DemoError, match=message):
        demo_forecast.read_table(tmp_path / "mine.csv")


# The same in code.


@pytest.mark.parametrize("tab", demo_links.TABS)
def test_every_snippet_runs_as_it_stands(tab, tmp_path, monkeypatch, capsys):
    # As from the root of the repository, without a folder left there.
    (tmp_path / "space").symlink_to(SPACE)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(demo_links.SNIPPETS / demo_links.TABS[tab].snippet))
    printed = capsys.readouterr().out
    expected = {
        "Memory": r"after separation: +\d+ of 100",
        "Landscape": r"features: x ends nearest to memory 5",
        "Classify": r"answer 7, .* truth 7",
        "Bags": r"probability of a 9 inside (0\.9|1\.0)",
        "Forecast": r"STanHop 0\.\d+ degrees\nrepeat the last 24 hours: 0\.\d+ degrees",
    }
    assert re.search(expected[tab], printed)


def test_what_cannot_be_reached_is_named_without_a_link(tmp_path):
    page = demo_links.code_view("Bags", tmp_path)
    assert "<a " not in page
    assert "docs/guides/bags.md" in page
    (tmp_path / "docs" / "guides").mkdir(parents=True)
    (tmp_path / "docs" / "guides" / "bags.md").write_text("# Bags\n")
    (tmp_path / "secret.md").write_text("not for visitors")
    assert 'href="/checkout/docs/guides/bags.md"' in demo_links.code_view("Bags", tmp_path)
    client = TestClient(Starlette(routes=demo_links.routes(tmp_path)))
    assert client.get("/checkout/docs/guides/bags.md").text == "# Bags\n"
    for path in ("secret.md", "docs/guides/vision.md", "docs/../secret.md"):
        assert client.get(f"/checkout/{path}").status_code == 404
    (tmp_path / "site" / "guides").mkdir(parents=True)
    (tmp_path / "site" / "guides" / "bags.html").write_text("<h1>Bags</h1>")
    address = demo_links.guide_address("guides/bags", tmp_path)
    assert address == "/site/guides/bags.html"
    assert TestClient(Starlette(routes=demo_links.routes(tmp_path))).get(address).status_code == 200


def test_public_addresses_are_used_where_the_package_has_them(monkeypatch):
    addresses = {"Documentation": "https://example.org/docs/", "Repository": "https://example.org/code"}
    monkeypatch.setattr(demo_links, "project_urls", lambda: addresses)
    page = demo_links.code_view("Classify")
    assert 'href="https://example.org/docs/guides/vision.html"' in page
    assert 'href="https://example.org/code/blob/main/modeling_uhop/modeling_uhop_vit.py"' in page


# In a browser.

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the path")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    # Without runs, so that the demo shows the models that come with it, whatever was trained here before.
    with running_demo("--runs", str(tmp_path_factory.mktemp("runs"))) as where:
        yield where


@pytest.fixture(scope="module")
def browser():
    # A busy machine answers late.
    pytest.importorskip("playwright.sync_api").expect.set_options(timeout=30_000)
    with chromium() as opened:
        yield opened


@pytest.fixture(params=SIZES)
def page(request, browser, address):
    """The demo at one of two sizes; what goes wrong in the page, and every request to elsewhere, fails the test."""
    width, height = SIZES[request.param]
    phone = request.param == "phone"
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=phone, is_mobile=phone)
    opened, wrong = context.new_page(), []
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    local = (address, address.replace("http", "ws"), "data:", "blob:")
    opened.on("request", lambda asked: None if asked.url.startswith(local) else wrong.append(f"request to {asked.url}"))
    opened.goto(address)
    opened.wait_for_selector(READY["Memory"])
    yield opened
    context.close()
    assert wrong == []


def _overflow(page) -> int:
    return page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - window.innerWidth")


def _confused(page) -> list[str]:
    return [count.get_attribute("data-confused") for count in page.locator(".hop-count").all()]


def _wait_for_errors(page, settings: MemorySettings) -> None:
    for name, side in demo_memory.explore(settings)[1].items():
        page.wait_for_selector(f".hop-count[data-side={name}][data-error='{side.error:.4f}']")


def _drag(page, start, end) -> None:
    """With the finger where the page is a phone's, else with the mouse."""
    if not page.evaluate("navigator.maxTouchPoints > 0"):
        page.mouse.move(*start)
        page.mouse.down()
        page.mouse.move(*end, steps=6)
        page.mouse.up()
        return
    session = page.context.new_cdp_session(page)
    for share in (0.0, 0.3, 0.6, 1.0):
        where = {"x": start[0] + share * (end[0] - start[0]), "y": start[1] + share * (end[1] - start[1])}
        session.send("Input.dispatchTouchEvent", {"type": "touchStart" if share == 0.0 else "touchMove", "touchPoints": [where]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def _middle(box) -> tuple[float, float]:
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@needs_browser
def test_a_slider_changes_what_the_memory_retrieves(page):
    from playwright.sync_api import expect

    assert _overflow(page) <= 0
    start = MemorySettings()
    _wait_for_errors(page, start)
    assert _confused(page) == [str(int(side.confused.sum())) for side in demo_memory.explore(start)[1].values()]
    digit = page.get_by_label("number input for Digit in the pictures")
    first = demo_memory.next_confused(start, -1)
    expect(digit).to_have_value(str(first + 1))
    page.get_by_label("number input for Amount").fill("0.5")
    page.get_by_label("number input for Amount").press("Enter")
    _wait_for_errors(page, replace(start, amount=0.5))
    page.get_by_label("range slider for β, sharpness").focus()
    page.keyboard.press("End")
    sharp = replace(start, amount=0.5, beta=100)
    _wait_for_errors(page, sharp)
    page.get_by_role("button", name="Next confused digit").click()
    expect(digit).to_have_value(str(demo_memory.next_confused(sharp, first) + 1))
    page.wait_for_selector(".hop-verdict.wrong")
    page.get_by_role("button", name="Store other digits").click()
    _wait_for_errors(page, replace(sharp, seed=1))
    digit = page.get_by_label("range slider for Digit in the pictures")
    for name, value, most in (
        ("M, stored digits", "150", "150"),
        ("Digit in the pictures", "140", "150"),
        ("M, stored digits", "120", "120"),
    ):
        page.get_by_label(f"number input for {name}").fill(value)
        page.get_by_label(f"number input for {name}").press("Enter")
        expect(digit).to_have_attribute("max", most)
        expect(page.get_by_label(f"number input for {name}")).to_have_value(value)
    page.wait_for_selector(".hop-count >> text=of 120")
    expect(page.get_by_label("number input for Digit in the pictures")).to_have_value("120")
    assert page.locator(".toast-body").all_inner_texts() == []
    page.get_by_label("none", exact=True).check()
    page.get_by_text("Choose a method of separation to compare with.").wait_for()
    page.get_by_label("number input for M, stored digits").fill("0")
    page.get_by_label("number input for M, stored digits").press("Enter")
    page.get_by_text("Nothing is stored, so nothing can be retrieved.").wait_for()
    assert _overflow(page) <= 0


@needs_browser
def test_a_dragged_point_changes_the_landscape(page):
    open_tab(page, "Landscape")
    assert _overflow(page) <= 0
    image = page.locator("#landscape image").first
    image.scroll_into_view_if_needed()
    box, before = image.bounding_box(), image.get_attribute("href")
    features = page.locator("#landscape image").nth(1).get_attribute("href")
    reach = demo_landscape.REACH

    def on_screen(x: float, y: float) -> tuple[float, float]:
        return box["x"] + (x / reach + 1) / 2 * box["width"], box["y"] + (1 - y / reach) / 2 * box["height"]

    state = demo_landscape.starting_points()
    for index, point in enumerate([*state["points"], state["query"]]):
        mark = page.locator(f"#landscape .movable[data-index='{index if index < 5 else -1}'] .mark").bounding_box()
        assert _middle(mark) == pytest.approx(on_screen(*point), abs=1.0)
    _drag(page, on_screen(*state["points"][1]), on_screen(-0.8, -0.6))
    page.wait_for_function("(old) => document.querySelector('#landscape image').getAttribute('href') !== old", arg=before)
    page.wait_for_timeout(1500)
    mark = page.locator("#landscape .movable[data-index='1'] .mark").bounding_box()
    assert _middle(mark) == pytest.approx(on_screen(-0.8, -0.6), abs=2.0)
    transform = page.locator("#landscape .movable[data-index='1']").get_attribute("transform")
    x, y = (float(number) for number in re.findall(r"[-\d.]+", transform))
    places = [*state["points"][:1], [(x / 200 - 1) * reach, (1 - y / 200) * reach], *state["points"][2:]]
    moved = demo_landscape.moved(places, state["query"], 0)
    expected = demo_landscape.scene(moved, 1.0, 35.0, 6, "energy")["sides"]
    shown = [picture.get_attribute("href") for picture in page.locator("#landscape image").all()]
    for picture, side in zip(shown, expected, strict=True):
        assert _difference(picture, side["image"]) < 1.0
    assert _difference(before, shown[0]) > 8.0
    assert _difference(features, shown[1]) > 8.0
    page.get_by_role("button", name="Remove one").click()
    page.wait_for_function("document.querySelectorAll('#landscape .movable').length === 5")
    page.get_by_label("basins of attraction").check()
    page.wait_for_function("document.querySelector('#landscape image').getAttribute('href').startsWith('data:image/png')")
    assert _overflow(page) <= 0


def _difference(first: str, second: str) -> float:
    """Mean difference of two pictures that are inside a page, of 255."""
    return float(np.abs(np.subtract(*[_pixels(uri) for uri in (first, second)])).mean())


def _pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"), dtype=float)


@needs_browser
def test_images_are_classified_and_a_file_that_is_none_is_refused(page, tmp_path):
    started = time.perf_counter()
    open_tab(page, "Classify")
    assert time.perf_counter() - started < 5
    page.get_by_label("Classify this 7").click()
    page.wait_for_selector("#answer [data-answer='7']")
    assert page.locator("#answer .hop-layer").count() == 3
    assert page.locator("#answer .hop-layer figure").count() == 12
    assert page.get_by_text(f"{demo_drawing.ALPHA} = 1.5").is_visible()
    assert _overflow(page) <= 0
    (tmp_path / "cat.png").write_text("no image")
    page.locator("#upload input, input#upload, input[type=file]").first.set_input_files(tmp_path / "cat.png")
    page.get_by_text("cannot be read as an image").wait_for()
    ink = demo_digits.load().images[demo_digits.examples()[0]]
    photo = Image.fromarray(np.uint8(255 * (1.0 - np.pad(np.kron(ink, np.ones((20, 20))), 40))))
    photo.save(tmp_path / "zero.png")
    page.locator("#upload input, input#upload, input[type=file]").first.set_input_files(tmp_path / "zero.png")
    page.wait_for_selector("#answer [data-answer='0']")
    assert page.locator("#examples [aria-pressed=true]").count() == 0


@needs_browser
def test_a_bag_is_drawn_changed_and_emptied(page):
    open_tab(page, "Bags")
    assert float(page.locator("#bag [data-probability]").get_attribute("data-probability")) > 0.5
    page.get_by_role("button", name="New bag without").click()
    page.wait_for_function("parseFloat(document.querySelector('#bag [data-probability]').dataset.probability) < 0.5")
    count = page.locator("#bag button").count()
    assert page.locator("#bag .right").count() == 0
    page.get_by_role("button", name="Add it").click()
    page.wait_for_selector("#bag .right")
    assert page.locator("#bag button").count() == count + 1
    page.locator("#bag button").first.click()
    page.wait_for_function(f"document.querySelectorAll('#bag button').length === {count}")
    assert _overflow(page) <= 0
    page.get_by_role("button", name="Empty the bag").click()
    page.wait_for_selector("#bag [data-empty]")
    page.get_by_text("so there is nothing to weigh").wait_for()


@needs_browser
def test_a_series_is_forecast_and_another_is_uploaded(page, tmp_path):
    open_tab(page, "Forecast")
    page.wait_for_selector("#forecast [data-series='temperature (°C)']")
    errors = [float(row.get_attribute("data-value")) for row in page.locator("#forecast [data-error]").all()]
    assert errors[0] < errors[1]
    page.get_by_label("water level (m)").check()
    page.wait_for_selector("#forecast [data-series='water level (m)']")
    page.get_by_label("number input for Start of the forecast").fill("100")
    page.get_by_label("number input for Start of the forecast").press("Enter")
    page.wait_for_selector("#forecast [data-start='1476']")
    assert _overflow(page) <= 0
    (tmp_path / "bad.csv").write_text("name\nAnn\n")
    page.locator("input[type=file] >> visible=false").last.set_input_files(tmp_path / "bad.csv")
    page.get_by_text("has no column of numbers that vary").wait_for()
    frame = pandas.DataFrame({"sales (kg)": 5 + np.sin(np.arange(420) / 5), "price (€)": 2 + np.cos(np.arange(420) / 7)})
    frame.to_csv(tmp_path / "shop.csv", index=False)
    page.locator("input[type=file] >> visible=false").last.set_input_files(tmp_path / "shop.csv")
    page.wait_for_selector("#forecast [data-series='sales (kg)']", timeout=TRAINING_MS)
    page.get_by_label("price (€)").check()
    page.wait_for_selector("#forecast [data-series='price (€)']")
    page.get_by_role("button", name="Back to the made series").click()
    page.wait_for_selector("#forecast [data-series='temperature (°C)']")


@needs_browser
def test_on_a_phone_the_result_comes_before_the_controls(page):
    if not page.evaluate("navigator.maxTouchPoints > 0"):
        pytest.skip("a phone's layout")
    for name, ready in READY.items():
        open_tab(page, name)
        result = page.locator(f"{ready} >> visible=true").first.bounding_box()
        panel = page.get_by_role("tabpanel").locator("visible=true")
        controls = panel.locator("button, input").locator("visible=true").all()
        # What is part of a result, such as the images of a bag, is no control of its own.
        outside = [each for each in controls if not each.evaluate("node => Boolean(node.closest('#bag, #answer, #landscape, #forecast'))")]
        assert len(outside) > 2
        assert min(each.bounding_box()["y"] for each in outside) >= result["y"]


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const color = (text) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return { rgb: [r, g, b], a: a / 255 };
  };
  const over = (top, a, below) => top.map((v, i) => a * v + (1 - a) * below[i]);
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ratio = (x, y) => (Math.max(light(x), light(y)) + 0.05) / (Math.min(light(x), light(y)) + 0.05);
  // Every colour that may lie below a text: of a gradient, all of its stops.
  const grounds = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      const stops = (style.backgroundImage.match(/rgba?\\([^)]*\\)/g) || []).map(color);
      const own = color(style.backgroundColor);
      if (stops.length) layers.push(stops);
      layers.push([own]);
      if (own.a === 1 || (stops.length && stops.every((stop) => stop.a === 1))) break;
    }
    let found = [[255, 255, 255]];
    for (const layer of layers.reverse()) found = found.flatMap((ground) => layer.map((one) => over(one.rgb, one.a, ground)));
    return found;
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    if (node.closest("svg, script, style, noscript")) continue;
    const typed = node.matches("input:not([type=range], [type=radio], [type=checkbox], [type=file]), textarea");
    const text = typed ? node.value : [...node.childNodes].filter((each) => each.nodeType === 3).map((each) => each.data).join("").trim();
    const box = node.getBoundingClientRect();
    if (!text || box.width < 2 || box.height < 2 || !node.checkVisibility({ checkVisibilityCSS: true })) continue;
    let opacity = 1;
    for (let at = node; at; at = at.parentElement) opacity *= Number(getComputedStyle(at).opacity);
    const ink = color(getComputedStyle(node).color);
    const worst = Math.min(...grounds(node).map((ground) => ratio(over(ink.rgb, ink.a * opacity, ground), ground)));
    found.push({ text: text.slice(0, 60), tag: node.tagName, ratio: worst });
  }
  return found;
}"""


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_and_links_lead_somewhere(browser, address, theme):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/?__theme={theme}")
    followed = set()
    for name in READY:
        open_tab(page, name)
        page.get_by_role("button", name="The same in code").locator("visible=true").click()
        page.wait_for_selector(".hop-code >> visible=true")
        page.mouse.move(0, 0)
        # Colours change gradually when a tab is pressed.
        page.wait_for_timeout(400)
        texts = page.evaluate(CONTRAST)
        assert {"BUTTON", "INPUT", "SPAN"} <= {text["tag"] for text in texts} or name in ("Classify", "Bags")
        assert [text for text in texts if text["ratio"] < 4.5] == []
        for link in page.locator(".hop-links a >> visible=true").all():
            followed.add(link.get_attribute("href"))
    page.close()
    assert {demo_links.module_address(pages.module) for pages in demo_links.TABS.values()} <= followed
    assert {demo_links.guide_address(pages.guide) for pages in demo_links.TABS.values()} - {None} <= followed
    for link in followed:
        if link.startswith("/"):
            with urllib.request.urlopen(f"{address}{link}") as answer:
                assert answer.status == 200
                assert len(answer.read()) > 500
