"""The C++ that Inductor generates for the step, for either instruction set: nothing is compiled or run."""

from __future__ import annotations

import contextlib
import functools
import re
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._inductor import cpu_vec_isa
from torch._inductor.graph import GraphLowering

from lamb16.step import examples, graph_code, inductor
from lamb16.step.kinds import Graph, Kind

ISAS = {"avx2": cpu_vec_isa.VecAVX2, "avx512": cpu_vec_isa.VecAVX512}


@functools.cache
def generate(graph: Graph, kind: Kind, isa: str, *, helped: bool = True, one_loop: bool = True) -> str:
    """The generated code, made once for the same arguments; without ``helped`` as Inductor gives it."""
    found: list[str] = []

    def compile_to_module(lowering: Any) -> Any:
        found.append(lowering.codegen()[0].value)
        return SimpleNamespace(call=lambda arguments: ())

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", compile_to_module))
        stack.enter_context(mock.patch.object(cpu_vec_isa, "pick_vec_isa", return_value=ISAS[isa]()))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        if not helped:
            stack.enter_context(mock.patch.object(inductor, "cpu_help", contextlib.nullcontext))
        graph_code.compile_on(examples.example_inputs(graph, kind), graph, kind, one_loop)
    (code,) = found
    return code


def kernel(code: str) -> str:
    """The C++ source in generated code."""
    start = code.index("r'''") + 4
    return code[start : code.index("'''", start)]


def nests(source: str) -> list[str]:
    """The loop nests of a C++ source, each from the pragma that spreads it over threads."""
    return source.split("#pragma omp for")[1:]


def innermost(nest: str) -> str:
    """The body of a nest's innermost loop."""
    lines = nest.split("\n")
    k = max(k for k, line in enumerate(lines) if re.match(r" *for\(int64_t", line))
    indent = re.match(" *", lines[k])[0]
    return "\n".join(lines[k : lines.index(indent + "}", k)])
