"""Compare variants of a multiple-instance recipe and scikit-learn baselines on the same folds.

A finished cross-validation is saved and not repeated with the same settings, so a comparison can be
resumed.

python training/compare_mil.py configs/sweeps/mil.yaml --recipes mil_digits
python training/compare_mil.py configs/sweeps/mil.yaml --data_dir path/to/folder
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC
from transformers.utils import logging

from modeling_uhop import UHopMILConfig, UHopMILFeatureExtractor, UHopMILForBagClassification

from .data.bags import Bags, load_bags
from .data.source import local_dataset
from .errors import RecipeError, errors_in_one_line
from .metrics import bag_metrics
from .processes import refuse_several_processes
from .recipe import ROOT, load_recipe, read_yaml
from .report.tables import bags_table
from .results import as_recorded, provenance, write_atomically
from .tasks.bags import BagsRecipe, check, cross_validate, prepare_for_many_runs, splits, summarize


# A function of (training bags, their labels, evaluated bags), all standardised; it returns the
# scores of the evaluated bags.
Baseline = Callable[[list[np.ndarray], np.ndarray, list[np.ndarray]], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", help="YAML file: recipes, variants as lists of overrides, baselines, pairs to compare")
    parser.add_argument("--recipes", nargs="+", help="run only these recipes of the sweep")
    parser.add_argument("--data_dir", help="folder with a file NAME.parquet for each recipe's data set, to use instead of the Hub")
    parser.add_argument("--runs", default="runs/mil", help="folder for finished cross-validations")
    parser.add_argument("--results", default="benchmarks/results", help="folder for the collected results")
    args = parser.parse_args()
    prepare_for_many_runs()
    with errors_in_one_line():
        refuse_several_processes()
        sweep = read_yaml(Path(args.sweep))
        for name in args.recipes or sweep["recipes"]:
            if name not in sweep["recipes"]:
                raise RecipeError(f"recipes must be among {sweep['recipes']}, got {name!r}")
            compare(sweep, name, args.data_dir, Path(args.runs) / name, Path(args.results) / f"{name}.json")


def compare(sweep: dict[str, Any], name: str, data_dir: str | None, runs: Path, target: Path) -> None:
    """Run every variant and baseline on the folds of one recipe, and write the results file."""
    shared = sweep.get("overrides", [])
    plain = load(name, sweep["repeats"], data_dir, shared)
    variants = {variant: load(name, sweep["repeats"], data_dir, [*shared, *overrides]) for variant, overrides in sweep["variants"].items()}
    for variant, recipe in variants.items():
        if (recipe.folds, recipe.seed, recipe.evaluate_on, recipe.data.dataset) != (
            plain.folds,
            plain.seed,
            plain.evaluate_on,
            plain.data.dataset,
        ):
            raise RecipeError(
                f"variant {variant!r} must not change folds, seed, evaluate_on or dataset: put these in the sweep's `overrides`"
            )
    unknown = sorted(set(sweep["baselines"]) - set(BASELINES))
    if unknown:
        raise RecipeError(f"baselines must be among {tuple(BASELINES)}, got {unknown[0]!r}")
    bags = load_bags(plain.data)
    if sweep["baselines"] and len(bags.names) != 2:
        raise RecipeError(f"the baselines are for two classes, but {name} has {len(bags.names)}; leave `baselines` empty")
    runs.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, Callable[[int], list[dict[str, Any]]]] = {
        **{variant: partial(run_variant, recipe, bags) for variant, recipe in variants.items()},
        **{baseline: partial(run_baseline, BASELINES[baseline], plain, bags) for baseline in sweep["baselines"]},
    }
    results: dict[str, Any] = {}
    progress = logging.tqdm([(job, repeat) for job in jobs for repeat in range(plain.repeats)], desc=name)
    for job, repeat in progress:
        stem = re.sub(r"[^\w.+-]", "", job.replace(" ", "_"))
        path = runs / f"{stem}_{repeat}.json"
        settings = as_recorded(variants.get(job, plain))
        content = json.loads(path.read_text()) if path.is_file() else {}
        if content.get("settings") != settings:
            started = time.perf_counter()
            outcomes = jobs[job](repeat)
            content = {"settings": settings, "outcomes": outcomes, "seconds": time.perf_counter() - started}
            write_atomically(path, json.dumps(content))
        results.setdefault(job, []).append(content)
    gathered = {
        "results": {job: gather(content, plain.metrics[0]) for job, content in results.items()},
        "parameters": {variant: parameters(recipe, bags) for variant, recipe in variants.items()},
        "paired": [paired(results, first, second, plain.metrics[0]) for first, second in sweep["pairs"]],
        "published": sweep.get("published", {}).get(name, {}),
        "recipe": as_recorded(plain),
        "variants": sweep["variants"],
        **provenance(),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(gathered, indent=1) + "\n")
    print(bags_table([gathered]), target, sep="\n")


def load(name: str, repeats: int, data_dir: str | None, overrides: list[str]) -> BagsRecipe:
    """Read and check a recipe, with the repeats and overrides of a sweep."""
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml", overrides, BagsRecipe)
    recipe.repeats = repeats
    if data_dir is not None:
        recipe.data.dataset = local_dataset(recipe.data.dataset, Path(data_dir))
    check(recipe)
    return recipe


def parameters(recipe: BagsRecipe, bags: Bags) -> int:
    """The number of parameters of a recipe's model."""
    width = recipe.data.num_components or bags.instances[0].shape[1]
    return UHopMILForBagClassification(UHopMILConfig(**{"instance_dim": width, **recipe.model})).num_parameters()


