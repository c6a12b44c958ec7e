"""The memory explorer: digits are stored, asked for by damaged copies, and retrieved with and without a separation step."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import demo_digits
import numpy as np
import torch
from demo_digits import DemoError
from demo_drawing import GRID, INK, MUTED, RIGHT, WITH, WITHOUT, WRONG, bar, blank_figure, percent, plot, stretched, thumbnail
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator

from modeling_uhop import Separation, UHopMemoryConfig, UHopMemoryModel, add_noise, energy, mask_patterns


CORRUPTIONS = ("hide pixels", "hide the lower part", "add noise")
METHODS = {"none": None, "denoising": Separation.denoising, "U-Hop": Separation.uhop, "U-Hop+": Separation.uhop_plus}
# The demo begins with what the package does by default, whatever that is.
DEFAULTS = UHopMemoryConfig()
SEPARATION = UHopMemoryModel(DEFAULTS).default_separation


@dataclass(frozen=True)
class MemorySettings:
    """What the controls say.

    Attributes:
        count: Number M of stored digits.
        corruption, amount: How queries are damaged, one of `CORRUPTIONS`: the share of pixels that is hidden, or the noise as a multiple
            of the digit's norm.
        alpha, beta, update_steps: Of retrieval (Stage II).
        method, separation_steps: Of separation (Stage I), a key of `METHODS`.
        seed: Which digits are drawn.
    """

    count: int = 100
    corruption: str = "hide pixels"
    amount: float = 0.4
    alpha: float = DEFAULTS.alpha
    beta: float = DEFAULTS.beta
    update_steps: int = DEFAULTS.update_steps
    method: str = next(name for name, preset in METHODS.items() if preset is not None and preset().kind == SEPARATION.kind)
    separation_steps: int = SEPARATION.steps
    seed: int = 0


@dataclass(frozen=True)
class Recall:
    """What a memory made of the damaged copy of each of its M patterns.

    Attributes:
        states: (T + 1, M, d), the queries and what they are after each retrieval step.
        energies: (T + 1, M), their energies.
        association: (M, M), the weights of the last step, a row for each query.
        found: (M,), the memory that each final state is most like.
        error: Mean over memories of the sum of squared pixel errors, where the last weights mix the stored images themselves.
    """

    states: torch.Tensor
    energies: torch.Tensor
    association: torch.Tensor
    found: torch.Tensor
    error: float

    @property
    def confused(self) -> torch.Tensor:
        """(M,), True where a digit is retrieved as another one."""
        return self.found != torch.arange(len(self.found))


def stored_digits(count: int, seed: int) -> np.ndarray:
    """Indices of `count` digits; a larger memory holds those of a smaller one."""
    return np.random.default_rng(seed).permutation(len(demo_digits.load().labels))[:count]


def patterns_of(indices: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(demo_digits.load().images[indices].reshape(len(indices), -1)).float()


def corrupted(patterns: torch.Tensor, corruption: str, amount: float, seed: int) -> torch.Tensor:
    """Damaged copies of patterns (M, d), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if corruption == "hide pixels":
        return mask_patterns(patterns, amount, generator)
    if corruption == "add noise":
        return add_noise(patterns, amount, generator)
    if corruption == "hide the lower part":
        width = patterns.shape[-1]
        return patterns * (torch.arange(width) < round((1.0 - amount) * width))
    raise ValueError(f"corruption must be one of {CORRUPTIONS}, got {corruption!r}")


def memory_of(patterns: torch.Tensor, settings: MemorySettings, preset: Callable[..., Separation] | None) -> UHopMemoryModel:
    """A memory of `patterns` after Stage I, or without Phi (W = I) for no preset.

    Phi is linear, so that the energy never rises, and every stored pattern is scaled to a feature of norm 1: beta then means the same
    with Phi and without.
    """
    torch.manual_seed(settings.seed)
    config = UHopMemoryConfig(
        pattern_dim=patterns.shape[-1],
        feature_init="identity",
        normalize_features=False,
        alpha=settings.alpha,
        beta=settings.beta,
    )
    memory = UHopMemoryModel(config)
    memory.store(patterns)
    if preset is not None and len(patterns) > 1:
        # Because the optimal code, which needs no steps, would make N mean nothing, U-Hop+ takes steps on all patterns.
        separation = memory.default_separation if preset == Separation.denoising else preset(batch_size=len(patterns))
        memory.separate(separation, steps=settings.separation_steps)
    memory.requires_grad_(False)
    memory.store(with_unit_features(memory, patterns))
    return memory.eval()


