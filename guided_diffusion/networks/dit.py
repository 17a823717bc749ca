"""diffusers' DiTTransformer2DModel as a network to distil from and to: `architecture: dit`."""

from typing import Any

import torch as th
from torch import nn

from ..config.architectures import DiTArchitecture
from .base import DenoisingNetwork, Evaluation, ForDiffusers
from .diffusers_models import BasicTransformerBlock, DiTTransformer2DModel, adopt, attention_heads
from .weight_selection import SelectableWeights


class DiTWeights(SelectableWeights):
    """The weights of a DiTTransformer2DModel, under its names."""

    output = "proj_out_2"

    def parts(self, name: str) -> list[list[int]]:
        """What each dimension of an entry is made of; see `SelectableWeights.parts`."""
        parts = self._attention_parts(name)
        width, channels = self.state["pos_embed.proj.weight"].shape[:2]
        module = name.rpartition(".")[0]
        if module == self.output:  # for each pixel of a patch a mean of all channels, then their variances
            parts[0] = [channels] * (parts[0][0] // channels)
        elif module == "proj_out_1" or module.endswith(".norm1.linear"):  # shifts, scales and gates
            parts[0] = [width] * (parts[0][0] // width)
        elif module.endswith(".ff.net.0.proj"):  # of a gated activation the values, then the gates
            inner = self.state[name.replace("net.0.proj", "net.2").replace(".bias", ".weight")].shape[1]
            parts[0] = [inner] * (parts[0][0] // inner)
        return parts

    def mean_rows(self) -> th.Tensor:
        """Which rows of the last layer give the prediction, bool [rows]."""
        channels, size = self.state["pos_embed.proj.weight"].shape[1:3]
        rows = th.arange(len(self.state["proj_out_2.bias"]))
        return rows % (len(rows) // size**2) < channels

    def require_alike(self, smaller: SelectableWeights) -> None:
        """Raise `ValueError` for other networks, and for other patches."""
        super().require_alike(smaller)
        theirs, ours = (weights.state["pos_embed.proj.weight"].shape[2] for weights in (self, smaller))
        if theirs != ours:
            raise ValueError(f"the larger network has patches of {theirs} pixels, the smaller of {ours}")


class DiT(DenoisingNetwork):
    """A DiTTransformer2DModel ("Scalable Diffusion Models with Transformers", Peebles & Xie, 2023).

    The forward pass is diffusers' own; parameters have diffusers' names. There every block has a timestep
    embedding of its own (equal copies in the published models, one each in what diffusers trains); the
    network's is the first block's, which is also the output layers', and `emb_shift` is added to that of
    every block. The features are the tokens that enter `norm_out`, [B, D, H/p, W/p].

    Labels are 0..num_classes - 1, and num_classes is the null class. A transformer without classes has one,
    and is always given it.

    Args:
        config: the DiTTransformer2DModel's arguments.
        conditional: whether it takes labels.
        class_dropout_prob: probability that a label is replaced by the null class in training, for all blocks
            alike; in diffusers each block would draw for itself.
    """

    Settings = DiTArchitecture
    block_types = (BasicTransformerBlock,)
    model: Any

    def __init__(self, config: dict[str, Any], *, conditional: bool, class_dropout_prob: float = 0.0):
        super().__init__()
        adopt(self, DiTTransformer2DModel, config)
        self.config, self.class_dropout_prob = config, class_dropout_prob
        self.capturable = type(self) is DiT
        size, self.patch_size = config["sample_size"], config["patch_size"]
        self.num_classes = config["num_embeds_ada_norm"] if conditional else None
        self.shape = (config["in_channels"], size, size)
        self.emb_dim = config["num_attention_heads"] * config["attention_head_dim"]
        self.feature_shape = (self.emb_dim, size // self.patch_size, size // self.patch_size)
        self.shift: list[th.Tensor | None] = [None]  # in a list: nn.Module would take it for a parameter
        for block in self.model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
            block.norm1.emb.timestep_embedder.register_forward_hook(self._add_shift)

    @classmethod
    def from_settings(
        cls, settings: DiTArchitecture, shape: tuple[int, int, int], out_channels: int
    ) -> "DiT":
        """Build it, initialised as in the paper; see `DenoisingNetwork.from_settings`."""
        network = cls(
            settings.config(shape[0], out_channels),
            conditional=settings.class_cond,
            class_dropout_prob=settings.class_dropout_prob,
        )
        network.initialise()
        return network

    @th.no_grad()
    def initialise(self) -> None:
        """Draw weights as the paper does (section 3.2, adaLN-Zero): each block begins as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.model.pos_embed.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.zeros_(projection.bias)
        for block in self.model.transformer_blocks:
            embedder = block.norm1.emb
            for layer in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
                nn.init.normal_(layer.weight, std=0.02)
            nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
            nn.init.zeros_(block.norm1.linear.weight)
        for layer in (self.model.proj_out_1, self.model.proj_out_2):
            nn.init.zeros_(layer.weight)

    def evaluate(
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        y: th.Tensor | None = None,
        *,
        emb_shift: th.Tensor | None = None,
    ) -> Evaluation:
        """Apply the network; see `DenoisingNetwork.evaluate`."""
        y = self.labels(y)
        labels = th.zeros(len(x), dtype=th.int64, device=x.device) if y is None else y
        seen: dict[str, th.Tensor] = {}

        def keep(_: nn.Module, args: tuple) -> None:
            rows = self.feature_shape[1]
            seen["features"] = args[0].float().transpose(1, 2).unflatten(2, (rows, rows))

        first = self.model.transformer_blocks[0].norm1.emb
        with th.autocast(x.device.type, enabled=False):
            emb = first.timestep_embedder.forward(first.time_proj(timesteps))
        self.shift[0] = emb_shift
        try:
            with self.model.norm_out.register_forward_pre_hook(keep), self.autocast(x):
                output = self.model(x, timesteps, class_labels=labels).sample
        finally:
            self.shift[0] = None
        return Evaluation(output.float(), seen["features"], emb)

    def heavy_parts(self) -> list[nn.Module]:
        """What is large in each block, and the output."""
        blocks = self.model.transformer_blocks
        parts = [part for block in blocks for part in (block.attn1, block.ff, block.norm1.linear)]
        return [*parts, self.model.proj_out_2]

    def selectable_weights(self) -> DiTWeights:
        """The weights under diffusers' own names, unchanged."""
        return DiTWeights(self.state_dict(), attention_heads(self), groups=1)

    def for_diffusers(self) -> ForDiffusers:
        """The configuration, which is diffusers' already."""
        return ForDiffusers("DiTTransformer2DModel", self.config, self.state_dict())

    def _add_shift(self, _: nn.Module, __: tuple, emb: th.Tensor) -> th.Tensor:
        shift = self.shift[0]
        return emb if shift is None else emb + shift
