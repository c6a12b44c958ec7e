"""Write the README's tables and the model cards anew from the results files, and draw anew the figures that they alone make.

A table stands between `<!-- results: NAME ... -->` and `<!-- end -->`, one of paired differences behind `<!-- paired: NAME ... -->`.
"""

import json
import re

from cards import released_cards
from figures import curves_figure, paired_figure, retrieval_figure, samples_figure
from recipe import ROOT
from tables import paired_table, results_table


RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- (results|paired): ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {"results": results_table, "paired": paired_table}


def render(readme: str) -> str:
    """The README with every marked table as its results files have it."""

    def from_results(match: re.Match[str]) -> str:
        results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in match[3].split()]
        return f"{match[1]}{TABLES[match[2]](results)}\n{match[4]}"

    return MARKED.sub(from_results, readme)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
    for results_path in sorted(RESULTS.glob("retrieval_*.json")):
        results = json.loads(results_path.read_text())
        data = results["recipe"]["data"]["dataset"]
        retrieval_figure(results_path.with_suffix(".png"), results["recipe"]["experiment"], results["rows"], data)
    compared = [json.loads(results_path.read_text()) for results_path in sorted(RESULTS.glob("mil_*.json"))]
    if compared:
        paired_figure(RESULTS / "mil_paired.png", compared)
    images = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("vit_*.json"))}
    for results_path, results in images.items():
        if results.get("sweep", {}).get("curves"):
            curves_figure(results_path.with_name(f"{results_path.stem}_curves.png"), results)
    gathered = [results for results in images.values() if "variants" in results]
    for name in {results["recipe"]["name"] for results in gathered if any(" images: " in variant for variant in results["variants"])}:
        of_one_recipe = [results for results in gathered if results["recipe"]["name"] == name]
        samples_figure(RESULTS / f"{name}_samples.png", of_one_recipe)
    for card, text in released_cards().items():
        card.write_text(text)


if __name__ == "__main__":
    main()
