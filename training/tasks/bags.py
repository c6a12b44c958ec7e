"""Cross-validate a multiple-instance model from a recipe, then train it on all bags and save it.

The model folder is reloaded in a new process as a check.

python training/train_mil.py configs/mil_digits.yaml
python training/train_mil.py configs/mil_tiger.yaml --dataset path/to/tiger.parquet
"""

import dataclasses
import gc
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from modeling_uhop import DataCollatorForBags, UHopMILConfig, UHopMILFeatureExtractor, UHopMILForBagClassification

from ..cli import command_line
from ..data.bags import BagData, Bags, load_bags, load_instances
from ..data.source import same_data
from ..errors import RecipeError, errors_in_one_line
from ..metrics import BAG_METRICS, bag_metrics
from ..processes import refuse_several_processes
from ..recipe import check_evaluate_on, load_recipe
from ..reload import check_reload
from ..report.cards import write_card
from ..report.figures import bag_figure
from ..results import write_results
from ..run_folder import check_output_dir, check_same_recipe, clear_output_dir, write_recipe
from ..stage_one import separation_callback
from ..stages import read_stage, save_stage
from ..tasks.bags import BagsRecipe


NUM_PROBES = 64
TRAINING_DEFAULTS = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "weight_decay": 1e-2,
    "lr_scheduler_type": "cosine",
}


def main() -> None:
    parser = command_line(__doc__.splitlines()[0])
    parser.add_argument(
        "--evaluate_on",
        choices=("test", "validation"),
        help="evaluate on the test folds, or on parts of the training folds that are held out to choose between recipes",
    )
    args = parser.parse_args()
    prepare_for_many_runs()
    with errors_in_one_line():
        refuse_several_processes()
        recipe = load_recipe(args.recipe, args.set, BagsRecipe)
        recipe.data.dataset = args.dataset or recipe.data.dataset
        recipe.seed = recipe.seed if args.seed is None else args.seed
        recipe.evaluate_on = args.evaluate_on or recipe.evaluate_on
        run(recipe, Path(args.output_dir or f"runs/{recipe.name}"), overwrite=args.overwrite, resume=args.resume)


def prepare_for_many_runs() -> None:
    """Make the training of many small models faster: use one thread, and exclude imported objects
    from garbage collection."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def run(recipe: BagsRecipe, folder: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Run a recipe, save its outputs in `folder` and return the metrics.

    With `overwrite`, an earlier run is deleted only after the recipe and the data have been
    checked. Each finished fold, and the model of all bags, is saved at once; `resume` computes only
    what is missing."""
    check_output_dir(folder, overwrite, resume)
    if resume:
        check_same_recipe(recipe, folder, may_change=())
    check(recipe)
    bags = load_bags(recipe.data)
    model_config(recipe, bags.instances[0].shape[1], bags.names)
    jobs = folds_of(recipe, bags, range(recipe.repeats))
    if not resume:
        clear_output_dir(folder)
        write_recipe(recipe, folder)
    folds = [load_or_run_fold(recipe, bags, folder, *job) for job in logging.tqdm(jobs, desc=f"{recipe.name}, folds")]
    outcomes = [fold["outcome"] for fold in folds]
    metrics = {**summarize(outcomes), "cross_validation_seconds": round(sum(fold["seconds"] for fold in folds), 1)}
    write_results(folder / "results.json", recipe, metrics, outcomes=outcomes)
    print(describe(recipe, bags, metrics))

    fitted = read_stage(folder, "fit", recipe) or save_stage(folder, "fit", recipe, fit_on_all_bags(recipe, bags, folder))
    shown = bag_to_show(bags)
    title = f"{recipe.name}: bag {shown}, of class {bags.names[bags.labels[shown]]}"
    bag_figure(folder / "bag.png", bags.pictures(shown), np.array(fitted["weights"]), title)
    if recipe.evaluate_on == "test":
        write_card(folder)
    check_reload(folder, "multiple-instance-classification", bags.instances[:NUM_PROBES], np.array(fitted["logits"]))
    return metrics


