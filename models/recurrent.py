"""Small recurrent networks, one per form in which exporters write them.

Each function draws one network on a `Graph`, as in `topologies`; extents are odd and all different, so
that no two axes can be taken for one another. Sequences come as (steps, batch, 7) unless told.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
from onnx import ModelProto, TensorProto

from models.builder import Dim, Graph, Tensor

Result = Tensor | tuple[Tensor, ...]
Build = Callable[..., ModelProto]

RECURRENT: dict[str, Build] = {}
"""Networks by name; each can be built for any operator set it exists in: `RECURRENT["lstm"](opset=22)`."""

BATCH_FIRST: dict[str, Build] = {}
"""Networks with `layout` 1, which the operators define and onnxruntime's CPU provider lacks."""

FEATURES = 7
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(opset: int = 17, runnable: bool = True) -> Callable[[Callable[[Graph], Result]], Build]:
    """Register a drawing function under its own name."""

    def register(draw: Callable[[Graph], Result]) -> Build:
        name = draw.__name__

        def build(opset: int = opset) -> ModelProto:
            g = Graph(name, opset=opset, ir=8 if opset < 22 else 10, seed=zlib.crc32(name.encode()))
            result = draw(g)
            return g.model(*(result if isinstance(result, tuple) else (result,)))

        build.__name__ = build.__qualname__ = name
        build.__doc__ = draw.__doc__
        (RECURRENT if runnable else BATCH_FIRST)[name] = build
        return build

    return register


def _layer(
    g: Graph,
    op: str,
    x: Tensor,
    hidden: int,
    *,
    direction: str = "forward",
    bias: bool = True,
    lengths: Tensor | None = None,
    states: tuple[Tensor | None, ...] = (),
    peepholes: bool = False,
    weights: tuple[Tensor, Tensor] | None = None,
    **attributes: object,
) -> list[Tensor]:
    """A recurrent layer and its two or three outputs."""
    name = g.fresh(op.lower())
    count, rows = (2 if direction == "bidirectional" else 1), GATES[op] * hidden

    def store(part: str, *shape: int, scale: float = 1.0) -> Tensor:
        return g.store(f"{name}.{part}", g.normal(*shape, scale=scale))

    width = x.extent(2)
    operands: list[Tensor | None] = [x]
    operands += weights or (
        store("weight", count, rows, width, scale=width**-0.5),
        store("recurrence", count, rows, hidden, scale=hidden**-0.5),
    )
    operands.append(store("bias", count, 2 * rows, scale=0.5) if bias else None)
    operands += [lengths, *states, *[None] * (2 - len(states))]
    if peepholes:
        operands.append(store("peepholes", count, 3 * hidden, scale=0.5))
    while operands[-1] is None:
        operands.pop()
    outputs = 3 if op == "LSTM" else 2
    return g.ops(op, *operands, outputs=outputs, hidden_size=hidden, direction=direction, **attributes)


def _sequence(g: Graph, features: int = FEATURES) -> Tensor:
    return g.input("steps", "batch", features, name="sequence")


def _tokens(g: Graph, width: int = 9) -> Tensor:
    """The sequence behind a first projection, so that what the layer reads can be cut too."""
    return g.relu(g.matmul(_sequence(g), width))


def _last(g: Graph, state: Tensor) -> Tensor:
    """(1, batch, hidden) to (batch, 5)."""
    return g.gemm(g.squeeze(state, 0), 5)


def _both(g: Graph, y: Tensor) -> Tensor:
    """(steps, 2, batch, hidden) to (steps, batch, 2 hidden), as bidirectional layers are exported."""
    shape: tuple[Dim, ...] = (*y.shape[:1], *y.shape[2:3], 2 * y.extent(3))
    return g.reshape(g.transpose(y, 0, 2, 1, 3), 0, 0, -1, shape=shape)


def _dims(g: Graph, x: Tensor, axis: int) -> Tensor:
    """One extent of a tensor, read at run time, as an axis of its own."""
    extent = g.op("Gather", g.op("Shape", x), g.const(axis), axis=0)
    return g.unsqueeze(extent, 0)


# One layer


@recurrent()
def lstm(g: Graph) -> Result:
    """Each step of an LSTM behind a projection."""
    return g.matmul(g.squeeze(_layer(g, "LSTM", _tokens(g), 6)[0], 1), 5)


