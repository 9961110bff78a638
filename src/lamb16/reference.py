"""The slow reference: one tensor, one plain function, no tricks. Start reading here.

Everything the optimizer does to a tensor in a step is in :func:`step`. The fast implementations (eager,
compiled) are tested against it bit for bit, so it shares no arithmetic with them: the fp8 grids are tables,
rounding looks up the two neighbours in a table, the hash is done in 64-bit integers.

All arithmetic is IEEE float32, one rounding an operation, except where a line says float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: the step of the rounding words from one optimizer step to the next
E4M3_MAX, E5M2_MAX = 448.0, 57344.0
MIN_SCALE_M, MIN_SCALE_V = 2.0**-117, 2.0**-110  # smallest scales: every decoded moment is a normal float32
WEIGHT_FLOOR = 0.01  # a weight counts in its tensor's norm with a square of at least this: biases start at 0
OVERFLOW_V = 2.0**127  # a second moment from here on cannot be rounded up safely: the step is skipped


@dataclass(frozen=True)
class Hyper:
    """The hyperparameters of one tensor, as in :class:`lamb16.Lamb16`."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    trust_scale: float = 0.382
    trust_lr: float = 1e-3
    trust_clip: float = 2.0
    bias_correction: bool = True
    maximize: bool = False
    moment_dtype: str = "float8"


@dataclass(frozen=True)
class State:
    """What is carried from step to step: codes (uint8; float32 moments for ``moment_dtype="float32"``) and scalars."""

    exp_avg: Tensor
    exp_avg_norm: float
    exp_avg_sq: Tensor
    exp_avg_sq_norm: float
    step: int
    salt: int


@dataclass(frozen=True)
class Stats:
    """The norms of one step, and whether the tensor was skipped: a non-finite gradient or moment."""

    weight_norm: float
    update_norm: float
    trust_ratio: float
    skipped: bool


def init(param: Tensor, salt: int, moment_dtype: str = "float8") -> State:
    """The state before the first step."""
    if moment_dtype == "float32":
        zeros = torch.zeros(param.shape)
        return State(zeros, 1.0, zeros.clone(), 1.0, 0, salt)
    codes = torch.zeros(param.shape, dtype=torch.uint8)
    return State(codes, MIN_SCALE_M, codes.clone(), MIN_SCALE_V, 0, salt)


def step(p: Tensor, grad: Tensor, state: State, h: Hyper) -> tuple[Tensor, State, Stats]:
    """One step for one tensor; returns the new weights, the new state and the norms. Nothing is changed in place.

    ``p`` and ``grad`` have the same shape and are float32, bfloat16 or float16.
    """
    beta1, beta2 = h.betas
    weights = p.float()
    g = -grad.float() if h.maximize else grad.float()
    fp8 = h.moment_dtype == "float8"

    # The moments, in float32. Scales are powers of two, so multiplying by one is exact.
    old_m = decode(state.exp_avg, torch.float8_e4m3fn) * state.exp_avg_norm if fp8 else state.exp_avg
    old_v = decode(state.exp_avg_sq, torch.float8_e5m2) * state.exp_avg_sq_norm if fp8 else state.exp_avg_sq
    m = f32(beta1) * old_m + f32(1 - beta1) * g
    v = f32(beta2) * old_v + f32(1 - beta2) * (g * g)
    max_m, max_v = largest(m.abs()), largest(v)
    if not (torch.isfinite(g).all() and math.isfinite(max_m) and max_v < OVERFLOW_V):  # a NaN compares as false
        return p.clone(), state, Stats(math.nan, math.nan, math.nan, skipped=True)
    t = state.step + 1

    # The update. Bias correction divides m by c1 and v by c2; c1 is then taken out of the fraction.
    c1, c2 = (1 - beta1**t, 1 - beta2**t) if h.bias_correction else (1.0, 1.0)
    rho = c1 / math.sqrt(c2)
    denominator = f32(rho) * ieee_sqrt(v) + f32(h.eps * c1)
    denominator = torch.maximum(denominator, f32(rho * inverse_bound(beta1, beta2)) * m.abs())
    u = m / denominator + f32(h.weight_decay) * weights

    # The trust ratio, in float64.
    weight_norm = math.sqrt(clamped_sum(weights, WEIGHT_FLOOR))
    update_norm = math.sqrt(clamped_sum(u, h.eps))
    ratio = trust_ratio(weight_norm, update_norm, h)
    new_p = (weights - f32(h.lr * ratio) * u).to(p.dtype)
    stats = Stats(weight_norm, update_norm, ratio, skipped=False)

    # What is carried to the next step. A step that leaves all moments zero does not count.
    counted = t if max_m > 0 or max_v > 0 else state.step
    if not fp8:
        return new_p, replace(state, exp_avg=m, exp_avg_sq=v, step=counted), stats
    scale_m = power_of_two_scale(max_m, E4M3_MAX, MIN_SCALE_M)
    scale_v = power_of_two_scale(max_v, E5M2_MAX, MIN_SCALE_V)
    words = rounding_words(m.numel(), state.salt, t).view(m.shape)
    codes_m = round_stochastically(m / scale_m, words >> 12, 20, torch.float8_e4m3fn)
    codes_v = round_stochastically(v / scale_v, words >> 11, 21, torch.float8_e5m2)
    codes_v = torch.where(v > 0, codes_v.clamp(min=1), codes_v)  # never 0 where v > 0: 1/sqrt(0) ruins the layer
    return new_p, State(codes_m, scale_m, codes_v, scale_v, counted, state.salt), stats


def f32(x: float) -> float:
    """A Python float rounded to float32, as every scalar factor is before it meets a tensor."""
    return float(torch.tensor(x, dtype=torch.float32))


def ieee_sqrt(x: Tensor) -> Tensor:
    """The correctly rounded float32 square root; ``torch.sqrt`` on the CPU is off by an ulp in 0.7 % of cases."""
    return x.double().sqrt().float()


def largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def inverse_bound(beta1: float, beta2: float) -> float:
    """1/C, where |m| <= C·sqrt(v) holds for any gradients (Cauchy–Schwarz); 0, no bound, where beta1² >= beta2."""
    if beta1 * beta1 >= beta2:
        return 0.0
    return math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2)) / (1 - beta1)


def clamped_sum(x: Tensor, floor: float) -> float:
    """Σ clamp(x², floor, 1): squares in float32, the sum in float64 so that its order does not matter."""
    return float((x * x).clamp(f32(floor), 1.0).double().sum())


def trust_ratio(weight_norm: float, update_norm: float, h: Hyper) -> float:
    """clamp((w/u · trust_lr/lr)^trust_scale, 0, trust_clip), in float64."""
    if update_norm == 0:  # an empty tensor
        return h.trust_clip
    base = weight_norm / update_norm * h.trust_lr / abs(h.lr) if h.lr else math.inf
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


def rounding_words(numel: int, salt: int, t: int) -> Tensor:
    """The 32-bit random word of every element in step ``t``, int64: hash(index + salt) + t · GOLDEN mod 2^32."""
    index = torch.arange(numel, dtype=torch.int64)
    return (hash32((index + salt) & 0xFFFFFFFF) + t * GOLDEN) & 0xFFFFFFFF


def grid(dtype: torch.dtype) -> Tensor:
    """The finite non-negative values of an fp8 format in increasing order, float64; the position is the code."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).double()
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
