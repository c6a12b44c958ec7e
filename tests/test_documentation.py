"""What README, pages and docstrings show: their code runs and prints what they say, links resolve, tables match the results files."""

import contextlib
import doctest
import html
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

import modeling_uhop
from modeling_uhop.training.report.document import PAGES as RENDERED
from modeling_uhop.training.report.document import render
from modeling_uhop.training.report.tables import BAGS, HEADLINE, headline_table, instances_table


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAPER_TO_CODE = DOCS / "paper_to_code.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
SESSIONS = {"bash", "console"}
DATA = {"text", "yaml", "json", "toml", "jinja"}

WITH_EXAMPLES = (
    "attention_interface",
    "attention_models",
    "capacity",
    "configuration_stanhop",
    "configuration_uhop_memory",
    "configuration_uhop_mil",
    "configuration_uhop_vit",
    "corruption",
    "energy",
    "feature_extraction_uhop_mil",
    "feature_map",
    "modeling_stanhop",
    "modeling_uhop_memory",
    "modeling_uhop_mil",
    "modeling_uhop_vit",
    "separation",
    "simplex",
    "spherical",
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(text: str) -> list[tuple[str, str | None]]:
    """The Python blocks of a page, each with the output that the page shows below it, if there is one.

    A block with a title is a file, which tests/test_new_task.py writes and runs.
    """
    fences = [fence for fence in FENCE.finditer(text) if "title=" not in fence[0].partition("\n")[0]]
    blocks = []
    for fence, following in zip(fences, [*fences, None][1:], strict=True):
        if fence[1] == "python":
            below = following is not None and following[1] == "text" and "\n#" not in text[fence.end() : following.start()]
            blocks.append((fence[2], following[2] if below and following is not None else None))
    return blocks


def differing(printed: str, shown: str) -> str | None:
    """The first line that is not as shown. Numbers may differ by 1 in their last digit, because machines round differently."""
    lines = [text.rstrip().splitlines() for text in (printed, shown)]
    if len(lines[0]) != len(lines[1]):
        return f"{len(lines[0])} lines are printed and {len(lines[1])} are shown:\n{printed}"
    for one, other in zip(*lines, strict=True):
        same = NUMBER.sub("0", one.rstrip()) == NUMBER.sub("0", other.rstrip())
        numbers = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True) if same else ()
        if not same or not all(_close(first, second) for first, second in numbers):
            return f"printed: {one}\nshown:   {other}"
    return None


def _close(first: str, second: str) -> bool:
    if "." not in first + second and "e" not in first + second:
        return first == second
    digits = [len(number.partition("e")[0].partition(".")[2]) for number in (first, second)]
    exponent = int(second.partition("e")[2] or 0)
    return digits[0] == digits[1] and abs(float(first) - float(second)) <= 1.01 * 10.0 ** (exponent - digits[1])


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
# PEFT asks transformers by an old name, and torch.onnx copies a tree spec of torch's own.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# An adapter inside a model with LoRA is meant on the page.
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page.read_text())], ids=name_of)
def test_the_code_of_a_page_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    text = page.read_text()
    for name in ("peft", "onnxscript"):
        if f"{name.removesuffix('script')}" in "".join(code for code, _ in blocks_of(text)):
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for code, shown in blocks_of(text):
        # This runs among the tests of the Hub.
        if "push_to_hub" in code:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name_of(page), "exec"), namespace)
        if shown is not None:
            assert differing(printed.getvalue(), shown) is None, differing(printed.getvalue(), shown)


@pytest.mark.parametrize(
    ("printed", "shown", "same"),
    [
        ("error 0.41\n", "error 0.42\n", True),
        ("error 0.41\n", "error 0.43\n", False),
        ("error 0.41\n", "error 0.4\n", False),
        ("10 memories\n", "11 memories\n", False),
        ("error 0.41\n", "loss 0.41\n", False),
        ("2e-05", "3e-05", True),
        ("a\nb", "a", False),
    ],
)
def test_outputs_are_compared_to_the_digits_that_are_printed(printed, shown, same):
    assert (differing(printed, shown) is None) is same


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_code_that_runs_or_marked_as_a_session_or_data(page):
    assert {fence[1] for fence in FENCE.finditer(page.read_text())} <= {"python", *SESSIONS, *DATA}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "modeling_uhop").glob("*.py") if path.stem != "__init__"))
