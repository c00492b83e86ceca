"""Accuracy tasks: a trained model, 256 unlabelled inputs to calibrate on, and a score in points from 0 to 100.

    python -m benchmarks.tasks                               # every task, the original models
    python -m benchmarks.tasks fashion-resnet MODEL.onnx     # one task, another model for it

Everything comes from `models/fetch.py`. What a task calibrates on is never what it is scored on: other pictures,
recordings, words or seeds. Texts and pictures are drawn with Pillow.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import re
import string
import time
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from benchmarks import samples
from models.builder import Array
from models.fetch import fetch

Feeds = dict[str, Array]
Floats = NDArray[np.float32]
CALIBRATION = 256


@dataclass(frozen=True)
class Score:
    """Points from 0 (or below: worse than doing nothing) to 100, of how many samples; other figures beside it."""

    points: float
    samples: int
    beside: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A model and what it is good for.

    kind         wide networks lose little when pruned; compact ones have little to lose
    measure      what the points are
    model        the unpruned model
    calibration  256 feeds of one sample each, without labels
    evaluate     the score of a model file
    apart        feeds that cannot be put side by side along their first axis
    """

    name: str
    kind: Literal["wide", "compact"]
    measure: str
    model: Callable[[], Path]
    calibration: Callable[[], list[Feeds]]
    evaluate: Callable[[Path], Score]
    apart: bool = False

    def write_calibration(self, path: Path) -> None:
        """Save the feeds as .npz, by input name: samples along the first axis, or, if they stand apart, in one
        more axis in front."""
        feeds = self.calibration()
        join = np.stack if self.apart else np.concatenate
        arrays: dict[str, Any] = {name: join([feed[name] for feed in feeds]) for name in feeds[0]}
        np.savez(path, **arrays)


