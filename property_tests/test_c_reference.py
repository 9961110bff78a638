"""The C reference gives the bits of reference.py, and the eager and compiled steps give those of the C reference."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bits import assert_same_bits, same_bits
from compare import run_beside_reference
from helpers import edited_c_source
from lamb16 import capi, reference
from lamb16.hyper import ROUNDINGS, Hyper
from lamb16.lab.sweep_weights import boundaries
from lamb16.reference import State, Stats
from strategies import LAST_STEP, Case, cases

pytestmark = pytest.mark.skipif(not any(map(shutil.which, capi.COMPILERS)), reason="no C compiler is installed")

FORMATS = {
    "e4m3": (torch.float8_e4m3fn, 20, 448.0, reference.MIN_SCALE_M),
    "e5m2": (torch.float8_e5m2, 21, 57344.0, reference.MIN_SCALE_V),
}
FLOAT32_CASES = cases(dtypes=(torch.float32,), moment_dtypes=("float8",))
KINDS = [
    (dtype, rounding)
    for dtype in capi.DTYPES
    for rounding in ROUNDINGS
    if (dtype, rounding) != (torch.float16, "exact")
]
C_CASES = st.builds(
    lambda case, kind: replace(case, dtype=kind[0], param_rounding=kind[1]),
    FLOAT32_CASES,
    st.sampled_from(KINDS),
)
CONTROL = Case(
    shapes=[(2049,), (70, 3), (1,)],
    hyper={"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.999)},
    kinds=[["normal"] * 3, ["growing"] * 3, ["normal", "nan", "zero"], ["huge", "normal", "tiny"]],
    exponent=-2,
)
CONTROL_HYPER = Hyper(**CONTROL.hyper)
# Of the gradient: from clipping and from a gradient scaler; too small and too large for float32.
FACTORS = st.one_of(
    st.just(1.0), st.floats(0, 1), st.sampled_from([0.0, 2.0**-16, 65536.0, 1e-40, 1e-60, 3e38, 1e39, 1e300])
)


def same(a: object, b: object) -> bool:
    """Tensors by their bits, numbers by their values; NaN is NaN, as a weight too where torch's cast has made it."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype in capi.DTYPES[1:] and a.dtype == b.dtype:
            nan = a.isnan() & b.isnan()
            a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
        return same_bits(a, b)
    return a == b or (a != a and b != b)


def assert_same(where: str, mine: tuple[torch.Tensor, State, Stats], theirs: tuple[torch.Tensor, State, Stats]) -> None:
    """Weights, all of the state, norms and ratio, exactly.

    Sums are of integers, and the ratio's power comes from the same C library in both, which Python's calls.
    """
    weights = same if theirs[1].param_remainder is None else same_bits
    assert weights(mine[0], theirs[0]), f"{where}: weights differ"
    for k in (1, 2):
        for f in fields(theirs[k]):
            a, b = getattr(mine[k], f.name), getattr(theirs[k], f.name)
            assert same(a, b), f"{where}: {f.name} differs: {a}, {b}"