def test_docstring_examples(name):
    outcome = doctest.testmod(importlib.import_module(f"modeling_uhop.{name}"))
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name not in WITH_EXAMPLES


# Tables.


@pytest.mark.parametrize("page", RENDERED, ids=name_of)
def test_every_table_is_as_the_results_files_have_it(page):
    assert render(page.read_text()) == page.read_text()


def test_every_comparison_has_a_table():
    shown = " ".join(page.read_text() for page in RENDERED)
    tables = {name for names in re.findall(r"<!-- (?:results|paired): ([\w ]+) -->", shown) for name in names.split()}
    compared = {
        path.stem for pattern in ("vit_*", "mil_*", "stanhop_*") for path in (ROOT / "benchmarks" / "results").glob(f"{pattern}.json")
    }
    assert compared - tables == {"vit_cifar10_one_epoch"}
    assert {"speed", "retrieval_memory_size_digits", "retrieval_memory_size_mnist", "retrieval_memory_size_cifar10"} <= tables


def test_the_readmes_summary_says_where_separation_does_not_help():
    pair = {"first": "", "second": "", "metric": "test_accuracy", "difference": 0.02, "half_width": 0.01}
    separated, more = "all below before training", "untrained Phi, 3 more epochs"
    images = {"paired": [pair | {"first": separated, "second": more}]}
    many = {"paired": [pair | {"first": f"10,000 images: {separated}", "second": f"10,000 images: {more}", "difference": -0.02}]}
    bags = {"paired": [{"first": "dense, U-Hop", "second": "dense, untrained Phi", "difference": 0.001, "half_width": 0.01}]}
    forecasts = {"paired": [{"first": "U-Hop", "second": "untrained Phi", "metric": "test_mse", "difference": 0.0005, "half_width": 0.001}]}
    config = modeling_uhop.UHopMemoryConfig(pattern_dim=1)
    alpha = config.alpha
    rows = [
        {
            "panel": f"unit norm, beta {config.beta:g}",
            "model": model,
            "alpha": alpha,
            "value": 500,
            "repeat": repeat,
            "error": error + repeat,
        }
        for repeat in range(3)
        for model, error in (("no Phi", 20.0), ("denoising", 5.0 + 0.1 * repeat))
    ]
    files: dict[str, Any] = dict.fromkeys(BAGS, bags) | {
        "vit_cifar10_small_ways": images,
        "vit_cifar10_small": images,
        "vit_cifar10_small_10k": many,
    }
    for name, metric, difference in (
        ("images", "test_accuracy", -0.02),
        ("text", "test_bits_per_byte", -0.02),
        ("series", "test_mse", 0.001),
    ):
        pair = {
            "first": "Phi, separation",
            "second": "Phi without separation",
            "metric": metric,
            "difference": difference,
            "half_width": 0.01,
        }
        files[f"attach_{name}"] = {"sweep": {"metrics": [metric]}, "paired": [pair]}
    files |= {"stanhop_etth1_96": forecasts, "retrieval_memory_size_cifar10": {"rows": rows}}
    assert files.keys() == HEADLINE.keys()
    lines = headline_table(files).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [cell[1] for cell in cells] == [
        "-14.90 ± 0.25 (from 21.00 to 6.10)",
        "+2.0 ± 1.0 points",
        "+2.0 ± 1.0 points",
        "-2.0 ± 1.0 points",
        "+0.001 to +0.001",
        "+0.0005 ± 0.0010",
        "-0.0200 ± 0.0100",
        "-0.0200 ± 0.0100",
        "+0.0010 ± 0.0100",
    ]
    of_adapters = ["separation is worse", "separation helps", "no clear gain"]
    verdicts = [cell[2].partition(":")[0] for cell in cells]
    assert verdicts == [*["separation helps"] * 3, "separation is worse", "no clear gain", "no clear gain", *of_adapters]
    files["retrieval_memory_size_cifar10"] = {"rows": []}
    assert "not measured" in headline_table(files)


@pytest.mark.parametrize(("repeats", "spread"), [(1, ""), (5, " ± 0.020")])
def test_instances_have_a_row_for_each_simplex_map(repeats, spread):
    results = {
        f"{weights}{phi}": {"instance_auc": {"mean": 0.9 + 0.01 * row, "std_repeats": 0.02, "by_repeat": [0.0] * repeats}}
        for row, weights in enumerate(("dense", "1.5-entmax", "sparse"))
        for phi in ("", ", untrained Phi", ", U-Hop", ", U-Hop+")
    }
    assert instances_table([{"results": results}]).splitlines()[-1] == "| sparse |" + f" 0.920{spread} |" * 4


