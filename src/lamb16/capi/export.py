"""The step over a fixed list of tensors as an AOTInductor package, for programs without Python.

:class:`ExportedStep` composes the functions of ``update.py`` in one graph. A block is a large tensor, or the small
tensors of one size, copied into a row each. What crosses from one pass to the next is :func:`stored`. docs/c-api.md
describes inputs and manifest.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from lamb16 import compiled, update
from lamb16.capi.manifest import MANIFEST, PACKAGE, Shape, describe, inputs, write
from lamb16.fp8 import E4M3, E5M2
from lamb16.reference import Hyper
from lamb16.update import FACTORS, HYPER, KEEP, OFFSET, SALT, Factors, Part

SMALL = 2048  # tensors below this size are copied into a block with the others of their size
USED = len(Factors._fields)


def stored(x: Tensor) -> Tensor:
    """x unchanged, but computed once and kept in memory of its own.

    Inductor would otherwise repeat what leads to it, powers and all, for every element that it enters. It has no word
    for this; a view by strides is what it needs memory for.
    """
    return torch.as_strided(x, x.shape, x.stride())


class Block(NamedTuple):
    """Tensors of one size that are stepped together; ``first`` is the row of the first one in the tables."""

    tensors: list[int]
    numel: int
    first: int


def blocks(shapes: Sequence[Shape]) -> list[Block]:
    """Every large tensor by itself, small ones by their size; empty tensors are in none."""
    sizes = [math.prod(shape) for shape in shapes]
    members: dict[Any, list[int]] = {}
    for i, n in enumerate(sizes):
        if n:
            members.setdefault(n if n < SMALL else ("large", i), []).append(i)
    found, first = [], 0
    for tensors in members.values():
        found.append(Block(tensors, sizes[tensors[0]], first))
        first += len(tensors)
    return found


class ExportedStep(torch.nn.Module):
    """One whole step in place, with constant hyperparameters but for the learning rate."""

    def __init__(self, shapes: Sequence[Shape], hyper: Hyper) -> None:
        super().__init__()
        self.blocks = blocks(shapes)
        order = [i for block in self.blocks for i in block.tensors]
        empty = [i for i, shape in enumerate(shapes) if math.prod(shape) == 0]
        self.order = order + empty  # of the tables' rows
        values = asdict(hyper) | dict(zip(("beta1", "beta2"), hyper.betas, strict=True))
        self.constants = [float(values[name]) for name in HYPER[1:]]
        self.bound = update.inverse_bound(*hyper.betas)
        self.grad_factor = -1.0 if hyper.maximize else 1.0

    def forward(self, tensors: list[Tensor], norms: Tensor, counters: Tensor, lr: Tensor) -> tuple[()]:
        """Takes what :func:`inputs` lists; changes weights, codes, norms and step counts in place.

        ``tensors`` are param, grad, exp_avg and exp_avg_sq of the first tensor, then of the next.
        """
        count, device = len(self.order), lr.device

        def full(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.full((count,), value, dtype=dtype, device=device)

        def columns(number: int, dtype: torch.dtype) -> list[Tensor]:
            return [full(0, dtype) for _ in range(number)]

        home = torch.tensor(self.order, device=device)
        hyper = torch.stack([lr.expand(count), *map(full, self.constants)], 1)
        bound = full(self.bound)
        norm_columns, counter_columns = ([x.clone() for x in table.unbind(1)] for table in (norms, counters))
        old_m, old_v = (x[home] for x in norm_columns)
        moving = update.factors(hyper, bound, old_m, old_v, counter_columns[0][home])
        carry = [*moving, full(self.grad_factor, torch.float32), *columns(FACTORS - 10, torch.float32)]
        first_factors = stored(torch.stack(carry, 1))

        parts = [_block(tensors, block) for block in self.blocks]
        measured = [_measure(part, block, first_factors) for part, block in zip(parts, self.blocks, strict=True)]
        peaks, sums = _results(measured, count - sum(len(block.tensors) for block in self.blocks), device)

        table, rounding = columns(FACTORS, torch.float32), columns(4, torch.int32)
        update.scale(
            peaks, sums, torch.arange(count, device=device)[:, None], norm_columns, counter_columns, home, hyper, bound,
            torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device), carry, table, rounding,
            columns(3, torch.float64), True,
        )  # fmt: skip
        last_factors, last_rounding = stored(torch.stack(table, 1)), stored(torch.stack(rounding, 1))

        for part, block in zip(parts, self.blocks, strict=True):
            _apply(part, block, last_factors, last_rounding)
            _write_back(tensors, part, block)
        norms.copy_(torch.stack(norm_columns, 1))
        counters.copy_(torch.stack(counter_columns, 1))
        return ()  # None would be an output


def _block(tensors: list[Tensor], block: Block) -> Part:
    """p, g and codes of a block, [tensors, elements]; of a single tensor its own memory."""
    found = [[tensors[4 * i + k].view(1, -1) for i in block.tensors] for k in range(4)]
    p, g, m, v = (x[0] if len(x) == 1 else stored(torch.cat(x)) for x in found)
    return p, g, m, v


def _rows(table: Tensor, block: Block, used: int) -> list[Tensor]:
    """The first columns of a block's rows of a table, each [tensors, 1].

    The rows are copied: blocks of equal size then differ in addresses only, and share a kernel.
    """
    rows = table[block.first : block.first + len(block.tensors), :used]
    own = stored(torch.cat([rows, torch.zeros_like(rows[:, :1])], 1))
    return [own[:, k : k + 1] for k in range(used)]


def _measure(part: Part, block: Block, factors: Tensor) -> list[Tensor]:
    """The two peaks and two sums of every tensor of a block, four of [tensors]."""
    a, b, c, d = update.measure_block(*part, Factors(*_rows(factors, block, USED)))
    return [stored(x) for x in (a.amax(1), b.amax(1), c.sum(1), d.sum(1))]


def _results(measured: list[list[Tensor]], empty: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """All blocks' peaks and sums one after the other; those of empty tensors are 0."""
    dtypes = (torch.int32, torch.int32, torch.float64, torch.float64)
    nothing = [[torch.zeros(empty, dtype=dtype, device=device)] if empty else [] for dtype in dtypes]
    a, b, c, d = (stored(torch.cat([x[k] for x in measured] + nothing[k])) for k in range(4))
    return [a, b], [c, d]


