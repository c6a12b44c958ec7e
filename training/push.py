"""Upload the finished run of a recipe to the Hub: model, code, processor, card, results and figures
in one commit.

modeling-uhop push runs/vit_digits your_name/uhop-digits
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx

from .errors import RecipeError
from .processes import refuse_several_processes
from .report.cards import write_card


NEEDED = ("config.json", "recipe.yaml", "results.json", "README.md")
# Other files of a run, such as checkpoints and pickled training arguments, are not uploaded.
UPLOADED = ("*.json", "*.py", "*.safetensors", "*.png", "README.md")


def main(arguments: list[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="modeling-uhop push", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a finished run")
    parser.add_argument("repo_id", help="repository on the Hub: your_name/model_name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--token", help="access token to use instead of that of `hf auth login` or HF_TOKEN")
    args = parser.parse_args(arguments)
    refuse_several_processes()
    commit = push(args.folder, args.repo_id, private=args.private, token=args.token)
    print(f"uploaded {args.folder} to {commit.repo_url}, at {commit.oid[:12]}")


def push(folder: Path, repo_id: str, *, private: bool = False, token: str | None = None) -> CommitInfo:
    """Upload a finished run in one commit; its model card is written again with the name of the
    repository.

    Raises:
        RecipeError: If the folder holds no finished run, the Hub cannot be reached, or this user
            may not write to the repository.
    """
    check_finished(folder)
    if repo_id.count("/") != 1:
        raise RecipeError(f"the repository must be named your_name/model_name, got {repo_id!r}")
    api = HfApi(token=token)
    write_card(folder, model_id=repo_id)
    operations = [CommitOperationAdd(path.name, path) for path in files_of(folder)]
    operations.append(CommitOperationAdd("recipe.yaml", recorded_recipe(folder)))
    with hub_errors_in_one_line(repo_id, api.endpoint):
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.create_commit(repo_id, operations, commit_message=f"Upload {folder.resolve().name}")


@contextmanager
def hub_errors_in_one_line(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the Hub client into a `RecipeError` that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise RecipeError(f"the repository must be named your_name/model_name, got {repo_id!r}: {error}") from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise RecipeError("the Hub needs an access token: pass --token, set HF_TOKEN or run `hf auth login`") from error
        raise RecipeError(f"the Hub refused {repo_id}: {error}") from error
    except (OSError, httpx.TransportError) as error:
        raise RecipeError(f"the Hub at {endpoint} cannot be reached: {error}") from error


def check_finished(folder: Path) -> None:
    """Raise a `RecipeError` if a folder lacks files of a finished run; the message names them."""
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {folder}; give the output folder of a finished run")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise RecipeError(f"{folder} is not a finished run: it has no {', '.join(missing)}")


def files_of(folder: Path) -> list[Path]:
    """The files of a run that are uploaded without a change."""
    return sorted({path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()})


def recorded_recipe(folder: Path) -> bytes:
    """The recipe of a run as YAML, as its results file records it: a local data set has its name
    instead of its path."""
    results = json.loads((folder / "results.json").read_text())
    return yaml.safe_dump(results["recipe"], sort_keys=False).encode()
