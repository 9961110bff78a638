"""Every table of a study or benchmark that the docs show is what the committed results give."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lamb16.lab import bench, beside_adamw, compare, cuda_report, memory
from lamb16.lab.cuda.gpus import ADAMW_BYTES, LAMB16_BYTES
from lamb16.lab.study import fidelity, report, runs
from lamb16.lab.study.sizes import FULL

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
DOC = (ROOT / "docs" / "algorithm.md").read_text()


def results_of(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("study", compare.TRAININGS)
def test_pages_are_those_of_the_results(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the code is by now: that is for the next run of the study to say."""
    module = compare._module(study)
    results = runs.Results(RESULTS / f"{study}.json", study)
    unusable = results.extra.get("unusable", {})
    monkeypatch.setattr("lamb16.lab.registry.why_unusable", lambda name: unusable.get(name))
    used: list[runs.Job] = []

    def recorded(jobs: Sequence[runs.Job]) -> list[runs.Result]:
        found = [results.recorded(job) for job in jobs]
        assert [job for job, result in zip(jobs, found, strict=True) if result is None] == []
        used.extend(jobs)
        return [result for result in found if result is not None]

    pairs = runs.pairs_of(module, FULL, recorded)
    assert (RESULTS / f"{study}.md").read_text() == compare.document(study, module.tables(pairs, results.extra))
    assert len(results.runs) == len(set(used)), f"docs/results/{study}.json holds runs that are no part of the study"


def test_recorded_times_are_those_of_the_results() -> None:
    for study in compare.TRAININGS:
        minutes = sum(run["result"]["seconds"] for run in results_of(study)["runs"]) / 60
        assert study == "long" or f"`{study}` {minutes:.0f}" in DOC


def test_the_page_of_synthetic_gradients_is_that_of_the_results() -> None:
    assert (RESULTS / "fidelity.md").read_text() == fidelity.table(results_of("fidelity")["results"]) + "\n"


def test_tables_are_those_of_the_pages_of_results() -> None:
    pages = [(RESULTS / f"{study}.md").read_text() for study in compare.TRAININGS]
    tables = re.findall(r"(?:^\|.*\n)+", DOC, re.M)
    assert len(tables) > 5
    assert [table for table in tables if not any(table in page for page in pages)] == []


@pytest.mark.parametrize("study", [*compare.TRAININGS, "fidelity"])
def test_results_of_an_earlier_rule_are_marked(study: str) -> None:
    """The document names the digest of every reference.py but the present one that its tables were made with."""
    content = results_of(study)
    codes = [run["code"] for run in content["runs"]] if "runs" in content else [content["settings"].get("code", "")]
    rules = {rule for code in codes for rule in re.findall(r"\breference ([0-9a-f]+)", code)}
    old = [rule for rule in rules - {runs.digest("lamb16.reference")} if rule not in DOC]
    assert old == [], (
        f"docs/results/{study}.json was made with another reference.py: run `lamb16 compare {study}` again, or name "
        f"its digest in docs/algorithm.md and say there that its tables are of an earlier rule"
    )


def test_the_benchmarks_are_those_of_the_results() -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    many, one, cuda = (results_of(name) for name in ("bench", "bench-1-thread", "cuda"))
    avx2, avx2_one = (results_of(name) for name in ("bench-avx2", "bench-avx2-1-thread"))
    tables = [bench.table(rows) for content in (many, one, avx2, avx2_one) for rows in content["results"].values()]
    tables.append(beside_adamw.size_table(many["sizes"]))
    tables += [bench.compile_table(many["compile_time"]), bench.pass_table(one["passes"]["mlp"])]
    tables += [cuda_report.summary(cuda), *(cuda_report.kernels(row) for row in cuda if row["arch"] == "sm_90")]
    assert [table for table in tables if table not in document] == []
    assert many["settings"]["processor"] in document


def test_the_tables_of_called_steps_are_those_of_the_results() -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    for dtype in ("", "-bfloat16"):
        host, sizes, ranks = (results_of(f"bench-{name}{dtype}") for name in ("host", "sizes", "ranks"))
        rows = [*sizes["sizes"], *sizes["several"]]
        tables = [beside_adamw.table(host["host"]), beside_adamw.table(ranks["ranks"]["rows"])]
        tables.append(beside_adamw.ratio_table(rows, "to_adamw", beside_adamw.COUNTS))
        tables.append(beside_adamw.ratio_table(rows, "new_to_same", beside_adamw.CHANGING))
        assert [table for table in tables if table not in document] == []
        for content in (host, sizes, ranks):
            assert content["settings"]["processor"] in document


