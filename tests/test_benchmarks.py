"""Tests of the benchmark: ratios, bounds, the check of outputs before timing, and its parts at
small sizes."""

import os
import sys
import time
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_uhop import hopfield_attention
from modeling_uhop.training.report.tables import speed_table
from modeling_uhop.training.results import read_result
from tests.support.forks import fork_server


benchmark = pytest.importorskip("run", reason="the benchmarks need entmax")


def _case(**fields) -> Any:
    return benchmark.Case(**{"part": "p", "name": "n", "baseline": "q", "ours": [1.0, 2.0, 4.0], "baselines": [4.0, 4.0, 4.0], **fields})


def test_ratios_are_medians_over_rounds_and_are_compared_with_their_bounds():
    assert _case().ratio == 0.5
    assert _case(at_least=1.0).ratio == 2.0
    assert _case().kept
    assert _case(at_most=0.5).kept
    assert not _case(at_most=0.49).kept
    assert _case(at_least=2.0).kept
    assert not _case(at_least=2.1).kept
    assert "BOUND MISSED" in benchmark.line(_case(at_most=0.4))
    row = _case(at_most=0.4, error=0.1).row()
    assert (row["ours"], row["baselines"], row["ratio"], row["kept"], row["rounds"]) == (2.0, 4.0, 0.5, False, 3)


def test_speed_table_has_a_row_for_each_ratio():
    rows = [_case(at_most=0.4).row(), _case(at_least=2.0).row(), _case().row()]
    lines = speed_table([{"cases": rows}]).splitlines()
    assert lines[2] == "| n | q | 0.5 times as much | ≤ 0.4, **missed** |"
    assert lines[3] == "| n | q | 2 times less | ≥ 2 |"
    assert lines[4] == "| n | q | 0.5 times as much |  |"


def test_a_wrong_output_is_not_timed():
    assert benchmark.difference(torch.ones(2), torch.ones(2) + 1e-3, 0.1) == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(SystemExit, match="nothing was timed"):
        benchmark.difference(torch.ones(2), torch.zeros(2), 0.1)
    with pytest.raises(SystemExit, match="nothing was timed"):
        benchmark.difference(torch.tensor([torch.nan]), torch.zeros(1), 0.1)


def test_functions_are_timed_in_turn():
    turns: list[str] = []
    times = benchmark.interleaved(2, lambda: turns.append("a"), lambda: turns.append("b"))
    assert turns == ["a", "b"] * 3
    assert [len(own) for own in times] == [2, 2]


def test_a_missed_bound_ends_a_check_with_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PARTS", {"kept": lambda rounds: [_case()], "broken": lambda rounds: [_case(at_most=0.1)]})
    monkeypatch.setattr(
        benchmark, "growth_of_cost", lambda: {part: {"torch.pdist": {"2": 1.0, "4": 3.0}} for part in ("attention", "separation")}
    )
    path = tmp_path / "speed.json"
    command = ["run.py", "--output", str(path)]
    monkeypatch.setattr("sys.argv", command)
    benchmark.main()
    assert [case["kept"] for case in read_result(path, "speed")["cases"]] == [True, False]
    assert path.with_suffix(".png").stat().st_size > 0
    monkeypatch.setattr("sys.argv", [*command, "--check"])
    with pytest.raises(SystemExit, match="1 of 2 ratios"):
        benchmark.main()
    monkeypatch.setattr("sys.argv", [*command, "--check", "--only", "kept"])
    benchmark.main()
    assert set(read_result(path, "speed")) == {"schema", "kind", "cases", "versions", "commit", "machine", "code"}


@pytest.fixture
def forks(monkeypatch):
    """The benchmark measures memory in forks, which start faster than its fresh processes."""
    server = fork_server()
    monkeypatch.setattr(benchmark, "multiprocessing", SimpleNamespace(get_context=lambda kind: server))


@pytest.mark.process
@pytest.mark.usefixtures("forks")
def test_attention_runs_and_needs_little_more_memory_than_softmax(monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", [(1, 2, 65, 8)])
    cases = list(benchmark.attention(1))
    assert len(cases) == 5
    assert all(case.ratio > 0 for case in cases)
    ours, softmax = cases[-1].ours, cases[-1].baselines
    assert "memory" in cases[-1].name
    assert ours[0] < 1.2 * softmax[0]


@pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="TRITON_INTERPRET is not 1: the kernels would need a GPU")
def test_the_gpu_part_runs_in_the_interpreter(monkeypatch):
    """A substitute for adasplash is the baseline; a wrong output of it is not timed."""
    pytest.importorskip("triton", reason="Triton exists only for Linux")

    def baseline(query, key, value, alpha, is_causal):
        assert not is_causal
        return hopfield_attention(query, key, value, alpha=alpha)

    def wrong(query, key, value, **settings):
        return value

    module = SimpleNamespace(adasplash_v1=baseline, adasplash_no_block_mask=baseline, __spec__=ModuleSpec("adasplash", None))
    monkeypatch.setitem(sys.modules, "adasplash", module)
    inputs = list(torch.randn(3, 1, 1, 40, 16, dtype=torch.float16))
    cases = list(benchmark.triton_kernels(1, inputs, time.perf_counter))
    assert [case.baseline for case in cases] == ["FlashAttention", "adasplash", "adasplash, no block mask"]
    assert [(case.at_most, case.at_least) for case in cases] == [(2.0, None), (None, 1.0), (None, 1.0)]
    assert cases[0].name == "1.5-entmax attention (1, 1, 40, 16), float16, with gradients"
    for other in (wrong, lambda *qkv, **settings: baseline(*qkv, **settings).detach() + 0.0 * sum(x.sum() for x in qkv)):
        module.adasplash_no_block_mask = other
        with pytest.raises(SystemExit, match="nothing was timed"):
            list(benchmark.triton_kernels(1, inputs, time.perf_counter))


@pytest.mark.process
@pytest.mark.usefixtures("forks")
def test_peak_memory_is_that_of_the_measured_function():
    assert benchmark.peak_memory("pdist", 3000) > 3 * benchmark.peak_memory("ours", 3000)
