"""The slow reference: one tensor, one plain function, no tricks. Start reading here.

Everything the optimizer does to a tensor in a step is in :func:`step`. The fast implementations (eager,
compiled) are tested against it bit for bit, so it shares no arithmetic with them: the fp8 grids are tables,
rounding looks up the two neighbours in a table, the hash is done in 64-bit integers.

All arithmetic is IEEE float32, one rounding an operation, except where a line says float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .hyper import Hyper

GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: the step of the rounding words from one optimizer step to the next
MIXER = 0x9E3779B1  # an odd number near it, which mixes a row's and a column's hash
COLUMNS = 1024  # elements of a row, as rounding words count
E4M3_MAX, E5M2_MAX = 448.0, 57344.0
MIN_SCALE_M, MIN_SCALE_V = 2.0**-117, 2.0**-110  # smallest scales: every decoded moment is a normal float32
WEIGHT_FLOOR = 0.01  # a weight counts in its tensor's norm with a square of at least this: biases start at 0
SUM_UNITS = 2**20  # of the norms' sums: squares of at most 1 are rounded to multiples of 2^-20
LAST_STEP = 2**31 - 1  # at which the count of steps stays
OVERFLOW_V = 2.0**127  # a second moment from here on cannot be rounded up safely: the step is skipped


@dataclass(frozen=True)
class State:
    """What is carried from step to step: codes (uint8; float32 moments for ``moment_dtype="float32"``) and scalars.

    The two sums are integers in units of 2^-20, see :func:`clamped_sum`.
    """

    exp_avg_codes: Tensor
    exp_avg_scale: float
    exp_avg_max: float  # the largest magnitude in exp_avg_codes: what its codes decode to, without the scale, or more
    exp_avg_sq_codes: Tensor
    exp_avg_sq_scale: float
    exp_avg_sq_max: float
    weight_sum: int  # of the weights as the last step that counted left them
    update_sum: int  # of the last step's update
    mask_count: int  # elements of that update whose sign was the gradient's; counted with ``caution`` only
    step: int
    salt: int
    param_checksum: int = 0  # of the weights that param_remainder belongs to
    param_remainder: Tensor | None = None  # int16; with ``param_rounding="exact"`` for bfloat16 weights only


@dataclass(frozen=True)
class Stats:
    """The norms that a step's trust ratio came from, and whether the tensor was skipped.

    ``weight_norm`` is of the weights before the step, ``update_norm`` of the step before (√numel before the first).
    """

    weight_norm: float
    update_norm: float
    trust_ratio: float
    skipped: bool


def init(param: Tensor, salt: int, moment_dtype: str = "float8", param_rounding: str = "stochastic") -> State:
    """The state before the first step. An update is taken to be ±1 everywhere, as Adam's first one is."""
    fp8, n = moment_dtype == "float8", param.numel()
    moments = [torch.zeros(param.shape, dtype=torch.uint8 if fp8 else torch.float32) for _ in range(2)]
    scales = (MIN_SCALE_M, MIN_SCALE_V) if fp8 else (1.0, 1.0)
    weight_sum = clamped_sum(param.float(), WEIGHT_FLOOR)
    exact = param.dtype == torch.bfloat16 and param_rounding == "exact"
    remainder = torch.zeros(param.shape, dtype=torch.int16) if exact else None
    return State(moments[0], scales[0], 0.0, moments[1], scales[1], 0.0, weight_sum, n << 20, n, 0, salt, 0, remainder)


