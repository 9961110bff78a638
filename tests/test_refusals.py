"""What cannot be stepped is refused before anything has moved; what looks as if it could not, and can, is stepped."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bits import raw
from helpers import all_params, assert_same, gradients, missing, parameters, take_steps
from lamb16 import Lamb16

TESTS = Path(__file__).parent


def in_a_process(code: str) -> str:
    """What the code prints, run in a process of its own: a segmentation fault is a failure of the test."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# -- tensor subclasses -------------------------------------------------------------------------------------------

SUBCLASSES = """
import sys
import helpers  # for what it sets
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.testing._internal.two_tensor import TwoTensor
from lamb16 import Lamb16

def wrapper(*names, dispatch=True, flat=True):
    class Wrapper(Tensor):
        def __new__(cls, data, *others):
            return Tensor._make_wrapper_subclass(
                cls, data.shape, data.stride(), data.storage_offset(), dtype=data.dtype, device=data.device
            )

        def __init__(self, *parts):
            for name, part in zip(names, parts):
                setattr(self, name, part)

        @classmethod
        def __torch_dispatch__(cls, func, types, args, kwargs=None):
            args, kwargs = tree_map_only(cls, lambda x: getattr(x, names[0]), (args, kwargs or {}))
            out = func(*args, **kwargs)
            if func is torch.ops.aten.copy_.default:
                return args[0]
            if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
                return cls(out)
            return out

    if flat:  # only what is there, as torchao's float8 weights
        Wrapper.__tensor_flatten__ = lambda self: ([name for name in names if hasattr(self, name)], None)
        Wrapper.__tensor_unflatten__ = classmethod(lambda cls, inner, *_: cls(*inner.values()))
    return Wrapper

class Named(Tensor):
    pass

class Own(nn.Parameter):
    pass

class Logging(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        with torch._C._DisableTorchDispatch():
            return tree_map_only(Tensor, lambda x: x.as_subclass(cls), func(*args, **(kwargs or {})))

One, Two, Opaque = wrapper("_elements"), wrapper("_elements", "_scale"), wrapper("_elements", flat=False)

def int8_mixed(x):
    from torchao.prototype.quantized_training.int8_mixed_precision import (
        Int8MixedPrecisionTrainingConfig, Int8MixedPrecisionTrainingLinearWeight
    )
    return Int8MixedPrecisionTrainingLinearWeight(x, Int8MixedPrecisionTrainingConfig())

def float8(x, scale=None):
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor
    return WeightWithDynamicFloat8CastTensor(x, LinearMMConfig(), torch.float8_e4m3fn, scale)

def mesh():
    import os, tempfile
    from torch.distributed.device_mesh import init_device_mesh
    if not torch.distributed.is_initialized():
        path = os.path.join(tempfile.mkdtemp(), "store")
        torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    return init_device_mesh("cpu", (1,))

def sharded(make):
    def shard(x):
        from torch.distributed.tensor import DTensor, Shard
        return DTensor.from_local(make(x), mesh(), [Shard(0)], run_check=False)
    return shard

STEPPED = {
    "wraps one": One,
    "wraps one and what detach drops": lambda x: Two(x, torch.ones(())),
    "wraps a wrapper": lambda x: One(One(x)),
    "named": lambda x: x.as_subclass(Named),
    "own parameter": Own,
    "buffer": lambda x: nn.Buffer(x),
    "DTensor": sharded(lambda x: x),
    "DTensor of a wrapper": sharded(One),
    "DTensor of a named": sharded(lambda x: x.as_subclass(Named)),
    "torchao int8": int8_mixed,
    "torchao float8": float8,
    "torchao float8 with scale": lambda x: float8(x, torch.ones(())),
    "torchao int8 in a DTensor": sharded(int8_mixed),
    "torchao float8 in a DTensor": sharded(float8),
}
REFUSED = {
    "two": lambda x: TwoTensor(x, x.clone()),
    "two in a DTensor": sharded(lambda x: TwoTensor(x, x.clone())),
    "two in a wrapper": lambda x: One(TwoTensor(x, x.clone())),
    "opaque": Opaque,
    "dispatching": lambda x: x.as_subclass(Logging),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "wraps another dtype": lambda x: wrapped_other(x, lambda y: y.to(torch.int8)),
    "wraps another shape": lambda x: wrapped_other(x, lambda y: y.view(-1)),
    "wraps a DTensor": lambda x: One(sharded(lambda y: y)(x)),
}

def wrapped_other(x, change):
    class Other(One):
        def __new__(cls, data, *others):
            return Tensor._make_wrapper_subclass(cls, (64, 48))
    return Other(change(x))

def inner(x):
    x = x.detach()
    while type(x) is not Tensor:
        x = x.to_local() if hasattr(x, "to_local") else x.as_subclass(Tensor) if type(x) is Named else (
            getattr(x, x.__tensor_flatten__()[0][0]) if hasattr(x, "__tensor_flatten__") else x.as_subclass(Tensor))
    return x

def weights(i):
    return torch.randn((64, 48), generator=torch.Generator().manual_seed(i))

def run(make, compile, steps=3):
    "A large one, and a packed one, and a plain one."
    ps = [make(weights(0)), make(weights(1)[:5]), weights(2)]
    ps = [x if type(x) is Own else nn.Parameter(x) for x in ps]
    optimizer = Lamb16(ps, lr=0.01, weight_decay=0.1, compile=compile)
    for t in range(steps):
        for i, p in enumerate(ps):
            grad = weights(10 * t + i + 5)[: p.shape[0]] * 0.1
            plain = type(p) in (Tensor, nn.Parameter) or "DTensor" not in type(p).__name__
            p.grad = grad if plain else sharded(lambda x: x)(grad)
        versions = [p._version for p in ps]
        optimizer.step()
        assert all(p._version > v for p, v in zip(ps, versions)), "not marked as changed"
    return [inner(p) for p in ps] + [inner(optimizer.state[p]["exp_avg_codes"]).view(torch.uint8) for p in ps]
"""

