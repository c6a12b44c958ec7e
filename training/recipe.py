"""Read and check recipes (one YAML file per experiment), and write the results file of a run.

A recipe states only what differs from the defaults of its dataclass.
"""

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

from modeling_uhop import Separation, SeparationCallback, STanHopConfig, UHopMILConfig, UHopViTConfig


if _missing := [
    name for name in ("datasets", "evaluate", "filelock", "matplotlib", "pandas", "PIL", "scipy", "sklearn") if not find_spec(name)
]:
    raise ModuleNotFoundError(f"{', '.join(_missing)} cannot be imported, but recipes need them: pip install 'modeling-uhop[train]'")


@dataclass
class DataRecipe:
    """The data section of an image recipe: where the images come from and how they are split.

    Attributes:
        dataset: "digits" (scikit-learn's), a Hub id, or a local folder in any layout that
            `datasets.load_dataset` reads.
        image_column: Name of the column of images. Every image mode is accepted (see
            `modeling_uhop.images.as_rgb`).
        label_column: Name of the column of classes. A class is a whole number, text, or true or
            false.
        train_split, test_split: Names of the splits. "digits" has no splits; `test_fraction`
            divides it.
        validation_fraction: Fraction of the training split that is held out for validation,
            stratified by label.
        test_fraction: Fraction of "digits" that is the test split.
        split_seed: Seed of these splits. It is separate from the training seed, so that all
            training seeds are evaluated on the same images.
        max_train_samples: Number of training images to keep, drawn with `split_seed`; `None` for
            all.
        max_eval_samples: Number of validation images, and of training images, to evaluate after
            each epoch; `None` for all validation images. The final evaluation uses all images.
        skip_unreadable: Whether to skip images that cannot be decoded, with a warning for each. All
            images are then read once before training. If false, the first unreadable image ends the
            run.
        random_crop_padding: Zero padding in pixels for random crops of training images; 0 for no
            crops.
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
    """The data section of a bag recipe: where the bags come from and how they are preprocessed.

    Attributes:
        dataset: "digits" (bags of scikit-learn's digits; a bag is positive if it contains a 9), a
            Hub id, a local folder in any layout that `datasets.load_dataset` reads, or a file
            (.parquet, .json, .jsonl, .arrow).
        instances_column: Name of the column of instances: a list for each bag, of lists of numbers
            or of the channels of an image.
        label_column: Name of the column of classes. A class is a whole number, text, or true or
            false.
        split: Name of the split that cross-validation divides into folds.
        standardize, clip, num_components: Arguments of `UHopMILFeatureExtractor`, which is fitted
            on training bags.
        max_instances: Training bags with more instances are subsampled to this number, with a new
            sample each time they are used; `None` for no limit.
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
    """The data section of a forecasting recipe: where a multivariate series comes from and how it
    is split.

    Attributes:
        dataset: "synthetic" (generated from a seed), a CSV or parquet file with one row per time
            step, or a Hub id.
        data_files: File to read, if the data set on the Hub has several, for instance "ETTh1.csv".
        date_column: Column of time stamps. This column and an index of time stamps are checked and
            then removed. Every other column is a series.
        split: Numbers of training, validation and test rows, or three fractions of all rows with
            the sum 1.
        validation_stride: During training, only every `validation_stride`-th validation window is
            evaluated. Test errors use every test window.
    """

    dataset: str
    data_files: str | None = None
    date_column: str = "date"
    split: list[float] = field(default_factory=lambda: [0.7, 0.1, 0.2])
    validation_stride: int = 1


@dataclass
class ViTRecipe:
    """A vision experiment.

    Attributes:
        name: Name of the experiment; the file name if the recipe gives none.
        data: Where the images come from.
        model: Fields of `UHopViTConfig`.
        separation: Arguments of `SeparationCallback` and fields of `Separation`; `None` for a run
            without the separation step (Stage I). `preset` begins with a preset of `Separation`.
            `dataset` and `split` name the data set that Stage I draws from, which needs no labels;
            without them it is that of the training.
        training: Fields of `TrainingArguments`.
        seed: Training seed.
        architecture: "uhop_vit", or "vit" for the baseline: the ViT of transformers at the same
            size, without alpha and without Phi.
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
    """A cross-validated experiment on bags (multiple-instance learning).

    `model` holds fields of `UHopMILConfig`; the other fields are as in `ViTRecipe`.

    Attributes:
        folds: Number of folds of a cross-validation, stratified by label. Each fold is the test
            fold once.
        repeats: Number of cross-validations, each with its own splits and seeds.
        ensemble: Number of models, with different seeds, whose logits are averaged.
        metrics: Names among "auc", "accuracy" and "f1". The first is the main metric.
        evaluate_on: "test" evaluates on the test folds. "validation" never reads the test folds: it
            holds out a fifth of each fold's training bags and evaluates on these. Use "validation"
            to choose between recipes.
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
    """A forecasting experiment.

    `model` holds fields of `STanHopConfig`; the other fields are as in `ViTRecipe`.

    Attributes:
        patience: Training ends after this number of evaluations without a lower validation loss,
            and the best checkpoint is restored. There is one evaluation per `training.eval_steps`
            steps or per epoch.
        season: Number of steps in a season, for the baseline that repeats the last season.
        baseline_lengths: Context lengths of the linear baselines. The memory baseline uses the
            smallest. An empty list means no baselines.
        evaluate_on: "test" evaluates on the test windows. "validation" never reads them; use it to
            choose between recipes.
        skip_start: Initial weights of the linear skip: "zero", or "ridge", the ridge solution over
            training windows. With "ridge", the heads of the decoder are initialised to zero. The
            initial forecast is then that of the linear map, and STanHop-Net learns the residual.
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

# Keys of the section `separation`, without the arguments that are no text or number.
_ARGUMENTS = {*inspect.signature(Separation).parameters, *inspect.signature(SeparationCallback).parameters, "preset", "split"}
SEPARATION_KEYS = sorted(_ARGUMENTS - {"corruption", "separation", "data_collator", "fields"})

# Earlier names of recipe fields, and their names now.
RENAMED = {"judge": "evaluate_on", "anchor_lengths": "baseline_lengths"}


class RecipeError(ValueError):
    """A recipe or command line that cannot be run. The message is one line."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exit with a one-line message instead of a traceback for errors that the user can correct.

    These are wrong input, a full disk, and a data loading process that was killed.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, NotImplementedError, StrictDataclassError, SafetensorError) as error:
        sys.exit(_in_one_line(error))
    except RuntimeError as error:
        # Because PyTorch raises a plain RuntimeError for a failed write and for a killed data
        # loading worker, we recognise them by text.
        if not any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "DataLoader worker")):
            raise
        sys.exit(_in_one_line(error))


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())


