"""The step as pure functions over blocks: what ``torch.compile`` sees.

1. :func:`inspect` reads the gradients and reduces max|g| of every row of a block (and, once more where the gradients'
   norm is wanted, their squares);
2. :func:`scale` turns these few numbers and the state, for all tensors at once, into scales, trust ratios and all other
   factors of the step;
3. :func:`update` reads weights, gradients and codes once and writes weights and codes, and for every row the sums and
   largest codes that the next step needs;
4. :func:`fold` reduces these to one number per tensor, in the state.

A *block* is 2-D: a large tensor cut into rows of :data:`ROW` elements, or many pieces of at most :data:`PIECE` elements
packed one per row. ``rows.py`` cuts, ``reference.py`` says in plain words what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..hyper import NUMBERS
from . import fp8
from .fp8 import E4M3, E5M2

ROW = fp8.COLUMNS  # of a large tensor's block
PIECE_BITS = 8
PIECE = 1 << PIECE_BITS  # elements of a packed piece
GOLDEN = 0x9E3779B9 - (1 << 32)
MAGNITUDE = 0x7FFFFFFF  # of a float's bits
NAN_BITS = 0x7FC00000
LOW_BITS = 0xFFFF  # of float32, which bfloat16 has not
HALF_NORMAL_BITS = 0x38800000  # 2^-14, the smallest normal float16
INF_BITS = 0x7F800000
ONE_BITS = 0x3F800000
WEIGHT_FLOOR_BITS = 0x3C23D70A  # 0.01, the least square of a weight in the norm
OVERFLOW_BITS = 0x7F000000  # 2^127: from here on a second moment could be rounded up to infinity
UNIT = 2.0**-20  # of the sums
EIGHT_BITS, TWELVE_BITS = 0x41000000, 0x41400000  # 8.0 and 12.0: floats in [8, 16) are multiples of 2^-20


class Block(NamedTuple):
    """What a call of :func:`inspect` or :func:`update` works on; all of a parameter that is spread here is its shard.

    A large tensor has no ``tensor``, ``start`` and ``length``: its rows are full and follow each other.
    """

    p: Tensor  # [rows, columns] weights
    g: Tensor  # [rows, columns] gradients
    m: Tensor  # [rows, columns] uint8 codes, or float32 moments
    v: Tensor
    new_p: Tensor  # the same memory once more: what is written to
    new_m: Tensor
    new_v: Tensor
    tensor: Tensor | None = None  # [rows] int64: which row of the factor tables
    start: Tensor | None = None  # [rows, 1] int32: index of each row's first element
    length: Tensor | None = None  # [rows, 1] int32: elements of each row that count
    remainder: Tensor | None = None  # [rows, columns] int16: of bfloat16 weights that are kept exactly
    new_remainder: Tensor | None = None


def in_place(tensors: Sequence[Tensor], places: Sequence[Tensor] = ()) -> Block:
    """A block of p, g, m, v and, if there are, remainders, which writes to where it reads."""
    p, g, m, v, *remainder = tensors
    return Block(p, g, m, v, p, m, v, *(places or (None,) * 3), *remainder, *remainder)


class Spread(NamedTuple):
    """Where the elements of a shard lie in a tensor that is split along inner dimensions, see :func:`global_index`."""

    inverses: Tensor  # [2] or [tensors, 2] float64
    jumps: Tensor  # [2] or [tensors, 2] int32


class Sums(NamedTuple):
    """What :func:`update` leaves of every row, int32 [rows]; those with ``*`` int64 where rows are long (export)."""

    max_m: Tensor  # largest code of |m|; the bits of the largest |m| where moments are float32
    max_v: Tensor
    weights: Tensor  # Σ clamp(p², 0.01, 1) in units of 2^-20 *
    updates: Tensor  # Σ clamp(u², eps, 1), likewise *
    agree: Tensor | None = None  # elements whose sign is the gradient's; with caution only *
    checksum: Tensor | None = None  # Σ hash(bits of p), modulo 2^32; of bfloat16 weights that are kept exactly

    @classmethod
    def of(cls, make: Callable[[], Tensor], caution: bool, exact: bool) -> Sums:
        """Each of what ``make`` gives."""
        there = (True, True, True, True, caution, exact)
        return cls._make(make() if found else None for found in there)

    def rows(self, part: slice) -> Sums:
        """Those of some rows."""
        return Sums._make(None if x is None else x[part] for x in self)


class Factors(NamedTuple):
    """The scalars of a step of one tensor, the columns of the factor tables: 0-d, or [rows, 1] for packed pieces."""

    # float32
    grad_factor: Tensor  # clip factor / gradient scale, negative for maximize
    decode_m: Tensor  # β1 · scale of m (exact: the scale is a power of two)
    decode_v: Tensor  # β2 · scale of v
    new_m: Tensor  # 1 − β1
    new_v: Tensor  # 1 − β2
    momentum: Tensor  # a and b of n = a·m + b·g
    gradient: Tensor
    rho: Tensor  # 1 / sqrt(1 − β2^t) with bias correction, else 1
    eps: Tensor
    bound: Tensor  # 1 / C
    share: Tensor  # what an update is multiplied by where it agrees with the gradient (caution)
    weight_decay: Tensor
    encode_m: Tensor  # 1 / new scale of m
    encode_v: Tensor
    step_size: Tensor  # lr · trust ratio
    # int32
    offset: Tensor  # t · GOLDEN - 2^31, which every element's rounding word gets
    salt: Tensor
    base: Tensor  # index of a shard's first element
    keep: Tensor  # 0 where all is to stay as it is, else -1
    join: Tensor  # -1 where the remainders are those of the weights, 0 where others have changed the weights

    @classmethod
    def of(cls, floats: Tensor, integers: Tensor) -> Factors:
        """From rows of the two tables, [columns] or [rows, columns]."""
        found = [floats[..., k : k + 1] for k in range(FLOATS)]
        return cls(*found, *(integers[..., k : k + 1] for k in range(INTEGERS)))


INTEGERS = 5
FLOATS = len(Factors._fields) - INTEGERS


class State(NamedTuple):
    """The scalar state of all tensors, by columns, and which rows are meant."""

    scale_m: Tensor  # float32 [slots]
    scale_v: Tensor
    max_m: Tensor
    max_v: Tensor
    step: Tensor  # int32 [slots]
    salt: Tensor
    weight_sum: Tensor  # int64 [slots], of whole tensors
    update_sum: Tensor
    mask_count: Tensor
    checksum: Tensor  # modulo 2^32
    home: Tensor  # int64 [tensors]: the slot of each


class Tree(NamedTuple):
    """How rows are reduced to tensors: rows to chunks of neighbours, chunks to tensors; int64."""

    start: Tensor  # [chunks, 1]: first row
    length: Tensor  # [chunks, 1]
    columns: Tensor  # [k]: 0..k-1 for the longest chunk
    first: Tensor  # [tensors, 1]: first chunk
    chunks: Tensor  # [tensors, 1]: how many
    chunk_columns: Tensor  # [l]


class Inputs(NamedTuple):
    """What :func:`scale` needs besides the state."""

    largest: Tensor  # int32 [rows]: bits of max|g|
    tree: Tree
    hyper: Tensor  # float64 [tensors, NUMBERS]
    numel: Tensor  # float64 [tensors], of whole tensors
    base: Tensor  # int32 [tensors]: index of a shard's first element
    inverse_scale: Tensor  # float64 0-d: 1 / grad_scale, times the clip factor
    found_inf: Tensor  # float32 0-d
    checksum: Tensor | None = None  # int32 [rows], see :func:`inspect`


class Outputs(NamedTuple):
    """What :func:`scale` fills."""

    floats: list[Tensor]  # the float32 columns of the factor table, [tensors]
    integers: list[Tensor]  # the int32 columns
    report: list[Tensor]  # float64: weight norm, update norm, trust ratio
    counted: Tensor  # bool [tensors]: whether the step counts for the tensor, and :func:`fold` is to write its sums
    skipped: Tensor  # int64 0-d: the count of skipped tensors goes up


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


# -- reading the gradients ----------------------------------------------------------------------------------------


def inspect(blocks: list[Block], results: list[list[Tensor]], unit: Tensor | None) -> None:
    """Reduce the gradients of every row of each block; the ``results`` of a block are int32 [rows].

    Without a ``unit`` there is one, the bits of max|g|. With it, float32 [2], two powers of two whose product brings
    every gradient below 1, there are two: the sum of the squares of the products in units of 2^-20, and that of what
    these leave in units of 2^-40. A second result without a ``unit`` is the checksum of the weights.
    """
    for block, result in zip(blocks, results, strict=True):
        g = block.g.float()
        if unit is None:
            result[0].copy_(bits(g).amax(1))
            if len(result) > 1:
                result[1].copy_(hashes_of(block.p.float()).sum(1, dtype=torch.int32))
            continue
        x = g * unit[0] * unit[1]
        square = torch.clamp(bits(x * x), max=ONE_BITS).view(torch.float32)
        rounded = square + 8.0
        rest = (square - (rounded - 8.0)) * 2.0**20
        result[0].copy_((rounded.view(torch.int32) - EIGHT_BITS).sum(1, dtype=torch.int32))
        result[1].copy_(((rest + 12.0).view(torch.int32) - TWELVE_BITS).sum(1, dtype=torch.int32))


# -- rows to tensors ----------------------------------------------------------------------------------------------


def chosen(x: Tensor, start: Tensor, length: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Elements start .. start + length - 1 of x per row, and which columns are among them."""
    inside = columns < length
    return x[torch.where(inside, start + columns, start)], inside


