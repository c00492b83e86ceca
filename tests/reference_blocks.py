"""What a model less units and residual blocks must compute, statistics included.

The sum of a stream and what a block adds is a node whose name says which operand the block adds: the first if it
ends in `_swapped`, else the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.dependency import DependencyGraph, Link
from onnxprune.plan import Plan
from tests.reference import TOLERANCE, Array, assert_equal_to_masked, error, feeds, masked, masks, run, stays


def branch_of(join: str) -> int:
    """The operand that a block adds; the fixtures say it in the name."""
    return 0 if join.endswith("_swapped") else 1


def reference(graph: DependencyGraph, plan: Plan) -> onnx.ModelProto:
    """The original with removed units put out where they are summed, statistics over what is kept, and zeros
    for what removed blocks add."""
    proto, keep = masked(graph, plan), masks(graph, plan)
    links = {link.node.label: link for link in graph.links}
    going = {edit.block for edit in plan.removals}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        if node.name in going:
            i = branch_of(node.name)
            nodes += _constant(f"{node.name}.zero", 0.0)
            nodes.append(
                helper.make_node("Mul", [node.input[i], f"{node.name}.zero"], [f"{node.name}.nothing"])
            )
            node.input[i] = f"{node.name}.nothing"
            nodes.append(node)
        elif node.name in links and (here := _statistic(links[node.name], keep)) is not None:
            nodes += (_mean if node.op_type == "ReduceMean" else _norm)(node, here)
        else:
            nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _statistic(link: Link, keep: Mapping[Any, Array]) -> Array | None:
    """Which positions of the last axis stay, of an operator that takes a mean over it."""
    typed = link.inputs[0]
    if link.node.op not in ("ReduceMean", "LayerNormalization") or typed is None:
        return None
    here = stays(typed[-1], keep)
    averaged = link.node.op != "ReduceMean" or link.outputs[0] is None or link.outputs[0][-1].extent == 1
    return here if averaged and not here.all() else None


def _constant(name: str, value: Any) -> list[onnx.NodeProto]:
    tensor = numpy_helper.from_array(np.asarray(value, np.float32), name)
    return [helper.make_node("Constant", [], [name], value=tensor)]


def _mean(node: onnx.NodeProto, here: Array) -> list[onnx.NodeProto]:
    """The sum over what is kept (the rest is zero already) by how many that is."""
    result, name = node.output[0], f"{node.name}.mean"
    node.output[0] = name
    scale = _constant(f"{name}.factor", len(here) / here.sum())
    return [node, *scale, helper.make_node("Mul", [name, f"{name}.factor"], [result])]


def _norm(node: onnx.NodeProto, here: Array) -> list[onnx.NodeProto]:
    """LayerNormalization piece by piece: (x - mean) / sqrt(variance + epsilon) * scale + shift."""
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    x, scale, shift = node.input

    def name(part: str) -> str:
        return f"{node.name}.{part}"

    def mean(source: str, result: str) -> list[onnx.NodeProto]:
        total = helper.make_node("ReduceSum", [source, name("last")], [name(result) + ".sum"])
        return [total, helper.make_node("Div", [name(result) + ".sum", name("count")], [name(result)])]

    last = numpy_helper.from_array(np.array([-1]), name("last"))
    return [
        *_constant(name("mask"), here),
        *_constant(name("count"), here.sum()),
        *_constant(name("epsilon"), epsilon),
        helper.make_node("Constant", [], [name("last")], value=last),
        helper.make_node("Mul", [x, name("mask")], [name("kept")]),
        *mean(name("kept"), "mean"),
        helper.make_node("Sub", [x, name("mean")], [name("centred")]),
        helper.make_node("Mul", [name("centred"), name("mask")], [name("rest")]),
        helper.make_node("Mul", [name("rest"), name("rest")], [name("square")]),
        *mean(name("square"), "variance"),
        helper.make_node("Add", [name("variance"), name("epsilon")], [name("positive")]),
        helper.make_node("Sqrt", [name("positive")], [name("deviation")]),
        helper.make_node("Div", [name("rest"), name("deviation")], [name("normal")]),
        helper.make_node("Mul", [name("normal"), scale], [name("scaled")]),
        helper.make_node("Add", [name("scaled"), shift], [node.output[0]]),
    ]


def assert_equal(graph: DependencyGraph, plan: Plan, pruned: onnx.ModelProto) -> None:
    """At two sizes of the batch and two lengths."""
    onnx.checker.check_model(pruned, full_check=True)
    if not plan.removals and all(edit.kind == "exact" for edit in plan.keeps):
        return assert_equal_to_masked(graph, plan, pruned)
    wanted = reference(graph, plan)
    for batch, seed, length in ((2, 0, 8), (1, 1, 12)):
        inputs = feeds(graph.model.proto, batch, seed, length)
        assert error(run(pruned, inputs), run(wanted, inputs)) < TOLERANCE
    return None
