"""Runs the real scripts in forked processes: they start at once, can be killed, and tampered with."""

import csv
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import time
import traceback

import numpy as np
import tensorboardX.event_file_writer
import tensorboardX.summary  # noqa: F401
import torch as th
import torch._dynamo  # which the first optimizer of a process would import
import yaml
from tiny import ROOT, T, distillation, network

import guided_diffusion.sampling.sample_set
import guided_diffusion.setups.distillation
import guided_diffusion.setups.image_training  # noqa: F401 - imported here, so that no child has to
from guided_diffusion import train_util
from guided_diffusion.distill.pool_file import read_pool
from guided_diffusion.io.torch_file import read_torch_file
from guided_diffusion.runs import checkpoint, start
from guided_diffusion.runs.checkpoint import complete_checkpoints, newest_checkpoint

FORK = multiprocessing.get_context("fork")
SECONDS = 120  # no child of these tests takes nearly so long: beyond it, it hangs


class Child:
    """A script in a forked process; its output goes to a file.

    Args:
        output: where the output goes.
        args: script and arguments.
        tamper: called in the child before the script.
        environment: added to the child's.
    """

    def __init__(self, output, *args, tamper=None, **environment):
        self.output = output
        self.process = FORK.Process(target=self._run, args=(args, tamper, environment))
        self.process.start()

    def _run(self, args, tamper, environment):
        os.environ.update(environment)
        file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
        code = 70
        start.save_curves = lambda *_: None  # a second of matplotlib's; test_scripts.py has it
        try:
            if tamper:
                tamper()
            sys.argv = [str(ROOT / args[0]), *map(str, args[1:])]
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self):
        """The exit status; negative: the signal that ended it."""
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"hangs: {self.text()}")
        return self.process.exitcode

    def kill(self):
        """SIGKILL."""
        self.process.kill()
        self.process.join()

    def signal(self, number):
        """Send a signal."""
        os.kill(self.process.pid, number)

    def text(self):
        """What it has printed."""
        return self.output.read_text() if self.output.exists() else ""


def run(folder, *args, tamper=None):
    """Run a script to its end; status and output."""
    child = Child(folder / "output.txt", *args, tamper=tamper)
    return child.wait(), child.text()


def run_ranks(folder, ranks, *args, tamper=None, expect=0):
    """Run a script on some ranks, met as under torchrun; rank 0's output. A dead rank ends the others."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        names = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
        env = {name: str(value) for name, value in names.items()} if ranks > 1 else {}
        env |= {"MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}
        children.append(Child(folder / f"output{rank}.txt", *args, tamper=tamper, **env))
    waiting = list(children)
    while waiting:
        waiting = [child for child in waiting if child.process.is_alive()]
        if any(child.process.exitcode not in (None, 0, 75) for child in children):
            for child in waiting:
                child.kill()
            break
        time.sleep(0.02)
    codes = [child.wait() for child in children]
    if expect is not None:
        assert codes == [expect] * ranks, [child.text() for child in children]
    return children[0].text()


_prepared = {}  # the pools there are: what they depend on -> files by name


def distil(folder, **keys):
    """A small distillation, its pool prepared, anew only if no test before had the same: its command, without
    --exp_dir.
    """
    config = distillation(folder, **({"student__dropout": 0.1, "distill__role_vector": True} | keys))
    content = yaml.safe_load(config.read_text())
    del content["student"]
    pool = yaml.safe_dump(content).replace(str(folder), "")
    if pool not in _prepared:
        before = {*folder.iterdir()}
        code, text = run(folder, "scripts/dynamic_prepare.py", "--config", config)
        assert code == 0, text
        files = {*folder.glob("pool*")} - before
        assert files
        _prepared[pool] = {file.name: file.read_bytes() for file in files}
    for name, content in _prepared[pool].items():
        (folder / name).write_bytes(content)
    return ["scripts/image_kd.py", "--config", config]


def train(folder, **keys):
    """A small training on images: its command, without --exp_dir."""
    config = network(8, attention_resolutions="4", class_cond=True, num_classes=3, dropout=0.1)
    config |= {"lr": 1e-3, "batch_size": 4, "microbatch": 2, "schedule_sampler": "loss-second-moment"}
    config |= {"log_interval": 3, "save_interval": 4, "ema_rate": "0.9,0.99"} | keys
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config | {"run": {"iterations": 10, "sample_interval": -1}}))
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images, np.arange(10) % 3)
    return ["scripts/image_train.py", "--config", path, "--data_dir", folder / "images.npz"]


def assert_same(a, b):
    """Equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, th.Tensor):
        assert th.equal(a, b)
    else:
        assert a == b


def assert_same_end(first, second, step):
    """Weights, averages, optimizer, head and pool of two runs' checkpoints are the same bits."""
    ends = [newest_checkpoint(folder) for folder in (first, second)]
    assert [end.step for end in ends] == [step, step]
    assert ends[0].files == ends[1].files
    assert len(ends[0].files) >= 5
    for name in ends[0].files:
        if name.endswith(".cache"):
            a, b = (read_pool(end.directory / name, T, (3, 16, 16)) for end in ends)
            assert th.equal(a.x, b.x) and th.equal(a.levels, b.levels)
        elif name.endswith(".json"):  # a score
            assert json.loads((first / name).read_text()) == json.loads((second / name).read_text())
        else:
            a, b = (read_torch_file(end.directory / name) for end in ends)
            if name.startswith("opt"):
                for state in (a, b):
                    state.pop("metrics")
            assert_same(a, b)


def rows(folder):
    """progress.csv without what depends on the clock."""
    with open(folder / "progress.csv") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("iterations_per_second", "seconds")} for row in found]


def kill_in_step(step, rank=0):
    """A tampering: the process dies half-way through an iteration, its last checkpoint being complete."""

    def tamper():
        inner = train_util.TrainLoop._learning_rate

        def dying(loop):
            if loop.step == step and train_util.dist_util.rank() == rank:
                loop.writer.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(loop)

        train_util.TrainLoop._learning_rate = dying

    return tamper


def die_while_saving(dice, pause=0.01, chance=0.06):
    """A tampering: saving takes its time, and the process dies at a random one of its moments."""
    seed = dice.random()

    def tamper():
        fate = random.Random(seed)

        def wrap(module, name):
            inner = getattr(module, name)

            def slow(*args, **kwargs):
                if fate.random() < chance:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = inner(*args, **kwargs)
                time.sleep(pause)
                if fate.random() < chance:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            setattr(module, name, slow)

        wrap(os, "replace")
        wrap(os, "fsync")
        wrap(th, "save")
        wrap(checkpoint, "_write_manifest")

    return tamper


def assert_readable(folder):
    """Every complete checkpoint can be read; the newest one's step, 0 without any."""
    found = complete_checkpoints(folder) if folder.is_dir() else []
    for one in found:
        for name in one.files:
            if name.endswith(".cache"):
                read_pool(folder / name, T, (3, 16, 16))
            else:
                read_torch_file(folder / name)
    newest = newest_checkpoint(folder) if folder.is_dir() else None
    assert (newest.step if newest else 0) == (found[-1].step if found else 0)
    return found[-1].step if found else 0
