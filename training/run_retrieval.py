"""Retrieval experiments of U-Hop (arXiv 2404.03827, section 4.1) from a recipe: a results JSON and a figure.

python training/run_retrieval.py configs/retrieval/memory_size_digits.yaml
python training/run_retrieval.py configs/retrieval/memory_size_mnist.yaml --dataset path/to/mnist
"""

import argparse
import dataclasses
import functools
import json
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from data import load_images
from figures import retrieval_figure
from PIL import Image
from recipe import (
    DataRecipe,
    RecipeError,
    as_recorded,
    errors_in_one_line,
    provenance,
    read_yaml,
    refuse_several_processes,
    with_known_keys,
)
from scipy.stats import spearmanr
from transformers.utils import logging

from modeling_uhop import UHopMemoryConfig, UHopMemoryModel, add_noise, association, mask_patterns, separation_loss
from modeling_uhop.feature_map import unit_norm
from modeling_uhop.images import as_rgb, is_grey


EXPERIMENTS = ("memory_size", "noise_level", "beta", "separation_steps", "separation_loss")

# Fields of the memory's configuration, and arguments of `separate` for those that have a Stage I.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "modern Hopfield": ({}, None),
    "1.5-entmax Hopfield": ({"alpha": 1.5}, None),
    "sparse Hopfield": ({"alpha": 2.0}, None),
    "polynomial": ({"similarity": "polynomial"}, None),
    "cosine": ({"similarity": "cosine"}, None),
    "L2": ({"similarity": "l2"}, None),
    "Manhattan": ({"similarity": "manhattan"}, None),
    "untrained Phi": ({"similarity": "kernel"}, None),
    "U-Hop": ({"similarity": "kernel"}, {"method": "uhop"}),
    "U-Hop, closest pair": ({"similarity": "kernel"}, {"method": "uhop", "kind": "nearest"}),
    "U-Hop+": ({"similarity": "kernel"}, {"method": "uhop+"}),
    "denoising": ({"similarity": "kernel"}, {"method": "denoising"}),
    "denoising, learned from noise": ({"similarity": "kernel"}, {"method": "denoising", "corruption": add_noise}),
}


@dataclass
class Panel:
    """Conditions that all models of a panel share.

    Attributes:
        normalize: Whether similarities, all of them, are of unit-norm patterns and features.
        beta: Inverse temperature; of "polynomial" too, of degree 10 beta; where beta is fixed its degree stays 10.
        optimizer, lr: Of Stage I.
    """

    normalize: bool = True
    beta: float = 10.0
    optimizer: str = "adam"
    lr: float = 1e-3


@dataclass
class RetrievalRecipe:
    """A retrieval experiment.

    Attributes:
        experiment: What varies along the axis: "memory_size", "noise_level" (times a pattern's norm), "beta",
            "separation_steps", or "separation_loss" (random rates and numbers of steps; `values` has the number of runs).
        data: Images; patterns are drawn from the training split.
        values: The axis.
        models: Names among `MODELS`.
        panels: Conditions by title.
        memories: Number of stored patterns, where it does not vary.
        steps: Steps of Stage I, where they do not vary.
        corruption: "mask" (half of the pixels set to zero) or "noise" (of the pattern's norm), where it does not vary.
        repeats: Seeds: each draws patterns, corruption and the start of Phi.
    """

    experiment: str
    data: DataRecipe
    values: list[float]
    models: list[str]
    panels: dict[str, Panel] = field(default_factory=lambda: {"unit norm, beta 10": Panel()})
    memories: int = 100
    steps: int = 100
    corruption: str = "mask"
    repeats: int = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="YAML file in configs/retrieval/")
    parser.add_argument("--dataset", help="Hub id or local folder to use instead of the recipe's")
    parser.add_argument("--output_dir", default="benchmarks/results", help="where the JSON and the figure go")
    parser.add_argument("--update", nargs="+", metavar="MODEL", choices=MODELS, help="measure these anew and keep the others' results")
    args = parser.parse_args()
    target = Path(args.output_dir) / f"retrieval_{Path(args.recipe).stem}"
    with errors_in_one_line():
        refuse_several_processes()
        recipe = load(Path(args.recipe))
        if args.dataset:
            recipe.data.dataset = args.dataset
        kept = earlier_rows(recipe, target.with_suffix(".json"), args.update) if args.update else []
        patterns = load_patterns(recipe.data)
        measured = dataclasses.replace(recipe, models=args.update or recipe.models)
        rows = [row for row in kept if row["model"] not in measured.models] + list(run(measured, patterns))
    rows.sort(key=lambda row: recipe.models.index(row["model"]))
    write(recipe, rows, target)


