"""UHopMIL model configuration"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto import CONFIG_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from .pipelines import TASK
from .validation import check_at_least_one, check_dropouts, check_hopfield


@strict
class UHopMILConfig(PreTrainedConfig):
    r"""
    Configuration of a multiple-instance classifier: each instance of a bag is embedded, learned queries retrieve from the bag through a
    kernelized Hopfield layer (HopfieldPooling, arXiv 2008.02217, with the feature map of U-Hop, arXiv 2404.03827), and a linear
    classifier reads what they retrieved.

    Args:
        instance_dim (`int`, defaults to 166): Width F of an instance, where instances are vectors.
        instance_type (`str`, defaults to `"vector"`): What an instance is, and what embeds it first. "vector": a row of numbers, as it
            is. "image": pixels, through a small convolutional network. "backbone": pixels, through a vision backbone of transformers.
        num_channels (`int`, defaults to 3): Channels of an image.
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): Configuration of the backbone; needed by "backbone" alone.
        hidden_size (`int`, defaults to 64): Width of an embedded instance.
        num_embedding_layers (`int`, defaults to 1): Linear layers, each with `hidden_act` and dropout, that an instance goes through.
        hidden_act (`str`, defaults to `"relu"`): Their activation, and that before the classifier.
        hidden_dropout_prob (`float`, defaults to 0.25): Dropout of embedded instances, and before the classifier.
        attention_probs_dropout_prob (`float`, defaults to 0): Dropout of association weights.
        bag_dropout_prob (`float`, defaults to 0): Probability that training leaves an instance out of its bag; one instance always stays.
        pooling (`str`, defaults to `"hopfield"`): How a bag becomes one vector: "hopfield", or as baselines the "mean" or the "max".
        num_queries (`int`, defaults to 1): Learned state patterns that retrieve from a bag.
        num_attention_heads (`int`, defaults to 4): Number of heads.
        head_dim (`int`, *optional*): Width of a head; `None` for `hidden_size // num_attention_heads`.
        qkv_bias (`bool`, defaults to `True`): Whether query, key and value projections have a bias.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of layer norms.
        initializer_range (`float`, defaults to 0.02): Standard deviation of fresh queries.
        alpha, learnable_alpha, beta, use_feature_map, feature_dim, feature_init, update_steps, value_source: The Hopfield layer, as in
            `UHopViTConfig`.

    Raises:
        A validation error that names the field, its value and what is accepted.

    >>> from modeling_uhop import UHopMILConfig, UHopMILForBagClassification

    >>> model = UHopMILForBagClassification(UHopMILConfig(instance_dim=64, alpha=1.5))
    >>> model.config.num_labels
    2
    """

    model_type = "uhop_mil"
    # So that `compute_metrics` gets logits alone; `trainer.predict(bags, ignore_keys=["attentions"])` has the weights too, and the hidden
    # states if they are returned. The Trainer cannot join attentions (B, H, num_queries, N) of batches that are padded to different N.
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
    qkv_bias: bool = True
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    alpha: float | int = 1.0
    learnable_alpha: bool = False
    beta: float | int | None = None
    use_feature_map: bool = True
    feature_dim: int | None = None
    feature_init: Literal["identity", "orthogonal", "normal"] = "orthogonal"
    update_steps: int = 1
    value_source: Literal["memory", "projected_memory"] = "memory"

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            if self.backbone_config.get("model_type") not in CONFIG_MAPPING:
                raise ValueError(
                    f"backbone_config needs a model_type that transformers knows, got {self.backbone_config.get('model_type')!r}"
                )
            self.backbone_config = CONFIG_MAPPING[self.backbone_config["model_type"]](**self.backbone_config)
        if TASK in PIPELINE_REGISTRY.get_supported_tasks():
            # The task is known here, and transformers would run the folder's copy of its code instead, and ask for trust.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        self.validate_hopfield()

    def validate_hopfield(self):
        """Ranges and combinations that types alone do not express."""
        sizes = (
            "instance_dim",
            "num_channels",
            "hidden_size",
            "num_embedding_layers",
            "num_queries",
            "num_attention_heads",
            "update_steps",
        )
        check_at_least_one(self, *sizes)
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, or None for hidden_size // num_attention_heads, got {self.head_dim}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        check_dropouts(self, "hidden_dropout_prob", "attention_probs_dropout_prob", "bag_dropout_prob")
        if (self.instance_type == "backbone") != (self.backbone_config is not None):
            raise ValueError(
                "instance_type 'backbone' needs a backbone_config, and no other takes one, got "
                f"instance_type={self.instance_type!r} and backbone_config={self.backbone_config}"
            )
        check_hopfield(self)


__all__ = ["UHopMILConfig"]
