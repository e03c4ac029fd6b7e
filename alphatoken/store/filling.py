"""Computing the numbers of a dataset's rows, by all ranks.

Shape legend: B rows, T loss positions, R response positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from alphatoken.batch import Batch, to_device
from alphatoken.data.batches import Layout, micro_batches
from alphatoken.data.cache import TokenDataset
from alphatoken.distributed import collectives
from alphatoken.errors import UserError
from alphatoken.store.rows_folder import RowsFolder
from alphatoken.util.progress import Countdown

Compute = Callable[[Batch], Mapping[str, Tensor]]
"""Columns of a micro-batch by name, (B, T) each; off the response anything. Their dtypes are those
of the files."""
Columns = dict[str, list[np.ndarray[tuple[int], np.dtype[np.float32]]]]
"""The numbers of consecutive rows by column, (R,) each."""


def fill(
    folder: RowsFolder,
    part: TokenDataset,
    compute: Compute,
    *,
    layout: Callable[[int], Layout],
    block_rows: int,
    device: torch.device,
    title: str,
    number: str,
) -> None:
    """Computes what a folder lacks, in blocks of `block_rows` consecutive rows; the rows of a block
    are laid out as `layout` says for so many and dealt to the ranks, and written together.

    `title` is what the progress bar says. Raises UserError where a floating-point number, which is
    called `number`, is not finite.
    """
    done, ranks = folder.done(), collectives.world_size()
    active = collectives.rank() == 0
    with Countdown(title, "rows", done, len(part), active=active) as countdown:
        while done < len(part):
            rows = np.arange(done, min(done + block_rows, len(part)))
            chosen = layout(len(rows))
            found: list[tuple[Tensor, dict[str, Tensor]]] = []
            dealt = micro_batches(part, rows, chosen, collectives.rank(), ranks)
            for count, batch in enumerate(dealt, start=1):
                found.append(_by_row(to_device(batch, device), compute))
                countdown.advance(done + min(count * chosen.size * ranks, len(rows)))
            folder.add(done, _on_rank_0(found, part, rows, number))
            done = int(rows[-1]) + 1


def _by_row(batch: Batch, compute: Compute) -> tuple[Tensor, dict[str, Tensor]]:
    """The row of each response token in order of documents, and the columns, (R,) each."""
    columns, response_BT = compute(batch), batch["response"]
    document_R, order_R = batch["document_ids"][response_BT].sort(stable=True)
    return batch["rows"][document_R], {
        name: column_BT[response_BT][order_R] for name, column_BT in columns.items()
    }


def _on_rank_0(
    found: list[tuple[Tensor, dict[str, Tensor]]],
    part: TokenDataset,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    number: str,
) -> Columns:
    """The columns of all ranks, row by row, on rank 0, which writes them; none on the others."""
    dtypes = {name: column_R.dtype for name, column_R in found[0][1].items()}
    # One matrix for one message; float64 holds row numbers, token ids and float32 as they are.
    own = [
        torch.stack([row_R.double(), *(columns[name].double() for name in dtypes)], dim=1)
        for row_R, columns in found
    ]
    collected = collectives.collect_on_rank_0(torch.cat(own).cpu())

    def by_row() -> Columns:
        everywhere = torch.cat(collected)
        everywhere = everywhere[everywhere[:, 0].argsort(stable=True)]
        numbers, counts = everywhere[:, 0].long().unique_consecutive(return_counts=True)
        assert numbers.tolist() == rows.tolist(), "each row has response tokens, and is dealt once"
        finite_R = torch.isfinite(everywhere).all(1)
        if not bool(finite_R.all()):
            faulty = part.location(int(everywhere[~finite_R][0, 0]))
            raise UserError(f"{number} of {faulty} is not finite; try model.dtype=float32")
        return {
            name: [each.to(dtype).numpy() for each in everywhere[:, place].split(counts.tolist())]
            for place, (name, dtype) in enumerate(dtypes.items(), start=1)
        }

    return collectives.agree(lambda: by_row() if collectives.rank() == 0 else {})
