"""Say the same with fewer nodes, exactly: evaluate constants, drop what does nothing, fold scales and shifts.

Three rewrites, each planned as data for `rewrite.apply` and repeated until none is left:

* nodes that read only constants are evaluated, unless storing the result costs more than it frees;
* Identity and Dropout go;
* BatchNormalization, Mul, Add, Sub and Div by constants behind an operator that is affine in its
  weights (Conv, ConvTranspose, Gemm, MatMul, normalisations with a gain) move into weight and bias.
  The operator's declaration says which axes of the weight carry which axes of the output, so groups,
  depthwise kernels and transposed layouts are all the same case.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxprune import flow, rewrite
from onnxprune.model import FLOATS, Array, Model, Node, copied_node, fresh_name, subgraphs
from onnxprune.ops import Rule, Unknown, lookup
from onnxprune.ops.spec import Pattern
from onnxprune.plan import Edit, Rewire, SetWeight
from onnxprune.runtime import RunError, Session
from onnxprune.shapes import Shapes, analyse

SMALL = 1024  # elements of results that are stored whatever they replace
CLONE_BYTES = 1 << 20  # a shared weight above this is not cloned for a fold


def fold(model: Model) -> tuple[onnx.ModelProto, list[Edit]]:
    """The folded model and the edits that make it; the model's own proto where there is nothing to fold.

    Folding a folded model changes nothing.
    """
    edits: list[Edit] = []
    while found := plan(model):
        edits += found
        model = Model(rewrite.edited(model, found), model.path, model.external)
    return flow.nest(model.proto) if edits else model.source, edits


def plan(model: Model) -> list[Edit]:
    """The edits of one round; none if the model is folded."""
    facts = _Facts(model)
    return _constants(facts) or _idle(facts) or _scales(facts)


class _Facts:
    """A model, and what planning a round asks about it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        annotations = model.proto.graph.quantization_annotation
        captured = {name for node in model.nodes for name in node.captured}
        captured |= {name for node in model.nodes if node.domain == flow.DOMAIN for name in node.inputs}
        self.outputs = {output.name for output in model.outputs}
        self.pinned = self.outputs | {a.tensor_name for a in annotations}  # neither removed nor changed
        self.fixed = self.pinned | captured
        self._names = set(_names(model.proto.graph))

    @functools.cached_property
    def shapes(self) -> Shapes:
        return analyse(self.model)

    def rule(self, node: Node) -> Rule | None:
        """What the node's axes mean; None where that is unknown, or it does not act as at inference."""
        spec = lookup(node.domain, node.op, self.model.opset(node.domain))
        if spec is None:
            return None
        if node.op == "BatchNormalization" and (
            any(node.outputs[1:]) or node.attributes.get("training_mode")
        ):
            return None
        try:
            rule = spec.declare(self.shapes.view(self.model, node))
        except Unknown:
            return None
        return rule if isinstance(rule, Rule) else None

    def readers(self, name: str) -> list[Node]:
        return self.model.consumers.get(name, [])

    def only_reader(self, name: str) -> Node | None:
        """The node that alone reads a tensor, if nothing else depends on the tensor."""
        nodes = self.readers(name)
        if len(nodes) != 1 or name in self.fixed:
            return None
        scopes = self.model.scopes
        same = all(scopes.of(output) == scopes.of(name) for output in nodes[0].outputs if output)
        return nodes[0] if same else None

    def float64(self, name: str) -> Array:
        return self.model.array(name).astype(np.float64)

    def fresh(self, wish: str) -> str:
        return fresh_name(wish, self._names)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every tensor name in use, also inside subgraphs."""
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        yield from (value.name for value in values)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    for node in graph.node:
        yield from (*node.input, *node.output)
        for inner in subgraphs(node):
            yield from _names(inner)


# ----------------------------------------------------------------------------------------- constants

_LEFT = {  # not evaluated: random, kept on purpose, or handled elsewhere
    "Bernoulli", "DequantizeLinear", "Dropout", "DynamicQuantizeLinear", "Identity", "Multinomial",
    "QuantizeLinear", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
}  # fmt: skip
_PLAIN = {  # numpy's own kinds: onnxruntime takes them and gives them back
    onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for kind in "?bhiqBHIQefd"
}


def _constants(facts: _Facts) -> list[Edit]:
    """Store the results of nodes that read only constants."""
    nodes = _evaluable(facts)
    if not nodes:
        return []
    outputs = [name for node in nodes for name in node.outputs if name]
    shapes = analyse(Model(_part(facts.model, nodes, outputs)))
    nodes = _closed(facts, [node for node in nodes if _moderate(shapes, node)])
    while dear := _dear(facts, shapes, nodes):
        nodes = _closed(facts, [node for node in nodes if node.index not in dear])
    results = _results(facts, nodes)
    values = _evaluate(_part(facts.model, nodes, results))
    edits: list[Edit] = [SetWeight(n, v, f"{results[n]} reads only constants") for n, v in values.items()]
    return edits + [
        Rewire((name,), reason=f"{node} reads only constants")
        for node, name in {results[name]: name for name in values}.items()
    ]


def _evaluable(facts: _Facts) -> list[Node]:
    left = _LEFT | {function.name for function in facts.model.proto.functions}
    return _closed(
        facts,
        [
            node
            for node in facts.model.nodes
            if any(node.inputs)
            and node.domain == ""
            and node.op not in left
            and facts.pinned.isdisjoint(node.outputs)
            and not any(subgraphs(node.proto))
        ],
    )


def _closed(facts: _Facts, nodes: Iterable[Node]) -> list[Node]:
    """Those of the nodes that read only constants and each other."""
    known = {"", *facts.model.constants}
    found = []
    for node in nodes:
        if known.issuperset(node.inputs):
            found.append(node)
            known.update(node.outputs)
    return found


def _part(model: Model, nodes: Sequence[Node], outputs: Iterable[str]) -> onnx.ModelProto:
    """A constant part of the graph as a model of its own, without inputs."""
    proto = onnx.ModelProto(ir_version=max(model.proto.ir_version, 4))  # before 4, weights had to be inputs
    proto.opset_import.extend(model.proto.opset_import)
    graph = proto.graph
    graph.name = "constants"
    graph.node.extend(node.proto for node in nodes)
    for name in dict.fromkeys(name for node in nodes for name in node.inputs if name in model.constants):
        graph.initializer.add().CopyFrom(model.constants[name])
        graph.initializer[-1].name = name
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return proto


def _moderate(shapes: Shapes, node: Node) -> bool:
    """Whether all is plain numbers, and the outputs are small, or of at most twice the inputs' bytes."""
    inputs, outputs = ([name for name in names if name] for names in (node.inputs, node.outputs))
    if any(
        name not in shapes.shapes or shapes.elements.get(name) not in _PLAIN for name in (*inputs, *outputs)
    ):
        return False
    given = sum(_bytes(shapes, name) for name in inputs)
    return all(_is_small(shapes, name) or _bytes(shapes, name) <= 2 * given for name in outputs)