def refuse_several_processes(remedy: str = "start it with `python`, not with `accelerate launch` or `torchrun`") -> None:
    """Raise a `RecipeError` if a launcher started this script in several processes.

    Every process would do the same work and write the same files.
    """
    count = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
    if count > 1:
        raise RecipeError(f"this script runs in one process, but was started in {count}; {remedy}")


def leave_process_group() -> None:
    """Wait for all training processes, then close their process group, if there is one.

    Unused objects that still refer to the group, such as the reducer of a wrapped model, are freed
    first. If the interpreter freed them later, it would end the thread of gloo while it holds a
    lock that the main thread may wait for, and the process would never exit."""
    gc.collect()
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def local_dataset(name: str, data_dir: Path) -> str:
    """The local path of a recipe's data set.

    This is the folder, CSV file or parquet file in `data_dir` that has the name of the data set.
    Built-in data sets ("digits" and "synthetic") keep their name.

    Raises:
        RecipeError: If there is no such folder or file.
    """
    if name in ("digits", "synthetic"):
        return name
    stem = name.rpartition("/")[2]
    for candidate in (stem, f"{stem}.csv", f"{stem}.parquet"):
        if (data_dir / candidate).exists():
            return str(data_dir / candidate)
    raise RecipeError(f"{data_dir} has no folder or file {stem}, {stem}.csv or {stem}.parquet")


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-3 as a number (YAML 1.1 reads it as text)."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file.

    Raises:
        RecipeError: If there is no such file, or it is not a YAML mapping.
    """
    if not path.is_file():
        raise RecipeError(f"there is no recipe {path}")
    try:
        content = yaml.load(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must be a YAML mapping of recipe fields")
    return content


def load_recipe(path: str | Path, overrides: Sequence[str] = (), recipe_class: type = ViTRecipe) -> Any:
    """Read a recipe and apply overrides such as `training.learning_rate=1e-4`.

    Raises:
        RecipeError: For an unknown key (the message names the nearest valid key), a missing key, or
            a file that is not a YAML mapping.
    """
    content = read_yaml(Path(path))
    content.setdefault("name", Path(path).stem)
    for override in overrides:
        apply_override(content, override)
    return build_recipe(content, recipe_class)


def same_data(first: str, second: str) -> bool:
    """Return whether two texts name the same data set: the same name, or the same local path."""
    paths = [Path(text).expanduser() for text in (first, second)]
    return first == second or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))


def apply_override(content: dict[str, Any], override: str) -> None:
    """Apply an override such as `training.learning_rate=1e-4` to the mapping of a recipe, in
    place.

    `separation.preset` removes the fields of `Separation` that were set before it, except those of
    its sampling: otherwise they would change the preset."""
    keys, separator, value = override.partition("=")
    if not separator:
        raise RecipeError(f"an override must look like training.learning_rate=1e-4, got {override!r}")
    *parents, last = keys.split(".")
    for key in parents:
        if content.get(key) is None:
            content[key] = {}
        content = content[key]
    if keys == "separation.preset":
        kept = {"steps", "batch_size", "include_class_token", "pool_memories"}
        for field in set(content) & {*inspect.signature(Separation).parameters} - kept:
            del content[field]
    content[last] = yaml.load(value, Loader=_Loader)


def build_recipe(content: dict[str, Any], recipe_class: Any) -> Any:
    """Build a recipe from a mapping, after a check of every key in every section."""
    with_known_keys("recipe", content, recipe_class)
    data = content.get("data")
    if not isinstance(data, dict) or "dataset" not in data:
        raise RecipeError("a recipe needs data.dataset: the name of a built-in data set, a Hub id, or a local folder or file")
    sections = {name: content.get(name) or {} for name in ("model", "separation", "training")}
    with_known_keys("data", data, recipe_class.data_class)
    with_known_keys("model", sections["model"], recipe_class.config_class)
    check_keys("separation", sections["separation"], SEPARATION_KEYS)
    with_known_keys("training", sections["training"], TrainingArguments)
    for owned in ("output_dir", "seed"):
        if owned in sections["training"]:
            raise RecipeError(f"training.{owned} cannot be set in a recipe; use the top-level `seed` and the option --output_dir")
    separation = None if content.get("separation") is None else sections["separation"]
    return recipe_class(**{**content, **sections, "separation": separation, "data": recipe_class.data_class(**data)})


def with_known_keys(section: str, given: dict[str, Any], cls: type) -> dict[str, Any]:
    """Return a mapping unchanged if each of its keys is a field of the dataclass; otherwise raise a
    `RecipeError`."""
    check_keys(section, given, _field_names(cls))
    return given


def _field_names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def check_keys(section: str, given: dict[str, Any], valid: list[str]) -> None:
    """Raise a `RecipeError` for a key that is not valid; the message names the nearest valid
    key."""
    if not isinstance(given, dict):
        raise RecipeError(f"{section} must be a mapping, got {given!r}")
    for key in given:
        if key not in valid:
            if RENAMED.get(key) in valid:
                raise RecipeError(f"{key!r} in {section} is now called {RENAMED[key]!r}; rename it")
            nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
            raise RecipeError(f"unknown key {key!r} in {section}; the nearest valid one is {nearest!r}")


def command_line(description: str) -> argparse.ArgumentParser:
    """An argument parser with the arguments that every training script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", help="YAML file in configs/")
    parser.add_argument("--dataset", help="Hub id, local folder or file to use instead of the recipe's data set")
    parser.add_argument("--output_dir", help="folder to save to (default: runs/<recipe name>)")
    parser.add_argument("--seed", type=int, help="training seed to use instead of the recipe's seed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field, e.g. training.num_train_epochs=1"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="delete an earlier run in output_dir and start again")
    existing.add_argument("--resume", action="store_true", help="continue the run in output_dir from its last checkpoint")
    return parser


