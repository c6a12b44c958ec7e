"""Tests of tables in the user's units: time stamps, columns, scaling, and a run's saved forecaster."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch

from modeling_uhop import STanHopConfig, STanHopForPrediction
from modeling_uhop.series_frame import frequency_of
from tests.conftest import assert_close


MEAN, STD = [10.0, -200.0, 0.5], [2.0, 30.0, 0.5]
SIZES = {"num_input_channels": 3, "context_length": 8, "prediction_length": 4, "patch_length": 4, "d_model": 8, "ffn_dim": 8}
UNITS = {"channel_names": ["load", "water", "price"], "mean": MEAN, "std": STD}


def _model(**fields) -> STanHopForPrediction:
    return STanHopForPrediction(STanHopConfig(**{**SIZES, **UNITS, "use_linear_skip": True, **fields})).eval()


def _frame(rows: int = 12, freq: str = "h", start: str = "2024-02-28 18:00") -> pd.DataFrame:
    values = np.random.default_rng(0).standard_normal((rows, 3)) * STD + MEAN
    return pd.DataFrame(values, columns=UNITS["channel_names"], index=pd.date_range(start, periods=rows, freq=freq))


def test_a_table_is_forecast_in_its_units():
    model, frame = _model(), _frame()
    forecast = model.forecast(frame)
    scaled = (frame.to_numpy()[-8:] - MEAN) / STD
    expected = model.generate(torch.from_numpy(scaled).unsqueeze(0)).sequences[0, 0].numpy() * STD + MEAN
    np.testing.assert_allclose(forecast.to_numpy(), expected, rtol=1e-12)
    assert list(forecast.columns) == ["load", "water", "price"]
    assert list(forecast.index) == list(pd.date_range("2024-02-29 06:00", periods=4, freq="h"))
    # The order of columns and other columns do not matter, and the dates may be in a column.
    other = frame.assign(text="a")[["price", "text", "load", "water"]]
    for given in (other, other.reset_index(names="date"), other.reset_index(names="when"), other.set_axis(other.index.to_period())):
        pd.testing.assert_frame_equal(model.forecast(given), forecast, check_freq=False, check_names=False)
    text = other.reset_index(names="date").astype({"date": str})
    pd.testing.assert_frame_equal(model.forecast(text), forecast, check_freq=False, check_names=False)
    assert model.forecast(text).index.name == "date"


def test_without_units_values_are_taken_as_they_are():
    model, frame = _model(channel_names=None, mean=None, std=None), _frame()
    expected = model.generate(torch.tensor(frame.to_numpy()[-8:]).unsqueeze(0)).sequences[0, 0]
    assert_close(torch.tensor(model.forecast(frame).to_numpy()), expected)
    shifted = _model(mean=None)
    shifted.load_state_dict(model.state_dict())
    assert_close(torch.tensor(shifted.forecast(frame).to_numpy()), expected, dtype=torch.float32, scale=100)


def test_units_may_be_set_on_a_model_and_are_saved(tmp_path):
    model, frame = _model(channel_names=None, mean=None, std=None), _frame()
    for name, value in UNITS.items():
        setattr(model.config, name, value)
    model.config.frequency = "h"
    model.save_pretrained(tmp_path)
    loaded = STanHopForPrediction.from_pretrained(tmp_path)
    assert (loaded.config.mean, loaded.config.frequency) == (MEAN, "h")
    pd.testing.assert_frame_equal(loaded.forecast(frame), model.forecast(frame))


@pytest.mark.parametrize(
    ("freq", "start", "following"),
    [
        ("MS", "2023-01-01", "2024-01-01"),
        ("15min", "2024-01-01", "2024-01-01 03:00"),
        ("W-SUN", "2024-01-07", "2024-03-31"),
        ("D", "2024-02-17", "2024-02-29"),
    ],
)
def test_time_stamps_follow(freq, start, following):
    frame = _frame(12, freq, start)
    for fields in ({}, {"frequency": freq}):
        forecast = _model(**fields).forecast(frame)
        assert list(forecast.index) == list(pd.date_range(following, periods=4, freq=freq))


def test_a_missing_value_is_nan():
    model, frame = _model(), _frame()
    frame.iloc[-3, 1] = np.nan
    scaled = torch.from_numpy((frame.to_numpy()[-8:] - MEAN) / STD).unsqueeze(0)
    expected = model.generate(scaled).sequences[0, 0].numpy() * STD + MEAN
    np.testing.assert_allclose(model.forecast(frame).to_numpy(), expected, rtol=1e-12)
    assert np.isfinite(expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda frame: frame.drop(columns="water"),
            r"the columns \['water'\] are missing; the model takes the columns \['load', ",
        ),
        (lambda frame: frame.iloc[-7:], "forecast needs at least context_length=8 rows, got 7"),
        (lambda frame: frame.astype({"price": str}), "columns must be numbers, but column 'price' has dtype"),
        (lambda frame: frame.reset_index(drop=True), "forecast needs time stamps: a DatetimeIndex, .* got a RangeIndex and the columns"),
        (lambda frame: frame.reset_index(drop=True).assign(date="soon"), "column 'date' has entries that are not dates"),
        (lambda frame: frame.iloc[::-1], "time stamps must be present and increase"),
        (lambda frame: frame.drop(index=frame.index[-3]), "of 'h' apart, but 2024-02-29 03:00:00 is missing; add the row"),
        (
            lambda frame: frame.set_axis(frame.index[0] + pd.to_timedelta(np.arange(12) ** 1.5, unit="h")),
            "a frequency that pandas can infer",
        ),
        (lambda frame: pd.concat([frame, frame["load"]], axis=1), r"several columns with the names \['load'\]"),
    ],
)
def test_a_table_that_cannot_be_forecast_is_refused(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        _model().forecast(change(_frame()))
    assert "\n" not in str(caught.value)


def test_other_steps_than_those_of_the_training_are_refused():
    with pytest.raises(ValueError, match=r"rows must be one step of 'h' apart, .* got steps of '15min'"):
        _model(frequency="h").forecast(_frame(freq="15min"))
    assert len(_model(frequency="60min").forecast(_frame())) == 4


def test_other_numbers_of_columns_are_refused():
    with pytest.raises(ValueError, match=r"num_input_channels=3 series without names .* has the 2 columns \['load', 'water'\]"):
        _model(channel_names=None).forecast(_frame().drop(columns="price"))


def test_only_tables_are_accepted():
    with pytest.raises(TypeError, match=r"forecast takes a pandas DataFrame, got numpy\.ndarray"):
        _model().forecast(_frame().to_numpy())


def test_a_missing_pandas_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="tables need pandas, which is not installed: pip install pandas"):
        _model().forecast(None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channel_names": ["a", "b"]}, "channel_names must have num_input_channels=3 entries, got 2"),
        ({"channel_names": ["a", "b", "a"]}, "channel_names must differ"),
        ({"mean": [0.0, 1.0, float("nan")]}, "mean must be finite"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be positive and finite"),
    ],
)
def test_units_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        STanHopConfig(**{**SIZES, **fields})


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        (pd.date_range("2024-01-01", periods=9, freq="h"), "h"),
        (pd.date_range("2024-01-01", periods=9, freq="h").delete([3, 4]), "h"),
        (pd.date_range("2024-01-01", periods=9, freq="D").delete(5), "D"),
        (pd.date_range("2024-01-01", periods=9, freq="W-TUE").delete(5), "W-TUE"),
        (pd.date_range("2024-01-01", periods=9, freq="MS"), "MS"),
        (pd.DatetimeIndex(["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04 06:00"]), None),
        (pd.date_range("2024-01-01", periods=2, freq="h"), None),
    ],
)
def test_frequencies_are_found(stamps, expected):
    assert frequency_of(stamps) == expected
