"""The energy landscape in the plane: memories are points that the visitor drags."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_digits import DemoError
from demo_drawing import POINTS, data_uri, picture
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from modeling_uhop import FeatureMap, Separation, energy, maximize_separation, retrieve
from modeling_uhop.feature_map import unit_norm


REACH = 1.6
MOST_POINTS = len(POINTS)
VIEWS = ("energy", "basins")
# A retrieval of `STEPS` steps reaches a memory if it ends within this distance.
NEAR = 0.05
STEPS = 50
# The steps that are drawn, because later states hardly move.
DRAWN = (0, 1, 2, 3, 4, 6, 9, 14, 22, 34, STEPS)
HERE = Path(__file__).parent
SCRIPT = (HERE / "landscape.js").read_text()
TEMPLATE = """
<div class="hop-planes">
  <figure><figcaption></figcaption><svg viewBox="0 0 400 400" aria-label="landscape of the patterns"></svg></figure>
  <figure><figcaption></figcaption><svg viewBox="0 0 400 400" aria-label="landscape of their features"></svg></figure>
</div>
"""


def starting_points() -> dict[str, Any]:
    """Five memories on a short arc, a query, and the number of the last drag."""
    angles = math.pi / 4.0 + np.radians(np.linspace(-38.0, 38.0, 5))
    points = np.column_stack([np.cos(angles), np.sin(angles)]).round(3)
    return {"points": points.tolist(), "query": [-0.35, 0.75], "stamp": 0}


def separated_map(points: torch.Tensor, steps: int) -> FeatureMap:
    """The linear map of the plane after `steps` of U-Hop+ from the identity."""
    phi = FeatureMap(2, feature_init="identity").to(points.dtype)
    if len(points) > 1 and steps > 0:
        separation = Separation.uhop_plus(steps=steps, temperature=0.05, final_temperature=None, lr=0.03, optimizer="sgd")
        maximize_separation(phi, points, separation)
    return phi.requires_grad_(False)


def features(phi: FeatureMap, points: torch.Tensor) -> torch.Tensor:
    """Where Phi takes points (..., 2), each kept at its distance from the origin: beta then means the same before and after."""
    return points.norm(dim=-1, keepdim=True) * unit_norm(phi(points))


def plane(resolution: int) -> torch.Tensor:
    """Points (resolution^2, 2) in the middles of the picture's pixels, row by row from below."""
    axis = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution * 2.0 * REACH - REACH
    return torch.cartesian_prod(axis, axis).flip(-1)


def landscape(memories: torch.Tensor, alpha: float, beta: float, resolution: int = 100) -> np.ndarray:
    """Energies (resolution, resolution) over the plane of `memories` (M, 2), the lowest row first.

    Of features these are the energies of a kernelized memory: Phi is linear, so its retrieval is that of the features in their own plane.
    """
    heights = energy(plane(resolution), memories, beta=beta, alpha=alpha)
    return heights.reshape(resolution, resolution).numpy()


def basins(memories: torch.Tensor, alpha: float, beta: float, resolution: int = 128) -> np.ndarray:
    """For each place of the plane the memory that it is retrieved to, -1 where it ends in a mixture; the lowest row first."""
    ends = retrieve(plane(resolution), memories, beta=beta, alpha=alpha, steps=STEPS)
    distance, nearest = torch.cdist(ends, memories).min(-1)
    return torch.where(distance < NEAR, nearest, -1).reshape(resolution, resolution).numpy()


def path(start: torch.Tensor, memories: torch.Tensor, alpha: float, beta: float, steps: int = STEPS) -> torch.Tensor:
    """States (steps + 1, ..., 2) along retrieval."""
    states = [start]
    for _ in range(steps):
        states.append(retrieve(states[-1], memories, beta=beta, alpha=alpha))
    return torch.stack(states)


