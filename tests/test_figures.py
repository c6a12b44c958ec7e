"""What the figures of image results draw."""

import matplotlib.pyplot as plt
import pytest
from figures import curves_figure, samples_figure
from sweep import spread


@pytest.fixture
def drawn(monkeypatch):
    """Figures, kept open to look into."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield lambda: plt.gcf().axes
    monkeypatch.undo()
    plt.close("all")


def test_curves_are_means_with_a_band_over_seeds(tmp_path, drawn):
    losses = {"plain": [[3.0, 1.0], [5.0, 3.0]], "separated": [[2.0, 1.0], [2.0, 2.0]]}
    variants = {name: {"curves": {"eval_train_loss": {"epoch": [1.0, 2.0], "values": values}}} for name, values in losses.items()}
    curves_figure(tmp_path / "curves.png", {"sweep": {"curves": ["eval_train_loss"]}, "variants": variants})
    (axis,) = drawn()
    assert axis.get_title() == "train loss"
    assert [(line.get_label(), line.get_ydata().tolist()) for line in axis.lines] == [("plain", [4.0, 2.0]), ("separated", [2.0, 1.5])]
    bounds = axis.collections[0].get_paths()[0].get_extents()
    assert (bounds.y0, bounds.y1) == (1.0, 5.0)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_samples_are_drawn_by_their_number(tmp_path, drawn):
    def result(variants):
        cells = {
            name: {"metrics": {key: spread(values) for key in ("max_train_accuracy", "test_accuracy")}} for name, values in variants.items()
        }
        return {"recipe": {"data": {"max_train_samples": 5000}}, "variants": cells}

    base = result({"no Phi": [0.5, 0.6], "separated": [0.7, 0.7], "only here": [0.1, 0.1]})
    more = result({"10,000 images: no Phi": [0.6, 0.8], "10,000 images: separated": [0.9, 0.9]})
    samples_figure(tmp_path / "samples.png", [base, more])
    accuracy, test = drawn()
    assert [axis.get_title() for axis in (accuracy, test)] == ["max train accuracy", "test accuracy"]
    drawn_lines = {bars.get_label(): bars.lines[0] for bars in accuracy.containers}
    assert {name: line.get_xdata().tolist() for name, line in drawn_lines.items()} == {"no Phi": [5000, 10000], "separated": [5000, 10000]}
    assert drawn_lines["no Phi"].get_ydata().tolist() == pytest.approx([0.55, 0.7])
    # Two values 0.1 apart: Student's t of 12.7 times 0.05.
    (intervals,) = accuracy.containers[0].lines[2]
    (_, low), (_, high) = intervals.get_segments()[0]
    assert high - low == pytest.approx(2 * 12.706 * 0.05, rel=1e-3)
