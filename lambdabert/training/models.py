"""Models to be pretrained: their config, their first weights, and whether they fit tokenizer and examples."""

import itertools
import logging
from collections.abc import Collection
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configuration_lambdabert import LambdaBertConfig
from conversion_lambdabert import ENCODER, bare
from lambdabert.text.arguments import TextArguments
from lambdabert.text.objectives import Objective
from lambdabert.training.recipes import parse_overrides

logger = logging.getLogger(__name__)

# what a new model has, unless a config or overrides say otherwise: it learns sooner than with the defaults of a config
# (docs/ablations.md)
NEW_MODEL = {
    "local_context_size": 25,
    "position_embedding_type": "none",
    "content_gain": True,
    "repetition_context_size": 5,
}
# what one that is trained on pairs has, too: [CLS] does not see where the segments meet
NEW_MODEL_OF_PAIRS = {**NEW_MODEL, "classifier_pooling": "sep"}
# the peak learning rate of a new model of so many layers, so wide, with steps of so many tokens
RATE, RATED_LAYERS, RATED_WIDTH, RATED_TOKENS = 4e-3, 4, 192, 4096
# encoder weights that a config may add to a trained model: initialised to 0, they leave the outputs unchanged
NEUTRAL, NEUTRAL_FIELD = ".repetition_embeddings", "repetition_context_size"


def make_config(
    name: str | None,
    option: str,
    overrides: str | dict[str, Any] | None,
    *,
    objective: Objective,
    tokens: int,
    padding: int,
    mask: int,
) -> LambdaBertConfig:
    """Builds the config of a model.

    Args:
        name: a folder, file or hub name of the config; None: a new one of base size, with the fields of `NEW_MODEL`, or
            of `NEW_MODEL_OF_PAIRS`.
        option: where the user named it.
        overrides: fields to change in it.
        objective: what a new model is trained for.
        tokens: the size of the tokenizer's vocabulary, for a new config.
        padding: the id of its padding token, for a new config.
        mask: the id of its mask token, for a new config.

    Raises:
        ValueError: there is no such config, or its fields are invalid.
    """
    changes = parse_overrides(overrides)
    if name is None:
        defaults = NEW_MODEL_OF_PAIRS if objective.has_pairs else NEW_MODEL
        values: dict[str, Any] = {**defaults, "vocab_size": tokens, "pad_token_id": padding, "mask_token_id": mask}
    else:
        try:
            values, _ = LambdaBertConfig.get_config_dict(name)
            kind = values.get("model_type", LambdaBertConfig.model_type)
        except Exception as error:  # a broken file raises whatever its reader stumbles over
            raise ValueError(
                f"{option}={name} holds no config that can be read ({type(error).__name__}: {error}); "
                "name the folder of a LambdaBERT."
            ) from error
        if kind != LambdaBertConfig.model_type:
            raise ValueError(f"{option}={name} is a {kind!r} model; name the folder of a LambdaBERT.")
    unknown = sorted(set(changes) - set(LambdaBertConfig().to_dict()))
    if unknown:
        raise ValueError(
            f"config_overrides: LambdaBertConfig has no field {', '.join(unknown)}; leave it out, or correct its name."
        )
    return LambdaBertConfig(**{**values, **changes})


def peak_learning_rate(layers: int, hidden_size: int, tokens: int) -> float:
    """A peak learning rate for a new model, three digits of it: that of one size serves others (docs/results.md).

    Args:
        layers: the rate falls with their square root.
        hidden_size: D; the rate is in inverse proportion to it.
        tokens: of a step; below 4096 its gradient is noisier, and the rate falls with their square root.
    """
    size = (RATED_LAYERS / layers) ** 0.5 * RATED_WIDTH / hidden_size
    return float(f"{RATE * size * min(1.0, tokens / RATED_TOKENS) ** 0.5:.3g}")


def check_examples_fit(config: LambdaBertConfig, data_args: TextArguments, objective: Objective) -> None:
    """Refuses a config whose model cannot take the examples.

    Args:
        config: the model's.
        data_args: how long the examples are.
        objective: what they are made for.

    Raises:
        ValueError: they are too long for the model, or have more segments than it can tell apart.
    """
    advice = "lower the former, or raise the latter in --config_overrides"
    data_args.check_length(config.longest_sequence, "max_position_embeddings", advice)
    if objective.has_pairs and config.type_vocab_size < 2:
        raise ValueError(
            f"type_vocab_size={config.type_vocab_size} cannot tell apart the two segments of the pairs that "
            f"objective={objective.name} makes; set it to 2, or use --objective mlm."
        )


def check_tokens(config: LambdaBertConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a config that belongs to another tokenizer.

    Raises:
        ValueError: it has too few embeddings, or its padding is another token; as `check_mask`.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"vocab_size={config.vocab_size} of the model is too small for the tokenizer's {len(tokenizer)} tokens; "
            "use the model's own tokenizer, or set vocab_size in --config_overrides for a new model."
        )
    if config.pad_token_id != tokenizer.pad_token_id:
        raise ValueError(
            f"pad_token_id={config.pad_token_id} of the model contradicts the tokenizer, whose {tokenizer.pad_token} "
            f"is {tokenizer.pad_token_id}: set pad_token_id={tokenizer.pad_token_id} in --config_overrides."
        )
    check_mask(config, tokenizer)