def step(p: Tensor, grad: Tensor, state: State, h: Hyper, grad_factor: float = 1.0) -> tuple[Tensor, State, Stats]:
    """One step for one tensor; returns the new weights, the new state and the norms. Nothing is changed in place.

    ``p`` and ``grad`` have the same shape and are float32, bfloat16 or float16. The gradient is multiplied by
    ``grad_factor``: :func:`clip_factor`, and the inverse of a gradient scaler's scale.
    """
    beta1, beta2 = h.betas
    weights = p.float()
    if state.param_remainder is not None:  # exact: weights and remainders together are the float32 weights
        remainder = state.param_remainder
        if state.param_checksum != checksum(p):  # somebody else has changed the weights, which count as they are
            remainder = torch.zeros_like(remainder)
            state = replace(state, param_remainder=remainder, param_checksum=checksum(p))
        weights = joined(p, remainder)
    g = f32(-grad_factor if h.maximize else grad_factor) * grad.float()
    fp8 = h.moment_dtype == "float8"

    # The largest magnitudes that m and v can have, before they are formed; float32 rounding is monotone.
    largest_g = largest(g.abs())
    max_m, max_v = state.exp_avg_max, state.exp_avg_sq_max
    if fp8:
        max_m, max_v = f32(max_m * state.exp_avg_scale), f32(max_v * state.exp_avg_sq_scale)
    bound_m = f32(f32(f32(beta1) * max_m) + f32(f32(1 - beta1) * largest_g))
    bound_v = f32(f32(f32(beta2) * max_v) + f32(f32(1 - beta2) * f32(largest_g * largest_g)))
    if not (math.isfinite(largest_g) and math.isfinite(bound_m) and bound_v < OVERFLOW_V):  # a NaN compares as false
        return p.clone(), state, Stats(math.nan, math.nan, math.nan, skipped=True)
    t = min(state.step + 1, LAST_STEP)

    # The moments, in float32. Scales are powers of two, so multiplying by one is exact.
    old_m = decode(state.exp_avg_codes, torch.float8_e4m3fn) * state.exp_avg_scale if fp8 else state.exp_avg_codes
    old_v = (
        decode(state.exp_avg_sq_codes, torch.float8_e5m2) * state.exp_avg_sq_scale if fp8 else state.exp_avg_sq_codes
    )
    m = f32(beta1) * old_m + f32(1 - beta1) * g
    v = f32(beta2) * old_v + f32(1 - beta2) * (g * g)

    # The update: n = a·m + b·g, the momentum as it will be at the next step, had that one the same gradient.
    c1, c2, c3 = (1 - beta1**t, 1 - beta2**t, 1 - beta1 ** (t + 1)) if h.bias_correction else (1.0, 1.0, 1.0)
    a, b = (beta1 / c3, (1 - beta1) / c1) if h.nesterov else (1 / c1, 0.0)
    n = f32(a) * m + f32(b) * g
    denominator = f32(1 / math.sqrt(c2)) * ieee_sqrt(v) + f32(h.eps)
    denominator = torch.maximum(denominator, f32(inverse_bound(beta1, beta2, a, b, c2)) * n.abs())
    d = n / denominator
    mask_count = state.mask_count
    if h.caution:  # only where the update and the gradient agree, and more of that
        agrees = torch.sign(n) * torch.sign(g) > 0
        d = torch.where(agrees, d * f32(p.numel() / max(mask_count, p.numel() / 1000, 1e-3)), 0.0)
        mask_count = int(agrees.sum())
    u = d + f32(h.weight_decay) * weights

    # The trust ratio comes from norms that are known before the step.
    ratio = trust_ratio(state.weight_sum, state.update_sum, h)
    exact_p = weights - f32(h.lr * ratio) * u
    words = rounding_words(p.numel(), state.salt, t).view(p.shape)
    if state.param_remainder is not None:
        new_p, remainder = split(exact_p)
        state = replace(state, param_remainder=remainder, param_checksum=checksum(new_p))
    elif p.dtype != torch.float32 and h.param_rounding == "stochastic":
        new_p = round_weights(exact_p, words, p.dtype)
        exact_p = new_p.float()
    else:
        new_p = exact_p.to(p.dtype)
        exact_p = new_p.float()
    weight_norm, update_norm = (math.sqrt(x / SUM_UNITS) for x in (state.weight_sum, state.update_sum))
    stats = Stats(weight_norm, update_norm, ratio, skipped=False)

    # What is carried to the next step.
    if fp8:
        scale_m = power_of_two_scale(bound_m, E4M3_MAX, MIN_SCALE_M)
        scale_v = power_of_two_scale(bound_v, E5M2_MAX, MIN_SCALE_V)
        codes_m = round_stochastically(m / scale_m, words >> 12, 20, torch.float8_e4m3fn)
        codes_v = round_stochastically(v / scale_v, words >> 11, 21, torch.float8_e5m2)
        codes_v = torch.where(v > 0, codes_v.clamp(min=1), codes_v)  # never 0 where v > 0: 1/sqrt(0) ruins the layer
        state = replace(
            state, exp_avg_codes=codes_m, exp_avg_scale=scale_m, exp_avg_sq_codes=codes_v, exp_avg_sq_scale=scale_v
        )
        m, v = decode(codes_m, torch.float8_e4m3fn), decode(codes_v, torch.float8_e5m2)
    else:
        state = replace(state, exp_avg_codes=m, exp_avg_sq_codes=v)
    if bound_m == 0 and bound_v == 0:  # all moments are 0 and stay so: no step to count
        if h.lr != 0 and h.weight_decay != 0:  # but the weights are rounded, the next time by other words
            state = replace(state, salt=(state.salt + 1) & 0xFFFFFFFF)
        return new_p, state, stats
    if t == LAST_STEP:  # which stays, so that the words of the next step would be those of this one
        state = replace(state, salt=(state.salt + 1) & 0xFFFFFFFF)
    return (
        new_p,
        replace(
            state,
            exp_avg_max=largest(m.abs()),
            exp_avg_sq_max=largest(v),
            weight_sum=clamped_sum(exact_p, WEIGHT_FLOOR),
            update_sum=clamped_sum(u, h.eps),
            mask_count=mask_count,
            step=t,
        ),
        stats,
    )


