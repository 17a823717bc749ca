"""Where the batches of a distillation come from."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch as th

from .. import dist_util
from ..config.settings import Distill
from .dynamic_batch import DistillationBatch, DynamicBatch
from .pool_file import write_pool
from .teacher import Teacher

_BINS = 20  # of the histogram of levels


class TeacherSource:
    """Batches from the dynamic batch, which the teacher advances as it makes the targets.

    Args:
        pool: of this rank.
        teacher: the teacher.
        batch_size: of this rank.
        settings: how entries advance.
        belongs_to: whose states they are; written into the pools of checkpoints.
        prob: probability of training on a drawn batch instead of only advancing it.
        ramp: iterations over which `settings.on_policy` is reached.
        features, bottleneck: whether batches carry these maps of the teacher's.
    """

    has_state = True

    def __init__(
        self,
        pool: DynamicBatch,
        teacher: Teacher,
        batch_size: int,
        settings: Distill,
        belongs_to: Mapping[str, Any] | None = None,
        *,
        prob: float = 1.0,
        ramp: float = 0.0,
        features: bool = False,
        bottleneck: bool = False,
    ):
        self.pool, self.teacher, self.settings = pool, teacher, settings
        self.belongs_to = {"T": pool.num_timesteps} if belongs_to is None else dict(belongs_to)
        self.batch_size, self.prob, self.ramp = batch_size, prob, ramp
        self.maps = {"features": features, "bottleneck": bottleneck}
        self.probability = 0.0  # of following the student
        kept = pool.replay
        if kept is not None:
            same = all((vars(kept)[name] is not None) == asked for name, asked in self.maps.items())
            if len(kept) < batch_size or not same:
                pool.replay = None  # of a run with other settings

    def next_batch(self, step: int) -> DistillationBatch:
        """One teacher evaluation, or with `teacher_interval` > 1 mostly outputs that it gave before."""
        interval = self.settings.teacher_interval
        if self.pool.replay is not None and step % interval:
            return self.pool.sample_replay(self.batch_size)
        self.probability = self.settings.on_policy * min(1.0, step / self.ramp if self.ramp else 1.0)
        stride = self.settings.advance_stride
        batch = self.pool.next_batch(self.batch_size, self.teacher, self.prob, stride=stride, **self.maps)
        if not self.settings.on_policy:
            batch = replace(batch, index=None, s=None)  # nobody follows, and they may lie elsewhere
        if interval > 1:
            self.pool.add_to_replay(batch, self.settings.replay_batches * self.batch_size)
        return batch

    def follow(self, batch: DistillationBatch, eps: th.Tensor) -> None:
        """Let some entries go on where the student would have gone, with this iteration's probability."""
        self.pool.follow(batch, eps, self.teacher.process, self.probability)

    def writer(self) -> Callable[[Path], None]:
        """Gather copies of all ranks' pools on rank 0, for training goes on while they are written."""
        pool, gather = self.pool, dist_util.gather
        replay = pool.replay if self.settings.teacher_interval > 1 else None
        whole = DynamicBatch(
            gather(pool.x),
            gather(pool.levels),
            pool.num_timesteps,
            None if pool.y is None else gather(pool.y),
            replay=None if replay is None else replay.each(gather),
        )
        return lambda path: write_pool(path, [whole], self.belongs_to)

    def pool_record(self) -> dict[str, Any]:
        """Where the entries of all ranks are, and how many were restarted since the record before.

        Returns:
            "T"; "levels", how many entries are about to be denoised at t in [i T / 20, (i + 1) T / 20), for i
            in 0..19; "clean", how many are at level 0, whose next turn restarts them; "mean_level"; and
            "restarts".
            The age of an entry's chain, in steps since its noise, is T - level.
        """
        pool, total = self.pool, self.pool.num_timesteps
        bins = th.where(pool.levels > 0, (pool.levels - 1) * _BINS // total, _BINS)
        own = [th.bincount(bins, minlength=_BINS + 1), pool.levels.sum()[None], pool.restarts[None]]
        counts = dist_util.all_reduce_sum(th.cat([part.to(dist_util.dev()) for part in own])).tolist()
        pool.restarts.zero_()
        *levels, clean, summed, restarts = counts
        mean = summed / (sum(levels) + clean)
        return {"T": total, "levels": levels, "clean": clean, "mean_level": mean, "restarts": restarts}

    def close(self) -> None:
        """Nothing runs beside the loop."""
