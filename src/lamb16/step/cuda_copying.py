"""The one hand-written kernel: copying packed rows by a table of addresses. It computes nothing."""

import triton
import triton.language as tl


@triton.jit
def copy_packed_rows(
    table,
    p,
    g,
    m,
    v,
    r,
    tensor_index,
    start,
    length,
    width,
    EXACT: tl.constexpr,
    UNPACK: tl.constexpr,
    PACKED_ROW: tl.constexpr,
):
    """Copy one packed row of weights, gradients and codes into the buffer, with zeros behind it, or back.

    ``table`` [operands, width] int64 has the tensors' addresses, 0 for what is left out; ``p``, ``g``, ``m``, ``v`` and
    ``r`` [rows, PACKED_ROW] are the buffer; ``tensor_index`` [rows] int64, ``start`` and ``length`` [rows] int32 say
    what a row holds. Gradients are not copied back, remainders only if EXACT.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PACKED_ROW)
    own = table + tl.load(tensor_index + row)
    first = tl.load(start + row)
    inside = (column < tl.load(length + row)) & (tl.load(own) != 0)
    packed = row * PACKED_ROW + column
    place = first + column
    own_p = tl.load(own).to(p.dtype) + place
    own_g = tl.load(own + width).to(g.dtype) + place
    own_m = tl.load(own + 2 * width).to(m.dtype) + place
    own_v = tl.load(own + 3 * width).to(v.dtype) + place
    if UNPACK:
        tl.store(own_p, tl.load(p + packed, inside), inside)
        tl.store(own_m, tl.load(m + packed, inside), inside)
        tl.store(own_v, tl.load(v + packed, inside), inside)
        if EXACT:
            tl.store(tl.load(own + 4 * width).to(r.dtype) + place, tl.load(r + packed, inside), inside)
    else:
        tl.store(p + packed, tl.load(own_p, inside, other=0))
        tl.store(g + packed, tl.load(own_g, inside, other=0))
        tl.store(m + packed, tl.load(own_m, inside, other=0))
        tl.store(v + packed, tl.load(own_v, inside, other=0))
        if EXACT:
            own_r = tl.load(own + 4 * width).to(r.dtype) + place
            tl.store(r + packed, tl.load(own_r, inside, other=0))