def load_or_run_fold(
    recipe: BagsRecipe, bags: Bags, folder: Path, repeat: int, fold: int, train: np.ndarray, evaluated: np.ndarray
) -> dict[str, Any]:
    """The outcome of a fold and its time in seconds: loaded if an earlier run saved them, otherwise
    computed and saved."""
    name = f"repeat_{repeat}_fold_{fold}"
    kept = read_stage(folder, name, recipe)
    if kept is None:
        started = time.perf_counter()
        outcome = cross_validate_fold(recipe, bags, repeat, fold, train, evaluated)
        kept = save_stage(folder, name, recipe, {"outcome": outcome, "seconds": time.perf_counter() - started})
    return kept


def fit_on_all_bags(recipe: BagsRecipe, bags: Bags, folder: Path) -> dict[str, Any]:
    """Train on all bags and save the model and its extractor.

    Returns the logits of the first bags, for the check of the reloaded model, and the instance
    weights of the bag in the figure."""
    model, extractor = fit(recipe, bags.instances, bags.labels, bags.names, recipe.seed)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    logits, _ = predict(model, extractor, bags.instances[:NUM_PROBES])
    _, (weights,) = predict(model, extractor, [bags.instances[bag_to_show(bags)]])
    return {"logits": logits.tolist(), "weights": weights.tolist()}


def bag_to_show(bags: Bags) -> int:
    """Index of the bag in the figure: the first bag of class 1 with instances, or else the first
    bag with instances."""
    filled = [index for index, bag in enumerate(bags.instances) if len(bag) > 0]
    return next((index for index in filled if bags.labels[index] == 1), filled[0])


def check(recipe: BagsRecipe) -> None:
    """Raise a `RecipeError` for a number out of its range or an unknown name in a recipe."""
    for name in recipe.metrics:
        if name not in BAG_METRICS:
            raise RecipeError(f"metrics must be among {BAG_METRICS}, got {name!r}")
    if not recipe.metrics:
        raise RecipeError(f"metrics must have at least one of {BAG_METRICS}, got none")
    for name, least in (("folds", 2), ("repeats", 1), ("ensemble", 1)):
        if getattr(recipe, name) < least:
            raise RecipeError(f"{name} must be at least {least}, got {getattr(recipe, name)}")
    check_evaluate_on(recipe.evaluate_on)


def splits(recipe: BagsRecipe, bags: Bags, repeat: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices (training bags, evaluated bags) of each fold of one cross-validation.

    Folds are stratified by label, and a group of bags is never divided.

    Raises:
        RecipeError: If there is only one class, or a class has too few bags for the folds.
    """
    counts = np.bincount(bags.labels, minlength=len(bags.names))
    if len(counts) < 2:
        raise RecipeError(f"there is nothing to classify: every bag is of class {bags.names[0]!r}")
    if counts.min() < recipe.folds:
        scarce = int(counts.argmin())
        raise RecipeError(
            f"class {bags.names[scarce]!r} has {counts[scarce]} bags, too few for one in each of {recipe.folds} folds; use fewer `folds`"
        )
    parts = list(divided(bags, np.arange(len(bags.labels)), recipe.folds, _seed(recipe, repeat)))
    if recipe.evaluate_on == "validation":
        parts = [next(divided(bags, train, 5, _seed(recipe, repeat, fold))) for fold, (train, _) in enumerate(parts)]
    for fold, part in enumerate(parts):
        for name, indices in zip(("training", recipe.evaluate_on), part, strict=True):
            missing = set(range(len(bags.names))) - set(bags.labels[indices].tolist())
            if missing:
                raise RecipeError(f"fold {fold} has no {name} bag of class {bags.names[min(missing)]!r}; use another number of `folds`")
    return parts


def _seed(recipe: BagsRecipe, *parts: int) -> int:
    """A seed for a part of the cross-validation, independent of the seeds of other parts."""
    return int(np.random.SeedSequence([recipe.seed, *parts]).generate_state(1)[0] >> 1)


def divided(bags: Bags, among: np.ndarray, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Divide some of the bags into folds; yields pairs of indices into all bags."""
    labels = bags.labels[among]
    if bags.groups is None:
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    else:
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, bags.groups[among])
    with warnings.catch_warnings():
        # Because the caller raises an error for a class that is too small for the folds, we ignore
        # the warning of scikit-learn.
        warnings.simplefilter("ignore", UserWarning)
        for train, evaluated in parts:
            yield among[train], among[evaluated]


