"""Configuration of the U-Hop vision transformer."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_hopfield import ACTIVATION, HopfieldLayersConfig, check_fields


@strict
class UHopViTConfig(HopfieldLayersConfig):
    r"""Configuration of a vision transformer whose attention layers are kernelized Hopfield layers.

    Each layer computes equation 3.1 of U-Hop (arXiv 2404.03827):

    $$
    \mathrm{Sep}_\alpha\left[\beta\, (W_Q \Phi(X)) (W_K \Phi(\Xi))^\top\right] V
    $$

    Here $X$ are the queries, $\Xi$ the memories, $\Phi(u) = W u$ the feature map, and
    $\mathrm{Sep}_\alpha$ the simplex map (scores to weights). Fields that also exist in `ViTConfig`
    have the same meaning here.

    Args:
        hidden_size (`int`, defaults to 768): Width of a token; a multiple of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): Number of encoder layers.
        num_attention_heads (`int`, defaults to 12): Number of attention heads.
        intermediate_size (`int`, defaults to 3072): Hidden width of the MLP. The "class_query"
            encoder does not use it.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP. In the "class_query"
            encoder, the activation after the Hopfield layer (the papers use `"relu"`).
        hidden_dropout_prob (`float`, defaults to 0): Dropout of the embeddings and of the output of
            each sub-layer, in [0, 1).
        attention_probs_dropout_prob (`float`, defaults to 0): Dropout of the association weights,
            in [0, 1).
        initializer_range (`float`, defaults to 0.02): Standard deviation of newly initialized
            weights.
        layer_norm_eps (`float`, defaults to 1e-12): Epsilon of the layer norms.
        image_size (`int` or pair (height, width), defaults to 224): Size of an image in pixels.
        patch_size (`int` or pair (height, width), defaults to 16): Size of a patch in pixels.
        patch_embedding (`str`, defaults to `"linear"`): How an image becomes tokens. "linear": a
            linear map of each patch. "conv": the tokenizer of compact transformers (arXiv
            2104.05704), which suits small data sets: log2(`patch_size`) blocks, each a 3 x 3
            convolution without bias, ReLU, and max pooling that halves the image. The number of
            channels doubles from block to block, up to `hidden_size`. `patch_size` must be a power
            of two.
        num_channels (`int`, defaults to 3): Number of image channels.
        pooler_output_size (`int`, *optional*): Output width of the pooler; `None` means
            `hidden_size`.
        pooler_act (`str`, defaults to `"tanh"`): Activation of the pooler.
        encoder_type (`str`, defaults to `"transformer"`): "transformer": pre-norm blocks of
            self-attention and MLP (the papers' three-layer encoder). "class_query": the papers'
            CIFAR encoder, in which only the CLS token queries the patches; the result passes
            through `hidden_act` and a layer norm to the classifier.
        use_distillation_token (`bool`, defaults to `False`): Whether a second, separate token
            follows the CLS token, as in DeiT. It needs a CLS token in the "transformer" encoder.
        pooling (`str`, defaults to `"cls"`): How the tokens become one vector. "cls": the CLS
            token. "hopfield": there is no CLS token, and a learned query retrieves from the final
            tokens; see `HopfieldPooling`. This is the sequence pooling of compact transformers. The
            "class_query" encoder does not support it.
        mask_diagonal (`bool`, defaults to `False`): Whether a token retrieves only from the other
            tokens. With `learnable_beta`, this is the locality self-attention of arXiv 2112.13492,
            for small data sets. The "class_query" encoder does not support it.
        attention_init (`str`, defaults to `"normal"`): Initial values of the projections of the
            encoder. "normal": a normal distribution with standard deviation `initializer_range`.
            "mimetic": products $W_Q W_K^\top$ close to the identity and $W_V W_O$ close to its
            negative (arXiv 2305.09828); see `mimetic_`. "mimetic" needs `value_source="memory"` and
            features that are at least as wide as a head.
        kwargs (Any): Fields of the Hopfield layers: see `HopfieldLayersConfig`.

    Examples:
        >>> from modeling_uhop import UHopViTConfig, UHopViTModel

        >>> model = UHopViTModel(UHopViTConfig(image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
        >>> model.config.alpha
        1.0
    """

    model_type = "uhop_vit"
    _auto_class = "AutoConfig"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-12
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    pooler_output_size: int | None = None
    pooler_act: str = "tanh"
    encoder_type: Literal["transformer", "class_query"] = "transformer"
    use_distillation_token: bool = False
    patch_embedding: Literal["linear", "conv"] = "linear"
    pooling: Literal["cls", "hopfield"] = "cls"
    mask_diagonal: bool = False
    attention_init: Literal["normal", "mimetic"] = "normal"

    def __post_init__(self, **kwargs):
        self.pooler_output_size = self.pooler_output_size if self.pooler_output_size else self.hidden_size
        super().__post_init__(**kwargs)

    def validate_hopfield(self):
        """Check ranges and combinations of fields that the type annotations do not express."""
        super().validate_hopfield()
        check_fields(self, "be at least 1", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
        check_fields(self, "lie in [0, 1)", "hidden_dropout_prob", "attention_probs_dropout_prob")
        check_fields(self, ACTIVATION, "hidden_act", "pooler_act")
        image, patch = ([size, size] if isinstance(size, int) else list(size) for size in (self.image_size, self.patch_size))
        if len(image) != 2 or len(patch) != 2 or not all(1 <= small <= large for small, large in zip(patch, image, strict=True)):
            raise ValueError(
                "image_size and patch_size must each be an integer or a pair (height, width), with 1 <= patch_size <= image_size; "
                f"got image_size={self.image_size} and patch_size={self.patch_size}"
            )
        if self.patch_embedding == "conv" and (patch[0] != patch[1] or patch[0] < 2 or patch[0] & (patch[0] - 1)):
            raise ValueError(
                "patch_embedding='conv' halves the image with each block, so patch_size must be a power of two, such as 2, 4 or 8, "
                f"got {self.patch_size}"
            )
        for name, value in (("use_distillation_token", True), ("pooling", "hopfield"), ("mask_diagonal", True)):
            if getattr(self, name) == value and self.encoder_type == "class_query":
                raise ValueError(f"{name}={value!r} needs encoder_type='transformer', got 'class_query'")
        if self.use_distillation_token and self.pooling != "cls":
            raise ValueError(f"use_distillation_token=True needs pooling='cls', got {self.pooling!r}")
        if self.attention_init == "mimetic":
            features = self.feature_dim if self.use_feature_map and self.feature_dim is not None else self.hidden_size
            head_dim = self.hidden_size // self.num_attention_heads
            if self.value_source != "memory" or features < head_dim:
                raise ValueError(
                    f"attention_init='mimetic' needs value_source='memory' and a feature_dim of at least the head width {head_dim}, "
                    f"got value_source={self.value_source!r} and feature_dim={features}"
                )


__all__ = ["UHopViTConfig"]
