"""A hash of the weights a model has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from alphatoken.distributed import zero3
from alphatoken.util.files import fingerprint


def model_identity(
    parameters: Mapping[str, nn.Parameter], device: torch.device
) -> tuple[str, dict[str, int]]:
    """One hash of the named weights, and a checksum of each. Every rank must call it."""
    checksums = zero3.checksums(parameters, device)
    described = [
        [name, list(zero3.full_shape(parameters[name])), value] for name, value in checksums.items()
    ]
    return fingerprint(described), checksums
