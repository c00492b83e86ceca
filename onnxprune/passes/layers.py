"""Remove layers: whole residual blocks, whose input goes on as if they added nothing.

What a removed block computes for others (an attention mask, a key that is also a graph output) stays.

Criteria, the least first; the first three look at data, or at seeded inputs where there is none:

influence  1 - E cos(x, x + f(x)) over tokens (pixels), x the stream before the block f: Men et al.,
           "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (2024), eq. 1
error      the change of the model's outputs when this block alone is removed, ||y' - y||^2 / ||y||^2, the
           mean over float outputs: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and
           Elimination of Transformer Blocks" (2024), with the output error for their perplexity
obs        the share of the variance of x + f(x) that is lost when the rest makes up for f as well as a linear
           map of x can: the residual of the ridge regression of f(x) on x, on held-out tokens (the block of
           weights of Kurtic et al., "ZipLM", 2023, for a whole branch)
last       the deepest first: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (2024)
random     seeded
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnxprune import flow, surgery
from onnxprune.blocks import Block, Blocks
from onnxprune.data import Data
from onnxprune.errors import UserError
from onnxprune.model import Array, Model
from onnxprune.parts import inner_values
from onnxprune.plan import Plan, Remove
from onnxprune.runtime import Feeds, RunError
from onnxprune.sensitivity import features
from onnxprune.shapes import accepted_runs
from onnxprune.statistics import Regression, batch_size

CRITERIA = ("influence", "error", "obs", "last", "random")
RIDGES = (1e-4, 1e-2, 1.0)  # of the mean variance; the best on held-out tokens counts
HELD = 4  # the last of four parts of each batch is held out, of batches of one token every fourth
ROOM = 2**30  # bytes of regressions that are kept at a time


def check(wish: str) -> None:
    """Raises `UserError` for a number of layers that cannot be meant, and for no names at all."""
    number = _number(wish)
    if number is None:
        meant = any(wish.split(","))
    else:
        meant = 0 < number < 1 or (number >= 1 and number.is_integer())
    if not meant:
        raise UserError(f"--layers {wish}: give a whole number, a share below 1, or names")


def plan(
    blocks: Blocks,
    wish: str,
    criterion: str,
    exclude: Sequence[str] = (),
    seed: int = 0,
    data: Data | None = None,
) -> list[Remove]:
    """Which residual blocks go.

    wish       how many, a share below 1 of all, or patterns on the names of their nodes
    criterion  one of `CRITERIA` (see the module)

    Raises `UserError` if there are not as many, if no block bears a name, or if the model cannot be run.
    """
    found = [block for block in blocks.residual if not touches(block, exclude)]
    number = _number(wish)
    if number is None:
        chosen = _named(blocks, found, wish)
        return [Remove(block.name, f"{block.kind}, by name") for block in chosen]
    count = int(number) if number >= 1 else math.floor(number * len(found) + 0.5)
    if count > len(found):
        raise UserError(
            f"{blocks.graph.model.name}: --layers {wish}: there are {len(found)} residual blocks that can go "
            "(see `onnxprune inspect`)"
        )
    scores = _scores(blocks, found, criterion, seed, data) if count else {}
    ranked = sorted(found, key=lambda block: (scores.get(block.name, 0.0), -block.join.index))[:count]
    going = {block.name for block in ranked}
    return [
        Remove(block.name, f"{block.kind}, {criterion} {scores[block.name]:.3g}")
        for block in found
        if block.name in going
    ]


def _number(wish: str) -> float | None:
    try:
        return float(wish)
    except ValueError:
        return None


def _named(blocks: Blocks, found: Sequence[Block], wish: str) -> list[Block]:
    chosen: dict[str, Block] = {}
    for pattern in filter(None, wish.split(",")):
        matching = [block for block in found if _matches(block, pattern)]
        if not matching:
            raise UserError(
                f"{blocks.graph.model.name}: --layers {pattern}: no residual block that can go has a node of this "
                "name (see `onnxprune inspect`)"
            )
        chosen |= {block.name: block for block in matching}
    return [block for block in found if block.name in chosen]


def touches(block: Block, patterns: Sequence[str]) -> bool:
    """Whether a node of the block has a name that one of the patterns fits."""
    return any(_matches(block, pattern) for pattern in patterns)


def _matches(block: Block, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(node.label, pattern) for node in (block.join, *block.nodes))


def _scores(
    blocks: Blocks, found: Sequence[Block], criterion: str, seed: int, data: Data | None
) -> dict[str, float]:
    """The least goes first."""
    if criterion == "last":
        return {block.name: float(-i) for i, block in enumerate(found)}
    if criterion == "random":
        values = np.random.default_rng(seed).random(len(found))
        return {block.name: float(v) for block, v in zip(found, values, strict=True)}
    measure = {"influence": _influence, "error": _output_error, "obs": _unexplained}[criterion]
    try:
        return measure(blocks, found, data)
    except RunError as error:
        given = "" if data is None else f" on {data.source}"
        raise UserError(
            f"{blocks.graph.model.name}: layers cannot be ranked by {criterion}, onnxruntime cannot run the "
            f"model{given} ({error}); use --layer-criterion last"
        ) from None


Run = Callable[[Feeds], dict[str, Array]]


def _values(
    blocks: Blocks, run: Run, tensors: Sequence[str], data: Data | None
) -> Iterator[dict[str, Array]]:
    """What a run gives on each batch of data, or on seeded inputs."""
    graph = blocks.graph
    if data is None:
        for _, _, values in accepted_runs(graph.model, graph.shapes, run, 1):
            yield values
        return
    for batch in data.batches(batch_size(data, graph.shapes, tensors)):
        yield run(batch.feeds)


def _pairs(found: Sequence[Block], whole: bool) -> dict[str, tuple[str, str]]:
    """The stream before each block, and after it (or what the block adds)."""
    return {
        b.name: (b.join.inputs[b.stream], b.join.outputs[0] if whole else b.join.inputs[b.branch])
        for b in found
    }


def _influence(blocks: Blocks, found: Sequence[Block], data: Data | None) -> dict[str, float]:
    pairs = _pairs(found, whole=True)
    names = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
    run = inner_values(blocks.graph.model, blocks.graph.shapes, names)
    axis = {block.name: features(blocks.graph, block) for block in found}
    total = dict.fromkeys(pairs, 0.0)
    count = dict.fromkeys(pairs, 0)
    for values in _values(blocks, run, names, data):
        for name, (a, b) in pairs.items():
            cosines = _cosines(*(_tokens(values[t], axis[name]) for t in (a, b)))
            total[name] += float(cosines.sum())
            count[name] += len(cosines)
    return {name: 1 - total[name] / max(count[name], 1) for name in pairs}


def _cosines(a: Array, b: Array) -> Array:
    """Of rows; 1 where both are zero or the same, and 0 where one is zero or not finite."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        products = np.einsum("nc,nc->n", x, y)
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    usable = (norms > 0) & np.isfinite(norms) & np.isfinite(products)
    same = (x == y).all(axis=1)
    return np.where(same, 1.0, np.divide(products, norms, out=np.zeros(len(x)), where=usable))


