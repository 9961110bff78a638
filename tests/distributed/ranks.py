"""Processes that run a function as the ranks of a gloo group. Started once for all tests: each has to import torch."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import helpers  # noqa: F401 what it sets is meant for these processes too

MOST = 4
PATIENCE = 600  # seconds; a collective gives up before that


class Ranks:
    """``MOST`` processes with one thread each."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        pairs = [context.Pipe() for _ in range(MOST)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs]
        for process in self.processes:
            process.start()

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function of a module returns on every rank; an error on one of them is raised here."""
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self.pipes[:world]):
                pipe.send((function, arguments, rank, world, f"{folder}/store"))
            answers = [self._answer(rank) for rank in range(world)]
        failed = [f"rank {rank}: {text}" for rank, (good, text) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [result for _, result in answers]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        if not self.pipes[rank].poll(PATIENCE):
            self.stop()
            self._start()
            raise AssertionError(f"rank {rank} hangs")
        return pickle.loads(self.pipes[rank].recv_bytes())

    def stop(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            function, arguments, rank, world, store = pipe.recv()
        except EOFError:  # the tests are over
            return
        try:
            with group(rank, world, store):
                answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


@contextlib.contextmanager
def group(rank: int, world: int, store: str | Path, seconds: int = 240) -> Iterator[None]:
    """The default process group, over gloo, with a file to meet at."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
