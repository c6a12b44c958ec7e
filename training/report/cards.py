"""Model cards: of a finished run, in its folder; and of the released recipes, in model_cards/, from
benchmarks/results.

`make tables` writes those in model_cards/ again.
"""

import json
import re
from pathlib import Path
from typing import Any

from modeling_uhop import UHopMemoryConfig, UHopMemoryModel
from modeling_uhop.model_card import family_of, model_card

from ..intervals import Interval, half_width, over_folds, over_seeds
from ..recipe import ROOT
from ..recipe_file import apply_override
from ..results import read_result
from ..stage_one import with_defaults
from ..tasks import recipe_class_of
from .styles import BASELINES
from .tables import results_table


RESULTS = ROOT / "benchmarks" / "results"
CARDS = ROOT / "model_cards"
TEMPLATE = CARDS / "template.md"
FIGURES = {
    "curves.png": "Losses and accuracies by epoch",
    "differences.png": "Paired differences between variants, with 95 % confidence intervals",
    "samples.png": "Accuracies by the number of training images",
    "training.png": "Training, and cosines between patch features before and after the separation step",
    "bag.png": "A bag, sorted by the weights of the model",
    "forecast.png": "Forecasts beside the windows that a memory retrieves",
    "weights.png": "Association weights over time and over series",
}
# Fields that only some recipes have, and that tell their runs apart.
OPTIONS = ("ensemble", "architecture", "skip_start")
# Fields of `TrainingArguments` that do not change what is trained.
WITHOUT_EFFECT = ("save_steps", "save_total_limit", "logging_steps", "disable_tqdm", "report_to")
# The settings that the card of a memory describes: the package's defaults, and the largest number
# of memories.
MEMORIES = "500"
METHOD: str = UHopMemoryModel(UHopMemoryConfig()).default_separation.kind
ALPHA, BETA = (f"{getattr(UHopMemoryConfig(), name):g}" for name in ("alpha", "beta"))
PANEL = f"unit norm, beta {BETA}"
NAMES = {"denoising": "denoising", "uhop": "U-Hop", "uhop+": "U-Hop+"}


def write_card(folder: Path, model_id: str | None = None) -> None:
    """Write the card of a finished run, with its figures. If its recipe is a released one, the card
    also has that comparison."""
    results = read_result(folder / "results.json", "run")
    recipe = results["recipe"]
    path = RESULTS / f"{recipe['name']}.json"
    gathered = read_result(path) if path.is_file() else {}
    same = gathered.get("kind") in ("seeds", "folds") and same_training(gathered["recipe"], recipe)
    card = model_card(
        results,
        TEMPLATE,
        model_id=model_id,
        headline=headline_of_run(results, gathered if same else None),
        comparison=comparison(gathered) if same else None,
        figures=[(title, name) for name, title in FIGURES.items() if (folder / name).is_file()],
    )
    card.save(folder / "README.md")


def released_cards() -> dict[Path, str]:
    """The text of every card in model_cards/, by its path."""
    cards = {}
    for path in sorted(RESULTS.glob("*.json")):
        gathered = read_result(path)
        if has_card(gathered):
            options: dict[str, Any] = {
                "headline": headline(gathered),
                "comparison": comparison(gathered),
                "cost": cost_of(gathered, path.stem),
                "figures": figures_of(path),
            }
            cards[CARDS / f"{path.stem}.md"] = f"{model_card(released(gathered, path.stem), TEMPLATE, **options)}\n"
    return cards


def has_card(gathered: dict[str, Any]) -> bool:
    """Whether results are those of a released recipe: a comparison of the recipe as it stands, or a
    retrieval by the number of memories."""
    if gathered["kind"] == "seeds":
        return gathered["recipe"]["task"] != "attach" and not gathered["sweep"]["suffix"]
    return gathered["kind"] == "folds" or (gathered["kind"] == "retrieval" and gathered["recipe"]["experiment"] == "memory_size")


