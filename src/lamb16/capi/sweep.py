"""Every code and every float32: what C rounds and decodes against torch, eager and compiled.

    python -m lamb16.capi.sweep           # a stratified sample of 2^24 float32 bit patterns and all boundaries
    python -m lamb16.capi.sweep --full    # all 2^32

What is compared:

- encode, with each of :data:`WORDS`: ``fp8.encode`` is defined for magnitudes up to the format's maximum, so it is
  called as the step calls it, with the sign taken off and put back, and with larger magnitudes, infinite ones too,
  clamped to the maximum. C gets the bare pattern. For NaN, which the step never encodes, C has to give its NaN code.
- encode to nearest against torch's own cast, for magnitudes up to the maximum: the cast rounds ties to even codes,
  lamb16 away from zero, so C has to be one code higher at the patterns of :func:`differing_from_cast`, and equal
  everywhere else.
- the hash that makes the random words, over the positions of all patterns.
- decode: all 256 codes against torch's cast, and those that the step stores against ``fp8.decode``.
- weights of bfloat16 and float16 in every rounding, and back (``sweep_weights.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lamb16.capi import NEAREST, Library, NoCompilerError, load
from lamb16.capi.sweep_weights import Weights, boundaries, sweep_widening
from lamb16.step import fp8
from lamb16.step.fp8 import E4M3, E5M2
from lamb16.step.inductor import options

CHUNK = 1 << 18  # patterns at a time: the temporaries stay in the cache
SALT, STEP = 0x5EED, 7  # of the random words
CPU = torch.device("cpu")


class Encoding(NamedTuple):
    """An fp8 format with what torch and C call it."""

    name: str
    fmt: fp8.Format
    dtype: torch.dtype
    largest_code: int

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return torch.finfo(self.dtype).max


ENCODINGS = (
    Encoding("e4m3", E4M3, torch.float8_e4m3fn, 0x7E),
    Encoding("e5m2", E5M2, torch.float8_e5m2, 0x7B),
)
WORDS: dict[str, int | None] = {"nearest": NEAREST, "word 0": 0, "word 2^32 - 1": 0xFFFFFFFF, "random words": None}


@dataclass
class Count:
    """How often two implementations differed, and where first."""

    inputs: int = 0
    differing: int = 0
    first: str = "-"

    def add(self, inputs: Tensor, a: Tensor, b: Tensor) -> None:
        """Compare results of these inputs, which are bit patterns."""
        self.inputs += inputs.numel()
        if torch.equal(a, b):
            return
        where = a != b
        self.differing += int(where.sum())
        if self.first == "-":
            pattern, x, y = (int(tensor[where][0]) for tensor in (inputs, a, b))
            self.first = f"0x{pattern & 0xFFFFFFFF:x}: {x & 0xFFFFFFFF:#x}, {y & 0xFFFFFFFF:#x}"


@dataclass
class Sweep:
    """Counts by what was compared, kept over all chunks."""

    library: Library
    counts: dict[tuple[str, str, str], Count] = field(default_factory=dict)
    ties: dict[str, list[Tensor]] = field(default_factory=dict)  # known patterns at which the cast did differ

    def compare(self, what: str, form: str, against: str, inputs: Tensor, a: Tensor, b: Tensor) -> None:
        """Count where a and b differ."""
        self.counts.setdefault((what, form, against), Count()).add(inputs, a, b)

    @property
    def differing(self) -> int:
        """Over all that was compared."""
        return sum(count.differing for count in self.counts.values())

    def table(self) -> str:
        """A line for everything that was compared."""
        header = ("function", "form", "C against", "inputs", "differing", "first (input: C, other)")
        rows = [(*key, f"{c.inputs:,}", f"{c.differing:,}", c.first) for key, c in self.counts.items()]
        lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
        return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def step_codes(x: Tensor, words: Tensor, fmt: fp8.Format, largest: float) -> Tensor:
    """uint8 codes of float32 ``x`` of any sign and size, rounded by ``fp8.encode`` as the step calls it."""
    sign = (x.view(torch.int32) >> 24) & 0x80
    return (fp8.encode(x.abs().clamp(max=largest), words ^ fp8.SIGN_BIT, fmt) | sign).to(torch.uint8)


def compile_function(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With the options of the step, but for the order of reductions, of which there are none; sizes are dynamic."""
    return torch.compile(function, fullgraph=True, dynamic=True, options=options(CPU, one_loop=False))


def word_form(library: Library, value: int | None, first: int, count: int) -> Tensor:
    """The words of a chunk, int32: all the same, or for None those of the elements from ``first`` on."""
    if value is None:
        return library.words(first, SALT, STEP, count)
    return torch.full((count,), value, dtype=torch.int64).to(torch.int32)


