"""What a wheel holds; all else is in pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = ["scripts", "datasets", "yaml", "model"]  # of the checkout; folders of the package tccd in a wheel

setup(
    packages=[
        *find_packages(include=["guided_diffusion*", "evaluations*", "tccd*"]),
        *(f"tccd.{folder}" for folder in FOLDERS),
    ],
    package_dir={f"tccd.{folder}": folder for folder in FOLDERS},
    package_data={
        "guided_diffusion": ["py.typed"],
        "guided_diffusion.kernels": ["*.c"],
        "guided_diffusion.reports": ["page.*"],
        "evaluations": ["py.typed"],
        "tccd.yaml": ["**/*.yaml"],
        "tccd.model": ["digits*.pt", "README.md"],
    },
)
