"""Whatever a user throws at it: one line that names the file, the place and the remedy; never a traceback,
never half a file, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.architectures import vgg16_bn
from onnxprune.errors import UserError
from onnxprune.model import load
from tests.small import check_refused, floats, ints, net, run, shrink, weight, write

node = helper.make_node
BIG = 10**9


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test ends with an empty temporary folder."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(net(), tmp_path / "model.onnx")


def refused(path: Path, *words: object, code: int = 2) -> None:
    """`shrink` refuses the model and leaves its folder as it was."""
    before = listing(path.parent)
    check_refused(shrink(path), path, *words, code=code)
    assert listing(path.parent) == before


# ---------------------------------------------------------------------------------------------- no models


def _zip() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("model.onnx", net().SerializeToString())
    return data.getvalue()


NOT_MODELS = {
    "empty": b"",
    "text": b"This is not a model.\n" * 50,
    "json": b'{"model": 1}',
    "zip": _zip(),
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(200)),
    "random": np.random.default_rng(0).bytes(5000),
    "zeros": bytes(1000),
    "tensor": numpy_helper.from_array(np.ones((3, 4), np.float32), "w").SerializeToString(),
    "half a model": net().SerializeToString()[:700],
}


@pytest.mark.parametrize("data", NOT_MODELS.values(), ids=NOT_MODELS.keys())
def test_files_that_are_no_models(data: bytes, tmp_path: Path) -> None:
    refused(write(data, tmp_path / "model.onnx"))


def test_a_model_cut_short_anywhere(tmp_path: Path) -> None:
    data = net().SerializeToString()
    for length in range(len(data)):
        with pytest.raises(UserError):
            load(write(data[:length], tmp_path / "model.onnx"))


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Damage may go unnoticed (a weight changes), but never shows as a traceback or an internal error."""
    data = net().SerializeToString()
    rng = np.random.default_rng(0)
    for number in range(120):
        damaged = bytearray(data)
        start = data.index(b"conv1") - 20 if number % 2 else len(data) - 90  # structure, not weights
        for place in rng.integers(0, 90, 3):
            damaged[start + place] = rng.integers(0, 256)
        result = shrink(write(bytes(damaged), tmp_path / "model.onnx"))
        assert result.exit_code in (0, 2, 4), result.output


def test_missing_models_folders_and_devices(tmp_path: Path) -> None:
    check_refused(shrink(tmp_path / "none.onnx"), "none.onnx", "No such file")
    check_refused(shrink(tmp_path), tmp_path, "is a directory")
    check_refused(shrink(tmp_path / "no" / "folder.onnx"), "folder.onnx", "No such file")
    check_refused(run("inspect", "/dev/zero"), "/dev/zero", "a device")


def test_an_unreadable_model(model: Path, powerless: Callable[[], AbstractContextManager[None]]) -> None:
    model.chmod(0)
    with powerless():
        check_refused(shrink(model), model, "Permission denied")


def test_a_read_only_folder(model: Path, powerless: Callable[[], AbstractContextManager[None]]) -> None:
    before = listing(model.parent)
    model.parent.chmod(0o555)
    with powerless():
        for command in (
            ("shrink", model, "--channels", 0.5, "--align", 1),
            ("plan", model, "--channels", 0.5, "--align", 1, "-o", model.with_name("plan.json")),
            ("fold", model, "-o", model.with_name("folded.onnx")),
        ):
            check_refused(run(*command), model.parent, "Permission denied")
    assert listing(model.parent) == before


# ------------------------------------------------------------------------------------------ broken graphs

Build = Callable[[], onnx.ModelProto | bytes]
BROKEN: dict[str, tuple[Build, tuple[str, ...]]] = {}
STRANGE: dict[str, Build] = {}


def broken(*words: str) -> Callable[[Build], Build]:
    """A graph that is refused with these words."""

    def register(build: Build) -> Build:
        BROKEN[build.__name__] = build, words
        return build

    return register


def strange(build: Build) -> Build:
    """A graph that is pruned, left alone or refused; anything but a crash."""
    STRANGE[build.__name__] = build
    return build


def changed(edit: Callable[[onnx.ModelProto], Any], **versions: int) -> onnx.ModelProto:
    proto = net(**versions)
    edit(proto)
    return proto


@broken("holds no graph")
def empty_graph() -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], []))


@broken("opset 99 is unknown", "convert the model")
def opset_too_new() -> onnx.ModelProto:
    return net(opset=99)


@broken("opset 0 is unknown")
def opset_zero() -> onnx.ModelProto:
    return net(opset=0)


@broken("no opset is stated", "conv1")
def opset_missing() -> onnx.ModelProto:
    return changed(lambda m: m.ClearField("opset_import"))


@broken("two opsets are stated (17 and 11)")
def opset_twice() -> onnx.ModelProto:
    return changed(lambda m: m.opset_import.add(domain="ai.onnx", version=11))


@broken("IR version 99 is unknown")
def ir_too_new() -> onnx.ModelProto:
    return net(ir=99)


@broken("IR version -1 is unknown")
def ir_negative() -> onnx.ModelProto:
    return net(ir=-1)


@broken("node 'add' reads 'd' before it is produced", "cycle")
def cyclic() -> onnx.ModelProto:
    return net([node("Add", ["a", "d"], ["b"], name="add"), node("Relu", ["b"], ["d"], name="back")])


@broken("node 'add' is part of a cycle")
def cyclic_in_one_node() -> onnx.ModelProto:
    return net([node("Add", ["a", "b"], ["b"], name="add")])


@broken("tensor 'b' is produced twice", "second")
def tensor_made_twice() -> onnx.ModelProto:
    return net([node("Relu", ["a"], ["b"], name="first"), node("Relu", ["a"], ["b"], name="second")])


@broken("conv1")
def nodes_of_one_name() -> onnx.ModelProto:
    return net([node("Relu", ["a"], ["b"], name="conv1")])


@broken("initializer 'w1' occurs twice")
def initializers_of_one_name() -> onnx.ModelProto:
    return net(weights=[weight("w1", 8, 3, 3, 3)])


