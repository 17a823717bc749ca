"""Which arithmetic a run uses on its device."""

import torch as th

from .. import dist_util
from ..config.settings import Run
from .base import DenoisingNetwork


def place(network: DenoisingNetwork, use_fp16: bool, run: Run, *, frozen: bool = False) -> None:
    """Move a network to this rank's device and choose its arithmetic there.

    Args:
        network: the network.
        use_fp16: of its configuration.
        run: the run's configuration.
        frozen: it is only evaluated from here on.
    """
    device = dist_util.dev()
    network.to(device)
    dtype = compute_dtype(run.precision, use_fp16, device)
    network.use_dtype(dtype, frozen=frozen, channels_last=run.channels_last)
    if run.compile:
        network.compile_blocks()
    if frozen and run.cuda_graphs and device.type == "cuda":
        network.capture()


def compute_dtype(precision: str, use_fp16: bool, device: th.device) -> th.dtype:
    """The dtype of `run.precision` on a device.

    "auto" is float32; with the configurations' old `use_fp16: true` it is the best 16-bit format that the
    device is fast in: bfloat16, float16 on GPUs without it, float32 on processors without either.
    """
    if precision != "auto":
        return {"fp32": th.float32, "bf16": th.bfloat16, "fp16": th.float16}[precision]
    if not use_fp16:
        return th.float32
    if device.type == "cuda":
        return th.bfloat16 if th.cuda.is_bf16_supported(including_emulation=False) else th.float16
    capabilities: dict = getattr(th.cpu, "get_capabilities", dict)()
    fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return th.bfloat16 if device.type == "cpu" and fast else th.float32
