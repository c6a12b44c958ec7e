"""Losses of the separation step (Stage I): how crowded memories are in feature space."""

import math

import torch

from .checks import as_floats, check_tensor
from .feature_map import unit_norm
from .precision import at_least_fp32
from .separation_blocks import blocked_separation_loss


SEPARATION_KINDS = ("average", "squared", "nearest", "per_memory")


def separation_loss(
    features: torch.Tensor,
    *,
    kind: str = "average",
    temperature: float = 0.25,
    mask: torch.Tensor | None = None,
    sample: int | None = None,
) -> torch.Tensor:
    r"""Measure how crowded memories are in feature space; a lower loss is a better separation.

    Features are scaled to unit norm, $K_{\mu\nu} = \langle \Phi_\mu, \Phi_\nu \rangle$, and $\tau$
    is the temperature ($\tau = 1 / (2 t)$; the papers use $t = 2$, that is $\tau = 0.25$). The
    choices of `kind` are:

    - "average": $\log \mathrm{mean}_{\mu \ne \nu} \exp((K_{\mu\nu} - 1) / \tau)$, that is
        $\log E \exp(-t |\Phi_\mu - \Phi_\nu|^2)$ (U-Hop, arXiv 2404.03827, equation 2.6).
    - "squared": $\log \mathrm{mean}_{\mu \ne \nu} \exp((K_{\mu\nu}^2 - 1) / \tau)$, which is
        smallest for orthogonal features (U-Hop, equation 3.2).
    - "nearest": $\max_{\mu \ne \nu} (K_{\mu\nu} - 1) / \tau$, which depends on the closest pair
        only (U-Hop, section G.2).
    - "per_memory": $\mathrm{mean}_\mu \log \sum_{\nu \ne \mu} \exp(K_{\mu\nu} / \tau)$, whose
        minimiser tends to an optimal spherical code as $\tau \to 0$ (U-Hop+, arXiv 2410.23126).

    Args:
        features: Features (..., M, D) of M memories, of any norm. Leading axes hold independent
            memory sets.
        kind: One of the four kinds above.
        temperature: The temperature tau, positive.
        mask: Boolean. A mask (..., M) is True where a memory is present; a mask (..., M, M) is True
            where a pair counts. The number of axes tells them apart. An absent memory has no
            influence, even if it is NaN.
        sample: Number of memories to use, at least 2, drawn again at each call; useful for millions
            of memories. The mean of the exponentials over pairs stays unbiased; the loss is its
            logarithm. `None` uses all memories, and a mask requires `None`.

    Returns:
        The mean loss over the sets that have a pair, a scalar in fp32 or better. Sets without a
            pair contribute nothing. If no set has a pair, the loss and its gradient are 0. The loss
            is differentiable once, or twice with a mask of pairs. Its use of computer memory grows
            with M, or with M squared with a mask of pairs.

    Raises:
        ValueError: If the kind is unknown, the temperature is not positive, or the mask has another
            number of axes. Also if `sample` is below 2, or is combined with a mask or with
            `kind="nearest"`: a random sample rarely contains the closest pair.
        TypeError: If an input is not a tensor.

    Examples:
        >>> from modeling_uhop import separation_loss
        >>> crowded = 1.0 + 0.1 * torch.randn(4, 3)
        >>> (separation_loss(torch.eye(4)) < separation_loss(crowded)).item()
        True
    """
    (features,) = as_floats(features=features)
    check_tensor(mask, "mask")
    if kind not in SEPARATION_KINDS:
        raise ValueError(f"kind must be one of {SEPARATION_KINDS}, got {kind!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if sample is not None and (sample < 2 or kind == "nearest" or mask is not None):
        given = f"sample={sample}, kind={kind!r}" + (" and a mask" if mask is not None else "")
        raise ValueError(
            f"sample must be at least 2, without a mask, and of a kind other than 'nearest', got {given}; use sample=None for these"
        )
    if mask is not None and mask.dim() not in (features.dim() - 1, features.dim()):
        raise ValueError(
            f"mask must have {features.dim() - 1} axes (memories) or {features.dim()} (pairs) for features of shape "
            f"{tuple(features.shape)}, got shape {tuple(mask.shape)}"
        )
    count = features.shape[-2]
    features, mask = subsample(features, mask, sample)
    features = at_least_fp32(features)
    if features.shape[-2] < 2:
        return (features * 0.0).nan_to_num().sum()
    if mask is not None and mask.dim() == features.dim():
        loss = _loss_of_counted_pairs(features, kind, temperature, mask)
    else:
        loss = _loss_of_sets(features, kind, temperature, mask)
    if kind == "per_memory" and features.shape[-2] < count:
        # Because this loss is a sum over the other memories, we scale the sum over the sample up.
        loss = loss + math.log((count - 1) / (features.shape[-2] - 1))
    return loss


def _loss_of_sets(features: torch.Tensor, kind: str, temperature: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Compute `separation_loss` over all pairs of present memories."""
    size, members = features.shape[-2], None
    if mask is not None:
        members = mask.expand(features.shape[:-1]).reshape(-1, size)
        features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
    with torch.autocast(features.device.type, enabled=False):
        losses = blocked_separation_loss(features.reshape(-1, size, features.shape[-1]), members, kind, temperature)
    count = max(1, len(losses)) if members is None else (members.sum(-1) > 1).sum().clamp(min=1)
    return losses.sum() / count


def _loss_of_counted_pairs(features: torch.Tensor, kind: str, temperature: float, mask: torch.Tensor) -> torch.Tensor:
    """Compute `separation_loss` over the pairs (..., M, M) that count.

    All similarities are formed at once.
    """
    different = ~torch.eye(features.shape[-2], dtype=torch.bool, device=features.device)
    pairs = mask.expand(*features.shape[:-1], features.shape[-2]) & different
    members = pairs.any(-1) | pairs.any(-2)
    features = unit_norm(features.masked_fill(~members.unsqueeze(-1), 0.0))
    with torch.autocast(features.device.type, enabled=False):
        similarity = features @ features.mT
    if kind == "squared":
        similarity = similarity.square()
    if kind == "per_memory":
        log_sums, present = _log_sum(similarity / temperature, pairs)
        rows = present.sum(-1)
        losses = log_sums.sum(-1) / rows.clamp(min=1)
        present = rows > 0
    else:
        exponents, pairs = ((similarity - 1.0) / temperature).flatten(-2), pairs.flatten(-2)
        if kind == "nearest":
            present = pairs.any(-1)
            nearest = exponents.masked_fill(~pairs, -math.inf).amax(-1)
            losses = torch.where(present, nearest, 0.0)
        else:
            log_sums, present = _log_sum(exponents, pairs)
            losses = log_sums - pairs.sum(-1).clamp(min=1).to(log_sums.dtype).log()
    return losses.sum() / present.expand_as(losses).sum().clamp(min=1)


def _log_sum(exponents: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-sum-exp over the entries of the last axis that count, and whether there are any.

    The sum is 0 if no entry counts.
    """
    present = counted.any(-1)
    exponents = exponents.masked_fill(~counted, -math.inf).masked_fill(~present.unsqueeze(-1), 0.0)
    return torch.where(present, torch.logsumexp(exponents, -1), 0.0), present


def denoising_loss(
    corrupted_features: torch.Tensor,
    features: torch.Tensor,
    *,
    temperature: float = 0.1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Measure how badly memories are recognised from corrupted copies (InfoNCE loss).

    $$
    \mathrm{mean}_\mu \; -\log \mathrm{softmax}_\nu
    \left( \langle \Phi(x_\mu), \Phi(\xi_\nu) \rangle / \tau \right)_\mu
    $$

    This is the per-memory loss of U-Hop+ with a corrupted copy $x_\mu$ of each memory $\xi_\mu$ as
    its positive. It spreads the memories and keeps each copy close to its memory. At
    $\tau = 1 / \beta$ it is minus the log weight of the correct memory in a retrieval at alpha = 1.
    It is not in the papers.

    Args:
        corrupted_features: Features (..., Q, D) of copies, in the order of their memories.
        features: Features (..., M, D) of memories. The first Q are the memories of the copies.
        temperature: The temperature tau, positive.
        mask: Boolean (..., M), True where a memory is present. An absent memory is not a candidate,
            and its copy does not count.

    Returns:
        The mean over copies, a scalar in fp32 or better; 0 without any copy.

    Raises:
        ValueError: If the temperature is not positive.
        TypeError: If an input is not a tensor.
    """
    corrupted_features, features = as_floats(corrupted_features=corrupted_features, features=features)
    check_tensor(mask, "mask")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if mask is not None:
        stored_mask, mask = mask.unsqueeze(-1), mask[..., : corrupted_features.shape[-2]]
        features = features.masked_fill(~stored_mask, 0.0)
        corrupted_features = corrupted_features.masked_fill(~mask.unsqueeze(-1), 0.0)
    queries, stored = unit_norm(at_least_fp32(corrupted_features)), unit_norm(at_least_fp32(features))
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries @ stored.mT / temperature
    if mask is not None:
        # Because a set without any memory needs a finite gradient, we use a finite value, not -inf.
        scores = scores.masked_fill(~stored_mask.mT, torch.finfo(scores.dtype).min)
    losses = -scores.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    if mask is None:
        return losses.sum() / max(1, losses.numel())
    mask = mask.expand_as(losses)
    return losses.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def subsample(memories: torch.Tensor, mask: torch.Tensor | None, batch_size: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw a random subset of the memories (..., M, d), and the same subset of the mask."""
    count = memories.shape[-2]
    if batch_size is None or batch_size >= count:
        return memories, mask
    chosen = torch.randperm(count, device=memories.device)[:batch_size]
    if mask is not None:
        mask = mask[..., chosen, :][..., chosen] if mask.dim() == memories.dim() else mask[..., chosen]
    return memories[..., chosen, :], mask
