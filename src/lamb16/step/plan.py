"""How a list of parameters becomes blocks and tables for the step functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks.tensors import check_sizes
from ..codes import REMAINDER
from ..moments import MOMENTS, dtypes, raw
from ..remainder import has_remainder
from ..sharding.layout import layout, local, sharding_of
from ..store import Store, addresses
from ..wrapped import PLAIN
from . import factors, update
from .blocks import PACKED_ROW, ROW, Block, IndexMap, Inputs, Outputs, Stages, Sums, in_place
from .compiled import Executor
from .factors import FLOATS, INTEGERS
from .fp8 import as_int32
from .kinds import Graph, Kind
from .packing import Packing, memory
from .rows import Rows, cut
from .tables import HyperTable, Shards, needs_index_map

BATCH = 64  # packed rows that are stepped together, at least


def graphs_of(kind: Kind, params: Sequence[Tensor], clip: bool) -> list[Graph]:
    """The graphs of a step over these parameters; ValueError for a tensor that is too large for them."""
    shards = [local(p) for p in params]
    large, packed_rows = cut([x.numel() for x in shards])
    if kind.device.type != "cpu":
        check_sizes([shards[i].shape for i, rows in large if rows * ROW >= 1 << 31])
    mapped = any(needs_index_map(layout(p)) for p in params)
    forms = [packed for packed, blocks in ((False, large), (True, packed_rows)) if blocks]
    found = [Graph("scale"), Graph("fold")] + [Graph("update", packed, mapped) for packed in forms]
    return found + [Graph("inspect", packed, squares=squares) for packed in forms for squares in {False, clip}]


class Plan:
    """The blocks and tables of one step over one list of parameters of one :class:`Kind`.

    The list is sorted by parameter group, so that a group is a slice of the tables. Of parameters that are sharded
    over a mesh the plan sees this rank's shards; what the ranks tell each other
    (:class:`lamb16.sharding.reduction.Reduction`) comes after :meth:`inspect` and after :meth:`update`.
    """

    def __init__(
        self,
        kind: Kind,
        params: Sequence[Tensor],
        state_indices: list[int],
        store: Store,
        groups: Sequence[tuple[dict[str, Any], int, int]],
        executor: Executor,
    ) -> None:
        self.kind, self.store, self.executor = kind, store, executor
        self.ids = list(map(id, params))
        self.params, self.moments = params, list[list[Tensor]]()  # kept during a step only
        self.plain = set(map(type, params)) <= PLAIN
        self.layouts = [layout(p) for p in params]
        self.sharded = any(x.groups for x in self.layouts)
        weights = self._weights()
        self.memory = self._memory()
        device, count = kind.device, max(len(params), 2)  # graphs are compiled for two or more of everything
        self.state_indices: list[int] = []
        self.place(state_indices)
        self.rows = Rows(kind, [w.numel() for w in weights])
        self.hyper = HyperTable(groups, count, device)
        self.shards = Shards(self.layouts, count, device)
        self._allocate(count, weights)

    def _allocate(self, count: int, weights: Sequence[Tensor]) -> None:
        device, rows = self.kind.device, self.rows

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.floats, self.integers = zeros(count, FLOATS), zeros(count, INTEGERS, dtype=torch.int32)
        self.report = zeros(count, 3, dtype=torch.float64)
        self.counted = zeros(count, dtype=torch.bool)
        self.outputs = [list(x.unbind(1)) for x in (self.floats, self.integers, self.report)]
        self.no_inf, self.one = zeros(), torch.ones((), dtype=torch.float64, device=device)
        self.columns = update.make_columns(device)

        # Results of every row, by its result index, and of every block a slice of them.
        self.largest = zeros(rows.count, dtype=torch.int32)
        self.sums = Sums.of(lambda: zeros(rows.count, dtype=torch.int32), self.kind.caution, self.kind.exact)
        self.checksum = zeros(rows.count, dtype=torch.int32) if self.kind.exact else None
        read = [self.largest] if self.checksum is None else [self.largest, self.checksum]
        self.row_read = [[x[part] for x in read] for part in rows.slices]
        self.row_sums = [self.sums.rows(part) for part in rows.slices]
        self.scaled_from = self.largest, self.checksum, rows.stages

        self.batches = self._batches(weights, zeros)
        # Zeros stay zeros: one block for all of them.
        self.padding = [in_place([zeros(2, ROW, dtype=dtype) for dtype in self.kind.dtypes])] * rows.padding
        indices = [i for i, _ in rows.large]
        self.row_floats = [self.floats[i] for i in indices] + [zeros(FLOATS)] * rows.padding
        self.row_integers = [self.integers[i] for i in indices] + [zeros(INTEGERS, dtype=torch.int32)] * rows.padding
        if self.shards.index_maps is not None:
            padded = [*indices, *[count - 1] * rows.padding]
            maps = [IndexMap(*(x[i] for x in self.shards.index_maps)) for i in padded]
            self.index_maps: list[IndexMap] | None = maps
        else:
            self.index_maps = None
        self.calls, self.readings = (
            [slice(k, k + group) for k in range(0, len(indices), group)]
            for group in (self.kind.group, self.kind.reading_group)
        )

    def _batches(self, weights: Sequence[Tensor], zeros: Callable[..., Tensor]) -> list[Batch]:
        """What is packed, on the CPU in batches of which the buffer is small beside the weights."""
        kind, rows, executor = self.kind, self.rows, self.executor
        on_cpu, seen = kind.device.type == "cpu", kind.dtypes
        most = rows.packed_count
        if on_cpu:
            elements = sum(packed.length for packed in rows.packed_rows)
            largest = max(sum(w.numel() for w in weights) // 300, elements * 3 // 5)
            most = max(BATCH, largest * seen[0].itemsize // (PACKED_ROW * sum(dtype.itemsize for dtype in seen)))
        first = [0]  # packed rows of the batches; a block has at least two
        for packed in rows.packed_rows:
            row, end = packed.row, packed.row + packed.rows
            if end - first[-1] > most and row > first[-1] + 1 and rows.packed_count - row > 1:
                first.append(row)
        ends = [*first[1:], rows.packed_count]
        parts = [slice(a, b) for a, b in zip(first, ends, strict=True)] if rows.packed_rows else []
        most = max((x.stop - x.start for x in parts), default=0)
        buffers = [zeros(most, PACKED_ROW, dtype=dtype) for dtype in seen]
        moments = dtypes(kind.float8) if on_cpu else seen[2:4]
        begin, places, found = sum(x.stop - x.start for x in rows.slices[:-1]), rows.places(kind.device), []
        for part in parts:
            block = in_place([x[: part.stop - part.start] for x in buffers], [x[part] for x in places])
            own = [k for k, packed in enumerate(rows.packed_rows) if part.start <= packed.row < part.stop]
            packed_rows = rows.packed_rows[own[0] : own[-1] + 1]
            result_indices = slice(begin + part.start, begin + part.stop)
            shapes = [weights[x.tensor_index].shape if x.start == 0 else (x.length,) for x in packed_rows]
            packing, dirty = executor.packing(packed_rows, block, shapes, moments), len(parts) > 1
            read = [x[result_indices] for x in (self.largest, self.checksum) if x is not None]
            found.append(Batch(packing, block, read, self.sums.rows(result_indices), dirty and not packing.pads))
        return found

    def place(self, state_indices: list[int]) -> None:
        """Note the states' indices, which are rows of the store."""
        if state_indices != self.state_indices:
            self.state_indices = state_indices
            padded = state_indices + [0] * (2 - len(state_indices))  # to the count of __init__
            self.state_index = torch.tensor(padded, device=self.kind.device)

    def touched(self, states: Sequence[Any]) -> list[Tensor]:
        """The parameters of which the state is missing, does not fit, was changed or is in another row."""
        there = [k for k, state in enumerate(states) if state]
        changed = self.store.changed([states[k] for k in there], [self.state_indices[k] for k in there])
        missing = [k for k, state in enumerate(states) if not state]
        return [self.params[k] for k in (*(there[k] for k in changed), *missing, *self.misfits(states))]

    def misfits(self, states: Sequence[Any]) -> list[int]:
        """Which of the states have no remainders that fit the weights, where they are to have some."""
        if not self.kind.exact:
            return []
        return [k for k, (p, x) in enumerate(zip(self.params, states, strict=True)) if x and not has_remainder(p, x)]

    def _weights(self) -> list[Tensor]:
        return list(self.params) if self.plain else [local(p) for p in self.params]

    def _memory(self) -> list[Any]:
        weights = self._weights()
        properties = Tensor.size, Tensor.stride, attrgetter("dtype")
        found = [addresses(weights), list(map(type, self.params)), *(list(map(what, weights)) for what in properties)]
        return found if self.plain else [*found, list(map(sharding_of, self.params))]

    # -- running -------------------------------------------------------------------------------------------------

    def fits(self, params: Mapping[int, Tensor]) -> bool:
        """Whether the parameters, by their ids, are still of the kinds and in the memory that this plan was made for.

        They are the plan's from now on until the end of the step.
        """
        self.params = [params[key] for key in self.ids]
        return self._memory() == self.memory

    def inspect(self, grads: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        """Read the gradients; changes no state. ``grads`` are the (local) gradients, in order, kept until the end."""
        weights = self._weights()
        contiguous = list(map(Tensor.contiguous, weights))
        self.copies = [(w, c) for w, c in zip(weights, contiguous, strict=True) if w is not c]
        moments = [list(map(itemgetter(name), states)) for name in MOMENTS]
        if not self.plain:
            moments = [list(map(local, x)) for x in moments]
        self.moments = moments
        remainders = [[local(state[REMAINDER]) for state in states]] if self.kind.exact else []
        tensors = [contiguous, list(map(Tensor.resolve_neg, map(Tensor.contiguous, grads))), *moments, *remainders]
        self.blocks = [_block(rows, [x[i] for x in tensors]) for i, rows in self.rows.large] + self.padding
        if self.kind.device.type != "cpu":
            tensors[2:4] = [list(map(raw, x)) for x in moments]
        self.tensors, self.sources = tensors, [batch.packing.sources(tensors) for batch in self.batches]
        self._inspect(self.row_read, None)

    def _inspect(self, results: list[list[Tensor]], rescale: Tensor | None) -> None:
        squares = rescale is not None
        packed = Graph("inspect", packed=True, squares=squares)
        for batch, sources in zip(self.batches, self.sources, strict=True):
            if rescale is None or len(self.batches) > 1:
                batch.pack(sources, [0, 1] if self.kind.exact else [1])
            found = batch.read if rescale is None else [batch.sums.weights, batch.sums.updates]
            self.executor.run(packed, self.kind, [batch.block], [found], rescale)
        for k in self.readings:
            self.executor.run(Graph("inspect", squares=squares), self.kind, self.blocks[k], results[k], rescale)

    @property
    def whole_largest(self) -> Tensor:
        """The bits of every tensor's max|g|, int32 [tensors]; :meth:`scale` takes them from there once this was called.

        Of shards they are to be replaced by the largest of all ranks, and the checksums, int32 [tensors], that
        ``scaled_from`` then holds by their sums.
        """
        if self.scaled_from[0] is not self.largest:
            return self.scaled_from[0]
        found = factors.largest_of(self.largest, self.rows.stages)
        checksum = None if self.checksum is None else as_int32(factors.sum_of(self.checksum, self.rows.stages))
        count = len(self.state_index)
        columns = torch.arange(2, device=self.kind.device)
        ones = torch.ones(count, 1, dtype=torch.int64, device=self.kind.device)
        each = torch.arange(count, device=self.kind.device)[:, None]
        self.scaled_from = found, checksum, Stages(each, ones, columns, each, ones, columns)
        return found

    def squared_gradients(self, rescale: Tensor) -> Tensor:
        """The sums of every tensor's squared gradients, int64 [tensors, 2]; see :func:`lamb16.step.update.inspect`."""
        high, low = self.sums.weights, self.sums.updates  # free until the update
        self._inspect([[x.weights, x.updates] for x in self.row_sums], rescale)
        return torch.stack([factors.sum_of(x, self.rows.stages) for x in (high, low)], 1)

    def scale(self, skipped: Tensor, found_inf: Tensor | None, inverse_scale: Tensor | None) -> None:
        """Factors, scales and step counts; the state is changed."""
        k = self.kind
        largest, checksum, stages = self.scaled_from
        inputs = Inputs(
            largest, stages, self.hyper.fill(), self.shards.numel, self.shards.base,
            self.one if inverse_scale is None else inverse_scale.to(k.device, torch.float64).view(()),
            self.no_inf if found_inf is None else found_inf.to(k.device, torch.float32).view(()), checksum,
        )  # fmt: skip
        outputs = Outputs(self.outputs[0], self.outputs[1], self.outputs[2], self.counted, skipped)
        self.executor.run(Graph("scale"), k, inputs, self.store.state(self.state_index), outputs, k.float8)

    def update(self) -> None:
        """The step: weights and moments are changed; then the sums that the next one needs."""
        run, mapped, stochastic = self.executor.run, self.index_maps is not None, self.kind.rounding == "stochastic"
        for k in reversed(self.calls):  # the last gradients are still in the cache
            maps = None if self.index_maps is None else self.index_maps[k]
            run(
                Graph("update", False, mapped), self.kind, self.blocks[k], self.row_floats[k], self.row_integers[k],
                self.columns, self.row_sums[k], maps, stochastic,
            )  # fmt: skip
        maps = None if self.shards.index_maps is None else [self.shards.index_maps]
        for batch, sources in zip(self.batches, self.sources, strict=True):
            operands = range(len(sources))
            batch.pack(sources, [k for k in operands if k != 1] if len(self.batches) == 1 else operands)
            run(
                Graph("update", True, mapped), self.kind, [batch.block], [self.floats], [self.integers],
                self.columns, [batch.sums], maps, stochastic,
            )  # fmt: skip
            batch.packing.unpack(sources)
        for w, c in self.copies:
            w.copy_(c)
        written = [x for k, own in enumerate(self.tensors) if k != 1 for x in own]
        written += [] if self.plain else list(self.params)
        inference = any(map(Tensor.is_inference, written))
        torch.autograd.graph.increment_version([x for x in written if not x.is_inference()] if inference else written)
        state = self.store.state(self.state_index)
        arguments = self.sums, self.rows.stages, self.counted, self.shards.first_rank, state, self.kind.float8
        run(Graph("fold"), self.kind, *arguments)
        self.store.stepped(self.state_indices, self.moments)

    @property
    def reports(self) -> Tensor:
        """Weight norm, update norm and trust ratio of every parameter in the last step, float64 [tensors, 3]."""
        return self.report[: len(self.ids)].clone()

    def drop_tensors(self) -> None:
        """Forget parameters, gradients, moments, remainders and copies of weights."""
        self.params = []
        self.blocks, self.tensors, self.sources, self.copies, self.moments = [], [], [], [], []
        self.scaled_from = self.largest, self.checksum, self.rows.stages


class Batch(NamedTuple):
    """Some of the packed tensors, and the results of their rows."""

    packing: Packing
    block: Block
    read: list[Tensor]  # what inspect finds
    sums: Sums
    dirty: bool  # whether others leave something in the padding

    def pack(self, sources: list[list[Any]], operands: Sequence[int]) -> None:
        """Copy these operands into the buffer, where the padding is 0."""
        if self.dirty:
            buffers = memory(self.block)
            torch._foreach_zero_([buffers[k] for k in operands])
        self.packing.pack(sources, operands)


def _block(rows: int, tensors: Sequence[Tensor]) -> Block:
    """The rows of a large tensor; of contiguous p, g, moments and, if there are, remainders."""
    p, g, m, v, *remainder = tensors
    return in_place([x.as_strided((rows, ROW), (ROW, 1)) for x in (p, g, raw(m), raw(v), *remainder)])
