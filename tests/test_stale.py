"""Which results files are stale."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modeling_uhop.training import stale
from modeling_uhop.training.results import read_result, write_result


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[Path]:
    """A package of one module, loaded as the package whose results are checked."""
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "sums.py").write_text('"""A sum."""\n\n\ndef add(a, b):\n    return a + b\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(stale, "PACKAGE", "toy")
    importlib.invalidate_caches()
    importlib.import_module("toy.sums")
    stale.digest.cache_clear()
    yield folder
    for name in ("toy.sums", "toy"):
        del sys.modules[name]
    stale.digest.cache_clear()


@pytest.mark.parametrize(
    ("text", "is_stale"),
    [
        ('"""A sum."""\n\n\ndef add(a, b):\n    return a + b\n', False),
        ('"""The sum of two numbers."""\n\n\ndef add(a, b):\n    """It adds."""\n    # A comment.\n    return a + b\n', False),
        ('"""A sum."""\n\n\ndef add(a, b):\n    return a - b\n', True),
        (None, True),
    ],
)
def test_a_result_is_stale_once_its_code_has_changed(package, tmp_path, capsys, monkeypatch, text, is_stale):
    results = tmp_path / "results"
    write_result(results / "fresh.json", "speed", {"cases": []})
    assert list(read_result(results / "fresh.json")["code"]) == ["toy.sums"]
    old: dict = {"cases": [], "versions": {}, "commit": None, "machine": None}
    write_result(results / "old.json", "speed", old)
    source = package / "sums.py"
    source.unlink() if text is None else source.write_text(text)
    stale.digest.cache_clear()
    monkeypatch.setattr(sys, "argv", ["stale", "--folder", str(results)])
    stale.main()
    lines = capsys.readouterr().out.splitlines()
    assert ("fresh.json: sums" in lines) == is_stale
    assert lines[-2:] == [f"{int(is_stale)} results files are stale; 1 do not say by which code they were made", "  old.json"]


def test_runs_of_different_code_have_no_hash_that_fits():
    assert stale.same_code([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}]) == {"a": "1", "b": "2/3"}


def test_the_hash_of_this_package_leaves_out_what_draws():
    names = stale.code()
    assert "modeling_uhop.training.recipe" in names
    assert not any(name.startswith("modeling_uhop.training.report") for name in names)
