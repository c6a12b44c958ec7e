"""UHopProjection: a query or key projection that reads Phi(x)."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..feature_map import FeatureMap
from ..memories import MemorySet
from .low_rank import LowRankFeatureMap


class UHopProjection(nn.Module, BaseTunerLayer):
    """A projection W of queries, of keys, or of both and values, that computes W Phi(x).

    Args:
        base_layer: The projection of the model, possibly inside another adapter.
        query: The query projection whose Phi this key projection shares; `None` if it has its own.
        value_rows: Which outputs are values, boolean (out,); they are computed without Phi.
    """

    adapter_layer_names = ("uhop_phi",)

    base_layer: Any
    uhop_phi: nn.ModuleDict
    value_rows: torch.Tensor | None

    def __init__(self, base_layer: nn.Module, query: "UHopProjection | None" = None, value_rows: torch.Tensor | None = None):
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: torch.Tensor | None = None
        self._merged_inner = False
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        self.register_buffer("value_rows", None if value_rows is None else value_rows.to(device), persistent=False)
        if query is None:
            self.uhop_phi = nn.ModuleDict()
        else:
            # Because the state dict must hold Phi once, the key projection has it as a plain attribute,
            # which `nn.Module` does not register.
            object.__setattr__(self, "uhop_phi", query.uhop_phi)

    def add_map(self, adapter_name: str, width: int, config: Any) -> None:
        """Add the feature map of an adapter, in the device and dtype of the projection."""
        phi = FeatureMap(width, feature_init=config.init) if config.rank is None else LowRankFeatureMap(width, config.rank)
        self.uhop_phi[adapter_name] = phi
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _maps(self, adapter_names: list[str] | None = None) -> list[Any]:
        """The feature maps of some adapters, by default the active ones, in the order in which they act."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [self.uhop_phi[name] for name in names if name in self.uhop_phi]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute W Phi(x); values, and everything if the adapter is off or merged, without Phi."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        maps = [] if self.disable_adapters or self.merged else self._maps()
        if not maps:
            return self.base_layer(x, *args, **kwargs)
        features = x
        for phi in maps:
            features = phi(features.to(_dtype(phi)))
        projected = self.base_layer(features.to(x.dtype), *args, **kwargs)
        if self.value_rows is None:
            return projected
        return torch.where(self.value_rows, self.base_layer(x, *args, **kwargs), projected)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        r"""Put Phi into the weight, $W \leftarrow W \Phi$, computed in fp64. An inner adapter is merged first.

        Args:
            safe_merge: Whether to refuse a weight that is not finite.
            adapter_names: Adapters to merge; `None` for the active ones.

        Raises:
            ValueError: If the weight is quantized, or with `safe_merge` is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.uhop_phi]
        if not names:
            return
        base = self.get_base_layer()
        if type(base) not in (nn.Linear, Conv1D) or type(base.weight) is not nn.Parameter or not base.weight.is_floating_point():
            raise ValueError(
                f"Phi can be merged only into a plain nn.Linear or Conv1D, got {type(base).__name__} with a weight of "
                f"{type(base.weight).__name__} in {base.weight.dtype}; keep the adapter, or load the model without quantization"
            )
        if isinstance(self.base_layer, BaseTunerLayer) and not self.base_layer.merged:
            self.base_layer.merge(safe_merge=safe_merge)
            self._merged_inner = True
        if self._unmerged is None:
            self._unmerged = base.weight.detach().clone()
        original = self._unmerged.to(base.weight.device)
        merged = [*self.merged_adapters, *names]
        rows = original.T if isinstance(base, Conv1D) else original
        wide = rows.double()
        for phi in reversed(self._maps(merged)):
            wide = wide @ phi.weight.to(wide)
        if self.value_rows is not None:
            wide[self.value_rows] = rows[self.value_rows].double()
        if safe_merge and not wide.isfinite().all():
            raise ValueError(f"the weight that {names} would give is not finite; the adapter is broken")
        base.weight.copy_(wide.T if isinstance(base, Conv1D) else wide)
        self.merged_adapters = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight from before the merge, bit for bit, from a copy that the merge has kept."""
        base: Any = self.get_base_layer()
        if self._unmerged is not None:
            base.weight.copy_(self._unmerged)
        self._unmerged, self.merged_adapters = None, []
        if self._merged_inner:
            self.base_layer.unmerge()
        self._merged_inner = False

    def extra_repr(self) -> str:
        return "" if self.value_rows is None else f"{int(self.value_rows.sum())} outputs are values"


class UHopKeyProjection(UHopProjection):
    """A projection that gives the keys: what it reads are the memories of its attention layer."""

    def memory_set(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> MemorySet:
        """Return what the layer retrieves from, as `observe` asks: Phi, and x as memories (B, M, d)."""
        maps: list[Any] = [] if self.disable_adapters or self.merged else self._maps()
        memories = x.unsqueeze(0) if x.dim() == 2 else x.flatten(1, -2)
        if not maps:
            return MemorySet(None, memories)
        phi: Any = maps[0] if len(maps) == 1 else nn.Sequential(*maps)
        return MemorySet(phi, memories.to(_dtype(maps[0])))


def _dtype(phi: nn.Module) -> torch.dtype:
    """The dtype in which a feature map computes."""
    return next(phi.parameters()).dtype
