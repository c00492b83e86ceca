"""TensorRT-RTX parses and builds without a GPU: what it takes, what it refuses, and what was foreseen of that.

Running needs a CUDA device; `test_outputs_are_those_of_onnxruntime` is skipped, and says so, where there is none.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper, numpy_helper

from models.control_flow import CONTROL_FLOW
from models.quantised import QUANTISED
from models.transformers import TRANSFORMERS
from onnxprune import model as models
from onnxprune.errors import UserError
from onnxprune.runtime import RunError, Session
from onnxprune.targets import half_program, tensorrt
from onnxprune.targets.cuda_driver import Stream, gpu
from onnxprune.targets.half import Half, converted, converter, rehearsal
from onnxprune.targets.ranges import BATCH, ranges_of
from onnxprune.targets.target import TargetError
from onnxprune.targets.tensorrt import PORTABLE, WIDTHS, TensorRt
from tests.small import run as onnxprune
from tests.target_models import (
    OTHER,
    SMALL,
    broken,
    convolutions,
    error,
    other_than_numbers,
    symmetric,
    truth,
    written,
)

BUILT = [name for name in SMALL if name != "integers"]
DEVICE = gpu()


def asked(name: str) -> TensorRt:
    return TensorRt("int8" if name == "quantised" else "fp32")


@pytest.mark.parametrize("name", BUILT)
def test_what_it_does_not_object_to_is_built(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    target = asked(name)
    assert target.objections(models.load(path)) == []
    report = target.build(path)
    assert report["bytes"] > 10_000
    assert report["layers"] > 3
    assert report["engine"] is None
    assert list(tmp_path.iterdir()) == [path]


def test_a_pruned_model_is_built_and_smaller(tmp_path: Path) -> None:
    path, small = written(convolutions(channels=64), tmp_path), tmp_path / "small.onnx"
    assert onnxprune("shrink", path, "-o", small, "--channels", 0.5, "--align", 1).exit_code == 0
    before, after = TensorRt().build(path), TensorRt().build(small)
    assert before["model"] != after["model"]
    assert after["bytes"] < before["bytes"]


def test_the_engine_lies_beside_what_it_is_built_for(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    output = tmp_path / "model.engine"
    report = TensorRt().build(path, output)
    assert output.stat().st_size == report["bytes"]
    assert json.loads((tmp_path / "model.engine.json").read_text()) == report
    assert report["version"] == f"TensorRT-RTX {tensorrt_rtx.__version__}"
    assert report["built_for"] == [f"SM{capability}" for capability in PORTABLE]
    assert report["precision"] == "fp32"
    assert report["model"] == models.load(path).digest()
    low, likely, high = (report["profile"]["image"][key] for key in ("min", "opt", "max"))
    assert (low[0], high[0], low[1:]) == (1, BATCH, [3, 12, 12])
    assert low[0] <= likely[0] <= high[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.engine", "model.engine.json", "model.onnx"]


def test_a_refusal_leaves_the_engine_that_was_there(tmp_path: Path) -> None:
    output = tmp_path / "model.engine"
    TensorRt().build(written(convolutions(), tmp_path), output)
    before = output.read_bytes(), (tmp_path / "model.engine.json").read_bytes()
    with pytest.raises(TargetError):
        TensorRt().build(written(broken(), tmp_path), output)
    assert (output.read_bytes(), (tmp_path / "model.engine.json").read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 3


def test_the_model_is_not_overwritten(tmp_path: Path) -> None:
    path = written(convolutions(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="overwrite the input"):
        TensorRt().build(path, path)
    assert path.read_bytes() == before


def test_a_broken_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        TensorRt().build(written(broken(), tmp_path))
    assert "conv" in f"{caught.value}".lower()
    assert f"{caught.value}".isprintable()
    assert "cudaError" not in f"{caught.value}"


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(TargetError):
        TensorRt().build(path)


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_outputs_that_are_no_tensors_of_numbers_are_refused(
    precision: str, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(TargetError) as caught:
        TensorRt(precision).build(written(other_than_numbers(kind), tmp_path))
    assert f"{caught.value}".isprintable()


def test_an_engine_says_that_the_processor_only_waits_for_it(tmp_path: Path) -> None:
    """Else its processor time, which is next to nothing, makes the machine look contended."""
    plan = tensorrt._compile(written(convolutions(), tmp_path), "fp16", portable=True)
    settings = tensorrt._settings(plan, "a GPU", 1)
    assert settings["on_cpu"] is False
    assert {key: settings[key] for key in ("device", "precision", "version", "profile", "converted")} == {
        "device": "a GPU"
    } | {key: plan.report[key] for key in ("precision", "version", "profile", "converted")}


# Precisions are those of the file


def of_type(proto: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The model with all its floats in another type, inputs and outputs included."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    del proto.graph.value_info[:]
    return proto


TYPED = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.mark.parametrize("stored", TYPED)
@pytest.mark.parametrize("precision", TensorRt.precisions)
def test_a_precision_asks_for_a_file_of_that_type(stored: str, precision: str, tmp_path: Path) -> None:
    proto = of_type(convolutions(), TYPED[stored])
    if stored == "bf16":
        proto.opset_import[0].version, proto.ir_version = 22, 10
    path = written(proto, tmp_path)
    target = TensorRt(precision)
    if stored == precision or (stored, precision) in (("fp32", "tf32"), ("fp32", "fp16")):
        assert target.objections(models.load(path)) == []
        report = target.build(path)
        assert report["precision"] == precision
        assert ("converted" in report) == (stored != precision == "fp16")
        return
    (objection,) = target.objections(models.load(path))
    assert f"tensorrt:{stored}" in objection
    with pytest.raises(TargetError) as caught:
        target.build(path)
    assert f"{caught.value}" == objection


def test_a_quantised_file_is_int8(tmp_path: Path) -> None:
    path = written(symmetric(), tmp_path)
    with pytest.raises(TargetError, match="ask for tensorrt:int8"):
        TensorRt().build(path)
    assert TensorRt("int8").build(path)["precision"] == "int8"


@pytest.mark.parametrize("precision", TensorRt.precisions)
def test_narrow_types_ask_for_wider_blocks(precision: str) -> None:
    alignment = TensorRt(precision).alignment()
    bits = {"int8": 8, "fp16": 16, "bf16": 16}.get(precision, 32)
    assert alignment.products * bits == 128  # tensor cores read 16 bytes at once


# Float32 files in fp16


def plain(
    nodes: Sequence[onnx.NodeProto], weights: dict[str, Any], extents: Sequence[int | str] = ("batch", 16)
) -> onnx.ModelProto:
    """From x to y, both float32 of one shape."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, extents) for name in "xy"]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "plain", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=outputs.split()[0], **attributes)


