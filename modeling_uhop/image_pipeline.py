"""The pipeline "image-classification" for images of every PIL mode."""

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
    """Image classification pipeline that converts images to RGB with `as_rgb` for UHopViT.

    Other models get what the pipeline of transformers passes to them. Accepted images are those of
    transformers: a PIL image, a path, a URL, or base64. Arrays and tensors go to the image
    processor unchanged.
    """

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]
        """Prepare one image; for a U-Hop vision transformer, convert it to RGB first."""
        if self.model.config.model_type == OURS and not isinstance(image, (np.ndarray, torch.Tensor)):
            image = _as_rgb(image, timeout)
        return super().preprocess(image, timeout=timeout)


def _as_rgb(image: Any, timeout: float | None) -> Any:
    """Convert an image that `load_image` of transformers can read to RGB.

    An input that cannot be opened is returned unchanged, so that transformers raises its own error.
    """
    # Because the package can be imported without Pillow, we import it only here.
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
    """File or byte stream of an image that is given as a URL, a path or base64."""
    if image.startswith(("http://", "https://")):
        return io.BytesIO(httpx.get(image, timeout=timeout, follow_redirects=True).content)
    return image if os.path.isfile(image) else io.BytesIO(base64.decodebytes(image.rpartition(",")[2].encode()))


def register() -> None:
    """Make `pipeline("image-classification")` use this class."""
    # Because `register_pipeline` would warn that the task is already known, we set the entry
    # directly.
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = UHopImageClassificationPipeline


__all__ = ["UHopImageClassificationPipeline"]
