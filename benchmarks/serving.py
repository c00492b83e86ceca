"""A peer in a process of its own: asked for a ratio on a line, it writes a model and answers on a line.

`serve` runs in the peer's environment, `Peer` here. It starts once per model, since importing a peer, tracing a
network and gathering its statistics take longer than a cut.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

DONE = "done"
ROOT = Path(__file__).parent.parent
NEAR = 0.005  # of the share that is wanted
HIGHEST = 0.96  # of ratios
STEPS = 10


def serve(prune: Callable[[float, Path], None], folder: Path) -> None:
    """Answer every ratio on the standard input: `done` when FOLDER/RATIO.onnx is written, else what went wrong."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a peer prints is no answer
    for line in sys.stdin:
        try:
            prune(float(line), folder / f"{line.strip()}.onnx")
            said = DONE
        except Exception as error:  # shown in the table in place of a score
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
        answers.write(f"{said}\n")
        answers.flush()


class PeerError(Exception):
    """A peer that cannot prune a model, in its own words."""


class Peer:
    """A running peer; a context manager."""

    def __init__(self, interpreter: Path, module: str, arguments: Sequence[str | Path], folder: Path) -> None:
        command = [str(interpreter), "-W", "ignore", "-m", module, *map(str, arguments), str(folder)]
        self._folder = folder
        self._log = (folder / "log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=ROOT
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def prune(self, ratio: float) -> Path:
        """The model cut at a ratio (four decimals); raises `PeerError` if there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        name = f"{ratio:.4f}"
        try:
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        except BrokenPipeError:
            answer = ""
        if answer != DONE:
            lines = (self._folder / "log").read_text(encoding="utf-8").strip().splitlines()
            raise PeerError(answer or (lines[-1] if lines else "ended without a word"))
        return self._folder / f"{name}.onnx"


@contextmanager
def bisected(
    interpreter: Path, module: str, arguments: Sequence[str | Path], share: Callable[[Path], float]
) -> Iterator[Callable[[float], Path]]:
    """A peer that takes a ratio, asked for a share of the MACs; files last as long as the context.

    share  of a file; raises `PeerError` where it is no valid model
    """
    with tempfile.TemporaryDirectory() as folder, Peer(interpreter, module, arguments, Path(folder)) as peer:
        kept: dict[float, tuple[Path, float]] = {}

        def at(ratio: float) -> tuple[Path, float]:
            if ratio not in kept:
                path = peer.prune(ratio)
                kept[ratio] = path, share(path)
            return kept[ratio]

        yield lambda target: nearest(at, target)


def nearest(at: Callable[[float], tuple[Path, float]], target: float) -> Path:
    """The model whose MACs are nearest to a share, by bisection on the ratio; `PeerError` where none comes near.

    `at` gives a model and its share of the MACs, which falls with the ratio, or raises `PeerError` where the ratio
    is more than the tool can do. A step of the share that leaps over the target is met from below.
    """
    low, high = 0.0, HIGHEST
    below: Path | None = None
    why, most = "", 1.0
    for _ in range(STEPS):
        middle = round((low + high) / 2, 4)
        try:
            path, share = at(middle)
        except PeerError as error:
            why, high = f", and then: {error}", middle
            continue
        if abs(share - target) <= NEAR:
            return path
        if share > target:
            low, most = middle, share
        else:
            below, high = path, middle
    if below is None:
        raise PeerError(f"keeps {most:.2f} of the MACs at a ratio of {low:.2f}{why}")
    return below