def run_c_beside_reference(
    case: Case,
    library: capi.Library,
    factors: Sequence[float] = (1.0,),
    grad_dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> None:
    """All tensors of a step in one call of C, against the reference one by one; step k has the k-th factor, in turn.

    Tensor i has the i-th dtype of gradients, in turn. Before every second step something else sets a weight. Step and
    salt are the case's, if it has any, from the first step on.
    """
    hyper = Hyper(**case.hyper, **case.words)
    weights, rounding = case.weights(), case.param_rounding
    states = [reference.init(w, case.seed * 977 + i, param_rounding=rounding) for i, w in enumerate(weights)]
    for w, state in zip(weights, states, strict=True):
        assert_same("before", (w, library.init(w, state.salt, rounding), NO_STATS), (w, state, NO_STATS))
    states = [replace(state, **case.counts) for state in states]
    for step in range(len(case.kinds)):
        grads, factor = case.gradients(step, [w.float() for w in weights]), factors[step % len(factors)]
        tensors = {
            i: (weights[i], grad.to(grad_dtypes[i % len(grad_dtypes)]), states[i])
            for i, grad in enumerate(grads)
            if grad is not None
        }
        for w, _, _ in tensors.values() if step % 2 else ():
            w.view(-1)[w.numel() // 2 :][:1] = 0.5
        mine = library.step_list(list(tensors.values()), hyper, factor)
        for (i, own), result in zip(tensors.items(), mine, strict=True):
            theirs = reference.step(*own, hyper, factor)
            assert_same(f"step {step}, tensor {i} {tuple(weights[i].shape)}", result, theirs)
            weights[i], states[i] = theirs[:2]


NO_STATS = Stats(0.0, 0.0, 0.0, False)


@given(
    case=C_CASES,
    factors=st.lists(FACTORS, min_size=1, max_size=5),
    grad_dtypes=st.lists(st.sampled_from(capi.DTYPES), min_size=1, max_size=3),
)
def test_c_equals_reference(case: Case, factors: list[float], grad_dtypes: list[torch.dtype]) -> None:
    run_c_beside_reference(case, capi.load(), factors, grad_dtypes)


ALL_BITS = torch.arange(1 << 16).to(torch.int16)
# Large steps, after which weights are infinite; usual ones; and steps in the order of float16's subnormal weights.
STEPS = {"large": 100.0, "usual": 0.3, "small": 1e-7}


@pytest.mark.parametrize("lr", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(("dtype", "rounding"), KINDS[len(ROUNDINGS) :])
def test_all_weights_with_16_bits(dtype: torch.dtype, rounding: str, lr: float) -> None:
    """Infinite, subnormal and NaN ones, both zeros; with the remainders at the ends and around 0."""
    hyper = Hyper(lr=lr, trust_scale=0.0, weight_decay=0.01 if lr < 1 else 0.0, maximize=True, param_rounding=rounding)
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(3, len(ALL_BITS), generator=generator)
    grads[1, 7] = math.nan
    for rest in (-32768, -1, 0, 1, 32767) if rounding == "exact" else (0,):
        p = ALL_BITS.view(dtype)
        state = reference.init(p, 3, param_rounding=rounding)
        if rounding == "exact":
            remainder = torch.full_like(ALL_BITS, rest)
            state = replace(state, param_remainder=remainder, param_checksum=reference.checksum(p))
        for step, grad in enumerate(grads):
            mine, theirs = capi.load().step(p, grad, state, hyper), reference.step(p, grad, state, hyper)
            assert_same(f"remainder {rest}, step {step}", mine, theirs)
            assert theirs[2].skipped == (step == 1)
            p, state = theirs[:2]
        if dtype == torch.float16:
            assert p.isinf().any() or lr < 1, "of finite ones; infinite ones have become NaN"


def test_remainders_go_with_other_weights_even_where_the_tensor_is_skipped() -> None:
    hyper = replace(CONTROL_HYPER, param_rounding="exact")
    p, grad = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    p, state, _ = reference.step(p.bfloat16(), grad, reference.init(p.bfloat16(), 1, param_rounding="exact"), hyper)
    other = p.clone()
    other[7] += 1
    for weights, factor, kept in ((p, 1e300, True), (other, 1e300, False), (other, 1.0, False)):
        mine, theirs = (rule(weights, grad, state, hyper, factor) for rule in (capi.load().step, reference.step))
        assert_same(f"factor {factor}", mine, theirs)
        if factor > 1:
            assert mine[2].skipped
            assert torch.equal(mine[1].param_remainder, state.param_remainder) == kept
            assert bool(mine[1].param_remainder.any()) == kept
            assert (mine[1].param_checksum == state.param_checksum) == kept


@given(case=FLOAT32_CASES)
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
    state = replace(
        reference.init(weights, 0),
        exp_avg_codes=codes,
        exp_avg_scale=2.0**120,
        exp_avg_max=448.0,
        exp_avg_sq_codes=codes.clamp(max=0x7B),
        exp_avg_sq_scale=1.0,
        exp_avg_sq_max=57344.0,
        step=5,
    )
    theirs = reference.step(weights, grad, state, CONTROL_HYPER)
    assert theirs[2].skipped
    assert_same("infinite", capi.load().step(weights, grad, state, CONTROL_HYPER), theirs)


@given(
    larger=st.tuples(st.floats(1, 2.0**20, width=32), st.floats(1, 2.0**20, width=32)),
    sums=st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)),
    mask_count=st.integers(0, 7),
    caution=st.booleans(),
)
def test_states_that_no_step_leaves(larger, sums, mask_count, caution) -> None:
    """Maxima above what the codes hold, which the bounds go by all the same; any sums and counts."""
    hyper = replace(CONTROL_HYPER, caution=caution)
    weights, grad = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    weights, state, _ = reference.step(weights, grad, reference.init(weights, 3), hyper)
    state = replace(
        state,
        exp_avg_max=reference.f32(state.exp_avg_max * larger[0]),
        exp_avg_sq_max=reference.f32(state.exp_avg_sq_max * larger[1]),
        weight_sum=sums[0],
        update_sum=sums[1],
        mask_count=mask_count,
    )
    theirs = reference.step(weights, grad, state, hyper)
    assert_same("altered", capi.load().step(weights, grad, state, hyper), theirs)


# -- the gradients' norm -----------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.floats(width=32),  # all of them: infinite, NaN and subnormal ones too
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-126), 2.0**-63, 1.0, 2.0**127, -(2.0**127), 3.4e38]),
)
GRADIENT_LISTS = st.lists(
    st.one_of(
        st.lists(VALUES, max_size=20),
        st.lists(st.floats(-(2.0**-126), 2.0**-126, width=32), max_size=20),
        st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 3000)).map(
            lambda drawn: [drawn[0] * (-1) ** k for k in range(drawn[1])]
        ),
    ).map(torch.tensor),
    max_size=6,
)


