"""What Lamb16 refuses, in which words, and that a refusal changes nothing."""

import functools
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from helpers import all_params, assert_same, parameters, snapshot, take_steps
from lamb16 import Lamb16, hyper
from lamb16.step import compiled
from lamb16.step.kinds import Graph, Kind

BAD = [
    ("lr", -0.1),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", "0.1"),
    ("lr", None),
    ("lr", True),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor(-0.1)),
    ("lr", torch.tensor(1)),
    ("betas", (1.0, 0.999)),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.999)),
    ("betas", (0.9, math.nan)),
    ("betas", (0.9,)),
    ("betas", (0.9, 0.99, 0.999)),
    ("betas", 0.9),
    ("betas", ("0.9", 0.999)),
    ("eps", 0.0),
    ("eps", -1e-6),
    ("eps", 1e-39),
    ("eps", 1.5),
    ("eps", math.nan),
    ("weight_decay", -0.01),
    ("weight_decay", math.inf),
    ("weight_decay", None),
    ("trust_scale", -0.1),
    ("trust_scale", math.nan),
    ("trust_lr", 0.0),
    ("trust_lr", -1.0),
    ("trust_lr", math.inf),
    ("trust_clip", 0.0),
    ("trust_clip", math.nan),
    ("bias_correction", 1),
    ("bias_correction", "no"),
    ("nesterov", 1),
    ("caution", None),
    ("maximize", None),
    ("moment_dtype", "fp8"),
    ("moment_dtype", torch.float32),
    ("moment_dtype", None),
    ("moment_dtype", ["float8"]),
    ("param_rounding", "up"),
    ("param_rounding", None),
    ("param_rounding", True),
]
EDGES: list[dict[str, Any]] = [
    {"lr": 0.0},
    {"lr": 1},
    {"betas": (0.0, 0.0)},
    {"betas": [0.9, 0.99]},
    {"eps": 2.0**-100},
    {"eps": 1},
    {"trust_scale": 0},
    {"trust_scale": 3.0},
    {"trust_clip": 1e-3},
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x))
def test_a_bad_hyperparameter_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        Lamb16(parameters(), **{name: value})
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda x: str(x))
def test_a_bad_hyperparameter_of_a_group_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        Lamb16([{"params": parameters()}, {"params": parameters(), name: value}], weight_decay=0.1)
    assert f"{name}={value!r}" in str(error.value)
    assert "group 1" in str(error.value)


@pytest.mark.parametrize("edge", EDGES, ids=str)
def test_the_ends_of_the_ranges_work(edge: dict[str, Any]) -> None:
    optimizer = Lamb16(parameters(), **{"weight_decay": 0.1, "compile": False, **edge})
    take_steps(optimizer, range(2))
    assert all(bool(p.isfinite().all()) and optimizer.state[p]["step"] == 2 for p in all_params(optimizer))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_scalars_are_numbers(dtype: str) -> None:
    """A LambdaLR whose lambda computes with numpy sets such learning rates."""
    number = getattr(pytest.importorskip("numpy"), dtype)(0.125)
    theirs, mine = (Lamb16(parameters(), lr=lr, weight_decay=lr, compile=False) for lr in (number, 0.125))
    for optimizer in (theirs, mine):
        take_steps(optimizer, range(2))
    assert_same(snapshot(theirs), snapshot(mine))


def test_every_hyperparameter_is_an_argument_with_the_declared_default() -> None:
    found = {
        name: x.default for name, x in inspect.signature(Lamb16.__init__).parameters.items() if name in hyper.NAMES
    }
    assert list(found.items()) == list(vars(hyper.Hyper()).items())
    assert set(hyper.NAMES) == {name for name, _ in BAD}, "each is tried with wrong values"


BAD_NORMS = [0.0, -1.0, math.nan, -math.inf, True, "1", torch.tensor(1.0)]


@pytest.mark.parametrize("value", BAD_NORMS, ids=str)
def test_a_bad_max_grad_norm_is_named(value: object) -> None:
    """Given at the start, or set between steps: before anything has moved."""
    with pytest.raises(ValueError, match=r"max_grad_norm=.* is invalid; it must be None or a number > 0"):
        Lamb16(parameters(), max_grad_norm=value)
    optimizer = Lamb16(parameters(), weight_decay=0.1, max_grad_norm=1.0, compile=False)
    take_steps(optimizer, [0])
    before = snapshot(optimizer)
    optimizer.max_grad_norm = value
    with pytest.raises(ValueError, match="max_grad_norm"):
        take_steps(optimizer, [1])
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize(("name", "value"), [("compile", 1), ("compile", None), ("seed", 0.5), ("seed", True)])
def test_bad_compile_and_seed_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Lamb16(parameters(), **{name: value})


