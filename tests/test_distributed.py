"""Sharded parameters give the bits of one process: real ranks over gloo, 20 steps."""

from __future__ import annotations

import math

import pytest
import torch

import parallel
import refused
import sharded
from bits import assert_same_bits, raw
from helpers import assert_same, differing
from lamb16 import Lamb16
from lamb16.sharding.reduction import CLIP_BYTES, REDUCED_BYTES
from ranks import Ranks

STEPS = 20


@pytest.fixture(scope="module")
def one_process() -> sharded.Found:
    return sharded.step_whole(compile=False, steps=STEPS)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("placement", sharded.PLACEMENTS)
def test_a_mesh_gives_the_bits_of_one_process(
    ranks: Ranks, one_process: sharded.Found, placement: str, compile: bool
) -> None:
    sizes, dims = sharded.PLACEMENTS[placement]
    world = int(torch.tensor(sizes).prod())
    for tensors, had in ranks.run(world, sharded.step_sharded, placement, compile, STEPS):
        assert_same(tensors, one_process)
        assert had["bytes"] == 2 * had["elements"]
        split = sum(dim is not None and size > 1 for size, dim in zip(sizes, dims, strict=True))
        # A maximum and a sum; one sum more where gradients are clipped, and one maximum more where not all tensors are
        # split over the same axes. The first step adds up the weights.
        clipped = 3 + (split > 1)
        assert had["collectives"][2:] == [split * (clipped if sharded.clip_at(t) else 2) for t in range(2, STEPS)]
        tensors_sent = (len(sharded.SHAPES) + 1) * split
        for t, sent in enumerate(had["sent"][2:], 2):
            assert sent <= (REDUCED_BYTES + bool(sharded.clip_at(t)) * CLIP_BYTES) * tensors_sent
        assert had["skipped"] == 1


HALVES = [(placement, False) for placement in sharded.PLACEMENTS] + [("rows over 3", True), ("rows and columns", True)]


@pytest.mark.parametrize("rounding", ["exact", "stochastic", "nearest"])
@pytest.mark.parametrize(("placement", "compile"), HALVES)
def test_weights_with_16_bits_on_a_mesh(ranks: Ranks, placement: str, compile: bool, rounding: str) -> None:
    """Also those that are kept exactly: remainders, checksums, and what is forgotten after a change from outside."""
    expected = sharded.step_halves(None, rounding, compile, 6)
    world = math.prod(sharded.PLACEMENTS[placement][0])
    for tensors in ranks.run(world, sharded.step_halves, placement, rounding, compile, 6):
        assert_same(tensors, expected)


def test_plain_exact_weights_are_nothing_to_other_ranks(ranks: Ranks) -> None:
    exact, stochastic = (ranks.run(2, sharded.step_with_a_plain_one, x) for x in ("exact", "stochastic"))
    assert all(torch.equal(x, exact[0]) for x in (*exact, *stochastic))


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("gradients", ["backward", "accumulate"])
@pytest.mark.parametrize("how", parallel.EXACT)
def test_training_on_ranks_gives_the_bits_of_one_process(ranks: Ranks, how: str, gradients: str, compile: bool) -> None:
    (expected,) = ranks.run(1, parallel.train, "one process", gradients, False, STEPS)
    world = math.prod(parallel.MESHES[how])
    for tensors in ranks.run(world, parallel.train, how, gradients, compile, STEPS):
        assert_same(tensors, expected)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["FSDP2 on 3", "TP", "TP and FSDP2"])
def test_equal_gradients_give_equal_bits(ranks: Ranks, how: str, compile: bool) -> None:
    """Where the ranks' gradients do not sum to the same bits."""
    (expected,) = ranks.run(1, parallel.train, "one process", "given", False, STEPS)
    for tensors in ranks.run(math.prod(parallel.MESHES[how]), parallel.train, how, "given", compile, STEPS):
        assert_same(tensors, expected)


