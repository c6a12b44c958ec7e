"""Corrupted copies of patterns: the queries of retrieval experiments, and the positives of a separation step that expects them."""

from collections.abc import Callable

import torch


Corruption = Callable[[torch.Tensor], torch.Tensor]


def mask_patterns(patterns: torch.Tensor, fraction: float = 0.5, generator: torch.Generator | None = None) -> torch.Tensor:
    """Patterns (..., d) with each entry set to zero with probability `fraction` in [0, 1]; the others are not rescaled.

    Raises:
        ValueError: For a fraction outside [0, 1].

    >>> from modeling_uhop import mask_patterns

    >>> mask_patterns(torch.full((100, 8), 2.0), fraction=0.25).unique().tolist()
    [0.0, 2.0]
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
    kept = torch.rand(patterns.shape, generator=generator, device=patterns.device) >= fraction
    return patterns * kept


def add_noise(patterns: torch.Tensor, level: float = 1.0, generator: torch.Generator | None = None) -> torch.Tensor:
    """Patterns (..., d) plus Gaussian noise of `level` times each pattern's own norm (U-Hop, section 4.1).

    Raises:
        ValueError: For a negative level.

    >>> from modeling_uhop import add_noise

    >>> patterns = torch.randn(3, 8)
    >>> noise = add_noise(patterns, level=0.5) - patterns
    >>> torch.allclose(noise.norm(dim=-1), 0.5 * patterns.norm(dim=-1))
    True
    """
    if not level >= 0.0:
        raise ValueError(f"level must be at least 0, got {level}")
    noise = torch.randn(patterns.shape, generator=generator, device=patterns.device, dtype=torch.float32).to(patterns.dtype)
    norms = torch.linalg.vector_norm(patterns, dim=-1, keepdim=True) / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
    return patterns + level * norms * noise
