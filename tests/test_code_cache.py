"""Generated code that is kept on disk: a later process neither traces nor compiles, and gets the same code."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.cpu_vec_isa

from lamb16.step import code_cache, examples, graph_code, update
from lamb16.step.graph_code import Call
from lamb16.step.kinds import Graph, Kind

GRAPH, KIND = Graph("inspect"), Kind(torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "lamb16"


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are compiled from here on."""
    found: list[Graph] = []
    original = graph_code._compiled

    def compile_it(graph: Graph, kind: Kind, one_loop: bool) -> Call:
        found.append(graph)
        return original(graph, kind, one_loop)

    monkeypatch.setattr(graph_code, "_compiled", compile_it)
    return found


def largest(code: Call, row: int) -> torch.Tensor:
    """What ``inspect`` finds in a gradient that is 3 in one row."""
    arguments = examples.example_inputs(GRAPH, KIND)
    arguments[0][0].g[row] = 3.0
    code(arguments)
    return arguments[1][0][0].view(torch.float32)


def test_kept_code_is_used_and_right(folder: Path, compiled_anew: list[Graph]) -> None:
    graph_code.compile_once(GRAPH, KIND)
    assert len(list(folder.iterdir())) == 1
    code = graph_code.compile_once(GRAPH, KIND)
    assert compiled_anew == [GRAPH]
    for row in (0, 2):
        found = largest(code, row)
        assert found.tolist() == [3.0 * (k == row) for k in range(3)]
        assert torch.equal(found, largest(lambda given: update.inspect(*given), row))


def test_code_for_cuda_is_neither_kept_nor_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load", "save"):
        monkeypatch.setattr(code_cache, name, lambda *given: pytest.fail(f"{given}"))
    made = graph_code.Code(len, [graph_code.Origin(0, "tensor", 0)], boxed=True)
    monkeypatch.setattr(graph_code, "_compiled", lambda *given, **more: made)
    assert graph_code.compile_once(GRAPH, Kind(torch.device("cuda"))) is made


@pytest.mark.parametrize(
    "damage", ["", "{}", '{"source": "a b", "origins": [[0, "tensor", 0]]}', '{"source": "call = len", "origins": []}']
)
def test_damaged_files_are_made_anew(folder: Path, compiled_anew: list[Graph], damage: str) -> None:
    graph_code.compile_once(GRAPH, KIND)
    (path,) = folder.iterdir()
    whole = path.read_text()
    path.write_text(damage)
    graph_code.compile_once(GRAPH, KIND)
    assert compiled_anew == [GRAPH, GRAPH]
    assert path.read_text() == whole


NAME = "a name"


def keep(source: str = "call = len", **more: object) -> None:
    code_cache.save(NAME, SimpleNamespace(source_code=source, **more), [(0, "tensor", 0)])


@pytest.mark.parametrize("what", ["sources", "settings", "instructions", "vectors", "tag", "deterministic", "dtype"])
def test_code_belongs_to_what_it_follows_from(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    keep()
    assert code_cache.load(NAME) == (len, [(0, "tensor", 0)])
    assert code_cache.load("another name") is None
    with monkeypatch.context() as patch, torch._inductor.config.patch({"cpp.simdlen": 8} if what == "settings" else {}):
        if what == "sources":
            patch.setattr(code_cache, "SOURCES", "other")
        if what == "instructions":
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
        if what == "vectors":
            patch.setattr(torch._inductor.cpu_vec_isa, "pick_vec_isa", lambda: "other")
        torch.use_deterministic_algorithms(what == "deterministic")
        torch.set_default_dtype(torch.float64 if what == "dtype" else torch.float32)
        try:
            with torch.compiler.config.patch(cache_key_tag="other" if what == "tag" else ""):
                assert code_cache.load(NAME) is None
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_default_dtype(torch.float32)
    assert code_cache.load(NAME) is not None


def test_the_sources_are_all_modules_but_the_labs(tmp_path: Path) -> None:
    names, digests = ["hyper.py", "step/update.py", "sharding/layout.py", "lab/bench.py", "lab/study/runs.py"], []
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        digests.append(code_cache._digest(tmp_path))
    assert len(set(digests[:3])) == 3
    assert len(set(digests[2:])) == 1
    (tmp_path / names[1]).write_text("other")
    assert code_cache._digest(tmp_path) not in digests


def test_nothing_is_kept_where_inductor_keeps_nothing(folder: Path) -> None:
    for setting in ({"fx_graph_cache": False}, {"force_disable_caches": True}):
        with torch._inductor.config.patch(setting):
            keep()
            assert not folder.exists()
    keep()
    with torch._inductor.config.patch(force_disable_caches=True):
        assert code_cache.load(NAME) is None
    for stance in ({"stance": "force_eager"}, {"stance": "default", "force_backend": "eager"}):
        with torch.compiler.set_stance(**stance):
            assert code_cache.load(NAME) is None
    with torch._inductor.config.patch(post_grad_custom_pre_pass=len):
        assert code_cache.load(NAME) is None
    assert code_cache.load(NAME) is not None


def test_settings_without_a_digest_are_no_error(folder: Path) -> None:
    with torch._inductor.config.patch({"bucket_all_gathers_fx_bucket_size_determinator": lambda i: i}):
        keep()
        assert code_cache.load(NAME) is None
    assert not folder.exists()


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