def check_output_dir(folder: Path, overwrite: bool, resume: bool) -> None:
    """Check that a run may write to a folder, without changing the folder.

    Raises:
        RecipeError: If the folder is not empty and neither flag is given, if it is to be
            overwritten or resumed but holds no earlier run, or if it is empty and there is nothing
            to resume.
    """
    if not folder.exists() or not any(folder.iterdir()):
        if resume:
            raise RecipeError(f"there is nothing to resume in {folder}")
    elif overwrite or resume:
        if not (folder / "recipe.yaml").is_file():
            raise RecipeError(f"{folder} holds no earlier run (it has no recipe.yaml) and was not changed; choose another --output_dir")
    else:
        raise RecipeError(f"{folder} is not empty; pass --overwrite to delete it, --resume to continue it, or another --output_dir")


def check_evaluate_on(evaluate_on: str) -> None:
    """Raise a `RecipeError` if `evaluate_on` is neither "test" nor "validation"."""
    if evaluate_on not in ("test", "validation"):
        raise RecipeError(f"evaluate_on must be 'test' or 'validation', got {evaluate_on!r}")


def check_same_recipe(recipe: Recipe, folder: Path, may_change: Sequence[str] = ("training",)) -> None:
    """Check that a run is resumed with the recipe it was started with.

    Raises:
        RecipeError: If a section that is not in `may_change` differs.
    """
    earlier = {RENAMED.get(key, key): value for key, value in yaml.safe_load((folder / "recipe.yaml").read_text()).items()}
    for section, value in dataclasses.asdict(recipe).items():
        if section not in may_change and earlier.get(section) != value:
            raise RecipeError(f"{folder} was started with {section}={earlier.get(section)} and cannot be resumed with {section}={value}")


