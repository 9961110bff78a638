"""What load_state_dict matches with what: names, order, groups, what is missing; its memory; resized parameters."""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import saved
from bits import assert_same_bits, raw
from helpers import CODES, all_params, assert_same, differing, gradients, model, parameters, snapshot, take_steps
from lamb16 import Lamb16, checkpoint
from lamb16.entries import DERIVED, ENTRIES, OLD_NAMES, init_state, weight_sum
from lamb16.matching import Loaded
from ranks import Ranks

BASE: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "compile": False}
SHAPE = (40, 60)
Named = dict[str, nn.Parameter]


def named(names: str = "abc", shape: tuple[int, ...] = SHAPE) -> Named:
    """Parameters of one shape, which do not depend on the order of their names."""
    return {name: parameters([shape], seed=ord(name))[0] for name in names}


def grouped(params: Named, *groups: str, **options: Any) -> Lamb16:
    """One group for every string of names."""
    return Lamb16([{"params": [(name, params[name]) for name in group]} for group in groups], **BASE | options)


def step(optimizer: Lamb16, params: Named, t: int) -> None:
    for name, p in params.items():
        p.grad = gradients([p], 100 * ord(name) + t)[0]
    optimizer.step()


def trained(*groups: str, **options: Any) -> tuple[Lamb16, Named]:
    params = named("".join(groups))
    optimizer = grouped(params, *groups, **options)
    step(optimizer, params, 0)
    step(optimizer, params, 1)
    return optimizer, params


def copies(params: Named) -> Named:
    return {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}


def state_of(optimizer: Lamb16, p: Tensor) -> dict[str, Tensor]:
    return {key: raw(value) for key, value in optimizer.state[p].items()}


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["of another", "its own"])
def test_states_go_by_name_whatever_the_order(own: bool) -> None:
    """Also where the state_dict tensors are the memory that is written to."""
    source, params = trained("abc")
    expected = {name: state_of(source, p) for name, p in params.items()}
    state_dict = source.state_dict()
    if own:
        target, theirs = source, params
        group = target.param_groups[0]
        group["params"], group["param_names"] = [params[x] for x in "cab"], list("cab")
        names = dict(zip("cab", "abc", strict=True))  # the state_dict a is the state of what is now called c, and so on
        state_dict["param_groups"][0]["param_names"] = [names[x] for x in "abc"]
        expected = {names[x]: expected[x] for x in "abc"}
    else:
        theirs = copies(params)
        target = grouped(theirs, "cab")
    assert target.load_state_dict(state_dict) == Loaded([], [], [], [])
    for name, p in theirs.items():
        assert_same(state_of(target, p), expected[name])
    if not own:
        for optimizer, own_params in ((source, params), (target, theirs)):
            step(optimizer, own_params, 2)
        assert all(torch.equal(params[x], theirs[x]) for x in "abc")


def test_groups_give_their_hyperparameters_to_those_with_their_members() -> None:
    source, params = trained("ab", "c")
    source.param_groups[0]["lr"], source.param_groups[1]["lr"] = 0.25, 0.5
    target = grouped(copies(params), "c", "ba")
    target.load_state_dict(source.state_dict())
    assert [group["lr"] for group in target.param_groups] == [0.5, 0.25]


@pytest.mark.parametrize("groups", [("abc",), ("a", "b", "c"), ("a", "bc")])
def test_groups_that_were_merged_or_split(groups: tuple[str, ...]) -> None:
    source, params = trained("ab", "c")
    source.param_groups[1]["lr"] = 0.5
    target = grouped(copies(params), *groups, lr=0.125)
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"group 0 \(a.*\) is no group of the state dict.*strict=False"):
        target.load_state_dict(source.state_dict())
    assert_same(snapshot(target), before)
    loaded = target.load_state_dict(source.state_dict(), strict=False)
    kept = [list(names) for names in groups if names != "c"]
    assert loaded == Loaded([], [], [], kept)
    assert [group["lr"] for group in target.param_groups] == [0.5 if x == "c" else 0.125 for x in groups]
    mine = dict(zip("abc", all_params(target), strict=True))
    for name, p in params.items():
        assert_same(state_of(target, mine[name]), state_of(source, p))


