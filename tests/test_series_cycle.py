"""Tests of the learned cycle: values and gradients against loops, positions, starts, and a run."""

import numpy as np
import pandas as pd
import pytest
import torch

from modeling_uhop import STanHopConfig, STanHopForPrediction, STanHopModel
from modeling_uhop.series_frame import step_numbers
from modeling_uhop.training.baselines.series import Fitted, cycle_map, mean_cycle
from modeling_uhop.training.data.series import SeriesData, load_series, synthetic_series
from modeling_uhop.training.engine import run
from modeling_uhop.training.tasks.series import SeriesRecipe, fitted, init_as_cycle_map, units
from tests import reference
from tests.conftest import assert_close
from tests.support.recipes import no_reload


SIZES = {"num_input_channels": 2, "context_length": 9, "prediction_length": 5, "patch_length": 3, "d_model": 8, "ffn_dim": 8}
INDEX = torch.tensor([2, 0, 6])


def _pair(**fields) -> tuple[STanHopForPrediction, STanHopForPrediction]:
    """A model with a cycle of 4 steps, and the same model without it."""
    given = {**SIZES, "use_linear_skip": True, **fields}
    model, plain = (STanHopForPrediction(STanHopConfig(**given, cycle_length=length)).double().eval() for length in (4, None))
    torch.nn.init.normal_(model.linear_skip.weight)
    weights = {name: value for name, value in model.state_dict().items() if name != "model.cycle.table"}
    plain.load_state_dict(weights)
    torch.nn.init.normal_(model.model.cycle.table)
    return model, plain


def _past() -> torch.Tensor:
    return torch.randn(3, 9, 2, dtype=torch.float64)


def test_a_cycle_equals_the_loops():
    model, plain = _pair(scaling=None)
    past, table = _past(), model.model.cycle.table
    residual = np.stack([reference.cycle_residual(x.numpy(), table.tolist(), i, 0, -1) for x, i in zip(past, INDEX.tolist(), strict=True)])
    inner = torch.from_numpy(residual).requires_grad_()
    outer = plain(inner).prediction_outputs
    expected = [reference.cycle_residual(y.tolist(), table.tolist(), i, 9, 1) for y, i in zip(outer, INDEX.tolist(), strict=True)]
    outputs = model(past, cycle_index=INDEX)
    assert_close(outputs.prediction_outputs, np.stack(expected))
    assert_close(model.generate(past, cycle_index=INDEX).sequences[:, 0], np.stack(expected))
    slopes = torch.randn_like(outer)
    (outputs.prediction_outputs * slopes).sum().backward()
    (outer * slopes).sum().backward()
    assert_close(table.grad, reference.cycle_gradient(inner.grad.numpy(), slopes.numpy(), table.detach().numpy(), INDEX.tolist()))


@pytest.mark.parametrize("scaling", ["std", "mean"])
def test_a_cycle_is_in_the_units_of_the_scaled_window(scaling):
    model, plain = _pair(scaling=scaling)
    unscaled = STanHopForPrediction(STanHopConfig(**SIZES, use_linear_skip=True, scaling=None)).double().eval()
    unscaled.load_state_dict(plain.state_dict())
    past = _past()
    window = plain.model.scaled(past, None)
    cycle = model.model.cycle(INDEX, 0, 14)
    expected = window.in_units(unscaled(window.values - cycle[:, :9]).prediction_outputs + cycle[:, 9:])
    assert_close(model(past, cycle_index=INDEX).prediction_outputs, expected)


def test_positions_count_modulo_the_cycle():
    model, _ = _pair()
    past = _past()
    expected = model(past, cycle_index=INDEX).prediction_outputs
    for same in (INDEX + 8, INDEX - 4, INDEX.int()):
        assert torch.equal(model(past, cycle_index=same).prediction_outputs, expected)
    assert not torch.allclose(model(past, cycle_index=INDEX + 1).prediction_outputs, expected)


