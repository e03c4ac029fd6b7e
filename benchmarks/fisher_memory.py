r"""Peak memory of a Fisher estimate, per rank, beside the sum of what it should have to hold.

    MALLOC_MMAP_THRESHOLD_=65536 launch/local.sh --module benchmarks.fisher_memory \ --config
        configs/sft/smollm2_gsm8k.yaml fisher.batch_size=1 fisher.num_prompts=4 fisher.output=FOLDER

Takes the configuration of `recipes/fisher.py`. The peak is above what is resident once the model is
loaded. The variable makes glibc give back what is freed; otherwise it keeps some, which shows as
resident.
"""

from __future__ import annotations

import json
import sys

from transformers import PretrainedConfig

from alphatoken.cli import readable_errors
from alphatoken.config.help import parse_arguments
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives, zero3
from alphatoken.models.decoder import Decoder
from alphatoken.models.head import LOGIT_BLOCK_ELEMENTS
from alphatoken.models.scored import scored_depth
from alphatoken.stability.estimate import estimate_fisher, prepare_estimate
from benchmarks.measuring import Peak


def expected(decoder: Decoder, config: RunConfig, tokens: int, responses: int) -> dict[str, int]:
    """Bytes of what has to be held at once besides the loaded shards, on one rank, for one
    sequence."""
    size = 4 if config.model.dtype == "float32" else 2
    text: PretrainedConfig = decoder.config
    depth = scored_depth(config.valuation.layers, len(decoder.layers))
    scored = [
        zero3.full_shape(decoder.model.get_parameter(each.name))
        for each in decoder.scored_linears(depth)
    ]
    whole = {
        name: zero3.full_shape(each).numel() for name, each in decoder.model.named_parameters()
    }
    layer = sum(numel for name, numel in whole.items() if ".layers.0." in name)
    # Of one layer: what its linears take in and give out, and the gradients of that; and the
    # states between layers.
    features = sum(sum(shape) for shape in scored) // depth
    rows = min(responses, max(1, LOGIT_BLOCK_ELEMENTS // text.vocab_size))
    return {
        "largest gathered layer": max(layer, *whole.values()) * size,
        "activations of one sequence": tokens
        * (2 * features + (depth + 1) * text.hidden_size)
        * size,
        "one block of logits and their exponentials": rows * text.vocab_size * (4 + 4),
        "Fisher shards": sum(shape.numel() for shape in scored) * 4 // collectives.world_size(),
        "one dense linear": max(shape.numel() for shape in scored) * 4,
    }


def main() -> None:
    config = parse_arguments(RunConfig, "Peak memory of a Fisher estimate.")
    prepared = prepare_estimate(config)
    prompts, device = prepared.prompts, prepared.device
    longest = max(prompts.rows, key=lambda row: prompts.dataset.lengths[row])
    ((tokens, mask),) = prompts.dataset[int(longest)]
    if config.fisher.sampling == "rollout":
        length, responses = len(tokens) + config.fisher.max_new_tokens, config.fisher.max_new_tokens
    else:
        length, responses = len(tokens), int(mask.sum())
    peak = Peak(device).of(
        lambda: estimate_fisher(config, prepared.decoder, prepared.tokenizer, prompts, device)
    )
    peaks = collectives.gather_objects(peak)
    parts = expected(prepared.decoder, config, length, responses)
    if collectives.rank() == 0:
        shown = {
            **parts,
            "sum": sum(parts.values()),
            "measured above the loaded shards, per rank": peaks,
        }
        json.dump(shown, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    with readable_errors():
        main()
