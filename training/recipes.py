"""List the recipes that come with the package, and find one by its name.

modeling-uhop recipes
modeling-uhop recipes mil
"""

import argparse
import difflib
import re
from pathlib import Path
from typing import NamedTuple

from .errors import RecipeError


CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DESCRIPTION, EXAMPLES = (__doc__ or "").split("\n", 1)


class Summary(NamedTuple):
    """What the list says about a recipe.

    Attributes:
        name: Path in the folder of recipes, without its ending, such as `sweeps/vit_digits`.
        task: The recipe's task; the folder for a file without one, such as a sweep.
        purpose: First sentence of the header comment.
        cost: The entry `Cost:` of the header comment; empty without one.
    """

    name: str
    task: str
    purpose: str
    cost: str


def recipe_names(folder: Path = CONFIGS) -> list[str]:
    """The names of all recipes and sweeps, those of the top folder first.

    The configurations of `accelerate launch` are no recipes.
    """
    files = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*.yaml")]
    return [path.as_posix() for path in sorted(files, key=lambda path: (len(path.parts), path)) if path.parts[0] != "accelerate"]


def summary(name: str, folder: Path = CONFIGS) -> Summary:
    """What the list says about the recipe of this name, read from the file's text."""
    text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    header = "\n".join(line[1:].strip() for line in re.match(r"(?:#.*\n)*", text)[0].splitlines())  # type: ignore[index]
    # An entry is a word and a colon at the beginning of a line, with all lines up to the next entry.
    described, *entries = [" ".join(part.split()) for part in re.split(r"^([A-Z][a-z]+):", header, flags=re.MULTILINE)]
    cost = dict(zip(entries[::2], entries[1::2], strict=True)).get("Cost", "")
    sentence = re.match(r".*?(?:[?!](?=\s|$)|\.(?=\s+[A-Z]|$))", described)
    task = re.search(r"^task:\s*(\w+)", text, re.MULTILINE)
    return Summary(name, task[1] if task else name.partition("/")[0], sentence[0] if sentence else described, cost)


def find_recipe(name_or_path: str | Path, folder: Path = CONFIGS) -> Path:
    """The file of a recipe.

    Args:
        name_or_path: A path to a file; or the name of a recipe of the package, such as
            `vit_digits`, `sweeps/vit_digits` or `configs/vit_digits.yaml`. The folder may be left
            out if one recipe alone has the name.
        folder: Where the recipes of the package are.

    Raises:
        RecipeError: If there is no such file and no such recipe, or if several have the name.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    name = Path(name_or_path).as_posix().removeprefix("configs/").removesuffix(".yaml")
    names = recipe_names(folder)
    found = [each for each in names if each == name] or [each for each in names if each.rpartition("/")[2] == name]
    if len(found) == 1:
        return folder / f"{found[0]}.yaml"
    if found:
        raise RecipeError(f"several recipes are called {name!r}; give one of {', '.join(found)}")
    close = difflib.get_close_matches(name, names, n=3) or difflib.get_close_matches(name.rpartition("/")[2], names, n=3, cutoff=0.3)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    raise RecipeError(f"there is no file and no recipe {str(name_or_path)!r}; {meant}`modeling-uhop recipes` lists the recipes")


def main(arguments: list[str]) -> None:
    """Print the recipes whose name or task contains a word, or all."""
    parser = argparse.ArgumentParser(
        prog="modeling-uhop recipes", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", nargs="?", default="", help="list only recipes whose name or task contains this word")
    word = parser.parse_args(arguments).word
    listed = [each for each in map(summary, recipe_names()) if word in each.name or word in each.task]
    if not listed:
        raise RecipeError(f"no recipe has {word!r} in its name or task; without a word, all are listed")
    for each in listed:
        print(f"{each.name}  [{each.task}]\n    {each.purpose}" + (f"\n    Cost: {each.cost}" if each.cost else ""))
