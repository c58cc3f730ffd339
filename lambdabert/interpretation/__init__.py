"""What the lambdas hold: exact maps, explanations, interventions and probes."""

from .explanations import (
    Attribution,
    Explanation,
    LayerContributions,
    explain_prediction,
    gradient_times_input,
    integrated_gradients,
)
from .faithfulness import Example, faithfulness, leave_one_out, masked_examples
from .interventions import replace_lambdas
from .maps import TokenShares, attention, token_shares
from .traces import LambdaTrace, LayerTrace, trace_lambdas

__all__ = [
    "Attribution",
    "Example",
    "Explanation",
    "LayerContributions",
    "LambdaTrace",
    "LayerTrace",
    "TokenShares",
    "attention",
    "explain_prediction",
    "faithfulness",
    "gradient_times_input",
    "integrated_gradients",
    "leave_one_out",
    "masked_examples",
    "replace_lambdas",
    "token_shares",
    "trace_lambdas",
]
