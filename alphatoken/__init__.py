"""AlphaToken: token valuation and masking for LLM post-training at DeepSpeed scale."""

from importlib.metadata import version

from alphatoken.config.sections import ValuationConfig
from alphatoken.distributed.shard_files import load_fisher
from alphatoken.errors import UserError
from alphatoken.values.algebra import TokenValues
from alphatoken.values.api import score_tokens

__all__ = ["TokenValues", "UserError", "ValuationConfig", "load_fisher", "score_tokens"]
__version__ = version("alphatoken")