def test_a_new_cycle_is_zero_and_unobserved_values_have_no_influence():
    model, plain = _pair()
    past = _past()
    past[0, 3, 1] = torch.nan
    expected = model(past, cycle_index=INDEX)
    mask = past.isfinite()
    assert torch.equal(model(past.nan_to_num(7.0), mask, cycle_index=INDEX).prediction_outputs, expected.prediction_outputs)
    with torch.no_grad():
        model.model.cycle.table.zero_()
    assert torch.equal(model(past, cycle_index=INDEX).prediction_outputs, plain(past).prediction_outputs)
    assert not STanHopForPrediction(STanHopConfig(**SIZES, cycle_length=4)).model.cycle.table.any()


@pytest.mark.parametrize("index", [None, torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3, 1, dtype=torch.long)])
def test_positions_that_are_missing_or_wrong_are_refused(index):
    model, plain = _pair()
    with pytest.raises(ValueError, match=r"cycle_index must be B=3 integers, .* in the cycle of 4 steps, got"):
        model(_past(), cycle_index=index)
    if index is not None:
        with pytest.raises(ValueError, match="cycle_index is given, but the model has no cycle"):
            plain(_past(), cycle_index=index)
    with pytest.raises(TypeError, match=r"cycle_index must be a torch.Tensor"):
        model(_past(), cycle_index=[0, 1, 2])


def test_a_cycle_with_stored_windows_in_the_model_is_refused():
    with pytest.raises(ValueError, match="cycle_length=4 needs memory_type=None, got 'plug'"):
        STanHopConfig(**SIZES, cycle_length=4, memory_type="plug")
    with pytest.raises(ValueError, match="cycle_length must be at least 1, or None for no cycle, got 0"):
        STanHopConfig(**SIZES, cycle_length=0)


def test_a_cycle_is_saved(tmp_path):
    model, _ = _pair()
    model.save_pretrained(tmp_path)
    loaded = STanHopForPrediction.from_pretrained(tmp_path, dtype=torch.float64)
    past = _past()
    assert torch.equal(loaded(past, cycle_index=INDEX).prediction_outputs, model(past, cycle_index=INDEX).prediction_outputs)
    base = STanHopModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(base(past, cycle_index=INDEX).last_hidden_state, model.model(past, cycle_index=INDEX).last_hidden_state)


@pytest.mark.parametrize(
    ("freq", "expected"),
    [("h", 24 * 366), ("15min", 96 * 366), ("D", 366), ("MS", 12), ("ME", 12), ("QS", 4), ("W-SUN", 52), ("2h", 12 * 366), ("B", 262)],
)
def test_steps_are_counted(freq, expected):
    stamps = pd.date_range("2024-01-01", "2025-02-01", freq=freq)
    steps = step_numbers(stamps, freq)
    assert (np.diff(steps) == 1).all()
    later = stamps >= "2025-01-01"
    assert np.flatnonzero(later)[0] == expected
    assert step_numbers(stamps[later], freq)[0] - steps[0] == expected


def test_stamps_with_a_zone_are_counted_in_utc():
    stamps = pd.date_range("2024-03-30", periods=60, freq="h", tz="Europe/Berlin")
    assert (np.diff(step_numbers(stamps, "h")) == 1).all()
    assert (step_numbers(stamps, "h") == step_numbers(stamps.tz_convert("UTC").tz_localize(None), "h")).all()


def _file(folder, gap: bool) -> tuple[str, pd.DataFrame]:
    frame = synthetic_series(300).iloc[3:]
    if gap:
        frame = frame.drop(index=range(50, 57))
    frame.to_csv(folder / "a.csv", index=False)
    return str(folder / "a.csv"), frame


