"""Apply `SetWeight` and `Rewire` edits: the mutator of passes that change weights and wiring, not width.

The model is never changed: the result is a new one, in which everything that the edits do not touch is
as it was, in the same order. What the edits leave without a reader goes; what had none before stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx

from onnxprune import flow
from onnxprune.errors import UserError
from onnxprune.model import Array, Model, Node, copied_node, copy_without_weights
from onnxprune.plan import Edit, Rewire, SetWeight


def apply(model: Model, edits: Iterable[Edit]) -> onnx.ModelProto:
    """The model with the edits made one after the other.

    Raises `UserError` if an edit removes a node that the model does not have.
    """
    return flow.nest(edited(model, edits))


def edited(model: Model, edits: Iterable[Edit]) -> onnx.ModelProto:
    """The same in flat form (`onnxprune.flow`), where names stay what they are for further edits."""
    rewrite = _Rewrite(model)
    for edit in edits:
        if isinstance(edit, Rewire):
            rewrite.rewire(edit)
        else:
            rewrite.set_weight(edit)
    return rewrite.build()


class _Rewrite:
    def __init__(self, model: Model) -> None:
        self.model = model
        nodes = model.proto.graph.node
        self.places: list[list[onnx.NodeProto]] = [[], *([node] for node in nodes)]
        self.place_of = {o: i for i, node in enumerate(nodes, 1) for o in node.output if o}
        self.weights: dict[str, Array] = {}
        self.renamed: dict[str, str] = {}

    def set_weight(self, edit: SetWeight) -> None:
        self.weights[edit.name] = edit.array

    def rewire(self, edit: Rewire) -> None:
        gone = set(edit.remove)
        for name in edit.remove:
            if name not in self.place_of:
                raise UserError(f"{self.model.name}: no node makes '{name}', which the plan removes")
        touched = sorted({self.place_of[name] for name in gone})
        for place in touched:
            for node in self.places[place]:
                if not gone.isdisjoint(node.output):
                    for output in node.output:
                        self.place_of.pop(output, None)
            self.places[place] = [n for n in self.places[place] if gone.isdisjoint(n.output)]
        for node in edit.add:
            place = max([*touched[:1], *(self.place_of.get(self._now(i), 0) for i in node.input)], default=0)
            self.places[place].append(node)
            self.place_of.update(dict.fromkeys(filter(None, node.output), place))
        self.renamed.update(edit.replace)

    def _now(self, name: str) -> str:
        while name in self.renamed:
            name = self.renamed[name]
        return name

    # ----------------------------------------------------------------------------------- building

    def build(self) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        copy_without_weights(self.model.proto, proto)
        nodes, lost = self._needed([self._wired(node) for place in self.places for node in place])
        del proto.graph.node[:]
        proto.graph.node.extend(self._valued(node) for node in nodes)
        made = {output for node in nodes for output in node.output}
        known = made | lost | self.model.initializers.keys()
        added = [name for name in self.weights if name not in known]
        for tensor in self.model.proto.graph.initializer:
            if tensor.name not in lost:
                new = self._tensor(tensor.name) if tensor.name in self.weights else tensor
                proto.graph.initializer.append(new)
        proto.graph.initializer.extend(self._tensor(name) for name in added)
        self._interface(proto, lost | (self.model.producers.keys() - made), added)
        return proto

    def _wired(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The node reading the tensors that took the place of others."""
        if not any(name in self.renamed for name in node.input):
            return node
        copy = copied_node(node)
        for i, name in enumerate(node.input):
            copy.input[i] = self._now(name)
        return copy

    def _needed(self, nodes: list[onnx.NodeProto]) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes without those that lost their readers; and the constants that lost theirs."""
        graph = self.model.proto.graph
        lasting = {output.name for output in graph.output}
        lasting |= {
            entry.value for a in graph.quantization_annotation for entry in a.quant_parameter_tensor_names
        }
        before = self.model.consumers.keys() | (self.weights.keys() - self.model.constants.keys())
        views = [Node(node, i) for i, node in enumerate(nodes)]
        reads = Counter(name for view in views for name in (*view.inputs, *view.captured))
        kept = []
        for view in reversed(views):
            outputs = [output for output in view.outputs if output]
            unread = not any(reads[o] or o in lasting for o in outputs)
            if unread and not before.isdisjoint(outputs):
                reads.subtract((*view.inputs, *view.captured))
            else:
                kept.append(view.proto)
        lasting |= {name for name, count in reads.items() if count}
        return kept[::-1], (before & (self.model.initializers.keys() | self.weights.keys())) - lasting

    def _valued(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A Constant node with its new value."""
        name = next(iter(node.output), "")
        if node.op_type != "Constant" or name not in self.weights:
            return node
        copy = copied_node(node)
        del copy.attribute[:]
        copy.attribute.append(onnx.helper.make_attribute("value", self._tensor(name)))
        return copy

    def _tensor(self, name: str) -> onnx.TensorProto:
        old = self.model.constants.get(name)
        array = np.asarray(self.weights[name], order="C")
        tensor = onnx.numpy_helper.from_array(array, name if old is None else old.name)
        if old is not None and old.doc_string:
            tensor.doc_string = old.doc_string
        return tensor

    def _interface(self, proto: onnx.ModelProto, gone: set[str], added: list[str]) -> None:
        """What the file states of tensors: weights that are inputs too, value_info, annotations."""
        graph = proto.graph
        for values in (graph.input, graph.value_info):
            kept = [value for value in values if value.name not in gone]
            if len(kept) < len(values):
                del values[:]
                values.extend(kept)
            for value in values:
                if value.name in self.weights and not _states(value, self.weights[value.name]):
                    value.type.CopyFrom(self._info(value.name).type)
        if proto.ir_version < 4:  # every initializer must be listed as an input
            graph.input.extend(self._info(name) for name in added)
        annotations = [a for a in graph.quantization_annotation if a.tensor_name not in gone]
        del graph.quantization_annotation[:]
        graph.quantization_annotation.extend(annotations)

    def _info(self, name: str) -> onnx.ValueInfoProto:
        tensor = self._tensor(name)
        return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


def _states(value: onnx.ValueInfoProto, array: Array) -> bool:
    """Whether a declaration already gives the array's type."""
    stated = value.type.tensor_type
    element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return stated.elem_type == element and tuple(d.dim_value for d in stated.shape.dim) == array.shape
