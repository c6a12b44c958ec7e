"""Write the README's tables and the model cards anew from the results files, and draw anew the figures that they alone make.

A table stands between `<!-- results: NAME ... -->` and `<!-- end -->`.
"""

import json
import re

from cards import released_cards
from figures import paired_figure, retrieval_figure
from recipe import ROOT
from tables import results_table


RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- results: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(readme: str) -> str:
    """The README with every marked table as its results files have it."""

    def from_results(match: re.Match[str]) -> str:
        return f"{match[1]}{results_table([json.loads((RESULTS / f'{name}.json').read_text()) for name in match[2].split()])}\n{match[3]}"

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
    for card, text in released_cards().items():
        card.write_text(text)


if __name__ == "__main__":
    main()
