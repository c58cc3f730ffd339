"""Pretrains another encoder as the pretraining command trains LambdaBERT, for comparisons after fine-tuning.

    python -m benchmarks.pretrain_peer modernbert configs/wikipedia_small.json \
        --tokenizer_name checkpoints/wikipedia-small --train_tokenizer=false \
        --output_dir models/wikipedia_small_modernbert --learning_rate 2e-3

The first argument names one of the encoders in `peers.py`, of the same width, depth, feed-forward parameters,
vocabulary and dropout as the LambdaBERT of the other options. Options, text, examples, order of the data, masks, start
at token frequencies, checkpoints and report are those of `run_language_modeling.py`, masked language modelling alone;
`modernbert --help` lists them.
"""

import sys
from typing import Any, ClassVar

from transformers import set_seed

from benchmarks.peers import PEERS
from lambdabert.training.command import fail, run_training_command
from lambdabert.training.run import Documents
from run_language_modeling import ARGUMENT_GROUPS, Pretraining


class PeerPretraining(Pretraining):
    """A run of the pretraining command with another encoder in LambdaBERT's place."""

    architecture: ClassVar[str]

    def make_model(self, documents: Documents) -> None:
        if self.objective.has_pairs:
            raise ValueError(f"objective={self.objective.name} trains on pairs; this command takes mlm alone.")
        if self.model_args.model_name_or_path is not None:
            raise ValueError(
                f"model_name_or_path={self.model_args.model_name_or_path} is a LambdaBERT, and a new "
                f"{self.architecture} is trained: leave it out."
            )
        super().make_model(documents)
        set_seed(self.training_args.seed)
        self.model = PEERS[self.architecture](self.model.config, self.objective.name)

    def model_card(self, *_: Any) -> str:
        return f"A {self.architecture}, pretrained by `benchmarks.pretrain_peer` for comparison with a LambdaBERT.\n"

    def show(self, *_: Any) -> None:
        """Nothing: the command's own words are LambdaBERT's."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in PEERS:
        return fail(ValueError(f"architecture={name!r}; the first argument is one of {', '.join(PEERS)}."))
    # the class's name tells the runs of one output folder from another's
    run_class = type(f"PeerPretraining of {name}", (PeerPretraining,), {"architecture": name})
    return run_training_command(rest, ARGUMENT_GROUPS, run_class)


if __name__ == "__main__":
    sys.exit(main())
