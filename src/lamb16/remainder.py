"""bfloat16 weights that are kept exactly: 16 bits more in the state, and the float32 weights that both are together.

A float32 weight is split into the nearest bfloat16, which is what the model sees, and a remainder, an int16 in units of
float32's last bit: the bits of the one, followed by 16 zeros, plus the other are the bits of the float32 weight. Ties
go away from 0; to even, 65,537 float32 values would go to every even bfloat16, and 16 bits tell 65,536 apart.

Whoever changes the weights (a load, an EMA copy) leaves remainders that are not theirs. The state therefore keeps a
checksum of the weights that they belong to, and a step in which it is another one begins with remainders of 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .sharding.exchange import MODULO, whole_sums
from .sharding.layout import is_sharded, like, like_param, local, placement
from .step import floats
from .wrapped import has_memory

REMAINDER, CHECKSUM = "param_remainder", "param_checksum"
CHUNK = 1 << 20  # elements that are worked on at once


def is_exact(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether a parameter of this group has remainders."""
    return param.dtype == torch.bfloat16 and group["param_rounding"] == "exact"


def has_remainder(param: Tensor, state: dict[str, Any]) -> bool:
    """Whether a state has remainders that a step can use as they are."""
    x = state.get(REMAINDER)
    if not isinstance(x, Tensor) or x.dtype != torch.int16 or placement(x) != placement(param):
        return False
    own, weights = local(x), local(param)
    fits = x.shape == param.shape and (own.shape, own.device) == (weights.shape, weights.device)
    return fits and own.is_contiguous() and not own.is_inference() and has_memory(own)


def no_remainder(param: Tensor) -> Tensor:
    """Remainders of 0, int16, contiguous and sharded as the parameter is."""
    weights = local(param)
    return like(param, torch.zeros(weights.shape, dtype=torch.int16, device=weights.device))


def as_bytes(remainder: Tensor) -> Tensor:
    """int16 [...] as uint8 [..., 2], which every collective knows; int16 neither NCCL's nor gloo's do. In place."""
    if remainder.dtype != torch.int16:
        return remainder
    return like(remainder, local(remainder).unsqueeze(-1).view(torch.uint8), 2)


def from_bytes(value: Any) -> Any:
    """int16 [...] of what :func:`as_bytes` returned; everything else as it is."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.shape[-1:] != (2,):
        return value
    found = local(value).contiguous().view(torch.int16).squeeze(-1)
    return like(value[..., 0], found) if is_sharded(value) else found


def fitted(param: Tensor, state: dict[str, Any], name: str) -> Tensor:
    """A state's remainders, where a step can use them as they are, else copies; 0 where there are none.

    Raises:
        ValueError: they do not fit the parameter.
    """
    value: Tensor | None = from_bytes(state.get(REMAINDER))
    if value is not None and has_remainder(param, state):
        return value
    check_remainder(state, param, name)
    found = no_remainder(param)
    if value is not None:
        if local(value).shape != local(param).shape:
            raise ValueError(
                f"Lamb16: {REMAINDER} of parameter {name} is not sharded over the ranks as the parameter is; load "
                "states with Lamb16.load_state_dict"
            )
        local(found).copy_(local(value))
    return found


def resized(state: dict[str, Any], index: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The remainders of ``new``: where it has the weight of ``old`` in the row that ``index`` says, that one's."""
    found, rows = no_remainder(new), index.clamp(min=0)
    if old.numel() and has_remainder(old, state) and checksums([old])[0] == int(state[CHECKSUM]):
        kept = new.view(torch.int16) == old.view(torch.int16).index_select(0, rows)
        kept &= (index >= 0).view(-1, *[1] * (new.dim() - 1))
        found.copy_(torch.where(kept, state[REMAINDER].index_select(0, rows), 0))
    return found


