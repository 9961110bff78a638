"""A step that is broken off, by a signal or for want of memory, leaves every tensor and its state of one step."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import lamb16
from helpers import all_params, assert_same, differing, gradients, parameters, snapshot, step_with
from lamb16 import Lamb16
from lamb16.step import compiled, update
from lamb16.step.compiled import Compiled
from lamb16.step.plan import Plan

PACKAGE = next(iter(lamb16.__path__))
FORMS = ["eager", "calls", "recorded"]  # calls: compiled functions, one after the other


def made(form: str, steps: int = 3) -> Lamb16:
    """An optimizer with parameters of two kinds, small ones and a large one, and how it steps."""
    params = parameters([(300, 70), (5, 3), (7,), (), (0,)]) + parameters([(40, 40), (6,)], dtype=torch.bfloat16)
    optimizer = Lamb16(params, lr=0.01, weight_decay=0.1, max_grad_norm=1.0, compile=form != "eager")
    for t in range(steps):
        take(optimizer, form, t)
    return optimizer


def take(optimizer: Lamb16, form: str, t: int) -> None:
    unrecorded = mock.patch.object(Compiled, "record", return_value=False)
    with unrecorded if form == "calls" else contextlib.nullcontext():
        step_with(optimizer, gradients(all_params(optimizer), t))


# -- signals ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def line_by_line(called: Callable[[], None]) -> Iterator[None]:
    """``called`` is called before every line of this package."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            called()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted(form: str, t: int, line: int) -> tuple[Lamb16, int]:
    """An optimizer whose step ``t`` a signal has interrupted at a line, if it has so many, and how many it has seen."""
    optimizer, seen = made(form, t), 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == line:
            signal.raise_signal(signal.SIGALRM)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        with contextlib.suppress(KeyboardInterrupt), line_by_line(count):
            take(optimizer, form, t)
    finally:
        signal.signal(signal.SIGALRM, handler)
        torch.set_grad_enabled(True)  # torch.no_grad leaves it off where an exception comes between its lines
    return optimizer, seen


def none_of_it(optimizer: Lamb16, before: dict[str, Any]) -> bool:
    """Whether all is as before, but for states that a first step has made."""
    now = snapshot(optimizer)
    unstepped = {
        f"{i}." for i, p in enumerate(all_params(optimizer)) if not optimizer.state.get(p, {"step": 1})["step"]
    }
    made = {key for key in now if key not in before and key[: key.index(".") + 1] in unstepped}
    return not differing({key: x for key, x in now.items() if key not in made}, before)