def features(memory: UHopMemoryModel, patterns: torch.Tensor) -> torch.Tensor:
    assert memory.feature_map is not None
    return memory.feature_map(patterns)


def with_unit_features(memory: UHopMemoryModel, patterns: torch.Tensor) -> torch.Tensor:
    """Patterns scaled to features of norm 1; one whose feature is zero stays as it is."""
    norms = features(memory, patterns).norm(dim=-1, keepdim=True)
    return patterns / torch.where(norms > 0, norms, 1.0)


@torch.no_grad()
def recall(memory: UHopMemoryModel, patterns: torch.Tensor, queries: torch.Tensor, update_steps: int) -> Recall:
    """Retrieve step by step from a memory of `patterns`."""
    states = [with_unit_features(memory, queries)]
    for _ in range(update_steps):
        output = memory(states[-1], update_steps=1, output_energies=False)
        states.append(output.retrieved)
    settings: dict[str, Any] = {"beta": memory.config.beta, "alpha": memory.config.alpha}
    energies = [energy(features(memory, state), memory.stored_features(), **settings) for state in states]
    similarity = torch.nn.functional.normalize(states[-1], dim=-1) @ torch.nn.functional.normalize(memory.memories, dim=-1).mT
    # Stored patterns are scaled, and with them what is retrieved: the weights of the last step tell the image in its own units.
    error = (output.association @ patterns - patterns).square().sum(-1).mean()
    return Recall(torch.stack(states), torch.stack(energies), output.association, similarity.argmax(-1), float(error))


@lru_cache(maxsize=64)
def explore(settings: MemorySettings) -> tuple[np.ndarray, dict[str, Recall]]:
    """Indices of the stored digits, and what each side retrieves: "without" and, where there is a separation step, "with".

    Raises:
        DemoError: If nothing is stored.
    """
    if settings.count < 1:
        raise DemoError("Nothing is stored, so nothing can be retrieved. Store at least one digit.")
    indices = stored_digits(settings.count, settings.seed)
    patterns = patterns_of(indices)
    queries = corrupted(patterns, settings.corruption, settings.amount, settings.seed)
    sides = {"without": None, "with": METHODS[settings.method]}
    if sides["with"] is None:
        del sides["with"]
    return indices, {
        name: recall(memory_of(patterns, settings, preset), patterns, queries, settings.update_steps) for name, preset in sides.items()
    }


def next_confused(settings: MemorySettings, current: int) -> int | None:
    """The next stored digit after `current` that is confused without separation; rather one that separation rescues. `None` if none is."""
    _, sides = explore(settings)
    confused = sides["without"].confused
    rescued = confused & ~sides["with"].confused if "with" in sides else confused
    wanted = (rescued if rescued.any() else confused).nonzero().flatten().tolist()
    return min(wanted, key=lambda index: (index <= current, index), default=None)


def headline(settings: MemorySettings, digit: int) -> str:
    """How many digits are confused, how far the retrieved images are from the stored ones, and what the chosen one's query becomes."""
    _, sides = explore(settings)
    names = {"without": "without separation", "with": f"with {settings.method}"}
    lines = []
    for side, result in sides.items():
        count, color = int(result.confused.sum()), WITHOUT if side == "without" else WITH
        became = thumbnail(picture_of(result.states[-1, digit]), names[side], kind="wrong" if result.confused[digit] else "right")
        share = bar(count / settings.count, color, f"{count} of {settings.count}, error {result.error:.2f}")
        data = f'data-side="{side}" data-confused="{count}" data-error="{result.error:.4f}"'
        lines.append(f'<div class="hop-count" {data}>{became}<b>{names[side]}</b>{share}</div>')
    asked = thumbnail(picture_of(sides["without"].states[0, digit]), "the query", kind="query")
    title = '<b title="error: mean squared distance of what is retrieved from what was stored">Retrieved as another digit</b>'
    return f'<div class="hop-headline"><div class="hop-asked">{asked}{title}</div>{"".join(lines)}</div>'


