"""A step captured as a CUDA graph gives the same bits at every replay; needs a GPU."""

import pytest
import torch

from helpers import DEVICE, all_params, assert_same, gradients, parameters, snapshot
from lamb16 import Lamb16

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs LAMB16_TEST_DEVICE=cuda and a GPU")

SHAPES = ((7, 3), (2100,), (64, 1024), (), (300, 301))


def make(dtype: torch.dtype, compile_mode: bool) -> Lamb16:
    lr = torch.tensor(0.01, device=DEVICE)
    optimizer = Lamb16(parameters(SHAPES, dtype), lr=lr, weight_decay=0.1, compile=compile_mode)
    for p in all_params(optimizer):
        p.grad = torch.zeros_like(p)
    return optimizer


def feed(optimizer: Lamb16, t: int) -> None:
    """New gradients and a new learning rate, in place."""
    params = all_params(optimizer)
    for p, g in zip(params, gradients(params, t), strict=True):
        p.grad.copy_(g)
    optimizer.param_groups[0]["lr"].fill_(0.01 / (1 + t))


@pytest.mark.parametrize("compile_mode", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_are_steps(dtype: torch.dtype, compile_mode: bool) -> None:
    plain, captured = make(dtype, compile_mode), make(dtype, compile_mode)
    stream = torch.cuda.Stream()
    for t in range(3):
        for optimizer in (plain, captured):
            feed(optimizer, t)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for t in range(3, 8):
        feed(plain, t)
        feed(captured, t)
        plain.step()
        graph.replay()
        assert_same(snapshot(plain), snapshot(captured))