@recurrent()
def lstm_without_bias(g: Graph) -> Result:
    """Only weight and recurrence."""
    return g.matmul(g.squeeze(_layer(g, "LSTM", _tokens(g), 6, bias=False)[0], 1), 5)


@recurrent()
def lstm_reverse(g: Graph) -> Result:
    """From the last step to the first."""
    y = _layer(g, "LSTM", _tokens(g), 6, direction="reverse")[0]
    return g.matmul(g.squeeze(y, 1), 5)


@recurrent()
def lstm_peepholes(g: Graph) -> Result:
    """Peepholes, other activations, a clip, and one gate for input and forget."""
    y, *_ = _layer(
        g,
        "LSTM",
        _tokens(g),
        6,
        peepholes=True,
        activations=["HardSigmoid", "Softsign", "Tanh"],
        clip=3.0,
        input_forget=1,
    )
    return g.matmul(g.squeeze(y, 1), 5)


@recurrent()
def lstm_last_cell(g: Graph) -> Result:
    """The state and the cell behind the last step, side by side."""
    _, h, c = _layer(g, "LSTM", _tokens(g), 6)
    return g.gemm(g.squeeze(g.concat(h, c, axis=2), 0), 5)


@recurrent()
def gru(g: Graph) -> Result:
    """Reset before the recurrence."""
    return g.matmul(g.squeeze(_layer(g, "GRU", _tokens(g), 6)[0], 1), 5)


@recurrent()
def gru_linear_before_reset(g: Graph) -> Result:
    """Reset behind the recurrence, as PyTorch does."""
    return g.matmul(g.squeeze(_layer(g, "GRU", _tokens(g), 6, linear_before_reset=1)[0], 1), 5)


@recurrent()
def rnn(g: Graph) -> Result:
    """One gate, and an activation that does not saturate."""
    return _last(g, _layer(g, "RNN", _tokens(g), 6, activations=["Relu"])[1])


# Initial states


def _layer_with_states(g: Graph, *states: Tensor) -> Result:
    y = _layer(g, "LSTM", _tokens(g), 6, states=states)[0]
    return g.matmul(g.squeeze(y, 1), 5)


@recurrent()
def states_learned(g: Graph) -> Result:
    """The states begin with learned numbers, repeated for the batch at run time."""
    x = _tokens(g)
    ones = g.const([1])
    target = g.concat(ones, _dims(g, x, 1), ones, axis=0)
    states = [
        g.op("Expand", g.store(f"state_{i}", g.normal(1, 1, 6)), target, shape=(1, "batch", 6))
        for i in range(2)
    ]
    return g.matmul(g.squeeze(_layer(g, "LSTM", x, 6, states=tuple(states))[0], 1), 5)


@recurrent()
def states_filled(g: Graph) -> Result:
    """Zeros whose shape, hidden size and all, is put together from that of the input."""
    x = _tokens(g)
    target = g.concat(g.const([1]), _dims(g, x, 1), g.const([6]), axis=0)
    zeros = g.op("ConstantOfShape", target, shape=(1, "batch", 6), dtype=TensorProto.FLOAT)
    return g.matmul(g.squeeze(_layer(g, "LSTM", x, 6, states=(zeros, zeros))[0], 1), 5)


@recurrent()
def states_expanded(g: Graph) -> Result:
    """One zero, expanded to a shape that is computed, for two layers at once; each takes its slice."""
    x = _tokens(g)
    target = g.concat(g.const([2]), _dims(g, x, 1), g.const([6]), axis=0)
    zeros = g.op("Expand", g.const(0.25, np.float32), target, shape=(2, "batch", 6))
    for i in range(2):
        state = g.slice(zeros, [i], [i + 1], [0])
        x = g.squeeze(_layer(g, "GRU", x, 6, states=(state,))[0], 1)
    return g.matmul(x, 5)


@recurrent()
def state_is_interface(g: Graph) -> Result:
    """The states come in and go out of the graph: only what the layer reads can be cut."""
    h, c = (g.input(1, "batch", 6, name=name) for name in "hc")
    y, h, c = _layer(g, "LSTM", _tokens(g), 6, states=(h, c))
    return g.matmul(g.squeeze(y, 1), 5), h, c


