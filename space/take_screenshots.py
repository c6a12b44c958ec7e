"""Pictures of every tab, taken by a browser of the running demo.

python space/take_screenshots.py
"""

import argparse
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image


HERE = Path(__file__).parent
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What has to be there before a tab is complete. The forecaster is trained when its tab is first opened.
READY = {
    "Memory": ".hop-side.with img",
    "Landscape": "#landscape image",
    "Classify": "#answer [data-answer]",
    "Bags": "#bag [data-probability]",
    "Forecast": "#forecast [data-start]",
}
TRAINING_MS = 240_000


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running_demo(*options: str, patience: float = 240.0) -> Iterator[str]:
    """The demo in a process of its own; its address."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "app.py"), "--host", "127.0.0.1", "--port", str(port), *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            _wait_until_it_answers(address, process, patience)
            yield address
        except BaseException:
            output.seek(0)
            print(output.read().decode(errors="replace"))
            raise
        finally:
            process.terminate()
            process.wait(20)


def _wait_until_it_answers(address: str, process: subprocess.Popen, patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the demo ended with {process.returncode} before it answered")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(f"the demo did not answer in {patience:.0f} s")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser of playwright's, run from the system's Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def open_tab(page: Any, name: str) -> None:
    """Go to a tab and wait until it is complete."""
    page.get_by_role("tab", name=name).click()
    page.wait_for_selector(f"{READY[name]} >> visible=true", timeout=TRAINING_MS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=HERE / "screenshots", help="where the pictures go")
    parser.add_argument("--address", help="of a demo that runs already; one is started otherwise")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with running_demo() if args.address is None else _at(args.address) as address, chromium() as browser:
        for size, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1)
            page.goto(address)
            for name in READY:
                open_tab(page, name)
                page.mouse.move(0, 0)
                page.wait_for_timeout(700)
                save(page.screenshot(full_page=True), args.folder / f"{size}_{name.lower()}.png")


def save(picture: bytes, path: Path) -> None:
    """A screenshot in 256 colours: the page has few, and a repository keeps every version."""
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=6).save(path, optimize=True)


@contextmanager
def _at(address: str) -> Iterator[str]:
    yield address


if __name__ == "__main__":
    main()
