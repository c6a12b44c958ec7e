"""Code that runs in a fork of one server process, which has imported torch: a fresh process of Python would import it each time.

The server imports neither transformers nor the package, so that a test decides what is imported first.
"""

import multiprocessing
import multiprocessing.context
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0
PRELOADED = (
    "numpy",
    "pandas",
    "PIL.Image",
    "safetensors.torch",
    "scipy.optimize",
    "sklearn.metrics",
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
)


def _execute(code: str, arguments: tuple[str, ...], cwd: str, variables: dict[str, str], folder: str) -> None:
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(Path(folder, stream), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.update(variables)
    sys.argv[:] = ["-c", *arguments]
    warnings.simplefilter("error", ImportWarning)
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})


def fork_server() -> multiprocessing.context.ForkServerContext:
    """The context of multiprocessing whose processes are forks of the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_forked(code: str, *arguments: str, cwd: Path | str = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code as `python -c` does: `arguments` are in `sys.argv`, and `variables` are added to the environment of this process.

    A process that needs longer than two minutes is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = fork_server().Process(target=_execute, args=(code, arguments, str(cwd), {**os.environ, **variables}, folder))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(code, TIMEOUT)
        printed, errors = (Path(folder, stream).read_text() for stream in ("stdout", "stderr"))
        return subprocess.CompletedProcess([*arguments], process.exitcode, printed, errors)