def matrix(scale: float = 0.25) -> np.ndarray:
    return (np.random.default_rng(1).standard_normal((16, 16)) * scale).astype(np.float32)


def half(proto: onnx.ModelProto) -> Half:
    return converted(models.Model(proto), TensorRt("fp16").tolerance)


def initializer(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name))


@pytest.mark.parametrize("name", ["convolutions", "transformer", "lstm"])
def test_a_float32_file_is_built_in_half(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    before, searched = path.read_bytes(), list(sys.path)
    target = TensorRt("fp16")
    assert target.objections(models.load(path)) == []
    report = target.build(path, tmp_path / "model.engine")
    assert report["converted"] == {"types": "fp32 -> fp16", "float32": [], "clipped": []}
    assert report["model"] == models.load(path).digest()
    assert path.read_bytes() == before
    assert sys.path == searched
    copy = half(onnx.load(path)).proto
    original = onnx.load(path).graph
    for these, those in ((copy.graph.input, original.input), (copy.graph.output, original.output)):
        assert [v.SerializeToString() for v in these] == [v.SerializeToString() for v in those]
    kinds = {tensor.name: tensor.data_type for tensor in copy.graph.initializer}
    matrices = [t.name for t in original.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]
    assert {kinds[matrix] for matrix in matrices} == {TensorProto.FLOAT16}


def test_the_engine_holds_half_the_bytes(tmp_path: Path) -> None:
    path = written(convolutions(channels=128), tmp_path)
    weights = sum(4 * np.prod(t.dims) for t in onnx.load(path).graph.initializer)
    assert TensorRt("fp16").build(path)["bytes"] < TensorRt().build(path)["bytes"] - weights / 3


def test_a_weight_that_half_cannot_hold_stays(tmp_path: Path) -> None:
    weight = matrix()
    weight[3, 3] = 1e5
    nodes = [node("Mul", "x k", "b"), node("MatMul", "b w", "a"), node("MatMul", "a v", "y")]
    proto = plain(nodes, {"k": np.float32(0.001), "w": weight, "v": matrix()})
    made = half(proto)
    assert made.kept == ("MatMul 'a'",)
    assert made.clipped == ()
    assert (initializer(made.proto, "w") == weight).all()
    assert initializer(made.proto, "v").dtype == np.float16
    report = TensorRt("fp16").build(written(proto, tmp_path))
    assert report["converted"]["float32"] == ["MatMul 'a'"]


def overflowing() -> onnx.ModelProto:
    """Squares of about 6e7, and a matrix that makes small numbers of them."""
    nodes = [node("MatMul", "x w", "a"), node("Mul", "a a", "square"), node("MatMul", "square v", "y")]
    return plain(nodes, {"w": matrix(2000), "v": np.abs(matrix(1e-4))})


def test_what_overflows_stays_and_onnxruntime_alone_would_not_tell(tmp_path: Path) -> None:
    made = half(overflowing())
    assert made.kept == ("Mul 'square'", "MatMul 'y'")
    naive = converter()[1](overflowing(), keep_io_types=True)
    feeds = {"x": np.random.default_rng(2).standard_normal((2, 16)).astype(np.float32)}
    naive.graph.output.append(onnx.ValueInfoProto(name="square"))
    found = Session(naive).run(feeds)
    assert np.isfinite(found["y"]).all()
    assert np.isinf(found["square"]).any()
    assert TensorRt("fp16").build(written(overflowing(), tmp_path))["bytes"] > 10_000


def test_nothing_in_float32_goes_through_half() -> None:
    """The square is beyond half; both nodes that touch it are in float32, and read it from each other."""
    made = half(overflowing()).proto
    (product,) = [n for n in made.graph.node if n.name == "y"]
    (square,) = [n for n in made.graph.node if n.name == "square"]
    assert square.output[0] in product.input
    feeds = {"x": np.random.default_rng(2).standard_normal((2, 16)).astype(np.float32)}
    want, got = Session(overflowing()).run(feeds)["y"], Session(made).run(feeds)["y"]
    assert np.abs(want - got).max() < 0.01 * np.abs(want).max()


def test_what_is_wrong_in_half_is_refused(tmp_path: Path) -> None:
    path = written(plain([node("MatMul", "x w", "y")], {"w": matrix(1e-9)}), tmp_path)
    with pytest.raises(TargetError, match=r"in fp16 output 'y' is off by .+ask for tensorrt:fp32"):
        TensorRt("fp16").build(path, tmp_path / "model.engine")
    assert list(tmp_path.iterdir()) == [path]
    assert TensorRt().build(path)["bytes"] > 10_000


@pytest.mark.parametrize("chained", [False, True])
def test_the_rehearsal_rounds_as_float16_does(chained: bool) -> None:
    """Of single sums and products numpy's float16 is the same: computed in float32 and rounded."""
    k = np.float32(1.7) if chained else np.float32(1)
    made = half(
        plain(
            [node("MatMul", "x w", "a"), node("Mul", "a k", "y")], {"w": np.eye(16, dtype=np.float32), "k": k}
        )
    )
    x = np.random.default_rng(3).standard_normal((4, 16)).astype(np.float32)
    got = Session(rehearsal(made.proto)).run({"x": x})["y"]
    assert (got == (x.astype(np.float16) * k.astype(np.float16)).astype(np.float32)).all()
    assert (got != x * k).any()


def test_fills_of_masks_are_clipped_and_told() -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Greater", "x zero", "m"),
        node("Where", "m a fill", "s"),
        node("Softmax", "s", "y"),
    ]
    fill = np.float32(np.finfo(np.float32).min)
    made = half(plain(nodes, {"w": matrix(), "zero": np.float32(0), "fill": fill}))
    assert (made.kept, made.clipped) == ((), ("fill",))
    assert initializer(made.proto, "fill") == -65504


