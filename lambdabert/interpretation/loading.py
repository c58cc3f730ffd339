"""A saved model with its tokenizer, texts for it, and the prediction that a text asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

import modeling_lambdabert
from lambdabert.saved_models import load_as_saved, load_saved_tokenizer

from .explanations import explain_prediction, integrated_gradients
from .page import ExplainedPrediction
from .tables import read_columns
from .traces import LambdaTrace

BATCH = 32
LIKELIEST = 5
TABLES = (".csv", ".json", ".jsonl", ".parquet")  # not read by line, where their syntax would count as text
CLASSIFIERS = (
    modeling_lambdabert.LambdaBertForSequenceClassification,
    modeling_lambdabert.LambdaBertForNextSentencePrediction,
)


@dataclass
class _Question:
    """What is explained: a token's place, an index among logits, both in words, its probability and the likeliest."""

    place: int | None
    target: int | str
    what: str
    probability: float
    likeliest: list[tuple[str, float]]


def _shown(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"


def _numbered(tokens: Sequence[str]) -> str:
    return ", ".join(f"{place} {token}" for place, token in enumerate(tokens))


def _token_logits(outputs: Any) -> torch.Tensor:
    """[B, N, vocabulary] of a masked language model, with a sentence task or without."""
    return outputs.prediction_logits if "prediction_logits" in outputs else outputs.logits


class LoadedModel:
    """A model in float32 and evaluation mode, of the class that it was saved as, and its tokenizer.

    Args:
        name: a folder or a hub name. No code of it is run: the classes are those of this installation.

    Raises:
        ValueError: no LambdaBERT, weights that are missing, a model of choices, or no tokenizer of its own.
        OSError: there is a config, but no weights.
    """

    def __init__(self, name: str):
        self.name = name
        try:
            fields, _ = PreTrainedConfig.get_config_dict(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"model={name} is neither the folder of a model nor one that the hub gives ({reason}): give the folder "
                "of a saved LambdaBERT, or its hub name."
            ) from None
        if (kind := fields.get("model_type")) != "lambdabert":
            of_kind = f"is of type {kind}" if kind else "has no config.json of a model"
            raise ValueError(
                f"model={name} {of_kind} and has no lambda layers to look into; give a LambdaBERT. "
                "distill_from_bert.py makes one of a BERT."
            )
        self.model: Any = load_as_saved(name)
        if isinstance(self.model, modeling_lambdabert.LambdaBertForMultipleChoice):
            raise ValueError(
                f"model={name} is a multiple-choice model, and only single texts can be examined; load its encoder by "
                "LambdaBertModel.from_pretrained, save that with the tokenizer, and give its folder."
            )
        self.tokenizer: Any = load_saved_tokenizer(name)
        vocabulary = self.model.config.vocab_size
        if not len(self.tokenizer.all_special_ids) < len(self.tokenizer) <= vocabulary:
            raise ValueError(
                f"model={name} has vocab_size={vocabulary}, but its tokenizer has {len(self.tokenizer)} tokens, so it "
                "is missing or another model's; save the one that it was trained with there."
            )

    @property
    def limit(self) -> int | None:
        """The most tokens of a text; None = any number."""
        return self.model.config.longest_sequence

    def encode(self, texts: Sequence[str], what: str = "text") -> Any:
        """What the tokenizer returns for texts, padded to the longest.

        Args:
            texts: one or more.
            what: how a message calls them.

        Raises:
            ValueError: an empty text, or one above the model's limit.
        """
        empty = len(self.tokenizer("")["input_ids"])
        for text in texts:
            length = len(self.tokenizer(text)["input_ids"])
            if length <= empty:
                raise ValueError(f"{what}={_shown(text)!r} is empty; give at least one word.")
            self._check_length(length, text, what)
        return self.tokenizer(list(texts), return_tensors="pt", padding=True)

    def encode_question(self, question: str, text: str) -> Any:
        """What the tokenizer returns for a question about a text, or for a pair of texts, one row.

        Raises:
            ValueError: one of them is empty, or both are above the model's limit together.
        """
        for one, what in ((question, "first text"), (text, "second text")):
            self.encode([one], what)
        inputs = self.tokenizer(question, text, return_tensors="pt")
        self._check_length(inputs["input_ids"].shape[1], text, "both texts")
        return inputs

    def _check_length(self, length: int, text: str, what: str) -> None:
        limit = self.limit
        if limit is not None and length > limit:
            raise ValueError(
                f"{what}={_shown(text)!r} has {length} tokens, and the model takes max_position_embeddings={limit}; "
                "shorten it."
            )

    def batches(self, texts: Sequence[str], what: str) -> list[Any]:
        """Texts in batches; arguments and errors of `encode`."""
        return [self.encode(texts[start : start + BATCH], what) for start in range(0, len(texts), BATCH)]

    def tokens(self, inputs: Any) -> list[str]:
        """The words of the first row."""
        return self.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())

    def masks(self, inputs: Any) -> list[int]:
        """Places of [MASK] in the first row."""
        if self.tokenizer.mask_token_id is None:
            return []
        return (inputs["input_ids"][0] == self.tokenizer.mask_token_id).nonzero()[:, 0].tolist()

    def predicted(self, inputs: Any) -> list[int]:
        """Places of the first row at which a model is trained to predict a token or a label: words and [MASK]."""
        without = {*self.tokenizer.all_special_ids} - {self.tokenizer.mask_token_id, self.tokenizer.unk_token_id}
        return [place for place, token in enumerate(inputs["input_ids"][0].tolist()) if token not in without]

    @torch.no_grad()
    def likeliest_tokens(self, inputs: Any, places: Sequence[int]) -> list[str]:
        """The likeliest token at each place of the first row."""
        if not places:
            return []
        logits = _token_logits(self.model(**inputs))[0, list(places)]
        return self.tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist())

    @property
    def predicts_tokens(self) -> bool:
        return hasattr(self.model, "cls") and hasattr(self.model.cls, "predictions")

    @property
    def labels_tokens(self) -> bool:
        return isinstance(self.model, modeling_lambdabert.LambdaBertForTokenClassification)

    @property
    def answers_questions(self) -> bool:
        return isinstance(self.model, modeling_lambdabert.LambdaBertForQuestionAnswering)

    @property
    def judges_pairs(self) -> bool:
        return isinstance(self.model, modeling_lambdabert.LambdaBertForNextSentencePrediction)

    @property
    def takes_pairs(self) -> bool:
        """Whether two texts may be one row of the model's task."""
        is_pretraining = hasattr(self.model, "cls") and hasattr(self.model.cls, "seq_relationship")
        return isinstance(self.model, CLASSIFIERS) or self.answers_questions or is_pretraining

    @property
    def predicts_classes(self) -> bool:
        is_regression = self.model.config.problem_type == "regression"
        return isinstance(self.model, CLASSIFIERS) and len(self._classes()) > 1 and not is_regression

    def can_explain(self, inputs: Any) -> bool:
        """Whether a text asks for one prediction."""
        if self.predicts_tokens:
            return len(self.masks(inputs)) == 1
        if self.answers_questions:  # tokenizers in Python do not say which tokens are the text's
            asks = inputs.is_fast and 1 in inputs.sequence_ids(0)
        else:
            asks = self.predicts_classes
        return asks and self.tokenizer.mask_token_id is not None

    def explain(
        self,
        inputs: Any,
        trace: LambdaTrace,
        target: str | None = None,
        place: int | None = None,
        gradients: bool = True,
    ) -> ExplainedPrediction:
        """The explanation of a masked token, a class, a token's label, or where an answer starts or ends.

        Args:
            inputs: of `encode` or `encode_question`, one row.
            trace: of them.
            target: the token, class or label whose logit is explained, None = the likeliest; of an answer "start" or
                "end", None = "start".
            place: the token whose label is explained; of an answer, where it starts or ends, None = likeliest.
            gradients: whether to add integrated gradients.

        Raises:
            ValueError: a text without [MASK], or with several; an unknown target; a place that is missing, superfluous
                or out of range; a model that predicts none of these; a tokenizer without [MASK].
        """
        if self.tokenizer.mask_token_id is None:
            raise ValueError(f"model={self.name}: its tokenizer has no [MASK], which explanations compare with.")
        asked = self._question(inputs, trace.outputs, target, place)
        arguments = (self.model, inputs, asked.place, asked.target, self.tokenizer.mask_token_id)
        return ExplainedPrediction(
            of=f"{asked.what}, with a probability of {asked.probability:.3f}.",
            explanation=explain_prediction(*arguments),
            integrated_gradients=integrated_gradients(*arguments) if gradients else None,
            likeliest=asked.likeliest,
            place=asked.place,
        )

    def _question(self, inputs: Any, outputs: Any, target: str | None, place: int | None) -> "_Question":
        """What of a model's outputs for one row is explained."""
        tokens = self.tokens(inputs)
        if place is not None and not 0 <= place < len(tokens):
            raise ValueError(f"place={place}: the text has the tokens {_numbered(tokens)}; give the number of one.")
        if self.answers_questions:
            of_text = [i for i, sequence in enumerate(inputs.sequence_ids(0)) if sequence == 1]
            return self._answer(tokens, of_text, outputs, target or "start", place)
        if self.labels_tokens:
            if place is None:
                raise ValueError(
                    f"place is missing: the model labels each token of {_numbered(tokens)}; give a number."
                )
            return self._likeliest(outputs.logits[0, place], target, place, f"the label of {tokens[place]} ({place})")
        if place is not None:
            raise ValueError(
                f"place={place} has no effect: the model predicts [MASK] or the text's class; leave it out."
            )
        if self.predicts_tokens:
            found = self.masks(inputs)
            if len(found) != 1:
                raise ValueError(
                    f"text holds {len(found)} {self.tokenizer.mask_token}, and one prediction is explained; put "
                    "exactly one in place of a word."
                )
            (place,) = found
            return self._likeliest(
                _token_logits(outputs)[0, place], target, place, f"{self.tokenizer.mask_token} ({place})"
            )
        if self.predicts_classes:
            return self._likeliest(outputs.logits[0], target, None, "its class")
        if isinstance(self.model, CLASSIFIERS):
            raise ValueError(
                f"model={self.name} predicts numbers, or has a single class; explained are choices among classes. "
                "`map` shows any model."
            )
        raise ValueError(
            f"model={self.name} is a {type(self.model).__name__}; explained are masked language models, classifiers of "
            "texts and of tokens, and answers to questions. `map` shows any model."
        )

    def _likeliest(self, logits: torch.Tensor, target: str | None, place: int | None, where: str) -> "_Question":
        """The target, or the likeliest, of tokens or classes [C]."""
        of_each = place is None and self.model.config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if of_each else logits.softmax(-1)
        best = probabilities.topk(min(LIKELIEST, len(probabilities)))
        token = int(best.indices[0]) if target is None else self._index(target)
        return _Question(
            place,
            token,
            f"“{self._name(token)}” as {where}",
            float(probabilities[token]),
            [(self._name(int(i)), float(p)) for i, p in zip(best.indices, best.values)],
        )

    def _answer(
        self, tokens: Sequence[str], of_text: list[int], outputs: Any, end: str, place: int | None
    ) -> "_Question":
        """The start or the end of an answer, at a given token or the likeliest of those at the places `of_text`: [CLS]
        stands for an answer that is not there, and is listed if it is among the likeliest."""
        if end not in ("start", "end"):
            raise ValueError(f"target={end}: an answer has a start and an end; give one of these.")
        probabilities = outputs[f"{end}_logits"][0].softmax(-1)
        best = probabilities.topk(min(LIKELIEST, len(probabilities)))
        chosen = of_text[int(probabilities[of_text].argmax())] if place is None else place
        return _Question(
            chosen,
            end,
            f"“{tokens[chosen]}” ({chosen}) as the {end} of the answer",
            float(probabilities[chosen]),
            [(f"{tokens[int(i)]} ({int(i)})", float(p)) for i, p in zip(best.indices, best.values)],
        )

    def _name(self, index: int) -> str:
        if self.predicts_tokens:
            return self.tokenizer.convert_ids_to_tokens([index])[0]
        return self._classes()[index]

    def _classes(self) -> list[str]:
        names: dict[Any, str] = self.model.config.id2label or {}
        return [str(names.get(i, i)) for i in range(self.model.config.num_labels or 0)]

    def _index(self, target: str) -> int:
        if not target.strip():
            raise ValueError("target is empty; name what is to be explained, or leave it out.")
        if self.predicts_tokens:
            token = self.tokenizer.get_vocab().get(target)
            if token is None:
                pieces = ", ".join(self.tokenizer.tokenize(target))
                raise ValueError(
                    f"target={target} is not a single token of the model, which splits it into {pieces}; "
                    "give one of these."
                )
            return token
        if target not in (classes := self._classes()):
            raise ValueError(f"target={target} is not a class of the model; give one of {', '.join(classes)}.")
        return classes.index(target)


def read_texts(file: str | Path) -> tuple[list[str], list[str] | None]:
    """Texts and, where known, their topics: one text a line; in a .tsv, columns text and topic named by the first line.

    Raises:
        ValueError: a file that cannot be read as that, or without a text.
    """
    file = Path(file)
    if file.suffix.lower() in TABLES:
        raise ValueError(f"file={file} is a table; give a .tsv with a column text, or a file with one text a line.")
    if file.suffix.lower() == ".tsv":
        columns, lines = read_columns(file, f"file={file}")
        if "text" not in columns or not lines:
            raise ValueError(
                f"file={file} has the columns {list(columns)} and {len(lines)} rows; name a column text in the first "
                "line, and topic where known, separated by tabs."
            )
        topics = columns.get("topic")
        if without := [line for line, topic in zip(lines, topics or ()) if not topic.strip()]:
            raise ValueError(
                f"file={file}, line {without[0]} has no topic; give every text one, or leave out the column."
            )
        return columns["text"], topics
    try:
        texts = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file={file} cannot be read as text ({error}); name a file with one text a line.") from None
    if not texts:
        raise ValueError(f"file={file} holds no text; put one on each line.")
    return texts, None
