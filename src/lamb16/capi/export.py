"""The step over a fixed list of tensors as an AOTInductor package, for programs without Python.

:class:`ExportedStep` composes the step functions in one graph. A block is a large tensor, or the small
tensors of one size, copied into a row each. What crosses from one pass to the next is :func:`stored`. docs/c-api.md
describes inputs and manifest.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

from lamb16.capi.manifest import MANIFEST, PACKAGE, Shape, Spec, describe, inputs, write
from lamb16.entries import TABLES, init_state
from lamb16.hyper import numbers_of
from lamb16.step import fp8, inductor, update
from lamb16.step.blocks import Block as StepBlock
from lamb16.step.blocks import Inputs, Outputs, Stages, State, Sums, in_place
from lamb16.step.factors import FLOATS, INTEGERS, Factors, fold, scale
from lamb16.step.floats import MAGNITUDE

SMALL = 2048  # tensors below this size are copied into a block with the others of their size


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

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.width = spec, len(spec.arrays)
        sizes = [math.prod(shape) for shape in spec.shapes]
        self.blocks = blocks(spec.shapes)
        self.order = [i for block in self.blocks for i in block.tensors]  # of the tensors in results and factors
        self.order += [i for i, n in enumerate(sizes) if n == 0]
        self.sizes = [sizes[i] for i in self.order]
        self.numbers = numbers_of(vars(spec.hyper))

    def forward(
        self, tensors: list[Tensor], scales: Tensor, counters: Tensor, sums: Tensor, lr: Tensor, grad_factor: Tensor
    ) -> tuple[()]:
        """Takes what :func:`inputs` lists; changes weights, codes, remainders and the three tables in place.

        ``tensors`` are the inputs of the first tensor, then of the next.
        """
        count, device = len(self.order), lr.device

        def columns(number: int, dtype: torch.dtype) -> list[Tensor]:
            return [torch.zeros(count, dtype=dtype, device=device) for _ in range(number)]

        def full(value: float) -> Tensor:
            return torch.full((count,), value, dtype=torch.float64, device=device)

        views = [self._block(tensors, block) for block in self.blocks]
        read = [
            [torch.zeros(len(block.tensors), dtype=torch.int32, device=device) for _ in range(1 + self.spec.exact)]
            for block in self.blocks
        ]
        update.inspect(views, read, None)
        largest, *checksums = (self._of_all(list(results)) for results in zip(*read, strict=True))

        hyper = torch.stack([lr.expand(count) if name == "lr" else full(x) for name, x in self.numbers.items()], 1)
        each = torch.arange(count, device=device)[:, None]
        one_row = Stages(each, torch.ones_like(each), each[0], each, torch.ones_like(each), each[0])
        # As in store.py a row comes before those of the tensors, for what is not to be written.
        tables = [[torch.cat([x.new_zeros(1), x]) for x in table.unbind(1)] for table in (scales, counters, sums)]
        state = State._make([x for table in tables for x in table] + [torch.tensor(self.order, device=device) + 1])
        inputs = Inputs(
            largest, one_row, hyper, torch.tensor(self.sizes, dtype=torch.float64, device=device),
            columns(1, torch.int32)[0], grad_factor.view(()), torch.zeros((), device=device), *checksums,
        )  # fmt: skip
        floats, integers = columns(FLOATS, torch.float32), columns(INTEGERS, torch.int32)
        counted, skipped = columns(1, torch.bool)[0], torch.zeros((), dtype=torch.int64, device=device)
        scale(inputs, state, Outputs(floats, integers, columns(3, torch.float64), counted, skipped), True)

        factors = stored(torch.stack(floats, 1)), stored(torch.stack(integers, 1))
        found = []
        for view, block in zip(views, self.blocks, strict=True):
            found.append(self._update(view, block, factors))
            self._write_back(tensors, view, block)
        rows = [None if x[0] is None else self._of_all(list(x)) for x in zip(*found, strict=True)]
        ones = torch.ones(count, dtype=torch.int64, device=device)
        fold(Sums._make(rows), one_row, counted, ones, state, True)
        for table, new in zip((scales, counters, sums), tables, strict=True):
            table.copy_(torch.stack([x[1:] for x in new], 1))
        return ()  # None would be an output

    def _of_all(self, results: list[Tensor]) -> Tensor:
        """All blocks' results one after the other; those of empty tensors are 0."""
        empty = self.sizes.count(0)
        return stored(torch.cat(results + [results[0].new_zeros(empty)] * (empty > 0)))

    def _block(self, tensors: list[Tensor], block: Block) -> StepBlock:
        """A block, [tensors, elements]; of a single tensor its own memory."""
        found = [[tensors[self.width * i + k].view(1, -1) for i in block.tensors] for k in range(self.width)]
        return in_place([x[0] if len(x) == 1 else stored(torch.cat(x)) for x in found])

    def _update(self, view: StepBlock, block: Block, factors: tuple[Tensor, Tensor]) -> Sums:
        """The step over a block, in place; returns its sums, of whole tensors."""
        f = Factors(*_rows(factors[0], block), *_rows(factors[1], block))
        device = f.salt.device
        words = fp8.element_words(torch.arange(block.numel, dtype=torch.int32, device=device), f.salt)
        dtypes: list[torch.dtype | None] = [torch.int32, torch.int32, torch.int64, torch.int64]
        dtypes += [torch.int64 if self.spec.hyper.caution else None, torch.int32 if self.spec.exact else None]
        found = [
            None if dtype is None else torch.zeros(len(block.tensors), dtype=dtype, device=device) for dtype in dtypes
        ]
        sums = Sums._make(found)
        magnitude = torch.full((1,), MAGNITUDE, dtype=torch.int32, device=device)
        update.update_block(view, f, words, magnitude, sums, self.spec.hyper.param_rounding == "stochastic")
        return sums

    def _write_back(self, tensors: list[Tensor], view: StepBlock, block: Block) -> None:
        """Copy what is written of a block of small tensors to where it came from."""
        if len(block.tensors) == 1:
            return
        for k, rows in ((0, view.new_p), (2, view.new_m), (3, view.new_v), (4, view.new_remainder)):
            for i, row in zip(block.tensors, () if rows is None else stored(rows), strict=rows is not None):
                tensors[self.width * i + k].view(-1).copy_(row)


