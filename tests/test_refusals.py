"""What cannot be stepped is refused before anything has moved; what looks as if it could not, and can, is stepped."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def in_a_process(code: str) -> str:
    """What the code prints, run in a process of its own: a segmentation fault is a failure of the test."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# -- tensor subclasses -------------------------------------------------------------------------------------------

SUBCLASSES = """
import sys
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
    def spread(x):
        from torch.distributed.tensor import DTensor, Shard
        return DTensor.from_local(make(x), mesh(), [Shard(0)], run_check=False)
    return spread

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
    odd = nn.Parameter(make(weights(0)), requires_grad=False)
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
