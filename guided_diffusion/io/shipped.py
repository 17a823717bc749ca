"""Where the configurations, models and scripts that come with the library lie."""

from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2]  # the folder that holds guided_diffusion/ and evaluations/
IS_INSTALLED = (LIBRARY / "tccd" / "yaml").is_dir()  # by a wheel, and not used out of a checkout
SHIPPED = LIBRARY / "tccd" if IS_INSTALLED else LIBRARY  # holds yaml/, model/, scripts/ and datasets/
