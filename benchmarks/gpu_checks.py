"""Is what the device computes right? Each part gives rows: what was looked at, found, and is allowed."""

import dataclasses
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import golden_checks
import numpy as np
import torch as th
from driver import Child, distil, kill_in_step
from gpu_device import on_gpu, use_tf32
from norm_cases import norm_errors
from parts import loop_of
from tiny import T, distillation, randomise

from guided_diffusion import dist_util
from guided_diffusion.config.loading import load_distillation, load_experiment
from guided_diffusion.config.settings import DistillationExperiment
from guided_diffusion.distill.pool_file import read_pool
from guided_diffusion.io.torch_file import read_torch_file
from guided_diffusion.kernels.captured import Captured
from guided_diffusion.logger import read_progress
from guided_diffusion.nn import GroupNorm32
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.runs.weights import load_network
from guided_diffusion.sampling.samplers import sample_images
from guided_diffusion.script_util import build_network, build_space
from guided_diffusion.train_util import TrainLoop, reseed

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "yaml/cifar10_32/exp/CIFAR10-14M-TCCD-0.4.yaml"
_TIMEOUT = 120  # seconds for one command
_AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # as in a container
_LOSS_SCALE = 2.0**10  # of the float16 check: without one small gradients vanish
# Relative errors (norm of the difference over the norm) that count as rounding: outputs, gradients.
_ROUNDING = {"tf32": (0.01, 0.03), "fp16": (0.01, 0.03), "bf16": (0.05, 0.15)}
Row = dict[str, Any]


def row(what: str, found: float, allowed: float | None) -> Row:
    """One thing that was looked at; without a limit it is told, not judged."""
    return {"what": what, "found": float(found), "allowed": allowed}


@contextmanager
def small_experiment(**keys: Any) -> Iterator[DistillationExperiment]:
    """A distillation of tiny networks, on 16x16 images."""
    with tempfile.TemporaryDirectory() as folder:
        yield load_distillation(distillation(Path(folder), **keys))


def share_of_tolerance(comparison: golden_checks.Comparison) -> float:
    """The largest |ours - reference| / (atol + rtol |reference|): at most 1 where it is as it should be."""
    ours, reference = (
        th.as_tensor(value).detach().double().cpu() for value in (comparison.ours, comparison.reference)
    )
    if ours.shape != reference.shape:
        return float("inf")
    difference = (ours - reference).abs()
    allowed = comparison.atol + comparison.rtol * reference.abs()
    share = th.where(difference == 0, 0.0, difference / allowed)
    return float(share.nan_to_num(nan=float("inf")).max()) if share.numel() else 0.0


