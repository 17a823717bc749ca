"""diffusers' network classes, and how one becomes a `DenoisingNetwork`."""

import warnings
from typing import Any

import torch as th
from torch import nn

from ..io.diffusers_library import import_diffusers

_diffusers = import_diffusers("this architecture")
UNet2DModel, DiTTransformer2DModel = _diffusers.UNet2DModel, _diffusers.DiTTransformer2DModel
ResnetBlock2D = _diffusers.models.resnet.ResnetBlock2D
Attention = _diffusers.models.attention_processor.Attention
BasicTransformerBlock = _diffusers.models.attention.BasicTransformerBlock

MOST_PARAMETERS = 20e9


def adopt(network: nn.Module, model_class: type[nn.Module], config: dict[str, Any]) -> None:
    """Make a model's parts a network's own, under their own names, and the model its `model`.

    The model is no submodule: what is called `conv_in.weight` in diffusers is called so in the network.
    Both hold the same parts, so moving, casting, training and compiling the network does all this to the
    model.

    Args:
        network: the network.
        model_class: the model's class.
        config: its arguments.

    Raises:
        ValueError: sizes that do not fit each other, or more parameters than any such model has.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            with th.device("meta"):
                count = sum(p.numel() for p in model_class(**config).parameters())
            if count > MOST_PARAMETERS:
                raise ValueError(
                    f"{count / 1e9:.0f}e9 parameters are more than {MOST_PARAMETERS / 1e9:.0f}e9"
                )
            model = model_class(**config)
        except (TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"diffusers builds no {model_class.__name__} of it: {error}") from None
    for name, part in model.named_children():
        network.add_module(name, part)
    network.__dict__["model"] = model  # past nn.Module, which would make it a submodule


def attention_heads(network: nn.Module) -> dict[str, int]:
    """How many heads each attention in a network has, by its name there."""
    return {name: part.heads for name, part in network.named_modules() if isinstance(part, Attention)}
