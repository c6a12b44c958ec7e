"""STanHop-Net: a PyTorch model that forecasts series by retrieval over time and over series."""

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SampleTSPredictionOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checks import check_tensor, check_tensors
from .configuration_stanhop import STanHopConfig
from .hopfield import MLP, HopfieldAttention
from .modeling_hopfield import HopfieldPreTrainedModel
from .precision import is_finite, is_readable
from .series_frame import FrameWindow
from .series_memory import STanHopWindowMemory
from .series_window import ScaledWindow, forecast_loss


@dataclass
class STanHopModelOutput(ModelOutput):
    """What the encoder of STanHop-Net returns for a batch of B windows of C series.

    Attributes:
        last_hidden_state: (B, C, patches, d_model), the coarsest scale.
        scales: The embedded patches, then each scale, (B, C, patches of the scale, d_model).
        hidden_states: The same tensors, if hidden states were requested.
        attentions: Association weights of every Hopfield layer in the order of computation. For
            each block: over time (B C, H, P, P), of the prototypes (B P, H, num_prototypes, C), and
            over series (B P, H, C, num_prototypes).
        loc: (B, 1, C), the location that was subtracted from the window.
        scale: (B, 1, C), the scale that the window was divided by.
        scaled_values: (B, L, C), the scaled window minus its cycle, if the model has one; zeros where a
            value was not observed.
    """

    last_hidden_state: torch.Tensor | None = None
    scales: tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    loc: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    scaled_values: torch.Tensor | None = None


@dataclass
class STanHopForPredictionOutput(ModelOutput):
    """Forecasts of STanHop-Net for a batch of B windows of C series over a horizon of H steps.

    Attributes:
        loss: A scalar, if future values are given.
        prediction_outputs: (B, H, C), in the units of the past values. The dtype is that of the
            past values and at least fp32, because these values may be far from zero.
        hidden_states: As in `STanHopModelOutput`.
        attentions: As in `STanHopModelOutput`.
        decoder_attentions: Association weights of the decoder layers: first those of the block,
            then those of the retrieval from a scale of the encoder, (B C, H, output patches,
            patches of the scale).
        loc: As in `STanHopModelOutput`.
        scale: As in `STanHopModelOutput`.
    """

    loss: torch.Tensor | None = None
    prediction_outputs: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    loc: torch.Tensor | None = None
    scale: torch.Tensor | None = None


@dataclass
class STanHopDecoderOutput(ModelOutput):
    """What the decoder of STanHop-Net returns.

    Attributes:
        forecast: (B, H, C), in the units of the scaled window.
        attentions: As `decoder_attentions` of `STanHopForPredictionOutput`.
    """

    forecast: torch.Tensor | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class STanHopRetrieval(nn.Module):
    r"""Post-norm sub-block: states retrieve from memories, then an MLP follows.

    $$
    X' = \mathrm{LN}(X + \mathrm{GSH}(X, Y)), \qquad
    \mathrm{output} = \mathrm{LN}(X' + \mathrm{MLP}(X'))
    $$

    GSH is the Hopfield layer with states $X$ and memories $Y$.
    """

    def __init__(self, config: STanHopConfig):
        super().__init__()
        self.attention = HopfieldAttention(config)
        self.mlp = MLP(config.d_model, config.ffn_dim, config.activation_function)
        self.layernorm_retrieved = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.layernorm_mlp = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.ff_dropout)

    def forward(self, states: torch.Tensor, memories: torch.Tensor, **kwargs) -> torch.Tensor:
        retrieved, _ = self.attention(states, memories, **kwargs)
        states = self.layernorm_retrieved(states + self.dropout(retrieved))
        return self.layernorm_mlp(states + self.dropout(self.mlp(states)))


