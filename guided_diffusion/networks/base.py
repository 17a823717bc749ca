"""The contract of a denoising network: what the process, the method and the training loop may ask of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch as th
from torch import nn

from ..config.settings import Architecture
from ..errors import UserError
from ..kernels.captured import Captured
from .weight_selection import SelectableWeights


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a network.

    Attributes:
        output: the prediction, float32 [B, C, H, W], or [B, 2C, H, W] when the variance is learned.
        features: the map that the output layers read, float32 [B, *feature_shape].
        emb: the timestep embedding, float32 [B, emb_dim], without what `emb_shift` added.
        bottleneck: what leaves the middle of a U-Net, float32 [B, C'', H'', W''], its smallest map
            ("h-space", Kwon et al., 2023); None of other networks.
    """

    output: th.Tensor
    features: th.Tensor
    emb: th.Tensor
    bottleneck: th.Tensor | None = None

    def __getitem__(self, samples: slice) -> "Evaluation":
        """Of some of the samples."""
        return Evaluation(*(None if v is None else v[samples] for v in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class ForDiffusers:
    """A network as a model of diffusers'.

    Attributes:
        class_name: of the model, such as "UNet2DModel".
        config: its arguments.
        state: its weights.
    """

    class_name: str
    config: dict[str, Any]
    state: dict[str, th.Tensor]


class DenoisingNetwork(nn.Module, ABC):
    """A network that predicts the noise (or x_0, or v) in x_t; it knows nothing of noise schedules.

    A subclass sets the attributes, and defines `from_settings` and `evaluate`.

    Attributes:
        Settings: the dataclass of its configuration keys, a subclass of `config.settings.Architecture`.
        block_types: the submodules that `compile_blocks` compiles, one by one.
        num_classes: number of classes if it is class-conditional, else None. If it has a null class
            (`Architecture.has_null_class`), that is the label `num_classes`.
        class_dropout_prob: probability that a label is replaced by the null class in training.
        shape: (C, H, W) of the samples it denoises.
        emb_dim: size D of its timestep embedding.
        feature_shape: (C', H', W') of the feature map that a training-time head may read.
        compute_dtype: dtype of the heavy arithmetic; parameters stay float32 unless frozen.
        capturable: whether `evaluate` launches the same kernels at every call and never waits for the
            device, so that it can be a CUDA graph. A subclass says so for itself.
        has_maps: whether it is made of maps that may lie with their channels last in memory.
    """

    Settings: ClassVar[type[Architecture]]
    block_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    has_maps: ClassVar[bool] = False
    num_classes: int | None
    class_dropout_prob: float = 0.0
    shape: tuple[int, int, int]
    emb_dim: int
    feature_shape: tuple[int, int, int]
    compute_dtype: th.dtype = th.float32
    capturable: bool = False

    @classmethod
    @abstractmethod
    def from_settings(
        cls, settings: Any, shape: tuple[int, int, int], out_channels: int
    ) -> "DenoisingNetwork":
        """Build the network.

        Args:
            settings: an instance of `Settings`.
            shape: (C, H, W) of the samples.
            out_channels: C, or 2C when the variance is learned.

        Raises:
            ValueError: sizes that do not fit each other.
        """

    @abstractmethod
    def evaluate(
        self,
        x: th.Tensor,
        timesteps: th.Tensor,
        y: th.Tensor | None = None,
        *,
        emb_shift: th.Tensor | None = None,
    ) -> Evaluation:
        """Apply the network and hand out what training-time heads read.

        Args:
            x: [B, C, H, W].
            timesteps: [B], original (not respaced) timesteps, integer or fractional.
            y: int64 [B] class labels if and only if the network is class-conditional.
            emb_shift: [D] or [B, D], added to the timestep embedding inside the network.

        Raises:
            ValueError: labels given to an unconditional network, or missing from a conditional one.
        """

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """The output alone, float32 [B, C or 2C, H, W]; arguments as `evaluate`."""
        return self.evaluate(x, timesteps, y).output

    def require_labels_fit(self, y: th.Tensor | None) -> None:
        """Raise ValueError unless there are labels if and only if there are classes."""
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("give class labels y if and only if the model is class-conditional")

    def labels(self, y: th.Tensor | None) -> th.Tensor | None:
        """The labels that `evaluate` applies the network to: y, in training some replaced by the null class.

        Raises:
            ValueError: as `require_labels_fit`.
        """
        self.require_labels_fit(y)
        if y is None or not (self.training and self.class_dropout_prob):
            return y
        assert self.num_classes is not None
        drop = th.rand(len(y), device=y.device) < self.class_dropout_prob
        return th.where(drop, self.num_classes, y)

    def autocast(self, x: th.Tensor) -> th.autocast:
        """The context in which heavy arithmetic on x's device runs in `compute_dtype`."""
        enabled = self.compute_dtype != th.float32
        return th.autocast(x.device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)

    def heavy_parts(self) -> Iterable[nn.Module]:
        """The parts whose convolutions and linear layers are cast once and for all in a frozen network."""
        return ()

    def use_dtype(self, dtype: th.dtype, *, frozen: bool = False, channels_last: bool = False) -> None:
        """Choose the arithmetic and, where there are maps, their layout, which the weights' gives them.

        Args:
            dtype: of the heavy arithmetic: float32, bfloat16 or float16.
            frozen: the network is only evaluated from here on, so the weights of `heavy_parts` are cast once
                and for all; else parameters stay float32 and are cast as they are used.
            channels_last: lay maps of float32 out so too, as those of 16 bits always are: faster on the CPU,
                at 1.4 times the rounding error of the layout in which the originals' digits were made.
        """
        self.compute_dtype = dtype
        if self.has_maps:
            layout = th.channels_last if channels_last or dtype != th.float32 else th.contiguous_format
            self.to(memory_format=layout)  # type: ignore[call-overload]
        if frozen and dtype != th.float32:
            _cast_weights(self.heavy_parts(), dtype)

    def from_diffusers(self, state: Mapping[str, th.Tensor]) -> Mapping[str, th.Tensor]:
        """The weights of a diffusers folder under this network's own names; the same where they are those."""
        return state

    def for_diffusers(self) -> ForDiffusers:
        """The model of diffusers' that computes exactly what this network does, to be exported.

        Raises:
            ValueError: there is none, and why.
        """
        raise ValueError(f"{type(self).__name__} says no model of diffusers' that it is")

    def selectable_weights(self) -> SelectableWeights:
        """Its weights with what has to be known of them to select those of a smaller network of its kind.

        Raises:
            ValueError: nobody knows.
        """
        raise ValueError(f"{type(self).__name__} does not say how its weights are selected")

    def capture(self) -> None:
        """Have evaluations on a GPU launch all their kernels at once, where gradients are not asked for.

        The weights must keep their place from here on. It changes nothing where `capturable` is false.
        """
        if not self.capturable:
            return
        evaluate = self.evaluate

        def output(*args: Any, **kwargs: Any) -> th.Tensor:
            return evaluate(*args, **kwargs).output

        for name, function in (("evaluate", evaluate), ("forward", output)):
            setattr(self, name, _captured_without_gradients(function))

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Have torch.compile fuse what lies between the heavy operations of each block, at its first call.

        Block by block: equal blocks compile once, and names and state dicts stay as they are.

        Args:
            backend: torch.compile's.

        Raises:
            UserError: the architecture names no blocks.
        """
        blocks = [module for module in self.modules() if isinstance(module, self.block_types)]
        if not blocks:
            raise UserError(f"run.compile: {type(self).__name__} names no blocks to compile; leave it false")
        limits = th._dynamo.config  # each shape of a block counts as a recompilation of the class
        limits.recompile_limit = max(limits.recompile_limit, 512)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 2048)
        for block in blocks:
            block.compile(backend=backend)


def _cast_weights(parts: Iterable[nn.Module], dtype: th.dtype) -> None:
    """Cast the weights of the convolutions and linear layers in some parts of a network once and for all."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                module.to(dtype)


def _captured_without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    captured = Captured(function)

    def either(*args: Any, **kwargs: Any) -> Any:
        return (function if th.is_grad_enabled() else captured)(*args, **kwargs)

    return either
