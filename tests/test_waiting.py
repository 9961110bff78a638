"""What is heard of a first step while it compiles."""

import functools
import logging
import re
import sys
import threading
from collections.abc import Callable

import pytest
import torch

from helpers import parameters, take_steps
from lamb16 import Lamb16
from lamb16.step import compiled, update, waiting
from lamb16.step.graph_code import Call
from lamb16.step.kinds import Graph, Kind
from lamb16.step.waiting import WAIT

BASE = {"lr": 0.01, "weight_decay": 0.1}
HALVES = torch.bfloat16


def heard(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lamb16's lines on stderr, where torch says things too."""
    captured = capsys.readouterr()
    assert "lamb16" not in captured.out
    return [line for line in captured.err.splitlines() if "lamb16" in line]


def first_step(*dtypes: torch.dtype) -> None:
    take_steps(Lamb16([p for dtype in dtypes for p in parameters(dtype=dtype)], **BASE), range(2))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """As in a new process, with a compiler that is "quick" or "slow": to be announced before a graph is there."""
    monkeypatch.setattr(compiled, "_graph", functools.cache(compiled._Lazy))
    monkeypatch.setattr(WAIT, "logged", set())
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def compile_once(graph: Graph, kind: Kind) -> Call:
        if waiting.PATIENCE == 0 and WAIT.timer is not None:
            WAIT.timer.join()
        return lambda arguments: update.FUNCTIONS[graph.function](*arguments)

    monkeypatch.setattr(compiled, "compile_once", compile_once)
    return lambda speed: monkeypatch.setattr(waiting, "PATIENCE", {"quick": 3600.0, "slow": 0.0}[speed])


def test_what_takes_long_is_said_on_stderr_once_for_all_graphs(
    compiler: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    compiler("slow")
    for dtypes in ([torch.float32, HALVES], [torch.float32], [torch.float16]):
        first_step(*dtypes)
        if dtypes == [torch.float32]:  # compiled already
            assert heard(capsys) == []
            continue
        begun, ended = heard(capsys)
        assert begun.startswith(f"lamb16 compiles its step for {parameters()[0].device} (weights {dtypes[0]}, ")
        assert re.fullmatch(r"lamb16 compiled its step in \d+\.\d s", ended)


def test_nothing_is_said_of_what_is_quick(compiler: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    compiler("quick")
    first_step(torch.float32)
    assert heard(capsys) == []
    assert WAIT.timer is None
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


@pytest.mark.parametrize("switch", ["level", "disable"])
def test_loggings_own_switches_turn_it_off(
    compiler: Callable[[str], None], capsys: pytest.CaptureFixture[str], switch: str
) -> None:
    compiler("slow")
    logger = logging.getLogger("lamb16")
    before = logger.level
    try:
        if switch == "level":
            logger.setLevel(logging.WARNING)
        else:
            logging.disable(logging.INFO)
        first_step(torch.float32)
    finally:
        logger.setLevel(before)
        logging.disable(logging.NOTSET)
    assert heard(capsys) == []


def test_a_log_at_info_is_told_in_its_place(
    compiler: Callable[[str], None], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, one line per kind, and one each time that something was compiled."""
    compiler("slow")
    caplog.set_level(logging.INFO, "lamb16")
    for dtype in (torch.float32, HALVES, torch.float32):
        first_step(dtype)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lamb16")]
    device = parameters()[0].device
    assert [line.split(",")[0] for line in lines[::2]] == [
        f"lamb16 compiles its step for {device} (weights {dtype}" for dtype in (torch.float32, HALVES)
    ]
    assert [line.split(" in ")[0] for line in lines[1::2]] == ["lamb16 compiled its step"] * 2
    assert heard(capsys) == []


def test_a_level_without_a_handler_is_no_log(
    compiler: Callable[[str], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("slow")
    monkeypatch.setattr(waiting.log, "propagate", False)  # to pytest's handlers
    monkeypatch.setattr(waiting.log, "level", logging.INFO)
    waiting.log.manager._clear_cache()  # type: ignore[attr-defined]
    first_step(torch.float32)
    waiting.log.manager._clear_cache()  # type: ignore[attr-defined]
    assert len(heard(capsys)) == 2


@pytest.mark.parametrize(
    ("environment", "rank", "speaks"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, None, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, None, False),
        ({"LOCAL_RANK": "1"}, None, False),
        ({"RANK": "0"}, 1, False),
        ({"RANK": "1"}, 0, True),
    ],
)
def test_one_rank_speaks_for_all(
    compiler: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    rank: int | None,
    speaks: bool,
) -> None:
    compiler("slow")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if rank is not None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    compiled.Compiled().prepare(Graph("inspect"), Kind(torch.device("cpu")))
    assert bool(heard(capsys)) == speaks


def test_a_compiler_that_fails_has_not_compiled(
    compiler: Callable[[str], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("slow")

    def fail(graph: Graph, kind: Kind) -> Call:
        assert WAIT.timer is not None
        WAIT.timer.join()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "compile_once", fail)
        with pytest.raises(RuntimeError, match="no space left"):
            first_step(torch.float32)
    (line,) = heard(capsys)
    assert line.startswith("lamb16 compiles its step")
    first_step(torch.float32)
    assert len(heard(capsys)) == 2


@pytest.mark.parametrize("stream", ["none", "closed"])
def test_a_step_needs_no_stderr(
    compiler: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: object,
    stream: str,
) -> None:
    compiler("slow")
    with open(f"{tmp_path}/closed", "w") as closed:
        pass
    monkeypatch.setattr(sys, "stderr", None if stream == "none" else closed)
    first_step(torch.float32)
    assert heard(capsys) == []  # nor on stdout


def test_a_thread_that_waits_for_another_says_nothing(
    compiler: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    compiler("slow")
    threads = [threading.Thread(target=first_step, args=(torch.float32,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heard(capsys)) == 2
