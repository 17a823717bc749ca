"""What mkdocs does here beside its own: pages for files outside docs/, and the notebook as a page.

A page may link to any file of the repository, as one does where the repository itself is read. In the site
such a file becomes a page under repository/, so no link leads out of it and nothing depends on where the
repository lies; and a link to the notebook leads to its page, but for the one there, which is to the file.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the notebook's page, and a page for each file outside docs/ that a page links to."""
    body, resources = nbconvert.MarkdownExporter().from_filename(str(ROOT / "docs/tutorial.ipynb"))
    files.append(File.generated(config, "tutorial.md", content=body))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, name, content=content))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        file = waiting.pop()
        for path in map(posixpath.normpath, _targets(file.src_uri, file.content_string)):
            if _uri(path) in files.src_uris or path.startswith("docs/"):
                continue
            text = (ROOT / path).read_text()
            if not path.endswith(".md"):
                text = f"# `{path}`\n\n```{Path(path).suffix.lstrip('.')}\n{text}```\n"
            page = File.generated(config, _uri(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
            waiting.append(page)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links to files outside docs/ to their pages."""
    here = page.file.src_uri

    def moved(link: re.Match[str]) -> str:
        uri = _uri(posixpath.normpath(posixpath.join(posixpath.dirname(_path(here)), link[0])))
        return link[0] if uri == here else posixpath.relpath(uri, posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def _targets(uri: str, markdown: str) -> Iterator[str]:
    """Paths, in the repository, of what a page links to."""
    for link in _LINK.finditer(markdown):
        yield posixpath.join(posixpath.dirname(_path(uri)), link[0])


def _path(uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def _uri(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"