def folds_of(recipe: BagsRecipe, bags: Bags, repeats: range) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """The number of the repeat, the number of the fold, and the training and evaluated indices, for
    every fold."""
    return [(repeat, fold, *split) for repeat in repeats for fold, split in enumerate(splits(recipe, bags, repeat))]


def cross_validate(recipe: BagsRecipe, bags: Bags, repeats: range | None = None) -> list[dict[str, Any]]:
    """Cross-validate; for each repeat and fold the metrics, the evaluated bags and their logits."""
    jobs = folds_of(recipe, bags, range(recipe.repeats) if repeats is None else repeats)
    return [cross_validate_fold(recipe, bags, *job) for job in logging.tqdm(jobs, desc=f"{recipe.name}, folds")]


def cross_validate_fold(recipe: BagsRecipe, bags: Bags, repeat: int, fold: int, train: np.ndarray, evaluated: np.ndarray) -> dict[str, Any]:
    """Train on the training bags of one fold and evaluate on its other bags."""
    train_bags, evaluated_bags = [bags.instances[i] for i in train], [bags.instances[i] for i in evaluated]
    answers = []
    for member in range(recipe.ensemble):
        model, extractor = fit(recipe, train_bags, bags.labels[train], bags.names, _seed(recipe, repeat, fold, member))
        answers.append(predict(model, extractor, evaluated_bags))
    logits = np.mean([member_logits for member_logits, _ in answers], axis=0)
    outcome = {"repeat": repeat, "fold": fold, **bag_metrics(logits, bags.labels[evaluated], recipe.metrics)}
    if bags.instance_labels is not None:
        weights = [np.mean(rows, axis=0) for rows in zip(*(member_weights for _, member_weights in answers), strict=True)]
        outcome["instance_auc"] = instance_auc(weights, [bags.instance_labels[i] for i in evaluated])
    return {**outcome, "trained_on": len(train), "bags": evaluated.tolist(), "logits": logits.round(4).tolist()}


def model_config(recipe: BagsRecipe, instance_dim: int | None, names: list[str]) -> UHopMILConfig:
    """The recipe's configuration for the classes and the instances of a data set.

    Args:
        instance_dim: Width of a vector instance, or number of channels of an image instance.

    Raises:
        RecipeError: If the recipe sets another number of classes.
    """
    width = "instance_dim" if recipe.model.get("instance_type", "vector") == "vector" else "num_channels"
    config = UHopMILConfig(**{width: instance_dim, "num_labels": len(names), **recipe.model})
    if config.num_labels != len(names):
        raise RecipeError(f"model.num_labels is {config.num_labels}, but the bags have {len(names)} classes, {names}; leave it out")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    return config


def fit(
    recipe: BagsRecipe, instances: list[np.ndarray], labels: np.ndarray, names: list[str], seed: int
) -> tuple[UHopMILForBagClassification, UHopMILFeatureExtractor]:
    """Train a model on bags; the model, and the feature extractor that was fitted on the same
    bags."""
    data = recipe.data
    extractor = UHopMILFeatureExtractor(data.standardize, data.clip, data.num_components).fit(instances)
    examples = [{"instances": bag, "label": label} for bag, label in zip(extractor.transform(instances), labels.tolist(), strict=True)]
    set_seed(seed)
    model = UHopMILForBagClassification(model_config(recipe, extractor.instance_dim, names))
    separation = separation_callback(recipe.separation, lambda *where: _unlabelled(data, extractor, instances, *where))
    with tempfile.TemporaryDirectory() as folder:
        arguments = {**TRAINING_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available(), **recipe.training}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=folder, seed=seed, **arguments),
            train_dataset=examples,
            data_collator=DataCollatorForBags(max_instances=data.max_instances),
            processing_class=extractor,
            callbacks=[] if separation is None else [separation],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # Because accelerate wraps the model, for instance for half precision, we remove its wrappers
    # before the evaluation.
    return extract_model_from_parallel(model, keep_fp32_wrapper=False).eval(), extractor