def largest_of(x: Tensor, tree: Tree) -> Tensor:
    """The largest of every tensor's rows; elements that are read twice do not matter. 0 for a tensor without rows."""
    chunks = chosen(x, tree.start, tree.length, tree.columns)[0].amax(1)
    found, inside = chosen(chunks, tree.first, tree.chunks, tree.chunk_columns)
    return torch.where(inside, found, 0).amax(1)


def sum_of(x: Tensor, tree: Tree) -> Tensor:
    """The sum over every tensor's rows, int64."""
    for start, length, columns in (
        (tree.start, tree.length, tree.columns),
        (tree.first, tree.chunks, tree.chunk_columns),
    ):
        found, inside = chosen(x, start, length, columns)
        x = torch.where(inside, found, 0).sum(1, dtype=torch.int64)
    return x


# -- all tensors at once ------------------------------------------------------------------------------------------


def new_scale(largest: Tensor, fmt: fp8.Format, float8: bool) -> tuple[Tensor, Tensor]:
    """The scale of the new codes for a moment of at most ``largest``, and its reciprocal; 1 where they are float32."""
    if not float8:
        ones = torch.ones_like(largest)
        return ones, ones
    exponent = fp8.scale_exponent(largest.view(torch.int32), fmt)
    return fp8.power_of_two(exponent), fp8.power_of_two(254 - exponent)


