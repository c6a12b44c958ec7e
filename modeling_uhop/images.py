"""Convert images of any PIL mode to 8-bit RGB."""

import struct
import warnings

import numpy as np
from PIL import Image, ImageOps


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB, upright and on a white background.

    PIL's own conversion clips 16-bit and float values at 255, and shows the colours under
    transparent pixels. This function converts by mode:

    - "RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB": as PIL converts them.
    - "RGBA", "LA", "PA", "RGBa", "La", and "RGB", "L", "1" or "P" with a transparent colour:
      composed over white.
    - "I;16", "I;16L", "I;16B", "I;16N": a 16-bit value v becomes v // 257. A warning is given if
      the largest value is at most 256, because the image then becomes black.
    - "I": values in [0, 255] are kept. They become v // 257 if the largest value lies in [256,
      65535], or if the file is a PNG or a PPM, which have 16 bits here.
    - "F": values in [0, 1] are multiplied by 255; if the largest value lies in (1, 255], values are
      kept. Both are rounded.

    The EXIF orientation is applied first. If EXIF cannot be read, the image is used as it is
    stored, with a warning. An image with several frames gives its current frame.

    Args:
        image: A PIL image.

    Returns:
        A new image of mode "RGB".

    Raises:
        ValueError: If values are outside these ranges or not finite. The message names the mode.
    """
    upright = _upright(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        # Because the transposed copy has lost the file format, we pass the format of the original.
        return Image.fromarray(_in_8_bits(np.asarray(upright), upright.mode, image.format)).convert("RGB")
    if upright.mode == "La":
        upright = upright.convert("LA")
    if upright.has_transparency_data:
        coloured = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Return a copy that is rotated as EXIF says and has no orientation entry."""
    # Because we load the pixels here, every error in the next statement comes from EXIF.
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error) as error:
        warnings.warn(f"the EXIF data of the image cannot be read ({error}); the image is used as it is stored", stacklevel=3)
    stored = image.copy()
    for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        stored.info.pop(name, None)
    return stored


def is_grey(image: Image.Image) -> bool:
    """Whether an image has one brightness channel, so that its three RGB channels are equal."""
    return image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")


def _in_8_bits(values: np.ndarray, mode: str, file_format: str | None) -> np.ndarray:
    """Convert 16-bit, 32-bit or float values to 8 bits; see `as_rgb`."""
    if values.size == 0:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    if mode.startswith("I;16"):
        if 0 < high < 257:
            warnings.warn(f"an image of mode {mode!r} becomes black: its largest value is {high} of 65535; scale it", stacklevel=3)
        return (values // 257).astype(np.uint8)
    # Because infinite and NaN values fail these comparisons, they reach the error at the end.
    if mode == "I" and low >= 0 and high <= 65535:
        return (values // (257 if high > 255 or file_format in ("PNG", "PPM") else 1)).astype(np.uint8)
    if mode == "F" and low >= 0 and high <= 255:
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    accepted = "[0, 255] or [0, 65535]" if mode == "I" else "[0, 1] or [0, 255]"
    raise ValueError(f"an image of mode {mode!r} must have values in {accepted}, got {low} to {high}; scale it or save it in 8 bits")


__all__ = ["as_rgb", "is_grey"]