def sweep_encoders(sweep: Sweep, chunks: Iterable[tuple[int, Tensor]]) -> None:
    """Compare the encoders and the hash on chunks: (position of the first pattern, int32 patterns)."""
    codes_compiled, words_compiled = compile_function(step_codes), compile_function(fp8.element_words)
    weights = Weights(sweep.library, sweep.compare, compile_function)
    for first, patterns in chunks:
        x, nan = patterns.view(torch.float32), torch.isnan(patterns.view(torch.float32))
        forms = {form: word_form(sweep.library, value, first, len(patterns)) for form, value in WORDS.items()}
        weights.add(
            patterns, {form: words for form, words in forms.items() if form != "nearest"}
        )  # whose low bits are 0
        for form, value in WORDS.items():
            words = forms[form]
            if value is None:
                index = torch.arange(len(patterns), dtype=torch.int32) + fp8.wrapped(first)
                salt, offset = torch.tensor(SALT, dtype=torch.int32), fp8.wrapped(STEP * 0x9E3779B9)
                for name, function in (("eager", fp8.element_words), ("compiled", words_compiled)):
                    sweep.compare("words", "-", name, index, words, function(index, salt) + offset)
            for encoding in ENCODINGS:
                mine = sweep.library.encode(x, words, encoding.name)
                for name, function in (("eager", step_codes), ("compiled", codes_compiled)):
                    theirs = function(x, words, encoding.fmt, encoding.largest)
                    theirs = torch.where(nan, nan_codes(patterns), theirs)
                    sweep.compare(f"encode {encoding.name}", form, name, patterns, mine, theirs)
                if value == NEAREST:
                    compare_with_cast(sweep, encoding, patterns, mine)


def nan_codes(patterns: Tensor) -> Tensor:
    """What C documents for NaN: the largest code, with the sign."""
    return (((patterns >> 24) & 0x80) | 0x7F).to(torch.uint8)


def compare_with_cast(sweep: Sweep, encoding: Encoding, patterns: Tensor, mine: Tensor) -> None:
    """Count against torch's cast, which has to give the code below at known patterns, and the same elsewhere."""
    magnitude = patterns & 0x7FFFFFFF
    inside = magnitude <= bits_of(encoding.largest)
    patterns, mine = patterns[inside], mine[inside]
    cast = patterns.view(torch.float32).to(encoding.dtype).view(torch.uint8)
    known = torch.isin(patterns & 0x7FFFFFFF, known_patterns(encoding))
    sweep.compare(f"encode {encoding.name}", "nearest", "torch's cast, ties aside", patterns, mine, cast + known)
    sweep.ties.setdefault(encoding.name, []).append(patterns[known & (mine != cast)])


def check_ties(sweep: Sweep, encoding: Encoding) -> None:
    """At the end: every known pattern, of both signs, was among the inputs, and the cast did differ there."""
    magnitudes = known_patterns(encoding)
    known = torch.cat([magnitudes, magnitudes | fp8.wrapped(1 << 31)])
    met = torch.isin(known, torch.cat(sweep.ties[encoding.name])).int()
    sweep.compare(f"encode {encoding.name}", "nearest", "torch's cast, ties", known, torch.ones_like(met), met)


def bits_of(x: float) -> int:
    """The float32 bit pattern of a non-negative number."""
    return int(torch.tensor(x, dtype=torch.float32).view(torch.int32))


def differing_from_cast(encoding: Encoding) -> list[int]:
    """The patterns of the non-negative float32 that lamb16 rounds one code higher than rounding half to even does.

    Between a code and the next these are the midpoint, where the code is even; and what lies below the midpoint by at
    most half of the 2^-20 (2^-21) of a gap that the words resolve: it is first rounded to the midpoint, and then up.
    The latter exists in the subnormal gaps only, where float32 is finer than that.
    """
    grid = torch.arange(encoding.largest_code + 1, dtype=torch.uint8).view(encoding.dtype).double().tolist()
    found = []
    for code, (low, high) in enumerate(itertools.pairwise(grid)):
        middle, least = (low + high) / 2, (low + high) / 2 - (high - low) * 2.0 ** -(encoding.fmt.dropped + 1)
        pattern = bits_of(middle)
        if code % 2 == 0:
            found.append(pattern)
        while torch.tensor(pattern - 1, dtype=torch.int32).view(torch.float32).item() >= least:
            pattern -= 1
            found.append(pattern)
    return sorted(found)


