"""What programs do to an optimizer between its steps, by name: for test_programs.py.

It is done to twins that differ in ``compile`` alone, in the same way: what is random follows from a seed.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bits import raw
from helpers import all_params, assert_same, parameters
from lamb16 import Lamb16
from lamb16.entries import DERIVED, MAXIMA, SCALARS
from lamb16.hyper import MOMENT_DTYPES, ROUNDINGS
from lamb16.moments import MOMENTS
from lamb16.remainder import CHECKSUM, REMAINDER
from strategies import gradient


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=generator(seed)).to(like)


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of twice the memory."""
    raw = x.view(torch.uint8) if x.element_size() == 1 else x
    return torch.stack([raw, raw], -1)[..., 0].view(x.dtype)


@dataclass
class Program:
    """An optimizer, and what a program has put aside."""

    optimizer: Lamb16
    saved: dict[str, Any] | None = None  # a state dict
    taken_out: dict[str, dict[str, Any]] = field(default_factory=dict)  # states, by their parameters' names
    old: list[Any] = field(default_factory=list)  # memory that was replaced: what is made next shall be elsewhere
    kept: list[Any] = field(default_factory=list)  # memory that is not freed

    @property
    def names(self) -> list[str]:
        return [name for group in self.optimizer.param_groups for name in group["param_names"]]

    @property
    def params(self) -> list[nn.Parameter]:
        return all_params(self.optimizer)

    @property
    def states(self) -> list[dict[str, Any]]:
        """Of all parameters, {} for none."""
        return [self.optimizer.state.get(p, {}) for p in self.params]

    def group(self, i: int) -> dict[str, Any]:
        """That of parameter ``i``."""
        p = self.params[i]
        return next(group for group in self.optimizer.param_groups if any(x is p for x in group["params"]))

    def alike(self, i: int) -> list[int]:
        """The parameters of the shape of parameter ``i`` and with states like its, itself at the end."""
        params, others = self.params, (*range(i + 1, len(self.params)), *range(i + 1))
        kinds = [(p.shape, self.group(j)["moment_dtype"]) for j, p in enumerate(params)]
        return [j for j in others if kinds[j] == kinds[i]]

    def pair(self, i: int) -> tuple[int, int]:
        """Parameter ``i`` and one alike, or the next ones of which there are two."""
        count = len(self.params)
        k = next(k % count for k in range(i, i + count) if len(self.alike(k % count)) > 1)
        return k, self.alike(k)[0]

    def state_dict(self) -> dict[str, Any]:
        """Without empty states, which ``load_state_dict`` refuses."""
        found = self.optimizer.state_dict()
        found["state"] = {key: state for key, state in found["state"].items() if state}
        return found

    def fresh(self) -> Program:
        """A new optimizer over copies of the weights, with this one's state dict and copies of the gradients."""
        own = self.optimizer
        groups = [{"params": [], **{name: group[name] for name in WORDS}} for group in own.param_groups]
        for new, group in zip(groups, own.param_groups, strict=True):
            for name, p in zip(group["param_names"], group["params"], strict=True):
                copy = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format), p.requires_grad)
                copy.grad = None if p.grad is None else p.grad.clone(memory_format=torch.contiguous_format)
                new["params"].append((name, copy))
        found = Program(Lamb16(groups, max_grad_norm=own.max_grad_norm, amp_scaling=True))
        found.optimizer.load_state_dict(self.state_dict())
        return found


Deed = Callable[[Program, int, int], Any]  # the program, a parameter's number, a seed

# -- groups ------------------------------------------------------------------------------------------------------

WORDS = ("moment_dtype", "param_rounding")
LEARNING_RATES = (0.0, 1e-3, 0.02, 0.3, -1e-12)  # some schedulers end a hair below 0


def number_lr(program: Program, i: int, seed: int) -> None:
    program.group(i)["lr"] = LEARNING_RATES[seed % len(LEARNING_RATES)]


def tensor_lr(program: Program, i: int, seed: int) -> None:
    shape, dtype = () if seed & 4 else (1,), torch.float64 if seed & 8 else torch.float32
    program.group(i)["lr"] = torch.full(shape, LEARNING_RATES[seed % len(LEARNING_RATES)], dtype=dtype)


