"""The optimizer: which one, and its state in checkpoints, ours and the originals'."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch as th
from torch import nn

from ..config.settings import Run, Training
from ..networks.base import DenoisingNetwork
from .muon import Muon, matrices


def build_optimizer(
    training: Training, run: Run, network: DenoisingNetwork, objective: nn.Module
) -> th.optim.AdamW:
    """The optimizer that `run.optimizer` names, of the network's parameters and then the objective's.

    Muon is for the network alone: the noise encoder's matrices would cost more than a small student's.

    Args:
        training: its learning rate and weight decay.
        run: which optimizer.
        network: what is trained.
        objective: what is trained beside it; may have no parameters.
    """
    parameters = [*network.parameters(), *objective.parameters()]
    rates = training.lr, training.weight_decay
    if run.optimizer == "muon":
        return Muon(parameters, matrices(network), *rates, dtype=network.compute_dtype)
    return th.optim.AdamW(parameters, rates[0], weight_decay=rates[1], fused=True)


def load_optimizer_state(optimizer: th.optim.AdamW, saved: Mapping[str, Any]) -> None:
    """Take up the moments of a saved optimizer; learning rate and other settings stay the optimizer's own.

    ADM's 16-bit runs optimise two flat copies of the parameters, first those of at most one dimension, then
    the others, each in order; their moments are cut up again.

    Args:
        optimizer: of one parameter group.
        saved: `state_dict()` of an AdamW or a Muon over the same parameters in the same order. Muon goes on
            from AdamW's averages; AdamW needs the squares' too, which Muon has not of matrices.

    Raises:
        ValueError: another number of parameters, or moments of another shape, or not all of them.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = sum(len(group["params"]) for group in saved["param_groups"])
    moments: dict[int, dict[str, th.Tensor]] = dict(saved["state"])
    if count == 2 != len(parameters) and len(moments) == 2:
        moments = _cut_up(moments, parameters)
    elif count != len(parameters):
        raise ValueError(f"it is of {count} parameters instead of {len(parameters)}")
    muons = {id(p) for p in optimizer.matrices} if isinstance(optimizer, Muon) else set()
    for index, values in moments.items():
        names = ["exp_avg"] if id(parameters[index]) in muons else ["exp_avg", "exp_avg_sq"]
        if not set(names) <= set(values):
            raise ValueError("it is Muon's: give run.optimizer=muon")
        moments[index] = values = {name: values[name] for name in ("step", *names)}
        for name in names:
            if values[name].shape != parameters[index].shape:
                shapes = f"{tuple(values[name].shape)} instead of {tuple(parameters[index].shape)}"
                raise ValueError(f"its moments of parameter {index} have shape {shapes}")
            # The fused optimizer goes by the order in memory, which the checkpoint's need not be.
            values[name] = th.empty_like(parameters[index], dtype=values[name].dtype).copy_(values[name])
    own = optimizer.state_dict()
    optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})


def _cut_up(
    flat: Mapping[int, Mapping[str, th.Tensor]], parameters: Sequence[th.Tensor]
) -> dict[int, dict[str, th.Tensor]]:
    moments: dict[int, dict[str, th.Tensor]] = {}
    for half, is_small in enumerate((True, False)):
        indices = [i for i, p in enumerate(parameters) if (p.ndim <= 1) == is_small]
        sizes = [parameters[i].numel() for i in indices]
        for name in ("exp_avg", "exp_avg_sq"):
            if flat[half][name].numel() != sum(sizes):
                raise ValueError(
                    f"its flat moments hold {flat[half][name].numel()} numbers, not {sum(sizes)}"
                )
            pieces = flat[half][name].flatten().split(sizes)
            for i, piece in zip(indices, pieces, strict=True):
                entry = moments.setdefault(i, {"step": flat[half]["step"].clone()})
                entry[name] = piece.view_as(parameters[i])
    return moments