def test_names_that_one_side_lacks() -> None:
    source, params = trained("abc")
    theirs = named("bcd")
    target = grouped(theirs, "bcd")
    step(target, theirs, 5)
    before = snapshot(target)
    with pytest.raises(ValueError, match=r"the state dict has no d; this optimizer has no a\. .*strict=False"):
        target.load_state_dict(source.state_dict())
    assert_same(snapshot(target), before)
    kept = state_of(target, theirs["d"])
    loaded = target.load_state_dict(source.state_dict(), strict=False)
    assert loaded == Loaded(["d"], ["a"], [], [["b", "c", "d"]])
    assert_same(state_of(target, theirs["d"]), kept)
    for name in "bc":
        assert_same(state_of(target, theirs[name]), state_of(source, params[name]))
    assert len(target.state) == 3
    step(target, theirs, 6)


def test_another_shape_is_kept_and_reported() -> None:
    source, params = trained("ab")
    theirs = {"a": params["a"], "b": named("b", (8, 60))["b"]}
    target = grouped(theirs, "ab")
    with pytest.raises(ValueError, match=r"of parameter b has shape \(40, 60\), but the parameter has shape \(8, 60\)"):
        target.load_state_dict(source.state_dict())
    assert not target.state
    assert target.load_state_dict(source.state_dict(), strict=False) == Loaded([], [], ["b"], [])
    assert list(target.state) == [params["a"]]
    step(target, theirs, 2)


def test_a_damaged_state_is_refused_with_strict_false_too() -> None:
    source, params = trained("ab")
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["state"][1]["exp_avg_scale"] = torch.tensor(0.0)
    before = snapshot(source)
    with pytest.raises(ValueError, match="exp_avg_scale of parameter b is 0"):
        source.load_state_dict(state_dict, strict=False)
    assert_same(snapshot(source), before)
    assert params


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("here", [False, True])
def test_named_and_unnamed(here: bool, there: bool) -> None:
    """As in torch's test_can_load_from_to_named_state_dict."""
    network = model()
    source = Lamb16(network.named_parameters() if there else network.parameters(), **BASE)
    take_steps(source, range(2))
    twin = copy.deepcopy(network)
    target = Lamb16(twin.named_parameters() if here else twin.parameters(), **BASE)
    target.load_state_dict(source.state_dict())
    assert_same(snapshot(source), snapshot(target))
    if here or there:
        names = [name for name, _ in network.named_parameters()]
        assert target.state_dict()["param_groups"][0]["param_names"] == names
    for optimizer in (source, target):
        take_steps(optimizer, [2])
    assert_same(snapshot(source), snapshot(target))


def test_hyperparameters_that_a_state_dict_lacks_stay() -> None:
    """As in torch's test_can_load_older_state_dict, with every one of them but for the rate."""
    source, params = trained("ab")
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["param_groups"] = [{"lr": 0.5, "params": state_dict["param_groups"][0]["params"]}]
    target = grouped(copies(params), "ab", eps=1e-4, maximize=True)
    target.load_state_dict(state_dict)
    (group,) = target.param_groups
    assert (group["lr"], group["eps"], group["maximize"], group["betas"]) == (0.5, 1e-4, True, (0.9, 0.999))
    step(target, dict(zip("ab", all_params(target), strict=True)), 2)


def test_torchs_loader_of_distributed_checkpoints_into_another_order() -> None:
    """It brings the keys into the optimizer's order and leaves ``param_names`` as they were."""
    network = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(3))).to(parameters()[0].device)
    source = Lamb16(network.named_parameters(), **BASE)
    take_steps(source, range(2))
    target = Lamb16(reversed(list(network.named_parameters())), **BASE)
    options = StateDictOptions()
    network.zero_grad()
    state_dict = copy.deepcopy(get_optimizer_state_dict(network, source, options=options))
    set_optimizer_state_dict(network, target, state_dict, options=options)
    for p in network.parameters():
        assert_same(state_of(target, p), state_of(source, p))
    straight = Lamb16(reversed(list(network.named_parameters())), **BASE)
    straight.load_state_dict(state_dict)
    for p in network.parameters():
        assert_same(state_of(straight, p), state_of(source, p))


# -- casts ---------------------------------------------------------------------------------------------------------


