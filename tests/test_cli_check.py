"""`lamb16 check`: an honest step passes, every kind of wrong one fails."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import change_manifest
from lamb16 import Lamb16, capi, reference
from lamb16.capi.manifest import Spec
from lamb16.cli import main
from lamb16.hyper import NUMBERS, Hyper
from lamb16.lab import check
from lamb16.reference import State
from lamb16.step import factors

Run = Callable[..., tuple[int, dict[str, list[int]], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `lamb16 check`; gives its status, the numbers of each line of the table and what it said on stderr."""

    def run(folder: Path, *options: str) -> tuple[int, dict[str, list[int]], str]:
        capsys.readouterr()
        status = main(["check", str(folder), *options])
        out, err = capsys.readouterr()
        rows = re.findall(r"^\| (\D[^|]*) \| (\d.*) \|$", out, re.MULTILINE)
        return status, {name: [int(x) for x in cells.split(" | ")] for name, cells in rows}, err

    return run


@pytest.mark.parametrize("compiler", capi.COMPILERS)
def test_the_exported_step_is_the_c_reference(compiler: str, exported: Path, run: Run) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    status, rows, _ = run(exported, "--steps", "40", "--seed", "3", "--only", "exported", "--compiler", compiler)
    (cells,) = rows.values()
    assert status == 0
    assert cells[:-1] == [5, 40, 0, 0, 0, 0]
    assert 0 < cells[-1] < 5 * 40 / 2, "some gradients are not finite"


def test_so_are_the_reference_the_eager_and_the_compiled_step(exported: Path, run: Run) -> None:
    status, rows, _ = run(exported, "--steps", "6")
    assert status == 0
    assert list(rows) == ["exported step, run from C", "Python reference", "eager step", "compiled step"]
    assert {tuple(cells[:-1]) for cells in rows.values()} == {(5, 6, 0, 0, 0, 0)}
    assert len({cells[-1] for cells in rows.values()}) == 1, "the same inputs, the same updates skipped"


def test_so_are_the_steps_over_halves(exported_halves: Path, run: Run) -> None:
    """With remainders all forms of the step; with other roundings the exported one, and compiled code of its dtypes."""
    only = ("exported", "reference", "eager", "compiled") if exported_halves.name == "exact" else ("exported", "eager")
    status, rows, _ = run(exported_halves, "--steps", "16", "--seed", "1", "--only", *only)
    assert status == 0
    assert {tuple(cells[:-1]) for cells in rows.values()} == {(3, 16, 0, 0, 0, 0)}
    assert len(rows) == len(only)


@pytest.mark.parametrize("exported_halves", ["exact"], indirect=True)
def test_a_remainder_is_compared_and_lost_with_other_weights(exported_halves: Path, tmp_path: Path) -> None:
    """A remainder that is another after the step; one that is another before it; and one that goes, by a new weight."""
    after = "        for (size_t i = 0; i < p.count; i++)\n            compare"
    before = "        step_reference(&p"
    found = run_edited(exported_halves, tmp_path, after, "p.tensors[0].param_remainder[2] ^= 1;")
    assert (found.codes, found.scalars, found.weights, found.ulp) == (0, 0, 1, 1)
    found = run_edited(exported_halves, tmp_path, before, "p.tensors[0].reference.param_checksum = 0;", steps=2)
    assert found.weights > 0
    found = run_edited(exported_halves, tmp_path, before, "*(uint16_t *)p.tensors[0].reference.param ^= 1;", steps=2)
    assert found.weights > 1000, "of all elements in the second step, whose remainders have gone"


@pytest.mark.parametrize("exported_halves", ["stochastic"], indirect=True)
def test_a_manifest_with_another_rounding_fails(exported_halves: Path, tmp_path: Path, run: Run) -> None:
    copy = Path(shutil.copytree(exported_halves, tmp_path / "copy"))
    change_manifest(copy, "hyperparameters", "param_rounding", value="nearest")
    status, rows, _ = run(copy, "--steps", "3", "--only", "exported")
    (cells,) = rows.values()
    assert status == 1
    assert cells[4] > 0, "weights"


