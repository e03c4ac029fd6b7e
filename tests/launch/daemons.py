"""Servers for launch tests on two machines: sshd with a key for this user, and Slurm."""

from __future__ import annotations

import getpass
import os
import subprocess
from pathlib import Path

from tests.launch.machines import NAMES, Machine, wait_until


def start_sshd(machines: tuple[Machine, Machine], folder: Path) -> None:
    """On both machines `ssh node1` and `ssh node2` work without a password, only inside them."""
    for name in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    server = f"""
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
    client = f"""
Host {" ".join(NAMES)}
    User {getpass.getuser()}
    IdentityFile {folder}/user_key
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking no
    LogLevel ERROR
"""
    (folder / "sshd_config").write_text(server, encoding="utf-8")
    (folder / "ssh_config").write_text(client, encoding="utf-8")
    for machine in machines:
        machine.run(["mkdir", "/run/sshd"])
        machine.run(["mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config"])
        machine.popen(
            ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")], folder / "sshd.log"
        )
    for name in NAMES:
        greeting = ["ssh", "-o", "ConnectionAttempts=20", name, "hostname"]
        assert machines[0].run(greeting).strip() == name, (folder / "sshd.log").read_text()


class Slurm:
    """A controller on node1 and a daemon per node. Jobs of partition `urgent` preempt those of
    `idle`.

    The partition `other` has a node of its own, node3, whose daemon is on the second machine.
    """

    def __init__(self, machines: tuple[Machine, Machine], folder: Path) -> None:
        self._first, self._conf = machines[0], folder / "slurm.conf"
        key, socket = folder / "munge.key", folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # A requeued job waits until the credentials of its last start have expired.
        self._conf.write_text(
            f"""
ClusterName=test
SlurmctldHost={NAMES[0]}
SlurmUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SchedulerParameters=batch_sched_delay=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={",".join(NAMES)} CPUs=1
NodeName=node3 NodeHostname={NAMES[1]} NodeAddr={NAMES[1]} Port=6828 CPUs=2
PartitionName=idle Nodes={",".join(NAMES)} PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes={",".join(NAMES)} PriorityTier=2
PartitionName=other Nodes=node3
""",
            encoding="utf-8",
        )
        files = {
            "socket": socket,
            "pid-file": folder / "munge.pid",
            "seed-file": folder / "munge.seed",
        }
        options = [f"--{name}={file}" for name, file in files.items()]
        # --force: its files are in a folder that others may read.
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", *options]
        self._first.popen([*munged, f"--log-file={folder}/munge.log"], folder / "munged.log")
        wait_until(socket.exists, 10, (folder / "munged.log").read_text)
        self._first.popen(["slurmctld", "-D", "-f", str(self._conf)], folder / "slurmctld.log")
        nodes = {NAMES[0]: machines[0], NAMES[1]: machines[1], "node3": machines[1]}
        for name, machine in nodes.items():
            machine.popen(
                ["slurmd", "-D", "-f", str(self._conf), "-N", name], folder / f"{name}.log"
            )
        logs = [folder / f"{name}.log" for name in ("slurmctld", *nodes)]
        wait_until(self._is_ready, 30, lambda: "\n".join(log.read_text()[-2000:] for log in logs))

    def submit(self, *arguments: str) -> str:
        """Returns the number of the job."""
        return self.call("sbatch", "--parsable", *arguments).strip()

    def call(self, *command: str) -> str:
        return self._first.run(command, SLURM_CONF=str(self._conf))

    def state(self, job: str) -> str:
        return self.call(
            "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"
        ).strip()

    def _is_ready(self) -> bool:
        asked = self._first.popen(
            ["sinfo", "--noheader", "--Node", "--format=%T"], SLURM_CONF=str(self._conf)
        )
        return asked.communicate()[0].split() == ["idle"] * 5  # two nodes are in two partitions
