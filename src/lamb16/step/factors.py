"""Between the passes, all tensors at once: rows reduced to tensors, and the factors of the step.

:func:`scale` and :func:`fold` are the second and the fourth of the functions that ``update.py`` lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..hyper import NUMBERS
from . import fp8
from .blocks import Inputs, Outputs, Stages, State, Sums
from .floats import INF_BITS, OVERFLOW_BITS, UNIT, bits, sqrt64
from .fp8 import E4M3, E5M2

GOLDEN = 0x9E3779B9 - (1 << 32)
LAST_STEP = (1 << 31) - 1
STOPPED = -1.0  # found_inf where ranks cannot take a step together: it does not count as skipped


# -- two-stage reduction: rows to tensors ---------------------------------------------------------------------------


def chosen(x: Tensor, start: Tensor, length: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Elements start .. start + length - 1 of x per row, and which columns are among them."""
    inside = columns < length
    return x[torch.where(inside, start + columns, start)], inside


def largest_of(x: Tensor, stages: Stages) -> Tensor:
    """The largest of every tensor's rows; elements that are read twice do not matter. 0 for a tensor without rows."""
    chunks = chosen(x, stages.start, stages.length, stages.columns)[0].amax(1)
    found, inside = chosen(chunks, stages.first, stages.chunks, stages.chunk_columns)
    return torch.where(inside, found, 0).amax(1)


def sum_of(x: Tensor, stages: Stages) -> Tensor:
    """The sum over every tensor's rows, int64."""
    for start, length, columns in (
        (stages.start, stages.length, stages.columns),
        (stages.first, stages.chunks, stages.chunk_columns),
    ):
        found, inside = chosen(x, start, length, columns)
        x = torch.where(inside, found, 0).sum(1, dtype=torch.int64)
    return x


def checksum_of(rows: Tensor, stages: Stages) -> Tensor:
    """The checksum of every tensor's weights, int64."""
    return sum_of(rows, stages) & 0xFFFFFFFF


# -- all tensors at once ------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """The scalars of a step of one tensor, the columns of the factor tables: 0-d, or [rows, 1] for packed rows.

    Those before ``offset`` are in the float32 table.
    """

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
    gain: Tensor  # what an update is multiplied by where it agrees with the gradient (caution)
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


FLOATS = Factors._fields.index("offset")
INTEGERS = len(Factors._fields) - FLOATS


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
    state_index = state.state_index
    old_m, old_v, max_m, max_v = (x[state_index] for x in state[:4])
    step, weight_sum, update_sum = (x[state_index] for x in (state.step, state.weight_sum, state.update_sum))

    sign = torch.where(h["maximize"] != 0, -1.0, 1.0).double()
    grad_factor = (sign * inputs.inverse_scale).float()
    g = largest_of(inputs.largest, inputs.stages).view(torch.float32) * grad_factor.abs()
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

    count = torch.clamp(step, max=LAST_STEP - 1) + 1
    t = count.double()
    corrected, nesterov = h["bias_correction"] != 0, h["nesterov"] != 0
    c1, c2, c3 = (torch.where(corrected, 1 - x, 1.0) for x in (beta1**t, beta2**t, beta1 ** (t + 1)))
    a = torch.where(nesterov, beta1 / c3, 1 / c1)
    b = torch.where(nesterov, (1 - beta1) / c1, 0.0)
    gain = inputs.numel / torch.maximum(state.mask_count[state_index].double(), inputs.numel / 1000)

    norms = weight_sum.double() / update_sum.double()
    ratio = torch.clamp((sqrt64(norms) * h["trust_lr"] / lr.abs()) ** h["trust_scale"], max=h["trust_clip"])

    join = torch.full_like(step, -1)
    if inputs.checksum is not None:
        same = checksum_of(inputs.checksum, inputs.stages) == state.checksum[state_index]
        join = torch.where(same, join, 0)

    active = Factors(
        grad_factor=grad_factor,
        decode_m=beta1.float() * old_m,  # β is rounded before it meets the scale, so that the product is exact
        decode_v=beta2.float() * old_v,
        new_m=new_m,
        new_v=new_v,
        momentum=a.float(),
        gradient=b.float(),
        rho=(1 / sqrt64(c2)).float(),
        eps=h["eps"].float(),
        bound=inverse_bound(beta1, beta2, a, b, c2).float(),
        gain=gain.float(),
        weight_decay=h["weight_decay"].float(),
        encode_m=encode_m,
        encode_v=encode_v,
        step_size=(lr * ratio).float(),
        offset=(count * GOLDEN) ^ fp8.SIGN_BIT,
        salt=state.salt[state_index],
        base=inputs.base,
        keep=torch.full_like(step, -1),
        join=join,
    )
    # Frozen: with gradients of zero codes decode, and encode, to themselves. -0 (zero times -1) keeps a zero's sign.
    one = torch.ones_like(old_m)
    frozen = active._replace(
        decode_m=one, decode_v=one, new_m=-one, encode_m=one, encode_v=one, keep=torch.zeros_like(step)
    )
    columns = [*outputs.floats, *outputs.integers]
    for name, column, x, y in zip(Factors._fields, columns, frozen, active, strict=True):
        assert column.dtype == y.dtype, f"the factor {name} is {y.dtype}, in a table of {column.dtype}"
        column.copy_(torch.where(skip, x, y))
    roots = [sqrt64(x.double() * UNIT) for x in (weight_sum, update_sum)]
    for column, x in zip(outputs.report, (*roots, ratio), strict=True):
        column.copy_(torch.where(state_index != 0, x, column))
    outputs.counted.copy_(counted)
    outputs.skipped.add_((skip & (state_index != 0) & (inputs.found_inf != STOPPED)).sum())
    state.scale_m[state_index] = torch.where(skip, old_m, fresh_m)
    state.scale_v[state_index] = torch.where(skip, old_v, fresh_v)
    state.step[state_index] = torch.where(counted, count, step)
    # Where decay alone moves the weights, which is no step to count, or the count stays at its end, they are to be
    # rounded by other words each time.
    decays = (lr != 0) & (h["weight_decay"] != 0) & torch.logical_not(skip | counted)
    stays = counted & (count == LAST_STEP)
    state.salt[state_index] = state.salt[state_index] + (decays | stays).int()


def fold(rows: Sums, stages: Stages, counted: Tensor, first_rank: Tensor, state: State, float8: bool) -> None:
    """After :func:`update`: what the next step needs of every tensor, in the state.

    ``counted`` as :func:`scale` left it: other tensors keep what they have. Sums of shards are added up over the
    ranks later: where nothing is new, one of these (``first_rank`` 1, others 0; int64 [tensors]) has the old sum.
    """
    state_index = state.state_index
    peaks = [largest_of(x, stages) for x in rows[:2]]
    formats = (E4M3, E5M2)
    peaks = [fp8.decode(x, f) if float8 else x.view(torch.float32) for x, f in zip(peaks, formats, strict=True)]
    for column, peak in zip((state.max_m, state.max_v), peaks, strict=True):
        column[torch.where(counted, state_index, 0)] = peak
    sums = [(state.weight_sum, rows.weights), (state.update_sum, rows.updates)]
    if rows.agree is not None:
        sums.append((state.mask_count, rows.agree))
    if rows.checksum is not None:  # of the weights as they are now, whatever has become of them
        state.checksum[state_index] = checksum_of(rows.checksum, stages)
    for column, x in sums:
        column[torch.where(counted | (first_rank == 0), state_index, 0)] = torch.where(counted, sum_of(x, stages), 0)
