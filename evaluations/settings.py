"""What to evaluate and how, checked before anything is loaded."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from guided_diffusion.errors import UserError

Backend = Literal["tensorflow", "torch", "digits"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True)
class Settings:
    """What to compute and how.

    Attributes:
        backend: the feature network: "tensorflow" (the ADM suite's graph), "torch" (the same
            network through torch-fidelity) or "digits" (the demo's classifier).
        weights: its weight file; by default the shipped, cached or downloaded one.
        batch_size: images at a time; no influence on the scores beyond rounding.
        seed: of KID's subsets and of the intervals' half-samples.
        kid: also the kernel Inception distance (Inception backends).
        density_coverage: also density and coverage (Inception backends).
        intervals: number of half-samples for 95 % intervals; 0 for none, else at least 2.
        device: torch device of the torch network and of the nearest neighbours; by default a GPU if
            there is one (Inception backends).
        use_cache: keep the reference's statistics beside its file and reuse them.

    Raises:
        UserError: a value that makes no sense.
    """

    backend: Backend = "tensorflow"
    weights: str | PathLike | None = None
    batch_size: int = 64
    seed: int = 0
    kid: bool = False
    density_coverage: bool = False
    intervals: int = 0
    device: str | None = None
    use_cache: bool = True

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"no backend '{self.backend}'; there are: {', '.join(BACKENDS)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.intervals < 0 or self.intervals == 1:
            raise UserError(f"intervals need at least 2 half-samples (0 for none), not {self.intervals}")
        if self.seed < 0:
            raise UserError(f"seed must not be negative, it is {self.seed}")
        if self.weights is not None and not Path(self.weights).is_file():
            raise UserError(f"no such weight file: {self.weights}")
        for wanted, flag in ((self.kid, "kid"), (self.density_coverage, "density_coverage")):
            if wanted and self.backend == "digits":
                raise UserError(f"{flag} is for the Inception backends, not for digits")
        if self.device is not None and self.backend == "digits":
            raise UserError("device is for the Inception backends; the digits network always runs on the CPU")
