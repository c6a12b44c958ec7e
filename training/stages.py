"""Save each finished stage of a run, so that `--resume` repeats only the stages that are
missing."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerState

from .checkpoints import SEAL, check_fits, last_checkpoint
from .recipe import Recipe
from .results import as_recorded, write_atomically
from .run_folder import check_output_dir, check_same_recipe


FOLDER, TRAINING = "stages", "training"


def read_stage(folder: Path, name: str, recipe: Recipe) -> dict[str, Any] | None:
    """The outcome that `save_stage` saved for a stage of the same recipe, or `None`."""
    path = _file(folder, name)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    return kept["outcome"] if kept.get("recipe") == _as_read(recipe) else None


def save_stage(folder: Path, name: str, recipe: Recipe, outcome: dict[str, Any]) -> dict[str, Any]:
    """Save the outcome of a finished stage, atomically; returns the outcome."""
    path = _file(folder, name)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps({"recipe": as_recorded(recipe), "outcome": outcome}))
    return outcome


def can_resume(folder: Path) -> bool:
    """Whether a folder holds a finished stage or a sealed checkpoint."""
    return any(folder.glob(f"{FOLDER}/*.json")) or any(folder.glob(f"*/{SEAL}"))


def begin(recipe: Recipe, folder: Path, overwrite: bool, resume: bool) -> tuple[dict[str, Any] | None, str | None]:
    """Find where a run starts: at a finished training, at the last checkpoint, or at the beginning.
    No file is changed.

    Returns the outcome of a finished training or `None`, and the path of the last checkpoint or
    `None`.

    Raises:
        RecipeError: If the folder must not be used, there is nothing to resume, or the run was
            started with another recipe.
    """
    check_output_dir(folder, overwrite, resume)
    if not resume:
        return None, None
    check_same_recipe(recipe, folder)
    trained = read_stage(folder, TRAINING, recipe)
    return trained, None if trained is not None else last_checkpoint(folder)


def load_weights(model: PreTrainedModel, folder: Path, trained: dict[str, Any] | None, checkpoint: str | None) -> None:
    """Load the weights of a finished training into a model, in place.

    Raises:
        RecipeError: If the weights, or those of the checkpoint to resume from, are of another
            model.
    """
    if trained is not None:
        check_fits(str(folder), model)
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())
    elif checkpoint is not None:
        check_fits(checkpoint, model)


def train(
    trainer: Trainer, folder: Path, recipe: Recipe, checkpoint: str | None, details: Callable[[], dict[str, Any]] = dict
) -> dict[str, Any]:
    """Train, save the model, and save the outcome: the state of the Trainer, the time in seconds
    and `details`.

    The time of a resumed training is `None`.
    """
    if trainer.is_world_process_zero():
        _file(folder, TRAINING).unlink(missing_ok=True)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = round(time.perf_counter() - started, 1) if checkpoint is None else None
    trainer.save_model()
    outcome = {"state": dataclasses.asdict(trainer.state), "seconds": seconds, **details()}
    return save_stage(folder, TRAINING, recipe, outcome) if trainer.is_world_process_zero() else outcome


def restore_state(trainer: Trainer, trained: dict[str, Any]) -> None:
    """Restore the state of a Trainer from the outcome of a finished training."""
    own = {"is_local_process_zero": trainer.is_local_process_zero(), "is_world_process_zero": trainer.is_world_process_zero()}
    trainer.state = TrainerState(**{**trained["state"], **own})


def _file(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.json"


def _as_read(recipe: Recipe) -> Any:
    return json.loads(json.dumps(as_recorded(recipe)))