def clear_output_dir(folder: Path) -> None:
    """Create an empty folder; an earlier run in it is deleted."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write recipe.yaml: the recipe as it was run, overrides included."""
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: if the process is killed, the file holds all of the text or its old
    content."""
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def write_results(path: Path, recipe: Recipe, metrics: dict[str, Any], **details: Any) -> None:
    """Write a results file: metrics, and the recipe, seed, versions and commit that gave them."""
    results = {
        "name": recipe.name,
        "metrics": metrics,
        "seed": recipe.seed,
        "recipe": as_recorded(recipe),
        **provenance(),
        **details,
    }
    write_atomically(path, json.dumps(results, indent=2) + "\n")


def as_recorded(recipe: Any) -> dict[str, Any]:
    """A recipe as a mapping for a results file.

    Because a local path has no meaning on another machine, a local data set is recorded by its
    name."""
    content = dataclasses.asdict(recipe)
    for section in (content.get("data"), content.get("separation")):
        if section is not None and section.get("dataset") is not None and Path(section["dataset"]).exists():
            section["dataset"] = Path(section["dataset"]).resolve().name
    return content


def provenance() -> dict[str, Any]:
    """Versions of the packages, the commit and the machine, for a results file."""
    packages = ("modeling-uhop", "torch", "transformers", "accelerate", "datasets")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"versions": versions, "commit": commit(), "machine": machine()}


def machine() -> str:
    """A description of this machine: processor, cores, vector instructions and accelerator."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE) if Path("/proc/cpuinfo").is_file() else []
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    name, instructions = names[0] if names else platform.processor() or platform.machine(), torch.backends.cpu.get_cpu_capability()
    return f"{name}, {os.cpu_count()} cores, {instructions}{accelerator}"


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` if it has changes; `None` outside a checkout or
    without git."""

    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None