def test_extents_are_not_computed_in_half(tmp_path: Path) -> None:
    """3001 is no number of float16, and would be 3000."""
    nodes = [
        node("MatMul", "x w", "a"),
        node("Shape", "a", "s"),
        node("Cast", "s", "f", to=TensorProto.FLOAT),
        node("Mul", "f one", "g"),
        node("Cast", "g", "i", to=TensorProto.INT64),
        node("Expand", "tiny i", "e"),
        node("Add", "a e", "y"),
    ]
    weights = {"w": matrix(), "one": np.float32([1, 1]), "tiny": np.float32([[0.01]])}
    proto = plain(nodes, weights, (3001, 16))
    naive = converter()[1](proto, keep_io_types=True)
    x = {"x": np.ones((3001, 16), np.float32)}
    with pytest.raises(RunError):
        Session(rehearsal(models.Model(naive).source)).run(x)
    assert Session(half(plain(nodes, weights, (3001, 16))).proto).run(x)["y"].shape == (3001, 16)
    assert TensorRt("fp16").build(written(plain(nodes, weights, (3001, 16)), tmp_path))["layers"] > 3


def test_operators_without_half_stay_also_where_they_share_an_input(tmp_path: Path) -> None:
    nodes = [
        node("Constant", "", "k", value_ints=[16]),
        node("MatMul", "x w", "a"),
        node("TopK", "a k", "best i"),
        node("TopK", "a k", "worst j", largest=0),
        node("Constant", "", "scale", value_float=0.5),
        node("Mul", "best scale", "b"),
        node("Add", "b worst", "y"),
    ]
    path = written(plain(nodes, {"w": matrix()}), tmp_path)
    report = TensorRt("fp16").build(path)
    assert report["converted"]["float32"] == ["TopK 'best'", "TopK 'worst'"]


