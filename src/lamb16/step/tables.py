"""Tables with a row per tensor of a plan: hyperparameters, and where shards lie in whole tensors."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..hyper import NAMES, NUMBERS, check_hyperparameters, numbers_of
from ..sharding.layout import MAX_JUMPS, Layout
from ..wrapped import fake_mode
from .blocks import ROW, IndexMap


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor in the host's memory on a device, which is not waited for."""
    pinned = device.type == "cuda" and type(x) is Tensor  # no fake one
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


class HyperTable:
    """The hyperparameters of a plan's tensors on its device, brought up to date where a group has changed."""

    def __init__(self, groups: Sequence[tuple[dict[str, Any], int, int]], count: int, device: torch.device) -> None:
        """``groups`` are groups with the rows a:b that are theirs."""
        self.groups, self.device = groups, device
        self.table = torch.zeros(count, len(NUMBERS), dtype=torch.float64, device=device)
        self.seen: list[Any] = [None] * len(groups)

    def check(self) -> None:
        """Raise ValueError for a hyperparameter that was changed to a wrong value since the last step."""
        self.changed: list[tuple[int, Any]] = []
        for k, (group, _, _) in enumerate(self.groups):
            try:
                values = _values(group)
                same = values == self.seen[k]
            except (KeyError, TypeError, ValueError):
                same = False
            if not same:
                check_hyperparameters(group, running=True)
            if not same or values[0] is None:
                self.changed.append((k, _values(group)))

    def fill(self) -> None:
        """Bring the table up to date with what was checked; learning rates on a device are copied there."""
        for k, values in self.changed:
            group, a, b = self.groups[k]
            if values != self.seen[k]:
                lr = 0.0 if values[0] is None else values[0]
                row = list(numbers_of({**group, "lr": lr}).values())
                self.table[a:b] = sent(torch.tensor(row, dtype=torch.float64), self.device)
                self.seen[k] = values
            if values[0] is None:
                self.table[a:b, NUMBERS.index("lr")] = group["lr"].to(torch.float64)


OTHERS = itemgetter(*NAMES[2:])


def _values(group: dict[str, Any]) -> tuple[Any, ...]:
    """What to compare to see a change; None for a learning rate that it takes a device to read."""
    lr = group["lr"]
    number = None if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr * 1.0)  # of no string
    return (number, *group["betas"], *OTHERS(group))


class Shards:
    """Where the elements of split tensors lie in the whole ones, as tables with a row per tensor."""

    def __init__(self, layouts: Sequence[Layout], count: int, device: torch.device) -> None:
        def table(rows: list[list[float]], dtype: torch.dtype, width: int = MAX_JUMPS) -> Tensor:
            filled = torch.zeros(count, width, dtype=torch.float64, device=device)
            for row, values in zip(filled, rows, strict=False):
                row[: len(values)] = torch.tensor(values, dtype=torch.float64)
            return filled.to(torch.int64).to(dtype) if dtype == torch.int32 else filled  # modulo 2^32

        self.numel = table([[x.numel] for x in layouts], torch.float64, 1)[:, 0].contiguous()
        self.base = table([[x.base % 2**32] for x in layouts], torch.int32, 1)[:, 0].contiguous()
        self.first_rank = torch.ones(count, dtype=torch.int64, device=device)
        self.first_rank[: len(layouts)] = torch.tensor([int(x.first) for x in layouts])
        self.index_maps = None
        if any(map(needs_index_map, layouts)):
            inverses = table([[1 / run for run, _ in x.jumps] for x in layouts], torch.float64)
            self.index_maps = IndexMap(
                inverses, table([[jump % 2**32 for _, jump in x.jumps] for x in layouts], torch.int32)
            )


def needs_index_map(where: Layout) -> bool:
    """Whether the elements of a shard's rows are not those of rows of the whole tensor."""
    return bool(where.jumps or where.base % ROW)


def integers(numbers: Iterable[int]) -> Tensor:
    """These numbers, int64; ``torch.tensor`` takes five times as long."""
    found = array("q", numbers)
    if fake_mode() or not found:
        return torch.tensor(found.tolist(), dtype=torch.int64)
    return torch.frombuffer(found, dtype=torch.int64)
