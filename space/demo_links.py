"""Where a visitor finds the same in code and in the documentation: the tabs' snippets, guides and modules."""

import html
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SNIPPETS = HERE / "snippets"


class Pages(NamedTuple):
    """The guide and the module that do what a tab does, and its snippet."""

    guide: str
    module: str
    snippet: str


TABS = {
    "Memory": Pages("guides/memory", "modeling_uhop/modeling_uhop_memory.py", "memory.py"),
    "Landscape": Pages("guides/memory", "modeling_uhop/energy.py", "landscape.py"),
    "Classify": Pages("guides/vision", "modeling_uhop/modeling_uhop_vit.py", "classify.py"),
    "Bags": Pages("guides/bags", "modeling_uhop/modeling_uhop_mil.py", "bags.py"),
    "Forecast": Pages("guides/forecasts", "modeling_uhop/modeling_stanhop.py", "forecast.py"),
}


def project_urls() -> dict[str, str]:
    """The addresses that the package's metadata name."""
    try:
        entries = metadata("modeling-uhop").get_all("Project-URL") or []
    except PackageNotFoundError:
        return {}
    return {name.strip(): address.strip() for name, _, address in (entry.partition(",") for entry in entries)}


def guide_address(guide: str, root: Path = ROOT) -> str | None:
    """The public documentation if the package names one; else the built site or the page of this checkout; `None` without any."""
    public = project_urls().get("Documentation")
    if public:
        return f"{public.rstrip('/')}/{guide}.html"
    if (root / "site" / f"{guide}.html").is_file():
        return f"/site/{guide}.html"
    return f"/checkout/docs/{guide}.md" if (root / "docs" / f"{guide}.md").is_file() else None


def module_address(module: str, root: Path = ROOT) -> str | None:
    """The public repository if the package names one; else the file of this checkout; `None` without any."""
    public = project_urls().get("Repository")
    if public:
        return f"{public.rstrip('/')}/blob/main/{module}"
    return f"/checkout/{module}" if (root / module).is_file() else None


def routes(root: Path = ROOT) -> list[BaseRoute]:
    """What the app serves of this checkout: the guides and modules above as plain text, and the built site if there is one."""
    served = {f"docs/{pages.guide}.md" for pages in TABS.values()} | {pages.module for pages in TABS.values()}

    def serve(request: Request) -> Response:
        path = request.path_params["path"]
        if path not in served or not (root / path).is_file():
            return PlainTextResponse("There is no such page.", status_code=404)
        return PlainTextResponse((root / path).read_text(encoding="utf-8"))

    site = root / "site"
    built: list[BaseRoute] = [Mount("/site", StaticFiles(directory=site, html=True))] if site.is_dir() else []
    return [Route("/checkout/{path:path}", serve), *built]


def snippet(tab: str) -> str:
    return (SNIPPETS / TABS[tab].snippet).read_text(encoding="utf-8")


def code_view(tab: str, root: Path = ROOT) -> str:
    """The snippet of a tab, and where to read more. What cannot be reached from here is named without a link."""
    pages = TABS[tab]
    guide = _link(f"docs/{pages.guide}.md", guide_address(pages.guide, root))
    module = _link(pages.module, module_address(pages.module, root))
    return (
        f'<pre class="hop-code" tabindex="0"><code>{html.escape(snippet(tab).rstrip())}</code></pre>'
        f'<p class="hop-links">Guide: {guide}. Code: {module}.</p>'
    )


def _link(name: str, address: str | None) -> str:
    if address is None:
        return f"<code>{html.escape(name)}</code>"
    return f'<a href="{html.escape(address)}" target="_blank" rel="noopener"><code>{html.escape(name)}</code></a>'
