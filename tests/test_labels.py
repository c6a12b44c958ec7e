"""Tests of the labels of bag and image classifiers and of the collator: values of the loss, and
errors that name the example."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Trainer, TrainingArguments

from modeling_uhop import (
    DataCollatorForBags,
    UHopMILConfig,
    UHopMILForBagClassification,
    UHopViTConfig,
    UHopViTForImageClassification,
    checks,
)
from tests.conftest import assert_close


functional = torch.nn.functional
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "initializer_range": 0.5, "hidden_dropout_prob": 0.0}


def _bags(**fields):
    model = UHopMILForBagClassification(UHopMILConfig(instance_dim=4, **SMALL, **fields)).eval()
    return model, {"instances": torch.randn(3, 5, 4)}


def _images(**fields):
    sizes = {"image_size": 4, "patch_size": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    model = UHopViTForImageClassification(UHopViTConfig(**SMALL, **sizes, **fields)).eval()
    return model, {"pixel_values": torch.randn(3, 3, 4, 4)}


@pytest.fixture(params=[_bags, _images], ids=["bags", "images"])
def family(request):
    return request.param


CLASSES = torch.tensor([1, 0, 2])
SEVERAL = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0.25, 1, 0]])
NUMBERS = torch.tensor([0.5, -3.0, 2.0])


@pytest.mark.parametrize(
    ("fields", "labels", "problem"),
    [
        ({"num_labels": 3}, CLASSES, "single_label_classification"),
        ({"num_labels": 3}, CLASSES.unsqueeze(1), "single_label_classification"),
        ({"num_labels": 3}, CLASSES.to(torch.uint8), "single_label_classification"),
        ({"num_labels": 3}, CLASSES.to(torch.int16).unsqueeze(1), "single_label_classification"),
        ({"num_labels": 3}, CLASSES.double(), "single_label_classification"),
        ({"num_labels": 3}, CLASSES.bfloat16().unsqueeze(1), "single_label_classification"),
        ({"num_labels": 2}, torch.tensor([True, False, True]), "single_label_classification"),
        ({"num_labels": 3}, torch.tensor([1.0, -100.0, 2.0]), "single_label_classification"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, CLASSES.float(), "single_label_classification"),
        ({"num_labels": 3}, SEVERAL, "multi_label_classification"),
        ({"num_labels": 3}, SEVERAL.round().long(), "multi_label_classification"),
        ({"num_labels": 3}, SEVERAL > 0.5, "multi_label_classification"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, SEVERAL.half(), "multi_label_classification"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, torch.tensor([1, 0, 1]), "multi_label_classification"),
        ({"num_labels": 1}, NUMBERS, "regression"),
        ({"num_labels": 1}, NUMBERS.double().unsqueeze(1), "regression"),
        ({"num_labels": 1}, torch.tensor([3, -100, 7]), "regression"),
        ({"num_labels": 3, "problem_type": "regression"}, 5.0 * SEVERAL, "regression"),
    ],
)
def test_valid_labels_give_the_expected_loss(family, fields, labels, problem):
    model, inputs = family(**fields)
    before = model.config.to_dict()
    outputs = model(**inputs, labels=labels)
    if problem == "single_label_classification":
        expected = functional.cross_entropy(outputs.logits, labels.long().flatten())
    elif problem == "multi_label_classification":
        expected = functional.binary_cross_entropy_with_logits(outputs.logits, labels.float().reshape(3, -1))
    else:
        expected = functional.mse_loss(outputs.logits, labels.float().reshape(3, -1))
    assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    ("fields", "labels", "message"),
    [
        ({"num_labels": 3}, [0.0, 0.5, 1.0], r"class indices.*set num_labels=1 for a regression.*got 0.5 for example 1 of the batch"),
        ({"num_labels": 3}, [0.0, 1.0, torch.nan], "class indices.* got nan for example 2 of the batch"),
        ({"num_labels": 3}, [0.0, 1.0, torch.inf], r"lie in \[0, 3\), got inf for example 2"),
        ({"num_labels": 3}, [[0], [3], [1]], r"lie in \[0, 3\), got 3 for example 1"),
        ({"num_labels": 3}, [0, 1, -1], r"lie in \[0, 3\), got -1 for example 2"),
        ({"num_labels": 3}, [[0.0, 1, 0], [0, 0, 2], [0, 0, 0]], r"lie in \[0, 1\].*problem_type='regression'.*got 2.0 for example 1"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [[0, torch.nan, 0]] * 3, r"\[0, 1\].*got nan for example 0"),
        (
            {"num_labels": 3},
            [[0, 1]] * 3,
            r"class indices of shape .* or values in .* got torch.int64 of shape \(3, 2\) with B=3",
        ),
        ({"num_labels": 3}, [0, 1], r"got torch.int64 of shape \(2,\) with B=3, num_labels=3 and problem_type=None"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, [[0, 1, 0]] * 3, r"must be class indices of shape.* got"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, [0, 1, 2], r"must be values in \[0, 1\] of shape .* got"),
        ({"num_labels": 3, "problem_type": "regression"}, [0, 1, 2], r"must be numbers of shape \(B, num_labels\), got"),
        ({"num_labels": 1}, [0.0, torch.nan, 1.0], "finite .* got nan for example 1"),
        ({"num_labels": 1}, [0.0, 1.0, 1e30], "overflow, got .*e.30 for example 2"),
        ({"num_labels": 1}, [[0.0, 1.0]] * 3, r"must be numbers of shape .* got torch.float32 of shape \(3, 2\)"),
    ],
)
def test_invalid_labels_are_refused(family, fields, labels, message):
    model, inputs = family(**fields)
    with pytest.raises(ValueError, match=message):
        model(**inputs, labels=torch.tensor(labels))
    assert model.config.problem_type == fields.get("problem_type")


def test_a_model_without_a_classifier_takes_no_labels():
    model, inputs = _images(num_labels=0)
    with pytest.raises(ValueError, match="num_labels=0"):
        model(**inputs, labels=torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("labels", [np.array([0, 1, 0]), [0, 1, 0]], ids=["array", "list"])
def test_labels_that_are_not_a_tensor_are_refused(family, labels):
    model, inputs = family(num_labels=2)
    with pytest.raises(TypeError, match=r"labels must be a torch.Tensor, got"):
        model(**inputs, labels=labels)


def test_a_batch_with_only_ignored_labels_has_loss_0(family):
    model, inputs = family(num_labels=2)
    loss = model(**inputs, labels=torch.full((3,), -100)).loss
    loss.backward()
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_half_precision_logits_is_float32(family, dtype):
    model, inputs = family(num_labels=2)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([4e4, -4e4])
    outputs = model.to(dtype)(**inputs, labels=torch.ones(3))
    assert_close(outputs.loss, outputs.logits[0].float() @ torch.tensor([1.0, -1.0]), scale=100)


@pytest.mark.parametrize(("num_labels", "labels", "problem"), [(3, SEVERAL, "multi_label_classification"), (1, NUMBERS, "regression")])
def test_an_undeclared_problem_type_gives_one_warning(family, caplog, num_labels, labels, problem):
    checks.logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    model, inputs = family(num_labels=num_labels)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            model(**inputs, labels=labels)
    assert [record.message for record in caplog.records if f"problem_type='{problem}'" in record.message] == [caplog.records[0].message]


@pytest.mark.trains
def test_a_loss_compiles_in_one_graph(family):
    for num_labels, labels in ((3, CLASSES), (3, CLASSES.float()), (3, SEVERAL), (1, NUMBERS)):
        model, inputs = family(num_labels=num_labels)
        expected = model(**inputs, labels=labels).loss
        assert_close(torch.compile(model, fullgraph=True, backend="eager")(**inputs, labels=labels).loss, expected)
        assert model.config.problem_type is None
        torch.compiler.reset()


@pytest.mark.parametrize(
    "label",
    [
        *(torch.tensor([1]), np.array([1]), [1], np.int64(1), True, 1, pd.Series([1], index=[7])),
        *(np.array(1, dtype=object), np.array([1], dtype=object), torch.tensor([1]).to_sparse()),
    ],
)
def test_a_collated_label_is_a_class_index(label):
    batch = DataCollatorForBags()([{"instances": torch.randn(2, 4), "label": label}, {"instances": torch.randn(3, 4), "label": 0}])
    assert batch["labels"].dtype == torch.long
    assert batch["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("key", ["label", "labels", "label_ids"])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1.0, 0.0], torch.tensor([1.0, 0.0])),
        ([1, 0.5], torch.tensor([1.0, 0.5])),
        ([[1, 0, 1], [0, 0, 0]], torch.tensor([[1.0, 0, 1], [0, 0, 0]])),
        ([torch.tensor([1.0, 0.0]).to_sparse(), np.array([0, 1], dtype=object)], torch.tensor([[1.0, 0.0], [0.0, 1.0]])),
        ([torch.tensor([1.5], dtype=torch.bfloat16, requires_grad=True), np.float64(2)], torch.tensor([1.5, 2.0])),
    ],
)
def test_collated_labels(key, labels, expected):
    batch = DataCollatorForBags()([{"instances": torch.randn(2, 4), key: label} for label in labels])
    assert batch["labels"].dtype == torch.float32
    assert torch.equal(batch["labels"], expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, np.nan], "label of bag 1 of the batch is missing or not finite"),
        ([0.0, 1e39], "label of bag 1 of the batch is missing or not finite"),
        ([[0.0, 1.0], [0.0, np.nan]], "label of bag 1 of the batch is missing or not finite"),
        ([0, pd.NA], "label of bag 1 of the batch is not a number"),
        ([0, None], "bag 1 of the batch has no label"),
        ([0, "sick"], r"label of bag 1 of the batch is not a number.* 'sick'; config.label2id has the class index"),
        ([0, np.str_("sick")], "bag 1 of the batch .* config.label2id"),
        ([[1, 0], [1]], r"label of bag 1 of the batch is not a number, or its shape differs from the first: \[1\]"),
        ([[[1]], [[0]]], "label of bag 0 of the batch is not a number"),
        ([0, [1, [0]]], "label of bag 1 of the batch is not a number"),
        ([0, np.array(["1"], dtype=object)], "label of bag 1 of the batch is not a number"),
        ([0, np.array([None], dtype=object)], "label of bag 1 of the batch is not a number"),
        ([0, 1j], "label of bag 1 of the batch is not a number"),
    ],
)
def test_bad_labels_are_refused_by_bag(labels, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForBags()([{"instances": torch.randn(2, 4), "label": label} for label in labels])


def test_training_determines_the_problem_type_from_the_labels(tmp_path):
    model, _ = _bags(num_labels=2)
    bags = [{"instances": torch.randn(3, 4), "label": [float(index % 2)]} for index in range(4)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False
    )
    trainer = Trainer(model, arguments, DataCollatorForBags(), bags, eval_dataset=bags)
    trainer.train()
    outputs = trainer.predict(bags)
    assert outputs.label_ids.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert model.config.problem_type is None
