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

from lamb16.cli import main
from lamb16.lab.cuda import fake, gpus, report, sass
from lamb16.lab.cuda.kernels import Launch
from lamb16.lab.shapes import SETS
from lamb16.step import examples
from lamb16.step.kinds import GRAPHS, Graph, Kind

STEP = (
    Graph("inspect"), Graph("inspect", packed=True), Graph("scale"), Graph("update"), Graph("update", packed=True),
    Graph("fold"),
)  # fmt: skip
META = torch.device("meta")
LARGE = [(512, 512), (1000, 300), (64, 2048), (2, 3, 50_000), (70_000,)] * 4  # of more than 64k elements each


@pytest.fixture(scope="module")
def code() -> report.Code:
    """Generated once for all tests, for sm_90; a minute."""
    return report.Code(90)


@pytest.fixture(scope="module")
def ungrouped() -> report.Code:
    return report.Code(80)


@pytest.fixture
def alone(ungrouped: report.Code, monkeypatch: pytest.MonkeyPatch) -> report.Code:
    """Code for sm_80 with one tensor per call, which is generated sooner."""
    monkeypatch.setattr(Kind, "group", 1)
    return ungrouped


@pytest.fixture(scope="module")
def large(code: report.Code) -> report.Report:
    return report.report(code, "large", LARGE)


@pytest.fixture(scope="module")
def tiny(code: report.Code) -> report.Report:
    return report.report(code, "tiny-tensors", SETS["tiny-tensors"]())


def test_large_tensors_take_few_launches_and_are_read_once(large: report.Report) -> None:
    """Two groups are updated: one launch each, and gradients are read once more."""
    of_packed = 4  # launches for what is left over of tensors that are no multiple of 1,024
    launches = {kernel["graph"]: kernel["launches"] for kernel in large.kernels}
    assert (launches["inspect"], launches["update"]) == (1, 2)
    assert large.launches - of_packed <= 8
    assert 20 <= large.bytes_per_param <= 20.5


def test_large_tensors_take_few_issue_slots(large: report.Report) -> None:
    """Per parameter, by the machine code. docs/gpu-model.md says what they are and how many there should be."""
    per_param = {
        kernel["graph"]: {pipe: slots / large.params for pipe, slots in kernel["slots"].items()}
        for kernel in large.kernels
    }
    assert all(kernel["exact"] for kernel in large.kernels if kernel["graph"] in ("inspect", "update"))
    inspect, update = per_param["inspect"], per_param["update"]
    limits = {"fp32": 37.5, "multiply": 4, "integer": 45, "special": 3.1, "shuffle": 0.1, "reduce": 0.2, "memory": 2.6}
    assert {pipe: slots for pipe, slots in update.items() if slots > limits.get(pipe, 1000)} == {}
    assert sum(update.values()) <= 108
    assert sum(inspect.values()) <= 9
    assert large.slots_per_param <= 125
    for pipes in (inspect, update, per_param["inspect packed"], per_param["update packed"]):
        assert [pipes[pipe] for pipe in ("fp64", "conversion", "other")] == [0, 0, 0]
    scale = [kernel["slots"]["fp64"] for kernel in large.kernels if kernel["graph"] == "scale"]
    assert any(scale), "float64 is found where it is"


def test_the_predicted_time_is_near_that_of_the_bytes(large: report.Report) -> None:
    """But on a B200, where issue slots bound it."""
    works = report.work(vars(large))
    for gpu in gpus.GPUS:
        time = gpus.predict(works, gpu).time * gpu.bandwidth / gpus.LAMB16_BYTES
        assert time <= {"B200": 1.5}.get(gpu.name, 1.1), gpu


def assembly(*lines: str, **subroutines: list[str]) -> sass.Function:
    """Machine code as nvdisasm prints it, from lines like "@P0 BRA 0x30"."""

    def instruction(line: str) -> dict[str, str]:
        predicate = line.split()[0] if line.startswith("@") else ""
        opcode, _, operands = line.removeprefix(predicate).strip().partition(" ")
        return {"opcode": opcode, "operands": operands} | ({"predicate": predicate} if predicate else {})

    functions = {"kernel": lines, **{f"${name}": code for name, code in subroutines.items()}}
    found = [{"function-name": k, "sass-instructions": [instruction(x) for x in v]} for k, v in functions.items()]
    return sass.parse(json.dumps([{}, found]))


def test_predicated_instructions_and_branches_count_as_executed() -> None:
    code = assembly(
        "S2R R0,SR_TID.X",
        "LDG.E R1,[R0.64]",
        "@!P0 FADD R1,R1,R1",
        "@P0 BRA 0x60",
        "FMUL R1,R1,R1",
        "IMAD.MOV.U32 R2,RZ,RZ,R1",
        "@P1 EXIT ",
        "STG.E [R0.64],R1",
        "EXIT ",
        "BRA 0x90",
        "NOP ",
    )
    assert sass.loops(code) == 0
    (path,) = sass.paths(code)
    expected = {"uniform": 1, "memory": 2, "fp32": 2, "control": 3, "multiply": 1}
    assert path.slots == expected
    assert {k: x for k, x in sass.per_thread([path]).items() if x} == expected


