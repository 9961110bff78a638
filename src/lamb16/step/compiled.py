"""The step functions of ``update.py``, run eagerly or as compiled graphs.

A *graph* is a step function for large or for packed blocks, of unsplit or of split tensors. A *kind* is what a graph is
specialised on: device type, dtypes, how the moments are stored, caution. Everything else (sizes, number of tensors,
hyperparameters, step counts) is dynamic, so each graph is compiled once per process. It is compiled on small example
inputs before it ever touches real tensors: a compiler that fails leaves no half-made step. On CPUs code that an earlier
process made is loaded in its place (``code_cache.py``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..hyper import NUMBERS
from . import code_cache, cpu_copying, update
from .packing import AddressPacking, ForeachPacking, Packing, TablePacking, Tail
from .update import FLOATS, INTEGERS, PIECE, ROW, Block, Inputs, Outputs, Spread, State, Sums, Tree

log = logging.getLogger(__name__)

Call = Callable[[tuple[Any, ...]], Any]  # of a step function, with its arguments


class Kind(NamedTuple):
    """What compiled code is specialised on."""

    device: torch.device
    param_dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype = torch.float32
    float8: bool = True
    caution: bool = False
    rounding: str = "nearest"  # of weights with 16 bits

    @property
    def exact(self) -> bool:
        """Whether there are remainders of the weights."""
        return self.rounding == "exact"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of weights, gradients, codes and, if there are, remainders, as the graphs see them."""
        codes = torch.uint8 if self.float8 else torch.float32
        return self.param_dtype, self.grad_dtype, codes, codes, *[torch.int16] * self.exact

    @property
    def group(self) -> int:
        """Large tensors of a call. CUDA launches one kernel for all; on the CPU a loop per tensor gains nothing."""
        return 1 if self.device.type == "cpu" else 16

    @property
    def reading_group(self) -> int:
        """Large tensors of a call of ``inspect``, which does less with each; a multiple of :attr:`group`."""
        return 1 if self.group == 1 else 2 * self.group


class Graph(NamedTuple):
    """A step function in one of its forms."""

    function: str
    packed: bool = False
    spread: bool = False  # update: of tensors that are split along inner dimensions
    squares: bool = False  # inspect: the sums of squares

    @property
    def name(self) -> str:
        """The function and, in words, its form."""
        return " ".join([self.function, *(form for form in self._fields[1:] if getattr(self, form))])

    def kind(self, kind: Kind) -> Kind:
        """Without what makes no difference to this function."""
        if self.function == "update":
            return kind
        exact = kind.exact and not self.squares
        param_dtype, rounding = (kind.param_dtype, kind.rounding) if exact else (torch.float32, "nearest")
        general = Kind(kind.device, param_dtype, rounding=rounding)
        if self.function == "inspect":
            return general._replace(grad_dtype=kind.grad_dtype)
        general = general._replace(float8=kind.float8)
        return general if self.function == "scale" else general._replace(caution=kind.caution)


GRAPHS = (
    Graph("inspect"), Graph("inspect", packed=True),
    Graph("inspect", squares=True), Graph("inspect", packed=True, squares=True),
    Graph("scale"), Graph("fold"),
    Graph("update"), Graph("update", packed=True),
    Graph("update", spread=True), Graph("update", packed=True, spread=True),
)  # fmt: skip


class Executor(Protocol):
    """What runs the step functions of an optimizer; a tool may hand in one of its own as ``Lamb16(compile=...)``."""

    def packing(
        self, tails: Sequence[Tail], block: Block, shapes: Sequence[Sequence[int]], moments: Sequence[torch.dtype]
    ) -> Packing:
        """What copies packed tensors into a block and back; arguments as of :class:`ForeachPacking`."""

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Called before anything is changed, for every graph that a step will run; RuntimeError where it cannot."""

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the step function."""


class Eager:
    """Runs the functions as they are."""

    def packing(
        self, tails: Sequence[Tail], block: Block, shapes: Sequence[Sequence[int]], moments: Sequence[torch.dtype]
    ) -> Packing:
        """By torch's own functions."""
        return ForeachPacking(tails, block, shapes, moments)

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Nothing to do."""

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the function."""
        getattr(update, graph.function)(*arguments)


