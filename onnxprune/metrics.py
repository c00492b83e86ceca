"""How good a model is on labelled data, and how far it agrees with its original without labels.

Metrics accumulate batch by batch; none keeps outputs, but for functions of the user.

**Classes** lie along the last axis of outputs of up to three axes (samples, perhaps positions, classes) and along
axis 1 of larger ones (samples, classes, height, width); where labels fit one of the two only, or the output is a
distribution along the last axis, that one is taken. Every position counts as one decision. An output with a single
score decides between two classes: at 0.5 where all scores are probabilities, else at 0 (a logit).

Labelled metrics look at the first output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from onnxprune.data import Data
from onnxprune.data.sources import function, is_function
from onnxprune.errors import UserError, printable
from onnxprune.model import Array, Model
from onnxprune.runtime import Feeds, RunError, Session

Outputs = Mapping[str, Any]
SUM = 1e-3  # how far the sum of a distribution may be from 1
ROOM = 2**30  # bytes of an original's outputs that are kept
SMALLEST = float(np.finfo(np.float32).tiny)  # a probability of 0 counts as this in a divergence


class Runner(Protocol):
    """What runs a model: a `Session`, or anything that caches one."""

    def run(self, feeds: Feeds, /) -> Outputs: ...


class Metric(Protocol):
    """One pass over data. `original` are the original's outputs on the same batch, for agreement."""

    name: str
    higher_is_better: bool
    needs_labels: bool
    needs_original: bool

    def update(self, outputs: Outputs, original: Outputs | None, labels: Array | None, /) -> None: ...

    def result(self) -> float:
        """Raises `UserError` where nothing was seen that could be measured."""


# ---------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scores:
    """Decisions of an output: one row each, as probabilities and as logits (they differ for single scores)."""

    probabilities: Array  # (decisions, classes), float64
    logits: Array
    shape: tuple[int, ...]  # of the decisions: that of the output without its class axis

    @property
    def distribution(self) -> bool:
        """Whether the output already is one."""
        p = self.probabilities
        return bool(np.all(p >= -SUM) and np.all(np.abs(p.sum(axis=1) - 1) < SUM))


def scores(output: Array, axis: int) -> Scores:
    """The output's rows of class scores along an axis (`class_axis`)."""
    values = _wide(output).astype(np.float64)
    rows = np.moveaxis(values, axis, -1)
    shape, classes = rows.shape[:-1], rows.shape[-1]
    rows = rows.reshape(-1, classes)
    if classes == 1:
        return Scores(np.hstack([1 - rows, rows]), np.hstack([0 * rows, rows]), shape)
    return Scores(rows, rows, shape)


def class_axis(output: Array, labels: Array | None = None) -> int:
    """The axis that holds classes; see the module."""
    values = _wide(output)
    last = values.ndim - 1
    usual = 1 if values.ndim > 3 else last
    if last < 2:
        return last
    if labels is not None:
        fits = [a for a in (1, last) if _plain(labels.shape) == _plain(np.delete(values.shape, a).tolist())]
        return usual if usual in fits or not fits else fits[0]
    if usual != last and values.shape[last] > 1 and values.size:
        if np.all(values >= 0) and np.all(np.abs(values.sum(axis=last, dtype=np.float64) - 1) < SUM):
            return last
    return usual


def _wide(output: Array) -> Array:
    """With an axis for classes, of one, where there is none."""
    return output.reshape(-1, 1) if output.ndim < 2 else output


