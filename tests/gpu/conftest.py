"""The device, and what tests measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Note = Callable[[str], None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CUDA device where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Puts a sentence beside the test's name in the table of `python -m tests.gpu`."""
    return lambda text: record_property("note", text)