def _rows(table: Tensor, block: Block) -> list[Tensor]:
    """The columns of a block's rows of a table, each [tensors, 1].

    The rows are copied: blocks of equal size then differ in addresses only, and share a kernel.
    """
    rows = table[block.first : block.first + len(block.tensors)]
    own = stored(torch.cat([rows, torch.zeros_like(rows[:, :1])], 1))
    return [own[:, k : k + 1] for k in range(table.shape[1])]


def first_inputs(spec: Spec, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs for a first step, as :meth:`ExportedStep.forward` takes them: all weights, gradients and salts 0."""
    made = [torch.zeros(x.shape, dtype=x.dtype, device=device) for x in inputs(spec)]
    *tensors, scales, counters, sums, lr, grad_factor = made
    for row, shape in enumerate(spec.shapes):
        state = init_state(torch.zeros(shape, device=device), 0, True)
        for table in (scales, counters, sums):
            table[row] = torch.stack([state[name] for name in TABLES[table.dtype]])
    return tensors, scales, counters, sums, lr, grad_factor.fill_(1)


def inductor_options(device: torch.device, threads: int) -> dict[str, Any]:
    """What Inductor is told.

    Unlike the optimizer's graphs this one has static sizes: a loop over a few numbers need not be a parallel region,
    which code for any number of threads makes of every loop.
    """
    found = inductor.options(device)
    return found | {"cpp.dynamic_threads": False, "cpp.threads": threads} if device.type == "cpu" else found


def export(spec: Spec, folder: Path, device: torch.device, threads: int) -> dict[str, Any]:
    """Compile the step, write package and manifest into ``folder`` and return the manifest.

    Nothing is written there before the compiler is through. Raises whatever torch.export and Inductor do.
    """
    options = inductor_options(device, threads)
    with tempfile.TemporaryDirectory(prefix="lamb16-export-") as scratch:
        package = Path(scratch) / PACKAGE
        # Inductor leaves what it writes into this setting, and code of the optimizer's step is kept by all settings.
        unchanged = torch._inductor.config.patch({"aot_inductor.metadata": {}})
        with torch.no_grad(), unchanged, _kernels_shared(), inductor.cpu_help(), inductor.fused_reductions():
            program = torch.export.export(ExportedStep(spec), first_inputs(spec, device))
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
        plain = {name: x for name, x in options.items() if not isinstance(x, CustomGraphPass)}
        manifest = describe(spec, device, plain, package)
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