class Compiled:
    """Runs compiled graphs, which all optimizers of the process share."""

    def packing(
        self, tails: Sequence[Tail], block: Block, shapes: Sequence[Sequence[int]], moments: Sequence[torch.dtype]
    ) -> Packing:
        """By tables of addresses, with Triton on CUDA and C++ on the CPU."""
        if block.p.device.type == "cuda":
            return TablePacking(tails, block, launch_copy)
        copy = cpu_copying.kernel() if block.p.device.type == "cpu" else None
        return ForeachPacking(tails, block, shapes, moments) if copy is None else AddressPacking(tails, block, copy)

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Compile the graph, unless that has been done; raises RuntimeError where no compiler works."""
        lazy = _graph(graph, graph.kind(kind))
        if lazy.code is None:
            _announce(kind)
        lazy.prepare()
        if kind.device.type == "cpu":
            cpu_copying.kernel()

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the compiled code."""
        _graph(graph, graph.kind(kind))(arguments)


def launch_copy(*arguments: Any) -> None:
    """Launch the kernel of ``cuda_copying.py``, see :class:`TablePacking`."""
    from .cuda_copying import copy_pieces  # Triton is there where CUDA is

    *tensors, exact, unpack = arguments
    with torch.cuda.device(tensors[0].device):
        copy_pieces[(tensors[-1].shape[0],)](*tensors, EXACT=exact, UNPACK=unpack, PIECE=PIECE)


@functools.cache
def _graph(graph: Graph, kind: Kind) -> _Lazy:
    return _Lazy(graph, kind)


@functools.cache
def _announce(kind: Kind) -> None:
    """One line per process and kind, since nothing else is heard of a first step for up to a minute."""
    log.info(
        "lamb16 compiles its step for %s (weights %s, gradients %s): seconds where it is cached on disk, else up to a "
        "minute, once per process", kind.device, kind.param_dtype, kind.grad_dtype,
    )  # fmt: skip


COMPILING = threading.RLock()  # one at a time: torch's classes are patched meanwhile


class _Lazy:
    """One graph, compiled when it is first :meth:`prepared <prepare>` or called."""

    def __init__(self, graph: Graph, kind: Kind) -> None:
        self.graph, self.kind = graph, kind
        self.code: Call | None = None

    def prepare(self) -> None:
        with COMPILING:
            if self.code is None:
                self._compile()

    def _compile(self) -> None:
        try:
            with _disable_current_modes():  # Dynamo compiles nothing under a dispatch mode, as FlopCounterMode is one
                self.code = compile_once(self.graph, self.kind)
        except Exception as error:
            raise RuntimeError(
                f"lamb16 could not compile its {self.graph.function} step for {self.kind.device.type} with "
                f"torch.compile ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else error!r}). "
                "Install a working compiler (a C++ compiler for the CPU, Triton for CUDA), or pass compile=False to "
                "run the same step eagerly. Nothing was changed."
            ) from error

    def __call__(self, arguments: tuple[Any, ...]) -> None:
        if self.code is None:
            self.prepare()
        assert self.code is not None
        self.code(arguments)


class Code:
    """Generated code and where its arguments come from."""

    def __init__(self, function: Callable[..., Any], origins: list[Origin], boxed: bool) -> None:
        """``function`` takes arguments of these origins, ``boxed`` in a list."""
        self.function, self.origins, self.boxed = function, origins, boxed
        self.tensors = itemgetter(*(origin.position for origin in self.origins))
        self.numbers = [k for k, origin in enumerate(self.origins) if origin.what != "tensor"]

    def __call__(self, arguments: tuple[Any, ...]) -> None:
        flat = flatten(arguments)
        inputs = list(self.tensors(flat))
        for k in self.numbers:
            inputs[k] = self.origins[k].take(flat)
        if self.boxed:
            self.function(inputs)
        else:
            self.function(*inputs)


def compile_once(graph: Graph, kind: Kind) -> Call:
    """Compile a graph on example inputs.

    The code is called without torch.compile's guards: kinds are told apart where plans are made, and nothing that may
    change around a step (threads, autocast, default dtypes, a reset of Dynamo) changes what the code has to do. Made
    anew for real tensors it would be specialised on their sizes.
    """
    if kept := _kept(graph, kind):
        return kept
    code = _compiled(graph, kind, one_loop=True)
    if graph.function == "update" and not _is_right(code, graph, kind):
        log.warning(
            "lamb16: this version of torch does not make one loop of the step for %s; it is slower in two", kind.device
        )
        code = _compiled(graph, kind, one_loop=False)
    if kind.device.type == "cpu" and isinstance(code, Code) and code.boxed:
        code_cache.save(f"{graph} {kind}", code.function, code.origins)
    return _kept(graph, kind) or code  # the first without the profiler's mark around it, which takes microseconds