def shared_lr(program: Program, i: int, seed: int) -> None:
    """One tensor for all groups."""
    tensor_lr(program, i, seed)
    for group in program.optimizer.param_groups:
        group["lr"] = program.group(i)["lr"]


def filled_lr(program: Program, i: int, seed: int) -> None:
    lr = program.group(i)["lr"]
    if isinstance(lr, Tensor):
        lr.fill_(LEARNING_RATES[seed % len(LEARNING_RATES)])


def write_betas(program: Program, i: int, seed: int) -> None:
    group = program.group(i)
    group["betas"] = betas = group["betas"] if isinstance(group["betas"], list) else list(group["betas"])
    betas[0] = seed % 10 / 10


def change_rounding(program: Program, i: int, seed: int) -> None:
    program.group(i)["param_rounding"] = ROUNDINGS[seed % len(ROUNDINGS)]


def copy_group(program: Program, i: int, _: int) -> None:
    groups, old = program.optimizer.param_groups, program.group(i)
    groups[:] = [dict(group) if group is old else group for group in groups]


def change_group_of(program: Program, i: int, seed: int) -> None:
    groups, old = program.optimizer.param_groups, program.group(i)
    new, p, name = groups[seed % len(groups)], program.params[i], program.names[i]
    if len(old["params"]) > 1 and new["moment_dtype"] == old["moment_dtype"]:  # which the state goes by
        k = old["param_names"].index(name)
        del old["params"][k], old["param_names"][k]
        new["params"].append(p)
        new["param_names"].append(name)


def add_group(program: Program, i: int, seed: int) -> None:
    """Of one parameter with the shape of another; fewer kinds of steps are compiled for bfloat16 ones."""
    count, like = len(program.params), program.params[i]
    if len(program.optimizer.param_groups) < MOST_GROUPS:
        (p,) = parameters([tuple(like.shape)], like.dtype, seed)
        moments = list(MOMENT_DTYPES)[seed & 1 if like.dtype == torch.float32 else 0]
        words = {"moment_dtype": moments, "caution": bool(seed & 2)}
        program.optimizer.add_param_group({"params": [(f"p{count}", p)], **words})


def change_norm(program: Program, _: int, seed: int) -> None:
    program.optimizer.max_grad_norm = (None, 0.1, 5.0, math.inf)[seed % 4]


MOST_GROUPS = 4
GROUPS: dict[str, Deed] = {
    "lr a number": number_lr,
    "lr a tensor": tensor_lr,
    "lr one tensor": shared_lr,
    "lr filled": filled_lr,
    "betas written": write_betas,
    "rounding changed": change_rounding,
    "group copied": copy_group,
    "moved to another group": change_group_of,
    "group added": add_group,
    "max_grad_norm changed": change_norm,
}

# -- weights -----------------------------------------------------------------------------------------------------


def give_data(x: Tensor, value: Tensor) -> None:
    x.data = value


def set_memory(x: Tensor, value: Tensor) -> None:
    x.set_(value)


def renew_storage(x: Tensor) -> None:
    """As FSDP frees memory and has it again; of a tensor that has its storage for itself."""
    storage, value = x.untyped_storage(), x.detach().clone()
    size = storage.nbytes()
    if size != x.nbytes:
        return
    storage.resize_(0)
    storage.resize_(size)
    x.data.copy_(value)


def swap(p: nn.Parameter) -> None:
    p.grad = None  # as ``module.to`` does
    torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone(), p.requires_grad))


def load_float32(program: Program, factor: float) -> None:
    if program.optimizer.offloaded is not None:  # refused
        return
    weights = program.optimizer.float32_weights()
    program.optimizer.load_float32_weights({name: w * factor for name, w in weights.items()})


def resize(program: Program, i: int, seed: int) -> None:
    """Other rows in another order; as many, so that there are parameters of equal shapes."""
    p = program.params[i]
    if p.dim() and program.optimizer.offloaded is None:
        index = torch.randint(-1, max(len(p), 1), (len(p),), generator=generator(seed))
        program.optimizer.resize(p, index, nn.Parameter(normal(p, seed)))


