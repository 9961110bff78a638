"""The C reference: that it builds everywhere without a warning, what it refuses, and the sweep over the fp8 codes."""

import ctypes
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import edited_c_source
from lamb16 import capi, hyper, reference
from lamb16.hyper import Hyper
from lamb16.lab import sweep
from lamb16.step import fp8

EXERCISE = Path(__file__).parent / "capi" / "exercise.c"
HEADER = (capi.include() / "lamb16.h").read_text()
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
HYPER = Hyper(lr=0.01, weight_decay=0.1)


def need(compiler: str) -> str:
    path = shutil.which(compiler)
    if path is None:
        pytest.skip(f"{compiler} is not installed")
    return path


@pytest.fixture(scope="module")
def library() -> capi.Library:
    if not any(map(shutil.which, capi.COMPILERS)):
        pytest.skip("no C compiler is installed")
    return capi.load()


# -- building ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimization", ["-O2", "-O0", "-O3"])
@pytest.mark.parametrize("compiler", capi.COMPILERS)
def test_it_builds_without_a_warning_and_gives_the_references_bits(
    compiler: str, optimization: str, tmp_path: Path
) -> None:
    assert {"-Wall", "-Wextra", "-Werror", "-pedantic", "-O2", "-std=c11"} <= set(capi.FLAGS)
    flags = (*capi.FLAGS, "-Wconversion", "-Wshadow", optimization)
    library = capi.Library(capi.build(tmp_path, need(compiler), flags))
    p, grad = torch.randn(2, 1023, generator=torch.Generator().manual_seed(0))
    mine = theirs = p, reference.init(p, 7), None
    for _ in range(3):
        mine, theirs = library.step(mine[0], grad, mine[1], HYPER), reference.step(theirs[0], grad, theirs[1], HYPER)
    assert torch.equal(mine[0], theirs[0])
    assert not torch.equal(mine[0], p)
    assert torch.equal(mine[1].exp_avg_codes, theirs[1].exp_avg_codes)
    assert torch.equal(mine[1].exp_avg_sq_codes, theirs[1].exp_avg_sq_codes)
    for name in capi.CTensor.SCALARS:
        assert getattr(mine[1], name) == getattr(theirs[1], name), name
    assert library.grad_norm([grad, p]) == reference.grad_norm([grad, p])


@pytest.mark.parametrize("compiler", capi.COMPILERS)
def test_a_warning_fails_the_build(compiler: str, tmp_path: Path) -> None:
    """Negative control: an unused variable, which without -Werror is none."""
    line = "    double first = a + b / (1.0 - h->beta1);"
    file = edited_c_source(tmp_path, line, f"{line} int sign_is_unused;")
    with pytest.raises(capi.BuildError, match=r"failed with status 1:\n(.|\n)*sign_is_unused"):
        capi.build(tmp_path, need(compiler), files=[file])
    capi.build(tmp_path, need(compiler), [flag for flag in capi.FLAGS if flag != "-Werror"], [file])


def test_an_earlier_library_does_not_hide_that_none_was_written(tmp_path: Path) -> None:
    capi.build(tmp_path, need("gcc"))
    for compiler, flags in (("true", capi.FLAGS), ("gcc", (*capi.FLAGS, "-fsyntax-only"))):
        with pytest.raises(capi.BuildError, match=r"wrote no liblamb16\.so(.|\n)*The command: "):
            capi.build(tmp_path, compiler, flags)
    (tmp_path / "liblamb16.so").mkdir()
    with pytest.raises(capi.BuildError, match="failed with status 1"):
        capi.build(tmp_path, "gcc")


@pytest.mark.parametrize("flag", ["-ffast-math", "-ffinite-math-only"])
def test_fast_math_is_refused(flag: str, tmp_path: Path) -> None:
    need("gcc")
    with pytest.raises(capi.BuildError, match="compile it without -ffast-math"):
        capi.build(tmp_path, "gcc", (*capi.FLAGS, flag))


