"""The public factory: networks and diffusion processes from plain keyword arguments.

Keyword names and defaults are those that guided-diffusion users call; ADM's published models are all
built this way.
"""

from collections.abc import Sequence
from typing import Any

import torch as th

from .config.registry import ARCHITECTURES, look_up
from .config.settings import PREDICTION_TYPES, AdmArchitecture, Denoiser, Process, flat
from .errors import UserError, first_line
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .networks.base import DenoisingNetwork
from .respace import SpacedDiffusion, space_timesteps
from .spaces import LatentSpace, PixelSpace, SampleSpace
from .unet import UNetModel

NUM_CLASSES = AdmArchitecture.num_classes


def diffusion_defaults() -> dict[str, Any]:
    """Defaults of `create_gaussian_diffusion` under the names that configuration files use."""
    return flat(Process())


def model_defaults() -> dict[str, Any]:
    """Defaults of `create_model`, without `learn_sigma`, which belongs to both."""
    return {key: value for key, value in flat(AdmArchitecture()).items() if key != "architecture"}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Defaults of `create_model_and_diffusion`: those of the configuration files."""
    return model_defaults() | diffusion_defaults()


def create_model_and_diffusion(**options: Any) -> tuple[UNetModel, SpacedDiffusion]:
    """Build both from one set of keyword arguments; those left out take their defaults.

    Raises:
        TypeError: an argument that neither of the two has.
        ValueError: sizes that do not fit each other, unknown schedule or impossible respacing.
    """
    known = model_and_diffusion_defaults()
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"unknown arguments: {', '.join(unknown)}")
    options = known | options
    model = create_model(
        learn_sigma=options["learn_sigma"], **{key: options[key] for key in model_defaults()}
    )
    process = {key: options[key] for key in diffusion_defaults()}
    return model, create_gaussian_diffusion(steps=process.pop("diffusion_steps"), **process)


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
    null_class: bool = False,
    class_dropout_prob: float = 0.0,
) -> UNetModel:
    """Build an ADM U-Net for images, initialised as ADM's.

    Args:
        image_size: H = W of the images.
        num_channels: base width.
        num_res_blocks: residual blocks per level.
        channel_mult: widths per level as "1,2,2"; "" for the published choice at this image size.
        learn_sigma: 6 output channels, the last three for the variance.
        class_cond: take class labels y.
        use_checkpoint: recompute blocks in backward to save memory.
        attention_resolutions: feature map sizes with attention, as "16,8".
        num_heads: attention heads.
        num_head_channels: width of a head instead, if not -1.
        num_heads_upsample: heads on the way up, if not -1.
        use_scale_shift_norm: condition by scale and shift.
        dropout: in [0, 1).
        resblock_updown: resample inside residual blocks.
        use_fp16: run convolutions and attention in float16; parameters stay float32.
        use_new_attention_order: see `networks.blocks.AttentionBlock`.
        num_classes: number of classes if `class_cond`; 1000 in the published models.
        null_class: with `class_cond`, a label more, `num_classes`, means no class.
        class_dropout_prob: replace a label by that one this often in training.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    given = dict(locals())
    settings = AdmArchitecture(**{key: given[key] for key in model_defaults()})
    shape = PixelSpace(image_size).shape
    model = UNetModel.from_settings(settings, shape, output_channels(shape, learn_sigma))
    if use_fp16:
        model.use_dtype(th.float16)
    return model


