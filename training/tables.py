"""Results files as Markdown tables."""

from pathlib import Path
from typing import Any


def results_table(results: list[dict[str, Any]]) -> str:
    """The table of results files of one kind."""
    if "results" in results[0]:
        return bags_table(results)
    if "cases" in results[0]:
        return speed_table(results[0])
    return retrieval_table(results) if "rows" in results[0] else variants_table(results)


def variants_table(gathered: list[dict[str, Any]]) -> str:
    """A row for each variant, baseline and published figure, columns for each recipe and metric; one seed has no spread."""
    metrics = gathered[0]["sweep"].get("metrics", ["test_accuracy", "validation_accuracy"])
    columns = [(result, metric) for result in gathered for metric in metrics]
    titles = ["" if len(gathered) == 1 else result["recipe"]["name"] + ", " for result, _ in columns]
    header = ["", "parameters", *(title + metric.replace("_", " ") for title, (_, metric) in zip(titles, columns, strict=True))]
    rows = []
    for variant in gathered[0]["variants"]:
        sizes = dict.fromkeys(f"{result['variants'][variant]['num_parameters']:,}" for result in gathered)
        cells = [r["variants"][variant]["metrics"][metric] for r, metric in columns]
        spreads = ["" if len(cell["values"]) == 1 else f" ± {cell['std']:.4f}" for cell in cells]
        rows.append([variant, " / ".join(sizes), *(f"{cell['mean']:.4f}{spread}" for cell, spread in zip(cells, spreads, strict=True))])
    for baseline in gathered[0].get("baselines", {}):
        rows.append([baseline, "", *(f"{r['baselines'][baseline][metric]:.4f}" for r, metric in columns)])
    for source in dict.fromkeys(source for result in gathered for source in result.get("published", {})):
        rows.append([f"published: {source}", "", *(str(r["published"].get(source, {}).get(metric, "")) for r, metric in columns)])
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def paired_table(gathered: list[dict[str, Any]]) -> str:
    """A row for each pair of variants, a column for each recipe and metric: the mean difference at equal seeds, and its 95 % interval."""
    metrics = gathered[0]["sweep"]["metrics"]
    columns = [(result, metric) for result in gathered for metric in metrics]
    titles = ["" if len(gathered) == 1 else result["recipe"]["name"] + ", " for result, _ in columns]
    header = ["", *(title + metric.replace("_", " ") for title, (_, metric) in zip(titles, columns, strict=True))]
    rows = []
    for first, second in gathered[0]["sweep"]["pairs"]:
        cells = []
        for result, metric in columns:
            asked = {"first": first, "second": second, "metric": metric}
            (pair,) = [pair for pair in result["paired"] if asked.items() <= pair.items()]
            cells.append(f"{pair['difference']:+.4f}" + ("" if pair["half_width"] is None else f" ± {pair['half_width']:.4f}"))
        rows.append([f"{first} vs. {second}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def bags_table(gathered: list[dict[str, Any]]) -> str:
    """Mean of the metric that matters and its standard deviation over repeats, a column for each data set."""
    metric = gathered[0]["recipe"]["metrics"][0]
    titles = [Path(result["recipe"]["data"]["dataset"]).stem for result in gathered]
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for job in dict.fromkeys(job for result in gathered for job in result["results"]):
        scores = [result["results"].get(job, {}).get(metric) for result in gathered]
        cells = ["" if score is None else f"{score['mean']:.3f} ± {score['std_repeats']:.3f}" for score in scores]
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    for row in dict.fromkeys(row for result in gathered for row in result["published"]):
        lines.append(f"| published: {row} | " + " | ".join(result["published"].get(row, "") for result in gathered) + " |")
    return "\n".join(lines)


def speed_table(result: dict[str, Any]) -> str:
    """Measured ratios beside their bounds."""
    lines = ["| what | beside | ratio | bound |", "| --- | --- | --- | --- |"]
    for case in result["cases"]:
        bound = "" if case["at_most"] is None and case["at_least"] is None else "≤ " if case["at_least"] is None else "≥ "
        bound += f"{case['at_most'] or case['at_least']:g}" if bound else ""
        ratio = f"{case['ratio']:.3g} times {'less' if case['at_least'] is not None else 'as much'}"
        lines.append(f"| {case['name']} | {case['baseline']} | {ratio} | {bound}{'' if case['kept'] else ', **missed**'} |")
    return "\n".join(lines)


def retrieval_table(results: list[dict[str, Any]], panel: str = "unit norm, beta 10", sizes: tuple[str, ...] = ("100", "500")) -> str:
    """Errors of every model for some numbers of memories, a column for each data set and number."""
    columns = [(result, size) for result in results for size in sizes]
    titles = [f"{result['recipe']['data']['dataset'].rpartition('/')[2]}, M = {size}" for result, size in columns]
    lines = ["| | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(columns)]
    for model in results[0]["summary"][panel]:
        errors = [result["summary"][panel].get(model, {}).get(size) for result, size in columns]
        cells = ["" if error is None else f"{error['mean']:.2f} ± {error['std']:.2f}" for error in errors]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