STEPPED = (
    "wraps one", "wraps one and what detach drops", "wraps a wrapper", "named", "own parameter", "buffer", "DTensor",
    "DTensor of a wrapper", "DTensor of a named", "torchao int8", "torchao float8", "torchao float8 with scale",
    "torchao int8 in a DTensor", "torchao float8 in a DTensor",
)  # fmt: skip
REFUSED = (
    "two", "two in a DTensor", "two in a wrapper", "opaque", "dispatching", "nested", "wraps another dtype",
    "wraps another shape", "wraps a DTensor",
)  # fmt: skip


@pytest.fixture(scope="module", params=["eager", "compiled"])
def stepped(request: pytest.FixtureRequest) -> dict[str, str]:
    """For each subclass whether it was stepped as plain tensors are, in one process for all of them."""
    code = (
        SUBCLASSES
        + f"""
compile = {request.param == "compiled"}
wanted = run(nn.Parameter, compile)
for name, make in STEPPED.items():
    try:
        found = run(make, compile)
    except Exception as error:
        print(f"{{name}}: {{type(error).__name__}} {{error}}".replace(chr(10), " "), flush=True)
    else:
        print(f"{{name}}: {{all(map(torch.equal, found, wanted))}}", flush=True)
"""
    )
    return dict(line.split(": ", 1) for line in in_a_process(code).splitlines() if ": " in line)


@pytest.mark.parametrize("name", STEPPED)
def test_a_subclass_that_wraps_one_tensor_is_stepped_as_the_tensor_is(stepped: dict[str, str], name: str) -> None:
    if name.startswith("torchao"):
        pytest.importorskip("torchao")
    assert stepped[name] == "True"


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_other_subclasses_are_refused_by_name_with_the_remedy(compile: bool) -> None:
    """As parameters at once, as gradients at the step, and as what a parameter has become between steps."""
    code = (
        SUBCLASSES
        + f"""
for name, make in REFUSED.items():
    odd = nn.Parameter(make(weights(0)))
    try:
        Lamb16([("good", nn.Parameter(weights(1))), ("odd.weight", odd)], compile={compile})
    except TypeError as error:
        print(f"{{name}}: {{error}}", flush=True)

for make in (REFUSED["two"], Opaque, REFUSED["dispatching"]):
    ps = [nn.Parameter(weights(i)) for i in range(2)]
    optimizer = Lamb16([("good", ps[0]), ("odd.weight", ps[1])], weight_decay=0.1, compile={compile})
    for t in range(2):
        for p in ps:
            p.grad = weights(5)
        before = [p.detach().clone() for p in ps]
        if t:
            ps[1].grad = make(weights(5))
        try:
            optimizer.step()
        except RuntimeError as error:
            print(f"gradient: {{error}}", flush=True)
            assert all(map(torch.equal, before, ps)) and int(optimizer.state[ps[0]]["step"]) == 1
        else:
            assert not t
    ps[0].grad = ps[1].grad = None
    torch.utils.swap_tensors(ps[1], nn.Parameter(make(weights(5)), requires_grad=False))
    ps[0].grad = ps[1].grad = weights(6)
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        print(f"swapped: {{error}}", flush=True)
        assert torch.equal(before[0], ps[0])
"""
    )
    lines = in_a_process(code).splitlines()
    found = [line.split(": ", 1) for line in lines if ": " in line]
    names = [name for name, _ in found]
    assert names == [*REFUSED, *["gradient", "swapped"] * 3]
    for _, text in found:
        assert "parameter odd.weight is a" in text
        assert any(remedy in text for remedy in ("plain tensor", "optimize its parts", "make a DTensor"))


