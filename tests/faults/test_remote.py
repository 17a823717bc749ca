"""A run directory at a URL survives the machine. The real blobfile talks to a small store on 127.0.0.1."""

import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import blobfile._common
import blobfile._gcp
import pytest
import torch as th
from driver import Child, assert_same_end, distil, kill_in_step, rows, run, run_ranks
from store import Store

from guided_diffusion.errors import UserError
from guided_diffusion.io import remote
from guided_diffusion.io.remote import Folder, RemoteError, fetch, local_name
from guided_diffusion.runs.checkpoint import Checkpoint, Retention, complete_checkpoints
from guided_diffusion.runs.checkpoint_writer import CheckpointWriter
from guided_diffusion.runs.mirror import Mirror, fetch_checkpoint

STEPS = (2, 4, 5)  # at which the run of these tests saves


@pytest.fixture(autouse=True)
def store(monkeypatch):
    one = Store()
    monkeypatch.setattr(blobfile._common.global_pool_director, "get_http_pool", one.pool)
    monkeypatch.setenv("BLOBFILE_FORCE_GOOGLE_ANONYMOUS_AUTH", "1")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")
    monkeypatch.setattr(remote, "_RETRIES", 1)
    remote._store.cache_clear()
    yield one
    one.close()
    remote._store.cache_clear()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a configuration, its command, and the end of an undisturbed run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "yaml").mkdir()
    command = [
        *distil(folder / "yaml", student__save_interval=2, student__cache_save_interval=1, run__iterations=5)
    ]
    code, text = run(folder, *command, "--exp_dir", folder / "straight")
    assert code == 0, text
    return folder, command


@pytest.fixture
def kd(project, store):
    """Run with a URL: (tamper, fresh machine?) -> status, output; where it works; where the end is known."""
    folder, command = project
    url = "gs://bucket/runs/one"
    local = folder / "experiments/remote" / local_name(url)

    def start(tamper=None, fresh=True, ranks=None):
        if fresh:
            shutil.rmtree(folder / "experiments", ignore_errors=True)
        flags = [*command, "--exp_dir", url]
        if ranks:
            return run_ranks(folder, ranks, *flags, "run.iterations=2", tamper=tamper)
        return run(folder, *flags, tamper=tamper)

    return start, local, folder / "straight"


def assert_copied(store, local, prefix="runs/one/"):
    """What is there is what is here, to the last byte, but for locks."""
    here = {path.name: path.read_bytes() for path in local.iterdir() if path.name[0] != "."}
    assert {name: store.objects[prefix + name] for name in store.names(prefix)} == here


def fill(store, folder, directory):
    """As if the run in a directory had been at the URL."""
    for path in directory.iterdir():
        if path.is_file():
            store.put(f"{folder}/{path.name}", path.read_bytes())


def die_in_upload(name):
    """A tampering: the process dies with a file half-way there."""

    def tamper():
        inner = Folder.upload

        def upload(folder, path):
            if path.name == name:
                os.kill(os.getpid(), signal.SIGKILL)
            inner(folder, path)

        Folder.upload = upload

    return tamper


def test_exact_on_another_machine(store, kd):
    """Killed in a step, then between the files of a set; each time the local directory is lost."""
    start, local, straight = kd
    assert start(kill_in_step(3))[0] == -signal.SIGKILL
    code, text = start(die_in_upload("opt000004.pt"))
    assert code == -signal.SIGKILL and "resumed from step 2" in text and "saved step 4" in text
    assert "model000004.pt" in store.names("runs/one/")
    assert "checkpoint000004.json" not in store.names("runs/one/")
    code, text = start()
    assert code == 0 and "resumed from step 2" in text and "not there" not in text, text
    assert_same_end(straight, local, 5)
    assert rows(straight) == rows(local)
    assert_copied(store, local)
    log = (local / "log.txt").read_text()  # of all three
    assert log.count("resumed from step 2") == 2 and "finished" in log


def test_the_manifest_comes_last(store, tmp_path):
    mirror = Mirror("gs://bucket/r", tmp_path, Retention())
    save(mirror, [1])
    written = [name for method, name in store.log if method == "PUT" and "writable" not in name]
    assert written[-1] == "r/checkpoint000001.json" and len(written) == 3


