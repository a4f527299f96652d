"""A hook of mkdocs: the site holds what its pages link to, wherever in the repository that is.

CONTRIBUTING.md and CHANGELOG.md become pages. A link out of docs/ to a file of the repository leads to a copy of it
under source/; one to a folder becomes plain text. A page that the navigation does not name is put under "More".
"""

import re
from collections.abc import Iterator, Mapping, MutableSequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
"""Pages that stand at the root of the repository."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: "MkDocsConfig") -> Files:
    """Add the pages of the root, and every file that a page links to outside of docs/."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    pages = {file.src_uri: file.content_string for file in files if file.is_documentation_page()}
    wanted = {found for uri, text in pages.items() for found in _outside(uri, text)}
    for name in sorted(wanted):
        files.append(File.generated(config, f"source/{name}.txt", content=(ROOT / name).read_text(encoding="utf-8")))
    _complete(config, files)
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: Files) -> str:
    """Return the text of a page with its links as the site has them."""
    uri = page.file.src_uri

    def rewritten(link: re.Match[str]) -> str:
        place = _place(uri, link[2])
        if place is None:
            return link[0]
        if (ROOT / place).is_dir():
            return link[1] if link[1].startswith("`") else f"`{link[1]}`"
        if place in PAGES:
            return f"[{link[1]}]({_relative(uri, place)}{link[3] or ''})"
        if place.startswith("docs/"):
            return f"[{link[1]}]({_relative(uri, place.removeprefix('docs/'))}{link[3] or ''})"
        return f"[{link[1]}]({_relative(uri, f'source/{place}.txt')})" if (ROOT / place).is_file() else link[0]

    return LINK.sub(rewritten, markdown)


def _place(uri: str, target: str) -> str | None:
    """Return where in the repository a link of a page leads; None if it leads to a page beside it, or elsewhere."""
    if "://" in target or target.startswith("mailto:"):
        return None
    base = PurePosixPath("docs" if uri not in PAGES else "") / PurePosixPath(uri).parent
    parts: list[str] = []
    for part in (base / target).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
    place = "/".join(parts)
    is_own = place.startswith("docs/") and place.endswith(".md") and uri not in PAGES
    return None if is_own else place


def _outside(uri: str, text: str) -> Iterator[str]:
    for link in LINK.finditer(text):
        place = _place(uri, link[2])
        if place and place not in PAGES and not place.endswith(".md") and (ROOT / place).is_file():
            yield place


def _relative(uri: str, target: str) -> str:
    return "../" * (len(PurePosixPath(uri).parts) - 1) + target


def _complete(config: "MkDocsConfig", files: Files) -> None:
    """Put the pages that the navigation does not name at its end."""
    nav: MutableSequence[object] = config.nav if config.nav is not None else []
    named = set(_named(nav))
    more = sorted(uri for uri in (f.src_uri for f in files if f.is_documentation_page()) if uri not in named)
    if more:
        nav.append({"More": more})


def _named(entries: object) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, Mapping):
        for inner in entries.values():
            yield from _named(inner)
    elif isinstance(entries, list):
        for inner in entries:
            yield from _named(inner)
