"""State that leaves the device: what is moved, what is kept, and what works meanwhile."""

import copy
import gc
import pickle
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore

import sharded
from helpers import DEVICE, all_params, assert_same, model, parameters, snapshot, take_steps
from lamb16 import Lamb16, checkpoint, offload
from lamb16.entries import ENTRIES, MOMENTS, TABLES, init_state
from ranks import Ranks
from refused import message

BASE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
CPU = torch.device("cpu")
# A second GPU that is only fake. Where there are real ones torch asks for the real one of this number.
OTHER = torch.device("cpu" if torch.cuda.device_count() == 1 else "cuda:1")
SCALAR_BYTES = sum(dtype.itemsize * len(names) for dtype, names in TABLES.items())


def trained(compile: bool = False, steps: int = 2, **options: Any) -> Lamb16:
    optimizer = Lamb16(parameters(), **BASE, compile=compile, **options)
    take_steps(optimizer, range(steps))
    return optimizer


def entries(optimizer: Lamb16) -> list[Tensor]:
    return [x for p in all_params(optimizer) for x in optimizer.state[p].values() if isinstance(x, Tensor)]


def held(optimizer: Lamb16) -> dict[int, Tensor]:
    """All tensors that an optimizer holds, but for its parameters and their gradients, by their storages."""
    own = {name: value for name, value in vars(optimizer).items() if name != "param_groups"}
    seen, left, found = {id(p) for p in all_params(optimizer)}, [own], {}
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, types.ModuleType | types.FunctionType | type):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            found[x.untyped_storage()._cdata] = x
        else:
            left += gc.get_referents(x)
    return found


# -- what is moved, and what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clipped"])
def test_an_offloaded_optimizer_holds_its_state_and_nothing_else(compile_mode: bool, clip: float | None) -> None:
    optimizer = trained(compile_mode, max_grad_norm=clip)
    params = all_params(optimizer)
    numel, few = sum(p.numel() for p in params), 8 + 8 * (clip is not None)  # what was skipped, and the norm
    before = held(optimizer)
    codes = {x.untyped_storage()._cdata for p in params for x in map(optimizer.state[p].get, MOMENTS)}
    others = [StorageWeakRef(x.untyped_storage()) for key, x in before.items() if key not in codes or DEVICE != CPU]
    assert sum(x.untyped_storage().nbytes() for x in before.values()) > 2 * numel + SCALAR_BYTES * len(params) + few
    assert len(others) > 20
    del before
    optimizer.offload()
    gc.collect()
    assert [x for x in others if not x.expired()] == []
    now = held(optimizer).values()
    assert {x.device for x in now} == {CPU}
    assert sum(x.untyped_storage().nbytes() for x in now) == 2 * numel + SCALAR_BYTES * len(params) + few


def test_last_gradients_and_old_weights_are_freed_while_the_state_is_away(compile_mode: bool) -> None:
    optimizer = trained(compile_mode)
    params = all_params(optimizer)
    watched = [StorageWeakRef(x.untyped_storage()) for p in params for x in (p, p.grad)]
    optimizer.offload()
    for p in params:
        p.grad, p.data = None, p.data.clone()
    gc.collect()
    assert all(x.expired() for x in watched)


def test_training_goes_on_to_the_bit(compile_mode: bool) -> None:
    """Both ways twice, which changes nothing; states stay the dicts that they are."""
    away, plain = (trained(compile_mode, max_grad_norm=1.0) for _ in range(2))
    states = [id(away.state[p]) for p in all_params(away)]
    for t in range(2, 5):
        for _ in range(2):
            away.offload()
            assert away.offloaded == CPU
            assert {x.device for x in entries(away)} == {CPU}
            assert_same(snapshot(away), snapshot(plain))
        for _ in range(2):
            away.reload()
            assert away.offloaded is None
            assert {x.device for x in entries(away)} == {p.device for p in all_params(away)}
        for optimizer in (away, plain):
            take_steps(optimizer, [t])
        assert_same(snapshot(away), snapshot(plain))
    assert [id(away.state[p]) for p in all_params(away)] == states
    assert away.layer_stats().keys() == plain.layer_stats().keys() != set()


