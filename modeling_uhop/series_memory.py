"""Stored windows of series, and the recall of what followed similar windows."""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_stanhop import STanHopConfig
from .feature_map import unit_norm
from .precision import at_least_fp32
from .simplex import simplex_map


class STanHopWindowMemory(nn.Module):
    r"""Stored windows, from which each series retrieves by the cosine of the pasts.

    For a past $R$ and the stored pasts $Y$ the weights are $p = \mathrm{Sep}_\alpha(\beta \cos(R,
    Y))$. The recalled past is $p Y$, and the recalled future is $p Y_{\mathrm{future}}$. All
    windows are scaled. A stored past of zeros has no direction and is never retrieved.
    """

    def __init__(self, config: STanHopConfig):
        super().__init__()
        self.config = config
        for name, shape in self.shapes(config.num_memories).items():
            self.register_buffer(name, torch.zeros(shape) if config.num_memories > 0 else None)
        self.pasts: torch.Tensor
        self.futures: torch.Tensor

    def shapes(self, count: int) -> dict[str, tuple[int, int, int]]:
        """Shapes of the buffers that hold `count` windows."""
        channels = self.config.num_input_channels
        return {"pasts": (channels, count, self.config.context_length), "futures": (channels, count, self.config.prediction_length)}

    def store(self, pasts: torch.Tensor, futures: torch.Tensor) -> None:
        """Replace the stored windows by scaled pasts (M, L, C) and futures (M, H, C)."""
        self.pasts, self.futures = (values.permute(2, 0, 1).contiguous() for values in (pasts, futures))

    def resize(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for `count` windows; buffers that have the right shape stay."""
        for name, shape in self.shapes(count).items():
            kept = getattr(self, name)
            if count == 0:
                setattr(self, name, None)
            elif kept is None or tuple(kept.shape) != shape:
                setattr(self, name, torch.zeros(shape, dtype=dtype, device=device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the stored windows to zero."""
        if self.pasts is not None:
            init.zeros_(self.pasts)
            init.zeros_(self.futures)

    def weights(self, scaled: torch.Tensor) -> torch.Tensor:
        """Association weights (C, B, num_memories) of windows (B, L, C)."""
        similarity = unit_norm(scaled.permute(2, 0, 1)) @ unit_norm(self.pasts).transpose(-1, -2)
        present = (self.pasts != 0).any(-1).unsqueeze(1)
        return simplex_map(self.config.memory_beta * at_least_fp32(similarity), self.config.memory_alpha, mask=present).to(scaled.dtype)

    def forward(self, scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Recalled past (B, L, C) and future (B, H, C) of windows (B, L, C)."""
        weights = self.weights(scaled)
        return (weights @ self.pasts).permute(1, 2, 0), (weights @ self.futures).permute(1, 2, 0)
