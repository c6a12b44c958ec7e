"""Train STanHop-Net from a recipe and compare its forecasts with simple baselines.

The separation step is a callback of the Trainer. The model folder is reloaded in a new process as a
check.

python training/train_stanhop.py configs/stanhop_synthetic.yaml
python training/train_stanhop.py configs/stanhop_etth1_96.yaml --dataset path/to/ETTh1.csv
torchrun --standalone --nproc_per_node 2 training/train_stanhop.py configs/stanhop_wth_96.yaml --dataset WTH.csv --set training.use_cpu=true
accelerate launch --config_file configs/accelerate/gpus.yaml training/train_stanhop.py configs/stanhop_wth_96.yaml --dataset path/to/WTH.csv

The third command trains in two processes on a CPU; `accelerate launch` needs MPI for this.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel
from torch.utils.data import Subset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from modeling_uhop import STanHopConfig, STanHopForPrediction

from ..baselines.series import LinearMap, WindowMemory, baselines, errors_of, linear_map
from ..checkpoints import SealingCallback, remove_unfinished
from ..cli import command_line
from ..data.series import Series, load_series, unlabelled_windows
from ..errors import RecipeError, errors_in_one_line
from ..processes import leave_process_group
from ..recipe import check_evaluate_on, load_recipe
from ..reload import check_reload
from ..report.cards import write_card
from ..report.figures import forecast_figure, retrieval_weights_figure
from ..results import write_results
from ..run_folder import clear_output_dir, write_recipe
from ..stage_one import separation_callback
from ..stages import begin, load_weights, restore_state, train
from ..tasks.series import SeriesRecipe


TRAINING_DEFAULTS = {
    "report_to": "none",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    # Because a process may be killed while it writes a checkpoint, we keep a second one to resume
    # from.
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "label_names": ["future_values"],
    "prediction_loss_only": True,
    "per_device_eval_batch_size": 256,
    "max_grad_norm": 5.0,
}


class Patience(EarlyStoppingCallback):
    """Early stopping that also counts, in a resumed run, the evaluations before the run was
    stopped."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        best = state.best_global_step or 0
        self.early_stopping_patience_counter = sum("eval_loss" in entry and entry["step"] > best for entry in state.log_history)


def main() -> None:
    args = command_line(__doc__.splitlines()[0]).parse_args()
    with errors_in_one_line():
        recipe = load_recipe(args.recipe, args.set, SeriesRecipe)
        recipe.data.dataset = args.dataset or recipe.data.dataset
        recipe.seed = recipe.seed if args.seed is None else args.seed
        run(recipe, Path(args.output_dir or f"runs/{recipe.name}"), overwrite=args.overwrite, resume=args.resume)
    leave_process_group()


def run(recipe: SeriesRecipe, folder: Path, *, overwrite: bool = False, resume: bool = False) -> dict[str, Any]:
    """Run a recipe, save its outputs in `folder` and return the metrics.

    With `overwrite`, an earlier run is deleted only after the recipe and the data have been
    checked. If a step after the training fails, `resume` repeats only the steps after the training.
    """
    trained, checkpoint = begin(recipe, folder, overwrite, resume)
    check_evaluate_on(recipe.evaluate_on)
    series = load_series(recipe.data)
    config = STanHopConfig(**{**recipe.model, "num_input_channels": series.values.shape[1]})
    check_skip_start(recipe.skip_start, config)
    if config.memory_type is not None:
        raise RecipeError(
            f"model.memory_type={config.memory_type!r} needs stored windows (`store`), but this script stores none; leave it out"
        )
    check_baselines(recipe, series, config.prediction_length)
    lengths = (config.context_length, config.prediction_length)
    windows, every = series.windows("train", *lengths), series.windows("validation", *lengths)
    validation: Subset = Subset(every, range(0, len(every), recipe.data.validation_stride))
    set_seed(recipe.seed)
    model = STanHopForPrediction(config)
    load_weights(model, folder, trained, checkpoint)
    if recipe.skip_start == "ridge" and not resume:
        init_as_linear_map(model, linear_map(series, *lengths, last_value=False))
    separation = separation_callback(recipe.separation, lambda *where: unlabelled_windows(recipe.data, series, lengths, *where))
    # Because one process changes the folder below, we wait until every process has checked it.
    PartialState().wait_for_everyone()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            seed=recipe.seed,
            **{**TRAINING_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available(), **recipe.training},
        ),
        train_dataset=windows,
        eval_dataset=validation,
        callbacks=[
            Patience(recipe.patience),
            *([] if separation is None else [separation]),
            SealingCallback(),
        ],
    )
    is_main = trainer.is_world_process_zero()
    if is_main and resume:
        remove_unfinished(folder)
    elif is_main:
        clear_output_dir(folder)
        write_recipe(recipe, folder)
    if is_main:
        print(f"{recipe.name}: {model.num_parameters():,} parameters; windows: {len(windows):,} train, {len(validation):,} validation")
    if trained is None:
        trained = train(trainer, folder, recipe, checkpoint)
    else:
        restore_state(trainer, trained)
    if not is_main:
        return {}
    # Because accelerate wraps the model, for instance for half precision, we remove its wrappers
    # before the evaluation.
    extract_model_from_parallel(model, keep_fp32_wrapper=False).eval().cpu()
    metrics: dict[str, Any] = {}
    for split in dict.fromkeys(("validation", recipe.evaluate_on)):
        metrics |= {f"{split}_{name}": error for name, error in errors_of(forecaster(model), series, split, *lengths).items()}
    metrics["validation_loss"] = trainer.state.best_metric
    if trained["seconds"] is not None:
        metrics["train_seconds"] = trained["seconds"]
    metrics["baselines"] = baselines(series, config.prediction_length, recipe.season, recipe.baseline_lengths, recipe.evaluate_on)
    scaling = {"names": series.names, "mean": series.mean.tolist(), "std": series.std.tolist()}
    log = trainer.state.log_history
    write_recipe(recipe, folder)
    write_results(folder / "results.json", recipe, metrics, num_parameters=model.num_parameters(), series=scaling, log_history=log)
    evaluated = series.windows(recipe.evaluate_on, *lengths)
    examples = [evaluated[index] for index in range(0, len(evaluated), 500)]
    past, future = (torch.stack([example[name] for example in examples]) for name in ("past_values", "future_values"))
    forecasts = forecaster(model)(past)
    memories = WindowMemory(series, *lengths).closest(past[0])
    arrays = (past[0].numpy(), future[0].numpy(), forecasts[0].numpy(), memories.numpy())
    forecast_figure(folder / "forecast.png", *arrays, series.names, Path(recipe.data.dataset).stem)
    retrieval_weights_figure(folder / "weights.png", *weights_of(model, past[:1]), series.names)
    if recipe.evaluate_on == "test":
        write_card(folder)
    print(describe(metrics, recipe.evaluate_on))
    check_reload(folder, "time-series-forecasting", list(past.numpy()), forecasts.numpy())
    return metrics


