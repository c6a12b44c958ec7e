"""Tests of forecasting: series, splits, windows, baselines against loops and scikit-learn, runs."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import load_dataset
from sklearn.linear_model import Ridge
from transformers import Trainer, TrainerCallback

from modeling_uhop import STanHopConfig, STanHopForPrediction
from modeling_uhop.training import cli
from modeling_uhop.training.baselines.series import (
    WindowMemory,
    baselines,
    errors_of,
    forward_filled,
    linear_map,
    repeat_last,
    repeat_season,
)
from modeling_uhop.training.data.series import Series, SeriesData, Windows, load_series, split_rows, synthetic_series
from modeling_uhop.training.data.time_stamps import read_time_stamps, take_time_stamps
from modeling_uhop.training.engine import run
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.recipe import Evaluation, load_recipe
from modeling_uhop.training.tasks.series import SeriesRecipe, check_skip_start, init_as_linear_map, weights_of
from tests.conftest import assert_close
from tests.support.forks import run_command
from tests.support.recipes import no_reload, reload_in_forks


ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
RECIPES = sorted((ROOT / "configs").glob("stanhop_*.yaml"))


@pytest.fixture
def series() -> Series:
    return load_series(SeriesData("synthetic", split=[600, 200, 200]))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    recipe = load_recipe(path)
    assert type(recipe) is SeriesRecipe
    assert recipe.name == path.stem
    STanHopConfig(**recipe.model)
    header = path.read_text().partition("\ntask:")[0]
    assert all(word in header for word in ("# Command:", "# Cost:", "# Source:"))


@pytest.mark.parametrize(("folder", "name", "channels"), [("ett", "ETTh1", 7), ("ett", "ETTh2", 7), ("wth", "WTH", 12)])
def test_the_real_series_load(folder, name, channels):
    path = SHARED / folder / f"{name}.csv"
    if not path.is_file():
        pytest.skip(f"{path.name} is not on this machine")
    data = load_recipe(ROOT / "configs" / f"stanhop_{name.lower()}_96.yaml").data
    series = load_series(SeriesData(str(path), split=data.split))
    assert series.values.shape[1] == channels
    assert len(series.windows("test", 336, 96)) == data.split[2] - 96 + 1
    train = series.values[: int(data.split[0])]
    assert torch.allclose(train.mean(0), torch.zeros(channels), atol=1e-3)


def test_windows_are_views_of_one_array():
    values = torch.arange(40.0).reshape(20, 2)
    windows = Windows(values, 8, 15, 5, 3)
    assert len(windows) == 5
    for index in (0, 4):
        example = windows[index]
        assert torch.equal(example["past_values"], values[3 + index : 8 + index])
        assert torch.equal(example["future_values"], values[8 + index : 11 + index])
        assert example["past_values"].untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    with pytest.raises(IndexError):
        windows[5]
    with pytest.raises(RecipeError, match="only 4 rows precede row 4, fewer than context_length=5"):
        Windows(values, 4, 15, 5, 3)
    with pytest.raises(RecipeError, match="2 rows have no window of prediction_length=3"):
        Windows(values, 8, 10, 5, 3)


def test_splits_share_no_future(series):
    rows: dict[str, set[int]] = {"train": set(), "validation": set(), "test": set()}
    for split, seen in rows.items():
        windows = series.windows(split, 48, 12)
        for index in range(len(windows)):
            now = windows.first + index
            seen.update(range(now, now + 12))
        assert max(seen) < series.rows[split][1]
    assert (min(rows["train"]), min(rows["validation"]), max(rows["test"])) == (48, 600, 999)
    assert not rows["train"] & rows["validation"]
    assert not rows["validation"] & rows["test"]
    assert len(series.windows("test", 48, 12)) == 200 - 12 + 1


def test_scaling_is_by_training_rows():
    frame = synthetic_series()
    series = load_series(SeriesData("synthetic", split=[0.5, 0.2, 0.3]))
    train = frame.drop(columns="date").to_numpy()[:1200]
    np.testing.assert_allclose(series.values.numpy(), (frame.drop(columns="date") - train.mean(0)) / train.std(0), atol=1e-5)
    assert series.names == [f"series_{index}" for index in range(4)]
    assert series.rows == {"train": (0, 1200), "validation": (1200, 1680), "test": (1680, 2400)}


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ([0.5, 0.5], "three positive numbers"),
        ([0.9, 0, 0.1], "positive"),
        ([90, 10, 1], "needs 101 rows"),
        ([0.5, 0.1, 0.1], "fractions with the sum 1"),
        ([0.7, 0.2, 0.3], "fractions with the sum 1"),
        ([0.7, 0.3, 1], "three numbers of rows, or three fractions"),
        ([90.5, 5, 4], "three numbers of rows, or three fractions"),
    ],
)
def test_bad_splits_are_refused(split, message):
    with pytest.raises(RecipeError, match=message):
        split_rows(100, split)


def test_csv_and_parquet_files_are_read(tmp_path):
    frame = synthetic_series(300)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    one, other = (load_series(SeriesData(str(tmp_path / name))) for name in ("a.csv", "a.parquet"))
    assert torch.allclose(one.values, other.values, atol=1e-5)
    gaps = frame.copy()
    gaps.loc[5, "series_1"] = np.nan
    # Because of rounding, the computed standard deviation of the constant 0.3 is not 0.
    gaps["series_2"] = np.where(np.arange(300) < 250, 0.3, 0.4)
    gaps.drop(index=range(100, 104)).to_csv(tmp_path / "gaps.csv", index=False)
    with pytest.warns(UserWarning, match=r"gaps.csv has gaps in its time stamps \(1, the first before row 100\)"):
        loaded = load_series(SeriesData(str(tmp_path / "gaps.csv")))
    assert loaded.values.isnan().sum() == 1
    assert (loaded.values[:246, 2] == 0).all()
    assert torch.allclose(loaded.values[246:, 2], torch.tensor(0.1))
    assert loaded.std[2] == 1.0


def test_bad_files_are_refused(tmp_path):
    frame = synthetic_series(300)
    path = tmp_path / "a.csv"
    for change, message in (
        (lambda f: f.iloc[[0, 1, 3, 2, *range(4, 300)]], "row 3 of .* does not come after the row before it"),
        (
            lambda f: f.assign(series_0="high"),
            r"column 'series_0' of .* is not numbers; it has 'high' in row 0; set data.date_column=series_0 if it has time stamps",
        ),
        (lambda f: f.assign(date=f["date"].where(f.index != 7)), "row 7 of .* has no time stamp"),
        (lambda f: f.assign(series_1=f["series_1"].where(f.index != 9, np.inf)), "column 'series_1' of .* is infinite in row 9"),
        (lambda f: f.assign(series_2=f["series_2"].where(f.index > 250)), "column 'series_2' of .* has no value in the 210 training rows"),
        (lambda f: f.assign(**{f"series_{i}": f[f"series_{i}"].where(f.index < 240) for i in range(4)}), "in the test rows, 240 to 299"),
    ):
        change(frame).to_csv(path, index=False)
        with pytest.raises(RecipeError, match=message):
            load_series(SeriesData(str(path)))
    with pytest.raises(RecipeError, match="there is no file"):
        load_series(SeriesData(str(tmp_path / "none.csv")))
    with pytest.raises(RecipeError, match=r"there is no file or folder ETTh1, and the Hub .*; give a CSV or parquet file .*, as --data"):
        load_series(SeriesData("ETTh1"))


def _of_one_column(folder: Path, *parts: Any) -> str:
    """A file of 100 rows (70 for training) with one series `a`."""
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=100, freq="h"), "a": np.concatenate(parts)})
    frame.to_parquet(folder / "a.parquet")
    return str(folder / "a.parquet")


@pytest.mark.parametrize("scale", [1e-150, 1e200, 5e307])
def test_values_whose_squares_overflow_float64_are_scaled(tmp_path, scale):
    values = np.random.default_rng(0).uniform(-1.0, 1.0, 100)
    series = load_series(SeriesData(_of_one_column(tmp_path, values * scale)))
    np.testing.assert_allclose(series.values[:, 0], (values - values[:70].mean()) / values[:70].std(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose((series.mean[0], series.std[0]), (values[:70].mean() * scale, values[:70].std() * scale), rtol=1e-12)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((np.zeros(80), np.full(20, 1e39)), "column 'a' of .*a.parquet has 1e\\+39 in row 80, more than 1e\\+15 standard deviations"),
        ((np.arange(70) * 1e-300, np.full(30, -1e10)), "has -1e\\+10 in row 70, more than"),
        ((np.full(70, 1.5e308), np.full(30, -1.5e308)), "has -1.5e\\+308 in row 70, more than"),
        ((np.arange(100) * 1e-310,), "column 'a' of .*a.parquet has values in the training rows that are too small"),
    ],
)
def test_values_that_cannot_be_scaled_are_refused(tmp_path, parts, message):
    with pytest.raises(RecipeError, match=message):
        load_series(SeriesData(_of_one_column(tmp_path, *parts)))


def test_a_series_that_scaling_makes_constant_gives_a_warning(tmp_path):
    path = _of_one_column(tmp_path, [1e200, *np.arange(69.0)], np.arange(10.0) * 1e200, np.arange(20.0))
    with pytest.warns(UserWarning, match="column 'a' of .*a.parquet becomes constant in the test rows, 80 to 99") as caught:
        load_series(SeriesData(path))
    assert len(caught) == 1


# The CSV reader of datasets leaves its file open until garbage collection.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_series_is_read_from_the_hub(tmp_path, monkeypatch):
    # A local folder is a substitute for the Hub.
    frame = synthetic_series(300)
    monkeypatch.setattr(
        "modeling_uhop.training.data.series_files.load_from_hub",
        lambda source, accepted, **options: load_dataset(str(tmp_path / source.name), **options),
    )
    for repository, files in {"ett": ("ETTh1.csv", "ETTh2.csv"), "one": ("data.csv",), "split": ("train.csv", "test.csv")}.items():
        (tmp_path / "someone" / repository).mkdir(parents=True)
        for number, name in enumerate(files, 1):
            frame.assign(series_0=frame["series_0"] * number + number**2).to_csv(tmp_path / "someone" / repository / name, index=False)
    values = frame.drop(columns="date").to_numpy()
    expected = (values - values[:210].mean(0)) / values[:210].std(0)
    whole = load_series(SeriesData("someone/one"))
    np.testing.assert_allclose(whole.values, expected, atol=1e-5)
    second = load_series(SeriesData("someone/ett", data_files="ETTh2.csv"))
    np.testing.assert_allclose(second.values, expected, atol=1e-5)
    raw = frame["series_0"][:210].mean()
    assert (whole.mean[0], second.mean[0]) == (pytest.approx(raw + 1.0), pytest.approx(2.0 * raw + 4.0))
    with pytest.raises(RecipeError, match=r"someone/split has the splits train, test, .*set data.data_files"):
        load_series(SeriesData("someone/split"))
    with pytest.raises(RecipeError, match="row 300 of someone/ett does not come after"):
        load_series(SeriesData("someone/ett"))


def test_errors_are_means_over_every_window(series):
    windows = series.windows("test", 24, 6)
    errors = [(windows[i]["future_values"] - windows[i]["past_values"][-1:]).double() for i in range(len(windows))]
    found = errors_of(repeat_last(6), series, "test", 24, 6)
    assert found["mse"] == pytest.approx(torch.stack(errors).square().mean().item())
    assert found["mae"] == pytest.approx(torch.stack(errors).abs().mean().item())
    series.values[850, 1] = torch.nan
    assert np.isfinite(errors_of(lambda past: torch.zeros(len(past), 6, 4), series, "test", 24, 6)["mse"])


def test_the_seasonal_baseline_repeats_the_last_season():
    past = torch.arange(14.0).reshape(1, 7, 2)
    assert repeat_season(7, 3)(past)[0, :, 0].tolist() == [8, 10, 12, 8, 10, 12, 8]


@pytest.mark.parametrize("last_value", [False, True])
def test_the_linear_baseline_is_ridge_regression(series, last_value):
    """It equals that of scikit-learn, with the penalty that has the lowest error on validation
    windows."""
    forecast = linear_map(series, 30, 5, last_value=last_value)
    rows = torch.cat([series.values[:600, channel].unfold(0, 35, 1) for channel in range(4)]).double().numpy()
    offset = rows[:, 29:30] if last_value else 0.0
    past = torch.randn(3, 30, 4)
    windows = torch.cat([series.values[570:800, channel].unfold(0, 35, 1) for channel in range(4)]).numpy()
    baseline = windows[:, 29:30] if last_value else 0.0
    forecasts, errors = [], []
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1):
        ridge = Ridge(penalty * len(rows)).fit(rows[:, :30] - offset, rows[:, 30:] - offset)
        flat = past.permute(0, 2, 1).reshape(12, 30).numpy()
        shift = flat[:, 29:30] if last_value else 0.0
        forecasts.append((ridge.predict(flat - shift) + shift).reshape(3, 4, 5).transpose(0, 2, 1))
        errors.append(np.square(ridge.predict(windows[:, :30] - baseline) + baseline - windows[:, 30:]).mean())
    matches = [np.allclose(forecast(past).numpy(), expected, atol=2e-3) for expected in forecasts]
    assert [index for index, match in enumerate(matches) if match] == [np.argmin(errors)]


def test_the_linear_skip_can_be_initialised_as_the_ridge_map(series):
    start = linear_map(series, 30, 5, last_value=False)
    torch.manual_seed(0)
    config = STanHopConfig(num_input_channels=4, context_length=30, prediction_length=5, d_model=16, use_linear_skip=True, scaling=None)
    model = STanHopForPrediction(config).eval()
    init_as_linear_map(model, start)
    past = torch.randn(3, 30, 4)
    forecast = model(past_values=past, future_values=torch.randn(3, 5, 4))
    assert_close(forecast.prediction_outputs, start(past))
    forecast.loss.backward()
    assert all(layer.head.weight.grad.abs().max() > 0 for layer in model.decoder.layers)


@pytest.mark.parametrize(
    ("model", "start", "message"),
    [
        ({}, "ols", "skip_start must be 'zero' or 'ridge', got 'ols'"),
        ({"scaling": None}, "ridge", "needs model.use_linear_skip=true and model.scaling=null, got False and None"),
        ({"use_linear_skip": True}, "ridge", "got True and 'std'"),
    ],
)
def test_an_initial_skip_that_the_model_cannot_have_is_refused(model, start, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        check_skip_start(start, STanHopConfig(**model))


def test_the_memory_baseline_equals_the_loops(series):
    memory = WindowMemory(series, 24, 6, beta=5.0, stride=7)
    past = series.windows("test", 24, 6)[3]["past_values"]
    for channel in range(4):
        values = series.values[:600, channel].double().numpy()
        query = past[:, channel].double().numpy()
        loc, scale = query.mean(), np.sqrt(query.var() + 0.1)
        query = (query - loc) / scale
        scores, futures = [], []
        for start in range(0, 600 - 30 + 1, 7):
            window = values[start : start + 24]
            centre, width = window.mean(), np.sqrt(window.var() + 0.1)
            key = (window - centre) / width
            scores.append(5.0 * (query @ key) / np.linalg.norm(query) / np.linalg.norm(key))
            futures.append((values[start + 24 : start + 30] - centre) / width)
        weights = np.exp(scores - np.max(scores))
        expected = weights @ np.stack(futures) / weights.sum() * scale + loc
        np.testing.assert_allclose(memory(past.unsqueeze(0))[0, :, channel], expected, atol=1e-4)


def test_the_memory_baseline_returns_the_closest_windows(series):
    memory = WindowMemory(series, 24, 6, stride=3)
    stored = series.values[30:60]
    closest = memory.closest(stored[:24], count=2)
    assert closest.shape == (2, 30, 4)
    assert torch.allclose(closest[0], stored, atol=1e-4)


def test_weights_of_the_first_block(series):
    model = STanHopForPrediction(STanHopConfig(num_input_channels=4, context_length=24, prediction_length=12, d_model=16, ffn_dim=16))
    over_time, over_series = weights_of(model.eval(), series.values[:24].unsqueeze(0))
    assert (over_time.shape, over_series.shape) == ((2, 2), (4, 4))
    np.testing.assert_allclose(over_time.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(over_series.sum(-1), 1.0, atol=1e-5)


def test_baselines_use_the_season(series):
    table = baselines(series, 24, 24, [48, 96])
    assert len(table) == 7
    assert table["repeat last 24"]["test_mse"] < table["repeat last"]["test_mse"]
    assert table["linear, 96"]["test_mse"] < table["repeat last 24"]["test_mse"]
    assert table["memory of windows, 48"]["test_mse"] < table["repeat last"]["test_mse"]


@pytest.mark.parametrize(
    ("split", "model", "fields", "message"),
    [
        (
            [180, 100, 100],
            {},
            {"baseline_lengths": [24, 168]},
            r"baseline_lengths=\[24, 168\] do not fit the train rows: 12 rows have no window",
        ),
        ([400, 20, 180], {}, {"baseline_lengths": [24, 168]}, "do not fit the validation rows: 20 rows have no window"),
        ([180, 100, 100], {}, {"season": 0}, "season must be at least 1, got 0"),
        ([180, 100, 100], {"memory_type": "tune"}, {}, "model.memory_type='tune' needs stored windows"),
    ],
)
def test_errors_after_training_are_found_before_it(tmp_path, split, model, fields, message):
    data = SeriesData("synthetic", split=split)
    model = {"context_length": 24, "prediction_length": 24, "d_model": 16, **model}
    with pytest.raises(RecipeError, match=message):
        run(SeriesRecipe(name="bad", data=data, model=model, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.process
def test_the_command_leaves_a_model_that_reloads(tmp_path, monkeypatch, capsys):
    content = {
        "task": "series",
        "data": {"dataset": "synthetic", "split": [400, 150, 150]},
        "model": {"context_length": 48, "prediction_length": 12, "d_model": 16, "ffn_dim": 16},
        "separation": {"schedule": "train_begin", "steps": 2, "batch_size": 4},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 64},
        "baseline_lengths": [24, 48],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    reload_in_forks(monkeypatch)
    command = [str(tmp_path / "small.yaml"), "--output_dir", str(tmp_path / "out")]
    cli.main(["train", *command])
    assert "answers agree" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    validation = {"validation_loss", "validation_mse", "validation_mae", "train_seconds", "baselines"}
    validation |= {"last_step", "best_step", "separation_loss_before", "separation_loss"}
    assert validation | {"test_mse", "test_mae"} == set(results["metrics"])
    raw = synthetic_series().drop(columns="date")[:400]
    assert results["series"]["names"] == [f"series_{index}" for index in range(4)]
    np.testing.assert_allclose((results["series"]["mean"], results["series"]["std"]), (raw.mean(), raw.std(ddof=0)))
    assert (tmp_path / "out" / "README.md").is_file()
    for name in ("forecast.png", "weights.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    again = ["--overwrite", "--set", "evaluation.split=validation"]
    cli.main(["train", *command, *again])
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert set(metrics) == validation
    assert metrics["validation_mse"] == results["metrics"]["validation_mse"]
    assert set(metrics["baselines"]["repeat last"]) == {"validation_mse", "validation_mae"}
    assert "Validation errors" in capsys.readouterr().out
    ridge = [word for each in ("skip_start=ridge", "model.use_linear_skip=true", "model.scaling=null") for word in ("--set", each)]
    cli.main(["train", *command, *again, *ridge, "--set", "training.learning_rate=0.0"])
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert metrics["validation_mse"] == pytest.approx(metrics["baselines"]["linear, 48"]["validation_mse"], rel=1e-5)
    (tmp_path / "a.csv").write_text(pd.DataFrame({"date": ["2024-01-02", "2024-01-01"], "x": [1.0, 2.0]}).to_csv(index=False))
    refused = run_command("training/train.py", *command, "--dataset", str(tmp_path / "a.csv"), "--overwrite")
    assert refused.returncode != 0
    assert "time stamps must increase" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_missing_values_are_filled_from_the_past():
    nan = float("nan")
    values = torch.tensor([[nan, 1.0], [2.0, nan], [nan, nan], [4.0, 3.0]])
    assert torch.equal(forward_filled(values), torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 1.0], [4.0, 3.0]]))
    assert torch.equal(forward_filled(values.expand(2, 4, 2))[1], forward_filled(values))


def test_baselines_accept_missing_values_and_a_season_longer_than_the_context(series):
    values = series.values.clone()
    values[50:60, 1] = float("nan")
    values[-30, 0] = float("nan")
    table = baselines(dataclasses.replace(series, values=values), 24, 60, [48])
    assert all(np.isfinite(list(errors.values())).all() for errors in table.values())


def _early() -> SeriesRecipe:
    """A recipe whose training ends before its last step."""
    return SeriesRecipe(
        name="early",
        data=SeriesData("synthetic", split=[400, 150, 150]),
        model={"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16, "loss": "mse"},
        training={
            "max_steps": 60,
            "learning_rate": 0.3,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
        },
        patience=3,
        baseline_lengths=[],
        evaluation=Evaluation("validation"),
    )


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A finished run of this recipe: its folder and its metrics."""
    folder = tmp_path_factory.mktemp("early") / "run"
    with pytest.MonkeyPatch.context() as patch:
        no_reload(patch)
        return folder, run(_early(), folder)