@pytest.mark.parametrize("how", parallel.EXACT)
def test_parameters_without_names_round_alike_on_all_ranks(ranks: Ranks, how: str) -> None:
    """Replicas do not drift apart, whatever optimizers a rank has made before."""
    (expected,) = ranks.run(1, parallel.train, "one process", "backward", False, STEPS, False)
    (named,) = ranks.run(1, parallel.train, "one process", "backward", False, STEPS)
    assert differing(named, expected)
    for tensors in ranks.run(math.prod(parallel.MESHES[how]), parallel.train, how, "backward", False, STEPS, False):
        assert_same(tensors, expected)


@pytest.mark.parametrize("how", ["FSDP2 on 3", "HSDP"])  # torch cannot clip over two meshes
def test_clipped_gradients(ranks: Ranks, how: str) -> None:
    (expected,) = ranks.run(1, parallel.train, "one process", "clip", False, 5)
    for tensors in ranks.run(math.prod(parallel.MESHES[how]), parallel.train, how, "clip", False, 5):
        for key in (key for key in expected if key.endswith("weight")):
            a, b = (found[key].view(torch.float32) for found in (tensors, expected))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("amp_scaling", [False, True])
@pytest.mark.parametrize("how", ["FSDP2 on 2", "HSDP", "DDP"])
def test_a_gradient_scaler_skips_on_all_ranks(ranks: Ranks, how: str, amp_scaling: bool) -> None:
    ((expected, skipped, scale),) = ranks.run(1, parallel.train_scaled, "one process", amp_scaling, 5)
    assert (skipped, scale) == (6 if amp_scaling else 0, 128.0)
    for tensors, found_skipped, found_scale in ranks.run(
        math.prod(parallel.MESHES[how]), parallel.train_scaled, how, amp_scaling, 5
    ):
        assert_same(tensors, expected)
        assert (found_skipped, found_scale) == (skipped, scale)


@pytest.mark.parametrize("resume_at", [None, 4])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_zero_redundancy_optimizer_gives_the_bits_of_one_process(
    ranks: Ranks, compile: bool, resume_at: int | None
) -> None:
    (one,) = ranks.run(1, parallel.train, "one process", "backward", False, 8)
    expected = [tensor for key, tensor in one.items() if key.endswith(".weight")]
    for weights in ranks.run(2, parallel.train_zero, compile, 8, resume_at):
        for w, e in zip(weights, expected, strict=True):
            assert_same_bits(raw(w), e)


@pytest.mark.parametrize("fault", refused.FAULTS)
def test_a_wrong_rule_is_found_out(ranks: Ranks, fault: str) -> None:
    expected = sharded.step_whole(compile=False, steps=3)
    for tensors in ranks.run(2, refused.wrong_rule, fault):
        assert bool(differing(tensors, expected)) == (fault != "no fault")


def test_what_cannot_be_stepped_is_refused_on_every_rank(ranks: Ranks) -> None:
    for text in ranks.run(4, refused.uneven_strided):
        assert text.startswith("ValueError: Lamb16: dimension 0 of parameter 0.weight, (7, 4), is split over mesh axes")
    for text in ranks.run(2, refused.partial_parameter):
        assert text.startswith("ValueError: Lamb16: parameter 0 has partial placements")
    for (alone, beside), text in ranks.run(2, refused.frozen_partial_parameter):
        assert torch.equal(alone, beside)
        assert text.startswith("ValueError: Lamb16: parameter odd has partial placements")


def test_states_that_other_ranks_lack_are_refused_on_all(ranks: Ranks) -> None:
    for text, differ in ranks.run(2, refused.other_states_are_missing):
        assert text.startswith("RuntimeError: Lamb16: the ranks that share parameters do not step the same ones")
        assert differ == []


def test_a_plan_that_could_not_be_made_is_made_at_the_next_step(ranks: Ranks) -> None:
    """Not remembered without what the ranks tell each other."""
    assert ranks.run(2, refused.an_error_while_a_plan_is_made) == [[], []]