def test_loops_count_as_often_as_they_are_gone_through() -> None:
    code = assembly("MOV R0,R1", "LDG.E R1,[R0.64]", "FADD R2,R2,R1", "@P0 BRA 0x10", "STG.E [R0.64],R2", "EXIT ")
    assert sass.loops(code) == 1
    with pytest.raises(ValueError, match="1 loops"):
        sass.paths(code)
    (path,) = sass.paths(code, [7])
    assert path.slots == {"integer": 1, "memory": 7 + 1, "fp32": 7, "control": 7 + 1}


def test_slow_paths_are_not_executed_and_other_subroutines_are() -> None:
    code = assembly(
        "LDG.E R1,[R0.64]",
        "@!P0 BRA 0x40",
        "CALL.REL.NOINC $div_slowpath",
        "BRA 0x50",
        "FMUL R1,R1,R1",
        "CALL.REL.NOINC $full",
        "EXIT ",
        div_slowpath=["FADD R1,R1,R1"] * 50,
        full=["DADD R1,R1,R1", "RET.REL.NODEC R2 0x0"],
    )
    (path,) = sass.paths(code)
    assert path.slots == {"memory": 1, "control": 4, "fp32": 1, "fp64": 1}


def test_parts_of_a_combined_kernel_are_weighed_by_their_blocks() -> None:
    """Each is asked for in turn; a block of none of them leaves without a load."""
    code = assembly(
        "ISETP P0,PT,R0,R1,PT",
        "@P0 BRA 0x40",
        "LDG.E R1,[R0.64]",
        "EXIT ",
        "ISETP P0,PT,R0,R1,PT",
        "@P0 BRA 0x80",
        "LDG.E R1,[R0.64]",
        "EXIT ",
        "EXIT ",
    )
    paths = sass.paths(code)
    assert [path.total for path in paths] == [4, 6]
    assert sum(sass.per_thread(paths, [1, 3]).values()) == (4 + 3 * 6) / 4
    with pytest.raises(ValueError, match="2 ways"):
        sass.per_thread(paths, [1, 2, 3])


def test_opcodes_that_are_not_known_are_told_apart() -> None:
    (path,) = sass.paths(assembly("LDG.E R1,[R0.64]", "FROBNICATE.X R1,R2", "EXIT "))
    assert path.slots["other"] == 1


def test_a_kernel_takes_as_long_as_its_busiest_resource() -> None:
    gpu = gpus.GPU("test", 90, multiprocessors=10, clock=1e9, bandwidth=1e12)
    bytes_only = gpus.Work(10, {"fp32": 1})
    busy = gpus.Work(1, {"fp32": 64, "multiply": 64, "integer": 64, "control": 64})
    found = gpus.times(busy, gpu)
    assert found["issue"] == pytest.approx(256 / (128 * 10e9))
    assert found["fp32"] == pytest.approx(128 / (128 * 10e9)), "its pipe multiplies integers too"
    assert found["integer"] == pytest.approx(64 / (64 * 10e9))
    both = gpus.predict([bytes_only, busy], gpu)
    assert both.bounds == ["bytes", "issue"]
    assert both.time == pytest.approx(10 / 1e12 + 256 / (128 * 10e9))


def test_every_gpu_has_rates_for_every_pipe_that_has_one() -> None:
    for gpu in gpus.GPUS:
        assert set(gpu.rates) == set(sass.PIPES) - {"packed", "uniform", "control"}
        assert gpu.rates["fp32"] * gpu.multiprocessors * gpu.clock * 2 > 8e12, "TFLOPS as their makers say"


def test_the_model_is_near_published_times() -> None:
    pytest.importorskip("torchao")
    from lamb16.lab.cuda.published import check, ratio

    for found in check():
        assert 1 <= ratio(found) <= 1.4, found


def test_most_arithmetic_is_in_float32(code: report.Code) -> None:
    """Double precision is slow on many GPUs: only what is done once per tensor may use it."""
    doubles = {graph.name: "fp64" in code.program(graph).generated.code for graph in STEP}
    assert [name for name, found in doubles.items() if found] == ["scale"]


@pytest.mark.usefixtures("code")
def test_nothing_of_the_fake_gpu_is_left() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(torch.tensor([values[0], values[1]]), values), "0-d tensors are no sequences"
    assert not torch.cuda.is_available() or torch.cuda.get_device_name()


def test_arguments_that_are_not_aligned_are_counted(code: report.Code) -> None:
    """Where the code expects aligned memory, a view at another offset would be copied at every call."""
    graph = Graph("update", packed=True)
    blocks, floats, integers, columns, *others = examples.example_inputs(graph, code.kind._replace(device=META))
    program = code.program(graph)
    program(blocks, floats, integers, columns, *others)
    assert program.copies == []
    columns = torch.empty(columns.numel() + 1, dtype=columns.dtype, device="meta")[1:].view(columns.shape)
    program(blocks, floats, integers, columns, *others)
    assert len(program.copies) == 1


