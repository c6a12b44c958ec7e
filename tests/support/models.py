"""Sizes of the tiny models: fields of the configurations of each family. A test adds what it is about."""

from typing import Any


# With the usual standard deviation of 0.02, attention would be uniform for all settings.
IMAGES: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}
# A vision transformer for small data sets.
COMPACT: dict[str, Any] = {
    "patch_embedding": "conv",
    "pooling": "hopfield",
    "learnable_beta": True,
    "mask_diagonal": True,
    "attention_init": "mimetic",
}
BAGS: dict[str, Any] = {
    "instance_dim": 6,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 1.0,
}
SERIES: dict[str, Any] = {
    "num_input_channels": 3,
    "context_length": 24,
    "prediction_length": 6,
    "patch_length": 6,
    "d_model": 16,
    "ffn_dim": 24,
}