def _is_small(shapes: Shapes, name: str) -> bool:
    return math.prod(shapes.shapes[name]) <= SMALL


def _bytes(shapes: Shapes, name: str) -> int:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(shapes.elements[name])
    return math.prod(shapes.shapes[name]) * dtype.itemsize


def _results(facts: _Facts, nodes: Sequence[Node]) -> dict[str, Node]:
    """The outputs of these nodes that others read."""
    inside = {node.index for node in nodes}
    return {
        output: node
        for node in nodes
        for output in node.outputs
        if any(reader.index not in inside for reader in facts.readers(output))
    }


def _dear(facts: _Facts, shapes: Shapes, nodes: Sequence[Node]) -> set[int]:
    """Nodes whose results would take more than twice the bytes of the constants that they free."""
    inside = {node.index for node in nodes}
    freed: dict[str, frozenset[str]] = {}  # tensor -> constants needed by it and by nothing that stays
    for node in nodes:
        for name in node.inputs:
            if name not in facts.model.constants:
                continue
            kept = name in facts.fixed or any(reader.index not in inside for reader in facts.readers(name))
            freed[name] = frozenset() if kept else frozenset([name])
        below = frozenset[str]().union(*(freed[name] for name in node.inputs if name))
        freed.update(dict.fromkeys(node.outputs, below))
    dear: set[int] = set()
    claimed: set[str] = set()
    for name, node in _results(facts, nodes).items():
        if not _is_small(shapes, name):
            paid = sum(_bytes(shapes, constant) for constant in freed[name] - claimed)
            claimed |= freed[name]
            if _bytes(shapes, name) > 2 * paid:
                dear.add(node.index)
    return dear


