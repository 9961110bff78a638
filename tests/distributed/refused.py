"""Wrong uses of sharded parameters; each returns the message that this rank got. `ranks.py` runs these."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import sharded
from bits import raw
from helpers import assert_same, differing
from lamb16 import Lamb16, release_gradients
from lamb16.sharding.layout import layout, like, local
from lamb16.sharding.reduction import BoundReduction


def message(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def uneven_strided() -> str:
    """Seven rows, tensor parallel over two ranks and FSDP2 over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    model = nn.Sequential(nn.Linear(4, 7))
    parallelize_module(model, mesh["model"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    return message(Lamb16, model.named_parameters())


def partial_parameter() -> str:
    mesh = init_device_mesh("cpu", (2,))
    return message(Lamb16, [nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))])


def frozen_partial_parameter() -> tuple[list[torch.Tensor], str]:
    """Weights after two steps beside a frozen parameter that is not to be stepped; then what its gradient is told."""
    shard = sharded.sharder("rows over 2")
    odd = nn.Parameter(DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (2,)), [Partial()]), False)
    found = []
    for others in ([], [odd]):
        params = [nn.Parameter(shard(torch.ones(6, 4)))]
        optimizer = Lamb16([("w", params[0]), *(("odd", p) for p in others)], lr=0.01, compile=False)
        for _ in range(2):
            set_gradients(params, (0,))
            optimizer.step()
        optimizer.load_float32_weights(optimizer.float32_weights())
        found.append(local(params[0]))
    odd.grad = odd.detach()
    return found, message(optimizer.step)


def other_states_are_missing() -> tuple[str, list[str]]:
    """Each of two ranks has lost the state of another of two equal parameters; then both are given theirs back."""
    shard, optimizers = sharded.sharder("rows over 2"), []
    for _ in range(2):
        params = [nn.Parameter(shard(torch.ones(6, 4))) for _ in range(2)]
        optimizers.append(Lamb16(params, lr=0.01, compile=False))
        set_gradients(params, (0, 1))
        optimizers[-1].step()
    one, other = optimizers
    p = one.param_groups[0]["params"][torch.distributed.get_rank()]
    lost = one.state.pop(p)
    found = message(one.step)
    assert not one.state.get(p)
    one.state[p] = lost
    for optimizer in optimizers:
        optimizer.step()
    return found, differing(snapshot_of(one), snapshot_of(other))


def an_error_while_a_plan_is_made() -> list[str]:
    """Once, on both ranks; what the later steps over the same parameters differ in."""
    shard, optimizers = sharded.sharder("rows over 2"), []
    for _ in range(2):
        params = [nn.Parameter(shard(torch.arange(24.0).view(6, 4) ** 3)) for _ in range(2)]
        optimizers.append(Lamb16(params, lr=0.01, compile=False))
        set_gradients(params, (0, 1))
        optimizers[-1].step()
        set_gradients(params, (1,))
    one, other = optimizers
    with mock.patch("lamb16.stepping.signature", side_effect=MemoryError):
        assert message(one.step).startswith("MemoryError")
    for optimizer in optimizers:
        optimizer.step()
    return differing(snapshot_of(one), snapshot_of(other))


def own_plain_parameters() -> tuple[float, float]:
    """The norm of a sharded parameter's gradient and of one of a plain parameter of this rank's own, and what it is."""
    rank, shard = torch.distributed.get_rank(), sharded.sharder("rows over 2")
    w, own = nn.Parameter(shard(torch.ones(8, 8))), nn.Parameter(torch.ones(8))
    optimizer = Lamb16([("w", w), (f"experts.{rank}", own)], lr=0.01, compile=False, max_grad_norm=1.0)
    w.grad, own.grad = w.detach().clone(), torch.full((8,), 30.0 if rank else 1e-3)
    optimizer.step()
    assert optimizer.grad_norm is not None
    return float(optimizer.grad_norm), math.sqrt(64 + float(own.grad.square().sum()))


