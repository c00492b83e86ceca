"""Small networks with bodies: If, Loop and Scan in the forms in which exporters write them, and local functions.

Each function draws one network on a `Graph`, as in `topologies`; extents are odd and mostly different, so
that no two axes can be taken for one another. What decides which way a network takes is an input `flag`,
a comparison of an input, or a shape.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from models.builder import Dim, Graph, Tensor

Result = Tensor | tuple[Tensor, ...]
Build = Callable[..., onnx.ModelProto]

CONTROL_FLOW: dict[str, Build] = {}
"""Networks by name; each can be built for any operator set it exists in: `CONTROL_FLOW["loop_gru"](opset=13)`."""

UNKNOWN: dict[str, Build] = {}
"""Networks with an operator that onnxruntime lacks."""

FEATURES, STEPS = 7, 5
FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def control_flow(opset: int = 17, runnable: bool = True) -> Callable[[Callable[[Graph], Result]], Build]:
    """Register a drawing function under its own name."""

    def register(draw: Callable[[Graph], Result]) -> Build:
        name = draw.__name__

        def build(opset: int = opset) -> onnx.ModelProto:
            g = Graph(name, opset=opset, seed=zlib.crc32(name.encode()))
            result = draw(g)
            return g.model(*(result if isinstance(result, tuple) else (result,)))

        build.__name__ = build.__qualname__ = name
        build.__doc__ = draw.__doc__
        (CONTROL_FLOW if runnable else UNKNOWN)[name] = build
        return build

    return register


def _vector(g: Graph) -> Tensor:
    return g.input("batch", FEATURES, name="x")


def _sequence(g: Graph) -> Tensor:
    return g.input(STEPS, "batch", FEATURES, name="x")


def _flag(g: Graph) -> Tensor:
    return g.input(name="flag", dtype=BOOL)


def _held(
    g: Graph, op: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], **bodies: Any
) -> None:
    """Add a node with bodies."""
    operands = ["" if tensor is None else tensor.name for tensor in inputs]
    node = helper.make_node(
        op, operands, [tensor.name for tensor in outputs], name=g.fresh(op.lower()), **bodies
    )
    g.nodes.append(node)


def _if(g: Graph, flag: Tensor, yes: onnx.GraphProto, no: onnx.GraphProto, *shape: Dim) -> Tensor:
    result = Tensor(g.fresh("chosen"), shape)
    _held(g, "If", [flag], [result], then_branch=yes, else_branch=no)
    return result


def _mlp(g: Graph, x: Tensor, width: int, cout: int) -> Tensor:
    return g.gemm(g.relu(g.gemm(x, width)), cout)


def _matmul(g: Graph, x: Tensor, weight: Tensor) -> Tensor:
    return g.op("MatMul", x, weight)


@control_flow()
def if_weights_inside(g: Graph) -> Result:
    """Two branches with layers of their own, of different widths inside."""
    x, flag = _vector(g), _flag(g)
    h = g.relu(g.gemm(x, 23))
    yes, no = g.subgraph(), g.subgraph()
    y = _if(g, flag, yes.graph(_mlp(yes, h, 19, 11)), no.graph(_mlp(no, h, 17, 11)), "batch", 11)
    return g.gemm(g.relu(y), 5)


@control_flow()
def if_weights_in_constants(g: Graph) -> Result:
    """The same with the weights in Constant nodes of the branches."""
    x, flag = _vector(g), _flag(g)
    yes, no = g.subgraph(), g.subgraph()
    yes.storage = no.storage = "constant"
    h = g.relu(g.gemm(x, 23))
    y = _if(g, flag, yes.graph(_mlp(yes, h, 19, 11)), no.graph(_mlp(no, h, 17, 11)), "batch", 11)
    return g.gemm(g.relu(y), 5)


@control_flow()
def if_weights_captured(g: Graph) -> Result:
    """Branches that read the same matrices and the same vector of the outer graph."""
    x, flag = _vector(g), _flag(g)
    first = g.store("first.weight", g.he(FEATURES, 13, fan_in=FEATURES))
    second = g.store("second.weight", g.he(13, 11, fan_in=13))
    third = g.store("third.weight", g.he(13, 11, fan_in=13))
    vector = g.store("vector", g.normal(13))
    bodies = []
    for last in (second, third):
        body = g.subgraph()
        h = body.relu(body.add(_matmul(body, x, first), vector))
        bodies.append(body.graph(_matmul(body, h, last)))
    return g.gemm(g.relu(_if(g, flag, bodies[0], bodies[1], "batch", 11)), 5)


@control_flow()
def if_vector_of_two_layers(g: Graph) -> Result:
    """A vector that one branch adds to one layer and the other branch to another."""
    x, flag = _vector(g), _flag(g)
    vector = g.store("vector", g.normal(13))
    bodies = []
    for _ in range(2):
        body = g.subgraph()
        weight = body.store(body.fresh("matrix"), body.he(FEATURES, 13, fan_in=FEATURES))
        bodies.append(body.graph(body.gemm(body.relu(body.add(_matmul(body, x, weight), vector)), 11)))
    return g.gemm(g.relu(_if(g, flag, bodies[0], bodies[1], "batch", 11)), 5)


@control_flow()
def if_compared(g: Graph) -> Result:
    """A branch for each of two sampling rates."""
    x, rate = _vector(g), g.input(name="rate", dtype=INT)
    flag = g.op("Equal", rate, g.const(16000), dtype=BOOL, shape=())
    yes, no = g.subgraph(), g.subgraph()
    return _if(g, flag, yes.graph(_mlp(yes, x, 19, 11)), no.graph(_mlp(no, x, 17, 11)), "batch", 11)


@control_flow()
def if_nested(g: Graph) -> Result:
    """An If in a branch of an If; all three ways end in the same axis."""
    x, flag, other = _vector(g), _flag(g), g.input(name="other", dtype=BOOL)
    yes, no = g.subgraph(), g.subgraph()
    h = no.relu(no.gemm(x, 23))
    inner_yes, inner_no = no.subgraph(), no.subgraph()
    inner = _if(
        no,
        other,
        inner_yes.graph(_mlp(inner_yes, h, 19, 11)),
        inner_no.graph(inner_no.gemm(h, 11)),
        "batch",
        11,
    )
    y = _if(g, flag, yes.graph(_mlp(yes, x, 17, 11)), no.graph(no.relu(inner)), "batch", 11)
    return g.gemm(y, 5)


@control_flow()
def if_branches_disagree(g: Graph) -> Result:
    """Branches that give different numbers of channels, which a maximum takes in."""
    x, flag = _vector(g), _flag(g)
    yes, no = g.subgraph(), g.subgraph()
    y = _if(g, flag, yes.graph(_mlp(yes, x, 13, 23)), no.graph(_mlp(no, x, 13, 29)), "batch", "wide")
    y = g.op("ReduceMax", y, axes=[1], keepdims=1, shape=("batch", 1))
    return g.mul(g.gemm(x, 5), y)


@control_flow()
def if_gives_a_weight(g: Graph) -> Result:
    """A branch without nodes: its output is a weight of its own."""
    x, flag = _vector(g), _flag(g)
    yes, no = g.subgraph(), g.subgraph()
    stored = yes.store("stored", yes.normal(13))
    other = no.op("Neg", no.store("other", no.normal(13)))
    scale = _if(g, flag, yes.graph(stored), no.graph(other), 13)
    return g.gemm(g.mul(g.relu(g.gemm(x, 13)), scale), 5)


@control_flow()
def if_by_shape(g: Graph) -> Result:
    """What exporters make of a squeeze: a branch that never runs, with another rank."""
    x = g.input("batch", FEATURES, 1, name="x")
    h = g.relu(g.conv(x, 13, 1))
    extent = g.op("Gather", g.op("Shape", h, dtype=INT), g.const(2), axis=0)
    flag = g.op("Equal", extent, g.const(1), dtype=BOOL, shape=())
    yes, no = g.subgraph(), g.subgraph()
    squeezed = yes.op("Squeeze", h, yes.const([2]), shape=("batch", 13))
    y = _if(g, flag, yes.graph(squeezed), no.graph(no.op("Identity", h)), "batch", 13)
    return g.gemm(y, 5)


def _cell(body: Graph, x: Tensor, h: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """A gated recurrent unit, gate by gate."""
    gates = []
    for i in range(0, 4, 2):
        summed = body.add(_matmul(body, x, weights[i]), _matmul(body, h, weights[i + 1]))
        gates.append(body.op("Sigmoid", summed))
    reset = body.mul(gates[1], h)
    new = body.op("Tanh", body.add(_matmul(body, x, weights[4]), _matmul(body, reset, weights[5])))
    kept = body.mul(gates[0], h)
    left = body.op("Sub", body.const(1.0, np.float32), gates[0], shape=gates[0].shape)
    return body.add(kept, body.mul(left, new))


def _gates(g: Graph, hidden: int) -> list[Tensor]:
    return [
        g.store(f"{part}.{gate}", g.he(rows, hidden, fan_in=rows))
        for gate in ("update", "reset", "new")
        for part, rows in (("input", FEATURES), ("state", hidden))
    ]


def _loop(
    g: Graph, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], body: onnx.GraphProto
) -> None:
    _held(g, "Loop", inputs, outputs, body=body)


def _loop_body(g: Graph, *carried: tuple[Dim, ...]) -> tuple[Graph, Tensor, Tensor, list[Tensor]]:
    body = g.subgraph()
    step = body.input(name=body.fresh("step"), dtype=INT)
    going = body.input(name=body.fresh("going"), dtype=BOOL)
    return body, step, going, [body.input(*shape, name=body.fresh("carried")) for shape in carried]


def _zeros(g: Graph, x: Tensor, axis: int, hidden: int) -> Tensor:
    """A first state of zeros, as many as the batch has."""
    batch = g.op("Gather", g.op("Shape", x, dtype=INT), g.const([axis]), axis=0)
    shape = g.op("Concat", batch, g.const([hidden]), axis=0)
    return g.op("ConstantOfShape", shape, shape=("batch", hidden), dtype=FLOAT)


@control_flow()
def loop_gru(g: Graph) -> Result:
    """A loop that carries the state of a GRU whose weights lie outside."""
    x = _sequence(g)
    weights = _gates(g, 13)
    body, step, going, (h,) = _loop_body(g, ("batch", 13))
    slice_ = body.op("Gather", x, step, axis=0, shape=("batch", FEATURES))
    new = _cell(body, slice_, h, weights)
    last = Tensor(g.fresh("last"), ("batch", 13))
    _loop(g, [g.const(STEPS), None, _zeros(g, x, 1, 13)], [last], body.graph(body.op("Identity", going), new))
    return g.gemm(last, 3)


@control_flow()
def loop_scan_outputs(g: Graph) -> Result:
    """A loop with weights inside that gives its state after every step, too."""
    x = g.input(STEPS, 3, FEATURES, name="x")
    start = g.store("start", g.normal(3, 13))
    body, step, going, (h,) = _loop_body(g, (3, 13))
    slice_ = body.op("Gather", x, step, axis=0, shape=(3, FEATURES))
    new = _cell(body, slice_, h, _gates(body, 13))
    wide = body.relu(body.gemm(new, 17))
    last, steps = Tensor(g.fresh("last"), (3, 13)), Tensor(g.fresh("steps"), (STEPS, 3, 17))
    results = body.graph(body.op("Identity", going), new, wide)
    _loop(g, [g.const(STEPS), g.const(True, np.bool_), start], [last, steps], results)
    matrix = g.store("head", g.he(17, 3, fan_in=17))
    return g.gemm(last, 3), g.op("MatMul", steps, matrix)


@control_flow()
def loop_until(g: Graph) -> Result:
    """A loop without a count that ends when a number is small."""
    x = _vector(g)
    h = g.relu(g.gemm(x, 13))
    body, _, _, (carried, size) = _loop_body(g, ("batch", 13), ())
    square = body.store("square", body.he(13, 13, fan_in=13))
    new = body.op("Tanh", _matmul(body, carried, square))
    smaller = body.mul(size, body.const(0.5, np.float32))
    going = body.op("Greater", smaller, body.const(0.1, np.float32), dtype=BOOL, shape=())
    last, rest = Tensor(g.fresh("last"), ("batch", 13)), Tensor(g.fresh("rest"), ())
    first = [None, g.const(True, np.bool_), h, g.const(1.0, np.float32)]
    _loop(g, first, [last, rest], body.graph(going, new, smaller))
    return g.gemm(last, 3)


@control_flow()
def loop_growing(g: Graph) -> Result:
    """A loop whose state grows: nothing in it can be followed by looking at one iteration."""
    x = _vector(g)
    h = g.relu(g.gemm(x, 13))
    body, _, going, (carried,) = _loop_body(g, ("batch", "grown"))
    more = body.op("Concat", carried, body.gemm(x, 11), axis=1, shape=("batch", "grown"))
    last = Tensor(g.fresh("last"), ("batch", "grown"))
    _loop(g, [g.const(3), None, h], [last], body.graph(body.op("Identity", going), more))
    summed = g.op("ReduceMax", last, axes=[1], keepdims=1, shape=("batch", 1))
    return g.mul(_mlp(g, x, 19, 5), summed)


def _scan(
    g: Graph, inputs: Sequence[Tensor], outputs: Sequence[Tensor], body: onnx.GraphProto, **axes: Any
) -> None:
    _held(g, "Scan", inputs, outputs, body=body, num_scan_inputs=1, **axes)


@control_flow()
def scan_rnn(g: Graph) -> Result:
    """A Scan over a sequence: a plain recurrent cell with its weights inside."""
    x = _sequence(g)
    body = g.subgraph()
    h, slice_ = body.input("batch", 13, name="before"), body.input("batch", FEATURES, name="now")
    weights = [body.store(f"cell.{n}", body.he(n, 13, fan_in=n)) for n in (FEATURES, 13)]
    new = body.op("Tanh", body.add(_matmul(body, slice_, weights[0]), _matmul(body, h, weights[1])))
    wide = body.relu(body.gemm(new, 17))
    last, steps = Tensor(g.fresh("last"), ("batch", 13)), Tensor(g.fresh("steps"), (STEPS, "batch", 17))
    _scan(g, [_zeros(g, x, 1, 13), x], [last, steps], body.graph(new, wide))
    return g.gemm(last, 3), g.op("MatMul", steps, g.store("head", g.he(17, 3, fan_in=17)))


@control_flow()
def scan_backwards(g: Graph) -> Result:
    """A Scan from the end along another axis, of channels that are cut."""
    x = g.input("batch", FEATURES, STEPS, name="x")
    wide = g.relu(g.conv(x, 11))
    body = g.subgraph()
    h, slice_ = body.input("batch", 13, name="before"), body.input("batch", 11, name="now")
    weights = [body.store(f"cell.{n}", body.he(n, 13, fan_in=n)) for n in (11, 13)]
    new = body.op("Tanh", body.add(_matmul(body, slice_, weights[0]), _matmul(body, h, weights[1])))
    last, steps = Tensor(g.fresh("last"), ("batch", 13)), Tensor(g.fresh("steps"), ("batch", 13, STEPS))
    both = body.graph(new, body.op("Identity", new))
    axes: dict[str, Any] = {
        "scan_input_axes": [2],
        "scan_input_directions": [1],
        "scan_output_axes": [-1],
        "scan_output_directions": [1],
    }
    _scan(g, [_zeros(g, x, 0, 13), wide], [last, steps], both, **axes)
    return g.gemm(last, 3), g.conv(steps, 3, 1)


@control_flow()
def loop_in_branch(g: Graph) -> Result:
    """A loop inside a branch, which reads weights of the branch and of the graph."""
    x, flag = _vector(g), _flag(g)
    h = g.relu(g.gemm(x, 13))
    yes, no = g.subgraph(), g.subgraph()
    square = yes.store("square", yes.he(13, 13, fan_in=13))
    body, _, going, (carried,) = _loop_body(yes, ("batch", 13))
    new = body.op("Tanh", body.add(_matmul(body, carried, square), h))
    last = Tensor(yes.fresh("last"), ("batch", 13))
    _loop(yes, [yes.const(3), None, h], [last], body.graph(body.op("Identity", going), new))
    y = _if(g, flag, yes.graph(yes.relu(last)), no.graph(no.op("Neg", h)), "batch", 13)
    return g.gemm(y, 3)


@control_flow(runnable=False)
def unknown_in_branch(g: Graph) -> Result:
    """An operator without a declaration in a branch, between two layers."""
    x, flag = _vector(g), _flag(g)
    yes, no = g.subgraph(), g.subgraph()
    h = yes.gemm(yes.op("Frobnicate", yes.gemm(x, 13), domain="acme", shape=("batch", 13)), 11)
    g._domains.add("acme")
    return g.gemm(_if(g, flag, yes.graph(h), no.graph(_mlp(no, x, 17, 11)), "batch", 11), 5)


# ------------------------------------------------------------------------------------------ local functions


def local_functions(opset: int = 17) -> onnx.ModelProto:
    """Layers as functions of two domains, one of which calls the other; and a function that nothing calls."""
    g = Graph("local_functions", opset=opset, seed=5)
    x = _vector(g)
    h = g.op("Block", x, *_layer(g, FEATURES, 13), domain="blocks", slope=0.25, shape=("batch", 13))
    h = g.op("Block", h, *_layer(g, 13, 11), domain="blocks", slope=0.5, shape=("batch", 11))
    proto = g.model(g.gemm(h, 5))
    plain, layers = helper.make_opsetid("", opset), helper.make_opsetid("layers", 1)
    linear = helper.make_function(
        "layers",
        "Linear",
        ["input", "matrix", "vector"],
        ["result"],
        [
            helper.make_node("MatMul", ["input", "matrix"], ["product"], name="product"),
            helper.make_node("Add", ["product", "vector"], ["result"], name="sum"),
        ],
        [plain],
    )
    leaky = helper.make_node("LeakyRelu", ["inner"], ["outer"], name="activation")
    reference = leaky.attribute.add(name="alpha", ref_attr_name="slope")
    reference.type = onnx.AttributeProto.FLOAT
    block = helper.make_function(
        "blocks",
        "Block",
        ["value", "matrix", "vector"],
        ["outer"],
        [
            helper.make_node(
                "Linear", ["value", "matrix", "vector"], ["inner"], domain="layers", name="linear"
            ),
            leaky,
        ],
        [plain, layers],
        ["slope"],
    )
    unused = helper.make_function(
        "layers", "Unused", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [plain]
    )
    proto.functions.extend([linear, block, unused])
    proto.opset_import.append(layers)
    return proto


def _layer(g: Graph, width: int, cout: int) -> tuple[Tensor, Tensor]:
    name = g.fresh("layer")
    return (
        g.store(f"{name}.matrix", g.he(width, cout, fan_in=width)),
        g.store(f"{name}.vector", g.normal(cout, scale=0.1)),
    )
