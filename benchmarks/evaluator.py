#!/usr/bin/env python
"""The evaluator's numerics against the plain routes, in one run: `python benchmarks/evaluator.py`.

Every measurement runs in a process of its own, so that its peak memory is its own. Both routes of
a pair see the same arrays and the same number of threads.

- frechet: one Fréchet distance of given statistics, ours against `scipy.linalg.sqrtm`, with more and
  with fewer images than features (the covariances are singular then).
- neighbours: improved precision and recall, ours against full distance matrices, in float64 (which
  decides as ours does) and in float32.
- file: a whole sample file of 32x32 images, read, reduced and scored; a random projection stands
  in for the network, whose time is its own affair.
- end to end: the evaluator's command on a reference and a sample file, by a network of Inception's size with
  random weights, against that network alone; and each score beside the features' time at that rate.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guided_diffusion.config.command_line import make_bare_parser
from guided_diffusion.errors import UserError
from guided_diffusion.processes.launch import run_script

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64  # images at a time, the command's default
Seconds = tuple[float, float]


class Clocks:
    """Wall and processor time since its making."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> Seconds:
        """Seconds by either clock."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def features(n: int, dimension: int, seed: int) -> np.ndarray:
    """Features float32 [n, dimension]: non-negative with a decaying spectrum, as Inception's are."""
    generator = np.random.default_rng(seed)
    directions = np.random.default_rng(0).standard_normal((256, dimension), dtype=np.float32)
    strength = np.exp(-np.arange(256) / 40).astype(np.float32)
    x = (generator.standard_normal((n, 256), dtype=np.float32) * strength) @ directions
    x += 0.3 * generator.standard_normal((n, dimension), dtype=np.float32) + 0.02 * seed
    return np.maximum(x, 0, out=x)


def frechet(route: str, n: int, dimension: int) -> tuple[Seconds, dict]:
    """Time and value of one Fréchet distance."""
    from scipy import linalg

    from evaluations.metrics import frechet_distance, gaussian_of

    a, b = gaussian_of(features(n, dimension, 1)), gaussian_of(features(n, dimension, 2))
    clocks = Clocks()
    if route == "ours":
        value = frechet_distance(a, b)
    else:
        root = linalg.sqrtm(a.covariance @ b.covariance)
        shift = a.mean - b.mean
        value = float(shift @ shift + np.trace(a.covariance + b.covariance) - 2 * np.trace(root).real)
    return clocks.read(), {"distance": value}


def neighbours(route: str, n: int, dimension: int) -> tuple[Seconds, dict]:
    """Time and values of precision and recall."""
    from evaluations.neighbours import nearest_distances, neighbour_scores

    reference, samples = features(n, dimension, 1), features(n, dimension, 2)
    clocks = Clocks()
    if route == "ours":
        near = nearest_distances(reference), nearest_distances(samples, 3)
        found = neighbour_scores(reference, samples, *near)
        precision, recall = found.precision, found.recall
    else:
        reference, samples = reference.astype(route), samples.astype(route)

        def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)

        def radii(x: np.ndarray) -> np.ndarray:
            return np.partition(squared(x, x), 3, axis=1)[:, 3]  # column 0 is the point itself

        across = squared(samples, reference)
        precision = float((across <= radii(reference)).any(1).mean())
        recall = float((across <= radii(samples)[:, None]).any(0).mean())
    return clocks.read(), {"precision": precision, "recall": recall}


