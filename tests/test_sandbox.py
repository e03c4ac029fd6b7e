"""Programs that nobody has read: what they may not do, and what they may."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alphatoken.errors import UserError
from alphatoken.evaluation import sandbox
from alphatoken.evaluation.sandbox import Limits, check_sandbox, run_program

LIMITS = Limits(seconds=2.0, megabytes=512)


@pytest.fixture(scope="module", autouse=True)
def _contained() -> None:
    """Skips where programs cannot be contained, which is refused by name there."""
    try:
        check_sandbox(LIMITS)
    except UserError as error:
        pytest.skip(str(error))


def ran(program: str, limits: Limits = LIMITS) -> bool:
    return run_program(textwrap.dedent(program), limits)


def processes_that_say(word: str) -> list[str]:
    """The ids of all processes of this machine with a word in their command lines or names."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name = (folder / "comm").read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if name == word:
                found.append(folder.name)
    return found


def test_a_program_passes_that_runs_to_its_end() -> None:
    assert ran("import math\nassert math.sqrt(4) == 2\nprint('x' * 10**6)")


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "def f(:",
        "import sys; sys.exit(0)",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import os; os.kill(os.getpid(), 9)",
        "exit()",
    ],
)
def test_a_program_that_ends_early_has_not_passed(program: str) -> None:
    assert not ran(program)


def test_a_program_may_use_every_name() -> None:
    names = ("str", "_os", "os", "exec", "eval", "globals", "write", "text", "run", "value")
    program = "".join(f"{name} = 'mine'\n" for name in names)
    assert run_program(program, LIMITS)


def test_a_sandbox_that_is_late_once_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def late(program: str, result: str, limits: Limits) -> tuple[bytes, str]:
        started.append(program)
        return (b"", "") if len(started) == 1 else (b"+" + result.strip("'").encode(), "")

    monkeypatch.setattr(sandbox, "_said", late)
    assert run_program("pass", LIMITS)
    monkeypatch.setattr(sandbox, "_said", lambda *given: (b"", "refused"))
    with pytest.raises(UserError, match=r"no Python in them \(refused\)"):
        run_program("pass", LIMITS)


@pytest.mark.slow
def test_an_endless_loop_is_ended() -> None:
    began = time.monotonic()
    assert not ran("while True:\n    pass")
    assert not ran("import time\ntime.sleep(10**6)")
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_what_a_program_leaves_behind_ends_with_it() -> None:
    """Also what left its session and its parent, and asked not to be ended with it."""
    name = f"stay{os.getpid() % 10**6}"
    program = f"""
        import ctypes, os, signal, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in range(1, 64):
                    try:
                        signal.signal(number, signal.SIG_IGN)
                    except (OSError, ValueError):
                        pass
                ctypes.CDLL(None).prctl(1, 0)
                ctypes.CDLL(None).prctl(15, b"{name}")
                time.sleep(10**6)
            os._exit(0)
        os.wait()
        try:
            os.kill(1, 9)
        except OSError:
            pass
        time.sleep(SECONDS)
    """
    assert ran(program.replace("SECONDS", "0.2"))
    assert not ran(program.replace("SECONDS", "10**6"))
    # The kernel has killed them all, and takes a moment to take the last away.
    assert becomes(lambda: not processes_that_say(name), seconds=10)


def test_a_sandbox_ends_with_the_process_that_started_it() -> None:
    name = f"orphan{os.getpid() % 10**6}"
    inside = f"import ctypes, time; ctypes.CDLL(None).prctl(15, b'{name}'); time.sleep(10**6)"
    outside = (
        "from alphatoken.evaluation.sandbox import *; "
        f"run_program({inside!r}, Limits(seconds=600, megabytes=512))"
    )
    starter = subprocess.Popen([sys.executable, "-c", outside], cwd=Path(__file__).parent.parent)
    try:
        assert becomes(lambda: bool(processes_that_say(name)))
    finally:
        starter.kill()
        starter.wait()
    assert becomes(lambda: not processes_that_say(name))


