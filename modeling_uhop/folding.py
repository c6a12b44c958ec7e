"""Folding: compute the function of a layer or a model with fewer products, for inference."""

import copy
from typing import Any

import torch
from torch import nn

from .checks import is_plain
from .feature_map import FeatureMap


@torch.no_grad()
def fold_layer(layer: Any) -> None:
    r"""Fold Phi of a `HopfieldAttention` into its projections, in place.

    Because Phi(u) = W u is linear, $W_Q \Phi(u) = (W_Q W) u$, and the same holds for $W_K$. If values
    pass through W_K, it is folded into W_V too. A layer without Phi stays as it is.

    Raises:
        ValueError: If Phi or a projection is not a plain matrix: if it is inside an adapter,
            hooked, offloaded or quantized.
    """
    if layer.feature_map is None:
        return
    plain = {"feature_map": FeatureMap, "q_proj": nn.Linear, "k_proj": nn.Linear, "v_proj": nn.Linear}
    for name, kind in plain.items():
        module = getattr(layer, name)
        if not is_plain(module, kind):
            found = type(module)
            changed = "one that is hooked, patched or offloaded, or has quantized weights"
            what = changed if found is kind else f"{found.__module__}.{found.__name__}"
            raise ValueError(
                f"{name} must be a plain {kind.__name__} to be folded, got {what}; "
                "if the model has adapters, fold the model that merge_and_unload() returns"
            )
    if layer.value_source == "projected_memory":
        layer.v_proj = _compose(layer.v_proj, layer.k_proj.weight, layer.k_proj.bias)
        layer.value_source = "memory"
    layer.q_proj = _compose(layer.q_proj, layer.feature_map.weight)
    layer.k_proj = _compose(layer.k_proj, layer.feature_map.weight)
    layer.feature_map = None


def fold_model(model: Any) -> Any:
    """Return a copy of a model whose Hopfield layers are folded, with a configuration that says so."""
    folded = copy.deepcopy(model)
    for module in folded.modules():
        if hasattr(module, "fold_feature_map"):
            module.fold_feature_map()
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_feature_map", False):
            config.use_feature_map, config.value_source, config.feature_dim = False, "memory", None
    for module in folded.modules():
        if hasattr(module, "remember_configuration"):
            module.remember_configuration()
    return folded


def _compose(outer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """Return the linear layer `outer(weight x + bias)`, composed in fp64."""
    like = {"device": weight.device, "dtype": weight.dtype}
    composed = nn.utils.skip_init(nn.Linear, weight.shape[1], outer.out_features, outer.bias is not None, **like)
    composed.train(outer.training).requires_grad_(outer.weight.requires_grad)
    wide = outer.weight.double()
    composed.weight.copy_(wide @ weight.double())
    if outer.bias is not None:
        composed.bias.copy_(outer.bias if bias is None else wide @ bias.double() + outer.bias.double())
    return composed
