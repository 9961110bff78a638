"""The processes of a distributed training: how a batch is shared, and what is summed. One process is all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamb16.lab.errors import CommandError


@dataclass(frozen=True)
class Workers:
    """This process's number and how many there are."""

    rank: int = 0
    count: int = 1

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of what all have; sizes differ by one at most."""
        return batch[self.rank :: self.count]

    def total(self, number: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(number)
        return number

    def shard(self, model: nn.Module, device: str) -> nn.Module:
        """Shard the parameters over all processes (FSDP2), layer by layer."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(device).type, (self.count,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


ALONE = Workers()


@contextlib.contextmanager
def started_by_torchrun(device: str | None) -> Iterator[Workers]:
    """Join the other processes that torchrun has started."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise CommandError(
            "--distributed needs the processes of torchrun; start it with: "
            "torchrun --nproc-per-node 2 -m lamb16 train --distributed"
        )
    on_cuda = torch.device(device).type == "cuda" if device else torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield Workers(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()
