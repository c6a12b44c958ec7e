"""Tests of killed processes, full disks and damaged files.

A run resumes to the same weights, or reports the error in one line; complete checkpoints stay
complete."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from modeling_uhop import UHopViTConfig, UHopViTForImageClassification
from modeling_uhop.training import checkpoints
from modeling_uhop.training.checkpoints import SEAL, check_fits, last_checkpoint, remove_unfinished, seal
from modeling_uhop.training.errors import RecipeError
from tests.fault_worker import CASES
from tests.support.forks import run_command
from tests.support.recipes import TASKS, results_of, without_times


pytestmark = pytest.mark.process
TESTS = Path(__file__).parent
KILLED = -signal.SIGKILL
# Faults after which a process can still report an error, and words of its message.
TOLD = {"on_a_full_disk": ("File too large", "Error"), "in_a_process_that_reads": ("DataLoader worker",)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs, one complete and the others interrupted and resumed, and the outcome of
    each."""
    folder = tmp_path_factory.mktemp("faults")
    finished = run_command(str(TESTS / "fault_worker.py"), str(folder))
    assert finished.returncode == 0, finished.stderr
    return folder, json.loads((folder / "statuses.json").read_text())


@pytest.mark.parametrize(("task", "moment"), [(task, moment.__name__) for task, moment in CASES])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_run(runs, task, moment):
    folder, statuses = runs
    whole, name = f"{task}_whole", f"{task}_{moment}"
    assert statuses[whole] == [0], (folder / f"{whole}.log").read_text()
    interrupted, left, resumed = statuses[name]
    assert interrupted == (1 if moment in TOLD else KILLED), (folder / f"{name}.log").read_text()
    assert left, "nothing to resume from, so nothing was tested"
    assert resumed == 0, (folder / f"{name}_resumed.log").read_text()
    weights, again = (load_file(folder / each / "model.safetensors") for each in (whole, name))
    assert weights.keys() == again.keys()
    assert [each for each in weights if not weights[each].equal(again[each])] == []
    first, second = (results_of(folder / each) for each in (whole, name))
    assert without_times(first["metrics"]) == without_times(second["metrics"])
    assert first.get("outcomes") == second.get("outcomes")
    finished = ("after_the_last_step", "in_the_second_fold")
    assert ("train_seconds" in second["metrics"]) == (moment in finished)


@pytest.mark.parametrize("moment", ["in_the_model_file", "before_the_optimizer_is_written", "before_the_seal", "on_a_full_disk"])
@pytest.mark.parametrize("task", TASKS)
def test_an_incomplete_checkpoint_is_named_and_replaced(runs, task, moment):
    folder, statuses = runs
    name, unfinished = f"{task}_{moment}", "checkpoint-6" if moment == "before_the_seal" else "checkpoint-4"
    assert unfinished not in statuses[name][1]
    log = (folder / f"{name}_resumed.log").read_text()
    assert f"{unfinished} is incomplete and is not used" in log
    assert all((path / SEAL).is_file() for path in (folder / name).glob("checkpoint-*"))


@pytest.mark.parametrize("moment", TOLD)
@pytest.mark.parametrize("task", TASKS)
def test_errors_that_a_run_can_report_are_one_line(runs, task, moment):
    folder, _ = runs
    lines = (folder / f"{task}_{moment}.log").read_text().strip().splitlines()
    assert any(word in lines[-1] for word in TOLD[moment])
    assert "Traceback" not in "\n".join(lines)


@pytest.mark.parametrize("saves", [True, False])
def test_a_checkpoint_is_sealed_once_every_process_has_written_to_it(saves, tmp_path, monkeypatch):
    happened = []
    waiting = SimpleNamespace(wait_for_everyone=lambda: happened.append("all have written"))
    monkeypatch.setattr(checkpoints, "PartialState", lambda: waiting)
    monkeypatch.setattr(checkpoints, "seal", lambda checkpoint: happened.append(checkpoint.name))
    arguments = SimpleNamespace(should_save=saves, output_dir=str(tmp_path))
    checkpoints.SealingCallback().on_save(arguments, SimpleNamespace(global_step=4), None)
    assert happened == ["all have written", *(["checkpoint-4"] if saves else [])]


@pytest.fixture
def sealed(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("model.safetensors", "optimizer.pt"):
            (tmp_path / f"checkpoint-{step}" / name).write_bytes(bytes(range(step)) * 10)
        seal(tmp_path / f"checkpoint-{step}")
    return tmp_path


def test_the_complete_checkpoint_with_the_largest_step_is_used(sealed):
    assert last_checkpoint(sealed) == str(sealed / "checkpoint-10")
    (sealed / "checkpoint-12").mkdir()
    (sealed / "checkpoint-12" / "model.safetensors").write_bytes(b"half")
    (sealed / "checkpoint-last").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-12 is incomplete"):
        assert last_checkpoint(sealed) == str(sealed / "checkpoint-10")
    remove_unfinished(sealed)
    assert sorted(path.name for path in sealed.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-last"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "model.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "model.safetensors has changed since it was written"),
        (lambda path: path.write_bytes(b"\x01" + path.read_bytes()[1:]), "model.safetensors has changed since it was written"),
        (lambda path: path.write_bytes((path.parents[1] / "checkpoint-2" / path.name).read_bytes()), "has changed since it was written"),
    ],
    ids=["missing", "truncated", "a byte", "another model's"],
)
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_is_kept(sealed, damage, message):
    damage(sealed / "checkpoint-10" / "model.safetensors")
    with pytest.raises(RecipeError, match=rf"{message}; delete .*checkpoint-10 to resume from the checkpoint before it"):
        last_checkpoint(sealed)
    (sealed / "checkpoint-10").rename(sealed / "damaged")
    assert last_checkpoint(sealed) == str(sealed / "checkpoint-2")


def test_a_folder_without_a_complete_checkpoint_has_none_to_resume_from(tmp_path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-2 is incomplete"):
        assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 32}, r"classifier.weight has shape \(2, 32\) in it and \(2, 16\) here"),
        ({"num_hidden_layers": 2}, r"vit.layers.1.* has shape \(16, 16\) in it and none here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, fields, message):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    model, other = (UHopViTForImageClassification(UHopViTConfig(**size)) for size in (sizes, {**sizes, **fields}))
    model.save_pretrained(tmp_path / "own")
    other.save_pretrained(tmp_path / "other")
    check_fits(str(tmp_path / "own"), model)
    with pytest.raises(RecipeError, match=rf"other is of another model: {message}"):
        check_fits(str(tmp_path / "other"), model)
