"""Whatever programs do between steps: compiled steps go on from the weights and states that are there, and no others.

A state machine does what programs do to an optimizer with ``compile=True`` and to a twin without. After every step
these have the same bits, and those of a new optimizer that was made from the weights and the state dict of before the
step: nothing that an optimizer remembers shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from helpers import differing, how, missing, parameters
from lamb16 import Lamb16
from programs import ALL, GRADIENTS, GROUPS, NUMBERS, REFUSED, STATES, TENSORS, WEIGHTS, WORDS, Program, set_memory
from strategies import HYPERPARAMETERS, hyperparameters

SHAPES = ((), (7, 3), (300,), (300,), (2100,), (2100,), (3, 1024), (0,))
FIRST = 5  # parameters of the first group
EXAMPLES, STEPS = 25, 25  # programs, and steps of each

TABLES = {
    "groups": GROUPS, "weights": WEIGHTS, "tensors": TENSORS, "numbers": NUMBERS, "states": STATES, "all": ALL,
    "refused": REFUSED,
}  # fmt: skip
OFTEN = {"groups": 2, "weights": 3, "tensors": 4, "numbers": 2, "states": 2}  # for one of the others
VALUES = {**HYPERPARAMETERS, "caution": st.booleans()}
INDICES, SEEDS = st.integers(0, len(SHAPES) + 2), st.integers(0, 2**16)


@dataclass
class Do:
    """Something that these tables name, to one of the parameters."""

    table: str
    what: str
    i: int
    seed: int

    def __call__(self, program: Program) -> None:
        TABLES[self.table][self.what](program, self.i % len(program.params), self.seed)


@dataclass
class Set:
    """A hyperparameter changed, in the group of one of the parameters."""

    name: str
    value: Any
    i: int

    def __call__(self, program: Program) -> None:
        program.group(self.i % len(program.params))[self.name] = self.value


changes = st.one_of(
    *(
        st.builds(Do, st.just(name), st.sampled_from(list(table)), INDICES, SEEDS)
        for name, table in TABLES.items()
        for _ in range(OFTEN.get(name, 1))
    ),
    *[st.sampled_from(list(VALUES)).flatmap(lambda name: st.builds(Set, st.just(name), VALUES[name], INDICES))] * 2,
)
gradients = st.one_of(
    st.just(["normal"]), st.just(["in place"]), st.lists(st.sampled_from(list(GRADIENTS)), min_size=1, max_size=8)
)
scalers = st.fixed_dictionaries(
    {}, optional={"grad_scale": st.sampled_from([1.0, 1024.0, 3.0]), "found_inf": st.sampled_from([0.0, 0.0, 1.0])}
)


class Programs(RuleBasedStateMachine):
    """Programs with float32 weights."""

    dtype, rounding = torch.float32, "stochastic"

    @initialize(hyper=hyperparameters, seed=SEEDS)
    def start(self, hyper: dict[str, Any], seed: int) -> None:
        self.twins = []
        for compile in (True, False):
            named = [(f"p{i}", p) for i, p in enumerate(parameters(SHAPES, self.dtype, seed))]
            groups = [{"params": named[:FIRST]}, {"params": named[FIRST:], "weight_decay": 0.05}]
            options = {**hyper, "param_rounding": self.rounding, "amp_scaling": True}
            self.twins.append(Program(Lamb16(groups, **options, compile=compile)))
        self.go_on([], ["normal"], {}, seed)

    def do(self, what: Callable[[Program], Any]) -> None:
        for program in self.twins:
            with torch.no_grad():
                what(program)

    @rule(before=st.lists(changes, max_size=6), kinds=gradients, scaler=st.one_of(st.just({}), scalers), seed=SEEDS)
    def go_on(self, before: list[Do | Set], kinds: list[str], scaler: dict[str, float], seed: int) -> None:
        """A step after some changes, with gradients of these kinds in turn, as a gradient scaler may call it."""
        for change in before:
            self.do(change)

        def take(program: Program) -> None:
            for i, p in enumerate(program.params):
                p.grad = GRADIENTS[kinds[i % len(kinds)]](program, i, seed + i)
            if program.optimizer.offloaded:
                with pytest.raises(RuntimeError, match="offloaded"):
                    program.optimizer.step()
                program.optimizer.reload()

        self.do(take)
        compiled, eager = self.twins
        fresh, skipped = compiled.fresh(), compiled.optimizer.skipped
        for program in (compiled, eager, fresh):
            vars(program.optimizer).update({name: torch.tensor(value) for name, value in scaler.items()})
            program.optimizer.step()
            for name in scaler:
                delattr(program.optimizer, name)
            program.old.clear()
        assert_equal("eager and compiled", contents(compiled), contents(eager))
        assert compiled.optimizer.skipped == eager.optimizer.skipped == skipped + fresh.optimizer.skipped
        stepped = {name for name, p in zip(compiled.names, compiled.params, strict=True) if p.grad is not None}
        assert_equal("old and new", contents(compiled, stepped), contents(fresh, stepped))


def contents(program: Program, stepped: set[str] | None = None) -> dict[str, Any]:
    """Weights, states and reports; gradients and all states, or those of the ``stepped`` parameters."""
    found: dict[str, Any] = {"grad_norm": program.optimizer.grad_norm}
    for name, p, state in zip(program.names, program.params, program.states, strict=True):
        found |= {f"{name} weights": p.detach()} | ({f"{name} gradient": p.grad} if stepped is None else {})
        if stepped is None or name in stepped:
            found |= {f"{name} {key}": value for key, value in state.items()}
    for name, numbers in program.optimizer.layer_stats().items():
        found |= {f"{name} {key}": value for key, value in numbers.items()}
    return found


def assert_equal(what: str, a: dict[str, Any], b: dict[str, Any]) -> None:
    assert not differing(a, b), f"{what} differ: {how(a, b)}"


class ExactPrograms(Programs):
    """Programs with bfloat16 weights that are kept exactly, until their rounding is changed."""

    dtype, rounding = torch.bfloat16, "exact"


MACHINES = {"float32": Programs, "bfloat16": ExactPrograms}


def run(machine: type[Programs], **options: Any) -> None:
    options = {"max_examples": settings().max_examples * EXAMPLES // 40, "stateful_step_count": STEPS} | options
    run_state_machine_as_test(machine, settings=settings(**options))


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_nothing_that_is_remembered_shows(machine: type[Programs]) -> None:
    run(machine)


def test_all_hyperparameters_are_changed() -> None:
    assert missing(VALUES, *WORDS) == set()


# Negative controls: a part of the one look by its dotted path, and what takes its place and sees nothing.
CONTROLS: dict[str, tuple[str, Callable[..., Any]]] = {
    "changed states are not seen": ("lamb16.store.Store.same", lambda *_: True),
    "what others write to moments is not seen": ("lamb16.store._versions", lambda moments: [0] * len(moments)),
    "weights as gradients are not seen": ("lamb16.step.known.are_good", lambda *_: True),
}


class KeptPrograms(Programs):
    """Programs of which no memory is freed: a step that does not look goes on writing there."""

    def do(self, what: Callable[[Program], Any]) -> None:
        for program in self.twins:
            tensors = [*program.params, *(x for state in program.states for x in state.values())]
            program.kept += [x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
        super().do(what)


@pytest.mark.parametrize(("path", "wrong"), CONTROLS.values(), ids=CONTROLS)
def test_what_is_wrong_is_found(path: str, wrong: Callable[..., Any]) -> None:
    with (
        mock.patch(path, wrong),
        mock.patch("programs.renew_storage", lambda x: set_memory(x, x.detach().clone())),
        pytest.raises(AssertionError, match="differ"),
    ):
        run(KeptPrograms, phases=[Phase.generate], max_examples=1000, report_multiple_bugs=False)
