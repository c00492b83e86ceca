"""Photographs and files that the accuracy tasks are scored on, all from pinned packages."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from models.fetch import fetch

PHOTOGRAPHS = {
    "baboon.jpg": 372,
    "board.jpg": 662,
    "box_in_scene.png": 917,
    "brick.png": 646,
    "camera.png": 872,
    "chelsea.png": 285,
    "chicky_512.png": 154,
    "coffee.png": 967,
    "fruits.jpg": 951,
    "home.jpg": 698,
    "left06.jpg": 918,
    "leuvenA.jpg": 483,
    "licenseplate_motion.jpg": 656,
    "messi5.jpg": 805,
    "moon.png": 111,
    "motorcycle_left.png": 665,
    "orange.jpg": 950,
    "retina.jpg": 619,
    "rocket.jpg": 657,
    "scenetext01.jpg": 919,
    "scenetext02.jpg": 919,
    "scenetext05.jpg": 421,
    "scenetext06.jpg": 498,
    "scenetext_segmented_word01.jpg": 637,
    "scenetext_segmented_word02.jpg": 860,
    "scenetext_segmented_word03.jpg": 921,
    "scenetext_segmented_word05.jpg": 478,
    "smarties.png": 522,
    "squirrel_cls.jpg": 335,
    "sudoku.png": 918,
    "text_defocus.jpg": 922,
}
"""Photographs, and the class that the unpruned EfficientNet-Lite0 finds most likely over twelve views of each, where
it says so in two thirds of them."""

OTHER_PHOTOGRAPHS = (
    "HappyFish.jpg",
    "aero1.jpg",
    "aloeL.jpg",
    "apple.jpg",
    "astronaut.png",
    "basketball1.png",
    "building.jpg",
    "butterfly.jpg",
    "china.jpg",
    "coins.png",
    "ela_original.jpg",
    "flower.jpg",
    "graf1.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "left.jpg",
    "ml.png",
    "page.png",
    "rubberwhale1.png",
    "scenetext03.jpg",
    "scenetext04.jpg",
    "scenetext_segmented_word04.jpg",
    "starry_night.jpg",
    "stuff.jpg",
)
"""Photographs to calibrate on."""


@functools.cache
def photograph(name: str) -> Path:
    """The file of a photograph."""
    opencv = fetch("photographs-opencv")
    folders = (opencv / "data", opencv / "text", fetch("photographs-skimage"), fetch("photographs-sklearn"))
    return next(folder / name for folder in folders if (folder / name).exists())


OBJECTS = (
    "animals",
    "clothes",
    "food",
    "hobbies",
    "household",
    "medical",
    "naturalforces",
    "people",
    "plants",
    "space",
    "sports",
    "town/monuments",
    "vehicles",
)
"""Folders of photographs of single things, cut out."""

LEAST = 150  # pixels of the longer side


@functools.cache
def objects() -> list[Path]:
    """The files of photographs of single things that are large enough, without drawings."""
    folder = fetch("objects")
    paths = sorted(path for name in OBJECTS for path in (folder / name).rglob("*.png"))
    return [path for path in paths if "cartoon" not in path.parts and _longer_side(path) >= LEAST]


def _longer_side(path: Path) -> int:
    with Image.open(path) as file:
        return max(file.size)


# Files

SOURCES = {
    "files-opencv": {
        ".cpp": "cpp",
        ".py": "python",
        ".xml": "xml",
        ".yml": "yaml",
        ".png": "png",
        ".jpg": "jpeg",
    },
    "files-django": {".po": "po", ".html": "html", ".js": "javascript", ".css": "css", ".svg": "svg"},
    "files-go": {".go": "go", ".s": "asm"},
    "files-tcl": {".tcl": "tcl"},
    "files-perl": {".pm": "perl"},
    "fonts": {".ttf": "ttf"},
    "voice-prompts": {".wav": "wav"},
}
"""Types by suffix, in each package."""

ALSO = {"html": ("jinja", "handlebars", "xml"), "cpp": ("c",), "svg": ("xml",), "zip": ("npz",)}
"""Other answers that are right for a type: templates of pages, C++ that is C."""

PER_TYPE = 40
SMALLEST, LARGEST = 64, 1 << 21


def files(part: int) -> Iterator[tuple[str, bytes]]:
    """Types and contents: up to 40 of each type; parts 0 and 1 have none in common."""
    for package, types in SOURCES.items():
        paths = sorted(path for path in fetch(package).rglob("*") if path.is_file())
        for suffix, kind in types.items():
            fitting = [p for p in paths if p.suffix == suffix and SMALLEST <= p.stat().st_size <= LARGEST]
            for path in _spread(fitting[part::2]):
                yield kind, path.read_bytes()
    for kind, make in MADE.items():
        for number in range(PER_TYPE // 2):
            yield kind, make(np.random.default_rng([part, number]))


def _spread(paths: list[Path]) -> list[Path]:
    """At most 40 of them, at equal distances."""
    step = max(1, len(paths) / PER_TYPE)
    return [paths[int(i * step)] for i in range(min(len(paths), PER_TYPE))]


@functools.cache
def _texts() -> list[str]:
    lines = (fetch("wordnet") / "data.noun").read_text(encoding="latin-1").splitlines()
    return [line.partition(" | ")[2].strip() for line in lines if not line.startswith(" ")]


def _some(rng: np.random.Generator, count: int) -> list[str]:
    return [_texts()[i] for i in rng.integers(0, len(_texts()), count)]


def _prose(rng: np.random.Generator) -> bytes:
    return "\n".join(_some(rng, int(rng.integers(20, 200)))).encode()


def _table(rng: np.random.Generator, delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["number", "share", "definition", "kind"])
    for number, text in enumerate(_some(rng, int(rng.integers(20, 100)))):
        writer.writerow([number, f"{rng.random():.4f}", text.partition(";")[0], rng.integers(10)])
    return file.getvalue().encode()


def _json(rng: np.random.Generator) -> bytes:
    rows = [
        {"id": int(rng.integers(1_000_000)), "text": text, "ok": bool(rng.random() < 0.5)}
        for text in _some(rng, 20)
    ]
    return json.dumps({"version": 1, "rows": rows}, indent=int(rng.integers(1, 5))).encode()


def _ini(rng: np.random.Generator) -> bytes:
    lines = []
    for section in range(int(rng.integers(3, 9))):
        lines += [
            f"[section{section}]",
            f"path = /srv/data/{rng.integers(99)}",
            f"limit = {rng.integers(999)}",
        ]
        lines += [f"title = {_some(rng, 1)[0].partition(';')[0]}", ""]
    return "\n".join(lines).encode()


def _zip(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(int(rng.integers(2, 6))):
            archive.writestr(zipfile.ZipInfo(f"notes/{number}.txt"), _prose(rng))
    return file.getvalue()


def _tar(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number in range(int(rng.integers(2, 6))):
            content = _prose(rng)
            entry = tarfile.TarInfo(f"notes/{number}.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def _numbers(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    np.save(file, rng.standard_normal((int(rng.integers(10, 99)), 16)).astype(rng.choice(["f4", "f8"])))
    return file.getvalue()


def _database(rng: np.random.Generator) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notes.db"
        connection = sqlite3.connect(path)
        connection.execute("create table notes (id integer primary key, text text)")
        connection.executemany("insert into notes (text) values (?)", [(text,) for text in _some(rng, 60)])
        connection.commit()
        connection.close()
        return path.read_bytes()


def _picture(rng: np.random.Generator, form: str) -> bytes:
    with Image.open(photograph(str(rng.choice(OTHER_PHOTOGRAPHS)))) as file:
        width, height = (int(side * rng.uniform(0.2, 0.9)) for side in file.size)
        picture = file.convert("RGB").crop((0, 0, width, height))
    stream = io.BytesIO()
    picture.save(stream, form)
    return stream.getvalue()


MADE: dict[str, Callable[[np.random.Generator], bytes]] = {
    "csv": functools.partial(_table, delimiter=","),
    "tsv": functools.partial(_table, delimiter="\t"),
    "json": _json,
    "ini": _ini,
    "zip": _zip,
    "tar": _tar,
    "gzip": lambda rng: gzip.compress(_prose(rng), mtime=0),
    "bzip": lambda rng: bz2.compress(_prose(rng)),
    "xz": lambda rng: lzma.compress(_prose(rng)),
    "npy": _numbers,
    "sqlite": _database,
    "pickle": lambda rng: pickle.dumps({text: len(text) for text in _some(rng, 30)}, protocol=4),
    "gif": functools.partial(_picture, form="GIF"),
    "bmp": functools.partial(_picture, form="BMP"),
    "tiff": functools.partial(_picture, form="TIFF"),
    "webp": functools.partial(_picture, form="WEBP"),
}
"""Files that are made, of numbers, definitions and photographs."""
