"""One training of one of the study's tasks, as a function of its settings."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lamb16.lab import registry
from lamb16.lab.study.probes import Shadow
from lamb16.lab.study.runs import Result
from lamb16.lab.study.tasks import Task, load_task
from lamb16.lab.study.variants import Parts, Variant
from lamb16.lab.training import state_bytes

WARM_UP, FINAL_LR = 0.1, 0.01  # the share of the steps, and of the largest learning rate
LAST = 0.05  # the share of the last steps whose losses are averaged
SEGMENTS = 40  # points of a loss curve
CHUNK = 64  # validation examples at a time
PROBES = 10
DIVERGED = 1e4
OPTIONS = ("moment_dtype", "bias_correction", "nesterov", "caution")  # of Lamb16 and Variant
COMPILED_STEPS = 100  # shorter trainings are not worth compiling the step for; the results are the same


@dataclass(frozen=True)
class Run:
    """The settings of one training. ``parts`` are those of a :class:`Variant` that differ from the rule."""

    task: str
    optimizer: str
    lr: float
    seed: int
    steps: int
    batch_size: int
    dataset: str = "mnist"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    moment_dtype: str = "float8"
    trust_scale: float | None = None
    bias_correction: bool = True
    gradient_scale: float = 1.0
    probed: bool = False
    nesterov: bool = True
    caution: bool = False
    schedule: str = "linear"  # after a warm-up; or "constant", without one
    apart: bool = False  # biases and norms in a parameter group without weight decay and, of Lamb16, trust ratio
    parts: tuple[tuple[str, Any], ...] = field(default=())

    def model(self, task: Task) -> nn.Module:
        """The network of this run."""
        return task.model(self.seed)

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """What the forward pass runs in."""
        return contextlib.nullcontext()

    def options(self) -> dict[str, Any]:
        """More of the optimizer's options."""
        return {}


def describe(run: Run) -> str:
    """The settings in a few words."""
    names = [run.task, run.optimizer, f"lr {run.lr:g}", f"seed {run.seed}"]
    names += [f"{key} {value}" for key, value in run.parts]
    default = Run("", "", 0, 0, 0, 0)
    for name in (*OPTIONS, "beta1", "beta2", "trust_scale", "gradient_scale", "schedule", "apart"):
        if getattr(run, name) != getattr(default, name):
            names.append(f"{name} {getattr(run, name)}")
    names += [str(x) for f in fields(run)[len(fields(default)) :] if (x := getattr(run, f.name)) is not None]
    return ", ".join(names)


def steps_of(run: Run, line: Sequence[Any]) -> list[float]:
    """The steps at which the points of a line, evenly over the training, were taken."""
    return [(k + 1) * run.steps / len(line) for k in range(len(line))]


def execute(run: Run, folder: str | None) -> Result:
    """Train once; ``validation_loss`` is null where the training diverged.

    The learning rate rises over the first tenth of the steps and falls linearly to 1 %, or is constant.
    """
    task = load_task(run.task, run.dataset, folder)
    model = run.model(task)
    optimizer = build(run, model)
    scheduler = LambdaLR(optimizer, _schedule(run.steps, run.schedule))
    shadow = Shadow(optimizer, dict(run.parts).get("bound", True)) if run.probed else None
    start = time.perf_counter()
    losses = _train(run, task, model, optimizer, scheduler, shadow)
    seconds = time.perf_counter() - start
    last = losses[-max(1, int(LAST * run.steps)) :]
    diverged = not losses[-1] < DIVERGED
    result: Result = {
        "curve": _curve(losses),
        "train_loss": sum(last) / len(last),
        "validation_loss": math.inf if diverged else validation_loss(run, model, task),
        "state_bytes": state_bytes(optimizer),
        "seconds": seconds,
    }
    if shadow:
        result["probes"] = shadow.summary()
    return result


def build(run: Run, model: nn.Module) -> Optimizer:
    """The optimizer of the run over the model's named parameters."""
    options: dict[str, Any] = {"lr": run.lr, "weight_decay": run.weight_decay, "betas": (run.beta1, run.beta2)}
    options |= {"seed": run.seed} | run.options()
    if run.trust_scale is not None:
        options["trust_scale"] = run.trust_scale
    own = {name: getattr(run, name) for name in OPTIONS}
    named = list(model.named_parameters())
    first = [(name, p) for name, p in named if p.ndim > 1 or not run.apart]
    if run.optimizer == "variant":
        optimizer: Optimizer = Variant(first, Parts(**dict(run.parts)), **options | own)
    else:
        if run.optimizer == "lamb16":
            options |= own | {"compile": run.steps >= COMPILED_STEPS}
        optimizer = registry.build(run.optimizer, first, **options)
    if run.apart:
        vectors = [(name, p) for name, p in named if p.ndim <= 1]
        has_names = "param_names" in optimizer.param_groups[0]
        group = {"params": vectors if has_names else [p for _, p in vectors], "weight_decay": 0.0}
        optimizer.add_param_group(group | ({"trust_scale": 0.0} if "trust_scale" in optimizer.defaults else {}))
    return optimizer


def _schedule(steps: int, schedule: str) -> Callable[[int], float]:
    warm = max(1, int(WARM_UP * steps))
    if schedule == "constant":
        return lambda step: 1.0

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warm)
        return rise * (1 - (1 - FINAL_LR) * max(0.0, (step - warm) / max(1, steps - warm)))

    return factor


def _train(
    run: Run, task: Task, model: nn.Module, optimizer: Optimizer, scheduler: LambdaLR, shadow: Shadow | None
) -> list[float]:
    """The loss of every step; ends early where it is no longer a number, or huge."""
    losses: list[float] = []
    every = max(1, run.steps // PROBES)
    for step, (inputs, targets) in enumerate(task.batches(run.batch_size, run.steps, run.seed)):
        with run.around():
            outputs = model(inputs)
        loss = task.loss(outputs.float(), targets)
        losses.append(loss.item())
        if not losses[-1] < DIVERGED:
            break
        optimizer.zero_grad()
        (loss * run.gradient_scale).backward()  # type: ignore[no-untyped-call]
        if shadow:
            shadow.before_step(probe=step % every == every - 1)
        optimizer.step()
        scheduler.step()
    return losses


def _curve(losses: list[float]) -> list[float]:
    """The means of equal segments of the losses."""
    size = max(1, len(losses) // SEGMENTS)
    return [sum(part) / len(part) for part in (losses[k : k + size] for k in range(0, len(losses), size))]


@torch.no_grad()
def validation_loss(run: Run, model: nn.Module, task: Task) -> float:
    """The mean loss over the validation examples."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(*(torch.split(part, CHUNK) for part in task.validation), strict=True):
        with run.around():
            outputs = model(x)
        part: Tensor = task.loss(outputs.float(), y)
        total += part * len(x)
    mean = float(total) / len(task.validation[0])
    return mean if math.isfinite(mean) else math.inf
