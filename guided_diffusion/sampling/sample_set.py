"""A set of samples on disk: drawn in shards that survive an interruption, then joined into one npz."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import dist_util
from ..config.settings import IDLE_IN_SAMPLING
from ..errors import UserError
from ..gaussian_diffusion import GaussianDiffusion
from ..io.files import remove_leftovers, write_text
from ..io.json_text import parse_json
from ..io.model_folder import weights_sha256
from ..io.npz_reader import NpzFile
from ..io.npz_writer import create_npz
from ..io.progress import Progress, say, warn
from ..networks.base import DenoisingNetwork
from ..networks.guidance import guided
from ..processes.stopping import Stopped, StopSignals
from ..runs.figures import save_grid
from ..spaces import SampleSpace
from .samplers import Sampler, sample_images

_SHARD = re.compile(r"(\d+)-(\d+)\.npz")


class SampleSet:
    """`num_samples` images in a directory; sample i depends on (seed, i) alone.

    Running the same again continues where it stopped, with any batch size and number of ranks.

    Args:
        directory: holds the shards while drawing, then `samples_NxHxWx3.npz` and `samples.png`.
        num_samples: N.
        seed: of the set.
        sampler: its name and itself.
        clip_denoised: clip the predicted x_0 to the process's bounds in every step.
        guidance_scale: of classifier-free guidance, see `networks.guidance`; 0: off.
    """

    def __init__(
        self,
        directory: Path,
        num_samples: int,
        *,
        seed: int,
        sampler: tuple[str, Sampler],
        clip_denoised: bool,
        guidance_scale: float = 0.0,
    ):
        self.directory, self.num_samples = directory, num_samples
        self.seed, self.clip_denoised, self.guidance_scale = seed, clip_denoised, guidance_scale
        self.sampler_name, self.sampler = sampler
        self.shards = directory / "shards"

    def draw(
        self,
        network: DenoisingNetwork,
        process: GaussianDiffusion,
        space: SampleSpace,
        weights: Path,
        batch_size: int,
        provenance: Mapping[str, Any] | None = None,
    ) -> Path:
        """Draw what is missing and join it. Collective.

        Args:
            network: on this rank's device.
            process: its (respaced) process.
            space: what its samples are; the images are what it decodes them to.
            weights: the checkpoint the network was loaded from, recorded beside the samples.
            batch_size: images at a time and rank.
            provenance: where the network comes from, in JSON's types; recorded in sampling.json and the npz.

        Returns:
            The npz.

        Raises:
            UserError: the directory holds samples drawn with other settings, or another process is
                writing to it.
            Stopped: SIGTERM or SIGINT came, and a batch of each rank is done.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with dist_util.held_by_rank_zero(self.directory):
            network, size = guided(network, self.guidance_scale), space.image_size
            provenance = {**(provenance or {}), "steps": process.num_timesteps}
            final = self.directory / f"samples_{self.num_samples}x{size}x{size}x3.npz"
            settings = {
                "model_sha256": weights_sha256(weights),
                "timesteps": process.timestep_map,
                "seed": self.seed,
                "sampler": self.sampler_name,
                "clip_denoised": self.clip_denoised,
                "guidance_scale": self.guidance_scale or None,  # older samples do not name it
                "device": dist_util.dev().type,
                "dtype": str(network.compute_dtype),
                **space.identity(),
            }
            with dist_util.rank_zero_first() as first:
                if first:
                    self._check_settings(settings, provenance)
                    self._tidy(final, size, network.num_classes is not None)
            if final.is_file():
                dist_util.say(f"{final} is already drawn")
                return final

            todo = self._missing_batches(batch_size)
            dist_util.barrier()  # all ranks have looked before any writes
            with StopSignals() as signals:
                self._draw_shards(network, process, space, todo, signals)
                dist_util.barrier()
                with dist_util.rank_zero_first() as first:
                    if first:
                        self._join(final, json.dumps({**provenance, **settings}))
                        say(f"wrote {final}")
            return final

    def _draw_shards(
        self,
        network: DenoisingNetwork,
        process: GaussianDiffusion,
        space: SampleSpace,
        todo: list[range],
        signals: StopSignals,
    ) -> None:
        rank, world = dist_util.rank(), dist_util.world_size()
        mine = todo[rank::world]
        rounds = -(-len(todo) // world)  # as many on all ranks, though in the last some may be idle
        drawn = self.num_samples - sum(map(len, todo))
        if drawn and rank == 0:
            say(f"continuing: {drawn} of {self.num_samples} images are drawn already")
        with Progress(self.num_samples, "sampling", "images", initial=drawn, active=rank == 0) as progress:
            for number in range(rounds):
                if number and dist_util.any_rank(bool(signals.received)):
                    raise Stopped(signals.reason)
                if number == len(mine):
                    continue
                indices = mine[number]
                images, labels = sample_images(
                    network,
                    process,
                    space,
                    indices,
                    seed=self.seed,
                    sampler=self.sampler,
                    clip_denoised=self.clip_denoised,
                    require_finite=True,
                )
                shard = self.shards / f"{indices.start}-{indices.stop}.npz"
                with create_npz(shard, len(images)) as writer:
                    writer.append(images, labels)
                # The other ranks' batches of this round take as long.
                progress.advance(sum(map(len, todo[number * world : (number + 1) * world])))

    def _check_settings(self, settings: dict[str, Any], provenance: Mapping[str, Any]) -> None:
        path = self.directory / "sampling.json"
        if path.is_file():
            try:
                before = dict(parse_json(path.read_text()))
            except (ValueError, TypeError, RecursionError):
                raise UserError(f"{path}: is damaged; choose another folder, or remove this one") from None
            changed = [key for key in settings if before.get(key) != settings[key]]
            for part in ("architecture", "process"):
                told, ours = before.get(part), provenance.get(part)
                if not (isinstance(told, dict) and isinstance(ours, dict)):
                    continue  # samples of an older version
                idle = {*IDLE_IN_SAMPLING, *(() if ours.get("class_cond") else ("num_classes", "null_class"))}
                both = [key for key in ours if key in told and key not in idle]
                changed += [key for key in both if told[key] != ours[key] and key not in changed]
            if changed:
                raise UserError(
                    f"{self.directory}: holds samples drawn with another {', '.join(changed)}; "
                    "choose another --log_dir or --name, or remove it"
                )
        write_text(path, json.dumps({**provenance, **settings}))

    def _tidy(self, final: Path, size: int, has_labels: bool) -> None:
        """Clear away what a killed run left: halves of files, damaged shards, shards already joined."""
        for directory in (self.directory, self.shards):
            remove_leftovers(directory)
        if final.is_file():
            shutil.rmtree(self.shards, ignore_errors=True)
        for indices, path in self._drawn():
            try:
                shard = NpzFile(path)
                images, labelled = shard.load("arr_0"), "arr_1" in shard.headers
                if images.shape != (len(indices), size, size, 3) or images.dtype != np.uint8:
                    raise UserError(f"{path}: holds {images.dtype} {list(images.shape)}")
                if labelled != has_labels or indices.stop > self.num_samples:
                    raise UserError(f"{path}: is of other samples")
            except UserError as error:
                warn(f"{error}; drawing these samples again")
                path.unlink()

    def _drawn(self) -> list[tuple[range, Path]]:
        found = []
        for path in self.shards.glob("*.npz"):
            if match := _SHARD.fullmatch(path.name):
                found.append((range(int(match[1]), int(match[2])), path))
        return sorted(found, key=lambda pair: pair[0].start)

    def _missing_batches(self, batch_size: int) -> list[range]:
        """What is not drawn yet, cut at multiples of the batch size."""
        missing = np.ones(self.num_samples, dtype=bool)
        for indices, _ in self._drawn():
            missing[indices.start : indices.stop] = False
        batches = []
        for start in range(0, self.num_samples, batch_size):
            run = np.flatnonzero(missing[start : start + batch_size]) + start
            for part in np.split(run, np.flatnonzero(np.diff(run) > 1) + 1):
                if len(part):
                    batches.append(range(int(part[0]), int(part[-1]) + 1))
        return batches

    def _join(self, final: Path, provenance: str) -> None:
        with create_npz(final, self.num_samples, provenance) as writer:
            done = 0
            for indices, path in self._drawn():
                shard = NpzFile(path)
                skip = slice(done - indices.start, self.num_samples - indices.start)
                images = shard.load("arr_0")[skip]
                labels = shard.load("arr_1")[skip] if "arr_1" in shard.headers else None
                writer.append(images, labels)
                if not done:  # before the archive has its name: once it has, all is done
                    save_grid(
                        self.directory / "samples.png", images[:64], scale=max(1, 64 // images.shape[1])
                    )
                done += len(images)
        shutil.rmtree(self.shards)
