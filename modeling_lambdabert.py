"""LambdaBERT: BERT with lambda layers in place of self-attention.

The classes subclass those of `transformers`' BERT and keep their parameter names, so that a BERT checkpoint loads its
embeddings, feed-forward layers, pooler and heads. What differs is `LambdaLayer`, at
`bert.encoder.layer[i].attention.self`.

Shapes: B batch, N tokens, D hidden_size, K key_depth, V = D / num_lambda_queries.
"""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce, wraps
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertEncoder,
    BertIntermediate,
    BertLayer,
    BertOnlyMLMHead,
    BertOnlyNSPHead,
    BertOutput,
    BertPooler,
    BertPreTrainingHeads,
    BertSelfOutput,
)
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, find_labels
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

try:  # the flat form serves this repository, the relative one a saved model's folder
    from .configuration_lambdabert import PROBLEM_TYPES, LambdaBertConfig
    from .conversion_lambdabert import convert_weights, converted_config, load_bert
    from .lambda_kernels import as_a_whole
    from .lambda_layer import LambdaLayer, as_token_mask, can_read_values
    from .packing_lambdabert import Packing, Padded, lay_out
except ImportError:
    if __package__:
        raise
    from configuration_lambdabert import PROBLEM_TYPES, LambdaBertConfig
    from conversion_lambdabert import convert_weights, converted_config, load_bert
    from lambda_kernels import as_a_whole
    from lambda_layer import LambdaLayer, as_token_mask, can_read_values
    from packing_lambdabert import Packing, Padded, lay_out

logger = logging.getLogger(__name__)

# what every model accepts besides the arguments that its forward names; transformers and the tools around it pass these
KEYWORD_ARGUMENTS = {
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_lambda_params",
    "return_dict",
    "use_cache",
}

FEED_FORWARD_TILE = 512  # tokens, few enough for their intermediate states to reuse the same memory


def refuses_unknown_arguments(forward: Callable) -> Callable:
    """Makes a `forward` refuse keyword arguments that it cannot use, above all the label of another task.

    An argument that is None counts as not given. The signature shows no `**kwargs`: tools that find one there pass on
    whatever they have.
    """
    signature = inspect.signature(forward)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    known = KEYWORD_ARGUMENTS.union(parameter.name for parameter in named)

    @wraps(forward)
    def checked(self, *args, **kwargs):
        unknown = [name for name, value in kwargs.items() if name not in known and value is not None]
        if unknown:
            raise ValueError(
                f"{type(self).__name__} cannot use {', '.join(unknown)}: leave it out. The labels that it takes: "
                f"{', '.join(find_labels(type(self))) or 'none'}."
            )
        return forward(self, *args, **{name: value for name, value in kwargs.items() if value is not None})

    checked.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return checked


@dataclass
class LambdaBertModelOutput(ModelOutput):
    """Output of `LambdaBertModel`.

    Attributes:
        last_hidden_state: [B, N, D], 0 at padding.
        pooler_output: [B, D], or None without a pooling layer.
        hidden_states: the embeddings and every layer's output, [B, N, D] each, if asked for.
        lambda_params: every layer's content lambda, gain included (0 in a new model with `content_gain`), [B, K, V]
            each, if asked for.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    lambda_params: tuple[torch.Tensor, ...] | None = None


@dataclass
class LambdaBertForPreTrainingOutput(ModelOutput):
    """Output of the pretraining models.

    Attributes:
        loss: the sum of the parts whose labels were given, a scalar.
        prediction_logits: [B, N, vocab_size]; of the masked tokens alone in a Trainer's training step.
        seq_relationship_logits: [B, 2]
        hidden_states, lambda_params: as in `LambdaBertModelOutput`.
        mlm_loss, nsp_loss, sop_loss: the parts of the loss, scalars.
    """

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    seq_relationship_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    lambda_params: tuple[torch.Tensor, ...] | None = None
    mlm_loss: torch.Tensor | None = None
    nsp_loss: torch.Tensor | None = None
    sop_loss: torch.Tensor | None = None


@dataclass
class LambdaBertHeadOutput(ModelOutput):
    """Output of the models with one head; the shape of the logits is the head's.

    In a training step of `LambdaBertForMaskedLM` that is given `num_items_in_batch`, as the Trainer's is, they are
    those of the M masked tokens alone, [M, vocab_size].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    lambda_params: tuple[torch.Tensor, ...] | None = None


