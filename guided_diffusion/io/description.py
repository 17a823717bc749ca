"""What a checkpoint of ours says of itself, in its metadata, which other programs pass over."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch as th

from ..errors import UserError
from .json_text import parse_json
from .safetensors_file import read_metadata
from .torch_file import read_torch_file

DESCRIPTION = "guided_diffusion"


def read_description(path: str | os.PathLike) -> dict[str, Any]:
    """What a checkpoint of ours says of itself; {} for one of others, and for a folder.

    Returns:
        "architecture", "process" and "space_keys" (their configuration keys), "space" (what these come to),
        "config" (its name), "step", "revision" (of this program), "method" and "teacher" (its training),
        as far as they were known; the first four are mappings.

    Raises:
        UserError: as `read_torch_file`, or what it says of itself is damaged.
    """
    if Path(path).is_dir() or Path(path).suffix == ".ckpt":  # diffusers', Lightning's
        return {}
    try:
        if Path(path).suffix == ".safetensors":
            text = read_metadata(path).get(DESCRIPTION, "{}")
        else:
            metadata = getattr(read_torch_file(path), "metadata", None) or {}
            text = metadata.get(DESCRIPTION, {}).get("json", "{}")
        description = parse_json(text)
        if not isinstance(description, dict):
            raise ValueError("it is no mapping")
        for part in ("architecture", "process", "space", "space_keys"):
            if not isinstance(description.get(part, {}), dict):
                raise ValueError(f"{part} is no mapping")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: what it says of itself is damaged ({error})") from None
    return description


def described(state: Mapping[str, th.Tensor], description: Mapping[str, Any]) -> OrderedDict[str, th.Tensor]:
    """A state dict that carries what `read_description` reads; for other programs it is as before."""
    ordered = OrderedDict(state)
    ordered._metadata = {DESCRIPTION: {"json": json.dumps(description)}}  # type: ignore[attr-defined]
    return ordered
