"""What the step functions are handed: blocks of weights, gradients and moments, and tables beside them.

A *block* is 2-D: a large tensor cut into rows of :data:`ROW` elements, or *packed rows* of many tensors, of
:data:`PACKED_ROW` elements each: ``rows.py`` cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from . import fp8

ROW = fp8.COLUMNS  # of a large tensor's block
PACKED_ROW_BITS = 8
PACKED_ROW = 1 << PACKED_ROW_BITS  # elements of a packed row


class Block(NamedTuple):
    """What a call of ``inspect`` or ``update`` works on; all of a parameter that is sharded here is its shard.

    A large tensor has no ``tensor_index``, ``start`` and ``length``: its rows are full and follow each other.
    """

    p: Tensor  # [rows, columns] weights
    g: Tensor  # [rows, columns] gradients
    m: Tensor  # [rows, columns] uint8 codes, or float32 moments
    v: Tensor
    new_p: Tensor  # the same memory once more: what is written to
    new_m: Tensor
    new_v: Tensor
    tensor_index: Tensor | None = None  # [rows] int64: which row of the factor tables
    start: Tensor | None = None  # [rows, 1] int32: index of each row's first element
    length: Tensor | None = None  # [rows, 1] int32: elements of each row that count
    remainder: Tensor | None = None  # [rows, columns] int16: of bfloat16 weights that are kept exactly
    new_remainder: Tensor | None = None


def in_place(tensors: Sequence[Tensor], places: Sequence[Tensor] = ()) -> Block:
    """A block of p, g, m, v and, if there are, remainders, which writes to where it reads."""
    p, g, m, v, *remainder = tensors
    return Block(p, g, m, v, p, m, v, *(places or (None,) * 3), *remainder, *remainder)


def memory(block: Block) -> list[Tensor]:
    """Weights, gradients, moments and, if there are, remainders of a block: the *operands*, in their order."""
    found = block.p, block.g, block.m, block.v, block.remainder
    return [x for x in found if x is not None]


class IndexMap(NamedTuple):
    """From indices in a shard to global ones, where a tensor is split along inner dimensions; see ``global_index``."""

    inverses: Tensor  # [2] or [tensors, 2] float64
    jumps: Tensor  # [2] or [tensors, 2] int32


class Sums(NamedTuple):
    """What ``update`` leaves of every row, int32 [rows]; those with ``*`` int64 where rows are long (export)."""

    max_m: Tensor  # largest code of |m|; the bits of the largest |m| where moments are float32
    max_v: Tensor
    weights: Tensor  # Σ clamp(p², 0.01, 1) in units of 2^-20 *
    updates: Tensor  # Σ clamp(u², eps, 1), likewise *
    agree: Tensor | None = None  # elements whose sign is the gradient's; with caution only *
    checksum: Tensor | None = None  # Σ hash(bits of p), modulo 2^32; of bfloat16 weights that are kept exactly

    @classmethod
    def of(cls, make: Callable[[], Tensor], caution: bool, exact: bool) -> Sums:
        """Each as ``make`` returns it."""
        there = (True, True, True, True, caution, exact)
        return cls._make(make() if found else None for found in there)

    def rows(self, part: slice) -> Sums:
        """Those of some rows."""
        return Sums._make(None if x is None else x[part] for x in self)


class State(NamedTuple):
    """The scalar state of all tensors, by columns, and the state indices of those that are meant."""

    scale_m: Tensor  # float32 [states]
    scale_v: Tensor
    max_m: Tensor
    max_v: Tensor
    step: Tensor  # int32 [states]
    salt: Tensor
    weight_sum: Tensor  # int64 [states], of whole tensors
    update_sum: Tensor
    mask_count: Tensor
    checksum: Tensor  # modulo 2^32
    state_index: Tensor  # int64 [tensors]: the row of each in the columns; 0 is padding


class Stages(NamedTuple):
    """How results of rows are reduced to tensors: rows to chunks of neighbours, chunks to tensors; int64."""

    start: Tensor  # [chunks, 1]: first row
    length: Tensor  # [chunks, 1]
    columns: Tensor  # [k]: 0..k-1 for the longest chunk
    first: Tensor  # [tensors, 1]: first chunk
    chunks: Tensor  # [tensors, 1]: how many
    chunk_columns: Tensor  # [l]


class Inputs(NamedTuple):
    """What ``scale`` needs besides the state."""

    largest: Tensor  # int32 [rows]: bits of max|g|
    stages: Stages
    hyper: Tensor  # float64 [tensors, NUMBERS]
    numel: Tensor  # float64 [tensors], of whole tensors
    base: Tensor  # int32 [tensors]: index of a shard's first element
    inverse_scale: Tensor  # float64 0-d: 1 / grad_scale, times the clip factor
    found_inf: Tensor  # float32 0-d: not 0 where the step is to change nothing
    checksum: Tensor | None = None  # int32 [rows], see ``inspect``


class Gathered(NamedTuple):
    """What ``gather`` finds of whole tensors, or of shards, from the results of their rows."""

    largest: Tensor  # int32 [tensors]: bits of max|g|, 0 for a tensor that is left out
    top: Tensor  # int32 0-d: the largest finite one
    rescale: Tensor  # float32 [2]: two powers of two, whose product brings the finite gradients below 1
    checksum: Tensor | None = None  # int32 [tensors], see ``inspect``


class Norm(NamedTuple):
    """What ``norm`` is handed and finds."""

    limits: Tensor  # float64 [2]: max_grad_norm and 1 / grad_scale
    total: Tensor  # int64 [2]: sums of the squares of all tensors
    norm: Tensor  # float64 0-d
    factor: Tensor  # float64 0-d: for all gradients


class Outputs(NamedTuple):
    """What ``scale`` fills."""

    floats: list[Tensor]  # the float32 columns of the factor table, [tensors]
    integers: list[Tensor]  # the int32 columns
    report: list[Tensor]  # float64: weight norm, update norm, trust ratio
    counted: Tensor  # bool [tensors]: whether the step counts for the tensor, and ``fold`` is to write its sums
    skipped: Tensor  # int64 0-d: the count of skipped tensors goes up
