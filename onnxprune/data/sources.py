"""Where samples come from: arrays, images, protobufs, data sets and functions."""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import math
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import google.protobuf.message
import numpy as np
import onnx

from onnxprune.data.batches import HELD, SHOWN, Element, Interface
from onnxprune.data.preprocess import SUFFIXES, Pipeline, Preprocess, Unreadable
from onnxprune.errors import UserError, printable
from onnxprune.model import Array, to_array
from onnxprune.runtime import LARGEST

LABELS = ("label", "labels", "y", "target", "targets")
ARRAY, ARCHIVE = b"\x93NUMPY", b"PK\x03\x04"  # how files of one array, and of several, begin
LONGEST = 200  # characters of a name that is compared with others
ALIKE = 0.8  # ratio of `difflib` from which a name is taken for a misspelling of another
TABLES = ("labels.csv", "labels.txt")
LARGEST_FILE = 2**31  # bytes of a protobuf


class Source:
    """Elements that can be read in any order."""

    kind = ""
    unit = "samples"
    pipeline: Pipeline | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.notes: list[str] = []

    def __len__(self) -> int:
        raise NotImplementedError

    def prepare(self, chosen: Sequence[int]) -> None:
        """Told which elements are going to be read."""

    def read(self, index: int) -> Element:
        """Raises `Unreadable` for an element that is to be left out."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------- arrays


class Arrays(Source):
    """Arrays with samples along axis 0: one for each input, and perhaps labels."""

    def __init__(self, name: str, kind: str, interface: Interface, arrays: Mapping[str, Array]) -> None:
        super().__init__(name)
        self.kind = kind
        self._inputs, self._label, self.notes = _roles(name, interface, list(arrays))
        wanted = [*self._inputs.values(), *([self._label] if self._label else [])]
        self._arrays = {key: arrays[key] for key in wanted}
        self._length = _length(name, {key: array.shape for key, array in self._arrays.items()})

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Element:
        feeds = {name: self._arrays[key][index] for name, key in self._inputs.items()}
        label = self._arrays[self._label][index] if self._label else None
        return Element(f"{self.name}, sample {index}", feeds, label)


class Archive(Source):
    """A .npz: its chosen rows are read in one go, so that a file of any size takes their room only."""

    kind = "npz"

    def __init__(self, name: str, path: Path, interface: Interface) -> None:
        super().__init__(name)
        self._path = path
        self._arrays: dict[str, Array] = {}
        self._places: dict[int, int] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                members = {
                    info.filename.removesuffix(".npy"): info.filename
                    for info in archive.infolist()
                    if info.filename.endswith(".npy")
                }
                self._inputs, self._label, self.notes = _roles(name, interface, list(members))
                keys = [*self._inputs.values(), *([self._label] if self._label else [])]
                self._members = {key: members[key] for key in keys}
                shapes = {key: self._header(archive, key)[0] for key in keys}
        except UserError:
            raise
        except Exception as error:  # zipfile's, and those of zlib, bz2 and lzma
            raise self._damaged(error) from None
        self._length = _length(name, shapes)

    def _damaged(self, error: Exception) -> UserError:
        if isinstance(error, PermissionError):
            return UserError(f"{self.name}: cannot be read ({error.strerror})")
        if isinstance(error, zipfile.BadZipFile) and _begins(self._path, ARRAY):
            return UserError(f"{self.name}: is a single array, no archive; call it .npy")
        return UserError(f"{self.name}: cannot be read as .npz ({_line(error)}); write it with numpy.savez")

    def _header(self, archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        info = archive.getinfo(self._members[key])
        with archive.open(info) as file:
            where = f"{self.name}, array '{printable(key)}'"
            shape, fortran, dtype = _npy_header(cast(io.BufferedIOBase, file), where)
            if file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                raise UserError(
                    f"{where}: its values do not fill its shape {list(shape)}; the file is damaged"
                )
            if fortran and len(shape) > 1 and info.file_size > HELD:
                raise UserError(
                    f"{where}: in Fortran order, too large to turn; store it with ascontiguousarray"
                )
        return shape, fortran, dtype

    def __len__(self) -> int:
        return self._length

    def prepare(self, chosen: Sequence[int]) -> None:
        order = sorted(set(chosen))
        self._places = {index: place for place, index in enumerate(order)}
        try:
            with zipfile.ZipFile(self._path) as archive:
                self._arrays = {key: self._read(archive, key, order) for key in self._members}
        except UserError:
            raise
        except Exception as error:  # zipfile's, and those of zlib, bz2 and lzma
            raise self._damaged(error) from None

    def _read(self, archive: zipfile.ZipFile, key: str, order: Sequence[int]) -> Array:
        (count, *row), fortran, dtype = self._header(archive, key)
        with archive.open(self._members[key]) as file:
            _npy_header(cast(io.BufferedIOBase, file), key)
            if fortran and row:
                whole = np.frombuffer(_exactly(file, count * math.prod(row) * dtype.itemsize), dtype)
                return np.ascontiguousarray(whole.reshape([count, *row], order="F")[list(order)])
            size = math.prod(row) * dtype.itemsize
            result = _room((len(order), *row), dtype)
            at = 0
            for place, index in enumerate(order):
                _skip(file, (index - at) * size)
                result[place] = np.frombuffer(_exactly(file, size), dtype).reshape(row)
                at = index + 1
            return result

    def read(self, index: int) -> Element:
        place = self._places[index]
        feeds = {name: self._arrays[key][place] for name, key in self._inputs.items()}
        label = self._arrays[self._label][place] if self._label else None
        return Element(f"{self.name}, sample {index}", feeds, label)


def _npy_header(file: io.BufferedIOBase, where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of a .npy; objects, which are pickled, are refused."""
    try:
        version = np.lib.format.read_magic(file)
        reads = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = reads[version](file)
    except KeyError:
        raise UserError(f"{where}: is of an .npy version that is not known") from None
    except (ValueError, EOFError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise UserError(f"{where}: is no .npy array ({_line(error)})") from None
    if any(extent < 0 for extent in shape) or not dtype.itemsize:
        raise UserError(f"{where}: has the shape {list(shape)} of {dtype}; the file is damaged")
    if dtype.hasobject:
        raise UserError(f"{where}: holds pickled objects, which are not loaded; store plain arrays")
    if not shape:
        raise UserError(f"{where}: is a single number; samples go along axis 0")
    if math.prod(shape[1:]) > LARGEST:
        raise UserError(f"{where}: one sample of shape {list(shape[1:])} is too large to run")
    return shape, fortran, dtype


def mapped(name: str, path: Path) -> Array:
    """A .npy, left on disk."""
    try:
        if _begins(path, ARCHIVE):
            raise UserError(f"{name}: is an archive, no single array; call it .npz")
        with path.open("rb") as file:
            shape, fortran, dtype = _npy_header(file, name)
            offset = file.tell()
            if path.stat().st_size - offset < math.prod(shape) * dtype.itemsize:
                raise UserError(f"{name}: ends before its shape {list(shape)} is filled; the file is damaged")
            if not math.prod(shape):
                return np.zeros(shape, dtype)
            return np.memmap(file, dtype, "r", offset, shape, "F" if fortran else "C")
    except PermissionError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read as .npy ({_line(error)})") from None


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _exactly(file: Any, size: int) -> bytes:
    data: bytes = file.read(size)
    if len(data) < size:
        raise EOFError("ends too early")
    return data


def _skip(file: Any, size: int) -> None:
    while size:
        size -= len(_exactly(file, min(size, 2**20)))


def _room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Memory for an array, in a file without a name where it is large."""
    size = math.prod(shape) * dtype.itemsize
    if size <= HELD:
        return np.empty(shape, dtype)
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", 0, shape)
    except OSError as error:
        where = tempfile.gettempdir()
        raise UserError(
            f"no room for {size:,} bytes in {where} (set TMPDIR to use another): {error}"
        ) from None


def _roles(
    name: str, interface: Interface, keys: Sequence[str], images: Sequence[str] = ()
) -> tuple[dict[str, str], str | None, list[str]]:
    """Array (or column) for each input, that of the labels, and notes on what is not used.

    A single input that no array is named after takes the only array, or the only one of `images`. What is not
    used must not look like a misspelt input or, where there are no labels, like those.
    """
    labels = [key for key in keys if key in LABELS and key not in interface.inputs]
    rest = [key for key in keys if key not in labels]
    if len(labels) > 1:
        raise UserError(f"{name}: both '{labels[0]}' and '{labels[1]}' hold labels; keep one")
    label = labels[0] if labels else None
    chosen = {key: key for key in interface.inputs if key in rest}
    candidates = images or rest
    if len(interface.inputs) == 1 and not chosen and len(candidates) == 1:
        chosen = {next(iter(interface.inputs)): candidates[0]}
    unknown = [key for key in rest if key not in chosen.values()]
    missing = [key for key in interface.inputs if key not in chosen]
    if missing:
        held = ", ".join(f"'{printable(key)}'" for key in keys) or "nothing"
        meant = _like(missing[0], unknown)
        hint = f"; rename '{printable(meant)}' if that is it" if meant else ""
        raise UserError(
            f"{name}: holds {held}, and input '{printable(missing[0])}' of {interface.model} is missing{hint}"
        )
    expected = [*interface.inputs, *(() if label else LABELS)]
    for key in unknown:
        if (meant := _like(key, expected)) is not None:
            known = (
                f"is no input of {interface.model}" if meant in interface.inputs else "is no name of labels"
            )
            raise UserError(
                f"{name}: '{printable(key)}' {known} and looks like a misspelt '{printable(meant)}'; rename or remove it"
            )
    if not unknown:
        return chosen, label, []
    shown = ", ".join(f"'{printable(key)}'" for key in unknown[:SHOWN]) + (", ..." if unknown[SHOWN:] else "")
    return chosen, label, [f"not used, being neither inputs nor labels: {shown}"]


def _like(name: str, others: Sequence[str]) -> str | None:
    """The one of the others that a name may be a misspelling of; `x1` and `x2` are two names."""
    if len(name) > LONGEST:
        return None
    plain = re.sub(r"[0-9]+", "", name).lower()
    distinct = [
        other
        for other in others
        if len(other) <= LONGEST
        and (re.sub(r"[0-9]+", "", other).lower() != plain or other.lower() == name.lower())
    ]
    found = difflib.get_close_matches(name.lower(), [other.lower() for other in distinct], 1, ALIKE)
    return next((other for other in distinct if found and other.lower() == found[0]), None)


def _length(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Samples along axis 0, the same number in each array."""
    for key, shape in shapes.items():
        if not shape:
            raise UserError(f"{name}: '{printable(key)}' is a single number; samples go along axis 0")
        if not math.prod(shape[1:]):
            raise UserError(f"{name}: '{printable(key)}' of shape {list(shape)} holds nothing")
        if shape[0] > LARGEST:
            raise UserError(f"{name}: '{printable(key)}' claims {shape[0]:,} samples; split it")
    lengths = {shape[0] for shape in shapes.values()}
    if len(lengths) > 1:
        found = ", ".join(f"'{printable(key)}' {shape[0]}" for key, shape in shapes.items())
        raise UserError(f"{name}: the arrays hold different numbers of samples: {found}")
    return lengths.pop()


# --------------------------------------------------------------------------------------------- images


class Images(Source):
    """A folder of images. Labels come from a table or from one folder for each class."""

    kind = "images"
    unit = "images"

    def __init__(self, name: str, folder: Path, files: Sequence[Path], pipeline: Pipeline) -> None:
        super().__init__(name)
        self.pipeline = self._pipeline = pipeline
        self._files = files
        self._folder = folder
        self._labels = self._read_labels()

    def _read_labels(self) -> dict[Path, int]:
        for table in TABLES:
            path = self._folder / table
            if path.is_file():
                return self._from_table(path)
        classes = sorted({file.relative_to(self._folder).parts[0] for file in self._files})
        nested = all(len(file.relative_to(self._folder).parts) > 1 for file in self._files)
        if not nested or len(classes) < 2:
            return {}
        numbers = self._numbered(classes, "folders")
        return {file: numbers[file.relative_to(self._folder).parts[0]] for file in self._files}

    def _numbered(self, classes: Sequence[str], what: str) -> dict[str, int]:
        """Names that are numbers are these numbers; other names are numbered from 0 in their order."""
        if all(re.fullmatch(r"[0-9]{1,9}", name) for name in classes):
            return {name: int(name) for name in classes}
        first, last = printable(classes[0]), printable(classes[-1])
        self.notes.append(
            f"labels are the {len(classes)} {what} in order of their names: 0 is '{first}', {len(classes) - 1} is '{last}'"
        )
        return {name: number for number, name in enumerate(classes)}

    def _from_table(self, path: Path) -> dict[Path, int]:
        where = f"{self.name}, {path.name}"
        try:
            rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"{where}: cannot be read ({_line(error)}); it holds lines of file,label"
            ) from None
        rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
        wrong = next((row for row in rows if len(row) != 2), None)
        if wrong is not None or not rows:
            found = f"the line '{printable(','.join(wrong))[:60]}'" if wrong else "nothing"
            raise UserError(f"{where}: holds {found}; each line is file,label")
        listed = [(self._folder / os.path.normpath(file), label) for file, label in rows]
        if listed[0][0] not in self._files and listed[0][1].lower() in ("label", "labels", "class"):
            listed = listed[1:]
        labels = dict(listed)
        missing = [file for file in self._files if file not in labels]
        if missing:
            shown = printable(str(missing[0].relative_to(self._folder)))
            raise UserError(
                f"{where}: {len(missing)} of {len(self._files)} images have no line, such as {shown}"
            )
        numbers = self._numbered(sorted(set(labels.values())), "labels")
        return {file: numbers[labels[file]] for file in self._files}

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Element:
        file = self._files[index]
        where = f"{self.name}{printable(str(file.relative_to(self._folder)))}"
        try:
            pixels = self._pipeline.open(file)
        except Unreadable as error:
            raise Unreadable(f"{where} {error}") from None
        return Element(where, {self._pipeline.input.name: pixels}, self._labels.get(file))


