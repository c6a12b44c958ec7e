"""UHopMemory model configuration"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class UHopMemoryConfig(PreTrainedConfig):
    r"""
    Configuration of a kernelized associative memory (U-Hop, arXiv 2404.03827, Algorithm 1).

    Args:
        pattern_dim (`int`, defaults to 784): Width d of a pattern.
        num_memories (`int`, defaults to 0): How many patterns are stored; kept up to date by `store`, `append` and `delete`.
        similarity (`str`, defaults to `"kernel"`): How queries are compared: "kernel" <Phi(x), Phi(xi)>; on raw patterns "dot", "cosine",
            "l2" and "manhattan" (minus the distance), or "polynomial" (Krotov & Hopfield); see `similarity_scores`.
        feature_dim (`int`, *optional*): Width D of a feature of "kernel"; `None` for `pattern_dim`.
        feature_init (`str`, defaults to `"normal"`): How Phi begins: "identity", "orthogonal" or "normal".
        normalize_features (`bool`, defaults to `True`): Whether features are scaled to unit norm (section D.2). Phi is then not linear,
            and the energy may rise along retrieval, as it never does with a linear one.
        degree (`int`, defaults to 10): Degree of "polynomial".
        alpha (`float`, defaults to 1.5): Tsallis exponent in [1, 2] of the simplex map from similarities to
            weights: 1 softmax, 1.5 entmax, 2 sparsemax. The defaults of alpha and beta, with the default
            separation step, retrieved best on validation images of digits, MNIST and CIFAR-10.
        beta (`float`, defaults to 30): Inverse temperature, positive.
        update_steps (`int`, defaults to 1): Retrieval steps, at least 1.

    Raises:
        A validation error that names the field, its value and what is accepted.

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
        """Ranges that types alone do not express."""
        for name, least in (("pattern_dim", 1), ("num_memories", 0), ("degree", 1), ("update_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"feature_dim must be at least 1, or None for pattern_dim, got {self.feature_dim}")
        if not 1.0 <= self.alpha <= 2.0:
            raise ValueError(f"alpha must lie in [1, 2], got {self.alpha}")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be positive and finite, got {self.beta}")


__all__ = ["UHopMemoryConfig"]
