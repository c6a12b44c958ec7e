"""Cross-validate a multiple-instance model from a recipe, then train it on all bags: results, figure, model folder, reload.

python training/train_mil.py configs/mil_digits.yaml
python training/train_mil.py configs/mil_tiger.yaml --dataset path/to/tiger.parquet
"""

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
from bags import Bags, load_bags
from cards import write_card
from figures import bag_figure
from metrics import BAG_METRICS, bag_metrics
from recipe import (
    MILRecipe,
    RecipeError,
    check_evaluate_on,
    check_output_dir,
    check_same_recipe,
    clear_output_dir,
    command_line,
    errors_in_one_line,
    load_recipe,
    refuse_several_processes,
    write_recipe,
    write_results,
)
from reload import check_reload
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from stages import read_stage, save_stage
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from modeling_uhop import DataCollatorForBags, SeparationCallback, UHopMILConfig, UHopMILFeatureExtractor, UHopMILForBagClassification


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
        "--evaluate_on", choices=("test", "validation"), help="score test folds, or parts of the training folds held out to choose by"
    )
    args = parser.parse_args()
    prepare_for_many_runs()
    with errors_in_one_line():
        refuse_several_processes()
        recipe = load_recipe(args.recipe, args.set, MILRecipe)
        recipe.data.dataset = args.dataset or recipe.data.dataset
        recipe.seed = recipe.seed if args.seed is None else args.seed
        recipe.evaluate_on = args.evaluate_on or recipe.evaluate_on
        run(recipe, Path(args.output_dir or f"runs/{recipe.name}"), overwrite=args.overwrite, resume=args.resume)


def prepare_for_many_runs() -> None:
    """Settings that pay where a script trains many small models: one thread, and no search for garbage among what was imported."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def run(recipe: MILRecipe, folder: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Run a recipe and leave everything it makes in `folder`; the metrics.

    An earlier run is replaced only once all else is known to be right. Finished folds and the model of all bags are kept as they come:
    `resume` goes on with what is missing.
    """
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
    recipe: MILRecipe, bags: Bags, folder: Path, repeat: int, fold: int, train: np.ndarray, scored: np.ndarray
) -> dict[str, Any]:
    """The outcome of a fold and the seconds it took: as an earlier run kept it, or computed now and kept."""
    name = f"repeat_{repeat}_fold_{fold}"
    kept = read_stage(folder, name, recipe)
    if kept is None:
        started = time.perf_counter()
        outcome = cross_validate_fold(recipe, bags, repeat, fold, train, scored)
        kept = save_stage(folder, name, recipe, {"outcome": outcome, "seconds": time.perf_counter() - started})
    return kept


def fit_on_all_bags(recipe: MILRecipe, bags: Bags, folder: Path) -> dict[str, Any]:
    """Train on all bags and save model and extractor; logits of the first bags, and weights of the one that is shown."""
    model, extractor = fit(recipe, bags.instances, bags.labels, bags.names, recipe.seed)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    logits, _ = predict(model, extractor, bags.instances[:NUM_PROBES])
    _, (weights,) = predict(model, extractor, [bags.instances[bag_to_show(bags)]])
    return {"logits": logits.tolist(), "weights": weights.tolist()}


def bag_to_show(bags: Bags) -> int:
    """The first bag of class 1 that has instances; the first that has any, if none of class 1 has."""
    filled = [index for index, bag in enumerate(bags.instances) if len(bag) > 0]
    return next((index for index in filled if bags.labels[index] == 1), filled[0])


def check(recipe: MILRecipe) -> None:
    """A `RecipeError` for a number or name out of its range."""
    for name in recipe.metrics:
        if name not in BAG_METRICS:
            raise RecipeError(f"metrics must be among {BAG_METRICS}, got {name!r}")
    if not recipe.metrics:
        raise RecipeError(f"metrics must have at least one of {BAG_METRICS}")
    for name, least in (("folds", 2), ("repeats", 1), ("ensemble", 1)):
        if getattr(recipe, name) < least:
            raise RecipeError(f"{name} must be at least {least}, got {getattr(recipe, name)}")
    check_evaluate_on(recipe.evaluate_on)


