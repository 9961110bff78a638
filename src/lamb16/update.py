"""The multi-tensor step as three pure functions: what ``torch.compile`` sees.

1. :func:`measure` reads weights, gradients and codes once and reduces, for every tensor, max|m|, max v, Σ clamp(p²)
   and Σ clamp(u²);
2. :func:`scale` turns these few numbers, for all tensors at once, into new scales, trust ratios and step counts;
3. :func:`apply` reads the same memory again, forms the same m, v and u, and writes weights and codes.

Nothing of the size of a tensor is stored in between. Both passes work on 2-D *blocks*; a block is a large tensor cut
into rows of :data:`ROW` elements (its scalars are one row of the tables), or many pieces of at most :data:`PIECE`
elements packed one a row (each row then has scalars of its own). ``plan.py`` cuts, ``reference.py`` says in plain words
what is computed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import fp8
from .fp8 import E4M3, E5M2

ROW = 1024  # columns of a large tensor's block
PIECE = 256  # elements of a packed piece
GOLDEN = 0x9E3779B9 - (1 << 32)
INF_BITS = 0x7F800000
ONE_BITS = 0x3F800000
WEIGHT_FLOOR_BITS = 0x3C23D70A  # 0.01, the least square of a weight in the norm
OVERFLOW_BITS = 0x7F000000  # 2^127: from here on a second moment could be rounded up to infinity

# Columns of the per-tensor tables. HYPER is float64 and filled by the host, the others belong to the functions here.
HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "trust_scale", "trust_lr", "trust_clip", "bias_correction")
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, TRUST_SCALE, TRUST_LR, TRUST_CLIP, BIAS_CORRECTION = range(9)
FACTORS = 16  # float32: the fields of Factors in their order, padded to 64 bytes
GRAD_FACTOR, ENCODE, STEP_SIZE = 9, 10, 12
OFFSET, SALT, KEEP = range(3)  # int32 columns of the rounding table
WEIGHT_NORM, UPDATE_NORM, TRUST_RATIO = range(3)  # float64 columns of the report

Part = tuple[Tensor, Tensor, Tensor, Tensor]  # p, g, codes of m and of v
Results = tuple[Tensor, Tensor, Tensor, Tensor]  # max|m| and max v (their bits), Σ clamp(p²), Σ clamp(u²)


class Factors(NamedTuple):
    """The scalars of one block: float32, 0-d for a large tensor, [rows, 1] for packed pieces."""

    decode_m: Tensor  # β1 · scale of m (exact: the scale is a power of two)
    decode_v: Tensor  # β2 · scale of v
    new_m: Tensor  # 1 − β1
    new_v: Tensor  # 1 − β2
    rho: Tensor  # (1 − β1^t) / sqrt(1 − β2^t) with bias correction, else 1
    eps: Tensor  # eps · (1 − β1^t) with bias correction, else eps
    bound: Tensor  # rho / C: |m| · bound <= rho · sqrt(v) in exact arithmetic
    weight_decay: Tensor
    floor: Tensor  # eps, the lower clamp of the update's squares in its norm
    grad_factor: Tensor  # 1 / grad_scale, negative for maximize
    encode_m: Tensor  # 1 / new scale of m
    encode_v: Tensor
    step_size: Tensor  # lr · trust ratio


def tensor_factors(row: Tensor) -> Factors:
    """The factors of one tensor, 0-d, from its row of the table, [FACTORS]."""
    return Factors(*(row[column] for column in range(13)))


def packed_factors(table: Tensor, owner: Tensor) -> Factors:
    """The factors of packed pieces, [pieces, 1]; ``owner`` [pieces] says which tensor a piece belongs to."""
    rows = table[owner]
    return Factors(*(rows[:, column : column + 1] for column in range(13)))


def sqrt(x: Tensor) -> Tensor:
    """The IEEE float32 square root. Compiled code has it; eager ``torch.sqrt`` on the CPU is off by an ulp at times."""
    return torch.sqrt(x) if torch.compiler.is_compiling() else x.double().sqrt().float()


def non_negative_max(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two non-negative floats through their bits: one instruction, NaN on top."""
    return torch.maximum(a.view(torch.int32), b.view(torch.int32)).view(torch.float32)


