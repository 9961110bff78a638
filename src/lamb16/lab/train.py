"""`lamb16 train`: train the published demonstration's CNN with one of the optimizers."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from lamb16.hyper import MOMENT_DTYPES, ROUNDINGS, Hyper
from lamb16.lab.data import CACHE, DATA_VARIABLE, DATASETS, ImageData, load
from lamb16.lab.errors import CommandError, require
from lamb16.lab.logs import TensorBoardLog
from lamb16.lab.training import (
    DEFAULT_EPOCHS,
    DEFAULT_LR,
    LAMB16_ONLY,
    OPTIMIZERS,
    SCHEDULES,
    TrainConfig,
    option,
    steps_per_epoch,
    train,
)
from lamb16.lab.workers import ALONE, Workers, started_by_torchrun
from lamb16.sharding.exchange import first_text

__all__ = ["TrainConfig", "add_parser", "run", "train", "write_json"]

WORDS = {"moment_dtype": tuple(MOMENT_DTYPES), "param_rounding": ROUNDINGS}  # that an option may be


def add_parser(subparsers: Any) -> None:
    """Add `train` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train a small CNN on images of digits or clothes",
        description="Train the two-layer CNN of the published demonstration and print its test accuracy.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = TrainConfig()
    run = parser.add_argument_group("run")
    run.add_argument("--dataset", choices=DATASETS, default=default.dataset, help="digits needs no files")
    run.add_argument(
        "--data", metavar="DIR", default=argparse.SUPPRESS,
        help=f"folder of the MNIST files (default: ${DATA_VARIABLE}, else downloaded into {CACHE})",
    )  # fmt: skip
    run.add_argument(
        "--normalize", action="store_true", default=argparse.SUPPRESS,
        help="shift and scale the images by the training set's mean and deviation (default: leave them in [0, 1])",
    )  # fmt: skip
    run.add_argument("--batch-size", type=int, default=default.batch_size, metavar="N", help="images per step")
    run.add_argument(
        "--epochs",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"(default: {_listed(DEFAULT_EPOCHS)})",
    )
    run.add_argument("--seed", type=int, default=default.seed, help="of weights, batches and rounding")
    run.add_argument("--device", default=argparse.SUPPRESS, help="(default: cuda where there is one, else cpu)")
    run.add_argument(
        "--threads", type=int, default=argparse.SUPPRESS, metavar="N", help="CPU threads (default: torch's)"
    )
    run.add_argument(
        "--distributed", action="store_true", default=argparse.SUPPRESS,
        help="one of several processes that torchrun has started: each takes a part of every batch and of the model",
    )  # fmt: skip
    _add_optimizer_options(parser.add_argument_group("optimizer"), default)
    _add_output_options(parser.add_argument_group("output"))


