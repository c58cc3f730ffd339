r"""Looks inside a LambdaBERT: what its lambdas hold, as a page, figures and tables.

    python interpret_lambdas.py map "In 1914 the First World [MASK] began." --model checkpoints/wikipedia-small \
        --output war.html war.svg

`map` and `explain` show one text, `swap` compares two, `topics` finds neighbours in a file of texts, `probe` asks what
can be read from the lambdas, and `faithfulness` whether explanations are true to the model. Each has `--help`. The name
of an output says what it is: .html a page, .svg or .png a figure, .json all numbers. An output that exists is an error.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lambdabert.command_line import Parser, run_command
from lambdabert.interpretation import (
    Explanation,
    chance,
    faithfulness,
    masked_examples,
    neighbours,
    probe_task,
    read_task,
    save_html,
    swap_effects,
    task_features,
    topic_features,
    trace_lambdas,
)
from lambdabert.interpretation.figures import draw_contributions, draw_maps, draw_probes, save_figure
from lambdabert.interpretation.intervals import FEWEST_GROUPS
from lambdabert.interpretation.loading import LoadedModel, read_texts
from lambdabert.interpretation.page import PARTS_OF_LAYER
from lambdabert.interpretation.tasks import check_probes

FIGURES = (".svg", ".png")
PACKAGES = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}  # by module
SHAPE = ("num_hidden_layers", "hidden_size", "num_lambda_queries", "key_depth", "intra_depth", "local_context_size")
NEIGHBOURS = 5
FAITHFULNESS_TOKENS = 128  # of a text; longer ones are cut
DRAWN_CELLS = 600_000  # of all maps in a figure: half a minute


def build_parser() -> Parser:
    parser = Parser(
        prog="interpret_lambdas.py",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.partition("\n")[2],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, run: Any, what: str, ends: Sequence[str], needs: Sequence[str] = ()) -> Parser:
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(run=run, ends=ends, needs=needs)
        command.add_argument("--model", required=True, help="A saved LambdaBERT: a folder or a hub name.")
        command.add_argument(
            "--output",
            nargs="+",
            default=[],
            metavar="FILE",
            help=f"Files to write, by the end of their names: {', '.join(ends)}. None may exist.",
        )
        return command

    command = add("map", run_map, "Draw the maps of a text, as a page and figures.", (".html", *FIGURES))
    what = (
        "The text, in quotes; with one [MASK], its prediction is explained. Models of classes, of answers and of "
        "sentence pairs take two texts, too."
    )
    command.add_argument("text", nargs="*", help=what)
    command.add_argument("--layers", type=int, nargs="+", help="Layers in a figure, from 0; all if not given.")
    what = "Attribute the prediction of a masked token, a class, a label or an answer to the tokens of the input."
    command = add("explain", run_explain, what, (".html", *FIGURES, ".json"))
    what = (
        "The text, in quotes, with one [MASK] unless the model classifies; for a classifier or pretraining model of "
        "pairs both texts, for answers the question and the text."
    )
    command.add_argument("text", nargs="*", help=what)
    what = "The token or class that is explained, the likeliest if not given; for answers, start (as given) or end."
    command.add_argument("--target", help=what)
    what = "Number of the token whose label is explained; for an answer, of its start or end (default: the likeliest)."
    command.add_argument("--place", type=int, help=what)
    command = add("swap", run_swap, "What changes when two texts exchange their content lambdas (λc).", (".json",))
    command.add_argument("texts", nargs="*", metavar="text", help="Two texts, each in quotes.")
    command = add(
        "topics", run_topics, "Nearest neighbours of each text in a file, by content lambda (λc).", (".json",)
    )
    command.add_argument("file", help="One text a line; or a .tsv with the columns text and, where known, topic.")
    command.add_argument(
        "--neighbours",
        type=int,
        help=f"Neighbours of each text (default: {NEIGHBOURS}, or all others if there are fewer).",
    )
    what = "What linear probes read from content lambdas (λc), beside what these must beat."
    command = add("probe", run_probe, what, (*FIGURES, ".json"), ["sklearn"])
    command.add_argument("tasks", nargs="+", help="Tasks: .tsv files with the columns split, label, text and target.")
    what = "Whether attributions agree with what happens when tokens are masked."
    command = add("faithfulness", run_faithfulness, what, (".json",))
    command.add_argument("file", help="Sentences, one a line; one of the first 128 tokens of each is masked.")
    return parser


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses what could not be written, before anything is computed.

    Raises:
        ValueError: an unknown kind, a file that exists, a folder that does not, a package that is missing.
    """
    for name in args.output:
        file = Path(name)
        if file.suffix not in args.ends:
            raise ValueError(
                f"output={name}: {args.command} writes {', '.join(args.ends)}; its name must end in one of these."
            )
        if file.exists():
            raise ValueError(f"output={name} exists and is not overwritten; name another or remove it.")
        if not file.parent.is_dir():
            raise ValueError(f"output={name}: the folder {file.parent} does not exist; make it.")
    if repeated := [name for name in args.output if args.output.count(name) > 1]:
        raise ValueError(f"output={repeated[0]} is named twice; name each file once.")
    needs = [*args.needs, *(["matplotlib"] if ends_in(args, FIGURES) else [])]
    if missing := [PACKAGES[module] for module in needs if find_spec(module) is None]:
        raise ValueError(f"{' and '.join(missing)} is not installed: pip install {' '.join(missing)}")


