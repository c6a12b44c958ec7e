"""Configuration of the U-Hop multiple-instance learning model."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_hopfield import ACTIVATION, HopfieldLayersConfig, check_fields
from .pipelines import TASK


@strict
class UHopMILConfig(HopfieldLayersConfig):
    r"""Configuration of a classifier of bags, which retrieves from a bag with learned queries.

    The model has three parts. It embeds each instance of a bag. Learned queries then retrieve from
    the embedded instances through a kernelized Hopfield layer: HopfieldPooling (arXiv 2008.02217)
    with the feature map $\Phi$ of U-Hop (arXiv 2404.03827). Last, a linear classifier maps the
    retrieved vectors to logits:

    $$
    \mathrm{Sep}_\alpha\left[\beta\, (W_Q \Phi(R)) (W_K \Phi(\Xi))^\top\right] V
    $$

    Here $R$ are the learned queries, $\Xi$ the embedded instances of one bag (the memories), and
    $\mathrm{Sep}_\alpha$ the simplex map (scores to weights).

    Args:
        instance_dim (`int`, defaults to 166): Width F of an instance; used if instances are
            vectors.
        instance_type (`str`, defaults to `"vector"`): What an instance is, and how it is first
            embedded. "vector": a row of numbers, used as it is. "image": pixels, embedded by a
            small convolutional network. "backbone": pixels, embedded by a vision backbone of
            transformers.
        num_channels (`int`, defaults to 3): Number of image channels.
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of the backbone.
            Required for "backbone", not allowed for the other instance types.
        hidden_size (`int`, defaults to 64): Width of an embedded instance.
        num_embedding_layers (`int`, defaults to 1): Number of linear layers that embed an instance;
            each is followed by `hidden_act` and dropout.
        hidden_act (`str`, defaults to `"relu"`): Activation of the embedding layers, also applied
            before the classifier.
        hidden_dropout_prob (`float`, defaults to 0.25): Dropout of embedded instances and before
            the classifier, in [0, 1).
        attention_probs_dropout_prob (`float`, defaults to 0): Dropout of the association weights,
            in [0, 1).
        bag_dropout_prob (`float`, defaults to 0): Probability, in [0, 1), that an instance is
            removed from its bag during training. At least one instance always remains.
        pooling (`str`, defaults to `"hopfield"`): How a bag becomes one vector: "hopfield", or one
            of the baselines "mean" and "max".
        num_queries (`int`, defaults to 1): Number of learned queries that retrieve from a bag.
        num_attention_heads (`int`, defaults to 4): Number of attention heads.
        head_dim (`int`, *optional*): Width of a head; `None` means `hidden_size //
            num_attention_heads`.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        initializer_range (`float`, defaults to 0.02): Standard deviation of newly initialized
            queries.
        kwargs (Any): Fields of the Hopfield layer: see `HopfieldLayersConfig`.

    Examples:
        >>> from modeling_uhop import UHopMILConfig, UHopMILForBagClassification

        >>> model = UHopMILForBagClassification(UHopMILConfig(instance_dim=64, alpha=1.5))
        >>> model.config.num_labels
        2
    """

    model_type = "uhop_mil"
    _auto_class = "AutoConfig"
    # Because `compute_metrics` should receive the logits alone, the Trainer ignores these outputs.
    # `trainer.predict(bags, ignore_keys=["attentions"])` also returns the instance weights, and the
    # hidden states if the model returns them. Attentions must stay ignored, because the Trainer
    # cannot concatenate (B, H, num_queries, N) of batches that are padded to different N.
    keys_to_ignore_at_inference = ["instance_weights", "hidden_states", "attentions"]
    attribute_map = {"num_hidden_layers": "num_embedding_layers"}

    instance_dim: int = 166
    instance_type: Literal["vector", "image", "backbone"] = "vector"
    num_channels: int = 3
    backbone_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 64
    num_embedding_layers: int = 1
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.25
    attention_probs_dropout_prob: float | int = 0.0
    bag_dropout_prob: float | int = 0.0
    pooling: Literal["hopfield", "mean", "max"] = "hopfield"
    num_queries: int = 1
    num_attention_heads: int = 4
    head_dim: int | None = None
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            if self.backbone_config.get("model_type") not in CONFIG_MAPPING:
                raise ValueError(
                    f"backbone_config must have a model_type that transformers knows, got {self.backbone_config.get('model_type')!r}"
                )
            self.backbone_config = CONFIG_MAPPING[self.backbone_config["model_type"]](**self.backbone_config)
        if TASK in PIPELINE_REGISTRY.get_supported_tasks():
            # Because this package has registered the task, we drop the folder's entry: with it,
            # transformers would run the folder's copy of the code and ask for `trust_remote_code`.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    def validate_hopfield(self):
        """Check ranges and combinations of fields that the type annotations do not express."""
        super().validate_hopfield()
        check_fields(self, "be at least 1", "instance_dim", "num_channels", "hidden_size", "num_embedding_layers", "num_queries")
        check_fields(self, "be at least 1", "num_attention_heads", head_dim="hidden_size // num_attention_heads")
        check_fields(self, ACTIVATION, "hidden_act")
        check_fields(self, "lie in [0, 1)", "hidden_dropout_prob", "attention_probs_dropout_prob", "bag_dropout_prob")
        if (self.instance_type == "backbone") != (self.backbone_config is not None):
            raise ValueError(
                "backbone_config must be given if, and only if, instance_type is 'backbone'; got "
                f"instance_type={self.instance_type!r} and backbone_config={self.backbone_config}"
            )


__all__ = ["UHopMILConfig"]
