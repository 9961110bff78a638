"""The runner of the study: results are kept one by one, used again only if nothing changed, and progress is shown."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lamb16.lab.errors import CommandError
from lamb16.lab.study import ablations, runs
from lamb16.lab.study.runs import Result, Results
from lamb16.lab.study.sizes import QUICK


@dataclass(frozen=True)
class Job:
    """A run that takes no time."""

    optimizer: str
    seed: int
    folder: str  # where each execution leaves a file


def execute(job: Job) -> Result:
    if job.seed < 0:
        raise ValueError("this one fails")
    Path(job.folder, f"{job.seed}-{time.monotonic_ns()}").touch()
    if job.seed > 100:
        os._exit(1)
    found = {"process": os.getpid(), "threshold": os.environ["MALLOC_MMAP_THRESHOLD_"]}
    return found | {"train_loss": job.seed / 3, "validation_loss": float("inf")}


def describe(job: Job) -> str:
    return f"seed {job.seed}"


def run_all(jobs: list[Job], results: Results, count: int = 1) -> list[Result]:
    with runs.Workers(count) as workers:
        return runs.run_all(jobs, execute, results, workers, describe)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "executed"
    made.mkdir()
    return made


def test_results_come_in_order_from_other_processes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [Job("adam", seed, str(folder)) for seed in (3, 1, 2, 1)]
    found = run_all(jobs, Results(tmp_path / "r.json", "toy"), 2)
    assert [round(3 * result["train_loss"]) for result in found] == [3, 1, 2, 1]
    assert len(list(folder.iterdir())) == 3, "equal jobs run once"
    assert all(result["process"] != os.getpid() for result in found)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "toy: 3 runs, 2 at a time"
    assert [line.split(",")[0] for line in lines[1:]] == ["[1/3", "[2/3", "[3/3"]
    assert "seed 3: train loss 1" in "".join(lines)


def test_workers_serve_several_studies_and_give_no_memory_back(folder: Path, tmp_path: Path) -> None:
    before = dict(os.environ)
    with runs.Workers(1) as workers:
        found = [
            runs.run_all(
                [Job("adam", k, str(folder))], execute, Results(tmp_path / f"{k}.json", "toy"), workers, describe
            )
            for k in (1, 2)
        ]
    ((first,), (second,)) = found
    assert first["process"] == second["process"] != os.getpid()
    assert first["threshold"] == str(4 << 30)
    assert dict(os.environ) == before


class Interrupted(Results):
    """Interrupted as by Ctrl-C when it is given its second result."""

    def add(self, job: Job, result: Result) -> None:
        if self.runs:
            signal.raise_signal(signal.SIGINT)
        super().add(job, result)


@pytest.mark.parametrize("jobs", [2, 4])
def test_an_interruption_is_not_lost_and_what_had_finished_is_kept(jobs: int, folder: Path, tmp_path: Path) -> None:
    """Though it was the last result."""
    path = tmp_path / "r.json"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all([Job("adam", k, str(folder)) for k in range(jobs)], Interrupted(path, "toy"))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(Results(path, "toy").runs) >= 2


def test_a_worker_that_dies_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(CommandError, match=r"a worker died.*fewer --workers.*r\.json"):
        run_all([Job("adam", k, str(folder)) for k in (1, 101)], Results(path, "toy"))
    assert Results(path, "toy").get(Job("adam", 1, str(folder))) is not None


def test_only_what_is_missing_is_run(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    run_all([Job("adam", 1, str(folder))], Results(path, "toy"))
    found = run_all([Job("adam", k, str(folder)) for k in (1, 2)], Results(path, "toy"))
    assert len(list(folder.iterdir())) == 2
    assert len(found) == len(json.loads(path.read_text())["runs"]) == 2
    assert found[0]["validation_loss"] is None, "what JSON has no number for"
    assert [result["train_loss"] for result in found] == [0.333333, 0.666667], "read or new, the same digits"


def test_results_stay_known_when_there_are_more_settings(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class First:
        optimizer: str
        rate: float = 0.1

    @dataclass(frozen=True)
    class Later(First):
        caution: bool = False

    results = Results(tmp_path / "r.json", "toy")
    results.add(First("adam", 0.2), {"train_loss": 1.0})
    again = Results(tmp_path / "r.json", "toy")
    assert again.get(Later("adam", 0.2)) == {"train_loss": 1.0}
    assert again.get(Later("adam", 0.2, caution=True)) is None
    assert again.get(First("adam")) is None
    assert again.runs[0]["settings"] == {"optimizer": "adam", "rate": 0.2}


def test_more_jobs_follow_from_the_results_so_far() -> None:
    """Until there are none that are new."""

    class Study:
        jobs = staticmethod(lambda sizes: [1, 2])
        more = staticmethod(lambda pairs, sizes: [job + result for job, result in pairs if result < sizes])

    pairs = runs.pairs_of(Study, 100, lambda jobs: [10 * job for job in jobs])
    assert pairs == [(1, 10), (2, 20), (11, 110), (22, 220)]
    assert runs.pairs_of(Study, 200, lambda jobs: [10 * job for job in jobs]) == [*pairs, (121, 1210)]


def test_a_changed_optimizer_is_run_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, jobs = tmp_path / "r.json", [Job("lamb16", 1, str(folder)), Job("adam", 1, str(folder))]
    run_all(jobs, Results(path, "toy"))
    monkeypatch.setattr(runs, "digest", lambda module: "another")
    run_all(jobs, Results(path, "toy"))
    assert len(list(folder.iterdir())) == 3, "adam's code is torch's, which did not change"
    assert len(json.loads(path.read_text())["runs"]) == 2, "the stale result is replaced"


def test_a_digest_ignores_comments_and_sees_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = {
        "plain": 'def f(x):\n    """One."""\n    return x + 1\n',
        "remarks": '"""Two."""\n\ndef f(x):\n    """Three."""\n    return (x + 1)  # four\n',
        "changed": 'def f(x):\n    """One."""\n    return x + 2\n',
    }
    for name, text in texts.items():
        (tmp_path / f"digest_{name}.py").write_text(text)
    found = {name: runs.digest(f"digest_{name}") for name in texts}
    assert found["plain"] == found["remarks"] != found["changed"]


def test_a_failing_run_ends_the_study_and_keeps_the_others(folder: Path, tmp_path: Path) -> None:
    path, before = tmp_path / "r.json", dict(os.environ)
    with pytest.raises(ValueError, match="this one fails"):
        run_all([Job("adam", k, str(folder)) for k in (1, -1)], Results(path, "toy"))
    assert dict(os.environ) == before
    assert Results(path, "toy").get(Job("adam", 1, str(folder))) is not None


@pytest.mark.parametrize("content", ["", "{}", '{"study": "other", "extra": {}, "runs": []}'])
def test_a_foreign_file_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(CommandError, match=r"r\.json.*move it away"):
        Results(path, "toy")
    assert path.read_text() == content


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path) -> None:
    """The real command, interrupted as by Ctrl-C after its first result: it ends, and the next one does the rest."""
    command = tmp_path / "command.py"
    command.write_text(
        textwrap.dedent(
            """
            import signal
            import sys
            from lamb16.cli import main
            if __name__ == "__main__":
                signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
                sys.exit(main(["compare", "ablations", "--quick", "--workers", "1", "--out", sys.argv[1]]))
            """
        )
    )
    arguments = [sys.executable, str(command), str(tmp_path / "out")]
    first = _interrupted_after_a_result(arguments)
    assert first == f"ablations: {len(ablations.jobs(QUICK))} runs, 1 at a time\n"
    kept = len(json.loads((tmp_path / "out" / "ablations.json").read_text())["runs"])
    assert 1 <= kept < len(ablations.jobs(QUICK))
    again = _interrupted_after_a_result(arguments)
    assert again == f"ablations: {len(ablations.jobs(QUICK)) - kept} runs, 1 at a time\n"


def _interrupted_after_a_result(arguments: list[str]) -> str:
    """The first line of progress of a command that is interrupted when its first run has ended; there are many more."""
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline()]
        while not lines[-1].startswith("[1/"):
            assert lines[-1], "the command ended"
            lines.append(process.stderr.readline())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    return next(line for line in lines if line.startswith("ablations:"))
