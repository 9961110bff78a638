"""The generated CUDA kernels in Triton's interpreter, as the functions of a Lamb16 on CPU tensors.

Run by test_cuda.py in a process of its own, since TRITON_INTERPRET must be set before Triton is imported:

    TRITON_INTERPRET=1 python tests/interpreted.py GENERATED.pickle

Prints one line of JSON a case: its name and "ok", or what differs from the slow reference.
"""

from __future__ import annotations

import functools
import json
import pickle
import sys
from collections.abc import Callable
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
    parameters,
    snapshot,
)
from helpers import follow as follow_reference
from lamb16 import Lamb16, plan
from lamb16.compiled import Kind, Step
from lamb16.cuda import fake
from lamb16.cuda.kernels import Graph
from lamb16.packing import TablePacking
from lamb16.update import PIECE

SHAPES = ((7, 3), (2100,), (3, 1024), (5, 5, 41), (), (1024,), (0,), (2049,))
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "weight decay, other betas": {"weight_decay": 0.3, "betas": (0.5, 0.95), "eps": 1e-3},
    "no bias correction, maximize": {"bias_correction": False, "maximize": True, "lr": 0.3},
    "no clip, no bound": {"trust_clip": 100.0, "trust_scale": 1.0, "betas": (0.99, 0.9), "weight_decay": 0.01},
}


def main(file: str) -> None:
    """Check all cases with the functions in a file that test_cuda.py wrote."""
    from triton.runtime.interpreter import InterpretedFunction

    from lamb16.cuda.copying import copy_pieces

    assert isinstance(copy_pieces, InterpretedFunction), "set TRITON_INTERPRET=1"
    with open(file, "rb") as source:
        generated: dict[str, fake.Generated] = pickle.load(source)
    with fake.device(90):
        graphs = {name: Graph(name, code) for name, code in generated.items()}
    functions = Step(*(functools.partial(graphs[name], interpret=True) for name in Step._fields))

    def copy(*arguments: Any) -> None:
        *tensors, unpack = arguments
        copy_pieces[(tensors[-1].shape[0],)](*tensors, UNPACK=unpack, PIECE=PIECE)

    with (
        mock.patch.object(Kind, "group", 16),
        mock.patch.object(Kind, "by_rows", True),
        mock.patch.object(plan, "step_functions", return_value=functions),
        mock.patch.object(plan, "ForeachPacking", functools.partial(TablePacking, launch=copy)),
        mock.patch("torch._inductor.runtime.triton_helpers.libdevice.pow", numpys(np.power)),
        mock.patch("torch._inductor.runtime.triton_helpers.libdevice.sqrt", numpys(np.sqrt)),
    ):
        for name, options in CASES.items():
            report(name, lambda options=options: follow(options))
        report("a non-finite gradient", skips)
        report("many rows, more tensors than a group", many)
        report("gradient scaling", scaled)
        report("a wrong reference is noticed", wrong)


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


def make(options: dict[str, Any]) -> Lamb16:
    return Lamb16(parameters(SHAPES), **{"lr": 0.01} | options, compile=False)


def follow(options: dict[str, Any]) -> None:
    """Three steps, bit for bit."""
    assert_follows_reference(make(options))


def skips() -> None:
    """A tensor of each kind with an inf or a NaN is left as it was; the others move; the next step goes on."""
    optimizer = make({"weight_decay": 0.1})
    params = optimizer.param_groups[0]["params"]
    assert_follows_reference(optimizer)
    before = [p.detach().clone() for p in params]
    for i, (p, g) in enumerate(zip(params, gradients(params, 9), strict=True)):
        p.grad = g
        if i in (1, 2):
            p.grad.view(-1)[-1] = (torch.inf, torch.nan)[i - 1]
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    assert moved == [p.numel() > 0 and i not in (1, 2) for i, p in enumerate(params)], moved
    assert optimizer.skipped == 2, optimizer.skipped


def many() -> None:
    """Two groups of large tensors, one tensor of more rows than a chunk has."""
    optimizer = Lamb16(parameters([(2, 1024)] * 17 + [(1030, 1024)]), lr=0.01, weight_decay=0.1, compile=False)
    assert_follows_reference(optimizer, steps=1)


def scaled() -> None:
    """Gradients four times as large with grad_scale 4 are the same; with found_inf nothing changes."""
    optimizer = make({"weight_decay": 0.1})
    params = all_params(optimizer)
    start = [p.detach().clone() for p in params]
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 4.0), torch.zeros(())
    for t in range(2):
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = 4 * g
        optimizer.step()
    hyper = hyper_of(optimizer.param_groups[0])
    for i, p in enumerate(params):
        grads = [gradients(params, t)[i] for t in range(2)]
        assert_matches(optimizer, p, *follow_reference(start[i], grads, hyper, int(optimizer.state[p]["salt"])))
    before = snapshot(optimizer)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert_same(before, snapshot(optimizer))


def wrong() -> None:
    """The negative control: other hyperparameters must be noticed."""
    optimizer = make({})
    hyper = hyper_of(optimizer.param_groups[0] | {"betas": (0.9, 0.99)})
    try:
        assert_follows_reference(optimizer, [hyper] * len(SHAPES))
    except AssertionError:
        return
    raise AssertionError("a rule with another beta2 passes")


if __name__ == "__main__":
    main(sys.argv[1])
