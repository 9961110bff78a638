"""How a list of parameters is cut into blocks for the step functions of ``update.py``.

A parameter of n elements is seen as a flat array. Its first n // 1024 rows of 1024 elements are one block of the
*large* kind, if there are at least two rows; what is left, its *tail*, is copied into a packed buffer and back after
the step. There it takes as many rows of 256 elements as it needs, a *piece* a row. So a handful of compiled graphs
serve every model, and hundreds of tiny tensors cost one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import update
from .checks import check_hyperparameters
from .compiled import Kind, Step, step_functions
from .fp8 import E4M3, E5M2
from .packing import ForeachPacking, TablePacking, Tail
from .sharding import MAX_JUMPS, is_sharded, layout, like, local
from .update import FACTORS, GRAD_FACTOR, HYPER, LR, PIECE, ROW, SALT, Part, Results

FRACTION = 2.0**46  # the unit of the second word of a rank's sums; 2^16 ranks can add theirs up


class Store:
    """The scalar state of all tensors of a kind, in two tables; ``state[p]`` holds 0-d views of them.

    ``norms`` [tensors + 1, 2] float32 and ``counters`` [tensors + 1, 2] int32 (step, salt): 16 bytes a tensor. Slot 0
    is scratch for padding. A state entry that is not this store's view (after loading, unpickling, or when someone
    replaced it) is read in again.
    """

    NAMES = ("exp_avg_norm", "exp_avg_sq_norm", "step", "salt")

    def __init__(self, device: torch.device) -> None:
        self.norms = torch.ones(1, 2, dtype=torch.float32, device=device)
        self.counters = torch.zeros(1, 2, dtype=torch.int32, device=device)
        self.norm_columns, self.counter_columns = list(self.norms.unbind(1)), list(self.counters.unbind(1))
        self.entries: list[dict[str, Any]] = []  # the state of slot i + 1
        self.views: list[tuple[Tensor, ...]] = []
        self.slots: dict[int, int] = {}  # id of a state dict (kept alive by entries) -> slot
        self.writer: object = None  # the plan whose step was the last to write here
        self.version = -1

    def adopt(self, states: Sequence[dict[str, Any]]) -> list[int]:
        """Make every state's scalars views of the tables; returns their slots."""
        fresh = [s for s in states if id(s) not in self.slots]
        if fresh:
            self._grow(fresh)
        for state in states:
            slot = self.slots[id(state)]
            if any(state[name] is not view for name, view in zip(self.NAMES, self.views[slot - 1], strict=True)):
                self._read(slot)
        return [self.slots[id(s)] for s in states]

    def holds(self, states: Sequence[dict[str, Any]]) -> bool:
        """Whether all these states' scalars are still views of the tables."""
        slots, views = self.slots, self.views
        for state in states:
            v = views[slots[id(state)] - 1]
            if state.get("step") is not v[2] or state.get("salt") is not v[3]:
                return False
            if state.get("exp_avg_norm") is not v[0] or state.get("exp_avg_sq_norm") is not v[1]:
                return False
        return True

    def _grow(self, fresh: Sequence[dict[str, Any]]) -> None:
        old_norms, old_counters, count = self.norms, self.counters, len(self.entries) + 1
        self.norms = torch.ones(count + len(fresh), 2, dtype=torch.float32, device=old_norms.device)
        self.counters = torch.zeros(count + len(fresh), 2, dtype=torch.int32, device=old_norms.device)
        self.norms[:count], self.counters[:count] = old_norms, old_counters
        self.norm_columns, self.counter_columns = list(self.norms.unbind(1)), list(self.counters.unbind(1))
        for slot in range(1, count):  # first what was changed outside, then the views move to the new tables
            if not self.holds([self.entries[slot - 1]]):
                self._read(slot)
            else:
                self._point(slot)
        for state in fresh:
            self.entries.append(state)
            self.views.append(())
            self.slots[id(state)] = len(self.entries)
            self._read(len(self.entries))

    def _read(self, slot: int) -> None:
        state = self.entries[slot - 1]
        self.norms[slot, 0], self.norms[slot, 1] = state["exp_avg_norm"], state["exp_avg_sq_norm"]
        self.counters[slot, 0], self.counters[slot, 1] = state["step"], state["salt"]
        self._point(slot)

    def _point(self, slot: int) -> None:
        norms, counters = self.norms[slot], self.counters[slot]
        views = (norms[0], norms[1], counters[0], counters[1])
        self.views[slot - 1] = views
        self.entries[slot - 1].update(zip(self.NAMES, views, strict=True))
        self.writer = None

    def stamp(self) -> int:
        """Changes whenever someone writes to the tables (inference tensors do not say)."""
        return 0 if self.norms.is_inference() else self.norms._version + self.counters._version