def images_in(folder: Path) -> list[Path]:
    """Image files at any depth, in the order of their paths; hidden ones are left out."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(place, name) for name in files if not name.startswith("."))
        found += (path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise error


# ------------------------------------------------------------------------------------------- protobufs


class Protobufs(Source):
    """ONNX test data: `input_N.pb` in the folder, or in each of its folders `test_data_set_M`."""

    kind = "onnx test data"
    unit = "data sets"

    def __init__(self, name: str, root: Path, folders: Sequence[Path], interface: Interface) -> None:
        super().__init__(name)
        self._root = root
        self._folders = folders
        self._interface = interface

    def __len__(self) -> int:
        return len(self._folders)

    def read(self, index: int) -> Element:
        """Tensors with names of inputs go there, others by the number of the file."""
        folder = self._folders[index]
        where = self.name if folder == self._root else f"{self.name}{printable(folder.name)}/"
        order = list(self._interface.inputs)
        feeds = {}
        for number, path in _numbered(folder, "input"):
            tensor = _tensor(path, f"{where}{path.name}")
            name = tensor.name
            if name not in self._interface.inputs:
                if number >= len(order):
                    raise UserError(
                        f"{where}{path.name}: is one too many; {self._interface.model} has {len(order)} inputs"
                    )
                name = order[number]
            try:
                feeds[name] = to_array(tensor)
            except (ValueError, TypeError, KeyError, IndexError, MemoryError) as error:
                raise UserError(f"{where}{path.name}: the tensor is damaged ({_line(error)})") from None
        return Element(where, feeds)


def data_sets(folder: Path) -> list[Path]:
    """Folders that hold input_N.pb: this one, or its test_data_set_M in order of M."""
    if _numbered(folder, "input"):
        return [folder]
    sets = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(r"test_data_set_([0-9]{1,9})", path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(sets) if _numbered(path, "input")]


def _numbered(folder: Path, kind: str) -> list[tuple[int, Path]]:
    return sorted(
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(rf"{kind}_([0-9]{{1,9}})\.pb", path.name))
    )


def _tensor(path: Path, where: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{where}: is larger than a protobuf can be")
        tensor.ParseFromString(path.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except google.protobuf.message.DecodeError as error:
        raise UserError(f"{where}: is no ONNX tensor ({_line(error)})") from None
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise UserError(f"{where}: points to another file, which is not read")
    if tensor.data_type in (0, onnx.TensorProto.STRING) or any(dim < 0 for dim in tensor.dims):
        raise UserError(f"{where}: is no tensor of numbers")
    return tensor


# -------------------------------------------------------------------------------------- Hugging Face


class Dataset(Source):
    """Rows that `datasets` reads, from a folder of `save_to_disk` or from parquet files: columns by input name; the
    image column goes through `Preprocess`."""

    kind = "datasets"
    unit = "rows"

    def __init__(self, name: str, path: Path, interface: Interface, preprocess: Preprocess | None) -> None:
        super().__init__(name)
        try:
            library = importlib.import_module("datasets")
        except ImportError:
            raise UserError(
                f"{name}: needs the datasets library: pip install 'onnxprune[datasets]'"
            ) from None
        self._rows = _loaded(name, path, library)
        columns = self._rows.features
        pictures = [key for key in columns if isinstance(columns[key], library.Image)]
        self._inputs, self._label, self.notes = _roles(name, interface, list(columns), pictures)
        images = [key for key, column in self._inputs.items() if isinstance(columns[column], library.Image)]
        if len(images) > 1:
            raise UserError(f"{name}: two columns of images; store them as arrays that the model takes")
        self._image = images[0] if images else None
        if self._image is not None:
            self._rows = self._rows.cast_column(self._inputs[self._image], library.Image(decode=False))
            value = interface.inputs[self._image]
            self.pipeline = (preprocess or Preprocess.default(value)).resolve(value, interface.model)
        self._rows = self._rows.select_columns([*self._inputs.values(), *filter(None, [self._label])])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Element:
        where = f"{self.name}, row {index}"
        try:
            row = self._rows[index]
        except Exception as error:  # as above
            raise UserError(f"{where}: cannot be read ({_line(error)})") from None
        feeds: dict[str, Any] = {}
        for name, column in self._inputs.items():
            if name == self._image:
                assert self.pipeline is not None
                try:
                    feeds[name] = self.pipeline.open(_stored_image(row[column]))
                except Unreadable as error:
                    raise Unreadable(f"{where} {error}") from None
            else:
                feeds[name] = _regular(row[column], f"{where}, column '{printable(column)}'")
        label = None if self._label is None else _regular(row[self._label], f"{where}, its label")
        return Element(where, feeds, label)


def parquets(path: Path) -> list[Path]:
    """The file, or the parquet files of a folder or of its folder `data`, in the order of their names."""
    if not path.is_dir():
        return [path] if path.suffix.lower() == ".parquet" else []
    folders = [path, path / "data"]
    found = ([file for file in folder.glob("*.parquet") if file.is_file()] for folder in folders)
    return sorted(next((files for files in found if files), []))


def _loaded(name: str, path: Path, library: Any) -> Any:
    """A `datasets.Dataset`. Raises `UserError` for several splits and for what cannot be loaded."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        named = ", ".join(printable(split) for split in splits) or "none"
        raise UserError(f"{name}: holds several splits; give the folder of one of them: {named}")
    files = [] if (path / "state.json").is_file() else parquets(path)
    splits = sorted({re.split(r"-[0-9]", file.stem)[0] for file in files})
    if len(splits) > 1:
        named = ", ".join(printable(split) for split in splits)
        raise UserError(
            f"{name}: holds parquet files of several splits; give a file, or a folder of one: {named}"
        )
    if sum(file.stat().st_size for file in files) > LARGEST_FILE:
        raise UserError(
            f"{name}: more than 2 GiB of parquet; store it with save_to_disk and give that folder"
        )
    silent = library.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        if not files:
            return library.load_from_disk(str(path)).with_format(None)
        arrow = importlib.import_module("pyarrow")
        tables = [importlib.import_module("pyarrow.parquet").read_table(file) for file in files]
        return library.Dataset(arrow.concat_tables(tables)).with_format(None)
    except Exception as error:  # of the library, Arrow and the file system
        raise UserError(f"{name}: datasets cannot load it ({_line(error)})") from None
    finally:
        if not silent:
            library.enable_progress_bars()


