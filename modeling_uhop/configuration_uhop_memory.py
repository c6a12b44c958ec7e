"""Configuration of the U-Hop associative memory."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_hopfield import HopfieldConfig, check_fields


@strict
class UHopMemoryConfig(HopfieldConfig):
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
        feature_init (`str`, defaults to `"normal"`): As in `HopfieldConfig`.
        normalize_features (`bool`, defaults to `True`): Whether features are scaled to unit norm
            (section D.2). $\Phi$ is then not linear and the energy may rise along retrieval; with a
            linear $\Phi$ it never rises.
        degree (`int`, defaults to 10): Degree of "polynomial", at least 1.
        alpha (`float`, defaults to 1.5): As in `HopfieldConfig`. The defaults of alpha and beta,
            with the default separation step, retrieved best on validation images of digits, MNIST
            and CIFAR-10.
        beta (`float`, defaults to 30): Inverse temperature $\beta$, positive.
        kwargs (Any): Further fields of a retrieval: see `HopfieldConfig`.

    Examples:
        >>> from modeling_uhop import UHopMemoryConfig, UHopMemoryModel

        >>> memory = UHopMemoryModel(UHopMemoryConfig(pattern_dim=64))
        >>> memory.config.beta
        30.0
    """

    model_type = "uhop_memory"
    _auto_class = "AutoConfig"

    pattern_dim: int = 784
    num_memories: int = 0
    similarity: Literal["kernel", "dot", "cosine", "l2", "manhattan", "polynomial"] = "kernel"
    feature_init: Literal["identity", "orthogonal", "normal"] = "normal"
    normalize_features: bool = True
    degree: int = 10
    alpha: float | int = 1.5
    beta: float | int = 30.0

    def validate_hopfield(self):
        """Check the ranges of fields that the type annotations do not express."""
        super().validate_hopfield()
        check_fields(self, "be at least 1", "pattern_dim", "degree")
        check_fields(self, "be at least 0", "num_memories")
        check_fields(self, "be positive and finite", "beta")


__all__ = ["UHopMemoryConfig"]