def init_state(param: Tensor, salt: int, float8: bool) -> dict[str, Any]:
    """The state of a parameter before its first step; codes and moments are contiguous and spread as it is."""
    scales = (E4M3.smallest_scale(), E5M2.smallest_scale()) if float8 else (1.0, 1.0)
    dtypes = (torch.float8_e4m3fn, torch.float8_e5m2) if float8 else (torch.float32, torch.float32)
    device, shape = param.device, local(param).shape
    return {
        "step": torch.zeros((), dtype=torch.int32, device=device),
        "exp_avg": like(param, torch.zeros(shape, dtype=dtypes[0], device=device)),
        "exp_avg_norm": torch.tensor(scales[0], dtype=torch.float32, device=device),
        "exp_avg_sq": like(param, torch.zeros(shape, dtype=dtypes[1], device=device)),
        "exp_avg_sq_norm": torch.tensor(scales[1], dtype=torch.float32, device=device),
        "salt": torch.tensor(salt - (salt >> 31 << 32), dtype=torch.int32, device=device),
    }


def flat_codes(codes: Tensor) -> Tensor:
    """Codes as a flat uint8 view (fp8 types do not compile before sm_89); float32 moments as they are."""
    codes = codes.view(-1)
    return codes if codes.dtype == torch.float32 else codes.view(torch.uint8)


def cut(params: Sequence[Tensor]) -> tuple[list[tuple[int, int]], list[Tail]]:
    """Large blocks as (tensor, rows), and what is packed."""
    large, tails, row = [], [], 0
    for i, p in enumerate(params):
        rows = p.numel() // ROW if p.numel() >= 2 * ROW else 0
        if rows:
            large.append((i, rows))
        if p.numel() > rows * ROW:
            tails.append(Tail(i, rows * ROW, p.numel() - rows * ROW, row))
            row += tails[-1].rows
    return large, tails


def compile_graphs(kind: Kind, params: Sequence[Tensor]) -> None:
    """Compile what a step over these parameters needs; raises RuntimeError where no compiler works."""
    shards = [local(p) for p in params]
    large, tails = cut(shards)
    if kind.device.type != "cpu" and any(rows * ROW >= 1 << 31 for _, rows in large):
        shapes = [tuple(shards[i].shape) for i, rows in large if rows * ROW >= 1 << 31]
        raise ValueError(
            f"Lamb16: a parameter of shape {shapes[0]} has 2^31 elements or more; compiled steps on a GPU count with "
            "32 bits: split it, or pass compile=False"
        )
    spread = "_spread" if any(layout(p).jumps for p in params) else ""
    wanted = ["scale"]
    wanted += ["measure", "apply" + spread] * bool(large) + ["measure_packed", "apply_packed" + spread] * bool(tails)
    wanted += ["collect"] * (bool(large) and kind.by_rows)
    for name in wanted:
        getattr(step_functions(kind, True), name).prepare()


