"""The only module that reads DeepSpeed's internals: full weights, this rank's slices, and their
fp32 masters.

Under ZeRO stage 3 a parameter is flattened, padded to a multiple of the number of ranks and cut
into equal slices; `ds_tensor` is this rank's slice, `ds_shape` and `ds_numel` describe the whole.
At lower stages every rank holds the whole parameter, which is then its own only slice. fp32
masters, Adam moments and anything we keep per slice (Fisher, reference) share one layout, so
elementwise work on slices needs no communication.
"""

from __future__ import annotations

import difflib
import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from alphatoken.distributed import collectives
from alphatoken.distributed.pickles import opened_as_data
from alphatoken.errors import UserError
from alphatoken.util.wording import as_json

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


@contextmanager
def plain_linears() -> Iterator[None]:
    """Torch's own `F.linear` inside. ZeRO-3 replaces it in the whole process by a function whose
    graph does not hold on to gathered weights, which training needs; but it has no forward
    derivative, and keeps inputs of frozen weights.
    """
    if "deepspeed" not in sys.modules:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    current = nn.functional.linear
    nn.functional.linear = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", current)
    try:
        yield
    finally:
        nn.functional.linear = current


# An nn.Parameter; DeepSpeed adds attributes that type checkers cannot know.
Parameter = Any


def zero_settings(deepspeed_values: Mapping[str, Any], origin: str = "deepspeed.config") -> Any:
    """DeepSpeed's own reading of a configuration's `zero_optimization`, its defaults included.

    Raises UserError for what DeepSpeed does not accept; `origin` names where the values are from.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        return DeepSpeedZeroConfig(**deepspeed_values.get("zero_optimization", {}))
    except ValidationError as error:
        faults = error.errors(include_url=False)
        raise UserError(f"{origin} sets {'; '.join(map(_zero_fault, faults))}") from None
    except (AssertionError, TypeError) as error:
        raise UserError(
            f"{origin}: zero_optimization is not accepted by DeepSpeed: {error}"
        ) from None


def check_settings(deepspeed_values: Mapping[str, Any], origin: str) -> None:
    """Raises UserError for what DeepSpeed would not accept when it is started with a configuration,
    batch sizes apart: the key that it does not accept alone, or what does not go together."""
    zero_settings(deepspeed_values, origin)
    together = _refusal(deepspeed_values)
    if together is None:
        return
    for key, value in deepspeed_values.items():
        if alone := _refusal({key: value}):
            raise UserError(
                f"{origin} sets {key}={as_json(value)}, which is not accepted by DeepSpeed: {alone}"
            )
    raise UserError(f"{origin} is not accepted by DeepSpeed: {together}")


def _refusal(deepspeed_values: Mapping[str, Any]) -> str | None:
    """What DeepSpeed says against a configuration without batch sizes."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig({**deepspeed_values, "train_micro_batch_size_per_gpu": 1})
    except Exception as error:  # sections of another type end in any kind
        return str(error) or type(error).__name__
    return None


def zero_keys(section: Sequence[int | str] = ()) -> list[str]:
    """The keys of `zero_optimization`, or of a section in it, as DeepSpeed's documentation has
    them; none of a section that it does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    model: type[BaseModel] = DeepSpeedZeroConfig
    for part in section:
        field = model.model_fields.get(str(part))
        classes = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [each for each in classes if isinstance(each, type) and issubclass(each, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _zero_fault(fault: ErrorDetails) -> str:
    """What is wrong with one key of `zero_optimization`, its value and what to do."""
    *section, last = fault["loc"] or ("",)
    key = ".".join(["zero_optimization", *map(str, fault["loc"])])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(last), zero_keys(section), n=1)
        fix = f"did you mean {near[0]}?" if near else "remove it"
        return f"{key}, which DeepSpeed does not know; {fix}"
    value = as_json(fault["input"])
    if fault["type"] == "model_type":
        return f'{key}={value}: write a mapping, such as {{"device": "cpu"}}'
    return f"{key}={value}: {fault['msg'][0].lower()}{fault['msg'][1:]}"


def is_sharded(parameter: Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Parameter) -> torch.Size:
    """Shape of the whole weight, also while it is released."""
    shape = parameter.ds_shape if is_sharded(parameter) else parameter.shape
    return torch.Size(shape)


def slice_range(parameter: Parameter) -> tuple[int, int]:
    """[start, end) of this rank's slice in the flattened weight, without padding."""
    numel = math.prod(full_shape(parameter))
    if not is_sharded(parameter):
        return 0, numel
    length = parameter.ds_tensor.numel()
    start = min(collectives.rank() * length, numel)
    return start, min(start + length, numel)


