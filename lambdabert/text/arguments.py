"""Options of the commands: which text, which examples are made of it, and what is masked in them."""

from dataclasses import dataclass, field

from lambdabert.text.documents import DOCUMENT_BOUNDARIES, LINE_BREAKS
from lambdabert.text.examples import ExampleRecipe
from lambdabert.text.files import check_encoding
from lambdabert.text.objectives import MLM, NSP, OBJECTIVES, SOP, Objective

BUILT_IN_CORPORA = ("python-docs",)
DEFAULT_DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass
class CorpusArguments:
    """Which text to read, and how it falls into documents.

    Raises:
        ValueError: two sources are given, or a field holds a value that it cannot have.
    """

    _argument_group_name = "text"
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or local folder of a data set, such as wikimedia/wikipedia. "
            f"Without any source: {DEFAULT_DATASET[0]}, {DEFAULT_DATASET[1]}."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of that data set, such as 20231101.en."}
    )
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Training files, folders or glob patterns: text, CSV (.csv, .tsv), JSON (.json, .jsonl, .ndjson) "
            "or Parquet (.parquet); all but Parquet may be compressed (.bz2, .gz, .xz, .zst)."
        },
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Validation files, folders or glob patterns, of the same kinds."}
    )
    corpus: str | None = field(
        default=None,
        metadata={"help": "A corpus that needs no file: python-docs, the reference topics that every CPython carries."},
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that holds the text in data sets, CSV, JSON and Parquet; 'text' if not given. A column "
            "within another is named as in 'article.body'."
        },
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of text, CSV and JSON files, such as latin-1 or utf-16; UTF-8 if not given."},
    )
    line_breaks: str | None = field(
        default=None,
        metadata={
            "help": "What a line break in a text file is: the end of a paragraph (keep, if not given), or a space "
            "within one that ends at a blank line (join), as in books with hard-wrapped lines.",
            "choices": list(LINE_BREAKS),
        },
    )
    document_boundary: str = field(
        default="auto",
        metadata={
            "help": "What a document is: a row or line (row), the lines between blank lines (blank_line) or between "
            "gaps of several blank lines (section), or the lines from one WikiText ' = Title = ' heading to the next "
            "(heading). auto detects it and logs what it found.",
            "choices": list(DOCUMENT_BOUNDARIES),
        },
    )
    validation_split_percentage: float | None = field(
        default=None,
        metadata={
            "help": "Percentage of the training documents held out where there is no validation data; 5 if not given."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read training text while training instead of preparing it on disk."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that prepare the text; one if not given."}
    )
    data_cache_dir: str | None = field(
        default=None, metadata={"help": "Where prepared data is kept; the cache of `datasets` if not given."}
    )

    def __post_init__(self) -> None:
        for name in ("train_file", "validation_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        self._check_values()
        self._check_combinations()
        if not any((self.dataset_name, self.train_file, self.corpus, self.validation_file)):
            self.dataset_name, self.dataset_config_name = DEFAULT_DATASET

    def _check_values(self) -> None:
        choices = {
            "document_boundary": DOCUMENT_BOUNDARIES,
            "corpus": (None, *BUILT_IN_CORPORA),
            "line_breaks": (None, *LINE_BREAKS),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                known = ", ".join(filter(None, values))
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {known}.")
        for name in ("dataset_name", "train_file", "validation_file", "text_column"):
            if getattr(self, name) in ("", [], [""]):
                raise ValueError(f"{name} is given without a value: name something, or leave it out.")
        if self.encoding is not None:
            check_encoding(self.encoding)
        if self.validation_split_percentage is not None and not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"validation_split_percentage={self.validation_split_percentage} must lie between 0 and 100."
            )
        if self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1:
            raise ValueError(f"preprocessing_num_workers={self.preprocessing_num_workers} must be 1 or more.")

    def _check_combinations(self) -> None:
        sources = [name for name in ("dataset_name", "train_file", "corpus") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are both given: keep one source of training text.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(
                f"dataset_config_name={self.dataset_config_name!r} needs dataset_name: name the data set it belongs to."
            )
        if self.line_breaks == "join" and self.document_boundary == "row":
            raise ValueError(
                "line_breaks='join' contradicts document_boundary='row', which makes each line a document: leave one "
                "of them out."
            )
        if self.validation_split_percentage is not None:
            if self.validation_file:
                raise no_effect(self, "validation_split_percentage", "validation_file is given")
            if self.streaming:
                raise no_effect(self, "validation_split_percentage", "documents cannot be held out of a stream")
        if self.preprocessing_num_workers is not None and self.streaming and not self.validation_file:
            if self.train_file or self.corpus:
                raise no_effect(self, "preprocessing_num_workers", "a stream is prepared while it is read")


def no_effect(arguments: object, name: str, reason: str) -> ValueError:
    """The error of an option that cannot take effect."""
    return ValueError(f"{name}={getattr(arguments, name)!r} has no effect: {reason}. Leave it out.")


@dataclass
class TextArguments(CorpusArguments):
    """Which text to read, how long examples are, and what is masked in them.

    Raises:
        ValueError: a field holds a value that it cannot have, or two fields contradict each other.
    """

    language: str | None = field(
        default=None,
        metadata={"help": "ISO 639 code of the text's language, for finding sentences; en if not given."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longest example in tokens, special ones included."})
    mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of tokens that are to be predicted while training."}
    )
    eval_mlm_probability: float = field(
        default=0.15,
        metadata={"help": "Share of tokens to predict in evaluation; losses can be compared only where it is equal."},
    )
    mask_replace_prob: float = field(
        default=0.8, metadata={"help": "Share of the tokens to be predicted that [MASK] replaces."}
    )
    random_replace_prob: float = field(
        default=0.1, metadata={"help": "Share of the tokens to be predicted that random tokens replace."}
    )
    whole_word_mask: bool = field(
        default=False, metadata={"help": "Choose whole words to be predicted instead of tokens."}
    )
    shuffle_buffer_size: int | None = field(
        default=None,
        metadata={"help": "Examples among which a stream is shuffled (with --streaming); 10000 if not given."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many validation examples."})
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Pad each batch to a multiple of so many tokens."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mlm_probability", "eval_mlm_probability", "mask_replace_prob", "random_replace_prob"):
            self.check_share(name)
        for name in ("mlm_probability", "eval_mlm_probability"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 leaves nothing to predict: use 0.15 for example.")
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                f"mask_replace_prob={self.mask_replace_prob} and random_replace_prob={self.random_replace_prob} "
                "exceed 1 together: lower one of them."
            )
        for name in ("shuffle_buffer_size", "max_train_samples", "max_eval_samples", "pad_to_multiple_of"):
            if getattr(self, name) is not None:
                self.check_count(name)
        if self.shuffle_buffer_size is not None and not self.streaming:
            raise no_effect(self, "shuffle_buffer_size", "only a stream is shuffled in a buffer (streaming)")

    @property
    def longest_row(self) -> int:
        """Most tokens of a row of a batch, padding included."""
        multiple = self.pad_to_multiple_of or 1
        return -(-self.max_seq_length // multiple) * multiple

    def check_length(self, longest: int | None, name: str, advice: str) -> None:
        """Refuses rows that are longer than a model takes.

        Args:
            longest: what it takes, in tokens; None for any number.
            name: what that is called.
            advice: what to do.

        Raises:
            ValueError: examples, or the rows that they are padded to, are longer.
        """
        if longest is None or self.longest_row <= longest:
            return
        given = f"max_seq_length={self.max_seq_length}"
        if self.max_seq_length <= longest:
            given = f"pad_to_multiple_of={self.pad_to_multiple_of} pads rows to {self.longest_row} tokens, which"
        raise ValueError(f"{given} exceeds {name}={longest}: {advice}.")

    def check_share(self, name: str) -> None:
        if not 0 <= getattr(self, name) <= 1:
            raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1.")

    def check_count(self, name: str) -> None:
        if getattr(self, name) < 1:
            raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")

    def check_objective(self, objective: Objective) -> None:
        """Refuses a `max_seq_length` without room for text beside the special tokens, and options without effect."""
        if self.max_seq_length < objective.shortest_example:
            raise ValueError(
                f"max_seq_length={self.max_seq_length} is too small for objective={objective.name!r}, which needs "
                f"{objective.shortest_example} tokens for its special tokens and text: raise it, to 128 for example."
            )
        if objective == MLM and self.language is not None:
            raise no_effect(self, "language", "text is not cut into sentences where there are no pairs")

    def recipe(
        self, objective: Objective, *, short_seq_probability: float | None = None, dupe_factor: int = 1
    ) -> ExampleRecipe:
        """What these options make of documents."""
        if short_seq_probability is None:
            short_seq_probability = ExampleRecipe.short_seq_probability
        return ExampleRecipe(
            objective=objective,
            max_seq_length=self.max_seq_length,
            language=self.language or ExampleRecipe.language,
            short_seq_probability=short_seq_probability,
            dupe_factor=dupe_factor,
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            shuffle_buffer_size=self.shuffle_buffer_size or ExampleRecipe.shuffle_buffer_size,
            num_workers=self.preprocessing_num_workers or ExampleRecipe.num_workers,
            cache_dir=self.data_cache_dir,
        )


@dataclass
class DataArguments(TextArguments):
    """Which text to read, and how it becomes masked examples.

    Raises:
        ValueError: a field holds a value that it cannot have, or two fields contradict each other.
    """

    mlm_probability: float = field(  # 0.15 as in BERT learns more slowly (docs/results.md)
        default=0.3, metadata={"help": "Share of tokens that are to be predicted while training."}
    )
    objective: str | None = field(
        default=None,
        metadata={
            "help": "Task beside masked language modelling: next sentence prediction (nsp, if not given), sentence "
            "order prediction (sop), or none (mlm).",
            "choices": list(OBJECTIVES),
        },
    )
    sop: bool = field(default=False, metadata={"help": "The same as --objective sop."})
    short_seq_probability: float | None = field(
        default=None, metadata={"help": "Share of pairs that aim at a random shorter length; 0.1 if not given."}
    )
    dupe_factor: int = field(
        default=1, metadata={"help": "How many times each training document is paired, differently each time."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sop and self.objective not in (None, SOP.name):
            raise ValueError(f"sop=True contradicts objective={self.objective!r}: leave one of them out.")
        if self.objective is None:
            self.objective = SOP.name if self.sop else NSP.name
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is unknown: use one of {', '.join(OBJECTIVES)}.")
        self.check_objective(OBJECTIVES[self.objective])
        if self.short_seq_probability is not None:
            self.check_share("short_seq_probability")
            if self.objective == MLM.name:
                raise no_effect(self, "short_seq_probability", "only pairs are shortened, and mlm has none")
        self.check_count("dupe_factor")

    def example_recipe(self) -> ExampleRecipe:
        """What these options make of documents."""
        return self.recipe(
            OBJECTIVES[self.objective or NSP.name],
            short_seq_probability=self.short_seq_probability,
            dupe_factor=self.dupe_factor,
        )