def check_remainder(state: dict[str, Any], param: Tensor, name: str, where: str = "") -> None:
    """Raise ValueError for remainders of another kind or shape than the parameter's; there may be none."""
    value = from_bytes(state.get(REMAINDER))
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype != torch.int16 or value.shape != param.shape:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"Lamb16{where}: {REMAINDER} of parameter {name} is {found}, expected torch.int16 {tuple(param.shape)}; "
            "without it (delete the entry) the weights go on as they are"
        )
    if not has_memory(local(value)):
        raise ValueError(
            f"Lamb16{where}: {REMAINDER} of parameter {name} has no memory (its storage was resized to 0 bytes); bring "
            "it back before step"
        )
    if is_sharded(value) and not is_sharded(param):
        raise ValueError(
            f"Lamb16{where}: {REMAINDER} of parameter {name} is sharded (a DTensor), the parameter not; gather "
            "it first (.full_tensor())"
        )


def checksums(params: Sequence[Tensor]) -> list[int]:
    """Of bfloat16 parameters, as the steps keep them; a collective for DTensors."""
    sums = []
    for p in params:
        total = torch.zeros((), dtype=torch.int64, device=p.device)
        for part in torch.split(local(p).reshape(-1), CHUNK):
            total += floats.hashes_of(part.float()).sum(dtype=torch.int64)
        sums.append(total)
    split = [k for k, p in enumerate(params) if is_sharded(p)]
    whole_sums([params[k] for k in split], [sums[k] for k in split], split)
    return [int(x) & MODULO for x in sums]


def float32_weights(params: Mapping[str, tuple[Tensor, dict[str, Any]]]) -> dict[str, Tensor]:
    """The float32 weights of parameters with their states, by name."""
    kept = {n: fitted(p, x, n) for n, (p, x) in params.items() if p.dtype == torch.bfloat16 and REMAINDER in x}
    sums = dict(zip(kept, checksums([params[name][0] for name in kept]), strict=True))
    found = {}
    for name, (p, state) in params.items():
        weights = local(p).to(torch.float32, copy=True)
        if name in kept and sums[name] == int(state[CHECKSUM]):
            parts = (torch.split(x.view(-1), CHUNK) for x in (weights, local(kept[name])))
            for part, own in zip(*parts, strict=True):
                part.copy_(floats.join(part, own.int()))
        found[name] = like(p, weights)
    return found


def check_float32_weights(weights: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless there is a float32 tensor of the right shape for every parameter, and no other."""
    where = "Lamb16.load_float32_weights:"
    for names, fault in ((params.keys() - weights.keys(), "are no"), (weights.keys() - params.keys(), "are also")):
        if names:
            raise ValueError(
                f"{where} there {fault} weights for {', '.join(sorted(names))}; give what float32_weights returned"
            )
    for name, p in params.items():
        x = weights[name]
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.shape != p.shape:
            found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{where} the weights for {name} are {found}, expected torch.float32 {tuple(p.shape)}; give what "
                "float32_weights returned"
            )
        if is_sharded(x) and not is_sharded(p):
            raise ValueError(f"{where} the weights for {name} are a DTensor, the parameter not (.full_tensor())")


def load_weights(params: Mapping[str, tuple[Tensor, dict[str, Any]]], weights: Mapping[str, Tensor]) -> None:
    """Set parameters, and the remainders in states that have some, to float32 weights."""
    kept: list[tuple[Tensor, dict[str, Any]]] = []
    for name, (p, state) in params.items():
        own, exact = local(p), like_param(p, weights[name])
        if p.dtype != torch.bfloat16 or REMAINDER not in state:
            own.copy_(exact)
            continue
        kept.append((p, state))
        exact = exact.to(own.device).reshape(-1)
        nearest, remainder = torch.empty_like(exact, dtype=own.dtype), local(state[REMAINDER]).view(-1)
        for part, top, rest in zip(*(torch.split(x, CHUNK) for x in (exact, nearest, remainder)), strict=True):
            bits, rounded = floats.split(part)
            top.copy_(rounded)
            rest.copy_(bits - rounded.view(torch.int32))
        own.copy_(nearest.view(own.shape))
    for (_, state), value in zip(kept, checksums([p for p, _ in kept]), strict=True):
        state[CHECKSUM].fill_(value)
