"""`lamb16 compare fidelity`: how close 8-bit moments keep the update to the one of FP32 moments.

Synthetic gradients whose per-element scale is log-normal (σ = 1.5) drive three optimizers side by side. With weight
decay 0, lr 1 and the weights set to 0 before each step, the step leaves p = -r·u, so the update u can be read through
the public interface alone, and its cosine to the FP32 form's does not depend on r.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lamb16 import Lamb16, PublishedLamb16
from lamb16.lab.errors import CommandError
from lamb16.lab.study import report, runs

EPS = 1e-16  # tiny, so that a second moment that is wrong shows
SAMPLED = 0.1  # cosine and largest update are taken in the last tenth of the steps
FULL, QUICK = (100_000, 1000), (10_000, 200)  # elements, steps

Source = Callable[[int, int, Tensor, torch.Generator], Tensor]


def iid(t: int, steps: int, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Independent normal gradients."""
    return torch.randn(scale.shape, generator=generator) * scale


def sparse(t: int, steps: int, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Normal gradients of which 5 % are not 0."""
    return iid(t, steps, scale, generator) * (torch.rand(scale.shape, generator=generator) < 0.05)


def drifting(t: int, steps: int, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Noise around a mean that turns slowly, for every element at its own phase: four turns in the run."""
    phase = torch.arange(scale.numel()) * 0.618
    mean = torch.sin(phase + 8 * math.pi * t / steps)
    return iid(t, steps, scale, generator) + mean * scale


def decaying(t: int, steps: int, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Normal gradients that shrink exponentially, to a thousandth at the end."""
    return iid(t, steps, scale, generator) * math.pow(1e-3, t / steps)


GRADIENTS: dict[str, Source] = {"iid": iid, "sparse": sparse, "drifting": drifting, "decaying": decaying}
RULES = ("lamb16", "float32", "published")


class Layer:
    """One optimizer on one layer of weights that are always 0."""

    def __init__(self, rule: str, elements: int, betas: tuple[float, float], seed: int, compile: bool) -> None:
        self.p = nn.Parameter(torch.zeros(elements))
        named = [("layer", self.p)]
        self.optimizer: Optimizer
        self.codes, self.scale = ("", "_norm") if rule == "published" else ("_codes", "_scale")  # ends of their names
        if rule == "published":
            self.optimizer = PublishedLamb16(named, lr=1.0, betas=betas, eps=EPS)
        else:
            kind = "float8" if rule == "lamb16" else "float32"
            self.optimizer = Lamb16(
                named, lr=1.0, betas=betas, eps=EPS, moment_dtype=kind, compile=compile, seed=seed
            )  # fmt: skip

    def update(self, grad: Tensor) -> Tensor:
        """Take a step and return u."""
        self.p.data.zero_()
        self.p.grad = grad
        self.optimizer.step()
        ratio: Tensor = self.optimizer.layer_stats()["layer"]["trust_ratio"]  # type: ignore[attr-defined]
        return -self.p.detach() / ratio.float()

    def moments(self) -> tuple[Tensor, Tensor]:
        """The stored moments in float32."""
        state = self.optimizer.state[self.p]
        m, v = (
            state[f"{name}{self.codes}"].float() * state[f"{name}{self.scale}"] for name in ("exp_avg", "exp_avg_sq")
        )
        return m, v

    def saturated(self) -> float:
        """The share of stored first moments at the largest magnitude that the rule stores."""
        stored: Tensor = self.optimizer.state[self.p][f"exp_avg{self.codes}"]
        if stored.dtype == torch.float32:  # no limit to reach
            return 0.0
        largest = 15.0 if isinstance(self.optimizer, PublishedLamb16) else 448.0
        return (stored.float().abs() >= largest).float().mean().item()


def measure(
    source: Source,
    elements: int,
    steps: int,
    betas: tuple[float, float],
    seed: int,
    compile: bool,
    gradient_scale: float = 1e-3,
) -> dict[str, dict[str, float]]:
    """Run all rules on the same gradients; per rule the figures of the table."""
    generator = torch.Generator().manual_seed(seed)
    scale = gradient_scale * (1.5 * torch.randn(elements, generator=generator)).exp()
    layers = {rule: Layer(rule, elements, betas, seed, compile) for rule in RULES}
    cosines: dict[str, list[float]] = {rule: [] for rule in RULES}
    largest = dict.fromkeys(RULES, 0.0)
    for t in range(steps):
        grad = source(t, steps, scale, generator)
        updates = {rule: layer.update(grad.clone()) for rule, layer in layers.items()}
        if t >= steps * (1 - SAMPLED):
            for rule, u in updates.items():
                cosines[rule].append(torch.cosine_similarity(u.double(), updates["float32"].double(), dim=0).item())
                largest[rule] = max(largest[rule], u.abs().max().item())
    exact = layers["float32"].moments()
    return {
        rule: {"cosine": statistics.median(cosines[rule]), "largest_update": largest[rule]} | _stored(layer, exact)
        for rule, layer in layers.items()
    }


def _stored(layer: Layer, exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How far the stored moments are from the exact ones at the end."""
    (m, v), (exact_m, exact_v) = layer.moments(), exact
    both = (v > 0) & (exact_v > 0)
    return {
        "m_error": ((m - exact_m).norm() / exact_m.norm()).item(),
        "v_log_error": (v[both] / exact_v[both]).log().abs().mean().item(),
        "m_saturated": layer.saturated(),
        "v_zero": ((v == 0) & (exact_v > 0)).float().mean().item(),
    }


def add_parser(subparsers: Any) -> None:
    """Add `compare fidelity` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "fidelity",
        help="updates from 8-bit moments against those from FP32 moments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--elements", type=int, metavar="N", help=f"elements of the layer (default: {FULL[0]})")
    parser.add_argument("--steps", type=int, metavar="N", help=f"(default: {FULL[1]})")
    parser.add_argument("--beta2", type=float, nargs="+", default=[0.999], metavar="B", help="(default: 0.999)")
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=list(GRADIENTS), help="(default: all)")
    parser.add_argument(
        "--gradient-scale",
        type=float,
        default=1e-3,
        metavar="S",
        help="median magnitude of the gradients (default: 0.001); only the published rule's clamps depend on it",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile the step")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK[0]} elements, {QUICK[1]} steps")
    parser.add_argument("--json", metavar="FILE", help="write settings and results")


def run(args: argparse.Namespace) -> int:
    """Measure and print the table."""
    elements, steps = _size(args)
    if elements < 1 or steps < 10:
        raise CommandError(f"--elements must be at least 1 and --steps at least 10, not {elements} and {steps}")
    if not all(0 < beta2 < 1 for beta2 in args.beta2):
        raise CommandError(f"--beta2 must lie between 0 and 1, not {args.beta2}")
    if not 1e-12 <= args.gradient_scale <= 1e12:
        raise CommandError(f"--gradient-scale must lie between 1e-12 and 1e12, not {args.gradient_scale}")
    if args.json and not Path(args.json).absolute().parent.is_dir():  # now, not after minutes of measuring
        raise CommandError(f"--json: there is no folder {Path(args.json).parent} to write to")
    results = []
    for beta2 in args.beta2:
        for kind in args.gradients:
            print(f"beta2 {beta2:g}, {kind} gradients ...", file=sys.stderr)
            figures = measure(
                GRADIENTS[kind], elements, steps, (0.9, beta2), args.seed, not args.eager, args.gradient_scale
            )
            results += [{"gradients": kind, "beta2": beta2, "rule": rule} | row for rule, row in figures.items()]
    print(table(results))
    if args.json:
        settings = {"elements": elements, "steps": steps, "seed": args.seed, "eps": EPS}
        settings |= {"gradient_scale": args.gradient_scale, "code": runs.code_of("lamb16")}
        Path(args.json).write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")
    return 0


def _size(args: argparse.Namespace) -> tuple[int, int]:
    elements, steps = QUICK if args.quick else FULL
    return elements if args.elements is None else args.elements, steps if args.steps is None else args.steps


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table; three decimals, since one zero of v in 100,000 can ruin an update."""
    header = [
        "gradients",
        "β2",
        "rule",
        "cosine of u",
        "largest u",
        "error of m",
        "log-error of v",
        "m saturated",
        "v zero",
    ]
    forms = {
        "gradients": "", "beta2": "g", "rule": "", "cosine": ".4f", "largest_update": ".3g", "m_error": ".3f",
        "v_log_error": ".3f", "m_saturated": ".3%", "v_zero": ".3%",
    }  # fmt: skip
    return report.table(header, [[format(row[key], form) for key, form in forms.items()] for row in results])
