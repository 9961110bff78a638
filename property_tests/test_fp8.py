"""The 8-bit formats: every code, unbiased stochastic rounding, uniform and balanced rounding words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamb16 import capi, reference
from lamb16.step import fp8
from lamb16.step.fp8 import E4M3, E5M2, SIGN_BIT
from lamb16.step.update import make_columns

FORMATS = {"e4m3": (E4M3, torch.float8_e4m3fn, 448.0), "e5m2": (E5M2, torch.float8_e5m2, 57344.0)}
WORDS = torch.arange(-(2**31), 2**31, 2**20 - 1, dtype=torch.int64).to(torch.int32)


@pytest.fixture(params=FORMATS)
def format(request):
    return FORMATS[request.param]


def _codes(dtype: torch.dtype) -> torch.Tensor:
    """All codes of finite values; of e5m2, which stores v >= 0, the non-negative ones."""
    codes = torch.arange(256 if dtype == torch.float8_e4m3fn else 128, dtype=torch.int64).to(torch.uint8)
    return codes[torch.isfinite(codes.view(dtype).float())]


def test_every_code_decodes_to_torchs_value(format) -> None:
    fmt, dtype, largest = format
    codes = _codes(dtype)
    decoded = fp8.decode(codes, fmt)
    assert torch.equal(decoded.view(torch.int32), codes.view(dtype).float().view(torch.int32))
    assert decoded.max() == largest


@pytest.mark.parametrize("flush", [False, True])
def test_every_code_survives_under_every_scale(format, flush: bool) -> None:
    """Re-encoding an unchanged value gives the same code, whatever the word and the power-of-two scale."""
    fmt, dtype, _ = format
    codes = _codes(dtype)[:, None]
    torch.set_flush_denormal(flush)
    try:
        for biased in range(fmt.min_scale, 240, 7):
            scale = fp8.power_of_two(torch.tensor(biased, dtype=torch.int32))
            inverse = fp8.power_of_two(torch.tensor(254 - biased, dtype=torch.int32))
            x = fp8.decode(codes, fmt) * scale
            assert torch.isfinite(x).all() or biased > 230
            again = fp8.encode(x.abs() * inverse, WORDS[None, :] ^ SIGN_BIT, fmt)
            finite = torch.isfinite(x).expand_as(again)
            assert torch.equal(again[finite], (codes.int() & 0x7F).expand_as(again)[finite])
    finally:
        torch.set_flush_denormal(False)


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50),
    exponent=st.integers(-30, 15),
    word=st.integers(-(2**31), 2**31 - 1),
)
def test_encode_is_the_references_rounding(values, exponent, word) -> None:
    for fmt, dtype, largest in FORMATS.values():
        x = (torch.tensor(values) * 2.0**exponent).clamp(max=largest)
        mine = fp8.encode(x, torch.tensor(word, dtype=torch.int32) ^ SIGN_BIT, fmt)
        unsigned = torch.tensor(word & 0xFFFFFFFF)
        theirs = reference.round_stochastically(x, unsigned >> (32 - fmt.dropped), fmt.dropped, dtype)
        assert torch.equal(mine.to(torch.uint8), theirs)


@given(values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), exponent=st.integers(-12, 8))
def test_rounding_is_unbiased(values, exponent) -> None:
    """The mean over all 2^20 (2^21) words is x itself, to half a unit of that resolution."""
    for fmt, _, largest in FORMATS.values():
        x = (torch.tensor(values) * 2.0**exponent).clamp(max=largest)
        table = fp8.decode(torch.arange(127 if fmt is E4M3 else 124, dtype=torch.uint8), fmt).double()
        low = fp8.encode(x, torch.tensor(SIGN_BIT, dtype=torch.int32), fmt)
        # encode is monotone in the word: bisect for the first word that rounds up
        first, last = torch.zeros(len(x), dtype=torch.int64), torch.full((len(x),), 1 << fmt.dropped)
        while (first < last).any():
            middle = (first + last) // 2
            up = fp8.encode(x, (middle << (32 - fmt.dropped)).to(torch.int32) ^ SIGN_BIT, fmt) > low
            first, last = torch.where(up | (first == last), first, middle + 1), torch.where(up, middle, last)
        probability = 1 - first.double() / (1 << fmt.dropped)
        high = (low + 1).clamp(max=len(table) - 1)
        gap = table[high] - table[low]
        mean = table[low] + probability * gap
        assert ((mean - x.double()).abs() <= gap * 0.5 / (1 << fmt.dropped)).all()


@given(largest=st.floats(2.0**-126, 2.0**126, width=32))
def test_scales_are_the_smallest_that_do_not_saturate(largest) -> None:
    bits = torch.tensor(largest, dtype=torch.float32).view(torch.int32)
    for fmt, _, format_max in FORMATS.values():
        scale = fp8.power_of_two(fp8.scale_exponent(bits, fmt)).item()
        assert scale == reference.power_of_two_scale(largest, format_max, fmt.smallest_scale())
        assert largest / scale <= format_max
        assert scale == fmt.smallest_scale() or largest / (scale / 2) > format_max


def _words(count: int, salt: int) -> torch.Tensor:
    return reference.rounding_words(count, salt, 0)


@given(salt=st.integers(0, 2**32 - 1), count=st.integers(1, 5000))
def test_words_are_the_references(salt, count) -> None:
    """In 32-bit arithmetic, element by element and by rows and columns; an index is one modulo 2^32."""
    index, salts = torch.arange(count, dtype=torch.int64), torch.tensor(salt).to(torch.int32)
    mine = fp8.element_words(index.to(torch.int32), salts)
    assert torch.equal(mine.long() & 0xFFFFFFFF, _words(count, salt))
    rows = torch.arange(-(-count // 1024), dtype=torch.int32)[:, None]
    assert torch.equal(fp8.mix(make_columns(mine.device)[0], fp8.hash32(rows + salts)).flatten()[:count], mine)


@given(salt=st.integers(0, 2**32 - 1), index=st.integers(2**31 - 3000, 2**32 - 1))
def test_words_of_large_indices_are_those_of_c(salt, index) -> None:
    mine = fp8.element_words(torch.tensor(index).to(torch.int32), torch.tensor(salt).to(torch.int32))
    assert int(mine) & 0xFFFFFFFF == capi.load().words(index, salt, 0, 1).item() & 0xFFFFFFFF


@given(salt=st.integers(0, 2**32 - 1))
def test_words_are_uniform_over_elements(salt) -> None:
    """χ² of the top 8 bits over 65,536 elements: far inside what a uniform draw gives (255 ± 23)."""
    counts = torch.bincount(_words(1 << 16, salt) >> 24, minlength=256).double()
    assert ((counts - 256) ** 2 / 256).sum() < 255 + 8 * 22.6


@given(salt=st.integers(0, 2**32 - 1))
def test_words_of_neighbours_are_independent(salt) -> None:
    """Correlation of neighbouring elements, rows and columns of usual widths: within 6 standard deviations of 0."""
    words = _words(1 << 16, salt).double() / 2**32 - 0.5
    for distance in (1, 2, 3, 4, 8, 64, 100, 256, 300, 768, 1000, 1024, 4096):
        assert correlation(words, distance) < 6


def correlation(words: torch.Tensor, distance: int) -> float:
    """The magnitude of the correlation of words, uniform in [-0.5, 0.5), ``distance`` apart, in standard deviations."""
    a, b = words[:-distance], words[distance:]
    return ((a * b).mean() * 12 * len(a) ** 0.5).abs().item()


PAIRS = (1 << 19) + 65536
DISTANCES = (1, 2, 3, 5, 8, 16, 64, 100, 256, 300, 384, 512, 768, 1000, 1024, 2048, 3072, 4096, 16384, 50257, 65536)


def pair_statistic(words: torch.Tensor) -> float:
    """The worst excess χ² per sample of pairs of nibbles of words at the distances above; 0 if independent."""
    count = len(words) - max(DISTANCES)
    worst = 0.0
    for distance in DISTANCES:
        for shift in (28, 24, 16):
            a, b = (words[:count] >> shift) & 15, (words[distance : distance + count] >> shift) & 15
            counts = torch.bincount(a * 16 + b, minlength=256).double()
            expected = count / 256
            worst = max(worst, (((counts - expected) ** 2 / expected).sum().item() - 255) / count)
    return worst


def lowbias32(x: torch.Tensor) -> torch.Tensor:
    """A well-known mixer of the same cost."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    return (x * 0x846CA68B) & 0xFFFFFFFF