@given(grads=GRADIENT_LISTS, dtype=st.sampled_from(capi.DTYPES[1:]))
def test_the_norm_of_gradients_with_16_bits_is_the_references(grads: list[torch.Tensor], dtype: torch.dtype) -> None:
    mixed = [grad.to(dtype) if k % 2 == 0 else grad for k, grad in enumerate(grads)]
    assert capi.load().grad_norm(mixed) == reference.grad_norm(mixed)


@given(grads=GRADIENT_LISTS)
def test_the_gradients_norm_is_the_references_and_close_to_torchs(grads: list[torch.Tensor]) -> None:
    norm = capi.load().grad_norm(grads)
    assert norm == reference.grad_norm(grads)
    finite = [grad.double() for grad in grads if grad.isfinite().all()]
    count = sum(grad.numel() for grad in finite)
    # Squares are of float32, and a multiple of 2^-40 of the largest or, where all are subnormal, of 2^-250.
    theirs = float(torch.nn.utils.get_total_norm(finite))
    assert math.isclose(norm, theirs, rel_tol=1e-6, abs_tol=math.sqrt(count * 2.0**-41) * 2.0**-125)


def test_the_gradients_norm_beyond_64_bits() -> None:
    """A sum of 2^25 squares just below 2^40."""
    grad = torch.full((1 << 16,), 1 - 2.0**-24)
    norm = capi.load().grad_norm([grad] * 512)
    assert norm == reference.grad_norm([grad] * 512)
    assert math.isclose(norm, 2.0**12.5, rel_tol=1e-6)


@given(norm=st.floats(0, allow_nan=False), max_norm=st.floats(0, exclude_min=True))
def test_the_clip_factor_is_the_references(norm: float, max_norm: float) -> None:
    assert capi.load().clip_factor(norm, max_norm) == reference.clip_factor(norm, max_norm)


def test_clipping_is_torchs() -> None:
    """A norm over all tensors, its factor, a step with it: weights as with gradients that torch has clipped."""
    library, generator = capi.load(), torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator) for n in (70, 1023)]
    grads = [torch.randn(w.shape, generator=generator) for w in weights]
    factor = library.clip_factor(library.grad_norm(grads), 0.5)
    clipped = [torch.nn.Parameter(w) for w in weights]
    for p, grad in zip(clipped, grads, strict=True):
        p.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(clipped, 0.5)
    for p, grad in zip(clipped, grads, strict=True):
        state = library.init(p, 1)
        mine, theirs = (
            library.step(p, grad, state, CONTROL_HYPER, factor),
            library.step(p, p.grad, state, CONTROL_HYPER),
        )
        torch.testing.assert_close(mine[0], theirs[0])
        assert factor < 0.1


# -- rounding ----------------------------------------------------------------------------------------------------------


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


