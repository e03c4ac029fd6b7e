"""Peak memory of this process or device."""

from __future__ import annotations

import resource

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far on this rank: allocated on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
