"""param_rounding: bfloat16 and float16 weights that move as float32 ones do, and what others do to their remainders."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bits import assert_same_bits, raw
from helpers import (
    DEVICE,
    assert_follows_reference,
    assert_matches,
    assert_same,
    follow,
    gradients,
    hyper_of,
    model,
    parameters,
    snapshot,
    take_steps,
)
from lamb16 import Lamb16, checkpoint, reference
from lamb16.entries import ENTRIES
from lamb16.remainder import CHECKSUM, REMAINDER

BF16, F16 = torch.bfloat16, torch.float16
EXACT = {"lr": 0.01, "weight_decay": 0.1, "param_rounding": "exact"}
SHAPES = ((7, 3), (2100,), (64, 48))


def exact(compile: bool = False, **others: object) -> Lamb16:
    named = [(f"p{i}", p) for i, p in enumerate(parameters(SHAPES, BF16))]
    return Lamb16(named, **EXACT | {"compile": compile} | others)


def params_of(optimizer: Lamb16) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# -- the rule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "exact"])
@pytest.mark.parametrize("moment_dtype", ["float8", "float32"])
def test_follows_the_reference(compile_mode: bool, rounding: str, moment_dtype: str) -> None:
    params = parameters(SHAPES, BF16) + parameters(((5,), (2100,)), torch.float32, 1)
    options = EXACT | {"param_rounding": rounding, "moment_dtype": moment_dtype}
    optimizer = Lamb16(params, **options, caution=True, compile=compile_mode)
    assert_follows_reference(optimizer, steps=4)
    assert [REMAINDER in optimizer.state[p] for p in params] == [
        rounding == "exact" and p.dtype == BF16 for p in params
    ]


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_float16_follows_the_reference(compile_mode: bool, rounding: str) -> None:
    assert_follows_reference(Lamb16(parameters(SHAPES, F16), lr=0.01, compile=compile_mode, param_rounding=rounding))


def test_groups_have_their_own_rounding(compile_mode: bool) -> None:
    groups = [
        {"params": parameters(SHAPES, BF16, seed), "param_rounding": rounding}
        for seed, rounding in enumerate(("nearest", "exact", "stochastic"))
    ]
    assert_follows_reference(Lamb16(groups, lr=0.01, weight_decay=0.1, compile=compile_mode))


# lr, weight decay, gradient, steps: what rounding to nearest loses.
STALLS = [(1e-4, 0.0, 1.0, 300), (1e-2, 0.02, 0.0, 300)]


@pytest.mark.parametrize(("lr", "decay", "gradient", "steps"), STALLS)
def test_small_steps_move_weights_as_in_float32(lr: float, decay: float, gradient: float, steps: int) -> None:
    """The mean over 4,096 weights of 1, within 2 %; to nearest they do not move at all."""

    def moved(dtype: torch.dtype, rounding: str) -> float:
        p = nn.Parameter(torch.ones(4096, dtype=dtype, device=DEVICE))
        optimizer = Lamb16([("p", p)], lr=lr, weight_decay=decay, param_rounding=rounding, compile=False)
        p.grad = torch.full_like(p, gradient)
        for _ in range(steps):
            optimizer.step()
        return 1 - float(p.detach().double().mean())

    wanted = moved(torch.float32, "stochastic")
    assert wanted > 0.01
    for dtype in (BF16, F16):
        assert moved(dtype, "stochastic") == pytest.approx(wanted, rel=0.02)
    assert moved(BF16, "exact") == pytest.approx(wanted, abs=2.0**-9)  # all are equal: half of bfloat16's gap
    assert moved(BF16, "nearest") == 0


def test_the_rounding_of_weights_does_not_change_the_moments() -> None:
    """The words are the moments' as before; weights differ only in how they are rounded."""
    states = []
    for rounding in ("stochastic", "nearest"):
        optimizer = Lamb16([("p", parameters(((2100,),), BF16)[0])], lr=0.01, param_rounding=rounding, compile=False)
        take_steps(optimizer, range(1))
        states.append(optimizer.state[params_of(optimizer)[0]])
    for key in ("exp_avg_codes", "exp_avg_sq_codes"):
        assert_same_bits(raw(states[0][key]), raw(states[1][key]))


