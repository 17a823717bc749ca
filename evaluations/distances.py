"""Products of many features, block by block, in as little precision as a decision allows.

Squared distances come from |a|^2 + |b|^2 - 2 a.b. Products in a low precision are several times
faster and settle almost every question; `rounding` bounds their error, and whatever lies within
the bound is left to the next precision of `precisions`.
"""

from collections.abc import Mapping

import numpy as np
import torch

BLOCK = 2048


def precisions(device: torch.device) -> tuple[torch.dtype, ...]:
    """Number formats to try in turn, the coarsest first; the last one settles everything.

    16-bit brain floats come first where the processor multiplies them itself. float32 is left out
    where the program has told torch to multiply it in less (`torch.set_float32_matmul_precision`).
    """
    exact: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    if torch.get_float32_matmul_precision() != "highest":
        exact = (torch.float64,)
    capabilities: Mapping = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    if device.type == "cpu" and native:
        return torch.bfloat16, *exact
    return exact


def rounding(dtype: torch.dtype, dimension: int) -> float:
    """Bound on the error of a squared distance by `products`, relative to |a|^2 + |b|^2.

    bfloat16: both factors and the result are rounded to 8 bits, so the product is off by at most
    3 * 2^-8 |a||b|. float32 and float64: sums of D terms, of the order of sqrt(D) units in the last
    place (Higham & Mary 2019). Distances that differ by less in float64 count as equal.
    """
    if dtype == torch.bfloat16:
        return 3.5 * 2**-8
    return max(8.0, dimension**0.5) * torch.finfo(dtype).eps


class Points:
    """Features float32 [N, D], moved to a common centre: the distances stay, rounding gets small.

    Args:
        raw: the features; not copied.
        centre: [D]; rounded to float32.
        device: where products are computed.
    """

    def __init__(self, raw: np.ndarray, centre: np.ndarray, device: torch.device) -> None:
        self.raw = raw
        self.device = device
        # One centre for all precisions: rounded for some only, it would shift those.
        self._centre = torch.from_numpy(centre.astype(np.float32)).to(device)
        self.norms = torch.cat(
            [self._squares(np.arange(i, min(i + BLOCK, len(raw)))) for i in starts(len(raw))]
        )

    def __len__(self) -> int:
        return len(self.raw)

    def _squares(self, rows: np.ndarray) -> torch.Tensor:
        block = self.take(rows, torch.float64)
        return torch.linalg.vecdot(block, block)

    def take(self, rows: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """Some of the points, ascending rows, centred, in a number format; [n, D]."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        adjacent = rows[-1] - rows[0] == len(rows) - 1
        block = torch.from_numpy(self.raw[rows[0] : rows[-1] + 1] if adjacent else self.raw[rows])
        block = block.to(self.device, precise)
        return (block - self._centre.to(precise)).to(dtype)


def starts(n: int) -> range:
    """First rows of the blocks of n rows."""
    return range(0, n, BLOCK)


def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products [n, m] of rows [n, D] and [m, D], float64 of float64, float32 of anything less."""
    result = torch.mm(a, b.T)
    return result if result.dtype == torch.float64 else result.float()
