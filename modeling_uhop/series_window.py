"""A window of series in scaled units: how it is checked and scaled, and how forecasts are scaled back."""

from typing import Any, NamedTuple

import torch

from .checks import as_mask, check_tensor, required_input
from .feature_map import magnitude
from .precision import is_finite, is_readable


class ScaledWindow(NamedTuple):
    """A batch of B windows of C series over L steps, each series scaled by its own past.

    Attributes:
        values: (B, L, C), the past minus its location, divided by its scale; 0 where not observed.
        loc: (B, 1, C), the location, in the dtype of the past and at least in fp32.
        scale: (B, 1, C), the scale, in the same dtype.
        observed: (B, L, C), True where the past was observed; `None` if a model's output is read.
    """

    values: torch.Tensor
    loc: torch.Tensor
    scale: torch.Tensor
    observed: torch.Tensor | None = None

    @classmethod
    def of(cls, past: torch.Tensor | None, mask: torch.Tensor | None, config: Any, dtype: torch.dtype) -> "ScaledWindow":
        """Check a past (B, L, C) and its mask, and scale the past to values of a dtype.

        Location and scale keep the dtype of the past if it is wider than fp32, because a narrower
        dtype would lose the differences between values far from zero. The configuration has the
        shape, `scaling` and `minimum_scale`. The errors are those of `STanHopModel.forward`.
        """
        past = required_input("past_values", past, past_observed_mask=mask)
        expected = (config.context_length, config.num_input_channels)
        if past.dim() != 3 or past.shape[1:] != expected:
            raise ValueError(
                f"past_values must have shape (B, context_length={expected[0]}, num_input_channels={expected[1]}), got {tuple(past.shape)}"
            )
        if mask is not None and mask.shape != past.shape:
            raise ValueError(f"past_observed_mask must have the shape of past_values, {tuple(past.shape)}, got {tuple(mask.shape)}")
        wide = torch.promote_types(torch.promote_types(dtype, torch.float32), past.dtype)
        values, observed = _observed(past, mask, "past_observed_mask", wide)
        if is_readable(values) and not is_finite(values):
            row, _, channel = (~values.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"observed past_values must be finite in {wide}, but series {channel} of window {row} is not")
        loc, scale = location_and_scale(values, observed, config.scaling, config.minimum_scale)
        # Because differences of very large values overflow, we divide by their magnitude first.
        size = magnitude(values, dim=1)
        scaled = (values / size - loc / size) / (scale / size) * observed
        return cls(_narrow(scaled, dtype, "past_values"), loc, scale, observed)

    def future(self, future: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Scale what followed, (B, H, C), by the past; the errors are those of `of`.

        Values that were not observed become 0, and so do the series that are not `kept` (B, C).
        """
        scaled = (future.to(self.loc.device, self.loc.dtype) - self.loc) / self.scale
        scaled = scaled.masked_fill(scaled.isnan() | ~kept.unsqueeze(1), 0.0)
        return _narrow(scaled, self.values.dtype, "future_values")

    def in_units(self, forecast: torch.Tensor) -> torch.Tensor:
        """Convert a scaled forecast (B, H, C) to the units of the past.

        Raises:
            ValueError: If (on CPU) the result exceeds the range of its dtype.
        """
        prediction = forecast * self.scale + self.loc
        if is_readable(prediction) and not is_finite(prediction) and is_finite(forecast):
            raise ValueError(
                f"forecasts must be finite in {prediction.dtype}, but {int((~prediction.isfinite()).sum())} are not, for windows with "
                f"values up to {max(self.loc.abs().max().item(), self.scale.max().item()):.4g}; pass past_values in larger units, or in "
                "torch.float64"
            )
        return prediction

    def varies(self, centred: bool) -> torch.Tensor:
        """Which series (B, C) vary in scaled units: from 0, or from their mean if `centred`."""
        # Because a window minus its mean has both signs, values of one sign are only the rounding
        # error of a constant.
        return (self.values > 0).any(1) & (self.values < 0).any(1) if centred else self.values.any(1)

    def varied(self, past: torch.Tensor, centred: bool) -> torch.Tensor:
        """Which series (B, C) of the past varied in its own units, as in `varies`."""
        assert self.observed is not None
        past = past.to(self.loc.dtype)
        if not centred:
            return (self.observed & (past != 0)).any(1)
        least, most = (torch.where(self.observed, past, bound) for bound in (torch.inf, -torch.inf))
        return most.amax(1) > least.amin(1)


def location_and_scale(
    values: torch.Tensor, observed: torch.Tensor, scaling: str | None, minimum_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute location and scale (B, 1, C) of each series over its observed values.

    Values (B, L, C) that were not observed must be 0. "std" gives mean and standard deviation,
    "mean" gives 0 and the mean absolute value, `None` gives 0 and 1. The scale is at least
    `minimum_scale`. A series without an observed value has location 0 and scale 1.
    """
    count = observed.sum(1, keepdim=True, dtype=values.dtype)
    if scaling is None:
        return torch.zeros_like(count), torch.ones_like(count)
    # Because sums and squares of large or small values overflow or underflow, we divide by their
    # magnitude first.
    size = magnitude(values, dim=1)
    values, count = values / size, count.clamp(min=1)
    if scaling == "mean":
        loc = torch.zeros_like(count)
        scale = values.abs().sum(1, keepdim=True) / count
    else:
        loc = values.sum(1, keepdim=True) / count
        deviations = (values - loc) * observed
        spread = magnitude(deviations, dim=1)
        scale = ((deviations / spread).square().sum(1, keepdim=True) / count).sqrt() * spread
    return loc * size, torch.where(observed.any(1, keepdim=True), (scale * size).clamp(min=minimum_scale), 1.0)


def forecast_loss(prediction: torch.Tensor, future: torch.Tensor, mask: torch.Tensor | None, kind: str) -> torch.Tensor:
    """Compute the mean error ("mse" or "mae") of forecasts (B, H, C) over observed future values.

    It is 0 if none was observed. The arguments and errors are those of
    `STanHopForPrediction.forward`; also, the loss must be finite.
    """
    for name, tensor in (("future_values", future), ("future_observed_mask", mask)):
        check_tensor(tensor, name)
        if tensor is not None and tensor.shape != prediction.shape:
            expected = f"(B, prediction_length, num_input_channels) = {tuple(prediction.shape)}"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
    future, observed = _observed(future.to(prediction.device), mask, "future_observed_mask", prediction.dtype)
    if is_readable(future) and not is_finite(future):
        raise ValueError(f"observed future_values must be finite, got {int((~future.isfinite()).sum())} values that are not")
    errors = prediction - future
    errors = errors.abs() if kind == "mae" else errors.square()
    loss = (errors * observed).sum() / observed.sum().clamp(min=1)
    if is_readable(loss) and not is_finite(loss) and is_finite(prediction):
        raise ValueError(
            f"the {kind} loss must be finite in {loss.dtype}, but forecasts and future_values are too far apart; "
            "use larger units, or pass past_values in torch.float64"
        )
    return loss


def _observed(values: torch.Tensor, mask: torch.Tensor | None, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values in a dtype, zeros where not observed, and booleans that say where they were."""
    observed = ~values.isnan()
    if mask is not None:
        observed = observed & as_mask(mask, name, "observed values", "others")
    return values.to(dtype).masked_fill(~observed, 0.0), observed


def _narrow(scaled: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Convert scaled values to the dtype of the model; they must stay finite."""
    narrow = scaled.to(dtype)
    if is_readable(narrow) and not is_finite(narrow):
        raise ValueError(f"{name} must be finite in {dtype} after scaling, got values up to {scaled.abs().max():.4g}")
    return narrow