@pytest.mark.parametrize("exported_halves", ["stochastic"], indirect=True)
def test_a_manifest_with_another_dtype_fails(exported_halves: Path, tmp_path: Path, run: Run) -> None:
    """Consistent in itself; the step's own input checks find out."""
    copy = Path(shutil.copytree(exported_halves, tmp_path / "copy"))
    spec = Spec([(2050,), (5,), (5,)], Hyper(), torch.bfloat16)
    change_manifest(copy, "param_dtype", value="bfloat16")
    change_manifest(copy, "inputs", value=capi.manifest._input_entries(spec))
    status, rows, err = run(copy, "--steps", "3", "--only", "exported")
    assert (status, rows) == (1, {})
    assert "the step failed" in err


OTHERS = {
    "beta2": 0.98, "beta1": 0.81, "eps": 2e-5, "weight_decay": 0.11, "trust_scale": 0.6, "trust_lr": 0.02,
    "trust_clip": 0.1, "bias_correction": True, "nesterov": True, "caution": False, "maximize": False,
}  # fmt: skip


def test_every_hyperparameter_is_another_in_a_manifest_here() -> None:
    """lr is an input of the step; param_rounding is above."""
    assert set(NUMBERS) - set(OTHERS) == {"lr"}


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_a_manifest_with_another_hyperparameter_fails(name: str, value: object, exported_copy: Path, run: Run) -> None:
    change_manifest(exported_copy, "hyperparameters", name, value=value)
    status, rows, err = run(exported_copy, "--steps", "3", "--only", "exported")
    (cells,) = rows.values()
    assert status == 1
    assert sum(cells[2:6]) > 0
    if name == "beta2":
        assert min(cells[2:4]) > 0, "codes and scalars"
    assert "the reference has" in err


@pytest.mark.parametrize("name", check.SCALARS)
def test_every_scalar_is_compared(name: str, exported: Path, tmp_path: Path) -> None:
    """A harness whose reference has another scale, maximum, sum, count or salt after its only step."""
    edit = f"p.tensors[0].reference.{name} += 1;"
    found = run_edited(exported, tmp_path, "        for (size_t i = 0; i < p.count; i++)\n            compare", edit)
    assert (found.codes, found.scalars, found.weights) == (0, 1, 0)


