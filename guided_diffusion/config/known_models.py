"""Networks that people have: what they are, where they come from, and what their weights do not show.

Imports no torch. The keys are those of the published commands and configurations; a test compares them with
yaml/.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DDPM_IP = "DDPM-IP (github.com/forever208/DDPM-IP)"
_ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
_LDM = "CompVis' latent-diffusion (github.com/CompVis/latent-diffusion)"

_COMMON = {
    "num_channels": 128,
    "num_res_blocks": 3,
    "class_cond": False,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "learn_sigma": True,
    "diffusion_steps": 1000,
    "noise_schedule": "cosine",
}
_AT_16 = _COMMON | {
    "image_size": 16,
    "num_res_blocks": 1,
    "attention_resolutions": "8,4",
    "channel_mult": "1,2,2",
}
_AT_32 = _COMMON | {
    "image_size": 32,
    "num_head_channels": 32,
    "attention_resolutions": "16,8",
    "channel_mult": "1,2,2,2",
}
_DIGITS_32 = _COMMON | {
    "image_size": 32,
    "num_channels": 16,
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "attention_resolutions": "8,4",
    "channel_mult": "1,2,3,4",
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
}
_AT_64 = _COMMON | {
    "image_size": 64,
    "num_channels": 192,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "channel_mult": "1,2,3,4",
}
_LARGE = _AT_64 | {
    "num_channels": 256,
    "num_res_blocks": 2,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
}
_1000_CLASSES = {"class_cond": True, "num_classes": 1000}
_AT_256 = {"image_size": 256, "channel_mult": "1,1,2,2,4,4"}
_LATENTS = _AT_64 | {
    "num_channels": 224,
    "num_res_blocks": 2,
    "num_head_channels": 32,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "sigma_small": True,
    "noise_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "vae_scale": 1.0,
}


@dataclass(frozen=True)
class KnownModel:
    """A network by its configuration.

    Attributes:
        name: what it is.
        keys: of its architecture, process and space; what its weights show and what they do not.
        file: what its checkpoint is called in model/; "" for a student.
        origin: where that comes from.
    """

    name: str
    keys: Mapping[str, Any]
    file: str = ""
    origin: str = ""


KNOWN_MODELS = (
    KnownModel(
        "DDPM-IP's CIFAR-10 teacher",
        _AT_32,
        "32x32_diffusion_cifar10.pt",
        f"ADM_cifar10_baseline.pt of {_DDPM_IP}",
    ),
    KnownModel(
        "DDPM-IP's ImageNet 32x32 teacher",
        _AT_32,
        "DDPM_IP_imageNet32.pt",
        f"DDPM_IP_imageNet32.pt of {_DDPM_IP}",
    ),
    KnownModel(
        "DDPM-IP's CelebA 64x64 teacher", _AT_64, "DDPM_IP_celeba64.pt", f"DDPM_IP_celeba64.pt of {_DDPM_IP}"
    ),
    KnownModel(
        "ADM's ImageNet 64x64",
        _AT_64 | _1000_CLASSES,
        "64x64_diffusion.pt",
        f"{_ADM}64x64_diffusion.pt",
    ),
    KnownModel(
        "ADM's ImageNet 128x128",
        _LARGE | _1000_CLASSES | {"image_size": 128, "channel_mult": "1,1,2,3,4", "num_head_channels": -1},
        "128x128_diffusion.pt",
        f"{_ADM}128x128_diffusion.pt",
    ),
    KnownModel(
        "ADM's ImageNet 256x256",
        _LARGE | _1000_CLASSES | _AT_256,
        "256x256_diffusion.pt",
        f"{_ADM}256x256_diffusion.pt",
    ),
    KnownModel(
        "ADM's ImageNet 256x256 without classes (or its LSUN 256x256)",
        _LARGE | _AT_256,
        "256x256_diffusion_uncond.pt",
        f"{_ADM}256x256_diffusion_uncond.pt",
    ),
    KnownModel(
        "ADM's ImageNet 512x512",
        _LARGE | _1000_CLASSES | {"image_size": 512, "channel_mult": "0.5,1,1,2,2,4,4"},
        "512x512_diffusion.pt",
        f"{_ADM}512x512_diffusion.pt",
    ),
    KnownModel("LDM-4 of CelebA-HQ", _LATENTS, "ldm_celebahq256.ckpt", f"model.ckpt in celeba.zip of {_LDM}"),
    KnownModel("LDM-4 of FFHQ", _LATENTS, "ldm_ffhq256.ckpt", f"model.ckpt in ffhq.zip of {_LDM}"),
    KnownModel(
        "the embedded digits teacher",
        _AT_16 | {"num_channels": 32},
        "digits_teacher.pt",
        "the copy in this repository",
    ),
    KnownModel(
        "the second study's digits teacher, 32x32",
        _DIGITS_32,
        "digits32_teacher.pt",
        "the copy in this repository",
    ),
    *(
        KnownModel(f"a CIFAR-10 or ImageNet 32x32 student, {size}M", _AT_32 | widths)
        for size, widths in {
            14: {"num_channels": 64},
            24: {"num_channels": 96, "num_res_blocks": 2},
            32: {"num_channels": 96},
            44: {"num_channels": 128, "num_res_blocks": 2},
            57: {},
        }.items()
    ),
    KnownModel(
        "a CelebA 64x64 student, 57M",
        _AT_64 | {"num_channels": 96, "num_res_blocks": 2, "num_head_channels": 32},
    ),
    KnownModel("an LDM-4 student, 89M", _LATENTS | {"num_channels": 128}),
    KnownModel("a student of the digits, 0.36M", _AT_16 | {"num_channels": 16}),
    KnownModel(
        "a student of the digits at 32x32, 0.24M", _DIGITS_32 | {"num_channels": 8, "num_head_channels": 8}
    ),
)


def download_hint(path: str | Path) -> str:
    """Where to get a known model's file from, as the end of a message that it is missing; "" for others."""
    for model in KNOWN_MODELS:
        if model.file and Path(path).name == model.file:
            return f"; it is {model.name}: get {model.origin}, and save it so (model/README.md)"
    return ""
