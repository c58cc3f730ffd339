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
from .features import feature_rows
from .interventions import replace_lambdas
from .maps import TokenShares, attention, token_shares
from .probes import ProbeResult, difference, is_encoded, probe
from .traces import LambdaTrace, LayerTrace, trace_lambdas

__all__ = [
    "Attribution",
    "Example",
    "Explanation",
    "LayerContributions",
    "LambdaTrace",
    "LayerTrace",
    "ProbeResult",
    "TokenShares",
    "attention",
    "difference",
    "explain_prediction",
    "faithfulness",
    "feature_rows",
    "gradient_times_input",
    "integrated_gradients",
    "is_encoded",
    "leave_one_out",
    "masked_examples",
    "probe",
    "replace_lambdas",
    "token_shares",
    "trace_lambdas",
]
