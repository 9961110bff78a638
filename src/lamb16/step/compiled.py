"""The step functions, run eagerly or as compiled graphs: the executors.

A *graph* is a step function for large or for packed blocks, with global indices or without. A *kind* is what a graph is
specialised on: device type, dtypes, how the moments are stored, caution. Everything else (sizes, number of tensors,
hyperparameters, step counts) is dynamic, so each graph is compiled once per process. It is compiled on small example
inputs before it ever touches real tensors: a compiler that fails leaves no half-made step. On CPUs code that an earlier
process made is loaded in its place (``code_cache.py``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import native
from .blocks import PACKED_ROW, Block, memory
from .graph_code import Call, Code, compile_once, warn_once
from .kinds import Graph, Kind
from .recording import Program
from .waiting import WAIT


class Executor(Protocol):
    """What runs the step functions of an optimizer; a tool may hand in one of its own as ``Lamb16(compile=...)``."""

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Called before anything is changed, for every graph that a step will run; RuntimeError where it cannot."""

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the step function."""

    def copy(self, table: Tensor, block: Block, operands: Sequence[int], unpack: bool) -> None:
        """Copy operands of packed rows into their buffer, where the padding becomes 0, or all but gradients back.

        ``table`` [operands, tensors] int64 has the addresses, on the block's device; 0: nothing is copied. The operands
        are 0 for weights, 1 for gradients, 2 and 3 for the moments, 4 for remainders.
        """


class Compiled:
    """Runs compiled graphs, which all optimizers of the process share."""

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Compile the graph, unless that has been done; raises RuntimeError where no compiler works."""
        lazy = _graph(graph, graph.kind(kind))
        with WAIT:
            if lazy.code is None:
                WAIT.begin(kind)
            lazy.prepare()

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the compiled code."""
        _graph(graph, graph.kind(kind))(arguments)

    def copy(self, table: Tensor, block: Block, operands: Sequence[int], unpack: bool) -> None:
        """With a native call for each operand, on CUDA with a launch for all, when it is the gradients' turn."""
        if block.p.is_cuda:
            if 1 in operands:
                launch_copy(table, block, unpack)
            return
        for k in operands:
            if k != 1 or not unpack:
                native.library().copy_rows(*native.copy_arguments(table, block, k, unpack))

    def record(
        self, program: Program, part: str, graph: Graph, kind: Kind, arguments: tuple[Any, ...], guard: int
    ) -> bool:
        """Add the launches of a call to a program, if they are known; see :meth:`Program.add`."""
        code = _graph(graph, graph.kind(kind)).code
        if not isinstance(code, Code) or code.launches is None:
            return False
        program.add(part, code.launches, code.inputs(arguments), guard)
        return True


def launch_copy(table: Tensor, block: Block, unpack: bool) -> None:
    """Launch the kernel of ``cuda_copying.py``; without remainders the codes stand for them."""
    from .cuda_copying import copy_packed_rows  # Triton is there where CUDA is

    buffers, exact = memory(block), block.remainder is not None
    buffers += [buffers[3]] * (5 - len(buffers))
    places = block.tensor_index, block.start, block.length
    grid, width = (len(block.p),), table.shape[1]
    with torch.cuda.device(block.p.device) if block.p.is_cuda else contextlib.nullcontext():
        copy_packed_rows[grid](table, *buffers, *places, width, EXACT=exact, UNPACK=unpack, PACKED_ROW=PACKED_ROW)


@functools.cache
def _graph(graph: Graph, kind: Kind) -> _Lazy:
    return _Lazy(graph, kind)


class _Lazy:
    """One graph, compiled when it is first :meth:`prepared <prepare>` or called."""

    def __init__(self, graph: Graph, kind: Kind) -> None:
        self.graph, self.kind = graph, kind
        self.code: Call | None = None

    def prepare(self) -> None:
        with WAIT:  # one at a time: torch's classes are patched meanwhile
            if self.code is None:
                self._compile()

    def _compile(self) -> None:
        usual = inductor_compiles()
        try:
            if self.kind.device.type == "cpu" and usual:
                from torch._inductor.cpp_builder import get_cpp_compiler

                get_cpp_compiler()  # which Inductor would miss only after it has made the code
            with _disable_current_modes():  # Dynamo compiles nothing under a dispatch mode, as FlopCounterMode is one
                with contextlib.nullcontext() if self.kind.device.type == "cpu" else contextlib.suppress(Exception):
                    native.library()  # on CUDA it only saves time
                self.code = compile_once(self.graph, self.kind)
        except Exception as error:
            cause = getattr(error, "inner_exception", error)  # of Dynamo's and Inductor's own errors
            raise RuntimeError(
                f"lamb16 could not compile its {self.graph.function} step for {self.kind.device.type} with "
                f"torch.compile ({type(cause).__name__}: "
                f"{str(cause).strip().splitlines()[0] if str(cause).strip() else repr(cause)}). "
                f"{_needed(self.kind.device)}, or pass compile=False to run the same step eagerly. Nothing was changed."
            ) from error

    def __call__(self, arguments: tuple[Any, ...]) -> None:
        if self.code is None:
            self.prepare()
        assert self.code is not None
        self.code(arguments)


def inductor_compiles() -> bool:
    """Whether ``torch.compile`` does its usual work; where a switch of torch's turns it off, one warning says which.

    Raises:
        RuntimeError: a switch forbids to compile.
    """
    from torch._dynamo import config
    from torch._dynamo.eval_frame import _stance

    stance, backend = _stance.stance, _stance.backend
    if stance == "fail_on_recompile":
        raise RuntimeError(
            'lamb16 compiles in its first step, which torch.compiler.set_stance("fail_on_recompile") forbids. Take a '
            "step before, or pass compile=False to run the same step eagerly. Nothing was changed."
        )
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        off = "TORCHDYNAMO_DISABLE"
    elif config.disable:
        off = "TORCH_COMPILE_DISABLE or torch._dynamo.config.disable"
    elif stance != "default" or backend is not None:
        off = f"torch.compiler.set_stance({stance!r}{f', force_backend={backend!r}' if backend else ''})"
    else:
        return True
    warn_once(f"lamb16: torch.compile is turned off ({off}); steps are eager, with the same bits, and slower")
    return False


def _needed(device: torch.device) -> str:
    """Which compilers torch.compile looks for, and how they are installed."""
    if device.type == "cuda":
        return (
            f"It takes Triton (pip install triton) and a C compiler, which is {os.environ.get('CC', 'gcc or clang')} "
            "(CC names another one): install what is missing (Debian, Ubuntu: apt install gcc)"
        )
    from torch._inductor import config

    cxx = config.cpp.cxx if sys.platform != "win32" else os.environ.get("CXX", "cl")
    name = " or ".join(filter(None, [cxx] if isinstance(cxx, str) else cxx))
    return (
        f"It takes a C++ compiler that works, and looks for {name} (CXX names another one): install it (Debian, "
        "Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
    )
