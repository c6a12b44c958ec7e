"""Checkpoints that are safe if a process is killed: a run resumes from the last complete
checkpoint.

A checkpoint is sealed when it is complete: a file lists the names and digests of its files.
"""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

from accelerate import PartialState
from safetensors import safe_open
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from .errors import RecipeError
from .results import write_atomically


SEAL = "complete.json"


class SealingCallback(TrainerCallback):
    """Seals every checkpoint after all of its files are written; it must be the last callback of a
    Trainer.

    Other callbacks may add files to a checkpoint.
    """

    def on_save(self, args, state, control, **kwargs):
        # Because every process writes its own random state into the checkpoint, we wait for all of
        # them.
        PartialState().wait_for_everyone()
        if args.should_save:
            seal(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def seal(checkpoint: Path) -> None:
    """Seal a checkpoint: write the names and digests of its files to one file, atomically."""
    files = {
        str(path.relative_to(checkpoint)): _digest(path) for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL
    }
    write_atomically(checkpoint / SEAL, json.dumps(files, indent=1))


def last_checkpoint(folder: Path) -> str | None:
    """The path of the last complete checkpoint, or `None`; a warning names later checkpoints that
    are incomplete.

    Raises:
        RecipeError: If one of its files is missing or has changed.
    """
    for checkpoint in reversed(_by_step(folder)):
        if (checkpoint / SEAL).is_file():
            _check(checkpoint)
            return str(checkpoint)
        warnings.warn(f"{checkpoint} is incomplete and is not used", stacklevel=2)
    return None


def check_fits(checkpoint: str, model: PreTrainedModel) -> None:
    """Raise a `RecipeError` if the weights of a checkpoint have other names or shapes than those of
    a model.

    Checkpoints that FSDP or DeepSpeed has sharded are not checked here, because these check them
    when they load them."""
    weights = Path(checkpoint) / SAFE_WEIGHTS_NAME
    if not weights.is_file():
        return
    with safe_open(weights, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise RecipeError(
                f"{checkpoint} is of another model: {name} has shape {found.get(name, 'none')} in it and {expected.get(name, 'none')} here"
            )


def remove_unfinished(folder: Path) -> None:
    """Delete the incomplete checkpoints of a folder."""
    for checkpoint in _by_step(folder):
        if not (checkpoint / SEAL).is_file():
            shutil.rmtree(checkpoint)


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _check(checkpoint: Path) -> None:
    for name, digest in json.loads((checkpoint / SEAL).read_text()).items():
        path = checkpoint / name
        problem = "is missing" if not path.is_file() else "has changed since it was written" if _digest(path) != digest else None
        if problem is not None:
            raise RecipeError(f"{path} {problem}; delete {checkpoint} to resume from the checkpoint before it")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
