"""Loading a teacher and its tokenizer, and refusing what is not a BERT."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from conversion_lambdabert import check_bert
from lambdabert.distillation.teacher import Teacher
from lambdabert.saved_models import SENTENCE_MODULES, check_case, load_with_missing, sentence_module_paths
from lambdabert.text.tokenizers import check_tokenizer
from lambdabert.training.models import non_finite_weights, note_precision
from lambdabert.training.tokenizers import load_tokenizer

STUDENTS = {
    "BertModel": "LambdaBertModel",
    "BertForPreTraining": "LambdaBertForPreTrainingNSP",
    "BertForMaskedLM": "LambdaBertForMaskedLM",
    "BertForNextSentencePrediction": "LambdaBertForNextSentencePrediction",
    "BertForSequenceClassification": "LambdaBertForSequenceClassification",
    "BertForTokenClassification": "LambdaBertForTokenClassification",
    "BertForQuestionAnswering": "LambdaBertForQuestionAnswering",
}
LARGEST_VOCABULARY_PADDING = 128  # tables of embeddings are rounded up to a multiple, of at most this number


def load_teacher(name: str) -> tuple[Teacher, PreTrainedTokenizerBase, Any]:
    """Loads a teacher.

    Args:
        name: a folder or hub name of a BERT, or of a sentence-transformers model of one.

    Returns:
        The teacher; its tokenizer; and the sentence-transformers model, or None.

    Raises:
        ValueError: it cannot be read, is not a BERT, lacks weights, holds some that are not finite, or has another's
            tokenizer.
    """
    sentence_transformer = None
    try:
        if has_sentence_modules(name):
            sentence_transformer = load_sentence_transformer(name)
            bert, tokenizer = sentence_transformer[0].auto_model, sentence_transformer.tokenizer
        else:
            bert, tokenizer = load_bert_and_tokenizer(name)
    except Exception as error:  # a broken file raises whatever its reader stumbles over
        if type(error) is ValueError:  # not one of JSON or of Unicode, which do not name the file
            raise
        raise ValueError(
            f"teacher={name} cannot be read ({type(error).__name__}: {error}); name a folder or a hub model."
        ) from error
    check_teachers_tokenizer(tokenizer, bert.config, name)
    teacher = Teacher(bert, tuple(sentence_transformer or ())[1:])
    if bad := non_finite_weights(bert, *teacher.sentence_modules):
        raise ValueError(f"teacher={name} has weights that are not finite ({', '.join(bad[:3])}); name another.")
    return teacher, tokenizer, sentence_transformer


def has_sentence_modules(name: str) -> bool:
    """Whether a folder or hub name is a sentence-transformers model."""
    try:
        return cached_file(name, SENTENCE_MODULES) is not None
    except OSError:  # no such file, no such model, or no access; loading it says which
        return False


def load_sentence_transformer(name: str) -> Any:
    """Loads a sentence-transformers model whose transformer is a BERT.

    Raises:
        ValueError: the package is missing, the model cannot be used, or it lacks weights.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            f"teacher={name} is a sentence-transformers model: install it with `pip install sentence-transformers`."
        ) from None
    model = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": torch.float32})
    transformer: Any = getattr(model[0], "auto_model", None)
    if transformer is None:
        raise ValueError(f"teacher={name} starts with a {type(model[0]).__name__}, not with a BERT.")
    check_bert(transformer.config.to_dict(), name)
    check_case(model, f"teacher={name}")
    # sentence-transformers does not say which weights it made up, so the BERT is loaded once more, by what does
    subfolder = sentence_module_paths(Path(str(cached_file(name, SENTENCE_MODULES))).parent)[0]
    if load_complete_bert(name, type(transformer), subfolder).pooler is None:
        transformer.pooler = None
    note_precision(f"teacher={name}", BertConfig.get_config_dict(name, subfolder=subfolder)[0])
    return model


def load_bert_and_tokenizer(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a BERT as the class that its config names, and its tokenizer.

    Raises:
        ValueError: not BERT's architecture, no tokenizer, or weights that are missing.
    """
    fields, _ = BertConfig.get_config_dict(name)
    check_bert(fields, name)
    note_precision(f"teacher={name}", fields)
    architecture = next(iter(fields.get("architectures") or ()), None)
    if architecture == "BertForMultipleChoice":
        raise ValueError(
            f"teacher={name} is a {architecture}, which this command does not train, since its texts come in choices: "
            "LambdaBertForMultipleChoice.from_bert converts it, to be fine-tuned."
        )
    bert_class = getattr(transformers, architecture) if architecture in STUDENTS else BertModel
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as error:
        raise no_tokenizer(name) from error
    return load_complete_bert(name, bert_class), tokenizer


def load_complete_bert(name: str, bert_class: type[PreTrainedModel], subfolder: str = "") -> PreTrainedModel:
    """A BERT as `load_with_missing` gives it. Raises ValueError if weights are missing."""
    bert, missing = load_with_missing(bert_class, name, subfolder)
    if missing:
        raise ValueError(
            f"teacher={name} has no weights for {', '.join(missing[:3])}, which would be random, and the "
            f"student would learn them; train or save it as a {bert_class.__name__}, or name another."
        )
    return bert


def no_tokenizer(name: str) -> ValueError:
    return ValueError(f"teacher={name} has no tokenizer that can be read: save the one that it was trained with there.")


def check_teachers_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
    """Refuses a tokenizer that is missing or another model's.

    Raises:
        ValueError: it holds no words, or its size is not that of the embeddings.
    """
    size = len(tokenizer)
    if size == len(tokenizer.all_special_tokens):
        raise no_tokenizer(name)
    check_tokenizer(tokenizer)
    if not size <= config.vocab_size < size + LARGEST_VOCABULARY_PADDING:
        raise ValueError(
            f"teacher={name} has vocab_size={config.vocab_size}, but its tokenizer has {size} tokens, so it is another "
            "model's: save the one that it was trained with there."
        )


def weights_hash(model: PreTrainedModel) -> str:
    """Distinguishes models by their weights."""
    content = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        content.update(name.encode())
        content.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    return content.hexdigest()[:16]