FAKE = """
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from lamb16 import Lamb16

def pair(*shape):
    p = nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    return p

mode = FakeTensorMode()
with mode:
    fakes = [pair(64, 48), pair(5)]
    optimizer = Lamb16(fakes, weight_decay=0.1, compile=COMPILE, max_grad_norm=1.0)
    for _ in range(2):
        optimizer.step()
    assert type(optimizer.state[fakes[0]]["exp_avg_codes"]) is FakeTensor
real = [pair(64, 48), pair(5)]
other = Lamb16(real, weight_decay=0.1, compile=COMPILE)
for first in (True, False):
    before = [p.detach().clone() for p in real]
    codes = [s["exp_avg_codes"].clone() for s in other.state.values()]
    for what in (optimizer, other):
        try:
            if what is other:
                with mode:
                    other.step()
            else:
                optimizer.step()
        except RuntimeError as error:
            assert "within the same FakeTensorMode" in str(error), error
        else:
            raise SystemExit("no error")
    assert all(map(torch.equal, before, real)) and first == (not other.state)
    assert all(torch.equal(a.view(torch.uint8), s["exp_avg_codes"].view(torch.uint8))
               for a, s in zip(codes, other.state.values()))
    other.step()
"""


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_fake_tensors_are_stepped_under_their_mode_and_real_ones_outside(compile: bool) -> None:
    in_a_process(FAKE.replace("COMPILE", str(compile)))


# -- situations --------------------------------------------------------------------------------------------------


def named(compile: bool, shapes: Sequence[tuple[int, ...]] = ((64, 48), (2100,), (5, 4)), **options: Any) -> Lamb16:
    """After one step on the parameters a, b and c; their next gradients are there."""
    params = parameters(shapes)
    optimizer = Lamb16(list(zip("abc", params, strict=True)), lr=0.01, weight_decay=0.1, compile=compile, **options)
    take_steps(optimizer, [0])
    for p, grad in zip(params, gradients(params, 1), strict=True):
        p.grad = grad
    return optimizer


def freed(x: torch.Tensor) -> None:
    x.untyped_storage().resize_(0)


