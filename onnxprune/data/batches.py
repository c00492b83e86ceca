"""Samples checked against the inputs of a model, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxprune.errors import UserError, printable
from onnxprune.model import Array, Model
from onnxprune.runtime import LARGEST, Feeds
from onnxprune.shapes import Shapes
from onnxprune.sizes import dim_key, is_dynamic

HELD = 2**29  # bytes of samples that are kept; more are read again on each pass
SHOWN = 3  # of things left out, those that are named
FEW = 32  # samples below which the user is told
RUNS = 4  # of several samples, below which the user is told: `statistics` holds one in four out
WHOLE = ("data sets",)  # units that are runs, of one sample or of more


@dataclass(frozen=True)
class Batch:
    """Inputs of one run. `labels`, if there are any, have one row for each of the `count` samples."""

    feeds: Feeds
    labels: Array | None
    count: int


@dataclass(frozen=True)
class Element:
    """What a source holds at one place: raw inputs by name and perhaps a label; `where` is for messages."""

    where: str
    feeds: Mapping[str, Any]
    label: Any = None


@dataclass(frozen=True)
class Sample:
    """An element that fits the model: one sample without the batch axis, or `whole`, a run of `count`."""

    feeds: Feeds
    label: Array | None
    count: int
    whole: bool

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.feeds.values()) + (0 if self.label is None else self.label.nbytes)

    def digest(self) -> bytes:
        state = hashlib.sha256()
        for name, array in [*sorted(self.feeds.items()), ("", self.label)]:
            if array is not None:
                state.update(f"{name}\0{array.dtype}{array.shape}\0".encode())
                state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return state.digest()


@dataclass(frozen=True)
class Input:
    """An input of the model: element type and extents, None where they are open."""

    name: str
    dtype: np.dtype[Any]
    dims: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('?' if d is None else str(d) for d in self.dims)}]"


@dataclass(frozen=True)
class Interface:
    """The inputs of a model and how samples make a run of it.

    `batch` is None where samples cannot be stacked (each element of the data is one whole run), 0 where any
    number can, and otherwise the number of samples that each run takes.

    Axis 0 is the batch where it is open in all inputs, under one name or none; or where it has one and the
    same fixed extent in all inputs. An open batch that the graph accepts at one size only is of that size.
    """

    model: str
    inputs: dict[str, Input] = field(default_factory=dict)
    batch: int | None = None

    @classmethod
    def of(cls, model: Model, shapes: Shapes) -> Interface:
        """Raises `UserError` for inputs that are no tensors of numbers of a stated rank."""
        inputs = {}
        for value in model.inputs:
            tensor = value.type.tensor_type
            name = printable(value.name)
            if not value.type.HasField("tensor_type") or tensor.elem_type in (0, onnx.TensorProto.STRING):
                raise UserError(f"{model.name}: input '{name}' is no tensor of numbers, so no data fits it")
            if not tensor.HasField("shape"):
                raise UserError(f"{model.name}: the rank of input '{name}' is not stated, so no data fits it")
            dims = tuple(None if is_dynamic(d) else d.dim_value for d in tensor.shape.dim)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            inputs[value.name] = Input(value.name, np.dtype(dtype), dims)
        if not inputs:
            raise UserError(f"{model.name}: has no inputs, so there is nothing to feed")
        return cls(model.name, inputs, _batch(model, shapes))

    def fit(self, element: Element) -> tuple[Sample, bool]:
        """The element as the model takes it, and whether integers became floats on the way.

        Raises `UserError` for names, ranks, shapes and types that do not fit, and for NaN and infinity.
        """
        self._check_names(element)
        ranks = {name: np.ndim(array) for name, array in element.feeds.items()}
        whole = all(ranks[name] == len(value.dims) for name, value in self.inputs.items())
        part = self.batch is not None and all(
            ranks[name] == len(value.dims) - 1 for name, value in self.inputs.items()
        )
        feeds: Feeds = {}
        raised = False
        for name, value in self.inputs.items():
            array = np.asarray(element.feeds[name])
            where = f"{element.where}: input '{printable(name)}'"
            if not _kind(array.dtype):
                raise UserError(f"{where} holds {array.dtype}, no numbers")
            wanted = value.dims[1:] if part and not whole else value.dims
            if whole and self.batch is not None:
                wanted = (None, *value.dims[1:])  # how many there are, `_count` looks at
            if not (whole or part) or not _matches(array.shape, wanted):
                raise UserError(self._misfit(element, array, value))
            feeds[name], cast = _converted(array, value, where)
            raised |= cast
        count = 1
        if whole and self.batch is not None:
            count = self._count(element, feeds)
        label = _label(element, count, whole)
        for array in (*feeds.values(), *([] if label is None else [label])):
            array.flags.writeable = False  # they are fed again in the next pass
        return Sample(feeds, label, count, whole), raised

    def _count(self, element: Element, feeds: Feeds) -> int:
        """The samples of a run with its batch axis, if the model takes that many at a time."""
        counts: dict[str, int] = {name: array.shape[0] for name, array in feeds.items()}
        count = next(iter(counts.values()))
        if len(set(counts.values())) > 1:
            held = ", ".join(f"'{printable(name)}' {n}" for name, n in counts.items())
            raise UserError(f"{element.where}: inputs hold different numbers of samples: {held}")
        if not count:
            raise UserError(f"{element.where}: holds no samples, its batch axis has the extent 0")
        if self.batch not in (0, count):
            raise UserError(
                f"{element.where}: holds a batch of {count}, and {self.model} runs on batches of {self.batch} only; "
                "give batches of that size, or single samples without the batch axis"
            )
        return count

    def _check_names(self, element: Element) -> None:
        known = ", ".join(f"'{printable(name)}'" for name in self.inputs)
        for name in element.feeds:
            if name not in self.inputs:
                raise UserError(
                    f"{element.where}: '{printable(str(name))}' is no input of {self.model}; these are: {known}"
                )
        for name in self.inputs:
            if name not in element.feeds:
                raise UserError(
                    f"{element.where}: input '{printable(name)}' of {self.model} is missing; give it for each sample"
                )

    def _misfit(self, element: Element, array: Array, value: Input) -> str:
        text = f"{element.where}: input '{printable(value.name)}' has the shape {list(array.shape)}; {self.model} "
        if self.batch is None:
            return text + f"takes {value}, and each element of the data is one whole run"
        sample = Input(value.name, value.dtype, value.dims[1:])
        return text + f"takes {sample} for one sample or {value} for a run"


def _batch(model: Model, shapes: Shapes) -> int | None:
    if not all(v.type.tensor_type.shape.dim for v in model.inputs):
        return None
    dims = [v.type.tensor_type.shape.dim[0] for v in model.inputs]
    if not any(map(is_dynamic, dims)):
        return int(dims[0].dim_value) if len({d.dim_value for d in dims}) == 1 and dims[0].dim_value else None
    if not all(map(is_dynamic, dims)) or len({d.dim_param for d in dims if d.dim_param}) > 1:
        return None
    keys = [dim_key(v.name, 0, dim) for v, dim in zip(model.inputs, dims, strict=True)]
    sizes = {shapes.sizes.get(key) for key in keys}
    if shapes.other is not None and any(shapes.other.sizes.get(k) != shapes.sizes.get(k) for k in keys):
        return 0
    size = sizes.pop() if len(sizes) == 1 and not shapes.failed else None
    return size or 1


def _matches(shape: Sequence[int], dims: Sequence[int | None]) -> bool:
    return len(shape) == len(dims) and all(d is None or d == n for n, d in zip(shape, dims, strict=True))


def _converted(array: Array, value: Input, where: str) -> tuple[Array, bool]:
    """The array in the input's type, and whether integers became floats. Values are kept, but that floats
    may be rounded to narrower floats."""
    if array.size > LARGEST:
        raise UserError(f"{where} of shape {list(array.shape)} is too large to run")
    have, want = _kind(array.dtype), _kind(value.dtype)
    if have == "float" and want != "float":
        raise UserError(f"{where} holds {array.dtype} and takes {value.dtype}; convert it where it is made")
    if have == "float" and not np.isfinite(array.astype(np.float64)).all():
        raise UserError(f"{where} holds NaN or infinite values; leave the sample out or mend it")
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(value.dtype, order="C")  # a copy: the source may change its own
    if have == "float":
        if not np.isfinite(result.astype(np.float64)).all():
            raise UserError(f"{where} holds values too large for {value.dtype}")
    elif array.dtype != value.dtype and not _same(array, result):
        raise UserError(f"{where} holds {array.dtype} values that {value.dtype} cannot hold")
    return result, have == "integer" and want == "float"


def _same(before: Array, after: Array) -> bool:
    if _kind(after.dtype) == "float":
        after = after.astype(np.float64)
        exact: bool = np.array_equal(before.astype(np.float64), after) and bool(
            np.all(np.abs(after) < 2.0**53)
        )
        return exact
    if after.dtype.kind == "V":  # four bits and the like
        after = after.astype(np.int64)
    return np.array_equal(before, after)  # numpy compares integers of different widths by value


def _kind(dtype: np.dtype[Any]) -> str:
    """float, integer (booleans, too) or nothing; bfloat16 and the like are floats."""
    if dtype.kind in "biu":
        return "integer"
    if dtype.kind == "f":
        return "float"
    try:
        return {"f": "float", "i": "integer", "u": "integer"}.get(_custom(dtype), "")
    except (TypeError, ValueError):
        return ""


def _custom(dtype: np.dtype[Any]) -> str:
    import ml_dtypes

    if dtype.kind != "V" or dtype.names is not None or dtype.type.__module__ != ml_dtypes.__name__:
        return ""
    return "i" if dtype.name.startswith(("int", "uint")) else "f"


def _label(element: Element, count: int, whole: bool) -> Array | None:
    """The label of a sample, or the labels of a whole run, one row each."""
    if element.label is None:
        return None
    label = np.asarray(element.label)
    if not _kind(label.dtype):
        raise UserError(
            f"{element.where}: the label holds {label.dtype}, no numbers; number the classes from 0"
        )
    if not np.isfinite(label.astype(np.float64)).all():
        raise UserError(f"{element.where}: the label holds NaN or infinite values")
    if whole and label.shape[:1] != (count,):
        if count > 1:
            raise UserError(
                f"{element.where}: {count} samples and labels of shape {list(label.shape)}; give one row for each"
            )
        label = label[None]
    return label.copy()


class Data:
    """Samples for calibration or evaluation, the same in each pass.

    `source` names them for reports; `measured` is False where they are made up; `notes` are for the user;
    `provenance` is what a report remembers. Build with `open_data` or `synthetic`.
    """

    def __init__(
        self,
        interface: Interface,
        again: Callable[[], Iterator[Sample]],
        digests: Sequence[bytes],
        counts: Sequence[int],
        held: Sequence[Sample] | None,
        *,
        labelled: bool,
        measured: bool,
        name: str,
        unit: str,
        notes: Sequence[str],
        provenance: Mapping[str, Any],
    ) -> None:
        self._interface = interface
        self._again = again
        self._digests = tuple(digests)
        self._counts = tuple(counts)
        self._held = held
        self._name = name
        self._unit = unit
        self._settings = dict(provenance)
        self.labelled = labelled
        self.measured = measured
        self.notes: tuple[str, ...] = tuple(notes)
        self.source = f"{name} ({amount(len(self._counts), len(self), unit)})"
        whole = hashlib.sha256(b"".join(self._digests)).hexdigest()
        self.provenance: dict[str, Any] = {**self._settings, "samples": len(self), "sha256": whole}

    def __len__(self) -> int:
        """The number of samples."""
        return sum(self._counts)

    def subset(self, count: int) -> Data:
        """The first `count` samples, or a few less where several make one run that cannot be parted; one run at
        least, whatever it takes."""
        batch = self._interface.batch
        one = max(batch or 0, self._counts[0])
        taken = _taken(self._counts, count, batch) or _taken(self._counts, one, batch)
        return self._only(range(taken), self._again)

    def part(self, size: int, chosen: Callable[[int], bool]) -> Data | None:
        """The samples of those batches of up to `size` (see `batches`) whose number is chosen; None: there are none."""
        places: list[int] = []
        first = 0
        for number, run in enumerate(self._runs(size)):
            if chosen(number):
                places += range(first, first + len(run))
            first += len(run)
        if not places:
            return None
        inside = frozenset(places)
        return self._only(
            places, lambda: (sample for place, sample in enumerate(self._samples()) if place in inside)
        )

    def _only(self, places: Sequence[int], again: Callable[[], Iterator[Sample]]) -> Data:
        """The samples at these places, which `again` gives, and perhaps more behind them."""
        return Data(
            self._interface,
            again,
            [self._digests[place] for place in places],
            [self._counts[place] for place in places],
            None if self._held is None else [self._held[place] for place in places],
            labelled=self.labelled,
            measured=self.measured,
            name=self._name,
            unit=self._unit,
            notes=self.notes,
            provenance=self._settings,
        )

    def batches(self, size: int = 16) -> Iterator[Batch]:
        """Runs of up to `size` samples, in order: consecutive ones of equal shapes are stacked.

        A model with a fixed batch gets just that many; an element that is a whole run stays one.
        """
        for run in self._runs(size):
            whole = run[0].whole
            yield Batch(dict(run[0].feeds), run[0].label, run[0].count) if whole else _stacked(run)

    def _runs(self, size: int) -> Iterator[list[Sample]]:
        limit = self._interface.batch or (size if self._interface.batch == 0 else 1)
        waiting: list[Sample] = []
        for sample in self._samples():
            if waiting and (len(waiting) == limit or _form(sample) != _form(waiting[0])):
                yield waiting
                waiting = []
            if sample.whole:
                yield [sample]
            else:
                waiting.append(sample)
        if waiting:
            yield waiting

    def _samples(self) -> Iterator[Sample]:
        if self._held is not None:
            yield from self._held
            return
        found = 0
        for sample, digest in zip(self._again(), self._digests, strict=False):
            if sample.digest() != digest:
                break
            found += 1
            yield sample
        if found < len(self._digests):
            raise UserError(f"{self.source}: gives other data than when it was opened; it must be repeatable")


def amount(elements: int, samples: int, unit: str) -> str:
    """So many elements of a source, and their samples where these are not the same: "3 data sets, 12 samples"."""
    if unit not in WHOLE and elements == samples:
        return _counted(elements, unit)
    return f"{_counted(elements, 'runs' if unit == 'samples' else unit)}, {_counted(samples, 'samples')}"


def _counted(number: int, units: str) -> str:
    return f"{number} {units.removesuffix('s') if number == 1 else units}"


def _form(sample: Sample) -> tuple[Any, ...]:
    shapes = tuple(array.shape for array in sample.feeds.values())
    return (sample.whole, shapes, None if sample.label is None else sample.label.shape)


def _stacked(samples: Sequence[Sample]) -> Batch:
    feeds = {name: np.stack([s.feeds[name] for s in samples]) for name in samples[0].feeds}
    labels = [s.label for s in samples if s.label is not None]
    return Batch(feeds, np.stack(labels) if labels else None, len(samples))


def _taken(counts: Sequence[int], limit: int, batch: int | None) -> int:
    """Of elements of so many samples, how many make up at most `limit`, in full runs of a fixed batch."""
    taken = total = 0
    for count in counts:
        if total + count > limit:
            break
        total += count
        taken += 1
    if batch and batch > 1:
        while taken and sum(counts[:taken]) % batch:
            taken -= 1
    return taken


def collect(
    interface: Interface,
    elements: Iterable[Element],
    again: Callable[[], Iterator[Element]] | None,
    samples: int | None,
    *,
    measured: bool,
    name: str,
    unit: str,
    notes: Sequence[str] | Callable[[], Sequence[str]],
    provenance: Mapping[str, Any],
) -> Data:
    """Read the elements once, check them and keep them where they are few.

    `again` gives the same elements anew, those that are taken first; None where it cannot be done.
    """
    held: list[Sample] | None = []
    size = 0
    digests: list[bytes] = []
    counts: list[int] = []
    forms: list[tuple[Any, ...]] = []
    labelled = 0
    check = _Variety()
    scaled = False
    for element in elements:
        sample, raised = interface.fit(element)
        if digests and sum(counts) + sample.count > (samples or 2**62):
            break
        scaled |= raised
        check.add(sample)
        digests.append(sample.digest())
        counts.append(sample.count)
        forms.append(() if sample.whole else _form(sample))
        labelled += sample.label is not None
        size += sample.nbytes
        if held is not None:
            held.append(sample)
        if size > HELD and held is not None:
            if again is None:
                raise UserError(
                    f"{name}: more than {HELD >> 20} MiB that can be read once only; give a list or a function"
                )
            held = None
        if samples is not None and sum(counts) >= samples:
            break
    total = sum(counts)
    held_in_all = amount(len(counts), total, unit)
    if total < 2:
        wanted = "2 samples" if unit in WHOLE else "2"
        raise UserError(
            f"{name}: holds {held_in_all}; at least {wanted} are needed, and {FEW} or more are better"
        )
    if 0 < labelled < len(counts):
        raise UserError(f"{name}: {labelled} of {len(counts)} {unit} have a label; give all or none one")
    if measured:
        check.refuse(name, unit)
    found = [*(notes() if callable(notes) else notes)]
    batch = interface.batch
    taken = _taken(counts, total, batch)
    if taken < len(counts):
        if not taken:
            raise UserError(f"{name}: {held_in_all}; {interface.model} takes {batch} at a time, no fewer")
        left = amount(len(counts) - taken, total - sum(counts[:taken]), unit)
        found.append(f"left out at the end: {left}, since runs take {batch} at a time")
    if batch and batch > 1 and any(len(set(forms[i : i + batch])) > 1 for i in range(0, taken, batch)):
        raise UserError(
            f"{name}: {unit} of different shapes; {interface.model} takes {batch} at a time, of one shape"
        )
    if measured and total < FEW:
        found.append(f"only {held_in_all}: statistics of so few are rough; {FEW} samples or more are better")
    runs = len(counts)
    if measured and batch == 0 and total >= max(FEW, runs + 1) and runs < RUNS and not any(forms):
        found.append(
            f"{_counted(total, 'samples')} in {_counted(runs, 'runs')}, which are not parted: repair is judged on one run "
            f"in {RUNS}; give more, or samples without the batch axis"
        )
    if scaled:
        found.append("integers were taken for floats as they are, not scaled")
    found += check.notes()

    def repeated() -> Iterator[Sample]:
        assert again is not None
        return (interface.fit(element)[0] for element in again())

    return Data(
        interface,
        repeated,
        digests[:taken],
        counts[:taken],
        None if held is None else held[:taken],
        labelled=bool(labelled),
        measured=measured,
        name=name,
        unit=unit,
        notes=found,
        provenance=provenance,
    )


class _Variety:
    """Whether samples differ at all, and whether a single input does."""

    def __init__(self) -> None:
        self.first: dict[str, bytes] = {}
        self.alike = True  # every sample is the first one
        self.flat = True  # no sample has two different values in any input
        self.single: dict[str, Any] = {}  # the only value of an input so far, None where it has several

    def add(self, sample: Sample) -> None:
        for name, array in sample.feeds.items():
            rows = array if sample.whole and sample.count > 1 else array[None]
            for row in rows:
                data = f"{row.shape}".encode() + np.ascontiguousarray(row).tobytes()
                if self.alike and self.first.setdefault(name, data) != data:
                    self.alike = False
                if self.flat and not (row.size > 1 and (row == row.flat[0]).all()):
                    self.flat = False
            values = array.reshape(-1)
            value = values[0] if values.size and (values == values[0]).all() else None
            known = self.single.setdefault(name, value)
            if known is not None and (value is None or value != known):
                self.single[name] = None

    def refuse(self, name: str, unit: str) -> None:
        if self.alike:
            raise UserError(f"{name}: all {unit} are identical; data without variety measures nothing")
        if self.flat:
            raise UserError(f"{name}: each of the {unit} holds one value only; it is constant, not data")

    def notes(self) -> list[str]:
        return [
            f"input '{printable(name)}' is {value} in every sample"
            for name, value in self.single.items()
            if value is not None
        ]