def check_rounding_of_weights(library: capi.Library, x: torch.Tensor, words: torch.Tensor) -> None:
    """C against the reference in every rounding, on float32 values and int64 words."""
    own = (words - (1 << 32) * (words >> 31)).to(torch.int32)
    for dtype in capi.DTYPES[1:]:
        mine, _ = library.round_weights(x, dtype, "stochastic", own)
        assert same(mine, reference.round_weights(x, words, dtype)), "stochastically rounded weights differ"
        mine, _ = library.round_weights(x, dtype, "nearest")
        assert same(mine, x.to(dtype)), "weights to nearest differ"
    mine, theirs = library.round_weights(x, torch.bfloat16, "exact"), reference.split(x)
    for x, y in zip(mine, theirs, strict=True):
        assert_same_bits(x, y, "exact weights")
    assert_same_bits(library.widen_weights(*mine), reference.joined(*theirs), "joined weights")


@given(values=st.lists(VALUES, min_size=1, max_size=50), word=st.integers(0, 2**32 - 1))
def test_weights_are_rounded_as_the_references(values: list[float], word: int) -> None:
    check_rounding_of_weights(capi.load(), torch.tensor(values), torch.full((len(values),), word))


@given(largest=st.floats(0, 2.0**127, width=32))
def test_scales_are_the_references(largest) -> None:
    for name, (_, _, format_max, smallest) in FORMATS.items():
        found = capi.load().c[f"scale_{name}"](largest)
        assert found == reference.power_of_two_scale(largest, format_max, smallest)


@given(salt=st.integers(0, 2**32 - 1), t=st.integers(0, 2**31 - 1), first=st.integers(0, 2**40))
def test_words_are_the_references(salt, t, first) -> None:
    theirs = reference.rounding_words(100, salt, t, first)
    assert torch.equal(capi.load().words(first, salt, t, 100).long() & 0xFFFFFFFF, theirs)


# -- negative controls: one thing changed in a copy of the source ----------------------------------------------------

