"""Configuration of the U-Hop associative memory."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class UHopMemoryConfig(PreTrainedConfig):
    r"""Configuration of a kernelized associative memory (U-Hop, arXiv 2404.03827, Algorithm 1).

    A query $x$ retrieves from the memories $\xi_1, \dots, \xi_M$ by equation 2.4, with weights from
    the simplex map $\mathrm{Sep}_\alpha$ of the similarities to all memories $\Xi$:

    $$
    T(x) = \sum_\mu p_\mu \xi_\mu, \qquad p = \mathrm{Sep}_\alpha(\beta K(\Xi, x)), \qquad
    K(u, v) = \langle \Phi(u), \Phi(v) \rangle
    $$

    Args:
        pattern_dim (`int`, defaults to 784): Width d of a pattern, at least 1.
        num_memories (`int`, defaults to 0): Number of stored patterns M. `store`, `append` and
            `delete` update it.
        similarity (`str`, defaults to `"kernel"`): How a query is compared with the memories.
            "kernel": $\langle \Phi(\xi), \Phi(x) \rangle$. The others compare raw patterns: "dot",
            "cosine", "l2" and "manhattan" (both minus the distance), or "polynomial" (Krotov and
            Hopfield); see `similarity_scores`.
        feature_dim (`int`, *optional*): Width D of a feature, at least 1, for "kernel"; `None`
            means `pattern_dim`.
        feature_init (`str`, defaults to `"normal"`): Initial value of $\Phi$: "identity",
            "orthogonal" or "normal"; see `FeatureMap`.
        normalize_features (`bool`, defaults to `True`): Whether features are scaled to unit norm
            (section D.2). $\Phi$ is then not linear and the energy may rise along retrieval; with a
            linear $\Phi$ it never rises.
        degree (`int`, defaults to 10): Degree of "polynomial", at least 1.
        alpha (`float`, defaults to 1.5): Tsallis exponent in [1, 2] of the simplex map from
            similarities to weights: 1 softmax, 1.5 entmax, 2 sparsemax. The defaults of alpha and
            beta, with the default separation step, retrieved best on validation images of digits,
            MNIST and CIFAR-10.
        beta (`float`, defaults to 30): Inverse temperature $\beta$, positive.
        update_steps (`int`, defaults to 1): Update steps of a retrieval, at least 1.

    Raises:
        ValueError: If a value is out of range. The message names the field, its value and what is
            accepted.
        StrictDataclassFieldValidationError: If a value has the wrong type or is not one of the
            choices (an error class of `huggingface_hub`).

    Examples:
        >>> from modeling_uhop import UHopMemoryConfig, UHopMemoryModel

        >>> memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=64))
        >>> memory.config.beta
        30.0
    """

    model_type = "uhop_memory"

    pattern_dim: int = 784
    num_memories: int = 0
    similarity: Literal["kernel", "dot", "cosine", "l2", "manhattan", "polynomial"] = "kernel"
    feature_dim: int | None = None
    feature_init: Literal["identity", "orthogonal", "normal"] = "normal"
    normalize_features: bool = True
    degree: int = 10
    alpha: float | int = 1.5
    beta: float | int = 30.0
    update_steps: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_hopfield()

    def validate_hopfield(self):
        """Check the ranges of fields that the type annotations do not express."""
        for name, least in (("pattern_dim", 1), ("num_memories", 0), ("degree", 1), ("update_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1, or None to use pattern_dim, got {self.feature_dim}")
        if not 1.0 <= self.alpha <= 2.0:
            raise ValueError(f"alpha must lie in [1, 2], got {self.alpha}")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, got {self.beta}")


__all__ = ["UHopMemoryConfig"]
