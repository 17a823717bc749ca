"""Pages that are written by code are as the code writes them, and links between pages lead somewhere."""

import re
import runpy

import pytest
from tiny import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "model/README.md", *ROOT.glob("docs/*.md")]


def test_the_configuration_page_is_what_make_docs_writes():
    page = runpy.run_path(str(ROOT / "docs/build.py"))["page"]()
    assert (ROOT / "docs/configuration.md").read_text() == page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_the_readme_names_every_module():
    text = (ROOT / "README.md").read_text()
    layout = text[text.index("```\nguided_diffusion/") :].partition("```\n")[2].partition("```")[0]
    missing = [
        path.relative_to(ROOT / "guided_diffusion").as_posix()
        for path in (ROOT / "guided_diffusion").rglob("*.py")
        if path.stem != "__init__" and not re.search(rf"\b{path.stem}\b", layout)
    ]
    assert not missing
