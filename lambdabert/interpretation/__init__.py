"""What the lambdas hold: exact maps, explanations, interventions and probes."""

from .interventions import replace_lambdas
from .maps import TokenShares, attention, token_shares
from .traces import LambdaTrace, LayerTrace, trace_lambdas

__all__ = [
    "LambdaTrace",
    "LayerTrace",
    "TokenShares",
    "attention",
    "replace_lambdas",
    "token_shares",
    "trace_lambdas",
]
