"""Started by mpiexec, torchrun, srun or nobody, on one host or two: the same optimization."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch as th
from in_process import script_here
from tiny import ROOT, distillation, script

from guided_diffusion import dist_util
from guided_diffusion.errors import UserError
from guided_diffusion.processes import launch, rendezvous
from guided_diffusion.processes.launch import Launch, detect_launch

STARTED_BY = [name for names in launch._VARIABLES.values() for name in names] + [
    *("SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"),
]
KD = ["scripts/image_kd.py", "run.iterations=1", "student.microbatch=3"]
DKDM = ["distill.stage1_weight=0", "distill.stage2_weight=0"]
STAGE2 = ["distill.stage1_weight=0", "distill.role_vector=true"]
GATHERED = ["distill.gather_negatives=true", "distill.stage2_align=true", "student.microbatch=-1"]

# --- several ranks make the step that one makes ----------------------------------------------------


@pytest.fixture(scope="module")
def witness(tmp_path_factory):
    """A folder for PYTHONPATH: every python notes, as the last that it does, whether it has imported mpi4py,
    and whether gloo's threads run still.
    """
    folder = tmp_path_factory.mktemp("witness")
    (folder / "sitecustomize.py").write_text(
        "import atexit, os, pathlib, sys\n"
        "def note():\n"
        "    threads = [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    left = ' with gloo' if any('gloo' in name for name in threads) else ''\n"
        "    with open(os.environ['WITNESS'], 'a') as file:\n"
        "        file.write(f\"{os.path.basename(sys.argv[0])} {'mpi4py' in sys.modules}{left}\\n\")\n"
        "atexit.register(note)\n"
    )
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, witness):
    """A pool that every iteration uses whole, so that all ranks together train on the same batch."""
    folder = tmp_path_factory.mktemp("launchers")
    choice = "shuffled_iterative_distillation"
    config = distillation(folder, image_size=8, teacher__iter_choice=choice, student__batch_size=8)
    environment = {"PYTHONPATH": f"{witness}{os.pathsep}{ROOT}", "WITNESS": str(folder / "plain.txt")}
    script("scripts/dynamic_prepare.py", "--config", config, **environment)
    assert (folder / "plain.txt").read_text() == "dynamic_prepare.py False\n"
    return config


def environment_of(witness, notes, **more):
    kept = {name: value for name, value in os.environ.items() if name not in STARTED_BY}
    return (
        kept
        | {"PYTHONPATH": f"{witness}{os.pathsep}{ROOT}", "WITNESS": str(notes), "OMP_NUM_THREADS": "1"}
        | more
    )


def arguments(config, run, overrides):
    name, *common = KD
    return [name, "--config", config, "--exp_dir", run, *common, *overrides]


def finish(*processes):
    """Wait for processes; all must succeed. Their output together."""
    output = ""
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, f"{out}\n{err}"
            output += out + err
    finally:
        for process in processes:
            process.kill()
    return output


def start(command, environment):
    command = [str(part) for part in command]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_the_step_of_one_rank(config, run, overrides, folder):
    """Gradients, weights and averages after an iteration are those of the same command on one rank."""
    name, *rest = arguments(config, folder / "one-rank", overrides)
    script_here(name, *rest)
    ours, theirs = (
        {
            kind: th.load(path / f"{kind}000001.pt", weights_only=True)
            for kind in ("model", "ema_0.99_", "opt")
        }
        for path in (folder / "one-rank", run)
    )
    gradients, others = (files["opt"]["optimizer"]["state"] for files in (ours, theirs))
    largest = max(float(state["exp_avg"].abs().max()) for state in gradients.values())
    assert gradients.keys() == others.keys()
    for i, state in gradients.items():  # after one step exp_avg is a tenth of the gradient
        th.testing.assert_close(others[i]["exp_avg"], state["exp_avg"], atol=1e-6 * largest, rtol=1e-4)
    for i, (name, weights) in enumerate(ours["model"].items()):
        # Adam's first step is the gradient's sign: it says nothing where the gradient is rounding noise.
        certain = gradients[i]["exp_avg"].abs() > 1e-4 * largest
        for kind in ("model", "ema_0.99_"):
            th.testing.assert_close(
                theirs[kind][name][certain], ours[kind][name][certain], atol=1e-7, rtol=1e-5
            )
        assert weights.shape == theirs["model"][name].shape


def test_torchrun(config, witness, tmp_path):
    """DKDM in microbatches that do not divide the batch."""
    name, *rest = arguments(config, tmp_path / "run", DKDM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    environment = environment_of(witness, tmp_path / "notes.txt")
    output = finish(start([*torchrun, ROOT / name, *rest], environment))
    assert "2 rank(s) (launcher: torchrun), batch 4 per rank, 8 together" in output
    assert_the_step_of_one_rank(config, tmp_path / "run", DKDM, tmp_path)
    notes = (tmp_path / "notes.txt").read_text().splitlines()
    assert notes.count("image_kd.py False") == 2 and not any(note.endswith("True") for note in notes)


def test_srun(config, witness, tmp_path):
    """TCCD with the negatives of all ranks, in both stages."""
    name, *rest = arguments(config, tmp_path / "run", GATHERED)
    processes = []
    for rank in (0, 1):
        step = slurm_step(rank, 2, "localhost", SLURM_LOCALID=str(rank))
        environment = environment_of(witness, tmp_path / "notes.txt", **step)
        processes.append(start([sys.executable, ROOT / name, *rest], environment))
    output = finish(*processes)
    assert "2 rank(s) (launcher: slurm), batch 4 per rank, 8 together" in output
    assert_the_step_of_one_rank(config, tmp_path / "run", GATHERED, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == 2 * "image_kd.py False\n"


def end_of(*processes):
    """How processes end, each of which must fail: their outputs."""
    outputs = []
    try:
        for process in processes:
            outputs.append("".join(process.communicate(timeout=120)))
            assert process.returncode == 1, outputs[-1]
    finally:
        for process in processes:
            process.kill()
    return outputs


def test_ranks_with_different_settings_are_refused(config, witness, tmp_path):
    """As of one mistyped command of several hosts."""
    processes = []
    for rank in (0, 1):
        step = slurm_step(rank, 2, "localhost", SLURM_LOCALID=str(rank))
        name, *rest = arguments(config, tmp_path / "run", [*DKDM, f"student.lr={1 + rank}e-3"])
        environment = environment_of(witness, tmp_path / "notes.txt", **step)
        processes.append(start([sys.executable, ROOT / name, *rest], environment))
    first, second = end_of(*processes)
    told = "student.lr is 0.001 on rank 0 and 0.002 on rank 1: start all ranks with the same"
    assert told in first and "Traceback" not in first + second
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_told(config, witness, tmp_path):
    name, *rest = arguments(config, tmp_path / "run", DKDM)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        step = slurm_step(0, 2, "localhost", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        environment = environment_of(witness, tmp_path / "notes.txt", **step)
        (output,) = end_of(start([sys.executable, ROOT / name, *rest], environment))
    assert f"ranks cannot meet at 127.0.0.1:{port}: set MASTER_ADDR" in output
    assert "Traceback" not in output


def test_mpiexec(config, witness, tmp_path):
    """Stage 2 with a role vector, in microbatches; here mpi4py is imported."""
    notes = {"PYTHONPATH": f"{witness}{os.pathsep}{ROOT}", "WITNESS": str(tmp_path / "notes.txt")}
    output = script(*arguments(config, tmp_path / "run", STAGE2), ranks=2, **notes).stdout
    assert "2 rank(s) (launcher: mpi (MPICH)), batch 4 per rank, 8 together" in output
    assert_the_step_of_one_rank(config, tmp_path / "run", STAGE2, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == 2 * "image_kd.py True\n"


def slurm_step(rank, ranks, hosts, **more):
    """What srun tells each process. The job's number decides the port: one that is free now."""
    for job in range(os.getpid(), os.getpid() + 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + job * 31 % 20000)):
                break
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": 0, "SLURM_STEP_NODELIST": hosts}
    step |= {"SLURM_PROCID": rank, "SLURM_NTASKS": ranks, "SLURM_LOCALID": 0}
    return {name: str(value) for name, value in step.items()} | more


