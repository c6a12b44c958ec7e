"""Tests of push and pull with the real client of the Hub, against a local server with its
protocol."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import modeling_uhop
from modeling_uhop import STanHopConfig, UHopMemoryConfig, UHopMILConfig, UHopViTConfig
from modeling_uhop.training import cli
from modeling_uhop.training.errors import RecipeError
from modeling_uhop.training.push import check_finished, files_of, recorded_recipe
from modeling_uhop.training.recipe import ROOT
from tests.conftest import assert_close
from tests.hub_server import Hub, environment, serving
from tests.support.forks import run_forked, run_together
from tests.support.recipes import no_reload


pytestmark = pytest.mark.process
TESTS = Path(__file__).parent
# The command `modeling-uhop`.
COMMAND = ["-c", "from modeling_uhop.training.cli import main; main()"]
FAMILIES = ("memory", "vit", "mil", "stanhop")


def _variables(port: int, home: Path, token: str | None = "hf_test") -> dict[str, str]:
    """The environment of a process whose client uses the server on a port and keeps its cache in `home`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**inherited, "OMP_NUM_THREADS": "1", **environment(port, str(home), token)}


def _run(script: list[str], port: int, home: Path, token: str | None = "hf_test") -> subprocess.CompletedProcess:
    """Run a script with the client in a fork."""
    (finished,) = run_together([script], [_variables(port, home, token)])
    return finished


def _run_apart(script: list[str], port: int, home: Path, token: str | None = "hf_test") -> subprocess.CompletedProcess:
    """Run a script in a fresh process."""
    return subprocess.run([sys.executable, *script], cwd=ROOT, env=_variables(port, home, token), capture_output=True, text=True)