def register_external(module: nn.Module, name: str) -> None:
    """Has DeepSpeed gather `module`'s parameter `name` around its forward call although a submodule
    owns it.

    DeepSpeed finds such parameters by itself only inside the engine's own forward pass.
    """
    import deepspeed

    deepspeed.zero.register_external_parameter(module, module.get_parameter(name))


def knows_order(engine: Any) -> bool:
    """Whether ZeRO-3 has recorded the order in which modules run in one whole micro-batch, backward
    pass included.

    A forward pass through the engine's module then only has to begin like that order. One that
    ZeRO-3 records first must be whole: what it releases at each place of the order is decided the
    first time that it gets there, and never again (DeepSpeed 0.19.8).
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    return offload is not None and not offload.get_param_coordinator().is_invalid_trace()


def release_weights(engine: Any) -> None:
    """Lets go of all gathered weights, those on their way included; nothing below stage 3.

    For after forward passes that no optimizer step follows: when it gathers a model outside of
    them, DeepSpeed takes weights that are on their way for gathered ones.
    """
    engine.empty_partition_cache()


@torch.no_grad()
def full_weights(parameters: Sequence[Parameter], device: torch.device) -> list[Tensor]:
    """The whole weights, in the parameters' dtype. Sharded ones arrive in one all-gather; others
    are not copied.

    Every rank sends its slices and receives (R-1)/R of the weights' bytes. Call it between
    optimizer steps or inside a forward pass; never through `GatheredParameters`, which clashes with
    DeepSpeed's prefetching there.
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    slices = [parameter.ds_tensor.detach().to(device).flatten() for parameter in sharded]
    gathered = iter(
        collectives.gather_slices(slices, [full_shape(parameter) for parameter in sharded])
    )
    return [
        next(gathered) if is_sharded(parameter) else parameter.detach() for parameter in parameters
    ]


def weight_on_rank_0(parameter: Parameter, device: torch.device) -> Tensor | None:
    """The whole weight in the host's memory of rank 0, in the parameter's dtype; None on other
    ranks, all of which must call it. On the way it is on every rank's device, and released."""
    (whole,) = full_weights([parameter], device)
    return whole.cpu() if collectives.rank() == 0 else None


@torch.no_grad()
def master_slice(parameter: Parameter, device: torch.device) -> Tensor:
    """This rank's slice of the fp32 master weight, flat and padded like `ds_tensor`; may alias it,
    do not write.

    Below stage 3 the whole master, gathered from the ranks that hold its parts; without one (no
    engine, or a frozen parameter) the weight itself.
    """
    master: Any = None
    if is_sharded(parameter):
        from deepspeed.utils import safe_get_local_fp32_param

        master = safe_get_local_fp32_param(parameter)
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(parameter)
    if master is None:
        master = parameter.ds_tensor if is_sharded(parameter) else parameter
    flat: Tensor = master.detach().flatten()
    return flat.to(device=device, dtype=torch.float32)


def padded(own: Tensor, parameter: Parameter) -> Tensor:
    """This rank's elements of a tensor shaped like the whole weight, zero-padded to the length of
    `ds_tensor`."""
    start, end = slice_range(parameter)
    length = parameter.ds_tensor.numel() if is_sharded(parameter) else end - start
    return nn.functional.pad(own, (0, length - own.numel()))


