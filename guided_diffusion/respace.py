"""Respacing: run a trained process in fewer steps (Improved DDPM, section 4)."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Choose the timesteps to keep.

    Args:
        num_timesteps: T of the original process.
        section_counts: how many steps to keep in each of equally long sections of the original, as
            numbers or as "10,15,20"; or "ddimN" for N steps at the constant stride of the DDIM paper;
            or "trailingN" for N evenly spaced steps that end a stride before the clean image instead of
            at its first step (Lin et al., 2023, Common Diffusion Noise Schedules and Sample Steps are
            Flawed, table 2): better when steps are few, as the last one goes to the clean image.

    Returns:
        Steps of the original process, each in {0..T-1}.

    Raises:
        ValueError: no integer stride gives N steps, N is not within 1..T, a section is shorter than its
            count, or none is kept.
    """
    if isinstance(section_counts, str):
        kind = next((kind for kind in ("ddim", "trailing") if section_counts.startswith(kind)), "")
        try:
            section_counts = [int(count) for count in section_counts.removeprefix(kind).split(",")]
            if kind:
                (wanted,) = section_counts
        except ValueError:
            raise ValueError("is no respacing; give such as 50, ddim50, trailing50 or 10,15,20") from None
        if kind == "ddim":
            for step in range(1, num_timesteps + 1):
                if len(range(0, num_timesteps, step)) == wanted:
                    return set(range(0, num_timesteps, step))
            raise ValueError(f"no integer stride gives {wanted} of {num_timesteps} steps")
        if kind == "trailing":
            if not 1 <= wanted <= num_timesteps:
                raise ValueError(f"cannot keep {wanted} of {num_timesteps} steps")
            return {round(num_timesteps - i * num_timesteps / wanted) - 1 for i in range(wanted)}

    shortest, longer = divmod(num_timesteps, len(section_counts))
    kept: set[int] = set()
    begin = 0
    for i, count in enumerate(section_counts):
        size = shortest + (i < longer)
        if not 0 <= count <= size:
            raise ValueError(f"cannot keep {count} steps of a section of {size}")
        stride = 1.0 if count <= 1 else (size - 1) / (count - 1)
        offset = 0.0  # summed, not multiplied: halves then round as in the published processes
        for _ in range(count):
            kept.add(begin + round(offset))
            offset += stride
        begin += size
    if not kept:
        raise ValueError("no step would be kept")
    return kept


class SpacedDiffusion(GaussianDiffusion):
    """The process that visits only some steps of another.

    Args:
        use_timesteps: steps of the original process to keep.
        betas: of the original process, [T].
        options: further arguments of `GaussianDiffusion`.
    """

    def __init__(
        self, use_timesteps: Collection[int], *, betas: np.ndarray | Sequence[float], **options: Any
    ):
        kept = sorted(set(use_timesteps))
        alphas_cumprod = np.cumprod(1.0 - np.asarray(betas, dtype=np.float64))
        bars = alphas_cumprod[kept]
        super().__init__(
            betas=1 - bars / np.append(1.0, bars[:-1]),
            timestep_map=kept,
            original_num_steps=len(alphas_cumprod),
            **options,
        )
