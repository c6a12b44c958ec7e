"""Corrupted copies of patterns: the queries of retrieval experiments, and the positives of a separation step that expects them."""

from collections.abc import Callable

import torch

from .feature_map import norms
from .simplex import at_least_fp32
from .validation import as_floats, is_finite, is_readable


Corruption = Callable[[torch.Tensor], torch.Tensor]


def mask_patterns(patterns: torch.Tensor, fraction: float = 0.5, generator: torch.Generator | None = None) -> torch.Tensor:
    """Patterns (..., d) with each entry set to zero with probability `fraction` in [0, 1]; the others are not rescaled.

    Raises:
        ValueError: For a fraction outside [0, 1].
        TypeError: For what is no tensor.

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
    """Patterns (..., d) plus Gaussian noise of `level` times each pattern's own norm (U-Hop, section 4.1).

    Raises:
        ValueError: For a negative level, and (on a CPU) where finite patterns with their noise leave the range of their dtype.
        TypeError: For what is no tensor.

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
