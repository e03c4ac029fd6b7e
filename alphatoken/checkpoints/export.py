"""A checkpoint as a Hugging Face folder, from its shards, on any machine: no ranks, no GPU, one
file of memory."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alphatoken.checkpoints.files import (
    ABOUT,
    SHARDS,
    damage,
    read_description,
    step_folders,
)
from alphatoken.distributed import collectives, zero3
from alphatoken.errors import UserError
from alphatoken.models.token_losses import WEIGHTS
from alphatoken.util.files import PARTIAL, publish_folder


def export_model(engine: Any, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Writes the current weights as a Hugging Face folder, which is there whole or not at all, in
    place of an older one. Every rank must call it; rank 0 holds the whole model.

    Raises UserError where the disk refuses, and on the other ranks RemoteError.
    """
    state = zero3.consolidated_state(engine)

    def write(partial: Path) -> None:
        assert state is not None
        weights = {
            name.removeprefix(WEIGHTS): tensor
            for name, tensor in state.items()
            if name.startswith(WEIGHTS)
        }
        engine.module.lm.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)

    def publish() -> None:
        try:
            publish_folder(target, write)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the export {target}: {error}; make room, then continue with "
                "train.resume=auto where the run has checkpoints"
            ) from None

    collectives.on_rank_0(publish)


SHARD_BYTES = 2 * 2**30

MODEL_CARD = """\
---
base_model: {{ base | tojson }}
library_name: {{ library }}
tags: [alphatoken]
---

# {{ name }}

{{ what }} of {{ base }}: {{ step }} optimizer steps of {{ method }} with AlphaToken {{ versions.alphatoken }}.
{%- if valued %} Only tokens chosen by their value were trained on ([arXiv 2606.01635](https://arxiv.org/abs/2606.01635)).
{%- endif %}

## Settings

```yaml
{{ settings }}
```

## Data

{% for part, sources in data.items() -%}
{% for source in sources -%}
- {{ part }}: `{{ source.path }}`, {{ source.rows }} rows; hash of content and tokenisation `{{ source.identity }}`
{% endfor -%}
{% endfor %}
Made with{% for package, number in versions.items() %} {{ package }} {{ number }}{{ "," if not loop.last }}{% endfor %}.
"""  # noqa: E501


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    step: int
    parameters: int
    files: int


