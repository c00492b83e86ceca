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

WIDE = 1024  # columns of a regression; above it float32 does
PANEL = 256  # rows of a matrix that are worked on together
LARGEST = 6144  # channels whose covariance is kept: above it those of blocks, no more numbers in all
HELD = 4  # of so many batches one is held out
BATCHES = 8  # at least, so that some can be held out
ROWS, FEWEST = 32, 2**15  # positions that are looked at: for each channel, and at least
ROOM = 2**28  # bytes of activations looked at together


class Moments:
    """Mean [groups, columns] and covariance, streamed: of all columns [groups, columns, columns], or of contiguous
    blocks of at most `width` of them (those of different blocks then count as uncorrelated).

    scatter  [groups, blocks, width, width], sums; beyond the last column zero
    """

    def __init__(self, groups: int, columns: int, width: int | None = None) -> None:
        blocks = -(-columns // (width or columns)) if columns else 1
        self.width = -(-columns // blocks)
        self.slices = [slice(at, min(at + self.width, columns)) for at in range(0, columns, self.width or 1)]
        self.count = 0
        self.mean: Floats = np.zeros((groups, columns))
        self.scatter: Floats = np.zeros((groups, len(self.slices), self.width, self.width))
        self.absolute: Floats = np.zeros((groups, columns))
        self.active: Floats = np.zeros((groups, columns))

    def add(self, rows: Array) -> None:
        """Fold in rows [groups, n, columns]."""
        number = rows.shape[1]
        if not number:
            return
        mean = rows.mean(axis=1, dtype=np.float64)
        centred = self._blocks(_centred(rows, mean))
        scatter = np.matmul(centred.transpose(0, 1, 3, 2), centred)
        self.absolute += np.abs(rows).sum(axis=1, dtype=np.float64)
        self.active += (rows > 0).sum(axis=1)
        self._fold(number, mean, scatter)

    def _blocks(self, rows: Array) -> Array:
        """[groups, n, columns] as [groups, blocks, n, width]."""
        groups, number, columns = rows.shape
        beyond = len(self.slices) * self.width - columns
        padded = np.pad(rows, ((0, 0), (0, 0), (0, beyond))) if beyond else rows
        return padded.reshape(groups, number, len(self.slices), self.width).transpose(0, 2, 1, 3)

    def _fold(self, number: int, mean: Floats, scatter: Array) -> None:
        total = self.count + number
        delta = mean - self.mean
        row = self._blocks(delta[:, None])
        weight = self.count * number / total
        self.scatter += scatter
        if weight:
            column = row.transpose(0, 1, 3, 2)
            for at in range(0, self.width, PANEL):
                self.scatter[:, :, at : at + PANEL] += column[:, :, at : at + PANEL] * (row * weight)
        self.mean += delta * (number / total)
        self.count = total

    def merged(self, other: Moments) -> Moments:
        """Of the rows of both."""
        groups, columns = self.mean.shape
        both = Moments(groups, columns, self.width)
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
        part = Moments(0, self.mean.shape[1], self.width)
        part.count, part.mean, part.scatter = self.count, self.mean[groups], self.scatter[groups]
        part.absolute, part.active = self.absolute[groups], self.active[groups]
        return part

    def covariance(self, block: int = 0) -> Floats:
        """Of the columns of a block (of all of them, where there is one), [groups, width, width], of the
        population."""
        size = self.slices[block].stop - self.slices[block].start
        found: Floats = self.scatter[:, block, :size, :size] / max(self.count, 1)
        return found

    @property
    def variance(self) -> Floats:
        """[groups, columns]."""
        diagonal = np.einsum("gbcc->gbc", self.scatter).reshape(len(self.mean), -1)
        found: Floats = diagonal[:, : self.mean.shape[1]] / max(self.count, 1)
        return found

    def second(self, centred: bool, block: int = 0) -> Floats:
        """The covariance of a block, or its second moments about zero."""
        covariance, mean = self.covariance(block), self.mean[:, self.slices[block]]
        return covariance if centred else np.asarray(covariance + np.einsum("ga,gb->gab", mean, mean))


class Regression:
    """Moments of columns x [groups, n, a] and of what is to be explained by them, e [groups, n, b], streamed.

    Kept in float64, above `WIDE` columns in float32, as products of rows are.
    """

    def __init__(self, groups: int, columns: int, outputs: int) -> None:
        kind = np.float64 if columns <= WIDE else np.float32
        self.count = 0
        self.x: Floats = np.zeros((groups, columns))
        self.e: Floats = np.zeros((groups, outputs))
        self.xx: Floats = np.zeros((groups, columns, columns), kind)
        self.xe: Floats = np.zeros((groups, columns, outputs), kind)
        self.ee: Floats = np.zeros((groups, outputs))

    def add(self, x: Array, e: Array) -> None:
        """Fold in rows."""
        if not x.shape[1]:
            return
        x_mean, e_mean = x.mean(axis=1, dtype=np.float64), e.mean(axis=1, dtype=np.float64)
        cx, ce = _centred(x, x_mean), _centred(e, e_mean)
        turned = cx.transpose(0, 2, 1)
        squares = np.einsum("gno,gno->go", ce, ce, dtype=np.float64)
        self._fold(x.shape[1], x_mean, e_mean, np.matmul(turned, cx), np.matmul(turned, ce), squares)

    def _fold(self, number: int, x: Floats, e: Floats, xx: Array, xe: Array, ee: Array) -> None:
        total = self.count + number
        weight = self.count * number / total
        dx, de = x - self.x, e - self.e
        self.xx += xx
        self.xe += xe
        if weight:
            for at in range(0, dx.shape[1], PANEL):
                here = slice(at, at + PANEL)
                self.xx[:, here] += dx[:, here, None] * (dx[:, None, :] * weight)
                self.xe[:, here] += dx[:, here, None] * (de[:, None, :] * weight)
        self.ee += ee + np.square(de) * weight
        self.x += dx * (number / total)
        self.e += de * (number / total)
        self.count = total

    def absorb(self, other: Regression) -> None:
        """Fold in the rows of another."""
        if other.count:
            self._fold(other.count, other.x, other.e, other.xx, other.xe, other.ee)

    def merged(self, other: Regression) -> Regression:
        """Of the rows of both."""
        groups, columns = self.x.shape
        both = Regression(groups, columns, self.e.shape[1])
        both.absorb(self)
        both.absorb(other)
        return both

    def moments(self, centred: bool) -> tuple[Floats, Floats]:
        """Mean products (xx, xe): about the means, or about zero. New arrays."""
        n = max(self.count, 1)
        xx, xe = self.xx / n, self.xe / n
        if not centred:
            for at in range(0, xx.shape[1], PANEL):
                here = slice(at, at + PANEL)
                xx[:, here] += self.x[:, here, None] * self.x[:, None, :]
                xe[:, here] += self.x[:, here, None] * self.e[:, None, :]
        return xx, xe

    def error(self, weight: Floats | None = None, shift: Floats | None = None) -> float:
        """Mean over rows of |e - x weight - shift|^2, weight [groups, columns, outputs]."""
        n = max(self.count, 1)
        scatter = float(self.ee.sum())
        away = self.e
        if weight is not None:
            rounded = weight.astype(self.xx.dtype, copy=False)
            scatter += float(np.sum(rounded * (self.xx @ rounded - 2 * self.xe), dtype=np.float64))
            away = away - np.einsum("gc,gco->go", self.x, weight)
        if shift is not None:
            away = away - shift
        return float(max(scatter / n, 0.0) + np.square(away).sum())


def _centred(rows: Array, mean: Floats) -> Array:
    """Rows [groups, n, columns] less their mean, float32; the difference is taken in float64."""
    found = np.empty(rows.shape, np.float32)
    return np.subtract(rows, mean[:, None, :], out=found, casting="same_kind")


@dataclass(frozen=True)
class Statistics:
    """Moments of each source: over the samples to fit on, over those held out, and over all.

    samples  of the data
    size     samples that were run together: of such batches those that `is_held` names are held out
    """

    fitted: Mapping[Source, Moments]
    held: Mapping[Source, Moments]
    samples: int
    size: int

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
    fitted = {s: Moments(s.groups, s.size, width(s.size)) for s in wanted}
    held = {s: Moments(s.groups, s.size, width(s.size)) for s in wanted}
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
                    advice = (
                        "check the preprocessing"
                        if data.measured
                        else "check its weights, or give real data with --data"
                    )
                    raise UserError(
                        f"{model.name}: '{source.tensor}' is NaN or infinite on the data ({data.source}); {advice}"
                    )
                most = max(ROWS * source.size, FEWEST) * batch.count // len(data) + 1
                random = np.random.default_rng([index, places[source]])
                rows = source.rows(value, most, random)
                into[source].add(rows)
            done += batch.count
            progress((number + done / len(data)) / len(portions))
    return Statistics(fitted, held, len(data), size)


def width(channels: int) -> int:
    """Channels of a block whose covariance is kept."""
    return channels if channels <= LARGEST else max(LARGEST**2 // channels, 1)


def is_held(batch: int) -> bool:
    """Whether a batch is held out, by its number: the second of four, so that two batches are enough."""
    return batch % HELD == 1


def _unrunnable(model: Model, error: RunError) -> UserError:
    return UserError(f"{model.name}: onnxruntime cannot run it on the data ({error})")


def batch_size(data: Data, shapes: Shapes, tensors: Sequence[str], batches: int = BATCHES) -> int:
    """Samples to run together: few enough for memory, and for so many batches."""
    elements = sum(math.prod(shapes.shapes.get(tensor, ())[1:]) for tensor in set(tensors))
    return max(min(32, ROOM // max(4 * elements, 1), len(data) // batches), 1)


def _portions(sources: Sequence[Source], shapes: Shapes) -> list[list[Source]]:
    """Sources to look at in one pass: as many as the memory of one sample allows."""
    portions: list[list[Source]] = [[]]
    used = 0
    for source in sources:
        activations = math.prod(shapes.shapes.get(source.tensor, ())[1:])
        size = 4 * activations + 16 * source.groups * source.size * width(source.size)
        if portions[-1] and used + size > 8 * ROOM:
            portions.append([])
            used = 0
        portions[-1].append(source)
        used += size
    return portions
