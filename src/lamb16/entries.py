"""The entries of a state: their names, and what they are at first, in older states and of resized parameters."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .codes import REMAINDER
from .moments import MOMENTS, are_codes, dtypes, raw
from .remainder import CHECKSUM, checksums, float32_weights, no_remainder
from .remainder import resized as resized_remainder
from .sharding.layout import like, local
from .step import floats, fp8, native
from .step.fp8 import E4M3, E5M2

if TYPE_CHECKING:
    from .store import Store

TABLES: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: ("exp_avg_scale", "exp_avg_sq_scale", "exp_avg_max", "exp_avg_sq_max"),
    torch.int32: ("step", "salt"),
    torch.int64: ("weight_sum", "update_sum", "mask_count", "param_checksum"),
}
SCALARS = tuple(name for names in TABLES.values() for name in names)
ENTRIES = (*MOMENTS, *SCALARS)
MAXIMA = ("exp_avg_max", "exp_avg_sq_max")
# What version 0.1 did not have, and what follows from codes, weights and size: see complete.
DERIVED = (*MAXIMA, "weight_sum", "update_sum", "mask_count", "param_checksum")
COMPLETE = set(DERIVED)
# What versions before 0.2 called the entries, as torch's Adam calls its moments, which these are not.
OLD_NAMES = {
    "exp_avg": "exp_avg_codes",
    "exp_avg_sq": "exp_avg_sq_codes",
    "exp_avg_norm": "exp_avg_scale",
    "exp_avg_sq_norm": "exp_avg_sq_scale",
}
ALL_ENTRIES, WIDTH = itemgetter(*ENTRIES), len(ENTRIES)
CHUNK = 1 << 13  # elements that are read at once where something is derived, at least


def init_state(
    param: Tensor, salt: int, float8: bool, moments: Sequence[Tensor] | None = None, exact: bool = False
) -> dict[str, Any]:
    """The state of a parameter before its first step; codes and moments are contiguous and sharded as it is.

    ``moments`` are used as they are in place of new zeros. The sum of the weights is that of this rank's part.
    """
    scales = (E4M3.smallest_scale(), E5M2.smallest_scale()) if float8 else (1.0, 1.0)
    device, shape = param.device, local(param).shape
    if moments is None:
        moments = [like(param, torch.zeros(shape, dtype=dtype, device=device)) for dtype in dtypes(float8)]
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.int32, device=device),
        "exp_avg_codes": moments[0],
        "exp_avg_scale": torch.tensor(scales[0], dtype=torch.float32, device=device),
        "exp_avg_sq_codes": moments[1],
        "exp_avg_sq_scale": torch.tensor(scales[1], dtype=torch.float32, device=device),
        "salt": torch.tensor(fp8.wrapped(salt), dtype=torch.int32, device=device),
        "exp_avg_max": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg_sq_max": torch.zeros((), dtype=torch.float32, device=device),
    }
    if exact:
        state[REMAINDER] = no_remainder(param)
    complete(param, state)
    return state


def renamed(state: Any) -> Any:
    """A state by today's names; one that another optimizer made is left as it is."""
    if not isinstance(state, dict) or "exp_avg_norm" not in state:
        return state
    return {OLD_NAMES.get(key, key): value for key, value in state.items()}


def complete(param: Tensor, state: dict[str, Any]) -> bool:
    """Add the entries that a state of version 0.1 has not; returns whether the sum of the weights was added."""
    numel, device = param.numel(), param.device
    if state.keys() >= COMPLETE:
        return False
    if not set(MAXIMA) <= set(state):
        find_largest(state)
    for name, value in (("update_sum", numel << 20), ("mask_count", numel), ("param_checksum", 0)):
        if name not in state:
            state[name] = torch.tensor(value, dtype=torch.int64, device=device)
    if "weight_sum" in state:
        return False
    state["weight_sum"] = weight_sum(local(param))
    return True


