"""Metrics for classification.

Because `evaluate.load` needs the network, the metrics are subclasses of `evaluate.Metric` here.
"""

from collections.abc import Callable, Sequence

import datasets
import evaluate
import numpy as np
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """The fraction of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The fraction of predictions that equal their reference.",
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The accuracy of a classifier, as `compute_metrics` of a Trainer; the prediction is the class
    with the largest logit."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return Accuracy().compute(predictions=np.argmax(logits, axis=-1), references=prediction.label_ids) or {}


class RocAuc(evaluate.Metric):
    """Area under the ROC curve of the scores for the positive class.

    With more than two classes, it is the mean over classes of one class against the rest.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Area under the ROC curve.",
            citation="",
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        scores = np.asarray(predictions)
        scores = scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else softmax(scores, axis=1)
        return {"auc": float(roc_auc_score(references, scores, multi_class="ovr"))}


class F1(evaluate.Metric):
    """F1 score of the positive class; with average="macro", the mean F1 score over classes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 score.",
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, average: str = "binary") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0.0))}


BAG_METRICS = ("auc", "accuracy", "f1")


def bag_metrics(logits: np.ndarray, labels: np.ndarray, names: Sequence[str] = BAG_METRICS) -> dict[str, float]:
    """Metrics of logits (bags, classes) by name; a `ValueError` for an unknown name."""
    unknown = set(names) - set(BAG_METRICS)
    if unknown:
        raise ValueError(f"metrics must be among {BAG_METRICS}, got {sorted(unknown)[0]!r}")
    metrics: dict[str, Callable[[], dict[str, float] | None]] = {
        "auc": lambda: RocAuc().compute(predictions=logits, references=labels),
        "accuracy": lambda: Accuracy().compute(predictions=logits.argmax(-1), references=labels),
        "f1": lambda: F1().compute(predictions=logits.argmax(-1), references=labels, average="binary" if logits.shape[1] == 2 else "macro"),
    }
    return {name: (metrics[name]() or {})[name] for name in names}
