"""What every benchmark shares: isolation, results, figures to reach, and the tables of `docs/benchmarks.md`.

A benchmark measures and returns results (plain data). They are kept in `benchmarks/results/NAME.json`
and shown in the document between markers, so that the text around the tables is written by hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results"
VERSIONS = ("onnxprune", "onnx", "onnxruntime", "numpy")

T = TypeVar("T")
Results = dict[str, Any]


class NotHereError(Exception):
    """A benchmark that cannot run here, and why."""


@dataclass(frozen=True)
class Figure:
    """One number and what it must not exceed."""

    name: str
    measured: float
    limit: float
    strict: bool = False  # the limit itself is a miss

    @property
    def passed(self) -> bool:
        return self.measured < self.limit if self.strict else self.measured <= self.limit


@dataclass(frozen=True)
class Benchmark:
    """A measurement, and how its results read as Markdown.

    rows  that can be measured alone, by their names as the argument of `measure`; none where there is no such choice
    """

    name: str
    measure: Callable[..., Results]
    render: Callable[[Results], str]
    figures: Callable[[Results], list[Figure]] = lambda _: []
    rows: tuple[str, ...] = ()


def isolated(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a fresh process of its own and return what it returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def provenance() -> dict[str, str]:
    """Date, machine in general words, and versions."""
    versions = {name: version(name) for name in VERSIONS}
    when = {"date": time.strftime("%Y-%m-%d"), "machine": _machine()}
    return {**when, "python": platform.python_version(), **versions}


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    known = [label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags]
    cores = f"{os.cpu_count()} shared {platform.machine().replace('_', '-')} cores"
    return ", ".join([cores, *known[:1]])


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """A Markdown table; columns from `numbers_from` on are aligned to the right."""
    rules = ["---" if i < numbers_from else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rules, *rows))


def median(values: Sequence[float]) -> float:
    """The middle value; the upper of two."""
    return sorted(values)[len(values) // 2]


def run(benchmark: Benchmark) -> int:
    """The command line of one benchmark: measure and print; with --update also keep the results."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark.name}")
    parser.add_argument("--update", action="store_true", help="keep the results, rewrite the document")
    if benchmark.rows:
        parser.add_argument(
            "--only", nargs="*", choices=benchmark.rows, help="these rows; others stay as kept"
        )
    given = parser.parse_args()
    if benchmark.rows and given.only is not None:
        benchmark = replace(benchmark, measure=functools.partial(benchmark.measure, given.only))
    return report(benchmark, update=given.update)


def report(benchmark: Benchmark, *, update: bool) -> int:
    """Measure and print, and keep the results if told to."""
    try:
        results = measured(benchmark)
    except NotHereError as reason:
        print(f"skipped: {reason}")
        return 0
    print(benchmark.render(results))
    for figure in benchmark.figures(results):
        print(f"{'reached' if figure.passed else 'MISSED '} {figure.name}: {_number(figure.measured)}")
    if update:
        keep(benchmark, results)
        from benchmarks.all import write_document  # the list of all benchmarks imports this one

        write_document()
    return 0


def measured(benchmark: Benchmark) -> Results:
    """Measure, and say when, where and with what."""
    return {"measured": provenance(), **benchmark.measure()}


def keep(benchmark: Benchmark, results: Results) -> None:
    """Keep results as the newest of their benchmark."""
    figures = [{**asdict(figure), "passed": figure.passed} for figure in benchmark.figures(results)]
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**results, "figures": figures}, indent=1)
    (RESULTS / f"{benchmark.name}.json").write_text(text + "\n", encoding="utf-8")


def kept(name: str) -> Results | None:
    """The newest results of a benchmark, or None where it has not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def stamp(results: Results) -> str:
    """One line that says when, where and with what something was measured."""
    given = results["measured"]
    versions = ", ".join(f"{name} {given[name]}" for name in VERSIONS)
    return f"Measured {given['date']} on {given['machine']}, with {versions}, Python {given['python']}."


def figures_table(figures: Iterable[Figure]) -> str:
    """Every figure with its limit and a verdict."""
    rows = [
        (
            figure.name,
            f"{'<' if figure.strict else '<='} {_number(figure.limit)}",
            _number(figure.measured),
            "reached" if figure.passed else "**missed**",
        )
        for figure in figures
    ]
    return table(("figure", "reach", "measured", ""), rows)


def _number(value: float) -> str:
    if value >= 100 or value == round(value, 0):
        return f"{value:,.0f}"
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"


def replace_block(text: str, name: str, content: str) -> str:
    """The text with new content between its markers `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{DOCUMENT.name} lacks the markers of '{name}': {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)
