"""UHopProjection: a query or key projection that reads Phi(x)."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from ..feature_map import FeatureMap
from ..memories import MemorySet
from .low_rank import LowRankFeatureMap


# What the projections of a layer share in a training step. The key is the query projection; the value
# is the id of the projection that has computed Phi(x), then x, the versions of x and Phi, and Phi(x).
_SHARED: "WeakKeyDictionary[nn.Module, tuple[int, torch.Tensor, list[int], torch.Tensor]]" = WeakKeyDictionary()


class UHopProjection(nn.Module, BaseTunerLayer):
    """A projection W of queries, of keys, or of both and values, that computes W Phi(x).

    In training mode, the projections of one layer compute Phi(x) once for both, and a fused
    projection computes its value rows from x and the others from Phi(x). In evaluation mode, each
    computes everything by itself, so that Phi = I changes no bit.

    Args:
        base_layer: The projection of the model, possibly inside another adapter.
        query: The query projection whose Phi this key projection shares; `None` if it has its own.
        value_rows: Which outputs are values, boolean (out,); they are computed without Phi.
    """

    adapter_layer_names = ("uhop_phi",)

    base_layer: Any
    uhop_phi: nn.ModuleDict
    value_rows: torch.Tensor | None
    order: torch.Tensor | None
    _query: "UHopProjection | None"

    def __init__(self, base_layer: nn.Module, query: "UHopProjection | None" = None, value_rows: torch.Tensor | None = None):
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: torch.Tensor | None = None
        self._merged_inner = False
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        self.register_buffer("value_rows", None if value_rows is None else value_rows.to(device), persistent=False)
        # The outputs in the order "not a value, then a value"; `None` if that is the order they have.
        order = None if value_rows is None or bool((value_rows.int().diff() >= 0).all()) else value_rows.int().argsort(stable=True)
        self.register_buffer("order", None if order is None else order.to(device), persistent=False)
        self._others = 0 if value_rows is None else int((~value_rows).sum())
        if query is None:
            self.uhop_phi = nn.ModuleDict()
        else:
            # Because the state dict must hold Phi once, the key projection has it as a plain attribute,
            # which `nn.Module` does not register.
            object.__setattr__(self, "uhop_phi", query.uhop_phi)
        object.__setattr__(self, "_query", query)

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
        features = self._features(x, maps)
        if self.value_rows is None:
            return self.base_layer(features, *args, **kwargs)
        if self.training and _is_plain(self.base_layer):
            return self._by_rows(x, features)
        return torch.where(self.value_rows, self.base_layer(x, *args, **kwargs), self.base_layer(features, *args, **kwargs))

    def _features(self, x: torch.Tensor, maps: list[Any]) -> torch.Tensor:
        """Phi(x); in a training step, what the other projection of the layer has computed from the same x."""
        owner = self if self._query is None else self._query
        shares = self.training and self.value_rows is None and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        versions = [each._version for each in (x, *(parameter for phi in maps for parameter in phi.parameters()))] if shares else []
        # Because another thread may take the entry, it is looked up and removed in one call.
        shared = _SHARED.pop(owner, None) if shares else None
        if shared is not None:
            computed_by, read, before, features = shared
            if computed_by != id(self) and read is x and before == versions:
                return features
        features = x
        for phi in maps:
            features = phi(features.to(_dtype(phi)))
        features = features.to(x.dtype)
        if shares:
            _SHARED[owner] = (id(self), x, versions, features)
        return features

    def _by_rows(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The outputs of a plain fused projection: values from x, the others from Phi(x)."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        weight = weight.T if isinstance(self.base_layer, Conv1D) else weight
        others: Any
        values: Any
        others, values = (slice(None, self._others), slice(self._others, None))
        if self.order is not None:
            others, values = self.order[others], self.order[values]
        parts = [linear(read, weight[rows], None if bias is None else bias[rows]) for read, rows in ((features, others), (x, values))]
        outputs = torch.cat(parts, -1)
        return outputs if self.order is None else outputs[..., self.order.argsort()]

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


def _is_plain(projection: nn.Module) -> bool:
    """Return whether a fused projection is its weight and bias, and nothing has to run before or after it."""
    hooks = projection._forward_hooks or projection._forward_pre_hooks or "forward" in vars(projection)
    weight: Any = getattr(projection, "weight", None)
    return type(projection) in (nn.Linear, Conv1D) and not hooks and type(weight) is nn.Parameter and weight.dim() == 2
