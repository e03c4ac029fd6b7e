"""Token losses of a reference model: of all rows once, before training and cached on disk, or of
each micro-batch.

A cache is a folder of Parquet files, one for some consecutive rows of a dataset each, and
`settings.json`, which says what they are of. It is complete when the files cover the dataset;
whoever finds an unfinished one goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from alphatoken.batch import Batch, to_device
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data.batches import Layout, micro_batches
from alphatoken.data.cache import TokenDataset
from alphatoken.data.chat import tokenizer_identity
from alphatoken.data.pretrained import embeddings_of
from alphatoken.data.tokenizer import tokens_of
from alphatoken.distributed import collectives, zero3
from alphatoken.distributed.engine import build_inference_engine
from alphatoken.distributed.settings import inference_config
from alphatoken.errors import UserError
from alphatoken.models.decoder import Decoder, decoder_of, evaluating
from alphatoken.models.identity import model_identity
from alphatoken.models.loading import load_model, usable_attention
from alphatoken.models.token_losses import TokenLosses
from alphatoken.reference.cache import FORMAT_VERSION, CachedLosses, CacheFolder
from alphatoken.util.files import file_sha256, fingerprint
from alphatoken.util.progress import Countdown

Losses = Callable[[Batch], Tensor]


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
            self._online = self._load(tokens_of(tokenizer))
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
        self._cached = {part: folders[each].open() for each, part in parts.items()}

    def cached(self, part: TokenDataset) -> CachedLosses | None:
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

    def _load(self, tokens: int) -> TokenLosses:
        """The reference model, sharded as the configuration has it, for forward passes."""
        config = self._config
        values = inference_config(config, offload=config.reference.offload)
        chosen = config.model
        if config.reference.model is not None:
            chosen = chosen.model_copy(
                update={"name_or_path": config.reference.model, "lora": None}
            )
            chosen = chosen.model_copy(update={"attn_implementation": usable_attention(chosen)})
        model = load_model(chosen, values, config.train.seed, tokens).eval()
        losses = TokenLosses(decoder_of(model))
        build_inference_engine(losses, values, self._device)
        return losses

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
                    batch = to_device(dealt, self._device)
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


def _by_row(batch: Batch, nll_BT: Tensor) -> Tensor:
    """(row, loss) of each response token in order of documents, (R, 2) float64."""
    response_BT = batch["response"]
    document_R, order_R = batch["document_ids"][response_BT].sort(stable=True)
    return torch.stack(
        [batch["rows"][document_R].double(), nll_BT[response_BT][order_R].double()], dim=1
    )


def _lengths(config: RunConfig) -> dict[str, int]:
    if isinstance(config, PreferenceRunConfig):
        return config.preference.model_dump(include={"max_prompt_tokens", "max_response_tokens"})
    return {"max_length": config.data.max_length}


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
