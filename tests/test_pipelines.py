"""Tests of the pipeline for bags: outputs equal the model, bags in every form, threshold, top_k,
and a process without the package."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from support.forks import run_forked
from transformers import pipeline

from modeling_uhop import UHopMILConfig, UHopMILFeatureExtractor, UHopMILForBagClassification


TASK = "multiple-instance-classification"


@pytest.fixture
def bags():
    return [np.random.default_rng(i).normal(size=(size, 4)) for i, size in enumerate((5, 1, 3))]


def _save(folder, bags, **fields):
    torch.manual_seed(0)
    config = UHopMILConfig(instance_dim=4, hidden_size=8, num_attention_heads=2, initializer_range=1.0, alpha=1.5, **fields)
    model = UHopMILForBagClassification(config).eval()
    extractor = UHopMILFeatureExtractor().fit(bags)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return model, extractor


def test_pipeline_outputs_equal_the_model(tmp_path, bags):
    model, extractor = _save(tmp_path, bags, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    classify = pipeline(TASK, model=str(tmp_path))
    outputs = model(**extractor(bags, return_tensors="pt"))
    for index, answer in enumerate(classify(bags)):
        scores, weights = outputs.logits[index].softmax(-1), outputs.instance_weights[index]
        assert answer["label"] == ("no", "yes")[scores.argmax()]
        assert answer["score"] == pytest.approx(scores.max().item(), rel=1e-5)
        named = {instance["index"]: instance["weight"] for instance in answer["instances"]}
        assert set(named) == set(range(len(bags[index])))
        assert [named[i] for i in range(len(named))] == pytest.approx(weights[: len(named)].tolist(), abs=1e-6)
        ranked = [instance["weight"] for instance in answer["instances"]]
        assert ranked == sorted(ranked, reverse=True)


def test_one_bag_is_accepted_in_every_form(tmp_path, bags):
    _save(tmp_path, bags)
    classify = pipeline(TASK, model=str(tmp_path))
    expected = classify(bags[0])
    frame = pd.DataFrame(bags[0])
    for given in (bags[0].tolist(), list(bags[0]), torch.from_numpy(bags[0]), frame):
        assert classify(given) == expected
    several = np.stack([bags[0], bags[0] + 1.0])
    assert classify(several) == classify(list(several))
    assert [len(answer["instances"]) for answer in classify(bags, batch_size=1)] == [5, 1, 3]
    brief = pipeline(TASK, model=str(tmp_path), top_k=1)
    assert len(brief(bags[0])["instances"]) == 1
    assert brief(bags[0], top_k=None) == expected
    assert classify([bags[0]]) == [expected]
    assert [answer["label"] for answer in classify([bag.tolist() for bag in bags])] == [answer["label"] for answer in classify(bags)]
    # Features saved with a leading axis, and nullable features.
    assert classify([bags[0][None], torch.from_numpy(bags[2])[None]]) == classify([bags[0], bags[2]])
    assert classify(frame.astype("Float64")) == expected
    assert classify(torch.from_numpy(bags[0]).to_sparse().requires_grad_()) == expected
    assert classify(bags[0], top_k=2)["instances"] == expected["instances"][:2]
    assert classify(np.zeros((0, 4)))["instances"] == []
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        classify(bags[0], top_k=0)
    with pytest.raises(ValueError, match="bag 0 has 3 features"):
        classify(np.zeros((2, 3)))


def test_padding_is_not_an_instance(tmp_path, bags):
    _, extractor = _save(tmp_path, bags)
    classify = pipeline(TASK, model=str(tmp_path))
    inputs = extractor(bags, return_tensors="pt")
    padded = {name: tensor[2:] for name, tensor in inputs.items()}
    answer = classify.postprocess(classify.forward(padded))
    assert sorted(instance["index"] for instance in answer["instances"]) == [0, 1, 2]


def test_a_model_with_one_label_answers_with_its_value(tmp_path, bags):
    model, extractor = _save(tmp_path, bags, num_labels=1)
    answer = pipeline(TASK, model=str(tmp_path))(bags[0])
    assert answer["score"] == pytest.approx(model(**extractor(bags[:1], return_tensors="pt")).logits.item(), rel=1e-5)


def test_several_labels(tmp_path, bags):
    model, extractor = _save(tmp_path, bags, num_labels=4, problem_type="multi_label_classification")
    classify = pipeline(TASK, model=str(tmp_path))
    scores = model(**extractor(bags[:1], return_tensors="pt")).logits[0].sigmoid()
    middle = scores.sort().values[1:3].mean().item()
    answer = classify(bags[0], threshold=middle)
    assert sorted(answer["label"]) == sorted(f"LABEL_{i}" for i in (scores >= middle).nonzero().flatten().tolist())
    assert answer["score"] == pytest.approx(sorted(scores[scores >= middle].tolist(), reverse=True), rel=1e-5)


SCRIPT = """
import sys
sys.modules["modeling_uhop"] = None
import json
import numpy as np
from transformers import pipeline

folder, again = sys.argv[1:]
bag = np.load(folder + "/bag.npy")
classify = pipeline("multiple-instance-classification", model=folder, trust_remote_code=True)
first = classify(bag)
classify.model.save_pretrained(again)
classify.feature_extractor.save_pretrained(again)
second = pipeline("multiple-instance-classification", model=again, trust_remote_code=True)(bag)
print(json.dumps([first, second]))
"""


def test_the_saved_pipeline_needs_no_package(tmp_path, bags):
    _save(tmp_path / "model", bags)
    np.save(tmp_path / "model" / "bag.npy", bags[0])
    finished = run_forked(SCRIPT, str(tmp_path / "model"), str(tmp_path / "again"), cwd="/")
    assert finished.returncode == 0, finished.stderr
    expected = pipeline(TASK, model=str(tmp_path / "model"))(bags[0])
    for answer in json.loads(finished.stdout.splitlines()[-1]):
        assert answer["label"] == expected["label"]
        assert answer["score"] == pytest.approx(expected["score"], rel=1e-6)
        assert [instance["index"] for instance in answer["instances"]] == [instance["index"] for instance in expected["instances"]]
