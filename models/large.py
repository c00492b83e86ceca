"""A decoder of random weights as large as wanted, written without ever being in memory.

    python -m models.large FOLDER [GIGABYTES]

Rotary grouped-query attention and SwiGLU as exporters write them; the weights lie in one external file.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HIDDEN, HEADS, GROUPS, WIDTH, NEURONS, WORDS = 2048, 32, 8, 64, 8192, 4000
ALIGNMENT = 4096


def write(folder: Path, gigabytes: float = 3.0) -> Path:
    """Write decoder.onnx and decoder.onnx.data; as many layers as make up the size."""
    per_layer = 4 * HIDDEN * (2 * HEADS * WIDTH + 2 * GROUPS * WIDTH + 3 * NEURONS)
    layers = max(math.ceil((gigabytes * 1e9 - 8 * HIDDEN * WORDS) / per_layer), 1)
    path = folder / "decoder.onnx"
    writer = _Writer(path)
    hidden = writer.node("Gather", writer.weight("embed", WORDS, HIDDEN), "tokens")
    for i in range(layers):
        hidden = writer.layer(f"layers.{i}", hidden)
    hidden = writer.norm("norm", hidden)
    writer.node("MatMul", hidden, writer.weight("head", HIDDEN, WORDS), output="logits")
    onnx.save(writer.model(), path)
    return path


class _Writer:
    def __init__(self, path: Path) -> None:
        self.data = path.with_name(path.name + ".data").open("wb")
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.ints: dict[tuple[int, ...], str] = {}

    def weight(self, name: str, *shape: int) -> str:
        """A matrix in the external file."""
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        offset = self.data.seek(-(-self.data.tell() // ALIGNMENT) * ALIGNMENT)
        scale = np.float32(1 / math.sqrt(shape[0]))
        for _ in range(shape[0]):
            self.data.write((self.rng.standard_normal(shape[1], np.float32) * scale).tobytes())
        length = self.data.tell() - offset
        for key, value in (("location", Path(self.data.name).name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def vector(self, name: str, values: np.ndarray) -> str:
        self.tensors.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def integers(self, *values: int) -> str:
        if values not in self.ints:
            name = self.ints[values] = "ints." + "_".join(map(str, values))
            self.tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return self.ints[values]

    def node(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"node.{name}", **attributes))
        return name

    def norm(self, name: str, x: str) -> str:
        """RMSNorm written out."""
        square = self.node("Mul", x, x)
        mean = self.node("ReduceMean", square, axes=[-1])
        root = self.node("Sqrt", self.node("Add", mean, self.vector(f"{name}.epsilon", np.array(1e-6))))
        return self.node("Mul", self.node("Div", x, root), self.vector(f"{name}.weight", np.ones(HIDDEN)))

    def layer(self, name: str, x: str) -> str:
        y = self.norm(f"{name}.norm1", x)
        q = self.split_heads(self.node("MatMul", y, self.weight(f"{name}.q", HIDDEN, HEADS * WIDTH)), HEADS)
        k = self.split_heads(self.node("MatMul", y, self.weight(f"{name}.k", HIDDEN, GROUPS * WIDTH)), GROUPS)
        v = self.split_heads(self.node("MatMul", y, self.weight(f"{name}.v", HIDDEN, GROUPS * WIDTH)), GROUPS)
        k, v = self.repeat(k), self.repeat(v)
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=[0, 1, 3, 2]))
        scale = self.vector(f"{name}.scale", np.array(math.sqrt(WIDTH)))
        mixed = self.node("MatMul", self.node("Softmax", self.node("Div", scores, scale), axis=-1), v)
        flat = self.node("Reshape", self.node("Transpose", mixed, perm=[0, 2, 1, 3]), self.integers(0, 0, -1))
        out = self.weight(f"{name}.o", HEADS * WIDTH, HIDDEN)
        x = self.node("Add", x, self.node("MatMul", flat, out))
        y = self.norm(f"{name}.norm2", x)
        gate = self.node("MatMul", y, self.weight(f"{name}.gate", HIDDEN, NEURONS))
        up = self.node("MatMul", y, self.weight(f"{name}.up", HIDDEN, NEURONS))
        inner = self.node("Mul", self.node("Mul", gate, self.node("Sigmoid", gate)), up)
        return self.node("Add", x, self.node("MatMul", inner, self.weight(f"{name}.down", NEURONS, HIDDEN)))

    def split_heads(self, x: str, heads: int) -> str:
        return self.node(
            "Transpose", self.node("Reshape", x, self.integers(0, 0, heads, WIDTH)), perm=[0, 2, 1, 3]
        )

    def repeat(self, x: str) -> str:
        """One key or value head for several query heads: Unsqueeze, Expand to a computed shape, Reshape."""
        wide = self.node("Unsqueeze", x, self.integers(2))
        shape = self.node("Shape", x)
        batch, length = (
            self.node("Gather", shape, self.integers(0)),
            self.node("Gather", shape, self.integers(2)),
        )
        times, width = HEADS // GROUPS, self.integers(WIDTH)
        target = self.node(
            "Concat", batch, self.integers(GROUPS), self.integers(times), length, width, axis=0
        )
        grown = self.node("Expand", wide, target)
        flat = self.node("Concat", batch, self.integers(HEADS), length, width, axis=0)
        return self.node("Reshape", grown, flat)

    def model(self) -> onnx.ModelProto:
        self.data.close()
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", WORDS])],
            self.tensors,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 3.0))