def _unlabelled(
    data: BagData, extractor: UHopMILFeatureExtractor, training: list[np.ndarray], dataset: str | None, split: str | None
) -> list[dict[str, Any]]:
    """Bags for the separation step, which needs no labels.

    Of the recipe's own bags, these are the training bags, because the others are held out.
    """
    is_own = same_data(dataset or data.dataset, data.dataset) and (split or data.split) == data.split
    given = dataclasses.replace(data, dataset=dataset or data.dataset, split=split or data.split)
    bags = training if is_own else load_instances(given)
    return [{"instances": bag} for bag in extractor.transform(bags)]


@torch.no_grad()
def predict(
    model: UHopMILForBagClassification, extractor: UHopMILFeatureExtractor, instances: list[np.ndarray], batch_size: int = 64
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (bags, classes), and the instance weights of each bag."""
    logits, weights = [], []
    for start in range(0, len(instances), batch_size):
        batch = instances[start : start + batch_size]
        outputs = model(**extractor(batch, return_tensors="pt").to(model.device))
        logits.append(outputs.logits.cpu().double().numpy())
        rows = outputs.instance_weights.cpu().double().numpy()
        weights += [row[: len(bag)] for row, bag in zip(rows, batch, strict=True)]
    return np.concatenate(logits), weights


def instance_auc(weights: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """How well instance weights rank positive instances above the other instances: the mean AUC
    over positive bags."""
    mixed = [(marks, row) for marks, row in zip(truth, weights, strict=True) if 0 < marks.sum() < len(marks)]
    return float(np.mean([roc_auc_score(marks, row) for marks, row in mixed]))


def summarize(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Summary of each metric: its mean over folds for each repeat, their mean, and standard
    deviations over repeats and folds."""
    summary: dict[str, Any] = {}
    repeats = sorted({outcome["repeat"] for outcome in outcomes})
    for name in [key for key, value in outcomes[0].items() if isinstance(value, float)]:
        by_repeat = [float(np.mean([o[name] for o in outcomes if o["repeat"] == repeat])) for repeat in repeats]
        over_repeats = float(np.std(by_repeat, ddof=1)) if len(by_repeat) > 1 else 0.0
        over_folds = float(np.std([outcome[name] for outcome in outcomes], ddof=1))
        summary[name] = {"mean": float(np.mean(by_repeat)), "std_repeats": over_repeats, "std_folds": over_folds, "by_repeat": by_repeat}
    return summary


def describe(recipe: BagsRecipe, bags: Bags, metrics: dict[str, Any]) -> str:
    """The data and the cross-validated metrics of a run, as lines of text."""
    sizes = [len(bag) for bag in bags.instances]
    width, *picture = bags.instances[0].shape[1:]
    each = f"{width} channels of {picture[0]} x {picture[1]} pixels" if picture else f"{width} features"
    lines = [
        f"{recipe.name}: {len(sizes)} bags of {min(sizes)} to {max(sizes)} instances, {each}; "
        f"{recipe.repeats} x {recipe.folds} folds, evaluated on {recipe.evaluate_on} bags, {metrics['cross_validation_seconds']} s"
    ]
    for name, value in metrics.items():
        if isinstance(value, dict):
            spread = f"over repeats {value['std_repeats']:.4f}, over folds {value['std_folds']:.4f}"
            lines.append(f"  {name:<14} {value['mean']:.4f}   standard deviation {spread}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
