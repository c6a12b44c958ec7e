"""The page on new tasks and families: its files, put where it says, train a model."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.forks import run_command


ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "guides" / "new_task.md"
FILE = re.compile(r'^```\w+ title="([\w/.]+)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)


pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the repository with the files of the page."""
    folder = tmp_path_factory.mktemp("project")
    for part in ("modeling_uhop", "training", "configs", "model_cards"):
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in FILE.findall(PAGE.read_text()):
        assert not (ROOT / name).exists()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    command = re.search(r"^python (training/train.py .*)$", PAGE.read_text(), re.MULTILINE)[1].split()
    finished = run_command(*command, "--output_dir", "out", cwd=folder, PYTHONPATH=str(folder))
    assert finished.returncode == 0, finished.stderr
    return folder, finished.stdout


def test_the_page_has_one_file_of_each_kind(project):
    names = [name for name, _ in FILE.findall(PAGE.read_text())]
    assert [Path(name).parent.as_posix() for name in names] == [
        "modeling_uhop",
        "modeling_uhop",
        "training/tasks",
        "model_cards/families",
        "configs",
    ]


def test_the_new_family_trains_separates_and_reloads_without_the_package(project):
    folder, printed = project
    results = json.loads((folder / "out" / "results.json").read_text())
    metrics = results["metrics"]
    assert results["recipe"]["task"] == "table"
    assert metrics["test_accuracy"] > 0.9
    assert metrics["separation_loss"] < metrics["separation_loss_before"]
    assert "AutoModelForSequenceClassification: largest difference" in printed
    assert "answers agree" in printed


def test_the_card_of_the_new_family_has_its_fragment(project):
    folder, _ = project
    card = (folder / "out" / "README.md").read_text()
    assert "The columns are stored patterns" in card
    assert "pipeline_tag: tabular-classification" in card
    assert "training.png" in card
