"""LambdaBERT: the model, and in its folders what trains, converts, reads and exports it.

The model's own modules stand beside this package, because a saved model carries copies of them.
"""

from configuration_lambdabert import LambdaBertConfig
from lambda_layer import LambdaLayer
from modeling_lambdabert import (
    LambdaBertForMaskedLM,
    LambdaBertForMultipleChoice,
    LambdaBertForNextSentencePrediction,
    LambdaBertForPreTrainingNSP,
    LambdaBertForPreTrainingSOP,
    LambdaBertForQuestionAnswering,
    LambdaBertForSequenceClassification,
    LambdaBertForTokenClassification,
    LambdaBertModel,
    LambdaBertPreTrainedModel,
)

__all__ = [
    "LambdaBertConfig",
    "LambdaBertForMaskedLM",
    "LambdaBertForMultipleChoice",
    "LambdaBertForNextSentencePrediction",
    "LambdaBertForPreTrainingNSP",
    "LambdaBertForPreTrainingSOP",
    "LambdaBertForQuestionAnswering",
    "LambdaBertForSequenceClassification",
    "LambdaBertForTokenClassification",
    "LambdaBertModel",
    "LambdaBertPreTrainedModel",
    "LambdaLayer",
]
