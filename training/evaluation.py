"""Evaluate the finished run of a recipe again, with the saved model, also on other data.

modeling-uhop evaluate runs/vit_digits
modeling-uhop evaluate runs/mil_tiger --data path/to/fox.parquet
"""

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .processes import refuse_several_processes


def main(arguments: list[str]) -> None:
    """Run the command: print the metrics as JSON."""
    parser = argparse.ArgumentParser(prog="modeling-uhop evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a finished run")
    parser.add_argument("--data", "--dataset", help="Hub id, local folder or file to use instead of the recipe's data set")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field, e.g. data.test_split=val")
    args = parser.parse_args(arguments)
    refuse_several_processes()
    print(json.dumps(evaluate(args.folder, args.data, args.set), indent=1))


def evaluate(folder: Path, data: str | None = None, overrides: list[str] | None = None) -> dict[str, Any]:
    """The metrics of a saved model.

    Images and series are evaluated on `evaluation.split` of the data. Series are scaled by the
    training rows of the data that are given. Bags are all evaluated, so that the bags of the run
    itself are those that the model was trained on.

    Raises:
        RecipeError: If the folder holds no finished run, or the data do not fit the model.
    """
    from .recipe import build_recipe, upgraded
    from .recipe_file import apply_override, read_yaml
    from .tasks import task_class_of

    if not (folder / "config.json").is_file():
        raise RecipeError(f"{folder} holds no finished run (it has no config.json); give the output folder of a run")
    content = upgraded(read_yaml(folder / "recipe.yaml"))
    for override in overrides or []:
        apply_override(content, override)
    if data is not None:
        content["data"]["dataset"] = data
    task = task_class_of(content["task"])(build_recipe(content))
    task.load()
    return task.score(folder)
