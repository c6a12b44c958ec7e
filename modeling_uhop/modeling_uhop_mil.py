"""U-Hop multiple-instance model: classify bags by retrieval with learned queries (PyTorch)."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoBackbone
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .checks import LARGE, MAX_STATE, as_mask, check_no_overflow, label_loss, required_input
from .configuration_uhop_mil import UHopMILConfig
from .hopfield import HopfieldPooling
from .modeling_hopfield import HopfieldPreTrainedModel
from .pipelines import TASK, MultipleInstanceClassificationPipeline
from .precision import largest


@dataclass
class UHopMILModelOutput(ModelOutput):
    """What the U-Hop multiple-instance model returns for a batch of B bags.

    Attributes:
        last_hidden_state: (B, N, hidden_size), the embedded instances; zeros where there is no
            instance.
        pooler_output: (B, num_queries * hidden_size), what the queries retrieved.
        instance_weights: (B, N), the weight of each instance in its bag. With "hopfield" and "mean"
            pooling the weights sum to 1 over a bag (except under dropout of the association weights
            in training). "hopfield": association weights averaged over heads and queries. "max":
            the share of features whose maximum the instance gives.
        hidden_states: Output of each embedding layer, (B, N, hidden_size); zeros where there is no
            instance.
        attentions: Association weights of every head, (B, H, num_queries, N); empty for other
            pooling than "hopfield".
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    instance_weights: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class UHopMILBagClassifierOutput(ModelOutput):
    """What the U-Hop bag classifier returns for a batch of B bags.

    Attributes:
        loss: A scalar, if labels are given.
        logits: (B, num_labels), the class scores.
        instance_weights: (B, N), as in `UHopMILModelOutput`.
        hidden_states: As in `UHopMILModelOutput`.
        attentions: As in `UHopMILModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    instance_weights: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class UHopMILImageEmbedding(nn.Module):
    """Small convolutional network that embeds images (n, num_channels, height, width).

    Two convolutions with a max pooling between them, then the mean over the remaining positions;
    the result is (n, hidden_size)."""

    def __init__(self, config: UHopMILConfig):
        super().__init__()
        self.conv1 = nn.Conv2d(config.num_channels, config.hidden_size // 2 + 1, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(config.hidden_size // 2 + 1, config.hidden_size, kernel_size=3, padding=1)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.out_dim = config.hidden_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = nn.functional.max_pool2d(self.activation_fn(self.conv1(images)), 2, ceil_mode=True)
        return self.activation_fn(self.conv2(features)).mean((-1, -2))


class UHopMILBackboneEmbedding(nn.Module):
    """Vision backbone: images to vectors, as the mean of the last feature map over the image."""

    def __init__(self, config: UHopMILConfig):
        super().__init__()
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        self.out_dim = self.backbone.channels[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images).feature_maps[-1].mean((-1, -2))


class UHopMILEmbeddingLayer(GradientCheckpointingLayer):
    """Linear layer, activation and dropout that embed each instance."""

    def __init__(self, config: UHopMILConfig, in_dim: int):
        super().__init__()
        self.dense = nn.Linear(in_dim, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.activation_fn(self.dense(hidden_states)))


class UHopMILMeanPooling(nn.Module):
    """Mean over the instances of a bag; zeros for an empty bag."""

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = mask.to(states.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
        return weights.unsqueeze(1) @ states, weights


class UHopMILMaxPooling(nn.Module):
    """Largest value of each feature over a bag; zeros for an empty bag.

    The weight of an instance is the share of features whose maximum it gives.
    """

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if states.shape[1] == 0:
            return states.new_zeros(states.shape[0], 1, states.shape[2]), states.new_zeros(mask.shape)
        present = mask.unsqueeze(-1)
        largest, winners = states.masked_fill(~present, torch.finfo(states.dtype).min).max(1, keepdim=True)
        filled = present.any(1, keepdim=True)
        votes = torch.full_like(winners.squeeze(1), 1.0 / states.shape[2], dtype=states.dtype)
        shares = torch.zeros_like(mask, dtype=states.dtype).scatter_add(1, winners.squeeze(1), votes)
        return torch.where(filled, largest, 0.0), shares * mask


class UHopMILPreTrainedModel(HopfieldPreTrainedModel):
    """Base class of the U-Hop multiple-instance models: initialization, loading and saving."""

    config: UHopMILConfig
    base_model_prefix = "mil"
    main_input_name = "instances"
    read_at_each_call = (*HopfieldPreTrainedModel.read_at_each_call, "bag_dropout_prob")
    # Because transformers has no auto class for bags, we use the closest one: a sequence is a set
    # with an order.
    _auto_classes = {
        "AutoConfig": "configuration_uhop_mil.UHopMILConfig",
        "AutoModel": "modeling_uhop_mil.UHopMILModel",
        "AutoModelForSequenceClassification": "modeling_uhop_mil.UHopMILForBagClassification",
    }
    supports_gradient_checkpointing = True
    _no_split_modules = ["UHopMILImageEmbedding", "UHopMILBackboneEmbedding", "HopfieldPooling"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            # Because these narrow layers would start close to zero at a fixed 0.02, we use
            # PyTorch's default scale.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Return "eager", because every call returns instance weights; refuse other kernels."""
        if requested_attention not in (None, "eager"):
            raise ValueError(
                f"attn_implementation must be 'eager', because the model returns instance weights, got {requested_attention!r}"
            )
        return super().get_correct_attn_implementation("eager", is_init_check)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save the model, with an entry for `pipeline("multiple-instance-classification")`."""
        pipeline = {
            "impl": f"pipelines.{MultipleInstanceClassificationPipeline.__name__}",
            "pt": ["AutoModelForSequenceClassification"],
            "type": "multimodal",
        }
        self.config.custom_pipelines = {TASK: pipeline} if self._is_named() else {}
        super().save_pretrained(*args, **kwargs)


class UHopMILModel(UHopMILPreTrainedModel):
    r"""U-Hop multiple-instance model without a classifier: bags of instances to vectors.

    Each instance is embedded. Learned queries $R$ then retrieve from the embedded instances $\Xi$
    of a bag, $\mathrm{Sep}_\alpha[\beta\, (W_Q \Phi(R)) (W_K \Phi(\Xi))^\top]\, V$ (U-Hop, equation
    3.1); see `UHopMILConfig`.

    Args:
        config: The configuration.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: UHopMILConfig):
        super().__init__(config)
        self.embedding: UHopMILImageEmbedding | UHopMILBackboneEmbedding | None = None
        if config.instance_type == "image":
            self.embedding = UHopMILImageEmbedding(config)
        elif config.instance_type == "backbone":
            self.embedding = UHopMILBackboneEmbedding(config)
        widths = [config.instance_dim if self.embedding is None else self.embedding.out_dim]
        widths += [config.hidden_size] * (config.num_embedding_layers - 1)
        self.layers = nn.ModuleList([UHopMILEmbeddingLayer(config, width) for width in widths])
        self.pooling: HopfieldPooling | UHopMILMeanPooling | UHopMILMaxPooling
        if config.pooling == "hopfield":
            self.pooling = HopfieldPooling(config)
        else:
            self.pooling = UHopMILMeanPooling() if config.pooling == "mean" else UHopMILMaxPooling()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        instances: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> UHopMILModelOutput:
        """Embed the instances of each bag and retrieve from the bag.

        Args:
            instances: (B, N, instance_dim), or (B, N, num_channels, height, width) if instances are
                images. Bags are padded to N instances.
            attention_mask: (B, N), 1 for instances and 0 for padding, whose values have no
                influence; `None` means no padding.
            output_attentions: Whether to return attentions; `None` means the value in the
                configuration.
            output_hidden_states: Whether to return hidden states; `None` means the value in the
                configuration.

        Returns:
            The pooled vector of each bag, its embedded instances and their weights.

        Raises:
            TypeError: If an input is not a tensor.
            ValueError: If `instances` is missing, has a wrong shape, or (on CPU) is not finite or
                so large that states overflow. The message names the bag.
        """
        hidden_states, mask = self._embed(instances, attention_mask)
        if self.training and self.config.bag_dropout_prob > 0:
            mask = _instance_dropout(mask, self.config.bag_dropout_prob)
        pooled, weights = self.pooling(hidden_states[-1], mask)
        check_no_overflow(pooled, "bag")
        attentions = (weights,) if self.config.pooling == "hopfield" else ()
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return UHopMILModelOutput(
            last_hidden_state=hidden_states[-1],
            pooler_output=pooled.flatten(1),
            instance_weights=weights.mean((1, 2)) if attentions else weights,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def _embed(self, instances: torch.Tensor | None, attention_mask: torch.Tensor | None) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Outputs of the embedding layers (B, N, hidden_size), zeros for padding; mask (B, N)."""
        self.check_configuration()
        instances = required_input("instances", instances, attention_mask=attention_mask)
        mask = self._checked_mask(instances, attention_mask)
        instances = instances.to(self.dtype).masked_fill(~_broadcast_mask(mask, instances), 0.0)
        size = largest(instances)
        if not size < math.inf:
            bag, instance = (~instances.flatten(2).isfinite()).any(-1).nonzero()[0].tolist()
            raise ValueError(f"instances must be finite in {self.dtype}, but instance {instance} of bag {bag} of the batch is not")
        if size > LARGE and self.config.instance_type == "backbone":
            check_no_overflow(instances, "bag", MAX_STATE)
        hidden_states = instances
        if self.embedding is not None:
            # Because batch norms would count padding, and images are expensive, padding is removed
            # and not masked. Because a traced graph cannot branch on values, it always embeds, even
            # if there is no image.
            has_instances = torch.compiler.is_compiling() or torch.jit.is_tracing() or bool(mask.any())
            vectors = self.embedding(instances[mask]) if has_instances else instances.new_zeros(0, self.embedding.out_dim)
            hidden_states = vectors.new_zeros(*mask.shape, self.embedding.out_dim).masked_scatter(mask.unsqueeze(-1), vectors)
        if getattr(self.layers[0], "gradient_checkpointing", False) and torch.is_grad_enabled() and not hidden_states.requires_grad:
            # Because a reentrant checkpoint computes gradients only if its input requires one, we
            # set it here.
            hidden_states = hidden_states.detach().requires_grad_()
        states = []
        for layer in self.layers:
            hidden_states = layer(hidden_states).masked_fill(~mask.unsqueeze(-1), 0.0)
            states.append(hidden_states)
        if size > LARGE and self.config.pooling == "hopfield":
            check_no_overflow(hidden_states, "bag", MAX_STATE)
        return tuple(states), mask

    def _checked_mask(self, instances: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Check the shapes of a batch and return its mask as booleans (B, N)."""
        config = self.config
        if config.instance_type == "vector":
            expected, fits = f"(B, N, {config.instance_dim})", instances.dim() == 3 and instances.shape[-1] == config.instance_dim
        else:
            expected = f"(B, N, {config.num_channels}, height, width)"
            fits = instances.dim() == 5 and instances.shape[2] == config.num_channels
        if not fits:
            raise ValueError(f"instances must have shape {expected}, got {tuple(instances.shape)}")
        if attention_mask is None:
            return torch.ones(instances.shape[:2], dtype=torch.bool, device=instances.device)
        if attention_mask.shape != instances.shape[:2]:
            raise ValueError(f"attention_mask must have shape {tuple(instances.shape[:2])}, got {tuple(attention_mask.shape)}")
        return as_mask(attention_mask, "attention_mask", "instances", "padding")


class UHopMILForBagClassification(UHopMILPreTrainedModel):
    """U-Hop classifier of bags: a linear classifier on what the queries retrieve from a bag.

    `config.problem_type` selects the loss, as in all models of transformers:
    "single_label_classification" (two classes or more), "multi_label_classification" or
    "regression". A call never changes it.

    Args:
        config: The configuration; `config.num_labels` is the number of classes.

    Examples:
        >>> from modeling_uhop import UHopMILConfig, UHopMILForBagClassification

        >>> model = UHopMILForBagClassification(UHopMILConfig(instance_dim=6, num_labels=2)).eval()
        >>> outputs = model(instances=torch.randn(1, 4, 6), attention_mask=torch.tensor([[1, 1, 1, 0]]))
        >>> outputs.instance_weights[0, 3].item()
        0.0
    """

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: UHopMILConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.loss_type = "ForSequenceClassification"
        self.mil = UHopMILModel(config)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        num_queries = config.num_queries if config.pooling == "hopfield" else 1
        self.classifier = nn.Linear(num_queries * config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        instances: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> UHopMILBagClassifierOutput:
        """Classify bags.

        Args:
            instances: As in `UHopMILModel.forward`.
            attention_mask: As in `UHopMILModel.forward`.
            labels: Targets of the kind that `config.problem_type` names: class indices (B,) or (B,
                1) in [0, num_labels), several labels (B, num_labels) in [0, 1], or numbers for
                regression. If `problem_type` is `None`, a model with one label is a regression;
                otherwise the shape of the labels decides.
            kwargs (Any): Further arguments of `UHopMILModel.forward` and of the loss.

        Returns:
            Logits (B, num_labels) and instance weights (B, N), and the loss if labels are given.

        Raises:
            TypeError: If an input is not a tensor.
            ValueError: As `UHopMILModel.forward`; also if labels are of none of these kinds (the
                message names the example).
        """
        self.check_configuration()
        outputs: UHopMILModelOutput = self.mil(instances, attention_mask=attention_mask, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(self.activation_fn(outputs.pooler_output)))
        check_no_overflow(logits, "bag")
        loss = None if labels is None else label_loss(self, labels, logits, **kwargs)
        return UHopMILBagClassifierOutput(
            loss=loss,
            logits=logits,
            instance_weights=outputs.instance_weights,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _broadcast_mask(mask: torch.Tensor, instances: torch.Tensor) -> torch.Tensor:
    """The mask (B, N) with further axes of length 1, so that it broadcasts over `instances`."""
    return mask.reshape(*mask.shape, *(1,) * (instances.dim() - 2))


def _instance_dropout(mask: torch.Tensor, probability: float) -> torch.Tensor:
    """Remove each instance from the mask with this probability, but keep one per bag."""
    draw = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    kept = (draw >= probability) | (draw == draw.amax(-1, keepdim=True))
    return kept & mask


__all__ = ["UHopMILBagClassifierOutput", "UHopMILForBagClassification", "UHopMILModel", "UHopMILModelOutput", "UHopMILPreTrainedModel"]