@pytest.mark.parametrize("salt", [0, 0x12345678, 0xDEADBEEF])
def test_words_of_pairs_are_independent(salt: int) -> None:
    """Jointly, not only in their correlation; for independent words the worst of 63 is about 0.0001."""
    assert pair_statistic(_words(PAIRS, salt)) < 0.0005


def test_pairs_tell_a_worse_hash() -> None:
    """Negative control: the words of a well-known mixer of the elements' own index."""
    index = torch.arange(PAIRS, dtype=torch.int64)
    assert max(pair_statistic(lowbias32(index + salt)) for salt in (0, 0x12345678)) > 0.0005


def largest_singular_value(words: torch.Tensor, up: float = 0.3) -> float:
    """Of the rounding errors of a constant, over that of independent errors: about 1."""
    errors = (words.double() / 2**32 < up).double().view(-1, 1024) - up
    expected = (up * (1 - up)) ** 0.5 * (len(errors) ** 0.5 + 32)
    return float(torch.linalg.matrix_norm(errors, 2)) / expected


@pytest.mark.parametrize("salt", [0, 0x12345678, 0xDEADBEEF])
def test_words_leave_no_structure_in_the_errors_of_a_constant(salt: int) -> None:
    """Nor in those of rows and columns, which is why hashes of row and column are not just added (the control)."""
    assert largest_singular_value(_words(1 << 18, salt)) < 1.1
    index = torch.arange(1 << 18)
    added = reference.hash32(index % 1024) + reference.hash32(index // 1024 + salt)
    assert largest_singular_value(added & 0xFFFFFFFF) > 3


@given(salt=st.integers(0, 2**32 - 1), index=st.integers(0, 10**6))
def test_words_are_balanced_over_steps(salt, index) -> None:
    """Over 233 steps (a Fibonacci number) every interval of length 1/8 is met 29 or 30 times, give or take 2."""
    words = torch.cat([reference.rounding_words(1, salt, t, index) for t in range(1, 234)])
    counts = torch.bincount(words >> 29, minlength=8)
    assert (counts - 233 / 8).abs().max() <= 2


def test_plain_indices_fail_the_correlation_check() -> None:
    """Negative control: plain indices as words are uniform but not independent."""
    words = (torch.arange(1 << 16, dtype=torch.int64) << 16).double() / 2**32 - 0.5
    assert correlation(words, 1) > 6