@recurrent()
def states_stacked(g: Graph) -> Result:
    """The states of two layers come in as one tensor and are sliced out of it."""
    states = g.input(2, "batch", 6, name="states")
    x = _tokens(g)
    ends = []
    for i in range(2):
        y, end = _layer(g, "GRU", x, 6, states=(g.slice(states, [i], [i + 1], [0]),))
        ends.append(end)
        x = g.squeeze(y, 1)
    return g.matmul(x, 5), g.concat(*ends, axis=0)


# Both directions


@recurrent()
def bidirectional_stacked(g: Graph) -> Result:
    """Two bidirectional layers and a projection of every step."""
    y = _both(g, _layer(g, "LSTM", _tokens(g), 6, direction="bidirectional")[0])
    y = _both(g, _layer(g, "LSTM", y, 8, direction="bidirectional")[0])
    return g.gemm(g.reshape(y, -1, 16, shape=("rows", 16)), 5)


@recurrent()
def bidirectional_ends(g: Graph) -> Result:
    """The states of both directions behind the last step, taken apart and joined."""
    ends = _layer(g, "GRU", _tokens(g), 6, direction="bidirectional")[1]
    picked = [g.op("Gather", ends, g.const(i), axis=0) for i in (0, 1)]
    return g.gemm(g.concat(*picked), 5)


@recurrent()
def bidirectional_lengths(g: Graph) -> Result:
    """Packed sequences: their lengths are an input, held between one and the number of steps."""
    x = g.input("batch", "steps", FEATURES, name="sequence")
    x = g.transpose(g.relu(g.matmul(x, 9)), 1, 0, 2)
    given = g.input("batch", name="lengths", dtype=TensorProto.INT64)
    held = g.op("Max", g.op("Min", given, _dims(g, x, 0)), g.const([1]))
    lengths = g.op("Cast", held, to=TensorProto.INT32)
    y, *_ = _layer(g, "LSTM", x, 6, direction="bidirectional", lengths=lengths)
    return g.matmul(_both(g, y), 5)


@recurrent()
def bidirectional_summed(g: Graph) -> Result:
    """The outputs of both directions are added."""
    y, *_ = _layer(g, "GRU", _tokens(g), 6, direction="bidirectional")
    return g.matmul(g.reduce("ReduceSum", y, 1, keepdims=False), 5)


# In larger networks


@recurrent()
def batch_first(g: Graph) -> Result:
    """(batch, steps, features) turned around for the layer and back, and the last step picked."""
    x = g.input("batch", "steps", FEATURES, name="sequence")
    y = g.squeeze(_layer(g, "LSTM", g.transpose(g.relu(g.matmul(x, 9)), 1, 0, 2), 6)[0], 1)
    return g.gemm(g.op("Gather", g.transpose(y, 1, 0, 2), g.const(-1), axis=1), 5)


@recurrent()
def crnn(g: Graph) -> Result:
    """Text recognition: convolutions, columns as steps, two bidirectional layers, CTC scores."""
    x = g.input("batch", 3, 8, 16, name="image")
    x = g.max_pool(g.conv_bn(x, 10), 2)
    x = g.max_pool(g.conv_bn(x, 12), 2)
    x = g.transpose(g.reshape(x, 0, 24, 4), 2, 0, 1)
    x = _both(g, _layer(g, "LSTM", x, 6, direction="bidirectional")[0])
    x = _both(g, _layer(g, "LSTM", g.matmul(x, 9, bias=True), 6, direction="bidirectional")[0])
    return g.op("LogSoftmax", g.matmul(x, 5, bias=True), axis=2)


@recurrent()
def encoder_decoder(g: Graph) -> Result:
    """The states that the encoder ends with are those that the decoder begins with."""
    x = _sequence(g)
    _, h, c = _layer(g, "LSTM", g.relu(g.matmul(x, 9)), 6)
    y, *_ = _layer(g, "LSTM", g.relu(g.matmul(x, 8)), 6, states=(h, c))
    return g.matmul(g.squeeze(y, 1), 5)


@recurrent()
def residual(g: Graph) -> Result:
    """What the layer reads is added to what it makes: its hidden size is the width of the trunk."""
    x = g.matmul(_sequence(g), 6)
    for _ in range(2):
        x = g.add(x, g.squeeze(_layer(g, "LSTM", x, 6)[0], 1))
    return g.matmul(x, 5)