@broken("graph input 'x' occurs twice")
def inputs_of_one_name() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input.append(floats("x", "n", 3, 8, 8)))


@broken("node 'add' reads 'ghost', which nothing produces")
def input_undefined() -> onnx.ModelProto:
    return net([node("Add", ["a", "ghost"], ["b"], name="add")])


@broken("graph output 'nothing' is produced by no node")
def output_undefined() -> onnx.ModelProto:
    return changed(lambda m: m.graph.output.append(floats("nothing", 1)))


@broken("(add)", "Incompatible dimensions")
def shapes_that_do_not_broadcast() -> onnx.ModelProto:
    return net([node("Add", ["a", "k"], ["b"], name="add")], [weight("k", 1, 7, 1, 1)])


@broken("shapes contradict at node 'conv2'", "6 and 8")
def filters_that_do_not_fit() -> onnx.ModelProto:
    return changed(lambda m: m.graph.initializer[1].CopyFrom(weight("w2", 4, 6, 1, 1)))


@broken("(split)", "102")
def split_beyond_the_axis() -> onnx.ModelProto:
    return net([node("Split", ["a", "parts"], ["b", "rest"], axis=1, name="split")], [ints("parts", 3, 99)])


@broken("'conv1'", "shapes contradict")
def groups_that_do_not_divide() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("group", 5)))


@broken("conv1", "strides")
def stride_zero() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("strides", [0, 0])))


@broken("conv1", "strides")
def attribute_of_the_wrong_type() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("strides", "two")))


@broken("node 'conv1' (Conv)", "cannot have")
def attribute_of_the_wrong_rank() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("group", [1, 2])))


@broken("attribute 'group' of node 'conv1'")
def attribute_of_a_function() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[0].attribute.add(name="group", type=2, ref_attr_name="other"))


@broken("node 'conv2' (Conv) has 0 inputs and takes 2 to 3")
def node_without_inputs() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[2].ClearField("input"))


@broken("node 'lost' (Relu) has no output")
def node_without_outputs() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node.add(op_type="Relu", input=["a"], name="lost"))


@broken("(turn)", "perm")
def permutation_that_is_none() -> onnx.ModelProto:
    return net([node("Transpose", ["a"], ["b"], perm=[0, 1, 1, 7], name="turn")])


@broken("(cut)", "'step' cannot be 0")
def slice_without_step() -> onnx.ModelProto:
    weights = [ints("start", 0), ints("end", 8), ints("axis", 1), ints("step", 0)]
    return net([node("Slice", ["a", "start", "end", "axis", "step"], ["b"], name="cut")], weights)


@broken("weight 'w1' (node 'conv1') holds NaN or Inf", "--exclude")
def weights_nan() -> onnx.ModelProto:
    values = np.ones((8, 3, 3, 3), np.float32)
    values[3] = np.nan
    return changed(lambda m: m.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w1")))


@broken("weight 'w2' (node 'conv2') holds NaN or Inf")
def weights_infinite() -> onnx.ModelProto:
    values = np.ones((4, 8, 1, 1), np.float32)
    values[:, 2], values[:, 3] = np.inf, -np.inf
    return changed(lambda m: m.graph.initializer[1].CopyFrom(numpy_helper.from_array(values, "w2")))


@broken("tensor 'w1'", "holds 859 bytes and needs 864")
def weights_cut_short() -> onnx.ModelProto:
    return changed(lambda m: _raw(m, m.graph.initializer[0].raw_data[:-5]))


@broken("tensor 'w1'", "holds 868 bytes and needs 864")
def weights_too_long() -> onnx.ModelProto:
    return changed(lambda m: _raw(m, m.graph.initializer[0].raw_data + b"more"))


def _raw(proto: onnx.ModelProto, data: bytes) -> None:
    proto.graph.initializer[0].raw_data = data


@broken("tensor 'w1'", "holds 5 values and needs 216")
def weights_of_too_few_values() -> onnx.ModelProto:
    def few(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].ClearField("raw_data")
        proto.graph.initializer[0].float_data.extend([1.0] * 5)

    return changed(few)


@broken("tensor 'w1' has the unknown element type 77")
def weights_of_unknown_type() -> onnx.ModelProto:
    return changed(lambda m: setattr(m.graph.initializer[0], "data_type", 77))


@broken("'w1'", "segments")
def weights_in_segments() -> onnx.ModelProto:
    return changed(lambda m: setattr(m.graph.initializer[0].segment, "end", 3))


@broken("tensor 'w1' has the shape [-8, 3, 3, 3]")
def weights_of_negative_size() -> onnx.ModelProto:
    return changed(lambda m: _dims(m, -8, 3, 3, 3))


@broken("tensor 'w1'", "needs 498,062,089,990,157,893,632")
def weights_of_astronomic_size() -> onnx.ModelProto:
    return changed(lambda m: _dims(m, 2**62, 3, 3, 3))


def _dims(proto: onnx.ModelProto, *dims: int) -> None:
    proto.graph.initializer[0].dims[:] = dims


@broken("tensor(string)", "conv1")
def weights_of_text() -> onnx.ModelProto:
    words = helper.make_tensor("w1", TensorProto.STRING, [8, 3, 3, 3], [b"x"] * 216)
    return changed(lambda m: m.graph.initializer[0].CopyFrom(words))


@broken("(conv1)", "different types")
def weights_of_another_float_type() -> onnx.ModelProto:
    return changed(lambda m: m.graph.initializer[0].CopyFrom(weight("w1", 8, 3, 3, 3, dtype=np.float64)))


@broken("input 'x'", "too large")
def input_of_astronomic_size() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input[0].CopyFrom(floats("x", 2**62, 3, 2**62, 8)))


@broken("input 'x'", "too large")
def input_of_a_terabyte() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input[0].CopyFrom(floats("x", 1, 3, 2**19, 2**19)))


@broken("shapes contradict at node 'conv1'")
def input_of_negative_channels() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input[0].CopyFrom(floats("x", 1, -3, 8, 8)))


@broken("(conv1)", "at least 3 dimensions")
def input_without_axes() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input[0].CopyFrom(floats("x")))


