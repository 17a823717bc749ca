"""Muon: steps along the orthogonalised gradient, for the weights of a network that are matrices."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch as th
from torch import nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan et al., 2024)
ITERATIONS = 5


def matrices(network: nn.Module) -> list[nn.Parameter]:
    """The weights that Muon is for: of several rows and columns, but those of embedding tables."""
    tables = {id(layer.weight) for layer in network.modules() if isinstance(layer, nn.Embedding)}
    weights = [p for p in network.parameters() if p.ndim >= 2 and id(p) not in tables]
    return [p for p in weights if min(len(p), p[0].numel()) > 1]


def orthogonalized(x: th.Tensor, dtype: th.dtype = th.float32) -> th.Tensor:
    """Matrices with x's singular vectors, and singular values between about 0.7 and 1.2.

    Five Newton-Schulz iterations on x over its Frobenius norm; products alone, no decomposition.

    Args:
        x: float32 [K, M, N].
        dtype: of the products; 16 bits do.

    Returns:
        float32 [K, M, N]; 0 where x is 0.
    """
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    wide = (wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = th.baddbmm(wide, th.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.mT if x.shape[-2] > x.shape[-1] else wide).float()


class Muon(th.optim.AdamW):
    """Muon for matrices (Jordan et al., 2024), AdamW for the other parameters.

    A convolution's weight counts as a matrix [out, in x kernel]. A step is 0.2 sqrt(max(M, N)) times the
    orthogonalised gradient, averaged with Nesterov's momentum: about the size of AdamW's, so that both have
    the same learning rate and weight decay (Liu et al., 2025, "Muon is scalable for LLM training", eq. 4).
    torch's own is not used since it takes nothing but matrices, and cannot skip a step on the device.

    Args:
        parameters: all that is optimised.
        matrices: those of them that are Muon's, of two or more dimensions.
        lr, weight_decay: of both.
        dtype: in which gradients are orthogonalised.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        dtype: th.dtype = th.float32,
    ):
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        self.dtype = dtype
        self._of_shape: dict[tuple[int, int], list[th.Tensor]] = defaultdict(list)
        for p in matrices:
            self._of_shape[len(p), p[0].numel()].append(p)

    @property
    def matrices(self) -> list[th.Tensor]:
        """The parameters that are Muon's."""
        return [p for same in self._of_shape.values() for p in same]

    @th.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient, or none of them if `found_inf` is set and not 0."""
        gradients = [p.grad for p in self.matrices]
        for p in self.matrices:
            p.grad = None  # so that AdamW passes it over
        super().step()
        for p, gradient in zip(self.matrices, gradients, strict=True):
            p.grad = gradient
        for shape, same in self._of_shape.items():
            self._move(shape, [p for p in same if p.grad is not None])

    def _move(self, shape: tuple[int, int], parameters: list[th.Tensor]) -> None:
        """Muon's step of the matrices of one shape, all in the same products."""
        if not parameters:
            return
        lr, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {"step": th.zeros((), device=p.device), "exp_avg": th.zeros_like(p)}
        averages = [self.state[p]["exp_avg"] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        gradient, before = (th.stack([x.reshape(shape) for x in each]) for each in (gradients, averages))
        average = before.lerp(gradient, 1 - MOMENTUM)
        direction = orthogonalized(gradient.lerp(average, MOMENTUM), self.dtype)
        taken = getattr(self, "found_inf", before.new_zeros(())) == 0
        move = th.where(taken, direction * (lr * 0.2 * math.sqrt(max(shape))), 0.0)
        average = th.where(taken, average, before)
        if decay:
            th._foreach_mul_(parameters, 1 - lr * decay * taken)
        th._foreach_sub_(parameters, [new.view_as(p) for p, new in zip(parameters, move, strict=True)])
        th._foreach_copy_(averages, [new.view_as(p) for p, new in zip(parameters, average, strict=True)])
        for p in parameters:
            self.state[p]["step"] += taken
