"""Base classes of the configurations: the fields that the model families share, and their checks."""

import difflib
import math
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging


logger = logging.get_logger(__name__)


@strict
class HopfieldConfig(PreTrainedConfig):
    r"""Base class of all configurations: the fields of a retrieval from memories.

    A field that the class does not have is kept, as in every `PreTrainedConfig`, and gives a
    warning.

    Args:
        alpha (`float`, defaults to 1): Tsallis exponent $\alpha$ of the simplex map, in [1, 2]: 1
            is softmax (modern Hopfield model), 2 is sparsemax (sparse Hopfield model), and values
            between them are alpha-entmax.
        feature_dim (`int`, *optional*): Width D of a feature, at least 1; `None` means the width of
            the input.
        feature_init (`str`, defaults to `"orthogonal"`): Initial value of $\Phi$: "identity",
            "orthogonal" or "normal"; see `FeatureMap`.
        update_steps (`int`, defaults to 1): Update steps of a retrieval, at least 1.

    Raises:
        ValueError: If a value is out of range or two fields do not fit together. The message names
            the field, its value and what is accepted.
        StrictDataclassFieldValidationError: If a value has the wrong type or is not one of the
            choices (an error class of `huggingface_hub`).
    """

    alpha: float | int = 1.0
    feature_dim: int | None = None
    feature_init: Literal["identity", "orthogonal", "normal"] = "orthogonal"
    update_steps: int = 1

    def __post_init__(self, **kwargs):
        # Because a saved configuration may hold fields of another version, only a construction in
        # code gives the warning. A saved one always names its model type.
        for name in () if "model_type" in kwargs else kwargs:
            if name not in _OPTIONS and name not in self.attribute_map and not hasattr(type(self), name):
                close = difflib.get_close_matches(name, [*self.__dataclass_fields__, *self.attribute_map, *_OPTIONS], 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                logger.warning(f"{name} is not a field of {type(self).__name__} and does not change the model{hint}")
        super().__post_init__(**kwargs)
        self.validate_hopfield()

    def validate_hopfield(self):
        """Check ranges and combinations of fields that the type annotations do not express."""
        check_fields(self, "lie in [1, 2]", "alpha")
        check_fields(self, "be at least 1", "update_steps", feature_dim="the width of the input")


@strict
class HopfieldLayersConfig(HopfieldConfig):
    r"""Base class of the configurations of models with Hopfield layers.

    Args:
        beta (`float`, *optional*): Inverse temperature $\beta$, positive; `None` means 1 /
            sqrt(head width).
        learnable_alpha (`bool`, defaults to `False`): Whether each head learns its own exponent in
            (1, 2). The exponents start at `alpha`, which must then lie strictly between 1 and 2,
            for example 1.5.
        learnable_beta (`bool`, defaults to `False`): Whether each head learns its own inverse
            temperature, which begins at `beta` (arXiv 2112.13492).
        use_feature_map (`bool`, defaults to `True`): Whether queries and keys pass through a
            feature map $\Phi$. Without it the layers are plain Hopfield layers, and the model has
            no feature map to separate.
        value_source (`str`, defaults to `"memory"`): What the values $V$ are. "memory": $W_V \Xi$,
            as in the authors' code. "projected_memory": $W_V W_K \Xi$, as in equation 3.1 of U-Hop;
            this needs `feature_dim` to equal the width of the input.
        qkv_bias (`bool`, defaults to `True`): Whether the query, key and value projections have a
            bias.
        kwargs (Any): The fields of `HopfieldConfig`.
    """

    beta: float | int | None = None
    learnable_alpha: bool = False
    learnable_beta: bool = False
    use_feature_map: bool = True
    value_source: Literal["memory", "projected_memory"] = "memory"
    qkv_bias: bool = True

    def validate_hopfield(self):
        super().validate_hopfield()
        check_fields(self, "be positive and finite", beta="1 / sqrt(head width)")
        if self.learnable_alpha and not 1.0 < self.alpha < 2.0:
            raise ValueError(f"a learnable alpha must begin strictly between 1 and 2, got alpha={self.alpha}")
        features = self.feature_dim if self.use_feature_map and self.feature_dim is not None else self.hidden_size
        if self.value_source == "projected_memory" and features != self.hidden_size:
            raise ValueError(
                "value_source 'projected_memory' applies W_K to features and to raw memories, so feature_dim must equal "
                f"hidden_size {self.hidden_size}, got {features}"
            )


# Arguments that every configuration of transformers accepts and that are neither fields nor
# properties.
_OPTIONS = ("attn_implementation", "experts_implementation", "per_layer_config")

ACTIVATION = f"be one of {sorted(ACT2FN)}"
_RULES = {
    "be at least 0": lambda value: value >= 0,
    "be at least 1": lambda value: value >= 1,
    "be positive and finite": lambda value: 0 < value < math.inf,
    "lie in [0, 1)": lambda value: 0.0 <= value < 1.0,
    "lie in [1, 2]": lambda value: 1.0 <= value <= 2.0,
    ACTIVATION: lambda value: value in ACT2FN,
}


def check_fields(config: PreTrainedConfig, rule: str, *names: str, **optional: str) -> None:
    """Raise a `ValueError` for the first of these fields that does not follow one of `_RULES`.

    Each field in `optional` may be `None`, and comes with what `None` means.
    """
    for name in (*names, *optional):
        value = getattr(config, name)
        if value is not None and not _RULES[rule](value):
            otherwise = f", or None for {optional[name]}" if name in optional else ""
            raise ValueError(f"{name} must {rule}{otherwise}, got {value!r}")


__all__ = ["HopfieldConfig", "HopfieldLayersConfig"]
