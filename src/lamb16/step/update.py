"""The step as pure functions over blocks: what ``torch.compile`` sees.

1. :func:`inspect` reads the gradients and reduces max|g| of every row of a block (and, once more where the gradients'
   norm is wanted, their squares);
2. :func:`scale` turns these few numbers and the state, for all tensors at once, into scales, trust ratios and all other
   factors of the step;
3. :func:`update` reads weights, gradients and codes once and writes weights and codes, and for every row the sums and
   largest codes that the next step needs;
4. :func:`fold` reduces these to one number per tensor, in the state.

:func:`scale` and :func:`fold` are in ``factors.py``; in ``gradient_norm.py`` what comes after :func:`inspect` where
ranks reduce its results, or gradients are clipped. ``blocks.py`` says what all are handed, ``reference.py`` in plain
words what is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fp8
from .blocks import PACKED_ROW, PACKED_ROW_BITS, ROW, Block, IndexMap, Sums
from .factors import Factors, fold, scale
from .floats import (
    EIGHT_BITS,
    MAGNITUDE,
    TWELVE_UNITS_BITS,
    UNIT,
    WEIGHT_FLOOR_BITS,
    bits,
    hashes_of,
    join,
    larger,
    masked,
    round_weights,
    split,
    sqrt,
    units,
)
from .fp8 import E4M3, E5M2
from .gradient_norm import gather, norm

# -- reading the gradients ----------------------------------------------------------------------------------------


def inspect(blocks: list[Block], results: list[list[Tensor]], rescale: Tensor | None) -> None:
    """Reduce the gradients of every row of each block; the ``results`` of a block are int32 [rows].

    Without ``rescale`` there is one, the bits of max|g|. With it, float32 [2], two powers of two whose product brings
    every finite gradient below 1, there are two: the sum of the squares of the products in units of 2^-20, and that of
    what these leave in units of 2^-40; of rows that are not finite they are no sums. A second result without
    ``rescale`` is the checksum of the weights.
    """
    for block, result in zip(blocks, results, strict=True):
        g = block.g.float()
        if rescale is None:
            result[0].copy_(bits(g).amax(1))
            if len(result) > 1:
                result[1].copy_(hashes_of(block.p.float()).sum(1, dtype=torch.int32))
            continue
        x = g * rescale[0] * rescale[1]
        square = x * x
        rounded = square + 8.0  # to a multiple of 2^-20, which the bits count
        rest = square - (rounded - 8.0) + 12 * UNIT  # to one of 2^-40
        for found, values, zero in zip(result, (rounded, rest), (EIGHT_BITS, TWELVE_UNITS_BITS), strict=True):
            found.copy_(sum_of_rows(values.view(torch.int32), None, zero, found.dtype))


# -- reading everything once --------------------------------------------------------------------------------------


def update(
    blocks: list[Block],
    floats: list[Tensor],
    integers: list[Tensor],
    columns: Tensor,
    sums: list[Sums],
    index_maps: list[IndexMap] | None,
    stochastic: bool,
) -> None:
    """One step over each block, in place; weights with 16 bits are rounded to nearest if not ``stochastic``.

    ``floats`` and ``integers`` are rows of the factor tables, one of each per block; for packed rows the tables.
    ``columns`` are what :func:`make_columns` makes. Without ``index_maps`` shards begin with a row of the whole tensor,
    and packed rows with a quarter of one. Writes every row's ``sums``.
    """
    for k, block in enumerate(blocks):
        f = Factors.of(*(x[k] if block.tensor_index is None else x[k][block.tensor_index] for x in (floats, integers)))
        width = block.p.shape[1]
        rows = torch.arange(block.p.shape[0], dtype=torch.int32, device=columns.device)[:, None]
        start = rows * ROW if block.start is None else block.start
        if index_maps is None:
            row = (start >> fp8.COLUMN_BITS) + (f.base >> fp8.COLUMN_BITS)
            hashes = columns[0]
            if block.start is not None:
                hashes = hashes.view(-1, PACKED_ROW)[(block.start[:, 0] >> PACKED_ROW_BITS) & (ROW // PACKED_ROW - 1)]
            words = fp8.mix(hashes, fp8.hash32((row & fp8.LAST_ROW) + f.salt))
        else:
            index = torch.arange(width, dtype=torch.int32, device=columns.device) + start
            words = fp8.element_words(global_index(index, index_maps[k], block.tensor_index) + f.base, f.salt)
        magnitude = columns[1, :width] if columns.device.type == "cpu" else None
        update_block(block, f, words, magnitude, sums[k], stochastic)


def update_whole(
    block: Block, floats: Tensor, integers: Tensor, sums: Sums, index_map: IndexMap | None, stochastic: bool
) -> None:
    """One step over a block whose rows are whole tensors of one size, in place; the eager form.

    ``floats`` and ``integers`` [tensors, columns] are their rows of the factor tables.
    """
    f = Factors.of(floats, integers)
    index = fp8.as_int32(torch.arange(block.p.shape[1], device=floats.device))
    if index_map is not None:
        index = global_index(index, IndexMap(*(x.T[:, :, None] for x in index_map)), None)
    update_block(block, f, fp8.element_words(index + f.base, f.salt), None, sums, stochastic)


def update_block(
    block: Block, f: Factors, words: Tensor, magnitude: Tensor | None, sums: Sums, stochastic: bool
) -> None:
    """The rule over one block; ``words`` are the rounding words but for ``f.offset``, of the block's shape.

    ``magnitude`` has the block's columns, each MAGNITUDE: so all three stores have loops of the same shape on CPUs.
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
        u = torch.where(agrees, u * f.gain, 0.0)
        sums.agree.copy_(sum_of_rows(agrees.int(), block.length, 0, sums.agree.dtype))
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
    sums.weights.copy_(sum_of_rows(squares, block.length, EIGHT_BITS, sums.weights.dtype))
    sums.updates.copy_(sum_of_rows(units(u * u, f.eps), block.length, EIGHT_BITS, sums.updates.dtype))


