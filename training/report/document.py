"""Write the tables of the pages and the model cards from the results files, and draw the figures that these files alone make.

The pages are README.md and those of docs/. A table stands between `<!-- KIND: NAME ... -->` and `<!-- end -->`; the kinds are those of
`TABLES`. README's summary of all results stands after `<!-- headline -->`.

python -m modeling_uhop.training.report.document
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..recipe import ROOT
from ..results import read_result
from .cards import released_cards
from .comparison_figures import adapters_figure, curves_figure, differences_figure, growth_figure, paired_figure, samples_figure
from .figures import retrieval_figure
from .geometry_figures import FIGURES
from .styles import save
from .tables import HEADLINE, choice_table, defaults_table, first_step_table, headline_table, instances_table, paired_table, results_table


RESULTS = ROOT / "benchmarks" / "results"
# The comparisons of adapters, and their titles in the figure.
ADAPTERS = {"images": "ViT: CIFAR-10 to Tiny ImageNet", "text": "Llama: to another package", "series": "PatchTST: ETTh2 to ETTh1"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKED = re.compile(
    r"(<!-- (?:(results|paired|instances|choice|defaults|first_step): ([\w/ ]+)|headline) -->\n).*?(<!-- end -->)", re.DOTALL
)
# The function that makes each table, and the kinds of results files that it takes.
TABLES: dict[str, tuple[Callable[[list[dict[str, Any]]], str], tuple[str, ...]]] = {
    "results": (results_table, ("seeds", "folds", "retrieval", "speed")),
    "paired": (paired_table, ("seeds",)),
    "instances": (instances_table, ("folds",)),
    "choice": (choice_table, ("retrieval",)),
    "defaults": (defaults_table, ("retrieval",)),
    "first_step": (first_step_table, ("retrieval",)),
}


def read(name: str, *kinds: str) -> dict[str, Any]:
    """The results file of this name; a `RecipeError` if it is not of these kinds."""
    return read_result(RESULTS / f"{name}.json", *kinds)


def render(page: str) -> str:
    """The text of a page with every marked table as its results files have it."""

    def from_results(match: re.Match[str]) -> str:
        if match[2] is None:
            table = headline_table({name: read(name, kind) for name, kind in HEADLINE.items()})
        else:
            make, kinds = TABLES[match[2]]
            table = make([read(name, *kinds) for name in match[3].split()])
        return f"{match[1]}{table}\n{match[4]}"

    return MARKED.sub(from_results, page)


def draw_figures() -> None:
    """Draw every figure again whose results file holds all that it shows."""
    results = {path: read_result(path) for path in sorted(RESULTS.glob("*.json"))}
    by_kind: dict[str, dict[Path, dict[str, Any]]] = {}
    for path, content in results.items():
        by_kind.setdefault(content["kind"], {})[path] = content
    for path, content in by_kind["retrieval"].items():
        recipe = content["recipe"]
        retrieval_figure(path.with_suffix(".png"), recipe["experiment"], content["rows"], recipe["data"]["dataset"])
    for path, content in by_kind["geometry"].items():
        if content["recipe"]["experiment"] in FIGURES:
            save(FIGURES[content["recipe"]["experiment"]](content["results"], content["recipe"]), path.with_suffix(".png"))
    growth_figure(RESULTS / "speed.png", read("speed", "speed")["growth"])
    for path, content in by_kind["seeds"].items():
        if content["sweep"]["curves"]:
            curves_figure(path.with_name(f"{path.stem}_curves.png"), content)
            differences_figure(path.with_name(f"{path.stem}_differences.png"), content)
    adapters_figure(RESULTS / "attach.png", {title: read(f"attach_{name}", "seeds") for name, title in ADAPTERS.items()})
    paired_figure(RESULTS / "mil_paired.png", list(by_kind["folds"].values()))
    images = [content for content in by_kind["seeds"].values() if content["recipe"]["task"] == "images"]
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
