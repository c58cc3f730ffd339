"""The logit that an explanation is of, and the embeddings that a model is run on to find it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .models import hooks, lambda_layers, model_inputs

Index = int | torch.Tensor


class Prediction:
    """One logit for each row of a batch, as a function of the rows' word embeddings.

    Args:
        model: a LambdaBERT with a head, in evaluation mode.
        inputs: what its tokenizer returns with `return_tensors="pt"`, [B, N] each ([B, C, N] with choices).
        place: the token whose logits these are, one for all rows or [B]; None where the head sees whole sequences.
        target: which of the logits: a token of the vocabulary, a class, a choice, or "start" or "end" of an answer; one
            for all rows or [B].

    Raises:
        ValueError: no lambda layers, training mode; and when it is run: no head; a place or target that is missing,
            superfluous, out of range, no whole number, or for other than B rows; a place of padding.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], place: Index | None, target: Index | str):
        lambda_layers(model)
        self.model = model
        self.inputs = model_inputs(model, inputs)
        self.input_ids = self.inputs["input_ids"]
        if "position_ids" in self.inputs:
            self.inputs["position_ids"] = self.inputs["position_ids"].expand_as(self.input_ids)
        self.token_mask = self.inputs["attention_mask"].bool()
        self.place, self.target = place, target

    def _per_row(self, name: str, given: Any) -> torch.Tensor:
        """An index as one for each row, [B]."""
        rows = len(self.input_ids)
        try:
            indices = torch.as_tensor(given, device=self.input_ids.device)
        except (TypeError, ValueError, RuntimeError):
            indices = None
        is_whole = indices is not None and indices.dtype in (torch.int32, torch.int64)
        if indices is None or not is_whole or indices.shape not in ((), (1,), (rows,)):
            raise ValueError(
                f"{name}={given!r}: give a whole number for all rows, or a tensor [{rows}] of one for each."
            )
        return indices.expand(rows)

    def embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings [..., D] of ids."""
        table: Any = self.model.get_input_embeddings()
        return table.weight.detach()[input_ids]

    def mask_token(self, mask_token_id: int | None) -> torch.Tensor:
        """[MASK] as a tensor [], by default the token at `place` of a masked language model.

        Raises:
            ValueError: no id given, and none to be found; another token than the config's [MASK] there.
        """
        if mask_token_id is None:
            if not hasattr(self.model, "cls") or not hasattr(self.model.cls, "predictions") or self.place is None:
                raise ValueError(
                    "mask_token_id=None: what a token is taken away for must be known; give the tokenizer's "
                    "mask_token_id."
                )
            found = self.at_place(self.input_ids).unique().tolist()
            if len(found) > 1:
                raise ValueError(
                    f"place={self.place}: the rows have different tokens there, {found}, so they are not all [MASK]; "
                    "mask the place or give mask_token_id."
                )
            (mask_token_id,) = found
            known = self.model.config.mask_token_id
            if known is not None and mask_token_id != known:
                raise ValueError(
                    f"place={self.place} holds token {mask_token_id}, and [MASK] is {known}: mask the place, or give "
                    "mask_token_id to explain a prediction at a word."
                )
        vocabulary = self.model.config.vocab_size
        if not 0 <= mask_token_id < vocabulary:
            raise ValueError(
                f"mask_token_id={mask_token_id} is not in the vocabulary; give one of 0 ... {vocabulary - 1}."
            )
        return self.input_ids.new_tensor(mask_token_id)

    def mask_embedding(self, mask_token_id: int | None) -> torch.Tensor:
        """The word embedding [D] of [MASK]. Arguments and errors of `mask_token`."""
        return self.embeddings(self.mask_token(mask_token_id))

    def at_place(self, of_tokens: torch.Tensor) -> torch.Tensor:
        """[B, N] or [B, N, C] at the place, [B] or [B, C]."""
        length = of_tokens.shape[1]
        places = self._per_row("place", self.place)
        if places.min() < 0 or places.max() >= length:
            raise ValueError(f"place={self.place}: the rows have {length} places; give one of 0 ... {length - 1}.")
        rows = torch.arange(len(of_tokens), device=of_tokens.device)
        if not self.token_mask[rows, places].all():
            raise ValueError(f"place={self.place} is padding in a row, without a prediction; give a token's place.")
        return of_tokens[rows, places]

    def run(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The logits of S copies of the batch on other word embeddings, [S, B]; repetitions are those of `input_ids`.

        Args:
            embeddings: [S, B, N, D]
        """
        words = embeddings.flatten(0, 1)  # choices are flattened by the model
        hook = self.model.get_input_embeddings().register_forward_hook(lambda *_: words.flatten(0, -3))
        with hooks([hook]):
            return self.run_texts(self.input_ids.expand(len(embeddings), *self.input_ids.shape))

    def run_texts(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits of S copies of the batch with other tokens, [S, B].

        Args:
            input_ids: [S, B, N]
        """
        copies = len(input_ids)
        inputs = {name: value.repeat(copies, *[1] * (value.dim() - 1)) for name, value in self.inputs.items()}
        inputs["input_ids"] = input_ids.flatten(0, 1)
        outputs = self.model(**inputs, output_hidden_states=True, return_dict=True)
        return torch.stack([self._select(outputs, i * len(self.input_ids)) for i in range(copies)])

    def _select(self, outputs: Any, start: int) -> torch.Tensor:
        """[B] logits of the copy of the batch that starts at a row."""
        here = slice(start, start + len(self.input_ids))
        logits, choices, target = self._logits(outputs, here)
        targets = self._per_row("target", target)
        if targets.min() < 0 or targets.max() >= choices:
            raise ValueError(f"target={self.target}: the model tells {choices} apart; give one of 0 ... {choices - 1}.")
        return logits.gather(1, targets[:, None])[:, 0]

    def _logits(self, outputs: Any, here: slice) -> tuple[torch.Tensor, int, Index]:
        """[B, classes], their number and the index among them."""
        if "start_logits" in outputs:
            if self.target not in ("start", "end"):
                raise ValueError(f'target={self.target!r}: an answer has a start and an end; give "start" or "end".')
            logits = torch.stack([outputs.start_logits, outputs.end_logits], -1)[here]
            target: Index = ("start", "end").index(self.target)
        else:
            if isinstance(self.target, str):
                raise ValueError(f"target={self.target!r} is not an index: give a token's or class's number.")
            target = self.target
            if "prediction_logits" in outputs and self.place is None:
                logits = outputs.seq_relationship_logits[here]
            elif "prediction_logits" in outputs:
                logits = outputs.prediction_logits[here]
            elif "logits" in outputs:
                logits = outputs.logits[here]
            else:
                raise ValueError(
                    f"model={type(self.model).__name__} has no head, so nothing to explain; load the text's task, for "
                    "example as LambdaBertForMaskedLM."
                )
        if logits.dim() == 3:
            if self.place is None:
                raise ValueError("place=None: the model predicts at every token; give the place to be explained.")
            logits = self.at_place(logits)
        elif self.place is not None:
            raise ValueError(f"place={self.place}: the model predicts once for a sequence; leave place at None.")
        return logits, logits.shape[1], target


def gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The value of a function and the gradient of its sum."""
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        value = function(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), slope