@broken("input 'o' is not a tensor of numbers")
def input_optional() -> onnx.ModelProto:
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    return changed(lambda m: m.graph.input.append(helper.make_value_info("o", kind)))


@broken("input 's' is not a tensor of numbers")
def input_sequence() -> onnx.ModelProto:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    return changed(lambda m: m.graph.input.append(helper.make_value_info("s", kind)))


@broken("input 't' is not a tensor of numbers")
def input_text() -> onnx.ModelProto:
    value = helper.make_tensor_value_info("t", TensorProto.STRING, [2])
    return changed(lambda m: m.graph.input.append(value))


@broken("Missing:u")
def input_without_type() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input.add(name="u"))


@broken("not UTF-8 text")
def name_that_is_no_text() -> bytes:
    return net().SerializeToString().replace(b"relu", b"re\xff\xfe")


@broken("must not be recursive")
def function_that_calls_itself() -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    body = helper.make_function("my", "F", ["p"], ["q"], [node("F", ["p"], ["q"], domain="my")], opsets)
    proto = net([node("F", ["a"], ["b"], domain="my", name="call")])
    proto.functions.append(body)
    proto.opset_import.add(domain="my", version=1)
    return proto


@broken("not an ONNX model")
def subgraphs_200_deep() -> bytes:
    return _nested(200)


def _nested(depth: int) -> bytes:
    """If in If in If ..., put together byte by byte: protobuf does not serialise what it will not parse."""

    def field(number: int, data: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(data)) + data

    def relu(source: bytes, target: bytes) -> bytes:
        return field(1, field(1, source) + field(2, target) + field(4, b"Relu"))

    def output(name: bytes) -> bytes:
        return field(12, field(1, name))

    graph = relu(b"a", b"t") + output(b"t")
    other = relu(b"a", b"e") + output(b"e")
    for _ in range(depth):
        branches = b"".join(
            field(5, field(1, name) + field(6, body) + _varint(20 << 3) + _varint(5))
            for name, body in ((b"then_branch", graph), (b"else_branch", other))
        )
        graph = field(1, field(1, b"yes") + field(2, b"t") + field(4, b"If") + branches) + output(b"t")
    proto = net([node("Relu", ["t"], ["b"])], [numpy_helper.from_array(np.array(True), "yes")])
    rest = proto.graph.node
    return (
        _varint(1 << 3)
        + _varint(8)
        + field(8, field(1, b"") + _varint(2 << 3) + _varint(17))
        + field(
            7,
            field(1, rest[0].SerializeToString())
            + graph.removesuffix(output(b"t"))
            + b"".join(field(1, n.SerializeToString()) for n in rest[1:])
            + b"".join(field(5, t.SerializeToString()) for t in proto.graph.initializer)
            + field(11, proto.graph.input[0].SerializeToString())
            + field(12, proto.graph.output[0].SerializeToString()),
        )
    )


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


@strange
def subgraphs_20_deep() -> bytes:
    return _nested(20)


@strange
def no_nodes() -> onnx.ModelProto:
    graph = helper.make_graph([], "g", [floats("x", 1)], [floats("x", 1)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@strange
def opset_before_7() -> onnx.ModelProto:
    return net(opset=5)


@strange
def ir_1() -> onnx.ModelProto:
    return net(ir=1)


@strange
def weights_empty() -> onnx.ModelProto:
    def empty(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].CopyFrom(weight("w1", 0, 3, 3, 3))
        proto.graph.initializer[1].CopyFrom(weight("w2", 4, 0, 1, 1))

    return changed(empty)


@strange
def batch_empty() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input[0].CopyFrom(floats("x", 0, 3, 8, 8)))


@strange
def image_empty() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input[0].CopyFrom(floats("x", 1, 3, 0, 8)))


@strange
def input_negative_batch() -> onnx.ModelProto:
    return changed(lambda m: m.graph.input[0].CopyFrom(floats("x", -1, 3, 8, 8)))


@strange
def input_without_shape() -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    return changed(lambda m: m.graph.input[0].CopyFrom(value))


@strange
def input_is_an_output() -> onnx.ModelProto:
    return changed(lambda m: m.graph.output.append(floats("x", "n", 3, 8, 8)))


@strange
def weight_is_an_output() -> onnx.ModelProto:
    return changed(lambda m: m.graph.output.append(floats("w1", 8, 3, 3, 3)))


@strange
def output_listed_twice() -> onnx.ModelProto:
    return changed(lambda m: m.graph.output.append(floats("y", "n", 4, 1, 1)))


@strange
def output_of_a_false_shape() -> onnx.ModelProto:
    return changed(lambda m: m.graph.output[0].CopyFrom(floats("y", "n", 9, 1, 1)))


@strange
def value_info_false() -> onnx.ModelProto:
    return changed(lambda m: m.graph.value_info.append(floats("a", "n", 99, 6, 6)))


@strange
def pads_astronomic() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("pads", [2**62] * 4)))


@strange
def attribute_without_type() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[0].attribute.add(name="odd"))


@strange
def attribute_of_unknown_type() -> bytes:
    proto = changed(lambda m: m.graph.node[0].attribute.append(helper.make_attribute("odd", 1.0)))
    data = proto.SerializeToString()
    assert b"\xa0\x01\x01" in data
    return data.replace(b"\xa0\x01\x01", b"\xa0\x01\x63")


@broken("node 'relu' (Relu) has 3 inputs and takes 1 to 1")
def too_many_inputs() -> onnx.ModelProto:
    return changed(lambda m: m.graph.node[1].input.extend(["a", "a"]))


@strange
def operator_unknown() -> onnx.ModelProto:
    return net([node("Frobnicate", ["a"], ["b"], name="frob")])


@strange
def operator_unnamed() -> onnx.ModelProto:
    return changed(lambda m: setattr(m.graph.node[1], "op_type", ""))


@strange
def domain_unknown() -> onnx.ModelProto:
    proto = net([node("Frobnicate", ["a"], ["b"], name="frob", domain="acme")])
    proto.opset_import.add(domain="acme", version=1)
    return proto