class Plan:
    """The blocks and tables of one step over one list of parameters of one :class:`Kind`.

    The list is sorted by parameter group, so that a group is a slice of the tables. Of parameters that are spread over
    a mesh the plan sees this rank's shards; then :meth:`give` and :meth:`take` come between :meth:`measure` and
    :meth:`apply`.
    """

    def __init__(
        self,
        kind: Kind,
        params: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        store: Store,
        groups: Sequence[tuple[dict[str, Any], int, int]],
        compile: bool,
    ) -> None:
        self.kind, self.params, self.states, self.store, self.groups = kind, params, states, store, groups
        self.compile = compile
        self.functions: Step = step_functions(kind, compile)
        self.distributed = any(is_sharded(p) for p in params)
        self.weights = [local(p) for p in params]
        self.layouts = [layout(p) for p in params]
        self.sharded = any(layout.groups for layout in self.layouts)
        self.spread = any(layout.jumps for layout in self.layouts)
        self.memory = [_memory(w) for w in self.weights]
        self.moments = [(s["exp_avg"], s["exp_avg_sq"]) for s in states]
        self.codes = [(flat_codes(local(m)), flat_codes(local(v))) for m, v in self.moments]
        self.contiguous = [w.is_contiguous() for w in self.weights]
        self.large, self.tails = cut(self.weights)
        self._allocate()
        self._allocate_sharded()
        self.hyper_seen: list[Any] = [None] * len(groups)
        self.scaled = False

    # -- building ------------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        device = self.kind.device
        count = max(len(self.params), 2)  # graphs are compiled for two or more of everything
        homes = self.store.adopt(self.states)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.home = torch.tensor(homes + [0] * (count - len(homes)), device=device)
        self.hyper, self.bound = zeros(count, len(HYPER), dtype=torch.float64), zeros(count, dtype=torch.float64)
        self.carry, self.table = zeros(count, FACTORS), zeros(count, FACTORS)
        self.rounding, self.report = zeros(count, 4, dtype=torch.int32), zeros(count, 3, dtype=torch.float64)
        self.no_inf = zeros()
        self.lanes = update.make_lanes(device)

        pieces = sum(tail.rows for tail in self.tails)
        packed = max(pieces, 2) if pieces else 0
        chunks = self._chunks()
        slots = max(1 + len(chunks) + packed, 2)
        self.peaks, self.sums = zeros(slots, 2, dtype=torch.int32), zeros(slots, 2, dtype=torch.float64)
        owned: list[list[int]] = [[] for _ in range(count)]
        for slot, (i, _, _) in enumerate(chunks, 1):  # slot 0 stays zero
            owned[i].append(slot)
        first = 1 + len(chunks)
        for tail in self.tails:
            owned[tail.tensor] += range(first + tail.row, first + tail.row + tail.rows)
        most = max(2, *(len(slots) for slots in owned))
        self.pieces = torch.tensor([slots + [0] * (most - len(slots)) for slots in owned], device=device)
        self._allocate_packed(packed, zeros)
        self._allocate_large(chunks, zeros)

        def columns(table: Tensor, start: int = 0, end: int | None = None) -> list[Tensor]:
            return list(table[start:end].unbind(1))

        self.all_peaks, self.all_sums = columns(self.peaks), columns(self.sums)
        self.chunk_peaks, self.chunk_sums = columns(self.peaks, 1, first), columns(self.sums, 1, first)
        self.packed_peaks, self.packed_sums = columns(self.peaks, first), columns(self.sums, first)
        self.carry_columns, self.table_columns = columns(self.carry), columns(self.table)
        self.rounding_columns, self.report_columns = columns(self.rounding), columns(self.report)

    def _chunks(self) -> list[tuple[int, int, int]]:
        """(tensor, first row, rows) of what gives one result: all rows of a large tensor, or at most 1,024 of them."""
        if not self.kind.by_rows:
            return [(i, 0, rows) for i, rows in self.large]
        chunks = [(i, k, min(ROW, rows - k)) for i, rows in self.large for k in range(0, rows, ROW)]
        return [*chunks, (chunks[0][0], 0, 0)] if len(chunks) == 1 else chunks  # two or more, as of everything

    def _allocate_packed(self, packed: int, zeros: Callable[..., Tensor]) -> None:
        blocks = [zeros(packed, PIECE, dtype=dtype) for dtype in self.kind.dtypes]
        self.packed: Part = (blocks[0], blocks[1], blocks[2], blocks[3])
        pieces = [piece for tail in self.tails for piece in tail.pieces()]
        table = torch.tensor(pieces + [(0, 0, 0)] * (packed - len(pieces)), device=self.kind.device).view(-1, 3)
        self.owner = table[:, 0].contiguous()
        self.start, self.length = (table[:, k : k + 1].int().contiguous() for k in (1, 2))
        by_table = self.compile and self.kind.device.type == "cuda" and self.tails
        self.packing = (TablePacking if by_table else ForeachPacking)(self.tails, self.packed, self.codes)

    def _allocate_large(self, chunks: list[tuple[int, int, int]], zeros: Callable[..., Tensor]) -> None:
        """Row views of the codes, and where the results go; stand-ins fill the last group up."""
        group = self.kind.group
        spare = -len(self.large) % group
        self.large_parts = [self._rows(i, rows) for i, rows in self.large]
        blocks = [[zeros(2, ROW, dtype=dtype) for dtype in self.kind.dtypes] for _ in range(spare)]
        self.spare: list[Part] = [(p, g, m, v) for p, g, m, v in blocks]
        if self.kind.by_rows:
            sizes = [rows for _, rows in self.large] + [2] * spare
            flat = [zeros(sum(sizes), dtype=dtype) for dtype in (*[torch.int32] * 2, *[torch.float64] * 2)]
            self.partial: Results = (flat[0], flat[1], flat[2], flat[3])
            self.results: list[Results] = list(zip(*(torch.split(x, sizes) for x in flat), strict=True))
            first = dict(zip((i for i, _ in self.large), itertools.accumulate(sizes, initial=0), strict=False))
            padded = [(first[i] + k, n) for i, k, n in chunks]
            table = torch.tensor(padded, device=self.kind.device).view(-1, 2)
            self.chunk_start, self.chunk_length = table[:, :1].contiguous(), table[:, 1:].contiguous()
        else:
            slots = slice(1, 1 + len(self.large))
            pairs = zip(self.peaks[slots], self.sums[slots], strict=True)
            self.results = [(a[:1], a[1:], b[:1], b[1:]) for a, b in pairs]
        owners = [i for i, _ in self.large]
        self.carries = [self.carry[i] for i in owners] + [zeros(FACTORS) for _ in range(spare)]
        self.tables = [self.table[i] for i in owners] + [zeros(FACTORS) for _ in range(spare)]
        self.roundings = [self.rounding[i] for i in owners] + [zeros(4, dtype=torch.int32) for _ in range(spare)]
        self.calls = [slice(k, k + group) for k in range(0, len(self.large), group)]

    def _rows(self, i: int, rows: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """The row views of a tensor's weights (None if it is not contiguous) and codes."""
        m, v = (x[: rows * ROW].view(rows, ROW) for x in self.codes[i])
        p = self.weights[i].view(-1)[: rows * ROW].view(rows, ROW) if self.contiguous[i] else None
        return p, m, v

    def _allocate_sharded(self) -> None:
        """What only shards need: the tables as the ranks reduced them, and where the elements lie in whole tensors."""
        if not self.sharded:
            self.scaled_from = self.all_peaks, self.all_sums, self.pieces
            return
        device, count = self.kind.device, len(self.home)
        self.whole_peaks = torch.zeros(count + 1, 2, dtype=torch.int32, device=device)
        self.whole_sums = torch.zeros(count + 1, 2, dtype=torch.float64, device=device)
        slots = torch.tensor([[k + 1, 0] for k in range(count)], device=device)  # slot 0 stays zero
        self.scaled_from = list(self.whole_peaks.unbind(1)), list(self.whole_sums.unbind(1)), slots
        # A sum is at most the number of elements: 62 bits hold it in these units.
        units = [2.0 ** (62 - layout.numel.bit_length()) for layout in self.layouts]
        self.units = torch.tensor(units, dtype=torch.float64, device=device)[:, None]

        def table(rows: list[list[float]], dtype: torch.dtype) -> Tensor:
            filled = torch.zeros(count, MAX_JUMPS, dtype=torch.float64, device=device)
            for row, values in zip(filled, rows, strict=False):
                row[: len(values)] = torch.tensor(values, dtype=torch.float64)
            return filled.to(torch.int64).to(dtype) if dtype == torch.int32 else filled  # modulo 2^32

        self.bases = table([[layout.base % 2**32] for layout in self.layouts], torch.int32)[:, 0]
        self.inverses = table([[1 / run for run, _ in layout.jumps] for layout in self.layouts], torch.float64)
        self.jumps = table([[jump % 2**32 for _, jump in layout.jumps] for layout in self.layouts], torch.int32)
        owners = [i for i, _ in self.large] + [count - 1] * len(self.spare)
        self.large_inverses = [self.inverses[i] for i in owners]
        self.large_jumps = [self.jumps[i] for i in owners]

    # -- running -------------------------------------------------------------------------------------------------

    def fits(self, current: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether parameters and their ``current`` states are still the tensors this plan was made for."""
        weights = [local(p) if self.distributed else p.detach() for p in self.params]
        if [_memory(w) for w in weights] != self.memory:
            return False
        for p, state, (m, v) in zip(self.params, self.states, self.moments, strict=True):
            if current.get(p) is not state or state.get("exp_avg") is not m or state.get("exp_avg_sq") is not v:
                return False
        self.weights = weights
        return self.store.holds(self.states)

    def check_changed_groups(self) -> None:
        """Raise ValueError for a hyperparameter that was changed to a wrong value since the last step."""
        for (group, _, _), seen in zip(self.groups, self.hyper_seen, strict=True):
            if seen is None or _hyper_values(group)[1:] != seen[1:]:
                check_hyperparameters(group, running=True)

    def measure(self, grads: Sequence[Tensor], grad_scale: Tensor | None) -> None:
        """First pass; changes no state. ``grads`` are the (local) gradients, in order, kept for :meth:`apply`."""
        self._fill(grad_scale)
        weights = [w if c else w.contiguous() for w, c in zip(self.weights, self.contiguous, strict=True)]
        flat_p, flat_g = [w.view(-1) for w in weights], [g.contiguous().view(-1) for g in grads]
        f, self.parts = self.functions, self._parts(flat_p, flat_g)
        self.copies = [(p, w) for p, w, c in zip(self.weights, weights, self.contiguous, strict=True) if not c]
        if self.tails:
            self.packing.pack(flat_p, flat_g)
            f.measure_packed(
                self.packed, self.carry, self.owner, self.length, self.lanes, self.packed_peaks, self.packed_sums
            )
        for k in self.calls:
            f.measure(self.parts[k], self.carries[k], self.lanes, self.results[k], self.kind.by_rows)
        if self.kind.by_rows and self.large:
            f.collect(self.partial, self.chunk_start, self.chunk_length, self.lanes, self.chunk_peaks, self.chunk_sums)

    def give(self, maxima: Tensor, totals: Tensor) -> None:
        """Write what this rank measured: int32 [tensors, 2] and int64 [tensors, 2, 2], two words a sum."""
        pieces = self.pieces[: len(self.params)]
        maxima.copy_(self.peaks[pieces].amax(1))
        sums = self.sums[pieces].sum(1) * self.units
        totals[..., 0] = sums.floor()
        totals[..., 1] = ((sums - sums.floor()) * FRACTION).round()

    def take(self, maxima: Tensor, totals: Tensor) -> None:
        """Take the same of all ranks."""
        self.whole_peaks[1 : len(maxima) + 1] = maxima
        words = totals.double()
        self.whole_sums[1 : len(totals) + 1] = (words[..., 0] + words[..., 1] / FRACTION) / self.units

    def apply(self, skipped: Tensor, found_inf: Tensor | None) -> None:
        """Scales and second pass: state and weights are changed."""
        f, k = self.functions, self.kind
        f.scale(
            *self.scaled_from, self.store.norm_columns, self.store.counter_columns, self.home,
            self.hyper, self.bound, self.no_inf if found_inf is None else found_inf.to(k.device).view(()),
            skipped, self.carry_columns, self.table_columns, self.rounding_columns, self.report_columns, k.float8,
        )  # fmt: skip
        if self.sharded:
            self.rounding_columns[SALT].add_(self.bases)
        for call in reversed(self.calls):  # the last ones are still in the cache
            self._apply_large(call)
        if self.tails:
            self._apply_packed()
            self.packing.unpack()
        for p, w in self.copies:
            p.copy_(w)
        self.store.writer, self.store.version = self, self.store.stamp()

    def let_go(self) -> None:
        """Forget the gradients, and copies of weights."""
        self.parts, self.copies = [], []

    def _apply_large(self, k: slice) -> None:
        if self.spread:
            places = self.large_inverses[k], self.large_jumps[k]
            self.functions.apply_spread(self.parts[k], self.tables[k], self.roundings[k], *places, self.lanes)
        else:
            self.functions.apply(self.parts[k], self.tables[k], self.roundings[k], self.lanes)

    def _apply_packed(self) -> None:
        place = self.owner, self.start, self.lanes
        if self.spread:
            tables = self.table, self.rounding, self.inverses, self.jumps
            self.functions.apply_packed_spread(self.packed, *tables, *place)
        else:
            self.functions.apply_packed(self.packed, self.table, self.rounding, *place)

    def _parts(self, flat_p: list[Tensor], flat_g: list[Tensor]) -> list[Part]:
        """The row views of the large tensors, and what fills the last group up."""
        parts: list[Part] = []
        for (i, rows), (p, m, v) in zip(self.large, self.large_parts, strict=True):
            n = rows * ROW
            p = flat_p[i][:n].view(rows, ROW) if p is None else p
            parts.append((p, flat_g[i][:n].view(rows, ROW), m, v))
        return parts + self.spare

    def _fill(self, grad_scale: Tensor | None) -> None:
        """Bring the tables up to date with the groups, the gradient scale and whoever else wrote the state."""
        stale = self.store.writer is not self or self.store.version != self.store.stamp()
        for k, (group, a, b) in enumerate(self.groups):
            if _on_device(group["lr"]):
                self.hyper[a:b, LR] = group["lr"].to(torch.float64)
            values = _hyper_values(group)
            if values == self.hyper_seen[k]:
                continue
            if self.hyper_seen[k] is None or values[1:] != self.hyper_seen[k][1:]:
                self._fill_group(group, a, b)
                stale = True
            if not _on_device(group["lr"]):
                self.hyper[a:b, LR] = float(group["lr"])
            self.hyper_seen[k] = values
        if grad_scale is not None or self.scaled:
            self.scaled = grad_scale is not None
            inverse = 1.0 if grad_scale is None else grad_scale.to(self.kind.device).double().reciprocal()
            for group, a, b in self.groups:
                self.carry[a:b, GRAD_FACTOR] = -inverse if group["maximize"] else inverse
        if stale:
            store = self.store
            update.prepare(self.hyper, self.bound, store.norms, store.counters, self.home, self.carry)

    def _fill_group(self, group: dict[str, Any], a: int, b: int) -> None:
        beta1, beta2 = (float(beta) for beta in group["betas"])
        row = [beta1, beta2] + [float(group[name]) for name in HYPER[3:]]
        self.hyper[a:b, 1:] = torch.tensor(row, dtype=torch.float64, device=self.kind.device)
        self.bound[a:b] = update.inverse_bound(beta1, beta2)
        self.carry[a:b, GRAD_FACTOR] = -1.0 if group["maximize"] else 1.0


def _memory(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype


def _hyper_values(group: dict[str, Any]) -> tuple[Any, ...]:
    """What to compare to see a change; an lr on a device is copied there every step instead."""
    lr = None if _on_device(group["lr"]) else float(group["lr"])
    return (lr, *group["betas"], *(group[name] for name in HYPER[3:]), group["maximize"])


def _on_device(lr: float | Tensor) -> bool:
    """Whether reading the learning rate would wait for a device."""
    return isinstance(lr, Tensor) and lr.device.type != "cpu"
