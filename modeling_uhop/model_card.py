"""Model cards, written from a run's results file."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


def write_model_card(folder: Path, results_path: Path, template_path: Path) -> ModelCard:
    """Write `folder/README.md` from a results file and a Jinja template, with a `model-index` of the test metrics.

    Raises:
        KeyError: If the results file lacks a metric that the card states.
    """
    results: dict[str, Any] = json.loads(results_path.read_text())
    recipe = results["recipe"]
    dataset = recipe["data"]["dataset"]
    hub_id = dataset if dataset.count("/") == 1 and not Path(dataset).exists() else None
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["hopfield", "associative-memory", "u-hop", "custom_code"],
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        model_name=recipe["name"],
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=hub_id or Path(dataset).name,
                dataset_name=Path(dataset).name,
                dataset_split=recipe["data"]["test_split"],
                metric_type="accuracy",
                metric_name="Test accuracy",
                metric_value=results["metrics"]["test_accuracy"],
            )
        ],
    )
    card = ModelCard.from_template(data, template_path=str(template_path), results=results, recipe=recipe)
    card.save(folder / "README.md")
    return card