@strange
def function() -> onnx.ModelProto:
    body = helper.make_function(
        "my", "F", ["p"], ["q"], [node("Relu", ["p"], ["q"])], [helper.make_opsetid("", 17)]
    )
    proto = net([node("F", ["a"], ["b"], domain="my", name="call")])
    proto.functions.append(body)
    proto.opset_import.add(domain="my", version=1)
    return proto


@strange
def constant_without_value() -> onnx.ModelProto:
    return net([node("Constant", [], ["k"], name="k"), node("Add", ["a", "k"], ["b"])])


@strange
def constant_of_text() -> onnx.ModelProto:
    return net([node("Constant", [], ["k"], value_strings=[b"a"]), node("Relu", ["a"], ["b"])])


def _sparse() -> onnx.SparseTensorProto:
    values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "sparse")
    return helper.make_sparse_tensor(values, ints("places", 3, 9), [8, 8, 1, 1])


@strange
def constant_sparse() -> onnx.ModelProto:
    return net([node("Constant", [], ["k"], sparse_value=_sparse()), node("Conv", ["a", "k"], ["b"])])


@strange
def initializer_sparse() -> onnx.ModelProto:
    proto = net([node("Conv", ["a", "sparse"], ["b"])])
    proto.graph.sparse_initializer.append(_sparse())
    return proto


@strange
def initializer_complex() -> onnx.ModelProto:
    value = helper.make_tensor("k", TensorProto.COMPLEX64, [2], [1 + 2j, 2])
    return net([node("Relu", ["a"], ["b"]), node("Identity", ["k"], ["kk"])], [value])


def _small_type(kind: int, opset: int, ir: int, through: str = "Cast") -> onnx.ModelProto:
    values = helper.make_tensor("k", kind, [8, 8, 1, 1], [1.0] * 64)
    if through == "Cast":
        bridge = node("Cast", ["k"], ["kf"], to=TensorProto.FLOAT)
    else:
        bridge = node("DequantizeLinear", ["k", "scale"], ["kf"])
    scale = numpy_helper.from_array(np.float32(0.1), "scale")
    return net([bridge, node("Conv", ["a", "kf"], ["b"])], [values, scale], opset=opset, ir=ir)


@strange
def weight_int4() -> onnx.ModelProto:
    return _small_type(TensorProto.INT4, 21, 10, "DequantizeLinear")


@strange
def weight_fp8() -> onnx.ModelProto:
    return _small_type(TensorProto.FLOAT8E4M3FN, 21, 10)


@strange
def weight_fp8_quantised() -> onnx.ModelProto:
    return _small_type(TensorProto.FLOAT8E5M2, 21, 10, "DequantizeLinear")


@strange
def weight_fp4() -> onnx.ModelProto:
    return _small_type(TensorProto.FLOAT4E2M1, 23, 11)


@strange
def weight_int2() -> onnx.ModelProto:
    return _small_type(TensorProto.INT2, 25, 13)


@strange
def weight_bfloat16() -> onnx.ModelProto:
    return _small_type(TensorProto.BFLOAT16, 17, 8)


@strange
def reshape_by_a_matrix() -> onnx.ModelProto:
    target = numpy_helper.from_array(np.array([[1, 8, 6, 6]]), "target")
    return net([node("Reshape", ["a", "target"], ["b"])], [target])


@strange
def gather_beyond_the_axis() -> onnx.ModelProto:
    return net([node("Gather", ["a", "index"], ["b"], axis=1)], [ints("index", *[99] * 8)])


@strange
def einsum_of_nonsense() -> onnx.ModelProto:
    return net([node("Einsum", ["a"], ["b"], equation="nope->->")])


@strange
def resize_by_nan() -> onnx.ModelProto:
    scales = numpy_helper.from_array(np.array([1, 1, -2, np.nan], np.float32), "scales")
    return net([node("Resize", ["a", "", "scales"], ["b"])], [scales])


def aside(*nodes: onnx.NodeProto, weights: tuple[onnx.TensorProto, ...]) -> onnx.ModelProto:
    """The net with something else going on beside it."""
    return net([node("Relu", ["a"], ["b"], name="relu"), *nodes], weights)


@strange
def big_expand() -> onnx.ModelProto:
    one = weight("one", 1, 1)
    return aside(node("Expand", ["one", "shape"], ["big"]), weights=(one, ints("shape", BIG, BIG)))


@strange
def big_constant_of_shape() -> onnx.ModelProto:
    return aside(node("ConstantOfShape", ["shape"], ["big"]), weights=(ints("shape", BIG, BIG),))


@strange
def big_range() -> onnx.ModelProto:
    limits = [numpy_helper.from_array(np.array(v), k) for k, v in {"from": 0, "to": 10**13, "by": 1}.items()]
    return aside(
        node("Range", ["from", "to", "by"], ["big"]),
        node("Gather", ["a", "big"], ["g"], axis=1),
        weights=tuple(limits),
    )


@strange
def big_tile() -> onnx.ModelProto:
    return aside(
        node("Tile", ["index", "times"], ["big"]),
        node("Gather", ["a", "big"], ["g"], axis=1),
        weights=(ints("index", 0, 1), ints("times", 10**13)),
    )


@strange
def big_tile_of_the_image() -> onnx.ModelProto:
    nodes = [node("Tile", ["a", "times"], ["t"]), node("ReduceMax", ["t"], ["b"], axes=[2, 3])]
    return net(nodes, [ints("times", 1, 1, BIG, BIG)])


@strange
def big_pad() -> onnx.ModelProto:
    return net([node("Pad", ["a", "pads"], ["b"])], [ints("pads", 0, 0, 0, 0, 0, 0, BIG, BIG)])


@strange
def big_resize() -> onnx.ModelProto:
    scales = numpy_helper.from_array(np.array([1, 1, 1e8, 1e8], np.float32), "scales")
    return net([node("Resize", ["a", "", "scales"], ["b"])], [scales])


@strange
def big_one_hot() -> onnx.ModelProto:
    values = numpy_helper.from_array(np.array([0, 1], np.float32), "values")
    return aside(
        node("OneHot", ["index", "depth", "values"], ["big"]),
        weights=(ints("index", 0, 1), ints("depth", 10**14), values),
    )


