r"""Separation losses in blocks of pairs, without a matrix of all pairs.

The gradient is computed in the same pass as the loss. A pair (mu, nu) of unit features enters the
loss only through $K = \langle \Phi_\mu, \Phi_\nu \rangle$. Therefore its share of the gradient is a
multiple of $\Phi_\nu$ for mu, and of $\Phi_\mu$ for nu. Each block adds two matrix products to the
gradient and is then discarded. Blocks lie on and above the diagonal.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .feature_map import magnitude
from .precision import is_readable


# Number of rows and of columns of a block: 1 MB of fp32.
_BLOCK = 512


class Block(NamedTuple):
    """Similarities between two ranges of memories.

    Attributes:
        rows: The range of the first memories.
        columns: The range of the second memories.
        similarity: Similarities (S, rows, columns), -inf where a pair does not count.
    """

    rows: slice
    columns: slice
    similarity: torch.Tensor


def blocked_separation_loss(features: torch.Tensor, members: torch.Tensor | None, kind: str, temperature: float) -> torch.Tensor:
    """Compute the separation losses (S,) of S sets of features.

    The equations are those of `separation_loss`. The loss of a set without a pair is 0. It is
    differentiable once.

    Args:
        features: Features (S, M, D) in fp32 or better, of any norm.
        members: Boolean (S, M), True where a memory is present; `None` if all are.
        kind: As in `separation_loss`.
        temperature: As in `separation_loss`.
    """
    needs_gradient = torch.is_grad_enabled() and features.requires_grad
    losses: torch.Tensor = _BlockedSeparation.apply(features, members, kind, temperature, needs_gradient)
    return losses


class _BlockedSeparation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, members, kind, temperature, needs_gradient):
        losses = features.new_empty(len(features))
        gradient = torch.empty_like(features) if needs_gradient else None
        sets = max(1, _BLOCK**2 // (features.shape[1] * max(features.shape[1:])))
        for first in range(0, len(features), sets):
            part = slice(first, first + sets)
            size = magnitude(features[part])
            unit = features[part] / size
            norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
            norm = torch.where(norm > 0, norm, 1.0)
            unit.div_(norm)
            present = None if members is None else members[part]
            if gradient is None:
                losses[part] = _LOSSES[kind](unit, present, temperature, None)
                continue
            unit_gradient = torch.zeros_like(unit)
            losses[part] = _LOSSES[kind](unit, present, temperature, unit_gradient)
            radial = torch.linalg.vecdot(unit, unit_gradient).unsqueeze(-1)
            torch.div(unit_gradient.addcmul_(unit, radial, value=-1.0), norm * size, out=gradient[part])
        if needs_gradient:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.view(-1, 1, 1), None, None, None, None


def _blocks(features: torch.Tensor, members: torch.Tensor | None, scale: float = 1.0) -> Iterator[Block]:
    """Yield blocks of pairs mu < nu with scaled similarities; all blocks share one buffer."""
    ranges = [slice(start, start + _BLOCK) for start in range(0, features.shape[1], _BLOCK)]
    size = min(_BLOCK, features.shape[1])
    buffer = features.new_empty(len(features) * size**2)
    on_and_below = features.new_full((size, size), -torch.inf).tril_()
    for index, rows in enumerate(ranges):
        scaled = features[:, rows] * scale
        for columns in ranges[index:]:
            others = features[:, columns].mT
            shape = (len(features), scaled.shape[1], others.shape[2])
            similarity = torch.bmm(scaled, others, out=buffer[: math.prod(shape)].view(shape))
            if members is not None:
                similarity.masked_fill_(~members[:, rows, None] | ~members[:, None, columns], -torch.inf)
            if rows == columns:
                similarity += on_and_below[: shape[1], : shape[2]]
            yield Block(rows, columns, similarity)


def _add_to_gradient(gradient: torch.Tensor, features: torch.Tensor, block: Block, weights: torch.Tensor) -> None:
    """Add the gradient of the pairs of a block, each with its weight."""
    if block.rows == block.columns:
        gradient[:, block.rows].baddbmm_(weights + weights.mT, features[:, block.rows])
    else:
        gradient[:, block.rows].baddbmm_(weights, features[:, block.columns])
        gradient[:, block.columns].baddbmm_(weights.mT, features[:, block.rows])


def _mean_of_exponentials(
    features: torch.Tensor, members: torch.Tensor | None, power: int, temperature: float, gradient: torch.Tensor | None
) -> torch.Tensor:
    r"""Compute $\log \mathrm{mean} \exp((K^n - 1) / \tau)$ over pairs, for a power n of 1 or 2.

    The largest exponent so far is subtracted from all exponents.
    """
    largest = features.new_full((len(features), 1, 1), -torch.inf)
    total = features.new_zeros(len(features), 1, 1)
    for block in _blocks(features, members, 1.0 / temperature if power == 1 else 1.0):
        similarity = block.similarity
        if power == 1:
            exponents = similarity
        else:
            exponents = similarity.square().div_(temperature).masked_fill_(similarity == -torch.inf, -torch.inf)
        above = torch.maximum(largest, exponents.amax((1, 2), keepdim=True))
        shrunk = torch.where(largest == above, 1.0, (largest - above).exp())
        weights = exponents.sub_(torch.where(above == -torch.inf, 0.0, above)).exp_()
        total = total * shrunk + weights.sum((1, 2), keepdim=True)
        if gradient is not None:
            # Because the largest exponent seldom rises after a few blocks, we often skip this.
            if not is_readable(shrunk) or bool((shrunk != 1.0).any()):
                gradient *= shrunk
            slopes = weights if power == 1 else weights.mul_(similarity.clamp_(min=-1.0))
            _add_to_gradient(gradient, features, block, slopes)
        largest = above
    pairs = _pairs(features, members)
    present = (pairs > 0).view(-1, 1, 1)
    if gradient is not None:
        gradient.mul_(power / temperature / torch.where(present, total, 1.0))
    return torch.where(present, largest - 1.0 / temperature + total.log(), 0.0).flatten() - pairs.clamp(min=1).log()


# Each of the following functions returns losses (S,). It adds the gradient to `gradient` (S, M, D),
# which is zero at first; `None` if no gradient is needed.
def _average(features: torch.Tensor, members: torch.Tensor | None, temperature: float, gradient: torch.Tensor | None) -> torch.Tensor:
    return _mean_of_exponentials(features, members, 1, temperature, gradient)


def _squared(features: torch.Tensor, members: torch.Tensor | None, temperature: float, gradient: torch.Tensor | None) -> torch.Tensor:
    return _mean_of_exponentials(features, members, 2, temperature, gradient)


def _nearest(features: torch.Tensor, members: torch.Tensor | None, temperature: float, gradient: torch.Tensor | None) -> torch.Tensor:
    """Compute the loss of the closest pair; only the first such pair gets a gradient."""
    largest = features.new_full((len(features),), -torch.inf)
    pairs = torch.zeros(len(features), 2, dtype=torch.long, device=features.device)
    for block in _blocks(features, members):
        closest, place = block.similarity.flatten(1).max(-1)
        width = block.similarity.shape[-1]
        found = torch.stack([place // width + block.rows.start, place % width + block.columns.start], -1)
        pairs = torch.where((closest > largest).unsqueeze(-1), found, pairs)
        largest = torch.maximum(largest, closest)
    present = _pairs(features, members) > 0
    if gradient is not None:
        ends = features.gather(1, pairs.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        share = ends.flip(1) * (present / temperature).view(-1, 1, 1)
        gradient.scatter_add_(1, pairs.unsqueeze(-1).expand_as(share), share)
    return torch.where(present, (largest - 1.0) / temperature, 0.0)


def _per_memory(features: torch.Tensor, members: torch.Tensor | None, temperature: float, gradient: torch.Tensor | None) -> torch.Tensor:
    """Compute the loss of U-Hop+ in two passes.

    The first pass computes the sums of all rows. The second, if a gradient is needed, computes the
    weights from these sums.
    """
    log_sums = features.new_full(features.shape[:2], -torch.inf)
    for block in _blocks(features, members, 1.0 / temperature):
        exponents = block.similarity
        log_sums[:, block.rows] = torch.logaddexp(log_sums[:, block.rows], exponents.logsumexp(2))
        log_sums[:, block.columns] = torch.logaddexp(log_sums[:, block.columns], exponents.logsumexp(1))
    present = log_sums != -torch.inf
    log_sums = torch.where(present, log_sums, 0.0)
    rows = present.sum(-1).clamp(min=1).to(features.dtype)
    losses = log_sums.sum(-1) / rows
    if gradient is None:
        return losses
    for block in _blocks(features, members, 1.0 / temperature):
        exponents = block.similarity
        weights = (exponents - log_sums[:, block.rows, None]).exp_()
        weights += exponents.sub_(log_sums[:, None, block.columns]).exp_()
        _add_to_gradient(gradient, features, block, weights)
    gradient.div_(temperature * rows.view(-1, 1, 1))
    return losses


def _pairs(features: torch.Tensor, members: torch.Tensor | None) -> torch.Tensor:
    """Count the pairs of each set (S,)."""
    count = features.new_full((len(features),), features.shape[1]) if members is None else members.sum(-1).to(features.dtype)
    return count * (count - 1.0) / 2.0


_LOSSES = {"average": _average, "squared": _squared, "nearest": _nearest, "per_memory": _per_memory}
