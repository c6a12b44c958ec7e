"""What a set of memories can hold: margins, bounds, certificates, confusions, metastable states."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from .feature_map import magnitude, norms


def margins(kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Margin `Delta_mu = K_mumu - max_{nu != mu} K_numu` (M,) of a kernel matrix (M, M), and the rival nu that attains it.

    A single memory has margin +inf and no rival (-1).
    """
    size = kernel.shape[-1]
    if size == 1:
        return torch.full((1,), math.inf, dtype=kernel.dtype, device=kernel.device), torch.full((1,), -1, device=kernel.device)
    others = kernel.masked_fill(torch.eye(size, dtype=torch.bool, device=kernel.device), -math.inf)
    closest, rivals = others.max(dim=0)
    return kernel.diagonal() - closest, rivals


def retrieval_error_bound(memories: torch.Tensor, features: torch.Tensor, beta: float, radius: float | None = None) -> torch.Tensor:
    """Bound on `|T(x) - xi_mu|` after one step at alpha = 1, for each memory (M,) (U-Hop equation 1.3, kernelized).

    `2 m (M - 1) exp(-beta (Delta_mu - 2 m_Phi r))` with m the largest norm of a memory, m_Phi of a feature, and Delta_mu the margin. It
    holds for every query whose feature is within r of that of xi_mu; `None` is the paper's radius R_Phi, half the smallest distance in
    feature space. Of unit-norm features the smallest margin never exceeds 2 R_Phi: for the closest pair the bound at R_Phi is at least
    2 m (M - 1) and says little, and a smaller radius says more. For the un-kernelized model pass the memories as features.
    """
    count = len(memories)
    if count < 2:
        return torch.zeros(count, dtype=memories.dtype, device=memories.device)
    largest, largest_feature = norms(memories).max(), norms(features).max()
    reach = 0.5 * smallest_distance(features) if radius is None else radius
    margin, _ = margins(features @ features.transpose(-1, -2))
    return 2.0 * largest * (count - 1) * torch.exp(-beta * (margin - 2.0 * largest_feature * reach))