WEIGHTS: dict[str, Deed] = {
    "moved": lambda program, i, _: give_data(program.params[i], program.params[i].data.clone()),
    "strided": lambda program, i, _: give_data(program.params[i], strided(program.params[i].data)),
    "set": lambda program, i, _: set_memory(program.params[i], program.params[i].detach().clone()),
    "storage": lambda program, i, _: renew_storage(program.params[i]),
    "swapped": lambda program, i, _: swap(program.params[i]),
    "replaced": lambda program, i, seed: give_data(program.params[i], normal(program.params[i], seed)),
    "copied": lambda program, i, seed: program.params[i].data.copy_(normal(program.params[i], seed)),
    "added": lambda program, i, seed: program.params[i].add_(normal(program.params[i], seed), alpha=0.01),
    "in float32": lambda program, _, seed: load_float32(program, 1 + seed % 3 / 1000),
    "resized": resize,
    "frozen": lambda program, i, _: program.params[i].requires_grad_(not program.params[i].requires_grad),
}

# -- entries of states -------------------------------------------------------------------------------------------


def other_value(program: Program, i: int, key: str, seed: int) -> Tensor:
    """One that ``load_state_dict`` takes."""
    p, random = program.params[i], generator(seed)
    if key in MOMENTS:
        first, dtype = key == MOMENTS[0], MOMENT_DTYPES[program.group(i)["moment_dtype"]][MOMENTS.index(key)]
        if dtype == torch.float32:
            return normal(p, seed).float() if first else normal(p, seed).float().abs()
        most = (0x7E if first else 0x7B) >> seed % 3 * 3  # or far below what was there
        codes = torch.randint(0, most + 1, p.shape, generator=random, dtype=torch.uint8)
        signs = torch.randint(0, 2, p.shape, generator=random, dtype=torch.uint8) << 7
        return (codes | signs if first else codes).view(dtype)
    if key == REMAINDER:
        return torch.randint(-(2**15), 2**15, p.shape, generator=random, dtype=torch.int16)
    if key in MAXIMA:
        return torch.tensor(float(seed % 1000))
    if key.endswith("scale"):
        return torch.tensor(2.0 ** (seed % 25 - 20))
    most = {
        "step": 1000, "salt": 2**31 - 1, "weight_sum": p.numel() << 20, "update_sum": p.numel() << 20,
        "mask_count": p.numel(), CHECKSUM: 2**32 - 1,
    }[key]  # fmt: skip
    value = min(1 + int(torch.randint(0, max(most, 1), (), generator=random)), most)
    return torch.tensor(value, dtype=torch.int32 if key in ("step", "salt") else torch.int64)


def other_form(key: str, x: Any, seed: int) -> Any:
    """What other loaders leave: codes and remainders as bytes, scalars as numbers, as [1], or in float64."""
    if key in MOMENTS:
        return x.view(torch.uint8) if x.element_size() == 1 else x
    if key == REMAINDER:
        return x.contiguous().unsqueeze(-1).view(torch.uint8) if x.dtype == torch.int16 else x
    x = torch.as_tensor(x)
    return [x.item(), x.detach().clone().view(1), x.double()][seed % 3]


def change_entry(program: Program, i: int, seed: int, keys: Sequence[str], how: str, same: bool = True) -> None:
    """Do that to one of these entries of a state; with ``same`` the value stays."""
    if how == "exchanged":
        i, j = program.pair(i)
    state = program.states[i]
    there = [key for key in keys if key in state and (how != "exchanged" or key in program.states[j])]
    if not there:
        return
    key = there[seed % len(there)]
    x = state[key]
    if how == "gone":
        if key == REMAINDER or (key in DERIVED and key != CHECKSUM):
            del state[key]
    elif how == "exchanged":
        state[key], program.states[j][key] = program.states[j][key], x
    elif how == "replaced":
        state[key] = deepcopy(x) if same else other_value(program, i, key, seed)
    elif how == "in another form":
        state[key] = other_form(key, x, seed)
    elif isinstance(x, Tensor):
        value = x.detach().clone() if same else other_value(program, i, key, seed)
        fits = (value.shape, value.dtype) == (x.shape, x.dtype)
        if how == "strided":
            state[key] = strided(x)
        elif how == "storage":
            renew_storage(x)
        elif how == "written" and fits and key not in MAXIMA:  # which are to be those of the codes
            x.copy_(value)  # not x.data.copy_(value), of which a step sees nothing
        elif how in ("data", "set") and fits:
            program.old.append(x.detach())
            (give_data if how == "data" else set_memory)(x, value)


