"""Sampling that is killed, started again, and asked for more than fits into memory."""

import random
import resource

import numpy as np
from driver import FORK, Child, die_while_saving, run
from tiny import distillation

from guided_diffusion.spaces import PixelSpace

N = 12


def command(folder, number=N):
    config = distillation(folder)
    flags = ["--model_path", folder / "teacher.pt", "--timestep_respacing", 2, "--batch_size", 2]
    return ["scripts/image_sample.py", "--config", config, *flags, "--num_samples", number]


def test_killed_and_started_again_gives_the_same_file(tmp_path, record_property):
    dice = random.Random(1)
    flags = command(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "samples"
    assert run(tmp_path, *flags, "--log_dir", whole)[0] == 0
    kills = 0
    while True:
        tamper = die_while_saving(dice, pause=0, chance=0.15) if kills < 6 else None
        child = Child(tmp_path / "output.txt", *flags, "--log_dir", folder, tamper=tamper)
        code = child.wait()
        assert code in (0, -9) and "Traceback" not in child.text(), child.text()
        if code == 0:
            break
        kills += 1
    name = f"samples_{N}x16x16x3.npz"
    assert kills
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {name, "samples.png", "sampling.json"}
    record_property("told", f"{kills} SIGKILLs, identical archive")


def test_a_damaged_shard_is_drawn_again(tmp_path):
    flags = command(tmp_path)
    whole, folder = tmp_path / "whole", tmp_path / "samples"
    assert run(tmp_path, *flags, "--log_dir", whole)[0] == 0
    (folder / "shards").mkdir(parents=True)
    (folder / "shards/0-2.npz").write_bytes(b"PK half a shard")
    np.savez(folder / "shards/2-4.npz", np.zeros((1, 16, 16, 3), np.uint8))
    np.savez(folder / "shards/4-6.npz", np.zeros((2, 16, 16, 3)))
    np.savez(folder / "shards/6-8.npz", np.zeros((2, 16, 16, 3), np.uint8), np.zeros(2, np.int64))
    (folder / "shards/.4-6.npz.1.tmp").write_bytes(b"half")
    code, text = run(tmp_path, *flags, "--log_dir", folder)
    assert code == 0 and text.count("drawing these samples again") == 4
    name = f"samples_{N}x16x16x3.npz"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()
    (folder / "sampling.json").write_text("{")
    code, text = run(tmp_path, *flags, "--log_dir", folder)
    assert code == 1 and "sampling.json: is damaged" in text and "Traceback" not in text


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, monkeypatch):
    """The images of the larger set take 75 MB more; drawing them is left out."""
    from guided_diffusion.sampling import sample_set

    def black(network, process, space, indices, **_):
        return np.zeros((len(indices), 64, 64, 3), np.uint8), None

    class Model:
        shape = (3, 64, 64)
        compute_dtype = "none"
        num_classes = None

    class Process:
        timestep_map = ()
        num_timesteps = 0

    monkeypatch.setattr(sample_set, "sample_images", black)
    answers = FORK.SimpleQueue()

    def draw(number):
        (tmp_path / "weights.pt").write_bytes(b"")
        samples = sample_set.SampleSet(
            tmp_path / str(number), number, seed=0, sampler=("ancestral", None), clip_denoised=True
        )
        samples.draw(Model(), Process(), PixelSpace(64), tmp_path / "weights.pt", 256)
        answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    peaks = []
    for number in (512, 512 + 6144):
        process = FORK.Process(target=draw, args=(number,))
        process.start()
        process.join(100)
        assert process.exitcode == 0
        peaks.append(answers.get() / 1024)
    assert peaks[1] - peaks[0] < 20
