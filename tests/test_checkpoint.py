"""Saving, loading, copying: a resumed run repeats the uninterrupted one; a faulty checkpoint changes nothing."""

import copy
import dataclasses
import io
import math
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from helpers import (
    CODES,
    SCALARS,
    all_params,
    assert_matches,
    assert_same,
    differing,
    gradients,
    hyper_of,
    model,
    parameters,
    raw,
    snapshot,
    take_steps,
)
from lamb16 import Lamb16, reference
from lamb16.entries import DERIVED, ENTRIES, MAXIMA, MOMENTS, renamed

BASE = {"lr": 0.01, "weight_decay": 0.1}
FP8 = {"exp_avg_codes": torch.float8_e4m3fn, "exp_avg_sq_codes": torch.float8_e5m2}


def trained(steps: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Lamb16:
    optimizer = Lamb16(parameters(dtype=dtype), **{**BASE, "compile": False, **options})
    take_steps(optimizer, range(steps))
    return optimizer


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def with_weights_of(source: Lamb16, **options: Any) -> Lamb16:
    """A fresh optimizer on copies of the weights of ``source``."""
    params = [nn.Parameter(p.detach().clone()) for p in all_params(source)]
    return Lamb16(params, **{**BASE, "compile": False, **options})


# -- round trips -------------------------------------------------------------------------------------------------


def test_a_state_dict_hands_out_bytes() -> None:
    optimizer = trained()
    state = optimizer.state_dict()["state"]
    assert list(state) == [0, 1, 2]
    for i, p in enumerate(all_params(optimizer)):
        for key in CODES:
            assert state[i][key].dtype == torch.uint8
            assert state[i][key].shape == p.shape
            assert optimizer.state[p][key].dtype == FP8[key]
            assert torch.equal(raw(state[i][key]), raw(optimizer.state[p][key]))
            assert state[i][key].data_ptr() == optimizer.state[p][key].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("moment_dtype", ["float8", "float32"])
def test_a_resumed_run_is_the_uninterrupted_one(compile_mode: bool, dtype: torch.dtype, moment_dtype: str) -> None:
    options = {"compile": compile_mode, "moment_dtype": moment_dtype, "bias_correction": True}
    whole = trained(5, dtype, **options)
    first = trained(2, dtype, **options)
    second = with_weights_of(first, **options)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert_same(snapshot(first), snapshot(second))
    take_steps(second, range(2, 5))
    assert_same(snapshot(whole), snapshot(second))


def test_an_eager_run_may_be_resumed_compiled_and_back() -> None:
    whole, first = trained(6), trained(2)
    second = with_weights_of(first, compile=True)
    second.load_state_dict(first.state_dict())
    take_steps(second, range(2, 4))
    third = with_weights_of(second)
    third.load_state_dict(second.state_dict())
    take_steps(third, range(4, 6))
    assert_same(snapshot(whole), snapshot(third))


def test_codes_load_as_bytes_or_as_fp8() -> None:
    source = trained()
    saved = source.state_dict()
    fp8 = {i: {k: v.view(FP8[k]) if k in FP8 else v for k, v in s.items()} for i, s in saved["state"].items()}
    for state in (saved["state"], fp8):
        target = with_weights_of(source)
        target.load_state_dict(saved | {"state": state})
        assert_same(snapshot(source), snapshot(target))
        assert all(target.state[p][key].dtype == FP8[key] for p in all_params(target) for key in CODES)


def test_scalars_load_as_numbers() -> None:
    source = trained()
    saved = source.state_dict()
    state = {i: {k: v.item() if k in SCALARS else v for k, v in s.items()} for i, s in saved["state"].items()}
    target = with_weights_of(source)
    target.load_state_dict(saved | {"state": state})
    assert_same(snapshot(source), snapshot(target))


@pytest.mark.parametrize("how", ["loaded", "copied", "pickled"])
def test_loading_works_again_into_what_was_loaded_or_copied(how: str) -> None:
    source, target = trained(3), trained(1)
    with torch.no_grad():
        for mine, theirs in zip(all_params(target), all_params(source), strict=True):
            mine.copy_(theirs)
    if how == "loaded":
        target.load_state_dict(source.state_dict())
    else:
        target = copy.deepcopy(target) if how == "copied" else pickle.loads(pickle.dumps(target))
    for optimizer in (target, source):
        optimizer.add_param_group({"params": parameters(seed=4)})
    target.load_state_dict(through_a_file(source.state_dict()))
    source.load_state_dict(target.state_dict())
    for optimizer in (source, target):
        take_steps(optimizer, [3])
    assert_same(snapshot(source), snapshot(target))


def test_loading_copies(compile_mode: bool) -> None:
    """Neither the state dict nor the optimizer it came from is touched by the one that loaded it."""
    source = trained(lr=torch.tensor(0.01))
    saved = source.state_dict()
    before, saved_before = snapshot(source), copy.deepcopy(saved)
    target = with_weights_of(source, compile=compile_mode)
    target.load_state_dict(saved)
    take_steps(target, range(2, 4))
    target.param_groups[0]["lr"].fill_(1.0)
    assert_same(before, snapshot(source))
    for i, state in saved_before["state"].items():
        assert all(torch.equal(raw(value), raw(saved["state"][i][key])) for key, value in state.items())
    assert source.param_groups[0]["lr"].item() == saved["param_groups"][0]["lr"].item() == pytest.approx(0.01)


def test_a_fresh_optimizer_saves_and_loads() -> None:
    source = Lamb16(parameters(), lr=0.5, weight_decay=0.2, compile=False)
    saved = through_a_file(source.state_dict())
    assert saved["state"] == {}
    target = trained()
    target.load_state_dict(saved)
    assert not target.state
    assert target.param_groups[0]["lr"] == 0.5
    again = with_weights_of(target, lr=0.5, weight_decay=0.2)
    for optimizer in (target, again):
        take_steps(optimizer, range(2))
    assert_same(snapshot(target), snapshot(again))


@pytest.mark.parametrize("steps", [0, 3])
def test_loading_works_before_and_after_the_first_step(compile_mode: bool, steps: int) -> None:
    source, target = trained(2, compile=compile_mode), trained(steps, seed=5, compile=compile_mode)
    target.load_state_dict(source.state_dict())
    with torch.no_grad():
        for mine, theirs in zip(all_params(target), all_params(source), strict=True):
            mine.copy_(theirs)
    for optimizer in (source, target):
        take_steps(optimizer, range(2, 4))
    assert_same(snapshot(source), snapshot(target))


def test_salts_are_kept_whatever_the_new_seed() -> None:
    whole, first = trained(4, seed=1), trained(2, seed=1)
    second = with_weights_of(first, seed=2)
    second.load_state_dict(first.state_dict())
    take_steps(second, range(2, 4))
    assert_same(snapshot(whole), snapshot(second))


def test_the_groups_of_the_checkpoint_win() -> None:
    source = trained(lr=0.5, betas=(0.5, 0.9), eps=1e-4, trust_clip=3.0, maximize=True)
    target = with_weights_of(source, lr=0.1)
    target.load_state_dict(through_a_file(source.state_dict()))
    for optimizer in (source, target):
        take_steps(optimizer, range(2, 4))
    assert_same(snapshot(source), snapshot(target))
    assert target.param_groups[0]["lr"] == 0.5


def test_a_tensor_that_was_never_stepped_has_no_state_and_resumes() -> None:
    def partial(optimizer: Lamb16, t: int, with_grad: tuple[int, ...]) -> None:
        params = all_params(optimizer)
        for i, grad in enumerate(gradients(params, t)):
            params[i].grad = grad if i in with_grad else None
        optimizer.step()

    source = trained(0)
    partial(source, 0, (0, 2))
    saved = through_a_file(source.state_dict())
    assert list(saved["state"]) == [0, 2]
    target = with_weights_of(source)
    target.load_state_dict(saved)
    for optimizer in (source, target):
        partial(optimizer, 1, (0, 1))
    assert_same(snapshot(source), snapshot(target))
    assert [int(target.state[p]["step"]) for p in all_params(target)] == [2, 1, 1]


def test_groups_with_exact_moments_round_trip() -> None:
    def groups(seed: int) -> list[dict[str, Any]]:
        return [{"params": parameters()}, {"params": parameters(seed=seed), "moment_dtype": "float32"}]

    source, target = (Lamb16(groups(seed), **BASE, compile=False) for seed in (1, 1))
    take_steps(source, range(2))
    target.load_state_dict(through_a_file(source.state_dict()))
    with torch.no_grad():
        for mine, theirs in zip(all_params(target), all_params(source), strict=True):
            mine.copy_(theirs)
    for optimizer in (source, target):
        take_steps(optimizer, range(2, 4))
    assert_same(snapshot(source), snapshot(target))
    assert target.state[target.param_groups[1]["params"][0]]["exp_avg_codes"].dtype == torch.float32


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_checkpoint_does_not_depend_on_the_memory_format(memory_format: torch.memory_format) -> None:
    source = Lamb16([nn.Parameter(parameters([(40, 8, 3, 3)])[0].detach())], **BASE, compile=False)
    take_steps(source, range(2))
    p = nn.Parameter(all_params(source)[0].detach().clone(memory_format=memory_format))
    target = Lamb16([p], **BASE, compile=False)
    target.load_state_dict(source.state_dict())
    for optimizer in (source, target):
        take_steps(optimizer, range(2, 4))
    assert_same(snapshot(source), snapshot(target))


def test_a_group_may_join_after_loading() -> None:
    whole, first = trained(2), trained(2)
    second = with_weights_of(first)
    second.load_state_dict(first.state_dict())
    for optimizer in (whole, second):
        optimizer.add_param_group({"params": parameters(seed=7), "weight_decay": 0.3})
        take_steps(optimizer, range(2, 4))
    assert_same(snapshot(whole), snapshot(second))


def test_named_parameters_round_trip() -> None:
    network = model()
    source = Lamb16(network.named_parameters(), **BASE, compile=False)
    take_steps(source, range(2))
    saved = through_a_file(source.state_dict())
    assert saved["param_groups"][0]["param_names"] == [name for name, _ in network.named_parameters()]
    target = Lamb16(copy.deepcopy(network).named_parameters(), **BASE, compile=False)
    target.load_state_dict(saved)
    for optimizer in (source, target):
        take_steps(optimizer, range(2, 4))
    assert_same(snapshot(source), snapshot(target))


def test_scheduler_and_optimizer_resume_together() -> None:
    def run(optimizer: Lamb16, scheduler: lr_scheduler.LRScheduler, steps: range) -> None:
        for t in steps:
            take_steps(optimizer, [t])
            scheduler.step()

    def scheduled(optimizer: Lamb16) -> lr_scheduler.LRScheduler:
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=8)

    whole = trained(0)
    run(whole, scheduled(whole), range(6))
    first = trained(0)
    first_scheduler = scheduled(first)
    run(first, first_scheduler, range(3))
    second = with_weights_of(first)
    second_scheduler = scheduled(second)
    saved = through_a_file({"optimizer": first.state_dict(), "scheduler": first_scheduler.state_dict()})
    second.load_state_dict(saved["optimizer"])
    second_scheduler.load_state_dict(saved["scheduler"])
    run(second, second_scheduler, range(3, 6))
    assert_same(snapshot(whole), snapshot(second))


