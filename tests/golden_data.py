"""Reference numbers of the original programs; `tests/golden/README.md` says what each array is."""

import inspect
import json
import lzma
import math
import zlib
from pathlib import Path

import numpy as np
import torch as th
from tiny import denoiser

from guided_diffusion import dist_util
from guided_diffusion.config.settings import Run
from guided_diffusion.networks.precision import place
from guided_diffusion.script_util import build_network, create_model

GOLDEN = Path(__file__).parent / "golden"


def manifest(name):
    return json.loads((GOLDEN / name).read_text())


def arrays(name):
    """All arrays of an npz as float/int tensors, on this process's device."""
    with np.load(GOLDEN / name, allow_pickle=False) as archive:
        return {key: th.from_numpy(archive[key]).to(dist_util.dev()) for key in archive.files}


def rule_weight(name, shape):
    """The weight rule: every entry is a function of its own name and shape."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    n = generator.standard_normal(shape).astype(np.float32)
    if len(shape) == 1 and name.endswith(".bias"):
        n = n * np.float32(0.02)
    elif len(shape) == 1 and name.endswith(".weight"):
        n = np.float32(1) + np.float32(0.02) * n
    else:
        n = n * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    return th.from_numpy(n)


def as_the_scripts_build(architecture, process):
    """A network, filled by the rule, and its process, by the way that a configuration takes.

    As in the published configurations `use_fp16` is true and `precision: fp32` settles what is computed in.

    Args:
        architecture: arguments of `create_model`.
        process: configuration keys of the process.
    """
    defaults = inspect.signature(create_model).parameters
    keys = {k: p.default for k, p in defaults.items() if p.default is not p.empty and k != "learn_sigma"}
    settings = denoiser(**(keys | architecture | {"use_fp16": True} | process))
    network, process = build_network(settings)
    place(network, settings.architecture.use_fp16, Run(precision="fp32"))
    return fill(network), process


@th.no_grad()
def fill(module, prefix=""):
    """Give a module the rule's weights, and put it in eval mode."""
    for name, value in module.state_dict().items():
        value.copy_(rule_weight(prefix + name, tuple(value.shape)))
    return module.eval()


def assert_close(ours, reference, atol=1e-5, rtol=1e-4, what=""):
    """|ours - reference| <= atol + rtol |reference|, element by element."""
    ours, reference = th.as_tensor(ours).detach(), th.as_tensor(reference)
    assert ours.shape == reference.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
    th.testing.assert_close(
        ours.double(), reference.double(), atol=atol, rtol=rtol, msg=lambda m: f"{what}: {m}"
    )


def assert_all(comparisons):
    """`assert_close` of every comparison of `golden_checks`; there must be some."""
    count = 0
    for what, ours, reference, atol, rtol in comparisons:
        assert_close(ours, reference, atol, rtol, what)
        count += 1
    assert count


def assert_close_to_largest(ours, reference, relative=1e-5, what=""):
    """Compare to a fraction of the reference's largest magnitude."""
    largest = float(th.as_tensor(reference).abs().max())
    assert_close(ours, reference, atol=relative * largest, rtol=0, what=what)


def unpack_golden_graph(path):
    """Write the synthetic graph of golden group g6, with softmax weights rounded to 16 bits.

    The rest is byte for byte the stored graph of the golden run; rounding the softmax weights (8 of
    its 9 MB) moves the Inception Score by 4e-6 relative and nothing else.
    """
    path.write_bytes(lzma.decompress((GOLDEN / "g6_inception_half.pb.xz").read_bytes()))
    return path