def splits(recipe: MILRecipe, bags: Bags, repeat: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices (trained on, scored) for each fold of one cross-validation: stratified by label, groups kept together."""
    counts = np.bincount(bags.labels, minlength=len(bags.names))
    if len(counts) < 2:
        raise RecipeError(f"there is nothing to classify: every bag is of class {bags.names[0]!r}")
    if counts.min() < recipe.folds:
        scarce = int(counts.argmin())
        raise RecipeError(
            f"class {bags.names[scarce]!r} has {counts[scarce]} bags, too few for one in each of {recipe.folds} folds; set `folds` lower"
        )
    parts = list(divided(bags, np.arange(len(bags.labels)), recipe.folds, _seed(recipe, repeat)))
    if recipe.evaluate_on == "validation":
        parts = [next(divided(bags, train, 5, _seed(recipe, repeat, fold))) for fold, (train, _) in enumerate(parts)]
    for fold, part in enumerate(parts):
        for name, indices in zip(("training", recipe.evaluate_on), part, strict=True):
            missing = set(range(len(bags.names))) - set(bags.labels[indices].tolist())
            if missing:
                raise RecipeError(f"fold {fold} has no {name} bag of class {bags.names[min(missing)]!r}; set `folds` otherwise")
    return parts


def _seed(recipe: MILRecipe, *parts: int) -> int:
    """A seed for a part of the cross-validation, unrelated to those of other parts."""
    return int(np.random.SeedSequence([recipe.seed, *parts]).generate_state(1)[0] >> 1)


def divided(bags: Bags, among: np.ndarray, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Folds of some of the bags, as indices of all."""
    labels = bags.labels[among]
    if bags.groups is None:
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels)
    else:
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, bags.groups[among])
    with warnings.catch_warnings():
        # A class too small for its folds is the caller's to refuse.
        warnings.simplefilter("ignore", UserWarning)
        for train, scored in parts:
            yield among[train], among[scored]


def folds_of(recipe: MILRecipe, bags: Bags, repeats: range) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Repeat, fold, and indices of what is trained on and scored, for each fold."""
    return [(repeat, fold, *split) for repeat in repeats for fold, split in enumerate(splits(recipe, bags, repeat))]


def cross_validate(recipe: MILRecipe, bags: Bags, repeats: range | None = None) -> list[dict[str, Any]]:
    """For each repeat and fold the metrics of what was scored, its bags and their logits."""
    jobs = folds_of(recipe, bags, range(recipe.repeats) if repeats is None else repeats)
    return [cross_validate_fold(recipe, bags, *job) for job in logging.tqdm(jobs, desc=f"{recipe.name}, folds")]


def cross_validate_fold(recipe: MILRecipe, bags: Bags, repeat: int, fold: int, train: np.ndarray, scored: np.ndarray) -> dict[str, Any]:
    """Train on some bags and score others."""
    chosen, unseen = [bags.instances[i] for i in train], [bags.instances[i] for i in scored]
    answers = []
    for member in range(recipe.ensemble):
        model, extractor = fit(recipe, chosen, bags.labels[train], bags.names, _seed(recipe, repeat, fold, member))
        answers.append(predict(model, extractor, unseen))
    logits = np.mean([member_logits for member_logits, _ in answers], axis=0)
    outcome = {"repeat": repeat, "fold": fold, **bag_metrics(logits, bags.labels[scored], recipe.metrics)}
    if bags.instance_labels is not None:
        weights = [np.mean(rows, axis=0) for rows in zip(*(member_weights for _, member_weights in answers), strict=True)]
        outcome["instance_auc"] = instance_auc(weights, [bags.instance_labels[i] for i in scored])
    return {**outcome, "trained_on": len(train), "bags": scored.tolist(), "logits": logits.round(4).tolist()}


def model_config(recipe: MILRecipe, instance_dim: int | None, names: list[str]) -> UHopMILConfig:
    """The recipe's configuration for instances of this width, or images of so many channels, and these classes.

    Raises:
        RecipeError: If it asks for another number of classes.
    """
    width = "instance_dim" if recipe.model.get("instance_type", "vector") == "vector" else "num_channels"
    config = UHopMILConfig(**{width: instance_dim, "num_labels": len(names), **recipe.model})
    if config.num_labels != len(names):
        raise RecipeError(f"model.num_labels is {config.num_labels}, and the bags have {len(names)} classes, {names}")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    return config


def fit(
    recipe: MILRecipe, instances: list[np.ndarray], labels: np.ndarray, names: list[str], seed: int
) -> tuple[UHopMILForBagClassification, UHopMILFeatureExtractor]:
    """A model trained on bags, and the extractor that was fitted on them."""
    data = recipe.data
    extractor = UHopMILFeatureExtractor(data.standardize, data.clip, data.num_components).fit(instances)
    examples = [{"instances": bag, "label": label} for bag, label in zip(extractor.transform(instances), labels.tolist(), strict=True)]
    set_seed(seed)
    model = UHopMILForBagClassification(model_config(recipe, extractor.instance_dim, names))
    with tempfile.TemporaryDirectory() as folder:
        arguments = {**TRAINING_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available(), **recipe.training}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=folder, seed=seed, **arguments),
            train_dataset=examples,
            data_collator=DataCollatorForBags(max_instances=data.max_instances),
            processing_class=extractor,
            callbacks=[] if recipe.separation is None else [SeparationCallback(**recipe.separation)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # Without what accelerate wrapped around it, such as half precision.
    return extract_model_from_parallel(model, keep_fp32_wrapper=False).eval(), extractor


@torch.no_grad()
def predict(
    model: UHopMILForBagClassification, extractor: UHopMILFeatureExtractor, instances: list[np.ndarray], batch_size: int = 64
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (bags, classes), and the weights of each bag's instances."""
    logits, weights = [], []
    for start in range(0, len(instances), batch_size):
        batch = instances[start : start + batch_size]
        outputs = model(**extractor(batch, return_tensors="pt").to(model.device))
        logits.append(outputs.logits.cpu().double().numpy())
        rows = outputs.instance_weights.cpu().double().numpy()
        weights += [row[: len(bag)] for row, bag in zip(rows, batch, strict=True)]
    return np.concatenate(logits), weights


