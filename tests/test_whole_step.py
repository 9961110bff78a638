"""Lamb16 inside of what others trace, count, fake and fork: compiled training steps, dispatch modes, processes."""

import copy
import functools
import multiprocessing.connection
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from helpers import DEVICE, SHAPES, all_params, assert_same, model, parameters, snapshot, take_steps
from lamb16 import Lamb16
from lamb16.step import compiled, update
from lamb16.step.graph_code import Call
from lamb16.step.kinds import Graph, Kind

BASE = {"lr": 0.01, "weight_decay": 0.1}


def training_step(optimizer: torch.optim.Optimizer, network: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = network(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


# -- torch.compile around a whole training step ------------------------------------------------------------------


# Dynamo looks at .grad of what is no leaf, and at what it does not trace.
DYNAMOS_WARNINGS = pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:Profiler record function")


def breaks(make: Callable[[torch.nn.Module], torch.optim.Optimizer], dynamic: bool | None) -> int:
    """Graph breaks of four training steps as one compiled function."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["graph_break"]
    counters.clear()
    network = model()
    step = torch.compile(training_step(make(network), network), backend="eager", dynamic=dynamic)
    for _ in range(4):
        step(torch.ones(2, 48, device=DEVICE))
    return sum(counters.values())


@DYNAMOS_WARNINGS
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_training_step_breaks_no_more_often_than_adamws(compile_mode: bool, dynamic: bool | None) -> None:
    adamw = breaks(lambda network: torch.optim.AdamW(network.parameters()), dynamic)
    own = breaks(lambda network: Lamb16(network.named_parameters(), compile=compile_mode), dynamic)
    assert 0 < own <= adamw


@DYNAMOS_WARNINGS
def test_a_compiled_training_step_gives_the_bits_of_the_plain_one(compile_mode: bool) -> None:
    found = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        network = model()
        optimizer = Lamb16(network.named_parameters(), **BASE, compile=compile_mode)
        step = wrap(training_step(optimizer, network))
        for t in range(3):
            step(torch.full((2, 48), 0.5 + t, device=DEVICE))
        found.append(snapshot(optimizer))
    assert_same(*found)


# -- modes -------------------------------------------------------------------------------------------------------


class Passing(TorchDispatchMode):
    """Does nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """As in a new process, without the compiler's time; the graphs that are compiled, with the modes around it."""
    monkeypatch.setattr(compiled, "_graph", functools.cache(compiled._Lazy))
    found: list[object] = []

    def compile_once(graph: Graph, kind: Kind) -> Call:
        found.append((graph, torch.utils._python_dispatch._get_current_dispatch_mode()))
        return lambda arguments: update.FUNCTIONS[graph.function](*arguments)

    monkeypatch.setattr(compiled, "compile_once", compile_once)
    return found


MODES = {
    "TorchDispatchMode": Passing,
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
    "MemTracker": MemTracker,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_first_step_compiles_outside_of_modes(nothing_compiled: list[object], mode: str) -> None:
    inside, outside = (Lamb16(parameters(), **BASE) for _ in range(2))
    with MODES[mode]():
        take_steps(inside, range(1))
    assert len(nothing_compiled) > 4
    assert {around for _, around in nothing_compiled} == {None}
    take_steps(outside, range(1))
    assert_same(snapshot(inside), snapshot(outside))


def test_a_graph_really_compiles_under_a_mode() -> None:
    lazy = compiled._Lazy(Graph("inspect"), Kind(DEVICE))
    with Passing():
        lazy.prepare()
    assert lazy.code is not None


# -- tensors without memory ----------------------------------------------------------------------------------------


def test_meta_parameters_are_stepped_eagerly(nothing_compiled: list[object]) -> None:
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = Lamb16(params, **BASE, max_grad_norm=1.0)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert nothing_compiled == []
    assert all(entry.is_meta for p in params for entry in optimizer.state[p].values())
    assert [optimizer.state[p]["exp_avg_codes"].shape for p in params] == [p.shape for p in params]


def test_fake_parameters_are_stepped_eagerly(nothing_compiled: list[object]) -> None:
    """Without a warning (which pytest makes an error) that they have no data pointer."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape)) for shape in SHAPES]
        optimizer = Lamb16(params, **BASE)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
    assert nothing_compiled == []
    assert all(isinstance(entry, FakeTensor) for p in params for entry in optimizer.state[p].values())


# -- inference mode ----------------------------------------------------------------------------------------------


def test_steps_in_inference_mode_and_outside_follow_each_other(compile_mode: bool) -> None:
    inside, outside = (Lamb16(parameters(), **BASE, compile=compile_mode) for _ in range(2))
    take_steps(outside, range(4))
    with torch.inference_mode():
        take_steps(inside, [0])
        take_steps(inside, [1])
    params = all_params(inside)
    assert not any(entry.is_inference() for p in params for entry in inside.state[p].values())
    take_steps(inside, [2])
    with torch.inference_mode():
        inside.load_state_dict(inside.state_dict())
    take_steps(inside, [3])
    assert_same(snapshot(inside), snapshot(outside))


def test_inference_tensors_are_stepped_in_inference_mode(compile_mode: bool) -> None:
    plain = Lamb16(parameters(), **BASE, compile=compile_mode)
    with torch.inference_mode():
        params = [nn.Parameter(p.detach().clone()) for p in all_params(plain)]
        optimizer = Lamb16(params, **BASE, compile=compile_mode)
        take_steps(optimizer, range(2))
    assert params[0].is_inference()
    take_steps(plain, range(2))
    assert_same(snapshot(optimizer), snapshot(plain))


# -- processes ---------------------------------------------------------------------------------------------------


RECORDED = 3  # steps after which the next one is recorded launches and one look


def _go_on(optimizer: Lamb16, sent: multiprocessing.connection.Connection) -> None:
    take_steps(optimizer, [RECORDED])
    sent.send_bytes(pickle.dumps(snapshot(optimizer)))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="CUDA does not survive a fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_goes_on_after_a_compiled_step(compile_mode: bool) -> None:
    """With one thread: OpenMP's threads do not survive a fork, whoever's code runs in them."""
    assert torch.get_num_threads() == 1
    optimizer = Lamb16(parameters(), **BASE, compile=compile_mode)
    take_steps(optimizer, range(RECORDED))
    context = multiprocessing.get_context("fork")
    received, sent = context.Pipe(duplex=False)
    child = context.Process(target=_go_on, args=(optimizer, sent))
    child.start()
    assert received.poll(60), "the child hangs"
    theirs = pickle.loads(received.recv_bytes())
    child.join(60)
    assert child.exitcode == 0
    take_steps(optimizer, [RECORDED])
    assert_same(theirs, snapshot(optimizer))


def test_threads_step_their_optimizers_at_once(compile_mode: bool) -> None:
    """What is recorded has memory of its own for every optimizer: launches run without Python's lock."""
    own = [parameters([(300, 300), (7,)] * 3, seed=seed) for seed in range(3)]
    optimizers = [Lamb16([(str(i), p) for i, p in enumerate(x)], **BASE, compile=compile_mode) for x in own]
    alone = [copy.deepcopy(optimizer) for optimizer in optimizers]
    threads = [threading.Thread(target=take_steps, args=(optimizer, range(20))) for optimizer in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for optimizer, expected in zip(optimizers, alone, strict=True):
        take_steps(expected, range(20))
        assert_same(snapshot(optimizer), snapshot(expected))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_after_recorded_steps_have_memory_of_their_own(
    copied: Callable[[Lamb16], Lamb16], compile_mode: bool
) -> None:
    optimizer, expected = (Lamb16(parameters(), **BASE, compile=compile_mode) for _ in range(2))
    take_steps(optimizer, range(RECORDED + 1))
    take_steps(expected, range(RECORDED + 1))
    other, before = copied(optimizer), snapshot(expected)
    take_steps(other, [7, 8])
    assert_same(snapshot(optimizer), before)
    for each in (optimizer, expected):
        take_steps(each, [7, 8])
    assert_same(snapshot(optimizer), snapshot(expected))
    assert_same(snapshot(other), snapshot(expected))