class Model:
    """A session on one thread."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self._session.get_inputs()]

    def __call__(self, **feeds: Array) -> Array:
        """The first output."""
        result: Array = self._session.run(None, feeds)[0]
        return result


TASKS: dict[str, Task] = {}
"""Tasks by name."""


def _add(*args: object, **options: object) -> None:
    task = Task(*args, **options)  # type: ignore[arg-type]
    TASKS[task.name] = task


# Fashion-MNIST: trained here, labels exact, the 10,000 pictures of the test part


@functools.cache
def _fashion(part: str) -> tuple[Floats, Array]:
    folder = fetch("fashion-mnist")
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return images.astype(np.float32) / np.float32(255), np.frombuffer(labels, np.uint8, offset=8).astype(
        np.int64
    )


def fashion_calibration() -> tuple[Floats, Array]:
    """256 pictures of the training part, with the labels that only gradients need."""
    images, labels = _fashion("train")
    chosen = np.sort(np.random.default_rng(0).choice(len(images), CALIBRATION, replace=False))
    return images[chosen], labels[chosen]


def _fashion_feeds() -> list[Feeds]:
    return [{"image": image[None]} for image in fashion_calibration()[0]]


def _fashion_score(path: Path) -> Score:
    model, (images, labels) = Model(path), _fashion("t10k")
    right = 0
    for start in range(0, len(images), 250):
        answers = model(image=images[start : start + 250]).argmax(1)
        right += int((answers == labels[start : start + 250]).sum())
    return Score(100 * right / len(images), len(images))


for _name, _kind in (
    ("fashion-resnet", "wide"),
    ("fashion-vgg", "wide"),
    ("fashion-densenet", "wide"),
    ("fashion-vit", "wide"),
    ("fashion-gru", "wide"),
    ("fashion-mobilenet-se", "compact"),
):
    _add(
        _name,
        _kind,
        "test accuracy",
        functools.partial(lambda name: fetch(name) / f"{name}.onnx", _name),
        _fashion_feeds,
        _fashion_score,
    )


# ImageNet: views of photographs; the label of a photograph is what the unpruned model says of all its views together


def _views(names: Iterable[str], count: int, seed: int) -> Iterator[Floats]:
    """Views [3, 224, 224] in [-1, 1], each another part of a photograph, some mirrored, lighter or darker."""
    rng = np.random.default_rng(seed)
    for name in names:
        with Image.open(samples.photograph(name)) as file:
            photograph = file.convert("RGB")
        for _ in range(count):
            share, stretch = rng.uniform(0.65, 1.0), rng.uniform(0.9, 1.11)
            side = np.sqrt(share) * min(photograph.size)
            width, height = (
                min(side * s, m) for s, m in zip((stretch, 1 / stretch), photograph.size, strict=True)
            )
            left, top = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
            view = photograph.resize(
                (224, 224), Image.Resampling.BICUBIC, (left, top, left + width, top + height)
            )
            pixels = np.asarray(view, np.float32) * rng.uniform(0.8, 1.2) + rng.uniform(-12, 12)
            pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
            yield np.ascontiguousarray((pixels.clip(0, 255) - 127).transpose(2, 0, 1) / 128, np.float32)


VIEWS = 16


def _pasted(paths: Sequence[Path], seed: int) -> Iterator[Floats]:
    """Things [3, 224, 224] in [-1, 1], each in front of a part of a photograph."""
    rng = np.random.default_rng(seed)
    for path in paths:
        with Image.open(samples.photograph(str(rng.choice(samples.OTHER_PHOTOGRAPHS)))) as file:
            behind = file.convert("RGB")
        with Image.open(path) as file:
            thing = file.convert("RGBA")
        side = min(behind.size) * np.sqrt(rng.uniform(0.1, 1.0))
        left, top = (rng.uniform(0, length - side) for length in behind.size)
        picture = behind.resize((224, 224), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        scale = 224 * rng.uniform(0.5, 1.1) / max(thing.size)
        width, height = (max(round(length * scale), 1) for length in thing.size)
        thing = thing.resize((width, height), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        corner = [int(rng.integers(min(0, 224 - n), max(0, 224 - n) + 1)) for n in (width, height)]
        picture.paste(thing, (corner[0], corner[1]), thing)
        yield np.ascontiguousarray(
            (np.asarray(picture, np.float32) - 127).transpose(2, 0, 1) / 128, np.float32
        )


def _imagenet_feeds() -> list[Feeds]:
    """Every thing once, and views of the photographs: with views of 26 photographs alone every pruner fits those."""
    pasted = list(_pasted(samples.objects(), 1))
    count = -(-(CALIBRATION - len(pasted)) // len(samples.OTHER_PHOTOGRAPHS))
    views = list(_views(samples.OTHER_PHOTOGRAPHS, count, 1))
    mixed = [*pasted, *views]
    return [{"image": mixed[i][None]} for i in np.random.default_rng(2).permutation(len(mixed))[:CALIBRATION]]


def _imagenet_score(path: Path) -> Score:
    model, right, seen = Model(path), 0, 0
    labels = np.repeat(list(samples.PHOTOGRAPHS.values()), VIEWS)
    batch: list[Floats] = []
    for view in _views(samples.PHOTOGRAPHS, VIEWS, 0):
        batch.append(view)
        if len(batch) == VIEWS:
            answers = model(image=np.stack(batch)).argmax(1)
            right += int((answers == labels[seen : seen + VIEWS]).sum())
            seen, batch = seen + VIEWS, []
    return Score(100 * right / seen, seen)


_add(
    "efficientnet-lite0",
    "compact",
    "top-1 on views of photographs, labelled by the unpruned model's answer to all views of one",
    functools.partial(fetch, "efficientnet-lite0"),
    _imagenet_feeds,
    _imagenet_score,
)


# Text: rendered lines, exact


@functools.cache
def _nouns() -> list[str]:
    lines = (fetch("wordnet") / "index.noun").read_text(encoding="latin-1").splitlines()
    nouns = {line.split(" ", 1)[0] for line in lines if not line.startswith(" ")}
    return sorted(word for word in nouns if re.fullmatch("[a-z]{3,9}", word))


def _text(rng: np.random.Generator) -> str:
    def word() -> str:
        return str(rng.choice(_nouns()))

    match rng.integers(4):
        case 0:
            return f"{word()} {word()}"
        case 1:
            return f"{word().capitalize()} {rng.integers(10, 100_000)}"
        case 2:
            return f"{rng.integers(1, 29):02}.{rng.integers(1, 13):02}.{rng.integers(1950, 2050)}"
        case _:
            return "".join(rng.choice(list(string.ascii_letters + string.digits), rng.integers(5, 11)))


def _lines(count: int, seed: int) -> Iterator[tuple[str, Floats]]:
    """Texts and their pictures [3, 48, 320] in [-1, 1]: slanted, blurred and noisy, grey behind their end."""
    rng = np.random.default_rng(seed)
    fonts = sorted(fetch("fonts").glob("*.ttf"))
    for _ in range(count):
        text = _text(rng)
        font = ImageFont.truetype(str(fonts[rng.integers(len(fonts))]), int(rng.integers(16, 32)))
        right, bottom = font.getbbox(text)[2:]
        paper = int(rng.integers(170, 256))
        picture = Image.new("L", (int(right) + 16, int(bottom) + 12), paper)
        ImageDraw.Draw(picture).text((8, 5), text, font=font, fill=int(rng.integers(0, 90)))
        picture = picture.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BILINEAR, fillcolor=paper)
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
        grain = rng.normal(0, rng.uniform(0, 14), picture.size[::-1])
        noisy = Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))
        width = min(320, round(48 * noisy.width / noisy.height))
        line = np.asarray(noisy.resize((width, 48), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
        yield text, np.repeat(np.pad(line, ((0, 0), (0, 320 - width)))[None], 3, axis=0)


@functools.cache
def _characters() -> list[str]:
    """What each class of the reader stands for: blank first, a space last."""
    metadata = onnx.load(fetch("ppocr-rec")).metadata_props
    (listed,) = (entry.value for entry in metadata if entry.key == "character")
    return ["", *listed.splitlines(), " "]


def distance(a: str, b: str) -> int:
    """Insertions, removals and replacements between two texts (Levenshtein, 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def _ocr_feeds() -> list[Feeds]:
    return [{"x": picture[None]} for _, picture in _lines(CALIBRATION, 1)]


def _ocr_score(path: Path) -> Score:
    model, known = Model(path), _characters()
    lines = list(_lines(300, 0))
    wrong = characters = exact = 0
    for start in range(0, len(lines), 20):
        part = lines[start : start + 20]
        for (text, _), classes in zip(part, model(x=np.stack([p for _, p in part])).argmax(2), strict=True):
            changed = classes[np.concatenate(([True], classes[1:] != classes[:-1]))]
            read = "".join(known[i] for i in changed if i < len(known))
            wrong += min(distance(read, text), len(text))
            characters += len(text)
            exact += read == text
    return Score(100 * (1 - wrong / characters), len(lines), {"lines": 100 * exact / len(lines)})


_add(
    "ppocr-rec",
    "compact",
    "characters of rendered lines that are right (1 - edit distance / length)",
    functools.partial(fetch, "ppocr-rec"),
    _ocr_feeds,
    _ocr_score,
)


# Pitch: harmonic tones in noise, of known pitch


def _tones(count: int, seed: int) -> Iterator[tuple[Floats, Array]]:
    """Half a second of sound at 16 kHz, and its pitch in Hz at every sample."""
    rng = np.random.default_rng(seed)
    times = np.arange(8000) / 16_000
    for _ in range(count):
        pitch = np.exp(rng.uniform(np.log(70), np.log(900)))
        pitch = pitch * (1 + rng.uniform(0, 0.01) * np.sin(2 * np.pi * rng.uniform(4, 7) * times))
        phase = 2 * np.pi * np.cumsum(pitch) / 16_000
        fall = rng.uniform(0.6, 1.6)
        sound = np.zeros(8000)
        for harmonic in range(1, 12):
            strength = rng.uniform(0.2, 1) * (harmonic * pitch[0] < 7000)
            sound += strength / harmonic**fall * np.sin(harmonic * phase + rng.uniform(0, 2 * np.pi))
        sound += rng.normal(0, sound.std() / 10 ** (rng.uniform(0, 20) / 20), 8000)
        yield (sound / np.abs(sound).max()).astype(np.float32), pitch


def frames_of(sound: Floats) -> tuple[Floats, Array]:
    """Frames [n, 1024], each of mean 0 and deviation 1, and their middles."""
    starts = np.arange(0, len(sound) - 1024, 320)
    frames = sound[starts[:, None] + np.arange(1024)]
    frames = frames - frames.mean(1, keepdims=True)
    return frames / np.maximum(frames.std(1, keepdims=True), 1e-8), starts + 512


def _crepe_feeds() -> list[Feeds]:
    frames = np.concatenate([frames_of(sound)[0] for sound, _ in _tones(64, 1)])
    chosen = np.sort(np.random.default_rng(2).choice(len(frames), CALIBRATION, replace=False))
    return [{"frames": frames[i : i + 1]} for i in chosen]


def _crepe_score(path: Path) -> Score:
    model = Model(path)
    cents = 1997.3794084376191 + 20 * np.arange(360)  # of the bins above 10 Hz (Kim et al., 2018)
    right = total = 0
    for sound, pitch in _tones(100, 0):
        frames, middles = frames_of(sound)
        bins = model(frames=frames)
        near = np.abs(np.arange(360) - bins.argmax(1)[:, None]) <= 4
        weights = np.where(near, bins, 0) + np.where(near, 1e-9, 0)
        found = (weights * cents).sum(1) / weights.sum(1)
        right += int((np.abs(found - 1200 * np.log2(pitch[middles] / 10)) < 50).sum())
        total += len(middles)
    return Score(100 * right / total, total)


_add(
    "crepe-tiny",
    "wide",
    "frames of tones in noise whose pitch is within 50 cents",
    functools.partial(fetch, "crepe-tiny"),
    _crepe_feeds,
    _crepe_score,
)


# Speech: recorded prompts in noise


def _prompts(count: int, seed: int) -> list[Floats]:
    """Recordings of a second or more, at 16 kHz; seeds 0 and 1 have none in common."""
    found = []
    paths = sorted(path for path in fetch("voice-prompts").rglob("*.wav") if path.parent.name != "silence")
    for path in paths[seed::2]:
        with wave.open(str(path)) as file:
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
        if len(sound) >= 8000:
            places = np.arange(0, len(sound) - 1, 0.5)  # recorded at 8 kHz
            found.append(np.interp(places, np.arange(len(sound)), sound).astype(np.float32))
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in chosen]