@recurrent()
def shared(g: Graph) -> Result:
    """One set of weights reads two sequences."""
    weights = (g.store("weight", g.normal(1, 24, 9, scale=0.3)), g.store("recurrence", g.normal(1, 24, 6)))
    x = _sequence(g)
    ends = [
        _layer(g, "LSTM", g.op(act, g.matmul(x, 9)), 6, weights=weights, bias=False)[1]
        for act in ("Relu", "Tanh")
    ]
    return _last(g, g.mul(*ends))


@recurrent()
def weights_reordered(g: Graph) -> Result:
    """Weights stored in another order of gates and put in place by the graph."""
    x = _tokens(g)
    stored = [
        g.store("weight", g.normal(24, 9, scale=0.3)),
        g.store("recurrence", g.normal(24, 6, scale=0.4)),
        g.store("bias_0", g.normal(24)),
        g.store("bias_1", g.normal(24)),
    ]
    turned = [
        g.concat(*(g.slice(w, [low], [high], [0]) for low, high in ((0, 6), (18, 24), (6, 18))), axis=0)
        for w in stored
    ]
    bias = g.unsqueeze(g.concat(*turned[2:], axis=0), 0)
    weight, recurrence = (g.unsqueeze(w, 0) for w in turned[:2])
    y, *_ = g.ops("LSTM", x, weight, recurrence, bias, outputs=3, hidden_size=6)
    return g.matmul(g.squeeze(y, 1), 5)


@recurrent()
def cell_written_out(g: Graph) -> Result:
    """Three steps of an LSTM cell as products, a split and activations, with the same weights each time."""
    x = g.input("batch", 3, FEATURES, name="sequence")
    weight = g.store("weight", g.normal(FEATURES, 24, scale=0.4))
    recurrence = g.store("recurrence", g.normal(6, 24, scale=0.4))
    bias = g.store("bias", g.normal(24, scale=0.5))
    h = c = None
    for step in range(3):
        y = g.op("MatMul", g.op("Gather", x, g.const(step), axis=1), weight)
        y = g.add(y, bias) if h is None else g.add(y, g.op("MatMul", h, recurrence), bias)
        gates = g.split(y, 4)
        i, f, o = (g.op("Sigmoid", gate) for gate in gates[:3])
        new = g.mul(i, g.op("Tanh", gates[3]))
        c = new if c is None else g.add(g.mul(f, c), new)
        h = g.mul(o, g.op("Tanh", c))
    assert h is not None
    return g.gemm(h, 5)


@recurrent()
def lstm_quantized(g: Graph) -> Result:
    """Weights of one byte, activations rounded as they come."""
    x = _tokens(g)

    def stored(part: str, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        values = g.rng.integers(-127, 128, shape, dtype=np.int8)
        scale = g.uniform(0.004, 0.006, 1)
        return (
            g.store(part, values),
            g.store(f"{part}_scale", scale),
            g.store(f"{part}_zero_point", np.zeros(1, np.int8)),
        )

    weight, *w = stored("weight", 1, 9, 24)
    recurrence, *r = stored("recurrence", 1, 6, 24)
    bias = g.store("bias", g.normal(1, 48))
    y = g.op(
        "DynamicQuantizeLSTM",
        *(x, weight, recurrence, bias, None, None, None, None, *w, *r),
        domain="com.microsoft",
        shape=("steps", 1, "batch", 6),
        hidden_size=6,
    )
    return g.matmul(g.squeeze(y, 1), 5)


# Batch first in the operator itself


@recurrent(runnable=False)
def lstm_layout(g: Graph) -> Result:
    """Sequences, states and outputs of an LSTM with the batch in front."""
    x = g.relu(g.matmul(g.input("batch", "steps", FEATURES, name="sequence"), 9))
    ones = g.const([1])
    target = g.concat(_dims(g, x, 0), ones, ones, axis=0)
    state = g.op("Expand", g.store("state", g.normal(1, 2, 6)), target, shape=("batch", 2, 6))
    y, *_ = _layer(g, "LSTM", x, 6, direction="bidirectional", states=(state, state), layout=1)
    return g.matmul(y, 5)


@recurrent(runnable=False)
def gru_layout(g: Graph) -> Result:
    """The same for a GRU and its last state."""
    x = g.relu(g.matmul(g.input("batch", "steps", FEATURES, name="sequence"), 9))
    return g.matmul(_layer(g, "GRU", x, 6, direction="reverse", layout=1)[1], 5)
