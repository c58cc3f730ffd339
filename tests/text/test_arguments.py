"""Options of text: values that cannot be, and options without effect."""

import pytest
from transformers import HfArgumentParser

from lambdabert.text.arguments import CorpusArguments, DataArguments


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"corpus": "klingon"}, "corpus='klingon' is unknown: use one of python-docs"),
        ({"document_boundary": "page"}, "document_boundary='page'"),
        ({"train_file": "a.txt", "corpus": "python-docs"}, "train_file and corpus are both given"),
        ({"dataset_config_name": "x"}, "needs dataset_name"),
        ({"validation_split_percentage": 100.0}, "validation_split_percentage=100.0"),
        ({"encoding": "klingon"}, "encoding='klingon' is not a text encoding"),
        ({"encoding": "rot13"}, "encoding='rot13' is not a text encoding"),
        ({"line_breaks": "maybe"}, "line_breaks='maybe' is unknown: use one of keep, join"),
        ({"line_breaks": "join", "document_boundary": "row"}, "line_breaks='join' contradicts"),
        ({"dataset_name": ""}, "dataset_name is given without a value"),
        (
            {"train_file": "a", "validation_file": "b", "validation_split_percentage": 5.0},
            "validation_split_percentage=5.0 has no effect: validation_file",
        ),
        ({"streaming": True, "validation_split_percentage": 5.0}, "no effect: documents cannot be held out"),
        (
            {"train_file": "a", "streaming": True, "preprocessing_num_workers": 2},
            "preprocessing_num_workers=2 has no effect",
        ),
        ({"preprocessing_num_workers": 0}, "preprocessing_num_workers=0"),
    ],
)
def test_contradictory_arguments(fields, problem):
    with pytest.raises(ValueError, match=problem):
        CorpusArguments(**fields)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_seq_length": 4}, "max_seq_length=4 is too small.*needs 5"),
        ({"max_seq_length": 2, "objective": "mlm"}, "max_seq_length=2 is too small.*needs 3"),
        ({"objective": "rtd"}, "objective='rtd' is unknown: use one of nsp, sop, mlm"),
        ({"objective": "mlm", "sop": True}, "sop=True contradicts"),
        ({"objective": "nsp", "sop": True}, "sop=True contradicts"),
        ({"objective": "mlm", "language": "de"}, "language='de' has no effect"),
        ({"objective": "mlm", "short_seq_probability": 0.1}, "short_seq_probability=0.1 has no effect"),
        ({"shuffle_buffer_size": 10}, "shuffle_buffer_size=10 has no effect"),
        ({"mlm_probability": 1.5}, "mlm_probability=1.5"),
        ({"mlm_probability": 0.0}, "^mlm_probability=0 leaves nothing to predict"),
        ({"eval_mlm_probability": -0.1}, "eval_mlm_probability=-0.1"),
        ({"eval_mlm_probability": 0.0}, "eval_mlm_probability=0 leaves nothing to predict"),
        ({"mask_replace_prob": 0.9, "random_replace_prob": 0.2}, "exceed 1 together"),
        ({"dupe_factor": 0}, "dupe_factor=0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0"),
    ],
)
def test_impossible_recipes_are_refused(fields, problem):
    with pytest.raises(ValueError, match=problem):
        DataArguments(corpus="python-docs", **fields)


def test_arguments_are_flags():
    (parsed,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(
        ["--train_file", "a.txt", "b.txt", "--sop", "--max_seq_length", "64"]
    )
    assert (parsed.train_file, parsed.objective, parsed.max_seq_length) == (["a.txt", "b.txt"], "sop", 64)
