"""Code and commands that run in forks of server processes: a fresh process of Python would import torch and transformers each time.

The first server imports neither transformers nor the package, so that a test decides what is imported first. The second
server, which is a fork of the first, imports transformers and not the package.
"""

import contextlib
import gc
import importlib
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120.0
# Of a group of commands.
LONG_TIMEOUT = 600.0
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
# What the commands of the package import in addition.
LIBRARIES = (
    "datasets",
    "datasets.io.parquet",
    "evaluate",
    "matplotlib.pyplot",
    "peft",
    "sklearn.datasets",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "sklearn.svm",
    "transformers.models.auto.modeling_auto",
    "transformers.models.vit.modeling_vit",
    "transformers.pipelines",
    "transformers.trainer",
)
# The first letters of variables that libraries read once, at their import.
CONSTANTS = ("HF_", "DS_", "PYTHONPATH")


def _set_up(cwd: str, variables: Mapping[str, str], folder: str) -> None:
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(Path(folder, stream), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)


def _execute(code: str, arguments: tuple[str, ...], cwd: str, variables: dict[str, str], folder: str) -> None:
    _set_up(cwd, variables, folder)
    sys.argv[:] = ["-c", *arguments]
    warnings.simplefilter("error", ImportWarning)
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})


def fork_server() -> multiprocessing.context.ForkServerContext:
    """The context of multiprocessing whose processes are forks of the first server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _printed(folder: str) -> list[str]:
    return [Path(folder, stream).read_text() for stream in ("stdout", "stderr")]


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
        return subprocess.CompletedProcess([*arguments], process.exitcode, *_printed(folder))


def _run(words: Sequence[str], cwd: str, variables: Mapping[str, str], folder: str) -> None:
    """Do what `python` does with these words."""
    _set_up(cwd, variables, folder)
    kind, *arguments = words
    code = arguments.pop(0) if kind == "-c" else ""
    sys.argv[:] = [kind, *arguments]
    sys.path.insert(0, cwd if code else str(Path(cwd, kind).resolve().parent))
    if code:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


def _serve(connection: Connection, variables: dict[str, str]) -> None:
    """Import the libraries, then run each group of commands that arrives in forks of this process."""
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    # multiprocessing lets no process start others that it would end at exit.
    multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    context = multiprocessing.get_context("fork")
    with contextlib.suppress(EOFError):
        while True:
            processes = [context.Process(target=_run, args=job) for job in connection.recv()]
            for process in processes:
                process.start()
            running, end = list(processes), time.monotonic() + LONG_TIMEOUT
            while running and time.monotonic() < end and not any(process.exitcode for process in processes):
                wait([process.sentinel for process in running], end - time.monotonic())
                running = [process for process in processes if process.exitcode is None]
            for process in running:
                process.kill()
                process.join()
            connection.send([process.exitcode for process in processes])


@cache
def _second_server(**constants: str) -> Connection:
    """The server for commands with these variables, on which imports depend."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(CONSTANTS)}
    mine, its = multiprocessing.Pipe()
    fork_server().Process(target=_serve, args=(its, {**variables, **constants}), daemon=True).start()
    its.close()
    return mine


def run_together(
    commands: Sequence[Sequence[str]], variables: Sequence[Mapping[str, str]], *, cwd: Path | str = ROOT
) -> list[subprocess.CompletedProcess[str]]:
    """Run commands at once in forks of a second server, each as `python` would with its words.

    After one fails, or after ten minutes, the others are killed.

    Args:
        commands: For each a script and its arguments, or `-c`, code and its arguments.
        variables: The environment of each. The variables that `CONSTANTS` names are the same in all.
    """
    server = _second_server(**{name: value for name, value in variables[0].items() if name.startswith(CONSTANTS) and name != "HF_TOKEN"})
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in commands]
        server.send([(command, str(cwd), dict(own), folder) for command, own, folder in zip(commands, variables, folders, strict=True)])
        statuses = server.recv()
        return [subprocess.CompletedProcess(*each, *_printed(folder)) for *each, folder in zip(commands, statuses, folders, strict=True)]


def run_command(*words: str, cwd: Path | str = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one command in a fork of the second server; `variables` are added to the environment of this process."""
    (finished,) = run_together([words], [{**os.environ, **variables}], cwd=cwd)
    return finished


def run_processes(count: int, *words: str, **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in several processes that find each other, as those of `torchrun` do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return run_together([words] * count, [{**shared, **rank, **variables} for rank in ranks])
