"""How fast the device distils, in every arithmetic and way of launching it, and how fast it is itself."""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch as th
from gpu_checks import PAPER, small_experiment
from gpu_device import busy, on_gpu, peak_gb, seconds_per_call, use_tf32
from parts import flops_of, loop_of, machine_of, parts_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from guided_diffusion import dist_util, nn
from guided_diffusion.config.loading import load_distillation
from guided_diffusion.config.settings import DistillationExperiment
from guided_diffusion.networks.precision import place
from guided_diffusion.script_util import build_network
from guided_diffusion.train_util import TrainLoop

_SCALE = 2.0**10  # the original-like loop's fixed loss scale
_FIRST = 5  # iterations that the loss is told of; the fourth is a graph's first
_COUNTED = 2  # samples that operations are counted on


@dataclass(frozen=True)
class Way:
    """One way to run an iteration.

    Attributes:
        precision: "fp32", "tf32", "bf16" or "fp16".
        mode: "original" (the stand-in for the originals' loop); "shipped"; what ships but kernel by kernel
            ("eager"), with torch's own normalisation ("torch-norm"), in the other layout ("other-layout"), or
            compiled ("compile").
        batch_size: samples.
    """

    precision: str
    mode: str
    batch_size: int

    @property
    def name(self) -> str:
        """The name of its part."""
        return f"{self.precision}-{self.mode}-{self.batch_size}"

    @property
    def layout(self) -> th.memory_format | None:
        """The layout of the weights, if not the one that ships."""
        if self.mode == "original":
            return th.contiguous_format
        if self.mode == "other-layout":
            return th.channels_last if self.precision in ("fp32", "tf32") else th.contiguous_format
        return None


def ways(tiny: bool) -> list[Way]:
    """All ways, the most telling first: a run that is cut short has those."""
    if tiny:
        modes = ("original", "shipped", "eager", "torch-norm", "other-layout", "compile")
        return [Way("bf16", mode, 4) for mode in modes] + [Way("fp32", "shipped", 4)]
    found = [Way("fp16", "original", batch_size) for batch_size in (512, 128)]
    for mode in ("shipped", "eager", "torch-norm", "other-layout", "compile"):
        for batch_size in (512, 128):
            found += [Way(name, mode, batch_size) for name in ("bf16", "fp16", "tf32", "fp32")]
    return found


def load(tiny: bool) -> DistillationExperiment:
    """What is timed: the paper's CIFAR-10 student of 14M, or tiny networks."""
    if not tiny:
        return load_distillation(PAPER)
    with small_experiment() as experiment:
        return experiment


def original_iteration(loop: TrainLoop) -> Callable[[], None]:
    """An iteration as the originals make it, from a loop whose networks have 16-bit weights.

    Two flat float32 copies of the parameters are optimised and averaged one by one, the loss scale is fixed,
    and the host waits for the gradients' norms and for the losses that it logs.
    """
    small, large = ([p for p in loop.parameters if (p.ndim <= 1) == is_small] for is_small in (True, False))
    groups = [small, large]
    masters = [th.nn.Parameter(th.cat([p.detach().float().flatten() for p in group])) for group in groups]
    averages = [master.detach().clone() for master in masters]
    optimizer = th.optim.AdamW(masters, lr=loop.training.lr, foreach=False, fused=False)
    rate = loop.training.ema_rates[0]

    def iteration() -> None:
        batch = loop.source.next_batch(0)
        for parameter in loop.parameters:
            parameter.grad = None
        total = th.zeros(len(batch))
        for out in loop.objective.passes(loop.network, batch):
            (out.loss.mean() * _SCALE).backward()
            total += out.loss.detach().cpu()
            for values in out.terms.values():
                values.detach().cpu()
        loop.metrics.add("loss", total)
        for master, group in zip(masters, groups, strict=True):
            master.grad = th.cat([p.grad.float().flatten() for p in group]) / _SCALE
        if not all(th.isfinite(master.grad.norm()).item() for master in masters):
            return
        optimizer.step()
        with th.no_grad():
            for master, average, group in zip(masters, averages, groups, strict=True):
                average.mul_(rate).add_(master, alpha=1 - rate)
                pieces = master.split([p.numel() for p in group])
                for parameter, piece in zip(group, pieces, strict=True):
                    parameter.copy_(piece.view_as(parameter))

    return iteration


