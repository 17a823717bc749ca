"""How ranks find each other and leave: a store that all reach, and the interface that leads to the others."""

import datetime
import fcntl
import json
import os
import re
import socket
import struct
import sys
import time
from typing import Any, NoReturn

import torch.distributed as dist

from ..errors import UserError, first_line
from .launch import Launch, OtherRanks, detect_launch, register_other_ranks

TIMEOUT = datetime.timedelta(minutes=30)  # of every wait for another rank
_PATIENCE = 10.0  # seconds for other ranks to find the mistake that this one found
_MOMENT = datetime.timedelta(seconds=1)  # for rank 0 to find it
_PAUSE = 0.1  # seconds between two questions of who has left
_SIOCGIFADDR = 0x8915  # Linux' request for an interface's address (netdevice(7))

_store: dist.Store | None = None  # of the ranks that have met


def meet(launch: Launch) -> tuple[dist.Store, int]:
    """`rendezvous`; from here on this rank does not end without the others. Collective."""
    global _store
    register_other_ranks(OtherRanks(leave_together, abort, rank_zero_tells))
    _store, local_rank = rendezvous(launch)
    return _store, local_rank


def introduce(store: dist.Store, launch: Launch, about: Any) -> list[Any]:
    """What each rank says about itself, in rank order; where one says that it fails, all end. Collective."""
    ranks = exchange(store, launch, "rank", about)
    if None in ranks:
        leave_together(1)
        sys.exit(1)
    return ranks


def meet_to_fail() -> None:
    """Meet ranks that wait for this one, and say that it fails. Collective.

    Raises:
        UserError: as `rendezvous`.
    """
    launch = detect_launch()
    store, _ = meet(launch)
    exchange(store, launch, "rank", None)


def rank_zero_tells(mistake: str) -> bool:
    """Whether rank 0 ends with the same mistake, which it does at about this time or never."""
    if _store is None:
        return False
    if detect_launch().rank == 0:
        _store.set("mistake", mistake)
        return False
    try:
        _store.wait(["mistake"], _MOMENT)
        return _store.get("mistake").decode() == mistake
    except RuntimeError:  # it did not, or has left
        return False


def leave_together(status: int) -> None:
    """Wait a while for all ranks to get here; if some do not, they wait for this one: end them all."""
    if _store is None:
        abort(status)
    try:
        _store.add("left", 1)
        deadline = time.monotonic() + _PATIENCE
        while _store.add("left", 0) < detect_launch().world_size:
            if time.monotonic() > deadline:
                abort(status)
            time.sleep(_PAUSE)
        if detect_launch().rank == 0:
            time.sleep(3 * _PAUSE)  # the others are about to ask the store, which ends with this rank
    except RuntimeError:
        pass  # rank 0 has seen all ranks get here and left


def abort(status: int) -> NoReturn:
    """End this process and with it all ranks, whatever they are doing."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if _store is not None and mpi is not None:  # without a store MPI may still be starting
        time.sleep(0.5)  # mpiexec drops what it has not yet passed on of our last words
        mpi.COMM_WORLD.Abort(status)
    os._exit(status)  # torchrun, and srun --kill-on-bad-exit, then end the others


def rendezvous(launch: Launch) -> tuple[dist.Store, int]:
    """A store all ranks reach, and this rank's number among those on its host. Collective.

    Raises:
        UserError: mpi4py is missing or belongs to another MPI, rank 0's host cannot be reached from all
            hosts (by its name, or by MASTER_ADDR), or a launcher's variable is not set.
    """
    if launch.is_mpi:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UserError(f"started by {launch.launcher}, but mpi4py cannot be imported: {error}") from None
        world = MPI.COMM_WORLD
        if world.size != launch.world_size:
            raise UserError(
                f"mpi4py sees {world.size} of {launch.world_size} ranks: it was built for another "
                "MPI than this mpiexec's (use the mpiexec beside this python)"
            )
        hosts = world.allgather(socket.gethostname())
        local_rank = hosts[: launch.rank].count(hosts[launch.rank])
        store = None
        if launch.rank == 0:  # port 0 lets the system choose a free one, so nothing can race for it
            store = dist.TCPStore("127.0.0.1", 0, launch.world_size, True, TIMEOUT, False)
        address = "127.0.0.1" if len(set(hosts)) == 1 else os.environ.get("MASTER_ADDR", hosts[0])
        address, port = world.bcast((address, store.port if store else 0))
        if not all(world.allgather(_reaches(address, port))):
            raise UserError(f"{address}, rank 0's host, cannot be reached from all hosts: set MASTER_ADDR")
        store = store or dist.TCPStore(address, port, launch.world_size, False, TIMEOUT)
        _choose_interface(store, launch, address)
        return store, local_rank

    if launch.launcher == "slurm" and "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host(os.environ.get("SLURM_STEP_NODELIST", ""))
        # One port per job step: free with great likelihood, and the same on every rank.
        job, number = (os.environ.get(f"SLURM_{name}_ID", "") for name in ("JOB", "STEP"))
        if not (job.isdigit() and number.isdigit()):
            raise UserError("started by slurm, but SLURM_JOB_ID or SLURM_STEP_ID is not set")
        step = int(job) * 31 + int(number)
        os.environ.setdefault("MASTER_PORT", str(20000 + step % 20000))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or launch.local_rank is None:
        raise UserError(
            f"started by {launch.launcher}, but {', '.join(missing) or 'the local rank'} is not set"
        )
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    serves = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        server = dist.TCPStore(address, int(port), launch.world_size, serves, TIMEOUT, False)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"ranks cannot meet at {address}:{port}: set MASTER_ADDR to a host that all reach, and "
            f"MASTER_PORT to a free one there ({first_line(error)})"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store may outlive an attempt
    shared = dist.PrefixStore(f"tccd{attempt}", server)
    _choose_interface(shared, launch, address)
    return shared, launch.local_rank


def _choose_interface(store: dist.Store, launch: Launch, master: str) -> None:
    """On several hosts, have gloo use the interface that leads to the others.

    Left alone it takes the address that the host's own name resolves to, which may be none, or (on
    Debian) loopback. `master` is rank 0's address, as each host knows it.
    """
    host, address = socket.gethostname(), _address_towards(master)
    ranks = exchange(store, launch, "host", (host, address))
    elsewhere = [its for other, its in ranks if other != host]
    if not elsewhere or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if address is None or address.startswith("127."):  # on rank 0's host, whose name leads to itself
        address = next((own for its in elsewhere if its and (own := _address_towards(its))), None)
    for name, its in _interfaces().items():
        if its == address:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def exchange(store: dist.Store, launch: Launch, name: str, value: Any) -> list[Any]:
    """Every rank's value, in rank order, through the store alone."""
    store.set(f"{name}{launch.rank}", json.dumps(value))
    return [json.loads(store.get(f"{name}{rank}")) for rank in range(launch.world_size)]


def _interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one; of none where they cannot be asked for."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return addresses


def _address_towards(host: str) -> str | None:
    """This host's address on the way to another; None if there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # on a datagram socket this sends nothing
            return probe.getsockname()[0]
        except OSError:
            return None


def _reaches(address: str, port: int) -> bool:
    """Whether something answers there."""
    try:
        socket.create_connection((address, port), timeout=5).close()
        return True
    except OSError:
        return False


def _first_slurm_host(nodelist: str) -> str:
    """First host of a SLURM list such as "gpu[03-05,09]-ib,cpu1"."""
    entry = re.match(r"(\[[^\]]*\]|[^,\[])*", nodelist)
    assert entry is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", entry[0])
