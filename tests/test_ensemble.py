"""Tests of ensembles: weights on the simplex against a search, errors, and a run's metrics."""

import itertools

import numpy as np
import pytest
import torch

from modeling_uhop.training.baselines.ensemble import Ensemble, simplex_weights
from modeling_uhop.training.baselines.series import Fitted, fit_baselines, repeat_last
from modeling_uhop.training.data.series import Series, SeriesData, load_series
from modeling_uhop.training.engine import run
from modeling_uhop.training.tasks.series import NETWORK, SeriesRecipe, ensemble_members
from tests.support.recipes import no_figures, no_reload


@pytest.fixture
def series() -> Series:
    return load_series(SeriesData("synthetic", split=[600, 200, 200]))


@pytest.mark.parametrize("seed", range(8))
def test_weights_have_the_lowest_error_on_the_simplex(seed):
    torch.manual_seed(seed)
    errors = torch.randn(3, 50, dtype=torch.float64) * torch.tensor([[1.0], [1.0], [3.0 if seed % 2 else 1.2]]) + 0.7 * torch.randn(50)
    products = errors @ errors.T
    weights = simplex_weights(products)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1.0)
    grid = [np.array([a, b, 100 - a - b]) / 100 for a, b in itertools.product(range(101), repeat=2) if a + b <= 100]
    lowest = min(point @ products.numpy() @ point for point in grid)
    assert (weights @ products @ weights).item() <= lowest + 1e-9


def test_a_member_that_does_not_help_has_no_weight_and_equal_members_share():
    good, bad = torch.randn(2, 400, dtype=torch.float64)
    errors = torch.stack([good, 2.0 * good, 3.0 * bad])
    weights = simplex_weights(errors @ errors.T)
    assert weights[1] == 0.0
    assert weights[0] > 0.8
    same = torch.stack([good, good])
    np.testing.assert_allclose(same.T.numpy() @ simplex_weights(same @ same.T).numpy(), good, atol=1e-9)


def test_an_ensemble_is_the_weighted_mean_of_its_members(series):
    baselines = fit_baselines(series, 6, 24, [24], 24)
    members = ensemble_members(baselines, series, 6)
    linear = {name: each.errors(series, "validation", 6)["mse"] for name, each in baselines.items() if "linear" in name}
    assert list(members) == [min(linear, key=lambda name: linear[name]), "memory of windows, 24"]
    series.values[850, 1] = series.values[700, 2] = torch.nan
    ensemble = Ensemble.fit(members, series, 6)
    assert ensemble.weights.min() > 0.0
    for split in ("validation", "test"):
        parts = [torch.cat([forecast for forecast, _ in each.forecasts(series, split, 6)]) for each in members.values()]
        future = torch.cat([future for _, future in next(iter(members.values())).forecasts(series, split, 6)])
        forecast = sum(weight * part for weight, part in zip(ensemble.weights.tolist(), parts, strict=True))
        found = (forecast - future)[~future.isnan()]
        errors = ensemble.errors(series, split, 6)
        assert errors["mse"] == pytest.approx(found.square().mean().item(), rel=1e-5)
        assert errors["mae"] == pytest.approx(found.abs().mean().item(), rel=1e-5)
    assert ensemble.errors(series, "validation", 6)["mse"] < min(each.errors(series, "validation", 6)["mse"] for each in members.values())


def test_test_windows_do_not_change_the_weights(series):
    members = {"last": Fitted(repeat_last(6), 24), "zero": Fitted(lambda past: 0.0 * past[:, :6], 24)}
    weights = Ensemble.fit(members, series, 6).weights
    series.values[800:] = 100.0
    assert torch.equal(Ensemble.fit(members, series, 6).weights, weights)


def test_a_run_reports_ensembles(tmp_path, monkeypatch, capsys):
    no_reload(monkeypatch)
    no_figures(monkeypatch)
    recipe = SeriesRecipe(
        name="ensemble",
        data=SeriesData("synthetic", split=[400, 150, 150]),
        model={"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16, "use_linear_skip": True},
        training={"max_steps": 30, "learning_rate": 3e-3, "use_cpu": True},
        baseline_lengths=[24],
        ensemble=True,
    )
    metrics = run(recipe, tmp_path / "run")
    weights = metrics["ensemble_weights"]
    assert next(iter(weights)) == NETWORK
    assert sum(weights.values()) == pytest.approx(1.0)
    assert metrics["ensemble_test_mse"] < metrics["test_mse"]
    assert set(metrics["baselines"]["ensemble of baselines"]) == {"test_mse", "test_mae"}
    assert f"ensemble with the network {metrics['ensemble_test_mse']:.4f}" in " ".join(capsys.readouterr().out.split())
