"""Model cards: of a run, beside its results; and of the released recipes, in model_cards/, from benchmarks/results.

Those in model_cards/ are made anew by `python training/document.py`.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from recipe import ROOT, MILRecipe, STanHopRecipe, ViTRecipe, apply_override
from tables import results_table

from modeling_uhop import SeparationCallback
from modeling_uhop.model_card import family_of, model_card, write_model_card


RECIPES: dict[str, Any] = {"vit": ViTRecipe, "mil": MILRecipe, "stanhop": STanHopRecipe}
RESULTS = ROOT / "benchmarks" / "results"
CARDS = ROOT / "model_cards"
TEMPLATE = CARDS / "template.md"
FIGURES = {
    "curves.png": "Losses and accuracies of every variant by epoch",
    "samples.png": "Accuracies by the number of training images",
    "training.png": "Training, and cosines between patch features before and after the separation step",
    "bag.png": "A bag, sorted by the weights of the model",
    "forecast.png": "Forecasts beside the windows that a memory retrieves",
    "weights.png": "Association weights over time and over series",
}
# Fields that only some recipes have, and that tell their runs apart.
OPTIONS = ("ensemble", "architecture", "skip_start")
# The number of memories and the conditions that a memory's card speaks of.
MEMORIES, PANEL = "100", "unit norm, beta 10"


def write_card(folder: Path, model_id: str | None = None) -> None:
    """Write the card of a finished run, with its figures, and the comparison of its recipe if that is a released one."""
    recipe = json.loads((folder / "results.json").read_text())["recipe"]
    path = RESULTS / f"{recipe['name']}.json"
    gathered = json.loads(path.read_text()) if path.is_file() else {}
    same = "variants" in gathered and same_training(gathered["recipe"], recipe)
    write_model_card(
        folder,
        folder / "results.json",
        TEMPLATE,
        model_id=model_id,
        comparison=comparison(gathered) if same else None,
        figures=[(title, name) for name, title in FIGURES.items() if (folder / name).is_file()],
    )


def released_cards() -> dict[Path, str]:
    """The text of every card in model_cards/, by its path."""
    cards = {}
    for path in sorted(RESULTS.glob("*.json")):
        gathered = json.loads(path.read_text())
        of_a_recipe = "variants" in gathered and not gathered.get("sweep", {}).get("suffix")
        if of_a_recipe or gathered.get("recipe", {}).get("experiment") == "memory_size":
            options: dict[str, Any] = {
                "comparison": comparison(gathered),
                "cost": cost_of(gathered, path.stem),
                "figures": figures_of(path),
            }
            cards[CARDS / f"{path.stem}.md"] = f"{model_card(released(gathered, path.stem), TEMPLATE, **options)}\n"
    return cards


def figures_of(path: Path) -> list[tuple[str, str]]:
    """Titles of the pictures beside a results file, and their paths from a card."""
    titles = {
        f"{path.stem}.png": "Error against the number of memories",
        **{f"{path.stem}_{name}": FIGURES[name] for name in sorted(FIGURES)},
    }
    return [(title, f"../benchmarks/results/{name}") for name, title in titles.items() if (path.parent / name).is_file()]


def released(gathered: dict[str, Any], name: str) -> dict[str, Any]:
    """Gathered results in the form of one run's: those of the recipe as it stands, over its seeds."""
    recipe = {"name": name, **gathered["recipe"]}
    shared = {"recipe": recipe, "versions": gathered["versions"], "commit": gathered["commit"]}
    if "summary" in gathered:
        errors = gathered["summary"][PANEL]["denoising"][MEMORIES]
        return {**shared, "metrics": {"error": errors}, "seeds": f"{recipe['repeats']} sets of memories"}
    if "results" in gathered:
        variant = variant_as_released(recipe, gathered["variants"])
        metrics = gathered["results"][variant]
        repeats = len(metrics[recipe["metrics"][0]]["by_repeat"])
        folds = f"{repeats} cross-validations of {recipe['folds']} folds"
        return {**shared, "metrics": metrics, "num_parameters": gathered["parameters"][variant], "seeds": folds}
    variant = variant_as_released(recipe, gathered["sweep"]["variants"])
    return {**shared, **gathered["variants"][variant], "seeds": ", ".join(str(seed) for seed in gathered["sweep"]["seeds"])}


def variant_as_released(recipe: dict[str, Any], variants: dict[str, list[str]]) -> str:
    """The variant of a comparison whose overrides leave the recipe as it is."""
    for variant, overrides in variants.items():
        changed = json.loads(json.dumps(recipe))
        for override in overrides:
            apply_override(changed, override)
        if same_training(changed, recipe):
            return variant
    raise ValueError(f"no variant of {recipe['name']} is the recipe itself")


def same_training(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two recorded recipes train the same way, whatever their seed, where their data lay and what defaults they spell out."""

    def training(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe_class = RECIPES[family_of(recipe).name]
        data = {**vars(recipe_class.data_class("anything")), **recipe["data"], "dataset": "anything"}
        model = {**vars(recipe_class.config_class()), **recipe["model"]}
        rest = {key: recipe.get(key, getattr(recipe_class, key, None)) for key in ("separation", "training", *OPTIONS)}
        if rest["separation"] is not None:
            arguments = inspect.signature(SeparationCallback).parameters.values()
            rest["separation"] = {**{each.name: each.default for each in arguments}, **rest["separation"]}
        return {**rest, "name": recipe["name"], "model": model, "data": data}

    return training(first) == training(second)


def comparison(gathered: dict[str, Any]) -> str:
    """The table of a released recipe beside its baselines."""
    if "summary" in gathered:
        errors = {model: sizes[MEMORIES] for model, sizes in gathered["summary"][PANEL].items() if MEMORIES in sizes}
        rows = [f"| {model} | {error['mean']:.2f} ± {error['std']:.2f} |" for model, error in errors.items()]
        return "\n".join(["| model | sum of squared pixel errors |", "| --- | --- |", *rows])
    return results_table([gathered])


def cost_of(gathered: dict[str, Any], name: str) -> str:
    """What the recipe's header says that it costs, and the machine of these results where they name it."""
    recipe = gathered["recipe"]
    folder, stem = ("configs/retrieval", name.removeprefix("retrieval_")) if family_of(recipe).name == "memory" else ("configs", name)
    path = ROOT / folder / f"{stem}.yaml"
    match = re.search(r"^# Cost: +(.*)$", path.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{path} does not say what it costs")
    return f"{match[1]}; these results come from {gathered['machine']}" if "machine" in gathered else match[1]
