"""Train and evaluate a model from a recipe: the same story for every task.

A run that is killed continues from its last checkpoint. A step after the training that fails is
repeated without the training.
"""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from transformers import PreTrainedModel, Trainer, TrainerState

from modeling_uhop import SeparationCallback
from modeling_uhop.modeling_hopfield import HopfieldPreTrainedModel

from .recipe import Recipe
from .reload import check_reload
from .report.cards import write_card
from .results import write_results
from .run_folder import TRAINING, RunFolder
from .task import Task
from .tasks import task_class_of
from .trainers import new_trainer, plain_model


def run(recipe: Recipe, path: Path, mode: str = "fresh") -> dict[str, Any]:
    """Run a recipe, save its outputs in a folder and return the metrics.

    Args:
        recipe: The recipe.
        path: The output folder. An earlier run in it is deleted only after the recipe and the data
            have been checked.
        mode: "fresh", "overwrite" or "resume"; see `RunFolder`.

    Raises:
        RecipeError: If the recipe, its data or the folder cannot be used.
    """
    task: Task = task_class_of(recipe.task)(recipe)
    folder = RunFolder(path, recipe, mode, task.may_change)
    task.load()
    trainer = new_trainer(task, task.examples(), recipe.seed, folder)
    # Because one process changes the folder below, we wait until every process has checked it.
    PartialState().wait_for_everyone()
    is_main = trainer.is_world_process_zero()
    if is_main:
        folder.open()
        print(task.describe(cast(PreTrainedModel, trainer.model)))
    PartialState().wait_for_everyone()
    trained = folder.trained
    if trained is None:
        trained = train(trainer, task, folder)
    else:
        restore_state(trainer, trained)
    model = plain_model(trainer)
    metrics = {**task.evaluate(trainer, model, folder), **training_metrics(trainer, trained)}
    if not is_main:
        return {}
    folder.write_recipe()
    details = {"num_parameters": model.num_parameters(), **task.details(), "log_history": trainer.state.log_history}
    write_results(path / "results.json", recipe, metrics, **details)
    task.figures(folder, model, trained)
    if recipe.evaluation.split == "test" and isinstance(model, HopfieldPreTrainedModel):
        write_card(path)
    print(f"\nResults ({path / 'results.json'}):\n{task.summary(metrics)}")
    check_reload(path, task.pipeline, *task.probes(model))
    return metrics


def train(trainer: Trainer, task: Task, folder: RunFolder) -> dict[str, Any]:
    """Train, save the model, and save the outcome: the state of the Trainer, the time in seconds,
    the history of the separation step and what the task recorded.

    The time of a resumed training is `None`.

    Raises:
        RecipeError: If a finished run is resumed with another training that has no step left.
    """
    is_main = trainer.is_world_process_zero()
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=folder.checkpoint)
    seconds = round(time.perf_counter() - started, 1) if folder.checkpoint is None else None
    folder.check_trained(trainer.state.global_step)
    if is_main:
        folder.forget(TRAINING)
    trainer.save_model()
    history = [entry for each in trainer.callback_handler.callbacks if isinstance(each, SeparationCallback) for entry in each.history]
    outcome = {"state": dataclasses.asdict(trainer.state), "seconds": seconds, "history": history, **task.recorded()}
    if is_main:
        folder.save(TRAINING, outcome)
    return outcome


def restore_state(trainer: Trainer, trained: dict[str, Any]) -> None:
    """Restore the state of a Trainer from the outcome of a finished training, which later logs of the
    Trainer do not change."""
    own = {"is_local_process_zero": trainer.is_local_process_zero(), "is_world_process_zero": trainer.is_world_process_zero()}
    trainer.state = TrainerState(**copy.deepcopy({**trained["state"], **own}))


def training_metrics(trainer: Trainer, trained: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a training that every task has: its last and its best step, its time, and the
    separation loss before and after Stage I."""
    state = trainer.state
    metrics: dict[str, Any] = {"last_step": state.global_step}
    if trained["seconds"] is not None:
        metrics["train_seconds"] = trained["seconds"]
    if state.best_global_step is not None:
        metrics["best_step"] = state.best_global_step
    separated = [entry for entry in state.log_history if "separation_loss" in entry]
    if separated:
        metrics["separation_loss_before"] = separated[0]["separation_loss_before"]
        metrics["separation_loss"] = separated[-1]["separation_loss"]
    return metrics
