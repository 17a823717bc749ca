"""Where the batches of a distillation come from."""

from collections.abc import Callable
from pathlib import Path

from .. import dist_util
from ..runs.checkpoint_writer import to_cpu
from .dynamic_batch import DistillationBatch, DynamicBatch
from .pool_file import write_pool
from .teacher import Teacher


class TeacherSource:
    """Batches from the dynamic batch, which the teacher advances as it makes the targets.

    Args:
        pool: of this rank.
        teacher: the teacher.
        batch_size: of this rank.
        prob: probability of training on a drawn batch instead of only advancing it.
        features: whether batches carry the teacher's features.
    """

    has_state = True

    def __init__(
        self, pool: DynamicBatch, teacher: Teacher, batch_size: int, prob: float = 1.0, features: bool = False
    ):
        self.pool, self.teacher = pool, teacher
        self.batch_size, self.prob, self.features = batch_size, prob, features

    def next_batch(self) -> DistillationBatch:
        """One teacher step."""
        return self.pool.next_batch(self.batch_size, self.teacher, self.prob, features=self.features)

    def writer(self) -> Callable[[Path], None]:
        """The pools of all ranks, one after the other."""
        pool = self.pool
        x, levels = dist_util.all_gather(pool.x), dist_util.all_gather(pool.levels)
        y = None if pool.y is None else dist_util.all_gather(pool.y)
        x, levels, y = to_cpu([x, levels, y])  # copies: training goes on while they are written
        whole = DynamicBatch(x, levels, pool.num_timesteps, y)
        return lambda path: write_pool(path, [whole], {"T": pool.num_timesteps})