def exercise(compiler: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Build and run the C program that goes through all functions and error codes."""
    program = folder / "exercise"
    files = [str(EXERCISE), *map(str, capi.sources())]
    command = [need(compiler), *capi.FLAGS, *flags, f"-I{capi.include()}", *files, "-o", str(program), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and re.search(r"cannot find.*(asan|ubsan|clang_rt)", built.stderr):
        pytest.skip(f"{compiler} has no sanitizers here: {built.stderr.splitlines()[0]}")
    assert built.returncode == 0, built.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("compiler", capi.COMPILERS)
def test_every_function_and_error_code_under_sanitizers(compiler: str, tmp_path: Path) -> None:
    done = exercise(compiler, tmp_path, *SANITIZE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "all held\n", "")


@pytest.mark.parametrize("compiler", capi.COMPILERS)
def test_the_sanitizers_see_a_step_outside(compiler: str, tmp_path: Path) -> None:
    """Negative control."""
    done = exercise(compiler, tmp_path, *SANITIZE, "-DSTEP_OUTSIDE")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_the_header_is_for_cpp_too(tmp_path: Path) -> None:
    """A C++ program includes it, calls the C functions, and gets a default back."""
    cpp, cc = need("g++"), need("gcc")
    (tmp_path / "main.cpp").write_text(
        '#include "lamb16.h"\n#include <cstdint>\n#include <vector>\n'
        "int main() {\n"
        "    std::vector<float> p(5, 1.0f), g(5, 0.1f);\n"
        "    std::vector<std::uint8_t> m(5), v(5);\n"
        "    lamb16_tensor x = {};\n"
        "    x.numel = 5;\n"
        "    x.param = p.data();\n"
        "    x.grad = g.data();\n"
        "    x.exp_avg_codes = m.data();\n"
        "    x.exp_avg_sq_codes = v.data();\n"
        "    x.salt = 1u;\n"
        "    double norm;\n"
        "    lamb16_hyper h;\n"
        "    lamb16_default_hyper(&h);\n"
        "    if (lamb16_init(&x) != LAMB16_OK || lamb16_grad_norm(&x, 1, &norm) != LAMB16_OK) return 1;\n"
        "    if (lamb16_step(&x, &h, lamb16_clip_factor(norm, 0.1), nullptr) != LAMB16_OK) return 1;\n"
        "    return p[0] < 1.0f && x.step == 1 && h.beta2 == 0.999 ? 0 : 2;\n"
        "}\n"
    )
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{capi.include()}"]
    subprocess.run([cc, *capi.FLAGS, "-c", str(capi.sources()[0]), "-o", "lamb16.o"], cwd=tmp_path, check=True)
    subprocess.run([cpp, "-std=c++17", *flags, "main.cpp", "lamb16.o", "-o", "main"], cwd=tmp_path, check=True)
    subprocess.run([str(tmp_path / "main")], check=True)


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_aoti_h_is_for_cpp_too_and_agrees_with_torchs_own_headers(compiler: str, tmp_path: Path) -> None:
    """Conflicting declarations of the functions are errors."""
    source = """
        #include <torch/csrc/inductor/aoti_runtime/interface.h>
        #include <torch/csrc/inductor/aoti_torch/c/shim.h>
        #include "aoti.h"
        int main() { return 0; }
    """
    (tmp_path / "main.cpp").write_text(source)
    include = Path(torch.__file__).parent / "include"
    folders = [f"-I{capi.include()}", f"-I{include}"]
    command = [need(compiler), "-std=c++20", "-Wall", "-fsyntax-only", *folders, "main.cpp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (tmp_path / "alone.cpp").write_text('#include "aoti.h"\nint main() { return aoti_torch_dtype_float32() < 0; }\n')
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]
    subprocess.run([command[0], *strict, f"-I{capi.include()}", "alone.cpp"], cwd=tmp_path, check=True)


def test_no_compiler_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        capi.NoCompilerError, match="no C compiler: no-such-compiler not found on the PATH; install gcc"
    ):
        capi.build(tmp_path, "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "mycc -m64")
    with pytest.raises(capi.NoCompilerError, match="no C compiler: mycc, gcc, clang, cc not found"):
        capi.find_compiler()


def test_the_compiler_of_the_environment_may_have_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"env {need('gcc')} -DUSED")
    assert capi.find_compiler()[1:] == [need("gcc"), "-DUSED"]
    capi.Library(capi.build(tmp_path))


def test_another_library_is_refused(tmp_path: Path) -> None:
    need("gcc")
    (tmp_path / "other.c").write_text("int other(void);\nint other(void) { return 1; }\n")
    path = capi.build(tmp_path, "gcc", files=[tmp_path / "other.c"])
    with pytest.raises(OSError, match="is not the lamb16 C library: it has no function lamb16_"):
        capi.Library(path)


ROUNDING_AT = capi.CHyper.param_rounding.offset
OUT_OF_STEP = {  # before which field there is another one, and what of that is said
    "first": (
        "    double lr; ",
        "double",
        r"lamb16_hyper is out of step with Python: its field lr is 8 bytes, expected 0",
    ),
    "flag": (
        "    int32_t param_rounding; ",
        "int32_t",
        f"its field param_rounding is {ROUNDING_AT + 4} bytes, expected {ROUNDING_AT}",
    ),
    "scalar": ("    int64_t weight_sum; ", "int64_t", "lamb16_tensor is out of step"),
    "statistic": ("    int32_t skipped; ", "int32_t", "its field skipped is 28 bytes, expected 24"),
}


@pytest.mark.parametrize("change", OUT_OF_STEP)
def test_a_structure_that_is_out_of_step_is_one_clear_error(change: str, tmp_path: Path) -> None:
    """Of which weights that differ would be all that is seen otherwise."""
    field, kind, said = OUT_OF_STEP[change]
    assert HEADER.count(field) == 1
    (tmp_path / "lamb16.h").write_text(HEADER.replace(field, f"    {kind} another;\n{field}"))
    (tmp_path / "lamb16.c").write_text(capi.sources()[0].read_text())
    path = capi.build(tmp_path, need("gcc"), [x for x in capi.FLAGS if x != "-Werror"], [tmp_path / "lamb16.c"])
    with pytest.raises(capi.LayoutError, match=said):
        capi.Library(path)


def test_a_hyperparameter_that_the_library_lacks_is_one_clear_error(tmp_path: Path) -> None:
    path = capi.build(tmp_path, need("gcc"), files=[edited_c_source(tmp_path, "FIELD(lamb16_hyper, nesterov),", "")])
    with pytest.raises(
        capi.LayoutError, match=r"lamb16_hyper is out of step with Python: its field nesterov is not there"
    ):
        capi.Library(path)


def test_the_binding_has_every_function_of_the_header() -> None:
    declared = set(re.findall(r"\blamb16_(\w+)\([^)]*\);", HEADER))
    assert declared == set(capi._signatures())


# -- what is refused -----------------------------------------------------------------------------------------------


def test_statuses_reach_python(library: capi.Library) -> None:
    """All of them are in exercise.c; here one of the hyperparameters, and one of a state, in a list."""
    p, grad = torch.ones(2, 5)
    state = library.init(p, 1)
    with pytest.raises(capi.StatusError, match=r"status 8: eps is invalid; it must be in \[2\^-100, 1\]") as found:
        library.step(p, grad, state, replace(HYPER, eps=2.0))
    assert found.value.status == 8
    damaged = replace(state, exp_avg_codes=torch.full((5,), 0xFF, dtype=torch.uint8))
    with pytest.raises(capi.StatusError, match="exp_avg_codes holds NaN codes"):
        library.step_list([(p, grad, state), (p, grad, damaged)], HYPER)
    with pytest.raises(capi.StatusError, match="grad_factor is invalid; it must be finite and >= 0"):
        library.step(p, grad, state, HYPER, grad_factor=-1.0)
    assert torch.equal(p, torch.ones(5))
    assert library.status_string(99) == "no lamb16_status"


def test_tensors_of_another_kind_are_refused(library: capi.Library) -> None:
    p, grad = torch.ones(2, 5)
    state = library.init(p, 1)
    for arguments, message in (
        (
            (p.double(), grad, state),
            r"weights of tensor 0 is torch.float64 \(5,\) on cpu; it must be torch.float32 or torch.bfloat16 or "
            r"torch.float16 \(5,\)",
        ),
        ((p, grad[:4], state), r"gradient of tensor 0 is torch.float32 \(4,\) on cpu"),
        (
            (p, grad, replace(state, exp_avg_sq_codes=state.exp_avg_sq_codes[:4])),
            r"exp_avg_sq_codes of tensor 0 is torch.uint8 \(4,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            library.step(*arguments, HYPER)
    with pytest.raises(ValueError, match="moment_dtype='float32' is not supported"):
        library.step(p, grad, state, replace(HYPER, moment_dtype="float32"))
    with pytest.raises(ValueError, match=r"x is torch\.float64"):
        library.round_weights(p.double(), torch.bfloat16, "nearest")
    with pytest.raises(ValueError, match=r"weights is torch\.float32 \(5,\) on cpu; it must be torch\.bfloat16 or"):
        library.widen_weights(p)
    with pytest.raises(ValueError, match=r"gradient 1 is torch\.float64"):
        library.grad_norm([grad, grad.double()])
    with pytest.raises(ValueError, match=r"words is torch\.int64"):
        library.encode(p, torch.zeros(5, dtype=torch.int64), "e4m3")
    with pytest.raises(ValueError, match=r"codes is torch\.float32"):
        library.decode(p, "e5m2")


def test_remainders_go_with_exact_rounding_of_bfloat16_alone(library: capi.Library) -> None:
    p, grad = torch.ones(2, 5)
    exact, halves = replace(HYPER, param_rounding="exact"), p.bfloat16()
    state = library.init(halves, 1, "exact")
    assert torch.equal(state.param_remainder, torch.zeros(5, dtype=torch.int16))
    for weights, other in ((halves, HYPER), (p, exact), (p.half(), exact)):
        with pytest.raises(ValueError, match=r"param_remainder of tensor 0 is for bfloat16 .* set it to None"):
            library.step(weights, grad, state, other)
    with pytest.raises(ValueError, match=r"param_remainder of tensor 0 is torch.int32 \(5,\) on cpu"):
        library.step(halves, grad, replace(state, param_remainder=state.param_remainder.int()), exact)
    for weights, status in (
        (halves, "param_remainder is NULL"),
        (p.half(), "LAMB16_ROUNDING_EXACT is not for float16"),
    ):
        with pytest.raises(capi.StatusError, match=status):
            library.step(weights, grad, library.init(weights, 1), exact)
    assert library.init(p, 1, "exact").param_remainder is None
    library.step(p, grad, library.init(p, 1), exact)
    before = state.param_remainder.clone()
    stepped = library.step(halves, grad, state, exact)[1].param_remainder
    assert torch.equal(state.param_remainder, before)
    assert stepped.any()


def test_the_binding_changes_nothing_in_place(library: capi.Library) -> None:
    p, grad = torch.randn(2, 4, 3).transpose(1, 2)  # not contiguous
    state = library.init(p, 2**32 - 1)
    before = p.clone(), grad.clone(), state.exp_avg_codes.clone()
    new_p, new_state, _ = library.step(p, grad, state, HYPER)
    assert torch.equal(p, before[0])
    assert torch.equal(grad, before[1])
    assert torch.equal(state.exp_avg_codes, before[2])
    expected, expected_state, _ = reference.step(p.contiguous(), grad.contiguous(), reference.init(p, 2**32 - 1), HYPER)
    assert torch.equal(new_p, expected)
    assert torch.equal(new_state.exp_avg_codes, expected_state.exp_avg_codes)


def test_the_default_hyperparameters_are_the_references(library: capi.Library) -> None:
    """And those that the header says."""
    found, wanted = capi.CHyper(), capi.c_hyper(Hyper())
    library.c["default_hyper"](found)
    names = capi.CHyper.NAMES
    assert {name: getattr(found, name) for name in names} == {name: getattr(wanted, name) for name in names}
    (text,) = re.findall(r"Fill \*hyper with the defaults: (.*?)param_rounding", HEADER, re.DOTALL)
    said = {name: float(x) for name, x in re.findall(r"(\w+) ([\d.e-]+),", text)}
    assert said == {name: getattr(wanted, name) for name in names if name != "param_rounding"}


@pytest.mark.parametrize("name", capi.CHyper.NAMES)
def test_a_wrong_hyperparameter_is_refused_by_name(
    library: capi.Library, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, grad = torch.ones(2, 5)
    wrong = capi.c_hyper(HYPER)
    setattr(wrong, name, 9 if isinstance(getattr(wrong, name), int) else math.nan)
    monkeypatch.setattr(capi, "c_hyper", lambda _: wrong)
    with pytest.raises(capi.StatusError, match=f": {name} is invalid"):
        library.step(p, grad, library.init(p, 1), HYPER)


def test_the_structures_are_those_of_the_header() -> None:
    """The binding's fields follow from the declared hyperparameters; C's are written down once more."""
    c_types = {"double": ctypes.c_double, "float": ctypes.c_float, "size_t": ctypes.c_size_t}
    c_types |= {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32}
    for enum, values in (("dtype", capi.DTYPES), ("rounding", hyper.ROUNDINGS)):
        (body,) = re.findall(r"typedef enum {\n([^}]*)} lamb16_" + enum, HEADER)
        numbers = {int(number): name.lower() for name, number in re.findall(r"LAMB16_(\w+) = (\d+)", body)}
        for number, value in enumerate(values):
            assert numbers[number].endswith(str(value).removeprefix("torch.")), enum
        assert len(numbers) == len(values)
    for name, structure in (("hyper", capi.CHyper), ("tensor", capi.CTensor), ("stats", capi.CStats)):
        (body,) = re.findall(rf"typedef struct {{\n([^}}]*)}} lamb16_{name};", HEADER)
        declared = re.findall(r"^ *(?:const )?(\w+) (\*?)(\w+);", body, re.MULTILINE)
        fields = [(field, ctypes.c_void_p if pointer else c_types[kind]) for kind, pointer, field in declared]
        assert fields == structure._fields_, name


def test_every_hyperparameter_reaches_c(library: capi.Library) -> None:
    """None of them is left out of the structure, or out of the checks: a NaN or a 2 in any is refused."""
    p, grad = torch.ones(2, 5)
    state = library.init(p, 1)
    with pytest.raises(capi.StatusError, match=": param_rounding is invalid"):
        library.step(p, grad, state, replace(HYPER, param_rounding="up"))
    for name in hyper.NUMBERS:
        field = "betas" if name.startswith("beta") else name
        wrong = {"beta1": (math.nan, 0.9), "beta2": (0.9, math.nan)}.get(name, 2 if name in hyper.FLAGS else math.nan)
        with pytest.raises(capi.StatusError, match=f": {name} is invalid"):
            library.step(p, grad, state, replace(HYPER, **{field: wrong}))


# -- the sweep -----------------------------------------------------------------------------------------------------


def _least_inputs(line: str) -> int:
    """How many inputs a line of the sweep's table must have."""
    if "all codes" in line:
        return 256
    if "widen" in line or "| remainder " in line:
        return 1 << 16
    return 124 if "decode" in line else 0 if "ties |" in line else 8_000_000


def test_the_sample_of_the_sweep(library: capi.Library, capsys: pytest.CaptureFixture[str]) -> None:
    """2^24 patterns and all boundaries, four kinds of words, both formats, C against eager and compiled torch."""
    torch.set_num_threads(2)
    try:
        assert sweep.main([]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    out = capsys.readouterr().out
    assert re.search(r"\n0 differing; \d+ s\n$", out)
    for line in out.splitlines()[2:-1]:
        inputs = int(line.split("|")[4].replace(",", ""))
        assert inputs >= _least_inputs(line)
    for name in ("e4m3", "e5m2"):
        for form in sweep.WORDS:
            for against in ("eager", "compiled"):
                assert f"| encode {name} | {form} | {against} |" in out
    for name in ("bfloat16", "float16"):
        assert f"| round to {name} | nearest | torch's cast |" in out
        for form in ("word 0", "word 2^32 - 1", "random words"):
            for against in ("eager", "compiled"):
                assert f"| round to {name} | {form} | {against} |" in out
    for against in ("eager", "compiled", "reference"):
        assert f"| split | exact | {against} |" in out


def test_the_sample_holds_what_it_promises() -> None:
    chunks = [patterns for _, patterns in sweep.sample_patterns()]
    patterns = torch.cat(chunks)
    assert torch.cat(chunks[:-1]).unique().numel() == 1 << 24
    assert torch.bincount((patterns.long() & 0xFFFFFFFF) >> 23, minlength=512).min() >= 1 << 15
    boundaries = set(chunks[-1].tolist())
    for value in (0.0, 448.0, 464.0, 57344.0, 2.0**-9, 2.0**-10, 2.0**-6, 2.0**-14, 2.0**-17, float("inf")):
        for near in range(-2, 3):
            pattern = sweep.bits_of(value) + near
            if pattern >= 0:
                assert {pattern, fp8.wrapped(pattern | 1 << 31)} <= boundaries, (value, near)


def test_all_patterns_are_all() -> None:
    chunks = sweep.all_patterns()
    for first, (found, patterns) in zip(range(0, 1 << 20, sweep.CHUNK), chunks, strict=False):
        assert found == first
        assert torch.equal(patterns.long() & 0xFFFFFFFF, torch.arange(first, first + sweep.CHUNK))


def test_where_nearest_differs_from_the_cast_is_counted_by_hand() -> None:
    """Ties: e4m3 has 126 gaps between non-negative codes and e5m2 123, every second one above an even code.

    Below the midpoints of the first gaps float32 has 16, 4, 2, 2, 1, 1, 1, 1 numbers within 2^-30 in e4m3, and
    8, 2, 1, 1 within 2^-38 in e5m2.
    """
    e4m3, e5m2 = map(sweep.differing_from_cast, sweep.ENCODINGS)
    assert len(e4m3) == 63 + 28
    assert len(e5m2) == 62 + 12
    for encoding, patterns in zip(sweep.ENCODINGS, (e4m3, e5m2), strict=True):
        assert patterns == sorted(set(patterns))
        assert sweep.known_patterns(encoding).tolist() == patterns


CHANGES = {
    "bits of e4m3": ("{3, -6, 20, 0x7E}", "{3, -6, 19, 0x7E}"),
    "exponents of e5m2": ("{2, -14, 21,", "{2, -15, 21,"),
    "largest": ("{3, -6, 20, 0x7E}", "{3, -6, 20, 0x7D}"),
    "half to even": ("nearbyint(x.fraction", "floor(x.fraction"),
    "hash": ("0x8A3B8E57u", "0x8A3B8E55u"),
    "golden": ("0x9E3779B9u", "0x9E3779BBu"),
    "mixer": ("0x9E3779B1u", "0x9E3779B3u"),
    "NaN": ("return sign | 0x7F;", "return sign | 0x7E;"),
    "sign": ("signbit(x) ? 0x80 :", "signbit(x) && x < 0.0f ? 0x80 :"),
    "decoded NaN": ("(code & 0x7F) > 0x7C", "(code & 0x7F) > 0x7D"),
    "decode": ("power_of_two(exponent + field - 1)", "power_of_two(exponent + field)"),
    "bits of bfloat16": ("{7, -126, 16,", "{7, -126, 15,"),
    "exponents of float16": ("{10, -14, 13,", "{10, -15, 13,"),
    "mask of the word": ("word & ((1u << f->random_bits) - 1)", "word & ((1u << f->random_bits) - 2)"),
    "top bits of the word": ("word & ((1u << f->random_bits) - 1)", "word >> (32 - f->random_bits)"),
    "ties to even": ("found.code % 2 == 1", "found.code % 2 == 0"),
    "ties from zero": ("found.fraction >= 0.5", "found.fraction > 0.5"),
    "infinite weight": ("(code < infinity ? code : infinity)", "(code < infinity ? code : infinity - 1)"),
    "NaN weight": ("infinity | infinity >> 1", "infinity | 1"),
    "remainder of NaN": ("*remainder = 0;", "*remainder = 1;"),
    "sign of a weight": ("signbit(x) ? 0x8000", "x < 0.0f ? 0x8000"),
    "join": ("<< 16) + (uint32_t)remainder", "<< 16) | (uint16_t)remainder"),
    "widened NaN": ("code == f->largest_code + 1u ? INFINITY", "code > f->largest_code ? INFINITY"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_sweep_tells_a_changed_c_source(change: str, tmp_path: Path, library: capi.Library) -> None:
    """Negative control, on the boundary patterns alone."""
    boundaries = sweep.boundary_patterns()

    def differing(built: capi.Library) -> int:
        found = sweep.Sweep(built)
        sweep.sweep_decoders(found)
        sweep.sweep_widening(built, found.compare)
        sweep.sweep_encoders(found, [(0, boundaries)])
        return found.differing

    if change == next(iter(CHANGES)):
        assert differing(library) == 0
    changed = capi.Library(capi.build(tmp_path, files=[edited_c_source(tmp_path, *CHANGES[change])]))
    assert differing(changed) > 0


def test_the_sweeps_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    boundaries = [(0, sweep.boundary_patterns())]
    monkeypatch.setattr(sweep, "sample_patterns", lambda: iter(boundaries))
    changed = capi.Library(capi.build(tmp_path, files=[edited_c_source(tmp_path, *CHANGES["golden"])]))
    monkeypatch.setattr(sweep, "load", lambda: changed)
    assert sweep.main([]) == 1
    assert "| words | - | eager |" in capsys.readouterr().out

    def no_compiler() -> capi.Library:
        raise capi.NoCompilerError("no C compiler: cc not found")

    monkeypatch.setattr(sweep, "load", no_compiler)
    assert sweep.main([]) == 2
    assert capsys.readouterr().err == "python -m lamb16.lab.sweep: error: no C compiler: cc not found\n"
