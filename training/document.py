"""Write the tables of the pages and the model cards from the results files, and draw the figures that these files alone make.

The pages are README.md and those of docs/. A table stands between `<!-- results: NAME ... -->` and `<!-- end -->`. Paired differences
stand after `<!-- paired: NAME ... -->`, how well weights find the instances that matter after `<!-- instances: NAME -->`, and the
README's summary of all results after `<!-- headline -->`.
"""

import json
import re
from typing import Any

from cards import released_cards
from figures import curves_figure, paired_figure, retrieval_figure, samples_figure
from recipe import ROOT
from tables import HEADLINE, headline_table, instances_table, paired_table, results_table


RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(r"(<!-- (?:(results|paired|instances): ([\w ]+)|headline) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = {"results": results_table, "paired": paired_table, "instances": instances_table}


def read(name: str) -> dict[str, Any]:
    """The results file of this name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def render(page: str) -> str:
    """The text of a page with every marked table as its results files have it."""

    def from_results(match: re.Match[str]) -> str:
        if match[2] is None:
            table = headline_table({name: read(name) for name in HEADLINE})
        else:
            table = TABLES[match[2]]([read(name) for name in match[3].split()])
        return f"{match[1]}{table}\n{match[4]}"

    return MARKED.sub(from_results, page)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))
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
