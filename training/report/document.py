"""Write the tables of the pages and the model cards from the results files, and draw the figures that these files alone make.

The pages are README.md and those of docs/. A table stands between `<!-- KIND: NAME ... -->` and `<!-- end -->`; the kinds are those of
`TABLES`. README's summary of all results stands after `<!-- headline -->`.
"""

import json
import re
from typing import Any

from ..recipe import ROOT
from .cards import released_cards
from .comparison_figures import curves_figure, differences_figure, growth_figure, paired_figure, samples_figure
from .figures import retrieval_figure
from .geometry_figures import FIGURES
from .styles import save
from .tables import HEADLINE, choice_table, defaults_table, first_step_table, headline_table, instances_table, paired_table, results_table


RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(
    r"(<!-- (?:(results|paired|instances|choice|defaults|first_step): ([\w/ ]+)|headline) -->\n).*?(<!-- end -->)", re.DOTALL
)
TABLES = {
    "results": results_table,
    "paired": paired_table,
    "instances": instances_table,
    "choice": choice_table,
    "defaults": defaults_table,
    "first_step": first_step_table,
}


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


def draw_figures() -> None:
    """Draw every figure again whose results file holds all that it shows."""
    results = {path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    for path, content in results.items():
        picture, recipe, sweep = path.with_suffix(".png"), content.get("recipe", {}), content.get("sweep", {})
        if path.stem.startswith("retrieval_"):
            retrieval_figure(picture, recipe["experiment"], content["rows"], recipe["data"]["dataset"])
        elif recipe.get("experiment") in FIGURES:
            save(FIGURES[recipe["experiment"]](content["results"], recipe), picture)
        elif path.stem == "speed":
            growth_figure(picture, content["growth"])
        if sweep.get("curves"):
            curves_figure(path.with_name(f"{path.stem}_curves.png"), content)
            differences_figure(path.with_name(f"{path.stem}_differences.png"), content)
    compared = [content for path, content in results.items() if path.stem.startswith("mil_")]
    if compared:
        paired_figure(RESULTS / "mil_paired.png", compared)
    images = [content for path, content in results.items() if path.stem.startswith("vit_") and "variants" in content]
    for name in {content["recipe"]["name"] for content in images if any(" images: " in variant for variant in content["variants"])}:
        samples_figure(RESULTS / f"{name}_samples.png", [content for content in images if content["recipe"]["name"] == name])


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))
    draw_figures()
    for card, text in released_cards().items():
        card.write_text(text)


if __name__ == "__main__":
    main()