def sum_to_slices(wholes: Sequence[Tensor], parameters: Sequence[Parameter]) -> list[Tensor]:
    """This rank's slices, flat and padded, of the sums over ranks of tensors shaped like the whole
    weights.

    One reduce-scatter of the tensors; an all-reduce of each where the parameters are not sharded.
    """
    if wholes and is_sharded(parameters[0]):
        return collectives.sum_to_slices(wholes)
    return [collectives.sum_over_ranks(whole).flatten() for whole in wholes]


def whole_tensors(slices: Sequence[Tensor], parameters: Sequence[Parameter]) -> list[Tensor]:
    """Tensors shaped like the whole weights from this and all other ranks' slices of them, in one
    all-gather. Of several slices stacked, (N, L), come N tensors, stacked."""
    shapes = [full_shape(parameter) for parameter in parameters]
    if slices and is_sharded(parameters[0]):
        return collectives.gather_slices(slices, shapes)
    pairs = zip(slices, shapes, strict=True)
    return [part.view(*part.shape[:-1], *shape) for part, shape in pairs]


@torch.no_grad()
def with_more_rows(parameter: Parameter, rows: int) -> nn.Parameter:
    """A parameter (N, ...) with more rows, `rows` in all: the new ones are the mean of the others.
    Sharded as the parameter is, whose memory is released then.

    Before there is an engine. Every rank must call it, and holds both of them whole meanwhile.
    """
    if not is_sharded(parameter):
        return nn.Parameter(_more_rows(parameter, rows), parameter.requires_grad)
    from deepspeed.accelerator import get_accelerator

    (whole,) = full_weights([parameter], torch.device(get_accelerator().current_device_name()))
    grown = nn.Parameter(_more_rows(whole, rows), parameter.requires_grad)
    parameter.convert_to_zero_parameters([grown])
    parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)  # DeepSpeed holds on to it
    return grown


def _more_rows(whole: Tensor, rows: int) -> Tensor:
    mean = whole.float().mean(0, keepdim=True).to(whole.dtype)
    return torch.cat([whole, mean.expand(rows - len(whole), *whole.shape[1:])])


def save_shards(
    engine: Any, folder: Path, tag: str, client_state: dict[str, Any]
) -> tuple[list[Path], Exception | None]:
    """Has every rank write its part of a checkpoint into `folder / tag`; returns the files that
    this rank wrote, and what the disk refused.

    DeepSpeed's ranks wait for each other between their files, so nothing is raised before all are
    through. The scripts that DeepSpeed puts beside its checkpoints are left out.
    """
    written: list[Path] = []
    refused: list[Exception] = []
    write = engine.checkpoint_engine.save

    def save(state_dict: Any, path: str) -> None:
        written.append(Path(path))
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            refused.append(error)

    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda _: None
    # Without it the converter to other numbers of ranks refuses checkpoints of stages 1 and 2.
    engine.module.universal_checkpoint_info = {"universal_checkpoint_version": 0.2}
    try:
        engine.save_checkpoint(str(folder), tag=tag, client_state=client_state, save_latest=False)
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script
    return written, refused[0] if refused else None


def load_shards(engine: Any, checkpoint: Path) -> dict[str, Any] | None:
    """Loads the engine's state, and returns the client state that was saved with this rank's, or
    rank 0's; None where DeepSpeed finds nothing. Files are opened as data."""
    with opened_as_data():
        loaded, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return None if loaded is None else client_state


def separate_step_counts(engine: Any) -> None:
    """Gives every tensor of the optimizer a step counter of its own.

    DeepSpeed 0.19.8 loads universal checkpoints so that all parameter groups share one counter,
    which a fused Adam then advances once for each of them.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def masters_of(checkpoint: Path) -> Mapping[str, Any]:
    """The fp32 masters in a checkpoint of stages 1 to 3 by name, whole when `.contiguous()` is
    called on one.

    Files are memory-mapped; at stages 1 and 2 DeepSpeed nevertheless reads all masters at once.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with opened_as_data():
        found: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True
        )
    return found


Options = list[dict[str, Any]]