@pytest.mark.trains
def test_training_ends_early_and_keeps_the_best_checkpoint(early):
    folder, metrics = early
    log = json.loads((folder / "results.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == losses.index(min(losses)) + 1 + 3 < 30
    assert metrics["validation_loss"] == min(losses)
    assert metrics["validation_mse"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.trains
def test_a_stopped_run_resumes_and_a_finished_training_is_kept(early, tmp_path, monkeypatch):
    recipe, (whole, expected), folder = _early(), early, tmp_path / "broken"
    no_reload(monkeypatch)
    steps = []

    class Stopping(TrainerCallback):
        """Stops a run with an error, as a power failure would, while the patience of three is being
        counted."""

        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if len(steps) == stop_at:
                raise ValueError("no power")

    class Stopped(Trainer):
        def __init__(self, **options):
            super().__init__(**options)
            self.add_callback(Stopping())

    monkeypatch.setattr("modeling_uhop.training.trainers.Trainer", Stopped)
    stop_at = expected["last_step"]
    with pytest.raises(ValueError, match="no power"):
        run(recipe, folder)
    for broken in ("engine.write_results", "tasks.series.forecast_figure", "engine.check_reload"):
        steps.clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"modeling_uhop.training.{broken}", raising)
            with pytest.raises(ValueError, match="no luck"):
                run(recipe, folder, "resume")
        # The run was stopped in its last two steps, after a checkpoint; a finished run takes no
        # further step.
        assert steps == ([stop_at - 2, stop_at - 1] if broken == "engine.write_results" else [])
    metrics = run(recipe, folder, "resume")
    assert "train_seconds" not in metrics
    assert metrics == {name: value for name, value in expected.items() if name != "train_seconds"}
    first, second = ((each / "model.safetensors").read_bytes() for each in (whole, folder))
    assert first == second
    with pytest.raises(RecipeError, match="cannot be resumed with seed=5"):
        run(dataclasses.replace(recipe, seed=5), folder, "resume")


def raising(*arguments, **options):
    raise ValueError("no luck")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_run_on_a_file_finishes(tmp_path, suffix, monkeypatch):
    frame = synthetic_series(300)
    getattr(frame, f"to_{suffix}")(tmp_path / f"mine.{suffix}", index=False)
    content = {
        "task": "series",
        "data": {"dataset": str(tmp_path / f"mine.{suffix}"), "split": [180, 60, 60]},
        "model": {"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 64, "use_cpu": True},
        "baseline_lengths": [24],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    reloaded = no_reload(monkeypatch)
    cli.main(["train", str(tmp_path / "small.yaml"), "--output_dir", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["recipe"]["data"]["dataset"] == f"mine.{suffix}"
    assert results["series"]["names"] == [f"series_{index}" for index in range(4)]
    values = frame.drop(columns="date").to_numpy()
    np.testing.assert_allclose(results["series"]["mean"], values[:180].mean(0))
    scaled = torch.from_numpy(((values - values[:180].mean(0)) / values[:180].std(0)).astype(np.float32))
    model = STanHopForPrediction.from_pretrained(tmp_path / "out")
    windows = scaled.unfold(0, 30, 1)[240 - 24 :].movedim(-1, 1)
    with torch.no_grad():
        errors = model(past_values=windows[:, :24]).prediction_outputs - windows[:, 24:]
    assert len(windows) == 60 - 6 + 1
    assert results["metrics"]["test_mse"] == pytest.approx(errors.square().mean().item(), rel=1e-4)
    ((folder, pipeline, inputs, answers),) = reloaded
    assert (folder, pipeline) == (tmp_path / "out", None)
    np.testing.assert_allclose(inputs["past_values"][0], windows[0, :24], atol=1e-5)
    np.testing.assert_allclose(answers[0] - windows[0, 24:].numpy(), errors[0], atol=1e-4)
    assert (model.config.channel_names, model.config.frequency) == (results["series"]["names"], "h")
    forecast = model.forecast(frame[:294])
    expected = (windows[-1, 24:] + errors[-1]).numpy() * values[:180].std(0) + values[:180].mean(0)
    np.testing.assert_allclose(forecast, expected, rtol=1e-4, atol=1e-4)
    assert list(forecast.index) == list(frame["date"][294:])
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(name in card for name in ("forecast.png", "weights.png", f"{results['metrics']['test_mse']:.4f}"))
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in ("forecast.png", "weights.png"))


def _hours(start: str, zone: str) -> pd.DatetimeIndex:
    return pd.date_range(start, periods=8, freq="h", tz=zone)


DAYS = pd.date_range("2024-01-10", periods=6, freq="D")
SPRING, AUTUMN = _hours("2024-03-30 23:00", "Europe/Berlin"), _hours("2024-10-26 23:00", "Europe/Berlin")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (DAYS.strftime("%d/%m/%Y"), DAYS),
        (DAYS.strftime("%m/%d/%Y"), DAYS),
        (DAYS.strftime("%d.%m.%Y %H:%M"), DAYS),
        (DAYS.strftime("%Y/%m/%d %H:%M"), DAYS),
        (DAYS.strftime("%d %b %Y"), DAYS),
        (DAYS.strftime("%Y%m%d").astype(int), DAYS),
        (DAYS.strftime("%Y%m%d%H").astype(int), DAYS),
        (SPRING.tz_convert("UTC").strftime("%Y%m%d%H%M").astype(int), SPRING.tz_convert("UTC").tz_localize(None)),
        (pd.date_range("2024-11-01", periods=4, freq="MS").strftime("%Y%m").astype(int), pd.date_range("2024-11-01", periods=4, freq="MS")),
        (pd.period_range("2024-01-01", periods=3, freq="W").map(str), pd.DatetimeIndex(["2024-01-01", "2024-01-08", "2024-01-15"])),
        (["30-03-2024", "30-03-2024 12:00", "31-03-2024"], pd.DatetimeIndex(["2024-03-30", "2024-03-30 12:00", "2024-03-31"])),
        (SPRING.map(lambda stamp: str(stamp)[:-3]), SPRING.tz_convert("UTC")),
        (AUTUMN.strftime("%d-%m-%Y %H:%M %z"), AUTUMN.tz_convert("UTC")),
        (AUTUMN.strftime("%m/%d/%Y %I:%M %p%z"), AUTUMN.tz_convert("UTC")),
        (["01/01/2024", "02/02/2024"], pd.DatetimeIndex(["2024-01-01", "2024-02-02"])),
        (SPRING.map(str), SPRING.tz_convert("UTC")),
        (AUTUMN.map(str), AUTUMN.tz_convert("UTC")),
        (AUTUMN, AUTUMN),
        (SPRING.tz_convert("UTC").strftime("%Y-%m-%dT%H:%M:%SZ"), SPRING.tz_convert("UTC")),
        (pd.period_range("2024-01", periods=3, freq="M"), pd.DatetimeIndex(["2024-01-01", "2024-02-01", "2024-03-01"])),
        (np.array([1704067200000, 1704070800000]), pd.Index([1704067200000, 1704070800000])),
        (np.array([1704067200, 1704070800], np.uint64), pd.Index([1704067200, 1704070800])),
        (["1704067200", "1704070800"], pd.Index([1704067200, 1704070800])),
        ([date.date() for date in DAYS], DAYS),
        (pd.to_timedelta([1, 2], unit="h"), pd.to_timedelta([1, 2], unit="h")),
    ],
    ids=lambda value: str(value[0]),
)
@pytest.mark.parametrize("place", ["column", "index"])
def test_time_stamps_are_read_as_intended(given, expected, place):
    stamps = read_time_stamps(pd.Series(given), "column 'date'")
    assert list(stamps) == list(expected)
    values = np.arange(len(given)) * 1.0
    frame = pd.DataFrame({"a": values, "date": given}) if place == "column" else pd.DataFrame({"a": values}, index=pd.Index(given))
    assert list(take_time_stamps(frame, "date", "FILE").columns) == ["a"]
    backwards = frame.iloc[::-1]
    name = "column 'date'" if place == "column" else "the index"
    with pytest.raises(RecipeError, match=rf"row 1 of FILE does not come after the row before it: {name} of FILE has"):
        take_time_stamps(backwards, "date", "FILE")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["01/02/2024", "02/02/2024"], "row 0 of column 'date' of FILE: '01/02/2024' may begin with the day or with the month"),
        (["13/01/2024", "01/14/2024"], "row 1 of column 'date' of FILE: '01/14/2024' has the day where other rows have the month"),
        (["13/01/24", "14/01/24"], "row 0 .*'13/01/24' is not a date with a year of four digits"),
        (["2024-01-01", "13/01/2024"], "row 1 .*'13/01/2024' is not written like '2024-01-01' in row 0"),
        (["2024-01-01 00:00+01:00", "2024-01-01 05:00"], "row 1 .* one has an offset from UTC, the other has none"),
        (["2024-01-01", "2024-02-30"], "row 1 .*'2024-02-30' cannot be read as a date"),
        (["2024-01-01 00:00 CET", "2024-01-01 01:00 CET"], "row 0 .* cannot be read as a date; .* a time zone like"),
        (["a", "b"], "row 0 .*'a' is not a date"),
        (["2024-01-01", None], "row 1 of FILE has no time stamp in column 'date'"),
        (["2024-01-01", " "], "row 1 of FILE has no time stamp in column 'date'"),
        ([1704067200.0, np.nan], "row 1 of FILE has no time stamp in column 'date'"),
        ([1704067200.0, np.inf], "row 1 has an infinite time stamp in column 'date'"),
        ([True, False], "column 'date' of FILE has true and false"),
        (
            SPRING.strftime("%a %b %d %Y %H:%M:%S GMT%z (%Z)"),
            "column 'date' of FILE has several time zones .* write them as 2024-01-31 12:00",
        ),
        (
            ["2024-01-01", "2024-01-01"],
            "row 1 of FILE does not come after .* has 2024-01-01 and then 2024-01-01; if the time of day is in another column",
        ),
        (["2024-01-01 05:00", "2024-01-01 05:00"], "row 1 of FILE .* then 2024-01-01 05:00; sort"),
        (["2024-01-02", "2024-01-01"], "row 1 of FILE .* then 2024-01-01; sort"),
        (list(AUTUMN.tz_localize(None)) + list(pd.date_range("2024-10-27 07:00", periods=8, freq="h")), "row 4 .* daylight saving time"),
    ],
)
def test_ambiguous_time_stamps_are_refused_by_row(given, message):
    with pytest.raises(RecipeError, match=message):
        take_time_stamps(pd.DataFrame({"date": given, "a": 1.0}), "date", "FILE")


