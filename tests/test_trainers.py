"""What trainers and wrappers of other libraries do to an optimizer."""

import copy
import math
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import all_params, assert_same, differing, parameters, snapshot, take_steps
from lamb16 import Lamb16, checkpoint, register_timm

BASE = {"lr": 0.01, "weight_decay": 0.1}


def with_foreign_entries() -> Lamb16:
    """After two steps, with entries in every state that Lamb16 knows nothing of."""
    optimizer = Lamb16(parameters(), **BASE, compile=False)
    take_steps(optimizer, range(2))
    for p in all_params(optimizer):
        optimizer.state[p] |= {
            "slow": p.detach().double(),
            "seen": torch.arange(3, device=p.device),
            "note": ["others'"],
        }
    return optimizer


def through_state_dict(old: Lamb16) -> Lamb16:
    new = Lamb16(parameters(), lr=0.5, compile=False)
    with torch.no_grad():
        for p, q in zip(all_params(new), all_params(old), strict=True):
            p.copy_(q)
    new.load_state_dict(old.state_dict())
    return new


@pytest.mark.parametrize("way", [through_state_dict, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_entries_that_others_add_are_carried_along(way: Any) -> None:
    old = with_foreign_entries()
    new = way(old)
    for p, q in zip(all_params(old), all_params(new), strict=True):
        mine, theirs = old.state[p], new.state[q]
        assert set(mine) == set(theirs)
        for key in ("slow", "seen"):
            assert torch.equal(mine[key], theirs[key])
            assert mine[key].dtype == theirs[key].dtype
            assert mine[key] is not theirs[key]
        assert theirs["note"] == ["others'"]
        assert theirs["note"] is not mine["note"]
    for optimizer in (old, new):
        for p in all_params(optimizer):
            del optimizer.state[p]["note"]
        take_steps(optimizer, range(2, 4))
    assert_same(snapshot(old), snapshot(new))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Lamb16])
def test_groups_of_a_state_dict_may_be_tuples(kind: Any) -> None:
    optimizer = kind(parameters())
    saved = optimizer.state_dict()
    saved["param_groups"] = tuple(group | {"params": tuple(group["params"])} for group in saved["param_groups"])
    optimizer.load_state_dict(saved)
    assert len(optimizer.param_groups) == 1


def test_a_shallow_copy_shares_the_state() -> None:
    """As AdamW's does: whichever of the two steps, both go on from there."""
    optimizer, alone = (Lamb16(parameters(), **BASE, compile=False) for _ in range(2))
    take_steps(optimizer, [0])
    copied = copy.copy(optimizer)
    assert copied.state is optimizer.state
    assert copied.param_groups is optimizer.param_groups
    for t in range(1, 4):
        take_steps(copied if t % 2 else optimizer, [t])
    take_steps(alone, range(4))
    assert_same(snapshot(optimizer), snapshot(alone))
    assert_same(snapshot(copied), snapshot(alone))


@pytest.mark.parametrize(("saved", "made"), [("float32", "float8"), ("float8", "float32")])
def test_a_state_with_another_moment_dtype_is_loaded_with_a_warning(saved: str, made: str) -> None:
    old, new = (Lamb16(parameters(), moment_dtype=kind, compile=False) for kind in (saved, made))
    take_steps(old, range(2))
    state = old.state_dict()
    before = snapshot(new)
    # Warnings are errors here, and leave everything as it was.
    with pytest.raises(UserWarning, match=f"group 0 has moment_dtype='{saved}' in the state, and '{made}'"):
        new.load_state_dict(state)
    assert_same(before, snapshot(new))
    with pytest.warns(UserWarning, match="moment_dtype"):
        new.load_state_dict(state)
    assert new.param_groups[0]["moment_dtype"] == saved
    Lamb16(parameters(), moment_dtype=saved, compile=False).load_state_dict(state)  # without a warning, an error here


# -- timm --------------------------------------------------------------------------------------------------------


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["lamb16", "lookahead_lamb16"])
def test_timm_makes_and_resumes_it(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed (extra: peers)")
    register_timm()
    register_timm()

    def make() -> tuple[torch.nn.Module, Any]:
        model = network()
        return model, timm.optim.create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.1, compile=False)

    def train(model: torch.nn.Module, optimizer: Any, first: int, last: int) -> None:
        for t in range(first, last):
            optimizer.zero_grad()
            model(torch.full((4, 48), 0.1 * t)).square().mean().backward()
            optimizer.step()

    model, optimizer = make()
    base = getattr(optimizer, "_base_optimizer", optimizer)
    assert type(base) is Lamb16
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1], "biases do not decay"
    train(model, optimizer, 0, 8)
    assert ("lookahead_slow_buff" in base.state[model[0].weight]) == (name != "lamb16"), "which k = 6 steps make"
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 8, 14)

    other_model, other = make()
    other_model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    other_base = getattr(other, "_base_optimizer", other)
    assert differing(snapshot(base), snapshot(other_base))
    train(other_model, other, 8, 14)
    assert_same(snapshot(base), snapshot(other_base))


def test_without_timm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim._optim_factory", None)
    with pytest.raises(ImportError, match="install timm"):
        register_timm()


# -- gradient scalers of trainers ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_lightning_clips_in_mixed_precision(precision: str, amp_scaling: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed (extra: recipes)")
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.network(batch[0]).square().mean()

        def configure_optimizers(self) -> Lamb16:
            return Lamb16(self.named_parameters(), **BASE, amp_scaling=amp_scaling, compile=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if precision == "16-mixed" else None
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", gradient_clip_val=0.1, plugins=[MixedPrecision(precision, "cpu", scaler)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 48)), 4)
    with pytest.raises(RuntimeError, match="gradient clipping") if amp_scaling else nullcontext():
        trainer.fit(module, data)
    steps = [int(state["step"]) for state in trainer.optimizers[0].state.values()]
    assert steps == ([] if amp_scaling else [2] * len(list(module.parameters())))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("amp_scaling", [False, True])
def test_accelerate_sees_a_skipped_step(amp_scaling: bool) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed (extra: recipes)")
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    model, scaler = network(), torch.amp.GradScaler("cpu")
    own = Lamb16(model.named_parameters(), **BASE, amp_scaling=amp_scaling, compile=False)
    optimizer = AcceleratedOptimizer(own, device_placement=False, scaler=scaler)
    seen = []
    for factor in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 48)).square().mean() * factor).backward()
        optimizer.step()
        seen.append(optimizer.step_was_skipped)
    assert seen == [False, not amp_scaling, False], "which is why it is off by default"
    assert all(state["step"] == 2 for state in own.state.values())


def test_a_checkpoint_with_foreign_entries_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, Lamb16]:
        model = network()
        optimizer = Lamb16(model.named_parameters(), **BASE, compile=False)
        take_steps(optimizer, [0])
        return model, optimizer

    model, optimizer = make()
    for p in model.parameters():
        optimizer.state[p]["slow"] = p.detach().clone()
    checkpoint.save(tmp_path / "saved", model, optimizer)
    model, optimizer = make()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="slow"):
        checkpoint.load(tmp_path / "saved", model, optimizer)
    assert_same(before, snapshot(optimizer))
