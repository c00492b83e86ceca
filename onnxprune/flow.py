"""Graphs with bodies (If, Loop, Scan) and calls of local functions, as one flat graph, and back.

`flatten` lifts the nodes and weights of bodies to the top level and puts operators of a private domain
in the place of the node that held them, declared in `ops/control.py` like any other:

    If                   (condition, then outputs ..., else outputs ...) -> outputs
    LoopEntry, ScanEntry (inputs of the node) -> inputs of the body
    LoopExit, ScanExit   (states before ..., states after ..., slices ..., [condition]) -> outputs
    Alias                a body's output that no node of the body makes

so that analysis and every mutator see plain nodes only. `nest` is the inverse. What it needs travels in
the flat graph: which scope each tensor belongs to and under which name, and the shell of each node.
Calls of functions are replaced by the function's nodes, for good.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

DOMAIN = "onnxprune.flow"
ALIAS = "Alias"
DEEPEST = 32  # bodies inside bodies, and calls inside functions
LONGEST = 10**6  # nodes that calls of functions may unfold to
_BODIES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}
_ARITY = {"If": (1, 1), "Loop": (2, sys.maxsize), "Scan": (1, sys.maxsize)}
_RUNTIME = ("", "ai.onnx", "com.microsoft")  # functions there stand for operators that a runtime has
_CONDITIONS = 2  # the inputs of a Loop, and of its body, in front of what it carries

Key = tuple[str, str, str]


class Invalid(Exception):
    """A graph whose bodies or functions mean nothing, and why."""


@dataclass(frozen=True)
class Scopes:
    """Which body each tensor of a flat graph belongs to; 0 is the graph itself."""

    names: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # tensor -> scope, original name
    parents: Sequence[int] = (0,)

    def of(self, name: str) -> int:
        """The scope of a tensor."""
        return self.names.get(name, (0, ""))[0]

    def chain(self, scope: int) -> list[int]:
        """The scope and those around it, innermost first."""
        found = [scope]
        while found[-1]:
            found.append(self.parents[found[-1]])
        return found

    def common(self, a: int, b: int) -> int:
        """The innermost scope around both."""
        around = self.chain(a)
        return next(scope for scope in self.chain(b) if scope in around)


@dataclass(frozen=True)
class Flat:
    """A flat graph; `inlined` says which functions were unfolded, and how often."""

    proto: onnx.ModelProto
    inlined: Mapping[str, int] = field(default_factory=dict)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs held by a node's attributes (If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def captured(node: onnx.NodeProto) -> set[str]:
    """Names that the node's subgraphs read from outside."""
    outside: set[str] = set()
    for graph in subgraphs(node):
        inside = {t.name for t in graph.initializer} | {i.name for i in graph.input}
        inside |= {t.values.name for t in graph.sparse_initializer}
        inside |= {o for n in graph.node for o in n.output}
        used = {i for n in graph.node for i in n.input if i} | {o.name for o in graph.output}
        for inner in graph.node:
            used |= captured(inner)
        outside |= used - inside
    return outside


def fresh_name(wish: str, taken: set[str]) -> str:
    """The wish, numbered if it is taken; from now on it is."""
    name, count = wish, 1
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    taken.add(name)
    return name


