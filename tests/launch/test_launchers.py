"""Every launcher starts the same tiny run on two ranks, on one machine or on two, and its metrics are the same.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launch.daemons import Slurm, start_sshd
from tests.launch.machines import ENVIRONMENT, Machine, lacking, two_machines, wait_until
from tests.ranks import ROOT
from tests.test_survival import comparable
from tests.test_training import changed, metrics_of

pytestmark = pytest.mark.slow
RECIPE = "recipes/sft.py"
BIN = Path(sys.executable).parent

# A recipe that imports nothing. It waits to be asked to stop, unless it is told to continue.
STAND_IN = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
rank = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")}
print("rank", *rank.values(), *sys.argv[1:], flush=True)
while not asked and "train.resume=auto" not in sys.argv:
    time.sleep(0.05)
if asked and rank["RANK"] == "0":
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
def expected(runs: dict[str, list[dict[str, Any]]], config_file: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The metrics of the run by `local.sh`, which is made when the first test asks for it."""
    if not runs:
        folder = tmp_path / "local"
        launch("launch/local.sh", RECIPE, "--config", str(config_file), f"train.output_dir={folder}")
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
    expected: list[dict[str, Any]], config_file: Path, tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    """Also arguments that a shell would take for something else arrive."""
    start_sshd(machines, tmp_path)
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n", encoding="utf-8")
    (tmp_path / "variables").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n", encoding="utf-8")
    folder, allowed = tmp_path / "a 'run' of $HOME", ["optim.*", "$HOME;"]
    arguments = [f"train.output_dir={folder}", f"train.resume_allow={json.dumps(allowed, separators=(',', ':'))}"]
    machines[0].run(
        ["launch/hostfile.sh", RECIPE, "--config", str(config_file), *arguments],
        HOSTFILE=str(tmp_path / "hostfile"),
        DS_ENV_FILE=str(tmp_path / "variables"),
    )
    assert comparable(folder) == expected
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["resume_allow"] == allowed


@needs()
def test_torchrun(
    expected: list[dict[str, Any]], config_file: Path, tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    command = ["launch/torchrun.sh", RECIPE, "--config", str(config_file), f"train.output_dir={tmp_path / 'run'}"]
    environment = {"NODES": "2", "RANKS": "1", "RENDEZVOUS": "node1:29400"}
    logs = [tmp_path / f"{machine.name}-torchrun.log" for machine in machines]
    agents = [machine.popen(command, log, **environment) for machine, log in zip(machines, logs, strict=True)]
    assert [agent.wait() for agent in agents] == [0, 0], "\n".join(log.read_text() for log in logs)
    assert comparable(tmp_path / "run") == expected


@needs("slurmctld", "slurmd", "munged")
def test_preempted_in_slurm(
    expected: list[dict[str, Any]], config_file: Path, tmp_path: Path, machines: tuple[Machine, Machine]
) -> None:
    """An element of an array is preempted by another job, requeues itself, and comes to the same end."""
    slurm = Slurm(machines, tmp_path)
    folder, log = tmp_path / "run-3", tmp_path / "job-3.log"
    arguments = [RECIPE, "--config", str(config_file), f"train.output_dir={tmp_path / 'run-%a'}"]
    options = ["--nodes=2", "--ntasks-per-node=1", "--array=3", f"--output={tmp_path / 'job-%a.log'}"]
    job = slurm.submit(*options, "launch/slurm.sbatch", *arguments)
    wait_until((folder / "metrics.jsonl").exists, 120, lambda: log.read_text() if log.exists() else "no log")
    wait_until(lambda: len(metrics_of(folder)) > 1, 60, log.read_text)
    # Four tiny steps are over before Slurm decides anything: they wait for its SIGCONT and SIGTERM.
    for rank in ranks_of(folder):
        os.kill(rank, signal.SIGSTOP)
    done = len(metrics_of(folder)) - 1
    assert done < 4
    slurm.submit("--partition=urgent", "--nodes=1", "--exclusive", "--output=/dev/null", "--wrap=true")
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
def test_ends_of_slurm_jobs(tmp_path: Path, machines: tuple[Machine, Machine]) -> None:
    """A job that reaches its time limit goes on; one that is cancelled does not, and one that fails does not."""
    slurm = Slurm(machines, tmp_path)
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN, encoding="utf-8")

    def submit(name: str, *options: str) -> tuple[str, Path]:
        log = tmp_path / f"{name}.log"
        return slurm.submit("--ntasks=2", f"--output={log}", *options, "launch/slurm.sbatch", str(script), "%a $x"), log

    # Slurm warns up to a minute early.
    limited, limited_log = submit("limited", "--nodes=1", "--time=2", "--signal=B:USR1@100")
    cancelled, cancelled_log = submit("cancelled", "--nodes=1")
    failing = slurm.submit(f"--output={tmp_path / 'failing.log'}", "launch/slurm.sbatch", str(tmp_path / "no.py"))
    wait_until(lambda: cancelled_log.exists() and cancelled_log.read_text().count("rank") == 2, 30, lambda: "no ranks")
    slurm.call("scancel", cancelled)
    wait_until(lambda: slurm.state(limited) == "COMPLETED", 90, limited_log.read_text)
    assert slurm.state(cancelled) == "CANCELLED", cancelled_log.read_text()
    assert slurm.state(failing) == "FAILED"
    said = limited_log.read_text()
    port = 10000 + int(limited)
    for rank in range(2):
        assert f"rank {rank} {rank} 2 2 {port} %a $x\n" in said, said
        assert f"rank {rank} {rank} 2 2 {port} %a $x train.resume=auto\n" in said, said
    assert said.count("requeueing job") == 1


@pytest.mark.parametrize("launcher", sorted(path.name for path in (ROOT / "launch").glob("*.s*")))
def test_usage(launcher: str) -> None:
    """Without arguments a launcher says how it is called, and starts nothing."""
    assert f"launch/{launcher} recipes/sft.py" in launch(f"launch/{launcher}", status=2)


@pytest.mark.parametrize(
    ("command", "environment", "message"),
    [
        ("hostfile.sh", {"HOSTFILE": "no/hostfile"}, "error: no hostfile no/hostfile (HOSTFILE names it)"),
        ("torchrun.sh", {"NODES": "2"}, "error: NODES=2 needs RENDEZVOUS=HOST:PORT"),
        ("slurm.sbatch", {}, "error: this is a Slurm job; submit it: sbatch launch/slurm.sbatch recipes/sft.py"),
    ],
)
def test_refused(command: str, environment: dict[str, str], message: str) -> None:
    assert message in launch(f"launch/{command}", RECIPE, status=2, **environment)