_KNOWN = {encoding.name: torch.tensor(differing_from_cast(encoding), dtype=torch.int32) for encoding in ENCODINGS}


def known_patterns(encoding: Encoding) -> Tensor:
    """:func:`differing_from_cast` as int32."""
    return _KNOWN[encoding.name]


def _cast(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.view(dtype).float()


def sweep_decoders(sweep: Sweep) -> None:
    """All 256 codes of both formats against the cast; those that a step can store against fp8's functions."""
    codes = torch.arange(256, dtype=torch.int32)
    for encoding in ENCODINGS:
        mine = sweep.library.decode(codes.to(torch.uint8), encoding.name)
        name = f"decode {encoding.name}"
        for how, cast in (("eager", _cast), ("compiled", compile_function(_cast))):
            theirs = cast(codes.to(torch.uint8), encoding.dtype)
            nan = torch.isnan(theirs)  # of which there are many: NaN is compared as NaN, the rest by its bits
            a, b = (torch.where(torch.isnan(x) & nan, 0, x.view(torch.int32)) for x in (mine, theirs))
            sweep.compare(name, "all codes", f"torch's cast, {how}", codes, a, b)
        stored = (codes & 0x7F) <= encoding.largest_code
        if encoding.fmt is E5M2:
            stored &= codes < 0x80
        for how, function in (("eager", fp8.decode), ("compiled", compile_function(fp8.decode))):
            theirs = function(codes[stored].to(torch.uint8), encoding.fmt)
            bits = mine[stored].view(torch.int32), theirs.view(torch.int32)
            sweep.compare(name, "stored codes", how, codes[stored], *bits)


def all_patterns() -> Iterator[tuple[int, Tensor]]:
    """The 2^32 patterns in chunks."""
    offsets = torch.arange(CHUNK, dtype=torch.int32)
    for first in range(0, 1 << 32, CHUNK):
        yield first, offsets + fp8.wrapped(first)


def sample_patterns() -> Iterator[tuple[int, Tensor]]:
    """2^24 patterns, 32,768 of each sign and exponent, evenly spaced but for a hashed last byte; and the boundaries.

    Subnormal, infinite and NaN patterns are those of the lowest and highest exponent.
    """
    offsets = torch.arange(CHUNK, dtype=torch.int32)
    for first in range(0, 1 << 24, CHUNK):
        position = offsets + first
        yield first, (position << 8) | (fp8.hash32(position) & 0xFF)
    yield 1 << 24, boundary_patterns()


def boundary_patterns() -> Tensor:
    """Values of codes and weights, midpoints, where the cast differs, ends of exponents, ±2, of both signs; int32."""
    starts = [exponent << 23 for exponent in range(257)]
    for encoding in ENCODINGS:
        grid = torch.arange(encoding.largest_code + 1, dtype=torch.uint8).view(encoding.dtype).float()
        grid = torch.cat([grid, 2 * grid[-1:] - grid[-2:-1]])  # and what would follow
        middles = (grid[1:] + grid[:-1]) / 2
        starts += torch.cat([grid, middles]).view(torch.int32).tolist() + known_patterns(encoding).tolist()
    starts += boundaries()
    near = {start + k for start in starts for k in range(-2, 3)}
    magnitudes = torch.tensor(sorted(x for x in near if 0 <= x < 1 << 31), dtype=torch.int32)
    return torch.cat([magnitudes, magnitudes | fp8.wrapped(1 << 31)])


def with_progress(chunks: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """A line on stderr for every sixteenth of the patterns."""
    start = time.monotonic()
    for first, patterns in chunks:
        if first and first % (1 << 28) == 0:
            print(f"{first / 2**32:.0%} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        yield first, patterns


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, like C: on chunks this small several wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(library: Library, full: bool = False) -> Sweep:
    """Compare everything; see the module's docstring."""
    sweep = Sweep(library)
    sweep_decoders(sweep)
    sweep_widening(library, sweep.compare)
    sweep_encoders(sweep, with_progress(all_patterns()) if full else sample_patterns())
    for encoding in ENCODINGS:
        check_ties(sweep, encoding)
    return sweep


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 where nothing differs, 1 where something does, 2 without a C compiler."""
    parser = argparse.ArgumentParser(
        prog="python -m lamb16.capi.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all 2^32 float32 bit patterns, not a sample")
    args = parser.parse_args(argv)
    try:
        library = load()
    except NoCompilerError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    with one_thread():
        sweep = run(library, args.full)
    print(sweep.table())
    print(f"{sweep.differing:,} differing; {time.monotonic() - start:.0f} s")
    return 1 if sweep.differing else 0


if __name__ == "__main__":
    sys.exit(main())