def headline(gathered: dict[str, Any]) -> str:
    """The metric of a released recipe and that of its baseline, each with its 95 % confidence
    interval, in two sentences.

    The baseline of images is the best variant of the comparison that has no separation step. The
    baseline of memories is no Phi at the same alpha and beta, or a better similarity of the papers.
    Elsewhere the baseline is the best one that is no Hopfield model.
    """
    recipe = gathered["recipe"]
    if gathered["kind"] == "retrieval":
        errors = gathered["summary"][PANEL]

        def error(model: str, alpha: str = "1") -> Interval:
            found = errors[model][alpha][MEMORIES]
            return Interval(found["mean"], half_width(found["std"], recipe["repeats"]))

        candidates = {model: error(model) for model in errors if model in BASELINES}
        candidates[f"no Phi at alpha {ALPHA}"] = error("no Phi", ALPHA)
        best = min(candidates, key=lambda model: candidates[model][0])
        ours = f"**Sum of squared pixel errors: {with_interval(*error(NAMES[METHOD], ALPHA))}**"
        settings = f"alpha {ALPHA}, beta {BETA}, {MEMORIES} memories, mean over {recipe['repeats']} sets of memories"
        return f"{ours} ({settings}).\nBest baseline, {best}: {with_interval(*candidates[best])}.\n{INTERVALS}"
    metric, (_, name) = next(iter(family_of(recipe, CARDS).metrics.items()))
    if gathered["kind"] == "folds":
        variant = variant_as_released(recipe, gathered["variants"])
        scores = {job: of_folds(scores, recipe) for job, scores in gathered["results"].items()}
        best = max((job for job in scores if job in BASELINES), key=lambda job: scores[job].mean)
        over = f"{recipe['repeats']} cross-validations of {recipe['folds']} folds"
        baseline = f"Best baseline, {best}: {with_interval(*scores[best])}."
        return f"**{name}: {with_interval(*scores[variant])}** (mean over {over}).\n{baseline}\n{INTERVALS}"
    variant = variant_as_released(recipe, gathered["sweep"]["variants"])
    values = {job: entry["metrics"][metric]["values"] for job, entry in gathered["variants"].items()}
    if recipe["task"] == "images":
        without = [job for job in values if trains_without_separation(recipe, gathered["sweep"]["variants"][job])]
        best = max(without, key=lambda job: over_seeds(values[job]).mean)
        baseline = f"Best variant without separation, {best}: {with_interval(*over_seeds(values[best]))}."
    else:
        baseline = best_fixed(gathered["baselines"], metric)
    return f"**{name}: {with_interval(*over_seeds(values[variant]))}** (mean over {len(values[variant])} seeds).\n{baseline}\n{INTERVALS}"


INTERVALS = "Numbers after ± are 95 % confidence intervals."


def headline_of_run(results: dict[str, Any], gathered: dict[str, Any] | None) -> str | None:
    """The metric of one run, and the headline of its recipe if that is a released one; `None` if
    there is nothing to compare with."""
    family = family_of(results["recipe"], CARDS)
    metric, (_, name) = next(iter(family.metrics.items()))
    value = results["metrics"][metric]
    if results["recipe"]["task"] == "bags" and results.get("outcomes"):
        interval = over_folds([outcome[metric] for outcome in results["outcomes"]], 1, results["recipe"]["folds"] - 1)
        own = f"**{name}: {with_interval(*interval)}** (mean over the folds, with its 95 % confidence interval)."
    else:
        mean = value["mean"] if isinstance(value, dict) else value
        own = f"**{name}: {with_interval(mean, None)}**, from one run, without a confidence interval."
    if gathered is not None:
        return f"{own}\nThe same recipe, repeated: {headline(gathered)}"
    if results["metrics"].get("baselines"):
        return f"{own}\n{best_fixed(results['metrics']['baselines'], metric)}"
    return f"{own}\nThis run was not compared with a baseline."


def best_fixed(baselines: dict[str, dict[str, float]], metric: str) -> str:
    """The forecast baseline with the lowest error. Nothing in it is random, so that it has no
    interval."""
    best = min(baselines, key=lambda baseline: baselines[baseline][metric])
    return f"Best baseline, {best}: {with_interval(baselines[best][metric], None)} (not random, so without an interval)."