def ends_in(args: argparse.Namespace, ends: Sequence[str]) -> list[str]:
    """The outputs of a kind."""
    return [name for name in args.output if Path(name).suffix in ends]


def check_count(texts: Sequence[str], count: int, command: str) -> None:
    if len(texts) != count:
        raise ValueError(
            f"text: {len(texts)} given, and {command} takes {'one' if count == 1 else 'two'}; put "
            f"{'it' if count == 1 else 'each'} in quotes."
        )


def encode_given(args: argparse.Namespace, loaded: LoadedModel) -> Any:
    """The text, or two, that the command was given: a question and its text, or a pair of texts, are one row."""
    if loaded.answers_questions and args.command == "explain":
        check_count(args.text, 2, "explain of an answer")
    elif loaded.judges_pairs:
        check_count(args.text, 2, f"{args.command} of a next-sentence model")
    elif not (loaded.takes_pairs and len(args.text) == 2):
        check_count(args.text, 1, args.command)
    return loaded.encode_question(*args.text) if len(args.text) == 2 else loaded.encode(args.text)


def about(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, Any]:
    """What every JSON says first: model, versions, arguments."""
    hidden = ("run", "ends", "needs")
    config = loaded.model.config
    return {
        "model": {"name": loaded.name, "class": type(loaded.model).__name__}
        | {field: getattr(config, field) for field in SHAPE},
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers")},
        "arguments": {name: value for name, value in vars(args).items() if name not in hidden},
    }


def shown_about(args: argparse.Namespace, loaded: LoadedModel) -> dict[str, str]:
    """The same for the head of a page."""
    said = about(args, loaded)
    shape = f"{said['model']['num_hidden_layers']} layers × {said['model']['hidden_size']}"
    return {
        "model": f"{loaded.name} ({said['model']['class']}, {shape})",
        "versions": ", ".join(f"{name} {number}" for name, number in said["versions"].items()),
    }


