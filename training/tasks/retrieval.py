"""Retrieval experiments of U-Hop (arXiv 2404.03827, section 4.1) from a recipe: a results JSON and a figure.

python training/train.py configs/retrieval/memory_size_digits.yaml
python training/train.py configs/retrieval/memory_size_mnist.yaml --dataset path/to/mnist
"""

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from scipy.stats import spearmanr
from transformers.utils import logging

from modeling_uhop import Separation, UHopMemoryConfig, UHopMemoryModel, add_noise, association, mask_patterns, separation_loss
from modeling_uhop.feature_map import unit_norm
from modeling_uhop.images import as_rgb, is_grey

from ..data.images import ImageData, load_images
from ..errors import RecipeError, errors_in_one_line
from ..intervals import spread
from ..processes import refuse_several_processes
from ..recipe_file import read_yaml, with_known_keys
from ..report.figures import pictures_figure, retrieval_figure
from ..report.styles import dataset_name
from ..report.tables import BASELINES
from ..results import as_recorded, read_result, write_result


EXPERIMENTS = ("memory_size", "noise_level", "beta", "separation_steps", "separation_loss")

# Configuration of the memory, and for methods that have a Stage I its separation and fields to change.
MODELS: dict[str, tuple[dict[str, Any], tuple[Callable[..., Separation], dict[str, Any]] | None]] = {
    "no Phi": ({"similarity": "dot"}, None),
    "untrained Phi": ({"similarity": "kernel"}, None),
    "U-Hop": ({"similarity": "kernel"}, (Separation.uhop, {})),
    "U-Hop, closest pair": ({"similarity": "kernel"}, (Separation.uhop, {"kind": "nearest"})),
    "U-Hop+": ({"similarity": "kernel"}, (Separation.uhop_plus, {})),
    "denoising": ({"similarity": "kernel"}, (Separation.denoising, {})),
    "denoising, learned from noise": ({"similarity": "kernel"}, (Separation.denoising, {"corruption": add_noise})),
    "polynomial": ({"similarity": "polynomial"}, None),
    "cosine": ({"similarity": "cosine"}, None),
    "L2": ({"similarity": "l2"}, None),
    "Manhattan": ({"similarity": "manhattan"}, None),
}


@dataclass
class Panel:
    """Conditions that all models of a panel share.

    Attributes:
        normalize: Whether patterns and features are scaled to unit norm before they are compared.
        beta: Inverse temperature. "polynomial" has degree 10, and beta only where the experiment varies it.
        optimizer, lr: Optimizer and learning rate of Stage I.
    """

    normalize: bool = True
    beta: float = 10.0
    optimizer: str = "adam"
    lr: float = 1e-3


@dataclass
class RetrievalRecipe:
    """A retrieval experiment.

    Attributes:
        experiment: What varies along the axis: "memory_size", "noise_level" (times the norm of a pattern), "beta",
            "separation_steps", or "separation_loss" (random learning rates and numbers of steps; `values` holds the number of runs).
        data: Images that patterns are drawn from.
        values: The axis.
        models: Names among `MODELS`.
        alphas: Simplex maps that every model but the baselines is evaluated with; Stage I does not depend on alpha.
        panels: Conditions by title.
        memories: Number of stored patterns, if the experiment does not vary it.
        steps: Steps of Stage I, if the experiment does not vary them.
        corruption: "mask" (half of the pixels set to zero) or "noise" (of the norm of the pattern), if the experiment does not vary it.
        repeats: Number of seeds, from 0. A seed draws patterns, corruption and the initial Phi.
        split: "train", or "validation" to choose defaults by: part of the training images that no other recipe stores.
        task: "retrieval".
    """

    experiment: str
    data: ImageData
    values: list[float]
    models: list[str]
    alphas: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0])
    panels: dict[str, Panel] = field(default_factory=lambda: {"unit norm, beta 10": Panel()})
    memories: int = 100
    steps: int = 100
    corruption: str = "mask"
    repeats: int = 5
    split: str = "train"
    task: str = "retrieval"


@dataclass(frozen=True)
class Condition:
    """A point of an experiment's axis.

    Attributes:
        value: Its place on the axis; `None` for the separation loss that the run reaches.
        memories: Number of stored patterns.
        steps: Steps of Stage I.
        beta: Inverse temperature; `None` for the panel's.
        noise: Noise of the queries, times the norm of a pattern; `None` for the recipe's corruption.
        lr_factor: Factor of the panel's learning rate.
    """

    value: float | None
    memories: int
    steps: int
    beta: float | None = None
    noise: float | None = None
    lr_factor: float = 1.0