def inverse_bound(beta1: Tensor, beta2: Tensor, a: Tensor, b: Tensor, c2: Tensor) -> Tensor:
    """1/C, where |n| <= C·sqrt(v / c2) holds for any gradients; 0 where β1² >= β2. The formula is reference.py's."""
    q = beta1 * beta1 / beta2
    first = a + b / (1 - beta1)
    found = sqrt64((1 - beta2) / c2) / ((1 - beta1) * sqrt64(first * first + a * a * (q / (1 - q))))
    return torch.where(beta1 * beta1 >= beta2, 0.0, found)


def scale(inputs: Inputs, state: State, outputs: Outputs, float8: bool) -> None:
    """Between the passes: scales, trust ratios and all factors of the step, for all tensors at once.

    Writes the state's scales and step counts.
    """
    h = dict(zip(NUMBERS, inputs.hyper.unbind(1), strict=True))
    beta1, beta2, lr = h["beta1"], h["beta2"], h["lr"]
    old_m, old_v, max_m, max_v = (x[state.home] for x in state[:4])
    step, weight_sum, update_sum = (x[state.home] for x in (state.step, state.weight_sum, state.update_sum))

    sign = torch.where(h["maximize"] != 0, -1.0, 1.0).double()
    grad_factor = (sign * inputs.inverse_scale).float()
    g = largest_of(inputs.largest, inputs.tree).view(torch.float32) * grad_factor.abs()
    new_m, new_v = (1 - beta1).float(), (1 - beta2).float()
    if float8:
        max_m, max_v = max_m * old_m, max_v * old_v
    bound_m = beta1.float() * max_m + new_m * g
    bound_v = beta2.float() * max_v + new_v * (g * g)
    skip = (bits(g) >= INF_BITS) | (bits(bound_m) >= INF_BITS) | (bits(bound_v) >= OVERFLOW_BITS)
    skip = skip | (inputs.found_inf != 0)
    counted = torch.logical_not(skip) & ((bound_m > 0) | (bound_v > 0))
    fresh_m, encode_m = new_scale(bound_m, E4M3, float8)
    fresh_v, encode_v = new_scale(bound_v, E5M2, float8)

    t = step.double() + 1
    corrected, nesterov = h["bias_correction"] != 0, h["nesterov"] != 0
    c1, c2, c3 = (torch.where(corrected, 1 - x, 1.0) for x in (beta1**t, beta2**t, beta1 ** (t + 1)))
    a = torch.where(nesterov, beta1 / c3, 1 / c1)
    b = torch.where(nesterov, (1 - beta1) / c1, 0.0)
    share = inputs.numel / torch.maximum(state.mask_count[state.home].double(), inputs.numel / 1000)

    norms = weight_sum.double() / update_sum.double()
    ratio = torch.clamp((sqrt64(norms) * h["trust_lr"] / lr.abs()) ** h["trust_scale"], max=h["trust_clip"])

    join = torch.full_like(step, -1)
    if inputs.checksum is not None:
        same = checksum_of(inputs.checksum, inputs.tree) == state.checksum[state.home]
        join = torch.where(same, join, 0)

    active = Factors(
        grad_factor,
        # β is rounded to float32 before it meets the scale, so that the product is exact.
        beta1.float() * old_m, beta2.float() * old_v, new_m, new_v, a.float(), b.float(),
        (1 / sqrt64(c2)).float(), h["eps"].float(), inverse_bound(beta1, beta2, a, b, c2).float(), share.float(),
        h["weight_decay"].float(), encode_m, encode_v, (lr * ratio).float(),
        ((step + 1) * GOLDEN) ^ fp8.SIGN_BIT, state.salt[state.home], inputs.base, torch.full_like(step, -1), join,
    )  # fmt: skip
    # With gradients of zero codes decode, and encode, to themselves: -0 (zero times -1) keeps the sign of a zero.
    one = torch.ones_like(old_m)
    frozen = active._replace(
        decode_m=one, decode_v=one, new_m=-one, encode_m=one, encode_v=one, keep=torch.zeros_like(step)
    )
    for column, x, y in zip([*outputs.floats, *outputs.integers], frozen, active, strict=True):
        column.copy_(torch.where(skip, x, y))
    roots = [sqrt64(x.double() * UNIT) for x in (weight_sum, update_sum)]
    for column, x in zip(outputs.report, (*roots, ratio), strict=True):
        column.copy_(x)
    outputs.counted.copy_(counted)
    outputs.skipped.add_((skip & (state.home != 0)).sum())
    state.scale_m[state.home] = torch.where(skip, old_m, fresh_m)
    state.scale_v[state.home] = torch.where(skip, old_v, fresh_v)
    state.step[state.home] = step + counted.int()
    # Where decay alone moves the weights, which is no step to count, they are to be rounded by other words each time.
    decays = (lr != 0) & (h["weight_decay"] != 0) & torch.logical_not(skip | counted)
    state.salt[state.home] = state.salt[state.home] + decays.int()


