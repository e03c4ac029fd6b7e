"""The Fisher of a configured run: estimated on its prompts, checked against its model, and made
into drift."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from alphatoken.batch import IGNORE_INDEX, Batch, make_batch, to_device
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import FisherConfig
from alphatoken.data.batches import Layout, micro_batches
from alphatoken.data.chat import tokenizer_identity
from alphatoken.data.noise import uniform_noise
from alphatoken.data.splits import Prompts, load_prompts, load_splits
from alphatoken.data.tokenizer import load_tokenizer, stop_tokens, tokens_of
from alphatoken.distributed import collectives
from alphatoken.distributed.engine import build_inference_engine
from alphatoken.distributed.ranks import initialise_ranks
from alphatoken.distributed.settings import inference_config
from alphatoken.errors import UserError
from alphatoken.models.decoder import Decoder, decoder_of, evaluating
from alphatoken.models.generation import prompts_of
from alphatoken.models.identity import model_identity
from alphatoken.models.loading import load_model, settle_model
from alphatoken.models.scored import scored_depth
from alphatoken.stability.fisher_folder import EstimateFolder
from alphatoken.stability.fisher_sum import FisherSum
from alphatoken.stability.sampling import rollouts, teacher_forced
from alphatoken.util.memory import peak_memory
from alphatoken.util.progress import Countdown

FORMAT_VERSION = 2


def fisher_folder(config: RunConfig) -> Path:
    """Where the run's own estimate is written."""
    return config.fisher.output or config.train.output_dir / "fisher"


def estimate_fisher(
    config: RunConfig,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    device: torch.device,
) -> Path:
    """The folder with the diagonal Fisher of the model as it is now; one with the same settings is
    not made again.

    An interrupted estimate goes on where it was last saved. Every rank must call it, with
    DeepSpeed's hooks in place if the model is sharded. Raises UserError when the folder holds an
    estimate with other settings, is being written by another run, or cannot be written, or a
    gradient is not finite.
    """
    chosen = config.fisher
    depth = scored_depth(config.valuation.layers, len(decoder.layers))
    total = FisherSum(
        decoder,
        depth,
        chosen.square,
        device,
        parameters=config.valuation.parameters,
        chunk_tokens=config.valuation.chunk_tokens,
    )
    model_sha256, weights = model_identity(dict(decoder.model.named_parameters()), device)
    settings = {
        **_settings(chosen, tokenizer, prompts),
        "dtype": config.model.dtype,
        "layers": depth,
        "parameters": config.valuation.parameters,
        "lora": lora_settings(config),
        "model_sha256": model_sha256,
    }
    about = {
        "model": config.model.name_or_path,
        "weights": {name: weights[name] for name in total.parameters},
        "versions": {
            package: version(package) for package in ("alphatoken", "torch", "transformers")
        },
    }
    folder = EstimateFolder(fisher_folder(config), settings, about)
    with folder.claimed() as is_to_be_made:
        if is_to_be_made:
            _make(folder, total, config, decoder, tokenizer, prompts, device=device)
    return folder.path


def _make(
    folder: EstimateFolder,
    total: FisherSum,
    config: RunConfig,
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    *,
    device: torch.device,
) -> None:
    """Sums over what a folder lacks, and finishes it."""
    chosen, ranks = config.fisher, collectives.world_size()
    done = folder.resume(total)
    by_length = prompts.rows[np.argsort(-prompts.dataset.lengths[prompts.rows], kind="stable")]
    layout = Layout(
        size=chosen.batch_size, pad_token=tokenizer.pad_token_id, noise_key=(chosen.seed, 0)
    )
    batches = micro_batches(prompts.dataset, by_length[done:], layout, collectives.rank(), ranks)
    stops = stop_tokens(config.model, tokenizer)
    title = f"Fisher ({chosen.sampling}, {chosen.square} square)"
    countdown = Countdown(title, "prompts", done, len(by_length), active=collectives.rank() == 0)
    with evaluating(decoder.model), torch.no_grad(), countdown:
        for number, dealt in enumerate(batches, start=1):
            batch = to_device(dealt, device)
            if chosen.sampling == "rollout":
                batch = _answered(batch, decoder, chosen, stops, layout.pad_token)
            entry, hidden_BTH = total.forward(batch["input_ids"])
            if chosen.sampling == "teacher_forced":
                with total.head() as head:
                    batch = teacher_forced(
                        batch, hidden_BTH, head, batch["noise"], decoder.logit_softcap
                    )
            total.add(entry, batch)
            done = min(done + chosen.batch_size * ranks, len(by_length))
            countdown.advance(done)
            if number % chosen.save_every == 0 and number < len(batches):
                folder.save(total, done)
    folder.finish(total, len(by_length))


