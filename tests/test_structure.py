"""Tests of the package's structure: what travels to the Hub, and which way imports go."""

import ast
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import modeling_uhop


ROOT = Path(modeling_uhop.__file__).parent
MODELING = sorted(path.name for pattern in ("modeling_*.py", "feature_extraction_*.py") for path in ROOT.glob(pattern))
# What a Hub folder may import: in the environment of anyone who loads a model.
LIBRARIES = {"torch", "transformers", "huggingface_hub", "numpy", "safetensors"}


def _imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def _own(path: Path) -> list[ast.ImportFrom]:
    """The imports of a file from this package."""
    return [node for node in _imports(path) if isinstance(node, ast.ImportFrom) and node.level > 0]


def _closure(name: str) -> set[str]:
    """The files that travel to the Hub with a file."""
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [f"{node.module}.py" for node in _own(ROOT / name)]
    return found


@pytest.mark.parametrize("name", MODELING)
def test_files_that_travel_are_flat(name):
    """Transformers copies only files that `from .file import name` reaches, into one folder."""
    for travelling in _closure(name):
        for node in _own(ROOT / travelling):
            assert node.level == 1
            assert node.module is not None
            assert "." not in node.module, f"{travelling} imports {node.module}"
            assert (ROOT / f"{node.module}.py").is_file(), f"{travelling} imports {node.module}, which is not a file of the root"


@pytest.mark.parametrize("name", MODELING)
def test_files_that_travel_import_only_what_every_user_has(name):
    """Transformers refuses a file of the Hub that imports, outside of a `try`, what is not installed."""
    for travelling in _closure(name):
        foreign = set(get_imports(ROOT / travelling)) - LIBRARIES - sys.stdlib_module_names
        assert foreign == set(), f"{travelling} imports {foreign}"


def test_imports_go_one_way():
    """The root imports no subfolder, and no file imports itself by way of others."""
    files = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py") if path.name != "__init__.py"}
    assert len(files) > 25
    targets: dict[str, set[str]] = {}
    for name, path in files.items():
        parents = name.split("/")[:-1]
        targets[name] = set()
        for node in _own(path):
            folder = parents[: len(parents) - (node.level - 1)]
            target = "/".join([*folder, *(node.module or "").split(".")]) + ".py"
            if "/" not in name:
                assert "/" not in target, f"{name} imports {target}"
            targets[name].add(target)

    def reached(name: str, seen: set[str]) -> set[str]:
        for target in targets.get(name, set()) - seen:
            seen.add(target)
            reached(target, seen)
        return seen

    circles = [name for name in files if name in reached(name, set())]
    assert circles == []


def test_the_reading_order_lists_every_file():
    text = (ROOT.parent / "docs" / "reading_order.md").read_text()
    files = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py" and not path.name.startswith("configuration_")]
    assert [path.name for path in files if f"{path.relative_to(ROOT.parent).as_posix()})" not in text] == []


def test_no_file_of_training_hides_a_package():
    """`python training/train.py` puts the folder before all packages."""
    folder = ROOT.parent / "training"
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__", "__pycache__"}
    assert "engine" in names
    elsewhere = [each for each in sys.path if Path(each).resolve() != folder]
    found = {name: PathFinder.find_spec(name, elsewhere) for name in sorted(names)}
    assert [name for name, spec in found.items() if spec is not None and spec.origin is not None] == []
    assert names & sys.stdlib_module_names == set()
