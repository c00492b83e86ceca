"""Patterns to make inputs up from: images, sounds, surfaces and sequences of symbols, all drawn from a generator."""

from __future__ import annotations

import numpy as np

from onnxprune.model import Array

SHARED = 0.75  # of the variance of a pixel, what its channels have in common
SHAPES = 12  # in an image, fewer than
GRAIN = 0.5  # the strongest texture of a shape
WRITTEN = 5  # of so many images one shows lines of signs
SIGNS = 24  # different signs of an image, at most
TALLEST = 256  # pixels of a sign, at most
HARMONICS = 40  # of a tone, at most
ROOM = 2**22  # values of all harmonics of a tone, at most
TONES = 4  # one after the other in a sound, at most
QUIET = 0.01  # the least deviation of a sound
TURNS = 0.15  # how often a sequence turns to something else
COPIES = 0.9  # how often, at most, to what was there before


# --------------------------------------------------------------------------------------------- images


def pink(generator: np.random.Generator, count: int, channels: int, height: int, width: int) -> Array:
    """Images (count, channels, height, width) with an amplitude spectrum of 1/f, as natural images have
    (Field, "Relations between the statistics of natural images and the response properties of cortical
    cells", 1987). Channels share three quarters of their variance. Each channel has a mean of 0 and a variance
    of 1; then each image is given a contrast of 0.5 to 1.5 and a mean of N(0, 0.5²), alike in its channels.
    """
    noise = coloured(generator, (count, channels + 1, height, width), 1.0)
    image: Array = np.sqrt(SHARED) * noise[:, :1] + np.sqrt(1 - SHARED) * noise[:, 1:]
    image /= image.std(axis=(2, 3), keepdims=True)
    contrast = generator.uniform(0.5, 1.5, (count, 1, 1, 1))
    return image * contrast + 0.5 * generator.standard_normal((count, 1, 1, 1))


