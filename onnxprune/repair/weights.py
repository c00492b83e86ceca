"""Changed weights and biases as edits of a pruned model."""

from __future__ import annotations

import numpy as np
import onnx

from onnxprune.model import Array, Model, Node, copied_node, fresh_name
from onnxprune.plan import Edit, Rewire, SetWeight
from onnxprune.readers import Bias


class Weights:
    """Collects new values of constants of one model; tensors that several nodes read are left alone."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.values: dict[str, Array] = {}
        self._added: dict[str, tuple[Node, int, Array]] = {}

    def constant(self, node: Node, operand: int) -> str | None:
        """The constant that a node reads there, if nothing else does."""
        name = node.inputs[operand] if operand < len(node.inputs) else ""
        if name not in self.model.constants:
            return None
        return name if len(self.model.consumers.get(name, ())) == 1 else None

    def value(self, name: str) -> Array:
        """As it is now."""
        return self.values[name] if name in self.values else self.model.array(name)

    def set(self, name: str, value: Array) -> None:
        old = self.model.array(name)
        self.values[name] = value.reshape(old.shape).astype(old.dtype)

    def shift(self, node: Node, bias: Bias, shift: Array) -> None:
        """Add to what the reader makes; `node` holds the bias in this model."""
        change = shift.ravel() / bias.scale
        name = self.constant(node, bias.operand)
        if name is not None:
            old = self.value(name)
            self.set(name, old.astype(np.float64).ravel() + change)
        elif bias.operand >= len(node.inputs) or not node.inputs[bias.operand]:
            key = node.result
            before = self._added[key][2] if key in self._added else np.zeros(len(change))
            self._added[key] = (node, bias.operand, before + change)

    def edits(self, reason: str) -> list[Edit]:
        """What makes the model so."""
        found: list[Edit] = [SetWeight(name, value, reason) for name, value in self.values.items()]
        taken = {name for node in self.model.nodes for name in (*node.inputs, *node.outputs)}
        for node, operand, value in self._added.values():
            weight = next(self.model.array(n) for n in node.inputs[1:] if n in self.model.constants)
            name = fresh_name(f"{node.label}.bias", taken)
            new: onnx.NodeProto = copied_node(node.proto)
            new.input.extend([""] * (operand + 1 - len(new.input)))
            new.input[operand] = name
            found.append(SetWeight(name, value.astype(weight.dtype), reason))
            found.append(Rewire((node.result,), add=(new,), reason=reason))
        return found