def optimizer_options(engine: Any) -> Options:
    """Learning rate at its peak, decay, betas and epsilon of each parameter group."""
    keys = ("initial_lr", "weight_decay", "betas", "eps")
    return [
        {key: group[key] for key in keys} for group in engine.lr_scheduler.optimizer.param_groups
    ]


def set_optimizer_options(engine: Any, options: Options) -> None:
    """Gives optimizer and schedule, where a checkpoint has left them, the options that
    `optimizer_options` gave."""
    scheduler = engine.lr_scheduler
    scheduler.base_lrs = [each["initial_lr"] for each in options]
    rates = [
        peak * factor(scheduler.last_epoch)
        for peak, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for groups in (
        engine.optimizer.param_groups,
        scheduler.optimizer.param_groups,
    ):  # mostly the same
        for group, each, rate in zip(groups, options, rates, strict=True):
            group |= {**each, "lr": rate}
    scheduler._last_lr = rates


def link_moments(engine: Any) -> None:
    """Lets `first_moment_slice` and `second_moment_slice` find Adam's moments; to be called after
    an optimizer step.

    At stages 1 and 2 DeepSpeed (0.19.8) links them to parameters once the first parameter group has
    been stepped, when the others have none yet, and never again.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def first_moment_slice(parameter: Parameter, device: torch.device) -> Tensor:
    """This rank's slice of Adam's first moment, as `second_moment_slice` gives the second."""
    return _moment_slice(parameter, "exp_avg", device)


def second_moment_slice(parameter: Parameter, device: torch.device) -> Tensor:
    """This rank's slice of Adam's second moment, float32, laid out like `master_slice`; after
    `link_moments`.

    At stages 1 and 2 the whole of it, gathered from the ranks that hold its parts, so every rank
    must ask.
    """
    return _moment_slice(parameter, "exp_avg_sq", device)


@torch.no_grad()
def _moment_slice(parameter: Parameter, key: str, device: torch.device) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    read = (
        safe_get_local_optimizer_state if is_sharded(parameter) else safe_get_full_optimizer_state
    )
    moment: Tensor = read(parameter, key).detach().flatten()
    return moment.to(device=device, dtype=torch.float32)


# Odd 64-bit constants (the golden ratio and a prime of xxHash) as signed integers.
_SPREAD, _MIX = 0x9E3779B97F4A7C15 - 2**64, 0xC2B2AE3D27D4EB4F - 2**64


@torch.no_grad()
def checksums(
    parameters: Mapping[str, Parameter],
    device: torch.device,
    read: Callable[[str, int, int], Tensor] | None = None,
) -> dict[str, int]:
    """A 64-bit checksum of every whole weight, rounded to bf16: the same on any number of ranks and
    in either dtype.

    Each element's bits are multiplied by a number that depends on its position; the sums wrap.
    Every rank reads its own slices; one all-reduce of an int64 per parameter. With `read(name,
    start, end)` the flat weights come from there.
    """
    sums = torch.zeros(len(parameters), dtype=torch.int64, device=device)
    for number, (name, parameter) in enumerate(parameters.items()):
        start, end = slice_range(parameter)
        if collectives.rank() > 0 and not is_sharded(parameter):  # every rank has the same
            continue
        if read is not None:
            own = read(name, start, end)
        else:
            own = (
                (parameter.ds_tensor if is_sharded(parameter) else parameter)
                .detach()
                .flatten()[: end - start]
            )
        for block in own.split(2**18):
            bits = block.to(device, torch.bfloat16).view(torch.int16).long()
            place = torch.arange(start, start + len(bits), device=device) * _SPREAD
            start += len(bits)
            sums[number] += ((bits + 2**16) * ((place ^ (place >> 29)) * _MIX | 1)).sum()
    return dict(zip(parameters, collectives.sum_over_ranks(sums).tolist(), strict=True))


def release(model: nn.Module) -> None:
    """Frees the weights of a model that will not run again: at stage 3 globals of DeepSpeed hold on
    to parameters."""
    for parameter in model.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                tensor.data = tensor.data.new_empty(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
