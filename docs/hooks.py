"""Pages for files outside docs/ that a page links to, so that the same relative links work in the repository and in the site.

A linked source file becomes a page that shows it, a linked Markdown file a page, a linked folder a list of its files, and any other
file (figures, results as JSON) is copied.
"""

import json
import logging
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


log = logging.getLogger("mkdocs.hooks.source")
ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cff": "yaml", ".js": "js", ".css": "css", ".txt": "text"}
NAMED = {"Makefile": "make", "LICENSE": "text"}
COPIED = (".png", ".json", ".svg")
FENCE = re.compile(r"(^(?P<fence>`{3,}).*?^(?P=fence)\s*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s]+)\)")
MARKER = re.compile(r"^<!-- (?:(?:results|paired|instances|choice): [\w/ ]+|headline|models|end) -->$", re.MULTILINE)


def markdown_of(path: Path) -> str:
    """The Markdown of a page or of the cells of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def links(markdown: str) -> list[str]:
    """The targets of all relative links and images, without those in fenced code."""
    return LINK.findall(FENCE.sub("", markdown))


def target(link: str, folder: Path) -> Path:
    """The file or folder that a link of a page in `folder` leads to."""
    return (folder / link.partition("#")[0]).resolve()


def is_outside(path: Path) -> bool:
    """Whether this is a file or folder of the repository that is not in docs/."""
    return path.is_relative_to(ROOT) and not path.is_relative_to(DOCS) and path.exists()


def uri(path: Path) -> str:
    """The place in the site of a file or folder of the repository."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    place = f"source/{path.relative_to(ROOT).as_posix()}"
    if path.is_dir():
        return f"{place}/index.md"
    return place if path.suffix in COPIED else f"{place}.md"


def shown(folder: Path) -> list[Path]:
    """The files and folders in a folder that the site can show."""
    known = (*LANGUAGES, *COPIED, ".md")
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__"))]
    return [path for path in entries if path.is_dir() or path.suffix in known or path.name in NAMED]


def rewritten(markdown: str, folder: Path, page_uri: str, strip: bool = False) -> str:
    """The text of a page of `folder` with its links as the site has them; `strip` leaves a broken link out and keeps its text."""

    def replace(match: re.Match[str]) -> str:
        path = target(match[1], folder)
        if not path.exists() or not path.is_relative_to(ROOT):
            return "]" if strip else match[0]
        if path.is_relative_to(DOCS) and not strip:
            return match[0]
        _, mark, fragment = match[1].partition("#")
        return f"]({posixpath.relpath(uri(path), posixpath.dirname(page_uri))}{mark}{fragment})"

    parts = FENCE.split(markdown)
    # The pattern has two groups: text, whole fence, its backticks, text, ...
    return "".join(LINK.sub(replace, part) if index % 3 == 0 else part if index % 3 == 1 else "" for index, part in enumerate(parts))


def page_of(path: Path) -> str:
    """The Markdown of the page that shows a file or folder of the repository."""
    title = f"# {path.relative_to(ROOT).as_posix()}"
    front = "---\nsearch:\n  exclude: true\n---\n\n"
    if path.is_dir():
        listed = [
            f"- [{entry.name}{'/' if entry.is_dir() else ''}]({posixpath.relpath(uri(entry), uri(path)[:-9])})" for entry in shown(path)
        ]
        return front + title + "\n\n" + "\n".join(listed) + "\n"
    text = path.read_text()
    if path.suffix == ".md" and "{{" not in text:
        body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
        return front + MARKER.sub("", rewritten(body, path.parent, uri(path), strip=True))
    language = NAMED.get(path.name) or LANGUAGES.get(path.suffix, "text")
    fence = "`" * 12
    return f'{front}{title}\n\n{fence} {{.{language} linenums="1"}}\n{text}\n{fence}\n'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave the page 404.html out: its paths begin at the root of a host, so it is broken in a site that is opened as files."""
    config.theme.static_templates.discard("404.html")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page, or a copy, for each file outside docs/ that a page leads to."""
    pages = [Path(file.abs_src_path) for file in files if file.abs_src_path and file.src_uri.endswith((".md", ".ipynb"))]
    waiting = [target(link, page.parent) for page in pages for link in links(markdown_of(page))]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not is_outside(path):
            continue
        seen.add(path)
        if path.is_dir():
            waiting += shown(path)
        elif path.suffix == ".md":
            waiting += [target(link, path.parent) for link in links(path.read_text())]
        if path.suffix in COPIED:
            files.append(File.generated(config, uri(path), abs_src_path=str(path)))
        else:
            files.append(File.generated(config, uri(path), content=page_of(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the generated pages, and drop the markers around tables."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    return MARKER.sub("", rewritten(markdown, (DOCS / page.file.src_uri).parent, page.file.src_uri))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of notebooks to pages, and links that are called like a class or function to the line that defines it.

    The scripts of nbconvert that load MathJax and Mermaid from another host are left out: equations are rendered by KaTeX.
    """
    if page.file.src_uri.endswith(".ipynb"):
        html = re.sub(
            r"<script\b.*?</script>", lambda match: "" if re.search("mathjax|mermaid", match[0], re.I) else match[0], html, flags=re.S
        )
        html = re.sub(r'(href|src)="(?!\w+:|#)([^"]+)"', lambda match: in_notebook(match, page, files), html)

    if page.file.src_uri.startswith("reference/"):
        # Types of configuration fields are written as `int` in the docstrings, as those of transformers are.
        html = re.sub(r"<code>.*?</code>", lambda match: match[0].replace("`", ""), html)

    def at_definition(match: re.Match[str]) -> str:
        path, name = ROOT / match[2], match[3]
        lines = path.read_text().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if re.match(rf"(class|def) {name}\b", line):
                return match[0].replace('.html"', f'.html#__codelineno-0-{number}"', 1)
        return match[0]

    return re.sub(r'<a href="([^"]*?)source/([^"]+\.py)\.html"><code>(\w+)</code></a>', at_definition, html)


def in_notebook(match: re.Match[str], page: Page, files: Files) -> str:
    link = match[2]
    path = target(link, (DOCS / page.file.src_uri).parent)
    file = files.get_file_from_path(uri(path)) if path.is_relative_to(ROOT) and path.exists() else None
    if file is None:
        log.warning("Notebook '%s' has a link '%s' that leads nowhere", page.file.src_uri, link)
        return match[0]
    _, mark, fragment = link.partition("#")
    return f'{match[1]}="{file.url_relative_to(page.file)}{mark}{fragment}"'