def _stored_image(value: Any) -> io.BytesIO | Path:
    """An image column that is not decoded: the bytes of the file, or where it is."""
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise Unreadable("holds no image")
    return io.BytesIO(value["bytes"]) if value.get("bytes") else Path(value["path"])


def _regular(value: Any, where: str) -> Array:
    try:
        array = np.asarray(value)
    except ValueError:
        raise UserError(f"{where}: holds lists of different lengths; pad them") from None
    if array.dtype == object:
        raise UserError(f"{where}: holds no numbers, or some are missing")
    return array


# ------------------------------------------------------------------------------------------ functions


def function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; modules in the working directory are found, too."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        hint = "; leave the .py out" if module.endswith(".py") else ""
        raise UserError(f"{printable(name)}: cannot import {module} ({_blame(error)}){hint}") from None
    result = getattr(found, attribute, None)
    if not callable(result):
        raise UserError(f"{printable(name)}: the module {module} has no function '{attribute}'")
    return cast(Callable[..., Any], result)


def is_function(spec: str) -> bool:
    """Whether the text has the form `module:function`."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", spec) is not None


def elements(name: str, interface: Interface, made: Iterable[Any]) -> Iterator[Element]:
    """Feeds, (feeds, label) pairs or, for a single input, arrays or (array, label) pairs."""
    place = 0
    waiting = _iterator(name, made)
    while True:
        try:
            item = next(waiting)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:  # of the user's code
            raise UserError(f"{name}: failed at sample {place} ({_blame(error)})") from None
        yield element(f"{name}, sample {place}", interface, item)
        place += 1


def _iterator(name: str, made: Any) -> Iterator[Any]:
    if isinstance(made, Mapping | tuple):
        raise UserError(
            f"{name}: gives one {type(made).__name__}; it must yield feeds or (feeds, label), one sample at a time"
        )
    try:
        return iter(made)
    except TypeError:
        raise UserError(
            f"{name}: gives {type(made).__name__}; it must yield feeds, one sample at a time"
        ) from None


def call(name: str, made: Callable[[], Any]) -> Any:
    """What the user's function returns."""
    try:
        return made()
    except Exception as error:  # of the user's code
        raise UserError(f"{name}: failed ({_blame(error)})") from None


def element(where: str, interface: Interface, item: Any) -> Element:
    """One item that Python code gives."""
    label = None
    if isinstance(item, tuple):
        if len(item) != 2:
            raise UserError(f"{where}: a tuple of {len(item)}; give feeds or (feeds, label)")
        item, label = item
        label = None if label is None else _regular(label, f"{where}, its label")
    if not isinstance(item, Mapping):
        if len(interface.inputs) != 1:
            wanted = ", ".join(f"'{printable(key)}'" for key in interface.inputs)
            raise UserError(f"{where}: a {type(item).__name__}; give a dict of the inputs {wanted}")
        item = {next(iter(interface.inputs)): item}
    feeds = {key: _regular(value, f"{where}, input '{printable(str(key))}'") for key, value in item.items()}
    return Element(where, feeds, label)


class Listed(Source):
    """A list of what a function could yield."""

    kind = "list"

    def __init__(self, name: str, interface: Interface, items: Sequence[Any]) -> None:
        super().__init__(name)
        self._interface = interface
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> Element:
        return element(f"{self.name}, sample {index}", self._interface, self._items[index])


def _line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()))[:160] or type(error).__name__


def _blame(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(error)}"
