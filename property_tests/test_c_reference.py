"""The C reference gives the bits of reference.py, and the eager and compiled steps give those of the C reference."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compare import run_beside_reference, same_bits
from helpers import edited_c_source
from lamb16 import capi, reference
from lamb16.reference import Hyper, State, Stats
from strategies import Case, cases

pytestmark = pytest.mark.skipif(not any(map(shutil.which, capi.COMPILERS)), reason="no C compiler is installed")

FORMATS = {
    "e4m3": (torch.float8_e4m3fn, 20, 448.0, reference.MIN_SCALE_M),
    "e5m2": (torch.float8_e5m2, 21, 57344.0, reference.MIN_SCALE_V),
}
C_CASES = cases(dtypes=(torch.float32,), moment_dtypes=("float8",))
CONTROL = Case(
    shapes=[(2049,), (70, 3), (1,)],
    hyper={"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.999)},
    kinds=[["normal"] * 3, ["growing"] * 3, ["normal", "nan", "zero"], ["huge", "normal", "tiny"]],
    exponent=-2,
)
CONTROL_HYPER = Hyper(**CONTROL.hyper)


def close(a: float, b: float) -> bool:
    """Sums in float64 differ in their last bits with the order."""
    return math.isclose(a, b, rel_tol=1e-12) or (math.isnan(a) and math.isnan(b))


def assert_same(where: str, mine: tuple[torch.Tensor, State, Stats], theirs: tuple[torch.Tensor, State, Stats]) -> None:
    """Weights, codes, scales, counts and skipping bit for bit; norms and ratio to the last bits."""
    assert same_bits(mine[0], theirs[0]), f"{where}: weights differ"
    for name in ("exp_avg", "exp_avg_sq"):
        assert same_bits(getattr(mine[1], name), getattr(theirs[1], name)), f"{where}: {name} differs"
    for name in ("exp_avg_norm", "exp_avg_sq_norm", "step", "salt"):
        assert getattr(mine[1], name) == getattr(theirs[1], name), f"{where}: {name} differs"
    assert mine[2].skipped == theirs[2].skipped, f"{where}: skipped differs"
    for name in ("weight_norm", "update_norm", "trust_ratio"):
        assert close(getattr(mine[2], name), getattr(theirs[2], name)), f"{where}: {name} differs"


def run_c_beside_reference(case: Case, library: capi.Library) -> None:
    """All tensors of a step in one call of C, against the reference one by one."""
    hyper = Hyper(**case.hyper)
    weights = case.weights()
    states = [reference.init(w, case.seed * 977 + i) for i, w in enumerate(weights)]
    for w, state in zip(weights, states, strict=True):
        assert_same("before", (w, library.init(w, state.salt), NO_STATS), (w, state, NO_STATS))
    for step in range(len(case.kinds)):
        grads = case.gradients(step, weights)
        present = [i for i, grad in enumerate(grads) if grad is not None]
        mine = library.step_list([(weights[i], grads[i], states[i]) for i in present], hyper)
        for i, result in zip(present, mine, strict=True):
            theirs = reference.step(weights[i], grads[i], states[i], hyper)
            assert_same(f"step {step}, tensor {i} {tuple(weights[i].shape)}", result, theirs)
            weights[i], states[i] = theirs[:2]


NO_STATS = Stats(0.0, 0.0, 0.0, False)


@given(case=C_CASES)
def test_c_equals_reference(case: Case) -> None:
    run_c_beside_reference(case, capi.load())


@given(case=C_CASES)
def test_step_equals_c(compile: bool, case: Case) -> None:
    """The eager and the compiled step, with the C reference in place of the Python one."""
    run_beside_reference(case, compile, capi.load().step)


def test_a_power_too_large_for_float64(compile: bool) -> None:
    """The trust ratio is then its upper bound; Python's own power raises OverflowError."""
    case = replace(CONTROL, hyper=CONTROL.hyper | {"lr": 1e-300, "trust_scale": 2.0})
    run_c_beside_reference(case, capi.load())
    run_beside_reference(case, compile)


def test_a_first_moment_that_decodes_to_infinity_is_skipped() -> None:
    """No step leaves such a scale; a state of other origin may hold it."""
    weights, grad = torch.ones(3), torch.full((3,), 0.1)
    codes = torch.tensor([0, 1, 0x7E], dtype=torch.uint8)  # 448 times 2^120 is above float32
    state = State(codes, 2.0**120, codes.clamp(max=0x7B), 1.0, 5, 0)
    theirs = reference.step(weights, grad, state, CONTROL_HYPER)
    assert theirs[2].skipped
    assert_same("infinite", capi.load().step(weights, grad, state, CONTROL_HYPER), theirs)


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50),
    exponent=st.integers(-30, 15),
    word=st.integers(0, 2**32 - 1),
    negative=st.booleans(),
)
def test_encoders_are_the_references_rounding(values, exponent, word, negative) -> None:
    """Whose tables and comparisons have nothing in common with the integer arithmetic that the sweep compares with."""
    for name, (dtype, bits, largest, _) in FORMATS.items():
        x = (torch.tensor(values) * 2.0**exponent).clamp(max=largest) * (-1 if negative else 1)
        words = torch.full(x.shape, word)
        theirs = reference.round_stochastically(x, words >> (32 - bits), bits, dtype)
        assert torch.equal(capi.load().encode(x, words.to(torch.int32), name), theirs)