def _evaluate(part: onnx.ModelProto) -> dict[str, Array]:
    """The outputs of a model without inputs; nothing where there are none or onnxruntime cannot run it."""
    if not part.graph.output:
        return {}
    try:
        values = Session(part).run({})
    except RunError:
        return {}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


# -------------------------------------------------------------------------------------- idle nodes


def _idle(facts: _Facts) -> list[Edit]:
    """Take out nodes that hand on their input; a graph output's name moves to the node before."""
    edits: list[Edit] = []
    touched: set[int] = set()
    for node in facts.model.nodes:
        if not _does_nothing(facts, node):
            continue
        source, target = node.inputs[0], node.outputs[0]
        maker = facts.model.producers.get(source)
        if target not in facts.fixed:
            edits.append(Rewire((target,), {target: source}, reason=f"{node} does nothing"))
            touched.add(node.index)
        elif (
            target in facts.outputs
            and maker is not None
            and maker.index not in touched
            and source not in facts.fixed
            and source not in facts.model.constants
        ):
            new = _renamed(maker, source, target)
            edits.append(Rewire((source, target), {source: target}, (new,), f"{node} does nothing"))
            touched |= {node.index, maker.index}
    return edits


def _does_nothing(facts: _Facts, node: Node) -> bool:
    if node.domain or not any(node.outputs[:1]):
        return False
    if any(name in facts.fixed or facts.readers(name) for name in node.outputs[1:]):
        return False
    if node.op == "Dropout" and facts.model.opset() >= 7:
        training = "".join(node.inputs[2:])
        return not training or (training in facts.model.constants and not facts.model.array(training).any())
    return node.op == "Identity"


def _renamed(node: Node, old: str, new: str) -> onnx.NodeProto:
    proto = copied_node(node.proto)
    proto.output[node.outputs.index(old)] = new
    return proto


# ------------------------------------------------------------------------------- scales and shifts

_ELEMENTWISE = {"Add", "Div", "Mul", "Sub"}
_FOLDABLE = {"BatchNormalization", *_ELEMENTWISE}


@dataclass(frozen=True, eq=False)
class _Base:
    """A node that is affine in its weight and bias, and what their axes mean.

    Scales and shifts of its output are arrays with an axis for each of the output's: whole, or of extent 1.
    """

    node: Node
    weight: str
    weight_at: int
    pattern: Pattern
    bias: str  # empty where there is none
    bias_at: int | None  # None where the operator takes none
    bias_pattern: Pattern
    out: Pattern
    sizes: Mapping[str, int]

    @property
    def labels(self) -> list[str]:
        """The labels of the weight, in its order."""
        return [name for axis in self.pattern for name in axis[0]]

    def extent(self, axis: int) -> int | None:
        """The extent of an axis of the output that the weight makes; None for the others."""
        names = self.out[axis][0]
        return math.prod(self.sizes[n] for n in names) if set(names) <= set(self.labels) else None

    def carries(self, dims: Sequence[int]) -> bool:
        """Whether an array of these dimensions acts on the output only along axes that the weight makes."""
        first = len(self.out) - len(dims)
        return first >= 0 and all(d == 1 or d == self.extent(i) for i, d in enumerate(dims, first))

    def aligned(self, value: Array) -> Array:
        return value.reshape((1,) * (len(self.out) - value.ndim) + value.shape)

    def scaled(self, weight: Array, scale: Array) -> Array | None:
        """The weight that scales the output; None where its type cannot hold it."""
        labels = self.labels
        own = {
            name: 1 if extent == 1 else self.sizes[name]
            for axis, extent in zip(self.out, scale.shape, strict=True)
            for name in axis[0]
        }
        order = [list(own).index(name) for name in labels if name in own]
        order += [i for i, name in enumerate(own) if name not in labels]
        factor = scale.reshape(list(own.values())).transpose(order)
        factor = factor.reshape([own.get(name, 1) for name in labels])
        split = weight.astype(np.float64).reshape([self.sizes[name] for name in labels])
        stored = _stored(split * factor, weight.dtype)
        return None if stored is None else stored.reshape(weight.shape)

    def shifted(self, bias: Array | None, scale: Array, shift: Array) -> Array | None:
        """The bias that scales and shifts the output, in float64; None where no bias can."""
        if bias is None:
            return self._vector(shift)
        dims = [1] * len(self.out)
        for axis, extent in zip(self.bias_pattern, bias.shape, strict=True):
            if axis in self.out:
                dims[self.out.index(axis)] = extent
            elif extent != 1:
                return None
        value = bias.reshape(dims) * scale + shift
        return value.reshape(bias.shape) if value.size == bias.size else self._vector(value)

    def _vector(self, value: Array) -> Array | None:
        axes = {i: extent for i in range(len(self.out)) if (extent := self.extent(i)) is not None}
        if math.prod(value.shape[i] for i in axes) < value.size:
            return None
        return np.broadcast_to(value.reshape([value.shape[i] for i in axes]), list(axes.values()))


