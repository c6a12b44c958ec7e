"""Recipes: one YAML file an experiment, stating only what differs from the defaults; and the results file of a run."""

import argparse
import dataclasses
import difflib
import gc
import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from accelerate import PartialState
from accelerate.utils.environment import get_int_from_env
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import TrainingArguments

from modeling_uhop import SeparationCallback, STanHopConfig, UHopMILConfig, UHopViTConfig


if _missing := [
    name for name in ("datasets", "evaluate", "filelock", "matplotlib", "pandas", "PIL", "scipy", "sklearn") if not find_spec(name)
]:
    raise ModuleNotFoundError(f"{', '.join(_missing)} cannot be imported, and the recipes need them: pip install 'modeling-uhop[train]'")


@dataclass
class DataRecipe:
    """Where images come from and how they are split.

    Attributes:
        dataset: "digits" (scikit-learn's), a Hub id, or a local folder in any layout that `datasets.load_dataset` reads.
        image_column, label_column: Names of the columns: images of any mode (see `modeling_uhop.images.as_rgb`), and a class: a whole
            number, text, or true or false.
        train_split, test_split: Names of the splits; "digits" has none of its own and is cut by `test_fraction`.
        validation_fraction: Part of the training split that is held out, stratified by label, to look at while training.
        test_fraction: Part of "digits" that is the test split.
        split_seed: Seed of those cuts, apart from the training seed so that every seed is judged on the same images.
        max_train_samples: How many training images to keep, drawn with `split_seed`; `None` for all.
        max_eval_samples: How many validation images, and as many training images, to look at after each epoch; `None` for all validation
            images. At the end all are evaluated.
        skip_unreadable: Whether images that cannot be decoded are left out, with a warning each, at the price of reading all once before.
            Otherwise the first that is met ends the run.
        random_crop_padding: Pixels of zero padding that training images are randomly cropped from; 0 for none.
        random_flip: Whether training images are mirrored at random.
        image_mean, image_std: Normalisation of each of the three channels, after scaling to [0, 1].
    """

    dataset: str
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str = "test"
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    skip_unreadable: bool = False
    random_crop_padding: int = 0
    random_flip: bool = False
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])


@dataclass
class BagDataRecipe:
    """Where bags come from, and what is made of them before a model sees them.

    Attributes:
        dataset: "digits" (bags of scikit-learn's digits, positive if a 9 is inside), a Hub id, a local folder in any layout that
            `datasets.load_dataset` reads, or a file (.parquet, .json, .jsonl, .arrow).
        instances_column, label_column: Names of the columns: a list of instances, each a list of numbers (or channels of an image), and a
            class: a whole number, text, or true or false.
        split: Name of the split; cross-validation divides it.
        standardize, clip, num_components: Of `UHopMILFeatureExtractor`, fitted on training bags.
        max_instances: Training bags with more instances are subsampled to this many, anew each time; `None` for no limit.
    """

    dataset: str
    instances_column: str = "instances"
    label_column: str = "label"
    split: str = "train"
    standardize: bool = True
    clip: float | None = 5.0
    num_components: int | None = None
    max_instances: int | None = None


@dataclass
class SeriesDataRecipe:
    """Where a multivariate series comes from and how it is split.

    Attributes:
        dataset: "synthetic" (made from a seed), a CSV or parquet file with a row for each time step, or a Hub id.
        data_files: File of a data set on the Hub that holds several, for instance "ETTh1.csv".
        date_column: Column of time stamps; it is checked and left out, and so is an index. Every other column is a series.
        split: Rows of training, validation and test, or fractions of all rows that are 1 together.
        validation_stride: Training looks at every so many-th validation window. Test errors are over every test window.
    """

    dataset: str
    data_files: str | None = None
    date_column: str = "date"
    split: list[float] = field(default_factory=lambda: [0.7, 0.1, 0.2])
    validation_stride: int = 1


