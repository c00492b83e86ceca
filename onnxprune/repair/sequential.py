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

import functools
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
from onnxprune.readers import Floats, Reader, Readers, Source
from onnxprune.repair import normal
from onnxprune.repair.channels import Repaired
from onnxprune.repair.stepping import Stepper
from onnxprune.repair.weights import Weights
from onnxprune.runtime import RunError
from onnxprune.statistics import Regression, batch_size, is_held

# Of the mean second moment; chosen by the error on held-out samples. Infinite: the bias alone.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
COLUMNS = (
    8192  # channels times taps that are solved for together; of wider layers blocks, one after the other
)
ROWS = 12  # for each column, at most
FEWEST = 4096  # rows that are looked at however few the columns are
STAGES = 64  # at most
SPREAD = 4  # positions that could be looked at for each row that is: above it, fewer samples do
SAMPLES = 64  # at least

FEW, STRETCH = 64, 2.0  # rows at which a match goes half way; the most that it scales by

Progress = Callable[[float], None]
Fit = tuple[Floats, Floats | None]  # change [groups, columns, outputs], shift [groups, outputs]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer of the pruned model and where its target is.

    ours    the tensor whose difference to the original is to vanish
    theirs  the tensor of the original that it is compared with
    kept    for each of its axes the positions of the original that stay
    gain    times which the reader's formula enters it
    part    channels of each group that are refitted; the others are left to other stages, and the sweep over all
            is one of block coordinate descent (Gauss-Seidel)
    """

    reader: Reader
    order: tuple[int, ...]
    ours: str
    theirs: str
    kept: tuple[IntArray | None, ...]
    level: int
    gain: float
    part: slice  # of the channels of a group

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, columns, outputs."""
        groups, outputs, _, taps = self.reader.matrix_shape
        return groups, (self.part.stop - self.part.start) * taps, outputs


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
    return proto, _summed(done)


def _summed(done: Sequence[Repaired]) -> list[Repaired]:
    """One entry for each node: blocks of a wide layer one after the other."""
    found: dict[str, Repaired] = {}
    for entry in done:
        if entry.node in found:
            first = found[entry.node]
            method = f"{first.method}, {entry.method}"
            entry = Repaired(entry.node, method, first.before, first.after * entry.after)
        found[entry.node] = entry
    return list(found.values())


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
            touched = spot.reader.node.result in dirty or theirs != ours
            if touched and typed is not None and ours in shapes:
                kept = tuple(kept_positions(axis, keep) for axis in typed)
                for part in _parts(spot.reader):
                    yield _Layer(spot.reader, spot.order, ours, theirs, kept, level, spot.gain, part)
                    level += 1
        depth[index] = level


