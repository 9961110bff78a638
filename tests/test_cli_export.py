"""`lamb16 export`: what it writes and what it refuses. That the step is right is for test_cli_check.py to say."""

import json
import re
import zipfile
from pathlib import Path

import pytest
import torch

from helpers import change_manifest, missing
from lamb16 import __version__
from lamb16.capi import export, manifest
from lamb16.capi.manifest import Spec
from lamb16.cli import main
from lamb16.hyper import Hyper
from lamb16.lab.export import parse_shapes
from lamb16.lab.shapes import SETS

SHAPES = [(70, 31), (5,), (5,), (7, 3), (0,)]  # of the fixture `exported`


def test_the_folder_holds_package_and_manifest(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == ["manifest.json", "step.pt2"]
    content = json.loads((exported / "manifest.json").read_text())
    assert (content["format"], content["device"]) == (3, "cpu")
    assert (content["lamb16"], content["torch"]) == (__version__, torch.__version__)
    assert [(x["name"], tuple(x["shape"])) for x in content["tensors"]] == [(str(i), x) for i, x in enumerate(SHAPES)]
    assert content["param_dtype"] == "float32"
    assert [x["numel"] for x in content["tensors"]] == [2170, 5, 5, 21, 0]
    assert [(x["name"], x["dtype"], x["shape"]) for x in content["inputs"]][:4] == [
        ("param.0", "float32", [70, 31]),
        ("grad.0", "float32", [70, 31]),
        ("exp_avg_codes.0", "uint8", [70, 31]),
        ("exp_avg_sq_codes.0", "uint8", [70, 31]),
    ]
    assert [(x["name"], x["dtype"], x["shape"]) for x in content["inputs"]][-5:] == [
        ("scales", "float32", [5, 4]),
        ("counters", "int32", [5, 2]),
        ("sums", "int64", [5, 4]),
        ("lr", "float64", [1]),
        ("grad_factor", "float64", [1]),
    ]
    assert content["hyperparameters"] == {
        "lr": 0.02, "beta1": 0.8, "beta2": 0.99, "eps": 1e-5, "weight_decay": 0.1, "trust_scale": 0.5, "trust_lr": 0.01,
        "trust_clip": 1.5, "bias_correction": False, "nesterov": False, "caution": True, "maximize": True,
        "param_rounding": "stochastic",
    }  # fmt: skip
    assert content["inductor"]["cpp.threads"] == 1


def test_the_manifest_is_read_back(exported: Path) -> None:
    found = manifest.read(exported)
    assert (found.names, found.device) == (["0", "1", "2", "3", "4"], "cpu")
    hyper = Hyper(
        lr=0.02, betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1, trust_scale=0.5, trust_lr=0.01, trust_clip=1.5,
        bias_correction=False, nesterov=False, caution=True, maximize=True,
    )  # fmt: skip
    assert found.spec == Spec(SHAPES, hyper, torch.float32)
    others = [name for name, value in vars(hyper).items() if value != getattr(Hyper, name)]
    assert missing(others, "moment_dtype", "param_rounding") == set(), "as conftest.py says of what it exports"


def test_the_manifest_of_halves_has_their_dtype_and_with_exact_a_fifth_input(exported_halves: Path) -> None:
    rounding = exported_halves.name
    dtype = {"exact": "bfloat16", "nearest": "bfloat16", "stochastic": "float16"}[rounding]
    content = json.loads((exported_halves / "manifest.json").read_text())
    assert (content["param_dtype"], content["hyperparameters"]["param_rounding"]) == (dtype, rounding)
    own = [(f"param.{i}", dtype) for i in (0, 1)] + [(f"grad.{i}", dtype) for i in (0, 1)]
    dtypes = {x["name"]: x["dtype"] for x in content["inputs"]}
    assert [(name, dtypes[name]) for name, _ in own] == own
    names = [x["name"] for x in content["inputs"]]
    assert len(names) == (5 if rounding == "exact" else 4) * 3 + 5
    assert [name for name in names if "remainder" in name] == (
        [f"param_remainder.{i}" for i in range(3)] if rounding == "exact" else []
    )
    if rounding == "exact":
        assert names[4] == "param_remainder.0"
        assert dtypes["param_remainder.0"] == "int16"
    found = manifest.read(exported_halves).spec
    assert (found.param_dtype, found.hyper.param_rounding) == (getattr(torch, dtype), rounding)
    assert found.exact == (rounding == "exact")


def test_the_package_runs_from_python_too(exported: Path) -> None:
    """As a step from zero gradients: nothing moves."""
    step = torch._inductor.aoti_load_package(str(exported / "step.pt2"))
    tensors, *others = export.first_inputs(Spec(SHAPES, Hyper()), torch.device("cpu"))
    before = [x.clone() for x in others]
    step(tensors, *others)
    assert not any(x.any() for x in tensors)
    assert all(torch.equal(x, y) for x, y in zip(others, before, strict=True))


def test_a_large_tensor_is_read_twice(exported: Path) -> None:
    """One loop for its gradient's maximum, one for everything else."""
    with zipfile.ZipFile(exported / "step.pt2") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".kernel.cpp")]
        code = archive.read(name).decode()
    assert len(re.findall(r"for *\(.*<static_cast<int64_t>\(2170L\);", code)) == 2


