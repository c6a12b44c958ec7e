"""What an adapter of U-Hop buys: a model of transformers is moved to few examples by several methods.

python training/train.py configs/attach/images.yaml --source path/to/cifar10 --target path/to/tiny-imagenet
python training/train.py configs/attach/text.yaml

The frozen model with a new head is the baseline. Every other variant trains an adapter too. Runs
with a separation step train as many steps fewer as it has.
"""

import argparse
import copy
import itertools
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from modeling_uhop import Separation, SeparationCallback, UHopAdapterConfig

from ..errors import RecipeError, errors_in_one_line
from ..intervals import paired_over_seeds, spread
from ..processes import refuse_several_processes
from ..recipe_file import read_yaml, with_known_keys
from ..results import write_result
from ..sweep import difference
from ..transfers import TRANSFERS, Examples, Transfer


@dataclass
class Variant:
    """A way to move the model to the target.

    Attributes:
        uhop: Fields of `UHopAdapterConfig`, or `None`.
        lora: Fields of PEFT's `LoraConfig`, or `None`.
        separation: Fields of `Separation`, or `None` for no separation step.
        everything: Whether all parameters of the model are trained.
        steps: Training steps; `None` for those of the recipe without those of the separation step.
    """

    uhop: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    separation: dict[str, Any] | None = None
    everything: bool = False
    steps: int | None = None


@dataclass
class AttachRecipe:
    """A comparison of adapters.

    Attributes:
        transfer: A key of `TRANSFERS`.
        source, target: The data sets.
        count: Number of training examples of the target (images: of each class).
        variants: The variants by name.
        pairs: Pairs of variants whose differences at equal seeds are reported.
        source_steps, source_batch, source_rate: The training on the source.
        steps: Steps on the target, those of the separation step among them.
        batch: Examples of a step.
        rates: Learning rates on the target. Each variant uses the one that is best on validation
            examples.
        separation_rates: Learning rates of the separation step, chosen in the same way.
        seeds: Seeds of the results.
        choice_seed: Seed of the runs by which the rates are chosen.
        task: "attach".
    """

    transfer: str
    source: str
    target: str
    count: int
    variants: dict[str, Variant]
    pairs: list[list[str]] = field(default_factory=list)
    source_steps: int = 2000
    source_batch: int = 64
    source_rate: float = 1e-3
    steps: int = 200
    batch: int = 32
    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    separation_rates: list[float] = field(default_factory=lambda: [1e-4, 1e-3])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    choice_seed: int = 100
    task: str = "attach"


def run_command(recipe_path: Path, arguments: list[str]) -> None:
    """Run a recipe with the options of a command line: `--source`, `--target` and `--output_dir`.

    Raises:
        SystemExit: For an unknown option, or with one line for an error that the user can correct.
    """
    parser = argparse.ArgumentParser(prog=f"{Path(sys.argv[0]).name} {recipe_path}", description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="data set of the first training, to use instead of the recipe's")
    parser.add_argument("--target", help="data set with few examples, to use instead of the recipe's")
    parser.add_argument("--output_dir", default="benchmarks/results", help="folder for the results file")
    parser.add_argument("--work_dir", default="runs/attach", help="folder for the model trained on the source, which is used again")
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        refuse_several_processes()
        recipe = load(recipe_path)
        transfer = TRANSFERS[recipe.transfer](args.source or recipe.source, args.target or recipe.target, recipe.count)
        results = compare(recipe, transfer, Path(args.work_dir) / recipe_path.stem)
        target = Path(args.output_dir) / f"attach_{recipe_path.stem}.json"
        write_result(target, "seeds", results)
    print(target)


def load(path: Path) -> AttachRecipe:
    """Read a recipe; raise a `RecipeError` for an unknown key, transfer or variant."""
    content = with_known_keys("recipe", read_yaml(path), AttachRecipe)
    variants = {
        name: Variant(**with_known_keys(f"variant {name!r}", given or {}, Variant)) for name, given in content.get("variants", {}).items()
    }
    try:
        recipe = AttachRecipe(**{**content, "variants": variants})
    except TypeError as error:
        raise RecipeError(f"{path}: {error}") from error
    if recipe.transfer not in TRANSFERS:
        raise RecipeError(f"transfer must be among {list(TRANSFERS)}, got {recipe.transfer!r}")
    for name in {name for pair in recipe.pairs for name in pair} - variants.keys():
        raise RecipeError(f"pairs must consist of variants, {list(variants)}, got {name!r}")
    for name, variant in variants.items():
        steps = 0 if variant.separation is None else Separation(**variant.separation).steps
        if steps >= recipe.steps:
            raise RecipeError(f"variant {name!r} has {steps} steps of separation, which must be fewer than steps={recipe.steps}")
    return recipe