def _noise(length: int, kind: int, rng: np.random.Generator) -> Array:
    """White, dull, pulsing or humming noise of deviation 1."""
    white = rng.normal(0, 1, length)
    times = np.arange(length) / 16_000
    match kind % 4:
        case 0:
            noise = white
        case 1:
            noise = np.convolve(white, np.ones(24), "same")
        case 2:
            noise = white * (1 + np.sin(2 * np.pi * 3 * times))
        case _:
            noise = np.sign(np.sin(2 * np.pi * 50 * times)) + 0.3 * white
    return np.asarray(noise / noise.std())


def _noisy(
    clean: Array, speech: Array, kind: int, quiet: float, loud: float, rng: np.random.Generator
) -> Floats:
    """Sound in noise at a ratio between `quiet` and `loud` dB."""
    ratio = 10 ** (rng.uniform(quiet, loud) / 20)
    return np.asarray(clean + _noise(len(clean), kind, rng) * speech.std() / ratio, np.float32)


STEP, CONTEXT = 512, 64


def _vad_sounds(count: int, seed: int) -> Iterator[tuple[Floats, Array]]:
    """Frames [n, 576] (64 samples of the one before, 512 new) of noise with speech in it, and where it is: where
    the clean sound is within 30 dB of its loudest."""
    rng = np.random.default_rng(seed)
    for kind, speech in enumerate(_prompts(count, seed)):
        clean = np.pad(speech, 24_000)
        sound = _noisy(clean, speech, kind, 0, 15, rng)
        count = len(sound) // STEP
        padded = np.concatenate([np.zeros(CONTEXT, np.float32), sound])
        frames = padded[STEP * np.arange(count)[:, None] + np.arange(CONTEXT + STEP)]
        power = (clean[: count * STEP].reshape(count, STEP) ** 2).mean(1)
        yield frames, power > power.max() / 1000


