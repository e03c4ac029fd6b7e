"""Token losses of a reference model: of all rows once, before training and cached on disk, or of
each micro-batch.

A cache is a folder of Parquet files, one for some consecutive rows of a dataset each, and
`settings.json`, which says what they are of. It is complete when the files cover the dataset;
whoever finds an unfinished one goes on with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from alphatoken import collectives, zero3
from alphatoken.architectures import Decoder, decoder_of
from alphatoken.config import RunConfig
from alphatoken.config_preference import PreferenceRunConfig
from alphatoken.data.batches import Layout, micro_batches
from alphatoken.data.cache import TokenDataset
from alphatoken.engine import build_inference_engine, inference_config, load_model
from alphatoken.errors import UserError, differences
from alphatoken.estimation import model_identity, tokenizer_identity
from alphatoken.files import PARTIAL, file_sha256, fingerprint, publish, publish_text
from alphatoken.losses import loss_positions
from alphatoken.model import TokenLosses
from alphatoken.report import Countdown
from alphatoken.sampling import evaluating

FORMAT_VERSION = 1
ROWS_FILE = re.compile(r"rows-(\d+)-(\d+)\.parquet")
SETTINGS = "settings.json"

# First row, one after the last, file.
Span = tuple[int, int, Path]

# What is read from disk for one row: so many.
ROW_GROUP = 64

Losses = Callable[[dict[str, Tensor]], Tensor]


class CachedLosses:
    """The losses of every row's response tokens, from a complete cache; files are memory-mapped,
    row groups decoded."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._starts = np.array([start for start, _, _ in spans])
        self._paths = [path for _, _, path in spans]
        self._file = lru_cache(maxsize=16)(self._open)
        self._group = lru_cache(maxsize=4)(self._read_group)
        for number in range(len(spans)):
            self._file(number)

    def __getitem__(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Losses of the response tokens of a row, (R,): those of its first document, then of its
        second."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        group, place = divmod(row - int(self._starts[file]), ROW_GROUP)
        losses = self._group(file, group)[place].values
        return np.array(losses.to_numpy(zero_copy_only=False), dtype=np.float32)

    def _open(self, number: int) -> Any:
        path = self._paths[number]
        try:
            return pq.ParquetFile(path, memory_map=True)
        except FileNotFoundError:
            raise UserError(
                f"{path} is not there for rank {collectives.rank()}, which did not write it: set "
                "reference.cache to a "
                "folder that all nodes see"
            ) from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} is damaged ({error}); remove it, and its losses are computed again"
            ) from None

    def _read_group(self, number: int, group: int) -> Any:
        return (
            self._file(number).read_row_group(group, columns=["nll"]).column("nll").combine_chunks()
        )


class CacheFolder:
    """Where the losses of one dataset are gathered, by all ranks together; rank 0 writes.

    Raises UserError where the folder holds losses of something else, naming what differs.
    """

    def __init__(self, path: Path, rows: int, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows = rows
        collectives.on_rank_0(lambda: self._claim(settings))

    def done(self) -> int:
        """How many rows it has, from the first on."""
        return max((end for _, end, _ in self._spans()), default=0)

    def open(self) -> CachedLosses:
        """Its losses, when it is complete. Raises UserError on every rank if any cannot read
        them."""
        spans = self._spans()
        return collectives.agree(lambda: CachedLosses(spans))

    def _spans(self) -> list[Span]:
        return collectives.on_rank_0(lambda: _longest_chain(self.path, self.rows))

    def add(self, start: int, losses: Sequence[np.ndarray[Any, np.dtype[np.float32]]]) -> None:
        """Writes the losses of some consecutive rows from `start`; a crash leaves them all or
        none."""

        def write() -> None:
            offsets = np.cumsum([0, *map(len, losses)]).astype(np.int32)
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(losses)))
            final = self.path / f"rows-{start:09}-{start + len(losses):09}.parquet"
            numbers = pa.array(np.arange(start, start + len(losses)))
            table = pa.table({"row": numbers, "nll": column})
            publish(final, lambda partial: pq.write_table(table, partial, row_group_size=ROW_GROUP))

        try:
            collectives.on_rank_0(write)
        except OSError as error:
            raise UserError(
                f"cannot write the losses of the reference to {self.path}: {error}"
            ) from None

    def _claim(self, settings: dict[str, Any]) -> None:
        file = self.path / SETTINGS
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if file.exists():
                _check_settings(file, settings)
                return
            if any(path.suffix != PARTIAL for path in self.path.iterdir()):
                raise UserError(
                    f"reference.cache: {self.path} holds other files; choose an empty or a "
                    "new folder"
                )
            publish_text(file, json.dumps(settings, indent=1))
        except OSError as error:
            raise UserError(
                f"cannot write the reference's losses to {self.path}: {error}"
            ) from None