def run_command(recipe_path: Path, arguments: list[str]) -> None:
    """Run a recipe with the options of a command line: `--dataset`, `--output_dir`, `--update` and `--pictures`.

    Raises:
        SystemExit: For an unknown option, or with one line for an error that the user can correct.
    """
    parser = argparse.ArgumentParser(prog=f"{Path(sys.argv[0]).name} {recipe_path}", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="Hub id or local folder to use instead of the recipe's")
    parser.add_argument("--output_dir", default="benchmarks/results", help="where the JSON and the figure go")
    parser.add_argument(
        "--update", nargs="+", metavar="MODEL", choices=MODELS, help="measure these again and keep the results of the others"
    )
    parser.add_argument("--pictures", action="store_true", help="measure nothing; draw retrieved images of a memory_size recipe")
    args = parser.parse_args(arguments)
    target = Path(args.output_dir) / f"retrieval_{recipe_path.stem}"
    with errors_in_one_line():
        refuse_several_processes()
        recipe = load(recipe_path)
        if args.dataset:
            recipe.data.dataset = args.dataset
        if args.pictures:
            if recipe.experiment != "memory_size":
                raise RecipeError(f"--pictures needs a recipe of the experiment 'memory_size', got {recipe.experiment!r}")
            rows_of_images = pictures(recipe, load_patterns(recipe.data, recipe.split))
            title = f"{int(max(recipe.values))} memories of {dataset_name(recipe.data.dataset)}, half of each query masked"
            target.parent.mkdir(parents=True, exist_ok=True)
            path = target.with_name(f"{target.name}_pictures.png")
            pictures_figure(path, rows_of_images, f"{title}, beta {UHopMemoryConfig().beta:g}")
            print(path)
            return
        kept = earlier_rows(recipe, target.with_suffix(".json"), args.update) if args.update else []
        patterns = load_patterns(recipe.data, recipe.split)
        measured = dataclasses.replace(recipe, models=args.update or recipe.models)
        rows = [row for row in kept if row["model"] not in measured.models] + list(run(measured, patterns))
        rows.sort(key=lambda row: (list(recipe.panels).index(row["panel"]), recipe.models.index(row["model"]), row["alpha"]))
        write(recipe, rows, target)


