"""The dynamic batch: training inputs taken from the teacher's own reverse chain, without any data.

Dynamic Iterative Distillation (DKDM, CVPR 2025). A sample's *level* is the number of denoising steps it
still has to go: T is pure noise, 0 is clean, and a sample at level l is x_t with t = l - 1 about to be
denoised. Steps are those of the (possibly respaced) process.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch as th

from ..errors import UserError
from ..gaussian_diffusion import GaussianDiffusion
from .teacher import Teacher


@dataclass(frozen=True)
class DistillationBatch:
    """What the student trains on.

    Attributes:
        x_t: float32 [B, C, H, W].
        t: int64 [B], steps of the process.
        eps: the teacher's output at (x_t, t), as in `TeacherStep`.
        mean: the same.
        log_variance: the same.
        y: int64 [B] class labels, or None.
        features, bottleneck: the teacher's maps, float32 [B, C', H', W'], or None where nobody asked.
        index: int64 [B], the pool's entries that these were, or None for samples of no pool, for
            outputs that are used again, and where no entry follows the student.
        s: int64 [B], the steps at which those are now (-1: clean), or None.
        place: of a microbatch, where its first sample stands in the iteration's batch, and the size of that;
            None of a whole batch.
    """

    x_t: th.Tensor
    t: th.Tensor
    eps: th.Tensor
    mean: th.Tensor
    log_variance: th.Tensor
    y: th.Tensor | None = None
    features: th.Tensor | None = None
    bottleneck: th.Tensor | None = None
    index: th.Tensor | None = None
    s: th.Tensor | None = None
    place: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, samples: slice | th.Tensor) -> "DistillationBatch":
        """Some of the samples."""
        return self.each(lambda tensor: tensor[samples])

    def each(self, change: Callable[[th.Tensor], th.Tensor]) -> "DistillationBatch":
        """The same with all tensors changed alike."""
        changed = {k: change(v) for k, v in vars(self).items() if isinstance(v, th.Tensor)}
        return DistillationBatch(**changed)  # type: ignore[arg-type]

    @classmethod
    def joined(cls, batches: Sequence["DistillationBatch"]) -> "DistillationBatch":
        """Batches with the same fields as one."""
        fields = [k for k, v in vars(batches[0]).items() if isinstance(v, th.Tensor)]
        return cls(**{k: th.cat([vars(batch)[k] for batch in batches]) for k in fields})  # type: ignore[arg-type]

    def split(self, size: int) -> Iterator["DistillationBatch"]:
        """Yield consecutive pieces of at most `size` samples."""
        for start in range(0, len(self), size):
            yield replace(self[start : start + size], place=(start, len(self)))


class DynamicBatch:
    """A pool of samples on their way from noise to image, and the rule by which they advance.

    The three policies of DKDM are one mechanism: `dynamic` draws batches from a pool larger than one
    batch; `shuffled` has a pool of exactly one batch at mixed levels; `iterative` has a pool of one
    batch that starts together at level T.

    Args:
        x: float32 or float16 [N, C, H, W]; batches are float32 whatever the pool is kept in.
        levels: int64 [N] in {0..T}.
        num_timesteps: T.
        y: int64 [N] class labels, or None.
        device: where batches go; by default where the pool lies, which may be elsewhere.
        replay: the teacher's last outputs, kept to train on again; on the batches' device.

    Attributes:
        restarts: int64 [], how many entries were restarted from noise so far; who reads it may reset it.

    Raises:
        UserError: shapes that do not belong together, or a level outside {0..T}.
    """

    def __init__(
        self,
        x: th.Tensor,
        levels: th.Tensor,
        num_timesteps: int,
        y: th.Tensor | None = None,
        device: th.device | str | None = None,
        replay: DistillationBatch | None = None,
    ):
        if x.ndim != 4 or levels.shape != x.shape[:1] or (y is not None and y.shape != levels.shape):
            raise UserError(
                f"a pool needs x [N, C, H, W] and levels [N], not {tuple(x.shape)}, {tuple(levels.shape)}"
            )
        if len(levels) and not (int(levels.min()) >= 0 and int(levels.max()) <= num_timesteps):
            raise UserError(
                f"the pool's levels reach from {int(levels.min())} to {int(levels.max())}, "
                f"outside 0..{num_timesteps}"
            )
        self.x, self.levels, self.num_timesteps, self.y = x, levels, num_timesteps, y
        self.device = th.device(x.device if device is None else device)
        self.replay = None if replay is None else replay.each(lambda tensor: tensor.to(self.device))
        self.restarts = th.zeros((), dtype=th.int64, device=self.device)

    def __len__(self) -> int:
        return len(self.levels)

    @classmethod
    def of_noise(
        cls,
        size: int,
        shape: tuple[int, int, int],
        num_timesteps: int,
        num_classes: int | None = None,
        device: th.device | str = "cpu",
    ) -> "DynamicBatch":
        """A pool of pure noise (C, H, W) at level T, with random labels if there are classes."""
        x = th.randn(size, *shape, device=device)
        levels = th.full((size,), num_timesteps, device=device)
        y = None if num_classes is None else th.randint(num_classes, (size,), device=device)
        return cls(x, levels, num_timesteps, y)

    def stored_on(
        self, storage: th.device | str, dtype: th.dtype, device: th.device | str | None = None
    ) -> "DynamicBatch":
        """The same pool, moved to `storage` as `dtype`, with its batches on `device` (default: there too)."""
        y = None if self.y is None else self.y.to(storage)
        x = self.x.to(storage, dtype)
        return DynamicBatch(x, self.levels.to(storage), self.num_timesteps, y, device, self.replay)

    def draw(self, batch_size: int) -> th.Tensor:
        """Indices of a batch, int64 [B], at random without replacement."""
        return th.randperm(len(self))[:batch_size].to(self.levels.device)

    def advance(
        self,
        index: th.Tensor,
        teacher: Teacher,
        *,
        stride: int = 1,
        features: bool = False,
        bottleneck: bool = False,
    ) -> DistillationBatch:
        """Take some entries further by one teacher evaluation and return what the student learns from it.

        Entries at level 0 are restarted from fresh noise at level T first, with new labels. The pool holds
        the next states and their levels as soon as this returns.

        Args:
            index: int64 [B], which entries.
            teacher: the teacher.
            stride: mean number of steps that an entry advances: always 1 (as published), or uniform in
                {1..2 stride - 1}, ending at the clean image. The more, the more different images the student
                sees the way to; the states are those of a sampler with as few steps.
            features, bottleneck: the batch carries these maps of the teacher's too.
        """
        x_t, level, y = self.take(index)
        restart = level == 0
        self.restarts += restart.sum()
        x_t = th.where(restart.reshape(-1, 1, 1, 1), th.randn_like(x_t), x_t)
        if y is not None:
            assert teacher.network.num_classes is not None
            y = th.where(restart, th.randint(teacher.network.num_classes, y.shape, device=y.device), y)
        t = th.where(restart, self.num_timesteps, level) - 1
        s = None
        if stride > 1:
            s = (t - th.randint(1, 2 * stride, (len(t),)).to(t)).clamp(min=-1)
        step = teacher.step(x_t, t, y, s=s, features=features or bottleneck)
        maps = step.features if features else None, step.bottleneck if bottleneck else None
        s = t - 1 if s is None else s
        self.put(index, step.x_next, s + 1, y)
        return DistillationBatch(x_t, t, step.eps, step.mean, step.log_variance, y, *maps, index, s)

    def follow(
        self, batch: DistillationBatch, eps: th.Tensor, process: GaussianDiffusion, probability: float
    ) -> None:
        """Let some entries go on where the student would have gone from x_t, instead of the teacher.

        Their x_s is shifted by the difference of the two predicted x_0 times the step's factor of x_0. Both
        are clipped to the process's bounds, the student's also to the least and greatest value of the
        teacher's for that sample (a latent space has no bounds); the noise and its variance stay the
        teacher's. So an untrained student cannot throw them far. Where its prediction is not finite they
        stay where the teacher led them.

        Args:
            batch: what `advance` returned, or a piece of it.
            eps: the student's prediction at (x_t, t), float32 [B, C, H, W].
            process: the teacher's.
            probability: of each entry.
        """
        assert batch.index is not None and batch.s is not None
        chosen = (th.rand(len(batch)) < probability).to(batch.t.device)
        teachers, students = (process.clipped_xstart(batch.x_t, batch.t, e) for e in (batch.eps, eps))
        students = students.clamp(*(f((1, 2, 3), keepdim=True) for f in (teachers.amin, teachers.amax)))
        shift = process.posterior_step(batch.t, batch.s).x_start * (students - teachers)
        shift = process.where_known(batch.t, shift, th.zeros_like(shift))
        chosen &= eps.isfinite().flatten(1).all(dim=1)
        x_s, level, _ = self.take(batch.index)
        self.put(batch.index, th.where(chosen.reshape(-1, 1, 1, 1), x_s + shift, x_s), level)

    def add_to_replay(self, batch: DistillationBatch, capacity: int) -> None:
        """Keep what the teacher answered; the oldest of more than `capacity` samples are forgotten."""
        own = replace(batch, index=None, s=None)  # the entries go on
        own = own.each(th.Tensor.contiguous)  # as it comes back from a file
        known = own if self.replay is None else DistillationBatch.joined([self.replay, own])
        self.replay = known[-capacity:]

    def sample_replay(self, batch_size: int) -> DistillationBatch:
        """Answers that are kept, at random without replacement."""
        assert self.replay is not None
        chosen = th.randperm(len(self.replay))[:batch_size]
        return self.replay[chosen.to(self.device)]

    def take(self, index: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Entries x float32 [B, C, H, W], levels [B] and labels [B] or None, on the batches' device."""
        y = None if self.y is None else self.y[index].to(self.device)
        return self.x[index].to(self.device, th.float32), self.levels[index].to(self.device), y

    def put(self, index: th.Tensor, x: th.Tensor, levels: th.Tensor, y: th.Tensor | None = None) -> None:
        """Store entries back in place; their labels too, if given."""
        self.x[index] = x.to(self.x)
        self.levels[index] = levels.to(self.levels)
        if y is not None and self.y is not None:
            self.y[index] = y.to(self.y)

    def next_batch(
        self, batch_size: int, teacher: Teacher, prob: float = 1.0, **options: Any
    ) -> DistillationBatch:
        """One iteration's batch; with `prob` < 1 the same samples first advance a random while longer.
        Further options are those of `advance`.
        """
        index = self.draw(batch_size)
        batch = self.advance(index, teacher, **options)
        while prob < 1 and float(th.rand(())) >= prob:
            batch = self.advance(index, teacher, **options)
        return batch


