"""What torch's own optimizer tests check, for Lamb16, driven by an OptimizerInfo as torch drives them.

torch/testing/_internal/common_optimizers.py is in the wheel; test/test_optim.py is not, and is written anew here, a
test per behaviour under its name there. Left out: what compares foreach, fused and capturable forms, which Lamb16 has
not; sparse and complex parameters, which are refused (here and in test_checks.py).
"""

import collections.abc
import copy
import functools
import gc
import io
import itertools
import pickle
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bits import assert_same_bits, raw
from helpers import DEVICE, assert_same, missing, snapshot
from lamb16 import Lamb16

pytest.importorskip("expecttest", reason="torch's test modules need expecttest (extra: dev)")
profile = hypothesis.settings.get_current_profile_name()  # which torch's modules replace by their own

from torch.testing._internal.common_optimizers import (  # noqa: E402
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_error_inputs_func_adam,
)

hypothesis.settings.load_profile(profile)

Make = functools.partial(Lamb16, compile=False)
CONFIGURATIONS: list[dict[str, Any]] = [
    {}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True},
    {"betas": (0.5, 0.99)}, {"eps": 1e-3, "trust_scale": 1.0}, {"trust_lr": 0.1, "trust_clip": 0.25},
    {"caution": True}, {"nesterov": False}, {"bias_correction": False}, {"moment_dtype": "float32"},
    {"max_grad_norm": 0.5},
]  # fmt: skip
FIRST = ("lr", "betas", "eps", "weight_decay", "trust_scale", "trust_lr", "bias_correction", "moment_dtype")
LATER = ("trust_clip", "nesterov", "caution", "maximize", "param_rounding")  # older state dicts may lack these


def test_every_hyperparameter_is_in_these_lists() -> None:
    """param_rounding in the second alone: the weights here are float32."""
    names = [name for configuration in CONFIGURATIONS for name in configuration]
    assert missing(names, "param_rounding") == set()
    assert missing([*FIRST, *LATER]) == set()


def inputs(device: Any, dtype: Any = None) -> list[OptimizerInput]:
    """Configurations without parameters, which every test makes for itself."""
    return [OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in CONFIGURATIONS]


# Torch's messages, and those of Lamb16 for the same.
OWN_WORDS = {
    "Tensor lr must be 1-element": "one-element",
    "Invalid beta parameter at index 0": "betas",
    "Invalid weight_decay value": "weight_decay",
}


def error_inputs(device: Any, dtype: Any) -> list[ErrorOptimizerInput]:
    """Torch's for all optimizers, and those of Adam that speak of no form which Lamb16 has not."""
    found = get_error_inputs_for_all_optims(device, dtype)
    kinds = ("foreach", "capturable", "fused", "differentiable", "decoupled_weight_decay")
    adam = optim_error_inputs_func_adam(device, dtype)[len(found) :]
    found += [x for x in adam if not set(kinds) & set(x.optimizer_error_input.kwargs) and own_words(x.error_regex)]
    for x in found:
        x.error_regex = own_words(x.error_regex) or x.error_regex
    return found


def own_words(regex: str) -> str | None:
    return next((own for theirs, own in OWN_WORDS.items() if regex.startswith(theirs)), None)


INFO = OptimizerInfo(
    Make,
    optim_inputs_func=inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=(
        [lambda o: StepLR(o, gamma=0.9, step_size=10)],
        [lambda o: LinearLR(o, start_factor=0.4, total_iters=4)],
        [lambda o: StepLR(o, gamma=0.9, step_size=10), lambda o: LinearLR(o, start_factor=0.4, total_iters=4)],
        [lambda o: StepLR(o, gamma=0.99, step_size=10), lambda o: ExponentialLR(o, gamma=0.99)],
        [lambda o: ExponentialLR(o, gamma=0.99), lambda o: ReduceLROnPlateau(o)],
    ),
    supported_impls=(),
    not_og_supported_flags=(),
    supports_complex=False,
)
every_input = pytest.mark.parametrize("given", INFO.optim_inputs_func(DEVICE), ids=lambda given: given.desc)


def copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(kwargs)


def weights(dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter]:
    """A matrix and a vector, the same every time."""
    generator = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(10, 5, generator=generator), torch.randn(10, generator=generator)
    return nn.Parameter(matrix.to(DEVICE, dtype)), nn.Parameter(vector.to(DEVICE, dtype))


def loss_of(weight: Tensor, bias: Tensor) -> Tensor:
    x = torch.linspace(-1, 1, 5, device=DEVICE, dtype=weight.dtype)
    return (weight.mv(x) + bias).pow(2).sum()


