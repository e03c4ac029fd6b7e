"""AlphaToken: token valuation and masking for LLM post-training at DeepSpeed scale."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphatoken.config.valuation import ValuationConfig
    from alphatoken.distributed.shard_files import load_fisher
    from alphatoken.errors import UserError
    from alphatoken.values.algebra import TokenValues
    from alphatoken.values.api import score_tokens
    from alphatoken.values.registry import register_estimator

    __version__: str

__all__ = [
    "TokenValues",
    "UserError",
    "ValuationConfig",
    "load_fisher",
    "register_estimator",
    "score_tokens",
]

# Imported when first asked for: torch, transformers and DeepSpeed take seconds, which a command
# that only prints its keys or refuses one need not wait for.
_HOMES = {
    "TokenValues": "alphatoken.values.algebra",
    "UserError": "alphatoken.errors",
    "ValuationConfig": "alphatoken.config.valuation",
    "load_fisher": "alphatoken.distributed.shard_files",
    "register_estimator": "alphatoken.values.registry",
    "score_tokens": "alphatoken.values.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("alphatoken")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