def pool_size(iter_choice: str, rho: float, num_timesteps: int, batch_size: int) -> int:
    """Entries in the pool of one rank whose share of the batch is `batch_size` (DKDM: round(rho T) B)."""
    if iter_choice == "dynamic_iterative_distillation":
        return max(1, round(rho * num_timesteps)) * batch_size
    return batch_size


def draw_goals(pool: DynamicBatch) -> th.Tensor:
    """A random level for every entry of a pool to be denoised to, int64 [N] in {1..T-1}."""
    return th.randint(1, pool.num_timesteps, (len(pool),), device=pool.levels.device)


def prepare(
    pool: DynamicBatch,
    teacher: Teacher,
    rows_per_call: int,
    stride: int = 1,
    goal: th.Tensor | None = None,
) -> Iterator[int]:
    """Denoise a pool of noise in place until every entry is at its own random level in {1..T-1}.

    Every teacher call takes the first `rows_per_call` entries that are not there yet, so that its
    batch stays full to the end.

    Args:
        pool: entries at level T, or on their way.
        teacher: the teacher.
        rows_per_call: rows of a teacher call.
        stride: steps per jump. With more than 1 each entry jumps by about so many steps at once
            (`Teacher.jump`), the jumps of an entry being as equal as can be and the last one
            landing exactly on its level, so the pool still covers every level.
        goal: the levels, int64 [N]; by default `draw_goals` draws them.

    Yields:
        The number of entries that arrived with each call.
    """
    goal = draw_goals(pool) if goal is None else goal
    while len(index := (pool.levels > goal).nonzero().flatten()[:rows_per_call]):
        x_t, level, y = pool.take(index)
        remaining = level - goal[index].to(level)
        jumps = remaining.add(stride - 1).div(stride, rounding_mode="floor")
        hop = remaining.add(jumps - 1).div(jumps, rounding_mode="floor")
        t = level - 1
        s = t - hop
        pool.put(index, teacher.jump(x_t, t, s, y), s + 1)
        yield int((hop == remaining).sum())
