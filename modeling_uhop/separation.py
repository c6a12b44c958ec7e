"""Stage I, the separation step: spread the stored patterns over the unit sphere of the feature space."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .corruption import Corruption, mask_patterns
from .feature_map import FeatureMap, unit_norm
from .separation_blocks import blocked_separation_loss
from .simplex import at_least_fp32
from .validation import as_floats, check_tensor, check_tensors, is_finite, is_readable


SEPARATION_KINDS = ("average", "squared", "nearest", "per_memory")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def separation_loss(
    features: torch.Tensor,
    *,
    kind: str = "average",
    temperature: float = 0.25,
    mask: torch.Tensor | None = None,
    sample: int | None = None,
) -> torch.Tensor:
    """How crowded memories are in feature space; the lower, the better separated.

    With features scaled to unit norm, K = <Phi_mu, Phi_nu> and tau the temperature (tau = 1 / (2 t); the papers use t = 2, tau = 0.25):

    - "average":    log mean_{mu != nu} exp((K - 1) / tau), that is log E exp(-t |Phi_mu - Phi_nu|^2)   (U-Hop, 2404.03827, equation 2.6)
    - "squared":    log mean_{mu != nu} exp((K^2 - 1) / tau), least when features are orthogonal        (U-Hop, equation 3.2)
    - "nearest":    max_{mu != nu} (K - 1) / tau, the closest pair alone                                (U-Hop, section G.2)
    - "per_memory": mean_mu log sum_{nu != mu} exp(K / tau), whose minimiser tends to an optimal
                    spherical code as tau -> 0                                                          (U-Hop+, 2410.23126)

    Args:
        features: Features (..., M, D) of M memories, of any norm: they are scaled to the unit sphere here. Leading axes hold
            independent memory sets.
        kind: One of the four above.
        temperature: tau > 0.
        mask: Boolean, either (..., M), True where a memory is present, or (..., M, M), True where a pair counts; told apart by
            their number of axes. An absent memory has no influence, even if it is NaN.
        sample: Look at this many memories, at least 2, drawn anew at every call: for millions of them. The mean of the exponentials over
            pairs stays unbiased, and the loss is its log. `None` for all, which a mask needs.

    Returns:
        The mean loss over the sets that have a pair, a scalar in fp32 or better, differentiable once (twice with a mask of pairs). Memory
        grows with M, not with its square, save with a mask of pairs. Sets without a pair contribute nothing; if no set
        has one, the loss is 0 and so is its gradient.

    Raises:
        ValueError: For an unknown kind, a temperature that is not positive, a mask of another number of axes, or a sample below 2,
            with a mask, or for the nearest pair, which it hardly ever has.
        TypeError: For what is no tensor.

    >>> from modeling_uhop import separation_loss

    >>> crowded = torch.nn.functional.normalize(torch.ones(4, 3) + 0.1 * torch.randn(4, 3), dim=-1)
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
        raise ValueError(f"sample must be at least 2, without a mask, and of a kind other than 'nearest', got {given}")
    if mask is not None and mask.dim() not in (features.dim() - 1, features.dim()):
        raise ValueError(
            f"mask must have {features.dim() - 1} axes (memories) or {features.dim()} (pairs) for features of shape "
            f"{tuple(features.shape)}, got shape {tuple(mask.shape)}"
        )
    count = features.shape[-2]
    features, mask = _subsample(features, mask, sample)
    features = at_least_fp32(features)
    if mask is not None and mask.dim() == features.dim():
        loss = _loss_of_counted_pairs(features, kind, temperature, mask)
    else:
        loss = _loss_of_sets(features, kind, temperature, mask)
    if kind == "per_memory" and features.shape[-2] < count:
        loss = loss + math.log((count - 1) / (features.shape[-2] - 1))  # a sum over the others, of which fewer are here
    return loss


def _loss_of_sets(features: torch.Tensor, kind: str, temperature: float, mask: torch.Tensor | None) -> torch.Tensor:
    """`separation_loss` over all pairs of present memories."""
    size = features.shape[-2]
    if size < 2:
        return (features * 0.0).nan_to_num().sum()
    members = None
    if mask is not None:
        members = mask.expand(features.shape[:-1]).reshape(-1, size)
        features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
    with torch.autocast(features.device.type, enabled=False):
        losses = blocked_separation_loss(features.reshape(-1, size, features.shape[-1]), members, kind, temperature)
    count = max(1, len(losses)) if members is None else (members.sum(-1) > 1).sum().clamp(min=1)
    return losses.sum() / count


