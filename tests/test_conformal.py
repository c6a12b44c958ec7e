"""Tests of conformal intervals: quantiles against loops, equal weights, coverage, and a run's metrics."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from modeling_uhop import STanHopConfig, STanHopForPrediction
from modeling_uhop.conformal import ConformalIntervals, weighted_quantile
from modeling_uhop.training.data.series import SeriesData, load_series
from modeling_uhop.training.engine import run
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.forecast_intervals import BETAS, best_beta, forecasts, half_widths, interval_metrics, measured
from modeling_uhop.training.recipe import Evaluation
from modeling_uhop.training.tasks.series import SeriesRecipe, fitted, units
from tests import reference
from tests.conftest import assert_close
from tests.support.recipes import no_figures, no_reload


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("count", [1, 4, 9, 19, 60])
def test_quantiles_equal_the_loops(level, count):
    errors = torch.rand(count, dtype=torch.float64).round(decimals=1)
    weights = torch.rand(5, count, dtype=torch.float64).softmax(-1)
    expected = [reference.conformal_quantile(errors.tolist(), row.tolist(), level) for row in weights]
    assert weighted_quantile(errors, weights, level).tolist() == expected


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("count", [3, 4, 18, 19, 20, 99, 360, 2785])
def test_equal_weights_give_split_conformal_intervals(level, count):
    """The half width is the ceil((N + 1) level)-th smallest absolute error."""
    errors = torch.randn(count, 3, 2)
    # Because (N + 1) level is rounded, such as 19.000000000000004 for 95 % of 20, we round it first.
    rank = math.ceil(round((count + 1) * level, 9))
    expected = errors.abs().sort(0).values[rank - 1] if rank <= count else torch.full((3, 2), torch.inf)
    assert torch.equal(ConformalIntervals(errors).half_widths(level)[0], expected)
    # Codes that do not differ give equal weights.
    same = ConformalIntervals(errors, torch.ones(2, count, 4), beta=3.0).half_widths(level, torch.randn(2, 5, 4))
    assert torch.equal(same, expected.expand(5, 3, 2))


@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_hopfield_intervals_equal_the_loops(alpha):
    errors = torch.randn(12, 2, 3, dtype=torch.float64)
    past, new = torch.randn(3, 12, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    found = ConformalIntervals(errors, past, beta=2.5, alpha=alpha).half_widths(0.8, new)
    for channel in range(3):
        keys = past[channel].numpy()
        for window, query in enumerate(new[channel].numpy()):
            scores = [2.5 * (query @ key) / (np.linalg.norm(query) * np.linalg.norm(key)) for key in keys]
            weights = reference.entmax(scores, alpha)
            for step in range(2):
                expected = reference.conformal_quantile(errors[:, step, channel].abs().tolist(), weights, 0.8)
                assert found[window, step, channel].item() == expected


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_coverage_of_exchangeable_values_is_the_level(level):
    """Given 999 calibration errors, the coverage of new values varies as Beta(rank, 1000 - rank).

    One new value per calibration set makes the values independent, so their number is binomial. With
    weights that do not depend on the errors, the coverage is the level too.
    """
    trials, count = 4000, 999
    errors = torch.randn(count + 1, trials, 1).exp()
    # (N + 1) level is whole, so the coverage is exactly the level.
    half = ConformalIntervals(errors[:-1]).half_widths(level)[0]
    covered = int((errors[-1].abs() <= half).sum())
    low, high = binom.interval(0.9999, trials, level)
    assert low <= covered <= high


def test_windows_with_the_error_size_of_their_code_get_narrower_intervals():
    """Errors are ten times larger with one code than with the other. Hopfield intervals know it."""
    large = torch.rand(1600) < 0.5
    errors = (torch.randn(1600) * torch.where(large, 10.0, 1.0)).reshape(-1, 1, 1)
    codes = torch.stack([large.float(), 1.0 - large.float()], -1).unsqueeze(0)
    past, new = slice(0, 800), slice(800, None)
    plain = measured(errors[new], ConformalIntervals(errors[past]).half_widths(0.8), 0.8)
    hopfield = ConformalIntervals(errors[past], codes[:, past], beta=20.0).half_widths(0.8, codes[:, new])
    found = measured(errors[new], hopfield, 0.8)
    low, high = (share / 800 for share in binom.interval(0.9999, 800, 0.8))
    assert low - 0.05 < found["coverage"] < high + 0.05
    assert found["width"] < 0.9 * plain["width"]
    assert found["score"] < plain["score"]
    assert hopfield[large[new]].mean() > 5 * hopfield[~large[new]].mean()


def test_errors_that_are_not_known_do_not_count():
    errors, weights = torch.rand(9, dtype=torch.float64), torch.rand(3, 9, dtype=torch.float64).softmax(-1)
    errors[[2, 5]] = torch.nan
    kept = [0, 1, 3, 4, 6, 7, 8]
    rows = weights[:, kept] / weights[:, kept].sum(-1, keepdim=True)
    expected = [reference.conformal_quantile(errors[kept].tolist(), row.tolist(), 0.8) for row in rows]
    assert weighted_quantile(errors, weights, 0.8).tolist() == expected
    assert weighted_quantile(torch.full((4,), torch.nan), torch.ones(2, 4), 0.8).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConformalIntervals(torch.zeros(0, 2, 3)), r"errors must have shape \(N, H, C\) with at least one window, got \(0, 2, 3\)"),
        (lambda: ConformalIntervals(torch.zeros(4, 2, 3), torch.zeros(4, 3, 5)), r"\(C=3, N=4, D\), got \(4, 3, 5\)"),
        (
            lambda: ConformalIntervals(torch.zeros(4, 2, 3), torch.full((3, 4, 5), math.nan)),
            "codes of past windows must be finite, got 60 values that are not",
        ),
        (
            lambda: ConformalIntervals(torch.zeros(4, 2, 3), torch.ones(3, 4, 5)).half_widths(0.8, torch.full((3, 1, 5), math.inf)),
            "codes of new windows must be finite, got 15 values that are not",
        ),
        (lambda: ConformalIntervals(torch.zeros(4, 2, 3)).half_widths(1.0), r"level must lie in \(0, 1\), got 1.0"),
        (lambda: ConformalIntervals(torch.zeros(4, 2, 3)).half_widths(0.8, torch.zeros(3, 1, 5)), "new windows need codes if"),
        (lambda: ConformalIntervals(torch.zeros(4, 2, 3), torch.zeros(3, 4, 5)).half_widths(0.8), "new windows need codes if"),
    ],
)
def test_bad_calls_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_measures_are_means_over_observed_values():
    errors = torch.tensor([[[1.0, -3.0]], [[torch.nan, 0.5]]])
    found = measured(errors, torch.tensor([[[2.0, 1.0]]]), 0.8)
    assert found["coverage"] == pytest.approx(2 / 3)
    assert found["width"] == pytest.approx((4.0 + 2.0 + 2.0) / 3)
    assert found["score"] == pytest.approx((4.0 + 2.0 + 10.0 * 2.0 + 2.0) / 3)


def test_the_metrics_of_a_forecaster():
    series = load_series(SeriesData("synthetic", split=[600, 200, 200]))
    sizes = {"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16, "cycle_length": 24}
    model = STanHopForPrediction(STanHopConfig(**units(series), **sizes)).eval()
    metrics = interval_metrics(model, series, "test", 2)
    past, new = forecasts(model, series, "validation", 2), forecasts(model, series, "test", 1)
    assert (past.errors.shape, new.errors.shape) == ((98, 6, 4), (195, 6, 4))
    assert new.errors.square().mean().item() == pytest.approx(fitted(model).errors(series, "test", 6)["mse"], rel=1e-5)
    window = series.windows("test", 24, 6, 24)[7]
    states = model.model(window["past_values"].unsqueeze(0), cycle_index=window["cycle_index"].unsqueeze(0)).last_hidden_state
    assert_close(new.codes[:, 7], states[0].mean(1))
    rank = math.ceil(99 * 0.95)
    half = past.errors.abs().sort(0).values[rank - 1]
    assert metrics["split_coverage_95"] == pytest.approx((new.errors.abs() <= half).double().mean().item())
    assert metrics["split_width_95"] == pytest.approx(2 * half.mean().item(), rel=1e-5)
    assert [metrics[f"hopfield_beta_{level}"] for level in (80, 95)] == [best_beta(past, level, 3) for level in (0.8, 0.95)]
    chosen = half_widths(past, new, 0.8, metrics["hopfield_beta_80"])
    assert metrics["hopfield_coverage_80"] == pytest.approx((new.errors.abs() <= chosen).double().mean().item())
    assert set(metrics) == {"hopfield_beta_80", "hopfield_beta_95"} | {
        f"{kind}_{name}_{level}" for kind in ("split", "hopfield") for name in ("coverage", "width", "score") for level in (80, 95)
    }


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_beta_is_chosen_on_validation_windows(level):
    """It has the lowest score where the earlier half calibrates the later half, without those between."""
    series = load_series(SeriesData("synthetic", split=[600, 200, 200]))
    sizes = {"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16}
    past = forecasts(STanHopForPrediction(STanHopConfig(**units(series), **sizes)).eval(), series, "validation", 2)
    earlier, later = past.part(0, 49 - 3), past.part(49, 98)

    scores = {beta: measured(later.errors, half_widths(earlier, later, level, beta), level)["score"] for beta in BETAS}
    assert scores[best_beta(past, level, 3)] == min(scores.values())
    assert len(set(scores.values())) > 1


def _recipe(**fields) -> SeriesRecipe:
    content = {
        "name": "intervals",
        "data": SeriesData("synthetic", split=[400, 150, 150], validation_stride=2),
        "model": {"context_length": 24, "prediction_length": 6, "d_model": 16, "ffn_dim": 16},
        "training": {"max_steps": 2, "use_cpu": True},
        "baseline_lengths": [],
        "intervals": True,
    }
    return SeriesRecipe(**{**content, **fields})


def test_a_run_reports_intervals(tmp_path, monkeypatch, capsys):
    no_reload(monkeypatch)
    no_figures(monkeypatch)
    metrics = run(_recipe(), tmp_path / "run")
    assert 0.0 < metrics["test_hopfield_coverage_80"] < metrics["test_hopfield_coverage_95"] <= 1.0
    line = f"split intervals at 95 %: coverage {metrics['test_split_coverage_95']:.3f}, width {metrics['test_split_width_95']:.3f}"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluation": Evaluation("validation")}, "intervals=true needs evaluation.split='test'"),
        ({"data": SeriesData("synthetic", split=[400, 40, 150])}, "intervals=true needs at least 40 validation windows, got 35"),
        ({"intervals": False, "ensemble": True}, "ensemble=true needs baselines to combine, but baseline_lengths is empty"),
    ],
)
def test_recipes_without_what_they_need_are_refused(fields, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        run(_recipe(**fields), tmp_path / "run")
