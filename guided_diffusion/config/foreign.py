"""What a diffusers folder says of its model, as configuration keys. Imports no torch.

A `UNet2DModel` that ADM's U-Net can express becomes one (`architecture: adm`); any other, and a
`DiTTransformer2DModel`, runs as diffusers wrote it.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..io.model_folder import ModelFolder
from .adm_diffusers import adm_keys
from .architectures import DiTArchitecture, UNet2DArchitecture, own_keys
from .settings import MOST_STEPS, PREDICTION_TYPES, Architecture

NULL_CLASS = (
    "_null_class"  # of a UNet2DModel that we export; diffusers keeps keys that begin so and heeds none
)
# diffusers' names of the noise schedules, and ours.
NOISE_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
# Those whose betas are of a process trained in discrete steps. The former two clip the predicted x_0 unless
# they say they do not; the others have no such choice.
_CLIPPING = ("DDPMScheduler", "DDIMScheduler")
_SCHEDULERS = (*_CLIPPING, "PNDMScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler")
_FIXED = {
    "fixed_small": True,
    "fixed_small_log": True,
    "fixed_large": False,
    "fixed_large_log": False,
}


def folder_keys(folder: ModelFolder, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section whose model is a folder: of its architecture, its process and its space.

    Args:
        folder: the folder.
        given: the section's own keys: `architecture` chooses among those that can read the folder's network,
            `image_size` where the folder does not say it, `null_class` whether a UNet2DModel's last label is
            that (an export of ours says so itself), `vae_path` the space of a network without pipeline.

    Raises:
        UserError: something that is not expressed here, or weights that do not fit the description.
    """
    config = _Config(folder.config, f"{folder.files[0]}: ")
    kind = config.text("_class_name", "")
    if kind == "Transformer2DModel" and config.text("norm_type", "") == "ada_norm_zero":
        kind = "DiTTransformer2DModel"  # as diffusers takes it; the published DiTs' folders still say so
    if kind not in ("UNet2DModel", "DiTTransformer2DModel"):
        raise UserError(
            f"{folder.path}: is a {kind or 'network without _class_name'}; those that can be read are "
            "UNet2DModel and DiTTransformer2DModel"
        )
    channels = config.number("in_channels", 3 if kind == "UNet2DModel" else 4)
    out_channels = config.number("out_channels", 3 if kind == "UNet2DModel" else channels)
    if out_channels not in (channels, 2 * channels):
        raise UserError(
            f"{folder.path}: gives {out_channels} channels of {channels}, neither as many nor twice as many"
        )
    if channels != 3 and not folder.vae and not given.get("vae_path"):
        raise UserError(
            f"{folder.path}: takes {channels} channels, images have 3; for a latent model give vae_path"
        )
    keys: dict[str, Any] = {
        "image_size": _image_size(config, given),
        "learn_sigma": out_channels == 2 * channels,
    }
    if folder.vae:
        keys["vae_path"] = str(folder.vae.resolve())
    read = _unet if kind == "UNet2DModel" else _transformer
    keys |= read(config, folder, keys["image_size"], channels, out_channels, given)
    if folder.scheduler is not None:
        scheduler = _Config(folder.scheduler, f"{folder.path}: its scheduler's ")
        keys |= _process(scheduler, keys["learn_sigma"])
    elif "noise_schedule" not in given:
        raise UserError(
            f"{folder.path}: has no scheduler, so its process must be configured: noise_schedule, and "
            "beta_start, beta_end, diffusion_steps, prediction_type, clip_denoised where not the defaults"
        )
    return keys


