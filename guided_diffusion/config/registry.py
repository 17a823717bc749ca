"""What a name in a configuration or on a command line stands for.

Each table maps the built-in names to `package.module:Name`; in their place users may give such a path of
their own, whose module is then imported. A built-in sampler is one line here, an architecture or an objective
a second one in `_SETTINGS`.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .architectures import DiTArchitecture, UNet2DArchitecture
from .settings import AdmArchitecture, Distill

# Subclasses of networks.base.DenoisingNetwork.
ARCHITECTURES = {
    "adm": "guided_diffusion.unet:UNetModel",
    "diffusers_unet2d": "guided_diffusion.networks.diffusers_unet2d:DiffusersUNet2D",
    "dit": "guided_diffusion.networks.dit:DiT",
}
# Subclasses of distill.objectives.Distillation.
OBJECTIVES = {"tccd": "guided_diffusion.distill.objectives:Distillation"}
# Instances of sampling.samplers.Sampler.
SAMPLERS = {
    "ancestral": "guided_diffusion.sampling.samplers:ANCESTRAL",
    "ddim": "guided_diffusion.sampling.samplers:DDIM",
    "dpmpp_2m": "guided_diffusion.sampling.solvers:DPMPP_2M",
    "unipc": "guided_diffusion.sampling.solvers:UNIPC",
}

# The configuration keys of the built-in ones of the former two, known without importing torch.
_SETTINGS: dict[str, type] = {
    ARCHITECTURES["adm"]: AdmArchitecture,
    ARCHITECTURES["diffusers_unet2d"]: UNet2DArchitecture,
    ARCHITECTURES["dit"]: DiTArchitecture,
    OBJECTIVES["tccd"]: Distill,
}


def require_known(table: Mapping[str, str], name: str, where: str) -> str:
    """The path of a built-in name, or the path itself.

    Args:
        table: one of this module's.
        name: what the user gave.
        where: the key or flag, for the message.

    Raises:
        UserError: it is neither.
    """
    path = table.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise UserError(f"{where}: '{name}' is none of {', '.join(table)}, and no package.module:Name")
    return path


def look_up(table: Mapping[str, str], name: str, where: str) -> Any:
    """What a name stands for, imported; see `require_known`.

    Raises:
        UserError: nothing is called so, or what its module imports is not installed.
    """
    module, _, attribute = require_known(table, name, where).partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{where}: '{name}' cannot be imported: {error}") from None
    if not hasattr(found, attribute):
        raise UserError(f"{where}: {module} has no {attribute}")
    return getattr(found, attribute)


def settings_of(table: Mapping[str, str], name: str, where: str, base: type) -> type:
    """The dataclass of an architecture's or objective's configuration keys, a subclass of `base`.

    Raises:
        UserError: as `look_up`, or it has no such `Settings`.
    """
    known = _SETTINGS.get(require_known(table, name, where))
    if known is not None and issubclass(known, base):
        return known
    settings = getattr(look_up(table, name, where), "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, base)):
        raise UserError(f"{where}: '{name}' has no Settings that are config.settings.{base.__name__}'s")
    return settings
