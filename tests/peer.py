"""A peer for the test of `benchmarks/serving.py`: it writes what it is asked for, and refuses large ratios."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.serving import serve


def main(text: str, folder: str) -> None:
    def prune(ratio: float, path: Path) -> None:
        print("a peer may print what it likes")
        if ratio > 0.8:
            raise ValueError("too much")
        path.write_text(f"{text} {ratio}", encoding="utf-8")

    serve(prune, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
