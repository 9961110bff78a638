"""Weights with 16 bits: stochastic rounding, and bfloat16 that is kept exactly with a remainder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bits import assert_same_bits, same_bits
from compare import DEVICE, make, patched, run_beside_reference
from helpers import step_with
from lamb16 import Lamb16, reference
from lamb16.reference import Hyper
from lamb16.step import floats
from strategies import Case, cases

PATTERNS = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)  # every bfloat16 there is
NUMBERS = PATTERNS[torch.isfinite(PATTERNS)]
HALVES = torch.arange(1 << 16).to(torch.int16).view(torch.float16)
EDGES = [-32768, -32767, -1, 0, 1, 32766, 32767]
CONTROL = Case(
    shapes=[(2049,), (70, 3)],
    hyper={"lr": 0.01, "weight_decay": 0.1},
    dtype=torch.bfloat16,
    kinds=[["normal", "normal"], ["normal", "inf"], ["normal", "normal"]],
    exponent=-2,
    weight_exponent=-1,
)
EXACT = replace(CONTROL, param_rounding="exact")


def with_bits(top: Tensor, low: int) -> Tensor:
    """The float32 values with bfloat16's bits, followed by zeros, plus ``low``."""
    return (top.float().view(torch.int32) + low).view(torch.float32)


# -- splitting and joining ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", EDGES)
def test_every_pattern_is_split_and_joined(low: int) -> None:
    """Also where the remainder borrows from the exponent, at infinities and at -0; NaN stays NaN."""
    weights = with_bits(PATTERNS, low)
    p, remainder = reference.split(weights)
    numbers = ~weights.isnan()
    assert torch.equal(p.isnan(), weights.isnan())
    assert_same_bits(reference.joined(p, remainder)[numbers], weights[numbers])
    assert_same_bits(p[numbers & ~PATTERNS.isnan()], PATTERNS[numbers & ~PATTERNS.isnan()])
    assert set(remainder[numbers].tolist()) == {low}


@pytest.mark.parametrize("low", EDGES)
def test_no_remainder_makes_a_number_a_nan(low: int) -> None:
    """Of another weight it may be any, and 0 has 32,768 fewer than others; the fast form gives the same bits."""
    remainder = torch.full(NUMBERS.shape, low, dtype=torch.int16)
    weights = reference.joined(NUMBERS, remainder)
    assert not weights.isnan().any()
    assert ((weights - NUMBERS.float()).abs() <= NUMBERS.float().abs() * 2.0**-8 + 2.0**-134).all()
    assert_same_bits(floats.join(NUMBERS.float(), remainder.int()), weights)


@pytest.mark.parametrize("low", EDGES)
def test_the_visible_weight_is_the_nearest(low: int) -> None:
    """To even but for ties, which are all of a remainder of -2^15: these go away from 0."""
    weights = with_bits(NUMBERS, low)
    weights = weights[~weights.isnan()]
    p, nearest = reference.split(weights)[0], weights.to(torch.bfloat16)
    tie = (weights.view(torch.int32) & 0xFFFF) == 0x8000
    assert tie.all() if low == -32768 else not tie.any()
    assert_same_bits(p[~tie], nearest[~tie])
    assert (p[tie].float().abs() > weights[tie].abs()).all()
    assert low != -32768 or not same_bits(p, nearest)


def test_the_fast_split_is_the_references() -> None:
    for low in EDGES:
        weights = with_bits(PATTERNS, low) * 1.0  # which makes NaNs quiet, as all that come of a step are
        exact, nearest = floats.split(weights)
        p, remainder = reference.split(weights)
        there = ~weights.isnan()
        assert_same_bits(nearest.to(torch.bfloat16)[there], p[there])
        assert torch.equal((exact - nearest.view(torch.int32)).to(torch.int16)[there], remainder[there])
        assert nearest[~there].isnan().all()


# -- stochastic rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("word", [0, 1, 0x1FFF, 0x8000, -1])
def test_fast_rounding_is_the_references_for_every_pattern(dtype: torch.dtype, word: int) -> None:
    """On the grid, between its values, in the subnormal range, up to infinity."""
    for low in (-32768, -1, 0, 1, 0x0FFF, 0x1000, 0x1001):
        for values in (PATTERNS,) if dtype == torch.bfloat16 else (PATTERNS, HALVES):
            x = with_bits(values, low) * 1.0
            words = torch.full(x.shape, word, dtype=torch.int32)
            mine = floats.round_weights(x, words, dtype).to(dtype)
            theirs = reference.round_weights(x, words.long(), dtype)
            assert torch.equal(mine.isnan(), x.isnan())
            assert torch.equal(theirs.isnan(), x.isnan())
            assert_same_bits(mine[~x.isnan()], theirs[~x.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_on_the_grid_stays(dtype: torch.dtype) -> None:
    values = PATTERNS if dtype == torch.bfloat16 else HALVES
    x = values[~values.isnan()]
    assert_same_bits(floats.round_weights(x.float(), torch.full(x.shape, -1, dtype=torch.int32), dtype).to(dtype), x)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 16), (torch.float16, 13)], ids=str)
@given(x=st.floats(2.0**-30, 60000.0, width=32), sign=st.sampled_from([-1.0, 1.0]))
def test_every_word_once_gives_the_value_on_average(dtype: torch.dtype, bits: int, x: float, sign: float) -> None:
    """Exactly: as many of the 2^bits words round up as the distance from the lower neighbour says."""
    words = torch.arange(1 << bits, dtype=torch.int32)
    rounded = floats.round_weights(torch.full(words.shape, sign * x), words, dtype).double()
    gap = 2.0**-24 if dtype == torch.float16 else 0.0
    assert abs(float(rounded.mean()) - sign * x) <= max(gap * 2.0**-13, 1e-12 * x)
    assert len(rounded.unique()) <= 2


