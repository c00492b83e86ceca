"""Recurrent layers: the hidden state is made by the node and read by its own recurrence."""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxprune.ops.spec import Array, NodeView, Pattern, Rule, Sample, label, op, parse, pins

_LENGTHS = np.array([4, 2, 3], dtype=np.int32)


def _recurrent(node: NodeView, gates: int, cell: bool = False, transposed: bool = False) -> Rule:
    """The rule of them all: per direction and gate a matrix for the input and one for the state.

    `h` is the state that comes out, `k` the same state where the recurrence reads it.
    """
    if node.attr("layout", 0):
        x, y, state = "b s x", "b s d h", "b d h"
    else:
        x, y, state = "s b x", "s d b h", "d b h"
    weights = "d x (t h), d k (t h)" if transposed else "d (t h) x, d (t h) k"
    cells = (f", {state}, d (p h)", f", {state}") if cell else ("", "")
    inputs, outputs = parse(f"{x}, {weights}, d (two t h), b, {state}{cells[0]} -> {y}, {state}{cells[1]}")
    given = tuple(pattern if node.has(i) else None for i, pattern in enumerate(inputs))
    held = {name for pattern in given for terms in pattern or () for term in terms for name in term}
    sizes = {"t": gates, "two": 2, "p": 3}
    return Rule(
        given,
        outputs,
        sizes={name: size for name, size in sizes.items() if name in held},
        attributes={"hidden_size": "h"} if "hidden_size" in node.attributes else {},
        tied={"k": "h"},
        pinned=pins(("s",), "each step follows from the one before")
        | pins(("d",), "directions of the recurrence")
        | pins(("t", "two", "p"), "gates of the recurrence"),
        macs=(("s", "b", "d", "t", "h", "x"), ("s", "b", "d", "t", "h", "k")),
    )


@op(
    "LSTM",
    samples=[
        Sample(((4, 3, 5), (1, 24, 5), (1, 24, 6)), {"hidden_size": 6}, outputs=3),
        Sample(
            ((4, 3, 5), (2, 24, 5), (2, 24, 6), (2, 48), _LENGTHS, (2, 3, 6), (2, 3, 6), (2, 18)),
            {"hidden_size": 6, "direction": "bidirectional"},
            opset=22,
            outputs=3,
        ),
        Sample(
            ((4, 3, 5), (1, 24, 5), (1, 24, 6), (1, 48), None, (1, 3, 6), (1, 3, 6)),
            {
                "hidden_size": 6,
                "direction": "reverse",
                "activations": ["HardSigmoid", "Relu", "Softsign"],
                "clip": 0.7,
                "input_forget": 1,
            },
            opset=7,
        ),
    ],
)
def lstm(node: NodeView) -> Rule:
    return _recurrent(node, 4, cell=True)


@op(
    "GRU",
    samples=[
        Sample(((4, 3, 5), (1, 18, 5), (1, 18, 6)), {"hidden_size": 6}, outputs=2),
        Sample(
            ((4, 3, 5), (2, 18, 5), (2, 18, 6), (2, 36), _LENGTHS, (2, 3, 6)),
            {"hidden_size": 6, "direction": "bidirectional", "linear_before_reset": 1},
            opset=22,
            outputs=2,
        ),
        Sample(
            ((4, 3, 5), (1, 18, 5), (1, 18, 6), (1, 36), None, (1, 3, 6)),
            {"hidden_size": 6, "direction": "reverse"},
            opset=7,
            outputs=2,
        ),
    ],
)
def gru(node: NodeView) -> Rule:
    return _recurrent(node, 3)


@op(
    "RNN",
    samples=[
        Sample(((4, 3, 5), (1, 6, 5), (1, 6, 6)), {"hidden_size": 6}, outputs=2),
        Sample(
            ((4, 3, 5), (2, 6, 5), (2, 6, 6), (2, 12), _LENGTHS, (2, 3, 6)),
            {"hidden_size": 6, "direction": "bidirectional", "activations": ["Relu", "Sigmoid"]},
            opset=14,
            outputs=2,
        ),
    ],
)
def rnn(node: NodeView) -> Rule:
    return _recurrent(node, 1)


def _alternating(*shape: int) -> Array:
    """Both ends of a range in every row and column: the range of a part is that of the whole."""
    return np.where(np.arange(np.prod(shape)) * 5 % 7 % 2, 1.0, -1.0).astype(np.float32).reshape(shape)


def _bytes(*shape: int, signed: bool = False) -> Array:
    values = np.arange(np.prod(shape)) * 37 % 251
    return (values - 125).astype(np.int8).reshape(shape) if signed else values.astype(np.uint8).reshape(shape)


@op(
    "DynamicQuantizeLSTM",
    domain="com.microsoft",
    since=1,
    samples=[  # of one step: the range of a state that is made decides how it is rounded in the next
        Sample(
            (
                _alternating(1, 4, 6),
                *(_bytes(1, 6, 24, signed=True) for _ in "wr"),
                (1, 48),
                None,
                _alternating(1, 4, 6),
                *(None, None),
                *(np.full(1, 0.01, np.float32), np.zeros(1, np.int8)) * 2,
            ),
            {"hidden_size": 6},
            outputs=3,
        ),
        Sample(
            (
                _alternating(1, 4, 6),
                *(_bytes(2, 6, 24) for _ in "wr"),
                (2, 48),
                None,
                *(_alternating(2, 4, 6) for _ in "hc"),
                (2, 18),
                *(
                    np.linspace(0.005, 0.01, 48, dtype=np.float32).reshape(2, 24),
                    np.full((2, 24), 128, np.uint8),
                )
                * 2,
            ),
            {"hidden_size": 6, "direction": "bidirectional"},
            outputs=3,
        ),
    ],
)
def dynamic_quantize_lstm(node: NodeView) -> Rule:
    rule = _recurrent(node, 4, cell=True, transposed=True)
    rows: Pattern = (label("d"), (("t", "h"),))
    parameters = tuple(rows[: node.rank(i)] if node.has(i) else None for i in range(8, 12))
    return dataclasses.replace(rule, inputs=(*rule.inputs, *parameters), zero={1: 9, 2: 11})
