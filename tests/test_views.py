"""Augmented views, and the losses of two views and of classes, compared with loops in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_uhop import (
    BagViews,
    FeatureMap,
    ImageViews,
    Separation,
    StageOne,
    STanHopConfig,
    STanHopForPrediction,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTConfig,
    UHopViTForImageClassification,
    WindowViews,
    denoising_loss,
    koleo_loss,
    maximize_separation,
    separation_loss,
    sigreg_loss,
    supervised_loss,
    vicreg_loss,
)
from modeling_uhop.view_losses import DIRECTIONS
from tests import reference
from tests.conftest import assert_close


DTYPES = [torch.float64, torch.float32]
LABELS = torch.tensor([[0, 1, 0, 2, 1], [3, 3, 3, 0, 4]])
MASK = torch.tensor([[True, True, True, True, False], [True, False, True, True, True]])


def _directions(seed: int) -> list[list[float]]:
    """The directions that `sigreg_loss` draws for three features."""
    drawn = torch.randn(3, DIRECTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn / drawn.norm(dim=0)).T.tolist()


# A loss of (features, copies, mask), and the same as a loop over the memories of one set.
LOSSES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., list[float]]]] = {
    "koleo": (
        lambda features, copies, labels, mask: koleo_loss(features, mask=mask),
        lambda features, copies, labels: reference.koleo_losses(features),
    ),
    "vicreg": (
        lambda features, copies, labels, mask: vicreg_loss(features, copies, mask=mask),
        lambda features, copies, labels: [reference.vicreg_loss(features, copies)],
    ),
    "sigreg": (
        lambda features, copies, labels, mask: sigreg_loss(features, copies, mask=mask, seed=3),
        lambda features, copies, labels: [reference.sigreg_loss(features, copies, _directions(3))],
    ),
    "sigreg of one view": (
        lambda features, copies, labels, mask: sigreg_loss(features, mask=mask, weight=1.0, seed=3),
        lambda features, copies, labels: [reference.sigreg_loss(features, None, _directions(3), 1.0)],
    ),
    "supervised": (
        lambda features, copies, labels, mask: supervised_loss(features, labels, temperature=0.3, mask=mask),
        lambda features, copies, labels: reference.supervised_losses(features, labels, 0.3),
    ),
    "supervised with copies": (
        lambda features, copies, labels, mask: supervised_loss(features, labels, copies, temperature=0.3, mask=mask),
        lambda features, copies, labels: reference.supervised_losses([*features, *copies], [*labels, *labels], 0.3),
    ),
}


def _features(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 3, generator=random, dtype=torch.float64)
    return features.to(dtype), (features + 0.3 * torch.randn(2, 5, 3, generator=random, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_loops(name, masked, dtype):
    loss, loop = LOSSES[name]
    features, copies = _features(dtype)
    mask = MASK if masked else None
    found = loss(features, copies, LABELS, mask)
    expected: list[float] = []
    for one, other, labels, present in zip(features, copies, LABELS, MASK if masked else torch.ones_like(MASK), strict=True):
        expected += loop(one[present].double().tolist(), other[present].double().tolist(), labels[present].tolist())
    assert found.dtype == dtype
    assert_close(found, torch.tensor(sum(expected) / len(expected), dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_losses(name):
    loss, _ = LOSSES[name]
    features, copies = (each.requires_grad_() for each in _features(torch.float64))
    assert torch.autograd.gradcheck(lambda one, other: loss(one, other, LABELS, MASK), (features, copies))


@pytest.mark.parametrize("name", LOSSES)
def test_absent_memories_have_no_influence(name):
    loss, _ = LOSSES[name]
    features, copies = _features(torch.float32)
    spoilt = [each.masked_fill(~MASK.unsqueeze(-1), torch.nan).requires_grad_() for each in (features, copies)]
    found = loss(*spoilt, LABELS, MASK)
    assert torch.equal(found, loss(features, copies, LABELS, MASK))
    gradients = torch.autograd.grad(found, spoilt, allow_unused=True)
    assert all(gradient is None or (gradient.isfinite().all() and (gradient[~MASK] == 0).all()) for gradient in gradients)
    nothing = loss(*spoilt, LABELS, torch.zeros_like(MASK))
    assert nothing == 0
    assert all(each is None or not each.any() for each in torch.autograd.grad(nothing, spoilt, allow_unused=True))


def test_equal_memories_have_a_finite_gradient():
    features = torch.ones(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(koleo_loss(features) + vicreg_loss(features, features.clone()), features)
    assert gradient.isfinite().all()


def test_sigreg_vanishes_for_a_normal_distribution():
    features = torch.randn(20000, 4, dtype=torch.float64)
    assert sigreg_loss(features, weight=1.0) < 5 < sigreg_loss(3.0 * features, weight=1.0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sigreg_loss(features[:10])
    assert torch.equal(torch.get_rng_state(), before)


def _vit(**fields: Any) -> UHopViTForImageClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return UHopViTForImageClassification(UHopViTConfig(**sizes, intermediate_size=16, **fields)).eval()


def _means(model: Any, images: torch.Tensor) -> torch.Tensor:
    """The mean feature of each image in the last layer, as one set."""
    *_, last = model.memory_sets(pixel_values=images)
    return last.feature_map(last.memories).mean(1).unsqueeze(0)


def test_two_views_of_examples_are_recognised_in_both_directions():
    model, images = _vit(), torch.rand(6, 3, 8, 8)
    stage = StageOne(model, Separation.two_views(ImageViews(), lr=0.0))
    torch.manual_seed(1)
    first, second = (ImageViews()({"pixel_values": images})["pixel_values"] for _ in range(2))
    torch.manual_seed(1)
    loss = stage.step({"pixel_values": images})
    one, other = _means(model, first), _means(model, second)
    expected = (denoising_loss(one, other, temperature=0.2) + denoising_loss(other, one, temperature=0.2)) / 2
    assert_close(loss, expected.unsqueeze(0))


@pytest.mark.parametrize("kind", ["average", "denoising", "koleo", "vicreg", "sigreg", "supervised"])
def test_every_kind_of_examples_lowers_its_loss(kind):
    model, images = _vit(), torch.rand(8, 3, 8, 8)
    batch = {"pixel_values": images, "labels": torch.arange(8) % 2}
    views = None if kind == "average" else lambda batch: {**batch, "pixel_values": batch["pixel_values"] + 0.01}
    fields: dict[str, Any] = {"memories": "example", "optimizer": "adam", "lr": 1e-3, "steps": 5}
    losses = StageOne(model, Separation(kind=kind, views=views, **fields)).run([batch])
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layers", ["all", "last"])
def test_layers_are_chosen(layers):
    model = _vit()
    losses = StageOne(model, layers=layers).step({"pixel_values": torch.rand(2, 3, 8, 8)})
    every = StageOne(_vit(), lr=0.0).step({"pixel_values": torch.rand(2, 3, 8, 8)})
    assert len(losses) == (len(every) if layers == "all" else 1)


def test_the_memory_of_a_bag_is_the_mean_of_its_instances():
    torch.manual_seed(0)
    model = UHopMILForBagClassification(UHopMILConfig(instance_dim=5, hidden_size=8, num_attention_heads=2)).eval()
    batch = {"instances": torch.randn(3, 4, 5), "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])}
    stage = StageOne(model, kind="average", memories="example", lr=0.0)
    (memories,) = model.memory_sets(**batch)
    means = torch.stack([memories.features()[row, :count].mean(0) for row, count in ((0, 2), (1, 4))])
    assert_close(stage.step(batch), separation_loss(means).unsqueeze(0))


def test_an_instance_that_one_view_leaves_out_does_not_count():
    torch.manual_seed(0)
    model = UHopMILForBagClassification(UHopMILConfig(instance_dim=5, hidden_size=8, num_attention_heads=2)).eval()
    batch = {"instances": torch.randn(2, 6, 5), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    stage = StageOne(model, Separation.denoising(views=BagViews(dropout=0.4, jitter=0.1)), lr=0.0)
    torch.manual_seed(2)
    first, second = stage.views(batch)
    shared = first["attention_mask"] & second["attention_mask"]
    assert not torch.equal(first["attention_mask"], second["attention_mask"])
    (one,), (other,) = (model.memory_sets(**each) for each in (first, second))
    pair = (one.features(), other.features())
    expected = sum(denoising_loss(*each, temperature=0.1, mask=shared) for each in (pair, pair[::-1])) / 2
    assert_close(stage.step(first, second), expected.unsqueeze(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": "crop"}, "views must be a function of a batch"),
        ({"views": ImageViews()}, "views need one of the kinds .*, got kind='average'"),
        ({"kind": "denoising", "views": ImageViews(), "corruption": abs}, "give one of them"),
        ({"kind": "supervised"}, "kind='supervised' needs memories='example'"),
        ({"memories": "patches"}, "memories must be one of"),
        ({"layers": 2}, "layers must be one of"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Separation(**fields)


def test_wrong_batches_are_refused():
    stage = StageOne(_vit(), kind="supervised", memories="example")
    images = torch.rand(4, 3, 8, 8)
    for labels in ({}, {"labels": torch.rand(4)}, {"labels": torch.zeros(4, 2, dtype=torch.long)}):
        with pytest.raises(ValueError, match="needs labels in the batch, one class"):
            stage.step({"pixel_values": images, **labels})
    with pytest.raises(ValueError, match="must be at least two"):
        StageOne(_vit(), memories="example").step({"pixel_values": images[:1]})
    for views, message in (
        (ImageViews(), "pixel_values, a floating tensor with 4 axes"),
        (WindowViews(), "past_values"),
        (BagViews(), "instances"),
    ):
        with pytest.raises(ValueError, match=message):
            views({"pixel_values": torch.rand(3, 8)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ImageViews(smallest_area=0.0), "smallest_area must be a number in"),
        (lambda: ImageViews(std=[0.2, 0.0, 0.2]), "std must be positive"),
        (lambda: ImageViews(jitter=1.5), "jitter must be a number in"),
        (lambda: WindowViews(shortest=2.0), "shortest must be a number in"),
        (lambda: BagViews(dropout=True), "dropout must be a number in"),
    ],
)
def test_wrong_views_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_views_that_change_nothing_are_the_batch():
    images = torch.rand(3, 3, 6, 5) * 2 - 1
    still = ImageViews(smallest_area=1.0, flip=0.0, jitter=0.0, grey=0.0)({"pixel_values": images})["pixel_values"]
    assert_close(still, images, scale=10)
    mirrored = ImageViews(smallest_area=1.0, flip=1.0, jitter=0.0, grey=0.0)({"pixel_values": images})["pixel_values"]
    assert_close(mirrored, images.flip(-1), scale=10)
    windows = torch.randn(2, 9, 3)
    assert_close(WindowViews(shortest=1.0, scale=0.0, jitter=0.0)({"past_values": windows})["past_values"], windows)
    bags = {"instances": torch.randn(2, 5, 3), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    view = BagViews(dropout=0.0, jitter=0.0)(bags)
    assert torch.equal(view["instances"], bags["instances"])
    assert torch.equal(view["attention_mask"].long(), bags["attention_mask"])


def test_grey_and_colours_are_those_of_the_formula():
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    values = torch.rand(4, 3, 2, 2, dtype=torch.float64)
    scale = [torch.tensor(each, dtype=torch.float64).view(3, 1, 1) for each in (mean, std)]
    images = (values - scale[0]) / scale[1]
    grey = ImageViews(smallest_area=1.0, flip=0.0, jitter=0.0, grey=1.0, mean=mean, std=std)({"pixel_values": images})["pixel_values"]
    luma = 0.299 * values[:, 0] + 0.587 * values[:, 1] + 0.114 * values[:, 2]
    assert_close(grey * scale[1] + scale[0], luma.unsqueeze(1).expand(-1, 3, -1, -1))
    coloured = ImageViews(smallest_area=1.0, flip=0.0, jitter=0.4, grey=0.0, mean=mean, std=std)({"pixel_values": images})["pixel_values"]
    inside = coloured * scale[1] + scale[0]
    assert (inside >= -1e-9).all()
    assert (inside <= 1 + 1e-9).all()
    ratios = coloured.flatten(1).std(1) / images.flatten(1).std(1)
    assert len(ratios.unique()) == 4


def test_a_crop_is_a_part_of_the_image_at_another_size():
    ramp = torch.linspace(0.0, 1.0, 64).expand(1, 1, 64, 64)
    torch.manual_seed(0)
    for _ in range(20):
        view = ImageViews(smallest_area=0.25, flip=0.0, jitter=0.0, grey=0.0, mean=0.0, std=1.0)({"pixel_values": ramp})["pixel_values"][
            0, 0
        ]
        steps = view[:, 2:-2].diff(dim=1)
        # The crop is between half and the whole of the width, and rows are alike.
        assert_close(view, view[:1].expand_as(view), scale=100)
        assert 0.5 - 1e-3 <= float(steps.mean()) * 63 <= 1.0 + 1e-3


def test_a_part_of_a_window_is_stretched_linearly():
    line = torch.linspace(0.0, 10.0, 21).view(1, 21, 1)
    torch.manual_seed(0)
    for _ in range(20):
        view = WindowViews(shortest=0.5, scale=0.0, jitter=0.0)({"past_values": line})["past_values"]
        steps = view.diff(dim=1)
        assert_close(steps, steps[:, :1].expand_as(steps), scale=100)
        assert 0.25 - 1e-4 <= float(steps[0, 0, 0]) <= 0.5 + 1e-4
        assert float(view.min()) >= 0.0
        assert float(view.max()) <= 10.0 + 1e-4


def test_a_feature_map_has_views_of_patterns():
    phi = FeatureMap(4)
    patterns = torch.randn(6, 4)
    separation = Separation.denoising(views=lambda memories: memories * 1.1, lr=0.0)
    assert_close(
        StageOne(phi, separation).step(patterns),
        denoising_loss(phi(patterns * 1.1), phi(patterns * 1.1), temperature=0.1).unsqueeze(0),
    )
    assert math.isfinite(float(StageOne(phi, kind="vicreg").step(patterns)))
    with pytest.raises(ValueError, match=r"memories of several examples \(B, M, d\), got shape \(6, 4\)"):
        StageOne(phi, memories="example").step(patterns)
    with pytest.raises(ValueError, match="the mask of kind 'koleo' must be one of memories"):
        maximize_separation(phi, patterns, Separation(kind="koleo"), mask=torch.ones(6, 6, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_views_that_change_nothing_return_half_precision_values_exactly(dtype):
    windows = torch.arange(512.0).view(1, -1, 1).to(dtype)
    view = WindowViews(shortest=1.0, scale=0.0, jitter=0.0)({"past_values": windows})["past_values"]
    assert view.dtype == dtype
    assert torch.equal(view, windows)
    images = torch.rand(1, 1, 64, 64).to(dtype)
    view = ImageViews(smallest_area=1.0, flip=0.0, jitter=0.0, grey=0.0)({"pixel_values": images})["pixel_values"]
    assert view.dtype == dtype
    assert_close(view, images)


def test_unlabelled_examples_belong_to_no_class():
    features, labels = torch.randn(5, 3), torch.tensor([0, -100, 0, 1, -100])
    kept = labels >= 0
    assert_close(supervised_loss(features, labels), supervised_loss(features[kept], labels[kept]))


def test_bags_without_a_place_for_an_instance_stay():
    view = BagViews()({"instances": torch.zeros(2, 0, 3)})
    assert view["attention_mask"].shape == (2, 0)


def test_learned_memories_are_no_examples():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_input_channels": 2, "context_length": 12, "prediction_length": 4, "d_model": 8}
    model = STanHopForPrediction(STanHopConfig(**sizes, num_attention_heads=2, ffn_dim=8)).eval()
    batch = {"past_values": torch.randn(4, 12, 2)}
    sets = list(model.memory_sets(**batch))
    losses = StageOne(model, memories="example", lr=0.0).step(batch)
    assert len(losses) == sum(not each.shared for each in sets) < len(sets)


def test_a_mean_with_another_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="mean must have one number for each of the 1 channels"):
        ImageViews(mean=[0.5, 0.5, 0.5])({"pixel_values": torch.rand(2, 1, 8, 8)})


def test_views_of_patterns_are_given_patterns_and_examples_need_a_batch():
    phi, patterns = FeatureMap(8), torch.randn(3, 6, 8)
    separation = Separation.two_views(lambda values: values + 0.1 * torch.randn_like(values), steps=2)
    assert len(maximize_separation(phi, patterns, separation)) == 3
    with pytest.raises(ValueError, match="of several examples"):
        maximize_separation(phi, patterns[0], separation)
