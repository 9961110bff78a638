"""`lamb16 compare fidelity` in its quick form: the figures, what is written, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lamb16.cli import main
from lamb16.hyper import Hyper
from lamb16.lab.study import fidelity
from lamb16.lab.study.variants import direction

# Quick form, seeds 0 to 4: lamb16 0.9915 to 0.9970 over all gradients, the published rule 0.63 to 0.70 on iid ones.
LEAST_COSINE = 0.985
MOST_PUBLISHED_IID = 0.8
# Taken after the last step only, when a few large entries decide: 0.045 to 0.118 over 50 steps, median 0.067.
MOST_M_ERROR = 0.15

COLUMNS = {"cosine", "largest_update", "m_error", "v_log_error", "m_saturated", "v_zero"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("fidelity") / "report.json"
    assert main(["compare", "fidelity", "--quick", "--eager", "--json", str(file)]) == 0
    written: dict[str, Any] = json.loads(file.read_text())
    return written


def row(report: dict[str, Any], kind: str, rule: str) -> dict[str, Any]:
    found = [r for r in report["results"] if (r["gradients"], r["rule"]) == (kind, rule)]
    assert len(found) == 1
    return dict(found[0])


@pytest.mark.parametrize("kind", fidelity.GRADIENTS)
def test_updates_from_8_bits_are_close_to_those_from_float32(report: dict[str, Any], kind: str) -> None:
    mine, exact = row(report, kind, "lamb16"), row(report, kind, "float32")
    assert mine["cosine"] >= LEAST_COSINE
    assert mine["largest_update"] < 2 * exact["largest_update"]
    assert mine["m_error"] < MOST_M_ERROR
    assert mine["v_log_error"] < 0.3
    assert mine["v_zero"] == 0


@pytest.mark.parametrize("kind", fidelity.GRADIENTS)
def test_fp32_moments_agree_with_themselves(report: dict[str, Any], kind: str) -> None:
    exact = row(report, kind, "float32")
    assert exact["cosine"] == pytest.approx(1)
    assert [exact[name] for name in ("m_error", "v_log_error", "m_saturated", "v_zero")] == [0, 0, 0, 0]


def test_the_update_is_read_through_the_weights() -> None:
    """p = -r · u, whatever the trust ratio is, which comes from the weights before they were set to 0."""
    generator = torch.Generator().manual_seed(0)
    layer = fidelity.Layer("float32", 500, (0.9, 0.99), 0, compile=False)
    hyper = Hyper(betas=(0.9, 0.99), eps=fidelity.EPS)
    m = v = torch.zeros(500)
    for t in range(1, 5):
        g = torch.randn(500, generator=generator)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        assert torch.allclose(layer.update(g.clone()), direction(m, v, g, hyper, t)[1], rtol=1e-5, atol=1e-7)
    assert layer.optimizer.layer_stats()["layer"]["weight_norm"] > 1  # type: ignore[attr-defined]


def test_the_published_rule_is_clearly_worse(report: dict[str, Any]) -> None:
    """On iid gradients; on sparse ones a zero or two in v decide, and seeds differ from 0.00 to 0.69."""
    published = row(report, "iid", "published")
    assert published["cosine"] < MOST_PUBLISHED_IID
    assert published["m_saturated"] > 0.3
    assert published["m_error"] > 0.9


def test_the_report_is_complete(report: dict[str, Any]) -> None:
    assert {(r["gradients"], r["rule"]) for r in report["results"]} == {
        (kind, rule) for kind in fidelity.GRADIENTS for rule in fidelity.RULES
    }
    assert all(set(r) == COLUMNS | {"gradients", "beta2", "rule"} for r in report["results"])
    settings = report["settings"]
    assert (settings["elements"], settings["steps"], settings["seed"], settings["eps"]) == (10_000, 200, 0, 1e-16)


def test_table_and_several_beta2(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--elements", "500", "--steps", "20"]
    assert main(["compare", "fidelity", "--eager", *sizes, "--beta2", "0.9", "0.99", "--gradients", "iid"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split(" | ")[1:3] for line in out.splitlines() if line.startswith("| iid")]
    assert rows == [[beta2, rule] for beta2 in ("0.9", "0.99") for rule in fidelity.RULES]
    assert "iid gradients" in err


def test_one_zero_in_a_hundred_thousand_shows() -> None:
    row = dict.fromkeys(COLUMNS, 0.0) | {"gradients": "iid", "beta2": 0.999, "rule": "published", "v_zero": 1e-5}
    assert fidelity.table([row]).endswith("0.001% |")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--elements", "0"], "--elements"),
        (["--steps", "0"], "--steps"),
        (["--beta2", "1"], "--beta2"),
        (["--json", "no/such/folder/report.json"], "--json"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    options: list[str], word: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fidelity, "measure", lambda *_: pytest.fail("measured"))
    assert main(["compare", "fidelity", "--quick", *options]) == 2
    err = capsys.readouterr().err
    assert word in err
    assert len(err.splitlines()) == 1
