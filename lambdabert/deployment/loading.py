"""A saved LambdaBERT as what is exported: a module from three inputs to named outputs, and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from lambdabert.saved_models import (
    check_case,
    compute_whole,
    load_as_saved,
    load_saved_tokenizer,
    load_with_missing,
    sentence_module_paths,
)
from modeling_lambdabert import LambdaBertForMultipleChoice, LambdaBertModel

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class ModelProgram(nn.Module):
    """A model whose outputs are tensors by name, as runtimes give them.

    Args:
        model: a LambdaBERT.
        sentence_modules: what sentence-transformers does with its token embeddings: pooling and what follows.
    """

    def __init__(self, model: nn.Module, sentence_modules: tuple[nn.Module, ...] = ()):
        super().__init__()
        self.model = model
        self.sentence_modules = nn.ModuleList(sentence_modules)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Named outputs; for sentence modules `last_hidden_state` [B, N, D] and `sentence_embedding` [B, ...]."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            output_hidden_states=False,
            output_lambda_params=False,
            return_dict=True,
        )
        if not self.sentence_modules:
            return dict(outputs)
        features = {"token_embeddings": outputs.last_hidden_state, "attention_mask": attention_mask}
        for module in self.sentence_modules:
            features = module(features)
        return {"last_hidden_state": outputs.last_hidden_state, "sentence_embedding": features["sentence_embedding"]}


@dataclass
class LoadedProgram:
    """What was loaded.

    Attributes:
        program: in float32 and evaluation mode.
        config: of the model.
        tokenizer: None where the folder has none.
        takes_choices: whether the inputs are [B, choices, N], and not [B, N].
    """

    program: ModelProgram
    config: Any
    tokenizer: Any
    takes_choices: bool

    @property
    def limit(self) -> int | None:
        """The most tokens of a sequence; None = any number."""
        return self.config.longest_sequence


def load_program(folder: Path) -> LoadedProgram:
    """Loads a folder of `save_pretrained` or of sentence-transformers. No code in it is run.

    Raises:
        ValueError: it is no such folder, is of another model, lacks weights, or cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"model={folder} is not a folder; name the one that a LambdaBERT was saved to.")
    modules = sentence_module_paths(folder)
    check_kind(folder / modules[0] if modules else folder)
    try:
        loaded = load_sentence_program(folder) if modules else load_model(folder)
    except Exception as error:  # a broken file raises whatever its reader stumbles over
        if type(error) is ValueError:  # not one of JSON or of Unicode, which do not name the file
            raise
        raise ValueError(
            f"model={folder} cannot be read ({type(error).__name__}: {error}); save the model again."
        ) from error
    compute_whole(loaded.program)
    loaded.program.eval()
    return loaded


def check_kind(folder: Path) -> None:
    """Refuses what is not a LambdaBERT.

    Raises:
        ValueError: no config, or another model's.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"model={folder} holds no {CONFIG_NAME}; name the folder that a LambdaBERT was saved to.")
    try:
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    except Exception as error:
        raise ValueError(f"{folder / CONFIG_NAME} cannot be read ({error}); save the model again.") from None
    if kind != "lambdabert":
        raise ValueError(
            f"model={folder} is of type {kind}, and LambdaBERT is exported here; `optimum-cli export onnx` exports "
            "others, and distill_from_bert.py turns a BERT into a LambdaBERT."
        )


def load_model(folder: Path) -> LoadedProgram:
    """Loads a model as the class that it was saved as. Raises ValueError if weights are missing."""
    model = load_as_saved(folder)
    takes_choices = isinstance(model, LambdaBertForMultipleChoice)
    return LoadedProgram(ModelProgram(model), model.config, tokenizer_in(folder), takes_choices)


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer in a folder; None where there are no files of one. Raises ValueError if they cannot be read."""
    if not any(folder.glob("tokenizer*")) and not (folder / "vocab.txt").exists():
        return None
    return load_saved_tokenizer(folder)


def load_sentence_program(folder: Path) -> LoadedProgram:
    """Loads a sentence-transformers model whose transformer is a LambdaBERT.

    Raises:
        ValueError: the package or weights are missing, or a prompt, a dimension or the case of letters is treated in a
            way that one program and a saved tokenizer cannot follow.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            f"model={folder} is a sentence-transformers model: pip install sentence-transformers"
        ) from None
    sentences = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    modules = list(sentences)[1:]
    if any(not getattr(module, "include_prompt", True) for module in modules) and any(sentences.prompts.values()):
        raise ValueError(
            f"model={folder} leaves the tokens of its prompts out of the mean (include_prompt=false), and an exported "
            "program does not know which they are; remove the prompts, or use it in PyTorch."
        )
    if sentences.truncate_dim is not None:
        raise ValueError(
            f"model={folder} cuts its vectors to truncate_dim={sentences.truncate_dim}, which an exported program does "
            "not; remove it from config_sentence_transformers.json, and cut the program's vectors."
        )
    check_case(sentences, f"model={folder}")
    # sentence-transformers does not say which weights it initialised randomly
    model: Any
    model, missing = load_with_missing(LambdaBertModel, folder / sentence_module_paths(folder)[0])
    if missing:
        raise ValueError(
            f"model={folder} has no weights for {', '.join(missing[:3])}, which would be random; save the model again."
        )
    model.pooler = None
    tokenizer = sentences.tokenizer
    tokenizer.model_max_length = min(tokenizer.model_max_length, sentences.max_seq_length or tokenizer.model_max_length)
    return LoadedProgram(ModelProgram(model, tuple(modules)), model.config, tokenizer, takes_choices=False)