@dataclass
class LambdaBertQuestionAnsweringOutput(ModelOutput):
    """Output of `LambdaBertForQuestionAnswering`; the logits are [B, N] each."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    lambda_params: tuple[torch.Tensor, ...] | None = None


class LambdaBertEmbeddings(BertEmbeddings):
    """BERT's embeddings of words, segments and, unless `position_embedding_type="none"`, positions."""

    def __init__(self, config: LambdaBertConfig):
        super().__init__(config)
        if config.position_embedding_type == "none":
            self.position_embeddings = None  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.position_embeddings is not None:
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)  # type: ignore[arg-type]
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            token_type_ids = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        return self.dropout(self.LayerNorm(words + self.token_type_embeddings(token_type_ids)))

    def check_positions(self, shape: torch.Size, position_ids: torch.Tensor | None) -> None:
        """Refuses tokens [B, N] = `shape` that the position table does not hold, and `position_ids` that are not [B, N]
        or [1, N] or point outside it."""
        if self.position_embeddings is None:
            return
        batch, length = shape
        limit = self.position_embeddings.num_embeddings
        if position_ids is None and length > limit:
            raise ValueError(
                f"The sequence has {length} tokens, but max_position_embeddings={limit}: shorten the input (a "
                f"tokenizer does with truncation=True, max_length={limit}) or use a model with a larger "
                "max_position_embeddings."
            )
        if position_ids is None or is_tracing(position_ids):
            return
        if position_ids.shape not in ((batch, length), (1, length)):
            raise ValueError(
                f"position_ids is {list(position_ids.shape)}, but there are {[batch, length]} tokens: give one for "
                f"each, or {[1, length]} for all rows."
            )
        if can_read_values(position_ids) and position_ids.numel():
            lowest, highest = int(position_ids.min()), int(position_ids.max())
            if lowest < 0 or highest >= limit:
                raise ValueError(
                    f"position_ids range from {lowest} to {highest}, but max_position_embeddings={limit} allows 0 to "
                    f"{limit - 1}: change them, or use a model with a larger max_position_embeddings."
                )


# where modules are defined that treat every token on its own, or take any layout
PER_TOKEN = ("torch.", "transformers.", "peft.", "bitsandbytes.", "lambdabert.")
# modules whose hooks work on packed rows as well: they record outputs, give embeddings gradients, or shard weights
FREE_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils", "torch.distributed", "lambdabert.")


def _takes_any_layout(other: Any) -> bool:
    """Whether a hook, or a class of modules, is among `FREE_HOOKS`."""
    return (getattr(other, "__module__", None) or "").startswith(FREE_HOOKS)


def _is_watched(*modules: nn.Module) -> bool:
    """Whether code of others sees what modules compute, or changes it: by a hook on one or on all modules, by a
    `forward` of a single one, or as a part put in the place of another. It then gets whole rows [B, N, ...], as in
    BERT."""
    own = (__name__, LambdaLayer.__module__)
    of_all: Any = torch.nn.modules.module
    hooks = [*of_all._global_forward_pre_hooks.values(), *of_all._global_forward_hooks.values()]
    hooks += [*of_all._global_backward_pre_hooks.values(), *of_all._global_backward_hooks.values()]
    for module in (part for each in modules for part in each.modules()):
        kind = type(module).__module__
        if "forward" in vars(module) or not (kind in own or kind.startswith(PER_TOKEN)):
            return True
        hooks += [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        hooks += [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
    return not all(_takes_any_layout(hook) for hook in hooks)


class LambdaBertAttention(BertAttention):
    """A lambda layer, its output projection and the residual."""

    def __init__(self, config: LambdaBertConfig):
        nn.Module.__init__(self)  # BertAttention's own would build self-attention
        self.self = LambdaLayer(config)
        self.output = BertSelfOutput(config)
        # a small start, as in GPT-2; at BERT's size, a new model otherwise learns context later (docs/ablations.md)
        self.output.dense.init_std = config.initializer_range / (2 * config.num_hidden_layers) ** 0.5

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layout: Packing | Padded | None = None,
    ) -> torch.Tensor:
        context, _ = self.self(hidden_states, attention_mask, layout)
        return self.output(context, hidden_states)


class LambdaBertLayer(BertLayer):
    """A lambda layer and a feed-forward layer, each with residual and norm: [B, N, D] to [B, N, D]."""

    def __init__(self, config: LambdaBertConfig):
        nn.Module.__init__(self)
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.seq_len_dim = 1
        self.attention = LambdaBertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layout: Packing | Padded | None = None,
    ) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, attention_mask, layout)
        # tiles would draw another dropout mask than the recomputation of a checkpoint, which is whole
        as_given = self.training or as_a_whole(hidden_states) or _is_watched(self.intermediate, self.output)
        if self.chunk_size_feed_forward or as_given:
            return apply_chunking_to_forward(
                self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, hidden_states
            )
        tiles = hidden_states.flatten(0, 1).split(FEED_FORWARD_TILE)
        return torch.cat([self.feed_forward_chunk(tile) for tile in tiles]).view_as(hidden_states)


class LambdaBertEncoder(BertEncoder):
    """All layers, one after the other: [B, N, D] to [B, N, D]."""

    def __init__(self, config: LambdaBertConfig):
        nn.Module.__init__(self)
        self.config = config
        self.layer = nn.ModuleList([LambdaBertLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layout: Packing | Padded | None = None,
    ) -> BaseModelOutput:
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, layout)
        return BaseModelOutput(last_hidden_state=hidden_states)


