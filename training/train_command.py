"""Train and evaluate a model from a recipe, or on a data set without a recipe.

modeling-uhop train vit_digits
modeling-uhop train configs/mil_tiger.yaml --data path/to/tiger.parquet --seed 1
modeling-uhop train --task images --data path/to/folder
torchrun --standalone --nproc_per_node 2 training/train.py configs/vit_digits.yaml --set training.use_cpu=true
accelerate launch --config_file configs/accelerate/gpus.yaml training/train.py configs/vit_cifar10.yaml --data path/to/cifar10

`python training/train.py` does the same as `modeling-uhop train`. The fourth command trains in two
processes on a CPU; `accelerate launch` needs MPI for this. Every field of `TrainingArguments` is an
option too, for instance `--learning_rate 1e-4`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError
from .fields import fields_of, source_of
from .recipe import build_recipe
from .recipe_file import apply_override, check_keys, read_yaml
from .recipes import find_recipe
from .tasks import MEASUREMENTS


DESCRIPTION, EXAMPLES = (__doc__ or "").split("\n", 1)


def parser() -> argparse.ArgumentParser:
    """The options of the command, without those of `TrainingArguments`."""
    options = argparse.ArgumentParser(
        prog="modeling-uhop train",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    options.add_argument("recipe", nargs="?", help="name of a recipe (see `modeling-uhop recipes`), or a YAML file")
    options.add_argument("--task", help="without a recipe: images, bags or series")
    options.add_argument("--data", "--dataset", help="Hub id, local folder or file to use instead of the recipe's data set")
    options.add_argument("--output_dir", help="folder to save to (default: runs/<recipe name>)")
    options.add_argument("--seed", type=int, help="training seed to use instead of the recipe's seed")
    options.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field, e.g. model.alpha=2.0; may be repeated"
    )
    existing = options.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="delete an earlier run in output_dir and start again")
    existing.add_argument("--resume", action="store_true", help="continue the run in output_dir from its last checkpoint")
    return options


def main(arguments: list[str]) -> None:
    """Run the command.

    Raises:
        RecipeError: If the recipe, the data or an option cannot be used.
    """
    if arguments and not arguments[0].startswith("-"):
        path = find_recipe(arguments[0])
        task = read_yaml(path).get("task")
        if task in MEASUREMENTS:
            _measure(task, path, arguments[1:])
            return
    options = parser()
    own, overrides = training_options(arguments, options)
    args = options.parse_args(own)
    args.set += overrides
    if args.recipe is not None:
        path = find_recipe(args.recipe)
        content = read_yaml(path)
        if content.get("task") in MEASUREMENTS:
            raise RecipeError(f"give {args.recipe} first and its options after it: modeling-uhop train {args.recipe} ...")
        if "variants" in content:
            raise RecipeError(f"{path} is a sweep, not a recipe; run it by `modeling-uhop sweep {args.recipe}`")
        content.setdefault("name", path.stem)
    elif args.task is not None and args.data is not None:
        from .suggest import suggested_recipe

        content = suggested_recipe(args.task, args.data)
    else:
        raise RecipeError("give a recipe, or --task and --data; `modeling-uhop recipes` lists the recipes")
    for override in args.set:
        apply_override(content, override)
    if args.data is not None and isinstance(content.get("data"), dict):
        content["data"]["dataset"] = args.data
    recipe = build_recipe(content)
    if args.recipe is None:
        show_once(content)
    recipe.seed = recipe.seed if args.seed is None else args.seed
    folder = Path(args.output_dir or f"runs/{recipe.name}")

    from .engine import run
    from .processes import leave_process_group

    try:
        run(recipe, folder, "overwrite" if args.overwrite else "resume" if args.resume else "fresh")
    except KeyboardInterrupt:
        from .run_folder import can_resume

        remedy = "continue with --resume" if can_resume(folder) else f"nothing in {folder} can be resumed"
        print(f"\ninterrupted; {remedy}", file=sys.stderr)
        sys.exit(130)
    leave_process_group()


def training_options(arguments: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """Take the fields of `TrainingArguments` out of a command line.

    They look like `--learning_rate 1e-4`, `--learning_rate=1e-4` and `--bf16`.

    Returns:
        The other arguments, and an override of the recipe for each field.

    Raises:
        RecipeError: For an option that is neither one of the parser nor such a field.
    """
    fields = fields_of(source_of("transformers"), "TrainingArguments")
    known = {option for action in parser._actions for option in action.option_strings}
    own, overrides, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        option, separator, value = argument.partition("=")
        name = option[2:].replace("-", "_")
        if not option.startswith("--") or option in known:
            own.append(argument)
            if option in known and not separator and rest and not rest[0].startswith("--"):
                own.append(rest.pop(0))
            continue
        check_keys("the options", {name: value}, sorted([*fields, *(each[2:] for each in known if each.startswith("--"))]))
        if not separator:
            if fields[name].startswith("bool") and not (rest and rest[0].lower() in ("true", "false")):
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            else:
                raise RecipeError(f"{option} needs a value, such as {option}=1")
        overrides.append(f"training.{name}={value}")
    return own, overrides


def show_once(content: dict[str, Any]) -> None:
    """Print a suggested recipe, in the first process, so that it can be kept and changed."""
    from .processes import is_first_process

    if is_first_process():
        print(f"Without a recipe, this one is used:\n\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}", flush=True)


def _measure(task: str, path: Path, arguments: list[str]) -> None:
    from importlib import import_module

    from .processes import refuse_several_processes

    refuse_several_processes()
    import_module(f".tasks.{task}", __package__).run_command(path, arguments)