def clamped_weight(p: Tensor) -> Tensor:
    """clamp(p², 0.01, 1) in float32 through the bits, handed out in float64 for the sum."""
    bits = torch.clamp((p * p).view(torch.int32), min=WEIGHT_FLOOR_BITS, max=ONE_BITS)
    return bits.view(torch.float32).double()


def clamped_update(u: Tensor, floor: Tensor) -> Tensor:
    """clamp(u², floor, 1), likewise."""
    bits = torch.maximum((u * u).view(torch.int32), floor.view(torch.int32))
    return torch.clamp(bits, max=ONE_BITS).view(torch.float32).double()


def moments(g: Tensor, codes_m: Tensor, codes_v: Tensor, f: Factors) -> tuple[Tensor, Tensor]:
    """The fresh float32 moments of a block."""
    old_m = codes_m if codes_m.dtype == torch.float32 else fp8.decode(codes_m, E4M3)
    old_v = codes_v if codes_v.dtype == torch.float32 else fp8.decode(codes_v, E5M2)
    g = g.float() * f.grad_factor
    m = old_m * f.decode_m + g * f.new_m
    v = old_v * f.decode_v + (g * g) * f.new_v
    return m, v


def direction(p: Tensor, m: Tensor, v: Tensor, f: Factors) -> Tensor:
    """The update u = m / max(sqrt(v) + eps, |m| / C) + λ · p, with the bias corrections taken out of the fraction."""
    denominator = non_negative_max(sqrt(v) * f.rho + f.eps, m.abs() * f.bound)
    return m / denominator + p * f.weight_decay


def measure_block(p: Tensor, g: Tensor, codes_m: Tensor, codes_v: Tensor, f: Factors) -> Results:
    """What is reduced, elementwise: the bits of |m| and v (int32), the clamped squares of p and u (float64)."""
    weights = p.float()
    m, v = moments(g, codes_m, codes_v, f)
    u = direction(weights, m, v, f)
    magnitude = m.view(torch.int32) & 0x7FFFFFFF
    return magnitude, v.view(torch.int32), clamped_weight(weights), clamped_update(u, f.floor)


def measure(parts: list[Part], rows: list[Tensor], lanes: Tensor, results: list[Results], by_rows: bool) -> None:
    """First pass over large tensors.

    A part's tensors are [r, ROW], with an r of its own; ``rows`` [FACTORS] float32 are rows of the table; ``lanes`` as
    for :func:`apply`. Writes into each of ``results`` max|m| and max v (their bits, int32) and the two sums (float64):
    [1], or with ``by_rows`` [r], for :func:`collect`.
    """
    for part, row, result in zip(parts, rows, results, strict=True):
        # Zeros or-ed in tie everything to the columns: a loop over rows, and 1,024 columns, has no checks inside.
        p = (part[0].float().view(torch.int32) | lanes[1]).view(torch.float32)
        g = (part[1].float().view(torch.int32) | lanes[1]).view(torch.float32)
        a, b, c, d = measure_block(p, g, part[2], part[3], tensor_factors(row))
        dims = [1] if by_rows else [0, 1]
        result[0].copy_(a.amax(dims))
        result[1].copy_(b.amax(dims))
        result[2].copy_(c.sum(dims))
        result[3].copy_(d.sum(dims))


def collect(
    partial: Results, start: Tensor, length: Tensor, lanes: Tensor, peaks: list[Tensor], sums: list[Tensor]
) -> None:
    """Reduce what :func:`measure` wrote row by row for all tensors, in chunks of at most ROW rows.

    ``partial`` are [rows], of all tensors one after the other; ``start`` and ``length`` [chunks, 1] int64 say which
    rows a chunk consists of. Writes ``peaks`` (two of [chunks] int32) and ``sums`` (two of [chunks] float64).
    """
    inside = lanes[0] < length
    index = torch.where(inside, start + lanes[0], start)  # rows read twice do not matter to a maximum
    for x, result in zip(partial[:2], peaks, strict=True):
        result.copy_(x[index].amax(1))
    for x, result in zip(partial[2:], sums, strict=True):
        result.copy_(torch.where(inside, x[index], 0.0).sum(1))