def coloured(generator: np.random.Generator, shape: tuple[int, ...], fall: float) -> Array:
    """Noise with an amplitude spectrum of 1 / f^fall over the last two axes; there of mean 0 and variance 1."""
    rows, columns = np.fft.fftfreq(shape[-2])[:, None], np.fft.rfftfreq(shape[-1])[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf  # no mean
    noise = generator.standard_normal(shape)
    noise = np.fft.irfft2(np.fft.rfft2(noise) / frequency**fall, s=shape[-2:])
    noise -= noise.mean(axis=(-2, -1), keepdims=True)
    found: Array = noise / np.maximum(noise.std(axis=(-2, -1), keepdims=True), 1e-12)
    return found


def pictures(generator: np.random.Generator, count: int, channels: int, height: int, width: int) -> Array:
    """Images (count, channels, height, width): `leaves` and, one in five, lines of signs (`written`).

    Values of an image lie in about [-1, 1], in [0, 1], or are zero and above with a dark background: nobody has
    said how the network's inputs are scaled.
    """
    images = np.empty((count, channels, height, width), dtype=np.float32)
    for image in images:
        draw = written if generator.integers(WRITTEN) == 0 else leaves
        image[:] = draw(generator, channels, height, width)
        scale = generator.integers(3)
        if scale == 1:
            image[:] = (image + 1) / 2
        if scale:
            np.clip(image, 0, 1 if scale == 1 else None, out=image)
    return images


def leaves(generator: np.random.Generator, channels: int, height: int, width: int) -> Array:
    """An image (channels, height, width) of overlapping flat shapes of all sizes, faintly textured, about in
    [-1, 1].

    Dead leaves (Lee, Mumford and Huang, "Occlusion models for natural images", 2001): edges and regions, which
    noise lacks and which what a network has learned responds to (Baradad et al., "Learning to See by Looking at
    Noise", 2021).
    """
    grain = pink(generator, 1, channels, height, width)[0].astype(np.float32)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    image = np.zeros((channels, height, width), dtype=np.float32)
    image[:] = _colours(generator, channels) * generator.integers(2)
    for _ in range(generator.integers(1, SHAPES)):
        mask = _shape(generator, rows, columns)
        shade = _colours(generator, channels) + np.float32(generator.uniform(0, GRAIN)) * grain
        image[:, mask] = shade[:, mask]
    return image


def written(generator: np.random.Generator, channels: int, height: int, width: int) -> Array:
    """An image (channels, height, width) of lines of signs, in [-1, 1] but for its grain: thin strokes of one colour
    on an even surface, which may end before the image does. A sign is a few strokes, and signs come again.
    """
    lines = int(generator.integers(1, max(height // 24, 1) + 1))
    tall = height / lines
    size = min(tall * generator.uniform(0.35, 0.8), TALLEST)
    thick = max(size * generator.uniform(0.04, 0.12), 0.6)
    alphabet = [_sign(generator) for _ in range(generator.integers(2, SIGNS))]
    ink = np.zeros((height, width), dtype=np.float32)
    end = width * min(generator.uniform(0.4, 1.5), 1.0)
    slope, start = generator.uniform(-0.03, 0.03), generator.uniform(0, size)
    for line in range(lines):
        x, y = start, (line + 0.5) * tall - size / 2
        while x < end:
            broad = size * generator.uniform(0.4, 0.7)
            if generator.integers(6):  # else a gap
                strokes = alphabet[generator.integers(len(alphabet))] * (broad, size)
                _draw(ink, strokes + np.array([x, y + slope * x]), thick)
            x += broad + 2 * thick
    paper, colour = _colours(generator, channels), _colours(generator, channels)
    colour += np.sign(colour - paper) * 0.5
    image: Array = paper + (colour - paper) * ink
    image = image + generator.uniform(0, 0.1) * generator.standard_normal(image.shape)
    beyond = int(end + size)
    if generator.integers(2):
        image[:, :, beyond:] = 0  # padded
    return image.astype(np.float32)


def _sign(generator: np.random.Generator) -> Array:
    """A few strokes [strokes, ends, (x, y)] in a unit square, ends on a coarse grid, most of them joined."""
    points = generator.integers(0, 3, (generator.integers(3, 6), 2)) / 2
    return np.stack([points[:-1], points[1:]], axis=1)


def _draw(ink: Array, strokes: Array, thick: float) -> None:
    """Lay strokes [strokes, ends, (x, y)] of a thickness over an image [height, width], soft at the edges."""
    low = np.floor(strokes.min(axis=(0, 1)) - 2 * thick).astype(int).clip(0)
    high = np.ceil(strokes.max(axis=(0, 1)) + 2 * thick).astype(int).clip(0)
    part = ink[low[1] : high[1], low[0] : high[0]]
    if not part.size:
        return
    rows, columns = np.mgrid[: part.shape[0], : part.shape[1]]
    places = np.stack([columns + low[0], rows + low[1]], axis=-1)[None]
    first, along = strokes[:, None, None, 0], (strokes[:, 1] - strokes[:, 0])[:, None, None]
    length = np.maximum(np.square(along).sum(-1), 1e-9)
    share = (((places - first) * along).sum(-1) / length).clip(0, 1)
    away = np.linalg.norm(places - first - share[..., None] * along, axis=-1).min(axis=0)
    np.maximum(part, (thick / 2 + 0.5 - away).clip(0, 1), out=part)


def _colours(generator: np.random.Generator, channels: int) -> Array:
    """A colour of an even surface, [channels, 1, 1]: much the same in all channels."""
    shared, own = generator.uniform(-1, 1), generator.uniform(-1, 1, (channels, 1, 1))
    mixed: Array = shared + (1 - SHARED) * (own - shared) * (channels > 1)
    return mixed.astype(np.float32)


def _shape(generator: np.random.Generator, rows: Array, columns: Array) -> Array:
    """Where a disc, a box or a stripe lies, stretched and turned; small ones are more frequent."""
    height, width = rows.shape
    size = min(height, width) * generator.uniform(0.03, 1) ** 1.5
    y, x = generator.uniform(0, height), generator.uniform(0, width)
    angle, stretch = generator.uniform(0, np.pi), generator.uniform(0.3, 3)
    u = (rows - y) * np.cos(angle) + (columns - x) * np.sin(angle)
    v = ((columns - x) * np.cos(angle) - (rows - y) * np.sin(angle)) * stretch
    kind = generator.integers(3)
    if kind == 0:
        inside: Array = np.square(u) + np.square(v) < size * size
    elif kind == 1:
        inside = np.maximum(np.abs(u), np.abs(v)) < size
    else:
        inside = np.abs(u) < size / 3
    return inside


# -------------------------------------------------------------------------------------------- signals


def signal(generator: np.random.Generator, rows: int, columns: int) -> Array:
    """Values [rows, columns] of a kind that is drawn: white noise, a sound that goes on from row to row, or a
    surface."""
    kind = generator.integers(5)
    if kind == 0:
        return generator.standard_normal((rows, columns))
    if kind <= 2 or rows == 1:
        return sound(generator, rows * columns).reshape(rows, columns)
    return surface(generator, rows, columns)


def sound(generator: np.random.Generator, length: int) -> Array:
    """A sound [length]: noise between white and red, and, more often than not, tones that come and go.

    A tone has harmonics that a few resonances shape, a pitch that glides and a strength that swells and falls: source
    and filter (Fant, "Acoustic Theory of Speech Production", 1960). The deviation is 1 for one sound in two, for the
    others below it: recordings are often scaled to [-1, 1], features to a variance of 1.
    """
    noise = coloured(generator, (1, length), generator.uniform(0, 1.5))[0]
    times = np.linspace(0, 1, length)
    if generator.integers(2):
        noise = noise * np.exp(generator.uniform(0, 1.5) * np.sin(_course(generator, times, 20.0)))
    tones = np.zeros(length)
    for _ in range(generator.integers(TONES + 1)):
        tones += _tone(generator, times)
    if tones.any():
        noise = tones / tones.std() + noise * 10 ** generator.uniform(-1.5, 0.3)
    found: Array = noise / max(float(noise.std()), 1e-12)
    return found * (QUIET ** generator.uniform(0, 1) if generator.integers(2) else 1.0)


def _tone(generator: np.random.Generator, times: Array) -> Array:
    length = len(times)
    pitch = 0.5 * 10 ** generator.uniform(-2.5, -0.3)  # cycles per value
    phase = np.cumsum(pitch * np.exp(0.1 * np.sin(_course(generator, times, 20.0)))) * 2 * np.pi
    peaks, breadth = generator.uniform(0, 0.3, 3), generator.uniform(0.01, 0.05)
    fall = generator.uniform(0.3, 1.5)
    found = np.zeros(length)
    most = min(HARMONICS, int(0.45 / pitch), max(ROOM // length, 1))
    for harmonic in range(1, most + 1):
        resonance = 0.05 + np.exp(-np.square((harmonic * pitch - peaks) / breadth)).sum()
        strength = resonance * generator.uniform(0.5, 1) / harmonic**fall
        found += strength * np.sin(harmonic * phase + generator.uniform(0, 2 * np.pi))
    middle, spread = generator.uniform(0, 1), generator.uniform(0.05, 0.5)
    syllables = np.maximum(np.sin(_course(generator, times, 40.0)), 0) if generator.integers(2) else 1.0
    shaped: Array = found * syllables * np.exp(-np.square((times - middle) / spread))
    return shaped


def _course(generator: np.random.Generator, times: Array, most: float) -> Array:
    """A phase that grows by up to so many radians."""
    grown: Array = generator.uniform(0, 2 * np.pi) + times * generator.uniform(1, most)
    return grown


def surface(generator: np.random.Generator, rows: int, columns: int) -> Array:
    """Features over time, or the other way round [rows, columns]: each row and each column has a level, levels next
    to each other are alike, and on top are smooth and rough changes, as in logarithmic spectra. The deviation is 0.5 to
    2, the mean N(0, 1).
    """
    levels = coloured(generator, (2, 1, max(rows, columns)), 1.0)[:, 0]
    parts = [
        levels[0][:rows, None] * np.ones(columns),
        levels[1][None, :columns] * np.ones((rows, 1)),
        coloured(generator, (rows, columns), generator.uniform(0.3, 1.2)),
        generator.standard_normal((rows, columns)),
    ]
    mixed = sum(part * generator.uniform(0, 1) for part in parts) + 0.1 * parts[-1]
    mixed = mixed / mixed.std() * generator.uniform(0.5, 2)
    found: Array = mixed + generator.standard_normal()
    return found


# -------------------------------------------------------------------------------------------- symbols


def symbols(generator: np.random.Generator, length: int, bound: int) -> Array:
    """Integers [length] below `bound`, as in texts and files: few of those there are, some of them often (Zipf,
    "Human Behavior and the Principle of Least Effort", 1949), what was there before comes again. One sequence in eight
    is even and without repeats.
    """
    if generator.integers(8) == 0:
        return generator.integers(0, bound, length)
    count = max(round(bound ** generator.uniform(0.2, 1)), 1)
    if generator.integers(2):  # neighbours, or any
        members = generator.integers(bound - count + 1) + np.arange(count)
    else:
        members = generator.choice(bound, count, replace=False)
    shares = 1 / np.arange(1, count + 1) ** generator.uniform(0, 1.5)
    members = generator.permutation(members)
    found: Array = members[generator.choice(count, length, p=shares / shares.sum())]
    turns = generator.random(length) < TURNS  # to another place that is copied, or to no copying
    copies = generator.random(length) < generator.uniform(0, COPIES)
    distances = 1 + (np.square(generator.random(length)) * np.arange(length)).astype(np.int64)
    distance = 0
    for place in range(1, length):
        if turns[place]:
            distance = int(distances[place]) if copies[place] else 0
        if 0 < distance <= place:
            found[place] = found[place - distance]
    return found


__all__ = ["coloured", "leaves", "pictures", "pink", "signal", "sound", "surface", "symbols", "written"]
