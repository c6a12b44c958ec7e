r"""The feature map Phi, which turns an inner product into a learned kernel.

The kernel is $K(u, v) = \langle \Phi(u), \Phi(v) \rangle$ (U-Hop, arXiv 2404.03827, equation 2.1).
"""

import torch
from torch import nn
from transformers import initialization as init

from .checks import check_tensors
from .precision import at_least_fp32


class FeatureMap(nn.Module):
    r"""Linear feature map Phi, the learned part of a kernelized Hopfield model.

    $$
    \Phi(u) = W u, \qquad K(u, v) = \langle \Phi(u), \Phi(v) \rangle
    $$

    This is U-Hop (arXiv 2404.03827), equation 2.1. W has shape (feature_dim, pattern_dim).

    Args:
        pattern_dim: Width d of a pattern, at least 1.
        feature_dim: Width D of a feature (D_Phi in the papers), at least 1. `None` for
            `pattern_dim`.
        feature_init: Initial value of W. "identity" keeps the first min(D, d) coordinates.
            "orthogonal" has orthonormal columns (rows if D < d), so that the kernel is the plain
            inner product if D >= d. "normal" has independent entries of variance 1 / d. If D > d,
            prefer "orthogonal" to "identity", because no separation loss can move the added zero
            rows.
        normalize: Whether features are scaled to unit norm, $\Phi(u) = W u / |W u|$ (section D.2).
            A zero vector stays zero.

    Raises:
        ValueError: If a width is below 1 or `feature_init` is unknown.

    Examples:
        >>> from modeling_uhop import FeatureMap
        >>> phi = FeatureMap(3, 5, feature_init="orthogonal")
        >>> u, v = torch.randn(2, 3)
        >>> torch.allclose(phi(u) @ phi(v), u @ v, atol=1e-5)
        True
    """

    def __init__(self, pattern_dim: int, feature_dim: int | None = None, *, feature_init: str = "orthogonal", normalize: bool = False):
        super().__init__()
        feature_dim = pattern_dim if feature_dim is None else feature_dim
        if pattern_dim < 1 or feature_dim < 1:
            raise ValueError(f"pattern_dim and feature_dim must be at least 1, got {pattern_dim} and {feature_dim}")
        if feature_init not in ("identity", "orthogonal", "normal"):
            raise ValueError(f"feature_init must be one of 'identity', 'orthogonal', 'normal', got {feature_init!r}")
        self.feature_init = feature_init
        self.normalize = normalize
        self.weight = nn.Parameter(torch.empty(feature_dim, pattern_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set W to a new initial value, as `feature_init` says."""
        if self.feature_init == "identity":
            init.eye_(self.weight)
        elif self.feature_init == "normal":
            init.normal_(self.weight, mean=0.0, std=self.weight.shape[1] ** -0.5)
        else:
            # Because QR is not available in half precision, we compute it in fp32. Because transformers
            # replaces the initializer by one without a result under ZeRO-3, we do not use its result.
            weight = torch.empty_like(self.weight, dtype=torch.float32)
            nn.init.orthogonal_(weight)
            init.copy_(self.weight, weight.to(self.weight.dtype))

    @torch.no_grad()
    def normalize_rows(self) -> None:
        """Scale each row of W to unit norm, as U-Hop's Algorithm 1 does after Stage I.

        A zero row stays zero.
        """
        self.weight.copy_(unit_norm(self.weight))

    def forward(self, patterns: torch.Tensor) -> torch.Tensor:
        """Map patterns (..., pattern_dim) to features (..., feature_dim).

        Integer patterns are converted to the dtype of W.

        Raises:
            TypeError: If `patterns` is not a tensor.
        """
        check_tensors(patterns=patterns)
        if not patterns.is_floating_point():
            patterns = patterns.to(self.weight.dtype)
        if self.normalize:
            # Because W u may overflow or vanish, we normalise W (u / s) with the size s of u, which
            # has the same direction.
            return unit_norm(nn.functional.linear(patterns / magnitude(patterns), self.weight))
        return nn.functional.linear(patterns, self.weight)

    def extra_repr(self) -> str:
        # Because ZeRO-3 of DeepSpeed takes the values of a parameter away, it keeps the shape.
        feature_dim, pattern_dim = getattr(self.weight, "ds_shape", self.weight.shape)
        return f"{pattern_dim} -> {feature_dim}, feature_init={self.feature_init!r}, normalize={self.normalize}"


def magnitude(vectors: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return a power of two close to the largest absolute entry along `dim`.

    The axis `dim` stays, with size 1. Division by it is exact, and the quotient can be squared and
    summed without overflow or underflow. It is 1 for zeros, and carries no gradient.
    """
    largest = vectors.detach().abs().amax(dim, keepdim=True)
    tiny = torch.finfo(vectors.dtype).tiny
    return torch.where(largest > 0, torch.pow(2.0, largest.log2().floor()).clamp(min=tiny, max=0.25 / tiny), 1.0)


def norms(vectors: torch.Tensor) -> torch.Tensor:
    """Compute Euclidean norms (...) of vectors (..., D) of any finite size, in fp32 or better."""
    wide = at_least_fp32(vectors)
    size = magnitude(wide)
    return torch.linalg.vector_norm(wide / size, dim=-1) * size.squeeze(-1)


def unit_norm(vectors: torch.Tensor) -> torch.Tensor:
    """Scale vectors (..., D) of any size to unit Euclidean norm, computed in fp32 or better.

    A zero vector stays zero, with a finite gradient.
    """
    wide = at_least_fp32(vectors)
    wide = wide / magnitude(wide)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / torch.where(norm > 0, norm, 1.0)).to(vectors.dtype)
