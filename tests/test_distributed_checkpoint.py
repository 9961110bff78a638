"""Checkpoints of sharded optimizers: every way that torch has, other numbers of ranks, and what goes wrong."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

import saved
from helpers import assert_same
from lamb16 import checkpoint
from parallel import MESHES
from ranks import Ranks


def world(how: str) -> int:
    return math.prod(MESHES[how])


@pytest.fixture(scope="module")
def uninterrupted(ranks: Ranks) -> dict[int, saved.Found]:
    return {last: ranks.run(1, saved.uninterrupted, "one process", last)[0] for last in (3, 6)}


@pytest.mark.parametrize("mode", saved.MODES)
@pytest.mark.parametrize("how", ["FSDP2 on 2", "HSDP"])
def test_state_dicts_of_every_kind(ranks: Ranks, uninterrupted: dict[int, saved.Found], how: str, mode: str) -> None:
    for tensors in ranks.run(world(how), saved.through_state_dict, how, mode):
        assert_same(tensors, uninterrupted[6])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("FSDP2 on 2", "one process"),
        ("FSDP2 on 2", "FSDP2 on 4"),
        ("FSDP2 on 2", "FSDP2 on 3"),
        ("one process", "FSDP2 on 2"),
        ("FSDP2 on 4", "FSDP2 on 2"),
        ("FSDP2 on 3", "FSDP2 on 2"),
        ("TP and FSDP2", "FSDP2 on 3"),
        ("HSDP", "TP and FSDP2"),
        ("HSDP", "TP"),
        ("DDP", "FSDP2 on 2"),
    ],
)
def test_a_checkpoint_loads_on_other_ranks(
    ranks: Ranks, uninterrupted: dict[int, saved.Found], tmp_path: Path, first: str, second: str
) -> None:
    ranks.run(world(first), saved.save, first, str(tmp_path))
    for loaded, later in ranks.run(world(second), saved.load, second, str(tmp_path)):
        assert_same(loaded, uninterrupted[3])
        assert_same(later, uninterrupted[6])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_dcp_without_the_wrappers(
    ranks: Ranks, uninterrupted: dict[int, saved.Found], tmp_path: Path, asynchronous: bool
) -> None:
    for tensors in ranks.run(2, saved.through_dcp, "FSDP2 on 2", str(tmp_path / "checkpoint"), asynchronous):
        assert_same(tensors, uninterrupted[6])


def test_without_a_process_group(tmp_path: Path) -> None:
    made = saved.make("one process")
    saved.steps(made, 0, 3)
    checkpoint.save(tmp_path / "checkpoint", *made)
    expected = saved.all_of(made)
    other = saved.make("one process")
    checkpoint.load(tmp_path / "checkpoint", *other)
    assert_same(saved.all_of(other), expected)
    with pytest.raises(ValueError, match="exists; save every checkpoint into a folder of its own"):
        checkpoint.save(tmp_path / "checkpoint", *made)


def test_a_rank_killed_while_saving_leaves_the_previous_checkpoint(
    ranks: Ranks, uninterrupted: dict[int, saved.Found], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=saved.is_killed, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert processes[1].exitcode == -9
    assert processes[0].exitcode not in (0, None), "the other rank fails, and does not hang"
    assert not (tmp_path / "next").exists()
    assert (tmp_path / "next.saving").exists()
    for loaded, later in ranks.run(2, saved.load, "FSDP2 on 2", str(tmp_path)):
        assert_same(loaded, uninterrupted[3])
        assert_same(later, uninterrupted[6])


def remove(folder: Path) -> None:
    (folder / ".metadata").unlink()


def lose_a_file(folder: Path) -> None:
    next(folder.glob("__1_*")).unlink()


def cut_a_file(folder: Path) -> None:
    file = next(folder.glob("__1_*"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_the_metadata(folder: Path) -> None:
    file = folder / ".metadata"
    file.write_bytes(file.read_bytes()[:100])


def nothing(folder: Path) -> None:
    pass


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no metadata": (remove, "there is no checkpoint in"),
    "a file is missing": (lose_a_file, "is damaged; load another one (rank"),
    "a truncated file": (cut_a_file, "is damaged; load another one (rank"),
    "truncated metadata": (cut_the_metadata, "is damaged; load another one (pickle"),
    "not seen by a rank": (nothing, "there is no checkpoint in"),
    "another model": (nothing, "(it has another shape or dtype for model.0.weight"),
    "more layers": (nothing, "is not of this model and optimizer; load another one (it has also model.4.weight"),
    "another optimizer": (nothing, "is not of this model and optimizer; load another one (it has no optimizer.state."),
    "another dtype": (nothing, "(it has another shape or dtype for model.0.weight"),
}


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_changes_nothing(ranks: Ranks, tmp_path: Path, fault: str, stepped: bool) -> None:
    damage, text = FAULTS[fault]
    ranks.run(2, saved.save, "FSDP2 on 2", str(tmp_path), fault)
    damage(tmp_path / "checkpoint")
    for error in ranks.run(2, saved.fails_to_load, "FSDP2 on 2", str(tmp_path), fault, stepped):
        assert error.startswith("ValueError: lamb16.checkpoint.load: ")
        assert text in error


def test_where_nothing_can_be_saved_all_ranks_say_so(ranks: Ranks, tmp_path: Path) -> None:
    for below_a_file, there in ranks.run(2, saved.cannot_be_saved, "FSDP2 on 2", str(tmp_path)):
        assert below_a_file.startswith("ValueError: ")
        assert "file/checkpoint" in below_a_file
        assert "exists; save every checkpoint into a folder of its own" in there


@pytest.mark.parametrize("steps_before", [0, 2])
def test_parameters_without_a_state_have_none_again(ranks: Ranks, tmp_path: Path, steps_before: int) -> None:
    for before, after, rest in ranks.run(2, saved.with_unused_parameter, "FSDP2 on 2", str(tmp_path), steps_before):
        assert_same(after, before)
        assert rest == [0.01 * 0.5**steps_before, steps_before, False]