def flat_parameters(use_orig_params: bool) -> str:
    model = FullyShardedDataParallel(nn.Linear(8, 4), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    return message(Lamb16, model.named_parameters())


def mixed_gradient(sharded_parameter: bool) -> str:
    both = [torch.ones(4), sharded.sharder("rows over 2")(torch.ones(4))]
    optimizer = Lamb16([nn.Parameter(both[sharded_parameter])], compile=False)
    (p,) = optimizer.param_groups[0]["params"]
    with mock.patch.object(type(p), "grad", both[not sharded_parameter]):  # torch itself refuses to set it
        return message(optimizer.step)


def partial_gradient() -> list[torch.Tensor]:
    """The weights after a step with gradients of which every rank has one half."""
    whole, results = sharded.weights()[2], []
    for partial in (True, False):
        p = nn.Parameter(sharded.sharder("rows over 2")(whole))
        grad = DTensor.from_local(whole / 2, p.device_mesh, [Partial()]) if partial else p.detach().clone()
        p.grad = grad
        Lamb16([p], compile=False).step()
        results.append(sharded.whole(p.detach()))
    return results


def optimizer_on(placement: str) -> Lamb16:
    """After one step."""
    shard = sharded.sharder(placement)
    params = [nn.Parameter(shard(w)) for w in sharded.weights()[:3]]
    optimizer = Lamb16(params, **sharded.HYPER, compile=False)
    for p in params:
        p.grad = p.detach().clone()
    optimizer.step()
    return optimizer


def one_rank_has_a_damaged_state(placement: str) -> str:
    """NaN codes in rank 1's part only."""
    optimizer = optimizer_on(placement)
    state_dict = optimizer.state_dict()
    if torch.distributed.get_rank() == 1:
        codes = state_dict["state"][2]["exp_avg_codes"]
        damaged = codes.to_local().clone()
        damaged[0, 0] = 0x7F
        state_dict["state"][2]["exp_avg_codes"] = like(codes, damaged)
    before = snapshot_of(optimizer)
    found = message(optimizer.load_state_dict, state_dict)
    assert_same(snapshot_of(optimizer), before)
    return found


def set_gradients(params: list[nn.Parameter], which: tuple[int, ...]) -> None:
    """Gradients for these of the parameters."""
    for k, p in enumerate(params):
        p.grad = p.detach().clone() * (k + 1) if k in which else None


def bad_eps(optimizer: Lamb16) -> None:
    optimizer.param_groups[0]["eps"] = -1.0


def clipping(optimizer: Lamb16) -> None:
    optimizer.max_grad_norm = 1.0 if optimizer.max_grad_norm is None else None


def bad_clipping(optimizer: Lamb16) -> None:
    optimizer.max_grad_norm = -1.0


def bad_scale(optimizer: Lamb16) -> None:
    optimizer.grad_scale = 2.0  # type: ignore[attr-defined]


# What two ranks do otherwise: the parameters with gradients on each, and a change on rank 1 alone.
DIFFERENT: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "as many gradients, others": ((0, 1), (1, 2), None),
    "fewer gradients": ((0, 1, 2), (1,), None),
    "no gradients": ((0, 1, 2), (), None),
    "a wrong eps": ((0, 1, 2), (0, 1, 2), bad_eps),
    "clipping": ((0, 1, 2), (0, 1, 2), clipping),
    "a wrong norm to clip at": ((0, 1, 2), (0, 1, 2), bad_clipping),
    "a wrong scale": ((0, 1, 2), (0, 1, 2), bad_scale),
}


@contextlib.contextmanager
def device_is_waited_for(waits: bool = True) -> Iterator[None]:
    """The CPU's answers are put off as a GPU's are."""
    with mock.patch("lamb16.stepping.is_told_at_once", return_value=False) if waits else contextlib.nullcontext():
        yield


def different_steps(
    what: str, placement: str, stepped_before: bool, late: bool = False, max_grad_norm: float | None = None
) -> tuple[str, list[str]]:
    """The message of a step that the ranks differ in, and which entries then differ from a run without it.

    With ``late`` it is that of the next step.
    """
    with device_is_waited_for(late):
        return _different_steps(what, placement, stepped_before, late, max_grad_norm)