# -- copies ------------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("moment_dtype", ["float8", "float32"])
def test_a_copy_of_model_and_optimizer_goes_its_own_way(compile_mode: bool, how: str, moment_dtype: str) -> None:
    network = model()
    optimizer = Lamb16(network.named_parameters(), **BASE, moment_dtype=moment_dtype, compile=compile_mode, seed=3)
    take_steps(optimizer, range(2))
    before = snapshot(optimizer)
    twin_network, twin = COPIES[how]((network, optimizer))
    assert all(a is b for a, b in zip(all_params(twin), twin_network.parameters(), strict=True))
    assert_same(before, snapshot(twin))
    take_steps(twin, range(2, 4))
    assert_same(before, snapshot(optimizer))
    take_steps(optimizer, range(2, 4))
    assert_same(snapshot(optimizer), snapshot(twin))


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_before_the_first_step_keeps_compile_and_seed(how: str) -> None:
    optimizer = trained(0, seed=9)
    twin = COPIES[how](optimizer)
    for each in (optimizer, twin):
        take_steps(each, range(2))
    assert_same(snapshot(optimizer), snapshot(twin))
    assert twin._compile is False


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_the_count_of_skips(how: str) -> None:
    optimizer = trained()
    params = all_params(optimizer)
    params[0].grad = torch.full_like(params[0], math.nan)
    optimizer.step()
    twin = COPIES[how](optimizer)
    optimizer.step()
    assert (optimizer.skipped, twin.skipped) == (2, 1)


