def check_output_dir(folder: Path, overwrite: bool, resume: bool) -> None:
    """Check that a run may write to a folder, without changing the folder.

    Raises:
        RecipeError: If the folder is not empty and neither flag is given, if it is to be
            overwritten or resumed but holds no earlier run, or if it is empty and there is nothing
            to resume.
    """
    if not folder.exists() or not any(folder.iterdir()):
        if resume:
            raise RecipeError(f"there is nothing to resume in {folder}")
    elif overwrite or resume:
        if not (folder / "recipe.yaml").is_file():
            raise RecipeError(f"{folder} holds no earlier run (it has no recipe.yaml) and was not changed; choose another --output_dir")
    else:
        raise RecipeError(f"{folder} is not empty; pass --overwrite to delete it, --resume to continue it, or another --output_dir")


def check_same_recipe(recipe: Recipe, folder: Path, may_change: Sequence[str] = ("training",)) -> None:
    """Check that a run is resumed with the recipe it was started with.

    Raises:
        RecipeError: If a section that is not in `may_change` differs.
    """
    earlier = {RENAMED.get(key, key): value for key, value in yaml.safe_load((folder / "recipe.yaml").read_text()).items()}
    for section, value in dataclasses.asdict(recipe).items():
        if section not in may_change and earlier.get(section) != value:
            raise RecipeError(f"{folder} was started with {section}={earlier.get(section)} and cannot be resumed with {section}={value}")


def clear_output_dir(folder: Path) -> None:
    """Create an empty folder; an earlier run in it is deleted."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write recipe.yaml: the recipe as it was run, overrides included."""
    write_atomically(folder / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