def check_mask(config: LambdaBertConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a config whose [MASK] is not the tokenizer's; one without a repetition lambda may leave it out.

    Raises:
        ValueError: it is another token.
    """
    if config.mask_token_id == tokenizer.mask_token_id:
        return
    if config.mask_token_id is not None or config.repetition_context_size is not None:
        raise ValueError(
            f"mask_token_id={config.mask_token_id} of the model contradicts the tokenizer, whose "
            f"{tokenizer.mask_token} is {tokenizer.mask_token_id}: a repetition lambda would take hidden tokens for "
            f"the same. Set mask_token_id={tokenizer.mask_token_id} in --config_overrides."
        )


def check_masked_sentence(sentence: str | None, mask_token: str) -> None:
    """Raises ValueError if a sentence does not hold exactly one mask."""
    if sentence is not None and sentence.count(mask_token) != 1:
        raise ValueError(
            f"masked_sentence={sentence!r} holds {mask_token} {sentence.count(mask_token)} times: it takes exactly one."
        )


def check_sentence_length(sentence: str | None, tokenizer: PreTrainedTokenizerBase, config: LambdaBertConfig) -> None:
    """Raises ValueError if a sentence is longer than the model allows."""
    if sentence is None or config.longest_sequence is None:
        return
    length = len(tokenizer(sentence).input_ids)
    if length > config.longest_sequence:
        raise ValueError(
            f"masked_sentence has {length} tokens, and the model takes {config.longest_sequence}: shorten it."
        )


def note_precision(name: str, config: dict[str, Any]) -> None:
    """Logs it if a model is stored in another precision than the one in which it is trained and evaluated.

    Args:
        name: how the message calls it.
        config: the fields of its stored config.
    """
    stored = str(config.get("dtype") or config.get("torch_dtype") or torch.float32).removeprefix("torch.")
    if stored != "float32":
        logger.info(f"{name} is stored in {stored} and computed in float32 (--bf16 or --fp16: in mixed precision).")


def non_finite_weights(*modules: nn.Module) -> list[str]:
    """Names of parameters and buffers that hold a NaN or an infinity."""
    weights = [
        (name, weight)
        for module in modules
        for name, weight in itertools.chain(module.named_parameters(), module.named_buffers())
        if weight.is_floating_point()
    ]
    if not weights:
        return []
    # of a sharded weight, this process's part; one transfer from the device for all
    finite = [(x.to_local() if hasattr(x, "to_local") else x).isfinite().all() for _, x in weights]
    return [name for (name, _), good in zip(weights, torch.stack(finite).tolist(), strict=True) if not good]


def make_model(
    model_class: type[PreTrainedModel], config: LambdaBertConfig, source: str | None, *, overridden: bool
) -> PreTrainedModel:
    """Builds a new model, or loads one from `source`, in float32 whatever precision it is stored in.

    Args:
        model_class: its class.
        config: its config.
        source: a folder or hub name, or None.
        overridden: whether the config differs from that of `source`.

    Raises:
        ValueError: the weights are unreadable or not finite, or the encoder's are not those of the config.
    """
    if source is None:
        return model_class(config)
    note_precision(source, config.to_dict())
    advice = "drop the --config_overrides that change them" if overridden else "its folder is damaged; name another"
    try:
        loaded: Any = model_class.from_pretrained(source, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, SafetensorError, UnpicklingError) as error:
        raise ValueError(
            f"model_name_or_path={source} holds no weights that can be read ({error}); name another model."
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"model_name_or_path={source}: its weights have another shape than the config ({error}): {advice}."
        ) from error
    model, report = loaded
    added = [name for name in report["missing_keys"] if name.endswith(NEUTRAL)]
    if added and LambdaBertConfig.get_config_dict(source)[0].get(NEUTRAL_FIELD) is not None:
        added = []  # the source should have them
    if added:
        logger.info(f"New weights of the encoder, which start at 0: {', '.join(sorted(added))}.")
    check_loaded_encoder(source, set(report["missing_keys"]).difference(added), report["unexpected_keys"], advice)
    if bad := non_finite_weights(model):
        raise ValueError(
            f"model_name_or_path={source} has weights that are not finite ({', '.join(bad[:3])}); name another model."
        )
    return model


def check_loaded_encoder(source: str, missing: Collection[str], left_out: Collection[str], advice: str) -> None:
    """Refuses a model whose encoder was not loaded as it is, and logs which other weights are new or left out.

    Args:
        source: where the model was loaded from.
        missing: weights that were not there.
        left_out: weights that were there and that the model does not have.
        advice: what to do.

    Raises:
        ValueError: there are weights of the encoder among them.
    """
    lacks, unknown = (sorted(name for name in names if bare(name).startswith(ENCODER)) for names in (missing, left_out))
    parts = [f"lacks {', '.join(lacks[:3])}"] if lacks else []
    parts += [f"has no place for {', '.join(unknown[:3])}"] if unknown else []
    if parts:
        raise ValueError(
            f"model_name_or_path={source}: its encoder does not fit the config: it {' and '.join(parts)}; {advice}."
        )
    if missing:
        logger.info(f"New weights, which {source} does not have: {', '.join(sorted(missing))}.")
    if left_out:
        logger.info(f"Left out weights of {source}: {', '.join(sorted(left_out))}.")


def start_at_frequencies(model: PreTrainedModel, counts: np.ndarray) -> None:
    """Makes a new model predict masked tokens by their frequency in the text, through the bias of its MLM head.

    Without this, a new model first has to learn the frequencies, and learns context later (docs/ablations.md).

    Args:
        model: a model with an MLM head.
        counts: occurrences of each token, [up to vocab_size]; one is added to each.
    """
    bias: Any = model.get_output_embeddings().bias
    smoothed = torch.ones_like(bias)
    smoothed[: len(counts)] += torch.from_numpy(counts).to(bias)
    with torch.no_grad():
        bias.copy_((smoothed / smoothed.sum()).log())
