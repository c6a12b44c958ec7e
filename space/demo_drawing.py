"""What the tabs draw with: colours, and pictures as HTML that needs nothing from outside the page."""

import base64
import html
import io

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image


INK, MUTED, GRID, PAPER = "#1f2a37", "#5b6676", "#e4e7ec", "#ffffff"
# One meaning a colour, in every tab: the two sides that are compared, what is right, what is wrong, and how much weight there is.
WITHOUT, WITH = "#7a8699", "#4c51bf"
RIGHT, WRONG = "#0b8a6a", "#c2553a"
WEIGHT = "#d9622b"
ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
POINTS = ("#2f6fb5", "#c2553a", "#0b8a6a", "#8a5bb0", "#b88a1b", "#2a9db0", "#b04a7d", "#6b7280")


def data_uri(image: Image.Image, kind: str = "png", **options: int) -> str:
    """An image inside the page; "webp" for one without sharp edges, which then is small."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind.upper(), **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(values: np.ndarray) -> Image.Image:
    """An image of values in [0, 1], with or without channels."""
    return Image.fromarray(np.round(255.0 * values).astype(np.uint8))


def as_ink(image: np.ndarray) -> np.ndarray:
    """An image (height, width) of ink in [0, 1] as RGB in [0, 1], dark on white; what is outside the range is cut off."""
    ink = np.clip(image, 0.0, 1.0)[..., None]
    return (1.0 - ink) + ink * np.array(to_rgb(INK))


def stretched(image: np.ndarray) -> np.ndarray:
    """A mixture of images with its darkest pixel at 1, as only its pattern matters; one without ink stays empty."""
    return image / image.max() if image.max() > 0 else image


def thumbnail(image: np.ndarray, alt: str, caption: str = "", kind: str = "") -> str:
    """A figure of one digit image. `kind` is a class of the style sheet: "right", "wrong" or "query"."""
    source = data_uri(picture(as_ink(image)))
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="hop-digit {kind}"><img src="{source}" alt="{html.escape(alt)}">{text}</figure>'


def bar(share: float, color: str, label: str) -> str:
    """A bar of `share` in [0, 1] of its width."""
    width = 100.0 * min(max(share, 0.0), 1.0)
    least = "min-width:1px;" if share > 0 else ""
    return (
        f'<div class="hop-bar" aria-hidden="true"><div style="{least}width:{width:.1f}%;background:{color}"></div></div>'
        f'<span class="hop-number">{html.escape(label)}</span>'
    )


def plot_source(figure: Figure) -> str:
    """A matplotlib figure as an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def plot(figure: Figure, alt: str) -> str:
    """A matplotlib figure as wide as its column."""
    return f'<img class="hop-plot" src="{plot_source(figure)}" alt="{html.escape(alt)}">'


def blank_figure(width: float, height: float) -> Figure:
    """A figure without a window and without global state: requests are answered by several threads."""
    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def percent(share: float) -> str:
    """A share as the page writes it; a small one differs from zero."""
    return "0 %" if share <= 0 else "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"