class STanHopBlock(GradientCheckpointingLayer):
    """Encoder block: retrieval over time (TimeGSH), then over series (SeriesGSH).

    States (B, C, P, d_model) keep their shape.

    Over time, each series retrieves from its own patches; all series share the weights. Over
    series, a few learned queries (the prototypes) retrieve from the C patches at one position. The
    C patches then retrieve from these pooled prototypes.
    """

    def __init__(self, config: STanHopConfig):
        super().__init__()
        self.time = STanHopRetrieval(config)
        self.prototypes = nn.Parameter(torch.empty(1, config.num_prototypes, config.d_model))
        self.pooling = HopfieldAttention(config)
        self.series = STanHopRetrieval(config)

    def over_time(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Retrieve over time: each series from its own patches."""
        patches = hidden_states.flatten(0, 1)
        return self.time(patches, patches, **kwargs).unflatten(0, (-1, hidden_states.shape[1]))

    def over_series(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Retrieve over series: at each position, from what the prototypes retrieve."""
        series = hidden_states.transpose(1, 2).flatten(0, 1)
        pooled, _ = self.pooling(self.prototypes.expand(series.shape[0], -1, -1), series, **kwargs)
        return self.series(series, pooled, **kwargs).unflatten(0, (-1, hidden_states.shape[2])).transpose(1, 2)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.over_series(self.over_time(hidden_states, **kwargs), **kwargs)


class STanHopCoarseGraining(nn.Module):
    """Merge `merge_window` neighbouring patches into one.

    If the last group is incomplete, it is filled with the last patches.
    """

    def __init__(self, config: STanHopConfig):
        super().__init__()
        self.window = config.merge_window
        self.layernorm = nn.LayerNorm(self.window * config.d_model, eps=config.norm_eps)
        self.dense = nn.Linear(self.window * config.d_model, config.d_model)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        missing = -hidden_states.shape[2] % self.window
        if missing > 0:
            # Because the last group is incomplete, the last patches are repeated; if there are too
            # few, the very last one.
            order = torch.arange(hidden_states.shape[2] + missing, device=hidden_states.device)
            order = torch.where(order < hidden_states.shape[2], order, order - missing).clamp(max=hidden_states.shape[2] - 1)
            hidden_states = hidden_states[:, :, order]
        return self.dense(self.layernorm(hidden_states.unflatten(2, (-1, self.window)).flatten(3)))


class STanHopDecoderLayer(GradientCheckpointingLayer):
    """Decoder layer: output patches pass a block, then retrieve from one encoder scale.

    A linear head gives the contribution of this scale to the forecast.
    """

    def __init__(self, config: STanHopConfig):
        super().__init__()
        self.block = STanHopBlock(config)
        self.cross = STanHopRetrieval(config)
        self.head = nn.Linear(config.d_model, config.patch_length)

    def forward(self, hidden_states: torch.Tensor, encoded: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output patches (B, C, Q, d_model) and their values (B, C, Q * patch_length)."""
        hidden_states = self.block(hidden_states, **kwargs)
        crossed = self.cross(hidden_states.flatten(0, 1), encoded.flatten(0, 1), **kwargs)
        hidden_states = crossed.unflatten(0, (-1, hidden_states.shape[1]))
        return hidden_states, self.head(hidden_states).flatten(2)


class STanHopSkip(nn.Linear):
    """Linear map that is added to the forecast and starts at zero.

    It starts at zero because training would leave random initial weights unchanged in directions in
    which windows hardly vary.
    """


class STanHopCycle(nn.Module):
    r"""A learned cycle $Q$ of W time steps for each series (CycleNet, arXiv 2409.18479).

    With the backbone $g$, the window $x$ and the position $t \bmod W$ of each step, the model computes

    $$
    x'_t = x_t - Q_{t \bmod W}, \qquad \bar{x}_t = g(x')_t + Q_{t \bmod W} .
    $$

    The cycle starts at zero.
    """

    def __init__(self, config: STanHopConfig):
        super().__init__()
        self.table = nn.Parameter(torch.empty(cast(int, config.cycle_length), config.num_input_channels))

    def forward(self, cycle_index: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """The cycle (B, count, C) at the steps `first`, `first` + 1, ... of windows.

        Args:
            cycle_index: (B,), the position of the first step of each window, modulo W.
            first: The first step, counted from the beginning of the window.
            count: Number of steps.
        """
        steps = first + torch.arange(count, device=self.table.device)
        return self.table[(cycle_index.to(self.table.device).unsqueeze(1) + steps) % len(self.table)]


class STanHopPreTrainedModel(HopfieldPreTrainedModel):
    """Base class of the STanHop models: initialization, loading and saving."""

    config: STanHopConfig
    base_model_prefix = "model"
    main_input_name = "past_values"
    read_at_each_call = (
        *HopfieldPreTrainedModel.read_at_each_call,
        *("attention_dropout", "memory_alpha", "memory_beta", "loss"),
        *("channel_names", "mean", "std", "frequency"),
    )
    _auto_classes = {
        "AutoConfig": "configuration_stanhop.STanHopConfig",
        "AutoModel": "modeling_stanhop.STanHopModel",
        "AutoModelForTimeSeriesPrediction": "modeling_stanhop.STanHopForPrediction",
    }
    input_modalities = ["time"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # Because the loss is a mean over observed values, `num_items_in_batch` has no use.
    accepts_loss_kwargs = False
    _no_split_modules = ["STanHopBlock", "STanHopDecoderLayer"]
    _input_embed_layer = "patch_embedding"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, STanHopWindowMemory):
            module.reset_parameters()
        elif isinstance(module, STanHopSkip):
            init.zeros_(module.weight)
        elif isinstance(module, STanHopCycle):
            init.zeros_(module.table)
        elif isinstance(module, nn.Linear):
            # Because the authors' code does the same, we use PyTorch's default scale.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, STanHopBlock):
            init.normal_(module.prototypes, mean=0.0, std=self.config.init_std)
        elif isinstance(module, (STanHopModel, STanHopDecoder)):
            init.normal_(module.position_embeddings, mean=0.0, std=self.config.position_init_std)


class STanHopModel(STanHopPreTrainedModel):
    r"""Encoder of STanHop-Net: a window of C series to patches at several scales.

    The Hopfield layers compute equation 3.1 of U-Hop (arXiv 2404.03827),
    $\mathrm{Sep}_\alpha[\beta\, (W_Q \Phi(X)) (W_K \Phi(Y))^\top]\, V$.

    Args:
        config: The configuration. The model keeps a copy of it.
    """

    _auto_class = "AutoModel"
    _can_record_outputs = {"hidden_states": STanHopBlock, "attentions": HopfieldAttention}

    def __init__(self, config: STanHopConfig):
        # Because `store` updates num_memories and several models may be built from one
        # configuration, each model keeps its own copy.
        config = copy.deepcopy(config)
        super().__init__(config)
        self.num_patches = math.ceil(config.context_length / config.patch_length)
        self.memory = STanHopWindowMemory(config)
        self.cycle = STanHopCycle(config) if config.cycle_length is not None else None
        self.patch_embedding = nn.Linear(config.patch_length, config.d_model)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_input_channels, self.num_patches, config.d_model))
        self.layernorm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        scales = range(config.num_hidden_layers)
        self.blocks = nn.ModuleList([STanHopBlock(config) for _ in scales])
        self.mergers = nn.ModuleList([STanHopCoarseGraining(config) for _ in scales[1:]])
        self.post_init()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        """Resize the stored windows to the number that the checkpoint holds, then load it.

        If the checkpoint has the encoder but no windows, none are stored afterwards.
        """
        given = {name: state_dict.get(f"{prefix}memory.{name}") for name in ("pasts", "futures")}
        sizes = {name: tuple(tensor.shape) for name, tensor in given.items() if tensor is not None}
        count = max((shape[1] for shape in sizes.values() if len(shape) == 3), default=0)
        shapes = self.memory.shapes(count)
        if sizes == shapes or (not sizes and f"{prefix}position_embeddings" in state_dict):
            self.memory.resize(count, self.dtype, self.device)
            self.config.num_memories = count
        elif self.config.num_memories == 0:
            errors += [
                f"size mismatch for {prefix}memory.{name}: copying a param with shape {torch.Size(shape)} from checkpoint, "
                f"the shape in current model is {torch.Size(shapes[name])}."
                for name, shape in sizes.items()
                if shape != shapes[name]
            ]
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        past_values: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        cycle_index: torch.Tensor | None = None,
        **kwargs,
    ) -> STanHopModelOutput:
        """Encode windows at every scale.

        Args:
            past_values: (B, context_length, num_input_channels).
            past_observed_mask: The same shape, 1 where a value was observed. The other values have
                no influence and may be NaN. `None` means that all values except NaN were observed.
            cycle_index: (B,), integers: the position of the first step of each window in the cycle,
                modulo `cycle_length`. A model without a cycle takes none.
            kwargs (Any): Options of transformers, such as `output_attentions` and
                `output_hidden_states`.

        Returns:
            The patches at every scale, and how the window was scaled.

        Raises:
            TypeError: If an input is not a tensor.
            ValueError: If `past_values` is missing, has a wrong shape, or (on CPU) is infinite
                where it was observed; or if the scaled values are infinite in the dtype of the
                model.
        """
        window = self.without_cycle(self.scaled(past_values, past_observed_mask), cycle_index)
        hidden_states = self.embed(window.values)
        if self.config.scaling is None and is_readable(window.values) and window.values.numel() > 0:
            # Because layer norms square their input, it must be far below the largest number of its
            # dtype.
            largest = window.values.abs().max().item()
            if largest > torch.finfo(hidden_states.dtype).max ** 0.5 / 100 > 100 or not is_finite(hidden_states):
                raise ValueError(
                    f"without scaling, past_values must be small enough for layer norms in {hidden_states.dtype}, got values up to "
                    f"{largest:.4g}; use scaling='std' or scaling='mean'"
                )
        scales = [hidden_states]
        for index, block in enumerate(self.blocks):
            if index > 0:
                hidden_states = self.mergers[index - 1](hidden_states)
            hidden_states = block(hidden_states, **kwargs)
            scales.append(hidden_states)
        return STanHopModelOutput(
            last_hidden_state=hidden_states, scales=tuple(scales), loc=window.loc, scale=window.scale, scaled_values=window.values
        )

    def scaled(self, past_values: torch.Tensor | None, past_observed_mask: torch.Tensor | None) -> ScaledWindow:
        """Check and scale windows; the arguments and errors are those of `forward`."""
        self.check_configuration()
        return ScaledWindow.of(past_values, past_observed_mask, self.config, self.dtype)

    def without_cycle(self, window: ScaledWindow, cycle_index: torch.Tensor | None) -> ScaledWindow:
        """Subtract the learned cycle, if the model has one, where values were observed.

        Raises:
            TypeError: If `cycle_index` is not a tensor.
            ValueError: If it is missing or not needed, or not B integers.
        """
        if self.cycle is None:
            if cycle_index is not None:
                raise ValueError("cycle_index is given, but the model has no cycle (cycle_length is None)")
            return window
        batch, length, _ = window.values.shape
        check_tensor(cycle_index, "cycle_index")
        if cycle_index is None or cycle_index.shape != (batch,) or cycle_index.is_floating_point():
            given = None if cycle_index is None else f"{cycle_index.dtype} of shape {tuple(cycle_index.shape)}"
            raise ValueError(
                f"cycle_index must be B={batch} integers, the position of each window's first step in the cycle of "
                f"{self.config.cycle_length} steps, got {given}"
            )
        cycle = self.cycle(cycle_index, 0, length)
        return window._replace(values=(window.values - cycle) * window.observed)

    @torch.no_grad()
    def store(self, past_values: torch.Tensor, future_values: torch.Tensor) -> None:
        """Replace the stored windows by new ones.

        Each window is scaled by its own past. Missing future values count as the location of the
        window. A series is never retrieved if its past was not observed. The same holds for a
        constant past if windows are scaled by standard deviation, because it does not determine the
        scale of the future.

        Args:
            past_values: (M, context_length, C), NaN where a value was not observed.
            future_values: (M, prediction_length, C), what followed; NaN where a value was not
                observed.

        Raises:
            TypeError: If an input is not a tensor.
            ValueError: As `forward`; also if there is no window, or if futures have a wrong shape
                or are infinite.
        """
        check_tensors(past_values=past_values, future_values=future_values)
        expected = (len(past_values), self.config.prediction_length, self.config.num_input_channels)
        if len(past_values) == 0 or future_values.shape != expected:
            given = f"got {len(past_values)} windows and futures {tuple(future_values.shape)}"
            raise ValueError(f"store needs at least one window, and future_values of shape (M, prediction_length, C) = {expected}, {given}")
        if bool(future_values.isinf().any()):
            raise ValueError("future_values must be finite, or NaN where they were not observed, got infinite values")
        past_values, centred = past_values.to(self.device), self.config.scaling == "std"
        window = self.scaled(past_values, None)
        varies = window.varies(centred)
        lost = ~varies & window.varied(past_values, centred)
        if lost.any():
            warnings.warn(
                f"{int(lost.sum())} series of the windows become constant in {self.dtype} when scaled by at least "
                f"minimum_scale={self.config.minimum_scale}, and are never retrieved; (window, series): {lost.nonzero().tolist()[:10]}",
                stacklevel=3,
            )
        self.memory.store(window.values.masked_fill(~varies.unsqueeze(1), 0.0), window.future(future_values, varies))
        self.config.num_memories = len(past_values)

    @torch.no_grad()
    def recall(self, past_values: torch.Tensor, past_observed_mask: torch.Tensor | None = None) -> torch.Tensor:
        r"""Forecast without training, from what followed similar stored windows.

        The weights of the stored windows are $\mathrm{Sep}_\alpha(\beta \cos(R, Y))$, with
        `memory_alpha` and `memory_beta`.

        Args:
            past_values: As in `forward`.
            past_observed_mask: As in `forward`.

        Returns:
            A forecast (B, prediction_length, C), in the units of the past values.

        Raises:
            ValueError: If no window that can be retrieved is stored; also as `forward`.
        """
        if self.config.num_memories == 0 or not self.memory.pasts.any():
            raise ValueError("no window is stored: call store(past_values, future_values) first")
        window = self.scaled(past_values, past_observed_mask)
        return window.in_units(self.memory(window.values)[1])

    def _sizes(self) -> dict[str, int]:
        if "memory" not in self._modules:
            return {}
        return {"num_memories": 0 if self.memory.pasts is None else self.memory.pasts.shape[1]}

    def embed(self, scaled: torch.Tensor) -> torch.Tensor:
        """Embed a scaled window (B, L, C) as patches (B, C, num_patches, d_model)."""
        series = scaled.transpose(1, 2)
        if self.config.memory_type == "plug" and self.config.num_memories > 0:
            completed = scaled + self.memory(scaled)[0]
            series = nn.functional.layer_norm(completed.transpose(1, 2), (self.config.context_length,), eps=self.config.norm_eps)
        missing = self.num_patches * self.config.patch_length - series.shape[-1]
        if missing > 0:
            series = torch.cat([series[..., :1].expand(-1, -1, missing), series], dim=-1)
        patches = series.unflatten(-1, (self.num_patches, self.config.patch_length))
        return self.layernorm(self.patch_embedding(patches) + self.position_embeddings)


class STanHopDecoder(STanHopPreTrainedModel):
    """Decoder of STanHop-Net: output patches retrieve from one scale of the encoder after another.

    The output patches start as position embeddings.

    Args:
        config: The configuration.
    """

    _can_record_outputs = {"attentions": HopfieldAttention}

    def __init__(self, config: STanHopConfig):
        super().__init__(config)
        num_patches = math.ceil(config.prediction_length / config.patch_length)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_input_channels, num_patches, config.d_model))
        self.layers = nn.ModuleList([STanHopDecoderLayer(config) for _ in range(config.num_hidden_layers + 1)])
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, scales: tuple[torch.Tensor, ...], **kwargs) -> STanHopDecoderOutput:
        """Forecast, in the units of the scaled window.

        Args:
            scales: The num_hidden_layers + 1 scales of the encoder.
            kwargs (Any): Options of transformers, such as `output_attentions`.

        Returns:
            The forecast (B, prediction_length, num_input_channels).
        """
        hidden_states = self.position_embeddings.expand(scales[0].shape[0], -1, -1, -1)
        forecast = None
        for layer, encoded in zip(self.layers, scales, strict=True):
            hidden_states, part = layer(hidden_states, encoded, **kwargs)
            forecast = part if forecast is None else forecast + part
        return STanHopDecoderOutput(forecast=cast(torch.Tensor, forecast)[..., : self.config.prediction_length].transpose(1, 2))


class STanHopForPrediction(STanHopPreTrainedModel):
    """STanHop-Net for forecasting: an encoder, and a decoder that retrieves from each scale.

    A linear skip (`use_linear_skip`) and the futures of stored windows (`memory_type="tune"`) can
    be added to the forecast.

    Args:
        config: The configuration. The model keeps a copy of it.

    Examples:
        >>> from modeling_uhop import STanHopConfig, STanHopForPrediction

        >>> config = STanHopConfig(num_input_channels=2, context_length=24, prediction_length=12, d_model=16, ffn_dim=16)
        >>> model = STanHopForPrediction(config)
        >>> past = torch.randn(3, 24, 2)
        >>> past[0, :5, 1] = float("nan")
        >>> model.generate(past).sequences.shape
        torch.Size([3, 1, 12, 2])
    """

    _auto_class = "AutoModelForTimeSeriesPrediction"
    # The first decoder block retrieves from the position embeddings, before it sees the window.
    _shared_memories = ("decoder.layers.0.block.",)

    def __init__(self, config: STanHopConfig):
        super().__init__(config)
        self.model = STanHopModel(config)
        # Because the encoder updates num_memories in its configuration, all parts share that
        # configuration.
        self.config = config = self.model.config
        self.remember_configuration()
        self.decoder = STanHopDecoder(config)
        self.linear_skip = STanHopSkip(config.context_length, config.prediction_length) if config.use_linear_skip else None
        tuned = config.memory_type == "tune"
        self.memory_head = STanHopSkip(config.prediction_length, config.prediction_length, bias=False) if tuned else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        future_values: torch.Tensor | None = None,
        future_observed_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        cycle_index: torch.Tensor | None = None,
        **kwargs,
    ) -> STanHopForPredictionOutput:
        """Forecast windows.

        Args:
            past_values: As in `STanHopModel.forward`.
            past_observed_mask: As in `STanHopModel.forward`.
            future_values: (B, prediction_length, num_input_channels), the targets of the loss.
            future_observed_mask: The same shape, 1 where a value was observed; `None` means that
                all values except NaN were observed. The other values do not count in the loss; if
                none was observed, the loss is 0.
            return_loss: Whether to compute the loss if future values are given. The Trainer expects
                an argument of this name.
            cycle_index: As in `STanHopModel.forward`.
            kwargs (Any): Options of transformers, such as `output_attentions` and
                `output_hidden_states`.

        Returns:
            The forecast (B, prediction_length, num_input_channels), and the loss if future values
                are given.

        Raises:
            TypeError: If an input is not a tensor.
            ValueError: As `STanHopModel.forward`; also if future values or a mask have a wrong
                shape, or (on CPU) if future values are infinite where they were observed.
        """
        self.check_configuration()
        outputs: Any = self.model(past_values, past_observed_mask, cycle_index, return_dict=True, **kwargs)
        decoded: Any = self.decoder(outputs.scales, return_dict=True, **kwargs)
        window, forecast = ScaledWindow(outputs.scaled_values, outputs.loc, outputs.scale), decoded.forecast
        if self.linear_skip is not None:
            forecast = forecast + self.linear_skip(window.values.transpose(1, 2)).transpose(1, 2)
        if self.memory_head is not None and self.config.num_memories > 0:
            forecast = forecast + self.memory_head(self.model.memory(window.values)[1].transpose(1, 2)).transpose(1, 2)
        if self.model.cycle is not None:
            forecast = forecast + self.model.cycle(cycle_index, self.config.context_length, self.config.prediction_length)
        prediction = window.in_units(forecast)
        loss = None
        if future_values is not None and return_loss:
            loss = forecast_loss(prediction, future_values, future_observed_mask, self.config.loss)
        return STanHopForPredictionOutput(
            loss=loss,
            prediction_outputs=prediction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            decoder_attentions=decoded.attentions,
            loc=outputs.loc,
            scale=outputs.scale,
        )

    def store(self, past_values: torch.Tensor, future_values: torch.Tensor) -> None:
        """Replace the stored windows by new ones; see `STanHopModel.store`."""
        self.model.store(past_values, future_values)

    def recall(self, past_values: torch.Tensor, past_observed_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Forecast from stored windows alone, without training; see `STanHopModel.recall`."""
        return self.model.recall(past_values, past_observed_mask)

    @torch.no_grad()
    def generate(
        self, past_values: torch.Tensor, past_observed_mask: torch.Tensor | None = None, cycle_index: torch.Tensor | None = None
    ) -> SampleTSPredictionOutput:
        """Forecast as `sequences` (B, 1, prediction_length, num_input_channels).

        The second axis has length 1, because a point forecast is a single sample.
        """
        outputs = self(past_values, past_observed_mask=past_observed_mask, cycle_index=cycle_index, return_dict=True)
        return SampleTSPredictionOutput(sequences=outputs.prediction_outputs.unsqueeze(1))

    def forecast(self, frame: Any) -> Any:
        """Forecast a table of series in the user's units; this needs pandas.

        The past is scaled by `mean` and `std` of the configuration, and the forecast is scaled
        back. A recipe saves both with its model.

        Args:
            frame: A pandas DataFrame with one row per time step and at least `context_length` rows,
                of which the last are used. It has a `DatetimeIndex`, a column "date", or one column
                of dates. The columns of series are found by `channel_names`; other columns are
                ignored. If `channel_names` is `None`, all columns are series. A missing value is
                NaN.

        Returns:
            A DataFrame with the `prediction_length` time stamps that follow and a column for each
                series, in the user's units.

        Raises:
            ImportError: If pandas is not installed.
            TypeError: If `frame` is not a DataFrame.
            ValueError: If the table has too few rows, no time stamps, time stamps that do not
                increase or are not one step of `frequency` apart, a missing column, or a column
                that is not numbers. If the model has a cycle and no `frequency`, which its position
                in the cycle needs. Also as `forward`.
        """
        self.check_configuration()
        window = FrameWindow.of(frame, self.config)
        generated: Any = self.generate(window.past.to(self.device), cycle_index=window.cycle_index)
        return window.in_units(generated.sequences[0, 0])

    def _sizes(self) -> dict[str, int]:
        return self.model._sizes() if "model" in self._modules else {}


__all__ = [
    "STanHopDecoder",
    "STanHopForPrediction",
    "STanHopForPredictionOutput",
    "STanHopModel",
    "STanHopModelOutput",
    "STanHopPreTrainedModel",
]
