"""Writes the API pages: `python scripts/build_docs.py [FOLDER]`, by default into build/docs; open index.html there.

pdoc makes them from the docstrings of all modules. What it warns of ends the build, as do links that lead nowhere.
`pip install -e ".[docs]"` brings it.
"""

from __future__ import annotations

import argparse
import pkgutil
import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]


def module_specs() -> list[str]:
    """What pdoc is to be told for pages of all modules: it finds those below a package by itself, but of one that has
    an `__all__` only those whose names stand there.
    """
    import maxlike

    found = ["maxlike"]
    for info in pkgutil.walk_packages(maxlike.__path__, "maxlike."):
        package, _, name = info.name.rpartition(".")
        private = any(part.startswith("_") for part in info.name.split("."))
        if not private and name not in getattr(sys.modules[package], "__all__", [name]):
            found.append(info.name)
    return found


def build(folder: Path) -> None:
    """Writes the pages, which `index.html` leads to.

    Raises:
        UserWarning: pdoc cannot read or import something.
    """
    import pdoc

    specs = module_specs()
    for package in [module for name, module in sys.modules.items() if name.split(".")[0] == "maxlike"]:
        # Names that a package imports only when they are asked for pdoc would not see.
        vars(package).update({name: getattr(package, name) for name in getattr(package, "__all__", ())})
    pdoc.render.configure(docformat="google", footer_text="maxlike", show_source=False,
                          template_directory=ROOT / "scripts" / "docs_templates")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the category of its own
        pdoc.pdoc(*specs, output_directory=folder)


class _Page(HTMLParser):
    """A page's anchors and links, and the code in it that is no link."""

    def __init__(self, html: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.code: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of one that ends with its start, such as `<meta>`, only what it says counts."""
        given = dict(attrs)
        self.ids.update(filter(None, [given.get("id"), given.get("name")]))
        refresh = re.search(r"url=(\S+)", given.get("content") or "") if tag == "meta" else None
        self.links.extend(filter(None, [given.get("href"), refresh and refresh[1]]))
        if tag in ("a", "code", "pre"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """The last of its kind is closed."""
        if tag in self._open:
            self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        """Text."""
        if self._open == ["code"]:
            self.code.append(data)


def broken_links(folder: Path) -> list[str]:
    """What is wrong with the links in a folder's pages, a line each.

    A link to a page or an anchor that is not there; `maxlike.a.b` in a docstring that names nothing; a page to which
    no path leads from `index.html`.
    """
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in folder.rglob("*.html")}
    found, leads = [], {}
    for file, page in pages.items():
        here, leads[file] = file.relative_to(folder), set()
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target not in pages:
                found.append(f"{here}: {link} leads to no page")
            elif parts.fragment and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{here}: {link} leads to nothing on that page")
            else:
                leads[file].add(target)
        found += [f"{here}: `{code}` names nothing that has a page" for code in page.code
                  if re.fullmatch(r"maxlike(\.\w+)+(\(\))?", code)]
    reached, todo = set(), [folder / "index.html"]
    while todo:
        file = todo.pop()
        if file not in reached:
            reached.add(file)
            todo += leads.get(file, ())
    lost = pages.keys() - reached
    return found + [f"{file.relative_to(folder)}: no path leads here from index.html" for file in lost]


def main() -> int:
    """Builds and checks; the exit code is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description="Write the API pages from the docstrings.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "docs", metavar="FOLDER",
                        help="where to; default build/docs")
    folder = parser.parse_args().folder.resolve()
    try:
        build(folder)
    except ModuleNotFoundError as error:
        if error.name != "pdoc":
            raise
        print('pdoc is missing: pip install -e ".[docs]"', file=sys.stderr)
        return 1
    except Warning as warning:
        print(f"pdoc warns: {warning}", file=sys.stderr)
        return 1
    if broken := broken_links(folder):
        print("\n".join(sorted(broken)), file=sys.stderr)
        return 1
    print(folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