def store_weights(block: Block, weights: Tensor, words: Tensor, sums: Sums, stochastic: bool) -> Tensor:
    """Round the new weights (float32) to what the block has and store them; returns them as they are kept, float32."""
    dtype = block.p.dtype
    if block.new_remainder is not None and sums.checksum is not None:
        exact, nearest = split(weights)
        new_p = nearest.to(dtype)
        block.new_p.copy_(new_p)
        block.new_remainder.copy_((exact - nearest.view(torch.int32)).to(torch.int16))
        hashes = hashes_of(new_p.float())  # as it is stored: what bits a NaN has is the conversion's affair
        sums.checksum.copy_(sum_of_rows(hashes, block.length, 0, torch.int32))
    else:
        if dtype != torch.float32 and stochastic:
            weights = round_weights(weights, words, dtype)
        new_p = weights.to(dtype)
        block.new_p.copy_(new_p)
        weights = new_p.float()
    return weights


def sum_of_rows(x: Tensor, length: Tensor | None, zero: int, dtype: torch.dtype) -> Tensor:
    """Σ (x - zero) of every row, of its first ``length`` [rows, 1] elements. In int32 Σ x may wrap around."""
    if length is None:
        zeros = x.shape[1] * zero
        return x.sum(1, dtype=dtype) - (fp8.wrapped(zeros) if dtype == torch.int32 else zeros)
    inside = torch.arange(x.shape[1], dtype=torch.int32, device=x.device) < length
    return torch.where(inside, x, 0).sum(1, dtype=dtype) - length[:, 0] * zero


def global_index(index: Tensor, index_map: IndexMap, tensor_index: Tensor | None) -> Tensor:
    """The global indices of local elements of a tensor that is split along inner dimensions, int32, modulo 2^32.

    After every run of so many local elements that many elements of other ranks are jumped over: ``jumps`` [2, ...]
    int32 and the runs' ``inverses`` [2, ...] float64, 0 where there is no such run. The division is exact: the half
    keeps it from the integers by more than float64's error, for up to 2^31 elements. ``tensor_index`` says
    which row of ``index_map`` each row of elements belongs to.
    """
    if tensor_index is not None:
        index_map = IndexMap(*(x[tensor_index].T[:, :, None] for x in index_map))
    middle = index.double() + 0.5
    for inverse, jump in zip(index_map.inverses, index_map.jumps, strict=True):
        index = index + (middle * inverse).to(torch.int32) * jump
    return index


def make_columns(device: torch.device) -> Tensor:
    """The hash of every column, and MAGNITUDE, int32 [2, ROW]; loading them costs less than making them."""
    hashes = fp8.hash32(torch.arange(ROW, dtype=torch.int32, device=device))
    return torch.stack([hashes, torch.full_like(hashes, MAGNITUDE)])


FUNCTIONS = {function.__name__: function for function in (inspect, gather, norm, scale, update, fold)}
