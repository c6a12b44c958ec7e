"""Open the demo in a browser: a memory, its energy landscape, a classifier, bags and forecasts.

The options are those of `space/app.py`; see `modeling-uhop demo --help`.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from .errors import RecipeError
from .info import check_installed


APP = Path(__file__).resolve().parent.parent / "space" / "app.py"


def main(arguments: list[str]) -> None:
    """Run the demo until it is interrupted.

    By default it shows the models of `runs` in the current folder, if there are any.

    Raises:
        RecipeError: If gradio or a package of the extra `train` is not installed.
    """
    check_installed()
    if find_spec("gradio") is None:
        raise RecipeError("gradio cannot be imported, but the demo needs it: pip install 'modeling-uhop[demo]'")
    # The files of the demo import each other by name, because a Gradio Space runs them as a script.
    sys.path.insert(0, str(APP.parent))
    sys.argv = ["modeling-uhop demo", "--runs", "runs", *arguments]
    runpy.run_path(str(APP), run_name="__main__")
