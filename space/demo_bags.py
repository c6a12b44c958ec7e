"""Bags of digits: is a 9 inside, and which images did the model retrieve to say so?"""

import html

import demo_digits
import numpy as np
import torch
from demo_digits import DemoError
from demo_drawing import WEIGHT, WITH, as_ink, bar, data_uri, percent, picture
from demo_models import TARGET, BagClassifier, draw_bag
from matplotlib.colors import to_rgb


MOST_IMAGES = 24


def new_bag(positive: bool, seed: int) -> list[int]:
    """Indices of a bag of test images, with a 9 where `positive`."""
    digits = demo_digits.load()
    return draw_bag(digits.test, digits.labels, positive, np.random.default_rng(seed))


def with_digit(bag: list[int], digit: int, seed: int) -> list[int]:
    """The bag and one more test image of `digit`, one that is not in it.

    Raises:
        DemoError: If the bag is full.
    """
    if len(bag) >= MOST_IMAGES:
        raise DemoError(f"A bag holds at most {MOST_IMAGES} images here. Tap one to remove it.")
    digits = demo_digits.load()
    choices = [int(i) for i in digits.test if digits.labels[i] == digit and int(i) not in bag]
    return [*bag, choices[seed % len(choices)]]


def without_image(bag: list[int], position: int) -> list[int]:
    """The bag without the image at `position`; as it is where there is none."""
    return [index for place, index in enumerate(bag) if place != position]


@torch.no_grad()
def weigh(classifier: BagClassifier, bag: list[int]) -> tuple[float, np.ndarray]:
    """Probability of a 9 inside, and each image's weight; the weights sum to 1.

    Raises:
        DemoError: If the bag is empty.
    """
    if not bag:
        raise DemoError("The bag is empty. Add a digit, or draw a new bag.")
    instances = demo_digits.load().images[bag].reshape(len(bag), -1)
    outputs = classifier.model(**classifier.extractor([instances], return_tensors="pt").to(classifier.model.device))
    return outputs.logits[0].float().softmax(-1)[1].item(), outputs.instance_weights[0].float().cpu().numpy()


def bag_view(bag: list[int], probability: float, weights: np.ndarray, source: str) -> str:
    """The answer, and every image with its weight, as buttons that remove it."""
    digits = demo_digits.load()
    largest = float(weights.max())
    cells = []
    for position, (index, weight) in enumerate(zip(bag, weights.tolist(), strict=True)):
        label, share = int(digits.labels[index]), percent(weight)
        tint = 0.55 * weight / largest if largest > 0 else 0.0
        tinted = picture(as_ink(digits.images[index]) * (1.0 - tint + tint * np.array(to_rgb(WEIGHT))))
        kind = "right" if label == TARGET else ""
        cells.append(
            f'<button type="button" data-index="{position}" aria-label="Remove this {label}, weight {share}" title="Remove this {label}">'
            f'<div class="hop-digit {kind}"><img src="{data_uri(tinted)}" alt=""></div>'
            f'<div class="hop-row">{bar(weight / largest if largest > 0 else 0.0, WEIGHT, share)}</div></button>'
        )
    truth = int((digits.labels[bag] == TARGET).sum())
    said = {0: "There is no 9 in it.", 1: "There is one 9 in it.", 2: "There are two 9s in it."}.get(
        truth, f"{truth} of its images are a 9."
    )
    return (
        f'<div class="hop-gauge" data-probability="{probability:.4f}"><b>Probability of a 9</b>'
        f"{bar(probability, WITH, percent(probability))}</div>"
        f'<p class="hop-small">{said} A 9 has a green frame; tap an image to remove it.</p><div class="hop-bag">{"".join(cells)}</div>'
        f'<p class="hop-small">Under each image: its weight, and the bar relative to the largest. Model: {html.escape(source)}.</p>'
    )


def empty_view() -> str:
    return '<div class="hop-note" data-empty="true">The bag is empty. Add a digit, or draw a new bag.</div>'
