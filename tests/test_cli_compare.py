"""`lamb16 compare` in its quick form: every study runs, writes its result and plots, and is not run twice."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lamb16.cli import main
from lamb16.lab import compare
from lamb16.lab.registry import label, why_unusable
from lamb16.lab.study import ablations, published, runs, tasks
from lamb16.lab.study.sizes import QUICK

# Fewer steps of the same trainings.
SIZES = replace(
    QUICK,
    tasks={name: size._replace(steps=2, batch_size=min(size.batch_size, 8)) for name, size in QUICK.tasks.items()},
    mlp=QUICK.mlp._replace(steps=2),
    published=tuple((batch_size, lr, 1) for batch_size, lr, _ in QUICK.published),
)


def prepare_worker() -> None:
    """As the studies do, with a fourth of the language model's validation."""
    runs._prepare_worker()
    tasks.VALIDATION_WINDOWS = 24


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("study") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")  # torchao's optimizers would compile for every shape in each worker
        patch.setattr(compare, "QUICK", SIZES)
        patch.setattr(runs, "_prepare_worker", prepare_worker)
        for study in ("all", "long"):
            assert main(["compare", study, "--quick", "--workers", "1", "--out", str(folder)]) == 0
        yield folder


def printed(capsys: pytest.CaptureFixture[str], out: Path, study: str) -> tuple[str, str]:
    """What the study prints when nothing is left to run."""
    capsys.readouterr()
    assert main(["compare", study, "--quick", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.parametrize("study", compare.TRAININGS)
def test_every_study_leaves_a_result_and_a_plot(study: str, out: Path) -> None:
    content = json.loads((out / f"{study}.json").read_text())
    assert content["study"] == study
    jobs = compare._module(study).jobs(SIZES)
    has_more = hasattr(compare._module(study), "more")
    assert len(content["runs"]) > len(jobs) if has_more else len(content["runs"]) == len(jobs)
    assert all(run["result"]["train_loss"] > 0 for run in content["runs"])
    assert (out / f"{study}.svg").read_text().count("<path") > 10


@pytest.mark.parametrize("study", compare.TRAININGS)
def test_a_finished_study_only_prints(study: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [out / f"{study}.{kind}" for kind in ("json", "md", "svg")]
    before = [file.read_bytes() for file in files]
    text, err = printed(capsys, out, study)
    assert err == ""
    assert "| nan |" not in text
    assert f"wrote {out / study}.svg" in text
    assert [file.read_bytes() for file in files] == before
    assert files[1].read_text() in text


def test_published_names_every_optimizer_or_says_why_not(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = printed(capsys, out, "published")
    tables = dict(re.findall(r"^## ([^\n]*)\n\n(.*?)(?:\n\n|\Z)", text, re.M | re.S))
    (batch, lr, _), *_ = QUICK.published
    for name, factor, _ in published.OPTIMIZERS:
        usable = why_unusable(name) is None
        for schedule in published.SCHEDULES:
            assert usable == (f"| {label(name)}, lr {lr * factor:g} |" in tables[f"batch {batch}, {schedule}"])
        assert usable == (f"| {label(name)} |" in tables["step time"])
        assert usable != (f"| {label(name)} |" in tables.get("not run", ""))
    assert "| Lamb16, trust_clip 1.0, lr 0.01 |" in tables[f"batch {batch}, linear"]


def test_state_sizes_are_those_of_the_optimizers(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split(" | ") for line in printed(capsys, out, "published")[0].splitlines()]
    bytes_of = {row[0].strip("| "): row[-1].strip(" |") for row in rows if len(row) == 4}
    assert (bytes_of["Lamb16"], bytes_of["AdamW"], bytes_of["LAMB (FP32)"]) == ("2.00", "8.00", "8.00")


def test_ablations_table_has_every_row_and_fp32_is_exact(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, _ = printed(capsys, out, "ablations")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = {line.split(" | ")[0].strip("| "): line for line in lines}
    assert set(ablations.ABLATIONS) <= set(rows)
    assert rows["FP32 moments"].endswith("| 1.0000 | 1.0000 | 1.0000 |")
    counts = [line.count("| +0.00 | +0.00 ") for line in lines if line.startswith("| the rule |")]
    assert counts[0] == len(SIZES.tasks), "in the first of its tables"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--workers", "0"], "--workers"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--quick", "--out", "file/results"], "--out"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    options: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(compare, "_run_study", lambda *_: pytest.fail("ran"))
    assert main(["compare", "moments", *options]) == 2
    err = capsys.readouterr().err
    assert word in err.splitlines()[-1]