def test_a_column_that_increases_in_only_one_reading_is_read_that_way():
    dates = pd.Series(["12/01/2024", "11/02/2024", "12/03/2024"])
    assert list(read_time_stamps(dates, "")) == list(pd.to_datetime(["2024-01-12", "2024-02-11", "2024-03-12"]))
    dates = pd.Series(["01/12/2024", "02/11/2024", "03/12/2024"])
    assert list(read_time_stamps(dates, "")) == list(pd.to_datetime(["2024-01-12", "2024-02-11", "2024-03-12"]))


def test_a_skipped_hour_of_wall_clock_time_is_a_gap():
    frame = pd.DataFrame({"date": SPRING.tz_localize(None), "a": 1.0})
    with pytest.warns(UserWarning, match=r"gaps in its time stamps \(1, the first before row 3\)"):
        take_time_stamps(frame, "date", "FILE")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_index_of_time_stamps_is_checked_and_removed(tmp_path, suffix):
    frame = synthetic_series(300)
    values = frame.drop(columns="date").to_numpy()
    expected = (values - values[:210].mean(0)) / values[:210].std(0)
    path = tmp_path / f"a.{suffix}"
    indexed = frame.set_index("date")
    for given in (indexed, indexed.rename_axis(None), frame.drop(columns="date").set_axis(range(5, 305))):
        getattr(given, f"to_{suffix}")(path)
        series = load_series(SeriesData(str(path), split=[210, 30, 60]))
        assert series.names == [f"series_{index}" for index in range(4)]
        np.testing.assert_allclose(series.values, expected, atol=1e-5)
        for wrong in (given.iloc[::-1], given.sample(frac=1, random_state=0), pd.concat([given, given])):
            getattr(wrong, f"to_{suffix}")(path)
            with pytest.raises(RecipeError, match=r"time stamps must increase, and row \d+ of .*a\."):
                load_series(SeriesData(str(path), split=[210, 30, 60]))


