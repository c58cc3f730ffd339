"""Configuration of LambdaBERT: BERT's fields and those of the lambda layer that replaces self-attention."""

import math
import shutil
from os import PathLike
from pathlib import Path
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BertConfig
from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import get_relative_import_files

LAMBDA_NORMS = ("batch", "layer", "rms", "none")
POSITION_EMBEDDING_TYPES = ("absolute", "none")
CLASSIFIER_POOLINGS = ("cls", "sep")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")

RANGES = {  # (lowest value, exclusive upper bound): fields
    (1, float("inf")): (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "max_position_embeddings",
        "type_vocab_size",
        "num_lambda_queries",
        "key_depth",
        "intra_depth",
    ),
    (0, float("inf")): ("initializer_range", "layer_norm_eps"),
    (0, 1): ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
}


@strict
class LambdaBertConfig(BertConfig):
    """Configuration of every LambdaBERT model.

    All fields of `BertConfig` keep their meaning, except that there is no attention: `num_attention_heads`,
    `attention_probs_dropout_prob` and `use_cache` have no effect, and a decoder or cross-attention is refused.

    Args:
        num_lambda_queries: H, queries per position; they share the lambdas and divide `hidden_size` into values of
            depth V = D / H.
        key_depth: K, depth of a query and of a key.
        intra_depth: U, key-value pairs per position that are summed into one lambda.
        local_context_size: R, the number of positions that a position lambda sees, centred on its own (odd).
            `None` lets it see the whole sequence, up to `max_position_embeddings` tokens.
        output_lambda_params: whether models return the content lambda of every layer, [B, K, V] each.
        lambda_norm: normalisation of queries and values. "batch" is the paper's, with statistics of real tokens only;
            it makes an example's result depend on its batch while training. "layer" and "rms" see one token at a
            time, "none" leaves both as projected.
        content_gain: whether to multiply the content lambda by a learned gain, one per layer and key channel, that
            starts at 0, so that a new model begins with position lambdas alone. `False` is the paper's layer.
        repetition_context_size: R' (odd), how many positions are read around each other occurrence of a position's
            token, by a third lambda whose table starts at 0. It needs `input_ids`. `None`: no such lambda, as in the
            paper.
        mask_token_id: id of the tokenizer's [MASK], whose occurrences do not count as repetitions. `None`: a repetition
            lambda takes all masked tokens for the same word.
        position_embedding_type: "absolute" adds BERT's position embeddings to the words'; "none" leaves positions to
            the lambda layers, which see distances alone. Without them a local scope has no limit of length.
        classifier_pooling: the token whose last hidden state the pooling layer takes. "cls" is the first, as in BERT;
            "sep" the last of the first segment, which in a pair is the [SEP] between the two. With a local scope, [CLS]
            sees distant tokens only through content lambdas, which do not tell their order.

    Raises:
        ValueError: a field, one of BERT's included, has a value that cannot work; the message names field, value and
            fix.
        StrictDataclassError: a field has the wrong type; or, when a model is built, a wrong value that was set later.
    """

    model_type = "lambdabert"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["lambda_params", "mlm_loss", "nsp_loss", "sop_loss"]

    num_lambda_queries: int = 8
    key_depth: int = 8
    intra_depth: int = 1
    local_context_size: int | None = None
    output_lambda_params: bool = False
    lambda_norm: str = "layer"
    content_gain: bool = False
    repetition_context_size: int | None = None
    mask_token_id: int | None = None
    position_embedding_type: str = "absolute"
    classifier_pooling: str = "cls"

    def __post_init__(self, **kwargs):
        auto_map = kwargs.pop("auto_map", None) or {}
        super().__post_init__(**kwargs)
        # every Auto class finds its code beside the saved weights, whichever class was saved
        self.auto_map = {
            "AutoConfig": "configuration_lambdabert.LambdaBertConfig",
            "AutoModel": "modeling_lambdabert.LambdaBertModel",
            "AutoModelForPreTraining": "modeling_lambdabert.LambdaBertForPreTrainingNSP",
            "AutoModelForMaskedLM": "modeling_lambdabert.LambdaBertForMaskedLM",
            "AutoModelForNextSentencePrediction": "modeling_lambdabert.LambdaBertForNextSentencePrediction",
            "AutoModelForSequenceClassification": "modeling_lambdabert.LambdaBertForSequenceClassification",
            "AutoModelForTokenClassification": "modeling_lambdabert.LambdaBertForTokenClassification",
            "AutoModelForQuestionAnswering": "modeling_lambdabert.LambdaBertForQuestionAnswering",
            "AutoModelForMultipleChoice": "modeling_lambdabert.LambdaBertForMultipleChoice",
            **auto_map,
        }
        self.architectures = self.architectures or []  # an Auto class of several models walks through it
        self.validate_lambda_layer()  # before @strict's own call, which would wrap the ValueError

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Saves the config with the code that its `auto_map` names.

        transformers copies the file that defines a saved class, and nothing for a class from a notebook or for a config
        that is saved alone.
        """
        here, folder = Path(__file__).parent, Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        named = {str(reference).partition(".")[0] for reference in self.auto_map.values()}
        for file in (_code_file(here, module) for module in named):  # others are a subclass's, or on the hub
            for source in (file, *map(Path, get_relative_import_files(file))) if file.is_file() else ():
                target = folder / source.name
                if not (target.exists() and target.samefile(source)):
                    shutil.copyfile(source, target)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def longest_sequence(self) -> int | None:
        """Tokens that a sequence may have; None = any number."""
        unlimited = self.position_embedding_type == "none" and self.local_context_size is not None
        return None if unlimited else self.max_position_embeddings

    def validate_lambda_layer(self) -> None:
        """Checks that the fields together make a model, BERT's own among them."""
        for (lowest, bound), fields in RANGES.items():
            for field in fields:
                value = getattr(self, field)
                if value is not None and not lowest <= value < bound:  # NaN is in no range
                    end = f" and less than {bound}" if math.isfinite(bound) else ""
                    raise ValueError(
                        f"{field}={value} is out of range; set it to a finite number, {lowest} or more{end}."
                    )
        for field in ("pad_token_id", "mask_token_id"):
            token = getattr(self, field)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{field}={token} is outside the vocabulary of vocab_size={self.vocab_size}; set it to the "
                    f"tokenizer's {field}, or to None."
                )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is unknown; set it to one of {', '.join(sorted(ACT2FN))}."
            )
        if self.hidden_size % self.num_lambda_queries:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_lambda_queries={self.num_lambda_queries}: "
                "the queries share it evenly; change one of the two."
            )
        scope = self.local_context_size
        if scope is not None and (scope < 1 or scope % 2 == 0):
            raise ValueError(
                f"local_context_size={scope}: a local scope is centred on its own position; set it to an odd number "
                "from 1 on, or to None for a global scope."
            )
        around = self.repetition_context_size
        if around is not None and (around < 1 or around % 2 == 0):
            raise ValueError(
                f"repetition_context_size={around}: the places around an occurrence have it at their middle; set it to "
                "an odd number from 1 on, or to None for no repetition lambda."
            )
        if self.lambda_norm not in LAMBDA_NORMS:
            raise ValueError(f"lambda_norm={self.lambda_norm!r} is unknown; set it to one of {LAMBDA_NORMS}.")
        if self.lambda_norm == "layer" and self.hidden_size == self.num_lambda_queries and self.intra_depth == 1:
            raise ValueError(
                f"num_lambda_queries={self.num_lambda_queries} leaves hidden_size={self.hidden_size} a single channel "
                "of values, which lambda_norm='layer' takes off as its own mean: use fewer, or another norm."
            )
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} is unknown; set it to one of "
                f"{POSITION_EMBEDDING_TYPES}: relative positions are the lambda layer's own."
            )
        if self.classifier_pooling not in CLASSIFIER_POOLINGS:
            raise ValueError(
                f"classifier_pooling={self.classifier_pooling!r} is unknown; set it to one of {CLASSIFIER_POOLINGS}."
            )
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type={self.problem_type!r} is unknown; set it to one of {PROBLEM_TYPES}.")
        if not self.id2label or sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(
                f"id2label={self.id2label}: give a name to each number from 0 to num_labels - 1, to one or more."
            )
        for field in ("is_decoder", "add_cross_attention"):
            if getattr(self, field):
                raise ValueError(f"{field}=True: LambdaBERT is an encoder that sees both directions; set it to False.")


def _code_file(here: Path, module: str) -> Path:
    """The file of a module: beside this one or, for a saved model, in whichever of transformers' cache folders, one per
    loaded class, holds the newest copy."""
    file = here / f"{module}.py"
    if file.is_file() or not __name__.startswith("transformers_modules."):
        return file
    return max(here.parent.glob(f"*/{module}.py"), key=lambda found: found.stat().st_mtime, default=file)


LambdaBertConfig.register_for_auto_class()

__all__ = ["LambdaBertConfig"]