def write_json(args: argparse.Namespace, loaded: LoadedModel, results: dict[str, Any]) -> None:
    for name in ends_in(args, (".json",)):
        text = json.dumps({**about(args, loaded), **results}, indent=2, ensure_ascii=False)
        Path(name).write_text(text + "\n", encoding="utf-8")


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns: the first to the left, numbers to the right with three decimals."""
    cells = [header, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        rest = (value.rjust(width) for value, width in zip(row[1:], widths[1:]))
        print("  ".join((row[0].ljust(widths[0]), *rest)).rstrip())


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def warn_of_few(count: int, what: str, further: str = "") -> None:
    """Says on stderr that intervals rest on too few groups."""
    if count < FEWEST_GROUPS:
        print(
            f"warning: the intervals rest on {count} {what}; fewer than {FEWEST_GROUPS} are too few for them{further}.",
            file=sys.stderr,
        )


def run_map(args: argparse.Namespace) -> None:
    if not args.output:
        raise ValueError("output: map writes a page or figures; name them, for example --output page.html.")
    figures = ends_in(args, FIGURES)
    if args.layers and not figures:
        raise ValueError("layers has no effect without a figure: add one to --output, or leave it out.")
    loaded = LoadedModel(args.model)
    inputs = encode_given(args, loaded)
    trace = trace_lambdas(loaded.model, inputs)
    tokens = loaded.tokens(inputs)
    if figures:
        layers = args.layers or range(len(trace.layers))
        parts = 3 if trace.has_repetition else 2
        cells = parts * len(layers) * trace.layers[0].queries.shape[2] * len(tokens) ** 2
        if cells > DRAWN_CELLS:
            raise ValueError(
                f"layers: {len(layers)} with {len(tokens)} tokens make a figure of {cells} cells, above {DRAWN_CELLS}; "
                "name fewer by --layers, shorten the text, or write a page alone."
            )
        figure = draw_maps(trace, tokens, args.layers)
        for name in figures:
            save_figure(figure, name)
    prediction = loaded.explain(inputs, trace, gradients=False) if loaded.can_explain(inputs) else None
    for name in ends_in(args, (".html",)):
        save_html(trace, tokens, name, prediction=prediction, about=shown_about(args, loaded))


def run_explain(args: argparse.Namespace) -> None:
    loaded = LoadedModel(args.model)
    inputs = encode_given(args, loaded)
    trace = trace_lambdas(loaded.model, inputs)
    prediction = loaded.explain(inputs, trace, args.target, args.place)
    tokens = loaded.tokens(inputs)
    ways = prediction.ways()
    print(prediction.of)
    columns = [way.tokens[0].tolist() for way in ways.values()]
    print_table(("token", *ways), [*zip(tokens, *columns), ("bias", *(way.bias[0].item() for way in ways.values()))])
    for name in ends_in(args, (".html",)):
        save_html(trace, tokens, name, prediction=prediction, about=shown_about(args, loaded))
    for name in ends_in(args, FIGURES):
        save_figure(draw_contributions(tokens, ways, prediction.of), name)
    results: dict[str, Any] = {
        "prediction": prediction.of,
        "likeliest": [{"name": name, "probability": probability} for name, probability in prediction.likeliest],
        "tokens": tokens,
    }
    for name, way in ways.items():
        results[name] = {"tokens": way.tokens[0].tolist(), "bias": way.bias[0].item(), "logit": way.logit[0].item()}
        if isinstance(way, Explanation):
            parts = ({part: getattr(layer, part)[0].tolist() for part in PARTS_OF_LAYER} for layer in way.layers)
            results[name]["layers"] = list(parts)
    write_json(args, loaded, results)


def run_swap(args: argparse.Namespace) -> None:
    check_count(args.texts, 2, "swap")
    loaded = LoadedModel(args.model)
    pair = [loaded.encode([text]) for text in args.texts]
    results: list[dict[str, Any]] = []
    for inputs, other, text in zip(pair, reversed(pair), args.texts):
        masks = loaded.masks(inputs) if loaded.predicts_tokens else []
        own = loaded.likeliest_tokens(inputs, masks)
        effects = swap_effects(loaded.model, inputs, other, masks, loaded.predicted(inputs))
        found = [asdict(effect) for effect in effects]
        for effect in found:
            effect["likeliest"] = [loaded.tokenizer.convert_ids_to_tokens(token) for token in effect["likeliest"]]
        results.append({"text": text, "likeliest": own, "effects": found})
        print(f"{text}: with the λc of the other text")
        print_table(
            ("layer", "cosine of both λc", "change of states", "nats", "changed", "[MASK]"),
            ([("own", None, None, None, None, " ".join(own))] if own else [])
            + [
                (
                    "all" if effect["layer"] is None else str(effect["layer"]),
                    *(effect[name] for name in ("cosine", "hidden_states", "divergence", "changed")),
                    " ".join(effect["likeliest"]),
                )
                for effect in found
            ],
        )
    write_json(args, loaded, {"texts": results})


def run_topics(args: argparse.Namespace) -> None:
    texts, topics = read_texts(args.file)
    if len(texts) < 3:
        raise ValueError(f"{args.file}: {len(texts)} texts, of which none is nearer than another; give 3 or more.")
    if len(set(texts)) == 1:
        raise ValueError(f"{args.file}: all {len(texts)} texts are the same; give texts that differ.")
    if args.neighbours is None:
        args.neighbours = min(NEIGHBOURS, len(texts) - 1)
    if not 1 <= args.neighbours < len(texts):
        raise ValueError(
            f"neighbours={args.neighbours}: {args.file} has {len(texts)} texts; give 1 ... {len(texts) - 1}."
        )
    loaded = LoadedModel(args.model)
    batches = loaded.batches(texts, "text")
    features = topic_features(loaded.model, tqdm(batches, unit="batch"))
    if alike := [name for name, rows in features.items() if torch.equal(rows, rows[:1].expand_as(rows))]:
        print(f"left out, being the same for all texts: {', '.join(alike)}", file=sys.stderr)
    found = neighbours({name: features[name] for name in features if name not in alike}, topics, args.neighbours)
    if topics is None:
        print("the nearest text for each, by their numbers from 0; blank lines do not count")
        print_table(
            ("text", *(row.row for row in found)),
            [(str(i), *(int(row.nearest[i, 0]) for row in found)) for i in range(len(texts))],
        )
    else:
        print_table(
            ("row", "nearest has the topic", "from", "to"),
            [(row.row, row.same_topic, *(row.interval or ())) for row in found]
            + [("chance", chance(topics), None, None)],
        )
        warn_of_few(len(set(topics)), "topics")
    rows = [asdict(row) | {"nearest": row.nearest.tolist(), "cosines": row.cosines.tolist()} for row in found]
    known = {} if topics is None else {"topics": topics, "chance": chance(topics)}
    write_json(args, loaded, {"texts": texts, **known, "rows": rows})


def run_probe(args: argparse.Namespace) -> None:
    tasks = [read_task(file) for file in args.tasks]
    for file, task in zip(args.tasks, tasks):
        if (same := [other for other, one in zip(args.tasks, tasks) if one.name == task.name]) != [file]:
            raise ValueError(f"tasks: {' and '.join(map(str, same))} are all named {task.name}; rename one.")
        check_probes(task, f"task={file}")
    loaded = LoadedModel(args.model)
    results = {}
    for task in tasks:
        rows = probe_task(task, task_features(loaded, task))
        results[task.name] = rows
        print(task.name)
        print_table(
            (
                "row",
                "accuracy",
                "from",
                "to",
                "selectivity",
                "bits",
                "uniform bits",
                "dimension",
                "at equal dimension",
                "encoded",
            ),
            [
                (
                    row["row"],
                    row["full"]["accuracy"],
                    *row["full"]["interval"],
                    row["full"]["selectivity"],
                    row["full"]["codelength"],
                    row["full"]["uniform codelength"],
                    row["full"]["dimension"],
                    row["equal dimension"]["accuracy"],
                    {True: "yes", False: "no", None: ""}[row["full"]["encoded"]],
                )
                for row in rows
            ],
        )
        groups = rows[0]["full"]["test groups"]
        warn_of_few(groups, f"targets of the test examples of {task.name}", ", and no row counts as encoded")
    for name in ends_in(args, FIGURES):
        save_figure(draw_probes(results), name)
    write_json(args, loaded, {"tasks": results})


def run_faithfulness(args: argparse.Namespace) -> None:
    texts, _ = read_texts(args.file)
    loaded = LoadedModel(args.model)
    if not loaded.predicts_tokens:
        raise ValueError(
            f"model={args.model} is a {type(loaded.model).__name__}; faithfulness masks tokens, so give a masked "
            "language model."
        )
    longest = min(FAITHFULNESS_TOKENS, loaded.limit or FAITHFULNESS_TOKENS)
    examples = masked_examples(loaded.tokenizer, texts, longest)
    if len(examples) < len(texts):
        print(f"{len(examples)} of {len(texts)} texts are used; the rest have fewer than 4 tokens.", file=sys.stderr)
    found = faithfulness(loaded.model, examples, loaded.tokenizer.mask_token_id)
    print_table(
        ("method", "Spearman", "from", "to", "CPU seconds"),
        [(name, row["spearman"], *row["interval"], row["processor seconds"]) for name, row in found.items()],
    )
    warn_of_few(len(examples), "texts")
    write_json(args, loaded, {"examples": len(examples), "methods": found})


def check_texts(args: argparse.Namespace) -> None:
    """Refuses texts that are not UTF-8. Raises ValueError."""
    for name in ("text", "texts", "target"):
        given = getattr(args, name, None) or []
        for text in [given] if isinstance(given, str) else given:
            if not text.isascii() and text.encode(errors="ignore").decode() != text:
                raise ValueError(f"{name}={ascii(text)} is not UTF-8; give it in that encoding.")


def run(args: argparse.Namespace) -> None:
    check_outputs(args)
    check_texts(args)
    args.run(args)
    for name in args.output:
        print(f"wrote {name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(build_parser(), argv, run)


if __name__ == "__main__":
    sys.exit(main())
