"""Tests of UHopMILFeatureExtractor and DataCollatorForBags: values against scikit-learn, masks,
saving and loading, errors."""

import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from transformers import AutoFeatureExtractor

from modeling_uhop import DataCollatorForBags, UHopMILConfig, UHopMILFeatureExtractor


@pytest.fixture
def bags():
    random = np.random.default_rng(0)
    return [random.normal(3.0, 2.0, (size, 5)) * [1, 10, 100, 1000, 1] for size in (4, 1, 9, 30)]


def test_standardisation_equals_scikit_learn(bags):
    extractor = UHopMILFeatureExtractor(clip=None).fit(bags)
    scaler = StandardScaler().fit(np.concatenate(bags))
    for bag, transformed in zip(bags, extractor.transform(bags), strict=True):
        np.testing.assert_allclose(transformed, scaler.transform(bag), rtol=1e-5, atol=1e-6)
        assert transformed.dtype == np.float32
    clipped = UHopMILFeatureExtractor(clip=0.5).fit(bags).transform(bags)
    np.testing.assert_allclose(clipped[2], scaler.transform(bags[2]).clip(-0.5, 0.5), rtol=1e-5, atol=1e-6)


def test_transformed_bags_do_not_change_the_extractor(bags):
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
    """For example, seconds since 1970."""
    for bag in bags:
        bag[:, 1] = 1.7e9 + 1.5 * bag[:, 0]
    column = np.concatenate(UHopMILFeatureExtractor(clip=None).fit(bags).transform(bags))
    np.testing.assert_allclose(column[:, 1], column[:, 0], atol=1e-5)


def test_principal_components_equal_scikit_learn(bags):
    extractor = UHopMILFeatureExtractor(clip=None, num_components=3).fit(bags)
    pca = PCA(3, svd_solver="full").fit(StandardScaler().fit_transform(np.concatenate(bags)))
    expected = pca.transform(StandardScaler().fit(np.concatenate(bags)).transform(bags[2])) / pca.explained_variance_[0] ** 0.5
    np.testing.assert_allclose(extractor.transform(bags)[2], expected, rtol=1e-4, atol=1e-5)
    assert (extractor.num_features, extractor.instance_dim) == (5, 3)
    assert np.concatenate(extractor.transform(bags))[:, 0].std(ddof=1) == pytest.approx(1.0, rel=1e-5)


def test_without_standardisation_bags_are_unchanged(bags):
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
        ([], "at least one bag is needed, got none"),
        ([np.ones((2, 5)), np.ones((3, 4))], r"bag 1 has instances of shape \(4,\), but bag 0 has \(5,\)"),
        ([np.ones((2, 4))], "bag 0 has 4 features, but the extractor was fitted on 5"),
        ([np.ones((2, 5)), np.ones(5)], r"bag 1 must have shape \(instances, features\).*got \(5,\)"),
        ([np.ones((2, 5)), [[1.0] * 5, [1.0] * 4]], "bag 1 must consist of numbers, with one shape for every instance"),
        ([np.ones((2, 5)), [["a"] * 5]], "bag 1 must consist of numbers"),
        ([np.ones((2, 5)), np.array([[1.0] * 5, [np.nan] * 5])], "bag 1 has entries that are not finite, first in its instance 1"),
        ([np.ones((2, 5)), None], "bag 1 must be a set of instances, got None"),
        ([np.full((1, 5), np.inf)], "bag 0 has entries that are not finite"),
    ],
)
def test_bad_bags_are_named(bags, given, message):
    with pytest.raises(ValueError, match=message):
        UHopMILFeatureExtractor().fit(bags)(given)


def test_a_single_bag_is_accepted_in_every_form(bags):
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
    with pytest.raises(ValueError, match="fit needs at least one instance"):
        UHopMILFeatureExtractor().fit([np.zeros((0, 3))])
    with pytest.raises(ValueError, match="num_components must be at most 5"):
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
        with pytest.raises(ValueError, match=r"label of bag [01] of the batch is not a number, or its shape differs"):
            DataCollatorForBags()([{"instances": bags[0], "label": label} for label in labels])
    with pytest.raises(ValueError, match=r"bag 1 has instances of shape \(1,\), but bag 0 has \(5,\)"):
        DataCollatorForBags()([{"instances": bags[0]}, {"instances": np.ones((2, 1))}])
    with pytest.raises(ValueError, match="bag 1 of the batch has no label"):
        DataCollatorForBags()([{"instances": bags[0], "label": 1}, {"instances": bags[1]}])


