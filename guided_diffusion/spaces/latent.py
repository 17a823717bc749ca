"""Latents: what the VAE of a latent diffusion model (Rombach et al., 2022, section 3) makes of images.

The VAE is a folder as diffusers saves it: safetensors, and `config.json`, which names the class, VQModel or
AutoencoderKL. Nothing in the folder is executed, and pickled weights are refused. diffusers is imported, and
the weights are read, when the first image is encoded or decoded; preparing and distilling need neither.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from .. import dist_util
from ..errors import UserError
from ..io.diffusers_library import import_diffusers
from ..io.files import read_object, sha256_of
from ..io.model_folder import weight_files
from ..io.safetensors_file import read_safetensors
from .pixel import PixelSpace

# The classes, and the factor of those whose config.json gives none. The files of LDM's own VQ models do not,
# and LDM trains on them at scale 1; diffusers' default for the class, 0.18215, is Stable Diffusion's.
_CLASSES = {"VQModel": 1.0, "AutoencoderKL": 0.18215}
_MOST, _MOST_LAYERS = 1 << 20, 64
_PIXELS_AT_ONCE = 1 << 20  # that are encoded or decoded together: 16 images of 256x256


class LatentSpace:
    """The latents of a diffusers VAE, shifted and scaled as its configuration says.

    z are the VAE's own latents, x = (z - shift) * scale is what the network denoises. An AutoencoderKL's z is
    drawn from its posterior, as Latent Diffusion and DiT train; a VQModel's z is what goes into the
    quantisation, which belongs to decoding (Rombach et al., 2022, section 3.1).

    Args:
        folder: of the VAE.
        size: H = W of the latents.
        scale: instead of the configuration's; 0 for that.

    Raises:
        UserError: no such folder, a class that is not known, or a configuration beyond reason.
    """

    # As diffusers' schedulers with clip_sample. Configurations of latents do not clip unless they say so.
    bounds: tuple[float, float] | None = (-1.0, 1.0)

    def __init__(self, folder: str | Path, size: int, scale: float = 0.0):
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        self.kind = self.config["_class_name"]
        channels = self.config.get("latent_channels", 4 if self.kind == "AutoencoderKL" else 3)
        if self.kind == "VQModel":
            channels = self.config.get("vq_embed_dim") or channels
        self.shape = (channels, size, size)
        self.image_size = size << len(self.config.get("block_out_channels", [64])) - 1
        self.scale = float(scale or self.config.get("scaling_factor") or _CLASSES[self.kind])
        self.shift = float(self.config.get("shift_factor") or 0.0)
        self._is_doubtful = not scale and self.kind == "VQModel" and self.scale == _CLASSES["AutoencoderKL"]

    def encode(self, images: th.Tensor) -> th.Tensor:
        """uint8 [B, H', W', 3] -> float32 [B, C, H, W]; an AutoencoderKL's are drawn by torch's generator."""
        return self.draw(self.moments(images))

    @th.no_grad()
    def moments(self, images: th.Tensor) -> th.Tensor:
        """What `draw` needs of images: the part of encoding that is not random.

        Args:
            images: uint8 [B, H', W', 3].

        Returns:
            float32 [B, M, H, W]: mean and standard deviation of x, M = 2C; of a VQModel x itself, M = C.
        """
        vae, parts = self.vae(images.device), []
        for part in self._parts(PixelSpace(self.image_size).encode(images)):
            encoded = vae.encode(part)
            if self.kind == "VQModel":
                parts.append((encoded.latents - self.shift) * self.scale)
            else:
                mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
                parts.append(th.cat([(mean - self.shift) * self.scale, std * self.scale], dim=1))
        return th.cat(parts).contiguous()

    def draw(self, moments: th.Tensor) -> th.Tensor:
        """float32 [B, M, H, W] of `moments` -> x float32 [B, C, H, W]."""
        if self.kind == "VQModel":
            return moments
        mean, std = moments.chunk(2, dim=1)
        return mean + std * th.randn(mean.shape, device=mean.device)  # whatever layout the VAE leaves

    def decode(self, x: th.Tensor) -> np.ndarray:
        """[B, C, H, W] -> uint8 [B, H', W', 3], rounded to the nearest level as by diffusers' pipelines.

        Raises:
            UserError: the VAE gives numbers that are not finite for latents that are.
        """
        images = []
        for part in self._decoded(x):
            if not part.isfinite().all() and x.isfinite().all():
                raise UserError(f"{self.folder}: the VAE gives no finite numbers")
            images.append((part * 127.5 + 128).clamp(0, 255).to(th.uint8))
        return th.cat([part.permute(0, 2, 3, 1).cpu() for part in images]).numpy()

    def pixels(self, x: th.Tensor) -> th.Tensor:
        """[B, C, H, W] -> float32 [B, 3, H', W'], about within [-1, 1]: `decode` before it rounds."""
        return th.cat(list(self._decoded(x)))

    @th.no_grad()
    def _decoded(self, x: th.Tensor) -> Iterator[th.Tensor]:
        vae = self.vae(x.device)
        yield from (vae.decode(part / self.scale + self.shift).sample for part in self._parts(x))

    def _parts(self, x: th.Tensor) -> tuple[th.Tensor, ...]:
        """Pieces that need a bounded amount of memory in the VAE."""
        return x.split(max(1, _PIXELS_AT_ONCE // self.image_size**2))

    def identity(self) -> dict[str, Any]:
        """The VAE's weights, and the factors."""
        files = weight_files(self.folder)
        stamps = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
        return {"vae_sha256": _sha256(stamps), "vae_scale": self.scale, "vae_shift": self.shift}

    def describe(self) -> dict[str, Any]:
        """Kind, class and shape, and what `identity` says."""
        return {"kind": "latents", "vae": self.kind, "shape": list(self.shape), **self.identity()}

    def vae(self, device: th.device) -> Any:
        """diffusers' VAE with its weights, float32, in eval mode, on a device; loaded once.

        Raises:
            UserError: the weights do not fit its configuration.
        """
        if (vae := self.__dict__.get("_loaded")) is None:
            vae = self._loaded = self._load()
        return vae.to(device)

    def _load(self) -> Any:
        """The VAE in float32 on the CPU, in eval mode."""
        if self._is_doubtful:
            dist_util.warn(
                f"{self.folder}: its scaling_factor, {self.scale}, is what diffusers writes where none was; "
                "LDM's own VQ models have vae_scale=1"
            )
        diffusers = import_diffusers(f"{self.folder}: a VAE")
        kind = diffusers.VQModel if self.kind == "VQModel" else diffusers.AutoencoderKL
        files = weight_files(self.folder)
        state = {name: value for file in files for name, value in read_safetensors(file, "VAE").items()}
        try:
            with th.device("meta"):  # sizes are claims until they are those of the weights
                vae = kind.from_config({k: v for k, v in self.config.items() if not k.startswith("_")})
            vae._fix_state_dict_keys_on_load(state)  # older names of the attention's
            vae.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ZeroDivisionError) as error:
            told = " ".join(str(error).split())
            raise UserError(
                f"{self.folder}: the weights do not fit config.json, or it is damaged ({told:.200})"
            ) from None
        return vae.eval().requires_grad_(False)