def test_the_same_machine_sends_what_could_not_be_sent(store, kd):
    start, local, straight = kd
    store.fail = lambda method, name: method in ("POST", "PUT") and "0000" in name
    code, text = start()
    assert code == 1 and "Traceback" not in text
    assert text.count("WARNING: step") == len(STEPS) and text.count("training goes on") == len(STEPS)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "gs://bucket/runs/one is not up to date: " in errors[0]
    assert "unexpected status 503" in errors[0] and "the same command tries again" in errors[0]
    assert_same_end(straight, local, 5)
    assert not any("0000" in name for name in store.names("runs/one/"))
    store.fail = lambda method, name: False
    code, text = start(fresh=False)
    assert code == 0 and "resumed from step 5" in text, text
    assert_copied(store, local)


def test_damage_there_is_found(store, kd):
    start, local, straight = kd
    fill(store, "runs/one", straight)
    flipped = bytearray(store.objects["runs/one/opt000005.pt"])
    flipped[len(flipped) // 2] ^= 1
    store.put("runs/one/opt000005.pt", bytes(flipped))
    store.put("runs/one/model000004.pt", store.objects["runs/one/model000004.pt"][:-1])
    code, text = start()
    assert code == 0 and "resumed from step 2" in text
    assert "ignoring the checkpoint at step 5 of gs://bucket/runs/one: opt000005.pt is damaged" in text
    assert "step 4 of gs://bucket/runs/one: model000004.pt is not there, or not whole" in text
    assert_same_end(straight, local, 5)
    assert rows(straight) == rows(local)
    assert_copied(store, local)  # what was damaged is replaced


def test_rank_0_alone_talks_to_the_store(store, kd):
    start, local, _ = kd

    def tamper():
        def forbidden():
            raise AssertionError("rank 1 talks to the store")

        if os.environ["RANK"] == "1":
            remote._store = forbidden

    text = start(tamper, ranks=2)
    assert "2 rank(s)" in text
    assert_copied(store, local)


def test_a_stopped_run_is_copied_before_it_ends(store, kd, project):
    _, local, _ = kd
    folder, command = project
    shutil.rmtree(folder / "experiments", ignore_errors=True)
    flags = [*command, "run.iterations=0", "student.log_interval=1", "--exp_dir", "gs://bucket/runs/one"]
    child = Child(folder / "stopped.txt", *flags)
    while "step 2" not in child.text():
        assert child.process.is_alive(), child.text()
    child.signal(signal.SIGTERM)
    assert child.wait() == 75, child.text()
    assert_copied(store, local)


def save(mirror, steps):
    """Checkpoints as a run saves them; what is told meanwhile."""
    told = []
    writer = CheckpointWriter(mirror.directory, told.append, mirror.retention, mirror.push)
    for step in steps:
        contents = {"model": {"w": th.full((1,), float(step))}}
        writer.submit(step, contents | {"pool": lambda path: path.write_bytes(b"pool")})
    writer.close()
    return told


def test_the_next_checkpoint_tries_again(store, tmp_path):
    store.fail = lambda method, name: name == "r/model000001.pt" and "r/model000002.pt" not in store.objects
    told = save(Mirror("gs://bucket/r", tmp_path, Retention()), [1, 2])
    assert [line.split(":")[0] for line in told] == [
        "saved step 1 to " + str(tmp_path / local_name("gs://bucket/r")),
        "WARNING",
        "saved step 2 to " + str(tmp_path / local_name("gs://bucket/r")),
    ]
    assert told[1].startswith("WARNING: step 1 is saved here alone: gs://bucket/r/model000001.pt: ")
    assert {"checkpoint000001.json", "checkpoint000002.json"} <= store.names("r/")
    written = [name for method, name in store.log if method == "PUT"]
    assert written.index("r/checkpoint000002.json") < written.index("r/model000001.pt")  # the newest first


def test_what_is_kept_there(store, tmp_path):
    """The second machine also removes what the first one left, which it does not have itself."""
    keep = Retention(keep_last=3, keep_every=5)
    save(Mirror("gs://bucket/r/", tmp_path / "first", keep), range(1, 8))
    found = {name.removeprefix("checkpoint") for name in store.names("r/") if "checkpoint" in name}
    assert found == {"000005.json", "000006.json", "000007.json"}
    second = Mirror("gs://bucket/r", tmp_path / "second", keep)
    assert second.pull().step == 7
    assert [c.step for c in complete_checkpoints(second.directory)] == [7]
    save(second, [8, 9])
    kept = {
        f"{n}00000{step}.{end}"
        for step in (5, 7, 8, 9)
        for n, end in (("model", "pt"), ("checkpoint", "json"))
    }
    assert store.names("r/") == kept | {"teacher-state-000008.cache", "teacher-state-000009.cache"}
    third = Mirror("gs://bucket/r", tmp_path / "third", keep)
    store.put("r/checkpoint000009.json", b"{")
    assert third.pull().step == 8
    save(third, [9])  # what could not be used is replaced, and has not counted as one to keep
    assert Mirror("gs://bucket/r", tmp_path / "fourth", keep).pull().step == 9


def test_two_sides_that_went_apart(store, tmp_path):
    """What is here and newer stays; of one step, what is here replaces what is there, never half of it."""
    first, second = (Mirror("gs://bucket/r", tmp_path / name, Retention()) for name in ("first", "second"))
    save(first, [1])
    second.pull()
    save(second, [2])
    store.fail = lambda method, name: method != "GET"
    save(first, [3])
    store.fail = lambda method, name: False
    assert first.pull().step == 3
    first.push()
    assert {"model000001.pt", "model000002.pt", "model000003.pt"} <= store.names("r/")
    (second.directory / "model000002.pt").unlink()
    save(second, [3])
    done = [(method, name[2:]) for method, name in store.log if "000003" in name and method != "GET"][-4:]
    assert ("DELETE", "checkpoint000003.json") not in done  # the same bits: nothing to replace
    (first.directory / "checkpoint000003.json").unlink()
    writer = CheckpointWriter(first.directory, lambda line: None, None, first.push)
    writer.submit(3, {"model": {"w": th.zeros(2)}})
    writer.close()
    done = [(method, name[2:]) for method, name in store.log if "000003" in name and method != "GET"][-4:]
    assert done == [
        ("DELETE", "checkpoint000003.json"),
        ("PUT", "model000003.pt"),
        ("PUT", "checkpoint000003.json"),
        ("DELETE", "teacher-state-000003.cache"),
    ]


def test_names_that_lead_elsewhere_are_left_alone(store, tmp_path):
    for name in ("..", ".lock", "a b", "log.txt"):
        store.put(f"r/{name}", b"x")
    store.put("r/../above.txt", b"x")
    mirror = Mirror("gs://bucket/r", tmp_path / "here", Retention())
    assert mirror.pull() is None
    assert [path.name for path in mirror.directory.iterdir()] == ["log.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_files_are_fetched_once_for_each_version(store, tmp_path):
    def reads():
        return sum(method == "GET" for method, _ in store.log)

    store.put("a/model.pt", b"first")
    first = fetch("gs://bucket/a/model.pt", tmp_path)
    assert first.read_bytes() == b"first" and first.name == "model.pt"
    before = reads()
    assert fetch("gs://bucket/a/model.pt", tmp_path) == first
    assert reads() == before + 1  # what the store says of it, and no contents
    store.put("a/model.pt", b"other")
    assert fetch("gs://bucket/a/model.pt", tmp_path).read_bytes() == b"other"
    assert first.read_bytes() == b"first"


def test_a_file_that_arrives_short_is_not_kept(store, tmp_path, monkeypatch):
    store.put("a/model.pt", b"whole")
    file = Folder("gs://bucket/a").file("model.pt")
    store.objects["a/model.pt"] = b"who"
    with pytest.raises(RemoteError, match=r"gs://bucket/a/model.pt: arrived damaged"):
        Folder("gs://bucket/a").download("model.pt", file, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_are_named(store, tmp_path):
    save(Mirror("gs://bucket/r", tmp_path / "run", Retention()), [1, 2])
    cache = tmp_path / "cache"
    assert fetch_checkpoint("gs://bucket/r/model000001.pt", cache).step == 1
    assert fetch_checkpoint("gs://bucket/r/", cache).step == 2
    store.put("r/model000002.pt", bytes(len(store.objects["r/model000002.pt"])))
    cache = tmp_path / "another"
    assert fetch_checkpoint("gs://bucket/r", cache).step == 1
    with pytest.raises(UserError, match=r"model000002.pt is damaged"):
        fetch_checkpoint("gs://bucket/r/model000002.pt", cache)
    with pytest.raises(UserError, match=r"no such checkpoint: gs://bucket/r/model000009.pt"):
        fetch_checkpoint("gs://bucket/r/model000009.pt", cache)
    with pytest.raises(UserError, match=r"gs://bucket/none: holds no complete checkpoint"):
        fetch_checkpoint("gs://bucket/none", cache)
    for name in ("model000300.pt", "opt000300.pt", "ema_0.9999_000300.pt", "model001300.pt"):
        store.put(f"adm/{name}", b"as guided-diffusion writes it")
    found = fetch_checkpoint("gs://bucket/adm/model000300.pt", cache)
    assert isinstance(found, Checkpoint) and found.step == 300
    assert set(found.files) == {"model000300.pt", "opt000300.pt", "ema_0.9999_000300.pt"}


def test_a_store_that_never_answers_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(blobfile._gcp, "GCP_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(remote, "_READ_SEC", 0.1)
        remote._store.cache_clear()
        with pytest.raises(RemoteError, match=r"gs://bucket/r: request failed .* timed out"):
            Folder("gs://bucket/r").files()


def test_continuing_and_sampling_from_urls(store, project, tmp_path):
    folder, command = project
    straight = folder / "straight"
    shutil.rmtree(folder / "experiments", ignore_errors=True)
    fill(store, "old", straight)
    store.put("teacher.pt", (folder / "yaml/teacher.pt").read_bytes())
    flags = ["teacher.model_path=gs://bucket/teacher.pt", "run.iterations=6", "--exp_dir", tmp_path / "new"]
    code, text = run(folder, *command, *flags, "--resume_checkpoint", "gs://bucket/old/model000005.pt")
    assert code == 0 and "resumed from step 5" in text, text
    assert (tmp_path / "new/checkpoint000006.json").is_file()
    sample = [
        "scripts/image_sample.py",
        "--config",
        command[2],
        "--timestep_respacing",
        2,
        "--num_samples",
        2,
    ]
    sample += ["--model_path", "gs://bucket/old/ema_0.9_000005.pt", "--log_dir", "gs://bucket/drawn"]
    for _ in range(2):  # the second time on another machine, which draws nothing
        shutil.rmtree(folder / "experiments", ignore_errors=True)
        code, text = run(folder, *sample)
        assert code == 0, text
    assert text.endswith("samples_2x16x16x3.npz is already drawn\n") and text.count("\n") == 1, text
    assert store.names("drawn/") == {"samples_2x16x16x3.npz", "sampling.json", "samples.png"}
    code, text = run(folder, *sample, "--use_ddim", "True")
    assert code == 1 and "holds samples drawn with another sampler" in text


@pytest.mark.slow
def test_a_branch_goes_on_from_its_own_newest_on_another_machine(store, project):
    """The same command twice: a run that began from another's checkpoint does not begin there again."""
    folder, command = project
    branch = [*command, "--exp_dir", "gs://bucket/runs/branch", "run.iterations=5"]
    branch += ["--resume_checkpoint", folder / "straight/model000002.pt"]
    for start, tamper in ((2, die_in_upload("opt000005.pt")), (4, None)):
        shutil.rmtree(folder / "experiments", ignore_errors=True)
        code, text = run(folder, *branch, tamper=tamper)
        assert f"resumed from step {start}" in text and (code == 0) is (tamper is None), text
    local = folder / "experiments/remote" / local_name("gs://bucket/runs/branch")
    assert_same_end(folder / "straight", local, 5)
    shutil.rmtree(folder / "experiments")
    code, text = run(folder, *branch[:-1], folder / "straight/model000004.pt")
    assert code == 1 and "gs://bucket/runs/branch: holds later checkpoints, up to step 5" in text


def no_blobfile():
    sys.modules["blobfile"] = None


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--exp_dir", "gs://elsewhere/run"], "No such file or bucket: 'gs://elsewhere/run/.writable'"),
        (["--exp_dir", "s3://bucket/run"], "s3://bucket/run: not understood; known are gs://BUCKET/PATH, "),
        (["--exp_dir", "https://example.org/run"], "https://example.org/run: not understood; known are "),
        (["--exp_dir", "az://account"], "az://account: not understood; known are "),
        (["--exp_dir", "gs:/bucket/run"], "gs:/bucket/run: not understood; known are "),
        (["--resume_checkpoint", "gs://bucket/none"], "gs://bucket/none: holds no complete checkpoint"),
        (["--resume_checkpoint", "gs://bucket/model000001.pt"], "no such checkpoint: gs://bucket/model000001.pt"),
        (["teacher.model_path=gs://bucket/t.pt"], "gs://bucket/t.pt: no such file"),
        (["student.model_path=gs://elsewhere/t.pt"], "gs://elsewhere/t.pt: no such file"),
        (["teacher.tempfile=gs://bucket/pool"], "gs://bucket/pool: a URL cannot be used here, only "),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(project, flags, line):
    folder, command = project
    code, text = run(folder, *command, *flags)
    assert code == 1 and text.startswith(f"error: {line}") and text.count("\n") == 1, text
    assert not Path("gs:").exists() and not list(folder.glob("**/gs:"))


def test_without_blobfile(project, tmp_path):
    """It is needed for URLs alone."""
    folder, command = project
    code, text = run(folder, *command, "--exp_dir", "gs://bucket/run", tamper=no_blobfile)
    assert code == 1 and text == "error: URLs need the package blobfile: pip install blobfile\n"
    code, text = run(folder, *command, "--exp_dir", tmp_path / "run", "run.iterations=1", tamper=no_blobfile)
    assert code == 0, text
    assert run(folder, command[0], "--help", tamper=no_blobfile)[0] == 0


def test_azure(store, tmp_path):
    """The same through the other store's own ways of listing, reading and writing."""
    url = "https://account.blob.core.windows.net/bucket/runs/one/"
    first = Mirror(url, tmp_path / "first", Retention(keep_last=1))
    assert first.url == "az://account/bucket/runs/one"
    assert first.pull() is None
    save(first, [1, 2])
    assert_copied(store, first.directory)
    second = Mirror("az://account/bucket/runs/one", tmp_path / "second", Retention(keep_last=1))
    assert second.pull().step == 2
    save(second, [3])
    assert_copied(store, second.directory)
    model = fetch(url + "model000003.pt", tmp_path / "cache")
    assert model.read_bytes() == (second.directory / "model000003.pt").read_bytes()
    with pytest.raises(RemoteError, match="az://account/elsewhere"):
        Mirror("az://account/elsewhere/run", tmp_path / "third").pull()
    store.fail = lambda method, name: True
    with pytest.raises(RemoteError, match=r"az://account/bucket/runs/one.*: unexpected status 503"):
        second.push()


def test_the_best_is_kept_there_and_comes_along(store, tmp_path):
    """A machine that goes on for another has the best checkpoint too, and best.json is sent after it."""
    keep, url = Retention(keep_last=1), "gs://bucket/r"

    def save_scored(mirror, values):
        writer = CheckpointWriter(mirror.directory, print, mirror.retention, mirror.push)
        for step, value in values.items():
            writer.submit(step, {"model": {"w": th.full((1,), float(step))}})
            writer.add_score(step, {"metric": "FD", "value": value, "weights": "model", "of": {}})
        writer.close()

    def steps_there():
        return {name for name in store.names("r/") if name.startswith("model")}

    first = Mirror(url, tmp_path / "first", keep)
    save_scored(first, {1: 3.0, 2: 1.0, 3: 2.0})
    assert steps_there() == {"model000002.pt", "model000003.pt"}
    written = [name for method, name in store.log if method == "PUT" and name.startswith("r/")]
    last = max(place for place, name in enumerate(written) if name == "r/best.json")
    assert "r/checkpoint000002.json" in written[:last]
    second = Mirror(url, tmp_path / "second", keep)
    assert second.pull().step == 3
    assert [c.step for c in complete_checkpoints(second.directory)] == [2, 3]
    save_scored(second, {4: 5.0})
    assert steps_there() == {"model000002.pt", "model000004.pt"}
    assert (second.directory / "best.json").read_bytes() == store.objects["r/best.json"]
    save_scored(second, {5: 0.5})
    assert steps_there() == {"model000005.pt"}
    third = Mirror(url, tmp_path / "third", keep)
    store.put("r/best.json", b'{"step": 9, "scored": "../x"}')
    assert third.pull().step == 5  # what cannot be understood is passed over
