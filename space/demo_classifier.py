"""What a vision transformer answers about an image, and which patches each of its heads retrieves for that."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_digits import DemoError
from demo_drawing import ALPHA, WEIGHT, WITH, as_ink, bar, data_uri, percent, picture
from demo_models import Classifier, digit_image
from matplotlib.colors import to_rgb
from PIL import Image, ImageOps, UnidentifiedImageError

from modeling_uhop.images import as_rgb


MAP_PIXELS = 160


@dataclass(frozen=True)
class Answer:
    """A classifier's answer.

    Attributes:
        scores: Probability of each class.
        names: Of the classes.
        maps: For each layer, (heads, rows, columns): the CLS token's association weights over the patches. A model without a
            CLS token has one map: that of the learned query which pools the patches.
        kept: For each layer, (heads,): the weight that stays on the CLS token itself. With the patches' it sums to 1.
        alphas: For each layer, the Tsallis exponent of each head.
    """

    scores: np.ndarray
    names: list[str]
    maps: list[np.ndarray]
    kept: list[np.ndarray]
    alphas: list[np.ndarray]


def read_image(path: str | Path) -> Image.Image:
    """An upload as an RGB image, upright and on white: see `as_rgb`.

    Raises:
        DemoError: If the file is no image that can be read.
    """
    try:
        with Image.open(path) as opened:
            return as_rgb(opened)
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
        # Of values out of range, the reason says which are taken.
        reason = f": {error}" if isinstance(error, ValueError) else ""
        raise DemoError(
            f"“{Path(path).name}” cannot be read as an image{reason}. Choose a photo or drawing, such as a PNG or JPEG."
        ) from error


def reads_digits(classifier: Classifier) -> bool:
    """Whether the model knows digits as scikit-learn has them: ten classes 0 to 9 in small images."""
    digits = [str(digit) for digit in range(10)]
    return sorted(class_names(classifier)) == digits and max(image_size(classifier)) <= 32


def class_names(classifier: Classifier) -> list[str]:
    names: dict[int, str] = classifier.model.config.id2label  # type: ignore[assignment]
    return [str(names[index]) for index in range(len(names))]


def image_size(classifier: Classifier) -> tuple[int, int]:
    size = classifier.model.config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def as_digit(image: Image.Image, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """A photo or drawing of one digit in the form of the training images: bright ink on black, cropped and reduced.

    Raises:
        DemoError: If nothing stands out from the ground.
    """
    ink = np.asarray(image.convert("L"), dtype=float) / 255.0
    border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
    if np.median(border) > 0.5:
        ink = 1.0 - ink
    if np.ptp(ink) < 0.1:
        raise DemoError("Nothing stands out on this picture. Choose one with a single digit on a plain ground.")
    ink = np.clip((ink - np.median(np.sort(ink, axis=None)[: max(1, ink.size // 2)])) / np.ptp(ink), 0.0, 1.0)
    rows, columns = (np.flatnonzero((ink > 0.2).any(axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / ink.max()
    side = max(cut.shape)
    square = np.zeros((side, side))
    top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    small = picture(square).resize((size[1], size[0]), Image.Resampling.BOX)
    return digit_image(np.asarray(small) / 255.0)


@torch.no_grad()
def classify(classifier: Classifier, image: Image.Image) -> Answer:
    """Scores of an RGB image, and the association weights of what the classifier reads, in every layer and head."""
    model = classifier.model
    pixel_values = classifier.processor([image], return_tensors="pt")["pixel_values"]
    outputs = model(pixel_values.to(model.device), output_attentions=True)
    config = model.config
    patch = (config.patch_size, config.patch_size) if isinstance(config.patch_size, int) else config.patch_size
    grid = (pixel_values.shape[-2] // patch[0], pixel_values.shape[-1] // patch[1])
    maps, kept, alphas = [], [], []
    pooling = model.vit.pooling
    layers = [*model.vit.layers] if pooling is None else [pooling]
    for layer, attention in zip(layers, outputs.attentions[-len(layers) :], strict=True):
        weights = attention[0, :, 0].float().cpu().numpy()
        prefix = weights.shape[-1] - grid[0] * grid[1]
        maps.append(weights[:, prefix:].reshape(-1, *grid))
        kept.append(weights[:, :prefix].sum(-1))
        hopfield: Any = layer.attention
        alpha = torch.as_tensor(hopfield.alpha).detach().float().cpu().numpy()
        alphas.append(np.broadcast_to(alpha.reshape(-1), (len(weights),)))
    scores = outputs.logits[0].float().softmax(-1).cpu().numpy()
    return Answer(scores, class_names(classifier), maps, kept, alphas)


def heat_map(image: Image.Image, weights: np.ndarray, largest: float) -> Image.Image:
    """Weights (rows, columns) as a tint over the image in grey; full where a weight is `largest`."""
    rows, columns = weights.shape
    cell = max(1, MAP_PIXELS // max(rows, columns))
    size = (columns * cell, rows * cell)
    grey = np.asarray(image.convert("L").resize(size, Image.Resampling.NEAREST), dtype=float)[..., None] / 255.0
    pale = 1.0 - 0.55 * (1.0 - grey)
    strength = np.kron(weights / largest if largest > 0 else weights, np.ones((cell, cell)))[..., None]
    mixed = (1.0 - 0.8 * strength) * pale + 0.8 * strength * np.array(to_rgb(WEIGHT))
    return picture(mixed)


def alpha_text(alphas: list[np.ndarray]) -> str:
    """The model's alpha in words."""
    values = np.concatenate(alphas)
    low, high = float(values.min()), float(values.max())
    if high - low > 1e-6:
        return f"{ALPHA} is learned by each head, here between {low:.2f} and {high:.2f}: the larger, the fewer patches have weight"
    name = {1.0: "softmax: every patch has some weight", 2.0: "sparsemax: most patches have none"}.get(
        low, "many patches have exactly none"
    )
    return f"{ALPHA} = {low:g}, {name}"


