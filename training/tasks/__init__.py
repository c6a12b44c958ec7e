"""What a recipe can train: one file for each task."""

from importlib import import_module
from typing import Any


# The tasks of recipes, and the file of each. It defines a subclass of `Task` with the name `TASK`.
TASKS = {"images": ".images", "bags": ".bags", "series": ".series"}


def task_class_of(name: str) -> Any:
    """The class of a task."""
    return import_module(TASKS[name], __name__).TASK


def recipe_class_of(name: str) -> Any:
    """The dataclass of a task's recipes."""
    return task_class_of(name).recipe_class