def cast(state_dict: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """All float32 entries in another dtype, as tools do that halve checkpoints."""
    state = {
        i: {key: x.to(dtype) if x.dtype == torch.float32 else x for key, x in entries.items()}
        for i, entries in state_dict["state"].items()
    }
    return state_dict | {"state": state}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_halved_checkpoint_loads_if_its_scales_survive(dtype: torch.dtype) -> None:
    source, params = trained("ab")
    for p in params.values():
        source.state[p]["exp_avg_scale"].fill_(2.0**-24)
        source.state[p]["exp_avg_sq_scale"].fill_(2.0**-20)
    target = grouped(copies(params), "ab")
    target.load_state_dict(cast(source.state_dict(), dtype))
    assert_same(snapshot(source), snapshot(target))


def test_a_checkpoint_whose_scales_underflowed_is_refused() -> None:
    source, params = trained("ab")
    source.state[params["a"]]["exp_avg_sq_scale"].fill_(2.0**-30)
    before = snapshot(source)
    with pytest.raises(
        ValueError, match=r"exp_avg_sq_scale of parameter a is 0\.0.*Keep 0-d entries out of such a cast"
    ):
        source.load_state_dict(cast(source.state_dict(), torch.float16))
    assert_same(snapshot(source), before)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment_dtype", ["float8", "float32"])
def test_loading_copies_into_the_moments_that_are_there(moment_dtype: str) -> None:
    source, params = trained("ab", moment_dtype=moment_dtype)
    target, theirs = trained("ab", moment_dtype=moment_dtype)
    step(source, params, 2)
    places = [target.state[p][key].data_ptr() for p in theirs.values() for key in CODES]
    target.load_state_dict(source.state_dict())
    assert [target.state[p][key].data_ptr() for p in theirs.values() for key in CODES] == places
    for name in "ab":
        assert_same(state_of(target, theirs[name]), state_of(source, params[name]))


def test_moments_of_another_dtype_get_memory_of_their_own() -> None:
    source, _ = trained("ab", moment_dtype="float32")
    target, theirs = trained("ab")
    step(target, theirs, 2)
    with pytest.warns(UserWarning, match="moment_dtype='float32' in the state"):
        target.load_state_dict(source.state_dict())
    assert {target.state[p][key].dtype for p in theirs.values() for key in CODES} == {torch.float32}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_the_peak_of_memory_while_loading() -> None:
    """A second copy of the state would be all of it."""
    n = 1 << 24
    p = nn.Parameter(torch.zeros(n, device="cpu"))
    optimizer = Lamb16([p], **BASE)
    optimizer.state[p].update(init_state(p, 1, True))
    state_dict = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state_dict)
    gc.collect()
    before = peak()
    optimizer.load_state_dict(state_dict)
    assert peak(reset=False) - before < 0.25 * 2 * n


