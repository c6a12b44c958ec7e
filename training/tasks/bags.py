"""Classification of bags (multiple-instance learning), evaluated by cross-validation."""

import dataclasses
import gc
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import PartialState
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from modeling_uhop import BagViews, DataCollatorForBags, UHopMILConfig, UHopMILFeatureExtractor, UHopMILForBagClassification

from ..baselines.bags import BASELINES
from ..data.bags import BagData, load_bags, load_instances
from ..data.source import same_data
from ..errors import RecipeError
from ..folds import divided, fold_seed, splits, summarize
from ..metrics import BAG_METRICS, bag_metrics
from ..recipe import Recipe
from ..report.figures import bag_figure
from ..run_folder import RunFolder
from ..task import Examples, Task, check_same_classes
from ..trainers import new_trainer, plain_model


NUM_PROBES = 64
# Many small models are trained for an evaluation, so nothing of a training but its result is kept.
FOLD = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"}


@dataclass
class BagsRecipe(Recipe):
    """A cross-validated experiment on bags.

    With `evaluation.split=validation`, the test folds are never read: a fifth of each fold's
    training bags is held out and evaluated instead. With `patience`, a fifth of the training bags
    is held out in each training to choose the checkpoint.

    Attributes:
        folds: Number of folds of a cross-validation, stratified by label. Each fold is the test
            fold once.
        repeats: Number of cross-validations, each with its own splits and seeds.
        ensemble: Number of models, with different seeds, whose logits are averaged.
        metrics: Names among "auc", "accuracy" and "f1". The first is the main metric.
        baselines: Names among `BASELINES`, to evaluate on the same folds. They need two classes.
    """

    config_class: ClassVar[type] = UHopMILConfig
    data_class: ClassVar[type] = BagData

    task: str = "bags"
    folds: int = 10
    repeats: int = 5
    ensemble: int = 1
    metrics: list[str] = field(default_factory=lambda: ["auc", "accuracy", "f1"])
    baselines: list[str] = field(default_factory=list)


