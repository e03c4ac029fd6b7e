"""AlphaToken: token valuation and masking for LLM post-training at DeepSpeed scale."""

from importlib.metadata import version

from alphatoken.api import score_tokens
from alphatoken.config import ValuationConfig
from alphatoken.errors import UserError
from alphatoken.slices import load_fisher
from alphatoken.valuation import TokenValues

__all__ = ["TokenValues", "UserError", "ValuationConfig", "load_fisher", "score_tokens"]
__version__ = version("alphatoken")
