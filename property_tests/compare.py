"""Running Lamb16 beside the slow reference, and the comparison of the two. Tested itself in test_equivalence.py."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bits import assert_same_bits
from helpers import step_with
from lamb16 import Lamb16, reference
from lamb16.entries import SCALARS
from lamb16.reference import Hyper, State
from lamb16.remainder import REMAINDER
from lamb16.step.fp8 import wrapped
from strategies import Case

DEVICE = torch.device(os.environ.get("LAMB16_TEST_DEVICE", "cpu"))  # of Lamb16; the reference runs on the CPU

StepFunction = Callable[[Tensor, Tensor, State, Hyper], tuple[Tensor, State, reference.Stats]]


def assert_same_state(where: str, p: Tensor, mine: dict[str, Tensor], weights: Tensor, theirs: State) -> None:
    """Weights, codes, scales and step counts agree bit for bit."""
    assert_same_bits(p, weights, f"{where}: weights")
    for name in ("exp_avg_codes", "exp_avg_sq_codes"):
        codes = mine[name] if mine[name].dtype == torch.float32 else mine[name].view(torch.uint8)
        assert_same_bits(codes, getattr(theirs, name), f"{where}: {name}")
    assert (REMAINDER in mine) == (theirs.param_remainder is not None)
    if theirs.param_remainder is not None:
        assert_same_bits(mine[REMAINDER], theirs.param_remainder, f"{where}: remainders")
    assert (int(mine["salt"]) - theirs.salt) % 2**32 == 0, f"{where}: salt differs"
    for name in set(SCALARS) - {"salt"}:
        a, b = mine[name].item(), getattr(theirs, name)
        assert a == b or (math.isnan(a) and math.isnan(b)), f"{where}: {name} differs"


def make(case: Case, compile: bool) -> tuple[list[nn.Parameter], Lamb16]:
    params = [nn.Parameter(w.to(DEVICE)) for w in case.weights()]
    named = [(str(i), p) for i, p in enumerate(params)]  # whose salts the reference can be told before the first step
    return params, Lamb16(named, **case.words, **case.hyper, compile=compile, seed=case.seed)


def set_counts(state: dict[str, Tensor], case: Case) -> None:
    """Make step and salt of a state those of the case."""
    for name, value in case.counts.items():
        state[name].fill_(wrapped(value))


def run(case: Case, compile: bool) -> tuple[list[nn.Parameter], Lamb16]:
    """The run of a case through Lamb16 alone."""
    params, optimizer = make(case, compile)
    for step in range(len(case.kinds)):
        step_with(optimizer, case.gradients(step, case.weights()))
        for state in optimizer.state.values() if step == 0 else ():
            set_counts(state, case)
    return params, optimizer


def patched(name: str, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]) -> StepFunction:
    """The reference's step with one of its functions replaced, for negative controls."""

    def wrong(p: Tensor, grad: Tensor, state: State, h: Hyper) -> tuple[Tensor, State, reference.Stats]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, name, replacement(getattr(reference, name)))
            return reference.step(p, grad, state, h)

    wrong.__name__ = name
    return wrong


def run_beside_reference(case: Case, compile: bool, rule: StepFunction = reference.step) -> int:
    """Compare after every step; returns how many tensor updates were skipped."""
    params, optimizer = make(case, compile)
    hyper = Hyper(**case.hyper, **case.words)
    weights = case.weights()
    states: list[State | None] = [None] * len(params)
    skipped = 0
    for step in range(len(case.kinds)):
        grads = case.gradients(step, weights)
        step_with(optimizer, [None if grad is None else grad.clone() for grad in grads])
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            assert_same_bits(p.grad, grad, "the gradients before and after the step")
            mine = optimizer.state[p]
            salt = optimizer._parameters.salt(optimizer.param_groups[0], i)  # decay alone changes the state's
            state = states[i] or reference.init(weights[i], salt, **case.words)
            weights[i], states[i], stats = rule(weights[i], grad, state, hyper)
            skipped += stats.skipped
            assert_same_state(f"step {step}, tensor {i} {tuple(p.shape)}", p, mine, weights[i], states[i])
            if step == 0:
                set_counts(mine, case)
                states[i] = replace(states[i], **case.counts)
    assert optimizer.skipped == skipped
    return skipped