class FullPrecisionLayerNorm(nn.LayerNorm):
    """Layer norm with statistics in float32 at least.

    On a CPU, torch keeps the statistics in the precision of the inputs. In float16, the scale of a row of equal numbers
    is then infinite and its gradient NaN, and padding is such a row in an MLM head.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(inputs.to(dtype), self.normalized_shape, weight, bias, self.eps).to(inputs.dtype)


class LambdaBertPreTrainedModel(BertPreTrainedModel):
    """Base of all models: how weights start, load and are saved, and which outputs can be recorded."""

    bert: Any  # the LambdaBertModel of a model with a head

    config_class = LambdaBertConfig
    base_model_prefix = "bert"
    _no_split_modules = ["LambdaBertEmbeddings", "LambdaBertLayer"]
    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    accepts_loss_kwargs = True  # the Trainer then gives num_items_in_batch
    _can_record_outputs = {"hidden_states": LambdaBertLayer, "lambda_params": LambdaLayer}

    def __init__(self, config: LambdaBertConfig):
        config.validate()  # fields may have been set after the config was made
        BertPreTrainedModel.__init__(self, config)  # not the Bert class's own, which would build self-attention

    def _encode(self, *inputs: torch.Tensor | None, **kwargs) -> LambdaBertModelOutput:
        """Output of the encoder below a head, for the inputs of `LambdaBertModel`."""
        return self.bert(*inputs, **kwargs | {"return_dict": True})

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in `transformers`; a ValueError where the config's [PAD] or [MASK] would be cut off."""
        multiple = kwargs.get("pad_to_multiple_of", args[0] if args else None) or 1
        for field in ("pad_token_id", "mask_token_id"):
            token = getattr(self.config, field)
            if new_num_tokens is not None and token is not None and token >= -(-new_num_tokens // multiple) * multiple:
                raise ValueError(
                    f"{new_num_tokens} tokens leave out {field}={token} of the config: keep more, or set "
                    f"config.{field} to that of the new tokenizer first."
                )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LambdaLayer):
            module.reset_parameters()
        elif isinstance(module, nn.Linear) and hasattr(module, "init_std"):
            # a projection into or out of a lambda layer; one alone may be missing
            init.normal_(module.weight, std=module.init_std)  # type: ignore[arg-type]

    @classmethod
    def from_bert(cls, bert: PreTrainedModel | str | PathLike, **lambda_settings) -> "LambdaBertPreTrainedModel":
        """Turns a trained BERT into a LambdaBERT, to be trained further: its lambda layers have learned nothing yet.

        Embeddings, feed-forward layers, norms, pooler and head are copied, and so are the config's fields. A pooler or
        head that the BERT lacks starts at random, as in `from_pretrained`. The log and `conversion_report` of the model
        say what became of each weight.

        Args:
            bert: a BERT of `transformers`, or the folder or hub name of one.
            lambda_settings: fields of `LambdaBertConfig`; `num_lambda_queries` is the BERT's number of attention heads
                unless given. A `max_position_embeddings` above the BERT's P continues the position table by its rows
                1 ... P - 1, again and again.

        Returns:
            The model, in evaluation mode, on the BERT's device. A BERT given as a model keeps its precision; from a
            folder or the hub it is loaded in float32, however it is stored, because the result is to be trained.

        Raises:
            ValueError: not a model, folder or name; not BERT's architecture, a decoder, cross-attention or relative
                positions; weights of the encoder that are missing; a setting that is not a field or contradicts the
                shape of a copied weight.
            OSError: no such folder or hub name.
        """
        bert_class = next(base for base in cls.__mro__ if base.__module__ == BertModel.__module__)
        teacher, missing = load_bert(bert, bert_class)
        model = cls(converted_config(teacher.config, cls.config_class, lambda_settings))
        model.to(device=teacher.device, dtype=teacher.dtype)  # type: ignore[call-arg]
        model.conversion_report = convert_weights(teacher, model, missing)
        logger.warning(f"{cls.__name__} from {type(teacher).__name__}:\n{model.conversion_report}")
        return model.eval()