def changes_of(keys: Sequence[str]) -> dict[str, Deed]:
    change = partial(partial, change_entry, keys=keys)
    both = ("replaced", "written", "data", "set")
    return (
        {how: change(how=how, same=False) for how in both}
        | {f"{how}, same": change(how=how) for how in both}
        | {how: change(how=how) for how in ("storage", "in another form", "strided", "gone", "exchanged")}
    )


TENSORS, NUMBERS = changes_of([*MOMENTS, REMAINDER]), changes_of(SCALARS)

# -- whole states ------------------------------------------------------------------------------------------------


def exchange_states(program: Program, i: int, _: int) -> None:
    state, pair = program.optimizer.state, [program.params[k] for k in program.pair(i)]
    found = [state.pop(p, None) for p in pair]
    state.update({p: own for p, own in zip(pair, reversed(found), strict=True) if own is not None})


def take_out(program: Program, i: int, _: int) -> None:
    if program.states[i]:
        program.taken_out[program.names[i]] = program.optimizer.state.pop(program.params[i])


def put_back(program: Program, i: int, _: int) -> None:
    if program.names[i] in program.taken_out:
        program.optimizer.state[program.params[i]] = program.taken_out.pop(program.names[i])


def copy_state(program: Program, i: int, _: int) -> None:
    """From one parameter to another, whose own goes."""
    i, j = program.pair(i)
    if program.states[i]:
        program.optimizer.state[program.params[j]] = deepcopy(program.states[i])


def save(program: Program, _: int, __: int) -> None:
    program.saved = deepcopy(program.state_dict())


def load_saved(program: Program, _: int, __: int) -> None:
    """From before a group was added, too."""
    if program.saved is not None:
        program.optimizer.load_state_dict(program.saved, strict=False)


def note(program: Program, i: int, seed: int) -> None:
    """An entry that is none of the optimizer's."""
    if program.states[i]:
        program.states[i]["note"] = torch.tensor(seed)


def copy_dicts(program: Program, _: int, __: int) -> None:
    state = program.optimizer.state
    state.update({p: dict(own) for p, own in state.items()})


def replace_optimizer(program: Program, optimizer: Lamb16) -> None:
    program.optimizer = optimizer


STATES: dict[str, Deed] = {
    "exchanged": exchange_states,
    "copied": copy_state,
    "taken out": take_out,
    "put back": put_back,
    "popped": lambda program, i, _: program.optimizer.state.pop(program.params[i], None),
    "emptied": lambda program, i, _: program.states[i].clear(),
    "touched": lambda program, i, _: program.optimizer.state[program.params[i]],  # makes an empty one
    "dicts copied": copy_dicts,
    "noted": note,
    "saved": save,
}
ALL: dict[str, Deed] = {
    "loaded": lambda program, *_: program.optimizer.load_state_dict(program.state_dict()),
    "copy loaded": lambda program, *_: program.optimizer.load_state_dict(deepcopy(program.state_dict())),
    "saved loaded": load_saved,
    "offloaded": lambda program, *_: program.optimizer.offload("cpu"),
    "reloaded": lambda program, *_: program.optimizer.reload(),
    "pickled": lambda program, *_: replace_optimizer(program, pickle.loads(pickle.dumps(program.optimizer))),
    "deepcopied": lambda program, *_: replace_optimizer(program, deepcopy(program.optimizer)),
    "cleared": lambda program, *_: program.optimizer.state.clear(),
}

# -- gradients ---------------------------------------------------------------------------------------------------

KINDS = ("normal", "lognormal", "sparse", "outliers", "zero", "tiny", "huge", "inf", "nan")  # of strategies.gradient


