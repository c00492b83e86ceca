"""Tables of times that cover what a search may ask for, measured where a target runs and read where it does not.

Each piece of a model (see `latency`) is timed on a grid of the counts that its groups may have: at most `POINTS` of
what comes into it by `POINTS` of what it makes, and `POINTS` of the rest. One cut of the model serves many pieces, as
long as no two of them want one group at different counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from onnxprune import surgery, timing
from onnxprune.axes import Var
from onnxprune.blocks import Blocks
from onnxprune.cost import Counts
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.grids import Grid, Place, Whole, spread
from onnxprune.latency import Form, Table, digest_of, forms, pieces, predict
from onnxprune.model import Model
from onnxprune.plan import Keep, Plan
from onnxprune.runtime import Feeds
from onnxprune.targets import TargetError

POINTS = 5  # of a grid, in each direction
BETWEEN = (0.875, 0.625, 0.375)  # of the way from the least counts to all: between the points of a grid

AGAIN = 2  # times that what looks disturbed is measured again
LONGER = 0.1  # than a larger piece: so much looks disturbed
MOST = 1.3  # times the whole that pieces add up to before their times say little

Allowed = Mapping[Var, Sequence[int]]


@dataclass(frozen=True)
class Measured:
    """What a table came to.

    pieces    of the model, of which so many are `distinct`
    measured  shapes that were timed; the others were in the table
    error     of interpolation: on whole models between the points of the grids, how far times of pieces are off, over
              their sum
    sum       of the pieces' times over the measured time of the original
    ratios    (predicted, measured) of these models over the original
    contended why these numbers mean little, where other work got in between; empty where it did not
    """

    pieces: int
    distinct: int
    measured: int
    error: float
    sum: float
    ratios: tuple[tuple[float, float], ...]
    contended: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        told = ", ".join(f"{predicted:.3f} (measured {found:.3f})" for predicted, found in self.ratios)
        return [
            f"{self.pieces} pieces, {self.distinct} distinct; {self.measured} shapes measured",
            f"the original's pieces add up to {self.sum:.2f} of its time"
            + (": what surrounds them outweighs them, so expect ratios to be off" if self.sum > MOST else ""),
            f"between the points of the grids times of pieces are off by {self.error:.1%}"
            + (f"; ratios predicted {told}" if told else ""),
            *([f"contended: {self.contended}"] if self.contended else []),
        ]


@dataclass(frozen=True)
class _Point:
    """A point of a piece's grid: the piece is timed at these counts of its groups."""

    heart: str
    key: str
    place: Place
    counts: Counts


def measure(
    blocks: Blocks,
    allowed: Allowed,
    feeds: Feeds,
    table: Table,
    progress: Callable[[float], None] = lambda _: None,
) -> Measured:
    """Fill a table for a model; it is saved while the work goes on, and what it has is not measured again.

    allowed  counts that groups may have, ascending; other groups stay as they are

    Raises `UserError` where the target does not run here, refuses a model, or the model has bodies and no pieces.
    """
    graph = blocks.graph
    if not table.runs:
        raise UserError(
            f"{table.path}: the table of another machine is not added to ({table.foreign}); give another path"
            if table.foreign
            else f"--target {table.target}: it does not run here ({table.target.state().missing or 'not timed'})"
        )
    found = pieces(graph, feeds)
    shapes = forms(graph, found)
    if not shapes:
        raise UserError(
            f"{graph.model.name}: nothing in it can be timed piece by piece (it has bodies of If, Loop or Scan, or "
            "no node that multiplies); use --latency on the device"
        )
    known = len(table.times)
    distinct = {form.key: heart for heart, form in reversed(shapes.items())}
    points = [
        point
        for key, heart in distinct.items()
        if key not in table.grids
        for point in _points(heart, shapes[heart], allowed)
    ]
    grids = _timed(blocks, points, feeds, table, lambda done: progress(0.9 * done))
    table.grids |= {key: Grid.of(times) for key, times in grids.items()}
    table.save()
    whole, error, contended = _checked(blocks, allowed, feeds, table, shapes)
    progress(1.0)
    table.wholes[digest_of(graph, feeds)] = whole
    table.save()
    return Measured(
        len(found),
        len(distinct),
        len(table.times) - known,
        error,
        whole.pieces / whole.milliseconds,
        whole.ratios,
        contended,
    )