def _apply(part: Part, block: Block, factors: Tensor, rounding: Tensor) -> None:
    """The second pass over a block, in place."""
    offset, salt, keep = (_rows(rounding, block, 3)[k] for k in (OFFSET, SALT, KEEP))
    index = torch.arange(block.numel, dtype=torch.int32, device=salt.device) + salt
    update.write_block(part, Factors(*_rows(factors, block, USED)), index, offset, keep.expand(index.shape))


def _write_back(tensors: list[Tensor], part: Part, block: Block) -> None:
    """Copy weights and codes of a block of small tensors to where they came from."""
    if len(block.tensors) == 1:
        return
    for k in (0, 2, 3):
        rows = stored(part[k])
        for i, row in zip(block.tensors, rows, strict=True):
            tensors[4 * i + k].view(-1).copy_(row)


def first_inputs(shapes: Sequence[Shape], device: torch.device) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Inputs for a first step: weights, gradients and codes 0, the smallest scales, salts 0."""
    made = [torch.zeros(x.shape, dtype=x.dtype, device=device) for x in inputs(shapes)]
    norms, counters, lr = made[-3:]
    norms += torch.tensor([E4M3.smallest_scale(), E5M2.smallest_scale()], device=device)
    return made[:-3], norms, counters, lr


def inductor_options(device: torch.device, threads: int) -> dict[str, Any]:
    """What Inductor is told.

    Unlike the optimizer's graphs this one has static sizes: a loop over a few numbers need not be a parallel region,
    which code for any number of threads makes of every loop.
    """
    found = compiled.options(device)
    return found | {"cpp.dynamic_threads": False, "cpp.threads": threads} if device.type == "cpu" else found


def export(shapes: Sequence[Shape], hyper: Hyper, folder: Path, device: torch.device, threads: int) -> dict[str, Any]:
    """Compile the step over ``shapes``, write package and manifest into ``folder`` and return the manifest.

    Nothing is written there before the compiler is through. Raises whatever torch.export and Inductor do.
    """
    options = inductor_options(device, threads)
    with tempfile.TemporaryDirectory(prefix="lamb16-export-") as scratch:
        package = Path(scratch) / PACKAGE
        with torch.no_grad(), _kernels_shared():
            program = torch.export.export(ExportedStep(shapes, hyper), first_inputs(shapes, device))
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
        manifest = describe(shapes, hyper, device, options, package)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.move(package, folder / PACKAGE)
    write(manifest, folder / MANIFEST)
    return manifest


@contextlib.contextmanager
def _kernels_shared() -> Iterator[None]:
    """Let Inductor make a C++ function of each loop, so that equal ones are compiled once.

    By default one function holds as many loops as have 500 arguments together, and no two are equal. The number is
    Inductor's own; where it has another name all that is lost is time.
    """
    from torch._inductor.codegen.cpp import CppScheduling

    if not hasattr(CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM"):
        yield
        return
    with mock.patch.object(CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM", 0):
        yield