def fold(rows: Sums, tree: Tree, counted: Tensor, first_rank: Tensor, state: State, float8: bool) -> None:
    """After :func:`update`: what the next step needs of every tensor, in the state.

    ``counted`` as :func:`scale` left it: other tensors keep what they have. Sums of shards are still to be added up
    over the ranks: where nothing is new, one of these (``first_rank`` 1, others 0; int64 [tensors]) gives the old sum.
    """
    home = state.home
    peaks = [largest_of(x, tree) for x in rows[:2]]
    formats = (E4M3, E5M2)
    peaks = [fp8.decode(x, f) if float8 else x.view(torch.float32) for x, f in zip(peaks, formats, strict=True)]
    for column, peak in zip((state.max_m, state.max_v), peaks, strict=True):
        column[torch.where(counted, home, 0)] = peak
    sums = [(state.weight_sum, rows.weights), (state.update_sum, rows.updates)]
    if rows.agree is not None:
        sums.append((state.mask_count, rows.agree))
    if rows.checksum is not None:  # of the weights as they are now, whatever has become of them
        state.checksum[home] = checksum_of(rows.checksum, tree)
    for column, x in sums:
        column[torch.where(counted | (first_rank == 0), home, 0)] = torch.where(counted, sum_of(x, tree), 0)