def peak(reset: bool = True) -> int:
    """Bytes of memory at most since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# -- resize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment_dtype", ["float8", "float32"])
def test_resize_keeps_the_moments_of_the_rows_that_stay(compile_mode: bool, moment_dtype: str) -> None:
    params = named("ab")
    optimizer = grouped(params, "ab", moment_dtype=moment_dtype, compile=compile_mode)
    step(optimizer, params, 0)
    step(optimizer, params, 1)
    old, other = optimizer.state[params["a"]], state_of(optimizer, params["b"])
    before = {key: value.clone() for key, value in old.items()}
    index = torch.tensor([3, 0, -1, 39, 3, -1])
    new = nn.Parameter(torch.randn(6, 60, device=params["a"].device))
    optimizer.resize(params["a"], index, new)
    assert optimizer.param_groups[0]["params"][0] is new
    assert params["a"] not in optimizer.state
    state = optimizer.state[new]
    assert set(state) == set(ENTRIES)
    for key in CODES:
        codes, rows = state[key].float(), before[key].float()
        assert state[key].dtype == before[key].dtype
        for i, row in enumerate(index.tolist()):
            assert torch.equal(codes[i], rows[row] if row >= 0 else torch.zeros_like(rows[0]))
        assert state[key.replace("codes", "max")] == codes.abs().max()
    for key in ("step", "salt", "exp_avg_scale", "exp_avg_sq_scale"):
        assert torch.equal(state[key], before[key])
    assert state["weight_sum"] == weight_sum(new)
    assert state["update_sum"] == before["update_sum"] * 6 // 40
    assert state["mask_count"] == 6 * 60
    assert_same(state_of(optimizer, params["b"]), other)
    step(optimizer, {"a": new, "b": params["b"]}, 2)
    assert int(optimizer.state[new]["step"]) == 3


def test_resize_to_the_same_rows_changes_nothing() -> None:
    plain, params = trained("ab")
    resized, theirs = trained("ab")
    new = nn.Parameter(theirs["a"].detach().clone())
    resized.resize(theirs["a"], torch.arange(40), new)
    assert_same(snapshot(plain), snapshot(resized))
    step(plain, params, 2)
    step(resized, {"a": new, "b": theirs["b"]}, 2)
    assert_same(snapshot(plain), snapshot(resized))


def test_resize_before_the_first_step_and_to_no_rows() -> None:
    params = named("a")
    optimizer = grouped(params, "a")
    more = nn.Parameter(torch.ones(50, 60, device=params["a"].device))
    optimizer.resize(params["a"], torch.full((50,), -1), more)
    assert not optimizer.state
    step(optimizer, {"a": more}, 0)
    none = nn.Parameter(more.detach()[:0].clone())
    optimizer.resize(more, torch.zeros(0, dtype=torch.int64), none)
    again = nn.Parameter(more.detach()[:2].clone())
    optimizer.resize(none, torch.tensor([-1, -1]), again)
    step(optimizer, {"a": again}, 1)
    assert torch.isfinite(again).all()


REFUSED: dict[str, tuple[Any, str]] = {
    "another parameter": (lambda p: (torch.ones(2, 60), torch.tensor([0, 1]), p), "p is not one of its parameters"),
    "itself": (lambda p: (p, torch.arange(40), p), "new_p is in it already"),
    "other columns": (lambda p: (p, torch.arange(2), torch.ones(2, 61)), r"expected a leaf .* with rows of \(60,\)"),
    "another dtype": (lambda p: (p, torch.arange(2), torch.ones(2, 60).half()), "new_p is torch.float16"),
    "no leaf": (lambda p: (p, torch.arange(40), p * 1), "expected a leaf"),
    "a mask": (lambda p: (p, torch.ones(2) > 0, torch.ones(2, 60)), "index is torch.bool"),
    "too few": (
        lambda p: (p, torch.arange(1), torch.ones(2, 60)),
        r"index is torch.int64 \(1,\), expected int64 \(2,\)",
    ),
    "no such row": (lambda p: (p, torch.tensor([0, 40]), torch.ones(2, 60)), "index holds 0 to 40, but p has the rows"),
    "below -1": (lambda p: (p, torch.tensor([-2, 4]), torch.ones(2, 60)), "index holds -2 to 4"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_resize_refuses(fault: str) -> None:
    optimizer, params = trained("ab")
    before = snapshot(optimizer)
    arguments, text = REFUSED[fault]
    with torch.device(params["a"].device), pytest.raises(ValueError, match=f"Lamb16.resize.*{text}"):
        optimizer.resize(*arguments(params["a"]))
    assert_same(snapshot(optimizer), before)


def test_states_that_were_cut_by_others_name_resize() -> None:
    optimizer, params = trained("ab")
    state = optimizer.state[params["b"]]
    for entries in ({"step": state["step"].repeat(40)}, {key: state[key][:3] for key in CODES}):
        kept = dict(state)
        state.update(entries)
        with pytest.raises(ValueError, match=r"of parameter b|parameter b has shape") as error:
            step(optimizer, params, 2)
        assert "optimizer.resize(p, index, new_p)" in str(error.value)
        state.update(kept)


def test_a_state_dict_that_is_kept_survives_the_loading_of_another() -> None:
    source, theirs = trained("abc")
    step(source, theirs, 5)
    target, _ = trained("abc")
    before = snapshot(target)
    backup = target.state_dict()
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert differing(before, snapshot(target))
    target.load_state_dict(backup)
    states = {key: x for key, x in before.items() if not key.endswith("weight")}
    assert_same(states, {key: x for key, x in snapshot(target).items() if not key.endswith("weight")})


def test_moments_in_one_buffer_load_into_others_places() -> None:
    optimizer, params = trained("ab")
    p, q = params["a"], params["b"]
    buffer = torch.cat([raw(optimizer.state[x][key]).view(-1) for x in (p, q) for key in CODES])
    views = iter(buffer.split(p.numel()))
    for x in (p, q):
        for key in CODES:
            codes = optimizer.state[x][key]
            optimizer.state[x][key] = next(views).view(codes.shape).view(codes.dtype)
    step(optimizer, params, 2)
    wanted = {key: raw(optimizer.state[q][key]).clone() for key in CODES}
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["param_names"] = ["b", "a"]
    optimizer.load_state_dict(state_dict)
    for key in CODES:
        assert_same_bits(raw(optimizer.state[p][key]), wanted[key])


@pytest.mark.filterwarnings("ignore:Lamb16.load_state_dict. group 0 has moment_dtype")
def test_states_that_are_kept_fit_the_groups_moments() -> None:
    """With another shape and another moment_dtype there is nothing to keep: the parameter starts anew."""
    q = nn.Parameter(torch.ones(4, 8))
    source = Lamb16([("p", q)], **BASE, moment_dtype="float32")
    q.grad = torch.ones(4, 8)
    source.step()
    p = nn.Parameter(torch.ones(8, 8))
    target = Lamb16([("p", p)], **BASE)
    p.grad = torch.ones(8, 8)
    target.step()
    assert target.load_state_dict(source.state_dict(), strict=False).mismatched_keys == ["p"]
    target.step()
    assert (int(target.state[p]["step"]), target.state[p]["exp_avg_codes"].dtype) == (1, torch.float32)


# -- lamb16.checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["frozen", "no gradient"])
def test_a_checkpoint_keeps_the_state_of_what_is_trained_no_more(tmp_path: Path, how: str) -> None:
    """Saved and loaded while it is frozen; when it is trained again, the run is the one without a checkpoint."""
    network = model()
    source = Lamb16(network.named_parameters(), **BASE)
    take_steps(source, range(2))
    twin = copy.deepcopy(network)
    target = Lamb16(twin.named_parameters(), **BASE)
    frozen = list(zip(network.parameters(), twin.parameters(), strict=True))[1]
    for p in frozen:
        p.grad = None
        p.requires_grad_(how != "frozen")
    checkpoint.save(tmp_path / "checkpoint", network, source)
    checkpoint.load(tmp_path / "checkpoint", twin, target)
    assert all(p.requires_grad == (how != "frozen") for p in frozen)
    assert_same(snapshot(source), snapshot(target))
    for optimizer in (source, target):
        take_steps(optimizer, [2])
    assert_same(snapshot(source), snapshot(target))


def test_states_of_frozen_shards_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    for before, after in ranks.run(2, saved.with_frozen_parameter, "FSDP2 on 2", str(tmp_path)):
        assert_same(after, before)


def test_what_the_optimizer_does_not_have_is_named(tmp_path: Path) -> None:
    network = model()
    source = Lamb16(network.named_parameters(), **BASE)
    take_steps(source, [0])
    checkpoint.save(tmp_path / "checkpoint", network, source)
    part = Lamb16([(name, p) for name, p in network.named_parameters() if name != "0.bias"], **BASE)
    with pytest.warns(UserWarning, match=r"the optimizer does not have 0\.bias: their states are not loaded"):
        checkpoint.load(tmp_path / "checkpoint", network, part)
    for name, p in network.named_parameters():
        if name != "0.bias":
            assert_same(state_of(part, p), state_of(source, p))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("version", ["0.1", "before the entries were renamed"])
def test_checkpoints_with_the_old_names_load(tmp_path: Path, version: str) -> None:
    """Written as lamb16.checkpoint.save of these versions did, whose own ones were tried by hand."""
    network = model()
    source = Lamb16(network.named_parameters(), **BASE)
    take_steps(source, range(2))
    network.zero_grad()
    old = get_optimizer_state_dict(network, source)
    names = {new: old_name for old_name, new in OLD_NAMES.items()}
    gone = DERIVED if version == "0.1" else ()
    for key, state in old["state"].items():
        old["state"][key] = {names.get(entry, entry): x for entry, x in state.items() if entry not in gone}
    if version == "0.1":
        for name in ("nesterov", "caution"):
            del old["param_groups"][0][name]
    dcp.save({"model": network.state_dict(), "optimizer": old}, checkpoint_id=tmp_path / "checkpoint")
    twin = model(seed=1)
    target = Lamb16(twin.parameters(), lr=0.5, compile=False)  # names are taken over, too
    checkpoint.load(tmp_path / "checkpoint", twin, target)
    found = differing(snapshot(source), snapshot(target))
    assert {key.partition(".")[2] for key in found} <= {"weight_sum", "update_sum", *gone}
    assert target.param_groups[0]["param_names"] == source.param_groups[0]["param_names"]
    if version != "0.1":
        assert not found
    take_steps(target, [2])