def grad_norm(grads: Sequence[Tensor]) -> float:
    """The norm over the gradients of all tensors that hold neither inf nor NaN.

    Each gradient is divided by the power of two above the largest, and its square rounded to a multiple of 2^-40 (half
    to even), so that the sum is one of integers, in which no order shows. What is a millionth of the largest counts
    for nothing.
    """
    finite = [g.float() for g in grads if torch.isfinite(g).all()]
    top = max((largest(g.abs()) for g in finite), default=0.0)
    if top == 0:
        return 0.0
    exponent = max(math.frexp(top)[1], -125)  # top < 2^exponent; float32 subnormals count as 2^-126
    total = 0
    for part in (part for g in finite for part in torch.split(g.reshape(-1), 1 << 20)):  # int64 holds the sum of one
        x = (part.double() * 2.0**-exponent).float()
        total += int(torch.round((x * x).double() * 2**40).long().sum())
    # In two parts, of which both are exact in float64.
    return math.sqrt(((total >> 20) + (total & 0xFFFFF) * 2.0**-20) * 2.0**-20) * 2.0**exponent


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by, as ``torch.nn.utils.clip_grad_norm_`` does."""
    return min(1.0, max_norm / (norm + 1e-6))


def f32(x: float) -> float:
    """A Python float rounded to float32, as every scalar factor is before it meets a tensor."""
    return float(torch.tensor(x, dtype=torch.float32))


def ieee_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 square root; ``torch.sqrt`` on the CPU is off by an ulp in 0.7 % of cases."""
    return x.double().sqrt().float()


def largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def inverse_bound(beta1: float, beta2: float, a: float, b: float, c2: float) -> float:
    """1/C, where |n| <= C·sqrt(v / c2) holds for any gradients; 0, no bound, where beta1² >= beta2.

    n = a·m + b·g sees the gradient of k steps ago with the weight a·(1−β1)·β1^k, and the last one with b more;
    Cauchy–Schwarz over these, against the weights (1−β2)·β2^k / c2 of their squares in v / c2.
    """
    if beta1 * beta1 >= beta2:
        return 0.0
    q = beta1 * beta1 / beta2
    first = a + b / (1 - beta1)
    return math.sqrt((1 - beta2) / c2) / ((1 - beta1) * math.sqrt(first * first + a * a * (q / (1 - q))))


def clamped_sum(x: Tensor, floor: float) -> int:
    """Σ clamp(x², floor, 1) in units of 2^-20: each square is rounded to an integer, half to even; a NaN counts as 1.

    A sum of integers does not depend on the order of its terms.
    """
    squares = torch.nan_to_num(x * x, nan=1.0).clamp(f32(floor), 1.0)
    return int(torch.round(squares.double() * SUM_UNITS).long().sum())


def trust_ratio(weight_sum: int, update_sum: int, h: Hyper) -> float:
    """min((sqrt(w/u) · trust_lr/lr)^trust_scale, trust_clip), in float64; u = 0 or lr = 0 gives what infinity gives.

    An update is all but 0, and its sum 0, where eps is below 2^-21 and every element below 2^-11.
    """
    base = math.sqrt(weight_sum / update_sum) * h.trust_lr / abs(h.lr) if h.lr and update_sum else math.inf
    try:
        return min(float(base**h.trust_scale), h.trust_clip)
    except OverflowError:  # Python's, where IEEE arithmetic gives infinity
        return h.trust_clip


def power_of_two_scale(largest_value: float, format_max: float, smallest: float) -> float:
    """The smallest power of two s with largest_value / s <= format_max, but no less than ``smallest``."""
    if largest_value == 0:
        return smallest
    fraction, exponent = math.frexp(largest_value / format_max)  # fraction in [0.5, 1)
    return max(2.0 ** (exponent - 1 if fraction == 0.5 else exponent), smallest)


