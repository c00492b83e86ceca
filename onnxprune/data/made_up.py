"""Inputs that are made up, for when there is no data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from onnxprune.data import patterns
from onnxprune.data.batches import Data, Element, Input, Interface, collect
from onnxprune.errors import UserError
from onnxprune.model import Array, Model
from onnxprune.runtime import Endless, Feeds, RunError, Session, decisive_values, index_bounds, make_feeds
from onnxprune.shapes import Shapes, accepted_runs
from onnxprune.sizes import Sizes, dim_key, is_dynamic

SMALLEST = 8  # extent from which two axes are taken for the height and width of an image
LONG = 64  # extent from which an axis is taken for a signal
SHORT = 32  # extent of an open axis below which a longer one is tried
FACTORS = (8, 4, 2)  # times that extent
LARGEST = 2**18  # values of a sample that was made longer
DEPTH = 8  # nodes between integers and what they are compared with


def synthetic(model: Model, shapes: Shapes, *, samples: int, seed: int) -> Data:
    """Seeded inputs that the model accepts, like those it may have been made for.

    Inputs of four axes with 1, 3 or 4 channels and sides of 8 or more get images (`patterns.pictures`). Other floats
    that have the shape of an output are states, zero in about every other sample; those of one axis of 64 values or
    more, or of two, get signals (`patterns.signal`); what is left is normal. Integers that index a table, or are
    compared with all numbers up to one, get sequences of symbols (`patterns.symbols`), or 0, 1, 2, ... where they are
    called positions; others are ones up to the end of a sequence and zeros behind it. Where an input decides which way
    the graph takes, the ways that run take turns. Open axes that are short are made longer where the model runs then.

    Raises `UserError` where the model cannot be run at all.
    """
    if samples < 2:
        raise UserError(f"{samples} samples are too few to measure anything; take 2 or more")
    interface = Interface.of(model, shapes)
    try:
        session = Session(model.proto)
        runs = accepted_runs(model, shapes, session.run, 1)
    except RunError as error:
        raise UserError(f"{model.name}: does not run on made-up inputs ({error}); give data") from None
    sizes, first, _ = runs[0]
    bounds = _alphabets(model) | index_bounds(model, shapes.shapes)
    # the one way of most models, or the feeds of each way that runs, whose deciding values are kept
    ways = [(sizes_of, _decisive(model, feeds)) for sizes_of, feeds, _ in runs]
    stack = interface.batch == 0 and len(ways) == 1
    if len(ways) == 1:
        sizes = _longer(model, interface, session, sizes, bounds, ways[0][1])
        ways = [(sizes, ways[0][1])]
    if stack:
        keys = [dim_key(v.name, 0, v.type.tensor_type.shape.dim[0]) for v in model.inputs]
        ways = [(dict(sizes) | dict.fromkeys(keys, 1), ways[0][1])]
    kinds = _kinds(interface, model, shapes, first, bounds)

    def read() -> Iterator[Element]:
        place = 0
        while True:
            sizes_of, given = ways[place % len(ways)]
            generator = np.random.default_rng([seed, place])
            feeds = make_feeds(model, sizes_of, int(generator.integers(2**31)), bounds, given)
            starts = generator.integers(2) == 0  # the states with which everything starts
            ends = generator.uniform(0.25, 1.75)  # of the sequences, as a share of the room for them
            for name, kind in kinds.items():
                if kind == "state":
                    feeds[name] = np.zeros_like(feeds[name]) if starts else feeds[name]
                elif name not in given:
                    parts = interface.batch is not None
                    feeds[name] = _filled(feeds[name], kind, generator, ends, bounds.get(name, 2), parts)
            if stack:
                feeds = {name: array[0] for name, array in feeds.items()}
            yield Element(f"made-up input {place}", feeds)
            place += 1

    named = {
        "image": "images of random shapes",
        "signal": "noise, tones and surfaces",
        "symbols": "sequences of symbols",
    }
    shown = [text for kind, text in named.items() if any(k.startswith(kind) for k in kinds.values())]
    what = " and ".join(shown) or "normal floats and integers within their tables"
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


def _longer(
    model: Model,
    interface: Interface,
    session: Session,
    sizes: Sizes,
    bounds: Mapping[str, int],
    given: Mapping[str, int],
) -> Sizes:
    """Sizes with open axes (but the batch) that are a multiple of what suffices for an analysis, if the model runs."""
    batch: set[str] = set()
    open_axes: set[str] = set()
    for value in model.inputs:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if is_dynamic(dim):
                of_batch = axis == 0 and interface.batch is not None
                (batch if of_batch else open_axes).add(dim_key(value.name, axis, dim))
    short = [key for key in sizes if key in open_axes - batch and sizes[key] < SHORT]
    for factor in FACTORS if short else ():
        longer = dict(sizes) | {key: factor * sizes[key] for key in short}
        try:
            feeds = make_feeds(model, longer, 0, bounds, given)
            if sum(feed.size for feed in feeds.values()) <= LARGEST:
                session.run(feeds)
                return longer
        except (RunError, Endless):
            continue
    return sizes


def _alphabets(model: Model) -> dict[str, int]:
    """For integer inputs that are compared with all numbers from 0 up to some number, how many these are: the
    one-hot form of a table."""
    found: dict[str, int] = {}
    for value in model.inputs:
        waiting = {value.name}
        for _ in range(DEPTH):
            nodes = [node for name in sorted(waiting) for node in model.consumers.get(name, ())]
            for node in nodes:
                others = [name for name in node.inputs if name in model.constants and name not in waiting]
                for other in others if node.op == "Equal" else ():
                    numbers = model.array(other).ravel()
                    if numbers.size > 2 and np.array_equal(numbers, np.arange(numbers.size)):
                        found[value.name] = min(found.get(value.name, numbers.size), numbers.size)
            waiting = {node.outputs[0] for node in nodes if node.outputs and waiting & set(node.inputs[:1])}
    return found


def _kinds(
    interface: Interface, model: Model, shapes: Shapes, feeds: Feeds, bounds: Mapping[str, int]
) -> dict[str, str]:
    """What each input is taken for; those that are left out stay as `make_feeds` makes them."""
    returned = [shapes.shapes.get(output.name) for output in model.outputs]
    kinds: dict[str, str] = {}
    for name, value in interface.inputs.items():
        inner = feeds[name].shape[interface.batch is not None :]
        axes = [extent for extent in inner if extent > 1]
        table = bounds.get(name, 0) > 2
        if (image := _image(value, feeds[name])) and not table:
            kinds[name] = image
        elif value.dtype.kind in "iub":
            if math.prod(inner) > 1:
                kinds[name] = ("positions" if "position" in name.lower() else "symbols") if table else "ones"
        elif len(interface.inputs) > 1 and shapes.shapes.get(name) in returned:
            returned.remove(shapes.shapes.get(name))
            kinds[name] = "state"
        elif (len(axes) == 1 and axes[0] >= LONG) or (len(axes) == 2 and axes[-1] >= SMALLEST):
            kinds[name] = "signal"
    if all(kinds.get(name) == "state" for name in interface.inputs):
        return {}
    return kinds


def _image(value: Input, feed: Array) -> str | None:
    """Whether the channels of an input that looks like an image come first or last; None for others."""
    if feed.ndim != 4 or value.dtype.kind == "b":
        return None
    for kind, channel, height, width in (("image", 1, 2, 3), ("image, channels last", 3, 1, 2)):
        if value.dims[channel] in (1, 3, 4) and min(feed.shape[height], feed.shape[width]) >= SMALLEST:
            return kind
    return None


def _filled(
    feed: Array, kind: str, generator: np.random.Generator, ends: float, bound: int, parts: bool
) -> Array:
    """An input like `feed`, filled with what its kind is; each entry of its first axis anew where these are `parts`."""
    made = np.stack(
        [_made(item.shape, kind, generator, ends, bound) for item in (feed if parts else feed[None])]
    )
    if kind.startswith("image") and feed.dtype.kind in "iu":  # pixels of eight bits
        made = (made.clip(-1, 1) + 1) * 127.5 - (128 if feed.dtype == np.int8 else 0)
    return (made if parts else made[0]).astype(feed.dtype)


def _made(
    shape: tuple[int, ...], kind: str, generator: np.random.Generator, ends: float, bound: int
) -> Array:
    if kind.startswith("image"):
        last = kind != "image"
        channels, height, width = (shape[-1], *shape[-3:-1]) if last else shape[-3:]
        count = math.prod(shape) // (channels * height * width)
        images = patterns.pictures(generator, count, channels, height, width)
        return (images.transpose(0, 2, 3, 1) if last else images).reshape(shape)
    if kind == "signal":
        columns = next(extent for extent in reversed(shape) if extent > 1)
        return patterns.signal(generator, math.prod(shape) // columns, columns).reshape(shape)
    length = shape[-1]
    end = min(max(int(ends * length), 1), length)
    made = np.zeros(shape, dtype=np.int64)
    for row in made.reshape(-1, length):
        if kind == "positions":
            row[:] = np.arange(length) % bound
        elif kind == "symbols":
            row[:] = generator.choice([0, bound - 1])  # what fills up is often the first or the last
            row[:end] = patterns.symbols(generator, end, bound)
        else:
            row[:end] = 1
    return made


def _decisive(model: Model, feeds: Feeds) -> dict[str, int]:
    """Values of the inputs that decided which way a run took."""
    names = decisive_values(model)[0]
    return {name: int(feeds[name].flat[0]) for name in names}
