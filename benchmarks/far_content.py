"""What another path for far content could add to a trained model: its loss after going on with one.

    python -m benchmarks.far_content models/wikipedia articles.txt validation.txt --output far_content.json

A copy of the model goes on for `--steps` steps at 512 tokens with each path of `PATHS`: beside the content lambda of
every layer, added to its output, as wide as the layer and with queries, keys and values of its own. Values start at
zero, so that each copy starts as the model it is; the rest of the model goes on with it. Three rows have no path:

- `as it is`, and `position only`, whose content lambdas are zero from the first step on;
- `repetition lambda`, whose layers have the library's own, which starts at zero as well.

`attention` compares every token with every other, in O(N^2); its row says how much there is to win. The rows share
texts, order and masks. Losses are in nats per masked token, 15 % masked; training masks 30 %. What replacing the
content lambdas costs, those of a path among them, is measured as by `content_lambda`. The output is written after each
row, and a row that it has is not run again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

import lambda_layer
from benchmarks import masked_text
from benchmarks.content_lambda import losses
from benchmarks.environment import add_environment, environment
from benchmarks.lambda_variants import running_variant
from benchmarks.report import write_json
from benchmarks.runs import one_line_errors
from lambdabert.text.masks import IGNORED_LABEL
from lambdabert.training.metrics import logits_of
from modeling_lambdabert import LambdaBertForMaskedLM

SHORT, LENGTH, STEP_TOKENS = 128, 512, 4096
DEPTH = 64  # K and V of a head
# the rates of a trained model that goes on, of the matrices of a path, and of the table of a repetition lambda
RATE, PATH_RATE, TABLE_RATE = 3e-4, 3e-3, 3e-2
WARMUP = 20  # steps
AROUND = 5  # R' of a repetition lambda


class FarContent(nn.Module):
    """H = D / V heads that mix values [B, N, H, V] by queries and keys [B, N, H, K], which start at the scale of the
    lambda layer's; K = V = `DEPTH`."""

    def __init__(self, width: int):
        super().__init__()
        self.to_queries, self.to_keys, self.to_values = (nn.Linear(width, width, bias=False) for _ in range(3))
        for projection in (self.to_queries, self.to_keys):
            nn.init.normal_(projection.weight, std=width**-0.5)
        nn.init.zeros_(self.to_values.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[B, N, D] from the input [B, N, D] of a lambda layer."""
        projections = (self.to_queries, self.to_keys, self.to_values)
        queries, keys, values = (rearrange(project(inputs), "b n (h k) -> b n h k", k=DEPTH) for project in projections)
        return rearrange(self.mix(queries, keys, values), "b n h v -> b n (h v)")

    def mix(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Lambda(FarContent):
    """A content lambda for each head, read with queries of its own, of unit scale for keys that are nearly uniform."""

    def mix(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return self.read(queries, keys.softmax(dim=1, dtype=torch.float32).to(values.dtype), values)

    def read(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[B, N, H, V], of keys that are distributions over N."""
        heads = zip(keys[..., None].unbind(2), values[..., None].unbind(2), strict=True)
        contents = torch.stack([lambda_layer.content_lambda(*head) for head in heads], dim=1)
        return torch.einsum("bnhk,bhkv->bnhv", queries, contents) * DEPTH**-0.5


class LambdaOfOthers(Lambda):
    """The same of all tokens but the one that reads, whose query starts as its key, sharpened twofold."""

    def __init__(self, width: int):
        super().__init__(width)
        sharpen(self)

    def read(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        own = (queries * keys).sum(-1, keepdim=True) * values * DEPTH**-0.5
        return super().read(queries, keys, values) - own


class Attention(FarContent):
    """Softmax attention to all tokens but the one that reads, whose query starts as its key, sharpened twofold."""

    def __init__(self, width: int):
        super().__init__(width)
        sharpen(self)

    def mix(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bnhk,bmhk->bhnm", queries, keys).float() * DEPTH**-0.5
        scores.diagonal(dim1=2, dim2=3).fill_(torch.finfo(scores.dtype).min)
        return torch.einsum("bhnm,bmhv->bnhv", scores.softmax(-1).to(values.dtype), values)


def sharpen(path: FarContent) -> None:
    """Queries start as the keys, and these twice as large: a token finds those that are like it."""
    with torch.no_grad():
        path.to_queries.weight.copy_(path.to_keys.weight)
        path.to_keys.weight *= 2


PATHS: dict[str, type[FarContent] | None] = {
    "as it is": None,
    "position only": None,
    "repetition lambda": None,
    "lambda": Lambda,
    "lambda of the others": LambdaOfOthers,
    "attention": Attention,
}


def open_model(folder: Path, name: str) -> LambdaBertForMaskedLM:
    """The model of a row before its first step."""
    model, tokenizer = masked_text.load_lambdabert(folder)
    if name == "repetition lambda":
        fields = {"repetition_context_size": AROUND, "mask_token_id": tokenizer.mask_token_id}
        model = LambdaBertForMaskedLM.from_pretrained(folder, dtype=torch.float32, **fields)
    add_paths(model, PATHS[name])
    return model


def rate_of(parameter_name: str) -> float:
    if parameter_name.endswith(".repetition_embeddings"):
        return TABLE_RATE
    return PATH_RATE if ".far_content." in parameter_name else RATE


def add_paths(model: LambdaBertForMaskedLM, path: type[FarContent] | None) -> None:
    """Gives every lambda layer a path of its own, if any."""

    def add(layer: Any, inputs: tuple[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> Any:
        return outputs[0] + layer.far_content(inputs[0]), *outputs[1:]

    for layer in model.bert.encoder.layer if path else ():
        mixing = layer.attention.self
        mixing.far_content = path(model.config.hidden_size)  # type: ignore[misc]
        mixing.register_forward_hook(add)


def loss_at_masks(model: LambdaBertForMaskedLM, batch: dict[str, Any], *, bf16: bool) -> torch.Tensor:
    """Mean MLM loss of a batch without padding, whose logits are computed at masked tokens alone."""
    masked = batch["labels"] != IGNORED_LABEL
    with logits_of(model, masked), torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=bf16):
        logits = model(batch["input_ids"]).logits
    return F.cross_entropy(logits.float(), batch["labels"][masked])


def go_on(model: LambdaBertForMaskedLM, batches: masked_text.Batches, name: str, *, bf16: bool) -> None:
    """Trains the model on each batch once, at rates that rise for `WARMUP` steps and fall to 0."""
    rates: dict[float, list[nn.Parameter]] = {RATE: [], PATH_RATE: [], TABLE_RATE: []}
    for parameter_name, parameter in model.named_parameters():
        rates[rate_of(parameter_name)].append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, len(batches))
    model.train()
    for batch in tqdm(batches, desc=name):
        loss_at_masks(model, batch, bf16=bf16).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def measure(name: str, model: LambdaBertForMaskedLM, texts: dict[int, masked_text.Batches]) -> dict[str, Any]:
    """By length of the texts, the loss of a row's model, and what replacing its content lambdas costs."""
    path = PATHS[name]
    heads = model.config.hidden_size // DEPTH if path and issubclass(path, Lambda) else 0
    found = {}
    with running_variant(name):
        for length, batches in texts.items():
            of_length = losses(model, batches, per_layer=1 + heads)
            loss = of_length.pop("as they are")
            found[f"{length} tokens"] = {"loss": loss} | {key: cost - loss for key, cost in of_length.items()}
    return found


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.far_content", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("model", type=Path, help="folder of a LambdaBERT with its MLM head and tokenizer")
    parser.add_argument("train_text", type=Path)
    parser.add_argument("validation_text", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="of 4096 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of paths, texts and their masks")
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS))
    parser.add_argument("--tokens", type=int, default=65536, help="of the validation text, at each length")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 mixed precision")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    settings = {
        "model": options.model.name,
        "texts": [options.train_text.name, options.validation_text.name],
        "steps": options.steps,
        "tokens": options.tokens,
        "bf16": options.bf16,
    }
    with one_line_errors():
        taken_with = environment("datasets")
        record: dict[str, Any] = {**settings, "rows": {}}
        if options.output.exists():
            record = json.loads(options.output.read_text(encoding="utf-8"))
            if other := [key for key, value in settings.items() if record.get(key) != value]:
                raise ValueError(f"output={options.output} holds rows of another {other[0]}; name another file.")
        _, tokenizer = masked_text.load_lambdabert(options.model)

        def batches_of(file: Path, length: int, tokens: int, **choices: Any) -> masked_text.Batches:
            return masked_text.make_batches(tokenizer, file, length, tokens // length, STEP_TOKENS // length, **choices)

        texts = {length: batches_of(options.validation_text, length, options.tokens) for length in (SHORT, LENGTH)}
        for seed in options.seeds:
            training = batches_of(options.train_text, LENGTH, options.steps * STEP_TOKENS, seed=seed, training=True)
            if len(training) < options.steps:
                raise ValueError(f"train_text={options.train_text} is too short for steps={options.steps}.")
            for name in options.paths:
                if (key := f"{name}, seed {seed}") not in record["rows"]:
                    set_seed(seed)
                    model = open_model(options.model, name)
                    with running_variant(name):
                        go_on(model, training, key, bf16=options.bf16)
                    record["rows"][key] = measure(name, model, texts)
                    add_environment(record, taken_with)
                    print(key, record["rows"][key], flush=True)
                    write_json(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
