"""The output folder of a run: what may be written there, what is finished, and where to resume."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from .checkpoints import SEAL, check_fits, last_checkpoint, remove_unfinished
from .errors import RecipeError
from .recipe import Recipe, upgraded
from .results import as_recorded, write_atomically


STAGES, TRAINING = "stages", "training"


class RunFolder:
    """The output folder of one run. Until `open`, nothing in it is changed.

    Args:
        path: The folder.
        recipe: The recipe of the run.
        mode: "fresh" for a new or empty folder, "overwrite" to delete an earlier run, "resume" to
            continue it.
        may_change: Sections of the recipe that a resumed run may change.

    Attributes:
        resumed: Whether the run continues an earlier one.
        trained: The outcome of a finished training, or `None`.
        checkpoint: Path of the checkpoint to resume from, or `None`. A run that was stopped before
            its first checkpoint begins again.

    Raises:
        RecipeError: If the folder must not be used, there is nothing to resume, or the earlier run
            was started with another recipe, or its training is finished, the recipe asks for
            another training, and there is no checkpoint.
    """

    def __init__(self, path: Path, recipe: Recipe, mode: str = "fresh", may_change: Sequence[str] = ("training",)):
        self.path, self.recipe, self.mode, self.resumed = path, recipe, mode, mode == "resume"
        _check_usable(path, mode)
        self.trained: dict[str, Any] | None = None
        self.checkpoint: str | None = None
        if self.resumed:
            _check_same_recipe(recipe, path, may_change)
            self.trained = self.read(TRAINING)
            if self.trained is None:
                self.checkpoint = last_checkpoint(path)
                if self.checkpoint is None and self._file(TRAINING).is_file():
                    raise RecipeError(f"{path} has no checkpoint to resume from; pass --overwrite to start again")

    @property
    def begins(self) -> bool:
        """Whether the training starts at its first step."""
        return self.trained is None and self.checkpoint is None

    def open(self) -> None:
        """Prepare the folder for writing: delete an earlier run, or the incomplete checkpoints of a
        resumed one. Only one process may call it.

        Raises:
            RecipeError: If another run has begun in a folder that was empty before.
        """
        if self.resumed:
            remove_unfinished(self.path)
            return
        # Because another run may have begun while the data were loaded, we check the folder again.
        _check_usable(self.path, self.mode)
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        self.write_recipe()

    def write_recipe(self) -> None:
        """Write recipe.yaml: the recipe as it was run, overrides included."""
        write_atomically(self.path / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(self.recipe), sort_keys=False))

    def check_trained(self, step: int) -> None:
        """Check that a finished run with another recipe was trained further, up to this step.

        Raises:
            RecipeError: If not: then the new recipe would describe what was not trained.
        """
        if self.checkpoint is not None and self._file(TRAINING).is_file() and self.checkpoint.endswith(f"-{step}"):
            raise RecipeError(
                f"the training in {self.path} is finished at step {step}, so that its recipe cannot change; "
                "ask for more steps, or pass --overwrite to train again"
            )

    def load_weights(self, model: PreTrainedModel) -> None:
        """Load the weights of a finished training into a model, in place.

        Raises:
            RecipeError: If the weights, or those of the checkpoint to resume from, are of another
                model.
        """
        if self.trained is not None:
            check_fits(str(self.path), model)
            model.load_state_dict(type(model).from_pretrained(self.path).state_dict())
        elif self.checkpoint is not None:
            check_fits(self.checkpoint, model)

    def read(self, stage: str) -> Any:
        """The outcome that `save` saved for a stage of the same recipe, or `None`."""
        path = self._file(stage)
        kept = json.loads(path.read_text()) if path.is_file() else {}
        return kept["outcome"] if kept.get("recipe") == json.loads(json.dumps(as_recorded(self.recipe))) else None

    def save(self, stage: str, outcome: Any) -> None:
        """Save the outcome of a finished stage, atomically."""
        path = self._file(stage)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps({"recipe": as_recorded(self.recipe), "outcome": outcome}))

    def forget(self, stage: str) -> None:
        """Delete the outcome of a stage, if there is one."""
        self._file(stage).unlink(missing_ok=True)

    def _file(self, stage: str) -> Path:
        return self.path / STAGES / f"{stage}.json"


def can_resume(path: Path) -> bool:
    """Whether a folder holds a finished stage or a sealed checkpoint."""
    return any(path.glob(f"{STAGES}/*.json")) or any(path.glob(f"*/{SEAL}"))


def _check_usable(path: Path, mode: str) -> None:
    if not path.exists() or not any(path.iterdir()):
        if mode == "resume":
            raise RecipeError(f"there is nothing to resume in {path}")
    elif mode == "fresh":
        raise RecipeError(f"{path} is not empty; pass --overwrite to delete it, --resume to continue it, or another --output_dir")
    elif not (path / "recipe.yaml").is_file():
        raise RecipeError(f"{path} holds no earlier run (it has no recipe.yaml) and was not changed; choose another --output_dir")


def _check_same_recipe(recipe: Recipe, path: Path, may_change: Sequence[str]) -> None:
    earlier = upgraded(yaml.safe_load((path / "recipe.yaml").read_text()))
    for section, value in dataclasses.asdict(recipe).items():
        if section not in may_change and earlier.get(section) != value:
            raise RecipeError(f"{path} was started with {section}={earlier.get(section)} and cannot be resumed with {section}={value}")