def output_channels(shape: tuple[int, int, int], learn_sigma: bool) -> int:
    """Output channels of a network for samples (C, H, W): C, or 2C when the variance is learned."""
    return shape[0] * (2 if learn_sigma else 1)


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    beta_start: float = 0.0,
    beta_end: float = 0.0,
    use_kl: bool = False,
    predict_xstart: bool = False,
    prediction_type: str = "epsilon",
    clip_denoised: bool = True,
    bounds: tuple[float, float] | None = PixelSpace.bounds,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | int | Sequence[int] | None = "",
) -> SpacedDiffusion:
    """Build a diffusion process.

    Args:
        steps: T of the original process.
        learn_sigma: learned variance; else fixed, small or large by `sigma_small`.
        sigma_small: the posterior variance instead of beta.
        noise_schedule: see `gaussian_diffusion.get_named_beta_schedule`, also for the next two.
        beta_start: its first beta, or 0.
        beta_end: its last beta, or 0.
        use_kl: train the (rescaled) variational bound alone.
        predict_xstart: the model predicts x_0 instead of epsilon: `prediction_type="sample"`.
        prediction_type: what the model predicts: "epsilon", "sample" (x_0) or "v_prediction".
        clip_denoised: false: the predicted x_0 is never clipped, whatever a sampler is asked.
        bounds: of the sample space, where x_0 is clipped otherwise; None: never.
        rescale_timesteps: feed the model timesteps scaled to 0..1000.
        rescale_learned_sigmas: multiply the bound beside the MSE by T/1000.
        timestep_respacing: see `respace.space_timesteps`; what is empty keeps every step.

    Raises:
        ValueError: unknown schedule or prediction, or impossible respacing.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not '{prediction_type}'"
        )
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    if learn_sigma:
        var_type = ModelVarType.LEARNED_RANGE
    else:
        var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    if isinstance(timestep_respacing, int):
        timestep_respacing = str(timestep_respacing)
    return SpacedDiffusion(
        space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps, beta_start, beta_end),
        model_mean_type=ModelMeanType("sample" if predict_xstart else prediction_type),
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        bounds=bounds if clip_denoised else None,
    )


def build_space(denoiser: Denoiser) -> SampleSpace:
    """What the samples of a configured network are.

    Raises:
        UserError: no such VAE, or one that is not known.
    """
    size, space = denoiser.architecture.image_size, denoiser.space
    return LatentSpace(space.vae_path, size, space.vae_scale) if space.vae_path else PixelSpace(size)


def build_network(denoiser: Denoiser, where: str = "") -> tuple[DenoisingNetwork, SpacedDiffusion]:
    """Build the network and the process of a configuration section, in float32 on the CPU.

    Args:
        denoiser: the section.
        where: its name in messages, such as "student.".

    Raises:
        UserError: sizes that do not fit each other, impossible respacing, an unknown architecture.
    """
    settings, shape = denoiser.architecture, build_space(denoiser).shape
    network_class = look_up(ARCHITECTURES, settings.architecture, f"{where}architecture")
    if not (isinstance(network_class, type) and issubclass(network_class, DenoisingNetwork)):
        raise UserError(f"{where}architecture: '{settings.architecture}' is no DenoisingNetwork")
    settings.require_buildable(where)
    # Sizes that no memory holds raise more than ValueError; of a network of the user's own that may be a bug.
    is_ours = settings.architecture in ARCHITECTURES
    refusals = (ValueError, RuntimeError, TypeError, OverflowError) if is_ours else (ValueError,)
    try:
        network = network_class.from_settings(
            settings, shape, output_channels(shape, denoiser.process.learn_sigma)
        )
    except refusals as error:
        told = first_line(error)
        raise UserError(f"{where.rstrip('.') or 'configuration'}: {told}") from None
    if network.num_classes != (settings.num_classes if settings.class_cond else None):
        own = f"{settings.architecture} is built for {network.num_classes or 'no'} classes"
        raise UserError(f"{where}architecture: {own}, whatever {where}class_cond and {where}num_classes say")
    return network, build_process(denoiser, f"{where}timestep_respacing")


def build_process(denoiser: Denoiser, where: str, respacing: str | None = None) -> SpacedDiffusion:
    """Build the diffusion process of a configuration section.

    Args:
        denoiser: the section.
        where: the key that gives the respacing, for messages.
        respacing: instead of the configured one.

    Raises:
        UserError: impossible respacing.
    """
    keys = flat(denoiser.process)
    if respacing is not None:
        keys["timestep_respacing"] = respacing
    try:
        return create_gaussian_diffusion(
            steps=keys.pop("diffusion_steps"), bounds=build_space(denoiser).bounds, **keys
        )
    except ValueError as error:
        respacing, section = keys["timestep_respacing"], where.rpartition(".")[0]
        what = f"{where} '{respacing}'" if respacing else section or "configuration"
        raise UserError(f"{what}: {error}") from None
