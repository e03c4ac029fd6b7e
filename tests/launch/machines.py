"""Two machines on one: each with its own network, processes, host name, /run and /etc/hosts, and
the same files.

They are namespaces of a shell that lives as long as a pipe from the test is open. When the test
ends, in whatever way, the kernel ends everything that runs in them, and nothing of them is left:
they have no names outside.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.ranks import ROOT

NAMES = ("node1", "node2")
ADDRESSES = ("10.213.0.1", "10.213.0.2")
# Daemons are in sbin; launchers call python and deepspeed by name.
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
    "PYTHONPATH": str(ROOT),
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}
BOOT = """set -e
mount --bind "$1" /etc/hosts
mount -t tmpfs tmpfs /run
hostname "$2"
ip link set lo up
echo up
cat
"""


@cache
def lacking(*commands: str) -> str | None:
    """Why tests with two machines and these commands cannot run here, if they cannot."""
    for name in ("unshare", "nsenter", "ip", *commands):
        if shutil.which(name, path=ENVIRONMENT["PATH"]) is None:
            return f"{name} is not installed (tests/launch/packages.sh)"
    probe = "ip link add name a type veth peer name b && mount -t tmpfs tmpfs /run && hostname a"
    command = [
        "unshare",
        "--net",
        "--mount",
        "--uts",
        "--pid",
        "--fork",
        "--mount-proc",
        "sh",
        "-c",
        probe,
    ]
    tried = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    def __init__(self, name: str, hosts: Path) -> None:
        self.name = name
        namespaces = [
            "--net",
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        self._shell = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", BOOT, "sh", str(hosts), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
        )
        assert self._shell.stdout is not None
        assert self._shell.stdout.readline() == b"up\n", f"{name} did not start"
        self.pid = self._shell.pid

    def popen(
        self, command: Sequence[str], log: Path | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Starts a command; its output goes to `log`, or can be read."""
        of = f"/proc/{self.pid}/ns"
        inside = [
            f"--net={of}/net",
            f"--mount={of}/mnt",
            f"--uts={of}/uts",
            f"--pid={of}/pid_for_children",
        ]
        with (log or Path(os.devnull)).open("a") as file:
            return subprocess.Popen(
                ["nsenter", *inside, f"--wdns={ROOT}", *command],
                stdin=subprocess.DEVNULL,
                stdout=file if log else subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=ENVIRONMENT | environment,
            )

    def run(self, command: Sequence[str], **environment: str) -> str:
        """Runs a command to its end and returns its output. Raises AssertionError with it if the
        command fails."""
        process = self.popen(command, None, **environment)
        output, _ = process.communicate()
        assert process.returncode == 0, f"{' '.join(command)} on {self.name}:\n{output}"
        return output

    def close(self) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        self._shell.wait()


@contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """node1 and node2, joined by a cable."""
    hosts = folder / "hosts"
    lines = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    hosts.write_text("127.0.0.1 localhost\n" + "".join(lines), encoding="utf-8")
    machines: list[Machine] = []
    try:
        machines.extend(Machine(name, hosts) for name in NAMES)
        first, second = machines
        ends = [["name", "eth0", "netns", str(machine.pid)] for machine in machines]
        subprocess.run(
            ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]],
            env=ENVIRONMENT,
            check=True,
        )
        for machine, address in zip(machines, ADDRESSES, strict=True):
            machine.run(["ip", "address", "add", f"{address}/24", "dev", "eth0"])
            machine.run(["ip", "link", "set", "eth0", "up"])
        yield first, second
    finally:
        for machine in machines:
            machine.close()


def wait_until(done: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Raises AssertionError with `what()` when nothing comes of it in so many seconds."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain:\n{what()}"
        time.sleep(0.02)
