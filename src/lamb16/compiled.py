"""The step functions of ``update.py``, eager or compiled, one set for each kind of tensor.

A *kind* is what a graph is specialised on: device type, dtypes, how the moments are stored. Everything else
(sizes, number of tensors, hyperparameters, step counts) is dynamic, so each graph is compiled once a process. It
is compiled on small stand-in tensors before it ever touches real ones: a compiler that fails leaves no half-made step.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import update
from .update import FACTORS, HYPER, PIECE, ROW, Part, Results


class Kind(NamedTuple):
    """What compiled code is specialised on."""

    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    float8: bool

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of weights, gradients and codes as the graphs see them."""
        codes = torch.uint8 if self.float8 else torch.float32
        return self.param_dtype, self.grad_dtype, codes, codes

    @property
    def group(self) -> int:
        """Large tensors a call. CUDA launches one kernel for all of them; on the CPU a loop a tensor gains nothing."""
        return 1 if self.device.type == "cpu" else 16

    @property
    def by_rows(self) -> bool:
        """Whether the first pass leaves its last reduction to a second kernel: many rows in parallel need one."""
        return self.device.type != "cpu"


class Step(NamedTuple):
    """The functions of a step, for one kind."""

    measure: Callable[..., None]
    collect: Callable[..., None]
    measure_packed: Callable[..., None]
    scale: Callable[..., None]
    apply: Callable[..., None]
    apply_packed: Callable[..., None]


def step_functions(kind: Kind, compile: bool) -> Step:
    """The functions for ``kind``; compiled ones are shared by all optimizers of the process."""
    if not compile:
        return Step(*(getattr(update, name) for name in Step._fields))
    return _compiled(kind)


@functools.cache
def _compiled(kind: Kind) -> Step:
    return Step(*(_Lazy(name, kind) for name in Step._fields))


class _Lazy:
    """One compiled function, compiled on stand-ins when it is first :meth:`prepared <prepare>` or called."""

    def __init__(self, name: str, kind: Kind) -> None:
        self.name, self.kind = name, kind
        self.call: Callable[..., None] | None = None

    def prepare(self) -> Callable[..., None]:
        if self.call is None:
            self.call = self._compile()
        return self.call

    def __call__(self, *args: Any) -> None:
        self.prepare()(*args)

    def _compile(self) -> Callable[..., None]:
        function = _own_code(getattr(update, self.name), str(self.kind))
        compiled = torch.compile(function, fullgraph=True, options=options(self.kind.device))
        try:
            with torch.no_grad():
                compiled(*stand_ins(self.name, self.kind))
        except Exception as error:
            raise RuntimeError(
                f"lamb16 could not compile its {self.name} step for {self.kind.device.type} with torch.compile "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}). "
                "Install a working compiler (a C++ compiler for the CPU, Triton for CUDA), or pass compile=False to "
                "run the same step eagerly. Nothing was changed."
            ) from error
        return compiled


def _own_code(function: Callable[..., None], suffix: str) -> Callable[..., None]:
    """A copy with a code object of its own, so that each kind has its own compile cache and recompile limit."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}[{suffix}]")
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def options(device: torch.device) -> dict[str, Any]:
    """What Inductor is told on this kind of device."""
    own: dict[str, Any]
    if device.type == "cpu":
        # Otherwise the CPU code stores the moments in a temporary instead of keeping them in registers.
        names = ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold")
        own = dict.fromkeys(names, 10_000) | {"cpp.dynamic_threads": True}  # code for any number of threads
    else:
        own = {
            # IEEE division and no contraction of a multiply and an add, so that GPUs give the CPU's bits.
            "emulate_precision_casts": True,
            "eager_numerics.division_rounding": True,
            # One launch for a whole group; the memory that the last check fears for is not there: nothing is stored.
            "combo_kernels": True,
            "combo_kernel_max_num_nodes": 64,
            "combo_kernel_max_num_args": 1000,
            "combo_kernel_peak_memory_pct_threshold": None,
        }
    return {**own, "guard_filter_fn": no_guards}


def no_guards(guards: Sequence[Any]) -> list[bool]:
    """Keep none of Dynamo's guards: a graph holds for every call of its kind, whatever else changes around it."""
    return [False] * len(guards)


def stand_ins(name: str, kind: Kind) -> tuple[Any, ...]:
    """Arguments of the right kinds, every varying size different from every other and marked dynamic."""
    device = kind.device
    tensors, slots, homes, pieces = 5, 11, 7, 3

    def dynamic(*shape: int, dtype: torch.dtype, dims: tuple[int, ...] = (0,)) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        for dim in dims:
            torch._dynamo.mark_dynamic(tensor, dim)
        return tensor

    def columns(size: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        # Like the columns of a table, but each with memory of its own: views of one would be traced as its slices.
        found = [torch.empty_strided((size,), (count,), dtype=dtype, device=device).zero_() for _ in range(count)]
        for column in found:
            torch._dynamo.mark_dynamic(column, 0)
        return found

    def part(rows: int, columns: int = ROW) -> Part:
        p, g, m, v = (dynamic(rows, columns, dtype=dtype) for dtype in kind.dtypes)
        return p, g, m, v

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def results(size: int) -> Results:
        make = zeros if size == 1 else dynamic
        a, b, c, d = (make(size, dtype=dtype) for dtype in (*[torch.int32] * 2, *[torch.float64] * 2))
        return a, b, c, d

    lanes = update.make_lanes(device)
    group = range(kind.group)
    sizes = [13 + 2 * k for k in group]
    if name == "measure":
        outputs = [results(size if kind.by_rows else 1) for size in sizes]
        return [part(size) for size in sizes], [zeros(FACTORS) for _ in group], lanes, outputs, kind.by_rows
    chunks = 17
    if name == "collect":
        start, length = (dynamic(chunks, 1, dtype=torch.int64) for _ in range(2))
        return results(19), start, length, lanes, columns(chunks, 2, torch.int32), columns(chunks, 2, torch.float64)
    if name == "apply":
        roundings = [zeros(4, dtype=torch.int32) for _ in group]
        return [part(size) for size in sizes], [zeros(FACTORS) for _ in group], roundings, lanes
    if name == "scale":
        return (
            columns(slots, 2, torch.int32),
            columns(slots, 2, torch.float64),
            dynamic(tensors, chunks, dtype=torch.int64, dims=(0, 1)),
            columns(homes, 2),
            columns(homes, 2, torch.int32),
            dynamic(tensors, dtype=torch.int64),
            dynamic(tensors, len(HYPER), dtype=torch.float64),
            dynamic(tensors, dtype=torch.float64),
            zeros(),
            zeros(dtype=torch.int64),
            columns(tensors, FACTORS),
            columns(tensors, FACTORS),
            columns(tensors, 4, torch.int32),
            columns(tensors, 3, torch.float64),
            kind.float8,
        )
    table = dynamic(tensors, FACTORS, dtype=torch.float32)
    owner = dynamic(pieces, dtype=torch.int64)
    if name == "measure_packed":
        length = dynamic(pieces, 1, dtype=torch.int32)
        peaks, sums = columns(pieces, 2, torch.int32), columns(pieces, 2, torch.float64)
        return part(pieces, PIECE), table, owner, length, lanes, peaks, sums
    start = dynamic(pieces, 1, dtype=torch.int32)
    return part(pieces, PIECE), table, dynamic(tensors, 4, dtype=torch.int32), owner, start, lanes