def _kept(graph: Graph, kind: Kind) -> Code | None:
    """The code of an earlier process, which was tried on example inputs there."""
    found = code_cache.load(f"{graph} {kind}") if kind.device.type == "cpu" else None
    return found and Code(found[0], [Origin(*origin) for origin in found[1]], boxed=True)


def _compiled(graph: Graph, kind: Kind, one_loop: bool) -> Call:
    return compile_on(example_inputs(graph, kind), graph, kind, one_loop)


def compile_on(arguments: tuple[Any, ...], graph: Graph, kind: Kind, one_loop: bool = True) -> Call:
    """Compile a graph on these :func:`example_inputs`, which it is called with."""
    from .inductor import cpu_help, options  # which imports Inductor

    flat = flatten(arguments)
    found: list[Code] = []

    def backend(module: Any, examples: list[Any]) -> Callable[..., Any]:
        with cpu_help():
            code = torch._inductor.compile(module, examples, options=options(kind.device, one_loop))

        def first_call(*received: Any) -> Any:
            with generated_calls() as calls:
                result = code(*received)
            try:
                ((generated, inputs, returned),) = calls
                if returned:  # which AOTAutograd is to make something of
                    raise ValueError
                found.append(Code(generated, [Origin.of(x, flat) for x in inputs], boxed=True))
            except ValueError:  # this version of torch calls it in another way
                found.append(Code(code, [Origin.of(x, flat) for x in received], boxed=False))
            flat.clear()  # Dynamo keeps this function, which is not to keep the example inputs
            calls.clear()
            return result

        return first_call

    function = _own_code(getattr(update, graph.function))
    # A function is compiled in several forms: what differs between them is not to become dynamic.
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    return found[0] if found else lambda given: function(*given)  # torch.compiler.set_stance, TORCHDYNAMO_DISABLE


@contextlib.contextmanager
def generated_calls() -> Iterator[list[tuple[Callable[..., Any], list[Any], Any]]]:
    """Collects the calls of generated code: what is called, the list of its arguments, what it returns.

    Called directly it takes a quarter of the time that it takes through AOTAutograd, which does for us only one thing
    more: it marks what is written to as changed. That is left to the plan.
    """
    from torch._inductor.output_code import CompiledFxGraph

    calls: list[tuple[Callable[..., Any], list[Any], Any]] = []
    original = CompiledFxGraph.__call__

    def call(self: Any, inputs: Any) -> Any:
        given = list(inputs)
        returned = original(self, inputs)
        calls.append((self, given, returned))
        return returned

    with mock.patch.object(CompiledFxGraph, "__call__", call):
        yield calls


def _is_right(code: Call, graph: Graph, kind: Kind) -> bool:
    """Whether the code of an update does to random inputs, in place, what the function itself does."""
    first, second = (_random_inputs(graph, kind) for _ in range(2))
    code(first)
    getattr(update, graph.function)(*second)
    pairs = zip(flatten(first), flatten(second), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))


def _random_inputs(graph: Graph, kind: Kind) -> tuple[Any, ...]:
    """Arguments of an update whose blocks are written to where they are read; the same every time."""
    blocks, floats, integers, *others = example_inputs(graph, kind)
    generator = torch.Generator().manual_seed(0)
    for x in (*flatten([block[:4] for block in blocks]), *floats):
        values = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        x.copy_(values * 120 if x.dtype == torch.uint8 else values)
    for x in integers:
        x.fill_(-1)
    for block in blocks:
        if block.length is not None:
            block.length.fill_(PIECE - 56)
    in_place = [
        block._replace(new_p=block.p, new_m=block.m, new_v=block.v, new_remainder=block.remainder) for block in blocks
    ]
    return in_place, floats, integers, *others