def _stored(value: Array, dtype: np.dtype[Any]) -> Array | None:
    """The value in a narrower type; None where that overflows."""
    with np.errstate(over="ignore"):
        stored = value.astype(dtype)
    return stored if np.isfinite(stored.astype(np.float64)).all() else None


@dataclass(frozen=True, eq=False)
class _Merge:
    """A chain of nodes that merges into its base, and the new values of the base's weight and bias.

    `constant` is the one that the new bias takes the place of; empty where there is none.
    """

    base: _Base
    chain: list[Node]
    weight: Array | None = None
    bias: Array | None = None
    constant: str = ""

    def __str__(self) -> str:
        return f"{' and '.join(map(str, self.chain))} folded into {self.base.node}"

    def uses(self) -> Iterator[tuple[str, str, Array]]:
        """(role, constant, new value) of the constants that change."""
        if self.weight is not None:
            yield "weight", self.base.weight, self.weight
        if self.bias is not None and self.constant:
            yield "bias", self.constant, self.bias


def _scales(facts: _Facts) -> list[Edit]:
    """Fold scales and shifts by constants into the operators before them."""
    merges: list[_Merge] = []
    used: set[int] = set()
    for node in facts.model.nodes:
        base = None if node.index in used else _base(facts, node)
        if base is not None and (merge := _merge(facts, base)) is not None:
            merges.append(merge)
            used.update(node.index for node in merge.chain)
    merges = _affordable(facts, merges)
    names, edits = _named(facts, merges)
    for merge in merges:
        edits += _merged(facts, merge, names)
    return edits


def _is_candidate(facts: _Facts, node: Node) -> bool:
    """Whether something may fold into the node, by names alone: most graphs need no closer look."""
    constants = facts.model.constants.keys()
    if node.domain or not node.outputs or node.op in _ELEMENTWISE or constants.isdisjoint(node.inputs):
        return False
    name = node.outputs[0]
    reader = facts.only_reader(name)
    if reader is not None and reader.op in ("Add", "Sub") and _arity(facts, node) < 3:
        if not _may_fold(facts, reader, name):
            return False
        name = reader.outputs[0]
        reader = facts.only_reader(name)
    return reader is not None and _may_fold(facts, reader, name)


def _may_fold(facts: _Facts, node: Node, name: str) -> bool:
    others = {other for other in node.inputs if other != name}
    return (
        node.op in _FOLDABLE and not node.domain and bool(others) and facts.model.constants.keys() >= others
    )


def _arity(facts: _Facts, node: Node) -> int:
    """How many inputs the operator may have; 0 for an unknown one."""
    try:
        return onnx.defs.get_schema(node.op, facts.model.opset()).max_input
    except onnx.defs.SchemaError:
        return 0


def _base(facts: _Facts, node: Node) -> _Base | None:
    """The node as an affine operator, if it is one and something may fold into it."""
    constants = facts.model.constants
    if not _is_candidate(facts, node):
        return None
    rule = facts.rule(node)
    if rule is None or (rule.linear is None and rule.gain is None):
        return None
    weight_at, bias_at = rule.linear or (rule.gain or 0, (rule.gain or 0) + 1)
    weight, bias = node.inputs[weight_at], "".join(node.inputs[bias_at : bias_at + 1])
    pattern, out = rule.inputs[weight_at], rule.outputs[0]
    if (
        weight not in constants
        or constants[weight].data_type not in FLOATS
        or (bias and bias not in constants)
    ):
        return None
    if pattern is None or out is None or any(len(terms) != 1 for terms in (*pattern, *out)):
        return None
    return _Base(
        node,
        weight,
        weight_at,
        pattern,
        bias,
        bias_at if bias_at < _arity(facts, node) else None,
        (rule.inputs[bias_at] if bias else None) or (),
        out,
        _sizes(rule.sizes, pattern, constants[weight].dims),
    )


