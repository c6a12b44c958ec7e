"""An ensemble of forecasters: a weighted mean, with weights from validation windows."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

from ..data.series import Series
from .series import Fitted, mean_errors


@dataclass
class Ensemble:
    """A weighted mean of forecasters.

    Attributes:
        members: Forecasters by name.
        weights: (K,), the weight of each; not negative, with the sum 1.
    """

    members: dict[str, Fitted]
    weights: torch.Tensor

    @classmethod
    def fit(cls, members: dict[str, Fitted], series: Series, prediction_length: int) -> "Ensemble":
        """The weights that have the lowest squared error on all validation windows."""
        products = torch.zeros(len(members), len(members), dtype=torch.float64)
        for forecasts, future in _together(members, series, "validation", prediction_length):
            errors = (forecasts - future)[:, ~future.isnan()].double()
            products += errors @ errors.T
        return cls(members, simplex_weights(products))

    def forecasts(self, series: Series, split: str, prediction_length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As `Fitted.forecasts`."""
        for forecasts, future in _together(self.members, series, split, prediction_length):
            yield torch.tensordot(self.weights.to(forecasts.dtype), forecasts, 1), future

    def errors(self, series: Series, split: str, prediction_length: int) -> dict[str, float]:
        """As `Fitted.errors`."""
        return mean_errors(self.forecasts(series, split, prediction_length))


def _together(
    members: dict[str, Fitted], series: Series, split: str, prediction_length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Forecasts (K, B, H, C) of all members, and their common future (B, H, C)."""
    for batches in zip(*(each.forecasts(series, split, prediction_length) for each in members.values()), strict=True):
        yield torch.stack([forecast for forecast, _ in batches]), batches[0][1]


def simplex_weights(products: torch.Tensor) -> torch.Tensor:
    r"""The weights $w$ that minimise $w^\top G w$, not negative and with the sum 1.

    With the matrix $G$ of the products of the members' errors, this is the squared error of the
    weighted mean. On the members $S$ with positive weights, $w_S \propto G_S^{-1} 1$. The subsets of
    a few members are tried one by one.

    Args:
        products: G, (K, K).
    """
    best, lowest = torch.empty(0), torch.inf
    for size in range(1, len(products) + 1):
        for chosen in map(list, combinations(range(len(products)), size)):
            # Because members may be equal, we use least squares, which a singular matrix does not stop.
            own, ones = products[chosen][:, chosen], products.new_ones(size, 1)
            solution = torch.linalg.lstsq(own / own.trace(), ones, driver="gelsd").solution[:, 0]
            weights = torch.zeros(len(products), dtype=products.dtype)
            weights[chosen] = solution / solution.sum()
            error = (weights @ products @ weights).item()
            if (weights >= 0).all() and error < lowest:
                best, lowest = weights, error
    return best
