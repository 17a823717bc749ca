"""The whole iteration as one CUDA graph: teacher step, every pass, backward, optimizer, averages.

A graph launches all of an iteration's kernels at once, which spares the time that Python takes to launch a
few thousand. It is kept apart from the training loop until it has been measured on a GPU.
"""

from collections.abc import Callable

import torch as th

from guided_diffusion import dist_util
from guided_diffusion.distill.source import TeacherSource
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.metrics import Metrics

_WARM_UPS = 3  # calls that fill caches, lazily made states and the allocator, as torch asks for


class Captured:
    """A function of no arguments, captured as a CUDA graph at its fourth call and from then on replayed.

    What it reads and writes must keep its place in memory. On a processor it is just called.
    """

    def __init__(self, function: Callable[[], object]):
        self.function = function
        self.calls = 0
        self.stream: th.cuda.Stream | None = None
        self.graph: th.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Have it done."""
        if dist_util.dev().type != "cuda":
            self.function()
        elif self.calls < _WARM_UPS:
            self.calls += 1
            self.stream = self.stream or th.cuda.Stream()  # a capture cannot be on the default stream either
            self.stream.wait_stream(th.cuda.current_stream())
            with th.cuda.stream(self.stream):
                self.function()
            th.cuda.current_stream().wait_stream(self.stream)
        else:
            if self.graph is None:
                self.graph = th.cuda.CUDAGraph()
                with th.cuda.graph(self.graph):  # records, and computes nothing
                    self.function()
            self.graph.replay()


class WholeStep:
    """One iteration of a distillation's loop at each call, the same as `train_step(source.next_batch(step))`.

    From outside come the rows of the pool to train on and the learning rate, to the outside go the sums for
    the log; all else stays in place on the device. Of one rank, without `teacher.prob` and `run.ema_warmup`,
    by which an iteration is not always the same, and with entries and answers as published.

    Args:
        loop: the loop. Its optimizer is told to keep its learning rate on the device.
    """

    def __init__(self, loop: TrainLoop):
        assert isinstance(loop.source, TeacherSource)
        self.loop, self.source = loop, loop.source
        settings = loop.source.settings
        assert (settings.advance_stride, settings.teacher_interval, settings.on_policy) == (1, 1, 0)
        device = dist_util.dev()
        self.index = th.empty(self.source.batch_size, dtype=th.int64, device=device)
        self.lr = th.zeros((), device=device)
        self.bad_steps = loop.bad_steps
        self.sums: dict[str, th.Tensor] = {}
        for group in loop.optimizer.param_groups:
            group["capturable"] = True
        self.step = Captured(self._step)

    def __call__(self) -> None:
        """One iteration."""
        loop, done, metrics = self.loop, self.loop.step, self.loop.metrics
        self.index.copy_(self.source.pool.draw(self.source.batch_size))
        self.lr.fill_(loop.optimizer.param_groups[0]["lr"])
        for group in loop.optimizer.param_groups:
            group["lr"] = self.lr
        self.step()
        # What Python keeps count of, a replay does not touch.
        loop.step, loop.metrics = done + 1, metrics
        loop._set_lr()
        if metrics.sums:
            th._foreach_add_([metrics.sums[name] for name in self.sums], list(self.sums.values()))
        else:
            metrics.sums = {name: pair.clone() for name, pair in self.sums.items()}

    def _step(self) -> None:
        loop, source = self.loop, self.source
        loop.metrics = Metrics()
        loop.train_step(source.pool.advance(self.index, source.teacher, **source.maps))
        self.sums = loop.metrics.sums
        self.bad_steps.copy_(loop.bad_steps)
        loop.bad_steps = self.bad_steps
