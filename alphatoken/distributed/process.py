"""What a rank's process needs before torch is loaded: a command may end before there are any
ranks."""

from __future__ import annotations

import atexit
import os
import sys
import time
from types import ModuleType
from typing import Any

# The group of ranks that `barrier` and everything picklable goes through: gloo's, whatever tensors
# go through, with hours of patience. None in a single process, and where somebody else formed the
# process group: then it is the default group.
control_group: Any = None

PATIENCE = 2.0
"""Seconds that rank 0 has to say why the ranks end before another rank does."""
TOLD = "alphatoken/told"  # in the store of the process group: how many ranks wanted to say it


def running_comm() -> ModuleType | None:
    """DeepSpeed's communication where a process group runs; None in a single process."""
    # Without DeepSpeed (a notebook calling score_tokens) there is one process; importing it
    # would cost seconds.
    comm = sys.modules.get("deepspeed.comm")
    return comm if comm is not None and comm.is_initialized() else None


def local_ranks() -> int:
    """How many ranks share this machine, by what the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def barrier() -> None:
    """Every rank waits for every other, for hours if need be; no data."""
    comm = running_comm()
    if comm:
        comm.barrier(group=control_group)


def is_to_tell() -> bool:
    """Whether this rank is the one to say why the ranks end; to be asked once, by a rank that
    failed.

    Rank 0 is. Another one waits first: a launcher stops every rank as soon as one ends. If rank 0
    has said nothing by then it may not even know, and waits for this one in a message: the first
    to ask tells. Where ranks have not met yet, those of a machine failed alike, and one tells.
    """
    comm = running_comm()
    leads = os.environ.get("RANK", "0") == "0"
    if not leads:
        time.sleep(PATIENCE)
    if not comm:
        return leads or os.environ.get("LOCAL_RANK", "0") == "0"
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._get_default_store().add(TOLD, 1) == 1 or leads
    except RuntimeError:  # the rank that held the store, which is rank 0, has ended by itself
        return leads


def end_process(status: int) -> None:
    """Ends a rank, which must have no communication under way. Without ranks it is `sys.exit`, or
    nothing for status 0.

    A rank's interpreter is not taken down. Gloo's workers drop the tensors of a finished message a
    moment after whoever waited for it goes on, and need the interpreter for that: where it is going
    down, they abort the process.
    """
    comm = running_comm()
    if not comm:
        if status:
            sys.exit(status)
        return
    comm.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