def test_small_tensors_of_a_size_share_a_block() -> None:
    shapes = [(5,), (3000,), (0,), (5, 1), (3000,), (2048,), (2047,)]
    assert export.blocks(shapes) == [([0, 3], 5, 0), ([1], 3000, 2), ([4], 3000, 3), ([5], 2048, 4), ([6], 2047, 5)]
    assert export.ExportedStep(Spec(shapes, Hyper())).order == [0, 3, 1, 4, 5, 6, 2]


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"), [("resnet18", 62, 11_689_512), ("transformer", 66, 4_240_384)]
)
def test_words_name_shapes_and_sets(name: str, tensors: int, parameters: int) -> None:
    shapes = parse_shapes(["4x3", name, "7"])
    assert (shapes[0], shapes[1:-1], shapes[-1]) == ((4, 3), SETS[name](), (7,))
    assert (len(shapes) - 2, sum(torch.Size(shape).numel() for shape in shapes) - 19) == (tensors, parameters)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shapes", "4by3"], "4by3 is neither a shape"),
        (["--shapes", "4x-3"], "4x-3 is neither a shape"),
        (["--shapes", "1x1x1x1x1x1x1x1x1"], "at most 8 dimensions"),
        (["--shapes", "65536x65536"], "at most 8 dimensions and 2^31 - 1 elements"),
        (["--shapes", "0", "0x3"], "no tensor has an element"),
        (["--lr", "-1"], "lr=-1.0"),
        (["--betas", "0.9", "1"], "betas=(0.9, 1.0)"),
        (["--eps", "0"], "eps=0.0"),
        (["--weight-decay", "-0.1"], "weight_decay=-0.1"),
        (["--trust-scale", "-1"], "trust_scale=-1.0"),
        (["--trust-lr", "0"], "trust_lr=0.0"),
        (["--trust-clip", "nan"], "trust_clip=nan"),
        (["--param-dtype", "float16", "--param-rounding", "exact"], "exact rounding is for bfloat16"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "step"
    shapes = [] if "--shapes" in options else ["--shapes", "3"]
    assert main(["export", *shapes, *options, "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_folder_with_other_things_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main(["export", "--shapes", "3", "-o", str(tmp_path)]) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert main(["export", "--shapes", "3", "-o", str(tmp_path / "thesis.tex")]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--shapes", "3", "--device", "cuda", "-o", str(tmp_path / "step")]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_a_compiler_that_fails_leaves_the_old_export(
    exported_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in exported_copy.iterdir()}

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    assert main(["export", "--shapes", "3", "-o", str(exported_copy)]) == 1
    assert "no compiler here at all" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in exported_copy.iterdir()} == before


# -- the manifest --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (["format"], 1, "is of format 1"),
        (["lamb16"], "0.0.1", "is of lamb16 0.0.1"),
        (["torch"], "1.0", "is of torch 1.0"),
        (["cpu"], "AVX1024", "compiled for AVX1024"),
        (["hyperparameters"], {"lr": 0.1}, "'beta1'"),
        (["hyperparameters", "beta2"], 1.5, "betas="),
        (["hyperparameters", "gamma"], 1.5, "gamma"),
        (["hyperparameters", "param_rounding"], "up", "param_rounding='up'"),
        (["param_dtype"], "float64", "'float64'"),
        (["param_dtype"], "bfloat16", "inputs are not those"),
        (["tensors", 0, "shape"], [31, 70], "inputs are not those"),
        (["tensors", 1, "numel"], 6, "inputs are not those"),
        (["inputs", 3, "dtype"], "float32", "inputs are not those"),
        (["inputs"], [], "inputs are not those"),
        (["tensors"], None, "lacks or misstates"),
        (["package", "file"], "other.pt2", "other.pt2 is missing"),
        (["package", "sha256"], "0" * 64, "damaged or of another export"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    keys: list[str | int], value: object, said: str, exported_copy: Path
) -> None:
    change_manifest(exported_copy, *keys, value=value)
    with pytest.raises(manifest.ManifestError) as error:
        manifest.read(exported_copy)
    assert said in str(error.value)


def test_a_manifest_of_exact_float16_is_refused(exported_copy: Path) -> None:
    """No step can be so; `lamb16 export` would not have written it."""
    change_manifest(exported_copy, "hyperparameters", "param_rounding", value="exact")
    change_manifest(exported_copy, "param_dtype", value="float16")
    with pytest.raises(manifest.ManifestError, match="not those of a step"):
        manifest.read(exported_copy)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "cannot read"), ('{"format": 1', "damaged"), ("[]", "no manifest"), ("{}", "no manifest")]
)
def test_what_is_no_manifest_is_refused(text: str | None, said: str, exported_copy: Path) -> None:
    path = exported_copy / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(manifest.ManifestError) as error:
        manifest.read(exported_copy)
    assert said in str(error.value)


def test_a_truncated_package_is_refused_whatever_its_digest(exported_copy: Path, tmp_path: Path) -> None:
    package = exported_copy / "step.pt2"
    package.write_bytes(package.read_bytes()[:-1000])
    with pytest.raises(manifest.ManifestError, match="damaged or of another export"):
        manifest.read(exported_copy)
    change_manifest(exported_copy, "package", "sha256", value=manifest.digest(package))
    with pytest.raises(manifest.ManifestError, match="is damaged"):
        manifest.read(exported_copy).extract(tmp_path)
