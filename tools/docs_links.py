"""mkdocs hook that adds the files outside docs/ that pages link to.

CONTRIBUTING.md and CHANGELOG.md become pages. A link from docs/ to another file of the repository leads to a copy under
source/; a link to a folder becomes plain text. Pages missing from the navigation are listed under "More".
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
"""Pages at the root of the repository."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: "MkDocsConfig") -> Files:
    """Add the pages at the root and every file outside docs/ that a page links to."""
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    pages = {file.src_uri: file.content_string for file in files if file.is_documentation_page()}
    linked = {target for uri, text in pages.items() for target in _linked_files(uri, text)}
    for name in sorted(linked):
        files.append(File.generated(config, f"source/{name}.txt", content=(ROOT / name).read_text(encoding="utf-8")))
    _complete_navigation(config, files)
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: Files) -> str:
    """Return the Markdown of a page with links rewritten for the site."""
    uri = page.file.src_uri

    def rewrite(link: re.Match[str]) -> str:
        path = _repository_path(uri, link[2])
        if path is None:
            return link[0]
        if (ROOT / path).is_dir():
            return link[1] if link[1].startswith("`") else f"`{link[1]}`"
        if path in PAGES:
            return f"[{link[1]}]({_relative(uri, path)}{link[3] or ''})"
        if path.startswith("docs/"):
            return f"[{link[1]}]({_relative(uri, path.removeprefix('docs/'))}{link[3] or ''})"
        return f"[{link[1]}]({_relative(uri, f'source/{path}.txt')})" if (ROOT / path).is_file() else link[0]

    return LINK.sub(rewrite, markdown)


def _repository_path(uri: str, target: str) -> str | None:
    """Return the repository path of a link on page ``uri``; None if it leads to a page of docs/ or another host."""
    if "://" in target or target.startswith("mailto:"):
        return None
    base = PurePosixPath("docs" if uri not in PAGES else "") / PurePosixPath(uri).parent
    parts: list[str] = []
    for part in (base / target).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
    path = "/".join(parts)
    is_page = path.startswith("docs/") and path.endswith(".md") and uri not in PAGES
    return None if is_page else path


def _linked_files(uri: str, text: str) -> Iterator[str]:
    for link in LINK.finditer(text):
        path = _repository_path(uri, link[2])
        if path and path not in PAGES and not re.match(r"docs/.*\.md$", path) and (ROOT / path).is_file():
            yield path


def _relative(uri: str, target: str) -> str:
    return "../" * (len(PurePosixPath(uri).parts) - 1) + target


def _complete_navigation(config: "MkDocsConfig", files: Files) -> None:
    """Append the pages that the navigation does not name."""
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