def _plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the axes that hold nothing but one."""
    return tuple(n for n in shape if n != 1)


def _first(outputs: Outputs) -> Array:
    name, value = next(iter(outputs.items()))
    if not _is_numeric(value):
        raise UserError(
            f"output '{printable(name)}' is no tensor of numbers; metrics look at the first output"
        )
    return np.asarray(value)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and (value.dtype.kind in "biuf" or value.dtype.kind == "V")


def _classes(labels: Array, found: Scores, metric: str) -> Array:
    """Class numbers for the decisions. Raises `UserError` where they do not fit."""
    if _plain(labels.shape) != _plain(found.shape):
        raise UserError(
            f"{metric}: labels of shape {list(labels.shape)} for {list(found.shape)} decisions; give one class each"
        )
    numbers = labels.reshape(-1)
    if numbers.dtype.kind == "f" and not np.all(numbers == np.floor(numbers)):
        raise UserError(f"{metric}: labels are {labels.dtype} values, no class numbers; for such, use mse")
    numbers = numbers.astype(np.int64)
    count = found.logits.shape[1]
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
        raise UserError(
            f"{metric}: labels from {numbers.min()} to {numbers.max()}; the model has {count} classes, from 0"
        )
    return numbers


def _place(rows: Array, numbers: Array) -> Array:
    """How many classes come before the right one, the first of equals leading; all of them where a row has NaN."""
    own = rows[np.arange(len(rows)), numbers][:, None]
    before = (rows > own) | ((rows == own) & (np.arange(rows.shape[1]) < numbers[:, None]))
    result: Array = np.where(np.isnan(rows).any(axis=1), rows.shape[1], before.sum(axis=1))
    return result


# -------------------------------------------------------------------------------------------- labelled


class Top:
    """Share of decisions whose class is among the `k` highest scores (the first of equals counts as higher)."""

    higher_is_better = True
    needs_labels = True
    needs_original = False

    def __init__(self, k: int) -> None:
        self.name = f"top{k}"
        self.k = k
        self._right = np.zeros(2, dtype=np.int64)  # taken as probabilities, as logits
        self._count = 0
        self._distribution = True

    def update(self, outputs: Outputs, _original: Outputs | None, labels: Array | None) -> None:
        found, numbers = _decided(outputs, labels, self.name)
        if found.logits.shape[1] <= self.k:
            raise UserError(
                f"{self.name}: the model has {found.logits.shape[1]} classes, so it is always right"
            )
        self._distribution &= found.distribution
        for i, rows in enumerate((found.probabilities, found.logits)):
            self._right[i] += int((_place(rows, numbers) < self.k).sum())
        self._count += len(numbers)

    def result(self) -> float:
        _some(self._count, self.name)
        return float(self._right[0 if self._distribution else 1] / self._count)


class F1:
    """Macro-averaged F1: the mean of 2 TP / (2 TP + FP + FN) over the classes that are labelled or predicted."""

    name = "f1"
    higher_is_better = True
    needs_labels = True
    needs_original = False

    def __init__(self) -> None:
        self._counts: Array = np.zeros((2, 3, 0), dtype=np.int64)  # TP, labelled, predicted of each class
        self._distribution = True

    def update(self, outputs: Outputs, _original: Outputs | None, labels: Array | None) -> None:
        found, numbers = _decided(outputs, labels, self.name)
        self._distribution &= found.distribution
        classes = found.logits.shape[1]
        if not self._counts.size:
            self._counts = np.zeros((2, 3, classes), dtype=np.int64)
        for i, rows in enumerate((found.probabilities, found.logits)):
            valid = ~np.isnan(rows).any(axis=1)  # of NaN, nothing is predicted
            guess = rows.argmax(axis=1)
            for j, chosen in enumerate((numbers[valid & (guess == numbers)], numbers, guess[valid])):
                self._counts[i, j] += np.bincount(chosen, minlength=classes)

    def result(self) -> float:
        right, labelled, predicted = self._counts[0 if self._distribution else 1]
        _some(int(labelled.sum()), self.name)
        both = labelled + predicted
        return float(np.mean(2 * right[both > 0] / both[both > 0]))


class Mse:
    """Mean squared difference between the first output and the labels, over all elements."""

    name = "mse"
    higher_is_better = False
    needs_labels = True
    needs_original = False

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def update(self, outputs: Outputs, _original: Outputs | None, labels: Array | None) -> None:
        output = _first(outputs)
        target = _given(labels, self.name)
        if _plain(target.shape) != _plain(output.shape):
            raise UserError(
                f"mse: labels of shape {list(target.shape)} for an output of shape {list(output.shape)}; "
                "they must agree (for class numbers, use top1)"
            )
        difference = output.reshape(-1).astype(np.float64) - target.reshape(-1).astype(np.float64)
        self._sum += float(difference @ difference)
        self._count += difference.size

    def result(self) -> float:
        _some(self._count, self.name)
        return self._sum / self._count


class Custom:
    """A function of the user: called once, with the first output and the labels of all data.

    Both are joined along axis 0; where shapes vary, both are lists, of one entry for each batch. It returns a
    number, the higher the better, unless the function has an attribute `higher_is_better` that is False.
    """

    needs_labels = True
    needs_original = False

    def __init__(self, name: str, judge: Callable[..., Any]) -> None:
        self.name = name
        self.higher_is_better = bool(getattr(judge, "higher_is_better", True))
        self._judge = judge
        self._outputs: list[Array] = []
        self._labels: list[Array] = []

    def update(self, outputs: Outputs, _original: Outputs | None, labels: Array | None) -> None:
        self._outputs.append(_first(outputs))
        self._labels.append(_given(labels, self.name))

    def result(self) -> float:
        _some(len(self._outputs), self.name)
        outputs: Any = self._outputs
        labels: Any = self._labels
        if len({a.shape[1:] for a in outputs}) == len({a.shape[1:] for a in labels}) == 1 and outputs[0].ndim:
            outputs, labels = np.concatenate(outputs), np.concatenate(labels)
        try:
            value = float(self._judge(outputs, labels))
        except Exception as error:  # of the user's code
            text = printable(" ".join(str(error).split()))[:160]
            raise UserError(f"{self.name}: failed ({type(error).__name__}: {text})") from None
        if math.isnan(value):
            raise UserError(f"{self.name}: gave NaN; a metric is a number")
        return value


def _decided(outputs: Outputs, labels: Array | None, metric: str) -> tuple[Scores, Array]:
    given = _given(labels, metric)
    output = _first(outputs)
    found = scores(output, class_axis(output, given))
    return found, _classes(given, found, metric)


def _given(labels: Array | None, metric: str) -> Array:
    if labels is None:
        raise UserError(f"{metric} needs labels; add them to the data or use {', '.join(AGREEMENTS)}")
    return labels


def _some(count: int, metric: str) -> None:
    if not count:
        raise UserError(f"{metric}: there was nothing to measure")


# ------------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Agreement:
    """How far an output of a model agrees with that of its original.

    `top1`: share of decisions with the same class (of equal elements, for integer outputs). `kl`: the mean
    Kullback-Leibler divergence KL(original || model) of a decision in nats, after a softmax unless the output
    already is a distribution (`softmax` says which). `cosine`: mean cosine of the angle between the outputs of a
    sample. `snr`: energy of the original's output over that of the difference, in dB; infinite for equals.
    None for what an integer output does not have, and where nothing was compared. `unlike` counts batches where
    the shapes differ: they are in no figure.
    """

    output: str
    top1: float | None
    kl: float | None
    softmax: bool | None
    cosine: float | None
    snr: float | None
    unlike: int


class Comparison:
    """Accumulates the `Agreement` of one output. Entries that are the same infinity or NaN in both are left out
    of cosine and SNR; others that are not finite make the worst of it: KL infinite, cosine 0, SNR minus infinity.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self._same = np.zeros(2, dtype=np.int64)
        self._decisions = 0
        self._kl = np.zeros(2)  # of distributions, after a softmax
        self._distribution = True
        self._cosine = 0.0
        self._samples = 0
        self._signal = self._noise = 0.0
        self._unlike = 0
        self._float = True

    def update(self, before: Array, after: Array, count: int | None = None) -> None:
        """Outputs of the original and of the model, on a batch of `count` samples (axis 0 unless given)."""
        if before.shape != after.shape:
            self._unlike += 1
            return
        if not before.size:
            return
        if before.dtype.kind in "biu":
            self._float = False
            self._same += int((before == after).sum())
            self._decisions += before.size
            return
        self._decide(before, after)
        rows = before.shape[0] if before.ndim and count in (None, before.shape[0]) else 1
        self._measure(before.reshape(rows, -1), after.reshape(rows, -1))

    def _decide(self, before: Array, after: Array) -> None:
        axis = class_axis(before)
        a, b = scores(before, axis), scores(after, axis)
        self._distribution &= a.distribution
        self._decisions += len(a.logits)
        for i, (p, q) in enumerate(((a.probabilities, b.probabilities), (a.logits, b.logits))):
            broken = np.isnan(p).any(axis=1) != np.isnan(q).any(axis=1)
            self._same[i] += int(((p.argmax(axis=1) == q.argmax(axis=1)) & ~broken).sum())
        with np.errstate(all="ignore"):
            self._kl[0] += _divergence(_normal(a.probabilities), _normal(b.probabilities))
            self._kl[1] += _divergence(_log_softmax(a.logits), _log_softmax(b.logits))

    def _measure(self, before: Array, after: Array) -> None:
        a, b = before.astype(np.float64), after.astype(np.float64)
        agree = ~np.isfinite(a) & ((a == b) | (np.isnan(a) & np.isnan(b)))
        a, b = np.where(agree, 0, a), np.where(agree, 0, b)
        with np.errstate(all="ignore"):
            self._signal += float((a * a).sum())
            noise = float(((a - b) ** 2).sum())
            self._noise += noise if math.isfinite(noise) else math.inf
            lengths = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
            cosines = np.where(lengths > 0, (a * b).sum(axis=1) / lengths, np.all(a == b, axis=1))
        self._cosine += float(np.where(np.isfinite(cosines), np.clip(cosines, -1, 1), 0).sum())
        self._samples += len(a)

    def result(self) -> Agreement:
        if not self._decisions:
            return Agreement(self.output, None, None, None, None, None, self._unlike)
        if not self._float:
            same = float(self._same[0] / self._decisions)
            return Agreement(self.output, same, None, None, None, None, self._unlike)
        which = 0 if self._distribution else 1
        kl = float(self._kl[which] / self._decisions)
        return Agreement(
            self.output,
            float(self._same[which] / self._decisions),
            math.inf if math.isnan(kl) else max(kl, 0.0),
            not self._distribution,
            self._cosine / self._samples,
            self._decibels(),
            self._unlike,
        )

    def _decibels(self) -> float:
        if not self._noise:
            return math.inf
        if not self._signal or math.isinf(self._noise):
            return -math.inf
        return 10 * math.log10(self._signal / self._noise)