@pytest.mark.parametrize("name", ["compile", "seed"])
def test_compile_and_seed_are_not_for_groups(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be set in a parameter group"):
        Lamb16([{"params": parameters(), name: 7}])
    optimizer = Lamb16([{"params": parameters(), "compile": True, "seed": 0}])  # as ZeroRedundancyOptimizer does
    assert not {"compile", "seed"} & set(optimizer.param_groups[0])


def test_a_bad_value_set_before_the_first_step_is_refused_by_it() -> None:
    optimizer = Lamb16(parameters(), compile=False)
    optimizer.param_groups[0]["eps"] = 0.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"eps=0\.0"):
        take_steps(optimizer, [0])
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (torch.zeros(3, dtype=torch.complex64), "complex"),
        (torch.zeros(3, dtype=torch.float64), "float64"),
        (torch.zeros(3, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(3, 3).to_sparse(), "sparse"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_parameter_that_cannot_be_optimized_is_refused_by_name(bad: torch.Tensor, word: str) -> None:
    named = [("fine.weight", parameters()[0]), ("odd.weight", nn.Parameter(bad))]
    with pytest.raises(TypeError, match=rf"odd\.weight.*{word}"):
        Lamb16(named)
    with pytest.raises(TypeError, match=rf"parameter 1 .*{word}"):
        Lamb16([p for _, p in named])


def test_a_refused_group_is_not_added() -> None:
    optimizer = Lamb16(parameters(), lr=0.01, weight_decay=0.1, compile=False)
    for group, error in (
        ({"params": [nn.Parameter(torch.zeros(2).double())]}, TypeError),
        ({"params": parameters(), "eps": 0.0}, ValueError),
        ({"params": all_params(optimizer)}, ValueError),
        (parameters(), TypeError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(group)  # type: ignore[arg-type]
        assert len(optimizer.param_groups) == 1
    take_steps(optimizer, [0])
    assert len(optimizer.state) == 3


@pytest.mark.parametrize("fresh", [True, False], ids=["first step", "later step"])
def test_a_sparse_gradient_is_refused_before_anything_changes(fresh: bool) -> None:
    network = nn.ModuleDict({"head": nn.Linear(4, 2), "table": nn.Embedding(10, 4, sparse=True)})
    optimizer = Lamb16(network.named_parameters(), lr=0.01, weight_decay=0.1, compile=False)
    if not fresh:
        take_steps(optimizer, [0])
    before = snapshot(optimizer)
    optimizer.zero_grad()
    network["head"](network["table"](torch.tensor([1, 3]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*table\.weight.*sparse=False"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


def test_a_gradient_of_another_dtype_is_refused_by_name() -> None:
    p = parameters([(3,)])[0]
    p.grad_dtype = torch.float64
    p.grad = torch.ones_like(p, dtype=torch.float64)
    optimizer = Lamb16([("odd.weight", p)], compile=False)
    with pytest.raises(RuntimeError, match=r"odd\.weight.*float64"):
        optimizer.step()
    assert not optimizer.state


def test_a_parameter_that_turned_into_float64_is_refused() -> None:
    network = nn.Linear(4, 2)
    optimizer = Lamb16(network.named_parameters(), lr=0.01, weight_decay=0.1, compile=False)
    take_steps(optimizer, [0])
    optimizer.zero_grad()
    network.double()
    before = snapshot(optimizer)
    with pytest.raises((TypeError, RuntimeError), match=r"weight.*float64"):
        take_steps(optimizer, [1])
    assert_same(before, snapshot(optimizer))


def test_a_parameter_that_changed_its_shape_is_refused() -> None:
    p = parameters([(8, 8)])[0]
    optimizer = Lamb16([("odd.weight", p)], lr=0.01, weight_decay=0.1, compile=False)
    take_steps(optimizer, [0])
    p.grad, p.data = None, torch.ones(8, 4, device=p.device)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, RuntimeError), match=r"odd\.weight.*shape"):
        take_steps(optimizer, [1])
    assert_same(before, snapshot(optimizer))


def test_moment_dtype_cannot_change_after_the_first_step() -> None:
    optimizer = Lamb16(parameters(), lr=0.01, weight_decay=0.1, compile=False)
    take_steps(optimizer, [0])
    optimizer.param_groups[0]["moment_dtype"] = "float32"
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="moment_dtype cannot change"):
        take_steps(optimizer, [1])
    assert_same(before, snapshot(optimizer))


# -- no compiler -------------------------------------------------------------------------------------------------


def test_a_broken_compiler_changes_nothing_and_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        def call(*args: object) -> None:
            raise OSError("no such compiler")

        return call

    optimizer = Lamb16(parameters(), lr=0.01, weight_decay=0.1)
    before = snapshot(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_graph", functools.cache(compiled._graph.__wrapped__))  # nothing compiled yet
        patch.setattr(torch, "compile", broken)
        raises = pytest.raises(RuntimeError, match=r"no such compiler.*compile=False")
        with torch._inductor.config.patch(force_disable_caches=True), raises as error:
            take_steps(optimizer, [0])
    assert isinstance(error.value.__cause__, OSError)
    assert_same(before, snapshot(optimizer))
    assert optimizer.skipped == 0
    # Once there is a compiler the optimizer goes on as if nothing had happened.
    usual = Lamb16(parameters(), lr=0.01, weight_decay=0.1, compile=False)
    for each in (optimizer, usual):
        take_steps(each, [0])
    assert_same(snapshot(optimizer), snapshot(usual))


NO_COMPILER = """
import sys
import torch
from lamb16 import Lamb16

p = torch.nn.Parameter(torch.ones(5))
p.grad = torch.ones(5)
optimizer = Lamb16([p], weight_decay=0.1)
compile, torch.compile = torch.compile, lambda *args, **more: sys.exit("it traces before it looks for a compiler")
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
else:
    raise SystemExit("compiled without a compiler")
torch.compile = compile
assert torch.equal(p.detach(), torch.ones(5)) and not optimizer.state_dict()["state"], optimizer.state
Lamb16([p], weight_decay=0.1, compile=False).step()
assert not torch.equal(p.detach(), torch.ones(5))
with torch.compiler.set_stance("force_eager"):  # in which nothing is compiled
    Lamb16([p], weight_decay=0.1).step()
"""


SWITCHED = """
import torch
from torch import nn
from lamb16 import Lamb16

def steps(compile):
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (3000, 70)]
    optimizer = Lamb16(params, lr=0.01, compile=compile)
    for t in range(2):
        for p in params:
            p.grad = torch.linspace(-2, t, p.numel())
        optimizer.step()
    return params

for compile in (True, True, False):
    with {switch}:
        found = steps(compile)
    print([p.detach().view(torch.int32).sum(dtype=torch.int64).item() for p in found])
"""
CONFIG, STANCE = "torch._dynamo.config.disable", "torch.compiler.set_stance"
SWITCHES = {  # in the environment, in a program, and what is said of them
    "TORCH_COMPILE_DISABLE": ("1", "torch.no_grad()", "TORCH_COMPILE_DISABLE"),
    "TORCHDYNAMO_DISABLE": ("1", "torch.no_grad()", "TORCHDYNAMO_DISABLE"),
    "config": ("", "torch._dynamo.config.patch(disable=True)", CONFIG),
    "force_eager": ("", f"{STANCE}('force_eager')", f"{STANCE}('force_eager')"),
    "eager_on_recompile": ("", f"{STANCE}('eager_on_recompile')", f"{STANCE}('eager_on_recompile')"),
    "backend": ("", f"{STANCE}(force_backend='eager')", f"{STANCE}('default', force_backend='eager')"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_turns_the_compiler_off_gives_eager_steps_with_one_warning(name: str) -> None:
    value, switch, said = SWITCHES[name]
    environment = os.environ | ({name: value} if value else {})
    code = SWITCHED.replace("{switch}", switch)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("torch.compile is turned off") == 1
    assert said in done.stderr
    assert "compiles its step" not in done.stderr
    assert len(set(done.stdout.splitlines())) == 1


def test_what_forbids_to_compile_is_named() -> None:
    """Where nothing is to be compiled any more, steps go on."""
    code = (
        SWITCHED.partition("for compile")[0]
        + f"""
for compile in (True, False):
    try:
        with {STANCE}("fail_on_recompile"):
            print(len(steps(compile)))
    except RuntimeError as error:
        print(error)
steps(True)
with {STANCE}("fail_on_recompile"):
    print(len(steps(True)))
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, eager, compiled_before = done.stdout.splitlines()
    assert 'torch.compiler.set_stance("fail_on_recompile") forbids' in refused
    assert "compiler that works" not in refused
    assert (eager, compiled_before) == ("2", "2")


@pytest.mark.parametrize("cache", ["empty", "full"])
def test_without_a_compiler_the_message_names_it_and_the_eager_step_works(tmp_path: Path, cache: str) -> None:
    if sys.platform == "win32":
        pytest.skip("the fake compiler is a Unix program")
    if cache == "full":
        take_steps(Lamb16(parameters([(5,)]), weight_decay=0.1), [0])
        environment, name = os.environ | {"PATH": str(tmp_path)}, str(torch._inductor.config.cpp.cxx[1])
    else:
        environment, name = os.environ | {"CXX": "false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}, "false"
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    said = ("could not compile", "InvalidCxxCompiler", f"looks for {name} (CXX ", "apt install g++", "compile=False")
    assert [words for words in said if words not in line] == [], line


def test_the_message_for_cuda_names_triton_and_its_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiled, "compile_once", lambda *given: (_ for _ in ()).throw(OSError("nothing there")))
    with pytest.raises(RuntimeError, match=r"nothing there.*pip install triton.*gcc or clang.*CC.*compile=False"):
        compiled._Lazy(Graph("scale"), Kind(torch.device("cuda"))).prepare()


def test_the_cause_is_told_from_what_torch_wraps_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise BackendCompilerFailed(lambda: None, OSError("the disk is full"), None)

    monkeypatch.setattr(compiled, "compile_once", fail)
    with pytest.raises(RuntimeError, match=r"\(OSError: the disk is full\)"):
        compiled._Lazy(Graph("scale"), Kind(torch.device("cpu"))).prepare()
