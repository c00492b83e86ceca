"""Sequential refit: in the order of the graph every layer learns to make, from what the pruned network gives
it, what the original made.

    min over W', b' of  E |y - W' x~ - b'|^2 + l |W' - W|^2

x~ are inputs of the layer in the pruned and already refitted network, y its outputs in the original: least
squares on windows, with all taps free (Luo et al., "ThiNet", 2017; Frantar and Alistarh, "GPTQ", 2023, for the
asymmetric target). Where the layer's output is added to a residual stream, y is the sum: the layer then also
makes up for what the stream has lost (He et al., 2017, section 3.3), and for residual blocks that were removed
behind it.
"""

from __future__ import annotations

import graphlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from onnxprune import rewrite
from onnxprune.axes import IntArray, Keep, kept_positions
from onnxprune.blocks import Block
from onnxprune.data import Data
from onnxprune.dependency import DependencyGraph
from onnxprune.errors import UserError
from onnxprune.model import Array, Model, Node
from onnxprune.ops.spec import Window
from onnxprune.readers import Reader, Readers
from onnxprune.repair.channels import Repaired
from onnxprune.repair.stepping import Stepper
from onnxprune.repair.weights import Weights
from onnxprune.runtime import RunError
from onnxprune.statistics import Regression, batch_size, is_held

# Of the mean second moment; chosen by the error on held-out samples. Infinite: the bias alone.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
COLUMNS = 6144  # of a layer that is refitted: channels times taps of a group
ROWS = 12  # for each column, at most
FEWEST = 4096  # rows that are looked at however few the columns are
STAGES = 64  # at most
SPREAD = 4  # positions that could be looked at for each row that is: above it, fewer samples do
SAMPLES = 64  # at least

