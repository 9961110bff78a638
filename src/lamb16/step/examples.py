"""Arguments of the step functions on which they are compiled, and others on which their code is tried."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hyper import NUMBERS
from . import update
from .blocks import PACKED_ROW, ROW, Block, Gathered, IndexMap, Inputs, Norm, Outputs, Stages, State, Sums
from .factors import FLOATS, INTEGERS
from .kinds import Graph, Kind


def random_inputs(graph: Graph, kind: Kind) -> tuple[Any, ...]:
    """Arguments whose blocks are written to where they are read; the same every time."""
    arguments = example_inputs(graph, kind)
    generator = torch.Generator().manual_seed(0)
    for x in flatten(arguments):
        if isinstance(x, Tensor):
            values = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            x.copy_(values if x.is_floating_point() else (values * 119 + 1).int())
    if graph.function not in ("inspect", "update"):
        for part in arguments:
            if isinstance(part, State):
                part.state_index.copy_(torch.arange(1, len(part.state_index) + 1))
            for stages in (part, *(part if isinstance(part, Inputs) else ())):
                if isinstance(stages, Stages):
                    for x in stages:
                        x.copy_(torch.arange(len(x)).view(x.shape) % 7)
        return arguments
    blocks, *others = arguments
    for block in blocks:
        if block.length is not None:
            block.length.fill_(PACKED_ROW - 56)
            block.start.zero_()
            block.tensor_index.zero_()
    if graph.function == "update":
        for x in others[1]:
            x.fill_(-1)
    in_place = [
        block._replace(new_p=block.p, new_m=block.m, new_v=block.v, new_remainder=block.remainder) for block in blocks
    ]
    return in_place, *others


def flatten(arguments: Any) -> list[Any]:
    """What nested lists and tuples hold, in order."""
    flat: list[Any] = []
    for x in arguments:
        if type(x) is not Tensor and isinstance(x, (list, tuple)):
            flat += flatten(x)
        else:
            flat.append(x)
    return flat


def example_inputs(graph: Graph, kind: Kind) -> tuple[Any, ...]:
    """Arguments of the right kinds, every varying size different from every other and marked dynamic."""
    device, count = kind.device, kind.reading_group if graph.function == "inspect" else kind.group
    count = 1 if graph.packed else count
    tensors, states, chunks, rows = 6, 7, 11, 3
    sizes = [rows + 2 * k for k in range(count)]
    if device.type != "cpu" and not (graph.packed or graph.global_index or kind.caution):
        # By the first tensor Inductor sees that there are many rows, and gives a row to one warp in place of eight:
        # half the instructions per element. The other forms would need more registers than a thread can have.
        sizes[0] = 1025

    def dynamic(*shape: int, dtype: torch.dtype, dims: tuple[int, ...] = (0,)) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        for dim in dims:
            torch._dynamo.mark_dynamic(tensor, dim)
        return tensor

    def row(size: int, dtype: torch.dtype, stride: int = 1) -> Tensor:
        # Not aligned: where code is generated for aligned memory, it copies what is not aligned at every call.
        return torch.zeros(size * stride + 1, dtype=dtype, device=device).as_strided((size,), (stride,), 1)

    def unaligned(size: int, dtype: torch.dtype, stride: int = 1) -> Tensor:
        tensor = row(size, dtype, stride)
        torch._dynamo.mark_dynamic(tensor, 0)
        return tensor

    def row_or_table(width: int, dtype: torch.dtype) -> Tensor:
        return dynamic(tensors, width, dtype=dtype) if graph.packed else row(width, dtype)

    def columns(size: int, number: int, dtype: torch.dtype) -> list[Tensor]:
        # Like the columns of a table, but each with memory of its own: views of one would be traced as its slices.
        return [unaligned(size, dtype, number) for _ in range(number)]

    def number(dtype: torch.dtype) -> Tensor:
        return torch.zeros((), dtype=dtype, device=device)

    def block(size: int) -> Block:
        width = PACKED_ROW if graph.packed else ROW
        p, g, m, v, *remainder = (dynamic(size, width, dtype=dtype) for dtype in kind.dtypes)
        new_p, new_m, new_v, *new = (dynamic(size, width, dtype=x.dtype) for x in (p, m, v, *remainder))
        places = [dynamic(size, dtype=torch.int64), *(dynamic(size, 1, dtype=torch.int32) for _ in range(2))]
        return Block(p, g, m, v, new_p, new_m, new_v, *(places if graph.packed else [None] * 3), *remainder, *new)

    def sums(size: int) -> Sums:
        return Sums.of(lambda: unaligned(size, torch.int32), kind.caution, kind.exact)

    if graph.function == "inspect":
        rescale = torch.zeros(2, dtype=torch.float32, device=device) if graph.squares else None
        return (
            [block(n) for n in sizes],
            [[unaligned(n, torch.int32) for _ in range(1 + (graph.squares or kind.exact))] for n in sizes],
            rescale,
        )
    if graph.function == "update":
        tables = [[row_or_table(k, x) for _ in sizes] for k, x in ((FLOATS, torch.float32), (INTEGERS, torch.int32))]
        index_maps = None
        if graph.global_index:
            index_maps = [IndexMap(row_or_table(2, torch.float64), row_or_table(2, torch.int32)) for _ in sizes]
        blocks, found = [block(n) for n in sizes], [sums(n) for n in sizes]
        return blocks, *tables, update.make_columns(device), found, index_maps, kind.rounding == "stochastic"
    float32, int32, int64 = torch.float32, torch.int32, torch.int64
    stages = Stages(
        dynamic(chunks, 1, dtype=int64), dynamic(chunks, 1, dtype=int64), dynamic(13, dtype=int64),
        dynamic(tensors, 1, dtype=int64), dynamic(tensors, 1, dtype=int64), dynamic(17, dtype=int64),
    )  # fmt: skip
    state_index = dynamic(tensors, dtype=int64)
    exact = dynamic(tensors, dtype=int32) if kind.exact else None
    gathered = Gathered(
        dynamic(tensors, dtype=int32), number(int32), torch.zeros(2, dtype=torch.float32, device=device), exact
    )
    if graph.function == "gather":
        return unaligned(19, int32), unaligned(19, int32) if kind.exact else None, stages, state_index, gathered
    if graph.function == "norm":
        limits, total = (torch.zeros(2, dtype=dtype, device=device) for dtype in (torch.float64, int64))
        result = Norm(limits, total, number(torch.float64), number(torch.float64))
        return [unaligned(19, int32) for _ in range(2)], stages, state_index, gathered, result
    table = [*columns(states, 4, float32), *columns(states, 2, int32), *columns(states, 4, int64)]
    state = State._make([*table, state_index])
    if graph.function == "scale":
        inputs = Inputs(
            unaligned(19, int32), stages, dynamic(tensors, len(NUMBERS), dtype=torch.float64),
            dynamic(tensors, dtype=torch.float64), dynamic(tensors, dtype=int32),
            number(torch.float64), number(float32), unaligned(19, int32) if kind.exact else None,
        )  # fmt: skip
        outputs = Outputs(
            columns(tensors, FLOATS, float32), columns(tensors, INTEGERS, int32), columns(tensors, 3, torch.float64),
            dynamic(tensors, dtype=torch.bool), number(int64),
        )  # fmt: skip
        return inputs, state, outputs, kind.float8
    return sums(19), stages, dynamic(tensors, dtype=torch.bool), dynamic(tensors, dtype=int64), state, kind.float8
