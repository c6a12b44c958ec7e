"""Pictures of any PIL mode as 8-bit RGB."""

import struct
import warnings

import numpy as np
from PIL import Image, ImageOps


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as 8-bit RGB, upright and on white.

    PIL's own conversion clips 16-bit and float values at 255, and shows what lies under transparent pixels. Here, by mode:

    - "RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB": as PIL converts them;
    - "RGBA", "LA", "PA", "RGBa", "La", and "RGB", "L", "1" or "P" with a transparent colour: laid over white;
    - "I;16", "I;16L", "I;16B", "I;16N": 16-bit values v become v // 257, with a warning where the largest is at most 256, so that the
      picture becomes black;
    - "I": values of [0, 255] stay; if the largest lies in [256, 65535], or the file is a PNG or a PPM, which have 16 bits here, v // 257;
    - "F": values of [0, 1] times 255; if the largest lies in (1, 255], they stay. Both are rounded.

    The orientation that EXIF gives is applied first; where EXIF cannot be read, the picture is taken as it is stored, with a warning. An
    image of several frames gives the one that it stands at.

    Raises:
        ValueError: For values outside these ranges or not finite; naming the mode.
    """
    upright = _upright(image)
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        # The transposed copy no longer knows its file's format.
        return Image.fromarray(_in_8_bits(np.asarray(upright), upright.mode, image.format)).convert("RGB")
    if upright.mode == "La":
        upright = upright.convert("LA")
    if upright.has_transparency_data:
        coloured = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("RGB")
    return upright.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """A copy that is turned as EXIF says, and that says nothing more of its orientation."""
    # What fails after this is EXIF.
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error) as error:
        warnings.warn(f"the EXIF data of the image cannot be read ({error}); the image is taken as it is stored", stacklevel=3)
    stored = image.copy()
    for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        stored.info.pop(name, None)
    return stored


def is_grey(image: Image.Image) -> bool:
    """Whether a picture has one channel of brightness, so that its three channels as RGB are equal."""
    return image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")


def _in_8_bits(values: np.ndarray, mode: str, file_format: str | None) -> np.ndarray:
    if values.size == 0:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    if mode.startswith("I;16"):
        if 0 < high < 257:
            warnings.warn(f"an image of mode {mode!r} becomes black: its largest value is {high} of 65535; scale it", stacklevel=3)
        return (values // 257).astype(np.uint8)
    # Not finite values fail every comparison.
    if mode == "I" and low >= 0 and high <= 65535:
        return (values // (257 if high > 255 or file_format in ("PNG", "PPM") else 1)).astype(np.uint8)
    if mode == "F" and low >= 0 and high <= 255:
        return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
    accepted = "[0, 255] or [0, 65535]" if mode == "I" else "[0, 1] or [0, 255]"
    raise ValueError(f"an image of mode {mode!r} must have values in {accepted}, got {low} to {high}; scale it, or save it in 8 bits")


__all__ = ["as_rgb", "is_grey"]
