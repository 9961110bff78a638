"""Salts of parameters without names: other ones in every optimizer of a process, the same in the next run."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from bits import raw
from lamb16 import Lamb16, optimizer


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    restart(monkeypatch)


def restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "NUMBERS", itertools.count())


def equal_parameters(count: int) -> list[nn.Parameter]:
    """With equal gradients."""
    params = [nn.Parameter(torch.linspace(-1, 1, 300)) for _ in range(count)]
    for p in params:
        p.grad = torch.linspace(1, 3, 300) ** 3
    return params


def stepped(*optimizers: Lamb16) -> list[int]:
    """All salts after a step."""
    for one in optimizers:
        one.step()
    return [int(state["salt"]) for one in optimizers for state in one.state.values()]


def test_an_optimizer_per_parameter_rounds_each_differently() -> None:
    params = equal_parameters(5)
    optimizers = {p: Lamb16([p], compile=False) for p in params}
    assert len(set(stepped(*optimizers.values()))) == 5
    codes = {bytes(raw(optimizers[p].state[p]["exp_avg_codes"]).numpy().tobytes()) for p in params}
    assert len(codes) == 5


def test_the_next_run_has_the_same_salts(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for _ in range(2):
        restart(monkeypatch)
        runs.append(stepped(*(Lamb16(equal_parameters(2), compile=False) for _ in range(3))))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6
    assert runs[0][:2] == [
        optimizer.tensor_salt(0, str(i)) - (optimizer.tensor_salt(0, str(i)) >> 31 << 32) for i in (0, 1)
    ]


def test_names_alone_decide_where_there_are_some() -> None:
    """Named optimizers take no number either: what unnamed ones get does not depend on them."""
    first = Lamb16(equal_parameters(1), compile=False)
    named = [Lamb16(zip("ab", equal_parameters(2), strict=True), compile=False) for _ in range(2)]
    second = Lamb16(equal_parameters(1), compile=False)
    assert stepped(named[0]) == stepped(named[1])
    assert (first._number, named[0]._number, second._number) == (0, None, 1)


def test_a_checkpoint_keeps_the_salts() -> None:
    saved = Lamb16(equal_parameters(2), compile=False)
    other = Lamb16(equal_parameters(2), compile=False)
    salts = stepped(saved)
    assert stepped(other) != salts
    other.load_state_dict(saved.state_dict())
    assert stepped(other) == salts


def test_a_pickle_of_version_0_1_goes_on() -> None:
    """It has no number, and its salts were those of the first optimizer."""
    state = Lamb16(equal_parameters(2), compile=False).__getstate__()
    del state["_number"], state["_amp_scaling"]
    old = Lamb16.__new__(Lamb16)
    old.__setstate__(state)
    for p, grad in zip(old.param_groups[0]["params"], equal_parameters(2), strict=True):
        p.grad = grad.grad
    restarted = stepped(old)
    assert [salt & 0xFFFFFFFF for salt in restarted] == [optimizer.tensor_salt(0, str(i)) for i in (0, 1)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(copied) -> None:  # type: ignore[no-untyped-def]
    Lamb16(equal_parameters(1))
    original = Lamb16(equal_parameters(2), compile=False)
    copy_of_it = copied(original)
    for p, grad in zip(copy_of_it.param_groups[0]["params"], equal_parameters(2), strict=True):
        p.grad = grad.grad
    assert stepped(copy_of_it) == stepped(original)
