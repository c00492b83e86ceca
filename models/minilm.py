"""all-MiniLM-L6-v2 in float32: a sentence encoder around weights that a package carries as safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from models.builder import Tensor
from models.exported import Exporter
from models.pretrained import State

HEADS = 12
EPSILON = 1e-12


class _Encoder(Exporter):
    """A BERT whose layers read their weights from a state."""

    def __init__(self, state: State) -> None:
        super().__init__("minilm_l6")
        self.state = state

    def weight(self, name: str) -> Tensor:
        return self.store(name, self.state[name])

    def dense(self, x: Tensor, name: str) -> Tensor:
        matrix = self.store(f"{name}.weight", np.ascontiguousarray(self.state[f"{name}.weight"].T))
        return self.add(self.weight(f"{name}.bias"), self.op("MatMul", x, matrix))

    def normed(self, x: Tensor, name: str) -> Tensor:
        scale, shift = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=EPSILON)

    def embed(self, ids: Tensor) -> Tensor:
        root = "embeddings"
        x = self.op("Gather", self.weight(f"{root}.word_embeddings.weight"), ids)
        places = self.op("Gather", self.weight(f"{root}.position_embeddings.weight"), self.counted(ids, 1))
        first = self.store("first_type", self.state[f"{root}.token_type_embeddings.weight"][0])
        return self.normed(self.add(self.add(x, first), places), f"{root}.LayerNorm")

    def layer(self, x: Tensor, mask: Tensor, root: str) -> Tensor:
        names = [f"{root}.attention.self.{part}" for part in ("query", "key", "value")]
        width = x.extent(-1) // HEADS
        q, k, v = (self.apart(self.dense(x, name), HEADS, width) for name in names)
        y = self.dense(self.attend(q, k, v, mask), f"{root}.attention.output.dense")
        x = self.normed(self.add(y, x), f"{root}.attention.output.LayerNorm")
        y = self.gelu(self.dense(x, f"{root}.intermediate.dense"))
        return self.normed(self.add(self.dense(y, f"{root}.output.dense"), x), f"{root}.output.LayerNorm")


def minilm(state: State) -> ModelProto:
    """Word numbers and a mask of the padding, both (batch, length), to embeddings (batch, 384) of length 1."""
    g = _Encoder(state)
    ids, real = (g.ids("batch", "length", name=name) for name in ("input_ids", "attention_mask"))
    shown = g.op("Cast", real, to=TensorProto.FLOAT)
    mask = g.mul(g.op("Sub", g.number(1.0), g.unsqueeze(shown, 1, 2)), g.number(-1e4))
    x = g.embed(ids)
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    for layer in range(layers):
        x = g.layer(x, mask, f"encoder.layer.{layer}")
    weights = g.unsqueeze(shown, 2)
    total = g.reduce("ReduceSum", g.mul(x, weights), 1, keepdims=False)
    mean = g.op("Div", total, g.reduce("ReduceSum", weights, 1, keepdims=False))
    length = g.op("Sqrt", g.reduce("ReduceSum", g.mul(mean, mean), -1))
    return g.model(g.op("Div", mean, length), names=["embedding"])


def save_minilm(state: State, path: Path) -> None:
    """Write the encoder."""
    onnx.save_model(minilm(state), path)