@strange
def channels_doubled_40_times() -> onnx.ModelProto:
    nodes, last = [], "a"
    for i in range(40):
        nodes.append(node("Concat", [last, last], [f"c{i}"], axis=1))
        last = f"c{i}"
    nodes += [node("ReduceMax", [last], ["top"], axes=[1]), node("Mul", ["a", "top"], ["b"])]
    return net(nodes)


@pytest.mark.parametrize(("build", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_graphs_are_refused(build: Build, words: tuple[str, ...], tmp_path: Path) -> None:
    refused(write(build(), tmp_path / "model.onnx"), *words)


@pytest.mark.parametrize("build", BROKEN.keys())
def test_broken_graphs_stop_no_command_rudely(build: str, tmp_path: Path) -> None:
    _every_command(write(BROKEN[build][0](), tmp_path / "model.onnx"))


@pytest.mark.parametrize("build", STRANGE.values(), ids=STRANGE.keys())
def test_strange_graphs_never_crash(build: Build, tmp_path: Path) -> None:
    path = write(build(), tmp_path / "model.onnx")
    result = shrink(path)
    if result.exit_code == 0:
        load(path.with_name("model.pruned.onnx"))
    else:
        check_refused(result, path, code=result.exit_code)
        assert result.exit_code in (2, 4)
        assert list(listing(tmp_path)) == ["model.onnx"]
    _every_command(path)


def _every_command(path: Path) -> None:
    commands: list[tuple[object, ...]] = [
        ("inspect", path),
        ("inspect", path, "--json"),
        ("inspect", path, "--why", "conv1"),
        ("fold", path, "-o", path.with_name("folded.onnx")),
    ]
    for command in commands:
        result = run(*command)
        if result.exit_code:
            check_refused(result, code=result.exit_code)
            assert result.exit_code in (2, 4)


def test_integers_that_double_60_times_stay_small(tmp_path: Path) -> None:
    """The analysis does not follow 2^60 values; what onnxruntime makes of it is not tried here."""
    nodes, last = [], "index"
    for i in range(60):
        nodes.append(node("Concat", [last, last], [f"c{i}"], axis=0))
        last = f"c{i}"
    path = write(aside(*nodes, weights=(ints("index", 0, 1),)), tmp_path / "model.onnx")
    done = _command("inspect", path, memory=4 << 30)
    assert done.returncode == 0, done.stderr


def test_huge_tensors_are_not_allocated(tmp_path: Path) -> None:
    """A billion elements, far from what a process of 3 GB can hold twice, pass through the analysis."""
    one = weight("one", 1, 1)
    nodes = [node("Expand", ["one", "shape"], ["big"]), node("ReduceMax", ["big"], ["top"], keepdims=0)]
    proto = net([*nodes, node("Mul", ["a", "top"], ["b"])], [one, ints("shape", 1, BIG)])
    path = write(proto, tmp_path / "model.onnx")
    done = _command("plan", path, "--channels", 0.5, "--align", 1, "-o", "-", memory=3 << 30)
    assert done.returncode == 0, done.stderr


def _command(*arguments: object, memory: int = 0, file_size: int = 0, **environment: str) -> Any:
    def limit() -> None:
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        if file_size:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.run(
        [sys.executable, "-m", "onnxprune", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
        env={**os.environ, "TMPDIR": tempfile.gettempdir(), **environment},
    )


# ---------------------------------------------------------------------------------- names on the terminal


def test_names_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    evil = "w\x1b]0;owned\x07\x1b[2J1\r\nonnxprune: all is well \u202e[bold][/red]:smile:"

    def rename(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].name = proto.graph.node[0].input[1] = evil
        proto.graph.node[0].name = "conv\x1b[31m\nfake line [/conv]"

    path = write(changed(rename), tmp_path / "model.onnx")
    for command in (("inspect", path), ("inspect", path, "--why", "*"), ("inspect", path, "--json")):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert all(line.isprintable() for line in result.output.split("\n"))
        assert not any(line.startswith(("onnxprune:", "fake")) for line in result.output.split("\n"))
    values = np.full((8, 3, 3, 3), np.nan, np.float32)
    broken_too = changed(
        lambda m: (rename(m), m.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, evil)))
    )
    refused(write(broken_too, tmp_path / "model.onnx"), r"w\x1b]0;owned\x07", "NaN")


# ------------------------------------------------------------------------------------------ external data


def stored_outside(folder: Path, location: str = "weights.bin", **info: object) -> Path:
    """The net with its first weight in another file; `info` overrides what is said about it."""
    proto = net()
    tensor = proto.graph.initializer[0]
    folder.mkdir(exist_ok=True)
    (folder / "weights.bin").write_bytes(b"\0" * 64 + tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 64, "length": 864, **info}.items():
        tensor.external_data.add(key=key, value=str(value))
    return write(proto, folder / "model.onnx")


def test_external_data_is_read(tmp_path: Path) -> None:
    path = stored_outside(tmp_path)
    assert load(path).digest() == load(write(net(), tmp_path / "plain.onnx")).digest()
    assert shrink(path).exit_code == 0


def test_external_data_with_keys_of_onnxruntime(tmp_path: Path) -> None:
    result = shrink(stored_outside(tmp_path, prepacked_0="x|0|4|1"))
    assert result.exit_code == 0
    assert result.stderr == ""


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    path = stored_outside(tmp_path)
    (tmp_path / "weights.bin").unlink()
    refused(path, "'weights.bin' of tensor 'w1' is missing", "beside the model")
    refused(stored_outside(tmp_path, location=""), "tensor 'w1' is missing")


@pytest.mark.parametrize(
    "where", ["absolute", "up", "up and down", "link", "hard link", "linked folder", "folder"]
)
def test_external_data_outside_the_folder(where: str, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(1000))
    location = {
        "absolute": str(secret),
        "up": "../secret.bin",
        "up and down": "../inside/../secret.bin",
        "linked folder": "linked/secret.bin",
        "folder": ".",
    }.get(where, "linked.bin")
    path = stored_outside(inside, location=location)
    if where == "link":
        (inside / "linked.bin").symlink_to(secret)
    elif where == "hard link":
        (inside / "linked.bin").hardlink_to(secret)
    elif where == "linked folder":
        (inside / "linked").symlink_to(tmp_path)
    refused(path, f"external data '{location}' of tensor 'w1' is not a plain file", "copy it there")


@pytest.mark.parametrize(
    "info",
    [
        {"length": 860},
        {"length": 868},
        {"length": 10**18},
        {"length": -1},
        {"length": "many"},
        {"offset": 100},
        {"offset": 10**18},
        {"offset": -1},
        {"offset": "1e3"},
    ],
    ids=str,
)
def test_external_data_of_another_size(info: dict[str, object], tmp_path: Path) -> None:
    refused(stored_outside(tmp_path, **info), "'weights.bin' of tensor 'w1'")


def test_external_data_goes_out_as_it_came_in(tmp_path: Path) -> None:
    path = stored_outside(tmp_path)
    assert shrink(path, "-o", tmp_path / "small.onnx").exit_code == 0
    assert (tmp_path / "small.onnx.data").stat().st_size == 432
    assert load(tmp_path / "small.onnx").external.keys() == {"w1"}


def test_external_data_of_the_input_is_not_overwritten(tmp_path: Path) -> None:
    path = stored_outside(tmp_path, location="small.onnx.data")
    (tmp_path / "weights.bin").rename(tmp_path / "small.onnx.data")
    before = listing(tmp_path)
    check_refused(shrink(path, "-o", tmp_path / "small.onnx"), "overwrite the input (small.onnx.data)")
    assert listing(tmp_path) == before


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--channels", "1"], "--channels 1.0: the share to remove lies in [0, 1)"),
        (["--channels", "-0.1"], "[0, 1)"),
        (["--channels", "30"], "[0, 1)"),
        (["--channels", "nan"], "[0, 1)"),
        (["--channels", "inf"], "[0, 1)"),
        (["--channels", "a third"], "not a valid float"),
        (["--macs", "0"], "--macs 0.0: the share to keep lies in (0, 1]"),
        (["--macs", "1.5"], "(0, 1]"),
        (["--macs", "nan"], "(0, 1]"),
        (["--params", "-1"], "(0, 1]"),
        (["--macs", "0.0001"], "--macs 0.0001 cannot be reached; the least possible here is 0."),
        (["--params", "0.0001"], "--params 0.0001 cannot be reached"),
        ([], "say what to remove"),
        (["--channels", "0.5", "--macs", "0.5"], "or one of --macs, --params and --bytes"),
        (["--macs", "0.5", "--params", "0.5"], "or one of --macs, --params and --bytes"),
        (["--heads", "0.5", "--params", "0.5"], "or one of --macs, --params and --bytes"),
        (["--heads", "1"], "--heads 1.0: the share to remove lies in [0, 1)"),
        (["--head-width", "-1"], "--head-width -1.0"),
        (["--ffn", "nan"], "--ffn nan"),
        (["--hidden", "2"], "--hidden 2.0"),
        (["--layers", "0"], "--layers 0: give a whole number, a share below 1, or names"),
        (["--layers", "1.5"], "--layers 1.5"),
        (["--layers", "inf"], "--layers inf"),
        (["--layers", "1"], "there are 0 residual blocks"),
        (["--layers", "/encoder/*"], "no residual block that can go has a node of this name"),
        (["--layers", "1", "--layer-criterion", "best"], "'best'"),
        (["--channels", "0.5", "--align", "0"], "--align 0"),
        (["--channels", "0.5", "--align", "-4"], "--align -4"),
        (["--channels", "0.5", "--align", "1.5"], "not a valid integer"),
        (["--channels", "0.5", "--min-channels", "0"], "--min-channels 0"),
        (["--channels", "0.5", "--criterion", "best"], "'best'"),
        (["--channels", "0.5", "--allocation", "fair"], "'fair'"),
        (["--channels", "0.5", "--repair", "magic"], "'magic'"),
        (["--channels", "0.5", "--seed", "x"], "--seed"),
        (["--channels", "0.5", "--seed", "-1"], "--seed"),
        (["--chanels", "0.5"], "--channels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_out_of_range(options: list[str], words: str, model: Path) -> None:
    before = listing(model.parent)
    for command in (("shrink", model), ("plan", model, "-o", model.with_name("plan.json"))):
        check_refused(run(*command, *options), words)
    assert listing(model.parent) == before


@pytest.mark.parametrize(
    "options", [["--channels", "0"], ["--channels", "0.5", "--include", "nowhere"], ["--macs", "1"]], ids=str
)
def test_nothing_to_remove_writes_nothing(options: list[str], model: Path) -> None:
    before = listing(model.parent)
    for command in (
        ("shrink", model),
        ("shrink", model, "--dry-run"),
        ("plan", model, "-o", model.with_name("p")),
    ):
        check_refused(run(*command, *options), model, "1 group", "nothing", code=4)
    assert listing(model.parent) == before


# ------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("form", ["same", "relative", "link", "hard link"])
@pytest.mark.parametrize("command", ["shrink", "fold", "apply", "plan"])
def test_an_output_that_is_the_input(
    command: str, form: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    plan = model.with_name("plan.json")
    assert run("plan", model, "--channels", 0.5, "--align", 1, "-o", plan).exit_code == 0
    target = {"same": model, "relative": Path("../" + model.parent.name) / "model.onnx"}.get(form)
    if target is None:
        target = model.with_name("other.onnx")
        (target.symlink_to if form == "link" else target.hardlink_to)(model)
    before = listing(model.parent)
    arguments = {"apply": [model, plan], "fold": [model]}.get(
        command, [model, "--channels", 0.5, "--align", 1]
    )
    check_refused(run(command, *arguments, "-o", target), target, "the output is the input")
    if command == "apply":
        check_refused(run(command, *arguments, "-o", plan), plan, "the output is the input")
        check_refused(
            run(command, *arguments, "-o", "o.onnx", "--json", plan), plan, "the output is the input"
        )
    assert listing(model.parent) == before


def test_data_are_inputs(model: Path) -> None:
    """Whatever a command reads it does not write over: data, plans and files of weights are as safe as models."""
    folder = model.parent
    data, plan, small = folder / "data.npz", folder / "plan.json", folder / "small.onnx"
    np.savez(data, x=np.zeros((4, 3, 8, 8), np.float32), labels=np.zeros(4, np.int64))
    made = shrink(model, "-o", small, "--plan-out", plan, "--channels", 0.5, "--align", 1)
    assert made.exit_code == 0, made.output
    proto = onnx.load(model)
    whole = folder / "whole.onnx"
    onnx.save(proto, whole, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused = "the output is the input"
    for arguments in (
        ("shrink", model, "--channels", 0.5, "--data", data, "--json", data),
        ("shrink", model, "--channels", 0.5, "--eval", data, "--html", data),
        ("plan", model, "--channels", 0.5, "--data", data, "-o", data),
        ("apply", model, plan, "--data", data, "-o", data),
        ("quantize", model, "--data", data, "--json", data),
        ("sensitivity", model, "--data", data, "-o", data),
        ("validate", model, small, "--data", data, "--html", data),
        ("validate", model, small, "--plan", plan, "--html", plan),
        ("validate", whole, small, "--html", folder / "weights.bin"),
    ):
        check_refused(run(*arguments), refused)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_outputs_that_cannot_be(model: Path) -> None:
    folder = model.parent
    before = listing(folder)
    check_refused(shrink(model, "-o", folder / "no" / "small.onnx"), "no does not exist; create it")
    check_refused(shrink(model, "-o", folder), "is a directory")
    check_refused(shrink(model, "-o", "-"), "standard output")
    check_refused(shrink(model, "-o", folder / "a", "--plan-out", folder / "a"), "two outputs")
    check_refused(shrink(model, "--plan-out", "-", "--json", "-"), "two outputs")
    check_refused(shrink(model, "--plan-out", folder / "no" / "plan.json"), "no does not exist")
    check_refused(shrink(model, "--json", model), "the output is the input")
    check_refused(shrink(model, "-o", folder / ("long" * 100)), "File name too long")
    assert listing(folder) == before


def test_pipes_stay_and_links_are_followed(model: Path) -> None:
    """Neither a device nor a pipe is a model, or is replaced by one."""
    folder = model.parent
    pipe, link, real = folder / "pipe", folder / "link.onnx", folder / "real.onnx"
    os.mkfifo(pipe)
    link.symlink_to(real)
    check_refused(run("inspect", pipe), "a device or a pipe")
    for option in ("-o", "--json", "--html", "--plan-out"):
        check_refused(shrink(model, option, pipe), "a device or a pipe")
    check_refused(shrink(model, "-o", "/dev/null"), "a device or a pipe")
    assert pipe.is_fifo()
    assert Path("/dev/null").is_char_device()
    assert not real.exists()
    assert shrink(model, "-o", link).exit_code == 0
    assert link.is_symlink()
    assert run("inspect", real).exit_code == 0


def test_a_table_of_times_is_an_output_too(model: Path) -> None:
    small, table = model.with_name("small.onnx"), model.parent / "no" / "table.json"
    options = ("--latency", 0.6, "--latency-table")
    check_refused(run("shrink", model, *options, small, "-o", small), "two outputs have the same path")
    check_refused(run("shrink", model, *options, table, "-o", small), "no does not exist")
    assert not small.exists()
    assert not table.parent.exists()


def test_an_output_in_the_way_survives_a_failure(tmp_path: Path) -> None:
    """What stood at the output's place is replaced at the end, or not at all."""
    path = write(weights_nan(), tmp_path / "model.onnx")
    (tmp_path / "model.pruned.onnx").write_bytes(b"yesterday")
    refused(path, "NaN")


def test_a_full_disk(tmp_path: Path) -> None:
    """On a file system of 64 kB: no output, no half an output, nothing temporary."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system; the limit on file sizes is tested below")
    try:
        path = write(_wide(), tmp_path / "model.onnx")
        (disk / "small.onnx").write_bytes(b"yesterday")
        before = listing(disk)
        plan = ("--plan-out", disk / "plan.json")
        check_refused(shrink(path, "-o", disk / "small.onnx", *plan), "disk is full", "nothing was written")
        check_refused(run("fold", path, "-o", disk / "small.onnx"), "disk is full", "nothing was written")
        path = stored_outside(tmp_path)
        assert listing(disk) == before
        (disk / "filler").write_bytes(bytes(60 * 1024))
        check_refused(shrink(path, "-o", disk / "small.onnx"), "small.onnx", "disk is full")
        assert list(listing(disk)) == ["filler", "small.onnx"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _wide() -> onnx.ModelProto:
    wider = [node("Conv", ["a", "k1"], ["t"], name="k1"), node("Conv", ["t", "k2"], ["b"], name="k2")]
    return net(wider, [weight("k1", 512, 8, 3, 3), weight("k2", 8, 512, 3, 3)])


@pytest.mark.parametrize("command", ["shrink", "plan", "fold"])
def test_a_limit_on_file_sizes(command: str, tmp_path: Path) -> None:
    """The kernel refuses to write more than 200 bytes to a file, as where a disk or a quota is full."""
    path = write(_wide(), tmp_path / "model.onnx")
    before = listing(tmp_path)
    options = () if command == "fold" else ("--channels", 0.5, "--align", 1)
    done = _command(command, path, *options, "-o", tmp_path / "out", file_size=200)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert done.stderr.count("\n") == 1
    assert listing(tmp_path) == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_nothing(stop: signal.Signals, tmp_path: Path, temporary: Path) -> None:
    path = write(vgg16_bn(width=0.5, image=96, classes=10), tmp_path / "model.onnx")
    before = set(listing(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxprune", "shrink", str(path), "--channels", "0.5", "--align", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        preexec_fn=lambda: signal.signal(stop, signal.SIG_DFL),  # which whoever runs the tests may ignore
    )
    for _ in range(2000):  # until it has a temporary file open, in the middle of the check
        if list(temporary.iterdir()) or process.poll() is not None:
            break
        time.sleep(0.005)
    process.send_signal(stop)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "onnxprune: interrupted; nothing was written\n"
    assert output == ""
    assert set(listing(tmp_path)) == before


# --------------------------------------------------------------------------------------------------- plans


Document = dict[str, Any]
Spoil = Callable[[Document], object]


def plan_of(model: Path) -> Document:
    path = model.with_name("good.json")
    assert run("plan", model, "--channels", 0.5, "--align", 1, "-o", path).exit_code == 0
    document: Document = json.loads(path.read_text())
    return document


def apply(model: Path, document: object) -> Any:
    text = document if isinstance(document, str) else json.dumps(document)
    plan = model.with_name("plan.json")
    plan.write_text(text, encoding="utf-8", errors="surrogatepass")
    return run("apply", model, plan, "-o", model.with_name("small.onnx"))


def put(**values: object) -> Spoil:
    return lambda document: {**document, **{k.replace("_", "-"): v for k, v in values.items()}}


def edit(**values: object) -> Spoil:
    return lambda document: {**document, "edits": [{**document["edits"][0], **values}]}


def without(key: str) -> Spoil:
    return lambda document: {k: v for k, v in document.items() if k != key}


DEEP = "[" * 100_000
HOSTILE_PLANS: dict[str, Spoil] = {
    "a list": lambda d: [d],
    "a number": lambda d: 7,
    "a string": lambda d: '"plan"',
    "null": lambda d: None,
    "not JSON": lambda d: "units: 1-3",
    "cut short": lambda d: json.dumps(d)[:-20],
    "nested 100,000 deep": lambda d: DEEP,
    "nested deep inside": lambda d: json.dumps(d)[:-1] + f', "more": {DEEP}',
    "no format": without("onnxprune-plan"),
    "newer format": put(onnxprune_plan=99),
    "no edits": without("edits"),
    "edits that are a number": put(edits=3),
    "edits that are strings": put(edits=["x"]),
    "edits that are null": put(edits=[None]),
    "no model": without("model"),
    "options that are a list": put(options=[1, 2]),
    "negative units": edit(units="-1"),
    "a negative range": edit(units="-3--1"),
    "units beyond the group": edit(units="0-8"),
    "a range of 10^18": edit(units="0-999999999999999999", of=10**18),
    "many ranges of 10^6": edit(units=",".join(["0-999999"] * 1000), of=10**6),
    "units twice": edit(units="1,1"),
    "overlapping ranges": edit(units="0-3,2-5"),
    "a backward range": edit(units="5-2"),
    "no units": edit(units=""),
    "an open range": edit(units="3-"),
    "fractions": edit(units="0.5"),
    "units as a list": edit(units=[0, 1]),
    "units as null": edit(units=None),
    "size as a string": edit(of="8"),
    "size as a fraction": edit(of=8.5),
    "size as true": edit(of=True),
    "size infinite": edit(of=float("inf")),
    "size of 5,000 digits": lambda d: json.dumps(d).replace('"of": 8', '"of": ' + "9" * 5000),
    "size negative": edit(of=-8),
    "another size": edit(of=9),
    "another group": edit(keep="ghost:0"),
    "a group that is a list": edit(keep=["w1"]),
    "a group named by half a surrogate": edit(keep="\ud800"),
    "a group with control characters": edit(keep="w1\x1b[2J\n:0"),
    "unknown kind": edit(kind="rough"),
    "the same group twice": lambda d: {**d, "edits": d["edits"] * 2},
}


@pytest.mark.parametrize("spoil", HOSTILE_PLANS.values(), ids=HOSTILE_PLANS.keys())
def test_hostile_plans(spoil: Spoil, model: Path) -> None:
    check_refused(apply(model, spoil(plan_of(model))), "make")
    assert "small.onnx" not in listing(model.parent)


def test_a_plan_that_removes_nothing(model: Path) -> None:
    document = plan_of(model)
    for edits in ([], [{**document["edits"][0], "units": "0-7"}]):
        check_refused(apply(model, {**document, "edits": edits}), "removes nothing", code=4)


def test_a_plan_made_for_another_model(model: Path) -> None:
    document = plan_of(model)
    other = write(
        changed(lambda m: _raw(m, m.graph.initializer[0].raw_data[::-1])), model.with_name("other.onnx")
    )
    check_refused(apply(other, document), other, "made for another model", "make the plan again")
    result = run("validate", other, model, "--plan", model.with_name("good.json"))
    check_refused(result, other, "made for another model")


def test_a_plan_that_is_no_file(model: Path) -> None:
    check_refused(
        run("apply", model, model.with_name("none.json"), "-o", "x.onnx"), "none.json", "cannot be read"
    )
    check_refused(run("apply", model, model, "-o", model.with_name("x.onnx")), model, "not a plan")
    check_refused(run("apply", model, model.parent, "-o", model.with_name("x.onnx")), "is a directory")


def test_a_plan_edited_by_hand_is_used(model: Path) -> None:
    document = plan_of(model)
    document["edits"][0]["units"] = " 7, 0-1 ,3"
    assert apply(model, document).exit_code == 0
    assert load(model.with_name("small.onnx")).array("w1").shape == (4, 3, 3, 3)


def test_weights_listed_as_inputs_of_no_shape(tmp_path: Path) -> None:
    """Before IR 4 every weight is an input too; nothing forces the file to state its shape there."""
    proto = net(opset=8, ir=3)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, None))
    path = write(proto, tmp_path / "model.onnx")
    assert shrink(path).exit_code == 0
    assert load(tmp_path / "model.pruned.onnx").array("w1").shape == (4, 3, 3, 3)


@pytest.mark.parametrize("keep", [0, 1, 2, 107])
def test_flags_beyond_one_mean_what_onnxruntime_takes_them_for(keep: int, tmp_path: Path) -> None:
    back = [node("Unsqueeze", ["m"], ["mm"], axes=[2, 3])] if keep != 1 else [node("Identity", ["m"], ["mm"])]
    reduced = node("ReduceMax", ["a"], ["m"], axes=[2, 3], keepdims=keep)
    path = write(net([reduced, *back], last="mm", opset=12), tmp_path / "model.onnx")
    assert shrink(path).exit_code == 0
