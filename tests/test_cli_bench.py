"""`lamb16 bench`: what is stepped and reported; no test looks at a time."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lamb16 import Lamb16
from lamb16.cli import main
from lamb16.lab import bench, beside_adamw, registry, releasing, timing
from lamb16.lab.errors import CommandError
from lamb16.lab.shapes import SETS


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("mlp", 16, 8_396_800),
        ("resnet50", 161, 25_557_032),
        ("bert-base", 197, 108_891_648),
        ("bert-large", 389, 334_092_288),
        ("gpt2", 196, 124_439_808),
        ("tiny-tensors", 400, 189_800),
    ],
)
def test_the_shapes_are_those_of_the_models(name: str, tensors: int, parameters: int) -> None:
    shapes = SETS[name]()
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes)) == (tensors, parameters)


def test_a_run_reports_every_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SETS, "mlp", lambda: [(70, 70), (9,)])
    monkeypatch.setitem(bench.OWN, "broken", _broken)
    monkeypatch.setattr(beside_adamw, "MOST_ELEMENTS", 300_000)
    file, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    options = ["--rounds", "2", "--passes", "--release", "--device", "cpu", "--json", str(file), "--plot", str(picture)]
    options += ["--sizes", "4000", "30", "--size-plot", str(tmp_path / "sizes.svg")]
    assert main(["bench", "--shapes", "mlp", *options]) == 0
    written = json.loads(file.read_text())
    rows = {row["name"]: row for row in written["results"]["mlp"]}
    assert set(rows) == {bench.COPY, *bench.OWN}
    assert rows.pop("broken")["error"] == "ValueError: no step for you"
    assert rows["Lamb16 compiled"]["state_bytes"] == 2 * 4909 + 2 * 56
    assert rows["AdamW fused"]["to_adamw"] == rows[bench.COPY]["to_copy"] == 1
    assert all(row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows.values())
    assert written["settings"]["rounds"] == 2
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in rows)
    assert "could not run: ValueError" in table
    assert {"inspect", "scale", "update", "update packed", "fold", "rest"} <= set(written["passes"]["mlp"])
    assert all(ns > 0 for ns in written["passes"]["mlp"].values())
    costs = {row["name"]: row["to_ordinary"] for row in written["release"]["mlp"]}
    assert costs.keys() == {releasing.ORDINARY, releasing.RELEASED, releasing.EACH}
    assert costs[releasing.ORDINARY] == 1
    assert all(f"| {name} |" in table for name in costs)
    assert "<svg" in picture.read_text()
    assert [row["numel"] for row in written["sizes"]] == [30, 4000]
    several = {(row["numel"], row["tensors"]): row for row in written["several"]}
    assert several.keys() == {(30, 10), (30, 60), (30, 400), (4000, 10), (4000, 60)}
    assert [place for place, row in several.items() if row.get("new_to_same", 0) > 0] == [
        (30, 60),
        (30, 400),
        (4000, 60),
    ]
    assert all(row["ns_per_param"] > 0 and row["to_adamw"] > 0 for row in written["sizes"] + written["several"])
    assert beside_adamw.size_table(written["sizes"]) in table
    ratios = [row["to_adamw"] for row in (written["sizes"][1], several[4000, 10], several[4000, 60])]
    assert f"| 4,000 | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | left out |" in table
    assert f"| 4,000 | {several[4000, 60]['new_to_same']:.2f} | left out |" in table
    assert "<svg" in (tmp_path / "sizes.svg").read_text()


def test_a_new_set_is_another_one_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine tenths of the tensors, beside those that stay the same."""
    params = timing.make_params([(3,)] * 20, torch.float32, torch.device("cpu"))
    stepped: list[frozenset[int]] = []

    class Noting(torch.optim.SGD):
        def step(self) -> None:
            stepped.append(frozenset(k for k, p in enumerate(params) if p.grad is not None))

    monkeypatch.setattr(beside_adamw, "lamb16", lambda params: Noting(params))
    assert beside_adamw.new_to_same(params, torch.device("cpu"), 3) > 0
    assert {len(each) for each in stepped} == {18}
    assert (len({*stepped[::2]}), len({*stepped[1::2]})) == (5, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_hosts_work_is_that_of_a_step_without_kernels(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SETS, "resnet18", lambda: [(70, 70), (9,)])
    monkeypatch.setattr(bench, "HOST_SHAPES", ["resnet18"])
    file = tmp_path / "host.json"
    assert main(["bench", "--host", "--device", "cpu", "--dtype", dtype, "--rounds", "2", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written.keys() == {"settings", "host"}
    (row,) = written["host"]
    assert (row["name"], row["tensors"], row["parameters"]) == ("resnet18", 2, 4909)
    assert min(row["median_ms"], row["adamw_median_ms"], row["to_adamw"]) > 0
    assert beside_adamw.table([row]) in capsys.readouterr().out
    params = timing.make_params([(70, 70), (9,)], bench.DTYPES[dtype], torch.device("cpu"))
    before = [p.detach().clone() for p in params]
    with beside_adamw.without_kernels() as factory:
        factory(params).step()
    assert all(map(torch.equal, params, before))


def test_the_step_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(beside_adamw, "SHARDED", [[(7, 3), (5,)], [(64, 64)]])
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    file, threads = tmp_path / "ranks.json", torch.get_num_threads()
    assert main(["bench", "--ranks", "2", "--device", "cpu", "--rounds", "2", "--json", str(file)]) == 0
    torch.set_num_threads(threads)
    written = json.loads(file.read_text())
    assert (written["settings"]["threads"], written["ranks"]["count"]) == (1, 2)
    rows = written["ranks"]["rows"]
    assert [(row["tensors"], row["parameters"]) for row in rows] == [(2, 26), (1, 4096)]
    assert all(min(row["median_ms"], row["adamw_median_ms"], row["to_adamw"]) > 0 for row in rows)
    assert beside_adamw.table(rows) in capsys.readouterr().out


def test_a_rank_that_fails_is_reported() -> None:
    with pytest.raises(CommandError, match=r"a rank failed: RuntimeError: .*negative"):
        beside_adamw.ranks([[(-1,)]], 2, torch.float32, rounds=1)


def test_the_compiled_step_is_the_one_that_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands first: fused AdamW's step cannot be captured."""
    factories = {bench.BASELINE: bench.OWN[bench.BASELINE]} | bench.OWN
    params = timing.make_params([(5, 5)], torch.float32, torch.device("cpu"))
    name, step = timing.as_graph(factories, bench.COMPILED, params, capture=lambda call: call)
    assert name == "Lamb16 compiled, CUDA graph"
    assert isinstance(step.__self__, Lamb16)
    given: list[object] = []
    monkeypatch.setattr(timing, "measure", lambda *arguments: given.extend(arguments) or [])
    bench.measure([(5, 5)], torch.float32, torch.device("cuda"), 1, {"Adam": bench._peer("adam")})
    assert given[-1] == bench.COMPILED


def _broken(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    raise ValueError("no step for you")


def test_peers_are_run_or_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PEERS", ("adam", "nowhere"))
    missing = registry.OptimizerInfo("Nowhere", lambda *_, **__: importlib.import_module("nowhere"), 0.1, "nowhere")
    monkeypatch.setitem(registry.REGISTRY, "nowhere", missing)
    factories = {registry.REGISTRY[name].label: bench._peer(name) for name in bench.PEERS}
    rows = {row["name"]: row for row in bench.measure([(5, 5)], torch.float32, torch.device("cpu"), 1, factories)}
    assert rows["Adam"]["median_s"] > 0
    assert "nowhere" in rows["Nowhere"]["error"]


def test_what_would_compile_for_every_shape_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MOST_SHAPES", 2)
    foreign = registry.OptimizerInfo(
        "Foreign", lambda named, **_: torch.optim.SGD([p for _, p in named]), 0.1, "torchao"
    )
    monkeypatch.setitem(registry.REGISTRY, "foreign", foreign)
    few, many = ([(str(n), nn.Parameter(torch.ones(n))) for n in range(k)] for k in (2, 3))
    assert registry.build("foreign", [*few, ("again", nn.Parameter(torch.ones(1)))], lr=0.1, weight_decay=0)
    assert registry.build("adam", many, lr=0.1, weight_decay=0)
    with pytest.raises(CommandError, match="left out: it would compile for each of 3 shapes"):
        registry.build("foreign", many, lr=0.1, weight_decay=0)


def test_peak_memory_counts_what_is_freed_again() -> None:
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.append(torch.zeros(1000))
        torch.ones(3000).add_(1)

    assert 16_000 <= timing.peak_bytes(call, torch.device("cpu")) < 16_100  # the 1 is a tensor too


def test_a_step_takes_no_memory_beyond_its_state() -> None:
    """At most 1 % of the parameters' bytes, the compilation included; later steps take next to nothing."""
    params = timing.make_params([(2048, 2048), (1024,), (300, 70)] * 2, torch.float32, torch.device("cpu"))
    size = 4 * sum(p.numel() for p in params)
    optimizer = Lamb16(params)
    first = timing.peak_bytes(optimizer.step, torch.device("cpu"))
    assert timing.state_bytes(optimizer) < first < timing.state_bytes(optimizer) + 0.01 * size
    assert timing.peak_bytes(optimizer.step, torch.device("cpu")) < 0.002 * size  # what is found in every row


def test_compile_times_are_taken_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else a new cache tries what the processor can do
    (row,) = timing.compile_times([1], 64, "float32", 1)
    assert (row["tensors"], row["parameters"]) == (21, 2_036_416)
    assert 0 < row["warm_s"] < row["cold_s"]
    assert "| 21 | 2,036,416 |" in bench.compile_table([row])


@pytest.mark.parametrize(
    "options",
    [
        ["--rounds", "0"],
        ["--threads", "0"],
        ["--threads", "9999"],
        ["--device", "nowhere"],
        ["--device", "meta"],
        ["--json", "/nowhere/b.json"],
        ["--plot", "/nowhere/b.svg"],
        ["--sizes", "0"],
        ["--size-plot", "sizes.svg"],
        ["--ranks", "1"],
        ["--ranks", "9999"],
        ["--ranks", "0"],
    ],
)
def test_wrong_values_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert options[0 if options[0] == "--size-plot" else 1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "--sizes", "5"], "--host has a table of its own; leave --sizes out"),
        (["--host", "--ranks", "2"], "--host has a table of its own; leave --ranks out"),
        (["--ranks", "2", "--compile-time"], "--ranks has a table of its own; leave --compile-time out"),
        (["--ranks", "2", "--threads", "1"], "one thread per rank; leave --threads out"),
        (["--ranks", "2", "--shapes", "mlp"], "tensors of its own, and one thread per rank; leave --shapes out"),
    ],
)
def test_what_has_a_table_of_its_own_goes_with_few_options(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    assert main(["bench", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_ranks_are_not_on_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(bench, "_device", torch.device)
    assert main(["bench", "--ranks", "2", "--device", "cuda"]) == 2
    assert "add --device cpu" in capsys.readouterr().err