class _Config:
    """A JSON object of a folder, whose values are of the types they must be.

    Args:
        values: the object.
        where: names it in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def get(self, name: str, default: Any, kind: type | tuple[type, ...]) -> Any:
        """A value; the default where it is missing or null.

        Raises:
            UserError: of another type.
        """
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.where}{name} cannot be {value!r:.60}")
        return value

    def text(self, name: str, default: str) -> str:
        """A string."""
        return self.get(name, default, str)

    def number(self, name: str, default: int) -> int:
        """A whole number."""
        return self.get(name, default, int)

    def real(self, name: str, default: float) -> float:
        """A number."""
        return float(self.get(name, default, (int, float)))

    def truth(self, name: str, default: bool) -> bool:
        """True or false."""
        return self.get(name, default, bool)

    def require(self, name: str, *allowed: Any) -> None:
        """Raise `UserError` unless a value is missing, null or one of those given."""
        value = self.values.get(name)
        if value is not None and value not in allowed:
            raise UserError(
                f"{self.where}{name} is {value!r:.60}, which is not expressed here"
                + (f"; it could be {' or '.join(repr(a) for a in allowed)}" if allowed else "")
            )


def _image_size(config: _Config, given: Mapping[str, Any]) -> int:
    size = config.values.get("sample_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is None:
        size = given.get("image_size")
        if size is None:
            raise UserError(f"{config.where}says no sample_size: give image_size")
        if not str(size).isdigit():
            raise UserError(f"image_size {size!r:.60} is no whole number")
        return int(size)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 1 << 16:
        raise UserError(f"{config.where}sample_size {size!r:.60} is not the side of a square")
    return size


def _own(config: _Config, settings: type[Architecture]) -> dict[str, Any]:
    """The keys of an architecture that a network's config.json gives under the same names.

    Raises:
        UserError: values of other types, or that cannot be right.
    """
    keys: dict[str, Any] = {}
    for name, default in own_keys(settings()).items():
        value = config.values.get(name, default)
        if value is None:
            value = type(default)()
        if isinstance(value, list) and isinstance(default, str) and len(value) <= 32:
            value = ",".join(map(str, value))
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(default):
            raise UserError(f"{config.where}{name} cannot be {value!r:.60}")
        keys[name] = value
    return keys


def _classes(labels: int | None, *, null_class: bool = False) -> dict[str, Any]:
    """The keys of a network that takes so many labels, of which the last may be the null class."""
    if labels is None:
        return {"class_cond": False}
    return {"class_cond": True, "num_classes": labels - null_class, "null_class": null_class}


def _unet(
    config: _Config,
    folder: ModelFolder,
    size: int,
    channels: int,
    out_channels: int,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The keys of a UNet2DModel."""
    config.require("class_embed_type")
    config.require("time_embedding_type", "positional", "learned")
    keys = _own(config, UNet2DArchitecture)
    null_class = given.get("null_class", config.truth(NULL_CLASS, False))
    classes = _classes(config.get("num_class_embeds", None, int), null_class=bool(null_class))
    settings = UNet2DArchitecture(**{"image_size": size, **classes, **keys})
    settings.check(config.where)
    made = settings.config(channels, out_channels)
    widths, layers = made["block_out_channels"], settings.layers_per_block
    expected = {
        "conv_in.weight": (widths[0], channels, 3, 3),
        "conv_out.weight": (out_channels, widths[0], 3, 3),
        **{f"down_blocks.{level}.resnets.0.conv1.bias": (width,) for level, width in enumerate(widths)},
    }
    _require_fit(
        folder,
        expected,
        f"down_blocks.0.resnets.{layers - 1}.conv1.bias",
        f"down_blocks.0.resnets.{layers}.conv1.bias",
    )
    adm, wanted = adm_keys(made), given.get("architecture")
    name = "adm" if adm is not None and wanted != "diffusers_unet2d" else "diffusers_unet2d"
    return _as(name, wanted, adm if name == "adm" else keys, classes, folder)


