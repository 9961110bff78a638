"""Measuring optimizer steps: their time side by side, their peak memory, and how long the first one takes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lamb16 import Lamb16
from lamb16.lab.errors import CommandError
from lamb16.lab.shapes import Shape, transformer
from lamb16.lab.training import state_bytes
from lamb16.step.compiled import Compiled
from lamb16.step.kinds import Graph, Kind

BYTES = 20  # what a step moves for a float32 parameter: 4 to inspect the gradients, 10 + 6 to update

Factory = Callable[[list[nn.Parameter]], Optimizer]
Row = dict[str, Any]


def make_params(shapes: list[Shape], dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    """Normal random parameters with gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        p = nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(device, dtype))
        p.grad = (torch.randn(shape, generator=generator) * 0.01).to(device, dtype)
        params.append(p)
    return params


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, on the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def copy_of(numel: int, device: torch.device) -> Callable[[], Tensor]:
    """A copy that reads and writes BYTES / 2 per parameter, split so that its two buffers stay small."""
    chunk = min(numel * BYTES // 2, 256 << 20)
    source = torch.ones(chunk, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run() -> Tensor:
        left = numel * BYTES // 2
        while left > 0:
            target[: min(left, chunk)].copy_(source[: min(left, chunk)])
            left -= chunk
        return target

    return run


def side_by_side(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    before: dict[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round; all take turns, after two rounds of warm-up.

    What is to be called ``before`` the call of the same name is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds + 2):
        for name, call in calls.items():
            if before:
                before[name]()
            seconds = timed(call, device)
            if k >= 2:
                times[name].append(seconds)
    return times


def ratio(times: list[float], others: list[float]) -> float:
    """The median of the ratios that two calls have in the same round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def measure(
    shapes: list[Shape],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    factories: dict[str, Factory],
    baseline: str,
    copy: str,
    captured: str,
) -> list[Row]:
    """One row per optimizer: first step, median and range of a step, its ratio to ``baseline``, state, peak memory.

    The ratio is named ``to_adamw``: the baseline is fused AdamW. A row named ``copy`` is the copy of :func:`copy_of`.
    An optimizer that cannot take a step gets a row with the reason as ``error`` and no figures. On CUDA the optimizer
    named ``captured``, if it is one of them, is measured once more as a CUDA graph.
    """
    params = make_params(shapes, dtype, device)
    numel, size = sum(p.numel() for p in params), sum(p.numel() * p.element_size() for p in params)
    calls: dict[str, Callable[[], Any]] = {copy: copy_of(numel, device)}
    rows: dict[str, Row] = {copy: {"name": copy}}
    for name, factory in factories.items():
        print(f"  {name}: first step ...", file=sys.stderr)
        try:
            rows[name], calls[name] = _first_step(name, factory(params), size, device)
        except Exception as error:
            if name == baseline:
                raise
            rows[name] = {"name": name, "error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    if device.type == "cuda" and captured in calls:
        name, replay = as_graph(factories, captured, params)
        rows[name], calls[name] = {"name": name}, replay
    times = side_by_side(calls, device, rounds)
    for name, seconds in times.items():
        rows[name] |= {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
        rows[name]["ns_per_param"] = rows[name]["median_s"] / numel * 1e9
        for key, other in (("to_adamw", baseline), ("to_copy", copy)):
            rows[name][key] = ratio(seconds, times[other])
    return list(rows.values())


def _first_step(
    name: str, optimizer: Optimizer, params_bytes: int, device: torch.device
) -> tuple[Row, Callable[[], Any]]:
    """What the first step says, compilation included: its time, the state it leaves, the memory beyond that."""
    begin = time.perf_counter()
    peak = peak_bytes(optimizer.step, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    row: Row = {"name": name, "first_step_s": time.perf_counter() - begin, "state_bytes": state_bytes(optimizer)}
    row["extra_memory"] = max(0, peak - row["state_bytes"]) / params_bytes
    return row, optimizer.step


def as_graph(
    factories: dict[str, Factory],
    name: str,
    params: list[nn.Parameter],
    capture: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None,
) -> tuple[str, Callable[[], Any]]:
    """The step of the optimizer of this name as a CUDA graph: what it is called in tables, and the replay."""
    return f"{name}, CUDA graph", (capture or _cuda_graph)(factories[name](params).step)


def _cuda_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that a call holds beyond what was there before it."""
    return traced_bytes(call, device)[1]


def traced_bytes(call: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """The bytes of tensors that a call leaves, and the most that it holds, beyond what was there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return held, peak


class Stopwatch:
    """Runs compiled graphs as an optimizer does on its own, and adds up the seconds of each."""

    def __init__(self, device: torch.device) -> None:
        self.inner, self.device = Compiled(), device
        self.spent: dict[str, float] = {}

    def prepare(self, graph: Graph, kind: Kind) -> None:
        """Compile."""
        self.inner.prepare(graph, kind)

    def run(self, graph: Graph, kind: Kind, *arguments: Any) -> None:
        """Call the compiled code."""
        self._add(graph.name, lambda: self.inner.run(graph, kind, *arguments))

    def copy(self, *arguments: Any) -> None:
        """Copy what is packed."""
        self._add("copy", lambda: self.inner.copy(*arguments))

    def _add(self, name: str, call: Callable[[], None]) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + timed(call, self.device)


def pass_times(shapes: list[Shape], dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of the parts of Lamb16's compiled step: the calls of each graph together, and the rest.

    The rest is Python.
    """
    watch = Stopwatch(device)
    optimizer = Lamb16(make_params(shapes, dtype, device), lr=1e-4, weight_decay=0.01, compile=watch)
    found: list[dict[str, float]] = []
    for _ in range(rounds + 3):
        watch.spent = {}
        whole = timed(optimizer.step, device)
        found.append(watch.spent | {"rest": whole - sum(watch.spent.values())})
    return {name: statistics.median(round[name] for round in found[-rounds:]) for name in found[-1]}


def compile_times(layers: list[int], width: int, dtype: str, threads: int) -> list[Row]:
    """Seconds of a transformer's first step in fresh processes: with an empty compile cache, then with a full one."""
    rows = []
    for count in layers:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (_first_step_elsewhere(count, width, dtype, threads, cache) for _ in range(2))
        rows.append(cold | {"cold_s": cold.pop("seconds"), "warm_s": warm["seconds"]})
    return rows


def _first_step_elsewhere(layers: int, width: int, dtype: str, threads: int, cache: str) -> Row:
    code = f"from lamb16.lab import timing; timing.print_first_step({layers}, {width}, {dtype!r}, {threads})"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandError(f"the first step in a process of its own failed: {done.stderr.strip().splitlines()[-1]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def print_first_step(layers: int, width: int, dtype: str, threads: int) -> None:
    """What the process of its own does: one step, its seconds as JSON on standard output."""
    torch.set_num_threads(threads)
    shapes = transformer(layers, width, [(30522, width), (512, width), (2, width), (width,), (width,)])
    params = make_params(shapes, getattr(torch, dtype), torch.device("cpu"))
    optimizer = Lamb16(params, lr=1e-4, weight_decay=0.01)
    seconds = timed(optimizer.step, torch.device("cpu"))
    print(json.dumps({"tensors": len(params), "parameters": sum(p.numel() for p in params), "seconds": seconds}))
