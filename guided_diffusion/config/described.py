"""What a checkpoint of ours says of its network, as configuration keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .registry import ARCHITECTURES, settings_of
from .settings import Architecture, Process, Space, keys_of


def described_keys(description: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    """The keys of a network's architecture, process and space that its checkpoint carries; {} if it does not.

    Args:
        description: see `io.description`.
        weights: the checkpoint, for messages.

    Raises:
        UserError: they are damaged, or name an architecture that is not built in: a file does not choose what
            is imported.
    """
    keys: dict[str, Any] = {}
    for part in ("architecture", "process", "space_keys"):
        keys |= description.get(part, {})
    if not keys:
        return {}
    if (name := keys.get("architecture")) not in tuple(ARCHITECTURES):  # importing another would run it
        raise UserError(
            f"{weights}: is of the architecture {name!r:.80}, which is not built in; if you trust "
            "that, configure it (--config)"
        )
    parts = (settings_of(ARCHITECTURES, name, "architecture", Architecture), Process, Space)
    known = {key.name for part in parts for _, key in keys_of(part)}
    # Other keys could have further files read, and "${...}" stands for what the environment holds.
    if wrong := [key for key, value in keys.items() if key not in known or "${" in str(value)]:
        raise UserError(f"{weights}: says of itself what this version does not know ({', '.join(wrong):.80})")
    return keys