EXACT = np.arange(-10.0, 10.0).reshape(4, 5)  # values that every dtype except bool has
FORMS = {
    "float64": lambda bag: bag,
    "float16": lambda bag: bag.astype(np.float16),
    "int8": lambda bag: bag.astype(np.int8),
    "objects": lambda bag: bag.astype(object),
    "rows in an object array": lambda bag: pd.Series(list(bag)).to_numpy(),
    "tensor in bfloat16": lambda bag: torch.from_numpy(bag).bfloat16(),
    "tensor in float16 with a gradient": lambda bag: torch.from_numpy(bag).half().requires_grad_(),
    "tensor in int8": lambda bag: torch.from_numpy(bag).to(torch.int8),
    "transposed tensor": lambda bag: torch.from_numpy(bag.T.copy()).T,
    "sparse tensor": lambda bag: torch.from_numpy(bag).to_sparse(),
    "list of tensors with gradients": lambda bag: list(torch.from_numpy(bag).requires_grad_()),
    "scipy's sparse array": lambda bag: csr_array(bag),
    "masked array without a masked value": lambda bag: np.ma.MaskedArray(bag),
    "frame": lambda bag: pd.DataFrame(bag),
    "nullable frame": lambda bag: pd.DataFrame(bag).astype("Int64"),
    "frame of two kinds": lambda bag: pd.DataFrame(bag).astype({0: "Int64", 1: "Float32"}),
    "arrow": lambda bag: pd.DataFrame(bag).astype("double[pyarrow]"),
    "with a leading axis": lambda bag: bag[None],
}


@pytest.mark.parametrize("limit", [None, 3], ids=["whole", "reduced"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_entry_point_reads_every_form_of_a_bag_equally(form, limit):
    extractor = UHopMILFeatureExtractor(clip=None).fit([EXACT])
    given, expected = form(EXACT), (EXACT - EXACT.mean(0)) / EXACT.std(0)
    np.testing.assert_allclose(extractor.transform([given])[0], expected, rtol=1e-6)
    np.testing.assert_allclose(extractor([given])["instances"][0], expected, rtol=1e-6)
    collate = DataCollatorForBags(extractor, max_instances=limit, selection="first")
    np.testing.assert_allclose(collate([{"instances": given}])["instances"][0], expected[:limit], rtol=1e-6)
    if getattr(given, "ndim", 2) != 3:
        np.testing.assert_array_equal(UHopMILFeatureExtractor().fit([given]).mean, extractor.mean)
        raw = DataCollatorForBags(max_instances=limit, selection="first")([{"instances": given}])["instances"]
        np.testing.assert_array_equal(raw[0], EXACT[:limit])


@pytest.mark.parametrize("limit", [None, 1], ids=["whole", "reduced"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 5, device="meta"), "bag 1 must consist of numbers.* meta device"),
        (torch.zeros(2, 5, dtype=torch.complex64), "bag 1 must consist of numbers.* complex64"),
        (np.zeros((2, 5), dtype=complex), "bag 1 must consist of numbers.* complex128"),
        (np.zeros((2, 5), dtype="datetime64[s]"), "bag 1 must consist of numbers.* datetime64"),
        (pd.DataFrame({"when": pd.to_datetime(["2020-01-01"] * 2)}), "bag 1 must consist of numbers.* datetime64"),
        (pd.DataFrame([[0] * 5, [None] * 5], dtype="Int64"), "bag 1 .* not finite, first in its instance 1"),
        (pd.DataFrame([[0.0] * 5, [None] * 5], dtype="double[pyarrow]"), "bag 1 .* not finite, first in its instance 1"),
        (np.ma.MaskedArray(np.zeros((2, 5)), mask=[[False] * 5, [True] * 5]), "bag 1 .* not finite, first in its instance 1"),
        (np.array([[0.0] * 5, [pd.NA] * 5], dtype=object), "bag 1 must consist of numbers.*NAType"),
        ([torch.zeros(5), torch.zeros(4)], "bag 1 must consist of numbers, with one shape"),
        (np.zeros((1, 2, 4)), r"bag 1 must have shape .* got \(1, 2, 4\); if vectors were saved as \(1, instances, features\)"),
        (np.zeros((2, 2, 5)), r"bag 1 must have shape .* got \(2, 2, 5\)$"),
        (np.concatenate([np.zeros((1, 5)), np.full((1, 5), np.nan)]), "bag 1 .* not finite, first in its instance 1"),
    ],
)
def test_every_entry_point_names_a_bad_bag(bags, given, message, limit):
    extractor = UHopMILFeatureExtractor().fit(bags)
    doors = [
        lambda given: UHopMILFeatureExtractor().fit(given),
        extractor.transform,
        extractor,
        lambda given: DataCollatorForBags(extractor, limit, "first")([{"instances": bag} for bag in given]),
        lambda given: DataCollatorForBags(None, limit, "first")([{"instances": bag} for bag in given]),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=message):
            door([bags[0], given])