def _loss_of_counted_pairs(features: torch.Tensor, kind: str, temperature: float, mask: torch.Tensor) -> torch.Tensor:
    """`separation_loss` over the pairs (..., M, M) that count, whose similarities are all there at once."""
    if features.shape[-2] < 2:
        return (features * 0.0).nan_to_num().sum()
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
    """log-sum-exp over the last axis of what is counted, 0 where nothing is, and where anything is."""
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
    """How badly memories are recognised from corrupted copies: `mean_mu -log softmax_nu(<Phi(x_mu), Phi(xi_nu)> / tau)_mu` (InfoNCE).

    The per-memory loss of U-Hop+ with a corrupted copy x_mu of the memory as its positive: beside spreading memories it keeps the copies
    where they belong. At tau = 1 / beta it is minus the log weight of the right memory in a retrieval at alpha = 1.

    Args:
        corrupted_features: Features (..., Q, D) of copies, in the order of the memories that they are of.
        features: Features (..., M, D) of memories, Q of them first.
        temperature: tau > 0.
        mask: Boolean (..., M), True where a memory is present: others are no choice, and their copies do not count.

    Returns:
        The mean over copies, a scalar in fp32 or better; 0 without any.

    Raises:
        ValueError: For a temperature that is not positive.
        TypeError: For what is no tensor.
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
    if mask is None:
        losses = -scores.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
        return losses.sum() / max(1, losses.numel())
    # Finite, so that a set without any memory has a finite gradient.
    scores = scores.masked_fill(~stored_mask.mT, torch.finfo(scores.dtype).min)
    losses = -scores.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    mask = mask.expand_as(losses)
    return losses.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def maximize_separation(
    feature_map: FeatureMap,
    memories: torch.Tensor,
    *,
    method: str = "uhop",
    steps: int = 100,
    lr: float = 1e-3,
    optimizer: str = "adam",
    kind: str | None = None,
    temperature: float | None = None,
    final_temperature: float = 0.01,
    corruption: Corruption = mask_patterns,
    batch_size: int | None = None,
    mask: torch.Tensor | None = None,
) -> list[float]:
    """Stage I on one feature map: gradient steps on W alone.

    - "uhop" (U-Hop Algorithm 1): `separation_loss` at a fixed temperature, then the rows of W are scaled to unit norm. Default kind
      "average", temperature 0.25.
    - "uhop+" (U-Hop+, projected gradient descent `W <- Proj(W - lr dL)`): the rows are scaled to unit norm after every step, while the
      temperature falls geometrically from `temperature` (0.25) to `final_temperature`. Default kind "per_memory".
    - "denoising": `denoising_loss` of fresh corrupted copies in every step, at a fixed temperature (0.1).

    Args:
        feature_map: The map to move, in place; one in half precision by way of fp32. Nothing else moves, and no `.grad` is left behind.
        memories: Patterns (..., M, d).
        steps: Gradient steps N, at least 0.
        lr: Learning rate.
        optimizer: "adam" or "sgd".
        kind, temperature, mask: As in `separation_loss`; "denoising" has no kind and takes no mask.
        corruption: For "denoising", a function from patterns to corrupted patterns.
        batch_size: How many memories, drawn anew in every step, a step looks at; `None` for all. At least 2.

    Returns:
        The loss before each step, then the loss of the final map (before it is rounded to half precision, if it is): `steps + 1` values.
        Under "uhop+" each is at its own step's temperature.

    Raises:
        ValueError: For an unknown method or optimizer, a number out of its range, or a frozen map.
        TypeError: For memories that are no tensor.
        RuntimeError: Under `torch.inference_mode()`.

    >>> from modeling_uhop import FeatureMap, maximize_separation

    >>> phi = FeatureMap(8, normalize=True)
    >>> history = maximize_separation(phi, 1.0 + torch.rand(6, 8), steps=20, lr=1e-2)
    >>> history[-1] < history[0]
    True
    """
    check_tensors(memories=memories)
    memories = memories if memories.is_floating_point() else memories.to(feature_map.weight.dtype)
    check_tensor(mask, "mask")
    if method not in ("uhop", "uhop+", "denoising"):
        raise ValueError(f"method must be 'uhop', 'uhop+' or 'denoising', got {method!r}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if batch_size is not None and batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
    if method == "denoising" and (kind is not None or mask is not None):
        raise ValueError("method 'denoising' must come without a kind or a mask")
    for name, tau in (("temperature", temperature), ("final_temperature", final_temperature)):
        if tau is not None and not tau > 0:
            raise ValueError(f"{name} must be positive, got {tau}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("separation needs gradients, which torch.inference_mode() forbids; torch.no_grad() does not")
    if not feature_map.weight.requires_grad:
        raise ValueError("the feature map must be able to move, but it is frozen (requires_grad=False)")
    kind = kind or ("per_memory" if method == "uhop+" else "average")
    temperature = temperature or (0.1 if method == "denoising" else 0.25)
    final_temperature = final_temperature if method == "uhop+" else temperature
    moving = feature_map
    is_half = _is_half(feature_map.weight)
    if is_half:
        # The whole step, normalising of rows too, in fp32.
        moving, memories = copy.deepcopy(feature_map).float(), memories.float()

    def loss_at(step: int) -> torch.Tensor:
        tau = annealed(temperature, final_temperature, max(0, min(step, steps - 1)), steps)
        seen, seen_mask = _subsample(memories, mask, batch_size)
        if method == "denoising":
            return denoising_loss(moving(corruption(seen)), moving(seen), temperature=tau)
        return separation_loss(moving(seen), kind=kind, temperature=tau, mask=seen_mask)

    parameters = [moving.weight]
    private = SeparationOptimizer(optimizer, parameters, lr)
    history = []
    for step in logging.tqdm(range(steps), desc="separation", leave=False, delay=3):
        with torch.enable_grad():
            loss = loss_at(step)
            gradients = torch.autograd.grad(loss, parameters)
        if is_readable(loss) and not is_finite(gradients[0]):
            raise ValueError(
                "the gradient of the separation loss must be finite, but that of memories so small or so large is not; scale them"
            )
        private.step(gradients)
        if method == "uhop+":
            moving.normalize_rows()
        history.append(loss.item())
    if method == "uhop":
        moving.normalize_rows()
    with torch.no_grad():
        history.append(loss_at(steps).item())
        if is_half:
            feature_map.weight.copy_(moving.weight)
    return history


def _subsample(memories: torch.Tensor, mask: torch.Tensor | None, batch_size: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A random part of the memories (..., M, d), with its part of the mask."""
    count = memories.shape[-2]
    if batch_size is None or batch_size >= count:
        return memories, mask
    chosen = torch.randperm(count, device=memories.device)[:batch_size]
    if mask is not None:
        mask = mask[..., chosen, :][..., chosen] if mask.dim() == memories.dim() else mask[..., chosen]
    return memories[..., chosen, :], mask


