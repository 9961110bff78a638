"""What generated code launches, recorded once, so that it can be launched again by addresses and numbers alone.

The wrapper that Inductor generates around kernels takes tensors apart at every call: it reads sizes, checks them,
allocates temporaries and hands each kernel its arguments. :func:`record` runs it once with marks in place of tensors;
what kernels are handed then are :class:`Launches`: each argument is one of the inputs, a temporary, or a number that
follows from sizes. A :class:`Program` has launches with the addresses of real tensors filled in, or with the places at
which these addresses stand when it is run. It keeps no tensor alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .native import MOST_ARGUMENTS, library

ALIGNMENT = 64  # bytes


class Unrecordable(Exception):
    """Generated code does what cannot be recorded."""


class Mark(NamedTuple):
    """In place of a tensor: an input (by its position) or a temporary, from an offset in bytes on."""

    temporary: bool
    number: int
    itemsize: int
    offset: int = 0


class Number(int):
    """A number that generated code is handed, or computes from such: ``of`` computes it from other inputs."""

    of: Callable[[Sequence[Any]], int]

    @classmethod
    def make(cls, now: int, of: Callable[[Sequence[Any]], int]) -> Number:
        """``now`` it is this one."""
        found = cls(now)
        found.of = of
        return found


def _value(x: int, inputs: Sequence[Any]) -> int:
    return x.of(inputs) if isinstance(x, Number) else int(x)


def _operation(function: Callable[[int, int], int]) -> tuple[Callable[..., Number], Callable[..., Number]]:
    def compute(x: int, y: int) -> Number:
        return Number.make(function(int(x), int(y)), lambda inputs: function(_value(x, inputs), _value(y, inputs)))

    return compute, lambda x, y: compute(y, x)


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _prefix, _method in zip(("__", "__r"), _operation(getattr(operator, _name)), strict=True):
        setattr(Number, f"{_prefix}{_name}__", _method)


class Launches(NamedTuple):
    """The launches of one call of generated code, by its inputs."""

    kernels: list[tuple[Any, list[Any]]]  # what is called, and of each argument a Mark or an int
    temporaries: list[tuple[list[int], int]]  # shape and item size

    def bytes(self, inputs: Sequence[Any]) -> list[int]:
        """How many bytes each temporary takes, for these inputs."""
        found = []
        for shape, size in self.temporaries:
            for n in shape:
                size *= _value(n, inputs)
            found.append(-(-size // ALIGNMENT) * ALIGNMENT)
        return found


def record(call: Any, inputs: Sequence[Any]) -> Launches:
    """Run the bound method ``call`` of a generated module on tensors and numbers, but launch nothing.

    Raises:
        Unrecordable: it does more than to launch kernels on tensors and numbers.
    """
    found = Launches([], [])
    marks: list[Any] = []
    for k, x in enumerate(inputs):
        own = Mark(False, k, x.element_size()) if isinstance(x, Tensor) else Number.make(x, operator.itemgetter(k))
        marks.append(own)
    replaced = dict(call.__func__.__globals__)
    stubs: dict[str, Any] = {
        "assert_size_stride": _nothing,
        "assert_size_stride_grouped": _nothing,
        "assert_alignment": _nothing,
    }
    stubs |= {"reinterpret_tensor": _reinterpreted, "get_raw_stream": lambda _: 0}
    for name, value in replaced.items():
        if name.startswith("empty_strided"):
            stubs[name] = lambda shape, _, dtype: _temporary(found, shape, dtype)
        elif name in call.__func__.__code__.co_names and (kernel := _kernel(value)) is not None:
            stubs[name] = _Recorder(found, kernel)
    function = types.FunctionType(call.__func__.__code__, replaced | stubs)
    try:
        returned = function(call.__self__, marks)
    except Exception as error:
        raise Unrecordable(repr(error)) from error
    if returned != () or not found.kernels:
        raise Unrecordable(f"returned {returned!r} after {len(found.kernels)} launches")
    return found


class _Recorder:
    """In place of a kernel."""

    def __init__(self, found: Launches, kernel: Any) -> None:
        self.found, self.kernel = found, kernel

    def __call__(self, *arguments: Any, stream: Any = None) -> None:
        wrong = [x for x in arguments if not (isinstance(x, (Mark, int)) and not isinstance(x, bool))]
        if wrong or (stream is None and len(arguments) > MOST_ARGUMENTS):
            raise Unrecordable(f"a kernel is handed {wrong or len(arguments)}")
        self.found.kernels.append((self.kernel, list(arguments)))

    run = __call__


def _kernel(value: Any) -> Any:
    """What launches a kernel of a generated module: the address of native code, or the object itself if it is Triton's.

    None for what is no kernel.
    """
    file = getattr(getattr(value, "__self__", None), "__file__", None)
    if isinstance(value, types.BuiltinFunctionType) and file is not None:
        return ctypes.cast(ctypes.CDLL(file).kernel, ctypes.c_void_p).value
    return value if hasattr(value, "run") and hasattr(value, "fn") else None


def _nothing(*_: Any) -> None:
    pass


def _temporary(found: Launches, shape: Sequence[int], dtype: torch.dtype) -> Mark:
    found.temporaries.append((list(shape), dtype.itemsize))
    return Mark(True, len(found.temporaries) - 1, dtype.itemsize)


def _reinterpreted(x: Mark, _shape: Any, _stride: Any, offset: int = 0) -> Mark:
    return x._replace(offset=x.offset + int(offset) * x.itemsize)


class Place:
    """A contiguous tensor whose address stands somewhere when a program is run."""

    def __init__(self, at: int, *shape: int) -> None:
        """``at`` is where the address stands."""
        self.at, self.shape = at, shape

    def size(self, dim: int) -> int:
        """As of a tensor."""
        return self.shape[dim]

    def stride(self, dim: int) -> int:
        """As of a tensor."""
        stride = 1
        for n in self.shape[dim + 1 :]:
            stride *= n
        return stride


class Program:
    """Launches one after the other, in parts that are run by themselves.

    On the CPU one native call walks a part. On CUDA what Triton made of a kernel is called with integers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, Tensor] = {}
        self.walks: dict[tuple[str, ...], tuple[Tensor, int, int]] = {}  # where parts that are run together are
        self.words: dict[str, list[int]] = {}
        self.calls: dict[str, list[tuple[Any, list[int], list[tuple[int, int, int]]]]] = {}
        self.walk: Any = None
        self.bytes = 0  # of temporaries, which follow one another in the same memory
        self.arena = torch.zeros(1, dtype=torch.int64)  # where that is

    def add(self, part: str, launches: Launches, inputs: Sequence[Any], guard: int = 0) -> None:
        """Launch these with tensors, places and numbers, unless at the address ``guard`` there is 0."""
        offsets, end = [], 0
        for size in launches.bytes(inputs):
            offsets.append(end)
            end += size
        self.bytes = max(self.bytes, end)
        for kernel, arguments in launches.kernels:
            self.launch(part, kernel, [self._argument(x, inputs, offsets) for x in arguments], guard)

    def launch(self, part: str, kernel: Any, arguments: list[tuple[int, int]], guard: int = 0) -> None:
        """Launch one kernel; an argument is the address of what it begins with, or 0, and what is added to that."""
        if isinstance(kernel, int):
            words = self.words.setdefault(part, [])
            words += [guard, kernel, len(arguments)]
            for argument in arguments:
                words += argument
            return
        holes = [(k, *argument) for k, argument in enumerate(arguments) if argument[0]]
        self.calls.setdefault(part, []).append((kernel, [added for _, added in arguments], holes))

    def then(self, part: str, function: Callable[[], None]) -> None:
        """Call this."""
        self.calls.setdefault(part, []).append((lambda stream: function(), [], []))

    def _argument(self, x: Any, inputs: Sequence[Any], offsets: Sequence[int]) -> tuple[int, int]:
        if not isinstance(x, Mark):
            return 0, _value(x, inputs)
        if x.temporary:
            return self.arena.data_ptr(), offsets[x.number] + x.offset
        found = inputs[x.number]
        return (found.at, x.offset) if isinstance(found, Place) else (0, found.data_ptr() + x.offset)

    def finish(self) -> None:
        """Nothing more is added."""
        self.memory = torch.empty(self.bytes + ALIGNMENT, dtype=torch.uint8, device=self.device)
        self.arena.fill_(-(-self.memory.data_ptr() // ALIGNMENT) * ALIGNMENT)
        for part, words in self.words.items():
            self.parts[part] = torch.tensor(words)
        self.words = {}
        if self.calls:
            self.fill()
        elif self.parts:
            self.walk = library().walk

    def fill(self) -> None:
        """Read the addresses anew, on CUDA."""
        for calls in self.calls.values():
            for _, arguments, holes in calls:
                for k, at, added in holes:
                    arguments[k] = ctypes.c_int64.from_address(at).value + added

    def run(self, *parts: str) -> None:
        """Launch what these parts have; on the CPU nothing of Python runs in between."""
        if self.parts:
            if parts not in self.walks:
                there = [x for part in parts if (x := self.parts.get(part)) is not None]
                table = torch.tensor([(x.data_ptr(), x.data_ptr() + x.nbytes) for x in there], dtype=torch.int64)
                self.walks[parts] = table, table.data_ptr(), len(there)
            self.walk(*self.walks[parts][1:])
        if self.calls:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                self._call(parts)

    def _call(self, parts: Sequence[str]) -> None:
        for part in parts:
            stream = torch._C._cuda_getCurrentRawStream(self.device.index or 0)
            for kernel, arguments, _ in self.calls.get(part, ()):
                launcher(kernel)(*arguments, stream=stream)


def launcher(kernel: Any) -> Any:
    """What launches a kernel of Triton's: the only one there is, once it has been compiled and chosen.

    A function of :meth:`Program.then` is called as it is.
    """
    if isinstance(kernel, types.FunctionType):
        return kernel
    launchers: list[Any] = list(getattr(kernel, "launchers", ()))
    return launchers[0] if len(launchers) == 1 else kernel.run