def compare(recipe: AttachRecipe, transfer: Transfer, folder: Path) -> dict[str, Any]:
    """Train the source model, choose rates, and run every variant with every seed: a results file of kind "seeds"."""
    base = source_model(recipe, transfer, folder)
    chosen: dict[str, dict[str, float]] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    sizes: dict[str, int] = {}
    choices = {name: rates_of(variant, recipe) for name, variant in recipe.variants.items()}
    total = sum(len(rates) * (len(rates) > 1) for rates in choices.values()) + len(choices) * len(recipe.seeds)
    with logging.tqdm(total=total, desc="runs") as bar:

        def run(name: str, rates: dict[str, float], seed: int, split: str) -> float:
            score, sizes[name] = move(base, recipe.variants[name], rates, recipe, transfer, seed, split, folder)
            bar.update()
            return score

        for name, candidates in choices.items():
            sign = 1.0 if transfer.larger_is_better else -1.0
            tried = [sign * run(name, rates, recipe.choice_seed, "validation") for rates in candidates] if len(candidates) > 1 else [0.0]
            chosen[name] = candidates[max(range(len(tried)), key=tried.__getitem__)]
            scores[name] = {transfer.score: [run(name, chosen[name], seed, "test") for seed in recipe.seeds]}
    variants = {
        name: {"num_parameters": sizes[name], "metrics": {metric: spread(values) for metric, values in by_metric.items()}}
        for name, by_metric in scores.items()
    }
    pairs = [
        {"first": first, "second": second, "metric": transfer.score}
        | difference(paired_over_seeds(scores[first][transfer.score], scores[second][transfer.score]))
        for first, second in recipe.pairs
    ]
    sweep = {"metrics": [transfer.score], "pairs": recipe.pairs, "curves": [], "seeds": recipe.seeds, "rates": chosen, "overrides": []}
    content = {**asdict(recipe), "source": Path(recipe.source).name, "target": Path(recipe.target).name}
    return {"sweep": sweep, "recipe": content, "variants": variants, "paired": pairs, "baselines": {}, "published": {}}


def rates_of(variant: Variant, recipe: AttachRecipe) -> list[dict[str, float]]:
    """The learning rates to choose from: {"training": rate, "separation": rate}, the latter with a separation step only."""
    if variant.separation is None:
        return [{"training": rate} for rate in recipe.rates]
    return [{"training": rate, "separation": own} for rate, own in itertools.product(recipe.rates, recipe.separation_rates)]


def source_model(recipe: AttachRecipe, transfer: Transfer, folder: Path) -> PreTrainedModel:
    """The model trained on the source, from `folder` if an earlier run left it there."""
    set_seed(0)
    model = transfer.source_model()
    if not (folder / "source" / "model.safetensors").is_file():
        budget = (recipe.source_steps, recipe.source_batch, recipe.source_rate)
        trainer = new_trainer(model, transfer, folder, transfer.source_examples(), 0, *budget, disable_tqdm=False)
        trainer.train()
        model.save_pretrained(folder / "source")
    return transfer.target_model(type(model).from_pretrained(folder / "source"))


def move(
    base: PreTrainedModel,
    variant: Variant,
    rates: dict[str, float],
    recipe: AttachRecipe,
    transfer: Transfer,
    seed: int,
    split: str,
    folder: Path,
) -> tuple[float, int]:
    """Train a variant on the target: its score on a split, and its number of trained parameters."""
    set_seed(seed)
    examples: Examples = transfer.examples(seed)
    model = adapted(copy.deepcopy(base), variant, transfer)
    steps, callbacks = variant.steps or recipe.steps, []
    if variant.separation is not None:
        separation = Separation(**{"parameters": "feature_maps", **variant.separation, "lr": rates["separation"]})
        callbacks = [SeparationCallback(separation=separation)]
        steps = variant.steps or recipe.steps - separation.steps
    trainer = new_trainer(model, transfer, folder, examples.train, seed, steps, recipe.batch, rates["training"])
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    logged = trainer.evaluate(getattr(examples, split))
    return transfer.measure(logged), sum(each.numel() for each in model.parameters() if each.requires_grad)


def adapted(model: PreTrainedModel, variant: Variant, transfer: Transfer) -> nn.Module:
    """The model with the adapter of a variant. Its own parameters are frozen, except those of the head."""
    head = [transfer.head]
    if variant.uhop is not None:
        return get_peft_model(model, UHopAdapterConfig(**variant.uhop, modules_to_save=head))
    if variant.lora is not None:
        return get_peft_model(model, LoraConfig(**variant.lora, target_modules=transfer.lora, modules_to_save=head))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(variant.everything or name.startswith(f"{transfer.head}."))
    return model


def new_trainer(
    model: nn.Module,
    transfer: Transfer,
    folder: Path,
    train: Dataset,
    seed: int,
    steps: int,
    batch: int,
    rate: float,
    disable_tqdm: bool = True,
) -> Trainer:
    """A Trainer that saves nothing, with a cosine schedule of the learning rate."""
    arguments = TrainingArguments(
        str(folder),
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        per_device_eval_batch_size=250,
        label_names=transfer.label_names,
        prediction_loss_only=transfer.metrics() is None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=disable_tqdm,
    )
    trainer = Trainer(model, arguments, train_dataset=train, compute_metrics=transfer.metrics())
    trainer.remove_callback(PrinterCallback)
    return trainer