def _normal(rows: Array) -> Array:
    """Logarithms of rows that are distributions but for rounding."""
    floored = np.maximum(rows, SMALLEST)
    result: Array = np.log(floored / floored.sum(axis=1, keepdims=True))
    return result


def _log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _divergence(before: Array, after: Array) -> float:
    """Sum of KL over rows of log-probabilities; what has no probability adds nothing."""
    p = np.exp(before)
    return float(np.where(p > 0, p * (before - after), 0).sum())


class Agrees:
    """One figure of `Agreement` for the first output, as a metric."""

    needs_labels = False
    needs_original = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.higher_is_better = name != "kl"
        self._comparison: Comparison | None = None

    def update(self, outputs: Outputs, original: Outputs | None, _labels: Array | None) -> None:
        if original is None:
            raise UserError(f"{self.name} compares with the original, which was not given")
        if self._comparison is None:
            self._comparison = Comparison(next(iter(original)))
        name = self._comparison.output
        if name not in outputs:
            raise UserError(
                f"{self.name}: the model has no output '{printable(name)}', which the original has"
            )
        self._comparison.update(_first(original), np.asarray(outputs[name]))

    def result(self) -> float:
        found = None if self._comparison is None else self._comparison.result()
        value = getattr(found, AGREEMENTS[self.name], None)
        if value is None:
            raise UserError(f"{self.name}: not defined for this output; use agreement")
        return float(value)