def stepped_on_cuda(
    shapes: Sequence[tuple[int, ...]] = ((64, 48), (5,)), **options: Any
) -> tuple[list[nn.Parameter], Lamb16]:
    """Parameters on a GPU and an optimizer that has taken a step; to be called under FakeTensorMode."""
    params = [nn.Parameter(torch.empty(shape, device="cuda:0")) for shape in shapes]
    optimizer = Lamb16(params, **BASE, **options)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("moment_dtype", ["float8", "float32"])
def test_every_entry_leaves_the_device_and_comes_back(moment_dtype: str) -> None:
    """On a GPU that is only fake: where tensors are, is known there too."""
    with FakeTensorMode():
        params, optimizer = stepped_on_cuda(((64, 48), (5,), ()), max_grad_norm=1.0, moment_dtype=moment_dtype)
        state = optimizer.state[params[0]]
        state["slow"] = torch.empty(4, 3, 2, 5, device="cuda").to(memory_format=torch.channels_last)
        state["number"] = torch.empty((), device="cuda")
        state["note"] = "kept"
        optimizer.state["of nobody"] = {"x": torch.empty(2, device="cuda")}
        kinds = [(x.dtype, x.shape, x.stride()) for x in entries(optimizer)]
        for _ in range(2):
            optimizer.offload()
            assert {x.device for x in entries(optimizer)} == {CPU}
            assert optimizer.grad_norm.device == CPU
            del optimizer.state["of nobody"]
            assert {x.device for x in held(optimizer).values()} == {CPU}
            optimizer.state["of nobody"] = {"x": torch.empty(2, device="cuda")}
            optimizer.reload()
            assert {x.device.type for x in entries(optimizer)} == {"cuda"}
            assert [(x.dtype, x.shape, x.stride()) for x in entries(optimizer)] == kinds
        assert optimizer.state["of nobody"]["x"].device.type == "cuda"
        assert state["note"] == "kept"
        optimizer.step()
        optimizer.offload(OTHER)
        assert {x.device for x in entries(optimizer)} == {OTHER}
        assert optimizer.offloaded == OTHER


def test_states_come_back_to_where_the_parameters_are_by_then() -> None:
    with FakeTensorMode():
        params, optimizer = stepped_on_cuda()
        optimizer.offload()
        params[0].fake_device = OTHER  # what assigning to .data does not do for a fake one
        optimizer.reload()
        assert [{x.device for x in optimizer.state[p].values()} for p in params] == [{OTHER}, {torch.device("cuda:0")}]