def _different_steps(
    what: str, placement: str, stepped_before: bool, late: bool, max_grad_norm: float | None
) -> tuple[str, list[str]]:
    shard, rank = sharded.sharder(placement), torch.distributed.get_rank()
    optimizers = []
    for _ in range(2):
        params = [nn.Parameter(shard(torch.ones(6, 4) * (k + 1))) for k in range(4)]
        optimizers.append(Lamb16(params, lr=0.01, compile=False, max_grad_norm=max_grad_norm))
        for which in ((0, 1), (1, 2), (0, 1, 2), (1,)) if stepped_before else ():
            set_gradients(params, which)
            optimizers[-1].step()
    one, other = optimizers
    params = one.param_groups[0]["params"]
    *sets, change = DIFFERENT[what]
    before, old = snapshot_of(one), (one.param_groups[0]["eps"], one.max_grad_norm)
    set_gradients(params, sets[rank % 2])
    if change and rank % 2:
        change(one)
    if late:
        one.step()
        assert_same(snapshot_of(one), before)
        assert message(one.state_dict) == message(one.state_dict) != ""
    found = message(one.step)
    assert_same(snapshot_of(one), before)
    assert one.skipped == 0
    one.param_groups[0]["eps"], one.max_grad_norm = old
    vars(one).pop("grad_scale", None)
    for optimizer in optimizers:
        for which in ((0, 1, 2), (), (3,), (0, 1, 2, 3)):
            set_gradients(optimizer.param_groups[0]["params"], which)
            optimizer.step()
    return found, differing(snapshot_of(one), snapshot_of(other))


READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu")


def waits_for_nothing(at_once: bool) -> tuple[list[str], list[str]]:
    """What is read of tensors by what the ranks reduce, in clipped steps of several kinds, and how these steps differ.

    From steps of which the answers are read ``at_once``.
    """
    shard, read, optimizers = sharded.sharder("rows over 2"), [], []

    def reading(name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def call(self: torch.Tensor, *arguments: Any) -> Any:
            frames = traceback.extract_stack(limit=6)
            files = [frame.filename for frame in frames if frame.name != "error"]  # of answers that are on the host
            if any(file.endswith(("reduction.py", "exchange.py", "gradient_norm.py")) for file in files):
                read.append(name)
            return original(self, *arguments)

        return mock.patch.object(torch.Tensor, name, call)

    for watched in (True, False):
        params = [nn.Parameter(shard(torch.ones(6, 4) * (k + 1)), requires_grad=True) for k in range(4)]
        groups = [{"params": params[:2]}, {"params": params[2:], "caution": True}]
        optimizers.append(Lamb16(groups, lr=0.01, compile=False, max_grad_norm=1.0))
        with device_is_waited_for(watched and not at_once):
            for t in range(5):
                set_gradients(params, (0, 1, 2, 3))
                with contextlib.ExitStack() as stack:
                    for name in READS if watched and t > 1 else ():
                        stack.enter_context(reading(name))
                    optimizers[-1].step()
    found, expected = (
        {f"{k} {name}": x for k, group in enumerate(optimizer.param_groups) for name, x in states_of(optimizer, group)}
        for optimizer in optimizers
    )
    return read, differing(found, expected)


def states_of(optimizer: Lamb16, group: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """This rank's part of a group's states and weights."""
    return [
        (f"{i}.{key}", raw(local(value)))
        for i, p in enumerate(group["params"])
        for key, value in (optimizer.state[p] | {"weight": p}).items()
    ]


def views_of_shards() -> list[int]:
    """How many tensors are detached in each of five compiled steps over shards."""
    shard, counts, detach = sharded.sharder("rows over 2"), [], torch.Tensor.detach

    def counted(self: torch.Tensor) -> torch.Tensor:
        counts[-1] += 1
        return detach(self)

    params = [nn.Parameter(shard(torch.ones(6, 4) * (k + 1)), requires_grad=True) for k in range(4)]
    optimizer = Lamb16(params, lr=0.01)
    for _ in range(5):
        set_gradients(params, (0, 1, 2, 3))
        counts.append(0)
        with mock.patch.object(torch.Tensor, "detach", counted):
            optimizer.step()
    return counts


def released_ddp() -> tuple[str, str, str, str]:
    """The messages for a model that is wrapped, for one within, for one that is wrapped later, for a part that is."""

    def make() -> tuple[nn.Sequential, Lamb16]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        return model, Lamb16(model.named_parameters(), compile=False)

    def train(wrapped: nn.Module, optimizer: Lamb16) -> None:
        wrapped(torch.ones(3, 4)).sum().backward()
        optimizer.step()

    model, optimizer = make()
    around = message(release_gradients, nn.parallel.DistributedDataParallel(model), optimizer)
    wrapped = nn.parallel.DistributedDataParallel(model)
    release_gradients(model, optimizer)
    within = message(train, wrapped, optimizer)
    model, optimizer = make()
    release_gradients(model, optimizer)
    later = message(train, nn.parallel.DistributedDataParallel(model), optimizer)
    model, optimizer = make()
    release_gradients(model, optimizer)
    model[0] = nn.parallel.DistributedDataParallel(model[0])
    return around, within, later, message(train, model, optimizer)


SAME = "the ranks that share parameters do not step the same ones"
ANOTHER = "another rank could not take this step"

# What two ranks do otherwise: the parameters in the loss of each, a change on rank 1, and what they are told.
RELEASED: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any, tuple[str, str]]] = {
    "as many gradients, others": ((0, 1), (1, 2), None, (SAME, SAME)),
    "fewer gradients": ((0, 1, 2), (2,), None, (SAME, SAME)),
    "no gradients": ((0, 1, 2), (), None, (SAME, SAME)),
    "clipping": ((0, 1), (0, 1), clipping, (ANOTHER, "max_grad_norm=1.0 needs the norm of all gradients")),
    "a wrong eps": ((0, 1), (0, 1), bad_eps, (ANOTHER, "eps=-1.0")),
}