@dataclass
class ViTRecipe:
    """A vision experiment: `model` holds fields of `UHopViTConfig`, `separation` arguments of `SeparationCallback` (or nothing, for a run
    without Stage I), `training` those of `TrainingArguments`.

    Attributes:
        architecture: "uhop_vit", or "vit" for the peer: transformers' own ViT of equal size, where `model` has neither alpha nor Phi.
    """

    config_class: ClassVar[type] = UHopViTConfig
    data_class: ClassVar[type] = DataRecipe

    name: str
    data: DataRecipe
    model: dict[str, Any] = field(default_factory=dict)
    separation: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    architecture: str = "uhop_vit"


@dataclass
class MILRecipe:
    """A cross-validated experiment with bags: `model` holds fields of `UHopMILConfig`, the others are as in `ViTRecipe`.

    Attributes:
        folds: Parts of a cross-validation, stratified by label; each is the test fold once.
        repeats: Cross-validations with other splits and seeds.
        ensemble: Models of other seeds whose logits are averaged.
        metrics: Names among "auc", "accuracy" and "f1"; the first is the one that matters.
        evaluate_on: "test" scores the test folds. "validation" never reads them: it holds out a fifth of each fold's training bags and
            scores these. Use it to choose between recipes.
    """

    config_class: ClassVar[type] = UHopMILConfig
    data_class: ClassVar[type] = BagDataRecipe

    name: str
    data: BagDataRecipe
    model: dict[str, Any] = field(default_factory=dict)
    separation: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    folds: int = 10
    repeats: int = 5
    ensemble: int = 1
    metrics: list[str] = field(default_factory=lambda: ["auc", "accuracy", "f1"])
    evaluate_on: str = "test"


@dataclass
class STanHopRecipe:
    """A forecasting experiment: `model` holds fields of `STanHopConfig`, the others are as in `ViTRecipe`.

    Attributes:
        patience: Looks at validation windows, one each `training.eval_steps` or epoch, without a lower loss after which training ends; the
            best checkpoint is restored.
        season: Steps in a season, for the baseline that repeats one.
        baseline_lengths: Steps that the linear baselines see; the memory sees the fewest of them. Without any there are no baselines.
        evaluate_on: "test" scores the test windows. "validation" leaves them alone: for choosing between recipes.
        skip_start: Where the linear skip begins: "zero", or "ridge", the ridge solution over training windows. The heads of the decoder
            then begin at zero, so that the forecast begins as the linear map's, and STanHop-Net learns what this leaves.
    """

    config_class: ClassVar[type] = STanHopConfig
    data_class: ClassVar[type] = SeriesDataRecipe

    name: str
    data: SeriesDataRecipe
    model: dict[str, Any] = field(default_factory=dict)
    separation: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    patience: int = 3
    season: int = 24
    baseline_lengths: list[int] = field(default_factory=lambda: [168, 336])
    evaluate_on: str = "test"
    skip_start: str = "zero"


ROOT = Path(__file__).parent.parent
Recipe = ViTRecipe | MILRecipe | STanHopRecipe

# Names that recipe fields had in earlier versions, with their names today.
RENAMED = {"judge": "evaluate_on", "anchor_lengths": "baseline_lengths"}


class RecipeError(ValueError):
    """A recipe or command line that cannot be run, in one line."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End the script with one line in place of a traceback where input was wrong, the disk is full, or a process that reads data died."""
    try:
        yield
    except (ValueError, TypeError, OSError, NotImplementedError, StrictDataclassError, SafetensorError) as error:
        sys.exit(_in_one_line(error))
    except RuntimeError as error:
        # PyTorch has no types of their own for a writer that failed and a worker that died.
        if not any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "DataLoader worker")):
            raise
        sys.exit(_in_one_line(error))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())