@pytest.mark.parametrize("name", ["graph_input_cast_0", "graph_output_cast_0"])
def test_a_graph_that_the_converter_breaks_is_refused(name: str, tmp_path: Path) -> None:
    path = written(plain([node("MatMul", "x w", name), node("Relu", name, "y")], {"w": matrix()}), tmp_path)
    with pytest.raises(TargetError, match=f"converter to fp16 fails.+'{name}' is produced twice"):
        TensorRt("fp16").build(path)


def test_names_of_the_converters_nodes_are_no_trap(tmp_path: Path) -> None:
    proto = plain([node("MatMul", "x w", "a"), node("Relu", "a", "y")], {"w": matrix()})
    proto.graph.node[0].name, proto.graph.node[1].name = "graph_input_cast0", "graph_output_cast0"
    assert TensorRt("fp16").build(written(proto, tmp_path))["converted"]["float32"] == []


def test_bodies_and_large_files_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = written(CONTROL_FLOW["if_weights_inside"](), tmp_path)
    (objection,) = TensorRt("fp16").objections(models.load(path))
    with pytest.raises(TargetError, match=r"bodies of .+tensorrt:fp32"):
        TensorRt("fp16").build(path)
    assert "bodies" in objection
    rows = 2**31 // 64
    proto = plain([node("MatMul", "x w", "a"), node("MatMul", "a v", "y")], {})
    for name, dims in (("w", (16, rows)), ("v", (rows, 16))):
        tensor = proto.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=dims)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights")
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(2**31)  # a hole
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(TargetError, match=r"4\.3 GB of weights.+takes 2\.1"):
        TensorRt("fp16").build(path)


