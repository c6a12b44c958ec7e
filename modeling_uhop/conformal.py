"""Conformal prediction intervals of forecasts, from the errors of similar past windows."""

import torch

from .energy import association


class ConformalIntervals:
    r"""Prediction intervals from the absolute errors of past forecasts.

    With N past windows, their absolute errors $e_i$ at one step of one series, and weights $p_i$ with
    the sum 1, the interval is forecast $\pm q$ with the smallest $q$ for which

    $$
    \frac{N}{N + 1} \sum_i p_i \, [e_i \le q] \ge \mathrm{level} .
    $$

    Without codes the weights are $1 / N$: plain split conformal prediction, where $q$ is the
    $\lceil (N + 1)\, \mathrm{level} \rceil$-th smallest error. With codes, each new window has its own
    weights, the Hopfield association with the past windows, as in HopCPT (arXiv 2303.12783). HopCPT
    trains an encoder for its codes. Here the codes are given.

    If new and past windows are exchangeable, split conformal intervals cover at least `level` of new
    values. Windows of a series are not exchangeable, so the coverage must be measured.

    Args:
        errors: (N, H, C), errors of past forecasts, of any sign; NaN where a value was not observed.
        codes: (C, N, D), a code of each past window for each series; `None` for equal weights.
        beta: Inverse temperature of the association, positive.
        alpha: Tsallis exponent of the association, in [1, 2].

    Raises:
        ValueError: If `errors` or `codes` have another shape, or codes are not finite.
    """

    def __init__(self, errors: torch.Tensor, codes: torch.Tensor | None = None, *, beta: float = 1.0, alpha: float = 1.0):
        if errors.dim() != 3 or len(errors) == 0:
            raise ValueError(f"errors must have shape (N, H, C) with at least one window, got {tuple(errors.shape)}")
        if codes is not None and (codes.dim() != 3 or codes.shape[:2] != (errors.shape[2], len(errors))):
            raise ValueError(f"codes must have shape (C={errors.shape[2]}, N={len(errors)}, D), got {tuple(codes.shape)}")
        _check_finite(codes, "past")
        self.errors, self.codes, self.beta, self.alpha = errors.abs(), codes, beta, alpha

    def half_widths(self, level: float, codes: torch.Tensor | None = None) -> torch.Tensor:
        """Half of the width of the intervals.

        Args:
            level: The share of values that intervals are to cover, in (0, 1).
            codes: (C, B, D), codes of the new windows, if the past windows have codes.

        Returns:
            (B, H, C), or (1, H, C) without codes. It is infinite if there are too few errors for the
                level.

        Raises:
            ValueError: If `level` is out of range, only past or new windows have codes, or codes are not
                finite.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        if (codes is None) != (self.codes is None):
            raise ValueError("new windows need codes if past windows have codes, and otherwise none")
        _check_finite(codes, "new")
        count, horizon, channels = self.errors.shape
        if codes is None or self.codes is None:
            weights = self.errors.new_full((channels, 1, count), 1.0 / count)
        else:
            weights = association(codes, self.codes, beta=self.beta, alpha=self.alpha, similarity="cosine")
        # Because `weighted_quantile` sums in double precision, the weights are converted once.
        weights = weights.double()
        steps = [
            [weighted_quantile(self.errors[:, step, channel], weights[channel], level) for channel in range(channels)]
            for step in range(horizon)
        ]
        return torch.stack([torch.stack(series, -1) for series in steps], 1)


def _check_finite(codes: torch.Tensor | None, which: str) -> None:
    if codes is not None and not bool(codes.isfinite().all()):
        raise ValueError(f"codes of {which} windows must be finite, got {int((~codes.isfinite()).sum())} values that are not")


def weighted_quantile(errors: torch.Tensor, weights: torch.Tensor, level: float) -> torch.Tensor:
    r"""The smallest error $q$ with $\frac{N}{N + 1} \sum_i p_i [e_i \le q] \ge$ level; infinite if none.

    Args:
        errors: (N,), absolute errors; those that are NaN do not count.
        weights: (B, N), weights of the errors, not negative, with a positive sum over the others.
        level: The level, in (0, 1).

    Returns:
        (B,), a quantile for each row of weights.
    """
    known = ~errors.isnan()
    ordered, order = errors[known].sort()
    if len(ordered) == 0:
        return errors.new_full((len(weights),), torch.inf)
    mass = weights.double()[:, known.nonzero()[:, 0][order]].cumsum_(-1)
    # Because the mass is a sum of rounded numbers, a mass that misses the level by rounding counts.
    needed = level * (1.0 + 1.0 / len(ordered)) - 1e-9
    index = torch.searchsorted(mass, needed * mass[:, -1:]).squeeze(-1)
    return torch.cat([ordered, ordered.new_full((1,), torch.inf)])[index]
