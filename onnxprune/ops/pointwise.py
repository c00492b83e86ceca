"""Elementwise operators: every axis passes through, broadcasting as in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from onnxprune.ops.spec import (
    Array,
    Evaluate,
    NodeView,
    Pinned,
    Rule,
    Sample,
    Unknown,
    broadcast,
    names,
    op,
    parse,
)

_UNARY = """
Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
HardSwish IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Identity Cast
""".split()
_NARY = """
Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max
Mean Min Mod Mul Or PRelu Pow Sub Sum Where Xor
""".split()


def _divide(a: Any, b: Any) -> Any:
    if np.issubdtype(np.result_type(a, b), np.integer):  # ONNX truncates, numpy floors
        return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(np.result_type(a, b))
    return a / b


_NUMPY: dict[str, Callable[..., Any]] = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "Ceil": np.ceil,
    "Div": _divide,
    "Equal": np.equal,
    "Floor": np.floor,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Identity": np.asarray,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Pow": np.power,
    "Reciprocal": np.reciprocal,
    "Round": np.round,
    "Sign": np.sign,
    "Sqrt": np.sqrt,
    "Sub": np.subtract,
    "Where": np.where,
    "Xor": np.logical_xor,
}
_FOLDED: dict[str, Callable[..., Any]] = {"Max": np.maximum, "Min": np.minimum, "Sum": np.add}


def _evaluator(name: str) -> Evaluate | None:
    if name in _NUMPY:
        return lambda node, inputs: [np.asarray(_NUMPY[name](*inputs))]
    if name in _FOLDED:
        return lambda node, inputs: [_fold(_FOLDED[name], inputs)]
    if name == "Mod":
        return _mod
    return _cast if name == "Cast" else None


def _fold(function: Callable[..., Any], inputs: Sequence[Array | None]) -> Array:
    result = inputs[0]
    for other in inputs[1:]:
        result = function(result, other)
    return np.asarray(result)


def _mod(node: NodeView, inputs: Sequence[Array | None]) -> list[Array]:
    function = np.fmod if node.attr("fmod", 0) else np.mod
    return [np.asarray(function(inputs[0], inputs[1]))]  # type: ignore[arg-type]


def _cast(node: NodeView, inputs: Sequence[Array | None]) -> list[Array]:
    target = int(node.attr("to"))
    if target == onnx.TensorProto.BFLOAT16:
        return [np.asarray(inputs[0]).astype(ml_dtypes.bfloat16)]
    try:
        return [np.asarray(inputs[0]).astype(onnx.helper.tensor_dtype_to_np_dtype(target))]
    except KeyError:
        raise Unknown(f"there is no element type {target}") from None


def unary(node: NodeView) -> Rule:
    text = " ".join(names("a", node.rank()))
    inputs, outputs = parse(f"{text} -> {text}")
    return Rule(inputs, outputs)


def nary(node: NodeView) -> Rule:
    inputs, output = broadcast(node.shapes, node.out_shape())
    adds = tuple(range(len(inputs))) if node.op in ("Add", "Sum") else ()
    return Rule(inputs, (output,), adds=adds)


_FLAGS = np.array([[True, False, True], [False, False, True]])
_COUNTS = np.array([[1, 2, 3], [4, 5, 6]])
_LIMITS = np.array([[1, np.inf, np.nan], [-np.inf, np.nan, 0]], dtype=np.float32)
_MASKS = [Sample((_FLAGS, _FLAGS[1])), Sample((_FLAGS[:, :1], _FLAGS))]
_BITS = [Sample((_COUNTS, np.array([6, 5, 3])), opset=18)]
_SAMPLES = {
    "And": _MASKS,
    "BitShift": [Sample((_COUNTS.astype(np.uint8), np.array([1, 0, 2], np.uint8)), {"direction": "LEFT"})],
    "BitwiseAnd": _BITS,
    "BitwiseNot": [Sample((_COUNTS,), opset=18)],
    "BitwiseOr": _BITS,
    "BitwiseXor": _BITS,
    "Cast": [Sample(((2, 3),), {"to": onnx.TensorProto.DOUBLE})],
    "Equal": [Sample((_COUNTS, np.array([1, 0, 6]))), Sample((_COUNTS[:, :1], _COUNTS))],
    "IsInf": [Sample((_LIMITS,)), Sample((_LIMITS,), {"detect_negative": 0})],
    "IsNaN": [Sample((_LIMITS,))],
    "Mod": [Sample(((2, 3), (3,)), {"fmod": 1}), Sample((_COUNTS, np.array([2, -3, 4])))],
    "Not": [Sample((_FLAGS,))],
    "Or": _MASKS,
    "PRelu": [Sample(((2, 3, 4), (3, 1))), Sample(((2, 3, 4), (1,)))],
    "Where": [Sample((_FLAGS, (2, 3), (3,))), Sample((_FLAGS[:, :1], (3,), ()))],
    "Xor": _MASKS,
}
_SINCE = {"Gelu": 20, "HardSwish": 14, "Mish": 18, "Swish": 24}

for _name in _UNARY:
    _default = [Sample(((2, 3, 4),), opset=max(17, _SINCE.get(_name, 0)))]
    op(_name, since=1, samples=_SAMPLES.get(_name, _default), evaluate=_evaluator(_name))(unary)
for _name in _NARY:
    _default = [Sample(((2, 3, 4), (3, 1))), Sample(((4,), (2, 3, 4)))]
    op(_name, samples=_SAMPLES.get(_name, _default), evaluate=_evaluator(_name))(nary)


@op(
    "Clip",
    since=1,
    samples=[
        Sample(((2, 3),), {"min": -0.5, "max": 0.5}, opset=7),
        Sample(((2, 3), np.array(-0.5, np.float32), np.array(0.5, np.float32))),
        Sample(((2, 3), None, np.array([0.5], np.float32))),
    ],
    evaluate=lambda node, inputs: [np.clip(*_clip_operands(node, inputs))],
)
def clip(node: NodeView) -> Rule:
    rule = unary(node)
    return Rule((*rule.inputs, None, None), rule.outputs)


def _clip_operands(node: NodeView, inputs: Sequence[Array | None]) -> tuple[Any, Any, Any]:
    limits = [*inputs[1:], None, None] if node.opset >= 11 else [node.attr("min"), node.attr("max")]
    return inputs[0], limits[0], limits[1]


@op(
    "Dropout",
    since=7,
    samples=[
        Sample(((2, 3),), opset=12),
        Sample(((2, 3), np.array(0.5, np.float32), np.array(False)), outputs=2),
        Sample(((2, 3),), {"ratio": 0.5}, opset=10),
    ],
)
def dropout(node: NodeView) -> Rule | Pinned:
    if node.has(2):
        try:
            training = bool(np.any(node.value(2)))
        except Unknown:
            training = True
        if training:
            return Pinned("it may drop at random (training mode)")
    rule = unary(node)
    return Rule((*rule.inputs, None, None), (*rule.outputs, *rule.outputs))


@op("CastLike", since=15, samples=[Sample(((2, 3), (1,)))])
def cast_like(node: NodeView) -> Rule:
    rule = unary(node)
    return Rule((*rule.inputs, None), rule.outputs)