def closure_of(optimizer: Any, params: tuple[Tensor, Tensor]) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(*params)
        loss.backward()
        return loss

    return closure


def trained(params: tuple[nn.Parameter, nn.Parameter], kwargs: dict[str, Any], steps: int = 6) -> Lamb16:
    optimizer = INFO.optim_cls(params, **copied(kwargs))
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, params))
    return optimizer


# -- going in the right direction --------------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedulers", INFO.scheduler_inputs, ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forloop_goes_right_direction(
    given: OptimizerInput, contiguous: bool, schedulers: list[Any], dtype: torch.dtype
) -> None:
    """Also _with_lrsched; parameters that are not contiguous are columns."""
    params = weights(dtype)
    if not contiguous:
        params = tuple(nn.Parameter(torch.stack([p.detach()] * 2, -1)[..., 0]) for p in params)
        assert not params[0].is_contiguous()
    optimizer = INFO.optim_cls(params, **copied(given.kwargs))
    made = [make(optimizer) for make in schedulers]
    closure = closure_of(optimizer, params)
    first = loss_of(*(p.float() for p in params)).item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in made:
            scheduler.step(loss.item()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    last = loss_of(*(p.float() for p in params)).item()
    assert last > first if given.kwargs.get("maximize") else last < first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_device_dtype(dtype: torch.dtype) -> None:
    """Weights of two dtypes, and where there is a GPU on two devices."""
    one, other = weights()[0], nn.Parameter(weights(dtype)[1].detach().to("cpu"))
    optimizer = INFO.optim_cls([one, other], lr=0.01)
    for _ in range(3):
        one.grad, other.grad = torch.ones_like(one), torch.ones_like(other)
        optimizer.step()
    assert [optimizer.state[p]["exp_avg_codes"].device for p in (one, other)] == [one.device, other.device]
    for p, start in ((one, weights()[0]), (other, weights(dtype)[1].to("cpu"))):
        assert bool((p < start).all())


@pytest.mark.parametrize("where", ["one tensor", "0-d"])
def test_tensor_lr(where: str) -> None:
    """A tensor as the rate steps like the number, and is neither replaced nor changed."""
    rate = torch.tensor([0.01]) if where == "one tensor" else torch.tensor(0.01)
    by_tensor, by_number = (trained(weights(), {"lr": lr}) for lr in (rate, float(rate)))
    assert_same(
        {k: v for k, v in snapshot(by_tensor).items() if "group" not in k},
        {k: v for k, v in snapshot(by_number).items() if "group" not in k},
    )
    assert isinstance(by_tensor.param_groups[0]["lr"], Tensor)
    assert torch.equal(by_tensor.param_groups[0]["lr"], rate)


# -- parameter groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_param_groups(name: str) -> None:
    """test_param_groups_lr and _weight_decay: a group's value for its tensors, the default for others."""
    value = {"lr": 0.05, "weight_decay": 0.5}[name]
    mixed, apart = weights(), weights()
    groups = [{"params": [("0", mixed[0])], name: value}, {"params": [("1", mixed[1])]}]
    optimizer = INFO.optim_cls(groups, lr=0.001)
    others = [
        INFO.optim_cls([(str(i), p)], **({"lr": 0.001} | ({name: value} if i == 0 else {})))
        for i, p in enumerate(apart)
    ]
    for _ in range(3):
        for params, steppers in ((mixed, [optimizer]), (apart, others)):
            for p in params:
                p.grad = None
            loss_of(*params).backward()
            for each in steppers:
                each.step()
    for a, b in zip(mixed, apart, strict=True):
        assert_same_bits(raw(a), raw(b))


# -- gradients that are missing or zero --------------------------------------------------------------------------


@every_input
def test_step_is_noop_when_params_have_no_grad(given: OptimizerInput) -> None:
    params = weights()
    optimizer = INFO.optim_cls(params, **copied(given.kwargs))
    before = snapshot(optimizer)
    optimizer.step()
    assert_same(before, snapshot(optimizer))
    assert not optimizer.state


@every_input
def test_step_is_noop_for_zero_grads(given: OptimizerInput) -> None:
    """With moments of zero and no weight decay; else decay and momentum act, as in torch's."""
    params = weights()
    optimizer = INFO.optim_cls(params, **copied(given.kwargs))
    for p in params:
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    unchanged = [torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert all(unchanged) == (not given.kwargs.get("weight_decay")), unchanged
    assert all(not raw(optimizer.state[p]["exp_avg_codes"]).any() for p in params)


@every_input
@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_empty_grad(given: OptimizerInput, shape: tuple[int, ...]) -> None:
    """test_grads_are_never_inplaced_into too: gradients are only read."""
    empty, full = nn.Parameter(torch.empty(shape, device=DEVICE)), weights()[1]
    optimizer = INFO.optim_cls([empty, full], **copied(given.kwargs))
    empty.grad, full.grad = torch.empty_like(empty), torch.full_like(full, 0.5)
    version, start = full.grad._version, full.detach().clone()
    optimizer.step()
    assert full.grad._version == version
    assert not torch.equal(full, start)
    assert empty.shape == shape


# -- state dicts -------------------------------------------------------------------------------------------------
#


def goes_on_in(given: OptimizerInput, saved_names: bool, own_names: bool, dropped: tuple[str, ...] = ()) -> None:
    """A state dict without these hyperparameters, loaded into another optimizer: the steps go on as if nothing was."""
    runs = []
    for params, has_names in ((weights(), saved_names), (weights(), own_names)):
        parts = zip(("weight", "bias"), params, strict=True) if has_names else params
        runs.append((INFO.optim_cls(parts, **copied(given.kwargs)), params))
    (optimizer, params), (other, clones) = runs
    for _ in range(3):
        optimizer.step(closure_of(optimizer, params))
    state = copy.deepcopy(optimizer.state_dict())
    for name in dropped:
        del state["param_groups"][0][name]
    other.load_state_dict(state)
    for p, clone in zip(params, clones, strict=True):
        clone.data.copy_(p)
    for _ in range(3):
        for each, own in runs:
            each.step(closure_of(each, own))
    assert_same(snapshot(optimizer), snapshot(other))


@every_input
@pytest.mark.parametrize(("saved_names", "own_names"), [(False, True), (True, False)])
def test_can_load_from_to_named_state_dict(given: OptimizerInput, saved_names: bool, own_names: bool) -> None:
    goes_on_in(given, saved_names, own_names)


@every_input
def test_can_load_older_state_dict(given: OptimizerInput) -> None:
    """Of a version that had fewer hyperparameters."""
    goes_on_in(given, False, False, LATER)


@every_input
@pytest.mark.parametrize("in_order", [True, False])
def test_state_dict_deterministic(given: OptimizerInput, in_order: bool) -> None:
    """A loaded optimizer goes on as the one it was saved from, also where its parameters come in another order."""
    params = weights()
    named = list(zip(("weight", "bias"), params, strict=True))
    optimizer = INFO.optim_cls(named, **copied(given.kwargs))
    for _ in range(3):
        optimizer.step(closure_of(optimizer, params))
    clones = tuple(nn.Parameter(p.detach().clone()) for p in params)
    other = INFO.optim_cls(zip(("weight", "bias"), clones, strict=True), **copied(given.kwargs))
    state = copy.deepcopy(optimizer.state_dict())
    if not in_order:
        state["state"] = dict(reversed(state["state"].items()))
    other.load_state_dict(state)
    for _ in range(6):
        for each, own in ((optimizer, params), (other, clones)):
            each.step(closure_of(each, own))
    assert_same(snapshot(optimizer), snapshot(other))


@every_input
@pytest.mark.parametrize("weights_only", [True, False])
def test_save_load_equality(given: OptimizerInput, weights_only: bool) -> None:
    """test_save_load_equality_with_weights_only, and without."""
    optimizer = trained(weights(), given.kwargs)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    other = INFO.optim_cls(weights(), **copied(given.kwargs))
    other.load_state_dict(loaded)
    a, b = ({k: v for k, v in snapshot(o).items() if k.partition(".")[2] != "weight"} for o in (optimizer, other))
    assert_same(a, b)


@every_input
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_deepcopy_and_pickle(given: OptimizerInput, how: Any) -> None:
    """test_deepcopy_copies_all_public_attrs and test_can_load_from_pickle, before and after steps."""
    for steps in (0, 3):
        optimizer = trained(weights(), given.kwargs, steps)
        other = how(optimizer)
        assert_same(snapshot(optimizer), snapshot(other))
        public = {name for name in optimizer.__dict__ if not name.startswith("_")}
        assert public == {name for name in other.__dict__ if not name.startswith("_")}
        assert all(a is not b for a, b in zip(*(o.param_groups[0]["params"] for o in (optimizer, other)), strict=True))


def test_state_dict_hooks() -> None:
    """Pre and post hooks of state_dict and load_state_dict, in their order, also with prepend."""
    seen: list[str] = []
    optimizer = trained(weights(), {}, 1)
    for name, prepend in (("second", False), ("first", True)):
        optimizer.register_state_dict_pre_hook(lambda o, name=name: seen.append(f"{name} before saving"), prepend)
        optimizer.register_load_state_dict_post_hook(lambda o, name=name: seen.append(f"{name} after loading"), prepend)

    def added(o: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "extra": 1}

    def halved(o: Any, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"] = copy.deepcopy(state_dict["param_groups"])
        state_dict["param_groups"][0]["lr"] = 0.5

    optimizer.register_state_dict_post_hook(added)
    handle = optimizer.register_load_state_dict_pre_hook(halved)
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert seen == [f"{n} {w}" for w in ("before saving", "after loading") for n in ("first", "second")]
    handle.remove()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == saved["param_groups"][0]["lr"] != 0.5


def test_step_hooks() -> None:
    """test_step_pre_hook, _post_hook and _all_hooks: global ones outside, a pre hook may change arguments."""
    params, seen = weights(), []
    optimizer = INFO.optim_cls(params, lr=0.01)
    closure = closure_of(optimizer, params)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": closure})),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        assert optimizer.step() is not None, "the hook's closure was called"
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"]
    assert optimizer.step() is None
    assert len(seen) == 4


def test_closure() -> None:
    """The closure is called once, with gradients on, and its loss returned."""
    params, calls = weights(), []
    optimizer = INFO.optim_cls(params, lr=0.01)
    closure = closure_of(optimizer, params)

    def counted() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return closure()

    with torch.no_grad():
        loss = optimizer.step(counted)
    assert calls == [True]
    assert loss.item() == pytest.approx(loss_of(*weights()).item())


# -- memory, errors ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE.type != "cuda", reason="memory is measured on CUDA")
def test_peak_memory() -> None:
    """test_peak_memory_foreach: a step needs less than AdamW's foreach, which holds a copy of the weights' size."""
    peaks = []
    for make in (functools.partial(Lamb16, lr=0.01), functools.partial(torch.optim.AdamW, lr=0.01, foreach=True)):
        params = [nn.Parameter(torch.ones(1 << 20, device=DEVICE)) for _ in range(8)]
        optimizer = make(params)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            optimizer.step()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del params, optimizer
    assert peaks[0] < peaks[1]


def test_complex_is_refused() -> None:
    """test_complex and test_complex_2d."""
    with pytest.raises(TypeError, match=r"complex.*view_as_real"):
        INFO.optim_cls([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


ERRORS = INFO.optim_error_inputs_func("cpu", torch.float32)


@pytest.mark.filterwarnings("always:optimizer contains a parameter group with duplicate:UserWarning")
@pytest.mark.parametrize("wrong", ERRORS, ids=lambda wrong: wrong.optimizer_error_input.desc)
def test_errors(wrong: ErrorOptimizerInput) -> None:
    given = wrong.optimizer_error_input
    assert wrong.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = weights() if given.params is None else given.params
    expect = pytest.warns if issubclass(wrong.error_type, Warning) else pytest.raises
    with expect(wrong.error_type, match=wrong.error_regex):
        INFO.optim_cls(params, **given.kwargs)


def test_non_empty_state() -> None:
    """Every tensor that was stepped has a state, of tensors on its device; nothing else keeps it alive."""
    params = weights()
    optimizer = trained(params, {"lr": 0.01}, 1)
    assert set(optimizer.state) == set(params)
    entries = list(itertools.chain.from_iterable(state.values() for state in optimizer.state.values()))
    assert all(isinstance(x, Tensor) and x.device == params[0].device for x in entries)
    del entries
    gc.collect()


class Betas(collections.abc.Sequence):  # type: ignore[type-arg]
    """A sequence that is neither a tuple nor a list, as omegaconf's ListConfig is one."""

    def __init__(self, *values: float) -> None:
        self.values = values

    def __getitem__(self, k: Any) -> Any:
        return self.values[k]

    def __len__(self) -> int:
        return len(self.values)


def test_betas_are_any_sequence_of_two_numbers() -> None:
    torch.optim.AdamW([torch.zeros(2, requires_grad=True)], betas=Betas(0.8, 0.99))  # type: ignore[arg-type]
    results = []
    for betas in (Betas(0.8, 0.99), (0.8, 0.99)):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 300))
        optimizer = Lamb16([("p", p)], lr=0.01, betas=betas, compile=False)  # type: ignore[arg-type]
        for _ in range(2):
            p.grad = torch.linspace(1, 3, 300)
            optimizer.step()
        results.append(p.detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("betas", [Betas(0.8), Betas(0.8, 1.0), "89"], ids=["one", "1.0", "a string"])
def test_other_sequences_are_refused(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas"):
        Lamb16([torch.zeros(2, requires_grad=True)], betas=betas)