def _work(job: str, folder: Path) -> list[str]:
    return [str(TESTS / "hub_worker.py"), job, str(folder)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A hub, its port, and a folder for the client's cache."""
    hub = Hub()
    with serving(hub) as port:
        yield hub, port, tmp_path_factory.mktemp("hub_home")


@pytest.fixture
def hub(served):
    """The hub without repositories."""
    vars(served[0]).update(vars(Hub()))
    return served[0]


@pytest.fixture
def client(served, hub):
    """Runs a script with the client, by default as the user `you`."""
    _, port, home = served
    return partial(_run, port=port, home=home)


def _succeed(client, job: str, folder: Path) -> str:
    finished = client(_work(job, folder))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_every_family_is_pushed_pulled_without_the_package_and_pushed_on(hub, client, tmp_path):
    _succeed(client, "push_families", tmp_path)
    _succeed(client, "load_families", tmp_path)
    for family in FAMILIES:
        for name in (family, f"{family}-shards", f"{family}-again"):
            files = hub.repositories[f"you/{name}"].head.files
            suffixes = {Path(path).suffix for path in files if path not in (".gitattributes", "README.md")}
            assert suffixes == {".json", ".py", ".safetensors"}, name
            auto_map = json.loads(files["config.json"])["auto_map"]
            for entry in auto_map.values():
                assert f"{entry.partition('.')[0]}.py" in files
            assert len(auto_map) == (2 if family == "memory" else 3)
        assert sum(path.endswith(".safetensors") for path in hub.repositories[f"you/{family}-shards"].head.files) > 1
        assert all(path.endswith(".safetensors") for path in hub.repositories[f"you/{family}"].head.lfs)


def test_a_trainer_pushes_a_model_that_loads_and_a_card_that_is_valid(hub, client, tmp_path):
    _succeed(client, "train_and_push", tmp_path)
    head = hub.repositories["you/trained"].head
    assert {"model.safetensors", "config.json", "modeling_uhop_vit.py", "README.md"} <= head.files.keys()
    front_matter = head.files["README.md"].decode().split("---\n")[1]
    assert yaml.safe_load(front_matter)["library_name"] == "transformers"


def test_a_private_repository_is_for_its_owner(served, hub, client, tmp_path):
    _succeed(client, "make_private", tmp_path)
    assert hub.repositories["you/secret"].private
    assert _succeed(client, "load_private", tmp_path).strip().endswith("6")
    # With a cache of its own.
    refused = _run_apart(_work("load_private", tmp_path), served[1], tmp_path / "home", token=None)
    assert refused.returncode != 0
    assert "you/secret is not a local folder and is not a valid model identifier" in refused.stderr
    assert "private repository" in refused.stderr


def test_an_interrupted_upload_is_retried_or_fails_without_a_partial_commit(hub, client, tmp_path):
    hub.create({"name": "interrupted"}, "you")
    hub.broken_uploads = 1000
    failed = client(_work("interrupted_upload", tmp_path))
    assert failed.returncode != 0
    assert "Error" in failed.stdout
    assert len(hub.repositories["you/interrupted"].commits) == 1
    hub.broken_uploads = 1
    _succeed(client, "interrupted_upload", tmp_path)
    assert hub.broken_uploads == 0
    assert hub.repositories["you/interrupted"].head.files["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert len(hub.repositories["you/interrupted"].commits) == 2


def test_one_of_two_commits_with_the_same_parent_is_refused(hub, client, tmp_path):
    outcomes = json.loads(_succeed(client, "conflicting_commits", tmp_path).splitlines()[-1])
    winner, loser = sorted(outcomes, key=lambda name: outcomes[name] != "committed")
    assert outcomes[winner] == "committed"
    assert "A commit has happened since" in outcomes[loser]
    assert [commit.title for commit in hub.repositories["you/conflict"].commits] == ["initial commit", winner]
    assert f"{loser}.txt" not in hub.repositories["you/conflict"].head.files


def test_a_commit_with_an_invalid_card_is_refused_completely(hub):
    hub.create({"name": "card"}, "you")
    lines = [
        {"key": "header", "value": {"summary": "bad"}},
        {"key": "file", "value": {"path": "README.md", "content": "LS0tCnRhZ3M6IFsKLS0t", "encoding": "base64"}},
    ]
    with pytest.raises(Exception, match=r"Invalid metadata in README\.md"):
        hub.commit(hub.repositories["you/card"], lines)
    assert len(hub.repositories["you/card"].commits) == 1


def test_importing_twice_registers_once(client, tmp_path):
    _succeed(client, "registered_twice", tmp_path)


def test_the_example_of_the_hub_guide_runs(hub, client, tmp_path):
    blocks = (ROOT / "docs" / "guides" / "hub.md").read_text().split("```python\n")
    (example,) = [block.partition("```")[0] for block in blocks if "push_to_hub(" in block.partition("```")[0]]
    (tmp_path / "example.py").write_text(example)
    _succeed(client, "run_guide", tmp_path)
    assert any(repository.head.lfs for repository in hub.repositories.values())


def test_a_recipes_run_is_pushed_in_one_commit_and_loads_by_its_name(served, hub, client, tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = ["--num_train_epochs=1", "--logging_steps=5", "--disable_tqdm", "--save_steps=5"]
    overrides = ["data.max_train_samples=200", "model.hidden_size=16", "model.num_hidden_layers=1", "separation.steps=3"]
    no_reload(monkeypatch)
    words = [word for override in overrides for word in ("--set", override)]
    cli.main(["train", "vit_digits", "--output_dir", str(run), *options, *words])
    pushed = _run_apart([*COMMAND, "push", str(run), "you/digits"], served[1], tmp_path / "home")
    assert pushed.returncode == 0, pushed.stderr
    assert "/you/digits, at " in pushed.stdout
    repository = hub.repositories["you/digits"]
    assert [commit.title for commit in repository.commits] == ["initial commit", "Upload run"]
    files = repository.head.files
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "modeling_uhop_vit.py", "hopfield.py"} <= files.keys()
    assert {"README.md", "results.json", "recipe.yaml", "training.png"} <= files.keys()
    assert not [path for path in files if path.endswith((".bin", ".pt")) or "/" in path]
    assert yaml.safe_load(files["recipe.yaml"]) == json.loads(files["results.json"])["recipe"]
    card = ModelCard(files["README.md"].decode())
    (evaluation,) = card.data.to_dict()["model-index"][0]["results"]
    accuracy = json.loads(files["results.json"])["metrics"]["test_accuracy"]
    assert evaluation["metrics"][0]["value"] == pytest.approx(accuracy, abs=1e-4)
    assert 'model="you/digits"' in card.text
    refused = client([*COMMAND, "push", str(run), "somebody/digits"])
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("RecipeError: the Hub refused somebody/digits: ")
    for arguments, message in (
        ([str(run), "a/b/c"], "must be named your_name/model_name, got 'a/b/c'"),
        (
            [str(tmp_path), "you/nothing"],
            "is not a finished run: it has no config.json, recipe.yaml, results.json, README.md, *.safetensors",
        ),
    ):
        refused = client([*COMMAND, "push", *arguments])
        assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
        assert message in refused.stderr


def test_a_push_without_a_hub_or_a_token_is_refused(client, tmp_path):
    for name in ("config.json", "recipe.yaml", "README.md", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    recipe = {"name": "my_vit", "data": {"dataset": "pictures"}, "model": {}, "separation": None, "training": {}}
    results = {"recipe": recipe, "metrics": {"test_accuracy": 0.5}, "seed": 0, "num_parameters": 9, "versions": {}, "commit": None}
    (tmp_path / "results.json").write_text(json.dumps(results))
    nowhere = run_forked(COMMAND[1], "push", str(tmp_path), "you/digits", **environment(9, str(tmp_path / "home")))
    assert nowhere.returncode == 1
    assert "RecipeError: the Hub at http://127.0.0.1:9 cannot be reached" in nowhere.stderr
    nobody = client([*COMMAND, "push", str(tmp_path), "you/digits"], token=None)
    assert nobody.returncode == 1
    assert "RecipeError: the Hub needs an access token: pass --token, set HF_TOKEN or run `hf auth login`" in nobody.stderr
    assert "Traceback" not in nowhere.stderr + nobody.stderr


def test_an_unfinished_run_is_refused_and_only_results_are_uploaded(tmp_path):
    with pytest.raises(RecipeError, match="there is no folder"):
        check_finished(tmp_path / "nowhere")
    for name in (
        "config.json",
        "recipe.yaml",
        "results.json",
        "README.md",
        "model.safetensors",
        "training_args.bin",
        "run.log",
        "a.png",
    ):
        (tmp_path / name).touch()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "model.safetensors").touch()
    check_finished(tmp_path)
    expected = ["README.md", "a.png", "config.json", "model.safetensors", "results.json"]
    assert [path.name for path in files_of(tmp_path)] == expected
    # The local path of the data is not uploaded either.
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"dataset": str(tmp_path / "pictures")}}))
    (tmp_path / "results.json").write_text('{"recipe": {"data": {"dataset": "pictures"}}}')
    assert yaml.safe_load(recorded_recipe(tmp_path)) == {"data": {"dataset": "pictures"}}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"not a finished run: it has no \*.safetensors"):
        check_finished(tmp_path)


