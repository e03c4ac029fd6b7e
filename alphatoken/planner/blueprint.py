"""What is planned: a configuration, its model as shapes, how it is divided, and what a step has to
work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from transformers import AutoConfig

from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.distributed.settings import deepspeed_config
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.models.loading import check_before_loading, model_without_weights
from alphatoken.models.scored import scored_depth
from alphatoken.planner.sharding import Gathers, Sharding, gathers_of, sharding_of
from alphatoken.planner.tracing import (
    COUNTED_ATTENTION,
    BodyCost,
    ScoringT,
    SettingT,
    TracedLayer,
    Tracer,
)
from alphatoken.planner.workload import Rows, Workload, workload_of


class PlannedModel:
    """A model as shapes. Traces and messages that were found once are kept, since a plan considers
    many runs of one model."""

    def __init__(self, config: ModelConfig) -> None:
        self.decoder = decoder_of(model_without_weights(config, COUNTED_ATTENTION))
        self.decoder.freeze_unreached()
        self._tracers: dict[int, Tracer] = {}
        self._gathers: dict[Any, Gathers] = {}

    def tracer(self, parts: int) -> Tracer:
        """Runs its layers on rows that are divided over so many ranks."""
        if parts not in self._tracers:
            self._tracers[parts] = Tracer(self.decoder, parts)
        return self._tracers[parts]

    def gathers(
        self, sharding: Sharding, *, steering_batches: int, micro_batches: int, checkpointing: bool
    ) -> Gathers:
        """Gathers of ZeRO-3 in one step; see `gathers_of`."""
        key = sharding, steering_batches, micro_batches, checkpointing
        if key not in self._gathers:
            self._gathers[key] = gathers_of(
                self.decoder,
                sharding,
                steering_batches=steering_batches,
                micro_batches=micro_batches,
                checkpointing=checkpointing,
            )
        return self._gathers[key]


@lru_cache(maxsize=4)
def _planned_model(settings: str, _config_json: str) -> PlannedModel:
    return PlannedModel(ModelConfig.model_validate_json(settings, strict=False))


def planned_model(config: ModelConfig) -> PlannedModel:
    """The model of a configuration, built again only where its settings or its `config.json`
    changed."""
    config_json = AutoConfig.from_pretrained(config.name_or_path).to_json_string(use_diff=False)
    return _planned_model(config.model_dump_json(), config_json)


@dataclass(frozen=True)
class Blueprint:
    """All that a plan is computed from."""

    config: RunConfig
    model: PlannedModel
    sharding: Sharding
    workload: Workload
    body: BodyCost
    held_out: BodyCost
    """On a held-out micro-batch; the training one's without valuation."""
    gathers: Gathers | None
    """Of ZeRO-3."""

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder

    @property
    def depth(self) -> int:
        """Number of scored layers; 0 without valuation."""
        valued = self.config.valuation.enabled
        return scored_depth(self.config.valuation.layers, len(self.decoder.layers)) if valued else 0

    @property
    def resident(self) -> bool:
        return self.config.valuation.is_resident

    @property
    def has_drift(self) -> bool:
        valuation = self.config.valuation
        return valuation.enabled and (
            valuation.fisher is not None or valuation.stability_weight > 0
        )

    @property
    def offloads(self) -> bool:
        """Whether the states that enter layers are kept on the host until the backward pass."""
        return self.config.train.gradient_checkpointing == "offload"

    def training(self, **changes: Any) -> Blueprint:
        """A run like this with other values in its section `train`, which change no shape."""
        train = self.config.train.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"train": train}))

    @property
    def steering_passes(self) -> int:
        """How many draws of rows a refresh takes in: held-out ones, and those for B."""
        return steering_passes(self.config)

    @property
    def steering_documents(self) -> int:
        """The documents of all draws of a refresh, in multiples of the held-out ones: of a pair,
        rows for B count with both responses, whichever are held out."""
        drawn = len(self.config.selections) // max(self.workload.held_out_documents, 1)
        return 1 + (self.steering_passes - 1) * drawn

    @property
    def halves(self) -> int:
        """How many sums are formed of a draw's gradients: their sum, and the signed one where
        halves are told apart."""
        return 2 if self.config.valuation.reliability else 1

    @cached_property
    def numels(self) -> list[tuple[int, bool]]:
        """Elements of every parameter, and whether it is trained."""
        return [(each.numel(), each.requires_grad) for each in self.decoder.model.parameters()]

    @cached_property
    def scored_numels(self) -> dict[str, list[int]]:
        """Elements of each scored parameter by segment: layers by their number, norm, head and
        embeddings."""
        segments: dict[str, list[int]] = {}
        if self.depth:
            chosen = self.config.valuation.parameters
            for each in self.decoder.scored_parameters(self.depth, chosen):
                numel = self.decoder.segment_parameters(each.segment)[each.path].numel()
                segments.setdefault(str(each.segment), []).append(numel)
        return segments

    def segment_numels(self, segment: int | str) -> list[int]:
        """Elements of each parameter of a layer, the norm or the head."""
        return [each.numel() for each in self.decoder.segment_parameters(segment).values()]  # type: ignore[arg-type]

    @property
    def scored_layers(self) -> range:
        layers = len(self.decoder.layers)
        return range(layers - self.depth, layers)

    @property
    def head_flops(self) -> int:
        """Floating-point operations of one token's logits."""
        vocabulary, hidden = self.decoder.head.weight.shape
        return 2 * vocabulary * hidden

    def sliced(self, numels: list[int]) -> int:
        """Elements that this rank has of scored weights: its slices at stage 3, else all."""
        sharding = self.sharding
        return sum(map(sharding.slice_of, numels)) if sharding.stage == 3 else sum(numels)

    def scoring(
        self,
        trace: Callable[[TracedLayer, SettingT], ScoringT],
        setting: SettingT,
        *,
        rows: int,
        first_differs: bool = False,
    ) -> list[ScoringT]:
        """Has `trace` run every scored layer on a micro-batch of so many rows; see
        `Tracer.scoring`."""
        return self.model.tracer(self.workload.parts).scoring(
            trace,
            setting,
            depth=self.depth,
            rows=rows,
            row_tokens=self.workload.row_tokens,
            first_differs=first_differs,
        )

    @property
    def compares_held_out(self) -> bool:
        """Whether an online reference runs on held-out rows, too."""
        config = self.config
        online = config.needs_reference and config.reference.mode == "online"
        return online and config.valuation.enabled and config.valuation.target == "preference"

    @property
    def held_out_count(self) -> int:
        """Held-out response tokens over all ranks (N)."""
        rows = self.config.valuation.validation_sequences * self.workload.held_out_documents
        work = self.workload
        return rows * work.parts * work.held_out_responses // max(work.held_out_rows, 1)