AGREEMENTS = {"agreement": "top1", "kl": "kl", "cosine": "cosine", "snr": "snr"}
LABELLED: dict[str, Callable[[], Metric]] = {
    "top1": lambda: Top(1),
    "top5": lambda: Top(5),
    "f1": F1,
    "mse": Mse,
}


# --------------------------------------------------------------------------------------------- running


def metric(name: str) -> Callable[[], Metric]:
    """Makes new metrics of a name: top1, top5, f1, mse; agreement, kl, cosine, snr; or `module:function`.

    Raises `UserError` for any other.
    """
    if name in LABELLED:
        return LABELLED[name]
    if name in AGREEMENTS:
        return lambda: Agrees(name)
    if is_function(name):
        judge = function(name)
        return lambda: Custom(name, judge)
    known = ", ".join((*LABELLED, *AGREEMENTS))
    raise UserError(f"metric '{printable(name)}' is not known; take one of {known} or module:function")


def default_metric(data: Data, outputs: Outputs) -> str:
    """The metric for data, from the outputs of the model on its first batch.

    With labels: top1 if they are class numbers that fit the first output, else mse. Without: agreement if that
    output is a distribution, of integers, or of two axes (class scores), cosine otherwise, and for two axes of
    unit length (embeddings).
    """
    output = _first(outputs)
    if data.labelled:
        labels = _given(next(iter(data.batches())).labels, "top1")
        if output.ndim:  # of batches of different sizes, what both have
            output, labels = output[: len(labels)], labels[: len(output)]
        try:
            _classes(labels, scores(output, class_axis(output, labels)), "top1")
        except UserError:
            return "mse"
        return "mse" if labels.dtype.kind == "f" else "top1"
    if output.dtype.kind in "biu" or scores(output, class_axis(output)).distribution:
        return "agreement"
    lengths = np.linalg.norm(output.astype(np.float64), axis=-1) if output.ndim else np.ones(1)
    return "agreement" if output.ndim == 2 and not np.all(np.abs(lengths - 1) < SUM) else "cosine"


