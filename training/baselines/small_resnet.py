"""Baseline classifier of small images: the residual network of He et al. for CIFAR-10.

A saved folder carries a copy of this file, so it imports only torch and transformers.
"""

from typing import Any

import torch
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.models.resnet.modeling_resnet import ResNetConvLayer


class SmallResNetConfig(ResNetConfig):
    """Configuration of a `SmallResNetForImageClassification`; its fields are those of `ResNetConfig`."""

    model_type = "small_resnet"
    _auto_class = "AutoConfig"


class SmallResNetForImageClassification(ResNetForImageClassification):
    """ResNet for images of about 32 pixels (arXiv 1512.03385, section 4.2).

    It begins with one 3 x 3 convolution at full size, and not with the stem for large images, which
    reduces an image to a quarter of its sides.
    """

    config_class = SmallResNetConfig
    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: SmallResNetConfig):
        super().__init__(config)
        stem = ResNetConvLayer(config.num_channels, config.embedding_size, kernel_size=3, activation=config.hidden_act)
        self.resnet.add_module("embedder", stem)
        self.post_init()


def resnet_of_size(num_parameters: int, **fields) -> SmallResNetConfig:
    """Return the configuration of the ResNet-(6n + 2) whose number of parameters is closest to the given one.

    Its three stages have n blocks each, and 16, 32 and 64 channels, as in the paper.

    Args:
        num_parameters: Number of parameters.
        fields (Any): Further fields of `ResNetConfig`, such as id2label.
    """

    def distance(blocks: int) -> int:
        with torch.device("meta"):
            return abs(SmallResNetForImageClassification(config(blocks)).num_parameters() - num_parameters)

    def config(blocks: int) -> SmallResNetConfig:
        sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [blocks] * 3, "layer_type": "basic"}
        return SmallResNetConfig(**sizes, **fields)

    # Because each block adds parameters, the distance falls to its minimum and then rises.
    blocks = 1
    while distance(blocks + 1) < distance(blocks):
        blocks += 1
    return config(blocks)
