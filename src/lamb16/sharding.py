"""Parameters spread over a mesh (DTensor): which elements a rank holds, and what the ranks tell each other.

A rank's shard is stepped like any tensor, with two differences: its rounding words are those of its elements' places
in the whole tensor (:class:`Layout`), and before the update the ranks that share a tensor reduce its three maxima, and
after it its sums (:class:`Reduction`), so that norms and scales are the whole tensor's.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .fp8 import as_int32
from .wrapped import PLAIN, plain

if TYPE_CHECKING:
    from .plan import Plan
    from .update import State

REDUCED_BYTES = 36  # per tensor and split mesh axis: three maxima of 4 and three sums of 8
CLIP_BYTES = 16  # more where clipping is on: two sums
EXACT_BYTES = 16  # more where weights are kept exactly: their checksum, before and after the update
MOST, MODULO = 0x7FFFFFFF, 0xFFFFFFFF
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
    """``shard``, this rank's part, as a tensor spread like ``param``; itself where that is a plain tensor.

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
    """This rank's part of ``tensor``, which is whole (the same on every rank) or spread in any way, as of ``param``.

    A collective where the two are spread differently. ``tensor`` has ``param``'s dimensions, and maybe more after
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
        kinds = ["a DTensor" if is_sharded(x) else "a plain tensor" for x in (param, grad)]
        raise RuntimeError(
            f"Lamb16: parameter {name} is {kinds[0]}, but its gradient is {kinds[1]}; make both of one kind "
            "(torch.distributed.tensor.distribute_tensor, or .full_tensor())"
        )
    return like_param(param, grad)


def spread_of(param: Tensor) -> Any:
    """What to compare to see whether two tensors are spread alike."""
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
    """Raise ValueError for a parameter that is spread in a way that cannot be stepped; alike on every rank."""
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


class Table:
    """Rows of numbers, one per tensor, that the ranks which share the tensors reduce: for every group one call."""

    def __init__(self, layouts: Sequence[Layout], device: torch.device) -> None:
        self.count = len(layouts)
        rows: dict[tuple[int, ...], list[int]] = {}
        groups: dict[tuple[int, ...], Any] = {}
        for row, place in enumerate(layouts):
            for group in place.groups:
                ranks = tuple(torch.distributed.get_process_group_ranks(group))
                groups.setdefault(ranks, group)
                rows.setdefault(ranks, []).append(row)
        self.groups = [
            (group, None if len(rows[ranks]) == self.count else torch.tensor(rows[ranks], device=device))
            for ranks, group in groups.items()
        ]

    def largest(self, table: Tensor) -> None:
        """The maximum of every number, in place; a row more than there are tensors goes to all groups."""
        self._reduce(table, torch.distributed.ReduceOp.MAX)

    def largest_anywhere(self, x: Tensor) -> None:
        """The maximum of a number over all ranks that share any tensor, in place."""
        for group, _ in self.groups:
            torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group)

    def sum(self, table: Tensor) -> None:
        """The sum of every number, in place."""
        self._reduce(table, torch.distributed.ReduceOp.SUM)

    def _reduce(self, table: Tensor, op: Any) -> None:
        for group, rows in self.groups:
            if rows is None:
                torch.distributed.all_reduce(table, op, group)
                continue
            extra = torch.arange(self.count, len(table), device=table.device)
            chosen = torch.cat([rows, extra])
            part = table[chosen]
            torch.distributed.all_reduce(part, op, group)
            table[chosen] = part


class Reduction:
    """What the ranks tell each other in a step, about all tensors of a device, with gradients or not.

    Before the update the bits of the largest gradient and moments, int32, which order like the magnitudes and put inf
    and NaN on top, and where gradients are clipped the sums of their squares; after it the sums that the next step
    needs. All are integers, so that no order shows. Every rank takes part with a row for every tensor, in every step:
    none waits for another, whatever has gradients there. Below the maxima goes a signature of what is stepped.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.device = params[0].device
        self.table = Table([layout(p) for p in params], self.device)
        self.row = {id(p): row for row, p in enumerate(params)}

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> list[Reduction]:
        """One for every device of parameters that are split."""
        devices = {p.device: None for p in params if is_sharded(p) and layout(p).groups}
        return [cls([p for p in params if p.device == device]) for device in devices]

    def bind(self, plans: Sequence[Plan]) -> Bound:
        """The reduction for these plans, of which it takes those of its device."""
        return Bound(self, [plan for plan in plans if plan.kind.device == self.device], len(plans))