def energy_picture(heights: np.ndarray, pixels: int = 400) -> Image.Image:
    """Energies as colour, dark where they are low, with lines of equal energy.

    A colour stands for the rank of a height, not for the height: valleys are shallow, and even steps of energy would hide them.
    """
    ranks = np.searchsorted(np.sort(heights, axis=None), heights) / heights.size
    figure = Figure(figsize=(1, 1), dpi=pixels)
    canvas = FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    square = (-REACH, REACH, -REACH, REACH)
    # Without the darkest quarter of the map, which points and paths would not stand out from.
    axis.imshow(
        0.25 + 0.75 * ranks, origin="lower", extent=square, cmap="YlGnBu_r", vmin=0, vmax=1, interpolation="bilinear", aspect="auto"
    )
    middles = (np.arange(len(heights)) + 0.5) / len(heights) * 2.0 * REACH - REACH
    axis.contour(middles, middles, ranks, levels=np.linspace(0.02, 0.96, 20), colors="white", linewidths=0.14, alpha=0.75)
    axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def basin_picture(basin: np.ndarray) -> Image.Image:
    """Basins in pale colours of their memories, white where retrieval ends in a mixture."""
    colors = np.array([to_rgb(color) for color in POINTS])
    palette = np.vstack([0.42 * colors + 0.58, [1.0, 1.0, 1.0]])
    return picture(palette[basin[::-1]])


def scene(state: dict[str, Any], alpha: float, beta: float, separation_steps: int, view: str) -> dict[str, Any]:
    """Everything that the page's component draws: a picture, a lattice of paths and the query's path for either side.

    Raises:
        DemoError: If there are no points.
        ValueError: If `view` is unknown.
    """
    if view not in VIEWS:
        raise ValueError(f"view must be one of {VIEWS}, got {view!r}")
    if not state["points"]:
        raise DemoError("There is no memory in the plane. Add one.")
    points = torch.tensor(state["points"], dtype=torch.float64)
    query = torch.tensor([state["query"]], dtype=torch.float64)
    lattice = torch.linspace(-0.85 * REACH, 0.85 * REACH, 6, dtype=torch.float64)
    starts = torch.cartesian_prod(lattice, lattice)
    phi = separated_map(points, separation_steps)
    planes = {
        "Patterns, without separation": (points, query),
        f"Features, after N = {separation_steps} steps": (features(phi, points), features(phi, query)),
    }
    sides = []
    for title, (memories, start) in planes.items():
        settings: dict[str, Any] = {"memories": memories, "alpha": alpha, "beta": beta}
        way = path(start, **settings)[:, 0]
        distance, nearest = (way[-1] - memories).norm(dim=-1).min(-1)
        if view == "energy":
            image = data_uri(energy_picture(landscape(**settings)), "webp", quality=88)
        else:
            image = data_uri(basin_picture(basins(**settings)))
        sides.append(
            {
                "title": title,
                "image": image,
                "points": memories.numpy().round(4).tolist(),
                "paths": path(starts, **settings)[list(DRAWN)].transpose(0, 1).numpy().round(3).tolist(),
                "query": way[list(DRAWN)].numpy().round(4).tolist(),
                "ending": f"x reaches memory {int(nearest) + 1}" if distance < NEAR else "x ends in a mixture",
            }
        )
    return {**state, "sides": sides, "reach": REACH, "colors": list(POINTS), "view": view}


def moved(points: Any, query: Any, stamp: Any) -> dict[str, Any]:
    """The state that a drag leaves, kept inside the picture.

    Raises:
        DemoError: If it is not made of places, or of none or too many.
    """
    if not 1 <= len(points) <= MOST_POINTS:
        raise DemoError(f"There must be 1 to {MOST_POINTS} memories, not {len(points)}.")
    places = np.asarray([*points, query], dtype=float)
    if places.ndim != 2 or places.shape[1] != 2 or not np.isfinite(places).all():
        raise DemoError("A point is not at a place in the plane.")
    inside = places.clip(-REACH, REACH).round(4).tolist()
    return {"points": inside[:-1], "query": inside[-1], "stamp": int(stamp)}


def with_another(state: dict[str, Any]) -> dict[str, Any]:
    """One more memory, where it is furthest from the others.

    Raises:
        DemoError: If there are as many as there are colours.
    """
    if len(state["points"]) >= MOST_POINTS:
        raise DemoError(f"There is room for {MOST_POINTS} memories.")
    axis = np.linspace(-1.1, 1.1, 12)
    places = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    distances = [min((math.dist(place, point) for point in state["points"]), default=1.0) for place in places]
    return {**state, "points": [*state["points"], places[int(np.argmax(distances))].round(3).tolist()]}


def without_last(state: dict[str, Any]) -> dict[str, Any]:
    """One memory fewer.

    Raises:
        DemoError: If it is the only one.
    """
    if len(state["points"]) <= 1:
        raise DemoError("Without a memory there is nothing to retrieve: one must stay.")
    return {**state, "points": state["points"][:-1]}
