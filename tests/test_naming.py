"""Names of groups for people: unique, made from the layer's name, and the same for the same model."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest
from onnx import helper

from models.topologies import TOPOLOGIES
from models.transformers import TRANSFORMERS
from onnxprune.blocks import Blocks
from onnxprune.dependency import DependencyGraph
from onnxprune.model import Model
from onnxprune.naming import group_names
from tests.small import floats, weight

BUILD = {**TOPOLOGIES, **TRANSFORMERS}


def blocks(model: onnx.ModelProto) -> Blocks:
    return Blocks(DependencyGraph(Model(model)))


@pytest.mark.parametrize("name", sorted(BUILD))
def test_names_are_unique_and_of_a_layer_of_the_group(name: str) -> None:
    found = blocks(BUILD[name]())
    names = group_names(found)
    assert set(names) == set(found.graph.groups)
    assert len(set(names.values())) == len(names)
    for group, text in names.items():
        layer, role, count, *_ = text.split(" ")
        assert (role, count) == (found.role(group), f"({group.size:,})")
        where = [part for o in group.occurrences for part in (o.node.label, o.tensor)]
        assert any(layer in part for part in where)
    assert list(group_names(blocks(BUILD[name]())).values()) == list(names.values())


def perceptron(
    nodes: Sequence[str], biases: Sequence[str] = (), units: Sequence[int] = ()
) -> onnx.ModelProto:
    """Matrix products one after the other, of these names, each with a bias where one is named; 4 features in, 2 out."""
    units = units or [8] * (len(nodes) - 1)
    sizes = [4, *units, 2]
    stored, made, last = [], [], "x"
    for i, name in enumerate(nodes):
        stored.append(weight(f"w{i}", sizes[i], sizes[i + 1]))
        made.append(helper.make_node("MatMul", [last, f"w{i}"], [f"a{i}"], name=name))
        last = f"a{i}"
        if i < len(biases):
            stored.append(weight(biases[i], sizes[i + 1]))
            made.append(helper.make_node("Add", [last, biases[i]], [f"b{i}"], name=f"add_{i}"))
            last = f"b{i}"
        made.append(helper.make_node("Relu", [last], [f"c{i}"], name=f"relu_{i}"))
        last = f"c{i}"
    graph = helper.make_graph(made, "net", [floats("x", "n", 4)], [floats(last, "n", 2)], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("nodes", "biases", "expected"),
    [
        (["/m/fc.0/MatMul", "/m/b/fc/MatMul", "/m/out/MatMul"], [], ["fc.0", "b/fc"]),
        (["/m/layer.0/MatMul", "/m/layer.1/MatMul", "/out"], [], ["layer.0", "layer.1"]),
        (["m.layer.0.fc", "m.layer.1.fc", "m.out"], [], ["layer.0.fc", "layer.1.fc"]),
        (["/MatMul", "/MatMul_1", "/MatMul_2"], [], ["MatMul", "MatMul_1"]),
        (["", "", ""], [], ["a0", "a1"]),
        (["node_1", "node_2", "node_3"], ["m.a.up.bias", "m.b.up.bias"], ["a.up", "b.up"]),
        (["node_1", "node_2", "node_3"], ["onnx_bias", "m.b.up.bias"], ["node_1", "m.b.up"]),
        (["m.a.weight_DequantizeLinear", "m.b.weight_x", "o"], [], ["a", "b"]),
    ],
)  # fmt: skip
def test_layers(nodes: Sequence[str], biases: Sequence[str], expected: list[str]) -> None:
    """Scopes of the node, less those that all share; the operator last in them says nothing; a node that has
    none is called after its parameters."""
    found = list(group_names(blocks(perceptron(nodes, biases))).values())
    assert found == [f"{layer} ffn (8)" for layer in expected]


def test_what_two_groups_would_share_tells_them_apart() -> None:
    same = ["fc", "fc", "fc #1 ffn (8)", "out"]
    names = list(group_names(blocks(perceptron(same, units=[8, 8, 8]))).values())
    assert names == ["fc ffn (8) #1", "fc ffn (8) #2", "fc #1 ffn (8) ffn (8)"]
    sizes = list(group_names(blocks(perceptron(["fc", "fc", "out"], units=[8, 1024]))).values())
    assert sizes == ["fc ffn (8)", "fc ffn (1,024)"]
