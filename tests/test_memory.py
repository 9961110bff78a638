"""What an optimizer keeps alive, and what it notices of memory that was replaced."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from bits import raw
from helpers import all_params, assert_same, gradients, parameters, snapshot, step_with, take_steps
from lamb16 import Lamb16
from lamb16.entries import ENTRIES, MOMENTS
from lamb16.sharding.layout import local
from lamb16.step import plan
from ranks import group

BASE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


class Watched:
    """Whether the memory of tensors is still allocated, without keeping it so."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.objects = [weakref.ref(x) for x in tensors]
        self.storages = [StorageWeakRef(local(x).untyped_storage()) for x in tensors]

    def alive(self) -> list[bool]:
        gc.collect()
        return [not x.expired() for x in self.storages]


def trained(compile: bool = False, **options: Any) -> Lamb16:
    optimizer = Lamb16(parameters(), **BASE, compile=compile, **options)
    take_steps(optimizer, range(2))
    optimizer.layer_stats()
    return optimizer


def moments_of(optimizer: Lamb16) -> list[torch.Tensor]:
    return [optimizer.state[p][key] for p in all_params(optimizer) for key in MOMENTS if p in optimizer.state]


# -- nothing of what was replaced is held ------------------------------------------------------------------------


def replace_entries(optimizer: Lamb16) -> None:
    for state in optimizer.state.values():
        for key in MOMENTS:
            state[key] = state[key].clone()


def replace_memory(optimizer: Lamb16) -> None:
    for x in moments_of(optimizer):
        x.data = x.data.clone()


def pop_states(optimizer: Lamb16) -> None:
    for p in all_params(optimizer):
        optimizer.state.pop(p)


def empty_states(optimizer: Lamb16) -> None:
    for state in optimizer.state.values():
        state.clear()


DROPPED: dict[str, Callable[[Lamb16], Any]] = {
    "entries": replace_entries,
    "memory": replace_memory,
    "popped": pop_states,
    "cleared": lambda optimizer: optimizer.state.clear(),
    "emptied": empty_states,
}


@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clipped"])
@pytest.mark.parametrize("how", DROPPED)
def test_moments_that_were_dropped_are_freed_at_once(compile_mode: bool, how: str, clip: float | None) -> None:
    optimizer = trained(compile_mode, max_grad_norm=clip)
    watched = Watched(*moments_of(optimizer))
    assert all(watched.alive())
    DROPPED[how](optimizer)
    assert not any(watched.alive())
    take_steps(optimizer, [2])


def test_weights_and_gradients_that_were_dropped_are_freed_at_once(compile_mode: bool) -> None:
    optimizer = trained(compile_mode, max_grad_norm=1.0)
    params = all_params(optimizer)
    weights, grads = Watched(*params), Watched(*(p.grad for p in params))
    assert all(weights.alive())
    assert all(grads.alive())
    for p in params:
        p.grad = None
    assert not any(grads.alive())
    for p in params:
        p.data = p.data.clone()
    assert not any(weights.alive())


def test_a_refused_step_holds_nothing(compile_mode: bool) -> None:
    optimizer = trained(compile_mode)
    params = all_params(optimizer)
    optimizer.state[params[1]]["step"] = None
    with pytest.raises(ValueError, match="step of parameter 1 is None"):
        optimizer.step()
    watched = Watched(*moments_of(optimizer), *(p.grad for p in params))
    optimizer.state.clear()
    optimizer.zero_grad()
    assert not any(watched.alive())


def test_contiguous_copies_are_not_held(compile_mode: bool) -> None:
    """Of transposed weights and gradients the step makes copies."""
    p = nn.Parameter(torch.randn(64, 48).t())
    optimizer = Lamb16([p], **BASE, compile=compile_mode)
    p.grad = torch.randn(64, 48).t()
    optimizer.step()
    made: list[StorageWeakRef] = []
    contiguous = torch.Tensor.contiguous

    def noted(x: torch.Tensor) -> torch.Tensor:
        copy = contiguous(x)
        if copy is not x:
            made.append(StorageWeakRef(copy.untyped_storage()))
        return copy

    with mock.patch.object(torch.Tensor, "contiguous", noted):
        optimizer.step()
    assert len(made) == 2
    assert all(x.expired() for x in made)


def test_parameters_that_were_replaced_are_freed_with_their_gradients(compile_mode: bool) -> None:
    """As pruning and densification replace them: in the group's list, state and all."""
    optimizer = Lamb16(parameters([(64, 48)]), **BASE, compile=compile_mode)
    objects: list[Any] = []
    storages: list[StorageWeakRef] = []
    for t in range(12):
        take_steps(optimizer, [t])
        (old,) = all_params(optimizer)
        new = nn.Parameter(torch.randn(64 + t % 3, 48))
        optimizer.state.pop(old)
        optimizer.param_groups[0]["params"][:] = [new]
        objects.append(weakref.ref(old))
        storages += [StorageWeakRef(x.untyped_storage()) for x in (old, old.grad)]
        del old
        gc.collect()
        assert [x() for x in objects] == [None] * (t + 1)
        assert all(x.expired() for x in storages)
        del new
    take_steps(optimizer, [0])