@given(largest=st.floats(0, 2.0**127, width=32))
def test_scales_are_the_references(largest) -> None:
    for name, (_, _, format_max, smallest) in FORMATS.items():
        found = capi.load().c[f"scale_{name}"](largest)
        assert found == reference.power_of_two_scale(largest, format_max, smallest)


@given(salt=st.integers(0, 2**32 - 1), t=st.integers(0, 2**31 - 1), first=st.integers(0, 2**40))
def test_words_are_the_references(salt, t, first) -> None:
    theirs = reference.rounding_words(100, first + salt, t)
    assert torch.equal(capi.load().words(first, salt, t, 100).long() & 0xFFFFFFFF, theirs)


# -- negative controls: one thing changed in a copy of the source ----------------------------------------------------

CHANGES = {
    "golden": ("0x9E3779B9u;", "0x9E3F79B9u;"),
    "hash": ("0xA2C9DAEDu", "0xA2C9DAEFu"),
    "weight floor": ("WEIGHT_FLOOR = 0.01;", "WEIGHT_FLOOR = 0.011;"),
    "overflow": ("OVERFLOW_V = 0x1p127f", "OVERFLOW_V = INFINITY"),
    "largest of e4m3": ("448.0f, 0x1p-117f", "256.0f, 0x1p-117f"),
    "smallest scale of v": ("57344.0f, 0x1p-110f", "57344.0f, 0x1p-111f"),
    "beta2": ("f.beta2 = (float)h->beta2;", "f.beta2 = (float)h->beta2 * 0.9999f;"),
    "1 - beta in float": ("f.new1 = (float)(1.0 - h->beta1);", "f.new1 = 1.0f - (float)h->beta1;"),
    "bias correction": ("f.eps = (float)(h->eps * c1);", "f.eps = (float)h->eps;"),
    "bound": ("if (least > denominator)", "if (least > 1e30f)"),
    "weight decay": ("f->weight_decay * x->param[i]", "f->weight_decay * 0.999f * x->param[i]"),
    "fused": ("f->beta2 * old_v + f->new2 * (g * g)", "fmaf(f->beta2, old_v, f->new2 * (g * g))"),
    "never zero": ("code_v == 0 && e.v > 0.0f ? 1 : code_v", "code_v"),
    "skipped": ("!isfinite(x->grad[i]) || !isfinite(e.m) || !(e.v < OVERFLOW_V)", "e.v >= OVERFLOW_V"),
    "counted": ("if (found.max_m > 0.0f || found.max_v > 0.0f)", "if (1)"),
    "trust scale": ("pow(base, h->trust_scale)", "pow(base, h->trust_scale * 1.001)"),
}
WITNESSES = [
    CONTROL,
    replace(CONTROL, kinds=[["growing"] * 3] * 60, hyper=CONTROL.hyper | {"eps": 1e-16, "bias_correction": False}),
    Case([(5000,)], CONTROL.hyper, kinds=[["lognormal"]] * 2),
    # In the fourth step v is between 2^127 and 2^128; a tensor with zero gradients only.
    Case([(7,), (7,)], CONTROL.hyper | {"betas": (0.9, 0.0)}, kinds=[["growing", "zero"]] * 4, exponent=19),
]


def run_witnesses(library: capi.Library) -> None:
    for case in WITNESSES:
        run_c_beside_reference(case, library)


def test_the_witnesses_pass() -> None:
    run_witnesses(capi.load())


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_c_source_fails(change: str, tmp_path: Path) -> None:
    library = capi.Library(capi.build(tmp_path, files=[edited_c_source(tmp_path, *CHANGES[change])]))
    with pytest.raises(AssertionError, match=r"differs?\b"):
        run_witnesses(library)


def test_a_changed_c_source_fails_the_step_too(compile: bool, tmp_path: Path) -> None:
    """The comparison with the eager and the compiled step."""
    file = edited_c_source(tmp_path, *CHANGES["weight decay"])
    library = capi.Library(capi.build(tmp_path, files=[file]))
    run_beside_reference(CONTROL, compile, capi.load().step)
    with pytest.raises(AssertionError, match="weights differ"):
        run_beside_reference(CONTROL, compile, library.step)
