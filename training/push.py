"""Upload the finished run of a recipe to the Hub: model, code, processor, card, results and figures in one commit.

python training/push.py runs/vit_digits your_name/uhop-digits
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from cards import write_card
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx
from recipe import RecipeError, errors_in_one_line, refuse_several_processes


NEEDED = ("config.json", "recipe.yaml", "results.json", "README.md")
# What a run leaves beside these, such as checkpoints and pickled training arguments, stays here.
UPLOADED = ("*.json", "*.py", "*.safetensors", "*.png", "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a finished run")
    parser.add_argument("repo_id", help="where to: your_name/model_name")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made now")
    parser.add_argument("--token", help="access token, instead of the one of `hf auth login` or HF_TOKEN")
    args = parser.parse_args()
    with errors_in_one_line():
        refuse_several_processes()
        commit = push(args.folder, args.repo_id, private=args.private, token=args.token)
        print(f"{args.folder} is now {commit.repo_url}, at {commit.oid[:12]}")


def push(folder: Path, repo_id: str, *, private: bool = False, token: str | None = None) -> CommitInfo:
    """Upload a finished run in one commit, its card written anew with the repository's name.

    Raises:
        RecipeError: If the folder holds no finished run, or the Hub cannot be reached or does not let this user write there.
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
    """Turn what the client raises into a `RecipeError` that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise RecipeError(f"the repository must be named your_name/model_name, got {repo_id!r}: {error}") from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise RecipeError("the Hub does not know who asks: pass --token, set HF_TOKEN or run `hf auth login`") from error
        raise RecipeError(f"the Hub refused {repo_id}: {error}") from error
    except (OSError, httpx.TransportError) as error:
        raise RecipeError(f"the Hub at {endpoint} cannot be reached: {error}") from error


def check_finished(folder: Path) -> None:
    """A `RecipeError` that names what a finished run has and this folder has not."""
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {folder}")
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    missing += [] if any(folder.glob("*.safetensors")) else ["*.safetensors"]
    if missing:
        raise RecipeError(f"{folder} is no finished run: it has no {', '.join(missing)}")


def files_of(folder: Path) -> list[Path]:
    """The files of a run that belong on the Hub as they are."""
    return sorted({path for pattern in UPLOADED for path in folder.glob(pattern) if path.is_file()})


def recorded_recipe(folder: Path) -> bytes:
    """The recipe of a run as its results have it: local data by its name, not by where it lies on this machine."""
    results = json.loads((folder / "results.json").read_text())
    return yaml.safe_dump(results["recipe"], sort_keys=False).encode()


if __name__ == "__main__":
    main()