def _tokens(value: Array, features: int) -> Array:
    """[tokens, features]."""
    moved = np.moveaxis(value, features, -1)
    return moved.reshape(-1, moved.shape[-1])


def _output_error(blocks: Blocks, found: Sequence[Block], data: Data | None) -> dict[str, float]:
    graph = blocks.graph
    floats = [o.name for o in graph.model.outputs if o.name in graph.model.producers]
    whole = inner_values(graph.model, graph.shapes, floats)
    scores = {}
    for block in found:
        edited = surgery.apply(graph, Plan("", (Remove(block.name),)), blocks)
        part = inner_values(Model(flow.flatten(edited).proto), graph.shapes, floats)

        def both(feeds: Feeds, part: Run = part) -> dict[str, Array]:
            before, after = whole(feeds), part(feeds)
            return before | {f"{name}'": after[name] for name in floats}

        changed, energy = dict.fromkeys(floats, 0.0), dict.fromkeys(floats, 0.0)
        for values in _values(blocks, both, floats, data):
            for name in floats:
                before, after = values[name], values[f"{name}'"]
                if before.dtype.kind == "f" and before.shape == after.shape:
                    difference = after.astype(np.float64) - before
                    changed[name] += float(np.vdot(difference, difference))
                    energy[name] += float(np.vdot(before.astype(np.float64), before))
        shares = [changed[name] / energy[name] for name in floats if energy[name] > 0]
        scores[block.name] = float(np.mean(shares)) if shares else 0.0
    return scores


def _unexplained(blocks: Blocks, found: Sequence[Block], data: Data | None) -> dict[str, float]:
    graph = blocks.graph
    pairs = _pairs(found, whole=False)
    axis = {block.name: features(blocks.graph, block) for block in found}
    portions: list[list[str]] = [[]]
    held = 0
    for block in found:
        width = graph.shapes.shapes[block.join.outputs[0]][axis[block.name]]
        size = 2 * 2 * 8 * width**2
        if portions[-1] and held + size > ROOM:
            portions.append([])
            held = 0
        portions[-1].append(block.name)
        held += size
    scores: dict[str, float] = {}
    for portion in portions:
        names = list(dict.fromkeys(tensor for name in portion for tensor in pairs[name]))
        run = inner_values(graph.model, graph.shapes, names)
        sums: dict[str, tuple[Regression, Regression]] = {}
        for values in _values(blocks, run, names, data):
            for name in portion:
                x, e = (_tokens(values[tensor], axis[name])[None] for tensor in pairs[name])
                fitted, judged = sums.setdefault(
                    name, (Regression(1, x.shape[2], e.shape[2]), Regression(1, x.shape[2], e.shape[2]))
                )
                done = fitted.count + judged.count
                at = x.shape[1] - (done + x.shape[1]) // HELD + done // HELD
                fitted.add(x[:, :at], e[:, :at])
                judged.add(x[:, at:], e[:, at:])
        scores |= {name: unexplained(*sums[name]) for name in portion}
    return scores


def unexplained(fitted: Regression, judged: Regression) -> float:
    """The share of the variance of x + e that a ridge regression of e on x leaves, on rows of its own (on the
    same rows where there are none)."""
    if not judged.count:
        judged = fitted
    xx, xe = fitted.moments(centred=True)
    whole = fitted if judged is fitted else fitted.merged(judged)
    total = (
        float(np.einsum("gcc->", whole.xx) + 2 * np.einsum("gcc->", whole.xe) + whole.ee.sum()) / whole.count
    )
    level = float(np.einsum("gcc->", xx)) / xx.shape[1]
    left = [judged.error(None, fitted.e)]
    for ridge in RIDGES:
        if level > 0:
            weight = np.linalg.solve(xx + ridge * level * np.eye(xx.shape[1]), xe)
            left.append(judged.error(weight, fitted.e - np.einsum("gc,gco->go", fitted.x, weight)))
    return min(left) / total if total > 0 else 0.0
