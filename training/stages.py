"""What a run has finished, kept in its folder as it goes: `--resume` goes on with the stages that are missing."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints import SEAL, check_fits, last_checkpoint
from recipe import Recipe, as_recorded, check_output_dir, check_same_recipe, write_atomically
from transformers import PreTrainedModel, Trainer, TrainerState


FOLDER, TRAINING = "stages", "training"


def read_stage(folder: Path, name: str, recipe: Recipe) -> dict[str, Any] | None:
    """What `save_stage` kept of a stage of the same recipe, or `None`."""
    path = _file(folder, name)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    return kept["outcome"] if kept.get("recipe") == _as_read(recipe) else None


def save_stage(folder: Path, name: str, recipe: Recipe, outcome: dict[str, Any]) -> dict[str, Any]:
    """Write the outcome of a finished stage, all of it or nothing; the outcome."""
    path = _file(folder, name)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps({"recipe": as_recorded(recipe), "outcome": outcome}))
    return outcome


def can_resume(folder: Path) -> bool:
    """Whether a folder holds a finished stage or a sealed checkpoint."""
    return any(folder.glob(f"{FOLDER}/*.json")) or any(folder.glob(f"*/{SEAL}"))


def begin(recipe: Recipe, folder: Path, overwrite: bool, resume: bool) -> tuple[dict[str, Any] | None, str | None]:
    """Look for what a run of the Trainer goes on from: a finished training, or the last checkpoint. Changes nothing.

    Raises:
        RecipeError: For a folder that must not be used, another recipe than it was begun with, or nothing to resume.
    """
    check_output_dir(folder, overwrite, resume)
    if not resume:
        return None, None
    check_same_recipe(recipe, folder)
    trained = read_stage(folder, TRAINING, recipe)
    return trained, None if trained is not None else last_checkpoint(folder)


def load_weights(model: PreTrainedModel, folder: Path, trained: dict[str, Any] | None, checkpoint: str | None) -> None:
    """Give a model the weights of a finished training; a `RecipeError` if it is another model than was trained, to the end or not."""
    if trained is not None:
        check_fits(str(folder), model)
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())
    elif checkpoint is not None:
        check_fits(checkpoint, model)


def train(
    trainer: Trainer, folder: Path, recipe: Recipe, checkpoint: str | None, details: Callable[[], dict[str, Any]] = dict
) -> dict[str, Any]:
    """Train, save the model, and keep the Trainer's state, the seconds (`None` of a resumed training) and `details`."""
    if trainer.is_world_process_zero():
        _file(folder, TRAINING).unlink(missing_ok=True)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = round(time.perf_counter() - started, 1) if checkpoint is None else None
    trainer.save_model()
    outcome = {"state": dataclasses.asdict(trainer.state), "seconds": seconds, **details()}
    return save_stage(folder, TRAINING, recipe, outcome) if trainer.is_world_process_zero() else outcome


def restore_state(trainer: Trainer, trained: dict[str, Any]) -> None:
    """Let a Trainer go on from the state that a finished training ended with."""
    own = {"is_local_process_zero": trainer.is_local_process_zero(), "is_world_process_zero": trainer.is_world_process_zero()}
    trainer.state = TrainerState(**{**trained["state"], **own})


def _file(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.json"


def _as_read(recipe: Recipe) -> Any:
    return json.loads(json.dumps(as_recorded(recipe)))