# Links.


def links(page: Path) -> list[str]:
    text = page.read_text()
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", FENCE.sub("", text))


def fragments(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_every_link_leads_somewhere(page):
    for link in links(page):
        path, _, fragment = link.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), link
        if fragment and found.suffix == ".md":
            assert fragment in fragments(found), link


def leaves(entries: Any) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    return [leaf for entry in (entries.values() if isinstance(entries, dict) else entries) for leaf in leaves(entry)]


def test_every_page_is_in_the_navigation_once():
    assert sorted(leaves(NAV)) == sorted(page.relative_to(DOCS).as_posix() for page in [*PAGES[1:], *NOTEBOOKS])


def test_the_map_from_paper_to_code_names_what_the_files_hold():
    named = re.findall(r"\[`([\w.]+)`\]\((\.\./[\w./]+\.(?:py|yaml))\)", PAPER_TO_CODE.read_text())
    assert len(named) > 40
    for name, link in named:
        path = (PAPER_TO_CODE.parent / link).resolve()
        if path.suffix == ".py" and path.name != name:
            assert re.search(rf"^(class|def) {name}\b", path.read_text(), re.MULTILINE), (name, link)
        else:
            assert name in (path.stem, path.name)


# The reference.


def test_every_public_name_is_on_one_page_of_the_reference():
    entries = [
        name for page in (DOCS / "reference").glob("*.md") for name in re.findall(r"^::: modeling_uhop\.(\w+)$", page.read_text(), re.M)
    ]
    modules = {path.stem for path in (ROOT / "modeling_uhop").glob("*.py")}
    public = set(modeling_uhop.__all__)
    assert sorted(name for name in entries if name in public or name not in modules) == sorted(public)


def test_every_public_thing_says_what_it_is():
    for name in modeling_uhop.__all__:
        if name != "__version__":
            assert (getattr(modeling_uhop, name).__doc__ or "").strip(), name


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. A warning of MkDocs fails the build."""
    for module in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.process
def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    for leaf in leaves(NAV):
        assert (site / leaf).with_suffix(".html").is_file(), leaf
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"?([^\"\s>]+)", text)
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s+)[\"']?(https?:)?//", style.read_text()), style


@pytest.mark.process
def test_every_link_inside_the_site_resolves(site):
    broken = set()
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        text = re.sub(r"<(pre|script)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\b(?:src|href)=\"?([^\"\s>]+)", text):
            path = unquote(html.unescape(link).partition("#")[0].partition("?")[0])
            if path and not re.match(r"\w+:|//", path) and not (page.parent / path).exists():
                broken.add((page.relative_to(site).as_posix(), link))
    assert broken == set()


@pytest.mark.process
def test_the_site_renders_equations_and_shows_linked_sources(site):
    assert 'class="arithmatex"' in (site / "reference" / "simplex.html").read_text() or "$" not in modeling_uhop.simplex_map.__doc__
    source = (site / "source" / "modeling_uhop" / "energy.py.html").read_text()
    links_to_lines = re.findall(
        r'href="source/modeling_uhop/energy\.py\.html#(__codelineno-0-\d+)"', (site / "paper_to_code.html").read_text()
    )
    assert links_to_lines
    assert all(f'id="{line}"' in source for line in links_to_lines)
    assert (site / "source" / "benchmarks" / "results" / "speed.png").is_file()


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on the path")
def test_no_page_is_wider_than_a_phone_or_asks_another_host(site):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 390, "height": 844})
        wrong: list[str] = []
        opened.on("request", lambda asked: None if asked.url.startswith(("file:", "data:", "blob:")) else wrong.append(asked.url))
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        for leaf in leaves(NAV):
            opened.goto((site / leaf).with_suffix(".html").as_uri(), wait_until="load")
            if opened.evaluate("document.documentElement.scrollWidth") > 390:
                wrong.append(f"{leaf} scrolls sideways")
            if opened.locator(".katex-error").count():
                wrong.append(f"{leaf} has an equation that KaTeX cannot read")
        browser.close()
    assert wrong == []
