"""The code that Inductor generates for CUDA, without a GPU: launches, bytes, registers, spills, and its numerics."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lamb16 import compiled
from lamb16.cli import main
from lamb16.cli.shapes import SETS
from lamb16.compiled import Kind, Step
from lamb16.cuda import fake, kernels, report
from lamb16.cuda.kernels import Launch

FUNCTIONS = Step._fields
LARGE = [(512, 512), (1000, 300), (64, 2048), (2, 3, 50_000), (70_000,)] * 4  # of more than 64k elements each


@pytest.fixture(scope="module")
def code() -> report.Code:
    """Generated once for all tests, for sm_90; a minute."""
    return report.Code(90)


@pytest.fixture(scope="module")
def large(code: report.Code) -> report.Report:
    return report.report(code, "large", LARGE)


@pytest.fixture(scope="module")
def tiny(code: report.Code) -> report.Report:
    return report.report(code, "tiny-tensors", SETS["tiny-tensors"]())


def test_large_tensors_take_few_launches_and_two_passes(large: report.Report) -> None:
    tails = 4  # launches for what is left over of tensors that are no multiple of 1,024
    assert large.launches - tails <= len(LARGE) / 4 + 4
    assert 26 <= large.bytes_per_param <= 26.5


@pytest.mark.usefixtures("code")
def test_nothing_of_the_fake_gpu_is_left() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(torch.tensor([values[0], values[1]]), values), "0-d tensors are no sequences"
    assert not torch.cuda.is_available() or torch.cuda.get_device_name()


def test_arguments_that_are_not_aligned_are_counted(code: report.Code) -> None:
    """Where the code expects aligned memory, a view at another offset would be copied at every call."""
    arguments = compiled.stand_ins("collect", code.kind._replace(device=torch.device("meta")))
    graph = code.graph("collect")
    graph(*arguments)
    assert graph.copies == []
    lanes = torch.empty(2 * 1024 + 1, dtype=torch.int32, device="meta")[1:].view(2, 1024)
    graph(*arguments[:3], lanes, *arguments[4:])
    assert len(graph.copies) == 1


def test_tiny_tensors_share_their_launches(tiny: report.Report) -> None:
    assert tiny.tensors == 400
    assert tiny.launches <= 0.1 * tiny.tensors


def test_nothing_spills_and_nothing_falls_back(large: report.Report, tiny: report.Report) -> None:
    for found in (large, tiny):
        assert found.spills == 0
        assert found.fallbacks == []
        assert found.eager == []
        assert all(kernel["registers"] <= 128 for kernel in found.kernels)


@pytest.mark.parametrize("capability", [75, 80, 100])
def test_every_kernel_compiles_for_other_architectures(code: report.Code, capability: int) -> None:
    """sm_75 and sm_80 have no e4m3 casts."""
    for name in FUNCTIONS:
        graph = code.graph(name)
        with fake.device(capability):
            for kernel in graph.kernels.values():
                assert kernel.resources(capability).spills == 0


@pytest.mark.parametrize(
    ("dtype", "float8", "least"),
    [(torch.bfloat16, True, 16), (torch.float16, True, 16), (torch.float32, False, 44)],
    ids=["bfloat16", "float16", "float32 moments"],
)
def test_other_kinds_compile(dtype: torch.dtype, float8: bool, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor a call, for sm_80; both passes read p, g, m, v, the second writes p, m, v."""
    monkeypatch.setattr(Kind, "group", 1)
    kind, moved, rows = fake.kind(dtype, float8), 0, 3
    for name in FUNCTIONS:
        graph = kernels.graph(name, kind, 80)
        with fake.device(80):
            assert all(kernel.resources(80).spills == 0 for kernel in graph.kernels.values())
        if name in ("measure", "apply"):
            launches = graph(*compiled.stand_ins(name, kind._replace(device=torch.device("meta"))))
            moved += sum(launch.bytes_read + launch.bytes_written for launch in launches)
    lanes = 2 * 8 * 1024
    assert least <= (moved - lanes) / (rows * 1024) <= least + 0.5


