"""Checkpoints that survive a kill: each is sealed once it is whole, and a run resumes from the last sealed one."""

import hashlib
import json
import shutil
import warnings
from pathlib import Path

from accelerate import PartialState
from recipe import RecipeError, write_atomically
from safetensors import safe_open
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME


SEAL = "complete.json"


class SealingCallback(TrainerCallback):
    """Seals every checkpoint when it and what other callbacks add to it is written: the last of a Trainer's callbacks."""

    def on_save(self, args, state, control, **kwargs):
        # Every process writes its own random state into the checkpoint.
        PartialState().wait_for_everyone()
        if args.should_save:
            seal(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def seal(checkpoint: Path) -> None:
    """Write the names and digests of a checkpoint's files, in one step: a checkpoint has all of this file or nothing of it."""
    files = {
        str(path.relative_to(checkpoint)): _digest(path) for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != SEAL
    }
    write_atomically(checkpoint / SEAL, json.dumps(files, indent=1))


def last_checkpoint(folder: Path) -> str:
    """The last checkpoint that was written to the end. Later ones, which a kill left unfinished, are named in a warning.

    Raises:
        RecipeError: If there is none, or a file of it is missing or other than it was written.
    """
    for checkpoint in reversed(_by_step(folder)):
        if (checkpoint / SEAL).is_file():
            _check(checkpoint)
            return str(checkpoint)
        warnings.warn(f"{checkpoint} was not written to the end, and is left out", stacklevel=2)
    raise RecipeError(f"{folder} has no checkpoint to resume from; pass --overwrite to begin again")


def check_fits(checkpoint: str, model: PreTrainedModel) -> None:
    """A `RecipeError` for a checkpoint whose weights are those of another model; what an engine has sharded, it checks itself."""
    weights = Path(checkpoint) / SAFE_WEIGHTS_NAME
    if not weights.is_file():
        return
    with safe_open(weights, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise RecipeError(
                f"{checkpoint} is of another model: {name} has shape {found.get(name, 'none')} in it, and {expected.get(name, 'none')} here"
            )


def remove_unfinished(folder: Path) -> None:
    """Delete the checkpoints that were not written to the end."""
    for checkpoint in _by_step(folder):
        if not (checkpoint / SEAL).is_file():
            shutil.rmtree(checkpoint)


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _check(checkpoint: Path) -> None:
    for name, digest in json.loads((checkpoint / SEAL).read_text()).items():
        path = checkpoint / name
        problem = "is missing" if not path.is_file() else "is not as it was written" if _digest(path) != digest else None
        if problem is not None:
            raise RecipeError(f"{path} {problem}; delete {checkpoint} to resume from the checkpoint before it")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
