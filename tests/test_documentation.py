"""What the README and the docstrings show, run as it stands."""

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from document import render

import modeling_uhop


ROOT = Path(__file__).parent.parent
PAPER_TO_CODE = ROOT / "docs" / "paper_to_code.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
ALL_BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)]
# One trains and the next loads what it saved.
TRAINING = [block for block in ALL_BLOCKS if '"out"' in block]
# What talks to the Hub runs among the tests of that.
BLOCKS = [block for block in ALL_BLOCKS if block not in TRAINING and "push_to_hub" not in block]

WITH_EXAMPLES = (
    "attention_interface",
    "attention_models",
    "capacity",
    "configuration_stanhop",
    "configuration_uhop_memory",
    "configuration_uhop_mil",
    "configuration_uhop_vit",
    "corruption",
    "energy",
    "feature_extraction_uhop_mil",
    "feature_map",
    "modeling_stanhop",
    "modeling_uhop_memory",
    "modeling_uhop_mil",
    "modeling_uhop_vit",
    "separation",
    "simplex",
    "spherical",
)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
# PEFT asks transformers by an old name, and torch.onnx copies a tree spec of torch's own.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_of_every_page_runs(block, tmp_path, monkeypatch):
    for name in ("peft", "onnxscript"):
        if name.removesuffix("script") in block:
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a page", "exec"), {})


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_readmes_training_runs_and_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    for block, names in zip(TRAINING, (first, second), strict=True):
        exec(compile(block, "README.md", "exec"), names)
    images = first["images"][:9]
    assert (first["model"].eval()(images).logits - second["model"](images).logits).abs().max() < 5e-6
    assert first["trainer"].state.log_history[-1]["train_loss"] < 2.0


def test_the_pages_have_code_to_run():
    assert len(BLOCKS) == 8


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "modeling_uhop").glob("*.py") if path.stem != "__init__"))
def test_docstring_examples(name):
    outcome = doctest.testmod(importlib.import_module(f"modeling_uhop.{name}"))
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name not in WITH_EXAMPLES


def test_the_readme_shows_the_results_files():
    assert "<!-- results: vit_digits -->" in README
    assert render(README) == README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_map_from_paper_to_code_names_what_the_files_hold():
    named = re.findall(r"\[`([\w.]+)`\]\((\.\./[\w./]+\.(?:py|yaml))\)", PAPER_TO_CODE.read_text())
    assert len(named) > 40
    for name, link in named:
        path = (PAPER_TO_CODE.parent / link).resolve()
        if path.suffix == ".py" and path.name != name:
            assert re.search(rf"^(class|def) {name}\b", path.read_text(), re.MULTILINE), (name, link)
        else:
            assert name in (path.stem, path.name)


def test_every_public_thing_says_what_it_is():
    for name in modeling_uhop.__all__:
        if name != "__version__":
            assert (getattr(modeling_uhop, name).__doc__ or "").strip(), name