def _sizes(known: Mapping[str, int], pattern: Pattern, dims: Sequence[int]) -> dict[str, int]:
    """The extents of a weight's labels: at most one per axis is not known beforehand."""
    sizes = dict(known)
    for (term,), extent in zip(pattern, dims, strict=True):
        rest = extent // math.prod(sizes.get(name, 1) for name in term)
        sizes.update({name: rest for name in term if name not in sizes})
    return sizes


def _merge(facts: _Facts, base: _Base) -> _Merge | None:
    """Merge the chain behind a node into it; None if there is none or a type cannot hold the result."""
    chain, scale, shift = _chain(facts, base)
    scales, shifts = bool((scale != 1).any()), bool(shift.any())
    if not chain or (base.bias_at is None and shifts and [n.op for n in chain] in (["Add"], ["Sub"])):
        return None
    weight = base.scaled(facts.model.array(base.weight), scale) if scales else None
    if scales and weight is None:
        return None
    constant = base.bias if base.bias_at is not None else _addend(facts, chain)
    if not shifts and not (scales and base.bias):
        return _Merge(base, chain, weight)
    old = facts.float64(constant) if constant else None
    if base.bias_at is None:
        value: Array | None = _trimmed(shift, old)
    else:
        beta = base.node.attributes.get("beta", 1.0)
        value = base.shifted(None if old is None else old * beta, scale, shift)
    dtype = facts.model.array(constant or base.weight).dtype
    bias = None if value is None else _stored(value, dtype)
    return None if bias is None else _Merge(base, chain, weight, bias, constant)


def _addend(facts: _Facts, chain: Sequence[Node]) -> str:
    """The constant of the first Add of a chain; empty if it has none."""
    adds = (node for node in chain if node.op == "Add")
    return next((name for node in adds for name in node.inputs if name in facts.model.constants), "")


def _trimmed(value: Array, like: Array | None) -> Array:
    """The value in the shape of `like` if it has its size, else without leading axes of extent 1."""
    if like is not None and like.size == value.size:
        return value.reshape(like.shape)
    whole = [i for i, extent in enumerate(value.shape) if extent > 1]
    return value.reshape(value.shape[min(whole, default=value.ndim) :])


def _chain(facts: _Facts, base: _Base) -> tuple[list[Node], Array, Array]:
    """The nodes behind a base that scale and shift its output, and what they come to together."""
    chain: list[Node] = []
    scale, shift = base.aligned(np.ones(())), base.aligned(np.zeros(()))
    name = base.node.outputs[0]
    with np.errstate(all="ignore"):
        while (node := facts.only_reader(name)) is not None and (step := _step(facts, base, node, name)):
            scale, shift = scale * step[0], shift * step[0] + step[1]
            chain.append(node)
            name = node.outputs[0]
    return chain, scale, shift


def _step(facts: _Facts, base: _Base, node: Node, name: str) -> tuple[Array, Array] | None:
    """The scale and shift that a node applies to the tensor `name`; None if it does something else."""
    constants = facts.model.constants
    if not _may_fold(facts, node, name):
        return None
    others = [other for other in node.inputs if other != name]
    first = node.inputs[0] == name
    dims = tuple(constants[others[0]].dims)
    if node.op == "BatchNormalization":
        dims += (1,) * (len(base.out) - 2)
        first = first and len(dims) == len(base.out) - 1
    if not base.carries(dims) or facts.rule(node) is None:
        return None
    values = [facts.float64(other) for other in others]
    one, zero = base.aligned(np.ones(())), base.aligned(np.zeros(()))
    value = base.aligned(values[0].reshape(dims))
    match node.op:
        case "BatchNormalization" if first:
            gain, bias, mean, variance = (base.aligned(value.reshape(dims)) for value in values)
            gain = gain / np.sqrt(variance + node.attributes.get("epsilon", 1e-5))
            return gain, bias - mean * gain
        case "Mul":
            return value, zero
        case "Div" if first:
            return one / value, zero
        case "Add":
            return one, value
        case "Sub":
            return (one, -value) if first else (-one, value)
    return None