def gather(contents: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Summary of the cross-validations of one variant or baseline, with the main metric of every
    fold."""
    outcomes = [outcome for content in contents for outcome in content["outcomes"]]
    by_fold = [[outcome[metric] for outcome in content["outcomes"]] for content in contents]
    return {**summarize(outcomes), f"{metric}_by_fold": by_fold, "seconds": round(sum(content["seconds"] for content in contents), 1)}


def paired(results: dict[str, list[dict[str, Any]]], first: str, second: str, metric: str) -> dict[str, Any]:
    """Mean difference on the same folds and half the width of its 95 % confidence interval.

    The interval is that of Nadeau and Bengio (2003), which corrects for the training bags that
    folds share."""
    outcomes = [[outcome for content in results[job] for outcome in content["outcomes"]] for job in (first, second)]
    if [outcome["bags"] for outcome in outcomes[0]] != [outcome["bags"] for outcome in outcomes[1]]:
        raise ValueError(f"{first!r} and {second!r} were evaluated on different bags")
    difference = np.array([one[metric] - other[metric] for one, other in zip(*outcomes, strict=True)])
    ratio = np.mean([len(outcome["bags"]) / outcome["trained_on"] for outcome in outcomes[0]])
    half_width = student_t.ppf(0.975, len(difference) - 1) * np.sqrt((1.0 / len(difference) + ratio) * difference.var(ddof=1))
    return {"first": first, "second": second, "difference": float(difference.mean()), "half_width": float(half_width)}


def run_variant(recipe: BagsRecipe, bags: Bags, repeat: int) -> list[dict[str, Any]]:
    """Run one repeat of a variant's cross-validation; the outcome of each fold."""
    return cross_validate(recipe, bags, range(repeat, repeat + 1))


def run_baseline(baseline: Baseline, recipe: BagsRecipe, bags: Bags, repeat: int) -> list[dict[str, Any]]:
    """Run one repeat of a baseline's cross-validation; the outcome of each fold."""
    outcomes = []
    for fold, (train, evaluated) in enumerate(splits(recipe, bags, repeat)):
        extractor = UHopMILFeatureExtractor(recipe.data.standardize, recipe.data.clip).fit([bags.instances[i] for i in train])
        standardised = extractor.transform(bags.instances)
        train_bags, evaluated_bags = [standardised[i] for i in train], [standardised[i] for i in evaluated]
        scores = baseline(train_bags, bags.labels[train], evaluated_bags)
        logits = np.stack([-scores, scores], axis=-1)
        metrics = bag_metrics(logits, bags.labels[evaluated], recipe.metrics)
        outcomes.append({"repeat": repeat, "fold": fold, **metrics, "trained_on": len(train), "bags": evaluated.tolist()})
    return outcomes


def mean_and_logistic_regression(train_bags: list[np.ndarray], labels: np.ndarray, evaluated_bags: list[np.ndarray]) -> np.ndarray:
    """Logistic regression on the mean instance of each bag."""
    means = [np.stack([bag.mean(0) for bag in bags]) for bags in (train_bags, evaluated_bags)]
    return LogisticRegression(C=0.01, max_iter=1000).fit(means[0], labels).decision_function(means[1])


def statistics_and_random_forest(train_bags: list[np.ndarray], labels: np.ndarray, evaluated_bags: list[np.ndarray]) -> np.ndarray:
    """A random forest on the minimum, maximum, mean and standard deviation of each feature over a
    bag."""
    described = [
        np.stack([np.concatenate([bag.min(0), bag.max(0), bag.mean(0), bag.std(0)]) for bag in bags])
        for bags in (train_bags, evaluated_bags)
    ]
    forest = RandomForestClassifier(300, random_state=0).fit(described[0], labels)
    return forest.predict_proba(described[1])[:, 1] - 0.5


def set_kernel_svm(train_bags: list[np.ndarray], labels: np.ndarray, evaluated_bags: list[np.ndarray]) -> np.ndarray:
    """An SVM with the normalised set kernel (Gaertner et al., 2002): the mean RBF kernel over pairs
    of instances.

    Gamma is 1 / (features x variance) of the training instances, as scikit-learn's "scale", so that
    constant features have no effect. C is chosen from 1, 10 and 100 by cross-validation within the
    training bags."""
    bags = train_bags + evaluated_bags
    rows = np.concatenate(bags).astype(np.float64)
    starts = np.cumsum([0] + [len(bag) for bag in bags[:-1]])
    gamma = 1.0 / (rows.shape[1] * np.concatenate(train_bags).var())
    similarity = [rbf_kernel(bag.astype(np.float64), rows, gamma=gamma).mean(0) for bag in bags]
    kernel = np.stack([np.add.reduceat(row, starts) for row in similarity]) / [len(bag) for bag in bags]
    kernel /= np.sqrt(np.outer(kernel.diagonal(), kernel.diagonal()))
    count = len(train_bags)
    search = GridSearchCV(SVC(kernel="precomputed"), {"C": [1.0, 10.0, 100.0]}, scoring="roc_auc", cv=3)
    return search.fit(kernel[:count, :count], labels).decision_function(kernel[count:, :count])


BASELINES: dict[str, Baseline] = {
    "mean, logistic regression": mean_and_logistic_regression,
    "statistics, random forest": statistics_and_random_forest,
    "set kernel, SVM": set_kernel_svm,
}


if __name__ == "__main__":
    main()
