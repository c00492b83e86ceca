"""Every benchmark, and the document that shows them.

python -m benchmarks.all                  measure everything and rewrite docs/benchmarks.md
python -m benchmarks.all --only growth memory
python -m benchmarks.all --render         rewrite the document from the results kept
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import (
    accuracy,
    analysis,
    calibration,
    growth,
    large,
    latency,
    memory,
    models_table,
    peers,
    recurrent,
    targets,
    time_ratio,
    transformers,
)
from benchmarks.common import (
    DOCUMENT,
    Figure,
    NotHereError,
    figures_table,
    keep,
    kept,
    measured,
    replace_block,
)

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        models_table,
        transformers,
        recurrent,
        time_ratio,
        analysis,
        growth,
        memory,
        large,
        accuracy,
        calibration,
        latency,
        targets,
        peers,
    )
}


def document() -> str:
    """The document with the kept results between its markers."""
    text = DOCUMENT.read_text(encoding="utf-8")
    figures: list[Figure] = []
    for name, benchmark in BENCHMARKS.items():
        results = kept(name)
        if results is not None:
            text = replace_block(text, name, benchmark.render(results))
            figures += benchmark.figures(results)
    return replace_block(text, "figures", figures_table(figures))


def write_document() -> None:
    """Show the kept results in the document."""
    DOCUMENT.write_text(document(), encoding="utf-8")


def main() -> int:
    """Measure, keep, and rewrite the document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--render", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    for name in [] if arguments.render else arguments.only:
        print(f"== {name}", file=sys.stderr)
        try:
            keep(BENCHMARKS[name], measured(BENCHMARKS[name]))
        except NotHereError as reason:
            print(f"{name} skipped: {reason}", file=sys.stderr)
    write_document()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
