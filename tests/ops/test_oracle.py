"""Every declaration, on every sample and label, against onnxruntime in both directions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxprune.ops import NodeView, OpSpec, Pinned, Rule, Sample, Take, declared
from onnxprune.ops.spec import Declaration
from tests.ops.oracle import RANGES, call, evaluation, examine, label_sizes, linearity, view

WITHOUT_SAMPLES = {
    **dict.fromkeys(
        ("Alias", "If", "LoopEntry", "LoopExit", "ScanEntry", "ScanExit"),
        "the flat form of a body, which no runtime knows; tested with whole graphs",
    ),
    "Constant": "it has no operands and no axes; a stored tensor is typed where it is read",
    "NonZero": "how many positions it gives follows from values; all axes are pinned",
    "Range": "its extent follows from operand values, not from shapes; its one axis is pinned",
    "Shape": "what it gives is not made of units; the evaluation of it is tested",
    "Size": "as Shape",
}
CONSTANT = {"ConstantOfShape": "every element is the same by definition"}
UNREAD = {"Slice": "units that are sliced off reach nothing"}
OVER_PINNED = {
    ("GlobalLpPool", "h0"): "a sum, but over space, which is fixed by the graph's input",
    ("GlobalLpPool", "h1"): "as h0",
}

TIMID = {
    "ReduceL1": "adding zeros changes nothing, but a norm is a statistic",
    "ReduceL2": "as ReduceL1",
    "ReduceLogSum": "as ReduceL1",
    "ReduceSumSquare": "as ReduceL1",
}

CASES = [
    pytest.param(spec, number, id=f"{spec.domain}{'.' if spec.domain else ''}{spec.name}-{number}")
    for spec in declared()
    for number in range(len(spec.samples))
]


def test_every_operator_has_samples() -> None:
    assert {spec.name for spec in declared() if not spec.samples} == set(WITHOUT_SAMPLES)


@pytest.mark.parametrize(("spec", "number"), CASES)
def test_declaration_says_what_the_operator_does(spec: OpSpec, number: int) -> None:
    found = examine(spec, spec.samples[number], spec.name in CONSTANT, spec.name in UNREAD)
    tolerated = {axis for name, axis in OVER_PINNED if name == spec.name}
    if spec.name in TIMID:
        tolerated |= {axis for axis, why in found.items() if why == ["declared lossy, but a cut is exact"]}
        assert tolerated or spec.samples[number].attributes.get("noop_with_empty_axes")
    assert {axis: why for axis, why in found.items() if axis not in tolerated} == {}


@pytest.mark.parametrize(("name", "axis"), OVER_PINNED)
def test_what_is_pinned_on_purpose_could_be_cut(name: str, axis: str) -> None:
    spec = named(name)
    found = [examine(spec, sample).get(axis, []) for sample in spec.samples]
    assert ["declared pinned, but a cut agrees"] in found


def named(name: str) -> OpSpec:
    return next(spec for spec in declared() if spec.name == name)


# ------------------------------------------------------------------------- what else a rule says


def ruled(name: str, sample: Sample) -> Rule:
    spec = named(name)
    this = call(spec, sample, *RANGES[0])
    rule = spec.declare(view(this, this.run()))
    assert isinstance(rule, Rule)
    return rule


SCALED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization",
          "RMSNormalization", "InstanceNormalization", "GroupNormalization")  # fmt: skip
NO_COMMON_UNIT = {
    ("Gemm", 2): "its bias differs by row only",
    ("Gemm", 4): "its bias is one number",
    ("MatMul", 5): "a vector on the right makes no units",
    ("MatMul", 6): "a vector on the right makes no units",
}


@pytest.mark.parametrize(("spec", "number"), CASES)
def test_scaling_weight_and_bias_scales_the_output(spec: OpSpec, number: int) -> None:
    verdicts = linearity(spec, spec.samples[number])
    assert {axis: why for axis, why in verdicts.items() if why} == {}
    if spec.name in SCALED and not spec.domain:
        assert bool(verdicts) != ((spec.name, number) in NO_COMMON_UNIT)


@pytest.mark.parametrize(
    ("name", "number"),
    [(n, i) for n in ("Conv", "ConvTranspose", "Gemm", "MatMul") for i in range(len(named(n).samples))],
)
def test_macs_are_the_multiplications_made(name: str, number: int) -> None:
    sample = named(name).samples[number]
    this = call(named(name), sample, *RANGES[0])
    results = this.run()
    rule = ruled(name, sample)
    shapes = [v.shape for v in this.operands if v is not None]
    sizes = label_sizes(rule, shapes, [r.shape for r in results])
    if name in ("Conv", "ConvTranspose"):
        outer = results[0].size if name == "Conv" else math.prod(shapes[0])
        expected = outer * math.prod(shapes[1][1:])
    else:
        expected = results[0].size * shapes[0][0 if sample.attributes.get("transA") else -1]
    assert sum(math.prod(sizes[axis] for axis in product) for product in rule.products) == expected


EVALUATED = [
    pytest.param(spec, sample, id=f"{spec.name}-{number}")
    for spec in declared()
    if spec.evaluate is not None
    for number, sample in enumerate(spec.samples)
]
SIGNED = np.array([[-7, 7, -5], [3, -2, 6]])
DIVISORS = np.array([2, -3, 4])
COUNTED = {
    "Abs": [Sample((SIGNED,))],
    "Add": [Sample((SIGNED, DIVISORS))],
    "Cast": [
        Sample((SIGNED,), {"to": TensorProto.FLOAT}),
        Sample(((4, 5),), {"to": TensorProto.INT64}),
        Sample((SIGNED,), {"to": TensorProto.BOOL}),
    ],
    "Clip": [Sample((SIGNED, np.array(-2), np.array(3))), Sample((SIGNED, None, np.array(0)))],
    "Concat": [Sample((SIGNED[0], DIVISORS), {"axis": 0})],
    "Div": [Sample((SIGNED, DIVISORS)), Sample((SIGNED.astype(np.float32), DIVISORS.astype(np.float32)))],
    "Equal": [Sample((SIGNED, np.array([-7, -2, 6])))],
    "Expand": [Sample((np.array([[1], [2]]), np.array([3, 1, 4])))],
    "Gather": [Sample((SIGNED[0], np.array(-1))), Sample((SIGNED, np.array([[1, 0]])), {"axis": 1})],
    "Greater": [Sample((SIGNED, DIVISORS))],
    "Max": [Sample((SIGNED, DIVISORS, np.array(0)))],
    "Min": [Sample((SIGNED, DIVISORS, np.array(0)))],
    "Mod": [Sample((SIGNED, DIVISORS)), Sample((SIGNED, DIVISORS), {"fmod": 1})],
    "Mul": [Sample((SIGNED, DIVISORS))],
    "Neg": [Sample((SIGNED,))],
    "Pow": [Sample((np.abs(SIGNED), np.array([2, 1, 3])))],
    "Range": [
        Sample((np.array(2), np.array(11), np.array(3))),
        Sample((np.array(5), np.array(0), np.array(-2))),
    ],
    "ReduceMax": [Sample((SIGNED, np.array([0])), opset=18)],
    "ReduceMin": [Sample((SIGNED, np.array([-1])), {"keepdims": 0}, opset=18)],
    "ReduceProd": [Sample((SIGNED,), {"keepdims": 0}), Sample((SIGNED, np.array([1])), opset=18)],
    "ReduceSum": [Sample((SIGNED, np.array([1]))), Sample((SIGNED,), {"noop_with_empty_axes": 1})],
    "Round": [Sample((np.array([0.5, 1.5, -0.5, 2.4], np.float32),))],
    "Shape": [
        Sample(((2, 3, 4),)),
        Sample(((2, 3, 4),), {"start": -2}),
        Sample(((2, 3, 4),), {"start": 1, "end": -1}),
        Sample(((2, 3, 4),), {"end": 9}),
    ],
    "Size": [Sample(((2, 3, 4),))],
    "Slice": [
        Sample((np.arange(9), np.array([-2]), np.array([-9]), np.array([0]), np.array([-3]))),
        Sample((np.arange(9), np.array([3]), np.array([3]), np.array([0]))),
        Sample((np.arange(9), np.array([8]), np.array([-(2**62)]), np.array([-1]), np.array([-1]))),
    ],
    "Split": [Sample((np.arange(7), np.array([3, 4])), outputs=2)],
    "Squeeze": [Sample((np.array([[4], [5]]), np.array([1]))), Sample((np.array([[4]]),))],
    "Sub": [Sample((SIGNED, DIVISORS))],
    "Sum": [Sample((SIGNED.astype(np.float32), np.ones(3, np.float32)))],
    "Tile": [Sample((SIGNED, np.array([2, 3])))],
    "Unsqueeze": [Sample((np.array([4, 5]), np.array([0, 2])))],
    "Where": [Sample((SIGNED > 0, SIGNED, DIVISORS))],
    "ConstantOfShape": [
        Sample((np.array([2, 3]),), {"value": helper.make_tensor("v", TensorProto.INT64, [1], [7])}),
        Sample((np.empty(0, np.int64),)),
    ],
}


@pytest.mark.parametrize(("spec", "sample"), EVALUATED)
def test_evaluation_computes_what_the_operator_does(spec: OpSpec, sample: Sample) -> None:
    assert evaluation(spec, sample) == ""


@pytest.mark.parametrize(
    ("name", "sample"), [pytest.param(n, s, id=f"{n}-{i}") for n in COUNTED for i, s in enumerate(COUNTED[n])]
)
def test_evaluation_counts_like_the_operator(name: str, sample: Sample) -> None:
    assert evaluation(named(name), sample) == ""


# ----------------------------------------------------------------------------- the oracle itself


def said(text: str, **options: Any) -> Declaration:
    return lambda node: Rule.of(text, **options)


def concat_backwards(node: NodeView) -> Rule:
    sizes = {"p": node.shape(0)[0], "q": node.shape(1)[0]}
    return Rule.of("p a, q a -> (q + p) a", sizes=sizes)


def split_without_sizes(node: NodeView) -> Rule:
    return replace(named("Split").declare(node), resize=None)


def without(name: str, **fields: Any) -> Declaration:
    """The operator's own declaration with fields replaced."""

    def declare(node: NodeView) -> Rule:
        rule = named(name).declare(node)
        assert isinstance(rule, Rule)
        return replace(rule, **fields)

    return declare


