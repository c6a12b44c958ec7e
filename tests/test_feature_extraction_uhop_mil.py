"""UHopMILFeatureExtractor and DataCollatorForBags: values against scikit-learn, masks, saving and loading, refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from transformers import AutoFeatureExtractor

from modeling_uhop import DataCollatorForBags, UHopMILConfig, UHopMILFeatureExtractor


@pytest.fixture
def bags():
    random = np.random.default_rng(0)
    return [random.normal(3.0, 2.0, (size, 5)) * [1, 10, 100, 1000, 1] for size in (4, 1, 9, 30)]


def test_standardisation_is_that_of_scikit_learn(bags):
    extractor = UHopMILFeatureExtractor(clip=None).fit(bags)
    scaler = StandardScaler().fit(np.concatenate(bags))
    for bag, transformed in zip(bags, extractor.transform(bags), strict=True):
        np.testing.assert_allclose(transformed, scaler.transform(bag), rtol=1e-5, atol=1e-6)
        assert transformed.dtype == np.float32
    clipped = UHopMILFeatureExtractor(clip=0.5).fit(bags).transform(bags)
    np.testing.assert_allclose(clipped[2], scaler.transform(bags[2]).clip(-0.5, 0.5), rtol=1e-5, atol=1e-6)


def test_bags_that_were_not_fitted_leave_no_trace(bags):
    extractor = UHopMILFeatureExtractor().fit(bags[:2])
    mean = extractor.mean.copy()
    extractor.transform(bags)
    np.testing.assert_array_equal(extractor.mean, mean)
    np.testing.assert_allclose(mean, np.concatenate(bags[:2]).mean(0))


def test_a_column_constant_in_training_becomes_zero(bags):
    for constant in (0.0, 0.1, 1e6 / 3):
        for bag in bags:
            bag[:, 1] = constant
        extractor = UHopMILFeatureExtractor().fit(bags)
        assert (np.concatenate(extractor.transform(bags))[:, 1] == 0).all()
        changed = bags[0].copy()
        changed[:, 1] = 7.0
        assert (extractor.transform([changed])[0][:, 1] == 0).all()


def test_a_column_far_from_zero_is_not_constant(bags):
    """Seconds since 1970, for one."""
    for bag in bags:
        bag[:, 1] = 1.7e9 + 1.5 * bag[:, 0]
    column = np.concatenate(UHopMILFeatureExtractor(clip=None).fit(bags).transform(bags))
    np.testing.assert_allclose(column[:, 1], column[:, 0], atol=1e-5)


def test_principal_components_are_those_of_scikit_learn(bags):
    extractor = UHopMILFeatureExtractor(clip=None, num_components=3).fit(bags)
    pca = PCA(3, svd_solver="full").fit(StandardScaler().fit_transform(np.concatenate(bags)))
    expected = pca.transform(StandardScaler().fit(np.concatenate(bags)).transform(bags[2])) / pca.explained_variance_[0] ** 0.5
    np.testing.assert_allclose(extractor.transform(bags)[2], expected, rtol=1e-4, atol=1e-5)
    assert (extractor.num_features, extractor.instance_dim) == (5, 3)
    assert np.concatenate(extractor.transform(bags))[:, 0].std(ddof=1) == pytest.approx(1.0, rel=1e-5)


def test_without_standardisation_bags_stay_as_they_are(bags):
    assert np.allclose(UHopMILFeatureExtractor(standardize=False).fit(bags).transform(bags)[3], bags[3])


def test_images_are_standardised_channel_by_channel():
    images = [np.random.default_rng(i).normal([[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]], (size, 2, 4, 5)) for i, size in enumerate((3, 2))]
    extractor = UHopMILFeatureExtractor().fit(images)
    stacked = np.concatenate(extractor.transform(images))
    np.testing.assert_allclose(stacked.mean((0, 2, 3)), 0.0, atol=1e-6)
    np.testing.assert_allclose(stacked.std((0, 2, 3)), 1.0, atol=1e-3)
    batch = extractor(images, return_tensors="pt")
    assert batch["instances"].shape == (2, 3, 2, 4, 5)
    assert (batch["instances"][1, 2] == 0).all()
    assert extractor(images[0]).instances.shape == (1, 3, 2, 4, 5)


def test_padding_and_masks(bags):
    extractor = UHopMILFeatureExtractor().fit(bags)
    batch = extractor([*bags[:3], np.zeros((0, 5)), []], return_tensors="pt")
    assert batch["attention_mask"].sum(-1).tolist() == [4, 1, 9, 0, 0]
    assert batch["attention_mask"].dtype == torch.long
    assert batch["instances"].shape == (5, 9, 5)
    for index, transformed in enumerate(extractor.transform(bags[:3])):
        assert torch.equal(batch["instances"][index, : len(transformed)], torch.from_numpy(transformed))
        assert (batch["instances"][index, len(transformed) :] == 0).all()
    ragged = extractor(bags, padding=False)
    assert [len(bag) for bag in ragged["instances"]] == [4, 1, 9, 30]
    assert extractor([[]], return_tensors="pt")["instances"].shape == (1, 0, 5)


def test_lists_tensors_and_data_frames(bags):
    extractor = UHopMILFeatureExtractor().fit(bags)
    expected = extractor(bags[:2])["instances"]
    frames = [pd.DataFrame(bag, columns=list("abcde")) for bag in bags]
    for given in ([bag.tolist() for bag in bags[:2]], [torch.from_numpy(bag) for bag in bags[:2]], frames[:2]):
        np.testing.assert_array_equal(extractor(given)["instances"], expected)
    np.testing.assert_array_equal(extractor(frames[0])["instances"], extractor(bags[0])["instances"])
    named = UHopMILFeatureExtractor().fit(frames)
    assert named.feature_names == list("abcde")
    with pytest.raises(ValueError, match=r"bag 1 must have the columns \['a', .* got \['b', 'a'"):
        named([frames[0], frames[1][list("bacde")]])


def test_saving_and_loading(bags, tmp_path):
    extractor = UHopMILFeatureExtractor(num_components=2).fit(bags)
    extractor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["feature_extractor_type"] == "UHopMILFeatureExtractor"
    UHopMILConfig(instance_dim=2).save_pretrained(tmp_path)
    for loaded in (UHopMILFeatureExtractor.from_pretrained(tmp_path), AutoFeatureExtractor.from_pretrained(tmp_path)):
        np.testing.assert_array_equal(loaded(bags)["instances"], extractor(bags)["instances"])
        assert loaded.instance_dim == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no bags"),
        ([np.ones((2, 5)), np.ones((3, 4))], r"bag 1 has instances of shape \(4,\), and bag 0 of \(5,\)"),
        ([np.ones((2, 4))], "bag 0 has 4 features, and the extractor was fitted on 5"),
        ([np.ones((2, 5)), np.ones(5)], r"bag 1 must have shape \(instances, features\).*got \(5,\)"),
        ([np.ones((2, 5)), [[1.0] * 5, [1.0] * 4]], "bag 1 is not numbers of one shape for every instance"),
        ([np.ones((2, 5)), [["a"] * 5]], "bag 1 is not numbers"),
        ([np.ones((2, 5)), np.array([[1.0] * 5, [np.nan] * 5])], "bag 1 has entries that are not finite, first in its instance 1"),
        ([np.ones((2, 5)), None], "bag 1 must be a set of instances, got None"),
        ([np.full((1, 5), np.inf)], "bag 0 has entries that are not finite"),
    ],
)
def test_bad_bags_are_named(bags, given, message):
    with pytest.raises(ValueError, match=message):
        UHopMILFeatureExtractor().fit(bags)(given)


def test_a_single_bag_in_every_form(bags):
    extractor = UHopMILFeatureExtractor().fit(bags)
    expected = extractor([bags[0]])["instances"]
    rows = [list(map(np.float32, row)) for row in bags[0]]
    for given in (bags[0], bags[0].tolist(), list(bags[0]), torch.from_numpy(bags[0]).requires_grad_(), rows):
        np.testing.assert_allclose(extractor(given)["instances"], expected, rtol=1e-5, atol=1e-6)
    low = extractor(torch.from_numpy(bags[0]).bfloat16())["instances"]
    np.testing.assert_allclose(low, expected, atol=0.05)
    images = np.random.default_rng(0).normal(size=(3, 2, 4, 4))
    of_images = UHopMILFeatureExtractor().fit([images])
    np.testing.assert_array_equal(of_images(images.tolist())["instances"], of_images([images])["instances"])
    assert of_images([[]])["instances"].shape == (1, 0, 2, 4, 4)
    assert of_images(np.zeros((0, 2, 4, 4)))["instances"].shape == (1, 0, 2, 4, 4)


def test_a_fit_that_fails_changes_nothing(bags):
    extractor = UHopMILFeatureExtractor(num_components=2).fit(bags)
    before = extractor.transform(bags)
    for wrong in ([np.full((2, 5), np.nan)], [np.ones((1, 5))], bags[0], pd.DataFrame(bags[0])):
        with pytest.raises(ValueError):
            extractor.fit(wrong)
    np.testing.assert_array_equal(np.concatenate(extractor.transform(bags)), np.concatenate(before))


def test_bad_settings_are_refused(bags):
    with pytest.raises(ValueError, match="call fit on the training bags"):
        UHopMILFeatureExtractor()(bags)
    with pytest.raises(ValueError, match="there is no instance to fit on"):
        UHopMILFeatureExtractor().fit([np.zeros((0, 3))])
    with pytest.raises(ValueError, match="num_components must be at most the 5"):
        UHopMILFeatureExtractor(num_components=6).fit(bags)
    with pytest.raises(ValueError, match="clip must be positive"):
        UHopMILFeatureExtractor(clip=0.0)


def test_the_collator_pads_and_labels(bags):
    extractor = UHopMILFeatureExtractor().fit(bags)
    examples = [{"instances": bag, "label": index % 2, "name": "unused"} for index, bag in enumerate(bags)]
    batch = DataCollatorForBags(extractor)(examples)
    expected = extractor(bags, return_tensors="pt")
    assert set(batch) == {"instances", "attention_mask", "labels"}
    assert torch.equal(batch["instances"], expected["instances"])
    assert torch.equal(batch["labels"], torch.tensor([0, 1, 0, 1]))
    transformed = [{**example, "instances": bag} for example, bag in zip(examples, extractor.transform(bags), strict=True)]
    assert torch.equal(DataCollatorForBags()(transformed)["instances"], expected["instances"])
    many = [{"instances": bags[0], "labels": [0.0, 1.0]}]
    assert DataCollatorForBags(extractor)(many)["labels"].tolist() == [[0.0, 1.0]]
    assert "labels" not in DataCollatorForBags(extractor)([{"instances": bags[0]}])
    assert DataCollatorForBags()([{"instances": bags[0], "label": label} for label in (True, False)])["labels"].tolist() == [1, 0]
    assert DataCollatorForBags()([{"instances": []}, {"instances": bags[0]}])["attention_mask"].sum(-1).tolist() == [0, 4]


@pytest.mark.parametrize("selection", ["random", "first", "spread"])
def test_the_collator_reduces_huge_bags(selection):
    bag = np.arange(100.0).reshape(100, 1)
    small = np.arange(3.0).reshape(3, 1)
    collate = DataCollatorForBags(max_instances=10, selection=selection)
    batch = collate([{"instances": bag}, {"instances": small}])
    chosen = batch["instances"][0, :, 0].tolist()
    assert len(set(chosen)) == 10 == len(chosen)
    assert batch["attention_mask"].sum(-1).tolist() == [10, 3]
    again = collate([{"instances": bag}])["instances"][0, :, 0].tolist()
    assert (again == chosen) == (selection != "random")
    expected = {"first": list(range(10)), "spread": [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]}
    assert chosen == expected.get(selection, sorted(chosen))


def test_bad_collators_are_refused(bags):
    with pytest.raises(ValueError, match="max_instances must be at least 1"):
        DataCollatorForBags(max_instances=0)
    with pytest.raises(ValueError, match=r"selection must be one of .* got 'last'"):
        DataCollatorForBags(selection="last")
    for labels in (["a", "b"], [[0.0], [1.0, 2.0]]):
        with pytest.raises(ValueError, match=r"bag [01] of the batch has a label that is no number, or not shaped like"):
            DataCollatorForBags()([{"instances": bags[0], "label": label} for label in labels])
    with pytest.raises(ValueError, match=r"bag 1 has instances of shape \(1,\), and bag 0 of \(5,\)"):
        DataCollatorForBags()([{"instances": bags[0]}, {"instances": np.ones((2, 1))}])
    with pytest.raises(ValueError, match="bag 1 of the batch has no label"):
        DataCollatorForBags()([{"instances": bags[0], "label": 1}, {"instances": bags[1]}])
