"""The parts of a distillation in one process, as they ship and as plain PyTorch would do them; the machine.

Both are built of the same networks and timed in turn, repetition by repetition, so that a machine whose speed
drifts slows them alike. Plain is float32, attention by the written-out formula, and an optimizer and averages
that go through the parameters one by one.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch as th
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import dist_util
from guided_diffusion.config.settings import DistillationExperiment, Run
from guided_diffusion.distill.dynamic_batch import DynamicBatch
from guided_diffusion.distill.objectives import Distillation
from guided_diffusion.distill.source import TeacherSource
from guided_diffusion.distill.teacher import Teacher
from guided_diffusion.logger import RunLog
from guided_diffusion.networks.precision import place
from guided_diffusion.script_util import build_network, build_space
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.ema import Ema

TEACHER, ITERATION, SAMPLING = "teacher step", "whole iteration", "sampling step of the student"
Parts = dict[str, Callable[[], object]]
Times = dict[tuple[str, str], list[float]]  # (plain, shipped or machine; part) -> seconds of each repetition


def loop_of(
    experiment: DistillationExperiment, batch_size: int, run: Run, layout: th.memory_format | None = None
) -> TrainLoop:
    """The training loop on random weights and a small pool at mixed levels; `batch_size` is this rank's.

    The weights are in another layout than ships if one is given.
    """
    th.manual_seed(0)
    network, process = build_network(experiment.teacher)
    use_fp16 = experiment.teacher.architecture.use_fp16
    place(network.eval().requires_grad_(False), use_fp16, run, frozen=True)
    teacher = Teacher(network, process, build_space(experiment.teacher))
    student, process = build_network(experiment.student)
    objective = Distillation(student, process, experiment.distill, teacher=teacher).to(dist_util.dev())
    place(student, experiment.student.architecture.use_fp16, run)
    if layout is not None:
        for module in (network, student):
            module.to(memory_format=layout)  # type: ignore[call-overload]
    pool = DynamicBatch.of_noise(4 * batch_size, teacher.space.shape, process.num_timesteps)
    pool.levels = th.randint(1, process.num_timesteps, (len(pool),))
    return TrainLoop(
        network=student,
        objective=objective,
        source=TeacherSource(
            pool.stored_on(dist_util.dev(), th.float32),
            teacher,
            batch_size,
            experiment.distill,
            **objective.teacher_maps,
        ),
        process=process,
        training=dataclasses.replace(experiment.student.training, batch_size=batch_size),
        run=run,
        log=RunLog(Path(tempfile.gettempdir()), active=False),
    )


def parts_of(loop: TrainLoop) -> Parts:
    """The parts of an iteration, and a sampling step, each ready to be called again and again."""
    source, objective, model, diffusion = loop.source, loop.objective, loop.network, loop.process
    assert isinstance(source, TeacherSource) and isinstance(objective, Distillation)
    batch = source.next_batch(0)
    model.train()

    def iteration() -> None:
        loop.train_step(source.next_batch(loop.step))

    @th.no_grad()
    def sample() -> None:
        diffusion.p_sample(model.eval(), batch.x_t, batch.t)
        model.train()

    def backward() -> None:
        for out in objective.passes(model, batch):
            out.loss.mean().backward()

    passes: Parts = {"all passes, forward and backward": backward}
    if objective.settings.stage2_weight > 0 and objective.settings.stage2_fraction == 1:
        passes = {
            "stage 1, forward and backward": lambda: objective.stage1(model, batch).loss.mean().backward(),
            "stage 2, forward and backward": lambda: objective.stage2(model, batch).loss.mean().backward(),
        }
    parts: Parts = {
        TEACHER: lambda: source.next_batch(0),
        **passes,
        ITERATION: iteration,
        SAMPLING: sample,
    }
    iteration()  # the optimizer's state
    return parts


def make_plain(loop: TrainLoop) -> None:
    """Give a loop an optimizer and averages that go through the parameters one by one."""
    loop.optimizer = th.optim.AdamW(loop.parameters, lr=loop.training.lr, foreach=False)

    def step() -> tuple[th.Tensor, th.Tensor]:
        loop.optimizer.step()
        return th.tensor(False), th.zeros(())

    @th.no_grad()
    def update(ema: Ema) -> None:
        for average, parameter in zip(ema.average, ema.module.parameters(), strict=True):
            average.mul_(ema.rate).add_(parameter, alpha=1 - ema.rate)

    loop._optimizer_step = step  # type: ignore[method-assign]
    for ema in loop.emas.values():
        ema.update = lambda *_, ema=ema: update(ema)  # type: ignore[method-assign, misc]


def seconds_of(function: Callable[[], object], calls: int = 1) -> float:
    """Seconds of one call, the mean of so many in a row, the device's work included."""
    if dist_util.dev().type == "cuda":
        start, end = (th.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls


def flops_of(function: Callable[[], object], calls: int = 1) -> float:
    """Operations of one call's matrix products, convolutions and attentions, the mean of so many in a row."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(calls):
            function()
    return counter.get_total_flops() / calls


def machine_of(
    dtypes: Iterable[th.dtype], tiny: bool = False
) -> dict[str, tuple[Callable[[], object], float]]:
    """What the machine is measured by (`tiny`: tried by): name -> (call, operations or bytes of it)."""
    device = dist_util.dev()
    n = 128 if tiny else 2048 if device.type == "cpu" else 8192
    batch = 1 if tiny else 32
    calls: dict[str, tuple[Callable[[], object], float]] = {}
    for dtype in sorted(dtypes, key=str):
        name = name_of(dtype)
        a = th.randn(n, n, device=device).to(dtype)
        x = th.randn(batch, 256, 16, 16, device=device).to(dtype).to(memory_format=th.channels_last)
        w = th.randn(256, 256, 3, 3, device=device).to(dtype).to(memory_format=th.channels_last)
        calls[f"matrix product, {name}"] = (lambda a=a: a @ a, 2 * n**3)  # type: ignore[misc]
        calls[f"convolution 3x3, 256 channels at 16x16, {name}"] = (
            lambda x=x, w=w: th.nn.functional.conv2d(x, w, padding=1),  # type: ignore[misc]
            2 * batch * 16 * 16 * 256 * 256 * 9,
        )
    source = th.empty(1 << 26, device=device)
    target = th.empty_like(source)
    calls["copy, read and written"] = (lambda: target.copy_(source), 2 * source.nbytes)
    return calls


def name_of(dtype: th.dtype) -> str:
    """Such as bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one process has measured.

    Attributes:
        flops: of one call of each part.
        times: of the parts of either side, and of the machine's calls.
        rates: of the machine's calls, operations or bytes per second and repetition.
    """

    flops: dict[str, float]
    times: Times
    rates: dict[str, list[float]]


def measure(experiment: DistillationExperiment, batch_size: int, repeats: int, dtype: th.dtype) -> Measured:
    """Time every part of both sides, and the machine, after one call of each that does not count.

    Args:
        experiment: the distillation.
        batch_size: images.
        repeats: how often.
        dtype: what ships, for the machine's rates.
    """
    shipped = loop_of(experiment, batch_size, experiment.run)
    ordinary = dataclasses.replace(experiment.run, precision="fp32", channels_last=False, cuda_graphs=False)
    plain = loop_of(experiment, batch_size, ordinary)
    make_plain(plain)
    sides: dict[str, tuple[Parts, Callable]] = {}
    for name, loop, mode in (
        ("plain", plain, lambda: sdpa_kernel(SDPBackend.MATH)),
        ("shipped", shipped, nullcontext),
    ):
        with mode():
            sides[name] = parts_of(loop), mode
    machine = machine_of({th.float32, dtype})

    def calls(part: str) -> int:
        """Iterations with a batch of the teacher's and those without one count as they come."""
        return experiment.distill.teacher_interval if part == ITERATION else 1

    with sdpa_kernel(SDPBackend.MATH):
        flops = {part: flops_of(call, calls(part)) for part, call in sides["plain"][0].items()}
    times: Times = {}
    rates: dict[str, list[float]] = {}
    for repetition in range(repeats + 1):
        for part in flops:
            for side, (parts, mode) in sides.items():
                with mode():
                    seconds = seconds_of(parts[part], calls(part))
                if repetition:  # the first warms up
                    times.setdefault((side, part), []).append(seconds)
        for name, (call, work) in machine.items():
            seconds = seconds_of(call)
            if repetition:
                rates.setdefault(name, []).append(work / seconds)
    return Measured(flops, times, rates)