def golden(tiny: bool) -> list[Row]:
    """The originals' numbers: how much of its tolerance the worst comparison of each case uses."""
    dist_util.setup_dist()
    use_tf32(False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        losses = golden_checks.LOSSES
        groups: list[tuple[str, Any, Callable]] = [
            ("U-Net", golden_checks.UNETS, golden_checks.unet),
            ("student and head", losses, golden_checks.plain_forward),
            ("teacher step", golden_checks.TEACHERS, golden_checks.teacher_step),
            ("stage 1", losses, lambda case: golden_checks.stage(case, "stage1")),
            ("stage 2", losses, lambda case: golden_checks.stage(case, "stage2")),
            ("both stages' gradients", losses, golden_checks.both_stages),
            (
                "two iterations",
                golden_checks.STEPS,
                lambda case: golden_checks.two_steps(case, Path(folder)),
            ),
            ("pool", golden_checks.POOLS, golden_checks.twelve_iterations),
        ]
        for name, cases, comparisons in groups:
            for case in list(cases)[: 1 if tiny else None]:
                shares = {c.what: share_of_tolerance(c) for c in comparisons(case)}
                worst = max(shares, key=lambda what: shares[what])
                what = f"{name} {case}, worst of {len(shares)} ({worst})"
                rows.append(row(what, shares[worst], 1.0))
    return rows


def norm(tiny: bool) -> list[Row]:
    """Group normalisation with all that is fused to it, and its gradients, against float64."""
    dist_util.setup_dist()
    device, rows = dist_util.dev(), []
    cases = [  # sizes that fill tiles and blocks, and sizes that do not
        (2, 64, 8, 32, True),
        (2, 160, 12, 2, False),
        (3, 192, 5, 32, True),
        (1, 40, 3, 5, True),
        (2, 20, 1, 4, True),
        (4, 1024, 8, 32, True),
    ]
    layouts = (th.contiguous_format, th.channels_last)
    for dtype, allowed in ((th.float32, 1e-6), (th.bfloat16, 0.015), (th.float16, 0.003)):
        worst = max(
            error
            for (*shape, scaled), layout in itertools.product(cases, layouts)
            for error in norm_errors(
                *(by_module, shape, dtype, layout),
                **{"silu": True, "scaled": scaled, "before": "channels", "device": device},
            )
        )
        rows.append(row(f"{dtype}: largest relative error of outputs and gradients", worst, allowed))

    th.manual_seed(0)
    x = th.randn(4, 64, 16, 16, device=device).to(memory_format=th.channels_last).requires_grad_()
    one = GroupNorm32(32, 64).to(device)
    dropped, whole = one(x, silu=True, dropout=0.3), one(x, silu=True)
    kept = dropped != 0
    rows.append(row("dropout of 0.3: share that is dropped, less 0.3", abs(0.7 - kept.float().mean()), 0.01))
    expected = whole * kept / 0.7
    rows.append(row("dropout: difference of what is kept", (dropped - expected).abs().max(), 1e-5))
    pair = (th.autograd.grad(value, x, x.detach())[0] for value in (dropped, expected))
    rows.append(row("dropout: relative error of the gradient", relative_error(*pair), 1e-6))
    return rows


def by_module(x, weight, bias, scale, shift, before, groups, eps, silu, dropout):
    """The networks' module, with a kernel's arguments."""
    norm = GroupNorm32(groups, len(weight), eps)
    more = {"before": before, "silu": silu, "dropout": dropout}
    return th.func.functional_call(norm, {"weight": weight, "bias": bias}, (x, scale, shift), more)


def relative_error(ours: th.Tensor, reference: th.Tensor) -> float:
    """The norm of the difference over the reference's."""
    return float((ours - reference).norm() / reference.norm())


def precision(tiny: bool) -> list[Row]:
    """One step in 16 bits and in TF32 against the same in float32, on random weights without dropout."""
    dist_util.setup_dist()
    with small_experiment() as small:
        experiment = small if tiny else load_distillation(PAPER)
    batch_size = 4 if tiny else 32

    def loop_in(name: str) -> TrainLoop:
        use_tf32(name == "tf32")
        arithmetic = "fp32" if name == "tf32" else name
        run = dataclasses.replace(experiment.run, precision=arithmetic)
        loop = loop_of(experiment, batch_size, run)
        loop.network.eval()
        return loop

    def evaluate(loop: TrainLoop) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """The teacher's noise prediction, the student's output, all gradients."""
        step = loop.source.teacher.step(batch.x_t, batch.t)
        with th.no_grad():
            output = loop.network(batch.x_t, batch.t)
        for out in loop.objective.passes(loop.network, batch):
            (out.loss.mean() * _LOSS_SCALE).backward()
        return step.eps, output, th.cat([p.grad.flatten().float() / _LOSS_SCALE for p in loop.parameters])

    exact = loop_in("fp32")
    for module in (exact.source.teacher.network, exact.network):
        randomise(module)
    batch = exact.source.next_batch(0)
    references = evaluate(exact)
    rows = []
    for name in ("bf16", "fp16") if not on_gpu() else ("tf32", "bf16", "fp16"):
        loop = loop_in(name)
        for ours, theirs in (
            (loop.source.teacher.network, exact.source.teacher.network),
            (loop.network, exact.network),
            (loop.objective, exact.objective),
        ):
            ours.load_state_dict(theirs.state_dict())
        values = evaluate(loop)
        whats = ("teacher's prediction", "student's output", "gradients of both stages")
        for what, ours, reference, limit in zip(
            whats, values, references, [_ROUNDING[name][i] for i in (0, 0, 1)], strict=True
        ):
            rows.append(row(f"{name}: relative error of the {what}", relative_error(ours, reference), limit))
    return rows


def tensors_of(loop: TrainLoop) -> list[th.Tensor]:
    """All that an iteration changes: weights, moments, averages, the pool."""
    states = loop.optimizer.state_dict()["state"].values()
    return [
        *(p.detach() for p in loop.parameters),
        *(value for state in states for value in state.values()),
        *(average for ema in loop.emas.values() for average in ema.average),
        *(loop.source.pool.x, loop.source.pool.levels, loop.bad_steps),
        *loop.metrics.totals().values(),
    ]


def largest_difference(ours: Any, reference: Any) -> float:
    """The largest difference between numbers in two structures of the same make; infinite if they are not."""
    if isinstance(reference, dict):
        ours, reference = list(ours.items()), list(reference.items())
    if isinstance(reference, (list, tuple)):
        pairs = list(zip(ours, reference, strict=True))
        return max((largest_difference(a, b) for a, b in pairs), default=0.0)
    if isinstance(reference, (th.Tensor, int, float)):
        a, b = (th.as_tensor(value).double().cpu() for value in (ours, reference))
        difference = (a - b).abs().nan_to_num(nan=float("inf"))
        return float(difference.max()) if difference.numel() else 0.0
    return 0.0 if ours == reference else float("inf")


# Of the captured iteration: as published, and all that makes iterations differ from each other.
_VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "short-run's options": {
        "distill__advance_stride": 3,
        "distill__teacher_interval": 2,
        "distill__stage2_fraction": 0.25,
        "distill__stage2_time": "between",
        "distill__bottleneck_weight": 0.1,
        "distill__loss_weight": "v",
        "run__optimizer": "muon",
        "student__microbatch": 2,
    },
}


