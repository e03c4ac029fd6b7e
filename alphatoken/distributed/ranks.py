"""The process group and the device of this rank."""

from __future__ import annotations

import os
import resource
import socket
import sys
import warnings
from datetime import timedelta

import torch
import transformers

from alphatoken.distributed import process
from alphatoken.errors import UserError

# How long a rank waits for another that hashes, converts, tokenises or exports.
CONTROL_LIMIT = timedelta(hours=24)
DEFAULT_MINUTES = 30.0
LIMIT_VARIABLE = "DEEPSPEED_TIMEOUT"  # DeepSpeed's own, in minutes
# Open files of rank 0 for each rank, at most: in gloo's groups of tensors and of objects every rank
# is connected with every other, and rank 0 may hold the store that all of them ask.
FILES_PER_RANK = 3
FILES_OF_ONE = 1024


def visible_devices() -> tuple[str, int]:
    """What this rank computes on (`cuda`, `cpu`), and how many of them it sees; needs no process
    group."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return accelerator.device_name(), accelerator.device_count()


def device_memory(device: torch.device) -> int:
    """Bytes of a device's memory; of the machine's for a CPU."""
    from deepspeed.accelerator import get_accelerator

    return int(get_accelerator().total_memory(device.index))


def use_deterministic_kernels() -> None:
    """Has this process run only kernels that give the same bits every time; to be called before the
    device is first used.

    Where an operation has none, torch raises RuntimeError when it runs. flash-attention and cuBLAS
    read their part from the environment, which is left alone where it is set already.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(mode=True)


def tensor_limit(minutes: float | None) -> timedelta:
    """How long ranks wait for each other in a message of tensors: `deepspeed.timeout_minutes`, or
    DeepSpeed's variable where the key is left out.

    Raises UserError where both are given and differ, or where the variable is no number of minutes.
    """
    variable = os.environ.get(LIMIT_VARIABLE)
    if variable is None:
        return timedelta(minutes=DEFAULT_MINUTES if minutes is None else minutes)
    if not variable.isdecimal() or int(variable) == 0:
        raise UserError(
            f"{LIMIT_VARIABLE}={variable} is not a whole number of minutes; unset it and set "
            "deepspeed.timeout_minutes"
        )
    if minutes is not None and minutes != int(variable):
        raise UserError(
            f"deepspeed.timeout_minutes={minutes:g}, but the environment says "
            f"{LIMIT_VARIABLE}={variable}; unset one of them"
        )
    return timedelta(minutes=int(variable))


def allow_open_files(ranks: int) -> None:
    """Raises this process's limit of open files to what connections with so many ranks take.

    Systems often begin with 1,024, which a few hundred ranks use up. Raises UserError where more
    are not allowed.
    """
    needed = FILES_OF_ONE + FILES_PER_RANK * ranks
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"{ranks} ranks connect with each other, for which a process needs {needed} open "
            f"files, but this machine allows {hard} (`ulimit -Hn`); raise it, for example by a "
            f"line `* hard nofile {2 * needed}` in /etc/security/limits.conf"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def initialise_ranks(timeout_minutes: float | None = None) -> torch.device:
    """Joins the process group that the launcher described in the environment, or forms one of a
    single process; nothing where there is one already.

    `timeout_minutes`: see `tensor_limit`. Returns this rank's device.
    """
    limit = tensor_limit(timeout_minutes)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ["MASTER_PORT"] = str(port)
    allow_open_files(int(os.environ.get("WORLD_SIZE", 1)))
    # DeepSpeed calls collectives by names that torch 2.13 renames; a user can do nothing about
    # it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if os.environ["RANK"] != "0" or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Compiling DeepSpeed's shared-memory all-reduce takes half a minute and a compiler;
        # gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Without it, which torchrun does not set, every backward pass starts `numactl`.
        os.environ.setdefault("LOCAL_SIZE", str(process.local_ranks()))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // process.local_ranks()))
        device = torch.device("cpu")
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(), local_rank)
    deepspeed.init_distributed(
        accelerator.communication_backend_name(), verbose=False, timeout=limit
    )
    if process.control_group is None and torch.distributed.get_world_size() > 1:
        process.control_group = torch.distributed.new_group(backend="gloo", timeout=CONTROL_LIMIT)
    return device
