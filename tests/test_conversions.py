"""Other optimizers' states into Lamb16, and Lamb16's into AdamW."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bits import assert_same_bits, raw
from helpers import DEVICE, all_params, assert_same, gradients, parameters, snapshot, step_with, take_steps
from lamb16 import Lamb16, reference
from lamb16.baselines import Lamb
from lamb16.entries import DERIVED, OLD_NAMES
from ranks import Ranks
from sharded import adamw_state, convert_sharded

BASE: dict[str, Any] = {"weight_decay": 0.1, "compile": False}
TAKEN = "ignore:Lamb16..* lr"  # of a rate that is taken over
SHAPES = ((70, 64), (4097,), (7, 3), ())


def timm(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    module = pytest.importorskip("timm.optim", reason="timm is not installed")
    optimizer: torch.optim.Optimizer = module.Lamb(params, lr=0.01)
    return optimizer


def torchao(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    module = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    optimizer: torch.optim.Optimizer = module.AdamW8bit(params, lr=0.01, block_size=64)
    return optimizer


def bitsandbytes(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    module = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    optimizer: torch.optim.Optimizer = module.optim.AdamW8bit(params, lr=0.01, min_8bit_size=4096)
    return optimizer


SOURCES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "Lamb": lambda params: Lamb(params, lr=0.01),
    "timm's Lamb": timm,
}
LOW_BIT = {"torchao": torchao, "bitsandbytes": bitsandbytes}


def stepped(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Three steps; some gradients are 0 or very small."""
    optimizer = make(parameters(SHAPES))
    params = all_params(optimizer)
    for t in range(3):
        grads = [
            grad * 10.0 ** torch.linspace(-9, 2, max(1, grad.numel()), device=DEVICE).view(grad.shape)
            for grad in gradients(params, t)
        ]
        for grad in grads:
            grad.view(-1)[:1] = 0
        step_with(optimizer, grads)
    return optimizer


def loaded(saved: dict[str, Any], **options: Any) -> Lamb16:
    optimizer = Lamb16(parameters(SHAPES), **BASE | options)
    optimizer.load_state_dict(saved)
    return optimizer


def assert_quantized(state: dict[str, Any], m: Tensor, v: Tensor) -> None:
    """The codes are those of the reference's rounding to nearest, with the smallest scales that hold all."""
    for key, x, dtype, largest, smallest, bits in (
        ("exp_avg", m, torch.float8_e4m3fn, reference.E4M3_MAX, reference.MIN_SCALE_M, 20),
        ("exp_avg_sq", v, torch.float8_e5m2, reference.E5M2_MAX, reference.MIN_SCALE_V, 21),
    ):
        x = x.detach().float().cpu().contiguous()
        scale = reference.power_of_two_scale(float(x.abs().max()), largest, smallest)
        half = torch.full(x.shape, 1 << (bits - 1))
        codes = reference.round_stochastically(x / scale, half, bits, dtype)
        if key == "exp_avg_sq":
            codes = torch.where(x > 0, codes.clamp(min=1), codes)
        assert state[f"{key}_scale"].item() == scale
        assert_same_bits(raw(state[f"{key}_codes"]), raw(codes))
        assert state[f"{key}_max"].item() == reference.decode(codes, dtype).abs().max().item()


@pytest.mark.parametrize("source", SOURCES)
def test_moments_are_rounded_to_nearest(source: str) -> None:
    theirs = stepped(SOURCES[source])
    mine = loaded(copy.deepcopy(theirs.state_dict()))
    for p, q in zip(all_params(mine), all_params(theirs), strict=True):
        state, old = mine.state[p], theirs.state[q]
        assert_quantized(state, old["exp_avg"], old["exp_avg_sq"])
        assert int(state["step"]) == 3
        assert torch.equal(state["exp_avg_sq_codes"].float() > 0, old["exp_avg_sq"] > 0)
    fresh = Lamb16(parameters(SHAPES), **BASE)
    take_steps(fresh, [0])
    for p, q in zip(all_params(mine), all_params(fresh), strict=True):
        assert mine.state[p]["salt"] == fresh.state[q]["salt"]
    take_steps(mine, [3])
    assert all(torch.isfinite(p).all() for p in all_params(mine))


@pytest.mark.parametrize("source", SOURCES)
def test_moments_in_float32_are_taken_as_they_are(source: str) -> None:
    theirs = stepped(SOURCES[source])
    mine = loaded(theirs.state_dict(), moment_dtype="float32")
    for p, q in zip(all_params(mine), all_params(theirs), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.state[p][f"{key}_codes"], theirs.state[q][key])
            assert mine.state[p][f"{key}_scale"] == 1