def evaluate(
    model: onnx.ModelProto | Model | Path | Runner | Iterable[Outputs],
    data: Data,
    measure: str | Callable[[], Metric],
    *,
    original: onnx.ModelProto | Model | Path | Runner | Iterable[Outputs] | None = None,
    size: int = 16,
) -> float:
    """The metric of a model on data, in batches of up to `size`.

    `original` is for agreement. In place of a model its outputs on these batches will do (`outputs_of`, `Recorded`),
    so that they need not be computed again. Raises `UserError` where labels or the original are missing or a model does not run.
    """
    accumulated = (metric(measure) if isinstance(measure, str) else measure)()
    if accumulated.needs_labels and not data.labelled:
        raise UserError(
            f"{accumulated.name} needs labels and {data.source} has none; use {', '.join(AGREEMENTS)}"
        )
    if accumulated.needs_original and original is None:
        raise UserError(f"{accumulated.name} compares with the original, which was not given")
    made = _answers(model, data)
    wanted = _answers(original, data) if accumulated.needs_original else None
    for batch in data.batches(size):
        accumulated.update(made(batch.feeds), None if wanted is None else wanted(batch.feeds), batch.labels)
    return accumulated.result()


def outputs_of(
    model: onnx.ModelProto | Model | Path | Runner, data: Data, size: int = 16
) -> Iterable[Outputs]:
    """Outputs of each batch, one after the other."""
    runner = _runner(model)
    return (_run(runner, batch.feeds, data) for batch in data.batches(size))


class Recorded:
    """The first output of a model on each batch of data, as often as it is asked for: computed once and kept, up to
    ROOM bytes; what is beyond is computed again."""

    def __init__(self, model: onnx.ModelProto | Model | Path | Runner, data: Data, size: int = 16) -> None:
        self._runner = _runner(model)
        self._data = data
        self._size = size
        self._kept: list[Outputs] = []
        self._room = ROOM
        self._whole = False

    def __iter__(self) -> Iterator[Outputs]:
        ready = list(self._kept)
        yield from ready
        if self._whole:
            return
        for number, batch in enumerate(self._data.batches(self._size)):
            if number < len(self._kept):
                if number >= len(ready):  # somebody else has computed it meanwhile
                    yield self._kept[number]
                continue
            name, value = next(iter(_run(self._runner, batch.feeds, self._data).items()))
            size = getattr(value, "nbytes", self._room + 1)
            if number == len(self._kept) and size <= self._room:
                self._kept.append({name: value})
                self._room -= size
            yield {name: value}
        self._whole = len(self._kept) == number + 1


def compare(
    original: onnx.ModelProto | Model | Path | Runner,
    candidate: onnx.ModelProto | Model | Path | Runner,
    data: Data,
    size: int = 16,
) -> list[Agreement]:
    """Agreement of each output of the original that is a tensor of numbers, in order."""
    before, after = _runner(original), _runner(candidate)
    found: dict[str, Comparison] = {}
    for batch in data.batches(size):
        a, b = _run(before, batch.feeds, data), _run(after, batch.feeds, data)
        for name, value in a.items():
            if not _is_numeric(value):
                continue
            if name not in b:
                raise UserError(f"the model has no output '{printable(name)}', which the original has")
            found.setdefault(name, Comparison(name)).update(value, b[name], batch.count)
    return [comparison.result() for comparison in found.values()]


def _answers(model: Any, data: Data) -> Callable[[Feeds], Outputs]:
    """What gives a model's outputs on each batch, one after the other."""
    if isinstance(model, Iterable):
        waiting = iter(model)
        return lambda _: next(waiting)
    runner = _runner(model)
    return lambda feeds: _run(runner, feeds, data)


def _runner(model: Any) -> Runner:
    if isinstance(model, Model):
        model = model.proto
    if isinstance(model, onnx.ModelProto | Path):
        try:
            return Session(model, optimise="all")
        except RunError as error:
            raise UserError(f"onnxruntime cannot load the model: {error}") from None
    runner: Runner = model
    return runner


def _run(runner: Runner, feeds: Feeds, data: Data) -> Outputs:
    try:
        return runner.run(feeds)
    except RunError as error:
        raise UserError(f"{data.source}: the model does not run on it: {error}") from None