def test_plain_parameters_of_one_rank_enter_its_norm_alone(ranks: Ranks) -> None:
    """Their gradients' size does not change the units in which squares of shared ones are added up."""
    for norm, expected in ranks.run(2, refused.own_plain_parameters):
        assert norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_shards_are_refused(ranks: Ranks, use_orig_params: bool) -> None:
    """Their trust ratios would be those of shards, or of several layers together."""
    for text in ranks.run(2, refused.flat_parameters, use_orig_params):
        assert text.startswith("TypeError: Lamb16: parameter _fsdp_wrapped_module.")
        assert "use torch.distributed.fsdp.fully_shard" in text


def test_partitioned_parameters_are_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(0))
    p.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"parameter 0 is partitioned by DeepSpeed's ZeRO-3"):
        Lamb16([p])


@pytest.mark.parametrize("sharded_parameter", [False, True])
def test_parameter_and_gradient_are_of_one_kind(ranks: Ranks, sharded_parameter: bool) -> None:
    for text in ranks.run(2, refused.mixed_gradient, sharded_parameter):
        assert text.startswith("RuntimeError: Lamb16: parameter 0 is a")
        assert "make both of one kind" in text


def test_partial_gradients_are_summed(ranks: Ranks) -> None:
    for partial, whole in ranks.run(2, refused.partial_gradient):
        assert torch.equal(partial, whole)


@pytest.mark.parametrize("placement", ["rows over 2", "replicated over 2", "HSDP"])
def test_a_fault_in_one_ranks_state_is_refused_by_all(ranks: Ranks, placement: str) -> None:
    found = ranks.run(math.prod(sharded.PLACEMENTS[placement][0]), refused.one_rank_has_a_damaged_state, placement)
    assert "exp_avg_codes of parameter 2 holds NaN codes" in found.pop(1)
    assert all("another rank found its part at fault" in text for text in found)


@pytest.mark.parametrize("placement", ["rows over 2", "rows and columns"])
@pytest.mark.parametrize("stepped_before", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("what", refused.DIFFERENT)
def test_a_step_that_ranks_differ_in_is_refused_on_all(
    ranks: Ranks, what: str, stepped_before: bool, placement: str
) -> None:
    """Whatever was stepped before; nothing is changed, and the next steps go as if it had not been."""
    world = math.prod(sharded.PLACEMENTS[placement][0])
    for rank, (text, differ) in enumerate(ranks.run(world, refused.different_steps, what, placement, stepped_before)):
        assert differ == []
        if what.startswith("a wrong"):
            own = "ValueError: Lamb16: "
            assert text.startswith(own if rank % 2 else "RuntimeError: Lamb16: another rank could not take this step")
        else:
            assert text.startswith("RuntimeError: Lamb16: the ranks that share parameters do not step the same ones")


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("what", refused.DIFFERENT)
def test_such_a_step_is_refused_later_where_it_takes_waiting_to_know(
    ranks: Ranks, what: str, max_grad_norm: float | None
) -> None:
    """It changes nothing; all ranks raise at the next step, and at ``state_dict()`` before."""
    found = ranks.run(2, refused.different_steps, what, "rows over 2", True, True, max_grad_norm)
    for rank, (text, differ) in enumerate(found):
        assert differ == []
        own = "ValueError: Lamb16: " if what.startswith("a wrong") and rank else "RuntimeError: Lamb16: "
        assert text.startswith(own)
        assert what.startswith("a wrong") == ("the ranks that share parameters do not step the same ones" not in text)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_step_waits_for_no_device(ranks: Ranks, at_once: bool) -> None:
    for read, differ in ranks.run(2, refused.waits_for_nothing, at_once):
        assert (read == []) != at_once
        assert differ == []


def test_a_step_makes_no_views_of_shards(ranks: Ranks) -> None:
    for first, *_, last in ranks.run(2, refused.views_of_shards):
        assert (first > 0, last) == (True, 0)


def test_whole_states_load_into_shards(ranks: Ranks) -> None:
    for before, after in ranks.run(2, refused.whole_state_into_shards):
        assert_same(after, before)
