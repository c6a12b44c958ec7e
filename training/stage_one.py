"""The separation section of a recipe: `SeparationCallback`, with a preset and a data set of its own."""

import inspect
from collections.abc import Callable
from typing import Any

from modeling_uhop import Separation, SeparationCallback
from modeling_uhop.separation import PRESETS

from .errors import RecipeError


def separation_callback(
    section: dict[str, Any] | None,
    unlabelled: Callable[[str | None, str | None], Any],
    views: Callable[..., Callable[[Any], Any]] | None = None,
) -> SeparationCallback | None:
    """Build the callback of a recipe.

    Args:
        section: The section `separation` of the recipe; `None` for a run without Stage I. Its keys
            are the fields of `Separation`, the other arguments of `SeparationCallback`, `preset`
            (the name of a preset of `Separation`), `dataset` and `split`. `views` is true for two
            views of an example, or a mapping of the fields of the task's views.
        unlabelled: A function of `dataset` and `split` that loads what Stage I draws from; at least
            one of them is not `None`.
        views: The views of the task, a function of their fields; `None` for a task without views.

    Raises:
        RecipeError: For an unknown preset, or views that the task does not have.
    """
    if section is None:
        return None
    given = dict(section)
    preset, dataset, split = (given.pop(name, None) for name in ("preset", "dataset", "split"))
    if preset is not None and preset not in PRESETS:
        raise RecipeError(f"separation.preset must be one of {list(PRESETS)}, got {preset!r}")
    chosen = given.pop("views", None) or None
    if chosen is not None:
        if views is None:
            raise RecipeError("separation.views: this task has no views; leave it out")
        if chosen is not True and not isinstance(chosen, dict):
            raise RecipeError(f"separation.views must be true, or a mapping of fields such as {{jitter: 0.2}}, got {chosen!r}")
        try:
            given["views"] = views(**({} if chosen is True else chosen))
        except TypeError as error:
            raise RecipeError(f"separation.views: {error}") from error
    separation = None if preset is None else PRESETS[preset]()
    source = None if dataset is None and split is None else unlabelled(dataset, split)
    return SeparationCallback(separation=separation, dataset=source, **given)


def with_defaults(section: dict[str, Any]) -> dict[str, Any]:
    """Return the section of a recipe with the default of each key that it leaves out."""
    arguments = inspect.signature(SeparationCallback).parameters.values()
    defaults = {each.name: each.default for each in arguments if each.kind is not inspect.Parameter.VAR_KEYWORD}
    preset = section.get("preset")
    fields = dict(vars(Separation() if preset is None else PRESETS[preset]()))
    if preset is None and section.get("schedule", "train_begin") != "train_begin":
        fields["steps"] = 1
    return {**defaults, **fields, **section}
