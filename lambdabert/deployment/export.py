"""An export from start to end: what is refused, the files, the check, and a folder that is whole or not there."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from .checks import TOLERANCES, Call, largest_deviation, onnx_call, torch_call
from .loading import INPUTS, LoadedProgram, load_program
from .programs import quantise, write_onnx, write_torch

PACKAGES: dict[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}


@dataclass(frozen=True)
class Format:
    """A kind of exported program.

    Attributes:
        file: its name in the output folder.
        write: writes it.
        call: reads it back as a function.
        quantisations: what `quantize` may be.
    """

    file: str
    write: Callable[[LoadedProgram, Path], None]
    call: Callable[[Path], Call]
    quantisations: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format("model.onnx", write_onnx, onnx_call, ("int8",)),
    "torch": Format("model.pt2", write_torch, torch_call),
}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        file: the program.
        outputs: names of its outputs.
        deviation: the largest from PyTorch, over the norm of an output.
        tolerance: up to which it would have been accepted.
        limit: the most tokens of a sequence; None = any number.
    """

    file: Path
    outputs: tuple[str, ...]
    deviation: float
    tolerance: float
    limit: int | None


def export_model(model: str | Path, output: str | Path, format: str = "onnx", quantize: str | None = None) -> Export:
    """Exports a saved LambdaBERT, with its tokenizer and config beside the program, and checks it against PyTorch.

    Weights stored in half precision are exported in float32. Nothing is left behind where export or check fails.

    Args:
        model: the folder of a LambdaBERT, or of a sentence-transformers model of one.
        output: the folder to write; it must be new or empty.
        format: "onnx", or "torch" for a program of `torch.export`.
        quantize: "int8" for linear layers with weights and activations of 8 bits; None for float32.

    Raises:
        ValueError: an unknown format or quantisation, a package that is missing, a folder that is not a LambdaBERT's,
            an output that exists, or a program that does not compute what the model does.
    """
    output = Path(output)
    check_request(format, quantize)
    check_output(output)
    kind, tolerance = FORMATS[format], TOLERANCES[quantize or "float32"]
    loaded = load_program(Path(model))
    target = output.resolve()  # of a link, the folder behind it
    parent = next(path for path in target.parents if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as work:
        folder = Path(work) / "export"
        folder.mkdir()
        write_program(loaded, kind, folder / kind.file, quantize)
        outputs, deviation = largest_deviation(loaded, kind.call(folder / kind.file))
        if not deviation <= tolerance:
            raise ValueError(
                f"model={model}: the exported program deviates by {deviation:.2g} of the norm of an output from "
                f"PyTorch, above the tolerance of {tolerance:g}; nothing was written."
                + (" Export it without quantize." if quantize else "")
            )
        write_companions(loaded, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, target)
    return Export(output / kind.file, outputs, deviation, tolerance, loaded.limit)


def check_request(format: str, quantize: str | None) -> None:
    """Refuses a format or quantisation that does not exist, and packages that are missing.

    Raises:
        ValueError: the format or the quantisation is unknown, or a package is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format} is unknown; use one of {', '.join(FORMATS)}.")
    if quantize is not None and quantize not in FORMATS[format].quantisations:
        ways = [f"format={name} with quantize={way}" for name, kind in FORMATS.items() for way in kind.quantisations]
        raise ValueError(f"quantize={quantize} is not possible with format={format}; use {' or '.join(ways)}.")
    if any(find_spec(package) is None for package in PACKAGES[format]):
        missing = [package for package in PACKAGES[format] if find_spec(package) is None]
        raise ValueError(f"{' and '.join(missing)} is not installed: pip install {' '.join(PACKAGES[format])}")


def check_output(output: Path) -> None:
    """Refuses a folder that holds something or cannot be made.

    Raises:
        ValueError: the folder holds something, is the current one or cannot be made.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={output} exists and is not overwritten; name a new folder or empty this one.")
    if output.resolve() == Path.cwd():
        raise ValueError(f"output={output} is the current folder, which cannot be replaced; name a new one in it.")
    if output.is_mount():
        raise ValueError(f"output={output} is a mounted folder, which cannot be replaced; name a new one in it.")
    nearest = next(path for path in output.resolve().parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"output={output} cannot be written, because you may not write into {nearest}; name another.")


def write_program(loaded: LoadedProgram, kind: Format, file: Path, quantize: str | None) -> None:
    """Writes the program alone."""
    if quantize is None:
        kind.write(loaded, file)
        return
    exact = file.with_stem("exact")
    kind.write(loaded, exact)
    quantise(exact, file, loaded)
    exact.unlink()


def write_companions(loaded: LoadedProgram, folder: Path) -> None:
    """Writes config and tokenizer, which cuts texts to the limit and gives all inputs."""
    loaded.config.save_pretrained(folder)
    if loaded.tokenizer is None:
        return
    loaded.tokenizer.model_max_length = min(loaded.tokenizer.model_max_length, loaded.limit or VERY_LARGE_INTEGER)
    loaded.tokenizer.model_input_names = list(INPUTS)
    loaded.tokenizer.save_pretrained(folder)