@pytest.mark.parametrize("source", LOW_BIT)
def test_states_of_eight_bits_are_read(source: str) -> None:
    theirs = stepped(LOW_BIT[source])
    mine = loaded(theirs.state_dict())
    low_bit = 0
    for p, q in zip(all_params(mine), all_params(theirs), strict=True):
        state = theirs.state[q]
        if source == "torchao":
            m, v = (x.dequantize() if hasattr(x, "codes") else x for x in (state["exp_avg"], state["exp_avg_sq"]))
            low_bit += hasattr(state["exp_avg"], "codes")
        else:
            from bitsandbytes.functional import dequantize_blockwise

            m, v = state["state1"], state["state2"]
            if m.dtype == torch.uint8:
                m = dequantize_blockwise(m, absmax=state["absmax1"], code=state["qmap1"], blocksize=256)
                v = dequantize_blockwise(v, absmax=state["absmax2"], code=state["qmap2"], blocksize=256)
                low_bit += 1
        assert_quantized(mine.state[p], m, v)
        assert int(mine.state[p]["step"]) == 3
    assert low_bit


def apex_state() -> dict[str, Any]:
    """As FusedLAMB has it: the step is in the group."""
    saved = copy.deepcopy(stepped(SOURCES["AdamW"]).state_dict())
    for state in saved["state"].values():
        saved["param_groups"][0]["step"] = state.pop("step")
    return saved


def state_of_version_0_1() -> dict[str, Any]:
    saved = stepped(lambda params: Lamb16(params, **BASE)).state_dict()
    names = {new: old for old, new in OLD_NAMES.items()}
    for key, state in saved["state"].items():
        saved["state"][key] = {names.get(name, name): x for name, x in state.items() if name not in DERIVED}
    return saved


