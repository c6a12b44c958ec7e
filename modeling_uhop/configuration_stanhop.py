"""STanHop model configuration"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .validation import check_at_least_one, check_dropouts, check_hopfield


@strict
class STanHopConfig(PreTrainedConfig):
    r"""
    Configuration of STanHop-Net (arXiv 2312.17346), a forecaster of multivariate series whose layers retrieve over time and over series,
    with the feature map of U-Hop (arXiv 2404.03827). Fields it shares with `PatchTSTConfig` mean what they mean there.

    Args:
        num_input_channels (`int`, defaults to 7): Number of series C.
        context_length (`int`, defaults to 168): Time steps L that are seen.
        prediction_length (`int`, defaults to 96): Time steps H that are predicted.
        patch_length (`int`, defaults to 12): Time steps in a patch; patches do not overlap. A window whose length is no multiple of it is
            continued to the left by its first value.
        num_hidden_layers (`int`, defaults to 1): Scales of the encoder: blocks, each but the first on patches merged `merge_window` by
            `merge_window`.
        merge_window (`int`, defaults to 2): How many neighbouring patches become one from a scale to the next.
        num_prototypes (`int`, defaults to 10): Learned prototypes that a position's series are pooled to.
        d_model (`int`, defaults to 256): Width of a patch.
        num_attention_heads (`int`, defaults to 4): Number of heads.
        ffn_dim (`int`, defaults to 512): Width inside the MLPs.
        activation_function (`str`, defaults to `"gelu"`): Activation of the MLPs.
        attention_dropout (`float`, defaults to 0.1): Dropout of association weights.
        ff_dropout (`float`, defaults to 0.1): Dropout of each sub-layer's output.
        norm_eps (`float`, defaults to 1e-5): Epsilon of layer norms.
        init_std (`float`, defaults to 0.02): Standard deviation of fresh prototypes.
        position_init_std (`float`, defaults to 1): Standard deviation of fresh position embeddings. The decoder has no other input at
            first: begun close to zero, its patches cannot be told apart.
        scaling (`str`, *optional*, defaults to `"std"`): How each window is scaled, and the forecast back: "std" (its mean and standard
            deviation), "mean" (its mean of absolute values), or `None`.
        minimum_scale (`float`, defaults to 1e-2): Least scale, in the units of the values; a constant window is divided by it.
        use_linear_skip (`bool`, defaults to `False`): Whether a linear map from the scaled window to the horizon, one for all series, is
            added to the forecast.
        memory_type (`str`, *optional*): What stored windows are for, beside `STanHopModel.recall`. The papers' equations of both are not
            available to us, and these are reconstructions. "plug": a window is completed by what it retrieves, with nothing learned,
            `LN(R + Sep_alpha(beta cos(R, Y)) Y)`. "tune": the futures of retrieved windows go through a linear map that is trained with the
            model, and are added to the forecast; train it on other windows than those stored and their neighbours, as a window that
            retrieves itself has its own future before it.
        num_memories (`int`, defaults to 0): Number of stored windows; `store` sets it.
        memory_beta (`float`, defaults to 12): Inverse temperature of their retrieval.
        memory_alpha (`float`, defaults to 1): Tsallis exponent in [1, 2] of their retrieval.
        loss (`str`, defaults to `"mse"`): "mse" or "mae", over observed future values in their own units.
        qkv_bias (`bool`, defaults to `True`): Whether query, key and value projections have a bias.
        alpha, learnable_alpha (default to 1.5 and `True`), beta, use_feature_map, feature_dim, feature_init, update_steps: The Hopfield
            layers, as in `UHopViTConfig`.
        value_source (`str`, defaults to `"projected_memory"`): As in `UHopViTConfig`; STanHop's values are W_V W_K Y.

    Raises:
        A validation error that names the field, its value and what is accepted.

    >>> from modeling_uhop import STanHopConfig, STanHopForPrediction

    >>> model = STanHopForPrediction(STanHopConfig(num_input_channels=3, context_length=48, prediction_length=24, d_model=32))
    >>> model.config.hidden_size
    32
    """

    model_type = "stanhop"
    attribute_map = {"hidden_size": "d_model", "attention_probs_dropout_prob": "attention_dropout"}

    num_input_channels: int = 7
    context_length: int = 168
    prediction_length: int = 96
    patch_length: int = 12
    num_hidden_layers: int = 1
    merge_window: int = 2
    num_prototypes: int = 10
    d_model: int = 256
    num_attention_heads: int = 4
    ffn_dim: int = 512
    activation_function: str = "gelu"
    attention_dropout: float | int = 0.1
    ff_dropout: float | int = 0.1
    norm_eps: float | int = 1e-5
    init_std: float | int = 0.02
    position_init_std: float | int = 1.0
    scaling: Literal["std", "mean"] | None = "std"
    minimum_scale: float | int = 1e-2
    use_linear_skip: bool = False
    memory_type: Literal["plug", "tune"] | None = None
    num_memories: int = 0
    memory_beta: float | int = 12.0
    memory_alpha: float | int = 1.0
    loss: Literal["mse", "mae"] = "mse"
    qkv_bias: bool = True
    alpha: float | int = 1.5
    learnable_alpha: bool = True
    beta: float | int | None = None
    use_feature_map: bool = True
    feature_dim: int | None = None
    feature_init: Literal["identity", "orthogonal", "normal"] = "orthogonal"
    update_steps: int = 1
    value_source: Literal["memory", "projected_memory"] = "projected_memory"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_hopfield()

    def validate_hopfield(self):
        """Ranges and combinations that types alone do not express."""
        check_at_least_one(self, "num_input_channels", "context_length", "prediction_length", "patch_length", "num_hidden_layers")
        check_at_least_one(self, "num_prototypes", "d_model", "num_attention_heads", "ffn_dim", "update_steps")
        if self.merge_window < 2 and self.num_hidden_layers > 1:
            raise ValueError(f"merge_window must be at least 2 where there are several scales, got {self.merge_window}")
        if self.activation_function not in ACT2FN:
            raise ValueError(f"activation_function must be one of {sorted(ACT2FN)}, got {self.activation_function!r}")
        check_dropouts(self, "attention_dropout", "ff_dropout")
        if self.num_memories < 0:
            raise ValueError(f"num_memories must be at least 0, got {self.num_memories}")
        if not 0 < self.memory_beta < float("inf"):
            raise ValueError(f"memory_beta must be positive and finite, got {self.memory_beta}")
        if not 1.0 <= self.memory_alpha <= 2.0:
            raise ValueError(f"memory_alpha must lie in [1, 2], got {self.memory_alpha}")
        if not self.minimum_scale > 0:
            raise ValueError(f"minimum_scale must be positive, got {self.minimum_scale}")
        check_hopfield(self)


__all__ = ["STanHopConfig"]
