"""Code for one graph of the step: compiled on example inputs, or loaded, tried, and called without guards."""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import code_cache, update
from .examples import example_inputs, flatten, random_inputs
from .kinds import Graph, Kind
from .recording import Launches, Program, record

log = logging.getLogger(__name__)

Call = Callable[[tuple[Any, ...]], Any]  # of a step function, with its arguments


class Code:
    """Generated code and where its arguments come from."""

    def __init__(self, function: Callable[..., Any], origins: list[Origin], boxed: bool) -> None:
        """``function`` takes arguments of these origins, ``boxed`` in a list."""
        self.function, self.origins, self.boxed = function, origins, boxed
        self.tensors = itemgetter(*(origin.position for origin in self.origins))
        self.numbers = [k for k, origin in enumerate(self.origins) if origin.what != "tensor"]
        self.launches: Launches | None = None

    def inputs(self, arguments: tuple[Any, ...]) -> list[Any]:
        """What the function is handed for these arguments of the step function."""
        flat = flatten(arguments)
        inputs = list(self.tensors(flat))
        for k in self.numbers:
            inputs[k] = self.origins[k].value(flat)
        return inputs

    def __call__(self, arguments: tuple[Any, ...]) -> None:
        inputs = self.inputs(arguments)
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
    code: Call | None = _kept(graph, kind)
    if code is None:
        code = _compiled(graph, kind, one_loop=True)
        if graph.function == "update" and not _is_right(code, graph, kind):
            log.warning(
                "lamb16: this version of torch does not make one loop of the step for %s; it is slower in two",
                kind.device,
            )
            code = _compiled(graph, kind, one_loop=False)
        if kind.device.type == "cpu" and isinstance(code, Code) and code.boxed:
            code_cache.save(f"{graph} {kind}", code.function, code.origins)
        code = _kept(graph, kind) or code  # the first without the profiler's mark around it, which takes microseconds
    if isinstance(code, Code) and code.boxed:
        code.launches = _launches(code, graph, kind)
    return code


def _launches(code: Code, graph: Graph, kind: Kind) -> Launches | None:
    """What the code launches; None, with a warning, where launching that does not do what the code does."""
    try:
        first, second = (random_inputs(graph, kind) for _ in range(2))
        call = code.function if hasattr(code.function, "__func__") else generated_call(code.function)
        found = record(call, code.inputs(second))
        program = Program(kind.device)
        program.add("", found, code.inputs(second))
        program.finish()
        code(first)
        program.run("")
        pairs = zip(flatten(first), flatten(second), strict=True)
        if all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor)):
            return found
        reason = "what is recorded does something else"
    except Exception as error:  # whatever it is, the code can be called
        reason = repr(error)
    warn_once(f"lamb16: the step's launches cannot be recorded with this version of torch; it is slower ({reason})")
    return None


@functools.cache
def warn_once(text: str) -> None:
    """Once per process."""
    log.warning(text)


def generated_call(code: Any) -> Any:
    """The method that a ``CompiledFxGraph`` calls, behind what copies tensors that are not aligned."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.load(code.source_code).call


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

    function = _own_code(update.FUNCTIONS[graph.function])
    # A function is compiled in several forms: what differs between them is not to become dynamic.
    with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    return found[0] if found else lambda inputs: function(*inputs)  # torch.compiler.set_stance, TORCH_COMPILE_DISABLE


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
        arguments = list(inputs)
        returned = original(self, inputs)
        calls.append((self, arguments, returned))
        return returned

    with mock.patch.object(CompiledFxGraph, "__call__", call):
        yield calls


def _is_right(code: Call, graph: Graph, kind: Kind) -> bool:
    """Whether the code of an update does to random inputs, in place, what the function itself does."""
    first, second = (random_inputs(graph, kind) for _ in range(2))
    code(first)
    update.FUNCTIONS[graph.function](*second)
    pairs = zip(flatten(first), flatten(second), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor))


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

    def value(self, flat: list[Any]) -> Any:
        """The argument for these flattened arguments."""
        x = flat[self.position]
        if self.what == "tensor":
            return x
        return x.size(self.dim) if self.what == "size" else x.stride(self.dim)


def _own_code(function: Callable[..., None]) -> Callable[..., None]:
    """A copy with a code object of its own, and so with a compile cache of its own."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