def measure_packed(
    part: Part,
    table: Tensor,
    owner: Tensor,
    length: Tensor,
    lanes: Tensor,
    peaks: list[Tensor],
    sums: list[Tensor],
) -> None:
    """First pass over pieces: p, g, codes [pieces, PIECE], a piece a row, zero beyond its ``length`` [pieces, 1].

    Writes ``peaks`` (two of [pieces] int32) and ``sums`` (two of [pieces] float64). ``lanes`` as for :func:`apply`.
    """
    a, b, c, d = measure_block(*part, packed_factors(table, owner))
    inside = lanes[0, :PIECE] < length
    peaks[0].copy_(a.amax(1))
    peaks[1].copy_(b.amax(1))
    sums[0].copy_(torch.where(inside, c, 0.0).sum(1))
    sums[1].copy_(torch.where(inside, d, 0.0).sum(1))


def factors(hyper: Tensor, bound: Tensor, scale_m: Tensor, scale_v: Tensor, step: Tensor) -> list[Tensor]:
    """The first nine columns of the factor table, float32 [tensors], for the step after ``step``."""
    t = step.double() + 1
    beta1, beta2 = hyper[:, BETA1], hyper[:, BETA2]
    corrected = hyper[:, BIAS_CORRECTION] != 0
    c1 = torch.where(corrected, 1 - beta1**t, 1.0)
    c2 = torch.where(corrected, 1 - beta2**t, 1.0)
    rho = c1 / c2.sqrt()
    # β is rounded to float32 before it meets the scale, so that the product is exact.
    decode_m, decode_v = beta1.float() * scale_m, beta2.float() * scale_v
    eps, decay = hyper[:, EPS], hyper[:, WEIGHT_DECAY]
    rest = [1 - beta1, 1 - beta2, rho, eps * c1, rho * bound, decay, eps]
    return [decode_m, decode_v, *(x.float() for x in rest)]


def prepare(hyper: Tensor, bound: Tensor, norms: Tensor, counters: Tensor, home: Tensor, carry: Tensor) -> None:
    """Fill ``carry`` for the next step from the state; needed when state or hyperparameters were changed outside."""
    scale_m, scale_v = norms[home].unbind(1)
    carry[:, :GRAD_FACTOR] = torch.stack(factors(hyper, bound, scale_m, scale_v, counters[home, 0]), 1)


def new_scale(peak: Tensor, fmt: fp8.Format, float8: bool) -> tuple[Tensor, Tensor]:
    """The scale of the new codes and its reciprocal, float32 [tensors]; 1 where moments stay float32."""
    if not float8:
        ones = torch.ones_like(peak, dtype=torch.float32)
        return ones, ones
    exponent = fp8.scale_exponent(peak, fmt)
    return fp8.power_of_two(exponent), fp8.power_of_two(254 - exponent)


def still(moving: list[Tensor], scale_m: Tensor, scale_v: Tensor) -> list[Tensor]:
    """The columns of the factor table with which zero gradients leave codes of these scales as they are.

    m is the decoded value plus -0 (a zero gradient times -1), so that it keeps the sign of a zero; scaled back it lies
    on the grid, where no rounding word moves it.
    """
    ones = torch.ones_like(scale_m)
    kept = moving[3:GRAD_FACTOR]
    return [scale_m, scale_v, -ones, *kept, ones, 1 / scale_m, 1 / scale_v, moving[STEP_SIZE]]