def hash32(x: Tensor) -> Tensor:
    """Two multiply-xorshift rounds on 32-bit values held in int64; the constants come from a search (algorithm.md)."""
    mask = 0xFFFFFFFF
    x = x ^ (x >> 13)
    x = (x * 0x8A3B8E57) & mask
    x = x ^ (x >> 14)
    return (x * 0xA2C9DAED) & mask


def rounding_words(numel: int, salt: int, t: int, first: int = 0) -> Tensor:
    """The 32-bit random words in step ``t`` of ``numel`` elements from the one with index ``first`` on, int64.

    (hash(index mod 1024) xor hash(index div 1024 + salt)) · MIXER + t · GOLDEN mod 2^32, so that whoever walks along a
    row needs one multiplication. The sum of the two hashes would need none, but leave its structure in the errors.
    """
    index = torch.arange(first, first + numel, dtype=torch.int64) & 0xFFFFFFFF
    row = hash32((index // COLUMNS + salt) & 0xFFFFFFFF)
    return ((hash32(index % COLUMNS) ^ row) * MIXER + t * GOLDEN) & 0xFFFFFFFF


def grid(dtype: torch.dtype) -> Tensor:
    """The finite non-negative values of a float format in increasing order, float64; the position is the code."""
    codes = torch.arange(1 << (8 * dtype.itemsize - 1))
    values = codes.to(torch.uint8 if dtype.itemsize == 1 else torch.int16).view(dtype).double()
    return values[torch.isfinite(values)]


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 values of uint8 codes."""
    return codes.view(dtype).float()


def round_stochastically(x: Tensor, words: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Round x to one of its two neighbours on the fp8 grid, up where fraction + word carries into 1.

    ``words`` are integers of ``bits`` bits, uniform over [0, 2^bits), so "up" has probability
    (x - low) / (high - low). In the format's subnormal range the fraction itself has more than ``bits`` bits
    and is first rounded to them. Returns uint8 codes with x's sign.
    """
    values = grid(dtype)
    magnitude = x.abs().double()
    low = (torch.searchsorted(values, magnitude, right=True) - 1).clamp(max=len(values) - 2)
    fraction = (magnitude - values[low]) / (values[low + 1] - values[low])
    units = torch.round(fraction * 2**bits).long()  # half to even, as a float32 addition rounds
    code = low + ((units + (words & (2**bits - 1))) >> bits)
    signed: Tensor = code + 128 * torch.signbit(x)
    return signed.to(torch.uint8)


def round_weights(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 x rounded stochastically to bfloat16 or float16, by as many of the words' low bits as x has more.

    The moments are rounded by the words' top 20 and 21 bits: by all that counts of these, others. What is beyond the
    largest value lies between that and infinity as if the grid went on.
    """
    values = grid(dtype)
    values = torch.cat([values, 2 * values[-1:] - values[-2:-1]])  # the position of infinity
    bits = 16 if dtype == torch.bfloat16 else 13
    magnitude = x.abs().double().nan_to_num(0.0, posinf=float(values[-1])).clamp(max=float(values[-1]))
    low = (torch.searchsorted(values, magnitude, right=True) - 1).clamp(max=len(values) - 2)
    fraction = (magnitude - values[low]) / (values[low + 1] - values[low])
    units = torch.round(fraction * 2**bits).long()
    code = low + ((units + (words & (2**bits - 1))) >> bits)
    rounded = code.to(torch.int16).view(dtype)
    return torch.where(x.isnan(), x.to(dtype), torch.where(torch.signbit(x), -rounded, rounded))


def joined(p: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights whose bits are those of bfloat16 weights, followed by 16 zeros, plus the remainder.

    0 has no negative remainder: one that another weight has left would make it a NaN.
    """
    remainder = torch.where(p == 0, remainder.clamp(min=0), remainder)
    return (p.float().view(torch.int32) + remainder.int()).view(torch.float32)


def split(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 weights, and the remainders (int16) with which they are :func:`joined`.

    Ties go away from 0. To even, 65,537 float32 values would go to each even bfloat16, and 16 bits tell 65,536 apart.
    """
    bits = torch.where(weights.isnan(), torch.nan, weights).view(torch.int32).long()
    top = (bits + 0x8000) >> 16  # of the bits with their sign, the magnitude's below it
    return top.to(torch.int16).view(torch.bfloat16), (bits - (top << 16)).to(torch.int16)


def checksum(p: Tensor) -> int:
    """Of bfloat16 weights: the sum modulo 2^32 of the hashes of their bits as float32. Their order does not matter."""
    return int(hash32(p.float().view(torch.int32).long() & 0xFFFFFFFF).sum()) & 0xFFFFFFFF
