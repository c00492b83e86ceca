"""What quantised operators compute in real numbers, written in plain operators.

A form gets the node as `Quantised` and emits nodes. Integers appear as floats that are not rounded, counted
from their zero point; weights keep the values that are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from onnxprune.ops.spec import Array


class Real(NamedTuple):
    """A tensor of floats; `zero` is the zero point if it stands for integers that count from one."""

    name: str
    zero: Array | None = None


class Quantised(Protocol):
    """A quantised node and the graph that its form is written to."""

    @property
    def rank(self) -> int:
        """Of the first output."""

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute of the node."""

    def has(self, i: int) -> bool:
        """Whether operand i is given."""

    def operand(self, i: int) -> str:
        """Operand i as it is."""

    def floats(self, i: int) -> str:
        """Operand i, cast to float."""

    def integers(self, i: int) -> Real:
        """Operand i, integers, whatever zero point they count from."""

    def counted(self, i: int, zero: int | None = None, shape: tuple[int, ...] = ()) -> str:
        """Operand i, integers, as floats from the zero point in operand `zero` (of that shape if a vector)."""

    def zero(self, i: int | None = None) -> Array:
        """The zero point in operand i; 0 without one."""

    def scale(self, i: int, shape: tuple[int, ...] = ()) -> str:
        """The scale in operand i (of that shape if a vector)."""

    def emit(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node; the name of its output. Attributes that are None are left out."""


Form = Callable[[Quantised], Real]
_MICROSOFT = "com.microsoft"


def _same(q: Quantised, *names: str) -> dict[str, Any]:
    return {name: q.attr(name) for name in names}


def _channels_last(q: Quantised, op: str, x: str, *others: str, **attributes: Any) -> str:
    """A node of a layout with channels first, between transpositions if the quantised one has them last."""
    if not (q.attr("channels_last", 0) or op == "MaxPool"):
        return q.emit(op, x, *others, **attributes)
    space = range(1, q.rank - 1)
    x = q.emit("Transpose", x, perm=[0, q.rank - 1, *space])
    y = q.emit(op, x, *others, **attributes)
    return q.emit("Transpose", y, perm=[0, *(i + 1 for i in space), 1])


_WINDOW = ("kernel_shape", "pads", "strides", "auto_pad")


def _convolution(q: Quantised, x: str, weight: int, zero: int, bias: tuple[str, ...], ones: int) -> str:
    w = q.counted(weight, zero, (-1, 1, *(1,) * ones))
    return _channels_last(q, "Conv", x, w, *bias, **_same(q, *_WINDOW, "dilations", "group"))


def _requantised(q: Quantised, value: str, scales: tuple[str, ...], scale: int, zero: int) -> Real:
    """What counts in the product of some scales, counted in that of the output."""
    factor = q.emit("Div", scales[0] if len(scales) == 1 else q.emit("Mul", *scales), q.scale(scale))
    return Real(q.emit("Mul", value, factor), q.zero(zero))


def _qlinear_conv(q: Quantised) -> Real:
    ones = q.rank - 2
    bias = (q.floats(8),) if q.has(8) else ()
    y = _convolution(q, q.counted(0, 2), 3, 5, bias, ones)
    shape = (-1,) if q.attr("channels_last", 0) else (-1, *(1,) * ones)
    return _requantised(q, y, (q.scale(1), q.scale(4, shape)), 6, 7)


def _conv_integer(q: Quantised) -> Real:
    return Real(_convolution(q, q.counted(0, 2), 1, 3, (), q.rank - 2), q.zero())


def _qlinear_matmul(q: Quantised) -> Real:
    y = q.emit("MatMul", q.counted(0, 2), q.counted(3, 5))
    return _requantised(q, y, (q.scale(1), q.scale(4)), 6, 7)


def _matmul_integer(q: Quantised) -> Real:
    return Real(q.emit("MatMul", q.counted(0, 2), q.counted(1, 3)), q.zero())


def _matmul_integer_to_float(q: Quantised) -> Real:
    y = q.emit("MatMul", q.counted(0, 4), q.counted(1, 5))
    y = q.emit("Mul", y, q.emit("Mul", q.scale(2), q.scale(3)))
    return Real(q.emit("Add", y, q.floats(6)) if q.has(6) else y)


def _dynamic_quantize_matmul(q: Quantised) -> Real:
    y = q.emit("Mul", q.emit("MatMul", q.floats(0), q.counted(1, 3)), q.scale(2))
    return Real(q.emit("Add", y, q.floats(4)) if q.has(4) else y)


def _q_gemm(q: Quantised) -> Real:
    right = q.counted(3, 5, (-1, 1) if q.attr("transB", 0) else ())
    bias = (q.floats(6),) if q.has(6) else ()
    turned = _same(q, "transA", "transB")
    alpha = float(q.attr("alpha", 1.0))  # the bias counts in units that hold it already
    y = q.emit("Gemm", q.counted(0, 2), right, *bias, alpha=alpha, beta=alpha, **turned)
    if q.has(7):
        return _requantised(q, y, (q.scale(1), q.scale(4)), 7, 8)
    return Real(q.emit("Mul", y, q.emit("Mul", q.scale(1), q.scale(4))))


def _q_attention(q: Quantised) -> Real:
    data = q.emit("Mul", q.counted(0, 6), q.scale(3))
    weight = q.emit("Mul", q.counted(1, 7), q.scale(4))
    mask = (q.operand(5),) if q.has(5) else ()
    attributes = _same(q, "num_heads", "unidirectional", "scale", "mask_filter_value")
    return Real(q.emit("Attention", data, weight, q.floats(2), *mask, domain=_MICROSOFT, **attributes))


def _value(q: Quantised, i: int) -> str:
    """An operand that its scale and zero point follow, as what it stands for."""
    return q.emit("Mul", q.counted(i, i + 2), q.scale(i + 1))


def _made(q: Quantised, value: str, scale: int) -> Real:
    """A value, counted by the output's scale and from the zero point behind it."""
    return Real(q.emit("Div", value, q.scale(scale)), q.zero(scale + 1))


def _q_add(q: Quantised) -> Real:
    return _made(q, q.emit("Add", _value(q, 0), _value(q, 3)), 6)


def _q_mul(q: Quantised) -> Real:
    return _made(q, q.emit("Mul", _value(q, 0), _value(q, 3)), 6)


def _q_where(q: Quantised) -> Real:
    return _made(q, q.emit("Where", q.operand(0), _value(q, 1), _value(q, 4)), 7)


def _q_sigmoid(q: Quantised) -> Real:
    return _made(q, q.emit("Sigmoid", _value(q, 0)), 3)


def _q_leaky_relu(q: Quantised) -> Real:
    return _made(q, q.emit("LeakyRelu", _value(q, 0), **_same(q, "alpha")), 3)


def _q_softmax(q: Quantised) -> Real:
    x, axis = _value(q, 0), int(q.attr("axis", -1)) % q.rank
    if int(q.attr("opset")) >= 13 or axis == q.rank - 1:
        turn = [i for i in range(q.rank) if i != axis] + [axis]
        y = q.emit("Softmax", q.emit("Transpose", x, perm=turn), axis=q.rank - 1)
        return _made(q, q.emit("Transpose", y, perm=[turn.index(i) for i in range(q.rank)]), 3)
    y = q.emit("Softmax", q.emit("Flatten", x, axis=axis), axis=1)
    return _made(q, q.emit("Reshape", y, q.emit("Shape", x)), 3)


def _q_average_pool(q: Quantised) -> Real:
    attributes = _same(q, *_WINDOW, "ceil_mode", "count_include_pad")
    return _made(q, _channels_last(q, "AveragePool", _value(q, 0), **attributes), 3)


def _q_global_average_pool(q: Quantised) -> Real:
    return _made(q, _channels_last(q, "GlobalAveragePool", _value(q, 0)), 3)


def _nhwc_max_pool(q: Quantised) -> Real:
    x, zero = q.integers(0)
    return Real(_channels_last(q, "MaxPool", x, **_same(q, *_WINDOW, "ceil_mode", "dilations")), zero)


def _q_concat(q: Quantised) -> Real:
    parts: list[str] = []
    while q.has(len(parts) * 3 + 2):
        parts.append(_value(q, len(parts) * 3 + 2))
    return _made(q, q.emit("Concat", *parts, axis=q.attr("axis")), 0)


FORMS: dict[tuple[str, str], Form] = {
    ("", "ConvInteger"): _conv_integer,
    ("", "MatMulInteger"): _matmul_integer,
    ("", "QLinearConv"): _qlinear_conv,
    ("", "QLinearMatMul"): _qlinear_matmul,
    (_MICROSOFT, "DynamicQuantizeMatMul"): _dynamic_quantize_matmul,
    (_MICROSOFT, "MatMulIntegerToFloat"): _matmul_integer_to_float,
    (_MICROSOFT, "NhwcMaxPool"): _nhwc_max_pool,
    (_MICROSOFT, "QAttention"): _q_attention,
    (_MICROSOFT, "QGemm"): _q_gemm,
    (_MICROSOFT, "QLinearAdd"): _q_add,
    (_MICROSOFT, "QLinearAveragePool"): _q_average_pool,
    (_MICROSOFT, "QLinearConcat"): _q_concat,
    (_MICROSOFT, "QLinearConv"): _qlinear_conv,
    (_MICROSOFT, "QLinearGlobalAveragePool"): _q_global_average_pool,
    (_MICROSOFT, "QLinearLeakyRelu"): _q_leaky_relu,
    (_MICROSOFT, "QLinearMul"): _q_mul,
    (_MICROSOFT, "QLinearSigmoid"): _q_sigmoid,
    (_MICROSOFT, "QLinearSoftmax"): _q_softmax,
    (_MICROSOFT, "QLinearWhere"): _q_where,
}
"""The operators that are known here; all their first outputs are floats or integers from a zero point."""