def export_checkpoint(
    run: Path, target: Path, step: int | None = None, *, merge: bool = False
) -> Exported:
    """Writes the newest undamaged checkpoint of a run (or that of `step`) to the new folder
    `target`.

    Weights get the run's `model.dtype`, from the fp32 masters. Adapters are written as such, or
    merged into the model they belong to, which then has to fit in memory. Raises UserError for a
    folder that is no run, a damaged checkpoint, or a target that exists.
    """
    if target.exists():
        raise UserError(f"{target} exists; name a new folder")
    checkpoint = _checkpoint_of(run, step)
    description = read_description(checkpoint)
    config = description["config"]
    if merge and config["model"]["lora"] is None:
        raise UserError(
            f"--merge: the run {run} trained whole weights, there are no adapters to merge"
        )
    model_files = run / "model"
    if not (model_files / "config.json").is_file():
        raise UserError(f"{model_files} is missing; is {run} a run folder?")
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL}")
    shutil.copytree(model_files, partial)
    about = json.loads((partial / ABOUT).read_text(encoding="utf-8"))
    (partial / ABOUT).unlink()

    dtype = getattr(torch, config["model"]["dtype"])
    weights = ((name, tensor.to(dtype)) for name, tensor in _weights(checkpoint))
    if config["model"]["lora"] is not None:
        adapters = {
            _adapter_name(name): tensor.contiguous() for name, tensor in weights if "lora_" in name
        }
        save_file(adapters, partial / "adapter_model.safetensors", {"format": "pt"})
        parameters = sum(tensor.numel() for tensor in adapters.values())
        written = _Written(parameters=parameters, files=1)
        if merge:
            _merge(partial, config["model"]["name_or_path"], dtype)
        else:
            (partial / "config.json").unlink()
    else:
        (partial / "adapter_config.json").unlink(missing_ok=True)
        written = _save_shards(partial, _untied(partial, weights))
    card = _model_card(
        run, description, about, adapter=config["model"]["lora"] is not None and not merge
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(target)
    return Exported(
        folder=target,
        step=description["step"],
        parameters=written.parameters,
        files=written.files,
    )


def _checkpoint_of(run: Path, step: int | None) -> Path:
    folders = step_folders(run / "checkpoints")
    if not folders:
        raise UserError(f"{run / 'checkpoints'} has no checkpoint; was train.save_every set?")
    if step is not None and step not in folders:
        raise UserError(
            f"{run} has no checkpoint of step {step}, but of {', '.join(map(str, sorted(folders)))}"
        )
    wanted = list(folders.values()) if step is None else [folders[step]]
    problems = []
    for checkpoint in wanted:
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        problems.append(problem)
    raise UserError(f"no undamaged checkpoint in {run}: " + "; ".join(problems))


def _weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole, by its name in the model; one at a time."""
    if any(checkpoint.glob(SHARDS)):
        state = zero3.masters_of(checkpoint)
    else:
        (file,) = checkpoint.glob("*model_states.pt")
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    for name in state:
        if name.startswith(WEIGHTS):
            yield name.removeprefix(WEIGHTS), state[name].contiguous()


def _untied(folder: Path, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Without what the model class ties to another weight by itself."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    return ((name, tensor) for name, tensor in weights if name not in tied)


@dataclass(frozen=True)
class _Written:
    """How much was written to safetensors files."""

    parameters: int
    files: int


def _save_shards(folder: Path, weights: Iterator[tuple[str, Tensor]]) -> _Written:
    """Writes safetensors files of at most SHARD_BYTES (or one weight) and their index."""
    shards: list[Path] = []
    places: dict[str, int] = {}
    pending: dict[str, Tensor] = {}
    pending_bytes = parameters = total_bytes = 0

    def flush() -> None:
        file = folder / f"shard-{len(shards)}.safetensors"
        save_file(pending, file, {"format": "pt"})
        places.update(dict.fromkeys(pending, len(shards)))
        shards.append(file)
        pending.clear()

    for name, tensor in weights:
        if pending and pending_bytes + tensor.nbytes > SHARD_BYTES:
            flush()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
        parameters += tensor.numel()
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return _Written(parameters=parameters, files=1)
    names = [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    for file, name in zip(shards, names, strict=True):
        file.rename(folder / name)
    weight_map = {key: names[place] for key, place in places.items()}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=1), encoding="utf-8"
    )
    return _Written(parameters=parameters, files=len(shards))


def _adapter_name(name: str) -> str:
    """Turns a parameter's name in the model into its name in peft's own files."""
    return "base_model.model." + name.replace(".default.", ".")


def _merge(folder: Path, base: str, dtype: torch.dtype) -> None:
    """Replaces adapters by the whole weights they make."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged: Any = peft.PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    for file in folder.glob("adapter_*"):
        file.unlink()
    merged.save_pretrained(folder)


def _model_card(
    run: Path, description: Mapping[str, Any], about: Mapping[str, Any], *, adapter: bool
) -> str:
    config = description["config"]
    shown = ("preference", "valuation", "selection", "optim")
    settings = yaml.safe_dump({key: config[key] for key in shown if key in config}, sort_keys=False)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    objective = config.get("preference", {}).get("objective")
    return environment.from_string(MODEL_CARD).render(
        name=run.resolve().name,
        base=config["model"]["name_or_path"],
        what="LoRA adapters" if adapter else "A fine-tuned version",
        library="peft" if adapter else "transformers",
        method="supervised fine-tuning"
        if objective is None
        else f"preference optimization ({objective})",
        step=description["step"],
        valued=config["valuation"]["enabled"],
        settings=settings.strip(),
        data=about["data"],
        versions=description["versions"],
    )
