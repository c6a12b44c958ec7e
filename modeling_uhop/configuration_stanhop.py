"""Configuration of the STanHop-Net forecasting model."""

import math
from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_hopfield import ACTIVATION, HopfieldLayersConfig, check_fields


@strict
class STanHopConfig(HopfieldLayersConfig):
    r"""Configuration of STanHop-Net, which forecasts series by retrieval over time and over series.

    The model is described in arXiv 2312.17346; its Hopfield layers use the feature map $\Phi$ of
    U-Hop (arXiv 2404.03827). Fields that also exist in `PatchTSTConfig` have the same meaning here.

    Args:
        num_input_channels (`int`, defaults to 7): Number of series C.
        context_length (`int`, defaults to 168): Length L of the input window, in time steps.
        prediction_length (`int`, defaults to 96): Horizon H, in time steps.
        patch_length (`int`, defaults to 12): Time steps per patch; patches do not overlap. If the
            window length is not a multiple of it, the window is extended to the left with its first
            value.
        num_hidden_layers (`int`, defaults to 1): Number of encoder blocks. Each block works at one
            scale: every block after the first receives patches that were merged in groups of
            `merge_window`.
        merge_window (`int`, defaults to 2): Number of neighbouring patches that are merged into one
            from one scale to the next.
        num_prototypes (`int`, defaults to 10): Number of learned prototypes that pool the series at
            one position.
        d_model (`int`, defaults to 256): Width of an embedded patch.
        num_attention_heads (`int`, defaults to 4): Number of attention heads.
        ffn_dim (`int`, defaults to 512): Hidden width of the MLPs.
        activation_function (`str`, defaults to `"gelu"`): Activation of the MLPs.
        attention_dropout (`float`, defaults to 0.1): Dropout of the association weights, in [0, 1).
        ff_dropout (`float`, defaults to 0.1): Dropout of the output of each sub-layer, in [0, 1).
        norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        init_std (`float`, defaults to 0.02): Standard deviation of newly initialized prototypes.
        position_init_std (`float`, defaults to 1): Standard deviation of newly initialized position
            embeddings. They are the only initial input of the decoder: if they start close to zero,
            its patches cannot be told apart.
        scaling (`str`, *optional*, defaults to `"std"`): How each window is scaled; the forecast is
            scaled back. "std": by its mean and standard deviation. "mean": by the mean of its
            absolute values. `None`: no scaling.
        minimum_scale (`float`, defaults to 1e-2): Smallest scale, positive, in the units of the
            values. A constant window is divided by it.
        use_linear_skip (`bool`, defaults to `False`): Whether a linear map from the scaled window
            to the horizon, shared by all series, is added to the forecast.
        cycle_length (`int`, *optional*): Number W of time steps of a learned cycle, such as 24 for the
            daily cycle of hourly values; `None` for no cycle. The cycle is subtracted from the scaled
            window before any retrieval, and added to the forecast (CycleNet, arXiv 2409.18479). The
            model then needs `cycle_index`. It cannot be combined with `memory_type`.
        memory_type (`str`, *optional*): How stored windows are used inside the model, in addition
            to `STanHopModel.recall`. The papers' equations for both modes are not available to us;
            these are reconstructions. "plug": the window is combined with what it retrieves,
            without any trained parameter: $\mathrm{LN}(R + \mathrm{Sep}_\alpha(\beta \cos(R, Y))
            Y)$. "tune": the futures of the retrieved windows pass through a linear map, trained
            with the model, and are added to the forecast. Train it on windows other than the stored
            ones and their neighbours, because a window that retrieves itself sees its own future.
        num_memories (`int`, defaults to 0): Number of stored windows; `store` sets it.
        memory_beta (`float`, defaults to 12): Inverse temperature for the retrieval of stored
            windows, positive.
        memory_alpha (`float`, defaults to 1): Tsallis exponent in [1, 2] for the retrieval of
            stored windows.
        loss (`str`, defaults to `"mse"`): "mse" or "mae", over the observed future values in their
            own units.
        channel_names (`list[str]`, *optional*): Names of the C series, which are the columns that
            `STanHopForPrediction.forecast` reads.
        mean (`list[float]`, *optional*): Mean of each series in the user's units. `forecast`
            subtracts it from the past, and adds it to the forecast. `None` means 0.
        std (`list[float]`, *optional*): Standard deviation of each series in the user's units,
            positive. `forecast` divides by it, and multiplies the forecast by it. `None` means 1.
        frequency (`str`, *optional*): Distance of two time steps as a frequency of pandas, such as
            "h" or "15min". `None` means that `forecast` infers it.
        alpha (`float`, defaults to 1.5): As in `HopfieldLayersConfig`.
        learnable_alpha (`bool`, defaults to `True`): As in `HopfieldLayersConfig`.
        value_source (`str`, defaults to `"projected_memory"`): As in `HopfieldLayersConfig`;
            STanHop uses $W_V W_K Y$.
        kwargs (Any): Further fields of the Hopfield layers: see `HopfieldLayersConfig`.

    Examples:
        >>> from modeling_uhop import STanHopConfig, STanHopForPrediction

        >>> model = STanHopForPrediction(STanHopConfig(num_input_channels=3, context_length=48, prediction_length=24, d_model=32))
        >>> model.config.hidden_size
        32
    """

    model_type = "stanhop"
    _auto_class = "AutoConfig"
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
    cycle_length: int | None = None
    memory_type: Literal["plug", "tune"] | None = None
    num_memories: int = 0
    memory_beta: float | int = 12.0
    memory_alpha: float | int = 1.0
    loss: Literal["mse", "mae"] = "mse"
    channel_names: list[str] | None = None
    mean: list[float | int] | None = None
    std: list[float | int] | None = None
    frequency: str | None = None
    alpha: float | int = 1.5
    learnable_alpha: bool = True
    value_source: Literal["memory", "projected_memory"] = "projected_memory"

    def validate_hopfield(self):
        """Check ranges and combinations of fields that the type annotations do not express."""
        super().validate_hopfield()
        check_fields(self, "be at least 1", "num_input_channels", "context_length", "prediction_length", "patch_length")
        check_fields(self, "be at least 1", "num_hidden_layers", "num_prototypes", "d_model", "num_attention_heads", "ffn_dim")
        check_fields(self, ACTIVATION, "activation_function")
        check_fields(self, "lie in [0, 1)", "attention_dropout", "ff_dropout")
        check_fields(self, "be at least 0", "num_memories")
        check_fields(self, "be at least 1", cycle_length="no cycle")
        if self.cycle_length is not None and self.memory_type is not None:
            raise ValueError(f"cycle_length={self.cycle_length} needs memory_type=None, got {self.memory_type!r}")
        check_fields(self, "be positive and finite", "memory_beta")
        check_fields(self, "lie in [1, 2]", "memory_alpha")
        if self.merge_window < 2 and self.num_hidden_layers > 1:
            raise ValueError(f"merge_window must be at least 2 if num_hidden_layers is above 1, got {self.merge_window}")
        if not self.minimum_scale > 0:
            raise ValueError(f"minimum_scale must be positive, got {self.minimum_scale}")
        for name in ("channel_names", "mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_input_channels:
                raise ValueError(f"{name} must have num_input_channels={self.num_input_channels} entries, got {len(values)}")
        if self.channel_names is not None and len(set(self.channel_names)) < len(self.channel_names):
            raise ValueError(f"channel_names must differ from each other, got {self.channel_names}")
        if self.mean is not None and not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if self.std is not None and not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std must be positive and finite, got {self.std}")


__all__ = ["STanHopConfig"]
