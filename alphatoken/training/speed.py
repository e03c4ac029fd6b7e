"""How much of what a device can do a step uses: model FLOPs over time and peak (MFU)."""

from __future__ import annotations

from dataclasses import dataclass

from alphatoken.distributed import zero3
from alphatoken.models.decoder import Decoder

TERA = 10**12

# Dense products of 16-bit numbers with float32 sums, in TFLOP/s, as the makers state them. The
# first whose words are all in the device's name counts.
PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("MI300X", 1307.4),
    ("RTX 4090", 165.2),
)


def peak_flops(device_name: str) -> float | None:
    """FLOPs a second of a device in 16 bit; None of one that is not listed."""
    known = device_name.replace("-", " ").split()
    if "Laptop" in known:  # another chip with less power under the same name
        return None
    for words, peak in PEAKS:
        if all(word in known for word in words.split()):
            return peak * TERA
    return None


@dataclass(frozen=True)
class TrainingFlops:
    """What plain fine-tuning on a step's tokens takes: forward and backward pass of the matrix
    products, 2 FLOPs per multiply-add.

    Attention is counted over whole rows, causal or not, as plans count it. What recomputing,
    valuing and refreshing take is not in it: a step that does more of that has a lower MFU.
    """

    per_token: int
    per_pair: int
    """Of each pair of tokens in one document."""

    def of(self, tokens: int, pairs: float) -> float:
        """FLOPs of so many tokens, with the sum of the documents' squared lengths."""
        return self.per_token * tokens + self.per_pair * pairs


def training_flops(decoder: Decoder) -> TrainingFlops | None:
    """Counted from the shapes of weights; None of a model with experts, which not every token
    meets, and of one whose configuration does not tell the size of its attention."""
    config = decoder.config
    if any(
        getattr(config, name, None)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    ):
        return None
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)
    if not heads or not width:
        return None
    kinds = getattr(config, "layer_types", None) or ["attention"] * len(decoder.layers)
    attending = sum("linear" not in kind and "attention" in kind for kind in kinds)
    per_token = 0
    for weight in [*decoder.layers.parameters(), decoder.head.weight]:
        shape = zero3.full_shape(weight)
        if len(shape) == 2:  # forward, with respect to the input, and to the weight
            per_token += 2 * shape.numel() * (2 + weight.requires_grad)
    return TrainingFlops(per_token=per_token, per_pair=12 * attending * heads * width)
