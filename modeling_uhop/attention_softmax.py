"""Hopfield attention at alpha = 1, by PyTorch's kernels for softmax attention."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from .precision import is_traced


def accepts(query, key, value, *, attention_mask=None, **others) -> bool:
    """Return whether `softmax_attention` computes this call of `hopfield_attention`.

    It does if no tensor must be broadcast or cast, there is at least one key, and the mask needs no
    gradient.
    """
    learned_mask = attention_mask is not None and attention_mask.requires_grad
    if others.keys() - {"scaling", "dropout"} or learned_mask or not query.dim() == key.dim() == value.dim() == 4:
        return False
    shapes_match = query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1:3] == value.shape[1:3]
    is_nonempty = is_traced() or min(*query.shape, *key.shape, *value.shape) > 0
    return shapes_match and is_nonempty and query.dtype == key.dtype == value.dtype and query.shape[1] % key.shape[1] == 0


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Compute `hopfield_attention` at alpha = 1; a query without keys gets zeros."""
    without_keys = None
    if attention_mask is not None:
        is_boolean = attention_mask.dtype == torch.bool
        present = attention_mask if is_boolean else attention_mask > torch.finfo(attention_mask.dtype).min
        without_keys = ~present.any(-1, keepdim=True)
        # Because kernels differ in the result for a row without keys, we give it all keys, and set
        # its output to zero afterwards.
        attention_mask = present | without_keys if is_boolean else attention_mask.masked_fill(~present & ~without_keys, -torch.inf)
        if not is_boolean:
            attention_mask = attention_mask.masked_fill(without_keys, 0.0).to(query.dtype)
    grouped = bool(query.shape[1] != key.shape[1])
    if grouped and attention_mask is not None and query.device.type != "cpu":
        # Because the kernels of an accelerator form all weights if heads are shared and there is a
        # mask, we copy the shared heads instead.
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        grouped = False
    output = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=grouped)
    return output if without_keys is None else output.masked_fill(without_keys, 0.0)