def test_tiny_tensors_share_their_launches(tiny: report.Report) -> None:
    assert tiny.tensors == 400
    assert tiny.launches <= 0.1 * tiny.tensors


def test_nothing_spills_and_nothing_falls_back(large: report.Report, tiny: report.Report) -> None:
    for found in (large, tiny):
        assert found.spills == 0
        assert found.fallbacks == []
        assert found.eager == []


@pytest.mark.parametrize("capability", [75, 80, 100])
def test_every_kernel_compiles_for_other_architectures(code: report.Code, capability: int) -> None:
    """sm_75 and sm_80 have no e4m3 casts."""
    for graph in STEP:
        program = code.program(graph)
        with fake.device(capability):
            for kernel in program.kernels.values():
                assert kernel.resources(capability).spills == 0


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        (fake.kind(torch.bfloat16), 12),
        (fake.kind(torch.float16), 12),
        (fake.kind(float8=False), 32),
        (fake.kind(caution=True), 20),
    ],
    ids=["bfloat16", "float16", "float32 moments", "caution"],
)
def test_other_kinds_compile(alone: report.Code, kind: Kind, least: int) -> None:
    """g is read twice, p, m and v are read and written once."""
    moved, columns = 0.0, 2 * 4 * 1024
    for graph in GRAPHS:
        program = alone.program(graph, kind)
        assert program.fallbacks == []
        needs = [alone.resources(kernel) for kernel in program.kernels.values()]
        assert all(need.spills == 0 for need in needs), (graph, needs)
        if graph in (Graph("inspect"), Graph("update")):
            arguments = examples.example_inputs(graph, kind._replace(device=META))
            rows = sum(len(block.p) for block in arguments[0])
            found = sum(launch.bytes_read + launch.bytes_written for launch in program(*arguments))
            moved += (found - columns * (graph.function == "update")) / (rows * 1024)
    assert least <= moved <= least + 0.5


def test_bytes_are_those_that_inductor_counts(alone: report.Code) -> None:
    """Inductor counts what is overwritten as read too."""
    for graph in (Graph("inspect"), Graph("update"), Graph("inspect", packed=True), Graph("update", packed=True)):
        program = alone.program(graph)
        launches = program(*examples.example_inputs(graph, alone.kind._replace(device=META)))
        moved = sum(launch.bytes_read + 2 * launch.bytes_written for launch in launches)
        assert moved == pytest.approx(program.generated.counted_bytes, rel=0.02), graph


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
    for graph in STEP:
        arguments = examples.example_inputs(graph, code.kind._replace(device=META))
        for launch in code.program(graph)(*arguments):
            others = {key: x for key, x in launch.arguments.items() if not isinstance(x, torch.Tensor)}
            assert all(isinstance(x, int) and ("numel" in key or key.startswith("ks")) for key, x in others.items()), (
                graph
            )


def test_steps_launch_the_same_on_the_same_memory(code: report.Code) -> None:
    """What a CUDA graph needs: no synchronisation, and no buffer of one step that is not there in the next."""
    steps = report.CountedSteps(code, [(64, 64), (5,)])
    steps.step()
    first, second = ([(launch.kernel, _memory(launch)) for _, launch in steps.step()] for _ in range(2))
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
    keys = {"arch", "shapes", "tensors", "params", "launches", "bytes_per_param", "slots_per_param", "spills", "gpus"}
    assert keys | {"fallbacks"} <= set(found)
    assert [row["gpu"] for row in found["gpus"]] == [gpu.name for gpu in gpus.GPUS]
    assert found["arch"] == "sm_90"
    assert found["kernels"][0]["registers"] > 0
    assert main(["cuda-report", "--shapes", "tiny-tensors"]) == 0
    printed = capsys.readouterr().out
    assert "| sm_90 | tiny-tensors | 400 |" in printed
    assert "| update packed |" in printed
    assert "| H100 | sm_90 |" in printed


@pytest.mark.usefixtures("large", "tiny")  # for which `code` is generated in groups
def test_the_kernels_compute_the_references_bits(code: report.Code, alone: report.Code, tmp_path: Path) -> None:
    """In Triton's interpreter, in a process of its own; see interpreted.py."""
    generated = {(graph, graph.kind(code.kind), 16): code.program(graph).generated for graph in STEP}
    for kind in (code.kind, fake.kind(caution=True)):
        for graph in GRAPHS:
            key = graph, graph.kind(kind), 1
            same = (*key[:2], 16) in generated and (graph.packed or graph.function in ("scale", "fold"))
            if not (same or graph.global_index):
                generated[key] = alone.program(graph, kind).generated
    file = tmp_path / "generated.pickle"
    file.write_bytes(pickle.dumps(generated))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted.py")), str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(results) == 12
    assert set(results.values()) == {"ok"}, results
