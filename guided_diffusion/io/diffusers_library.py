"""diffusers, imported when it is needed and so that it works beside a torchvision that does not."""

import sys
from types import ModuleType

from ..errors import UserError


def import_diffusers(what: str) -> ModuleType:
    """The library, which shows its own bars on a terminal only.

    Its models import torchvision if it is installed, though none used here needs it. Torchvision's published
    wheels do not import beside a torch for CPUs alone, and diffusers does not expect that.

    Args:
        what: what needs it, for the message.

    Raises:
        UserError: it is not installed, or too old.
    """
    try:
        import diffusers
        from diffusers.utils import import_utils, logging

        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError, AttributeError):
            import_utils._torchvision_available = False
    except ImportError as error:
        told = " ".join(str(error).split())
        raise UserError(f"{what} needs pip install 'diffusers>=0.35' ({told})") from None
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    return diffusers
