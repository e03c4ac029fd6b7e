"""What the ranks of a multi-process test do; started by `tests.ranks.run_ranks`."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import io
import itertools
import math
import os
import resource
import shutil
import signal
import subprocess
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from alphatoken.batch import Batch, make_batch, part_of
from alphatoken.checkpoints import files as checkpoint_files
from alphatoken.checkpoints import saving, weight_files
from alphatoken.checkpoints.export import export_model
from alphatoken.cli import readable_errors
from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.config.valuation import ValuationConfig
from alphatoken.data.batches import Layout, Order, micro_batches
from alphatoken.data.cache import tokenise
from alphatoken.data.chat import Encoder
from alphatoken.distributed import collectives, process, zero3
from alphatoken.distributed.mesh import form_mesh
from alphatoken.distributed.ranks import initialise_ranks
from alphatoken.doctor import storage
from alphatoken.doctor.examination import Examination
from alphatoken.doctor.output import Output
from alphatoken.doctor.rendezvous import Arrival
from alphatoken.errors import RemoteError, UserError
from alphatoken.evaluation import judge
from alphatoken.models import head
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.models.loading import load_model
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.passes.capture import EntryCapture
from alphatoken.passes.divided_attention import divide_attention
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.planner.counting import PeakBytes
from alphatoken.planner.plan import make_plan
from alphatoken.planner.workload import rows_of
from alphatoken.selection.facts import TokenFacts
from alphatoken.selection.select import Cut, Selection, select
from alphatoken.selection.step import count_tokens, weigh, weigh_globally
from alphatoken.stability.estimate import run_fisher
from alphatoken.stability.fisher_sum import FisherSum
from alphatoken.store.rows_folder import RowsFolder
from alphatoken.training import trainer as training_trainer
from alphatoken.training import valued_model, valuing
from alphatoken.training.feed import Feed, StepRows
from alphatoken.training.report import Report
from alphatoken.training.setup import build_run
from alphatoken.training.stopping import StopRequest
from alphatoken.training.trainer import Trainer
from alphatoken.training.valuing import run_valuing
from alphatoken.util.stopwatch import Stopwatch
from alphatoken.values.ghost.scorer import GhostScorer
from alphatoken.values.registry import build_scorer
from benchmarks import plan_accuracy
from tests.flash_attention import stand_in
from tests.host_copies import host_copies
from tests.one_of_many import pretend_ranks
from tests.published import LOSSES
from tests.runs import metrics_of
from tests.tiny import CASES, UNEVEN, with_index


def run_flash_trainers(
    folder: Path, configs: dict[str, dict[str, Any]]
) -> dict[str, tuple[str, list[str]]]:
    """As `run_trainers`, where flash attention 2 is found installed: per run its error message and
    which of the kernels it called."""
    found = {}
    with stand_in() as calls:
        for name, values in configs.items():
            calls.clear()
            message = run_trainers(folder, {name: values})[name]
            found[name] = message, sorted({kind for kind, _ in calls})
    return found


def trainer_of(values: dict[str, Any]) -> Trainer:
    """Builds a run of these values: on pairs where they have a section `preference`."""
    if "preference" in values:
        config = validate(PreferenceRunConfig, values, "of the test")
        return Trainer(build_run(config, PreferenceObjective(config.preference)))
    return Trainer(build_run(validate(RunConfig, values, "of the test"), SupervisedObjective()))


def finish(trainer: Trainer) -> None:
    """Makes room for the next run of the process. Every engine leaves thousands of objects behind,
    and DeepSpeed asks for garbage collections: what is left is not walked through again."""
    trainer.run.engine.destroy()
    gc.collect()
    gc.freeze()


class WeightMessages:
    """Counts ZeRO-3's messages for gathering weights, and how often it lost the order of modules,
    since they were last taken."""

    def __init__(self) -> None:
        self.gathers = self.losses_of_order = 0
        coordinator = PartitionedParameterCoordinator
        before_call(coordinator, "_invalidate_trace", self._lost)
        name = "_PartitionedParameterCoordinator__all_gather_params_"
        gather = getattr(coordinator, name)

        def counted(coordinator: Any, params: Any, *others: Any, **named: Any) -> None:
            self.gathers += any(each.ds_status.name == "NOT_AVAILABLE" for each in params)
            gather(coordinator, params, *others, **named)

        setattr(coordinator, name, counted)

    def _lost(self) -> None:
        self.losses_of_order += 1

    def take(self) -> tuple[int, int]:
        """(messages, orders lost)."""
        found = self.gathers, self.losses_of_order
        self.gathers = self.losses_of_order = 0
        return found


def weight_messages(
    folder: Path, configs: dict[str, dict[str, Any]], *, keeps_order: bool
) -> dict[str, dict[str, Any]]:
    """What `WeightMessages` counts in every step of whole runs, the evaluation after it included,
    and their metrics; without `keeps_order` no pass but training's goes through the engine's
    module."""
    if not keeps_order:
        zero3.knows_order = lambda engine: False
    messages = WeightMessages()
    results = {}
    now: list[tuple[int, int]] = []
    before_call(Report, "step", lambda: now.append(messages.take()))
    for name, values in configs.items():
        trainer = trainer_of(values)
        messages.take()
        trainer.train()
        results[name] = {
            "messages": [*now],
            "metrics": metrics_of(values["train"]["output_dir"]),
        }
        now.clear()
        finish(trainer)
    return results


def full_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The accumulated gradient of every trained parameter, whole; to be called before the engine's
    step."""
    from deepspeed.utils import safe_get_full_grad

    return {
        name.removeprefix("lm."): safe_get_full_grad(parameter).clone()
        for name, parameter in trainer.run.model.named_parameters()
        if name.startswith("lm.") and parameter.requires_grad
    }


