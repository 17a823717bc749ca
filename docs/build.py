"""Write docs/configuration.md from the settings themselves: `make docs`."""

from pathlib import Path

from guided_diffusion.config.loading import SECTIONS
from guided_diffusion.config.settings import Network, describe_keys

INTRODUCTION = """# Configuration keys

*Written by `make docs` from `guided_diffusion/config/settings.py`.*

An experiment has the sections `teacher`, `student`, `distill` and `run`. A baseline, or a network to
sample from, has the student's keys at top level. In a section, `model:`, `diffusion:` and `training:` name
files whose keys are merged in, and its own keys win; `base:` names a configuration (or several) that this one
is laid over. Any key can be overridden on the command line: `student.lr=1e-3`, or `lr=1e-3` where they lie
at top level. Relative paths are looked for from the configuration's folder and those above it, then from the
working directory.
"""


def table(rows: list[tuple[str, object, str]]) -> str:
    """A Markdown table of keys."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{name}` | `{default!r}` | {meaning} |" for name, default, meaning in rows]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    shared = describe_keys(Network)
    parts = [
        INTRODUCTION,
        "## Network and process: in `teacher`, in `student`, or at top level\n",
        table(shared),
    ]
    for name, section in SECTIONS.items():
        own = [row for row in describe_keys(section) if row not in shared]
        summary = (section.__doc__ or "").strip().splitlines()[0]
        parts += [f"\n## `{name}`\n\n{summary}\n", table(own)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("configuration.md").write_text(page())
