"""Float32 numbers through their bits, IEEE roots, and weights of 16 bits: what eager and compiled code have alike."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fp8

MAGNITUDE = 0x7FFFFFFF  # of a float's bits
NAN_BITS = 0x7FC00000
LOW_BITS = 0xFFFF  # of float32, which bfloat16 has not
HALF_NORMAL_BITS = 0x38800000  # 2^-14, the smallest normal float16
INF_BITS = 0x7F800000
ONE_BITS = 0x3F800000
WEIGHT_FLOOR_BITS = 0x3C23D70A  # 0.01, the least square of a weight in the norm
OVERFLOW_BITS = 0x7F000000  # 2^127: from here on a second moment could be rounded up to infinity
UNIT = 2.0**-20  # of the sums
EIGHT_BITS, TWELVE_UNITS_BITS = (
    0x41000000,
    0x37400000,
)  # of 8.0 and 12 * UNIT, near which floats are multiples of 2^-20 and 2^-40


def sqrt(x: Tensor) -> Tensor:
    """The IEEE float32 square root. Compiled code has it; eager ``torch.sqrt`` on the CPU is off by an ulp at times."""
    return torch.sqrt(x) if torch.compiler.is_compiling() else x.double().sqrt().float()


def sqrt64(x: Tensor) -> Tensor:
    """The IEEE float64 root of a few numbers; eager ``torch.sqrt`` is off by an ulp in 1.4 % of cases.

    That is mended by what the square of its result lacks, which Dekker's product gives exactly.
    """
    root = torch.sqrt(x)
    if torch.compiler.is_compiling():
        return root
    shifted = root * (2.0**27 + 1)
    high = shifted - (shifted - root)
    low = root - high
    square = root * root
    lost = ((high * high - square) + 2 * high * low) + low * low
    return torch.where((root > 0) & torch.isfinite(root), root + ((x - square) - lost) / (2 * root), root)


def bits(x: Tensor) -> Tensor:
    """The bits of float32 |x|, int32: they order like the magnitudes, inf and then NaN on top."""
    return x.view(torch.int32) & MAGNITUDE


def units(square: Tensor, floor: Tensor | int) -> Tensor:
    """EIGHT_BITS and clamp(square, floor, 1) in units of 2^-20, rounded half to even, int32; a NaN counts as 1.

    ``floor`` is float32, or its bits. Adding 8 rounds to the multiples of 2^-20, and its bits count them.
    """
    clamped = torch.clamp(bits(square), max=ONE_BITS)
    if isinstance(floor, int):
        clamped = torch.clamp(clamped, min=floor)
    else:
        clamped = torch.maximum(clamped, floor.view(torch.int32))
    return (clamped.view(torch.float32) + 8.0).view(torch.int32)


def join(weights: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights that bfloat16 ones (as float32) and their remainders (int32) are; as the reference's."""
    remainder = torch.where(weights == 0, torch.clamp(remainder, min=0), remainder)
    return (weights.view(torch.int32) + remainder).view(torch.float32)


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of float32 weights, int32, and the nearest bfloat16 values, float32; ties go away from 0."""
    exact = signed(weights, torch.clamp(bits(weights), max=NAN_BITS)).view(torch.int32)
    return exact, ((exact + (LOW_BITS + 1) // 2) & ~LOW_BITS).view(torch.float32)


def round_weights(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values of bfloat16 or float16: x, to whose magnitude as many of the words' low bits are added as go."""
    magnitude = torch.clamp(bits(x), max=NAN_BITS)
    if dtype == torch.bfloat16:
        return signed(x, (magnitude + (words & LOW_BITS)) & ~LOW_BITS)
    low = 0x1FFF  # of float32, which float16 has not
    rounded = (magnitude + (words & low)) & ~low
    # Adding float16's smallest normal value, 2^-14, lines a subnormal's bits up with the grid.
    lifted = (magnitude.view(torch.float32) + 2.0**-14).view(torch.int32)
    subnormal = ((lifted + (words & low)) & ~low).view(torch.float32) - 2.0**-14
    return signed(x, torch.where(magnitude < HALF_NORMAL_BITS, subnormal.view(torch.int32), rounded))


def signed(x: Tensor, magnitude: Tensor) -> Tensor:
    """Float32 values with the sign of x and these bits, int32 [...], of their magnitudes."""
    return (magnitude | (x.view(torch.int32) & fp8.SIGN_BIT)).view(torch.float32)


def hashes_of(weights: Tensor) -> Tensor:
    """The hashes of float32 values' bits, int32."""
    return fp8.hash32(weights.view(torch.int32))


def larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two non-negative floats through their bits: one instruction, NaN on top."""
    return torch.maximum(a.view(torch.int32), b.view(torch.int32)).view(torch.float32)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x with the bits of the mask; -1 keeps all. ``where`` costs the CPU four instructions in place of one."""
    return (x.view(torch.int32) & mask).view(torch.float32)
