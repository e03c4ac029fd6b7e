"""Running programs that nobody has read, contained by Linux namespaces and limits.

A program gets a process tree, a network, a file system and a user of its own, by `unshare` of
util-linux, which needs no privileges where the kernel lets users make namespaces:

- It sees `/usr` and Python's own folder, read-only, and an empty `/tmp` in memory. Nothing else of
  the machine is there to be read or written.
- Its network has no interface but a loopback that is down.
- Its processes end when the first of them does, which is not the program's own, or is killed at the
  time limit: a program can neither outlive its time nor hide from it.
- Memory of a process, size of a file, number of processes and processor time are limited, and it
  has no capability and can gain none.

Not contained: faults of the kernel itself; the memory of all its processes together is limited by
their number times the limit of each; and it takes up to one core per process until its time is
over. `check_sandbox` runs a program that tries all of this before any other runs.
"""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import secrets
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alphatoken.errors import UserError

TOOLS = ("unshare", "setpriv", "prlimit", "mount", "umount", "pivot_root", "sh")
PROCESSES = 16
"""Processes and threads of a program at once, the sandbox's own two included."""
FILE_BYTES = 2**24
TEMPORARY_MIB = 64
"""Size of its `/tmp`."""
NOBODY = 65534
"""Who runs programs where we are root: limits on processes do not hold for root."""
START_SECONDS = 30.0
"""What a loaded machine may take to start a program, besides its time."""
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
"""What a program sees of the machine, besides Python's own folder."""
ROOTS = ("/tmp", "/mnt")
"""Folders that a sandbox may hide behind its root."""
ENDS_WITH_US = "--pdeathsig=KILL"
"""Has the kernel end the sandbox when the process that started it is killed."""
STAGE = Path("/mnt")
"""Where root shows Python's folder to nobody, who may not look into root's own."""


@dataclass(frozen=True)
class Limits:
    """How much a program may take."""

    seconds: float
    """Of time, from when it begins."""
    megabytes: int
    """Of memory, in each of its processes, in MiB."""


# What root does first, in a namespace of mounts, before it becomes nobody.
STAGING = """
set -eu
mount --make-rprivate /
mount --rbind "$1" "$2"
shift 2
exec "$@"
"""

# Makes a root of its own in memory, and starts Python there without capabilities. The shell stays
# the first process, so it outlives whatever the program does, and ends all that is left.
SETUP = """
set -eu
root=$1 source=$2 prefix=$3 python=$4
megabytes=$5 seconds=$6 processes=$7 file_bytes=$8 temporary=$9
shift 9
read_only() {
    mount --rbind "$1" "$root$2"
    mount -o remount,bind,ro,nosuid,nodev "$root$2"
}
mount --make-rprivate /
mount -t tmpfs -o size=1m,mode=755,nosuid,nodev tmpfs "$root"
for path in "$@"; do
    if [ -L "$path" ]; then
        ln -s "$(readlink "$path")" "$root$path"
    elif [ -d "$path" ]; then
        mkdir -p "$root$path"
        read_only "$path" "$path"
    elif [ -f "$path" ]; then
        mkdir -p "$root${path%/*}"
        : > "$root$path"
        read_only "$path" "$path"
    fi
done
if [ ! -e "$root$prefix" ]; then
    mkdir -p "$root$prefix"
    read_only "$source" "$prefix"
fi
mkdir "$root/proc" "$root/tmp" "$root/old"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
echo 0 > "$root/proc/sys/user/max_user_namespaces"
mount -o remount,bind,ro,nosuid,nodev,noexec "$root/proc"
mount -t tmpfs -o "size=${temporary}m,nr_inodes=4k,mode=777,nosuid,nodev" tmpfs "$root/tmp"
mount -o remount,bind,ro,nosuid,nodev "$root"
cd "$root"
pivot_root . old
cd /tmp
umount -l /old
prlimit --nproc="$processes" --as="$((megabytes * 1048576))" --fsize="$file_bytes" --core=0 \\
    --nofile=64 --cpu="$seconds" \\
    setpriv --no-new-privs --bounding-set=-all --inh-caps=-all --ambient-caps=-all \\
    "$python" -I -S -B - 2>&1 || exit 1
exit 0
"""


def run_program(program: str, limits: Limits) -> bool:
    """Whether a Python program runs to its end within its limits. What it prints is dropped.

    A program that ends itself early, with whatever status, has not run to its end. Raises UserError
    where the sandbox cannot be started.
    """
    token = secrets.token_hex(16)
    return _outcome(program, f"'{token}'", limits) == token


def check_sandbox(limits: Limits) -> None:
    """Raises UserError, naming what is not contained, unless programs can be on this machine."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or sys.platform != "linux":
        raise _cannot(
            f"{', '.join(missing)} is missing (util-linux)"
            if sys.platform == "linux"
            else f"{sys.platform} has no Linux namespaces"
        )
    said = _outcome(PROBE.replace("PROCESSES", str(PROCESSES)), "json.dumps(escapes)", limits)
    if not said:
        raise _cannot("what is to be contained did not end in its time")
    escapes = json.loads(said)
    if escapes:
        raise _cannot(f"not contained: {', '.join(dict.fromkeys(escapes))}")


def _cannot(reason: str) -> UserError:
    return UserError(
        "evaluation.allow_code_execution=true, but this machine cannot contain programs that "
        f"nobody has read: {reason}; evaluate humaneval and mbpp on a machine that lets users "
        "make namespaces, or leave these tasks out"
    )


# What must fail. A process that is refused memory ends alone; so is the one that forks.
PROBE = """
import ctypes, json, mmap, os, socket
escapes = []
with open("/proc/self/mountinfo") as mounts:
    for line in mounts:
        fields = line.split()
        if "ro" not in f"{fields[5]},{fields[-1]}".split(",") and fields[4] != "/tmp":
            escapes.append(f"writing to {fields[4]}")