def new_gradient(program: Program, i: int, seed: int, kind: str = "normal") -> Tensor:
    return gradient(kind, program.params[i], -1, generator(seed))


def in_place(program: Program, i: int, seed: int) -> Tensor:
    """Into the memory of the one that is there, if it has one element in each place."""
    grad = program.params[i].grad
    new = new_gradient(program, i, seed)
    return new if grad is None or 0 in grad.stride() else grad.copy_(new)


def expanded(program: Program, i: int, seed: int) -> Tensor:
    """As that of a sum: one element for all."""
    p = program.params[i]
    return normal(p.new_empty(()), seed).expand(p.shape)


def of_another(program: Program, i: int, seed: int) -> Tensor:
    grad = program.params[program.alike(i)[0]].grad
    return new_gradient(program, i, seed) if grad is None else grad


GRADIENTS: dict[str, Callable[[Program, int, int], Tensor | None]] = {
    "in place": in_place,
    "kept": lambda program, i, _: program.params[i].grad,
    "none": lambda *_: None,
    "strided": lambda program, i, seed: strided(new_gradient(program, i, seed)),
    "expanded": expanded,
    "shared": of_another,
    "the weights": lambda program, i, _: program.params[i].detach(),
    "another's weights": lambda program, i, _: program.params[program.alike(i)[0]].detach(),
    **{kind: (lambda program, i, seed, kind=kind: new_gradient(program, i, seed, kind)) for kind in KINDS},
}

# -- what a step refuses -----------------------------------------------------------------------------------------


def replaced(target: dict[str, Any], key: str, value: Any) -> Callable[[], Any]:
    old, target[key] = target.get(key), value
    return lambda: target.update({key: old})


def refused_moments(program: Program, i: int) -> Callable[[], Any]:
    group = program.group(i)
    return replaced(group, "moment_dtype", "float32" if group["moment_dtype"] == "float8" else "float8")


def shared_memory(program: Program, i: int) -> Callable[[], Any]:
    state = program.states[i]
    return replaced(state, MOMENTS[0], state[MOMENTS[1]].view(state[MOMENTS[0]].dtype))


def sparse_gradient(program: Program, i: int) -> Callable[[], Any]:
    p = program.params[i]
    grad, p.grad = p.grad, torch.zeros_like(p).to_sparse()
    return lambda: setattr(p, "grad", grad)


# Of a parameter with rows, a gradient and a state; each returns what undoes it.
WRONG: dict[str, Callable[[Program, int], Callable[[], Any]]] = {
    "lr": lambda program, i: replaced(program.group(i), "lr", math.nan),
    "moment_dtype": refused_moments,
    "entry": lambda program, i: replaced(program.states[i], "step", None),
    "memory": shared_memory,
    "gradient": sparse_gradient,
    "scaler": lambda program, _: replaced(vars(program.optimizer), "grad_scale", 3.0),
}


def be_refused(program: Program, i: int, seed: int, what: str) -> None:
    """A step that raises changes nothing."""
    p = program.params[i]
    if p.dim() and p.numel() and program.states[i] and not program.optimizer.offloaded:
        p.grad = new_gradient(program, i, seed)
        undo, before = WRONG[what](program, i), settled(program)
        with pytest.raises((ValueError, RuntimeError)):
            program.optimizer.step()
        after = settled(program)
        assert_same({key: after.get(key) for key in before}, before)
        undo()


def settled(program: Program) -> dict[str, Any]:
    """Copies of the weights, and of what the states hold in whatever form, but for what follows from that."""
    found: dict[str, Any] = {"states": [bool(state) for state in program.states]}
    for name, p, state in zip(program.names, program.params, program.states, strict=True):
        found[f"{name} weights"] = p.detach().clone()
        for key, x in state.items():
            if isinstance(x, Tensor) and key in (*MOMENTS, REMAINDER):
                found[f"{name} {key}"] = raw(x)
            elif key not in DERIVED:
                found[f"{name} {key}"] = None if x is None else float(x)
    return found


REFUSED: dict[str, Deed] = {what: partial(be_refused, what=what) for what in WRONG}
