"""One timed call of a model: its inputs, its seconds, and its peak memory in a process of its own."""

import gc
import multiprocessing
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from benchmarks.encoders import ROWS, VOCABULARY, split_name

R = TypeVar("R")

MIXED_ROWS = 32
MASKED_SHARE = 0.15


@dataclass
class Cell:
    """One measurement: a row of a part at a length.

    Attributes:
        part: "forward", "train" or "mixed".
        row: name of a model and its variations.
        length: of the longest sequence, in tokens.
        layers: of the model.
        tokens: in a batch, or one sequence if that is longer.
        dtype: "float32" or "bfloat16".
        device: "cpu" or "cuda".
    """

    part: str
    row: str
    length: int
    layers: int
    tokens: int
    dtype: str
    device: str


class Call:
    """A model and its inputs, ready to be run again and again.

    Args:
        cell: what to measure.
    """

    def __init__(self, cell: Cell):
        name, variations = split_name(cell.row)
        self.training = cell.part == "train"
        torch.manual_seed(0)
        self.device = torch.device(cell.device)
        dtype = getattr(torch, cell.dtype)
        # a training step keeps float32 weights, and half precision is autocast
        weights_dtype = torch.float32 if self.training else dtype
        self.autocast = torch.autocast(self.device.type, dtype=dtype, enabled=weights_dtype != dtype)
        with self.device:
            model = ROWS[name].build(cell.layers, cell.length, self.training)
        self.model = model.to(weights_dtype).train(self.training)
        if "int8" in variations:
            with warnings.catch_warnings(action="ignore"):  # it will move to torchao
                self.model = torch.ao.quantization.quantize_dynamic(self.model, {nn.Linear}, dtype=torch.qint8)
        self.run = torch.compile(self.model) if "compiled" in variations else self.model
        self.inputs = {name: tensor.to(self.device) for name, tensor in self._inputs(cell, variations).items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters()) if self.training else None

    @staticmethod
    def _inputs(cell: Cell, variations: set[str]) -> dict[str, torch.Tensor]:
        if cell.part == "mixed":
            if "full" in variations:
                return {"input_ids": random_tokens(int(mixed_lengths(cell.length).sum()) // cell.length, cell.length)}
            ids, mask = mixed_batch(cell.length)
            return {"input_ids": ids, "attention_mask": mask}
        batch = max(1, cell.tokens // cell.length)
        inputs = {"input_ids": random_tokens(batch, cell.length)}
        if cell.part == "train":
            masked = torch.rand(batch, cell.length) < MASKED_SHARE
            inputs["labels"] = torch.where(masked, inputs["input_ids"], -100)
            inputs["next_sentence_label"] = torch.randint(0, 2, (batch,))
            inputs["num_items_in_batch"] = masked.sum()
        return inputs

    @property
    def real_tokens(self) -> int:
        """Tokens of the batch without padding."""
        mask = self.inputs.get("attention_mask")
        return int(self.inputs["input_ids"].numel() if mask is None else mask.sum())

    def __call__(self) -> None:
        """One evaluation, or one training step."""
        if self.optimizer is None:
            with torch.inference_mode():
                self.run(**self.inputs)
            return
        with self.autocast:
            loss = self.run(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Seconds of one call, all of it done."""
        self.synchronize()
        start = time.perf_counter()
        self()
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def random_tokens(batch: int, length: int) -> torch.Tensor:
    """Token ids [batch, length], without special tokens."""
    return torch.randint(5, VOCABULARY, (batch, length))


def mixed_lengths(longest: int) -> torch.Tensor:
    """`MIXED_ROWS` lengths whose sum is a multiple of the longest, which comes first; their mean is a quarter of it."""
    generator = torch.Generator().manual_seed(0)
    # the smallest of three uniform draws is distributed as Beta(1, 3)
    draws = torch.rand(MIXED_ROWS - 1, 3, generator=generator).amin(dim=1)
    rest = (MIXED_ROWS // 4 - 1) * longest
    lengths = (draws * rest / draws.sum()).round().long().clamp(1, longest)
    lengths[lengths.argmax()] += rest - lengths.sum()
    return torch.cat([torch.tensor([longest]), lengths])


def mixed_batch(longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, 0 in the padding, and attention mask of rows of `mixed_lengths`, [rows, longest] each."""
    mask = (torch.arange(longest) < mixed_lengths(longest)[:, None]).long()
    return random_tokens(*mask.shape) * mask, mask


def peak_memory_on_gpu(cell: Cell) -> int:
    """Peak memory of one call in bytes that are allocated on the GPU, with the model and its optimizer."""
    a_product = torch.ones(8, 8, device="cuda", dtype=getattr(torch, cell.dtype))
    a_product @ a_product  # allocates the workspace of all products, which stays
    before = torch.cuda.memory_allocated()
    call = Call(cell)
    call()  # the first training step makes the optimizer's states
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def peak_memory(cell: Cell, threads: int) -> int | None:
    """Peak memory of one call on a CPU in bytes, with the model; for a process of its own."""
    torch.set_num_threads(threads)
    imports = _resident("VmRSS")
    if imports is None:
        return None
    call = Call(cell)
    for _ in range(2 if call.training else 1):  # the first training step makes the optimizer's states
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        call()
    peak = _resident("VmHWM")
    return None if peak is None else peak - imports


def _resident(field: str) -> int | None:
    """A field of Linux's account of this process's memory, in bytes; None on other systems."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(cell: Cell, threads: int) -> int | None:
    """Peak memory of one call with its model, in bytes; on a CPU in a fresh process."""
    if cell.device == "cuda":
        return peak_memory_on_gpu(cell)
    return in_new_process(peak_memory, cell, threads)


def in_new_process(function: Callable[..., R], *arguments: Any) -> R:
    """What a function of a module returns in a process of its own."""
    # processes of a fork server start with the imports done and no thread pool that a fork would break
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)
