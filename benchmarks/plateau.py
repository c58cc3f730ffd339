"""What holds a new model at word frequencies: hidden states, branches, gradients and updates of its first steps.

    python -m benchmarks.plateau benchmarks/recipes/quality/wikitext2_plateau.json --steps 100 --output runs/plateau

The recipe is one of `quality.py`; each of its models is trained as there, at its first learning rate and with its
first seed, for the first `--steps` steps of its schedule, which may be none. Before the first step, and after each
`--every` steps, a fixed batch of masked validation text is looked at (B texts, N tokens, no dropout, nothing learned
from it):

- `loss`: MLM loss in nats per masked token, of that batch.
- `hidden`: for the embeddings and every layer's output, the share of the mean square that is common to all tokens, that
  is common to the tokens of a text beyond that, and that tells tokens of a text apart. They add up to 1: with the mean
  g over all tokens and t over those of a text, |g|^2, |t - g|^2 and |x - t|^2.
- `branches`: for every layer, the root mean square of what attention (or the lambda layer) and the feed-forward layer
  add, over that of the residual that they add it to, and the share of what they add that is common to all tokens.
- `lambdas`: for every lambda layer, the root mean square of what the content lambda adds to the output, over that of
  the position lambda; the share of it that is common to all tokens; the share of the content lambda that is common to
  all texts, and that is common to its K key channels; and the root mean square of the gain on it (1 without one).

Of the training step that leads there:

- `gradients`: norm of the gradient, after clipping, of embeddings, head, and every layer's two halves.
- `updates`: norm of the change that the optimizer makes, over the norm of the weights, of the same groups.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerState

from benchmarks.environment import add_environment, environment
from benchmarks.lambda_variants import running_variant
from benchmarks.quality import FIELDS, MODEL_FIELDS, check_models, prepare
from benchmarks.report import write_json
from benchmarks.runs import Recipe, RunFolder, one_line_errors, read_recipe, seeds
from lambda_layer import LambdaLayer
from lambdabert.interpretation.models import project_queries


def mean_square(states: torch.Tensor) -> torch.Tensor:
    return states.square().mean()


def root_mean_square(states: torch.Tensor) -> float:
    return mean_square(states).sqrt().item()


def shares(states: torch.Tensor) -> dict[str, float]:
    """What of [B, N, D] is common to all tokens, to those of a text beyond that, and to neither; 1 in all."""
    total, common, of_text = mean_square(states), states.mean((0, 1)), states.mean(1)
    parts = {"common": common.expand_as(of_text), "text": of_text - common, "token": states - of_text[:, None]}
    return {name: (mean_square(part) / total).item() for name, part in parts.items()}


def group_of(name: str) -> str:
    """Where a parameter belongs: "embeddings", "head", or half a layer, such as "layer 3 mixing" (attention)."""
    layer = re.search(r"encoder\.layer\.(\d+)\.(attention)?", name)
    if layer is None:
        return "embeddings" if ".embeddings." in name else "head"
    return f"layer {layer[1]} {'mixing' if layer[2] else 'feed-forward'}"


def group_norms(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Norm of all tensors of each group."""
    squares: dict[str, float] = {}
    for name, tensor in tensors.items():
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + tensor.detach().double().square().sum().item()
    return {group: square**0.5 for group, square in squares.items()}


