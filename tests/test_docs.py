"""Pages written by code are as the code writes them, links lead somewhere, and commands are right."""

import re
import runpy
import shlex
from dataclasses import fields
from itertools import pairwise

import pytest
import yaml
from in_process import script_here
from tiny import ROOT

from guided_diffusion.config.architectures import DiTArchitecture, UNet2DArchitecture
from guided_diffusion.config.loading import load_experiment
from guided_diffusion.config.settings import SECTIONS, describe_keys

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "model/README.md")),
    *ROOT.glob("docs/**/*.md"),
]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


@pytest.mark.parametrize("page, study", [("study.md", "digits.yaml"), ("study32.md", "digits32.yaml")])
def test_a_studys_page_has_its_files_findings(page, study):
    findings = yaml.safe_load((ROOT / "yaml/study" / study).read_text())["findings"]
    assert findings.strip() in (ROOT / "docs" / page).read_text()


def test_the_configuration_page_is_what_make_docs_writes():
    page = runpy.run_path(str(ROOT / "docs/build.py"))["page"]()
    assert (ROOT / "docs/configuration.md").read_text() == page


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert "://" in target or (path.parent / target).exists(), target


def test_every_page_is_in_the_sites_navigation():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    named = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert pages <= named


# --- commands ---------------------------------------------------------------------------------------


def commands():
    """(page, command) for every command of ours in the pages' code."""
    found = []
    for path, name in zip(PAGES, NAMES, strict=True):
        text = re.sub(r"\\\n\s*", "", path.read_text())
        for line in re.findall(
            r"(?:^|`)(?:    |\$ )?(?:[A-Z_]+=\S* )*((?:mpiexec|torchrun|srun|python) .*)", text, re.M
        ):
            line = line.split("`")[0].split("  #")[0]
            if script := re.search(r"\b(?:scripts|evaluations|datasets|benchmarks)/\w+\.py\b.*", line):
                found.append((name, script[0].split(" > ")[0].strip()))
    return sorted(set(found))


COMMANDS = commands()


@pytest.fixture(scope="module")
def flags_of():
    """The flags of a script, from its --help."""
    known = {}

    def flags(script):
        if script not in known:
            known[script] = set(re.findall(r"--[\w-]+", script_here(script, "--help").stdout))
        return known[script]

    return flags


@pytest.mark.parametrize(
    "page, command", COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)]
)
def test_commands_exist_with_these_flags_and_keys(page, command, flags_of):
    script, *arguments = shlex.split(re.sub(r"[\[\]…]", " ", command))
    assert (ROOT / script).is_file(), command
    if not script.startswith("benchmarks/"):
        unknown = {a.split("=")[0] for a in arguments if a.startswith("--")} - flags_of(script)
        assert not unknown, command
    config = next((ROOT / b for a, b in pairwise(arguments) if a == "--config"), None)
    if config is not None and config.is_file():
        overrides = [a for a in arguments if re.fullmatch(r"[a-z]\S*=\S+", a) and a != "key=value"]
        load_experiment(config, overrides)
    elif config is not None and "/" in str(config.relative_to(ROOT)):
        assert re.search(r"\$|…|\.\.\.", str(config)), command  # a placeholder, else it must exist


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 40
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/quick-start.md", "docs/many-gpus.md"}


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_configurations_in_pages_have_keys_that_exist(path):
    """In the sections of pieces of YAML, but for those of another architecture or objective."""
    for piece in re.findall(r"```yaml\n(.*?)```", path.read_text(), re.S):
        for section, keys in yaml.safe_load(piece).items():
            if section not in SECTIONS or {"architecture", "objective"} & set(keys):
                continue
            known = {name for name, _, _ in describe_keys(SECTIONS[section], section)}
            if "model" in keys:  # which may be of any architecture
                known |= {
                    field.name for kind in (UNet2DArchitecture, DiTArchitecture) for field in fields(kind)
                }
            assert set(keys) <= known | {"model", "diffusion", "training"}, piece


def test_the_layout_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    layout = text[text.index("```\nguided_diffusion/") :].partition("```\n")[2].partition("```")[0]
    missing = [
        path.relative_to(ROOT / "guided_diffusion").as_posix()
        for path in (ROOT / "guided_diffusion").rglob("*.py")
        if path.stem != "__init__" and not re.search(rf"\b{path.stem}\b", layout)
    ]
    assert not missing