def test_unsupported_columns_of_time_stamps_are_refused():
    values = pd.DataFrame({"a": [1.0, 2.0, 1.0, 2.0]})
    levels = values.set_index(pd.MultiIndex.from_product([["x", "y"], [1, 2]], names=["site", "hour"]))
    with pytest.raises(RecipeError, match=r"FILE has an index of 2 levels, \['site', 'hour'\]"):
        take_time_stamps(levels, "date", "FILE")
    with pytest.raises(RecipeError, match=r"FILE has no column 'when'; it has \['a'\]"):
        take_time_stamps(values, "when", "FILE")
    seconds = values.assign(timestamp=[1704067200, 1704070800, 1704074400, 1704078000])
    with pytest.raises(RecipeError, match=r"column 'timestamp' of FILE looks like time stamps; set data.date_column=timestamp"):
        take_time_stamps(seconds, "date", "FILE")
    assert list(take_time_stamps(seconds, "timestamp", "FILE").columns) == ["a"]
    for name in ("timestamp", "Unix", "open_time", "unix timestamp", "time_ms", "Date"):
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
            clock = values.assign(**{name: seconds["timestamp"].to_numpy()[order]})
            with pytest.raises(
                RecipeError, match=rf"column '{name}' of FILE looks like time stamps; set data.date_column={name}, or rename"
            ):
                take_time_stamps(clock, "date", "FILE")
            with pytest.raises(RecipeError, match=rf"column '{name}' of FILE looks like time stamps; remove it, or rename"):
                take_time_stamps(clock.assign(date=pd.date_range("2024-01-01", periods=4)), "date", "FILE")
    both = values.assign(date=pd.date_range("2024-01-01", periods=4)).set_index(pd.date_range("2024-01-04", periods=4)[::-1])
    with pytest.raises(RecipeError, match=r"row 1 of FILE .*the index of FILE has"):
        take_time_stamps(both, "date", "FILE")
    # If there is a column of stamps, row numbers in the index are not read as time stamps.
    numbered = values.assign(date=pd.date_range("2024-01-01", periods=4)).set_axis([0, 1, 0, 1])
    assert list(take_time_stamps(numbered, "date", "FILE").columns) == ["a"]