def test_a_replaced_group_list_frees_its_parameters(compile_mode: bool) -> None:
    optimizer = trained(compile_mode)
    watched = Watched(*all_params(optimizer), *(p.grad for p in all_params(optimizer)))
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = parameters([(3,)])
    assert not any(watched.alive())


def test_rows_of_states_that_are_gone_are_used_again() -> None:
    """A state dict replaced by another one before every step takes no more room than one that stays."""
    optimizer = trained()
    for t in range(20):
        for p in all_params(optimizer):
            optimizer.state[p] = dict(optimizer.state[p])
        take_steps(optimizer, [t])
    assert {len(store.columns[0]) for store in optimizer._stepper.stores.values()} == {4}


def test_swapped_tensors_are_seen(compile_mode: bool) -> None:
    """torch.utils.swap_tensors, which module.to may use, refuses tensors to which there are weak references."""
    swapped, plain = trained(compile_mode), trained(compile_mode)
    for p in all_params(swapped):
        p.grad = None
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))
    for optimizer in (swapped, plain):
        take_steps(optimizer, [2])
    assert_same(snapshot(swapped), snapshot(plain))


# -- what was replaced is noticed --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["some", "all"])
@pytest.mark.parametrize("keys", [MOMENTS, ENTRIES], ids=["moments", "everything"])
def test_replaced_entries_make_no_new_plan(
    compile_mode: bool, which: str, keys: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    offloaded, plain = trained(compile_mode), trained(compile_mode)
    monkeypatch.setattr(plan.Plan, "__init__", None)  # a new plan would be an error
    for t in range(2, 6):
        for p in all_params(offloaded)[: 2 if which == "some" else None]:
            state = offloaded.state[p]
            for key in keys:
                state[key] = state[key].clone()
        for optimizer in (offloaded, plain):
            take_steps(optimizer, [t])
        assert_same(snapshot(offloaded), snapshot(plain))


def test_exchanged_states_are_exchanged(compile_mode: bool) -> None:
    """Two parameters of one shape get each other's state: known states all of them, in each other's rows."""
    exchanged, loaded = (Lamb16(parameters([(64, 48), (64, 48)]), **BASE, compile=compile_mode) for _ in range(2))
    for optimizer in (exchanged, loaded):
        take_steps(optimizer, range(2))
    a, b = all_params(exchanged)
    exchanged.state[a], exchanged.state[b] = exchanged.state[b], exchanged.state[a]
    state_dict = loaded.state_dict()
    state_dict["state"] = {0: state_dict["state"][1], 1: state_dict["state"][0]}
    loaded.load_state_dict(state_dict)
    for optimizer in (exchanged, loaded):
        take_steps(optimizer, [2])
    assert_same(snapshot(exchanged), snapshot(loaded))


def test_codes_replaced_while_another_set_is_stepped_are_seen() -> None:
    """New tensors make the store's tables anew; that is not to count as having looked at the codes of others."""
    found = []
    for between in (True, False):
        params = parameters([(64, 48), (5,), (7,)])
        optimizer = Lamb16(params, **BASE, compile=False)
        params[0].grad = gradients(params, 0)[0]
        optimizer.step()
        state = optimizer.state[params[0]]
        state["exp_avg_codes"] = torch.full((64, 48), 0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn)
        if between:
            params[0].grad, params[1].grad = None, gradients(params, 0)[1]
            optimizer.step()
            params[1].grad = None
        params[0].grad = gradients(params, 1)[0]
        optimizer.step()
        found.append({key: raw(value) for key, value in state.items()} | {"weight": raw(params[0])})
        assert torch.isfinite(state["exp_avg_codes"].float()).all()
    assert_same(*found)


def test_an_entry_in_the_place_of_a_freed_one_is_not_taken_for_it(compile_mode: bool) -> None:
    """Same id, same address, same version: the memory of what was freed is what is allocated next."""
    optimizer = trained(compile_mode)
    state = optimizer.state[all_params(optimizer)[2]]
    reused = 0
    for _ in range(20):
        old = state.pop("exp_avg_codes")
        where, version, shape, device = old.data_ptr(), old._version, old.shape, old.device
        del old
        codes = torch.full(shape, 0x70, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        while codes._version < version:
            torch.autograd.graph.increment_version([codes])
        state["exp_avg_codes"] = codes
        reused += codes.data_ptr() == where
        del codes
        take_steps(optimizer, [2])
        assert torch.isfinite(state["exp_avg_codes"].float()).all()
        assert float(state["exp_avg_max"]) >= float(state["exp_avg_codes"].float().abs().max())
    assert reused, "no address was used again: this test has shown nothing"


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    with group(0, 1, tmp_path / "store"):
        yield init_device_mesh("cpu", (1,))


NEW_MEMORY: dict[str, Callable[[torch.Tensor, Any], Any]] = {
    "local": lambda x, _: setattr(x, "_local_tensor", x._local_tensor.detach().clone()),  # type: ignore[attr-defined]
    "entry": lambda x, replace: replace(x.detach().clone()),
}


@pytest.mark.parametrize("key", [*MOMENTS, "weight"])
@pytest.mark.parametrize("how", ["local", "entry"])
def test_new_memory_of_a_dtensor_is_seen(one_rank: Any, compile_mode: bool, how: str, key: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    def shard(x: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(x, one_rank, [Shard(0)])

    moved, plain = (
        Lamb16([nn.Parameter(shard(p.detach())) for p in parameters()], **BASE, compile=compile_mode) for _ in range(2)
    )
    kept: list[torch.Tensor] = []
    for t in range(4):
        for optimizer in (moved, plain):
            params = all_params(optimizer)
            step_with(optimizer, [shard(grad) for grad in gradients([p.full_tensor() for p in params], t)])
        for p, q in zip(all_params(moved), all_params(plain), strict=True):
            assert torch.equal(local(p), local(q))
            for entry in MOMENTS:
                pair = (raw(local(o.state[x][entry])) for o, x in ((moved, p), (plain, q)))
                assert torch.equal(*pair)
        for p in all_params(moved):
            x = p if key == "weight" else moved.state[p][key]
            kept.append(local(x))  # the old memory stays, so the new one is elsewhere
            if key == "weight":
                NEW_MEMORY[how](p, lambda new, p=p: setattr(p, "data", new))
            else:
                NEW_MEMORY[how](x, lambda new, p=p: moved.state[p].update({key: new}))


@pytest.mark.parametrize("how", ["data", "set_", "storage"])
def test_new_memory_of_a_parameter_is_seen(compile_mode: bool, how: str) -> None:
    moved, plain = trained(compile_mode), trained(compile_mode)
    kept = []
    for t in range(2, 5):
        for p in all_params(moved):
            kept.append(p.detach())
            if how == "data":
                p.data = p.data.clone()
            elif how == "set_":
                with torch.no_grad():
                    p.set_(p.detach().clone())
            else:
                saved, storage = p.detach().clone(), p.untyped_storage()
                size = storage.nbytes()
                storage.resize_(0)
                storage.resize_(size)
                p.data.copy_(saved)
        for optimizer in (moved, plain):
            take_steps(optimizer, [t])
        assert_same(snapshot(moved), snapshot(plain))


@pytest.mark.parametrize("how", ["states", "dicts", "entries"])
def test_what_was_taken_out_keeps_its_values(compile_mode: bool, how: str) -> None:
    """Put back, it goes on from where it was: what took its place was written elsewhere."""
    optimizer, plain = trained(compile_mode), trained(compile_mode)
    kept = {p: state if how == "states" else dict(state) for p, state in optimizer.state.items()}
    before, weights = snapshot(plain), [p.detach().clone() for p in all_params(optimizer)]
    if how == "entries":
        for state in optimizer.state.values():
            state.update({key: value.clone() for key, value in state.items()})
    else:
        optimizer.state.clear()
    take_steps(optimizer, [5, 6])
    for p, w in zip(all_params(optimizer), weights, strict=True):
        p.data.copy_(w)
    if how == "entries":
        for p, state in kept.items():
            optimizer.state[p].update(state)
    else:
        optimizer.state.update(kept)
    assert_same(snapshot(optimizer), before)
    for one in (optimizer, plain):
        take_steps(one, [2, 3])
    assert_same(snapshot(optimizer), snapshot(plain))


def test_a_group_that_was_taken_out_is_freed_by_the_next_step() -> None:
    kept, gone = parameters([(70, 3), (70, 3)])
    optimizer = Lamb16([{"params": [kept]}, {"params": [gone]}], lr=0.01, compile=False)
    for p in (kept, gone):
        p.grad = torch.ones_like(p)
    optimizer.step()
    watched = weakref.ref(gone)
    optimizer.param_groups.pop()
    optimizer.state.pop(gone)
    del gone, p
    optimizer.step()
    gc.collect()
    assert watched() is None


def test_memory_that_runs_out_while_states_are_read_changes_nothing() -> None:
    """The tables are there, or the old ones: the step that is taken next is the one that was to be taken."""
    optimizer, plain = trained(False), trained(False)
    p = all_params(optimizer)[1]
    optimizer.state[p]["step"] = optimizer.state[p]["step"].clone()
    none_left = mock.patch("lamb16.store.torch.zeros", side_effect=torch.OutOfMemoryError("none left"))
    with none_left, pytest.raises(torch.OutOfMemoryError):
        take_steps(optimizer, [2])
    for each in (optimizer, plain):
        take_steps(each, [2, 3])
    assert_same(snapshot(optimizer), snapshot(plain))


def test_an_entry_that_was_written_to_while_it_was_out_comes_back_as_it_is() -> None:
    optimizer = trained(False)
    first, second, *_ = all_params(optimizer)
    kept = optimizer.state.pop(first)
    optimizer.state[second]["step"] = optimizer.state[second]["step"].clone()
    take_steps(optimizer, [2])
    kept["step"].fill_(100)
    optimizer.state[first] = kept
    take_steps(optimizer, [3])
    assert int(optimizer.state[first]["step"]) == 101