def time_way(way: Way, tiny: bool) -> dict[str, Any]:
    """Seconds of a teacher step, of an iteration and of a sampling step; what the device does meanwhile."""
    dist_util.setup_dist()
    use_tf32(way.precision == "tf32")
    experiment = load(tiny)
    precision = "fp32" if way.precision == "tf32" else way.precision
    original = way.mode == "original"
    run = dataclasses.replace(
        experiment.run,
        precision=precision,
        compile=way.mode == "compile",
        cuda_graphs=way.mode not in ("original", "eager"),
    )
    if way.mode in ("original", "torch-norm"):
        nn.norm_kernel = lambda device: None  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH) if original else nullcontext():
        loop = loop_of(experiment, way.batch_size, run, way.layout)
        loop.network.train()
        source, process = loop.source, loop.process
        sampler, _ = build_network(experiment.student)
        place(sampler.eval(), experiment.student.architecture.use_fp16, run, frozen=True)
        if way.layout is not None:
            sampler.to(memory_format=way.layout)
        index = source.pool.draw(way.batch_size)
        x, t = source.pool.x[index], source.pool.levels[index] - 1

        def iteration() -> None:
            loop.train_step(source.next_batch(loop.step))

        @th.no_grad()
        def sample() -> None:
            process.p_sample(sampler, x, t)

        calls: dict[str, Callable[[], object]] = {
            "iteration": iteration,
            "teacher": lambda: source.next_batch(0),
            "sampling": sample,
        }
        if original:
            loop.network.use_dtype(loop.network.compute_dtype, frozen=True)  # its blocks' weights in 16 bits
            loop.network.to(memory_format=th.contiguous_format)
            calls["iteration"] = original_iteration(loop)
        groups = 1 if tiny else 3
        for _ in range(_FIRST):
            calls["iteration"]()
        loss = loop.metrics.read()["loss"]
        seconds = {"iteration": seconds_per_call(calls["iteration"], groups=groups)}
        peak = peak_gb()  # of training alone
        seconds |= {name: seconds_per_call(calls[name], groups=groups) for name in ("teacher", "sampling")}
        kernel_seconds, kernels = busy(calls["iteration"])
        return {
            **dataclasses.asdict(way),
            "seconds": seconds,
            "kernel_seconds": kernel_seconds,
            "kernels": kernels,
            "peak_gb": peak,
            "loss": loss,
        }


def rates(tiny: bool) -> dict[str, Any]:
    """Operations per second of the device in each format, bytes per second of a copy, cost of a sample.

    Returns:
        "rates": operations (bytes) per second by name; "flops": operations per sample of each timed part.
    """
    dist_util.setup_dist()
    groups = 1 if tiny else 3
    found = {}

    def measure(dtypes: list[th.dtype], rename: Callable[[str], str] = str) -> None:
        for name, (call, work) in machine_of(dtypes, tiny).items():
            found[rename(name)] = work / seconds_per_call(call, groups=groups)

    use_tf32(False)
    measure([th.float32, th.bfloat16] if tiny else [th.float32, th.bfloat16, th.float16])
    if on_gpu():
        use_tf32(True)
        measure([th.float32], lambda name: name.replace("float32", "tf32"))
        use_tf32(False)
    experiment = load(tiny)
    run = dataclasses.replace(experiment.run, precision="fp32")
    with sdpa_kernel(SDPBackend.MATH):  # of which operations are counted
        parts = parts_of(loop_of(experiment, _COUNTED, run))
        names = {
            "teacher": "teacher step",
            "iteration": "whole iteration",
            "sampling": "sampling step of the student",
        }
        flops = {name: flops_of(parts[part]) / _COUNTED for name, part in names.items()}
    return {"rates": found, "flops": flops}


def speeds(tiny: bool) -> dict[str, Callable[[bool], dict[str, Any]]]:
    """The parts that take times, by name, in the order in which they are run."""
    return {"rates": rates} | {way.name: functools.partial(time_way, way) for way in ways(tiny)}
