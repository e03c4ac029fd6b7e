"""Every launcher starts the same tiny run on two ranks, on one machine or on two, and its metrics
are the same.

The two machines are namespaces of this one, with real sshd, Slurm daemons and torchrun in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from alphatoken.config.file import load_config
from alphatoken.config.run import RunConfig
from tests.launch.daemons import Slurm, start_sshd
from tests.launch.machines import ENVIRONMENT, Machine, lacking, two_machines, wait_until
from tests.ranks import ROOT
from tests.runs import changed, metrics_of
from tests.test_survival import comparable

pytestmark = pytest.mark.slow
RECIPE = "recipes/sft.py"
BIN = Path(sys.executable).parent

# A recipe that imports nothing. It waits to be asked to stop, unless it is told to continue.
STAND_IN = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
line = " ".join(["rank", *(os.environ[name] for name in names), *sys.argv[1:]]) + "\\n"
os.write(1, line.encode())  # at once: ranks share the pipe
while not asked and "train.resume=auto" not in sys.argv:
    time.sleep(0.05)
if asked and os.environ["RANK"] == "0":
    print("stopped after step 2, which is saved", flush=True)
"""


def needs(*commands: str) -> pytest.MarkDecorator:
    reason = lacking(*commands)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture
def config_file(run_values: dict[str, Any], tmp_path: Path) -> Path:
    """Four steps; without a Fisher, which would take the longest."""
    values = changed(run_values, valuation={"stability_weight": 0.0}, train={"max_steps": 4})
    del values["fisher"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    return {}


@pytest.fixture
def expected(
    runs: dict[str, list[dict[str, Any]]], config_file: Path, tmp_path: Path
) -> list[dict[str, Any]]:
    """The metrics of the run by `local.sh`, which is made when the first test asks for it."""
    if not runs:
        folder = tmp_path / "local"
        launch(
            "launch/local.sh", RECIPE, "--config", str(config_file), f"train.output_dir={folder}"
        )
        runs["local"] = comparable(folder)
    return runs["local"]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    with two_machines(tmp_path) as both:
        yield both


def launch(*command: str, status: int = 0, **environment: str) -> str:
    """Runs a launcher on this machine; returns its output."""
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == status, f"status {ran.returncode}:\n{ran.stdout}"
    return ran.stdout


def ranks_of(folder: Path) -> list[int]:
    """The ranks that train into a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_text().split("\0")
            if words[0] == "python" and f"train.output_dir={folder}" in words:
                found.append(int(process.name))
    return found


def test_local(expected: list[dict[str, Any]]) -> None:
    assert [step["step"] for step in expected] == [0, 1, 2, 3, 4]


def test_console_script() -> None:
    """It gets the arguments as they are: DeepSpeed's launcher would put its --local_rank first."""
    output = launch("launch/local.sh", str(BIN / "alphatoken"), "--version", RANKS="1")
    assert output.splitlines()[-1].startswith("alphatoken "), output


@needs("sshd", "ssh-keygen", "pdsh")
def test_hostfile(
    expected: list[dict[str, Any]],
    config_file: Path,
    tmp_path: Path,
    machines: tuple[Machine, Machine],
) -> None:
    """Also arguments that a shell or pdsh would take for something else arrive."""
    start_sshd(machines, tmp_path)
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n", encoding="utf-8")
    (tmp_path / "variables").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n", encoding="utf-8")
    folder, allowed = tmp_path / "a 'run' of $HOME, 100%n", ["optim.*", "$HOME;%h"]
    arguments = [
        f"train.output_dir={folder}",
        f"train.resume_allow={json.dumps(allowed, separators=(',', ':'))}",
    ]
    machines[0].run(
        ["launch/hostfile.sh", RECIPE, "--config", str(config_file), *arguments],
        HOSTFILE=str(tmp_path / "hostfile"),
        DS_ENV_FILE=str(tmp_path / "variables"),
    )
    assert comparable(folder) == expected
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["resume_allow"] == allowed


@needs()
def test_torchrun(
    expected: list[dict[str, Any]],
    config_file: Path,
    tmp_path: Path,
    machines: tuple[Machine, Machine],
) -> None:
    command = [
        "launch/torchrun.sh",
        RECIPE,
        "--config",
        str(config_file),
        f"train.output_dir={tmp_path / 'run'}",
    ]
    environment = {"NODES": "2", "RANKS": "1", "RENDEZVOUS": "node1:29400"}
    logs = [tmp_path / f"{machine.name}-torchrun.log" for machine in machines]
    agents = [
        machine.popen(command, log, **environment)
        for machine, log in zip(machines, logs, strict=True)
    ]
    assert [agent.wait() for agent in agents] == [0, 0], "\n".join(log.read_text() for log in logs)
    assert comparable(tmp_path / "run") == expected


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with two_machines(folder) as both:
        yield Slurm(both, folder)


@pytest.fixture(scope="module")
def stand_in(
    slurm: Slurm, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[str, Path]]:
    """Submits a job of two ranks that wait to be asked to stop; returns its number and log."""
    folder = tmp_path_factory.mktemp("stand-in")
    script = folder / "stand_in.py"
    script.write_text(STAND_IN, encoding="utf-8")

    def submit(name: str, *options: str) -> tuple[str, Path]:
        options = ("--partition=other", "--ntasks=2", f"--output={folder / name}", *options)
        return slurm.submit(*options, "launch/slurm.sbatch", str(script), "%a $x"), folder / name

    return submit


@pytest.fixture(scope="module")
def limited(stand_in: Callable[..., tuple[str, Path]]) -> tuple[str, Path]:
    """A job that Slurm warns before its time limit, which it looks at every half minute: other
    tests come before."""
    return stand_in("limited", "--time=2", "--signal=B:USR1@100")


@needs("slurmctld", "slurmd", "munged")
@pytest.mark.usefixtures("limited")
def test_preempted_in_slurm(
    expected: list[dict[str, Any]], config_file: Path, tmp_path: Path, slurm: Slurm
) -> None:
    """An element of an array is preempted by another job, requeues itself, and comes to the same
    end."""
    folder, log = tmp_path / "run-3", tmp_path / "job-3.log"
    arguments = [RECIPE, "--config", str(config_file), f"train.output_dir={tmp_path / 'run-%a'}"]
    options = ["--partition=idle", "--nodes=2", "--array=3", f"--output={tmp_path / 'job-%a.log'}"]
    job = slurm.submit(*options, "launch/slurm.sbatch", *arguments)
    wait_until(
        (folder / "metrics.jsonl").exists,
        120,
        lambda: log.read_text() if log.exists() else "no log",
    )
    wait_until(lambda: len(metrics_of(folder)) > 1, 60, log.read_text)
    # Four tiny steps are over before Slurm decides anything: they wait for its SIGCONT and
    # SIGTERM.
    for rank in ranks_of(folder):
        os.kill(rank, signal.SIGSTOP)
    assert len(metrics_of(folder)) < 5
    slurm.submit("--partition=urgent", "--output=/dev/null", "--wrap=true")
    wait_until(lambda: slurm.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), 120, log.read_text)
    said, described = log.read_text(), slurm.call("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in described, said
    assert "Restarts=1 " in described, said
    stopped = re.findall(r"stopped after step (\d)", said)
    assert stopped in (["1"], ["2"], ["3"]), said
    assert f"requeueing job {job}_3" in said
    assert re.findall(r"continuing after step (\d)", said) == stopped
    assert comparable(folder) == expected


@needs("slurmctld", "slurmd", "munged")
def test_ends_of_slurm_jobs(
    slurm: Slurm,
    stand_in: Callable[..., tuple[str, Path]],
    limited: tuple[str, Path],
    tmp_path: Path,
) -> None:
    """A job that reaches its time limit goes on, an element of an array alone; not one that is
    cancelled or fails."""
    job, log = limited
    wait_until(lambda: slurm.state(job) == "COMPLETED", 120, log.read_text)
    said, port = log.read_text(), 10000 + int(job)
    for rank in range(2):
        assert f"rank {rank} {rank} 2 2 {port} %a $x\n" in said, said
        assert f"rank {rank} {rank} 2 2 {port} %a $x train.resume=auto\n" in said, said
    assert said.count("requeueing job") == 1

    # The last element of an array has the array's number, by which Slurm would requeue all of
    # them.
    array, log = stand_in("element-%a", "--array=0-1", "--ntasks=1")
    cancelled, warned = (log.with_name(f"element-{element}") for element in (0, 1))
    wait_until(
        lambda: all(each.exists() and each.read_text() for each in (cancelled, warned)),
        30,
        lambda: "no ranks",
    )
    slurm.call("scancel", "--batch", "--signal=USR1", f"{array}_1")
    wait_until(lambda: slurm.state(f"{array}_1") == "COMPLETED", 60, warned.read_text)
    assert f"requeueing job {array}_1" in warned.read_text()
    assert slurm.state(f"{array}_0") == "RUNNING"
    slurm.call("scancel", f"{array}_0")
    options = ("--partition=idle", f"--output={tmp_path / 'log'}")
    failing = slurm.submit(*options, "launch/slurm.sbatch", str(tmp_path / "no.py"))
    wait_until(lambda: slurm.state(failing) == "FAILED", 30, lambda: slurm.state(failing))
    wait_until(lambda: slurm.state(f"{array}_0") == "CANCELLED", 30, cancelled.read_text)
    assert "requeueing" not in cancelled.read_text() + (tmp_path / "log").read_text()


@pytest.mark.parametrize("launcher", sorted(path.name for path in (ROOT / "launch").glob("*.s*")))
def test_usage(launcher: str) -> None:
    """Without arguments a launcher says how it is called, and starts nothing."""
    assert f"launch/{launcher} recipes/sft.py" in launch(f"launch/{launcher}", status=2)


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        (
            "hostfile.sh",
            {"HOSTFILE": "no/hostfile"},
            "error: no hostfile no/hostfile (HOSTFILE names it)",
        ),
        ("torchrun.sh", {"NODES": "2"}, "error: NODES=2 needs RENDEZVOUS=HOST:PORT"),
        (
            "slurm.sbatch",
            {},
            "error: this is a Slurm job; submit it: sbatch launch/slurm.sbatch recipes/sft.py",
        ),
    ],
)
def test_refused(command: str, environment: dict[str, str], message: str) -> None:
    assert message in launch(f"launch/{command}", RECIPE, status=2, **environment)


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_kubernetes(version: str) -> None:
    """Both objects fit the schemas, unknown fields refused, and the container's command is one of
    ours."""
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    for described in (service, job):
        kubernetes_validate.validate(described, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    script, _, recipe, _, config, *overrides = pod["containers"][0]["args"]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    assert (ROOT / recipe).exists()
    load_config(RunConfig, ROOT / config, overrides)


def test_ranks_of_a_pod(tmp_path: Path) -> None:
    """The pod's command ends well with the run, with 75 where the run was stopped, and with a rank
    that fails."""
    _, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    script = job["spec"]["template"]["spec"]["containers"][0]["args"][0].replace(
        "/runs/example", str(tmp_path)
    )
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    environment = {"PODS": "2", "RANKS": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_PORT": "29500"}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = ["bash", "-c", script, "ranks", *arguments]
        return subprocess.Popen(
            command, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, text=True
        )

    pod = start(str(tmp_path / "stand_in.py"), "a b")
    assert pod.stdout is not None
    told = sorted(pod.stdout.readline() for _ in range(2))
    assert told == ["rank 2 0 4 2 29500 a b\n", "rank 3 1 4 2 29500 a b\n"]
    pod.terminate()
    assert pod.wait() == 75
    assert (
        start(
            "-c", "import os, time; time.sleep(60) if os.environ['RANK'] == '2' else exit(3)"
        ).wait()
        == 3
    )
    (tmp_path / "export").mkdir()
    assert start(str(tmp_path / "stand_in.py"), "train.resume=auto").wait() == 0


def test_shellcheck() -> None:
    scripts = [
        *(ROOT / "launch").glob("*.s*"),
        *(ROOT / "tests" / "launch").glob("*.sh"),
        ROOT / ".ci" / "run",
    ]
    launch("shellcheck", *map(str, scripts))


def test_the_image_is_linted() -> None:
    """It is not built here, which needs a registry; ranks in it are not root."""
    file = ROOT / "launch" / "Dockerfile"
    launch("hadolint", str(file))
    (user,) = re.findall(r"^USER (\d+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert int(user) > 0


def test_skypilot_starts_torchrun_on_each_machine(tmp_path: Path) -> None:
    """What each machine of a SkyPilot task runs, with its variables, up to the launcher."""
    file = ROOT / "launch" / "skypilot.yaml"
    task = yaml.safe_load(file.read_text(encoding="utf-8"))
    config_text = (ROOT / task["envs"]["CONFIG"]).read_text(encoding="utf-8")
    assert {*re.findall(r"\$\{(\w+)\}", config_text)} <= task["envs"].keys()
    for script, text in (
        (".venv/bin/activate", ""),
        ("launch/torchrun.sh", 'echo "$NODES|$RANKS|$RENDEZVOUS|$*"'),
    ):
        (tmp_path / script).parent.mkdir(parents=True)
        (tmp_path / script).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / script).chmod(0o755)
    machine = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        **task["envs"],
        "OUTPUT": "/runs/a b",
    }
    ran = subprocess.run(
        ["bash", "-euc", task["run"]],
        cwd=tmp_path,
        env=ENVIRONMENT | machine,
        capture_output=True,
        text=True,
        check=True,
    )
    arguments = "train.output_dir=/runs/a b train.resume=auto train.save_every=100"
    config = task["envs"]["CONFIG"]
    assert ran.stdout == f"2|8|10.0.0.7:29400|recipes/sft.py --config {config} {arguments}\n"