def _parts(reader: Reader) -> list[slice]:
    """Even blocks of channels whose moments fit into the memory of one of `COLUMNS` columns and a single group."""
    groups, _, channels, taps = reader.matrix_shape
    most = max(math.isqrt(COLUMNS**2 // groups) // taps, 1)
    step = math.ceil(channels / math.ceil(channels / most))
    return [slice(first, min(first + step, channels)) for first in range(0, channels, step)]


def _spots(readers: Readers) -> Iterator[_Spot]:
    model = readers.graph.model
    shapes = readers.graph.shapes.shapes
    links = {link.node.index: link for link in readers.graph.links}
    outputs = {output.name for output in model.outputs}
    for reader in readers.all:
        node = reader.node
        order = reader.target_order
        gain = float(node.attributes.get("alpha", 1.0))
        taps = reader.matrix_shape[3]
        shared = len(model.consumers.get(reader.weight, ())) > 1
        if not reader.affine or shared or order is None or taps > COLUMNS or not gain:
            continue
        end = (reader.bias.node if reader.bias is not None else node).result
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
    links = {link.node.result: link for link in original.links}
    found = {block.join.inputs[block.stream] for block in removed}
    for node in model.nodes:
        link = links.get(node.result)
        lost = link is not None and any(
            kept_positions(link.labels[name], keep) is not None for name in link.contracted()
        )
        if lost or not found.isdisjoint(node.inputs) or not found.isdisjoint(node.captured):
            found.update(filter(None, node.outputs))
    return found


def _stages(layers: Sequence[_Layer]) -> list[list[_Layer]]:
    """Layers that are refitted together: one level each, or several where there are too many; blocks of the same
    layer never together, and no more than memory has room for."""
    levels = sorted({layer.level for layer in layers})
    share = math.ceil(len(levels) / STAGES) if levels else 1
    place = {level: i // share for i, level in enumerate(levels)}
    portions: list[list[_Layer]] = [[] for _ in range(len(set(place.values())))]
    for layer in layers:
        portions[place[layer.level]].append(layer)
    stages: list[list[_Layer]] = []
    for portion in portions:
        stages.append([])
        used = 0
        for layer in sorted(portion, key=lambda layer: layer.level):
            groups, columns, _ = layer.shape
            twice = any(layer.reader is other.reader for other in stages[-1])
            if twice or (stages[-1] and used + groups * columns**2 > COLUMNS**2):
                stages.append([])
                used = 0
            stages[-1].append(layer)
            used += groups * columns**2
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
        here = [layer.reader.node.result for layer in (*stage, *later)]
        self.before.stage(self.original.model.proto, _theirs(stage), _theirs(later))
        self.after.stage(model.proto, _ours(stage), _ours(later), here)
        fits = [(Regression(*layer.shape), Regression(*layer.shape)) for layer in stage]
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
    return max(ROWS * layer.shape[1], FEWEST)


def _enough(stage: Sequence[_Layer], data: Data, original: DependencyGraph, size: int) -> Data:
    """As many of the samples as it takes to choose each layer's rows from a few times as many positions."""
    needed = SAMPLES
    for layer in stage:
        shape = original.shapes.shapes.get(layer.theirs, ())
        groups, _, outputs = layer.shape
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
    groups, columns, outputs = layer.shape
    turned = lack.transpose(layer.order)
    space = turned.shape[: turned.ndim - 1 - len(reader.source.moved)]
    count = math.prod(space)
    chosen = np.arange(count) if count <= most else np.sort(random.choice(count, most, replace=False))
    places = np.unravel_index(chosen, space)
    e = turned[places].reshape(len(chosen), groups, outputs).transpose(1, 0, 2)
    value, source = _narrowed(layer, value)
    if reader.window is None:
        rest = [a for a in range(value.ndim) if a != source.axis and a not in source.moved]
        found = value.transpose(*rest, *source.moved, source.axis)[places]
        taps = 1
    else:
        found = _patches(reader, value, places, space)
        taps = found.shape[2]
    found = found.reshape(len(chosen), groups, source.before, source.size, source.after * taps)
    return found.transpose(1, 0, 3, 2, 4).reshape(groups, len(chosen), columns), e


def _narrowed(layer: _Layer, value: Array) -> tuple[Array, Source]:
    """The value with the channels that are refitted alone, and how they lie there."""
    source, part = layer.reader.source, layer.part
    if part == slice(0, source.size):
        return value, source
    lying = np.arange(value.shape[source.axis]).reshape(-1, source.before, source.size, source.after)
    value = np.take(value, lying[:, :, part].ravel(), axis=source.axis)
    return value, replace(source, size=part.stop - part.start)


def _patches(reader: Reader, value: Array, places: Sequence[IntArray], space: Sequence[int]) -> Array:
    """What the window sees at each place (sample, then position): [places, channels, taps]."""
    window = _window(reader, value.shape[2:], space[1:])
    rank = len(window.extents)
    found = np.zeros((len(places[0]), value.shape[1], math.prod(window.extents)), dtype=np.float32)
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
    return found


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
    """Change the layer's weight by what does best on held-out samples, if anything does: by a regression, or by
    matching means and deviations alone. `fitted` is used up."""
    reader = layer.reader
    node = weights.model.producers[reader.node.result]
    label = reader.node.label
    name = weights.constant(node, reader.operand)
    judge = held if held.count > 1 else fitted
    before = judge.error()
    if name is None or not before or fitted.count < 2:
        return Repaired(label, "none", 0.0, 0.0)
    matrix = reader.matrix(weights.value(name))
    own = matrix[:, :, layer.part]
    groups, columns, outputs = layer.shape
    centred = reader.bias is not None
    options: dict[str, Callable[[Regression], Fit]] = {
        f"refit {ridge:g}": functools.partial(_regress, ridge=ridge, centred=centred)
        # without held-out rows nothing tells how strong a ridge must be
        for ridge in (ridges[-1:] if judge is fitted else ridges)
    }
    if len(options) > 1:
        flat = own.transpose(0, 2, 3, 1).reshape(groups, columns, outputs)
        options["match"] = functools.partial(_match, weight=flat, centred=centred)
    best, least = None, before
    for method, option in options.items():
        try:
            error = judge.error(*option(fitted))
        except np.linalg.LinAlgError:  # too weak a ridge for what rounding leaves of the moments
            continue
        if error < least:
            best, least = method, error
    if best is None:
        return Repaired(label, "none", 1.0, 1.0)
    fitted.absorb(held)
    change, shift = options[best](fitted)
    own += change.reshape(groups, -1, own.shape[3], outputs).transpose(0, 3, 1, 2)
    weights.set(name, reader.weight_of(matrix))
    if reader.bias is not None and shift is not None:
        weights.shift(weights.model.producers[reader.bias.node.result], reader.bias, shift)
    return Repaired(label, best, 1.0, least / before)


def _regress(rows: Regression, ridge: float, centred: bool) -> Fit:
    if math.isinf(ridge):
        return np.zeros((*rows.x.shape, rows.e.shape[1])), rows.e if centred else None
    xx, xe = rows.moments(centred)
    along = np.arange(xx.shape[1])
    scale = np.maximum(np.einsum("gcc->g", xx, dtype=np.float64) / len(along), 1e-12)
    xx[:, along, along] += ridge * scale[:, None]
    return _shifted(rows, normal.solve(xx, xe), centred)


def _match(rows: Regression, weight: Floats, centred: bool) -> Fit:
    """Outputs scaled and shifted to the mean and deviation of the original's, on the inputs of the pruned network
    (Jordan et al., "REPAIR", 2023; Li et al., "EagleEye", 2020, for BatchNorm), less for few rows."""
    rounded = weight.astype(rows.xx.dtype)
    ours = np.einsum("gco,gco->go", rounded, rows.xx @ rounded, dtype=np.float64)
    theirs = ours + 2 * np.einsum("gco,gco->go", rounded, rows.xe, dtype=np.float64) + rows.ee
    scale = np.sqrt(np.maximum(theirs, 0.0) / np.where(ours > 0, ours, 1.0))
    trust = rows.count / (rows.count + FEW) * (ours > 0)
    scale = 1 + trust * (np.clip(scale, 1 / STRETCH, STRETCH) - 1)
    return _shifted(rows, weight * (scale - 1)[:, None], centred)


def _shifted(rows: Regression, change: Floats, centred: bool) -> Fit:
    """With the shift that is left to the bias."""
    return change, rows.e - np.einsum("gc,gco->go", rows.x, change) if centred else None