def resized(state: dict[str, Any], index: Tensor, old: Tensor, new: Tensor) -> dict[str, Any]:
    """The state of ``old`` for ``new``, whose rows come from the rows ``index``; those below 0 are new, with moments 0.

    Step, salt and scales stay; the largest codes and the weights' sum are found anew; the last update's sum and count
    become those of as many elements like the old ones on average.
    """
    rows, fresh = index.clamp(min=0), index < 0
    moments = []
    for name in MOMENTS:
        codes = state[name]
        if old.shape[0]:
            cut = raw(codes).index_select(0, rows)
            cut[fresh] = 0
        else:
            cut = raw(codes).new_zeros(new.shape)
        moments.append(cut.view(codes.dtype))
    found = init_state(new, int(state["salt"]) & 0xFFFFFFFF, are_codes(moments[0]), moments)
    for name in ("step", "exp_avg_scale", "exp_avg_sq_scale"):
        found[name].fill_(float(state[name]) if name != "step" else int(state[name]))
    if old.numel():
        for name in ("update_sum", "mask_count"):
            found[name].fill_(int(state[name]) * new.numel() // old.numel())
    find_largest(found)
    if REMAINDER in state:
        found[REMAINDER] = resized_remainder(state, index, old, new)
        found[CHECKSUM].fill_(checksums([new])[0])
        found["weight_sum"].copy_(weight_sum(float32_weights({"": (new, found)})[""]))
    return found


def find_largest(*states: dict[str, Any], store: Store | None = None) -> None:
    """Set the maxima to those of the codes (or float32 moments) that the states hold, of this rank's part.

    What lies in the tables of ``store`` stays there, so that they need not be made anew.
    """
    for name, maximum, fmt in zip(MOMENTS, MAXIMA, (E4M3, E5M2), strict=True):
        for coded in {are_codes(state[name]) for state in states}:
            own = [state for state in states if are_codes(state[name]) == coded]
            moments = local_tensors([state[name] for state in own])
            tops = _largest_codes(moments, fmt) if coded else torch.stack(list(map(_largest, moments)))
            if store is None or not store.put(maximum, own, tops):
                for state, top in zip(own, tops.unbind(0), strict=True):
                    state[maximum] = top


def _largest(moment: Tensor) -> Tensor:
    if not moment.numel():
        return torch.zeros((), dtype=torch.float32, device=moment.device)
    least, most = torch.aminmax(moment)
    return torch.maximum(least.abs(), most.abs())


def _largest_codes(codes: list[Tensor], fmt: fp8.Format) -> Tensor:
    """The largest magnitudes, float32. As unsigned bytes negative codes are above the others, as signed ones below."""
    top = native.largest(codes)
    if top is None:
        found = []
        for dtype in (torch.uint8, torch.int8):
            nothing = torch.zeros((), dtype=dtype, device=codes[0].device)
            found.append(torch.stack([x.view(dtype).max() if x.numel() else nothing.to(x.device) for x in codes]))
        top = torch.maximum(found[0] & 0x7F, found[1].clamp(min=0).view(torch.uint8))
    return fp8.decode(top, fmt)


def weight_sum(weights: Tensor) -> Tensor:
    """Σ clamp(p², 0.01, 1) in units of 2^-20, 0-d int64."""
    total = torch.zeros((), dtype=torch.int64, device=weights.device)
    for chunk in chunks(weights.detach().reshape(-1)):
        chunk = chunk.float()
        counted = floats.units(chunk * chunk, floats.WEIGHT_FLOOR_BITS) - floats.EIGHT_BITS
        total += counted.sum(dtype=torch.int64)
    return total


def bit_sum(weights: Tensor) -> Tensor:
    """The sum of the float32 weights' bits, 0-d int64, by which tensors are told apart; those of shards add up."""
    total = torch.zeros((), dtype=torch.int64, device=weights.device)
    for chunk in chunks(weights.detach().reshape(-1), CHUNK // 4):  # what it is widened to is twice as large
        total += chunk.float().view(torch.int32).sum(dtype=torch.int64)
    return total


def chunks(flat: Tensor, least: int = CHUNK) -> tuple[Tensor, ...]:
    """A flat tensor in at most 2,048 chunks, so that what is made of one is small beside it."""
    return torch.split(flat, max(least, flat.numel() >> 11))


def local_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's parts, to be looked at: no views are made of plain ones."""
    if set(map(type, tensors)) <= {Tensor}:
        return tensors
    found = [getattr(x, "_local_tensor", x) for x in tensors]
    return [x if type(x) is Tensor else local(x) for x in found]