def steering_passes(config: RunConfig) -> int:
    """How many draws of rows a refresh takes in: held-out ones, and those for B."""
    return 2 if config.valuation.contrast_source == "drawn" else 1


def draw(config: RunConfig, rows: Rows, ranks: int) -> Blueprint:
    """The blueprint of a run on so many ranks. Raises UserError for what the run would refuse
    before loading a model, and where the model cannot be planned.
    """
    values = deepspeed_config(config, ranks)
    check_before_loading(config, here=False)
    model = planned_model(config.model)
    sharding = sharding_of(values, ranks, 2 if config.model.dtype == "bfloat16" else 4)
    workload = workload_of(config, rows, ranks)
    valued = config.valuation.enabled
    if valued:
        scored_depth(config.valuation.layers, len(model.decoder.layers))
    tracer = model.tracer(workload.parts)
    body = tracer.body(workload.rows, workload.row_tokens)
    held_out = body
    if valued:
        held_out = tracer.body(workload.held_out_rows, workload.row_tokens)
    gathers = None
    if sharding.stage == 3:
        gathers = model.gathers(
            sharding,
            steering_batches=workload.held_out_batches * steering_passes(config),
            micro_batches=workload.micro_batches,
            checkpointing=bool(config.train.gradient_checkpointing),
        )
    return Blueprint(
        config=config,
        model=model,
        sharding=sharding,
        workload=workload,
        body=body,
        held_out=held_out,
        gathers=gathers,
    )
