"""Signals that wait until a step is whole."""

from __future__ import annotations

import signal
import threading

# Under ``signal`` these make members of an enum of their results, for 2 µs of each call.
from _signal import getsignal as handler_of  # type: ignore[import-not-found]
from _signal import signal as handle
from types import FrameType
from typing import Any

NUMBERS = sorted(map(int, signal.valid_signals()))


class Held:
    """Within this context no handler of a signal runs, and so none raises; those that were called run at its end.

    Handlers are run by Python's main thread alone: in other threads nothing is to be held back.
    """

    def __enter__(self) -> None:
        self.open = False
        self.waiting: list[tuple[int, FrameType | None]] = []
        self.handlers: dict[int, Any] = {}
        if threading.get_ident() == threading.main_thread().ident:
            self.handlers = {x: handler for x in NUMBERS if callable(handler := handler_of(x))}
            for number in self.handlers:
                handle(number, self._called)

    def _called(self, number: int, frame: FrameType | None) -> None:
        if self.open:
            self.handlers[number](number, frame)
        else:
            self.waiting.append((number, frame))

    def __exit__(self, *_: object) -> None:
        self.open = True  # whatever comes from here on, and wherever this is left, the handlers are what they were
        for number, handler in self.handlers.items():
            if handler_of(number) == self._called:
                handle(number, handler)
        for number, frame in self.waiting:
            self.handlers[number](number, frame)
