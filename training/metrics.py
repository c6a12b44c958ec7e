"""Metrics as `evaluate.Metric`s that live here: `evaluate.load` would need the network."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of a classifier: accuracy of the largest logit."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return Accuracy().compute(predictions=np.argmax(logits, axis=-1), references=prediction.label_ids) or {}