# -- hooks -------------------------------------------------------------------------------------------------------


def test_state_dict_hooks_see_and_change_the_state_dict() -> None:
    optimizer = trained()
    optimizer.register_state_dict_post_hook(lambda o, state_dict: state_dict | {"extra": len(state_dict["state"])})
    saved = optimizer.state_dict()
    assert saved["extra"] == 3
    assert saved["state"][0]["exp_avg_codes"].dtype == torch.uint8


def test_load_hooks_are_called_around_loading() -> None:
    source, target = trained(), trained(0)
    seen = []

    def before(optimizer: Lamb16, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(("pre", len(optimizer.state)))
        return {key: state_dict[f"mine.{key}"] for key in ("state", "param_groups")}

    target.register_load_state_dict_pre_hook(before)
    target.register_load_state_dict_post_hook(lambda optimizer: seen.append(("post", len(optimizer.state))))
    target.load_state_dict({f"mine.{key}": value for key, value in source.state_dict().items()})
    assert seen == [("pre", 0), ("post", 3)]
    assert {key for key in differing(snapshot(source), snapshot(target)) if "weight" not in key} == set()


def test_a_pre_hook_that_changes_its_copy_leaves_the_callers_dict() -> None:
    saved = trained().state_dict()
    target = trained(0)
    target.register_load_state_dict_pre_hook(lambda optimizer, state_dict: state_dict.pop("extra", None) and None)
    whole = saved | {"extra": 1}
    target.load_state_dict(whole)
    assert "extra" in whole


# -- states changed by hand --------------------------------------------------------------------------------------


def test_replaced_scalars_are_honoured(compile_mode: bool) -> None:
    """A new tensor, an in-place change and a number do the same."""

    def replace(state: dict[str, Any], how: int) -> None:
        for key, value in (("step", 41), ("exp_avg_scale", 2.0**-9)):
            if how == 0:
                state[key] = torch.tensor(value)
            elif how == 1:
                state[key].fill_(value)
            else:
                state[key] = value

    results = []
    for how in range(3):
        optimizer = trained(compile=compile_mode, bias_correction=True)
        untouched = trained(4, bias_correction=True)
        replace(optimizer.state[all_params(optimizer)[1]], how)
        take_steps(optimizer, range(2, 4))
        results.append(snapshot(optimizer))
        assert int(optimizer.state[all_params(optimizer)[1]]["step"]) == 43
        assert {key.split(".")[0] for key in differing(results[-1], snapshot(untouched))} == {"1"}
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_replaced_codes_are_honoured(compile_mode: bool) -> None:
    results = []
    for new in (lambda codes: codes.zero_(), torch.zeros_like, lambda codes: torch.zeros_like(codes.view(torch.uint8))):
        optimizer = trained(compile=compile_mode)
        state = optimizer.state[all_params(optimizer)[1]]
        for key in CODES:
            state[key] = new(state[key])
        take_steps(optimizer, [2])
        results.append(snapshot(optimizer))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    assert "1.weight" in differing(results[0], snapshot(trained(3)))


RESETS: dict[str, Callable[[Lamb16], Any]] = {
    "state = defaultdict(dict)": lambda o: setattr(o, "state", defaultdict(dict)),
    "state.clear()": lambda o: o.state.clear(),
    "state[p].clear()": lambda o: [o.state[p].clear() for p in all_params(o)],
    "state[p] = {}": lambda o: o.state.update({p: {} for p in all_params(o)}),
    "state.pop(p)": lambda o: [o.state.pop(p) for p in all_params(o)],
}


@pytest.mark.parametrize("how", RESETS)
def test_a_dropped_state_starts_anew(how: str) -> None:
    reset = trained()
    RESETS[how](reset)
    fresh = with_weights_of(reset)
    for optimizer in (reset, fresh):
        take_steps(optimizer, range(2))
    assert len(reset.state_dict()["state"]) == 3
    assert_same(snapshot(reset), snapshot(fresh))


def test_a_state_given_as_a_new_dict_is_honoured() -> None:
    source, target = trained(2), with_weights_of(trained(2))
    take_steps(target, [5])
    for mine, theirs in zip(all_params(target), all_params(source), strict=True):
        target.state[mine] = copy.deepcopy(source.state[theirs])
        mine.data.copy_(theirs)
    for optimizer in (source, target):
        take_steps(optimizer, [2])
    assert_same(snapshot(source), snapshot(target))


# -- faulty checkpoints ------------------------------------------------------------------------------------------


def edited(edit: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A fault of the state of parameter 1."""

    def apply(saved: dict[str, Any]) -> dict[str, Any]:
        edit(saved["state"][1])
        return saved

    return apply


def setting(key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return edited(lambda state: state.update({key: value(state[key]) if callable(value) else value}))


def sgd(saved: dict[str, Any]) -> dict[str, Any]:
    optimizer = torch.optim.SGD(parameters(), lr=0.1, momentum=0.9)
    take_steps(optimizer, [0])
    return optimizer.state_dict()


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "SGD": (sgd, "another optimizer"),
    "SGD's state": (lambda saved: saved | {"state": sgd(saved)["state"]}, "another optimizer"),
    "a bare model": (lambda saved: {"weight": torch.ones(3)}, "no optimizer state dict"),
    "too many groups": (lambda saved: saved | {"param_groups": saved["param_groups"] * 2}, "2 parameter groups"),
    "too few parameters": (
        lambda saved: saved | {"param_groups": [saved["param_groups"][0] | {"params": [0, 1]}]},
        "2 parameters",
    ),
    "a bad hyperparameter": (
        lambda saved: saved | {"param_groups": [saved["param_groups"][0] | {"eps": 0.0}]},
        r"eps=0\.0",
    ),
    "another moment_dtype": (
        lambda saved: saved | {"param_groups": [saved["param_groups"][0] | {"moment_dtype": "float32"}]},
        "moment_dtype",
    ),
    "another shape": (setting("exp_avg_codes", lambda codes: codes[:7]), "shape"),
    "the same size in another shape": (setting("exp_avg_sq_codes", lambda codes: codes.view(100, 21)), "shape"),
    "moments in float32": (setting("exp_avg_codes", lambda codes: codes.float()), "float32"),
    "moments cast to float16": (setting("exp_avg_sq_codes", lambda codes: codes.half()), "float16"),
    "the moments' formats exchanged": (
        setting("exp_avg_codes", lambda codes: codes.view(torch.float8_e5m2)),
        "float8_e5m2",
    ),
    "a list for codes": (setting("exp_avg_codes", lambda codes: codes.tolist()), "list"),
    "a scale of 0": (setting("exp_avg_scale", 0.0), "exp_avg_scale"),
    "a scale of NaN": (setting("exp_avg_sq_scale", math.nan), "exp_avg_sq_scale"),
    "a scale of inf": (setting("exp_avg_scale", torch.tensor(math.inf)), "exp_avg_scale"),
    "a negative norm": (setting("exp_avg_scale", -(2.0**-9)), "exp_avg_scale"),
    "a norm that is no power of two": (setting("exp_avg_scale", torch.tensor(0.3)), "exp_avg_scale"),
    "a norm cast to float16": (setting("exp_avg_sq_scale", lambda norm: norm.half()), "exp_avg_sq_scale"),
    "a scale per element": (setting("exp_avg_scale", lambda scale: scale.expand(2100)), "exp_avg_scale"),
    "a negative step": (setting("step", -1), "step"),
    "a step of inf": (setting("step", torch.tensor(math.inf)), "step"),
    "a step of NaN": (setting("step", math.nan), "step"),
    "a step beyond int32": (setting("step", 2**31), "step"),
    "no step": (setting("step", None), "step"),
    "a salt of NaN": (setting("salt", math.nan), "salt"),
    "a tensor for a state": (lambda saved: saved | {"state": {1: torch.ones(3)}}, "entries"),
    "a group without its parameters": (lambda saved: saved | {"param_groups": [{"lr": 0.1}]}, "params"),
    "a missing entry": (edited(lambda state: state.pop("salt")), "entries"),
}


@pytest.mark.parametrize("moment", ["fresh", "stepped"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_one_value_error_and_changes_nothing(fault: str, moment: str) -> None:
    break_it, message = FAULTS[fault]
    saved = break_it(copy.deepcopy(trained(2).state_dict()))
    target = trained(0 if moment == "fresh" else 3, lr=0.02)
    before = snapshot(target)
    with pytest.raises(ValueError, match=message) as error:
        target.load_state_dict(saved)
    assert "Lamb16" in str(error.value)
    assert_same(before, snapshot(target))
    undisturbed = trained(0 if moment == "fresh" else 3, lr=0.02)
    for optimizer in (target, undisturbed):
        take_steps(optimizer, [3])
    assert_same(snapshot(target), snapshot(undisturbed))


def test_faults_name_the_parameter() -> None:
    network = model()
    optimizer = Lamb16(network.named_parameters(), **BASE, compile=False)
    take_steps(optimizer, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2]["exp_avg_scale"] = 0.0
    with pytest.raises(ValueError, match=r"parameter 2\.weight"):
        optimizer.load_state_dict(saved)


def test_another_optimizers_loader_is_found_out_at_the_next_step() -> None:
    """torch's own loader casts codes to the parameter's dtype."""
    source, target = trained(), trained(0)
    torch.optim.Optimizer.load_state_dict(target, source.state_dict())
    with pytest.raises(ValueError, match=r"Lamb16\.load_state_dict"):
        take_steps(target, [2])


def damaged_scalar(state_dict: dict[str, Any]) -> None:
    state_dict["state"][0]["exp_avg_scale"] = torch.tensor([0.3])


def nan_codes(key: str, code: int) -> Any:
    def damage(state_dict: dict[str, Any]) -> None:
        codes = state_dict["state"][0][key].clone()
        codes.view(-1)[0] = code
        state_dict["state"][0][key] = codes

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(state=None), "no dict 'state'"),
        (lambda s: s.update(state=[]), "no dict 'state'"),
        (lambda s: s.update(param_groups=None), "no list 'param_groups'"),
        (lambda s: s["state"].update({7: s["state"][0]}), "7, which no parameter group names"),
        (damaged_scalar, "power of two"),
        (nan_codes("exp_avg_codes", 0x7F), "NaN codes"),
        (nan_codes("exp_avg_codes", 0xFF), "NaN codes"),
        (nan_codes("exp_avg_sq_codes", 0x7C), "NaN codes"),
    ],
)
def test_malformed_state_dicts_get_one_error_and_change_nothing(damage: Any, message: str) -> None:
    optimizer = Lamb16(parameters(), lr=0.01, weight_decay=0.1, compile=False)
    take_steps(optimizer, [0])
    before, state_dict = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())
    damage(state_dict)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_same(before, snapshot(optimizer))


def test_scalars_of_shape_one_are_read() -> None:
    optimizer = Lamb16(parameters(), lr=0.01, weight_decay=0.1, compile=False)
    take_steps(optimizer, [0])
    before, state_dict = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        for key in ("step", "exp_avg_scale", "exp_avg_sq_scale", "salt"):
            state[key] = state[key].view(1)
    optimizer.load_state_dict(state_dict)
    assert_same(before, snapshot(optimizer))


# -- version 0.1 ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_version_0_1_loads_and_goes_on(compile_mode: bool) -> None:
    """Written by lamb16 0.1.0: what it has not is derived, and the next steps are the reference's from there."""
    saved = torch.load(Path(__file__).with_name("data") / "lamb16-0.1.0.pt", weights_only=True)
    assert not set(DERIVED) & set(saved["optimizer"]["state"][0])
    assert "nesterov" not in saved["optimizer"]["param_groups"][0]
    params = [nn.Parameter(w.clone()) for w in saved["weights"]]
    optimizer = Lamb16(zip("ab", params, strict=True), compile=compile_mode)
    optimizer.load_state_dict(saved["optimizer"])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["nesterov"]) == (0.01, True)
    hyper = hyper_of(optimizer.param_groups[0])
    states = []
    for p, old in zip(params, map(renamed, saved["optimizer"]["state"].values()), strict=True):
        fresh = reference.init(p.detach(), int(old["salt"]) & 0xFFFFFFFF)
        largest = {
            maximum: reference.decode(old[key], FP8[key]).abs().max().item()
            for key, maximum in zip(MOMENTS, MAXIMA, strict=True)
        }
        scalars = {key: old[key].item() for key in ("exp_avg_scale", "exp_avg_sq_scale", "step")}
        states.append(
            dataclasses.replace(
                fresh,
                exp_avg_codes=old["exp_avg_codes"],
                exp_avg_sq_codes=old["exp_avg_sq_codes"],
                **scalars,
                **largest,
            )
        )
        assert scalars["step"] == 3
    for t in (3, 4):
        before = [p.detach().clone() for p in params]
        take_steps(optimizer, [t])
        for i, p in enumerate(params):
            weights, states[i], _ = reference.step(before[i], gradients(params, t)[i], states[i], hyper)
            assert_matches(optimizer, p, weights, states[i])


def test_a_sum_that_cannot_be_is_refused() -> None:
    optimizer = trained()
    for key, value in (("weight_sum", -1), ("update_sum", (2100 << 20) + 1), ("mask_count", 2101)):
        saved = optimizer.state_dict()
        saved["state"] = {k: dict(s) for k, s in saved["state"].items()}
        saved["state"][1][key] = torch.tensor(value)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=rf"{key} of parameter 1 is {value}"):
            optimizer.load_state_dict(saved)
        assert_same(before, snapshot(optimizer))


