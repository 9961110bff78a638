"""Salts of parameters without names: the same on every rank and in every run, others in every optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from bits import raw
from helpers import DEVICE, assert_same, snapshot
from lamb16 import Lamb16

# Every square is below the least that a weight's counts as, as in most layers: sums of squares do not tell these apart.
SMALL = torch.linspace(-0.09, 0.09, 300)


def small_parameters(count: int, seed: int = 0) -> list[nn.Parameter]:
    """Of one shape and with equal gradients, but with other weights."""
    return with_gradients([nn.Parameter((SMALL * (1 + (seed + i) / 1000)).to(DEVICE)) for i in range(count)])


def with_gradients(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    for p in params:
        p.grad = torch.linspace(1, 3, 300).to(p) ** 3
    return list(params)


def stepped(*optimizers: Lamb16) -> list[int]:
    """All salts after a step."""
    for one in optimizers:
        one.step()
    return [int(state["salt"]) for one in optimizers for state in one.state.values()]


def codes(p: Tensor, optimizer: Lamb16) -> bytes:
    return bytes(raw(optimizer.state[p]["exp_avg_codes"]).cpu().numpy().tobytes())


def test_an_optimizer_per_parameter_rounds_each_differently(compile_mode: bool) -> None:
    params = small_parameters(5)
    optimizers = {p: Lamb16([p], compile=compile_mode) for p in params}
    assert len(set(stepped(*optimizers.values()))) == 5
    assert len({codes(p, optimizer) for p, optimizer in optimizers.items()}) == 5


def test_ones_and_zeros_round_differently() -> None:
    params = [nn.Parameter(torch.full((512,), value)) for value in (0.0, 1.0, 2.0)]
    for p in params:
        p.grad = torch.ones(512)
    assert len(set(stepped(*(Lamb16([p], compile=False) for p in params)))) == 3


def test_they_would_not_without_their_weights() -> None:
    """The negative control."""
    with mock.patch("lamb16.ready.bit_sum", side_effect=lambda weights: torch.zeros((), dtype=torch.int64)):
        optimizers = [Lamb16([p], compile=False) for p in small_parameters(5)]
        assert len(set(stepped(*optimizers))) == 1


def test_the_same_run_once_more_has_the_same_bits(compile_mode: bool) -> None:
    """Whatever other optimizers there are in the process."""
    runs = []
    for _ in range(2):
        optimizer = Lamb16(small_parameters(3), lr=0.01, compile=compile_mode)
        for _ in range(3):
            optimizer.step()
        runs.append(snapshot(optimizer))
        Lamb16(small_parameters(1), compile=False).step()
    assert_same(*runs)


@pytest.mark.parametrize("seed", [0, 7])
def test_equal_tensors_differ_by_position_and_seed(seed: int) -> None:
    equal = with_gradients([nn.Parameter(SMALL.clone()) for _ in range(3)])
    salts = stepped(Lamb16(equal, seed=seed, compile=False))
    assert len(set(salts)) == 3
    equal = with_gradients([nn.Parameter(SMALL.clone()) for _ in range(3)])
    assert set(salts).isdisjoint(stepped(Lamb16(equal, seed=seed + 1, compile=False)))


def test_names_alone_decide_where_there_are_some() -> None:
    named = [Lamb16(zip("ab", small_parameters(2, seed), strict=True), compile=False) for seed in (0, 5)]
    assert stepped(named[0]) == stepped(named[1])


@pytest.mark.parametrize("names", [True, False])
def test_a_state_of_adamw_gets_salts_too(names: bool) -> None:
    """Other ones in every optimizer, without names, and the same when it is loaded again."""
    salts = []
    for seed in (0, 0, 5):
        params = small_parameters(2, seed)
        lamb16 = Lamb16(zip("ab", params, strict=True) if names else params, compile=False)
        adamw = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in params])
        for p, other in zip(adamw.param_groups[0]["params"], params, strict=True):
            p.grad = other.grad
        adamw.step()
        with pytest.warns(UserWarning, match="lr"):
            lamb16.load_state_dict(adamw.state_dict())
        salts.append(stepped(lamb16))
    assert salts[0] == salts[1]
    assert (salts[0] == salts[2]) == names
    assert salts[0][0] != salts[0][1]


def test_a_checkpoint_keeps_the_salts() -> None:
    saved, other = (Lamb16(small_parameters(2, seed), compile=False) for seed in (0, 5))
    salts = stepped(saved)
    assert stepped(other) != salts
    other.load_state_dict(saved.state_dict())
    assert stepped(other) == salts


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(copied) -> None:  # type: ignore[no-untyped-def]
    original = Lamb16(small_parameters(2), compile=False)
    copy_of_it = copied(original)
    with_gradients(copy_of_it.param_groups[0]["params"])
    assert stepped(copy_of_it) == stepped(original)
