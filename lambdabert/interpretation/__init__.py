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
from .figures import draw_contributions, draw_maps, draw_probes, save_figure
from .interventions import replace_lambdas
from .maps import TokenShares, attention, token_shares
from .page import ExplainedPrediction, save_html
from .probes import ProbeResult, difference, is_encoded, probe
from .swaps import SwapEffect, swap_effects
from .tasks import Task, probe_rows, probe_task, read_task, task_features
from .topics import Neighbours, chance, neighbours, topic_features
from .traces import LambdaTrace, LayerTrace, trace_lambdas

__all__ = [
    "Attribution",
    "Example",
    "ExplainedPrediction",
    "Explanation",
    "LambdaTrace",
    "LayerContributions",
    "LayerTrace",
    "Neighbours",
    "ProbeResult",
    "SwapEffect",
    "Task",
    "TokenShares",
    "attention",
    "chance",
    "difference",
    "draw_contributions",
    "draw_maps",
    "draw_probes",
    "explain_prediction",
    "faithfulness",
    "feature_rows",
    "gradient_times_input",
    "integrated_gradients",
    "is_encoded",
    "leave_one_out",
    "masked_examples",
    "neighbours",
    "probe",
    "probe_rows",
    "probe_task",
    "read_task",
    "replace_lambdas",
    "save_figure",
    "save_html",
    "swap_effects",
    "task_features",
    "token_shares",
    "topic_features",
    "trace_lambdas",
]