CHANGES = {
    "golden": ("0x9E3779B9u;", "0x9E3F79B9u;"),
    "hash": ("0xA2C9DAEDu", "0xA2C9DAEFu"),
    "weight floor": ("WEIGHT_FLOOR = 0.01f;", "WEIGHT_FLOOR = 0.011f;"),
    "update floor": ("clamped_square(e.u, f->eps)", "clamped_square(e.u, WEIGHT_FLOOR)"),
    "sums truncated": ("nearbyint((double)square * SUM_UNITS)", "floor((double)square * SUM_UNITS)"),
    "ties away from zero": ("nearbyint((double)square * SUM_UNITS)", "round((double)square * SUM_UNITS)"),
    "sum of NaN": ("else if (!(square <= 1.0f))", "else if (square > 1.0f)"),
    "sums of the step before": ("x->update_sum = found.update_sum;", "x->update_sum += 0;"),
    "weights before the step": (
        "found.weight_sum += clamped_square(weight, WEIGHT_FLOOR);",
        "found.weight_sum += clamped_square(weight + f->step_size * e.u, WEIGHT_FLOOR);",
    ),
    "overflow": ("OVERFLOW_V = 0x1p127f", "OVERFLOW_V = INFINITY"),
    "largest of e4m3": ("E4M3_MAX = 448.0f", "E4M3_MAX = 256.0f"),
    "smallest scale of v": ("MIN_SCALE_V = 0x1p-110f", "MIN_SCALE_V = 0x1p-111f"),
    "beta2": ("f.beta2 = (float)h->beta2;", "f.beta2 = (float)h->beta2 * 0.9999f;"),
    "1 - beta in float": ("f.new1 = (float)(1.0 - h->beta1);", "f.new1 = 1.0f - (float)h->beta1;"),
    "bound of m": (
        "f.beta1 * (x->exp_avg_max * x->exp_avg_scale) + f.new1 * largest",
        "fmaxf(x->exp_avg_max * x->exp_avg_scale, largest)",
    ),
    "bound of v": ("f.new2 * (largest * largest)", "largest * largest"),
    "maximum before rounding": ("float m = fabsf(decode(code_m, &E4M3))", "float m = fabsf(e.m) / scale_m"),
    "bias correction": ("f.root = (float)(1.0 / sqrt(c2));", "f.root = 1.0f;"),
    "bias correction of the next step": ("pow(h->beta1, t + 1.0)", "pow(h->beta1, t)"),
    "without nesterov": ("h->beta1 / c3 : 1.0 / c1", "h->beta1 / c3 : 1.0 / c3"),
    "bound": ("if (!(least <= denominator))", "if (least > 1e30f)"),
    "inverse bound": ("a * a * (q / (1.0 - q))", "a * a / (1.0 - q)"),
    "caution": ("e.agrees ? d * f->gain : 0.0f", "d * f->gain"),
    "gain of caution": ("e.agrees ? d * f->gain : 0.0f", "e.agrees ? d : 0.0f"),
    "largest gain": ("        counted = n / 1000.0;", "        counted = n / 100.0;"),
    "share of this step": (
        "totals found = apply(",
        "int64_t now = 0;\n"
        "for (size_t i = 0; i < x->numel; i++) now += evaluate(x, i, 0.0f, &f).agrees;\n"
        "f.gain = (float)gain(x->numel, now);\n"
        "totals found = apply(",
    ),
    "counted without caution": ("if (h->caution)\n            x->mask_count", "x->mask_count"),
    "weight decay": ("f->weight_decay * weight", "f->weight_decay * 0.999f * weight"),
    "fused": ("f->beta2 * old_v + f->new2 * (g * g)", "fmaf(f->beta2, old_v, f->new2 * (g * g))"),
    "never zero": ("code_v == 0 && e.v > 0.0f", "code_v == 0 && e.v > 1e30f"),
    "skipped": ("!(isfinite(largest) && isfinite(bound_m) && bound_v < OVERFLOW_V)", "bound_v >= OVERFLOW_V"),
    "salt where nothing is counted": (
        "x->salt += 1; /* but the weights",
        "x->salt += 0; /* but the weights",
    ),
    "count that wraps": (
        "x->step = step_number(x);",
        "x->step = x->step < INT32_MAX ? x->step + 1 : INT32_MIN;",
    ),
    "salt at the end of the count": ("            x->salt += 1;\n", "            x->salt += 0;\n"),
    "words at the end of the count": (
        "lamb16_word(i, x->salt, t);",
        "lamb16_word(i, x->salt, t) + (x->step == INT32_MAX) * GOLDEN;",
    ),
    "salt without decay": ("h->lr != 0.0 && h->weight_decay != 0.0) {", "h->lr != 0.0) {"),
    "salt without a rate": ("h->lr != 0.0 && h->weight_decay != 0.0) {", "h->weight_decay != 0.0) {"),
    "counted": ("if (bound_m > 0.0f || bound_v > 0.0f)", "if (1)"),
    "trust scale": ("pow(base, h->trust_scale)", "pow(base, h->trust_scale * 1.001)"),
    "gradient factor": ("h->maximize ? -grad_factor : grad_factor", "h->maximize ? -grad_factor : 1.0"),
}
WEIGHT_CHANGES = {
    "bits of bfloat16": ("{7, -126, 16,", "{7, -126, 15,"),
    "bits of float16": ("{10, -14, 13,", "{10, -14, 12,"),
    "mask of the word": ("word & ((1u << f->random_bits) - 1)", "word & ((1u << f->random_bits) - 2)"),
    "top bits of the word": ("word & ((1u << f->random_bits) - 1)", "word >> (32 - f->random_bits)"),
    "ties to even": ("found.code % 2 == 1", "found.code % 2 == 0"),
    "ties from zero": ("found.fraction >= 0.5", "found.fraction > 0.5"),
    "all to nearest": ("if (rounding == LAMB16_ROUNDING_STOCHASTIC)\n            code", "if (0)\n            code"),
    "remainders stay": (
        "if (x->numel > 0)\n            memset(x->param_remainder",
        "if (0)\n            memset(x->param_remainder",
    ),
    "remainders stay where skipped": (
        "int64_t sum = is_exact(x, h) ?",
        "int64_t sum = is_exact(x, h) && isfinite(largest_gradient(x, 1.0f)) ?",
    ),
    "checksum of the step before": ("        x->param_checksum = checksum(x);", "        x->param_checksum += 0;"),
    "hash of 16 bits": ("[i] << 16);\n    return sum;", "[i]);\n    return sum;"),
    "sum of rounded weights": ("return load_weight(x, i, h);\n}", "return load(x->param, x->param_dtype, i);\n}"),
    "weights without remainders": (
        "float weight = load_weight(x, i, h);",
        "float weight = load(x->param, x->param_dtype, i);",
    ),
    "dtype of gradients": (
        "fabsf(factor * load(x->grad, x->grad_dtype, i))",
        "fabsf(factor * load(x->grad, x->param_dtype, i))",
    ),
}
NORM_CHANGES = {
    "norm truncated": ("nearbyint((double)(x * x) * NORM_UNITS)", "floor((double)(x * x) * NORM_UNITS)"),
    "squares in double": ("(double)(x * x) * NORM_UNITS", "(double)x * (double)x * NORM_UNITS"),
    "subnormals": ("exponent = -125;", "exponent = exponent + 0;"),
    "carry": ("high += low < square;", "high += 0;"),
    "infinite": ("!isfinite(largest_gradient(&tensors[k], 1.0f))", "0 * largest_gradient(&tensors[k], 1.0f) > 0"),
}
WITNESSES: list[tuple[Case, Sequence[float]]] = [
    (CONTROL, (1.0,)),
    *(
        (replace(CONTROL, kinds=[["growing"] * 3] * 60, hyper=CONTROL.hyper | changed), (1.0,))
        for changed in (
            {"eps": 1e-16, "bias_correction": False},
            {"eps": 1e-16, "nesterov": False},
        )
    ),
    (Case([(5000,)], CONTROL.hyper, kinds=[["lognormal"]] * 3), (1.0, 0.3)),
    # In the fourth step v is between 2^127 and 2^128; a tensor with zero gradients only.
    (Case([(7,), (7,)], CONTROL.hyper | {"betas": (0.9, 0.0)}, kinds=[["growing", "zero"]] * 4, exponent=19), (1.0,)),
    # No element of the second update has the gradient's sign.
    (
        Case([(2049,)], CONTROL.hyper | {"caution": True}, kinds=[["normal"], ["zero"], ["normal"], ["normal"]]),
        (1.0, 65536.0),
    ),
    *(
        (
            Case([(5000,), (3,)], CONTROL.hyper, dtype, param_rounding=rounding, kinds=[["normal", "nan"]] * 4),
            (1.0,),
        )
        for dtype, rounding in KINDS[len(ROUNDINGS) :]
    ),
    # Gradients of zero only: without decay, and with a rate of 0, the salt stays.
    *((Case([(7,)], CONTROL.hyper | {name: 0.0}, kinds=[["zero"]]), (1.0,)) for name in ("weight_decay", "lr")),
    (replace(CONTROL, counts={"step": LAST_STEP - 1, "salt": 2**32 - 1}), (1.0,)),
    # Weights that become infinite, and then NaN.
    (Case([(64,)], CONTROL.hyper | {"weight_decay": 1e300}, kinds=[["normal"]] * 3), (1.0,)),
]
NORM_WITNESSES = [
    [torch.randn(1023, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, math.inf]), torch.ones(0)],
    [torch.arange(1.0, 20.0) * 2.0**-149],
    [torch.full((1 << 16,), 1 - 2.0**-24)] * 512,
]


