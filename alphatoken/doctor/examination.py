"""The order of checks. Every rank goes through all of them and communicates alike, whatever fails
on any."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
from transformers import PreTrainedTokenizerBase

from alphatoken.config.file import flat, load_config
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data.splits import Splits, read_splits
from alphatoken.distributed import collectives
from alphatoken.distributed.ranks import device_memory, initialise_ranks, visible_devices
from alphatoken.doctor import comparing, facts, masks, measuring, refusals, rows, storage
from alphatoken.doctor.findings import Finding, on_every_rank, skipped, verdict
from alphatoken.doctor.output import Output
from alphatoken.doctor.rendezvous import Arrival, deadline, meet
from alphatoken.models.loading import name_attention
from alphatoken.util.wording import plural

T = TypeVar("T")


def examine(
    files: Sequence[Path], overrides: Sequence[str], *, as_json: bool, patience: float
) -> int:
    """Checks everything and reports on rank 0. Returns the exit status, 1 where a check failed.
    Every rank must call it.

    `patience`: seconds in which the ranks have to find each other. Where they do not, the process
    ends here.
    """
    output = Output(as_json=as_json, is_first=os.environ.get("RANK", "0") == "0")
    accelerator, devices = visible_devices()
    arrival = Arrival(
        node=facts.this_node(),
        local_rank=int(os.environ.get("LOCAL_RANK") or 0),
        accelerator=accelerator,
        devices=devices,
    )
    meeting = meet(arrival, os.environ, patience)
    if meeting.failure is not None:
        if meeting.store is None:  # rank 0 does not know of it, or is this one
            output.complain(meeting.failure)
        output.report([meeting.failure], [arrival.node])
        meeting.dismiss(is_host=output.is_first, patience=patience)
        output.end(1)
    examination = Examination(files, overrides, arrival, output)
    examination.join_ranks(2 * patience)
    examination.run()
    output.report(examination.findings, examination.nodes)
    # A launcher stops every rank as soon as one ends with another status than 0: rank 0 speaks
    # first.
    collectives.barrier()
    return int(any(finding.outcome == "failed" for finding in examination.findings))


class Examination:
    """Collects findings. Their number and outcomes are the same on every rank; the texts are rank
    0's to tell."""

    def __init__(
        self, files: Sequence[Path], overrides: Sequence[str], arrival: Arrival, output: Output
    ) -> None:
        self.findings: list[Finding] = []
        self.nodes = [arrival.node]
        self._files, self._overrides = files, overrides
        self._arrival = arrival
        self._output = output
        self._device = torch.device("cpu")

    def join_ranks(self, patience: float) -> None:
        """Forms the process group and measures it. The process ends here where that fails or takes
        too long."""
        moment = "forming the process group"

        def give_up(reason: str) -> None:
            fix = (
                "do the nodes reach each other on every port? (GLOO_SOCKET_IFNAME, "
                "NCCL_SOCKET_IFNAME name the network)"
            )
            node = self._arrival.node
            finding = Finding(
                "process group", "failed", f"{node}: {moment}: {reason}", fix, (node,)
            )
            self._output.complain(finding)
            self._output.report([finding], self.nodes)
            if not self._output.is_first:
                time.sleep(3)  # a launcher stops rank 0 when this one ends
            self._output.end(1)

        with deadline(patience, lambda: give_up(f"no end after {patience:g} s")):
            try:
                self._device = initialise_ranks()
                self.nodes = collectives.gather_objects(self._arrival.node)
                moment = "the first all-reduce"
                measured = collectives.gather_objects(measuring.measure_all_reduce(self._device))
            except (RuntimeError, OSError) as error:
                give_up(str(error).splitlines()[0])
        found = "a single rank"
        if len(self.nodes) > 1:
            met = (
                f"{plural(len(self.nodes), 'rank')} on {plural(len(set(self.nodes)), 'node')} met "
                "at"
            )
            found = f"{met} {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        self.findings += [
            Finding("rendezvous", "ok", found),
            measuring.judge_all_reduce(measured, self.nodes),
        ]

    def run(self) -> None:
        """All checks that need a process group, those of the configuration only where every rank
        has read it."""
        config = self._compare_ranks()
        if config is None:
            self._skip("a configuration", "all others")
            return
        dtype = config.model.dtype
        judge = partial(measuring.judge_dtype, dtype)
        self._compare("dtype", lambda: measuring.check_dtype(dtype, self._device), judge)
        self._compare(
            "model files",
            lambda: facts.model_listing(config.model.name_or_path),
            comparing.compare_model_files,
        )
        self._everywhere("batches", lambda: refusals.batches(config, len(self.nodes)))
        shapes = self._everywhere(
            "model", lambda: refusals.model(config), partial(refusals.about_model, config)
        )
        if shapes is None:
            self._skip("a model", "model settings")
        else:
            self._compare(
                "model settings",
                lambda: refusals.model_settings(config, self._device),
                comparing.compare_model_settings,
            )
        self._everywhere("fisher", lambda: refusals.stability(config))
        self._on_first_rank(
            "trackers", lambda: Finding("trackers", "ok", refusals.trackers(config))
        )
        known = config if shapes is None else name_attention(config)
        self._on_first_rank("run folder", lambda: refusals.run_folder(known, len(self.nodes)))
        self._check_folders(config)
        tokenizer = self._everywhere(
            "tokenizer", lambda: refusals.tokenizer(config), refusals.about_tokenizer
        )
        if tokenizer is None:
            self._skip("a tokenizer", "reference", "response mask", "data")
        else:
            self._everywhere("reference", lambda: refusals.reference(config, tokenizer))
            self._on_first_rank("response mask", lambda: masks.judge_run(config, tokenizer))
        splits = None if tokenizer is None else self._read_data(config, tokenizer)
        if tokenizer is None or splits is None:
            divided = ("divided rows",) if config.train.sequence_parallel > 1 else ()
            lengths = ("lengths", "positions", *divided)
            self._skip("data", "rows", "overlap", "prompts", *lengths, "end of turn", "disk space")
            return
        self._check_rows(config, tokenizer, splits)
        if shapes is None:
            self._skip("a model", "disk space")
        else:
            self._on_first_rank(
                "disk space", lambda: storage.check_space(config, shapes, len(splits.train))
            )

    def _check_rows(
        self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, splits: Splits
    ) -> None:
        """What the tokenised rows are like, and whether run and model can take them."""
        self._on_first_rank("rows", lambda: refusals.sizes(config, splits))
        self._on_first_rank("overlap", lambda: rows.check_overlap(splits))
        self._everywhere("prompts", lambda: refusals.prompts(config, tokenizer, splits))
        self._on_first_rank("lengths", lambda: rows.describe_lengths(splits.train, config))
        self._on_first_rank("positions", lambda: refusals.positions(config, splits))
        if config.train.sequence_parallel > 1:
            self._on_first_rank("divided rows", lambda: rows.judge_division(splits.train, config))
        self._on_first_rank(
            "end of turn", lambda: rows.check_endings(splits.train, tokenizer, config)
        )

    def _compare_ranks(self) -> RunConfig | None:
        """Compares what ranks are made of; the configuration, where all have read one."""
        sections = {"preference": PreferenceRunConfig}
        read = on_every_rank(lambda: load_config(RunConfig, self._files, self._overrides, sections))
        values = {} if read.own is None else flat(read.own.model_dump(mode="json"))
        own_facts = facts.gather_facts(self._arrival, device_memory(self._device), values)
        everyone = collectives.gather_objects(own_facts)
        self.findings += [
            comparing.compare_versions(everyone, facts.requirements()),
            comparing.compare_code(everyone),
            comparing.compare_accelerators(everyone),
        ]
        if not read.everywhere:
            named = " + ".join(map(str, self._files))
            fix = f"correct {named} and the overrides on the command line"
            self.findings.append(verdict("configuration", read, self.nodes, "", fix))
            return None
        self.findings.append(comparing.compare_configs(everyone))
        return read.own

    def _check_folders(self, config: RunConfig) -> None:
        mark = f"alphatoken-doctor-{collectives.gather_objects(uuid4().hex[:8])[0]}"
        runs, cache = (
            config.train.output_dir.absolute().parent,
            config.data.cache_dir.absolute(),
        )
        # Tokenised rows may be made on every node; losses of a reference are computed once, by
        # all ranks together.
        cached = (
            config.needs_reference
            and config.reference.mode == "cached"
            and config.reference.cache is None
        )
        for check, folder, shared in (
            ("output folder", runs, True),
            ("cache folder", cache, cached),
        ):
            self.findings.append(
                storage.check_shared_folder(check, folder, self.nodes, mark, must_be_shared=shared)
            )

    def _read_data(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Splits | None:
        """All parts, where every rank has read the same."""
        read = on_every_rank(lambda: read_splits(config, tokenizer))
        if not read.everywhere or read.own is None:
            self.findings.append(verdict("data", read, self.nodes, ""))
            return None
        identities = {name: part.identity for name, part in read.own.named().items()}
        reports = [
            f"{name}: {source}"
            for name, part in read.own.named().items()
            for source in part.reports
        ]
        finding = comparing.compare_data(
            collectives.gather_objects(identities), self.nodes, reports
        )
        self.findings.append(finding)
        return read.own if finding.outcome == "ok" else None

    def _everywhere(
        self, check: str, work: Callable[[], T], tell: Callable[[T], str] = str
    ) -> T | None:
        """Work that has to succeed on every rank; its result there, None on all ranks where it
        fails on any."""
        seen = on_every_rank(lambda: (result := work(), tell(result)))
        found = "" if seen.own is None else seen.own[1]
        self.findings.append(verdict(check, seen, self.nodes, found))
        return seen.own[0] if seen.own is not None and seen.everywhere else None

    def _compare(
        self, check: str, work: Callable[[], T], judge: Callable[[list[T], Sequence[str]], Finding]
    ) -> None:
        """Adds the judgement on what work gives on all ranks."""
        seen = on_every_rank(work)
        if seen.everywhere and seen.own is not None:
            self.findings.append(judge(collectives.gather_objects(seen.own), self.nodes))
        else:
            self.findings.append(verdict(check, seen, self.nodes, ""))

    def _on_first_rank(self, check: str, work: Callable[[], Finding]) -> None:
        """A check that is enough on rank 0."""
        seen = on_every_rank(lambda: work() if collectives.rank() == 0 else None)
        finding = collectives.gather_objects(seen.own)[0]
        self.findings.append(finding or verdict(check, seen, self.nodes, ""))

    def _skip(self, needs: str, *checks: str) -> None:
        self.findings += [skipped(check, needs) for check in checks]
