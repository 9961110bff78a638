"""The one hand-written kernel: copying packed rows by a table of addresses. It computes nothing."""

import triton
import triton.language as tl


@triton.jit
def copy_packed_rows(
    table_p,
    table_g,
    table_m,
    table_v,
    table_r,
    p,
    g,
    m,
    v,
    r,
    length,
    EXACT: tl.constexpr,
    UNPACK: tl.constexpr,
    PACKED_ROW: tl.constexpr,
):
    """Copy one packed row of weights, gradients and codes into the buffer, or back.

    ``table_*`` [rows] int64 are the addresses of what the rows hold, ``p``, ``g``, ``m``, ``v`` and ``r``
    [rows, PACKED_ROW] the buffer, ``length`` [rows] int32 how much of a row is not padding. Gradients are not copied
    back, remainders only if EXACT.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PACKED_ROW)
    inside = column < tl.load(length + row)
    packed = row * PACKED_ROW + column
    own_p = tl.load(table_p + row).to(p.dtype) + column
    own_g = tl.load(table_g + row).to(g.dtype) + column
    own_m = tl.load(table_m + row).to(m.dtype) + column
    own_v = tl.load(table_v + row).to(v.dtype) + column
    if UNPACK:
        tl.store(own_p, tl.load(p + packed, inside), inside)
        tl.store(own_m, tl.load(m + packed, inside), inside)
        tl.store(own_v, tl.load(v + packed, inside), inside)
        if EXACT:
            tl.store(tl.load(table_r + row).to(r.dtype) + column, tl.load(r + packed, inside), inside)
    else:
        tl.store(p + packed, tl.load(own_p, inside), inside)
        tl.store(g + packed, tl.load(own_g, inside), inside)
        tl.store(m + packed, tl.load(own_m, inside), inside)
        tl.store(v + packed, tl.load(own_v, inside), inside)
        if EXACT:
            tl.store(r + packed, tl.load(tl.load(table_r + row).to(r.dtype) + column, inside), inside)
