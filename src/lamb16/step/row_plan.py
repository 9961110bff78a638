"""Plans whose blocks are rows of tensors: how the step's compiled functions are called, or their launches recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks.tensors import check_sizes
from ..moments import raw
from ..sharding.layout import layout, local
from . import native, update
from .blocks import PACKED_ROW, ROW, Block, IndexMap, Sums, in_place
from .factors import FLOATS, INTEGERS
from .kinds import Graph, Kind
from .plan import Plan
from .recording import Place, Program
from .rows import Rows, cut
from .tables import integers, needs_index_map

BATCH = 64  # packed rows that are stepped together, at least
Call = tuple[Graph, tuple[Any, ...]]


def graphs_of(kind: Kind, params: Sequence[Tensor], clip: bool, gather: bool) -> list[Graph]:
    """The graphs of a step over these parameters; ValueError for a tensor that is too large for them."""
    shards = [local(p) for p in params]
    large, packed_rows = cut([x.numel() for x in shards])
    if kind.device.type != "cpu":
        check_sizes([shards[i].shape for i, rows in large if rows * ROW >= 1 << 31])
    mapped = any(needs_index_map(layout(p)) for p in params)
    forms = [packed for packed, blocks in ((False, large), (True, packed_rows)) if blocks]
    found = [Graph("scale"), Graph("fold"), *[Graph("gather")] * (clip or gather), *[Graph("norm")] * clip]
    found += [Graph("update", packed, mapped) for packed in forms]
    return found + [Graph("inspect", packed, squares=squares) for packed in forms for squares in {False, clip}]


class Batch(NamedTuple):
    """Some of the packed tensors: their buffer, and the results of their rows."""

    block: Block
    read: list[Tensor]  # what inspect finds
    sums: Sums
    tensors: frozenset[int]


class RowPlan(Plan):
    """A plan that runs compiled functions, by an executor or, where that is known to be the same, their launches."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        kind, count = self.kind, self.count
        self.native = kind.group == 1  # each large tensor has calls of its own
        self.rows = rows = Rows(kind, self.sizes)
        self.stages = rows.stages
        self.largest = self._zeros(rows.count, dtype=torch.int32)
        self.checksum = self._zeros(rows.count, dtype=torch.int32) if kind.exact else None
        self.sums = Sums.of(lambda: self._zeros(rows.count, dtype=torch.int32), kind.caution, kind.exact)
        self.columns = update.make_columns(kind.device)
        read = [self.largest] if self.checksum is None else [self.largest, self.checksum]
        self.row_read = [[x[part] for x in read] for part in rows.slices]
        self.row_sums = [self.sums.rows(part) for part in rows.slices]
        self.batches = self._batches()
        # The operands that are packed for inspect; the others with the update, and all where a buffer is shared.
        self.before_reading = [0, 1] if kind.exact else [1]
        done = self.before_reading if len(self.batches) < 2 else []
        self.before_update = [k for k in range(len(kind.dtypes)) if k not in done]
        self.padding = in_place([self._zeros(2, ROW, dtype=dtype) for dtype in kind.dtypes])  # zeros stay zeros
        indices = [i for i, _ in rows.large]
        floats, integers = self._zeros(FLOATS), self._zeros(INTEGERS, dtype=torch.int32)
        self.row_floats = [self.floats[i] for i in indices] + [floats] * rows.padding
        self.row_integers = [self.integers[i] for i in indices] + [integers] * rows.padding
        self.index_maps: list[IndexMap] | None = None
        if self.shards.index_maps is not None:
            padded = [*indices, *[count - 1] * rows.padding]
            self.index_maps = [IndexMap(*(x[i] for x in self.shards.index_maps)) for i in padded]
        # The addresses on the device, for what copies there, as they were sent.
        self.table = self.addresses if kind.device.type == "cpu" else self.addresses.to(kind.device)
        self.sent = self.addresses.clone()
        self.captured: list[Tensor] = []
        self.aligned, self.new_set = True, False  # else the wrapper of code for CUDA copies tensors
        self.batch_present = torch.zeros(len(self.batches), dtype=torch.int64)
        self.program: Program | None = None
        self.bound: Any = None  # what it is made for: the store's columns, and which parts are wanted

    def _batches(self) -> list[Batch]:
        """What is packed, on the CPU in batches of which the buffer is small beside the weights."""
        kind, rows = self.kind, self.rows
        most = rows.packed_count
        if kind.device.type == "cpu":
            elements = sum(packed.length for packed in rows.packed_rows)
            largest = max(sum(self.sizes) // 300, elements * 3 // 5)
            width = PACKED_ROW * sum(dtype.itemsize for dtype in kind.dtypes)
            most = max(BATCH, largest * kind.dtypes[0].itemsize // width)
        first = [0]  # packed rows of the batches; a block has at least two
        for packed in rows.packed_rows:
            row, end = packed.row, packed.row + packed.rows
            if end - first[-1] > most and row > first[-1] + 1 and rows.packed_count - row > 1:
                first.append(row)
        ends = [*first[1:], rows.packed_count]
        parts = [slice(a, b) for a, b in zip(first, ends, strict=True)] if rows.packed_rows else []
        most = max((x.stop - x.start for x in parts), default=0)
        buffers = [self._zeros(most, PACKED_ROW, dtype=dtype) for dtype in kind.dtypes]
        begin, places, found = sum(x.stop - x.start for x in rows.slices[:-1]), rows.places(kind.device), []
        for part in parts:
            block = in_place([x[: part.stop - part.start] for x in buffers], [x[part] for x in places])
            result_indices = slice(begin + part.start, begin + part.stop)
            read = [x[result_indices] for x in (self.largest, self.checksum) if x is not None]
            own = (x.tensor_index for x in rows.packed_rows if part.start <= x.row < part.stop)
            found.append(Batch(block, read, self.sums.rows(result_indices), frozenset(own)))
        return found

    # -- what is called ------------------------------------------------------------------------------------------

    def _reads(self, blocks: Sequence[tuple[int, Block]], squares: bool) -> Iterator[Call]:
        """The calls of ``inspect`` for large tensors, which are numbered as in ``rows.large``."""
        graph, rescale = Graph("inspect", squares=squares), self.found.rescale if squares else None
        for group in self._groups(blocks, self.kind.reading_group):
            results = [[x.weights, x.updates] for x in self.row_sums] if squares else self.row_read
            yield graph, ([block for _, block in group], [results[k] for k, _ in group], rescale)

    def _updates(self, blocks: Sequence[tuple[int, Block]]) -> Iterator[Call]:
        """The calls of ``update`` for large tensors."""
        graph = Graph("update", False, self.index_maps is not None)
        for group in self._groups(blocks, self.kind.group):
            own = [k for k, _ in group]
            maps = None if self.index_maps is None else [self.index_maps[k] for k in own]
            tables = [[x[k] for k in own] for x in (self.row_floats, self.row_integers)]
            sums = [self.row_sums[k] for k in own]
            own_blocks, stochastic = [block for _, block in group], self.kind.rounding == "stochastic"
            yield graph, (own_blocks, *tables, self.columns, sums, maps, stochastic)

    def _groups(self, blocks: Sequence[tuple[int, Block]], size: int) -> Iterator[list[tuple[int, Block]]]:
        first = len(self.rows.large)
        for a in range(0, len(blocks), size):
            group = list(blocks[a : a + size])
            yield group + [(first + k, self.padding) for k in range(size - len(group))]

    def _packed_read(self, batch: Batch, squares: bool) -> Call:
        results = [batch.sums.weights, batch.sums.updates] if squares else batch.read
        graph = Graph("inspect", packed=True, squares=squares)
        return graph, ([batch.block], [results], self.found.rescale if squares else None)

    def _packed_update(self, batch: Batch) -> Call:
        maps = None if self.shards.index_maps is None else [self.shards.index_maps]
        tables = [self.floats], [self.integers]
        graph = Graph("update", True, maps is not None)
        return graph, ([batch.block], *tables, self.columns, [batch.sums], maps, self.kind.rounding == "stochastic")

    # -- the step's tensors --------------------------------------------------------------------------------------

    def choose(self, present: list[int], state_indices: list[int]) -> None:
        """As in :class:`Plan`."""
        if present != self.present:
            own = set(present)
            self.batch_present.copy_(integers(not own.isdisjoint(x.tensors) for x in self.batches))
            if not self.native:
                self.bound, self.new_set = None, True
        super().choose(present, state_indices)

    def _send(self) -> None:
        """Bring what a GPU is handed up to date where addresses have changed."""
        if torch.equal(self.addresses, self.sent):
            return
        self.sent = self.addresses.clone()
        self.aligned = not (self.sent[:, [i for i, _ in self.rows.large]] & 15).any().tolist()
        if self.kind.device.type == "cuda":
            self.sent = self.sent.pin_memory()
        if self.program is not None:
            self.program.fill()
        if self.batches and self.table is not self.addresses:
            self.table.copy_(self.sent, non_blocking=True)
            if self._is_captured():
                self.captured.append(self.sent)  # a graph reads it again at every replay

    def _blocks(self) -> list[tuple[int, Block]]:
        """The blocks of those large tensors that are stepped."""
        place = {i: k for k, i in enumerate(self.present)}
        return [
            (k, in_place([raw(x[place[i]]).as_strided((rows, ROW), (ROW, 1)) for x in self.operands]))
            for k, (i, rows) in enumerate(self.rows.large)
            if i in place
        ]

    def _own_batches(self) -> list[Batch]:
        return [x for x, there in zip(self.batches, self.batch_present.tolist(), strict=True) if there]

    # -- running -------------------------------------------------------------------------------------------------

    def inspect(self) -> None:
        """As in :class:`Plan`."""
        if not self.native:
            self._send()
        self._run(["inspect"], self._inspect_once, squares=False)

    def squares(self, norm: bool) -> None:
        """As in :class:`Plan`."""
        self._run(["squares", *["norm"] * norm], self._squares_once, norm=norm)

    def _gather(self) -> None:
        """As in :class:`Plan`."""
        self._run(["gather"], self.execute, function="gather", arguments=self.gather_arguments())

    def _squares_once(self, norm: bool) -> None:
        self._inspect_once(squares=True)
        if norm:
            self.execute("norm", self.norm_arguments())

    def _inspect_once(self, squares: bool) -> None:
        for batch in self._own_batches():
            if not squares or len(self.batches) > 1:
                self.executor.copy(self.table, batch.block, self.before_reading, False)
            self._call(self._packed_read(batch, squares))
        for call in self._reads(self._blocks(), squares):
            self._call(call)

    def run(self) -> None:
        """As in :class:`Plan`."""
        self._run(["scale of whole tensors" if self.from_whole else "scale", "update"], self.run_calls)
        self.new_set = False

    @property
    def goes_back(self) -> bool:
        """As in :class:`Plan`; on a GPU that would be four launches more, where calls allocate a few KB at most."""
        return self.kind.device.type == "cpu"

    def _is_captured(self) -> bool:
        return self.kind.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @property
    def at_once(self) -> bool:
        """As in :class:`Plan`."""
        return self.program is not None and not (self.program.calls or self.copies)

    def update_calls(self, left: dict[int, int]) -> None:
        """As in :class:`Plan`. Of a tensor that has packed rows too, these are written last, which cannot fail."""
        blocks, last = self._blocks(), len(self.rows.large)
        groups = [{self.rows.large[k][0] for k, _ in x if k < last} for x in self._groups(blocks, self.kind.group)]
        calls = list(zip(self._updates(blocks), groups, strict=True))[::-1]  # the last gradients are still in the cache
        batches = self._own_batches()
        for batch in batches:
            self.executor.copy(self.table, batch.block, self.before_update, False)
            self._call(self._packed_update(batch))
            now = [batch is batches[-1] or not tensors.isdisjoint(batch.tensors) for _, tensors in calls]
            own, calls = [[x for x, there in zip(calls, now, strict=True) if there is k] for k in (True, False)]
            missing = set().union(*(tensors for _, tensors in own))
            try:
                for call, tensors in own:
                    self._call(call)
                    missing -= tensors
            finally:
                if missing:
                    self.table[:, list(missing)], self.sent = 0, torch.zeros_like(self.addresses)
                self.executor.copy(self.table, batch.block, range(len(self.kind.dtypes)), True)
                for i in batch.tensors.union(*(tensors for _, tensors in own)) - missing:
                    left.pop(i, None)
        for call, tensors in calls:
            self._call(call)
            for i in tensors:
                left.pop(i, None)

    def _call(self, call: Call) -> None:
        graph, arguments = call
        self.executor.run(graph, self.kind, *arguments)

    def _run(self, parts: list[str], otherwise: Callable[..., None], **options: Any) -> None:
        """Parts of the recorded step, or, where nothing is recorded, what does the same.

        On CUDA a program is made for a set of gradients when it comes again, and none is captured in a graph.
        """
        if self.new_set or self._is_captured() or not self.aligned:
            otherwise(**options)
            return
        wanted = self.clips, self.gathers
        if self.bound is None or self.bound[0] is not self.store.columns or self.bound[1] != wanted:
            self.program, self.bound = self._recorded(), (self.store.columns, wanted)
        if self.program is None:
            otherwise(**options)
        else:
            self.program.run(*parts)

    # -- recording -----------------------------------------------------------------------------------------------

    def _recorded(self) -> Program | None:
        """All parts of the step as launches; None where some are not known.

        On the CPU a launch looks by itself whether its tensor has a gradient; on CUDA, where one is for many tensors,
        the program is made for those that have.
        """
        record = getattr(self.executor, "record", None)
        if record is None:
            return None
        program, begin = Program(self.kind.device), self.addresses.data_ptr()

        def at(operand: int, i: int) -> int:
            return begin + 8 * (operand * self.count + i)

        operands, present = range(len(self.kind.dtypes)), set(self.present)
        blocks = [
            (k, in_place([Place(at(operand, i), rows, ROW) for operand in operands]))  # type: ignore[misc]
            for k, (i, rows) in enumerate(self.rows.large)
            if self.native or i in present
        ]
        guards = [at(1, self.rows.large[k][0]) if self.native else 0 for k, _ in blocks]
        batches = [(batch, 0) for batch in self._own_batches()]
        if self.native:
            batches = [(batch, self.batch_present[k].data_ptr()) for k, batch in enumerate(self.batches)]
        done = True

        def add(part: str, calls: Sequence[Call], guards: Sequence[int]) -> None:
            nonlocal done
            for (graph, arguments), guard in zip(calls, guards, strict=False):
                done = done and record(program, part, graph, self.kind, arguments, guard)

        def copy(part: str, batch: Batch, chosen: Sequence[int], unpack: bool, guard: int) -> None:
            if not self.native:
                program.then(part, lambda: self.executor.copy(self.table, batch.block, chosen, unpack))
                return
            for k in chosen:
                if k != 1 or not unpack:
                    arguments = [(0, x) for x in native.copy_arguments(self.table, batch.block, k, unpack)]
                    program.launch(part, native.address_of(native.library().copy_rows), arguments, guard)

        for squares in {False, self.clips}:
            part = "squares" if squares else "inspect"
            for batch, guard in batches:
                if not squares or len(self.batches) > 1:
                    copy(part, batch, self.before_reading, False, guard)
                add(part, [self._packed_read(batch, squares)], [guard])
            reads = list(self._reads(blocks, squares))
            add(part, reads, guards if self.native else [0] * len(reads))
        if self.gathers:
            add("gather", [(Graph("gather"), self.gather_arguments())], [0])
        if self.clips:
            add("norm", [(Graph("norm"), self.norm_arguments())], [0])
        for part, whole in (("scale", False), ("scale of whole tensors", True)):
            add(part, [(Graph("scale"), self.scale_arguments(whole))], [0])
        updates = list(self._updates(blocks))
        add("update", updates[::-1], guards[::-1] if self.native else [0] * len(updates))
        for batch, guard in batches:
            copy("update", batch, self.before_update, False, guard)
            add("update", [self._packed_update(batch)], [guard])
            copy("update", batch, operands, True, guard)
        add("update", [(Graph("fold"), self.fold_arguments())], [0])
        if not done:
            return None
        program.finish()
        return program
