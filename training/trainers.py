"""Build the Trainer of a training, and take the trained model out of it."""

from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import EarlyStoppingCallback, IntervalStrategy, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from .checkpoints import SealingCallback
from .run_folder import RunFolder
from .stage_one import separation_callback
from .task import Examples, Task


# Because a process may be killed while it writes a checkpoint, a second one is kept to resume from.
DEFAULTS = {"report_to": "none", "save_total_limit": 2, "dataloader_pin_memory": torch.cuda.is_available()}


class Patience(EarlyStoppingCallback):
    """Early stopping that also counts, in a resumed run, the evaluations before the run was
    stopped."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        best, monitored = state.best_global_step or 0, f"eval_{args.metric_for_best_model}"
        self.early_stopping_patience_counter = sum(monitored in entry and entry["step"] > best for entry in state.log_history)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        # If several sets of examples are evaluated, each has its own call.
        if f"eval_{args.metric_for_best_model}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)


class SaveAfterEvaluation(TrainerCallback):
    """Delays a checkpoint at the last step of an epoch until the evaluation of that epoch is over.

    An evaluation draws random numbers. A run that resumes from the checkpoint does not evaluate that
    epoch again, and would continue with other numbers than an undisturbed run.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.delayed = False

    def on_step_end(self, args, state, control, **kwargs):
        self.delayed = control.should_save and args.eval_strategy == IntervalStrategy.EPOCH and float(state.epoch).is_integer()
        control.should_save = control.should_save and not self.delayed

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self.delayed
        self.delayed = False


def new_trainer(task: Task, examples: Examples, seed: int, folder: RunFolder | None = None, **overrides: Any) -> Trainer:
    """The Trainer of transformers with a new model, the separation step, early stopping and sealed
    checkpoints.

    Args:
        folder: The folder of the run; `None` for a part of an evaluation, which has no checkpoint to resume from.
        overrides: `TrainingArguments` that take precedence over those of the recipe.
    """
    recipe = task.recipe
    set_seed(seed)
    model = task.model(examples)
    if folder is not None:
        folder.load_weights(model)
        overrides = {"output_dir": str(folder.path), **overrides}
    separation = separation_callback(recipe.separation, examples.unlabelled, examples.views)
    arguments: dict[str, Any] = {**DEFAULTS, **task.defaults}
    callbacks: list[Any] = [] if separation is None else [separation]
    if recipe.patience is not None:
        callbacks.insert(0, Patience(recipe.patience))
        stopping = {"load_best_model_at_end": True, "metric_for_best_model": task.monitored}
        arguments = {**arguments, "eval_strategy": "epoch", "save_strategy": "epoch", **stopping}
    if folder is not None:
        callbacks += [*task.callbacks(model, separation if folder.begins else None), SaveAfterEvaluation(), SealingCallback()]
    return Trainer(
        model=model,
        args=TrainingArguments(seed=seed, **{**arguments, **recipe.training, **overrides}),
        train_dataset=examples.train,
        eval_dataset=examples.evaluated,
        data_collator=examples.collator,
        processing_class=examples.processor,
        compute_metrics=examples.metrics,
        callbacks=callbacks,
    )


def plain_model(trainer: Trainer) -> PreTrainedModel:
    """The trained model without the wrappers of accelerate, in evaluation mode.

    Because FSDP and DeepSpeed keep only a part of the weights in each process, the model that the
    Trainer saved is loaded if one of them is used."""
    model = cast(PreTrainedModel, trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return type(model).from_pretrained(trainer.args.output_dir).eval()
    return extract_model_from_parallel(model, keep_fp32_wrapper=False).eval()
