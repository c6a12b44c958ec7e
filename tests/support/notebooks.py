"""The cells of a notebook, and a run of them."""

import json
from pathlib import Path
from typing import Any


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def run_cells(path: Path, settings: dict[str, Any]) -> None:
    """Run the code of a notebook, with other values of names that its first cell sets."""
    names: dict[str, Any] = {}
    for index, cell in enumerate(cell for cell in cells_of(path) if cell["cell_type"] == "code"):
        exec(compile(source_of(cell), f"{path.name}, code cell {index + 1}", "exec"), names)
        if index == 0:
            assert names.keys() >= settings.keys()
            names |= settings