def run_fisher(config: RunConfig) -> None:
    """Loads the configured model and prompts, estimates, and says where the result is. Every rank
    must call it."""
    prepared = prepare_estimate(config)
    began = time.monotonic()
    folder = estimate_fisher(
        config, prepared.decoder, prepared.tokenizer, prepared.prompts, prepared.device
    )
    if collectives.rank() == 0:
        minutes = timedelta(seconds=round(time.monotonic() - began))
        memory = f"{peak_memory(prepared.device) / 2**30:.2f} GiB"
        Console(highlight=False).print(
            f"{folder}: Fisher of {prepared.prompts}; {minutes}, peak memory of rank 0 {memory}",
            markup=False,
            soft_wrap=True,
        )


@dataclass(frozen=True)
class Prepared:
    """What an estimate outside of training needs."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    device: torch.device


def prepare_estimate(config: RunConfig) -> Prepared:
    """Loads model and prompts for `estimate_fisher`, outside of training. Every rank must call it.

    Raises UserError for bad input before any weight is read.
    """
    if config.fisher.prompts is None and config.data.validation is None:
        raise UserError("the Fisher needs prompts: set fisher.prompts, or data.validation")
    if config.valuation.reference is not None:
        raise UserError(
            f"the Fisher is of the reference: set model.name_or_path={config.valuation.reference} "
            "and leave out valuation.reference"
        )
    device = initialise_ranks(config.deepspeed.timeout_minutes)
    deepspeed_values = inference_config(config)
    tokenizer = load_tokenizer(config.model)
    config = settle_model(config)
    prompts = load_prompts(config, tokenizer, load_splits(config, tokenizer).train)
    model = load_model(config.model, deepspeed_values, config.train.seed, tokens_of(tokenizer))
    build_inference_engine(model, deepspeed_values, device)
    return Prepared(decoder=decoder_of(model), tokenizer=tokenizer, prompts=prompts, device=device)


def _answered(
    batch: Batch,
    decoder: Decoder,
    config: FisherConfig,
    stops: list[int],
    pad_token: int,
) -> Batch:
    """The batch's prompts with sampled completions. A placeholder generates along with the others,
    for nothing."""
    rows = batch["rows"].tolist()
    prompts = prompts_of(batch)
    uniform_BN = torch.stack(
        [uniform_noise(config.seed, 0, row, config.max_new_tokens) for row in rows or [0]]
    )
    answered = rollouts(decoder, prompts, uniform_BN.to(prompts[0].device), stops, pad_token)
    if not rows:
        nothing_BT = torch.full_like(answered["labels"], IGNORE_INDEX)
        return make_batch({"input_ids": answered["input_ids"], "labels": nothing_BT})
    return answered


def lora_settings(config: RunConfig) -> dict[str, Any] | None:
    return None if config.model.lora is None else config.model.lora.model_dump(mode="json")


def _settings(
    config: FisherConfig, tokenizer: PreTrainedTokenizerBase, prompts: Prompts
) -> dict[str, Any]:
    """What decides the estimate, besides the model. The prompts' hash covers how they were
    tokenised and cut."""
    tokens = hashlib.sha256()
    for row in prompts.rows:
        for document in prompts.dataset[int(row)]:
            for column in document:
                tokens.update(np.ascontiguousarray(column).tobytes())
    return {
        "format_version": FORMAT_VERSION,
        "sampling": config.sampling,
        "square": config.square,
        "seed": config.seed,
        "max_new_tokens": config.max_new_tokens if config.sampling == "rollout" else None,
        "prompts": len(prompts.rows),
        "prompts_sha256": tokens.hexdigest(),
        "tokenizer_sha256": tokenizer_identity(tokenizer),
    }
