"""fp8 codes as integers: decode, stochastic encode and power-of-two scales, for tensors of any 32-bit device.

Codes are uint8, arithmetic is on the bit patterns of float32 held in int32. Native fp8 casts are missing on GPUs before
sm_89 and slow on CPUs. No float32 subnormal appears, so flush-to-zero changes nothing here.

``E4M3`` (first moment): 4 exponent bits, bias 7, 3 mantissa bits, largest 448, smallest normal 2^-6.
``E5M2`` (second moment): 5 exponent bits, bias 15, 2 mantissa bits, largest 57344, smallest normal 2^-14.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """An fp8 format as the integer arithmetic needs it."""

    dropped: int  # float32 mantissa bits that the code has no room for
    rebias: int  # difference of the exponent biases
    min_exponent: int  # the smallest normal value is 2^min_exponent
    max_exponent: int  # the largest value is 1.75 · 2^max_exponent
    min_scale: int  # biased float32 exponent of the smallest scale

    def smallest_scale(self) -> float:
        """The scale of an all-zero moment; large enough that every decoded value is a normal float32."""
        return float(2.0 ** (self.min_scale - 127))

    def smallest_normal(self) -> float:
        """The smallest value with an implicit one."""
        return float(2.0**self.min_exponent)


E4M3 = Format(dropped=20, rebias=120, min_exponent=-6, max_exponent=8, min_scale=10)
E5M2 = Format(dropped=21, rebias=112, min_exponent=-14, max_exponent=15, min_scale=17)

SIGN_BIT = -(1 << 31)
COLUMN_BITS = 10
COLUMNS, LAST_ROW = 1 << COLUMN_BITS, (1 << (32 - COLUMN_BITS)) - 1  # as rounding words count
MIXER = 0x9E3779B1 - (1 << 32)


def decode(codes: Tensor, fmt: Format) -> Tensor:
    """float32 values of codes (uint8 or int32), unscaled. Second moments are not negative: E5M2's sign must be 0."""
    c = codes.to(torch.int32)
    magnitude = c if fmt is E5M2 else c & 0x7F
    bits = (magnitude << fmt.dropped) + (fmt.rebias << 23)
    # Right for normal codes. Twice that, less the smallest normal value, is right for subnormal ones; where the other
    # holds each is the smaller of the two.
    doubled = (bits + (1 << 23)).view(torch.float32) - fmt.smallest_normal()
    value = torch.minimum(bits, doubled.view(torch.int32))
    if fmt is E4M3:
        value = value | ((c << 24) & SIGN_BIT)
    return value.view(torch.float32)


def encode(magnitude: Tensor, word: Tensor, fmt: Format) -> Tensor:
    """Round float32 values in [0, format maximum] stochastically to int32 codes.

    ``word`` is the rounding word less 2^31, as int32; the word's top ``dropped`` bits are added below the code's last
    bit, so a value rounds up with probability equal to its distance from the lower neighbour, in the subnormal range
    too. The word 0 (-2^31) truncates; 2^31 (0) rounds to nearest, ties up.
    """
    # Adding 2^-6 (2^-14) lines a subnormal's bits up with the grid, one exponent too high; where the other holds each
    # is the larger of the two.
    lifted = (magnitude + fmt.smallest_normal()).view(torch.int32) - (1 << 23)
    bits = torch.maximum(magnitude.view(torch.int32), lifted)
    # The top bits as a number from 0: an arithmetic shift, and half the range added with the exponents.
    noise = word >> (32 - fmt.dropped)
    return (bits + (noise + ((1 << (fmt.dropped - 1)) - (fmt.rebias << 23)))) >> fmt.dropped


def scale_exponent(largest_bits: Tensor, fmt: Format) -> Tensor:
    """Biased exponent of the smallest power of two s with largest / s <= the format's maximum 1.75 · 2^max_exponent.

    ``largest_bits`` are the int32 bits of the largest magnitude, finite. Adding the mantissa's complement of 1.75
    carries into the exponent just where the mantissa exceeds 1.75.
    """
    exponent = ((largest_bits + 0x1FFFFF) >> 23) - fmt.max_exponent
    return torch.clamp(exponent, min=fmt.min_scale)


def power_of_two(biased_exponent: Tensor) -> Tensor:
    """float32 2^(e - 127) from its biased exponent e in 1..254."""
    return (biased_exponent << 23).view(torch.float32)


def hash32(x: Tensor) -> Tensor:
    """A 32-bit mixer on int32 with wrap-around: the top bits of each result look independent for neighbouring inputs.

    Two multiply-xorshift rounds; shifts and multipliers come from a search over pairs of indices (docs/algorithm.md).
    """
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * -0x75C471A9  # 0x8A3B8E57
    x = x ^ ((x >> 14) & 0x3FFFF)
    return x * -0x5D362513  # 0xA2C9DAED


def wrapped(x: int) -> int:
    """x modulo 2^32, as an int32."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def as_int32(x: Tensor) -> Tensor:
    """int64 modulo 2^32, as int32."""
    return (((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)).to(torch.int32)


def mix(column: Tensor, row: Tensor) -> Tensor:
    """The rounding word of an element, but for its step, from the hashes of its column and its row (with the salt)."""
    return (column ^ row) * MIXER


def element_words(index: Tensor, salt: Tensor) -> Tensor:
    """The rounding words of elements, but for their step, from their index modulo 2^32; int32."""
    return mix(hash32(index & (COLUMNS - 1)), hash32(((index >> COLUMN_BITS) & LAST_ROW) + salt))
