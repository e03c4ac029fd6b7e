"""What a micro-batch is: its keys, and the loss positions that follow from its labels.

Shape legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def loss_positions(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts labels into loss positions: position t predicts token t+1.

    labels_BT: (B, T) int64, IGNORE_INDEX off the response. Returns `response_BT` (bool, the
    response mask) and `targets_BT` (int64, the token each position predicts; IGNORE_INDEX
    elsewhere). The last position predicts nothing.
    """
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    return targets_BT != IGNORE_INDEX, targets_BT


Batch = Mapping[str, Tensor]