def scale(
    peaks: list[Tensor],
    sums: list[Tensor],
    pieces: Tensor,
    norms: list[Tensor],
    counters: list[Tensor],
    home: Tensor,
    hyper: Tensor,
    bound: Tensor,
    found_inf: Tensor,
    skipped: Tensor,
    carry: list[Tensor],
    table: list[Tensor],
    rounding: list[Tensor],
    report: list[Tensor],
    float8: bool,
) -> None:
    """Between the passes: scales, trust ratios, counts, for all tensors at once.

    Tables come as their columns, so that all of them are written by one kernel. Reads ``peaks`` (two of [slots] int32)
    and ``sums`` (two of [slots] float64) of all pieces; ``pieces`` [tensors, k] int64 says which slots belong to a
    tensor (slot 0 is zero); ``hyper`` [tensors, 9] and ``bound`` [tensors] are float64, ``found_inf`` is 0-d. Updates
    the state: ``norms`` (two of [homes] float32) and ``counters`` (step and salt, [homes] int32) at ``home`` [tensors];
    ``skipped`` 0-d int64. ``carry`` (FACTORS of [tensors] float32) holds the factors that :func:`measure` used and gets
    those of the next step. Fills what :func:`apply` needs: ``table`` (FACTORS of [tensors]), ``rounding`` (int32), and
    the ``report`` (float64) of the norms.
    """
    peak_m, peak_v = (x[pieces].amax(1) for x in peaks)
    weight_norm, update_norm = (x[pieces].sum(1).sqrt() for x in sums)
    old_m, old_v = (x[home] for x in norms)
    step, salt = (x[home] for x in counters)

    skip = (peak_m >= INF_BITS) | (peak_v >= OVERFLOW_BITS) | (found_inf != 0)
    moves = torch.logical_not(skip)
    (fresh_m, inverse_m), (fresh_v, inverse_v) = new_scale(peak_m, E4M3, float8), new_scale(peak_v, E5M2, float8)

    lr = hyper[:, LR]
    base = weight_norm / update_norm * hyper[:, TRUST_LR] / lr.abs()  # schedulers end a hair below 0 at times
    ratio = torch.clamp(base ** hyper[:, TRUST_SCALE], max=hyper[:, TRUST_CLIP])

    moving = [*carry[:ENCODE], inverse_m, inverse_v, (lr * ratio).float()]
    for column, a, b in zip(table, still(moving, old_m, old_v), moving, strict=False):
        column.copy_(torch.where(skip, a, b))
    for column, x in zip(rounding, ((step + 1) * GOLDEN, salt, skip.int() - 1), strict=False):
        column.copy_(x)
    for column, x in zip(report, (weight_norm, update_norm, ratio), strict=True):
        column.copy_(x)

    fresh_m, fresh_v = torch.where(skip, old_m, fresh_m), torch.where(skip, old_v, fresh_v)
    step = step + (moves & ((peak_m > 0) | (peak_v > 0))).int()
    for column, x in zip(carry, factors(hyper, bound, fresh_m, fresh_v, step), strict=False):
        column.copy_(x)
    skipped.add_((skip & (home != 0)).sum())
    for column, x in ((norms[0], fresh_m), (norms[1], fresh_v), (counters[0], step)):
        column[home] = x


def write_block(part: Part, f: Factors, index: Tensor, offset: Tensor, keep: Tensor) -> None:
    """Second pass over one block.

    ``index`` is element index + salt, int32, of the block's shape; ``keep`` int32 is 0 where all is to stay as it is,
    else -1, of a shape with the block's columns (so that all three stores share one loop). A tensor that is to stay
    has factors that decode and encode its codes unchanged once its gradient is masked out, see :func:`still`.
    """
    p, g, codes_m, codes_v = part
    weights = p.float()
    m, v = moments(masked(g.float(), keep), codes_m, codes_v, f)
    u = direction(weights, m, v, f)
    p.copy_(weights - masked(u * f.step_size, keep))
    if codes_m.dtype == torch.float32:
        codes_m.copy_(m)
        codes_v.copy_(v)
        return
    word = fp8.hash32(index) + offset
    sign = (m.view(torch.int32) >> 24) & 0x80
    new_m = fp8.encode(m.abs() * f.encode_m, word, E4M3) | sign
    new_v = fp8.encode(v * f.encode_v, word, E5M2)
    new_v = torch.maximum(new_v, torch.clamp(v.view(torch.int32), max=1))  # never 0 where v > 0
    codes_m.copy_(new_m.to(torch.uint8))
    codes_v.copy_(new_v.to(torch.uint8))


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """x where keep is -1, 0 where it is 0; ``where`` costs the CPU four instructions in place of one."""
    return (x.view(torch.int32) & keep).view(torch.float32)