def run_witnesses(library: capi.Library) -> None:
    for case, factors in WITNESSES:
        run_c_beside_reference(case, library, factors, (torch.float32, torch.bfloat16, torch.float16))
    patterns = torch.tensor(list(boundaries()))
    for sign in (0, 1 << 31):
        x = ((patterns[:, None] + torch.arange(-1, 2)).clamp(min=0) - sign).to(torch.int32).view(torch.float32).view(-1)
        for words in (torch.zeros(len(x), dtype=torch.int64), torch.full((len(x),), 0xFFFFFFFF)):
            check_rounding_of_weights(library, x, words)
    for grads in NORM_WITNESSES:
        assert library.grad_norm(grads) == reference.grad_norm(grads), "norms differ"


def test_the_witnesses_pass() -> None:
    run_witnesses(capi.load())


@pytest.mark.parametrize("change", CHANGES | WEIGHT_CHANGES | NORM_CHANGES)
def test_a_changed_c_source_fails(change: str, tmp_path: Path) -> None:
    file = edited_c_source(tmp_path, *(CHANGES | WEIGHT_CHANGES | NORM_CHANGES)[change])
    library = capi.Library(capi.build(tmp_path, files=[file]))
    with pytest.raises(AssertionError, match=r"differs?\b"):
        run_witnesses(library)


def test_a_changed_c_source_fails_the_step_too(compile: bool, tmp_path: Path) -> None:
    """The comparison with the eager and the compiled step."""
    file = edited_c_source(tmp_path, *CHANGES["weight decay"])
    library = capi.Library(capi.build(tmp_path, files=[file]))
    run_beside_reference(CONTROL, compile, capi.load().step)
    with pytest.raises(AssertionError, match="weights differ"):
        run_beside_reference(CONTROL, compile, library.step)
