"""A model as a program of `torch.export`, as an ONNX file, and that in int8.

A program serves every batch size and every length up to the model's limit. The ONNX file has opset `OPSET`, the inputs
and outputs that tools for BERT expect, and all weights in it.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .loading import INPUTS, LoadedProgram

OPSET = 20  # the first with GELU as one operator; onnxruntime has it since 1.17
EXAMPLE = (2, 16)  # batch and length that a program is traced with
CHOICES = 3  # of a question, in the example
AXES = ("batch", "choices", "sequence")


def make_inputs(loaded: LoadedProgram, batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs: rows with a tail of padding and with padding in front, and a last one of padding alone.

    Half of the tokens are among a few that come again and again, [MASK] too where the config names it.

    Args:
        loaded: the model.
        batch: B.
        length: N.
        seed: of the token ids.

    Returns:
        The three inputs, [B, N] or [B, choices, N] each.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, CHOICES, length) if loaded.takes_choices else (batch, length)
    mask = torch.ones(shape, dtype=torch.long)
    if batch > 1:
        mask[0, ..., (length + 1) // 2 :] = 0
        mask[1, ..., : length // 3] = 0
    if batch > 2:
        mask[-1] = 0
    ids = torch.randint(loaded.config.vocab_size, shape, generator=generator)
    few = torch.randint(loaded.config.vocab_size, (8,), generator=generator)
    if loaded.config.mask_token_id is not None:
        few[0] = loaded.config.mask_token_id
    again = torch.rand(shape, generator=generator) < 0.5
    ids = torch.where(again, few[torch.randint(len(few), shape, generator=generator)], ids)
    types = torch.randint(loaded.config.type_vocab_size, shape, generator=generator)
    return dict(zip(INPUTS, (ids, mask, types), strict=True))


def export_program(loaded: LoadedProgram) -> torch.export.ExportedProgram:
    """The program of a model, for every batch and every length up to its limit."""
    batch, length = EXAMPLE
    example = make_inputs(loaded, batch, min(length, loaded.limit or length))
    names = AXES if loaded.takes_choices else (AXES[0], AXES[2])
    limits = {"sequence": loaded.limit}
    axes = {i: torch.export.Dim(name, max=limits.get(name)) for i, name in enumerate(names)}
    with silence(), torch.no_grad():
        return torch.export.export(loaded.program, (), example, dynamic_shapes={name: axes for name in INPUTS})


@contextmanager
def silence() -> Iterator[None]:
    """Silences the exporters' internal messages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", None)]  # onnxruntime's quantisation uses the root's
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def write_torch(loaded: LoadedProgram, file: Path) -> None:
    """Writes the program as `torch.export.load` reads it."""
    torch.export.save(export_program(loaded), file)


def write_onnx(loaded: LoadedProgram, file: Path) -> None:
    """Writes the program as an ONNX file."""
    import onnx

    program = export_program(loaded)
    outputs = list(loaded.program(**make_inputs(loaded, 1, 2)))
    with silence():
        converted: Any = torch.onnx.export(
            program,
            (),
            kwargs=program.example_inputs[1],
            input_names=list(INPUTS),
            output_names=outputs,
            opset_version=OPSET,
            verbose=False,
        )
    proto = converted.model_proto
    name_axes(proto)
    if loaded.limit is not None:
        guard_length(proto, loaded.limit)
    onnx.checker.check_model(proto)
    onnx.save(proto, file)


def name_axes(proto: Any) -> None:
    """Names the axes of inputs and outputs, in place of the exporter's symbols."""
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    names = AXES if len(shape) == 3 else (AXES[0], AXES[2])
    names_of = {axis.dim_param: name for axis, name in zip(shape, names, strict=True)}
    for value in (*proto.graph.input, *proto.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in names_of:
                axis.dim_param = names_of[axis.dim_param]
    del proto.graph.value_info[:]  # they use the symbols, and runtimes infer them anew


def guard_length(proto: Any, limit: int) -> None:
    """Makes a runtime refuse sequences above the limit, with an error that says so.

    A runtime names the operator that fails. The guard is a look-up of the length in a table of `limit` zeros, which are
    added to the inputs, and its name is the message.

    Args:
        proto: the model, changed in place.
        limit: tokens.
    """
    from onnx import helper, numpy_helper

    name = (
        f"a sequence is longer than max_position_embeddings={limit} of the exported model: shorten it (a tokenizer "
        f"does with truncation=True, max_length={limit})"
    )
    axis = len(proto.graph.input[0].type.tensor_type.shape.dim) - 1
    tables = {"guard_table": [0] * limit, "guard_one": [1]}
    for table, numbers in tables.items():
        tensor = numpy_helper.from_array(torch.tensor(numbers).numpy(), table)
        proto.graph.initializer.append(tensor)
    for node in proto.graph.node:  # all of them, so that none fails before the guard does
        node.input[:] = [f"guarded_{given}" if given in INPUTS else given for given in node.input]
    guard = [
        helper.make_node("Shape", [INPUTS[0]], ["guard_length"], start=axis, end=axis + 1),
        helper.make_node("Sub", ["guard_length", "guard_one"], ["guard_last"]),
        helper.make_node("Gather", ["guard_table", "guard_last"], ["guard_zero"], name=name),
        *(helper.make_node("Add", [given, "guard_zero"], [f"guarded_{given}"]) for given in INPUTS),
    ]
    nodes = [*guard, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def quantise(source: Path, file: Path, loaded: LoadedProgram) -> None:
    """Writes an ONNX file with the weights of its linear layers in int8, one scale for each output channel.

    Activations are quantised as they come. All else stays in float32: what is made of E and T, and a pooler or head on
    sequences, [B, D], whose product is another operator (Gemm) and costs nothing beside the layers.

    Args:
        source: the file in float32.
        file: the file to write.
        loaded: the model that `source` was made of.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = onnx.load(source)
    store_transposed(proto)
    with silence():
        quantize_dynamic(
            proto,
            file,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=linear_layers(proto, loaded.program),
        )


def store_transposed(proto: Any) -> None:
    """Stores transposed matrices that a product needs, as of the word embeddings that an MLM head shares."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    folded = [node for node in proto.graph.node if node.op_type == "Transpose" and node.input[0] in stored]
    for node in folded:
        transposed = numpy_helper.to_array(stored[node.input[0]]).T.copy()
        proto.graph.initializer.append(numpy_helper.from_array(transposed, node.output[0]))
        proto.graph.node.remove(node)


def linear_layers(proto: Any, model: torch.nn.Module) -> list[str]:
    """Names of the products with a stored matrix that has the shape of a linear layer's; T has another."""
    shapes = {tuple(layer.weight.T.shape) for layer in model.modules() if isinstance(layer, torch.nn.Linear)}
    stored = {tensor.name for tensor in proto.graph.initializer if tuple(tensor.dims) in shapes}
    return [node.name for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in stored]