def annealed(start: float, end: float, step: int, steps: int) -> float:
    """Geometric path from `start` at step 0 to `end` at step `steps - 1`."""
    return start * (end / start) ** (step / max(steps - 1, 1))


class SeparationOptimizer:
    """Stage I's private optimizer, which leaves the parameters' own `.grad` as it was.

    Steps of half-precision parameters are taken in fp32: small ones would be lost in rounding, and Adam's epsilon is 0 in fp16.

    Args:
        name: "sgd" (the papers') or "adam".
        parameters: What it moves.
        lr: Learning rate, at least 0.

    Raises:
        ValueError: For another name, or a negative rate.
    """

    def __init__(self, name: str, parameters: Iterable[nn.Parameter], lr: float):
        if name not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {tuple(OPTIMIZERS)}, got {name!r}")
        if not lr >= 0:
            raise ValueError(f"the separation learning rate must be at least 0, got {lr}")
        self.parameters = list(parameters)
        self.wide = [parameter.detach().float() if _is_half(parameter) else parameter for parameter in self.parameters]
        self.inner = OPTIMIZERS[name](self.wide, lr=lr)

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """One step with a gradient for each parameter, or `None` for one that stays."""
        kept = [wide.grad for wide in self.wide]
        for parameter, wide, gradient in zip(self.parameters, self.wide, gradients, strict=True):
            if wide is not parameter:
                # Others may have moved it since.
                wide.copy_(torch.where(wide.to(parameter.dtype) == parameter, wide, parameter.float()))
            wide.grad = None if gradient is None else at_least_fp32(gradient)
        self.inner.step()
        for parameter, wide, before in zip(self.parameters, self.wide, kept, strict=True):
            wide.grad = before
            if wide is not parameter:
                parameter.copy_(wide)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs, with the fp32 copies by the places of their parameters."""
        copies = {place: wide for place, wide in enumerate(self.wide) if wide is not self.parameters[place]}
        return {**self.inner.state_dict(), "wide": copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.inner.load_state_dict({name: part for name, part in state.items() if name != "wide"})
        for place, wide in state.get("wide", {}).items():
            self.wide[place].copy_(wide)


def _is_half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