def test_weights_beside_the_file_are_converted(tmp_path: Path) -> None:
    proto = convolutions(channels=256)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights", size_threshold=0)
    before = (tmp_path / "weights").read_bytes()
    report = TensorRt("fp16").build(path)
    assert report["bytes"] > 100_000
    assert (tmp_path / "weights").read_bytes() == before
    with pytest.raises(UserError, match="overwrite the input"):
        TensorRt("fp16").build(path, tmp_path / "weights")


def test_the_first_command_writes_what_the_others_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(convolutions(), tmp_path)
    convert, trtexec, rtx, polygraphy, _ = (shlex.split(line) for line in TensorRt("fp16").commands(path))
    copy = tmp_path / "model.fp16.onnx"
    done = subprocess.run([sys.executable, *convert[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"--onnx={copy}" in trtexec
    assert f"--onnx={copy}" in rtx
    assert polygraphy[2] == str(copy)
    assert {"--stronglyTyped"} < {*trtexec}
    assert models.load(copy).digest() == models.Model(half(onnx.load(path)).proto).digest()
    report = TensorRt("fp16").build(copy)
    assert "converted" not in report
    assert len(TensorRt("fp16").commands(copy)) == 4
    assert half_program.main(str(path), str(path)) == 1
    assert "overwrite the input" in capsys.readouterr().err


# What it does not take, foreseen and found


def attention(
    heads: int,
    keys: int,
    values: int,
    kind: int = TensorProto.FLOAT16,
    flat: bool = True,
    groups: int = 0,
    batch: int | str = "batch",
    length: int | str = "length",
) -> onnx.ModelProto:
    groups = groups or heads

    def shape(count: int, width: int) -> Sequence[int | str]:
        return [batch, length, count * width] if flat else [batch, count, length, width]

    operands = (("q", heads, keys), ("k", groups, keys), ("v", groups, values))
    inputs = [
        helper.make_tensor_value_info(name, kind, shape(count, width)) for name, count, width in operands
    ]
    output = helper.make_tensor_value_info("y", kind, shape(heads, values))
    given = {"q_num_heads": heads, "kv_num_heads": groups} if flat else {}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention", **given)
    graph = helper.make_graph([node], "attention", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (attention(4, WIDTHS[0] - 1, WIDTHS[0] - 1), ["wide"]),
        (attention(4, WIDTHS[0], WIDTHS[0]), []),
        (attention(4, 63, 63, flat=False), []),
        (attention(1, 16, 16, flat=False), []),
        (attention(1, 16, 16, batch=1), ["single"]),
        (attention(1, 16, 16, batch=1, length=16, flat=False), ["single"]),
        (attention(1, 8, 8, batch=1, length=16), []),
        (attention(4, 300, 300, batch=1, length=16), []),
        (attention(4, 300, 300, batch=1, length=16, flat=False), ["wide"]),
        (attention(6, 24, 24, groups=2), []),
        (attention(4, WIDTHS[-1], WIDTHS[-1]), []),
        (attention(4, WIDTHS[-1] + 1, WIDTHS[-1] + 1), ["wide"]),
        (attention(4, 32, 24), ["values"]),
        (attention(4, 32, 32, kind=TensorProto.BFLOAT16), []),
        (attention(4, 32, 32, kind=TensorProto.FLOAT), ["float32"]),
    ],
    ids=[
        "narrowest",
        "narrow",
        "odd",
        "single",
        "alone",
        "alone apart",
        "alone fixed",
        "fixed",
        "fixed apart",
        "grouped",
        "wide",
        "widest",
        "uneven",
        "bf16",
        "fp32",
    ],
)
def test_limits_of_attention(proto: onnx.ModelProto, words: list[str], tmp_path: Path) -> None:
    """Whatever is objected to is refused, and nothing else."""
    path = written(proto, tmp_path)
    found = TensorRt().objections(models.load(path))
    assert len(found) == len(words)
    assert all(word in text and "'attention'" in text for word, text in zip(words, found, strict=True))
    if found:
        with pytest.raises(TargetError):
            TensorRt().build(path)
    else:
        assert TensorRt().build(path)["bytes"] > 10_000


def changed(name: str) -> onnx.ModelProto:
    """A quantised model that breaks one of TensorRT's rules."""
    proto = symmetric()
    stored = {t.name: t for t in proto.graph.initializer}
    if name in ("shifted", "unsigned"):
        dtype, value = (np.int8, 3) if name == "shifted" else (np.uint8, 0)
        zero = numpy_helper.from_array(np.array(value, dtype), "other")
        proto.graph.initializer.append(zero)
        for node in proto.graph.node[:2]:
            node.input[2] = "other"
    elif name == "silent":
        del proto.graph.node[0].input[2]
    else:
        convolution = next(node for node in proto.graph.node if node.op_type == "Conv")
        bias = stored[convolution.input[2]]
        if name == "bias":
            values = np.round(numpy_helper.to_array(bias) / 1e-4).astype(np.int32)
            node = helper.make_node("DequantizeLinear", ["bias", "step"], ["real"], name="dequantised")
            proto.graph.initializer.append(numpy_helper.from_array(np.float32(1e-4), "step"))
        else:
            values = np.round(numpy_helper.to_array(bias) * 64).astype(np.int8)
            node = helper.make_node("Cast", ["bias"], ["real"], name="cast", to=TensorProto.FLOAT)
        proto.graph.initializer.append(numpy_helper.from_array(values, "bias"))
        proto.graph.node.insert(0, node)
        convolution.input[2] = "real"
    return proto


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shifted", "zero point"),
        ("unsigned", "uint8"),
        ("silent", "uint8"),
        ("bias", "int32 bias"),
        ("bare", "int8 constant"),
    ],
)
def test_rules_of_quantisation(name: str, words: str, tmp_path: Path) -> None:
    path = written(changed(name), tmp_path)
    (objection,) = TensorRt("int8").objections(models.load(path))
    assert words in objection
    with pytest.raises(TargetError):
        TensorRt("int8").build(path)