class Origin(NamedTuple):
    """Where an argument of generated code comes from: a tensor among the flattened arguments, or a number of one."""

    position: int
    what: str  # "tensor", "size" or "stride"
    dim: int

    @classmethod
    def of(cls, received: Any, flat: list[Any]) -> Origin:
        """Found by identity, and numbers by value: example inputs have equal ones only where all arguments do."""
        tensors = [(i, x) for i, x in enumerate(flat) if isinstance(x, Tensor)]
        if isinstance(received, Tensor):
            for i, x in tensors:
                if x is received:
                    return cls(i, "tensor", 0)
            raise ValueError("an argument is none of the graph's")
        for what in ("size", "stride"):
            for i, x in tensors:
                for dim in range(x.dim()):
                    if getattr(x, what)(dim) == int(received):
                        return cls(i, what, dim)
        raise ValueError(f"no argument is, or has the size or stride {received}")

    def take(self, flat: list[Any]) -> Any:
        """The argument for these flattened arguments."""
        x = flat[self.position]
        if self.what == "tensor":
            return x
        return x.size(self.dim) if self.what == "size" else x.stride(self.dim)


def flatten(arguments: Any) -> list[Any]:
    """What nested lists and tuples hold, in order."""
    flat: list[Any] = []
    for x in arguments:
        if type(x) is not Tensor and isinstance(x, (list, tuple)):
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


def example_inputs(graph: Graph, kind: Kind) -> tuple[Any, ...]:
    """Arguments of the right kinds, every varying size different from every other and marked dynamic."""
    device, count = kind.device, kind.reading_group if graph.function == "inspect" else kind.group
    count = 1 if graph.packed else count
    tensors, slots, chunks, rows = 6, 7, 11, 3
    sizes = [rows + 2 * k for k in range(count)]
    if device.type != "cpu" and not (graph.packed or graph.spread or kind.caution):
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
        width = PIECE if graph.packed else ROW
        p, g, m, v, *remainder = (dynamic(size, width, dtype=dtype) for dtype in kind.dtypes)
        new_p, new_m, new_v, *new = (dynamic(size, width, dtype=x.dtype) for x in (p, m, v, *remainder))
        places = [dynamic(size, dtype=torch.int64), *(dynamic(size, 1, dtype=torch.int32) for _ in range(2))]
        return Block(p, g, m, v, new_p, new_m, new_v, *(places if graph.packed else [None] * 3), *remainder, *new)

    def sums(size: int) -> Sums:
        return Sums.of(lambda: unaligned(size, torch.int32), kind.caution, kind.exact)

    if graph.function == "inspect":
        unit = torch.zeros(2, dtype=torch.float32, device=device) if graph.squares else None
        return (
            [block(n) for n in sizes],
            [[unaligned(n, torch.int32) for _ in range(1 + (graph.squares or kind.exact))] for n in sizes],
            unit,
        )
    if graph.function == "update":
        tables = [[row_or_table(k, x) for _ in sizes] for k, x in ((FLOATS, torch.float32), (INTEGERS, torch.int32))]
        places = None
        if graph.spread:
            places = [Spread(row_or_table(2, torch.float64), row_or_table(2, torch.int32)) for _ in sizes]
        blocks, found = [block(n) for n in sizes], [sums(n) for n in sizes]
        return blocks, *tables, update.make_columns(device), found, places, kind.rounding == "stochastic"
    float32, int32, int64 = torch.float32, torch.int32, torch.int64
    tree = Tree(
        dynamic(chunks, 1, dtype=int64), dynamic(chunks, 1, dtype=int64), dynamic(13, dtype=int64),
        dynamic(tensors, 1, dtype=int64), dynamic(tensors, 1, dtype=int64), dynamic(17, dtype=int64),
    )  # fmt: skip
    home = dynamic(tensors, dtype=int64)
    state = State._make([*columns(slots, 4, float32), *columns(slots, 2, int32), *columns(slots, 4, int64), home])
    if graph.function == "scale":
        inputs = Inputs(
            unaligned(19, int32), tree, dynamic(tensors, len(NUMBERS), dtype=torch.float64),
            dynamic(tensors, dtype=torch.float64), dynamic(tensors, dtype=int32),
            number(torch.float64), number(float32), unaligned(19, int32) if kind.exact else None,
        )  # fmt: skip
        outputs = Outputs(
            columns(tensors, FLOATS, float32), columns(tensors, INTEGERS, int32), columns(tensors, 3, torch.float64),
            dynamic(tensors, dtype=torch.bool), number(int64),
        )  # fmt: skip
        return inputs, state, outputs, kind.float8
    return sums(19), tree, dynamic(tensors, dtype=torch.bool), dynamic(tensors, dtype=int64), state, kind.float8
