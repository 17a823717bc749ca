"""Time distillation part by part, as it ships and as a plain float32 loop would do it: `make bench`.

The two are built of the same networks and timed in turn, repetition by repetition, so that a machine whose
speed drifts slows both alike; ratios are medians over the repetitions. Beside them stands what the machine
itself does: matrix products, a convolution, a copy. The share of the limit is the arithmetic done per second
over the matrix product's rate in the same number format.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch as th
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import dist_util
from guided_diffusion.config import command_line
from guided_diffusion.config.loading import load_distillation
from guided_diffusion.config.settings import DistillationExperiment, Run
from guided_diffusion.distill.dynamic_batch import DynamicBatch
from guided_diffusion.distill.objectives import Distillation
from guided_diffusion.distill.source import TeacherSource
from guided_diffusion.distill.teacher import Teacher
from guided_diffusion.logger import RunLog
from guided_diffusion.networks.precision import compute_dtype, place
from guided_diffusion.processes.launch import run_script
from guided_diffusion.script_util import build_network, build_space
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.ema import Ema

ROOT = Path(__file__).resolve().parent.parent
SAMPLING_STEPS = 50
Parts = dict[str, Callable[[], object]]


def loop_of(
    experiment: DistillationExperiment, batch_size: int, run: Run, layout: th.memory_format | None = None
) -> TrainLoop:
    """The training loop on random weights and a small pool at mixed levels, in another layout if given."""
    th.manual_seed(0)
    network, process = build_network(experiment.teacher)
    use_fp16 = experiment.teacher.architecture.use_fp16
    place(network.eval().requires_grad_(False), use_fp16, run, frozen=True)
    teacher = Teacher(network, process, build_space(experiment.teacher))
    student, process = build_network(experiment.student)
    objective = Distillation(student, process, experiment.distill).to(dist_util.dev())
    place(student, experiment.student.architecture.use_fp16, run)
    if layout is not None:
        for module in (network, student):
            module.to(memory_format=layout)  # type: ignore[call-overload]
    pool = DynamicBatch.of_noise(4 * batch_size, teacher.space.shape, process.num_timesteps)
    pool.levels = th.randint(1, process.num_timesteps, (len(pool),))
    return TrainLoop(
        network=student,
        objective=objective,
        source=TeacherSource(pool.stored_on(dist_util.dev(), th.float32), teacher, batch_size),
        process=process,
        training=dataclasses.replace(experiment.student.training, batch_size=batch_size),
        run=run,
        log=RunLog(Path(tempfile.gettempdir()), active=False),
    )


def parts_of(loop: TrainLoop) -> Parts:
    """The parts of an iteration, and a sampling step, each ready to be called again and again."""
    source, objective, model, diffusion = loop.source, loop.objective, loop.network, loop.process
    assert isinstance(source, TeacherSource) and isinstance(objective, Distillation)
    batch = source.next_batch()
    model.train()

    def iteration() -> None:
        loop.train_step(source.next_batch())

    @th.no_grad()
    def sample() -> None:
        diffusion.p_sample(model.eval(), batch.x_t, batch.t)
        model.train()

    parts: Parts = {
        "teacher step": source.next_batch,
        "stage 1, forward and backward": lambda: objective.stage1(model, batch).loss.mean().backward(),
        "stage 2, forward and backward": lambda: objective.stage2(model, batch).loss.mean().backward(),
        "whole iteration": iteration,
        "sampling step of the student": sample,
    }
    iteration()  # the optimizer's state
    return parts


def make_plain(loop: TrainLoop) -> None:
    """Give a loop an optimizer and averages that go through the parameters one by one."""
    loop.optimizer = th.optim.AdamW(loop.parameters, lr=loop.training.lr, foreach=False)

    def step() -> th.Tensor:
        loop.optimizer.step()
        return th.tensor(False)

    @th.no_grad()
    def update(ema: Ema) -> None:
        for average, parameter in zip(ema.average, ema.module.parameters(), strict=True):
            average.mul_(ema.rate).add_(parameter, alpha=1 - ema.rate)

    loop._optimizer_step = step  # type: ignore[method-assign]
    for ema in loop.emas.values():
        ema.update = lambda *_, ema=ema: update(ema)  # type: ignore[method-assign, misc]


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    if dist_util.dev().type == "cuda":
        start, end = (th.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def flops_of(function: Callable[[], object]) -> float:
    """Floating-point operations of one call's matrix products, convolutions and attentions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def machine_of(dtypes: list[th.dtype]) -> dict[str, tuple[Callable[[], object], float]]:
    """What the machine itself is measured by: name -> (call, operations or bytes of it)."""
    device = dist_util.dev()
    n = 2048 if device.type == "cpu" else 8192
    calls: dict[str, tuple[Callable[[], object], float]] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        a = th.randn(n, n, device=device).to(dtype)
        x = th.randn(32, 256, 16, 16, device=device).to(dtype).to(memory_format=th.channels_last)
        w = th.randn(256, 256, 3, 3, device=device).to(dtype).to(memory_format=th.channels_last)
        calls[f"matrix product, {name}"] = (lambda a=a: a @ a, 2 * n**3)  # type: ignore[misc]
        calls[f"convolution 3x3, 256 channels at 16x16, {name}"] = (
            lambda x=x, w=w: th.nn.functional.conv2d(x, w, padding=1),  # type: ignore[misc]
            2 * 32 * 16 * 16 * 256 * 256 * 9,
        )
    source = th.empty(1 << 26, device=device)
    target = th.empty_like(source)
    calls["copy, read and written"] = (lambda: target.copy_(source), 2 * source.nbytes)
    return calls


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = ROOT / "yaml/cifar10_32/exp/CIFAR10-14M-TCCD-0.4.yaml"
    parser.add_argument("--config", type=Path, default=default, help="a distillation (default: CIFAR10-14M)")
    parser.add_argument("--batch_size", type=command_line.positive, default=32, help="samples (default 32)")
    parser.add_argument(
        "--repeats", type=command_line.positive, default=5, help="after one warm-up (default 5)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.precision=bf16")
    args = parser.parse_intermixed_args()
    dist_util.setup_dist()
    device = dist_util.dev()
    experiment = load_distillation(args.config, args.overrides)
    dtype = compute_dtype(experiment.run.precision, experiment.student.architecture.use_fp16, device)

    shipped = loop_of(experiment, args.batch_size, experiment.run)
    plain = loop_of(experiment, args.batch_size, dataclasses.replace(experiment.run, precision="fp32"))
    make_plain(plain)
    sides: dict[str, tuple[Parts, Callable]] = {}
    for name, loop, mode in (
        ("plain", plain, lambda: sdpa_kernel(SDPBackend.MATH)),
        ("shipped", shipped, nullcontext),
    ):
        with mode():
            sides[name] = parts_of(loop), mode
    machine = machine_of([th.float32] if dtype == th.float32 else [th.float32, dtype])

    with sdpa_kernel(SDPBackend.MATH):
        flops = {part: flops_of(call) for part, call in sides["plain"][0].items()}
    times: dict[tuple[str, str], list[float]] = {}
    for repetition in range(args.repeats + 1):
        for part in flops:
            for side, (parts, mode) in sides.items():
                with mode():
                    measured = seconds_of(parts[part])
                if repetition:  # the first warms up
                    times.setdefault((side, part), []).append(measured)
        for name, (call, _) in machine.items():
            measured = seconds_of(call)
            if repetition:
                times.setdefault(("machine", name), []).append(measured)

    def median(side: str, part: str) -> float:
        return statistics.median(times[side, part])

    print(f"{args.config.stem}, batch {args.batch_size}, {dist_util.describe()[0]}, ", end="")
    print(f"torch {th.__version__}, ships {dtype}; medians of {args.repeats}")
    rates = {name: work / median("machine", name) / 1e9 for name, (_, work) in machine.items()}
    limit = rates[f"matrix product, {str(dtype).removeprefix('torch.')}"]
    print(f"{'':34}{'plain fp32':>12}{'shipped':>12}{'ratio':>8}{'GFLOP/s':>10}{'of limit':>10}")
    for part, work in flops.items():
        pairs = zip(times["plain", part], times["shipped", part], strict=True)
        ratio, rate = statistics.median(a / b for a, b in pairs), work / median("shipped", part) / 1e9
        milliseconds = f"{1e3 * median('plain', part):9.1f} ms{1e3 * median('shipped', part):9.1f} ms"
        print(f"{part:34}{milliseconds}{ratio:8.2f}{rate:10.1f}{rate / limit:10.0%}")
    steps = experiment.teacher.process.diffusion_steps / 2 / experiment.distill.stride
    for name, part, count in (
        (f"preparation, {steps:g} steps", "teacher step", steps),
        (f"sampling, {SAMPLING_STEPS} steps", "sampling step of the student", SAMPLING_STEPS),
    ):
        per_image = (f"{count * median(side, part) / args.batch_size:10.2f} s" for side in sides)
        print(f"{name + ', per image':34}{''.join(per_image)}   (from one step)")
    for name, rate in rates.items():
        print(f"{name:56}{rate:12.1f} {'GB/s' if name.startswith('copy') else 'GFLOP/s'}")
    print(f"peak memory of both together: {dist_util.peak_memory()}")


if __name__ == "__main__":
    run_script(main)
