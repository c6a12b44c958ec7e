"""What figures draw: values, intervals, and one style for each method."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from modeling_uhop.training.intervals import spread
from modeling_uhop.training.report.comparison_figures import curves_figure, differences_figure, paired_figure, samples_figure
from modeling_uhop.training.report.figures import forecast_figure, retrieval_figure
from modeling_uhop.training.report.geometry_figures import FIGURES
from modeling_uhop.training.report.styles import BASELINES, METHODS, label_of, method_of, most_telling, styles_of
from modeling_uhop.training.results import read_result


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
COMPARED = {"recipe": {"data": {"dataset": "digits"}}}


@pytest.fixture
def drawn(monkeypatch):
    """Axes of the figure that was drawn last, which stays open."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield lambda: plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")


def test_methods_differ_in_colour_and_marker():
    assert len({style.color for style in METHODS.values()}) == len({style.marker for style in METHODS.values()}) == len(METHODS)
    assert {style.color for style in BASELINES.values()}.isdisjoint(style.color for style in METHODS.values())


def test_every_variant_of_the_results_has_the_style_of_its_method():
    expected = {
        "no Phi": "no Phi",
        "Hopfield, no Phi": "no Phi",
        "sparse": "no Phi",
        "untrained Phi, 3 more epochs": "untrained Phi",
        "Phi without separation": "untrained Phi",
        "sparse, untrained Phi": "untrained Phi",
        "separation": "U-Hop",
        "before each step": "U-Hop",
        "dense, U-Hop": "U-Hop",
        "dense, U-Hop+": "U-Hop+",
        "all below before training, noise-aware": "denoising",
        "transformers' ViT": "ViT of transformers",
        "set kernel, SVM": "set kernel, SVM",
    }
    assert {variant: method_of(variant) for variant in expected} == expected
    assert label_of("separation") == "U-Hop: separation"
    assert label_of("dense, U-Hop+") == "dense, U-Hop+"
    styles = styles_of(["untrained Phi", "no Phi", "untrained Phi, 3 more epochs"])
    assert [(style.color, style.linestyle) for style in styles.values()] == [("#E69F00", "-"), ("#666666", "-"), ("#E69F00", "--")]


def test_a_panel_has_the_first_variant_of_each_method_and_at_most_six():
    ways = list(read_result(RESULTS / "vit_cifar10_small_ways.json", "seeds")["variants"])
    chosen = most_telling(ways)
    assert len(chosen) == 6
    assert {"untrained Phi", "all below before training", "no Phi", "noise-aware"} <= set(chosen)
    assert chosen == [way for way in ways if way in chosen]


def test_curves_are_means_with_a_band_over_seeds(tmp_path, drawn):
    losses = {"no Phi": [[3.0, 1.0], [5.0, 3.0]], "separated": [[2.0, 1.0], [2.0, 2.0]]}
    variants = {name: {"curves": {"eval_train_loss": {"epoch": [1.0, 2.0], "values": values}}} for name, values in losses.items()}
    curves_figure(tmp_path / "curves.png", {**COMPARED, "sweep": {"curves": ["eval_train_loss"], "overrides": []}, "variants": variants})
    (axis,) = drawn()
    assert (axis.get_title(), axis.get_ylabel()) == ("training", "cross-entropy (nats)")
    lines = [(line.get_label(), line.get_color(), line.get_ydata().tolist()) for line in axis.lines]
    assert lines == [("no Phi", "#666666", [4.0, 2.0]), ("U-Hop: separated", "#0072B2", [2.0, 1.5])]
    bounds = axis.collections[0].get_paths()[0].get_extents()
    assert (bounds.y0, bounds.y1) == (1.0, 5.0)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_numbers_of_images_stand_in_rows_of_panels(tmp_path, drawn):
    curve = {"eval_train_loss": {"epoch": [1.0], "values": [[1.0]]}, "eval_train_accuracy": {"epoch": [1.0], "values": [[0.5]]}}
    names = ["1,000 images: no Phi", "1,000 images: untrained Phi", "2,000 images: no Phi", "2,000 images: untrained Phi"]
    variants = {name: {"curves": curve} for name in names}
    curves_figure(tmp_path / "c.png", {**COMPARED, "sweep": {"curves": list(curve), "overrides": []}, "variants": variants})
    titles = [axis.get_title() for axis in drawn()]
    assert titles == ["1,000 images: training"] * 2 + ["2,000 images: training"] * 2
    assert [line.get_label() for line in drawn()[3].lines] == ["no Phi", "untrained Phi"]