def left_aligned(node: NodeView) -> Rule:
    return Rule.of("a b, a -> a b")


def next_position(node: NodeView) -> Take:
    take = named("Gather").declare(node)
    assert isinstance(take, Take)
    return replace(take, index=(take.index + 1) % node.shape()[take.axis])


def unnumbered(node: NodeView) -> Take:
    """Says that the positions kept can be picked with the old index."""
    take = named("Gather").declare(node)
    assert isinstance(take, Take)
    return replace(take, axis=1 - take.axis, index=np.arange(node.shape()[1 - take.axis]))


SQUARE = ((2, 4, 5), (4, 4, 3), (4,))
GROUPED = ((2, 4, 5), (4, 2, 3), (4,))
PLANTED = {
    "softmax axis is free": ("Softmax", said("a b -> a b"), Sample(((3, 4),)), "b"),
    "relu is pinned": ("Relu", said("a b -> a b", pinned={"b": "no reason"}), Sample(((3, 4),)), "b"),
    "relu is lossy": ("Relu", said("a b -> a b", lossy={"b": "no reason"}), Sample(((3, 4),)), "b"),
    "mean is exact": ("ReduceMean", said("a b -> a one"), Sample(((3, 4),), {"axes": [1]}), "b"),
    "maximum is exact": ("ReduceMax", said("a b -> a one"), Sample(((3, 4),), {"axes": [1]}), "b"),
    "sum is lossy": (
        "ReduceSumSquare",
        said("a b -> a one", lossy={"b": "no reason"}),
        Sample(((3, 4),), {"axes": [1]}),
        "b",
    ),
    "layer norm is exact": ("LayerNormalization", said("a b, b -> a b"), Sample(((3, 4), (4,))), "b"),
    "filters and inputs swapped": ("Conv", said("n i h, i o p, o -> n o y"), Sample(SQUARE), "i"),
    "groups are minor": (
        "Conv",
        said("n (i g) h, (o g) i p, (o g) -> n (o g) y", sizes={"g": 2}, attributes={"group": "g"}),
        Sample(GROUPED, {"group": 2}),
        "g",
    ),
    "group is not restated": (
        "Conv",
        said("n (g i) h, (g o) i p, (g o) -> n (g o) y", sizes={"g": 2}),
        Sample(GROUPED, {"group": 2}),
        "g",
    ),
    "groups do not exist": (
        "Conv", said("n c h, o i p, o -> n o y"), Sample(GROUPED, {"group": 2}), "o"
    ),
    "transposition overlooked": (
        "Gemm", said("m k, k n -> m n"), Sample(((3, 4), (4, 4)), {"transB": 1}), "k"
    ),
    "sides swapped": ("MatMul", said("k m, n k -> m n"), Sample(((4, 4), (4, 4))), "m"),
    "broadcast from the left": ("Add", left_aligned, Sample(((4, 4), (4,))), "a"),
    "concat backwards": ("Concat", concat_backwards, Sample(((3, 4), (3, 4)), {"axis": 0}), "p"),
    "split sizes are not restated": (
        "Split", split_without_sizes, Sample(((2, 6), np.array([2, 4])), {"axis": 1}, outputs=2), "p0"
    ),
    "flattened column-major": ("Flatten", said("n a b -> n (b a)"), Sample(((2, 3, 4),)), "a"),
    "order of a depth block": (
        "DepthToSpace",
        said("n (c b d) h w -> n c (h b) (w d)", sizes={"b": 2, "d": 2}, pinned={"b": "block", "d": "block"}),
        Sample(((2, 12, 2, 3),), {"blocksize": 2}),
        "c",
    ),
    "axes in reverse": ("Transpose", said("a b -> a b"), Sample(((4, 4),)), "a"),
    "scale on the wrong axis": ("BatchNormalization", said("n s c, c, c, c, c -> n s c"),
                                Sample(((2, 4, 4), (4,), (4,), (4,), (4,))), "s"),
    "group norm by position": (
        "GroupNormalization",
        said("n (c g) s, (c g), (c g) -> n (c g) s", sizes={"g": 2}, attributes={"num_groups": "g"},
             lossy={"c": "statistic", "s": "statistic"}),
        Sample(((2, 4, 3), (4,), (4,)), {"num_groups": 2}, opset=21),
        "g",
    ),
    "state is not read by the recurrence": (
        "RNN", said("s b x, d h x, d h h -> s d b h", sizes={"h": 4}, attributes={"hidden_size": "h"}),
        Sample(((3, 2, 5), (1, 4, 5), (1, 4, 4)), {"hidden_size": 4}), "h",
    ),
    "gates are minor": (
        "GRU",
        said("s b x, d (h t) x, d (h t) k -> s d b h", sizes={"t": 3}, attributes={"hidden_size": "h"},
             tied={"k": "h"}, pinned={"t": "gates", "s": "steps"}),
        Sample(((3, 2, 5), (1, 12, 5), (1, 12, 4)), {"hidden_size": 4}), "h",
    ),
    "tied to an axis of another size": (
        "MatMul", said("m k, k n -> m n", tied={"k": "m"}), Sample(((3, 4), (4, 5))), "",
    ),
    "extents that do not fit": ("Relu", said("a (b c) -> a (b c)", sizes={"b": 3}), Sample(((3, 4),)), ""),
    "one axis too few": ("Relu", said("a -> a"), Sample(((3, 4),)), ""),
    "positions are off by one": ("Gather", next_position, Sample(((6, 4), np.array([5, 0, 3]))), "take"),
    "positions of another axis": ("Gather", unnumbered, Sample(((6, 4), np.array([5, 0, 3]))), "take"),
    "given up on": ("Relu", lambda node: Pinned("no reason"), Sample(((3, 4),)), ""),
    "zeros where a zero point is": (
        "MatMulInteger",
        without("MatMulInteger", zero={}),
        named("MatMulInteger").samples[0],
        "k",
    ),
    "blocks cut through": (
        "DequantizeLinear",
        without("DequantizeLinear", pinned={}),
        Sample((np.arange(12, dtype=np.int8), (3,)), {"axis": 0, "block_size": 4}, opset=21),
        "block",
    ),
    "data all alike": ("Mul", said("a b, b -> a b"), Sample(((3, 4), np.zeros(4, np.float32))), ""),
    "data that do not matter": (
        "MatMul", said("m k, k n -> m n"),
        Sample(((3, 4), np.array([[1, 2], [1, 2], [1, 2], [0, 0]], np.float32)[[3, 0, 1, 2]])), "k",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_found(mistake: str) -> None:
    name, declare, sample, where = PLANTED[mistake]
    assert where in examine(replace(named(name), declare=declare), sample)
