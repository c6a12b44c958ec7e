"""UHopAdapterConfig: what PEFT adds to a model."""

import enum
from dataclasses import dataclass
from numbers import Integral, Real

from peft import PeftConfig


class AdapterType(str, enum.Enum):
    """The name of this method in PEFT.

    PEFT finds a method by the name in `adapter_config.json`. Without `import modeling_uhop` it
    raises `KeyError: 'MODELING_UHOP'`, which names the package to import.
    """

    MODELING_UHOP = "MODELING_UHOP"


@dataclass
class UHopAdapterConfig(PeftConfig):
    r"""Add Phi and Hopfield attention to a model that one already has; a configuration of PEFT.

    In each attention layer, one feature map Phi acts on what the query and the key projections read
    (U-Hop, arXiv 2404.03827, equation 3.1). Values are computed without it:

    $$
    \mathrm{Sep}_\alpha\big(\beta \, (W_Q \Phi(X)) (W_K \Phi(\Xi))^\top\big) \, W_V \, \Xi
    $$

    Only Phi is trained. With `init="identity"` and `alpha=None` the model computes what it computed
    before.

    Args:
        alpha: Tsallis exponent in [1, 2] of the attention, as in `use_hopfield_attention`. `None`
            keeps the model's attention.
        feature_map: Whether there is a Phi. If not, `alpha` is needed, and nothing is trained
            except `modules_to_save`.
        rank: With a rank r of at least 1, Phi(u) = u + B A u, with A of shape (r, d) and B of shape
            (d, r). `None` for Phi(u) = W u.
        init: Initial value of W: "identity", "orthogonal" or "normal", as in `FeatureMap`. With a
            rank it must be "identity": then B is zero.
        layers: Numbers of the layers that are adapted, or `None` for all. The number of a layer is
            the first number in its name, such as 3 in `encoder.layer.3.attention.self`.
        target_modules: Names of projections (ends of names, or one regular expression for a whole
            name), as elsewhere in PEFT. A layer is adapted if its query or its key projection
            matches. `None` for all.
        projections: Pairs of attributes of an attention module, such as `[["to_q", "to_k"]]`, that
            are its query and key projections, beside those that are known.
        modules_to_save: Modules that are trained and saved with the adapter, such as a new
            classifier.

    Raises:
        ValueError: If a value is out of range; when it is attached, if the model has no attention
            with query and key projections, or an attention layer whose projections are not known.
        TypeError: If `projections` is not a list of pairs.

    Examples:
        >>> from peft import get_peft_model
        >>> from transformers import BertConfig, BertModel
        >>> from modeling_uhop import UHopAdapterConfig
        >>> sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> bert = BertModel(BertConfig(**sizes, intermediate_size=32))
        >>> model = get_peft_model(bert, UHopAdapterConfig(alpha=1.5))
        >>> model.get_nb_trainable_parameters()[0]
        2048
    """

    alpha: float | None = None
    feature_map: bool = True
    rank: int | None = None
    init: str = "identity"
    layers: list[int] | None = None
    target_modules: list[str] | str | None = None
    projections: list[list[str]] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = AdapterType.MODELING_UHOP
        if self.alpha is not None and (isinstance(self.alpha, bool) or not isinstance(self.alpha, Real) or not 1.0 <= self.alpha <= 2.0):
            raise ValueError(f"alpha must be a number in [1, 2] or None, got {self.alpha!r}")
        if not self.feature_map and self.alpha is None:
            raise ValueError("there is nothing to add: give an alpha, or feature_map=True")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, Integral) or self.rank < 1):
            raise ValueError(f"rank must be an integer of at least 1 or None, got {self.rank!r}")
        accepted = ("identity", "orthogonal", "normal") if self.rank is None else ("identity",)
        if self.init not in accepted:
            raise ValueError(f"init must be one of {accepted}{'' if self.rank is None else ' with a rank'}, got {self.init!r}")
        if self.projections is not None:
            pairs = [list(pair) for pair in self.projections if isinstance(pair, list | tuple) and len(pair) == 2]
            if len(pairs) != len(self.projections):
                raise TypeError(f'projections must be a list of pairs, such as [["to_q", "to_k"]], got {self.projections!r}')
            self.projections = pairs
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)
        if self.layers is not None:
            if not all(isinstance(layer, Integral) and not isinstance(layer, bool) and layer >= 0 for layer in self.layers):
                raise ValueError(f"layers must be integers of at least 0, or None, got {self.layers!r}")
            self.layers = sorted(self.layers)
