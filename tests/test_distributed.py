"""Sharded parameters give the bits of one process: real ranks over gloo, 20 steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sharded
from helpers import assert_same
from ranks import Ranks

STEPS = 20


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def one_process() -> sharded.Found:
    return sharded.step_whole(compile=False, steps=STEPS)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("placement", sharded.PLACEMENTS)
def test_a_mesh_gives_the_bits_of_one_process(
    ranks: Ranks, one_process: sharded.Found, placement: str, compile: bool
) -> None:
    sizes, dims = sharded.PLACEMENTS[placement]
    world = int(torch.tensor(sizes).prod())
    for tensors, had in ranks.run(world, sharded.step_sharded, placement, compile, STEPS):
        assert_same(tensors, one_process)
        assert had["bytes"] == 2 * had["elements"]
        split = sum(dim is not None and size > 1 for size, dim in zip(sizes, dims, strict=True))
        assert had["collectives"] == 2 * split
        assert had["skipped"] == 1
