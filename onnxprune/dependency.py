"""Which axes must shrink together: types for every axis of every tensor, and the groups they form.

One walk over the nodes gives each axis a type (`axes`) and unifies where a declaration says that two
axes are one. The Vars that are still free at the end are the groups; what became a Const is pinned,
with the reason it met.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import networkx as nx
import numpy as np

from onnxprune import axes, flow
from onnxprune.axes import Axis, Const, Reason, Var
from onnxprune.errors import UserError
from onnxprune.model import FLOATS, WEIGHTS, Model, Node, uncollected
from onnxprune.ops import Pinned, Rule, Take, Unknown, control, lookup
from onnxprune.ops.spec import AxisPattern, Pattern, label, names
from onnxprune.shapes import Shapes, analyse

UNIT_LIMIT = 4096  # positions that an index map without a pattern may cut into single units
TERM_LIMIT = 2**14  # parts of a concatenation
OLDEST_OPSET = 7  # that the declarations describe
Parameter = tuple[int, int, AxisPattern, Axis]


@dataclass(eq=False, slots=True)
class Link:
    """One node's rule with its labels filled in: label -> axis."""

    node: Node
    rule: Rule
    labels: dict[str, Axis]
    inputs: tuple[list[Axis] | None, ...]
    outputs: tuple[list[Axis] | None, ...]
    take: Take | None = None

    @property
    def grouped(self) -> bool:
        """Whether the node is a convolution in groups."""
        name = self.rule.attributes.get("group")
        return name is not None and self.labels[name].extent > 1

    def contracted(self) -> Iterator[str]:
        """Labels that the node sums over: in an input, in no output.

        Parts that are sliced off occur once; what several parts of an axis share is summed over as well (queries
        and keys, projected by one matrix).
        """
        kept = {name for pattern in self.rule.outputs if pattern for name in pattern_labels(pattern)}
        if self.take is not None:
            kept.add(f"a{self.take.axis}")
        seen: set[str] = set()
        for pattern in self.rule.inputs:
            for terms in pattern or ():
                for name in terms[0] if len(terms) == 1 else _shared(terms):
                    if name not in kept and name not in seen and name not in self.rule.lossy:
                        seen.add(name)
                        yield name

    def operands(self, name: str) -> Iterator[tuple[int, int]]:
        """(input, axis) of every occurrence of a label among the inputs."""
        for i, pattern in enumerate(self.rule.inputs):
            for axis, terms in enumerate(pattern or ()):
                if i < len(self.inputs) and any(name in term for term in terms):
                    yield i, axis