def instance_auc(weights: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """How well weights rank the instances that make a bag positive above its others: mean AUC over positive bags."""
    mixed = [(marks, row) for marks, row in zip(truth, weights, strict=True) if 0 < marks.sum() < len(marks)]
    return float(np.mean([roc_auc_score(marks, row) for marks, row in mixed]))


def summarize(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """For each metric: mean over folds by repeat, their mean, and the standard deviations over repeats and over folds."""
    summary: dict[str, Any] = {}
    repeats = sorted({outcome["repeat"] for outcome in outcomes})
    for name in [key for key, value in outcomes[0].items() if isinstance(value, float)]:
        by_repeat = [float(np.mean([o[name] for o in outcomes if o["repeat"] == repeat])) for repeat in repeats]
        over_repeats = float(np.std(by_repeat, ddof=1)) if len(by_repeat) > 1 else 0.0
        over_folds = float(np.std([outcome[name] for outcome in outcomes], ddof=1))
        summary[name] = {"mean": float(np.mean(by_repeat)), "std_repeats": over_repeats, "std_folds": over_folds, "by_repeat": by_repeat}
    return summary


def describe(recipe: MILRecipe, bags: Bags, metrics: dict[str, Any]) -> str:
    sizes = [len(bag) for bag in bags.instances]
    width, *picture = bags.instances[0].shape[1:]
    each = f"{width} channels of {picture[0]} x {picture[1]} pixels" if picture else f"{width} features"
    lines = [
        f"{recipe.name}: {len(sizes)} bags of {min(sizes)} to {max(sizes)} instances, {each}; "
        f"{recipe.repeats} x {recipe.folds} folds, scored on {recipe.evaluate_on} bags, {metrics['cross_validation_seconds']} s"
    ]
    for name, value in metrics.items():
        if isinstance(value, dict):
            spread = f"over repeats {value['std_repeats']:.4f}, over folds {value['std_folds']:.4f}"
            lines.append(f"  {name:<14} {value['mean']:.4f}   standard deviation {spread}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
