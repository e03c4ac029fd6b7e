"""DeepSpeed's converter of checkpoints, with its own arguments and files opened as data; for a
process of its own."""

from __future__ import annotations

import multiprocessing

from alphatoken.distributed.pickles import opened_as_data


def main() -> None:
    from deepspeed.checkpoint import ds_to_universal

    # Its worker processes inherit which classes count as data.
    multiprocessing.set_start_method("fork", force=True)
    with opened_as_data():
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
