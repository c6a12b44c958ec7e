"""Write the README's tables anew from the results files, and draw anew the figures that they alone make.

A table stands between `<!-- results: NAME ... -->` and `<!-- end -->`.
"""

import json
import re
from pathlib import Path
from typing import Any

from compare_mil import table as bag_table
from figures import paired_figure, retrieval_figure
from sweep import table


ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- results: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(readme: str) -> str:
    """The README with every marked table as its results files have it."""

    def from_results(match: re.Match[str]) -> str:
        results = {name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in match[2].split()}
        return f"{match[1]}{_table(list(results.values()))}\n{match[3]}"

    return MARKED.sub(from_results, readme)


def _table(results: list[dict[str, Any]]) -> str:
    if "results" in results[0]:
        return bag_table(results)
    if "cases" in results[0]:
        return speed_table(results[0])
    return retrieval_table(results) if "rows" in results[0] else table(results)


def speed_table(result: dict[str, Any]) -> str:
    """Measured ratios beside their bounds."""
    lines = ["| what | beside | ratio | bound |", "| --- | --- | --- | --- |"]
    for case in result["cases"]:
        bound = "" if case["at_most"] is None and case["at_least"] is None else "≤ " if case["at_least"] is None else "≥ "
        bound += f"{case['at_most'] or case['at_least']:g}" if bound else ""
        ratio = f"{case['ratio']:.3g} times {'less' if case['at_least'] is not None else 'as much'}"
        lines.append(f"| {case['name']} | {case['peer']} | {ratio} | {bound}{'' if case['kept'] else ', **missed**'} |")
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


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
    for results_path in sorted((ROOT / "benchmarks" / "results").glob("retrieval_*.json")):
        results = json.loads(results_path.read_text())
        data = results["recipe"]["data"]["dataset"]
        retrieval_figure(results_path.with_suffix(".png"), results["recipe"]["experiment"], results["rows"], data)
    compared = [json.loads(results_path.read_text()) for results_path in sorted((ROOT / "benchmarks" / "results").glob("mil_*.json"))]
    if compared:
        paired_figure(ROOT / "benchmarks" / "results" / "mil_paired.png", compared)