# --- who started this process ----------------------------------------------------------------------


@pytest.fixture
def started_by_nobody(monkeypatch):
    for name in STARTED_BY:
        monkeypatch.setenv(name, "")  # so that what the code sets itself is undone too
        del os.environ[name]


TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI2 = {"PMI_RANK": "3", "PMI_SIZE": "8"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, Launch("none", 0, 1, 0)),
        (TORCHRUN, Launch("torchrun", 3, 8, 1)),
        (SRUN, Launch("slurm", 3, 8, 1)),
        (HYDRA, Launch("mpi (MPICH)", 3, 8, 1)),
        (OPEN_MPI, Launch("mpi (Open MPI)", 3, 8, 1)),
        (PMI2, Launch("mpi (MPICH)", 3, 8, None)),
        (SRUN | TORCHRUN, Launch("torchrun", 3, 8, 1)),  # srun starts torchrun on each host
        (SRUN | HYDRA, Launch("mpi (MPICH)", 3, 8, 1)),  # mpiexec starts its helpers by srun
        (SRUN | PMI2, Launch("slurm", 3, 8, 1)),  # srun --mpi=pmi2
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Launch("none", 0, 1, 0)),  # an sbatch script itself
        ({"RANK": "3"}, Launch("none", 0, 1, 0)),
    ],
)
def test_the_launcher_is_recognized(started_by_nobody, monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert detect_launch() == expected
    assert expected.is_mpi == ("mpi" in expected.launcher)


def test_a_launchers_variable_that_is_no_number(started_by_nobody, monkeypatch):
    for name, value in (TORCHRUN | {"WORLD_SIZE": "many"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"torchrun set .* no number: .*'many'"):
        detect_launch()


@pytest.mark.parametrize(
    "nodelist, first",
    [
        ("localhost", "localhost"),
        ("a,b", "a"),
        ("gpu[03-05,09],cpu1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("login,gpu[03-05]", "login"),
        ("gpu[03-05]-ib,x", "gpu03-ib"),
        ("rack[1-2]n[01-04,09]", "rack1n01"),
        ("node-1-2,node-1-3", "node-1-2"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_slurm_list(nodelist, first):
    assert rendezvous._first_slurm_host(nodelist) == first


def test_mpi_without_mpi4py_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it fails
    with pytest.raises(UserError, match=r"started by mpi \(MPICH\), but mpi4py cannot be imported"):
        rendezvous.rendezvous(Launch("mpi (MPICH)", 0, 2, 0))


# --- addresses and devices -------------------------------------------------------------------------


class Store(dict):
    def set(self, name, value):
        self[name] = value

    get = dict.__getitem__


@pytest.fixture
def routes(monkeypatch):
    """This host has lo, eth0 and ib0, which leads to the others."""
    interfaces = {"lo": "127.0.0.1", "eth0": "192.168.1.5", "ib0": "10.0.0.5"}
    routes = {"10.0.0.6": "10.0.0.5", "here": "127.0.1.1"}
    monkeypatch.setattr(rendezvous, "_interfaces", lambda: interfaces)
    monkeypatch.setattr(rendezvous, "_address_towards", routes.get)
    monkeypatch.setattr(socket, "gethostname", lambda: "this")
    return routes


@pytest.mark.parametrize(
    "other, master, before, after",
    [
        (["this", "127.0.0.1"], "here", None, None),  # one host: left as it is
        (["that", "10.0.0.6"], "10.0.0.6", None, "ib0"),  # the way to rank 0
        (["that", "10.0.0.6"], "here", None, "ib0"),  # rank 0 itself, whose name leads to loopback
        (["that", "10.0.0.6"], "10.0.0.6", "eth7", "eth7"),  # the user's choice
        (["that", None], "unknown", None, None),
    ],
)
def test_gloo_takes_the_interface_that_leads_to_the_others(
    started_by_nobody, monkeypatch, routes, other, master, before, after
):
    if before:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", before)
    store = Store(host1=json.dumps(other))
    rendezvous._choose_interface(store, Launch("slurm", 0, 2, 0), master)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == after
    assert json.loads(store["host0"]) == ["this", routes.get(master)]


def test_this_hosts_own_interfaces():
    addresses = rendezvous._interfaces()
    assert addresses.get("lo", "127.0.0.1") == "127.0.0.1"
    assert rendezvous._address_towards("127.0.0.1") == "127.0.0.1"
    assert rendezvous._address_towards("no such host") is None


@pytest.mark.parametrize(
    "seen, others, backend",
    [
        (["GPU-a", "GPU-b"], "GPU-a", "nccl"),
        (["GPU-b"], "GPU-a", "nccl"),  # as SLURM's --gpus-per-task shows them
        (["GPU-a"], "GPU-a", "gloo"),
        (["GPU-a"], None, "gloo"),
        ([], None, "gloo"),
    ],
)
def test_each_rank_has_its_own_gpu_or_all_meet_without_nccl(
    started_by_nobody, monkeypatch, seen, others, backend
):
    """Two ranks on a host, seen from the second: nccl refuses ranks that share a GPU."""
    chosen, gpus = {}, len(seen)
    cuda = types.SimpleNamespace(
        is_available=lambda: gpus > 0,
        device_count=lambda: gpus,
        set_device=lambda device: None,
        get_device_properties=lambda device: types.SimpleNamespace(uuid=seen[device.index]),
    )
    monkeypatch.setattr(dist_util.th, "cuda", cuda)
    monkeypatch.setattr(dist_util, "_state", copy.copy(dist_util._state))
    monkeypatch.setattr(dist_util, "detect_launch", lambda: Launch("torchrun", 1, 2, 1))
    first = json.dumps([socket.gethostname(), others])
    monkeypatch.setattr(dist_util, "meet", lambda launch: (Store(rank0=first), 1))
    monkeypatch.setattr(dist_util.dist, "init_process_group", lambda name, **_: chosen.update(name=name))
    monkeypatch.setattr(dist_util.atexit, "register", lambda function: None)
    dist_util.setup_dist()
    assert chosen["name"] == backend
    expected = th.device("cuda", 1 % gpus) if gpus else th.device("cpu")
    assert dist_util.dev() == expected


# --- two hosts -------------------------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path):
    """`north` and `south`: network namespaces joined by a cable, each with a name and /etc/hosts of its own.

    As a private network often is: there is no way out, and (as Debian has it) a host's own name leads to
    loopback. Gives a command that runs another on a host, called as ssh is.
    """
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    if missing := [tool for tool in ("ip", "unshare", "mount", "hostname") if not shutil.which(tool)]:
        pytest.skip(f"needs {', '.join(missing)} (packages iproute2, util-linux, mount, hostname)")
    names, addresses = ("north", "south"), ("10.77.3.1", "10.77.3.2")
    spaces = {name: f"tccd-{os.getpid()}-{name}" for name in names}
    cables = [f"tccd{os.getpid() % 10**6}{end}" for end in "ns"]

    def ip(*arguments):
        return subprocess.run(["ip", *arguments], capture_output=True, text=True)

    try:
        for name in names:
            if (made := ip("netns", "add", spaces[name])).returncode:
                pytest.skip(f"no network namespace can be made here: {made.stderr.strip()}")
        ends = [
            part for name, cable in zip(names, cables, strict=True) for part in (cable, "netns", spaces[name])
        ]
        made = ip("link", "add", *ends[:3], "type", "veth", "peer", "name", *ends[3:])
        if made.returncode:
            pytest.skip(f"no veth pair can be made here: {made.stderr.strip()}")
        for name, cable, address in zip(names, cables, addresses, strict=True):
            for command in (["addr", "add", f"{address}/24", "dev", cable], ["link", "set", cable, "up"]):
                assert ip("-n", spaces[name], *command).returncode == 0
            assert ip("-n", spaces[name], "link", "set", "lo", "up").returncode == 0
            known = zip(names, addresses, strict=True)
            lines = [f"{'127.0.1.1' if other == name else its} {other}" for other, its in known]
            (tmp_path / f"hosts-{name}").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        yield host_command(tmp_path, spaces)
    finally:
        for space in spaces.values():
            ip("netns", "del", space)  # and the cable with it


def host_command(folder, spaces):
    path = folder / "on-host"
    cases = "\n".join(f"  {name}) space={space} ;;" for name, space in spaces.items())
    path.write_text(
        "#!/bin/sh\n"
        'while [ "${1#-}" != "$1" ]; do shift; done\n'  # mpiexec passes options of ssh
        "host=$1; shift\n"
        f"case $host in\n{cases}\nesac\n"
        f'inside="hostname $host && mount --bind {folder}/hosts-$host /etc/hosts && exec $*"\n'
        'exec ip netns exec "$space" unshare --uts --mount sh -c "$inside"\n'
    )
    path.chmod(0o755)
    return path


def by_mpiexec(hosts, command):
    mpiexec = Path(sys.executable).parent / "mpiexec"
    there = ["-launcher", "ssh", "-launcher-exec", hosts, "-localhost", "10.77.3.1"]
    return [[hosts, "north", mpiexec, *there, "-hosts", "north,south", "-n", 2, "-ppn", 1, *command]]


def by_torchrun(hosts, command):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
    torchrun += ["--master-addr", "north", "--master-port", 29511]
    return [
        [hosts, name, *torchrun, "--node-rank", rank, *command[1:]]
        for rank, name in enumerate(("north", "south"))
    ]


def by_srun(hosts, command):
    commands = []
    for rank, name in enumerate(("north", "south")):
        variables = [f"{key}={value}" for key, value in slurm_step(rank, 2, "north,south").items()]
        commands.append([hosts, name, "env", *variables, *command])
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_mpiexec, by_torchrun, by_srun])
def test_two_hosts(hosts, launcher, config, witness, tmp_path):
    """Rank 0's address and gloo's interface are such that the other host reaches them."""
    name, *rest = arguments(config, tmp_path / "run", DKDM)
    environment = environment_of(witness, tmp_path / "notes.txt")
    commands = launcher(hosts, [sys.executable, ROOT / name, *rest])
    output = finish(*[start(command, environment) for command in commands])
    assert "rank 0: host north, cpu" in output and "rank 1: host south, cpu" in output
    assert_the_step_of_one_rank(config, tmp_path / "run", DKDM, tmp_path)
    imported = "image_kd.py True" in (tmp_path / "notes.txt").read_text()
    assert imported == (launcher is by_mpiexec)
