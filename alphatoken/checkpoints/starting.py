"""What a run writes into its folder before the first step."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alphatoken.checkpoints.files import ABOUT
from alphatoken.checkpoints.folder import RunFolder
from alphatoken.checkpoints.weight_files import prefixes_of
from alphatoken.config.file import save_config
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives
from alphatoken.util.files import publish_text, writing


def start_run_folder(
    folder: RunFolder,
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
) -> None:
    """Creates the folder and writes what is known before the first step, on rank 0: the resolved
    configuration, and what an export needs besides weights (the model's configuration and
    tokenizer, `about`: the data, and the prefixes of the names in its files). Raises UserError when
    the disk refuses.
    """

    @writing(folder.path)
    def write() -> None:
        folder.model.mkdir(parents=True, exist_ok=True)
        save_config(config, folder.config)
        model.config.save_pretrained(folder.model)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder.model)
        tokenizer.save_pretrained(folder.model)
        for adapters in getattr(model, "peft_config", {}).values():
            adapters.base_model_name_or_path = config.model.name_or_path
            adapters.save_pretrained(folder.model)
        known = {**about, "prefixes": prefixes_of(model)}
        publish_text(folder.model / ABOUT, json.dumps(known, indent=1))

    collectives.on_rank_0(write)
