"""Repair without training: closed forms that make what stays do the work of what went.

    none        the cut alone
    mean        what went is replaced by its mean, in the bias of its readers
    ridge       by a linear map of what stays, in their weights (`maps`, `channels`)
    sequential  then every layer is refitted to the original's outputs, in the order of the graph (`sequential`)

Residual blocks that went are made up for by the layer before them: by a map (ridge, sequential) or a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from onnxprune import flow, rewrite
from onnxprune.axes import Keep
from onnxprune.blocks import Block, Blocks
from onnxprune.criteria import Evidence
from onnxprune.data import Data
from onnxprune.errors import UserError
from onnxprune.model import Model
from onnxprune.outputs import Distance, telling
from onnxprune.repair import channels, sequential
from onnxprune.repair.channels import Repaired
from onnxprune.repair.weights import Weights
from onnxprune.runtime import RunError
from onnxprune.statistics import batch_size

__all__ = ["Repaired", "Repairs", "repair"]

JUDGES = 64  # samples that the stages of a repair are compared on
GAIN = 0.99  # a repair that does not lower the error below this share of it says nothing


@dataclass(frozen=True)
class Repairs:
    """A repaired model, and what was done.

    errors   distance of the outputs from the original's (`outputs.Distance`) on some of the samples: without
             repair, and after each stage that was tried
    chosen   the stage that is kept: the one of the least error
    layers   what became of each layer, of that stage
    """

    proto: onnx.ModelProto
    errors: dict[str, float]
    chosen: str
    layers: tuple[Repaired, ...]


def repair(
    method: str,
    blocks: Blocks,
    keep: Keep,
    removed: Sequence[Block],
    pruned: onnx.ModelProto,
    evidence: Evidence,
    data: Data,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Repairs:
    """Repair a pruned model; a stage that does not bring the outputs closer to the original's is undone.

    keep, removed  what was cut
    Raises `UserError` if onnxruntime cannot run the models on the data.
    """
    graph = blocks.graph
    judges = data if len(data) <= JUDGES else data.subset(JUDGES)
    proto = flow.flatten(pruned).proto
    stages: dict[str, tuple[onnx.ModelProto, list[Repaired]]] = {"none": (proto, [])}
    assert evidence.statistics is not None
    weights = Weights(Model(proto))
    gone = blocks.gone(removed)
    done = channels.repair(
        evidence.readers, keep, gone, weights, evidence.statistics, mean_only=method == "mean"
    )
    proto = rewrite.edited(weights.model, weights.edits("repaired"))
    if method != "sequential" and removed:
        proto, more = sequential.refit(
            graph, keep, removed, proto, data, seed, progress, only_removed=True, mean_only=method == "mean"
        )
        done += more
    stages["mean" if method == "mean" else "ridge"] = proto, done
    if method == "sequential":
        proto, refitted = sequential.refit(graph, keep, removed, proto, data, seed, progress)
        stages["sequential"] = proto, [*done, *refitted]
    try:
        distance = Distance(graph.model, judges, batch_size(judges, graph.shapes, telling(graph.model)))
        errors = {name: distance.of(stage[0]) for name, stage in stages.items()}
    except RunError as error:
        raise UserError(f"{graph.model.name}: onnxruntime cannot run it on the data ({error})") from None
    best = min(errors, key=lambda name: errors[name])
    chosen = best if errors[best] < GAIN * errors["none"] else "none"
    proto, layers = stages[chosen]
    return Repairs(flow.nest(proto), errors, chosen, tuple(layers))