# -- reading everything once --------------------------------------------------------------------------------------


def update(
    blocks: list[Block],
    floats: list[Tensor],
    integers: list[Tensor],
    columns: Tensor,
    sums: list[Sums],
    spread: list[Spread] | None,
    stochastic: bool,
) -> None:
    """One step over each block, in place; weights with 16 bits are rounded to nearest if not ``stochastic``.

    ``floats`` and ``integers`` are rows of the factor tables, one of each per block; for packed rows the tables.
    ``columns`` are what :func:`make_columns` makes. Without ``spread`` shards begin with a row of the whole tensor, and
    packed rows with a quarter of one. Writes every row's ``sums``.
    """
    for k, block in enumerate(blocks):
        f = Factors.of(*(x[k] if block.tensor is None else x[k][block.tensor] for x in (floats, integers)))
        width = block.p.shape[1]
        rows = torch.arange(block.p.shape[0], dtype=torch.int32, device=columns.device)[:, None]
        start = rows * ROW if block.start is None else block.start
        if spread is None:
            row = (start >> fp8.COLUMN_BITS) + (f.base >> fp8.COLUMN_BITS)
            hashes = columns[0]
            if block.start is not None:
                hashes = hashes.view(-1, PIECE)[(block.start[:, 0] >> PIECE_BITS) & (ROW // PIECE - 1)]
            words = fp8.mix(hashes, fp8.hash32((row & fp8.LAST_ROW) + f.salt))
        else:
            index = torch.arange(width, dtype=torch.int32, device=columns.device) + start
            words = fp8.element_words(global_index(index, spread[k], block.tensor) + f.base, f.salt)
        magnitude = columns[1, :width] if columns.device.type == "cpu" else None
        update_block(block, f, words, magnitude, sums[k], stochastic)


def update_block(
    block: Block, f: Factors, words: Tensor, magnitude: Tensor | None, sums: Sums, stochastic: bool
) -> None:
    """The rule over one block; ``words`` are the rounding words but for ``f.offset``, of the block's shape.

    ``magnitude`` has the block's columns, each MAGNITUDE: this gives all three stores loops of the same shape on CPUs.
    """
    weights = block.p.float()
    if block.remainder is not None:
        weights = join(weights, block.remainder.to(torch.int32) & f.join)
    g = masked(block.g.float() * f.grad_factor, f.keep)
    old_m = block.m if block.m.dtype == torch.float32 else fp8.decode(block.m, E4M3)
    old_v = block.v if block.v.dtype == torch.float32 else fp8.decode(block.v, E5M2)
    m = old_m * f.decode_m + g * f.new_m
    v = old_v * f.decode_v + (g * g) * f.new_v
    n = m * f.momentum + g * f.gradient
    size = n.abs() if magnitude is None else masked(n, magnitude)
    u = n / larger(sqrt(v) * f.rho + f.eps, size * f.bound)
    if sums.agree is not None:
        agrees = ((n > 0) & (g > 0)) | ((n < 0) & (g < 0))
        u = torch.where(agrees, u * f.share, 0.0)
        sums.agree.copy_(sum_of_rows(agrees.int(), block, 0, sums.agree.dtype))
    u = u + weights * f.weight_decay
    new_p = weights - masked(u * f.step_size, f.keep)
    words = words + f.offset  # not earlier: there are few registers
    kept = store_weights(block, new_p, words, sums, stochastic)
    if block.m.dtype == torch.float32:
        max_m, max_v = bits(m), bits(v)
        block.new_m.copy_(m)
        block.new_v.copy_(v)
    else:
        max_m = fp8.encode(m.abs() * f.encode_m, words, E4M3)
        max_v = fp8.encode(v * f.encode_v, words, E5M2)
        max_v = torch.maximum(max_v, torch.clamp(v.view(torch.int32), max=1))  # never 0 where v > 0
        block.new_m.copy_((max_m | ((m.view(torch.int32) >> 24) & 0x80)).to(torch.uint8))
        block.new_v.copy_(max_v.to(torch.uint8))
    sums.max_m.copy_(max_m.amax(1))
    sums.max_v.copy_(max_v.amax(1))
    squares = units(kept * kept, WEIGHT_FLOOR_BITS)
    sums.weights.copy_(sum_of_rows(squares, block, EIGHT_BITS, sums.weights.dtype))
    sums.updates.copy_(sum_of_rows(units(u * u, f.eps), block, EIGHT_BITS, sums.updates.dtype))


def store_weights(block: Block, weights: Tensor, words: Tensor, sums: Sums, stochastic: bool) -> Tensor:
    """Round the new weights (float32) to what the block has and store them; returns them as they are kept, float32."""
    dtype = block.p.dtype
    if block.new_remainder is not None and sums.checksum is not None:
        exact, nearest = split(weights)
        new_p = nearest.to(dtype)
        block.new_p.copy_(new_p)
        block.new_remainder.copy_((exact - nearest.view(torch.int32)).to(torch.int16))
        hashes = hashes_of(new_p.float())  # as it is stored: what bits a NaN has is the conversion's affair
        sums.checksum.copy_(sum_of_rows(hashes, block, 0, torch.int32))
    else:
        if dtype != torch.float32 and stochastic:
            weights = round_weights(weights, words, dtype)
        new_p = weights.to(dtype)
        block.new_p.copy_(new_p)
        weights = new_p.float()
    return weights


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


def checksum_of(rows: Tensor, tree: Tree) -> Tensor:
    """The checksum of every tensor's weights, int64."""
    return sum_of(rows, tree) & 0xFFFFFFFF


def sum_of_rows(x: Tensor, block: Block, zero: int, dtype: torch.dtype) -> Tensor:
    """Σ (x - zero) of every row, without a packed row's padding. In int32 the sum of x alone may wrap around."""
    if block.length is None:
        zeros = x.shape[1] * zero
        return x.sum(1, dtype=dtype) - (fp8.wrapped(zeros) if dtype == torch.int32 else zeros)
    inside = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) < block.length
    return torch.where(inside, x, 0).sum(1, dtype=dtype) - block.length[:, 0] * zero


def larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two non-negative floats through their bits: one instruction, NaN on top."""
    return torch.maximum(a.view(torch.int32), b.view(torch.int32)).view(torch.float32)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x with the bits of the mask; -1 keeps all. ``where`` costs the CPU four instructions in place of one."""
    return (x.view(torch.int32) & mask).view(torch.float32)


def global_index(index: Tensor, spread: Spread, tensor: Tensor | None) -> Tensor:
    """Where local elements lie in a whole tensor that is split along inner dimensions, int32, modulo 2^32.

    After every run of so many local elements that many elements of other ranks are jumped over: ``jumps`` [2, ...]
    int32 and the runs' ``inverses`` [2, ...] float64, 0 where there is no such run. The division is exact: the half
    keeps it from the integers by more than float64's error, for up to 2^31 elements. ``tensor`` says which row of
    ``spread`` each row of elements belongs to.
    """
    if tensor is not None:
        spread = Spread(*(x[tensor].T[:, :, None] for x in spread))
    middle = index.double() + 0.5
    for inverse, jump in zip(spread.inverses, spread.jumps, strict=True):
        index = index + (middle * inverse).to(torch.int32) * jump
    return index


def make_columns(device: torch.device) -> Tensor:
    """The hash of every column, and MAGNITUDE, int32 [2, ROW]; loading them costs less than making them."""
    hashes = fp8.hash32(torch.arange(ROW, dtype=torch.int32, device=device))
    return torch.stack([hashes, torch.full_like(hashes, MAGNITUDE)])
