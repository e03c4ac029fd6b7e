"""The diagonal Fisher of the reference model, E over prompts x and completions y of squared gradients (Eq. 5), sharded.

The gradients are those of each completion's summed loss, at the linears of the scored layers. The decoder runs forward
under DeepSpeed's hooks and the scored layers one at a time through the streamer; each rank brings sequences of its own
and keeps its slices of the sums. What has been summed is saved now and then, so an interrupted estimate goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alphatoken import collectives, valuation, zero3
from alphatoken.architectures import Decoder, ScoredLinear
from alphatoken.attention import AttentionCall
from alphatoken.capture import Entry, EntryCapture
from alphatoken.errors import UserError
from alphatoken.slices import TensorFile, flush, save_slices
from alphatoken.tower import Tower

Square = Literal["token", "sequence"]


class FisherSum:
    """Sums of squared gradients over sequences, of the linears of the last `depth` layers."""

    def __init__(
        self, decoder: Decoder, depth: int, square: Square, device: torch.device, chunk_tokens: int = 16384
    ) -> None:
        self._tower = Tower(decoder, depth, device, resident=False, chunk_tokens=chunk_tokens)
        self._layers = list(decoder.layers)[len(decoder.layers) - depth :]
        self._square: Square = square
        self.parameters = {linear.name: decoder.model.get_parameter(linear.name) for linear in self._tower.scored}
        self.slices = {
            name: zero3.padded(torch.zeros(end - start, device=device), parameter)
            for name, parameter in self.parameters.items()
            for start, end in [zero3.slice_range(parameter)]
        }

    def capture(self) -> EntryCapture:
        """Wrap the model's forward pass in this, then hand its `.entry` to `add`."""
        return EntryCapture(self._layers)

    @contextmanager
    def head(self) -> Iterator[nn.Linear]:
        """The model's head, gathered. Every rank must enter it."""
        with self._tower.streamer.top() as (_, head):
            yield head

    @torch.no_grad()
    def add(self, entry: Entry, labels_BT: Tensor) -> None:
        """Adds the sequences of one batch per rank, which may be empty (no label). Every rank must call it.

        Padding must be on the right. Memory: the entry states of the batch, one layer with the signals of its linears,
        one block of logits, and one linear's matrix in float32, which is reduced before the next is formed.
        """
        self._tower.run(entry, labels_BT, _Squares(self._tower.scored, self))

    def _take(self, linear: ScoredLinear, signals: Sequence[tuple[Tensor, Tensor]]) -> None:
        parameter, own = self.parameters[linear.name], self.slices[linear.name]
        squares = torch.zeros(zero3.full_shape(parameter), device=own.device)
        for act_BTI, outgrad_BTO in signals:
            rows, columns = (act_BTI, outgrad_BTO) if linear.transposed else (outgrad_BTO, act_BTI)
            valuation.add_fisher_square(squares, rows, columns, self._square)
        own += zero3.sum_to_slice(squares, parameter)


class _Squares:
    """Sink of a tower pass: keeps one layer's signals until it is left, then squares them linear by linear."""

    def __init__(self, linears: Sequence[ScoredLinear], total: FisherSum) -> None:
        self._linears = linears
        self._total = total
        self._signals: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def layer(self, layer: int) -> Iterator[None]:
        yield
        for linear in self._linears:
            if linear.layer == layer:
                self._total._take(linear, self._signals.pop(linear.name, []))

    def attention(self, rows: slice, layer: int, call: AttentionCall) -> None:
        pass

    def signal(self, rows: slice, name: str, act_BTI: Tensor, outgrad_BTO: Tensor) -> None:
        self._signals.setdefault(name, []).append((act_BTI, outgrad_BTO))


class EstimateFolder:
    """Where an estimate lies when it is done, and beside it (`.partial`) what has been summed so far.

    `settings` is what decides the numbers; `about` goes into the header too. Raises UserError when the folder or its
    partial one holds an estimate with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], about: dict[str, Any]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._settings = settings
        self._header = {"settings": settings, **about}

    def is_complete(self) -> bool:
        """Whether the estimate is there. Every rank must ask."""

        def check() -> bool:
            if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
                return False
            self._check_settings(TensorFile(self.path), "or use it as it is with valuation.fisher")
            return True

        return collectives.on_rank_0(check)

    def resume(self, total: FisherSum) -> int:
        """Loads the newest sums, saved by any number of ranks; returns how many prompts they are of, 0 if none."""

        def newest() -> Path | None:
            states = sorted(self._partial.glob("prompts-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
            return states[-1] if states else None

        folder = collectives.on_rank_0(newest)
        if folder is None:
            return 0

        def load() -> int:
            state = TensorFile(folder)
            self._check_settings(state, "or finish it with the settings it has")
            for name, own in total.slices.items():
                start, end = zero3.slice_range(total.parameters[name])
                own[: end - start] = state.flat(name, start, end).to(own.device)
            return int(state.header["prompts"])

        return collectives.agree(load)

    def save(self, total: FisherSum, prompts: int) -> None:
        """Saves the sums over the first `prompts` prompts in place of older ones."""
        final = self._partial / f"prompts-{prompts}"
        self._write(total.slices, total, final, {**self._header, "prompts": prompts, "finished": False})
        if collectives.rank() == 0:
            for older in self._partial.iterdir():
                if older != final:
                    shutil.rmtree(older, ignore_errors=True)
        collectives.barrier()

    def finish(self, total: FisherSum, prompts: int) -> None:
        """Writes the mean over all `prompts` prompts; what was kept for resuming is removed.

        Raises UserError on every rank, and writes nothing, where the mean is not finite.
        """

        def check() -> None:
            faulty = [name for name, own in total.slices.items() if not bool(torch.isfinite(own).all())]
            if faulty:
                shutil.rmtree(self._partial, ignore_errors=True)  # no use going on from there
                raise UserError(
                    f"the Fisher of {', '.join(faulty)} is not finite: gradients overflow on these prompts; try "
                    "model.dtype=float32"
                )

        collectives.agree(check)
        mean = {name: own / prompts for name, own in total.slices.items()}
        self._write(mean, total, self.path, {**self._header, "prompts": prompts, "finished": True})
        if collectives.rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        collectives.barrier()

    def _write(self, slices: Mapping[str, Tensor], total: FisherSum, final: Path, header: dict[str, Any]) -> None:
        """All ranks write beside `final`; then rank 0 renames."""
        writing = self._partial / f"{final.name}.writing"

        def prepare() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

        def publish() -> None:
            flush(writing)
            writing.rename(final)
            flush(final.parent)

        try:
            collectives.on_rank_0(prepare)
            collectives.agree(lambda: save_slices(writing, slices, total.parameters, header))
            collectives.on_rank_0(publish)
        except OSError as error:
            raise UserError(f"cannot write the Fisher to {final}: {error}") from None

    def _check_settings(self, found: TensorFile, otherwise: str) -> None:
        theirs = found.header.get("settings", {})
        changed = [
            f"{key}: {theirs.get(key)!r} there, {self._settings.get(key)!r} here"
            for key in sorted(theirs.keys() | self._settings.keys())
            if theirs.get(key) != self._settings.get(key)
        ]
        if changed:
            raise UserError(
                f"{found} holds a Fisher with other settings; remove it, set fisher.output to another folder, "
                f"{otherwise}:\n  " + "\n  ".join(changed)
            )
