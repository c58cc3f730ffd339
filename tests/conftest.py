"""What the model tests share: tiny configurations and inputs. No test reaches the network."""

import importlib
import logging
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the tests run in several processes, each small

import datasets
import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from transformers import AutoTokenizer

# a draw may be a run of a command, in seconds
SLOW_DRAWS = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.register_profile("same", **SLOW_DRAWS, derandomize=True, max_examples=50, phases=[Phase.generate])
settings.register_profile("hunt", **SLOW_DRAWS, max_examples=1000, print_blob=True)
settings.load_profile("same")


@pytest.fixture(autouse=True)
def what_a_command_sets():
    """Takes back what a command sets in the process of a test: others are started in forks, which inherit that."""
    handlers = logging.root.handlers[:]
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    levels = {logger: logger.level for logger in loggers}
    yield
    for logger, level in levels.items():
        logger.setLevel(level)
    logging.root.handlers[:] = [handler for handler in logging.root.handlers if handler in handlers]
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


MODEL_CLASS_NAMES = [
    "LambdaBertModel",
    "LambdaBertForPreTrainingNSP",
    "LambdaBertForPreTrainingSOP",
    "LambdaBertForMaskedLM",
    "LambdaBertForNextSentencePrediction",
    "LambdaBertForSequenceClassification",
    "LambdaBertForTokenClassification",
    "LambdaBertForQuestionAnswering",
    "LambdaBertForMultipleChoice",
]


@pytest.fixture(params=MODEL_CLASS_NAMES)
def model_class(request):
    """Each of the nine model classes."""
    return getattr(importlib.import_module("modeling_lambdabert"), request.param)


@pytest.fixture(params=MODEL_CLASS_NAMES[1:])
def head_class(request):
    """Each of the eight model classes that compute a loss."""
    return getattr(importlib.import_module("modeling_lambdabert"), request.param)


@pytest.fixture
def make_config():
    """Builds a tiny `LambdaBertConfig` without dropout; keyword arguments override its fields."""

    def build(**overrides):
        fields = {
            "vocab_size": 60,
            "hidden_size": 20,
            "num_hidden_layers": 2,
            "intermediate_size": 28,
            "max_position_embeddings": 40,
            "num_lambda_queries": 4,
            "key_depth": 3,
            "intra_depth": 2,
            "local_context_size": 5,
            "lambda_norm": "layer",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
        return importlib.import_module("configuration_lambdabert").LambdaBertConfig(**(fields | overrides))

    return build


def random_inputs(model_class, config, batch=3, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2, length) if "MultipleChoice" in model_class.__name__ else (batch, length)
    return {
        "input_ids": torch.randint(5, config.vocab_size, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
    }


def random_labels(model_class, config, batch=3, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    name = model_class.__name__
    if "PreTraining" in name or "MaskedLM" in name:
        token_labels = draw(config.vocab_size, batch, length)
        token_labels[:, ::2] = -100
        labels = {"labels": token_labels}
        if name.endswith("NSP"):
            labels["next_sentence_label"] = draw(2, batch)
        if name.endswith("SOP"):
            labels["sentence_order_label"] = draw(2, batch)
        return labels
    if "TokenClassification" in name:
        return {"labels": draw(config.num_labels, batch, length)}
    if "QuestionAnswering" in name:
        return {"start_positions": draw(length, batch), "end_positions": draw(length, batch)}
    if name == "LambdaBertModel":
        return {}
    return {"labels": draw(2, batch)}


@pytest.fixture
def make_inputs():
    """Builds a batch for a model class without padding: `input_ids`, `attention_mask`, `token_type_ids`."""
    return random_inputs


@pytest.fixture
def make_labels():
    """Builds the labels of a model class, none for `LambdaBertModel`."""
    return random_labels


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with train.txt, valid.txt, a tokenizer and room for a cache."""
    training_support = importlib.import_module("training_support")
    folder = tmp_path_factory.mktemp("text")
    train = training_support.write_text(folder / "train.txt")
    training_support.write_text(folder / "valid.txt", documents=4, seed=1)
    sentences = Path(train).read_text().split("\n")
    importlib.import_module("lambdabert.text.tokenizers").train_wordpiece(sentences, 200).save_pretrained(
        folder / "tokenizer"
    )
    return folder


@pytest.fixture(scope="session")
def teachers(text, tmp_path_factory):
    """Folders of tiny BERTs with the text's tokenizer, by kind."""
    training_support = importlib.import_module("training_support")
    folder = tmp_path_factory.mktemp("teachers")
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    tokenizer.model_max_length = 40
    labels = {0: "red", 1: "green", 2: "blue"}
    for kind, bert_class in training_support.BERTS.items():
        bert = training_support.tiny_bert(
            bert_class, vocab_size=len(tokenizer), id2label=labels, hidden_dropout_prob=0.2
        )
        bert.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="session")
def sentence_teacher(teachers):
    """The folder of a tiny sentence-transformers model with everything that a conversion is to keep."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    transformer = modules.Transformer(str(teachers / "plain"), max_seq_length=24)
    model = sentence_transformers.SentenceTransformer(
        modules=[transformer, modules.Pooling(24, "cls"), modules.Normalize()],
        prompts={"query": "the fox: "},
        default_prompt_name="query",
        similarity_fn_name="dot",
        device="cpu",
    )
    model.save(str(teachers / "sentences"))
    return teachers / "sentences"
