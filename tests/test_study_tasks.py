"""The study's tasks, single trainings of them, and what the probes see."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from lamb16 import Lamb16
from lamb16.lab import registry
from lamb16.lab.study import mnist, rounding, tasks, training
from lamb16.lab.study.probes import Shadow
from lamb16.lab.study.training import Run, build, describe, execute
from lamb16.lab.training import train

SMALL: dict[str, Any] = {"steps": 12, "batch_size": 16, "dataset": "digits"}


def test_tokens_are_numbered_by_frequency() -> None:
    stream = tasks.tokens()
    assert len(stream) > 900_000
    counts = torch.bincount(stream, minlength=tasks.VOCABULARY)
    assert len(counts) == tasks.VOCABULARY
    assert (counts[1:-1] >= counts[2:]).all()
    assert 0 < counts[-1] < 100, "rows of the embedding that are rarely used"


def test_the_language_model_predicts_the_next_token_of_text_it_was_not_trained_on() -> None:
    task = tasks.load_task("lm", "digits", None)
    for inputs, targets in (task.train, task.validation):
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    seen = {tuple(row) for row in task.train[0].tolist()}
    assert not seen & {tuple(row) for row in task.validation[0].tolist()}


def test_settings_of_a_published_run_reach_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(mnist, "train", lambda config, data: found.append(config) or train(config, data))
    options = {"beta1": 0.0, "weight_decay": 0.1, "caution": True, "trust_scale": 0.5, "trust_clip": 0.7}
    run = mnist.MnistRun("lamb16", "digits", 200, 0.02, 1, "linear-step", 3, quick=True, **options)
    assert mnist.execute(run, None)["train_loss"] > 0
    (config,) = found
    assert (config.optimizer, config.batch_size, config.lr, config.epochs) == ("lamb16", 200, 0.02, 1)
    assert (config.schedule, config.seed, config.betas, config.weight_decay) == ("linear-step", 3, (0.0, 0.999), 0.1)
    assert (config.caution, config.trust_scale, config.trust_clip) == (True, 0.5, 0.7)
    assert "linear-step beta1 0.0 caution True trust_scale 0.5 trust_clip 0.7 seed 3" in mnist.describe(run)


def test_the_language_model_does_not_look_ahead() -> None:
    model = tasks.load_task("lm", "digits", None).model(0)
    first = torch.randint(0, tasks.VOCABULARY, (2, tasks.CONTEXT), generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[:, 40:] = 5
    with torch.no_grad():
        a, b = model(first), model(second)
    assert torch.equal(a[:, :40], b[:, :40])
    assert not torch.equal(a[:, 40:], b[:, 40:])


def test_every_example_comes_once_before_any_comes_twice() -> None:
    task = tasks.load_task("cnn", "digits", None)
    count = len(task.train[0])
    seen = [x for x, _ in task.batches(50, math.ceil(2 * count / 50), seed=1)]
    first = torch.cat(seen)[:count].flatten(1).sum(1).sort().values
    assert torch.allclose(first, task.train[0].flatten(1).sum(1).sort().values)


@pytest.mark.parametrize("task", ["lm", "cnn", "autoencoder", "published-cnn"])
def test_a_training_depends_on_its_settings_only(task: str) -> None:
    run = Run(task, "lamb16", 0.01, 3, **SMALL | {"steps": 3, "batch_size": 2})
    first, second = execute(run, None), execute(run, None)
    assert first["curve"] == second["curve"]
    assert first["validation_loss"] == second["validation_loss"]
    other = execute(Run(task, "lamb16", 0.01, 4, **SMALL | {"steps": 3, "batch_size": 2}), None)
    assert other["curve"] != first["curve"]


@pytest.mark.parametrize("name", ["lamb16", "lamb", "adamw", "published", "variant"])
def test_the_loss_falls(name: str) -> None:
    result = execute(Run("autoencoder", name, 0.01, 1, **SMALL | {"steps": 30}), None)
    assert result["train_loss"] < 0.8 * result["curve"][0]
    assert len(result["curve"]) <= 40
    assert 0 < result["validation_loss"] < 1


def test_a_diverged_training_ends_early_with_an_infinite_loss() -> None:
    result = execute(Run("autoencoder", "adamw", 1e4, 1, **SMALL | {"steps": 30}), None)
    assert math.isinf(result["validation_loss"])
    assert len(result["curve"]) < 30
    assert result["train_loss"] >= max(result["curve"]), "the mean of the last losses, of which there are few"


def test_settings_reach_the_optimizer() -> None:
    model = nn.Linear(3, 2)
    run = Run(
        "cnn", "lamb16", 0.02, 5, **SMALL, beta1=0.8, beta2=0.99, weight_decay=0.3, moment_dtype="float32",
        trust_scale=0.7, bias_correction=False, nesterov=False, caution=True,
    )  # fmt: skip
    for optimizer in (build(run, model), build(Run(**vars(run) | {"optimizer": "variant"}), model)):
        group = optimizer.param_groups[0]
        wanted = {
            "lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.3, "moment_dtype": "float32", "trust_scale": 0.7,
            "bias_correction": False, "nesterov": False, "caution": True,
        }  # fmt: skip
        assert {key: group[key] for key in wanted} == wanted
    assert "nesterov False, caution True, beta1 0.8, beta2 0.99" in describe(run)


@pytest.mark.parametrize("name", ["lamb16", "variant", "adamw", "nadam"])
def test_biases_and_norms_can_have_a_group_of_their_own(name: str) -> None:
    model = nn.Sequential(nn.Conv1d(3, 2, 3), nn.BatchNorm1d(2), nn.Linear(2, 2))
    run = Run("cnn", name, 0.02, 5, **SMALL, weight_decay=0.3)
    (group,) = build(run, model).param_groups
    assert [p.shape for p in group["params"]] == [p.shape for p in model.parameters()]
    matrices, vectors = build(Run(**vars(run) | {"apart": True}), model).param_groups
    assert [p.ndim for p in matrices["params"]] == [3, 2]
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1, 1]
    wanted = {"weight_decay": (0.3, 0.0)} | ({"trust_scale": (0.382, 0.0)} if name in ("lamb16", "variant") else {})
    assert {key: (matrices[key], vectors[key]) for key in wanted} == wanted
    assert [matrices[key] == vectors[key] for key in ("lr", "betas", "eps")] == [True] * 3
    assert "apart True" in describe(Run(**vars(run) | {"apart": True}))


def test_the_rate_rises_and_falls_or_stays() -> None:
    linear, constant = training._schedule(100, "linear"), training._schedule(100, "constant")
    assert [round(linear(step), 3) for step in (0, 4, 9, 10, 55, 100)] == [0.1, 0.5, 1.0, 1.0, 0.505, 0.01]
    assert {constant(step) for step in range(101)} == {1.0}


def test_foreign_optimizers_get_what_makes_them_what_they_are_called() -> None:
    named = [("p", nn.Parameter(torch.ones(3)))]
    nadam = registry.build("nadam", named, lr=0.1, weight_decay=0.01)
    assert nadam.defaults["decoupled_weight_decay"]
    pytest.importorskip("timm")
    assert registry.build("lamb-timm-cautious", named, lr=0.1, weight_decay=0.01).defaults["caution"]
    assert not registry.build("lamb-timm", named, lr=0.1, weight_decay=0.01).defaults["caution"]


def test_kahan_summation_is_on_for_bfloat16() -> None:
    pytest.importorskip("optimi")
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = registry.build("adamw-kahan", [("p", p)], lr=1e-4, weight_decay=0.0)
    for _ in range(60):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p[0] < 1, "steps too small for bfloat16 add up"


@pytest.mark.parametrize("form", [f for f in rounding.MLP_FORMS if f[0] in ("lamb16", "adamw")], ids=rounding.label)
def test_a_form_has_the_weights_and_the_rounding_that_it_says(form: tuple[str, str, str | None]) -> None:
    name, weights, how = form
    run = rounding.Form("mlp", name, 0.01, 1, **SMALL, schedule="constant", weights=weights, rounding=how)
    task = tasks.load_task("mlp", "digits", None)
    model = run.model(task)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, weights)}
    if name == "lamb16" and how:
        assert build(run, model).param_groups[0]["param_rounding"] == how
    assert execute(run, None)["validation_loss"] < 0.8 * training.validation_loss(run, model, task)


def _probed(moment_dtype: str) -> tuple[dict[str, Any], Lamb16]:
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(64, 32, generator=generator))
    optimizer = Lamb16([("p", p)], lr=0.01, compile=False, moment_dtype=moment_dtype, bias_correction=False)
    shadow = Shadow(optimizer)
    for _ in range(10):
        p.grad = torch.randn(p.shape, generator=generator)
        shadow.before_step(probe=True)
        optimizer.step()
    return shadow.summary(), optimizer


def test_probes_see_no_difference_with_fp32_moments() -> None:
    summary, _ = _probed("float32")
    layer = summary["layers"]["p"]
    assert layer["cosine"] == pytest.approx(1, abs=1e-6)
    assert max(layer[key] for key in ("m_error", "v_log_error", "m_zero", "v_zero", "m_saturated")) < 1e-6
    assert {len(layer["cosines"]) for layer in summary["layers"].values()} == {9}, (
        "before the first step there is nothing to compare"
    )


def test_probes_see_the_rounding_of_8_bits() -> None:
    layer = _probed("float8")[0]["layers"]["p"]
    assert 0.99 < min(layer["cosines"]) <= layer["cosine"] < 1
    assert 0.01 < layer["m_error"] < 0.1
    assert 0.01 < layer["v_log_error"] < 0.2
    assert layer["v_zero"] == 0


def test_probes_see_what_the_bound_is_for() -> None:
    """Without it an element whose v became 0 makes the update; with it its share is limited. By hand."""
    a, b, c2 = 0.9 / (1 - 0.9**3), 0.1 / (1 - 0.9**2), 1 - 0.999**2
    # The weights with which n sees past gradients, and v / c2 their squares; the largest n for v / c2 = 1.
    seen = [0.1 * a * 0.9**k + b * (k == 0) for k in range(500)]
    bound = math.sqrt(sum(w * w / (0.001 * 0.999**k / c2) for k, w in enumerate(seen)))
    for bounded in (False, True):
        p = nn.Parameter(torch.ones(2))
        optimizer = Lamb16([("p", p)], lr=0.01, compile=False)
        p.grad = torch.tensor([1.0, 1.0])
        shadow = Shadow(optimizer, bounded)
        shadow.before_step(probe=False)
        optimizer.step()
        optimizer.state[p]["exp_avg_sq_codes"].view(torch.uint8)[0] = 0
        p.grad = torch.tensor([0.0, 1.0])
        m, v = (
            optimizer.state[p][f"{key}_codes"].float() * optimizer.state[p][f"{key}_scale"]
            for key in ("exp_avg", "exp_avg_sq")
        )
        m, v = 0.9 * m + torch.tensor([0.0, 0.1]), 0.999 * v + torch.tensor([0.0, 1e-3])
        u, exact = (
            (a * m + b * p.grad) / ((v / c2).sqrt() + 1e-6)
            for m, v in ((m, v), (torch.tensor([0.09, 0.19]), torch.tensor([0.999e-3, 1.999e-3])))
        )
        if bounded:
            u[0] = bound
        shadow.before_step(probe=True)
        wanted = torch.cosine_similarity(u, exact, dim=0).item()
        assert shadow.summary()["layers"]["p"]["cosine"] == pytest.approx(wanted, rel=1e-4)


def test_probes_see_saturated_and_vanished_moments() -> None:
    """States made by hand: half of m at the largest code, a quarter of v gone."""
    p = nn.Parameter(torch.ones(4))
    optimizer = Lamb16([("p", p)], lr=0.01, compile=False)
    p.grad = torch.ones(4)
    shadow = Shadow(optimizer)
    shadow.before_step(probe=False)
    optimizer.step()
    state = optimizer.state[p]
    state["exp_avg_codes"].view(torch.uint8).copy_(torch.tensor([126, 126 | 128, 0, 8], dtype=torch.uint8))
    state["exp_avg_sq_codes"].view(torch.uint8).copy_(torch.tensor([0, 1, 60, 60], dtype=torch.uint8))
    shadow.before_step(probe=True)
    layer = shadow.summary()["layers"]["p"]
    assert (layer["m_saturated"], layer["m_zero"]) == (0.5, 0.25)
    assert (layer["v_zero"], layer["v_smallest"]) == (0.25, 0.25)


def test_optimizers_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("No module named 'torchao'")

    entry = registry.OptimizerInfo("Other", missing, 0.1, "torchao")
    monkeypatch.setitem(registry.REGISTRY, "adamw8bit", entry)
    registry.why_unusable.cache_clear()
    try:
        reason = registry.why_unusable("adamw8bit")
    finally:
        registry.why_unusable.cache_clear()
    assert reason is not None
    assert "lamb16[peers]" in reason
    assert registry.why_unusable("lamb16") is None
