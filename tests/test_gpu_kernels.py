"""What is made for GPUs, as far as a processor can tell; `make gpu` does the rest on a GPU.

The Triton kernel, interpreted, equals the single operations; and it compiles for a GPU that is not there.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch as th
from tiny import ROOT

from guided_diffusion import nn
from guided_diffusion.distill.dynamic_batch import DistillationBatch
from guided_diffusion.kernels.captured import Captured, _changed, _copied


def test_the_kernel_interpreted():
    pytest.importorskip("triton", "3.9", reason="needs pip install triton")  # older ones want an older numpy
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-rA",
            "-p",
            "no:cacheprovider",
            ROOT / "tests/gpu_kernel_checks.py",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},  # by which Triton goes when it is imported
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0 and "36 passed" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=5)))
def test_both_compile_for_a_gpu(flags):
    pytest.importorskip("triton", reason="needs pip install triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from guided_diffusion.kernels import norm_silu_gpu

    last, silu, dropout, scaled, before = flags
    constants = {"WIDTH": 4, "TAKEN": 16, "BLOCK": 64, "TILE": 16}
    constants |= {"CHANNELS_LAST": last, "SILU": silu, "DROPOUT": dropout, "SCALED": scaled, "BEFORE": before}
    for kernel in (norm_silu_gpu._forward, norm_silu_gpu._backward):
        own = dict(constants)
        own |= {} if scaled else {name: None for name in ("scale", "shift", "g_scale", "g_shift")}
        own |= {} if dropout else {"seed": None}
        own |= {} if before else {"before": None}
        own = {name: value for name, value in own.items() if name in kernel.arg_names}
        kinds = dict.fromkeys(("x", "out", "g", "g_x", "scale", "shift", "g_scale", "g_shift"), "*bf16")
        kinds |= dict.fromkeys(("weight", "bias", "before", "statistics", "sums"), "*fp32")
        kinds |= {"seed": "*i64", "growth": "fp32", "eps": "fp32"} | dict.fromkeys(own, "constexpr")
        signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
        compiled = compile(
            ASTSource(kernel, signature, {(kernel.arg_names.index(name),): v for name, v in own.items()}),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 8},
        )
        assert compiled.asm["cubin"]


def test_where_triton_does_not_work_torchs_kernels_do(monkeypatch, capsys):
    module = pytest.importorskip("guided_diffusion.kernels.norm_silu_gpu", reason="needs pip install triton")
    monkeypatch.setattr(module, "try_out", lambda: 1 / 0)
    nn.norm_kernel.cache_clear()
    assert nn.norm_kernel("cuda") is None and nn.norm_kernel("cuda") is None
    nn.norm_kernel.cache_clear()
    assert capsys.readouterr().err.count("WARNING: Triton does not work here (division by zero)") == 1


def test_without_a_gpu_a_captured_function_is_just_called():
    calls = []
    captured = Captured(lambda x, *, y=None: calls.append(1) or {"sum": x + 1, "y": y})
    for number in range(6):
        assert th.equal(captured(th.tensor([number]), y=None)["sum"], th.tensor([number + 1]))
    assert len(calls) == 6 and not captured.recorded and not captured.waits


def test_structures_are_copied_tensor_by_tensor():
    batch = DistillationBatch(*(th.full((2, 1, 1, 1), float(i)) for i in range(5)))
    value = {"batch": batch, "rest": (None, 3, [th.ones(2)])}
    copied = _copied(value)
    assert type(copied["batch"]) is DistillationBatch and copied["batch"].y is None
    assert copied["rest"][:2] == (None, 3) and th.equal(copied["rest"][2][0], th.ones(2))
    originals, copies = [], []
    _changed(value, originals.append)
    _changed(copied, copies.append)
    assert len(originals) == len(copies) == 6
    for original, copy in zip(originals, copies, strict=True):
        assert th.equal(original, copy) and original.data_ptr() != copy.data_ptr()
    assert _copied({"nothing": None}) == {"nothing": None}
