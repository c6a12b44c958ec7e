"""Model cards, written from results files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData


class Family(NamedTuple):
    """What every card of a family states: the Hub's task (or none), tags, and metrics by their
    names in a results file."""

    name: str
    pipeline_tag: str | None
    task: str
    tags: tuple[str, ...]
    metrics: dict[str, tuple[str, str]]


FAMILIES = {
    "vit": Family(
        "vit", "image-classification", "image-classification", ("image-classification",), {"test_accuracy": ("accuracy", "Test accuracy")}
    ),
    "mil": Family(
        "mil",
        None,
        "multiple-instance-classification",
        ("multiple-instance-learning",),
        {"auc": ("roc_auc", "Area under the ROC curve"), "accuracy": ("accuracy", "Accuracy"), "f1": ("f1", "F1")},
    ),
    "stanhop": Family(
        "stanhop",
        "time-series-forecasting",
        "time-series-forecasting",
        ("time-series",),
        {"test_mse": ("mse", "Mean squared error of scaled values"), "test_mae": ("mae", "Mean absolute error of scaled values")},
    ),
    "memory": Family("memory", None, "retrieval", ("retrieval",), {"error": ("sum_squared_error", "Sum of squared pixel errors")}),
}

FAMILY_OF_TASK = {"images": "vit", "bags": "mil", "series": "stanhop", "retrieval": "memory"}


def family_of(recipe: dict[str, Any]) -> Family:
    """The family that a recorded recipe trains: that of its task or, if an earlier version recorded
    no task, the one that the fields of its data tell."""
    if "task" in recipe:
        return FAMILIES[FAMILY_OF_TASK[recipe["task"]]]
    if "experiment" in recipe:
        return FAMILIES["memory"]
    columns = {"instances_column": "mil", "date_column": "stanhop"}
    return FAMILIES[next((family for column, family in columns.items() if column in recipe["data"]), "vit")]


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
    family = family_of(recipe)
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
    return ModelCard.from_template(
        data,
        template_path=str(template_path),
        family=family.name,
        recipe=recipe,
        results=results,
        metrics={family.metrics[name][1]: _shown(value) for name, value in values.items()},
        model_id=model_id or "path/to/this/folder",
        headline=headline or _headline(family, next(iter(values.values()))),
        comparison=comparison,
        cost=cost or _cost(results),
        figures=figures,
    )


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