def check_skip_start(start: str, config: STanHopConfig) -> None:
    """Raise a `RecipeError` if the model cannot have this initial linear skip.

    Because the ridge solution is for windows without scaling, "ridge" needs `scaling=None`.
    """
    if start not in ("zero", "ridge"):
        raise RecipeError(f"skip_start must be 'zero' or 'ridge', got {start!r}")
    if start == "ridge" and (not config.use_linear_skip or config.scaling is not None):
        needed = "model.use_linear_skip=true and model.scaling=null"
        raise RecipeError(f"skip_start='ridge' needs {needed}, got {config.use_linear_skip} and {config.scaling!r}")


def check_baselines(recipe: SeriesRecipe, series: Series, prediction_length: int) -> None:
    """Raise a `RecipeError`, before any training, if a baseline cannot be computed."""
    if recipe.season < 1:
        raise RecipeError(f"season must be at least 1, got {recipe.season}")
    for length in recipe.baseline_lengths:
        for split in ("train", "validation", recipe.evaluate_on):
            try:
                series.windows(split, length, prediction_length)
            except RecipeError as error:
                raise RecipeError(f"baseline_lengths={recipe.baseline_lengths} do not fit the {split} rows: {error}") from None


@torch.no_grad()
def init_as_linear_map(model: STanHopForPrediction, start: LinearMap) -> None:
    """Initialise a model with a linear skip so that its forecasts equal those of a linear map, in
    place."""
    skip = cast(torch.nn.Linear, model.linear_skip)
    skip.weight.copy_(start.weight)
    skip.bias.copy_(start.bias)
    for layer in model.decoder.layers:
        for parameter in cast(torch.nn.Linear, layer.head).parameters():
            parameter.zero_()


def forecaster(model: STanHopForPrediction):
    """Wrap a model as a function from past values (B, L, C) to forecasts (B, H, C)."""

    @torch.no_grad()
    def forecast(past: torch.Tensor) -> torch.Tensor:
        return model(past_values=past).prediction_outputs

    return forecast


@torch.no_grad()
def weights_of(model: STanHopForPrediction, past: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean association weights of the first block: (P, P) over time segments and (C, C) over
    series.

    The weights over series are the product of two: series to prototypes, and prototypes to series.
    """
    over_time, pooling, over_prototypes = model(past_values=past, output_attentions=True).attentions[:3]
    return over_time.mean((0, 1)).numpy(), (over_prototypes.mean(1) @ pooling.mean(1)).mean(0).numpy()


def describe(metrics: dict[str, Any], split: str) -> str:
    """The errors of the model and of every baseline on a split, as lines of text."""

    rows = {"STanHop": metrics, **metrics["baselines"]}
    took = f" ({metrics['train_seconds']} s of training)" if "train_seconds" in metrics else ""
    title = f"{split.capitalize()} errors on scaled values{took}:"
    lines = [f"  {name:<28} {errors[f'{split}_mse']:.4f}  {errors[f'{split}_mae']:.4f}" for name, errors in rows.items()]
    return "\n".join([title, f"  {'':<28} MSE     MAE", *lines])


if __name__ == "__main__":
    main()