class Bound:
    """A :class:`Reduction` and the plans of a step."""

    def __init__(self, reduction: Reduction, plans: Sequence[Plan], count: int) -> None:
        self.plans, self.table, self.device = plans, reduction.table, reduction.device
        self.rows = [torch.tensor([reduction.row[key] for key in plan.ids], device=self.device) for plan in plans]
        # Whether all tensors of the step are shared by all ranks that share any, which then know the same of them.
        self.exact = any(plan.kind.exact and plan.sharded for plan in self.plans)
        self.alone = len(self.plans) == count and all(rows is None for _, rows in self.table.groups)

    def _filled(self, parts: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
        """A table with a row per tensor of the device and one more; what is not stepped has zeros."""
        table = torch.zeros(self.table.count + 1, width, dtype=dtype, device=self.device)
        for rows, part in zip(self.rows, parts, strict=True):
            table[rows] = part
        return table

    def before(self, signature: int, failed: bool) -> tuple[bool, bool]:
        """Make the largest gradients and moments those of whole tensors.

        Returns whether another rank steps other tensors, by this ``signature`` of 31 bits, and whether one ``failed``;
        reading that waits for the device. Where one is true no other method may be called, on no rank.
        """
        found = [plan.whole_largest for plan in self.plans]
        states = self._states()
        parts = [
            torch.stack([g[: len(s.home)], *(x[s.home].view(torch.int32) for x in (s.max_m, s.max_v))], 1)
            for g, s in zip(found, states, strict=True)
        ]
        maxima = self._filled(parts, 3, torch.int32)
        own = [signature, MOST - signature, int(failed)]
        maxima[-1] = torch.tensor(own, dtype=torch.int32)
        self.table.largest(maxima)
        told = maxima[-1].tolist()
        if told != own or failed:
            return told[:2] != own[:2], bool(told[2])
        for g, s, rows in zip(found, states, self.rows, strict=True):
            g[: len(rows)] = maxima[rows, 0]
            s.max_m[s.home], s.max_v[s.home] = (maxima[rows, k].view(torch.float32) for k in (1, 2))
        if self.exact:
            self._checksums()
        return False, False

    def _checksums(self) -> None:
        """Make checksums of weights, before a step, those of whole tensors."""
        sums = [plan.scaled_from[1] for plan in self.plans]
        pairs = [(x[: len(rows)], rows) for x, rows in zip(sums, self.rows, strict=True) if x is not None]
        table = torch.zeros(self.table.count, 1, dtype=torch.int64, device=self.device)
        for x, rows in pairs:
            table[rows, 0] = x.long()
        self.table.sum(table)
        for x, rows in pairs:
            x.copy_(as_int32(table[rows, 0]))

    def squares(self, sums: Sequence[Tensor]) -> None:
        """Make sums of squared gradients, int64 [tensors, 2] for each plan, those of whole tensors, in place."""
        own = [x[: len(plan.homes)] for x, plan in zip(sums, self.plans, strict=True)]
        table = self._filled(own, 2, torch.int64)[:-1]
        self.table.sum(table)
        for x, rows in zip(own, self.rows, strict=True):
            x.copy_(table[rows])

    def after(self) -> None:
        """Make the sums in the state those of whole tensors."""
        states, parts = self._states(), []
        for plan, s in zip(self.plans, states, strict=True):
            # Without caution the last one stays: the first of the ranks gives it.
            first = plan.shards.first_rank[: len(s.home)]
            shares = 1, 1, 1 if plan.kind.caution else first, 1 if plan.kind.exact else first
            sums = s.weight_sum, s.update_sum, s.mask_count, s.checksum
            parts.append(torch.stack([x[s.home] * share for x, share in zip(sums, shares, strict=True)], 1))
        width = 4 if self.exact else 3
        table = self._filled([x[:, :width] for x in parts], width, torch.int64)[:-1]
        self.table.sum(table)
        for s, rows in zip(states, self.rows, strict=True):
            s.weight_sum[s.home], s.update_sum[s.home], s.mask_count[s.home] = table[rows, :3].unbind(1)
            if self.exact:
                s.checksum[s.home] = table[rows, 3] & MODULO

    def _states(self) -> list[State]:
        return [plan.store.state(plan.home[: len(plan.homes)]) for plan in self.plans]


def meet(reductions: Sequence[Bound], signature: int, error: Exception | None) -> None:
    """Begin a step with the other ranks, of which all must be here; raises on all of them if one cannot take it.

    Raises:
        RuntimeError: the ranks do not step the same tensors, or another one has an error.
        Exception: ``error``, which this rank has.
    """
    told = [reduction.before(signature, error is not None) for reduction in reductions]
    if error is not None:
        raise error
    if any(failed for _, failed in told):
        raise RuntimeError("Lamb16: another rank could not take this step, see its error. Nothing was changed.")
    if any(differ for differ, _ in told):
        raise RuntimeError(OTHERS)


OTHERS = (
    "Lamb16: the ranks that share parameters do not step the same ones: a gradient is None on some of them, groups or "
    "names differ, or max_grad_norm is None on some. Give every rank a gradient (of zeros). Nothing was changed."
)


def whole_sums(params: Sequence[Tensor], sums: Sequence[Tensor], salts: Sequence[int]) -> None:
    """Make sums over shards, 0-d int64 one per parameter, those over whole parameters, in place; a collective.

    Raises:
        RuntimeError: the ranks do not ask for the same parameters.
    """
    layouts = [layout(p) for p in params]
    if not any(place.groups for place in layouts):
        return
    device = params[0].device
    table = Table(layouts, device)
    number = digest([(salt, tuple(p.shape)) for salt, p in zip(salts, params, strict=True)])
    for group, _ in table.groups:
        both = torch.tensor([number, -number], device=device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group)
        if both.tolist() != [number, -number]:
            raise RuntimeError(OTHERS)
    values = torch.stack(list(sums))[:, None]
    table.sum(values)
    for x, value in zip(sums, values[:, 0], strict=True):
        x.copy_(value)


def signature(plans: Sequence[Plan]) -> int:
    """31 bits of which split tensors are stepped, by salts and shapes."""
    return digest(
        [
            (int(salt), tuple(p.shape), plan.kind[3:])
            for plan in plans
            for salt, p, place in zip(
                plan.store.state(plan.home).salt[plan.home].tolist(), plan.params, plan.layouts, strict=False
            )
            if place.groups
        ]
    )


def digest(what: Any) -> int:
    """31 bits."""
    return int.from_bytes(hashlib.blake2s(repr(what).encode(), digest_size=4).digest(), "little") & MOST


def agree(error: Exception | None, params: Sequence[Tensor], where: str = "load_state_dict") -> None:
    """Raise on every rank that shares parameters with this one, or has replicas, if one of them has found an error.

    A collective for DTensor parameters; else it raises this rank's error, if there is one.
    """
    groups = {
        tuple(torch.distributed.get_process_group_ranks(group)): (group, p.device)
        for p in params
        if is_sharded(p)
        for group in p.device_mesh.get_all_groups()  # type: ignore[attr-defined]
    }
    failed = torch.tensor(int(error is not None))
    for group, device in groups.values():
        failed = failed.to(device)
        torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX, group)
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"Lamb16.{where}: another rank found its part at fault, see its error. Nothing was changed.")