with open("/proc/net/dev") as devices:
    names = [line.split(":")[0].strip() for line in devices if ":" in line]
    if names != ["lo"]:
        escapes.append("the network")
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
    escapes.append("the network")
except ConnectionRefusedError:
    escapes.append("the loopback network")
except OSError:
    pass
with open("/proc/self/status") as status:
    parts = [line.partition(":") for line in status]
    known = {name: value.strip() for name, _, value in parts}
if int(known["CapEff"], 16) or int(known["CapBnd"], 16) or known["NoNewPrivs"] != "1":
    escapes.append("privileges")
if ctypes.CDLL(None).unshare(0x10000000) == 0:
    escapes.append("making users")
if len([name for name in os.listdir("/proc") if name.isdigit()]) > 6:
    escapes.append("seeing other processes")
try:
    mmap.mmap(-1, 10 * 2**30)  # nothing is touched, should it be given
    escapes.append("10 GiB of memory")
except OSError:
    pass
children = []
try:
    for _ in range(4 * PROCESSES):
        child = os.fork()
        if child == 0:
            import signal
            signal.pause()
        children.append(child)
    escapes.append("starting processes without end")
except OSError:
    pass
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
"""


def _outcome(program: str, result: str, limits: Limits) -> str:
    """What the Python expression `result` is once the program has run to its end, empty where it
    did not. Raises UserError with what the sandbox complained about where that did not start, twice
    in a row: a busy machine may be late once."""
    complaint = ""
    for _ in range(2):
        said, complaint = _said(program, result, limits)
        if said.startswith(b"+"):
            return said[1:].decode(errors="replace")
    raise _cannot(f"no namespaces, or no Python in them ({complaint or 'it did not start'})")


def _said(program: str, result: str, limits: Limits) -> tuple[bytes, str]:
    """What comes out of a sandbox: `+` when it begins, then the result; and its complaints."""
    reading, writing = os.pipe()
    # It says that it begins, and at the end the result. Whatever else it writes is no token. It
    # needs no name that the program could bind.
    code = (
        "(lambda write, text, run, value, names: ("
        f"write({writing}, b'+'), run({program!r}, names), "
        f"write({writing}, text(value({result!r}, names)).encode())"
        "))(__import__('os').write, str, exec, eval, globals())\n"
    )
    with _sealed(code.encode("utf-8", "surrogatepass")) as source:
        process = subprocess.Popen(
            _command(limits),
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(writing,),
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
    os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as told, process:
        said = _read(told, limits.seconds)
        # The kernel ends the first process of the sandbox with this one, and all others with that.
        process.kill()
        while told.read(LONGEST):  # until nobody is left who could write
            pass
        assert process.stderr is not None
        complaint = process.stderr.read().decode(errors="replace").strip()
    return said, complaint


LONGEST = 4096  # bytes of what a program may say


def _read(told: io.RawIOBase, seconds: float) -> bytes:
    """What a program has said when it ends, or its time is over, or it says too much."""
    said, deadline = b"", time.monotonic() + START_SECONDS
    while len(said) <= LONGEST:
        ready, _, _ = select.select([told], [], [], max(0.0, deadline - time.monotonic()))
        part = told.read(LONGEST) if ready else None
        if not part:
            break
        if not said:
            deadline = time.monotonic() + seconds
        said += part
    return said


@contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A file in memory that nobody can write to, at its beginning."""
    with os.fdopen(os.memfd_create("program", os.MFD_ALLOW_SEALING), "w+b") as file:
        file.write(content)
        file.flush()
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        file.seek(0)
        yield file.fileno()


def _command(limits: Limits) -> list[str]:
    """What starts the sandbox with Python in it, which reads its program from the standard
    input."""
    prefix = Path(sys.base_prefix).resolve()
    source, before = prefix, ["setpriv", ENDS_WITH_US, "--"]
    if os.getuid() == 0:
        source = STAGE
        as_nobody = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
        before = [
            *("unshare", "--mount", "--", "sh", "-c", STAGING, "sandbox", str(prefix), str(STAGE)),
            *("setpriv", *as_nobody, ENDS_WITH_US, "--"),
        ]
    namespaces = ("--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--uts")
    arguments = (
        next(each for each in ROOTS if not source.is_relative_to(each)),
        *(source, prefix, Path(sys.executable).resolve(), limits.megabytes),
        # The time limit ends a program; processor time is for what might escape it.
        math.ceil(limits.seconds) + 1,
        *(PROCESSES, FILE_BYTES, TEMPORARY_MIB),
        *SYSTEM,
    )
    return [
        *(*before, "unshare", *namespaces, "--fork", "--kill-child", "--"),
        *("sh", "-c", SETUP, "sandbox", *map(str, arguments)),
    ]
