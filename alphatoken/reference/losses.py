"""Token losses of a reference model: of all rows once, before training and cached on disk, or of
each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from alphatoken.batch import Batch
from alphatoken.config.run import RunConfig
from alphatoken.data.batches import Layout
from alphatoken.data.cache import TokenDataset
from alphatoken.data.chat import tokenizer_identity
from alphatoken.data.pretrained import embeddings_of, read_settings
from alphatoken.data.tokenizer import tokens_of
from alphatoken.distributed import collectives, zero3
from alphatoken.distributed.engine import build_inference_engine
from alphatoken.distributed.settings import inference_config
from alphatoken.errors import UserError
from alphatoken.models.compatibility import check_divided_rows
from alphatoken.models.decoder import Decoder, decoder_of, evaluating
from alphatoken.models.identity import model_identity
from alphatoken.models.loading import load_model, usable_attention
from alphatoken.models.token_losses import TokenLosses
from alphatoken.passes.divided_attention import divide_attention
from alphatoken.store.filling import fill
from alphatoken.store.rows_folder import Contents, RowsFolder, StoredColumn
from alphatoken.store.values import lengths_of
from alphatoken.util.files import file_sha256, fingerprint

Losses = Callable[[Batch], Tensor]

FORMAT_VERSION = 1
CONTENTS = Contents("losses", "the losses of the reference", "reference.cache")
NLL = "nll"


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
        self._cached: dict[TokenDataset, StoredColumn] = {}
        self._online: TokenLosses | None = None
        if config.reference.mode == "online":
            divided = config.train.sequence_parallel > 1
            self._online = self._load(tokens_of(tokenizer), divided=divided)
            return
        folders = self._folders(tokenizer, parts)
        unfinished = [each for each, folder in folders.items() if folder.done() < folder.rows]
        other = self._load(tokens_of(tokenizer)) if unfinished and name is not None else None
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
        self._cached = {part: folders[each].column(NLL) for each, part in parts.items()}

    def cached(self, part: TokenDataset) -> StoredColumn | None:
        """The losses of a part's rows, where they are cached."""
        return self._cached.get(part)

    @property
    def is_online(self) -> bool:
        return self._online is not None

    def complete(self, batches: Sequence[Batch]) -> None:
        """Computes the batches' losses online. Every rank must call it, with equally many
        batches."""
        assert self._online is not None, "cached losses come with the batches"
        for batch in batches:
            batch["reference_nll"] = self._online(batch)

    def _folders(
        self, tokenizer: PreTrainedTokenizerBase, parts: dict[str, TokenDataset]
    ) -> dict[str, RowsFolder]:
        config = self._config
        settings = {
            "format_version": FORMAT_VERSION,
            "model_sha256": self.identity,
            "dtype": config.model.dtype,
            "tokenizer_sha256": tokenizer_identity(tokenizer),
            "lengths": lengths_of(config),
        }
        folders = {}
        for part_name, part in parts.items():
            own = {**settings, "data": part.identity, "rows": len(part)}
            if config.reference.cache is not None:
                path = config.reference.cache / part_name.removeprefix("data.")
            else:
                path = config.data.cache_dir / f"reference-{fingerprint(own)[:32]}"
            folders[part_name] = RowsFolder(path, len(part), own, CONTENTS)
        return folders

    def _load(self, tokens: int, *, divided: bool = False) -> TokenLosses:
        """The reference model, sharded as the configuration has it, for forward passes; `divided`:
        on rows that are divided over ranks."""
        config = self._config
        values = inference_config(config, offload=config.reference.offload)
        chosen = config.model
        if config.reference.model is not None:
            chosen = chosen.model_copy(
                update={"name_or_path": config.reference.model, "lora": None}
            )
            chosen = chosen.model_copy(update={"attn_implementation": usable_attention(chosen)})
        seed = config.train.seed
        model = load_model(chosen, values, seed, tokens, key="reference.model").eval()
        decoder = decoder_of(model)
        if divided:
            divide_attention(decoder)
        losses = TokenLosses(decoder)
        build_inference_engine(losses, values, self._device)
        return losses

    def _fill(
        self, folder: RowsFolder, name: str, part: TokenDataset, losses: Losses, pad_token: int
    ) -> None:
        config, ranks = self._config, collectives.world_size()

        def layout(rows: int) -> Layout:
            size = min(config.train.micro_batch_size, -(-rows // ranks))
            return Layout(size=size, pad_token=pad_token)

        fill(
            folder,
            part,
            lambda batch: {NLL: losses(batch).float()},
            layout=layout,
            block_rows=config.reference.save_every,
            device=self._device,
            title=f"Reference losses of {name}",
            number="the reference's loss",
        )


def check_reference(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """What can be known of the reference before any weight is read. Raises UserError, for another
    vocabulary too."""
    name = config.reference.model
    if not config.needs_reference:
        if config.reference != type(config.reference)():
            raise UserError(
                "section reference is given, but nothing is compared with a reference: leave it "
                "out" + ("" if name is None else f", or set reference.model=null (it is {name})")
            )
        return
    if name is None:
        return
    if config.reference.mode == "online" and config.train.sequence_parallel > 1:
        check_divided_rows(read_settings(name, "reference.model"), config.train.sequence_parallel)
    size = embeddings_of(name, "reference.model")
    own_size = embeddings_of(config.model.name_or_path)
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError):  # a folder of weights alone
        if size == own_size:
            return
        vocabulary = {}
    if vocabulary != tokenizer.get_vocab():
        raise UserError(
            f"reference.model={name} has another vocabulary ({size} tokens) than "
            f"{config.model.name_or_path} ({own_size} tokens), so losses of tokens cannot be "
            "compared; choose a reference of the same family"
        )


def _identity_of_start(decoder: Decoder, device: torch.device) -> str:
    """A hash of the starting model's weights and configuration. Adapters are left out, as fresh
    ones change nothing of what it computes."""
    weights = {name: each for name, each in decoder.model.named_parameters() if "lora_" not in name}
    described = decoder.model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        described.pop(key, None)
    return fingerprint([model_identity(weights, device)[0], described])


def _identity_of_files(name: str) -> str:
    """A hash of the files of weights and configuration in a folder, or a hub name's commit."""

    def digest() -> str:
        if not Path(name).is_dir():
            return f"{name}@{AutoConfig.from_pretrained(name)._commit_hash}"
        endings = ("*.safetensors", "*.bin", "config.json")
        files = sorted(path for ending in endings for path in Path(name).glob(ending))
        return fingerprint([file_sha256(file) for file in files])

    return collectives.on_rank_0(digest)