class Reference:
    """A run's reference model, as micro-batches see it: the token losses that become their
    `reference_nll`.

    Every rank must build it, when the starting model has its engine and before a checkpoint is
    loaded into it. `starting_losses` gives the token losses (B, T) of the model as it starts,
    `parts` are the datasets whose rows will be asked for. `identity` is a hash of the reference's
    weights and configuration. Raises UserError for a cache of something else, or a loss that is not
    finite.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        parts: dict[str, TokenDataset],
        decoder: Decoder,
        starting_losses: Losses,
        device: torch.device,
    ) -> None:
        self._config = config
        self._device = device
        name = config.reference.model
        self.identity = (
            _identity_of_start(decoder, device) if name is None else _identity_of_files(name)
        )
        self._cached: dict[TokenDataset, CachedLosses] = {}
        self._online: TokenLosses | None = None
        if config.reference.mode == "online":
            self._online = self._load()
            return
        folders = self._folders(tokenizer, parts)
        unfinished = [each for each, folder in folders.items() if folder.done() < folder.rows]
        other = self._load() if unfinished and name is not None else None
        with evaluating(decoder.model) if unfinished else nullcontext():
            for each in unfinished:
                self._fill(
                    folders[each],
                    each,
                    parts[each],
                    other or starting_losses,
                    tokenizer.pad_token_id,
                )
        if other is not None:
            zero3.release(other)
        self._cached = {part: folders[each].open() for each, part in parts.items()}

    def cached(self, part: TokenDataset) -> CachedLosses | None:
        """The losses of a part's rows, where they are cached."""
        return self._cached.get(part)

    @property
    def is_online(self) -> bool:
        return self._online is not None

    def complete(self, batches: Sequence[dict[str, Tensor]]) -> None:
        """Computes the batches' losses online. Every rank must call it, with equally many
        batches."""
        assert self._online is not None, "cached losses come with the batches"
        for batch in batches:
            batch["reference_nll"] = self._online(batch)

    def _folders(
        self, tokenizer: PreTrainedTokenizerBase, parts: dict[str, TokenDataset]
    ) -> dict[str, CacheFolder]:
        config = self._config
        settings = {
            "format_version": FORMAT_VERSION,
            "model_sha256": self.identity,
            "dtype": config.model.dtype,
            "tokenizer_sha256": tokenizer_identity(tokenizer),
            "lengths": _lengths(config),
        }
        folders = {}
        for part_name, part in parts.items():
            own = {**settings, "data": part.identity, "rows": len(part)}
            if config.reference.cache is not None:
                path = config.reference.cache.expanduser() / part_name.removeprefix("data.")
            else:
                path = config.data.cache_dir.expanduser() / f"reference-{fingerprint(own)[:32]}"
            folders[part_name] = CacheFolder(path, len(part), own)
        return folders

    def _load(self) -> TokenLosses:
        """The reference model, sharded as the configuration has it, for forward passes."""
        config = self._config
        values = inference_config(config, offload=config.reference.offload)
        chosen = config.model
        if config.reference.model is not None:
            chosen = chosen.model_copy(
                update={"name_or_path": config.reference.model, "lora": None}
            )
        model = TokenLosses(decoder_of(load_model(chosen, values, config.train.seed).eval()))
        build_inference_engine(model, values, self._device)
        return model

    def _fill(
        self, folder: CacheFolder, name: str, part: TokenDataset, losses: Losses, pad_token: int
    ) -> None:
        """Computes what is missing, in blocks of consecutive rows; the rows of a block are dealt to
        the ranks."""
        done, config = folder.done(), self._config
        rank, ranks = collectives.rank(), collectives.world_size()
        title = f"Reference losses of {name}"
        with Countdown(title, "rows", done, len(part), active=rank == 0) as countdown:
            while done < len(part):
                rows = np.arange(done, min(done + config.reference.save_every, len(part)))
                layout = Layout(
                    size=min(config.train.micro_batch_size, -(-len(rows) // ranks)),
                    pad_token=pad_token,
                )
                own = [torch.zeros(0, 2, dtype=torch.float64, device=self._device)]
                for number, dealt in enumerate(
                    micro_batches(part, rows, layout, rank, ranks), start=1
                ):
                    batch = {key: tensor.to(self._device) for key, tensor in dealt.items()}
                    own.append(_by_row(batch, losses(batch)))
                    countdown.advance(done + min(number * layout.size * ranks, len(rows)))
                everywhere = collectives.gather_rows(torch.cat(own)).cpu()
                everywhere = everywhere[everywhere[:, 0].argsort(stable=True)]
                found, counts = everywhere[:, 0].long().unique_consecutive(return_counts=True)
                assert found.tolist() == rows.tolist(), (
                    "every row has a response token, and is dealt once"
                )
                finite = torch.isfinite(everywhere[:, 1])
                if not bool(finite.all()):
                    faulty = part.location(int(everywhere[~finite][0, 0]))
                    raise UserError(
                        f"the reference's loss of {faulty} is not finite; try model.dtype=float32"
                    )
                folder.add(
                    done, [each.float().numpy() for each in everywhere[:, 1].split(counts.tolist())]
                )
                done = int(rows[-1]) + 1


def check_reference(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known of the reference before any weight is read. Raises UserError, for another
    vocabulary too."""
    name = config.reference.model
    if not config.needs_reference:
        if config.reference != type(config.reference)():
            raise UserError("section reference is given, but nothing is compared with a reference")
        return
    if name is None:
        return
    try:
        size = AutoConfig.from_pretrained(name).get_text_config().vocab_size
        own_size = (
            AutoConfig.from_pretrained(config.model.name_or_path).get_text_config().vocab_size
        )
    except (OSError, ValueError) as error:
        raise UserError(f"reference.model={name} cannot be loaded: {error}") from None
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError):  # a folder of weights alone
        if size == own_size:
            return
        vocabulary = {}
    if vocabulary != tokenizer.get_vocab():
        raise UserError(
            f"reference.model={name} has another vocabulary ({size} tokens) than "
            f"{config.model.name_or_path} "
            f"({own_size} tokens), so losses of tokens cannot be compared; choose a reference of "
            "the same family"
        )


def _by_row(batch: dict[str, Tensor], nll_BT: Tensor) -> Tensor:
    """(row, loss) of each response token in order of documents, (R, 2) float64."""
    response_BT, _ = loss_positions(batch["labels"])
    document_R, order_R = batch["document_ids"][response_BT].sort(stable=True)
    return torch.stack(
        [batch["rows"][document_R].double(), nll_BT[response_BT][order_R].double()], dim=1
    )


def _longest_chain(folder: Path, rows: int) -> list[Span]:
    """Files that together cover the rows from 0 on, as far as any do. Two runs may have cut them
    differently."""
    files = sorted(
        (int(match[1]), int(match[2]), path)
        for path in folder.iterdir()
        if (match := ROWS_FILE.fullmatch(path.name))
    )
    chains: dict[int, list[Span]] = {0: []}
    for start, end, path in files:
        if start in chains and end <= rows:
            chains.setdefault(end, [*chains[start], (start, end, path)])
    return chains[max(chains)]


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}; remove the folder") from None
    changed = differences(theirs, settings)
    if changed:
        raise UserError(
            f"{file.parent} holds losses of something else; remove it, or set "
            "reference.cache to another folder:\n  " + "\n  ".join(changed)
        )


def _lengths(config: RunConfig) -> dict[str, int]:
    if isinstance(config, PreferenceRunConfig):
        return config.preference.model_dump(include={"max_prompt_tokens", "max_response_tokens"})
    return {"max_length": config.data.max_length}


def _identity_of_start(decoder: Decoder, device: torch.device) -> str:
    """Of the starting model; fresh adapters change nothing of what it computes."""
    weights = {name: each for name, each in decoder.model.named_parameters() if "lora_" not in name}
    described = decoder.model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        described.pop(key, None)
    return fingerprint([model_identity(weights, device)[0], described])


def _identity_of_files(name: str) -> str:
    """Of the files of weights and configuration in a folder, or of a hub name's commit."""

    def digest() -> str:
        if not Path(name).is_dir():
            return f"{name}@{AutoConfig.from_pretrained(name)._commit_hash}"
        endings = ("*.safetensors", "*.bin", "config.json")
        files = sorted(path for ending in endings for path in Path(name).glob(ending))
        return fingerprint([file_sha256(file) for file in files])

    return collectives.on_rank_0(digest)