def _vad_state() -> Feeds:
    return {name: np.zeros((1, 1, 128), np.float32) for name in ("h", "c")}


def _vad_feeds() -> list[Feeds]:
    pieces = [
        frames[start : start + 32]
        for frames, _ in _vad_sounds(120, 1)
        for start in range(0, len(frames) - 31, 32)
    ]
    chosen = np.sort(np.random.default_rng(2).choice(len(pieces), CALIBRATION, replace=False))
    return [{"input": pieces[i], **_vad_state()} for i in chosen]


def area(scores: Array, labels: Array) -> float:
    """The area under the ROC curve: how often speech scores above noise (Mann and Whitney, 1947)."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    ones = int(labels.sum())
    return float((ranks[labels].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


def _vad_score(path: Path) -> Score:
    model = Model(path)
    parts = [(model(input=frames, **_vad_state()).ravel(), speech) for frames, speech in _vad_sounds(60, 0)]
    scores, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    return Score(100 * area(scores, labels), len(labels))


_add(
    "silero-vad",
    "wide",
    "area under the ROC curve, frames of speech in noise",
    functools.partial(fetch, "silero-vad-sequence"),
    _vad_feeds,
    _vad_score,
    apart=True,
)


HOP = 160
WINDOW = np.sqrt(np.hanning(2 * HOP + 1)[:-1])


def _spectra(sound: Array) -> Array:
    starts = np.arange(0, len(sound) - 2 * HOP, HOP)
    return np.fft.rfft(sound[starts[:, None] + np.arange(2 * HOP)] * WINDOW, axis=1)


def _powers(spectra: Array) -> Floats:
    return np.asarray(np.log10(np.maximum(np.abs(spectra) ** 2, 1e-12))[None], np.float32)


def _speech_in_noise(count: int, seed: int) -> Iterator[tuple[Floats, Floats]]:
    rng = np.random.default_rng(seed)
    for kind, speech in enumerate(_prompts(count, seed)):
        yield speech, _noisy(speech, speech, kind % 3, 0, 10, rng)


def _denoise_feeds() -> list[Feeds]:
    pieces = [
        _powers(_spectra(noisy))[:, start : start + 50]
        for _, noisy in _speech_in_noise(150, 1)
        for start in range(0, len(noisy) // HOP - 52, 50)
    ]
    chosen = np.sort(np.random.default_rng(2).choice(len(pieces), CALIBRATION, replace=False))
    return [{"input": pieces[i]} for i in chosen]


def fidelity(sound: Array, clean: Array) -> float:
    """Scale-invariant ratio of signal to distortion in dB (Le Roux et al., 2019)."""
    sound, clean = sound - sound.mean(), clean - clean.mean()
    target = (sound @ clean) / (clean @ clean) * clean
    return float(10 * np.log10((target @ target) / ((sound - target) @ (sound - target))))


def _denoise_gain(path: Path) -> tuple[float, int]:
    """Gain in dB over the noisy sound, mean of all recordings."""
    model, gains = Model(path), []
    for clean, noisy in _speech_in_noise(40, 0):
        spectra = _spectra(noisy)
        pieces = np.fft.irfft(spectra * model(input=_powers(spectra))[0].clip(1e-4, 1), axis=1) * WINDOW
        sound = np.zeros(len(noisy))
        for index, piece in enumerate(pieces):
            sound[index * HOP : index * HOP + 2 * HOP] += piece
        whole = slice(HOP, HOP * len(pieces))
        gains.append(fidelity(sound[whole], clean[whole]) - fidelity(noisy[whole], clean[whole]))
    return float(np.mean(gains)), len(gains)


@functools.cache
def _original_gain() -> float:
    return _denoise_gain(fetch("nsnet2"))[0]


def _denoise_score(path: Path) -> Score:
    gain, count = _denoise_gain(path)
    return Score(100 * gain / _original_gain(), count, {"dB": gain})


_add(
    "nsnet2",
    "wide",
    "gain in SI-SDR over noisy speech, % of the unpruned model's",
    functools.partial(fetch, "nsnet2"),
    _denoise_feeds,
    _denoise_score,
)


# File types: files of pinned packages, and files made from them


BEGIN = END = 1024
PADDING = 256
BLOCK = 4096


def file_bytes(content: bytes) -> NDArray[np.int32]:
    """The first and last 1,024 bytes without the white space around them, as magika reads a file."""
    row = np.full(BEGIN + END, PADDING, np.int32)
    begin, end = content[:BLOCK].lstrip()[:BEGIN], content[-BLOCK:].rstrip()[-END:]
    row[: len(begin)] = np.frombuffer(begin, np.uint8)
    row[len(row) - len(end) :] = np.frombuffer(end, np.uint8)
    return row


@functools.cache
def _file_labels() -> list[str]:
    labels: list[str] = json.loads(fetch("magika-labels").read_text(encoding="utf-8"))["target_labels_space"]
    return labels


def _file_feeds() -> list[Feeds]:
    rows = [file_bytes(content) for _, content in samples.files(1)]
    chosen = np.sort(np.random.default_rng(2).choice(len(rows), CALIBRATION, replace=False))
    return [{"bytes": rows[i][None]} for i in chosen]


def _file_score(path: Path) -> Score:
    model, labels = Model(path), _file_labels()
    right: dict[str, list[bool]] = {}
    for label, content in samples.files(0):
        answer = labels[int(model(bytes=file_bytes(content)[None]).argmax())]
        right.setdefault(label, []).append(answer == label or answer in samples.ALSO.get(label, ()))
    answers = [each for kind in right.values() for each in kind]
    by_type = 100 * float(np.mean([np.mean(kind) for kind in right.values()]))
    return Score(100 * float(np.mean(answers)), len(answers), {"mean of types": by_type, "types": len(right)})


_add(
    "magika",
    "wide",
    "files whose type is right",
    functools.partial(fetch, "magika"),
    _file_feeds,
    _file_score,
)


# Sentences: the word that a definition belongs to


@functools.cache
def _vocabulary() -> dict[str, int]:
    words = fetch("minilm-words").read_text(encoding="utf-8").splitlines()
    return {word: number for number, word in enumerate(words)}


def word_numbers(text: str, known: Mapping[str, int]) -> list[int]:
    """BERT's numbers of an English text: the longest known pieces of each word, between [CLS] and [SEP]."""
    numbers = [known["[CLS]"]]
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()):
        pieces: list[int] = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if prefix + word[start:end] in known), 0)
            if not end:
                pieces = [known["[UNK]"]]
                break
            pieces.append(known[prefix + word[start:end]])
            start = end
        numbers += pieces
    return [*numbers, known["[SEP]"]]