@pytest.mark.filterwarnings("ignore:.*gaps in its time stamps")
@pytest.mark.parametrize("gap", [False, True])
def test_a_table_has_the_positions_of_the_training(tmp_path, gap):
    path, frame = _file(tmp_path, gap)
    series = load_series(SeriesData(path))
    model = STanHopForPrediction(STanHopConfig(**{**SIZES, **units(series)}, cycle_length=24)).eval()
    torch.nn.init.normal_(model.model.cycle.table)
    windows = series.windows("test", 9, 5, 24)
    first = len(frame) - 5 - 9
    last = windows[len(windows) - 1]
    assert last["cycle_index"] == frame["date"].iloc[first].hour
    expected = fitted(model).forecaster(last["past_values"].unsqueeze(0), cycle_index=last["cycle_index"].unsqueeze(0))[0]
    forecast = model.forecast(frame.iloc[: first + 9])
    np.testing.assert_allclose((forecast - series.mean) / series.std, expected, rtol=1e-4, atol=1e-5)
    model.config.frequency = None
    with pytest.raises(ValueError, match=r"a model with a cycle needs config.frequency, .* got None"):
        model.forecast(frame.iloc[: first + 9])


def test_rows_without_dates_are_counted(tmp_path):
    synthetic_series(300).drop(columns="date").to_csv(tmp_path / "a.csv", index=False)
    series = load_series(SeriesData(str(tmp_path / "a.csv")))
    assert series.frequency is None
    assert [series.windows("test", 9, 5, 7)[index]["cycle_index"].item() for index in (0, 1)] == [(240 - 9) % 7, (241 - 9) % 7]
    assert "cycle_index" not in series.windows("test", 9, 5)[0]


def test_the_mean_cycle_is_that_of_the_training_rows():
    series = load_series(SeriesData("synthetic", split=[600, 200, 200]))
    series.values[7, 1] = torch.nan
    hours = synthetic_series()["date"].dt.hour[:600]
    expected = pd.DataFrame(series.values[:600].numpy()).groupby(hours.to_numpy()).mean()
    np.testing.assert_allclose(mean_cycle(series, 24), expected, atol=1e-5)


@pytest.mark.parametrize("last_value", [False, True])
def test_a_linear_map_after_a_cycle(last_value):
    """It forecasts what remains of the series, and the model can begin with it."""
    series = load_series(SeriesData("synthetic", split=[600, 200, 200]))
    start = cycle_map(series, 9, 5, 24, last_value=last_value)
    windows = series.windows("test", 9, 5, 24)
    for index in (0, 17):
        window = windows[index]
        positions = np.arange(800 + index - 9, 800 + index + 5) % 24
        cycle = start.cycle[positions]
        expected = start.remainder((window["past_values"] - cycle[:9]).unsqueeze(0))[0] + cycle[9:]
        assert_close(start(window["past_values"].unsqueeze(0), window["cycle_index"].unsqueeze(0))[0], expected)
    if not last_value:
        config = STanHopConfig(**{**SIZES, **units(series)}, cycle_length=24, use_linear_skip=True, scaling=None)
        model = STanHopForPrediction(config).eval()
        init_as_cycle_map(model, start)
        first, second = (each.errors(series, "test", 5)["mse"] for each in (fitted(model), Fitted(start, 9, 24)))
        assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.trains
def test_a_run_with_a_cycle(tmp_path, monkeypatch):
    recipe = SeriesRecipe(
        name="cycle",
        data=SeriesData("synthetic", split=[400, 150, 150]),
        model={**SIZES, "cycle_length": 24, "use_linear_skip": True, "scaling": None},
        separation={"schedule": "train_begin", "steps": 2, "batch_size": 4, "parameters": "feature_maps"},
        training={"max_steps": 4, "learning_rate": 0.0},
        baseline_lengths=[9],
        skip_start="ridge",
    )
    reloaded = no_reload(monkeypatch)
    metrics = run(recipe, tmp_path / "run")
    assert metrics["test_mse"] == pytest.approx(metrics["baselines"]["linear after a cycle of 24, 9"]["test_mse"], rel=1e-5)
    assert metrics["baselines"]["linear after a cycle of 24, 9"]["test_mse"] < metrics["baselines"]["linear, 9"]["test_mse"]
    ((_, _, inputs, _),) = reloaded
    assert set(inputs) == {"past_values", "cycle_index"}
    recipe.training["learning_rate"] = 0.01
    run(recipe, tmp_path / "moved")
    first, second = (STanHopForPrediction.from_pretrained(tmp_path / name).model.cycle.table for name in ("run", "moved"))
    assert (first != second).all()