def outcomes(form: str, t: int, points: int) -> list[str]:
    """What has become of a step that is interrupted, at as many points: it is "whole", "none" of it or "half"."""
    before, after, last = snapshot(made(form, t)), snapshot(made(form, t + 1)), snapshot(made(form, t + 2))
    lines, found = interrupted(form, t, 0)[1], []
    for line in range(1, lines, max(1, lines // points)):
        optimizer, _ = interrupted(form, t, line)
        now = snapshot(optimizer)
        found.append("whole" if not differing(now, after) else "none" if none_of_it(optimizer, before) else "half")
        if found[-1] == "half":
            continue
        for later in range(t + (found[-1] == "whole"), t + 2):
            take(optimizer, form, later)
        assert_same(snapshot(optimizer), last)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [0, 3], ids=["first step", "later"])
def test_a_signal_comes_before_or_after_a_step(form: str, t: int) -> None:
    """Wherever it comes, and the steps after it are what they would have been."""
    assert {*outcomes(form, t, 40)} == {"whole", "none"}


@pytest.mark.parametrize("form", FORMS)
def test_signals_that_are_not_held_back_are_found(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamb16.stepping.Held", contextlib.nullcontext)
    monkeypatch.setattr(Plan, "run_calls", run_calls_that_forget)
    assert "half" in outcomes(form, 3, 40)


def run_calls_that_forget(self: Plan) -> None:
    """As :meth:`Plan.run_calls` without the way back."""
    self.execute("scale", self.scale_arguments(self.from_whole))
    self.update_calls({})
    self.execute("fold", self.fold_arguments())


def test_held_signals_are_handled_in_their_order() -> None:
    from lamb16.signals import Held

    seen: list[int] = []
    numbers = [signal.SIGUSR1, signal.SIGALRM]
    before = [signal.signal(number, lambda number, _: seen.append(number)) for number in numbers]
    try:
        with Held():
            signal.raise_signal(signal.SIGALRM)
            signal.raise_signal(signal.SIGUSR1)
            assert not seen
        assert seen == [signal.SIGALRM, signal.SIGUSR1]
        signal.raise_signal(signal.SIGUSR1)
        assert seen[2:] == [signal.SIGUSR1]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# -- memory that runs out --------------------------------------------------------------------------------------------


class Failing:
    """In place of a function: its call with this number fails."""

    def __init__(self, function: Callable[..., Any], number: int, chosen: Callable[..., bool]) -> None:
        self.function, self.left, self.chosen = function, number, chosen

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.chosen(*arguments, **options):
            self.left -= 1
            if not self.left:
                raise MemoryError("no more")
        return self.function(*arguments, **options)


def failing(form: str, number: int, function: str) -> Any:
    """A context in which one call of a step function fails, counted over all tensors."""
    if form == "eager" and function == "update":
        return mock.patch.object(update, "update_whole", Failing(update.update_whole, number, lambda *_: True))
    if function == "update":
        owner, name, chosen = compiled._Lazy, "__call__", lambda lazy, _: lazy.graph.function == function
    else:
        owner, name, chosen = Plan, "execute", lambda _plan, function, arguments: function == "scale"
    run = Failing(getattr(owner, name), number, chosen)
    return mock.patch.object(owner, name, lambda *arguments, **options: run(*arguments, **options))


@pytest.mark.parametrize("function", ["scale", "update"])
@pytest.mark.parametrize("form", ["eager", "calls"])
@pytest.mark.parametrize("t", [0, 3], ids=["first step", "later"])
def test_where_memory_runs_out_each_tensor_is_of_one_step(form: str, function: str, t: int) -> None:
    before, after, seen = snapshot(made(form, t)), snapshot(made(form, t + 1)), set()
    for number in range(1, 20):
        optimizer = made(form, t)
        try:
            with failing(form, number, function):
                take(optimizer, form, t)
        except MemoryError:
            pass
        else:
            break
        now = snapshot(optimizer)
        for i, p in enumerate(all_params(optimizer)):
            own, old, new = ({k: v for k, v in x.items() if k.startswith(f"{i}.")} for x in (now, before, after))
            if old.keys() != own.keys() and not optimizer.state[p]["step"]:
                own = {key: own[key] for key in old}  # and a state that the step has made
            outcome = "new" if not differing(own, new) else "old" if not differing(own, old) else "half"
            assert outcome != "half", (number, i, differing(own, old), differing(own, new))
            seen.add(outcome)
        assert optimizer.skipped == 0
        replaced = Lamb16([nn.Parameter(p.detach().clone()) for p in all_params(optimizer)], compile=form != "eager")
        replaced.load_state_dict(optimizer.state_dict())
        for each in (optimizer, replaced):
            each.max_grad_norm = 1.0
            take(each, form, 9)
        assert_same(snapshot(optimizer), snapshot(replaced))
    else:
        pytest.fail("more calls than expected")
    assert number > 2
    assert ("new" in seen) == (function == "update" or len(seen) > 1)
    assert "old" in seen


def test_a_step_that_forgets_what_memory_ran_out_for_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "run_calls", run_calls_that_forget)
    with pytest.raises(AssertionError, match="scale"):
        test_where_memory_runs_out_each_tensor_is_of_one_step("calls", "update", 3)
