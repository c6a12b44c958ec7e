"""The pipeline "image-classification", with pictures of every mode for the models of this package."""

import base64
import io
import os
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from transformers import ImageClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY


TASK, OURS = "image-classification", "uhop_vit"


class UHopImageClassificationPipeline(ImageClassificationPipeline):
    """Transformers' own pipeline, except that a UHopViT gets each picture through `as_rgb`; other models get what they always do.

    Pictures are those of transformers: a PIL image, a path, a URL, or base64. Arrays and tensors go to the processor as they are.
    """

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]
        if self.model.config.model_type == OURS and not isinstance(image, (np.ndarray, torch.Tensor)):
            image = _as_rgb(image, timeout)
        return super().preprocess(image, timeout=timeout)


def _as_rgb(image: Any, timeout: float | None) -> Any:
    """A picture that `load_image` of transformers reads, in RGB; what it refuses is left for it to refuse."""
    # The package is imported without Pillow, too.
    from PIL import Image

    from .images import as_rgb

    if isinstance(image, Image.Image):
        return as_rgb(image)
    try:
        opened = Image.open(_file(image, timeout))
    except Exception:
        return image
    with opened:
        return as_rgb(opened)


def _file(image: str, timeout: float | None) -> Any:
    if image.startswith(("http://", "https://")):
        return io.BytesIO(httpx.get(image, timeout=timeout, follow_redirects=True).content)
    return image if os.path.isfile(image) else io.BytesIO(base64.decodebytes(image.rpartition(",")[2].encode()))


def register() -> None:
    """Let `pipeline("image-classification")` be this one."""
    # `register_pipeline` would warn that the task is known.
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = UHopImageClassificationPipeline


__all__ = ["UHopImageClassificationPipeline"]
