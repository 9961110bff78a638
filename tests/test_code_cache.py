"""Generated code that is kept on disk: a later process neither traces nor compiles, and gets the same code."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor

from helpers import DEVICE
from lamb16 import code_cache, compiled
from lamb16.compiled import Call, Graph, Kind

GRAPH, KIND = Graph("inspect"), Kind(DEVICE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "lamb16"


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are compiled from here on."""
    found: list[Graph] = []
    original = compiled._compiled

    def compile_it(graph: Graph, kind: Kind, one_loop: bool) -> Call:
        found.append(graph)
        return original(graph, kind, one_loop)

    monkeypatch.setattr(compiled, "_compiled", compile_it)
    return found


def largest(code: Call, row: int) -> torch.Tensor:
    """What ``inspect`` finds in a gradient that is 3 in one row."""
    arguments = compiled.example_inputs(GRAPH, KIND)
    for block in arguments[0]:
        block.g[row] = 3.0
    code(arguments)
    return torch.cat([x.view(torch.float32) for (x,) in arguments[1]])


def test_kept_code_is_used_and_right(folder: Path, compiled_anew: list[Graph]) -> None:
    first = compiled.compile_once(GRAPH, KIND)
    assert len(list(folder.iterdir())) == 1
    second = compiled.compile_once(GRAPH, KIND)
    assert compiled_anew == [GRAPH]
    for row in (0, 2):
        found = largest(second, row)
        assert torch.equal(found, largest(first, row))
        assert found[row] == 3
        assert found.count_nonzero() == len(found) // 3  # one row of three, of every tensor


@pytest.mark.parametrize("damage", ["", "{}", '{"source": "syntax error", "origins": []}'])
def test_damaged_files_are_made_anew(folder: Path, compiled_anew: list[Graph], damage: str) -> None:
    compiled.compile_once(GRAPH, KIND)
    (path,) = folder.iterdir()
    whole = path.read_text()
    path.write_text(damage)
    compiled.compile_once(GRAPH, KIND)
    assert compiled_anew == [GRAPH, GRAPH]
    assert path.read_text() == whole


NAME = "a name"


def keep(source: str = "call = len", **more: object) -> None:
    code_cache.save(NAME, SimpleNamespace(source_code=source, **more), [(0, "tensor", 0)])


@pytest.mark.parametrize("what", ["sources", "settings", "instructions", "compiler", "deterministic algorithms"])
def test_code_belongs_to_what_it_follows_from(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    keep()
    assert code_cache.load(NAME) == (len, [(0, "tensor", 0)])
    assert code_cache.load("another name") is None
    with torch._inductor.config.patch({"cpp.simdlen": 8} if what == "settings" else {}):
        if what == "sources":
            monkeypatch.setattr(code_cache, "_sources", lambda: "other")
        if what == "instructions":
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
        if what == "compiler":
            monkeypatch.setenv("CXX", "other")
        torch.use_deterministic_algorithms(what == "deterministic algorithms")
        try:
            assert code_cache.load(NAME) is None
        finally:
            torch.use_deterministic_algorithms(False)
    assert (code_cache.load(NAME) is None) == (what in ("sources", "instructions", "compiler"))


def test_nothing_is_kept_where_inductor_keeps_nothing(folder: Path) -> None:
    for setting in ({"fx_graph_cache": False}, {"force_disable_caches": True}):
        with torch._inductor.config.patch(setting):
            keep()
            assert not folder.exists()
    keep()
    with torch._inductor.config.patch(force_disable_caches=True):
        assert code_cache.load(NAME) is None
    with torch.compiler.set_stance("force_eager"):
        assert code_cache.load(NAME) is None


def test_code_with_constants_is_not_kept(folder: Path) -> None:
    keep(constants={"a": torch.ones(1)})
    keep(source="")
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_to_is_no_error(folder: Path) -> None:
    folder.write_text("a file")
    keep()
    assert code_cache.load(NAME) is None


def test_a_file_is_replaced_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep()
    (path,) = folder.iterdir()
    assert json.loads(path.read_text())["name"] == NAME
    keep("call = max")
    assert list(folder.iterdir()) == [path]
    assert code_cache.load(NAME) == (max, [(0, "tensor", 0)])
