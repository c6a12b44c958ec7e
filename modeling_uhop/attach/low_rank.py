"""A feature map of low rank."""

import torch
from torch import nn
from transformers import initialization as init

from ..feature_map import FeatureMap


class LowRankFeatureMap(FeatureMap):
    """Feature map Phi(u) = u + B A u, with A of shape (r, d) and B of shape (d, r).

    B starts at zero, and A at independent normal entries of variance 1 / d.
    """

    def __init__(self, pattern_dim: int, rank: int):
        nn.Module.__init__(self)
        self.normalize = False
        self.feature_init = "identity"
        self.down = nn.Parameter(torch.empty(rank, pattern_dim))
        self.up = nn.Parameter(torch.empty(pattern_dim, rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set Phi to the identity, and A to new random values."""
        init.normal_(self.down, mean=0.0, std=self.down.shape[1] ** -0.5)
        init.zeros_(self.up)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The matrix I + B A, of shape (d, d)."""
        return torch.eye(self.up.shape[0], device=self.up.device, dtype=self.up.dtype) + self.up @ self.down

    def forward(self, patterns: torch.Tensor) -> torch.Tensor:
        """Map patterns (..., d) to features (..., d)."""
        return patterns + nn.functional.linear(nn.functional.linear(patterns, self.down), self.up)

    def extra_repr(self) -> str:
        rank, pattern_dim = getattr(self.down, "ds_shape", self.down.shape)
        return f"{pattern_dim} -> {pattern_dim}, rank={rank}"
