"""What is computed from the runs' results: basins, medians, tables and plots."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lamb16.lab.study import ablations, long, moments, published, rates, report, runs
from lamb16.lab.study.mnist import MnistRun
from lamb16.lab.study.sizes import FULL, QUICK
from lamb16.lab.study.training import Run

CURVE = {0.001: 2.0, 0.01: 1.0, 0.1: 1.5, 1.0: math.inf}


@pytest.mark.parametrize(
    ("limit", "decades"),
    [
        (0.9, 0.0),  # never reached
        (1.25, 0.25 + 0.5),  # both sides by interpolation
        (1.5, 0.5 + 1.0),
        (2.5, 1.0 + 1.0),  # to the first rate, and to the diverged one
    ],
)
def test_basin_is_measured_in_decades_around_the_minimum(limit: float, decades: float) -> None:
    width, cut = rates.basin(CURVE, limit)
    assert width == pytest.approx(decades, abs=1e-6)
    assert cut == (limit == 2.5), "the lowest rate is in the basin too"


def test_a_second_valley_does_not_count() -> None:
    assert rates.basin({0.001: 1.1, 0.01: 3.0, 0.1: 1.0, 1.0: 3.0}, 2.0) == (pytest.approx(0.5 + 0.5), False)


def test_medians_take_diverged_runs_as_infinite() -> None:
    assert report.median([1.0, None, 3.0]) == 3.0
    assert report.median_and_range([1.0, None, 3.0], ".1f") == "3.0 (1.0 to diverged)"


def test_a_diverged_seed_shows_in_a_difference() -> None:
    assert report.difference([1.1, 1.2], [1.0, 1.0], ".2f") == "+13.88 ± 4.35"
    assert report.difference([1.1], [1.0], ".1f") == "+9.5"
    assert report.difference([1.0, math.inf], [1.0, 1.0], ".1f") == "diverged"
    assert report.deviation([1.0, math.inf]) == math.inf


def _rate_pairs() -> list[rates.Pair]:
    values = {
        rates.Optimizer("lamb16"): 0.9,
        rates.Optimizer("adamw"): 1.0,
        rates.Optimizer("nadam"): 1.1,
        rates.Optimizer("lamb"): 1.2,
        rates.Optimizer("published"): 2.0,
        rates.Optimizer("lamb16", caution=True): 0.8,
    }
    return [
        (Run("cnn", name, lr, 1, 5, 5, caution=caution), {"validation_loss": loss * (1 + abs(math.log10(lr) + 2))})
        for (name, caution, _), loss in values.items()
        for lr in (0.001, 0.01, 0.1)
    ]


def test_rates_compare_the_best_of_each_optimizer() -> None:
    tables = rates.tables(_rate_pairs(), {"unusable": {"adamw8bit-bnb": "no such library"}})
    assert "| cnn | Lamb16 | 0.9 | 0.01 | -10.00 | -10.54 | 0.20 | 0.44 |" in tables["basin"]
    assert "| cnn | AdamW | 1 | 0.01 | +0.00 | +0.00 | 0.20 | 0.20 |" in tables["basin"]
    assert "| cnn | NAdam | 1.1 | 0.01 | +10.00 | +9.53 | 0.20 |" in tables["basin"]
    assert "| cnn | Lamb16, caution | 0.8 | 0.01 | -20.00 | -22.31 | 0.20 |" in tables["basin"]
    assert "| LAMB (FP32) | 2.4 | 1.2 | 2.4 |" in tables["cnn: loss"]
    assert tables["in short"].splitlines()[::2] == [
        "| optimizer | cnn: loss, % | decades |",
        "| Lamb16 | -10.0 | 0.44 |",
        "| NAdam | +10.0 | 0.00 |",
        "| PublishedLamb16 | +100.0 | 0.00 |",
    ]
    assert "| AdamW8bit (bitsandbytes) | no such library |" in tables["not run"]


def test_a_best_rate_at_an_end_is_marked() -> None:
    assert [report.at_an_end(lr, [0.1, 0.001, 0.01]) for lr in (0.001, 0.01, 0.1)] == [" ↓", "", " ↑"]
    pairs = [
        (run, {"validation_loss": 1 / run.lr} if run.optimizer == "lamb" else result) for run, result in _rate_pairs()
    ]
    assert "| cnn | LAMB (FP32) | 10 | 0.1 ↑ | +900.00 |" in rates.tables(pairs, {})["basin"]


def test_the_two_best_rates_get_all_seeds() -> None:
    sizes = replace(QUICK, seeds=(1, 2), tasks={"cnn": QUICK.tasks["cnn"]._replace(best_seeds=(1, 2, 3))})
    pairs = _rate_pairs()
    further = rates.more(pairs, sizes)
    optimizers = {rates.optimizer_of(run) for run, _ in pairs}
    assert {rates.Optimizer("lamb16"), rates.Optimizer("adamw")} < optimizers
    for optimizer in optimizers:
        own = [run for run in further if rates.optimizer_of(run) == optimizer]
        assert {run.seed for run in own} == ({1, 2, 3} if optimizer in rates.CLAIMED else {1, 2})
        assert len(set(own)) == len(own) == 2 * len({run.seed for run in own})  # of three rates
    low = [(run, result if run.lr > 0.001 else {"validation_loss": 0.1}) for run, result in pairs]
    for optimizer in optimizers:
        assert {run.lr for run in rates.more(low, sizes) if rates.optimizer_of(run) == optimizer} == {0.001, 0.01}
    seconds = [(run, {"validation_loss": 9.0}) for run in further if run.lr == 0.01 and run.seed != 1]
    lost = {
        run.lr for run in rates.more(pairs + seconds, sizes) if rates.optimizer_of(run) == rates.Optimizer("lamb16")
    }
    assert lost == {0.001, 0.1}, "another rate is the second best with the other seeds"


def test_a_best_rate_at_an_end_is_followed_by_one_beyond_it() -> None:
    """Twice at most; tables have a column for each rate."""
    pairs = [
        (run, {"validation_loss": 1 / run.lr} if run.optimizer == "lamb" else result) for run, result in _rate_pairs()
    ]
    size = QUICK.tasks["cnn"]._replace(rates=(0.001, 0.01, 0.1), rate_seeds=(1, 2))
    sizes = replace(QUICK, tasks={"cnn": size}, beyond=2)
    found = []
    for _ in range(3):
        new = [run for run in rates.more(pairs, sizes) if run.lr not in (0.001, 0.01, 0.1)]
        new = [run for run in new if run not in {run for run, _ in pairs}]
        found.append({(run.optimizer, round(run.lr, 3), run.seed) for run in new})
        pairs += [(run, {"validation_loss": 1 / run.lr}) for run in new]
    assert found == [{("lamb", 0.316, 1), ("lamb", 0.316, 2)}, {("lamb", 1.0, 1), ("lamb", 1.0, 2)}, set()]
    tables = rates.tables(pairs, {})
    assert "| cnn | LAMB (FP32) | 1 (1 to 1) | 1 ↑ |" in tables["basin"]
    assert "| LAMB (FP32) | 1000 | 100 | 10 | 3.162 | 1 |" in tables["cnn: loss"]
    assert "| Lamb16 | 1.8 | 0.9 | 1.8 |  |  |" in tables["cnn: loss"]
    assert "| cnn | Lamb16 | 0.9 | 0.01 |" in tables["basin"]
    assert rates.more(pairs, replace(sizes, tasks={"cnn": size._replace(best_seeds=())}, seeds=())) == []


def test_a_best_rate_has_all_seeds() -> None:
    """One seed that was lucky does not make a rate the best."""
    assert rates.best_rate({0.1: [0.5], 0.2: [0.6, 0.8, 0.7], 0.4: [None, None, 0.1], 0.8: [0.8, 0.9, 0.7]}) == 0.2


def test_plots_are_the_same_for_the_same_results(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (path,) = rates.plots(_rate_pairs(), folder)
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    assert "PublishedLamb16" in texts[0]


def _moment_pairs(loss: float) -> list[moments.Pair]:
    layer: dict[str, Any] = dict.fromkeys(
        ("cosine", "m_error", "v_log_error", "m_saturated", "m_zero", "v_zero", "v_smallest"), 0.5
    )
    pairs = []
    for seed in (1, 2):
        for kind in moments.MOMENTS:
            result = {"validation_loss": loss if kind == "float8" else 1.0 + seed / 100, "curve": [1.0]}
            if kind == "float8":
                result["probes"] = {"layers": {"w": layer | {"cosines": [0.5, 0.4]}}}
            run = Run("cnn", "lamb16", 0.01, seed, 5, 5, moment_dtype=kind, probed=kind == "float8")
            pairs.append((run, result))
    return pairs


def test_moments_compare_seed_by_seed() -> None:
    text = moments.tables(_moment_pairs(1.0201), {})["loss"]
    assert "| cnn | linear, 0.01 | 0.999 | 1 | 2 | 1.0201 | 1.015 | +0.50 ± 0.49 | 0.70 | 0.5000 | 0.500 |" in text
    constant = [(replace(run, schedule="constant"), result) for run, result in _moment_pairs(1.0201)]
    rows = moments.tables(_moment_pairs(1.0201) + constant[:2], {})["loss"].splitlines()
    assert rows[3].startswith("| cnn | constant, 0.01 | 0.999 | 1 | 1 | 1.0201 | 1.01 | +1.00 |  |")
    hard = [(replace(run, beta2=0.99), result) for run, result in _moment_pairs(1.0201)]
    tables = moments.tables(_moment_pairs(1.0201) + hard, {})
    assert (tables["loss"].count("| 0.99 |"), tables["other β2, and gradients scaled"].count("| 0.99 |")) == (0, 1)


def test_every_ablation_has_a_name_and_its_runs_on_every_task() -> None:
    jobs = ablations.jobs(QUICK)
    names = {(job.task, ablations.name_of(job)) for job in jobs}
    assert names == {(task, name) for task in QUICK.tasks for name in ablations.ABLATIONS}
    assert len(set(jobs)) == len(jobs) == len(QUICK.tasks) * (4 * len(ablations.UPDATE) + len(ablations.STORAGE))
    second = set(ablations.jobs(replace(QUICK, ablation_seeds=(1, 2)))) - set(jobs)
    assert len(second) == len(QUICK.tasks) * len(ablations.ABLATIONS)
    assert {(job.seed, job.lr / QUICK.tasks[job.task].lr) for job in second} == {(2, 1.0)}


def _ablation_pairs() -> list[ablations.Pair]:
    """The rule is best at its own rate; without bias correction the best rate is another, where it is 2 % worse."""
    pairs = []
    for job in ablations.jobs(QUICK):
        loss = 1.0 + abs(math.log10(job.lr / QUICK.tasks[job.task].lr))
        if not job.bias_correction:
            loss = 1.02 if job.lr < QUICK.tasks[job.task].lr / 5 else 1.1
        pairs.append((job, {"validation_loss": loss, "probes": {"layers": {"w": {"cosine": 0.9}}}}))
    return pairs


def test_trust_ratios_get_more_seeds_at_their_best_rate() -> None:
    pairs = _ablation_pairs()
    further = ablations.more(pairs, QUICK)
    assert {(run.task, ablations.name_of(run), run.lr / QUICK.tasks[run.task].lr, run.seed) for run in further} == {
        (task, name, 1.0, seed) for task in QUICK.tasks for name in ablations.RATIOS for seed in (1, 2)
    }
    assert {run for run in further if run.seed == 1} <= {run for run, _ in pairs}, "these are known"
    rises = {"trust_scale 0": 1.1}  # of the second seed
    pairs += [
        (run, {"validation_loss": rises.get(ablations.name_of(run), 1.0)}) for run in further if run.seed not in (1,)
    ]
    tables = ablations.tables(pairs, {})
    rows = {line.split(" | ")[0]: line for line in tables["trust ratio"].splitlines()}
    assert rows["| the rule"].endswith("| 1 (1 to 1) |")
    assert rows["| trust_scale 0"].endswith("| 1.05 (1 to 1.1): +4.8 ± 4.8 % |")
    assert len(rows) == 2 + len(ablations.RATIOS)
    once = ablations.tables(_ablation_pairs(), {})
    assert tables["update"] == once["update"], "which has the seeds of all ablations"


def test_ablations_go_beyond_an_end_of_their_rates() -> None:
    """Until the best lies between two others, to six rates at most; then the trust ratios have the other seeds."""
    sizes = replace(QUICK, beyond=2)
    lowest = {"trust_scale 0": 10, "trust_scale 0.5": 1e9, "no bias correction": 1e-9}  # times the first rate
    pairs: list[ablations.Pair] = []

    def loss(job: Run) -> float:
        return abs(math.log10(job.lr / QUICK.tasks[job.task].lr / lowest.get(ablations.name_of(job), 1.0)))

    new = ablations.jobs(sizes)
    while new:
        pairs += [(job, {"validation_loss": 1 + loss(job)}) for job in new]
        known = {run for run, _ in pairs}
        new = [run for run in ablations.more(pairs, sizes) if run not in known]
    own = [run for run, _ in pairs if run.task == "cnn" and ablations.name_of(run) in lowest]
    found = {(ablations.name_of(run), round(2 * math.log10(run.lr / 0.1)), run.seed) for run in own}
    first = {(name, exponent, 1) for name in lowest for exponent in (-2, -1, 0, 1)}
    beyond = {("trust_scale 0", 2), ("trust_scale 0", 3), ("trust_scale 0.5", 2), ("trust_scale 0.5", 3)}
    beyond |= {("no bias correction", -3), ("no bias correction", -4)}
    seeds = {("trust_scale 0", 2, 2), ("trust_scale 0.5", 3, 2)}
    assert found - first == {(*pair, 1) for pair in beyond} | seeds


def test_ablations_are_compared_at_the_same_and_at_their_best_rate() -> None:
    tables = ablations.tables(_ablation_pairs(), {})
    update = tables["update"].splitlines()
    assert f"| no bias correction | {'+10.00 | +2.00 ↓ | ' * len(QUICK.tasks)}".strip() in update
    assert f"| the rule | {'+0.00 | +0.00 | ' * len(QUICK.tasks)}".strip() in update
    storage = tables["storage"].splitlines()
    for name in (ablations.BASELINE, "nearest rounding"):
        assert f"| {name} | {'+0.00 | ' * len(QUICK.tasks)}{'0.9000 | ' * len(QUICK.tasks)}".strip() in storage
    ratios = len(ablations.RATIOS) - 1
    assert len(update) + len(storage) + ratios == 2 + len(ablations.UPDATE) + 2 + len(ablations.STORAGE) + 1


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_runs_of_moments_come_in_pairs(sizes: Any) -> None:
    jobs = moments.jobs(sizes)
    assert len(set(jobs)) == len(jobs)
    settings = [vars(job) | {"probed": None} for job in jobs]
    for a, b in zip(settings[::2], settings[1::2], strict=True):
        assert {key for key in a if a[key] != b[key]} == {"moment_dtype"}


def test_a_long_training_goes_beyond_an_end_of_its_rates() -> None:
    """Until the best lies between two others, to five rates at most; the small model's then has the other seeds."""
    lowest = {"nadam": 0.03, "adamw": 1e-9}  # where their losses are least

    def results(jobs: Any) -> list[runs.Result]:
        return [{"validation_loss": abs(math.log(job.lr / lowest.get(job.optimizer, 0.01)))} for job in jobs]

    pairs = runs.pairs_of(long, QUICK, results)
    assert len({run for run, _ in pairs}) == len(pairs)
    found = {
        (task, name): sorted(
            f"{run.lr:.2g}" for run, _ in pairs if (run.task, run.optimizer, run.seed) == (task, name, 1)
        )
        for task in QUICK.long
        for name in ("nadam", "adamw", "lamb")
    }
    for task in QUICK.long:
        assert found[task, "nadam"] == ["0.001", "0.0032", "0.01", "0.032", "0.1"]
        assert found[task, "adamw"] == ["0.0001", "0.00032", "0.001", "0.0032", "0.01"]
        assert found[task, "lamb"] == ["0.0032", "0.01", "0.032"]
    second = {(run.task, run.optimizer, f"{run.lr:.2g}") for run, _ in pairs if run.seed == 2}
    assert second == {
        ("lm", "nadam", "0.032"),
        ("lm", "adamw", "0.0001"),
        ("lm", "lamb", "0.01"),
        ("lm", "lamb16", "0.01"),
    }


def test_the_published_table_in_short_has_a_row_per_optimizer() -> None:
    result = {"best_accuracy": 0.99, "last_accuracy": 0.98, "train_loss": 0.02}
    settings = [("lamb16", 0.02, {}), ("adamw", 0.02, {}), ("adamw", 0.002, {}), ("lamb16", 0.02, {"caution": True})]
    pairs = [(MnistRun(name, "mnist", 8, lr, 1, "linear", 1, **own), result) for name, lr, own in settings]
    worse = result | {"best_accuracy": 0.97, "train_loss": 0.04}
    pairs += [(replace(run, seed=2), worse) for run, _ in pairs[:1]]
    assert published.tables(pairs, {})["in short"].splitlines() == [
        "| optimizer | batch 8, linear |",
        "|---|---|",
        "| Lamb16 | 98.00 %, 0.03 (0.02 to 0.04) |",
        "| AdamW | 99.00 %, 0.02 |",
        "| AdamW, a tenth of the rate | 99.00 %, 0.02 |",
        "| Lamb16, caution | 99.00 %, 0.02 |",
    ]