def test_samples_are_drawn_by_their_number(tmp_path, drawn):
    def result(variants):
        cells = {
            name: {"metrics": {key: spread(values) for key in ("max_train_accuracy", "test_accuracy")}} for name, values in variants.items()
        }
        return {"recipe": {"data": {"max_train_samples": 5000}}, "sweep": {"suffix": ""}, "variants": cells}

    base = result({"no Phi": [0.5, 0.6], "separated": [0.7, 0.7], "only here": [0.1, 0.1]})
    more = result({"10,000 images: no Phi": [0.6, 0.8], "10,000 images: separated": [0.9, 0.9]})
    samples_figure(tmp_path / "samples.png", [base, more])
    accuracy, test = drawn()
    assert [axis.get_title() for axis in (accuracy, test)] == ["Highest accuracy on training images", "Accuracy on test images"]
    lines = {bars.get_label(): bars.lines[0] for bars in accuracy.containers}
    assert set(lines) == {"no Phi", "U-Hop: separated"}
    # Points of one size stand side by side.
    assert all(line.get_xdata() == pytest.approx([5000, 10000], rel=0.02) for line in lines.values())
    assert lines["no Phi"].get_ydata().tolist() == pytest.approx([0.55, 0.7])
    # Two values 0.1 apart: Student's t of 12.7 times 0.05.
    (intervals,) = accuracy.containers[0].lines[2]
    (_, low), (_, high) = intervals.get_segments()[0]
    assert high - low == pytest.approx(2 * 12.706 * 0.05, rel=1e-3)


