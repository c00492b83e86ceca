"""Inputs for calibration and evaluation: found, checked against the model, and fed in batches.

`open_data` reads folders, files and functions; `synthetic` makes inputs up where there are none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.data import sources
from onnxprune.data.batches import SHOWN, Batch, Data, Element, Interface, amount, collect
from onnxprune.data.made_up import synthetic
from onnxprune.data.preprocess import PRESETS, Preprocess, Unreadable
from onnxprune.errors import UserError, printable
from onnxprune.model import Array, Model
from onnxprune.runtime import Feeds
from onnxprune.shapes import Shapes

__all__ = ["PRESETS", "Batch", "Data", "Preprocess", "Spec", "open_data", "synthetic"]

Spec = (
    str
    | os.PathLike[str]
    | Mapping[str, Array]
    | Array
    | Iterable[Feeds | Array]
    | Callable[[], Iterable[Any]]
)


def open_data(
    spec: Spec,
    model: Model,
    shapes: Shapes,
    *,
    samples: int | None = 256,
    seed: int = 0,
    preprocess: Preprocess | None = None,
) -> Data:
    """Data from what `spec` names, checked against the inputs of `model`.

    A path: a folder of images, `.npy`, `.npz`, a folder of ONNX test data, or a Hugging Face data set (the folder
    that `save_to_disk` makes, or parquet). A text `module:function`, a callable: called without arguments, yields
    feeds, (feeds, label) or, for a single input, arrays. A mapping of arrays by input name, an array, a list of
    feeds: as they are.

    An element of the rank of an input is one run with its batch axis, never parted nor joined with others; an
    element of one axis less is one sample. Of sources whose length is known, `samples` are drawn by `seed`
    without replacement; of others the first are taken. None takes all.

    Raises `UserError` for what does not exist, cannot be read or does not fit the model; for data that is
    constant, not finite, or of fewer than two samples.
    """
    if samples is not None and samples < 2:
        raise UserError(f"{samples} samples are too few to measure anything; take 2 or more")
    interface = Interface.of(model, shapes)
    if isinstance(spec, str | os.PathLike):
        text = os.fspath(spec)
        path = Path(text)
        if sources.is_function(text) and not _exists(path):
            return _streamed(printable(text), sources.function(text), interface, samples, preprocess)
        name = printable(text.rstrip("/") + "/" if _is_folder(path) else text)
        return _drawn(name, _located(name, path, interface, preprocess), interface, samples, seed, preprocess)
    if isinstance(spec, np.ndarray):
        spec = {next(iter(interface.inputs)): spec}
    if isinstance(spec, Mapping):
        arrays = {str(key): np.asarray(array) for key, array in spec.items()}
        source: sources.Source = sources.Arrays("arrays", "arrays", interface, arrays)
        return _drawn("arrays", source, interface, samples, seed, preprocess)
    if isinstance(spec, Sequence):
        source = sources.Listed("list", interface, spec)
        return _drawn("list", source, interface, samples, seed, preprocess)
    if callable(spec):
        name = printable(getattr(spec, "__name__", type(spec).__name__))
        return _streamed(name, spec, interface, samples, preprocess)
    name = printable(type(spec).__name__)
    once = spec if isinstance(spec, Iterator) else None
    return _streamed(name, lambda: spec, interface, samples, preprocess, once is not None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _is_folder(path: Path) -> bool:
    return _exists(path) and path.is_dir()


def _located(name: str, path: Path, interface: Interface, preprocess: Preprocess | None) -> sources.Source:
    """What a path holds."""
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        hint = "" if ":" not in name else " (nor is it of the form module:function)"
        raise UserError(f"{name}: does not exist{hint}") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    if not folder:
        if path.suffix.lower() == ".npz":
            return sources.Archive(name, path, interface)
        if path.suffix.lower() == ".npy":
            if len(interface.inputs) > 1:
                wanted = ", ".join(f"'{printable(key)}'" for key in interface.inputs)
                raise UserError(f"{name}: holds one array and {interface.model} takes {wanted}; give an .npz")
            array = sources.mapped(name, path)
            return sources.Arrays(name, "npy", interface, {next(iter(interface.inputs)): array})
        if sources.parquets(path):
            return sources.Dataset(name, path, interface, preprocess)
        raise UserError(
            f"{name}: is not data; give an .npy, an .npz, a folder of images, of ONNX test data or of a data set"
        )
    try:
        os.scandir(path).close()
        if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            return sources.Dataset(name, path, interface, preprocess)
        if found := sources.data_sets(path):
            return sources.Protobufs(name, path, found, interface)
        images = sources.images_in(path)
        if not images and sources.parquets(path):
            return sources.Dataset(name, path, interface, preprocess)
    except OSError as error:
        where = printable(os.fspath(error.filename)) if error.filename else name
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    if not images:
        raise UserError(
            f"{name}: holds no images, no ONNX test data (input_0.pb or test_data_set_0/) and no data set "
            "(save_to_disk, or parquet)"
        )
    if len(interface.inputs) > 1:
        wanted = ", ".join(f"'{printable(key)}'" for key in interface.inputs)
        raise UserError(f"{name}: images fill one input and {interface.model} takes {wanted}; give an .npz")
    (value,) = interface.inputs.values()
    chosen = preprocess or Preprocess.default(value)
    return sources.Images(name, path, images, chosen.resolve(value, interface.model))


def _drawn(
    name: str,
    source: sources.Source,
    interface: Interface,
    samples: int | None,
    seed: int,
    preprocess: Preprocess | None,
) -> Data:
    """Samples of a source of known length, in an order that the seed gives."""
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    source.prepare(order[:samples])
    taken: list[int] = []
    left_out: list[str] = []

    def read() -> Iterator[Element]:
        for index in order:
            try:
                element = source.read(index)
            except Unreadable as error:
                left_out.append(str(error))
                continue
            taken.append(index)
            yield element

    def again() -> Iterator[Element]:
        for index in taken:
            try:
                yield source.read(index)
            except Unreadable as error:
                raise UserError(f"{error}; it could be read before") from None

    def notes() -> list[str]:
        found = list(source.notes)
        if source.pipeline is not None:
            guess = "" if preprocess else ", a guess: see --preprocess"
            found.append(f"images are preprocessed as {source.pipeline}{guess}")
        if left_out:
            shown = "; ".join(left_out[:SHOWN]) + ("; ..." if len(left_out) > SHOWN else "")
            found.append(f"{amount(len(left_out), len(left_out), source.unit)} left out: {shown}")
        return found + _unused(preprocess, source.pipeline is not None)

    def counted() -> Iterator[Element]:
        yield from read()
        if not taken and left_out:
            raise UserError(f"{name}: none of {len(left_out)} {source.unit} can be used; {left_out[0]}")

    settings = None if source.pipeline is None else source.pipeline.report()
    return collect(
        interface,
        counted(),
        again,
        samples,
        measured=True,
        name=name,
        unit=source.unit,
        notes=notes,
        provenance={"kind": source.kind, "seed": seed, "available": len(source), "preprocess": settings},
    )


def _streamed(
    name: str,
    make: Callable[[], Iterable[Any]],
    interface: Interface,
    samples: int | None,
    preprocess: Preprocess | None,
    once: bool = False,
) -> Data:
    """The first samples of what a function gives."""

    def read() -> Iterator[Element]:
        return sources.elements(name, interface, sources.call(name, make))

    return collect(
        interface,
        read(),
        None if once else read,
        samples,
        measured=True,
        name=name,
        unit="samples",
        notes=_unused(preprocess, False),
        provenance={"kind": "function", "seed": None, "available": None, "preprocess": None},
    )


def _unused(preprocess: Preprocess | None, images: bool) -> list[str]:
    if preprocess is None or images:
        return []
    return ["the preprocessing was not applied: arrays are taken as they are"]