def picture_of(state: torch.Tensor) -> np.ndarray:
    """A state (d,) as an image with its darkest pixel at 1."""
    return stretched(state.reshape(8, 8).numpy())


def side_view(settings: MemorySettings, side: str, digit: int) -> str:
    """One side's retrieval of one digit: the path of the image, the weights of the last step, and the energy."""
    indices, sides = explore(settings)
    if side not in sides:
        return '<div class="hop-note">Choose a method of separation to compare with.</div>'
    result, labels, images = sides[side], demo_digits.load().labels[indices], demo_digits.load().images[indices]
    found, steps = int(result.found[digit]), len(result.states) - 1
    states = [picture_of(state) for state in result.states[:, digit]]
    verdict = "right" if found == digit else "wrong"
    strip = [thumbnail(states[0], "the query", "query", "query")]
    for step in range(1, steps + 1):
        kind = verdict if step == steps else ""
        strip.append(thumbnail(states[step], f"state after step {step}", f"step {step}", kind))
    title = "Without separation" if side == "without" else f"With {settings.method}, N = {settings.separation_steps}"
    same = f"another {labels[found]}" if labels[found] == labels[digit] else f"a {labels[found]}"
    said = f"Retrieved: memory {digit + 1}, a {labels[digit]}." if verdict == "right" else f"Confused with memory {found + 1}, {same}."
    return (
        f'<section class="hop-side {side}"><h3>{html.escape(title)}</h3>'
        f'<div class="hop-strip">{"".join(strip)}</div><p class="hop-verdict {verdict}">{said}</p>'
        f"<h4>Association weights, last step</h4>{weights_view(result.association[digit].numpy(), images, labels, digit)}"
        f"<h4>Energy along retrieval</h4>{energy_plot(settings, side, digit)}</section>"
    )


def weights_view(weights: np.ndarray, images: np.ndarray, labels: np.ndarray, digit: int, most: int = 6) -> str:
    """The memories with the largest weights, largest first, and what the others have together."""
    order = np.argsort(-weights, kind="stable")[:most]
    rows = []
    for memory in order:
        own = int(memory) == digit
        picture = thumbnail(images[memory], f"memory {memory + 1}, a {labels[memory]}", kind="right" if own else "")
        rows.append(f'<div class="hop-row">{picture}{bar(float(weights[memory]), RIGHT if own else WRONG, percent(weights[memory]))}</div>')
    others, some = float(weights.sum() - weights[order].sum()), int((weights > 0).sum())
    rest = f"{some} of {len(weights)} memories have weight" + (f"; those not shown {percent(others)}" if others > 1e-6 else "") + "."
    return f'<div class="hop-weights">{"".join(rows)}</div><p class="hop-small">{rest}</p>'


def energy_plot(settings: MemorySettings, side: str, digit: int) -> str:
    """Energies of all queries along retrieval, that of the chosen digit in colour; both sides share their axes."""
    _, sides = explore(settings)
    energies = sides[side].energies.numpy()
    color = WITHOUT if side == "without" else WITH
    figure = blank_figure(3.3, 2.0)
    axis = figure.subplots()
    steps = np.arange(len(energies))
    axis.add_collection(LineCollection([np.column_stack([steps, line]) for line in energies.T], colors=MUTED, linewidths=0.5, alpha=0.25))
    axis.plot(steps, energies[:, digit], color=color, linewidth=2.4, marker="o", markersize=5)
    everything = np.concatenate([result.energies.numpy().ravel() for result in sides.values()])
    margin = 0.06 * max(float(np.ptp(everything)), 1e-3)
    axis.set(xlim=(-0.1, steps[-1] + 0.1), ylim=(everything.min() - margin, everything.max() + margin))
    axis.set_xlabel("retrieval step", color=INK, fontsize=10)
    axis.set_ylabel("energy E", color=INK, fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(4))
    axis.tick_params(colors=MUTED, labelsize=9)
    axis.grid(color=GRID, linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    return plot(figure, f"Energy falls from {energies[0, digit]:.3f} to {energies[-1, digit]:.3f} in {steps[-1]} steps")