def test_vectors_with_a_leading_axis_are_not_fitted_on(bags):
    saved = [bags[0][None]] * 2
    for given, message in (
        (saved, r"got entries of one shape \(1, 4, 5\): for vectors saved as .* pass \[bag\[0\] for bag in bags\]"),
        (np.stack(saved), r"got entries of one shape \(1, 4, 5\)"),
        ([bags[0], bags[2][None]], r"bag 1 .* got \(1, 9, 5\)"),
        (bags[0], r"got vectors of shape \(5,\), which make a single bag: pass \[bag\]"),
        (bags[0].tolist(), r"got vectors of shape \(5,\), which make a single bag"),
        (np.zeros((4, 3, 8, 8)), r"got images of shape \(3, 8, 8\), which make a single bag"),
        (pd.DataFrame(bags[0]), "got one DataFrame, which is a single bag"),
    ):
        with pytest.raises(ValueError, match=message):
            UHopMILFeatureExtractor().fit(given)
    extractor = UHopMILFeatureExtractor().fit(bags)
    expected = extractor([bags[0], bags[2]])["instances"]
    np.testing.assert_array_equal(extractor([bags[0][None], torch.from_numpy(bags[2])[None]])["instances"], expected)
    np.testing.assert_array_equal(extractor(np.stack([bags[0][None]] * 2))["instances"][1], expected[0, :4])
    with pytest.raises(ValueError, match=r"bag 0 must have shape .* got \(1, 4, 4\)"):
        UHopMILFeatureExtractor().fit([np.random.default_rng(0).normal(size=(3, 1, 4, 4))]).transform([np.ones((1, 4, 4))])


def test_vectors_with_a_leading_axis_in_every_bag_are_fitted_on(bags):
    expected = UHopMILFeatureExtractor().fit(bags)
    for saved in ([bag[None] for bag in bags], [torch.from_numpy(bag)[None] for bag in bags], pd.Series([bag[None] for bag in bags])):
        fitted = UHopMILFeatureExtractor().fit(saved)
        assert fitted.takes_vectors
        np.testing.assert_array_equal(fitted.mean, expected.mean)
        np.testing.assert_array_equal(fitted(list(saved))["instances"], expected(bags)["instances"])


def test_extractors_of_vectors_refuse_images_and_extractors_of_images_vectors(bags):
    vectors = UHopMILFeatureExtractor().fit(bags)
    for shape in ((1, 1, 6, 5), (2, 5, 3, 3)):
        with pytest.raises(ValueError, match=r"bag 0 has (1 features|images), but the extractor was fitted on "):
            vectors([np.zeros(shape)])
    images = UHopMILFeatureExtractor().fit([np.random.default_rng(0).normal(size=(2, 5, 4, 4))])
    with pytest.raises(ValueError, match=r"bag 0 has vectors, but the extractor was fitted on images; its shape is \(4, 5\)"):
        images([bags[0]])


def test_bags_in_a_series_keep_their_order(bags):
    shuffled = pd.Series(bags).iloc[::-1]
    extractor = UHopMILFeatureExtractor().fit(shuffled)
    assert [len(bag) for bag in extractor.transform(shuffled)] == [30, 9, 1, 4]


def test_a_batch_is_never_one_bag(bags):
    with pytest.raises(ValueError, match=r"bag 0 must have shape .* got \(5,\)"):
        DataCollatorForBags(UHopMILFeatureExtractor().fit(bags))([{"instances": bag[0], "label": 1} for bag in bags])


def test_names_of_columns_are_read_of_long_bags_too(bags):
    frames = [pd.DataFrame(bag, columns=list("abcde")) for bag in bags]
    collate = DataCollatorForBags(UHopMILFeatureExtractor().fit(frames), max_instances=2, selection="first")
    expected = collate.feature_extractor.transform(frames)[3][:2]
    np.testing.assert_array_equal(collate([{"instances": frames[3]}])["instances"][0], expected)
    with pytest.raises(ValueError, match="bag 0 must have the columns"):
        collate([{"instances": frames[3][list("bacde")]}])
    with pytest.raises(ValueError, match="bag 1 must have the columns"):
        UHopMILFeatureExtractor().fit([bags[0], frames[0][list("bacde")], frames[1]][::-1])