def test_a_changed_gradient_is_found(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(check.CommandError, match="changed a gradient"):
        run_edited(exported, tmp_path, "        step_reference(&p", "((float *)p.tensors[0].grad)[0] = 1;")


def test_the_count_of_steps_ends_as_in_the_reference(exported: Path, tmp_path: Path) -> None:
    """All counts are set to one below their end, where they stay, and the salts to where they begin anew."""
    edit = """
        for (size_t i = 0; i < p.count; i++) {
            int32_t *counters = p.counters + COUNTERS * i;
            if (step == 1) {
                counters[0] = p.tensors[i].reference.step = INT32_MAX - 1;
                counters[1] = -1;
                p.tensors[i].reference.salt = UINT32_MAX;
            }
            if (step == 7 && p.tensors[i].reference.numel > 0 && (counters[0] != INT32_MAX || counters[1] < 0))
                quit("the count is not at its end");
        }"""
    found = run_edited(exported, tmp_path, "        fill_gradients(&p, step);", edit, steps=8)
    assert (found.codes, found.scalars, found.weights) == (0, 0, 0)


def run_edited(exported: Path, tmp_path: Path, before: str, edit: str, steps: int = 1) -> check.Row:
    """Steps of a harness that has something more in its loop."""
    text = (capi.include() / "harness.c").read_text()
    assert text.count(before) == 1
    (tmp_path / "edited.c").write_text(text.replace(before, f"        {edit}\n{before}"))
    step = capi.manifest.read(exported)
    harness = check.build_harness(None, tmp_path, tmp_path / "edited.c")
    return check.run_harness(harness, step.extract(tmp_path), step, steps, 0)


def test_the_compiled_step_is_compiled(exported: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """And a mistake in it would be one of the eager step's class, for which there is a control above."""
    seen: list[bool] = []

    def build(*args: object, compile: bool, **kwargs: object) -> Lamb16:
        seen.append(compile)
        return Lamb16(*args, compile=False, **kwargs)

    monkeypatch.setattr(check, "Lamb16", build)
    assert run(exported, "--steps", "1", "--only", "eager", "compiled")[0] == 0
    assert seen == [False, True]


def test_a_corrupted_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """One constant of the exported step has one bit changed: the rounding words go on by another number."""
    settings = torch._inductor.config.save_config_portable()
    with monkeypatch.context() as patch:
        patch.setattr(factors, "GOLDEN", factors.GOLDEN ^ (1 << 24))
        assert main(["export", "--shapes", "64", "--threads", "1", "-o", str(tmp_path)]) == 0
    assert torch._inductor.config.save_config_portable() == settings, "by which the optimizer's code is kept"
    status, rows, _ = run(tmp_path, "--steps", "5", "--only", "exported", "reference")
    assert status == 1
    corrupted, honest = rows.values()
    assert corrupted[2] > 0, "codes"
    assert honest[2:6] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "module", "constant", "wrong"),
    [("reference", reference, "WEIGHT_FLOOR", 0.02), ("eager", factors, "GOLDEN", factors.GOLDEN ^ (1 << 24))],
)
def test_a_wrong_step_in_python_fails(
    name: str, module: object, constant: str, wrong: float, exported: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setattr(module, constant, wrong)
    status, rows, _ = run(exported, "--steps", "4", "--only", name)
    (cells,) = rows.values()
    assert status == 1
    assert sum(cells[2:6]) > 0


def test_every_difference_is_counted() -> None:
    codes = torch.zeros(3, dtype=torch.uint8)
    state = State(codes, 1.0, 2.0, codes, 1.0, 2.0, 100, 200, 3, 4, 7)
    row = check.Row("", 1, 1)
    check.compare(row, (torch.tensor([1.0, 0.0, 2.0]), state), (torch.tensor([1.0, 0.0, 2.0]), state))
    assert not row.differs
    other = State(codes + 1, 2.0, 3.0, torch.tensor([0, 9, 0], dtype=torch.uint8), 2.0, 3.0, 101, 201, 4, 5, 8)
    check.compare(row, (torch.tensor([1 + 2.0**-22, -0.0, 2.0]), other), (torch.tensor([1.0, 0.0, 2.0]), state))
    assert (row.codes, row.scalars, row.weights, row.ulp) == (4, 9, 2, 2)
    row = check.Row("", 1, 1)
    check.compare(row, (torch.ones(3), replace(state, param_checksum=1)), (torch.ones(3), state))
    assert (row.codes, row.scalars, row.weights, row.ulp) == (0, 1, 0, 0)


def test_halves_are_compared_in_their_own_units_and_with_their_remainders() -> None:
    codes, rest = torch.zeros(3, dtype=torch.uint8), torch.tensor([0, 5, -32768], dtype=torch.int16)
    state = State(codes, 1.0, 2.0, codes, 1.0, 2.0, 100, 200, 3, 4, 7)
    for dtype, ulp in ((torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)):
        row = check.Row("", 1, 1)
        a, b = torch.tensor([1 + 3 * ulp, 0.0, 2.0]).to(dtype), torch.tensor([1.0, -0.0, 2.0]).to(dtype)
        check.compare(row, (a, state), (b, state))
        assert (row.weights, row.ulp) == (2, 3)
    row, b = check.Row("", 1, 1), torch.tensor([1.0, -0.0, 2.0], dtype=torch.bfloat16)
    exact, other = replace(state, param_remainder=rest), replace(state, param_remainder=rest + 1)
    check.compare(row, (b, exact), (b, exact))
    assert not row.differs
    check.compare(row, (b, other), (b, exact))
    assert (row.weights, row.ulp) == (3, 1)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([(31, 70), (5,), (5,), (7, 3), (0,)], "the step failed"),
        ([(70, 31)], "wrong number of inputs: the model takes 25"),
    ],
)
def test_a_manifest_of_other_shapes_fails(
    shapes: list[tuple[int, ...]], said: str, exported_copy: Path, run: Run
) -> None:
    """Consistent in itself; the step's own input checks find out."""
    change_manifest(exported_copy, "tensors", value=capi.manifest._tensor_entries(shapes))
    change_manifest(exported_copy, "inputs", value=capi.manifest._input_entries(Spec(shapes, Hyper())))
    status, rows, err = run(exported_copy, "--only", "exported")
    assert (status, rows) == (1, {})
    assert said in err