# -- what is refused ---------------------------------------------------------------------------------------------


def test_float16_cannot_be_exact() -> None:
    half, other = parameters(((5,),), F16), parameters(((5,),), BF16)
    with pytest.raises(ValueError, match=r"float16.*param_rounding='exact'.*'stochastic'"):
        Lamb16(half, param_rounding="exact")
    optimizer = Lamb16(other, param_rounding="exact", compile=False)
    with pytest.raises(ValueError, match="param_rounding='exact'"):
        optimizer.add_param_group({"params": half})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": half, "param_rounding": "stochastic"})
    take_steps(optimizer, range(1))
    before = snapshot(optimizer)
    optimizer.param_groups[1]["param_rounding"] = "exact"
    with pytest.raises(ValueError, match="param_rounding='exact'"):
        optimizer.step()
    optimizer.param_groups[1]["param_rounding"] = "stochastic"
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("damage", [lambda x: x.float(), lambda x: x.view(-1)[:-1], lambda x: 3])
def test_remainders_of_another_kind_are_refused(damage, compile_mode: bool) -> None:
    optimizer = exact(compile_mode)
    take_steps(optimizer, range(2))
    p = params_of(optimizer)[1]
    before, kept = snapshot(optimizer), optimizer.state[p][REMAINDER]
    optimizer.state[p][REMAINDER] = damage(kept)
    with pytest.raises(ValueError, match=r"param_remainder of parameter p1 is .*int16"):
        optimizer.step()
    optimizer.state[p][REMAINDER] = kept
    assert_same(snapshot(optimizer), before)
    saved = optimizer.state_dict()
    saved["state"][1][REMAINDER] = damage(kept)
    with pytest.raises(ValueError, match=r"load_state_dict: param_remainder of parameter p1 is .*int16"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


# -- remainders and those who change weights ---------------------------------------------------------------------


def copy_data(p: Tensor, value: Tensor) -> None:
    p.data.copy_(value)


def copy_in_place(p: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        p.copy_(value)


def replace_data(p: Tensor, value: Tensor) -> None:
    p.data = value.clone()


def one_element(p: Tensor, value: Tensor) -> None:
    p.data.view(-1)[3] = value.view(-1)[3]


@pytest.mark.parametrize("change", [copy_data, copy_in_place, replace_data, one_element])
def test_weights_that_others_changed_win(change, compile_mode: bool) -> None:
    """The step is the one of float32 weights with these values; other tensors keep their remainders."""
    optimizer = exact(compile_mode)
    take_steps(optimizer, range(3))
    params = params_of(optimizer)
    kept = optimizer.float32_weights()
    change(params[1], (params[1].detach() * 1.01).to(BF16))
    assert raw(optimizer.float32_weights()["p1"]).equal(raw(params[1].detach().float()))
    assert raw(optimizer.float32_weights()["p2"]).equal(raw(kept["p2"]))
    expected = []
    for p in params:
        state = optimizer.state[p]
        codes = {key: state[key].cpu().view(torch.uint8).clone() for key in ("exp_avg_codes", "exp_avg_sq_codes")}
        scalars = {key: state[key].item() for key in set(ENTRIES) - codes.keys()}
        remainder = state[REMAINDER].cpu().clone()
        expected.append((p.detach().cpu().clone(), reference.State(**codes, **scalars, **{REMAINDER: remainder})))
    assert expected[1][1].param_remainder.any()
    take_steps(optimizer, [3])
    hyper = hyper_of(optimizer.param_groups[0])
    for p, grad, (weights, state) in zip(params, gradients(params, 3), expected, strict=True):
        forgotten = p is params[1]
        if forgotten:
            state = reference.replace(state, param_remainder=state.param_remainder * 0)
            state = reference.replace(state, param_checksum=reference.checksum(weights))
        weights, state, _ = reference.step(weights, grad.cpu(), state, hyper)
        assert_matches(optimizer, p, weights, state)


def test_a_skipped_step_keeps_remainders_and_forgets_those_of_others(compile_mode: bool) -> None:
    optimizer = exact(compile_mode)
    take_steps(optimizer, range(2))
    params = params_of(optimizer)
    before = optimizer.float32_weights()
    changed = (params[1].detach() * 2).to(BF16)
    params[1].data.copy_(changed)
    for p in params:
        p.grad.view(-1)[0] = torch.inf
    optimizer.step()
    assert optimizer.skipped == 3
    after = optimizer.float32_weights()
    assert all(torch.equal(after[name], before[name]) for name in ("p0", "p2"))
    assert torch.equal(after["p1"], changed.float())
    assert not optimizer.state[params[1]][REMAINDER].any()


def test_model_and_ema_loads_are_seen() -> None:
    net = model().to(BF16)
    optimizer = Lamb16(net.named_parameters(), **EXACT, compile=False)
    take_steps(optimizer, range(2))
    average = {name: (p.detach() * 0.5).clone() for name, p in net.named_parameters()}
    net.load_state_dict(average)
    found = optimizer.float32_weights()
    assert all(torch.equal(found[name], average[name].float()) for name in average)


def test_weights_that_change_places_stay_numbers(compile_mode: bool) -> None:
    """Which the checksum does not see: what is wrong then is half of a gap at most."""
    p = nn.Parameter(torch.randn(50, 8, device=DEVICE).to(BF16))
    with torch.no_grad():
        p[0] = 0  # as an embedding's padding
    optimizer = Lamb16([("p", p)], **EXACT | {"weight_decay": 0.0}, compile=compile_mode)
    for t in range(3):
        p.grad = gradients([p], t)[0]
        p.grad[0] = 0
        optimizer.step()
    with torch.no_grad():
        p.copy_(p.flip(0))
    found = optimizer.float32_weights()["p"]
    assert torch.allclose(found, p.detach().float(), rtol=2.0**-8, atol=2.0**-134)
    optimizer.step()
    assert torch.isfinite(p).all()


def test_a_remainder_without_memory_is_refused(compile_mode: bool) -> None:
    optimizer = exact(compile_mode)
    take_steps(optimizer, range(2))
    remainder = optimizer.state[params_of(optimizer)[1]][REMAINDER]
    kept = remainder.clone()
    remainder.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="param_remainder of parameter p1 has no memory"):
        optimizer.step()
    remainder.untyped_storage().resize_(kept.nbytes)
    remainder.copy_(kept)
    take_steps(optimizer, range(2, 4))
    other = exact(compile_mode)
    take_steps(other, range(4))
    assert_same(snapshot(optimizer), snapshot(other))


def test_float32_weights_load_into_a_model_that_became_float32() -> None:
    optimizer = exact()
    take_steps(optimizer, range(3))
    weights = optimizer.float32_weights()
    for p in params_of(optimizer):
        p.data, p.grad = p.data.float(), None
    optimizer.load_float32_weights(weights)
    for name, p in zip(weights, params_of(optimizer), strict=True):
        assert torch.equal(p, weights[name])


def test_a_replaced_remainder_is_seen(compile_mode: bool) -> None:
    one, two = exact(compile_mode), exact(compile_mode)
    for optimizer in (one, two):
        take_steps(optimizer, range(2))
    p = params_of(one)[1]
    one.state[p][REMAINDER] = one.state[p][REMAINDER].clone()
    one.state[params_of(one)[0]][REMAINDER].data = one.state[params_of(one)[0]][REMAINDER].clone()
    del one.state[params_of(one)[2]][REMAINDER], two.state[params_of(two)[2]][REMAINDER]
    for optimizer in (one, two):
        take_steps(optimizer, range(2, 4))
    assert_same(snapshot(one), snapshot(two))


def test_the_rounding_may_change_while_training(compile_mode: bool) -> None:
    """From exact the visible weights go on; to exact they begin with remainders of 0."""
    optimizer = exact(compile_mode)
    take_steps(optimizer, range(2))
    optimizer.param_groups[0]["param_rounding"] = "stochastic"
    take_steps(optimizer, range(2, 4))
    assert not any(REMAINDER in optimizer.state[p] for p in params_of(optimizer))
    optimizer.param_groups[0]["param_rounding"] = "exact"
    before = [p.detach().clone() for p in params_of(optimizer)]
    take_steps(optimizer, range(4, 6))
    assert all(REMAINDER in optimizer.state[p] for p in params_of(optimizer))
    assert not any(torch.equal(p, q) for p, q in zip(params_of(optimizer), before, strict=True))


# -- saving ------------------------------------------------------------------------------------------------------


def by_state_dict(optimizer: Lamb16, folder: Path) -> Lamb16:
    new = exact()
    torch.save(optimizer.state_dict(), folder / "state.pt")
    for p, q in zip(params_of(optimizer), params_of(new), strict=True):
        q.data.copy_(p)
    new.load_state_dict(torch.load(folder / "state.pt"))
    return new


def by_float32_weights(optimizer: Lamb16, folder: Path) -> Lamb16:
    """The weights alone carry the bits: the state's remainders are lost on the way."""
    new = exact()
    state = optimizer.state_dict()
    for entries in state["state"].values():
        del entries[REMAINDER]
    torch.save((state, optimizer.float32_weights()), folder / "both.pt")
    state, weights = torch.load(folder / "both.pt")
    new.load_state_dict(state)
    new.load_float32_weights(weights)
    return new


@pytest.mark.parametrize(
    "way",
    [by_state_dict, by_float32_weights, lambda o, _: copy.deepcopy(o), lambda o, _: pickle.loads(pickle.dumps(o))],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(way, tmp_path: Path) -> None:
    whole, half = exact(), exact()
    take_steps(whole, range(6))
    take_steps(half, range(3))
    resumed = way(half, tmp_path)
    assert_same(snapshot(resumed), snapshot(half))
    take_steps(resumed, range(3, 6))
    assert_same(snapshot(resumed), snapshot(whole))


def test_a_checkpoint_holds_remainders(tmp_path: Path) -> None:
    def trained(steps: range) -> tuple[nn.Module, Lamb16]:
        net = model().to(BF16)
        optimizer = Lamb16(net.named_parameters(), **EXACT, compile=False)
        take_steps(optimizer, steps)
        return net, optimizer

    (net, optimizer), (other, new) = trained(range(3)), trained(range(1))
    checkpoint.save(tmp_path / "saved", net, optimizer)
    checkpoint.load(tmp_path / "saved", other, new)
    assert_same(snapshot(new), snapshot(optimizer))
    for x in (optimizer, new):
        take_steps(x, range(3, 5))
    assert_same(snapshot(new), snapshot(optimizer))


def test_float32_weights_are_those_of_the_float32_run_and_load_anywhere() -> None:
    optimizer = exact()
    take_steps(optimizer, range(3))
    weights = optimizer.float32_weights()
    assert all(x.dtype == torch.float32 and REMAINDER not in name for name, x in weights.items())
    twin = Lamb16([(n, nn.Parameter(torch.zeros_like(x))) for n, x in weights.items()], lr=0.01, compile=False)
    twin.load_float32_weights(weights)
    assert all(torch.equal(p, weights[f"p{i}"]) for i, p in enumerate(params_of(twin)))
    # A new optimizer, which has no state yet.
    fresh = exact()
    fresh.load_float32_weights(weights)
    assert all(torch.equal(x, weights[name]) for name, x in fresh.float32_weights().items())
    start = Lamb16([(n, nn.Parameter(x.clone())) for n, x in weights.items()], lr=0.01, weight_decay=0.1, compile=False)
    for x in (fresh, start):
        for k, p in enumerate(params_of(x)):
            p.grad = gradients(params_of(optimizer), 7)[k].to(p.dtype)
        x.step()
    found, wanted = fresh.float32_weights(), start.float32_weights()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_wrong_float32_weights_are_refused() -> None:
    optimizer = exact()
    take_steps(optimizer, range(1))
    weights, before = optimizer.float32_weights(), snapshot(optimizer)
    wrong = [
        ({}, "no weights for p0, p1, p2"),
        (weights | {"q": weights["p0"]}, "also weights for q"),
        (weights | {"p0": weights["p0"].double()}, "for p0 are torch.float64"),
        (weights | {"p0": weights["p1"]}, r"for p0 are torch.float32 \(2100,\)"),
        (weights | {"p0": 1.0}, "for p0 are float"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.load_float32_weights(given)
    assert_same(snapshot(optimizer), before)


def test_states_without_remainders_load_and_those_of_exact_ones_load_elsewhere() -> None:
    stochastic, optimizer = exact(param_rounding="stochastic"), exact()
    for x in (stochastic, optimizer):
        take_steps(x, range(2))
    saved = stochastic.state_dict()
    for group in saved["param_groups"]:
        del group["param_rounding"]  # as version 0.1 has it
    for state in saved["state"].values():
        del state[CHECKSUM]
    optimizer.load_state_dict(saved)
    assert not any(optimizer.state[p][REMAINDER].any() for p in params_of(optimizer))
    exactly = exact()
    take_steps(exactly, range(2))
    saved = exactly.state_dict()
    for group in saved["param_groups"]:
        group["param_rounding"] = "nearest"
    stochastic.load_state_dict(saved)
    assert not any(REMAINDER in stochastic.state[p] for p in params_of(stochastic))
    take_steps(stochastic, range(2, 3))


def test_resize_keeps_the_remainders_of_rows_that_stay() -> None:
    p = nn.Parameter(torch.randn(6, 5, device=DEVICE).to(BF16))
    optimizer = Lamb16([("p", p)], **EXACT, compile=False)
    take_steps(optimizer, range(2))
    weights = optimizer.float32_weights()["p"]
    optimizer_state = {key: x.clone() for key, x in optimizer.state[p].items()}
    index = torch.tensor([4, 0, -1])
    new = nn.Parameter(torch.cat([p.detach()[[4, 0]], torch.ones(1, 5, device=DEVICE, dtype=BF16)]))
    optimizer.resize(p, index, new)
    found = optimizer.float32_weights()["p"]
    assert torch.equal(found[:2], weights[[4, 0]])
    assert torch.equal(found[2], torch.ones(5, device=DEVICE))
    # Its next step is that of a float32 run that is resized alike.
    q = nn.Parameter(weights.clone())
    twin = Lamb16([("p", q)], **EXACT, compile=False)
    saved = optimizer_state | {"param_remainder": None}
    twin.state[q] = {key: x for key, x in saved.items() if x is not None}
    wide = nn.Parameter(found.clone())
    twin.resize(q, index, wide)
    new.grad = gradients([new], 5)[0]
    wide.grad = new.grad.float()
    optimizer.step()
    twin.step()
    assert torch.equal(optimizer.float32_weights()["p"], wide)


def test_the_reference_starts_from_the_same_state() -> None:
    p = parameters(((2100,),), BF16)[0]
    optimizer = Lamb16([("p", p)], **EXACT, compile=False)
    start = p.detach().clone()
    take_steps(optimizer, range(2))
    grads = [gradients([p], t)[0] for t in range(2)]
    salt = int(optimizer.state[p]["salt"])
    weights, state = follow(start, grads, hyper_of(optimizer.param_groups[0]), salt)
    assert torch.equal(optimizer.float32_weights()["p"].cpu(), reference.joined(weights, state.param_remainder))