def copied_node(node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy that outlives the graph it was in."""
    result = onnx.NodeProto()
    result.CopyFrom(node)
    return result


def copy_fields(source: Any, target: Any, leave_out: frozenset[str]) -> None:
    """Copy the fields of a message, but for some, without ever copying those."""
    for described, value in source.ListFields():
        if described.name in leave_out:
            continue
        if (
            getattr(described, "is_repeated", None)
            or isinstance(value, list | tuple)
            or hasattr(value, "extend")
        ):
            getattr(target, described.name).extend(value)
        elif described.message_type is not None:
            getattr(target, described.name).CopyFrom(value)
        else:
            setattr(target, described.name, value)


def scopes(proto: onnx.ModelProto) -> Scopes:
    """The scopes of a flat graph."""
    for entry in proto.metadata_props:
        if entry.key == DOMAIN:
            record = json.loads(entry.value)
            return Scopes({k: (s, n) for k, (s, n) in record["names"].items()}, record["parents"])
    return Scopes()


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph and all bodies inside it and in functions. Raises `Invalid` where they are nested too deep."""
    waiting = [(proto.graph, 0)]
    waiting += [(inner, 1) for f in proto.functions for node in f.node for inner in subgraphs(node)]
    while waiting:
        graph, depth = waiting.pop()
        if depth > DEEPEST:
            raise Invalid(f"bodies are nested more than {DEEPEST} deep; simplify the model")
        yield graph
        waiting += [(inner, depth + 1) for node in graph.node for inner in subgraphs(node)]


def flatten(proto: onnx.ModelProto) -> Flat:
    """The flat form of a graph; the graph itself where it is flat.

    Raises `Invalid` for bodies and functions that mean nothing.
    """
    if any(entry.key == DOMAIN for entry in proto.metadata_props):
        return Flat(proto)
    flattener = _Flattener(proto)
    return flattener.run() if flattener.needed() else Flat(proto)


def refuse_private(proto: onnx.ModelProto) -> None:
    """Raises `Invalid` if the model comes with what only a flat graph may hold."""
    used = {node.domain for node in proto.graph.node} | {entry.key for entry in proto.metadata_props}
    if DOMAIN in used:
        raise Invalid(f"it uses the name {DOMAIN}, which is reserved; export the model again")


# -------------------------------------------------------------------------------------------- flatten


class _Names:
    """The names that nodes of one scope see, and what they are called in the flat graph."""

    def __init__(self, parent: _Names | None, scope: int, path: str, function: bool = False) -> None:
        self.parent = parent
        self.scope = scope
        self.path = path
        self.function = function  # inside one; its own names mean nothing outside
        self.own: dict[str, str] = {}
        self.made: set[str] = set()  # by nodes, in the flat graph's names
        self.attributes: Mapping[str, onnx.AttributeProto] = parent.attributes if parent is not None else {}
        self.calls: tuple[Key, ...] = parent.calls if parent is not None else ()

    def find(self, name: str) -> str | None:
        names: _Names | None = self
        while names is not None:
            if name in names.own:
                return names.own[name]
            names = names.parent
        return None


class _Flattener:
    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.functions: dict[Key, onnx.FunctionProto] = {
            _key(f.domain, f.name, f): f
            for f in proto.functions
            if f.domain not in _RUNTIME and _same_opsets(proto, f)
        }
        self.long = self._long()
        self.inlined: Counter[Key] = Counter()
        self.taken: set[str] = set()
        self.used: set[str] = set()
        self.names: dict[str, tuple[int, str]] = {}
        self.parents = [0]
        self.flat = onnx.ModelProto()

    def needed(self) -> bool:
        opset = _opset(self.proto)
        return any(_is_control(n, opset) or self._called(n) is not None for n in self.proto.graph.node)

    def run(self) -> Flat:
        copy_fields(self.proto, self.flat, frozenset({"graph"}))
        copy_fields(self.proto.graph, self.flat.graph, frozenset({"node"}))
        for graph in graphs(self.proto):
            self.taken.update(_values(graph))
        top = _Names(None, 0, "")
        top.own = {name: name for name in _values(self.proto.graph)}
        self.used.update(top.own, (value.name for value in self.proto.graph.value_info))
        self.names.update({name: (0, name) for name in top.own})
        self._nodes(self.proto.graph.node, top)
        self._drop_unfolded()
        if len(self.parents) > 1:
            record = json.dumps({"names": self.names, "parents": self.parents})
            self.flat.metadata_props.add(key=DOMAIN, value=record)
        return Flat(self.flat, {f"{d}.{n}": count for (d, n, _), count in sorted(self.inlined.items())})

    def _drop_unfolded(self) -> None:
        """Take out the functions that nothing calls any more, and import what they brought in."""
        imported = {_plain(o.domain) for o in self.flat.opset_import}
        for key in self.inlined:
            for opset in self.functions[key].opset_import:
                if _plain(opset.domain) not in imported:
                    imported.add(_plain(opset.domain))
                    self.flat.opset_import.add().CopyFrom(opset)
        functions = {_key(f.domain, f.name, f): f for f in self.flat.functions}
        waiting = [_key(n.domain, n.op_type, n) for n in _all_nodes(self.flat.graph.node)]
        waiting += [key for key in functions if key not in self.inlined]
        needed: set[Key] = set()
        while waiting:
            key = waiting.pop()
            if key in functions and key not in needed:
                needed.add(key)
                waiting += [_key(n.domain, n.op_type, n) for n in _all_nodes(functions[key].node)]
        kept = [function for key, function in functions.items() if key in needed]
        del self.flat.functions[:]
        self.flat.functions.extend(kept)

    # -------------------------------------------------------------------------------------- names

    def _bind(self, name: str, names: _Names) -> str:
        """A name of the flat graph for one that this scope defines."""
        if name in names.own:
            raise Invalid(f"tensor '{name}' is produced twice in '{names.path}'; the graph is invalid")
        flat = name if name not in self.used else fresh_name(f"{names.path}.{name}", self.taken)
        self.used.add(flat)
        names.own[name] = flat
        self.names[flat] = (names.scope, flat if names.function else name)
        return flat

    def _find(self, name: str, names: _Names, reader: str) -> str:
        found = names.find(name) if name else ""
        if found is not None:
            return found
        if names.scope == 0 and not names.function:
            return name
        raise Invalid(f"{reader} reads '{name}', which nothing produces; the graph is invalid")

    # -------------------------------------------------------------------------------------- nodes

    def _nodes(self, nodes: Iterable[onnx.NodeProto], names: _Names) -> None:
        opset = _opset(self.proto)
        for node in nodes:
            key = self._called(node)
            if key is not None:
                self._call(node, key, names)
            elif _is_control(node, opset):
                self._control(node, names)
            else:
                self.flat.graph.node.append(self._plain(node, names))

    def _plain(self, node: onnx.NodeProto, names: _Names) -> onnx.NodeProto:
        copy = copied_node(node)
        reader = f"node '{node.name or ''.join(node.output[:1])}'"
        for i, name in enumerate(node.input):
            copy.input[i] = self._find(name, names, reader)
        for i, name in enumerate(node.output):
            copy.output[i] = self._find(name, names, reader)
        outside = captured(node)
        if names.calls:
            _fill_in(copy, names.attributes)
        if outside:
            renamed = {name: self._find(name, names, reader) for name in sorted(outside)}
            _rename_captured(copy, {old: new for old, new in renamed.items() if old != new})
        if names.calls and copy.name:
            copy.name = _path(names, copy.name)
        return copy

    def _control(self, node: onnx.NodeProto, names: _Names) -> None:
        """A node with bodies: its shell and, for each body, the nodes."""
        label = node.name or next(o for o in node.output if o)
        shell = copied_node(node)
        if names.calls:
            _fill_in(shell, names.attributes)
            shell.name = _path(names, node.name) if node.name else ""
        del shell.input[:]
        del shell.output[:]
        kinds = _BODIES[node.op_type]
        bodies = {a.name: a.g for a in shell.attribute if a.name in kinds}
        if len(bodies) < len(kinds) or not all(b.output for b in bodies.values()):
            raise Invalid(
                f"node '{label}' ({node.op_type}) lacks its {' or '.join(kinds)}; the graph is invalid"
            )
        low, high = _ARITY[node.op_type]
        if not low <= len(node.input) <= high:
            raise Invalid(
                f"node '{label}' ({node.op_type}) has {len(node.input)} inputs; the graph is invalid"
            )
        inputs = [self._find(name, names, f"node '{label}'") for name in node.input]
        outputs = [self._find(name, names, f"node '{label}'") for name in node.output]
        flow = onnx.helper.make_node(node.op_type, inputs, outputs, name=node.name, domain=DOMAIN)
        if node.op_type == "If":
            self._branches(flow, shell, bodies, names, label)
        else:
            self._iterated(flow, shell, bodies["body"], names, label)

    def _branches(
        self,
        flow: onnx.NodeProto,
        shell: onnx.NodeProto,
        bodies: Mapping[str, onnx.GraphProto],
        names: _Names,
        label: str,
    ) -> None:
        first = len(self.parents)
        self.parents += [names.scope] * len(bodies)
        for i, kind in enumerate(_BODIES["If"]):
            if len(bodies[kind].output) != len(flow.output):
                self._refuse_count(label, "If", kind, "outputs", len(bodies[kind].output), len(flow.output))
            inner = _Names(names, first + i, _path(names, label, kind), names.function)
            if given := self._inputs(bodies[kind]):
                self._refuse_count(label, "If", kind, "inputs", len(given), 0)
            self._define(bodies[kind], inner)
            self._nodes(_taken(bodies[kind]), inner)
            flow.input.extend(self._results(bodies[kind], inner))
        self._append(flow, shell, first)

    def _iterated(
        self,
        flow: onnx.NodeProto,
        shell: onnx.NodeProto,
        body: onnx.GraphProto,
        names: _Names,
        label: str,
    ) -> None:
        op = flow.op_type
        given = self._inputs(body)
        integers = {a.name: a for a in shell.attribute}
        first, sliced = _CONDITIONS, 0
        if op == "Scan":
            first, sliced = 0, integers["num_scan_inputs"].i if "num_scan_inputs" in integers else 0
        states = len(flow.input) - first - sliced
        if len(given) != len(flow.input) or states < 0:
            self._refuse_count(label, op, "body", "inputs", len(given), len(flow.input))
        if len(body.output) - first // 2 != len(flow.output) or len(flow.output) < states:
            self._refuse_count(
                label, op, "body", "outputs", len(body.output), max(len(flow.output), states) + first // 2
            )
        scope = len(self.parents)
        self.parents.append(names.scope)
        inner = _Names(names, scope, _path(names, label, "body"), names.function)
        self._define(body, inner)
        own = [inner.own[name] for name in given]
        entry = onnx.helper.make_node(
            f"{op}Entry",
            flow.input,
            own,
            name=flow.name,
            domain=DOMAIN,
            first=first,
            states=states,
            scope=scope,
        )
        _state_axes(entry, integers, "scan_input_axes", sliced)
        self.flat.graph.node.append(entry)
        self._nodes(_taken(body), inner)
        results = self._results(body, inner)
        results = results[first // 2 :] + results[: first // 2]  # a Loop's condition comes last
        leave = onnx.helper.make_node(
            f"{op}Exit",
            own[first : first + states] + results,
            flow.output,
            name=flow.name,
            domain=DOMAIN,
            states=states,
        )
        _state_axes(leave, integers, "scan_output_axes", len(flow.output) - states)
        self._append(leave, shell, scope)

    def _append(self, flow: onnx.NodeProto, shell: onnx.NodeProto, scope: int) -> None:
        flow.attribute.append(onnx.helper.make_attribute("shell", shell.SerializeToString()))
        flow.attribute.append(onnx.helper.make_attribute("scope", scope))
        self.flat.graph.node.append(flow)

    def _refuse_count(self, label: str, op: str, kind: str, what: str, have: int, need: int) -> None:
        raise Invalid(
            f"node '{label}' ({op}): its {kind} has {have} {what} and needs {need}; the graph is invalid"
        )

    # -------------------------------------------------------------------------------------- bodies

    @staticmethod
    def _inputs(body: onnx.GraphProto) -> list[str]:
        weights = {t.name for t in body.initializer}
        return [value.name for value in body.input if value.name not in weights]

    def _define(self, body: onnx.GraphProto, names: _Names) -> None:
        """Name all that a body defines, and take its weights and the types of its tensors out of it."""
        for name in self._inputs(body):
            self._bind(name, names)
        for tensor in body.initializer:
            self._bind(tensor.name, names)
        for sparse in body.sparse_initializer:
            self._bind(sparse.values.name, names)
        for node in body.node:
            names.made.update(self._bind(output, names) for output in node.output if output)
        graph = self.flat.graph
        for tensor in body.initializer:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = names.own[tensor.name]
        for sparse in body.sparse_initializer:
            graph.sparse_initializer.add().CopyFrom(sparse)
            graph.sparse_initializer[-1].values.name = names.own[sparse.values.name]
        del body.initializer[:]
        del body.sparse_initializer[:]
        for value in (*body.input, *body.value_info):
            if value.name in names.own:
                value.name = names.own[value.name]
                self._type(value)

    def _type(self, value: onnx.ValueInfoProto) -> None:
        """State the type of a body's tensor in the flat graph, where cuts are followed."""
        if value.HasField("type"):
            self.flat.graph.value_info.add(name=value.name).type.CopyFrom(value.type)

    def _results(self, body: onnx.GraphProto, names: _Names) -> list[str]:
        """The tensors that a body gives; one that none of its own nodes makes, or twice, gets an Alias."""
        found: list[str] = []
        for value in body.output:
            flat = self._find(value.name, names, f"an output of '{names.path}'")
            if flat not in names.made or flat in found:
                alias = fresh_name(f"{names.path}.{value.name}.out", self.taken)
                self.used.add(alias)
                self.names[alias] = (names.scope, alias)
                self.flat.graph.node.append(
                    onnx.helper.make_node(ALIAS, [flat], [alias], name=alias, domain=DOMAIN)
                )
                flat = alias
            value.name = flat
            self._type(value)
            found.append(flat)
        return found

    # -------------------------------------------------------------------------------------- functions

    def _called(self, node: onnx.NodeProto) -> Key | None:
        """The function that a node calls, if it can be unfolded."""
        if not self.functions:
            return None
        key = _key(node.domain, node.op_type, node)
        return key if key in self.functions and key not in self.long else None

    def _long(self) -> set[Key]:
        """Functions that unfold to too many nodes. Raises `Invalid` for recursive ones."""
        sizes: dict[Key, int] = {}

        def size(key: Key, path: tuple[Key, ...]) -> int:
            name = f"{key[0]}.{key[1]}"
            if key in path:
                raise Invalid(f"function {name} calls itself, and functions must not be recursive")
            if len(path) > DEEPEST:
                raise Invalid(
                    f"function {name}: calls are nested more than {DEEPEST} deep; simplify the model"
                )
            if key not in sizes:
                total = 0
                for node in _all_nodes(self.functions[key].node):
                    callee = _key(node.domain, node.op_type, node)
                    total += size(callee, (*path, key)) if callee in self.functions else 1
                sizes[key] = total
            return sizes[key]

        for key in self.functions:
            size(key, ())
        return {key for key, total in sizes.items() if total > LONGEST}

    def _call(self, node: onnx.NodeProto, key: Key, names: _Names) -> None:
        """The nodes of a function in the place of a call."""
        function = self.functions[key]
        self.inlined[key] += 1
        label = node.name or "".join(node.output[:1]) or function.name
        if len(node.input) > len(function.input) or len(node.output) > len(function.output):
            raise Invalid(
                f"node '{label}' calls {key[0]}.{key[1]} with more operands than it takes; the graph is invalid"
            )
        reader = f"node '{label}'"
        inner = _Names(None, names.scope, _path(names, label), function=True)
        inner.calls = (*names.calls, key)
        caller = copied_node(node)
        _fill_in(caller, names.attributes)
        given = {a.name: a for a in caller.attribute}
        defaults = {a.name: a for a in function.attribute_proto}
        inner.attributes = {**defaults, **given}
        for i, name in enumerate(function.input):
            inner.own[name] = self._find(node.input[i], names, reader) if i < len(node.input) else ""
        made = {o for n in function.node for o in n.output}
        passed: list[tuple[str, str]] = []
        for formal, actual in zip(function.output, node.output, strict=False):
            if not actual:
                continue
            if formal in made and formal not in inner.own:
                inner.own[formal] = self._find(actual, names, reader)
            else:
                passed.append((formal, self._find(actual, names, reader)))
        bound = set(inner.own)
        for output in (o for n in function.node for o in n.output):
            if output and output not in bound:
                self._bind(output, inner)
        self._nodes(function.node, inner)
        for formal, actual in passed:
            source = self._find(formal, inner, f"function {key[0]}.{key[1]}")
            self.flat.graph.node.append(onnx.helper.make_node("Identity", [source], [actual], name=actual))


def _taken(body: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a body, which is left without them."""
    nodes = list(body.node)
    copies = []
    for node in nodes:
        copies.append(onnx.NodeProto())
        copies[-1].CopyFrom(node)
    del body.node[:]
    return copies


def _path(names: _Names, *parts: str) -> str:
    return ".".join(filter(None, (names.path, *parts)))


def _state_axes(
    node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto], name: str, count: int
) -> None:
    """State where each tensor that is taken apart, or put together, has the axis of the iterations."""
    axes = list(attributes[name].ints) if name in attributes else []
    axes = (axes + [0] * count)[:count]
    if axes:
        node.attribute.append(onnx.helper.make_attribute("axes", axes))


def _is_control(node: onnx.NodeProto, opset: int) -> bool:
    """Whether bodies are lifted out of a node (Scan had another meaning before operator set 9)."""
    return (
        node.op_type in _BODIES
        and node.domain in ("", "ai.onnx")
        and (node.op_type != "Scan" or opset >= 9)
        and any(node.output)
    )


def _opset(proto: onnx.ModelProto) -> int:
    return next((o.version for o in proto.opset_import if _plain(o.domain) == ""), 1)


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _key(domain: str, name: str, message: onnx.NodeProto | onnx.FunctionProto) -> Key:
    return domain, name, getattr(message, "overload", "")


def _same_opsets(proto: onnx.ModelProto, function: onnx.FunctionProto) -> bool:
    """Whether a function's nodes mean the same in the model's graph."""
    versions = {_plain(o.domain): o.version for o in proto.opset_import}
    return all(versions.get(_plain(o.domain), o.version) == o.version for o in function.opset_import)


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [inner for graph in subgraphs(node) for inner in graph.node]


def _values(graph: onnx.GraphProto) -> Iterator[str]:
    """The names of all tensors that a graph defines."""
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    yield from (output for node in graph.node for output in node.output if output)


def _fill_in(node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto]) -> None:
    """Put the values of a function's attributes where its nodes, also those in bodies, refer to them."""
    attributes = []
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name not in given:
                continue
            value = onnx.AttributeProto()
            value.CopyFrom(given[attribute.ref_attr_name])
            value.name = attribute.name
            attributes.append(value)
        else:
            attributes.append(attribute)
    copies = onnx.NodeProto()
    copies.attribute.extend(attributes)
    del node.attribute[:]
    node.attribute.extend(copies.attribute)
    for graph in subgraphs(node):
        for inner in graph.node:
            _fill_in(inner, given)


def _rename_captured(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    """Give tensors that a node's bodies read from outside other names there."""
    for graph in subgraphs(node):
        inside = set(_values(graph))
        outside = {old: new for old, new in renamed.items() if old not in inside}
        if not outside:
            continue
        for inner in graph.node:
            for i, name in enumerate(inner.input):
                inner.input[i] = outside.get(name, name)
            _rename_captured(inner, outside)
        for value in graph.output:
            value.name = outside.get(value.name, value.name)


# ---------------------------------------------------------------------------------------------- watch


@dataclass(frozen=True)
class Watch:
    """A tensor that says how an If decided: 1 or 0, -1 where it was not reached."""

    name: str
    condition: str
    label: str


def watched(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Watch]]:
    """The flat graph with the conditions of its Ifs handed out to the top, but for those inside loops."""
    known = scopes(proto)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    choices = [n for n in result.graph.node if n.domain == DOMAIN and n.op_type == "If"]
    if not choices:
        return proto, []
    holders = {scope: n for n in choices for scope in _bodies_of(n, _integer(n, "scope"))}
    watches: list[Watch] = []
    before: dict[int, list[onnx.NodeProto]] = {}
    graph = result.graph
    flat, missing = f"{DOMAIN}.flat", f"{DOMAIN}.missing"
    for number, node in enumerate(choices):
        chain = known.chain(known.of(next(o for o in node.output if o)))[:-1]
        if not all(scope in holders for scope in chain):
            continue
        name = f"{DOMAIN}.{number}"
        before[id(node)] = [
            onnx.helper.make_node("Cast", [node.input[0]], [f"{name}.cast"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Reshape", [f"{name}.cast", flat], [name]),
        ]
        watch = name
        for scope in chain:
            holder = holders[scope]
            half = len(holder.output)
            results = [list(holder.input[1 : 1 + half]), list(holder.input[1 + half :])]
            taken = scope - _integer(holder, "scope")
            results[taken].append(name)
            results[1 - taken].append(missing)
            name = f"{watch}.{scope}"
            holder.output.append(name)
            del holder.input[1:]
            holder.input.extend(results[0] + results[1])
        watches.append(Watch(name, node.input[0], node.name or node.output[0]))
    graph.initializer.add(name=flat, data_type=onnx.TensorProto.INT64, dims=[1], int64_data=[1])
    graph.initializer.add(name=missing, data_type=onnx.TensorProto.FLOAT, dims=[1], float_data=[-1])
    nodes = [new for node in graph.node for new in (*before.get(id(node), ()), node)]
    copies = onnx.GraphProto()
    copies.node.extend(nodes)
    del graph.node[:]
    graph.node.extend(copies.node)
    return result, watches


# ----------------------------------------------------------------------------------------------- nest


def nest(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its bodies; the graph itself where it has none.

    A node or weight that was added to the flat graph goes to the innermost scope around its readers.
    """
    found = scopes(proto)
    return _Nester(proto, found).run() if len(found.parents) > 1 else proto


class _Nester:
    def __init__(self, proto: onnx.ModelProto, known: Scopes) -> None:
        self.proto = proto
        graph = proto.graph
        outside = {value.name for value in graph.input}  # a tensor cut loose from its body may be one
        self.scopes = Scopes({k: v for k, v in known.names.items() if k not in outside}, known.parents)
        self.place = {name: scope for name, (scope, _) in self.scopes.names.items()}
        self.place.update(dict.fromkeys(outside, 0))
        self.types = {value.name: value.type for value in reversed(graph.value_info)}
        self.aliases = {
            n.output[0]: n.input[0] for n in graph.node if n.domain == DOMAIN and n.op_type == ALIAS
        }
        self.holders: dict[int, onnx.NodeProto] = {}  # scope -> the node that has it as a body
        self.entries: dict[int, onnx.NodeProto] = {}
        for node in graph.node:
            if node.domain == DOMAIN and node.op_type != ALIAS:
                scope = _integer(node, "scope")
                if node.op_type.endswith("Entry"):
                    self.entries[scope] = node
                else:
                    self.holders.update(dict.fromkeys(_bodies_of(node, scope), node))
        self._settle()
        self.shown = self._restored()
        self.taken = set(self.place) | {tensor.name for tensor in graph.initializer}
        self.weights: dict[int, list[onnx.TensorProto]] = {}  # by scope
        for tensor in graph.initializer:
            self.weights.setdefault(self._place_of_weight(tensor.name), []).append(tensor)

    def run(self) -> onnx.ModelProto:
        result = onnx.ModelProto()
        copy_fields(self.proto, result, frozenset({"graph"}))
        placed = frozenset({"node", "initializer", "sparse_initializer", "value_info"})
        copy_fields(self.proto.graph, result.graph, placed)
        kept = [entry for entry in result.metadata_props if entry.key != DOMAIN]
        del result.metadata_props[:]
        result.metadata_props.extend(kept)
        nodes: dict[int, list[onnx.NodeProto]] = {scope: [] for scope in range(len(self.scopes.parents))}
        for index, node in enumerate(self.proto.graph.node):
            scope = self.node_place[index]
            if node.domain == DOMAIN:
                if node.op_type == ALIAS or node.op_type.endswith("Entry"):
                    continue
                nodes[scope].append(self._holder(node, nodes))
            else:
                nodes[scope].append(self._named(node))
        result.graph.node.extend(nodes[0])
        result.graph.initializer.extend(self.weights.get(0, ()))
        for sparse in self.proto.graph.sparse_initializer:
            if self.place.get(sparse.values.name, 0) == 0:
                result.graph.sparse_initializer.append(sparse)
        result.graph.value_info.extend(
            value for value in self.proto.graph.value_info if self.place.get(value.name, 0) == 0
        )
        return result

    # -------------------------------------------------------------------------------------- scopes

    def _reads(self, node: onnx.NodeProto, scope: int) -> Iterator[tuple[str, int]]:
        """What a node reads, and in which scope it does."""
        if node.domain != DOMAIN or node.op_type == ALIAS:
            yield from ((name, scope) for name in (*node.input, *captured(node)))
        elif node.op_type.endswith("Entry"):
            yield from ((name, self.scopes.parents[scope]) for name in node.input)
        else:
            first = _integer(node, "scope")
            if node.op_type == "If":
                yield node.input[0], scope
                half = len(node.output)
                for i, name in enumerate(node.input[1:]):
                    yield name, first + i // max(half, 1)
            else:
                yield from ((name, first) for name in node.input)

    def _settle(self) -> None:
        """Find the scope of every node and of what was added."""
        readers: dict[str, int] = dict.fromkeys((o.name for o in self.proto.graph.output), 0)
        places: list[int] = []
        for node in reversed(self.proto.graph.node):
            scope = next((self.place[o] for o in node.output if o in self.place), None)
            if scope is None:
                scope = next((readers[o] for o in node.output if o in readers), None)
            if scope is None:
                scope = max((self.place.get(i, 0) for i in node.input), key=self._depth, default=0)
            for output in filter(None, node.output):
                self.place.setdefault(output, scope)
            for name, where in self._reads(node, scope):
                readers[name] = self.scopes.common(readers[name], where) if name in readers else where
            places.append(scope)
        self.node_place = places[::-1]
        self.readers = readers

    def _depth(self, scope: int) -> int:
        return len(self.scopes.chain(scope))

    def _place_of_weight(self, name: str) -> int:
        listed = self.proto.ir_version < 4  # weights had to be inputs then, which bodies lack
        return self.place.setdefault(name, 0 if listed else self.readers.get(name, 0))

    def _restored(self) -> dict[str, str]:
        """Original names, but for those that would hide a tensor that is read there."""
        original = {k: name for k, (_, name) in self.scopes.names.items() if k != name}
        if not original:
            return original
        own = {(scope, name): k for k, (scope, name) in self.scopes.names.items()}
        for node, scope in zip(self.proto.graph.node, self.node_place, strict=True):
            for name, where in self._reads(node, scope):
                home, shown = self.place.get(name, 0), original.get(name, name)
                for inner in self.scopes.chain(where):
                    if inner == home:
                        break
                    hiding = own.get((inner, shown))
                    if hiding is not None and hiding != name:
                        original.pop(hiding, None)
        return original

    # -------------------------------------------------------------------------------------- nodes

    def _named(self, node: onnx.NodeProto) -> onnx.NodeProto:
        outside = {name: self.shown[name] for name in captured(node) if name in self.shown}
        if not outside and self.shown.keys().isdisjoint((*node.input, *node.output)):
            return node
        copy = copied_node(node)
        for operands in (copy.input, copy.output):
            for i, name in enumerate(operands):
                operands[i] = self.shown.get(name, name)
        _rename_captured(copy, outside)
        return copy

    def _holder(self, node: onnx.NodeProto, nodes: Mapping[int, list[onnx.NodeProto]]) -> onnx.NodeProto:
        """A node with its bodies filled."""
        shell = onnx.NodeProto()
        shell.ParseFromString(next(a.s for a in node.attribute if a.name == "shell"))
        first = _integer(node, "scope")
        if node.op_type == "If":
            inputs = list(node.input[:1])
            half = len(node.output)
            results = [list(node.input[1 : 1 + half]), list(node.input[1 + half :])]
        else:
            inputs = list(self.entries[first].input)
            states = _integer(node, "states")
            own = list(node.input[states:])
            count = len(node.output)
            results = [own[count:] + own[:count]]
        shell.input.extend(self.shown.get(name, name) for name in inputs)
        shell.output.extend(self.shown.get(name, name) for name in node.output)
        bodies = {a.name: a.g for a in shell.attribute}
        for i, kind in enumerate(_BODIES[shell.op_type]):
            self._fill(bodies[kind], first + i, nodes[first + i], results[i])
        return shell

    def _fill(
        self, body: onnx.GraphProto, scope: int, nodes: list[onnx.NodeProto], results: list[str]
    ) -> None:
        body.node.extend(nodes)
        made = {output for node in nodes for output in node.output}
        for tensor in self.weights.get(scope, ()):
            body.initializer.add().CopyFrom(tensor)
            body.initializer[-1].name = self.shown.get(tensor.name, tensor.name)
        for sparse in self.proto.graph.sparse_initializer:
            if self.place.get(sparse.values.name) == scope:
                body.sparse_initializer.add().CopyFrom(sparse)
                name = sparse.values.name
                body.sparse_initializer[-1].values.name = self.shown.get(name, name)
        while len(body.output) < len(results):
            body.output.add()
        for value, flat in zip(body.output, results, strict=True):
            self._retype(value, flat)
            source = self.aliases.get(flat, flat)
            value.name = self.shown.get(source, source)
            if flat not in self.aliases and value.name not in made:  # another tensor took its place
                name = fresh_name(f"{value.name}.out", self.taken)
                body.node.append(onnx.helper.make_node("Identity", [value.name], [name], name=name))
                value.name = name
        for value in body.input:
            self._retype(value, value.name)
            value.name = self.shown.get(value.name, value.name)
        stated = []
        for value in body.value_info:
            if self.scopes.of(value.name) != scope:
                stated.append(value)
            elif value.name in self.types or not value.HasField("type"):
                self._retype(value, value.name)
                value.name = self.shown.get(value.name, value.name)
                stated.append(value)
        copies = onnx.GraphProto()
        copies.value_info.extend(stated)
        del body.value_info[:]
        body.value_info.extend(copies.value_info)

    def _retype(self, value: onnx.ValueInfoProto, flat: str) -> None:
        """The type as the flat graph states it now; without extents where it states none any more."""
        if flat in self.types:
            value.type.CopyFrom(self.types[flat])
        elif value.HasField("type") and value.type.HasField("tensor_type"):
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()


def _bodies_of(node: onnx.NodeProto, scope: int) -> range:
    return range(scope, scope + len(_BODIES.get(node.op_type, ("body",))))


def _integer(node: onnx.NodeProto, name: str) -> int:
    return int(next(a.i for a in node.attribute if a.name == name))
