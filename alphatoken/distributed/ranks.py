"""The process group and the device of this rank."""

from __future__ import annotations

import os
import socket
import sys
import warnings

import torch
import transformers


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


def initialise_ranks() -> torch.device:
    """Joins the process group that the launcher described in the environment, or forms one of a
    single process.

    Returns this rank's device.
    """
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
        if "OMP_NUM_THREADS" not in os.environ:
            local_ranks = int(
                os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
            )
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
        device = torch.device("cpu")
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(), local_rank)
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    return device
