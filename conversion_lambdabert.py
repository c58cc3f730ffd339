"""From a trained BERT to a LambdaBERT: what is carried over, what is computed from attention, and what starts afresh.

Shapes: D hidden_size, P max_position_embeddings, V value depth, U intra_depth, H num_lambda_queries.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, PreTrainedModel

# fields that say how a model was saved or run, not what it is
WITHOUT_EFFECT = ("_name_or_path", "architectures", "dtype", "model_type", "transformers_version")
NOT_CARRIED = (*WITHOUT_EFFECT, "output_attentions", "output_hidden_states", "return_dict")
FIXED_BY_WEIGHTS = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "type_vocab_size")
OUTPUT = (".attention.output.dense.weight", ".attention.output.dense.bias")
COMPUTED = (".attention.self.to_values.weight", *OUTPUT)
COMPUTED_FROM = (".attention.self.value.weight", ".attention.self.value.bias", *OUTPUT)
ENCODER = ("embeddings.", "encoder.")  # prefixes of its weights, by their bare names
POSITION_TABLE = "embeddings.position_embeddings.weight"


@dataclass(frozen=True)
class ConversionReport:
    """What became of the weights; names as in the model's and in the BERT's state dict.

    Attributes:
        copied: weights that equal the BERT's, the position table's own rows included.
        computed: weights that start from the attention's value and output projections.
        fresh: weights that start at random, because BERT has none of the kind or this one lacks them.
        left_out: weights of the BERT of which nothing is left: attention's queries and keys, and heads that the model
            does not have.
    """

    copied: tuple[str, ...]
    computed: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def fresh_heads(self) -> tuple[str, ...]:
        """Fresh weights outside of the lambda layers."""
        return tuple(name for name in self.fresh if ".attention.self." not in name)

    def __str__(self) -> str:
        heads_left_out = [name for name in self.left_out if ".attention.self." not in name]
        lines = [
            f"copied {len(self.copied)} weights: embeddings, feed-forward layers, norms and what heads both have",
            f"computed {len(self.computed)} from attention's values and output: those of the lambda layers",
            f"fresh {len(self.fresh)}, to be trained: the rest of the lambda layers",
            f"left out {len(self.left_out)}: attention's queries and keys",
        ]
        for line, heads in ((2, self.fresh_heads), (3, heads_left_out)):
            lines[line] += f"; {', '.join(heads)}" if heads else ""
        return "\n".join(lines)


def check_bert(fields: dict, name: str) -> None:
    """Refuses what is not BERT's encoder.

    Args:
        fields: those of its config.
        name: how messages call it.

    Raises:
        ValueError: another architecture, a decoder, cross-attention, or relative positions.
    """
    if fields.get("model_type") != BertConfig.model_type:
        raise ValueError(
            f"{name} has model_type={fields.get('model_type')!r}: only BERT's own architecture, model_type='bert', "
            "becomes a LambdaBERT; give a BERT model, its folder or its hub name."
        )
    for field in ("is_decoder", "add_cross_attention"):
        if fields.get(field):
            raise ValueError(
                f"{name} has {field}=True: LambdaBERT is an encoder that sees both directions; give a BERT encoder."
            )
    positions = fields.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        raise ValueError(
            f"{name} has position_embedding_type={positions!r}: its positions live in attention, which is replaced; "
            "give a BERT with 'absolute' ones."
        )


def load_bert(
    bert: PreTrainedModel | str | PathLike, bert_class: type[PreTrainedModel]
) -> tuple[PreTrainedModel, set[str]]:
    """The BERT, in float32 if it is loaded, and the names of its weights that its folder did not hold.

    Args:
        bert: a model of `transformers`, a folder or a hub name.
        bert_class: the class that a folder is loaded as.

    Raises:
        ValueError: as `check_bert`; `bert` is none of the three; or weights of its encoder are not in its folder.
        OSError: no such folder or hub name.
    """
    if isinstance(bert, PreTrainedModel):
        check_bert(bert.config.to_dict(), type(bert).__name__)
        return bert, set()
    if not isinstance(bert, str | PathLike):
        raise ValueError(
            f"{type(bert).__name__} is not a BERT: give a model of transformers, its folder or its hub name."
        )
    check_bert(BertConfig.get_config_dict(bert)[0], str(bert))
    loaded: Any = bert_class.from_pretrained(bert, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    missing = set(report["missing_keys"])
    if lacks := sorted(name for name in missing if bare(name).startswith(ENCODER)):
        raise ValueError(f"{bert} has no weights for {', '.join(lacks[:3])}: its folder is damaged; give another.")
    return model, missing


def converted_config(config: BertConfig, config_class: type[BertConfig], settings: dict) -> BertConfig:
    """BERT's config as a `config_class` with `settings` in it; unless these set it, as many queries as BERT has heads.

    Raises:
        ValueError: a setting is not a field, or contradicts the shape of the weights.
    """
    unknown = sorted(set(settings) - set(config_class().to_dict()) - {"num_labels"})
    if unknown:
        raise ValueError(
            f"{config_class.__name__} has no field {', '.join(unknown)}; leave it out, or correct its name."
        )
    if "num_attention_heads" in settings:
        raise ValueError("num_attention_heads has no effect in a LambdaBERT; give num_lambda_queries.")
    if without := sorted(set(settings) & set(WITHOUT_EFFECT)):
        raise ValueError(
            f"{without[0]} has no effect on a conversion; leave it out, and change the model that it gives."
        )
    for field in FIXED_BY_WEIGHTS:
        if settings.get(field, getattr(config, field)) != getattr(config, field):
            raise ValueError(
                f"{field}={settings[field]} contradicts the BERT's {getattr(config, field)}, whose weights are copied; "
                f"leave {field} out."
            )
    fields = {name: value for name, value in config.to_dict().items() if name in BertConfig().to_dict()}
    fields = {name: value for name, value in fields.items() if name not in NOT_CARRIED}
    if settings.get("num_labels", config.num_labels) != config.num_labels or settings.keys() & {"id2label", "label2id"}:
        fields = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
    if "id2label" in settings and "label2id" not in settings:
        fields["label2id"] = {name: int(number) for number, name in settings["id2label"].items()}
    if "label2id" in settings and "id2label" not in settings:
        fields["id2label"] = {number: name for name, number in settings["label2id"].items()}
    return config_class(**{**fields, "num_lambda_queries": config.num_attention_heads, **settings})


def extend_positions(table: torch.Tensor, length: int) -> torch.Tensor:
    """A position table [P, D] as [length, D]: cut, or continued by its rows 1 to P - 1 again and again.

    Neighbouring positions keep the difference that they were trained with, except at one place in P - 1. Row 0 is not
    repeated: trained on [CLS] alone, it is unlike all others.
    """
    positions = torch.arange(length, device=table.device)
    repeated = 1 + (positions - 1) % max(1, len(table) - 1)
    return table[torch.where(positions < len(table), positions, repeated).clamp(max=len(table) - 1)]


def bare(name: str) -> str:
    """A weight's name without the prefix that heads give their encoder's weights."""
    return name.removeprefix("bert.")


@torch.no_grad()
def start_from_attention(
    attention: Any, previous_norm: nn.LayerNorm, lambda_attention: Any, branch_scale: float
) -> None:
    """Starts a lambda layer's values and output projection in the subspaces that attention's use most.

    Whatever its attention weights, attention passes on W = Wo Wv times an average of its inputs. These are g z + b for
    the g and b of the norm before it and a z of unit variance, so the best approximation of rank V U in the least
    squares sense is the truncated singular value decomposition W diag(g) = L S Rt. The values start as Rt z, up to a
    constant, with unit variance. The lambdas mix the U values of a depth by queries, keys and E that are fresh; in the
    output projection, query h starts with L S of the values u = h mod U. Attention weights sum to 1, so the bias of the
    values becomes part of the output's.

    Args:
        attention: a `BertAttention`.
        previous_norm: the norm whose output attention sees.
        lambda_attention: the `LambdaBertAttention` to change.
        branch_scale: sqrt(U) times the root mean square of the output over that of W; small, because the lambdas are
            not trained yet.
    """
    layer, output = lambda_attention.self, lambda_attention.output.dense
    given, out = attention.self.value, attention.output.dense
    depth, intra = layer.to_values.out_features // layer.intra_depth, layer.intra_depth
    mapped = out.weight.cpu().double() @ given.weight.cpu().double()  # on a CPU: not every device has float64
    left, singular, _ = torch.linalg.svd(mapped * previous_norm.weight.cpu().double())
    rank = min(depth * intra, int((singular > 1e-6 * singular[0]).sum()))
    left, singular = left[:, :rank], singular[:rank]

    layer.to_values.weight[:rank] = (left.T @ mapped / singular[:, None]).to(given.weight)  # = Rt / g
    columns = F.pad(left * singular, (0, depth * intra - rank)).unflatten(1, (depth, intra))
    of_query = torch.arange(layer.num_queries, device=mapped.device) % intra
    output.weight.copy_(columns[..., of_query].transpose(1, 2).flatten(1) * (branch_scale / layer.num_queries**0.5))
    output.bias.copy_(out.bias + out.weight @ given.bias)


def check_bert_encoder(given: set[str], own: set[str], layers: int) -> None:
    """Refuses a BERT whose encoder has other weights than its config says, as adapters and pruning leave it.

    Args:
        given: bare names of the BERT's weights.
        own: those of the LambdaBERT's.
        layers: how many the config says.

    Raises:
        ValueError: a weight is missing or unknown.
    """
    wanted = {name for name in own if name.startswith(ENCODER) and ".attention.self." not in name}
    for i in range(layers):
        for part in ("query", "key", "value"):
            wanted |= {f"encoder.layer.{i}.attention.self.{part}.{kind}" for kind in ("weight", "bias")}
    has = {name for name in given if name.startswith(ENCODER)}
    if differing := sorted((wanted ^ has) - {POSITION_TABLE}):
        raise ValueError(
            f"the BERT {'lacks' if differing[0] in wanted else 'has'} {differing[0]}, unlike a BERT of its config: "
            "merge an adapter into its weights, make pruning permanent, and set num_hidden_layers to the layers it has."
        )


@torch.no_grad()
def convert_weights(bert: PreTrainedModel, model: PreTrainedModel, missing: set[str]) -> ConversionReport:
    """Fills a new model with the weights of a BERT.

    Args:
        bert: the BERT.
        model: a LambdaBERT of the config that `converted_config` made.
        missing: names of weights of the BERT that were not trained and do not count.

    Raises:
        ValueError: as `check_bert_encoder`, or a head's weight has another shape.
    """
    given = {bare(name): (name, weight) for name, weight in bert.state_dict().items() if name not in missing}
    check_bert_encoder(set(given), {bare(name) for name in model.state_dict()}, bert.config.num_hidden_layers)
    encoder: Any = bert.base_model
    own_encoder: Any = model.base_model
    norms = [encoder.embeddings.LayerNorm, *(layer.output.LayerNorm for layer in encoder.encoder.layer)]
    layers = zip(encoder.encoder.layer, norms, own_encoder.encoder.layer)
    for of_bert, previous_norm, own in layers:
        start_from_attention(of_bert.attention, previous_norm, own.attention, (2 * len(norms) - 2) ** -0.5)
    copied, computed, fresh = {}, [], []
    of_storage: dict[int, str] = {}  # a copied weight's source by its place in memory, which tied weights share
    for name, weight in model.state_dict().items():
        if name.endswith(COMPUTED):
            computed.append(name)
            continue
        source, trained = given.get(bare(name), ("", None))
        if weight.data_ptr() in of_storage:  # the weight that it is tied to is there already
            is_same = trained is not None and torch.equal(trained, weight)
            copied[name] = source if is_same else of_storage[weight.data_ptr()]
            continue
        if trained is None:
            fresh.append(name)
            continue
        if bare(name) == POSITION_TABLE:
            trained = extend_positions(trained, len(weight))
        if trained.shape != weight.shape:
            raise ValueError(
                f"{source} of the BERT has shape {list(trained.shape)}, the model's {list(weight.shape)}: leave "
                "other classes out, or convert the BERT's base model, which has no head."
            )
        weight.copy_(trained)
        copied[name] = of_storage[weight.data_ptr()] = source
    return ConversionReport(
        copied=tuple(copied),
        computed=tuple(computed),
        fresh=tuple(fresh),
        left_out=tuple(
            name for name, _ in given.values() if name not in copied.values() and not name.endswith(COMPUTED_FROM)
        ),
    )