def _timed(
    blocks: Blocks, points: Sequence[_Point], feeds: Feeds, table: Table, progress: Callable[[float], None]
) -> dict[str, dict[Place, float]]:
    """Times by form and place. What looks disturbed, and the original, is timed again some time later."""
    grids: dict[str, dict[Place, float]] = {}
    for attempt in range(1 + AGAIN):
        rounds = _packed(points)
        for number, (counts, among) in enumerate(rounds):
            cut = {piece.heart: piece for piece in pieces(_cut(blocks, counts), feeds)}
            for point in among:
                if attempt:
                    table.again(cut[point.heart])
                grids.setdefault(point.key, {})[point.place] = table.time(cut[point.heart])
            table.save()
            progress((attempt + (number + 1) / len(rounds)) / (1 + AGAIN))
        doubtful = {
            key: _disturbed(times) | ({max(times)} if not attempt else set()) for key, times in grids.items()
        }
        points = [point for point in points if point.place in doubtful[point.key]]
    return grids


def _disturbed(times: Mapping[Place, float]) -> set[Place]:
    """Places that took longer than one with as much of everything or more, by more than clocks differ."""
    return {
        place
        for place, spent in times.items()
        for other, less in times.items()
        if less * (1 + LONGER) < spent and all(a <= b for a, b in zip(place, other, strict=True))
    }


def _points(heart: str, form: Form, allowed: Allowed) -> Iterator[_Point]:
    """The points of a piece's grid."""
    inputs, outputs, rest = (list(_levels(form, i, allowed)) for i in range(3))
    asked: dict[Place, Counts] = {}
    for first in inputs:
        for second in outputs:
            counts = first | second | rest[-1]
            asked.setdefault(form.place(counts), counts)
    for third in rest[:-1]:
        counts = inputs[-1] | outputs[-1] | third
        asked.setdefault(form.place(counts), counts)
    return (_Point(heart, form.key, place, counts) for place, counts in asked.items())


def _levels(form: Form, direction: int, allowed: Allowed) -> Iterator[Counts]:
    """Counts of the groups of one direction, from the least to all, each group as far on its way as the others."""
    own = {var: allowed.get(var, (var.extent,)) for var in form.free[direction]}
    points = max([len(spread(len(counts), POINTS)) for counts in own.values()], default=1)
    seen: set[int] = set()
    for point in range(points):
        counts = {
            var: at(given, point / max(points - 1, 1) if points > 1 else 1.0) for var, given in own.items()
        }
        place = form.place(counts)[direction]
        if place not in seen:
            seen.add(place)
            yield counts


def at(counts: Sequence[int], share: float) -> int:
    """The count at a share of the way from the first to the last."""
    return counts[round(share * (len(counts) - 1))]


def _packed(points: Sequence[_Point]) -> list[tuple[Counts, list[_Point]]]:
    """Cuts in which all points find their counts: each goes to the first that it does not contradict."""
    rounds: list[tuple[Counts, list[_Point]]] = []
    for point in points:
        for counts, among in rounds:
            if all(counts.get(var, count) == count for var, count in point.counts.items()):
                counts |= point.counts
                among.append(point)
                break
        else:
            rounds.append((dict(point.counts), [point]))
    return rounds


def _cut(blocks: Blocks, counts: Counts) -> DependencyGraph:
    """The model with so many units of its groups, the first ones: times do not depend on which."""
    keeps = tuple(
        Keep(group.name, group.size, tuple(range(counts[group.var])))
        for group in blocks.graph.groups
        if counts.get(group.var, group.size) < group.size
    )
    return (
        DependencyGraph(Model(surgery.apply(blocks.graph, Plan("", keeps), blocks)))
        if keeps
        else blocks.graph
    )


def _checked(
    blocks: Blocks,
    allowed: Allowed,
    feeds: Feeds,
    table: Table,
    shapes: Mapping[str, Form],
) -> tuple[Whole, float, str]:
    """Models between the points of the grids, from end to end and piece by piece; the error of interpolation; and whether
    other work got in between."""
    graph = blocks.graph
    whole = predict(graph, feeds, table)
    protos: dict[float, onnx.ModelProto] = {}
    off = total = 0.0
    for share in BETWEEN:
        counts = {var: at(given, share) for var, given in allowed.items()}
        cut = _cut(blocks, counts)
        if cut is graph:
            continue
        exact = predict(cut, feeds, table).pieces
        told = {heart: table.grids[form.key].at(form.place(counts)) for heart, form in shapes.items()}
        off += sum(abs(told[heart] - spent) for heart, spent in exact.items())
        total += sum(exact.values())
        protos[sum(told.values()) / whole.total] = cut.model.proto
    try:
        compared = timing.compare_models(
            table.target, [graph.model.proto, *protos.values()], feeds, threads=table.threads
        )
    except TargetError as error:
        raise UserError(f"--target {table.target}: {error}") from None
    milliseconds = min(compared.engines[0].rounds)  # as of pieces: the fastest
    ratios = {told: engine.ratio for told, engine in zip(protos, compared.engines[1:], strict=True)}
    return (
        Whole(milliseconds, whole.total, tuple(ratios.items())),
        off / total if total else 0.0,
        compared.contended,
    )