@functools.cache
def _definitions() -> list[tuple[str, str]]:
    """Nouns and their definitions, in a random order."""
    rows = []
    for line in (fetch("wordnet") / "data.noun").read_text(encoding="latin-1").splitlines():
        if not line.startswith(" "):
            entry, _, gloss = line.partition(" | ")
            definition = gloss.split(";")[0].strip()
            if 25 <= len(definition) <= 160:
                rows.append((entry.split(" ")[4].replace("_", " "), definition))
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


POOL, POOLS, LENGTH = 200, 4, 24


def _sentence_feeds() -> list[Feeds]:
    """Definitions cut to 24 numbers, so that no row holds padding."""
    feeds: list[Feeds] = []
    for _, definition in _definitions()[POOL * POOLS :]:
        numbers = word_numbers(definition, _vocabulary())
        if len(numbers) >= LENGTH:
            ids = np.asarray([[*numbers[: LENGTH - 1], numbers[-1]]], np.int64)
            feeds.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
        if len(feeds) == CALIBRATION:
            break
    return feeds


def _embeddings(model: Model, texts: list[str]) -> Array:
    rows = [word_numbers(text, _vocabulary()) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = np.zeros((len(rows), 384))
    for start in range(0, len(rows), 40):
        part = order[start : start + 40]
        length = max(len(rows[i]) for i in part)
        ids = np.asarray([rows[i] + [0] * (length - len(rows[i])) for i in part], np.int64)
        mask = np.asarray([[j < len(rows[i]) for j in range(length)] for i in part], np.int64)
        found[part] = model(input_ids=ids, attention_mask=mask)
    return found


def _sentence_score(path: Path) -> Score:
    model, ranks = Model(path), []
    for pool in range(POOLS):
        words, definitions = zip(*_definitions()[pool * POOL : (pool + 1) * POOL], strict=True)
        near = _embeddings(model, list(definitions)) @ _embeddings(model, list(words)).T
        ranks.append(1 + (near > np.diag(near)[:, None]).sum(1))
    ranked = np.concatenate(ranks)
    return Score(100 * float((1 / ranked).mean()), len(ranked), {"first": 100 * float((ranked == 1).mean())})


_add(
    "minilm",
    "wide",
    "mean reciprocal rank of the word that a definition belongs to, among 200",
    functools.partial(fetch, "minilm"),
    _sentence_feeds,
    _sentence_score,
)


def main() -> int:
    """Print the score of the original models, or of a model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=main.__doc__)
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("model", nargs="?", type=Path)
    arguments = parser.parse_args()
    for name in [arguments.task] if arguments.task else TASKS:
        start, task = time.perf_counter(), TASKS[name]
        score = task.evaluate(arguments.model or task.model())
        beside = "".join(f", {key} {value:.2f}" for key, value in score.beside.items())
        seconds = time.perf_counter() - start
        print(f"{name}: {score.points:.2f} ({score.samples:,} samples{beside}; {seconds:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