Progress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer of the pruned model and where its target is.

    ours    the tensor whose difference to the original is to vanish
    theirs  the tensor of the original that it is compared with
    kept    for each of its axes the positions of the original that stay
    gain    times which the reader's formula enters it
    """

    reader: Reader
    order: tuple[int, ...]
    ours: str
    theirs: str
    kept: tuple[IntArray | None, ...]
    level: int
    gain: float


def refit(
    original: DependencyGraph,
    keep: Keep,
    removed: Sequence[Block],
    pruned: onnx.ModelProto,
    data: Data,
    seed: int = 0,
    progress: Progress = lambda _: None,
    *,
    only_removed: bool = False,
    mean_only: bool = False,
) -> tuple[onnx.ModelProto, list[Repaired]]:
    """The pruned model (in flat form) with its layers refitted, and what became of each.

    only_removed  only those layers that stand in for a removed residual block behind them
    mean_only     biases only

    A layer stays as it is unless its error on held-out samples falls. Raises `UserError` if onnxruntime cannot run
    the original or the pruned model on the data.
    """
    graph = DependencyGraph(Model(pruned))
    layers = list(_layers(original, keep, removed, Readers(graph)))
    if only_removed:
        layers = [layer for layer in layers if layer.ours != layer.theirs]
    stages = _stages(layers)
    done: list[Repaired] = []
    proto = pruned
    runs = _Runs(original, stages, data, seed)
    for number, stage in enumerate(stages):
        model = Model(proto)
        try:
            fits = runs.accumulate(model, number)
        except RunError as error:
            raise UserError(
                f"{original.model.name}: onnxruntime cannot run it on the data ({error})"
            ) from None
        weights = Weights(model)
        for layer, (fitted, held) in zip(stage, fits, strict=True):
            done.append(_solve(layer, fitted, held, weights, (math.inf,) if mean_only else RIDGES))
        proto = rewrite.edited(model, weights.edits("refitted"))
        progress((number + 1) / len(stages))
    return proto, done


# ------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True, eq=False)
class _Spot:
    """A layer of the pruned model that can be refitted.

    end    the tensor that it makes, its bias added
    join   the node that alone reads it and adds it to something else, if there is one
    other  what that adds
    """

    reader: Reader
    order: tuple[int, ...]
    gain: float
    end: str
    join: Node | None
    other: str

    @property
    def columns(self) -> int:
        return math.prod(self.reader.matrix_shape[2:])


def _layers(
    original: DependencyGraph, keep: Keep, removed: Sequence[Block], readers: Readers
) -> Iterator[_Layer]:
    """The layers that read anything that the cut has changed, in order, each with its level.

    Of two layers whose outputs are added up, the larger one looks after the sum, once the other is done.
    """
    model = readers.graph.model
    shapes = readers.graph.shapes.shapes
    gone = {block.join.inputs[block.stream]: block.join.outputs[0] for block in removed}
    dirty = _changed(original, keep, removed, model)
    spots = {spot.reader.node.index: spot for spot in _spots(readers)}
    owners: dict[int, _Spot] = {}
    for spot in spots.values():
        if spot.join is not None:
            rival = owners.get(spot.join.index)
            if rival is None or spot.columns > rival.columns:
                owners[spot.join.index] = spot
    sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
    before: dict[int, list[int]] = {}
    for node in model.nodes:
        read = [*node.inputs, *node.captured]
        here = spots.get(node.index)
        if here is not None and here.join is not None and owners[here.join.index] is here:
            read.append(here.other)
        made = (model.producers.get(name) for name in read)
        before[node.index] = [maker.index for maker in made if maker is not None]
        sorter.add(node.index, *before[node.index])
    depth: dict[int, int] = {}
    for index in sorter.static_order():
        level = max((depth[maker] for maker in before[index]), default=0)
        if index in spots:
            spot = spots[index]
            owned = spot.join is not None and owners[spot.join.index] is spot
            ours = spot.join.outputs[0] if owned and spot.join is not None else spot.end
            theirs = ours
            while theirs in gone:
                theirs = gone[theirs]
            typed = original.types.get(theirs)
            touched = spot.reader.node.outputs[0] in dirty or theirs != ours
            if touched and typed is not None and ours in shapes:
                kept = tuple(kept_positions(axis, keep) for axis in typed)
                yield _Layer(spot.reader, spot.order, ours, theirs, kept, level, spot.gain)
                level += 1
        depth[index] = level


def _spots(readers: Readers) -> Iterator[_Spot]:
    model = readers.graph.model
    shapes = readers.graph.shapes.shapes
    links = {link.node.index: link for link in readers.graph.links}
    outputs = {output.name for output in model.outputs}
    for reader in readers.all:
        node = reader.node
        order = reader.target_order
        gain = float(node.attributes.get("alpha", 1.0))
        columns = math.prod(reader.matrix_shape[2:])
        shared = len(model.consumers.get(reader.weight, ())) > 1
        if not reader.affine or shared or order is None or columns > COLUMNS or not gain:
            continue
        end = (reader.bias.node if reader.bias is not None else node).outputs[0]
        following = model.consumers.get(end, [])
        join = following[0] if len(following) == 1 and end not in outputs else None
        link = links.get(join.index) if join is not None else None
        other = ""
        if join is not None and link is not None and len(link.rule.adds) == 2 and not link.rule.lossy:
            other = next((join.inputs[i] for i in link.rule.adds if join.inputs[i] != end), "")
        adds = other and other not in model.constants
        alike = adds and join is not None and shapes.get(join.outputs[0]) == shapes.get(end)
        yield _Spot(reader, order, gain, end, join if alike else None, other if alike else "")


def _changed(original: DependencyGraph, keep: Keep, removed: Sequence[Block], model: Model) -> set[str]:
    """Tensors of the pruned model whose values the cut may have changed."""
    links = {link.node.outputs[0]: link for link in original.links}
    found = {block.join.inputs[block.stream] for block in removed}
    for node in model.nodes:
        link = links.get(node.outputs[0]) if node.outputs else None
        lost = link is not None and any(
            kept_positions(link.labels[name], keep) is not None for name in link.contracted()
        )
        if lost or not found.isdisjoint(node.inputs) or not found.isdisjoint(node.captured):
            found.update(filter(None, node.outputs))
    return found


def _stages(layers: Sequence[_Layer]) -> list[list[_Layer]]:
    """Layers that are refitted together: one level each, or several where there are too many."""
    levels = sorted({layer.level for layer in layers})
    share = math.ceil(len(levels) / STAGES) if levels else 1
    place = {level: i // share for i, level in enumerate(levels)}
    stages: list[list[_Layer]] = [[] for _ in range(len(set(place.values())))]
    for layer in layers:
        stages[place[layer.level]].append(layer)
    return stages


# --------------------------------------------------------------------------------------- accumulating


class _Runs:
    """Both networks, stage by stage, on the same batches."""

    def __init__(
        self, original: DependencyGraph, stages: Sequence[Sequence[_Layer]], data: Data, seed: int
    ) -> None:
        self.original = original
        self.stages = stages
        self.data = data
        self.seed = seed
        self.before, self.after = Stepper(), Stepper()
        self.size = min(
            (batch_size(data, original.shapes, [*_theirs(stage), *_ours(stage)]) for stage in stages),
            default=1,
        )

    def accumulate(self, model: Model, number: int) -> list[tuple[Regression, Regression]]:
        """For each layer of a stage the regression of what it lacks on what it reads, fitted and held out.

        model  the pruned one, with all earlier stages refitted
        """
        stage, later = self.stages[number], [x for stage in self.stages[number + 1 :] for x in stage]
        here = [layer.reader.node.outputs[0] for layer in (*stage, *later)]
        self.before.stage(self.original.model.proto, _theirs(stage), _theirs(later))
        self.after.stage(model.proto, _ours(stage), _ours(later), here)
        fits = []
        for layer in stage:
            groups, outputs, channels, taps = layer.reader.matrix_shape
            fits.append(
                (Regression(groups, channels * taps, outputs), Regression(groups, channels * taps, outputs))
            )
        data = _enough(stage, self.data, self.original, self.size)
        for index, batch in enumerate(data.batches(self.size)):
            wanted, given = self.before.run(index, batch.feeds), self.after.run(index, batch.feeds)
            for place, (layer, pair) in enumerate(zip(stage, fits, strict=True)):
                random = np.random.default_rng([self.seed, index, number, place])
                target, made = wanted[layer.theirs], given[layer.ours]
                for axis, kept in enumerate(layer.kept):
                    if kept is not None:
                        target = np.take(target, kept, axis=axis)
                if target.shape != made.shape:
                    continue  # how much there is depends on the values
                rows = _wanted(layer) * batch.count // len(data) + 1
                x, e = _rows(layer, given[layer.reader.source.tensor], target - made, rows, random)
                pair[is_held(index)].add(x, e / layer.gain)
        self.before.finish()
        self.after.finish()
        return fits


def _theirs(layers: Sequence[_Layer]) -> list[str]:
    return list(dict.fromkeys(layer.theirs for layer in layers))


def _ours(layers: Sequence[_Layer]) -> list[str]:
    return list(dict.fromkeys(n for layer in layers for n in (layer.reader.source.tensor, layer.ours)))


def _wanted(layer: _Layer) -> int:
    """Rows to fit a layer on."""
    return max(ROWS * math.prod(layer.reader.matrix_shape[2:]), FEWEST)


def _enough(stage: Sequence[_Layer], data: Data, original: DependencyGraph, size: int) -> Data:
    """As many of the samples as it takes to choose each layer's rows from a few times as many positions."""
    needed = SAMPLES
    for layer in stage:
        shape = original.shapes.shapes.get(layer.theirs, ())
        groups, outputs, _, _ = layer.reader.matrix_shape
        positions = max(math.prod(shape[1:]) // (groups * outputs), 1)
        needed = max(needed, math.ceil(SPREAD * _wanted(layer) / positions))
    needed = size * math.ceil(needed / size)  # whole batches: others have gone before
    return data if needed >= len(data) else data.subset(needed)


def _rows(
    layer: _Layer, value: Array, lack: Array, most: int, random: np.random.Generator
) -> tuple[Array, Array]:
    """Columns [groups, rows, channels x taps] and what is lacking [groups, rows, outputs], of at most so many
    positions."""
    reader = layer.reader
    groups, outputs, channels, taps = reader.matrix_shape
    turned = lack.transpose(layer.order)
    space = turned.shape[: turned.ndim - 1 - len(reader.source.moved)]
    count = math.prod(space)
    chosen = np.arange(count) if count <= most else np.sort(random.choice(count, most, replace=False))
    places = np.unravel_index(chosen, space)
    e = turned[places].reshape(len(chosen), groups, outputs).transpose(1, 0, 2)
    source = reader.source
    if reader.window is None:
        rest = [a for a in range(value.ndim) if a != source.axis and a not in source.moved]
        flat = value.transpose(*rest, *source.moved, source.axis)[places]
        flat = flat.reshape(len(chosen), groups, source.before, source.size, source.after)
        return flat.transpose(1, 0, 3, 2, 4).reshape(groups, len(chosen), channels * taps), e
    return _patches(reader, value, places, space), e


def _patches(reader: Reader, value: Array, places: Sequence[IntArray], space: Sequence[int]) -> Array:
    """What the window sees at each place (sample, then position): [groups, places, channels x taps]."""
    window = _window(reader, value.shape[2:], space[1:])
    source, taps = reader.source, math.prod(window.extents)
    rank = len(window.extents)
    found = np.zeros((len(places[0]), value.shape[1], taps), dtype=np.float32)
    reach = [
        [window.position(axis, tap, value.shape[2 + axis], space[1 + axis]) for tap in range(extent)]
        for axis, extent in enumerate(window.extents)
    ]
    for index, tap in enumerate(itertools.product(*map(range, window.extents))):
        inside = np.ones(len(places[0]), dtype=bool)
        where = []
        for axis in range(rank):
            at, valid = reach[axis][tap[axis]]
            here = places[1 + axis]
            inside &= valid[here]
            where.append(at[here])
        rows = np.flatnonzero(inside)
        index_of: tuple[Any, ...] = (places[0][rows], slice(None), *(w[rows] for w in where))
        found[rows, :, index] = value[index_of]
    found = found.reshape(len(found), source.groups, source.before, source.size, source.after * taps)
    return found.transpose(1, 0, 3, 2, 4).reshape(source.groups, len(found), -1)


def _window(reader: Reader, sizes: Sequence[int], outputs: Sequence[int]) -> Window:
    """The reader's window on inputs of these sizes: automatic padding depends on them."""
    window = reader.window
    assert window is not None
    padding = str(reader.node.attributes.get("auto_pad", ""))
    if not padding.startswith("SAME"):
        return window
    axes = zip(sizes, outputs, window.extents, window.strides, window.dilations, strict=True)
    missing = [max((out - 1) * step + (tap - 1) * far + 1 - size, 0) for size, out, tap, step, far in axes]
    return replace(window, pads=tuple((total + (padding == "SAME_LOWER")) // 2 for total in missing))


# -------------------------------------------------------------------------------------------- solving


def _solve(
    layer: _Layer, fitted: Regression, held: Regression, weights: Weights, ridges: Sequence[float]
) -> Repaired:
    """Change the layer's weight by the regression that does best on held-out samples, if any does."""
    reader = layer.reader
    node = weights.model.producers[reader.node.outputs[0]]
    label = reader.node.label
    name = weights.constant(node, reader.operand)
    judge = held if held.count > 1 else fitted
    if judge is fitted:
        ridges = ridges[-1:]  # nothing tells how strong it must be
    before = judge.error()
    if name is None or not before or fitted.count < 2:
        return Repaired(label, "none", 0.0, 0.0)
    centred = reader.bias is not None
    best, least = None, before
    for ridge in ridges:
        change, shift = _regress(fitted, ridge, centred)
        error = judge.error(change, shift)
        if error < least:
            best, least = ridge, error
    if best is None:
        return Repaired(label, "none", 1.0, 1.0)
    change, shift = _regress(fitted.merged(held), best, centred)
    matrix = reader.matrix(weights.value(name))
    delta = change.transpose(0, 2, 1).reshape(matrix.shape)
    weights.set(name, reader.weight_of(matrix + delta))
    if reader.bias is not None and shift is not None:
        weights.shift(weights.model.producers[reader.bias.node.outputs[0]], reader.bias, shift)
    return Repaired(label, f"refit {best:g}", 1.0, least / before)


def _regress(rows: Regression, ridge: float, centred: bool) -> tuple[Array, Array | None]:
    """(change [groups, columns, outputs], shift [groups, outputs])."""
    if math.isinf(ridge):
        return np.zeros((*rows.x.shape, rows.e.shape[1])), rows.e if centred else None
    xx, xe = rows.moments(centred)
    columns = xx.shape[1]
    scale = np.maximum(np.einsum("gcc->g", xx) / columns, 1e-12)
    damped = xx + (ridge * scale)[:, None, None] * np.eye(columns)
    change = np.linalg.solve(damped, xe)
    shift = rows.e - np.einsum("gc,gco->go", rows.x, change) if centred else None
    return change, shift