def graph(tiny: bool) -> list[Row]:
    """Iterations by CUDA graphs against the same kernel by kernel, dropout and restarts included."""
    dist_util.setup_dist()
    use_tf32(False)
    rows = []
    for (variant, keys), name in itertools.product(_VARIANTS.items(), ("fp32", "bf16", "fp16")):
        if tiny and name != "bf16":
            continue
        with small_experiment(student__dropout=0.1, **keys) as experiment:
            ends = []
            for graphs in (False, False, True):
                run = dataclasses.replace(experiment.run, precision=name, cuda_graphs=graphs)
                loop = loop_of(experiment, 4, run)
                loop.network.train()
                th.manual_seed(1)
                for module in (loop.source.teacher.network, loop.network):
                    randomise(module)  # gradients of 0 are rounding, which Adam makes as large as any
                for step in range(12):
                    reseed(0, 0, step)
                    loop.train_step(loop.source.next_batch(loop.step))
                ends.append(tensors_of(loop))
            if on_gpu():
                assert isinstance(loop._gradients, Captured) and loop._gradients.recorded
            first, again, replayed = ends
        repeated = largest_difference(again, first)
        rows.append(row(f"{variant}, {name}: 12 iterations, and the same again", repeated, None))
        # Kernels that add up in any order differ from themselves, and Adam multiplies it.
        found = largest_difference(replayed, first)
        rows.append(row(f"{variant}, {name}: 12 iterations, and 12 by graphs", found, 10 * repeated))
    rows.append(row("of six calls of what a graph cannot do, results that are wrong", wrong_of_six(), 0.0))
    return rows


def wrong_of_six() -> int:
    """How many calls of a function that waits for the device go wrong, once it has been found to wait."""
    waiting = Captured(lambda x: x + float(x.sum()))
    inputs = [th.full((3,), float(i), device=dist_util.dev()) for i in range(6)]
    wrong = sum(not th.equal(waiting(x), 4 * x) for x in inputs)
    assert not waiting.recorded and waiting.waits == on_gpu()
    return wrong


def sampling(tiny: bool) -> list[Row]:
    """Eight digits drawn at once, one by one, and in threes: the largest difference in levels of 0..255."""
    dist_util.setup_dist()
    use_tf32(False)
    settings = load_experiment(ROOT / "yaml/digits_16/teacher.yaml").student
    settings.process.timestep_respacing = "5" if tiny else "50"
    network, process = build_network(settings)
    load_network(network, ROOT / "model/digits_teacher.pt")
    network.eval().to(dist_util.dev())
    space = build_space(settings)

    def draw(batch_size: int) -> np.ndarray:
        starts = range(0, 8, batch_size)
        batches = [range(start, min(8, start + batch_size)) for start in starts]
        return np.concatenate([sample_images(network, process, space, batch)[0] for batch in batches])

    whole = draw(8).astype(int)
    rows = []
    for batch_size in (1, 3):
        difference = np.abs(draw(batch_size) - whole)
        rows.append(row(f"in batches of {batch_size}: largest difference in levels", difference.max(), 2.0))
        rows.append(
            row(f"in batches of {batch_size}: share of levels that differ", (difference > 0).mean(), 0.01)
        )
    return rows


def _make_deterministic() -> None:
    th.use_deterministic_algorithms(True, warn_only=True)
    th.backends.cudnn.deterministic = True