def test_words_that_round_weights_are_others_than_those_of_moments() -> None:
    """Over elements and over steps: whether a weight goes up has nothing to do with whether its moments do."""
    n = 1 << 18
    at_once = reference.rounding_words(n, salt=7, t=3)
    in_time = torch.tensor([int(reference.rounding_words(1, 7, t, first=5)[0]) for t in range(4096)])
    for words in (at_once, in_time):
        fractions = [0.5, 0.25, 0.1]
        up = {bits: [(words & ((1 << bits) - 1)) / 2.0**bits >= 1 - x for x in fractions] for bits in (16, 13)}
        moments = {bits: [(words >> (32 - bits)) / 2.0**bits >= 1 - x for x in fractions] for bits in (20, 21)}
        for mine in (*up[16], *up[13]):
            for theirs in (*moments[20], *moments[21]):
                a, b = mine.double() - mine.double().mean(), theirs.double() - theirs.double().mean()
                assert abs(float((a * b).mean() / (a.std() * b.std()))) < 5 / len(words) ** 0.5
    # The control: the same bits are not independent.
    a, b = (at_once >> 31).double(), ((at_once >> 12) / 2.0**20 >= 0.5).double()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.99


# -- whole steps -------------------------------------------------------------------------------------------------


def test_the_control_cases_pass(compile: bool) -> None:
    for case in (CONTROL, EXACT, replace(CONTROL, dtype=torch.float16)):
        assert run_beside_reference(case, compile) == 1


@given(case=cases(roundings=("exact",)))
def test_exact_weights_are_those_of_a_float32_run(compile: bool, case: Case) -> None:
    """Bit for bit, after every step: weights with remainders, moments, sums."""
    params, optimizer = make(case, compile)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    names = [str(i) for i in range(len(params))]
    other = Lamb16(
        list(zip(names, twins, strict=True)),
        **case.hyper,
        moment_dtype=case.moment_dtype,
        compile=compile,
        seed=case.seed,
    )
    for step in range(len(case.kinds)):
        grads = case.gradients(step, case.weights())
        step_with(optimizer, grads)
        step_with(other, [None if grad is None else grad.float() for grad in grads])
        exact = optimizer.float32_weights()
        for name, p, q in zip(names, params, twins, strict=True):
            where = f"step {step}, tensor {name}"
            assert_same_bits(exact[name], q, f"{where}: weights")
            assert_same_bits(p, reference.split(q.detach().cpu())[0], f"{where}: visible weights")
            for key in other.state[q]:
                if key != "param_checksum":
                    a, b = (s[key].view(torch.uint8) if s[key].element_size() == 1 else s[key]
                            for s in (optimizer.state[p], other.state[q]))  # fmt: skip
                    assert_same_bits(a, b, f"{where}: {key}")


def _remainder_lost(p, grad, state, h):
    if state.param_remainder is not None:
        state = replace(state, param_remainder=state.param_remainder * 0)
    return reference.step(p, grad, state, h)


def _checksum_stays(p, grad, state, h):
    new_p, new, stats = reference.step(p, grad, state, h)
    return new_p, replace(new, param_checksum=state.param_checksum), stats


def _to_even(original):
    def split(weights):
        nearest = weights.to(torch.bfloat16)
        return nearest, (weights.view(torch.int32) - nearest.float().view(torch.int32)).to(torch.int16) ^ 1

    return split


def _top_bits(original):
    return lambda x, words, dtype: original(x, words >> 16, dtype)


def _to_nearest(original):
    return lambda x, words, dtype: x.to(dtype)


WRONG = [
    (EXACT, _remainder_lost), (EXACT, _checksum_stays), (EXACT, patched("split", _to_even)),
    (CONTROL, patched("round_weights", _top_bits)), (CONTROL, patched("round_weights", _to_nearest)),
]  # fmt: skip


@pytest.mark.parametrize(("case", "wrong"), WRONG, ids=lambda x: getattr(x, "__name__", ""))
def test_a_wrong_rule_fails(compile: bool, case: Case, wrong) -> None:
    with pytest.raises(AssertionError, match="differ"):
        run_beside_reference(case, compile, rule=wrong)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), -0.0, 3.3895e38, -3.3895e38, 1e-39])
@pytest.mark.parametrize("rounding", ["stochastic", "exact", "nearest"])
def test_awkward_weights_are_stepped_as_in_the_reference(compile: bool, value: float, rounding: str) -> None:
    weights = torch.tensor([value, 1.0, value, -1.0]).to(torch.bfloat16)
    p = nn.Parameter(weights.to(DEVICE, copy=True))
    optimizer = Lamb16([p], lr=0.01, weight_decay=0.1, compile=compile, param_rounding=rounding)
    hyper, state = Hyper(lr=0.01, weight_decay=0.1, param_rounding=rounding), None
    for t in range(3):
        grad = torch.tensor([0.1, -0.2, 0.0, 0.3 * t]).to(torch.bfloat16)
        p.grad = grad.to(DEVICE)
        optimizer.step()
        salt = int(optimizer.state[p]["salt"]) & 0xFFFFFFFF
        state = state or reference.init(weights, salt, param_rounding=rounding)
        weights, state, _ = reference.step(weights, grad, state, hyper)
        mine = p.detach().cpu()
        assert torch.equal(mine.isnan(), weights.isnan())
        assert_same_bits(mine[~mine.isnan()], weights[~mine.isnan()])
