"""What is heard of a first step, which compiles its graphs for half a minute or more.

The logger ``lamb16`` is told at INFO, at once, and at the end how long it took. Where it drops that, the same two lines
go to standard error, from rank 0 alone, if the step is not ready after two seconds. A level above INFO that is set for
this logger, ``logging.getLogger("lamb16").setLevel(logging.WARNING)``, turns them off.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time

import torch

from .kinds import Kind

log = logging.getLogger("lamb16")
PATIENCE = 2.0  # seconds


class Wait:
    """All that one thread compiles within this context, which it may enter again, while other threads wait."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.RLock(), 0
        self.start: float | None = None  # of what is being compiled
        self.timer: threading.Timer | None = None  # where standard error is to hear of it
        self.printed = False
        self.logged: set[Kind] = set()

    def __enter__(self) -> None:
        self.lock.acquire()
        self.depth += 1

    def begin(self, kind: Kind) -> None:
        """A graph of this kind is about to be compiled, within the context."""
        line = (
            f"lamb16 compiles its step for {kind.device} (weights {kind.param_dtype}, gradients {kind.grad_dtype}): "
            "seconds where it is cached on disk, else about a minute, once per process"
        )
        if kind not in self.logged:
            self.logged.add(kind)
            log.info("%s", line)
        if self.start is None:
            self.start, self.printed = time.monotonic(), False
            if _prints():
                self.timer = threading.Timer(PATIENCE, self._print, [line])
                self.timer.daemon = True
                self.timer.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.depth -= 1
            if not self.depth and self.start is not None:
                self._end(self.start, kind is None)
        finally:
            self.lock.release()

    def _end(self, start: float, ready: bool) -> None:
        timer, self.start, self.timer = self.timer, None, None
        if timer is not None:
            timer.cancel()
            timer.join()
        if ready:
            line = f"lamb16 compiled its step in {time.monotonic() - start:.1f} s"
            log.info("%s", line)
            if self.printed:
                self._print(line)

    def _print(self, line: str) -> None:
        self.printed = True
        with contextlib.suppress(OSError, ValueError):  # closed, or a pipe that nobody reads
            if sys.stderr is not None:  # as with pythonw
                print(line, file=sys.stderr, flush=True)


WAIT = Wait()


def _prints() -> bool:
    """Whether standard error is the place: the logger drops INFO, though nobody told it to, and this is rank 0."""
    wanted = log.level <= logging.INFO and log.manager.disable < logging.INFO
    return wanted and not (log.isEnabledFor(logging.INFO) and log.hasHandlers()) and _rank() == "0"


def _rank() -> str:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return str(torch.distributed.get_rank())
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
