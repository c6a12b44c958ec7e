"""Capacity of a memory set: margins, error bounds, certificates, confusions, metastable states."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from .energy import inner_products
from .feature_map import magnitude, norms, unit_norm
from .precision import at_least_fp32


def margins(kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Compute the margin of each memory, and the rival memory that attains it.

    $$
    \Delta_\mu = K_{\mu\mu} - \max_{\nu \ne \mu} K_{\nu\mu}
    $$

    Args:
        kernel: Kernel matrix K (M, M).

    Returns:
        The margins (M,) and the rivals (M,). A single memory has margin +inf and rival -1 (none).
    """
    size = kernel.shape[-1]
    if size == 1:
        return torch.full((1,), math.inf, dtype=kernel.dtype, device=kernel.device), torch.full((1,), -1, device=kernel.device)
    others = kernel.masked_fill(torch.eye(size, dtype=torch.bool, device=kernel.device), -math.inf)
    closest, rivals = others.max(dim=0)
    return kernel.diagonal() - closest, rivals


def retrieval_error_bound(memories: torch.Tensor, features: torch.Tensor, beta: float, radius: float | None = None) -> torch.Tensor:
    r"""Bound the retrieval error of each memory after one step at alpha = 1 (U-Hop, equation 1.3).

    The bound holds with the kernel of U-Hop (arXiv 2404.03827):

    $$
    |T(x) - \xi_\mu| \le 2 m (M - 1) \exp(-\beta (\Delta_\mu - 2 m_\Phi r))
    $$

    Here m is the largest norm of a memory, $m_\Phi$ is the largest norm of a feature, and
    $\Delta_\mu$ is the margin. The bound holds for every query whose feature is within the radius r
    of the feature of $\xi_\mu$. The radius in the paper is $R_\Phi$, half the smallest distance in
    feature space. For unit-norm features the smallest margin never exceeds $2 R_\Phi$. Therefore
    the bound at $R_\Phi$ is at least 2 m (M - 1) for the closest pair, which is vacuous. A smaller
    radius gives a tighter bound.

    Args:
        memories: Patterns (M, d).
        features: Features (M, D) of the memories. Pass the memories for a model without a kernel.
        beta: Inverse temperature.
        radius: The radius r; `None` for $R_\Phi$.

    Returns:
        Bounds (M,); zeros for a single memory.
    """
    count = len(memories)
    if count < 2:
        return torch.zeros(count, dtype=memories.dtype, device=memories.device)
    largest, largest_feature = norms(memories).max(), norms(features).max()
    query_radius = 0.5 * smallest_distance(features) if radius is None else radius
    margin, _ = margins(features @ features.transpose(-1, -2))
    return 2.0 * largest * (count - 1) * torch.exp(-beta * (margin - 2.0 * largest_feature * query_radius))


def smallest_distance(points: torch.Tensor) -> torch.Tensor:
    """Compute the Euclidean distance of the closest pair of points (M, D), M at least 2."""
    # Because squared differences may overflow or vanish, we scale the points first.
    size = magnitude(points.flatten())
    return torch.nn.functional.pdist(points / size).min() * size.squeeze()


def is_exactly_retrieved(kernel: torch.Tensor, beta: float, alpha: float) -> torch.Tensor:
    r"""Return which memories (M,) are fixed points that retrieve only themselves.

    The condition is $\beta \Delta_\mu \ge 1 / (\alpha - 1)$. It is the inequality in the proof of
    U-Hop (arXiv 2404.03827), section E.3; the statement (2.10) in the text has its sign reversed.
    At alpha = 1 no memory is retrieved exactly, unless it is the only one.
    """
    margin, _ = margins(kernel)
    if alpha == 1.0:
        return torch.full_like(margin, len(kernel) == 1, dtype=torch.bool)
    return beta * margin >= 1.0 / (alpha - 1.0)


def is_well_separated(features: torch.Tensor, beta: float) -> bool:
    r"""Return whether unit-norm features (M, D) meet the well-separation condition of U-Hop+.

    The condition (arXiv 2410.23126) is $\Delta_{\min} \ge \log(2 (M - 1) / R_\Phi) / \beta$, where
    $R_\Phi$ is half the smallest distance between two features.
    """
    if len(features) < 2:
        return True
    margin, _ = margins(features @ features.transpose(-1, -2))
    radius = 0.5 * smallest_distance(features)
    return bool(margin.min() >= torch.log(2.0 * (len(features) - 1) / radius) / beta)