def becomes(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Whether something is true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_a_fork_bomb_comes_to_nothing() -> None:
    name = f"bomb{os.getpid() % 10**6}"
    most: list[int] = [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            most[0] = max(most[0], len(processes_that_say(name)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert not ran(
            f"""
            import ctypes, os
            ctypes.CDLL(None).prctl(15, b"{name}")
            while True:
                try:
                    os.fork()
                except OSError:
                    pass
            """
        )
    finally:
        stop.set()
        watcher.join()
    assert 1 <= most[0] <= sandbox.PROCESSES
    # The kernel has killed them all, and takes a moment to take the last away.
    assert becomes(lambda: not processes_that_say(name), seconds=10)


def test_nothing_outside_is_written_or_read(tmp_path: Path) -> None:
    """Not by a path, nor by becoming somebody else, mounting, or another root."""
    secret = tmp_path / "secret"
    secret.write_text("x", encoding="utf-8")
    for folder in (tmp_path, *tmp_path.parents):  # anybody may write there, but for the sandbox
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(0o777)
    secret.chmod(0o666)
    assert ran(
        f"""
        import ctypes, os
        libc = ctypes.CDLL(None)
        assert not os.path.exists({str(secret)!r})
        paths = ("/x", "/usr/x", "/proc/sys/kernel/hostname", "/old/x", {str(Path.home() / "x")!r})
        for path in ({str(secret)!r}, *paths):
            try:
                open(path, "w")
            except OSError:
                continue
            raise AssertionError(path)
        assert libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) != 0
        assert libc.mount(None, b"/usr", None, 32 | 4096, None) != 0  # not read-only any more
        assert libc.chroot(b"/tmp") != 0
        assert libc.setuid(0) == 0  # root of a namespace without capabilities
        assert libc.unshare(0x10000000) != 0
        open("/tmp/mine", "w").write("y")
        """
    )
    assert secret.read_text(encoding="utf-8") == "x"
    assert not Path("/tmp/mine").exists()


def test_disk_and_memory_are_limited() -> None:
    assert ran(
        """
        for size in (10 * 2**30, 2**30):
            try:
                bytearray(size)
            except MemoryError:
                continue
            raise AssertionError("it got all of it")
        written = 0
        try:
            for number in range(10**6):
                with open(f"/tmp/{number}", "wb") as file:
                    written += file.write(bytes(2**20))
        except OSError:
            pass
        assert written <= 64 * 2**20
        try:
            with open("/tmp/0", "wb") as file:
                file.write(bytes(2**25))
            raise AssertionError("a file of 32 MiB")
        except OSError:
            pass
        """,
        Limits(seconds=20, megabytes=512),
    )


@pytest.fixture
def listening() -> Iterator[int]:
    """A port of this machine at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_there_is_no_network(listening: int) -> None:
    socket.create_connection(("127.0.0.1", listening), timeout=5).close()
    assert ran(
        f"""
        import socket
        for address in (("127.0.0.1", {listening}), ("1.1.1.1", 53), ("::1", {listening})):
            try:
                socket.create_connection(address, timeout=1)
            except OSError:
                continue
            raise AssertionError(address)
        """
    )


def test_what_is_said_without_end_is_cut_off() -> None:
    """To the pipe that results come through, and to the streams."""
    assert not ran(
        """
        import os
        while True:
            for number in range(3, 64):
                try:
                    os.write(number, b"x" * 10**5)
                except OSError:
                    pass
        """
    )
    assert ran("import sys\nfor _ in range(50):\n    print('x' * 10**5, file=sys.stderr)")


def test_a_machine_that_cannot_contain_programs_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Root without becoming nobody first: limits on processes do not hold.
    if os.getuid() == 0:
        with monkeypatch.context() as as_another:
            as_another.setattr(os, "getuid", lambda: 1000)
            with pytest.raises(UserError, match=r"cannot contain programs.*starting processes"):
                check_sandbox(LIMITS)
    with monkeypatch.context() as without:
        without.setattr(sandbox, "SETUP", "echo 'unshare failed: Operation not permitted' >&2\n")
        with pytest.raises(UserError, match=r"no namespaces.*Operation not permitted"):
            check_sandbox(LIMITS)
    with monkeypatch.context() as lax:
        lax.setattr(sandbox, "SETUP", sandbox.SETUP.replace("--bounding-set=-all", ""))
        with pytest.raises(UserError, match="not contained: privileges"):
            check_sandbox(LIMITS)
    with monkeypatch.context() as lax:
        lax.setattr(sandbox, "SETUP", sandbox.SETUP.replace('--as="$((megabytes * 1048576))"', ""))
        with pytest.raises(UserError, match="not contained: 10 GiB of memory"):
            check_sandbox(LIMITS)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"unshare, setpriv.*is missing"):
        check_sandbox(LIMITS)


@pytest.mark.skipif(
    os.getuid() != 0 or not Path("/usr/bin/python3").exists(), reason="needs root to become another"
)
def test_it_needs_no_privileges() -> None:
    """As another user, and with the system's Python, as root's own may be out of reach."""
    program = (
        "from alphatoken.evaluation.sandbox import *; limits = Limits(2, 512); "
        "check_sandbox(limits); print(run_program('assert True', limits))"
    )
    as_another = ("setpriv", "--reuid=64321", "--regid=64321", "--clear-groups", "--")
    done = subprocess.run(
        [*as_another, "/usr/bin/python3", "-B", "-c", program],
        cwd=Path(__file__).parent.parent,
        text=True,
        capture_output=True,
        check=False,
    )
    if "ImportError" in done.stderr or "SyntaxError" in done.stderr:
        pytest.skip(f"the system's Python cannot import it: {done.stderr.splitlines()[-1]}")
    assert done.stdout == "True\n", done.stderr
    assert sys.version_info >= (3, 11)