def different_releases(what: str) -> str:
    """The message of a training step that the ranks differ in, each parameter stepped on its own."""
    shard, rank = sharded.sharder("rows over 2"), torch.distributed.get_rank()
    model = nn.ParameterList([nn.Parameter(shard(torch.ones(6, 4) * (k + 1))) for k in range(3)])
    optimizer = Lamb16(model.named_parameters(), lr=0.01, compile=False)
    release_gradients(model, optimizer, bucket_bytes=0)

    def train(which: tuple[int, ...]) -> None:
        if which:
            sum(model[k].to_local().square().sum() for k in which).backward()  # type: ignore[union-attr]
        optimizer.step()

    train((0, 1, 2))
    *sets, change, _ = RELEASED[what]
    if change and rank:
        change(optimizer)
    before = snapshot_of(optimizer)
    found = message(train, sets[rank])
    if change:
        assert_same(snapshot_of(optimizer), before)
    return found


def snapshot_of(optimizer: Lamb16) -> dict[str, Any]:
    """This rank's part."""
    return dict(states_of(optimizer, optimizer.param_groups[0]))


def whole_state_into_shards() -> tuple[sharded.Found, sharded.Found]:
    """A state dict with whole tensors, as one process has it, loaded into sharded parameters."""
    optimizer = optimizer_on("rows over 2")
    params = optimizer.param_groups[0]["params"]
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        for key in ("exp_avg_codes", "exp_avg_sq_codes"):
            state[key] = state[key].full_tensor()
    before = sharded.found(params, optimizer)
    for p in params:
        optimizer.state[p]["exp_avg_codes"].to_local().view(torch.uint8).zero_()
    optimizer.load_state_dict(state_dict)
    return before, sharded.found(params, optimizer)


FAULTS = ["no fault", "indices of the shard", "maxima of the shard", "sums of the shard", "squares of the shard"]


def wrong_rule(fault: str) -> sharded.Found:
    """Three steps by rows on two ranks with a fault put in."""
    faults = {
        "indices of the shard": mock.patch("lamb16.step.plan.layout", lambda p: layout(p)._replace(base=0)),
        "maxima of the shard": mock.patch.object(BoundReduction, "before", lambda _, own: own),
        "sums of the shard": mock.patch.object(BoundReduction, "after", return_value=None),
        "squares of the shard": mock.patch.object(BoundReduction, "squares", return_value=None),
        "no fault": contextlib.nullcontext(),
    }
    with faults[fault]:
        return sharded.step_sharded("rows over 2", False, 3)[0]
