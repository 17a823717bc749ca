"""Write docs/configuration.md from the settings themselves: `make docs`. A test compares the two."""

from pathlib import Path

from guided_diffusion.config.architectures import DiTArchitecture, UNet2DArchitecture
from guided_diffusion.config.settings import (
    SECTIONS,
    AdmArchitecture,
    Architecture,
    Process,
    Space,
    describe_keys,
)

INTRODUCTION = """# Configuration keys

*Written by `make docs` from `guided_diffusion/config/settings.py`.*

An experiment has the sections `teacher`, `student`, `distill` and `run`. A baseline, or a network to
sample from, has the student's keys at top level. In a section, `model:`, `diffusion:` and `training:` name
files whose keys are merged in, and its own keys win; `base:` names a configuration (or several) that this one
is laid over. Any key can be overridden on the command line: `student.lr=1e-3`, or `lr=1e-3` where they lie
at top level. Relative names of such files are looked for from the configuration's folder and those above it,
then from the working directory; those of models and references in the working directory, in the project (the
folder that holds `yaml/`) and in the configuration's folder. What is written to a relative path lies in the
project.

A student that gives no process, or no space, has its teacher's. A key that does nothing where it stands
(`dropout` of a teacher) is accepted from a file, where it describes a network, and refused as an override.
Every command takes the whole configuration, so that all can be given the same; what only others need
changes nothing.
"""


def table(rows: list[tuple[str, object, str]]) -> str:
    """A Markdown table of keys."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | `{default!r}` | {meaning} |" for name, default, meaning in rows]
    return "\n".join(lines)


def other_architectures(common: list[tuple[str, object, str]]) -> list[str]:
    """The keys of the built-in architectures beside ADM's, but for those that every one has."""
    parts = []
    for name, settings in (("diffusers_unet2d", UNet2DArchitecture), ("dit", DiTArchitecture)):
        rows = [row for row in describe_keys(settings) if row not in common]
        parts += [f"\n### `architecture: {name}` ([teachers.md](teachers.md))\n", table(rows)]
    return parts


def page() -> str:
    """The whole page."""
    architecture, process, space = (describe_keys(part) for part in (AdmArchitecture, Process, Space))
    common = describe_keys(Architecture)
    shared = architecture + process + space
    where = "in `teacher`, in `student`, or at top level"
    parts = [
        INTRODUCTION,
        f"## Architecture: {where}\n",
        f"Those of `adm`. Another architecture has the first {len(common)} and keys of its own.\n",
        table(architecture),
        *other_architectures(common),
        f"\n## Process: {where}\n",
        table(process),
        f"\n## Space: {where}\n",
        "See [latent.md](latent.md).\n",
        table(space),
    ]
    for name, section in SECTIONS.items():
        # Of `student`, those too that do something at the top level of a baseline alone.
        known = dict.fromkeys(describe_keys(section) if name == "student" else [])
        own = [row for row in known | dict.fromkeys(describe_keys(section, name)) if row not in shared]
        summary = (section.__doc__ or "").strip().splitlines()[0]
        parts += [f"\n## `{name}`\n\n{summary}\n", table(own)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page())