def refuse_several_processes(remedy: str = "start it with `python`, not with `accelerate launch` or `torchrun`") -> None:
    """A `RecipeError` if a launcher started this script in several processes, each of which would do and write the same."""
    count = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if count > 1:
        raise RecipeError(f"this script runs in one process, and was started in {count}; {remedy}")


def leave_process_group() -> None:
    """Close the group of the processes that trained together, if there is one, once all of them are here.

    What is no longer used but still holds the group, as the reducer of a wrapped model does, goes before. Freed by the interpreter later,
    it would end gloo's thread while holding the lock that this thread may be waiting for, and the process would never exit.
    """
    gc.collect()
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def local_dataset(name: str, data_dir: Path) -> str:
    """Where in a folder a recipe's data set lies: a folder, CSV or parquet file of its name; the name itself for one made here."""
    if name in ("digits", "synthetic"):
        return name
    stem = name.rpartition("/")[2]
    for candidate in (stem, f"{stem}.csv", f"{stem}.parquet"):
        if (data_dir / candidate).exists():
            return str(data_dir / candidate)
    raise RecipeError(f"{data_dir} has no folder or file {stem}, {stem}.csv or {stem}.parquet")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; this reads it as a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; a `RecipeError` for anything else."""
    if not path.is_file():
        raise RecipeError(f"there is no recipe {path}")
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a YAML mapping of recipe fields")
    return content


def load_recipe(path: str | Path, overrides: Sequence[str] = (), recipe_class: type = ViTRecipe) -> Any:
    """Read a recipe, with overrides such as `training.learning_rate=1e-4` applied.

    Raises:
        RecipeError: For an unknown key (naming the nearest valid one), a missing one, or a file that is not a YAML mapping.
    """
    content = read_yaml(Path(path))
    content.setdefault("name", Path(path).stem)
    for override in overrides:
        apply_override(content, override)
    return build_recipe(content, recipe_class)


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set the field of a mapping that an override such as `training.learning_rate=1e-4` names."""
    keys, separator, value = override.partition("=")
    if not separator:
        raise RecipeError(f"an override must look like training.learning_rate=1e-4, got {override!r}")
    *parents, last = keys.split(".")
    for key in parents:
        if content.get(key) is None:
            content[key] = {}
        content = content[key]
    content[last] = yaml.load(value, Loader=_Loader)


def build_recipe(content: dict[str, Any], recipe_class: Any) -> Any:
    """A recipe out of a mapping, every key of every section checked."""
    with_known_keys("recipe", content, recipe_class)
    data = content.get("data")
    if not isinstance(data, dict) or "dataset" not in data:
        raise RecipeError("a recipe needs data.dataset: 'digits', a Hub id or a local folder")
    sections = {name: content.get(name) or {} for name in ("model", "separation", "training")}
    with_known_keys("data", data, recipe_class.data_class)
    with_known_keys("model", sections["model"], recipe_class.config_class)
    check_keys("separation", sections["separation"], list(inspect.signature(SeparationCallback).parameters))
    with_known_keys("training", sections["training"], TrainingArguments)
    for owned in ("output_dir", "seed"):
        if owned in sections["training"]:
            raise RecipeError(f"training.{owned} is set by the command line or the recipe's own `seed`")
    separation = None if content.get("separation") is None else sections["separation"]
    return recipe_class(**{**content, **sections, "separation": separation, "data": recipe_class.data_class(**data)})


def with_known_keys(section: str, given: dict[str, Any], cls: type) -> dict[str, Any]:
    """The same mapping, if every key of it is a field of the dataclass."""
    check_keys(section, given, _field_names(cls))
    return given


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def check_keys(section: str, given: dict[str, Any], valid: list[str]) -> None:
    if not isinstance(given, dict):
        raise RecipeError(f"{section} must be a mapping, got {given!r}")
    for key in given:
        if key not in valid:
            if RENAMED.get(key) in valid:
                raise RecipeError(f"{key!r} in {section} is now called {RENAMED[key]!r}; rename it")
            nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
            raise RecipeError(f"unknown key {key!r} in {section}; the nearest valid one is {nearest!r}")