def an_inference_tensor(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


def negated(x: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(x.clone())


def set_data(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Lamb16, list[nn.Parameter]], None]:
    """Of b."""
    return lambda _, params: setattr(params[1], "data", change(params[1].data))


def set_entry(key: str, value: Any) -> Callable[[Lamb16, list[nn.Parameter]], None]:
    return lambda optimizer, params: optimizer.state[params[1]].update({key: value})


def set_option(name: str, value: Any) -> Callable[[Lamb16, list[nn.Parameter]], None]:
    return lambda optimizer, _: optimizer.param_groups[0].update({name: value})


def set_attribute(name: str, value: Any) -> Callable[[Lamb16, list[nn.Parameter]], None]:
    return lambda optimizer, _: setattr(optimizer, name, value)


def share_state(optimizer: Lamb16, params: list[nn.Parameter]) -> None:
    params[1].grad = None
    params[1].data = params[0].data.clone()
    params[1].grad = params[0].grad
    optimizer.state[params[1]] = optimizer.state[params[0]]


def share_codes(optimizer: Lamb16, params: list[nn.Parameter]) -> None:
    share_state(optimizer, params)
    optimizer.state[params[1]] = dict(optimizer.state[params[0]])


def new_parameter_without_name(optimizer: Lamb16, params: list[nn.Parameter]) -> None:
    new = parameters([(3,)])[0]
    new.grad = torch.ones_like(new)
    optimizer.param_groups[0]["params"].append(new)


def repaired_and_wrong(optimizer: Lamb16, params: list[nn.Parameter]) -> None:
    """The state of a can be repaired, that of c cannot be used."""
    codes = optimizer.state[params[0]]["exp_avg_codes"]
    optimizer.state[params[0]]["exp_avg_codes"] = torch.full_like(codes.view(torch.uint8), 0x7E)
    optimizer.state[params[2]]["exp_avg_codes"] = torch.zeros(3, device=codes.device)


WRONG_OPTIONS: list[tuple[str, Any]] = [
    ("lr", math.nan), ("lr", math.inf), ("lr", None), ("lr", torch.ones(2)), ("lr", torch.tensor(math.nan)),
    ("lr", torch.tensor(1)), ("betas", 0.9), ("betas", (0.9, 0.99, 0.999)), ("eps", "1"), ("eps", 0.0),
    ("weight_decay", None), ("trust_scale", -1.0), ("trust_lr", 0.0), ("trust_clip", math.nan),
    ("bias_correction", None), ("nesterov", 2), ("caution", 2), ("maximize", None), ("moment_dtype", ["float8"]),
    ("param_rounding", "up"),
]  # fmt: skip


def test_a_wrong_value_of_every_hyperparameter_is_among_them() -> None:
    assert missing(name for name, _ in WRONG_OPTIONS) == set()


# What is done after a step, and what the next step says to it.
SITUATIONS: dict[str, tuple[Callable[[Lamb16, list[nn.Parameter]], Any], str]] = {
    "expanded": (set_data(lambda x: x[:1].clone().expand(2100)), "elements of parameter b share memory.*clone"),
    "inference": (set_data(an_inference_tensor), "parameter b is an inference tensor.*clone"),
    "negated": (set_data(negated), r"parameter b is a lazily negated view.*resolve_neg"),
    "freed": (lambda _, params: freed(params[1]), "parameter b has no memory.*bring it back"),
    "freed gradient": (lambda _, params: freed(params[1].grad), "the gradient of parameter b has no memory.*None"),
    "shared": (
        lambda _, params: setattr(params[1], "data", params[0].data.view(-1)[10:2110]),
        "parameter a and parameter b share memory.*clone",
    ),
    "shared state": (share_state, "exp_avg.* of parameter a and exp_avg.* of parameter b share memory"),
    "shared codes": (share_codes, "exp_avg.* of parameter a and exp_avg.* of parameter b share memory"),
    "freed codes": (
        lambda optimizer, params: freed(optimizer.state[params[1]]["exp_avg_codes"]),
        "exp_avg_codes of parameter b has no memory",
    ),
    "three scales": (set_entry("exp_avg_scale", torch.ones(3)), "exp_avg_scale of parameter b is .*one number"),
    "no step": (set_entry("step", None), "step of parameter b is None"),
    "no codes": (set_entry("exp_avg_codes", None), "exp_avg_codes of parameter b is None.*load_state_dict"),
    "one repaired, one wrong": (repaired_and_wrong, "parameter c has shape"),
    "no name": (new_parameter_without_name, "4 parameters and 3 names"),
    "sparse gradient": (
        lambda _, params: setattr(params[2], "grad", params[2].detach().to_sparse()),
        "sparse gradients.*c",
    ),
    "found_inf of two": (set_attribute("found_inf", torch.zeros(2)), "found_inf=.*one element"),
    "found_inf is no tensor": (set_attribute("found_inf", 0.0), "found_inf=0.0.*one element"),
    "found_inf on meta": (set_attribute("found_inf", torch.zeros((), device="meta")), "found_inf=.*one element"),
    "grad_scale of two": (set_attribute("grad_scale", torch.ones(2)), "grad_scale=.*one element"),
    "grad_scale is no tensor": (set_attribute("grad_scale", 2.0), "grad_scale=2.0.*one element"),
    "max_grad_norm": (set_attribute("max_grad_norm", "1"), "max_grad_norm='1' is invalid"),
    **{
        f"{name}={value!r}": (set_option(name, value), f"{name}=.* is invalid; it must be")
        for name, value in WRONG_OPTIONS
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("fresh", [False, True], ids=["the next step", "a new set of tensors"])
def test_what_can_be_foreseen_is_refused_before_anything_changes(name: str, fresh: bool) -> None:
    """In a step over the same tensors, and in one over others, two of them, which makes a new plan."""
    change, message = SITUATIONS[name]
    optimizer = named(False)
    params = all_params(optimizer)
    if fresh:
        other = params[2] if name not in ("one repaired, one wrong", "sparse gradient") else params[1]
        other.grad = None
        optimizer.step()
    change(optimizer, params)
    before = everything(optimizer)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as error:
            optimizer.step()
        assert "Lamb16" in str(error.value)
        assert_same(before, everything(optimizer))


def everything(optimizer: Lamb16) -> dict[str, Any]:
    """The bytes of all that has memory."""
    found = {}
    for i, p in enumerate(all_params(optimizer)):
        for key, x in {"weight": p, **optimizer.state.get(p, {})}.items():
            lives = isinstance(x, torch.Tensor) and x.untyped_storage().nbytes()
            found[f"{i}.{key}"] = raw(x.resolve_neg()) if lives else id(x)
    return found


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((64, 48), (0, 1)),
        ((64, 48), (2, 1)),
        ((3, 2), (1, 3)),
        ((3, 4), (4, 3)),  # 0, 3, 6, 9, then 4, 7, 10, 13, then 8, 11, 14, 17: not nested, and apart
        ((4, 4), (4, 3)),  # then 12: it would have been the fifth of the first row, and is not there
        ((4, 5), (4, 3)),
        ((2, 2), (3, 2)),
        ((1, 5), (0, 1)),
        ((5, 1, 3), (3, 1, 1)),
    ],
    ids=str,
)
def test_overlapping_strides_are_told_from_others(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    x = torch.zeros(4000).as_strided(shape, strides)
    indices = itertools.product(*map(range, shape))
    places = {sum(i * step for i, step in zip(index, strides, strict=True)) for index in indices}
    shares = len(places) < math.prod(shape)
    p = nn.Parameter(x)
    p.grad = torch.ones(shape)
    optimizer = Lamb16([p], compile=False, weight_decay=0.1)
    if shares:
        with pytest.raises(ValueError, match="elements of parameter 0 share memory"):
            optimizer.step()
        assert not optimizer.state
    else:
        optimizer.step()


def test_interleaved_views_of_one_tensor_are_stepped(compile_mode: bool) -> None:
    """Columns, halves and a column of the rest share a storage and no element."""
    whole = parameters([(64, 100)])[0].detach()
    views = [whole[:, :48], whole[:, 48::2], whole[:, 49::2]]
    apart = [nn.Parameter(x.clone()) for x in views]
    together = [nn.Parameter(x) for x in views]
    for params in (together, apart):
        take_steps(Lamb16(params, lr=0.01, weight_decay=0.1, compile=compile_mode), range(2))
    assert all(map(torch.equal, together, apart))
    assert together[0].untyped_storage().data_ptr() == together[2].untyped_storage().data_ptr()
    optimizer = Lamb16([*together, nn.Parameter(whole[:, 99:])], compile=False)
    with pytest.raises(ValueError, match="parameter 2 and parameter 3 share memory"):
        take_steps(optimizer, [0])
    assert not optimizer.state


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_weights_may_be_gradients(compile_mode: bool, whose: str) -> None:
    """As long as nothing moves: the step reads them as they were before it."""
    found = []
    for copy in (False, True):
        params = parameters([(64, 48), (64, 48), (5,), (5,)])
        sources = params if whose == "its own" else [params[i] for i in (1, 0, 3, 2)]
        for p, source in zip(params, sources, strict=True):
            p.grad = source.detach().clone() if copy else source.detach()
        Lamb16(params, lr=0.01, weight_decay=0.1, compile=compile_mode).step()
        found.append(params)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float16, torch.int64], ids=str)