class _Trap:
    """An object whose pickle runs code when it is loaded."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("UHopMemoryModel", UHopMemoryConfig(pattern_dim=3)),
        ("UHopViTModel", UHopViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=4, patch_size=2)),
        ("UHopMILModel", UHopMILConfig(instance_dim=3, hidden_size=8, num_attention_heads=2)),
        ("STanHopModel", STanHopConfig(num_input_channels=2, context_length=12, prediction_length=6, d_model=8, ffn_dim=8)),
    ],
)
def test_no_pickle_is_read(name, config, tmp_path):
    model_class = getattr(modeling_uhop, name)
    model = model_class(config)
    model.save_pretrained(tmp_path / "safe")
    config.save_pretrained(tmp_path)
    marker = tmp_path / "marker"
    for content in (model.state_dict(), {"weight": _Trap(str(marker))}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"model\.safetensors"):
            model_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="loads only safetensors files, got use_safetensors=False"):
        model_class.from_pretrained(tmp_path / "safe", use_safetensors=False)
    assert not marker.exists()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "safe" / "pytorch_model.bin")
    loaded = model_class.from_pretrained(tmp_path / "safe")
    for key, value in load_file(tmp_path / "safe" / "model.safetensors").items():
        assert_close(loaded.state_dict()[key], value.double())
    assert not marker.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"model-00002-of-\d+\.safetensors"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "a weights file of .*sharded is damaged"),
        (lambda path: path.write_bytes(b""), "a weights file of .*sharded is damaged"),
    ],
    ids=["missing", "truncated", "empty"],
)
def test_a_damaged_shard_is_named(damage, message, tmp_path):
    config = UHopViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2, intermediate_size=8)
    modeling_uhop.UHopViTModel(config).save_pretrained(tmp_path / "sharded", max_shard_size="2KB")
    (second,) = (tmp_path / "sharded").glob("model-00002-*")
    damage(second)
    with pytest.raises(OSError, match=message):
        modeling_uhop.UHopViTModel.from_pretrained(tmp_path / "sharded")
