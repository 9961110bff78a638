"""Where the shards of parameters on a mesh (DTensor) lie: which elements a rank holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..wrapped import PLAIN, plain

MAX_JUMPS = 2  # dimensions beyond the first along which a tensor may be split


def sharded_types() -> tuple[type, ...]:
    """DTensor. Does not import torch.distributed.tensor: where nobody did, nothing is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)


def is_sharded(tensor: Any) -> bool:
    """Whether this is a DTensor."""
    return type(tensor) not in PLAIN and isinstance(tensor, sharded_types())


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain tensor without a copy; of one that is no DTensor all."""
    if not is_sharded(tensor):
        return plain(tensor)
    with torch.no_grad():
        return plain(tensor.to_local())  # type: ignore[attr-defined]


def placement(tensor: Tensor) -> Any:
    """The mesh and the placements of a DTensor; None of a plain tensor."""
    return (tensor.device_mesh, tensor.placements) if is_sharded(tensor) else None  # type: ignore[attr-defined]


@torch.no_grad()
def like(param: Tensor, shard: Tensor, *trailing: int) -> Tensor:
    """``shard``, this rank's part, as a tensor sharded like ``param``; itself where that is a plain tensor.

    It has ``param``'s dimensions, and ``trailing`` ones after these.
    """
    if not is_sharded(param):
        return shard
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*param.shape, *trailing))
    strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=strides)


def like_param(param: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``, which is whole (the same on every rank) or sharded in any way, as of ``param``.

    A collective where the two are sharded differently. ``tensor`` has ``param``'s dimensions, and maybe more after
    these; fp8 and int16 must come as uint8.
    """
    if not is_sharded(param):
        return plain(tensor)
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if is_sharded(tensor):
        if placement(tensor) != placement(param):
            tensor = tensor.redistribute(mesh, placements)  # type: ignore[attr-defined]
        return local(tensor)
    return plain(tensor)[_slices(param)]


def local_gradient(param: Tensor, grad: Tensor, name: str) -> Tensor:
    """This rank's part of the gradient of ``param``, a plain tensor; partial sums are reduced first.

    Raises:
        RuntimeError: one of the two is a DTensor and the other is not.
    """
    if is_sharded(param) != is_sharded(grad):
        found = ["a DTensor" if is_sharded(x) else "a plain tensor" for x in (param, grad)]
        raise RuntimeError(
            f"Lamb16: parameter {name} is {found[0]}, but its gradient is {found[1]}; make both of one kind "
            "(torch.distributed.tensor.distribute_tensor, or .full_tensor())"
        )
    return like_param(param, grad)


def sharding_of(param: Tensor) -> Any:
    """What to compare to see whether two tensors are sharded alike."""
    if not is_sharded(param):
        return None
    return param.shape, param.placements, id(param.device_mesh)  # type: ignore[attr-defined]


class Layout(NamedTuple):
    """Where the elements that a rank holds lie in the whole tensor.

    Local element j is element ``base + j + Σ (j // run) · jump`` of the whole, over the ``jumps`` (run, jump): indices
    are row-major, and there is one term for each dimension beyond the first along which the tensor is split.
    """

    numel: int  # of the whole tensor
    base: int = 0
    jumps: tuple[tuple[int, int], ...] = ()
    groups: tuple[Any, ...] = ()  # the process groups over which the tensor is split
    first: bool = True  # whether this rank is the first in all of these


def layout(param: Tensor) -> Layout:
    """The layout of a parameter, DTensor or not."""
    if not is_sharded(param):
        return Layout(param.numel())
    shape, offsets = _local_shape(param)
    strides = [math.prod(param.shape[d + 1 :]) for d in range(param.dim())]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    jumps = []
    for d in range(1, param.dim()):
        run = math.prod(shape[d:])
        if shape[d] != param.shape[d] and run:
            jumps.append((run, (param.shape[d] - shape[d]) * strides[d]))
    mesh = param.device_mesh  # type: ignore[attr-defined]
    axes = [axis for axis, _ in _splits(param) if mesh.size(axis) > 1]
    first = all(mesh.get_local_rank(axis) == 0 for axis in axes)
    return Layout(param.numel(), base, tuple(jumps), tuple(map(mesh.get_group, axes)), first)


def check_layout(param: Tensor, name: str) -> None:
    """Raise ValueError for a parameter that is sharded in a way that cannot be stepped; alike on every rank."""
    if not is_sharded(param):
        return
    placements = param.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"Lamb16: parameter {name} has partial placements {placements}; redistribute it to Shard or Replicate"
        )
    unknown = [p for p in placements if not (p.is_shard() or p.is_replicate() or _is_strided(p))]
    if unknown:
        raise ValueError(
            f"Lamb16: parameter {name} has the placement {unknown[0]}; redistribute it to Shard or Replicate"
        )
    split: dict[int, list[int]] = {}
    for axis, dim in _splits(param):
        split.setdefault(dim, []).append(param.device_mesh.size(axis))  # type: ignore[attr-defined]
    strided = {dim for axis, dim in _splits(param) if _is_strided(placements[axis])}
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


def _splits(param: Tensor) -> Iterator[tuple[int, int]]:
    """(mesh axis, tensor dimension) of every split; replicated axes are left out."""
    for axis, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if placement.is_shard() or _is_strided(placement):
            dim = placement.dim
            yield axis, dim + param.dim() if dim < 0 else dim


def _is_strided(placement: Any) -> bool:
    """Whether this is what FSDP2 makes of a dimension that tensor parallelism has split: no subclass of Shard."""
    return type(placement).__name__ == "_StridedShard"


def _local_shape(param: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """The shape of this rank's part and where it begins."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return compute_local_shape_and_global_offset(param.shape, mesh, placements)


def _slices(param: Tensor) -> tuple[slice, ...]:
    """This rank's part as slices of the whole tensor."""
    return tuple(slice(begin, begin + size) for size, begin in zip(*_local_shape(param), strict=True))