def test_found_inf_may_have_any_dtype(compile_mode: bool, dtype: torch.dtype) -> None:
    optimizer = named(compile_mode)
    before = everything(optimizer)
    optimizer.found_inf = torch.ones((), dtype=dtype)  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.skipped == 3
    optimizer.found_inf = torch.zeros((), dtype=dtype)  # type: ignore[attr-defined]
    assert torch.equal(everything(optimizer)["0.weight"], before["0.weight"])
    optimizer.step()
    assert not torch.equal(everything(optimizer)["0.weight"], before["0.weight"])


def test_a_negated_gradient_is_read_as_what_it_is(compile_mode: bool) -> None:
    found = []
    for lazily in (False, True):
        optimizer = named(compile_mode)
        for p in all_params(optimizer):
            p.grad = torch._neg_view(p.grad) if lazily else -p.grad
        optimizer.step()
        found.append(everything(optimizer))
    assert_same(*found)


def test_steps_in_and_out_of_inference_mode(compile_mode: bool) -> None:
    """What is made in one works in the other."""
    optimizer, plain = (Lamb16(parameters(), lr=0.01, weight_decay=0.1, compile=compile_mode) for _ in range(2))
    for t in range(4):
        take_steps(plain, [t])
        with torch.inference_mode(t % 2 == 1):
            take_steps(optimizer, [t])
        assert_same(everything(plain), everything(optimizer))
