"""A graph whose random operators give the same numbers at each run.

What they make is computed from the positions in it: in the range of the operator, equal in two graphs that
name the result alike, at all sizes of the inputs, also inside bodies.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxprune.dependency import DependencyGraph
from onnxprune.model import copied, copied_node

OLDEST_OPSET = 9  # that has the operators which positions are counted with
_PRIMES = 7919, 43758.5453  # what spreads the phases and the sines of neighbours apart


def random(graph: DependencyGraph, proto: onnx.ModelProto) -> list[str]:
    """Operators of the graph whose results differ from run to run."""
    if graph.model.opset() < OLDEST_OPSET:
        return []
    return sorted({node.op_type for node in proto.graph.node if _is_random(node)})


def repeatable(graph: DependencyGraph, proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with numbers that follow from their positions in place of random ones, and with Dropout as
    at inference."""
    if not random(graph, proto):
        return proto
    result = copied(proto)
    del result.graph.node[:]
    for source in proto.graph.node:
        if not _is_random(source):
            result.graph.node.append(source)
        elif source.op_type == "Dropout":
            node = copied_node(source)
            del node.input[2:]
            result.graph.node.append(node)
        else:
            element = graph.shapes.elements.get(source.output[0], onnx.TensorProto.FLOAT)
            result.graph.node.extend(_Numbers(source, element).nodes)
    return result


def _is_random(node: onnx.NodeProto) -> bool:
    drops = node.op_type == "Dropout" and len(node.input) > 2 and bool(node.input[2])
    return node.domain in ("", "ai.onnx") and (drops or node.op_type in _FORMS)


class _Numbers:
    """The nodes that stand for one random operator."""

    def __init__(self, node: onnx.NodeProto, element: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs = list(node.input)
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self._output = node.output[0]
        made = getattr(self, _FORMS[node.op_type])(self.attributes)
        cast = onnx.helper.make_node("Cast", [made], [self._output], name=node.name, to=element)
        self.nodes.append(cast)

    def _emit(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"onnxprune.repeatable.{self._output}.{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        return self._emit("Constant", value=onnx.numpy_helper.from_array(np.array(value, dtype=dtype)))

    def _integers(self, value: npt.ArrayLike) -> str:
        return self._constant(value, np.int64)

    def _floats(self) -> str:
        return self._emit("Cast", self.inputs[0], to=onnx.TensorProto.FLOAT)

    def _fractions(self, shape: str) -> str:
        """Numbers from 0 to 1 that look random: the last digits of sines of their positions."""
        one = onnx.helper.make_tensor("one", onnx.TensorProto.BOOL, [1], [True])
        ones = self._emit("Reshape", self._emit("ConstantOfShape", shape, value=one), self._integers([-1]))
        positions = self._emit("Cast", self._emit("NonZero", ones), to=onnx.TensorProto.FLOAT)
        phase = zlib.crc32(self._output.encode()) % _PRIMES[0]
        sines = self._emit("Sin", self._emit("Add", positions, self._constant(phase)))
        spread = self._emit("Mul", sines, self._constant(_PRIMES[1]))
        return self._emit("Reshape", self._emit("Sub", spread, self._emit("Floor", spread)), shape)

    def _shape(self) -> str:
        """Of what is made: stated, or that of the input."""
        stated = self.attributes.get("shape")
        return self._emit("Shape", self.inputs[0]) if stated is None else self._integers(stated)

    def _uniform(self, attributes: Mapping[str, Any]) -> str:
        low, high = attributes.get("low", 0.0), attributes.get("high", 1.0)
        width = self._emit("Mul", self._fractions(self._shape()), self._constant(high - low))
        return self._emit("Add", width, self._constant(low))

    def _normal(self, attributes: Mapping[str, Any]) -> str:
        """Uniform numbers of the mean and the deviation asked for."""
        mean, half = attributes.get("mean", 0.0), attributes.get("scale", 1.0) * math.sqrt(3)
        return self._uniform({"low": mean - half, "high": mean + half})

    def _bernoulli(self, _: Mapping[str, Any]) -> str:
        return self._emit("Less", self._fractions(self._shape()), self._floats())

    def _multinomial(self, attributes: Mapping[str, Any]) -> str:
        """Classes, all alike: which are likely decides nothing that the check is about."""
        shape = self._emit("Shape", self.inputs[0])
        rows, classes = (self._emit("Gather", shape, self._integers([i])) for i in (0, 1))
        samples = self._integers([attributes.get("sample_size", 1)])
        numbers = self._fractions(self._emit("Concat", rows, samples, axis=0))
        count = self._emit("Cast", classes, to=onnx.TensorProto.FLOAT)
        return self._emit("Floor", self._emit("Mul", numbers, count))


_FORMS = {
    "Bernoulli": "_bernoulli",
    "Multinomial": "_multinomial",
    "RandomNormal": "_normal",
    "RandomNormalLike": "_normal",
    "RandomUniform": "_uniform",
    "RandomUniformLike": "_uniform",
}
