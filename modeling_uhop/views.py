"""Augmented views of images, windows of series and bags, for a separation step with two views."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import affine_grid, grid_sample

from .precision import at_least_fp32


def _of(batch: Mapping[str, Any], name: str, axes: int) -> torch.Tensor:
    """The input of this name; a `ValueError` if the batch has none with so many axes."""
    values = batch.get(name) if isinstance(batch, Mapping) else None
    if not isinstance(values, torch.Tensor) or values.dim() != axes or not values.is_floating_point():
        found = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"views need a batch with {name}, a floating tensor with {axes} axes, got {found}")
    return values


def _uniform(count: int, low: float, high: float, like: torch.Tensor) -> torch.Tensor:
    """Uniform random numbers (count,)."""
    return low + (high - low) * torch.rand(count, device=like.device, dtype=like.dtype)


def _check(views: Any, **ranges: tuple[float, float]) -> None:
    """Raise a `ValueError` for a field that is not a number of its range."""
    for name, (low, high) in ranges.items():
        value = getattr(views, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")


@dataclasses.dataclass(frozen=True)
class ImageViews:
    """Random views of a batch of images: a resized crop, a mirror image, other colours.

    Each image of `pixel_values` (B, C, H, W) has a crop, a mirror and colours of its own. Colours
    change as in SimCLR (arXiv 2002.05709) without hue: brightness, contrast and saturation, in this
    order, then perhaps grey. Images with another number of channels than three keep their
    saturation.

    Args:
        smallest_area: The smallest area of a crop, as a fraction of the image, in (0, 1]. The
            largest is the whole image. Width and height keep their ratio.
        flip: Probability of a mirror image.
        jitter: Brightness, contrast and saturation are multiplied by factors in [1 - jitter,
            1 + jitter].
        grey: Probability of a grey image.
        mean, std: The normalisation of the pixels: a value x in [0, 1] stands in the batch as
            (x - mean) / std. A number, or one for each channel.

    Raises:
        ValueError: If a value is out of range; when called, for a batch without such images.

    Examples:
        >>> from modeling_uhop import ImageViews
        >>> images = {"pixel_values": torch.rand(4, 3, 8, 8), "labels": torch.arange(4)}
        >>> view = ImageViews()(images)
        >>> view["pixel_values"].shape, view["labels"] is images["labels"]
        (torch.Size([4, 3, 8, 8]), True)
    """

    smallest_area: float = 0.3
    flip: float = 0.5
    jitter: float = 0.4
    grey: float = 0.2
    mean: float | list[float] = 0.5
    std: float | list[float] = 0.5

    def __post_init__(self):
        _check(self, smallest_area=(1e-6, 1.0), flip=(0.0, 1.0), jitter=(0.0, 1.0), grey=(0.0, 1.0))
        if not (torch.as_tensor(self.std, dtype=torch.float64) > 0).all():
            raise ValueError(f"std must be positive, got {self.std!r}")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with other `pixel_values`."""
        images = _of(batch, "pixel_values", 4)
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and len(value) not in (1, images.shape[1]):
                raise ValueError(f"{name} must have one number for each of the {images.shape[1]} channels, got {value!r}")
        # Because half precision cannot tell neighbouring pixels apart, we place them in fp32.
        view = self._recoloured(self._cropped(at_least_fp32(images)))
        return {**batch, "pixel_values": view.to(images.dtype)}

    def _cropped(self, images: torch.Tensor) -> torch.Tensor:
        """A random part of each image, in the size of the image, perhaps mirrored."""
        count = len(images)
        side = _uniform(count, self.smallest_area, 1.0, images).sqrt()
        mirrored = torch.where(_uniform(count, 0.0, 1.0, images) < self.flip, -1.0, 1.0).to(images)
        placing = images.new_zeros(count, 2, 3)
        placing[:, 0, 0], placing[:, 1, 1] = side * mirrored, side
        # The centre of a crop may be so far from that of the image that the crop still lies inside.
        placing[:, :, 2] = (1.0 - side).unsqueeze(-1) * (2.0 * torch.rand(count, 2, device=images.device, dtype=images.dtype) - 1.0)
        grid = affine_grid(placing, list(images.shape), align_corners=False)
        return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _recoloured(self, images: torch.Tensor) -> torch.Tensor:
        """Each image with its own brightness, contrast and saturation."""
        count, channels = images.shape[:2]
        mean, std = (torch.as_tensor(each, device=images.device, dtype=images.dtype).view(-1, 1, 1) for each in (self.mean, self.std))
        values = images * std + mean
        low, high = 1.0 - self.jitter, 1.0 + self.jitter
        brightness, contrast, saturation = (_uniform(count, low, high, images).view(-1, 1, 1, 1) for _ in range(3))
        values = (values * brightness).clamp(0.0, 1.0)
        average = _grey(values).mean((1, 2, 3), keepdim=True)
        values = (average + contrast * (values - average)).clamp(0.0, 1.0)
        if channels == 3:
            values = (_grey(values) + saturation * (values - _grey(values))).clamp(0.0, 1.0)
        is_grey = (_uniform(count, 0.0, 1.0, images) < self.grey).view(-1, 1, 1, 1)
        return (torch.where(is_grey, _grey(values), values) - mean) / std