class LambdaBertModel(LambdaBertPreTrainedModel, BertModel):
    """The encoder, with a pooling layer unless `add_pooling_layer=False`.

    Args:
        config: a `LambdaBertConfig`.
        add_pooling_layer: whether `pooler_output` is computed.
    """

    def __init__(self, config: LambdaBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings: LambdaBertEmbeddings = LambdaBertEmbeddings(config)
        self.encoder = LambdaBertEncoder(config)
        self.pooler: BertPooler | None = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        is_being_loaded = getattr(self.embeddings.word_embeddings.weight, "_is_hf_initialized", False)
        if is_being_loaded and self.pooler is not None and module is self.pooler.dense:
            # the same in every process: PEFT saves a fresh classifier with its adapter, but not the pooler below it
            generator = torch.Generator("cpu").manual_seed(0)
            weight = torch.randn(module.weight.shape, generator=generator, device="cpu")
            init.copy_(module.weight, self.config.initializer_range * weight)

    @refuses_unknown_arguments
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | LambdaBertModelOutput:
        """Encodes a batch.

        Args:
            input_ids: [B, N]; or give `inputs_embeds`.
            attention_mask: [B, N], 1 = token, 0 = padding; None = all are tokens.
            token_type_ids: [B, N], 0 for the first segment, 1 for the second; None = 0.
            position_ids: [B, N] or [1, N]; None = 0 ... N - 1, counted from the row's first place. Without effect
                where the config leaves out position embeddings.
            inputs_embeds: [B, N, D], in place of the word embeddings.
            kwargs: `output_hidden_states`, `output_lambda_params` and `return_dict`, each in place of the config's.

        Returns:
            A `LambdaBertModelOutput`; a tuple of what it holds, in its order, with `return_dict=False`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; an input of another shape; a mask that holds
                something other than 0 and 1; a token (on a CPU) or a position outside its table; no token, or more than
                the config's `longest_sequence`; attention weights asked for; a keyword argument that the model cannot
                use; `inputs_embeds` where `repetition_context_size` is set.
        """
        tokens = self._check_inputs(input_ids, inputs_embeds, position_ids, token_type_ids, **kwargs)
        token_mask = as_token_mask(attention_mask, tokens)
        may_pack = token_mask is not None and self._may_pack(tokens, token_mask, **kwargs)
        layout = lay_out(token_mask, may_pack, self._token_ids(input_ids))
        hidden_states = self.embeddings(
            input_ids=layout.pack(input_ids),
            token_type_ids=layout.pack(token_type_ids),
            position_ids=layout.position_ids(position_ids),
            inputs_embeds=layout.pack(inputs_embeds),
        )
        hidden_states = self.encoder(hidden_states, layout.attention_mask, layout).last_hidden_state
        hidden_states = layout.unpack(hidden_states)
        pooler_output = None
        if self.pooler is not None:
            pooling = self.config.classifier_pooling
            pooler_output = self.pooler(_pooled_token(hidden_states, layout.token_mask, token_type_ids, pooling))
        return LambdaBertModelOutput(last_hidden_state=hidden_states, pooler_output=pooler_output)

    def _check_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Refuses what cannot be encoded, before any look-up, and returns the tokens [B, N] or embeddings [B, N, D]."""
        tokens = inputs_embeds if input_ids is None else input_ids
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "output_attentions=True: a lambda layer has no attention weights; its content lambdas are returned "
                "with output_lambda_params=True."
            )
        if input_ids is None and self.config.repetition_context_size is not None:
            raise ValueError(
                f"repetition_context_size={self.config.repetition_context_size} needs to know which tokens are the "
                "same, and inputs_embeds do not tell: give input_ids. (A hook on the model's embeddings can change "
                "what they become.)"
            )
        if inputs_embeds is None and tokens.dim() != 2:
            raise ValueError(f"input_ids is {list(tokens.shape)}: give [batch, length].")
        if input_ids is None and (tokens.dim() != 3 or tokens.shape[2] != self.config.hidden_size):
            raise ValueError(
                f"inputs_embeds is {list(tokens.shape)}: give [batch, length, hidden_size={self.config.hidden_size}]."
            )
        self.embeddings.check_positions(tokens.shape[:2], position_ids)
        if input_ids is not None:
            table, fix = self.embeddings.word_embeddings, "use the model's own tokenizer, or resize_token_embeddings"
            _check_looked_up("input_ids", input_ids, table, fix)
        is_one_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if token_type_ids is not None and not is_one_graph and token_type_ids.shape != tokens.shape[:2]:
            raise ValueError(
                f"token_type_ids is {list(token_type_ids.shape)}, but there are {list(tokens.shape[:2])} tokens: give "
                "one for each."
            )
        if token_type_ids is not None:
            table, fix = self.embeddings.token_type_embeddings, "leave them out, or set type_vocab_size of a new model"
            _check_looked_up("token_type_ids", token_type_ids, table, fix)
        return tokens

    def _token_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor | None:
        """The tokens [B, N] whose repetitions a layer looks for, -1 for one that is hidden; None where none does."""
        if input_ids is None or self.config.repetition_context_size is None:
            return None
        hidden = self.config.mask_token_id
        return input_ids if hidden is None else input_ids.masked_fill(input_ids == hidden, -1)

    def _may_pack(
        self, tokens: torch.Tensor, token_mask: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> bool:
        """Whether padding may be left out: not from hidden states, nor in a graph that serves other masks as well."""
        keeps_layout = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        may_split = not keeps_layout and not self.config.chunk_size_feed_forward
        layers: Any = self.encoder.layer  # another module in place of one is to get whole rows, as a hook is
        are_own = all(isinstance(layer, LambdaBertLayer) or _takes_any_layout(type(layer)) for layer in layers)
        can_read = can_read_values(tokens) and can_read_values(token_mask)
        return can_read and may_split and are_own and not _is_watched(self.embeddings, self.encoder)


def _check_looked_up(name: str, ids: torch.Tensor, table: nn.Module, fix: str) -> None:
    """Refuses ids that a table of embeddings does not hold. An accelerator, which refuses them by itself, would have to
    be waited for."""
    if type(table) is nn.Embedding and ids.device.type == "cpu" and can_read_values(ids) and ids.numel():
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= table.num_embeddings:
            raise ValueError(
                f"{name} range from {lowest} to {highest}, but there are embeddings of 0 to "
                f"{table.num_embeddings - 1}: {fix}."
            )


def _pooled_token(
    hidden_states: torch.Tensor, token_mask: torch.Tensor | None, token_type_ids: torch.Tensor | None, pooling: str
) -> torch.Tensor:
    """The token of each row that `classifier_pooling` names, [B, 1, D]; padding may stand before it."""
    if pooling == "cls" and token_mask is None:
        return hidden_states[:, :1]
    is_real = torch.ones(hidden_states.shape[:2], dtype=torch.bool) if token_mask is None else token_mask
    is_real = is_real.to(hidden_states.device)
    if pooling == "cls":
        place = is_real.to(torch.int32).argmax(dim=1, keepdim=True)
    else:
        in_first_segment = is_real
        if token_type_ids is not None:
            in_first_segment = is_real & (token_type_ids == 0).to(is_real.device)
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        last = torch.where(in_first_segment, positions, -1).amax(dim=1, keepdim=True)
        # a row without a first segment gives its first token
        place = torch.where(last < 0, is_real.to(torch.int32).argmax(dim=1, keepdim=True), last)
    return hidden_states.gather(1, place[..., None].expand(-1, -1, hidden_states.shape[-1]))


def _mean(losses: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Sum of the losses over their number; 0 where there are none."""
    return losses.sum() / torch.as_tensor(count, device=losses.device).clamp(min=1)


def _cross_entropies(logits: torch.Tensor, labels: torch.Tensor, name: str = "labels") -> torch.Tensor:
    """Cross entropy of each label, in float32 at least; 0 where the label is -100.

    Args:
        logits: [..., classes]
        labels: [...], or one axis of 1 more.
        name: how a message calls them.

    Raises:
        ValueError: labels of another shape, that are not integers or (on a CPU) that are no class.
    """
    if labels.is_floating_point():
        raise ValueError(f"{name} is of {labels.dtype}: classes are whole numbers; give them as torch.long.")
    if labels.shape not in (logits.shape[:-1], (*logits.shape[:-1], 1)):
        raise ValueError(
            f"{name} is {list(labels.shape)}, but the logits are {list(logits.shape)}: give "
            f"{list(logits.shape[:-1])}, a class for each."
        )
    classes = logits.shape[-1]
    if labels.device.type == "cpu" and can_read_values(labels):  # an accelerator would have to be waited for
        unknown = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
        if len(unknown):
            raise ValueError(
                f"{name} holds {int(unknown[0])}, but the model tells {classes} classes apart: give 0 to "
                f"{classes - 1}, or -100 for what is not to be learned."
            )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    return F.cross_entropy(logits, labels.to(logits.device, torch.long).flatten(), reduction="none")


def _label_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean cross entropy over the labels other than -100.

    `num_items_in_batch` is the number of labels in all micro-batches of one accumulated step, as the Trainer counts
    them; given it, the losses of the micro-batches add up to the loss of the whole.
    """
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return _mean(_cross_entropies(logits, labels), count)


def _check_mask_token(config: LambdaBertConfig) -> None:
    """Refuses an MLM head above repetition lambdas that would take all [MASK] for repetitions of one word."""
    if config.repetition_context_size is not None and config.mask_token_id is None:
        raise ValueError(
            f"repetition_context_size={config.repetition_context_size} with mask_token_id=None takes every [MASK] for "
            "the same word, which a masked language model is to predict: set mask_token_id to the tokenizer's."
        )


def _masked_lm(
    head: nn.Module,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """MLM logits [B, N, vocab_size] and loss.

    A training step that gives `num_items_in_batch`, as the Trainer's does, needs nothing but the loss: the head, the
    largest product of a small model, is then applied to the M masked tokens alone, and the logits are [M, vocab_size].
    (A compiled graph needs a fixed number of tokens and computes them all.)

    Args:
        head: maps [..., D] to [..., vocab_size].
        hidden_states: [B, N, D]
        labels: [B, N], -100 where nothing is masked.
        num_items_in_batch: as in `_label_loss`.
    """
    if labels is None:
        return head(hidden_states), None
    if head.training and num_items_in_batch is not None and not torch.compiler.is_compiling():
        if labels.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"labels is {list(labels.shape)}, but there are {list(hidden_states.shape[:-1])} tokens: give one for "
                "each."
            )
        masked = labels.to(hidden_states.device) != -100
        hidden_states, labels = hidden_states[masked], labels[masked.to(labels.device)]
    logits = head(hidden_states)
    return logits, _label_loss(logits, labels, num_items_in_batch)


def _sentence_loss(
    logits: torch.Tensor,
    sentence_label: torch.Tensor,
    name: str,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    training: bool,
) -> torch.Tensor:
    """Mean cross entropy of the sentence task over the pairs of a batch.

    Under gradient accumulation, the number of masked tokens in the whole step is known here, but not that of pairs.
    Each pair then counts in proportion to its masked tokens, so that micro-batches still add up exactly. In a step
    without any masked token each pair counts alike. An evaluation keeps the mean, in as many parts as there are
    processes, each in proportion to its masked tokens: the Trainer adds them up.

    Args:
        logits: [B, 2]
        sentence_label: [B]
        name: of `sentence_label`.
        labels: the MLM labels, [B, N]
        num_items_in_batch: as in `_label_loss`, of `labels`; None = the mean over this batch.
        training: whether the pairs are of a training step.
    """
    losses = _cross_entropies(logits, sentence_label, name)
    mean = _mean(losses, (sentence_label != -100).sum())
    if num_items_in_batch is None or labels is None:
        return mean
    masked_tokens = (labels != -100).sum(1).to(logits.device)
    count = torch.as_tensor(num_items_in_batch, device=logits.device)
    share = _mean(losses * masked_tokens, count) if training else mean * masked_tokens.sum() / count.clamp(min=1)
    return torch.where(count > 0, share, mean)


class LambdaBertForPreTraining(LambdaBertPreTrainedModel, BertForPreTraining):
    """What the two pretraining models share; use `LambdaBertForPreTrainingNSP` or `LambdaBertForPreTrainingSOP`."""

    def __init__(self, config: LambdaBertConfig):
        super().__init__(config)
        _check_mask_token(config)
        self.bert = LambdaBertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.cls.predictions.transform.LayerNorm = FullPrecisionLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _pretrain(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        labels: torch.Tensor | None,
        sentence_loss: str,
        sentence_name: str,
        sentence_label: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        **kwargs,
    ) -> LambdaBertForPreTrainingOutput:
        """Output and losses; `sentence_label` is called `sentence_name` by the caller, and its loss `sentence_loss`."""
        outputs = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        prediction_logits, mlm_loss = _masked_lm(
            self.cls.predictions, outputs.last_hidden_state, labels, num_items_in_batch
        )
        sentence_logits = self.cls.seq_relationship(outputs.pooler_output)
        parts = {}
        if mlm_loss is not None:
            parts["mlm_loss"] = mlm_loss
        if sentence_label is not None:
            parts[sentence_loss] = _sentence_loss(
                sentence_logits, sentence_label, sentence_name, labels, num_items_in_batch, self.training
            )
        return LambdaBertForPreTrainingOutput(
            loss=reduce(torch.add, parts.values()) if parts else None,
            prediction_logits=prediction_logits,
            seq_relationship_logits=sentence_logits,
            hidden_states=outputs.hidden_states,
            lambda_params=outputs.lambda_params,
            **parts,
        )


class LambdaBertForPreTrainingNSP(LambdaBertForPreTraining):
    """Masked language modelling and next sentence prediction (BERT)."""

    @can_return_tuple
    @refuses_unknown_arguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> tuple | LambdaBertForPreTrainingOutput:
        """Predicts masked tokens and whether segment B follows segment A; inputs as in `LambdaBertModel`.

        Args:
            labels: [B, N], the token at masked places, -100 elsewhere.
            next_sentence_label: [B], 0 = B follows A in its document, 1 = B comes from another document.
            num_items_in_batch: masked tokens in all micro-batches of one accumulated step; the Trainer gives it.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        sentences = "nsp_loss", "next_sentence_label", next_sentence_label
        return self._pretrain(*inputs, labels, *sentences, num_items_in_batch, **kwargs)


class LambdaBertForPreTrainingSOP(LambdaBertForPreTraining):
    """Masked language modelling and sentence order prediction (ALBERT)."""

    @can_return_tuple
    @refuses_unknown_arguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sentence_order_label: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> tuple | LambdaBertForPreTrainingOutput:
        """Predicts masked tokens and the order of two consecutive segments; inputs as in `LambdaBertModel`.

        Args:
            labels: [B, N], the token at masked places, -100 elsewhere.
            sentence_order_label: [B], 0 = in order, 1 = swapped.
            num_items_in_batch: masked tokens in all micro-batches of one accumulated step; the Trainer gives it.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        sentences = "sop_loss", "sentence_order_label", sentence_order_label
        return self._pretrain(*inputs, labels, *sentences, num_items_in_batch, **kwargs)


class LambdaBertHeadModel(LambdaBertPreTrainedModel):
    """What the models with one head share: inputs, `labels` and output. Each defines its logits, and its loss where
    it is not cross entropy."""

    @can_return_tuple
    @refuses_unknown_arguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> tuple | LambdaBertHeadOutput:
        """Applies the head to the encoder's output; inputs as in `LambdaBertModel`.

        Args:
            labels: as the class says; None = no loss.
            num_items_in_batch: labels in all micro-batches of one accumulated step; the Trainer gives it.
        """
        outputs = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits, loss = self._logits_and_loss(outputs, labels, num_items_in_batch)
        return LambdaBertHeadOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            lambda_params=outputs.lambda_params,
        )

    def _logits_and_loss(
        self,
        outputs: LambdaBertModelOutput,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits = self._logits(outputs)
        return logits, None if labels is None else self._loss(logits, labels, num_items_in_batch)

    def _logits(self, outputs: LambdaBertModelOutput) -> torch.Tensor:
        raise NotImplementedError

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        return _label_loss(logits, labels, num_items_in_batch)


class LambdaBertForMaskedLM(LambdaBertHeadModel, BertForMaskedLM):
    """Masked language modelling, tied to the word embeddings: logits [B, N, vocab_size].

    `labels` are [B, N], the token at masked places, -100 elsewhere.
    """

    def __init__(self, config: LambdaBertConfig):
        super().__init__(config)
        _check_mask_token(config)
        self.bert = LambdaBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.cls.predictions.transform.LayerNorm = FullPrecisionLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def _logits_and_loss(
        self,
        outputs: LambdaBertModelOutput,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _masked_lm(self.cls, outputs.last_hidden_state, labels, num_items_in_batch)


class LambdaBertForNextSentencePrediction(LambdaBertHeadModel, BertForNextSentencePrediction):
    """Next sentence prediction alone, whether segment B follows segment A: logits [B, 2].

    `labels` are [B], 0 = B follows A, 1 = B is random.
    """

    def __init__(self, config: LambdaBertConfig):
        super().__init__(config)
        self.bert = LambdaBertModel(config)
        self.cls = BertOnlyNSPHead(config)
        self.post_init()

    def _logits(self, outputs: LambdaBertModelOutput) -> torch.Tensor:
        return self.cls(outputs.pooler_output)


def _classifier_dropout(config: LambdaBertConfig) -> nn.Dropout:
    given = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if given is None else given)


class LambdaBertForSequenceClassification(LambdaBertHeadModel, BertForSequenceClassification):
    """Classification or regression of whole sequences from the pooled output: logits [B, num_labels].

    `labels` are [B] classes (cross entropy); [B, num_labels] of 0 and 1 (binary cross entropy each); or, with one
    label, [B] numbers (squared error). `config.problem_type` decides, and is set from the first labels unless given.
    """

    def __init__(self, config: LambdaBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = LambdaBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _logits(self, outputs: LambdaBertModelOutput) -> torch.Tensor:
        return self.classifier(self.dropout(outputs.pooler_output))

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        problem_type = self.config.problem_type or self._problem_type(logits, labels)
        if problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type={problem_type!r} is unknown; set it to one of {PROBLEM_TYPES}.")
        if problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type='single_label_classification' (it stays in the config of a trained classifier) needs two "
                "classes or more, and num_labels=1: set problem_type='regression', or give more labels."
            )
        if problem_type == "single_label_classification":
            loss = _label_loss(logits, labels, num_items_in_batch)
        else:
            if labels.shape != logits.shape and (logits.shape[-1] > 1 or labels.numel() != logits.numel()):
                raise ValueError(
                    f"labels is {list(labels.shape)}, but problem_type={problem_type!r} with num_labels="
                    f"{logits.shape[-1]} takes {list(logits.shape)}: give a number for each label of each text."
                )
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # or targets would be rounded
            labels = labels.to(logits).view_as(logits)
            if problem_type == "multi_label_classification" and can_read_values(labels):
                if not ((labels >= 0) & (labels <= 1)).all():
                    raise ValueError(
                        "labels: with problem_type='multi_label_classification' each label of each text is 0, 1 or a "
                        "probability between; for one class a text give its number, [batch]."
                    )
            of_each = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
            count = labels.numel() if num_items_in_batch is None else num_items_in_batch
            loss = _mean(of_each(logits, labels, reduction="none"), count)
        self.config.problem_type = problem_type
        return loss

    def _problem_type(self, logits: torch.Tensor, labels: torch.Tensor) -> Any:
        """What labels are given for: with one label regression; with more, one class or several of each text."""
        if self.num_labels == 1:
            return "regression"
        are_classes = not labels.is_floating_point() and labels.shape != logits.shape
        return "single_label_classification" if are_classes else "multi_label_classification"


class LambdaBertForTokenClassification(LambdaBertHeadModel, BertForTokenClassification):
    """Classification of every token: logits [B, N, num_labels].

    `labels` are [B, N], the class of each token, -100 where it does not count.
    """

    def __init__(self, config: LambdaBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = LambdaBertModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _logits(self, outputs: LambdaBertModelOutput) -> torch.Tensor:
        return self.classifier(self.dropout(outputs.last_hidden_state))


def _within_tokens(positions: torch.Tensor, logits: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """The labels `positions` [B] or [B, 1] of logits [B, N], with -100 for those at which no token stands.

    Args:
        padding: bool [B, N], True = padding; None = all are tokens.

    Raises:
        ValueError: positions of another shape, or that are not integers.
    """
    if positions.is_floating_point() or positions.shape not in ((len(logits),), (len(logits), 1)):
        raise ValueError(
            f"start_positions and end_positions: {list(positions.shape)} of {positions.dtype} for {len(logits)} texts; "
            "give a whole number for each."
        )
    positions = positions.to(logits.device).flatten()  # also [B, 1], as BertForQuestionAnswering
    places = torch.arange(logits.shape[1], device=logits.device)
    is_label = positions[:, None] == places
    if padding is not None:
        is_label = is_label & ~padding
    return positions.masked_fill(~is_label.any(dim=1), -100)


class LambdaBertForQuestionAnswering(LambdaBertPreTrainedModel, BertForQuestionAnswering):
    """Extractive question answering: the first and the last token of the answer."""

    def __init__(self, config: LambdaBertConfig):
        super().__init__(config)
        self.bert = LambdaBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    @refuses_unknown_arguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | LambdaBertQuestionAnsweringOutput:
        """Finds the answer's ends; inputs as in `LambdaBertModel`.

        Args:
            start_positions: [B], the place of the answer's first token. A place at which the row has no token, because
                it is padding or beyond a truncated row, does not count in the loss.
            end_positions: [B], that of its last token, likewise.

        Raises:
            ValueError: one of the two without the other.
        """
        if (start_positions is None) != (end_positions is None):
            missing = "start_positions" if start_positions is None else "end_positions"
            raise ValueError(f"{missing} is missing: an answer has a start and an end; give both, or neither.")
        outputs = self._encode(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.qa_outputs(outputs.last_hidden_state)
        padding = None if attention_mask is None else ~attention_mask.bool().to(logits.device)
        if padding is not None:  # no answer ends in padding, and no loss depends on its amount
            logits = logits.masked_fill(padding[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = _label_loss(start_logits, _within_tokens(start_positions, start_logits, padding))
            end_loss = _label_loss(end_logits, _within_tokens(end_positions, end_logits, padding))
            loss = (start_loss + end_loss) / 2
        return LambdaBertQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            lambda_params=outputs.lambda_params,
        )


class LambdaBertForMultipleChoice(LambdaBertPreTrainedModel, BertForMultipleChoice):
    """Choice among C sequences, each scored from its pooled output."""

    def __init__(self, config: LambdaBertConfig):
        super().__init__(config)
        self.bert = LambdaBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    @refuses_unknown_arguments
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> tuple | LambdaBertHeadOutput:
        """Scores the choices: logits [B, C]; inputs as in `LambdaBertModel` with an axis C after B.

        Args:
            labels: [B], the index of the right choice.
            num_items_in_batch: labels in all micro-batches of one accumulated step; the Trainer gives it.
        """
        if input_ids is not None and input_ids.dim() != 3:
            raise ValueError(f"input_ids is {list(input_ids.shape)}: give [batch, choices, length].")
        if inputs_embeds is not None and inputs_embeds.dim() != 4:
            raise ValueError(f"inputs_embeds is {list(inputs_embeds.shape)}: give [batch, choices, length, hidden].")
        of_tokens = (input_ids, attention_mask, token_type_ids, position_ids)
        flat = [None if given is None else given[None].flatten(0, -2) for given in of_tokens]
        outputs = self._encode(*flat, None if inputs_embeds is None else inputs_embeds.flatten(0, 1), **kwargs)
        batch, choices = next(tokens.shape[:2] for tokens in (input_ids, inputs_embeds) if tokens is not None)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(batch, choices)
        return LambdaBertHeadOutput(
            loss=_label_loss(logits, labels, num_items_in_batch) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            lambda_params=outputs.lambda_params,
        )


_AUTO_CLASSES = {
    AutoModel: LambdaBertModel,
    AutoModelForPreTraining: (LambdaBertForPreTrainingNSP, LambdaBertForPreTrainingSOP),
    AutoModelForMaskedLM: LambdaBertForMaskedLM,
    AutoModelForNextSentencePrediction: LambdaBertForNextSentencePrediction,
    AutoModelForSequenceClassification: LambdaBertForSequenceClassification,
    AutoModelForTokenClassification: LambdaBertForTokenClassification,
    AutoModelForQuestionAnswering: LambdaBertForQuestionAnswering,
    AutoModelForMultipleChoice: LambdaBertForMultipleChoice,
}

for auto_class, models in _AUTO_CLASSES.items():
    for model in models if isinstance(models, tuple) else (models,):
        model.register_for_auto_class(auto_class.__name__)

if not __package__:  # the copy in a saved model's folder is found through its config's auto_map instead
    AutoConfig.register(LambdaBertConfig.model_type, LambdaBertConfig)
    for auto_class, models in _AUTO_CLASSES.items():
        # where there are several classes, the config's `architectures` names the one to build
        auto_class._model_mapping.register(LambdaBertConfig, models)  # type: ignore[attr-defined]

__all__ = [
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
]
