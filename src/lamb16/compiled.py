"""The step functions of ``update.py``, eager or compiled, one set for each kind of tensor.

A *kind* is what a graph is specialised on: device type, dtypes, how the moments are stored. Everything else
(sizes, number of tensors, hyperparameters, step counts) is dynamic, so each graph is compiled once a process. It
is compiled on small stand-in tensors before it ever touches real ones: a compiler that fails leaves no half-made step.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
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
    apply_spread: Callable[..., None]
    apply_packed_spread: Callable[..., None]


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
        self.lock = threading.Lock()
        self.code: Code | None = None

    def prepare(self) -> None:
        """Compile it, unless that has been done; raises RuntimeError where no compiler works."""
        with self.lock:
            if self.code is None:
                self._compile()

    def _compile(self) -> None:
        try:
            self.code = compile_once(self.name, self.kind)
        except Exception as error:
            raise RuntimeError(
                f"lamb16 could not compile its {self.name} step for {self.kind.device.type} with torch.compile "
                f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}). "
                "Install a working compiler (a C++ compiler for the CPU, Triton for CUDA), or pass compile=False to "
                "run the same step eagerly. Nothing was changed."
            ) from error

    def __call__(self, *arguments: Any) -> None:
        if self.code is None:
            self.prepare()
        assert self.code is not None
        self.code(arguments)


class Code(NamedTuple):
    """Generated code and where its arguments come from."""

    function: Callable[..., Any]
    origins: list[Origin] | None  # None where torch.compile is switched off and the function is the eager one

    def __call__(self, arguments: tuple[Any, ...]) -> None:
        if self.origins is None:
            self.function(*arguments)
            return
        self.function(*take(self.origins, arguments))


def compile_once(name: str, kind: Kind) -> Code:
    """Compile a step function on stand-ins.

    The code is called without torch.compile's guards: kinds are told apart where plans are made, and nothing that may
    change around a step (threads, autocast, default dtypes, a reset of Dynamo) changes what the code has to do. Made
    anew for real tensors it would be specialised on their sizes.
    """
    arguments = stand_ins(name, kind)
    flat = flatten(arguments)
    found: list[Code] = []

    def backend(graph: Any, examples: list[Any]) -> Callable[..., Any]:
        code = torch._inductor.compile(graph, examples, options=options(kind.device))

        def first_call(*received: Any) -> Any:
            found.append(Code(code, [Origin.of(x, flat) for x in received]))
            flat.clear()  # Dynamo keeps this function, which is not to keep the stand-ins
            return code(*received)

        return first_call

    function = _own_code(getattr(update, name))
    with torch.no_grad():
        torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    return found[0] if found else Code(function, None)  # torch.compiler.set_stance, TORCHDYNAMO_DISABLE


class Origin(NamedTuple):
    """Where an argument of generated code comes from: a tensor among the flattened arguments, or a number of one."""

    position: int
    what: str  # "tensor", "size" or "stride"
    dim: int

    @classmethod
    def of(cls, received: Any, flat: list[Any]) -> Origin:
        """Found by identity, and for numbers by value: stand-ins have equal ones only where all arguments do."""
        tensors = [(i, x) for i, x in enumerate(flat) if isinstance(x, Tensor)]
        if isinstance(received, Tensor):
            return cls(next(i for i, x in tensors if x is received), "tensor", 0)
        for what in ("size", "stride"):
            for i, x in tensors:
                for dim in range(x.dim()):
                    if getattr(x, what)(dim) == int(received):
                        return cls(i, what, dim)
        raise AssertionError(f"no argument has the size or stride {received}")

    def take(self, flat: list[Any]) -> Any:
        """The argument for these flattened arguments."""
        x = flat[self.position]
        if self.what == "tensor":
            return x
        return x.size(self.dim) if self.what == "size" else x.stride(self.dim)


def take(origins: list[Origin], arguments: Any) -> list[Any]:
    """The arguments of generated code for those of its step function."""
    flat = flatten(arguments)
    return [origin.take(flat) for origin in origins]


def flatten(arguments: Any) -> list[Any]:
    """What nested lists and tuples hold, in order."""
    flat: list[Any] = []
    for x in arguments:
        if isinstance(x, (list, tuple)):
            flat += flatten(x)
        else:
            flat.append(x)
    return flat


def _own_code(function: Callable[..., None]) -> Callable[..., None]:
    """A copy with a code object of its own, and so with a compile cache of its own."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )


def options(device: torch.device) -> dict[str, Any]:
    """What Inductor is told on this kind of device."""
    if device.type == "cpu":
        # Otherwise the CPU code stores the moments in a temporary instead of keeping them in registers.
        names = ("realize_reads_threshold", "realize_opcount_threshold", "realize_acc_reads_threshold")
        return dict.fromkeys(names, 10_000) | {"cpp.dynamic_threads": True}  # code for any number of threads
    return {
        # IEEE division and no contraction of a multiply and an add, so that GPUs give the CPU's bits.
        "emulate_precision_casts": True,
        "eager_numerics.division_rounding": True,
        # One launch for a whole group; the memory that the last check fears for is not there: nothing is stored.
        "combo_kernels": True,
        "combo_kernel_max_num_nodes": 64,
        "combo_kernel_max_num_args": 1000,
        "combo_kernel_peak_memory_pct_threshold": None,
    }


def stand_ins(name: str, kind: Kind) -> tuple[Any, ...]:
    """Arguments of the right kinds, every varying size different from every other and marked dynamic."""
    device = kind.device
    tensors, slots, homes, pieces = 5, 11, 7, 3

    def dynamic(*shape: int, dtype: torch.dtype, dims: tuple[int, ...] = (0,)) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        for dim in dims:
            torch._dynamo.mark_dynamic(tensor, dim)
        return tensor

    def unaligned(size: int, stride: int, dtype: torch.dtype) -> Tensor:
        # Where code is generated for aligned memory, it copies what is not aligned at every call.
        memory = torch.zeros(size * stride + 1, dtype=dtype, device=device)
        tensor = memory.as_strided((size,), (stride,), 1)
        torch._dynamo.mark_dynamic(tensor, 0)
        return tensor

    def columns(size: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        # Like the columns of a table, but each with memory of its own: views of one would be traced as its slices.
        return [unaligned(size, count, dtype) for _ in range(count)]

    def part(rows: int, columns: int = ROW) -> Part:
        p, g, m, v = (dynamic(rows, columns, dtype=dtype) for dtype in kind.dtypes)
        return p, g, m, v

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def results(size: int) -> Results:
        dtypes = (torch.int32, torch.int32, torch.float64, torch.float64)
        a, b, c, d = (zeros(1, dtype=x) if size == 1 else unaligned(size, 1, x) for x in dtypes)
        return a, b, c, d

    lanes = update.make_lanes(device)
    group = range(kind.group)
    sizes = [3 + 2 * k for k in group]
    if name == "measure":
        outputs = [results(size if kind.by_rows else 1) for size in sizes]
        return [part(size) for size in sizes], [zeros(FACTORS) for _ in group], lanes, outputs, kind.by_rows
    chunks = 17
    if name == "collect":
        start, length = (dynamic(chunks, 1, dtype=torch.int64) for _ in range(2))
        return results(19), start, length, lanes, columns(chunks, 2, torch.int32), columns(chunks, 2, torch.float64)
    if name in ("apply", "apply_spread"):
        roundings = [zeros(4, dtype=torch.int32) for _ in group]
        places = [[zeros(2, dtype=dtype) for _ in group] for dtype in (torch.float64, torch.int32)]
        spread = places if name == "apply_spread" else []
        return [part(size) for size in sizes], [zeros(FACTORS) for _ in group], roundings, *spread, lanes
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
    tables = [table, dynamic(tensors, 4, dtype=torch.int32)]
    if name == "apply_packed_spread":
        tables += [dynamic(tensors, 2, dtype=dtype) for dtype in (torch.float64, torch.int32)]
    return part(pieces, PIECE), *tables, owner, start, lanes