class BagClassification(Task):
    """Train on all bags. The metrics are those of cross-validations with the same recipe."""

    recipe_class = BagsRecipe
    pipeline = "multiple-instance-classification"
    defaults = {
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "lr_scheduler_type": "cosine",
    }
    # A fold that is finished must not differ from the folds after it.
    may_change = ()

    def load(self) -> None:
        recipe: BagsRecipe = self.recipe
        check_names("metrics", recipe.metrics, BAG_METRICS)
        check_names("baselines", recipe.baselines, tuple(BASELINES))
        if not recipe.metrics:
            raise RecipeError(f"metrics must have at least one of {BAG_METRICS}, got none")
        for name, least in (("folds", 2), ("repeats", 1), ("ensemble", 1)):
            if getattr(recipe, name) < least:
                raise RecipeError(f"{name} must be at least {least}, got {getattr(recipe, name)}")
        self.bags = load_bags(recipe.data)
        if recipe.baselines and len(self.bags.names) != 2:
            raise RecipeError(f"the baselines are for two classes, but there are {len(self.bags.names)}; leave `baselines` empty")
        model_config(recipe, self.bags.instances[0].shape[1], self.bags.names)

    def splits(self, repeat: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The training bags and the evaluated bags of each fold of one cross-validation."""
        return splits(self.bags, self.recipe.folds, self.recipe.seed, repeat, self.recipe.evaluation.split)

    def examples(self) -> Examples:
        self.jobs = [(repeat, fold, *part) for repeat in range(self.recipe.repeats) for fold, part in enumerate(self.splits(repeat))]
        return self.examples_of(np.arange(len(self.bags.labels)), self.recipe.seed)

    def examples_of(self, indices: np.ndarray, seed: int) -> Examples:
        """What a training on some of the bags is given."""
        data, held_out = self.recipe.data, None
        if self.recipe.patience is not None:
            indices, held_out = next(divided(self.bags, indices, 5, seed))
        instances = [self.bags.instances[index] for index in indices]
        extractor = UHopMILFeatureExtractor(data.standardize, data.clip, data.num_components).fit(instances)
        return Examples(
            train=self._labelled(extractor, indices),
            evaluated=None if held_out is None else self._labelled(extractor, held_out),
            unlabelled=lambda *where: _unlabelled(data, extractor, instances, *where),
            views=BagViews,
            processor=extractor,
            collator=DataCollatorForBags(max_instances=data.max_instances),
        )

    def _labelled(self, extractor: UHopMILFeatureExtractor, indices: np.ndarray) -> list[dict[str, Any]]:
        transformed = extractor.transform([self.bags.instances[index] for index in indices])
        return [{"instances": bag, "label": label} for bag, label in zip(transformed, self.bags.labels[indices].tolist(), strict=True)]

    def model(self, examples: Examples) -> PreTrainedModel:
        return UHopMILForBagClassification(model_config(self.recipe, examples.processor.instance_dim, self.bags.names))

    def describe(self, model: PreTrainedModel) -> str:
        recipe, sizes = self.recipe, [len(bag) for bag in self.bags.instances]
        width, *picture = self.bags.instances[0].shape[1:]
        each = f"{width} channels of {picture[0]} x {picture[1]} pixels" if picture else f"{width} features"
        return (
            f"{recipe.name}: {model.num_parameters():,} parameters; {len(sizes)} bags of {min(sizes)} to {max(sizes)} instances, {each}; "
            f"{recipe.repeats} x {recipe.folds} folds, evaluated on {recipe.evaluation.split} bags"
        )

    def evaluate(self, trainer, model, folder) -> dict[str, Any]:
        self.processor = trainer.processing_class
        with many_small_models():
            kept = [self.stage(folder, "fold", self.fold_outcome, job) for job in logging.tqdm(self.jobs, desc="folds")]
        self.outcomes = [each["outcome"] for each in kept]
        self.baselines = {
            name: [self.stage(folder, name, self.baseline_outcome, job)["outcome"] for job in logging.tqdm(self.jobs, desc=name)]
            for name in self.recipe.baselines
        }
        return {**summarize(self.outcomes), "cross_validation_seconds": round(sum(each["seconds"] for each in kept), 1)}

    def stage(self, folder: RunFolder, name: str, compute: Any, job: Any) -> dict[str, Any]:
        """The outcome of one fold and its time in seconds: loaded if it was saved, otherwise
        computed and saved."""
        repeat, fold = job[:2]
        stem = re.sub(r"[^\w.+-]", "", name.replace(" ", "_"))
        stem = f"{stem}_{repeat}_{fold}"
        kept = folder.read(stem)
        if kept is None:
            started = time.perf_counter()
            outcome = compute(folder, name, *job)
            kept = {"outcome": outcome, "seconds": time.perf_counter() - started}
            if PartialState().is_main_process:
                folder.save(stem, kept)
        return kept

    def fold_outcome(
        self, folder: RunFolder, name: str, repeat: int, fold: int, train: np.ndarray, evaluated: np.ndarray
    ) -> dict[str, Any]:
        """Train on the training bags of one fold, and evaluate on its other bags."""
        seeds = [fold_seed(self.recipe.seed, repeat, fold, member) for member in range(self.recipe.ensemble)]
        answers = [predict(*self.fit(train, seed, folder.path / "scratch"), [self.bags.instances[i] for i in evaluated]) for seed in seeds]
        logits = np.mean([member_logits for member_logits, _ in answers], axis=0)
        outcome = {"repeat": repeat, "fold": fold, **bag_metrics(logits, self.bags.labels[evaluated], self.recipe.metrics)}
        if self.bags.instance_labels is not None:
            weights = [np.mean(rows, axis=0) for rows in zip(*(member_weights for _, member_weights in answers), strict=True)]
            outcome["instance_auc"] = instance_auc(weights, [self.bags.instance_labels[i] for i in evaluated])
        return {**outcome, "trained_on": len(train), "bags": evaluated.tolist(), "logits": logits.round(4).tolist()}

    def fit(self, indices: np.ndarray, seed: int, scratch: Path) -> tuple[PreTrainedModel, UHopMILFeatureExtractor]:
        """Train a model on some of the bags.

        Returns the model, and the feature extractor that was fitted on the same bags. `scratch` is
        a folder for the training, which is deleted after it.
        """
        examples = self.examples_of(indices, seed)
        overrides: dict[str, Any] = FOLD if examples.evaluated is None else {**FOLD, "save_strategy": "epoch", "eval_strategy": "epoch"}
        trainer = new_trainer(self, examples, seed, output_dir=str(scratch), **overrides)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            trainer.save_model()
        model = plain_model(trainer)
        if trainer.is_world_process_zero():
            shutil.rmtree(scratch, ignore_errors=True)
        return model, examples.processor

    def baseline_outcome(
        self, folder: RunFolder, name: str, repeat: int, fold: int, train: np.ndarray, evaluated: np.ndarray
    ) -> dict[str, Any]:
        """Fit a baseline on the training bags of one fold, and evaluate on its other bags."""
        data, bags = self.recipe.data, self.bags
        extractor = UHopMILFeatureExtractor(data.standardize, data.clip).fit([bags.instances[i] for i in train])
        standardised = extractor.transform(bags.instances)
        scores = BASELINES[name]([standardised[i] for i in train], bags.labels[train], [standardised[i] for i in evaluated])
        metrics = bag_metrics(np.stack([-scores, scores], axis=-1), bags.labels[evaluated], self.recipe.metrics)
        return {"repeat": repeat, "fold": fold, **metrics, "trained_on": len(train), "bags": evaluated.tolist()}

    def details(self) -> dict[str, Any]:
        return {"outcomes": self.outcomes, "baselines": self.baselines}

    def figures(self, folder, model, trained) -> None:
        filled = [index for index, bag in enumerate(self.bags.instances) if len(bag) > 0]
        shown = next((index for index in filled if self.bags.labels[index] == 1), filled[0])
        _, (weights,) = predict(model, self.processor, [self.bags.instances[shown]])
        title = f"{self.recipe.name}: bag {shown}, of class {self.bags.names[self.bags.labels[shown]]}"
        bag_figure(folder.path / "bag.png", self.bags.pictures(shown), weights, title)

    def summary(self, metrics: dict[str, Any]) -> str:
        rows = {name: value for name, value in metrics.items() if isinstance(value, dict)}
        for baseline, outcomes in self.baselines.items():
            rows |= {f"{name} ({baseline})": value for name, value in summarize(outcomes).items()}
        over_repeats = "over repeats {std_repeats:.4f}, " if self.recipe.repeats > 1 else ""
        spread = f"standard deviation {over_repeats}over folds {{std_folds:.4f}}"
        return "\n".join(f"  {name:<14} {value['mean']:.4f}   {spread.format(**value)}" for name, value in rows.items())

    def score(self, folder: Path) -> dict[str, float]:
        model = UHopMILForBagClassification.from_pretrained(folder)
        extractor = UHopMILFeatureExtractor.from_pretrained(folder)
        check_same_classes(model.config.id2label, self.bags.names)
        logits, _ = predict(model.eval(), extractor, self.bags.instances)
        return bag_metrics(logits, self.bags.labels, self.recipe.metrics)

    def probes(self, model: PreTrainedModel) -> tuple[list[np.ndarray], np.ndarray]:
        inputs = self.bags.instances[:NUM_PROBES]
        return inputs, predict(model.cpu(), self.processor, inputs)[0]


def check_names(field_name: str, given: list[str], accepted: tuple[str, ...]) -> None:
    """Raise a `RecipeError` for a name in a list that is not accepted."""
    for name in given:
        if name not in accepted:
            raise RecipeError(f"{field_name} must be among {accepted}, got {name!r}")


@contextmanager
def many_small_models() -> Iterator[None]:
    """Make the training of many small models faster: use one thread, and exclude the objects that
    exist already from garbage collection."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)


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
    model: Any, extractor: UHopMILFeatureExtractor, instances: list[np.ndarray], batch_size: int = 64
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


TASK = BagClassification
