"""The table of objectives fits the models and the batches that they are given."""

import inspect

import pytest

from lambdabert.text.objectives import MLM, NSP, OBJECTIVES, SENTENCES, SOP
from run_language_modeling import MODEL_CLASSES


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=lambda objective: objective.name)
def test_each_objective_has_a_model_that_takes_its_labels(objective):
    parameters = inspect.signature(MODEL_CLASSES[objective.name].forward).parameters
    assert set(objective.label_names) <= set(parameters)


def test_special_tokens_and_shortest_examples():
    """[CLS] A [SEP] B [SEP] and [CLS] A [SEP]."""
    for objective, special, shortest in ((NSP, 3, 5), (SOP, 3, 5), (MLM, 2, 3), (SENTENCES, 2, 3)):
        assert (objective.special_tokens, objective.shortest_example) == (special, shortest)