def command_line(description: str) -> argparse.ArgumentParser:
    """The arguments that every training script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", help="YAML file in configs/")
    parser.add_argument("--dataset", help="Hub id or local folder to use instead of the recipe's")
    parser.add_argument("--output_dir", help="where to save (default: runs/<recipe name>)")
    parser.add_argument("--seed", type=int, help="training seed instead of the recipe's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field, e.g. training.num_train_epochs=1"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace an earlier run in output_dir")
    existing.add_argument("--resume", action="store_true", help="go on with the run in output_dir where it ended")
    return parser


def check_output_dir(folder: Path, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that a run would mix with, or delete though it is no earlier run. Changes nothing.

    Raises:
        RecipeError: If the folder is not empty and neither flag is given, is not an earlier run, or has nothing to resume.
    """
    if not folder.exists() or not any(folder.iterdir()):
        if resume:
            raise RecipeError(f"there is nothing to resume in {folder}")
    elif overwrite or resume:
        if not (folder / "recipe.yaml").is_file():
            raise RecipeError(f"{folder} holds no earlier run (no recipe.yaml), so it is left alone; choose another --output_dir")
    else:
        raise RecipeError(f"{folder} is not empty; pass --overwrite to replace it, --resume to go on, or another --output_dir")


def check_evaluate_on(evaluate_on: str) -> None:
    """A `RecipeError` for a split that nothing is scored on."""
    if evaluate_on not in ("test", "validation"):
        raise RecipeError(f"evaluate_on must be 'test' or 'validation', got {evaluate_on!r}")


def check_same_recipe(recipe: Recipe, folder: Path, may_change: Sequence[str] = ("training",)) -> None:
    """Refuse to resume a run with another recipe than it began with; only the sections `may_change` may differ."""
    earlier = {RENAMED.get(key, key): value for key, value in yaml.safe_load((folder / "recipe.yaml").read_text()).items()}
    for section, value in dataclasses.asdict(recipe).items():
        if section not in may_change and earlier.get(section) != value:
            raise RecipeError(f"{folder} was begun with {section}={earlier.get(section)}, and cannot be resumed with {section}={value}")


def clear_output_dir(folder: Path) -> None:
    """Delete an earlier run, or make the folder."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the recipe as it was run, overrides included."""
    write_whole(folder / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: whatever happens meanwhile, it has all of the text or is as it was."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def write_results(path: Path, recipe: Recipe, metrics: dict[str, Any], **details: Any) -> None:
    """Write a results file: metrics with the recipe, seed, versions and commit that they come from."""
    results = {
        "name": recipe.name,
        "metrics": metrics,
        "seed": recipe.seed,
        "recipe": as_recorded(recipe),
        **provenance(),
        **details,
    }
    write_whole(path, json.dumps(results, indent=2) + "\n")


def as_recorded(recipe: Any) -> dict[str, Any]:
    """A recipe for a results file: local data by its name alone, as where it lay means nothing elsewhere."""
    content = dataclasses.asdict(recipe)
    data = content.get("data")
    if data is not None and Path(data["dataset"]).exists():
        data["dataset"] = Path(data["dataset"]).resolve().name
    return content


def provenance() -> dict[str, Any]:
    """The versions, the commit and the machine that a result comes from."""
    packages = ("modeling-uhop", "torch", "transformers", "accelerate", "datasets")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"versions": versions, "commit": commit(), "machine": machine()}


def machine() -> str:
    """Processor, cores, vector instructions and accelerator of this machine."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) if Path("/proc/cpuinfo").is_file() else []
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    name, instructions = names[0] if names else platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {instructions}{accelerator}"


def commit() -> str | None:
    """The commit of this checkout, `-dirty` if it has changes, or `None` outside one or without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None