def _grey(images: torch.Tensor) -> torch.Tensor:
    """The luma of images (B, 1, H, W); of other than three channels, their mean."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device, dtype=images.dtype)
    return (images * weights.view(-1, 1, 1)).sum(1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class WindowViews:
    """Random views of a batch of windows of series: a resized part, another scale, noise.

    Each window of `past_values` (B, L, C) has a part, and scales of its own. A value that is NaN
    makes the values next to it NaN.

    Args:
        shortest: The shortest part, as a fraction of the window, in (0, 1]. It is stretched to the
            length of the window by linear interpolation.
        scale: Standard deviation of the factor of each series of each window, whose mean is 1.
        jitter: Standard deviation of the noise that is added to each value.

    Raises:
        ValueError: If a value is out of range; when called, for a batch without such windows.

    Examples:
        >>> from modeling_uhop import WindowViews
        >>> WindowViews()({"past_values": torch.randn(4, 24, 3)})["past_values"].shape
        torch.Size([4, 24, 3])
    """

    shortest: float = 0.7
    scale: float = 0.1
    jitter: float = 0.1

    def __post_init__(self):
        _check(self, shortest=(1e-6, 1.0), scale=(0.0, 10.0), jitter=(0.0, 10.0))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with other `past_values`."""
        given = _of(batch, "past_values", 3)
        # Because half precision cannot tell neighbouring steps apart, we place them in fp32.
        windows = at_least_fp32(given)
        count, length, channels = windows.shape
        part = _uniform(count, self.shortest, 1.0, windows)
        begin = (1.0 - part) * torch.rand(count, device=windows.device, dtype=windows.dtype)
        steps = torch.linspace(0.0, 1.0, length, device=windows.device, dtype=windows.dtype)
        places = (begin.unsqueeze(-1) + part.unsqueeze(-1) * steps) * (length - 1)
        before = places.floor().clamp(0, max(length - 2, 0)).long()
        share = (places - before).unsqueeze(-1)
        left, right = (
            windows.gather(1, index.clamp(max=length - 1).unsqueeze(-1).expand(-1, -1, channels)) for index in (before, before + 1)
        )
        values = torch.lerp(left, right, share)
        factors = 1.0 + self.scale * torch.randn(count, 1, channels, device=windows.device, dtype=windows.dtype)
        values = values * factors + self.jitter * torch.randn_like(values)
        return {**batch, "past_values": values.to(given.dtype)}


@dataclasses.dataclass(frozen=True)
class BagViews:
    """Random views of a batch of bags: some instances left out, and noise.

    An instance of `instances` (B, N, d) is left out by `attention_mask` (B, N). A bag keeps at least
    one of its instances. Instances keep their places, so each is the copy of itself.

    Args:
        dropout: Probability that an instance is left out, in [0, 1].
        jitter: Standard deviation of the noise that is added to each value.

    Raises:
        ValueError: If a value is out of range; when called, for a batch without such bags.

    Examples:
        >>> from modeling_uhop import BagViews
        >>> view = BagViews(dropout=0.5)({"instances": torch.randn(2, 6, 3)})
        >>> view["attention_mask"].shape, bool(view["attention_mask"].any(-1).all())
        (torch.Size([2, 6]), True)
    """

    dropout: float = 0.2
    jitter: float = 0.1

    def __post_init__(self):
        _check(self, dropout=(0.0, 1.0), jitter=(0.0, 10.0))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with other `instances` and another `attention_mask`."""
        instances = _of(batch, "instances", 3)
        given = batch.get("attention_mask")
        present = torch.ones(instances.shape[:2], dtype=torch.bool, device=instances.device) if given is None else given.bool()
        if instances.shape[1] == 0:
            return {**batch, "attention_mask": present}
        kept = torch.rand(present.shape, device=present.device).masked_fill(~present, -1.0)
        # The instance with the largest number stays, so that no bag becomes empty.
        stays = (kept >= self.dropout) | (kept == kept.amax(-1, keepdim=True))
        return {**batch, "instances": instances + self.jitter * torch.randn_like(instances), "attention_mask": present & stays}
