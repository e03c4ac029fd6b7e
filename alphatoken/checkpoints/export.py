"""Hugging Face folders: of the engine's weights at the end of a run, and of a checkpoint, from its
shards, on any machine without ranks or GPU. Either takes the memory of one file of weights."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from alphatoken.checkpoints.files import (
    ABOUT,
    SHARDS,
    check_listing,
    damage,
    read_description,
)
from alphatoken.checkpoints.folder import checkpoints_to_export, step_folders
from alphatoken.checkpoints.weight_files import (
    Prefix,
    Source,
    WeightFiles,
    batches_to_save,
    names_to_save,
)
from alphatoken.data.pretrained import holds_adapters, read_settings
from alphatoken.distributed import collectives, zero3
from alphatoken.errors import UserError
from alphatoken.models.loading import check_whole
from alphatoken.models.token_losses import WEIGHTS
from alphatoken.util.files import PartialFolder, check_is_new


def export_model(
    engine: Any,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    on_file: Callable[[], None] = lambda: None,
) -> None:
    """Writes the current weights as a Hugging Face folder, which is there whole or not at all, in
    place of an older one.

    Every rank must call it: weights are gathered one by one, and rank 0 holds those of one file.
    `on_file` is called on every rank whenever those of another one are there. Raises UserError
    where the disk refuses, and on the other ranks RemoteError.
    """
    model: PreTrainedModel = engine.module.lm
    folder = PartialFolder(target)

    def on_rank_0(work: Callable[[], object]) -> None:
        def attempt() -> None:
            try:
                work()
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"cannot write the export {target}: {error}; make room, then continue with "
                    "train.resume=auto where the run has checkpoints"
                ) from None

        collectives.on_rank_0(attempt)

    try:
        on_rank_0(folder.create)
        if hasattr(model, "peft_config"):
            adapters = _read(model, _adapter_names(model), engine.device)
            on_rank_0(lambda: model.save_pretrained(folder.path, state_dict=adapters))
        else:
            # All that it writes but weights.
            on_rank_0(lambda: model.save_pretrained(folder.path, state_dict={}))
            files = WeightFiles(folder.path)
            sources = _sources(model, names_to_save(model), engine.device)
            for batch in batches_to_save(model, sources):
                on_file()
                on_rank_0(functools.partial(files.write, batch))
            on_rank_0(files.finish)
        on_rank_0(lambda: tokenizer.save_pretrained(folder.path))
        on_rank_0(folder.publish)
    finally:
        if collectives.rank() == 0:
            folder.discard()


def _adapter_names(model: PreTrainedModel) -> list[str]:
    """The names in memory of what peft keeps of a model with adapters."""
    places = {name: torch.empty(0, device="meta") for name in model.state_dict()}
    kept = {id(place) for place in model.get_adapter_state_dict(state_dict=places).values()}
    return [name for name, place in places.items() if id(place) in kept]


def _sources(
    model: PreTrainedModel, names: Sequence[str], device: torch.device
) -> dict[str, Source]:
    """The engine's weights by their names in memory."""
    parameters = {name: model.get_parameter_or_buffer(name) for name in names}
    return {
        name: Source(
            zero3.full_shape(parameter).numel(),
            parameter.dtype,
            functools.partial(zero3.weight_on_rank_0, parameter, device),
        )
        for name, parameter in parameters.items()
    }


def _read(model: PreTrainedModel, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Some weights, all at once, on rank 0."""
    read = {name: source.read() for name, source in _sources(model, names, device).items()}
    return {name: tensor for name, tensor in read.items() if tensor is not None}


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
    step: int | None
    """None of merged adapters that are not a checkpoint's."""
    parameters: int
    files: int


def export_checkpoint(
    run: Path,
    target: Path,
    step: int | None = None,
    *,
    merge: bool = False,
    replace: bool = False,
) -> Exported:
    """Writes the newest undamaged checkpoint of a run (or that of `step`) to the new folder
    `target`, or in its place with `replace`.

    Weights get the run's `model.dtype`, from the fp32 masters. Adapters are written as such, or
    merged into the model they belong to, which then has to fit in memory; those of a finished run
    without checkpoints, or of a folder or hub name of adapters, too. Raises UserError for a folder
    that is no run, a damaged checkpoint, a target that exists, or where the disk refuses; then
    nothing is left of it.
    """
    if not replace:
        check_is_new(target)
    if merge and step is None:
        place = _adapters_without_checkpoint(run)
        if place is not None:
            return _export_merged(run, place, target, replace=replace)
    checkpoint = _checkpoint_of(run, step)
    description = read_description(checkpoint)
    config = description["config"]
    if merge and config["model"]["lora"] is None:
        raise UserError(
            f"--merge: the run {run} trained whole weights, there are no adapters to merge"
        )
    if merge:
        read_settings(config["model"]["name_or_path"], f"model.name_or_path of {run}")
    model_files = run / "model"
    if not (model_files / "config.json").is_file():
        raise UserError(f"{model_files} is missing; is {run} a run folder?")
    with _appearing(target, replace=replace) as folder:
        parameters, files = _write_checkpoint(run, checkpoint, description, folder, merge=merge)
    return Exported(folder=target, step=description["step"], parameters=parameters, files=files)


@contextmanager
def _appearing(target: Path, *, replace: bool) -> Iterator[Path]:
    """A folder to fill, which is at `target` when that is done, and nowhere if it is not. Raises
    UserError where the disk refuses, and where `target` exists that is not to be replaced."""
    folder = PartialFolder(target)
    try:
        folder.create(replace=replace)
        yield folder.path
        folder.publish()
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the export {target}: {error}; make room, or name a folder on another "
            "disk"
        ) from None
    finally:
        folder.discard()


