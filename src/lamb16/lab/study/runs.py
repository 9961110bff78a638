"""Many trainings, one after another in a few worker processes, each result kept in a file as soon as it is there.

The file is the study's result and its memory: a study that was interrupted, or is asked for more, runs only what the
file does not hold yet. A result is used again only if its settings, torch's version and the optimizer's code are the
same; after a change of the tasks or of what is measured, move the file away.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lamb16.lab.errors import CommandError

Job = Any  # a frozen dataclass of JSON values: the settings of one training
Result = dict[str, Any]

# What an optimizer's numbers follow from. The rule is reference.py's with hyper.py's defaults: tests hold the fast step
# to its bits.
SOURCES = {
    "lamb16": ("lamb16.reference", "lamb16.hyper"),
    "variant": ("lamb16.reference", "lamb16.hyper", "lamb16.lab.study.variants"),
    "lamb": ("lamb16.baselines",),
    "published": ("lamb16.baselines",),
}


class Results:
    """The results of a study's runs, in one JSON file."""

    def __init__(self, path: Path, study: str) -> None:
        self.path, self.study = path, study
        self.runs: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}
        if path.exists():
            try:
                content = json.loads(path.read_text())
                self.runs, self.extra = content["runs"], content["extra"]
            except (ValueError, KeyError, TypeError) as error:
                raise CommandError(f"{path} is no result of this command ({error!r}); move it away") from error
            if content.get("study") != study:
                raise CommandError(f"{path} holds the study {content.get('study')!r}, not {study!r}; move it away")
        self._known = {_identity(run["settings"]): run for run in self.runs}

    def get(self, job: Job) -> Result | None:
        """The result of a run with these settings and the present code, if there is one."""
        run = self._known.get(_identity(settings(job)))
        return run["result"] if run and run["code"] == code(job) else None

    def recorded(self, job: Job) -> Result | None:
        """The result of a run with these settings, whatever the code was that gave it."""
        run = self._known.get(_identity(settings(job)))
        return run["result"] if run else None

    def add(self, job: Job, result: Result) -> None:
        """Keep a result, in the file too."""
        result = _strict(result)  # as it will be read again, so that tables and plots are the same then
        self._known[_identity(settings(job))] = {"settings": settings(job), "code": code(job), "result": result}
        self.runs = list(self._known.values())
        self.save()

    def save(self) -> None:
        """Replace the file at once, so that an interruption leaves the old or the new one; a line per run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Settings are kept digit for digit: they are what a run is found again by.
        runs = sorted(json.dumps(run, allow_nan=False) for run in self.runs)
        head = json.dumps({"study": self.study, "extra": _strict(self.extra)}, allow_nan=False)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(head[:-1] + ', "runs": [\n' + ",\n".join(runs) + "\n]}\n")
        os.replace(temporary, self.path)


def settings(job: Job) -> dict[str, Any]:
    """The settings that are not the defaults, so that results stay known when there are more settings."""
    return {f.name: value for f in fields(job) if (value := getattr(job, f.name)) != f.default}


def _identity(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _strict(value: Any) -> Any:
    """The value with six significant digits and null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _strict(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def code(job: Job) -> str:
    """The versions and the optimizer's source that a result depends on, as a short text."""
    return code_of(job.optimizer)


def code_of(optimizer: str) -> str:
    """The same for an optimizer by name."""
    sources = SOURCES.get(optimizer, ())
    return f"torch {torch.__version__}" + "".join(f" {name.rsplit('.')[-1]} {digest(name)}" for name in sources)


@functools.cache
def digest(module: str) -> str:
    """A digest of a module's statements, without comments and docstrings."""
    path = importlib.import_module(module).__file__
    assert path is not None
    tree = ast.parse(Path(path).read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:10]


def _is_docstring(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def pairs_of(study: Any, sizes: Any, results: Callable[[Sequence[Job]], list[Result]]) -> list[tuple[Job, Result]]:
    """All jobs of a study module with their results: those of ``jobs``, then, as long as there are, of ``more``.

    ``more(pairs, sizes)`` are jobs that follow from the results so far; those that are known by then are left out.
    """
    pairs: list[tuple[Job, Result]] = []
    jobs = list(study.jobs(sizes))
    while jobs:
        pairs += zip(jobs, results(jobs), strict=True)
        known = {job for job, _ in pairs}
        jobs = [job for job in study.more(pairs, sizes) if job not in known] if hasattr(study, "more") else []
    return pairs


class Workers(ProcessPoolExecutor):
    """Processes with one thread each, for all studies of a command: a context, in which the first runs start them."""

    def __init__(self, count: int) -> None:
        """``count`` processes."""
        super().__init__(count, mp_context=get_context("spawn"), initializer=_prepare_worker)
        self.count = count

    def __enter__(self) -> Workers:
        # glibc would give large activations back to the system and fault them in again at every step: a fifth of the
        # time. Workers take the environment over when they start.
        self._before = set(os.environ)
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(8 << 30))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for process in list((self._processes or {}).values()):
                process.terminate()
        try:
            self.shutdown(wait=True, cancel_futures=True)
        finally:
            for name in set(os.environ) - self._before:
                del os.environ[name]


def run_all(
    jobs: Sequence[Job],
    execute: Callable[[Job], Result],
    results: Results,
    workers: Workers,
    describe: Callable[[Job], str],
) -> list[Result]:
    """The results of all jobs in order; those that ``results`` does not hold are run by the workers.

    Progress goes to standard error. Interrupted, it raises KeyboardInterrupt, and CommandError where a worker dies;
    what had finished is in the file.
    """
    missing = [job for job in dict.fromkeys(jobs) if results.get(job) is None]
    if missing:
        _run_missing(missing, execute, results, workers, describe)
    return [results.get(job) or {} for job in jobs]


def _run_missing(
    missing: list[Job],
    execute: Callable[[Job], Result],
    results: Results,
    workers: Workers,
    describe: Callable[[Job], str],
) -> None:
    print(f"{results.study}: {len(missing)} runs, {workers.count} at a time", file=sys.stderr, flush=True)
    start, total = time.monotonic(), len(missing)
    # An interruption inside `wait` could leave a lock of the pool taken, so it is only noted, and raised between waits.
    interrupted: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is threading.main_thread() and handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        pending: dict[Future[Result], Job] = {workers.submit(execute, job): job for job in missing}
        finished = 0
        while pending and not interrupted:
            done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=_failed):  # what has finished is kept before a failure ends the study
                if interrupted and _failed(future):  # of the same signal
                    break
                job = pending.pop(future)
                result = future.result()
                results.add(job, result)
                finished += 1
                left = (time.monotonic() - start) / finished * (total - finished)
                line = f"[{finished}/{total}, about {left / 60:.0f} min left] {describe(job)}: {summary(result)}"
                print(line, file=sys.stderr, flush=True)
    except BrokenProcessPool as error:
        raise CommandError(
            f"a worker died, perhaps for want of memory: run the command again, with fewer --workers; what had "
            f"finished is in {results.path}"
        ) from error
    finally:
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)
    if interrupted:
        raise KeyboardInterrupt


def _failed(future: Future[Result]) -> bool:
    return future.exception() is not None


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    logging.getLogger("lamb16").setLevel(logging.WARNING)  # the study's own lines say how far it is


def summary(result: Result) -> str:
    """The figures of a result in one line."""
    shown = {"best_accuracy": "best {:.2%}", "train_loss": "train loss {:.4g}", "validation_loss": "loss {:.4f}"}
    return ", ".join(text.format(result[key]) for key, text in shown.items() if result.get(key) is not None)