# -- other memory --------------------------------------------------------------------------------------------------

NEW_MEMORY: dict[str, Callable[[torch.Tensor], Any]] = {
    "data": lambda x: setattr(x, "data", x.data.clone()),
    "set_": lambda x: x.set_(x.detach().clone()),
    "storage": lambda x: _through_empty_storage(x),
}


def _through_empty_storage(x: torch.Tensor) -> None:
    """As FSDP frees and restores memory; a scalar's storage is shared with others, so it gets one of its own first."""
    x.data = x.data.clone()
    saved, size = x.detach().clone(), x.untyped_storage().nbytes()
    x.untyped_storage().resize_(0)
    x.untyped_storage().resize_(size)
    x.copy_(saved) if x.element_size() > 1 else x.view(torch.uint8).copy_(saved.view(torch.uint8))


@pytest.mark.parametrize("key", ENTRIES)
@pytest.mark.parametrize("how", NEW_MEMORY)
def test_a_state_entry_with_new_memory_is_seen_at_the_next_step(compile_mode: bool, how: str, key: str) -> None:
    moved, plain = (trained(2, compile=compile_mode, caution=True) for _ in range(2))
    for p in all_params(moved):
        NEW_MEMORY[how](moved.state[p][key])
    for t in (2, 3):
        for optimizer in (moved, plain):
            take_steps(optimizer, [t])
        assert_same(snapshot(moved), snapshot(plain))
    old = raw(moved.state[all_params(moved)[1]][key])
    take_steps(moved, [4])
    if key not in ("salt", "mask_count", "param_checksum"):
        assert not torch.equal(old, raw(moved.state[all_params(moved)[1]][key])) or key.endswith(("scale", "max"))


def test_larger_codes_written_in_place_are_seen(compile_mode: bool) -> None:
    """Their scale's bound holds for them too; the copy by hand is what a loader does that knows nothing of maxima."""
    by_hand, replaced = (trained(2, compile=compile_mode) for _ in range(2))
    for optimizer in (by_hand, replaced):
        state = optimizer.state[all_params(optimizer)[1]]
        codes = torch.full_like(state["exp_avg_codes"].view(torch.uint8), 0x7E).view(torch.float8_e4m3fn)
        if optimizer is by_hand:
            state["exp_avg_codes"].view(torch.uint8).copy_(codes.view(torch.uint8))
        else:
            state["exp_avg_codes"] = codes
        take_steps(optimizer, [2])
        assert torch.isfinite(state["exp_avg_codes"].float()).all()
    assert_same(snapshot(by_hand), snapshot(replaced))