@pytest.mark.parametrize("source", [*SOURCES, *LOW_BIT, "apex's FusedLAMB", "lamb16 0.1"])
def test_nothing_of_what_was_converted_stays_in_the_state(source: str) -> None:
    others = {"note": "a user's", "lookahead_slow_buff": torch.ones(3, device=DEVICE)}
    if source == "lamb16 0.1":
        saved = state_of_version_0_1()
    elif source == "apex's FusedLAMB":
        saved = apex_state()
    else:
        saved = stepped((SOURCES | LOW_BIT)[source]).state_dict()
    plain = loaded(saved)
    mine = loaded(saved | {"state": {key: state | others for key, state in saved["state"].items()}})
    fresh = Lamb16(parameters(SHAPES), **BASE)
    take_steps(fresh, [0])
    for p, q, r in zip(*map(all_params, (mine, plain, fresh)), strict=True):
        assert set(plain.state[q]) == set(fresh.state[r])
        assert set(mine.state[p]) == set(fresh.state[r]) | set(others)
        assert mine.state[p]["note"] == others["note"]
        assert torch.equal(mine.state[p]["lookahead_slow_buff"], others["lookahead_slow_buff"])
    theirs = torch.optim.AdamW(parameters(SHAPES), lr=0.01)
    theirs.load_state_dict(mine.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        take_steps(theirs, [1])


@pytest.mark.filterwarnings(TAKEN)
def test_hyperparameters_that_both_have_are_taken_where_they_are_valid() -> None:
    theirs = torch.optim.AdamW(
        parameters(SHAPES), lr=0.03, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.2, maximize=True, fused=True
    )
    take_steps(theirs, [0])
    torch.optim.lr_scheduler.ConstantLR(theirs, 0.5)
    (group,) = loaded(theirs.state_dict(), trust_clip=3.0).param_groups
    expected = {"betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2, "maximize": True, "trust_clip": 3.0}
    assert {key: group[key] for key in expected} == expected
    assert (group["lr"], group["initial_lr"]) == (0.015, 0.03)
    own = {*Lamb16(parameters(SHAPES)).param_groups[0], "initial_lr"}
    assert set(group) == own
    saved = theirs.state_dict()
    saved["param_groups"][0]["eps"] = 0.0
    with pytest.warns(UserWarning, match=r"eps=0\.0 is invalid.*this optimizer's own is kept"):
        assert loaded(saved, eps=1e-5).param_groups[0]["eps"] == 1e-5


def test_rates_that_are_taken_over_are_warned_of_once() -> None:
    params = parameters(SHAPES)
    theirs = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], lr=1e-3)
    take_steps(theirs, [0])
    mine = Lamb16([{"params": params[:2]}, {"params": params[2:], "lr": 0.03}], lr=0.02, compile=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        mine.load_state_dict(theirs.state_dict())
    (warning,) = found
    assert "lr=0.001 of the state" in str(warning.message)
    assert "replaces lr=0.02 in group 0; where AdamW's rate served, three to ten times" in str(warning.message)
    assert warning.filename == __file__
    assert [group["lr"] for group in mine.param_groups] == [1e-3, 0.02]
    mine.load_state_dict(theirs.state_dict())  # of the same rates without a word: a warning is an error
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        mine.float32_state_dict()
    (warning,) = found
    assert "a third to a tenth of this lr serves AdamW" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.filterwarnings(TAKEN)
def test_only_parameters_with_a_state_get_one() -> None:
    theirs = torch.optim.AdamW(parameters(SHAPES), lr=0.03)
    assert not loaded(theirs.state_dict()).state
    all_params(theirs)[1].grad = gradients(all_params(theirs), 0)[1]
    theirs.step()
    mine = loaded(theirs.state_dict())
    assert list(mine.state) == [all_params(mine)[1]]


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a negative second moment": (
        lambda s: s["exp_avg_sq"].view(-1)[3].fill_(-1),
        r"exp_avg_sq .* holds -1\.0, which is no",
    ),
    "a NaN": (lambda s: s["exp_avg"].view(-1)[3].fill_(math.nan), "exp_avg of parameter 1 holds an infinity or a NaN"),
    "an infinity": (lambda s: s["exp_avg_sq"].view(-1)[3].fill_(math.inf), "holds an infinity or a NaN"),
    "one that overflows": (lambda s: s["exp_avg_sq"].view(-1)[3].fill_(2.0**127), "which is no second moment"),
    "another shape": (
        lambda s: s.update(exp_avg=s["exp_avg"][1:]),
        r"shape \(4096,\), but the parameter has shape \(4097,\)",
    ),
    "integers": (
        lambda s: s.update(exp_avg=s["exp_avg"].int()),
        r"exp_avg of parameter 1 cannot be read \(it is torch.int32",
    ),
    "a list": (lambda s: s.update(exp_avg=[0.0]), "is list, expected a tensor"),
    "amsgrad": (
        lambda s: s.update(max_exp_avg_sq=s["exp_avg_sq"]),
        r"\['max_exp_avg_sq'\], of which Lamb16 knows nothing",
    ),
    "no step": (lambda s: s.pop("step"), "step of parameter 1 is None"),
    "a negative step": (lambda s: s.update(step=-1), "step of parameter 1 is -1"),
    "a step beyond int32": (lambda s: s.update(step=2**31 + 1), "step of parameter 1 is 2147483649"),
    "too few blocks": (
        lambda s: s.update(
            state1=torch.zeros(4097, dtype=torch.uint8),
            state2=s.pop("exp_avg_sq"),
            qmap1=torch.zeros(256),
            absmax1=s.pop("exp_avg")[:4],
        ),
        "4 absmax for 4097 codes",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_adam_state_is_refused_and_changes_nothing(fault: str) -> None:
    damage, text = FAULTS[fault]
    saved = copy.deepcopy(stepped(SOURCES["AdamW"]).state_dict())
    damage(saved["state"][1])
    mine = Lamb16(parameters(SHAPES), **BASE)
    take_steps(mine, [0])
    before = snapshot(mine)
    with pytest.raises(ValueError, match=f"Lamb16.load_state_dict: .*{text}"):
        mine.load_state_dict(saved)
    assert_same(snapshot(mine), before)


def test_names_are_matched_in_other_optimizers_states_too() -> None:
    params = dict(zip("ab", parameters(((9, 9), (9, 9))), strict=True))
    theirs = torch.optim.AdamW(params.items(), lr=0.01)
    take_steps(theirs, [0])
    mine = Lamb16([(name, params[name]) for name in "ba"], **BASE)
    mine.load_state_dict(theirs.state_dict())
    for p in params.values():
        assert_quantized(mine.state[p], theirs.state[p]["exp_avg"], theirs.state[p]["exp_avg_sq"])


def test_adamw_fails_on_lamb16s_own_states() -> None:
    """It took codes for moments when the entries had its names."""
    mine = Lamb16(parameters(SHAPES), **BASE)
    take_steps(mine, [0])
    theirs = torch.optim.AdamW(parameters(SHAPES), lr=0.01)
    theirs.load_state_dict(mine.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        take_steps(theirs, [1])


@pytest.mark.filterwarnings(TAKEN)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("moment_dtype", ["float8", "float32"])
def test_adamw_loads_what_float32_state_dict_gives(moment_dtype: str, memory_format: torch.memory_format) -> None:
    start = parameters([(6, 5, 3, 3), (40,)])
    params = [nn.Parameter(p.detach().clone(memory_format=memory_format if p.dim() == 4 else None)) for p in start]
    mine = Lamb16(params, lr=0.02, eps=1e-7, moment_dtype=moment_dtype, **BASE)
    take_steps(mine, range(3))
    saved = mine.float32_state_dict()
    theirs = torch.optim.AdamW(params, lr=0.5)
    assert set(saved["param_groups"][0]) == set(theirs.param_groups[0])
    theirs.load_state_dict(saved)
    group = theirs.param_groups[0]
    assert (group["lr"], group["eps"], group["weight_decay"], group["betas"]) == (0.02, 1e-7, 0.1, (0.9, 0.999))
    for p in params:
        own, state = mine.state[p], theirs.state[p]
        assert (state["step"].item(), state["step"].dtype) == (3, torch.float32)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], own[f"{key}_codes"].float() * own[f"{key}_scale"])
            assert state[key].stride() == p.stride()
    back = Lamb16(params, moment_dtype=moment_dtype, **BASE)
    back.load_state_dict(saved)
    for p in params:
        for key in ("exp_avg_codes", "exp_avg_sq_codes"):
            # The scale may be half of what it was, where the bound was above the largest value.
            scale = key.replace("codes", "scale")
            values = [o.state[p][key].float() * o.state[p][scale] for o in (mine, back)]
            assert torch.equal(*values)
    take_steps(theirs, [3])


