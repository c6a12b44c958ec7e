"""Model cards, written from results files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData


class Family(NamedTuple):
    """What every card of a family states.

    Attributes:
        name: The task of its recipes, such as "images".
        pipeline_tag: The pipeline of the Hub, or `None`.
        task: The task in the card's `model-index`.
        tags: Tags of the Hub.
        metrics: For each metric of a results file, its name on the Hub and in words.
        text: Jinja blocks that fill the template.
    """

    name: str
    pipeline_tag: str | None
    task: str
    tags: list[str]
    metrics: dict[str, tuple[str, str]]
    text: str


def family_of(recipe: dict[str, Any], templates: Path) -> Family:
    """The family that a recorded recipe trains: that of its task.

    Args:
        recipe: The recipe. If an earlier version recorded no task, the fields of its data tell
            which it is.
        templates: The folder of the card's template; `families/TASK.md` in it has front matter
            with the fields of `Family`, and the blocks of the family's text.
    """
    columns = {"instances_column": "bags", "date_column": "series"}
    name = recipe.get("task")
    if name is None and "experiment" in recipe:
        name = "retrieval"
    elif name is None:
        name = next((task for column, task in columns.items() if column in recipe["data"]), "images")
    _, front, text = (templates / "families" / f"{name}.md").read_text(encoding="utf-8").split("---\n", 2)
    return Family(**{"name": name, "pipeline_tag": None, "text": text, **yaml.safe_load(front)})


def model_card(
    results: dict[str, Any],
    template_path: Path,
    *,
    model_id: str | None = None,
    headline: str | None = None,
    comparison: str | None = None,
    cost: str | None = None,
    figures: Sequence[tuple[str, str]] = (),
) -> ModelCard:
    """The card of a model from its results and a Jinja template, with a `model-index` of its
    metrics on held-out data.

    Args:
        results: A results file's content: recipe, metrics (numbers, or mean and spread), seed or
            seeds, num_parameters, versions, commit.
        template_path: The template.
        model_id: The model's name on the Hub, for the example that loads it; by default a folder.
        headline: The first metric, its confidence interval and that of the baseline, in a sentence
            or two. By default the metric alone.
        comparison: Markdown table of the same recipe over several seeds, with its baselines.
        cost: Cost of training, if the results do not hold it.
        figures: Titles and paths of pictures, relative to the card.

    Raises:
        KeyError: If the results lack a metric that the card states.
    """
    recipe = results["recipe"]
    family = family_of(recipe, template_path.parent)
    dataset = recipe["data"]["dataset"]
    hub_id = dataset if dataset.count("/") == 1 and not Path(dataset).exists() else None
    title = Path(dataset).stem
    values = {name: results["metrics"][name] for name in family.metrics if name in results["metrics"] or name == next(iter(family.metrics))}
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=family.pipeline_tag,
        tags=["hopfield", "associative-memory", "u-hop", *family.tags, "custom_code"],
        datasets=[hub_id] if hub_id else None,
        metrics=[family.metrics[name][0] for name in values],
        model_name=recipe["name"],
        eval_results=[
            EvalResult(
                task_type=family.task,
                task_name=family.task.replace("-", " ").capitalize(),
                dataset_type=hub_id or title,
                dataset_name=title,
                dataset_split=recipe["data"].get("test_split", "test"),
                metric_type=family.metrics[name][0],
                metric_name=family.metrics[name][1],
                metric_value=round(value["mean"] if isinstance(value, dict) else value, 4),
            )
            for name, value in values.items()
        ],
    )
    loader = jinja2.DictLoader({"template.md": template_path.read_text(encoding="utf-8"), "family.md": family.text})
    content = (
        jinja2.Environment(loader=loader)
        .get_template("family.md")
        .render(
            card_data=data.to_yaml(),
            recipe=recipe,
            results=results,
            metrics={family.metrics[name][1]: _shown(value) for name, value in values.items()},
            model_id=model_id or "path/to/this/folder",
            headline=headline or _headline(family, next(iter(values.values()))),
            comparison=comparison,
            cost=cost or _cost(results),
            figures=figures,
        )
    )
    return ModelCard(content)


def _headline(family: Family, value: Any) -> str:
    """A run's first metric. One run has no interval, and nothing here compares it."""
    name = next(iter(family.metrics.values()))[1]
    mean = value["mean"] if isinstance(value, dict) else value
    return f"**{name}: {mean:.4f}**, from one run, without a confidence interval. This run was not compared with a baseline."


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.4f} ± {value.get('std', value.get('std_repeats')):.4f}"
    return f"{value:.4f}"


def _cost(results: dict[str, Any]) -> str | None:
    seconds = next((results["metrics"][name] for name in ("train_seconds", "cross_validation_seconds") if name in results["metrics"]), None)
    machine = results.get("machine")
    if seconds is None or machine is None:
        return None
    seconds = seconds["mean"] if isinstance(seconds, dict) else seconds
    return f"{seconds:.0f} seconds on {machine}"