def test_the_host_waits_once_for_pinned_copies_before_states_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    empty_like, copy_ = torch.empty_like, Tensor.copy_

    class Stream:
        def synchronize(self) -> None:
            happened.append(f"wait, states on {'/'.join(sorted({x.device.type for x in entries(optimizer)}))}")

    def noted(x: Tensor, **options: Any) -> Tensor:
        happened.append("pinned" if options.pop("pin_memory", False) else "pageable")
        return empty_like(x, **options)

    def queued(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        happened.append("queued" if non_blocking else "copied")
        return copy_(x, source)

    with FakeTensorMode():
        _, optimizer = stepped_on_cuda()
        count = len(entries(optimizer))
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_available", lambda: True)
            patched.setattr(torch.cuda, "current_stream", lambda device: Stream())
            patched.setattr(torch, "empty_like", noted)
            patched.setattr(Tensor, "copy_", queued)
            optimizer.offload()
            assert happened == ["pinned", "queued"] * count + ["wait, states on cuda"]
            happened.clear()
            optimizer.reload()
            assert happened == ["pageable", "queued"] * count


def test_scalars_are_moved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy for each kind of scalar, however many tensors there are."""
    optimizer = trained()
    copied: list[tuple[torch.dtype, torch.Size]] = []
    original = offload._copied

    def noted(x: Tensor, device: torch.device) -> Tensor:
        copied.append((x.dtype, x.shape))
        return original(x, device)

    monkeypatch.setattr(offload, "_copied", noted)
    optimizer.offload()
    scalars = {dtype: shape.numel() for dtype, shape in copied if dtype in TABLES}
    assert scalars == {dtype: len(names) * 3 for dtype, names in TABLES.items()}
    assert len(copied) == len(TABLES) + 2 * 3 * (DEVICE != CPU)


def test_what_was_counted_and_measured_stays() -> None:
    away, plain = (trained(max_grad_norm=1.0) for _ in range(2))
    for optimizer in (away, plain):
        all_params(optimizer)[0].grad.fill_(torch.inf)
        optimizer.step()
    away.offload()
    assert away.skipped == 1
    assert away.grad_norm.item() == plain.grad_norm.item()
    assert away.layer_stats() == {}
    away.reload()
    all_params(away)[1].grad.fill_(torch.nan)
    away.step()
    assert away.skipped == 3


# -- meanwhile ------------------------------------------------------------------------------------------------------


def test_a_step_meanwhile_says_what_to_do(compile_mode: bool) -> None:
    optimizer, plain = trained(compile_mode), trained(compile_mode)
    optimizer.offload()
    before = snapshot(optimizer)
    p = all_params(optimizer)[2]
    new, index = nn.Parameter(p.detach()[:3].clone()), torch.arange(3, device=DEVICE)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"step: the state is offloaded to cpu; call optimizer\.reload\(\) first"
        ):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"resize: the state is offloaded to cpu; call optimizer\.reload\(\)"):
            optimizer.resize(p, index, new)
    assert_same(snapshot(optimizer), before)
    assert {x.device for x in held(optimizer).values()} == {CPU}
    optimizer.reload()
    for one in (optimizer, plain):
        take_steps(one, [2])
    assert_same(snapshot(optimizer), snapshot(plain))


def test_before_the_first_step_there_is_nothing_to_reload(compile_mode: bool) -> None:
    optimizer = trained(compile_mode, steps=0)
    optimizer.offload()
    assert optimizer.offloaded is None
    take_steps(optimizer, range(2))
    assert_same(snapshot(optimizer), snapshot(trained(compile_mode)))


def test_states_of_nobody_are_left_alone() -> None:
    """Whatever a state dict held that belongs to no parameter."""
    optimizer, other = trained(), torch.ones(2)
    optimizer.state["number"], optimizer.state["tensor"] = 3, other  # type: ignore[assignment]
    optimizer.offload()
    assert optimizer.offloaded == CPU
    with pytest.raises(RuntimeError, match="reload"):
        optimizer.step()
    optimizer.reload()
    assert optimizer.state["tensor"] is other
    for p in all_params(optimizer):
        del optimizer.state[p]
    optimizer.offload()
    assert optimizer.offloaded is None


def test_groups_are_added_meanwhile() -> None:
    found = []
    for away in (True, False):
        optimizer = trained()
        if away:
            optimizer.offload()
        optimizer.add_param_group({"params": parameters([(9, 4)], seed=1), "lr": 0.02})
        if away:
            with pytest.raises(RuntimeError, match="reload"):
                optimizer.step()
            optimizer.reload()
        take_steps(optimizer, [2])
        found.append(snapshot(optimizer))
    assert_same(*found)


COPIES: dict[str, Callable[[Lamb16], Lamb16]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_offloaded_too(how: str) -> None:
    optimizer = trained()
    optimizer.offload()
    made = COPIES[how](optimizer)
    assert made.offloaded == CPU
    assert_same(snapshot(made), snapshot(optimizer))
    with pytest.raises(RuntimeError, match="reload"):
        made.step()
    for one in (made, optimizer):
        one.reload()
        assert COPIES[how](one).offloaded is None
        take_steps(one, [2])
    assert_same(snapshot(made), snapshot(optimizer))


def test_state_dicts_are_written_and_read_meanwhile() -> None:
    optimizer, plain = trained(), trained()
    optimizer.offload()
    saved = optimizer.state_dict()
    tensors = [x for state in saved["state"].values() for x in state.values()]
    assert {x.device for x in tensors} == {CPU}
    with pytest.warns(UserWarning, match="a third to a tenth of this lr serves AdamW"):
        assert optimizer.float32_state_dict()["state"].keys() == saved["state"].keys()
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert optimizer.offloaded is None
    for one in (optimizer, plain):
        take_steps(one, [2])
    assert_same(snapshot(optimizer), snapshot(plain))


def test_what_a_partial_load_keeps_comes_back_too() -> None:
    with FakeTensorMode():
        named = [(name, nn.Parameter(torch.empty(6, 5, device="cuda"))) for name in "ab"]
        optimizer = Lamb16(named, **BASE)
        for _, p in named:
            p.grad = torch.empty_like(p)
        optimizer.step()
        optimizer.offload()
        nothing = {"state": {}, "param_groups": [{"params": [0, 1], "param_names": ["c", "d"]}]}
        assert optimizer.load_state_dict(nothing, strict=False).missing_keys == ["a", "b"]
        assert optimizer.offloaded is None
        assert {x.device.type for x in entries(optimizer)} == {"cuda"}


def test_checkpoints_are_written_and_read_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [model() for _ in range(2)]
    away, plain = (Lamb16(network.named_parameters(), **BASE, compile=False) for network in networks)
    for optimizer in (away, plain):
        take_steps(optimizer, range(2))
    away.offload()
    checkpoint.save(tmp_path / "saved", networks[0], away)
    assert away.offloaded == CPU
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_forget_unsaved", lambda *_: (_ for _ in ()).throw(ValueError("unlike")))
        with pytest.raises(ValueError, match="unlike"):
            checkpoint.load(tmp_path / "saved", networks[0], away)
    assert away.offloaded == CPU
    assert_same(snapshot(away), snapshot(plain))
    assert {x.device for x in held(away).values()} == {CPU}
    assert away._stepper.plans == away._stepper.stores == {}
    checkpoint.load(tmp_path / "saved", networks[0], away)
    assert away.offloaded is None
    for optimizer in (away, plain):
        take_steps(optimizer, [2])
    assert_same(snapshot(away), snapshot(plain))


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("meta", "device='meta' holds no data, the state would be lost; give 'cpu'"),
        ("nowhere", "device='nowhere' cannot be used"),
        ("cuda:99", "device='cuda:99' cannot be used"),
        (None, "device=None cannot be used"),
    ],
)
def test_devices_that_cannot_hold_a_state_are_refused(device: Any, text: str) -> None:
    optimizer = trained()
    before, plans = [id(x) for x in entries(optimizer)], dict(optimizer._stepper.plans)
    with pytest.raises(ValueError, match=text):
        optimizer.offload(device)
    assert [id(x) for x in entries(optimizer)] == before
    assert optimizer.offloaded is None
    assert dict(optimizer._stepper.plans) == plans


def test_nothing_comes_back_to_the_meta_device() -> None:
    optimizer = trained()
    optimizer.offload()
    before = snapshot(optimizer)
    p = all_params(optimizer)[1]
    p.grad = None
    weights = p.detach().clone()
    torch.utils.swap_tensors(p, nn.Parameter(torch.empty(2100, device="meta")))
    with pytest.raises(RuntimeError, match=r"reload: parameter 1 is on the meta device, .* Nothing was changed"):
        optimizer.reload()
    assert optimizer.offloaded == CPU
    torch.utils.swap_tensors(p, nn.Parameter(weights))
    assert_same(snapshot(optimizer), before)
    optimizer.reload()
    take_steps(optimizer, [2])


def test_states_of_meta_parameters_have_nothing_to_move() -> None:
    params = [nn.Parameter(torch.empty(64, 48, device="meta"))]
    optimizer = Lamb16(params, **BASE)
    params[0].grad = torch.empty_like(params[0])
    optimizer.step()
    optimizer.offload()
    optimizer.reload()
    assert all(x.is_meta for x in entries(optimizer))
    optimizer.step()


@pytest.mark.parametrize("way", ["offload", "reload"])
def test_memory_that_runs_out_on_the_way_changes_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        _, optimizer = stepped_on_cuda()
        if way == "reload":
            optimizer.offload()
        before, where, last = [id(x) for x in entries(optimizer)], optimizer.offloaded, optimizer._stepper.last
        copied, calls = offload._copied, iter(range(9))

        def failing(x: Tensor, device: torch.device) -> Tensor:
            if next(calls) == 3:
                raise MemoryError
            return copied(x, device)

        monkeypatch.setattr(offload, "_copied", failing)
        with pytest.raises(MemoryError):
            getattr(optimizer, way)()
        assert [id(x) for x in entries(optimizer)] == before
        assert (optimizer.offloaded, optimizer._stepper.last) == (where, last)


def test_inference_mode_leaves_no_inference_tensors(compile_mode: bool) -> None:
    optimizer, plain = trained(compile_mode), trained(compile_mode)
    with torch.inference_mode():
        optimizer.offload()
        optimizer.reload()
    assert not any(x.is_inference() for x in entries(optimizer))
    for one in (optimizer, plain):
        take_steps(one, [2])
    assert_same(snapshot(optimizer), snapshot(plain))


# -- on a mesh ------------------------------------------------------------------------------------------------------


def test_dtensors_on_a_gpu_keep_mesh_and_placements() -> None:
    """A shard on the CPU of a mesh of GPUs: made by hand, DTensor.from_local would bring it back."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = DeviceMesh("cuda", [0, 1])
        with FakeTensorMode():
            shard = torch.empty(3, 4, device="cuda")
            p = nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)], run_check=False))
            optimizer = Lamb16([p], **BASE)
            optimizer.state[p] = init_state(p, 1, True)
            for move, device in ((optimizer.offload, "cpu"), (optimizer.reload, "cuda")):
                move()
                assert {x.device.type for x in entries(optimizer)} == {device}
                for x in map(optimizer.state[p].get, MOMENTS):
                    assert (x.to_local().device.type, x.to_local().shape) == (device, (3, 4))
                    assert (x.device_mesh, x.placements, x.shape) == (mesh, p.placements, p.shape)
    finally:
        torch.distributed.destroy_process_group()


