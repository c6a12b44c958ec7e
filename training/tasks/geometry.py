"""Reproduce the geometry figures and the table of U-Hop+ (arXiv 2410.23126) from a recipe.

python training/train.py configs/geometry/basins.yaml
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from modeling_uhop import FeatureMap, Separation, association, energy, maximize_separation, retrieve, spherical_code
from modeling_uhop.capacity import metastable_sizes, separation_bounds
from modeling_uhop.feature_map import unit_norm
from modeling_uhop.spherical import closest_similarity, separate_optimally

from ..data.images import ImageData, load_images
from ..errors import RecipeError, errors_in_one_line
from ..intervals import spread
from ..processes import refuse_several_processes
from ..recipe_file import read_yaml, with_known_keys
from ..report.geometry_figures import bound_figure, loss_curve_figure, metastable_figure
from ..report.styles import METHODS, OBSERVED, REFERENCE, save
from ..results import as_recorded, write_result
from .retrieval import draw, load_patterns, pixels


SIZES = {"1": (1, 1), "2": (2, 2), "3": (3, 3), "4": (4, 4), "5-10": (5, 10), "> 10": (11, 10**9)}
Result = tuple[dict[str, Any], Figure]


@dataclass
class GeometryRecipe:
    """The recipe of a geometry experiment: memories and their images under Phi.

    Attributes:
        experiment: "landscape", "basins", "loss_curve", "bound", "circle" or "metastable".
        data: Images that memories are sampled from; `None` for Gaussian patterns of width
            `pattern_dim`.
        memories: Numbers of stored patterns M, one for each part of the experiment.
        pattern_dim, feature_dim: Widths d of patterns and D of features. The width of an image is
            its number of values.
        arc: For "landscape" and "basins": the memories lie at equal distances on an arc of the unit
            circle with this width in degrees.
        classes: For "circle": the name of each label in the experiment.
        similar: For "circle": pairs of names that are expected to become neighbours.
        beta: Inverse temperature of retrieval.
        alphas: Values of alpha, the parameter of the simplex map (1: softmax, 2: sparsemax).
        normalize: Whether features have unit norm. If not, W is scaled after U-Hop+ so that the
            mean squared norm of the memories is the same before and after Phi; beta then means the
            same with and without Phi.
        update_steps: Number of update steps T of a retrieval.
        separation_steps: Numbers of steps N of U-Hop+ at which to evaluate; the last is the
            largest.
        temperature, final_temperature, lr, optimizer: Settings of U-Hop+; with
            `final_temperature=None` the temperature is constant.
        queries: For "metastable": the number of queries.
        seeds: For "metastable" and "circle": the number of seeds.
        task: "geometry".
    """

    experiment: str
    data: ImageData | None = None
    memories: list[int] = dataclasses.field(default_factory=lambda: [5])
    pattern_dim: int = 2
    feature_dim: int = 2
    arc: float = 60.0
    classes: dict[int, str] = dataclasses.field(default_factory=dict)
    similar: list[list[str]] = dataclasses.field(default_factory=list)
    beta: float = 5.0
    alphas: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    normalize: bool = True
    update_steps: int = 5
    separation_steps: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2, 5])
    temperature: float = 0.1
    final_temperature: float | None = None
    lr: float = 0.1
    optimizer: str = "sgd"
    queries: int = 500
    seeds: int = 3
    task: str = "geometry"


def run_command(recipe_path: Path, arguments: list[str]) -> None:
    """Run a recipe with the options of a command line: `--dataset` and `--output_dir`.

    Raises:
        SystemExit: For an unknown option, or with one line for an error that the user can correct.
    """
    parser = argparse.ArgumentParser(prog=f"{Path(sys.argv[0]).name} {recipe_path}", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="Hub id or local folder to use instead of the recipe's data set")
    parser.add_argument("--output_dir", default="benchmarks/results", help="folder for the results file and the figure")
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        refuse_several_processes()
        recipe = load(recipe_path)
        if args.dataset:
            if recipe.data is None:
                raise RecipeError(f"--dataset needs a recipe with data, but {recipe_path} uses Gaussian patterns")
            recipe.data.dataset = args.dataset
        results, figure = EXPERIMENTS[recipe.experiment](recipe)
        target = Path(args.output_dir) / f"geometry_{recipe_path.stem}"
        write_result(target.with_suffix(".json"), "geometry", {"results": results, "recipe": as_recorded(recipe)})
        save(figure, target.with_suffix(".png"))
    print(json.dumps(results, indent=1)[:3000], target.with_suffix(".json"), sep="\n")


def load(path: Path) -> GeometryRecipe:
    """Read a recipe; raise a `RecipeError` for another task, or an unknown key or experiment."""
    content = with_known_keys("recipe", read_yaml(path), GeometryRecipe)
    if content.get("data") is not None:
        content["data"] = ImageData(**with_known_keys("data", content["data"], ImageData))
    recipe = GeometryRecipe(**content)
    if recipe.task != "geometry":
        raise RecipeError(f"task must be 'geometry', got {recipe.task!r}")
    if recipe.experiment not in EXPERIMENTS:
        raise RecipeError(f"experiment must be among {tuple(EXPERIMENTS)}, got {recipe.experiment!r}")
    return recipe


def separated_maps(memories: torch.Tensor, recipe: GeometryRecipe, seed: int = 0) -> dict[int, FeatureMap]:
    """The feature map after each number of steps of U-Hop+.

    It is initialised as the identity or, if the widths d and D differ, as an orthogonal map.
    """
    torch.manual_seed(seed)
    same = memories.shape[1] == recipe.feature_dim
    start = "identity" if same else "orthogonal"
    phi = FeatureMap(memories.shape[1], recipe.feature_dim, feature_init=start, normalize=recipe.normalize).to(memories.dtype)
    maps = {}
    for steps in recipe.separation_steps:
        maps[steps] = copy.deepcopy(phi)
        maximize_separation(maps[steps], memories, uhop_plus(recipe, steps))
        maps[steps].requires_grad_(False)
        if not recipe.normalize:
            maps[steps].weight.mul_((memories.square().sum() / maps[steps](memories).square().sum()).sqrt())
    return maps


def uhop_plus(recipe: GeometryRecipe, steps: int) -> Separation:
    """U-Hop+ with the fields that a recipe sets."""
    temperatures = {"temperature": recipe.temperature, "final_temperature": recipe.final_temperature}
    return Separation.uhop_plus(**temperatures, lr=recipe.lr, optimizer=recipe.optimizer, steps=steps)


def on_arc(count: int, degrees: float) -> torch.Tensor:
    """Unit vectors (count, 2) at equal distances on an arc around the diagonal.

    A linear map of the plane can spread these vectors evenly. It can rarely do so for vectors at
    random angles."""
    half = math.radians(degrees) / 2.0
    angles = math.pi / 4.0 + torch.linspace(-half, half, count, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def separation_of(phi: FeatureMap, memories: torch.Tensor) -> float:
    """The separation of memories in feature space: 1 minus the largest cosine similarity of two of
    them."""
    return 1.0 - closest_similarity(unit_norm(phi(memories))).item()


def improved_at_random(count: int, recipe: GeometryRecipe, draws: int = 50) -> float:
    """Fraction of random draws of `count` angles on the arc for which U-Hop+ increases the
    separation.

    The separation after the largest number of steps is compared with that after the smallest.
    """
    improved = 0
    for seed in range(draws):
        places = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
        angles = math.pi / 4.0 + math.radians(recipe.arc) * places
        memories = torch.stack([angles.cos(), angles.sin()], dim=-1)
        separations = [separation_of(phi, memories) for phi in separated_maps(memories, recipe).values()]
        improved += separations[-1] > separations[0]
    return improved / draws


def plane(memories: torch.Tensor, resolution: int = 160) -> tuple[torch.Tensor, float]:
    """A grid of points (resolution^2, 2) on a square around the memories, and half the side of the
    square."""
    reach = 1.4 * memories.abs().max().item()
    axis = torch.linspace(-reach, reach, resolution, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis).flip(-1), reach


def after(steps: int) -> str:
    """The title of a panel."""
    return f"after {steps} {'step' if steps == 1 else 'steps'} of U-Hop+" if steps else "before U-Hop+"


def landscape(recipe: GeometryRecipe) -> Result:
    """The energy over the plane of patterns, before and after steps of U-Hop+."""
    columns = len(recipe.separation_steps)
    figure, axes = plt.subplots(
        len(recipe.memories), columns, figsize=(2.9 * columns, 3.4 * len(recipe.memories) + 0.6), layout="constrained", squeeze=False
    )
    results: dict[str, Any] = {}
    for row, count in zip(axes, recipe.memories, strict=True):
        memories = on_arc(count, recipe.arc)
        grid, reach = plane(memories)
        entry: dict[str, Any] = results.setdefault(f"M={count}", {})
        for axis, (steps, phi) in zip(row, separated_maps(memories, recipe).items(), strict=True):
            heights = energy(grid, memories, beta=recipe.beta, alpha=recipe.alphas[0], feature_map=phi)
            side = math.isqrt(len(grid))
            # Because valleys are shallow and equal energy steps would hide them, we give each
            # thirtieth of the plane its own colour.
            levels = np.unique(np.quantile(heights.numpy(), np.linspace(0.0, 1.0, 31)))
            axis.contourf(
                heights.reshape(side, side).numpy(), levels=levels, norm=BoundaryNorm(levels, 256), extent=(-reach, reach, -reach, reach)
            )
            axis.scatter(*memories.T.numpy(), color="white", edgecolors=OBSERVED, s=35)
            separation = separation_of(phi, memories)
            axis.set(title=f"{after(steps)}\nseparation {separation:.3f}", xticks=[], yticks=[])
            ends = retrieve(memories, memories, beta=recipe.beta, alpha=recipe.alphas[0], feature_map=phi, steps=100)
            distance = (ends - memories).norm(dim=-1)
            entry[f"N={steps}"] = {"separation": separation, "distance_of_memory_to_its_attractor": distance.tolist()}
        entry["share_of_random_crowds_that_improve"] = improved_at_random(count, recipe)
    figure.suptitle(
        f"Energy over the plane (dark: low; memories are white points; beta {recipe.beta:g}):\n"
        "U-Hop+ moves the memories apart in feature space, and each gets a valley of its own"
    )
    return results, figure


def basins(recipe: GeometryRecipe) -> Result:
    """Basins of attraction: the memory that each point of the plane retrieves.

    A point retrieves a memory if it is within 0.001 of it after `update_steps`; other points are
    white."""
    columns = len(recipe.separation_steps)
    figure, axes = plt.subplots(
        len(recipe.alphas), columns, figsize=(3.2 * columns, 3.3 * len(recipe.alphas)), layout="constrained", squeeze=False
    )
    memories = on_arc(recipe.memories[0], recipe.arc)
    grid, reach = plane(memories)
    colors = np.vstack([[1.0, 1.0, 1.0], np.array(plt.get_cmap("Set2")(range(len(memories))))[:, :3]])
    results: dict[str, Any] = {}
    maps = separated_maps(memories, recipe)
    for row, alpha in zip(axes, recipe.alphas, strict=True):
        first = alpha == recipe.alphas[0]
        for axis, (steps, phi) in zip(row, maps.items(), strict=True):
            settings: dict[str, Any] = {"beta": recipe.beta, "alpha": alpha, "feature_map": phi}
            ends = retrieve(grid, memories, steps=recipe.update_steps, **settings)
            distance, nearest = torch.cdist(ends, memories).min(-1)
            basin = torch.where(distance < 1e-3, nearest + 1, 0)
            side = math.isqrt(len(grid))
            axis.imshow(colors[basin.reshape(side, side).numpy()], origin="lower", extent=(-reach, reach, -reach, reach))
            axis.scatter(*memories.T.numpy(), color=OBSERVED, s=18)
            share = (basin > 0).double().mean().item()
            axis.set(title=f"{after(steps) if first else ''}\nalpha {alpha:g}: {share:.0%} reach one", xticks=[], yticks=[])
            entry = {"separation": separation_of(phi, memories), "share_that_reaches_a_memory": share}
            results.setdefault(f"alpha={alpha:g}", {})[f"N={steps}"] = entry
    results["share_of_random_crowds_that_improve"] = improved_at_random(len(memories), recipe)
    figure.suptitle(
        f"Basins: the memory (black point) that each point of the plane is retrieved to, white if none "
        f"({recipe.update_steps} update steps, beta {recipe.beta:g})"
    )
    return results, figure


def loss_curve(recipe: GeometryRecipe) -> Result:
    """The separation loss of U-Hop+ at each of its steps."""
    results = {}
    for count in recipe.memories:
        torch.manual_seed(0)
        memories = torch.randn(count, recipe.pattern_dim)
        phi = FeatureMap(recipe.pattern_dim, recipe.feature_dim, feature_init="normal")
        history = maximize_separation(phi, memories, uhop_plus(recipe, max(recipe.separation_steps)))
        results[f"M={count}"] = {"first": history[0], "last": history[-1], "history": history}
    return results, loss_curve_figure(results, as_recorded(recipe))


def bound(recipe: GeometryRecipe) -> Result:
    """The separation of our spherical codes, compared with the bounds of Proposition 3.1."""
    results = {}
    for count in recipe.memories:
        lower, upper = separation_bounds(count, recipe.feature_dim)
        reached = 1.0 - closest_similarity(spherical_code(count, recipe.feature_dim)).item()
        results[f"M={count}"] = {"lower": lower, "reached": reached, "upper": upper}
    return results, bound_figure(results, as_recorded(recipe))


def circle(recipe: GeometryRecipe) -> Result:
    """One image of each class as a point on the unit circle (D = 2): before U-Hop+, after it, and
    at the optimum of linear maps.

    Each seed samples different images. The figure shows seed 0. The fraction of similar pairs that
    are neighbours is over all seeds."""
    if recipe.data is None or not recipe.classes:
        raise RecipeError("experiment 'circle' needs data and classes; set both in the recipe")
    images = load_images(recipe.data)["train"]
    labels, names = np.asarray(images["label"]), list(recipe.classes.values())
    best = 1.0 - math.cos(2.0 * math.pi / len(names))
    separations: dict[str, list[float]] = {}
    neighbours = []
    for seed in range(recipe.seeds):
        random = np.random.default_rng(seed)
        drawn = images.select([int(random.choice(np.flatnonzero(labels == label))) for label in recipe.classes])
        memories = torch.from_numpy(pixels(drawn["image"])).float() / 127.5 - 1.0
        steps_of = separated_maps(memories, dataclasses.replace(recipe, feature_dim=2), seed)
        maps = {f"N = {steps}": phi for steps, phi in steps_of.items()}
        neighbours += are_neighbours(maps[f"N = {max(recipe.separation_steps)}"], memories, names, recipe.similar)
        maps["optimum"] = FeatureMap(memories.shape[1], 2, normalize=True).to(memories.dtype)
        separate_optimally(maps["optimum"], memories)
        for name, phi in maps.items():
            separations.setdefault(name, []).append(separation_of(phi.requires_grad_(False), memories))
        if seed == 0:
            figure = circles(maps, memories, names, best)
    results: dict[str, Any] = {"separation": {name: spread(values) for name, values in separations.items()}, "best_possible": best}
    if neighbours:
        results["similar_pairs_that_are_neighbours"] = {"share": float(np.mean(neighbours)), "by_chance": min(1.0, 2.0 / (len(names) - 1))}
    return results, figure


def are_neighbours(phi: FeatureMap, memories: torch.Tensor, names: list[str], pairs: list[list[str]]) -> list[bool]:
    """For each pair of names, whether their images are neighbours on the circle."""
    points = phi(memories).detach()
    ranks = torch.atan2(points[:, 1], points[:, 0]).argsort().argsort().tolist()
    place = dict(zip(names, ranks, strict=True))
    return [(place[first] - place[second]) % len(names) in (1, len(names) - 1) for first, second in pairs]


def circles(maps: dict[str, FeatureMap], memories: torch.Tensor, names: list[str], best: float) -> Figure:
    """A unit circle for each map, with the features of an image of each class."""
    figure, axes = plt.subplots(1, len(maps), figsize=(2.9 * len(maps), 3.7), layout="constrained", squeeze=False)
    style = METHODS["U-Hop+"]
    for axis, (title, phi) in zip(axes[0], maps.items(), strict=True):
        points = unit_norm(phi(memories)).detach().numpy()
        axis.add_patch(plt.Circle((0, 0), 1.0, fill=False, color=REFERENCE))
        axis.scatter(*points.T, color=style.color, marker=style.marker)
        angles = apart(np.arctan2(points[:, 1], points[:, 0]), math.radians(17.0))
        for name, point, angle in zip(names, points, angles, strict=True):
            place = 1.45 * np.array([math.cos(angle), math.sin(angle)])
            axis.plot(*np.stack([point, 0.88 * place]).T, color=REFERENCE, linewidth=0.8, zorder=0)
            axis.text(*place, name, ha="center", va="center", fontsize=9)
        heading = "best linear map" if title == "optimum" else after(int(title.removeprefix("N = ")))
        axis.set(title=f"{heading}\nseparation {separation_of(phi, memories):.3f}", xticks=[], yticks=[])
        axis.set(aspect="equal", xlim=(-1.85, 1.85), ylim=(-1.75, 1.75), frame_on=False)
    figure.suptitle(f"An image of each class, as features of width 2 (evenly spread points have separation {best:.3f})")
    return figure


def apart(angles: np.ndarray, least: float) -> np.ndarray:
    """Angles moved until neighbours differ by at least `least`, for labels that do not overlap."""
    order = np.argsort(angles)
    gaps = np.diff(angles[order], append=angles[order[0]] + 2.0 * math.pi)
    # From the largest gap on, so that the last and the first do not meet.
    order = np.roll(order, -1 - int(gaps.argmax()))
    moved = np.unwrap(angles[order])
    for place in range(1, len(moved)):
        moved[place] = max(moved[place], moved[place - 1] + least)
    moved -= np.mean(moved - np.unwrap(angles[order]))
    result = np.empty_like(moved)
    result[order] = moved
    return result


def metastable(recipe: GeometryRecipe) -> Result:
    """Metastable states: fractions of queries by the number of memories they retrieve (U-Hop+,
    Table 1).

    They are measured without Phi and after U-Hop+. The number of different memories with the
    largest weight of any query is given too, because every size is also 1 if all queries retrieve
    the same memory."""
    steps = max(recipe.separation_steps)
    counts: dict[str, dict[str, list[float]]] = {}
    for seed in range(recipe.seeds):
        if recipe.data is None:
            generator = torch.Generator().manual_seed(seed)
            patterns = torch.randn(recipe.memories[0] + recipe.queries, recipe.pattern_dim, generator=generator)
        else:
            patterns = draw(load_patterns(recipe.data), recipe.memories[0] + recipe.queries, seed) * 2.0 - 1.0
        memories, queries = patterns[: recipe.memories[0]], patterns[recipe.memories[0] :]
        separated = separated_maps(memories, recipe, seed)[steps]
        plain = unit_norm if recipe.normalize else None
        for alpha in recipe.alphas:
            for name, phi in (("without Phi", plain), ("U-Hop+", separated)):
                settings: dict[str, Any] = {"beta": recipe.beta, "alpha": alpha, "feature_map": phi}
                states = retrieve(queries, memories, steps=recipe.update_steps, **settings)
                weights = association(states, memories, **settings)
                sizes = metastable_sizes(weights, alpha)
                different = weights.argmax(-1).unique().numel()
                shares = counts.setdefault(f"alpha={alpha:g}, {name}", {})
                for label, (least, most) in SIZES.items():
                    shares.setdefault(label, []).append(((sizes >= least) & (sizes <= most)).double().mean().item())
                shares.setdefault("different memories", []).append(different)

    results = {name: {label: spread(values) for label, values in shares.items()} for name, shares in counts.items()}
    return results, metastable_figure(results, as_recorded(recipe))


EXPERIMENTS: dict[str, Callable[[GeometryRecipe], Result]] = {
    "landscape": landscape,
    "basins": basins,
    "loss_curve": loss_curve,
    "bound": bound,
    "circle": circle,
    "metastable": metastable,
}
