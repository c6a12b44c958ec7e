"""Corrupted copies of patterns, for retrieval experiments and the "denoising" separation step."""

from collections.abc import Callable

import torch

from .checks import as_floats
from .feature_map import norms
from .precision import at_least_fp32, is_finite, is_readable


Corruption = Callable[[torch.Tensor], torch.Tensor]


def mask_patterns(patterns: torch.Tensor, fraction: float = 0.5, generator: torch.Generator | None = None) -> torch.Tensor:
    """Set each entry of the patterns to zero with probability `fraction`; others are not rescaled.

    Args:
        patterns: Patterns (..., d).
        fraction: Probability in [0, 1].
        generator: Random state; `None` for PyTorch's global one.

    Returns:
        Masked patterns (..., d).

    Raises:
        ValueError: If the fraction is outside [0, 1].
        TypeError: If `patterns` is not a tensor.

    Examples:
        >>> from modeling_uhop import mask_patterns
        >>> mask_patterns(torch.full((100, 8), 2.0), fraction=0.25).unique().tolist()
        [0.0, 2.0]
    """
    (patterns,) = as_floats(patterns=patterns)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    kept = torch.rand(patterns.shape, generator=generator, device=patterns.device) >= fraction
    return patterns * kept


def add_noise(patterns: torch.Tensor, level: float = 1.0, generator: torch.Generator | None = None) -> torch.Tensor:
    r"""Add Gaussian noise with `level` times the norm of each pattern.

    This is the noise of U-Hop (arXiv 2404.03827), section 4.1:

    $$
    \tilde{x} = x + \mathrm{level} \cdot |x| \, \epsilon / |\epsilon|, \qquad \epsilon \sim N(0, I)
    $$

    Args:
        patterns: Patterns (..., d).
        level: Norm of the noise relative to the norm of the pattern, at least 0.
        generator: Random state; `None` for PyTorch's global one.

    Returns:
        Noisy patterns (..., d), in the dtype of `patterns`.

    Raises:
        ValueError: If the level is negative, or (on a CPU) if finite patterns with noise leave the
            range of their dtype.
        TypeError: If `patterns` is not a tensor.

    Examples:
        >>> from modeling_uhop import add_noise
        >>> patterns = torch.randn(3, 8)
        >>> noise = add_noise(patterns, level=0.5) - patterns
        >>> torch.allclose(noise.norm(dim=-1), 0.5 * patterns.norm(dim=-1))
        True
    """
    (patterns,) = as_floats(patterns=patterns)
    if not level >= 0.0:
        raise ValueError(f"level must be at least 0, got {level}")
    noise = torch.randn(patterns.shape, generator=generator, device=patterns.device, dtype=torch.float32)
    wide = at_least_fp32(patterns)
    noise = noise / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
    noisy = (wide + level * norms(wide).unsqueeze(-1) * noise.to(wide.dtype)).to(patterns.dtype)
    if is_readable(noisy) and not is_finite(noisy) and is_finite(patterns):
        raise ValueError(f"patterns with noise must be finite in {patterns.dtype}, got some as large as {patterns.abs().max():.4g}")
    return noisy