def test_its_parser_alone_takes_uint8_for_int8(tmp_path: Path) -> None:
    """Why that is refused here: what is quantised to 0 ... 255 would be cut off at 127, and nothing fails."""
    path = written(changed("unsigned"), tmp_path)
    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network(0)
    assert tensorrt_rtx.OnnxParser(network, logger).parse_from_file(str(path))
    layers = {network.get_layer(i).name: network.get_layer(i) for i in range(network.num_layers)}
    assert layers["first.q"].get_output(0).dtype == tensorrt_rtx.int8


@pytest.mark.parametrize("name", ["transformer_of_integers", "residual_of_qlinear", "qdq_by_channel"])
def test_other_forms_of_quantisation_are_foreseen(name: str, tmp_path: Path) -> None:
    path = written(QUANTISED[name](), tmp_path)
    assert TensorRt("int8").objections(models.load(path))
    with pytest.raises(TargetError):
        TensorRt("int8").build(path)


# Shapes and command lines


def test_ranges_hold_the_sizes_of_the_analysis() -> None:
    model = models.Model(TRANSFORMERS["torchscript"]())
    ((low, likely, high),) = ranges_of(model).values()
    assert all(a <= b <= c for a, b, c in zip(low, likely, high, strict=True))
    assert (low[0], high[0]) == (1, BATCH)
    assert low[1] < high[1]


