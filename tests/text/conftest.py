"""A tokenizer that numbers its words."""

import pytest
from transformers import BertTokenizer

from text_support import NUMBER_OF_TOKENS, SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer():
    """Knows the words t5, t6, ...; the token of t7 is 7."""
    words = [f"t{number}" for number in range(len(SPECIAL_TOKENS), NUMBER_OF_TOKENS)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(SPECIAL_TOKENS + words)})
