"""Make the two models that the demo ships, in space/models: run their recipes, and write their cards.

python space/make_models.py           # both, in about three minutes on one CPU core
python space/make_models.py digits    # or one of them
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import demo_digits
import numpy as np
from demo_bags import new_bag
from demo_models import SHIPPED, TARGET, draw_bag
from huggingface_hub import ModelCard, ModelCardData

from modeling_uhop.model_card import model_card
from modeling_uhop.training.data.bags import Bags
from modeling_uhop.training.metrics import bag_metrics
from modeling_uhop.training.recipe import ROOT, load_recipe
from modeling_uhop.training.results import as_recorded, provenance
from modeling_uhop.training.tasks.bags import BagClassification, predict


CLASSIFIER = "configs/demo/digits_classifier.yaml"
BAGS = "configs/mil_digits.yaml"
TRAINING_BAGS, HELD_OUT_BAGS = 400, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["digits", "bags"], help="which model (both)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "demo", help="where the recipe of the classifier runs")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where the models go")
    args = parser.parse_args()
    for name in [args.what] if args.what else ["digits", "bags"]:
        folder = args.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        print(make_digits(folder, args.runs / "digits_classifier") if name == "digits" else make_bags(folder))


def make_digits(folder: Path, run: Path) -> ModelCard:
    """The classifier of digits: a finished run is used as it is."""
    if not (run / "results.json").is_file():
        subprocess.run(
            [sys.executable, ROOT / "training" / "train.py", ROOT / CLASSIFIER, "--output_dir", run],
            check=True,
        )
    for name in ("model.safetensors", "preprocessor_config.json"):
        shutil.copyfile(run / name, folder / name)
    write_config(folder, json.loads((run / "config.json").read_text()))
    held_out = f"{len(demo_digits.load().test)} test images"
    return write_card(folder, json.loads((run / "results.json").read_text()), "digits", CLASSIFIER, held_out)


def make_bags(folder: Path) -> ModelCard:
    """The model of bags: the recipe's training, on bags of training images alone, so that the demo shows images that are new to it."""
    digits, random = demo_digits.load(), np.random.default_rng(0)
    drawn = [draw_bag(digits.train, digits.labels, index % 2 == 0, random) for index in range(TRAINING_BAGS)]
    recipe = load_recipe(ROOT / BAGS)
    task = BagClassification(recipe)
    task.bags = Bags([pixels_of(bag) for bag in drawn], 1 - np.arange(TRAINING_BAGS) % 2, [f"without a {TARGET}", f"with a {TARGET}"])
    model, extractor = task.fit(np.arange(TRAINING_BAGS), recipe.seed, folder / "scratch")
    model.cpu().save_pretrained(folder)
    extractor.save_pretrained(folder)
    write_config(folder, json.loads((folder / "config.json").read_text()))
    for copied in folder.glob("*.py"):
        copied.unlink()
    results = {
        "recipe": as_recorded(recipe),
        "metrics": bag_metrics(
            predict(model, extractor, [pixels_of(bag) for bag in held_out_bags()])[0], held_out_labels(), recipe.metrics
        ),
        "seed": recipe.seed,
        "num_parameters": model.num_parameters(),
        **provenance(),
    }
    return write_card(folder, results, "bags", BAGS, f"{HELD_OUT_BAGS} bags of test images")


def held_out_bags() -> list[list[int]]:
    return [new_bag(seed % 2 == 0, seed) for seed in range(HELD_OUT_BAGS)]


def held_out_labels() -> np.ndarray:
    return 1 - np.arange(HELD_OUT_BAGS) % 2


def pixels_of(bag: list[int]) -> np.ndarray:
    return demo_digits.load().images[bag].reshape(len(bag), -1)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """A configuration that names no code to load: the demo has the package."""
    config.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_card(folder: Path, results: dict[str, Any], what: str, recipe_path: str, held_out: str) -> ModelCard:
    results = {**results, "recipe": {**results["recipe"], "name": f"demo_{what}"}}
    template = (SHIPPED / "template.md").read_text()
    values = {"title": f"demo_{what}", "what": what, "recipe_path": recipe_path, "held_out": held_out}
    with tempfile.TemporaryDirectory() as prepared:
        shutil.copytree(ROOT / "model_cards" / "families", Path(prepared) / "families")
        given = "{% set title, what, recipe_path, held_out = " + ", ".join(json.dumps(value) for value in values.values()) + " %}"
        (Path(prepared) / "template.md").write_text(given + template)
        card = model_card(results, Path(prepared) / "template.md", model_id=f"space/models/{what}")
    # The folder has no code of its own.
    cast(ModelCardData, card.data).tags = [tag for tag in cast(ModelCardData, card.data).tags or [] if tag != "custom_code"]
    card.save(folder / "README.md")
    return card


if __name__ == "__main__":
    main()
