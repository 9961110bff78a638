"""The generated CUDA kernels in Triton's interpreter, as the executor of a Lamb16 on CPU tensors.

Run by test_cuda.py in a process of its own, since TRITON_INTERPRET must be set before Triton is imported:

    TRITON_INTERPRET=1 python tests/interpreted.py GENERATED.pickle

Prints one line of JSON per case: its name and "ok", or what differs from the slow reference.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from helpers import (
    all_params,
    assert_follows_reference,
    assert_matches,
    assert_same,
    gradients,
    hyper_of,
    missing,
    parameters,
    snapshot,
    step_with,
)
from helpers import follow as follow_reference
from lamb16 import Lamb16, reference
from lamb16.lab.cuda import fake
from lamb16.lab.cuda.kernels import Program
from lamb16.parameters import tensor_salt
from lamb16.step.blocks import Block, State, Sums
from lamb16.step.compiled import launch_copy
from lamb16.step.eager import Eager
from lamb16.step.kinds import Graph, Kind
from lamb16.step.rows import Rows

SHAPES = ((7, 3), (2100,), (5, 5, 41), (), (1024,), (0,))
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "other numbers, no nesterov": {"weight_decay": 0.3, "trust_lr": 0.1, "betas": (0.5, 0.95), "nesterov": False},
    "no bias correction, maximize": {"bias_correction": False, "maximize": True, "lr": 0.3},
    "no clip, no bound, eps": {"trust_clip": 100.0, "trust_scale": 1.0, "betas": (0.99, 0.9), "eps": 1e-3},
    "caution": {"caution": True, "weight_decay": 0.01},
}


class Interpreted:
    """An executor that runs generated code for CUDA in Triton's interpreter."""

    def __init__(self, generated: dict[tuple[Graph, Kind, int], fake.Generated]) -> None:
        with fake.device(90):
            self.programs = {key: Program(key[0].name, code) for key, code in generated.items()}

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """The code is there."""

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Run the kernels."""
        key = graph, graph.kind(kind)._replace(device=torch.device("cuda"))
        group = kind.group if (*key, kind.group) in self.programs else 16
        self.programs[(*key, group)](*arguments, interpret=True)

    def copy(self, table: torch.Tensor, block: Block, operands: Sequence[int], unpack: bool) -> None:
        """Run the copying kernel."""
        if 1 in operands:
            launch_copy(table, block, unpack)


def main(file: str) -> None:
    """Check all cases with the code in a file that test_cuda.py wrote."""
    from triton.runtime.interpreter import InterpretedFunction

    from lamb16.step.cuda_copying import copy_packed_rows

    assert isinstance(copy_packed_rows, InterpretedFunction), "set TRITON_INTERPRET=1"
    with open(file, "rb") as source:
        executor = Interpreted(pickle.load(source))
    library = "torch._inductor.runtime.triton_helpers.libdevice"
    functions = {"pow": np.power, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x)}
    for name, function in functions.items():
        mock.patch(f"{library}.{name}", numpys(function)).start()
    without = missing([name for options in CASES.values() for name in options], "moment_dtype", "param_rounding")
    assert not without, f"no case has {without}"
    with mock.patch.object(Kind, "group", 1):  # of more the interpreter makes many times the work
        for name, options in CASES.items():
            report(name, lambda options=options: follow(executor, options))
        report("a non-finite gradient", lambda: skips(executor))
        report("gradient scaling", lambda: scaled(executor))
        report("clipped gradients", lambda: clipped(executor))
        report("a wrong reference is noticed", lambda: wrong(executor))
        report("more rows than a chunk has", lambda: folded(executor))
    with mock.patch.object(Kind, "group", 16):
        report("more tensors than a group has", lambda: many(executor))


def numpys(function: Callable[..., Any]) -> Callable[..., Any]:
    """A numpy function for the interpreter, which has no libdevice; of float64 here."""
    from triton.language import core
    from triton.runtime.interpreter import TensorHandle

    def call(*arguments: Any) -> Any:
        first = arguments[0]
        values = function(*(x.handle.data for x in arguments))
        return core.tensor(TensorHandle(values, first.handle.dtype), first.type)

    return call


def report(name: str, check: Callable[[], None]) -> None:
    """Print how a case went."""
    try:
        check()
    except AssertionError as error:
        print(json.dumps([name, f"differs: {error}"]), flush=True)
    else:
        print(json.dumps([name, "ok"]), flush=True)


def make(executor: Interpreted, options: dict[str, Any]) -> Lamb16:
    named = [(str(i), p) for i, p in enumerate(parameters(SHAPES))]
    return Lamb16(named, **{"lr": 0.01} | options, compile=executor)


def follow(executor: Interpreted, options: dict[str, Any]) -> None:
    """Two steps, bit for bit."""
    assert_follows_reference(make(executor, options), steps=2)


def skips(executor: Interpreted) -> None:
    """A tensor of each kind with an inf or a NaN is left as it was; the others move; the next step goes on."""
    optimizer = make(executor, {"weight_decay": 0.1})
    params = optimizer.param_groups[0]["params"]
    assert_follows_reference(optimizer, steps=2)
    before = [p.detach().clone() for p in params]
    for i, (p, g) in enumerate(zip(params, gradients(params, 9), strict=True)):
        p.grad = g
        if i in (1, 2):
            p.grad.view(-1)[-1] = (torch.inf, torch.nan)[i - 1]
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    assert moved == [p.numel() > 0 and i not in (1, 2) for i, p in enumerate(params)], moved
    assert optimizer.skipped == 2, optimizer.skipped


def many(executor: Interpreted) -> None:
    """Two groups of large tensors."""
    optimizer = Lamb16(parameters([(2, 1024)] * 17), lr=0.01, weight_decay=0.1, compile=executor)
    assert_follows_reference(optimizer, steps=1)


def folded(executor: Interpreted) -> None:
    """The sums of a tensor with many rows, of one that keeps what it has and of one whose other rank keeps it."""
    kind, sizes = Kind(torch.device("cpu")), [1030 * 1024, 5000, 300, 3000]
    rows, generator = Rows(kind, sizes), torch.Generator().manual_seed(0)

    def integers(*shape: int, below: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(below, shape, generator=generator, dtype=dtype)

    found = [integers(rows.count, below=k, dtype=torch.int32) for k in (127, 125, 1 << 30, 1 << 30)]
    tables = [torch.rand(5, 4, generator=generator), integers(5, 2, below=9, dtype=torch.int32)]
    tables.append(integers(5, 4, below=1 << 40, dtype=torch.int64))
    counted, first_rank = torch.tensor([True, False, False, True]), torch.tensor([1, 1, 0, 0])
    results = []
    for run in (executor.run, Eager().run):
        own = [table.clone() for table in tables]
        state = State(*(column for table in own for column in table.unbind(1)), torch.arange(1, 5))
        run(Graph("fold"), kind, Sums(*found), rows.stages, counted, first_rank, state, True)
        results.append([table[1:] for table in own])  # the first row is padding
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True)), results
    before, after = tables[2][1:], results[0][2]
    assert int(after[0, 0]) == int(found[2][rows.slices[0]].long().sum())
    assert torch.equal(after[1], before[1]), "kept"
    assert after[2, :2].tolist() == [0, 0], "kept by another rank"


def scaled(executor: Interpreted) -> None:
    """Gradients four times as large with grad_scale 4 are the same; with found_inf nothing changes."""
    optimizer = make(executor, {"weight_decay": 0.1})
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 4.0), torch.zeros(())
    for t in range(2):
        step_with(optimizer, [4 * g for g in gradients(params, t)])
    hyper = hyper_of(optimizer.param_groups[0])
    for i, p in enumerate(params):
        grads = [gradients(params, t)[i] for t in range(2)]
        assert_matches(optimizer, p, *follow_reference(start[i], grads, hyper, int(optimizer.state[p]["salt"])))
    before = snapshot(optimizer)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert_same(before, snapshot(optimizer))


def clipped(executor: Interpreted) -> None:
    """Gradients whose norm is above max_grad_norm, and in the second step below it; one tensor has a NaN."""
    optimizer = make(executor, {"weight_decay": 0.1, "caution": True, "max_grad_norm": 3.0})
    params = all_params(optimizer)
    hyper = hyper_of(optimizer.param_groups[0])
    salts = [tensor_salt(0, str(i)) for i in range(len(params))]
    states = [reference.init(p.detach(), salt) for p, salt in zip(params, salts, strict=True)]
    weights = [p.detach().clone() for p in params]
    for t in range(3):
        grads = [g if t != 1 else 0.01 * g for g in gradients(params, t)]
        grads[2].view(-1)[5] = torch.nan if t == 2 else 0.0
        step_with(optimizer, grads)
        norm = reference.grad_norm(grads)
        assert optimizer.grad_norm is not None
        assert float(optimizer.grad_norm) == norm, (float(optimizer.grad_norm), norm)
        factor = reference.clip_factor(norm, 3.0)
        assert (factor == 1) == (t == 1), factor
        for i, g in enumerate(grads):
            weights[i], states[i], _ = reference.step(weights[i], g, states[i], hyper, factor)
    for p, w, state in zip(params, weights, states, strict=True):
        assert_matches(optimizer, p, w, state)


def wrong(executor: Interpreted) -> None:
    """The negative control: other hyperparameters must be noticed."""
    optimizer = make(executor, {})
    hyper = hyper_of(optimizer.param_groups[0] | {"betas": (0.9, 0.99)})
    try:
        assert_follows_reference(optimizer, [hyper] * len(SHAPES))
    except AssertionError:
        return
    raise AssertionError("a rule with another beta2 passes")


if __name__ == "__main__":
    main(sys.argv[1])
