"""Inputs that are made up, for when there is no data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.data.batches import Data, Element, Input, Interface, collect
from onnxprune.errors import UserError
from onnxprune.model import Array, Model
from onnxprune.runtime import Feeds, RunError, Session, decisive_values, index_bounds, make_feeds
from onnxprune.shapes import Shapes, accepted_runs
from onnxprune.sizes import dim_key

SMALLEST = 8  # extent from which two axes are taken for the height and width of an image
SHARED = 0.75  # of the variance of a pixel, what its channels have in common
SHAPES = 12  # in an image, fewer than
GRAIN = 0.5  # the strongest texture of a shape


def synthetic(model: Model, shapes: Shapes, *, samples: int, seed: int) -> Data:
    """Seeded inputs that the model accepts.

    Float inputs of four axes with 1, 3 or 4 channels and sides of 8 or more get images of
    overlapping shapes (`leaves`); other floats are normal, integers lie within the tables they index, and where an input decides
    which way the graph takes, the ways that run take turns.

    Raises `UserError` where the model cannot be run at all.
    """
    if samples < 2:
        raise UserError(f"{samples} samples are too few to measure anything; take 2 or more")
    interface = Interface.of(model, shapes)
    try:
        runs = accepted_runs(model, shapes, Session(model.proto).run, 1)
    except RunError as error:
        raise UserError(f"{model.name}: does not run on made-up inputs ({error}); give data") from None
    sizes, first, _ = runs[0]
    bounds = index_bounds(model, shapes.shapes)
    images = {name: axes for name, value in interface.inputs.items() if (axes := _image(value, first[name]))}
    # the one way of most models, or the feeds of each way that runs, whose deciding values are kept
    ways = [(sizes_of, _decisive(model, feeds)) for sizes_of, feeds, _ in runs]
    stack = interface.batch == 0 and len(ways) == 1
    if stack:
        keys = [dim_key(v.name, 0, v.type.tensor_type.shape.dim[0]) for v in model.inputs]
        ways = [(dict(sizes) | dict.fromkeys(keys, 1), ways[0][1])]

    def read() -> Iterator[Element]:
        place = 0
        while True:
            sizes_of, given = ways[place % len(ways)]
            generator = np.random.default_rng([seed, place])
            feeds = make_feeds(model, sizes_of, int(generator.integers(2**31)), bounds, given)
            for name, axes in images.items():
                feeds[name] = _images(feeds[name], axes, generator)
            if stack:
                feeds = {name: array[0] for name, array in feeds.items()}
            yield Element(f"made-up input {place}", feeds)
            place += 1

    what = "images of random shapes" if images else "normal floats and integers within their tables"
    return collect(
        interface,
        read(),
        read,
        samples,
        measured=False,
        name=f"made-up inputs: {what}",
        unit="samples",
        notes=[f"no data was given: {what} were fed (seed {seed}), and nothing was measured on data"],
        provenance={"kind": "synthetic", "seed": seed, "available": None, "preprocess": None},
    )


def pink(generator: np.random.Generator, count: int, channels: int, height: int, width: int) -> Array:
    """Images (count, channels, height, width) with an amplitude spectrum of 1/f, as natural images have
    (Field, "Relations between the statistics of natural images and the response properties of cortical
    cells", 1987). Channels share three quarters of their variance. Each channel has a mean of 0 and a variance
    of 1; then each image is given a contrast of 0.5 to 1.5 and a mean of N(0, 0.5²), alike in its channels.
    """
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = np.inf  # no mean
    noise = generator.standard_normal((count, channels + 1, height, width))
    noise = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width))
    noise /= noise.std(axis=(2, 3), keepdims=True)
    image: Array = np.sqrt(SHARED) * noise[:, :1] + np.sqrt(1 - SHARED) * noise[:, 1:]
    image /= image.std(axis=(2, 3), keepdims=True)
    contrast = generator.uniform(0.5, 1.5, (count, 1, 1, 1))
    return image * contrast + 0.5 * generator.standard_normal((count, 1, 1, 1))


def leaves(generator: np.random.Generator, count: int, channels: int, height: int, width: int) -> Array:
    """Images (count, channels, height, width) of overlapping flat shapes of all sizes, faintly textured.

    Dead leaves (Lee, Mumford and Huang, "Occlusion models for natural images", 2001): edges and regions, which
    noise lacks and which what a network has learned responds to (Baradad et al., "Learning to See by Looking at
    Noise", 2021). Values of an image lie in about [-1, 1], in [0, 1], or are zero and above with a dark
    background: nobody has said how the network's inputs are scaled.
    """
    texture = pink(generator, count, channels, height, width)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    images = np.empty((count, channels, height, width), dtype=np.float32)
    for image, grain in zip(images, texture.astype(np.float32), strict=True):
        image[:] = _colours(generator, channels) * generator.integers(2)
        for _ in range(generator.integers(1, SHAPES)):
            mask = _shape(generator, rows, columns)
            shade = _colours(generator, channels) + np.float32(generator.uniform(0, GRAIN)) * grain
            image[:, mask] = shade[:, mask]
        scale = generator.integers(3)
        if scale == 1:
            image[:] = (image + 1) / 2
        if scale:
            np.clip(image, 0, 1 if scale == 1 else None, out=image)
    return images


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


def _image(value: Input, feed: Array) -> tuple[int, int, int] | None:
    """Axes of the channels, height and width of an input that looks like an image."""
    if value.dtype.kind in "iub" or feed.ndim != 4:
        return None
    for channel, height, width in ((1, 2, 3), (3, 1, 2)):
        if value.dims[channel] in (1, 3, 4) and min(feed.shape[height], feed.shape[width]) >= SMALLEST:
            return channel, height, width
    return None


def _images(feed: Array, axes: tuple[int, int, int], generator: np.random.Generator) -> Array:
    channels, height, width = (feed.shape[axis] for axis in axes)
    images = leaves(generator, feed.shape[0], channels, height, width)
    if axes[0] == 3:
        images = images.transpose(0, 2, 3, 1)
    return images.astype(feed.dtype)


def _decisive(model: Model, feeds: Feeds) -> dict[str, int]:
    """Values of the inputs that decided which way a run took."""
    names = decisive_values(model)[0]
    return {name: int(feeds[name].flat[0]) for name in names}
