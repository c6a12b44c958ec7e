"""The pipeline "multiple-instance-classification": classify bags, with instance weights."""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .bag_arrays import is_one_bag


TASK = "multiple-instance-classification"


class MultipleInstanceClassificationPipeline(Pipeline):
    """Pipeline that classifies bags and reports the weight of each instance.

    A bag is an array (instances, features), an array of images (instances, channels, height,
    width), or a DataFrame. Call the pipeline with one bag or with a list of bags. It returns a
    dictionary for each bag:

    - `label` and `score`: the most likely class. With "multi_label_classification" these are lists
      of all classes with a score of at least `threshold`. For a model with one label, `score` is
      its value, without an activation.
    - `instances`: `{"index": i, "weight": w}` for each instance, largest weight first, limited to
      `top_k` instances.

    A call, or `pipeline(...)`, accepts these arguments:

    - `top_k`: number of instances to report, at least 1; `None` for all.
    - `threshold`: smallest score for "multi_label_classification", 0.5 by default.

    The weights say from which instances the model retrieved, averaged over heads. They do not prove
    a cause, because other instances may carry the same evidence.
    """

    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = True
    _load_tokenizer: Any = False

    def _sanitize_parameters(self, **kwargs):
        given = {name: kwargs[name] for name in ("top_k", "threshold") if name in kwargs}
        if given.get("top_k") is not None and given["top_k"] < 1:
            raise ValueError(f"top_k must be at least 1, or None for all instances, got {given['top_k']}")
        return {}, {}, given

    def __call__(self, inputs: Any, *args, **kwargs) -> Any:
        # Because a pipeline treats a list as several inputs, we first check whether a list or an
        # array is a single bag.
        if not isinstance(inputs, (list, np.ndarray, torch.Tensor)):
            return super().__call__(inputs, *args, **kwargs)
        extractor: Any = self.feature_extractor
        if is_one_bag(inputs, vectors=extractor.takes_vectors):
            return super().__call__([inputs], *args, **kwargs)[0]
        return super().__call__(list(inputs), *args, **kwargs)

    def preprocess(self, input_: Any, **preprocess_parameters) -> Any:
        """Transform one bag with the feature extractor."""
        extractor: Any = self.feature_extractor
        return extractor([input_], return_tensors="pt")

    def _forward(self, input_tensors: Any, **forward_parameters) -> Any:
        outputs = self.model(**input_tensors)
        return {"logits": outputs.logits, "weights": outputs.instance_weights, "attention_mask": input_tensors["attention_mask"]}

    def postprocess(  # type: ignore[override]
        self, model_outputs: Any, top_k: int | None = None, threshold: float = 0.5, **postprocess_parameters
    ) -> dict[str, Any]:
        """Turn logits and weights of one bag into label, score and instances."""
        names: dict[int, str] = self.model.config.id2label  # type: ignore[assignment]
        logits = model_outputs["logits"][0].float()
        weights = model_outputs["weights"][0][model_outputs["attention_mask"][0].bool()].float()
        order = weights.argsort(descending=True, stable=True)[:top_k].tolist()
        instances = [{"index": index, "weight": weights[index].item()} for index in order]
        if self.model.config.problem_type == "multi_label_classification":
            scores = logits.sigmoid()
            found = [index for index in scores.argsort(descending=True).tolist() if scores[index] >= threshold]
            return {"label": [names[i] for i in found], "score": [scores[i].item() for i in found], "instances": instances}
        if len(logits) == 1:
            return {"label": names[0], "score": logits.item(), "instances": instances}
        scores = logits.softmax(-1)
        best = int(scores.argmax())
        return {"label": names[best], "score": scores[best].item(), "instances": instances}


def register() -> None:
    """Make `pipeline("multiple-instance-classification")` known to transformers."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, pipeline_class=MultipleInstanceClassificationPipeline, pt_model=AutoModelForSequenceClassification, type="multimodal"
        )


__all__ = ["MultipleInstanceClassificationPipeline"]