def smallest_distance(points: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of the closest pair of points (M, D), M at least 2."""
    # Differences of squares that neither overflow nor vanish.
    size = magnitude(points.flatten())
    return torch.nn.functional.pdist(points / size).min() * size.squeeze()


def is_exactly_retrieved(kernel: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    """Which memories are fixed points that retrieve themselves alone, (M,) boolean: `beta Delta_mu >= 1 / (alpha - 1)`.

    This is the inequality of the proof in section E.3 of U-Hop; the statement (2.10) in the text has its sign reversed. At alpha = 1 no
    memory among several is retrieved exactly.
    """
    margin, _ = margins(kernel)
    if alpha == 1.0:
        return torch.full_like(margin, len(kernel) == 1, dtype=torch.bool)
    return beta * margin >= 1.0 / (alpha - 1.0)


def is_well_separated(features: torch.Tensor, beta: float) -> bool:
    """Whether unit-norm features (M, D) meet `Delta_min >= ln(2 (M - 1) / R_Phi) / beta` (U-Hop+), R_Phi half the smallest distance."""
    if len(features) < 2:
        return True
    margin, _ = margins(features @ features.transpose(-1, -2))
    radius = 0.5 * smallest_distance(features)
    return bool(margin.min() >= torch.log(2.0 * (len(features) - 1) / radius) / beta)


def separation_bounds(num_memories: int, feature_dim: int) -> tuple[float, float]:
    """Lower and upper bound on the largest possible `Delta_min = min (1 - <z_mu, z_nu>)` of M unit vectors (U-Hop+, Proposition 3.1).

    `1/2 [sqrt(pi)/M Gamma((D+1)/2)/Gamma(D/2+1)]^(2/(D-1))` and `2 [2 sqrt(pi)/M Gamma((D+1)/2)/Gamma(D/2)]^(1/(D-1))`.

    Raises:
        ValueError: If there are fewer than 2 memories or 2 dimensions.
    """
    if num_memories < 2 or feature_dim < 2:
        raise ValueError(f"num_memories and feature_dim must be at least 2, got {num_memories} and {feature_dim}")
    half = (feature_dim + 1) / 2
    log_lower = 0.5 * math.log(math.pi) - math.log(num_memories) + math.lgamma(half) - math.lgamma(feature_dim / 2 + 1)
    log_upper = math.log(2) + 0.5 * math.log(math.pi) - math.log(num_memories) + math.lgamma(half) - math.lgamma(feature_dim / 2)
    return 0.5 * math.exp(2 * log_lower / (feature_dim - 1)), 2.0 * math.exp(log_upper / (feature_dim - 1))


def metastable_sizes(weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """Number of memories in each retrieval, `|p|_0` (..., Q) of weights (..., Q, M): above 0.01 at alpha = 1, else above 0 (U-Hop+).

    >>> from modeling_uhop import metastable_sizes

    >>> metastable_sizes(torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]]), alpha=2.0).tolist()
    [1, 2]
    """
    return (weights > (0.01 if alpha == 1.0 else 0.0)).sum(-1)


@dataclass
class MemoryReport:
    """What a memory set can hold; one entry a memory unless said otherwise. Print it, or see `to_dataframe` and `plot`.

    Attributes:
        beta, alpha: The settings that it holds for.
        margin: `Delta_mu` in feature space.
        rival: The memory that comes closest, -1 if there is none.
        error_bound: Bound on the error of one step for queries near the memory, at alpha = 1 (equation 1.3).
        own_error_bound: The same for the memory itself as the query, which is radius 0: the bound that `error` is checked against.
        error: Distance between a memory and what it retrieves in one step.
        weight: Weight of a memory in its own retrieval.
        exact: Whether it is certified to retrieve itself alone (alpha > 1), in the memory's own precision.
        metastable_size: Number of memories that its retrieval mixes.
        query_metastable_size: The same for each query that was given, (Q,); `None` if none was.
        separation: Smallest `1 - cos` between two features, one number; nan for fewer than two memories.
        separation_bounds: Bounds on the largest separation that is possible (Proposition 3.1); nan where they do not apply.
        well_separated: Whether unit-norm features meet the well-separation condition.
        confusions: Triples (mu, nu, p): querying with memory mu gives more than 0.01 weight to another memory nu; largest first.
        duplicates: Pairs (mu, nu) of equal memories.
        rounding: How far an error may be off by rounding, in the memory's own dtype.
    """

    beta: float
    alpha: float
    margin: torch.Tensor
    rival: torch.Tensor
    error_bound: torch.Tensor
    own_error_bound: torch.Tensor
    error: torch.Tensor
    weight: torch.Tensor
    exact: torch.Tensor
    metastable_size: torch.Tensor
    query_metastable_size: torch.Tensor | None
    separation: float
    separation_bounds: tuple[float, float]
    well_separated: bool
    confusions: list[tuple[int, int, float]]
    duplicates: list[tuple[int, int]]
    rounding: float

    @property
    def within_bound(self) -> torch.Tensor | None:
        """Whether each memory's error keeps to its bound, up to rounding; `None` at alpha > 1, where the bound says nothing."""
        return self.error <= self.own_error_bound + self.rounding if self.alpha == 1.0 else None

    @property
    def certificate_failures(self) -> list[int]:
        """Memories certified exact that did not retrieve themselves alone: there should be none."""
        return (self.exact & ~self.alone).nonzero().flatten().tolist()

    @property
    def alone(self) -> torch.Tensor:
        """Which memories retrieve themselves, and no other with them."""
        return (self.metastable_size == 1) & (self.weight > 0.5)

    def _columns(self) -> dict[str, list[Any]]:
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "query_metastable_size"}
        return {name: value.tolist() for name, value in tensors.items() if isinstance(value, torch.Tensor)}

    def to_dataframe(self) -> Any:
        """A pandas DataFrame with a row for each memory."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("MemoryReport.to_dataframe needs pandas") from error
        return pandas.DataFrame(self._columns()).rename_axis("memory")

    def plot(self, axis: Any = None) -> Any:
        """Margins, smallest first, coloured by whether a memory is retrieved exactly or nearly so; the matplotlib axis."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("MemoryReport.plot needs matplotlib") from error
        axis = pyplot.subplots(layout="constrained")[1] if axis is None else axis
        order = self.margin.argsort()
        alone = self.alone[order].tolist()
        axis.bar(range(len(order)), self.margin[order].tolist(), color=["C0" if ok else "C3" for ok in alone], width=1.0)
        if self.alpha > 1.0:
            axis.axhline(1.0 / (self.beta * (self.alpha - 1.0)), color="black", linestyle="--", label="exact from here on")
            axis.legend()
        axis.set(
            xlabel="memory, by margin", ylabel="margin", title=f"{sum(alone)} of {len(alone)} memories retrieve themselves alone (blue)"
        )
        return axis

    def _checks(self) -> list[str]:
        """What the theory says against what retrieving gave."""
        checks = []
        if self.within_bound is not None:
            beyond = (~self.within_bound).nonzero().flatten().tolist()
            checks.append(f"errors of memories {beyond} exceed bound (1.3)" if beyond else "all errors within bound (1.3)")
        if self.exact.any():
            failed = self.certificate_failures
            checks.append(f"certificates of memories {failed} failed" if failed else "all certificates verified by retrieving")
        return checks or ["no bound and no certificate applies"]

    def __str__(self) -> str:
        count = len(self.margin)
        lower, upper = self.separation_bounds
        lines = [
            f"{count} memories at beta={self.beta:g}, alpha={self.alpha:g}",
            f"  separation            {self.separation:.4g} (the best possible lies between {lower:.4g} and {upper:.4g})",
            f"  smallest margin       {self.margin.min().item():.4g}",
            f"  retrieved alone       {int(self.alone.sum())} of {count}, certified exact {int(self.exact.sum())}",
            f"  largest error         {self.error.max().item():.4g} after one step from the memory itself",
            f"  checked               {'; '.join(self._checks())}",
            f"  well separated        {'yes' if self.well_separated else 'no'}",
            f"  duplicates            {self.duplicates if self.duplicates else 'none'}",
        ]
        if self.query_metastable_size is not None and len(self.query_metastable_size) > 0:
            sizes, counts = self.query_metastable_size.unique(return_counts=True)
            mixed = ", ".join(f"{size} ({count})" for size, count in zip(sizes.tolist(), counts.tolist(), strict=True))
            lines.append(f"  memories in a query's retrieval (queries)  {mixed}")
        shown = self.confusions[:10]
        lines += [f"  confusions            {len(self.confusions)}" + (", the largest:" if shown else "")]
        lines += [f"    {memory} also recalls {other} (weight {weight:.3f})" for memory, other, weight in shown]
        lines.append(
            f"  {'memory':>8} {'margin':>10} {'rival':>6} {'weight':>7} {'error':>10} {'bound (1.3)':>12}   smallest margins first"
        )
        for index in self.margin.argsort()[:10].tolist():
            numbers = [column[index].item() for column in (self.margin, self.rival, self.weight, self.error, self.error_bound)]
            lines.append("    {:>6} {:>10.4g} {:>6} {:>7.3f} {:>10.4g} {:>12.4g}".format(index, *numbers))
        return "\n".join(lines)
