"""Forecasting: STanHop-Net, compared with simple baselines."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch.utils.data import Subset, default_collate
from transformers import PreTrainedModel

from modeling_uhop import STanHopConfig, STanHopForPrediction, WindowViews
from modeling_uhop.modeling_stanhop import STanHopCycle

from ..baselines.ensemble import Ensemble
from ..baselines.series import (
    CycleMap,
    Fitted,
    LinearMap,
    WindowMemory,
    cycle_map,
    fit_baselines,
    linear_map,
    with_split,
)
from ..data.series import Series, SeriesData, load_series, unlabelled_windows
from ..errors import RecipeError
from ..forecast_intervals import FEWEST_WINDOWS, INTERVAL_KINDS, LEVELS, interval_metrics
from ..recipe import Recipe
from ..report.figures import forecast_figure, retrieval_weights_figure
from ..results import read_result
from ..task import Examples, Task


# The name of the model in ensembles and in the summary.
NETWORK = "STanHop"


@dataclass
class SeriesRecipe(Recipe):
    """A forecasting experiment.

    Attributes:
        season: Number of steps in a season, for the baseline that repeats the last season.
        baseline_lengths: Context lengths of the linear baselines. The memory baseline uses the
            smallest. An empty list means no baselines.
        skip_start: Initial weights of the linear skip: "zero", or "ridge", the ridge solution over
            training windows. With "ridge", the heads of the decoder are initialised to zero, and the
            cycle, if there is one, to the mean cycle of the training rows. The initial forecast is
            then that of the linear map, and STanHop-Net learns the residual.
        ensemble: Whether to report a weighted mean of the network, the best linear baseline and the
            memory baseline; and one of the two baselines alone. The best linear baseline and the
            weights are those with the lowest squared error on validation windows.
        intervals: Whether to report conformal prediction intervals at 80 and 95 %; see
            `interval_metrics`.
    """

    config_class: ClassVar[type] = STanHopConfig
    data_class: ClassVar[type] = SeriesData

    task: str = "series"
    patience: int | None = 3
    season: int = 24
    baseline_lengths: list[int] = field(default_factory=lambda: [168, 336])
    skip_start: str = "zero"
    ensemble: bool = False
    intervals: bool = False


class Forecasts(Task):
    """Train on all windows of the training rows, with early stopping on validation windows."""

    recipe_class = SeriesRecipe
    defaults = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "label_names": ["future_values"],
        "prediction_loss_only": True,
        "per_device_eval_batch_size": 256,
        "max_grad_norm": 5.0,
    }

    def load(self) -> None:
        recipe: SeriesRecipe = self.recipe
        self.series = load_series(recipe.data)
        self.config = STanHopConfig(**{**recipe.model, **units(self.series)})
        self.lengths = (self.config.context_length, self.config.prediction_length)
        self.cycle_length = self.config.cycle_length
        check_skip_start(recipe.skip_start, self.config)
        if self.config.memory_type is not None:
            raise RecipeError(
                f"model.memory_type={self.config.memory_type!r} needs stored windows (`store`), but a recipe stores none; leave it out"
            )
        self.check_baselines()
        self.windows = self.series.windows("train", *self.lengths, self.cycle_length)
        validation = self.series.windows("validation", *self.lengths, self.cycle_length)
        self.validation: Subset = Subset(validation, range(0, len(validation), recipe.data.validation_stride))
        if recipe.intervals and len(self.validation) < FEWEST_WINDOWS:
            raise RecipeError(
                f"intervals=true needs at least {FEWEST_WINDOWS} validation windows, got {len(self.validation)}; "
                "use more validation rows, or a smaller data.validation_stride"
            )

    def check_baselines(self) -> None:
        """Raise a `RecipeError` if a baseline, the ensemble or the intervals cannot be computed."""
        recipe: SeriesRecipe = self.recipe
        if recipe.ensemble and not recipe.baseline_lengths:
            raise RecipeError("ensemble=true needs baselines to combine, but baseline_lengths is empty; give a length, or leave it out")
        if recipe.intervals and recipe.evaluation.split == "validation":
            raise RecipeError("intervals=true needs evaluation.split='test', because validation windows calibrate the intervals")
        if recipe.season < 1:
            raise RecipeError(f"season must be at least 1, got {recipe.season}")
        for length in recipe.baseline_lengths:
            for split in ("train", "validation", recipe.evaluation.split):
                try:
                    self.series.windows(split, length, self.config.prediction_length)
                except RecipeError as error:
                    raise RecipeError(f"baseline_lengths={recipe.baseline_lengths} do not fit the {split} rows: {error}") from None

    def examples(self) -> Examples:
        data = self.recipe.data
        return Examples(
            train=self.windows,
            evaluated=self.validation,
            unlabelled=lambda dataset, split: unlabelled_windows(data, self.series, self.lengths, dataset, split, self.cycle_length),
            views=WindowViews,
        )

    def model(self, examples: Examples) -> PreTrainedModel:
        model = STanHopForPrediction(self.config)
        if self.recipe.skip_start == "ridge":
            if self.cycle_length is None:
                init_as_linear_map(model, linear_map(self.series, *self.lengths, last_value=False))
            else:
                init_as_cycle_map(model, cycle_map(self.series, *self.lengths, self.cycle_length, last_value=False))
        return model

    def describe(self, model: PreTrainedModel) -> str:
        windows = f"{len(self.windows):,} train, {len(self.validation):,} validation"
        return f"{self.recipe.name}: {model.num_parameters():,} parameters; windows: {windows}"

    def evaluate(self, trainer, model, folder) -> dict[str, Any]:
        if not trainer.is_world_process_zero():
            return {}
        recipe: SeriesRecipe = self.recipe
        model.cpu()
        evaluated, horizon = recipe.evaluation.split, self.config.prediction_length
        network, metrics = fitted(model), {"validation_loss": trainer.state.best_metric}
        for split in dict.fromkeys(("validation", evaluated)):
            metrics |= with_split(split, network.errors(self.series, split, horizon))
        baselines = fit_baselines(self.series, horizon, recipe.season, recipe.baseline_lengths, self.cycle_length)
        errors = {name: with_split(evaluated, each.errors(self.series, evaluated, horizon)) for name, each in baselines.items()}
        if recipe.ensemble:
            members = ensemble_members(baselines, self.series, horizon)
            without = Ensemble.fit(members, self.series, horizon)
            errors["ensemble of baselines"] = with_split(evaluated, without.errors(self.series, evaluated, horizon))
            ensemble = Ensemble.fit({NETWORK: network, **members}, self.series, horizon)
            metrics |= with_split(f"ensemble_{evaluated}", ensemble.errors(self.series, evaluated, horizon))
            metrics["ensemble_weights"] = dict(zip(ensemble.members, ensemble.weights.tolist(), strict=True))
        if recipe.intervals:
            metrics |= with_split(evaluated, interval_metrics(model, self.series, evaluated, recipe.data.validation_stride))
        return {**metrics, "baselines": errors}

    def details(self) -> dict[str, Any]:
        return {"series": {"names": self.series.names, "mean": self.series.mean.tolist(), "std": self.series.std.tolist()}}

    def figures(self, folder, model, trained) -> None:
        inputs = default_collate(self._evaluated()[:1])
        future, past = inputs.pop("future_values")[0], inputs["past_values"][0]
        memories = WindowMemory(self.series, *self.lengths).closest(past)
        arrays = (past.numpy(), future.numpy(), forecaster(model)(**inputs)[0].numpy(), memories.numpy())
        forecast_figure(folder.path / "forecast.png", *arrays, self.series.names, Path(self.recipe.data.dataset).stem)
        retrieval_weights_figure(folder.path / "weights.png", *weights_of(model, **inputs), self.series.names)

    def summary(self, metrics: dict[str, Any]) -> str:
        split = self.recipe.evaluation.split
        took = f" ({metrics['train_seconds']} s of training)" if "train_seconds" in metrics else ""
        rows = {NETWORK: metrics, **metrics["baselines"]}
        if "ensemble_weights" in metrics:
            rows["ensemble with the network"] = {name: metrics[f"ensemble_{name}"] for name in (f"{split}_mse", f"{split}_mae")}
        width = max(map(len, rows))
        lines = [f"  {name:<{width}} {errors[f'{split}_mse']:.4f}  {errors[f'{split}_mae']:.4f}" for name, errors in rows.items()]
        text = [f"{split.capitalize()} errors on scaled values{took}:", f"  {'':<{width}} MSE     MAE", *lines]
        for kind in INTERVAL_KINDS if f"{split}_split_coverage_80" in metrics else ():
            for level in LEVELS:
                coverage, wide, score = (metrics[f"{split}_{kind}_{name}_{level}"] for name in ("coverage", "width", "score"))
                text.append(f"  {kind} intervals at {level} %: coverage {coverage:.3f}, width {wide:.3f}, interval score {score:.3f}")
        return "\n".join(text)

    def probes(self, model: PreTrainedModel) -> tuple[dict[str, np.ndarray], np.ndarray]:
        inputs = default_collate(self._evaluated())
        del inputs["future_values"]
        return {name: values.numpy() for name, values in inputs.items()}, forecaster(model)(**inputs).numpy()

    def score(self, folder: Path) -> dict[str, float]:
        model = STanHopForPrediction.from_pretrained(folder).eval()
        split = self.recipe.evaluation.split
        trained = read_result(folder / "results.json", "run")["series"]["names"]
        if self.series.names != trained:
            raise RecipeError(f"the model was trained on the series {trained}, but the data have {self.series.names}")
        return with_split(split, fitted(model).errors(self.series, split, model.config.prediction_length))

    def _evaluated(self) -> list[dict[str, torch.Tensor]]:
        """Every 500th window of the evaluated split."""
        windows = self.series.windows(self.recipe.evaluation.split, *self.lengths, self.cycle_length)
        return [windows[index] for index in range(0, len(windows), 500)]


def units(series: Series) -> dict[str, Any]:
    """The fields of a configuration that say what the series of a data set are and how they are
    scaled."""
    return {
        "num_input_channels": len(series.names),
        "channel_names": series.names,
        "mean": series.mean.tolist(),
        "std": series.std.tolist(),
        "frequency": series.frequency,
    }


def check_skip_start(start: str, config: STanHopConfig) -> None:
    """Raise a `RecipeError` if the model cannot have this initial linear skip.

    Because the ridge solution is for windows without scaling, "ridge" needs `scaling=None`.
    """
    if start not in ("zero", "ridge"):
        raise RecipeError(f"skip_start must be 'zero' or 'ridge', got {start!r}")
    if start == "ridge" and (not config.use_linear_skip or config.scaling is not None):
        needed = "model.use_linear_skip=true and model.scaling=null"
        raise RecipeError(f"skip_start='ridge' needs {needed}, got {config.use_linear_skip} and {config.scaling!r}")


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


def init_as_cycle_map(model: STanHopForPrediction, start: CycleMap) -> None:
    """Initialise a model with a cycle and a linear skip so that its forecasts equal those of a linear
    map after a cycle, in place."""
    init_as_linear_map(model, start.remainder)
    with torch.no_grad():
        cast(STanHopCycle, model.model.cycle).table.copy_(start.cycle)


def forecaster(model: Any):
    """Wrap a model as a function from past values (B, L, C), and further inputs, to forecasts
    (B, H, C)."""

    @torch.no_grad()
    def forecast(past_values: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return model(past_values=past_values, **inputs).prediction_outputs

    return forecast


def fitted(model: Any) -> Fitted:
    """A model as a forecaster with the windows that it takes."""
    return Fitted(forecaster(model), model.config.context_length, model.config.cycle_length)


def ensemble_members(baselines: dict[str, Fitted], series: Series, prediction_length: int) -> dict[str, Fitted]:
    """The linear baseline with the lowest MSE on validation windows, and the memory baseline."""
    linear = [name for name, each in baselines.items() if isinstance(each.forecaster, LinearMap | CycleMap)]
    best = min(linear, key=lambda name: baselines[name].errors(series, "validation", prediction_length)["mse"])
    memory = next(name for name, each in baselines.items() if isinstance(each.forecaster, WindowMemory))
    return {name: baselines[name] for name in (best, memory)}


@torch.no_grad()
def weights_of(model: Any, past_values: torch.Tensor, **inputs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean association weights of the first block: (P, P) over time segments and (C, C) over
    series.

    The weights over series are the product of two: series to prototypes, and prototypes to series.
    """
    over_time, pooling, over_prototypes = model(past_values=past_values, output_attentions=True, **inputs).attentions[:3]
    return over_time.mean((0, 1)).numpy(), (over_prototypes.mean(1) @ pooling.mean(1)).mean(0).numpy()


TASK = Forecasts
