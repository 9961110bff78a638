"""`lamb16 bench`: what is stepped and reported; no test looks at a time."""

import json
from pathlib import Path

import pytest
import torch

from lamb16.cli import bench, main
from lamb16.cli.shapes import SETS


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("mlp", 16, 8_396_800),
        ("resnet50", 161, 25_557_032),
        ("bert-base", 197, 108_891_648),
        ("gpt2", 196, 124_439_808),
        ("tiny-tensors", 400, 189_800),
    ],
)
def test_the_shapes_are_those_of_the_models(name: str, tensors: int, parameters: int) -> None:
    shapes = SETS[name]()
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes)) == (tensors, parameters)


def test_a_run_reports_every_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SETS, "mlp", lambda: [(70, 70), (9,)])
    file = tmp_path / "bench.json"
    assert main(["bench", "--shapes", "mlp", "--rounds", "2", "--device", "cpu", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    rows = {row["name"]: row for row in written["results"]["mlp"]}
    assert set(rows) == {bench.COPY, *bench.CONTENDERS}
    assert rows["Lamb16 compiled"]["state_bytes"] == 2 * 4909 + 2 * 16
    assert rows["AdamW fused"]["to_adamw"] == rows[bench.COPY]["to_copy"] == 1
    assert all(row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows.values())
    assert written["settings"]["rounds"] == 2
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in rows)


@pytest.mark.parametrize("options", [["--rounds", "0"], ["--threads", "0"], ["--device", "nowhere"]])
def test_wrong_values_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options]) == 2
    assert options[1] in capsys.readouterr().err
