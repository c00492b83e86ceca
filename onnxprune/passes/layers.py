"""Remove layers: whole residual blocks, whose input goes on as if they added nothing.

What a removed block computes for others (an attention mask, a key that is also a graph output) stays.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence

import numpy as np

from onnxprune.blocks import Block, Blocks
from onnxprune.errors import UserError
from onnxprune.parts import inner_values
from onnxprune.plan import Remove
from onnxprune.runtime import RunError
from onnxprune.shapes import accepted_runs

CRITERIA = ("influence", "last", "random")


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
    blocks: Blocks, wish: str, criterion: str, exclude: Sequence[str] = (), seed: int = 0
) -> list[Remove]:
    """Which residual blocks go.

    wish       how many, a share below 1 of all, or patterns on the names of their nodes
    criterion  influence (the least first; Men et al., "ShortGPT", 2024: one minus the cosine between the
               stream before and after the block, here on seeded inputs), last (the deepest first; Gromov et
               al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024), random

    Raises `UserError` if there are not as many, or if no block bears a name.
    """
    found = [block for block in blocks.residual if not any(_matches(block, p) for p in exclude)]
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
    scores = _scores(blocks, found, criterion, seed) if count else {}
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


def _matches(block: Block, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(node.label, pattern) for node in (block.join, *block.nodes))


def _scores(blocks: Blocks, found: Sequence[Block], criterion: str, seed: int) -> dict[str, float]:
    """The least goes first."""
    if criterion == "last":
        return {block.name: float(-i) for i, block in enumerate(found)}
    if criterion == "random":
        values = np.random.default_rng(seed).random(len(found))
        return {block.name: float(v) for block, v in zip(found, values, strict=True)}
    return _influence(blocks, found)


def _influence(blocks: Blocks, found: Sequence[Block]) -> dict[str, float]:
    """1 - cos(x, x + f(x)) of each block, over one run on seeded inputs."""
    graph = blocks.graph
    model = graph.model
    pairs = {block.name: (block.join.inputs[block.stream], block.join.outputs[0]) for block in found}
    names = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
    try:
        run = inner_values(model, graph.shapes, names)
        [(_, _, values)] = accepted_runs(model, graph.shapes, run, 1)
    except RunError as error:
        raise UserError(
            f"{model.name}: layers cannot be ranked by influence, onnxruntime cannot run the model ({error}); "
            "use --layer-criterion last"
        ) from None
    return {name: 1 - _cosine(values[a], values[b]) for name, (a, b) in pairs.items()}


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 and math.isfinite(norms) else 0.0
