"""DTensors that cannot be stepped, and ranks that do not agree."""

from __future__ import annotations

import math

from torch import Tensor

from ..sharding.layout import MAX_JUMPS, is_sharded, is_strided, splits


def check_layout(param: Tensor, name: str) -> None:
    """Raise ValueError for a parameter that is sharded in a way that cannot be stepped; alike on every rank."""
    if not is_sharded(param):
        return
    placements = param.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"Lamb16: parameter {name} has partial placements {placements}; redistribute it to Shard or Replicate"
        )
    unknown = [p for p in placements if not (p.is_shard() or p.is_replicate() or is_strided(p))]
    if unknown:
        raise ValueError(
            f"Lamb16: parameter {name} has the placement {unknown[0]}; redistribute it to Shard or Replicate"
        )
    split: dict[int, list[int]] = {}
    for axis, dim in splits(param):
        split.setdefault(dim, []).append(param.device_mesh.size(axis))  # type: ignore[attr-defined]
    strided = {dim for axis, dim in splits(param) if is_strided(placements[axis])}
    for dim, sizes in split.items():
        if dim in strided and param.shape[dim] % math.prod(sizes):
            raise ValueError(
                f"Lamb16: dimension {dim} of parameter {name}, {tuple(param.shape)}, is split over mesh axes of "
                f"{sizes} ranks, which do not divide it: torch loads checkpoints of such a parameter wrong. Make the "
                f"dimension a multiple of {math.prod(sizes)}, or split it over one axis"
            )
    inner = [dim for dim in split if dim > 0]
    if len(inner) > MAX_JUMPS:
        raise ValueError(
            f"Lamb16: parameter {name} is split along the dimensions {sorted(split)}; besides the first at most "
            f"{MAX_JUMPS} are supported"
        )
    largest = math.prod(-(-size // math.prod(split.get(dim, [1]))) for dim, size in enumerate(param.shape))
    if inner and largest >= 1 << 31:
        raise ValueError(
            f"Lamb16: a rank's part of parameter {name}, which is split along an inner dimension, has 2^31 elements or "
            "more; split it over more ranks, or along its first dimension"
        )


def check_gradient_kind(param: Tensor, grad: Tensor, name: str) -> None:
    """Raise RuntimeError if one of the two is a DTensor and the other is not."""
    if is_sharded(param) != is_sharded(grad):
        found = ["a DTensor" if is_sharded(x) else "a plain tensor" for x in (param, grad)]
        raise RuntimeError(
            f"Lamb16: parameter {name} is {found[0]}, but its gradient is {found[1]}; make both of one kind "
            "(torch.distributed.tensor.distribute_tensor, or .full_tensor())"
        )


def differing_steps() -> RuntimeError:
    """What is raised where ranks do not step, or ask for, the same parameters."""
    return RuntimeError(
        "Lamb16: the ranks that share parameters do not step the same ones: a gradient is None on some of them, "
        "groups, names, seeds or loaded states differ, or max_grad_norm is None on some. Give every rank a gradient "
        "(of zeros). Nothing was changed."
    )


def refused_elsewhere(where: str) -> ValueError:
    """What a rank raises where another one has found an error in what all were to do."""
    return ValueError(f"Lamb16.{where}: another rank found its part at fault, see its error. Nothing was changed.")


def step_refused_elsewhere() -> RuntimeError:
    """What a rank raises where another one cannot take the step."""
    return RuntimeError("Lamb16: another rank could not take this step, see its error. Nothing was changed.")