def losses(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Of a two-layer regression."""
    found = []
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(256, 32, generator=generator).to(DEVICE)
        wanted = torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
        loss = ((torch.tanh(x @ params[0].T + params[1]) @ params[2].T - wanted) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.filterwarnings(TAKEN)
def test_training_goes_on_from_adamw_to_lamb16_and_back() -> None:
    """The loss does not jump, and the second moments that AdamW gets back are near those of an unbroken run."""
    params = parameters([(64, 32), (64,), (1, 64)])
    for p in params:
        p.data.mul_(0.15)
    adamw = torch.optim.AdamW(params, lr=3e-3)
    before = losses(params, adamw, range(150))
    unbroken = [nn.Parameter(p.detach().clone()) for p in params]
    reference_run = torch.optim.AdamW(unbroken, lr=3e-3)
    reference_run.load_state_dict(copy.deepcopy(adamw.state_dict()))
    expected = losses(unbroken, reference_run, range(150, 220))
    mine = Lamb16(params, compile=False)
    mine.load_state_dict(adamw.state_dict())
    during = losses(params, mine, range(150, 190))
    again = torch.optim.AdamW(params, lr=3e-3)
    again.load_state_dict(mine.float32_state_dict())
    after = losses(params, again, range(190, 220))
    level = sum(before[-20:]) / 20
    assert max(during + after) < 1.3 * max(level, *expected)
    assert sum(after[-20:]) < 1.1 * sum(expected[-20:])


def test_sharded_states_get_the_codes_of_one_process(ranks: Ranks) -> None:
    state = adamw_state()
    whole = Lamb16([nn.Parameter(w) for w in state["weights"]], compile=False)
    whole.load_state_dict(state["optimizer"])
    expected = {f"{i}.{key}": x for i, p in enumerate(all_params(whole)) for key, x in whole.state[p].items()}
    expected = {key: raw(x) for key, x in expected.items() if not key.endswith("max")}
    for placement, world in (("rows over 2", 2), ("columns over 3", 3), ("rows and columns", 4)):
        for found, fault in ranks.run(world, convert_sharded, placement):
            assert_same(found, expected)
            assert "Lamb16.load_state_dict" in fault


@pytest.mark.filterwarnings(TAKEN)
def test_the_end_of_the_count_comes_back_from_float32() -> None:
    mine = Lamb16(parameters(SHAPES), **BASE)
    take_steps(mine, [0])
    for state in mine.state.values():
        state["step"].fill_(2**31 - 1)
    back = Lamb16(parameters(SHAPES), **BASE)
    back.load_state_dict(mine.float32_state_dict())
    take_steps(back, [1])
    assert {int(state["step"]) for state in back.state.values()} == {2**31 - 1}