Use = tuple[_Merge, str]  # a merge and what it changes: "weight" or "bias"


def _versions(merges: Sequence[_Merge]) -> dict[str, list[tuple[Array, list[Use]]]]:
    """For each constant that changes, its different new values and who needs which."""
    versions: dict[str, list[tuple[Array, list[Use]]]] = {}
    for merge in merges:
        for role, name, value in merge.uses():
            known = versions.setdefault(name, [])
            users = next((u for other, u in known if np.array_equal(other, value)), None)
            if users is None:
                users = []
                known.append((value, users))
            users.append((merge, role))
    return versions


def _keeps_readers(facts: _Facts, merges: Sequence[_Merge], name: str) -> bool:
    """Whether a constant is read, as it was, by something that no merge changes."""
    gone = {node.index for merge in merges for node in merge.chain}
    reads = sum(node.inputs.count(name) for node in facts.readers(name) if node.index not in gone)
    own = sum(
        name == used and (role == "weight" or merge.base.bias_at is not None)
        for merge in merges
        for role, used, _ in merge.uses()
    )
    return name in facts.fixed or reads > own


def _affordable(facts: _Facts, merges: list[_Merge]) -> list[_Merge]:
    """The merges that do not need another copy of a large shared weight."""
    while True:
        refused = {
            merge
            for name, versions in _versions(merges).items()
            if len(versions) > 1 or _keeps_readers(facts, merges, name)
            for value, users in versions
            for merge, _ in users
            if value.nbytes > CLONE_BYTES
        }
        if not refused:
            return merges
        merges = [merge for merge in merges if merge not in refused]


def _named(facts: _Facts, merges: Sequence[_Merge]) -> tuple[dict[Use, str], list[Edit]]:
    """Under which name each merge finds its constants; one that others need unchanged is cloned."""
    names: dict[Use, str] = {}
    edits: list[Edit] = []
    for name, versions in _versions(merges).items():
        free = not _keeps_readers(facts, merges, name)
        for value, users in versions:
            target = name if free else facts.fresh(f"{name}.folded")
            free = False
            names.update(dict.fromkeys(users, target))
            edits.append(SetWeight(target, value, f"{users[0][1]} of {users[0][0]}"))
    return names, edits


def _merged(facts: _Facts, merge: _Merge, names: Mapping[Use, str]) -> list[Edit]:
    """The base under its new weight and bias makes what the chain made."""
    base, edits = merge.base, list[Edit]()
    proto = copied_node(base.node.proto)
    nodes = [proto]
    if merge.weight is not None:
        proto.input[base.weight_at] = names[merge, "weight"]
    if merge.bias is not None:
        name = names.get((merge, "bias"), "")
        if not name:
            name = facts.fresh(f"{base.weight.removesuffix('.weight')}.bias")
            edits.append(SetWeight(name, merge.bias, f"bias of {merge}"))
        if base.bias_at is None:
            nodes.append(_add(merge, name))
        else:
            _set_bias(proto, base.bias_at, name)
        if base.bias_at is None and merge.weight is not None:  # other values than those it had
            proto.output[0] = nodes[-1].input[0] = facts.fresh(f"{proto.output[0]}.scaled")
    nodes[-1].output[0] = merge.chain[-1].outputs[0]
    gone = tuple(node.outputs[0] for node in (base.node, *merge.chain))
    return [*edits, Rewire(gone, add=tuple(nodes), reason=str(merge))]


def _add(merge: _Merge, bias: str) -> onnx.NodeProto:
    """The Add that is left of a chain whose base takes no bias."""
    proto = onnx.NodeProto()
    node = next((node for node in merge.chain if node.op == "Add"), None)
    if node is None:
        proto.CopyFrom(onnx.helper.make_node("Add", [], [""], name=merge.chain[-1].proto.name))
    else:
        proto.CopyFrom(node.proto)
    del proto.input[:]
    proto.input.extend([merge.base.node.outputs[0], bias])
    return proto


def _set_bias(proto: onnx.NodeProto, position: int, name: str) -> None:
    proto.input.extend([""] * (position + 1 - len(proto.input)))
    proto.input[position] = name
    kept = [attribute for attribute in proto.attribute if attribute.name != "beta"]
    del proto.attribute[:]
    proto.attribute.extend(kept)
