"""What a recipe can train: one file for each task."""

import pkgutil
from importlib import import_module
from typing import Any


# Recipes that measure something and save no model.
MEASUREMENTS = ("attach", "geometry", "retrieval")
# Every other file of this folder is a task. It defines a subclass of `Task` with the name `TASK`.
TASKS = tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name not in MEASUREMENTS)


def task_class_of(name: str) -> Any:
    """The class of a task."""
    return import_module(f".{name}", __name__).TASK


def recipe_class_of(name: str) -> Any:
    """The dataclass of a task's recipes."""
    return task_class_of(name).recipe_class