def test_differences_are_filled_where_they_exceed_their_interval(tmp_path, drawn):
    pairs = [
        {"first": "dense, U-Hop", "second": "dense, untrained Phi", "difference": 0.3, "half_width": 0.1},
        {"first": "dense", "second": "set kernel, SVM", "difference": 0.1, "half_width": 0.3},
    ]
    recipe = {"metrics": ["auc"], "data": {"dataset": "tiger"}}
    paired_figure(tmp_path / "paired.png", [{"recipe": recipe, "paired": pairs}])
    axis = drawn()[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["dense: U-Hop vs. untrained Phi", "dense vs. set kernel, SVM"]
    points = [bars.lines[0] for bars in axis.containers]
    assert [(p.get_color(), p.get_markerfacecolor(), float(p.get_xdata()[0])) for p in points] == [
        ("#0072B2", "#0072B2", 0.3),
        ("#666666", "white", 0.1),
    ]
    assert "(1 of 2)" in axis.figure.get_suptitle()
    of_images = {
        **COMPARED,
        "sweep": {"overrides": []},
        "variants": {"U-Hop": {}},
        "paired": [{**pair, "metric": "test_accuracy"} for pair in pairs],
    }
    differences_figure(tmp_path / "differences.png", of_images, ["test_accuracy"])
    assert len(drawn()[0].containers) == 2


PANELS = ("unit norm, beta 3", "unit norm, beta 10")


def _rows(**errors):
    """Three repeats of errors {model: {alpha: error}} at two values, in two panels."""
    return [
        {"panel": panel, "model": model, "alpha": alpha, "value": value, "repeat": repeat, "error": value * error + repeat}
        for panel in PANELS
        for model, by_alpha in errors.items()
        for alpha, error in by_alpha.items()
        for value in (10, 100)
        for repeat in range(3)
    ]


def test_retrieval_has_a_row_for_conditions_a_column_for_alpha_and_six_lines(tmp_path, drawn):
    alphas = (1.0, 1.5, 2.0)
    names = [*list(METHODS)[:5], "U-Hop, closest pair"]
    models = {name: {alpha: (place + 1) / alpha for alpha in alphas} for place, name in enumerate(names)}
    rows = _rows(**models, L2={1.0: 5.0}, Manhattan={1.0: 4.0})
    # Manhattan is the best baseline, but not at 100.
    rows = [{**row, "error": 900.0} if (row["model"], row["value"]) == ("Manhattan", 100) else row for row in rows]
    retrieval_figure(tmp_path / "r.png", "memory_size", rows, "owner/cifar10")
    axes = drawn()
    assert len(axes) == 6
    assert [axis.get_title() for axis in axes[:3]] == ["softmax (alpha 1)", "1.5-entmax (alpha 1.5)", "sparsemax (alpha 2)"]
    assert axes[0].get_ylim() == axes[2].get_ylim()
    assert axes[3].get_ylabel().startswith("unit norm, beta 10")
    for axis, alpha in zip(axes[3:], alphas, strict=True):
        lines = {bars.get_label(): bars.lines[0] for bars in axis.containers}
        assert list(lines) == [*list(METHODS)[:5], "best baseline"]
        assert lines["U-Hop"].get_ydata().tolist() == pytest.approx([10 * 3 / alpha + 1, 100 * 3 / alpha + 1])
        assert lines["U-Hop"].get_color() == METHODS["U-Hop"].color
        assert lines["best baseline"].get_ydata().tolist() == pytest.approx([41.0, 501.0])
    # Repeats 0, 1 and 2 above the error: Student's t of 4.303 times 1 / sqrt(3).
    segment = axes[0].containers[0].lines[2][0].get_segments()[0]
    assert segment[1][1] - 11.0 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert axes[0].figure.get_suptitle().startswith("Retrieval on CIFAR-10: error by number of memories M")


def test_runs_of_separation_loss_are_points(tmp_path, drawn):
    rows = [{**row, "value": -row["error"]} for row in _rows(**{"U-Hop": {1.0: 1.0, 2.0: 0.5}, "denoising": {1.0: 2.0, 2.0: 0.1}})]
    retrieval_figure(tmp_path / "r.png", "separation_loss", rows, "digits")
    axes = drawn()
    assert len(axes) == 4
    assert [len(points.get_offsets()) for points in axes[0].collections] == [6, 6]
    assert [text.get_text() for text in axes[0].texts] == ["rank corr. -1.00"] * 2


def test_errors_of_zero_are_drawn_at_the_floor(tmp_path, drawn):
    rows = [{**row, "error": 0.0} for row in _rows(**{"U-Hop": {1.0: 1.0}})]
    retrieval_figure(tmp_path / "r.png", "beta", rows, "digits")
    assert drawn()[0].containers[0].lines[0].get_ydata().tolist() == [1e-6, 1e-6]


def test_a_forecast_shows_the_last_series_first(tmp_path, drawn):
    past, future = np.arange(40.0).reshape(20, 2), 100.0 + np.arange(8.0).reshape(4, 2)
    forecast_figure(tmp_path / "f.png", past, future, future + 1.0, np.zeros((2, 24, 2)), ["load", "OT"], "ETTh1")
    first, second = drawn()
    assert first.figure.get_suptitle().startswith("ETTh1: forecast of 4 steps.")
    assert first.get_title() == "OT, the last column (the target)"
    assert second.get_title() == "load"
    lines = {line.get_label(): line for line in first.lines}
    assert lines["forecast"].get_ydata().tolist() == [102.0, 104.0, 106.0, 108.0]
    # Two horizons of the past, then the horizon.
    assert lines["observed"].get_xdata().tolist() == list(range(-8, 4))
    assert lines["observed"].get_ydata().tolist() == [*range(25, 40, 2), 101.0, 103.0, 105.0, 107.0]
    assert lines["retrieved windows"].get_xdata().tolist() == list(range(-8, 4))


@pytest.mark.parametrize("name", ["loss_curve", "bound", "metastable_digits"])
def test_geometry_is_drawn_from_its_results_file(name):
    content = read_result(RESULTS / f"geometry_{name}.json", "geometry")
    figure = FIGURES[content["recipe"]["experiment"]](content["results"], content["recipe"])
    (axis,) = figure.axes
    if name == "loss_curve":
        assert list(np.asarray(axis.lines[0].get_ydata())) == content["results"]["M=100"]["history"]
    elif name == "bound":
        assert list(np.asarray(axis.lines[1].get_ydata())) == [entry["reached"] for entry in content["results"].values()]
    else:
        assert [bar.get_width() for bar in axis.containers[0]] == [entry["1"]["mean"] for entry in content["results"].values()]
    plt.close(figure)


def test_figures_of_the_results_are_small():
    for path in RESULTS.glob("*.png"):
        assert path.stat().st_size < 1_000_000, path.name
        with Image.open(path) as image:
            assert image.width <= 1700, path.name
