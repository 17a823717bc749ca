"""Does 16-bit arithmetic cost the student anything? The same short runs in float32 and in 16 bits, by seed.

Distils the embedded teacher as the demo did before hops, once for each precision and seed, and prints the
student's held-out error (mean squared difference from the teacher's float32 noise predictions on states that
no pool holds), its digits-FD, and the teacher's own error in that precision. Runs are kept and reused.

A processor without 16-bit arithmetic computes the same numbers slowly: `Emulated` multiplies in float32 what
has been rounded to 16 bits and rounds the result once, which is what the hardware does.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch as th
from short_runs import BEFORE_HOPS, ROOT, WEIGHTS, ShortRuns, demo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from evaluations.evaluator import evaluate
from guided_diffusion import dist_util
from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.config.settings import DistillationExperiment
from guided_diffusion.distill.dynamic_batch import DynamicBatch
from guided_diffusion.io.digits import load_digit_images
from guided_diffusion.io.npz_writer import create_npz
from guided_diffusion.networks.precision import compute_dtype
from guided_diffusion.processes.launch import run_script
from guided_diffusion.runs.checkpoint import newest_checkpoint
from guided_diffusion.runs.weights import load_network
from guided_diffusion.sampling.sample_set import SampleSet
from guided_diffusion.sampling.samplers import ANCESTRAL
from guided_diffusion.script_util import build_network, build_process, build_space
from guided_diffusion.setups.distillation import load_teacher

aten = th.ops.aten
PRODUCTS = {
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


class Emulated(TorchDispatchMode):
    """Products of 16-bit tensors, computed in float32 and rounded once. Counts them in `products`."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        dtypes = {a.dtype for a in args if isinstance(a, th.Tensor)} & {th.bfloat16, th.float16}
        if function not in PRODUCTS or not dtypes:
            return function(*args, **kwargs)
        self.products += 1
        (dtype,) = dtypes
        widen = lambda a: a.float() if isinstance(a, th.Tensor) and a.dtype == dtype else a  # noqa: E731
        out = function(*tree_map(widen, args), **tree_map(widen, kwargs))
        if function == aten._scaled_dot_product_flash_attention_for_cpu.default:
            return out[0].to(dtype), out[1]  # the second is the log of the softmax's sum, float32
        return tree_map(lambda a: a.to(dtype) if isinstance(a, th.Tensor) else a, out)


def arithmetic(precision: str) -> Emulated | nullcontext:
    """Where a processor has no arithmetic of this precision, emulate it."""
    device = dist_util.dev()
    wanted = compute_dtype(precision, False, device)
    native = device.type == "cuda" or wanted in (th.float32, compute_dtype("auto", True, device))
    return nullcontext() if native else Emulated()


class Benchmark:
    """Distillations that differ in precision and seed alone; everything lies in a folder.

    Args:
        folder: holds a run for each setting, and the real digits.
        iterations: of each run.
        num_samples: images in a scored set.
        held_out: states on which student and teacher are compared.
    """

    def __init__(self, folder: Path, iterations: int, num_samples: int, held_out: int):
        self.folder, self.iterations, self.num_samples = folder, iterations, num_samples
        self.runs = ShortRuns(held_out)
        self.pools: dict[int, DynamicBatch] = {}  # by seed
        self.reference = folder / "digits.npz"
        images, labels = load_digit_images()
        with create_npz(self.reference, len(images)) as writer:
            writer.append(images, labels)

    def experiment(self, precision: str, seed: int) -> DistillationExperiment:
        """The distillation in a precision."""
        save = f"student.save_interval={self.iterations}"
        return demo(self.iterations, seed, *BEFORE_HOPS, f"run.precision={precision}", save)

    def teacher_error(self, precision: str) -> float:
        """Mean squared difference of the teacher's predictions in a precision from those in float32."""
        teacher = load_teacher(self.experiment(precision, 0), WEIGHTS)
        with arithmetic(precision):
            return self.runs.error(teacher.network)

    def student(self, precision: str, seed: int) -> tuple[float, float]:
        """Held-out error and digits-FD of a student, distilled now if it has not been.

        It is judged in float32, so that the training alone differs.
        """
        experiment = self.experiment(precision, seed)
        folder = self.folder / f"{precision}-seed{seed}-{self.iterations}"
        if newest_checkpoint(folder) is None:
            if seed not in self.pools:
                size = self.runs.pool_size(experiment)
                self.pools[seed] = self.runs.prepared(size, experiment.distill.stride, seed)
            with arithmetic(precision) as emulated:
                self.runs.distil(experiment, self.pools[seed], folder, record=True)
            assert emulated is None or emulated.products > 0
        checkpoint = newest_checkpoint(folder)
        assert checkpoint is not None
        weights = checkpoint.path(experiment.student.training.scored_weights)
        model, _ = build_network(experiment.student)
        load_network(model.to(dist_util.dev()), weights)
        error = self.runs.error(model)
        process = build_process(experiment.student, "timestep_respacing", "50")
        samples = SampleSet(
            folder / "samples",
            self.num_samples,
            seed=seed,
            sampler=("ancestral", ANCESTRAL),
            clip_denoised=True,
        )
        images = samples.draw(model, process, build_space(experiment.student), weights, 125)
        return error, evaluate(self.reference, images, backend="digits", use_cache=False).fd


def main() -> None:
    """Measure and print."""
    parser = make_bare_parser(__doc__)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--iterations", type=int, default=1000, help="default 1000")
    parser.add_argument("--num_samples", type=int, default=1000, help="images in a set (default 1000)")
    parser.add_argument("--held_out", type=int, default=192, help="held-out states (default 192)")
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments/low_precision")
    args = parser.parse_args()
    dist_util.setup_dist()
    args.folder.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(args.folder, args.iterations, args.num_samples, args.held_out)
    for precision in args.precisions:
        print(f"{precision}: teacher's error {benchmark.teacher_error(precision):.2e}", flush=True)
        errors, distances = [], []
        for seed in args.seeds:
            error, fd = benchmark.student(precision, seed)
            print(f"  seed {seed}: held-out error {error:.4f}, digits-FD {fd:.2f}", flush=True)
            errors.append(error)
            distances.append(fd)
        if len(args.seeds) > 1:
            print(
                f"  mean: held-out error {mean(errors):.4f} +-{stdev(errors):.4f}, "
                f"digits-FD {mean(distances):.2f} +-{stdev(distances):.2f} (standard deviation of a run)"
            )


if __name__ == "__main__":
    run_script(main, ranks_meet=True)