def test_what_is_no_model_is_refused(exported: Path, tmp_path: Path) -> None:
    harness = check.build_harness(None, tmp_path)
    step = tmp_path / "step.so"
    shutil.copy(capi.build(tmp_path), step)
    found = capi.manifest.read(exported)
    with pytest.raises(check.CommandError, match="no AOTInductor model"):
        check.run_harness(harness, step, found, 1, 0)
    shutil.copy(exported / "step.pt2", step)  # the package itself, not the library in it
    with pytest.raises(check.CommandError, match=r"cannot load the model; give the \.so inside"):
        check.run_harness(harness, step, found, 1, 0)


def test_a_compiler_that_writes_nothing_is_one_line(exported: Path, run: Run) -> None:
    status, rows, err = run(exported, "--compiler", "true")
    assert (status, rows) == (1, {})
    assert "true wrote no liblamb16.so: it is no C compiler" in err


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("hyperparameters", "moment_dtype"), "float32", "its hyperparameters are not those of a step"),
        (("hyperparameters", "lr"), 10**400, "too large"),
    ],
)
def test_hyperparameters_that_no_step_has(
    keys: tuple[str, str], value: object, said: str, exported_copy: Path, run: Run
) -> None:
    change_manifest(exported_copy, *keys, value=value)
    status, rows, err = run(exported_copy)
    assert (status, rows, len(err.splitlines())) == (1, {}, 1)
    assert said in err


@pytest.mark.parametrize("shape", [(-3,), (1 << 31, 1 << 31), (1,) * 9])
def test_shapes_that_no_step_has(shape: tuple[int, ...], exported_copy: Path, run: Run) -> None:
    change_manifest(exported_copy, "tensors", value=capi.manifest._tensor_entries([shape]))
    change_manifest(exported_copy, "inputs", value=capi.manifest._input_entries(Spec([shape], Hyper())))
    status, rows, err = run(exported_copy)
    assert (status, rows) == (1, {})
    assert "it has a shape that no step can have" in err


def test_a_damaged_export_is_one_line(exported_copy: Path, run: Run) -> None:
    (exported_copy / "step.pt2").write_bytes(b"PK")
    status, rows, err = run(exported_copy)
    assert (status, rows, len(err.splitlines())) == (1, {}, 1)
    change_manifest(exported_copy, "device", value="cuda")
    change_manifest(exported_copy, "package", "sha256", value=capi.manifest.digest(exported_copy / "step.pt2"))
    assert "check runs steps for the CPU" in run(exported_copy)[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--compiler", "nowhere-cc"], "nowhere-cc"),
    ],
)
def test_wrong_values_are_refused(options: list[str], said: str, exported: Path, run: Run) -> None:
    status, _, err = run(exported, *options)
    assert status == 2
    assert said in err


def test_a_folder_that_is_not_there(tmp_path: Path, run: Run) -> None:
    status, _, err = run(tmp_path / "nowhere")
    assert status == 1
    assert "lamb16 export -o" in err
