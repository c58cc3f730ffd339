"""Whether an exported program computes what the model does, on batches that it was not traced with."""

from collections.abc import Callable
from pathlib import Path

import torch

from .loading import LoadedProgram
from .programs import make_inputs

SHAPES = ((1, 1), (2, 7), (3, 65), (5, 130), (2, 300))  # batch and length; longer ones are cut to the limit
# largest deviation of an output, over its norm: (sum of squares)^½
TOLERANCES = {"float32": 1e-5, "int8": 0.25}

Call = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def onnx_call(file: Path) -> Call:
    """An ONNX file as a function of inputs by name, in onnxruntime on the CPU."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    # threads that go on spinning after a call take the processor from what is called next
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def call(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(output) for name, output in zip(names, found, strict=True)}

    return call


def torch_call(file: Path) -> Call:
    """A program that `torch.export` saved as a function of inputs by name."""
    module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


def largest_deviation(loaded: LoadedProgram, call: Call) -> tuple[tuple[str, ...], float]:
    """Names of the outputs, and the largest deviation of one in any batch, over the norm of what PyTorch computes.

    Raises:
        ValueError: outputs have other names or shapes, or are not finite.
    """
    deviations, names = [], ()
    for seed, (batch, length) in enumerate(SHAPES, 1):
        inputs = make_inputs(loaded, batch, min(length, loaded.limit or length), seed)
        with torch.inference_mode():
            expected = loaded.program(**inputs)
            try:
                actual = call(inputs)
            except Exception as error:  # a runtime raises what it likes
                raise ValueError(f"the exported program fails at batch {batch} and length {length}: {error}") from error
        names = tuple(expected)
        if tuple(actual) != names:
            raise ValueError(f"the exported program gives {', '.join(actual)} in place of {', '.join(names)}.")
        for name, wanted in expected.items():
            found = actual[name]
            # the rest: -inf of max pooling where a text has no tokens, finfo.min where no answer may start or end
            finite = wanted.isfinite() & (wanted > torch.finfo(wanted.dtype).min)
            has_numbers = found.shape == wanted.shape and bool(found[finite].isfinite().all())
            if not has_numbers or not (found[~finite] == wanted[~finite]).all():
                raise ValueError(
                    f"{name} of the exported program is {list(found.shape)} and of the model {list(wanted.shape)} at "
                    f"batch {batch} and length {length}, or holds numbers that are not finite."
                )
            found, wanted = found[finite].double(), wanted[finite].double()
            norm = wanted.norm().clamp(min=torch.finfo(torch.float32).tiny)
            deviations.append(((found - wanted).norm() / norm).item())
    return names, max(deviations)
