"""The drift of a run: its Fisher and its reference."""

from __future__ import annotations

from pathlib import Path

import torch

from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives, zero3
from alphatoken.distributed.shard_files import TensorFile
from alphatoken.errors import UserError
from alphatoken.models.decoder import Decoder
from alphatoken.models.identity import model_identity
from alphatoken.models.scored import scored_depth
from alphatoken.stability.drift import Drift
from alphatoken.stability.estimate import lora_settings


def check_files(config: RunConfig) -> None:
    """Raises UserError where `valuation.fisher` or `valuation.reference` is given and cannot be
    read."""
    for file in (config.valuation.fisher, config.valuation.reference):
        if file is not None:
            TensorFile(file)


def build_drift(
    config: RunConfig, fisher: Path, decoder: Decoder, device: torch.device
) -> tuple[Drift, str | None]:
    """The drift from the configured reference, by default the weights of this moment; and a note,
    if there is one.

    Raises UserError on every rank when the Fisher was estimated for another model than the
    reference, does not hold a scored weight, or cannot be read.
    """
    reference = config.valuation.reference
    depth = scored_depth(config.valuation.layers, len(decoder.layers))
    file = collectives.agree(lambda: TensorFile(fisher))
    parameters = decoder.stable_parameters(depth, config.valuation.parameters, also=file)
    reference_file = None if reference is None else collectives.agree(lambda: TensorFile(reference))
    drift = Drift(parameters, file, reference_file, device)
    if "settings" not in file.header:
        return (
            drift,
            f"valuation.fisher={file} does not say which model it is of, so that was not checked",
        )
    if not file.header["finished"]:
        raise UserError(
            f"{file} holds the sums of an unfinished estimate; run recipes/fisher.py again to "
            "finish it"
        )
    if file.header["settings"]["lora"] != lora_settings(config):
        raise UserError(
            f"the Fisher {file} was estimated with model.lora={file.header['settings']['lora']}, "
            f"not {lora_settings(config)}"
        )
    if reference_file is None:
        expected, (found, _) = (
            file.header["settings"]["model_sha256"],
            model_identity(dict(decoder.model.named_parameters()), device),
        )
        same, whose = expected == found, f"model.name_or_path={config.model.name_or_path}"
    else:
        checksums = zero3.checksums(parameters, device, reference_file.flat)
        same = checksums == {name: file.header["weights"].get(name) for name in parameters}
        whose = f"valuation.reference={reference}"
    if not same:
        raise UserError(
            f"the Fisher {file} was estimated for {file.header['model']} with other weights than "
            f"those of {whose}; estimate it again for this reference"
            + (
                ""
                if config.model.lora is None
                else ", or set the train.seed that its adapters started from"
            )
        )
    return drift, None