def away_on_a_mesh(placement: str) -> tuple[sharded.Found, str, list[bool]]:
    """Weights and states after steps between which the state was away; what a rank says where one forgot to reload."""
    shard = sharded.sharder(placement)
    params = [nn.Parameter(shard(w)) for w in sharded.weights()]
    optimizer = Lamb16(sharded.grouped(params), **sharded.HYPER, compile=False)
    alike, text = [], ""
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = shard(sharded.gradient(i, step))
        optimizer.max_grad_norm = sharded.clip_at(step)
        if step == 2:
            optimizer.offload()
            for p in params:
                moments = [optimizer.state[p][key] for key in MOMENTS]
                alike += [x.placements == p.placements and x.device_mesh == p.device_mesh for x in moments]
                alike += [x.to_local().shape == p.to_local().shape for x in moments]
            alike.append(set(optimizer.state[params[0]]) == set(ENTRIES))
            if placement != "replicated over 2" and torch.distributed.get_rank() == 0:
                optimizer.reload()
            text = message(optimizer.step)
            optimizer.reload()
        optimizer.step()
    return sharded.found(params, optimizer), text, alike


@pytest.mark.parametrize("placement", ["rows over 2", "columns over 2", "replicated over 2"])
def test_shards_leave_and_come_back_on_every_rank(ranks: Ranks, placement: str) -> None:
    plain = sharded.step_whole(compile=False, steps=4)
    (first, text, alike), (second, said, alike_too) = ranks.run(2, away_on_a_mesh, placement)
    assert_same(first, plain)
    assert_same(second, plain)
    assert all([*alike, *alike_too])
    assert "call optimizer.reload() first" in said
    shared = placement != "replicated over 2"
    assert ("another rank could not take this step" if shared else "call optimizer.reload() first") in text
