"""The part of the sweep about weights of bfloat16 and float16: see :mod:`lamb16.lab.sweep`.

A NaN is compared as a NaN: torch's casts give it other bits on other processors. The functions of ``floats.py`` get
quiet ones, as arithmetic leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lamb16 import reference
from lamb16.capi import DTYPES, Library
from lamb16.step import floats

HALVES = DTYPES[1:]
QUIET = 1 << 22  # the bit of a quiet NaN
Compare = Callable[[str, str, str, Tensor, Tensor, Tensor], None]  # what, form, against what, inputs, C's, theirs
Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def round_stochastically(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``x`` rounded to ``dtype`` as the step rounds weights."""
    return floats.round_weights(x, words, dtype).to(dtype)


def split(x: Tensor) -> Tensor:
    """The exact weights that the step stores for float32 ``x``: bfloat16 bits, followed by the remainders' bits."""
    exact, nearest = floats.split(x)
    return packed(nearest.to(torch.bfloat16), (exact - nearest.view(torch.int32)).to(torch.int16))


def packed(weights: Tensor, remainder: Tensor) -> Tensor:
    """The bits of bfloat16 weights, followed by those of their remainders, int32."""
    return (weights.view(torch.int16).to(torch.int32) << 16) | (remainder.to(torch.int32) & 0xFFFF)


def bits(x: Tensor) -> Tensor:
    """The bits of floats, and 0 for every NaN."""
    integer = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.where(x.isnan(), 0, x.view(integer))


class Weights:
    """Compares chunks of float32; ``compare`` counts, ``compile`` makes compiled functions of eager ones."""

    def __init__(self, library: Library, compare: Compare, compile: Compile) -> None:
        self.library, self.compare = library, compare
        self.stochastic = {"eager": round_stochastically, "compiled": compile(round_stochastically)}
        self.split = {"eager": split, "compiled": compile(split)}

    def add(self, patterns: Tensor, words: Mapping[str, Tensor]) -> None:
        """Compare on a chunk of int32 patterns, with the words of several forms, int32 of the same length."""
        x = patterns.view(torch.float32)
        nan = x.isnan()
        quiet = torch.where(nan, patterns | QUIET, patterns).view(torch.float32)
        for dtype in HALVES:
            name = f"round to {_name(dtype)}"
            for form, own in words.items():
                mine, _ = self.library.round_weights(x, dtype, "stochastic", own)
                for how, function in self.stochastic.items():
                    self.compare(name, form, how, patterns, bits(mine), bits(function(quiet, own, dtype)))
            mine, _ = self.library.round_weights(x, dtype, "nearest")
            self.compare(name, "nearest", "torch's cast", patterns, bits(mine), bits(x.to(dtype)))
        mine, remainder = self.library.round_weights(x, torch.bfloat16, "exact")
        assert remainder is not None
        found = packed(mine, remainder)
        for how, other in self.split.items():
            self.compare("split", "exact", how, patterns, found.where(~nan, 0), other(quiet).where(~nan, 0))
        self.compare("split", "exact", "reference", patterns, found, packed(*reference.split(x)))
        back = self.library.widen_weights(mine, remainder)
        self.compare("join", "exact", "what was split", patterns, bits(back), bits(x))


def sweep_widening(library: Library, compare: Compare) -> None:
    """All 2^16 patterns of both formats against the cast; and with the remainders at the ends and around 0."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    for dtype in HALVES:
        weights = patterns.to(torch.int16).view(dtype)
        theirs = bits(weights.float())
        compare(
            f"widen {_name(dtype)}", "all bits", "torch's cast", patterns, bits(library.widen_weights(weights)), theirs
        )
    weights = patterns.to(torch.int16).view(torch.bfloat16)
    for rest in (-32768, -1, 0, 1, 32767):
        remainder = torch.full_like(patterns, rest, dtype=torch.int16)
        a, b = library.widen_weights(weights, remainder), reference.joined(weights, remainder)
        compare("join", f"remainder {rest}", "reference", patterns, a.view(torch.int32), b.view(torch.int32))


def boundaries() -> Iterator[int]:
    """Magnitudes' patterns: every 97th value of bfloat16 and every 41st of float16, all at the ends; and midpoints."""
    for code in {*range(0, 0x7F80, 97), *range(64), *range(0x7F70, 0x7F80)}:
        yield from (code << 16, (code << 16) + 0x8000)
    codes = torch.tensor(sorted({*range(0, 0x7C00, 41), *range(64), *range(0x3F0, 0x410), *range(0x7BF0, 0x7C00)}))
    values = codes.to(torch.int16).view(torch.float16).double()
    above = torch.where(codes == 0x7BFF, 65536.0, (codes + 1).to(torch.int16).view(torch.float16).double())
    yield from torch.cat([values, (values + above) / 2, above]).float().view(torch.int32).tolist()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
