"""The only mutator: `apply` cuts a plan's units out of a model and restates every extent.

Weights are cut along each axis by the positions their axis type keeps. Attributes and integer operands
that state an extent are rewritten from the types. Where a graph computes an extent at run time, the
computation is followed with the new shapes: what comes out right stays as it is, what does not is
corrected in place, and extents that reach the data itself (an attention scale from a Shape) stay at
their old value, because the masked original keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx

from onnxprune import axes, flow, rewrite, stored
from onnxprune.axes import Axis, IntArray, Keep
from onnxprune.blocks import Block, Blocks
from onnxprune.dependency import DependencyGraph, Link
from onnxprune.errors import InternalError, UserError
from onnxprune.model import Array, Model, Node, copied_node, copy_without_weights, fresh_name, uncollected
from onnxprune.ops import Resize, Unknown, lookup
from onnxprune.ops.spec import NodeView, Shape
from onnxprune.plan import Plan, Rewire

Cut = tuple[IntArray | None, ...]  # per axis the positions kept, None for all


def keep_masks(graph: DependencyGraph, plan: Plan) -> Keep:
    """The plan's kept units as masks over the groups of a model.

    Raises `UserError` if the plan was made for another model.
    """
    groups = {group.name: group for group in graph.groups}
    keep: Keep = {}
    for edit in plan.keeps:
        group = groups.get(edit.group)
        if group is None or group.size != edit.size:
            found = "has no such group" if group is None else f"has {group.size} units there"
            raise UserError(
                f"{graph.model.name}: the plan keeps units of '{edit.group}' ({edit.size} units), but the model {found}; "
                "make the plan again for this model"
            )
        mask = np.zeros(group.size, dtype=bool)
        mask[list(edit.units)] = True
        if not mask.all():
            keep[group.var] = mask
    return keep


def removed_blocks(blocks: Blocks, plan: Plan) -> list[Block]:
    """The residual blocks that the plan removes.

    Raises `UserError` if the plan was made for another model.
    """
    try:
        return [blocks.named(edit.block) for edit in plan.removals]
    except KeyError as error:
        raise UserError(
            f"{blocks.graph.model.name}: the plan removes block {error}, which the model does not have; "
            "make the plan again for this model"
        ) from None


@uncollected
def apply(graph: DependencyGraph, plan: Plan, blocks: Blocks | None = None) -> onnx.ModelProto:
    """The pruned model. Everything the plan does not touch stays as it is, names included."""
    proto = _Surgery(graph, keep_masks(graph, plan)).run()
    if plan.removals:
        removed = removed_blocks(blocks or Blocks(graph), plan)
        proto = rewrite.edited(Model(proto), _bypasses(graph, removed))
    return flow.nest(proto)


def _bypasses(graph: DependencyGraph, removed: Sequence[Block]) -> list[Rewire]:
    """Let the stream go on past each block: readers of its sum read what the block was added to. A sum that
    is made inside a normalisation gets a zero instead."""
    outputs = {output.name for output in graph.model.outputs}
    taken = {name for node in graph.model.nodes for name in (node.label, *node.inputs, *node.outputs)}
    edits = []
    for block in removed:
        total, stream = block.join.outputs[0], block.join.inputs[block.stream]
        if block.fused:
            branch = block.join.inputs[block.branch]
            name = fresh_name(f"{branch}.removed", taken)
            zero = onnx.helper.make_node("Sub", [stream, stream], [name], name=name)
            edits.append(Rewire(replace={branch: name}, add=(zero,)))
        elif total in outputs:
            identity = onnx.helper.make_node("Identity", [stream], [total], name=block.name)
            edits.append(Rewire((total,), add=(identity,)))
        else:
            edits.append(Rewire((total,), {total: stream}))
    return edits


class _Surgery:
    def __init__(self, graph: DependencyGraph, keep: Keep) -> None:
        self.graph = graph
        self.model: Model = graph.model
        self.keep = keep
        self.counts = {var: int(mask.sum()) for var, mask in keep.items()}
        self._positions: dict[int, tuple[Axis, IntArray | None]] = {}
        self._tensors: dict[tuple[int, int], Array] = {}  # (node, input) -> a value of its own
        self._cuts: dict[str, dict[tuple[int, int], Cut]] = {}  # constant -> use -> cut
        self._attributes: dict[int, dict[str, Array | int | None]] = {}
        self._renamed: dict[tuple[int, int], str] = {}
        self._replaced: dict[int, onnx.NodeProto] = {}
        self._after: dict[int, list[onnx.NodeProto]] = {}
        self._added: dict[str, onnx.TensorProto] = {}
        self._names = {name for node in self.model.nodes for name in (*node.inputs, *node.outputs)}
        self._names |= set(self.model.constants)
        self._nodes_by_index = {node.index: node for node in self.model.nodes}

    def run(self) -> onnx.ModelProto:
        for link in self.graph.links:
            self._restate(link)
        self._shape_arithmetic()
        return self._build()

    # ---------------------------------------------------------------------------------- extents

    def positions(self, axis: Axis) -> IntArray | None:
        """The positions of an axis that stay; None for all of them."""
        axis = axes.resolve(axis)
        known = self._positions.get(id(axis))
        if known is None:
            known = self._positions[id(axis)] = (axis, axes.kept_positions(axis, self.keep))
        return known[1]

    def extent(self, axis: Axis) -> int:
        kept = self.positions(axis)
        return axis.extent if kept is None else len(kept)

    def shape(self, typed: Sequence[Axis] | None) -> Shape | None:
        return None if typed is None else tuple(self.extent(axis) for axis in typed)

    def _changed(self, typed: Iterable[Axis] | None) -> bool:
        return any(self.positions(axis) is not None for axis in typed or ())

    # -------------------------------------------------------------------------------- one node

    def _restate(self, link: Link) -> None:
        """Cut the constants a node reads and restate its attributes and integer operands."""
        node = link.node
        for i, typed in enumerate(link.inputs):
            if typed is not None and node.inputs[i] in self.model.constants:
                cut = tuple(self.positions(axis) for axis in typed)
                self._cuts.setdefault(node.inputs[i], {})[node.index, i] = cut
        if not any(self._changed(operand) for operand in (*link.inputs, *link.outputs)):
            return
        for attribute, name in link.rule.attributes.items():
            old, new = link.labels[name].extent, self.extent(link.labels[name])
            if old != new:
                self._attributes.setdefault(node.index, {})[attribute] = new
        if link.take is not None:
            self._retake(link)
        for operand, value in self._wanted(link).items():
            if isinstance(operand, str):
                old_value = node.attributes.get(operand)
                if value is None or not np.array_equal(value, np.asarray(old_value)):
                    self._attributes.setdefault(node.index, {})[operand] = value
            elif operand >= len(node.inputs) or not node.inputs[operand]:
                self._tensors[node.index, operand] = _some(value)
            elif node.inputs[operand] in self.model.constants:
                if not np.array_equal(_some(value), self.model.array(node.inputs[operand])):
                    self._tensors[node.index, operand] = _some(value)

    def _wanted(self, link: Link) -> dict[int | str, Array | None]:
        """Integer operands and attributes as they must be after the cut."""
        if link.rule.resize is None:
            return {}
        change = Resize(
            self.graph.shapes.view(self.model, link.node),
            [self.shape(typed) for typed in link.inputs],
            [self.shape(typed) for typed in link.outputs],
            {name: self.extent(axis) for name, axis in link.labels.items()},
        )
        try:
            wanted = link.rule.resize(change)
        except Unknown as error:
            raise InternalError(f"{link.node}: {error}, yet its axes were cut") from None
        result: dict[int | str, Array | None] = {}
        for operand, value in wanted.items():
            if isinstance(operand, int) and value is not None and operand < len(link.node.inputs):
                name = link.node.inputs[operand]
                if name and (old := self.graph.shapes.values.get(name)) is not None:
                    value = value.reshape(old.shape).astype(old.dtype)
            result[operand] = value
        return result

    def _retake(self, link: Link) -> None:
        """Renumber a constant index after its axis was cut."""
        take, node = link.take, link.node
        assert take is not None
        source = link.inputs[0]
        target = link.outputs[0]
        assert source is not None
        assert target is not None
        kept_in, kept_out = self.positions(source[take.axis]), self.positions(target[take.axis])
        if kept_in is None:
            return
        renumbered = np.full(source[take.axis].extent, -1, dtype=np.int64)
        renumbered[kept_in] = np.arange(len(kept_in))
        index = renumbered[take.index if kept_out is None else take.index[kept_out]]
        if (index < 0).any():
            raise InternalError(f"{node}: a position that is still needed was removed")
        if take.operand is not None and node.inputs[take.operand] in self.model.constants:
            dtype = self.model.array(node.inputs[take.operand]).dtype
            self._tensors[node.index, take.operand] = index.astype(dtype)
            return
        name = self._constant(f"{node.label}.index", index)
        proto = onnx.helper.make_node(
            "Gather", [node.inputs[0], name], list(node.outputs), name=node.proto.name, axis=take.axis
        )
        self._replaced[node.index] = proto

    # ------------------------------------------------------------------------ shape arithmetic

    def _shape_arithmetic(self) -> None:
        """Correct extents that the graph computes at run time."""
        values = self.graph.shapes.values
        readers = [
            node
            for node in self.model.nodes
            if node.op in ("Shape", "Size") and node.outputs[0] in values and self._changed(self._typed(node))
        ]
        frozen: set[str] = set()
        while True:
            new, roots = self._follow(readers, frozen)
            leaks = self._leaks(new, roots) - frozen
            if not leaks:
                break
            frozen |= leaks
        for node in readers:
            if node.outputs[0] in frozen:
                self._freeze(node)
        uses: dict[str, list[tuple[Node, int, Array]]] = {}
        for link, i, wanted in self._computed_operands(new):
            name = link.node.inputs[i]
            got = new.get(name, values.get(name))
            if got is None or got.shape != wanted.shape:
                raise InternalError(f"{link.node}: operand '{name}' cannot be followed")
            if (got != wanted).any():
                uses.setdefault(name, []).append((link.node, i, wanted))
        for name, wrong in uses.items():
            self._correct(name, wrong, new.get(name, values[name]))

    def _typed(self, node: Node) -> list[Axis] | None:
        return self.graph.axes_of(node, 0)

    def _computed_operands(self, new: Mapping[str, Array]) -> Iterable[tuple[Link, int, Array]]:
        """Computed integer operands of nodes whose axes were cut, or whose operand is now among `new`
        values; and what each must be."""
        for link in self.graph.links:
            computed = [
                i
                for i, name in enumerate(link.node.inputs)
                if name
                and link.rule.resize is not None
                and name not in self.model.constants
                and (i >= len(link.rule.inputs) or link.rule.inputs[i] is None)
            ]
            touched = any(link.node.inputs[i] in new for i in computed)
            if computed and (touched or any(self._changed(o) for o in (*link.inputs, *link.outputs))):
                for operand, value in self._wanted(link).items():
                    if operand in computed and isinstance(operand, int) and value is not None:
                        yield link, operand, value

    def _follow(
        self, readers: list[Node], frozen: set[str]
    ) -> tuple[dict[str, Array], dict[str, frozenset[str]]]:
        """Values that change with the new shapes, and the Shape outputs each depends on."""
        new: dict[str, Array] = {}
        roots: dict[str, frozenset[str]] = {}
        first = {node.index for node in readers if node.outputs[0] not in frozen}
        if not first:
            return new, roots
        for node in self.model.nodes:
            touched = [name for name in node.inputs if name in roots]
            if node.index not in first and not touched:
                continue
            output = node.outputs[0]
            root = (
                frozenset([output])
                if node.index in first
                else frozenset().union(*(roots[t] for t in touched))
            )
            value = self._evaluate(node, new)
            if value is None:
                continue
            if not np.array_equal(value, self.graph.shapes.values.get(output, np.empty(0))):
                new[output] = value
                roots[output] = root
        return new, roots

    def _evaluate(self, node: Node, new: dict[str, Array]) -> Array | None:
        spec = lookup(node.domain, node.op, self.model.opset(node.domain))
        if spec is None or spec.evaluate is None:
            return None
        old = self.graph.shapes.view(self.model, node)
        values = self.graph.shapes.values
        inputs = [new.get(name, values.get(name)) if name else None for name in node.inputs]
        if node.op not in ("Shape", "Size") and any(
            value is None and name for value, name in zip(inputs, node.inputs, strict=True)
        ):
            return None
        shapes = tuple(
            self.shape(self.graph.axes_of(node, i)) or old.shapes[i] for i in range(len(node.inputs))
        )
        outputs = tuple(self.shape(self.graph.types.get(name)) for name in node.outputs)
        view = NodeView(node.op, old.opset, old.attributes, shapes, outputs, lambda i: inputs[i])
        try:
            with np.errstate(all="ignore"):
                return spec.evaluate(view, inputs)[0]
        except (Unknown, ValueError, TypeError, IndexError):
            return None

    def _leaks(self, new: dict[str, Array], roots: dict[str, frozenset[str]]) -> set[str]:
        """Shape outputs whose change would reach something other than a restated operand."""
        leaks: set[str] = set()
        outputs = {o.name for o in self.model.outputs}
        links = {link.node.index: link for link in self.graph.links}
        wanted = {(link.node.index, i): value for link, i, value in self._computed_operands(new)}
        for name, root in roots.items():
            typed = self.graph.types.get(name)
            if name in outputs or (typed is not None and self.shape(typed) != new[name].shape):
                leaks |= root
            for node in self.model.consumers.get(name, ()):
                link = links.get(node.index)
                followed = all(o in new or o in self.graph.shapes.values for o in node.outputs if o)
                for i, other in enumerate(node.inputs):
                    if other != name:
                        continue
                    want = wanted.get((node.index, i))
                    if want is not None:
                        if not np.array_equal(want, new[name]):
                            leaks |= root
                    elif link is None or not followed or self._restated(link, i):
                        leaks |= root
                if name in node.captured:
                    leaks |= root
        return leaks

    @staticmethod
    def _restated(link: Link, i: int) -> bool:
        unread = i >= len(link.rule.inputs) or link.rule.inputs[i] is None
        return link.rule.resize is not None and unread

    def _freeze(self, node: Node) -> None:
        """Let a Shape node go on giving the extents of the original."""
        name = node.outputs[0]
        old = self.graph.shapes.values[name]
        proto = copied_node(node.proto)
        proto.output[0] = self._name(f"{name}.now")
        after = self._after.setdefault(node.index, [])
        now = _some(self._evaluate(node, {}))
        after += self._spliced(proto.output[0], name, old, self.graph.shapes.static_entries(name), now)
        self._replaced[node.index] = proto

    def _correct(self, name: str, uses: list[tuple[Node, int, Array]], got: Array) -> None:
        """Make a computed integer operand state the new extents, for every node that reads it."""
        fixed = self.graph.shapes.static_entries(name)
        first = uses[0][2]
        alike = all(np.array_equal(wanted, first) for _, _, wanted in uses) and fixed[got != first].all()
        readers = sum(node.inputs.count(name) for node in self.model.consumers[name])
        source = self.model.producers[name]
        if alike and readers == len(uses) and source.op == "Concat":
            if self._correct_parts(source, first, (got != first) & fixed):
                return
        made: dict[bytes, str] = {}
        for node, i, wanted in uses:
            key = wanted.tobytes()
            if key not in made:
                made[key] = self._name(f"{name}.cut")
                after = self._after.setdefault(source.index, [])
                after += self._spliced(name, made[key], wanted, fixed, got)
            self._renamed[node.index, i] = made[key]

    def _spliced(
        self, source: str, result: str, value: Array, fixed: Array, got: Array
    ) -> list[onnx.NodeProto]:
        """Nodes that give `value` where `fixed`, and the entries of `source` elsewhere: a Concat of constants
        and Gathers, as exporters write shapes. Entries of `source` (`got`, at the sizes of the analysis) that
        are right are read from it, and dynamic ones that are not are scaled: they hold the cut units so many
        times."""
        if fixed.all():
            constant = onnx.helper.make_node("Constant", [], [result], name=result)
            tensor = onnx.numpy_helper.from_array(np.asarray(value), result)
            constant.attribute.append(onnx.helper.make_attribute("value", tensor))
            return [constant]
        if value.ndim == 0:
            return self._scaled(source, result, value, got)
        nodes: list[onnx.NodeProto] = []
        parts: list[str] = []
        stated = fixed & (got != value)
        for run in np.split(np.arange(value.size), np.flatnonzero(np.diff(stated)) + 1):
            if stated[run[0]]:
                parts.append(self._constant(f"{result}.static", value[run]))
                continue
            parts.append(self._name(f"{result}.dynamic"))
            index = self._constant(f"{result}.index", run)
            nodes.append(
                onnx.helper.make_node("Gather", [source, index], [parts[-1]], name=parts[-1], axis=0)
            )
            if (got[run] != value[run]).any():
                scaled = self._name(f"{result}.scaled")
                nodes += self._scaled(parts[-1], scaled, value[run], got[run])
                parts[-1] = scaled
        nodes.append(onnx.helper.make_node("Concat", parts, [result], name=result, axis=0))
        return nodes

    def _scaled(self, source: str, result: str, value: Array, got: Array) -> list[onnx.NodeProto]:
        """Nodes that scale what is `got` from `source` to `value`, exactly at all sizes of the inputs."""
        common = np.maximum(np.gcd(got, value), 1)
        whole = self._name(f"{result}.whole")
        mul, div = (
            self._constant(f"{result}.{name}", np.asarray(array // common, dtype=value.dtype))
            for name, array in (("mul", value), ("div", np.where(got == 0, 1, got)))
        )
        return [
            onnx.helper.make_node("Mul", [source, mul], [whole], name=whole),
            onnx.helper.make_node("Div", [whole, div], [result], name=result),
        ]

    def _correct_parts(self, concat: Node, wanted: Array, wrong: Array) -> bool:
        """Rewrite the constant parts of a shape put together by Concat; False if that is not enough."""
        edits: dict[tuple[int, int], Array] = {}
        offset = 0
        for i, part in enumerate(concat.inputs):
            value = self.graph.shapes.values.get(part)
            if value is None or value.ndim != 1:
                return False
            here = slice(offset, offset + value.size)
            offset += value.size
            if wrong[here].any():
                if part not in self.model.constants:
                    return False
                edits[concat.index, i] = np.where(wrong[here], wanted[here], value).astype(value.dtype)
        self._tensors.update(edits)
        return True

    # ------------------------------------------------------------------------------- new tensors

    def _name(self, wish: str) -> str:
        return fresh_name(wish, self._names)

    def _constant(self, wish: str, value: Array) -> str:
        name = self._name(wish)
        self._added[name] = onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    # ----------------------------------------------------------------------------------- building

    def _build(self) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        copy_without_weights(self.model.proto, proto)
        changed = self._constants(proto)
        self._nodes(proto, changed)
        self._interface(proto, changed)
        return proto

    def _constants(self, proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
        """Cut every constant; uses that need different cuts get copies. Returns Constant nodes' values."""
        changed: dict[str, onnx.TensorProto] = {}
        for name, uses in sorted(self._cuts.items()):
            versions: dict[tuple[bytes | None, ...], str] = {}
            if self._used_elsewhere(name, uses):
                versions[(None,) * len(self.model.constants[name].dims)] = name
            for use, cut in sorted(uses.items(), key=lambda item: _is_cut(item[1])):
                if use in self._tensors:
                    continue
                key = tuple(None if kept is None else kept.tobytes() for kept in cut)
                if key not in versions:
                    versions[key] = name if not versions else self._name(f"{name}.cut")
                    if _is_cut(cut):
                        tensor = self._cut(name, cut, versions[key])
                        (changed if versions[key] == name else self._added)[versions[key]] = tensor
                if versions[key] != name:
                    self._renamed[use] = versions[key]
        for (index, i), value in sorted(self._tensors.items()):
            node = self._nodes_by_index[index]
            name = node.inputs[i] if i < len(node.inputs) else ""
            if name and name not in changed and self._read_once(name):
                changed[name] = onnx.numpy_helper.from_array(np.asarray(value, order="C"), name)
            else:
                self._renamed[index, i] = self._constant(f"{name or node.label}.cut", value)
        for tensor in self.model.proto.graph.initializer:
            proto.graph.initializer.append(changed.get(tensor.name, tensor))
        proto.graph.initializer.extend(self._added[name] for name in sorted(self._added))
        return changed

    def _used_elsewhere(self, name: str, uses: dict[tuple[int, int], Cut]) -> bool:
        """Whether a constant is also a graph output, or read by something that was not linked."""
        if any(output.name == name for output in self.model.outputs):
            return True
        for node in self.model.consumers.get(name, ()):
            linked = sum((node.index, i) in uses for i, other in enumerate(node.inputs) if other == name)
            if name in node.captured or linked < sum(other == name for other in node.inputs):
                return True
        return False

    def _read_once(self, name: str) -> bool:
        consumers = self.model.consumers.get(name, ())
        count = sum(other == name for node in consumers for other in node.inputs)
        outputs = {o.name for o in self.model.outputs}
        captured = any(name in node.captured for node in consumers)
        return count == 1 and not captured and name not in outputs

    def _cut(self, name: str, cut: Cut, new_name: str) -> onnx.TensorProto:
        tensor = self.model.constants[name]
        if stored.is_stored(tensor):
            return stored.cut(tensor, new_name, cut)
        array = self.model.array(name)
        for axis, kept in enumerate(cut):
            if kept is not None:
                array = array.take(kept, axis=axis)
        tensor = onnx.numpy_helper.from_array(np.asarray(array, order="C"), new_name)
        tensor.doc_string = self.model.constants[name].doc_string
        return tensor

    def _nodes(self, proto: onnx.ModelProto, changed: dict[str, onnx.TensorProto]) -> None:
        nodes: list[onnx.NodeProto] = []
        renamed: dict[int, list[tuple[int, str]]] = {}
        for (index, i), name in sorted(self._renamed.items()):
            renamed.setdefault(index, []).append((i, name))
        for index, original in enumerate(self.model.proto.graph.node):
            node = self._replaced.get(index)
            if node is None:
                node = copied_node(original)
            for i, name in renamed.get(index, ()):
                node.input.extend([""] * (i + 1 - len(node.input)))
                node.input[i] = name
            for name, value in self._attributes.get(index, {}).items():
                _set_attribute(node, name, value)
            if node.op_type == "Constant" and index not in self._replaced and node.output[0] in changed:
                del node.attribute[:]
                tensor = onnx.TensorProto()
                tensor.CopyFrom(changed[node.output[0]])
                node.attribute.append(onnx.helper.make_attribute("value", tensor))
            nodes.append(node)
            nodes.extend(self._after.get(index, ()))
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)

    def _interface(self, proto: onnx.ModelProto, changed: dict[str, onnx.TensorProto]) -> None:
        """Shapes stated in the file: weights that are inputs too, and value_info."""
        graph = proto.graph
        for value in graph.input:
            if value.name in changed:
                _set_dims(value, tuple(changed[value.name].dims))
        if proto.ir_version < 4:  # every initializer must be listed as an input
            graph.input.extend(
                onnx.helper.make_tensor_value_info(name, t.data_type, list(t.dims))
                for name, t in sorted(self._added.items())
            )
        replaced = {o for index in self._replaced for o in self._nodes_by_index[index].outputs}
        for i in reversed(range(len(graph.value_info))):
            value = graph.value_info[i]
            typed = self.graph.types.get(value.name)
            if value.name in replaced or (value.name in self.model.constants and typed is None):
                del graph.value_info[i]
            elif value.name in changed:
                _set_dims(value, tuple(changed[value.name].dims))
            elif typed is not None and self._changed(typed):
                if len(value.type.tensor_type.shape.dim) != len(typed):
                    del graph.value_info[i]
                    continue
                for dim, axis in zip(value.type.tensor_type.shape.dim, typed, strict=True):
                    if self.positions(axis) is None:
                        continue
                    if dim.HasField("dim_value"):
                        dim.dim_value = self.extent(axis)
                    else:  # an expression of the original's extents
                        dim.ClearField("dim_param")


def _some(value: Array | None) -> Array:
    assert value is not None
    return value


def _is_cut(cut: Cut) -> bool:
    return any(kept is not None for kept in cut)


def _set_attribute(node: onnx.NodeProto, name: str, value: Array | int | None) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(onnx.helper.make_attribute(name, np.asarray(value).tolist()))


def _set_dims(value: onnx.ValueInfoProto, dims: Shape) -> None:
    if len(value.type.tensor_type.shape.dim) != len(dims):  # not stated, or false before the cut already
        value.type.tensor_type.ClearField("shape")
    for dim, size in zip(value.type.tensor_type.shape.dim, dims, strict=False):
        dim.dim_value = size