@pytest.mark.parametrize("stamped", [True, False])
def test_saved_row_numbers_are_not_a_series(tmp_path, stamped):
    frame = synthetic_series(300)
    frame = frame if stamped else frame.drop(columns="date")
    frame.to_csv(tmp_path / "a.csv")
    pd.read_csv(tmp_path / "a.csv").to_csv(tmp_path / "twice.csv")
    frame.reset_index().to_csv(tmp_path / "reset.csv", index=False)
    expected = load_series(SeriesData(str(tmp_path / "a.csv")))
    for file, name in (("twice", "Unnamed: 0.1"), ("reset", "index")):
        path = tmp_path / f"{file}.csv"
        with pytest.warns(UserWarning, match=rf"column '{name}' of .*{file}.csv has row numbers and is not used"):
            series = load_series(SeriesData(str(path)))
        assert series.names == expected.names
        assert torch.equal(series.values, expected.values)
        again = pd.read_csv(path)
        again.assign(**{name: again[name].to_numpy()[::-1]}).to_csv(path, index=False)
        with pytest.raises(RecipeError, match=rf"column '{name}' of .* looks like row numbers that do not increase"):
            load_series(SeriesData(str(path)))


def test_a_series_may_have_the_name_of_row_numbers():
    for prices in ([1.5, 2.5, 3.5], [7, 7, 8], [7.0, np.nan, 8.0]):
        assert list(take_time_stamps(pd.DataFrame({"index": prices}), "date", "FILE").columns) == ["index"]
