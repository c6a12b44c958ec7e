"""U-Hop vision transformer: a PyTorch model with kernelized Hopfield layers as attention."""

import itertools
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_interface import KERNELS
from .checks import LARGE, MAX_STATE, as_mask, check_no_overflow, label_loss, required_input
from .configuration_uhop_vit import UHopViTConfig
from .conversion import from_vit, to_vit
from .hopfield import MLP, HopfieldAttention, HopfieldPooling
from .memories import present_memories
from .mimetic import mimetic_
from .modeling_hopfield import HopfieldPreTrainedModel
from .precision import largest


class UHopViTPatchEmbeddings(nn.Module):
    """Embed the patches of images.

    Pixel values (batch_size, num_channels, height, width) become (batch_size, num_patches,
    hidden_size). Pixels after the last whole patch of a row or column have no influence. With
    `patch_embedding="conv"`, a token also depends on pixels around its patch.
    """

    def __init__(self, config: UHopViTConfig):
        super().__init__()
        self.image_size = _pair(config.image_size)
        self.patch_size = _pair(config.patch_size)
        self.num_channels = config.num_channels
        self.grid_size = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.projection: nn.Conv2d | nn.Sequential
        if config.patch_embedding == "conv":
            self.projection = conv_blocks(config.num_channels, config.hidden_size, self.patch_size[0].bit_length() - 1)
        else:
            self.projection = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.projection.parameters()).dtype

    @property
    def mixes_patches(self) -> bool:
        """Whether a token depends on more than its patch."""
        return isinstance(self.projection, nn.Sequential)

    def grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Number of patches in a column and in a row of these images."""
        return pixel_values.shape[-2] // self.patch_size[0], pixel_values.shape[-1] // self.patch_size[1]

    def forward(self, pixel_values: torch.Tensor, unseen: torch.Tensor | None = None) -> torch.Tensor:
        """Embed images; `unseen` (batch_size, num_patches) is True where a patch has no influence on others."""
        if self.mixes_patches:
            pixel_values = self._seen(pixel_values, unseen)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)

    def _seen(self, pixel_values: torch.Tensor, unseen: torch.Tensor | None) -> torch.Tensor:
        """Whole patches of images, with zeros, as beyond the border, where a patch is unseen."""
        (rows, columns), (height, width) = self.grid_of(pixel_values), self.patch_size
        pixel_values = pixel_values[..., : rows * height, : columns * width]
        if unseen is None:
            return pixel_values
        pixels = unseen.view(-1, 1, rows, columns).repeat_interleave(height, 2).repeat_interleave(width, 3)
        return pixel_values.masked_fill(pixels, 0.0)


class UHopViTEmbeddings(nn.Module):
    """Input tokens of the encoder: CLS and distillation token if there are any, patches; with positions.

    With `use_mask_token`, a learned mask token can replace patches.
    """

    def __init__(self, config: UHopViTConfig, use_mask_token: bool = False):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.pooling == "cls" else None
        self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_distillation_token else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        self.patch_embeddings = UHopViTPatchEmbeddings(config)
        num_tokens = self.patch_embeddings.num_patches + num_prefix_tokens(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings for another image size, by bicubic interpolation of the grid."""
        grid = self.patch_embeddings.grid_size
        patch_height, patch_width = self.patch_embeddings.patch_size
        new_grid = (height // patch_height, width // patch_width)
        if new_grid == grid:
            return self.position_embeddings
        prefix = self.position_embeddings.shape[1] - self.patch_embeddings.num_patches
        prefix_positions, patch_positions = self.position_embeddings[:, :prefix], self.position_embeddings[:, prefix:]
        patch_positions = patch_positions.unflatten(1, grid).permute(0, 3, 1, 2)
        patch_positions = nn.functional.interpolate(patch_positions, size=new_grid, mode="bicubic", align_corners=False)
        return torch.cat((prefix_positions, patch_positions.flatten(2).transpose(1, 2)), dim=1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        patches = self.patch_embeddings
        if pixel_values.dim() != 4 or pixel_values.shape[1] != patches.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch_size, {patches.num_channels}, height, width), got {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != patches.image_size:
            raise ValueError(
                f"pixel_values must be {patches.image_size} (height, width), got {(height, width)}; "
                "pass interpolate_pos_encoding=True to use another size"
            )
        shape = (pixel_values.shape[0], math.prod(patches.grid_of(pixel_values)))
        masked = unseen = None
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a model built with use_mask_token=True")
            if bool_masked_pos.shape != shape:
                raise ValueError(f"bool_masked_pos must have shape {shape}, got {tuple(bool_masked_pos.shape)}")
            masked = unseen = as_mask(bool_masked_pos, "bool_masked_pos", "patches that the mask token replaces", "others")
        if patches.mixes_patches and attention_mask is not None and attention_mask.dim() == 2:
            prefix_size = self.position_embeddings.shape[1] - patches.num_patches
            absent = ~token_mask(attention_mask, (shape[0], prefix_size + shape[1]))[:, prefix_size:]
            unseen = absent if masked is None else masked | absent
        tokens = patches(pixel_values, unseen)
        if masked is not None and self.mask_token is not None:
            tokens = torch.where(masked.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        prefix = [token.expand(tokens.shape[0], -1, -1) for token in (self.cls_token, self.distillation_token) if token is not None]
        tokens = torch.cat((*prefix, tokens), dim=1)
        return self.dropout(tokens + self.interpolate_pos_encoding(height, width))


class UHopViTEncoderLayer(GradientCheckpointingLayer):
    """Base class of both encoder layers: a Hopfield layer, and dropout of what it retrieves."""

    def __init__(self, config: UHopViTConfig):
        super().__init__()
        self.attention = HopfieldAttention(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class UHopViTLayer(UHopViTEncoderLayer):
    """Pre-norm encoder block: every token retrieves from all tokens, then an MLP follows."""

    def __init__(self, config: UHopViTConfig):
        super().__init__(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        retrieved, _ = self.attention(self.layernorm_before(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(retrieved)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states)))


class UHopViTClassQueryLayer(UHopViTEncoderLayer):
    """The papers' CIFAR encoder: only the CLS token queries the patches, which stay unchanged."""

    def __init__(self, config: UHopViTConfig):
        super().__init__(config)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        query, patches = hidden_states[:, :1], hidden_states[:, 1:]
        if attention_mask is not None:
            attention_mask = attention_mask[..., :1, 1:]
        retrieved, _ = self.attention(query, patches, attention_mask=attention_mask, **kwargs)
        return torch.cat((self.dropout(self.activation_fn(retrieved)), patches), dim=1)


class UHopViTPooler(nn.Module):
    """Linear layer and activation applied to the pooled vector, such as the CLS token."""

    def __init__(self, config: UHopViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size or config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(pooled))


class UHopViTPreTrainedModel(HopfieldPreTrainedModel):
    """Base class of the U-Hop vision transformers: initialization and conversion."""

    config: UHopViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    _auto_classes = {
        "AutoConfig": "configuration_uhop_vit.UHopViTConfig",
        "AutoModel": "modeling_uhop_vit.UHopViTModel",
        "AutoModelForImageClassification": "modeling_uhop_vit.UHopViTForImageClassification",
    }
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["UHopViTEmbeddings", "UHopViTLayer", "UHopViTClassQueryLayer", "HopfieldPooling"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": UHopViTEncoderLayer, "attentions": HopfieldAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d) and self.config.patch_embedding == "conv":
            # Because each block ends with ReLU, this scale keeps the variance of tokens.
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, UHopViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.trunc_normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)
            for token in (module.distillation_token, module.mask_token):
                if token is not None:
                    init.zeros_(token)

    def initialize_weights(self):
        """Initialise all weights that no checkpoint has set; see `_init_weights` and `attention_init`."""
        # Because transformers does not call `_init_weights` for a module without parameters of its own,
        # what relates several projections is set here.
        layers = [module.attention for module in self.modules() if isinstance(module, UHopViTEncoderLayer)]
        new = [layer for layer in layers if not any(hasattr(each, "_is_hf_initialized") for each in (layer.q_proj, layer.q_proj.weight))]
        super().initialize_weights()
        if self.config.attention_init == "mimetic":
            for layer in new:
                mimetic_(layer)

    @property
    def num_class_tokens(self) -> int:
        """Number of tokens before the patches among the memories of a layer."""
        return 0 if self.config.encoder_type == "class_query" else num_prefix_tokens(self.config)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Choose the attention kernel; refuse kernels that do not take the masks of this configuration."""
        if self.config.encoder_type == "class_query" and requested_attention not in (None, "eager", "sdpa", "hopfield"):
            raise ValueError(
                f"encoder_type 'class_query' masks a single query, which attn_implementation={requested_attention!r} does not support; "
                "use 'sdpa', 'hopfield' or 'eager'"
            )
        for name, value in (("pooling", "hopfield"), ("mask_diagonal", True)):
            if getattr(self.config, name) == value and requested_attention not in (None, "eager", "sdpa", *KERNELS):
                raise ValueError(
                    f"{name}={value!r} needs a mask of scores, which attn_implementation={requested_attention!r} does not support; "
                    f"use 'sdpa', 'eager' or one of {tuple(KERNELS)}"
                )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @classmethod
    def from_vit(cls, source, *, alpha: float = 1.0, **fields):
        r"""Convert a ViT of transformers into a Hopfield model, ready for the separation step.

        The feature map starts as the identity, $\Phi(u) = u$. At `alpha=1` the converted model
        therefore gives the same outputs as the source.

        Args:
            source (PreTrainedModel | str | os.PathLike): A model, a folder or a Hub id. Accepted
                are `ViTModel`, `ViTForImageClassification`, the same classes of DeiT (the
                distillation token is converted too), and ViT-MSN. If the checkpoint has no
                classifier (or no pooler) and this class has one, that part is newly initialized.
            alpha: Tsallis exponent in [1, 2]. Above 1 the same weights define a different function,
                so the model needs fine-tuning.
            fields (Any): Fields of `UHopViTConfig` that the weights do not determine: for example
                learnable_alpha, beta, learnable_beta, update_steps, use_feature_map, dropout,
                mask_diagonal (which changes the outputs), or num_labels (a different number gives a
                newly initialized classifier).

        Returns:
            converted (UHopViTPreTrainedModel): The converted model, on the device, in the dtype and
                in the mode of the source.

        Raises:
            ValueError: If the architecture is not supported, or a field is determined by the
                weights.

        Examples:
            >>> from transformers import ViTConfig, ViTForImageClassification
            >>> from modeling_uhop import UHopViTForImageClassification

            >>> vit = ViTForImageClassification(ViTConfig(image_size=32, hidden_size=48, num_hidden_layers=2, num_attention_heads=4))
            >>> model = UHopViTForImageClassification.from_vit(vit.eval())
            >>> pixel_values = torch.rand(1, 3, 32, 32)
            >>> torch.allclose(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-5)
            True
        """
        return from_vit(cls, source, alpha=alpha, **fields)

    def to_vit(self) -> PreTrainedModel:
        """Convert this model into a ViT of transformers that computes the same function.

        The feature map and a learned beta are folded into the query and key projections.

        Returns:
            A `ViTModel` or `ViTForImageClassification`; the DeiT classes if there is a distillation
                token.

        Raises:
            ValueError: If a ViT cannot compute this function: `alpha` other than 1, several
                update steps, the "class_query" encoder, convolutions as patch embedding, Hopfield
                pooling, a masked diagonal, or values W_V W_K Xi without a feature map.
        """
        return to_vit(self)


class UHopViTModel(UHopViTPreTrainedModel):
    r"""U-Hop vision transformer without a task head: images to tokens (batch_size, N, hidden_size).

    N counts the CLS token and the distillation token, if there are any, and the patches. Each layer is a
    Hopfield layer (U-Hop, equation 3.1), $\mathrm{Sep}_\alpha[\beta\, (W_Q \Phi(X)) (W_K
    \Phi(\Xi))^\top]\, V$; see `UHopViTConfig`.

    Args:
        config: The configuration.
        add_pooling_layer: Whether the pooled vector (the CLS token, or what the query of
            `pooling="hopfield"` retrieves) passes through a linear layer and `config.pooler_act`.
        use_mask_token: Whether the model has a mask token, for masked image modelling.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: UHopViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        layer_class = UHopViTLayer if config.encoder_type == "transformer" else UHopViTClassQueryLayer
        self.embeddings = UHopViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([layer_class(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooling = HopfieldPooling(config) if config.pooling == "hopfield" else None
        self.pooler = UHopViTPooler(config) if add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: (batch_size, num_channels, height, width), finite.
            bool_masked_pos: (batch_size, num_patches), True where the mask token replaces a patch.
                With `patch_embedding="conv"`, its pixels count as zeros for the tokens around it.
            interpolate_pos_encoding: Whether to accept images of another size than
                `config.image_size`.
            attention_mask: (batch_size, N), 1 for tokens that may be retrieved from, 0 for the
                others. With `patch_embedding="conv"`, the pixels of the others count as zeros for
                the tokens around them.

        Returns:
            The final tokens, and the pooled vector if there is a pooler or `pooling="hopfield"`.
                With `pooling="hopfield"`, the last of the attentions are those of the pooling, (B,
                H, 1, N).

        Raises:
            TypeError: If an input is not a tensor.
            ValueError: If `pixel_values` is missing, has a wrong shape, or (on CPU) is not finite
                or so large that states overflow; or if a mask has the wrong number of tokens.
        """
        hidden_states = self._embed(pixel_values, bool_masked_pos, interpolate_pos_encoding, attention_mask)
        mask = self._attention_mask(hidden_states, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        sequence_output = self.layernorm(hidden_states)
        check_no_overflow(sequence_output, "image")
        pooled_output = None
        if self.pooling is not None:
            present = attention_mask
            if attention_mask is not None and attention_mask.dim() > 2:
                present = present_memories(attention_mask, sequence_output)
            pooled_output = self.pooling(sequence_output, present, **kwargs)[0][:, 0]
            check_no_overflow(pooled_output, "image")
        if self.pooler is not None:
            pooled_output = self.pooler(sequence_output[:, 0] if pooled_output is None else pooled_output)
        return BaseModelOutputWithPooling(last_hidden_state=sequence_output, pooler_output=pooled_output)

    def _embed(
        self,
        pixel_values: torch.Tensor | None,
        bool_masked_pos: torch.Tensor | None,
        interpolate_pos_encoding: bool | None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.check_configuration()
        pixel_values = required_input("pixel_values", pixel_values, bool_masked_pos=bool_masked_pos, attention_mask=attention_mask)
        size = largest(pixel_values)
        if not size < math.inf:
            raise ValueError(f"pixel_values must be finite, got {int((~pixel_values.isfinite()).sum())} values that are not")
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.dtype)
        tokens = self.embeddings(pixel_values, bool_masked_pos, interpolate_pos_encoding, attention_mask)
        if size > LARGE:
            check_no_overflow(tokens, "image", MAX_STATE)
        return tokens

    def _attention_mask(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None):
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = token_mask(attention_mask, hidden_states.shape[:2])
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        return without_diagonal(mask, hidden_states) if self.config.mask_diagonal else mask


class UHopViTForImageClassification(UHopViTPreTrainedModel):
    """U-Hop vision transformer for image classification, with a linear classifier.

    Args:
        config: The configuration; `config.num_labels` is the number of classes.
    """

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: UHopViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.vit = UHopViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: As in `UHopViTModel.forward`.
            labels: Targets of the kind that `config.problem_type` names: class indices (B,) or (B,
                1) in [0, num_labels), several labels (B, num_labels) in [0, 1], or numbers for
                regression. If `problem_type` is `None`, a model with one label is a regression;
                otherwise the shape of the labels decides.
            interpolate_pos_encoding: As in `UHopViTModel.forward`.
            attention_mask: As in `UHopViTModel.forward`.

        Returns:
            Logits (batch_size, num_labels), and the loss if labels are given.

        Raises:
            TypeError: If an input is not a tensor.
            ValueError: As `UHopViTModel.forward`; also if labels are of none of these kinds (the
                message names the example).
        """
        self.check_configuration()
        outputs: Any = self.vit(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0] if outputs.pooler_output is None else outputs.pooler_output)
        check_no_overflow(logits, "image")
        loss = None if labels is None else label_loss(self, labels, logits, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


def num_prefix_tokens(config: UHopViTConfig) -> int:
    """Number of tokens before the patches: CLS, and the distillation token, if there are any."""
    if config.pooling == "hopfield":
        return 0
    return 2 if config.use_distillation_token else 1


def conv_blocks(num_channels: int, width: int, count: int) -> nn.Sequential:
    """Build the tokenizer of compact transformers (arXiv 2104.05704, equation 1): x = MaxPool(ReLU(Conv2d(x))).

    Each of `count` blocks halves images (B, C, height, width). The last one has `width` channels,
    and each one before it half as many as the next.
    """
    widths = [num_channels, *(max(1, width >> (count - 1 - index)) for index in range(count))]
    blocks = [
        nn.Sequential(nn.Conv2d(one, other, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        for one, other in itertools.pairwise(widths)
    ]
    return nn.Sequential(*blocks)


def token_mask(attention_mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a mask of tokens (B, N) as booleans, after a check of its shape and values."""
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have shape {tuple(shape)}, one entry for each patch and each token before "
            f"them, got {tuple(attention_mask.shape)}"
        )
    return as_mask(attention_mask, "attention_mask", "tokens that may be retrieved from", "others")


def without_diagonal(mask: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Add to a mask of scores (boolean, floating or `None`) that no token (B, N, d) retrieves from itself."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    itself = (positions[:, None] == positions)[None, None]
    if mask is None:
        return ~itself
    return mask & ~itself if mask.dtype == torch.bool else mask.masked_fill(itself, torch.finfo(mask.dtype).min)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


__all__ = ["UHopViTForImageClassification", "UHopViTModel", "UHopViTPreTrainedModel"]