def _write_checkpoint(
    run: Path, checkpoint: Path, description: Mapping[str, Any], folder: Path, *, merge: bool
) -> tuple[int, int]:
    """Fills a folder; returns how many parameters it has in how many files."""
    config = description["config"]
    shutil.copytree(run / "model", folder, dirs_exist_ok=True)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    (folder / ABOUT).unlink()

    dtype = getattr(torch, config["model"]["dtype"])
    weights = _weights(checkpoint)
    if config["model"]["lora"] is not None:
        adapters = {
            _adapter_name(name): weight.contiguous().to(dtype)
            for name, weight in weights.items()
            if "lora_" in name
        }
        save_file(adapters, folder / "adapter_model.safetensors", {"format": "pt"})
        parameters, files = sum(tensor.numel() for tensor in adapters.values()), 1
        if merge:
            base = config["model"]["name_or_path"]
            parameters = _merge(str(folder), folder, base, dtype, generation=folder)
            for file in folder.glob("adapter_*"):
                file.unlink()
            files = len(list(folder.glob("*.safetensors")))
        else:
            (folder / "config.json").unlink()
    else:
        (folder / "adapter_config.json").unlink(missing_ok=True)
        # Runs of before have noted no prefixes.
        prefixes = [(add, remove, part) for add, remove, part in about.get("prefixes", ())]
        written = _save_whole(folder, weights, dtype, prefixes)
        parameters, files = written.parameters, written.files
    card = _model_card(
        run, description, about, adapter=config["model"]["lora"] is not None and not merge
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return parameters, files


def _checkpoint_of(run: Path, step: int | None) -> Path:
    problems = []
    for checkpoint in checkpoints_to_export(run, step):
        problem = damage(checkpoint)
        if problem is None:
            check_listing(checkpoint)
            return checkpoint
        problems.append(problem)
    raise UserError(f"no undamaged checkpoint in {run}: " + "; ".join(problems))


def _weights(checkpoint: Path) -> Mapping[str, Any]:
    """Every weight by its name in the model, whole when `.contiguous()` is called on it."""
    if any(checkpoint.glob(SHARDS)):
        state = zero3.masters_of(checkpoint)
    else:
        (file,) = checkpoint.glob("*model_states.pt")
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["module"]
    return {
        name.removeprefix(WEIGHTS): weight
        for name, weight in state.items()
        if name.startswith(WEIGHTS)
    }


def _save_whole(
    folder: Path, weights: Mapping[str, Any], dtype: torch.dtype, prefixes: Sequence[Prefix]
) -> WeightFiles:
    """Writes the weights of the model whose configuration lies in the folder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)

    def read(name: str) -> Tensor:
        whole: Tensor = weights[name].contiguous()
        return whole.to(dtype) if whole.is_floating_point() else whole

    sources = {
        name: Source(
            model.get_parameter_or_buffer(name).numel(), dtype, functools.partial(read, name)
        )
        for name in names_to_save(model)
    }
    files = WeightFiles(folder)
    for batch in batches_to_save(model, sources, prefixes):
        files.write(batch)
    files.finish()
    return files


def _adapter_name(name: str) -> str:
    """Turns a parameter's name in the model into its name in peft's own files."""
    return "base_model.model." + name.replace(".default.", ".")


def _adapters_without_checkpoint(run: Path) -> str | None:
    """The folder of a finished run's adapters where there is no checkpoint of them, or what holds
    adapters itself."""
    if holds_adapters(str(run)):
        return str(run)
    exported = run / "export"
    finished = exported.is_dir() and holds_adapters(str(exported))
    return str(exported) if finished and not step_folders(run / "checkpoints") else None


def _export_merged(run: Path, adapters: str, target: Path, *, replace: bool) -> Exported:
    """Writes the model that adapters make of the one they belong to, in a run's dtype or else the
    model's own. Raises UserError where that cannot be loaded."""
    import peft

    base = peft.PeftConfig.from_pretrained(adapters).base_model_name_or_path
    read_settings(str(base), f"base_model_name_or_path in {adapters}")
    settings = run / "config.yaml"
    dtype = "auto"
    if settings.is_file():
        dtype = yaml.safe_load(settings.read_text(encoding="utf-8"))["model"]["dtype"]
    with _appearing(target, replace=replace) as folder:
        parameters = _merge(adapters, folder, str(base), dtype, generation=run / "model")
        own_tokenizer = Path(adapters, "tokenizer_config.json").is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(adapters if own_tokenizer else base)
        tokenizer.save_pretrained(folder)
    files = len(list(target.glob("*.safetensors")))
    return Exported(folder=target, step=None, parameters=parameters, files=files)


def _merge(adapters: str, folder: Path, base: str, dtype: Any, generation: Path) -> int:
    """Writes the whole weights that adapters make, and how they generate as `generation` says, if
    it does; returns how many they are."""
    import peft

    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, output_loading_info=True
    )
    check_whole(type(model), found, f"the adapters' model {base}")
    merged: Any = peft.PeftModel.from_pretrained(model, adapters).merge_and_unload()
    if (generation / GENERATION_CONFIG_NAME).is_file():
        merged.generation_config = transformers.GenerationConfig.from_pretrained(generation)
    merged.save_pretrained(folder)
    return sum(parameter.numel() for parameter in merged.parameters())


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