def _add_optimizer_options(group: Any, default: TrainConfig) -> None:
    unset = argparse.SUPPRESS
    group.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=default.optimizer,
        help="lamb: LAMB in FP32; adam: torch.optim.Adam, its weight decay not decoupled; "
        "published: the published proof of concept's rule",
    )  # fmt: skip
    group.add_argument("--lr", type=float, default=unset, help=f"(default: {_listed(DEFAULT_LR)})")
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default=default.schedule,
        help="linear and cosine fall to 1%% of --lr; linear-step, for lamb16 only, makes up for the "
        "trust ratio's growth as the rate falls",
    )
    group.add_argument("--weight-decay", type=float, default=default.weight_decay, metavar="X", help="weight decay")
    group.add_argument(
        "--betas",
        type=float,
        nargs=2,
        default=unset,
        metavar=("BETA1", "BETA2"),
        help="decay rates of the two moments (default: the optimizer's own)",
    )
    group.add_argument("--eager", action="store_true", default=unset, help="do not compile the step of lamb16")
    for name, text in LAMB16_ONLY.items():
        own = getattr(Hyper, name, None)
        kind: dict[str, Any] = {"type": float, "metavar": "X"}
        if isinstance(own, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(own, str):
            kind = {"choices": WORDS[name]}
        group.add_argument(option(name), default=unset, help=f"{text}; lamb16 only (default: {own})", **kind)


def _add_output_options(group: Any) -> None:
    group.add_argument(
        "--json", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="write settings and results"
    )
    logs = group.add_mutually_exclusive_group()
    logs.add_argument(
        "--log-dir", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="TensorBoard logs (default: a new folder in runs/)",
    )  # fmt: skip
    logs.add_argument("--no-log", action="store_true", default=argparse.SUPPRESS, help="write no TensorBoard logs")


def run(args: argparse.Namespace) -> int:
    """Run `lamb16 train`."""
    options = vars(args)
    settings = {field.name: options[field.name] for field in fields(TrainConfig) if field.name in options}
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    config = TrainConfig(**settings).completed()
    json_file: Path | None = options.get("json")
    if json_file and not json_file.absolute().parent.is_dir():  # better said now than after the training
        raise CommandError(f"cannot write {json_file}: there is no folder {json_file.absolute().parent}")
    with started_by_torchrun(config.device) if config.distributed else contextlib.nullcontext(ALONE) as workers:
        data = _load(config, workers)
        if workers.rank > 0:  # the first one reports
            train(config, data, workers=workers)
            return 0
        with (
            _open_log(config, options.get("log_dir"), "no_log" in options) as log,
            _progress(config, data) as (report, on_step),
        ):
            result = train(config, data, log=log, report=report, on_step=on_step, workers=workers)
    if json_file:
        write_json(json_file, result)
    print(
        f"test accuracy {100 * result['final_accuracy']:.2f} % "
        f"(best {100 * result['best_accuracy']:.2f} % in epoch {result['best_epoch']})"
    )
    return 0


def _load(config: TrainConfig, workers: Workers) -> ImageData:
    """The data; the first worker comes first, so that one of them downloads, and none waits for one that failed."""
    if workers.count == 1:
        return load(config.dataset, config.data)
    data: ImageData | None = None
    failure: str | None = None
    if workers.rank == 0:
        try:
            data = load(config.dataset, config.data)
        except CommandError as error:
            failure = str(error)
    first = first_text(failure)
    if first is not None:
        raise CommandError(first[1])
    return data or load(config.dataset, config.data)


def write_json(path: Path, result: Any) -> None:
    """Write `result` as strict JSON: numbers that are not finite (a diverged loss) become null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strict(v) for k, v in value.items()}
        if isinstance(value, list):
            return [strict(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    try:
        path.write_text(json.dumps(strict(result), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}", status=1) from error


def _open_log(
    config: TrainConfig, folder: Path | None, disabled: bool
) -> contextlib.AbstractContextManager[TensorBoardLog | None]:
    if disabled:
        return contextlib.nullcontext()
    if folder is None:
        what = f"{config.dataset}-{config.optimizer}-b{config.batch_size}-lr{config.lr:g}-{config.schedule}"
        # The time keeps runs apart: TensorBoard shows two runs in one folder as one.
        folder = Path("runs") / f"{what}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        return TensorBoardLog(folder)
    except OSError as error:
        raise CommandError(f"cannot write logs to {folder}: {error.strerror}") from error


@contextlib.contextmanager
def _progress(
    config: TrainConfig, data: ImageData
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[], None] | None]]:
    """What shows progress on stderr: a bar on a terminal, elsewhere a line per epoch."""
    assert config.epochs is not None

    def line(entry: dict[str, Any]) -> str:
        results = f"train loss {entry['train_loss']:.4f}, test accuracy {100 * entry['test_accuracy']:.2f} %"
        return f"epoch {entry['epoch']}/{config.epochs}: {results}"

    if not sys.stderr.isatty():
        yield lambda entry: print(line(entry), file=sys.stderr, flush=True), None
        return
    total = config.epochs * steps_per_epoch(config, data)
    with require("tqdm").tqdm(total=total, unit="step", file=sys.stderr) as bar:
        yield lambda entry: bar.write(line(entry), file=sys.stderr), lambda: bar.update()


def _listed(defaults: dict[str, Any]) -> str:
    return ", ".join(f"{value} for {name}" for name, value in defaults.items())