def test_channels_last_images_are_accepted():
    first = np.random.default_rng(0).normal(size=(4, 3, 8, 9)) * [[[1.0]], [[2.0]], [[3.0]]]
    last = np.moveaxis(first, 1, 3)
    extractor = UHopMILFeatureExtractor().fit([first])
    fitted = UHopMILFeatureExtractor().fit([last, first])
    np.testing.assert_allclose(fitted.scale, extractor.scale)
    assert fitted.image_size == [8, 9]
    np.testing.assert_array_equal(extractor([last, first])["instances"], extractor([first, first])["instances"])
    # Four rows could be channels; that there are 13 channels is known only from the extractor.
    assert UHopMILFeatureExtractor().fit([np.random.default_rng(0).random((2, 4, 8, 3))]).num_features == 4
    spectral = np.random.default_rng(0).random((2, 13, 8, 9))
    of_spectra = UHopMILFeatureExtractor().fit([spectral])
    np.testing.assert_array_equal(of_spectra([np.moveaxis(spectral, 1, 3)])["instances"], of_spectra([spectral])["instances"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_peak_memory_is_close_to_the_size_of_the_result(dtype):
    bag = np.random.default_rng(0).normal(size=(20_000, 128)).astype(dtype)
    single = bag.size * 4
    extractor = UHopMILFeatureExtractor().fit([bag[:50]])
    widened = single if dtype == np.float16 else 0
    collate = DataCollatorForBags(extractor, max_instances=100)
    for call, limit in (
        (lambda: extractor([bag], return_tensors="pt"), 1.0),
        (lambda: extractor.transform([bag]), 1.0),
        (lambda: UHopMILFeatureExtractor().fit([bag]), 0.0),
        (lambda: collate([{"instances": bag}]), 0.0),
        (lambda: DataCollatorForBags()([{"instances": bag}]), 1.0),
    ):
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit * single + widened + 10e6


def test_a_fit_in_blocks_is_exact():
    """Seconds since 1970 that differ by milliseconds, and a constant that float32 cannot represent
    exactly."""
    random = np.random.default_rng(0)
    rows = np.stack([1.7e9 + random.integers(0, 1000, 400_000) / 1000, random.normal(size=400_000), np.full(400_000, 0.1)], axis=1)
    bags = [rows[:300_000], rows[300_000:].copy(), rows[:0]]
    extractor = UHopMILFeatureExtractor(clip=None).fit(bags)
    exact = rows.astype(np.longdouble)
    np.testing.assert_allclose(extractor.mean, exact.mean(0).astype(float), rtol=1e-15, atol=1e-15)
    np.testing.assert_allclose(extractor.scale, [*exact.std(0).astype(float)[:2], 0.0], rtol=1e-9)
    expected = (exact[:, :2] - exact[:, :2].mean(0)) / exact[:, :2].std(0)
    np.testing.assert_allclose(np.concatenate(extractor.transform(bags))[:, :2], expected.astype(float), rtol=1e-5, atol=1e-6)
    assert (extractor.transform(bags)[0][:, 2] == 0).all()


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e19), (np.float32, 3e38), (np.float16, 6e4), (np.float64, 1e150)])
@pytest.mark.parametrize("components", [None, 1])
def test_large_values_are_standardised(bags, dtype, size, components):
    large = [(bag / np.abs(bag).max() * size).astype(dtype) for bag in bags]
    extractor = UHopMILFeatureExtractor(num_components=components).fit(large)
    small = UHopMILFeatureExtractor(num_components=components).fit([bag.astype(np.float64) / size for bag in large])
    expected = small.transform([bag.astype(np.float64) / size for bag in large])
    for result, other in zip(extractor.transform(large), expected, strict=True):
        np.testing.assert_allclose(np.abs(result), np.abs(other), rtol=1e-4, atol=1e-4)


def test_values_that_overflow_are_named(bags):
    huge = [bags[0], bags[1] * 1e200]
    for fields in ({}, {"num_components": 1}, {"standardize": False, "num_components": 1}):
        with pytest.raises(ValueError, match="bag 1 has entries whose squares overflow"):
            UHopMILFeatureExtractor(**fields).fit(huge)
    expected = "bag 1 has entries that are not finite in float32"
    with pytest.raises(ValueError, match=expected):
        UHopMILFeatureExtractor(standardize=False).fit(huge).transform(huge)
    with pytest.raises(ValueError, match=expected):
        UHopMILFeatureExtractor(clip=None).fit(bags)(huge)
    with pytest.raises(ValueError, match=expected):
        DataCollatorForBags()([{"instances": bag} for bag in huge])
    assert np.abs(UHopMILFeatureExtractor().fit(bags).transform(huge)[1]).max() == 5.0


def test_a_file_of_an_earlier_version_is_read(tmp_path, bags):
    fields = {"mean": [0.0, 1, 2, 3, 4], "scale": [1.0, 2, 0, 4, 5], "clip": 2.0, "standardize": True, "image_size": []}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**fields, "feature_extractor_type": "UHopMILFeatureExtractor"}))
    loaded = UHopMILFeatureExtractor.from_pretrained(tmp_path)
    expected = ((bags[2] - fields["mean"]) / [1, 2, np.inf, 4, 5]).clip(-2, 2)
    np.testing.assert_allclose(loaded.transform(bags)[2], expected, rtol=1e-6)
