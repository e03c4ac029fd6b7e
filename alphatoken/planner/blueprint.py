"""What is planned: a configuration, its model as shapes, how it is divided, and what a step has to
work on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from alphatoken.config.run import RunConfig
from alphatoken.distributed.settings import deepspeed_config
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.models.loading import check_before_loading, model_without_weights
from alphatoken.models.scored import scored_depth
from alphatoken.planner.sharding import Gathers, Sharding, gathers_of, sharding_of
from alphatoken.planner.tracing import COUNTED_ATTENTION, BodyCost, Tracer
from alphatoken.planner.workload import Rows, Workload, workload_of
from alphatoken.values.algebra import CONTRACTIONS, ContractionName, cheaper_contraction


@dataclass(frozen=True)
class ScoredShape:
    """One scored linear."""

    layer: int
    out_features: int
    in_features: int
    is_value: bool
    contraction: ContractionName

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Blueprint:
    """All that a plan is computed from."""

    config: RunConfig
    decoder: Decoder
    sharding: Sharding
    workload: Workload
    body: BodyCost
    held_out: BodyCost
    """On a held-out micro-batch; the training one's without valuation."""
    gathers: Gathers | None
    """Of ZeRO-3."""

    @property
    def depth(self) -> int:
        """Number of scored layers; 0 without valuation."""
        valued = self.config.valuation.enabled
        return scored_depth(self.config.valuation.layers, len(self.decoder.layers)) if valued else 0

    @property
    def exact(self) -> bool:
        return self.config.valuation.estimator == "exact"

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
    def directions(self) -> int:
        """In which `exact` differentiates."""
        return 2 if self.has_drift and self.config.valuation.split_terms else 1

    @cached_property
    def numels(self) -> list[tuple[int, bool]]:
        """Elements of every parameter, and whether it is trained."""
        return [(each.numel(), each.requires_grad) for each in self.decoder.model.parameters()]

    @cached_property
    def scored(self) -> list[ScoredShape]:
        """The linears that `ghost` scores."""
        found = []
        for linear in self.decoder.scored_linears(self.depth) if self.depth else []:
            rows, columns = self.decoder.model.get_parameter(linear.name).shape
            out_features, in_features = (columns, rows) if linear.transposed else (rows, columns)
            contraction = self._contraction(out_features, in_features)
            found.append(
                ScoredShape(linear.layer, out_features, in_features, linear.is_value, contraction)
            )
        return found

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

    def _contraction(self, out_features: int, in_features: int) -> ContractionName:
        valuation, ranks = self.config.valuation, self.sharding.ranks
        if valuation.contraction != "auto":
            return CONTRACTIONS[valuation.contraction]
        step = self.workload.responses * self.workload.micro_batches
        return cheaper_contraction(
            self.held_out_count, step * valuation.refresh_every, in_features, out_features, ranks
        )

    @property
    def held_out_count(self) -> int:
        """Held-out response tokens over all ranks (N)."""
        rows = self.config.valuation.validation_sequences
        return rows * self.workload.held_out_responses // max(self.workload.held_out_rows, 1)


def draw(config: RunConfig, rows: Rows, ranks: int) -> Blueprint:
    """The blueprint of a run on so many ranks. Raises UserError for what the run would refuse
    before loading a model, and where the model cannot be planned.
    """
    values = deepspeed_config(config, ranks)
    check_before_loading(config, here=False)
    decoder = decoder_of(model_without_weights(config.model, COUNTED_ATTENTION))
    decoder.freeze_unreached()
    sharding = sharding_of(values, ranks, 2 if config.model.dtype == "bfloat16" else 4)
    workload = workload_of(config, rows, ranks)
    valued = config.valuation.enabled
    depth = scored_depth(config.valuation.layers, len(decoder.layers)) if valued else 0
    tracer = Tracer(decoder, config.valuation, depth)
    body = tracer.run(workload.rows, workload.row_tokens)
    held_out = tracer.run(workload.held_out_rows, workload.row_tokens) if valued else body
    gathers = None
    if sharding.stage == 3:
        gathers = gathers_of(
            decoder,
            sharding,
            held_out_batches=workload.held_out_batches,
            micro_batches=workload.micro_batches,
            checkpointing=config.train.gradient_checkpointing,
        )
    return Blueprint(config, decoder, sharding, workload, body, held_out, gathers)
