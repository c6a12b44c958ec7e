"""What an adapter of U-Hop buys: a model of transformers is moved to few examples by several methods.

python training/train.py configs/attach/images.yaml --source path/to/cifar10 --target path/to/tiny-imagenet
python training/train.py configs/attach/text.yaml

The frozen model with a new head is the baseline. Every other variant trains an adapter too. Runs
with a separation step train as many steps fewer as it has.
"""

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from modeling_uhop import Separation, SeparationCallback, UHopAdapterConfig
from modeling_uhop.separation import WITH_COPIES

from ..errors import RecipeError, errors_in_one_line
from ..intervals import paired_over_seeds, spread
from ..processes import refuse_several_processes
from ..recipe_file import read_yaml, with_known_keys
from ..results import write_atomically, write_result
from ..sweep import difference
from ..transfers import TRANSFERS, Transfer


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
        results = Comparison(recipe, transfer, Path(args.work_dir) / recipe_path.stem).results()
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
        steps = (variant.separation or {}).get("steps", Separation.steps) if variant.separation is not None else 0
        if steps >= recipe.steps:
            raise RecipeError(f"variant {name!r} has {steps} steps of separation, which must be fewer than steps={recipe.steps}")
    return recipe


class Comparison:
    """Every variant of a recipe, from one model trained on the source.

    Args:
        recipe: The recipe.
        transfer: Its transfer.
        folder: Folder of the model trained on the source, and of the scores of finished runs. A
            later run with the same settings uses both again.
    """

    def __init__(self, recipe: AttachRecipe, transfer: Transfer, folder: Path):
        self.recipe, self.transfer, self.folder = recipe, transfer, folder
        self.base = self.source_model()
        self.sizes: dict[str, int] = {}
        self.finished = _read_json(folder / "scores.json")

    def source_model(self) -> PreTrainedModel:
        """The model trained on the source, with a new head."""
        recipe = self.recipe
        saved = self.folder / "_".join(map(str, ("source", *self._source_settings()))).replace("/", "-")
        set_seed(0)
        model = self.transfer.source_model()
        if not (saved / "model.safetensors").is_file():
            budget = (recipe.source_steps, recipe.source_batch, recipe.source_rate)
            self.new_trainer(model, self.transfer.source_examples(), 0, *budget, disable_tqdm=False).train()
            model.save_pretrained(saved)
        return self.transfer.target_model(type(model).from_pretrained(saved))

    def _source_settings(self) -> list[Any]:
        """What determines the model trained on the source."""
        return [self.recipe.transfer, self.transfer.source, self.recipe.source_steps, self.recipe.source_batch, self.recipe.source_rate]

    def results(self) -> dict[str, Any]:
        """Choose rates and run every variant with every seed: a results file of kind "seeds"."""
        recipe, metric = self.recipe, self.transfer.score
        total = sum(len(self.rates_of(name)) + len(recipe.seeds) for name in recipe.variants)
        chosen: dict[str, Any] = {}
        scores: dict[str, list[float]] = {}
        with logging.tqdm(total=total, desc="runs") as bar:
            for name in recipe.variants:
                tried = []
                for rates in self.rates_of(name):
                    tried.append((self.run(name, rates, recipe.choice_seed, "validation"), rates))
                    bar.update()
                best = max if self.transfer.larger_is_better else min
                chosen[name] = best(tried, key=itemgetter(0))[1]
                scores[name] = []
                for seed in recipe.seeds:
                    scores[name].append(self.run(name, chosen[name], seed, "test"))
                    bar.update()
        variants = {name: {"num_parameters": self.sizes[name], "metrics": {metric: spread(values)}} for name, values in scores.items()}
        paired = [
            {"first": first, "second": second, "metric": metric, **difference(paired_over_seeds(scores[first], scores[second]))}
            for first, second in recipe.pairs
        ]
        sweep = {"metrics": [metric], "pairs": recipe.pairs, "curves": [], "seeds": recipe.seeds, "rates": chosen, "overrides": []}
        content = {**asdict(recipe), "source": Path(recipe.source).name, "target": Path(recipe.target).name}
        return {"sweep": sweep, "recipe": content, "variants": variants, "paired": paired, "baselines": {}, "published": {}}

    def rates_of(self, name: str) -> list[dict[str, float]]:
        """The learning rates that a variant can have: {"training": rate, "separation": rate}, the latter if it has such a step."""
        training = [{"training": rate} for rate in self.recipe.rates]
        if self.recipe.variants[name].separation is None:
            return training
        return [{**rates, "separation": own} for rates in training for own in self.recipe.separation_rates]

    def run(self, name: str, rates: dict[str, float], seed: int, split: str) -> float:
        """Train a variant on the target, unless an earlier run has done so; its score on a split."""
        recipe = self.recipe
        settings = [*self._source_settings(), self.transfer.target, recipe.count, recipe.steps, recipe.batch]
        key = json.dumps([asdict(recipe.variants[name]), rates, seed, split, *settings])
        if key not in self.finished:
            self.finished[key] = [self._run(name, rates, seed, split), self.sizes[name]]
            write_atomically(self.folder / "scores.json", json.dumps(self.finished))
        score, self.sizes[name] = self.finished[key]
        return score

    def _run(self, name: str, rates: dict[str, float], seed: int, split: str) -> float:
        variant, steps = self.recipe.variants[name], self.recipe.steps
        set_seed(seed)
        examples = self.transfer.examples(seed)
        model = adapted(copy.deepcopy(self.base), variant, self.transfer)
        self.sizes[name] = sum(each.numel() for each in model.parameters() if each.requires_grad)
        callbacks = []
        if variant.separation is not None:
            separation = separation_of(variant, self.transfer, lr=rates["separation"])
            callbacks, steps = [SeparationCallback(separation=separation)], steps - separation.steps
        trainer = self.new_trainer(model, examples.train, seed, variant.steps or steps, self.recipe.batch, rates["training"])
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        return self.transfer.measure(trainer.evaluate(getattr(examples, split)))

    def new_trainer(self, model: nn.Module, train: Dataset, seed: int, steps: int, batch: int, rate: float, **options: Any) -> Trainer:
        """A Trainer that saves nothing, with a cosine schedule of the learning rate."""
        metrics = self.transfer.metrics()
        arguments = TrainingArguments(
            str(self.folder),
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            weight_decay=0.01,
            per_device_eval_batch_size=250,
            label_names=self.transfer.label_names,
            prediction_loss_only=metrics is None,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            **{"disable_tqdm": True, **options},
        )
        trainer = Trainer(model, arguments, train_dataset=train, compute_metrics=metrics)
        trainer.remove_callback(PrinterCallback)
        return trainer


def separation_of(variant: Variant, transfer: Transfer, **fields: Any) -> Separation:
    """The separation step of a variant, on its feature maps alone."""
    given = variant.separation or {}
    corruption = transfer.corruption if given.get("kind") in WITH_COPIES else None
    return Separation(**{"parameters": "feature_maps", "corruption": corruption, **given, **fields})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise RecipeError(f"{path} is damaged ({error}); delete it to run everything again") from error


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
