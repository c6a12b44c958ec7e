"""Write the README's tables anew from the results files: each stands between `<!-- results: NAME -->` and `<!-- end -->`."""

import json
import re
from pathlib import Path

from sweep import table


ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(readme: str) -> str:
    """The README with every marked table as its results file has it."""

    def from_results(match: re.Match[str]) -> str:
        results = json.loads((ROOT / "benchmarks" / "results" / f"{match[2]}.json").read_text())
        return f"{match[1]}{table(results['variants'])}\n{match[3]}"

    return MARKED.sub(from_results, readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