def _read_config(folder: Path) -> dict[str, Any]:
    """A VAE's config.json.

    Raises:
        UserError: missing, damaged, of another class, or with values that no such VAE has.
    """
    if not folder.is_dir():
        raise UserError(
            f"vae_path: no such folder: {folder}; it must be a diffusers VQModel or AutoencoderKL"
        )
    path = folder / "config.json"
    try:
        config = read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable configuration of a VAE ({error})") from None
    if (kind := config.get("_class_name")) not in tuple(_CLASSES):
        raise UserError(f"{path}: of class {kind!r:.60}; a VAE is one of {', '.join(_CLASSES)}")
    for name, value in config.items():
        most = _MOST_LAYERS if name == "layers_per_block" else _MOST
        numbers = value if isinstance(value, list) else [value]
        wrong = [n for n in numbers if isinstance(n, (int, float)) and not abs(n) <= most]
        if wrong or len(numbers) > 16:
            raise UserError(f"{path}: {name} {value!s:.60} is beyond reason")
    whole = [config.get(name) for name in ("latent_channels", "vq_embed_dim")]
    factors = [config.get(name) for name in ("scaling_factor", "shift_factor")]
    if not all(n is None or (type(n) is int and n > 0) for n in whole):
        raise UserError(
            f"{path}: latent_channels and vq_embed_dim must be whole numbers above 0, not {whole}"
        )
    if not all(n is None or type(n) in (int, float) for n in factors):
        raise UserError(f"{path}: scaling_factor and shift_factor must be numbers, not {factors}")
    if isinstance(groups := config.get("norm_num_groups"), int) and groups < 0:
        raise UserError(f"{path}: norm_num_groups is {groups}")
    if not (isinstance(widths := config.get("block_out_channels", [64]), list) and widths):
        raise UserError(f"{path}: block_out_channels must be a list of widths")
    for name, channels in (("in_channels", 3), ("out_channels", 3)):
        if config.get(name, channels) != channels:
            raise UserError(f"{path}: {name} is {config[name]}, images have {channels} channels")
    for name in ("latents_mean", "latents_std", "quantization_config"):
        if config.get(name) is not None:
            raise UserError(f"{path}: {name} is not known here")
    return config


@functools.lru_cache(maxsize=16)
def _sha256(files: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of a file; of several, that of theirs. Size and time of each tell when it is another."""
    sums = [sha256_of(path) for path, _, _ in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