def _shared(terms: AxisPattern) -> list[str]:
    """The labels that more than one part of an axis has."""
    names = [name for term in terms for name in term]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def pattern_labels(pattern: Pattern) -> Iterator[str]:
    """All labels of an operand, with repetitions."""
    for terms in pattern:
        for term in terms:
            yield from term


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A group on one axis of a constant.

    role: `produce` (a filter or matrix that makes these units), `consume` (one that reads them),
    `gain` (the scale of a normalisation) or `shift` (any other vector that acts on each unit).
    """

    node: Node
    input: int
    tensor: str
    axis: int
    role: str


@dataclass(eq=False)
class Group:
    """Units that are removed together wherever they occur."""

    name: str
    var: Var
    occurrences: list[Occurrence]
    lossy: tuple[Reason, ...] = ()
    siblings: list[Group] = field(default_factory=list)
    inner: bool = False  # a minor factor of some product (positions inside heads, inside conv groups)
    start: int = 0  # of its first unit on that axis
    stride: int = 1  # channels per unit on the axis of a producing weight
    grouped: bool = False  # takes part in a grouped or depthwise convolution
    windowed: bool = False  # takes part in any convolution

    @property
    def size(self) -> int:
        return self.var.extent

    @property
    def kind(self) -> str:
        return "lossy" if self.lossy else "exact"

    @property
    def nodes(self) -> list[Node]:
        return list({o.node.index: o.node for o in self.occurrences}.values())

    def __repr__(self) -> str:
        return f"Group({self.name}, {self.size}, {self.kind})"


@dataclass(frozen=True, slots=True)
class PinnedAxis:
    """An axis of a weight that no group owns, and why."""

    node: Node
    tensor: str
    axis: int
    extent: int
    reason: Reason


class DependencyGraph:
    """Axis types, links and groups of a model."""

    @uncollected
    def __init__(self, model: Model, shapes: Shapes | None = None) -> None:
        self.model = model
        self.shapes = shapes or analyse(model)
        self.types: dict[str, list[Axis] | None] = {}
        self.links: list[Link] = []
        self.opaque: dict[str, int] = {}  # operators without a declaration, and how often they occur
        self._uses: dict[tuple[int, int], list[Axis]] = {}
        self._lossy: list[tuple[Axis, Reason]] = []
        for value in model.inputs:
            self._pin_tensor(value.name, Reason("interface", f"graph input '{value.name}'"))
        self._unsteady = self._unsteady_bodies()
        for node in model.nodes:
            if not (node.outputs and node.outputs[0] in model.constants):
                self._link(node)
        for output in model.outputs:
            self._pin_tensor(output.name, Reason("interface", f"graph output '{output.name}'"))

    # ------------------------------------------------------------------------------------ typing

    def axes_of(self, node: Node, i: int) -> list[Axis] | None:
        """The axis types of input i of a node; None where unknown or not typed yet."""
        return self._uses.get((node.index, i)) or self.types.get(node.inputs[i])

    def _shape(self, name: str) -> tuple[int, ...] | None:
        return self.shapes.shapes.get(name)

    def _pin_tensor(self, name: str, reason: Reason) -> None:
        typed = self.types.get(name)
        if typed is not None:
            for axis in typed:
                axes.pin(axis, reason)
            return
        shape = self._shape(name)
        self.types[name] = None if shape is None else [Const(size, reason) for size in shape]

    def _store(self, node: Node, i: int, typed: list[Axis]) -> None:
        """Type a constant at its first use; vectors and integers are typed anew at each use."""
        name = node.inputs[i]
        if self._private(name):
            self._uses[node.index, i] = typed
        else:
            self.types[name] = typed

    def _private(self, name: str) -> bool:
        """Whether each use of a constant may be cut on its own (it is cloned where they differ)."""
        tensor = self.model.constants[name]
        if tensor.data_type not in FLOATS:
            return True
        whole = any(node.op != "Slice" for node in self.model.consumers.get(name, ()))
        return whole and sum(dim > 1 for dim in tensor.dims) <= 1  # slices of one vector are its parts

    def _unsteady_bodies(self) -> dict[int, str]:
        """Bodies that an iteration leaves with other extents than the next one finds: one iteration does not
        tell what they are."""
        return {
            node.attributes["scope"]: node.label
            for node in self.model.nodes
            if node.domain == flow.DOMAIN
            and node.op.endswith("Exit")
            and not control.steady(self.shapes.view(self.model, node))
        }

    def _declare(self, node: Node) -> Rule | Take | Pinned:
        opset = self.model.opset(node.domain)
        if self._unsteady:
            scopes = self.model.scopes
            innermost = max(map(scopes.of, (*node.inputs, *node.outputs)), default=0)  # inner ones come later
            for scope in scopes.chain(innermost):
                if scope in self._unsteady:
                    return Pinned(f"'{self._unsteady[scope]}' changes extents from one iteration to the next")
        spec = lookup(node.domain, node.op, opset)
        if spec is None or node.captured:
            name = f"{node.domain}.{node.op}" if node.domain else node.op
            self.opaque[name] = self.opaque.get(name, 0) + 1
            old = f" for opset {opset}" if node.domain == "" and opset < OLDEST_OPSET else ""
            return Pinned(f"operator {name} has no declaration{old}")
        try:
            return spec.declare(self.shapes.view(self.model, node))
        except Unknown as error:
            return Pinned(f"{node.op}: {error}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.model.name}: node '{node.label}' ({node.op}) has operands or attributes that it cannot have "
                f"({error}); the model is invalid"
            ) from None

    def _link(self, node: Node) -> None:
        rule = self._declare(node)
        try:
            if isinstance(rule, Pinned):
                self._pin_node(node, rule.why)
            elif node.op in ("Shape", "Size") and node.outputs[0] not in self.shapes.values:
                self._pin_node(node, f"{node.op}: the extents are only known at run time")
            elif isinstance(rule, Take):
                self._link_take(node, rule)
            else:
                self._link_rule(node, rule)
        except axes.Contradiction as error:
            raise UserError(
                f"{self.model.name}: shapes contradict at node '{node.label}' ({node.op}): extents {error}; "
                "the model is invalid"
            ) from None

    def _pin_node(self, node: Node, why: str) -> None:
        reason = Reason("operator", why, node.label)
        for i, name in enumerate(node.inputs):
            if not name:
                continue
            if name in self.model.constants and self.axes_of(node, i) is None:
                shape = self._shape(name) or ()
                self._store(node, i, [Const(size, reason) for size in shape])
            else:
                self._pin_tensor(name, reason)
        for name in node.captured:
            if name not in self.model.constants or not self._private(name):  # a private one is cloned
                self._pin_tensor(name, reason)
        for name in filter(None, node.outputs):
            self._pin_tensor(name, reason)

    def _link_rule(self, node: Node, rule: Rule) -> None:
        for name in node.outputs:
            if name and self._shape(name) is None:
                self._pin_node(node, f"the shape of '{name}' is unknown")
                return
        labels: dict[str, Axis] = {}
        inputs: list[list[Axis] | None] = []
        pending: list[tuple[int, Pattern]] = []
        for i, name in enumerate(node.inputs):
            pattern = rule.inputs[i] if i < len(rule.inputs) else None
            inputs.append(None)
            if not name or pattern is None:
                if name:
                    self._ignore_operand(node, i)
                continue
            typed = self.axes_of(node, i)
            if typed is None and name in self.model.constants:
                pending.append((i, pattern))
                continue
            if typed is None or len(typed) != len(pattern):
                self._pin_node(node, f"the shape of '{name}' is unknown")
                return
            inputs[i] = typed
            for axis, terms in zip(typed, pattern, strict=True):
                self._join(axis, terms, rule, labels, node)
        for i, pattern in pending:
            shape = self._shape(node.inputs[i]) or ()
            if len(shape) != len(pattern):
                self._pin_node(node, f"'{node.inputs[i]}' has {len(shape)} axes")
                return
            typed = self.axes_of(node, i)  # the node may read one constant twice
            if typed is None:
                typed = [self._build(t, size, rule, labels) for t, size in zip(pattern, shape, strict=True)]
                self._store(node, i, typed)
            for axis, terms in zip(typed, pattern, strict=True):
                self._join(axis, terms, rule, labels, node)
            inputs[i] = typed
        for name, other in rule.tied.items():
            if name in labels and other in labels:
                reason = Reason("layout", f"{node.op} joins axes of different layouts", node.label)
                axes.unify(labels[name], labels[other], reason)
        for name, why in rule.pinned.items():
            if name in labels:
                axes.pin(labels[name], Reason("operator", f"{node.op}: {why}", node.label))
        outputs = self._outputs(node, rule, labels)
        for name, why in rule.lossy.items():
            if name in labels:
                self._lossy.append((labels[name], Reason("lossy", f"{node.op}: {why}", node.label)))
        link = Link(node, rule, labels, tuple(inputs), tuple(outputs))
        self.links.append(link)
        if rule.resize is not None:
            self._pin_runtime_extents(link)

    def _ignore_operand(self, node: Node, i: int) -> None:
        name = node.inputs[i]
        if name in self.model.constants and self.axes_of(node, i) is None:
            reason = Reason("operator", f"{node.op}: an operand without axes", node.label)
            self._store(node, i, [Const(size, reason) for size in self._shape(name) or ()])

    def _outputs(self, node: Node, rule: Rule, labels: dict[str, Axis]) -> list[list[Axis] | None]:
        outputs: list[list[Axis] | None] = []
        for i, name in enumerate(node.outputs):
            pattern = rule.outputs[i] if i < len(rule.outputs) else None
            shape = self._shape(name) if name else None
            typed: list[Axis] | None = None
            if shape is not None and pattern is not None and len(pattern) == len(shape):
                typed = [
                    self._build(t, size, rule, labels, node) for t, size in zip(pattern, shape, strict=True)
                ]
            elif shape is not None:
                reason = Reason("operator", f"{node.op}: an output without axes", node.label)
                typed = [Const(size, reason) for size in shape]
            outputs.append(typed)
            if name:
                self.types[name] = typed
        return outputs

    def _join(self, axis: Axis, terms: AxisPattern, rule: Rule, labels: dict[str, Axis], node: Node) -> None:
        """Make an axis equal to what a pattern says it is."""
        if len(terms) == 1 and len(terms[0]) == 1:
            one, other = labels.setdefault(terms[0][0], axis), axis
        else:
            one, other = axis, self._build(terms, axis.extent, rule, labels)
        if one is not other:
            axes.unify(one, other, Reason("layout", f"{node.op} joins axes of different layouts", node.label))

    def _build(
        self, terms: AxisPattern, size: int, rule: Rule, labels: dict[str, Axis], node: Node | None = None
    ) -> Axis:
        """The axis a pattern describes; labels not met before become fresh axes."""
        if len(terms) == 1 and len(terms[0]) == 1:  # nearly always
            name = terms[0][0]
            if name not in labels:
                labels[name] = self._new(name, rule.sizes.get(name, size), rule, node)
            if labels[name].extent != size:
                raise axes.Contradiction(f"{size} and {labels[name].extent}")
            return labels[name]
        known = sum(self._term_size(term, rule, labels) or 0 for term in terms)
        built: list[Axis] = []
        for term in terms:
            extent = self._term_size(term, rule, labels)
            extent = size - known if extent is None else extent
            rest = extent
            unknown = None
            for name in term:
                here = self._label_size(name, rule, labels)
                if here is None:
                    unknown = name
                else:
                    rest //= max(here, 1)
            for name in term:
                if name not in labels:
                    here = rest if name == unknown else self._label_size(name, rule, labels) or 0
                    labels[name] = self._new(name, here, rule, node)
            built.append(axes.product([labels[name] for name in term]) if len(term) != 1 else labels[term[0]])
        axis = self._concat(built, node) if len(built) != 1 else built[0]
        if axis.extent != size:
            raise axes.Contradiction(f"{size} and {axis.extent}")
        return axis

    def _concat(self, parts: list[Axis], node: Node | None) -> Axis:
        count = sum(len(p.terms) if isinstance(p, axes.Sum) else 1 for p in map(axes.resolve, parts))
        if count <= TERM_LIMIT:
            return axes.concat(parts)
        reason = Reason("operator", "a sum of too many parts to follow", node.label if node else "")
        for part in parts:
            axes.pin(part, reason)
        return Const(sum(part.extent for part in parts), reason)

    def _new(self, name: str, size: int, rule: Rule, node: Node | None) -> Axis:
        if name in rule.pinned and node is not None:
            return Const(size, Reason("operator", f"{node.op}: {rule.pinned[name]}", node.label))
        return axes.fresh(size)

    @staticmethod
    def _label_size(name: str, rule: Rule, labels: Mapping[str, Axis]) -> int | None:
        return labels[name].extent if name in labels else rule.sizes.get(name)

    def _term_size(self, term: Iterable[str], rule: Rule, labels: Mapping[str, Axis]) -> int | None:
        size = 1
        for name in term:
            here = self._label_size(name, rule, labels)
            if here is None:
                return None
            size *= here
        return size

    def _link_take(self, node: Node, take: Take) -> None:
        source = self.axes_of(node, 0)
        shape = self._shape(node.inputs[0])
        if source is None and node.inputs[0] in self.model.constants and shape is not None:
            source = [axes.fresh(size) for size in shape]
            self._store(node, 0, source)
        if source is None or self._shape(node.outputs[0]) is None:
            self._pin_node(node, f"the shape of '{node.inputs[0]}' is unknown")
            return
        for i in range(1, len(node.inputs)):
            if node.inputs[i]:
                self._ignore_operand(node, i)
        reason = Reason("operator", f"{node.op} picks positions one by one, too many to follow", node.label)
        taken = axes.take(source[take.axis], take.index, UNIT_LIMIT, reason)
        if taken is None:
            axes.pin(source[take.axis], reason)
            taken = Const(len(take.index), reason)
        result = [taken if i == take.axis else axis for i, axis in enumerate(source)]
        letters = names("a", len(source))
        out = tuple(label("t" if i == take.axis else a) for i, a in enumerate(letters))
        rule = Rule((tuple(map(label, letters)),), (out,))
        labels = dict(zip(letters, source, strict=True)) | {"t": taken}
        self.links.append(Link(node, rule, labels, (source,), (result,), take))
        self.types[node.outputs[0]] = result

    def _pin_runtime_extents(self, link: Link) -> None:
        """Pin what an integer operand computed from dynamic sizes could not restate after a cut."""
        node, rule = link.node, link.rule
        for i, name in enumerate(node.inputs):
            if (
                not name
                or name in self.model.constants
                or (i < len(rule.inputs) and rule.inputs[i] is not None)
            ):
                continue
            reason = Reason(
                "operator", f"{node.op}: its operand '{name}' is computed at run time", node.label
            )
            value = self.shapes.values.get(name)
            typed = link.outputs[0] or []
            if value is not None and value.ndim == 1 and value.size == len(typed):
                static = self.shapes.static_entries(name)
                others = self.shapes.other.values.get(name) if self.shapes.other else None
                for j, (axis, entry) in enumerate(zip(typed, value.tolist(), strict=True)):
                    other = int(others[j]) if others is not None and others.shape == value.shape else None
                    if not static[j] and entry not in (0, -1) and not _scales(axis, entry, other):
                        axes.pin(axis, reason)
            if value is None or not self.shapes.static_entries(name).all():  # where an axis is cut moves
                for operand, pattern in zip(
                    (*link.inputs, *link.outputs), (*rule.inputs, *rule.outputs), strict=False
                ):
                    for axis, terms in zip(operand or (), pattern or (), strict=False):
                        if len(terms) > 1 or value is None:
                            axes.pin(axis, reason)

    # ------------------------------------------------------------------------------------ groups

    @functools.cached_property
    @uncollected
    def groups(self) -> list[Group]:
        """The groups, sorted by name. Removing any units of any group gives a valid graph."""
        found: dict[Var, Group] = {}
        for link in self.links:
            grouped, windowed = link.grouped, link.rule.window is not None
            for axis in link.labels.values():
                for var in axes.free_vars(axis):
                    if var not in found:
                        found[var] = Group("", var, [])
                    found[var].grouped |= grouped
                    found[var].windowed |= windowed
        lossy: dict[Var, dict[Reason, None]] = {}
        for axis, reason in self._lossy:
            for var in axes.free_vars(axis):
                lossy.setdefault(var, {})[reason] = None
        for var, reasons in lossy.items():
            found[var].lossy = tuple(reasons)
        for link in self.links:
            parameters = list(self._parameters(link))
            for occurrence, axis in self._occurrences(link, parameters) if parameters else ():
                for var in axes.free_vars(axis):
                    found[var].occurrences.append(occurrence)
            for _, _, _, axis in parameters:
                self._siblings(axis, found)
        groups = [g for g in found.values() if any(o.role in ("produce", "consume") for o in g.occurrences)]
        for group in groups:
            self._identify(group)
        groups.sort(key=lambda group: group.name)
        _make_unique(groups)
        return groups

    def _parameters(self, link: Link) -> Iterator[Parameter]:
        """(input, axis, pattern, type) of every axis of every weight that the node reads."""
        for i, typed in enumerate(link.inputs):
            if typed is not None and self.is_parameter(link.node.inputs[i]):
                for axis, (kind, terms) in enumerate(zip(typed, link.rule.inputs[i] or (), strict=True)):
                    yield i, axis, terms, kind

    def _occurrences(self, link: Link, parameters: Iterable[Parameter]) -> Iterator[tuple[Occurrence, Axis]]:
        made = {name for pattern in link.rule.outputs if pattern for name in pattern_labels(pattern)}
        for i, axis, terms, _ in parameters:
            tensor = link.node.inputs[i]
            vector = sum(size > 1 for size in self._shape(tensor) or ()) <= 1
            for name in pattern_labels((terms,)):
                if name not in made:
                    role = "consume"
                elif vector:
                    role = "gain" if link.rule.gain == i else "shift"
                else:
                    role = "produce"
                yield Occurrence(link.node, i, tensor, axis, role), link.labels[name]

    def is_parameter(self, name: str) -> bool:
        """Whether a tensor is a floating-point (or quantised) weight: stored, or filled at run time."""
        tensor = self.model.constants.get(name)
        if tensor is not None:
            return len(tensor.dims) > 0 and tensor.data_type in WEIGHTS
        producer = self.model.producers.get(name)
        return (
            producer is not None
            and producer.op == "ConstantOfShape"
            and producer.inputs[0] in self.model.constants
        )

    def _siblings(self, axis: Axis, found: Mapping[Var, Group]) -> None:
        """Groups in different factors of one product; the terms of a sum inside one factor are free."""
        for factors in axes.products(axes.resolve(axis)):
            members = [[found[var] for var in axes.free_vars(factor)] for factor in factors]
            for rank, here in enumerate(members):
                others = [m for other in members if other is not here for m in other]
                for group in here:
                    group.inner |= any(members[:rank])
                    group.siblings.extend(m for m in others if m is not group and m not in group.siblings)

    def _identify(self, group: Group) -> None:
        """Name a group after the weight that makes its units, so that node order does not matter."""
        makers = [o for o in group.occurrences if o.role == "produce"] or group.occurrences
        first = min(makers, key=lambda o: (o.tensor, o.axis))
        typed = self.axes_of(first.node, first.input)
        assert typed is not None
        axis = typed[first.axis]
        units = axes.unit_maps(axis, group.var)[0][1]
        start = int(np.argmax(units == 0))
        group.start = start
        group.stride = max(int((units == 0).sum()), 1)
        group.name = f"{first.tensor}:{first.axis}"
        if axes.resolve(axis) is not group.var:
            last = int(len(units) - np.argmax(units[::-1] == group.size - 1))
            step = int(np.argmax(units == 1)) - start if group.size > 1 else 1
            group.name += f"[{start}:{last}:{step}]" if step != 1 else f"[{start}:{last}]"

    @functools.cached_property
    def pinned(self) -> list[PinnedAxis]:
        """Axes of weights that cannot be cut (kernel windows, gates and single units aside)."""
        result = []
        for link in self.links:
            for i, number, _, axis in self._parameters(link):
                reasons = [
                    leaf.reason
                    for leaf in axes.leaves(axes.resolve(axis))
                    if isinstance(leaf, Const) and leaf.extent > 1 and not _is_inherent(leaf.reason)
                ]
                if reasons and not any(True for _ in axes.free_vars(axis)):
                    tensor = link.node.inputs[i]
                    result.append(PinnedAxis(link.node, tensor, number, axis.extent, reasons[0]))
        return result

    def to_networkx(self) -> nx.MultiGraph[str]:
        """Operators and groups as a graph; an edge is an occurrence (tensor, axis, role)."""
        graph: nx.MultiGraph[str] = nx.MultiGraph()
        for group in self.groups:
            graph.add_node(f"group:{group.name}", kind=group.kind, size=group.size)
            for o in group.occurrences:
                graph.add_node(f"node:{o.node.label}", kind="operator", op=o.node.op)
                graph.add_edge(
                    f"group:{group.name}", f"node:{o.node.label}", tensor=o.tensor, axis=o.axis, role=o.role
                )
        return graph


def _scales(axis: Axis, entry: int, other: int | None) -> bool:
    """Whether an extent that is computed at run time is a dynamic size times units that may be cut, such as
    (batch heads): it can then be scaled. `entry` and `other` are its values at two sizes of the inputs."""
    resolved = axes.resolve(axis)
    if not isinstance(resolved, axes.Product) or resolved.extent != entry or other is None:
        return False
    dynamic = [factor for factor in resolved.factors if isinstance(factor, Const)]
    units = entry // math.prod(factor.extent for factor in dynamic)
    return bool(dynamic) and other % units == 0


def is_window(reason: Reason) -> bool:
    """Whether an axis is the window of a filter."""
    return "window" in reason.text


def _is_inherent(reason: Reason) -> bool:
    """Whether an extent belongs to the operator as such: the window of a filter, the gates of a recurrence, the
    bytes of a packed block."""
    return is_window(reason) or "recurrence" in reason.text or "byte" in reason.text


def _make_unique(groups: list[Group]) -> None:
    seen: dict[str, int] = {}
    for group in groups:
        count = seen[group.name] = seen.get(group.name, 0) + 1
        if count > 1:
            group.name += f"#{count}"