def apply(parts: list[Part], rows: list[Tensor], roundings: list[Tensor], lanes: Tensor) -> None:
    """Second pass over large tensors; as for :func:`measure`. ``roundings`` [4] int32 are rows of that table.

    ``lanes`` [2, ROW] int32 holds 0..ROW-1 and zeros.
    """
    for part, row, rounding in zip(parts, rows, roundings, strict=True):
        first = torch.arange(part[0].shape[0], dtype=torch.int32, device=lanes.device)[:, None] * ROW
        index = lanes[0] + (first + rounding[SALT])
        write_block(part, tensor_factors(row), index, rounding[OFFSET], lanes[1] | rounding[KEEP])


def apply_packed(part: Part, table: Tensor, rounding: Tensor, owner: Tensor, start: Tensor, lanes: Tensor) -> None:
    """Second pass over packed pieces; ``start`` [pieces, 1] int32 is the index of a piece's first element."""
    rows = rounding[owner]
    index = lanes[0, :PIECE] + (start + rows[:, SALT : SALT + 1])
    f = packed_factors(table, owner)
    write_block(part, f, index, rows[:, OFFSET : OFFSET + 1], lanes[1, :PIECE] | rows[:, KEEP : KEEP + 1])


def spread(index: Tensor, inverses: Tensor, jumps: Tensor) -> Tensor:
    """Where local elements lie in a whole tensor that is split along inner dimensions, int32, modulo 2^32.

    After every run of so many local elements that many elements of other ranks are jumped over: ``jumps`` [2, ...]
    int32 and the runs' ``inverses`` [2, ...] float64, 0 where there is no such run. The division is exact: the half
    keeps it from the integers by more than float64's error, for up to 2^31 elements.
    """
    middle = index.double() + 0.5
    for inverse, jump in zip(inverses, jumps, strict=True):
        index = index + (middle * inverse).to(torch.int32) * jump
    return index


def apply_spread(
    parts: list[Part],
    rows: list[Tensor],
    roundings: list[Tensor],
    inverses: list[Tensor],
    jumps: list[Tensor],
    lanes: Tensor,
) -> None:
    """:func:`apply` for shards whose elements :func:`spread` over the whole tensor; one of each [2] a tensor."""
    for part, row, rounding, inverse, jump in zip(parts, rows, roundings, inverses, jumps, strict=True):
        first = torch.arange(part[0].shape[0], dtype=torch.int32, device=lanes.device)[:, None] * ROW
        index = spread(lanes[0] + first, inverse, jump) + rounding[SALT]
        write_block(part, tensor_factors(row), index, rounding[OFFSET], lanes[1] | rounding[KEEP])


def apply_packed_spread(
    part: Part,
    table: Tensor,
    rounding: Tensor,
    inverses: Tensor,
    jumps: Tensor,
    owner: Tensor,
    start: Tensor,
    lanes: Tensor,
) -> None:
    """:func:`apply_packed` for the same; ``inverses`` and ``jumps`` are [tensors, 2]."""
    rows = rounding[owner]
    places = (x[owner].T[:, :, None] for x in (inverses, jumps))
    index = spread(lanes[0, :PIECE] + start, *places) + rows[:, SALT : SALT + 1]
    f = packed_factors(table, owner)
    write_block(part, f, index, rows[:, OFFSET : OFFSET + 1], lanes[1, :PIECE] | rows[:, KEEP : KEEP + 1])


def make_lanes(device: torch.device) -> Tensor:
    """The columns' indices and zeros, int32 [2, ROW]; loading them costs the CPU less than making them."""
    columns = torch.arange(ROW, dtype=torch.int32, device=device)
    return torch.stack([columns, torch.zeros_like(columns)])


def inverse_bound(beta1: float, beta2: float) -> float:
    """1/C with C = (1−β1) / sqrt((1−β2)(1−β1²/β2)); 0 where β1² >= β2.

    For any gradients |m| <= C·sqrt(v), by Cauchy–Schwarz over the two exponential averages.
    """
    if beta1 * beta1 >= beta2:
        return 0.0
    return math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2)) / (1 - beta1)
