"""Classifier-free guidance (Ho & Salimans, 2022), as a network around a network."""

from dataclasses import replace
from typing import Any

import torch as th

from .base import DenoisingNetwork, Evaluation
from .weight_selection import SelectableWeights


class GuidedNetwork(DenoisingNetwork):
    """A class-conditional network whose prediction is led away from that of the null class.

    The prediction is f(null) + w (f(y) - f(null)): w = 1 is the network's own for y, more exaggerates what
    the class changes. This is diffusers' w, the paper's is one less. All channels of the prediction are
    guided, as by diffusers' DiTPipeline; the original DiT guides the first three of four. At a given x_t, x_0
    and v are affine in eps, so to guide whichever the network predicts is to guide eps. The variance,
    maps and timestep embedding are those of y.

    Both halves are one call of the network, of twice the batch.

    Args:
        network: has a null class, the label `num_classes`; placed already, its arithmetic chosen.
        scale: w.
    """

    def __init__(self, network: DenoisingNetwork, scale: float):
        super().__init__()
        self.network, self.scale = network, scale
        self.num_classes, self.shape = network.num_classes, network.shape
        self.emb_dim, self.feature_shape = network.emb_dim, network.feature_shape
        self.compute_dtype = network.compute_dtype
        self.train(network.training)  # else whoever puts it back as it was sets the network to training

    @classmethod
    def from_settings(cls, settings: Any, shape: tuple[int, int, int], out_channels: int) -> DenoisingNetwork:
        """No configuration describes it: `guided` makes it of another network."""
        raise ValueError("a guided network is no architecture: it is made of another")

    def evaluate(
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        y: th.Tensor | None = None,
        *,
        emb_shift: th.Tensor | None = None,
    ) -> Evaluation:
        """Apply the network to y and to the null class at once; see `DenoisingNetwork.evaluate`."""
        self.require_labels_fit(y)
        assert y is not None and self.num_classes is not None
        shift = th.cat([emb_shift] * 2) if emb_shift is not None and emb_shift.ndim == 2 else emb_shift
        labels = th.cat([y, th.full_like(y, self.num_classes)])
        both = self.network.evaluate(th.cat([x, x]), th.cat([timesteps, timesteps]), labels, emb_shift=shift)
        channels = x.shape[1]
        own, null = both.output.chunk(2)
        prediction = null[:, :channels] + self.scale * (own[:, :channels] - null[:, :channels])
        output = th.cat([prediction, own[:, channels:]], dim=1)
        return replace(both[: len(x)], output=output)

    def selectable_weights(self) -> SelectableWeights:
        """The network's."""
        return self.network.selectable_weights()


def guided(network: DenoisingNetwork, scale: float) -> DenoisingNetwork:
    """The network guided by w = `scale`, see `GuidedNetwork`; itself for 0."""
    return GuidedNetwork(network, scale) if scale else network