def earlier_rows(recipe: RetrievalRecipe, path: Path, update: list[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run of this recipe; a `RecipeError` if it was run with other settings. The list of models may differ."""
    earlier = read_result(path, "retrieval")
    for name, value in as_recorded(recipe).items():
        if name != "models" and earlier["recipe"].get(name) != value:
            raise RecipeError(f"{path} was made with {name}={earlier['recipe'].get(name)}, and cannot be updated with {name}={value}")
    for model in [*update, *(row["model"] for row in earlier["rows"])]:
        if model not in recipe.models:
            raise RecipeError(f"models must be among those of the recipe, {recipe.models}, got {model!r}")
    return earlier["rows"]


def load(path: Path) -> RetrievalRecipe:
    """Read a recipe; a `RecipeError` names another task, or an unknown key, experiment or model."""
    content = read_yaml(path)
    with_known_keys("recipe", content, RetrievalRecipe)
    data = with_known_keys("data", content.get("data", {}), ImageData)
    panels = {title: Panel(**with_known_keys(f"panel {title!r}", panel, Panel)) for title, panel in content.pop("panels", {}).items()}
    recipe = RetrievalRecipe(**{**content, "data": ImageData(**data), **({"panels": panels} if panels else {})})
    for name, value, choices in (
        ("task", [recipe.task], ("retrieval",)),
        ("experiment", [recipe.experiment], EXPERIMENTS),
        ("models", recipe.models, tuple(MODELS)),
        ("corruption", [recipe.corruption], ("mask", "noise")),
        ("split", [recipe.split], ("train", "validation")),
    ):
        for unknown in set(value) - set(choices):
            raise RecipeError(f"{name} must be among {choices}, got {unknown!r}")
    return recipe


def load_patterns(data: ImageData, split: str = "train") -> np.ndarray:
    """Images of a split as `pixels` has them."""
    return pixels(load_images(data)[split].with_format(None)["image"])


def pixels(images: Iterable[Image.Image]) -> np.ndarray:
    """Images as rows of 8-bit pixels: one channel if all are grey, three if all are in colour.

    Raises:
        RecipeError: If the images are not of one size, or some grey and others in colour.
    """
    rows = [np.asarray(as_rgb(image).getchannel(0) if is_grey(image) else as_rgb(image)) for image in images]
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise RecipeError(f"patterns must come from images of one size, all grey or all in colour, got {shapes[0]} and {shapes[1]}")
    return np.stack(rows).reshape(len(rows), -1)


def conditions(recipe: RetrievalRecipe, seed: int) -> list[Condition]:
    """The points of the recipe's axis. For "separation_loss" they are random: 1 to 200 steps, and rates |N(0, 1)| times the panel's."""
    point = Condition(None, recipe.memories, recipe.steps)
    if recipe.experiment == "separation_loss":
        random = np.random.default_rng(seed)
        draws = [(int(random.integers(1, 201)), abs(random.standard_normal())) for _ in range(int(recipe.values[0]))]
        return [dataclasses.replace(point, steps=steps, lr_factor=factor) for steps, factor in draws]
    vary = {
        "memory_size": lambda value: {"memories": int(value)},
        "noise_level": lambda value: {"noise": value},
        "beta": lambda value: {"beta": value},
        "separation_steps": lambda value: {"steps": int(value)},
    }[recipe.experiment]
    return [dataclasses.replace(point, value=value, **vary(value)) for value in recipe.values]


def draw(patterns: np.ndarray, count: int, seed: int) -> torch.Tensor:
    """`count` patterns chosen at random, as rows of numbers in [0, 1]."""
    if count > len(patterns):
        raise RecipeError(f"there are {len(patterns)} images, too few for {count} memories")
    chosen = np.random.default_rng(seed).choice(len(patterns), count, replace=False)
    return torch.from_numpy(patterns[chosen]).float() / 255.0


def build(name: str, panel: Panel, memories: torch.Tensor, recipe: RetrievalRecipe, steps: int, lr: float | None = None) -> UHopMemoryModel:
    """A model with its memories, separated if it has a Stage I."""
    fields, separation = MODELS[name]
    config = UHopMemoryConfig(
        pattern_dim=memories.shape[1], alpha=1.0, beta=beta_of(name, panel, recipe), normalize_features=panel.normalize, **fields
    )
    model = UHopMemoryModel(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # because equal images are stored twice, and `store` warns of them
        model.store(memories)
    if separation is not None and steps > 0:
        preset, changes = separation
        options: dict[str, Any] = {"steps": steps}
        if preset != Separation.uhop_plus:
            # U-Hop+ reaches an optimal code, or has its own optimizer and rate.
            options |= {"optimizer": panel.optimizer, "lr": panel.lr if lr is None else lr}
        if preset == Separation.denoising:
            options |= {"corruption": corruption_of(recipe), "temperature": 1.0 / model.config.beta}
        model.separate(preset(**{**options, **changes}))
    return model


def beta_of(name: str, panel: Panel, recipe: RetrievalRecipe) -> float:
    return 1.0 if name == "polynomial" and recipe.experiment != "beta" else panel.beta


def corruption_of(recipe: RetrievalRecipe) -> Any:
    return mask_patterns if recipe.corruption == "mask" else add_noise


@torch.no_grad()
def retrieved_by(model: UHopMemoryModel, queries: torch.Tensor, panel: Panel) -> torch.Tensor:
    """What one update step retrieves: always a mixture of the raw memories, however they are compared."""
    memories, config = model.memories, model.config
    if model.feature_map is None and panel.normalize:
        settings: dict[str, Any] = {"similarity": config.similarity, "degree": config.degree, "beta": config.beta, "alpha": config.alpha}
        return association(unit_norm(queries), unit_norm(memories), **settings) @ memories
    return model(queries, output_energies=False).retrieved


def error_of(model: UHopMemoryModel, queries: torch.Tensor, panel: Panel) -> float:
    """Sum of squared pixel errors of what is retrieved, averaged over queries."""
    return (retrieved_by(model, queries, panel) - model.memories).square().sum(-1).mean().item()


def pictures(recipe: RetrievalRecipe, patterns: np.ndarray, count: int = 8) -> dict[str, np.ndarray]:
    """The first `count` memories of seed 0 and what is retrieved from their queries, at the package's default beta: rows of images.

    The memory holds the largest number of memories of the recipe. Its methods are no Phi and the default Stage I.
    """
    logging.set_verbosity_error()
    config = UHopMemoryConfig()
    panel, memories = Panel(beta=float(config.beta)), draw(patterns, int(max(recipe.values)), 0)
    torch.manual_seed(0)
    queries = corruption_of(recipe)(memories)
    rows = {"query": queries[:count]}
    models = {name: build(name, panel, memories, recipe, recipe.steps) for name in ("no Phi", "denoising")}
    for name, alpha in (("no Phi", 1.0), ("no Phi", config.alpha), ("denoising", config.alpha)):
        models[name].config.alpha = alpha
        rows[f"{name}, alpha {alpha:g}"] = retrieved_by(models[name], queries, panel)[:count]
    rows["stored"] = memories[:count]
    return {title: images.numpy() for title, images in rows.items()}


def run(recipe: RetrievalRecipe, patterns: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield a row {panel, model, alpha, value, repeat, error} for each measurement."""
    logging.set_verbosity_error()
    jobs = [(seed, name, condition) for seed in range(recipe.repeats) for name in recipe.models for condition in conditions(recipe, seed)]
    # Models by what their Stage I depends on, the latest of each panel: several conditions share one.
    built: dict[Any, UHopMemoryModel] = {}
    for seed, name, condition in logging.tqdm(jobs, desc=recipe.experiment):
        memories = draw(patterns, condition.memories, seed)
        for measured in _measure(recipe, name, memories, condition, seed, built):
            yield {"model": name, "repeat": seed, **measured}


def _measure(
    recipe: RetrievalRecipe, name: str, memories: torch.Tensor, condition: Condition, seed: int, built: dict[Any, UHopMemoryModel]
) -> Iterator[dict[str, Any]]:
    for title, given in recipe.panels.items():
        panel = given if condition.beta is None else dataclasses.replace(given, beta=condition.beta)
        torch.manual_seed(seed)
        queries = corruption_of(recipe)(memories) if condition.noise is None else None
        # U-Hop and U-Hop+ do not depend on beta, and no Stage I depends on alpha.
        separation = MODELS[name][1]
        beta = panel.beta if separation is not None and separation[0] == Separation.denoising else None
        key = (seed, name, condition.memories, condition.steps, condition.lr_factor, beta, panel.normalize, panel.optimizer, panel.lr)
        if key not in built:
            if len(built) >= len(recipe.panels):
                del built[next(iter(built))]
            built[key] = build(name, panel, memories, recipe, condition.steps, panel.lr * condition.lr_factor)
        model = built[key]
        if queries is None:
            assert condition.noise is not None
            # A seed of its own, so that the noise is the same at every level and independent of the initial Phi.
            torch.manual_seed(10_000 + seed)
            queries = add_noise(memories, condition.noise)
        model.config.beta = beta_of(name, panel, recipe)
        value = condition.value
        if value is None:
            with torch.no_grad():
                features = memories if model.feature_map is None else model.feature_map(memories)
                value = separation_loss(features).item()
        # The papers' baselines have softmax alone.
        for alpha in recipe.alphas if name not in BASELINES else [1.0]:
            model.config.alpha = alpha
            yield {"panel": title, "alpha": alpha, "value": value, "error": error_of(model, queries, panel)}


def summarize(recipe: RetrievalRecipe, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By panel, model and alpha: mean and standard deviation over seeds at each value; for "separation_loss" the rank correlation."""
    summary: dict[str, Any] = {}
    for title, name, alpha in dict.fromkeys((row["panel"], row["model"], row["alpha"]) for row in rows):
        mine = [row for row in rows if (row["panel"], row["model"], row["alpha"]) == (title, name, alpha)]
        if recipe.experiment == "separation_loss":
            correlation = spearmanr([row["value"] for row in mine], [row["error"] for row in mine])
            entry: Any = {"spearman": float(correlation.statistic), "p": float(correlation.pvalue), "runs": len(mine)}
        else:
            entry = {}
            for value in recipe.values:
                errors = spread([row["error"] for row in mine if row["value"] == value])
                entry[f"{value:g}"] = {"mean": errors["mean"], "std": errors["std"]}
        summary.setdefault(title, {}).setdefault(name, {})[f"{alpha:g}"] = entry
    return summary


def write(recipe: RetrievalRecipe, rows: list[dict[str, Any]], target: Path) -> None:
    results = {"summary": summarize(recipe, rows), "recipe": as_recorded(recipe), "rows": rows}
    write_result(target.with_suffix(".json"), "retrieval", results)
    retrieval_figure(target.with_suffix(".png"), recipe.experiment, rows, recipe.data.dataset)
    print(yaml.safe_dump({"summary": results["summary"]}, sort_keys=False), target.with_suffix(".json"))