def separation_bounds(num_memories: int, feature_dim: int) -> tuple[float, float]:
    r"""Bound the best possible separation of M unit vectors in D dimensions.

    This is Proposition 3.1 of U-Hop+ (arXiv 2410.23126). The separation is
    $\Delta_{\min} = \min_{\mu \ne \nu} (1 - \langle z_\mu, z_\nu \rangle)$. Its largest possible
    value lies between

    $$
    \frac{1}{2} \left[ \frac{\sqrt{\pi}}{M}
    \frac{\Gamma((D + 1) / 2)}{\Gamma(D / 2 + 1)} \right]^{2 / (D - 1)}
    \quad \text{and} \quad
    2 \left[ \frac{2 \sqrt{\pi}}{M}
    \frac{\Gamma((D + 1) / 2)}{\Gamma(D / 2)} \right]^{1 / (D - 1)}
    $$

    Args:
        num_memories: M, at least 2.
        feature_dim: D, at least 2.

    Returns:
        The lower and the upper bound.

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
    """Count the memories that take part in each retrieval, $|p|_0$ (U-Hop+, arXiv 2410.23126).

    A memory counts if its weight is above 0.01 at alpha = 1, and above 0 at alpha > 1.

    Args:
        weights: Association weights (..., Q, M).
        alpha: Tsallis exponent with which they were computed.

    Returns:
        Counts (..., Q).

    Examples:
        >>> from modeling_uhop import metastable_sizes
        >>> metastable_sizes(torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]]), alpha=2.0).tolist()
        [1, 2]
    """
    return (weights > (0.01 if alpha == 1.0 else 0.0)).sum(-1)


def cosine_margin(features: torch.Tensor) -> float:
    """Compute the smallest margin of features (M, D) scaled to unit norm: the smallest 1 - cos."""
    unit = unit_norm(at_least_fp32(features))
    return margins(unit @ unit.transpose(-1, -2))[0].min().item()


def duplicates(memories: torch.Tensor) -> list[tuple[int, int]]:
    """Return pairs (first, later) of indices of equal memories."""
    if len(memories) < 2:
        return []
    _, group = torch.unique(memories, dim=0, return_inverse=True)
    first: dict[int, int] = {}
    pairs = [(first.setdefault(key, index), index) for index, key in enumerate(group.tolist())]
    return [pair for pair in pairs if pair[0] != pair[1]]


@dataclass
class MemoryReport:
    r"""Report on what a memory set can hold; print it, or use `to_dataframe` and `plot`.

    Attributes are tensors with one entry per memory, unless stated otherwise.

    Attributes:
        beta: The inverse temperature for which the report holds, one number.
        alpha: The Tsallis exponent for which the report holds, one number.
        margin: Margin $\Delta_\mu$ in feature space.
        rival: The most similar other memory; -1 if there is none.
        error_bound: Bound of the error of one step at alpha = 1, for queries near the memory
            (U-Hop, equation 1.3).
        vacuous: Whether `error_bound` says nothing, because it is at least twice the largest norm
            of a memory, which no error exceeds; and always at alpha > 1, where the bound does not
            apply.
        own_error_bound: The same bound for the memory itself as the query (radius 0). `error` is
            checked against this bound.
        error: Distance between a memory and the pattern that it retrieves in one step.
        weight: Weight of a memory in its own retrieval.
        exact: Whether the memory is certified to retrieve only itself (alpha > 1), in the precision
            of the memory.
        metastable_size: Number of memories that its retrieval mixes.
        query_metastable_size: The same number for each given query, (Q,); `None` without queries.
        separation: Smallest 1 - cos between two features, one number; nan for fewer than two
            memories.
        separation_bounds: Bounds of the best possible separation (U-Hop+, Proposition 3.1); nan
            where they do not apply.
        well_separated: Whether unit-norm features meet the well-separation condition.
        confusions: Triples (mu, nu, p), largest p first: the query mu gives the weight p > 0.01 to
            another memory nu.
        duplicates: Pairs (mu, nu) of equal memories.
        rounding: Largest error that rounding can cause in the dtype of the memory, one number.
    """

    beta: float
    alpha: float
    margin: torch.Tensor
    rival: torch.Tensor
    error_bound: torch.Tensor
    vacuous: torch.Tensor
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
        """Whether the error of each memory is within its bound, up to rounding.

        It is `None` at alpha > 1, where the bound does not apply.
        """
        return self.error <= self.own_error_bound + self.rounding if self.alpha == 1.0 else None

    @property
    def certificate_failures(self) -> list[int]:
        """Memories that are certified exact but do not retrieve only themselves.

        There should be none.
        """
        return (self.exact & ~self.alone).nonzero().flatten().tolist()

    @property
    def alone(self) -> torch.Tensor:
        """Which memories retrieve only themselves."""
        return (self.metastable_size == 1) & (self.weight > 0.5)

    def to_dataframe(self) -> Any:
        """Return a pandas DataFrame with one row per memory.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("MemoryReport.to_dataframe needs pandas: pip install pandas") from error
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "query_metastable_size"}
        tensors = {name: value.tolist() for name, value in columns.items() if isinstance(value, torch.Tensor)}
        return pandas.DataFrame(tensors).rename_axis("memory")

    def plot(self, axis: Any = None) -> Any:
        """Plot the margins, smallest first, and return the matplotlib axis.

        A bar is blue if the memory retrieves only itself, and red otherwise.

        Args:
            axis: The matplotlib axis to draw on; `None` for a new one.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("MemoryReport.plot needs matplotlib: pip install matplotlib") from error
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
        """Compare what the theory guarantees with what retrieval gave."""
        checks = []
        if self.within_bound is not None:
            above_bound = (~self.within_bound).nonzero().flatten().tolist()
            checks.append(f"errors of memories {above_bound} exceed bound (1.3)" if above_bound else "all errors within bound (1.3)")
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
        # Because the bound holds at alpha = 1 alone, its column appears only there.
        bound = f" {'bound (1.3)':>12}" if self.alpha == 1.0 else ""
        lines.append(f"  {'memory':>8} {'margin':>10} {'rival':>6} {'weight':>7} {'error':>10}{bound}   smallest margins first")
        for index in self.margin.argsort()[:10].tolist():
            numbers = [column[index].item() for column in (self.margin, self.rival, self.weight, self.error)]
            value = "vacuous" if self.vacuous[index] else f"{self.error_bound[index].item():.4g}"
            lines.append("    {:>6} {:>10.4g} {:>6} {:>7.3f} {:>10.4g}".format(index, *numbers) + (f" {value:>12}" if bound else ""))
        return "\n".join(lines)


def memory_report(
    memories: torch.Tensor,
    features: torch.Tensor,
    weights: torch.Tensor,
    retrieved: torch.Tensor,
    *,
    beta: float,
    alpha: float,
    features_are_unit: bool,
    query_weights: torch.Tensor | None = None,
) -> MemoryReport:
    """Report how well memories (M, d) with features (M, D) can be stored and retrieved.

    The association weights (M, M) and the retrieved patterns (M, d) are those of one update with
    the memories as queries; `query_weights` (Q, M) are those of other queries.
    """
    kernel = inner_products(features, features)
    count, feature_dim = features.shape
    separation = cosine_margin(features) if count > 1 else float("nan")
    # Because scores may overflow fp32, `inner_products` may return fp64; we follow its dtype.
    weights, patterns, features = (tensor.to(kernel.dtype) for tensor in (weights, memories, features))
    margin, rival = margins(kernel)
    # Because retrieval rounds its scores, exact retrieval is certified only if the margin is larger
    # than the largest possible rounding error.
    rounding = 2.0 * torch.finfo(memories.dtype).eps
    itself = torch.eye(count, dtype=torch.bool, device=kernel.device)
    kernel_lower_bound = kernel - rounding * kernel.abs().max() * itself
    others = weights.masked_fill(itself, 0.0)
    confused = sorted(((weights[m, n].item(), m, n) for m, n in (others > 0.01).nonzero().tolist()), reverse=True)
    error_bound = retrieval_error_bound(patterns, features, beta)
    return MemoryReport(
        beta=beta,
        alpha=alpha,
        margin=margin,
        rival=rival,
        error_bound=error_bound,
        vacuous=(error_bound >= 2.0 * norms(patterns).max()) | (alpha > 1.0),
        own_error_bound=retrieval_error_bound(patterns, features, beta, radius=0.0),
        error=norms(retrieved.to(kernel.dtype) - patterns),
        weight=weights.diagonal(),
        exact=is_exactly_retrieved(kernel_lower_bound, beta, alpha),
        metastable_size=metastable_sizes(weights, alpha),
        query_metastable_size=None if query_weights is None else metastable_sizes(query_weights, alpha),
        separation=separation,
        separation_bounds=separation_bounds(count, feature_dim) if count > 1 and feature_dim > 1 else (float("nan"), float("nan")),
        well_separated=features_are_unit and is_well_separated(features, beta),
        confusions=[(m, n, weight) for weight, m, n in confused],
        duplicates=duplicates(memories),
        rounding=2.0 * rounding * norms(patterns).max().item(),
    )
