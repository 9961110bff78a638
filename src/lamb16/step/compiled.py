"""The step functions, run eagerly or as compiled graphs: the executors.

A *graph* is a step function for large or for packed blocks, with global indices or without. A *kind* is what a graph is
specialised on: device type, dtypes, how the moments are stored, caution. Everything else (sizes, number of tensors,
hyperparameters, step counts) is dynamic, so each graph is compiled once per process. It is compiled on small example
inputs before it ever touches real tensors: a compiler that fails leaves no half-made step. On CPUs code that an earlier
process made is loaded in its place (``code_cache.py``).
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import cpu_copying, update
from .blocks import PACKED_ROW, Block
from .graph_code import Call, compile_once
from .kinds import Graph, Kind
from .packing import AddressPacking, ForeachPacking, PackedRows, Packing, TablePacking

log = logging.getLogger(__name__)


class Executor(Protocol):
    """What runs the step functions of an optimizer; a tool may hand in one of its own as ``Lamb16(compile=...)``."""

    def packing(
        self,
        packed_rows: Sequence[PackedRows],
        block: Block,
        shapes: Sequence[Sequence[int]],
        moments: Sequence[torch.dtype],
    ) -> Packing:
        """What copies packed tensors into a block and back; arguments as of :class:`ForeachPacking`."""

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Called before anything is changed, for every graph that a step will run; RuntimeError where it cannot."""

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the step function."""


class Eager:
    """Runs the functions as they are."""

    def packing(
        self,
        packed_rows: Sequence[PackedRows],
        block: Block,
        shapes: Sequence[Sequence[int]],
        moments: Sequence[torch.dtype],
    ) -> Packing:
        """By torch's own functions."""
        return ForeachPacking(packed_rows, block, shapes, moments)

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Nothing to do."""

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the function."""
        update.FUNCTIONS[graph.function](*arguments)


class Compiled:
    """Runs compiled graphs, which all optimizers of the process share."""

    def packing(
        self,
        packed_rows: Sequence[PackedRows],
        block: Block,
        shapes: Sequence[Sequence[int]],
        moments: Sequence[torch.dtype],
    ) -> Packing:
        """By tables of addresses, with Triton on CUDA and C++ on the CPU."""
        if block.p.device.type == "cuda":
            return TablePacking(packed_rows, block, launch_copy)
        copy = cpu_copying.kernel() if block.p.device.type == "cpu" else None
        return (
            ForeachPacking(packed_rows, block, shapes, moments)
            if copy is None
            else AddressPacking(packed_rows, block, copy)
        )

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
    from .cuda_copying import copy_packed_rows  # Triton is there where CUDA is

    *tensors, exact, unpack = arguments
    with torch.cuda.device(tensors[0].device):
        copy_packed_rows[(tensors[-1].shape[0],)](*tensors, EXACT=exact, UNPACK=unpack, PACKED_ROW=PACKED_ROW)


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
