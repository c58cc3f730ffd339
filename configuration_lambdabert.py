"""Configuration of LambdaBERT: BERT's fields and those of the lambda layer that replaces self-attention."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

LAMBDA_NORMS = ("batch", "layer", "rms", "none")
POSITION_EMBEDDING_TYPES = ("absolute", "none")


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
        position_embedding_type: "absolute" adds BERT's position embeddings to the words'; "none" leaves positions to
            the lambda layers, which see distances alone. Without them a local scope has no limit of length.

    Raises:
        ValueError: one of these fields has a value that cannot work; the text names field, value and fix.
    """

    model_type = "lambdabert"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["lambda_params", "mlm_loss", "nsp_loss", "sop_loss"]

    num_lambda_queries: int = 8
    key_depth: int = 8
    intra_depth: int = 1
    local_context_size: int | None = None
    output_lambda_params: bool = False
    lambda_norm: str = "layer"
    position_embedding_type: str = "absolute"

    def __post_init__(self, **kwargs):
        auto_map = kwargs.pop("auto_map", None) or {}
        super().__post_init__(**kwargs)
        # every Auto class finds its code beside the saved weights, whichever of the classes was saved
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
        self.validate_lambda_layer()

    @property
    def longest_sequence(self) -> int | None:
        """Tokens that a sequence may have; None = any number."""
        unlimited = self.position_embedding_type == "none" and self.local_context_size is not None
        return None if unlimited else self.max_position_embeddings

    def validate_lambda_layer(self):
        """Checks the fields that LambdaBERT adds to BERT's, and those that it cannot serve."""
        for field in ("hidden_size", "max_position_embeddings", "num_lambda_queries", "key_depth", "intra_depth"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"{field}={value} leaves nothing to compute; set it to 1 or more.")
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
        if self.lambda_norm not in LAMBDA_NORMS:
            raise ValueError(f"lambda_norm={self.lambda_norm!r} is unknown; set it to one of {LAMBDA_NORMS}.")
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} is unknown; set it to one of "
                f"{POSITION_EMBEDDING_TYPES}: relative positions are the lambda layer's own."
            )
        for field in ("is_decoder", "add_cross_attention"):
            if getattr(self, field):
                raise ValueError(f"{field}=True: LambdaBERT is an encoder that sees both directions; set it to False.")


LambdaBertConfig.register_for_auto_class()

__all__ = ["LambdaBertConfig"]