def _transformer(
    config: _Config,
    folder: ModelFolder,
    size: int,
    channels: int,
    out_channels: int,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The keys of a DiTTransformer2DModel."""
    config.require("norm_type", "ada_norm_zero")
    keys = _own(config, DiTArchitecture)
    count = config.number("num_embeds_ada_norm", 1000)
    classes = {"class_cond": False} if count == 1 else {"class_cond": True, "num_classes": count}
    settings = DiTArchitecture(**{"image_size": size, **classes, **keys})
    settings.check(config.where)
    width = settings.num_attention_heads * settings.attention_head_dim
    block = "transformer_blocks.{}.norm1.linear.bias"
    expected = {
        "pos_embed.proj.weight": (width, channels, settings.patch_size, settings.patch_size),
        "proj_out_2.bias": (settings.patch_size**2 * out_channels,),
        block.format(0): (6 * width,),
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": (count + 1, width),
    }
    _require_fit(folder, expected, block.format(settings.num_layers - 1), block.format(settings.num_layers))
    return _as("dit", given.get("architecture"), keys, classes, folder)


def _as(
    name: str,
    wanted: str | None,
    keys: Mapping[str, Any] | None,
    classes: dict[str, Any],
    folder: ModelFolder,
) -> dict[str, Any]:
    """The keys of an architecture that reads a folder's network; one of the user's has keys of its own.

    Raises:
        UserError: another architecture of ours is wanted.
    """
    if wanted and ":" in wanted:
        return classes
    if wanted not in (None, name):
        raise UserError(f"{folder.path}: architecture is {wanted!r}, but the folder's network is a {name!r}")
    return {"architecture": name, **classes, **(keys or {})}


def _require_fit(
    folder: ModelFolder, expected: Mapping[str, tuple[int, ...]], last: str, beyond: str
) -> None:
    """Refuse a description that its weights do not bear out, before a network of its sizes is built.

    Args:
        folder: the folder.
        expected: shapes by name.
        last: a tensor of the last layer.
        beyond: what would be called so in one more layer.
    """
    for name, shape in expected.items():
        if (found := folder.shapes.get(name)) != shape:
            held = "have none" if found is None else f"hold one of {list(found)}"
            raise UserError(
                f"{folder.path}: by its config.json {name} is of {list(shape)}, but its weights {held}"
            )
    if last not in folder.shapes or beyond in folder.shapes:
        raise UserError(f"{folder.path}: its config.json and its weights differ in the number of layers")


def _process(config: _Config, learn_sigma: bool) -> dict[str, Any]:
    """The keys of the process that a scheduler's config describes.

    The process is the trained one: what a scheduler says of the steps it visits in sampling is not of it.

    Raises:
        UserError: a scheduler that is not expressed here.
    """
    kind = config.text("_class_name", "")
    if kind not in _SCHEDULERS:
        raise UserError(f"{config.where}class is {kind!r:.60}, not one of {', '.join(_SCHEDULERS)}")
    config.require("trained_betas")
    for name in ("thresholding", "rescale_betas_zero_snr"):
        config.require(name, False)
    schedule = config.text("beta_schedule", "linear")
    config.require("beta_schedule", *NOISE_SCHEDULES)
    config.require("prediction_type", *PREDICTION_TYPES)
    clipped = kind in _CLIPPING and config.truth("clip_sample", True)
    if clipped:
        config.require("clip_sample_range", 1, 1.0)
    if not 0 < (steps := config.number("num_train_timesteps", 1000)) <= MOST_STEPS:
        raise UserError(f"{config.where}num_train_timesteps must be 1 to {MOST_STEPS}, not {steps}")
    keys: dict[str, Any] = {
        "diffusion_steps": steps,
        "noise_schedule": NOISE_SCHEDULES[schedule],
        "beta_start": 0.0,
        "beta_end": 0.0,
        "prediction_type": config.text("prediction_type", "epsilon"),
        "clip_denoised": clipped,
        "rescale_timesteps": False,
    }
    if schedule != "squaredcos_cap_v2":
        keys |= {"beta_start": config.real("beta_start", 0.0001), "beta_end": config.real("beta_end", 0.02)}
        for name in ("beta_start", "beta_end"):
            if not 0 < keys[name] <= 1:
                raise UserError(f"{config.where}{name} must be between 0 and 1, not {keys[name]}")
    variance = config.text("variance_type", "learned_range" if learn_sigma else "fixed_small")
    config.require("variance_type", *_FIXED, "learned_range")
    if kind == "DDPMScheduler" and (variance == "learned_range") != learn_sigma:
        does = "gives" if learn_sigma else "does not give"
        raise UserError(
            f"{config.where}variance_type is {variance!r}, but the network {does} a learned one's channels"
        )
    return keys | {"sigma_small": not learn_sigma and _FIXED.get(variance, True)}