def test_bytes_are_those_that_inductor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the stand-ins; with one tensor a call, since of joined kernels Inductor counts shared reads several times."""
    monkeypatch.setattr(Kind, "group", 1)
    alone = report.Code(90)
    for name in ("measure", "apply", "measure_packed", "apply_packed"):
        graph = alone.graph(name)
        launches = graph(*compiled.stand_ins(name, alone.kind._replace(device=torch.device("meta"))))
        moved = sum(launch.bytes_read + launch.bytes_written for launch in launches)
        assert moved == pytest.approx(graph.generated.counted_bytes, rel=0.02), name


def test_a_kernel_that_reads_more_is_noticed() -> None:
    x = torch.empty(10, device="meta")
    assert Launch("k", {"in_ptr0": x, "out_ptr0": x, "xnumel": 10}).bytes_read == 40
    assert Launch("k", {"in_ptr0": x, "in_ptr1": x, "out_ptr0": x}).bytes_read == 80
    both = Launch("k", {"in_ptr0": x, "in_out_ptr0": x})
    assert (both.bytes_read, both.bytes_written) == (80, 40)


def test_work_outside_the_graphs_is_noticed() -> None:
    with report.EagerOperations() as seen:
        torch._foreach_copy_([torch.empty(3, device="meta")] * 65, [torch.empty(3, device="meta")] * 65)
        torch.empty(5, device="meta").view(5).add_(1)
    assert [(operation.launches, operation.bytes_moved) for operation in seen.seen] == [(2, 65 * 24), (1, 20)]


def test_no_python_number_is_baked_into_a_launch(code: report.Code) -> None:
    """Learning rates and step counts change without a new graph, so a launch may hold tensors and sizes only."""
    for name in FUNCTIONS:
        arguments = compiled.stand_ins(name, code.kind._replace(device=torch.device("meta")))
        for launch in code.graph(name)(*arguments):
            others = {key: x for key, x in launch.arguments.items() if not isinstance(x, torch.Tensor)}
            assert all(isinstance(x, int) and ("numel" in key or key.startswith("ks")) for key, x in others.items()), (
                name
            )


def test_steps_launch_the_same_on_the_same_memory(code: report.Code) -> None:
    """What a CUDA graph needs: no synchronisation, and no buffer of one step that is not there in the next."""
    steps = report.Steps(code, [(64, 64), (5,)])
    steps.take()
    first, second = ([(launch.kernel, _memory(launch)) for _, launch in steps.take()] for _ in range(2))
    assert len(first) > 3
    assert first == second
    assert steps.eager == []


def _memory(launch: Launch) -> list[int]:
    """The identities of the tensors' memory, 0 for what a graph allocates itself; meta tensors have no addresses."""
    tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    return [0 if hasattr(x, "temporary") else x.untyped_storage()._cdata for x in tensors]


def test_the_command_prints_one_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: report.Code
) -> None:
    monkeypatch.setattr(report, "Code", lambda capability: code)
    assert main(["cuda-report", "--arch", "sm_90", "--shapes", "tiny-tensors", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"arch", "shapes", "tensors", "params", "launches", "bytes_per_param", "spills", "fallbacks"} <= set(found)
    assert found["arch"] == "sm_90"
    assert found["kernels"][0]["registers"] > 0
    assert main(["cuda-report", "--shapes", "tiny-tensors"]) == 0
    assert "| sm_90 | tiny-tensors | 400 |" in capsys.readouterr().out


def test_the_kernels_compute_the_references_bits(code: report.Code, tmp_path: Path) -> None:
    """In Triton's interpreter, in a process of its own; see interpreted.py."""
    file = tmp_path / "generated.pickle"
    file.write_bytes(pickle.dumps({name: code.graph(name).generated for name in FUNCTIONS}))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted.py")), str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(results) == 8
    assert set(results.values()) == {"ok"}, results
