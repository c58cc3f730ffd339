"""Tokenizers as users name them: a folder, a vocabulary file or a hub name."""

from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(name: str, option: str = "tokenizer_name") -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder, a vocabulary file (one token a line) or the hub.

    A vocabulary alone does not say whether it is cased: it is taken for uncased if no token has an upper-case letter,
    those in brackets aside.

    Args:
        name: the folder, file or hub name.
        option: where the user named it.

    Raises:
        ValueError: there is no usable tokenizer, or the hub cannot be reached.
    """
    path = Path(name)
    vocabulary = path / "vocab.txt" if path.is_dir() else path
    if path.is_file() or (vocabulary.exists() and not (path / "tokenizer_config.json").exists()):
        words = read_vocabulary(vocabulary, f"{option}={name}")
        cased = any(token != token.lower() for token in words if not token.startswith("["))
        return BertTokenizer(vocab=words, do_lower_case=not cased)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # broken files raise whatever their readers stumble over
        if path.is_dir():
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{option}={name} holds no tokenizer that can be read ({said}).") from error
        advice = "name a local folder"
        if option == "tokenizer_name":
            advice = (
                "name a local one by --tokenizer_name, train one on your --train_file with --train_tokenizer, or run "
                "the demo, which needs no network: configs/demo.json"
            )
        raise ValueError(
            f"{option}={name} is not a folder, and the hub cannot be reached or does not have it; {advice}."
        ) from error


def read_vocabulary(file: Path, what: str) -> dict[str, int]:
    """Reads the tokens of a WordPiece vocabulary, one a line: {token: id}.

    Args:
        file: the vocabulary.
        what: how messages name it.

    Raises:
        ValueError: the file is not a vocabulary of BERT.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{what}: {file} is not a text file; name a vocabulary, one token a line.") from None
    tokens = [line.rstrip("\r") for line in lines]
    while tokens and not tokens[-1]:
        tokens.pop()
    if "" in tokens:
        line = tokens.index("") + 1
        raise ValueError(f"{what}: line {line} of {file} is blank, but each line stands for one embedding; fill it.")
    words = {token: i for i, token in enumerate(tokens)}
    missing = [token for token in SPECIAL_TOKENS if token not in words]
    if missing:
        raise ValueError(
            f"{what}: {file} has no line {', '.join(missing)}, so it is not a vocabulary of BERT, one token a line; "
            "name another (a tokenizer.json is named by its folder)."
        )
    if len(words) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if words[token] != i)
        raise ValueError(f"{what}: {file} holds the token {twice!r} twice; each stands for one embedding.")
    return words