def of_folds(scores: dict[str, Any], recipe: dict[str, Any]) -> Interval:
    """The first metric of a variant or baseline, over all folds."""
    by_fold = [score for repeat in scores[f"{recipe['metrics'][0]}_by_fold"] for score in repeat]
    return over_folds(by_fold, 1, recipe["folds"] - 1)


def with_interval(mean: float, width: float | None) -> str:
    return f"{mean:.4f}" + ("" if width is None else f" ± {width:.4f}")


def figures_of(path: Path) -> list[tuple[str, str]]:
    """Titles of the pictures beside a results file, and their paths from a card."""
    titles = {
        f"{path.stem}.png": "Error against the number of memories",
        **{f"{path.stem}_{name}": FIGURES[name] for name in sorted(FIGURES)},
    }
    return [(title, f"../benchmarks/results/{name}") for name, title in titles.items() if (path.parent / name).is_file()]


def released(gathered: dict[str, Any], name: str) -> dict[str, Any]:
    """Gathered results in the form of one run's: those of the recipe as it stands, over its
    seeds."""
    recipe = {"name": name, **gathered["recipe"]}
    shared = {"recipe": recipe, "versions": gathered["versions"], "commit": gathered["commit"]}
    if gathered["kind"] == "retrieval":
        errors = gathered["summary"][PANEL][NAMES[METHOD]][ALPHA][MEMORIES]
        described = {"alpha": ALPHA, "beta": BETA, "memories": MEMORIES, "method": METHOD, "seeds": f"{recipe['repeats']} sets of memories"}
        return {**shared, **described, "metrics": {"error": errors}}
    if gathered["kind"] == "folds":
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


def trains_without_separation(recipe: dict[str, Any], overrides: list[str]) -> bool:
    """Whether a variant of a recipe has no separation step."""
    changed = json.loads(json.dumps(recipe))
    for override in overrides:
        apply_override(changed, override)
    return changed.get("separation") is None


def same_training(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two recorded recipes train the same way, whatever their seed, where their data lay
    and what defaults they spell out."""

    def training(recipe: dict[str, Any]) -> dict[str, Any]:
        recipe_class = recipe_class_of(recipe["task"])
        data = {**vars(recipe_class.data_class("anything")), **recipe["data"], "dataset": "anything"}
        model = {**vars(recipe_class.config_class()), **recipe["model"]}
        rest = {key: recipe.get(key, getattr(recipe_class, key, None)) for key in ("separation", "training", *OPTIONS)}
        if rest["separation"] is not None:
            rest["separation"] = with_defaults(rest["separation"])
        rest["training"] = {key: value for key, value in (rest["training"] or {}).items() if key not in WITHOUT_EFFECT}
        return {**rest, "name": recipe["name"], "model": model, "data": data}

    return training(first) == training(second)


def comparison(gathered: dict[str, Any]) -> str:
    """The table of a released recipe and its baselines; for a memory a row for each map and a
    column for each alpha."""
    if gathered["kind"] == "retrieval":
        by_map = {
            model: by_alpha for model, by_alpha in gathered["summary"][PANEL].items() if all(MEMORIES in e for e in by_alpha.values())
        }
        alphas = sorted({alpha for by_alpha in by_map.values() for alpha in by_alpha}, key=float)
        lines = [["sum of squared pixel errors", *(f"alpha {alpha}" for alpha in alphas)], ["---"] * (1 + len(alphas))]
        for model, by_alpha in by_map.items():
            errors = [by_alpha[alpha][MEMORIES] if alpha in by_alpha else None for alpha in alphas]
            lines.append([model, *("" if error is None else f"{error['mean']:.4f} ± {error['std']:.4f}" for error in errors)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return results_table([gathered])


def cost_of(gathered: dict[str, Any], name: str) -> str:
    """What the recipe's header says that it costs, and the machine of these results where they name
    it."""
    of_memory = gathered["kind"] == "retrieval"
    folder, stem = ("configs/retrieval", name.removeprefix("retrieval_")) if of_memory else ("configs", name)
    path = ROOT / folder / f"{stem}.yaml"
    match = re.search(r"^# Cost: +(.*)$", path.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{path} does not say what it costs")
    return f"{match[1]}; these results come from {gathered['machine']}" if gathered["machine"] else match[1]
