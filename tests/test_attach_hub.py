"""An adapter is pushed to a local server with the Hub's protocol, and loads by its id in a fresh process."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.hub_server import Hub, environment, serving
from tests.support.forks import run_forked
from tests.test_documentation import DOCS, blocks_of


pytestmark = pytest.mark.process
WORKER = Path(__file__).parent / "hub_worker.py"


def _succeed(job: str, port: int, folder: Path) -> None:
    _printed(f"import runpy; runpy.run_path({str(WORKER)!r}, run_name='__main__')", port, folder, job, str(folder))


def _printed(code: str, port: int, folder: Path, *arguments: str) -> str:
    done = run_forked(code, *arguments, cwd=folder, **environment(port, str(folder / "hub_home")))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Hub:
    """A Hub with the adapters, after another process has loaded them."""
    folder, hub = tmp_path_factory.mktemp("hub"), Hub()
    with serving(hub) as port:
        _succeed("push_adapter", port, folder)
        _succeed("load_adapter", port, folder)
    return hub


def _card(hub: Hub, name: str) -> Any:
    return ModelCard(hub.repositories[name].head.files["README.md"].decode()).data


def test_an_adapter_that_was_pushed_loads_by_its_id_with_equal_logits(hub):
    head = hub.repositories["you/adapter"].head
    assert head.files.keys() == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert head.lfs == {"adapter_model.safetensors"}
    config = json.loads(head.files["adapter_config.json"])
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("MODELING_UHOP", "you/bert")


def test_a_trainer_pushes_the_adapter_and_the_state_of_stage_one(hub):
    files = hub.repositories["you/trained-adapter"].head.files
    assert {"adapter_config.json", "adapter_model.safetensors", "last-checkpoint/separation.pt"} <= files.keys()
    assert "model.safetensors" not in files


@pytest.mark.parametrize("name", ["you/adapter-folder", "you/trained-adapter"])
def test_the_card_of_a_folder_and_of_a_trainer_names_the_base_model(hub, name):
    card = _card(hub, name)
    assert (card.library_name, card.base_model) == ("peft", "you/bert")
    assert {"base_model:adapter:you/bert", "hopfield", "transformers", "u-hop"} <= set(card.tags)


def test_a_merged_model_is_an_ordinary_repository_with_our_tags(hub):
    files = hub.repositories["you/merged"].head.files
    assert {"config.json", "model.safetensors"} <= files.keys()
    card = _card(hub, "you/merged")
    assert card.library_name == "transformers"
    assert {"hopfield", "u-hop"} <= set(card.tags)


def test_the_example_of_the_guide_pushes_and_loads(tmp_path):
    blocks = blocks_of((DOCS / "guides" / "attach.md").read_text())
    ((last, shown),) = [(place, shown) for place, (code, shown) in enumerate(blocks) if "push_to_hub(" in code]
    with serving(Hub()) as port:
        printed = _printed("\n".join(code for code, _ in blocks[: last + 1]), port, tmp_path)
    assert shown is not None
    assert printed.endswith(shown)
