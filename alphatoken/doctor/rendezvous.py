"""Before there is a process group: whether all ranks find each other, told in words and within a
limit of time.

Rank 0 hosts a store on the port where `init_distributed` will host its own, so that a taken port
shows here (the two share one server, as torch lets them within a process). Under torchrun the agent
hosts it, and every rank is a client. Ranks announce themselves in it; rank 0 answers all of them
whether to go on.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]

from alphatoken.doctor.findings import Finding, named
from alphatoken.errors import UserError
from alphatoken.util.wording import plural

CHECK = "rendezvous"
WANTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PREFIX = "alphatoken-doctor"


@dataclass(frozen=True)
class Arrival:
    """What a rank says of itself when it comes."""

    node: str
    local_rank: int
    accelerator: str
    devices: int


@dataclass(frozen=True)
class Meeting:
    """How it went: a failure, or none, and the store, which has to be kept until the process group
    is formed."""

    failure: Finding | None
    store: Store | None

    def dismiss(self, *, is_host: bool, patience: float) -> None:
        """Lets the other ranks end once rank 0 has reported; called by all ranks after a
        failure."""
        if self.store is not None:
            with suppress(DistError):
                if is_host:
                    self.store.set(f"{PREFIX}/reported", "")
                    time.sleep(1)  # for the others to read it
                else:
                    self.store.wait([f"{PREFIX}/reported"], timedelta(seconds=patience))


def meet(arrival: Arrival, environment: Mapping[str, str], patience: float) -> Meeting:
    """Waits at most about `patience` seconds for the other ranks (a rank that is told nothing twice
    as long).

    Without a launcher (no RANK) there is nobody to wait for. Nothing is raised: what is wrong
    becomes the failure.
    """
    if "RANK" not in environment:
        return Meeting(None, None)
    missing = [name for name in WANTED if not environment.get(name)]
    if missing:
        found = f"RANK is set, but {', '.join(missing)} not"
        return Meeting(
            _failure(arrival.node, found, "set what the launcher left out, or start without RANK"),
            None,
        )
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    by_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        if rank == 0 and not by_agent:
            store = _host_store(host, port, ranks, patience)
        else:
            store = _join_store(
                host, port, ranks, patience, "the launcher's agent" if by_agent else "rank 0"
            )
    except UserError as error:
        fix = "choose another port (--master_port, MASTER_PORT), or end what holds it"
        return Meeting(_failure(arrival.node, str(error), fix), None)
    store.set(f"{PREFIX}/{rank}", json.dumps(asdict(arrival)))
    if rank == 0:
        failure = _roll_call(store, ranks, arrival.node, patience)
        store.set(f"{PREFIX}/verdict", json.dumps(None if failure is None else failure.as_dict()))
        return Meeting(failure, store)
    try:
        store.wait([f"{PREFIX}/verdict"], timedelta(seconds=2 * patience))
    except DistError:
        found = f"{host}:{port} answers, but rank 0 of this run is not behind it"
        fix = "is another run using the port? choose another one (--master_port, MASTER_PORT)"
        return Meeting(_failure(arrival.node, found, fix), None)
    told = json.loads(store.get(f"{PREFIX}/verdict"))
    return Meeting(None if told is None else Finding(**told), store)


@contextmanager
def deadline(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Calls `give_up`, which has to end the process, when what is inside takes longer."""
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _host_store(host: str, port: int, ranks: int, patience: float) -> Store:
    try:
        return _store(host, port, ranks, patience, is_master=True)
    except DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} is taken by another process, so rank 0 cannot listen on it"
            ) from None
        raise UserError(
            f"rank 0 cannot listen at MASTER_ADDR={host}, port {port}: {_first_line(error)}"
        ) from None


def _join_store(host: str, port: int, ranks: int, patience: float, hosted_by: str) -> Store:
    """Tries plain connections first: torch's own attempts fill the screen with traces of its
    insides."""
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"{hosted_by} does not answer at {host}:{port} for {patience:g} s: {error}"
                ) from None
            time.sleep(0.2)
    # What accepts connections but is no store keeps torch waiting without limit, hence the
    # thread.
    joined: list[Store] = []

    def join() -> None:
        with suppress(DistError):
            joined.append(_store(host, port, ranks, patience, is_master=False))

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(max(5.0, until - time.monotonic()))
    if not joined:
        raise UserError(
            f"what listens at {host}:{port} is not {hosted_by} of a run: the port is taken"
        )
    return joined[0]


def _store(host: str, port: int, ranks: int, patience: float, *, is_master: bool) -> Store:
    limit = timedelta(seconds=patience)
    return TCPStore(
        host, port, ranks, is_master, limit, wait_for_workers=False, multi_tenant=is_master
    )


def _roll_call(store: Store, ranks: int, own_node: str, patience: float) -> Finding | None:
    """Rank 0's answer to all: who is missing, or has no device of its own."""
    until = time.monotonic() + patience
    waiting = set(range(ranks))
    while waiting and time.monotonic() < until:
        waiting = {rank for rank in waiting if not store.check([f"{PREFIX}/{rank}"])}
        time.sleep(0.05 if waiting else 0)
    if waiting:
        missing = ", ".join(map(str, sorted(waiting)))
        found = (
            f"{plural(len(waiting), 'rank')} of {ranks} did not come within {patience:g} s: "
            f"{missing}"
        )
        fix = "look at the output of their nodes; do they reach MASTER_ADDR and MASTER_PORT?"
        return _failure(own_node, found, fix)
    arrivals = [Arrival(**json.loads(store.get(f"{PREFIX}/{rank}"))) for rank in range(ranks)]
    nodes = [arrival.node for arrival in arrivals]
    lost = [
        rank
        for rank, arrival in enumerate(arrivals)
        if arrival.accelerator != "cpu" and arrival.local_rank >= arrival.devices
    ]
    if not lost:
        return None
    first = arrivals[lost[0]]
    found = (
        f"{named(lost, nodes)}: LOCAL_RANK={first.local_rank}, but "
        f"{plural(first.devices, 'device')} visible"
    )
    fix = "start as many ranks per node as it has devices, and let every rank see all of them"
    return Finding(
        "accelerator", "failed", found, fix, tuple(sorted({nodes[rank] for rank in lost}))
    )


def _failure(node: str, found: str, fix: str) -> Finding:
    return Finding(CHECK, "failed", f"{node}: {found}", fix, (node,))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