class Projection:
    """A feature extractor that costs nothing: random projections of 8x8 thumbnails, clipped at 0."""

    name, weights_sha256, dimension = "tensorflow", "projection", 2048

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self._pool = generator.standard_normal((192, 2048), dtype=np.float32)
        self._spatial = generator.standard_normal((192, 2023), dtype=np.float32)
        self._classes = generator.standard_normal((2048, 1008), dtype=np.float32) / 500

    def extract(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 [N, 2048] and [N, 2023]."""
        step = images.shape[1] // 8
        x = images[:, ::step, ::step].reshape(len(images), -1).astype(np.float32) / 255 - 0.5
        return np.maximum(x @ self._pool, 0), np.maximum(x @ self._spatial, 0)

    def probabilities(self, pooled: np.ndarray) -> np.ndarray:
        """Class probabilities float32 [N, 1008]."""
        from scipy.special import softmax

        return softmax(pooled @ self._classes, axis=1)


def file(route: str, n: int, size: int) -> tuple[Seconds, dict]:
    """Time and scores of a file of n images of size x size against a reference of 10,000."""
    from evaluations.features import extract_features
    from evaluations.neighbours import nearest_distances
    from evaluations.reference import Reference
    from evaluations.results import values
    from evaluations.scoring import score_inception
    from evaluations.settings import Settings
    from guided_diffusion.io.image_sets import ImageFile, open_images
    from guided_diffusion.io.npz_reader import NpzFile
    from guided_diffusion.io.npz_writer import create_npz

    def images(path: Path, count: int) -> ImageFile:
        generator = np.random.default_rng(count)
        with create_npz(path, count) as writer:
            for start in range(0, count, 1000):
                rows = min(1000, count - start)
                writer.append(generator.integers(0, 256, (rows, size, size, 3), dtype=np.uint8))
        return open_images(NpzFile(path), at_least=6)

    network = Projection()
    with tempfile.TemporaryDirectory() as folder:
        clocks = Clocks()
        real = extract_features(network, images(Path(folder) / "reference.npz", min(n, 10_000)), 64)
        fake = extract_features(network, images(Path(folder) / "samples.npz", n), 64)
    near = nearest_distances(real.features)
    reference = Reference(real.gaussian, real.spatial_gaussian, real.features, near, "", "computed")
    found = values(score_inception(reference, fake, network, Settings()))
    return clocks.read(), found


def random_images(path: Path, n: int, size: int, seed: int) -> Path:
    """Write n images of size x size: noise of 4x4 patches, each image with a contrast of its own."""
    from guided_diffusion.io.npz_writer import create_npz

    generator = np.random.default_rng(seed)
    with create_npz(path, n) as writer:
        for start in range(0, n, 1000):
            rows = min(1000, n - start)
            contrast = generator.uniform(10, 100, (rows, 1, 1, 1))
            patches = 128 + contrast * generator.standard_normal((rows, 4, 4, 3))
            pixels = np.repeat(np.repeat(patches, size // 4, axis=1), size // 4, axis=2)
            writer.append(np.clip(pixels, 0, 255).astype(np.uint8))
    return path


def graph(route: str, n: int, size: int) -> tuple[Seconds, dict]:
    """Write a network of Inception's size, with random weights, to the path `route`."""
    from inception_graphs import inception_shapes, random_inception_state, write_graph

    clocks, path = Clocks(), Path(route)
    write_graph(random_inception_state(inception_shapes(path.parent)), path)
    return clocks.read(), {}


def network(route: str, n: int, size: int) -> tuple[Seconds, dict]:
    """Time of n images of size x size through the network `route`, and nothing else."""
    from evaluations.inception_tensorflow import TensorflowExtractor
    from guided_diffusion.io.npz_reader import NpzFile

    extractor = TensorflowExtractor(Path(route))
    with tempfile.TemporaryDirectory() as folder:
        images = NpzFile(random_images(Path(folder) / "images.npz", n, size, 1)).load("arr_0")
    extractor.extract(images[:BATCH])
    clocks = Clocks()
    for start in range(0, n, BATCH):
        extractor.extract(images[start : start + BATCH])
    return clocks.read(), {}


def command(route: str, n: int, size: int) -> tuple[Seconds, dict]:
    """Time of the evaluator's command on two files of n images, by the network `route`; no cache yet."""
    with tempfile.TemporaryDirectory() as folder:
        files = [random_images(Path(folder) / f"{seed}.npz", n, size, seed) for seed in (1, 2)]
        arguments = [ROOT / "evaluations/evaluator.py", *files, "--inception", route]
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(done.stderr.strip())
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (wall, processor), {}


def scores(route: str, n: int, dimension: int) -> tuple[Seconds, dict]:
    """Seconds of each score by either clock, of n features on either side."""
    from evaluations.metrics import frechet_distance, gaussian_of, inception_score, kernel_distance
    from evaluations.neighbours import PRECISION_RECALL_K, nearest_distances, neighbour_scores

    real, fake = features(n, dimension, 1), features(n, dimension, 2)
    classes = Projection()
    spent: dict[str, Seconds] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        clocks = Clocks()
        value = function()
        spent[name] = clocks.read()
        return value

    def inception() -> float:
        return inception_score(classes.probabilities(fake[i : i + 5000]) for i in range(0, n, 5000))

    a = gaussian_of(real)
    whole = Clocks()
    b = timed("mean and covariance (FID's, as much again sFID's)", lambda: gaussian_of(fake))
    timed("Inception Score", inception)
    timed("FID (as much again sFID)", lambda: frechet_distance(a, b))
    near = timed("the reference's neighbours (kept in its cache)", lambda: nearest_distances(real))

    def neighbours(density_coverage: bool) -> None:
        own = nearest_distances(fake, PRECISION_RECALL_K)
        neighbour_scores(real, fake, near, own, density_coverage=density_coverage)

    timed("precision and recall", lambda: neighbours(False))
    timed("the same, with density and coverage", lambda: neighbours(True))
    timed("KID", lambda: kernel_distance(real, fake, seed=0))
    return whole.read(), spent


TASKS = {task.__name__: task for task in (frechet, neighbours, file, graph, network, command, scores)}


def measure(task: str, route: str, n: int, width: int) -> dict:
    """Run one task in a process of its own: wall and processor seconds, peak memory in GB, values."""
    command = [sys.executable, __file__, "--task", json.dumps([task, route, n, width])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{task} by {route} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def end_to_end(n: int, rows: int) -> None:
    """Print the command's rate beside the network's, and each score's share of the features' time.

    Args:
        n: images in either file.
        rows: features on either side that the scores are timed on.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "graph.pb")
        measure("graph", path, 0, 0)
        alone, whole = measure("network", path, n, 32), measure("command", path, n, 32)
    print(f"end to end: two files of {n:,} images of 32x32, a network of Inception's size")
    for name, row, images in (("network alone", alone, n), ("command", whole, 2 * n)):
        rates = f"{images / row['wall']:8.1f} images/s, {images / row['processor']:8.1f} by processor time"
        print(f"  {name:16}{row['wall']:8.1f} s, {rates}", flush=True)
    print(f"scores of {rows:,} x 2048 features on either side, as a share of {rows:,} images' features")
    for name, seconds in measure("scores", "ours", rows, 2048)["values"].items():
        wall, processor = (
            s * n / rows / alone[c] for s, c in zip(seconds, ("wall", "processor"), strict=True)
        )
        print(f"  {name:52}{seconds[0]:8.2f} s {wall:7.1%}, {processor:6.1%} by processor time", flush=True)


def compare(task: str, others: Sequence[str], n: int, width: int) -> None:
    """Print ours beside other routes; wall time, and processor time, which a busy machine leaves alone."""
    print(f"{task}: {n:,} x {width} features on either side")
    ours = measure(task, "ours", n, width)
    for route in ("ours", *others):
        row = ours if route == "ours" else measure(task, route, n, width)
        found = ", ".join(f"{name} {value:.12g}" for name, value in row["values"].items())
        ratios = [row[clock] / ours[clock] for clock in ("wall", "processor")]
        print(
            f"  {route:12} {row['wall']:8.2f} s ({ratios[0]:.1f} x), {row['processor']:8.2f} s of processor "
            f"({ratios[1]:.1f} x), {row['peak_gb']:5.2f} GB at peak, {found}",
            flush=True,
        )


def main() -> None:
    """Parse and measure."""
    parser = make_bare_parser(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, half a minute; no claims from these"
    )
    parser.add_argument(
        "--large_file",
        action="store_true",
        help="also 200,000 images of 64x64 (long: neighbours grow with the square)",
    )
    parser.add_argument(
        "--images", type=int, default=10_000, help="in either file, end to end (default 10000)"
    )
    parser.add_argument("--only", choices=["end-to-end"], help="leave the comparisons of numerics out")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task, route, n, width = json.loads(args.task)
        (wall, processor), found = TASKS[task](route, n, width)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"wall": wall, "processor": processor, "peak_gb": peak, "values": found}))
        return
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"{len(os.sched_getaffinity(0))} cores, OMP_NUM_THREADS {threads}")
    width, rows, images = (256, 1500, 2000) if args.quick else (2048, 10_000, 50_000)
    end_to_end(min(args.images, 128) if args.quick else args.images, rows)
    if args.only:
        return
    compare("frechet", ["scipy sqrtm"], rows, width)
    compare("frechet", ["scipy sqrtm"], width // 2, width)  # singular covariances
    compare("neighbours", ["float64", "float32"], rows, width)
    files = [(images, 32)] + ([(200_000, 64)] if args.large_file else [])
    for n, size in files:
        row = measure("file", "ours", n, size)
        seconds = f"{row['wall']:.0f} s, {row['processor']:.0f} s of processor"
        print(f"file: {n:,} images of {size}x{size}: {seconds}, {row['peak_gb']:.2f} GB at peak")


if __name__ == "__main__":
    run_script(main)