def end_of(run: Path) -> dict[str, Any]:
    """All that a run's newest checkpoint holds, by file, but for what depends on the log."""
    checkpoint = newest_checkpoint(run)
    contents: dict[str, Any] = {"step": checkpoint.step}
    for name in checkpoint.files:
        path = checkpoint.directory / name
        if name.endswith(".cache"):
            pool = read_pool(path, T, (3, 16, 16))
            contents[name] = [pool.x, pool.levels]
        else:
            contents[name] = read_torch_file(path)
            if name.startswith("opt"):
                contents[name].pop("metrics")
    return contents


def resume(tiny: bool) -> list[Row]:
    """A run of `scripts/image_kd.py` killed in its sixth iteration and continued, against one that is not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*distil(folder, run__iterations=8, student__log_interval=1), "--exp_dir"]

        def run(to: str, *tampers: Callable[[], None], expect: int = 0, **environment: str) -> dict[str, Any]:
            def tamper() -> None:
                for change in tampers:
                    change()

            child = Child(folder / "output.txt", *command, folder / to, tamper=tamper, **environment)
            if (code := child.wait()) != expect:
                raise RuntimeError(f"image_kd.py ended with status {code}: {child.text()[-1000:]}")
            return end_of(folder / to)

        straight = run("straight")
        run("killed", kill_in_step(5), expect=-9)
        difference = largest_difference(run("killed"), straight)
        missing = 8 - len(read_progress(folder / "straight/progress.csv"))
        rows = [row("of eight iterations, those that its log lacks", missing, 0.0)]
        if difference == 0:
            return [*rows, row("killed and continued: largest difference", difference, 0.0)]
        again = largest_difference(run("again"), straight)
        rows += [
            row("killed and continued: largest difference", difference, None if again else 0.0),
            row("not killed, run again: largest difference", again, None),
        ]
        if again:  # kernels that add up in any order: does it resume exactly where there are none?
            cublas = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
            exact = run("exact", _make_deterministic, **cublas)
            run("exact-killed", _make_deterministic, kill_in_step(5), expect=-9, **cublas)
            difference = largest_difference(run("exact-killed", _make_deterministic, **cublas), exact)
            rows.append(row("the same by deterministic kernels: largest difference", difference, 0.0))
        return rows


def launcher() -> list[str]:
    """What starts two ranks: mpiexec where there is mpi4py, else torchrun."""
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.is_file() else shutil.which("mpiexec")
    if mpiexec and importlib.util.find_spec("mpi4py"):
        return [mpiexec, "-n", "2", sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def ranks(tiny: bool) -> list[Row]:
    """The first iteration of two ranks that share the device: its gradient against that of one rank."""
    start = launcher()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = distillation(
            folder, teacher__iter_choice="shuffled_iterative_distillation", student__batch_size=8
        )
        command = ["scripts/image_kd.py", "--config", config, "run.iterations=1"]
        command += ["distill.gather_negatives=true", "--exp_dir"]
        exact = {"NVIDIA_TF32_OVERRIDE": "0", "OMP_NUM_THREADS": "1"}
        for alone in (["scripts/dynamic_prepare.py", "--config", config], [*command, folder / "one"]):
            child = Child(folder / "output.txt", *alone, **exact)
            if code := child.wait():
                raise RuntimeError(f"{alone[0]} ended with status {code}: {child.text()[-1000:]}")
        together = [*start, ROOT / command[0], *command[1:], folder / "two"]
        done = subprocess.run(
            [str(part) for part in together],
            env=os.environ | exact | _AS_ROOT,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
        text = done.stdout + done.stderr
        if done.returncode or "2 rank(s)" not in text:
            raise RuntimeError(f"{start[0]} ended with status {done.returncode}: {text[-1000:]}")
        gradients = []
        for run in ("one", "two"):  # after one step a moment is a tenth of the gradient
            states = end_of(folder / run)["opt000001.pt"]["optimizer"]["state"].values()
            gradients.append(th.cat([moments["exp_avg"].flatten() for moments in states]))
        name = "torchrun" if start[0] == sys.executable else "mpiexec"
        return [
            row(f"{name}: relative error of the gradient", relative_error(gradients[1], gradients[0]), 1e-3)
        ]


CHECKS: dict[str, Callable[[bool], list[Row]]] = {
    "norm": norm,
    "golden": golden,
    "precision": precision,
    "graph": graph,
    "sampling": sampling,
    "resume": resume,
    "ranks": ranks,
}