def valued_steps(folder: Path, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One optimizer step per configuration: every micro-batch's output by document, and the
    gradient before the step.

    Documents are numbered as their rows in the dataset; those of pairs are 2 row and 2 row + 1.
    """
    results = {}
    for name, values in configs.items():
        trainer = trainer_of(values)
        rows: dict[int, dict[str, Tensor]] = {}
        branches = len(trainer.run.model.selections)
        gradients: dict[str, Tensor] = {}

        def remember(
            _module: Any,
            args: tuple[Any, ...],
            output: Any,
            rows: dict[int, Any] = rows,
            branches: int = branches,
        ) -> None:
            if isinstance(output, Tensor):  # the body alone ran
                return
            facts, documents = output["facts"], args[0]["document_ids"]
            for number, row in enumerate(args[0]["rows"].tolist()):
                inside = documents == number
                rows[branches * row + number % branches] = {
                    "weight": output["weight_BT"][inside],
                    "nll": facts.nll_BT[inside],
                    **{term: value[inside] for term, value in facts.values.items()},
                }

        trainer.run.model.register_forward_hook(remember)
        step = trainer.run.engine.step

        def record_then_step(
            trainer: Trainer = trainer, gradients: dict[str, Tensor] = gradients, step: Any = step
        ) -> None:
            if trainer.run.engine.is_gradient_accumulation_boundary():
                gradients.update(full_gradients(trainer))
            step()

        trainer.run.engine.step = record_then_step
        trainer.train()
        results[name] = {"rows": rows, "gradients": gradients}
        finish(trainer)
    return results


def planned_and_measured(folder: Path, model: Path, cases: list[str]) -> dict[str, Any]:
    """What cases of the benchmark take, and what was planned. (Memory does not count: forked
    processes share.)"""
    ranks = int(os.environ["WORLD_SIZE"])
    return {
        case: plan_accuracy.measure(plan_accuracy.config_of(case, folder, model, "float32", ranks))
        for case in cases
    }


def one_empty_micro_batch(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """One accumulation window in which the last rank has no response token in its second
    micro-batch."""
    trainer = trainer_of(values)
    rows = trainer.feed.training(0)
    batches = rows.batches
    if collectives.rank() == collectives.world_size() - 1:
        nothing_BT = torch.full_like(batches[1]["labels"], -100)
        batches[1] = make_batch({**batches[1], "labels": nothing_BT})
    tokens = count_tokens(trainer.run.model.selections, batches)
    assert trainer.refresh is not None
    trainer.refresh.before(0, tokens.own_response)
    result: dict[str, Any] = {"kept": [], "tokens": []}
    for number, batch in enumerate(batches):
        output = trainer.run.engine(batch)
        denominator = trainer.run.objective.denominator(tokens.kept, rows.rows)
        trainer.run.engine.backward(
            output["total"] * collectives.world_size() / denominator, scale_wrt_gas=False
        )
        result["kept"].append(int((output["weight_BT"] > 0).sum()))
        result["tokens"].append({"ids": batch["input_ids"], "weight": output["weight_BT"]})
        if number == len(batches) - 1:
            result["gradients"] = full_gradients(trainer)
        trainer.run.engine.step()
    return result


def chosen_globally(folder: Path) -> tuple[int, dict[int, dict[str, Tensor]]]:
    """The choice among six micro-batches of pairs, dealt to the ranks: how many tokens are kept,
    and by micro-batch what became of its own. The third one has no response token."""
    initialise_ranks()
    ranks, batches = collectives.world_size(), 6
    noise = Cut(by="agreement", threshold=-0.5, in_noise=True)
    selections = (
        Selection(
            "top_value",
            Fraction(1),
            "global_batch",
            protect_eos=True,
            floor=noise,
            weights="softmax",
        ),
        Selection(
            "top_value",
            Fraction("0.6"),
            "global_batch",
            min_keep=1,
            veto=Cut(by="low_perplexity", share=Fraction("0.3")),
        ),
    )
    own = list(range(collectives.rank(), batches, ranks))
    step = weigh_globally(selections, [random_facts(number) for number in own])
    return step.kept, {
        number: {each.name: getattr(weighed.choice, each.name) for each in fields(weighed.choice)}
        for number, weighed in zip(own, step.micro_batches, strict=True)
    }


def random_facts(number: int) -> TokenFacts:
    """A micro-batch of two pairs with losses and values that depend on its number only; their sort
    keys tie often."""
    generator = torch.Generator().manual_seed(number)
    shape = (4, 5 + 3 * number)
    response = torch.rand(shape, generator=generator) < (0.0 if number == 2 else 0.6)
    batch = {
        "response": response,
        "document_ids": torch.arange(4)[:, None].expand(shape),
        "rows": torch.arange(4),
    }
    return TokenFacts(
        batch=with_index(batch),
        nll_BT=torch.randint(0, 9, shape, generator=generator).float(),
        protected_BT=torch.rand(shape, generator=generator) < 0.1,
        values={
            "composite": torch.randint(-9, 9, shape, generator=generator).float(),
            "spread": torch.randn(shape, generator=generator),
        },
    )


def long_gathers(folder: Path, lengths: list[int], message_bytes: int) -> list[Tensor]:
    """Gathers a shard of each length, in messages of at most so many bytes."""
    initialise_ranks()
    collectives.MESSAGE_BYTES = message_bytes
    return [collectives.gather_equal(shard_of(collectives.rank(), length)) for length in lengths]


def counted_devices(folder: Path) -> int:
    """How many ranks DeepSpeed takes this machine for, where it may start no program to find out:
    it asks in every backward pass."""
    initialise_ranks()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "check_output", lambda *_, **__: pytest.fail("started a program"))
        count: int = get_accelerator().device_count()
        return count


def told_of_failure(folder: Path, failing: list[int], *, agreed: bool) -> str:
    """What this rank says at its end where some ranks find bad input, by themselves or in what all
    of them agree on."""
    initialise_ranks()
    said, ended = io.StringIO(), list[int]()
    # Ranks stay, as no launcher is there to stop them.
    patch = pytest.MonkeyPatch()
    patch.setattr(process, "end_process", ended.append)

    def work() -> None:
        if collectives.rank() in failing:
            raise UserError("rows.parquet is damaged")

    with contextlib.redirect_stderr(said), readable_errors():
        if agreed:
            collectives.agree(work)
        else:
            work()
    if ended == [2] and len(failing) < collectives.world_size() and not agreed:
        process.barrier()  # that others wait in
    patch.undo()
    assert ended in ([0], [2])
    return said.getvalue()


def slow_rank_0(folder: Path, limit_seconds: float, work_seconds: float) -> dict[str, Any]:
    """Rank 0 works longer than messages of tensors may take: on the others' behalf, which is waited
    for, and then before it answers one."""
    initialise_ranks(limit_seconds / 60)

    def work() -> str:
        time.sleep(work_seconds)
        return "done"

    done = collectives.on_rank_0(work)
    collectives.barrier()
    ranks = float(collectives.sum_over_ranks(torch.ones(())))
    lost = ""
    if collectives.rank() == 0:
        time.sleep(work_seconds)
    else:
        try:
            collectives.sum_over_ranks(torch.ones(()))
        except RuntimeError as error:
            lost = str(error)
    return {"done": done, "ranks": ranks, "lost": lost}


def shard_of(rank: int, length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float32) + 1000 * rank


def scored_after(folder: Path, configs: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """Values of the next step's rows after some optimizer steps, with the weights and Adam's
    moments they depend on, and how many rows this rank's held-out micro-batches have."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    results = {}
    for name, values in configs.items():
        trainer = trainer_of(values)
        assert trainer.refresh is not None
        for step in range(steps):
            trainer.step.take(step, evaluates=False)
        batches = trainer.feed.training(steps).batches
        trainer.refresh.before(steps, own_tokens=1)
        rows = {}
        for batch in batches:
            value_BT = trainer.run.model.assess(batch).values["direct_target"]
            for number, row in enumerate(batch["rows"].tolist()):
                rows[row] = value_BT[batch["document_ids"] == number]
        parameters = {
            key.removeprefix("lm."): each
            for key, each in trainer.run.model.named_parameters()
            if "lm." in key
        }
        results[name] = {
            "rows": rows,
            "held_out": [len(batch["rows"]) for batch in trainer.feed.held_out(steps)],
            "weights": {
                key: safe_get_full_fp32_param(each).clone() for key, each in parameters.items()
            },
            "moments": {
                key: safe_get_full_optimizer_state(each, "exp_avg_sq")
                for key, each in parameters.items()
            },
        }
        finish(trainer)
    return results


def valued_run(
    folder: Path, configs: dict[str, dict[str, Any]], silent: dict[int, list[int]] | None = None
) -> dict[str, Any]:
    """Whole runs: per step (by number) the weights before it, whole, Adam's first moments after it,
    and what each document was worth.

    Documents are numbered as their rows in the dataset; those of pairs are 2 row and 2 row + 1.
    Rows of `silent`, by step, have no response token when they are trained on.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    results: dict[str, Any] = {}
    for name, values in configs.items():
        trainer = trainer_of(values)
        if silent is not None:
            silence(trainer.feed, silent)
        steps: dict[int, dict[str, Any]] = {}
        model, branches = trainer.run.model, len(trainer.run.model.selections)
        weights = {
            key.removeprefix("lm."): each
            for key, each in model.named_parameters()
            if key.startswith("lm.")
        }

        def remember(
            _module: Any,
            args: tuple[Any, ...],
            output: Any,
            trainer: Trainer = trainer,
            steps: dict[int, dict[str, Any]] = steps,
            branches: int = branches,
        ) -> None:
            if isinstance(output, Tensor):  # the body alone ran
                return
            rows = steps[trainer.step.under_way]["rows"]
            for number, row in enumerate(args[0]["rows"].tolist()):
                inside = args[0]["document_ids"] == number
                found = {term: each[inside] for term, each in output["facts"].values.items()}
                rows[branches * row + number % branches] = found

        model.register_forward_hook(remember)
        take = trainer.step.take

        def keep_weights(
            step: int,
            *,
            evaluates: bool,
            responses: int = 0,
            take: Any = take,
            trainer: Trainer = trainer,
            steps: dict[int, dict[str, Any]] = steps,
            weights: dict[str, Any] = weights,
        ) -> Any:
            whole = {key: safe_get_full_fp32_param(each).clone() for key, each in weights.items()}
            steps[step] = {"weights": whole, "rows": {}}
            result = take(step, evaluates=evaluates, responses=responses)
            zero3.link_moments(trainer.run.engine)
            steps[step]["moments"] = {
                key: safe_get_full_optimizer_state(each, "exp_avg").clone()
                for key, each in weights.items()
            }
            return result

        trainer.step.take = keep_weights  # type: ignore[method-assign]
        trainer.train()
        results[name] = steps
        finish(trainer)
    return results


def silence(feed: Feed, silent: dict[int, list[int]]) -> None:
    """Takes the labels of some rows, by step, from the micro-batches that are trained on."""
    training = feed.training

    def without_labels(batch: Batch, rows: list[int]) -> Batch:
        numbers = [number for number, row in enumerate(batch["rows"].tolist()) if row in rows]
        is_silent_BT = torch.isin(batch["document_ids"], torch.tensor(numbers))
        return make_batch({**batch, "labels": batch["labels"].masked_fill(is_silent_BT, -100)})

    def masked(step: int) -> StepRows:
        rows = training(step)
        return replace(rows, batches=[without_labels(each, silent[step]) for each in rows.batches])

    feed.training = masked  # type: ignore[method-assign]


def layer_products(folder: Path, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Forward, vjp and jvp of the last layers under ZeRO, on rows and directions of this rank's
    own."""
    results = {}
    for name, values in configs.items():
        trainer = trainer_of(values)
        decoder = decoder_of(trainer.run.model.lm)
        batch = trainer.feed.training(0).batches[0]
        with torch.no_grad(), EntryCapture(decoder, 1, keep="first") as capture:
            decoder.hidden_states(batch)
        streamer = LayerStreamer(decoder, 1, trainer.run.device, resident=False, forward_mode=True)
        streamer.refresh()
        generator = torch.Generator().manual_seed(collectives.rank())
        hidden = capture.entry.first_BTH
        products = {}
        for index, inputs in zip(streamer.indices, capture.entry.layer_inputs, strict=True):
            outgrad = torch.randn(hidden.shape, generator=generator)
            with streamer.segment(index) as module, torch.no_grad():
                output = streamer.forward(module, hidden, inputs)
                paths = [path for path, _ in module.named_parameters()]
                gradient, weights = streamer.vjp(module, hidden, inputs, outgrad, paths)
                tangents = {
                    path: torch.randn(1, *each.shape, generator=generator)
                    for path, each in weights.items()
                }
                _, derivative = streamer.jvp(module, hidden, outgrad[None], inputs, tangents)
            products[index] = {
                "hidden": hidden,
                "inputs": inputs,
                "outgrad": outgrad,
                "output": output,
                "gradient": gradient,
                "weights": weights,
                "tangents": tangents,
                "derivative": derivative,
            }
            hidden = output
        results[name] = products
        finish(trainer)
    return results


def run_trainers(
    folder: Path,
    configs: dict[str, dict[str, Any]],
    killed_in_block: int | None = None,
    killed_in_save: int | None = None,
    disk: str | None = None,
) -> dict[str, str]:
    """Whole runs, one after the other; returns the error message of each, empty where it finished.

    Dies before it writes that block of a reference's losses, or that checkpoint, if any. disk: how
    it is full from the second checkpoint on.
    """
    if killed_in_save is not None:
        die_in_call(Trainer, "save", killed_in_save, f"killed in save {killed_in_save}")
    if disk is not None:
        fill_disk(disk)
    if killed_in_block is not None:
        die_in_call(RowsFolder, "add", killed_in_block, f"killed in block {killed_in_block}")

    def run(values: dict[str, Any]) -> None:
        trainer = trainer_of(values)
        trainer.train()
        finish(trainer)

    return messages_of(configs, run)


def valued_rows(
    folder: Path,
    configs: dict[str, dict[str, Any]],
    block_rows: int,
    killed_in_block: int | None = None,
) -> dict[str, str]:
    """Values of whole datasets, one after the other, in blocks of so many rows; returns the error
    message of each, empty where it finished. Dies before it writes that block, if any."""
    if killed_in_block is not None:
        die_in_call(RowsFolder, "add", killed_in_block, f"killed in block {killed_in_block}")

    def run(values: dict[str, Any]) -> None:
        kind = PreferenceRunConfig if "preference" in values else RunConfig
        run_valuing(validate(kind, values, "test"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(valuing, "BLOCK_ROWS", block_rows)
        return messages_of(configs, run)


def live_tensor_bytes(folder: Path, values: dict[str, Any]) -> int:
    """Bytes of all tensors there are when a run is about to begin."""
    trainer = trainer_of(values)
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    assert trainer.run.reference is not None
    return sum(storages.values())


def messages_of(
    configs: dict[str, dict[str, Any]], work: Callable[[dict[str, Any]], None]
) -> dict[str, str]:
    messages = {}
    for name, values in configs.items():
        messages[name] = ""
        try:
            work(values)
        except (UserError, RemoteError) as error:
            messages[name] = str(error)
    return messages


# Where a run can be killed: an owner and what it calls there.
MOMENTS: dict[str, tuple[Any, str]] = {
    "forward": (Decoder, "hidden_states"),
    "scoring": (GhostScorer, "score"),
    "refresh": (GhostScorer, "refresh"),
    "backward": (head.BlockedNLL, "backward"),
    "step": (torch.optim.AdamW, "step"),
    "report": (Report, "step"),
    "saving shards": (TorchCheckpointEngine, "save"),
    "hashing shards": (saving, "described_files"),
    "publishing": (saving, "publish_text"),
}


def recorded_run(
    folder: Path,
    values: dict[str, Any],
    kill: tuple[str, int, int] | None = None,
    by: int = signal.SIGKILL,
) -> dict[str, Any]:
    """A whole run; the kept tokens of every step's documents, and how often each moment was passed.

    kill: (moment, rank, number) sends that rank the signal `by` at the start of that call.
    """
    calls = dict.fromkeys(MOMENTS, 0)

    def count(moment: str) -> None:
        calls[moment] += 1
        if kill == (moment, collectives.rank(), calls[moment]):
            print(f"killed in {moment}", flush=True)
            os.kill(os.getpid(), by)

    for moment, (owner, name) in MOMENTS.items():
        before_call(owner, name, partial(count, moment))
    trainer = trainer_of(values)
    kept: dict[tuple[int, int], Tensor] = {}
    branches = len(trainer.run.model.selections)

    def remember(_module: Any, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):  # the body alone ran
            return
        for number, row in enumerate(args[0]["rows"].tolist()):
            inside = args[0]["document_ids"] == number
            kept[trainer.step.under_way, branches * row + number % branches] = output["weight_BT"][
                inside
            ]

    trainer.run.model.register_forward_hook(remember)
    trainer.train()
    return {"kept": kept, "calls": calls}


def asked_in_evaluation(
    folder: Path,
    values: dict[str, Any],
    at: tuple[int, int, int] | None = None,
    in_step: int | None = None,
) -> list[int]:
    """A whole run; returns how many batches each of its evaluations began.

    at: (rank, evaluation, batch) asks that rank to stop when that batch of that evaluation of this
    process begins, both from 1. in_step: asks every rank at the beginning of that step (from 1) of
    this process, where evaluations are taken to last for ever.
    """
    begun: list[int] = []
    steps = itertools.count(1)

    def begin_step() -> None:
        if next(steps) == in_step:
            os.kill(os.getpid(), signal.SIGTERM)

    def begin_batch() -> None:
        if not begun:  # a reference's losses are made before the run
            return
        begun[-1] += 1
        if at == (collectives.rank(), len(begun), begun[-1]):
            os.kill(os.getpid(), signal.SIGTERM)

    before_call(training_trainer, "evaluate", lambda: begun.append(0))
    before_call(valued_model.ValuedModel, "token_losses", begin_batch)
    before_call(judge, "continuations", begin_batch)
    if in_step is not None:
        before_call(Report, "responses_of", begin_step)
        stopping: Any = StopRequest
        took = StopRequest.took

        def last_for_ever(stop: StopRequest, what: str, seconds: float) -> None:
            took(stop, what, math.inf if what == "evaluation" else seconds)

        stopping.took = last_for_ever
    trainer_of(values).train()
    return begun


def before_call(owner: Any, name: str, action: Callable[[], None]) -> None:
    """From now on `action` runs whenever a function, method or static method is called."""
    original = inspect.getattr_static(owner, name)
    function = original.__func__ if isinstance(original, staticmethod) else original

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        action()
        return function(*arguments, **named)

    setattr(owner, name, staticmethod(call) if isinstance(original, staticmethod) else call)


def free_space(count: int) -> None:
    """What the system says is free from now on."""
    found: Any = SimpleNamespace(free=count)
    shutil.disk_usage = lambda path: found


def fill_disk(way: str) -> None:
    """`space`: less is free than a checkpoint takes. `refused`: no file may be longer than a few
    bytes. `export`: none from the export on."""
    saves = itertools.count(1)

    def refuse() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    def later() -> None:
        if next(saves) < 2:
            return
        if way == "space":
            free_space(1000)
        elif way == "refused":
            refuse()

    if way == "export":
        before_call(training_trainer, "export_model", refuse)
        return

    if way == "small disk":
        free_space(2**40)  # it looks as if there were room
    before_call(Trainer, "save", later)


def die_in_call(owner: type, method: str, number: int, message: str) -> None:
    """From now on the process ends at the start of the `number`-th call of a method."""
    calls = itertools.count(1)

    def die() -> None:
        if next(calls) == number:
            print(message, flush=True)
            os._exit(1)

    before_call(owner, method, die)


def fisher_estimates(
    folder: Path, configs: dict[str, dict[str, Any]], killed_in_pass: int | None = None
) -> dict[str, str]:
    """Estimates one after the other, or dies at the start of a pass; returns the error message of
    each, if any."""
    if killed_in_pass is not None:
        die_in_call(FisherSum, "add", killed_in_pass, f"killed in pass {killed_in_pass}")
    return messages_of(
        configs, lambda values: run_fisher(validate(RunConfig, values, "of the test"))
    )


def drifts(
    folder: Path, configs: dict[str, dict[str, Any]], steps: int, universal: Path | None = None
) -> dict[str, Any]:
    """After some optimizer steps (of a resumed run too): V from the shards, and the whole fp32
    masters.

    `universal` is a checkpoint of another number of ranks to load first, converted by DeepSpeed.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    results = {}
    for name, values in configs.items():
        trainer = trainer_of(values)
        drift = trainer.run.drift
        assert drift is not None
        names = list(drift.parameters)
        if universal is not None:
            trainer.run.engine.load_checkpoint(str(universal.parent), tag=universal.name)
        first = [safe_get_full_fp32_param(drift.parameters[each]).clone() for each in names]
        for step in range(trainer.first_step, trainer.first_step + steps):
            trainer.step.take(step, evaluates=False)
        if values["train"].get("save_every"):
            trainer.save(trainer.first_step + steps)
        masters = [safe_get_full_fp32_param(drift.parameters[each]).clone() for each in names]
        results[name] = {
            "first": dict(zip(names, first, strict=True)),
            "masters": dict(zip(names, masters, strict=True)),
            "drift": dict(zip(names, drift.matrices(names, torch.float32), strict=True)),
            "magnitudes": drift.magnitudes(),
            "reference_bytes": drift.reference_bytes,
        }
        finish(trainer)
    return results


def empty_messages(folder: Path) -> dict[str, list[int]]:
    """The shapes of what comes of messages in which no rank has anything to say."""
    device = initialise_ranks()
    nothing = torch.zeros(0, 3, device=device)
    return {
        "all-reduce": [*collectives.sum_over_ranks(nothing).shape],
        "all-gather": [*collectives.gather_equal(nothing.flatten()).shape],
        "all-gather of rows": [*collectives.gather_rows(nothing).shape],
        "reduce-scatter": [*collectives.sum_to_slices([nothing])[0].shape],
    }


def host_waits(folder: Path, values: dict[str, Any]) -> dict[str, int]:
    """How often the host waits for the device in one optimizer step, the third, by phase; and the
    micro-batches of the step."""
    trainer = trainer_of(values)
    for step in range(2):
        trainer.step.take(step, evaluates=False)
    found: Counter[str] = Counter()
    phases = ["outside of phases"]
    measured = Stopwatch.phase

    @contextlib.contextmanager
    def noted(stopwatch: Stopwatch, name: str) -> Iterator[None]:
        phases.append(name)
        try:
            with measured(stopwatch, name):
                yield
        finally:
            phases.pop()

    def count(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[phases[-1]] += 1

    Stopwatch.phase = noted  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        torch.cuda.set_sync_debug_mode("warn")
        trainer.step.take(2, evaluates=False)
        torch.cuda.set_sync_debug_mode("default")
    return {**found, "micro-batches": len(trainer.feed.training(2).batches)}


def memory_of_one_of_many(
    folder: Path, configs: dict[str, dict[str, Any]], ranks: int, steps: int
) -> dict[str, dict[str, Any]]:
    """The most that tensors take from the beginning of a run on rank 0 of so many, the others of
    which are not there; what is planned; what they take after each step, and how long it takes; and
    on a GPU what the allocator holds."""
    pretend_ranks(ranks)
    results = {}
    for name, values in configs.items():
        gc.collect()
        config = validate(RunConfig, values, "of the test")
        device = initialise_ranks()
        cuda = device.type == "cuda"
        after, seconds = [], []
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        with contextlib.nullcontext() if cuda else PeakBytes([]) as counter:
            trainer = trainer_of(values)
            for step in range(steps):
                start = time.perf_counter()
                trainer.step.take(step, evaluates=False)
                if cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
                gc.collect()
                after.append(
                    torch.cuda.memory_allocated() - before if counter is None else counter.now
                )
            rows = rows_of(trainer.run.splits.train, 1)
        peak = torch.cuda.max_memory_allocated() - before if counter is None else counter.total
        plan = make_plan(config, rows, ranks, "h100-80g")
        reserved = torch.cuda.max_memory_reserved() if cuda else 0
        results[name] = {
            "measured": peak,
            "planned": plan.memory.peak,
            "after": after,
            "seconds": seconds,
            "reserved": reserved,
        }
        trainer.run.engine.destroy()
        del trainer
    return results


def saved_with_late_listings(
    folder: Path, configs: dict[str, dict[str, Any]], late: str
) -> dict[str, list[Tensor]]:
    """Saves a checkpoint of each run after a step, while no folder shows names that contain
    `late`; returns this rank's random states at that time."""
    states = {}
    for number, (name, values) in enumerate(configs.items()):
        trainer = trainer_of(values)
        trainer.step.take(0, evaluates=False)
        torch.manual_seed(100 * number + collectives.rank())
        states[name] = saving.random_state(trainer.run.device)
        with pytest.MonkeyPatch.context() as patch:
            for owner, method in ((Path, "iterdir"), (Path, "glob"), (Path, "rglob")):
                patch.setattr(owner, method, without(late, getattr(owner, method)))
            patch.setattr(os, "listdir", without(late, os.listdir))
            trainer.save(1)
    return states


def without(late: str, listing: Callable[..., Any]) -> Callable[..., Any]:
    """A listing that does not show some names."""

    def shown(*arguments: Any, **named: Any) -> Any:
        return [each for each in listing(*arguments, **named) if late not in Path(each).name]

    return shown


def opened_again(
    folder: Path, configs: dict[str, dict[str, Any]], vanishing: dict[str, Path]
) -> dict[str, tuple[list[Tensor], list[str], str]]:
    """Resumes each run: this rank's random states afterwards, the files that it hashed, and the
    error message, if any. Files of `vanishing`, by run, are gone once the checkpoint has been
    checked."""
    verification: Any = checkpoint_files
    digest, hashed, opened = verification.file_sha256, list[str](), {}

    def counted(file: Path) -> Any:
        hashed.append(f"{file.parent.name}/{file.name}")
        return digest(file)

    def open_run(values: dict[str, Any]) -> None:
        trainer_of(values)

    load = saving.Checkpoints.load

    def load_without(lost: Path) -> Callable[..., Any]:
        def load_after_the_loss(*arguments: Any) -> Any:
            collectives.on_rank_0(lost.unlink)
            return load(*arguments)

        return load_after_the_loss

    verification.file_sha256 = counted
    for name, values in configs.items():
        torch.manual_seed(7)
        hashed.clear()
        with pytest.MonkeyPatch.context() as patch:
            if name in vanishing:
                patch.setattr(saving.Checkpoints, "load", load_without(vanishing[name]))
            message = messages_of({name: values}, open_run)[name]
        opened[name] = saving.random_state(torch.device("cpu")), list(hashed), message
    return opened


class HeldBytes:
    """How many bytes of some tensors are in memory: now, and at most so far."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy that counts until nothing, no view of it either, refers to its memory."""
        array = tensor.detach().numpy().copy()
        self.now += array.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(array, self._freed, array.nbytes)
        return torch.from_numpy(array)

    def _freed(self, count: int) -> None:
        self.now -= count


def exports(
    folder: Path, models: dict[str, dict[str, Any]], shard_bytes: int
) -> dict[str, dict[str, int]]:
    """Trains models under ZeRO-3 for a step and exports each, into `NAME/ours`; and, gathered by
    DeepSpeed, from a model that was loaded without it (which knows how), into `NAME/theirs`.

    Returns the most bytes of weights that this rank held during ours, and the bytes of the largest
    weight.
    """
    weight_files.SHARD_BYTES = shard_bytes
    device = initialise_ranks(5)
    gather = zero3.weight_on_rank_0
    results = {}
    for name, values in models.items():
        engine_values = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
            "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
            "zero_allow_untested_optimizer": True,
        }
        lm = load_model(validate(ModelConfig, values, "of the test"), engine_values, seed=0)
        wrapper = torch.nn.Module()
        wrapper.lm = lm
        wrapper.forward = lm.forward
        trained = [each for each in lm.parameters() if each.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=wrapper, model_parameters=trained, config=engine_values
        )
        ids = torch.arange(3, 15, device=device)[None] + collectives.rank()
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        held = HeldBytes()

        def counted(parameter: Any, device: torch.device, held: HeldBytes = held) -> Tensor | None:
            whole = gather(parameter, device)
            return None if whole is None else held.hold(whole)

        zero3.weight_on_rank_0 = counted
        nothing: Any = SimpleNamespace(save_pretrained=lambda folder: None)
        export_model(engine, nothing, folder / name / "ours")
        largest = max(zero3.full_shape(each).numel() for each in lm.parameters())
        results[name] = {"peak": held.peak, "left": held.now, "largest": 4 * largest}
        state = engine._zero3_consolidated_16bit_state_dict()
        if collectives.rank() == 0:
            weights = {each.removeprefix("lm."): tensor for each, tensor in state.items()}
            saved = lm
            if values.get("lora") is None:
                saved = AutoModelForCausalLM.from_pretrained(values["name_or_path"])
                saved.load_state_dict(weights)
                weights = saved.state_dict()
            saved.save_pretrained(folder / name / "theirs", state_dict=weights)
        collectives.barrier()
    return results


def plain_deepspeed_loop(
    folder: Path, values: dict[str, Any], steps: int, token_loss: str = "cross_entropy"
) -> dict[str, Any]:
    """Ordinary ZeRO-3 fine-tuning: the model's own logits, the mean loss of the global batch's
    response tokens, which `tests.published` names."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    config = validate(RunConfig, values, "of the test")
    initialise_ranks()
    ranks, rank = collectives.world_size(), collectives.rank()
    tokenizer = AutoTokenizer.from_pretrained(config.model.name_or_path)
    dataset = tokenise(
        config.data.train, Encoder(tokenizer, config.data.max_length), config.data.cache_dir
    )
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=config.optim.lr,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * steps), steps)
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config={
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3},
        },
    )
    losses = []
    for step in range(steps):
        rows = Order([len(dataset)], None, (config.train.seed, 0)).step(step, batch)
        batches = micro_batches(dataset, rows, Layout(micro, tokenizer.pad_token_id), rank, ranks)
        counted = torch.tensor(
            sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        )
        torch.distributed.all_reduce(counted)
        step_loss = torch.zeros(())
        for batch_of_rows in batches:
            attention = (batch_of_rows["input_ids"] != -1).long()
            logits = engine(input_ids=batch_of_rows["input_ids"], attention_mask=attention).logits
            labels = batch_of_rows["labels"][:, 1:]
            counts = labels != -100
            loss = LOSSES[token_loss](logits[:, :-1][counts], labels[counts]).sum()
            step_loss += loss.detach() / counted
            # DeepSpeed averages over ranks and accumulation steps; the loss is already a mean
            # over the global batch.
            engine.backward(loss * ranks * len(batches) / counted)
            engine.step()
        torch.distributed.all_reduce(step_loss)
        losses.append(float(step_loss))
    weights = {
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in model.named_parameters()
    }
    return {"losses": losses, "weights": weights}


def examinations(
    folder: Path, files: dict[str, Path], overrides: dict[str, list[list[str]]]
) -> dict[str, Any]:
    """What the doctor finds for each configuration, with other overrides on each rank, each as if
    on another node."""
    results, storage.APPEARS_WITHIN = {}, 0.5
    for name, file in files.items():
        rank = int(os.environ["RANK"])
        arrival = Arrival(f"node-{rank}", rank, "cpu", 1)
        examination = Examination(
            [file], overrides[name][rank], arrival, Output(as_json=False, is_first=rank == 0)
        )
        examination.join_ranks(patience=120)
        examination.run()
        results[name] = examination.findings
    return results


def run(case: str, folder: Path) -> None:
    """One rank's part of a case; see `tests.ranks`."""
    arguments = torch.load(folder / "arguments.pt", weights_only=False)
    result = globals()[case](folder, **arguments)
    torch.save(result, folder / f"result-{os.environ['RANK']}.pt")
    collectives.barrier()
    process.end_process(0)


def told_by_rank_0(folder: Path) -> dict[str, Any]:
    """What every rank has of rank 0's work, of its failure, and of what all tell rank 0."""
    initialise_ranks(5)
    done = collectives.on_rank_0(lambda: {"by": collectives.rank(), "what": ["a", 1]})
    try:
        collectives.on_rank_0(lambda: [][1])
        failure = ""
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    told = collectives.collect_on_rank_0({"rank": collectives.rank()})
    return {"done": done, "failure": failure, "told": told}


def grown(
    folder: Path, models: dict[str, dict[str, Any]], tokens: int
) -> dict[str, dict[str, Any]]:
    """Loads models with an embedding for each token under ZeRO-3 and runs them on the last one, on
    other rows on each rank; their weights, whole, and whether embeddings and head are one."""
    device = initialise_ranks(5)
    results = {}
    for name, values in models.items():
        engine_values = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        lm = load_model(validate(ModelConfig, values, "of the test"), engine_values, 0, tokens)
        named = dict(lm.named_parameters())
        assert all(zero3.is_sharded(parameter) for parameter in named.values())
        whole = zero3.full_weights(list(named.values()), device)
        engine, *_ = deepspeed.initialize(model=lm, config=engine_values)
        ids = torch.tensor([[3, 4, tokens - 1, 5 + collectives.rank()]])
        assert torch.isfinite(engine(input_ids=ids, labels=ids).loss)
        tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
        results[name] = {"weights": dict(zip(named, whole, strict=True)), "tied": tied}
    return results


ESTIMATED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ghost": ({"window": 6}, ("direct_target", "causal_target")),
    "exact": ({"parameters": "all"}, ("direct_target",)),
}
"""By estimator, its settings in `values_to_itself` and what it tells."""


def values_to_itself(
    decoder: Decoder, batch: Batch, estimators: Sequence[str]
) -> dict[str, Tensor]:
    """What the tokens of a batch are worth to itself, by all layers: by `ghost` with a window of
    six positions, by `exact` to all parameters."""
    found: dict[str, Tensor] = {}
    for estimator in estimators:
        settings, terms = ESTIMATED[estimator]
        config = ValuationConfig.model_validate(
            {"estimator": estimator, "layers": "all", "stability_weight": 0.0, **settings}
        )
        scorer = build_scorer(decoder, config, torch.device("cpu"), None)
        with torch.no_grad():
            scorer.run_body = decoder.hidden_states
            scorer.refresh([batch])
            with scorer.capture() as capture:
                decoder.hidden_states(batch)
            values = scorer.score(capture.entry, batch).values
        found |= {f"{estimator}, {term}": getattr(values, term) for term in terms}
    return found


def divided_passes(
    folder: Path, names: list[str], batches: dict[str, Any], estimators: list[str]
) -> dict[str, Any]:
    """Tiny models on rows that all ranks divide: what enters the head and the values of tokens,
    this rank's part; and the gradients of the summed response losses, which are sums over ranks. By
    model and batch. Batches of a kind that begins with flash run with its kernels, on Llamas and
    Mistrals only."""
    device = initialise_ranks(5)
    ranks = collectives.world_size()
    among = form_mesh(ranks, timedelta(minutes=5)).sequence
    results: dict[str, Any] = {}
    for name in names:
        model = (UNEVEN | CASES)[name].build()
        decoder = decoder_of(model)
        kernel: str = decoder.config._attn_implementation
        head_loss = head.HeadLoss(decoder.head, decoder.logit_softcap)
        for kind, batch in batches.items():
            is_flash = kind.startswith("flash")
            if is_flash and not name.startswith(("llama", "mistral")):
                continue
            decoder.config._attn_implementation = "flash_attention_2" if is_flash else kernel
            divide_attention(decoder)
            own = part_of(batch, among.place, ranks)
            model.zero_grad()
            with stand_in() if is_flash else contextlib.nullcontext():
                hidden = decoder.hidden_states(own)
                index = own["response_index"]
                losses = head_loss(index.take(hidden), index.take(own["targets"]))
                losses.sum().backward()
                values = values_to_itself(decoder, own, estimators)
            results[f"{name}, {kind}"] = {
                "hidden": hidden.detach(),
                "values": values,
                "loss": float(collectives.sum_over_ranks(losses.detach().sum())),
                "gradients": {
                    key: collectives.sum_over_ranks(each.grad)
                    for key, each in model.named_parameters()
                    if each.grad is not None
                },
            }
    assert device.type == "cpu"
    return results


def vetoed_parts(
    folder: Path, batches: dict[str, Any], selections: list[Selection]
) -> dict[str, Tensor]:
    """Which response tokens of this rank's part are vetoed, by batch, where all ranks divide its
    rows; (B, T / ranks). Batches bring their values with them."""
    device = initialise_ranks(5)
    ranks = collectives.world_size()
    among = form_mesh(ranks, timedelta(minutes=5)).sequence
    decoder = decoder_of(CASES["llama"].build())
    if ranks > 1:
        divide_attention(decoder)
    valued = valued_model.ValuedModel(
        decoder=decoder,
        objective=SupervisedObjective(),
        selections=selections,
        eos_token_ids=[],
        stopwatch=Stopwatch(device),
    )
    found = {}
    for kind, batch in batches.items():
        own: Any = part_of(batch, among.place, ranks) if ranks > 1 else batch
        values = {name: own[name] for name in ("composite", "spread")}
        facts = replace(valued.assess(own), values=values)
        found[kind] = facts.response_index.put(weigh(selections, facts).choice.vetoed_R)
    return found


def divided_runs(folder: Path, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Whole runs: the gradient of every step, and the weights at the end."""
    from deepspeed.utils import safe_get_full_fp32_param

    results = {}
    for name, values in configs.items():
        trainer = trainer_of(values)
        gradients: list[dict[str, Tensor]] = []
        before_update(trainer, partial(_keep_gradients, trainer, gradients))
        trainer.train()
        results[name] = {
            "gradients": gradients,
            "weights": {
                key.removeprefix("lm."): safe_get_full_fp32_param(each).clone()
                for key, each in trainer.run.model.named_parameters()
                if key.startswith("lm.") and each.requires_grad
            },
            "metrics": metrics_of(values["train"]["output_dir"]),
        }
        finish(trainer)
    return results


def gradients_as_divided(
    folder: Path, configs: dict[str, dict[str, Any]], told: int
) -> dict[str, dict[str, Tensor]]:
    """The gradient of each run's first step, as DeepSpeed leaves it where its reductions are told
    of rows that are divided over so many ranks; 1 is what it knows of a run."""
    found = {}
    for name, values in configs.items():
        trainer = trainer_of(values)
        assert trainer.run.engine.sequence_parallel_size == 1
        assert trainer.run.engine.optimizer.sequence_parallel_size == 1
        trainer.run.engine.optimizer.sequence_parallel_size = told
        gradients: list[dict[str, Tensor]] = []
        before_update(trainer, partial(_keep_gradients, trainer, gradients))
        trainer.step.take(0, evaluates=False)
        found[name] = gradients[0]
        finish(trainer)
    return found


def runs_with_host_copies(folder: Path, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As `divided_runs`, where layers copy what they keep on the host: how many tensors went there
    and came back, their numbers of dimensions, and how many micro-batches this rank trained on."""
    results: dict[str, Any] = {}
    for name, values in configs.items():
        with host_copies() as copies:
            results |= divided_runs(folder, {name: values})
        steps = len(results[name]["gradients"])
        train = values["train"]
        groups = collectives.world_size() // train.get("sequence_parallel", 1)
        results[name] |= {
            "copies": len(copies.out),
            "back": copies.back,
            "sizes": {tensor.dim() for tensor in copies.out},
            "micro_batches": steps
            * (train["global_batch_size"] // train["micro_batch_size"] // groups),
        }
    return results


def _keep_gradients(trainer: Trainer, gradients: list[dict[str, Tensor]]) -> None:
    gradients.append(full_gradients(trainer))


def before_update(trainer: Trainer, look: Callable[[], None]) -> None:
    """Has something looked at before each update of the weights."""
    step = trainer.run.engine.step

    def look_then_step() -> None:
        if trainer.run.engine.is_gradient_accumulation_boundary():
            look()
        step()

    trainer.run.engine.step = look_then_step


def protected(folder: Path, values: dict[str, Any]) -> set[int]:
    """A whole run; the tokens that it protected."""
    found: set[int] = set()

    def recorded(selections: Any, facts: TokenFacts) -> Any:
        assert all(selection.protect_eos for selection in selections)
        found.update(facts.batch["targets"][facts.protected_BT].tolist())
        return select(selections, facts)

    setattr(valued_model, "weigh", recorded)  # noqa: B010  mypy: it is imported there
    trainer_of(values).train()
    return found


def evaluate(folder: Path, values: dict[str, Any]) -> None:
    """Evaluates a model as `recipes/evaluate.py` does."""
    from alphatoken.config.evaluating import EvaluationRunConfig
    from alphatoken.evaluation.evaluate import run_evaluation

    run_evaluation(validate(EvaluationRunConfig, values, "of the test"))