def earlier_rows(recipe: RetrievalRecipe, path: Path, update: list[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run of this recipe; a `RecipeError` if it was run with other settings, but for its models."""
    if not path.is_file():
        raise RecipeError(f"there is no {path} to update")
    earlier = json.loads(path.read_text())
    for name, value in as_recorded(recipe).items():
        if name != "models" and earlier["recipe"].get(name) != value:
            raise RecipeError(f"{path} was made with {name}={earlier['recipe'].get(name)}, and cannot be updated with {name}={value}")
    for model in [*update, *(row["model"] for row in earlier["rows"])]:
        if model not in recipe.models:
            raise RecipeError(f"models must be among those of the recipe, {recipe.models}, got {model!r}")
    return earlier["rows"]


def load(path: Path) -> RetrievalRecipe:
    """Read a recipe; a `RecipeError` names an unknown key, experiment or model."""
    content = read_yaml(path)
    with_known_keys("recipe", content, RetrievalRecipe)
    data = with_known_keys("data", content.get("data", {}), DataRecipe)
    panels = {title: Panel(**with_known_keys(f"panel {title!r}", panel, Panel)) for title, panel in content.pop("panels", {}).items()}
    recipe = RetrievalRecipe(**{**content, "data": DataRecipe(**data), **({"panels": panels} if panels else {})})
    for name, value, choices in (
        ("experiment", [recipe.experiment], EXPERIMENTS),
        ("models", recipe.models, tuple(MODELS)),
        ("corruption", [recipe.corruption], ("mask", "noise")),
    ):
        for unknown in set(value) - set(choices):
            raise RecipeError(f"{name} must be among {choices}, got {unknown!r}")
    return recipe


def load_patterns(data: DataRecipe) -> np.ndarray:
    """Training images as `pixels` has them."""
    return pixels(load_images(data)["train"].with_format(None)["image"])


def pixels(images: Iterable[Image.Image]) -> np.ndarray:
    """Images as rows of 8-bit pixels, of one channel where they are grey and of three where they are not.

    Raises:
        RecipeError: If the images are not of one size, or some grey and others in colour.
    """
    rows = [np.asarray(as_rgb(image).getchannel(0) if is_grey(image) else as_rgb(image)) for image in images]
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise RecipeError(f"patterns must come from images of one size, all grey or all in colour, got {shapes[0]} and {shapes[1]}")
    return np.stack(rows).reshape(len(rows), -1)


def draw(patterns: np.ndarray, count: int, seed: int) -> torch.Tensor:
    if count > len(patterns):
        raise RecipeError(f"there are {len(patterns)} images, too few for {count} memories")
    chosen = np.random.default_rng(seed).choice(len(patterns), count, replace=False)
    return torch.from_numpy(patterns[chosen]).float() / 255.0


def build(name: str, panel: Panel, memories: torch.Tensor, recipe: RetrievalRecipe, steps: int, lr: float | None = None) -> UHopMemoryModel:
    """One model with its memories, separated if it has a Stage I."""
    fields, separation = MODELS[name]
    beta = 1.0 if name == "polynomial" and recipe.experiment != "beta" else panel.beta
    config = {"similarity": "dot", "beta": beta, "normalize_features": panel.normalize, **fields}
    model = UHopMemoryModel(UHopMemoryConfig(pattern_dim=memories.shape[1], **config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal images are stored twice, and say so
        model.store(memories)
    if separation is not None and steps > 0:
        options: dict[str, Any] = {}
        if separation["method"] != "uhop+":
            # U-Hop+ ends at an optimal code, or moves by its own optimizer at its own rate.
            options = {"optimizer": panel.optimizer, "lr": panel.lr if lr is None else lr}
        if separation["method"] == "denoising":
            options["corruption"] = corruption_of(recipe, None)
        model.separate(steps=steps, **{**options, **separation})
    return model


def corruption_of(recipe: RetrievalRecipe, level: float | None) -> Any:
    if level is not None:
        return functools.partial(add_noise, level=level)
    return mask_patterns if recipe.corruption == "mask" else add_noise


@torch.no_grad()
def error_of(model: UHopMemoryModel, queries: torch.Tensor, panel: Panel) -> float:
    """Sum of squared pixel differences, averaged over queries; what is mixed are raw memories, however they are compared."""
    memories, config = model.memories, model.config
    if model.feature_map is None and panel.normalize:
        settings: dict[str, Any] = {"similarity": config.similarity, "degree": config.degree, "beta": config.beta, "alpha": config.alpha}
        retrieved = association(unit_norm(queries), unit_norm(memories), **settings) @ memories
    else:
        retrieved = model(queries).retrieved
    return (retrieved - memories).square().sum(-1).mean().item()


def run(recipe: RetrievalRecipe, patterns: np.ndarray):
    """Yield a row {panel, model, value, repeat, error} for each measurement."""
    logging.set_verbosity_error()
    jobs = [(title, name, repeat) for repeat in range(recipe.repeats) for title in recipe.panels for name in recipe.models]
    measure = globals()[f"_{recipe.experiment}"]
    for title, name, repeat in logging.tqdm(jobs, desc=recipe.experiment):
        for value, error in measure(recipe, patterns, name, recipe.panels[title], repeat):
            yield {"panel": title, "model": name, "value": value, "repeat": repeat, "error": error}


def _memory_size(recipe: RetrievalRecipe, patterns: np.ndarray, name: str, panel: Panel, repeat: int):
    for count in recipe.values:
        memories = draw(patterns, int(count), repeat)
        torch.manual_seed(repeat)
        queries = corruption_of(recipe, None)(memories)
        yield count, error_of(build(name, panel, memories, recipe, recipe.steps), queries, panel)


def _noise_level(recipe: RetrievalRecipe, patterns: np.ndarray, name: str, panel: Panel, repeat: int):
    memories = draw(patterns, recipe.memories, repeat)
    torch.manual_seed(repeat)
    model = build(name, panel, memories, recipe, recipe.steps)
    for level in recipe.values:
        # A seed of its own: the same noise at every level, and none of the numbers that Phi began with.
        torch.manual_seed(10_000 + repeat)
        yield level, error_of(model, add_noise(memories, level), panel)


def _beta(recipe: RetrievalRecipe, patterns: np.ndarray, name: str, panel: Panel, repeat: int):
    memories = draw(patterns, recipe.memories, repeat)
    for beta in recipe.values:
        torch.manual_seed(repeat)
        queries = corruption_of(recipe, None)(memories)
        yield beta, error_of(build(name, dataclasses.replace(panel, beta=beta), memories, recipe, recipe.steps), queries, panel)


def _separation_steps(recipe: RetrievalRecipe, patterns: np.ndarray, name: str, panel: Panel, repeat: int):
    memories = draw(patterns, recipe.memories, repeat)
    for steps in recipe.values:
        torch.manual_seed(repeat)
        queries = corruption_of(recipe, None)(memories)
        yield steps, error_of(build(name, panel, memories, recipe, int(steps)), queries, panel)


def _separation_loss(recipe: RetrievalRecipe, patterns: np.ndarray, name: str, panel: Panel, repeat: int):
    """Random numbers of steps in [1, 200] and rates |N(0, 1)| times the panel's, by the separation loss they end at."""
    memories = draw(patterns, recipe.memories, repeat)
    random = np.random.default_rng(repeat)
    for _ in range(int(recipe.values[0])):
        torch.manual_seed(repeat)
        queries = corruption_of(recipe, None)(memories)
        steps, lr = int(random.integers(1, 201)), panel.lr * abs(random.standard_normal())
        model = build(name, panel, memories, recipe, steps, lr)
        with torch.no_grad():
            features = memories if model.feature_map is None else model.feature_map(memories)
            yield separation_loss(features).item(), error_of(model, queries, panel)


def summarize(recipe: RetrievalRecipe, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By panel and model: mean and standard deviation over repeats at each value; for "separation_loss" the rank correlation."""
    summary: dict[str, Any] = {}
    for title in recipe.panels:
        for name in recipe.models:
            mine = [row for row in rows if row["panel"] == title and row["model"] == name]
            if recipe.experiment == "separation_loss":
                correlation = spearmanr([row["value"] for row in mine], [row["error"] for row in mine])
                entry: Any = {"spearman": float(correlation.statistic), "p": float(correlation.pvalue), "runs": len(mine)}
            else:
                entry = {}
                for value in recipe.values:
                    errors = [row["error"] for row in mine if row["value"] == value]
                    spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
                    entry[f"{value:g}"] = {"mean": statistics.mean(errors), "std": spread}
            summary.setdefault(title, {})[name] = entry
    return summary


def write(recipe: RetrievalRecipe, rows: list[dict[str, Any]], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "summary": summarize(recipe, rows),
        "recipe": as_recorded(recipe),
        "rows": rows,
        **provenance(),
    }
    target.with_suffix(".json").write_text(json.dumps(results) + "\n")
    retrieval_figure(target.with_suffix(".png"), recipe.experiment, rows, recipe.data.dataset)
    print(yaml.safe_dump({"summary": results["summary"]}, sort_keys=False), target.with_suffix(".json"))


if __name__ == "__main__":
    main()
