"""DeepSpeed's files are pickles, which can run code when they are opened. Here they are opened as
data, whoever wrote them: tensors, numbers, texts and containers of these, and three classes of
DeepSpeed's that hold nothing else."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def opened_as_data() -> Iterator[None]:
    """Inside, `torch.load` refuses files with anything but data, also where DeepSpeed asks it to
    run them; it raises pickle.UnpicklingError. Processes that are started inside do the same, but
    for DeepSpeed's classes."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = {name: os.environ.pop(name, None) for name in (FORCE, FORCE_NOT)}
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ[FORCE]
        os.environ |= {name: value for name, value in before.items() if value is not None}


def refused_content(file: Path) -> str | None:
    """Why a file cannot be opened as data, or None; inside `opened_as_data`. Its tensors are not
    read."""
    try:
        torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's first paragraph says how to run it all the same.
        lines = [line.strip() for line in str(error).split("\n")[1:] if line.strip()]
        return lines[0] if lines else str(error)
    except Exception as error:  # whatever it makes of other bytes
        return f"torch cannot read it ({error!r})"
    return None