class Probe:
    """Looks at what a model makes of a batch, through hooks on its layers."""

    def __init__(self, model: Any, batch: Mapping[str, torch.Tensor]):
        self.model, self.batch = model, batch

    def __call__(self) -> dict[str, Any]:
        layers = self.model.bert.encoder.layer
        report: dict[str, Any] = {"hidden": [], "branches": [{} for _ in layers], "lambdas": [{} for _ in layers]}
        handles = [
            self.model.bert.embeddings.register_forward_hook(
                lambda module, inputs, output: report["hidden"].append(shares(output))
            )
        ]
        for layer, branches, lambdas in zip(layers, report["branches"], report["lambdas"]):
            handles += [
                self._watch_branch(layer.attention.output, "mixing", branches),
                self._watch_branch(layer.output, "feed-forward", branches),
                layer.register_forward_hook(
                    lambda module, inputs, output: report["hidden"].append(
                        shares(output[0] if isinstance(output, tuple) else output)
                    )
                ),
            ]
            if isinstance(layer.attention.self, LambdaLayer):
                handles.append(self._watch_lambdas(layer.attention.self, lambdas))
        was_training = self.model.training
        try:
            with torch.no_grad():
                report["loss"] = self.model.eval()(**self.batch).loss.item()
        finally:
            self.model.train(was_training)
            for handle in handles:
                handle.remove()
        return report

    @staticmethod
    def _watch_branch(block: Any, name: str, found: dict[str, Any]) -> RemovableHandle:
        """`block` projects its first input, adds it to its second, the residual, and normalises the sum."""

        def look(block: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            branch = block.dense(inputs[0])
            ratio = root_mean_square(branch) / root_mean_square(inputs[1])
            found[name] = {"over residual": ratio, "common": shares(branch)["common"]}

        return block.register_forward_hook(look)

    @staticmethod
    def _watch_lambdas(layer: LambdaLayer, found: dict[str, Any]) -> RemovableHandle:
        def look(layer: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
            mixed, content = output
            of_content = (project_queries(layer, inputs[0]) @ content[:, None]).flatten(-2)
            found["content over position"] = root_mean_square(of_content) / root_mean_square(mixed - of_content)
            found["gain"] = 1.0 if layer.content_gain is None else root_mean_square(layer.content_gain)
            if of_content.any():
                found["content common to tokens"] = shares(of_content)["common"]
                found["content common to texts"] = (mean_square(content.mean(0)) / mean_square(content)).item()
                found["content common to channels"] = (mean_square(content.mean(1)) / mean_square(content)).item()

        return layer.register_forward_hook(look)


class Watch(TrainerCallback):
    """Records a probe, gradients and updates every so many steps, and ends the training after the last of them."""

    def __init__(self, probe: Probe, every: int, steps: int):
        self.probe, self.every, self.steps = probe, every, steps
        self.records: list[dict[str, Any]] = [{"step": 0} | probe()]
        self.gradients: dict[str, float] = {}
        self.before: dict[str, torch.Tensor] = {}

    def _is_watched(self, state: TrainerState) -> bool:
        return (state.global_step + 1) % self.every == 0

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._is_watched(state):
            gradients = {name: p.grad for name, p in kwargs["model"].named_parameters() if p.grad is not None}
            self.gradients = group_norms(gradients)
            self.before = {name: p.detach().clone() for name, p in kwargs["model"].named_parameters()}

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._is_watched(state):
            changes = group_norms({name: p - self.before[name] for name, p in kwargs["model"].named_parameters()})
            weights = group_norms(self.before)
            updates = {group: change / weights[group] for group, change in changes.items()}
            self.records.append({"gradients": self.gradients, "updates": updates})

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.records[-1] = {"step": state.global_step} | self.probe() | self.records[-1]
            print(state.global_step, f"{self.records[-1]['loss']:.3f}", flush=True)
        if state.global_step >= self.steps:
            control.should_training_stop = True


def watch(recipe: Recipe, name: str, steps: int, every: int, path: Path) -> dict[str, Any]:
    """The records of one model of the recipe, which is trained in a folder below `path`."""
    model = recipe["models"][name]
    learning_rate, seed = model["learning_rates"][0], seeds(recipe, name)[0]
    quiet = {"eval_steps": 10**6, "logging_steps": every}  # evaluated by the probe alone
    recipe = recipe | {"models": {name: model | {"options": model.get("options", {}) | quiet}}}
    work = path / "work"
    shutil.rmtree(work / name, ignore_errors=True)  # a stopped run's checkpoint
    pretraining = prepare(RunFolder(work, recipe), name, learning_rate, seed, work / name)
    with running_variant(model.get("variant")):
        trainer = pretraining.trainer()
        trainer.data_collator.seed = seed
        probe = Probe(pretraining.model, next(iter(trainer.get_eval_dataloader())).to(trainer.args.device))
        callback = Watch(probe, every, steps)
        if steps:
            trainer.add_callback(callback)
            trainer.train()
        if trainer.stop.received:
            sys.exit(f"Stopped by {trainer.stop.received}; {name} is not recorded.")
    return {"learning rate": learning_rate, "seed": seed, "records": callback.records}


def check_steps(watched: Mapping[str, Any], steps: int, every: int) -> None:
    """Raises ValueError if a model is to be watched at no steps, or is recorded at others."""
    if steps < 0 or every < 1:
        raise ValueError(f"steps={steps}, every={every}: watch 0 steps or more, every step or fewer.")
    wanted = list(range(0, steps + 1, every))
    for name, record in watched.items():
        recorded = [each["step"] for each in record["records"]]
        if recorded != wanted:
            raise ValueError(
                f"output holds {name!r} at {len(recorded)} steps up to {recorded[-1]}; steps={steps}, every={every} "
                f"ask for {len(wanted)} up to {wanted[-1]}: name another folder, or leave it out by --models."
            )


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plateau", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="folder for results.json of this recipe")
    parser.add_argument("--models", nargs="+", help="only these models of the recipe")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command on `argv`, by default the process's own arguments; returns its exit status."""
    options = parse_command(argv)
    with one_line_errors():
        recipe = read_recipe(options.recipe, FIELDS, MODEL_FIELDS)
        folder = RunFolder(options.output, recipe)
        summary = {**folder.summary, "models": folder.summary.get("models", {}), "recipe": recipe}
        watched = summary["models"]
        names = folder.selected(options.models)
        check_steps({name: watched[name] for name in names if name in watched}, options.steps, options.every)
        names = [name for name in names if name not in watched]
        check_models(recipe, names)
    taken_with = environment("datasets")
    for name in names:
        print(name, flush=True)
        watched[name] = watch(recipe, name, options.steps, options.every, options.output)
        add_environment(summary, taken_with)
        write_json(options.output / "results.json", summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