GRAPH = f"{bench.COMPILED}, CUDA graph"


def on_a_gpu(results: dict[str, list[dict[str, Any]]]) -> str:
    """A row per set of shapes: times in ms, of AdamW also what its bytes take at the copy's speed; ratios; memory."""
    rows = []
    for name, found in results.items():
        row = {each["name"]: each for each in found}
        own, graph, copy = row[bench.COMPILED], row[GRAPH], row[bench.COPY]["median_s"]
        seconds = [copy, copy * ADAMW_BYTES / LAMB16_BYTES]
        seconds += [row[each]["median_s"] for each in (bench.BASELINE, "AdamW foreach", bench.COMPILED, GRAPH)]
        ratios = [own["to_adamw"], graph["to_adamw"], graph["median_s"] / seconds[1]]
        memory = [f"{own['state_bytes'] / 1e6:.2f} MB", f"{own['extra_memory']:.1%}"]
        rows.append([name, *(f"{x * 1e3:.2f}" for x in seconds), *(f"{x:.2f}" for x in ratios), *memory])
    header = [
        "ms", "copy of 20 bytes", "28 bytes at its speed", "AdamW fused", "AdamW foreach", "Lamb16 compiled",
        "Lamb16, CUDA graph", "compiled to AdamW fused", "graph to AdamW fused", "graph to 28 bytes", "state",
        "beyond state",
    ]  # fmt: skip
    return report.table(header, rows)


def predicted_and_measured(cuda: list[dict[str, Any]], measured: dict[str, list[dict[str, Any]]]) -> str:
    """The model's times of a step on an H100 beside those of the CUDA graph."""
    gpus = {row["shapes"]: gpu for row in cuda for gpu in row["gpus"] if (row["arch"], gpu["gpu"]) == ("sm_90", "H100")}
    rows = []
    for name, model in (("resnet50", "resnet50"), ("bert-base", "bert-large"), ("tiny-tensors", "tiny-tensors")):
        row, gpu = {each["name"]: each for each in measured[name]}, gpus[model]
        found, copy = row[GRAPH]["median_s"], row[bench.COPY]
        scale = copy["median_s"] / copy["ns_per_param"] * 1e9  # parameters
        seconds = [*(gpu[key] * scale for key in ("bytes", "issue", "time")), copy["median_s"], found]
        ratios = [found / seconds[2], row[GRAPH]["to_copy"]]
        rows.append([name, model, *(f"{x * 1e3:.3f}" for x in seconds), *(f"{x:.2f}" for x in ratios)])
    header = [
        "ms", "time per parameter of", "bytes", "issue", "predicted", "copy of 20 bytes", "measured",
        "measured to predicted", "measured to copy",
    ]  # fmt: skip
    return report.table(header, rows)


def test_the_gpus_tables_are_those_of_the_results() -> None:
    measured = results_of("bench-h100")
    benchmarks, model = ((ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "gpu-model.md"))
    assert f"{measured['settings']['processor']}, torch {measured['settings']['torch']}" in benchmarks
    assert on_a_gpu(measured["results"]) in benchmarks
    assert predicted_and_measured(results_of("cuda"), measured["results"]) in model


def test_the_readmes_comparison_is_that_of_the_results() -> None:
    tables = re.findall(r"(?:^\| optimizer \|.*\n)(?:^\|.*\n)+", (ROOT / "README.md").read_text(), re.M)
    assert len(tables) == 1
    assert tables[0] in (RESULTS / "rates.md").read_text()


def test_the_readmes_memory_table_is_that_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    results = results_of("memory")["results"]
    assert [f"lamb16 bench --memory --shapes {name}\n" in readme for name in results] == [True]
    assert [table for table in map(memory.table, results.values()) if table not in readme] == []


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def test_links_and_pictures_exist(document: Path) -> None:
    """And, where they lead into a document, the heading."""
    for target, _, heading in re.findall(r"\]\((?!http)([^)#]*)(#?)([^)]*)\)", document.read_text()):
        path = document.parent / target if target else document
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
