"""What the channels of an activation do on data: means and covariances, streamed.

Batches are folded in one by one (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", 1979): every batch is centred on its own mean before it is squared, so that a
large mean does not swallow a small variance, and activations are forgotten at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxprune.data import Data
from onnxprune.errors import UserError
from onnxprune.model import Array, Model
from onnxprune.parts import inner_values
from onnxprune.readers import Floats as Floats
from onnxprune.readers import Source
from onnxprune.runtime import RunError
from onnxprune.shapes import Shapes

Progress = Callable[[float], None]

LARGEST = 6144  # channels whose covariance is kept: above it, variances alone
HELD = 4  # of so many batches one is held out
BATCHES = 8  # at least, so that some can be held out
ROWS, FEWEST = 64, 2**15  # positions that are looked at: for each channel, and at least
ROOM = 2**28  # bytes of activations looked at together


class Moments:
    """Mean [groups, columns] and covariance [groups, columns, columns], streamed; without `full` the variances
    alone [groups, columns].
    """

    def __init__(self, groups: int, columns: int, full: bool = True) -> None:
        self.count = 0
        self.full = full
        self.mean: Floats = np.zeros((groups, columns))
        self.scatter: Floats = np.zeros((groups, columns, columns) if full else (groups, columns))
        self.absolute: Floats = np.zeros((groups, columns))
        self.active: Floats = np.zeros((groups, columns))

    def add(self, rows: Array) -> None:
        """Fold in rows [groups, n, columns]."""
        number = rows.shape[1]
        if not number:
            return
        mean = rows.mean(axis=1, dtype=np.float64)
        centred = (rows - mean[:, None, :]).astype(np.float32, copy=False)
        if self.full:
            scatter = np.matmul(centred.transpose(0, 2, 1), centred).astype(np.float64)
        else:
            scatter = np.einsum("gnc,gnc->gc", centred, centred).astype(np.float64)
        self.absolute += np.abs(rows).sum(axis=1, dtype=np.float64)
        self.active += (rows > 0).sum(axis=1)
        self._fold(number, mean, scatter)

    def _fold(self, number: int, mean: Floats, scatter: Floats) -> None:
        total = self.count + number
        delta = mean - self.mean
        outer = np.einsum("ga,gb->gab", delta, delta) if self.full else np.square(delta)
        self.scatter += scatter + outer * (self.count * number / total)
        self.mean += delta * (number / total)
        self.count = total

    def merged(self, other: Moments) -> Moments:
        """Of the rows of both."""
        groups, columns = self.mean.shape
        both = Moments(groups, columns, self.full)
        for part in (self, other):
            if part.count:
                both._fold(part.count, part.mean, part.scatter)
                both.absolute += part.absolute
                both.active += part.active
        return both

    def restricted(self, groups: npt.NDArray[np.bool_]) -> Moments:
        """Of some of the groups."""
        if groups.all():
            return self
        part = Moments(int(groups.sum()), self.mean.shape[1], self.full)
        part.count, part.mean, part.scatter = self.count, self.mean[groups], self.scatter[groups]
        part.absolute, part.active = self.absolute[groups], self.active[groups]
        return part

    @property
    def covariance(self) -> Floats:
        """[groups, columns, columns], of the population; the diagonal alone where the rest was not kept."""
        whole = self.scatter / max(self.count, 1)
        return whole if self.full else np.einsum("gc,cd->gcd", whole, np.eye(whole.shape[1]))

    @property
    def variance(self) -> Floats:
        """[groups, columns]."""
        found: Floats = np.einsum("gcc->gc", self.scatter) if self.full else self.scatter
        return found / max(self.count, 1)

    def second(self, centred: bool) -> Floats:
        """The covariance, or the second moments about zero."""
        if centred:
            return self.covariance
        return np.asarray(self.covariance + np.einsum("ga,gb->gab", self.mean, self.mean))


class Regression:
    """Moments of columns x [groups, n, a] and of what is to be explained by them, e [groups, n, b], streamed."""

    def __init__(self, groups: int, columns: int, outputs: int) -> None:
        self.count = 0
        self.x: Floats = np.zeros((groups, columns))
        self.e: Floats = np.zeros((groups, outputs))
        self.xx: Floats = np.zeros((groups, columns, columns))
        self.xe: Floats = np.zeros((groups, columns, outputs))
        self.ee: Floats = np.zeros((groups, outputs))

    def add(self, x: Array, e: Array) -> None:
        """Fold in rows."""
        if not x.shape[1]:
            return
        x_mean, e_mean = x.mean(axis=1, dtype=np.float64), e.mean(axis=1, dtype=np.float64)
        cx = (x - x_mean[:, None, :]).astype(np.float32, copy=False)
        ce = (e - e_mean[:, None, :]).astype(np.float32, copy=False)
        turned = cx.transpose(0, 2, 1)
        squares = np.einsum("gno,gno->go", ce, ce, dtype=np.float64)
        self._fold(x.shape[1], x_mean, e_mean, np.matmul(turned, cx), np.matmul(turned, ce), squares)

    def _fold(self, number: int, x: Floats, e: Floats, xx: Array, xe: Array, ee: Array) -> None:
        total = self.count + number
        weight = self.count * number / total
        dx, de = x - self.x, e - self.e
        self.xx += xx
        self.xx += dx[:, :, None] * (dx[:, None, :] * weight)
        self.xe += xe
        self.xe += dx[:, :, None] * (de[:, None, :] * weight)
        self.ee += ee + np.square(de) * weight
        self.x += dx * (number / total)
        self.e += de * (number / total)
        self.count = total

    def merged(self, other: Regression) -> Regression:
        """Of the rows of both."""
        groups, columns = self.x.shape
        both = Regression(groups, columns, self.e.shape[1])
        for part in (self, other):
            if part.count:
                both._fold(part.count, part.x, part.e, part.xx, part.xe, part.ee)
        return both

    def moments(self, centred: bool) -> tuple[Floats, Floats]:
        """Mean products (xx, xe): about the means, or about zero."""
        n = max(self.count, 1)
        if centred:
            return self.xx / n, self.xe / n
        return (
            self.xx / n + self.x[:, :, None] * self.x[:, None, :],
            self.xe / n + self.x[:, :, None] * self.e[:, None, :],
        )

    def error(self, weight: Floats | None = None, shift: Floats | None = None) -> float:
        """Mean over rows of |e - x weight - shift|^2, weight [groups, columns, outputs]."""
        n = max(self.count, 1)
        scatter = self.ee.sum() / n
        away = self.e
        if weight is not None:
            scatter += np.sum(weight * ((self.xx / n) @ weight - 2 * self.xe / n))
            away = away - np.einsum("gc,gco->go", self.x, weight)
        if shift is not None:
            away = away - shift
        return float(max(scatter, 0.0) + np.square(away).sum())


@dataclass(frozen=True)
class Statistics:
    """Moments of each source: over the samples to fit on, over those held out, and over all."""

    fitted: Mapping[Source, Moments]
    held: Mapping[Source, Moments]
    samples: int

    def of(self, source: Source) -> Moments:
        """Over all samples."""
        return self.fitted[source].merged(self.held[source])


def collect(
    model: Model, shapes: Shapes, sources: Iterable[Source], data: Data, progress: Progress = lambda _: None
) -> Statistics:
    """Moments of sources over data, in one pass (several where they would not fit into memory together).

    Raises `UserError` if onnxruntime cannot run the model on the data, or if what it computes is not finite.
    """
    wanted = list(dict.fromkeys(sources))
    full = {source: source.size <= LARGEST for source in wanted}
    fitted = {s: Moments(s.groups, s.size, full[s]) for s in wanted}
    held = {s: Moments(s.groups, s.size, full[s]) for s in wanted}
    places = {source: place for place, source in enumerate(wanted)}
    portions = _portions(wanted, shapes)
    size = batch_size(data, shapes, [s.tensor for s in wanted])
    for number, portion in enumerate(portions):
        tensors = list(dict.fromkeys(source.tensor for source in portion))
        try:
            run = inner_values(model, shapes, tensors)
        except RunError as error:
            raise _unrunnable(model, error) from None
        done = 0
        for index, batch in enumerate(data.batches(size)):
            try:
                values = run(batch.feeds)
            except RunError as error:
                raise _unrunnable(model, error) from None
            into = held if is_held(index) else fitted
            for source in portion:
                value = values[source.tensor]
                if not np.isfinite(value).all():
                    raise UserError(
                        f"{model.name}: '{source.tensor}' is NaN or infinite on the data ({data.source}); "
                        "check the preprocessing"
                    )
                most = max(ROWS * source.size, FEWEST) * batch.count // len(data) + 1
                random = np.random.default_rng([index, places[source]])
                rows = source.rows(value, most, random)
                into[source].add(rows)
            done += batch.count
            progress((number + done / len(data)) / len(portions))
    return Statistics(fitted, held, len(data))


def is_held(batch: int) -> bool:
    """Whether a batch is held out, by its number: the second of four, so that two batches are enough."""
    return batch % HELD == 1


def _unrunnable(model: Model, error: RunError) -> UserError:
    return UserError(f"{model.name}: onnxruntime cannot run it on the data ({error})")


def batch_size(data: Data, shapes: Shapes, tensors: Sequence[str]) -> int:
    """Samples to run together: few enough for memory, and for several batches."""
    elements = sum(math.prod(shapes.shapes.get(tensor, ())[1:]) for tensor in set(tensors))
    return max(min(32, ROOM // max(4 * elements, 1), len(data) // BATCHES), 1)


def _portions(sources: Sequence[Source], shapes: Shapes) -> list[list[Source]]:
    """Sources to look at in one pass: as many as the memory of one sample allows."""
    portions: list[list[Source]] = [[]]
    used = 0
    for source in sources:
        size = 4 * math.prod(shapes.shapes.get(source.tensor, ())[1:]) + 16 * source.groups * (
            min(source.size, LARGEST) ** 2 if source.size <= LARGEST else source.size
        )
        if portions[-1] and used + size > 8 * ROOM:
            portions.append([])
            used = 0
        portions[-1].append(source)
        used += size
    return portions
