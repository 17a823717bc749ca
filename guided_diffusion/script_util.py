"""The public factory: networks and diffusion processes from plain keyword arguments.

Keyword names and defaults are those that guided-diffusion users call; ADM's published models are all
built this way.
"""

from dataclasses import asdict
from typing import Any

import torch as th

from .config.settings import Network
from .errors import UserError
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from .respace import SpacedDiffusion, space_timesteps
from .schedule import get_named_beta_schedule
from .unet import UNetModel

NUM_CLASSES = 1000

_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


_DIFFUSION_KEYS = (
    *("learn_sigma", "diffusion_steps", "noise_schedule", "timestep_respacing", "use_kl"),
    *("predict_xstart", "rescale_timesteps", "rescale_learned_sigmas"),
)


def diffusion_defaults() -> dict[str, Any]:
    """Defaults of `create_gaussian_diffusion` under the names that configuration files use."""
    return {key: value for key, value in model_and_diffusion_defaults().items() if key in _DIFFUSION_KEYS}


def model_defaults() -> dict[str, Any]:
    """Defaults of `create_model`, without `learn_sigma`, which belongs to both."""
    return {key: value for key, value in model_and_diffusion_defaults().items() if key not in _DIFFUSION_KEYS}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Defaults of `create_model_and_diffusion`: those of the configuration files."""
    return asdict(Network())


def create_model_and_diffusion(**options: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """Build both from one set of keyword arguments; those left out take their defaults.

    Raises:
        TypeError: an argument that neither of the two has.
    """
    known = model_and_diffusion_defaults()
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"unknown arguments: {', '.join(unknown)}")
    options = known | options
    model = create_model(
        learn_sigma=options["learn_sigma"], **{key: options[key] for key in model_defaults()}
    )
    process = {key: options[key] for key in _DIFFUSION_KEYS if key != "diffusion_steps"}
    return model, create_gaussian_diffusion(steps=options["diffusion_steps"], **process)


def parse_channel_mult(channel_mult: str, image_size: int) -> tuple[float, ...]:
    """Widths per level from "1,2,2"; "" for ADM's choice at this image size.

    Raises:
        ValueError: no numbers, or "" at an image size ADM has no choice for.
    """
    if channel_mult:
        numbers = [float(part) for part in channel_mult.split(",")]
        return tuple(int(n) if n.is_integer() else n for n in numbers)
    if image_size not in _CHANNEL_MULT:
        raise ValueError(f"image_size {image_size} has no default channel_mult; give one such as 1,2,2")
    return _CHANNEL_MULT[image_size]


def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    num_classes: int = NUM_CLASSES,
) -> UNetModel:
    """Build an ADM U-Net, initialised as ADM's.

    Args:
        image_size: H = W of the images.
        num_channels: base width.
        num_res_blocks: residual blocks per level.
        channel_mult: widths per level as "1,2,2"; "" for the published choice at this image size.
        learn_sigma: 6 output channels, the last three for the variance.
        class_cond: take class labels y.
        use_checkpoint: recompute blocks in backward to save memory.
        attention_resolutions: feature map sizes with attention, as "16,8".
        num_heads, num_head_channels, num_heads_upsample: heads by number, or by width if that is
            not -1; on the way up a number of its own if that is not -1.
        use_scale_shift_norm: condition by scale and shift.
        dropout: in [0, 1).
        resblock_updown: resample inside residual blocks.
        use_fp16: run convolutions and attention in float16; parameters stay float32.
        use_new_attention_order: see `unet_blocks.AttentionBlock`.
        num_classes: number of classes if `class_cond`; 1000 in the published models.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    levels = parse_channel_mult(channel_mult, image_size)
    sizes = [int(part) for part in str(attention_resolutions).split(",") if part]
    if image_size % 2 ** (len(levels) - 1):
        raise ValueError(f"image_size {image_size} cannot be halved {len(levels) - 1} times")
    heads = {"num_heads": num_heads, "num_heads_upsample": num_heads_upsample}
    for level, mult in enumerate(levels):
        width = int(mult * num_channels)
        used = image_size >> level in sizes or level == len(levels) - 1
        divisors = {"num_head_channels": num_head_channels} if num_head_channels != -1 else heads
        for name, value in divisors.items():
            if used and value != -1 and (value <= 0 or width % value):
                raise ValueError(f"{name} {value} does not divide the attention width {width}")
    model = UNetModel(
        image_size=image_size,
        model_channels=num_channels,
        out_channels=6 if learn_sigma else 3,
        num_res_blocks=num_res_blocks,
        attention_resolutions=[image_size // size for size in sizes],
        dropout=dropout,
        channel_mult=levels,
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        use_new_attention_order=use_new_attention_order,
    )
    if use_fp16:
        model.use_dtype(th.float16)
    return model


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str = "",
) -> SpacedDiffusion:
    """Build a diffusion process.

    Args:
        steps: T of the original process.
        learn_sigma: learned variance; else fixed, small or large by `sigma_small`.
        sigma_small: the posterior variance instead of beta.
        noise_schedule: "linear" or "cosine".
        use_kl: train the (rescaled) variational bound alone.
        predict_xstart: the model predicts x_0 instead of epsilon.
        rescale_timesteps: feed the model timesteps scaled to 0..1000.
        rescale_learned_sigmas: multiply the bound beside the MSE by T/1000.
        timestep_respacing: see `respace.space_timesteps`; "" keeps every step.

    Raises:
        ValueError: unknown schedule or impossible respacing.
    """
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        space_timesteps(steps, str(timestep_respacing) or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def build_network(network: Network, where: str = "") -> tuple[UNetModel, SpacedDiffusion]:
    """Build the network and process of a configuration section.

    Args:
        network: the section.
        where: its name in messages, such as "student.".

    Raises:
        UserError: sizes that do not fit each other, impossible respacing.
    """
    try:
        options = asdict(network)
        model = create_model(
            learn_sigma=network.learn_sigma, **{key: options[key] for key in model_defaults()}
        )
    except ValueError as error:
        raise UserError(f"{where.rstrip('.') or 'configuration'}: {error}") from None
    # Which 16-bit format, if any, is the run's choice: see precision.compute_dtype.
    model.use_dtype(th.float32)
    return model, build_process(network, f"{where}timestep_respacing")


def build_process(network: Network, where: str) -> SpacedDiffusion:
    """Build the diffusion process of a configuration section; `where` names the key that can be wrong.

    Raises:
        UserError: impossible respacing.
    """
    options = asdict(network)
    process = {key: options[key] for key in _DIFFUSION_KEYS if key != "diffusion_steps"}
    try:
        return create_gaussian_diffusion(steps=network.diffusion_steps, **process)
    except ValueError as error:
        raise UserError(f"{where} '{network.timestep_respacing}': {error}") from None
