"""Tables in Markdown and plots in SVG, shared by the studies and the benchmarks."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lamb16.lab.errors import require
from lamb16.lab.registry import REGISTRY
from lamb16.lab.study.sizes import HALF_DECADE

# One colour per optimizer, the same in every plot.
COLOURS = {
    "lamb16": "#d62728",
    "lamb": "#1f77b4",
    "adam": "#2ca02c",
    "adamw": "#2ca02c",
    "nadam": "#17becf",
    "lamb-timm": "#7f7f7f",
    "lamb-timm-cautious": "#bcbd22",
    "published": "#9467bd",
    "adamw8bit": "#ff7f0e",
    "adamw4bit": "#8c564b",
    "adamw8bit-bnb": "#e377c2",
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value: float | None, form: str = ".4g") -> str:
    """A number as text; a diverged one as "diverged"."""
    return "diverged" if value is None or not math.isfinite(value) else format(value, form)


def not_run(unusable: Mapping[str, str]) -> dict[str, str]:
    """A table of the optimizers that do not work here, by its title; nothing where all do."""
    rows = [[REGISTRY[name].label, reason] for name, reason in unusable.items()]
    return {"not run": table(["optimizer", "why it could not be run"], rows)} if rows else {}


def loss_of(value: float | None) -> float:
    """A loss as results hold it; that of a diverged run, None, is infinite."""
    return math.inf if value is None else value


def median(values: Iterable[float | None]) -> float:
    """The median; a diverged run counts as infinite."""
    return statistics.median(map(loss_of, values))


def at_an_end(value: float, values: Sequence[float]) -> str:
    """An arrow where a best value is the lowest or the highest that was tried, so that a better one may lie beyond."""
    return {min(values): " ↓", max(values): " ↑"}.get(value, "")


def beyond(value: float, values: Sequence[float], most: int) -> float | None:
    """The rate half a decade beyond the end that a best one is at; None where it lies between two others.

    Also where there are ``most`` rates already, or only one, which has no ends.
    """
    factor = {min(values): 1 / HALF_DECADE, max(values): HALF_DECADE}.get(value)
    return value * factor if factor and 1 < len(values) < most else None


def median_and_range(values: Sequence[float | None], form: str = ".4g") -> str:
    """Median and range of a few seeds, the value alone of one."""
    known = [*map(loss_of, values)]
    if len(known) == 1:
        return number(known[0], form)
    return f"{number(median(known), form)} ({number(min(known), form)} to {number(max(known), form)})"


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of the seeds; infinite where one diverged."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.inf


def difference(values: Sequence[float], base: Sequence[float], form: str) -> str:
    """Of losses to those of the same seeds: the mean of the logarithms ± its standard error (of one alone), in percent.

    Of noise alone the mean of the ratios would be above 1.
    """
    logarithms = [100 * (math.log(x) - math.log(y)) for x, y in zip(values, base, strict=True)]
    mean = number(statistics.mean(logarithms), f"+{form}")
    if len(logarithms) == 1 or not all(map(math.isfinite, logarithms)):
        return mean
    return f"{mean} ± {format(deviation(logarithms) / math.sqrt(len(logarithms)), form)}"


@contextlib.contextmanager
def figure(path: Path, columns: int, rows: int = 1) -> Iterator[list[Any]]:
    """The axes of a new figure, which is written to ``path`` as SVG that is the same for the same data."""
    matplotlib = require("matplotlib")
    matplotlib.use("svg")
    pyplot = require("matplotlib.pyplot")
    with matplotlib.rc_context(
        {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    ):
        drawing, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
        yield list(axes.flat)
        drawing.tight_layout()
        drawing.savefig(path, metadata={"Date": None})
        pyplot.close(drawing)


def band(
    axes: Any, x: Sequence[float], lines: Sequence[Sequence[float | None]], label: str, colour: str | None
) -> None:
    """The median of several runs as a line, their range as a band; runs that end early are cut where they do."""
    length = min(len(line) for line in lines)
    columns = [[math.nan if line[k] is None else float(line[k] or 0.0) for line in lines] for k in range(length)]
    (line,) = axes.plot(x[:length], [statistics.median(column) for column in columns], label=label, color=colour)
    if len(lines) > 1:
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        axes.fill_between(x[:length], low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """The items in lists by key, both in the order of their first appearance."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
