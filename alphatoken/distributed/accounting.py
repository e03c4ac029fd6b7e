"""Bytes sent between ranks, counted for benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def communicated_bytes() -> Iterator[dict[str, int]]:
    """Bytes that this rank hands to each collective inside, by its name, from DeepSpeed's own log;
    filled on exit.

    The log waits for every message, so what is inside takes longer than it would.
    """
    from deepspeed.comm import comm

    logger = comm.comms_logger
    found: dict[str, int] = {}
    before = logger.enabled, logger.prof_all, logger.comms_dict
    logger.enabled, logger.prof_all, logger.comms_dict = True, True, {}
    try:
        yield found
    finally:
        for name, sizes in logger.comms_dict.items():
            found[name] = sum(size * entry[0] for size, entry in sizes.items())
        logger.enabled, logger.prof_all, logger.comms_dict = before
