"""Training the published demonstration's CNN once, as a function of its settings."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamb16.hyper import Hyper
from lamb16.lab import registry
from lamb16.lab.data import DATASETS, ImageData, load
from lamb16.lab.errors import CommandError
from lamb16.lab.logs import SAMPLES_PER_EPOCH, TensorBoardLog
from lamb16.lab.model import build_model
from lamb16.lab.registry import REGISTRY
from lamb16.lab.workers import ALONE, Workers
from lamb16.sharding.layout import is_sharded

OPTIMIZERS = tuple(REGISTRY)
SCHEDULES = ("constant", "linear", "cosine", "linear-step")
# Options that only Lamb16 has, and what they are.
LAMB16_ONLY = {
    "trust_scale": "exponent of the trust ratio",
    "trust_clip": "the largest trust ratio",
    "moment_dtype": "of the stored moments",
    "nesterov": "Nesterov momentum",
    "caution": "update only where the momentum has the gradient's sign",
    "max_grad_norm": "scale all gradients down to this norm",
}
DEFAULT_LR = {name: info.default_lr for name, info in REGISTRY.items()}
DEFAULT_EPOCHS = {"digits": 20, "mnist": 5, "fashion-mnist": 5}
SHARDED = ("lamb16", "adam")  # the optimizers for --distributed
FINAL_LR = 0.01  # of the first learning rate, at the last step of a linear or cosine schedule
TEST_BATCH = 1000


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on. None means the default of the optimizer, the data set or torch."""

    dataset: str = "digits"
    optimizer: str = "lamb16"
    batch_size: int = 128
    lr: float | None = None
    schedule: str = "constant"
    weight_decay: float = 0.01
    epochs: int | None = None
    seed: int = 0
    eager: bool = False
    device: str | None = None
    threads: int | None = None
    data: str | None = None
    normalize: bool = False
    betas: tuple[float, float] | None = None
    trust_scale: float | None = None
    trust_clip: float | None = None
    moment_dtype: str | None = None
    nesterov: bool | None = None
    caution: bool | None = None
    max_grad_norm: float | None = None
    distributed: bool = False

    def completed(self) -> TrainConfig:
        """The same settings, checked and with every default filled in; wrong ones raise `CommandError`."""
        self._check()
        return replace(
            self,
            lr=float(DEFAULT_LR[self.optimizer] if self.lr is None else self.lr),
            epochs=DEFAULT_EPOCHS[self.dataset] if self.epochs is None else self.epochs,
            device=str(_usable_device(self.device)),
        )

    def _check(self) -> None:
        _require_one_of("--dataset", self.dataset, DATASETS)
        _require_one_of("--optimizer", self.optimizer, OPTIMIZERS)
        _require_one_of("--schedule", self.schedule, SCHEDULES)
        counts = {"--batch-size": self.batch_size, "--epochs": self.epochs, "--threads": self.threads}
        for option, count in counts.items():
            if count is not None and count < 1:
                raise CommandError(f"{option} must be at least 1, not {count}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise CommandError(f"--lr must be a positive number, not {self.lr}")
        if not 0 <= self.seed < 2**63:
            raise CommandError(f"--seed must be at least 0 and below 2^63, not {self.seed}")
        self._check_hyperparameters()
        if self.distributed and self.optimizer not in SHARDED:
            raise CommandError(
                f"--distributed is for --optimizer {' or '.join(SHARDED)}; {self.optimizer} is for one process"
            )

    def _check_hyperparameters(self) -> None:
        for f in fields(Hyper):
            value = getattr(self, f.name, None)
            if value is not None and not f.metadata["valid"](value):
                raise CommandError(f"{option(f.name)} must be {f.metadata['wanted']}, not {value}")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise CommandError(f"--max-grad-norm must be a positive number, not {self.max_grad_norm}")
        used = {option(name, getattr(self, name)): getattr(self, name) is not None for name in LAMB16_ONLY}
        used["--schedule linear-step"] = self.schedule == "linear-step"
        for name, is_used in used.items():
            if is_used and self.optimizer != "lamb16":
                raise CommandError(f"{name} is for --optimizer lamb16 only, not for {self.optimizer}")
        if self.schedule == "linear-step" and (self.trust_scale or 0) >= 1:
            raise CommandError(f"--schedule linear-step needs --trust-scale below 1, not {self.trust_scale}")


def option(name: str, value: object = None) -> str:
    """The command-line option for a setting; False has one of its own."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def train(
    config: TrainConfig,
    data: ImageData | None = None,
    *,
    log: TensorBoardLog | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    on_step: Callable[[], None] | None = None,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """Train once and return what happened, ready for JSON; accuracies are fractions.

    The result depends on `config` and `data` only (on one device, with one number of threads): weights and
    batches are drawn from generators seeded with `config.seed`. Handing in `data` saves loading it for every
    run. `report` gets each epoch's entry as soon as it is known, `on_step` is called after every step. Several
    `workers` each take a part of every batch, and hold a part of the model (FSDP2); all return the same.
    """
    config = config.completed()
    assert config.epochs is not None
    assert config.device is not None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = (data or load(config.dataset, config.data)).to(config.device)
    data = data.normalized() if config.normalize else data
    model: nn.Module = build_model(config.seed, config.device)
    model = workers.shard(model, config.device) if config.distributed else model
    optimizer = build_optimizer(config, model)
    steps = steps_per_epoch(config, data)
    scheduler = build_scheduler(optimizer, config.schedule, steps * config.epochs)
    generator = torch.Generator().manual_seed(config.seed)
    sample_every = max(1, steps // SAMPLES_PER_EPOCH)

    def after_step(step: int) -> None:
        if log and step % sample_every == 0:
            log.sample_layers(optimizer)
        if on_step:
            on_step()

    epochs: list[dict[str, Any]] = []
    start = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        batches = _batches(len(data.train_images), config.batch_size, generator)
        entry: dict[str, Any] = {"epoch": epoch}
        with _compiler_failure_explained():
            entry["train_loss"] = _train_epoch(model, optimizer, scheduler, data, batches, after_step, workers)
        entry["test_accuracy"] = accuracy(model, data.test_images, data.test_labels, workers)
        entry["lr"] = float(scheduler.get_last_lr()[0])
        epochs.append(entry)
        if log:
            log.end_epoch(epoch, _scalars(entry))
        if report:
            report(entry)
    seconds = time.perf_counter() - start
    return _summary(config, data, model, optimizer, epochs, workers) | {"seconds": seconds}


def steps_per_epoch(config: TrainConfig, data: ImageData) -> int:
    """The steps of an epoch; the last one takes what is left, however little."""
    return math.ceil(len(data.train_images) / config.batch_size)


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over the named parameters of `model`."""
    config = config.completed()
    values = {name: getattr(config, name) for name in ("betas", *LAMB16_ONLY)}
    options = {name: value for name, value in values.items() if value is not None}
    options |= {"compile": not config.eager, "seed": config.seed}
    return registry.build(
        config.optimizer, model.named_parameters(), lr=config.lr, weight_decay=config.weight_decay, **options
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, schedule: str, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The full learning rate at the first of `steps` steps; linear and cosine end at 1 % of it.

    Lamb16's step lr · r goes with lr^(1 - trust_scale) for unchanged norms of weights and update and below trust_clip:
    under "linear-step" it would then fall linearly, to 1 %.
    """
    power = 1 / (1 - optimizer.param_groups[0]["trust_scale"]) if schedule == "linear-step" else 1.0

    def factor(step: int) -> float:
        progress = min(1.0, step / max(1, steps - 1))
        if schedule == "constant":
            return 1.0
        fall = (1 - math.cos(math.pi * progress)) / 2 if schedule == "cosine" else progress
        return float((1 - (1 - FINAL_LR) * fall) ** power)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, workers: Workers = ALONE) -> float:
    """The fraction of `images` that `model` classifies as `labels` say."""
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    for start in range(0, len(labels), TEST_BATCH):
        part = slice(start, start + TEST_BATCH)
        correct += (model(workers.share(images[part])).argmax(1) == workers.share(labels[part])).sum()
    return workers.total(correct).item() / len(labels)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of all tensors in `optimizer.state`, of one that is in several states once.

    A tensor subclass counts with what it is made of here.
    """
    entries = {id(v): v for state in optimizer.state.values() for v in state.values()}
    return sum(_bytes(v) for v in entries.values() if isinstance(v, Tensor))


def _bytes(tensor: Tensor) -> int:
    if is_sharded(tensor):
        return _bytes(tensor.to_local())  # type: ignore[attr-defined]
    parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
    return tensor.numel() * tensor.element_size() if parts is None else sum(_bytes(getattr(tensor, k)) for k in parts)


def _batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """The indices 0 to `count - 1` in a fresh random order, cut into batches."""
    order = torch.randperm(count, generator=generator)
    return [order[start : start + size] for start in range(0, count, size)]


@contextlib.contextmanager
def _compiler_failure_explained() -> Iterator[None]:
    """Lamb16's own message names its argument; on the command line that is an option."""
    try:
        yield
    except RuntimeError as error:
        if "compile=False" not in str(error):
            raise
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise CommandError(f"no compiler works for lamb16's step: --eager does without ({cause})") from error


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    data: ImageData,
    batches: list[Tensor],
    after_step: Callable[[int], None],
    workers: Workers,
) -> float:
    """One step per batch (of indices into the training images); returns the mean loss.

    Each of several workers sums over its part of the batch and FSDP2 takes the mean over the workers: with the factor
    here, the gradient is that of the whole batch's mean loss.
    """
    device = data.train_images.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for step, batch in enumerate(batches):
        index = workers.share(batch).to(device)
        logits, labels = model(data.train_images[index]), data.train_labels[index]
        if workers.count == 1:
            loss = F.cross_entropy(logits, labels)
        else:
            loss = F.cross_entropy(logits, labels, reduction="sum") * (workers.count / len(batch))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        # Stays on the device: reading it would wait for the step.
        loss_sum += loss.detach() * (len(batch) / workers.count)
        after_step(step)
        scheduler.step()
    return workers.total(loss_sum).item() / len(data.train_images)


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    return {"loss/train": entry["train_loss"], "accuracy/test": entry["test_accuracy"], "lr": entry["lr"]}


def _summary(
    config: TrainConfig,
    data: ImageData,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: list[dict[str, Any]],
    workers: Workers,
) -> dict[str, Any]:
    import lamb16

    parameters = sum(p.numel() for p in model.parameters())
    bytes_held = workers.total(torch.tensor(state_bytes(optimizer), device=config.device))
    best = max(epochs, key=lambda entry: entry["test_accuracy"])
    return {
        "settings": asdict(config),
        "epochs": epochs,
        "final_accuracy": epochs[-1]["test_accuracy"],
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "train_images": len(data.train_images),
        "test_images": len(data.test_images),
        "parameters": parameters,
        "state_bytes_per_parameter": bytes_held.item() / parameters,
        "skipped": int(getattr(optimizer, "skipped", 0)),
        "workers": workers.count,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "lamb16": lamb16.__version__,
    }


def _require_one_of(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CommandError(f"{option} must be one of {', '.join(choices)}, not '{value}'")


def _usable_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that exists by name only, as 'meta', fails here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"cannot use --device {name}: {str(error).strip().splitlines()[0]}") from error
    return device