def shown(classifier: Classifier, image: Image.Image) -> Image.Image:
    """The image as the page shows it: digits as dark ink on white, others as they are."""
    if not reads_digits(classifier):
        return image
    return picture(as_ink(np.asarray(image.convert("L"), dtype=float) / 255.0))


def answer_view(classifier: Classifier, image: Image.Image, answer: Answer) -> str:
    """The image, its scores, and a heat map for each layer and head."""
    seen = shown(classifier, image)
    source = data_uri(seen if max(seen.size) <= 512 else ImageOps.contain(seen, (512, 512)))
    best = np.argsort(-answer.scores, kind="stable")[:5]
    width = min(14, max(len(answer.names[i]) for i in best) + 1)
    rows = "".join(
        f'<div class="hop-row"><b style="width:{width}ch" title="{html.escape(answer.names[i])}">{html.escape(answer.names[i])}</b>'
        f"{bar(float(answer.scores[i]), WITH, percent(answer.scores[i]))}</div>"
        for i in best
    )
    largest = max(float(weights.max()) for weights in answer.maps)
    layers = []
    for depth, (weights, kept) in enumerate(zip(answer.maps, answer.kept, strict=True), start=1):
        cells = []
        for head, (one, own) in enumerate(zip(weights, kept, strict=True), start=1):
            counted = f"{int((one > 0).sum())} of {one.size}"
            alt = f"layer {depth}, head {head}: weight on {counted} patches, {percent(own)} on the CLS token"
            caption = f"head {head}<br>{counted}"
            uri = data_uri(heat_map(seen, one, largest))
            cells.append(
                f'<figure class="hop-digit"><img src="{uri}" alt="{alt}"><figcaption title="{alt}">{caption}</figcaption></figure>'
            )
        layers.append(f'<h4>Layer {depth}</h4><div class="hop-layer">{"".join(cells)}</div>')
    name = html.escape(answer.names[best[0]])
    return (
        f'<div class="hop-answer" data-answer="{name}"><figure class="hop-digit"><img src="{source}" alt="what the model sees">'
        f'<figcaption>what it sees</figcaption></figure><div class="hop-scores">{rows}</div></div>'
        f'{"".join(layers)}<div class="hop-legend"><span>weight 0</span><i></i><span>{percent(largest)}</span></div>'
        f'<p class="hop-small">{alpha_text(answer.alphas)}. Under each map: how many patches have weight. The rest of the weight stays on '
        f"the CLS token. Model: {html.escape(classifier.source)}.</p>"
    )