def test_lengths_that_add_up_do_so_at_both_ends() -> None:
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", "past", 4]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", "new", 4]),
        helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", "past + new", 4]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "past + new", 4])
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["ab"], axis=1),
        helper.make_node("Add", ["ab", "c"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "lengths", inputs, [output])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ranges = ranges_of(models.Model(proto))
    for i in range(3):
        assert ranges["a"][i][1] + ranges["b"][i][1] == ranges["c"][i][1]
    assert ranges["c"][0][1] < ranges["c"][2][1]


def test_fixed_shapes_need_no_range(tmp_path: Path) -> None:
    proto = convolutions()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    path = written(proto, tmp_path)
    assert TensorRt().build(path)["profile"] == {}
    assert not any("Shapes" in command for command in TensorRt().commands(path))


def test_polygraphy_takes_the_shapes(tmp_path: Path) -> None:
    """The options are those of its command line; it builds, as `convert`, what `run` would run on a GPU."""
    path = written(TRANSFORMERS["torchscript"](), tmp_path)
    commands = TensorRt().commands(path)
    command = next(line for line in commands if line.startswith("polygraphy"))
    words = shlex.split(command)
    start, end = words.index("--trt-min-shapes"), words.index("--input-shapes")
    engine = tmp_path / "poly.engine"
    assert "--strongly-typed" in words
    convert = ["convert", str(path), "--convert-to", "trt", "--strongly-typed", "-o", str(engine)]
    convert += words[start:end]
    program = Path(sys.executable).with_name("polygraphy")
    done = subprocess.run(
        [str(program), *convert],
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert engine.stat().st_size > 10_000
    ((low, _, high),) = ranges_of(models.load(path)).values()
    assert f"{low}" in done.stdout.replace("[", "(").replace("]", ")") or f"{list(low)}" in done.stdout
    trtexec = shlex.split(commands[0])
    assert f"--minShapes=ids:{low[0]}x{low[1]}" in trtexec
    assert f"--maxShapes=ids:{high[0]}x{high[1]}" in trtexec
    assert "--noTF32" in trtexec
    assert "--noTF32" not in shlex.split(TensorRt("tf32").commands(path)[0])


def test_paths_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "it's a $(folder)"
    folder.mkdir()
    path = written(convolutions(), folder)
    for command in TensorRt().commands(path):
        assert any(str(path) in word for word in shlex.split(command))


# Where it runs


def test_state_says_how_far_it_goes() -> None:
    state = TensorRt().state()
    if DEVICE is None:
        assert state.reach == "builds"
        assert state.version == f"TensorRT-RTX {tensorrt_rtx.__version__}"
        assert "not run here" in state.missing
    else:
        assert state.device == DEVICE.name or "builds" in state.reach


@pytest.mark.skipif(DEVICE is not None, reason="there is a CUDA device")
def test_nothing_is_said_to_run_where_there_is_no_device(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="does not run here: no CUDA device"):
        TensorRt().load(written(convolutions(), tmp_path))


@pytest.mark.skipif(DEVICE is not None, reason="there is a CUDA device")
def test_no_memory_is_had_where_there_is_no_device() -> None:
    with pytest.raises(TargetError, match=r"driver is not installed|cuInit failed: .+ \(\d+\)"):
        Stream()


@pytest.mark.skipif(DEVICE is None, reason="not run: no CUDA device")
def test_what_is_uploaded_comes_back() -> None:
    stream = Stream()
    sent, got = np.arange(1000, dtype=np.float32), np.empty(1000, np.float32)
    address = stream.buffer("x", sent.nbytes)
    assert stream.buffer("x", 4) == address
    stream.upload(address, sent)
    stream.download(address, got)
    stream.wait()
    stream.close()
    assert (got == sent).all()


@pytest.mark.skipif(TensorRt().state().reach != "runs", reason=f"not run: {TensorRt().state().missing}")
@pytest.mark.parametrize("name", BUILT)
def test_outputs_are_those_of_onnxruntime(name: str, tmp_path: Path) -> None:
    path = written(SMALL[name](), tmp_path)
    target = asked(name)
    engine = target.load(path)
    assert engine.settings["on_cpu"] is False
    for seed in (0, 1):
        feeds, expected = truth(path, seed)
        assert error(engine.run(feeds), expected) < target.tolerance
    engine.close()
